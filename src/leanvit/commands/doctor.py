"""leanvit doctor: what this machine has, what is missing, and how to get it. Imports nothing heavy."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from leanvit import errors
from leanvit._version import __version__
from leanvit.bench import machine
from leanvit.config import DoctorConfig
from leanvit.progress import print_json, print_table

CORE = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "pillow",
    "safetensors",
    "pyyaml",
    "jinja2",
    "markupsafe",
    "rich",
)
OPTIONAL = {
    "onnx": "onnx", "onnx-ir": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx",
    "openvino": "openvino", "nncf": "peers",
    "segmentation-models-pytorch": "tasks", "pycocotools": "tasks", "faster-coco-eval": "tasks",
    "scikit-image": "tasks", "scikit-learn": "data", "datasets": "data",
    "huggingface_hub": "data", "braceexpand": "data",
    "transformers": "transformers", "pyarrow": "parquet",
    "fastapi": "serve", "starlette": "serve", "uvicorn": "serve", "h11": "serve", "prometheus-client": "serve",
    "python-multipart": "serve", "litserve": "peers",
    "tensorboard": "trackers", "wandb": "trackers", "mlflow": "trackers", "ray": "ray", "fsspec": "ray", "s3fs": "s3",
}  # fmt: skip


def examine() -> dict[str, Any]:
    """JSON values: python, machine, packages (name, version or None, extra, how to get it) and advice."""
    packages = [_package(name, None) for name in CORE] + [_package(n, extra) for n, extra in OPTIONAL.items()]
    facts = machine()
    return {
        "leanvit": __version__,
        "python": platform.python_version(),
        "machine": facts,
        "packages": packages,
        "advice": _advice(facts, packages),
    }


def _package(name: str, extra: str | None) -> dict[str, Any]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    command = f'pip install "leanvit[{extra}]"' if extra else "pip install leanvit"
    return {"name": name, "version": version, "extra": extra, "how": "" if version else command}


def _advice(facts: dict[str, Any], packages: list[dict[str, Any]]) -> list[str]:
    """Sentences that a user can act on."""
    missing = {p["name"] for p in packages if p["version"] is None}
    features = set(facts["features"])
    advice = []
    if missing & set(CORE):
        names = ", ".join(sorted(missing & set(CORE)))
        advice.append(f"core packages missing ({names}): only predict, verify and benchmark of bundles work here")
    if "onnxruntime" in missing:
        advice.append('export, predict and benchmark need ONNX Runtime: pip install "leanvit[onnx]"')
    if "scikit-learn" in missing:
        advice.append('demo and --data digits need scikit-learn: pip install "leanvit[data]"')
    if not features & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}:
        advice.append("no int8 dot product instruction: expect 8-bit bundles to be smaller but hardly faster here")
    if not features & {"avx512_bf16", "amx_int8"}:
        advice.append("no bfloat16 instruction: training runs in float32 on this CPU")
    return advice or ["nothing is missing for train, quantize, export, verify and predict"]


def run(config: DoctorConfig) -> int:
    """What this machine has and lacks."""
    facts = examine()
    if config.json:
        print_json(facts)
        return errors.EXIT_OK
    machine = facts["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {facts['python']}")
    print(f"instructions: {', '.join(machine['features']) or 'none of those that speed up int8 or bfloat16'}")
    rows = [[p["name"], p["version"] or "missing", p["extra"] or "core", p["how"]] for p in facts["packages"]]
    print_table("packages", ["package", "version", "extra", "how to get it"], rows)
    for advice in facts["advice"]:
        print(f"- {advice}")
    return errors.EXIT_OK

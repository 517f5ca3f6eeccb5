"""What each verb of the command line does; heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.progress import note, print_json, print_table

if TYPE_CHECKING:
    from leanvit import config as configs


def models(config: configs.ModelsConfig) -> int:
    """List architectures: what is counted on them beside what their authors state."""
    from leanvit.models import list_models, model_names

    entries = list_models(config.filter)
    if not entries:
        raise errors.UnknownModelError(
            f"no model matches '{config.filter}'.{errors.did_you_mean(config.filter, model_names())} "
            "Run: leanvit models"
        )
    if config.json:
        print_json(entries)
        return errors.EXIT_OK

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            e["name"],
            "x".join(map(str, e["input_size"])),
            cell(e["params"] / 1e6, 3),
            cell(e["macs"], 3),
            cell(e["paper_params"] and e["paper_params"] / 1e6, 3),
            cell(e["paper_macs"], 3),
            cell(e["paper_top1"], 1),
        ]
        for e in entries
    ]
    columns = ["model", "input", "params (M)", "GMACs", "params (paper)", "GMACs (paper)", "ImageNet top-1 (paper)"]
    print_table("leanvit models: counted here, and stated by the authors; timm's own are usable as well", columns, rows)
    return errors.EXIT_OK


def train(config: configs.TrainConfig) -> int:
    """Train, and say where the result is."""
    from leanvit.train import run
    from leanvit.train.processes import from_environment

    result = run(config)
    if not from_environment().first:
        return errors.EXIT_OK
    best = result.best
    print(f"best top-1 {best.top1:.2f}% ({best.correct} of {best.images} images) in {result.seconds:.0f} s")
    print(f"checkpoint {result.checkpoint}")
    print(f"next: leanvit quantize {config.output} --data {config.data}")
    return errors.EXIT_OK


def _accuracy(config: configs.ValConfig) -> dict[str, Any]:
    """Top-1 and top-5 alone."""
    from dataclasses import asdict

    from leanvit.data import Loader, check_classes
    from leanvit.evaluation.run import read_images
    from leanvit.evaluation.subject import open_network
    from leanvit.export.bundle import is_bundle
    from leanvit.export.verify import run_logits, top1_percent
    from leanvit.runtime import Predictor
    from leanvit.train import evaluate

    if is_bundle(Path(config.model)):
        predictor = Predictor(config.model, threads=config.threads, runtime=config.runtime or "onnxruntime")
        images, _ = read_images(config, predictor.manifest.data)
        evaluation = _bundle_images(predictor.manifest, config.data, images, config.bad_images)
        logits = run_logits(predictor, evaluation.pixels, config.batch_size)
        top5 = (logits.argsort(1)[:, -5:] == evaluation.labels[:, None]).any(1)
        correct = int((logits.argmax(1) == evaluation.labels).sum())
        top1 = top1_percent(logits, evaluation.labels)
        return {"top1": top1, "top5": 100 * float(top5.mean()), "images": len(logits), "correct": correct}
    network, info, device = open_network(config)
    images, _ = read_images(config, {"val_fraction": info.val_fraction, "seed": info.seed})
    check_classes(images.classes, info.labels, config.data)
    loader = Loader(images, info.preprocess, config.batch_size, config.bad_images)
    return asdict(evaluate(network, loader, device))


def val(config: configs.ValConfig) -> int:
    """Accuracy of a checkpoint, quantized model or bundle, and on request all else that is known of its answers."""
    if config.is_detailed:
        return _val_detailed(config)
    result = _accuracy(config)
    if config.json:
        print_json(result)
    else:
        counted = f"({result['correct']} of {result['images']} images)"
        print(f"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  {counted}")
    return errors.EXIT_OK


def _val_detailed(config: configs.ValConfig) -> int:
    from leanvit.evaluation.run import print_result, run

    result = run(config)
    if config.json:
        print_json(result)
    else:
        print_result(result)
    if config.output:
        note(f"next: leanvit report {config.output}")
    return errors.EXIT_OK


def _load_model(spec: str) -> Any:
    """Model and info of a checkpoint, a run folder or NAME.TAG."""
    from leanvit.loading import load_model

    return load_model(spec)


def quantize(config: configs.QuantizeConfig) -> int:
    """Quantize a checkpoint, measure it, and save it."""
    from leanvit.config import save_yaml
    from leanvit.files import only_writer
    from leanvit.quant.measure import quantize_and_measure
    from leanvit.quant.store import save_quantized

    model, info = _load_model(config.model)
    with only_writer(config.output):
        journal = Path(config.output) / "search.jsonl" if config.has_budget else None
        quantized, accuracy = quantize_and_measure(model, info, config, config.scheme(), journal)
        save_yaml(config, Path(config.output) / "config.yaml")
        path = save_quantized(config.output, quantized, info)
    report = quantized.report
    name = f"average {report['average_bits']:.2f} bits" if config.has_budget or config.plan else (
        f"W{config.weight_bits}A{config.activation_bits}"
    )  # fmt: skip
    drop = report["float_accuracy"]["top1"] - accuracy["top1"]
    print(
        f"{name} top-1 {accuracy['top1']:.2f}% ({accuracy['correct']} of {accuracy['images']}), {drop:+.2f} points lost"
    )
    print(f"weights {report['quantized_bytes'] / 1e6:.2f} MB, float {report['float_bytes'] / 1e6:.2f} MB: {path}")
    if report["search"]:
        print(
            f"plan {path.with_name('plan.json')}: {report['search']['evaluations']} evaluations; edit it, then --plan"
        )
    print(f"next: leanvit export {config.output} --data {config.data}")
    return errors.EXIT_OK


def export(config: configs.ExportConfig) -> int:
    """Write a bundle."""
    from leanvit.config import save_yaml
    from leanvit.data import check_classes, load_split
    from leanvit.export.api import export as run
    from leanvit.quant.store import is_quantized, load_quantized
    from leanvit.runtime import read_manifest

    quantized = is_quantized(config.model)
    model, info = load_quantized(config.model) if quantized else _load_model(config.model)
    images = float_top1 = None
    if config.data:
        images = load_split(config.data, "val", val_fraction=info.val_fraction, seed=info.seed)
        check_classes(images.classes, info.labels, config.data)
        float_top1 = _float_top1(model, info, config)
    bundle = run(
        model,
        config.output,
        labels=info.labels,
        profile=config.profile,
        preprocess=info.preprocess,
        images=images,
        float_top1=float_top1,
        max_drop=config.max_drop,
        min_speedup=config.min_speedup,
        opset=config.opset,
        runtimes=config.runtimes or None,
        architecture=info.architecture,
        data={"name": info.data, "val_fraction": info.val_fraction, "seed": info.seed},
    )
    save_yaml(config, bundle.with_name(f"{bundle.name}.config.yaml"))
    print(f"runs in {', '.join(read_manifest(bundle).runtimes)}")
    print(f"bundle {bundle}: every check passed" + ("" if config.data else "; accuracy NOT verified (give --data)"))
    print(f"next: leanvit predict {bundle} IMAGE")
    return errors.EXIT_OK


def _float_top1(model: Any, info: Any, config: configs.ExportConfig) -> float | None:
    """Float accuracy on the export's images: as measured when it was quantized, on the same data."""
    from leanvit.quant import QuantizedModel

    if isinstance(model, QuantizedModel):
        measured = model.report.get("float_accuracy") if model.report.get("data") == config.data else None
    else:
        measured = info.metrics if info.data == config.data else None
    if not measured:
        note(f"the float model was not measured on {config.data}: the accuracy drop is not checked")
    return measured["top1"] if measured else None


def _bundle_images(manifest: Any, data: str, images: Any, bad_images: Any = "fail") -> Any:
    """Labelled, prepared images for a bundle."""
    import numpy as np

    from leanvit.data import Loader, check_classes
    from leanvit.export.verify import Evaluation

    check_classes(images.classes, manifest.labels, data)
    batches = list(Loader(images, manifest.preprocess, 64, bad_images))
    pixels = np.concatenate([x.numpy() for x, _ in batches])
    labels = np.concatenate([y.numpy() for _, y in batches])
    return Evaluation(pixels, labels, images.name, classes=images.classes)


def _network_as_exported(path: str, manifest: Any) -> Any:
    """The torch network that a bundle was written from, in the form that its profile runs."""
    from leanvit.checkpoint import load_checkpoint
    from leanvit.export.executed import executed_form
    from leanvit.quant.store import is_quantized, load_quantized

    if not is_quantized(path):
        return load_checkpoint(path)[0]
    quantized, _ = load_quantized(path)
    return executed_form(quantized.graph, manifest.profile, manifest.quantization.get("lifted", ()))


def verify(config: configs.VerifyConfig) -> int:
    """Check a bundle."""
    from dataclasses import replace

    from leanvit.data import load_split
    from leanvit.export.verify import print_verdict, require_passed, verify_bundle
    from leanvit.runtime import read_manifest

    manifest = read_manifest(config.bundle)
    evaluation = None
    if config.data:
        split = {key: manifest.data[key] for key in ("val_fraction", "seed") if key in manifest.data}
        evaluation = _bundle_images(manifest, config.data, load_split(config.data, "val", **split))
    if config.model:
        from leanvit.export.api import synthetic_images, torch_logits
        from leanvit.export.verify import Evaluation

        network = _network_as_exported(config.model, manifest)
        if evaluation is None:
            import numpy as np

            pixels = np.stack(synthetic_images(32, manifest.preprocess.input_size, seed=1))
            evaluation = Evaluation(pixels, np.full(len(pixels), -1, np.int64), "synthetic images")
        expected = torch_logits(network, evaluation.pixels, manifest.preprocess)
        evaluation = replace(evaluation, expected=expected)
    result = verify_bundle(config.bundle, evaluation)
    print_verdict(result, config.bundle, as_json=config.json)
    require_passed(result, config.bundle)
    return errors.EXIT_OK


def predict(config: configs.PredictConfig) -> int:
    """Classify images."""
    from leanvit.predict import run

    run(config)
    return errors.EXIT_OK


def _latency_table(config: configs.BenchmarkConfig, path: str) -> int:
    """Measure what the products of one model cost."""
    import torch

    from leanvit.export.latency import measure_table
    from leanvit.files import write_json

    if len(config.targets) != 1:
        raise errors.ConfigError(f"--table with {len(config.targets)} targets, expected one checkpoint or NAME.TAG")
    model, info = _load_model(config.targets[0])
    example = torch.zeros(1, 3, *info.preprocess.input_size)
    table = measure_table(model, example, threads=config.threads, rounds=config.rounds)
    write_json(path, table)
    rows = [
        [key, f"{row['float_ms']:.3f}", f"{row['int8_ms']:.3f}", f"{row['float_ms'] / row['int8_ms']:.2f}"]
        for key, row in table["sites"].items()
    ]
    columns = ["product: weight, elements, multiply-adds", "float ms", "int8 ms", "speed ratio"]
    print_table(f"{table['machine']['cpu']}, {table['threads']} threads, {table['date']}", columns, rows)
    print(f"next: leanvit quantize {config.targets[0]} --latency-table {path} --latency-ms MILLISECONDS")
    return errors.EXIT_OK


def benchmark(config: configs.BenchmarkConfig) -> int:
    """Time targets against each other, or the products of one model."""
    if config.table:
        return _latency_table(config, config.table)
    from leanvit.bench import benchmark as run
    from leanvit.bench import describe
    from leanvit.files import write_json

    described = [describe(path, runtime) for path in config.targets for runtime in config.runtimes]
    targets = list(dict.fromkeys(described))
    result = run(targets, batch_sizes=config.batch_sizes, threads=config.threads, rounds=config.rounds)
    rows = [
        [
            r["name"],
            str(r["batch_size"]),
            f"{r['median_ms']:.2f}",
            f"{r['p10_ms']:.2f} to {r['p90_ms']:.2f}",
            f"{r['images_per_second']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['peak_megabytes']:.0f}" if r["peak_megabytes"] else "",
            f"{r['load_seconds']:.2f}",
        ]
        for r in result["results"]
    ]
    columns = ["target", "batch", "median ms", "p10 to p90 ms", "images/s", "speed ratio", "MB", "peak MiB", "load s"]
    print_table(f"{result['machine']['cpu']}, {result['threads']} threads, {result['date']}", columns, rows)
    if config.output:
        from leanvit.config import save_yaml

        write_json(config.output, result)
        save_yaml(config, Path(config.output).with_suffix(".config.yaml"))
    return errors.EXIT_OK


def analyze(config: configs.AnalyzeConfig) -> int:
    """Look into one model or two, and draw the page."""
    from leanvit.analysis.study import describe_run, print_study, require_parts, save_study, study
    from leanvit.config import save_yaml
    from leanvit.files import only_writer
    from leanvit.report import write_report
    from leanvit.train import pick_device

    if not config.models:
        raise errors.ConfigError("no model given, expected one or two. Run: leanvit analyze --help")
    device = pick_device(config.device)
    models = [(spec, *_load_model(spec)) for spec in config.models]
    with only_writer(config.output):
        save_yaml(config, Path(config.output) / "config.yaml")
        result, arrays = study(models, config, device)
        save_study(describe_run(config, result), arrays, config.output)
        page = write_report(config.output)
    print_study(result)
    print(f"report {page}")
    require_parts(result, config)
    return errors.EXIT_OK


_SIDES = ("width", "height")


def data_inspect(config: configs.DataInspectConfig) -> int:
    """Look at every image of a data set."""
    from leanvit.inspection import PAGE_NAME, require_readable, run

    result = run(config)
    if config.json:
        print_json(result)
    else:
        _print_inspection(result)
        print(f"page {Path(config.output) / PAGE_NAME}")
    require_readable(result)
    return errors.EXIT_OK


def data_compose(config: configs.DataComposeConfig) -> int:
    """Compose annotated practice pictures."""
    from leanvit.scenes.compose import describe, run

    print(describe(run(config), config))
    return errors.EXIT_OK


def _print_inspection(result: dict[str, Any]) -> None:
    rows = []
    for split, part in result["parts"].items():
        sides = [[part[side][key] for key in ("min", "median", "max")] if part[side] else [] for side in _SIDES]
        sizes = [" / ".join(f"{value:g}" for value in values) for values in sides]
        kinds = ", ".join(f"{name} {count}" for name, count in part["modes"].items())
        rows.append([split, str(part["images"]), *sizes, kinds, str(len(part["corrupt"]))])
    columns = ["part", "images", "width: min / median / max", "height", "modes", "can't be read"]
    print_table(result["data"], columns, rows)
    balance, copies = result["balance"], result["duplicates"]
    ends = [f"{balance[end]['images']} of '{balance[end]['class']}'" for end in ("largest", "smallest")]
    ratio = f"{balance['ratio']:.2f}" if balance["ratio"] else "none"
    print(f"{len(result['classes'])} classes, readable training images from {ends[0]} to {ends[1]}, ratio {ratio}")
    kinds = f"{copies['leaks']} from training into another part, {copies['contradictions']} with different classes"
    print(f"{copies['extra']} duplicates, in {len(copies['groups'])} groups: {kinds}")


def report(config: configs.ReportConfig) -> int:
    """Draw a run."""
    from leanvit.downstream.pictures import golden_findings
    from leanvit.report import write_report

    print(f"report {write_report(config.run, config.output, golden_findings(config.run))}")
    return errors.EXIT_OK


def convert(config: configs.ConvertConfig) -> int:
    """Convert a checkpoint of the authors."""
    from leanvit.convert import run

    print(f"{config.output}: {run(config)}")
    return errors.EXIT_OK


def doctor(config: configs.DoctorConfig) -> int:
    """What this machine has and lacks."""
    from leanvit.doctor import examine

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


def demo(config: configs.DemoConfig) -> int:
    """The whole path."""
    from leanvit.demo import run

    run(config)
    return errors.EXIT_OK

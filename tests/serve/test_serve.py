"""The service as its users see it: what it answers, what it refuses, and what it says of itself."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import LABELS, ROOT, smooth
from leanvit import Predictor
from leanvit.files import read_json
from leanvit.imaging import encode_png
from serving import Running, serving

IMAGE = encode_png(smooth(40, 48, seed=5))


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Running]:
    with serving(f"first={shared_bundle}", f"second={shared_bundle}", "--threads", 1, "--max-body", 300_000) as running:
        yield running


@pytest.fixture(scope="module")
def predictor(shared_bundle: Path) -> Predictor:
    return Predictor(shared_bundle, threads=1)


def form(*files: bytes, field: str = "") -> tuple[bytes, str]:
    """A browser's form and its Content-Type."""
    lines = b""
    for data in files:
        lines += b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + data + b"\r\n"
    if field:
        lines += f'--xyz\r\nContent-Disposition: form-data; name="{field}"\r\n\r\nx\r\n'.encode()
    return lines + b"--xyz--\r\n", "multipart/form-data; boundary=xyz"


def test_a_prediction_is_what_the_predictor_returns(server: Running, predictor: Predictor) -> None:
    for seed in range(5):
        image = encode_png(smooth(40 + seed, 48, seed))
        reply = server.predict("first", image)
        assert reply.code == 200
        assert reply.headers["content-type"] == "application/json"
        found = [(one["label"], one["probability"]) for one in reply.json["predictions"]]
        assert found == [(label, round(p, 6)) for label, p in predictor.predict(image)]
        assert reply.json["image"] == {"height": 40 + seed, "width": 48}
        assert reply.json["bundle"] == predictor.manifest.sha256
        assert set(reply.json["milliseconds"]) == {"decode", "queue", "compute"}
        assert all(value >= 0 for value in reply.json["milliseconds"].values())


def test_a_form_of_a_browser_and_any_content_type_are_the_same_image(server: Running) -> None:
    plain = server.predict("first", IMAGE, "?top_k=10").json["predictions"]
    assert [one["label"] for one in plain] != list(LABELS)
    body, kind = form(IMAGE)
    assert server.predict("first", body, "?top_k=10", Content_Type=kind).json["predictions"] == plain
    for kind in ("image/png", "application/x-www-form-urlencoded", "application/octet-stream"):
        assert server.predict("first", IMAGE, "?top_k=10", Content_Type=kind).json["predictions"] == plain


def test_what_was_converted_is_said(server: Running) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(40, 48, 1)).convert("CMYK").save(buffer, "JPEG")
    assert "CMYK" in server.predict("first", buffer.getvalue()).json["notes"][0]


BAD = [
    ("first", b"", "", {}, 400),
    ("first", b"no image", "", {}, 400),
    ("first", IMAGE[:-40], "", {}, 400),
    ("first", IMAGE, "?top_k=0", {}, 400),
    ("first", IMAGE, "?top_k=1&top_k=2", {}, 400),
    ("first", IMAGE, "?top_k=-1", {}, 400),
    ("first", IMAGE, "?topk=3", {}, 400),
    ("first", IMAGE, "?score_threshold=0.5", {}, 400),
    ("first", IMAGE, "?map=true", {}, 400),
    ("first", IMAGE, "", {"X_Timeout_Ms": "soon"}, 400),
    ("first", IMAGE, "", {"Content_Encoding": "gzip"}, 415),
    ("first", IMAGE, "", {"Accept": "image/png"}, 406),
    ("first", *form(IMAGE, IMAGE)[:1], "", {"Content_Type": form()[1]}, 400),
    ("first", *form(IMAGE, field="top_k")[:1], "", {"Content_Type": form()[1]}, 400),
    ("first", *form()[:1], "", {"Content_Type": form()[1]}, 400),
    ("first", IMAGE, "", {"Content_Type": "multipart/form-data"}, 400),
    ("third", IMAGE, "", {}, 404),
    ("..%2f..%2fetc", IMAGE, "", {}, 404),
    ("first%00", IMAGE, "", {}, 404),
    ("first", bytes(300_001), "", {}, 413),
]


@pytest.mark.parametrize(("name", "body", "query", "headers", "code"), BAD)
def test_a_bad_request_gets_its_code_and_a_sentence(
    server: Running, name: str, body: bytes, query: str, headers: dict[str, str], code: int
) -> None:
    reply = server.predict(name, body, query, **headers)
    assert reply.code == code, reply.body
    assert list(reply.json) == ["error"]
    for secret in ("/tmp", "/work", "etc", ".py", "Traceback", "leanvit", "0x", "BytesIO"):
        assert secret not in reply.json["error"]
    assert server.predict("first", IMAGE).code == 200


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(shared_bundle: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (3000, 2000)).save(buffer, "PNG")
    with serving(shared_bundle, "--max-pixels", 5_999_999) as running:
        reply = running.predict(shared_bundle.name, buffer.getvalue())
        assert (reply.code, reply.json["error"]) == (413, "3000 x 2000 pixels, expected at most 5999999 in all")
        assert running.predict(shared_bundle.name, IMAGE).code == 200


def test_models_are_listed_and_described(server: Running, predictor: Predictor, shared_bundle: Path) -> None:
    listed = server.get("/v1/models").json["models"]
    assert [one["name"] for one in listed] == ["first", "second"]
    facts = server.get("/v1/models/second").json
    assert facts["labels"] == list(LABELS)
    assert facts["gate"] == read_json(shared_bundle / "verify.json")
    assert facts["bundle"] == predictor.manifest.sha256 == listed[0]["bundle"]
    assert facts["bytes"]["model.onnx"] == (shared_bundle / "model.onnx").stat().st_size
    assert facts["options"] == ["top_k"]
    assert facts["bits"] is None
    assert {key: facts[key] for key in listed[1]} == listed[1]
    assert server.get("/v1/models/third").code == 404


def test_other_paths_and_methods_are_errors_in_json(server: Running) -> None:
    for method, path, code in (("GET", "/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", "/page/../app.py", 404),
                               ("GET", "/page/..%2fapp.py", 404), ("GET", "/page/app.py", 404)):  # fmt: skip
        reply = server.ask(method, path)
        assert reply.code == code
        assert list(reply.json) == ["error"]


def test_the_routes_are_those_of_the_documents(server: Running) -> None:
    described = server.get("/openapi.json").json
    routes = {f"{method.upper()} {path}" for path, methods in described["paths"].items() for method in methods}
    assert routes == {
        "GET /metrics", "GET /v1/models", "GET /v1/models/{name}", "POST /v1/models/{name}:predict", "GET /v2",
        "GET /v2/health/live", "GET /v2/health/ready", "GET /v2/models/{name}", "GET /v2/models/{name}/ready",
        "POST /v2/models/{name}/infer", "GET /v2/models/{name}/versions/1", "GET /v2/models/{name}/versions/1/ready",
        "POST /v2/models/{name}/versions/1/infer",
    }  # fmt: skip
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    for route in routes:
        path = route.split()[1].replace("{name}", "NAME").replace("/versions/1", "")
        assert f"`{path}`" in page or f"{path}`" in page, path


def test_metrics_count_what_was_done(server: Running) -> None:
    before = server.metric("leanvit_requests_total", model="second", code="200")
    sizes = server.metric("leanvit_batch_images_sum", model="second")
    with ThreadPoolExecutor(4) as pool:
        codes = [reply.code for reply in pool.map(lambda _: server.predict("second", IMAGE), range(12))]
    assert codes == [200] * 12
    assert server.metric("leanvit_requests_total", model="second", code="200") - before == 12
    assert server.metric("leanvit_batch_images_sum", model="second") - sizes == 12
    assert server.metric("leanvit_pending", model="second") == 0
    for stage in ("decode", "queue", "compute"):
        assert server.metric("leanvit_seconds_count", model="second", stage=stage) > 0
    digest = server.get("/v1/models/second").json["bundle"]
    assert server.metric("leanvit_model_info", model="second", bundle=digest) == 1


def test_the_log_says_what_was_asked_and_not_what_it_held(server: Running) -> None:
    before = len(server.named("request"))
    server.predict("first", IMAGE, "?top_k=3", Authorization="Bearer secret-of-a-client")
    server.get("/nothing%0A%7B%22event%22:1")
    # Lines are written after the response, and those of earlier tests may still come.
    for _ in range(200):
        last = server.named("request", before + 2)
        if any('"event"' in line["path"] for line in last):
            break
        time.sleep(0.05)
    text = json.dumps(last)
    assert "/v1/models/first:predict" in text
    for hidden in ("top_k=3", "secret-of-a-client", base64.b64encode(IMAGE).decode()[:30], "\\u0089PNG"):
        assert hidden not in text
    assert {line["code"] for line in last[-2:]} == {200, 404}


WITHOUT_TORCH = """
import sys

BLOCKED = ("torch", "timm", "torchvision", "safetensors", "rich", "yaml", "sklearn", "onnx", "scipy")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from leanvit.config import ServeConfig
from leanvit.serve.app import create_app
from leanvit.serve.limits import Limits
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import Models
from leanvit.serve.start import serve
from leanvit.serve.service import Service
from leanvit.serve.workers import serve_by_many

config = ServeConfig(bundles=[f"one={sys.argv[1]}"])
metrics = Metrics()
service = Service(config, Models(config, metrics), metrics, Limits(config, None))
print(len(create_app(service).routes) > 10, service.model("one").facts["task"])
"""


def test_it_serves_where_importing_torch_raises(shared_bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(shared_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "classify"], done.stderr


def test_the_page_has_its_policy_and_its_files_only(server: Running) -> None:
    folder = ROOT / "src" / "leanvit" / "serve" / "page"
    reply = server.get("/")
    assert reply.body == (folder / "index.html").read_bytes()
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    for path in folder.iterdir():
        assert server.get(f"/page/{path.name}").body == path.read_bytes()


def test_pixels_of_a_large_batch_are_each_its_own(server: Running, predictor: Predictor) -> None:
    images = [encode_png(smooth(40, 40, seed)) for seed in range(30)]
    expected = [predictor.predict(image, top_k=10) for image in images]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda image: server.predict("first", image, "?top_k=10"), images * 4))
    for reply, wanted in zip(replies, expected * 4, strict=True):
        found = {one["label"]: one["probability"] for one in reply.json["predictions"]}
        assert found == pytest.approx(dict(wanted), abs=1e-5)
    assert np.ptp([one[0][1] for one in expected]) > 0.01

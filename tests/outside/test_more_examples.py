"""examples/edit_a_plan.py, own_pass.py and serving_client.py, run as their first lines say."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common import ROOT, main_of
from leanvit.checkpoint import save_checkpoint
from serving import serving
from small_vit import classes, small_info, small_vit

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "small.safetensors"
    save_checkpoint(path, small_vit(), small_info())
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(classes(tmp_path_factory.mktemp("photos"), 30))


def test_an_edited_plan_costs_more_and_is_nearer(
    network: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("edit_a_plan.py")(network, photos, str(tmp_path / "bundle"), images=32)
    *_, searched, edited, bundle = capsys.readouterr().out.splitlines()
    bits, divergence = zip(
        *((float(line.split()[1]), float(line.split()[-1])) for line in (searched, edited)), strict=True
    )
    assert bits[0] <= 4 < bits[1]
    assert divergence[1] < divergence[0]
    assert (Path(bundle) / "model.onnx").is_file()


def test_the_pass_runs_and_lowers_the_divergence(
    network: str, photos: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main_of("own_pass.py")(network, photos, images=32)
    without, with_pass = capsys.readouterr().out.splitlines()
    assert float(with_pass.split()[2].rstrip(",")) < float(without.split()[2].rstrip(","))
    assert "largest" in with_pass


def test_the_client_is_answered_and_waits_for_a_busy_service(
    bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = main_of("serving_client.py")
    with serving(bundle) as running:
        (model,) = running.get("/v1/models").json["models"]
        client(f"http://127.0.0.1:{running.port}", model["name"], str(photo))
    assert json.loads(capsys.readouterr().out.partition(": ")[2])["predictions"]

    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if len(asked) > 1 else 503)
            self.send_header("Retry-After", "0.1")
            self.end_headers()
            self.wfile.write(b'{"predictions": []}')

        def log_message(self, *given: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client(f"http://127.0.0.1:{server.server_port}", "any", str(photo))
        server.shutdown()
    assert asked == [photo.read_bytes()] * 2

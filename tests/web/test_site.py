"""The folder of `leanvit web`: what is in it, what it refuses, and the server that sends its headers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chromium import running
from common import Outcome, smooth
from leanvit.config import Preprocess
from leanvit.errors import BundleError, ConfigError
from leanvit.imaging import decode
from leanvit.runtime.bundle import load_golden, load_golden_records, read_manifest, save_golden, sign
from leanvit.web import onnxruntime_web, site
from leanvit.web.serving import open_server
from leanvit.web.site import write_site


@pytest.fixture
def small_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of three small files that passes for onnxruntime-web."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    files = {}
    for name, (page_name, _) in onnxruntime_web.FILES.items():
        (folder / "dist" / name).write_text(name, encoding="utf-8")
        files[name] = (page_name, hashlib.sha256(name.encode()).hexdigest())
    monkeypatch.setattr(onnxruntime_web, "FILES", files)
    return folder


def test_the_folder_is_whole_and_tells_its_hashes(bundle: Path, small_runtime: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = write_site(bundle, out, float_bundle=bundle, onnxruntime_web=str(small_runtime))
    values = json.loads((out / "web.json").read_text(encoding="utf-8"))
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert set(files) == {*values["files"], "web.json", "sw.js"}
    assert {"bundle/model.onnx", "float/model.onnx", "ort/ort.js", "index.html", "worker.js"} <= set(files)
    for name, digest in values["files"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    for name in ("bundle.json", "model.onnx", "golden.npz"):
        assert (out / "bundle" / name).read_bytes() == (bundle / name).read_bytes()
    assert written.bytes == sum(path.stat().st_size for path in files.values())
    assert (values["float"], values["golden"], written.rewritten) == (True, {}, 0)
    for name in ("index.html", "sw.js"):
        assert not re.search("@[A-Z]+@", files[name].read_text(encoding="utf-8"))


def test_another_bundle_is_another_version_for_the_service_worker(
    bundle: Path, small_runtime: Path, tmp_path: Path
) -> None:
    out, found = tmp_path / "out", []
    for labels in ("first", "first", "second"):
        sign(bundle, replace(read_manifest(bundle), architecture=labels))
        write_site(bundle, out, onnxruntime_web=str(small_runtime))
        found.append((out / "sw.js").read_bytes())
    assert found[0] == found[1] != found[2]


def test_golden_images_that_browsers_read_otherwise_become_png(
    bundle: Path, small_runtime: Path, tmp_path: Path
) -> None:
    images, logits = load_golden(bundle)
    odd = []
    for mode, kind in (("RGB", "TIFF"), ("RGBA", "PNG")):
        buffer = io.BytesIO()
        image = Image.fromarray(smooth(40, 50, 1)).convert(mode)
        if mode == "RGBA":
            image.putalpha(100)
        image.save(buffer, kind)
        odd.append(buffer.getvalue())
    images[1:3] = odd
    manifest = read_manifest(bundle)
    save_golden(bundle, images, logits, **load_golden_records(bundle))
    sign(bundle, manifest)
    written = write_site(bundle, tmp_path / "out", onnxruntime_web=str(small_runtime))
    values = json.loads((tmp_path / "out" / "web.json").read_text(encoding="utf-8"))
    assert written.rewritten == 2
    assert list(values["golden"]) == ["golden/1.png", "golden/2.png"]
    for index, image in enumerate(odd, 1):
        png = np.asarray(Image.open(tmp_path / "out" / "golden" / f"{index}.png"))
        assert np.array_equal(png, decode(image).pixels)


def test_a_folder_of_something_else_is_not_replaced(bundle: Path, small_runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="not a folder of leanvit web"):
        write_site(bundle, tmp_path / "out", onnxruntime_web=str(small_runtime))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_a_failed_writing_leaves_the_old_folder(bundle: Path, small_runtime: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_site(bundle, out, onnxruntime_web=str(small_runtime))
    before = sorted(out.rglob("*"))
    shutil.rmtree(small_runtime)
    with pytest.raises(ConfigError):
        write_site(bundle, out, onnxruntime_web=str(small_runtime))
    assert sorted(out.rglob("*")) == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("wrong", ["task", "channels", "float"])
def test_bundles_that_the_page_can_not_run(bundle: Path, small_runtime: Path, tmp_path: Path, wrong: str) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = read_manifest(other)
    four = Preprocess((32, 32), mean=(0.5,) * 4, std=(0.5,) * 4)
    changes = {"task": {"task": "count"}, "channels": {"preprocess": four}, "float": {"labels": ("a", "b")}}
    sign(other, replace(manifest, **changes[wrong]))  # type: ignore[arg-type]
    error, words = {
        "task": (BundleError, "expected one of classify"), "channels": (BundleError, "4 bands"),
        "float": (ConfigError, "labels is"),
    }[wrong]  # fmt: skip
    source, rival = (bundle, other) if wrong == "float" else (other, None)
    with pytest.raises(error, match=words):
        write_site(source, tmp_path / "out", float_bundle=rival, onnxruntime_web=str(small_runtime))


# --- onnxruntime-web ---


def packed(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "package")
    return path


def test_a_package_is_read_from_folders_and_archives(small_runtime: Path, tmp_path: Path) -> None:
    archive = packed(small_runtime, tmp_path / "ort.tgz")
    found = [onnxruntime_web.read_files(str(path)) for path in (small_runtime, small_runtime / "dist", archive)]
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == ["ort.js", "ort-wasm.js", "ort-wasm.wasm"]


def test_npm_is_asked_once(small_runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pack(folder: Path) -> Path:
        calls.append(folder)
        return packed(small_runtime, folder / "ort.tgz")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(onnxruntime_web, "_npm_pack", pack)
    assert onnxruntime_web.read_files() == onnxruntime_web.read_files()
    assert len(calls) == 1


def test_without_npm_the_remedy_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Callable[..., Outcome]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = leanvit("web", bundle, tmp_path / "out")
    assert outcome.code == 4
    assert "apt-get install npm" in outcome.error
    assert "--onnxruntime-web" in outcome.error
    assert not (tmp_path / "out").exists()


def test_npm_s_own_words_are_kept(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho getaddrinfo ENOTFOUND >&2\nexit 1\n", encoding="utf-8")
    npm.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(onnxruntime_web.EnvironmentProblem, match=r"ENOTFOUND.*Check the network"):
        onnxruntime_web.read_files()


@pytest.mark.parametrize("kind", ["changed", "missing", "no archive", "no package"])
def test_another_package_is_refused(
    small_runtime: Path, tmp_path: Path, kind: str, leanvit: Callable[..., Outcome], bundle: Path
) -> None:
    source = small_runtime
    if kind == "changed":
        (small_runtime / "dist" / "ort.wasm.min.mjs").write_text("other", encoding="utf-8")
    elif kind == "missing":
        (small_runtime / "dist" / "ort.wasm.min.mjs").unlink()
    elif kind == "no archive":
        source = tmp_path / "letter.tgz"
        source.write_text("a letter", encoding="utf-8")
    else:
        shutil.rmtree(small_runtime / "dist")
        source = packed(small_runtime, tmp_path / "ort.tgz")
    outcome = leanvit("web", bundle, tmp_path / "out", "--onnxruntime-web", source)
    assert outcome.code == (5 if kind == "changed" else 2)
    assert f"npm pack {onnxruntime_web.PACKAGE}" in outcome.error


# --- serving ---


def test_the_server_sends_what_threads_ask_for_and_stays_in_its_folder(
    bundle: Path, small_runtime: Path, tmp_path: Path
) -> None:
    write_site(bundle, tmp_path / "out", onnxruntime_web=str(small_runtime))
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    with open_server(tmp_path / "out") as server, running(server) as url:
        for path, kind in (
            ("", "text/html"),
            ("worker.js", "text/javascript"),
            ("ort/ort-wasm.wasm", "application/wasm"),
        ):
            answer = urllib.request.urlopen(url + path)
            assert answer.headers["Content-Type"].startswith(kind)
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Content-Security-Policy"].startswith(site.POLICY)
        for path in ("bundle/", "../secret", "%2e%2e/secret"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + path)
        with (
            pytest.raises(onnxruntime_web.EnvironmentProblem, match="Choose another --port"),
            open_server(tmp_path, server.server_port),
        ):
            pass
        assert server.server_address[0] == "127.0.0.1"

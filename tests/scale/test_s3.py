"""Images from an S3 store and results to it, by moto's server on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from common import Outcome, save_image, smooth
from leanvit.errors import is_installed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not (is_installed("s3fs") and is_installed("moto")), reason='S3 is missing: pip install s3fs "moto[server]"'
    ),
]
PICTURES = 9


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; its endpoint and keys are told as s3fs' users do, by the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "of",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("photos")
        yield "s3://photos"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_images_and_results_in_a_bucket(
    bucket: str, cluster: ModuleType, shared_bundle: Path, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    import s3fs

    store = s3fs.S3FileSystem()
    for number in range(PICTURES):
        path = save_image(tmp_path / f"{number}.png", smooth(24, 24, seed=number))
        store.put_file(str(path), f"photos/in/{number % 2}/{number}.png")
    store.pipe_file("photos/in/0/broken.png", b"no picture")
    command = ["predict", shared_bundle, f"{bucket}/in", "--part-images", 4, "--output"]
    alone = leanvit(*command, f"{tmp_path}/alone/")
    assert alone.code == 6, alone.err
    there = leanvit(*command, f"{bucket}/out")
    assert there.code == 6, there.err
    on_ray = leanvit(*command, f"{bucket}/ray", "--ray", "local", "--ray-workers", 2)
    assert on_ray.code == 6, on_ray.err
    parts = sorted((tmp_path / "alone").glob("part-*"))
    assert len(parts) == 3
    for part in parts:
        assert store.cat_file(f"photos/out/{part.name}") == part.read_bytes()
        assert store.cat_file(f"photos/ray/{part.name}") == part.read_bytes()
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert [row["path"] for row in rows if "error" in row] == [f"{bucket}/in/0/broken.png"]
    assert len(rows) == PICTURES + 1
    missing = leanvit(*command[:2], f"{bucket}/none", "--output", f"{tmp_path}/none/")
    assert missing.code == 3
    assert "no images found" in missing.err


def test_a_store_that_refuses_fails_by_name_and_is_tried_again(
    bucket: str, shared_bundle: Path, tmp_path: Path, leanvit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    store = s3fs.S3FileSystem()
    store.put_file(str(save_image(tmp_path / "one.png", smooth(24, 24, seed=1))), "photos/few/one.png")
    (tmp_path / "list.txt").write_text("s3://photos/few/one.png\ns3://photos/few/none.png\n")
    command = ["predict", shared_bundle, f"@{tmp_path}/list.txt", "--output", f"{tmp_path}/parts/"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    refused = leanvit(*command)
    assert refused.code == 6
    assert "Check that this machine may read it" in refused.err
    assert not list((tmp_path / "parts").glob("part-*"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    s3fs.S3FileSystem.clear_instance_cache()
    done = leanvit(*command, "--resume")
    assert done.code == 6, done.err
    rows = [json.loads(line) for part in (tmp_path / "parts").glob("part-*") for line in part.read_text().splitlines()]
    assert ["error" in row for row in rows] == [False, True]
    assert "no such file" in rows[1]["error"]

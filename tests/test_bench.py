"""Benchmarks: what is reported follows from what was timed. No test asserts a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leanvit.bench import Target, _Worker, benchmark, describe, machine
from leanvit.errors import BundleError, CheckpointError, ConfigError, LeanvitError


def test_targets_are_recognised(demo_run: Path) -> None:
    bundle, checkpoint = describe(demo_run / "bundle"), describe(demo_run / "train")
    assert (bundle.runtime, bundle.precision) == ("onnxruntime", "w8a8")
    assert (checkpoint.runtime, checkpoint.precision) == ("torch", "float32")
    assert bundle.bytes == (demo_run / "bundle" / "model.onnx").stat().st_size
    with pytest.raises(CheckpointError):
        describe(demo_run / "absent")


def test_ratios_refer_to_the_first_target(demo_run: Path) -> None:
    result = benchmark(
        [describe(demo_run / "bundle-fp32"), describe(demo_run / "bundle")], batch_sizes=(1, 4), threads=1, rounds=3
    )
    assert [(r["precision"], r["batch_size"]) for r in result["results"]] == [
        ("fp32", 1), ("w8a8", 1), ("fp32", 4), ("w8a8", 4),
    ]  # fmt: skip
    for index, row in enumerate(result["results"]):
        first = result["results"][index - index % 2]
        assert row["ratio"] == pytest.approx(first["median_ms"] / row["median_ms"])
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["median_ms"])
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["runs"] >= 3


def test_a_timing_process_does_not_import_the_script_that_starts_it(demo_run: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('imported', flush=True)\n"
        "from leanvit.bench import benchmark, describe\n"
        "if __name__ == '__main__':\n"
        f"    benchmark([describe({str(demo_run / 'bundle')!r})], batch_sizes=(1,), threads=1, rounds=3)\n"
        "    assert __file__.endswith('script.py')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "imported\n"


def test_a_target_that_cannot_load_raises_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a bundle folder"):
        _Worker(Target("broken", tmp_path, "onnxruntime", "fp32", 0), 1)


def test_no_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="no targets"):
        benchmark([])


def test_machine_names_what_decides_speed() -> None:
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["cpu"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert all(feature in flags for feature in facts["features"])
    assert issubclass(BundleError, LeanvitError)

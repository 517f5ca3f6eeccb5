"""Sweeps: one table whatever ran where and in which order, nothing run twice, and a run that fails is a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from common import Outcome
from leanvit.cli import VERBS
from leanvit.config import SweepConfig, ValConfig, from_dict, load_yaml, to_dict
from leanvit.config.sweep import Sweep
from leanvit.errors import ConfigError, EnvironmentProblem
from leanvit.scale import sweep
from leanvit.scale.cluster import require_room
from leanvit.scale.combinations import FILES, OWN_KEYS, Combination, combinations, read_sweep, sweepable
from leanvit.scale.sweep import JOURNAL_NAME, RESULTS_NAME, Journal, Task, run_task
from leanvit.scale.sweep_numbers import RESULTS, numbers_of

Run = Callable[..., Outcome]

TRAIN: dict[str, Any] = {
    "verb": "train",
    "base": {"data": "digits", "epochs": 1, "images_per_class": 2, "amp": "none", "device": "cpu"},
    "grid": {"model": ["vit_micro", "vit_mikro"], "seed": [3]},
}
INSPECT: dict[str, Any] = {"verb": "data inspect", "base": {"data": "digits"}, "grid": {"images_per_class": [0, 1, 2]}}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL_NAME).read_text().splitlines()]


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# --- processes that really run -------------------------------------------------------------------------------


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kill -9 the process of Ray whose run was the first to write."""

    def writer() -> int | None:
        texts = [path.read_text() for path in folder.glob("*/.lock")]
        return next((int(text) for text in texts if text), None)

    run = wait_for(writer)
    killed += [parent_of(run), run]
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="parents of processes are read from /proc")
def test_alone_and_on_ray_the_results_are_the_same_bytes(cluster: ModuleType, tmp_path: Path, leanvit: Run) -> None:
    """One run of two fails; on Ray the process of the other one is killed in the middle, and it is begun anew."""
    file = write(tmp_path / "sweep.yaml", TRAIN)
    alone = leanvit("sweep", file, "--output", tmp_path / "alone")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed))
    killer.start()
    on_ray = leanvit("sweep", file, "--output", tmp_path / "ray", "--ray", "local")
    killer.join()
    assert len(killed) == 2
    assert wait_for(lambda: not Path(f"/proc/{killed[1]}").exists(), 10)
    results = [(tmp_path / name / RESULTS_NAME).read_bytes() for name in ("alone", "ray")]
    assert results[0] == results[1]
    for done in (alone, on_ray):
        assert done.code == 6
        assert "1 of 2 runs did not end with exit code 0: model=vit_mikro_seed=3_" in done.error
    good, bad = json.loads(results[0])["runs"]
    assert (good["values"], good["exit_code"]) == ({"model": "vit_micro", "seed": 3}, 0)
    assert 0 <= good["numbers"]["top1"] <= 100
    assert (bad["values"], bad["exit_code"], bad["numbers"]) == ({"model": "vit_mikro", "seed": 3}, 2, {})
    assert "Did you mean 'vit_micro'?" in bad["error"]
    # The files of a run say how to make it again.
    (folder,) = tmp_path.glob("alone/model=vit_micro_*/")
    assert load_yaml(folder / "config.yaml")["seed"] == 3


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, leanvit: Run) -> None:
    file = write(tmp_path / "sweep.yaml", INSPECT)
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "leanvit", "sweep", str(file), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for((output / JOURNAL_NAME).is_file)
    # In the second run: its process has begun and must end with the command.
    children = wait_for(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    process.kill()
    process.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)
    before = journal(output)
    assert len(before) == 1
    assert not (output / RESULTS_NAME).exists()
    done = leanvit("sweep", file, "--output", output)
    assert done.code == 0, done.err
    assert "1 done before" in done.err
    assert journal(output)[:1] == before
    assert set(Counter(line["key"] for line in journal(output)).values()) == {1}
    assert leanvit("sweep", file, "--output", tmp_path / "whole").code == 0
    assert (output / RESULTS_NAME).read_bytes() == (tmp_path / "whole" / RESULTS_NAME).read_bytes()
    numbers = [row["numbers"] for row in json.loads((output / RESULTS_NAME).read_bytes())["runs"]]
    assert numbers == [{"extra": 0, "leaks": 0, "contradictions": 0}] * 3


def test_a_run_ends_with_the_process_that_started_it() -> None:
    """Else the run of a killed sweep would go on, and hold its folder against the next start."""
    endless = "import time\nprint('up', flush=True)\nmain = lambda: time.sleep(600)"
    text = sweep._CHILD.replace("from leanvit.cli import main", endless)
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.poll() is None
        process.stdin.close()
        try:
            assert process.wait(20) == 143
        finally:
            process.kill()


def child(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """The row of a run whose process is `text`."""
    monkeypatch.setattr(sweep, "_CHILD", f"import os, sys\n{text}")
    return run_task(Task(**{"verb": "val", "output": Path("run"), "threads": 3, "folder": str(folder), **options}))


def test_a_run_that_the_system_ends_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = child("os.kill(os.getpid(), 9)", tmp_path, monkeypatch)
    assert (row["exit_code"], row["error"], row["numbers"]) == (137, "ended by SIGKILL", {})


def test_a_run_has_its_threads_folder_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "print(os.environ['OMP_NUM_THREADS'], os.getcwd(), sys.argv[1:])"
    row = child(said, tmp_path, monkeypatch, verb="data inspect")
    assert row["exit_code"] == 0
    assert "error" not in row
    arguments = ["data", "inspect", "--config", "run.json"]
    assert (tmp_path / "run.log").read_text() == f"3 {tmp_path} {arguments}\n"


def test_the_error_of_a_run_is_its_line_without_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of two folders are compared byte for byte."""
    line = f"leanvit: {tmp_path}/run/x: no such file"
    row = child(f"print('a note'); print({line!r}); sys.exit(3)", tmp_path, monkeypatch, output=tmp_path / "run")
    assert (row["exit_code"], row["error"]) == (3, "run/x: no such file")


# --- what is run, and what is not run again ------------------------------------------------------------------


class Runs:
    """Stands in for processes: counts what is run, and ends as `codes` says by seed."""

    def __init__(self, codes: dict[int, int] | None = None) -> None:
        self.codes = codes or {}
        self.seeds: list[int] = []

    def __call__(self, task: Task) -> dict[str, Any]:
        seed = json.loads(task.options.read_text())["seed"]
        self.seeds.append(seed)
        code = self.codes.get(seed, 0)
        error = {"error": "bad"} if code else {}
        return {
            "exit_code": code,
            **error,
            "numbers": {"images": 10, "top1": seed / 2, "loss": 0.25},
            "seconds": 0.1 * seed,
        }


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Run) -> Callable[..., tuple[Runs, Outcome]]:
    """Run a sweep over seeds with processes that are none: start({seed: exit code}, base) -> what was run, outcome."""

    def run(codes: dict[int, int] | None = None, base: dict[str, Any] | None = None) -> tuple[Runs, Outcome]:
        file = write(tmp_path / "sweep.yaml", {"verb": "train", "base": base or {}, "grid": {"seed": [3, 1, 2]}})
        runs = Runs(codes)
        monkeypatch.setattr(sweep, "run_task", runs)
        return runs, leanvit("sweep", file, "--output", tmp_path / "out")

    return run


def test_what_failed_is_run_again_and_nothing_else(start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path) -> None:
    """Exit code 6 is done: what was left out of the run would be left out once more."""
    runs, done = start({1: 5, 2: 6})
    assert runs.seeds == [3, 1, 2]
    assert done.code == 6
    assert "2 of 3 runs" in done.error
    assert "seed=1_" in done.error
    runs, done = start({2: 6})
    assert runs.seeds == [1]
    assert (done.code, "1 of 3 runs" in done.error) == (6, True)
    results = json.loads((tmp_path / "out" / RESULTS_NAME).read_bytes())["runs"]
    found = [(row["values"]["seed"], row["exit_code"], row["numbers"]["top1"]) for row in results]
    assert found == [(3, 0, 1.5), (1, 0, 0.5), (2, 6, 1.0)]
    assert not any("seconds" in row for row in results)
    assert len(journal(tmp_path / "out")) == 4


def test_another_base_is_another_run(start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path) -> None:
    start()
    assert start(base={"lr": 0.5})[0].seeds == [3, 1, 2]
    assert start()[0].seeds == []
    assert len(list((tmp_path / "out").glob("seed=*.json"))) == 6


def test_a_line_that_was_cut_is_run_again(start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path) -> None:
    start()
    path = tmp_path / "out" / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-20])
    assert start()[0].seeds == [2]
    assert [line["values"]["seed"] for line in journal(tmp_path / "out")] == [3, 1, 2]


def test_an_interruption_is_no_row(
    start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Runs, task: Task) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runs, "__call__", interrupt)
        done = start()[1]
    assert (done.code, "same command again" in done.error) == (130, True)
    assert start()[0].seeds == [3, 1, 2]


def test_the_table_shows_values_and_numbers_in_the_order_of_the_grid(
    start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path
) -> None:
    """What is the same in all runs is said once: the metrics of the float network would fill the table."""
    done = start({1: 5})[1]
    words = [line.replace("│", " ").split() for line in done.out.splitlines() if "│" in line]
    assert words == [["3", "0", "1.5"], ["1", "5", "0.5"], ["2", "0", "1"]]
    assert "seed" in done.out
    assert "top1" in done.out
    assert "the same in all runs: images 10, loss 0.25\n" in done.out
    assert f"results {tmp_path / 'out' / RESULTS_NAME}" in done.out
    assert ": bad" in done.out


def test_a_training_in_a_sweep_goes_on_and_saves_its_own_configuration(
    start: Callable[..., tuple[Runs, Outcome]], tmp_path: Path
) -> None:
    start()
    given = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("seed=*.json")]
    assert all(options["resume"] is True for options in given)
    assert len({options["output"] for options in given}) == 3
    assert load_yaml(tmp_path / "out" / "config.yaml")["file"] == str(tmp_path / "sweep.yaml")
    assert read_sweep(tmp_path / "out" / "sweep.yaml") == read_sweep(tmp_path / "sweep.yaml")


# --- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verb": "trian"}, ["verb is 'trian'. Did you mean 'train'?", "quantize"]),
        ({"verb": "serve"}, ["verb is 'serve'.", "Expected one that writes"]),
        ({"verb": "sweep"}, ["verb is 'sweep'."]),
        ({"gird": {}}, ["unknown key 'gird'. Did you mean 'grid'?"]),
        ({"base": {"epohcs": 3}}, ["base: unknown key 'epohcs'. Did you mean 'epochs'?"]),
        ({"base": {"epochs": "many"}}, ["base: epochs is 'many', expected int"]),
        ({"grid": {"sede": [0]}}, ["grid: unknown key 'sede'. Did you mean 'seed'?"]),
        ({"grid": {"seed": [0, "x"]}}, ["grid: seed is 'x', expected int"]),
        ({"grid": {}}, ["grid is empty", "grid: {seed: [0, 1]}"]),
        ({"grid": {"seed": []}}, ["seed is [], expected a list of values"]),
        ({"grid": {"seed": 3}}, ["seed is 3, expected a list of values"]),
        ({"grid": {"output": ["a", "b"]}}, ["grid has output", "Leave it out"]),
        ({"base": {"ray": "local"}}, ["base has ray", "Leave it out"]),
        ({"base": {"seed": 1}}, ["seed is in base and in grid"]),
        ({"verb": "quantize"}, ["missing model"]),
    ],
)
def test_a_file_that_cannot_be_run_is_named_before_anything_is_written(
    change: dict[str, Any], words: list[str], tmp_path: Path, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "run_task", Runs())
    file = write(tmp_path / "sweep.yaml", {"verb": "train", "base": {}, "grid": {"seed": [0]}, **change})
    done = leanvit("sweep", file, "--output", tmp_path / "out")
    assert done.code == 2
    for word in (str(file), *words):
        assert word in done.error
    assert not (tmp_path / "out").exists()


def test_verbs_of_a_sweep_are_those_that_write() -> None:
    from leanvit import config as configs

    classes = {verb: getattr(configs, name) for verb, (name, _) in VERBS.items()}
    writing = {verb: cls for verb, cls in classes.items() if "output" in {f.name for f in fields(cls)}}
    del writing["sweep"]
    assert sweepable() == writing
    assert set(FILES) | set(RESULTS) <= set(writing)
    assert sweepable()["val"] is ValConfig


def test_combinations_have_names_of_their_own() -> None:
    values = [[0.5, 1.0], [0.7, 1.0]]
    grid = {"crop_scale": values, "model": ["a/b_c", "a-b_c"], "img_size": [None, 32]}
    found = combinations(Sweep(verb="train", grid=grid))
    assert len({one.name for one in found}) == len(found) == 8
    assert found[0].name.startswith("crop_scale=0.5+1.0_model=a-b_c_img_size=None_")
    assert [one.values["img_size"] for one in found[:4]] == [None, 32, None, 32]
    twice = combinations(Sweep(verb="train", grid={"seed": [1, 1, 2]}))
    assert [one.values for one in twice] == [{"seed": 1}, {"seed": 2}]


def test_what_the_sweep_sets_does_not_count_in_the_key() -> None:
    assert "output" in OWN_KEYS
    one, other = (combinations(Sweep(verb=verb, grid={"seed": [0]}))[0].key for verb in ("train", "val"))
    assert one != other


def test_a_verb_that_writes_a_file_gets_one(tmp_path: Path) -> None:
    one = Combination({}, {"targets": ["x"]}, "key", "run")
    config = SweepConfig(file="f", output=str(tmp_path))
    task = sweep._prepare(one, Sweep(verb="benchmark", grid={"rounds": [1]}), config)
    assert json.loads(task.options.read_text()) == {"targets": ["x"], "output": str(tmp_path / "run/benchmark.json")}
    assert task.output.is_dir()


def test_a_run_that_no_machine_has_cpus_for_is_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    ray = type("Ray", (), {"nodes": staticmethod(lambda: nodes)})
    require_room(ray, 2)  # type: ignore[arg-type]
    with pytest.raises(EnvironmentProblem, match=r"threads is 3.*more than 2 CPUs"):
        require_room(ray, 3)  # type: ignore[arg-type]


def test_a_sweep_goes_to_yaml_and_back() -> None:
    made = from_dict(Sweep, TRAIN)
    assert from_dict(Sweep, to_dict(made)) == made
    with pytest.raises(ConfigError, match="threads is 0"):
        SweepConfig(file="f", threads=0)


@pytest.mark.parametrize(
    ("verb", "name", "result", "numbers"),
    [
        ("train", "train.json", {"best": {"top1": 50.0, "images": 4}, "seed": 3}, {"top1": 50.0, "images": 4}),
        (
            "train", "train.json",
            {"task": "detect", "history": [{"metrics": {"box_AP50": b}} for b in (0.1, 0.3, 0.2)]},
            {"box_AP50": 0.3},
        ),
        (
            "quantize", "quantize.json",
            {"float_metrics": {"top1": 90.0}, "metrics": {"top1": 89.0}, "average_bits": 4.5, "seconds": 3.0},
            {"float top1": 90.0, "top1": 89.0, "average_bits": 4.5},
        ),
        ("optimize", "optimize.json", {"best": "w8a8", "drop": 0.1, "speed": 2.0}, {"best": "w8a8", "drop": 0.1}),
        ("export", "bundle.json", {"accuracy": {"value": 3, "runtime": "x", "checked": True}}, {"value": 3}),
        ("export", "bundle.json", {"accuracy": None}, {}),
        ("web", "web.json", {"size": 3}, {}),
    ],
)  # fmt: skip
def test_numbers_of_a_run_are_those_of_its_result(
    verb: str, name: str, result: dict[str, Any], numbers: dict[str, Any], tmp_path: Path
) -> None:
    assert numbers_of(verb, tmp_path) == {}
    (tmp_path / name).write_text(json.dumps(result))
    assert numbers_of(verb, tmp_path) == numbers


def test_of_two_lines_of_a_run_the_last_one_counts(tmp_path: Path) -> None:
    one = Combination({"seed": 0}, {"seed": 0}, "key", "name")
    path = tmp_path / JOURNAL_NAME
    Journal(path).add(one, {"exit_code": 5, "numbers": {}})
    assert not Journal(path).is_done(one)
    Journal(path).add(one, {"exit_code": 0, "numbers": {"top1": 1.0}})
    assert Journal(path).is_done(one)
    path.write_text(path.read_text() + '[1]\n{"key": "key"}\nno json\n')
    found = Journal(path).get(one)
    assert found is not None
    assert found["numbers"] == {"top1": 1.0}

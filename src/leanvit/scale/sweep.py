"""A sweep: one verb with every combination of some options, alone or as tasks of Ray; what is done is never done again.

Each run is `leanvit VERB --config FILE` in a process of its own, as a user would give it: one that fails, or takes all
memory, is a row of the table and the others go on. The journal has a line a finished run and is written by the command
alone; results.json is made of it in the order of the grid, so that neither the order of the runs nor their number at a
time nor a lost machine shows in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from leanvit.config import SweepConfig, save_yaml
from leanvit.config.sweep import Sweep
from leanvit.errors import EXIT_BUG, EXIT_ENVIRONMENT, EXIT_OK, EXIT_PARTIAL
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.progress import note
from leanvit.scale.cluster import connected, require_room, thread_variables
from leanvit.scale.combinations import FILES, Combination, combinations, read_sweep, sweepable
from leanvit.scale.sweep_numbers import Json, numbers_of

JOURNAL_NAME = "sweep.jsonl"
RESULTS_NAME = "results.json"

DONE = (EXIT_OK, EXIT_PARTIAL)
"""Exit codes of runs that are not run again: what was left out of some would be left out once more."""

RETRIES = 3
"""How often Ray starts a run anew whose machine was lost."""

_CHILD = """
import os, sys, threading

def end_with_the_command():
    os.read(0, 1)  # returns when the other end is closed, by a kill -9 as well
    os._exit(143)

threading.Thread(target=end_with_the_command, daemon=True).start()
from leanvit.cli import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Task:
    """A run as a process that may be on another machine needs it.

    folder: where the command was given, to which relative paths belong. output: folder of the run; its log and the
    options that it was given lie beside it.
    """

    verb: str
    output: Path
    threads: int
    folder: str

    @property
    def log(self) -> Path:
        """All that the run says."""
        return Path(f"{self.output}.log")

    @property
    def options(self) -> Path:
        """What the run is given: JSON, which `--config` reads."""
        return Path(f"{self.output}.json")


class Journal:
    """A line of JSON a finished run; of several of one key the last one counts."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that was cut is read over."""
        self._path = path
        self._lines: list[Json] = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict) and {"key", "exit_code", "numbers"} <= found.keys():
                self._lines.append(found)

    def get(self, combination: Combination) -> Json | None:
        """The last line of a combination."""
        found = [line for line in self._lines if line["key"] == combination.key]
        return found[-1] if found else None

    def is_done(self, combination: Combination) -> bool:
        """Whether a combination need not be run."""
        line = self.get(combination)
        return line is not None and line["exit_code"] in DONE

    def add(self, combination: Combination, row: Json) -> None:
        """Remember a finished run; on disk at once, the file as a whole."""
        self._lines.append({"key": combination.key, "name": combination.name, "values": combination.values, **row})
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self._lines)
        write_atomic(self._path, text.encode())


def run(config: SweepConfig) -> Json:
    """Run what is left of a sweep; returns what results.json holds.

    Raises ConfigError for a file that can't be run, RunLockedError where another sweep writes to the folder,
    EnvironmentProblem where Ray can't be reached or has no room for a run.
    """
    sweep = read_sweep(config.file)
    wanted = combinations(sweep)
    folder = Path(config.output)
    with only_writer(folder):
        save_yaml(config, folder / "config.yaml")
        save_yaml(sweep, folder / "sweep.yaml")
        journal = Journal(folder / JOURNAL_NAME)
        left = [one for one in wanted if not journal.is_done(one)]
        note(f"sweep of {len(wanted)} runs, {len(wanted) - len(left)} done before: {folder}")
        prepared = ((one, _prepare(one, sweep, config)) for one in left)
        finished = _on_ray(prepared, config) if config.ray else _alone(prepared)
        for number, (one, row) in enumerate(finished, len(wanted) - len(left) + 1):
            journal.add(one, row)
            note(f"{number}/{len(wanted)} {one.name}: exit code {row['exit_code']} in {row['seconds']:.0f} s")
        results = _results(sweep, wanted, journal)
        write_json(folder / RESULTS_NAME, results)
    return results


def _results(sweep: Sweep, wanted: list[Combination], journal: Journal) -> Json:
    rows: list[Json] = []
    for one in wanted:
        line: Json = journal.get(one) or {}
        told: Json = {key: line[key] for key in ("exit_code", "error", "numbers") if key in line}
        rows.append({"name": one.name, "values": one.values} | told)
    return {"verb": sweep.verb, "base": sweep.base, "grid": sweep.grid, "runs": rows}


def _prepare(one: Combination, sweep: Sweep, config: SweepConfig) -> Task:
    """Write what the verb is given beside its folder."""
    task = Task(sweep.verb, Path(config.output) / one.name, config.threads, os.getcwd())
    output = task.output / FILES[sweep.verb] if sweep.verb in FILES else task.output
    options = {**one.options, "output": str(output)}
    if "resume" in {f.name for f in fields(sweepable()[sweep.verb])}:
        # The folder is of these options alone, so that a save in it is one of this run.
        options["resume"] = True
    write_json(task.options, options)
    if sweep.verb in FILES:
        task.output.mkdir(exist_ok=True)
    return task


Prepared = Iterable[tuple[Combination, Task]]


def _alone(prepared: Prepared) -> Iterator[tuple[Combination, Json]]:
    """One run after the other."""
    for one, task in prepared:
        yield one, run_task(task)


def _on_ray(prepared: Prepared, config: SweepConfig) -> Iterator[tuple[Combination, Json]]:
    """Runs as tasks of Ray, in the order in which they end."""
    waiting = list(prepared)
    if not waiting:
        return
    with connected(str(config.ray)) as ray:
        require_room(ray, config.threads)
        remote = ray.remote(num_cpus=config.threads, max_retries=RETRIES)(run_task)
        most = config.ray_workers or len(waiting)
        running: dict[Any, Combination] = {}
        while waiting or running:
            while waiting and len(running) < most:
                one, task = waiting.pop(0)
                running[remote.remote(task)] = one
            (ended, *_), _ = ray.wait(list(running))
            yield running.pop(ended), _row_of(ray, ended)


def _row_of(ray: ModuleType, ended: Any) -> Json:
    try:
        row: Json = ray.get(ended)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        return {"exit_code": EXIT_ENVIRONMENT, "error": f"lost: {reason}", "numbers": {}, "seconds": 0.0}
    return row


def run_task(task: Task) -> Json:
    """Run one combination to its end: exit_code, error where there is one, numbers, and seconds."""
    started = time.monotonic()
    folder = Path(task.folder)
    # -P: a folder of the user's that is called like a package is not imported.
    command = [sys.executable, "-P", "-c", _CHILD, *task.verb.split(), "--config", str(task.options)]
    environment = {**os.environ, **thread_variables(task.threads)}
    with (
        open(folder / task.log, "wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment
        ) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    row: Json = {"exit_code": code if code >= 0 else 128 - code}
    if code != EXIT_OK:
        row["error"] = _error(folder / task.log, code, task.output)
    row["numbers"] = numbers_of(task.verb, folder / task.output) if code in DONE else {}
    return row | {"seconds": round(time.monotonic() - started, 3)}


def _error(log: Path, code: int, output: Path) -> str:
    """The line by which a run said why it failed; paths in it begin at the folder of the sweep."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("leanvit: ") for line in lines if line.startswith("leanvit: ")]
    if not said:
        return f"no reason given, see {log.name}" if code != EXIT_BUG else "a bug"
    return said[-1].replace(str(output), output.name)

"""Kill training runs at random moments, go on, and compare the end with an uninterrupted run bit by bit.

    OMP_NUM_THREADS=1 python benchmarks/resume.py --kills 14 --output benchmarks/results/resume.json

For each of eight modes (float32 and bfloat16, 0 and 2 loader workers, one process and two over gloo) a run is killed
with SIGKILL at least --kills times: at random moments, and every other time while it writes its state. Then it may
finish, and its weights, optimizer and history are compared with those of a run that nobody killed. Runs are forked from
a parent that has imported everything, so that a kill costs a few seconds. The state is saved after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import leanvit.models  # noqa: F401 - imported before the fork
from leanvit.checkpoint import read_tensors
from leanvit.config import TrainConfig
from leanvit.data.sets import load_split
from leanvit.files import write_atomic, write_json
from leanvit.train import LAST_NAME, run, state
from leanvit.train.state import Progress
from measure import facts

LONGEST_SECONDS = 400


@dataclass(frozen=True)
class Mode:
    """How a run is computed."""

    amp: str
    workers: int
    processes: int

    @property
    def name(self) -> str:
        """For tables."""
        return (
            f"{'bfloat16' if self.amp == 'bfloat16' else 'float32'}, {self.workers} workers, {self.processes} processes"
        )


MODES = [Mode(*choice) for choice in itertools.product(("none", "bfloat16"), (0, 2), (1, 2))]


def make_config(mode: Mode, folder: Path) -> TrainConfig:
    """Nine steps in three epochs on digits, with everything on that draws random numbers."""
    return TrainConfig(
        data="digits", model="revit_micro", output=str(folder), epochs=3, batch_size=20, images_per_class=5,
        val_fraction=0.05, warmup_epochs=1.0, drop_path=0.2, mixup=0.4, cutmix=0.4, reprob=0.3, hflip=0.5,
        aa="rand-m5-n2", model_ema_decay=0.9, save_interval=1, amp=mode.amp, workers=mode.workers, device="cpu",
    )  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _train(config: TrainConfig, rank: int, world: int, port: int, writing: mmap.mmap) -> None:
    """What a forked child does; `writing` is 1 while the state is being written."""
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})

    def flagged(path: Path, data: bytes) -> None:
        writing[0] = 1
        write_atomic(path, data)
        writing[0] = 0

    state.write_atomic = flagged  # type: ignore[attr-defined]
    run(config)


def start(config: TrainConfig, mode: Mode, writing: mmap.mmap) -> list[int]:
    """Fork the processes of a run; returns their ids."""
    port = free_port()
    children = []
    for rank in range(mode.processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()  # loader workers die with it
                log = log_of(config, rank).open("a", buffering=1)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = sys.stderr = log
                _train(config, rank, mode.processes, port, writing)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def kill(children: list[int]) -> None:
    """SIGKILL to the processes of a run and their loader workers; no handler runs."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def log_of(config: TrainConfig, rank: int) -> Path:
    """Where a process' output goes."""
    return Path(config.output).with_suffix(f".{rank}.log")


def finished(children: list[int], config: TrainConfig) -> bool | None:
    """Whether all processes ended well; None while one runs. Raises RuntimeError where one failed by itself."""
    codes = []
    for child in children:
        pid, status = os.waitpid(child, os.WNOHANG)
        codes.append(None if pid == 0 else os.waitstatus_to_exitcode(status))
    if all(code is None for code in codes):
        return None
    for child, code in zip(children, codes, strict=True):
        codes[children.index(child)] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if code is None else code
    if any(codes):
        ends = "\n".join(log_of(config, rank).read_text()[-1500:] for rank, code in enumerate(codes) if code)
        raise RuntimeError(f"training processes ended with {codes}:\n{ends}")
    return True


def wait_until(children: list[int], config: TrainConfig, moment: float, writing: mmap.mmap | None) -> str:
    """Wait for the kill: until `moment`, and then for a write where `writing` is given. "kill" or "finished"."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        if finished(children, config):
            return "finished"
        if time.monotonic() >= moment and (writing is None or writing[0] == 1):
            return "kill"
        time.sleep(0.0002)
    kill(children)
    raise RuntimeError(f"a run took more than {LONGEST_SECONDS} s")


def state_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what else must be the same at the end."""
    tensors, metadata = read_tensors(folder / LAST_NAME)
    progress = json.loads(metadata["leanvit_progress"])
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in progress["history"]]
    return tensors, {"history": rows, "best": progress["best"], "epoch": progress["epoch"]}


def saved_steps(folder: Path) -> int:
    """Steps that the state on disk has behind it."""
    found = state.read_state(folder) if folder.is_dir() else None
    progress = found[1] if found else Progress("", 0, state.Conditions.here(1))
    return progress.epoch * 3 + progress.step


def attack(mode: Mode, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Run undisturbed, then again under `kills` kills; what happened, and whether the ends are identical."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    writing = mmap.mmap(-1, 1)
    whole, broken = make_config(mode, folder / "whole"), make_config(mode, folder / "broken")
    begun = time.monotonic()
    children = start(whole, mode, writing)
    if wait_until(children, whole, begun + LONGEST_SECONDS, None) != "finished":
        raise RuntimeError("the undisturbed run did not finish")
    longest = time.monotonic() - begun
    counts = {"kills": 0, "inside_a_write": 0, "resumed_inside_an_epoch": 0, "restarts": 0}
    identical = []
    while counts["kills"] < kills:
        run_folder = folder / f"broken{len(identical)}"
        config = replace(broken, output=str(run_folder))
        identical.append(_run_under_fire(config, mode, writing, draw, longest, kills, counts))
        first, second = state_of(folder / "whole"), state_of(run_folder)
        identical[-1] = first[0].keys() == second[0].keys() and all(
            torch.equal(first[0][key], second[0][key]) for key in first[0]
        )  # fmt: skip
        identical[-1] = identical[-1] and first[1] == second[1]
    return {"mode": mode.name, **counts, "runs": len(identical), "identical": sum(identical), "seconds": longest}


def _run_under_fire(
    config: TrainConfig, mode: Mode, writing: mmap.mmap, draw: random.Random, longest: float, kills: int,
    counts: dict[str, int],
) -> bool:  # fmt: skip
    """One run to its end, killed again and again; adds to `counts`."""
    for attempt in itertools.count():
        writing[0] = 0
        folder = Path(config.output)
        before = saved_steps(folder)
        counts["restarts"] += attempt > 0
        counts["resumed_inside_an_epoch"] += attempt > 0 and before % 3 != 0
        children = start(replace(config, resume=attempt > 0), mode, writing)
        spared = counts["kills"] >= kills or attempt >= 6
        moment = time.monotonic() + (LONGEST_SECONDS if spared else draw.uniform(0.2, 0.9) * longest)
        if wait_until(children, config, moment, writing if counts["kills"] % 2 else None) == "finished":
            return True
        kill(children)
        counts["kills"] += 1
        counts["inside_a_write"] += writing[0] == 1
    return False


@contextlib.contextmanager
def _folder(path: str | None) -> Iterator[Path]:
    if path:
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def main() -> int:
    """Attack every mode; 1 where one run did not end as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=14, help="of each mode")
    parser.add_argument("--modes", type=int, nargs="+", choices=range(len(MODES)), default=list(range(len(MODES))),
                        metavar="N", help="numbers of the modes, default all")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="keep the runs there")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_split("digits", "train")
    rows = []
    with _folder(options.folder) as folder:
        for number in options.modes:
            rows.append(attack(MODES[number], folder / str(number), options.kills, options.seed + number))
            print(json.dumps(rows[-1]), flush=True)
    total = {key: sum(row[key] for row in rows) for key in ("kills", "inside_a_write", "runs", "identical")}
    print(json.dumps(total))
    if options.output:
        write_json(options.output, {**facts(), "rows": rows, "total": total, "seed": options.seed})
    return 0 if total["runs"] == total["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())

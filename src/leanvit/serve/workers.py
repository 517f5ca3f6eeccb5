"""Several server processes on one port: started, started again when one dies, and ended together."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from leanvit.config import ServeConfig
from leanvit.errors import EXIT_BUG, EnvironmentProblem, LeanvitError
from leanvit.serve import log
from leanvit.serve.limits import read_token
from leanvit.serve.metrics import FOLDER
from leanvit.serve.run import listen, run

RESTART_SECONDS = 1.0
"""Between two starts of one worker: one that can't start must not take the machine."""

STEP_SECONDS = 0.05


def serve_by_many(config: ServeConfig) -> None:
    """Run `config.workers` processes until a signal ends them; the signal is raised again at the end.

    Raises EnvironmentProblem where a worker can't start at first: it has said why.
    """
    # Bound and never listening: it keeps the port for the workers, and finds it where a free one is asked for.
    reserved = listen(config, reuse=True)
    config = replace(config, port=reserved.getsockname()[1])
    folder = tempfile.mkdtemp(prefix="leanvit-metrics-")
    os.environ[FOLDER] = folder
    try:
        ended_by = _Workers(config).watch()
    finally:
        reserved.close()
        os.environ.pop(FOLDER, None)
        shutil.rmtree(folder, ignore_errors=True)
    signal.raise_signal(ended_by)


class _Workers:
    """The processes and the signals that they are sent."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.context = multiprocessing.get_context("spawn")
        self.ended_by = 0
        self.started = [0.0] * config.workers
        self.handlers: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.handlers[number] = signal.signal(number, self._on_signal)
        self.processes: list[BaseProcess] = [self._start(place) for place in range(config.workers)]

    def _start(self, place: int) -> BaseProcess:
        self.started[place] = time.monotonic()
        process = self.context.Process(target=work, args=(self.config, os.getpid()), name=f"worker {place}")
        process.start()
        return process

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self.ended_by = self.ended_by or number
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def watch(self) -> int:
        """Wait until a signal ends the workers; returns its number."""
        try:
            while not self.ended_by:
                time.sleep(STEP_SECONDS)
                for place, process in enumerate(self.processes):
                    if process.exitcode is not None and not self.ended_by:
                        self._replace(place, process.exitcode)
            for process in self.processes:
                process.join()
        finally:
            for process in self.processes:
                process.kill()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        return self.ended_by

    def _replace(self, place: int, code: int) -> None:
        """Start a dead worker again. Raises EnvironmentProblem for one that refused its bundles or its port."""
        if code > 0 and code != EXIT_BUG:
            raise EnvironmentProblem(f"a worker ended with exit code {code}; it says why above. Correct that first.")
        forget(self.processes[place].pid or 0)
        log.write("worker died", process=self.processes[place].pid, code=code)
        time.sleep(max(0.0, self.started[place] + RESTART_SECONDS - time.monotonic()))
        if not self.ended_by:
            self.processes[place] = self._start(place)


def forget(process: int) -> None:
    """Take the gauges of a dead process out of the metrics."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(process)  # type: ignore[no-untyped-call]


def work(config: ServeConfig, parent: int) -> None:
    """One worker: a socket of its own on the shared port."""
    try:
        run(config, read_token(config), listen(config, reuse=True), parent)
    except LeanvitError as error:
        print(f"leanvit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)

"""Who goes first where cores are few: the event loop, so that refusals and probes are answered under any load."""

from __future__ import annotations

import os
import sys
import threading

BEHIND = 10
"""Niceness of threads that decode and compute: a tenth of the event loop's share of a core that both want.

With SWITCH_SECONDS, on 2 cores at twice the capacity (benchmarks/serve.py, a micro model, medians of three rounds that
alternated): the slowest refusal in 31 ms in place of 225, 262 requests answered a second in place of 240. The short
switch alone made refusals slower, a single decoding thread made them faster still but cost a sixth of the throughput.
A runtime that takes all cores is left alone, for its other threads would wait for this one in every layer: with a
ViT-S and two threads on 2 cores, 16 clients had 18.1 answers a second in place of 17.2 (medians of three rounds that
alternated).
"""

SWITCH_SECONDS = 0.0005
"""How long a thread may keep Python's lock while another waits; Python's own 0.005 is long beside a request of 3 ms."""


def yield_to_event_loop() -> None:
    """Called in a thread that decodes or computes: the event loop's thread goes before it, where the system can."""
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        own = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + BEHIND)


def switch_often() -> None:
    """Called once a process: the event loop waits less for Python's lock."""
    sys.setswitchinterval(SWITCH_SECONDS)

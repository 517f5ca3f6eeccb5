"""Who goes first where cores are few: the event loop, so that refusals and probes are answered under any load."""

from __future__ import annotations

import os
import sys
import threading

BEHIND = 5
"""Niceness of threads that decode and compute: a third of the event loop's share of a core that both want.

Measured with benchmarks/serve.py on 2 cores at twice the capacity, with SWITCH_SECONDS: 298 requests answered a second
in place of 207, refusals at p99 in 17 ms in place of 40.
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

"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import re, sys
import torch
from leanvit.quant.memory import give_back


def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024


del_me = torch.ones(6 * 2**20)  # freeing 24 MB makes glibc keep blocks up to that size
del del_me
blocks = [torch.ones(2**18) for _ in range(161)]
kept = blocks[::16]  # what lies between them can't be given back from the end
del blocks
before = resident()
give_back()
print(before - resident())
"""


def test_what_tensors_leave_behind_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 100, found.stdout

"""Files are whole or as they were before, whatever fails and whenever the process dies."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvit import files
from leanvit.errors import BundleError, EnvironmentProblem, RunLockedError
from leanvit.files import explain_os_error, only_writer, read_json, sha256, write_atomic, write_json


class Crash(BaseException):
    """Stands for ctrl-C: not an Exception."""


# Every call to the system that write_atomic makes, in order.
STEPS = ("open", "write", "fsync", "replace", "fsync folder")


def fail_at(step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the given step of write_atomic raise `error`; a failing write leaves half of the bytes."""

    class HalfFile(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[: len(data) // 2])
            raise error

    real_fsync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == (1 if step == "fsync" else 2):
            raise error
        real_fsync(descriptor)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    if step == "open":
        monkeypatch.setattr(files, "open", refuse, raising=False)
    elif step == "write":
        monkeypatch.setattr(files, "open", lambda path, mode: HalfFile(path, "w"), raising=False)
    elif step == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setattr(os, "fsync", fsync)


@settings(max_examples=60, deadline=None)
@given(
    old=st.none() | st.binary(max_size=3000),
    new=st.binary(max_size=3000),
    step=st.none() | st.sampled_from(STEPS),
    error=st.sampled_from([OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), Crash()]),
)
def test_a_write_that_fails_anywhere_leaves_the_old_file_or_the_new_one(
    old: bytes | None, new: bytes, step: str | None, error: BaseException, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("atomic") / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if step:
            fail_at(step, error, monkeypatch)
            with pytest.raises(EnvironmentProblem if isinstance(error, OSError) else Crash):
                write_atomic(path, new)
        else:
            write_atomic(path, new)
    found = path.read_bytes() if path.exists() else None
    assert found == (new if step in (None, "fsync folder") else old)
    assert os.listdir(path.parent) == ([path.name] if found is not None else [])


def test_the_bytes_are_on_the_disk_before_the_name_points_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        order.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "run").mkdir()
    write_atomic(tmp_path / "run" / "file", b"new")
    assert order[1:] == ["replace", "fsync run"]
    assert order[0].startswith("fsync .file.")
    assert order[0].endswith(".tmp")


WRITER = """
import sys
from leanvit.files import write_atomic
a, b = b"a" * 300_000, b"b" * 500_000
write_atomic(sys.argv[1], a)
print("ready", flush=True)
while True:
    write_atomic(sys.argv[1], b)
    write_atomic(sys.argv[1], a)
"""


def test_kill_9_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    moments = random.Random(0)
    for number in range(12):
        path = tmp_path / f"file{number}"
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.wait()
        process.stdout.close()
        assert path.read_bytes() in (b"a" * 300_000, b"b" * 500_000)


def test_a_full_disk_keeps_the_old_file_and_says_how_much_was_needed(tiny_disk: Path) -> None:
    path = tiny_disk / "model"
    write_atomic(path, b"old" * 1000)
    with pytest.raises(EnvironmentProblem) as caught:
        write_atomic(path, b"x" * 2_000_000)
    assert path.read_bytes() == b"old" * 1000
    assert os.listdir(tiny_disk) == ["model"]
    for word in (str(path), "no space left", "2,000,000 bytes needed", "bytes free", "--output"):
        assert word in str(caught.value)


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match=r"file/sub/x: .*[.] Choose another folder"):
        write_atomic(tmp_path / "file" / "sub" / "x", b"")


def test_writing_makes_the_folders_above(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "c", b"data")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"data"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_or_infinity(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": value})
    assert read_json(tmp_path / "x.json") == {"a": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(values=json_values)
def test_json_comes_back_as_it_was_written(values: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "values.json"
    write_json(path, values)
    assert read_json(path) == values == json.loads(path.read_bytes())


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b'{"a": 1} x'])
def test_a_file_that_is_no_json_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=f"^{path}: "):
        read_json(path)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=5000))
def test_sha256_is_that_of_the_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(data)
    assert sha256(path) == hashlib.sha256(data).hexdigest()


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        with (
            pytest.raises(RunLockedError, match=f"run: process {os.getpid()} is writing here"),
            only_writer(tmp_path / "run"),
        ):
            pytest.fail("two writers in one folder")
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_the_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(Crash), only_writer(tmp_path):
        raise Crash
    with only_writer(tmp_path):
        pass


HOLDER = """
import sys, time
from leanvit.files import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_holds_the_folder_until_it_dies_even_by_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunLockedError, match=f"process {process.pid} "), only_writer(tmp_path):
        pytest.fail("two writers in one folder")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_workers_that_outlive_a_kill_9_do_not_hold_the_folder(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from leanvit.files import only_writer\n"
        "with only_writer(sys.argv[1]):\n"
        "    if os.fork() == 0:\n"
        "        print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    # The worker says so itself: a parent killed before its child has run at all would leave the lock to that child.
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        os.kill(worker, 0)
        with only_writer(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_on_a_full_disk_is_an_environment_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EnvironmentProblem, match="no space left"), only_writer(tmp_path):
        pytest.fail("no lock was written")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["no space left on the disk", "7 bytes needed", "Free some space"]),
        (errno.EDQUOT, ["no space left on the disk", "Free some space"]),
        (errno.EACCES, ["Permission denied", "change its rights"]),
        (errno.EROFS, ["Read-only file system", "Choose another folder"]),
    ],
)
def test_an_error_of_the_system_says_what_to_do(number: int, words: list[str], tmp_path: Path) -> None:
    message = str(explain_os_error(OSError(number, os.strerror(number)), tmp_path / "x", 7))
    for word in [str(tmp_path / "x"), *words]:
        assert word in message

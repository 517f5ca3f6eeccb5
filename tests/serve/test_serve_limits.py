"""Limits before work: length, time, pieces, headers, connections, tokens, queues and deadlines."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import Outcome, smooth
from leanvit.imaging import encode_png
from serving import Running, serving

IMAGE = encode_png(smooth(40, 48, seed=5))
MOST = 50_000
HEAD = b"POST /v1/models/one:predict HTTP/1.1\r\nHost: here\r\n"


@pytest.fixture(scope="module")
def strict(shared_bundle: Path) -> Iterator[Running]:
    """A server with small limits."""
    limits = ("--max-body", MOST, "--timeout", 1, "--max-connections", 8, "--max-queue", 2, "--threads", 1)
    with serving(f"one={shared_bundle}", *limits) as running:
        yield running


def chunked(data: bytes, size: int) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def code_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def test_a_body_of_exactly_the_limit_is_read_and_one_byte_more_is_not(strict: Running) -> None:
    padded = IMAGE + bytes(MOST - len(IMAGE))
    assert strict.predict("one", padded).code == 200
    assert strict.predict("one", padded + b"\0").code == 413
    end = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for size in (1000, 7):
        assert code_of(strict.raw(HEAD + end + chunked(padded, size))) == 200
        assert code_of(strict.raw(HEAD + end + chunked(padded + b"\0", size))) == 413


def test_a_length_that_is_too_large_is_refused_before_the_body_comes(strict: Running) -> None:
    started = time.monotonic()
    reply = strict.raw(HEAD + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n", seconds=8)
    assert code_of(reply.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")) == 413
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"\xb2", b"1" * 5000])
def test_lengths_that_are_no_numbers_are_refused(strict: Running, length: bytes) -> None:
    reply = strict.raw(HEAD + b"Content-Length: " + length + b"\r\n\r\n" + IMAGE, seconds=8)
    assert reply == b"" or code_of(reply) in (400, 413)
    assert strict.predict("one", IMAGE).code == 200


def test_too_many_and_too_large_headers_are_refused(strict: Running) -> None:
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(200))
    assert code_of(strict.raw(HEAD + many + b"Content-Length: 0\r\n\r\n")) == 431
    assert code_of(strict.raw(HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n")) in (400, 431)


def test_silent_and_half_sent_connections_are_closed(strict: Running) -> None:
    for sent in (b"", b"POST /v1/mod", HEAD, HEAD + b"Content-Length: 100\r\n\r\n" + b"abc"):
        started = time.monotonic()
        reply = strict.raw(sent, seconds=10)
        assert time.monotonic() - started < 6, sent
        assert reply == b"" or code_of(reply) == 408, sent
    # A request that waits on a kept connection with half of the next one.
    half = b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\nGET /v2"
    started = time.monotonic()
    assert code_of(strict.raw(half)) == 200
    assert time.monotonic() - started < 6


def test_connections_beyond_the_limit_are_told_to_come_again(strict: Running) -> None:
    address = ("127.0.0.1", strict.port)
    held = [socket.create_connection(address, timeout=5) for _ in range(8)]
    try:
        with socket.create_connection(address, timeout=5) as one_more:
            reply = one_more.recv(1000)
            assert code_of(reply) == 429
            assert b"Retry-After: 1" in reply
            length = int(reply.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            assert len(reply.partition(b"\r\n\r\n")[2]) == length
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.2)
    assert strict.predict("one", IMAGE).code == 200


def test_more_requests_than_the_queue_takes_are_refused_at_once(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--max-queue", 2, "--threads", 1) as running:
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda _: running.predict("one", IMAGE), range(64)))
        refused = [reply for reply in replies if reply.code != 200]
        assert refused
        assert len(refused) < 64
        for reply in refused:
            assert reply.code == 429
            assert int(reply.headers["retry-after"]) >= 1
        assert running.metric("leanvit_refused_total", reason="queue") == len(refused)
        assert running.predict("one", IMAGE).code == 200


def test_a_deadline_that_has_passed_is_refused_before_the_work(strict: Running) -> None:
    batches = strict.metric("leanvit_batch_images_count", model="one")
    reply = strict.predict("one", IMAGE, X_Timeout_Ms="0")
    assert reply.code == 429
    assert "retry-after" in reply.headers
    assert strict.metric("leanvit_batch_images_count", model="one") == batches
    assert strict.metric("leanvit_dropped_total", model="one", reason="deadline") >= 1
    assert strict.predict("one", IMAGE, X_Timeout_Ms="20000").code == 200


def test_with_a_token_only_probes_and_the_page_are_open(shared_bundle: Path, tmp_path: Path) -> None:
    secret = "0123456789abcdef"
    file = tmp_path / "token"
    file.write_text(secret + "\n")
    with serving(f"one={shared_bundle}", "--token-file", file, "--host", "0.0.0.0") as running:
        for path in ("/v1/models", "/v1/models/one", "/v2", "/v2/models/one", "/metrics", "/openapi.json", "/nothing"):
            assert running.get(path).code == 401
            assert running.get(path, Authorization=f"Bearer {secret}x").code == 401
            assert running.get(path, Authorization=f"Basic {secret}").code == 401
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert running.get(path).code == 200
        assert running.get("/").code in (200, 404)
        assert running.get("/v1/models", Authorization=f"Bearer {secret}").code == 200
        assert running.predict("one", IMAGE).code == 401
        assert running.predict("one", IMAGE, Authorization=f"Bearer {secret}").code == 200
        assert secret not in str(running.events)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "--token-file"),
        (["--host", "::"], 2, "--no-auth"),
        (["--token-file", "absent"], 2, "Check the path"),
        (["--max-queue", "0"], 2, "at least 1"),
        (["--port", "70000"], 2, "65535"),
        (["--host", "no.such.host.invalid", "--no-auth"], 2, "address of this machine"),
    ],
)
def test_a_start_that_would_be_unsafe_or_wrong_is_refused(
    flags: list[str], code: int, words: str, shared_bundle: Path, leanvit: type[Outcome]
) -> None:
    done = leanvit("serve", shared_bundle, *flags)
    assert done.code == code
    assert words in done.error


def test_a_short_token_a_bad_name_and_a_damaged_bundle_are_refused(
    bundle: Path, tmp_path: Path, leanvit: type[Outcome]
) -> None:
    (tmp_path / "token").write_text("short")
    assert "openssl rand" in leanvit("serve", bundle, "--token-file", tmp_path / "token").error
    assert "NAME=" in leanvit("serve", f"a b={bundle}").error
    assert "two bundles" in leanvit("serve", f"a={bundle}", f"a={bundle}").error
    assert leanvit("serve").code == 2
    with open(bundle / "model.onnx", "ab") as file:
        file.write(b"\0")
    done = leanvit("serve", bundle)
    assert done.code == 5
    assert "model.onnx" in done.error

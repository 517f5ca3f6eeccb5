"""Thousands of seeded malformed requests: no 5xx, nothing of the inside in an error, and the next good one answered."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from common import smooth
from leanvit.imaging import encode_png
from serving import Running, serving

REQUESTS = 10_000

SECRETS = re.compile(rb"Traceback|File \"|site-packages|/root|/tmp|/work|leanvit\.|0x[0-9a-f]{6}|BytesIO|\.py\b|__")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(40, 48, 3)).save(buffer, kind)
    return buffer.getvalue()


GOOD = encode_png(smooth(40, 48, seed=5))
IMAGES = [GOOD, *(encoded(kind) for kind in ("JPEG", "WEBP", "BMP", "TIFF"))]
NAMES = [
    "one",
    "",
    ".",
    "..",
    "%2e%2e",
    "one%00",
    "one%20",
    "%ff%fe",
    "one/",
    "one:predict",
    "a" * 300,
    "ONE",
    "{name}",
    "*",
]
QUERIES = ["top_k", "score_threshold", "boxes", "map", "x", "%00", ""]
VALUES = ["1", "0", "-1", "1e9", "nan", "9" * 30, "true", "%00", "../../etc/passwd", "{}", "1,2,3,4", "\u0661"]
HEADERS = [
    "Content-Type: multipart/form-data; boundary=x", "Content-Type: multipart/form-data", "Content-Type: \x01",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity",
    "Content-Encoding: deflate", "Content-Length: 5", "Content-Length: -5", "Content-Length: 5, 6",
    "Expect: 100-continue",
    "Expect: 200-ok", "Upgrade: websocket", "Connection: Upgrade", "Connection: close, te", "Authorization: Bearer",
    "Inference-Header-Content-Length: 4", "Inference-Header-Content-Length: x", "X-Timeout-Ms: 0", "X-Timeout-Ms: -1",
    "Accept: image/png", "Accept: */*;q=x", "Range: bytes=0-1", "Host: other\r\nHost: third", "Cookie: " + "a" * 4000,
    "Bad Header: 1", ": nothing", "X-Folded: a\r\n b",
]  # fmt: skip
TENSOR = {"inputs": [{"name": "encoded", "shape": [1], "datatype": "BYTES", "data": ["aGk="]}]}


def changed(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, flipped, doubled or filled."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        kind, place = rng.randrange(4), rng.randrange(len(found) + 1)
        if kind == 0:
            del found[place:]
        elif kind == 1 and found:
            found[place % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[place:place] = found[max(0, place - 20) : place]
        else:
            found[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\r\n", b"-1"))
    return bytes(found)


def request(method: str, target: str, body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: here", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + body


def damaged_image(rng: random.Random) -> bytes:
    return request("POST", "/v1/models/one:predict", changed(rng, rng.choice(IMAGES)))


def odd_target(rng: random.Random) -> bytes:
    name, tail = rng.choice(NAMES), rng.choice([":predict", "/infer", "", "/ready", ":", "/versions/2/infer"])
    query = "&".join(f"{rng.choice(QUERIES)}={rng.choice(VALUES)}" for _ in range(rng.randrange(4)))
    prefix = rng.choice(["/v1/models/", "/v2/models/", "/page/", "//", "/v1/", "*"])
    method = rng.choice(["POST", "GET", "PUT", "HEAD", "OPTIONS", "TRACE", "post", "X" * 50])
    return request(method, f"{prefix}{name}{tail}?{query}", GOOD)


def odd_headers(rng: random.Random) -> bytes:
    headers = rng.sample(HEADERS, rng.randint(1, 4))
    target = rng.choice(["/v1/models/one:predict", "/v2/models/one/infer"])
    body = rng.choice([GOOD, b"", b"5\r\nabcde\r\n0\r\n\r\n", b"zz\r\n", json.dumps(TENSOR).encode()])
    return request("POST", target, body, *headers, length=rng.random() < 0.7)


def damaged_json(rng: random.Random) -> bytes:
    body = json.dumps(TENSOR).encode()
    head = rng.choice([[], [f"Inference-Header-Content-Length: {rng.randint(-3, 200)}"]])
    return request("POST", "/v2/models/one/infer", changed(rng, body), *head)


def damaged_bytes(rng: random.Random) -> bytes:
    return changed(rng, request("POST", "/v1/models/one:predict?top_k=2", GOOD[:200]))


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(300)) + b"\r\n\r\n"


KINDS: list[Callable[[random.Random], bytes]] = [
    damaged_image, damaged_image, odd_target, odd_headers, damaged_json, damaged_json, damaged_bytes, noise,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(shared_bundle: Path):  # type: ignore[no-untyped-def]
    limits = ("--timeout", 0.2, "--max-body", 100_000, "--threads", 1, "--max-queue", 1000)
    with serving(f"one={shared_bundle}", *limits) as running:
        yield running


def test_malformed_requests_are_refused_and_leave_no_trace(server: Running) -> None:
    def ask(seed: int) -> tuple[int, bytes]:
        rng = random.Random(seed)
        return seed, server.raw(KINDS[seed % len(KINDS)](rng), seconds=20)

    codes: Counter[int] = Counter()
    with ThreadPoolExecutor(16) as pool:
        for seed, reply in pool.map(ask, range(REQUESTS)):
            last = reply.replace(b"HTTP/1.1 100 \r\n\r\n", b"").replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            code = int(last.split(b" ", 2)[1]) if last else 0
            codes[code] += 1
            assert code < 500, (seed, reply)
            if code >= 400:
                assert not SECRETS.search(last), (seed, reply)
    assert codes[400] > REQUESTS // 5
    assert codes[200] < REQUESTS // 2
    assert set(codes) >= {200, 400, 404, 405, 415}
    assert server.named("bug") == []
    assert server.errors == []
    assert {line["library"] for line in server.named("library")} >= {"uvicorn.error"}
    assert server.predict("one", GOOD).code == 200
    assert server.metric("leanvit_pending") == 0

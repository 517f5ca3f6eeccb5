"""Limits that hold before any work is done: connections, headers, encodings, length, time, and who may ask."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
from starlette.types import Message, Receive, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from leanvit.config import ServeConfig
from leanvit.errors import ConfigError
from leanvit.serve.refusals import Gone, Refusal

MOST_HEADERS = 100
"""As Apache's LimitRequestFields; a browser behind two proxies sends about 30."""

HEADER_BYTES = 32 * 1024
"""Of a request's head; nginx takes 4 buffers of 8 KiB."""

MOST_MESSAGES = 65_536
"""Pieces in which a body may arrive: a chunk costs time however small it is."""

BUFFERED_BODIES = 16
"""Bodies of the largest size that may be in memory at a time."""

SHORTEST_TOKEN = 16

OPEN_PATHS = ("/", "/v2/health/live", "/v2/health/ready")
"""Without a token: probes, and the page, which asks for the token itself."""


def read_token(config: ServeConfig) -> bytes | None:
    """The token that requests must bring; None where everybody may ask.

    Raises ConfigError for an address that others can reach without a token, and for a token that is too short.
    """
    if config.token_file is None:
        if config.is_public and config.auth:
            raise ConfigError(
                f"host {config.host} can be reached by others and no token is asked for, expected --token-file FILE, "
                "or --no-auth where whoever asks may be served."
            )
        return None
    try:
        token = Path(config.token_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"token_file {config.token_file}: {error.strerror}. Check the path.") from error
    if len(token) < SHORTEST_TOKEN or not token.isascii() or b" " in token or b"\n" in token:
        raise ConfigError(
            f"token_file {config.token_file}: expected one word of at least {SHORTEST_TOKEN} characters. "
            "Make one: openssl rand -hex 32"
        )
    return token


@dataclass(eq=False)
class Limits:
    """What is checked of each request. buffered: bytes of bodies in memory."""

    config: ServeConfig
    token: bytes | None
    buffered: int = 0

    def check_head(self, scope: Scope) -> None:
        """Raise Refusal for a request whose head alone says that it is not taken."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MOST_HEADERS:
            raise Refusal(431, f"{len(headers)} headers, expected at most {MOST_HEADERS}", close=True)
        named = dict(headers)
        if self.token is not None and not is_open(scope["path"]):
            scheme, _, given = named.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                raise Refusal(401, "expected the header Authorization: Bearer TOKEN", reason="token", close=True)
        encoding = named.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            raise Refusal(415, "Content-Encoding is not taken, expected the body as it is", close=True)
        length = named.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length[:20]) > self.config.max_body):
            raise self.too_large()

    def too_large(self) -> Refusal:
        """The refusal of a body that is too large."""
        return Refusal(413, f"the body is too large, expected at most {self.config.max_body} bytes", close=True)

    async def read_body(self, receive: Receive) -> bytes:
        """The body of a request; `release` it afterwards.

        Raises Refusal where it is too large, comes too slowly or in too many pieces, and where bodies of other
        requests take the memory; Gone where the client leaves.
        """
        parts: list[bytes] = []
        total = 0
        try:
            async with asyncio.timeout(self.config.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    data: bytes = message.get("body", b"")
                    total += len(data)
                    self.buffered += len(data)
                    parts.append(data)
                    self._check_parts(total, len(parts))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            self.release(total)
            raise Refusal(408, f"the body did not arrive in {self.config.timeout:g} s", close=True) from None
        except BaseException:
            self.release(total)
            raise

    def _check_parts(self, total: int, count: int) -> None:
        if total > self.config.max_body:
            raise self.too_large()
        if count > MOST_MESSAGES:
            raise Refusal(413, f"the body came in more than {MOST_MESSAGES} pieces", close=True)
        if self.buffered > BUFFERED_BODIES * self.config.max_body:
            raise Refusal(429, "too many large requests at a time", reason="memory", retry_after=1, close=True)

    def release(self, count: int) -> None:
        """Say that a body of so many bytes is in memory no more."""
        self.buffered -= count


def is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return path in OPEN_PATHS or path.startswith("/page/")


async def drain(receive: Receive, most: int, seconds: float) -> None:
    """Read and forget the rest of a body, as far as bytes and seconds go: a client that is still writing reads no
    answer, and one whose connection is closed early may never see it."""
    seen = 0
    try:
        async with asyncio.timeout(seconds):
            while seen <= most:
                message: Message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                seen += len(message.get("body", b""))
    except TimeoutError:
        return


def protocol(config: ServeConfig) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with two limits that it lacks: connections, and time for the head of a request."""
    refused = (
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b'Content-Length: 33\r\n\r\n{"error": "too many connections"}'
    )

    class LimitedProtocol(H11Protocol):
        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > config.max_connections:
                transport.write(refused)
                transport.close()
                return
            self.head_timer = self.loop.call_later(config.timeout, self.timeout_keep_alive_handler)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            waits_for_head = self.conn.their_state is h11.IDLE
            if self.head_timer is not None and not waits_for_head:
                self.head_timer.cancel()
                self.head_timer = None
            elif self.head_timer is None and waits_for_head and self.timeout_keep_alive_task is None:
                self.head_timer = self.loop.call_later(config.timeout, self.timeout_keep_alive_handler)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
            super().connection_lost(exc)

    return LimitedProtocol

"""What surrounds every request: limits before any work, one way to say what is refused, metrics and the log."""

from __future__ import annotations

import json
import time

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leanvit.serve import log
from leanvit.serve.limits import drain
from leanvit.serve.refusals import Gone, Refusal
from leanvit.serve.service import Service

DRAIN_BYTES = 8 * 2**20
DRAIN_SECONDS = 2.0
"""How much of a refused body is read and forgotten, and for how long."""

CLIENT_LEFT = 499
"""As nginx logs it; nobody reads it."""

INTERNAL = Refusal(500, "internal error", close=True)


async def refusal_response(refusal: Refusal, receive: Receive) -> Response:
    """What a client is told; before that the rest of its body is read where the connection is closed after it.

    One whose body did not come in time (408) has had its time.
    """
    if refusal.close and refusal.code != 408:
        await drain(receive, DRAIN_BYTES, DRAIN_SECONDS)
    body = json.dumps({"error": refusal.message})
    return Response(body, refusal.code, refusal.headers, media_type="application/json")


class Surround:
    """An ASGI application around the routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        answered = 0

        async def send_noting(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                message["headers"] = [*message["headers"], *self._headers(message)]
            await send(message)

        try:
            self.service.limits.check_head(scope)
            await self.app(scope, receive, send_noting)
        except Refusal as refusal:
            self.service.metrics.refused.labels(refusal.reason or str(refusal.code)).inc()
            response = await refusal_response(refusal, receive)
            await response(scope, receive, send_noting)
        except Gone:
            await Response(status_code=CLIENT_LEFT)(scope, receive, send_noting)
        except Exception as error:
            # The message may hold what belongs to the client, so only its kind is logged.
            log.write("bug", error=type(error).__name__, where=_where(error), path=scope["path"])
            if not answered:
                response = await refusal_response(INTERNAL, receive)
                await response(scope, receive, send_noting)
        finally:
            self._note(scope, answered, time.perf_counter() - started)

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-content-type-options", b"nosniff")]
        named = {name.lower() for name, _ in message["headers"]}
        if self.service.draining and b"connection" not in named:
            # Whoever keeps the connection goes elsewhere with the next request.
            headers.append((b"connection", b"close"))
        return headers

    def _note(self, scope: Scope, code: int, seconds: float) -> None:
        name = scope.get("path_params", {}).get("name", "")
        model = name if self.service.models.get(name) else ""
        route = getattr(scope.get("route"), "path", "")
        self.service.metrics.requests.labels(route, model, str(code or CLIENT_LEFT)).inc()
        if self.service.config.access_log:
            client = scope["client"][0] if scope.get("client") else ""
            log.write(
                "request", method=scope["method"][:16], path=scope["path"], code=code or CLIENT_LEFT, model=model,
                ms=round(1e3 * seconds, 2), client=client,
            )  # fmt: skip


def _where(error: BaseException) -> str:
    """File and line of the code that raised, without folders."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace else ""

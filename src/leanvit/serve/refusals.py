"""What a request is refused with: the HTTP code, a sentence for the client, and headers."""

from __future__ import annotations

import math


class Refusal(Exception):
    """Answered with `code` and {"error": message}.

    reason: one word for the metrics. retry_after: seconds, for a client that may come again. close: whether the
    connection can't be used any more, because the rest of the request was not read.
    """

    def __init__(
        self, code: int, message: str, *, reason: str = "", retry_after: float | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.retry_after = retry_after
        self.close = close

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.close:
            headers["Connection"] = "close"
        if self.code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class Gone(Exception):
    """The client has left; nobody reads an answer."""

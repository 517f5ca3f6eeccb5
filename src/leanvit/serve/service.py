"""One request's way: taken or refused, decoded, run with others, and answered; whatever the task."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image
from starlette.types import Receive

from leanvit import imaging
from leanvit.config import ServeConfig
from leanvit.errors import ImageError
from leanvit.runtime.decode import POSE_PADDING
from leanvit.runtime.inputs import Inputs, Options
from leanvit.serve.batcher import Computed, Dropped, Ticket, settle
from leanvit.serve.limits import Limits
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import Model, Models
from leanvit.serve.priority import yield_to_event_loop
from leanvit.serve.refusals import Gone, Refusal

DECODERS = min(4, os.cpu_count() or 1)

DEADLINE = "x-timeout-ms"
"""Header with the milliseconds after which the client waits no longer."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """A decoded image as the network sees it. pixels: of the whole picture, for tasks that draw on it.

    ms: milliseconds of decoding and resizing; waited_ms: before it.
    """

    pixels: imaging.Pixels | None
    inputs: Inputs
    notes: tuple[str, ...]
    ms: float
    waited_ms: float


@dataclass(eq=False)
class Service:
    """What all requests share. draining: whether the server is about to end."""

    config: ServeConfig
    models: Models
    metrics: Metrics
    limits: Limits
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(DECODERS, "decode", initializer=yield_to_event_loop)
    )
    draining: bool = False

    def model(self, name: str) -> Model:
        """The model of this name. Raises Refusal."""
        model = self.models.get(name)
        if model is None:
            raise Refusal(404, "no such model; GET /v1/models lists those that are served")
        return model

    def require_room(self, model: Model) -> None:
        """Raise Refusal where as many requests as a model may have are on their way."""
        if model.pending >= self.config.max_queue:
            wait = model.seconds_to_wait
            raise Refusal(429, "too many requests wait for this model", reason="queue", retry_after=wait)

    @contextlib.contextmanager
    def taken(self, model: Model) -> Iterator[None]:
        """Count a request as on its way. Raises Refusal where there are too many."""
        self.require_room(model)
        model.pending += 1
        gauge = self.metrics.pending.labels(model.name)
        gauge.inc()
        try:
            yield
        finally:
            model.pending -= 1
            gauge.dec()

    async def in_pool(self, ticket: Ticket, work: Callable[..., Result], *arguments: Any) -> Result:
        """work(*arguments) in one of the threads that decode, unless the request is dropped before. Raises Dropped."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, unless_dropped, ticket, work, *arguments)

    async def decode_and_compute(
        self, model: Model, ticket: Ticket, work: Callable[[], Picture]
    ) -> tuple[Picture, Computed]:
        """work() in one of the threads that decode, which hands the images to the network by itself: the event loop
        wakes up once a request. Raises Dropped, and what `work` and the network raise."""
        future: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        pictures: list[Picture] = []

        def decode_and_queue() -> None:
            try:
                pictures.append(unless_dropped(ticket, work))
                model.batcher.put(ticket, pictures[0].inputs.images, future)
            except Exception as error:
                settle([(future, error)])
            finally:
                model.batcher.decoded()

        model.batcher.announce()
        self.pool.submit(decode_and_queue)
        computed = await future
        self.metrics.seconds.labels(model.name, "compute").observe(computed.compute_ms / 1e3)
        return pictures[0], computed

    @contextlib.contextmanager
    def dropping(self, model: Model, ticket: Ticket) -> Iterator[None]:
        """Turn Dropped into what the client is told, if it still listens."""
        try:
            yield
        except Dropped:
            self.metrics.dropped.labels(model.name, "disconnected" if ticket.gone else "deadline").inc()
            if ticket.gone:
                raise Gone from None
            wait = model.seconds_to_wait
            raise Refusal(429, "the deadline of the request has passed", reason="deadline", retry_after=wait) from None

    async def compute(self, model: Model, ticket: Ticket, images: imaging.Pixels) -> Computed:
        """The network's outputs, and their seconds in the metrics. Raises Dropped."""
        computed = await model.batcher.compute(ticket, images)
        self.metrics.seconds.labels(model.name, "compute").observe(computed.compute_ms / 1e3)
        return computed

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for model in self.models:
            model.batcher.close()


def unless_dropped(ticket: Ticket, work: Callable[..., Result], *arguments: Any) -> Result:
    """work(*arguments). Raises Dropped where nobody waits for it any more."""
    if ticket.is_dropped:
        raise Dropped
    return work(*arguments)


def ticket_for(headers: Any, microseconds: int | None = None) -> Ticket:
    """The ticket of a request, with the deadline that its header, or a parameter of v2, sets. Raises Refusal."""
    text = headers.get(DEADLINE)
    if text is not None and not re.fullmatch(r"\d{1,9}", text):
        raise Refusal(400, "X-Timeout-Ms is not a whole number of milliseconds")
    limits = [] if text is None else [int(text) / 1e3]
    limits += [] if microseconds is None else [microseconds / 1e6]
    return Ticket(until=time.monotonic() + min(limits)) if limits else Ticket()


@contextlib.asynccontextmanager
async def watched(ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """While the request is worked on, notice that its client leaves. The body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.gone = True

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def decode(model: Model, data: bytes, options: Options, most_pixels: int, since: float) -> Picture:
    """An encoded image as the network of a model sees it. since: time.perf_counter() when it was handed over.

    Raises Refusal for what is no image, a damaged or a too large one, and for boxes outside of it.
    """
    started = time.perf_counter()
    check_size(data, most_pixels)
    predictor = model.predictor
    try:
        if predictor.task.draw is None:
            inputs, notes, pixels = predictor.read(data, options, "the image")
        else:
            decoded = imaging.decode(data, "the image", channels=predictor.channels)
            notes, pixels = decoded.notes, decoded.pixels
            if "boxes" in predictor.task.options:
                check_boxes(*decoded.size, options, most_pixels)
            inputs = predictor.inputs(pixels, options)
    except ImageError as error:
        raise Refusal(400, presentable(str(error))) from None
    ms = 1e3 * (time.perf_counter() - started)
    return Picture(pixels, inputs, notes, ms, 1e3 * (started - since))


def prepare(model: Model, images: list[bytes], most_pixels: int) -> list[imaging.Pixels]:
    """Encoded images as inputs of the network: (H, W, C) uint8 each. Raises Refusal."""
    found = []
    for data in images:
        check_size(data, most_pixels)
        try:
            found.append(model.predictor.prepare(data, "the image"))
        except ImageError as error:
            raise Refusal(400, presentable(str(error))) from None
    return found


def check_size(data: bytes, most_pixels: int) -> None:
    """Raise Refusal for a picture of more pixels, by its header alone."""
    if not data:
        raise Refusal(400, "no image in the request, expected its bytes as the body")
    try:
        with Image.open(io.BytesIO(data), formats=imaging.FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refusal(413, f"the picture is too large, expected at most {most_pixels} pixels") from None
    except Exception:  # decoding says what is wrong with it
        return
    if width * height > most_pixels:
        raise Refusal(413, f"{width} x {height} pixels, expected at most {most_pixels} in all")


def check_boxes(height: int, width: int, options: Options, most_pixels: int) -> None:
    """Raise Refusal for boxes that are not in the picture, and where a crop around one would fill the memory."""
    boxes = [(0.0, 0.0, float(width), float(height))] if options.boxes is None else options.boxes
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise Refusal(400, f"a box is not in the picture of {width} x {height} pixels")
        if (POSE_PADDING * max(x2 - x1, y2 - y1)) ** 2 > most_pixels:
            raise Refusal(413, f"the square around an object has more than {most_pixels} pixels")


def presentable(message: str) -> str:
    """An error of the decoder without what tells of the program's inside."""
    if re.search(r"[<>\\/]|0x|\w\(|Error", message):
        return "the image: damaged image, expected a complete file. Replace it."
    return message

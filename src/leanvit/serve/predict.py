"""POST /v1/models/NAME:predict: one image in, what the network finds in it out."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.datastructures import Headers, QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from leanvit import imaging
from leanvit.runtime.decode import Box
from leanvit.runtime.inputs import Options
from leanvit.serve.batcher import Ticket
from leanvit.serve.models import Model
from leanvit.serve.refusals import Refusal
from leanvit.serve.service import Picture, Service, decode, ticket_for, watched

MOST_BOXES = 100

FAST = 1
"""zlib's level for pictures that are sent: a client waits for them."""

NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,9})?")


async def predict(service: Service, request: Request, name: str) -> Response:
    """What the network of a model finds in the image of a request. Raises Refusal, Gone."""
    model = service.model(name)
    asked = read_query(model, request.query_params)
    wants_picture = "image/png" in request.headers.get("accept", "")
    if wants_picture and not model.facts["drawn"]:
        raise Refusal(406, f"task {model.predictor.task.name} draws no picture, expected Accept: application/json")
    ticket = ticket_for(request.headers)
    service.require_room(model)
    body = await service.limits.read_body(request.receive)
    try:
        with service.taken(model), service.dropping(model, ticket):
            async with watched(ticket, request.receive):
                image = await image_of(request.headers, body)
                return await _answer(service, model, ticket, image, asked, wants_picture)
    finally:
        service.limits.release(len(body))


async def _answer(
    service: Service, model: Model, ticket: Ticket, image: bytes, asked: tuple[Options, bool], wants_picture: bool
) -> Response:
    options, wants_map = asked
    seconds = service.metrics.seconds
    since = time.perf_counter()
    work = partial(decode, model, image, options, service.config.max_pixels, since)
    picture, computed = await service.decode_and_compute(model, ticket, work)
    seconds.labels(model.name, "decode").observe(picture.ms / 1e3)
    queued = picture.waited_ms + computed.queue_ms
    seconds.labels(model.name, "queue").observe(queued / 1e3)
    spent = {"decode": round(picture.ms, 3), "queue": round(queued, 3), "compute": round(computed.compute_ms, 3)}
    arguments = (model, picture, options, computed.outputs, spent, wants_map, wants_picture)
    # Boxes, masks and maps take a while, labels and vectors less than a thread's wake-up.
    if model.predictor.task.draw is None:
        return respond(*arguments)
    return await service.in_pool(ticket, respond, *arguments)


def respond(
    model: Model,
    picture: Picture,
    options: Options,
    outputs: dict[str, Any],
    spent: dict[str, float],
    wants_map: bool,
    wants_picture: bool,
) -> Response:
    """The response from the outputs for one picture: JSON, or what was drawn."""
    predictor = model.predictor
    task, manifest = predictor.task, predictor.manifest
    found = task.decode(outputs, picture.inputs, manifest, options)
    drawn: dict[str, imaging.Pixels] = {}
    if task.draw and picture.pixels is not None and (wants_map or wants_picture):
        drawn = task.draw(picture.pixels, found, manifest)
    if wants_picture:
        return Response(imaging.encode_png(drawn["drawn"], FAST), media_type="image/png")
    height, width = picture.inputs.size
    values = {
        "model": model.name,
        "task": task.name,
        "bundle": model.digest,
        "runtime": predictor.runtime,
        "image": {"height": height, "width": width},
        **task.line(found, manifest),
        "notes": list(picture.notes),
        "milliseconds": spent,
    }
    if wants_map:
        values["map"] = base64.b64encode(imaging.encode_png(drawn["map"], FAST)).decode("ascii")
    return Response(json.dumps(values, allow_nan=False), media_type="application/json")


def read_query(model: Model, query: QueryParams) -> tuple[Options, bool]:
    """What a request asks for beside the image: options of the prediction, and whether the map. Raises Refusal."""
    known = [*model.facts["options"], *(["map"] if "map" in model.facts["drawn"] else [])]
    asked: dict[str, Any] = {}
    for key in dict.fromkeys(key for key, _ in query.multi_items()):
        texts = query.getlist(key)
        if key not in known:
            raise Refusal(400, f"unknown parameter, expected {' or '.join(known) or 'none'} for this model")
        if len(texts) > 1 and key != "boxes":
            raise Refusal(400, f"{key} is given more than once")
        asked[key] = READERS[key](texts)
    wants_map = bool(asked.pop("map", False))
    return Options(**asked), wants_map


def read_top_k(texts: list[str]) -> int:
    """A number of labels. Raises Refusal."""
    if not re.fullmatch(r"\d{1,6}", texts[0]) or int(texts[0]) < 1:
        raise Refusal(400, "top_k is not a whole number from 1")
    return int(texts[0])


def read_threshold(texts: list[str]) -> float:
    """A least score. Raises Refusal."""
    if not NUMBER.fullmatch(texts[0]) or not 0 <= float(texts[0]) <= 1:
        raise Refusal(400, "score_threshold is not a number from 0 to 1")
    return float(texts[0])


def read_boxes(texts: list[str]) -> list[Box]:
    """Boxes of objects. Raises Refusal."""
    if len(texts) > MOST_BOXES:
        raise Refusal(400, f"more than {MOST_BOXES} boxes")
    boxes: list[Box] = []
    for text in texts:
        parts = text.split(",")
        if len(parts) != 4 or not all(NUMBER.fullmatch(part) for part in parts):
            raise Refusal(400, "boxes is not x1,y1,x2,y2")
        x1, y1, x2, y2 = map(float, parts)
        boxes.append((x1, y1, x2, y2))
    return boxes


def read_switch(texts: list[str]) -> bool:
    """true or false. Raises Refusal."""
    if texts[0] not in ("true", "false"):
        raise Refusal(400, "map is neither true nor false")
    return texts[0] == "true"


READERS = {"top_k": read_top_k, "score_threshold": read_threshold, "boxes": read_boxes, "map": read_switch}


async def image_of(headers: Headers, body: bytes) -> bytes:
    """The encoded image in a body: the one file of a form, else the body itself. Raises Refusal.

    Other types are not asked for: curl says application/x-www-form-urlencoded of any file.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return body

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(headers, stream(), max_files=1, max_fields=0).parse()
    except (MultiPartException, ValueError, KeyError):
        raise Refusal(400, "the form is damaged or holds more than one file, expected one file") from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    try:
        if len(files) != 1:
            raise Refusal(400, "no file in the form, expected one")
        return await files[0].read()
    finally:
        await form.close()

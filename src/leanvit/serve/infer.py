"""The Open Inference Protocol v2 for bundles: metadata, and inference on encoded images or prepared pixels."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from leanvit._version import __version__
from leanvit.imaging import Pixels
from leanvit.serve import tensors
from leanvit.serve.models import Model
from leanvit.serve.refusals import Refusal
from leanvit.serve.service import Service, prepare, ticket_for, watched

PIXELS = "images"
"""The input of prepared pixels, as the graph names it."""

ENCODED = "encoded"
"""The input of encoded images, which the server prepares."""

HEADER_LENGTH = "inference-header-content-length"

VERSION = "1"

LONGEST_ID = 200


def server_metadata() -> dict[str, Any]:
    """GET /v2."""
    return {"name": "leanvit", "version": __version__, "extensions": ["binary_tensor_data"]}


def model_metadata(model: Model) -> dict[str, Any]:
    """GET /v2/models/NAME: of the two inputs a request gives one."""
    predictor = model.predictor
    height, width = predictor.size
    shapes = model.facts["outputs"]
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": f"leanvit_{predictor.runtime}",
        "inputs": [
            {"name": PIXELS, "datatype": "UINT8", "shape": [-1, height, width, predictor.channels]},
            {"name": ENCODED, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": shapes,
    }


async def infer(service: Service, request: Request, name: str) -> Response:
    """POST /v2/models/NAME/infer. Raises Refusal, Gone."""
    model = service.model(name)
    service.require_room(model)
    body = await service.limits.read_body(request.receive)
    try:
        with service.taken(model):
            return await _infer(service, model, request, body)
    finally:
        service.limits.release(len(body))


async def _infer(service: Service, model: Model, request: Request, body: bytes) -> Response:
    ticket = ticket_for(request.headers)
    with service.dropping(model, ticket):
        async with watched(ticket, request.receive):
            header_length = request.headers.get(HEADER_LENGTH)
            since = time.perf_counter()
            asked, rest = await service.in_pool(ticket, tensors.split_binary, body, header_length)
            ticket.until = min(ticket.until, ticket_for({}, read_timeout(asked)).until)
            wanted = tensors.wanted_outputs(asked, [output["name"] for output in model.facts["outputs"]])
            images = await service.in_pool(ticket, read_images, service, model, asked, rest)
            service.metrics.seconds.labels(model.name, "decode").observe(time.perf_counter() - since)
            computed = await service.compute(model, ticket, images)
            service.metrics.seconds.labels(model.name, "queue").observe(computed.queue_ms / 1e3)
            about: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
            if "id" in asked:
                about["id"] = tensors.field(asked, "id", str)[:LONGEST_ID]
            data, length = await service.in_pool(ticket, tensors.encode, computed.outputs, wanted, about)
    if length is None:
        return Response(data, media_type="application/json")
    headers = {HEADER_LENGTH: str(length)}
    return Response(data, media_type="application/octet-stream", headers=headers)


def read_timeout(asked: dict[str, Any]) -> int | None:
    """Triton's request parameter `timeout` in microseconds; 0 is none. Raises Refusal."""
    parameters = tensors.field(asked, "parameters", dict, {})
    if "timeout" not in parameters:
        return None
    timeout: int = tensors.field(parameters, "timeout", int)
    if timeout < 0:
        raise Refusal(400, "'timeout' is negative")
    return timeout or None


def read_images(service: Service, model: Model, asked: dict[str, Any], rest: memoryview) -> Pixels:
    """The network's input (N, H, W, C) uint8 from a request's one input tensor. Raises Refusal."""
    inputs = tensors.field(asked, "inputs", list)
    parts = tensors.raw_parts(tensors.raw_sizes(inputs), rest)
    if len(inputs) != 1:
        raise Refusal(400, f"{len(inputs)} inputs, expected one: {PIXELS} or {ENCODED}")
    tensor = inputs[0]
    name = tensors.field(tensor, "name", str)
    expected = {PIXELS: "UINT8", ENCODED: "BYTES"}
    if name not in expected:
        raise Refusal(400, f"no such input, expected {PIXELS} or {ENCODED}")
    if tensors.field(tensor, "datatype", str) != expected[name]:
        raise Refusal(400, f"input {name} is of another datatype, expected {expected[name]}")
    shape = tensors.shape_of(tensor)
    most = service.config.max_batch
    if not 1 <= shape[0] <= most:
        raise Refusal(400, f"{shape[0]} images in a request, expected 1 to {most}")
    if name == ENCODED:
        if shape not in ((shape[0],), (shape[0], 1)):
            raise Refusal(400, f"input {ENCODED} has shape {list(shape)}, expected [N]")
        return np.stack(prepare(model, tensors.byte_strings(tensor, parts[0]), service.config.max_pixels))
    size = (*model.predictor.size, model.predictor.channels)
    if shape[1:] != size:
        raise Refusal(400, f"input {PIXELS} has shape {list(shape)}, expected [N, {', '.join(map(str, size))}]")
    return tensors.uint8_array(tensor, parts[0])

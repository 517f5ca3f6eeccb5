"""What the OpenAPI document says of requests and responses beside the signatures of the routes."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
SWITCH: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
OBJECT_OR_NULL: Schema = {"type": ["object", "null"]}
BYTES: Schema = {"type": "string", "format": "binary"}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def rows(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def record(**properties: Schema) -> Schema:
    """An object that has all of these, and perhaps others."""
    return {"type": "object", "required": [*properties], "properties": properties}


def also(schema: Schema, **properties: Schema) -> Schema:
    """The same object, which may have these as well."""
    return {**schema, "properties": {**schema["properties"], **properties}}


TENSOR = record(name=TEXT, datatype=TEXT, shape=rows(INTEGER))
SUMMARY = record(
    name=TEXT, task=TEXT, title=TEXT, architecture=TEXT, profile=TEXT, runtime=TEXT, bundle=DIGEST,
    input=record(height=INTEGER, width=INTEGER, channels=INTEGER),
)  # fmt: skip
MODELS = record(models=rows(SUMMARY))
FACTS = record(
    **SUMMARY["properties"], labels=rows(TEXT), options=rows(TEXT), drawn=rows(TEXT), keypoints=OBJECT_OR_NULL,
    preprocess=OBJECT, gate=OBJECT_OR_NULL, golden=record(runtime=TEXT, minimum_db=NUMBER), accuracy=OBJECT_OR_NULL,
    bits=OBJECT_OR_NULL, bytes={"type": "object", "additionalProperties": INTEGER}, simulated=SWITCH,
    versions={"type": "object", "additionalProperties": TEXT}, limits=record(body_bytes=INTEGER, pixels=INTEGER),
    outputs=rows(TENSOR),
)  # fmt: skip
PREDICTION = also(
    record(
        model=TEXT, task=TEXT, bundle=DIGEST, runtime=TEXT, image=record(height=INTEGER, width=INTEGER),
        notes=rows(TEXT), milliseconds=record(decode=NUMBER, queue=NUMBER, compute=NUMBER),
    ),
    predictions=rows(record(label=TEXT, probability=NUMBER)), embedding=rows(NUMBER), objects=rows(OBJECT),
    shares={"type": "object", "additionalProperties": NUMBER}, map=TEXT,
)  # fmt: skip
SERVER = record(name=TEXT, version=TEXT, extensions=rows(TEXT))
METADATA = record(name=TEXT, versions=rows(TEXT), platform=TEXT, inputs=rows(TENSOR), outputs=rows(TENSOR))
LIVE = record(live=SWITCH)
READY = record(ready=SWITCH)
MODEL_READY = record(name=TEXT, ready=SWITCH)
INFERENCE = also(
    record(model_name=TEXT, model_version=TEXT, outputs=rows(also(TENSOR, data=rows({}), parameters=OBJECT))), id=TEXT
)
INPUT = also(
    record(name={"enum": ["images", "encoded"]}, datatype={"enum": ["UINT8", "BYTES"]}, shape=rows(INTEGER)),
    data=rows({}), parameters=OBJECT,
)  # fmt: skip
REQUEST = also(
    record(inputs={**rows(INPUT), "minItems": 1, "maxItems": 1}),
    id=TEXT, outputs=rows(also(record(name=TEXT), parameters=OBJECT)), parameters=OBJECT,
)  # fmt: skip


def described(**texts: str) -> dict[int | str, Schema]:
    """Errors of a route: e400="what it means". Each is {"error": "a sentence"}."""
    content = {"application/json": {"schema": record(error=TEXT)}}
    return {int(code[1:]): {"description": text, "content": content} for code, text in texts.items()}


def returns(schema: Schema, *others: str) -> dict[int | str, Schema]:
    """The JSON that a route returns; others: content types in which it returns bytes where that is asked for."""
    content = {"application/json": {"schema": schema}} | {kind: {"schema": BYTES} for kind in others}
    return {200: {"description": "As asked for", "content": content}}


def not_ready(schema: Schema) -> dict[int | str, Schema]:
    """What a probe is told while the server ends: the same as before, with `ready` false."""
    return {503: {"description": "About to end", "content": {"application/json": {"schema": schema}}}}


OPEN = described(
    e413="Body or picture too large",
    e415="An encoding or a form that is not taken",
    e429="Too much to do; Retry-After says when to come again",
    e431="Too many headers",
)
"""What any request may be refused with, before its path is looked at."""

OPEN[429]["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}

CLOSED = OPEN | described(e401="No token, or a wrong one")
CLOSED[401]["headers"] = {"WWW-Authenticate": {"required": True, "schema": TEXT}}

UNKNOWN = CLOSED | described(e404="No such model")
WORK = UNKNOWN | described(
    e400="Malformed request, or no image in it",
    e408="The body did not arrive in time",
)

DEADLINE = {"name": "X-Timeout-Ms", "in": "header", "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999}}

IMAGE_BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": BYTES}, "multipart/form-data": {"schema": record(image=BYTES)}},
    },
    "parameters": [
        {"name": "top_k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 999_999}},
        {"name": "score_threshold", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 1}},
        {"name": "boxes", "in": "query", "schema": rows(TEXT)},
        {"name": "map", "in": "query", "schema": SWITCH},
        DEADLINE,
    ],
}
"""Of the route that takes images, what its signature does not say. Which parameters a model takes its facts say."""

TENSOR_BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": REQUEST}, "application/octet-stream": {"schema": BYTES}},
    },
    "parameters": [
        {
            "name": "Inference-Header-Content-Length", "in": "header", "schema": {"type": "integer", "minimum": 0},
            "description": "Bytes of the JSON at the start of the body, where raw tensors follow it",
        },
        DEADLINE,
    ],
}  # fmt: skip


def without_validation(document: Schema) -> Schema:
    """FastAPI's document without its own answer to malformed requests (422): here they are 400, as described."""
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document

"""An unchanged client of Triton: encoded images and prepared pixels, and the predictor's numbers to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import smooth
from leanvit import Predictor
from leanvit.imaging import encode_png
from serving import Running, serving

triton = pytest.importorskip("tritonclient.http")

IMAGES = [encode_png(smooth(40, 48, seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Running]:
    with serving(f"one={shared_bundle}", "--threads", 1, "--max-batch", 4) as running:
        yield running


@pytest.fixture(scope="module")
def predictor(shared_bundle: Path) -> Predictor:
    return Predictor(shared_bundle, threads=1)


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


def encoded(images: list[bytes]) -> Any:
    tensor = triton.InferInput("encoded", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object))
    return tensor


def pixels(array: np.ndarray, binary: bool = True) -> Any:
    tensor = triton.InferInput("images", list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_health_and_metadata(client: Any, predictor: Predictor) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("one")
    assert client.is_model_ready("one", "1")
    assert not client.is_model_ready("two")
    assert client.get_server_metadata()["name"] == "leanvit"
    described = client.get_model_metadata("one")
    assert described["inputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, *predictor.size, 3]}
    assert described["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("binary", [True, False])
def test_both_inputs_return_the_predictor_s_logits_to_the_bit(
    client: Any, predictor: Predictor, count: int, binary: bool
) -> None:
    prepared = np.stack([predictor.prepare(image) for image in IMAGES[:count]])
    expected = predictor.logits(prepared)
    asked = [triton.InferRequestedOutput("logits", binary_data=binary)]
    for tensor in (encoded(IMAGES[:count]), pixels(prepared), pixels(prepared, binary=False)):
        found = client.infer("one", [tensor], outputs=asked, request_id="seven")
        assert found.get_response()["id"] == "seven"
        np.testing.assert_array_equal(found.as_numpy("logits"), expected)
    np.testing.assert_array_equal(client.infer("one", [encoded(IMAGES[:count])]).as_numpy("logits"), expected)


def test_what_does_not_fit_is_an_error_of_the_client(client: Any, predictor: Predictor) -> None:
    height, width = predictor.size
    wrong = [
        pixels(np.zeros((1, height + 1, width, 3), np.uint8)),
        pixels(np.zeros((5, height, width, 3), np.uint8)),
        pixels(np.zeros((0, height, width, 3), np.uint8)),
        encoded([b"no image"]),
        encoded([]),
    ]
    for tensor in wrong:
        with pytest.raises(triton.InferenceServerException):
            client.infer("one", [tensor])
    with pytest.raises(triton.InferenceServerException, match="no such model"):
        client.infer("two", [encoded(IMAGES[:1])])
    with pytest.raises(triton.InferenceServerException, match="no such output"):
        client.infer("one", [encoded(IMAGES[:1])], outputs=[triton.InferRequestedOutput("boxes")])
    with pytest.raises(triton.InferenceServerException, match="Content-Encoding"):
        client.infer("one", [encoded(IMAGES[:1])], request_compression_algorithm="gzip")
    assert client.infer("one", [encoded(IMAGES[:1])]).as_numpy("logits").shape == (1, 10)


def test_a_timeout_of_the_request_is_its_deadline(client: Any, server: Running) -> None:
    with pytest.raises(triton.InferenceServerException, match="deadline"):
        client.infer("one", [encoded(IMAGES[:1])], timeout=1)
    assert client.infer("one", [encoded(IMAGES[:1])], timeout=20_000_000).as_numpy("logits").shape == (1, 10)


def changed(**values: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [0] * 12, **values}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


BROKEN: list[Any] = [
    [], {}, {"inputs": {}}, {"inputs": []}, {"inputs": [1]}, {"inputs": [{}]},
    changed(shape=[1, -2, 2, 3]), changed(shape=[1, 2, 2, 3.0]), changed(shape=[2**40] * 4), changed(shape="1"),
    changed(shape=[True, 2, 2, 3]), changed(shape=[]), changed(shape=[1] * 30), changed(datatype="FP32"),
    changed(name="../model"), changed(name="a\0b"), changed(data=None), changed(data=[[0], [0, 1]]),
    changed(data=[1e400]), changed(data=["x"]), changed(data=[-1] * 12), changed(data=[256] * 12),
    changed(parameters={"binary_data_size": 12}), changed(data=None, parameters={"binary_data_size": -1}),
    changed(data=None, parameters={"binary_data_size": 12}), changed(parameters=[]),
    {**changed(), "outputs": [{"name": "logits"}, {"name": "logits"}]}, {**changed(), "outputs": [1]},
    {**changed(), "parameters": {"timeout": -1}}, {**changed(), "parameters": {"timeout": "x"}},
    {"inputs": changed()["inputs"] * 2}, {**changed(name="encoded", datatype="BYTES", shape=[1], data=["%"])},
    changed(name="encoded", datatype="BYTES", shape=[1], data=[[[["a"]]]]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_broken_requests_are_refused_with_a_sentence(server: Running, number: int) -> None:
    reply = server.ask("POST", "/v2/models/one/infer", json.dumps(BROKEN[number]).encode())
    assert reply.code == 400, reply.body
    assert reply.json["error"]


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"{" * 100_000, None),
        (b'{"a":' * 50_000, None),
        (b"[" * 100_000, None),
        (b'{"inputs": NaN}', None),
        (b"\xff\xfe", None),
        (b"", None),
        (b"{}", "-1"),
        (b"{}", "3"),
        (b"{}", "0"),
        (b"{}", "1e1"),
        (b"{}", "9" * 5000),
        (b"{}\0\0\0", "2"),
    ],
)
def test_deep_cut_off_and_mismeasured_json_is_refused(server: Running, body: bytes, length: str | None) -> None:
    headers = {"Inference_Header_Content_Length": length} if length else {}
    assert server.ask("POST", "/v2/models/one/infer", body, **headers).code == 400


@pytest.mark.parametrize("raw", [b"\1", b"\xff\xff\xff\xff", b"\5\0\0\0abc", b"\0\0\0\0" * 2, b""])
def test_broken_byte_strings_are_refused(server: Running, raw: bytes) -> None:
    tensor = {"name": "encoded", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    reply = server.ask("POST", "/v2/models/one/infer", head + raw, Inference_Header_Content_Length=str(len(head)))
    assert reply.code == 400

"""LitServe with the same bundle and the same Predictor, as benchmarks/serve.py starts it beside `leanvit serve`.

.venv/bin/python benchmarks/serve_litserve.py BUNDLE PORT THREADS MAX_BATCH
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np

from leanvit.runtime.predictor import Predictor


class Served(litserve.LitAPI):  # type: ignore[misc]
    """Decodes in its own step and runs batches of what came within two milliseconds, as its guide shows."""

    def __init__(self, bundle: str, threads: int, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=0.002)
        self.bundle, self.threads = bundle, threads

    def setup(self, device: str) -> None:
        """Load the bundle in the worker."""
        self.predictor = Predictor(self.bundle, threads=self.threads)

    def decode_request(self, request):  # LitServe reads annotations as FastAPI does
        """From a form's file to prepared pixels."""
        return self.predictor.prepare(request["image"].file.read())

    def batch(self, inputs: Any) -> Any:
        """(N, H, W, 3) uint8."""
        return np.stack(inputs)

    def predict(self, images: Any) -> Any:
        """(N, classes) probabilities."""
        return self.predictor.probabilities(images)

    def unbatch(self, output: Any) -> Any:
        """One row a request."""
        return list(output)

    def encode_response(self, output: Any) -> Any:
        """The five most probable labels."""
        best = np.argsort(-output)[:5]
        return {"predictions": [[self.predictor.labels[i], float(output[i])] for i in best]}


if __name__ == "__main__":
    bundle, port, threads, max_batch = sys.argv[1], *map(int, sys.argv[2:5])
    server = litserve.LitServer(Served(bundle, threads, max_batch), accelerator="cpu", timeout=30)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)

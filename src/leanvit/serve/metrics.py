"""What Prometheus is told: requests, refusals, batches, seconds of each stage, queues, and which bundle is served."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus-client: where several processes put their numbers, so that one tells all."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REASONS = ("queue", "memory", "deadline", "token")
"""Words of refusals that alerts look at; any other refusal is counted under its code."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one process; with several processes `text` is the sum over all."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("leanvit_requests", "Requests answered.", ["route", "model", "code"], registry=own)
        self.refused = Counter("leanvit_refused", "Requests that were refused.", ["reason"], registry=own)
        # A counter that appears with its first event has no increase, so an alert would miss that one.
        for reason in REASONS:
            self.refused.labels(reason)
        self.dropped = Counter(
            "leanvit_dropped", "Requests dropped before the network ran.", ["model", "reason"], registry=own
        )
        self.seconds = Histogram(
            "leanvit_seconds", "Seconds of each stage of a request.", ["model", "stage"], buckets=SECONDS, registry=own
        )
        self.batch = Histogram("leanvit_batch_images", "Images a batch.", ["model"], buckets=BATCHES, registry=own)
        self.pending = Gauge(
            "leanvit_pending", "Requests taken and not yet answered.", ["model"], multiprocess_mode="livesum",
            registry=own,
        )  # fmt: skip
        self.swaps = Counter(
            "leanvit_swaps", "Bundles that were replaced, or kept.", ["model", "outcome"], registry=own
        )
        self.serving = Gauge(
            "leanvit_model_info", "1 for the bundle that is served.", ["model", "bundle", "task", "runtime"],
            multiprocess_mode="livemax", registry=own,
        )  # fmt: skip

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        if os.environ.get(FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self.registry)

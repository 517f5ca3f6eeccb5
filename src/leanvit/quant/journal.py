"""The journal of a search: every evaluated plan and its loss, on disk at once, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from leanvit.config import MPTQConfig
from leanvit.quant.graph import QuantGraph
from leanvit.quant.plan import Plan


class Journal:
    """Losses by plan, kept in a file line by line."""

    def __init__(self, path: str | Path | None, graph: QuantGraph, images: Tensor, config: MPTQConfig) -> None:
        """Read what the file holds of the same network, images and scheme."""
        self.path = Path(path) if path else None
        shape = {name: site.weight_shape for name, site in graph.sites.items()}
        weights = sum(float(p.double().abs().sum()) for p in graph.module.parameters())
        scheme = [config.scope, config.mode, sorted(config.active_passes), config.range_search, config.ratio_search]
        facts = [scheme, config.two_region, config.first_last_bits, shape, float(images.double().sum()), weights]
        self.run = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.losses: dict[str, float] = {}
        if self.path and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return  # the last line of a killed search may be cut
        if entry.get("run") == self.run:
            self.losses[entry["plan"]] = entry["loss"]

    def key(self, plan: Plan) -> str:
        """Short name of a plan."""
        return hashlib.sha256(json.dumps(sorted(plan.items())).encode()).hexdigest()[:24]

    def add(self, key: str, loss: float) -> None:
        """Remember one loss, at once on disk."""
        self.losses[key] = loss
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self.run, "plan": key, "loss": loss}) + "\n")

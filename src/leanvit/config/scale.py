"""What a verb is told of Ray: where it runs, and how much of it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from leanvit.config.base import option
from leanvit.errors import ConfigError

LOCAL = "local"
"""As an address: a cluster of this machine alone, started for the command."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Options of a verb that can run on Ray (extra `ray`)."""

    ray: str | None = option(
        None, 'Run on Ray: "local" starts it on this machine, HOST:PORT or "auto" joins a cluster that runs.'
    )
    ray_workers: int | None = option(None, "Processes at work on Ray; default: as many as it has room for.")

    def __post_init__(self) -> None:
        if self.ray_workers is not None and self.ray is None:
            raise ConfigError(f"ray_workers is {self.ray_workers} without ray. Give --ray local or an address.")
        if self.ray_workers is not None and self.ray_workers < 1:
            raise ConfigError(f"ray_workers is {self.ray_workers}, expected at least 1")

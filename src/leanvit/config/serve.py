"""Configuration of the HTTP service."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from leanvit.config.base import option, require_at_least
from leanvit.config.commands import RuntimeChoice
from leanvit.config.scale import RayOptions
from leanvit.errors import ConfigError

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RayOptions):
    """Serve bundles over HTTP: images in, JSON or drawn pictures out; docs/serve.md has the routes."""

    bundles: list[str] = option(
        [], "Bundle folders, each FOLDER or NAME=FOLDER; without a name that of the folder.", positional=True
    )
    host: str = option("127.0.0.1", "Address to listen on; one that others can reach wants --token-file or --no-auth.")
    port: int = option(8000, "Port; 0: a free one, which the first line of the log names.")
    token_file: str | None = option(None, "File with the token that requests must bring (Authorization: Bearer TOKEN).")
    auth: bool = option(True, "Want a token where others can reach the server; --no-auth: serve whoever asks.")
    workers: int = option(1, "Processes that share the port; each loads every bundle and has queues of its own.")
    threads: int = option(0, "Threads of the runtime, a model and process; 0: all cores.")
    runtime: RuntimeChoice = option(
        "onnxruntime", "What runs the bundles; auto: the fastest that the gate has proved, measured and remembered."
    )
    max_queue: int = option(64, "Requests a model that are taken at a time; others are told to come again (429).")
    max_batch: int = option(16, "Images a step of the network: what came while it was at the step before.")
    max_body: int = option(16 * MEBIBYTE, "Largest body of a request in bytes.")
    max_pixels: int = option(50_000_000, "Largest picture in pixels.")
    max_connections: int = option(256, "Connections at a time; what comes beyond is refused (429).")
    timeout: float = option(
        30.0, "Seconds in which a request must have arrived; an idle connection is closed after as many."
    )
    drain: float = option(
        1.0, "Seconds after SIGTERM in which requests are still taken, while /v2/health/ready says 503."
    )
    watch: float = option(2.0, "Seconds between looks whether a bundle folder was replaced; 0: only at SIGHUP.")
    access_log: bool = option(True, "A JSON line a request on standard output.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "workers", "max_queue", "max_batch", "max_body", "max_pixels", "max_connections")
        require_at_least(self, 0, "threads", "drain", "watch", "port")
        if self.timeout < 0.1:
            raise ConfigError(f"timeout is {self.timeout}, expected at least 0.1")
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}, expected 0 to 65535")

    @property
    def is_public(self) -> bool:
        """Whether the address can be reached from other machines."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True

"""Configuration of the page that runs a bundle in a browser."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from leanvit.config.base import option
from leanvit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """Write a folder that runs a bundle in the browser: static files for any web server."""

    bundle: str = option(MISSING, "Bundle folder, of any task.", positional=True)
    output: str = option(MISSING, "Folder to write; one of this verb is replaced.", positional=True)
    float_bundle: str | None = option(
        None, "Float bundle of the same network, whose milliseconds the page shows beside.", flag="--float"
    )
    onnxruntime_web: str | None = option(
        None, "Folder or .tgz of onnxruntime-web in the version that the page takes; default: npm pack downloads it."
    )
    serve: bool = option(False, "Then serve the folder on this machine, with the headers that permit threads.")
    port: int = option(8000, "Port of --serve; 0: a free one.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}, expected 0 to 65535")

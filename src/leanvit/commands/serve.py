"""leanvit serve: bundles over HTTP. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.ServeConfig) -> int:
    """Load and check every bundle, then answer until a signal ends it."""
    if config.ray is not None:
        from leanvit.scale import serve as remote

        remote.serve(config)
        return errors.EXIT_OK
    from leanvit.serve.start import serve

    serve(config)
    return errors.EXIT_OK

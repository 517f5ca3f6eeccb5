"""Where `leanvit serve` begins: in one process or in several."""

from __future__ import annotations

from leanvit.config import ServeConfig
from leanvit.errors import require
from leanvit.serve.limits import read_token
from leanvit.serve.run import listen, run
from leanvit.serve.workers import serve_by_many


def serve(config: ServeConfig) -> None:
    """Load every bundle, check it, and answer requests until a signal ends it, which is raised again at the end.

    Raises what Predictor raises for a bundle, ConfigError for an address or token that does not do,
    EnvironmentProblem where the port is taken.
    """
    token = read_token(config)
    require("python_multipart")
    if config.workers > 1:
        serve_by_many(config)
    else:
        run(config, token, listen(config, reuse=False))

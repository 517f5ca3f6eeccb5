"""leanvit web: a static folder that runs a bundle in the browser. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.WebConfig) -> int:
    """Write the folder, and serve it where that is asked for."""
    from leanvit.config import save_yaml
    from leanvit.web.site import write_site

    site = write_site(
        config.bundle, config.output, float_bundle=config.float_bundle, onnxruntime_web=config.onnxruntime_web
    )
    output = Path(config.output)
    save_yaml(config, output.with_name(f"{output.name}.config.yaml"))
    if site.rewritten:
        print(f"{site.rewritten} golden images rewritten as PNG: browsers don't read them as leanvit does")
    print(f"page {site.folder}: {site.bytes / 1e6:.1f} MB, for any web server (https, or localhost)")
    if config.serve:
        _serve(config)
    else:
        print("next: the same command with --serve, then open the address that it prints")
    return errors.EXIT_OK


def _serve(config: configs.WebConfig) -> None:
    """Until it is interrupted."""
    from leanvit.web.serving import address, open_server

    with open_server(config.output, config.port) as server:
        print(f"serving {address(server)} (ctrl-C ends it)", flush=True)
        server.serve_forever()

"""Ask a running `leanvit serve` about pictures, as a patient client does: busy answers say when to come again.

    leanvit serve runs/bundle &
    python examples/serving_client.py http://127.0.0.1:8000 NAME IMAGE...

NAME: of the bundle, as `/v1/models` lists it. The standard library is all that is needed.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BUSY = (429, 503)
TRIES = 5


def predict(address: str, name: str, image: bytes) -> Any:
    """The service's answer; waits as long as a busy one says. Raises HTTPError for any other refusal."""
    request = urllib.request.Request(f"{address}/v1/models/{name}:predict", data=image)
    tries = 0
    while True:
        tries += 1
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or tries == TRIES:
                raise
            time.sleep(float(error.headers.get("Retry-After", "1")))


def main(address: str, name: str, *images: str) -> None:
    """A line for each picture."""
    for image in images:
        print(f"{image}: {json.dumps(predict(address, name, Path(image).read_bytes()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is asked of the network, and when: only what a spec names on a hub, and only where the hub answers."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from leanvit.errors import CheckpointError

PROBE_SECONDS = 3.0
"""How long an answer is waited for: huggingface_hub itself tries for 50 seconds before it looks into its cache."""


def answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether anything answers at `url` within so many seconds; looked for in a thread, as name servers can hang."""
    found: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError):
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found and found[0])


def require_reachable(address: str, spec: str) -> None:
    """Raise CheckpointError where weights are neither in torch's cache nor at an address that answers."""
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
    if not cached.is_file() and not answers(address):
        raise CheckpointError(
            f"{spec}: its weights are at {address}, which does not answer. Bring that file to this machine as {cached}"
        )


@contextlib.contextmanager
def cache_where_offline() -> Iterator[bool]:
    """Let huggingface_hub look into its cache only, where the hub does not answer; yields whether it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield False
        return
    online = answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = False


def how_to_bring(repository: str) -> str:
    """What to do where a repository of the hub can't be reached."""
    return (
        f"On a machine that reaches it: hf download {repository} --local-dir FOLDER; bring FOLDER here and give "
        "local-dir:FOLDER, or copy that machine's Hugging Face cache (HF_HOME)."
    )

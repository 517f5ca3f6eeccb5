"""Tests on Ray: skipped where the extra is missing; a cluster of two CPUs that listens on this machine alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from leanvit.config.scale import LOCAL
from leanvit.errors import is_installed
from leanvit.scale.cluster import connected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs a cluster, and skip it with the reason where Ray is missing."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
            if not is_installed("ray"):
                item.add_marker(pytest.mark.skip(reason='ray is missing: pip install "leanvit[ray]"'))


@pytest.fixture(scope="module")
def cluster() -> Iterator[ModuleType]:
    """The module `ray`, connected to a cluster that ends with the module."""
    with connected(LOCAL, cpus=2) as ray:
        yield ray

"""The gate on preprocessing: which Pillow made the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL
import pytest

from leanvit.config import from_dict
from leanvit.export.gate.verify import verify_bundle
from leanvit.files import read_json
from leanvit.runtime.bundle import Manifest, sign

HERE = int(PIL.__version__.partition(".")[0])


def made_with(bundle: Path, version: str | None) -> list[dict[str, Any]]:
    """The gate's checks of a bundle that says so of Pillow."""
    values = read_json(bundle / "bundle.json")
    versions = {key: value for key, value in values["versions"].items() if key != "pillow"}
    values["versions"] = versions | ({"pillow": version} if version else {})
    sign(bundle, from_dict(Manifest, values))
    result = verify_bundle(bundle)
    assert result["passed"]
    rows: list[dict[str, Any]] = result["checks"]
    return rows


@pytest.mark.parametrize("other", [HERE - 1, HERE + 1])
def test_another_pillow_is_named_and_rejects_nothing(bundle: Path, other: int) -> None:
    (row,) = [row for row in made_with(bundle, f"{other}.3.0") if row["name"] == "Pillow"]
    assert row["passed"] is None
    assert f"made with Pillow {other}.3.0, here {PIL.__version__}" in row["found"]
    assert f'pip install "pillow=={other}.3.0"' in row["hint"]


@pytest.mark.parametrize("version", [f"{HERE}.9.9", None])
def test_the_same_pillow_or_an_unknown_one_is_no_check(bundle: Path, version: str | None) -> None:
    assert "Pillow" not in [row["name"] for row in made_with(bundle, version)]

"""Weights of other networks are refused by each family of the papers' authors, whatever their shapes are."""

from __future__ import annotations

import pytest
import timm

from leanvit.errors import LeanvitError
from leanvit.models._convert import FAMILIES, from_official


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_weights_of_other_networks_are_refused(family: str, name: str) -> None:
    weights = timm.create_model(name, num_classes=2).state_dict()
    with pytest.raises(LeanvitError):
        from_official(family, weights)

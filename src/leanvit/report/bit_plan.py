"""The bit plan of a network as a grid: a column is a block, a row a site inside it, a cell its two numbers of bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.html import BitCell

MANY_BLOCKS = 10
"""More blocks than these get thin cells and a line of their own: two grids side by side would scroll."""


def split_sites(order: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(block, role) of every site, such as ('blocks.3', 'attn.qkv'), so that the grid of both is smallest.

    Sites that lie in no numbered block have the block ''.
    """

    def split(name: str, depth: int) -> tuple[str, str]:
        parts = name.split(".")
        numbered = [i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()][:depth]
        cut = numbered[-1] if numbered else 0
        return ".".join(parts[:cut]), ".".join(parts[cut:])

    candidates = [{name: split(name, depth) for name in order} for depth in (4, 3, 2, 1)]
    return min(candidates, key=lambda c: len({b for b, _ in c.values()}) * len({r for _, r in c.values()}))


def bit_grid(title: str, order: Sequence[str], plan: Mapping[str, tuple[int, int]]) -> Markup:
    """A table, role by block, of (weight bits, activation bits); sites of `order` outside `plan` show F for float."""
    places = split_sites(order)
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    at = {place: site for site, place in places.items()}
    spans: list[tuple[str, int]] = []
    for block in blocks:
        prefix = re.sub(r"\.?\d+$", "", block) if block else "other"
        count = spans.pop()[1] if spans and spans[-1][0] == prefix else 0
        spans.append((prefix, count + 1))
    rows = [
        (role, [_cell(at.get((block, role)), plan) for block in blocks])
        for role in dict.fromkeys(role for _, role in places.values())
    ]
    columns = [block.rpartition(".")[2] for block in blocks]
    return html.bit_grid(title, spans, columns, rows, many=len(blocks) > MANY_BLOCKS)


def _cell(site: str | None, plan: Mapping[str, tuple[int, int]]) -> BitCell | None:
    if site is None:
        return None
    if site not in plan:
        return BitCell(f"{site}: float", None, None)
    weights, activations = plan[site]
    return BitCell(f"{site}: weights {weights}, activations {activations} bits", weights, activations)

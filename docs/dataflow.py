"""Draw a module as the graph that torch.export makes of it: operators, shapes, and what flows between them."""

from __future__ import annotations

from typing import Any

import torch
from drawing import EDGES, FAINT, arrow, box, picture, text
from markupsafe import Markup
from torch import nn
from torch.fx import Node

SEEN_THROUGH = {
    "reshape", "view", "permute", "unbind", "getitem", "transpose", "flatten", "dropout", "contiguous", "clone", "to",
}  # fmt: skip
"""Operators that only move numbers: arrows go through them."""

KINDS = {"linear": "conv", "matmul": "attention", "softmax": "attention", "placeholder": "plain"}
COLUMNS = {"x": 0, "alpha": 1, "previous": 3}
"""Arguments that are drawn, and where; others have no part in the graph."""

BOX, HEIGHT, ROW, COLUMN, LEFT, TOP = 170, 46, 78, 190, 90, 20


def operator(node: Node) -> str:
    """Name of the operator of a node, without overloads: "softmax"."""
    if node.op != "call_function":
        return node.op
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def sources(node: Node, names: tuple[str, ...]) -> list[tuple[Node, str]]:
    """Drawn nodes that a node reads, each with the name of the part that it takes, from the argument on down."""
    found = []
    for argument in node.all_input_nodes:
        part, at = "", argument
        while operator(at) in SEEN_THROUGH:
            # Parts of the packed result of a linear layer.
            if operator(at) == "getitem":
                part = names[int(at.args[1])]  # type: ignore[call-overload]
            at = at.all_input_nodes[0]
        if at.target in COLUMNS or at.op == "call_function":
            found.append((at, part))
    return found


def places(nodes: list[Node], names: tuple[str, ...]) -> dict[Node, tuple[int, int]]:
    """(row, column) of every node: below all that it reads, in the column of the first, or the next one free."""
    placed: dict[Node, tuple[int, int]] = {}
    for node in nodes:
        read = [placed[source] for source, _ in sources(node, names)]
        row = 1 + max((r for r, _ in read), default=-1)
        column = read[0][1] if read else COLUMNS[str(node.target)]
        while (row, column) in placed.values():
            column += 1
        placed[node] = (row, column)
    return placed


def corner(place: tuple[int, int]) -> tuple[float, float]:
    """Top left corner of a box."""
    return LEFT + place[1] * COLUMN, TOP + place[0] * ROW


def edge(start: tuple[int, int], end: tuple[int, int], part: str, lane: int, entry: int) -> list[Markup]:
    """An arrow between two boxes: straight down, past boxes at the left, down and across, or across and down."""
    (x1, y1), (x2, y2) = corner(start), corner(end)
    middle = x1 + BOX / 2
    if start[1] < end[1]:
        y = y1 + HEIGHT / 2
        return [arrow((x1 + BOX, y), (x2 + BOX / 2, y), (x2 + BOX / 2, y2), colour=EDGES["carried"])]
    if start[1] > end[1]:
        y = y2 + HEIGHT / 2 + entry
        return [arrow((middle, y1 + HEIGHT), (middle, y), (x2 + BOX, y), colour=EDGES["carried"])]
    if end[0] == start[0] + 1:
        words = text(middle + 8, y1 + HEIGHT + 20, part, anchor="start", fill=FAINT)
        return [arrow((middle, y1 + HEIGHT), (middle, y2)), words]
    rail, y = x1 - 22 * lane, y2 + HEIGHT / 2
    line = arrow((x1, y1 + HEIGHT / 2), (rail, y1 + HEIGHT / 2), (rail, y), (x2, y))
    return [line, text(x2 - 8, y - 6, part, anchor="end", fill=FAINT)]


def leaving(place: tuple[int, int], name: str) -> list[Markup]:
    """An arrow out of the graph, from the lower right of a box."""
    x, y = corner(place)
    x, y = x + BOX - 24, y + HEIGHT
    line = arrow((x, y), (x, y + 16), (x + 60, y + 16), colour=EDGES["carried"])
    return [line, text(x + 66, y + 20, name, anchor="start")]


def dataflow(
    title: str, module: nn.Module, arguments: tuple[Any, ...], names: tuple[str, ...], results: tuple[str, ...]
) -> str:
    """The exported graph of `module` run on `arguments`.

    names: of the parts of a packed linear layer; results: of what comes out, in order.
    """
    graph = torch.export.export(module.eval(), arguments).graph
    nodes = [
        node
        for node in graph.nodes
        if node.target in COLUMNS or (node.op == "call_function" and operator(node) not in SEEN_THROUGH)
    ]
    placed = places(nodes, names)
    parts: list[Markup] = []
    lane = 0
    for node, place in placed.items():
        across = [source for source, _ in sources(node, names) if placed[source][1] > place[1]]
        for source, part in sources(node, names):
            lane += placed[source][1] == place[1] and place[0] > placed[source][0] + 1
            entry = 12 * across.index(source) - 6 * (len(across) - 1) if source in across else 0
            parts += edge(placed[source], place, part, lane, entry)
    for name, (source, _) in zip(results, sources(graph.output_node(), names), strict=True):
        parts += leaving(placed[source], name)
    parts += [box(*corner(place), BOX, HEIGHT, *describe(node)) for node, place in placed.items()]
    rows, columns = (1 + max(place[axis] for place in placed.values()) for axis in (0, 1))
    return picture(title, TOP + rows * ROW, parts, LEFT + columns * COLUMN)


def describe(node: Node) -> tuple[str, list[str]]:
    """Kind of box and lines in it: operator with its constants, or the argument's name, and the shape."""
    numbers = [f"{argument:.3g}" for argument in node.args if isinstance(argument, float)]
    name = str(node.target) if node.op == "placeholder" else " ".join([operator(node), *numbers])
    return KINDS.get(operator(node), "carried"), [name, " × ".join(map(str, node.meta["val"].shape))]

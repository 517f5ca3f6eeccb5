"""einsum of two tensors as the matrix product that it is, so that it is a site like other products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from leanvit.quant.ops import aten


@dataclass(frozen=True)
class Product:
    """Letters of an einsum that is one matrix product: (batch, row, inner) times (batch, inner, column).

    left, right, output: as given. batch: in the order of the output. row, column: '' where a side has no letter of its
    own beside those of the batch. swapped: whether left is the second operand.
    """

    left: str
    right: str
    output: str
    batch: str
    row: str
    inner: str
    column: str
    swapped: bool = False


def product_of(equation: str) -> Product | None:
    """The matrix product that an equation describes; None for any other (sums, traces, several inner letters)."""
    operands, arrow, output = equation.replace(" ", "").partition("->")
    sides = operands.split(",")
    plain = all(text.isalpha() and len(set(text)) == len(text) for text in (*sides, output))
    if not arrow or len(sides) != 2 or not plain:
        return None
    return _product(sides[0], sides[1], output) or _product(sides[1], sides[0], output, swapped=True)


def _product(left: str, right: str, output: str, *, swapped: bool = False) -> Product | None:
    inner = (set(left) & set(right)) - set(output)
    columns = set(right) - set(left)
    known = set(output) | inner
    if len(inner) != 1 or len(columns) > 1 or set(left) | set(right) != known:
        return None
    rows = [letter for letter in left if letter not in right]
    row, column = (rows[-1] if rows else ""), "".join(columns)
    batch = "".join(letter for letter in output if letter not in (row, column))
    return Product(left, right, output, batch, row, inner.pop(), column, swapped)


def write_einsum_out(module: GraphModule) -> None:
    """Replace every einsum that is one matrix product by permute, matmul, permute, in place."""
    for node in list(module.graph.nodes):
        if node.target is not aten.einsum.default:
            continue
        product = product_of(str(node.args[0]))
        if product is not None:
            _write(module, node, product)
    module.recompile()


def _write(module: GraphModule, node: Node, product: Product) -> None:
    operands: Any = node.args[1]
    left, right = reversed(operands) if product.swapped else operands

    def call(target: Callable[..., Any], source: Node, *arguments: Any) -> Node:
        created = module.graph.call_function(target, (source, *arguments))
        given = [a.meta["val"] if isinstance(a, Node) else a for a in created.args]
        created.meta = {"val": target(*given), "nn_module_stack": node.meta.get("nn_module_stack", {})}
        return created

    def arranged(source: Any, letters: str, wanted: str) -> Node:
        """The operand with its letters in the order of `wanted`, and dimensions of one for those that it lacks."""
        order = [letters.index(letter) for letter in wanted if letter in letters]
        value = source if order == sorted(order) else call(aten.permute.default, source, order)
        # Leading dimensions that are missing are repeated by matmul itself, but for the last two.
        leading = min(*(wanted.index(letter) for letter in letters), len(wanted) - 2)
        for place, letter in enumerate(wanted[leading:]):
            if letter not in letters:
                value = call(aten.unsqueeze.default, value, place)
        return value

    with module.graph.inserting_before(node):
        # A space is the letter that no operand has.
        row, column = product.row or " ", product.column or " "
        value = call(
            aten.matmul.default,
            arranged(left, product.left, product.batch + row + product.inner),
            arranged(right, product.right, product.batch + product.inner + column),
        )
        letters = product.batch + row + column
        for place, letter in ((-2, row), (-1, column)):
            if letter == " ":
                value = call(aten.squeeze.dim, value, place)
        letters = letters.replace(" ", "")
        if letters != product.output:
            value = call(aten.permute.default, value, [letters.index(letter) for letter in product.output])
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)

"""Tokens told of each other by a matrix for each group of features, found among the operations of a trace.

    z[b, p, g, w] = Σ_q weight[g, p, q] x[b, q, g, w]

What people write for it is a permutation, a batched product and the permutation back: seven operations, four
of them copies of all tokens, which the function in C does as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from composable_ebm.potential.trace import Node, Value

__all__ = ["MIXING", "Mixing", "with_mixings"]

MIXING = "mixing"
AROUND = [2, 1, 0, 3]


@dataclass(eq=False)
class Mixing(Node):
    """Seven operations as one.

    Attributes:
        parts: The seven.
    """

    parts: list[Node] = field(default_factory=list)


def with_mixings(nodes: Sequence[Node]) -> list[Node]:
    """The operations with each mixing of tokens as one of them."""
    made = {node.output: node for node in nodes}
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    found = {}
    for node in nodes:
        if node.operation == "bmm" and (mixing := _mixing(node, made, readers)) is not None:
            found[mixing.parts[-1]] = mixing
    inside = {part for mixing in found.values() for part in mixing.parts}
    return [found.get(node, node) for node in nodes if node in found or node not in inside]


def _mixing(product: Node, made: dict[Value, Node], readers: dict[Value, list[Node]]) -> Mixing | None:
    weight = product.arguments["self"]
    parts = [product]
    while len(parts) < 4 and len(parts[0].inputs) == 1 and (before := made.get(parts[0].inputs[0])):
        parts.insert(0, before)
    while len(parts) < 7 and len(after := readers.get(parts[-1].output, [])) == 1:
        parts += after
    names = [node.operation for node in parts]
    expected = ["view", "permute", "reshape", "bmm", "view", "permute", "reshape"]
    if names != expected or not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        return None
    if any(len(readers[node.output]) > 1 for node in parts[:-1]):
        return None
    first, last = parts[0].inputs[0], parts[-1].output
    groups, tokens, _ = weight.shape
    if (
        len(first.shape) != 3
        or first.shape != last.shape
        or (weight.shape[2], first.shape[1]) != (tokens, tokens)
    ):
        return None
    batch, features = first.shape[0], first.shape[2]
    apart = (batch, tokens, groups, features // groups)
    shapes = [tuple(node.output.shape) for node in parts]
    turned = (groups, tokens, batch, apart[3])
    if shapes[:3] != [apart, turned, (groups, tokens, batch * apart[3])] or shapes[4:6] != [turned, apart]:
        return None
    if any(list(parts[i].arguments["dims"]) != AROUND for i in (1, 5)) or apart[3] % 16:
        return None
    return Mixing(MIXING, product.function, {"self": first, "weight": weight}, last, parts)

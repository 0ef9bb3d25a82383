"""A traced network as a list of steps that runs forward, and back to the gradient of its states.

No graph is recorded, nothing is saved but what the gradients need, and no parameter gradient is taken.
What depends on the noise level alone is computed once for each level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from composable_ebm.potential.forms.mixing import Mixing
from composable_ebm.potential.forms.native import NativeNetwork, part_for_c
from composable_ebm.potential.native.layout import Unfit
from composable_ebm.potential.operations import RULES, Pullback, Step, by_autograd
from composable_ebm.potential.packed import version_of
from composable_ebm.potential.trace import Node, Trace, Value

__all__ = ["Program"]

IN_C = "in C"


class Program:
    """x, noise level -> outputs and the function that pulls cotangents back to x.

    Args:
        trace: The network; the program serves states of the shape it was traced at.
        in_c: Whether convolutions may go to the function in C.
    Raises:
        Unreadable: If an operation does more than it gives, as what counts its states.
    """

    def __init__(self, trace: Trace, in_c: bool = True) -> None:
        nodes = trace.needed()
        self.trace, self.native = trace, _native(nodes) if in_c else None
        self._ran_in_c = False
        if self.native is not None:
            nodes = _instead(self.native, nodes)
        places = {trace.x: 0} | ({} if trace.noise_level is None else {trace.noise_level: 1})
        for node in nodes:
            places[node.output] = len(places)
        self.places, self.size = places, len(places)
        before = [node for node in nodes if not node.output.of_states]
        self.of_level = [(node, self._inputs(node), places[node.output]) for node in before]
        self.names = [node.operation for node in nodes if node.output.of_states]
        self.result = places[trace.output]
        self.steps = [
            (_chained([_step(node) for node in run]), self._inputs(run[0]), places[run[-1].output])
            for run in _runs([node for node in nodes if node.output.of_states], trace.output)
        ]
        self._at: list[Tensor] = []
        self.operations = len(self.names)
        self._level: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def path(self) -> str:
        """How the last states were evaluated, in words."""
        return "traced, its convolutions in C" if self._ran_in_c else "traced, gradients by hand"

    @cached_property
    def without_c(self) -> Program:
        """The same, step by step."""
        return Program(self.trace, in_c=False)

    def _inputs(self, node: Node) -> list[int]:
        return [self.places[value] for value in node.inputs]

    def _prepared(self, x: Tensor, noise_level: Tensor | None) -> list[Any]:
        """The values that are known before the first step: states, level and what depends on it."""
        values: list[Any] = [None] * self.size
        values[0] = x
        if noise_level is None:
            return values
        if (
            self._level is None
            or self._level[0] is not noise_level
            or self._level[1] != version_of(noise_level)
        ):
            values[1] = noise_level
            for function, inputs, place in self.of_level:
                values[place] = function(*[values[i] for i in inputs])
            self._at = [values[place] for *_, place in self.of_level]
            self._level = (noise_level, version_of(noise_level))
        values[1] = noise_level
        for (*_, place), value in zip(self.of_level, self._at, strict=True):
            values[place] = value
        return values

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if self.native is not None:
            self._ran_in_c = self.native.allowed(x.shape[0])
            if not self._ran_in_c:
                return self.without_c(x, noise_level)
        values = self._prepared(x, noise_level)
        pulls: list[tuple[Pullback, list[int], int]] = []
        for step, inputs, place in self.steps:
            values[place], pull = step(*[values[i] for i in inputs])
            pulls.append((pull, inputs, place))
        result = self.result

        def pull_back(cotangent: Tensor) -> Tensor:
            cotangents: list[Tensor | None] = [None] * self.size
            cotangents[result] = cotangent
            for pull, inputs, place in reversed(pulls):
                given = cotangents[place]
                if given is None or (found := pull(given)) is None:
                    continue
                cotangents[place] = None
                for i, part in zip(inputs, found if len(inputs) > 1 else (found,), strict=True):
                    if part is not None:
                        before = cotangents[i]
                        cotangents[i] = part if before is None else before + part
            gradient = cotangents[0]
            return torch.zeros_like(x) if gradient is None else gradient.reshape(x.shape)

        return values[result], pull_back


def _runs(nodes: Sequence[Node], result: Value) -> list[list[Node]]:
    """The operations in runs that follow each other in a line: what one gives only the next one reads."""
    readers: dict[Value, int] = {}
    for node in nodes:
        for value in node.inputs:
            readers[value] = readers.get(value, 0) + 1
    runs: list[list[Node]] = []
    for node in nodes:
        before = runs[-1][-1].output if runs else None
        only = before is not None and node.inputs == [before] and readers[before] == 1
        if only and before is not result and all(each.live for each in (*node.inputs, node.output)):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _chained(steps: Sequence[Step]) -> Step:
    """One step after another, each of what the one before it gives."""
    if len(steps) == 1:
        return steps[0]

    first, *others = steps

    def step(*inputs: Tensor) -> tuple[Tensor, Pullback]:
        x, pull = first(*inputs)
        pulls = [pull]
        for each in others:
            x, pull = each(x)
            pulls.append(pull)
        pulls.reverse()

        def pull_back(g: Any) -> Any:
            for pull in pulls:
                g = pull(g)
            return g

        return x, pull_back

    return step


def _native(nodes: Sequence[Node]) -> NativeNetwork | None:
    part = part_for_c(nodes)
    try:
        return None if part is None else NativeNetwork(part)
    except Unfit:
        return None


def _instead(native: NativeNetwork, nodes: Sequence[Node]) -> list[Node]:
    """The operations with those that C does as one of them."""
    part, inside = native.part, set(native.part.nodes)
    inside.update(each for node in part.nodes if isinstance(node, Mixing) for each in node.parts)

    def step(x: Tensor, *levels: Tensor) -> tuple[Tensor, Pullback]:
        y, pull = native(x, *levels)
        return y, (lambda g: (pull(g), *[None] * len(levels))) if levels else pull

    end = part.nodes[-1]
    end = end.parts[-1] if isinstance(end, Mixing) else end
    whole = Node(IN_C, step, {"inputs": [part.input, *part.levels]}, part.output)
    return [whole if node is end else node for node in nodes if node is end or node not in inside]


def _step(node: Node) -> Step:
    """The step of an operation: from its rule, or by autograd through it alone where its use has none."""
    if node.operation == IN_C:
        return node.function
    try:
        return RULES[node.operation](**node.arguments)
    except (KeyError, NotImplementedError, TypeError):
        return by_autograd(node) if node.output.live else lambda *inputs: (node(*inputs), _nothing)


def _nothing(cotangent: Tensor) -> None:
    """What a step without a gradient pulls back."""

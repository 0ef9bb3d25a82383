"""Networks of convolutions as one function of C: outputs and input gradient.

An image goes through all layers, and back, before the next one starts, so nothing leaves the cache.
The function (`native/convolutions.c`) is one for all networks. In a traced network `part_for_c` finds what
it can do, from one image to a few numbers; the rest stays as it is. So do large linear layers: their weights
are read once for all images there, and would be read for each here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from composable_ebm.potential.forms.mixing import MIXING, with_mixings
from composable_ebm.potential.native import Work, allowed, carry_out, parts_of, wanted
from composable_ebm.potential.native.layout import BLOCK, Image, Operation
from composable_ebm.potential.native.plan import (
    ACTIVATIONS,
    MOST_CHANNELS,
    Part,
    Plan,
    channels_of,
    of_channels,
    over_all,
)
from composable_ebm.potential.operations import Pullback
from composable_ebm.potential.trace import Node, Value

__all__ = ["NativeNetwork", "part_for_c"]

SILENT = {"view", "reshape", "_unsafe_view", "squeeze", "clone"}
MOST_OUTPUTS, MOST_PIXELS, MOST_STRIDE = 64, 4096, 4
MOST_WEIGHTS = 1 << 16
"""Of a linear layer."""


class _Network(ctypes.Structure):
    """As `Network` in convolutions.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("operations", "images", "weights")),
        *((name, ctypes.c_int) for name in ("count", "channels", "outputs", "result")),
        *((name, ctypes.c_int) for name in ("kept", "memory", "thin", "tokens")),
    )


def part_for_c(nodes: Sequence[Node]) -> Part | None:
    """The last part of a network that the function in C can do, or None."""
    if not wanted():
        return None
    nodes = with_mixings(nodes)
    made = {node.output: node for node in nodes}
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    for last in reversed(nodes):
        shape = last.output.shape
        if not 0 < len(shape) <= 3 or not _can(last):
            continue
        tokens = len(shape) == 3
        ends = last.operation in ("linear", "sum", "mean") or len(shape) == 1
        flattens = last.operation in SILENT and len(last.inputs[0].shape) == 4
        if tokens or (
            (ends or flattens) and shape.numel() <= (MOST_OUTPUTS if ends else MOST_PIXELS) * shape[0]
        ):
            inside: set[Node] = set()
            outside = _reach(last, made, inside)
            leaks = any(
                reader not in inside for node in inside if node is not last for reader in readers[node.output]
            )
            image = next(iter(outside), last.output)
            comes_in = _tokens_come_in if tokens else _images_come_in
            if len(outside) == 1 and not leaks and comes_in(image, inside):
                kept = [node for node in nodes if node in inside]
                levels = dict.fromkeys(value for node in kept for value in node.inputs if not value.live)
                return Part(image, last.output, kept, list(levels))
    return None


def _reach(last: Node, made: dict[Value, Node], inside: set[Node]) -> set[Value]:
    """Gathers what leads to an operation as far as C can do it; returns the values that come in."""
    outside, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        inside.add(node)
        for value in node.inputs:
            before = made.get(value)
            if not value.live:
                continue
            if before is None or not _can(before):
                outside.add(value)
            elif before not in inside:
                waiting.append(before)
    return outside


def _tokens_come_in(tokens: Value, inside: Iterable[Node]) -> bool:
    """Whether the function takes such tokens, in such a network: what mixes them is slow elsewhere."""
    kinds = [node.operation for node in inside]
    return len(tokens.shape) == 3 and tokens.live and MIXING in kinds and kinds.count("linear") >= 2


def _images_come_in(image: Value, inside: Iterable[Node]) -> bool:
    """Whether the function takes such images, in such a network."""
    readers = [node for node in inside if image in node.inputs]
    kinds = [node.operation for node in inside]
    if len(image.shape) != 4 or not image.live or "conv2d" not in kinds:
        return False
    if kinds.count("conv2d") + kinds.count("linear") < 2:
        return False
    if image.shape[1] >= BLOCK:
        return True
    first = readers[0]
    return len(readers) == 1 and first.operation == "conv2d" and first.arguments["stride"][0] <= MOST_STRIDE


def _can(node: Node) -> bool:
    """Whether C knows the operation, used like this."""
    arguments, inputs = node.arguments, node.inputs
    if not node.output.live or any(v.dtype != torch.float32 for v in (node.output, *inputs)):
        return False
    name, shape = node.operation, inputs[0].shape
    if name in ("mul", "add") and of_channels(node) is not None:
        return channels_of(node.output) >= BLOCK and (len(shape) == 4 or shape[-1] % BLOCK == 0)
    if len(shape) == 3:
        return _can_with_tokens(node)
    if len(shape) not in (2, 4) or len(inputs) > 2 or not all(value.live for value in inputs):
        return False
    if name == "add":
        return len(inputs) == 2 and inputs[1].shape == shape and arguments["alpha"] == 1
    if name == "cat":
        return (
            len(shape) == 4 and len(inputs) == len(arguments["tensors"]) == 2 and arguments["dim"] in (1, -3)
        )
    if len(inputs) != 1:
        return False
    known: dict[str, Callable[[], bool]] = {
        "linear": lambda: (
            len(shape) == 2 and _constant(arguments["weight"]) and arguments["weight"].numel() <= MOST_WEIGHTS
        ),
        "conv2d": lambda: _plain_convolution(arguments) and len(shape) == 4,
        "batch_norm": lambda: not arguments["training"] and arguments["running_mean"] is not None,
        "group_norm": lambda: shape[1] <= MOST_CHANNELS,
        "instance_norm": lambda: arguments["use_input_stats"] and shape[1] <= MOST_CHANNELS,
        "layer_norm": lambda: list(arguments["normalized_shape"]) == [*shape[1:]] and len(shape) == 2,
        "avg_pool2d": lambda: _windows_side_by_side(node),
        "adaptive_avg_pool2d": lambda: set(arguments["output_size"]) == {1},
        "upsample_nearest2d": lambda: _whole_factors(shape, node.output.shape),
        "pow": lambda: arguments["exponent"] == 2,
        "sum": lambda: over_all(node) is not None,
        "mean": lambda: over_all(node) is not None,
    }
    if name in known:
        return known[name]()
    if name == "elu":
        return arguments["scale"] == arguments["input_scale"] == 1
    if name in SILENT:
        to = node.output.shape
        return to == shape or (to[0] == shape[0] and len(to) <= 2 and to.numel() == shape.numel())
    return name in ACTIVATIONS


def _can_with_tokens(node: Node) -> bool:
    """The same for tokens, (batch, tokens, features)."""
    name, before, after = node.operation, node.inputs[0].shape, node.output.shape
    if before[-1] % BLOCK or after[-1] % BLOCK or not all(value.live for value in node.inputs):
        return False
    if name == "add":
        return [v.shape for v in node.inputs] == [after] * 2 and node.arguments["alpha"] == 1
    if name == "linear":
        return _constant(node.arguments["weight"])
    plain = name in ACTIVATIONS and name not in ("pow", "elu")
    return name == MIXING or (before == after and len(node.inputs) == 1 and (plain or name in SILENT))


def _constant(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.dtype == torch.float32


def _plain_convolution(arguments: dict) -> bool:
    weight, padding, stride = (arguments[name] for name in ("weight", "padding", "stride"))
    if isinstance(padding, str) or not _constant(weight):
        return False
    sides = (weight.shape[2:], padding, stride)
    once = arguments["groups"] == 1 and set(arguments["dilation"]) == {1}
    return once and all(len({*side}) == 1 for side in sides) and padding[0] < weight.shape[2]


def _whole_factors(before: Sequence[int], after: Sequence[int]) -> bool:
    return len(before) == 4 and not any(b % a for a, b in zip(before[2:], after[2:], strict=True))


def _windows_side_by_side(node: Node) -> bool:
    a = node.arguments
    same = list(a["stride"] or a["kernel_size"]) == list(a["kernel_size"])
    covered = all(
        k * out >= side
        for k, out, side in zip(
            a["kernel_size"], node.output.shape[2:], node.inputs[0].shape[2:], strict=True
        )
    )
    return same and covered and set(a["padding"]) == {0} and a["divisor_override"] is None


class NativeNetwork:
    """x -> outputs, and the function that pulls their cotangents back, of a part of a network.

    Args:
        part: What C can do, see `part_for_c`.
    """

    def __init__(self, part: Part) -> None:
        plan = Plan(part)
        self.part, self.operations = part, plan.arithmetic
        self.outputs = part.output.shape.numel() // part.output.shape[0]
        self.weights = torch.cat([block.reshape(-1) for block in plan.weights])
        self._operations = (Operation * len(plan.operations))(*plan.operations)
        self._images = (Image * len(plan.images))(*plan.images)
        self._network = _Network(
            ctypes.cast(self._operations, ctypes.c_void_p),
            ctypes.cast(self._images, ctypes.c_void_p),
            self.weights.data_ptr(),
            len(plan.operations),
            channels_of(part.input),
            self.outputs,
            plan.result,
            plan.kept,
            plan.kept + plan.rest,
            int(plan.thin),
            int(len(part.input.shape) == 3),
        )
        self._memory = torch.zeros(0, self._network.memory)
        self._kept: list[Tensor] = []
        self._varying = [(part.levels.index(value), slice(*place)) for value, *place in plan.varying]
        self._levels: tuple[Tensor, ...] = ()
        self._cotangent: Tensor | None = None
        self._is_one = False

    def allowed(self, rows: int) -> bool:
        """Whether to use it now, see `native.allowed`."""
        return allowed(float(self.operations * rows))

    def __call__(self, x: Tensor, *levels: Tensor) -> tuple[Tensor, Pullback]:
        """Outputs and pullback, where `levels` are those of the part; they are new where their values are."""
        if [*map(id, levels)] != [*map(id, self._levels)]:
            for i, place in self._varying:
                self.weights[place] = levels[i].reshape(-1)
            self._levels = levels
        x = x.contiguous()
        outputs = x.new_empty(x.shape[0], *self.part.output.shape[1:])
        if self.outputs == 1:  # cotangents only scale the gradient, so it comes with the outputs
            gradient = torch.empty_like(x)
            self._run("network_outputs", x, outputs, gradients=gradient.data_ptr())
            return outputs, lambda g: self._scaled(gradient, g)
        size = x.shape[0] * self._network.kept
        kept = self._kept.pop() if self._kept else x.new_zeros(size)
        kept = kept if len(kept) >= size else x.new_zeros(size)
        self._run("network_outputs", x, outputs, kept=kept.data_ptr())

        def pull(g: Tensor) -> Tensor:
            gradient = torch.empty_like(x)
            self._run("network_gradient", g.contiguous(), gradient, kept=kept.data_ptr())
            if not self._kept:
                self._kept.append(kept)
            return gradient

        return outputs, pull

    def _scaled(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """`gradient` times a number a state; as it is where all are 1, as for a single energy in a chain."""
        if cotangent is not self._cotangent:  # that of a weighted sum is one tensor, step after step
            self._cotangent, self._is_one = cotangent, bool((cotangent == 1).all())
        return gradient if self._is_one else gradient * cotangent.reshape(-1, *[1] * (gradient.ndim - 1))

    def _run(self, name: str, given: Tensor, into: Tensor, **more: int) -> None:
        total = given.shape[0]
        parts, size = parts_of(total), self._network.memory
        if self._memory.shape[0] < parts:
            self._memory = torch.zeros(parts, size)
        places = {"given": given.data_ptr(), "into": into.data_ptr(), "memory": self._memory.data_ptr()}
        subject = ctypes.addressof(self._network)
        carry_out(name, Work(subject, size=size, total=total, parts=parts, **places, **more))

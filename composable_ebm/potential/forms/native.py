"""Chains of convolutions and linear layers as one compiled function of C: energy and input gradient.

An image goes through all layers and back before the next one starts, so nothing leaves the cache.
The function (`native/convolutions.c`) is one for all networks. In a traced network `chain_of` finds what it
can do; the rest stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from composable_ebm.potential.native import allowed, in_parts, library, wanted
from composable_ebm.potential.trace import Node, Value

__all__ = ["Chain", "NativeNetwork", "chain_of"]

LANES = 16
ACTIVATIONS = {"silu": 1, "relu": 2}
SILENT = {"flatten", "view", "reshape", "_unsafe_view", "contiguous", "clone", "dropout", "alias"}
MOST_LAYERS = 32
MOST_STRIDE = 4  # of the first layer


@dataclass
class Layer:
    """As `Layer` in convolutions.c, field by field."""

    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride: int
    padding: int
    activation: int = 0
    forward_weight: int = 0
    backward_weight: int = 0
    bias: int = 0

    @property
    def operations(self) -> int:
        """Additions and multiplications of energy and gradient, for one image."""
        taps = self.kernel_height * self.kernel_width * self.in_channels
        return 4 * taps * self.out_channels * self.out_height * self.out_width


@dataclass
class Chain:
    """Layers of a traced network that the function in C can do.

    Attributes:
        input: The images.
        output: One number for each image.
        nodes: What leads from the one to the other.
    """

    input: Value
    output: Value
    nodes: list[Node]


def chain_of(nodes: Sequence[Node]) -> Chain | None:
    """The longest chain of layers among operations that starts at images and ends in one number each."""
    readers: dict[Value, int] = {}
    for node in nodes:
        for value in node.inputs:
            readers[value] = readers.get(value, 0) + 1
    made = {node.output: node for node in nodes}
    for last in reversed(nodes):
        if (
            last.operation != "linear"
            or not last.output.live
            or last.output.shape != (last.output.shape[0], 1)
        ):
            continue
        chain, value = [last], last.inputs[0]
        while value in made and readers[value] == 1 and _known(made[value]):
            chain.append(made[value])
            value = chain[-1].inputs[0]
        found = _trimmed(chain[::-1])
        if found:
            return Chain(found[0].inputs[0], last.output, found)
    return None


def _known(node: Node) -> bool:
    arguments = node.arguments
    if node.operation in ACTIVATIONS:
        return True
    if node.operation in SILENT:
        return node.output.shape[0] == node.inputs[0].shape[0]
    if len(node.inputs) != 1 or node.inputs[0] is not arguments.get("input"):
        return False
    if node.operation == "linear":
        return len(arguments["input"].shape) == 2
    if node.operation != "conv2d" or isinstance(arguments["padding"], str):
        return False
    kernel, stride, padding = arguments["weight"].shape[2:], arguments["stride"], arguments["padding"]
    return (
        arguments["groups"] == 1
        and set(arguments["dilation"]) == {1}
        and all(len({*each}) == 1 for each in (kernel, stride, padding))
        and padding[0] < kernel[0]
    )


def _trimmed(nodes: list[Node]) -> list[Node]:
    """From the first convolution of few channels on, or nothing if the function cannot do it."""
    first = next((i for i, node in enumerate(nodes) if node.operation == "conv2d"), len(nodes))
    nodes = nodes[first:]
    kinds = [node.operation for node in nodes if node.operation not in SILENT]
    weighted = [node for node in nodes if "weight" in node.arguments]
    convolutions = [node for node in weighted if node.operation == "conv2d"]
    if not wanted() or not convolutions or not 1 < len(weighted) <= MOST_LAYERS:
        return []
    image = nodes[0].inputs[0]
    in_order = weighted[: len(convolutions)] == convolutions
    flat = [n for n in nodes if n.operation in SILENT and len(n.output.shape) != len(n.inputs[0].shape)]
    twice = any(a in ACTIVATIONS and b in ACTIVATIONS for a, b in pairwise(kinds))
    float32 = all(node.arguments["weight"].dtype == torch.float32 for node in weighted)
    small = image.shape[1] < LANES and nodes[0].arguments["stride"][0] <= MOST_STRIDE
    fits = in_order and len(flat) == 1 and not twice and float32 and image.dtype == torch.float32 and small
    return nodes if fits else []


class NativeNetwork:
    """x -> energies and their gradient, of a chain of layers with one output.

    Args:
        chain: The layers.
    """

    def __init__(self, chain: Chain) -> None:
        shape = chain.input.shape[1:]
        plan, weights = _packed(chain.nodes, shape)
        self.operations = sum(layer.operations for layer in plan)
        self.weights = torch.cat(weights)
        self.count = len(plan)
        numbers = [number for layer in plan for number in astuple(layer)]
        self.plan = (ctypes.c_int * len(numbers))(*numbers)
        self.memory: list[Tensor] = []

    def allowed(self, rows: int) -> bool:
        """Whether to use it now, see `native.allowed`."""
        return allowed(float(self.operations * rows))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) and gradient, shape of `x`."""
        functions = library()
        x = x.contiguous()
        energy, gradient = x.new_empty(len(x)), torch.empty_like(x)
        while len(self.memory) < torch.get_num_threads():
            self.memory.append(torch.zeros(functions.working_memory(self.plan, self.count)))

        def run(part: int, first: int, count: int) -> None:
            rows = slice(first, first + count)
            tensors = (self.weights, x[rows], energy[rows], gradient[rows])
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            memory = ctypes.c_void_p(self.memory[part].data_ptr())
            functions.energy_and_gradient(self.plan, self.count, *pointers, ctypes.c_int(count), memory)

        in_parts(len(x), 4, run)
        return energy, gradient


class _Weights:
    """Weights in the layouts of convolutions.c, one after another."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.size = 0

    def keep(self, block: Tensor) -> int:
        """Adds a block, and returns its place."""
        self.blocks.append(block.reshape(-1))
        self.size += block.numel()
        return self.size - block.numel()


def _packed(nodes: Sequence[Node], shape: Sequence[int]) -> tuple[list[Layer], list[Tensor]]:
    """The layers as convolutions.c knows them, and their weights."""
    plan: list[Layer] = []
    weights = _Weights()
    image = tuple(shape)  # channels as the network counts them, height, width
    stored = image[0]  # channels as convolutions.c does
    for node in nodes:
        if node.operation in ACTIVATIONS:
            plan[-1].activation = ACTIVATIONS[node.operation]
        elif "weight" in node.arguments:
            given, bias = node.arguments["weight"].detach(), node.arguments["bias"]
            if node.operation == "linear":
                # From channels first, as flattened, to channels last, as stored.
                weight = given.unflatten(1, image).permute(0, 2, 3, 1)
                weight = _pad(weight, 3, stored).flatten(1)[:, :, None, None]
                stored, image, stride, padding = weight.shape[1], (weight.shape[1], 1, 1), 1, 0
            else:
                weight = _pad(given, 1, stored)
                stride, padding = node.arguments["stride"][0], node.arguments["padding"][0]
            outputs = -(-len(weight) // LANES) * LANES
            bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
            weight, bias = _pad(weight, 0, outputs), _pad(bias, 0, outputs)
            rows, columns = weight.shape[2:]
            high = (image[1] + 2 * padding - rows) // stride + 1
            wide = (image[2] + 2 * padding - columns) // stride + 1
            new = Layer(stored, image[1], image[2], outputs, high, wide, rows, columns, stride, padding)
            new.forward_weight = weights.keep(weight.permute(2, 3, 1, 0))
            new.backward_weight = weights.keep(
                _backward_blocks(weight, stride, padding) if plan else _by_blocks(weight, stride, padding)
            )
            new.bias = weights.keep(bias)
            plan.append(new)
            stored, image = outputs, (len(given), high, wide)
    return plan, weights.blocks


def _backward_blocks(weight: Tensor, stride: int, padding: int) -> Tensor:
    """For each place of a pixel modulo the stride, the taps that reach it, by rising output."""
    blocks = []
    for a in range(stride):
        for b in range(stride):
            taps = weight[:, :, (a + padding) % stride :: stride, (b + padding) % stride :: stride].flip(2, 3)
            blocks.append(taps.permute(2, 3, 0, 1).reshape(-1))
    return torch.cat(blocks)


def _by_blocks(weight: Tensor, stride: int, padding: int) -> Tensor:
    """(inputs, outputs, y, x, stride, stride): what an output gives to each pixel of a block of stride²
    pixels, by the output's place relative to the block, zero where it does not reach.

    Output o reads pixel stride · block + a by tap a + padding - stride · (o - block).
    """
    kernel = weight.shape[2]
    low, high = -((kernel - 1 - padding) // stride), (stride - 1 + padding) // stride
    places = torch.arange(low, high + 1)[:, None]
    taps = torch.arange(stride) + padding - stride * places  # (places, stride)
    valid = (taps >= 0) & (taps < kernel)
    taps = taps.clamp(0, kernel - 1)
    # (outputs, inputs, y, a, x, b)
    blocks = weight[:, :, taps][..., taps] * valid[:, :, None, None] * valid
    return blocks.permute(1, 0, 2, 4, 3, 5)


def _pad(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)

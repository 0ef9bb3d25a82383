"""Chains of convolutions and linear layers as one compiled function of C: energy and input gradient.

An image goes through all layers and back before the next one starts, so nothing leaves the cache.
The function (`native/convolutions.c`) is one for all networks. Where it is not to be had, or a network
has other layers, `compiled` or autograd does the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from composable_ebm.potential.native import allowed, in_parts, library, wanted

__all__ = ["NativeNetwork"]

LANES = 16
ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: 1, nn.ReLU: 2}
SILENT = (nn.Flatten, nn.Identity, nn.Dropout)
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


class NativeNetwork:
    """x -> energies and their gradient, of a chain of layers with one output.

    Args:
        layers: `nn.Conv2d`, `nn.Linear`, activations and `nn.Flatten`, as `known_layers` gives them.
        shape: (channels, height, width) of an image.
    """

    def __init__(self, layers: Sequence[nn.Module], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        plan, weights = _packed(layers, shape)
        self.operations = sum(layer.operations for layer in plan)
        self.weights = torch.cat(weights)
        self.count = len(plan)
        numbers = [number for layer in plan for number in astuple(layer)]
        self.plan = (ctypes.c_int * len(numbers))(*numbers)
        self.memory: list[Tensor] = []

    @staticmethod
    def fits(layers: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether it serves such a network and such states: images, and one output."""
        kinds = [type(layer) for layer in layers if type(layer) not in SILENT]
        weighted = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
        if not wanted() or x.ndim != 4 or not 1 < len(weighted) <= MOST_LAYERS:
            return False
        first, last = weighted[0], weighted[-1]
        convolutions = [layer for layer in weighted if isinstance(layer, nn.Conv2d)]
        return (
            set(kinds) <= {nn.Conv2d, nn.Linear, *ACTIVATIONS}
            and (kinds[0], kinds[-1]) == (nn.Conv2d, nn.Linear)
            and not any(a in ACTIVATIONS and b in ACTIVATIONS for a, b in pairwise(kinds))
            and weighted[: len(convolutions)] == convolutions
            and isinstance(first, nn.Conv2d)
            and first.in_channels == x.shape[1] < LANES
            and first.stride[0] <= MOST_STRIDE
            and isinstance(last, nn.Linear)
            and last.out_features == 1
            and sum(isinstance(layer, nn.Flatten) and layer.start_dim == 1 for layer in layers) == 1
        )

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


def _packed(layers: Sequence[nn.Module], shape: Sequence[int]) -> tuple[list[Layer], list[Tensor]]:
    """The layers as convolutions.c knows them, and their weights."""
    plan: list[Layer] = []
    weights = _Weights()
    image = tuple(shape)  # channels as the network counts them, height, width
    stored = image[0]  # channels as convolutions.c does
    for layer in layers:
        if type(layer) in ACTIVATIONS:
            plan[-1].activation = ACTIVATIONS[type(layer)]
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            if isinstance(layer, nn.Linear):
                # From channels first, as flattened, to channels last, as stored.
                weight = layer.weight.detach().unflatten(1, image).permute(0, 2, 3, 1)
                weight = _pad(weight, 3, stored).flatten(1)[:, :, None, None]
                stored, image, stride, padding = weight.shape[1], (weight.shape[1], 1, 1), 1, 0
            else:
                weight = _pad(layer.weight.detach(), 1, stored)
                stride, padding = layer.stride[0], int(layer.padding[0])
            outputs = -(-len(weight) // LANES) * LANES
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
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
            stored, image = outputs, (len(layer.weight), high, wide)
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

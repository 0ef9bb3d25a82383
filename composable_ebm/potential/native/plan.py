"""Networks of convolutions as the function in C knows them: operations, images and packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from composable_ebm.potential.native.layout import (
    ACTIVATION,
    BLOCK,
    CONCATENATION,
    CONVOLUTION,
    MIXING,
    NORMALISATION,
    POOLING,
    SCALING,
    SUM,
    UPSAMPLING,
    Image,
    Operation,
    Unfit,
    lay_out,
)
from composable_ebm.potential.operations.normalisations import affine_of
from composable_ebm.potential.operations.rule import axes_of
from composable_ebm.potential.trace import Node, Value

__all__ = ["ACTIVATIONS", "MOST_CHANNELS", "Part", "Plan", "channels_of", "of_channels", "over_all"]

IDENTITY = 0
ACTIVATIONS = {
    "silu": 1,
    "relu": 2,
    "leaky_relu": 2,
    "tanh": 3,
    "sigmoid": 4,
    "elu": 5,
    "gelu": 6,
    "pow": 8,
}
MOST_CHANNELS, MOST_IN_TILES = 1024, 256


@dataclass
class Part:
    """Operations of a traced network that the function in C can do.

    Attributes:
        input: The images.
        output: A few numbers for each, or an image of few pixels, flattened.
        nodes: What leads from the one to the other.
        levels: What they read that depends on the noise level alone.
    """

    input: Value
    output: Value
    nodes: list[Node]
    levels: list[Value] = field(default_factory=list)


def over_all(node: Node) -> str | None:
    """Whether a sum goes over the pixels, or over all of a state; None for other axes."""
    if node.arguments.get("dtype") is not None or node.arguments.get("keepdim"):
        return None
    ndim = len(node.inputs[0].shape)
    axes = set(axes_of(node.arguments.get("dim"), ndim))
    return "pixels" if axes == {2, 3} else "state" if axes == set(range(1, ndim)) else None


def of_channels(node: Node) -> Value | Tensor | None:
    """What a product or a sum does to each channel of images or tokens, or None if it does something else.

    A constant, or what depends on the noise level: one number, or one a channel.
    """
    both = [node.arguments["self"], node.arguments["other"]]
    live = [side for side in both if isinstance(side, Value) and side.live]
    if len(live) != 1 or len(live[0].shape) not in (3, 4) or node.arguments.get("alpha", 1) != 1:
        return None
    other = both[1 - both.index(live[0])]
    if isinstance(other, (int, float)):
        return torch.tensor(float(other))
    ours = isinstance(other, Tensor) or (isinstance(other, Value) and not other.of_states)
    ones, channels = [1] * (len(live[0].shape) - 3), channels_of(live[0])
    shape = tuple(other.shape) if ours else ()
    plain = [1 for side in shape if side != 1]
    place = (channels, *ones, *ones) if ones else (channels,)
    fits = not plain or (len(shape) >= len(place) and shape[-len(place) :] == place and len(plain) == 1)
    return other if ours and fits and other.dtype == torch.float32 else None


def channels_of(value: Value) -> int:
    """Channels of images (batch, channels, height, width), features of tokens (batch, tokens, features)."""
    return value.shape[1 if len(value.shape) == 4 else -1]


@dataclass
class Plan:
    """The operations and images of a part as convolutions.c knows them."""

    part: Part
    images: list[Image] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    size: int = 0  # of the weights
    kept: int = 0
    rest: int = 0
    arithmetic: int = 0
    thin: bool = False
    result: int = 0
    varying: list[tuple[Value, int, int]] = field(default_factory=list)
    """What depends on the noise level, and where it goes in the weights, from and until."""

    def __post_init__(self) -> None:
        nodes, image = self.part.nodes, self.part.input
        self.readers: dict[Value, list[Node]] = {}
        for node in nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)
        self.paddings: dict[int, int] = {}  # of the images that convolutions read
        self.real: dict[int, int] = {}  # channels of an image that are not padding
        self.producers: dict[int, Operation] = {}
        self.folded: set[Value] = set()
        self.shared: dict[int, int] = {}  # flat images, and whose place they share
        channels = channels_of(image)
        height, width = image.shape[2:] if len(image.shape) == 4 else (1, image.shape[1])
        self.thin = channels < BLOCK
        self.place = {image: self._image((height, width), channels, padded=not self.thin)}
        for node in nodes:
            self._add(node)
        for operation in self.operations:
            if operation.kind == SCALING and operation.bias < 0:
                operation.bias = self._keep(torch.zeros(self.images[operation.first].channels))
        self.result = self.place[self.part.output]
        self.kept, self.rest = lay_out(self.images, self.operations, self.paddings, self.shared)

    def _image(self, sides: Sequence[int], channels: int, padded: bool = True) -> int:
        height, width = sides
        stored = -(-channels // BLOCK) * BLOCK if padded else channels
        self.images.append(Image(height, width, stored, 0, 0, 0, 0))
        self.real[len(self.images) - 1] = channels
        return len(self.images) - 1

    def _sides(self, number: int) -> tuple[int, int]:
        return self.images[number].height, self.images[number].width

    def _operation(self, kind: int, first: int, out: int, **options: float) -> Operation:
        self.operations.append(Operation(kind=kind, first=first, out=out, **options))
        self.producers[out] = self.operations[-1]
        return self.operations[-1]

    def _keep(self, block: Tensor) -> int:
        self.weights.append(block.detach())
        self.size += block.numel()
        return self.size - block.numel()

    def _add(self, node: Node) -> None:
        read = next(value for value in node.inputs if value.live)
        name, arguments, first, shape = node.operation, node.arguments, self.place[read], read.shape
        if name == "conv2d":
            out = self._convolution(first, arguments["weight"], arguments["bias"], arguments, node.output)
        elif name == "linear" and len(shape) == 3:
            weight = arguments["weight"].detach()[:, :, None, None]
            out = self._weighted(first, weight, arguments["bias"], 1, 0, self._sides(first))
        elif name == "mixing":
            out = self._mixing(first, arguments["weight"].detach())
        elif name == "linear":
            out = self._linear(first, arguments["weight"], arguments["bias"])
        elif name == "batch_norm":
            out = self._batch_norm(first, node)
        elif name in ("group_norm", "instance_norm", "layer_norm"):
            count = {"group_norm": arguments.get("num_groups"), "instance_norm": shape[1], "layer_norm": 1}[
                name
            ]
            out = self._normalisation(first, arguments, count or 1)
        elif name in ("avg_pool2d", "adaptive_avg_pool2d"):
            kernel = arguments.get("kernel_size") or list(shape[2:])
            out = self._pooling(first, kernel, node.output.shape[2:], 0.0)
        elif name in ("sum", "mean"):
            out = self._reduction(first, node)
        elif name in ("mul", "add") and (given := of_channels(node)) is not None:
            out = self._scaling(first, name, given, len(self.readers[read]) == 1)
        elif name == "add":
            other = self.place[node.inputs[1]]
            sizes = [(self._sides(i), self.real[i]) for i in (first, other)]
            if sizes[0] != sizes[1]:
                raise Unfit
            out = self._image(*sizes[0])
            self._operation(SUM, first, out, second=other)
        elif name == "cat":
            out = self._concatenation([self.place[value] for value in node.inputs])
        elif name == "upsample_nearest2d":
            sides = node.output.shape[2:]
            rows, columns = (after // before for after, before in zip(sides, shape[2:], strict=True))
            out = self._image((sides[0], sides[1]), self.real[first])
            self._operation(UPSAMPLING, first, out, kernel_height=rows, kernel_width=columns)
        elif name in ACTIVATIONS:
            number = {"leaky_relu": "negative_slope", "elu": "alpha"}.get(name)
            by_tanh = arguments.get("approximate") == "tanh"  # the next one
            out = self._activation(first, ACTIVATIONS[name] + by_tanh, arguments[number] if number else 0.0)
        else:  # a flattened image is one still, until a linear layer reads it
            out = first
        self.place[node.output] = out

    def _activation(self, first: int, function: int, number: float = 0.0) -> int:
        out = self._image(self._sides(first), self.real[first])
        self._operation(ACTIVATION, first, out, function=function, number=number)
        return out

    def _flat(self, first: int) -> int:
        """An image as one pixel of many channels, in the same place."""
        image = self.images[first]
        if image.height == image.width == 1:
            return first
        copied = self._activation(first, IDENTITY) if self._needs_borders(first) else first
        flat = self._image((1, 1), image.height * image.width * image.channels)
        self.shared[flat] = copied
        return flat

    def _needs_borders(self, image: int) -> bool:
        """Whether zeros stand around it: convolutions read it, or it comes from one, or comes in."""
        producer = self.producers.get(image)
        values = [value for value, place in self.place.items() if place == image]
        read = any(node.operation == "conv2d" for value in values for node in self.readers.get(value, []))
        return producer is None or producer.kind == CONVOLUTION or read

    def _weighted(
        self, first: int, weight: Tensor, bias: Tensor | None, stride: int, padding: int, sides: Sequence[int]
    ) -> int:
        """A convolution with a weight whose input channels are those stored."""
        thin = self.thin and first == 0
        out = self._image(sides, len(weight))
        outputs = self.images[out].channels
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        weight, bias = _pad(weight, 0, outputs), _pad(bias, 0, outputs)
        rows, columns = weight.shape[2:]
        sides = [*self._sides(first), *sides]
        by_tiles = not thin and stride == 1 and _gain_by_tiles(weight, sides)
        if by_tiles:
            there, back = _tiles(weight), _tiles(weight.transpose(0, 1).flip(2, 3))
        else:
            there = weight.permute(2, 3, 1, 0)
            back = _by_blocks(weight, stride, padding) if thin else _backward_blocks(weight, stride, padding)
        self._operation(
            CONVOLUTION,
            first,
            out,
            kernel_height=rows,
            kernel_width=columns,
            stride=stride,
            padding=padding,
            weight=self._keep(there),
            backward_weight=self._keep(back),
            bias=self._keep(bias),
            by_tiles=int(by_tiles),
            thin=int(thin),
        )
        self.paddings[first] = max(self.paddings.get(first, 0), padding)
        self.arithmetic += 4 * weight[0].numel() * self.real[out] * sides[-2] * sides[-1]
        return out

    def _convolution(
        self, first: int, weight: Tensor, bias: Tensor | None, arguments: dict, output: Value
    ) -> int:
        weight = weight.detach()
        readers = self.readers.get(output, [])
        if len(readers) == 1 and readers[0].operation == "batch_norm":
            a = readers[0].arguments
            scale, shift = affine_of(
                *(a[k] for k in ("weight", "bias", "running_mean", "running_var", "eps"))
            )
            weight = weight * scale.detach()[:, None, None, None]
            bias = shift if bias is None else shift + bias * scale
            self.folded.add(output)
        stored = self.images[first].channels
        sides, stride = output.shape[2:], arguments["stride"][0]
        return self._weighted(first, _pad(weight, 1, stored), bias, stride, arguments["padding"][0], sides)

    def _linear(self, first: int, weight: Tensor, bias: Tensor | None) -> int:
        """From channels first, as flattened, to channels last, as stored."""
        image, channels = self.images[first], self.real[first]
        weight = weight.detach().unflatten(1, (channels, image.height, image.width)).permute(0, 2, 3, 1)
        weight = _pad(weight, 3, image.channels).flatten(1)[:, :, None, None]
        return self._weighted(self._flat(first), weight, bias, 1, 0, (1, 1))

    def _batch_norm(self, first: int, node: Node) -> int:
        if node.inputs[0] in self.folded:
            return first
        a = node.arguments
        scale, shift = affine_of(*(a[k] for k in ("weight", "bias", "running_mean", "running_var", "eps")))
        image = self.images[first]
        weight = _pad(torch.diag(scale.detach()), 1, image.channels)[:, :, None, None]
        return self._weighted(first, weight, shift, 1, 0, (image.height, image.width))

    def _normalisation(self, first: int, arguments: dict, groups: int) -> int:
        image, real = self.images[first], self.real[first]
        weight, bias = arguments["weight"], arguments["bias"]
        if (weight is not None and len(weight) != real) or real > MOST_CHANNELS:
            raise Unfit
        weight = torch.ones(real) if weight is None else weight
        bias = torch.zeros(real) if bias is None else bias
        out = self._image((image.height, image.width), real)
        self._operation(
            NORMALISATION,
            first,
            out,
            weight=self._keep(_pad(weight.detach(), 0, image.channels)),
            bias=self._keep(_pad(bias.detach(), 0, image.channels)),
            groups=groups,
            real=real,
            number=arguments["eps"],
        )
        return out

    def _scaling(self, first: int, name: str, given: Value | Tensor, alone: bool) -> int:
        image, before = self.images[first], self.producers.get(first)
        stored, real = image.channels, self.real[first]
        if name == "add" and alone and before is not None and before.kind == SCALING and before.bias < 0:
            before.bias = self._of_channels(given, real, stored)
            return first
        out = self._image((image.height, image.width), real)
        operation = self._operation(SCALING, first, out, bias=-1)
        if name == "mul":
            operation.weight = self._of_channels(given, real, stored)
        else:
            operation.weight = self._keep(torch.ones(stored))
            operation.bias = self._of_channels(given, real, stored)
        return out

    def _mixing(self, first: int, weight: Tensor) -> int:
        out = self._image(self._sides(first), self.real[first])
        self._operation(
            MIXING,
            first,
            out,
            weight=self._keep(weight.contiguous()),
            backward_weight=self._keep(weight.mT.contiguous()),
            groups=len(weight),
        )
        self.arithmetic += 4 * weight[0].numel() * self.real[out]
        return out

    def _of_channels(self, given: Value | Tensor, real: int, stored: int) -> int:
        block = torch.zeros(stored)
        if isinstance(given, Tensor):
            block[:real] = given.detach().reshape(-1)
        place = self._keep(block)
        if isinstance(given, Value):
            self.varying.append((given, place, place + real))
        return place

    def _pooling(self, first: int, kernel: Sequence[int], sides: Sequence[int], factor: float) -> int:
        out = self._image(sides, self.real[first])
        self._operation(POOLING, first, out, kernel_height=kernel[0], kernel_width=kernel[1], number=factor)
        return out

    def _concatenation(self, parts: Sequence[int]) -> int:
        if len(parts) != 2 or self.real[parts[0]] % BLOCK or self._sides(parts[0]) != self._sides(parts[1]):
            raise Unfit
        out = self._image(self._sides(parts[0]), sum(self.real[part] for part in parts))
        self._operation(CONCATENATION, parts[0], out, second=parts[1])
        return out

    def _reduction(self, first: int, node: Node) -> int:
        image, real = self.images[first], self.real[first]
        factor = 1.0 if node.operation == "sum" else 0.0
        out = first
        if (image.height, image.width) != (1, 1):
            out = self._pooling(first, (image.height, image.width), (1, 1), factor)
        if over_all(node) == "pixels":
            return out
        weight = torch.full((1, real), 1.0 if factor else 1.0 / real)
        return self._linear(out, weight, None)


def _gain_by_tiles(weight: Tensor, sides: Sequence[int]) -> bool:
    """Whether a convolution of stride 1, with channels as stored, has fewer products by tiles."""
    outputs, inputs, *kernel = weight.shape
    return kernel == [3, 3] and max(outputs, inputs) <= MOST_IN_TILES and min(sides) > 2


def _tiles(weight: Tensor) -> Tensor:
    """G g Gᵀ of each kernel, (16, inputs, outputs), for `convolve_tiles`."""
    taps = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.einsum("ay,oiyx,bx->abio", taps, weight, taps)


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

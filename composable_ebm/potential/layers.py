"""Chains of known layers in the form a CPU likes, with a hand-written input gradient.

A network that is nothing but `nn.Sequential` of the layers below (or that says so by a method
`as_layers`) is turned into steps, each with its output and its input gradient:

    strided convolution of few channels   as space to depth and a convolution of stride 1, both ways
    convolution of stride 1               input gradient as a convolution with the flipped kernel
    other convolutions                    oneDNN's own input gradient, channels last
    linear layers                         the weight kept in the layout oneDNN reads fastest

Where it fits and a C compiler is there, one compiled function does all of it, see `native`.

No graph is recorded, nothing is saved but the inputs of activations, and no parameter gradient is
taken. Weights are read again when they change in place, so networks may be trained between calls.
Anything else (other layers, hooks, other types than float32, CUDA) is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.potential.convolutions import NativeNetwork
from composable_ebm.potential.packed import PackedLinear, Watch, hooked, version_of

__all__ = ["CompiledNetwork", "known_layers"]

Pullback = Callable[[Tensor], Tensor]
Step = Callable[[Tensor], tuple[Tensor, Pullback | None]]
"""x -> the step's output, and cotangents of the output -> cotangents of x (None: the same)."""

FEW_CHANNELS = 16
"""Up to this many channels after space to depth, it is faster than the strided convolution (CPU)."""

aten = torch.ops.aten


def known_layers(network: nn.Module) -> list[nn.Module] | None:
    """The layers of a network that is a chain of layers this module knows, in order, or None."""
    layers = list(_flat(network))
    known = all(type(layer) in _STEPS and _supported(layer) for layer in layers)
    return layers if known and not hooked(network) else None


def _flat(network: nn.Module) -> Iterator[nn.Module]:
    if type(network) is nn.Sequential:
        for layer in network:
            yield from _flat(layer)
    elif "as_layers" in vars(type(network)):  # its own, not that of a class whose `forward` it overrides
        for layer in network.as_layers():  # type: ignore[operator]
            yield from _flat(layer)
    else:
        yield network


def _supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return (
            layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and isinstance(layer.padding, tuple)
            and len({*layer.kernel_size}) == len({*layer.stride}) == len({*layer.padding}) == 1
            and layer.padding[0] < layer.kernel_size[0]
        )
    if isinstance(layer, nn.Flatten):
        return layer.end_dim == -1 and layer.start_dim in (0, 1)
    if isinstance(layer, nn.Dropout):
        return not layer.training
    return True


class CompiledNetwork:
    """x -> outputs of the network and the function that pulls gradients back to x.

    Ask `applies` before each call: it also takes over weights that have changed.

    Args:
        network: Any.
    Attributes:
        path: How the last states were evaluated, in words.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._watch = Watch(network)
        self.version: tuple = ()
        self.layers: list[nn.Module] = []
        self.steps: list[Step] = []
        self.native: NativeNetwork | None = None
        self.flat = False  # whether outputs are (batch,)
        self._seen: tuple[Tensor, tuple[int, int], bool] | None = None
        self.path = ""

    def applies(self, x: Tensor) -> bool:
        """Whether it is the form for these states: float32 on a CPU, and all layers are known."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        self.refresh()
        return bool(self.layers)

    def refresh(self) -> None:
        """Takes over weights and layers that changed since the last call."""
        version = self._watch()
        if version == self.version:
            return
        self.version = version
        tensors = (*self.network.parameters(), *self.network.buffers())
        usable = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        self.layers = (known_layers(self.network) or []) if usable else []
        self.flat = any(isinstance(layer, nn.Flatten) and layer.start_dim == 0 for layer in self.layers)
        self.steps = []
        self.native = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Pullback]:
        if self.native is None or self.native.shape != x.shape[1:]:
            fits = NativeNetwork.fits(self.layers, x)
            self.native = NativeNetwork(self.layers, x.shape[1:]) if fits else None
        if self.native is not None and self.native.allowed(len(x)):
            return self._in_c(self.native, x)
        self.path = "compiled to steps with gradients by hand"
        self.steps = self.steps or [_STEPS[type(layer)](layer) for layer in self.layers]
        shape = x.shape
        pullbacks: list[Pullback] = []
        for step in self.steps:
            x, pullback = step(x)
            if pullback is not None:
                pullbacks.append(pullback)

        def pull_back(cotangent: Tensor) -> Tensor:
            for pullback in reversed(pullbacks):
                cotangent = pullback(cotangent)
            return cotangent.reshape(shape)

        return x, pull_back

    def _in_c(self, native: NativeNetwork, x: Tensor) -> tuple[Tensor, Pullback]:
        """With one output a row, cotangents only scale the gradient, so it comes with the energies."""
        self.path = "compiled to C"
        energy, gradient = native(x)

        def pull_back(cotangent: Tensor) -> Tensor:
            if self._is_one(cotangent):
                return gradient
            return gradient * cotangent.reshape(-1, *[1] * (x.ndim - 1))

        return energy if self.flat else energy[:, None], pull_back

    def _is_one(self, cotangent: Tensor) -> bool:
        """Whether it is 1 everywhere; in a run it is the same tensor at every step."""
        version = version_of(cotangent)
        if self._seen is None or self._seen[0] is not cotangent or self._seen[1] != version:
            self._seen = (cotangent, version, bool((cotangent == 1).all()))
        return self._seen[2]


def _convolution(layer: nn.Conv2d) -> Step:
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    plain = _plain_convolution(weight, bias, stride, padding)
    if stride == 1:
        return _unit_convolution(weight, bias, padding)
    if layer.in_channels * stride**2 > FEW_CHANNELS:
        return plain

    # s (o + u) + a = s o + t - padding: tap t reads place a of the block u away from the output's.
    first, last = -padding // stride, (kernel - 1 - padding) // stride
    size = last - first + 1
    blocked = weight.new_zeros(len(weight), layer.in_channels, stride, stride, size, size)
    for t in range(kernel):
        for s in range(kernel):
            (u, a), (v, b) = divmod(t - padding, stride), divmod(s - padding, stride)
            blocked[:, :, a, b, u - first, v - first] = weight[:, :, t, s]
    if first != -last:
        return plain
    inner = _unit_convolution(blocked.flatten(1, 3), bias, last)
    unshuffle = _unshuffle(stride)

    def step(x: Tensor) -> tuple[Tensor, Pullback | None]:
        # The two agree where each block of the image gives one output.
        ends = [(side, (side + 2 * padding - kernel) // stride + 1) for side in x.shape[2:]]
        if any(side != stride * outputs for side, outputs in ends):
            return plain(x)
        blocks, restore = unshuffle(x)
        out, pullback = inner(blocks)
        assert restore is not None
        assert pullback is not None
        return out, lambda cotangent: restore(pullback(cotangent))

    return step


def _unit_convolution(weight: Tensor, bias: Tensor | None, padding: int) -> Step:
    """A convolution of stride 1; its input gradient is one with the flipped kernel."""
    flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    opposite = weight.shape[-1] - 1 - padding

    def pullback(cotangent: Tensor) -> Tensor:
        return F.conv2d(cotangent, flipped, padding=opposite)

    return lambda x: (F.conv2d(_channels_last(x), weight, bias, padding=padding), pullback)


def _plain_convolution(weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Step:
    weight = weight.contiguous(memory_format=torch.channels_last)
    options = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        x = _channels_last(x)
        out = F.conv2d(x, weight, bias, stride, padding)
        return out, lambda cotangent: aten.convolution_backward(cotangent, x, weight, None, *options)[0]

    return step


def _linear(layer: nn.Linear) -> Step:
    forward = PackedLinear(layer.weight, layer.bias)
    backward = PackedLinear(layer.weight.T)
    return lambda x: (forward(x), backward)


def _unshuffle(block: int) -> Step:
    """`F.pixel_unshuffle`, whose output is channels last without a further copy."""

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        if x.ndim != 4:
            raise RuntimeError(f"needs images (batch, channels, height, width), got {tuple(x.shape)}.")
        batch, channels, height, width = x.shape
        rows, columns = height // block, width // block
        x = x.reshape(batch, channels, rows, block, columns, block).permute(0, 2, 4, 1, 3, 5)
        blocks = x.reshape(batch, rows, columns, channels * block**2).permute(0, 3, 1, 2)

        def pullback(cotangent: Tensor) -> Tensor:
            parts = cotangent.permute(0, 2, 3, 1).reshape(batch, rows, columns, channels, block, block)
            return parts.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)

        return blocks, pullback

    return step


def _average_pooling(layer: nn.AvgPool2d) -> Step:
    options = (layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad)
    kernel, stride, padding = ([size] * 2 if isinstance(size, int) else list(size) for size in options[:3])
    rest = (*options[3:], layer.divisor_override)

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        out = aten.avg_pool2d(x, kernel, stride, padding, *rest)
        return out, lambda cotangent: aten.avg_pool2d_backward(cotangent, x, kernel, stride, padding, *rest)

    return step


def _flatten(layer: nn.Flatten) -> Step:
    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        shape, channels_last = x.shape, x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)

        def pullback(cotangent: Tensor) -> Tensor:
            cotangent = cotangent.reshape(shape)
            return _channels_last(cotangent) if channels_last else cotangent

        return x.flatten(layer.start_dim), pullback

    return step


def _activation(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Step:
    """`backward` takes the cotangent, the input and the output."""

    def step(x: Tensor) -> tuple[Tensor, Pullback]:
        out = forward(x)
        return out, lambda cotangent: backward(cotangent, x, out)

    return step


def _softplus(layer: nn.Softplus) -> Step:
    options = (layer.beta, layer.threshold)
    return _activation(
        lambda x: aten.softplus(x, *options), lambda g, x, y: aten.softplus_backward(g, x, *options)
    )


def _leaky(layer: nn.LeakyReLU) -> Step:
    slope = layer.negative_slope
    return _activation(
        lambda x: F.leaky_relu(x, slope), lambda g, x, y: aten.leaky_relu_backward(g, x, slope, False)
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_STEPS: dict[type[nn.Module], Callable[..., Step]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.AvgPool2d: _average_pooling,
    nn.PixelUnshuffle: lambda layer: _unshuffle(layer.downscale_factor),
    nn.Flatten: _flatten,
    nn.Identity: lambda layer: lambda x: (x, None),
    nn.Dropout: lambda layer: lambda x: (x, None),
    nn.SiLU: lambda layer: _activation(F.silu, lambda g, x, y: aten.silu_backward(g, x)),
    nn.ReLU: lambda layer: _activation(F.relu, lambda g, x, y: aten.threshold_backward(g, y, 0)),
    nn.Tanh: lambda layer: _activation(torch.tanh, lambda g, x, y: aten.tanh_backward(g, y)),
    nn.Sigmoid: lambda layer: _activation(torch.sigmoid, lambda g, x, y: aten.sigmoid_backward(g, y)),
    nn.LeakyReLU: _leaky,
    nn.Softplus: _softplus,
}

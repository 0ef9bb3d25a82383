"""Several `DiffusedEnergy` networks in one pass in C (`native/perceptrons.c`), weights read as float16.

Stored experts have float16 weights, so a copy of half the size loses nothing, and serves both ways:
four face experts take 15 MB instead of 60, and stay in the cache from step to step. Networks with
other weights, and processors without AVX-512, are left to the operators of `diffused_pass`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from composable_ebm.potential.native import in_parts, library, wanted
from composable_ebm.potential.packed import version_of

if TYPE_CHECKING:
    from composable_ebm.experts.networks.diffused import DiffusedEnergy
    from composable_ebm.experts.networks.diffused_pass import AtLevel

__all__ = ["NativePass"]

INPUTS, OUTPUTS = 16, 64  # sizes are rounded up to multiples of these, with zeros


class Matrix(ctypes.Structure):
    """As in perceptrons.c."""

    _fields_ = (("values", ctypes.c_void_p), ("inputs", ctypes.c_int), ("outputs", ctypes.c_int))


class Network(ctypes.Structure):
    """As in perceptrons.c."""

    _fields_ = (
        *((name, Matrix) for name in ("pixels", "components", "second", "third", "heads")),
        ("value_bias", ctypes.c_void_p),
    )


class Level(ctypes.Structure):
    """As in perceptrons.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("root", "spread", "rest", "shrink", "amount", "modulation")),
        ("rows", ctypes.c_int),
    )


class Product(ctypes.Structure):
    """As in perceptrons.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in ("networks", "pixels", "components", "hidden", "values", "quadratic")
        ),
        ("axes", Matrix),
        ("network", ctypes.POINTER(Network)),
        *((name, ctypes.c_void_p) for name in ("mean", "signs", "linear_bias")),
    )


Halves = dict[str, tuple[Tensor, int]]
"""Large matrices of a network, transposed, in float16, with their number of inputs."""


class NativePass:
    """x, what depends on the noise level -> outputs (networks, batch, values) and the function that pulls
    cotangents back.

    Args:
        networks: `DiffusedEnergy` of one architecture and one skeleton.
        halves: Their matrices, see `in_half`.
        values: Number of outputs of each; those of networks with fewer are the common part alone.
    """

    def __init__(self, networks: Sequence[DiffusedEnergy], halves: Sequence[Halves], values: int) -> None:
        first = networks[0]
        self.values, self.networks = values, len(networks)
        self.kept: list[Tensor] = []  # what the structures point to
        self.hidden = _up(first.second.weight.shape[0], OUTPUTS)
        self.components = _up(len(first.axes), OUTPUTS)

        each = (Network * len(networks))()
        for entry, network, own in zip(each, networks, halves, strict=True):
            for name in ("pixels", "components", "second", "third"):
                setattr(entry, name, self._matrix(*own[name]))
            heads = [network.quadratic_head.weight, network.linear_head.weight]
            bias = torch.zeros(values)
            if network.value_head is not None:
                heads.append(network.value_head.weight)
                bias[: len(network.value_head.bias)] = network.value_head.bias.detach()
            rest = values - (0 if network.value_head is None else len(network.value_head.weight))
            heads.append(first.second.weight.new_zeros(rest, first.second.weight.shape[0]))
            entry.heads = self._matrix(*_half(torch.cat([head.detach() for head in heads])))
            entry.value_bias = self._keep(bias)
        self.product = Product(
            len(networks),
            len(first.mean),
            self.components,
            self.hidden,
            values,
            len(first.signs),
            self._matrix(*halves[0]["axes"]),
            each,
            self._keep(first.mean),
            self._keep(first.signs),
            self._keep(torch.cat([network.linear_head.bias.detach() for network in networks])),
        )
        self.memory: list[Tensor] = []

    @staticmethod
    def in_half(networks: Sequence[DiffusedEnergy]) -> list[Halves] | None:
        """The matrices of each network in float16, or None where that would change one, or weights are not
        float32 on a CPU, or C is not wanted."""
        like = networks[0].second.weight
        if not wanted() or like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        halves = [each for network in networks if (each := _packed(network)) is not None]
        return halves if len(halves) == len(networks) else None

    @staticmethod
    def operations(networks: Sequence[DiffusedEnergy]) -> int:
        """Additions and multiplications of outputs and gradient for one state, about."""
        return 4 * sum(weight.numel() for network in networks for weight in _weights(network))

    def level(self, at: AtLevel) -> Level:
        """What depends on the noise level, as C reads it; it lives as long as the structure."""
        modulation = torch.stack([t.detach() for t in at.modulation], dim=2)  # (networks, rows, 6, hidden)
        parts = [
            _widened(at.root, self.components),
            _widened(at.spread, self.components),
            at.rest,
            at.shrink,
            at.amount,
            _widened(modulation, self.hidden),
        ]
        parts = [part.contiguous() for part in parts]
        level = Level(*(part.data_ptr() for part in parts), len(at.rest))
        level.parts = parts  # keeps them
        return level

    def __call__(self, x: Tensor, level: Level) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        functions, total = library(), len(x)
        states = x.contiguous()
        size = functions.perceptron_memory(ctypes.byref(self.product), total)
        memory = self.memory.pop() if self.memory else states.new_empty(size)
        if len(memory) < size:
            memory = states.new_empty(size)
        outputs = states.new_empty(self.networks, total, self.values)

        def call(function: Callable[..., None], *tensors: Tensor) -> None:
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, memory)]

            def run(part: int, first: int, count: int) -> None:
                function(ctypes.byref(self.product), ctypes.byref(level), first, count, total, *pointers)

            in_parts(total, 4, run)

        call(functions.perceptron_outputs, states, outputs)

        def pull_back(cotangent: Tensor) -> Tensor:
            gradient = torch.empty_like(states)
            call(functions.perceptron_gradient, cotangent.contiguous(), gradient)
            return gradient

        # Used again as soon as nobody can pull back any more: fresh memory is slow to come by.
        weakref.finalize(pull_back, self.memory.append, memory)
        return outputs, pull_back

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def _matrix(self, half: Tensor, inputs: int) -> Matrix:
        return Matrix(self._keep(half), inputs, half.shape[1])


def _weights(network: DiffusedEnergy) -> Iterator[Tensor]:
    """The matrices of a network, small ones first."""
    for layer in (network.linear_head, network.value_head, network.quadratic_head, network.from_components):
        if layer is not None:
            yield layer.weight.detach()
    for layer in (network.second, network.third, network.from_pixels):
        yield layer.weight.detach()
    yield network.axes


_kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Halves | None]]
_kept = weakref.WeakKeyDictionary()


def _packed(network: DiffusedEnergy) -> Halves | None:
    """The large matrices of a network in float16, kept with it; None where that would change one.

    Sums of the weights tell changes that PyTorch does not count (through `.data`).
    """
    version = [(version_of(weight), float(weight.sum())) for weight in _weights(network)]
    if network not in _kept or _kept[network][0] != version:
        exact = all(torch.equal(weight.half().float(), weight) for weight in _weights(network))
        matrices = {
            "pixels": network.from_pixels.weight,
            "components": network.from_components.weight,
            "second": network.second.weight,
            "third": network.third.weight,
            "axes": network.axes,
        }
        halves = {name: _half(weight.detach()) for name, weight in matrices.items()} if exact else None
        _kept[network] = (version, halves)
    return _kept[network][1]


def _half(weight: Tensor) -> tuple[Tensor, int]:
    """Wᵀ in float16 with both sizes rounded up, and the number of inputs."""
    outputs, inputs = weight.shape
    half = torch.zeros(_up(inputs, INPUTS), _up(outputs, OUTPUTS), dtype=torch.float16)
    half[:inputs, :outputs] = weight.T
    return half, inputs


def _widened(tensor: Tensor, size: int) -> Tensor:
    return nn.functional.pad(tensor, (0, size - tensor.shape[-1]))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

"""Several `DiffusedEnergy` networks in one pass in C (`native/perceptrons.c`), weights read as float16.

Stored experts have float16 weights, so a copy of half the size loses nothing, and serves both ways:
four face experts take 15 MB instead of 60, and stay in the cache from step to step. What the networks
of a product have in common is computed once: the embedding of a noise level that all chains share, and
the skeleton where it is the same, as it is for experts fine-tuned from one base. Networks with other
weights, and machines without the C function, are left to the general forms.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.skeleton import REACH
from composable_ebm.potential.forms import Evaluate
from composable_ebm.potential.native import Work, allowed, carry_out, library, parts_of, wanted
from composable_ebm.potential.operations import Pullback
from composable_ebm.potential.packed import Watch, hooked, version_of

if TYPE_CHECKING:
    from composable_ebm.experts.networks.diffused import DiffusedEnergy

__all__ = ["DiffusedPass"]

TOGETHER = 32  # rows, as in perceptrons.c
INPUTS, OUTPUTS = 16, 64  # sizes are rounded up to multiples of these, with zeros
SKELETON = ("mean", "axes", "variances", "residual", "spread", "frequencies", "signs")
MODULATED = ("from_components", "second", "third")


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
    floors: tuple[Tensor, Tensor, list[Tensor]] | None = None


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


@dataclass
class AtLevel:
    """What depends on the noise level alone: one row where all chains share a level.

    Attributes:
        modulation: Gain and bias of the three layers in turn, (networks, rows, hidden) each.
        root: √(1/(variances + σ²)), (rows, components).
        rest: 1/(residual + σ²), (rows,).
        spread: root² - rest, (rows, components).
        shrink: 1/√(σ² + s²), (rows,).
        amount: r(σ), (rows,).
    """

    modulation: list[Tensor]
    root: Tensor
    rest: Tensor
    spread: Tensor
    shrink: Tensor
    amount: Tensor


class DiffusedPass:
    """A form: x, noise level -> outputs (networks, batch, values) and the function that pulls gradients back.

    The number of values is that of the network with most; outputs of the others are padded with copies of
    their common part, which nobody reads.

    Args:
        networks: `DiffusedEnergy` of one architecture and one skeleton.
    Attributes:
        product: The networks as C reads them, once they were asked for.
    """

    path = "in one pass in C, weights as float16"

    def __init__(self, networks: Sequence[DiffusedEnergy]) -> None:
        self.networks = list(networks)
        self._watches = [Watch(network) for network in self.networks]
        self._version: tuple = ()
        self._refusal: str | None = None
        self.product: _InC | None = None
        self._halves: list[Halves] = []

    @staticmethod
    def groups(networks: Sequence[DiffusedEnergy]) -> list[list[int]]:
        """Which networks, by index, may go through one pass: of equal sizes, with equal skeletons."""
        groups: list[list[int]] = []
        for i, network in enumerate(networks):
            group = next((group for group in groups if _agree(network, networks[group[0]])), None)
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        return groups

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | str:
        """The pass, or why it does not serve such states: other weights than those of stored experts, hooks,
        states of another type, no function in C (yet)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or not wanted():
            return "states or settings that the function in C is not for"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        self._take_over()
        if self._refusal is not None:
            return self._refusal
        if not allowed(self._operations * len(x)):
            return "the function in C is not compiled"
        if self.product is None:
            self.product = _InC(self.networks, self._halves)
        return self._evaluate

    def _take_over(self) -> None:
        """Takes over weights that changed since the last call."""
        version = tuple(watch() for watch in self._watches)
        if version == self._version:
            return
        self._version, self.product, self._refusal = version, None, None
        self._kept: tuple[object, Level | None] = (None, None)  # of the last noise level
        if any(map(hooked, self.networks)):
            self._refusal = "hooks"
            return
        if not all(_agree(network, self.networks[0]) for network in self.networks):
            raise ValueError(
                "the skeletons of these networks were equal and no longer are: build a new chain."
            )
        self._halves = [half for network in self.networks if (half := _packed(network)) is not None]
        if len(self._halves) < len(self.networks):
            self._refusal = "weights that float16 does not hold"
            return
        self._operations = 4 * sum(w.numel() for network in self.networks for w in _weights(network))
        self._embedding = [self._stack(name, "weight").mT for name in ("embed", "modulate")]
        biased = ("embed", "modulate", *MODULATED)
        self._bias = {name: self._stack(name, "bias")[:, None] for name in biased}

    def _stack(self, layer: str, part: str) -> Tensor:
        return torch.stack([getattr(getattr(n, layer), part).detach() for n in self.networks])

    def _evaluate(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        assert self.product is not None
        level = self._level(noise_level, x)
        outputs, pull_back = self.product(x, level)
        if not self.networks[0].floor or self._is_above(outputs, x, noise_level, level):
            return outputs, pull_back
        return self._floored(outputs, pull_back, x, noise_level)

    def _floored(
        self, outputs: Tensor, pull_back: Pullback, x: Tensor, noise_level: Tensor | None
    ) -> tuple[Tensor, Pullback]:
        """The same above the floors of the networks, see `skeleton`; what is below is lifted."""
        first = self.networks[0]
        sigma = first.level(x, noise_level)
        d = x.flatten(1) - first.mean
        slope = first.slope_of_floor(d, sigma)
        outward = (d / (first.spread.square() + sigma.square())[:, None] * (slope > 0)).view_as(x)
        lifted, below, shares = outputs.clone(), [], []
        for network, own in zip(self.networks, lifted, strict=True):
            own = own[:, : 1 if network.value_head is None else len(network.value_head.weight)]
            lacking = network.floor_at(sigma) + slope + (-own).logsumexp(1, keepdim=True)
            below.append((lacking > 0).to(x.dtype))
            shares.append(torch.softmax(-own, 1))
            own += lacking.clamp(min=0)

        def pull(cotangent: Tensor) -> Tensor:
            cotangent, total = cotangent.clone(), torch.zeros_like(below[0])
            for own, active, share in zip(cotangent, below, shares, strict=True):
                part = active * own[:, : share.shape[1]].sum(1, keepdim=True)
                own[:, : share.shape[1]] -= part * share  # E(x, σ) itself has gone
                total += part
            return pull_back(cotangent) + total.view(-1, *[1] * (x.ndim - 1)) * outward

        return lifted, pull

    def _is_above(self, outputs: Tensor, x: Tensor, noise_level: Tensor | None, level: Level) -> bool:
        """Whether no energy is below its floor, and no state where floors rise."""
        first, floors = self.networks[0], [network.least for network in self.networks]
        if level.floors is None or any(a is not b for a, b in zip(level.floors[2], floors, strict=True)):
            sigma, values = first.level(x, noise_level), outputs.shape[2]
            least = torch.cat([network.floor_at(sigma).mT for network in self.networks]) + math.log(values)
            reach = (REACH * len(first.mean) * (first.spread.square() + sigma.square())).sqrt()
            level.floors = least, reach, floors
        least, reach, _ = level.floors
        if not bool((outputs.amin(2) > least).all()):
            return False
        return bool((torch.linalg.vector_norm(x.flatten(1) - first.mean, dim=1) < reach).all())

    def _level(self, noise_level: Tensor | None, x: Tensor) -> Level:
        """What depends on the noise level, computed once for each."""
        skeleton = self.networks[0]
        low, high = skeleton.noise_range
        if noise_level is None:
            noise_level = x.new_full((1,), low)
        key = tuple(noise_level.reshape(-1).tolist())
        kept, level = self._kept
        if level is not None and kept == key:
            return level
        sigma = noise_level.to(x.dtype).reshape(-1).clamp(low, high)
        waves = sigma.log()[:, None] * skeleton.frequencies
        waves = torch.cat([waves.sin(), waves.cos()], dim=1).expand(len(self.networks), -1, -1)
        embed, modulate = self._embedding
        embedding = F.silu(torch.baddbmm(self._bias["embed"], waves, embed))
        modulation = torch.baddbmm(self._bias["modulate"], embedding, modulate)
        parts = []
        chunks = modulation.chunk(6, dim=2)
        for layer, shift, bias in zip(MODULATED, chunks[::2], chunks[1::2], strict=True):
            gain = 1 + shift
            # (W h + c) g + b = (W h) g + (c g + b)
            parts += [gain, torch.addcmul(bias, self._bias[layer], gain)]
        noise = sigma.square()
        precision = 1 / (skeleton.variances + noise[:, None])
        rest = 1 / (skeleton.residual + noise)
        scale = noise + skeleton.spread.square()
        assert self.product is not None
        level = self.product.level(
            AtLevel(
                parts,
                root=precision.sqrt(),
                rest=rest,
                spread=precision - rest[:, None],
                shrink=scale.rsqrt(),
                amount=2 * (skeleton.denoiser_error(sigma) * scale).sqrt() / noise,
            )
        )
        self._kept = (key, level)
        return level


class _InC:
    """x, what depends on the noise level -> outputs (networks, batch, values) and the function that pulls
    cotangents back.

    Args:
        networks: `DiffusedEnergy` of one architecture and one skeleton.
        halves: Their matrices.
    """

    def __init__(self, networks: Sequence[DiffusedEnergy], halves: Sequence[Halves]) -> None:
        first = networks[0]
        values = max(1, *(0 if n.value_head is None else len(n.value_head.weight) for n in networks))
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
        states, total = x.contiguous(), x.shape[0]
        shares = _shares(self.networks, total)
        size = library().perceptron_memory(ctypes.byref(self.product), total)
        memory = self.memory.pop() if self.memory else states.new_empty(shares, size)
        if memory.shape[0] < shares or memory.shape[1] < size:
            memory = states.new_empty(shares, size)
        outputs = states.new_empty(self.networks, total, self.values)

        def call(name: str, given: Tensor, into: Tensor) -> None:
            work = Work(
                ctypes.addressof(self.product), ctypes.addressof(level), size=memory.shape[1], total=total
            )
            work.given, work.into, work.memory = given.data_ptr(), into.data_ptr(), memory.data_ptr()
            work.parts, work.by_networks = (shares, 1) if shares > 1 else (parts_of(total), 0)
            carry_out(name, work)

        call("perceptron_outputs", states, outputs)

        def pull_back(cotangent: Tensor) -> Tensor:
            gradients = states.new_empty(shares, *states.shape)
            call("perceptron_gradient", cotangent.contiguous(), gradients)
            return gradients[0] if shares == 1 else gradients.sum(0)

        # Used again as soon as nobody can pull back any more: fresh memory is slow to come by.
        weakref.finalize(pull_back, self.memory.append, memory)
        return outputs, pull_back

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def _matrix(self, half: Tensor, inputs: int) -> Matrix:
        return Matrix(self._keep(half), inputs, half.shape[1])


def _shares(networks: int, rows: int) -> int:
    """Into how many shares of networks the work goes on several threads; 1 where threads share rows instead.

    A thread reads the weights of its networks alone, which pays where it would read all of them for fewer
    rows than go together.
    """
    threads = torch.get_num_threads()
    evenly = -(-networks // threads) * threads <= 1.25 * networks
    return threads if evenly and rows < TOGETHER * threads else 1


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
        exact = all(
            weight.dtype == torch.float32 and torch.equal(weight.half().float(), weight)
            for weight in _weights(network)
        )
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


def _agree(one: DiffusedEnergy, other: DiffusedEnergy) -> bool:
    """Whether two networks have equal sizes, but for the number of values, and equal skeletons."""
    if one is other:
        return True
    if one.sizes != other.sizes:
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in SKELETON]
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)

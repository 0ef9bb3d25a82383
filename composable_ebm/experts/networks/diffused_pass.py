"""Several `DiffusedEnergy` networks at one state in one pass, with a hand-written input gradient.

What the networks of a product have in common is computed once: the embedding of a noise level that
all chains share, and the skeleton where it is the same, as it is for experts fine-tuned from one
base. Inner layers are batched products over the networks. Symbols as in `diffused`, and

    aᵢ    input of the i-th activation, (networks, batch, hidden)
    hᵢ    output of the i-th residual layer, h₁ = silu(a₁), hᵢ₊₁ = hᵢ + silu(aᵢ₊₁)
    gᵢ    its gain, bᵢ its bias: aᵢ₊₁ = (Wᵢ₊₁ hᵢ + cᵢ₊₁) gᵢ₊₁ + bᵢ₊₁

and δv for the derivative of Σ cotangent · output with respect to v.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composable_ebm.experts.networks.diffused_native import Halves, Level, NativePass
from composable_ebm.potential.forms import Evaluate
from composable_ebm.potential.native import allowed
from composable_ebm.potential.packed import PackedLinear, Watch, hooked, version_of

if TYPE_CHECKING:
    from composable_ebm.experts.networks.diffused import DiffusedEnergy

__all__ = ["DiffusedPass"]

SKELETON = ("mean", "axes", "variances", "residual", "spread", "frequencies", "signs")
MIDDLE = ("from_components", "second", "third", "linear_head", "quadratic_head")
MODULATION = ("embed", "modulate")

silu_backward = torch.ops.aten.silu_backward


_packed: WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, PackedLinear, PackedLinear]]]
_packed = WeakKeyDictionary()


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
        native: The same as C reads it, once it was asked for.
    """

    modulation: list[Tensor]
    root: Tensor
    rest: Tensor
    spread: Tensor
    shrink: Tensor
    amount: Tensor
    native: Level | None = None


class DiffusedPass:
    """x, noise level -> outputs (networks, batch, values) and the function that pulls gradients back.

    Ask `ready` before each call: it also takes over weights that have changed. The number of
    values is that of the network with most; outputs of the others are padded with copies of their
    common part, which nobody reads.

    Args:
        networks: `DiffusedEnergy` of one architecture and one skeleton.
    Attributes:
        path: The form of the last evaluation, in words.
    """

    def __init__(self, networks: Sequence[DiffusedEnergy]) -> None:
        self.networks = list(networks)
        self._watches = [Watch(network) for network in self.networks]
        self.version: tuple = ()
        self.path = ""

    @staticmethod
    def groups(networks: Sequence[DiffusedEnergy]) -> list[list[int]]:
        """Which networks, by index, may go through one pass: of equal sizes, with equal skeletons."""
        groups: list[list[int]] = []
        for i, network in enumerate(networks):
            for group in groups:
                first = networks[group[0]]
                if _agree(network, first):
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | str:
        """Itself, or why it does not serve such states: other types or devices than the weights, autocast,
        hooks."""
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        self.refresh()
        if not self._usable:
            return "hooks, or weights of several types"
        alike = x.dtype == self._like.dtype and x.device == self._like.device
        return self if alike else "states of another type or device than the weights"

    def refresh(self) -> None:
        """Takes over weights that changed since the last call."""
        version = tuple(watch() for watch in self._watches)
        if version == self.version:
            return
        self.version = version
        first = self.networks[0]
        self._like = first.second.weight
        parameters = [p for network in self.networks for p in network.parameters()]
        same = all(p.dtype == self._like.dtype and p.device == self._like.device for p in parameters)
        self._usable = same and not any(map(hooked, self.networks))
        if not self._usable:
            return
        if not all(_agree(network, first) for network in self.networks):
            raise ValueError(
                "the skeletons of these networks were equal and no longer are: build a new chain."
            )
        self.skeleton = first
        self.low, self.high = first.noise_range
        self.hidden = first.second.weight.shape[0]
        for name in ("pixels", "axes", "weight"):  # taken again when they are needed
            vars(self).pop(name, None)
        self._native: NativePass | None = None
        self._halves: list[Halves] | None = None
        self._operations: int | None = None  # of a row in C; 0 where it does not serve, None before looking
        self.modulation = {name: self._stack(name, "weight") for name in MODULATION}
        biased = (*MODULATION, *(name for name in MIDDLE if name != "quadratic_head"))
        self.bias = {name: self._stack(name, "bias")[:, None] for name in biased}
        heads = [network.value_head for network in self.networks]
        most = max(0 if head is None else len(head.weight) for head in heads)
        self.values = max(most, 1)
        self.value_weight = self._like.new_zeros(len(heads), self.values, self.hidden)
        self.value_bias = self._like.new_zeros(len(heads), 1, self.values)
        for i, head in enumerate(heads):
            if head is not None:
                self.value_weight[i, : len(head.weight)] = head.weight.detach()
                self.value_bias[i, 0, : len(head.bias)] = head.bias.detach()
        self._kept: tuple[object, AtLevel | None] = (None, None)  # of the last noise level

    @cached_property
    def pixels(self) -> list[tuple[PackedLinear, PackedLinear]]:
        """The first layers, both ways."""
        return [_both_ways(n, "from_pixels", n.from_pixels.weight) for n in self.networks]

    @cached_property
    def weight(self) -> dict[str, Tensor]:
        """The other layers, (networks, outputs, inputs)."""
        return {name: self._stack(name, "weight") for name in MIDDLE}

    @cached_property
    def axes(self) -> tuple[PackedLinear, PackedLinear]:
        """The principal components, both ways."""
        return _both_ways(self.skeleton, "axes", self.skeleton.axes)

    def _in_c(self, rows: int) -> NativePass | None:
        """The pass in C, where it serves these networks and is to be had now."""
        if self._operations is None:
            self._halves = NativePass.in_half(self.networks)
            self._operations = NativePass.operations(self.networks) if self._halves else 0
        if not self._operations or not allowed(self._operations * rows):
            return None
        if self._native is None and self._halves is not None:
            self._native = NativePass(self.networks, self._halves, self.values)
        return self._native

    def _stack(self, layer: str, part: str) -> Tensor:
        return torch.stack([getattr(getattr(n, layer), part).detach() for n in self.networks])

    def _at_level(self, noise_level: Tensor | None, x: Tensor) -> AtLevel:
        """Computed once for each level."""
        if noise_level is None:
            noise_level = x.new_full((1,), self.low)
        # On a CPU the level can be read without waiting for anything.
        key = tuple(noise_level.reshape(-1).tolist()) if noise_level.device.type == "cpu" else None
        kept, result = self._kept
        if result is not None and key is not None and kept == key:
            return result
        skeleton = self.skeleton
        sigma = noise_level.to(x.dtype).reshape(-1).clamp(self.low, self.high)
        waves = sigma.log()[:, None] * skeleton.frequencies
        waves = torch.cat([waves.sin(), waves.cos()], dim=1).expand(len(self.networks), -1, -1)
        embedding = F.silu(torch.baddbmm(self.bias["embed"], waves, self.modulation["embed"].mT))
        modulation = torch.baddbmm(self.bias["modulate"], embedding, self.modulation["modulate"].mT)
        parts = []
        for layer, (gain, bias) in enumerate(zip(*[iter(modulation.chunk(6, dim=2))] * 2, strict=True)):
            gain = 1 + gain
            # (W h + c) g + b = (W h) g + (c g + b)
            own = self.bias[("from_components", "second", "third")[layer]]
            parts += [gain, torch.addcmul(bias, own, gain)]
        noise = sigma.square()
        precision = 1 / (skeleton.variances + noise[:, None])
        rest = 1 / (skeleton.residual + noise)
        scale = noise + skeleton.spread.square()
        result = AtLevel(
            parts,
            root=precision.sqrt(),
            rest=rest,
            spread=precision - rest[:, None],
            shrink=scale.rsqrt(),
            amount=2 * (skeleton.denoiser_error(sigma) * scale).sqrt() / noise,
        )
        self._kept = (key, result)
        return result

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs (networks, batch, values), and cotangents of that shape -> gradient, shape of `x`."""
        at = self._at_level(noise_level, x)
        native = self._in_c(len(x))
        if native is not None:
            self.path = "in one pass in C, weights as float16"
            at.native = at.native or native.level(at)
            return native(x, at.native)
        self.path = "in one pass, gradient by hand"
        return self._by_operators(x, at)

    def _by_operators(self, x: Tensor, at: AtLevel) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        weight, skeleton = self.weight, self.skeleton
        gain1, bias1, gain2, bias2, gain3, bias3 = at.modulation
        root, rest, amount, shrink = at.root, at.rest, at.amount, at.shrink[:, None]

        d = x.flatten(1) - skeleton.mean
        along = self.axes[0](d)
        start = torch.stack([forward(d) for forward, _ in self.pixels]).mul_(shrink)
        components = F.linear(along * root, weight["from_components"].flatten(0, 1))
        components = components.view(len(d), len(self.networks), self.hidden).transpose(0, 1)
        start = start.add_(components)
        a1 = torch.addcmul(bias1, start, gain1)
        h = F.silu(a1)
        a2 = torch.addcmul(bias2, torch.bmm(h, weight["second"].mT), gain2)
        h = h + F.silu(a2)
        a3 = torch.addcmul(bias3, torch.bmm(h, weight["third"].mT), gain3)
        h = h + F.silu(a3)

        spread = at.spread * along
        gaussian = (rest * d.square().sum(1) + (spread * along).sum(1)) / 2
        quadratic = torch.bmm(h, weight["quadratic_head"].mT)
        signed = quadratic * skeleton.signs
        linear = torch.bmm(h, weight["linear_head"].mT)[..., 0] + self.bias["linear_head"][..., 0]
        common = gaussian + amount * (linear + (quadratic * signed).sum(2) / 2)
        outputs = torch.baddbmm(self.value_bias, h, self.value_weight.mT) + common[..., None]

        def pull_back(cotangent: Tensor) -> Tensor:
            total = cotangent.sum(2)  # δcommon, (networks, batch)
            strength = (total * amount)[..., None]
            dh = torch.bmm(signed * strength, weight["quadratic_head"])
            dh = dh.addcmul_(strength, weight["linear_head"])
            dh = dh.baddbmm_(cotangent, self.value_weight)
            dh = dh.baddbmm_(silu_backward(dh, a3).mul_(gain3), weight["third"])
            dh = dh.baddbmm_(silu_backward(dh, a2).mul_(gain2), weight["second"])
            dstart = silu_backward(dh, a1).mul_(gain1)
            everything = total.sum(0)[:, None]
            flat = dstart.transpose(0, 1).flatten(1)
            dalong = (flat @ weight["from_components"].flatten(0, 1)).mul_(root)
            dalong = dalong.addcmul_(spread, everything)
            dx = self.axes[1](dalong).addcmul_(rest[:, None] * everything, d)
            dstart = dstart.mul_(shrink)
            for (_, backward), part in zip(self.pixels, dstart, strict=True):
                dx = dx.add_(backward(part))
            return dx.view_as(x)

        return outputs, pull_back


def _both_ways(network: DiffusedEnergy, name: str, weight: Tensor) -> tuple[PackedLinear, PackedLinear]:
    """The product with `weight` and with its transpose, kept with the network: packing takes 10 ms.

    The sum tells changes that PyTorch does not count (through `.data`).
    """
    if weight.device.type != "cpu":
        return PackedLinear(weight), PackedLinear(weight.T)
    kept = _packed.setdefault(network, {})
    version = (version_of(weight), float(weight.detach().sum()))
    if name not in kept or kept[name][0] != version:
        kept[name] = (version, PackedLinear(weight), PackedLinear(weight.T))
    return kept[name][1:]


def _agree(one: DiffusedEnergy, other: DiffusedEnergy) -> bool:
    """Whether two networks have equal sizes, but for the number of values, and equal skeletons."""
    if one is other:
        return True
    if {**one.options, "num_values": 0} != {**other.options, "num_values": 0}:
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in SKELETON]
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)

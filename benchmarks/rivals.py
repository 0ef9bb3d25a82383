"""One short-run chain, as each library runs it: the same energy, start, steps and settings.

`torchebm` has no gradient clipping, so it does one operation less.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import ebm
import torch
from torch import Tensor, nn
from torchebm.core import BaseModel
from torchebm.samplers import LangevinDynamics

import composable_ebm as ceb
from composable_ebm.energy import Energy
from composable_ebm.sampling import Chain, Noise, graphs
from composable_ebm.sampling.block import Sampler

STEP_SIZE, NOISE, CLIP = 10.0, 0.005, 0.03
LIMITS = (-1.0, 1.0)

__all__ = [
    "Product",
    "chain",
    "face_experts",
    "face_mean",
    "in_ebmkit",
    "in_torchebm",
    "plain_loop",
    "textbook",
]


def textbook(side: int = 32, seed: int = 0) -> nn.Sequential:
    """The textbook network for MNIST: 16k5, 32k3, 64k3, 64k3, all stride 2, then 64 and 1 units."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3), (64, 64, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2), nn.SiLU()]
    last = 64 * (-(-side // 16)) ** 2
    head = [nn.Flatten(), nn.Linear(last, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0)]
    return nn.Sequential(*layers, *head).requires_grad_(False)


def operations(network: nn.Module, x: Tensor) -> float:
    """Additions and multiplications of energy and input gradient over a batch like `x`."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += 4 * output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += 4 * output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network(x)
    for hook in hooks:
        hook.remove()
    return total


def chain(energy: Energy, x: Tensor, steps: int, sampler: Sampler | None = None) -> Tensor:
    """Ours."""
    kernel = ceb.Langevin(STEP_SIZE, noise_scale=NOISE, grad_clip=CLIP, clamp=LIMITS)
    noise = Noise((torch.Generator(x.device).manual_seed(0), len(x)))
    captured = graphs.shared(x.device)
    run = Chain(energy, x, sampler or kernel, noise, num_steps=steps, record=False, graphs=captured)
    return run.advance(steps)


def plain_loop(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """What one writes without a library."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = x.detach() - STEP_SIZE * gradient.clamp(-CLIP, CLIP) + NOISE * torch.randn_like(x)
        x = x.clamp(*LIMITS)
    return x


def in_ebmkit(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """The same chain in ebmkit."""
    sampler = ebm.samplers.LangevinDynamics(STEP_SIZE, steps, NOISE, CLIP, LIMITS)
    return sampler.sample(energy, x)


class _Model(BaseModel):
    def __init__(self, energy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x)


def in_torchebm(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """The same chain in torchebm, whose noise is √(2η) times its scale, and without the clip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale = NOISE / (2 * STEP_SIZE) ** 0.5
        sampler = LangevinDynamics(_Model(energy), STEP_SIZE, scale, clamp=LIMITS, device=x.device)
        return sampler.sample(x=x.clone(), n_steps=steps)


def face_experts(count: int, device: torch.device) -> list[ceb.Expert]:
    """Shipped face experts; from the sixth on, copies with weights of their own."""
    names = ("smile", "glasses", "beard", "curly", "grey_hair")
    experts = [ceb.load_expert(f"faces/{name}") for name in names[:count]]
    for seed in range(count - len(experts)):
        network = copy.deepcopy(experts[seed].network)
        with torch.no_grad():
            network.from_pixels.weight.mul_(1 + 1e-3 * seed)
        experts.append(ceb.Expert.standing(network, experts[seed].card))
    return [expert.to(device) for expert in experts]


def face_mean(device: torch.device) -> Tensor:
    """The mean face, (3, 32, 32): states around it are such as the experts meet while sampling."""
    return ceb.load_expert("faces/base").network.mean.reshape(3, 32, 32).to(device)  # type: ignore


class Product:
    """Face experts at one noise level as ours and as ebmkit's `SumEnergy`.

    Args:
        experts: Binary experts.
        base: The expert of p(x) for the ratio form, or None for a plain sum.
        level: Noise level, in data units.
    """

    def __init__(self, experts: Sequence[ceb.Expert], base: ceb.Expert | None, level: float) -> None:
        device = next(experts[0].parameters()).device
        sigma = torch.tensor(level, device=device)
        if base is None:
            self.ours: Energy = sum(experts)  # type: ignore[assignment]
            parts = [_Value(expert, sigma) for expert in experts]
            weights = [1.0] * len(parts)
        else:
            self.ours = ceb.given(base, *experts, weight=1.0)
            parts = [_Value(base, sigma), *(_Ratio(expert, sigma) for expert in experts)]
            weights = [1.0] * len(parts)
        self.theirs = ebm.SumEnergy(*parts, weights=weights).to(device)


class _Value(nn.Module):
    """E(x, y) of one expert at a fixed level."""

    def __init__(self, expert: ceb.Expert, sigma: Tensor) -> None:
        super().__init__()
        self.expert, self.sigma = expert, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.expert.energy(x, self.sigma)


class _Ratio(_Value):
    """E(x, y) - E(x) of one expert, from one pass of its network."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.expert.network(x, self.sigma)
        return self.expert.read(outputs) + torch.logsumexp(-outputs, dim=1)

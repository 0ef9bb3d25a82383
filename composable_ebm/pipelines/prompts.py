"""Prompts as energies, and the one pass in which all prompts of a composition are evaluated."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy, Sum, as_name, known_by_gradient
from composable_ebm.pipelines.denoiser import PromptedDenoiser
from composable_ebm.potential.forms import Evaluate, register
from composable_ebm.potential.operations import Pullback
from composable_ebm.sampling import Annealed, Kernel, Still, to_settings
from composable_ebm.sampling.schedule import Curve, Schedule

__all__ = ["Pipeline", "Prompt", "Without"]


class _OnePass:
    """All prompts of one network as one pass over (prompts · chains) rows, see `potential.forms`.

    There are no values, so nothing is computed before a gradient is asked for:

        ∂E/∂x = Σₖ cₖ (x - Dₖ)/σ²,      cₖ the coefficient of prompt k.
    """

    path = "all prompts in one pass"

    def __init__(self, networks: Sequence[Conditioned]) -> None:
        self.networks = list(networks)

    @staticmethod
    def groups(networks: Sequence[Conditioned]) -> list[list[int]]:
        """Which of them share a denoiser."""
        found: dict[int, list[int]] = {}
        for i, network in enumerate(networks):
            found.setdefault(id(network.denoiser), []).append(i)
        return list(found.values())

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | str:
        """Itself: it serves all states."""
        return self

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> tuple[Tensor, Pullback]:
        denoiser = self.networks[0].denoiser

        def pull_back(cotangent: Tensor) -> Tensor:
            weights = cotangent[..., 0]
            asked = list(range(len(self.networks)))
            if weights.device.type == "cpu":  # where a look costs nothing
                asked = [k for k in asked if bool(weights[k].any())]
            if not asked:
                return torch.zeros_like(x)
            with torch.no_grad():
                sigma = _clamped(denoiser, x, noise_level)
                clean = denoiser(x.detach(), sigma, [self.networks[k].what for k in asked])
                c = weights[asked].reshape(len(asked), len(x), *[1] * (x.ndim - 1)).to(x.dtype)
                return (c * (x - clean.to(x.dtype))).sum(0) / _column(sigma, x).square()

        return x.new_zeros(len(self.networks), len(x), 1), pull_back


class Conditioned(nn.Module):
    """The network of a pipeline, asked with one prompt: states and noise levels -> (batch, 1)."""

    def __init__(self, denoiser: PromptedDenoiser, what: Hashable) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.what = what
        self.told = denoiser.condition(what)  # held: steps that are replayed read it where it is

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        sigma, at = _clamped(self.denoiser, x, noise_level), x.detach()
        with torch.no_grad():
            clean = self.denoiser(at, sigma, [self.what])[0].to(x.dtype)
        return known_by_gradient(x, (at - clean) / _column(sigma, x).square())[:, None]


register(_OnePass, takes=lambda network: type(network) is Conditioned)


def _clamped(denoiser: PromptedDenoiser, x: Tensor, noise_level: Tensor | None) -> Tensor:
    low, high = denoiser.noise_range
    sigma = x.new_full((), low) if noise_level is None else noise_level.to(x.dtype)
    return sigma.clamp(low, high).expand(len(x))


def _column(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1))


class _Prompted(Energy):
    """What the pipeline and its prompts have in common."""

    noise_conditioned = True
    has_value = False
    wide_states = True

    def __init__(self, denoiser: PromptedDenoiser, what: Hashable) -> None:
        super().__init__()
        self.network = Conditioned(denoiser, what)
        self.event_shape = denoiser.event_shape
        self.data_range = denoiser.data_range
        self.given_weight = denoiser.weight
        self.in_space(denoiser.codec)

    @property
    def denoiser(self) -> PromptedDenoiser:
        """The network, and all that is known of it."""
        return self.network.denoiser

    @property
    def key(self) -> Hashable:
        return ("prompt", id(self.denoiser), self.network.what)

    def body(self) -> nn.Module:
        return self.network

    is_sum = True

    def read(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.network(x, noise_level))

    @abstractmethod
    def marginal(self) -> Energy | None:
        """What a prompt is held against."""


class Pipeline(_Prompted):
    """What a prompted network says of p(x): the energy to start compositions from.

    `pipeline[prompt]` is its p(x | prompt). Both are known by their gradient alone, so sums, weights and
    ratios work, and whatever compares energies refuses.

    Args:
        denoiser: The network.
        name: What recipes print.
    Example:
        >>> mix = given(sd, sd["a castle"], ~sd["people"])
    Reference:
        Ho and Salimans (2022), Classifier-free diffusion guidance, arXiv 2207.12598: one prompt at weight w
        is guidance at scale w. Liu et al. (2022), arXiv 2206.01714, eq. 11 and 12, for several.
    """

    def __init__(self, denoiser: PromptedDenoiser, name: str) -> None:
        super().__init__(denoiser, None)
        self.name = as_name(name)
        levels = denoiser.levels(denoiser.num_steps)
        self.sampler_settings = {**to_settings(self.sampler()), "num_steps": len(levels)}
        self._prompts: WeakValueDictionary[Hashable, Prompt] = WeakValueDictionary()

    def __getitem__(self, what: object) -> Prompt:
        """The expert of a prompt; its text is encoded here, once as long as it is held or recent.

        Raises:
            KeyError: If the network can make nothing of it.
        """
        known = self.denoiser.recognised(what)
        prompt = self._prompts.get(known)
        if prompt is None:
            prompt = self._prompts[known] = Prompt(self, known)
        return prompt

    def marginal(self) -> None:
        return None

    # A class with __getitem__ would otherwise be iterable, without end.
    __iter__ = None

    def sampler(
        self, num_steps: int | None = None, corrector: Kernel | None = None, corrections: int = 1
    ) -> Annealed:
        """The reverse diffusion along the pipeline's own noise levels.

        Without a corrector one gradient a level: DDIM at η = 0, Euler's method. With one, that kernel takes
        `corrections` steps at each level, its step size in units of σ² (`Langevin`), which corrects what
        summed scores get wrong of the diffused sum.

        Args:
            num_steps: Noise levels; the pipeline's own number unless given.
            corrector: A kernel that compares no energies, such as `Langevin(0.1)` or `UnderdampedLangevin`.
            corrections: Its steps at each level: sample with `num_steps` times as many.
        Example:
            >>> out = sample(mix, num_steps=60, sampler=sd.sampler(30, Langevin(0.1), corrections=2))
        """
        count = self.denoiser.num_steps if num_steps is None else num_steps
        levels = self.denoiser.levels(count)
        last = max(1, len(levels) - 1)
        knots = [(i / last, level) for i, level in enumerate(levels)]
        knots = knots if len(knots) > 1 else [*knots, (1.0, levels[0])]
        # Without steps of its own the number of levels follows that of the run.
        several = None if corrector is None or corrections == 1 else len(levels)
        power = 0.0 if corrector is None else 2.0
        schedule = Schedule(
            noise_level=Curve(knots, "linear"), predict=True, noise_power=power, num_levels=several
        )
        return Annealed(corrector or Still(), schedule)


class Prompt(_Prompted):
    """A pipeline's p(x | prompt), on its own states.

    `~prompt` is p(x)/p(prompt | x), away from the prompt as composable diffusion negates: as energies,
    2·pipeline - prompt.

    Args:
        pipeline: Whose prompt it is.
        what: As the denoiser knows it.
    """

    def __init__(self, pipeline: Pipeline, what: Hashable) -> None:
        super().__init__(pipeline.denoiser, what)
        object.__setattr__(self, "pipeline", pipeline)  # held, not owned: they share the network
        self.sampler_settings = pipeline.sampler_settings

    pipeline: Pipeline

    def marginal(self) -> Energy:
        return self.pipeline

    def complement(self) -> Energy:
        return Without(self)

    def __str__(self) -> str:
        what = self.network.what
        return f"{self.pipeline}[{json.dumps(what, ensure_ascii=False)}]"


class Without(Sum):
    """p(x)/p(prompt | x), to be held against p(x).

    Reference:
        Liu et al. (2022), arXiv 2206.01714, eq. 12; Du et al. (2020), arXiv 2004.06030, section 3.2.
    """

    def __init__(self, prompt: Prompt) -> None:
        super().__init__([prompt.pipeline, prompt], [2.0, -1.0])
        object.__setattr__(self, "prompt", prompt)

    prompt: Prompt

    def marginal(self) -> Energy:
        return self.prompt.pipeline

    def complement(self) -> Energy:
        return self.prompt

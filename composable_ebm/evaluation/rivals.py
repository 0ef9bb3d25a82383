"""What a user could do instead, on the same requests and gradient evaluations.

ebmkit       its SumEnergy of the same experts, by its own annealed Langevin sampler
diffusion    plain denoisers of the same data by the composable-diffusion formula
contrastive  experts of the same data that learned by contrast with their own samples
joint        one network that saw all labels at once: what composition is meant to spare
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from composable_ebm.energy import Energy, soft_minimum
from composable_ebm.evaluation.composition import Row, compose, draw
from composable_ebm.evaluation.task import Request, Task, family_experts
from composable_ebm.experts.catalogue import load_expert
from composable_ebm.experts.expert import Expert
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.langevin import Langevin
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.sample import sample

RIVALS = ("ebmkit", "diffusion", "contrastive", "joint")
# Families of other experts of the same data, and how they compose. The first two are trained for it: their
# ratios are in nats. Those by the textbook's recipe are not (the temperature of its chains is 1.25e-6): sums.
OTHERS = {
    "diffusion": {"faces": ("diffusion", "ratio")},
    "contrastive": {"faces": ("contrastive_faces", "ratio"), "digits": ("contrastive_digits", "sum")},
}
JOINT = {"faces": Path("runs/rivals/faces/joint")}

__all__ = ["RIVALS", "JointRequests", "Missing", "sample_rival"]


class Missing(RuntimeError):
    """A rival that is not there to be compared with."""


def sample_rival(name: str, asked: Sequence[Request], task: Task, seed: int) -> Row:
    """One sample for each request, drawn by a rival.

    Raises:
        Missing: If its package or its experts are not there; the message says how to get them.
    """
    if name == "ebmkit":
        return _ebmkit(asked, task, seed)
    if name in OTHERS:
        return _other_experts(name, asked, task, seed)
    if name == "joint":
        return _joint(asked, task, seed)
    raise ValueError(f"`name` must be one of {', '.join(RIVALS)}, got {name!r}.")


# -- ebmkit -------------------------------------------------------------------------------------------


def _ebmkit(asked: Sequence[Request], task: Task, seed: int) -> Row:
    """`ebm.SumEnergy` of Eᵢ(x, aᵢ), one request at a time, as that package has no batch of requests."""
    try:
        from ebm import AnnealedLangevinDynamics, LangevinDynamics, SumEnergy
    except ImportError as error:
        raise Missing("ebmkit is not installed: pip install ebmkit") from error
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(asked):
        groups.setdefault(tuple(request.items()), []).append(i)
    samples: list[Tensor | None] = [None] * len(asked)
    seconds, evaluations = 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # its samplers draw from the global generator
        for key, members in groups.items():
            experts = [task.terms[name][value] for name, value in key]
            sampler, num_steps = calibrated_sampler(experts[0])
            shape = (len(members), *experts[0].card.event_shape)
            start = time.perf_counter()
            if isinstance(sampler, Annealed) and sampler.schedule.noise_level is not None:
                curve, levels = sampler.schedule.noise_level, sampler.schedule.num_levels or num_steps
                sigmas = torch.tensor([curve(i / (levels - 1)) for i in range(levels)])
                # Our step x - η ∂E + √(2η) ξ is its α = 2η; the predictor's evaluations go to its steps.
                each = round((num_steps + levels + 1) / levels)
                step = 2 * sampler.kernel.step_size * float(sigmas[-1]) ** sampler.schedule.noise_power
                x = AnnealedLangevinDynamics(sigmas, step / len(experts), each).sample(
                    functools.partial(_sum_at, SumEnergy, experts), sigmas[0] * torch.randn(shape)
                )
                evaluations = levels * each
            else:
                kernel = sampler.kernel if isinstance(sampler, Annealed) else sampler
                if not isinstance(kernel, Langevin):
                    raise Missing(f"ebmkit was set up for Langevin dynamics, not for {kernel}.")
                low, high = experts[0].card.data_range or (-1.0, 1.0)
                x = LangevinDynamics(
                    kernel.step_size / len(experts),
                    num_steps,
                    kernel.noise_scale,
                    kernel.grad_clip,
                    kernel.clamp,
                ).sample(SumEnergy(*experts), low + (high - low) * torch.rand(shape))
                evaluations = num_steps
            seconds += time.perf_counter() - start
            for i, image in zip(members, x.clamp(*(experts[0].card.data_range or (-1.0, 1.0))), strict=True):
                samples[i] = image
    return Row(torch.stack([x for x in samples if x is not None]), list(asked), seconds, evaluations)


def _sum_at(sum_energy: type, experts: Sequence[Expert], x: Tensor, sigma: Tensor) -> Tensor:
    return sum_energy(*(functools.partial(expert, noise_level=sigma) for expert in experts))(x)


# -- other experts -------------------------------------------------------------------------------------


def _other_experts(name: str, asked: Sequence[Request], task: Task, seed: int) -> Row:
    """The same requests of another family's experts.

    For denoisers the ratio form is ε(x) + Σ wᵢ (εᵢ(x, aᵢ) - εᵢ(x)), each against its own unconditional
    score. The paper has one network for all concepts; against the shared base, as it is written there,
    separate networks do far worse: their differences are multiplied by wᵢ, too.

    Reference:
        Liu et al. (2022), arXiv 2206.01714, eq. 11.
    """
    if task.family not in OTHERS[name]:
        raise Missing(f"no {name} experts were set up for {task.family}.")
    family, form = OTHERS[name][task.family]
    try:
        experts, base = family_experts(family, tuple(task.experts))
    except ValueError as error:
        raise Missing(str(error)) from error
    if len(experts) < len(task.experts) or (form == "ratio" and base is None):
        raise Missing(
            f"the family {family!r} lacks the base or an attribute of {task.family}: train configs/{family}."
        )
    terms = {
        n: {v: experts[n][experts[n].card.values[v]] for v in values} for n, values in task.terms.items()
    }
    expressions = [compose(form, request, terms, base) for request in asked]
    x, seconds, evaluations = draw(expressions, torch.Generator().manual_seed(seed))
    return Row(x, list(asked), seconds, evaluations)


# -- a joint model ------------------------------------------------------------------------------------


class JointRequests(Energy):
    """One expert whose values are combinations of attributes, asked for a part of them by each chain:

        E(x) + w (E(x, S) - E(x)),    E(x, S) = -log Σ_{y has S} exp(-E(x, y)).

    Args:
        expert: Its attribute is "a+b+c", its values are one digit for each, such as "010".
        asked: One request a chain, in the order of the batch.
        weight: w; what the expert was calibrated with unless given.
    Raises:
        ValueError: If a request names an attribute that the expert does not know.
    """

    def __init__(self, expert: Expert, asked: Sequence[Request], weight: float | None = None) -> None:
        super().__init__()
        self.expert = expert
        self.weight = expert.card.weight if weight is None else weight
        self.event_shape, self.data_range = expert.event_shape, expert.data_range
        self.noise_conditioned = expert.noise_conditioned
        self.sampler_settings = expert.sampler_settings
        names = expert.card.attribute.split("+")
        if unknown := {n for request in asked for n in request} - set(names):
            raise ValueError(f"{expert} knows {', '.join(names)}, not {', '.join(sorted(unknown))}.")
        has = torch.tensor([[int(digit) for digit in value] for value in expert.card.values])
        fits = torch.ones(len(asked), len(has), dtype=torch.bool)
        for row, request in enumerate(asked):
            for name, value in request.items():
                fits[row] &= has[:, names.index(name)] == value
        self.fits: Tensor
        self.register_buffer("fits", fits)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        network = self.expert.network
        outputs = network(x, noise_level) if self.noise_conditioned else network(x)
        whole = soft_minimum(outputs)
        part = soft_minimum(outputs.masked_fill(~self.fits, torch.inf))
        return whole + self.weight * (part - whole)


def _joint(asked: Sequence[Request], task: Task, seed: int) -> Row:
    folder = JOINT.get(task.family)
    if folder is None:
        raise Missing(f"no joint model was set up for {task.family}.")
    if not folder.is_dir():
        raise Missing(
            f"no joint model of {task.family}: accelerate launch -m composable_ebm.train "
            f"configs/{task.family}/joint.toml"
        )
    energy = JointRequests(load_expert(folder), asked)
    out = sample(
        energy, num_chains=len(asked), generator=torch.Generator().manual_seed(seed), on_divergence="report"
    )
    return Row(out.samples, list(asked), out.seconds, out.evaluations)

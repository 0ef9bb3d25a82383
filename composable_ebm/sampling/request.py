"""What someone wants sampled, checked once: `sample`, `Engine.submit` and all that call them make one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, Not, NotCarriedError, Sum, carrier
from composable_ebm.energy.weights import as_tensor
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Held, Sampler, started
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.particles import Particles, carried
from composable_ebm.sampling.settings import from_settings

DEFAULT_STEPS = 200
DEFAULT_CHAINS = 16

NumSteps = int | Literal["calibrated"] | None
"""Steps after warm-up; "calibrated", those that the experts were calibrated with; None for no end."""

__all__ = [
    "Beginning",
    "Images",
    "NumSteps",
    "Request",
    "calibrated_sampler",
    "calibrated_steps",
    "check_positive_term",
    "initial_states",
]


@runtime_checkable
class Images(Protocol):
    """A data set to start chains from."""

    def __len__(self) -> int: ...
    def batch(self, index: Tensor) -> Tensor: ...


class Beginning(NamedTuple):
    """A request with everything decided that it left open, and its starting states drawn.

    Attributes:
        x: Where chains start, (rows, *event); with particles more rows than chains were asked for.
        generator: Draws their noise.
        sampler: What moves them.
        num_steps: Steps after warm-up; of a run without an end, the length of its schedule.
        mask: 1 where states may move, over the states; None if all may.
        num_chains: Chains that were asked for.
    """

    x: Tensor
    generator: torch.Generator
    sampler: Sampler
    num_steps: int
    mask: Tensor | None
    num_chains: int

    @property
    def noise(self) -> Noise:
        """Draws for the rows."""
        return Noise((self.generator, len(self.x)))


@dataclass(frozen=True, eq=False)
class Request:
    """What someone wants sampled; see `sample` for the arguments.

    Args:
        composition: With at least one term of positive weight.
        num_chains: Number of chains; that of `init` unless given, else 16.
        num_steps: See `NumSteps`.
        sampler: What the experts were calibrated with unless given.
        init: States to start from, or a data set to draw them from.
        seed: Seeds the noise, unless there is a generator.
        generator: Draws the noise.
        coefficients: Replaces the coefficients of the composition, (n,) or (batch, n).
        mask: 1 where states may move, 0 where they are held at `init`.
        held: Whether what is held carries the noise of the level.
        num_warmup: Extra steps at the start.
        on_divergence: What is done where chains stop being finite.
    Raises:
        TypeError: If the composition is no energy.
        ValueError: If the request makes no sense; the message says why.
    """

    composition: Energy
    num_chains: int | None = None
    num_steps: NumSteps = "calibrated"
    sampler: Sampler | None = None
    init: Tensor | Images | None = None
    seed: int | None = None
    generator: torch.Generator | None = None
    coefficients: Tensor | None = None
    mask: Tensor | None = None
    held: Held = "clean"
    num_warmup: int = 0
    on_divergence: Literal["raise", "report"] = "raise"

    def __post_init__(self) -> None:
        energy = self.composition
        if not isinstance(energy, Energy):
            raise TypeError(
                f"`energy` must be an Energy, got {type(energy).__name__}; wrap it with from_callable."
            )
        for name in ("init", "mask", "coefficients"):
            object.__setattr__(self, name, as_tensor(getattr(self, name)))
        if self.seed is not None and self.generator is not None:
            raise ValueError("give a `seed` or a `generator`, not both.")
        check_positive_term(energy, self.coefficients)
        steps = () if self.num_steps in ("calibrated", None) else (("num_steps", self.num_steps),)
        for name, value in (*steps, ("num_warmup", self.num_warmup)):
            if not isinstance(value, Integral) or value < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
        if self.on_divergence not in ("raise", "report"):
            raise ValueError(f'`on_divergence` must be "raise" or "report", got {self.on_divergence!r}.')
        if self.held not in ("clean", "noisy"):
            raise ValueError(f'`held` must be "clean" or "noisy", got {self.held!r}.')
        mask = self.mask
        if self.held == "noisy" and (mask is None or not ((mask == 0) | (mask == 1)).all()):
            raise ValueError('held="noisy" needs a `mask` of zeros and ones, which says what is held.')
        if mask is not None and self.init is None:
            raise ValueError("a `mask` holds part of given states: give them as `init`.")
        if isinstance(self.sampler, Particles) and self.init is not None:
            raise ValueError(
                "Particles start from noise, and weigh how the chains came from there; chains that start at "
                "`init`, or fill in what a `mask` leaves open of it, run without weights: "
                f"sampler=Annealed({self.sampler.kernel}, schedule)."
            )

    @property
    def ends(self) -> bool:
        """Whether the run has an end."""
        return self.num_steps is not None

    def begin(self, device: torch.device | None = None) -> Beginning:
        """Decides what was left open, and draws the starting states.

        Args:
            device: Where the energy must be; wherever it is unless given.
        """
        energy, init = self.composition, self.init
        sampler, steps = self._moved_by()
        device = _device(energy, init, device)
        generator = self.generator
        if generator is None:
            generator = torch.Generator(device).manual_seed(0 if self.seed is None else int(self.seed))
        count = self.num_chains
        if isinstance(sampler, Particles):
            carried(sampler, energy, self.coefficients)  # complains where there is none
            # Of a run without an end all chains are looked at: there is no draw at its end.
            asked = _checked_count(count)
            count = sampler.count(asked) if self.ends else asked
        x = initial_states(energy, count, init, generator, device)
        if init is None and (start_level := _start_level(sampler)) is not None:
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
            x = started(energy, noise, start_level)
        mask = None if self.mask is None else _fitting_mask(self.mask, x, energy)
        chains = _checked_count(self.num_chains) if isinstance(sampler, Particles) else len(x)
        return Beginning(x, generator, sampler, steps, mask, chains)

    def _moved_by(self) -> tuple[Sampler, int]:
        """The sampler and the number of its steps."""
        steps = None if self.num_steps in ("calibrated", None) else int(self.num_steps)
        if self.sampler is not None:
            return self.sampler, DEFAULT_STEPS if steps is None else steps
        sampler, calibrated = calibrated_sampler(self.composition, self.coefficients)
        if isinstance(sampler, Particles) and self.init is not None:
            sampler = sampler.plain
        return sampler, calibrated if steps is None else steps


def initial_states(
    energy: Energy,
    num_chains: int | None,
    init: Tensor | Images | None,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """The states that chains start from, (num_chains, *event), checked against the energy."""
    _checked_count(num_chains)
    if isinstance(init, Tensor):
        if not init.is_floating_point():
            low, high = energy.data_range or (0.0, 1.0)
            raise ValueError(
                f"`init` must be floating point in [{low:g}, {high:g}], got {init.dtype}. "
                f"From bytes: init.float() / 255 * {high - low:g} + {low:g}."
            )
        init = energy.states(init)
        init = init.to(energy.state_dtype or init.dtype)
        energy.check_states(init)
        if num_chains is not None and num_chains != len(init):
            raise ValueError(
                f"`num_chains` is {num_chains} but `init` holds {len(init)} states; give one of them."
            )
        if not init.isfinite().all():
            raise ValueError("`init` holds values that are not finite.")
        if energy.binary and not ((init == 0) | (init == 1)).all():
            raise ValueError(
                f"{energy} lives on bits, and `init` holds other values than 0 and 1: draw bits from them, "
                "torch.bernoulli(init) for grey levels in [0, 1]."
            )
        return init.detach().clone()
    count = _checked_count(num_chains)
    if init is not None:
        index = torch.randint(len(init), (count,), generator=generator, device=device)
        states = energy.states(init.batch(index.cpu()).to(device))
        states = states.to(energy.state_dtype or states.dtype)
        energy.check_states(states)
        return states
    if energy.event_shape is None:
        raise ValueError(
            f"{energy} does not know the shape of its states; give `init`, shape (batch, *event)."
        )
    wide = (b.dtype for b in energy.buffers() if b.is_floating_point())
    like = torch.empty(
        count, *energy.event_shape, device=device, dtype=energy.state_dtype or next(wide, None)
    )
    if energy.data_range is None:
        return like.normal_(generator=generator)
    low, high = energy.data_range
    u = like.uniform_(generator=generator)
    return (u < 0.5).to(u.dtype) if energy.binary else low + (high - low) * u


def _checked_count(num_chains: int | None) -> int:
    if num_chains is not None and (not isinstance(num_chains, Integral) or num_chains < 1):
        raise ValueError(f"`num_chains` must be a whole number of at least 1, got {num_chains!r}.")
    return DEFAULT_CHAINS if num_chains is None else int(num_chains)


def _fitting_mask(mask: Tensor, x: Tensor, energy: Energy) -> Tensor:
    if energy.codec is not None and mask.shape[-2:] == energy.codec.image_shape[-2:]:
        mask = energy.codec.encode_mask(mask)
    try:
        torch.broadcast_to(mask, x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"`mask` must broadcast over the states, shape {tuple(x.shape)}, got {tuple(mask.shape)}."
        ) from error
    return mask.to(x)


def calibrated_sampler(energy: Energy, coefficients: Tensor | None = None) -> tuple[Sampler, int]:
    """The sampler and number of steps that the experts of a composition were calibrated with.

    Of several experts, the one with the most steps decides. The step is divided by the number of densities
    that the composition counts, so that adding experts does not blow up the chain; a ratio of two values of
    one expert, a probability given x, adds nothing. The temperature stays. Where that kernel cannot sample
    the composition, as `Gibbs` cannot when a network joins an RBM, its relaxation takes its place. An
    annealing over noise levels becomes `Particles` where the composition is one density times
    probabilities; they go by the experts' verdict unless particles were stored that do not, as where a scene
    has several objects and none of them is likelier than not to be the one that a label names.

    Args:
        energy: A composition.
        coefficients: Replaces its coefficients, (n,) or (batch, n).
    Raises:
        ValueError: If no leaf has settings, or their kernels differ.
    """
    known = [leaf for leaf in energy.leaves() if leaf.sampler_settings]
    if not known:
        raise ValueError(
            f"{energy} was not calibrated with a sampler; give one, e.g. sampler=Langevin(step_size=0.01)."
        )
    kinds = {str(leaf.sampler_settings["kernel"]) for leaf in known if leaf.sampler_settings}
    if len(kinds) > 1:
        raise ValueError(
            f"the experts of {energy} were calibrated with different kernels, {sorted(kinds)}: give one."
        )
    settings = max((leaf.sampler_settings or {} for leaf in known), key=lambda s: s.get("num_steps", 0))
    coefficients = energy.coefficients if coefficients is None else coefficients
    sampler, num_steps = from_settings(settings, 1 / max(1.0, _total_weight(energy, coefficients)))
    if isinstance(sampler, Annealed):
        kernel = sampler.kernel.suited(energy, coefficients)
        return _weighing(replace(sampler, kernel=kernel), energy, coefficients), num_steps
    return sampler.suited(energy, coefficients), num_steps


def _weighing(sampler: Annealed, energy: Energy, coefficients: Tensor) -> Annealed:
    """The sampler as particles where that is possible: those that were stored, or by the verdict."""
    if sampler.schedule.noise_level is None or not sampler.schedule.predict:
        return sampler
    try:
        carrier(energy, coefficients)
    except NotCarriedError:
        return sampler.plain if isinstance(sampler, Particles) else sampler
    return (
        sampler
        if isinstance(sampler, Particles)
        else Particles(sampler.kernel, sampler.schedule, verdict=True)
    )


def _total_weight(energy: Energy, coefficients: Tensor) -> float:
    """A bound on the gradient of a composition, in units of the gradient of one density.

    Values of one expert share a density, and what they say beside it is small.
    """
    if not isinstance(energy, (Sum, Mixture, Not)):
        return 1.0
    own, blocks = energy.split(coefficients)
    bounds = [_total_weight(child, block) for child, block in zip(energy.operands, blocks, strict=True)]
    if not isinstance(energy, Sum):
        return max(bounds)
    net: dict[Hashable, Tensor] = {}
    for i, (term, bound) in enumerate(zip(energy.operands, bounds, strict=True)):
        if not term.likelihood:
            density = term.marginal() or term
            net[density.key] = net.get(density.key, torch.zeros(())) + own[..., i].cpu() * bound
    if not net:
        return 1.0
    return float(torch.stack(torch.broadcast_tensors(*net.values())).abs().sum(0).max())


def _start_level(sampler: Sampler) -> float | None:
    curve = sampler.schedule.noise_level if isinstance(sampler, Annealed) else None
    return None if curve is None else curve(0.0)


def check_positive_term(energy: Energy, coefficients: Tensor | None = None) -> None:
    """Raises ValueError if exp(-E) has no reason to be a density."""
    coefficients = energy.coefficients if coefficients is None else coefficients
    if coefficients.shape[-1:] != (energy.num_coefficients,):
        return  # refused, with its shape, once the batch is known
    if isinstance(energy, Mixture):
        for component, block in zip(energy.operands, energy.split(coefficients)[1], strict=True):
            check_positive_term(component, block)
    if isinstance(energy, Sum) and not (energy.split(coefficients)[0] > 0).any(dim=-1).all():
        raise ValueError(
            f"{energy} has no term with a positive weight, so exp(-E) has no reason to be a density: "
            "add the expert to start from, e.g. base + ratio(a, b), or use ~a for a bounded NOT."
        )


def _device(energy: Energy, init: object, wanted: torch.device | None = None) -> torch.device:
    tensors = [*energy.parameters(), *energy.buffers()]
    if isinstance(init, Tensor):
        tensors.append(init)
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the energies and `init` are on several devices, {sorted(map(str, devices))}: move them to one."
        )
    if wanted is None:
        return devices.pop() if devices else torch.device("cpu")
    wanted = torch.empty(0, device=wanted).device  # cuda means cuda:0
    if devices and devices != {wanted}:
        raise ValueError(
            f"{energy} is on {devices.pop()}, this engine on {wanted}: move it, energy.to({str(wanted)!r})."
        )
    return wanted


def calibrated_steps(energy: Energy) -> int:
    """The steps that the experts of a composition were calibrated with, or the default."""
    known = [leaf.sampler_settings.get("num_steps", 0) for leaf in energy.leaves() if leaf.sampler_settings]
    return max(known, default=0) or DEFAULT_STEPS

"""`sample`: from a composition to a `SampleResult`."""

from __future__ import annotations

import time
from numbers import Integral
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, Not, NotCarriedError, Sum, carrier
from composable_ebm.energy.weights import as_tensor
from composable_ebm.potential.plan import FusedPotential
from composable_ebm.sampling import graphs
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.block import Block, Held, Rows, Sampler
from composable_ebm.sampling.chains import Callback, Chain, divergence_of, evaluating, trace_of
from composable_ebm.sampling.kernel import Noise
from composable_ebm.sampling.particles import Particles, carried
from composable_ebm.sampling.result import SampleResult, check_terms, draw_from
from composable_ebm.sampling.settings import from_settings

DEFAULT_STEPS = 200
DEFAULT_CHAINS = 16

__all__ = ["calibrated_sampler", "check_positive_term", "initial_states", "sample"]


@runtime_checkable
class Images(Protocol):
    """A data set to start chains from."""

    def __len__(self) -> int: ...
    def batch(self, index: Tensor) -> Tensor: ...


@torch.inference_mode(False)  # the gradient is needed, whatever mode the caller is in
def sample(
    energy: Energy,
    *others: object,
    num_chains: int | None = None,
    num_steps: int | None = None,
    sampler: Sampler | None = None,
    init: Tensor | Images | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    coefficients: Tensor | None = None,
    mask: Tensor | None = None,
    held: Held = "clean",
    num_warmup: int = 0,
    keep_every: int | None = None,
    callback: Callback | None = None,
    callback_every: int = 1,
    on_divergence: Literal["raise", "report"] = "raise",
) -> SampleResult:
    """Draws from exp(-E(x)/T) with many chains at once.

    Runs on the device that the energy's parameters are on. Global random state is neither read
    nor changed: the same seed gives the same samples on the same kind of device.

    Args:
        energy: A composition with at least one term of positive weight.
        num_chains: Number of chains; that of `init` unless given, else 16. With `Particles` they are drawn
            from more of them.
        num_steps: Steps of the kernel after warm-up; what the experts were calibrated with unless
            given, else 200.
        sampler: A kernel, an annealed one, or `Particles`; what the experts were calibrated with unless
            given, with its step divided by the sum of the absolute weights, and as `Particles` where the
            composition is one density times probabilities (see `Particles`).
        init: States to start from, (batch, *event), or pictures where states are latents, or a data
            set to draw `num_chains` of them from. Unless given: noise of the first noise level of the
            schedule, or else uniform over the data range (fair coins for bits), or standard normal where
            there is none.
        seed: Seeds the noise; 0 unless given.
        generator: Draws the noise instead of a seed, on the energy's device.
        coefficients: Replaces the coefficients of the composition, (n,) or (batch, n).
        mask: 1 where states may move and 0 where they are held at `init`; broadcasts over
            (batch, *event), or over the pictures where states are latents. Inpainting: the free part is
            sampled given the rest.
        held: "clean": what is held is `init` throughout. "noisy": it carries the noise of the level,
            one draw that fades with the schedule, as noise-conditioned energies expect it; once the
            noise is gone it is `init` again. The free part starts at `init` as ever.
        num_warmup: Extra steps at the start in which a kernel with a `target_acceptance` adapts.
        keep_every: Keeps the states every so many steps in `trajectory`.
        callback: `callback(step, chain)` every `callback_every` steps, for live frames; the states
            are `chain.x`. Returning True ends the run there.
        callback_every: Steps between calls.
        on_divergence: "raise" a ChainDivergedError, or "report" it in the result.
    Raises:
        ValueError: If the request makes no sense; the message says why.
        ChainDivergedError: If a chain stops being finite.
    Example:
        >>> out = sample(smile + 2 * glasses, num_chains=16, seed=0)
        >>> print(out.report())
    """
    if others:
        raise TypeError(
            "`sample` takes the energy, and all else by name: "
            f"sample(energy, num_chains={others[0] if isinstance(others[0], int) else 16})."
        )
    for name, value in (
        ("keep_every", 1 if keep_every is None else keep_every),
        ("callback_every", callback_every),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if seed is not None and generator is not None:
        raise ValueError("give a `seed` or a `generator`, not both.")
    seed = 0 if seed is None and generator is None else seed
    coefficients = as_tensor(coefficients)
    asked = prepare(
        energy,
        num_chains=num_chains,
        num_steps=num_steps,
        sampler=sampler,
        init=init,
        seed=seed,
        generator=generator,
        coefficients=coefficients,
        mask=mask,
        held=held,
        num_warmup=num_warmup,
        on_divergence=on_divergence,
    )
    start = time.perf_counter()
    total = num_warmup + asked.num_steps
    chain = Chain(
        energy,
        asked.x,
        asked.sampler,
        Noise((asked.generator, len(asked.x))),
        num_steps=total,
        coefficients=coefficients,
        mask=asked.mask,
        held=held,
        num_warmup=num_warmup,
        graphs=graphs.shared(asked.x.device),
    )
    kept = [chain.x] if keep_every else []
    while chain.num_steps < total:
        done = chain.num_steps
        stops = [total]
        if keep_every:
            stops.append((done // keep_every + 1) * keep_every)
        if callback is not None:
            stops.append((done // callback_every + 1) * callback_every)
        chain.advance(min(stops) - done)
        if keep_every and chain.num_steps % keep_every == 0:
            kept.append(chain.x)
        called = callback is not None and (chain.num_steps % callback_every == 0 or chain.num_steps == total)
        if called and callback(chain.num_steps, chain) is True:  # type: ignore[misc]
            break

    return conclude(
        chain.potential,
        chain.block,
        chain.rows,
        asked.num_chains,
        trajectory=torch.stack(kept) if kept else None,
        seed=seed,
        start=start,
        evaluations=chain.potential.evaluations,
        path=chain.potential.plan.describe(),
        warmup=num_warmup,
        on_divergence=on_divergence,
    )


class Prepared(NamedTuple):
    """A request that makes sense, with its starting states drawn."""

    x: Tensor
    generator: torch.Generator
    sampler: Sampler
    num_steps: int
    mask: Tensor | None
    num_chains: int


def prepare(
    energy: Energy,
    *,
    num_chains: int | None,
    num_steps: int | None,
    sampler: Sampler | None,
    init: Tensor | Images | None,
    seed: int | None,
    generator: torch.Generator | None,
    coefficients: Tensor | None,
    mask: Tensor | None,
    held: str,
    num_warmup: int,
    on_divergence: str,
    device: torch.device | None = None,
) -> Prepared:
    """Checks a request and draws its starting states; arguments as those of `sample`.

    Args:
        device: Where the energy must be; wherever it is unless given.
    """
    if not isinstance(energy, Energy):
        raise TypeError(
            f"`energy` must be an Energy, got {type(energy).__name__}; wrap it with from_callable."
        )
    init, mask = as_tensor(init), as_tensor(mask)
    check_positive_term(energy, coefficients)
    if sampler is None:
        sampler, calibrated_steps = calibrated_sampler(energy, coefficients)
        if isinstance(sampler, Particles) and init is not None:
            sampler = sampler.plain
        num_steps = calibrated_steps if num_steps is None else num_steps
    num_steps = DEFAULT_STEPS if num_steps is None else num_steps
    for name, value in (("num_steps", num_steps), ("num_warmup", num_warmup)):
        if not isinstance(value, Integral) or value < 0:
            raise ValueError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
    if on_divergence not in ("raise", "report"):
        raise ValueError(f'`on_divergence` must be "raise" or "report", got {on_divergence!r}.')
    if held not in ("clean", "noisy"):
        raise ValueError(f'`held` must be "clean" or "noisy", got {held!r}.')
    if held == "noisy" and (mask is None or not ((mask == 0) | (mask == 1)).all()):
        raise ValueError('held="noisy" needs a `mask` of zeros and ones, which says what is held.')
    if mask is not None and init is None:
        raise ValueError("a `mask` holds part of given states: give them as `init`.")
    device = _device(energy, init, device)
    if generator is None:
        generator = torch.Generator(device).manual_seed(0 if seed is None else int(seed))
    count = num_chains
    if isinstance(sampler, Particles):
        if init is not None:
            raise ValueError(
                "Particles start from noise, and weigh how the chains came from there; chains that start at "
                f"`init` run without weights: sampler=Annealed({sampler.kernel}, schedule)."
            )
        carried(sampler, energy, coefficients)  # complains where there is none
        count = sampler.count(_checked_count(num_chains))
    x = initial_states(energy, count, init, generator, device)
    if init is None and (start_level := _start_level(sampler)) is not None:
        x = start_level * torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    fitting = None if mask is None else _fitting_mask(mask, x, energy)
    asked = _checked_count(num_chains) if isinstance(sampler, Particles) else len(x)
    return Prepared(x, generator, sampler, int(num_steps), fitting, asked)


def conclude(
    potential: FusedPotential,
    block: Block,
    rows: Rows,
    num_chains: int,
    *,
    trajectory: Tensor | None,
    seed: int | None,
    start: float,
    evaluations: int,
    path: str,
    warmup: int,
    on_divergence: str,
) -> SampleResult:
    """What a run gives back.

    Raises:
        ChainDivergedError: If a chain stopped being finite, and that is to be raised.
    """
    x = rows.state.x
    potential.noise_level = block.noise_level
    trace = trace_of(block, rows)
    weighted = None
    with evaluating(block.energy.modules()):
        if block.population is not None and isinstance(block.sampler, Particles):
            weighted = draw_from(block, x, num_chains, potential)
            x, rows, trace = x[weighted.chosen], rows.picked(weighted.chosen), trace.of(weighted.chosen)
            trajectory = None if trajectory is None else trajectory[:, weighted.chosen]
            if potential.coefficients.ndim > 1:
                potential.coefficients = potential.coefficients[weighted.chosen]
        checks = check_terms(potential, x)
        energies = potential.energy(x)
    divergence = divergence_of(rows)
    seconds = time.perf_counter() - start if x.device.type == "cpu" else _finished(start)
    if on_divergence == "raise" and divergence.any:
        raise divergence.error(float(block.dynamics.step_size.max()))
    return SampleResult(
        samples=x,
        energies=energies,
        trace=trace,
        trajectory=trajectory,
        recipe=str(block.energy),
        sampler=block.sampler,
        num_steps=block.num_steps,
        seed=seed,
        seconds=seconds,
        evaluations=evaluations,
        path=path,
        stepping=block.stepping,
        divergence=divergence,
        checks=checks,
        warmup=warmup,
        data_range=block.energy.data_range,
        codec=block.energy.codec,
        weighted=weighted,
        temperatures=tuple(
            (str(e), e.temperature) for e in block.energy.leaves() if e.temperature is not None
        ),
        has_value=block.energy.has_value,
    )


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

    Of several experts, the one with the most steps decides. The step is divided by the sum over
    networks of their absolute net weight, so that adding experts does not blow up the chain; a ratio
    of two values of one expert adds nothing. The temperature stays. Where that kernel cannot sample the
    composition, as `Gibbs` cannot when a network joins an RBM, its relaxation takes its place. An
    annealing over noise levels becomes `Particles` that go by the experts' verdict where the composition
    is one density times probabilities.

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
        return _weighing(Annealed(kernel, sampler.schedule), energy, coefficients), num_steps
    return sampler.suited(energy, coefficients), num_steps


def _weighing(sampler: Annealed, energy: Energy, coefficients: Tensor) -> Annealed:
    """The sampler as particles where that is possible."""
    if sampler.schedule.noise_level is None or not sampler.schedule.predict:
        return sampler
    try:
        carrier(energy, coefficients)
    except NotCarriedError:
        return sampler
    return Particles(sampler.kernel, sampler.schedule, verdict=True)


def _total_weight(energy: Energy, coefficients: Tensor) -> float:
    """A bound on the gradient of a composition, in units of the gradient of one expert."""
    if not isinstance(energy, (Sum, Mixture, Not)):
        return 1.0
    own, blocks = energy.split(coefficients)
    bounds = [_total_weight(child, block) for child, block in zip(energy.operands, blocks, strict=True)]
    if not isinstance(energy, Sum):
        return max(bounds)
    net: dict[int, Tensor] = {}
    for i, (term, bound) in enumerate(zip(energy.operands, bounds, strict=True)):
        shared = id(term.body() or term)
        net[shared] = net.get(shared, torch.zeros(())) + own[..., i].cpu() * bound
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


def _finished(start: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - start

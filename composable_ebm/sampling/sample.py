"""`sample`: from a composition to a `SampleResult`."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor

from composable_ebm.energy import Energy
from composable_ebm.potential.evaluating import evaluating
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling import graphs
from composable_ebm.sampling.block import Block, Held, Rows, Sampler
from composable_ebm.sampling.chain import Callback, Chain
from composable_ebm.sampling.particles import Particles
from composable_ebm.sampling.request import Images, Request
from composable_ebm.sampling.result import SampleResult, check_terms, draw_from
from composable_ebm.sampling.trace import divergence_of, trace_of

__all__ = ["conclude", "sample"]


@torch.inference_mode(False)  # the gradient is needed, whatever mode the caller is in
def sample(
    energy: Energy,
    *others: object,
    num_chains: int | None = None,
    num_steps: int | Literal["calibrated"] = "calibrated",
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
    if num_steps is None:
        raise ValueError("`sample` comes to an end: give `num_steps`, or submit the run to an `Engine`.")
    seed = 0 if seed is None and generator is None else seed
    request = Request(
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
    asked = request.begin()
    start = time.perf_counter()
    total = num_warmup + asked.num_steps
    chain = Chain(
        energy,
        asked.x,
        asked.sampler,
        asked.noise,
        num_steps=total,
        coefficients=request.coefficients,
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
        evaluations=chain.block.tally.gradients,
        path=chain.potential.describe(),
        warmup=num_warmup,
        on_divergence=on_divergence,
    )


def conclude(
    potential: Potential,
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
    potential = potential.at(noise_level=block.noise_level)
    trace = trace_of(block, rows)
    weighted = None
    with evaluating(block.energy.modules()):
        if block.population is not None and isinstance(block.sampler, Particles):
            weighted = draw_from(block, x, num_chains, potential)
            x, rows, trace = x[weighted.chosen], rows.picked(weighted.chosen), trace.of(weighted.chosen)
            trajectory = None if trajectory is None else trajectory[:, weighted.chosen]
            if potential.coefficients.ndim > 1:
                potential = potential.at(coefficients=potential.coefficients[weighted.chosen])
        checks, energies = check_terms(potential, x)
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


def _finished(start: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - start

"""What a run of the sampler gives back, and what it says about itself."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from composable_ebm.data.ranges import as_images
from composable_ebm.energy import Codec, Energy, Mixture, Sum, flat, satisfied, settled
from composable_ebm.potential.plan import Plan
from composable_ebm.potential.potential import Potential
from composable_ebm.sampling import diagnostics
from composable_ebm.sampling.block import Block, Sampler
from composable_ebm.sampling.kernel import Kernel, Noise
from composable_ebm.sampling.particles import Particles, Weighted, drawn, error_of, systematic
from composable_ebm.sampling.settings import to_settings
from composable_ebm.sampling.trace import Divergence, Trace

STUCK = 0.01
"""Mean acceptance below which a kernel is said not to move."""
UNMIXED = 1.1
ENOUGH_DRAWS = 100
"""Steps from which R-hat is held against a run."""
LEAST_DOUBT, DOUBT, MOST_DOUBT = 1e-5, 0.1, 0.2
"""How much experts may doubt samples where their verdict is asked for and particles are to spare: as little
as nine in ten pictures, but a tenth at most; a fifth if that is asking too much. A model draws pictures that
are between two values, where data has few."""

__all__ = ["SampleResult", "TermCheck", "check_terms", "draw_from"]


@dataclass(frozen=True)
class TermCheck:
    """Whether the samples satisfy one term of the request.

    Attributes:
        term: Its text, with its weight.
        energy: Mean weighted energy over the samples, in nats; NaN if only its gradient is known.
        failed: Share of the samples that the term calls unlike its own, or None if it cannot tell.
        avoided: True if the request was to stay away from it.
        probability: Mean p(value | x) over the samples, of a value of an expert or a classifier.
    """

    term: str
    energy: float
    failed: float | None
    avoided: bool
    probability: float | None = None

    @property
    def height(self) -> str:
        """The mean energy as text, or what the expert thinks of the samples."""
        if self.probability is not None:
            return f"p = {self.probability:.3f}"
        return "known by its gradient" if math.isnan(self.energy) else f"{self.energy:.4g} nats"

    @property
    def sentence(self) -> str:
        """What to tell a person, or nothing if the term is met."""
        if self.failed is None or self.failed < 0.5:
            return ""
        share = f"{100 * self.failed:.0f} % of the samples"
        if self.avoided:
            return f"{share} lie where {self.term.lstrip('-')} is likely, which {self.term} asks to avoid"
        if self.probability is not None:
            return f"{share} do not satisfy {self.term}: it thinks them likelier to be something else"
        return f"{share} do not satisfy {self.term}: its energy there is far above that of its own samples"


def check_terms(potential: Potential, x: Tensor) -> tuple[list[TermCheck], Tensor]:
    """Holds the samples against each term of the composition, and tells their energies, (batch,).

    A value of an expert is failed by a state that the expert thinks likelier to be something else; any other
    term with positive weight by one whose energy lies above the term's own range, by more than the width of
    that range. A term with negative weight, where the weights sum to
    less than 1 (so that it is no shared base being counted once), is failed by a state that the
    term itself finds typical.
    """
    composition = potential.composition
    with torch.no_grad():
        leaves = leaf_energies(composition, x, potential.noise_level)
        coefficients = potential.coefficients
        if isinstance(composition, Sum):
            own, blocks = composition.split(coefficients)
            operands = list(composition.operands)
            weights = [own[..., i] for i in range(len(operands))]
        else:
            operands, blocks, weights = [composition], [coefficients], [x.new_ones(())]
        net = torch.stack([w.double().mean() for w in weights]).sum()
        checks = []
        for term, block, weight in zip(operands, blocks, weights, strict=True):
            energies = term.combine(leaves, block)
            mean_weight = float(f"{float(weight.mean()):.6g}")  # as written, not as float32 holds it
            failed: Tensor | None = None
            probability = _posterior(term, energies, leaves) if mean_weight > 0 and term.has_value else None
            if probability is not None:
                failed = probability < 0.5
            elif mean_weight > 0:
                failed = term.unlike(energies)
            elif mean_weight < 0 and net < 1 - 1e-6 and term.energy_range is not None:
                failed = energies <= term.energy_range[1]
            checks.append(
                TermCheck(
                    str(mean_weight * term) if mean_weight else f"0*{term}",
                    float((weight * energies).mean()) if term.has_value else math.nan,
                    None if failed is None else float(failed.float().mean()),
                    mean_weight < 0,
                    None if probability is None else float(probability.mean()),
                )
            )
        return checks, composition.combine(leaves, coefficients)


def _posterior(term: Energy, energies: Tensor, leaves: Mapping[Hashable, Tensor]) -> Tensor | None:
    """p(value | x) of a term, (batch,), or None where it is a density of its own."""
    if term.likelihood:
        return torch.exp(-energies)
    marginal = term.marginal()
    if marginal is None or marginal.key == term.key:
        return None
    return torch.exp(marginal.combine(leaves, marginal.coefficients.to(energies)) - energies)


def draw_from(block: Block, x: Tensor, num_chains: int, potential: Potential) -> Weighted:
    """Draws the chains that were asked for from the particles of a block.

    Args:
        block: A block with a population.
        x: Its states, (particles, *event).
        num_chains: How many to draw.
        potential: That of its composition, at the noise level of the states.
    """
    population, sampler, carrier = block.population, block.sampler, block.carrier
    assert population is not None
    assert isinstance(sampler, Particles)
    assert carrier is not None
    log_weights, unmet, sure = population.log_weights, False, None
    with torch.no_grad():
        composition = block.energy
        # A shared potential has a composition of its own, with every weight among its coefficients.
        own = potential.coefficients if potential.composition is composition else composition.coefficients
        coefficients = own.to(x)
        energies = leaf_energies(composition, x, potential.noise_level)
        met = satisfied(composition, energies, coefficients)
        in_force: Mapping[Hashable, Tensor] = energies
        if met is not None:
            unmet = not bool(met.any())
            if sampler.verdict and not unmet:
                certain = settled(composition, energies)
                assert certain is not None
                before, after = (composition.combine(e, coefficients) for e in (energies, certain))
                log_weights = torch.where(met, log_weights + before - after, -torch.inf)
                in_force = certain
                if sampler.surest:
                    sure = _surest(composition, energies, coefficients, num_chains)
        of = _components(composition, in_force, coefficients, block.noise)
    log_probability = population.log_mean + torch.logsumexp(log_weights, 0) - math.log(len(x))
    preferred = log_weights if sure is None else torch.where(sure, log_weights, -torch.inf)
    u = block.noise.number(x)
    index = drawn(preferred, num_chains, u) if of is None else _in_proportion(preferred, *of, num_chains, u)
    return Weighted(
        states=x,
        log_weights=log_weights,
        chosen=index,
        ancestors=population.ancestors,
        ess=torch.stack(population.ess) if population.ess else x.new_zeros(0),
        log_probability=float(log_probability),
        error=error_of(log_weights, population.ancestors),
        carrier=carrier,
        unmet=unmet,
    )


def _components(
    composition: Energy, energies: Mapping[Hashable, Tensor], coefficients: Tensor, noise: Noise
) -> tuple[Tensor, Sequence[float]] | None:
    """A component of a calibrated OR for each particle, (particles,), and their shares; None elsewhere.

    Drawn by how likely the particle is of each, since a picture may be of several.
    """
    if not isinstance(composition, Mixture) or composition.proportions is None:
        return None
    edges = composition.responsibilities(energies, coefficients).cumsum(1)
    drawn_at = noise.uniform(edges)[:, None] * edges[:, -1:]
    return (drawn_at >= edges).sum(1).clamp(max=edges.shape[1] - 1), composition.proportions


def _in_proportion(
    log_weights: Tensor, of: Tensor, proportions: Sequence[float], count: int, u: Tensor
) -> Tensor:
    """Indices (count,) of a draw in which components come as often as a calibrated OR asks for.

    By weights alone their shares scatter as those of few particles do, and by the errors of log Zᵢ.

    Args:
        log_weights: (n,).
        of: Component of each, (n,).
        proportions: Shares of the components.
        count: How many.
        u: Uniform on [0, 1), ().
    Reference:
        Owen (2013), Monte Carlo theory, methods and examples, section 8.4, on stratification.
    """
    places = systematic(log_weights.new_tensor(proportions), count, u)
    chosen = []
    for component, wanted in enumerate(torch.bincount(places, minlength=len(proportions)).tolist()):
        members = ((of == component) & log_weights.isfinite()).nonzero()[:, 0]
        if wanted and not len(members):
            return drawn(log_weights, count, u)  # nobody is left of one
        if wanted:
            chosen.append(members[drawn(log_weights[members], wanted, u)])
    return torch.cat(chosen).sort().values


def _surest(
    composition: Energy, energies: Mapping[Hashable, Tensor], coefficients: Tensor, count: int
) -> Tensor | None:
    """The particles of the strictest verdict that `count` of them meet, (particles,), or None.

    Of pictures' doubts first, then of ten times as much, and so on. Not so with an OR, of which the surer
    component would be drawn alone.
    """
    leaves = {leaf.key: leaf.doubt for leaf in composition.leaves()}
    factors = () if _has_alternatives(composition) else (1, 10, 100, 1000)
    verdicts = [
        {key: min(max(doubt, LEAST_DOUBT) * f, DOUBT) for key, doubt in leaves.items()} for f in factors
    ]
    for doubts in (*verdicts, dict.fromkeys(leaves, DOUBT), dict.fromkeys(leaves, MOST_DOUBT)):
        met = satisfied(composition, energies, coefficients, doubts)
        if met is not None and int(met.sum()) >= count:
            return met
    return None


def _has_alternatives(composition: Energy) -> bool:
    """Whether there is an OR in a composition."""
    return isinstance(composition, Mixture) or any(
        map(_has_alternatives, getattr(composition, "operands", ()))
    )


def leaf_energies(composition: Energy, x: Tensor, noise_level: Tensor | None) -> dict[Hashable, Tensor]:
    """Energies of the leaves of a composition and of their marginals, by key, (batch,) each."""
    marginals = [m for leaf in composition.leaves() if (m := leaf.marginal()) is not None]
    whole = Sum([composition, *marginals]) if marginals else composition
    return Plan(whole)(x, noise_level)


@dataclass(frozen=True)
class SampleResult:
    """Samples, and how they came about.

    Attributes:
        samples: Final states, (batch, *event); `images` are pictures of them.
        energies: Their energies in nats, (batch,).
        trace: Energy, gradient norm, acceptance and step size of every step.
        trajectory: States every `keep_every` steps, (kept, batch, *event), the start included, or None.
        recipe: The composition as text.
        sampler: The kernel or annealed kernel that ran.
        num_steps: Steps taken, warm-up included.
        seed: Seed of the noise, or None if a generator was given.
        seconds: Wall time of the run.
        evaluations: Gradient evaluations per chain.
        path: How the energies were evaluated, in a line.
        stepping: How many steps were replayed from a captured graph, and why not the others; empty where
            steps are not captured, as on a CPU.
        divergence: Which chains diverged.
        checks: Whether the samples satisfy each term.
        warmup: Steps left out of ESS, R-hat and mean acceptance.
        data_range: Smallest and largest value of the data, black and white of a picture of them.
        weighted: What the particles said that the samples were drawn from, with `Particles`.
        temperatures: Names of the energies whose temperature of calibration is known, and that.
        has_value: Whether `energies` are energies; of scores only the gradient is known.
        codec: What decodes the samples, where they are latents.
    """

    samples: Tensor
    energies: Tensor
    trace: Trace
    trajectory: Tensor | None
    recipe: str
    sampler: Sampler
    num_steps: int
    seed: int | None
    seconds: float
    evaluations: int
    path: str
    divergence: Divergence
    checks: list[TermCheck]
    warmup: int
    data_range: tuple[float, float] | None = None
    has_value: bool = True
    stepping: str = ""
    codec: Codec | None = None
    weighted: Weighted | None = None
    temperatures: tuple[tuple[str, float], ...] = ()

    @functools.cached_property
    def images(self) -> Tensor:
        """The samples as pictures in [-1, 1]: decoded where they are latents."""
        if self.codec is None:
            return as_images(self.samples, self.data_range)
        return self.codec.pictures(self.samples)

    @property
    def kernel(self) -> Kernel:
        """The kernel, without its schedule."""
        return self.sampler if isinstance(self.sampler, Kernel) else self.sampler.kernel

    @property
    def ess(self) -> float:
        """Bulk effective sample size over the second half of the run: the least of the energy and the states.

        States are looked at along a few directions, since chains that are stuck in different modes may
        have the same energies.
        """
        return min(map(diagnostics.ess, self._settled()), key=lambda value: (value == value, value))

    @property
    def r_hat(self) -> float:
        """Split R-hat over the second half of the run: the largest of the energy and the states."""
        return max(map(diagnostics.r_hat, self._settled()), key=lambda value: (value == value, value))

    @property
    def log_weights(self) -> Tensor:
        """Weights of `weighted.states`, (particles,), up to a constant."""
        return self._particles().log_weights

    @property
    def log_probability(self) -> float:
        """log p(request) under the density that carried the particles, in nats; error in `weighted`."""
        return self._particles().log_probability

    @property
    def num_ancestors(self) -> int:
        """How many of the first particles the samples descend from."""
        return self._particles().num_ancestors

    def _particles(self) -> Weighted:
        if self.weighted is None:
            raise AttributeError(
                f"these samples were drawn by {self.sampler}, which weighs nothing; sample with "
                "`Particles`, which is the default where the composition is one density times probabilities."
            )
        return self.weighted

    @property
    def acceptance_rate(self) -> float | None:
        """Mean probability of acceptance after warm-up; None where every step is taken."""
        accepted = self.trace.acceptance
        return None if accepted is None or not len(accepted) else float(accepted[self.warmup :].mean())

    @property
    def implied_temperature(self) -> float:
        """The T whose Langevin dynamics has the step and noise of this run."""
        return self.kernel.implied_temperature

    @property
    def problems(self) -> list[str]:
        """What is wrong with these samples, in sentences; empty if nothing was noticed."""
        found = [check.sentence for check in self.checks if check.sentence]
        if found:
            found.append("the request may be impossible, or its weights too far apart, or the run too short")
        if self.weighted is not None and self.weighted.unmet:
            found.insert(0, f"no particle meets the request: {self.weighted.sentence}")
        if self.divergence.any:
            count = int(self.divergence.chains.sum())
            found.insert(0, f"{count} of {len(self.samples)} chains diverged and were frozen")
        return [*found, *self._doubts()]

    def _doubts(self) -> list[str]:
        """What speaks against the run as such, in sentences."""
        found = []
        rate = self.acceptance_rate
        if rate is not None and rate < STUCK:
            found.append(
                f"the kernel hardly moves: {100 * rate:.2g} % of its proposals are accepted; take a smaller "
                "step, or a `target_acceptance` with `num_warmup`"
            )
        enough = isinstance(self.sampler, Kernel) and self.num_steps - self.warmup >= ENOUGH_DRAWS
        if enough and (r_hat := self.r_hat) > UNMIXED:
            found.append(
                f"the chains have not mixed: R-hat {r_hat:.2f} of energy and states (1.01 is good); they "
                "need more steps, or sit in modes between which they do not travel"
            )
        if self.data_range is not None and len(self.samples):
            low, high = self.data_range
            beyond = (flat(self.samples) - (low + high) / 2).abs().amax(1) > high - low
            if count := int(beyond.sum()):
                found.append(
                    f"{count} of {len(self.samples)} samples lie far outside the data, which are between "
                    f"{low:g} and {high:g}"
                )
        if len({temperature for _, temperature in self.temperatures}) > 1:
            texts = ", ".join(f"{name} at {temperature:.3g}" for name, temperature in self.temperatures)
            found.append(
                f"the experts were calibrated at different temperatures ({texts}): their energies are in no "
                "common unit, and weights between them mean nothing"
            )
        return found

    def report(self) -> str:
        """The run in text: settings, speed, convergence, terms, and anything that looks wrong."""
        rate = self.num_steps / self.seconds if self.seconds else float("inf")
        rows = [
            ("recipe", self.recipe),
            ("sampler", f"{self.sampler}"),
            (
                "run",
                f"{len(self.samples)} chains, {self.num_steps} steps, {self.seconds:.2f} s ({rate:.0f}/s)",
            ),
            ("evaluated as", self.path),
            *([("stepped as", self.stepping)] if self.stepping else []),
            ("energy", self._energy_line()),
            ("temperature", f"{self.implied_temperature:.3g}"),
        ]
        if self.acceptance_rate is not None:
            rows.append(("acceptance", f"{self.acceptance_rate:.3f}"))
        if isinstance(self.sampler, Kernel):  # every annealed chain is one draw
            draws = self._settled()[0].numel()
            settled = f"ESS {self.ess:.0f} of {draws}, R-hat {self.r_hat:.3f}"
            rows.append(("convergence", f"{settled} (energy and states, second half)"))
        if self.weighted is not None:
            w = self.weighted
            rows.append(
                (
                    "particles",
                    f"{len(w.states)}, {self.num_ancestors} ancestors of {len(self.samples)} samples, least "
                    f"effective share {float(w.ess.min()) if len(w.ess) else 1.0:.2f}",
                )
            )
            rows.append(("probability", w.sentence))
        rows.append(("diverged", f"{int(self.divergence.chains.sum())} of {len(self.samples)}"))
        rows += [("term" if i == 0 else "", f"{c.term}: {c.height}") for i, c in enumerate(self.checks)]
        rows += [("PROBLEM", problem) for problem in self.problems]
        return "\n".join(f"{label:>13}  {text}" for label, text in rows)

    def _energy_line(self) -> str:
        if not self.has_value:
            return "known only by its gradient, in part or whole"
        return f"{float(self.energies.mean()):.4g} ± {float(self.energies.std(correction=0)):.2g} nats"

    def provenance(self) -> dict[str, str]:
        """Recipe, seed, counts and sampler settings as text: enough to run it again."""
        try:
            sampler = json.dumps(to_settings(self.sampler))
        except ValueError:  # a schedule that follows a function
            sampler = str(self.sampler)
        counts = {"num_chains": len(self.samples), "num_steps": self.num_steps, "seed": self.seed}
        return {"recipe": self.recipe, "sampler": sampler, **{k: str(v) for k, v in counts.items()}}

    def save(self, path: str | Path, columns: int | None = None) -> None:
        """Writes the pictures as one PNG grid, with `provenance` as text inside the file.

        Args:
            path: File to write.
            columns: Images a row; about a square unless given.
        """
        from composable_ebm.plotting import save_grid  # matplotlib is slow to load

        save_grid(self.images, path, columns, self.provenance())

    def plot_trace(self, path: str | Path) -> None:
        """Draws energy, gradient norm and acceptance along the chains to an image file."""
        from composable_ebm.plotting import plot_trace  # matplotlib is slow to load

        trace = self.trace
        plot_trace(trace.energy, trace.gradient_norm, trace.acceptance, self.recipe, path)

    def _settled(self) -> list[Tensor]:
        """Energies and states along some directions in the second half, (draws, chains) each."""
        columns = [*self.trace.projections.unbind(-1)]
        columns = [self.trace.energy, *columns] if self.has_value else columns
        kept = [column[self.warmup :] for column in columns]
        return [column[len(column) // 2 :] for column in kept]

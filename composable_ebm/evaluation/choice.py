"""NOT and OR: whether what was denied is absent, and whether an OR has the proportions asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, NotCarriedError, carrier, given
from composable_ebm.evaluation.composition import compose, draw
from composable_ebm.evaluation.judge import Judge, see
from composable_ebm.evaluation.rows import proportion, right
from composable_ebm.evaluation.task import Request, Task
from composable_ebm.experts.expert import Expert
from composable_ebm.partition.calibrate import calibrate
from composable_ebm.sampling.annealed import Annealed
from composable_ebm.sampling.request import calibrated_sampler
from composable_ebm.sampling.sample import sample

# Pairs of requests, of which every picture can meet only one.
ALTERNATIVES: dict[str, tuple[tuple[Request, Request], ...]] = {
    "digits": (({"digit": 3}, {"digit": 8}), ({"digit": 1}, {"digit": 7})),
    "faces": (({"beard": 1, "curly": 0}, {"beard": 0, "curly": 1}),),
    "shapes": (({"at_r0c0": 1}, {"at_r3c3": 1}),),
}
PROPORTIONS = (0.5, 0.8, 0.95)
METHODS = ("random choice", "uncalibrated", "calibrated")
CALIBRATION_CHAINS = 256

__all__ = ["alternatives", "negation"]


def negation(task: Task, judge: Judge, samples: int, seed: int) -> dict[str, dict]:
    """Accuracy of NOT, in each way to write it.

    "~b" alone must not show b. The others ask for a and not b, for random values of two attributes:
    "a - b" takes the difference of two energies as it stands; "a / p(b|x)" counts p(x) once and divides
    by the posterior of b; "a, ~b" asks for the other value of b, where there is one.

    Args:
        task: What there is to compose.
        judge: Says what is seen.
        samples: Samples of each way.
        seed: Seeds pairs and chains.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(task.terms)
    pairs: list[tuple[str, int, str, int]] = []
    for i in range(samples):
        a, b = torch.randperm(len(names), generator=generator)[:2].tolist() if len(names) > 1 else (0, 0)
        value_a, value_b = (
            list(task.terms[names[n]])[i // len(names) % len(task.terms[names[n]])] for n in (a, b)
        )
        pairs.append((names[a], value_a, names[b], value_b))
    pairs.sort()
    ways: dict[str, list[Energy]] = {"~b": [], "a - b": [], "a / p(b|x)": [], "a, ~b": []}
    for a, value_a, b, value_b in pairs:
        keeps, denies = task.terms[a][value_a], task.terms[b][value_b]
        ways["~b"].append(denies.complement())
        if a == b:
            continue
        ways["a - b"].append(keeps - denies)
        ground = keeps if task.base is None else given(task.base, keeps)
        ways["a / p(b|x)"].append(ground - denies.card.weight * (denies - denies["any"]))
        other = denies.complement()
        if isinstance(other, Expert):
            ways["a, ~b"].append(given(ground, other))
    found = {}
    for way, expressions in ways.items():
        if len(expressions) < len(pairs):
            continue
        seen = see(judge, task.family, draw(expressions, generator)[0])
        absent = torch.tensor([int(seen[b][i]) != v for i, (_, _, b, v) in enumerate(pairs)])
        present = torch.tensor([int(seen[a][i]) == v for i, (a, v, _, _) in enumerate(pairs)])
        found[way] = proportion(absent if way == "~b" else absent & present)
        found[way]["absent"] = round(float(absent.float().mean()), 4)
    return found


def alternatives(task: Task, judge: Judge, samples: int, seed: int) -> list[dict]:
    """Proportions of an OR, asked for at 50:50, 80:20 and 95:5.

    Args:
        task: What there is to compose.
        judge: Says what is seen.
        samples: Samples of each OR.
        seed: Seeds chains.
    Returns:
        For each pair, proportion and method: `share` of the first among samples that show exactly one,
        its error in points, and the accuracy, the share that shows one. The methods are "random choice"
        of one request for each sample, and mixtures, "uncalibrated", whose components come as often as
        their log Z has it, and "calibrated", with the log Z of each.
    """
    found = []
    for pair in ALTERNATIVES.get(task.family, ()):
        if any(name not in task.terms for request in pair for name in request):
            continue
        ways = _ways_to_write(pair, task, seed)
        for share in PROPORTIONS:
            for method in METHODS:
                if method not in ways:
                    continue
                generator = torch.Generator().manual_seed(seed)
                x = ways[method](share, samples, generator)
                found.append(
                    {
                        "first": _words(pair[0], task),
                        "second": _words(pair[1], task),
                        "requested": share,
                        "method": method,
                        **_shares(see(judge, task.family, x), pair, share),
                    }
                )
    return found


Drawing = Callable[[float, int, torch.Generator], Tensor]
"""From the share of the first request and a number: that many samples."""


def _ways_to_write(pair: Sequence[Request], task: Task, seed: int) -> dict[str, Drawing]:
    """Method -> how it draws, for the methods that there are for a pair."""
    components = [compose("ratio", request, task.terms, task.base) for request in pair]
    sampler, num_steps = calibrated_sampler(components[0])
    plain = Mixture(components)
    mixtures = {"uncalibrated": plain}
    if isinstance(sampler, Annealed) and sampler.schedule.noise_level is not None:
        try:
            carrier(plain)
        except NotCarriedError:
            sampler = Annealed(sampler.kernel, sampler.schedule)
        mixtures["calibrated"] = calibrate(
            plain, sampler, num_steps=num_steps, num_chains=CALIBRATION_CHAINS, seed=seed + 1
        )

    def choose(share: float, samples: int, generator: torch.Generator) -> Tensor:
        first = torch.rand(samples, generator=generator) < share
        return draw([components[0 if one else 1] for one in first.tolist()], generator)[0]

    def mix(mixture: Mixture, share: float, samples: int, generator: torch.Generator) -> Tensor:
        return sample(
            Mixture(mixture.operands, [share, 1 - share], mixture.log_z),
            num_chains=samples,
            generator=generator,
            on_divergence="report",
        ).samples

    return {"random choice": choose, **{name: partial(mix, each) for name, each in mixtures.items()}}


def _shares(seen: Mapping[str, Tensor], pair: Sequence[Request], requested: float) -> dict:
    first, second = (right(seen, [request] * len(next(iter(seen.values())))) for request in pair)
    one = first ^ second
    share = proportion(first[one])
    return {
        "share": share,
        "error_points": round(100 * (share["value"] - requested), 1),
        "accuracy": proportion(first | second),
    }


def _words(request: Request, task: Task) -> str:
    return " & ".join(str(task.terms[name][value]).split("/")[-1] for name, value in request.items())

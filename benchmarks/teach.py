"""How well an expert does that was taught from a handful of marked pictures: python benchmarks/teach.py.

For three attributes of which a family has trained experts, pictures of the test set are marked by their
labels, as a visitor of the mixer would mark them, and an expert is taught from them beside the family's base,
which knows no label. Every other picture of the test set tells how well it does; balanced over the two
values, so that a half is a guess. Then the taught expert is composed with the base, and the trained one says
how many of the samples have what was taught.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import RESULTS, write_results
from torch import Tensor

import composable_ebm as ceb
from composable_ebm.data import LabelledImages, load_data
from composable_ebm.experts import Expert
from composable_ebm.experts.teach import teach
from composable_ebm.sampling import Annealed
from composable_ebm.sampling.request import calibrated_sampler
from demos.mixer.lessons import DRAWN, DRAWN_STEPS

ATTRIBUTES = ("smile", "glasses", "beard")
MARKS = (6, 12, 24)  # of each kind
PICTURES = 600
SAMPLES = 32

__all__ = ["measure"]


def measure(family: str, attributes: Sequence[str], marks: Sequence[int], lessons: int) -> dict[str, Any]:
    """For each attribute and number of marks, means over lessons.

    Args:
        family: Of the experts, and of the data.
        attributes: What to teach.
        marks: Pictures of each kind.
        lessons: How often, each time with other pictures.
    """
    images = load_data(family, "test", num_images=PICTURES)
    base = ceb.load_expert(f"{family}/base")
    states = base.states(images.batch(torch.arange(len(images))))
    begun, drawn = time.perf_counter(), None
    if base.codec is not None:  # as the mixer does for its first lesson
        sampler, _ = calibrated_sampler(base)
        plain = Annealed(sampler.kernel, sampler.schedule)
        drawn = ceb.sample(base, num_chains=DRAWN, num_steps=DRAWN_STEPS, sampler=plain, seed=0).samples
    seconds = round(time.perf_counter() - begun, 2)
    told = lambda attribute, count, i: _lesson(images, states, base, drawn, attribute, count, i)  # noqa: E731
    taught = {
        attribute: {
            str(count): _means([told(attribute, count, i) for i in range(lessons)]) for count in marks
        }
        for attribute in attributes
    }
    return {"seconds_to_draw_unmarked": seconds, "taught": taught}


def _lesson(
    images: LabelledImages,
    states: Tensor,
    base: Expert,
    drawn: Tensor | None,
    attribute: str,
    count: int,
    seed: int,
) -> dict[str, float]:
    labels = images.labels[attribute]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    yes, no = (order[labels[order] == value][:count] for value in (1, 0))
    unseen = torch.ones(len(labels), dtype=torch.bool)
    unseen[torch.cat([yes, no])] = False
    expert = teach(base, f"taught_{attribute}", states[yes], states[no], unmarked=drawn)
    found = expert.network(states[unseen], None).argmin(1)
    told = expert.card.metrics
    right = {
        "accuracy": fmean(float((found[labels[unseen] == v] == v).float().mean()) for v in (0, 1)),
        "told": float(told["heldout_accuracy"]),
        "seconds": float(expert.card.training["seconds"]),
    }
    right["within_what_was_told"] = float(told["heldout_low"] <= right["accuracy"] <= told["heldout_high"])
    if seed:  # what takes most of the time is done once
        return right
    samples = ceb.sample(ceb.given(base, expert), num_chains=SAMPLES, seed=seed).samples
    judge = ceb.load_expert(f"{base.card.family}/{attribute}")
    level = torch.tensor(base.network.noise_range[0])
    with torch.no_grad():
        right["composed"] = float((judge.network(samples, level).argmin(1) == 1).float().mean())
    return right


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {name: round(fmean(each[name] for each in found if name in each), 3) for name in found[0]}
    return {**means, "worst": round(min(each["accuracy"] for each in found), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", default="faces")
    parser.add_argument("--attributes", nargs="*", default=ATTRIBUTES)
    parser.add_argument("--marks", type=int, nargs="*", default=MARKS, help="pictures of each kind")
    parser.add_argument("--lessons", type=int, default=5, help="each with other pictures")
    parser.add_argument("--num-threads", type=int, default=1, help="of the processor")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for teach-FAMILY.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    found = measure(arguments.family, arguments.attributes, arguments.marks, arguments.lessons)
    print("seconds to draw what nobody marked:", found["seconds_to_draw_unmarked"])
    for attribute, rows in found["taught"].items():
        for count, row in rows.items():
            print(f"{attribute:10} {count:>3} + {count:<3}", row)
    settings = {"lessons": arguments.lessons, "pictures": PICTURES, "samples": SAMPLES}
    print(write_results(f"teach-{arguments.family}", {**settings, **found}, arguments.out))


if __name__ == "__main__":
    main()

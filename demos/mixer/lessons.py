"""Experts that visitors teach: from pictures that they marked, beside the base of a family."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from composable_ebm import Annealed, Energy
from composable_ebm.experts import Expert, catalogue
from composable_ebm.experts.library import Library
from composable_ebm.experts.store import CONFIG, save_expert
from composable_ebm.experts.teach import LEAST, teach
from composable_ebm.sampling.request import calibrated_sampler

from . import pictures, starts
from .offer import Offer
from .session import Session
from .visitors import Visitor

MOST = 64  # marks of each kind
DRAWN, DRAWN_AT_ONCE, DRAWN_STEPS = 384, 64, 12  # latents that nobody marked; rough ones will do

__all__ = ["kept", "taught"]


def taught(
    sent: Any,
    visitor: Visitor,
    session: Session,
    offer: Offer,
    library: Library,
    drawn: MutableMapping[Energy, Tensor],
) -> Iterator[dict[str, Any]]:
    """What the page is told while an expert is taught from {"family", "name", "yes", "no"}.

    Args:
        sent: By the page.
        visitor: Who teaches.
        session: What ends it early.
        offer: What there is.
        library: The experts.
        drawn: Latents that bases have drawn; kept for the next lesson.
    Raises:
        ValueError: If it cannot be taught; the message says why.
    """
    sent = sent if isinstance(sent, dict) else {}
    family, name = str(sent.get("family", "")), _named(sent.get("name"))
    base = next((c.name for c in offer.known.values() if c.base and c.family == family), None)
    if base is None:
        raise ValueError(f"The family {family} has no base to teach beside.")
    if f"{family}/{name}" in offer.known:
        raise ValueError(f"There is an expert {family}/{name} already; choose another name.")
    energy = library[base]
    assert isinstance(energy, Expert)
    marks = {kind: _states(sent.get(kind), energy) for kind in ("yes", "no")}
    total = sum(map(len, marks.values()))
    yield {"kind": "teach", "said": f"Learning from {total} marked pictures; a few seconds."}
    begun = time.perf_counter()
    if energy.codec is not None and energy not in drawn:
        states = _drawn(energy, session)
        if session.stopped:
            yield {"kind": "end", "said": "Stopped: nothing was learned."}
            return
        drawn[energy] = states
    expert = teach(energy, name, marks["yes"], marks["no"], unmarked=drawn.get(energy))
    seconds = time.perf_counter() - begun
    visitor.learn(expert)
    told = expert.card.metrics
    sure = (
        f"{told['heldout_accuracy']:.0%} of marks told right while they were left out "
        f"({told['heldout_low']:.0%} to {told['heldout_high']:.0%})"
    )
    said = f"Learned {name.replace('_', ' ')} in {seconds:.1f} s: {sure}. Mark more, and it gets surer."
    yield {"kind": "taught", "name": name, "weight": expert.card.weight, "said": said, "sure": sure}


def _drawn(base: Expert, session: Session) -> Tensor:
    """Latents that the base draws; unfinished where it is stopped."""
    sampler, _ = calibrated_sampler(base)
    if isinstance(sampler, Annealed):
        sampler = Annealed(sampler.kernel, sampler.schedule)  # each by itself
    options = {"sampler": sampler, "on_divergence": "report"}
    seeds = range(DRAWN // DRAWN_AT_ONCE)
    runs = [session.submit(base, DRAWN_AT_ONCE, DRAWN_STEPS, seed, **options) for seed in seeds]
    return torch.cat([run.result().samples for run in runs])


def kept(name: str, visitor: Visitor) -> str:
    """Saves an expert among the models, with its card; where to.

    Raises:
        ValueError: If the visitor has not taught it, or there is one.
    """
    expert = visitor.taught.get(name)
    if expert is None:
        raise ValueError(f"There is no expert {name} of yours here; teach it first.")
    base = str(expert.card.training["beside"])
    if (beside := catalogue.catalogue().get(base)) is None:
        raise ValueError(f"{base}, beside which it was taught, is in no folder of models: nothing was saved.")
    folder = beside.parent / expert.card.name
    if (folder / CONFIG).exists():
        raise ValueError(f"{name} is saved already; forget this one and teach it under another name.")
    save_expert(folder, expert.network, expert.card, half=True)
    return str(folder)


def _named(name: Any) -> str:
    """A name that recipes can hold."""
    found = re.sub(r"\W+", "_", str(name or "").strip().lower(), flags=re.ASCII).strip("_")[:24]
    if not found or not re.match(r"[a-z_]", found):
        raise ValueError("Give it a name that begins with a letter, such as tired.")
    return found


def _states(uris: Any, energy: Energy) -> Tensor:
    uris = uris if isinstance(uris, Sequence) and not isinstance(uris, str) else []
    if len(uris) < LEAST:
        raise ValueError(f"Mark {LEAST} pictures as yes and {LEAST} as no at least, better a dozen of each.")
    return torch.stack([starts.state_of(pictures.from_uri(uri), energy) for uri in uris[:MOST]])

"""What visitors have running, as messages to their pages: frames, and what there is to say of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from composable_ebm import Energy, Engine, Frame, SampleResult, parse
from composable_ebm.experts.library import Library
from composable_ebm.pipelines import Pipeline
from composable_ebm.potential.plan import Plan

from . import pictures, starts
from .clock import FrameClock
from .explore import Axis, strip, weight_grid
from .lessons import taught
from .line import Queue
from .live import Live
from .mix import NOTHING_ON
from .offer import Offer
from .session import FAILURES, Asked, Session, sentences
from .state import MAX_SEED, Limits, Request
from .stream import stream
from .terms import Term, parts, terms, with_marginals
from .visitors import Visitors

MAX_PLAY_SECONDS = 600.0  # without a change, as for a forgotten tab
MAX_RECIPE_WEIGHT = 1000.0  # far beyond what the controls give
MAX_BATCH = 64  # chains that step together on a CPU, where larger batches are slower and no cheaper
MAX_ACCELERATED_BATCH = 1024
TERMS_EVERY = 8  # frames
WAIT = 0.5  # seconds between two words on the place in the queue

_UNEXPECTED = "Something went wrong on the server; its log has the details."

_log = logging.getLogger(__name__)

Message = dict[str, Any]
"""What a page is told: "kind" is wait, frame, end, grid, alone or error, and says what else there is."""

__all__ = ["FAILURES", "Message", "Runs", "sentences", "understood"]


class Runs:
    """The runs of all visitors, one a visitor, on one engine.

    Args:
        library: The experts.
        limits: The most that may be asked for.
    Attributes:
        engine: Takes the steps of them all.
        offer: What can be mixed.
        closed: Whether it has ended.
        visitors: Those who are there, with the experts that they taught.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library = library
        self.limits = limits
        most = MAX_BATCH if library.device.type == "cpu" else MAX_ACCELERATED_BATCH
        self.engine = Engine(library.device, max(most, limits.max_chains))
        self.closed = False
        pipelines = {name: each for name, each in library.others.items() if isinstance(each, Pipeline)}
        self.offer = Offer(pipelines=pipelines)
        self.visitors = Visitors()
        self._drawn: WeakKeyDictionary[Energy, Tensor] = WeakKeyDictionary()  # for lessons
        self._players, self._samplers = Queue(limits.max_players), Queue(1)

    def warm_up(self, recipe: str) -> None:
        """Loads the experts of `recipe` and all that first frames need, so that no visitor waits for it."""
        with suppress(*FAILURES):
            energy = understood(recipe, self.library)
            run = Live(self.engine.submit, energy, 4, 0).run
            for frame in run.frames():
                pictures.data_uri(pictures.montage(frame.images))
                terms(energy, frame.states, frame.noise_level)
                if frame.step > 2:
                    run.cancel()

    def close(self) -> None:
        """Ends all runs, and the engine."""
        self.closed = True
        self.engine.close()

    def running(self) -> int:
        """How many visitors have chains running, or waiting to."""
        return self.visitors.running

    def understood(self, recipe: str, visitor: str) -> Energy:
        """What a visitor's recipe describes, their own experts included."""
        if not recipe:
            raise ValueError(NOTHING_ON)
        return understood(recipe, self.names(visitor))

    def names(self, visitor: str) -> Mapping[str, Energy]:
        """What names mean to a visitor."""
        return self.visitors[visitor].names(self.library)

    # -- what a visitor does ----------------------------------------------------------------------------

    def stop(self, visitor: str) -> None:
        """Ends the visitor's run before its next step; what it has reached stays on the page."""
        if (session := self.visitors[visitor].session) is not None:
            session.stop()

    def steer(self, recipe: str, energy: Energy, visitor: str) -> None:
        """Has the visitor's chains, if they play, follow another recipe, which describes `energy`."""
        if (session := self.visitors[visitor].session) is not None:
            session.follow(recipe, energy)

    def shake(self, chain: int | None, visitor: str) -> int:
        """Begins one of the visitor's running chains anew, or those that miss something; how many."""
        session = self.visitors[visitor].session
        return 0 if session is None else session.shake(chain)

    def film(self, chain: int | None, kind: str, visitor: str) -> bytes:
        """The frames of the visitor's last run as an animation; of one chain or of all.

        Raises:
            ValueError: If there are none, or no such chain.
        """
        return self.visitors[visitor].film.save(chain, "webp" if kind == "webp" else "gif")

    def play(self, asked: Request, visitor: str, sent: Any = None) -> Iterator[Message]:
        """Chains that run on and on, following the recipe, until Stop."""
        return self._run(visitor, self._players, lambda session: self._played(asked, session, visitor, sent))

    def sample(self, asked: Request, visitor: str, sent: Any = None) -> Iterator[Message]:
        """`sample` while it runs, and after it; from a start, live chains of as many steps."""

        def made(session: Session) -> Iterator[Message]:
            if sent:
                return self._played(asked, session, visitor, sent, asked.num_steps)
            return self._sampled(asked, session, visitor)

        return self._run(visitor, self._samplers, made)

    def grid(self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], visitor: str) -> Iterator[Message]:
        """A grid over two weights while it fills."""
        return self._run(
            visitor, self._samplers, lambda session: self._gridded(asked, axes, session, visitor)
        )

    def alone(self, asked: Request, visitor: str) -> Iterator[Message]:
        """The mix and every expert alone, from the same noise."""
        return self._run(visitor, self._samplers, lambda session: self._alone(asked, session, visitor))

    def teach(self, sent: Any, visitor: str) -> Iterator[Message]:
        """An expert taught from marked pictures."""

        def begin(session: Session) -> Iterator[Message]:
            return taught(sent, self.visitors[visitor], session, self.offer, self.library, self._drawn)

        return self._run(visitor, self._samplers, begin)

    # -- how it is told ---------------------------------------------------------------------------------

    def _run(
        self, name: str, queue: Queue, begin: Callable[[Session], Iterator[Message]]
    ) -> Iterator[Message]:
        """The messages of one run, from its place in the queue to its end or what went wrong."""
        visitor = self.visitors[name]
        session = visitor.begin(self.engine)
        try:
            with queue.joined() as ticket:
                while (place := queue.place(ticket)) and not session.stopped:
                    yield {"kind": "wait", "place": place}
                    queue.wait(WAIT)
                if session.stopped:
                    yield {"kind": "end", "said": "Stopped before it began."}
                    return
                for message in begin(session):
                    if visitor.session is not session:
                        return  # another run of this visitor has the page now
                    yield message
        except FAILURES as error:
            yield {"kind": "error", "problem": sentences(error)}
        except Exception:
            _log.exception("a run of the page failed")
            yield {"kind": "error", "problem": _UNEXPECTED}
        finally:
            session.stop()
            visitor.end(session)

    def _sampled(self, asked: Request, session: Session, visitor: str) -> Iterator[Message]:
        energy = self.understood(asked.recipe, visitor)
        film = self.visitors[visitor].begin_film()
        begun = time.perf_counter()
        for item in stream(energy, asked, session.submit):
            if isinstance(item, SampleResult):
                film.add(item.images)
                yield _finished(item, energy, asked)
            else:
                film.add(images := item.images)
                rate = item.step / (time.perf_counter() - begun)
                left = (asked.num_steps - item.step) / rate if rate else None
                yield _frame(item, images, asked.recipe, total=asked.num_steps, left=left)

    def _played(
        self, asked: Request, session: Session, visitor: str, sent: Any, num_steps: int | None = None
    ) -> Iterator[Message]:
        clock, plans = FrameClock(self.library.device), _Plans()
        following: Asked | None = asked.recipe, self.understood(asked.recipe, visitor)
        seed, frame, ending, kept = asked.seed, None, "", None
        while following is not None:
            recipe, energy = following
            live = Live(
                session.submit,
                energy,
                asked.num_chains,
                seed,
                start=starts.started(sent, energy, asked.num_chains),
                kept=kept,
                num_steps=num_steps,
                frames_per_second=clock.frames_per_second,
                steps_per_second=clock.steps_per_second,
            )
            film = self.visitors[visitor].begin_film()
            session.play(recipe, live)
            for frame in live.run.frames():
                clock.tick()
                film.add(images := frame.images)
                problem = session.problem or _lost(frame)
                message = _frame(frame, images, str(frame.composition), total=num_steps, rate=clock.rate)
                if clock.frames % TERMS_EVERY == 1:
                    message |= plans.told(frame)
                yield message | {"problem": problem}
                if num_steps is None and session.seconds_unmoved > MAX_PLAY_SECONDS:
                    ending = "Stopped, as nothing was moved for a while. Press Play to go on."
                    session.stop()
            live.run.result()  # raises what went wrong, if anything did
            (following, again), sent, seed = session.take_next(), None, (seed + 1) % MAX_SEED
            kept = None if again is None else live.renewed(again, session.submit, seed)
            if frame is None:  # stopped before the first step
                yield {"kind": "end", "said": "Stopped before it began."}
                return
        assert frame is not None
        yield _stopped(frame, session.followed, asked, plans, ending, num_steps)

    def _gridded(
        self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], session: Session, visitor: str
    ) -> Iterator[Message]:
        energy = self.understood(asked.recipe, visitor)
        frames = weight_grid(energy, *axes(), session.submit, num_steps=asked.num_steps, seed=asked.seed)
        texts = {"recipe": asked.recipe, "seed": str(asked.seed), "num_steps": str(asked.num_steps)}
        for frame in frames:
            content = pictures.png(frame.picture, texts if frame.done else None)
            place = {"picture": pictures.data_uri(content), "step": frame.step, "of": asked.num_steps}
            yield {"kind": "grid", "done": frame.done, **place}

    def _alone(self, asked: Request, session: Session, visitor: str) -> Iterator[Message]:
        energy = self.understood(asked.recipe, visitor)
        made = strip(energy, self.offer.is_base, session.submit, asked.seed, asked.num_steps)
        images = [pictures.data_uri(pictures.montage(image[None])) for image in made.images]
        pairs = zip(made.labels, images, strict=True)
        yield {"kind": "alone", "pictures": [{"label": label, "picture": uri} for label, uri in pairs]}


def _frame(
    frame: Frame,
    images: Tensor,
    recipe: str,
    total: int | None,
    rate: float | None = None,
    left: float | None = None,
) -> Message:
    return {
        "kind": "frame",
        "picture": pictures.data_uri(pictures.montage(images)),
        "count": len(images),
        "recipe": recipe,
        "step": frame.step,
        "of": total,
        "rate": rate and round(rate, 1),
        "left": left and round(left, 1),
    }


def _finished(result: SampleResult, energy: Energy, asked: Request) -> Message:
    """What a run of `sample` ends with."""
    stopped = result.num_steps < asked.num_steps
    said = [problem[0].upper() + problem[1:] for problem in result.problems]
    if stopped:  # what it had reached need not satisfy anything
        said = [f"Stopped at step {result.num_steps} of {asked.num_steps}: the picture is unfinished."]
    texts = {**result.provenance(), "recipe": asked.recipe}
    found, met = terms(energy, result.samples)
    return {
        **_saved(result.images, texts, asked),
        "step": result.num_steps,
        "of": asked.num_steps,
        "stopped": stopped,
        "seconds": round(result.seconds, 2),
        "said": ". ".join(said),
        "report": result.report(),
        **_told(found, None if stopped else met),
    }


def _stopped(
    frame: Frame, recipe: str, asked: Request, plans: _Plans, ending: str, total: int | None
) -> Message:
    """What running chains end with."""
    texts = {
        "recipe": recipe,
        "num_chains": str(asked.num_chains),
        "num_steps": str(asked.num_steps),
        "seed": str(asked.seed),
        "live": f"step {frame.step} of chains that followed a changing recipe",
    }
    return {
        **_saved(frame.images, texts, asked),
        "step": frame.step,
        "of": total,
        "stopped": total is None or frame.step < total,
        "live": True,
        "said": ending or _lost(frame),
        **plans.told(frame),
    }


def _saved(images: Tensor, texts: Mapping[str, str], asked: Request) -> Message:
    content = pictures.png(pictures.montage(images), texts)
    return {
        "kind": "end",
        "picture": pictures.data_uri(content),
        "count": len(images),
        "recipe": texts["recipe"],
        "seed": asked.seed,
    }


class _Plans:
    """What the parts of running chains say, its evaluation planned anew for other experts only."""

    def __init__(self) -> None:
        self._plan: tuple[list[Hashable], Plan] | None = None

    def told(self, frame: Frame) -> Message:
        energy = with_marginals(frame.composition)
        keys = [leaf.key for leaf in energy.leaves()]
        if self._plan is None or self._plan[0] != keys:
            self._plan = keys, Plan(energy)
        found, met = terms(frame.composition, frame.states, frame.noise_level, self._plan[1])
        met = met if frame.met is None else frame.met
        if frame.noise_level is None:
            return _told(found, met)
        if met is not None:
            met = met | (frame.noise_level > SETTLED)  # those are on their way
        return _told(found, met) | {"level": round(float(frame.noise_level.max()), 2)}


SETTLED = 0.5  # noise level in data units from which on what is still missing will hardly come by itself


def _told(found: Sequence[Term], met: Tensor | None) -> Message:
    """What each part says, and which pictures still miss something."""
    rows = [
        {
            "name": term.name,
            "weight": term.weight,
            "energy": nats(term.energy),
            "probability": term.probability if math.isfinite(term.probability or 0) else None,
            "group": term.group,
        }
        for term in found
    ]
    return {"terms": rows, "misses": None if met is None else (~met).nonzero().flatten().tolist()}


def nats(energy: float) -> str:
    """An energy for people: a nat counts, in energies of thousands too; never a number of forty digits."""
    if math.isnan(energy):
        return ""
    size = abs(energy)
    return f"{energy:,.0f}" if 1000 <= size < 1e7 else f"{energy:.3g}"


def _lost(frame: Frame) -> str:
    """What is to be said of chains that are not finite any more."""
    if not (lost := int((~frame.alive).sum())):
        return ""
    return f"{lost} of {len(frame.alive)} chains diverged and were frozen; try smaller weights, or Shake."


def understood(recipe: str, names: Mapping[str, Energy]) -> Energy:
    """The composition that a visitor's recipe describes.

    Raises:
        ValueError: If it cannot be read, or asks for weights at which nothing can be sampled.
    """
    energy = parse(recipe, names)
    if (largest := max(abs(part.weight) for part in parts(energy))) > MAX_RECIPE_WEIGHT:
        raise ValueError(f"a weight may be {MAX_RECIPE_WEIGHT:g} here at most, got {largest:g}.")
    return energy

"""What visitors have running: begun by Sample or over the API, ended by themselves or by Stop."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress

import gradio as gr

from composable_ebm import Energy, Mixture, Not, SampleResult, Sum, parse, sample
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import look, render, shown, state
from .animate import Recorder
from .clock import FrameClock
from .explore import Axis, strip, weight_grid
from .live import STIR, Live
from .shown import History, Shown
from .state import Limits, Request
from .stream import stream
from .trust import doubts

FILM_FRAMES = 96
MAX_FILMS = 24
MAX_PLAY_SECONDS = 600.0  # without a change, as for a forgotten tab
MAX_RECIPE_WEIGHT = 1000.0  # far beyond what the controls give

FAILURES = (ValueError, OSError, RuntimeError)
"""What a request can do wrong, as sentences for whoever made it; anything else is a defect."""

_UNEXPECTED = "Something went wrong on the server; its log has the details."

_log = logging.getLogger(__name__)

__all__ = ["FAILURES", "Runs", "understood"]


class Session:
    """A visitor's run: how it is told to stop, and the recipe that it follows."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.recipe: str | None = None


class Films:
    """The frames of each visitor's last run, those of the latest visitors."""

    def __init__(self) -> None:
        self._films: OrderedDict[str, Recorder] = OrderedDict()

    def begin(self, visitor: str, data_range: tuple[float, float]) -> Recorder:
        """An empty film in place of the visitor's last one."""
        self.drop(visitor)
        film = self._films[visitor] = Recorder(FILM_FRAMES, data_range)
        while len(self._films) > MAX_FILMS:
            self._films.popitem(last=False)
        return film

    def of(self, visitor: str) -> Recorder:
        """The visitor's film, which may be empty."""
        return self._films.get(visitor) or Recorder()

    def drop(self, visitor: str) -> None:
        """Forgets a visitor's film."""
        self._films.pop(visitor, None)


class Runs:
    """The runs of all visitors, one a visitor.

    Args:
        library: The experts.
        limits: The most that may be asked for.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library = library
        self.limits = limits
        self._sessions: dict[str, Session] = {}
        self._films = Films()

    def warm_up(self, recipe: str) -> None:
        """Loads the experts of `recipe` and all that first frames need, so that no visitor waits for it."""
        with suppress(*FAILURES):
            energy = understood(recipe, self.library)
            sample(energy, num_chains=1, num_steps=1)
            live = Live(energy, 4, 0, self.library.device)
            for _ in range(3):
                live.step()
            shown.framed(live.picture, energy, "", "")
            shown.term_table(live, History())
            doubts(energy)

    # -- the page -----------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> tuple:
        """Makes a run that Stop can reach while it still waits in the queue: (Play, Sample, Stop)."""
        self.stop(request)
        self._sessions[request.session_hash or ""] = Session()
        return shown.buttons(running=True)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's run at its next step; what it has reached stays on the page."""
        if (session := self._sessions.get(request.session_hash or "")) is not None:
            session.stop.set()

    def leave(self, request: gr.Request) -> None:
        """Ends the run of a visitor who has closed the page, one that still waits in the queue too."""
        self.stop(request)
        self._sessions.pop(request.session_hash or "", None)
        self._films.drop(request.session_hash or "")

    def steer(self, recipe: str, visitor: str) -> None:
        """Has the visitor's chains, if they play, follow another recipe."""
        if (session := self._sessions.get(visitor)) is not None:
            session.recipe = recipe

    def watch(self, asked: Request, visitor: str, start: str = "", level: float = STIR) -> Iterator[Shown]:
        """What the page shows while `sample` runs, and after it; from a start, while live chains run for
        as many steps.

        Args:
            asked: What to sample.
            visitor: Whose page it is.
            start: What to start from, as `look.started` reads it.
            level: How much noise is put on it.
        """
        session = self._sessions.get(visitor) or Session()
        updates = self._sampled(asked, session, visitor)
        if start:
            updates = self._played(asked, session, visitor, (start, level), asked.num_steps)
        yield from self._guarded(updates, session, visitor)

    def play(self, asked: Request, visitor: str, start: str = "", level: float = STIR) -> Iterator[Shown]:
        """What the page shows while chains run on and on, following the recipe, until Stop."""
        session = self._sessions.get(visitor) or Session()
        yield from self._guarded(self._played(asked, session, visitor, (start, level)), session, visitor)

    def grid(self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], visitor: str) -> Iterator[Shown]:
        """What the page shows while a grid over two weights fills."""
        session = self._sessions.get(visitor) or Session()
        yield from self._guarded(self._gridded(asked, axes, session), session, visitor)

    def strip(self, asked: Request, visitor: str) -> Iterator[Shown]:
        """The mix and every expert alone, from the same noise."""
        session = self._sessions.get(visitor) or Session()
        yield from self._guarded(self._stripped(asked, session), session, visitor)

    def film(self, chain: int | None, kind: str, visitor: str) -> str:
        """A link that saves the frames of the visitor's last run; of one chain or of all.

        Raises:
            ValueError: If there are none, or no such chain.
        """
        content = self._films.of(visitor).save(chain, "webp" if kind == "webp" else "gif")
        return render.film_link(content, "webp" if kind == "webp" else "gif")

    def _guarded(self, updates: Iterator[Shown], session: Session, visitor: str) -> Iterator[Shown]:
        # `begin` has set the buttons, but a busy browser merges updates that it has not drawn yet, and
        # in that the last one counts: each says anew which buttons a running visitor has.
        running = dict(zip(("play", "start", "halt"), shown.buttons(running=True), strict=True))
        try:
            for update in updates:
                if self._sessions.get(visitor, session) is not session:
                    break  # another run of this visitor has the page now
                yield update._replace(**running) if update.halt == gr.skip() else update
        except FAILURES as error:
            yield shown.ended(problem=render.note(sentences(error)))
        except Exception:
            _log.exception("a run of the page failed")
            yield shown.ended(problem=render.note(_UNEXPECTED))
        finally:
            session.stop.set()
            if self._sessions.get(visitor) is session:
                del self._sessions[visitor]

    def _sampled(self, asked: Request, session: Session, visitor: str) -> Iterator[Shown]:
        energy = understood(asked.recipe, self.library)
        film, history = self._films.begin(visitor, shown.data_range(energy)), History()
        for item in stream(energy, asked, session.stop):
            if isinstance(item, SampleResult):
                film.add(item.samples)
                yield shown.finished(item, energy, asked, history)
            else:
                film.add(item.states)
                line = render.caption(item.step, asked.num_steps, item.energy, item.rate)
                yield Shown(shown.framed(item.states, energy, line, shown.alt(asked)))

    def _played(
        self,
        asked: Request,
        session: Session,
        visitor: str,
        start: tuple[str, float],
        num_steps: int | None = None,
    ) -> Iterator[Shown]:
        recipe = followed = asked.recipe
        energy = understood(recipe, self.library)

        def begun(energy: Energy) -> Live:
            begin = look.started(*start, energy)
            return Live(energy, asked.num_chains, asked.seed, self.library.device, begin)

        live, history = begun(energy), History()
        film = self._films.begin(visitor, shown.data_range(energy))
        clock = FrameClock(self.library.device)
        steered = time.monotonic()
        problem = told = ""
        while not session.stop.is_set():
            if (wanted := session.recipe) not in (None, recipe):
                recipe, steered = wanted, time.monotonic()
                try:
                    energy = understood(recipe, self.library)
                    if live.fits(energy):
                        live.steer(energy)
                    else:
                        start = ("", STIR)
                        live = begun(energy)
                        film = self._films.begin(visitor, shown.data_range(energy))
                    followed, problem = recipe, ""
                except FAILURES as error:  # the chains go on with what they had
                    problem = sentences(error)
            clock.fill(live.step)
            film.add(live.picture)
            if (lost := int(live.chain.divergence().chains.sum())) and not problem:
                problem = (
                    f"{lost} of {asked.num_chains} chains diverged and were frozen; try smaller weights."
                )
            # Said once: what `read` has to say about the recipe stands in the same place.
            said = gr.skip() if problem == told else render.note(problem)
            told = problem
            yield shown.live(live, asked, clock, history, said)
            if num_steps is not None and live.num_steps >= num_steps:
                break
            clock.wait(session.stop)
            if num_steps is None and time.monotonic() - steered > MAX_PLAY_SECONDS:
                problem = "Stopped, as nothing was moved for a while. Press Play to go on."
                break
        yield shown.stopped(live, followed, asked, clock, history, problem)

    def _gridded(
        self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], session: Session
    ) -> Iterator[Shown]:
        understood(asked.recipe, self.library)
        frames = weight_grid(
            asked.recipe, *axes(), self.library, num_steps=asked.num_steps, seed=asked.seed, stop=session.stop
        )
        for frame in frames:
            picture = render.table_of(frame.picture, asked, frame.step, frame.done)
            yield shown.ended(grid=picture) if frame.done else Shown(grid=picture)

    def _stripped(self, asked: Request, session: Session) -> Iterator[Shown]:
        energy = understood(asked.recipe, self.library)
        made = strip(asked.recipe, self.library, asked.seed, asked.num_steps, session.stop)
        yield shown.ended(strip=render.strip(made.labels, made.samples, shown.data_range(energy)))

    # -- the API ------------------------------------------------------------------------------------

    def sample(self, recipe: str, num_chains: int = 16, num_steps: int = 200, seed: int = 0) -> dict:
        """Draws pictures from a composition of experts, such as "faces/base + 6*ratio(faces/smile,
        faces/smile[any])": `experts` lists what may be named.

        Args:
            recipe: Experts with weights, added (all of them), joined by | (one of them), ~ for not.
            num_chains: How many pictures.
            num_steps: Steps of the sampler; 80 suffice for faces.
            seed: Seeds the noise: the same seed gives the same pictures.
        Returns:
            "png", a data URI of all pictures side by side; "energies" in nats, low where a picture fits
            the recipe; "report" and "problems" of the run; "recipe" as it was understood; "seconds".
        """
        try:
            asked = state.checked(recipe, num_chains, num_steps, seed, self.limits)
            energy = understood(asked.recipe, self.library)
            result = sample(
                energy,
                num_chains=asked.num_chains,
                num_steps=asked.num_steps,
                seed=asked.seed,
                on_divergence="report",
            )
        except FAILURES as error:
            raise gr.Error(sentences(error), print_exception=False) from error
        picture = render.montage(result.samples, shown.data_range(energy))
        return {
            "png": render.data_uri(picture, result.provenance()),
            "energies": result.energies.tolist(),
            "report": result.report(),
            "problems": result.problems,
            "recipe": result.recipe,
            "seconds": result.seconds,
        }

    def running(self) -> int:
        """How many visitors have chains running, or waiting to."""
        return len(self._sessions)

    def experts(self) -> list[dict]:
        """Lists the experts that recipes may name.

        Returns:
            For each its "name", the "attribute" that it knows and its "values", chosen as name[value]; a
            binary expert stands for its second value and ~name for its first.
        """
        return [
            {
                "name": name,
                "attribute": card.attribute,
                "values": list(card.values),
                "event_shape": list(card.event_shape),
                "data_range": list(card.data_range),
                "metrics": dict(card.metrics),
            }
            for name, card in cards()[0].items()
        ]


def understood(recipe: str, library: Library) -> Energy:
    """The composition that a visitor's recipe describes.

    Raises:
        ValueError: If it cannot be read, or asks for weights at which nothing can be sampled.
    """
    energy = parse(recipe, library)
    if (largest := _largest_weight(energy)) > MAX_RECIPE_WEIGHT:
        raise ValueError(f"a weight may be {MAX_RECIPE_WEIGHT:g} here at most, got {largest:g}.")
    return energy


def _largest_weight(energy: Energy) -> float:
    if isinstance(energy, Sum):
        pairs = zip(energy.operands, energy.weights, strict=True)
        return max(abs(float(weight)) * _largest_weight(term) for term, weight in pairs)
    if isinstance(energy, (Mixture, Not)):
        return max(_largest_weight(operand) for operand in energy.operands)
    return 1.0


def sentences(error: BaseException) -> str:
    """What went wrong, with the context that was added on the way up."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])

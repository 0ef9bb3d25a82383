"""What visitors have running: begun by Sample or over the API, ended by themselves or by Stop."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress

import gradio as gr

from composable_ebm import Energy, Engine, Frame, Mixture, Not, SampleResult, Sum, parse
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library

from . import look, render, shown, state
from .animate import Recorder
from .clock import FrameClock
from .explore import Axis, strip, weight_grid
from .live import STIR, Live
from .session import FAILURES, Session, sentences
from .shown import History, Shown
from .state import Limits, Request
from .stream import stream
from .trust import doubts

FILM_FRAMES = 96
MAX_FILMS = 24
MAX_PLAY_SECONDS = 600.0  # without a change, as for a forgotten tab
MAX_RECIPE_WEIGHT = 1000.0  # far beyond what the controls give
MAX_BATCH = 64  # chains that step together on a CPU, where larger batches are slower and no cheaper
MAX_ACCELERATED_BATCH = 1024

_UNEXPECTED = "Something went wrong on the server; its log has the details."

_log = logging.getLogger(__name__)

__all__ = ["FAILURES", "Runs", "sentences", "understood"]


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
    """The runs of all visitors, one a visitor, on one engine.

    Args:
        library: The experts.
        limits: The most that may be asked for.
    Attributes:
        engine: Takes the steps of them all.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library = library
        self.limits = limits
        most = MAX_BATCH if library.device.type == "cpu" else MAX_ACCELERATED_BATCH
        self.engine = Engine(library.device, max(most, limits.max_chains))
        self._sessions: dict[str, Session] = {}
        self._films = Films()

    def warm_up(self, recipe: str) -> None:
        """Loads the experts of `recipe` and all that first frames need, so that no visitor waits for it."""
        with suppress(*FAILURES):
            energy = understood(recipe, self.library)
            for frame in Live(self.engine.submit, energy, 4, 0, num_steps=3).run.frames():
                shown.framed(frame.denoised, energy, "", "")
                shown.term_table(frame, History())
            doubts(energy)

    def close(self) -> None:
        """Ends all runs, and the engine."""
        self.engine.close()

    # -- the page -----------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> tuple:
        """Makes a run that Stop can reach while it still waits in the queue: (Play, Sample, Stop)."""
        self.stop(request)
        self._sessions[request.session_hash or ""] = Session(self.engine)
        return shown.buttons(running=True)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's run before its next step; what it has reached stays on the page."""
        if (session := self._sessions.get(request.session_hash or "")) is not None:
            session.stop()

    def leave(self, request: gr.Request) -> None:
        """Ends the run of a visitor who has closed the page, one that still waits in the queue too."""
        self.stop(request)
        self._sessions.pop(request.session_hash or "", None)
        self._films.drop(request.session_hash or "")

    def steer(self, recipe: str, visitor: str) -> None:
        """Has the visitor's chains, if they play, follow another recipe."""
        if (session := self._sessions.get(visitor)) is not None:
            session.recipe = recipe
            self._follow(session)

    def watch(self, asked: Request, visitor: str, start: str = "", level: float = STIR) -> Iterator[Shown]:
        """What the page shows while `sample` runs, and after it; from a start, while live chains run for
        as many steps.

        Args:
            asked: What to sample.
            visitor: Whose page it is.
            start: What to start from, as `look.started` reads it.
            level: How much noise is put on it.
        """
        session = self._session(visitor)
        updates = self._sampled(asked, session, visitor)
        if start:
            updates = self._played(asked, session, visitor, (start, level), asked.num_steps)
        yield from self._guarded(updates, session, visitor)

    def play(self, asked: Request, visitor: str, start: str = "", level: float = STIR) -> Iterator[Shown]:
        """What the page shows while chains run on and on, following the recipe, until Stop."""
        session = self._session(visitor)
        yield from self._guarded(self._played(asked, session, visitor, (start, level)), session, visitor)

    def grid(self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], visitor: str) -> Iterator[Shown]:
        """What the page shows while a grid over two weights fills."""
        session = self._session(visitor)
        yield from self._guarded(self._gridded(asked, axes, session), session, visitor)

    def strip(self, asked: Request, visitor: str) -> Iterator[Shown]:
        """The mix and every expert alone, from the same noise."""
        session = self._session(visitor)
        yield from self._guarded(self._stripped(asked, session), session, visitor)

    def film(self, chain: int | None, kind: str, visitor: str) -> str:
        """A link that saves the frames of the visitor's last run; of one chain or of all.

        Raises:
            ValueError: If there are none, or no such chain.
        """
        content = self._films.of(visitor).save(chain, "webp" if kind == "webp" else "gif")
        return render.film_link(content, "webp" if kind == "webp" else "gif")

    def _session(self, visitor: str) -> Session:
        return self._sessions.get(visitor) or Session(self.engine)

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
            session.stop()
            if self._sessions.get(visitor) is session:
                del self._sessions[visitor]

    def _sampled(self, asked: Request, session: Session, visitor: str) -> Iterator[Shown]:
        energy = understood(asked.recipe, self.library)
        film, history = self._films.begin(visitor, shown.data_range(energy)), History()
        begun = time.perf_counter()
        for item in stream(energy, asked, session.submit):
            if isinstance(item, SampleResult):
                film.add(item.samples)
                yield shown.finished(item, energy, asked, history)
            else:
                film.add(picture := item.denoised)
                rate = item.step / (time.perf_counter() - begun)
                line = render.caption(item.step, asked.num_steps, float(item.energies.mean()), rate)
                yield Shown(shown.framed(picture, energy, line, shown.alt(asked)))

    def _played(
        self,
        asked: Request,
        session: Session,
        visitor: str,
        start: tuple[str, float],
        num_steps: int | None = None,
    ) -> Iterator[Shown]:
        history, clock = History(), FrameClock(self.library.device)
        recipe, told, ending = asked.recipe, "", ""
        while recipe:
            energy = understood(recipe, self.library)
            live = Live(
                session.submit,
                energy,
                asked.num_chains,
                asked.seed,
                start=look.started(*start, energy),
                num_steps=num_steps,
                frames_per_second=clock.frames_per_second,
                steps_per_second=clock.steps_per_second,
            )
            film = self._films.begin(visitor, shown.data_range(energy))
            session.play(recipe, live)
            self._follow(session)
            for frame in live.run.frames():
                clock.tick()
                film.add(picture := frame.denoised)
                problem = session.problem or _lost(frame)
                # Said once: what `read` has to say about the recipe stands in the same place.
                said = gr.skip() if problem == told else render.note(problem)
                told = problem
                yield shown.live(frame, picture, clock, history, said)
                if num_steps is None and session.seconds_unmoved > MAX_PLAY_SECONDS:
                    ending = "Stopped, as nothing was moved for a while. Press Play to go on."
                    session.stop()
            live.run.result()  # raises what went wrong, if anything did
            recipe, start = session.take_next(), ("", STIR)
        yield shown.stopped(frame, session.followed, asked, clock, history, ending or problem)

    def _follow(self, session: Session) -> None:
        """Has running chains follow the recipe that their visitor asks for now."""
        session.follow(lambda recipe: understood(recipe, self.library))

    def _gridded(
        self, asked: Request, axes: Callable[[], tuple[Axis, Axis]], session: Session
    ) -> Iterator[Shown]:
        understood(asked.recipe, self.library)
        frames = weight_grid(
            asked.recipe, *axes(), self.library, session.submit, num_steps=asked.num_steps, seed=asked.seed
        )
        for frame in frames:
            picture = render.table_of(frame.picture, asked, frame.step, frame.done)
            yield shown.ended(grid=picture) if frame.done else Shown(grid=picture)

    def _stripped(self, asked: Request, session: Session) -> Iterator[Shown]:
        energy = understood(asked.recipe, self.library)
        made = strip(asked.recipe, self.library, session.submit, asked.seed, asked.num_steps)
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
            result = self.engine.submit(
                energy,
                asked.num_chains,
                asked.num_steps,
                asked.seed,
                alone=True,
                on_divergence="report",
            ).result()
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


def _lost(frame: Frame) -> str:
    """What is to be said of chains that are not finite any more."""
    if not (lost := int((~frame.alive).sum())):
        return ""
    return f"{lost} of {len(frame.alive)} chains diverged and were frozen; try smaller weights."


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

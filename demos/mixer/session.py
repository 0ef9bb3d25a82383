"""One visitor's runs: how they are told to stop, and the recipe that running chains follow."""

from __future__ import annotations

import threading
import time

from torch import Tensor

from composable_ebm import Energy, Engine, Run

from .live import Live, check

FAILURES = (ValueError, OSError, RuntimeError)
"""What a request can do wrong, as sentences for whoever made it; anything else is a defect."""

Asked = tuple[str, Energy]
"""A recipe, and what it describes."""

__all__ = ["FAILURES", "Session", "sentences"]


class Session:
    """What a visitor has running, from one press of a button to its end. Safe in any thread.

    Args:
        engine: Takes the steps.
    Attributes:
        live: Chains that follow the recipe, if any do.
        followed: The recipe that the chains follow.
        problem: What is wrong with the recipe that they do not follow, if anything is.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: Live | None = None
        self.followed = self.problem = ""
        self._wanted: Asked | None = None  # since something was moved
        self._tried = ""
        self._next: Asked | None = None
        self._again: Tensor | None = None
        self._moved = time.monotonic()
        self._runs: list[Run] = []
        self._stopped = False
        self._lock = threading.Lock()
        self._steering = threading.Lock()  # apart, so that Stop never waits for experts that are loaded

    def submit(self, *arguments, **options) -> Run:
        """`Engine.submit`, for a run that `stop` ends."""
        run = self.engine.submit(*arguments, **options)
        with self._lock:
            self._runs.append(run)
            if self._stopped:
                run.cancel()
        return run

    def stop(self) -> None:
        """Ends all runs before their next step, those to come too."""
        with self._lock:
            self._stopped = True
            for run in self._runs:
                run.cancel()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped

    def shake(self, chain: int | None) -> int:
        """Begins one running chain anew, or those that miss something, or all; how many."""
        with self._steering:
            self._moved = time.monotonic()
            if self.live is None or self.live.run.done:
                return 0
            self._next, self._again = (self.followed, self.live.energy), self.live.shaken(chain)
            self.live.run.cancel()
            return self.live.run.num_chains if self._again is None else int(self._again.sum())

    def play(self, recipe: str, live: Live) -> None:
        """From now on these chains follow the visitor, from `recipe` on."""
        with self._steering:
            self.live, self.followed, self.problem = live, recipe, ""
            self._tried, self._moved = recipe, time.monotonic()
            self._catch_up()

    def follow(self, recipe: str, energy: Energy) -> None:
        """Has the chains follow another recipe, if they can; where it is for other states, ends them."""
        with self._steering:
            self._wanted = recipe, energy
            self._catch_up()

    def _catch_up(self) -> None:
        if self.live is None or self._wanted is None or self._wanted[0] == self._tried:
            return
        self._tried, energy = self._wanted
        self._moved = time.monotonic()
        try:
            if self.live.fits(energy):
                self.live.steer(energy)
                self.followed = self._tried
            else:
                check(energy)
                self._next, self._again = self._wanted, None
                self.live.run.cancel()
            self.problem = ""
        except FAILURES as error:  # the chains go on with what they had
            self.problem = sentences(error)

    def take_next(self) -> tuple[Asked | None, Tensor | None]:
        """For what new chains are to be begun, if they are, and which of them, where not all."""
        with self._steering:
            following, again, self._next, self._again = self._next, self._again, None, None
            return (None, None) if self._stopped else (following, again)

    @property
    def seconds_unmoved(self) -> float:
        """How long ago the recipe was moved."""
        return time.monotonic() - self._moved


def sentences(error: BaseException) -> str:
    """What went wrong, with the context that was added on the way up."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])

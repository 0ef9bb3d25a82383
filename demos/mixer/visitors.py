"""Those who are there: what each has running, the film of it, and the experts that they taught."""

from __future__ import annotations

import threading
from collections import ChainMap, OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import cast

from composable_ebm import Energy, Engine
from composable_ebm.experts import Card, Expert

from .animate import Recorder
from .session import Session

MAX_VISITORS = 48  # whose films and experts are kept
MAX_TAUGHT = 8  # experts of each
FILM_FRAMES = 96

__all__ = ["Visitor", "Visitors"]


class Visitor:
    """One open page.

    Attributes:
        session: What it has running, or waiting to run.
        film: The frames of its last run.
        taught: The experts that it taught, by name.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self.film = Recorder(FILM_FRAMES)
        self.taught: dict[str, Expert] = {}

    def begin(self, engine: Engine) -> Session:
        """A run in place of the last one, which ends."""
        if self.session is not None:
            self.session.stop()
        self.session = Session(engine)
        return self.session

    def end(self, session: Session) -> None:
        """Forgets a run that has ended, unless another has taken its place."""
        if self.session is session:
            self.session = None

    def begin_film(self) -> Recorder:
        """An empty film in place of the last one."""
        self.film.clear()
        return self.film

    def names(self, library: Mapping[str, Energy]) -> Mapping[str, Energy]:
        """What names mean to this visitor."""
        if not self.taught:
            return library
        own = cast("MutableMapping[str, Energy]", self.taught)
        return ChainMap(own, cast("MutableMapping[str, Energy]", library))

    def cards(self) -> dict[str, Card]:
        """The cards of the experts that they taught."""
        return {name: expert.card for name, expert in self.taught.items()}

    def learn(self, expert: Expert) -> None:
        """Takes an expert, in place of an earlier one of its name.

        Raises:
            ValueError: If there are too many.
        """
        name = expert.card.full_name
        if name not in self.taught and len(self.taught) >= MAX_TAUGHT:
            raise ValueError(f"At most {MAX_TAUGHT} experts can be taught at a time; forget one first.")
        self.taught[name] = expert


class Visitors:
    """The latest visitors, by the name that their page gives itself. Safe in any thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Visitor:
        """The visitor of a name, new or back again."""
        with self._lock:
            visitor = self._known.setdefault(name, Visitor())
            self._known.move_to_end(name)
            for other in list(self._known):
                if len(self._known) <= MAX_VISITORS:
                    break
                if self._known[other].session is None and other != name:
                    del self._known[other]
            return visitor

    @property
    def running(self) -> int:
        """How many have something running, or waiting to run."""
        with self._lock:
            return sum(visitor.session is not None for visitor in self._known.values())

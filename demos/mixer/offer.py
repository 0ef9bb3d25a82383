"""What can be mixed: the families that are here, their experts, and mixes to start with."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composable_ebm import Energy
from composable_ebm.experts import Card, Expert
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.pipelines import Pipeline

from . import mix, state
from .mix import AND, NOT, Control, Mix, Pick
from .words import words

STARTS = Path(__file__).with_name("starts.toml")
SHOWN = 8  # starts
_NO_EXPERTS = "There are no experts here. Train one, or name a folder of them in COMPOSABLE_EBM_MODELS."

__all__ = ["Offer", "Start"]


@dataclass(frozen=True)
class Start:
    """A mix to begin with.

    Attributes:
        title: What it is called.
        mix: What is chosen.
        recipe: Of that mix.
        photo: Whether it is for a picture of the visitor's own.
    """

    title: str
    mix: Mix
    recipe: str
    photo: bool = False


@dataclass
class Offer:
    """The experts that were there when a page was last opened.

    Attributes:
        cards: Theirs, by name.
        known: What can be chosen, by name.
        starts: What to begin with.
        problems: What is wrong with experts that cannot be offered.
        pipelines: Families of prompts, by name; whatever is typed is an expert of theirs.
    """

    cards: dict[str, Card] = field(default_factory=dict)
    known: dict[str, Control] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Looks for experts that have come or gone."""
        found, damaged = cards()
        with self._lock:
            self.problems = [f"{name} is damaged: {why}" for name, why in damaged.items()]
            if not found and not self.pipelines:
                self.problems.insert(0, _NO_EXPERTS)
            if found != self.cards or not self.starts:
                prompted = {name: mix.of_pipeline(name, each) for name, each in self.pipelines.items()}
                self.cards, self.known = found, {**prompted, **mix.controls(found)}
                self.starts = [Start("Prompts of yours", Mix(name), name) for name in prompted]
                self.starts += _starts(mix.controls(found))

    def is_base(self, energy: Energy) -> bool:
        """Whether an energy is the p(x) that its family shares."""
        return isinstance(energy, Pipeline) or (isinstance(energy, Expert) and mix.is_base(energy.card))

    def controls(self, taught: Mapping[str, Card], names: Iterable[str] = ()) -> dict[str, Control]:
        """What a visitor may choose: the experts that they taught last, and what of `names` are prompts."""
        known = {**self.known, **mix.controls({**self.cards, **taught})} if taught else self.known
        prompts = {name: mix.of_prompt(name, self.pipelines) for name in names if name not in known}
        return {**known, **{name: each for name, each in prompts.items() if each is not None}}

    @property
    def first(self) -> str:
        """The recipe that a visitor finds."""
        return self.starts[0].recipe if self.starts else ""

    def steps(self, family: str) -> int:
        """The steps that the experts of a family were calibrated with."""
        if family in self.pipelines:
            return int((self.pipelines[family].sampler_settings or {})["num_steps"])
        known = [card.sampler.get("num_steps", 0) for card in self.cards.values() if card.family == family]
        return int(max(known, default=0)) or state.DEFAULT_STEPS

    def families(self, taught: Mapping[str, Card]) -> list[dict[str, Any]]:
        """Every family with its controls, as the page reads them: first those that one may start with,
        then other things to mix, then those that show a method."""
        known = self.controls(taught)
        begun = list(dict.fromkeys(start.mix.family for start in self.starts))
        names = list(dict.fromkeys(control.family for control in known.values()))
        things = self.things
        names.sort(
            key=lambda name: (name not in things, begun.index(name) if name in begun else len(begun), name)
        )
        return [
            {
                "name": name,
                "title": name.replace("_", " "),
                "method": name not in things,
                "steps": self.steps(name),
                "prompts": self.pipelines[name].given_weight if name in self.pipelines else None,
                "cannot": self._cannot(name),
                "controls": [
                    control._asdict() | {"taught": control.name in taught}
                    for control in known.values()
                    if control.family == name
                ],
            }
            for name in names
        ]

    @property
    def things(self) -> set[str]:
        """The families whose experts are things to ask for, and have energies; others show how energies may
        be had. All, where there are no others."""
        names = {control.family for control in self.known.values()}
        return set(filter(self._is_thing, names)) or names

    @property
    def shown(self) -> list[Start]:
        """The starts that the page shows a picture of."""
        things = self.things
        return [start for start in self.starts if start.mix.family in things][:SHOWN]

    def _is_thing(self, family: str) -> bool:
        if family in self.pipelines:
            return True
        own = [card for card in self.cards.values() if card.family == family]
        valued = all(getattr(NETWORKS.get(str(card.network.get("type"))), "has_value", True) for card in own)
        return valued and any(map(mix.is_base, own)) and not all(map(mix.is_base, own))

    def _cannot(self, family: str) -> list[dict[str, str]]:
        """What the experts of a family are known to get wrong, by their own cards."""
        own = [card for card in self.cards.values() if card.family == family and card.failures]
        return [{"name": card.name, "text": card.failures} for card in own]


def _starts(known: Mapping[str, Control]) -> list[Start]:
    """The declared starts of which everything is there, and one for each family that has none."""
    made = []
    for told in tomllib.loads(STARTS.read_text())["start"]:
        if (found := _wanted(known, told["family"], told["want"])) is not None:
            made.append(Start(told["title"], found, mix.compose(known, found), told.get("photo", False)))
    declared = {start.mix.family for start in made}
    for family in dict.fromkeys(control.family for control in known.values()):
        if family not in declared:
            found = _usual(known, family)
            made.append(Start(words(known, found).capitalize(), found, mix.compose(known, found)))
    return made


def _wanted(known: Mapping[str, Control], family: str, want: list[str]) -> Mix | None:
    found = Mix(family)
    for text in want:
        name, _, value = text.removeprefix("~").rstrip("]").partition("[")
        if (control := known.get(f"{family}/{name}")) is None:
            return None
        if (value := value or control.usual) not in control.values:
            return None
        role = NOT if text.startswith("~") else AND
        pick = found.picks.setdefault(control.name, Pick({}, role, control.grid is not None))
        pick.values[value] = control.weight
    return found


def _usual(known: Mapping[str, Control], family: str) -> Mix:
    """A mix of any family: an expert with many values at one of them, and another one."""
    found = Mix(family)
    own = [control for control in known.values() if control.family == family and not control.base]
    for control in [*[c for c in own if c.many][:1], *[c for c in own if not c.many][:1]]:
        found.picks[control.name] = Pick({control.usual: control.weight}, AND, control.grid is not None)
    return found

"""What the page is answered when it asks: what a mix means, and all that does not run on."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fastapi.responses import Response
from torch import Tensor

from composable_ebm import Energy
from composable_ebm.experts import Card

from . import mix, pictures, starts, state
from .explore import Axis
from .heat import pushes
from .lessons import kept
from .runs import FAILURES, Message, Runs, sentences, understood
from .state import Request
from .terms import named, parts, terms
from .trust import doubts
from .words import lone, words

THUMB_CHAINS, THUMB_STEPS, THUMB_SHARE = 4, 40, 0.25

Sent = dict[str, Any]

__all__ = ["Answers"]


class Answers:
    """The answers to one server's pages. Each takes what was sent, and who sent it.

    Args:
        runs: The runs of all visitors.
        keeps: Whether visitors may save the experts that they taught.
    """

    def __init__(self, runs: Runs, keeps: bool) -> None:
        self.runs, self.keeps = runs, keeps
        self._thumbs: dict[str, str] = {}
        self._drawn = False  # all of them

    def prepare(self) -> None:
        """Loads the experts of the first mix and draws a picture of every start that is shown."""
        offer = self.runs.offer
        if offer.first not in offer.pipelines:  # which may take minutes a step
            self.runs.warm_up(offer.first)
        for seed, start in enumerate(offer.shown):
            if start.recipe in offer.pipelines:
                continue
            if self.runs.closed:
                break
            with suppress(*FAILURES):
                self._thumbs[start.recipe] = pictures.data_uri(
                    pictures.montage(self._drawing(start.recipe, seed))
                )
        self._drawn = True

    def _drawing(self, recipe: str, seed: int) -> Tensor:
        """A picture that has what a recipe asks for, if one of a few has, (1, *image)."""
        energy = understood(recipe, self.runs.library)
        options = {"share": THUMB_SHARE, "on_divergence": "report"}
        result = self.runs.engine.submit(energy, THUMB_CHAINS, THUMB_STEPS, seed, **options).result()
        _, met = terms(energy, result.samples)
        best = 0 if met is None else int(met.float().argmax())
        return result.images[best : best + 1]

    def thumbs(self, sent: Sent, by: str) -> Message:
        """The pictures of the starts that are drawn so far, and whether more will come."""
        found = [self._thumbs.get(each.recipe) for each in self.runs.offer.starts]
        return {"thumbs": found, "more": not self._drawn}

    # -- what there is, and what a mix means ------------------------------------------------------------

    def world(self, sent: Sent, by: str) -> Message:
        """All that can be mixed; looks for experts that have come or gone."""
        offer = self.runs.offer
        offer.reload()
        shown = offer.shown
        return {
            "families": offer.families(self._taught(by)),
            "starts": [
                {
                    "title": each.title,
                    "recipe": each.recipe,
                    "photo": each.photo,
                    "family": each.mix.family,
                    "shown": each in shown,
                }
                for each in offer.starts
            ],
            "problems": offer.problems,
            "limits": {"chains": self.runs.limits.max_chains, "steps": self.runs.limits.max_steps},
            "most": mix.MAX_WEIGHT,
            "keeps": self.keeps,
        }

    def read(self, sent: Sent, by: str) -> Message:
        """What a mix or a recipe means; running chains follow it.

        Of `texts` of a saved picture, its numbers too.
        """
        offer, taught = self.runs.offer, self._taught(by)
        found, known, numbers = None, {}, {}
        if "texts" in sent:
            asked = state.restored(sent["texts"], self.runs.limits)
            recipe, numbers = asked.recipe, vars(asked)
        elif "mix" in sent:
            known = offer.controls(taught, mix.names(sent["mix"]))
            found = mix.shown(known, sent["mix"])
            recipe = mix.compose(known, found)
        else:
            recipe = str(sent.get("recipe", ""))
        try:
            names = self.runs.names(by)
            energy = mix.composition(known, found, names) if found else self.runs.understood(recipe, by)
            said = doubts(energy)
        except FAILURES as error:
            shown = found.as_json() if found else None
            return {"recipe": recipe, "problem": sentences(error), "mix": shown}
        self.runs.steer(recipe, energy, by)
        if found is None:
            known = offer.controls(taught, map(str, named(energy) or ()))
            found = mix.read(known, energy, names)
        if found is not None and (alone := lone(known, found)):
            said.append(alone)
        family = found.family if found else _family(energy)
        return {
            **{key: value for key, value in numbers.items() if key != "recipe"},
            "recipe": recipe,
            "family": family,
            "mix": found and found.as_json(),
            "words": words(known, found) if found else recipe,
            "said": " ".join(said),
            "parts": self._weighable(energy),
            "steps": min(offer.steps(family), self.runs.limits.max_steps),
        }

    def _weighable(self, energy: Energy) -> list[Message]:
        """The parts whose weights a grid may run over, and from where to where shows most."""
        found = []
        for part in parts(energy):
            if self.runs.offer.is_base(part.asked) or part.group:
                continue
            low = -part.weight if _is_binary(part.asked) else 0.0
            low = low if part.against is not None else 0.25  # without a base, it holds the density together
            found.append({"name": part.name, "low": low, "high": max(part.weight, 1.0)})
        return found

    def _asked(self, sent: Sent) -> Request:
        counts = (sent.get("chains"), sent.get("steps"), sent.get("seed"))
        return state.clamped(sent.get("recipe"), *counts, self.runs.limits)

    def _taught(self, by: str) -> dict[str, Card]:
        return self.runs.visitors[by].cards()

    # -- what runs --------------------------------------------------------------------------------------

    def run(self, sent: Sent, by: str) -> Iterator[Message]:
        """The messages of a run: "play", "sample", "grid", "alone" or "teach"."""
        asked, kind = self._asked(sent), sent.get("kind")
        if kind == "grid":
            return self.runs.grid(asked, lambda: (_axis(sent.get("across")), _axis(sent.get("up"))), by)
        if kind == "alone":
            return self.runs.alone(asked, by)
        if kind == "teach":
            return self.runs.teach(sent, by)
        begin = self.runs.play if kind == "play" else self.runs.sample
        return begin(asked, by, sent.get("start"))

    def stop(self, sent: Sent, by: str) -> Message:
        self.runs.stop(by)
        return {}

    def shake(self, sent: Sent, by: str) -> Message:
        """Begins anew the chain of a picture, or those that still miss something."""
        return {"shaken": self.runs.shake(_chain(sent), by)}

    # -- pictures ---------------------------------------------------------------------------------------

    def heat(self, sent: Sent, by: str) -> Message:
        """Where each part pushes one picture."""
        energy = self.runs.understood(str(sent.get("recipe", "")), by)
        x = starts.state_of(pictures.from_uri(sent.get("picture")), energy)
        device = next((p.device for p in energy.parameters()), None)
        found = pushes(energy, x[None].to(device))
        total = sum(push.strength for push in found) or 1.0
        return {
            "pushes": [
                {
                    "name": push.name,
                    "picture": pictures.data_uri(push.picture),
                    "share": push.strength / total,
                }
                for push in found
            ]
        }

    def example(self, sent: Sent, by: str) -> Message:
        """A picture of the data that a family was tested on."""
        energy = self.runs.understood(str(sent.get("recipe", "")), by)
        image, described = starts.from_data(
            _family(energy), secrets.randbelow(10**6), starts.image_shape(energy)
        )
        return {"picture": pictures.data_uri(pictures.montage(image[None])), "described": described}

    def film(self, sent: Sent, by: str) -> Response:
        """The last run as an animation."""
        kind = "webp" if sent.get("kind") == "webp" else "gif"
        return Response(self.runs.film(_chain(sent), kind, by), media_type=f"image/{kind}")

    def pack(self, sent: Sent, by: str) -> Response:
        """Pictures as one archive."""
        uris = list(sent.get("pictures") or ())[: self.runs.limits.max_chains]
        files = {f"sample-{i + 1:02}.png": pictures.from_uri(uri) for i, uri in enumerate(uris)}
        return Response(pictures.packed(files), media_type="application/zip")

    def code(self, sent: Sent, by: str) -> Message:
        """A program and a command that make the same pictures."""
        asked = self._asked(sent)
        return {"python": state.as_python(asked), "command": state.as_command(asked)}

    # -- what visitors taught ---------------------------------------------------------------------------

    def forget(self, sent: Sent, by: str) -> Message:
        """Forgets an expert that the visitor taught."""
        self.runs.visitors[by].taught.pop(str(sent.get("name")), None)
        return {}

    def keep(self, sent: Sent, by: str) -> Message:
        """Saves an expert that the visitor taught among the models."""
        if not self.keeps:
            raise ValueError("This server is open to everyone and saves nothing.")
        return {"said": f"Saved in {kept(str(sent.get('name')), self.runs.visitors[by])}, with its card."}


def _axis(sent: Any) -> Axis:
    """An axis that makes sense, whatever came."""
    sent = sent if isinstance(sent, dict) else {}
    low, high = (mix.clamp(sent.get(end), -mix.MAX_WEIGHT, mix.MAX_WEIGHT, 0.0) for end in ("low", "high"))
    return Axis(str(sent.get("name") or ""), low, high, int(mix.clamp(sent.get("count"), 2, 8, 5)))


def _chain(sent: Sent) -> int | None:
    """The chain of the picture that is chosen, if one is."""
    chain = sent.get("chain")
    return None if chain is None else int(mix.clamp(chain, 0, 10**6, 0))


def _family(energy: Energy) -> str:
    return parts(energy)[0].name.lstrip("~").partition("/")[0]


def _is_binary(energy: Energy) -> bool:
    card = getattr(energy, "card", None)
    return card is not None and len(card.values) == 2

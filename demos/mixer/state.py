"""What is to be sampled: its numbers within limits, read from a saved picture, written as a program."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from typing import Any

from .mix import clamp

MAX_SEED = 2**31 - 1
DEFAULT_STEPS = 200

_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)

__all__ = [
    "MAX_SEED",
    "Limits",
    "Request",
    "as_command",
    "as_python",
    "checked",
    "clamped",
    "restored",
]


@dataclass(frozen=True)
class Limits:
    """The most that a visitor may ask for."""

    max_chains: int = 64
    max_steps: int = 2000
    max_players: int = 24


@dataclass(frozen=True)
class Request:
    """What is to be sampled."""

    recipe: str
    num_chains: int
    num_steps: int
    seed: int


def restored(texts: Any, limits: Limits) -> Request:
    """What a saved picture asks for, from its texts by key.

    Raises:
        ValueError: If it carries no recipe or its numbers are out of the limits.
    """
    if not isinstance(texts, dict) or not isinstance(texts.get("recipe"), str):
        raise ValueError(
            "This picture carries no recipe. Pictures saved here do, unless they were edited since."
        )
    numbers = {}
    for name, default in (("num_chains", 16), ("num_steps", DEFAULT_STEPS), ("seed", 0)):
        written = str(texts.get(name, default))
        numbers[name] = int(written) if _NUMBER.fullmatch(written) else written
    try:
        return checked(texts["recipe"], limits=limits, **numbers)
    except ValueError as error:
        raise ValueError(f"This picture's {error}") from error


def as_python(asked: Request) -> str:
    """A script that makes the same picture."""
    return (
        "import composable_ebm as ceb\n\n"
        f"mix = ceb.parse({asked.recipe!r})\n"
        f"out = ceb.sample(mix, num_chains={asked.num_chains}, "
        f"num_steps={asked.num_steps}, seed={asked.seed})\n"
        "print(out.report())\n"
        'out.save("grid.png")\n'
    )


def as_command(asked: Request) -> str:
    """A command line that makes the same picture."""
    return (
        f"composable-ebm sample {shlex.quote(asked.recipe)} --num-chains {asked.num_chains} "
        f"--num-steps {asked.num_steps} --seed {asked.seed} --out grid.png"
    )


def clamped(recipe: Any, num_chains: Any, num_steps: Any, seed: Any, limits: Limits) -> Request:
    """What the page asks for, its numbers moved within the limits."""
    return Request(
        str(recipe or ""),
        int(clamp(num_chains, 1, limits.max_chains, 16)),
        int(clamp(num_steps, 1, limits.max_steps, DEFAULT_STEPS)),
        int(clamp(seed, 0, MAX_SEED, 0)),
    )


def checked(recipe: Any, num_chains: Any, num_steps: Any, seed: Any, limits: Limits) -> Request:
    """What a program asks for, refused where it is out of the limits.

    Raises:
        ValueError: If it is; the message says what is wrong.
    """
    if not isinstance(recipe, str):
        raise ValueError(f"`recipe` must be text, got {type(recipe).__name__}.")
    return Request(
        recipe,
        _whole("num_chains", num_chains, 1, limits.max_chains),
        _whole("num_steps", num_steps, 0, limits.max_steps),
        _whole("seed", seed, 0, MAX_SEED),
    )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (low <= number <= high and number == int(number)):
        raise ValueError(f"`{name}` must be a whole number from {low} to {high}, got {value!r}.")
    return int(number)

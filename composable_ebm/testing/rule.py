"""What a rule of a contract is, and how a broken one is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec

__all__ = ["BrokenError", "ContractError", "broken", "rule"]


class ContractError(AssertionError):
    """An energy or a kernel breaks its contract; the message says which rule, and by how much."""


class BrokenError(Exception):
    """What is broken, for `rule` to say of whom, and by which rule."""


P = ParamSpec("P")


def rule(function: Callable[P, None]) -> Callable[P, None]:
    """A rule whose errors name it, and the energy or kernel, its first argument."""

    @functools.wraps(function)
    def held(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            function(*arguments, **options)
        except BrokenError as broken:
            subject, kind = str(arguments[0]), type(arguments[0]).__name__
            name = subject if subject.startswith(kind) else f"{kind} {subject}"
            raise ContractError(f"{name} breaks `{function.__name__}`: {broken}.") from broken

    return held


def broken(what: str) -> NoReturn:
    raise BrokenError(what.rstrip("."))

"""Modules in evaluation mode, and their weights taken for settled, while somebody evaluates them.

Whether a module changed is asked before every evaluation, which for a small network takes as long as the
evaluation. Inside `evaluating` nobody changes it on purpose, so there it is asked once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "spell"]


class _Spell(threading.local):
    """Which spell of evaluating this thread is in, if any."""

    number: int | None = None


_spell = _Spell()
_numbers = itertools.count()
_modes = threading.Lock()
_evaluated: dict[int, int] = {}
"""How many are evaluating a module that was in training mode, by its id."""


def spell() -> int | None:
    """A number of this spell of evaluating, of this thread alone; None outside of any."""
    return _spell.number


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside; the own mode of each module afterwards, once no thread is inside.

    Args:
        modules: All of them, such as `energy.modules()`.
    """
    with _modes:
        training = [m for m in modules if m.training or id(m) in _evaluated]
        for m in training:
            _evaluated[id(m)] = _evaluated.get(id(m), 0) + 1
            _set_training(m, False)
    outer = _spell.number
    _spell.number = next(_numbers)
    try:
        yield
    finally:
        _spell.number = outer
        with _modes:
            for m in training:
                _evaluated[id(m)] -= 1
                if not _evaluated[id(m)]:
                    del _evaluated[id(m)]
                    _set_training(m, True)


def _set_training(module: nn.Module, value: bool) -> None:
    """Sets the mode past `nn.Module.__setattr__`, which looks for parameters first: 10 µs a module."""
    if "training" in (attributes := vars(module)):
        attributes["training"] = value
    else:  # scripted modules keep it elsewhere
        module.training = value

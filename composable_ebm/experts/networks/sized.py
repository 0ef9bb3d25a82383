"""What a network was made with: a card holds it, and builds the network from it."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping

from torch import nn

__all__ = ["Sized"]


class Sized(nn.Module):
    """A module that knows its own sizes.

    Attributes:
        options: The arguments that it was made with, as plain values that a JSON file can hold.
    """

    options: dict[str, object]

    def made_with(self, arguments: Mapping[str, object]) -> None:
        """Keeps the arguments of `__init__`: call it there, with `locals()`."""
        names = [name for name in inspect.signature(type(self)).parameters if name != "floor"]
        self.options = {
            name: list(value) if isinstance(value := arguments[name], (list, tuple)) else value
            for name in names
        }

    @property
    def sizes(self) -> tuple[tuple[str, str], ...]:
        """What networks of one architecture have in common; the number of values may differ."""
        return tuple((name, str(value)) for name, value in self.options.items() if name != "num_values")

    @property
    def architecture(self) -> Hashable:
        """Networks that agree in it may run as one batched pass, where heads of one value have no weights."""
        return (*self.sizes, self.options.get("num_values") == 1)

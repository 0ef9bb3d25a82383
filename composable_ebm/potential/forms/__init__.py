"""The ways in which networks are evaluated, one a file, and the registry of them.

    traced    any module that can be read as a list of operations, with their gradients by hand
    native    inside a traced form: chains of convolutions as one function of C
    stacked   networks of one architecture as one batched pass (CUDA)

and whatever a package registers for networks of its own. What no form takes goes by autograd, and
the report says why. Each form equals the plain one to float tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from composable_ebm.potential.operations import Pullback

__all__ = ["Evaluate", "Form", "SpecialForm", "register", "special_form"]

Evaluate = Callable[[Tensor, Tensor | None], tuple[Tensor, Pullback]]
"""x, noise level -> outputs, and cotangents of the outputs -> their gradient by x. No graph is recorded:
call both under `torch.no_grad()`."""


class Form(Protocol):
    """Networks made ready to be evaluated in one way."""

    @property
    def path(self) -> str:
        """How the last states were evaluated, in words."""

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | str:
        """What evaluates states of this shape and type, or why it does not serve them now, empty where
        nothing need be said. It takes over changed weights."""


class SpecialForm(Protocol):
    """A form of several networks of one kind: outputs (networks, batch, ...)."""

    def groups(self, networks: Sequence[Any]) -> list[list[int]]:
        """Which networks, by index, may be evaluated together."""

    def __call__(self, networks: Sequence[Any]) -> Form:
        """The form of networks that may."""


_special: list[tuple[Callable[[nn.Module], bool], SpecialForm]] = []


def register(form: SpecialForm, *, takes: Callable[[nn.Module], bool]) -> None:
    """Makes a form known; the first that takes a network serves it.

    Args:
        form: Several networks as one form.
        takes: Whether a network is of the kind it is for.
    """
    _special.append((takes, form))


def special_form(network: nn.Module) -> SpecialForm | None:
    """The form registered for such a network, or None."""
    return next((form for takes, form in _special if takes(network)), None)

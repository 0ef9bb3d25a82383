"""What an energy is: a number for each state, its score, its structure, and the operators."""

from __future__ import annotations

import copy
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from composable_ebm.data.ranges import as_images
from composable_ebm.energy.checks import independent, naming, one_per_state, parameter_type
from composable_ebm.energy.gradient import with_gradient
from composable_ebm.energy.space import Codec
from composable_ebm.energy.weights import Weight, as_tensor, as_weight, coefficient_type, is_weight

if TYPE_CHECKING:
    from composable_ebm.energy.conditionals import Conditionals

LeafEnergies = Mapping[Hashable, Tensor]

__all__ = ["Algebra", "Axes", "Energy", "LeafEnergies", "as_name", "parameter_count"]


class _Moving(threading.local):
    """Whether an energy is being moved in this thread, with all that it is made of."""

    inside = False


_moving = _Moving()


class Algebra(Protocol):
    """What the operators of an energy build.

    Nodes are energies, so they are written in terms of this file, and this file cannot import them:
    the package gives `Energy.algebra` the module `composable_ebm.energy.algebra`.
    """

    def weighted_sum(self, pairs: Sequence[tuple[Energy, Weight]]) -> Energy: ...

    def either(self, first: Energy, second: Energy) -> Energy: ...

    def negate(self, energy: Energy) -> Energy: ...


class Axes(NamedTuple):
    """Orthonormal directions, (axes, size), and the variance of the data along each, (axes,).

    Least first, but for axes that were kept when variances were taken from other data.
    """

    directions: Tensor
    variances: Tensor


class Energy(nn.Module, ABC):
    """Anything with an energy: `E: (batch, *event) -> (batch,)` in nats, low = likely.

    A subclass is a leaf and defines `energy`; the operators build the nodes.

    Energies are equal where their keys are. Moving or casting a composition leaves the energies that it was
    made of where they are, for whoever else holds them.

    Attributes:
        name: What recipes call it.
        event_shape: Shape of one state, or None where any shape will do.
        data_range: Smallest and largest value of the data, or None where unbounded.
        energy_range: Energies between which nearly all (99.8 %) of its own samples lie, or None
            where unknown. Negation takes its threshold from it, and `SampleResult.report` tells
            by it whether a request was met.
        temperature: T at which exp(-E/T) describes its own samples, where known. Weights mean the same
            only between energies of one temperature.
        likelihood: Whether exp(-E) is the probability of something given x, at most 1, and no density of
            x: that of a classifier. Added to a density it is Bayes' rule.
        codec: What makes pictures of the states, which are its latents; None where states are what they
            are. Energies hold a codec and do not own it: it is none of their modules.
        sampler_settings: Sampler and number of steps it was calibrated with, or None.
        noise_conditioned: Whether `energy` uses the noise level.
        binary: Whether states are bits, 0 or 1. A composition with such a term lives on bits.
        has_value: Whether the number that `energy` returns is an energy. Of a diffusion model only
            the score is known: sums of such energies have the right gradient, see
            `known_by_gradient`, and whatever compares values refuses them.
        given_weight: Weight that `given` takes it with unless told otherwise.
        doubt: How much it doubts one in ten pictures that are of its value, 1 - p(value | x); a tenth where
            that was not measured. See `Particles(surest=True)`.
        wide_states: Whether states have 32 bits at least, where the network works in 16.
    Example:
        >>> both = smile + 2 * glasses        # p ∝ p_smile · p_glasses²
        >>> either = smile | glasses          # p ∝ p_smile + p_glasses
        >>> without = smile + ~glasses
    """

    algebra: ClassVar[Algebra]

    # An array on the left of an operator must not become an array of objects.
    __array_ufunc__ = None

    name: str = ""
    event_shape: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    energy_range: tuple[float, float] | None = None
    sampler_settings: Mapping | None = None
    noise_conditioned: bool = False
    binary: bool = False
    has_value: bool = True
    temperature: float | None = None
    likelihood: bool = False
    codec: Codec | None = None
    given_weight: float = 1.0
    doubt: float = 0.1
    wide_states: bool = False

    is_sum: bool = True
    """Whether it is a weighted sum of what networks give: `read` takes a column, `combine` adds."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "is_sum" not in vars(cls) and ("read" in vars(cls) or "combine" in vars(cls)):
            cls.is_sum = False  # a class that reads or combines in its own way has to say so anew

    @abstractmethod
    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies in nats, shape (batch,), of states `x`, shape (batch, *event).

        `noise_level` is the standard deviation of the noise that `x` carries, in data units; only
        noise-conditioned energies use it.
        """

    # -- evaluation -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        coefficients: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Energies in nats, shape (batch,).

        Args:
            x: States, shape (batch, *event), a tensor or an array.
            coefficients: Replaces `self.coefficients`, shape (n,) or (batch, n).
            noise_level: Noise that `x` carries, in data units, for noise-conditioned leaves.
        Raises:
            ValueError: If `x` or `coefficients` has the wrong shape.
        """
        x = self.as_states(x)
        self.check_states(x)
        if coefficients is None:
            coefficients = self.coefficients
        self.check_coefficients(coefficients, len(x))
        coefficients = coefficients.to(device=x.device, dtype=coefficient_type(x))
        energies: dict[Hashable, Tensor] = {}
        for leaf in self.leaves():
            with naming(leaf, self, x):
                energies[leaf.key] = one_per_state(leaf, leaf.energy(x, noise_level), x)
        return self.combine(energies, coefficients)

    def score(self, x: Tensor, **options: Tensor | None) -> Tensor:
        """-∂E/∂x, shape of `x`: the direction in which states become more likely.

        Args:
            x: States, shape (batch, *event).
            options: `coefficients` and `noise_level`, as in a call.
        """
        _, gradient = with_gradient(lambda x: self(x, **options), self.as_states(x))
        if gradient is None:
            raise ValueError(independent(self))
        return -gradient

    def terms(self, x: Tensor, *, noise_level: Tensor | None = None) -> dict[str, Tensor]:
        """What each term contributes at `x`: text of the term -> energies in nats, (batch,)."""
        return {str(self): self(x, noise_level=noise_level)}

    def as_states(self, x: Any) -> Tensor:
        """States given as an array of NumPy as a tensor, of the type and on the device of the parameters;
        a tensor as it is."""
        if not isinstance(x, np.ndarray):
            return x
        like = next(self.parameters(), torch.empty(0))
        return torch.from_numpy(x.copy()).to(like.device, self.state_dtype or like.dtype)

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The floating type that states must have: that of the parameters, by the first one of each leaf.
        None where there are none.

        Raises:
            ValueError: If leaves differ in it.
        """
        known = [(leaf, kind) for leaf in self.leaves() if (kind := parameter_type(leaf)) is not None]
        for leaf, kind in known[1:]:
            if kind != known[0][1]:
                raise ValueError(
                    f"energies of one composition work in one precision: {known[0][0]} is {known[0][1]}, "
                    f"{leaf} is {kind}. Bring the whole to one, e.g. ({self}).to({known[0][1]})."
                )
        return known[0][1] if known else None

    def check_states(self, x: Tensor) -> None:
        """Raises ValueError unless `x` is a batch of states of this energy."""
        if self.event_shape is None or (tuple(x.shape[1:]) == self.event_shape and x.ndim):
            return
        event = ", ".join(map(str, self.event_shape))
        message = f"`x` must have shape (batch, {event}) for {self}, got {tuple(x.shape)}."
        if tuple(x.shape) == self.event_shape:
            message += " Add the batch axis: x[None]."
        elif x.ndim == 4 and len(self.event_shape) == 3 and x.shape[-1] == self.event_shape[0]:
            message += " Images are channels first: x.permute(0, 3, 1, 2)."
        elif x.ndim == 3 and len(self.event_shape) == 3 and x.shape[-1] == self.event_shape[0]:
            message += " Images are channels first: x.permute(2, 0, 1)[None]."
        raise ValueError(message)

    def check_coefficients(self, coefficients: Tensor, batch: int) -> None:
        """Raises ValueError unless `coefficients` fit this expression and a batch of that size."""
        count, shape = self.num_coefficients, tuple(coefficients.shape)
        if shape not in ((count,), (1, count), (batch, count)):
            raise ValueError(
                f"`coefficients` must have shape ({count},) or (batch, {count}) for {self} "
                f"and a batch of {batch}, got {shape}."
            )

    def unlike(self, energies: Tensor) -> Tensor | None:
        """Which states, given their energies (batch,), are unlike this energy's own samples.

        None where it cannot tell, for want of a range.
        """
        if self.energy_range is None:
            return None
        low, high = self.energy_range
        return energies > high + (high - low)

    def prior(self, noise: Tensor, noise_level: float) -> Tensor | None:
        """States to begin with at a noise level above most detail, from draws of a standard normal.

        None from an energy that knows nothing but the noise. At σ = 10 faces still have their mean, 1.6 σ
        away, and their brightness, 1.7 σ wide, which a flow to lower levels takes along. A composition
        begins where its first density does.

        Args:
            noise: Standard normal, (batch, *event).
            noise_level: σ, in data units.
        """
        first = next((leaf for leaf in self.leaves() if not leaf.likelihood), self)
        return None if first is self else first.prior(noise, noise_level)

    def principal_axes(self, size: int) -> Axes | None:
        """The axes along which the data of a composition's first density vary most; None if it knows of none.

        Args:
            size: Numbers of a state.
        """
        first = next((leaf for leaf in self.leaves() if not leaf.likelihood), self)
        return None if first is self else first.principal_axes(size)

    def images(self, states: Tensor) -> Tensor:
        """States (n, *event) as pictures in [-1, 1]: decoded where they are latents."""
        return as_images(states, self.data_range) if self.codec is None else self.codec.pictures(states)

    def states(self, images: Tensor) -> Tensor:
        """Pictures as states: encoded where states are latents and `images` are none, else as they are."""
        codec = self.codec
        if codec is None or images.shape[1:] == codec.event_shape or images.shape[1:] != codec.image_shape:
            return images
        return codec.latents(images)

    def in_space(self, codec: Codec | None) -> Energy:
        """Says which codec's latents the states are, and returns the energy itself."""
        if codec is not None:
            _ = codec.key  # from now on copies are known to be the same space
        object.__setattr__(self, "codec", codec)  # past nn.Module, which would own it
        return self

    # -- structure ------------------------------------------------------------------------------

    shares: tuple[str, ...] = ()
    """Parts that others may hold as well: moving or casting this energy gives it copies of them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tensors = (*self.parameters(), *self.buffers())
        if self.shares and not _moving.inside and any(fn(tensor) is not tensor for tensor in tensors):
            codecs = (part.codec for part in self.modules() if isinstance(part, Energy))
            memo: dict[int, Any] = {id(codec): codec for codec in codecs}
            for name in self.shares:
                self._modules[name] = copy.deepcopy(self._modules[name], memo)
        outer, _moving.inside = _moving.inside, True  # what is copied now is nobody else's
        try:
            return super()._apply(fn, recurse)
        finally:
            _moving.inside = outer

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Energy) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> Hashable:
        """Equal keys mean the same energy: like terms merge, equal leaves are evaluated once."""
        return id(self)

    def leaves(self) -> Iterator[Energy]:
        """The distinct leaves of this expression, in order of appearance."""
        yield self

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        """The energy of this node, (batch,), from the energies of its leaves, by key."""
        return energies[self.key]

    @property
    def num_coefficients(self) -> int:
        """How many coefficients the expression has, its own first, then those of its children."""
        return 0

    @property
    def coefficients(self) -> Tensor:
        """The coefficients written in the expression, float64, shape (n,) or (batch, n)."""
        return torch.zeros(0, dtype=torch.float64)

    def complement(self) -> Energy:
        """What `~` gives; a finite attribute overrides it with the expert of its other values."""
        return self.algebra.negate(self)

    def marginal(self) -> Energy | None:
        """What it says of x without its attribute, p(x) beside p(x | attribute); None where it has none.

        `given` holds an energy against it, so that all that is not about the attribute counts once.
        """
        return None

    def conditionals(self) -> Conditionals | None:
        """What Gibbs sampling has to know; None where conditionals have no closed form."""
        return None

    def named(self, name: str) -> Energy:
        """Sets the name that recipes and reports print, and returns the energy itself.

        Raises:
            ValueError: If recipes could not read it back.
        """
        self.name = as_name(name)
        return self

    def extra_repr(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.name or type(self).__name__

    def tree(self, indent: int = 0) -> str:
        """An indented view: kinds, weights, parameter counts."""
        return "  " * indent + f"{self}  ({type(self).__name__}{parameter_count(self)})"

    def body(self) -> nn.Module | None:
        """The network that this leaf reads, if leaves may share it; then `read` reads its output."""
        return None

    def read(self, outputs: Tensor) -> Tensor:
        """Energies (batch,) from the outputs of `body()`."""
        raise TypeError(f"{self} has no body to read")

    # -- operators ------------------------------------------------------------------------------

    def __add__(self, other: object) -> Energy:
        if not isinstance(other, Energy):
            return _refused(self, "+", other)
        return self.algebra.weighted_sum([(self, 1.0), (other, 1.0)])

    def __radd__(self, other: object) -> Energy:
        # sum([...]) starts from the number 0.
        return self if isinstance(other, Real) and other == 0 else _refused(other, "+", self)

    def __and__(self, other: object) -> Energy:
        return self + other if isinstance(other, Energy) else _refused(self, "&", other)

    def __rand__(self, other: object) -> Energy:
        return _refused(other, "&", self)

    def __sub__(self, other: object) -> Energy:
        if not isinstance(other, Energy):
            return _refused(self, "-", other)
        return self.algebra.weighted_sum([(self, 1.0), (other, -1.0)])

    def __rsub__(self, other: object) -> Energy:
        return _refused(other, "-", self)

    def __mul__(self, weight: object) -> Energy:
        if not is_weight(weight):
            return _refused(self, "*", weight)
        return self.algebra.weighted_sum([(self, as_weight(weight))])

    def __rmul__(self, weight: object) -> Energy:
        return self * weight if is_weight(weight) else _refused(weight, "*", self)

    def __truediv__(self, temperature: object) -> Energy:
        temperature = as_tensor(temperature)
        if not is_weight(temperature):
            return _refused(self, "/", temperature)
        if not isinstance(temperature, Tensor) and temperature == 0:
            raise ValueError(f"a temperature must not be zero, got ({self}) / {temperature}.")
        return self * (1.0 / temperature)  # type: ignore[operator]

    def __neg__(self) -> Energy:
        return self * -1.0

    def __or__(self, other: object) -> Energy:
        return self.algebra.either(self, other) if isinstance(other, Energy) else _refused(self, "|", other)

    def __ror__(self, other: object) -> Energy:
        return _refused(other, "|", self)

    def __rtruediv__(self, other: object) -> Energy:
        return _refused(other, "/", self)

    def __invert__(self) -> Energy:
        return self.complement()


_NAME = re.compile(r"[A-Za-z_]\w*(?:/[A-Za-z_]\w*)*(?:\[\w+\])?", re.ASCII)


def as_name(name: str) -> str:
    """The name itself, if a recipe can hold it.

    Raises:
        ValueError: If it is no word of letters, digits and underscores, or of such words with / between.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "energies are named by letters, digits and underscores, with / between words, so that recipes "
            f"can be read back, such as 'my_energy' or 'mine/energy'; got {name!r}."
        )
    return name


def _refused(left: object, operator: str, right: object) -> Any:
    """NotImplemented where the other side may know what to do; else says what is meant by such an operator.

    Raises:
        TypeError: For numbers, tensors, modules and functions, which know nothing of energies.
    """
    energy, other = (left, right) if isinstance(left, Energy) else (right, left)
    kind = type(other).__name__
    if isinstance(other, Energy):
        fix = f"The AND of energies is a sum, {left} + {right}; a weight is a number, 2*{left}"
    elif isinstance(other, nn.Module) or callable(other):
        fix = "Make an energy of it first, from_callable(it)"
    elif isinstance(other, (Real, Tensor, np.ndarray)) and operator in "+-":
        fix = f"A constant changes no density; a weight multiplies, 2*{energy}"
    elif isinstance(other, (Real, Tensor, np.ndarray)):
        fix = f"A weight is a number or one a state, (batch,), and multiplies: 2*{energy}, {energy} / 2"
    else:
        return NotImplemented
    if isinstance(other, (Tensor, np.ndarray)):
        kind += f" of shape {tuple(other.shape)}"
    what = str(other) if isinstance(other, Real) else f"<{kind}>"
    sides = [str(side) if isinstance(side, Energy) else what for side in (left, right)]
    raise TypeError(f"{sides[0]} {operator} {sides[1]} has no meaning. {fix}.")


def parameter_count(module: nn.Module) -> str:
    """How many parameters a module has, to print after its name; empty for none."""
    count = sum(p.numel() for p in module.parameters())
    return f", {count:,} parameters" if count else ""

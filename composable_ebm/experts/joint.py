"""A classifier read as a joint energy of pictures and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from composable_ebm.energy.shown import Normalisation, shown_to
from composable_ebm.experts.card import Card
from composable_ebm.experts.expert import Expert

__all__ = ["from_joint_classifier"]


class JointNetwork(nn.Module):
    """-f(x), (batch, labels), the energies of x with each label."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return -self.model(x)


def from_joint_classifier(
    model: nn.Module,
    labels: Sequence[str] | int,
    event_shape: Sequence[int],
    *,
    name: str = "classifier/joint",
    data_range: tuple[float, float] = (-1.0, 1.0),
    normalise: Any = None,
    energy_range: tuple[float, float] | None = None,
) -> Expert:
    """A classifier that was trained as a density too (JEM), as an expert: its logits f are energies.

        E(x, y) = -f(x)[y],     E(x) = -log Σ_y exp f(x)[y],     -log p(y | x) = E(x, y) - E(x)

    `expert[label]` is p(x, label), the expert itself p(x), so `given`, `~` and ratios work as with every
    expert. A plain classifier can be read this way too, but what it then says of p(x) was never trained: use
    `from_classifier` for those.

    Args:
        model: Logits (batch, labels) from pictures.
        labels: Names of the labels, or how many there are.
        event_shape: (channels, height, width).
        name: family/name, as recipes write it.
        data_range: Smallest and largest value of the states.
        normalise: How the model wants its pictures, see `Normalisation.of`; as states are unless given.
        energy_range: Energies E(x) between which nearly all samples lie; `~` of p(x) needs it.
    Example:
        >>> jem = from_joint_classifier(network, ["cat", "dog"], (3, 32, 32))
        >>> mix = given(jem, jem["cat"]) + smile
    Reference:
        Grathwohl et al. (2020), arXiv 1912.03263, eq. 4 to 6.
    """
    names = tuple(map(str, range(labels))) if isinstance(labels, int) else tuple(labels)
    family, _, own = name.rpartition("/")
    if normalise is not None:
        model = shown_to(model, Normalisation.of(normalise), data_range)
    card = Card(
        family=family or "classifier",
        name=own,
        attribute="label",
        values=names,
        event_shape=tuple(event_shape),
        data_range=data_range,
        network={"type": type(model).__name__},
        energy_range={} if energy_range is None else {"any": energy_range},
    )
    return Expert(JointNetwork(model), card)

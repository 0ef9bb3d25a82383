"""A family of exact experts: images of two columns, each bright or dark, independently.

p(x) is a mixture of four Gaussians, so every composition, proportion and temperature is known.
"""

import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.data import LabelledImages
from composable_ebm.evaluation.task import Task

SHAPE = (1, 2, 2)
CENTRE, SPREAD = 0.5, 0.1
VALUES = {"left": ("dark", "bright"), "right": ("dark", "bright")}
SAMPLER = {
    "kernel": "Langevin",
    "step_size": 0.3,
    "num_steps": 20,
    "anneal": {
        "noise_level": {"knots": [[0.0, 3.0], [1.0, 0.02]], "between": "karras"},
        "noise_power": 2.0,
        "predict": True,
        "num_levels": 20,
    },
}


class Columns(nn.Module):
    """E(x, y) of the attribute of one column, or E(x) of none, times a factor that makes it wrong."""

    def __init__(self, column=None, factor=1.0, offset=0.0):
        super().__init__()
        self.column, self.factor, self.offset = column, factor, offset
        self.centres = nn.Parameter(torch.tensor([-CENTRE, CENTRE]), requires_grad=False)

    def forward(self, x, noise_level=None):
        noise = x.new_tensor(0.0) if noise_level is None else noise_level
        variance = SPREAD**2 + noise.reshape(-1, 1, 1) ** 2
        distance = (x[:, 0, :, :, None] - self.centres).square().sum(1)  # (batch, column, value)
        energy = distance / (2 * variance) + variance.log()
        parts = [-torch.logsumexp(-energy[:, c], dim=1, keepdim=True) for c in (0, 1)]
        both = parts[0] + parts[1] if self.column is None else energy[:, self.column] + parts[1 - self.column]
        # What the constant is, at which noise level, says nothing about the density.
        return self.factor * both + self.offset * noise.reshape(-1, 1).sin()


def expert(name, factor=1.0, offset=0.0):
    """The expert of "left", of "right", or of p(x)."""
    column = {"left": 0, "right": 1}.get(name)
    values = VALUES.get(name, ("image",))
    card = ceb.Card(
        "folder",
        name,
        name if column is not None else "image",
        values,
        SHAPE,
        (-1.0, 1.0),
        {},
        sampler=SAMPLER,
        noise_conditioned=True,
    )
    return ceb.Expert.standing(Columns(column, factor, offset).eval(), card)


def task(factor=1.0, held_out=()):
    """The family with its base; `factor` 1 is right at T = 1."""
    experts = {name: expert(name, factor, offset) for name, offset in (("left", 0.0), ("right", 4.0))}
    terms = {name: {i: e[v] for i, v in enumerate(VALUES[name])} for name, e in experts.items()}
    return Task("folder", experts, terms, expert("base", factor), list(held_out), (1, 2))


def images(count=1200, seed=0):
    """Real images with their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count, 2), generator=generator)
    centres = (2 * labels - 1) * CENTRE
    x = centres[:, None, None, :] + SPREAD * torch.randn(count, *SHAPE, generator=generator)
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return LabelledImages(
        pixels, {"left": labels[:, 0].clone(), "right": labels[:, 1].clone()}, VALUES, "toy"
    )


class Measure:
    """A judge that measures: the sign of a column; its features are the pixels."""

    def labels(self, x):
        means = x.mean(dim=(1, 2))
        return {"left": (means[:, 0] > 0).long(), "right": (means[:, 1] > 0).long()}

    def features(self, x):
        return x.flatten(1)

"""Judges: classifiers that say which attributes an image shows.

A judge is trained on images that no expert saw where the data set allows it (other renderings), is
held to its own accuracy, and never guides a sampler. Two architectures, so that a headline can be
confirmed by a judge with other habits. Attributes that can be measured are measured, not judged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from composable_ebm.data import LabelledImages, load_data, measured
from composable_ebm.files import write_atomic

KINDS = ("convolutional", "mixer")
TRAINING = {"iterations": 1200, "batch": 128, "rate": 1e-3, "noise": 0.15, "seed": 0}
# Of pictures of more than 32 pixels, in bfloat16: five minutes of one core and one.
LARGE: dict[str, dict[str, float]] = {
    "convolutional": {**TRAINING, "iterations": 900, "batch": 64},
    "mixer": {**TRAINING, "iterations": 700, "batch": 48},
}
# Experts learn from "train"; MNIST has too few other images to make a judge from.
SPLITS = {"digits": "train", "faces": "test", "shapes": "test"}

__all__ = ["KINDS", "Judge", "load_judge"]


class Judge(nn.Module):
    """One trunk, one linear head per attribute.

    Args:
        event_shape: (channels, height, width), the sides divisible by 4.
        values: Attribute -> names of its values.
        kind: "convolutional", or "mixer" (layers that mix patches, then channels).
    Reference:
        Tolstikhin et al. (2021), MLP-Mixer, arXiv 2105.01601, for the second kind.
    """

    def __init__(
        self, event_shape: tuple[int, ...], values: Mapping[str, tuple[str, ...]], kind: str
    ) -> None:
        super().__init__()
        channels, height, width = event_shape
        if kind == "convolutional":
            self.trunk = nn.Sequential(
                nn.PixelUnshuffle(2),
                nn.Conv2d(4 * channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(64, 64, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64 * (height // 4) * (width // 4), 128),
                nn.ReLU(),
            )
        elif kind == "mixer":
            patches = (height // 4) * (width // 4)
            self.trunk = nn.Sequential(
                nn.PixelUnshuffle(4),
                nn.Flatten(2),
                _Transposed(nn.Linear(16 * channels, 96)),
                *[layer for _ in range(2) for layer in (_Mix(patches, 96), _Transposed(_Mix(96, patches)))],
                nn.Flatten(),
                nn.Linear(96 * patches, 128),
                nn.ReLU(),
            )
        else:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(names)) for name, names in values.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (batch, values) of each attribute."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def features(self, x: Tensor, chunk: int = 500) -> Tensor:
        """What the heads see, (batch, 128): the space of `fid_attr`, precision and recall."""
        return torch.cat([self.trunk(part) for part in x.split(chunk)])

    @torch.no_grad()
    def labels(self, x: Tensor, chunk: int = 500) -> dict[str, Tensor]:
        """The value of each attribute that it sees, (batch,)."""
        parts = [self(part) for part in x.split(chunk)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in self.heads}


class _Mix(nn.Module):
    """A residual layer over the last axis; `other` is the size of the axis before, for the norm."""

    def __init__(self, size: int, other: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([other, size])
        self.layers = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


class _Transposed(nn.Module):
    """A layer over the second axis of (batch, a, b)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT).mT


def load_judge(name: str, kind: str = KINDS[0], root: str | None = None, cache: str | Path = "runs/judges"):
    """A judge of a data set, trained if need be, and its accuracy on held-out images.

    Args:
        name: A data set of `composable_ebm.data`.
        kind: One of `KINDS`.
        root: Folder of the data.
        cache: Where trained judges are kept.
    Returns:
        The judge, and attribute -> accuracy on the validation split.
    """
    held_out = load_data(name, "validation", root)
    training = LARGE[kind] if held_out.event_shape[-1] > 32 else TRAINING
    recipe = json.dumps([name, kind, training, held_out.values, held_out.event_shape], sort_keys=True)
    path = Path(cache) / f"{name}-{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}.safetensors"
    torch.manual_seed(int(training["seed"]))
    judge = Judge(held_out.event_shape, held_out.values, kind)
    if path.exists():
        judge.load_state_dict(load_file(path))
    else:
        data = load_data(name, SPLITS.get(name, "test"), root)
        _train(judge, data, training, f"judge {name} ({kind})")
        write_atomic(path, save({k: v.contiguous() for k, v in judge.state_dict().items()}))
    judge.eval().requires_grad_(False)
    return judge, _accuracy(judge, held_out)


def see(judge: Judge, name: str, x: Tensor) -> dict[str, Tensor]:
    """Labels of samples: measured where the data set can measure, judged otherwise."""
    return {**judge.labels(x), **measured(name, x)}


def _train(judge: Judge, data: LabelledImages, training: Mapping[str, float], title: str) -> None:
    generator = torch.Generator().manual_seed(int(training["seed"]))
    iterations, batch = int(training["iterations"]), int(training["batch"])
    optimiser = torch.optim.AdamW(judge.parameters(), training["rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training["rate"] * 2, iterations)
    judge.train()
    for _ in tqdm(range(iterations), desc=title, dynamic_ncols=True):
        index = torch.randint(len(data), (batch,), generator=generator)
        x = data.batch(index)
        strength = training["noise"] * torch.rand(batch, 1, 1, 1, generator=generator)
        noisy = x + strength * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=training is not TRAINING):
            outputs = judge(noisy)
        # Unlabelled images, -1, are ignored by their attribute alone.
        losses = [
            F.cross_entropy(outputs[n].float(), data.labels[n][index], ignore_index=-1) for n in outputs
        ]
        optimiser.zero_grad()
        torch.stack([loss for loss in losses if loss.isfinite()]).sum().backward()
        optimiser.step()
        schedule.step()


def _accuracy(judge: Judge, data: LabelledImages) -> dict[str, float]:
    parts = [judge.labels(data.batch(index)) for index in torch.arange(len(data)).split(500)]
    seen = {name: torch.cat([part[name] for part in parts]) for name in data.labels}
    accuracy = {}
    for name, labels in data.labels.items():
        known = labels >= 0
        accuracy[name] = float((seen[name][known] == labels[known]).float().mean())
    return accuracy

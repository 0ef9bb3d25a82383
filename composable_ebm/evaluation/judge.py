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
SMALL = 32
TRAINING = {"iterations": 1200, "batch": 128, "rate": 1e-3, "noise": 0.15, "seed": 0}
# Of pictures of more than 32 pixels, in bfloat16, each shifted, softened and, where that changes no label,
# mirrored by chance: six minutes of one core.
LARGE = {**TRAINING, "iterations": 4000, "batch": 64, "shift": 2, "softness": 0.8}
MIRRORED = ("portraits",)
# Experts learn from "train"; MNIST has too few other images to make a judge from, and the 74 families of
# typefaces for tests are few: a judge of 255 reads 98.4 % of letters of unseen families, one of 74 read 97.
SPLITS = {"digits": "train", "faces": "test", "letters": "train", "shapes": "test"}

__all__ = ["KINDS", "Judge", "load_judge"]


class Judge(nn.Module):
    """One trunk, one linear head per attribute.

    Args:
        event_shape: (channels, height, width), the sides divisible by 4; by 8 above 32 pixels, where the
            networks are larger.
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
        large = height > SMALL
        if kind == "convolutional" and large:
            self.trunk = nn.Sequential(
                nn.PixelUnshuffle(4),
                nn.Conv2d(16 * channels, 64, 3, padding=1),
                _Residual(64),
                nn.PixelUnshuffle(2),
                nn.Conv2d(256, 128, 1),
                *[_Residual(128) for _ in range(2)],
                nn.Flatten(),
                nn.Linear(128 * (height // 8) * (width // 8), 128),
                nn.ReLU(),
            )
        elif kind == "convolutional":
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
            side, size, layers = (8, 192, 3) if large else (4, 96, 2)
            patches = (height // side) * (width // side)
            mixing = [(_Mix(patches, size), _Transposed(_Mix(size, patches))) for _ in range(layers)]
            self.trunk = nn.Sequential(
                nn.PixelUnshuffle(side),
                nn.Flatten(2),
                _Transposed(nn.Linear(side**2 * channels, size)),
                *[layer for pair in mixing for layer in pair],
                nn.Flatten(),
                nn.Linear(size * patches, 128),
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


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; begins as the shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


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
    training = dict(TRAINING if held_out.event_shape[-2] <= SMALL else LARGE)
    if name in MIRRORED:
        training["mirror"] = 1
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
        x = _varied(data.batch(index), training, generator)
        strength = training["noise"] * torch.rand(batch, 1, 1, 1, generator=generator)
        noisy = x + strength * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=data.event_shape[-2] > SMALL):
            outputs = judge(noisy)
        # Unlabelled images, -1, are ignored by their attribute alone.
        losses = [
            F.cross_entropy(outputs[n].float(), data.labels[n][index], ignore_index=-1) for n in outputs
        ]
        optimiser.zero_grad()
        torch.stack([loss for loss in losses if loss.isfinite()]).sum().backward()
        optimiser.step()
        schedule.step()


def _varied(x: Tensor, training: Mapping[str, float], generator: torch.Generator) -> Tensor:
    """Pictures as they might also have been: nearby, less sharp, in a mirror."""
    count, _, height, width = x.shape
    if shift := int(training.get("shift", 0)):
        padded = F.pad(x, (shift,) * 4, mode="replicate")
        down, across = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        rows, columns = down + torch.arange(height), across + torch.arange(width)
        x = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        x = x.permute(0, 3, 1, 2)
    if softness := training.get("softness", 0.0):
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x.lerp(soft, softness * torch.rand(count, 1, 1, 1, generator=generator))
    if training.get("mirror"):
        x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
    return x


def _accuracy(judge: Judge, data: LabelledImages) -> dict[str, float]:
    parts = [judge.labels(data.batch(index)) for index in torch.arange(len(data)).split(500)]
    seen = {name: torch.cat([part[name] for part in parts]) for name in data.labels}
    accuracy = {}
    for name, labels in data.labels.items():
        known = labels >= 0
        accuracy[name] = float((seen[name][known] == labels[known]).float().mean())
    return accuracy

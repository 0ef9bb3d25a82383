"""What a training leaves behind: the expert, with held-out figures and the energies of its own samples."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from composable_ebm.data import LabelledImages
from composable_ebm.data.ranges import as_states
from composable_ebm.energy import slope
from composable_ebm.experts.card import Card
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks.skeleton import GaussianSkeleton
from composable_ebm.experts.store import save_expert
from composable_ebm.files import write_atomic
from composable_ebm.sampling.engine import Engine
from composable_ebm.train.config import TrainConfig

DOUBTED = 0.9  # share of held-out pictures that are doubted less than an expert's `doubt`
HELD_OUT = 1024
DENOISING_LEVELS = (0.1, 0.3, 1.0)
METRICS = "metrics.jsonl"
UNFINISHED = "unfinished"
"""On a card whose training goes on: True, or the name of the stage to come."""
FLOOR_DATA, FLOOR_SHARE = 1024, 0.001
FLOOR_STRIDE, FLOOR_CANDIDATES = 8, 32
"""Every so many levels all pictures are looked at; between them so many of the lowest at either end."""

__all__ = [
    "METRICS",
    "UNFINISHED",
    "calibrated",
    "export",
    "export_unfinished",
    "floored",
    "held_out_metrics",
    "sample_values",
]


def sample_values(expert: Expert, per_value: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Samples from noise for each value of an expert, (per_value, *event), by its own settings."""
    with Engine() as engine:
        runs = {
            value: engine.submit(expert[value], per_value, seed=seed + i, on_divergence="report")
            for i, value in enumerate(expert.card.values)
        }
        return {value: run.result().samples for value, run in runs.items()}


def held_out_metrics(expert: Expert, data: LabelledImages) -> dict[str, float]:
    """How the expert does on images it has not seen.

    Returns:
        `heldout_energy` and `noise_energy`, means over data and noise in nats under the right labels,
        and `heldout_cd`, their difference, which falls as the expert learns, if it has energies;
        `heldout_accuracy` of choosing the value with the least energy, and `heldout_doubt`, which
        1 - p(y | x) of the right value exceeds for one picture in ten, if it has several;
        `heldout_denoising`, its denoising error over that which its Gaussian skeleton expects,
        `heldout_gaussian`, that of the skeleton alone on the same images, and `heldout_loss`, the first and
        half the cross entropy of its values at the same noise, if it has a skeleton; that cross entropy
        alone, if it is a classifier of noisy states.
    """
    device = next(expert.network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(data), generator=generator)[:HELD_OUT]
    data_range = expert.card.data_range
    x = data.batch(index)
    if data_range is not None:
        x = as_states(x, data_range, expert.binary, generator)
    x = x.to(device)
    attribute = expert.card.attribute
    labels = (data.labels[attribute][index] if attribute in data.labels else torch.zeros_like(index)).to(
        device
    )
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    if data_range is None:
        noise = torch.randn(x.shape, generator=generator).to(device)
    else:
        noise = as_states(noise, data_range, expert.binary, generator).to(device)
    with torch.no_grad():
        outputs, of_noise = expert.network(x), expert.network(noise)
    metrics = {}
    if expert.has_value:
        energy = outputs.gather(1, labels[:, None]).mean()
        noise_energy = of_noise.gather(1, labels[:, None]).mean()
        metrics["heldout_energy"] = float(energy)
        metrics["noise_energy"] = float(noise_energy)
        metrics["heldout_cd"] = float(energy - noise_energy)
    if outputs.shape[1] > 1:
        metrics["heldout_accuracy"] = float((outputs.argmin(1) == labels).float().mean())
        right = (-outputs.double()).log_softmax(1).gather(1, labels[:, None])
        metrics["heldout_doubt"] = float((-torch.expm1(right)).quantile(DOUBTED))
    if isinstance(expert.network, GaussianSkeleton):
        metrics |= _denoising(expert.network, x, labels, generator)
    elif expert.noise_conditioned and outputs.shape[1] > 1:
        metrics["heldout_loss"] = _noisy_entropy(expert.network, x, labels, generator)
    return metrics


def _denoising(
    network: GaussianSkeleton, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Mean squared error of x̃ - σ² ∂E/∂x̃ over the Gaussian's own, mean over noise levels, and the loss."""
    errors, plain, entropies = [], [], []
    for level in DENOISING_LEVELS:
        sigma = torch.full((len(x),), level, device=x.device)
        noisy = x + level * torch.randn(x.shape, generator=generator).to(x.device)
        with torch.enable_grad():
            noisy.requires_grad_()
            outputs = network(noisy, sigma)
            gradient = slope(outputs.gather(1, labels[:, None])[:, 0], noisy)
        error = (noisy.detach() - level**2 * gradient - x).square().mean()
        errors.append(float(error / network.denoiser_error(sigma[0])))
        if (best_guess := _gaussian_guess(network, noisy.detach(), level)) is not None:
            plain.append(float((best_guess - x).square().mean() / network.denoiser_error(sigma[0])))
        entropies.append(float(torch.nn.functional.cross_entropy(-outputs.detach(), labels)))
    denoising, entropy = (sum(figures) / len(figures) for figures in (errors, entropies))
    gaussian = {"heldout_gaussian": sum(plain) / len(plain)} if plain else {}
    return {"heldout_denoising": denoising, **gaussian, "heldout_loss": denoising + entropy / 2}


@torch.no_grad()
def _noisy_entropy(
    network: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> float:
    """Mean of -log p(y | x̃, σ) over noise levels."""
    losses = []
    for level in DENOISING_LEVELS:
        noisy = x + level * torch.randn(x.shape, generator=generator).to(x.device)
        outputs = network(noisy, torch.full((len(x),), level, device=x.device))
        losses.append(float(torch.nn.functional.cross_entropy(-outputs, labels)))
    return sum(losses) / len(losses)


def _gaussian_guess(network: GaussianSkeleton, noisy: torch.Tensor, level: float) -> torch.Tensor | None:
    """What the skeleton alone takes to be behind noise, where it is one of whole pictures."""
    if network.mean.numel() != noisy[0].numel():
        return None
    d = noisy.flatten(1) - network.mean
    along = d @ network.axes.T
    kept = network.variances / (network.variances + level**2)
    rest = network.residual / (network.residual + level**2)
    guess = network.mean + rest * d + ((kept - rest) * along) @ network.axes
    return guess.reshape(noisy.shape)


def export(
    config: TrainConfig,
    expert: Expert,
    facts: Mapping,
    data: LabelledImages,
    figures: Mapping[str, float] | None = None,
) -> Expert:
    """Writes the expert with the energies of its own samples, its metrics and its training curve.

    Args:
        config: Says where.
        expert: What is written.
        facts: How the training went.
        data: Held-out images.
        figures: More metrics.
    """
    if isinstance(expert.network, GaussianSkeleton) and expert.has_value:
        expert = floored(expert, data)
    card = calibrated(expert, data)
    card = replace(card, metrics={**card.metrics, **(figures or {})})
    return _write(config, expert, card, facts)


@torch.no_grad()
def floored(expert: Expert, data: LabelledImages) -> Expert:
    """The expert with a floor of its energies, a little below the lowest 0.1 % of data at each level."""
    network = expert.network
    assert isinstance(network, GaussianSkeleton)
    network.set_floor(())
    count = min(len(data), FLOOR_DATA)
    place = max(1, round(FLOOR_SHARE * count))
    levels = network.levels_of_floor()

    def energies(level: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        parts = [data.batch(part).to(level.device) for part in index.split(256)]
        return torch.cat([-(-network(x, level)).logsumexp(1) for x in parts]).cpu()

    levels = levels.to(next(network.parameters()).device)
    of_all = {i: energies(levels[i], torch.arange(count)) for i in range(0, len(levels), FLOOR_STRIDE)}
    floor = []
    for i, level in enumerate(levels):
        before = i - i % FLOOR_STRIDE
        found = of_all[before]
        if i != before:  # what is lowest here is low at both ends
            ends = found, of_all[before + FLOOR_STRIDE]
            low = torch.cat([end.argsort()[: FLOOR_CANDIDATES + place] for end in ends]).unique()
            found = energies(level, low)
        lowest = float(found.kthvalue(place).values)
        floor.append(round(max(lowest - network.floor_below, network.lowest), 2))
    network.set_floor(floor)
    card = replace(expert.card, network={**expert.card.network, "floor": floor})
    return Expert.standing(network, card, expert.codec, expert.base)


def export_unfinished(
    config: TrainConfig, expert: Expert, facts: Mapping, metrics: Mapping, to_come: str = ""
) -> Expert:
    """Writes the expert as it is in the middle of a training: it can be sampled, and is not calibrated.

    Args:
        config: Says where.
        expert: What is written.
        facts: How the training went until now.
        metrics: Its `held_out_metrics`.
        to_come: Name of the stage that follows, where one has ended.
    """
    rounded = {name: round(value, 4) for name, value in metrics.items()}
    card = replace(expert.card, metrics=rounded)
    return _write(config, expert, card, {**facts, UNFINISHED: to_come or True})


def _write(config: TrainConfig, expert: Expert, card: Card, facts: Mapping) -> Expert:
    curve = config.run_folder / METRICS
    training = {"machine": _machine(next(expert.network.parameters()).device), **facts}
    card = save_expert(
        config.model_folder, expert.network, replace(card, training=training), half=config.half
    )
    if curve.exists():
        write_atomic(config.model_folder / METRICS, curve.read_bytes())
    return Expert.standing(expert.network, card, expert.codec, expert.base)


def calibrated(expert: Expert, data: LabelledImages) -> Card:
    """The card with the energies of samples drawn by the stored sampler, and held-out metrics."""
    ranges = _energy_ranges(expert) if expert.has_value else {}
    metrics = {name: round(value, 4) for name, value in held_out_metrics(expert, data).items()}
    return replace(expert.card, energy_range=ranges, metrics=metrics)


@torch.no_grad()
def _energy_ranges(expert: Expert) -> dict[str, tuple[float, float]]:
    """Value (or "any") -> energies between which 99.8 % of samples drawn by the stored sampler lie."""
    samples = sample_values(expert, max(16, 256 // len(expert.card.values)))
    device = next(expert.network.parameters()).device
    ranges = {value: _central(expert[value](x.to(device))) for value, x in samples.items()}
    ranges["any"] = _central(expert["any"](torch.cat(list(samples.values())).to(device)))
    return ranges


def _central(energies: torch.Tensor) -> tuple[float, float]:
    ends = torch.quantile(energies.float().cpu(), torch.tensor([0.001, 0.999]))
    return float(ends[0]), float(ends[1])


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"

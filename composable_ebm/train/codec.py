"""What a training of a codec leaves behind, and what a codec makes of data."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from composable_ebm.data import LabelledImages, LabelledLatents
from composable_ebm.energy import Codec
from composable_ebm.experts.card import Card
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.store import CONFIG, read_card, save_expert
from composable_ebm.files import write_atomic
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.objectives.reconstruction import Reconstruction

HELD_OUT = 512
NOISE_LEVELS = (0.1, 0.3)
SHOWN = 24

__all__ = ["codec_metrics", "codec_sheet", "encoded", "export_codec"]


@torch.no_grad()
def encoded(data: LabelledImages, codec: Codec, cache: Path | None = None) -> LabelledLatents:
    """The same data set as latents of a codec, in 16 bits.

    Args:
        data: Pictures.
        codec: Their codec.
        cache: A folder that keeps latents, so that every attribute of a family finds them there.
    """
    path = None if cache is None else cache / f"latents-{_key(data, codec)}.safetensors"
    latents = None
    if path is not None and path.exists():
        with contextlib.suppress(SafetensorError, KeyError, OSError):  # damaged: encoded again
            latents = load_file(path)["latents"]
    if latents is None:
        batches = torch.arange(len(data)).split(256)
        slow = tqdm(batches, desc=f"encoding {data.name}", unit="batch", disable=None, delay=2)
        latents = torch.cat([codec.latents(data.batch(index)).half() for index in slow])
        if path is not None:
            write_atomic(path, save({"latents": latents.contiguous().cpu()}))
    return LabelledLatents(latents.to(data.images.device), data.labels, data.values, data.name)


def _key(data: LabelledImages, codec: Codec) -> str:
    """Names these pictures under this codec."""
    digest = hashlib.sha256(codec.digest.encode())
    digest.update(data.images.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def codec_metrics(codec: PictureCodec, data: LabelledImages) -> dict[str, float]:
    """How well held-out pictures come back.

    Returns:
        `heldout_squared_error` a pixel, of pictures in [-1, 1]; the same with noise on the latents; and
        `latent_scale`, their standard deviation, which should be 1.
    """
    device = next(codec.parameters()).device
    x = data.batch(torch.arange(min(len(data), HELD_OUT))).to(device)
    z = codec.latents(x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator).to(device)
    metrics = {"heldout_squared_error": float((codec.pictures(z) - x).square().mean())}
    for level in NOISE_LEVELS:
        error = (codec.pictures(z + level * noise) - x).square().mean()
        metrics[f"heldout_squared_error_at_{level:g}"] = float(error)
    return {**metrics, "latent_scale": float(z.std())}


def codec_sheet(codec: PictureCodec, data: LabelledImages) -> torch.Tensor:
    """Held-out pictures and, in the row below, what comes back of them, (2·n, *image)."""
    x = data.batch(torch.arange(min(len(data), SHOWN))).to(next(codec.parameters()).device)
    back = codec.reconstruct(x)
    rows = zip(x.split(8), back.split(8), strict=True)
    return torch.cat([part for row in rows for part in row])


def export_codec(
    config: TrainConfig, codec: PictureCodec, card: Card, facts: Mapping, data: LabelledImages
) -> PictureCodec:
    """Writes the codec with its held-out figures; experts beside it stay its if the encoder stood still."""
    metrics = {name: round(value, 5) for name, value in codec_metrics(codec, data).items()}
    stood_still = isinstance(config.objective, Reconstruction) and config.objective.decoder_only
    before = str(read_card(Path(config.init)).weights.get("sha256")) if stood_still else ""
    written = save_expert(
        config.model_folder, codec, replace(card, metrics=metrics, training=dict(facts)), config.half
    )
    if stood_still:
        _adopt(config.model_folder.parent, before, str(written.weights["sha256"]))
    return codec


def _adopt(family: Path, before: str, now: str) -> None:
    """Experts of a family that name one codec name another of the same encoder."""
    for path in family.glob(f"*/{CONFIG}"):
        expert = read_card(path.parent)
        if expert.codec == before:
            write_atomic(path, replace(expert, codec=now).to_json().encode())

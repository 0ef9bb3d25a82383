"""Experts as files: `model.safetensors` and `config.json` in one folder. Nothing is unpickled.

A codec is stored like an expert, in the folder `codec` of its family, and the cards of experts on its latents
name the hash of its weights: they are loaded with that codec or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.expert import Expert, mark_loaded
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import CODECS, PictureCodec
from composable_ebm.files import write_atomic

CONFIG, WEIGHTS, CODEC = "config.json", "model.safetensors", "codec"
BASE = "base"
_bases: WeakValueDictionary[tuple[str, str], Expert] = WeakValueDictionary()
_codecs: WeakValueDictionary[tuple[str, str], PictureCodec] = WeakValueDictionary()

__all__ = [
    "CODEC",
    "CONFIG",
    "WEIGHTS",
    "find_codec",
    "load_codec",
    "load_folder",
    "read_card",
    "save_expert",
]


def save_expert(folder: str | Path, network: nn.Module, card: Card, half: bool = False) -> Card:
    """Writes an expert and returns its card with the hash, size and parameter count of the weights.

    Args:
        folder: Usually models/<family>/<name>.
        network: One of `NETWORKS` or `CODECS`.
        card: Its description.
        half: Stores floats in 16 bits; they are 32 again when loaded.
    Raises:
        ValueError: If a weight is not finite, as it is stored.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    if half:
        state = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{card.full_name} is not finite in {', '.join(broken)}, so it is not written."
            + (" Weights of 16 bits reach to 65,504: store it with half = false." if half else "")
        )
    content = save(state)
    card = replace(
        card,
        weights={
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    )
    write_atomic(Path(folder) / WEIGHTS, content)
    write_atomic(Path(folder) / CONFIG, card.to_json().encode())
    return card


def read_card(folder: str | Path) -> Card:
    """The card of the expert in `folder`.

    Raises:
        CheckpointError: If it is missing or does not say what an expert needs.
    """
    path = Path(folder) / CONFIG
    try:
        return Card.from_json(_read(path).decode())
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe an expert: {error}.") from error


def load_folder(folder: str | Path, device: torch.device | str | None = None) -> Expert:
    """The expert in `folder`, checked against its own description.

    Raises:
        CheckpointError: If a file is missing, truncated or changed, or the weights do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    outputs, shape = card.network.get("num_values", 1), tuple(card.network.get("event_shape", ()))
    network = _build(card, folder / CONFIG, NETWORKS)
    if outputs != len(card.values) or shape != card.event_shape:
        raise CheckpointError(
            f"{folder / CONFIG} describes {len(card.values)} values of shape {card.event_shape}, but its "
            f"network gives {outputs} for shape {shape}."
        )
    _fill(network, folder, card)
    codec = find_codec(folder, card.codec, device) if card.codec else None
    base = find_base(folder, card.base, device) if card.base else None
    if base is None and getattr(network, "adds_to_base", False):
        raise CheckpointError(
            f"{folder / CONFIG} describes a classifier, an energy only beside a density: its `base` must "
            "give the SHA-256 of its family's base expert."
        )
    network = network.to(device).eval().requires_grad_(False)
    mark_loaded(network, card)
    return Expert.standing(network, card, codec, base)


def load_codec(folder: str | Path, device: torch.device | str | None = None) -> PictureCodec:
    """The codec in `folder`, one instance for all who ask, checked against its own description.

    Raises:
        CheckpointError: If a file is missing, truncated or changed, or the weights do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    digest = str(card.weights.get("sha256"))
    key = (digest, str(torch.empty(0, device=device).device))
    codec = _codecs.get(key)
    if codec is None:
        codec = _build(card, folder / CONFIG, CODECS)
        _fill(codec, folder, card)
        codec.digest = digest
        _codecs[key] = codec.to(device).eval().requires_grad_(False)
    return codec


def find_codec(folder: Path, digest: str, device: torch.device | str | None = None) -> PictureCodec:
    """The codec of the expert in `folder`: in it, or beside it.

    Raises:
        CheckpointError: If there is none, or it is another than the expert was trained with.
    """
    places = (folder / CODEC, folder.parent / CODEC)
    place = next((place for place in places if (place / CONFIG).exists()), None)
    if place is None:
        raise CheckpointError(
            f"{folder} holds an expert on the latents of a codec, which is neither in {places[0]} nor in "
            f"{places[1]}: copy the codec of its family there."
        )
    codec = load_codec(place, device)
    if codec.digest != digest:
        raise CheckpointError(
            f"the expert in {folder} was trained on latents of the codec {digest[:12]}…, and {place} holds "
            f"{codec.digest[:12]}…. Train the expert again, or bring its codec back."
        )
    return codec


def find_base(folder: Path, digest: str, device: torch.device | str | None = None) -> Expert:
    """The expert of p(x) that the one in `folder` adds an attribute to: in it, or beside it.

    Raises:
        CheckpointError: If there is none, or it is another than the card names.
    """
    places = (folder / BASE, folder.parent / BASE)
    place = next((place for place in places if (place / CONFIG).exists()), None)
    if place is None:
        raise CheckpointError(
            f"{folder} holds what an attribute adds to a density, which is neither in {places[0]} nor in "
            f"{places[1]}: copy the base expert of its family there."
        )
    found = str(read_card(place).weights.get("sha256"))
    if found != digest:
        raise CheckpointError(
            f"the expert in {folder} stands on the base {digest[:12]}…, and {place} holds {found[:12]}…. "
            "Train the expert again, or bring its base back."
        )
    key = (found, str(torch.empty(0, device=device).device))
    base = _bases.get(key)
    if base is None:
        base = _bases[key] = load_folder(place, device)
    return base


def _fill(network: nn.Module, folder: Path, card: Card) -> None:
    """Gives a network the weights in a folder, checked against the card."""
    path = folder / WEIGHTS
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights.get("sha256"):
        size = card.weights.get("bytes")
        what = f"is truncated ({len(content)} of {size} bytes)" if size != len(content) else "was changed"
        raise CheckpointError(
            f"{path} {what}: its SHA-256 is {digest[:12]}…, {CONFIG} says "
            f"{str(card.weights.get('sha256'))[:12]}…. Copy or train the expert again."
        )
    try:
        state = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network in {folder / CONFIG}: {error}") from error


def _build(card: Card, path: Path, known: Mapping[str, Callable[..., nn.Module]]) -> nn.Module:
    options = dict(card.network)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{path} names the network {kind!r}; this version knows {', '.join(known)}.")
    build = known[kind]
    try:
        with _Undrawn():
            network = build(**options)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} gives {kind} arguments that do not fit: {error}.") from error
    return network


class _Undrawn(TorchFunctionMode):
    """Networks built inside draw no initial weights, which takes most of the time of loading one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}. An expert is a folder with {CONFIG} and {WEIGHTS}."
        ) from error

"""Experts as files: `model.safetensors` and `config.json` in one folder. Nothing is unpickled.

A codec is stored like an expert, in the folder `codec` of its family, and the cards of experts on its latents
name the hash of its weights: they are loaded with that codec or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.construction import (
    Known,
    build_described,
    check_description,
    check_fit,
    check_sizes,
    most_bytes,
    plan,
)
from composable_ebm.experts.expert import Expert, mark_loaded
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import CODECS, PictureCodec
from composable_ebm.experts.pair import CONFIG, WEIGHTS, read_card, read_weights, write_pair

CODEC, BASE = "codec", "base"
TRIES = 3  # to read a card and its weights while somebody writes others
_bases: WeakValueDictionary[tuple[str, str], Expert] = WeakValueDictionary()
_codecs: WeakValueDictionary[tuple[str, str], PictureCodec] = WeakValueDictionary()
_checked: dict[Path, tuple[tuple, Card | str]] = {}
"""Folder -> what its files were when they were read last, and the card or what was wrong."""

__all__ = [
    "BASE",
    "CODEC",
    "CONFIG",
    "WEIGHTS",
    "check_folder",
    "find_base",
    "find_codec",
    "load_codec",
    "load_folder",
    "read_card",
    "save_expert",
]


def save_expert(folder: str | Path, network: nn.Module, card: Card, half: bool = False) -> Card:
    """Writes an expert and returns its card with the hash, size and parameter count of the weights.

    Nothing is written that `load_expert` could not read, and both files or neither.

    Args:
        folder: Usually models/<family>/<name>.
        network: One of `NETWORKS` or `CODECS`, or of a class of your own after `register_network`.
        card: Its description, whose `network` is the type and the arguments that build such a network.
        half: Stores floats in 16 bits; they are 32 again when loaded.
    Raises:
        ValueError: If the card does not describe the network, or a weight is not finite.
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
    check_description(network, card)
    content = save(state)
    card = replace(
        card,
        weights={
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    )
    write_pair(Path(folder), content, card)
    return card


def load_folder(folder: str | Path, device: torch.device | str | None = None) -> Expert:
    """The expert in `folder`, checked against its own description.

    Raises:
        CheckpointError: If a file is missing, truncated or changed, or the weights do not fit.
    """
    folder = Path(folder)
    card, network = _loaded(folder, NETWORKS)
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


def check_folder(folder: str | Path) -> Card:
    """The card of an expert whose files are what it says, with its codec and base, and whose weights are
    numbers.

    The files are read once, and again when they change.

    Raises:
        CheckpointError: If the expert could not be loaded.
    """
    folder = Path(folder).resolve()
    card = _check_files(folder)
    if card.codec:
        _check_files(_place_of_codec(folder, card.codec))
    if card.base:
        check_folder(_place_of_base(folder, card.base))
    return card


def _check_files(folder: Path) -> Card:
    stamp = _stamp(folder)
    if (known := _checked.get(folder)) is None or known[0] != stamp:
        try:
            card = read_card(folder)
            _read_state(folder, card)
            known = stamp, card
        except CheckpointError as error:
            known = stamp, str(error)
        _checked[folder] = known
    if isinstance(known[1], str):
        raise CheckpointError(known[1])
    return known[1]


def _stamp(folder: Path) -> tuple:
    """What changes with the files of an expert."""
    stamp: list[object] = []
    for name in (CONFIG, WEIGHTS):
        try:
            found = (folder / name).stat()
            stamp.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError as error:
            stamp.append(error.errno)
    return tuple(stamp)


def load_codec(folder: str | Path, device: torch.device | str | None = None) -> PictureCodec:
    """The codec in `folder`, one instance for all who ask, checked against its own description.

    Raises:
        CheckpointError: If a file is missing, truncated or changed, or the weights do not fit.
    """
    folder = Path(folder)
    digest = str(read_card(folder).weights.get("sha256"))
    where = str(torch.empty(0, device=device).device)
    codec = _codecs.get((digest, where))
    if codec is None:
        card, network = _loaded(folder, CODECS)
        codec = cast(PictureCodec, network)
        codec.digest = str(card.weights.get("sha256"))
        _codecs[codec.digest, where] = codec.to(device).eval().requires_grad_(False)
    return codec


def find_codec(folder: Path, digest: str, device: torch.device | str | None = None) -> PictureCodec:
    """The codec of the expert in `folder`: in it, or beside it.

    Raises:
        CheckpointError: If there is none, or it is another than the expert was trained with.
    """
    return load_codec(_place_of_codec(folder, digest), device)


def _place_of_codec(folder: Path, digest: str) -> Path:
    places = (folder / CODEC, folder.parent / CODEC)
    place = next((place for place in places if (place / CONFIG).exists()), None)
    if place is None:
        raise CheckpointError(
            f"{folder} holds an expert on the latents of a codec, which is neither in {places[0]} nor in "
            f"{places[1]}: copy the codec of its family there."
        )
    found = str(read_card(place).weights.get("sha256"))
    if found != digest:
        raise CheckpointError(
            f"the expert in {folder} was trained on latents of the codec {digest[:12]}…, and {place} holds "
            f"{found[:12]}…. Train the expert again, or bring its codec back."
        )
    return place


def find_base(folder: Path, digest: str, device: torch.device | str | None = None) -> Expert:
    """The expert of p(x) that the one in `folder` adds an attribute to: in it, or beside it.

    Raises:
        CheckpointError: If there is none, or it is another than the card names.
    """
    place = _place_of_base(folder, digest)
    key = (digest, str(torch.empty(0, device=device).device))
    base = _bases.get(key)
    if base is None:
        base = _bases[key] = load_folder(place, device)
    return base


def _place_of_base(folder: Path, digest: str) -> Path:
    places = (folder / BASE, folder.parent / BASE)
    place = next((place for place in places if (place / CONFIG).exists()), None)
    if place is None or place.resolve() == folder.resolve():
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
    return place


def _loaded(folder: Path, known: Known) -> tuple[Card, nn.Module]:
    """The card and the network of one writing, though another may be under way."""
    for attempt in range(TRIES):
        card = read_card(folder)
        try:
            return card, _load(folder, card, known)
        except CheckpointError:
            if attempt == TRIES - 1 or read_card(folder) == card:
                raise
    raise AssertionError("not reached")


def _load(folder: Path, card: Card, known: Known) -> nn.Module:
    """The network of a card with the weights in its folder.

    What the card promises is compared with the file before memory is taken for either.
    """
    config = folder / CONFIG
    planned = plan(card, config, known)
    if known is NETWORKS:
        check_sizes(card, config)
    state = _read_state(folder, card, None if planned is None else most_bytes(planned))
    if planned is not None:
        check_fit(planned, state, str(folder / WEIGHTS), f" the network in {config}")
    network = build_described(card, config, known)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the network in {config}: {error}") from error
    return network


def _read_state(folder: Path, card: Card, most: int | None = None) -> Mapping[str, Tensor]:
    """The weights that a card names, all of them numbers."""
    path = folder / WEIGHTS
    content = read_weights(folder, card, most)
    try:
        state = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{path} holds weights that are no numbers, in {', '.join(broken[:3])}: its training diverged. "
            "Train the expert again."
        )
    return state

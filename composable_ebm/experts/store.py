"""Experts as files: `model.safetensors` and `config.json` in one folder. Nothing is unpickled.

A codec is stored like an expert, in the folder `codec` of its family, and the cards of experts on its latents
name the hash of its weights: they are loaded with that codec or not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast
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
MOST_CONFIG = 4_000_000
"""Bytes of a description."""
MOST_CALLS = 30_000
"""Of PyTorch, while a network is built; the largest shipped one takes some hundreds."""
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

    Nothing is written that `load_expert` could not read.

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
    _check_description(network, card)
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


def _check_description(network: nn.Module, card: Card) -> None:
    """Raises ValueError unless `load_expert` would build such a network from the card."""
    kind = type(network).__name__
    known = {**NETWORKS, **CODECS}
    if type(network) is not known.get(kind):
        raise ValueError(
            f"{card.full_name} is not saved: load_expert knows the networks {', '.join(known)}, and this is "
            f"a {kind}. Register your own class where it is saved and where it is loaded: "
            f"register_network({kind})."
        )
    if card.network.get("type") != kind:
        raise ValueError(
            f"{card.full_name} is not saved: its card describes the network {card.network.get('type')!r}, "
            f"and this is a {kind}: Card(network={{'type': '{kind}', ...}}) with the arguments that build it."
        )
    try:
        planned = _plan(card, Path(CONFIG), known)
        if planned is not None:
            _check_fit(planned, network.state_dict(), f"{card.full_name} is not saved: its network")
        if kind in NETWORKS:
            _check_sizes(card, CONFIG)
            _check_outputs(network, card)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


@torch.no_grad()
def _check_outputs(network: nn.Module, card: Card) -> None:
    like = next((t for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()), None)
    x = torch.zeros(2, *card.event_shape) if like is None else like.new_zeros(2, *card.event_shape)
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        outputs = network(x, x.new_ones(())) if card.noise_conditioned else network(x)
    finally:
        for module in training:
            module.training = True
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (2, len(card.values)):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{card.full_name} is not saved: of two states its network must give energies "
            f"(2, {len(card.values)}), one a value, got {got}."
        )


def read_card(folder: str | Path) -> Card:
    """The card of the expert in `folder`.

    Raises:
        CheckpointError: If it is missing or does not say what an expert needs.
    """
    path = Path(folder) / CONFIG
    try:
        return Card.from_json(_read(path, MOST_CONFIG).decode())
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe an expert: {str(error).rstrip('.')}.") from error


def load_folder(folder: str | Path, device: torch.device | str | None = None) -> Expert:
    """The expert in `folder`, checked against its own description.

    Raises:
        CheckpointError: If a file is missing, truncated or changed, or the weights do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    network = _load(folder, card, NETWORKS)
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
        codec = cast(PictureCodec, _load(folder, card, CODECS))
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
    key = (found, str(torch.empty(0, device=device).device))
    base = _bases.get(key)
    if base is None:
        base = _bases[key] = load_folder(place, device)
    return base


Known = Mapping[str, Callable[..., nn.Module]]


def _load(folder: Path, card: Card, known: Known) -> nn.Module:
    """The network of a card with the weights in its folder.

    What the card promises is compared with the file before memory is taken for either.
    """
    path, config = folder / WEIGHTS, folder / CONFIG
    planned = _plan(card, config, known)
    if known is NETWORKS:
        _check_sizes(card, config)
    content = _read(path, None if planned is None else _most_bytes(planned), card.weights.get("bytes"))
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights.get("sha256"):
        raise CheckpointError(
            f"{path} was changed: its SHA-256 is {digest[:12]}…, {CONFIG} says "
            f"{str(card.weights.get('sha256'))[:12]}…. Copy or train the expert again."
        )
    try:
        state = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{path} holds weights that are no numbers, in {', '.join(broken[:3])}: its training diverged. "
            "Train the expert again."
        )
    if planned is not None:
        _check_fit(planned, state, str(path), f" the network in {config}")
    network = _build(card, config, known)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network in {config}: {error}") from error
    return network


def _most_bytes(planned: Mapping[str, Tensor]) -> int:
    """The largest file that the weights of a network can take, header included."""
    return sum(t.numel() * t.element_size() for t in planned.values()) + 1000 * len(planned) + 100_000


def _plan(card: Card, path: Path, known: Known) -> Mapping[str, Tensor] | None:
    """Names and shapes of the weights that a card promises, without memory for them.

    None for a network that reads numbers off tensors while it is built, and so cannot be built without.
    """
    try:
        with torch.device("meta"):
            return _build(card, path, known).state_dict()
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, (NotImplementedError, RuntimeError)) and "meta" in str(cause):
            return None
        raise


def _check_fit(
    planned: Mapping[str, Tensor], state: Mapping[str, Tensor], subject: str, what: str = " its card"
) -> None:
    """Raises CheckpointError unless names and shapes are the same."""
    problems = [f"Missing key {name}" for name in planned if name not in state]
    problems += [f"Unexpected key {name}" for name in state if name not in planned]
    problems += [
        f"size mismatch for {name}, {tuple(state[name].shape)} against {tuple(planned[name].shape)}"
        for name in planned
        if name in state and state[name].shape != planned[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{subject} does not fit{what}: {'; '.join(problems[:3])}{more}.")


def _check_sizes(card: Card, path: Path | str) -> None:
    """Raises CheckpointError where the arguments of the network contradict the card."""
    build = NETWORKS.get(str(card.network.get("type")))
    if build is not None and card.noise_conditioned:
        try:
            inspect.signature(build.forward).bind(None, None, None)
        except TypeError as error:
            raise CheckpointError(
                f"{path} describes a network of noise levels, and {build.__name__} takes none: its "
                "`noise_conditioned` is false."
            ) from error
    outputs = card.network.get("num_values", len(card.values))
    shape = card.network.get("event_shape", list(card.event_shape))
    if outputs != len(card.values) or shape not in (list(card.event_shape), card.event_shape):
        raise CheckpointError(
            f"{path} describes {len(card.values)} values of shape {card.event_shape}, but its network gives "
            f"{outputs} for shape {shape}."
        )


def _build(card: Card, path: Path, known: Known) -> nn.Module:
    options = dict(card.network)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{path} names the network {kind!r}; this version knows {', '.join(known)}. One of your own is "
            "known after register_network(YourClass)."
        )
    try:
        for name, asked in inspect.signature(known[kind]).parameters.items():
            if isinstance(options.get(name), bool) and asked.annotation in ("int", "float", int, float):
                raise TypeError(f"{name} is a number, got {options[name]}")
        # What stops it may come while a network has gradients turned off: they are on again afterwards.
        with torch.set_grad_enabled(torch.is_grad_enabled()), _Undrawn():
            return known[kind](**options)
    except Exception as error:  # whatever a network makes of arguments that nobody checked
        raise CheckpointError(f"{path} gives {kind} arguments that do not fit: {error}.") from error


class _Undrawn(TorchFunctionMode):
    """Networks built inside draw no initial weights, which takes most of the time of loading one.

    One that goes on for ever, since its arguments ask for a billion layers, is stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise ValueError(f"such a network takes more than {MOST_CALLS} calls to make")
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _read(path: Path, most: int | None, expected: int | None = None) -> bytes:
    """The bytes of a file, which is of the expected size, or no larger than `most`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "it is no file"
            raise CheckpointError(
                f"cannot read {path}: {what}. An expert is a folder with {CONFIG} and {WEIGHTS}."
            )
        if expected is not None and found.st_size < expected:
            raise CheckpointError(
                f"{path} is truncated ({found.st_size} of {expected} bytes). Copy or train the expert again."
            )
        if expected is not None and found.st_size > expected:
            raise CheckpointError(
                f"{path} was changed: it has {found.st_size} bytes, {CONFIG} says {expected}. Copy or train "
                "the expert again."
            )
        if most is not None and found.st_size > most:
            raise CheckpointError(f"{path} has {found.st_size} bytes, more than the {most} that it can need.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}. An expert is a folder with {CONFIG} and {WEIGHTS}."
        ) from error

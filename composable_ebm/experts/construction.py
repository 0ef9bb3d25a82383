"""The network that a card describes, built without trust in what it says.

Names and shapes are known before memory is taken; arguments that promise gigabytes, or go on for ever, end in
a `CheckpointError` that names the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import CODECS
from composable_ebm.experts.pair import CONFIG

MOST_CALLS = 30_000
"""Of PyTorch, while a network is built; the largest shipped one takes some hundreds."""

Known = Mapping[str, Callable[..., nn.Module]]

__all__ = ["Known", "build_described", "check_description", "check_fit", "check_sizes", "most_bytes", "plan"]


def plan(card: Card, path: Path, known: Known) -> Mapping[str, Tensor] | None:
    """Names and shapes of the weights that a card promises, without memory for them.

    None for a network that reads numbers off tensors while it is built, and so cannot be built without.
    """
    try:
        with torch.device("meta"):
            return build_described(card, path, known).state_dict()
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, (NotImplementedError, RuntimeError)) and "meta" in str(cause):
            return None
        raise


def build_described(card: Card, path: Path, known: Known) -> nn.Module:
    """The network of a card, without first weights.

    Args:
        card: Says which, and the arguments that build it.
        path: Of its file, for messages.
        known: Networks by name.
    Raises:
        CheckpointError: If there is no such network, or the arguments do not fit it.
    """
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


def check_fit(
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


def check_sizes(card: Card, path: Path | str) -> None:
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


def most_bytes(planned: Mapping[str, Tensor]) -> int:
    """The largest file that the weights of a network can take, header included."""
    return sum(t.numel() * t.element_size() for t in planned.values()) + 1000 * len(planned) + 100_000


def check_description(network: nn.Module, card: Card) -> None:
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
        planned = plan(card, Path(CONFIG), known)
        if planned is not None:
            check_fit(planned, network.state_dict(), f"{card.full_name} is not saved: its network")
        if kind in NETWORKS:
            check_sizes(card, CONFIG)
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

"""Networks of one architecture as one: outputs in one batched pass, differentiated by autograd (CUDA).

On a CPU the networks run one after another: there the batched pass, a grouped convolution, is the
slower form from 16 chains on (81 ms against 59 for three digit experts at 64 chains, one thread).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Stacked"]


class Stacked:
    """Outputs (networks, batch, ...) of networks of one architecture.

    Args:
        networks: Of which the first one's forward runs on the stacked parameters of all.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.template = networks[0]
        # Not `state_dict`, which leaves out what is not stored with the weights: floors.
        states = [{**dict(n.named_parameters()), **dict(n.named_buffers())} for n in networks]
        self.state = {name: _stack_padded([state[name] for state in states]) for name in states[0]}

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> Tensor:
        arguments = (x,) if noise_level is None else (x, noise_level)

        def run(state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.template, state, arguments)

        return torch.func.vmap(run, randomness="error")(self.state)


def _stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors whose first sizes may differ (heads with more and fewer values), padding with zeros."""
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].ndim:
        rows = max(len(tensor) for tensor in tensors)
        tensors = [torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) for t in tensors]
    return torch.stack(tensors)

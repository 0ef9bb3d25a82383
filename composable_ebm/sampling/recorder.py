"""Capturing work on a device, so that it can be launched again as a whole; see `graphs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UPS = 3
"""Runs on a side stream before a capture, in which libraries allocate what they need."""

__all__ = ["CudaRecorder", "HostReadError", "HostReads", "Recorder"]


class Recorder(Protocol):
    """Captures work on a device.

    Attributes:
        name: What it makes, as reports call it.
    """

    name: str

    def capture(self, body: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """What replays `body`, which reads and writes fixed tensors and draws from `generators`.

        May run `body` several times. Raises where it cannot be captured.
        """

    def holds(self, condition: Tensor) -> bool:
        """The value of `condition`, (), read without what PyTorch takes for an accidental wait."""


class HostReadError(RuntimeError):
    """A step reads a value of the device on the host, which waits for it and cannot be replayed."""


class HostReads(TorchDispatchMode):
    """Raises HostReadError where the operations inside bring a value to the host, in this thread."""

    NAMES = frozenset(
        (
            "_local_scalar_dense",
            "_unique2",
            "equal",
            "is_nonzero",
            "masked_select",
            "nonzero",
            "unique_consecutive",
            "unique_dim",
        )
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in self.NAMES or (name == "index" and any(map(_is_mask, args[1]))):
            raise HostReadError(f"the step reads a value on the host (aten.{name})")
        result = function(*args, **(kwargs or {}))
        if name == "_to_copy" and result.device != args[0].device:
            raise HostReadError(f"the step copies from {args[0].device.type} to {result.device.type}")
        return result


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class CudaRecorder:
    """CUDA graphs that share one memory pool; they must not be replayed at the same time."""

    name = "CUDA graph"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # A failed capture leaves CUDA's default generator unusable, so what is known to fail fails here.
            with torch.cuda.stream(stream), HostReads():
                for _ in range(WARM_UPS):
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            try:
                # Other threads may go on working on the device meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    body()
            except BaseException:
                self._recover()
                raise
        return graph.replay

    def holds(self, condition: Tensor) -> bool:
        found = torch.empty((), dtype=torch.bool, pin_memory=True)
        found.copy_(condition, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return bool(found)

    def _recover(self) -> None:
        """Takes the default generator out of a capture that failed, by one that does not."""
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self.device)

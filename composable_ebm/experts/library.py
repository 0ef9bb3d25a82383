"""Experts in memory, by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from composable_ebm.energy import Energy
from composable_ebm.experts.catalogue import cards, catalogue, load_expert
from composable_ebm.experts.store import CONFIG

__all__ = ["Library"]


class Library(Mapping[str, Energy]):
    """Experts by name, each loaded once, when first named, and again when its files change.

    A name is `family/name`, or the name alone where it is the only one. Safe to share between
    threads. Those that are damaged are not listed, and say why when they are named.

    Args:
        device: Where to put them.
        others: Energies that have names here too and no files, such as pipelines.
    """

    def __init__(
        self, device: torch.device | str = "cpu", others: Mapping[str, Energy] | None = None
    ) -> None:
        self.device = torch.device(device)
        self.others = dict(others or {})
        self._folders: dict[str, Path] = {}
        self._loaded: dict[tuple[Path, int], Energy] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Energy:
        if name in self.others:
            return self.others[name]
        folder = self._folders.get(name)
        if folder is None or not (folder / CONFIG).exists():  # else no folder is searched
            folders = catalogue()
            alone = [full for full in folders if full.split("/")[-1] == name]
            folder = self._folders[name] = folders[alone[0] if len(alone) == 1 else name]
        key = (folder, (folder / CONFIG).stat().st_mtime_ns)
        with self._lock:
            if key not in self._loaded:
                self._loaded = {k: v for k, v in self._loaded.items() if k[0] != folder}
                self._loaded[key] = load_expert(folder, self.device)
            return self._loaded[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.others, **cards()[0]})

    def __len__(self) -> int:
        return len({**self.others, **cards()[0]})

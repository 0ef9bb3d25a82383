"""The folder of one run: whose it is, who works in it, and where to go on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from composable_ebm.experts.pair import CONFIG, WEIGHTS, settle
from composable_ebm.train.checkpoint import checkpoints, read_facts, remove_leftovers
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.identity import check_expert, check_identity

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second training out
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of a run, held by one training at a time.

    A lock of the operating system guards it, so that a killed training leaves none behind.

    Args:
        config: Says where.
        who: `identity` of the training.
    """

    def __init__(self, config: TrainConfig, who: Mapping) -> None:
        self.folder = config.run_folder
        self.checkpoints = self.folder / "checkpoints"
        self.model_folder = config.model_folder
        self.fresh = config.fresh
        self.who = who
        self._lock: TextIO | None = None

    def enter(self) -> None:
        """Takes the folder, and clears away what a killed training left in it and where its expert goes.

        Raises:
            ValueError: If another training works in it, or has worked in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        try:
            if self.fresh:
                self._empty()
            elif not checkpoints(self.checkpoints):
                check_expert(self.model_folder, self.who)
        except BaseException:
            self.leave()
            raise
        remove_leftovers(self.checkpoints)
        settle(self.model_folder)
        for name in (WEIGHTS, CONFIG, "metrics.jsonl"):
            for path in self.model_folder.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def newest(self) -> tuple[Path, dict, list[str]] | None:
        """The newest checkpoint that is as it was written, its facts, and what is wrong with newer ones.

        Raises:
            ValueError: If there are some and all are damaged, or they belong to another training.
        """
        damaged: list[str] = []
        for path in checkpoints(self.checkpoints):
            try:
                facts = read_facts(path)
            except ValueError as error:
                damaged.append(str(error))
                continue
            check_identity(self.folder, facts.get("identity", {}), self.who)
            return path, facts, damaged
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.checkpoints} is whole: {' '.join(damaged)} Add --fresh to start "
                "anew."
            )
        return None

    def _take(self) -> None:
        self._lock = (self.folder / LOCK).open("a+")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            self.leave()
            raise ValueError(
                f"another training works in {self.folder} (process {holder or 'unknown'}): wait for its end, "
                "stop it, or give this one another --name or --runs."
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

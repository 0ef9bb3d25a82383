"""Pictures that a program draws, rendered once and kept on disk.

A drawn data set is a module with two functions of picture i of a split, which must give the same on every
machine:

    draw(split, index) -> (labels, options)     for each attribute the position of its value, or -1
    render(options, size) -> bytes              uint8, (channels, size, size)

and with `SIZES`, the number of pictures of each split, `VALUES`, the names of values, and `RECIPE`, a number
to raise with every change to what is drawn.
"""

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from composable_ebm.data.dataset import LabelledImages, unknown_name
from composable_ebm.data.root import download_root, search_path
from composable_ebm.files import write_atomic

CHUNK = 100

__all__ = ["load_rendered"]


def load_rendered(
    module: str,
    split: str,
    root: str | Path | None = None,
    size: int = 64,
    num_images: int | None = None,
    processes: int | None = None,
) -> LabelledImages:
    """The pictures of a drawn data set, from the cache or else rendered into it.

    Fewer pictures than are cached are the first of them.

    Args:
        module: Name of the module in `composable_ebm.data`.
        split: One of its splits.
        root: Folder of the cache; the first of the usual ones that holds the split unless given.
        size: Height and width in pixels.
        num_images: How many; all of the split unless given.
        processes: Processes that render; as many as there are cores unless given.
    Raises:
        ValueError: If there is no such split, or a number is not positive.
    """
    source = import_module(f"composable_ebm.data.{module}")
    if split not in source.SIZES:
        raise ValueError(unknown_name(f"split of the {module}", split, source.SIZES))
    count = source.SIZES[split] if num_images is None else num_images
    workers = os.cpu_count() or 1 if processes is None else processes
    for name, number in (("size", size), ("num_images", count), ("processes", workers)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    stem = f"recipe{source.RECIPE}-{size}px-{split}"
    folders = search_path() if root is None else (Path(root).expanduser(),)
    for path in _holding([folder / module for folder in folders], stem, count):
        try:
            images, labels = _read(path, source.VALUES)
        except (SafetensorError, ValueError, OSError) as error:
            warnings.warn(f"{path} is damaged and will not be used: {error}", stacklevel=3)
            continue
        break
    else:
        images = _render_all(module, split, size, count, workers)
        drawn = [source.draw(split, index)[0] for index in range(count)]
        labels = {name: torch.tensor([label[name] for label in drawn]) for name in source.VALUES}
        folder = (download_root() if root is None else Path(root).expanduser()) / module
        tensors = {"images": images, **labels}
        write_atomic(
            folder / f"{stem}-{count}.safetensors", save(tensors, metadata={"sha256": _digest(tensors)})
        )
    labels = {name: label[:count] for name, label in labels.items()}
    return LabelledImages(images[:count], labels, source.VALUES, name=f"{module}/{split}")


def _render_range(module: str, split: str, start: int, stop: int, size: int) -> np.ndarray:
    """Pictures start to stop - 1 of a split, bytes of shape (stop - start, channels, size, size)."""
    source = import_module(f"composable_ebm.data.{module}")
    return np.stack([source.render(source.draw(split, i)[1], size) for i in range(start, stop)])


def _render_all(module: str, split: str, size: int, count: int, processes: int) -> Tensor:
    parts: list[np.ndarray] = []
    with tqdm(total=count, desc=f"rendering {module}/{split}", unit="picture", disable=None) as progress:
        for part in _rendered(module, split, size, count, processes):
            parts.append(part)
            progress.update(len(part))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))


def _rendered(module: str, split: str, size: int, count: int, processes: int) -> Iterator[np.ndarray]:
    first = _render_range(module, split, 0, min(CHUNK, count), size)  # what is missing is said here
    yield first
    starts = range(CHUNK, count, CHUNK)
    tasks: list[tuple[Any, ...]] = [(module, split, s, min(s + CHUNK, count), size) for s in starts]
    if min(processes, len(tasks)) <= 1:
        yield from (_render_range(*task) for task in tasks)
        return
    # Spawned, because a fork of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=context) as pool:
        try:
            yield from pool.map(_render_range, *zip(*tasks, strict=True))
        except BrokenProcessPool as error:
            error.add_note(
                f"while rendering {module}: a script that loads them in several processes must do so "
                'under `if __name__ == "__main__":`; or render in one: load(..., processes=1).'
            )
            raise


def _holding(folders: list[Path], stem: str, count: int) -> list[Path]:
    """The caches that hold enough pictures, folder by folder, the smallest first."""
    found = []
    for folder in folders:
        sizes = {path: int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{stem}-*.safetensors")}
        found += sorted((path for path, held in sizes.items() if held >= count), key=sizes.__getitem__)
    return found


def _read(path: Path, values: dict[str, tuple[str, ...]]) -> tuple[Tensor, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("images", *values)}
        expected = (file.metadata() or {}).get("sha256")
    if _digest(tensors) != expected:
        raise ValueError("its checksum does not match")
    return tensors.pop("images"), tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()

"""Labelled images: what experts learn from and what judges compare with.

Each data set is a module with a `load(split, root)` function that returns `LabelledImages`. Import
the module that you want (`from composable_ebm.data import digits`), or ask `load_data` for it by
name: none is imported here, because each may need packages that the others do without.
"""

from importlib import import_module
from pathlib import Path

from torch import Tensor

from composable_ebm.data.dataset import LabelledImages, LabelledLatents, unknown_name

DATASETS = ("celeba", "digits", "faces", "folder", "letters", "portraits", "shapes")
OF_ANY_SIZE = ("celeba", "faces", "folder", "letters", "portraits", "shapes")
"""The data sets whose `load` takes a `size`."""

__all__ = ["DATASETS", "OF_ANY_SIZE", "LabelledImages", "LabelledLatents", "load_data", "measured"]


def load_data(
    name: str, split: str = "train", root: str | Path | None = None, **options: object
) -> LabelledImages:
    """A data set by name.

    Args:
        name: One of `DATASETS`.
        split: "train", "validation" or "test".
        root: Folder of the data; searched for unless given.
        options: What the data set's own `load` takes besides, such as `exclude` of faces.
    Raises:
        ValueError: If there is no such data set or split.
    """
    if name not in DATASETS:
        raise ValueError(unknown_name("data set", name, DATASETS))
    return import_module(f"composable_ebm.data.{name}").load(split, root=root, **options)


def measured(name: str, x: Tensor) -> dict[str, Tensor]:
    """Labels of the attributes that a data set can measure on any images, samples included.

    Args:
        name: One of `DATASETS`.
        x: Images in [-1, 1], shape (batch, channels, height, width).
    Returns:
        Attribute -> labels (batch,), -1 between two values; empty if it measures none.
    """
    return getattr(import_module(f"composable_ebm.data.{name}"), "handwriting", lambda x: {})(x)

"""CelebA: 202,599 photographs of faces with 40 binary attributes, read through torchvision.

The faces are those of people who were not asked, and the attributes are one firm's annotations.
The data set is for non-commercial research only; it is not shipped, and no expert here needs it.

Reference:
    Liu, Luo, Wang, Tang (2015), Deep learning face attributes in the wild, ICCV.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torchvision.datasets import CelebA

from composable_ebm.data.dataset import LabelledImages, unknown_name
from composable_ebm.data.pictures import read_images
from composable_ebm.data.root import ENVIRONMENT_VARIABLE, download_root, find_root, search_path

SPLITS = {"train": "train", "validation": "valid", "test": "test"}

_FILE = "celeba/list_attr_celeba.txt"


def load(
    split: str = "train",
    root: str | Path | None = None,
    size: int = 64,
    num_images: int | None = None,
    attributes: Iterable[str] | None = None,
    download: bool = False,
) -> LabelledImages:
    """CelebA, aligned, cropped to the middle square and resized.

    The 162,770 training images take 2 GB of memory at 64 pixels and 0.5 GB at 32.

    Args:
        split: "train", "validation" or "test".
        root: The folder that holds `celeba`; searched for unless given.
        size: Height and width in pixels.
        num_images: How many to read, the first ones; all unless given.
        attributes: The attributes to keep, such as "Smiling"; all 40 unless given.
        download: Whether to fetch what is missing, into `root`, COMPOSABLE_EBM_DATA or
            `~/.cache/composable_ebm`.
    Returns:
        Images of shape (n, 3, size, size). The values of "Smiling" are "not_Smiling", "Smiling".
    Raises:
        ValueError: If there is no such split or attribute, or `num_images` is not positive.
        FileNotFoundError: If CelebA is absent and not to be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(unknown_name("split of CelebA", split, SPLITS))
    if num_images is not None and num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    found = find_root(_FILE) if root is None else Path(root).expanduser()
    if found is None or not (found / _FILE).exists():
        if not download:
            looked = ", ".join(map(str, search_path() if root is None else (root,)))
            raise FileNotFoundError(
                f"CelebA is in none of: {looked}. Fetch it with load(..., download=True), or say where "
                f"the folder is that holds {_FILE}: load(..., root=...) or the environment variable "
                f"{ENVIRONMENT_VARIABLE}."
            )
        found = found or download_root()
    try:
        celeba = CelebA(str(found), split=SPLITS[split], target_type="attr", download=download)
    except RuntimeError as err:
        err.add_note(f"while reading CelebA in {found / 'celeba'}")
        raise
    names = [name for name in celeba.attr_names if name]  # the header's line ends in a space
    kept = names if attributes is None else list(attributes)
    for name in kept:
        if name not in names:
            raise ValueError(unknown_name("attribute of CelebA", name, names))
    files = celeba.filename[:num_images]
    folder = found / "celeba" / "img_align_celeba"
    images = read_images([folder / file for file in files], size, 3, f"celeba/{split}")
    present = celeba.attr[: len(files)].to(torch.int64)
    return LabelledImages(
        images=images,
        labels={name: present[:, names.index(name)].contiguous() for name in kept},
        values={name: (f"not_{name}", name) for name in kept},
        name=f"celeba/{split}",
    )

"""Where data sets lie on this machine.

A root is a folder that holds data sets, each in the layout that torchvision reads, such as
`<root>/MNIST/raw/train-images-idx3-ubyte`.
"""

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "COMPOSABLE_EBM_DATA"
CACHE = Path("~/.cache/composable_ebm")


def search_path() -> tuple[Path, ...]:
    """The folders that may be a root, in the order in which they are tried.

    Returns:
        The folder named by `COMPOSABLE_EBM_DATA` if it is set, `./data`, `../shared/data` and
        `~/.cache/composable_ebm`.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    first = [Path(named).expanduser()] if named else []
    return (*first, Path("data"), Path("../shared/data"), CACHE.expanduser())


def find_root(holds: str) -> Path | None:
    """The first folder of `search_path()` that holds a file.

    Args:
        holds: A path inside the root, such as "MNIST/raw/train-images-idx3-ubyte".
    Returns:
        The root, or None if no folder holds the file.
    """
    return next((root for root in search_path() if (root / holds).exists()), None)


def download_root() -> Path:
    """The folder to download into: `COMPOSABLE_EBM_DATA`, or else `~/.cache/composable_ebm`."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named or CACHE).expanduser()

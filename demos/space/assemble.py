"""Puts a Hugging Face Space together: python demos/space/assemble.py FOLDER

FOLDER then holds everything that the Space needs, and nothing else: push it to the Space's repository.
Weights are 5 MB each, so that `git lfs track "*.safetensors"` comes first.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = ("app.py", "requirements.txt", "README.md")
FOLDERS = ("composable_ebm", "demos/mixer", "models")

__all__ = ["assemble"]


def assemble(folder: Path) -> None:
    """Copies the Space into `folder`, which must be new or hold an earlier copy.

    Raises:
        ValueError: If the folder holds something else, which would be published with it.
    """
    known = {*FILES, "composable_ebm", "demos", "models", ".git", ".gitattributes"}
    if strange := sorted({path.name for path in folder.glob("*")} - known):
        raise ValueError(f"{folder} holds {', '.join(strange)}, which is no part of a Space; give a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy2(HERE / name, folder / name)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        assemble(folder)
    except ValueError as error:
        parser.error(str(error))
    print(folder)


if __name__ == "__main__":
    main()

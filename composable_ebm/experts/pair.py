"""The two files of an expert, `config.json` and `model.safetensors`, written and read as one.

The card names the digest of the weights, so the renaming of the card is the moment from which the new expert
holds: its weights lie complete beside the old ones before, as `model.safetensors.next`, and take their place
after it. Killed at any moment, a folder holds the expert before or the one after; a reader finds either.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composable_ebm.experts.card import Card, CheckpointError
from composable_ebm.files import write_atomic

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second writer out
    fcntl = None  # type: ignore[assignment]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NEXT = f"{WEIGHTS}.next"
MOST_CONFIG = 4_000_000
"""Bytes of a description."""

__all__ = ["CONFIG", "NEXT", "WEIGHTS", "read_card", "read_weights", "settle", "write_pair"]


def write_pair(folder: Path, content: bytes, card: Card) -> None:
    """Writes the weights and the card that names their digest: both or neither.

    Raises:
        OSError: If they cannot be written; what was there before still is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        try:
            write_atomic(folder / NEXT, content)
            write_atomic(folder / CONFIG, card.to_json().encode())
        finally:
            _settle(folder)


def settle(folder: Path) -> None:
    """Ends what a killed `write_pair` began: weights that the card names take their place, others go."""
    if (folder / NEXT).exists():
        with _alone(folder):
            _settle(folder)


def _settle(folder: Path) -> None:
    following = folder / NEXT
    if not following.exists():
        return
    try:
        _named_by(read_card(folder), following)
    except CheckpointError:
        following.unlink()
    else:
        os.replace(following, folder / WEIGHTS)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other writers out, by a lock of the operating system on the folder itself."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_card(folder: str | Path) -> Card:
    """The card of the expert in `folder`.

    Raises:
        CheckpointError: If it is missing or does not say what an expert needs.
    """
    path = Path(folder) / CONFIG
    try:
        return Card.from_json(_read(path, MOST_CONFIG).decode())
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe an expert: {str(error).rstrip('.')}.") from error


def read_weights(folder: Path, card: Card, most: int | None = None) -> bytes:
    """The content of the weights' file that a card names.

    Args:
        folder: The expert's.
        card: Says how many bytes there are, and their digest.
        most: Bytes that its network can need.
    Raises:
        CheckpointError: If it is missing, truncated or changed.
    """
    try:
        return _named_by(card, folder / WEIGHTS, most)
    except CheckpointError:
        if not (folder / NEXT).is_file():
            raise
        try:
            return _named_by(card, folder / NEXT, most)
        except CheckpointError:
            pass
        raise


def _named_by(card: Card, path: Path, most: int | None = None) -> bytes:
    content = _read(path, most, card.weights.get("bytes"))
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights.get("sha256"):
        raise CheckpointError(
            f"{path} was changed: its SHA-256 is {digest[:12]}…, {CONFIG} says "
            f"{str(card.weights.get('sha256'))[:12]}…. Copy or train the expert again."
        )
    return content


def _read(path: Path, most: int | None, expected: int | None = None) -> bytes:
    """The bytes of a file, which is of the expected size, or no larger than `most`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "it is no file"
            raise CheckpointError(
                f"cannot read {path}: {what}. An expert is a folder with {CONFIG} and {WEIGHTS}."
            )
        if expected is not None and found.st_size < expected:
            raise CheckpointError(
                f"{path} is truncated ({found.st_size} of {expected} bytes). Copy or train the expert again."
            )
        if expected is not None and found.st_size > expected:
            raise CheckpointError(
                f"{path} was changed: it has {found.st_size} bytes, {CONFIG} says {expected}. Copy or train "
                "the expert again."
            )
        if most is not None and found.st_size > most:
            raise CheckpointError(f"{path} has {found.st_size} bytes, more than the {most} that it can need.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}. An expert is a folder with {CONFIG} and {WEIGHTS}."
        ) from error

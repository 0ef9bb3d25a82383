"""A page of its own, in a process of its own: for those who picture it, measure it or test it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# The command line, but with no experts beside those of one folder.
ONLY = """
import sys
from pathlib import Path
from composable_ebm import cli
from composable_ebm.experts import catalogue
catalogue.model_folders = lambda: [Path(sys.argv[1])]
sys.exit(cli.main(sys.argv[2:]))
"""
PATIENCE = 180.0
# A Chromium that asks no other host for anything.
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

__all__ = ["CHROMIUM_OPTIONS", "Served", "find_chromium", "served"]


class Served(NamedTuple):
    """A page that answers.

    Attributes:
        address: Where it is.
        process: What serves it.
        temporary: What it takes for the machine's temporary folder.
    """

    address: str
    process: subprocess.Popen
    temporary: Path


@contextlib.contextmanager
def served(*options: str, models: Path | None = None) -> Iterator[Served]:
    """A page that answers by then, and is gone afterwards.

    Args:
        options: Of `composable-ebm mixer`, beside its port.
        models: A folder of the only experts to offer; all that are found unless given.
    Raises:
        RuntimeError: If the page ends before it answers, or does not come up; with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ["-m", "composable_ebm.cli"] if models is None else ["-c", ONLY, str(models)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (temporary := folder / "temporary").mkdir()
        log = stack.enter_context((folder / "log").open("w"))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, *program, "mixer", "--port", str(port), *options],
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the page did not come up: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield Served(address, process, temporary)


def find_chromium() -> str | None:
    """The browser, if there is one on this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status == 200
    except OSError:
        return False

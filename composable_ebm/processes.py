"""Several processes that do one thing: how they are started, who speaks, and how they end.

A process that took part in a collective must not finalise its interpreter. A thread of gloo may drop
the last reference to a collective's tensor after Python has begun to end; it waits for the interpreter
lock, is ended by a forced unwind through C++ frames, and takes the process with it: "terminate called
without an active exception", exit status -6, after an hour of success. Destroying the process group
does not end those threads while a `DistributedDataParallel` holds it, nor at once without one. So what
must be on disk is written and flushed, all processes wait for each other, and each leaves by `leave`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["check_launch", "is_first", "launch_command", "leave"]


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK") or 0) == 0


def check_launch(arguments: Sequence[str], command: str = "train") -> None:
    """Refuses a launch that asked for several processes and got one.

    `accelerate launch --cpu --num_processes 2` starts a single process, without a word. What gives it
    away is that it announces a meeting point and nobody to meet.

    Args:
        arguments: Those of the command, for one that works.
        command: Of `composable-ebm`, "train" or "generate".
    Raises:
        ValueError: If so; the message holds the command.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    ranks = ("WORLD_SIZE", "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if on_cpu and "MASTER_PORT" in os.environ and not any(name in os.environ for name in ranks):
        raise ValueError(
            "`accelerate launch --cpu --num_processes N` starts one process, whatever N is. For two on the "
            f"CPU: {launch_command(2, 'cpu', arguments, command)}"
        )


def launch_command(processes: int, device: str, arguments: Sequence[str], command: str = "train") -> str:
    """The command line that does again what was done.

    Args:
        processes: How many.
        device: Type of their device, "cpu" or "cuda".
        arguments: Those of the command.
        command: Of `composable-ebm`, "train" or "generate".
    """
    if processes == 1:
        return f"composable-ebm {command} {shlex.join(arguments)}"
    if device == "cpu" and "--cpu" not in arguments:
        arguments = [*arguments, "--cpu"]
    # What accelerate calls `--multi_gpu` is several processes of any device.
    module = f"composable_ebm.{command}"
    return f"accelerate launch --multi_gpu --num_processes {processes} -m {module} {shlex.join(arguments)}"


def leave(status: int) -> NoReturn:
    """Ends this process: at once if a launcher started it, so that no thread of gloo sees the end.

    Call it where a command ends, after all files are closed: nothing that `atexit` holds is run then.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads any more
            status = status or 1
    os._exit(status)

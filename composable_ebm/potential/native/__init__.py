"""Functions in C for what a CPU would do much more slowly operator by operator.

They are compiled by the machine's own C compiler, once, into the user's cache folder, for vectors as wide
as it has: AVX-512, AVX2 or NEON. Where there is no compiler or only SSE, or the variable
COMPOSABLE_EBM_NATIVE is 0, other forms do the work. COMPOSABLE_EBM_NATIVE_ARCH names another
architecture than the machine's own, as gcc does (-march): x86-64-v3 holds an AVX-512 machine to AVX2.

Compiling takes a few seconds, which a first small run must not pay: it happens when a process has
spent `PATIENCE` seconds' worth of arithmetic on networks that would gain from it.

    convolutions.c   networks of convolutions, one image at a time, made of products.h and pointwise.h
    perceptrons.c    several perceptrons over noise levels, weights read as float16
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = [
    *("NativeUnavailable", "Work", "allowed", "build", "carry_out", "decide_now"),
    *("library", "parts_of", "wanted"),
]

FLAGS = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC")
FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "convolutions.c", FOLDER / "perceptrons.c")
HEADERS = tuple(FOLDER / f"{name}.h" for name in ("vectors", "images", "products", "pointwise", "work"))
PATIENCE = 4.0
RATE = 30e9  # operations a second before compiling, for the count of seconds

_spent = 0.0


class NativeUnavailable(RuntimeError):
    """The C functions cannot be had on this machine."""


def cache_folder() -> Path:
    """Where the compiled functions are kept: $XDG_CACHE_HOME/composable_ebm or ~/.cache/composable_ebm."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "composable_ebm"


@functools.cache
def _features() -> str:
    """What the processor can do, as Linux lists it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def _architecture() -> str:
    """The option that tells the compiler which processor to compile for."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return f"-m{'cpu' if arm else 'arch'}={os.environ.get('COMPOSABLE_EBM_NATIVE_ARCH', 'native')}"


def _compiled_file() -> Path:
    about = [*FLAGS, _architecture(), platform.machine(), platform.processor(), _features()]
    digest = hashlib.sha256("\n".join(about).encode())
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return cache_folder() / f"native-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compiles the functions unless that was done before, and returns the file.

    Raises:
        NativeUnavailable: If there is no C compiler, it fails, or the cache cannot be written.
    """
    path = _compiled_file()
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeUnavailable("no C compiler was found (cc, gcc, clang, or $CC).")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            command = [compiler, *FLAGS, _architecture(), *map(str, SOURCES), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(temporary, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} did not compile the C functions: {error}.") from error
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions, built if need be.

    Raises:
        NativeUnavailable: If they cannot be had, or the processor's vectors are too short for them to gain.
    """
    try:
        functions = ctypes.CDLL(str(build()))
    except OSError as error:
        raise NativeUnavailable(f"the compiled functions do not load: {error}.") from error
    if functions.lanes() < 8 and platform.machine().lower() in ("x86_64", "amd64"):
        raise NativeUnavailable("this processor has neither AVX-512 nor AVX2.")
    functions.perceptron_memory.restype = ctypes.c_size_t
    for name in ("network_outputs", "network_gradient", "perceptron_outputs", "perceptron_gradient"):
        getattr(functions, name).restype = None
    return functions


def wanted() -> bool:
    """Whether the environment allows functions in C."""
    return os.environ.get("COMPOSABLE_EBM_NATIVE", "1") != "0"


@functools.cache
def _at_hand() -> bool:
    return _compiled_file().exists()


def decide_now() -> None:
    """Takes the functions from the first use on, compiling them if need be.

    For runs whose bits must not depend on when a process came to compile, as those of trainings that are
    killed and go on.
    """
    global _spent
    _spent = PATIENCE


def allowed(operations: float) -> bool:
    """Whether to use a function now: it is compiled, or so much was spent without it that it now is.

    Args:
        operations: What is to be done now, in additions and multiplications.
    """
    global _spent
    if not _at_hand():
        _spent += operations / RATE
        if _spent < PATIENCE:
            return False
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def carry_out(name: str, work: Work) -> None:
    """Calls a function of the library for each part of the work, one on each of PyTorch's threads.

    Those are OpenMP's, and no others: after each operation of PyTorch they wait for the next one at full
    speed, for milliseconds, and would take half a core from threads of another kind.
    """
    functions = library()
    function = getattr(functions, name)
    if work.parts == 1 or (team := _team()) is None:
        for part in range(work.parts):
            function(ctypes.byref(work), part)
        return
    asks = (team.omp_get_thread_num, team.omp_get_num_threads)
    addresses = [ctypes.cast(each, ctypes.c_void_p).value for each in (function, *asks)]
    shared = _Team(addresses[0], ctypes.addressof(work), *addresses[1:])
    team.GOMP_parallel(functions.in_team, ctypes.byref(shared), work.parts, 0)


def parts_of(rows: int) -> int:
    """How many threads rows are for: each has four at least, or is the only one."""
    return max(1, min(torch.get_num_threads(), rows // 4))


class Work(ctypes.Structure):
    """As in work.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("subject", "level")),
        *((name, ctypes.c_void_p) for name in ("given", "into", "gradients", "kept", "memory")),
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("total", "parts", "by_networks")),
    )


class _Team(ctypes.Structure):
    """As `Team` in convolutions.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("function", "work", "number", "count"))


@functools.cache
def _team() -> ctypes.CDLL | None:
    """OpenMP as PyTorch has loaded it; None where it works without."""
    loaded = ctypes.CDLL(None)
    known = all(hasattr(loaded, name) for name in ("GOMP_parallel", "omp_get_thread_num"))
    return loaded if known else None

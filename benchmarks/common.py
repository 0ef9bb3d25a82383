"""What every benchmark records beside its figures: the machine, the versions, the command."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import torch

import composable_ebm

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, object]:
    """Where a figure was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    script, *arguments = sys.argv
    return {
        "cpu": _cpu(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores, times are too long
        "python": platform.python_version(),
        "torch": torch.__version__,
        "composable_ebm": composable_ebm.__version__,
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *arguments]),
    }


def write_results(name: str, content: dict[str, object], folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json`, with the environment."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""Inputs of trainings and generations, cut and flipped: pictures, tables, configurations, checkpoints.

    python benchmarks/proofs/inputs.py --flips 300

Each file is cut at its first 40 lengths and at random ones, and one bit is flipped in every region. Pictures
must be read or skipped with a reason; tables and configurations read or refused by the file's name; of a
changed checkpoint, the one before serves, as it was; a changed shard is refused by name. Nothing else may be
raised, nothing is unpickled, and memory is bounded.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from composable_ebm.data.pictures import read_what_can_be
from composable_ebm.data.tables import list_folder
from composable_ebm.generate import TENSORS, _digest, read_shards
from composable_ebm.train import TrainConfig, read_config
from composable_ebm.train.checkpoint import load_checkpoint, save_checkpoint
from composable_ebm.train.run_folder import RunFolder

torch.set_num_threads(1)

GROWTH = 300  # MB
FORMATS = ("png", "jpg", "gif", "webp", "tif", "bmp", "ppm")
COUNT = 12  # rows of a table


@dataclass(frozen=True)
class Subject:
    """A file, and what is made of it.

    Attributes:
        path: The file.
        use: Says what came of reading it; raises what `refuses` names, with the file's name.
        refuses: What it may raise.
    """

    path: Path
    use: Callable[[], str]
    refuses: tuple[type[Exception], ...] = ()


def pictures(folder: Path) -> Iterator[Subject]:
    noise = torch.randint(256, (24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for form in FORMATS:
        path = folder / f"picture.{form}"
        one = Image.fromarray(noise.numpy())
        moving = {"save_all": True, "append_images": [one.rotate(90)]} if form in ("gif", "webp") else {}
        one.save(path, **moving)

        def use(path: Path = path) -> str:
            _, unreadable = read_what_can_be([path], 8, 3, "proof")
            return "skipped with a reason" if unreadable.get(0) else "read"

        yield Subject(path, use)


def tables(folder: Path) -> Iterator[Subject]:
    for name in ("attributes.csv", "metadata.jsonl"):
        root = folder / name.partition(".")[2]
        root.mkdir()
        for i in range(COUNT):
            Image.new("L", (4, 4), i).save(root / f"{i}.png")
        rows = [
            {"file": f"{i}.png", "colour": "red" if i % 2 else "blue", "note": f'a "{i}", b', "size": i / 3}
            for i in range(COUNT)
        ]
        if name.endswith("jsonl"):
            text = "\n".join(map(json.dumps, rows))
        else:
            cells = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
            quoted = [",".join(f'"{cell}"' for cell in row) for row in cells]
            text = "\n".join([",".join(rows[0]), *quoted])
        (root / name).write_text(text)

        def use(root: Path = root) -> str:
            listing = list_folder(root)
            whole = all(len(column) == len(listing.files) for column in listing.columns.values())
            return "read" if whole else "READ IN PART"

        yield Subject(root / name, use, (ValueError, FileNotFoundError))


def configurations(folder: Path) -> Iterator[Subject]:
    path = folder / "config.toml"
    path.write_text(
        'family = "toy"\nname = "one"\nbatch_size = 8\nhalf = true\n[data]\nname = "folder"\nroot = "x"\n'
        '[network]\ntype = "DiffusedEnergy"\nhidden = 8\nnoise_range = [0.1, 10.0]\n'
        '[objective]\ntype = "DenoisingScoreMatching"\nclassification = 0.5\n'
    )

    def use() -> str:
        read_config(path)
        return "read"

    yield Subject(path, use, (ValueError, OSError))


def resumes(folder: Path) -> Iterator[Subject]:
    """The newest of two checkpoints."""
    config = TrainConfig(family="toy", name="one", models=str(folder / "m"), runs=str(folder / "r"), cpu=True)
    run = RunFolder(config, {"seed": 0})
    states = {step: {"w": torch.full((64,), float(step)), "n": torch.arange(step)} for step in (4, 8)}
    for step, state in states.items():
        save_checkpoint(run.checkpoints, step, state, {"identity": {"seed": 0}}, 0, lambda: None)

    def use() -> str:
        newest = run.newest()
        if newest is None:
            return "NONE FOUND"
        path, facts, _ = newest
        tensors = load_checkpoint(path, 0)
        same = all(tensors[name].equal(value) for name, value in states[facts["step"]].items())
        return f"iteration {facts['step']} as it was" if same else "OTHER BITS"

    for name in ("rank0.safetensors", "state.json"):
        yield Subject(run.checkpoints / "step-0000008" / name, use)


def shards(folder: Path) -> Iterator[Subject]:
    tensors = {
        "samples": torch.randn(4, 1, 4, 4),
        "energies": torch.randn(4),
        "diverged": torch.zeros(4).bool(),
    }
    (folder / "shard-00000.safetensors").write_bytes(save(tensors, {"sha256": _digest(tensors)}))
    (folder / "generation.json").write_text(json.dumps({"num_chains": 4, "shard_size": 4, "recipe": "toy"}))

    def use() -> str:
        (found,) = read_shards(folder)
        same = all(found[name].equal(tensors[name]) for name in TENSORS)
        return "read as it was" if same else "OTHER BITS"

    for name in ("shard-00000.safetensors", "generation.json"):
        yield Subject(folder / name, use, (ValueError,))


def attempt(subject: Subject, content: bytes) -> str:
    subject.path.write_bytes(content)
    try:
        return subject.use()
    except subject.refuses as error:
        named = str(subject.path) in str(error) or str(subject.path.parent) in str(error)
        return "refused by name" if named else f"REFUSED WITHOUT THE NAME: {str(error)[:120]}"
    except BaseException as error:
        return f"CRASH {type(error).__name__}: {str(error)[:120]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=300, help="bits flipped, of each file")
    options = parser.parse_args()
    draw, counts, unpickled = random.Random(0), Counter(), []
    sys.addaudithook(lambda event, _: unpickled.append(event) if event.startswith("pickle.find") else None)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as temporary:
        for make in (pictures, tables, configurations, resumes, shards):
            folder = Path(temporary) / make.__name__
            folder.mkdir()
            for subject in make(folder):
                whole = subject.path.read_bytes()
                lengths = {*range(min(40, len(whole))), *(draw.randrange(len(whole)) for _ in range(40))}
                contents = [("cut", whole[:length]) for length in sorted(lengths)]
                for i in range(options.flips):
                    flipped = bytearray(whole)
                    flipped[i * len(whole) // options.flips] ^= 1 << draw.randrange(8)
                    contents.append(("flipped", bytes(flipped)))
                contents.append(("longer", whole + b"\0"))
                for what, content in contents:
                    begun = time.process_time()
                    result = attempt(subject, content)
                    slowest = max(slowest, (time.process_time() - begun, f"{subject.path.name} {what}"))
                    counts[f"{make.__name__} {subject.path.name} {what}: {result}"] += 1
                subject.path.write_bytes(whole)
    for what, count in sorted(counts.items()):
        print(f"{count:7d}  {what}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"{sum(counts.values())} attacks; slowest {slowest[0]:.2f} s ({slowest[1]}); grew by {grown} MB")
    print(f"unpickled {unpickled or 'nothing'}; {time.perf_counter() - started:.0f} s in all")
    bad = [what for what in counts if what.rpartition(": ")[2][:2].isupper() or "CRASH" in what]
    return int(bool(bad or unpickled or grown > GROWTH))


if __name__ == "__main__":
    raise SystemExit(main())

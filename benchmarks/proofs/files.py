"""Experts' files cut and flipped in every region, and descriptions that promise what is not there.

    python benchmarks/proofs/files.py --flips 2000

Of each kind of network an expert is saved, of a classifier with its base, of one on latents with its codec,
and a codec by itself; then weights and descriptions are cut at many lengths, one bit is flipped at positions
that cover every byte region (length of the header, header, tensors; every line of the description), every
number of the network's arguments is replaced by numbers that promise gigabytes, and files are replaced by
links, pipes and pickles. Loading must raise a `CheckpointError` that names the folder, or give the expert as
it was; the process may not grow by more than 300 MB, and nothing is unpickled (an audit hook watches).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import CODECS
from composable_ebm.experts.store import load_codec, read_card

torch.set_num_threads(1)

SHAPE, LEVELS = (1, 4, 4), (0.3, 10.0)
SIZES = {
    "ConvEnergy": {"widths": [4], "hidden": 8},
    "DiffusedEnergy": {"hidden": 8, "components": 4, "noise_range": LEVELS},
    "DiffusedPatches": {"patch": 2, "hidden": 8, "components": 3, "context": 4, "noise_range": LEVELS},
    "DiffusedWindows": {
        "hidden": 8,
        "blocks": 1,
        "stride": 2,
        "overlap": 1,
        "components": 3,
        "noise_range": LEVELS,
    },
    "Denoiser": {"hidden": 8, "components": 4, "noise_range": LEVELS},
    "RBM": {"hidden": 3},
    "ConfinedEnergy": {"hidden": 8, "layers": 2, "noise_range": LEVELS},
    "NoisyClassifier": {"width": 4, "blocks": 1, "hidden": 8, "noise_range": LEVELS},
}
CODEC = {
    "image_shape": [1, 32, 32],
    "channels": SHAPE[0],
    "widths": [4, 4],
    "encoder_blocks": [1, 1],
    "decoder_blocks": [1, 1],
}
LATENT, ALONE = "ConfinedEnergy on latents", "PictureCodec"
PROMISES = [-1, 0, 10**6, 10**9, 10**18, 1e308, "many", None, [10**9], [1] * 50_000, True]


class Bomb:
    """What a pickle would run."""

    def __reduce__(self):
        return (os.abort, ())


def filled(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def save_codec(folder: Path) -> str:
    card = ceb.Card(
        "proof", "codec", "codec", ("image",), SHAPE, None, {"type": "PictureCodec", **CODEC}, failures="none"
    )
    return str(ceb.save_expert(folder, filled(CODECS["PictureCodec"](**CODEC)), card).weights["sha256"])


def save_one(folder: Path, kind: str, **more: str) -> str:
    options = {"event_shape": list(SHAPE), "num_values": 2, **SIZES[kind]}
    network = filled(NETWORKS[kind](**options))
    data_range = None if "codec" in more else getattr(network, "data_range", (-1.0, 1.0))
    card = ceb.Card(
        "proof",
        "one",
        "toy",
        ("no", "yes"),
        SHAPE,
        data_range,
        {"type": kind, **options},
        sampler={"kernel": "Langevin", "step_size": 0.1, "num_steps": 5},
        noise_conditioned=kind not in ("ConvEnergy", "RBM"),
        energy_range={"no": (-1.0, 1.0), "yes": (-1.0, 1.0)},
        failures="none known",
        **more,
    )
    return str(ceb.save_expert(folder, network, card).weights["sha256"])


def save_kind(folder: Path, kind: str) -> tuple[str, ...]:
    """Writes what a kind needs; the folders whose files are attacked."""
    if kind == ALONE:
        save_codec(folder)
        return (".",)
    if kind == LATENT:
        save_one(folder, "ConfinedEnergy", codec=save_codec(folder / "codec"))
        return (".", "codec")
    if kind == "NoisyClassifier":
        save_one(folder, kind, base=save_one(folder / "base", "ConfinedEnergy"))
        return (".", "base")
    save_one(folder, kind)
    return (".",)


@torch.no_grad()
def used(folder: Path, kind: str, x: torch.Tensor) -> tuple[object, torch.Tensor]:
    """What is known of an expert or a codec, and what it makes of states."""
    if kind == ALONE:
        codec = load_codec(folder)
        return read_card(folder), codec.pictures(x)
    expert = ceb.load_expert(folder)
    made = [expert(x)] if expert.has_value else [expert.network(x, x.new_ones(len(x))).sum(1)]
    if expert.codec is not None:
        made.append(expert.images(x).flatten(1).sum(1))
    if expert.base is not None:
        made.append(expert.base(x))
    return (expert.card, expert.base and expert.base.card), torch.cat(made)


def outcome(
    folder: Path, kind: str, x: torch.Tensor, truth: torch.Tensor, card: object, vouched: bool
) -> str:
    try:
        found, energies = used(folder, kind, x)
    except ceb.CheckpointError as error:
        return "refused by name" if str(folder) in str(error) else f"refused without the folder: {error}"
    except BaseException as error:
        return f"CRASH {type(error).__name__}: {str(error)[:200]}"
    same = torch.equal(energies, truth)
    if same and found == card:
        return "loaded as it was"
    # Without its digest a description may say other things of the same weights.
    return "loaded with another description" if vouched and same else "LOADED WITH A CHANGE"


@dataclass(frozen=True)
class Subject:
    """An expert, its files as they were, and its energies."""

    folder: Path
    kind: str
    card: object
    x: torch.Tensor
    truth: torch.Tensor
    files: dict[str, bytes]

    def attempt(self, name: str, content: bytes | None, what: str) -> tuple[str, float]:
        """What comes of loading it with other content in a file, and the process time that took."""
        path = self.folder / name
        if content is not None:
            path.write_bytes(content)
        start = time.process_time()
        vouched = what.startswith("a ")
        result = outcome(self.folder, self.kind, self.x, self.truth, self.card, vouched)
        seconds = time.process_time() - start
        if path.is_symlink() or path.is_fifo():
            path.unlink()
        path.write_bytes(self.files[name])
        return result, seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200, help="bits flipped, for each file of each kind")
    options = parser.parse_args(argv)
    counts, r, unpickled = Counter(), random.Random(0), []
    slowest, biggest, started = (0.0, ""), 0, time.perf_counter()
    sys.addaudithook(lambda event, _: unpickled.append(event) if event.startswith("pickle.find") else None)

    def grown() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def record(subject: Subject, name: str, content: bytes | None, what: str) -> None:
        nonlocal slowest
        result, seconds = subject.attempt(name, content, what)
        slowest = max(slowest, (seconds, f"{subject.kind} {what}"))
        counts[f"{Path(name).stem} {what.split(':')[0]}: {result}"] += 1

    with tempfile.TemporaryDirectory() as temporary:
        for kind in (*SIZES, LATENT, ALONE):
            folder = Path(temporary) / "proof" / kind
            folders = save_kind(folder, kind)
            x = (torch.rand(3, *SHAPE) > 0.5).float()
            (card, truth), before = used(folder, kind, x), grown()
            names = [
                str(Path(place) / name) for place in folders for name in ("model.safetensors", "config.json")
            ]
            files = {name: (folder / name).read_bytes() for name in names}
            subject = Subject(folder, kind, card, x, truth, files)

            for name, content in files.items():
                lengths = {*range(40), *(r.randrange(len(content)) for _ in range(options.flips // 4))}
                for length in sorted(lengths):
                    record(subject, name, content[:length], "cut")
                step = max(1, len(content) // options.flips)
                for place in range(0, len(content), step):
                    flipped = bytearray(content)
                    flipped[place] ^= 1 << r.randrange(8)
                    record(subject, name, bytes(flipped), "flipped")
                record(subject, name, content + b"\0", "longer")
                record(subject, name, pickle.dumps(Bomb()), "a pickle")
                for target in ("/dev/zero", "/dev/null", "/etc/passwd", str(folder), "nowhere"):
                    (folder / name).unlink()
                    (folder / name).symlink_to(target)
                    record(subject, name, None, "a link")
                (folder / name).unlink()
                os.mkfifo(folder / name)
                record(subject, name, None, "a pipe")
            for name in (name for name in files if name.endswith(".json")):
                described = json.loads(files[name])
                del described["digest"]
                for part in described["network"]:
                    for promise in PROMISES:
                        network = {**described["network"], part: promise}
                        text = json.dumps({**described, "network": network})
                        record(subject, name, text.encode(), f"a promise: {part} = {str(promise)[:20]}")
                for part in described:
                    for promise in PROMISES:
                        text = json.dumps({**described, part: promise})
                        record(subject, name, text.encode(), f"a value: {part} = {str(promise)[:20]}")
            biggest = max(biggest, grown() - before)
    for what, count in sorted(counts.items()):
        print(f"{count:7d}  {what}")
    print(f"slowest {slowest[0]:.2f} s ({slowest[1]}); memory grew by at most {biggest} MB")
    print(f"unpickled {unpickled or 'nothing'}; {time.perf_counter() - started:.0f} s in all")
    bad = [what for what in counts if "CRASH" in what or "WITH A CHANGE" in what or "without" in what]
    return int(bool(bad or unpickled or biggest > 300))


if __name__ == "__main__":
    raise SystemExit(main())

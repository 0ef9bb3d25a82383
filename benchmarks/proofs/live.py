"""Live chains between every pair of mixes, for long: nothing out of range, nothing frozen, and they land.

    python benchmarks/proofs/live.py --steps 10000

For every ordered pair of presets, chains of the first settle, are steered to the second and go on. Looked at
on the way: a state that is not finite or further out than data with its noise can be; a chain that
diverged and was given up; a chain that has not moved between two looks; and, at the end, how many
meet the mix. "Broken" counts frames with a chain out of range or given up.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

import composable_ebm as ceb
from composable_ebm.energy import Energy

PRESETS = {
    "smiling, glasses, no beard": ("smile", "glasses", "~beard"),
    "grey curls and a beard": ("grey_hair", "curly", "beard"),
    "glasses": ("glasses",),
    "no smile, straight hair": ("~smile", "~curly"),
    "all five": ("smile", "glasses", "beard", "curly", "grey_hair"),
}
LOOK_EVERY = 25
"""Steps between two looks."""
SPREADS = 6.0
"""Standard deviations of its noise that a state may lie outside the data."""


def mix(names: tuple[str, ...]) -> Energy:
    """The base with what a preset asks for."""
    experts = [ceb.load_expert(f"faces/{name.removeprefix('~')}") for name in names]
    terms = [~e if name.startswith("~") else e for e, name in zip(experts, names, strict=True)]
    return ceb.given(ceb.load_expert("faces/base"), *terms)


def out_of_range(frame: ceb.Frame) -> int:
    """Chains that are where data with their noise cannot be, or were given up."""
    level = torch.zeros(()) if frame.noise_level is None else frame.noise_level
    reach = 2.0 + SPREADS * level.expand(len(frame.states))  # data lie in [-1, 1]
    # Far up in noise the mean itself is wide; within the range of the data it is not.
    far = (frame.denoised.flatten(1).abs().amax(1) > 3.0) & (frame.states.flatten(1).abs().amax(1) > reach)
    return int((far | ~frame.alive | ~frame.states.flatten(1).isfinite().all(1)).sum())


def follow(engine: ceb.Engine, first: str, second: str, chains: int, steps: int, seed: int) -> dict:
    """One pair: half of the steps towards the first mix, half towards the second."""
    run = engine.submit(mix(PRESETS[first]), chains, num_steps=None, live=True, seed=seed)
    broken = frozen = looks = 0
    before: ceb.Frame | None = None
    turned = False
    for frame in run.frames():
        if before is not None and frame.step - before.step < LOOK_EVERY:
            continue
        looks += 1
        broken += out_of_range(frame) > 0
        if before is not None:
            frozen += int(((frame.states - before.states).flatten(1).abs().amax(1) == 0).sum())
        before = frame
        if not turned and frame.step >= steps // 2:
            turned = True
            run.steer(mix(PRESETS[second]))
        if frame.step >= steps:
            break
    run.cancel()
    assert before is not None
    met = 0.0 if before.met is None else float(before.met.float().mean())
    return {"broken": broken, "frozen": frozen, "looks": looks, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=10_000, help="of each pair")
    parser.add_argument("--chains", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, found = time.process_time(), []
    with ceb.Engine() as engine:
        for i, (first, second) in enumerate(itertools.permutations(PRESETS, 2)):
            row = follow(engine, first, second, options.chains, options.steps, options.seed + i)
            found.append(row)
            print(f"{first} -> {second}: {row}", flush=True)
    least = min(row["met"] for row in found)
    mean = sum(row["met"] for row in found) / len(found)
    broken, frozen = (sum(row[name] for row in found) for name in ("broken", "frozen"))
    print(
        f"{len(found)} pairs of {options.chains} chains and {options.steps} steps: {broken} broken frames, "
        f"{frozen} frozen chains; {100 * mean:.1f} % meet the last mix (least {100 * least:.1f} %); "
        f"{time.process_time() - start:.0f} s of one core"
    )
    raise SystemExit(bool(broken or frozen))


if __name__ == "__main__":
    main()

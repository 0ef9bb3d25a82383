"""Recipes under generated and mutated text, and round trips of random compositions of every node.

    python benchmarks/proofs/recipes.py --texts 1000000 --compositions 20000

Texts are grown from the grammar and then cut, doubled, swapped and sprinkled with whatever bytes there are.
Each must give an energy or a `RecipeError` that points into it, within half a second of process time, and
touch no file, process or socket (an audit hook watches). Every twentieth text that parses must print to one
that parses to an equal energy. Compositions are drawn through the Python interface, every node and option
among them, and must print to a recipe that parses to an equal energy with the same values.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

import torch

import composable_ebm as ceb
from composable_ebm.energy import Energy
from composable_ebm.energy.log_z import LogZ

torch.set_num_threads(1)

LIMIT = 0.5
NAMES: dict[str, Energy] = {
    name: ceb.analytic.Gaussian([i / 3, -i / 5], 1 + i / 4).named(name) for i, name in enumerate("abcd")
}
NUMBERS = ["2", "0.5", "3.", ".25", "1e1", "0", "1e-320", "1e308", "7", "0.1"]
BINARY = ["+", "-", "&", "|", " + ", " | ", "*", "/"]
JUNK = [chr(i) for i in (*range(1, 128), 0, 0xA0, 0x430, 0x661, 0x2212, 0xD800, 0x1D44E)]
FORBIDDEN = ("open", "exec", "compile", "import", "socket.", "subprocess.", "os.", "ctypes.", "pickle.")


def grown(r: random.Random, depth: int) -> str:
    """Text from the grammar."""
    if depth == 0:
        return r.choice([*NAMES, *NAMES, r.choice(NUMBERS)])
    inner = lambda: grown(r, depth - 1)  # noqa: E731
    match r.randrange(12):
        case 0 | 1 | 2 | 3:
            return inner() + r.choice(BINARY) + inner()
        case 4:
            return r.choice(NUMBERS) + "*" + inner()
        case 5:
            return r.choice(["-", "~", "--", "~~"]) * r.randrange(1, 4) + inner()
        case 6 | 7:
            return f"({inner()})"
        case 8:
            return f"mixture([{inner()}, {inner()}], weights=[{r.choice(NUMBERS)}, 1])"
        case 9:
            return f"negate({inner()}, threshold={r.choice(['-', ''])}{r.choice(NUMBERS)})"
        case 10:
            return f"sum([{inner()}, {inner()}], weights=[{r.choice(NUMBERS)}, 0])"
        case _:
            return f"ratio({inner()}, {inner()})"


def mutated(r: random.Random, text: str) -> str:
    """Text that may be anything."""
    for _ in range(r.randrange(4)):
        place = r.randrange(len(text) + 1)
        match r.randrange(6):
            case 0:
                text = text[:place] + r.choice(JUNK) + text[place:]
            case 1:
                text = text[:place]
            case 2:
                text = text[:place] + text[max(0, place - r.randrange(9)) :]
            case 3:
                text = text[:place] + r.choice(["(", ")", "[", "]", "-", "~", "*", "1*"]) * r.randrange(1, 60)
            case 4:
                text = text * r.randrange(1, 4)
            case _:
                other = r.randrange(len(text) + 1)
                text = text[min(place, other) : max(place, other)] + text[:place]
    if r.random() < 0.01:  # long ones
        text = r.choice(["-", "~", "(", "1*", "a+", "a|", "2*(", "-~", text]) * r.randrange(1, 3_000) + text
    return text


def drawn(r: random.Random, depth: int) -> Energy:
    """A composition through the Python interface."""
    if depth == 0:
        if r.random() < 0.1:
            high = r.uniform(0.5, 50)
            return LogZ([high, high / r.uniform(1.1, 9)], [r.uniform(-1e4, 1e4), r.uniform(-9, 9)])
        return r.choice(list(NAMES.values()))
    a, b = (drawn(r, depth - 1) for _ in range(2))
    number = r.choice([1.0, -1.0, 0.5, 1 / 3, 1e-9, 1e20, r.uniform(-1e3, 1e3)])
    match r.randrange(10):
        case 0:
            return a + b
        case 1:
            return a - b
        case 2:
            return a | b
        case 3:
            return number * a
        case 4:
            return a / number
        case 5:
            return ~a if a.energy_range is not None else ceb.negate(a, number)
        case 6:
            return ceb.negate(a, r.uniform(-50, 50))
        case 7:
            weights = [r.uniform(0.1, 9) for _ in range(2)] if r.random() < 0.7 else None
            return ceb.mixture([a, b], weights, [r.uniform(-9, 9), 0.0] if r.random() < 0.5 else None)
        case 8:
            return ceb.Sum([a, b], [r.choice([0.0, 1.0, number]), number])
        case _:
            return ceb.ratio(a, b) + a


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--compositions", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    r, counts, slowest, touched = random.Random(options.seed), Counter(), (0.0, ""), set()
    ceb.parse("~a + 2*(b | c)", NAMES)  # imports what parsing needs
    watching = False

    def watch(event: str, arguments: tuple) -> None:
        if watching and event.startswith(FORBIDDEN):
            touched.add((event, str(arguments)[:80]))

    sys.addaudithook(watch)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for i in range(options.texts):
        text = mutated(r, grown(r, r.randrange(5)))
        start, watching = time.process_time(), True
        try:
            energy = ceb.parse(text, NAMES)
        except ceb.RecipeError as error:
            counts["refused" if 0 <= error.position <= len(text) else "crashed, pointing nowhere"] += 1
        except BaseException as error:
            print(f"CRASH {type(error).__name__}: {error} in {text[:200]!r}")
            counts["crashed"] += 1
        else:
            counts["parsed"] += 1
            spent = time.process_time() - start
            if i % 20 == 0:
                again = ceb.parse(str(energy), NAMES)
                assert again == energy, text
                counts["round trips"] += 1
            start = time.process_time() - spent
        watching = False
        slowest = max(slowest, (time.process_time() - start, text))
    counts["over half a second"] = int(slowest[0] > LIMIT)
    for _ in range(options.compositions):
        energy = drawn(r, r.randrange(1, 5))
        again = ceb.parse(str(energy), NAMES)
        same = again == energy and str(again) == str(energy)
        same = same and torch.allclose(again(x), energy(x), rtol=1e-5, atol=1e-5, equal_nan=True)
        counts["compositions read back" if same else "compositions changed"] += 1
        if not same:
            print(f"CHANGED {energy} -> {again}")
    print(dict(counts))
    print(f"slowest {slowest[0]:.3f} s ({len(slowest[1])} characters, {slowest[1][:60]!r})")
    print(f"touched {sorted(touched) or 'nothing'}; {time.perf_counter() - started:.0f} s in all")
    return int(
        bool(
            counts["crashed"]
            or counts["crashed, pointing nowhere"]
            or counts["compositions changed"]
            or touched
            or slowest[0] > LIMIT
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""What is known about an expert: the content of its `config.json`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from numbers import Real
from typing import Self

__all__ = ["FORMAT", "Card", "CheckpointError"]

FORMAT = 1
MOST_NUMBERS = 2**31
"""In one state."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(_NAME.pattern + "|[0-9]+")


class CheckpointError(ValueError):
    """An expert's file is missing, damaged, or does not fit its description."""


@dataclass(frozen=True)
class Card:
    """An expert's description.

    Attributes:
        family: Folder of experts that share an image space and compose.
        name: Name within the family.
        attribute: What it is an expert of.
        values: Names of the values of the attribute, in the order of the network's outputs.
        words: What people say of each value, such as "serious" and "smiling"; () where names say it.
        event_shape: (channels, height, width).
        data_range: Smallest and largest value of the data; None for latents, which have no bounds.
        network: "type", and the arguments that build it.
        sampler: Sampler settings it was calibrated with, see `sampling.from_settings`.
        energy_range: Value (or "any") -> energies between which 99.8 % of its own samples lie.
        temperature: T at which exp(-E/T) describes those samples.
        noise_conditioned: Whether the network takes a noise level.
        weight: Weight of its ratio in `given` at which compositions were most reliable.
        weights: "sha256", "bytes" and "parameters" of the weights file.
        data: What it was trained on.
        training: Command, machine, minutes, and settings that differ from the defaults.
        metrics: Figures of the evaluation, by name.
        failures: What it is known to get wrong.
        licence: Licence of weights and data.
        base: SHA-256 of the weights of the expert of p(x) that it adds an attribute to; "" for one that is a
            density by itself.
        codec: SHA-256 of the weights of the codec whose latents it is about; "" for pictures.
    """

    family: str
    name: str
    attribute: str
    values: tuple[str, ...]
    event_shape: tuple[int, ...]
    data_range: tuple[float, float] | None
    network: Mapping
    sampler: Mapping = field(default_factory=dict)
    energy_range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    temperature: float | None = None
    noise_conditioned: bool = False
    weight: float = 1.0
    weights: Mapping = field(default_factory=dict)
    data: str = ""
    training: Mapping = field(default_factory=dict)
    metrics: Mapping = field(default_factory=dict)
    failures: str = ""
    licence: str = ""
    codec: str = ""
    base: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in (self.family, self.name):
            if not _NAME.fullmatch(part):
                raise ValueError(
                    f"families and experts are named by letters, digits and underscores, so that recipes can "
                    f"be read back; got {part!r}."
                )
        for value in self.values:
            if not (isinstance(value, str) and _VALUE.fullmatch(value)):
                raise ValueError(
                    "values are named by a word or a whole number, so that recipes can be read back; "
                    f"got {value!r}."
                )
        if not self.values or len(set(self.values)) != len(self.values) or "any" in self.values:
            raise ValueError(f"`values` must be distinct names other than 'any', got {self.values}.")
        if self.words and (len(self.words) != len(self.values) or not all(map(_is_said, self.words))):
            raise ValueError(f"`words` must be a text for each of {self.values}, got {_short(self.words)}.")
        self._check_numbers()
        self._check_sampler()

    def _check_numbers(self) -> None:
        sizes = self.event_shape
        if not all(type(n) is int and n > 0 for n in sizes) or math.prod(sizes) > MOST_NUMBERS:
            raise ValueError(f"`event_shape` must be whole numbers of at least 1, got {_short(sizes)}.")
        if self.data_range is not None:
            _check_range("data_range", self.data_range, strictly=True)
        for value, ends in self.energy_range.items():
            if value not in (*self.values, "any"):
                raise ValueError(f"`energy_range` is of the values and any, got one of {value!r}.")
            _check_range(f"energy_range of {value}", ends)
        for name in ("temperature", "weight"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and (name, value) != ("temperature", None):
                raise ValueError(f"`{name}` must be a positive number, got {_short(value)}.")
        if not isinstance(self.noise_conditioned, bool):
            raise ValueError(
                f"`noise_conditioned` must be true or false, got {_short(self.noise_conditioned)}."
            )
        for name in ("attribute", "data", "failures", "licence", "codec", "base"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be text, got {_short(getattr(self, name))}.")
        for name in ("bytes", "parameters"):
            count = self.weights.get(name, 0)
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} of `weights` must be a whole number, got {_short(count)}.")

    def _check_sampler(self) -> None:
        settings = self.sampler
        if not settings:
            return
        if not isinstance(settings.get("kernel"), str):
            raise ValueError(f"`sampler` must name its kernel, got {_short(settings.get('kernel'))}.")
        steps = settings.get("num_steps", 0)
        if type(steps) is not int or steps < 0:
            raise ValueError(f"num_steps of `sampler` must be a whole number, got {_short(steps)}.")
        step_size = settings.get("step_size", 1.0)
        if not (_is_number(step_size) and step_size > 0):
            raise ValueError(f"step_size of `sampler` must be a positive number, got {_short(step_size)}.")
        if not isinstance(settings.get("anneal", {}), Mapping):
            raise ValueError(f"anneal of `sampler` must be an object, got {_short(settings['anneal'])}.")
        if not all(math.isfinite(number) for number in _numbers(settings)):
            raise ValueError("numbers of `sampler` must be finite.")

    @property
    def full_name(self) -> str:
        """family/name, as recipes write it."""
        return f"{self.family}/{self.name}"

    @property
    def states(self) -> str:
        """What it is an energy of, in words: pictures or latents, their shape and range."""
        shape = "×".join(map(str, self.event_shape))
        if self.codec:
            return f"latents {shape} of the codec {self.codec[:12]}"
        low, high = self.data_range or (-math.inf, math.inf)
        return f"images {shape} in [{low:g}, {high:g}]"

    def to_json(self) -> str:
        """The text of `config.json`, with a digest of all it says."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "digest": digest_of(content)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `config.json`.

        Raises:
            ValueError: If it is no JSON object, is of another format, has wrong fields, or is not what
                its digest says.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        digest = content.pop("digest", None)
        changed = digest is not None and digest != digest_of(content)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT}; was it written by another version?")
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"unknown field {', '.join(unknown)}")
        needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        if missing := [n for n in needed if n not in content]:
            raise ValueError(f"missing field {', '.join(missing)}")
        content.setdefault("words", [])
        for name in ("values", "words", "event_shape", "data_range"):
            if name == "data_range" and content[name] is None:
                continue
            if not isinstance(content[name], list):
                raise ValueError(f"field {name} must be a list")
            content[name] = tuple(content[name])
        for name in ("family", "name", "attribute"):
            if not isinstance(content[name], str):
                raise ValueError(f"field {name} must be text")
        for name in ("network", "sampler", "energy_range", "weights", "training", "metrics"):
            if not isinstance(content.get(name, {}), dict):
                raise ValueError(f"field {name} must be an object")
        ranges = content.get("energy_range", {})
        content["energy_range"] = {k: tuple(v) if isinstance(v, list) else v for k, v in ranges.items()}
        card = cls(**content)
        if changed:
            raise ValueError(
                "it was changed since it was written, for its digest is of something else; where that was "
                "meant, delete its line 'digest'"
            )
        return card


def digest_of(content: Mapping) -> str:
    """SHA-256 of what a description says, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_said(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 40 and text.isprintable()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(name: str, ends: object, strictly: bool = False) -> None:
    ordered = False
    if isinstance(ends, (tuple, list)) and len(ends) == 2 and all(map(_is_number, ends)):
        ordered = ends[0] < ends[1] if strictly else ends[0] <= ends[1]
    if not ordered:
        raise ValueError(f"`{name}` must be two numbers, low before high, got {_short(ends)}.")


def _numbers(value: object) -> Iterator[float]:
    """All numbers inside objects and lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Real):
        yield float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

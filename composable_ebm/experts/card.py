"""What is known about an expert: the content of its `config.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Self

__all__ = ["FORMAT", "Card", "CheckpointError"]

FORMAT = 1
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
        """The text of `config.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `config.json`.

        Raises:
            ValueError: If it is no JSON object, is of another format, or has wrong fields.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT}; was it written by another version?")
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"unknown field {', '.join(unknown)}")
        needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        if missing := [n for n in needed if n not in content]:
            raise ValueError(f"missing field {', '.join(missing)}")
        for name in ("values", "event_shape", "data_range"):
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
        content["energy_range"] = {
            k: (float(a), float(b)) for k, (a, b) in content.get("energy_range", {}).items()
        }
        return cls(**content)

"""Recipes: compositions as text, `2*faces/smile + faces/glasses - 0.5*faces/beard`.

The grammar is that of Python's operators, with expert names for variables, so that what `str`
prints can be pasted into a script or back into `parse`:

    either  := both ("|" both)*                             either  OR
    both    := sum ("&" sum)*                               both    AND, the same as +
    sum     := product (("+" | "-") product)*
    product := unary (("*" | "/") unary)*                   weights and temperatures
    unary   := ("-" | "~") unary | atom                     ~ is NOT
    atom    := number | name | name[value] | name["a prompt"] | (either)
             | [number, ...]                                weights, one for each chain, before a *
             | ratio(either, either)
             | sum([either, ...], weights=[number, ...])    keeps terms of weight 0, which + drops
             | log_z(levels=[number, ...], values=[number, ...])
             | on_bits(either)                              an expert of grey levels, asked about bits
             | negate(either, threshold=number)
             | mixture([either, ...], weights=[number, ...], log_z=[number, ...])

Text is read, never executed, and the work is bounded: runs of signs and chains of numbers are folded before
they meet an energy, and names, depth and length have limits.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Sum, mixture, negate, ratio
from composable_ebm.energy.algebra import weighted_sum
from composable_ebm.energy.bits import on_bits
from composable_ebm.energy.log_z import LogZ
from composable_ebm.energy.weights import Weight, format_weight
from composable_ebm.experts.library import Library

MAX_LENGTH = 10_000
MAX_DEPTH = 50
MAX_NAMES = 100

Value = Energy | Weight

__all__ = ["RecipeError", "parse"]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*(?:/[A-Za-z_]\w*)*)"
    r'|(?P<text>"(?:[^"\\\x00-\x1f]|\\.)*")'
    r"|(?P<symbol>[-+*/&|~()\[\],=])"
    r"|(?P<end>$))",
    re.ASCII,
)


_SPACE = re.compile(r"\s*", re.ASCII)


class RecipeError(ValueError):
    """A recipe that cannot be read; the message points at the place.

    Attributes:
        position: Index of the character the message is about.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        start = max(0, position - 40)
        excerpt = text[start : position + 40].replace("\n", " ")
        super().__init__(f"{message}\n  {excerpt}\n  {' ' * (position - start)}^")
        self.position = position


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


def parse(text: str, names: Mapping[str, Energy] | None = None) -> Energy:
    """The composition that a recipe describes; `parse(str(e))` is `e` again.

    Args:
        text: A recipe.
        names: What the names mean. Unless given, names are those of the experts in the catalogue,
            `family/name` or the name alone where it is the only one; each is loaded once.
    Raises:
        RecipeError: If the text is no recipe or a name is unknown; the message points at the place.
        ValueError: If the energies do not compose.
    Example:
        >>> mix = parse("digits/digit[3] + 0.5*digits/thick")
    """
    if not isinstance(text, str):
        raise TypeError(f"a recipe is text, got {type(text).__name__}.")
    if len(text) > MAX_LENGTH:
        raise RecipeError(f"a recipe has at most {MAX_LENGTH} characters, this one {len(text)}.", text, 0)
    return _Parser(text, Library() if names is None else names).parse()


class _Parser:
    def __init__(self, text: str, names: Mapping[str, Energy]) -> None:
        self.text = text
        self.names = names
        self.known: dict[str, Energy] = {}  # those asked for so far
        self.tokens = self._tokenise()
        self.index = 0
        self.depth = 0
        self.functions: dict[str, Callable[[], Energy]] = {
            "ratio": self._ratio,
            "negate": self._negate,
            "mixture": self._mixture,
            "sum": self._weighted_sum,
            "log_z": self._log_z,
            "on_bits": lambda: on_bits(self._energy()),
        }

    def parse(self) -> Energy:
        if self.next.kind == "end":
            self._fail("an empty recipe; name at least one expert")
        energy = self._energy()
        if self.next.kind != "end":
            self._fail(f"expected an operator, got {self.next.text!r}")
        return energy

    # -- tokens ---------------------------------------------------------------------------------

    def _tokenise(self) -> list[_Token]:
        tokens: list[_Token] = []
        position = 0
        while not tokens or tokens[-1].kind != "end":
            match = _TOKEN.match(self.text, position)
            if match is None:
                where = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
                raise RecipeError(f"{self.text[where]!r} has no meaning in a recipe", self.text, where)
            kind = match.lastgroup or "end"
            tokens.append(_Token(kind, match.group(kind), match.start(kind)))
            position = match.end()
        named = [token for token in tokens if token.kind == "name"]
        if len(named) > MAX_NAMES:
            self._fail(f"a recipe has at most {MAX_NAMES} names, this one {len(named)}", named[MAX_NAMES])
        return tokens

    @property
    def next(self) -> _Token:
        return self.tokens[self.index]

    def _take(self, *symbols: str) -> _Token | None:
        if self.next.kind == "symbol" and self.next.text in symbols:
            self.index += 1
            return self.tokens[self.index - 1]
        return None

    def _expect(self, symbol: str) -> None:
        if self._take(symbol) is None:
            self._fail(f"expected {symbol!r}, got {self.next.text or 'the end'!r}")

    def _fail(self, message: str, at: _Token | None = None) -> NoReturn:
        raise RecipeError(message, self.text, (at or self.next).position)

    # -- grammar --------------------------------------------------------------------------------

    def _energy(self) -> Energy:
        at = self.next
        value = self._either()
        if isinstance(value, Energy):
            return value
        what = f"{value:g} is a number" if isinstance(value, float) else "these are numbers"
        self._fail(f"{what}, not an energy; weights go before a term: 2*smile", at)

    def _either(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"a recipe nests at most {MAX_DEPTH} deep")
        value = self._chain(("|",), lambda: self._chain(("&",), self._sum))
        self.depth -= 1
        return value

    def _sum(self) -> Value:
        return self._chain(("+", "-"), self._product)

    def _chain(self, symbols: tuple[str, ...], operand: Callable[[], Value]) -> Value:
        value = operand()
        while (operator := self._take(*symbols)) is not None:
            value = self._apply(operator, value, operand())
        return value

    def _product(self) -> Value:
        value = self._unary()
        factors: list[tuple[_Token, Weight]] = []  # of an energy, not yet multiplied
        while (operator := self._take("*", "/")) is not None:
            other = self._unary()
            if isinstance(other, Energy) and (isinstance(value, Energy) or operator.text == "/"):
                self._meaningless(operator, self._times(value, factors), other)
            if isinstance(other, Energy):
                value, other = other, value
            elif operator.text == "/":
                other = self._inverse(other, operator)
            assert not isinstance(other, Energy)
            if isinstance(value, Energy):
                factors.append((operator, other))
            else:
                value = self._finite(value * other, operator)
        return self._times(value, factors)

    def _inverse(self, number: Weight, at: _Token) -> Weight:
        if bool((number == 0).any() if isinstance(number, Tensor) else number == 0):
            self._fail("division by zero", at)
        return self._finite(1.0 / number, at)

    def _times(self, value: Value, factors: Sequence[tuple[_Token, Weight]]) -> Value:
        """An energy times all factors, in order, so that rounding is that of one after another."""
        if not factors or not isinstance(value, Energy):
            return value
        terms = value.operands if isinstance(value, Sum) else (value,)
        weights = value.weights if isinstance(value, Sum) else (1.0,)
        scaled = []
        for term, weight in zip(terms, weights, strict=True):
            for at, factor in factors:
                weight = self._finite(weight * factor, at)
            scaled.append((term, weight))
        return weighted_sum(scaled)

    def _apply(self, operator: _Token, a: Value, b: Value) -> Value:
        try:
            match operator.text, isinstance(a, Energy), isinstance(b, Energy):
                case ("+" | "&", True, True):
                    return a + b
                case ("-", True, True):
                    return a - b
                case ("|", True, True):
                    return a | b  # type: ignore[operator]
        except RecipeError:
            raise
        except ValueError as error:
            self._fail(str(error), operator)
        self._meaningless(operator, a, b)

    def _meaningless(self, operator: _Token, a: Value, b: Value) -> NoReturn:
        kinds = [f"({v})" if isinstance(v, Energy) else format_weight(v) for v in (a, b)]
        self._fail(
            f"{kinds[0]} {operator.text} {kinds[1]} has no meaning: write weight*expert, a + b, a | b",
            operator,
        )

    def _finite(self, value: Weight, at: _Token) -> Weight:
        finite = value.isfinite().all() if isinstance(value, Tensor) else math.isfinite(value)
        if not finite:
            self._fail("a weight must be finite", at)
        return value

    def _unary(self) -> Value:
        signs: list[tuple[str, list[_Token]]] = []  # runs of one sign; two minus signs in a row are none
        while (operator := self._take("-", "~")) is not None:
            if not signs or signs[-1][0] != operator.text:
                signs.append((operator.text, []))
            signs[-1][1].append(operator)
            if operator.text == "-" and len(signs[-1][1]) == 2:
                signs.pop()
        value = self._atom()
        for sign, run in reversed(signs):
            value = -value if sign == "-" else self._not(value, run)
        return value

    def _not(self, value: Value, run: Sequence[_Token]) -> Value:
        """~ as often as written; once it only goes to and fro, as many more times as make a difference."""
        left = list(run)
        before: list[Energy] = []
        while left:
            at = left.pop()
            if not isinstance(value, Energy):
                self._fail(f"~ negates an energy, not the number {format_weight(value)}", at)
            before.append(value)
            try:
                value = ~value
            except ValueError as error:
                self._fail(str(error), at)
            if len(before) > 1 and before[-2] == value:
                left = left[: len(left) % 2]
        return value

    def _atom(self) -> Value:
        token = self.next
        if token.kind == "number":
            return self._number()
        if token.kind == "name":
            self.index += 1
            if self.next.text == "(":
                if token.text not in self.functions:
                    self._fail(
                        f"a recipe calls nothing but {', '.join(self.functions)}; got {token.text!r}", token
                    )
                self.index += 1
                value = self.functions[token.text]()
                self._expect(")")
                return value
            return self._expert(token)
        if self.next.text == "[":
            return torch.tensor(self._numbers(), dtype=torch.float64)
        if self._take("("):
            inner = self._either()
            self._expect(")")
            return inner
        self._fail(f"expected an expert, a number or a parenthesis, got {token.text or 'the end'!r}")

    def _number(self, signed: bool = False) -> float:
        sign = -1.0 if signed and self._take("-") else 1.0
        token = self.next
        if token.kind != "number":
            self._fail(f"expected a number, got {token.text or 'the end'!r}")
        self.index += 1
        value = float(token.text)
        if not math.isfinite(value):
            self._fail("a number must be finite", token)
        return sign * value

    def _named(self, name: str) -> Energy | None:
        if name not in self.known:
            try:
                self.known[name] = self.names[name]
            except KeyError:
                return None
        return self.known[name]

    def _expert(self, token: _Token) -> Energy:
        energy = self._named(token.text)
        if energy is None and self.next.text == "[":
            whole = "".join(part.text for part in self.tokens[self.index - 1 : self.index + 3])
            if whole.endswith("]") and (energy := self._named(whole)) is not None:
                self.index += 3  # a name such as classifier[2]
                return energy
        if energy is None:
            near = difflib.get_close_matches(token.text, list(self.names), 3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"there are: {', '.join(self.names) or 'none'}"
            )
            self._fail(f"unknown expert {token.text!r}; {hint}", token)
        if self._take("["):
            value = self.next
            if value.kind not in ("name", "number", "text"):
                self._fail("expected a value in [ ]", value)
            self.index += 1
            self._expect("]")
            choose = getattr(energy, "__getitem__", None)
            if choose is None:
                self._fail(f"{token.text} has no values to choose from", value)
            try:
                return choose(self._quoted(value) if value.kind == "text" else value.text)
            except KeyError as error:
                self._fail(str(error.args[0]), value)
        return energy

    def _quoted(self, token: _Token) -> str:
        try:
            return json.loads(token.text)
        except ValueError as error:
            self._fail(f"a prompt in quotes follows the rules of JSON: {error}", token)

    # -- functions ------------------------------------------------------------------------------

    def _ratio(self) -> Energy:
        at = self.next
        a = self._energy()
        self._expect(",")
        b = self._energy()
        try:
            return ratio(a, b)
        except ValueError as error:
            self._fail(str(error), at)

    def _negate(self) -> Energy:
        at = self.next
        operand = self._energy()
        threshold = self._keywords({"threshold": lambda: self._number(signed=True)}).get("threshold")
        try:
            return negate(operand, threshold)
        except ValueError as error:
            self._fail(str(error), at)

    def _numbers(self) -> list[float]:
        return self._list(lambda: self._number(signed=True))

    def _weight(self) -> Weight:
        return (
            torch.tensor(self._numbers(), dtype=torch.float64)
            if self.next.text == "["
            else self._number(True)
        )

    def _weighted_sum(self) -> Energy:
        at = self.next
        terms = self._list(self._energy)
        options = self._keywords({"weights": lambda: self._list(self._weight)})
        try:
            return Sum(terms, options.get("weights"))
        except ValueError as error:
            self._fail(str(error), at)

    def _log_z(self) -> Energy:
        at = self.next
        options = self._keywords({"levels": self._numbers, "values": self._numbers}, first=True)
        if set(options) != {"levels", "values"}:
            self._fail("log_z needs `levels` and `values`", at)
        try:
            return LogZ(options["levels"], options["values"])
        except ValueError as error:
            self._fail(str(error), at)

    def _mixture(self) -> Energy:
        at = self.next
        components = self._list(self._energy)
        options = self._keywords({"weights": self._numbers, "log_z": self._numbers})
        try:
            return mixture(components, options.get("weights"), options.get("log_z"))
        except ValueError as error:
            self._fail(str(error), at)

    def _list(self, item: Callable) -> list:
        self._expect("[")
        items = [item()]
        while self._take(","):
            items.append(item())
        self._expect("]")
        return items

    def _keywords(self, known: dict[str, Callable], first: bool = False) -> dict:
        """Options by name, after a comma each, but for the `first` argument of a function."""
        given: dict = {}
        while (first and not given) or self._take(","):
            token = self.next
            if token.text not in known or token.text in given:
                self._fail(f"expected one of {', '.join(known)}, got {token.text or 'the end'!r}")
            self.index += 1
            self._expect("=")
            given[token.text] = known[token.text]()
        return given

"""Recipes: compositions as text, `2*faces/smile + faces/glasses - 0.5*faces/beard`.

The grammar is that of Python's operators, with expert names for variables, so that what `str`
prints can be pasted into a script or back into `parse`:

    either  := both ("|" both)*                             either  OR
    both    := sum ("&" sum)*                               both    AND, the same as +
    sum     := product (("+" | "-") product)*
    product := unary (("*" | "/") unary)*                   weights and temperatures
    unary   := ("-" | "~") unary | atom                     ~ is NOT
    atom    := number | name | name[value] | name["a prompt"] | (either)
             | ratio(either, either)
             | on_bits(either)                              an expert of grey levels, asked about bits
             | negate(either, threshold=number)
             | mixture([either, ...], weights=[number, ...], log_z=[number, ...])

Text is read, never executed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from composable_ebm.energy import Energy, mixture, negate, ratio
from composable_ebm.energy.bits import on_bits
from composable_ebm.experts.library import Library

MAX_LENGTH = 10_000
MAX_DEPTH = 50
MAX_NAMES = 100

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
        self.tokens = self._tokenise()
        self.index = 0
        self.depth = 0
        self.functions: dict[str, Callable[[], Energy]] = {
            "ratio": self._ratio,
            "negate": self._negate,
            "mixture": self._mixture,
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
        if not isinstance(value, Energy):
            self._fail(f"{value:g} is a number, not an energy; weights go before a term: 2*smile", at)
        return value

    def _either(self) -> Energy | float:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"a recipe nests at most {MAX_DEPTH} deep")
        value = self._chain(("|",), lambda: self._chain(("&",), self._sum))
        self.depth -= 1
        return value

    def _sum(self) -> Energy | float:
        return self._chain(("+", "-"), lambda: self._chain(("*", "/"), self._unary))

    def _chain(self, symbols: tuple[str, ...], operand: Callable[[], Energy | float]) -> Energy | float:
        value = operand()
        while (operator := self._take(*symbols)) is not None:
            value = self._apply(operator, value, operand())
        return value

    def _apply(self, operator: _Token, a: Energy | float, b: Energy | float) -> Energy | float:
        try:
            match operator.text, isinstance(a, Energy), isinstance(b, Energy):
                case ("*", _, _) if not (isinstance(a, Energy) and isinstance(b, Energy)):
                    return self._finite(a * b, operator)
                case ("/", _, False):
                    if b == 0:
                        self._fail("division by zero", operator)
                    return self._finite(a / b, operator)
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
        kinds = [f"{v:g}" if isinstance(v, float) else f"({v})" for v in (a, b)]
        self._fail(
            f"{kinds[0]} {operator.text} {kinds[1]} has no meaning: write weight*expert, a + b, a | b",
            operator,
        )

    def _finite(self, value: Energy | float, at: _Token) -> Energy | float:
        if isinstance(value, float) and not math.isfinite(value):
            self._fail("a weight must be finite", at)
        return value

    def _unary(self) -> Energy | float:
        operators = []
        while (operator := self._take("-", "~")) is not None:
            operators.append(operator)
        value = self._atom()
        for operator in reversed(operators):
            if operator.text == "-":
                value = -value
            elif isinstance(value, Energy):
                try:
                    value = ~value
                except ValueError as error:
                    self._fail(str(error), operator)
            else:
                self._fail(f"~ negates an energy, not the number {value:g}", operator)
        return value

    def _atom(self) -> Energy | float:
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

    def _expert(self, token: _Token) -> Energy:
        whole = "".join(part.text for part in self.tokens[self.index - 1 : self.index + 3])
        if whole.endswith("]") and whole in self.names:  # a name such as classifier[2]
            self.index += 3
            return self.names[whole]
        try:
            energy = self.names[token.text]
        except KeyError:
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
        a = self._energy()
        self._expect(",")
        return ratio(a, self._energy())

    def _negate(self) -> Energy:
        at = self.next
        operand = self._energy()
        threshold = self._keywords({"threshold": lambda: self._number(signed=True)}).get("threshold")
        try:
            return negate(operand, threshold)
        except ValueError as error:
            self._fail(str(error), at)

    def _mixture(self) -> Energy:
        at = self.next
        components = self._list(self._energy)
        numbers = lambda: self._list(lambda: self._number(signed=True))  # noqa: E731
        options = self._keywords({"weights": numbers, "log_z": numbers})
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

    def _keywords(self, known: dict[str, Callable]) -> dict:
        given: dict = {}
        while self._take(","):
            token = self.next
            if token.text not in known or token.text in given:
                self._fail(f"expected one of {', '.join(known)}, got {token.text or 'the end'!r}")
            self.index += 1
            self._expect("=")
            given[token.text] = known[token.text]()
        return given

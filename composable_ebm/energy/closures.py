"""The modules and parameters that a function works with, wherever it keeps them.

`lambda x: net(x).squeeze(-1)` is a function of the parameters of `net`: an energy made of it has them, moves
them and trains them, and a copy of that energy works with copies of them. They are found in variables of the
function around it, in global variables that its code names, in defaults, in what a `functools.partial` or
a method is bound to, in the attributes of a callable object, and in lists and dictionaries there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["Function", "as_module", "parts_of", "with_parts"]

Part = nn.Module | nn.Parameter
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
DEPTH = 8
"""How many functions and containers inside each other are searched."""


def parts_of(function: Callable[..., Any]) -> list[Part]:
    """The modules and parameters that `function` works with, in order of appearance, each once."""
    found: dict[int, Part] = {}

    def note(part: Part) -> Part:
        found[id(part)] = part
        return part

    _swapped(function, note, {}, 0)
    return list(found.values())


def with_parts(function: Callable[..., Any], copies: dict[int, Part]) -> Callable[..., Any]:
    """The same function working with `copies`, modules and parameters by the id of what they replace."""
    return _swapped(function, lambda part: copies.get(id(part), part), {}, 0)


class Function(nn.Module):
    """A function as a module: it has the parameters that the function works with, and copies have copies.

    Args:
        function: Any callable.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        parts = parts_of(function)
        self.held = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        self.bare = nn.ParameterList([part for part in parts if isinstance(part, nn.Parameter)])

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Function:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy({k: v for k, v in vars(self).items() if k != "function"}, memo))
        old, now = ((*module.held, *module.bare) for module in (self, new))
        new.function = with_parts(self.function, {id(a): b for a, b in zip(old, now, strict=True)})
        return new


def as_module(function: Callable[..., Any]) -> nn.Module:
    """A module as it is, and any other function as a `Function`."""
    return function if isinstance(function, nn.Module) else Function(function)


def _swapped(value: Any, swap: Callable[[Part], Part], seen: dict[int, Any], depth: int) -> Any:
    """`value`, with `swap` of every part in it; itself where that changes nothing."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        return swap(value)
    if isinstance(value, (*_PLAIN, type)) or depth > DEPTH:
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # what refers to itself is left as it is

    def inner(part: Any) -> Any:
        return _swapped(part, swap, seen, depth + 1)

    new: Any = value
    if isinstance(value, FunctionType):
        new = _function(value, inner)
    elif isinstance(value, functools.partial):
        new = _partial(value, inner)
    elif isinstance(value, MethodType):
        owner = inner(value.__self__)
        new = value if owner is value.__self__ else MethodType(value.__func__, owner)
    elif type(value) in (list, tuple):
        items = [inner(item) for item in value]
        new = value if _same(items, value) else type(value)(items)
    elif type(value) is dict:
        items = [inner(item) for item in value.values()]
        new = value if _same(items, value.values()) else dict(zip(value, items, strict=True))
    elif callable(value) and type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        new = _object(value, inner)
    seen[id(value)] = new
    return new


def _function(function: FunctionType, inner: Callable[[Any], Any]) -> FunctionType:
    cells = function.__closure__ or ()
    held = [_content(cell) for cell in cells]
    inside = [inner(content) for content in held]
    named = {
        name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__
    }
    # Functions of libraries lead everywhere: of global names, modules and what the same file defines.
    own = {
        name: value
        for name, value in named.items()
        if isinstance(value, (nn.Module, nn.Parameter, list, tuple, dict, functools.partial))
        or getattr(value, "__module__", None) == function.__module__
    }
    world = {name: inner(value) for name, value in own.items()}
    defaults = inner(function.__defaults__) if function.__defaults__ else function.__defaults__
    keywords = inner(function.__kwdefaults__) if function.__kwdefaults__ else function.__kwdefaults__
    kept = _same(inside, held) and _same(world.values(), own.values())
    if kept and defaults is function.__defaults__ and keywords is function.__kwdefaults__:
        return function
    globals_ = (
        function.__globals__ if _same(world.values(), own.values()) else {**function.__globals__, **world}
    )
    closure = tuple(
        cell if new is old else CellType(new) for cell, old, new in zip(cells, held, inside, strict=True)
    )
    copy = FunctionType(function.__code__, globals_, function.__name__, defaults, closure or None)
    copy.__kwdefaults__ = keywords
    copy.__dict__.update(function.__dict__)
    return copy


def _partial(function: functools.partial, inner: Callable[[Any], Any]) -> functools.partial:
    inside, arguments = inner(function.func), [inner(a) for a in function.args]
    keywords = {name: inner(a) for name, a in function.keywords.items()}
    same = inside is function.func and _same(arguments, function.args)
    if same and _same(keywords.values(), function.keywords.values()):
        return function
    return functools.partial(inside, *arguments, **keywords)


def _object(value: Any, inner: Callable[[Any], Any]) -> Any:
    """A callable object, by its attributes."""
    attributes = {name: inner(part) for name, part in vars(value).items()}
    if _same(attributes.values(), vars(value).values()):
        return value
    new = object.__new__(type(value))
    new.__dict__.update(attributes)
    return new


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None


def _names(code: CodeType) -> set[str]:
    """Global names in a function's code, that of functions inside it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


def _same(one: Any, other: Any) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))

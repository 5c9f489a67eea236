"""Checks the types of arguments when an object is made; errors say what was expected, got, and what to write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {float: "a number", int: "a whole number", str: "a string", bool: "True or False", NoneType: "None"}
LIGHTNING = ("lightning.", "pytorch_lightning.")
EXAMPLES = {float: "0.5", int: "1", str: '"name"', bool: "True"}


def check_arguments(call: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raises unless all arguments are what their annotations say; the first line of a constructor or function.

    Args:
        call: the class or function, such as `Prune`.
        values: name -> argument; `locals()`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is none of the strings that it may be.
    """
    hints, defaults = _signature(call)
    for name, hint in hints.items():
        if name in values and not _fits(values[name], hint):
            others = {other: kind for other, kind in hints.items() if other != name}
            raise _error(call.__name__, name, values[name], hint, defaults.get(name), others)


def check_fields(made: Any) -> None:
    """The same, of a dataclass, first in `__post_init__`. Fields that a user's own child adds may be anything."""
    kind = type(made)
    hints = _own_hints(kind)
    for field in fields(made):
        if field.name in hints and not _fits(value := getattr(made, field.name), hints[field.name]):
            default = None if field.default is MISSING else field.default
            raise _error(kind.__name__, field.name, value, hints[field.name], default, {})


@cache
def _signature(call: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> annotation, and name -> default, of the arguments that have names."""
    hints = get_type_hints(call.__init__ if isinstance(call, type) else call)  # type: ignore[misc]
    named = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    return {p.name: hints[p.name] for p in named}, defaults


def _own_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(next(c for c in kind.__mro__ if c.__module__.partition(".")[0] == "lightning_slim"))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says, entries of lists and dictionaries included."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is type:
        return isinstance(value, type) and issubclass(value, inner)
    if kind is tuple:
        return isinstance(value, tuple | list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (Sequence, Collection):
        listed = isinstance(value, kind) and not isinstance(value, str | bytes)
        return listed and all(_fits(entry, inner[0]) for entry in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind in (float, int):
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    if kind.__module__.startswith(LIGHTNING):  # by name, as `lightning.pytorch` and `pytorch_lightning` are alike
        return kind.__name__ in {each.__name__ for each in type(value).__mro__}
    return isinstance(value, kind)


def _error(
    owner: str, name: str, value: Any, hint: Any, default: Any, others: Mapping[str, Any]
) -> TypeError | ValueError:
    kinds = [get_origin(each) or each for each in _alternatives(hint)]
    kind = ValueError if isinstance(value, str) and Literal in kinds else TypeError
    remedy = _remedy(value, hint, default, others)
    return kind(f"Expected `{name}` to be {_words(hint)}, got {_short(value)} in {owner}: {remedy}.")


def _remedy(value: Any, hint: Any, default: Any, others: Mapping[str, Any]) -> str:
    """What to write instead."""
    classes = [each for each in _alternatives(hint) if isinstance(each, type) and each not in WORDS]
    children = {child.__name__.lower(): child for each in classes for child in _children(each)}
    if isinstance(value, type) and value in children.values():
        return f"write `{value.__name__}()`, an object"
    if isinstance(value, str) and (child := children.get(value.lower().replace("_", "").replace(" ", ""))):
        return f"write `{child.__name__}()`"
    if isinstance(value, str) and _fits(0.5, hint) and (number := _number(value)) is not None:
        return f"write {number:g}"
    if isinstance(value, str) and _fits([value], hint):
        return f"write [{value!r}]"
    options = [option for each in _alternatives(hint) if get_origin(each) is Literal for option in get_args(each)]
    if isinstance(value, str) and (close := get_close_matches(value.lower(), options, n=1)):
        return f'write "{close[0]}"'
    ours = not isinstance(value, type) and type(value).__module__ != "builtins"
    if ours and (meant := [other for other, kind in others.items() if kind is not Any and _fits(value, kind)]):
        return f"write `{meant[0]}={_short(value)}`"
    if default not in (None, "", ()):
        return f'write "{default}"' if isinstance(default, str) else f"write one such as {default!r}"
    if children:
        return f"there are {', '.join(sorted(child.__name__ for child in children.values()))}"
    return "write " + " or ".join(_example(each) for each in _alternatives(hint) if each is not NoneType)


def _number(text: str) -> float | None:
    """The number that a string such as "50%" or "0.5" means."""
    digits = text.strip().removesuffix("%").strip()
    if not digits.replace(".", "", 1).isdecimal():
        return None
    return float(digits) / (100 if "%" in text else 1)


def _children(kind: type) -> list[type]:
    """The class and all below it, of those that objects can be made of."""
    if kind.__module__.partition(".")[0] != "lightning_slim":
        return []
    known: list[type] = kind.__subclasses__()
    below = [child for each in known for child in _children(each)]
    return below if inspect.isabstract(kind) else [kind, *below]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _example(hint: Any) -> str:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return f'"{inner[0]}"'
    if kind in (Sequence, Collection):
        return f"[{_example(_alternatives(inner[0])[0])}]"
    if kind is tuple:
        return f"({', '.join(map(_example, inner))})"
    if kind is Mapping:
        return f"{{{_example(inner[0])}: {_example(inner[1])}}}"
    known = sorted(child.__name__ for child in _children(kind))
    return EXAMPLES.get(kind) or (f"{known[0]}()" if known else _words(hint))


def _words(hint: Any) -> str:
    """An annotation in words.

    >>> _words(int | Literal["auto"]), _words(Sequence[str])
    ('a whole number or "auto"', 'a list, each entry a string')
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if kind is Literal:
        quoted = [f'"{each}"' for each in inner]
        return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    if kind is tuple:
        return f"a tuple of {len(inner)} entries, each {_words(inner[0])}"
    if kind in (Sequence, Collection):
        return f"a list, each entry {_words(inner[0])}"
    if kind is Mapping:
        return f"a dictionary, each key {_words(inner[0])} and each value {_words(inner[1])}"
    if kind is type:
        return f"a type of {inner[0].__name__}"
    return WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _short(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 100 else f"an object of {type(value).__name__}"

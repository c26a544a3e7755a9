"""One key of the configuration: its type, range and documentation, and what a raw value means for it."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_ENTRIES, MAX_NAMES = 64, 4096  # of a list of numbers, and of text: far above what any key needs
BOOLEANS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def key(default: Any, doc: str, ge: float | None = None, gt: float | None = None, le: float | None = None,
        lt: float | None = None) -> Any:  # fmt: skip
    """A config key: its default, one line of documentation with the unit, and its legal range."""
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class KeyInfo:
    """One leaf of the schema: dotted name, type, default, and its documentation and range."""

    name: str
    type: Any
    default: Any
    doc: str
    range: dict[str, float | None]

    @property
    def choices(self) -> tuple[str, ...]:
        """Legal words of a Literal, or of a list of Literals; empty for every other type."""
        return typing.get_args(self.element) if typing.get_origin(self.element) is Literal else ()

    @property
    def element(self) -> Any:
        """The type of the value, or of an entry where it is a list."""
        return typing.get_args(self._inner)[0] if self.is_list else self._inner

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self._inner) is list

    @property
    def _inner(self) -> Any:
        if isinstance(self.type, types.UnionType):
            return next(arg for arg in typing.get_args(self.type) if arg is not type(None))
        return self.type

    @property
    def type_name(self) -> str:
        """The type in words: `int`, `float or null`, `one of a, b, c`, `list of int`."""
        if self.choices:
            words = ("list of " if self.is_list else "one of ") + ", ".join(self.choices)
        elif self.is_list:
            words = f"list of {self.element.__name__.replace('str', 'text')}"
        else:
            words = {"str": "text"}.get(self._inner.__name__, self._inner.__name__)
        return words + (" or null" if self.optional else "")

    @property
    def range_name(self) -> str:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        return " and ".join(f"{signs[name]} {bound:g}" for name, bound in self.range.items() if bound is not None)


def typed(info: KeyInfo, value: Any) -> Any:
    """A whole value as the typed node takes it; ValueError where it can't be one of the key's type."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none", "~", "")):
        if info.optional:
            return None
        if value is None:
            raise ValueError
    if not info.is_list:
        return scalar(info, value)
    if isinstance(value, str):  # [1,2,2]; entries keep their text
        text = value.strip()
        if info.element is str and not text.startswith("["):
            value = [text]  # one text need not be written as a list
        elif not (text.startswith("[") and text.endswith("]")):
            raise ValueError
    if isinstance(value, str):
        value = [item.strip().strip("'\"") for item in text[1:-1].split(",")] if text[1:-1].strip() else []
    if not isinstance(value, list):
        raise ValueError
    most = MAX_NAMES if info.element is str else MAX_ENTRIES
    if len(value) > most:
        raise ValueError(f"; at most {most} entries")
    return [scalar(info, item) for item in value]


def scalar(info: KeyInfo, value: Any) -> Any:
    """One value in the spelling that the typed node takes; ValueError for what only looks like one."""
    if isinstance(value, str):
        value = value.strip()
        if "${" in value:
            raise ValueError("; interpolations are not supported, write the value itself")
        if value == "???":  # omegaconf would take the key as not given
            raise ValueError
        value.encode()  # a lone surrogate can't be stored
    if info.choices:
        return _choice(info.choices, value)
    if isinstance(value, (dict, list)) or value is None or (isinstance(value, bool) and info.element is not bool):
        raise ValueError
    if isinstance(value, str) and info.element is int and not re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", value):
        raise ValueError
    if info.element is bool and str(value).lower() not in BOOLEANS:
        raise ValueError
    if info.element is str and str(value).lower() in ("null", "~"):
        raise ValueError
    return BOOLEANS[str(value).lower()] if info.element is bool else value


def _choice(choices: tuple[str, ...], value: Any) -> str:
    """`fixed_large` for `fixed-large`, and YAML's booleans for a switch or the word no."""
    words = [str(value)]
    if isinstance(value, bool):
        words += [word for word, meaning in BOOLEANS.items() if meaning is value]
    for word in words:
        for choice in choices:
            if choice.replace("_", "-") == word.replace("_", "-") or (choice in BOOLEANS and choice == word.lower()):
                return choice
    raise ValueError


def guess(info: KeyInfo, value: Any) -> str:
    """`; did you mean X?` for a wrong word where there are choices, else an empty string."""
    words = value if isinstance(value, list) else str(value).strip("[]").split(",")
    wrong = [str(word).strip() for word in words if str(word).strip() not in info.choices]
    return nearest(wrong[0], info.choices) if info.choices and wrong else ""


def in_range(info: KeyInfo, value: Any) -> bool:
    """Whether every number of a typed value is finite and within the key's bounds."""
    numbers = list(value or ()) if info.is_list else [value]
    numbers = [n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]
    low, above, high, below = (info.range[name] for name in ("ge", "gt", "le", "lt"))
    return all(
        (isinstance(n, int) or math.isfinite(n))
        and (low is None or n >= low)
        and (above is None or n > above)
        and (high is None or n <= high)
        and (below is None or n < below)
        for n in numbers
    )


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of `words`, else an empty string."""
    words = list(words)
    by_last = {name.split(".")[-1]: name for name in reversed(words)}  # the right key under another section
    last = word.split(".")[-1]
    close = [last] if last in by_last else difflib.get_close_matches(word, words, 1, 0.6)
    close = close or difflib.get_close_matches(last, by_last, 1, 0.6)
    close = [by_last.get(name, name) for name in close]
    return f"; did you mean {close[0]}?" if close else ""

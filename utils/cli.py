"""Command lines: a script's own options (argparse) and the dotted config overrides beside them."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from utils.config import KEYS
from utils.config_key import nearest
from utils.errors import InputError, is_main_process


class Parser(argparse.ArgumentParser):
    """argparse that reports an error as one InputError line and lists the config keys in its help."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--print_config", action="store_true", help="print the merged configuration and exit")

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def format_help(self) -> str:
        return super().format_help() + "\n" + keys_help(own={action.dest for action in self._actions})

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """(the script's options, {dotted key: raw text}). Raises InputError for anything that is neither."""
        options = {name for action in self._actions for name in action.option_strings}
        rest, overrides = [], {}
        words = iter(range(len(argv)))
        for i in words:
            name, equals, value = argv[i].partition("=")
            if not name.startswith("--") or name in options or not _is_key(name[2:]):
                rest.append(argv[i])
                continue
            if not equals:
                if i + 1 >= len(argv) or argv[i + 1].startswith("--"):
                    raise InputError(f"{name} needs a value: {name} VALUE or {name}=VALUE")
                value = argv[next(words)]
            overrides.pop(name[2:], None)  # given twice, the last one counts, also in its place
            overrides[name[2:]] = value
        known, unknown = self.parse_known_args(rest)
        if unknown:
            word = next((u for u in unknown if u.startswith("-")), unknown[0])
            if not word.startswith("-"):
                raise InputError(f"unexpected argument {word!r}: options are written --name value, lists [1,2,3]")
            hint = nearest(word.lstrip("-").partition("=")[0], [*(o[2:] for o in options if o.startswith("--")), *KEYS])
            raise InputError(f"unknown option {word}{hint.replace('mean ', 'mean --') or ' (--help lists them all)'}")
        return known, overrides


def _is_key(name: str) -> bool:
    """Dotted names, indexed ones and top-level keys are config overrides, right or wrong."""
    return "." in name or "[" in name or name in KEYS


def keys_help(own: set[str]) -> str:
    """Every config key with its type, default and documentation, but those that are a script's own options."""
    lines = [
        "config keys (--key VALUE or --key=VALUE; lists as [1,2,3], one entry as --key[0] VALUE, nothing as null):"
    ]
    for info in KEYS.values():
        if info.name not in own:
            kind = info.type_name + (f", {info.range_name}" if info.range_name else "")
            default = "null" if info.default is None else info.default
            lines += [f"  --{info.name}", f"        {info.doc}", f"        {kind} (default: {default})"]
    return "\n".join(lines) + "\n"


def boolean(text: str) -> bool:
    """argparse type of a true/false option (`type=bool` would read "False" as true)."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def positive(text: str) -> int:
    """argparse type of a count."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """argparse type of a seed."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def positive_or_auto(text: str) -> int | None:
    """argparse type of a count, or "auto" (None)."""
    return None if text == "auto" else positive(text)


def require(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError for options that a script can't do without."""
    absent = [f"--{name}" for name in names if getattr(options, name) is None]
    if absent:
        raise InputError(f"{' and '.join(absent)} must be given (--help explains)")


def alias(options: argparse.Namespace, overrides: dict[str, str], pairs: dict[str, str]) -> None:
    """Move short options into the overrides: {'eta': 'sample.eta'}; both forms at once are an error."""
    for short, dotted in pairs.items():
        value = getattr(options, short)
        if value is None:
            continue
        if dotted in overrides:
            raise InputError(f"--{short} and --{dotted} are the same option: give one of them")
        overrides[dotted] = value


def say(text: str) -> None:
    """One line for a person, from the main process, out of the way of what a script prints as its result."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result, from the main process."""
    if is_main_process():
        print(text, end="")

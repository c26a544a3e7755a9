"""Words for classes: the captions that training draws from, and the labels and prompts of a command line, checked.

Imports no torch: what can't be read is told before any work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from utils.constraints import check_guidance
from utils.errors import InputError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPTIONS = ("labels", "prompts", "prompt_file")
N_LISTED = 40  # valid names that an error shows
N_WRITTEN = 256  # conditions that a protocol lists


def spellings(name: str) -> list[str]:
    """How a caption may call a class: `7` and `seven`; `T-shirt/top` as `t-shirt` and `top`."""
    if name.isdigit() and int(name) < len(DIGITS) and name == str(int(name)):
        return [name, DIGITS[int(name)]]
    parts = [part.replace("_", " ").strip().casefold() for part in name.split("/")]
    return list(dict.fromkeys(part for part in parts if part)) or [name.casefold()]


def captions_of(name: str, templates: Sequence[str]) -> list[str]:
    """Every caption of a class: each template with each spelling."""
    return [template.replace("{}", word).casefold() for template in templates for word in spellings(name)]


def is_unicode(text: str) -> bool:
    """False for half of a pair of surrogates: bytes of a command line, or an escape in JSON, that mean no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def templates(config: DictConfig) -> list[str]:
    """data.captions, or the plain name of the class."""
    return list(config.data.captions or ["{}"])


@dataclass(frozen=True)
class Asked:
    """What a command line asks for: entry i belongs to sample i, a shorter list cycles; no entries: no condition."""

    kind: str  # of the network: none, class or text
    entries: tuple[int | str, ...] = ()  # classes as indices, or texts
    names: tuple[str, ...] = ()  # as they are shown

    def name(self, i: int) -> str:
        return self.names[i % len(self.names)] if self.names else ""

    def identity(self) -> dict[str, list[int | str]]:
        """The part of a protocol that says which conditions; nothing where there are none, a hash of very many."""
        if len(self.entries) <= N_WRITTEN:
            return {"conditions": list(self.entries)} if self.entries else {}
        return {"conditions": [hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()]}

    def describe(self) -> str:
        if not self.entries:
            return "" if self.kind == "none" else ", unconditional"
        shown = list(dict.fromkeys(self.names))
        return f", {'labels' if self.kind == 'class' else 'prompts'} {', '.join(shown[:4])}{', ...' * (len(shown) > 4)}"


def given(options: argparse.Namespace) -> list[str]:
    """Which of --labels, --prompts and --prompt_file are there. Raises InputError for more than one."""
    found = [name for name in OPTIONS if getattr(options, name) is not None]
    if len(found) > 1:
        raise InputError(f"--{found[0]} and --{found[1]}: give one of them")
    return found


def read_conditions(options: argparse.Namespace, config: DictConfig, keys: Collection[str]) -> Asked:
    """--labels, --prompts or --prompt_file, for the network of `config`; keys: dotted ones given for this call.

    Raises:
        InputError: an unknown class, an empty or unreadable prompt, an option that the network has no use for, or no
            condition for a network that can't do without.
    """
    found, kind = given(options), config.model.condition
    for scale in options.guidance_scales:
        check_guidance(config, scale)
    if kind == "none":
        if found:
            raise InputError(f"--{found[0]} needs a conditional network; this one has model.condition = none")
        return Asked(kind)
    if not found:
        if options.guidance_scales or "sample.guidance_scale" in keys:
            what = "--labels" if config.model.classes else "--prompts"
            raise InputError(f"--guidance_scale: there is nothing to guide towards without {what} (--help explains)")
        if config.train.condition_dropout == 0:
            what = "--labels all" if config.model.classes else '--prompts "..."'
            raise InputError(f"this network was trained without train.condition_dropout: it needs {what}")
        return Asked(kind)
    if found == ["labels"]:
        chosen = read_labels(options.labels, config)
        if kind == "class":
            return Asked(kind, tuple(chosen), tuple(config.model.classes[i] for i in chosen))
        texts = tuple(captions_of(config.model.classes[i], templates(config))[0] for i in chosen)
        return Asked(kind, texts, texts)
    if kind == "class":
        raise InputError(
            f"--{found[0]}: this network reads classes, not text: --labels {_listed(config.model.classes)}"
        )
    texts = options.prompts if found == ["prompts"] else _lines(options.prompt_file)
    for number, text in enumerate(texts, 1):
        _check_prompt(text, f"--{found[0]}, entry {number}", config)
    return Asked(kind, tuple(texts), tuple(texts))


def read_labels(words: Sequence[str], config: DictConfig) -> list[int]:
    """Names of classes, or their numbers, or `all` -> indices. Raises InputError for others; valid ones are listed."""
    classes = list(config.model.classes)
    if not classes:
        raise InputError("--labels: this network was trained on texts of its own, not on classes: use --prompts")
    if list(words) == ["all"] and "all" not in classes:
        return list(range(len(classes)))
    by_name = {name.casefold(): i for i, name in reversed(list(enumerate(classes)))}
    numbers = {str(i): i for i in range(len(classes))}
    found = []
    for word in words:
        i = by_name.get(word.casefold(), numbers.get(word))
        if i is None:
            raise InputError(f"--labels {word!r}: no such class; wanted all, or any of {_listed(classes)}")
        found.append(i)
    return found


def _check_prompt(text: str, where: str, config: DictConfig) -> None:
    if not text.strip():
        raise InputError(f"{where} is empty: wanted a text (leave the option out for unconditional images)")
    if not is_unicode(text):
        raise InputError(f"{where}, {text[:30]!r}: is not valid Unicode")
    if config.model.text_encoder is not None:
        return  # it knows more words than those of the training; the tokens are counted when it is there
    size, most = len(text.casefold().encode()), config.model.text_length - 1
    if size > most:
        raise InputError(f"{where}, {text[:30]!r}...: has {size} bytes, but the network reads at most {most}")
    known = [word for name in config.model.classes for word in captions_of(name, templates(config))]
    words = {word for caption in known for word in caption.split()}
    unknown = [word for word in text.casefold().split() if words and word not in words]
    if unknown:
        names = [word for name in config.model.classes for word in spellings(name)]
        raise InputError(
            f"{where}, {text!r}: the word {unknown[0]!r} was in no caption of the training; it knew the classes "
            f"{_listed(names)}, in captions such as {', '.join(map(repr, templates(config)[:6]))}"
        )


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {path} can't be read: {getattr(error, 'strerror', error)}") from None
    if not lines:
        raise InputError(f"--prompt_file {path} is empty: wanted one prompt a line")
    return lines


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:N_LISTED]) + (f", ... ({len(names)} in all)" if len(names) > N_LISTED else "")

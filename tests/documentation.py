"""What the documentation shows: commands, options and keys in running text, links, pictures. Reads only."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".sh"))
HEADS = {"accelerate", "python", "torchrun", "make", "sbatch", "pip", "fidelity", "git", "cd"}  # words that begin one
SHELLS = ("bash", "sh", "shell", "console")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Command:
    """A command line of a page; `words` without the variables before it and without its comment."""

    file: str
    line: int
    text: str
    words: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def is_synopsis(self) -> bool:
        """A pattern of a command, such as `--to a|b [--key value ...]`, rather than one to type."""
        return any(word.startswith("[-") or "|" in word or word == "..." for word in self.words)


@dataclass(frozen=True)
class Block:
    file: str
    line: int  # of its first line
    language: str
    lines: tuple[str, ...]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    """The fenced code blocks of a page."""
    found, inside, first, language = [], None, 0, ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, first, language = [], number + 1, line.strip()[3:].strip()
        else:
            found.append(Block(name_of(path), first, language, tuple(inside)))
            inside = None
    assert inside is None, f"{name_of(path)}: the code block at line {first} has no end"
    return found


def commands_of(block: Block) -> list[Command]:
    """Those of a block that a shell would read; behind `$ ` where the block shows output too."""
    lines = list(enumerate(block.lines, block.line))
    prompted = any(line.startswith("$ ") for _, line in lines)
    first = next((line for _, line in lines if line.strip() and not line.startswith("#")), "")
    if not prompted and block.language not in SHELLS and _head(first) not in HEADS:
        return []
    found, joined, start = [], "", 0
    for number, line in lines:
        if not joined and ((prompted and not line.startswith("$ ")) or not line.strip() or line.startswith("#")):
            continue
        joined, start = joined + line.removeprefix("$ ").strip(), start or number
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        found.append(command(block.file, start, joined))
        joined, start = "", 0
    return found


def command(file: str, line: int, text: str) -> Command:
    words = shlex.split(text, comments=True)
    while words and ASSIGNMENT.match(words[0]):
        del words[0]
    return Command(file, line, text, tuple(words))


def _head(line: str) -> str:
    return next((word for word in line.split() if not ASSIGNMENT.match(word)), "")


def commands() -> list[Command]:
    """Every command of the pages' blocks and of the recipes' comments; the same line on several pages once."""
    found = [command for page in PAGES for block in blocks(page) for command in commands_of(block)]
    found += [command for path in CONFIGS for command in _commented(path)]
    firsts: dict[tuple[str, ...], Command] = {}
    for command in found:
        firsts.setdefault(command.words, command)
    return list(firsts.values())


def _commented(path: Path) -> list[Command]:
    """Commands in the comments of a configuration or launch file: from their first word to the line's end."""
    found, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        match = re.match(r"#.*?\b((?:accelerate launch|sbatch|python \w+_ddpm\.py) .*)", line)
        if match:
            text, after = match[1], number
            while text.endswith("\\"):
                text, after = text[:-1] + lines[after].lstrip("# "), after + 1
            found.append(command(name_of(path), number, text.partition("  ")[0] if "   " in text else text))
    return found


def inline_code(path: Path) -> list[tuple[str, str]]:
    """(place, text) of `...` in running text, outside blocks."""
    found, inside = [], False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            found += [(f"{name_of(path)}:{number}", text) for text in re.findall(r"`([^`]+)`", line)]
    return found


def links(path: Path) -> list[tuple[str, str]]:
    """(place, target) of every link and picture of a page, Markdown's and HTML's, outside code."""
    found, inside, text = [], False, path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            line = re.sub(r"`[^`]*`", lambda code: "`" * len(code[0]), line)
            targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", line)
            targets += re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", line)
            targets += re.findall(r"^\[[^\]]+\]:\s+(\S+)", line)
            targets += re.findall(r"<(https?://[^>\s]+)>", line)
            found += [(f"{name_of(path)}:{number}", target) for target in targets]
    return found


def anchors(path: Path) -> set[str]:
    """The #names that a page's headings get, as GitHub makes them, and those given in HTML."""
    found, counts, inside = set(), {}, False
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside and (match := re.match(r"#{1,6}\s+(.*?)\s*#*$", line)):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            name = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            n = counts[name] = counts.get(name, -1) + 1
            found.add(f"{name}-{n}" if n else name)
        found |= set(re.findall(r"(?:id|name)=\"([^\"]+)\"", line)) if not inside else set()
    return found

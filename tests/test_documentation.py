"""No documentation can rot: its commands run, its options and keys exist, its links and pictures resolve.

Commands are all lines that a shell would read in the fenced blocks of README.md and docs/*.md, and those in the
comments of configs/. Each is first read by the real parser as it stands, and then run at reduced size, for which
tests/doc_reductions.py has the tables and says how to extend them; a new page is found by itself.
"""

import ast
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import ROOT
from doc_place import Place, check_synopsis, known_options, options_in, perform, rule_of
from doc_reductions import FOLDERS, INSTEAD, LARGEST, RULES, RUNS, trained_runs
from documentation import CONFIGS, PAGES, Command, anchors, blocks, commands, inline_code, links, name_of

from utils import classifier, config, results
from utils.logging import RunLog

COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_command_runs(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_of(command)
    if rule and rule.how == "outside":
        return
    if command.is_synopsis:
        check_synopsis(command.words)
        return
    monkeypatch.setattr(classifier, "N_STEPS", 2)
    monkeypatch.setattr(RunLog, "_draw", lambda self: None)  # plots take longer than the rest, and have their own tests
    for name in ("draw_sweep", "draw_guidance", "draw_terms"):
        monkeypatch.setattr(results, name, lambda *_: None)
    place = Place(tmp_path, monkeypatch)
    perform(command, place, rule)


FILE = re.compile(r"(?<![\w/.-])(?:\w+_ddpm\.py|(?:benchmarks|tests|utils|diffusions|models|configs)/[\w/.-]*\.\w+)")
KEY = re.compile(r"(?<![\w./-])(?:--)?((?:data|model|diffusion|train|sample|evaluate)\.[a-z_]+)(?![\w./])")
NO_KEYS = {"train.log"}  # a file
NO_KEYS |= {"data.dataset", "model.ch", "model.ema_rate", "model.var_type"}  # keys of the DDIM authors' YAML
OTHERS_OPTIONS = {"--requeue", "--wait", "--nodes"}  # of Slurm
OTHERS_OPTIONS |= {
    "--use_pretrained",
    "--center_crop",
    "--use_ema",
    "--model_config_name_or_path",
}  # DDIM authors, diffusers
PATTERNS = {"--section.key", "configs/NAME.yaml"}  # of which the reader fills in a part


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_options_in_the_text_exist(page: Path) -> None:
    """Where a table translates, its first column may hold other programs' options; their keys go into NO_KEYS."""
    sections, wrong = {name.partition(".")[0] for name in config.KEYS}, []
    lines = page.read_text().splitlines()
    for place, text in inline_code(page):
        wrong += [(place, key) for key in KEY.findall(text) if key not in config.KEYS and key not in NO_KEYS]
        first = lines[int(place.rpartition(":")[2]) - 1].split("|")[1:2]
        for option in options_in(text):
            key = option.removeprefix("--")
            ours = option in known_options() or key in config.KEYS or (key[-1] == "." and key[:-1] in sections)
            theirs = option in OTHERS_OPTIONS or any(option in cell for cell in first)
            if option.startswith("--") and not (ours or theirs or option in PATTERNS):
                wrong.append((place, option))
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_name_what_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for place, text in inline_code(page):
        if match := re.match(r"make ([a-z][\w-]*)", text):
            assert match[1] in targets, (place, text)
        if match := re.match(r"python -m (utils[\w.]*)", text):
            stem = ROOT / match[1].replace(".", "/")
            assert stem.with_suffix(".py").exists() or (stem / "__main__.py").exists(), (place, text)
        for file in FILE.findall(text):
            assert file in PATTERNS or (ROOT / file).exists(), (place, file)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_blocks_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse("\n".join(block.lines))


def test_no_reduction_is_stale() -> None:
    texts = [" ".join(command.words) for command in COMMANDS]
    words = {word for command in COMMANDS for word in command.words}
    stale = [rule.pattern for rule in RULES if not any(rule.matches(command) for command in COMMANDS)]
    stale += [name for name in {**RUNS, **LARGEST, **INSTEAD} if name not in words]
    roots = {
        config.merge((path.stem, config.read_yaml(path))).data.root
        for path in CONFIGS
        if path.parent.name == "configs" and path.suffix == ".yaml"
    }
    stale += [name for name in FOLDERS if name not in words | roots]
    shown = {
        text
        for page in PAGES
        for _, code in inline_code(page)
        for text in (*options_in(code), *KEY.findall(code), *FILE.findall(code))
    }
    stale += [name for name in {*OTHERS_OPTIONS, *NO_KEYS, *PATTERNS} if name not in shown]
    stale += [name for name in RUNS if name in trained_runs()]
    assert not stale and len(texts) > 50


# --- links and pictures ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for place, target in links(page):
        address = urlsplit(target)
        if address.scheme or address.netloc:  # looked at only: tests have no network
            good = address.scheme in ("http", "https", "mailto") and (
                re.fullmatch(r"[\w.:-]+\.\w+", address.netloc) or address.path
            )
        else:
            file = (page.parent / address.path).resolve() if address.path else page
            good = file.is_relative_to(ROOT) and file.exists()
            if good and address.fragment:
                good = file.suffix == ".md" and address.fragment in anchors(file)
        wrong += [] if good else [(place, target)]
    assert not wrong


def test_every_picture_is_shown_somewhere() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for _, target in links(page) if "://" not in target}
    assert [name_of(file) for file in sorted((ROOT / "assets").iterdir()) if file not in shown] == []


def test_every_page_is_linked() -> None:
    found = {(page.parent / urlsplit(target).path).resolve() for page in PAGES for _, target in links(page)}
    assert [name_of(page) for page in PAGES if page.name != "README.md" and page not in found] == []

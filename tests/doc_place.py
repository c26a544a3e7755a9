"""A folder in which the documentation's commands find what they name, and what runs them in this process."""

import ast
import contextlib
import functools
import io
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from doc_reductions import FOLDERS, RULES, RUNS, grouped, reduced, tiny_keys, trained_runs
from documentation import Command, command
from fake_data import FAKES
from in_process import call
from packaging.requirements import Requirement
from tiny_run import tiny_run
from torch.distributed.run import get_args_parser

from utils import config
from utils.data import load_splits
from utils.images import write_png

KNOWN_RUNS = {**trained_runs(), **RUNS}
SCRIPTS = sorted(path.name for path in ROOT.glob("*_ddpm.py"))
OWN_PLACES = re.compile(r"(runs|out)/")  # in which commands write


def words_of(command: Command) -> tuple[str, list[str]]:
    """(the script, its words) of a command that runs one of the *_ddpm.py; the launcher's options are read here."""
    words = list(command.words)
    script = next((word for word in words if word in SCRIPTS), "")
    at = words.index(script) if script else 0
    before, own = words[:at], words[at + 1 :]
    if words[:2] == ["accelerate", "launch"]:
        found = launch_command_parser().parse_args([*before[2:], script])
        if found.config_file:
            load_config_from_file(str(ROOT / found.config_file))
    elif words[0] == "torchrun":
        get_args_parser().parse_args([*before[1:], script])
    elif words[0] == "sbatch":
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
        return "train_ddpm.py", words[2:]
    elif before != ["python"]:
        script = ""
    return script, own


@functools.cache
def main_of(script: str):
    return __import__(script.removesuffix(".py")).main


def parsed(script: str, words: list[str]) -> list[str]:
    """What a parser is to read: everything, but the tiny weights where a recipe says what the real ones are like."""
    if script == "convert_ddpm.py" and "-c" in words:
        at = words.index("--weights")
        return words[:at] + words[at + 2 :]
    return words


def rule_of(command: Command):
    return next((rule for rule in RULES if rule.matches(command)), None)


class Place:
    """A folder in which a command finds what it names: configs/, data in the real formats, runs, images."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / "docs").mkdir()
        (folder / "out").mkdir()

    def furnish(self, words: list[str]) -> None:
        options = {option: values for option, *values in grouped(words)}
        for option in ("--reference", "--source", "--make_reference", "--data.name"):
            for value in options.get(option, []):
                self.data(value.partition(":")[0])
        for word in words:
            if word.startswith("configs/") and word.endswith(".yaml") and "-e" in words:
                cfg = config.merge((word, config.read_yaml(ROOT / word)))
                self.data(cfg.data.name, cfg.data.root)
            if word in FOLDERS:
                self.images(word)
        for value in options.get("--images", []):
            self.images(value, deep=False)
        weights = options.get("--weights", [])
        resumed = options.get("-e", []) if "-r" in words else []
        plain = [word for word in words if word in KNOWN_RUNS] if words[:1] and not words[0].startswith("-") else []
        for name in dict.fromkeys([*weights, *resumed, *plain]):
            self.run(name, bound="bpd" in words, ddim="ddim" in options.get("--to", []), resumed=name in resumed)

    def data(self, name: str, root: str = "data") -> None:
        place = self.folder / root
        if name == "image_folder" and root in FOLDERS:
            self.images(root)
        elif name in FAKES and name != "image_folder" and not (self.folder / f".{name}").exists():
            place.mkdir(parents=True, exist_ok=True)
            (self.folder / f".{name}").touch()
            FAKES[name](place, self.patch)

    def images(self, name: str, deep: bool = True) -> None:
        """Sixteen images, in the folders of two classes, with texts; packed where the name says so."""
        place = self.folder / name.removesuffix(".zip")
        for i in range(16):
            file = place / ("ab"[i % 2] if deep else "") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = 64 if deep else 8
            write_png(file, torch.randint(0, 256, (3 if deep else 1, size, size), dtype=torch.uint8))
        if deep:
            lines = [f'{{"file_name": "{"ab"[i % 2]}/{i}.png", "text": "bird {i}"}}\n' for i in range(16)]
            (place / "metadata.jsonl").write_text("".join(lines))
        if name.endswith(".zip"):
            shutil.make_archive(str(place), "zip", place)

    def run(self, name: str, bound: bool, ddim: bool, resumed: bool) -> None:
        """The run folder of that name, if it is known.

        bound: with few timesteps, each of which is a term; ddim: with the norms that the DDIM authors' code has.
        """
        if (self.folder / name).exists() or (OWN_PLACES.match(name) and name not in KNOWN_RUNS):
            return
        recipe, overrides = KNOWN_RUNS[name]
        layers = [(recipe, config.read_yaml(ROOT / recipe)), ("overrides", overrides)]
        cfg = config.merge(*layers)
        keys = tiny_keys(cfg)
        keys |= {"diffusion.total_steps": "20"} if bound else {}
        keys |= {"model.dim": "32", "model.norm_groups": "32"} if ddim else {}
        if cfg.model.condition != "none" or resumed:
            self.data(cfg.data.name, cfg.data.root)
        if cfg.model.condition != "none":
            options = config.merge(*layers, ("place", {"data.root": str(self.folder / cfg.data.root)})).data
            keys["model.classes"] = list(load_splits(options)["train"].classes)
        tiny_run(self.folder / name, config.merge(*layers, ("tiny", keys)))


def perform(command: Command, place: Place, rule=None) -> None:
    words = list(command.words)
    script, own = words_of(command)
    if rule and rule.how == "refused":
        done = call(main_of(script), *own, cwd=place.folder, status=2)
        assert done.stderr.strip() in (ROOT / command.file).read_text().splitlines(), done.stderr
    elif script:
        if rule and rule.before:
            perform(command_of(rule.before), place)
        place.furnish(own)
        if "--verify" not in own and "--make_reference" not in own:
            call(main_of(script), *parsed(script, own), "--print_config", cwd=place.folder)
        runnable = script in ("train_ddpm.py", "sample_ddpm.py", "evaluate_ddpm.py", "convert_ddpm.py")
        if runnable and words[0] != "sbatch" and not (rule and rule.how == "parse"):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place.folder)
                small = reduced(script, own)
            call(main_of(script), *small, cwd=place.folder)
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            assert word.startswith("-") or word.endswith(".txt") or Requirement(word)
    elif words[:2] == ["python", "-m"] and words[2].startswith("utils."):
        place.furnish(words[3:])
        place.data("celeba") if "celeba" in words else None
        own = words[3 : words.index(">")] if ">" in words else words[3:]
        module(words[2], own, place.folder)
    elif words[:3] == [".venv/bin/python", "-m", "pytest"]:
        for file in words[3:]:
            assert not file.endswith(".py") or (ROOT / file).exists(), file
    elif words[0] == "python" and words[1].endswith(".py"):
        ast.parse((ROOT / words[1]).read_text())
        check_options(words[1:], options_in((ROOT / words[1]).read_text()))
    else:
        assert words[0] in ("git", "cd", "source"), (
            f"{command.place}: what is {words[0]!r}? Say so in tests/doc_reductions.py"
        )


def command_of(text: str) -> Command:
    return command("tests/doc_reductions.py", 0, text)


def module(name: str, words: list[str], cwd: Path) -> None:
    """`python -m name words` in this process; its status must be 0."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it is imported already
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert not end.value.code, f"{name} {words}: status {end.value.code}\n{err.getvalue()}"


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", text))


@functools.cache
def help_of(script: str) -> str:
    return call(main_of(script), "--help", cwd=ROOT).stdout


@functools.cache
def known_options() -> set[str]:
    """Of every script, module and benchmark of the project, and of the launchers."""
    launchers = {*launch_command_parser()._option_string_actions, *get_args_parser()._option_string_actions}
    sources = [*(ROOT / "utils").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {option for path in sources for option in re.findall(r"\"(--?[a-z][\w-]*)\"", path.read_text())}
    return own | launchers | set().union(*(options_in(help_of(script)) for script in SCRIPTS))


def check_options(words, known: set[str]) -> None:
    for word in words:
        name = word.strip("[]|.,;").partition("=")[0].partition("[")[0]
        if re.match(r"--?[a-z]", name) and name not in ("--key", "--key.sub", "--help"):
            assert name in known, f"unknown option {name}"


def check_synopsis(words) -> None:
    script = next((word for word in words if word in SCRIPTS), None)
    check_options(words, known_options() if not script else options_in(help_of(script)) | known_options())

"""The diffs of docs/contributing.md apply to this tree, and what they add works through the command lines and tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

PAGE = (ROOT / "docs/contributing.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ADDED = {"sampler": "dpm-2m", "data": "shapes", "model": "resnet"}
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "out", "assets", "*.pyc")


def ignore(folder: str, names: list[str]) -> set[str]:
    """What is no part of the sources, at the top; utils/data is."""
    return LEFT_OUT(folder, names) if Path(folder) == ROOT else {name for name in names if name == "__pycache__"}


def apply(diff: str, tree: Path) -> None:
    """With git where there is one, else with patch; neither may guess where a hunk belongs."""
    command = ["git", "apply", "-"] if shutil.which("git") else ["patch", "--strip=1", "--fuzz=0"]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}  # the copy is no repository, nor part of one
    done = subprocess.run(command, cwd=tree, input=diff, text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources with every diff of the page applied."""
    copy = tmp_path_factory.mktemp("contributing") / "tree"
    shutil.copytree(ROOT, copy, ignore=ignore)
    for diff in DIFFS:
        apply(diff, copy)
    return copy


def run(tree: Path, *args: object, status: int = 0) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, args)]
    done = subprocess.run(words, cwd=tree, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_the_diffs_are_short():
    assert len(DIFFS) == 6
    assert all(len(diff.splitlines()) < 40 for diff in DIFFS)


def test_help_lists_what_was_added(tree):
    text = run(tree, "train_ddpm.py", "--help").stdout
    for section, key in (("sample", "sampler"), ("data", "name"), ("model", "name")):
        entry = text[text.index(f"--{section}.{key}\n") :].splitlines()[2]
        assert ADDED["sampler" if section == "sample" else section] in entry
    assert ADDED["sampler"] not in run(ROOT, "train_ddpm.py", "--help").stdout


def test_what_was_added_trains_and_samples(tree, tmp_path):
    words = ["--data.name", "shapes", "--model.name", "resnet", "--sample.sampler", "dpm-2m", "--sample.skip_steps", 4]
    words += ["--train.n_steps", 2, "--train.batch_size", 4, "--train.n_valid", 4, "--train.n_samples", 4]
    done = run(tree, "train_ddpm.py", "-e", tmp_path / "run", *words, "--train.log_with", "none")
    assert "shapes:train, 900 images" in done.stderr + done.stdout and "resnet, " in done.stderr + done.stdout
    assert (tmp_path / "run/samples/step000002.png").stat().st_size > 0
    words = ["--weights", tmp_path / "run", "--n_samples", 2, "--save_dir", tmp_path / "out", "--sampler", "dpm_2m"]
    assert "dpm-2m, trailing 4 steps" in run(tree, "sample_ddpm.py", *words).stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000.png", "000001.png"]
    words = ["--data.name", "shapes", "--model.name", "resnet", "--model.condition", "class"]
    assert "the network resnet has none" in run(tree, "train_ddpm.py", *words, status=2).stderr


def test_the_parametrised_tests_take_the_sampler(tree):
    """Those over SAMPLERS, the rows of the docs, and that the schema's names are the registries'."""
    (tree / "docs/configuration.md").write_text(run(tree, "-m", "utils.config_reference").stdout)
    wanted = "(dpm-2m and (gaussian or convergence or oracle)) or known or documentation or literals"
    wanted += " or is_current or data_page"
    tests = ["tests/test_samplers.py", "tests/test_config.py", "tests/test_config_reference.py"]
    out = run(tree, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *tests, "-k", wanted).stdout
    for name in ("test_moments_for_gaussian_data[dpm-2m-0.0-quad-5]", "test_order_of_convergence[dpm-2m]"):
        assert re.search(rf"{re.escape(name)} PASSED", out), out[-2000:]
    for name in ("test_literals_equal_the_registries", "test_the_page_is_current", "every_sampler_and_skip_type"):
        assert f"{name} PASSED" in out


@pytest.mark.parametrize("number", range(len(DIFFS)))
def test_every_added_line_is_formatted(tree, number):
    """As make lint wants it, in the files that the diff touches."""
    files = [name for name in re.findall(r"^\+\+\+ b/(.*)$", DIFFS[number], re.MULTILINE) if name.endswith(".py")]
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed beside this Python")
    for action in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *action, *files], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

"""docs/configuration.md says what the schema says."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from utils import config_reference
from utils.config import KEYS, merge
from utils.errors import InputError


def test_the_page_is_current():
    command = [sys.executable, "-m", "utils.config_reference", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_not_current_is_noticed(tmp_path, monkeypatch, capsys):
    old = tmp_path / "configuration.md"
    old.write_text(config_reference.page().replace("`train.lr` | float", "`train.lr` | int"))
    monkeypatch.setattr(config_reference, "PAGE", old)
    assert config_reference.main(["--check"]) == 1
    assert "python -m utils.config_reference >" in capsys.readouterr().err
    old.write_text(config_reference.page())
    assert config_reference.main(["--check"]) == 0


def test_wrong_options_are_input_errors():
    with pytest.raises(InputError, match="--chek"):
        config_reference.main(["--chek"])


def test_every_key_has_a_row_with_its_choices_and_a_default_that_can_be_read_back():
    rows = re.findall(
        r"^\| `([\w.]+)`(?: \*)? \| (.*?) \| `(.*?)` \| (.*?) \| (.*?) \|$", config_reference.page(), re.M
    )
    assert [name for name, *_ in rows] == list(KEYS)
    cfg = merge(("the page", {name: default for name, _, default, *_ in rows}))
    for name, kind, _, _, doc in rows:
        assert doc == KEYS[name].doc
        assert all(f"`{choice}`" in kind for choice in KEYS[name].choices)
        value = OmegaConf.select(cfg, name)
        assert (list(value) if OmegaConf.is_list(value) else value) == KEYS[name].default


def test_every_data_set_has_a_row_in_the_data_page():
    rows = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("| `")]
    first = " ".join(row.split("|")[1] for row in rows)
    assert [name for name in KEYS["data.name"].choices if f"`{name}`" not in first] == []

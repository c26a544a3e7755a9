"""The scripts called within the test's own process, which spares the imports; and a network that is not trained."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import save_file

from models import build_model
from utils import config
from utils.errors import run_script

KEYS = {
    "data.image_size": 8,
    "data.channels": 1,
    "model.dim": 8,
    "model.dim_mults": [1, 2],
    "model.norm_groups": 4,
    "model.num_res_blocks": 1,
    "model.attn_resolutions": [4],
    "diffusion.total_steps": 20,
    "diffusion.beta_schedule": "cosine",
    "diffusion.objective": "pred_v",
    "sample.sampler": "fixed-small",
    "sample.skip_type": "trailing",
    "sample.mixed_precision": "no",
}

# Accelerate keeps its state in the process; a script expects a fresh one.
TWO = """
import runpy, sys
from accelerate.state import AcceleratorState
statuses = []
for line in open(sys.argv[1]).read().splitlines():
    script, *sys.argv[1:] = line.split("\\t")
    sys.argv[0] = script
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        statuses.append(end.code)
    AcceleratorState._reset_state(reset_partial_state=True)
sys.exit(max(statuses))
"""


def random_weights(folder: Path, **changes: object) -> Path:
    """A .safetensors file of a tiny network that does something, with its config.yaml beside it."""
    cfg = config.merge(("test", {**KEYS, **{name.replace("__", "."): value for name, value in changes.items()}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
        weights = {name: value + 0.1 * torch.randn_like(value) for name, value in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "net.safetensors")
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    return folder / "net.safetensors"


class Shell:
    """Calls of a script's main in a folder, as its command line would be."""

    def __init__(self, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.cwd, self.monkeypatch, self.capsys = cwd, monkeypatch, capsys
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def __call__(self, main: Callable, *args: object, status: int = 0) -> SimpleNamespace:
        """Run to the end and check the exit status; returns stdout and stderr."""
        self.monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        self.capsys.readouterr()
        deterministic = torch.are_deterministic_algorithms_enabled()
        with pytest.raises(SystemExit) as end:
            run_script(main)
        torch.use_deterministic_algorithms(deterministic)
        out, err = self.capsys.readouterr()
        assert end.value.code == status, f"status {end.value.code}\n{out}\n{err}"
        return SimpleNamespace(stdout=out, stderr=err)

    def refused(self, main: Callable, *args: object, says: list[str]) -> None:
        """Status 2, one line on stderr that says what it must, and nothing written."""
        before = {path: path.is_file() and path.read_bytes() for path in self.cwd.rglob("*")}
        done = self(main, *args, status=2)
        assert done.stdout == "" and done.stderr.startswith(f"{main.__module__}.py: error: "), done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
        missing = [part for part in says if part not in done.stderr]
        assert not missing, f"{done.stderr!r} does not say {missing}"
        assert {path: path.is_file() and path.read_bytes() for path in self.cwd.rglob("*")} == before


def on_two_processes(cwd: Path, *calls: list[object]) -> None:
    """Each call is [script, argument, ...]; one launch for all of them, because starting is what takes long."""
    lines = ["\t".join([str(ROOT / script), *map(str, args)]) for script, *args in calls]
    (cwd / "calls.txt").write_text("\n".join(lines))
    (cwd / "calls.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{TWO}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", cwd / "calls.py"]
    done = subprocess.run(
        [*launch, cwd / "calls.txt"], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]

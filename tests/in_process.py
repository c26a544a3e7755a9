"""The scripts called within the test's own process or forks of it, which spares the imports; and untrained networks."""

import faulthandler
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT, environment
from safetensors.torch import save_file

from models import build_model
from utils import config
from utils.errors import run_script

KEYS = {
    "data.image_size": 8,
    "data.channels": 1,
    "data.valid_fraction": 0.9,
    "model.dim": 8,
    "model.dim_mults": [1, 2],
    "model.norm_groups": 4,
    "model.num_res_blocks": 1,
    "model.attn_resolutions": [4],
    "diffusion.total_steps": 20,
    "diffusion.beta_schedule": "cosine",
    "diffusion.objective": "pred_v",
    "sample.sampler": "ddim",
    "sample.skip_type": "trailing",
    "sample.mixed_precision": "no",
}

# Accelerate keeps its state in the process, and a script expects a fresh one; the process group is started once.
DRIVER = """
import runpy, sys
sys.path.insert(0, {root!r})
import torch
from accelerate.state import AcceleratorState
destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *args: None
for line in open(sys.argv[1]).read().splitlines():
    sys.argv[:] = line.split("\\t")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    AcceleratorState._reset_state(reset_partial_state=True)
destroy()
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


def call(main: Callable, *args: object, cwd: Path, status: int = 0) -> SimpleNamespace:
    """A script's main in a folder, as its command line would run it; checks the exit status."""
    held = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier call may have had another precision
    out, err = io.StringIO(), io.StringIO()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            run_script(main)
    torch.use_deterministic_algorithms(deterministic)
    for state, before in held:  # for who holds an Accelerator from before
        if before:
            state._shared_state.clear()
            state._shared_state.update(before)
    done = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    assert end.value.code == status, f"status {end.value.code}\n{done.stdout}\n{done.stderr}"
    return done


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(main: Callable, *args: object, cwd: Path, says: list[str]) -> None:
    """Status 2, one line on stderr that says what it must, and nothing changed."""
    before = contents(cwd)
    done = call(main, *args, cwd=cwd, status=2)
    assert done.stdout == "" and done.stderr.startswith(f"{main.__module__}.py: error: "), done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    missing = [part for part in says if part not in done.stderr]
    assert not missing, f"{done.stderr!r} does not say {missing}"
    assert contents(cwd) == before


def fork(main: Callable, args: list[object], cwd: Path, log: Path, prepare: Callable, **variables: object) -> int:
    """Start a script's main in a fork of this process that first calls prepare(); returns its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 (until the process ends)
        os.dup2(sys.stderr.fileno(), 2)  # what C libraries say when they end the process
        faulthandler.enable(sys.stderr)
        os.chdir(cwd)
        os.environ.update({name: str(value) for name, value in variables.items()}, ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)
        sys.argv = [f"{main.__module__}.py", *map(str, args)]
        prepare()
        run_script(main)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_of(pid: int, seconds: float = 300) -> int:
    """Its exit status; one that goes on for longer than that is killed."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} did not end within {seconds:g} s")
        time.sleep(0.01)


def forked(
    main: Callable, *args: object, cwd: Path, processes: int = 1, prepare: Callable = lambda: None, status: int = 0
) -> None:
    """A script's main in forks of this process that first call prepare(); checks the exit status of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    logs = [cwd / f"rank{rank}.log" for rank in range(processes)]
    pids = [fork(main, args, cwd, log, prepare, RANK=r, LOCAL_RANK=r, **launch) for r, log in enumerate(logs)]
    try:
        ends = [end_of(pid) for pid in pids]
    except TimeoutError:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    assert ends == [status] * processes, "\n".join([str(ends), *(log.read_text()[-2000:] for log in logs)])


def on_two_processes(cwd: Path, *calls: list[object]) -> None:
    """Each call is [script, argument, ...]; one launch for all of them, because starting is what takes long."""
    lines = ["\t".join([str(ROOT / script), *map(str, args)]) for script, *args in calls]
    with tempfile.TemporaryDirectory() as place:
        driver, listed = Path(place, "calls.py"), Path(place, "calls.txt")
        driver.write_text(DRIVER.format(root=str(ROOT)))
        listed.write_text("\n".join(lines))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", driver, listed]
        done = subprocess.run(launch, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]

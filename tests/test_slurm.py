"""configs/launch/slurm.sh, with a srun and a scontrol of our own in place of a cluster's: saved, requeued, gone on."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment

from utils import checkpoint

SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
ranks = [{{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}} for i in range(2)]
tasks = [subprocess.Popen(words, env=os.environ | rank) for rank in ranks]
open("{place}/tasks.new", "w").write(" ".join(str(task.pid) for task in tasks))
os.rename("{place}/tasks.new", "{place}/tasks")
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> {place}/asked; fi
"""


def job_id() -> str:
    """One whose port, as the script computes it, is free."""
    while True:
        port = random.randrange(10000, 30000)
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return str(port - 10000)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one node."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable, place=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    return environment() | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": job_id(),
        "SLURM_JOB_NODELIST": "node[1]", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip


def submit(run: Path, n_steps: int, env: dict[str, str]) -> subprocess.Popen:
    args = ["-e", run, *TINY, "--train.n_steps", n_steps, "--train.save_every", 100000, "--train.sample_every", 100000]
    command = ["bash", ROOT / "configs/launch/slurm.sh", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_steps(job: subprocess.Popen, metrics: Path) -> None:
    deadline = time.monotonic() + 120
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.05)
    assert job.poll() is None, job.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_preempted_saves_requeues_itself_and_goes_on(
    tmp_path: Path, cluster: dict[str, str], number: signal.Signals
) -> None:
    requeued = f"requeue {cluster['SLURM_JOB_ID']}\n"
    job = submit(tmp_path / "run", 100000, cluster)
    try:
        wait_for_steps(job, tmp_path / "run/metrics.jsonl")
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), number)
        assert job.wait(90) == 0, job.stderr.read()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "asked").read_text() == requeued
    (saved,) = checkpoint.published(tmp_path / "run")
    step = checkpoint.step_of(saved)
    assert step % 10 == 0 and f"stopped     by {number.name}" in (tmp_path / "run/train.log").read_text()

    job = submit(tmp_path / "run", step + 5, cluster)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0 and f"from {saved.name} to {step + 5}" in said, said
    assert (tmp_path / "asked").read_text() == requeued  # finished: nothing more to do

"""What training and sampling cost against image size, batch, sampling steps, number of images and processes.

    python benchmarks/scaling.py [--out runs/bench]        writes scaling.json, scaling.md and scaling.png

One small network (dim 32, multiples 1 2 2) at several sizes; two processes (gloo on a CPU) run the real train_ddpm.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusions import build_process, generate
from diffusions.pixels import to_unit
from models import build_model
from models.flops import forward_flops
from utils import config, precision

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "dim": 32,
    "dim_mults": [1, 2, 2],
    "attn_resolutions": [],
    "num_res_blocks": 1,
    "n_heads": 1,
    "norm_groups": 8,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE, TOGETHER, APART = "1", "2", "2 apart"
DTYPE = precision.DTYPES[precision.mixed_precision("auto")]


def network(size: int) -> torch.nn.Module:
    net = build_model(SimpleNamespace(name="unet", dropout=0.0, **OPTIONS), size, 1).to(DEVICE)
    return net.to(memory_format=torch.channels_last)


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """That `run` takes: the median, after one that warms up."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found)


def training(size: int, batch: int) -> float:
    """Seconds of one optimizer update: network, loss, gradient and AdamW."""
    net, process = network(size).train(), build_process(config.merge().diffusion)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    images = torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8, device=DEVICE)
    t, eps = torch.randint(0, 1000, (batch,), device=DEVICE), torch.randn(batch, 1, size, size, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE is not None):
            loss = process.loss(net, to_unit(images).contiguous(memory_format=torch.channels_last), t, eps).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds(step)


def sampling(steps: int, n: int, micro_batch: int = 32) -> float:
    """Seconds to make n images of 16 pixels by ddim."""
    net, process = network(16).eval().requires_grad_(False), build_process(config.merge().diffusion)
    options = SimpleNamespace(sampler="ddim", skip_type="uniform", skip_steps=steps, eta=0.0, clip_denoised=True)
    return seconds(lambda: list(generate(net, process, options, range(n), 0, micro_batch, dtype=DTYPE)), 3)


def processes(how: str, batch: int = 128) -> float:
    """Images per second of train_ddpm.py: of one process, of two with one global batch, and of two that know nothing of
    each other with half of it each: two without gloo. A CPU's cores are divided among them."""
    environment, copies = dict(os.environ), 2 if how == APART else 1
    if DEVICE.type == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads() // copies or 1)}
    launcher = [sys.executable]
    if how == TOGETHER:
        environment["OMP_NUM_THREADS"] = "1"  # as torchrun itself would say; train_ddpm.py divides the cores
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "train_ddpm.py"), "--train.batch_size", str(batch // copies)]
    command += ["--train.n_steps", "60", "--train.log_every", "10", "--train.n_samples", "1"]
    command += [f"--train.{kind}_every=1000" for kind in ("sample", "valid", "save")]
    with tempfile.TemporaryDirectory() as place, ExitStack() as files:
        runs = [Path(place, str(i)) for i in range(copies)]
        logs = [files.enter_context(open(f"{run}.log", "w+")) for run in runs]
        own = [environment | ({"CUDA_VISIBLE_DEVICES": str(i)} if how == APART else {}) for i in range(copies)]
        started = [subprocess.Popen([*command, "-e", run], env=e, stderr=log) for run, e, log in zip(runs, own, logs)]
        for process, log in zip(started, logs):
            if process.wait():
                log.seek(0)
                raise SystemExit(f"{how}: training failed; its log ends:\n{log.read()[-3000:]}")
        return sum(rate(run) for run in runs)


def rate(run: Path) -> float:
    """Images per second between the log lines of a run, the first apart."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median([row["images_per_second"] for row in rows if "images_per_second" in row][1:])


def draw(found: dict[str, dict], path: Path) -> None:
    """A curve for each question, and bars for the one about processes."""
    figure = Figure(figsize=(16, 3.2))
    for axis, (name, values) in zip(figure.subplots(1, len(found)), found.items()):
        if name.startswith("processes"):
            axis.bar(list(values), list(values.values()))
        else:
            axis.loglog(list(values), list(values.values()), "o-")
            axis.set_xticks(list(values), [f"{value:g}" for value in values])
            axis.set_yticks(list(values.values()), [f"{value:.3g}" for value in values.values()])
            axis.minorticks_off()
        what, unit = name.split(": ")
        axis.set_title(what, fontsize=9)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    ways = [ALONE, TOGETHER, APART] if DEVICE.type == "cpu" or torch.cuda.device_count() > 1 else [ALONE]
    questions = {
        "image size [pixels], batch 32: ms per update": ((8, 16, 32, 64), lambda size: 1e3 * training(size, 32)),
        "batch, 16 pixels: ms per update": ((1, 8, 32, 128, 512), lambda batch: 1e3 * training(16, batch)),
        "ddim steps, 32 images: s": ((5, 10, 20, 50), lambda steps: sampling(steps, 32)),
        "images, 10 ddim steps: s": ((8, 32, 128, 512), lambda n: sampling(10, n)),
        "processes, digits, batch 128: images/s": (ways, processes),
    }
    found = {
        name: {value: measure(value) for value in tqdm(values, name)} for name, (values, measure) in questions.items()
    }
    flops = {s: forward_flops(network(s)) / 1e9 for s in (8, 16, 32, 64)}
    lines = ["| against | values |", "|---|---|"]
    for name, values in found.items():
        lines.append(f"| {name} | " + ", ".join(f"{x}: {y:.3g}" for x, y in values.items()) + " |")
    lines.append(
        "| GFLOP of a forward pass, by image size | " + ", ".join(f"{s}: {f:.3g}" for s, f in flops.items()) + " |"
    )
    (out / "scaling.md").write_text("\n".join(lines) + "\n")
    (out / "scaling.json").write_text(json.dumps(found | {"gflop": flops}, indent=1) + "\n")
    print("\n".join(lines))
    draw(found, out / "scaling.png")


if __name__ == "__main__":
    main()

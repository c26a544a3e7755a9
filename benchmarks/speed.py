"""Speed of training, sampling and evaluating, peak memory and start-up beside what else a user would pick.

    python benchmarks/speed.py [--preset cifar10|digits] [--contestants ours diffusers ...] [--out speed.json]

Tasks: updates (train), images by DDIM (sample) or DDPM's own sampler (fixed-small), Inception's features (evaluate).

Every contestant does the same work with the same network (its own implementation; denoising-diffusion-pytorch's at the
width of nearly the same arithmetic) in a process of its own. Round after round, each in turn does a few units while the
others wait, so that what else the machine does meets all alike; medians over the rounds and the spread are printed.
Memory is the peak of the process (on a GPU: of its allocator). Every round measures the machine's own ceiling too.

contestants:
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from contestants import CONTESTANTS, EVALUATE, PRESETS, SAMPLERS, TASKS, Preset
from torchvision.utils import save_image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils.precision import native_bf16  # noqa: E402
from utils.utilisation import matmul_rate  # noqa: E402

MORE = {"evaluate": 4}  # times the batch, so that what an evaluation pays once, such as data workers, weighs little
PACKAGES = ("torch", "torchvision", "accelerate", "diffusers", "denoising-diffusion-pytorch", "ema-pytorch")


class Contestant:
    """A process that sets up at once and then waits for `work`."""

    def __init__(self, name: str, task: str, scratch: Path, images: Path, preset: str, batch_size: int, steps: int):
        self.name, self.seconds, self.scratch = name, [], scratch
        scratch.mkdir(parents=True)
        asked = {"name": name, "task": task, "scratch": str(scratch), "images": str(images), "preset": preset}
        asked |= {"batch_size": batch_size, "steps": steps}
        launched = time.perf_counter()
        command = [sys.executable, str(HERE / "contestant.py"), json.dumps(asked)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, cwd=scratch)
        if task == "gflop":
            return
        self._answer()
        self.work(1)
        self.first = time.perf_counter() - launched  # from launch to the first step, or to the first images

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed; its log ends:\n{(self.scratch / 'log.txt').read_text()[-3000:]}")
        return json.loads(line)

    def work(self, units: int) -> float:
        """Seconds per unit."""
        print(units, file=self.process.stdin, flush=True)
        return self._answer()["seconds"] / units

    def gflop(self) -> float:
        """Of one forward pass of one image, where that was its task."""
        found = self._answer()["gflop"]
        self.process.wait()
        return found

    def stop(self) -> int:
        """Ends the process; its peak memory [MiB]."""
        print("stop", file=self.process.stdin, flush=True)
        peak = self._answer()["peak_mib"]
        self.process.wait()
        return peak


def ceiling() -> dict[str, float]:
    """The machine at its best: GFLOP/s of a large matrix product, GB/s of a large copy (read and written).

    bf16 where the hardware has it: emulated, it is no ceiling.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if native_bf16() else {})
    found = {name: matmul_rate(device, dtype) / 1e9 for name, dtype in dtypes.items()}
    a = torch.randn(2**26, device=device)
    b, best = torch.empty_like(a), float("inf")
    for _ in range(5):  # the first warms up
        start = time.perf_counter()
        b.copy_(a)
        b[0].item()
        best = min(best, time.perf_counter() - start)
    return found | {"copy": 2 * a.numel() * a.element_size() / best / 1e9}


def make_images(folder: Path, preset: Preset, n: int) -> None:
    """Smooth random pictures: speed does not depend on what they show."""
    (folder / "class").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, preset.channels, 4, 4, generator=generator)
    for i, image in enumerate(torch.nn.functional.interpolate(coarse, size=preset.image_size, mode="bicubic")):
        save_image(image.clamp(0, 1), folder / "class" / f"{i:04d}.png")


def measure(task: str, options, place: Path, images: Path, batch_size: int) -> tuple[list[dict], list[dict]]:
    """(a row for each contestant, the ceilings of each round)."""
    rows, ceilings, contestants, batch_size = [], [], [], batch_size * MORE.get(task, 1)
    for i, name in enumerate(options.contestants):
        if task == "evaluate" and name not in EVALUATE:
            continue
        print(f"{task}: {name} sets up", file=sys.stderr)
        more = (place / f"{task}{i}", images, options.preset, batch_size, options.steps)
        contestants.append(Contestant(name, task, *more))
    for number in range(options.rounds + 1):
        ceilings.append(ceiling())
        for contestant in contestants:
            seconds = contestant.work(options.units)
            if number:  # the first round warms up
                contestant.seconds.append(seconds)
                print(
                    f"{task}, round {number}: {label(task, contestant.name)} {batch_size / seconds:.2f}/s",
                    file=sys.stderr,
                )
    for contestant in contestants:
        rates = [batch_size / seconds for seconds in contestant.seconds]
        rows.append({
            "task": task, "name": label(task, contestant.name), "per_second": median(rates), "lowest": min(rates),
            "highest": max(rates), "first": contestant.first, "peak_mib": contestant.stop(),
        })  # fmt: skip
    return rows, ceilings[1:]


def label(task: str, name: str) -> str:
    return EVALUATE[name] if task == "evaluate" else name


def table(rows: list[dict], gflops: dict[str, float], best: dict[str, float], steps: int) -> str:
    """Markdown."""
    highest = "bf16" if "bf16" in best else "fp32"
    out = [
        f"| | images/s (spread) | ours is | GFLOP/s | of the {highest} ceiling | first | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = next((r["per_second"] for r in rows if r["task"] == task and r["name"] == "ours"), None)
        for row in (r for r in rows if r["task"] == task):
            rate = row["per_second"]
            of_best = "|"
            if task != "evaluate":
                achieved = rate * gflops[row["name"]] * (3 if task == "train" else steps)
                of_best = f"{achieved:.0f} | {achieved / best[highest]:.0%}"
            out.append(
                f"| {task}, {row['name']} | {rate:.4g} ({row['lowest']:.4g} to {row['highest']:.4g}) "
                f"| {f'{mine / rate:.2f} x' if mine else ''} | {of_best} | {row['first']:.1f} s | {row['peak_mib']:,} |"
            )
    return "\n".join(out)


def versions() -> dict[str, str]:
    """Of the packages that are measured, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """Of the code that is measured; "+" for one with changes."""
    git = lambda *args: subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def main() -> None:
    described = "\n".join(f"  {name:22}{what}" for name, (_, _, what) in CONTESTANTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    on_gpu = torch.cuda.is_available()
    left_out = {"ours, compiled"} | (set() if on_gpu else {"diffusers, compiled"})  # on GPUs, ours compiles by itself
    usual = [name for name in CONTESTANTS if name not in left_out]
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=usual, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--units", type=int, help="updates or batches per round (1; digits and GPUs: 10 or 2)")
    steps = 25 if on_gpu else 4  # CUDA graphs are for more than 20
    parser.add_argument("--steps", type=int, default=steps, help=f"of the sampler ({steps}); all cost the same")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    preset, given = PRESETS[options.preset], options.units
    batch_size = options.batch_size or preset.batch_size
    rows, ceilings = [], []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        quick = {"train": 10, "sample": 2, "fixed-small": 2} if options.preset == "digits" or on_gpu else {}
        most = given or quick.get("train", 1)
        make_images(place / "images", preset, batch_size * (2 + (options.rounds + 1) * most))  # no epoch ends meanwhile
        print("counting each network's operations", file=sys.stderr)
        gflops = {
            name: Contestant(name, "gflop", place / f"gflop{i}", place, options.preset, 1, 1).gflop()
            for i, name in enumerate(options.contestants)
        }
        for task in options.tasks:
            options.units = given or quick.get(task, 1)
            found, peaks = measure(task, options, place, place / "images", batch_size)
            rows, ceilings = rows + found, ceilings + peaks
    best = {name: median(c[name] for c in ceilings) for name in ceilings[0]}
    text = table(rows, gflops, best, options.steps)
    print(
        f"\n{options.preset}, batch {batch_size}, {options.steps} sampling steps; {machine()}; commit {commit()}; "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
    )
    print(
        "ceiling: "
        + ", ".join(f"{name} {value:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in best.items())
    )
    print(f"\n{text}\n")
    for row in (row for row in rows if row["task"] in SAMPLERS):
        n = 50 if row["task"] == "sample" else 1000
        rate = row["per_second"] * options.steps / n
        print(f"{row['name']}: going by this, {rate:.4g} images/s by {n} steps of {SAMPLERS[row['task']]}")
    if options.out:
        result = {"preset": options.preset, "batch_size": batch_size, "steps": options.steps, "machine": machine()}
        result |= {"commit": commit(), "versions": versions(), "gflop": gflops, "ceiling": best, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

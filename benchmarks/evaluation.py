"""What an evaluation costs beyond its two networks, and whether its memory grows with the number of images.

    python benchmarks/evaluation.py --weights RUN [--n_samples 2000] [--rounds 3]
    python benchmarks/evaluation.py --weights RUN --memory 2000 20000

The first interleaves, in every round: sampling alone, the extractor alone on as many images, and both through
`Scorer.generated` with the statistics and FID. The second runs evaluate_ddpm.py --store once per count and prints the
peak of its resident memory. Both in the features of the dataset classifier.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusions import build_process
from utils import distributed, precision
from utils.cost import Cost
from utils.micro_batch import generate_fitting
from utils.process import evaluations
from utils.reference import open_for
from utils.scoring import Scorer
from utils.weights import load_network, open_weights

ROOT = Path(__file__).resolve().parent.parent
CLASSIFIER = {"evaluate.feature_extractor": "dataset-classifier", "evaluate.metrics": "[fid]"}


def overhead(path: str, reference: str, n: int, steps: int, rounds: int) -> None:
    accelerator = distributed.start()
    asked = {**CLASSIFIER, "sample.skip_steps": str(steps), "evaluate.n_samples": str(n)}
    weights = open_weights(path, None, [("benchmark", asked)])
    cfg = weights.config
    scorer = Scorer.open(accelerator, cfg, open_for(accelerator, cfg, reference, None, {}), n, None, False)
    dtype = precision.DTYPES[precision.mixed_precision(cfg.sample.mixed_precision)]
    net, process = load_network(weights, accelerator.device, dtype), build_process(cfg.diffusion)
    options = SimpleNamespace(micro_batch=None, store=None)
    size, channels = cfg.data.image_size, cfg.data.channels
    noise = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)

    def sampling(seed: int) -> None:
        for _ in generate_fitting(net, process, cfg.sample, list(range(n)), seed, None, dtype=dtype):
            pass

    def extracting(seed: int) -> None:
        scorer.extractor(noise.split(128))

    def whole(seed: int) -> None:
        cost = Cost([evaluations(cfg)], n, 1)
        found, _ = scorer.generated(cfg, weights, seed, scorer.protocol(cfg, weights, seed, None, n), options, cost)
        scorer.scores(found)

    ratios = []
    for seed in range(rounds + 1):
        taken = []
        for part in (sampling, extracting, whole):
            began = time.perf_counter()
            part(seed)
            taken.append(time.perf_counter() - began)
        if seed:  # the first round warms up
            ratios.append(taken[2] / (taken[0] + taken[1]))
            print(f"sampling {taken[0]:.2f} s, extractor {taken[1]:.2f} s, whole {taken[2]:.2f} s: {ratios[-1]:.3f}")
    print(f"whole / (sampling + extractor), {n} images of {steps} steps: median {statistics.median(ratios):.3f}")


def memory(path: str, reference: str, counts: list[int], steps: int) -> None:
    for n in counts:
        with tempfile.TemporaryDirectory() as place:
            line = [sys.executable, ROOT / "evaluate_ddpm.py", "--weights", path, "--reference", reference]
            line += ["--n_samples", n, "--skip_steps", steps, "--store", f"{place}/store", "--out", f"{place}/out"]
            line += [f"--{name}={value}" for name, value in CLASSIFIER.items()]
            process = subprocess.Popen(list(map(str, line)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(map(str, line))} failed")
        print(f"{n:,} images: peak of {usage.ru_maxrss / 1024:,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--n_samples", type=int, default=2000)
    parser.add_argument("--skip_steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", metavar="N")
    options = parser.parse_args()
    if options.memory:
        memory(options.weights, options.reference, options.memory, options.skip_steps)
    else:
        overhead(options.weights, options.reference, options.n_samples, options.skip_steps, options.rounds)


if __name__ == "__main__":
    main()

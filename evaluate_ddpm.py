"""Score a checkpoint, or a folder of images, against real images with torch-fidelity.

    accelerate launch evaluate_ddpm.py --weights RUN --reference digits --feature_extractor dataset-classifier
    accelerate launch evaluate_ddpm.py --images DIR --reference cifar10:train

Images are generated in memory, split over the processes, and scored as uint8. Beside every score stands its floor: the
score that as many real training images get against the test split. OUT holds results.json, results.csv and report.md;
cells that are already in it are not computed again. Of the configuration, train.* has no effect here.
"""

import sys
import time
from pathlib import Path

from utils import cli, config, constraints
from utils.errors import InputError, run_script

ALIASES = {
    "n_samples": "evaluate.n_samples",
    "metrics": "evaluate.metrics",
    "feature_extractor": "evaluate.feature_extractor",
    "feature_extractor_weights": "evaluate.feature_extractor_weights",
}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file, where the weights have no stored one")
    parser.add_argument("--weights", metavar="PATH", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument("--images", metavar="DIR", help="score this folder instead (every image below it)")
    parser.add_argument(
        "--reference", metavar="NAME|DIR", help="data set, NAME:train (default), NAME:test or NAME:all, or a folder"
    )
    parser.add_argument("--n_samples", metavar="N", help="images to generate")
    parser.add_argument("--metrics", nargs="+", metavar="M", help=", ".join(config.KEYS["evaluate.metrics"].choices))
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="score each of these samplers")
    parser.add_argument("--skip_steps", nargs="+", metavar="S", help="score each of these step counts")
    parser.add_argument(
        "--feature_extractor", metavar="NAME", help=", ".join(config.KEYS["evaluate.feature_extractor"].choices)
    )
    parser.add_argument("--feature_extractor_weights", metavar="PATH", help="local weights file of the extractor")
    parser.add_argument("--seed", type=cli.natural, default=2022, help="seed of the noise (default: 2022)")
    parser.add_argument("--load_ema", type=cli.boolean, metavar="BOOL", help="EMA (true, the default) or raw weights")
    parser.add_argument(
        "--micro_batch", type=cli.positive_or_auto, metavar="B|auto", help="images at a time, per process"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: beside what is scored)")
    parser.add_argument("--force", action="store_true", help="score fewer images than the extractor has dimensions")
    options, overrides = parser.parse(argv)
    cli.alias(options, overrides, ALIASES)
    for name, dotted in (("samplers", "sample.sampler"), ("skip_steps", "sample.skip_steps")):
        if getattr(options, name) and dotted in overrides:
            raise InputError(f"--{name} and --{dotted} are the same option: give one of them")
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    merged = config.merge(*asked)  # a wrong key or value is told before torch is imported
    if options.print_config and options.weights is None:
        print(config.to_yaml(merged), end="")
        return 0
    if (options.weights is None) == (options.images is None):
        raise InputError("give either --weights PATH or --images DIR")
    if options.images and (options.samplers or options.skip_steps or "evaluate.n_samples" in overrides):
        raise InputError("--samplers, --skip_steps and --n_samples go with --weights: a folder is scored as it is")
    cli.require(options, *([] if options.print_config else ["reference"]))
    cells = sweep(options, asked)
    data_keys = {name: value for _, keys in asked for name, value in keys.items() if name.startswith("data.")}
    if options.images:
        return evaluate(options, merged, None, cells, data_keys)

    from utils.weights import open_weights

    weights = open_weights(options.weights, options.load_ema, asked)
    for cell in cells:
        constraints.check(config.merge(("command line", cell), base=weights.config), training=False)
    if options.print_config:
        print(config.to_yaml(weights.config), end="")
        return 0
    return evaluate(options, weights.config, weights, cells, data_keys)


def sweep(options, asked) -> list[dict[str, str]]:
    """The cells: every sampler with every step count, each as overrides; few steps, the cheap ones, first."""
    samplers = [{"sample.sampler": name} for name in options.samplers] if options.samplers else [{}]
    steps = [{"sample.skip_steps": text} for text in options.skip_steps] if options.skip_steps else [{}]
    cells = [sampler | step for step in steps for sampler in samplers]
    for cell in cells:
        config.merge(*asked, ("--samplers or --skip_steps", cell))
    return sorted(cells, key=lambda cell: steps_of(cell["sample.skip_steps"]) if "sample.skip_steps" in cell else 0)


def steps_of(text: str) -> float:
    """A step count for sorting; null, all T of them, comes last."""
    return int(text) if text.isdigit() else float("inf")


def evaluate(options, cfg, weights, cells: list[dict[str, str]], data_keys: dict[str, str]) -> int:
    """Score each cell that is not in the results yet, and print the table."""
    from utils import distributed, precision
    from utils.distributed import on_main
    from utils.fidelity import scores
    from utils.reference import features_of
    from utils.results import Results, cell_id, report
    from utils.scoring import Scorer, folder_images, generated_images

    accelerator = distributed.start()
    exact = precision.mixed_precision(cfg.sample.mixed_precision) == "no"
    precision.set_determinism(precision.wants_determinism("auto"), tf32=not exact)
    results = Results(Path(options.out or default_out(options, weights)))
    images = folder_images(options.images) if options.images else None
    n = len(images) if options.images else cfg.evaluate.n_samples
    scorer = Scorer.open(accelerator, cfg, options.reference, n, images, data_keys, options.force)
    for cell in cells:
        sampled = config.merge(("command line", cell), base=cfg)
        protocol = scorer.protocol(sampled, weights, options, images, n)
        if on_main(accelerator, results.find(cell_id(protocol)) is not None):
            cli.say(f"{scorer.label(sampled, weights, options)}: already in {results.out}")
            continue
        began = time.monotonic()
        if weights:
            batches = generated_images(accelerator, sampled, weights, options.seed, n, options.micro_batch)
            found, seconds = scorer.features(batches), time.monotonic() - began
        else:
            found, seconds = features_of(images, scorer.extractor, Path(cfg.evaluate.cache_dir), accelerator), None
        if accelerator.is_main_process:
            values = scores(
                list(cfg.evaluate.metrics), scorer.extractor, found, scorer.real, cfg.evaluate.kid_subset_size
            )
            results.add(
                {
                    "id": cell_id(protocol),
                    "label": scorer.label(sampled, weights, options),
                    "reference": scorer.reference.name,
                    "extractor": cfg.evaluate.feature_extractor,
                    "n": n,
                    "scores": values,
                    **scorer.floor(n),
                    "seconds_per_image": seconds / n if seconds else None,
                    "protocol": protocol,
                    "circumstances": scorer.circumstances(weights),
                }
            )
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(report(results.rows), end="")
        print(f"\nresults: {results.out.resolve()}", file=sys.stderr)
    accelerator.end_training()
    return 0


def default_out(options, weights) -> Path:
    """SAVE_DIR-scores beside a folder; RUN/scores/stepNNNNNN for a checkpoint."""
    if options.images:
        folder = Path(options.images).resolve()
        return folder.with_name(f"{folder.name}-scores")
    step = weights.file.parent
    return step.parent.parent / "scores" / step.name if step.parent.name == "ckpt" else step / "scores"


if __name__ == "__main__":
    run_script(main)

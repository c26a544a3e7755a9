"""Score a checkpoint, or a folder of images, against real images with torch-fidelity.

    accelerate launch evaluate_ddpm.py --weights RUN --reference digits --feature_extractor dataset-classifier
    accelerate launch evaluate_ddpm.py --images DIR --reference cifar10:train

Images are generated in memory, split over the processes, and scored as uint8. Beside every score stands its floor: the
score that as many real training images get against the test split. OUT holds results.json, results.csv and report.md;
cells that are already in it are not computed again. Of the configuration, train.* has no effect here.
"""

import itertools
from pathlib import Path

from utils import cli, config, constraints, sweep
from utils.errors import InputError, run_script

ALIASES = {
    "n_samples": "evaluate.n_samples",
    "metrics": "evaluate.metrics",
    "feature_extractor": "evaluate.feature_extractor",
    "feature_extractor_weights": "evaluate.feature_extractor_weights",
}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("-c", "--config", metavar="CONFIG", help="YAML file, where the weights have no stored one")
    add("--weights", metavar="PATH", help="run, checkpoint or diffusers folder, weights file, hub id")
    add("--images", metavar="DIR", help="score this folder instead (every image below it)")
    add(
        "--reference",
        metavar="NAME|DIR|FILE",
        help="data set or folder, with :train (default), :test or :all; .npz",
    )
    add("--make_reference", metavar="NAME|DIR", help="write the statistics of this reference to --out FILE.npz instead")
    add("--n_samples", metavar="N", help="images to generate")
    add("--metrics", nargs="+", metavar="M", help=", ".join(config.KEYS["evaluate.metrics"].choices))
    add("--samplers", nargs="+", metavar="NAME", help="score each of these samplers")
    add("--skip_types", nargs="+", metavar="TYPE", help="score each of these skip types")
    add("--skip_steps", nargs="+", metavar="S", help="score each of these step counts")
    add("--etas", nargs="+", metavar="E", help="score DDIM with each of these")
    add("--guidance_scales", "--guidance_scale", nargs="+", metavar="W", help="score each of these")
    add("--per_class", action="store_true", help="also score each class against its own images")
    add(
        "--repeats", type=cli.positive, default=1, metavar="R", help="seeds SEED, SEED + 1, ...: mean and spread over R"
    )
    add("--feature_extractor", metavar="NAME", help=", ".join(config.KEYS["evaluate.feature_extractor"].choices))
    add("--feature_extractor_weights", metavar="PATH", help="local weights file of the extractor")
    add("--seed", type=cli.natural, default=2022, help="seed of the noise (default: 2022)")
    add("--load_ema", type=cli.boolean, metavar="BOOL", help="EMA (true, the default) or raw weights")
    add("--micro_batch", type=cli.positive_or_auto, metavar="B|auto", help="images at a time, per process")
    add("--store", metavar="DIR", help="keep images and features there; a killed evaluation goes on inside a cell")
    add("--out", metavar="DIR", help="folder of the results (default: beside what is scored)")
    add("--verify", metavar="FILE", help="compute every row of this results.json again, and say whether it agrees")
    add("--force", action="store_true", help="score fewer images than the extractor has dimensions")
    options, overrides = parser.parse(argv)
    if options.verify:
        from utils.verify import verify

        return verify(options, overrides, evaluate_again=main)
    cli.alias(options, overrides, ALIASES)
    sweep.check_axes(options, overrides)
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    merged = config.merge(*asked)  # a wrong key or value is told before torch is imported
    if options.print_config and options.weights is None:
        cli.show(config.to_yaml(merged))
        return 0
    data_keys = {name: value for _, keys in asked for name, value in keys.items() if name.startswith("data.")}
    if options.make_reference:
        if options.weights or options.images or options.reference:
            raise InputError("--make_reference scores nothing: leave --weights, --images and --reference out")
        from utils.make_reference import make

        return make(options.make_reference, options.out, merged, data_keys)
    if (options.weights is None) == (options.images is None):
        raise InputError("give either --weights PATH or --images DIR")
    if not merged.evaluate.metrics:
        raise InputError("evaluate.metrics is empty: name at least one")
    if options.images and "bpd" in merged.evaluate.metrics:
        raise InputError("the metric bpd is of a network: it needs --weights")
    cli.require(options, *([] if options.print_config else ["reference"]))
    cells = sweep.cells(options, asked)
    if options.images:
        return evaluate(options, merged, None, [merged], data_keys)

    from utils.weights import open_weights

    weights = open_weights(options.weights, options.load_ema, asked)
    keys = {name for _, layer in asked for name in layer}
    cells = [sweep.apply(weights.config, cell, keys) for cell in cells]
    for cell in cells:
        constraints.check(cell, training=False)
    if options.print_config:
        cli.show(config.to_yaml(weights.config))
        return 0
    return evaluate(options, weights.config, weights, cells, data_keys)


def evaluate(options, cfg, weights, cells, data_keys: dict[str, str]) -> int:
    """Score each cell (a configuration) that is not in the results yet, and print the table."""
    from utils import distributed, precision
    from utils.cost import Cost
    from utils.data.image_folder import load_as_is
    from utils.distributed import from_main
    from utils.likelihood import bound_row, chains
    from utils.process import evaluations
    from utils.reference import features_of, open_for
    from utils.results import Results, cell_id, report
    from utils.scoring import Scorer, generative

    accelerator = distributed.start()
    exact = precision.mixed_precision(cfg.sample.mixed_precision) == "no"
    precision.set_determinism(precision.wants_determinism("auto"), tf32=not exact)
    results = Results(Path(options.out or default_out(options, weights)))
    known = lambda identity: from_main(accelerator, results.find(identity) is not None)
    images = load_as_is(options.images, "--images") if options.images else None
    n = len(images) if options.images else cfg.evaluate.n_samples
    reference = open_for(accelerator, cfg, options.reference, images, data_keys)
    metrics, seeds = generative(cfg.evaluate), range(options.seed, options.seed + options.repeats)
    how = options.force, options.per_class
    scorer = Scorer.open(accelerator, cfg, reference, n, images, *how) if metrics else None
    if "bpd" in cfg.evaluate.metrics:
        found = chains([cell.sample.sampler for cell in cells], cfg.diffusion.learn_variance)
        for chain, seed in itertools.product(found, seeds):
            row = bound_row(accelerator, cfg, weights, seed, options.micro_batch, reference.images, chain, known)
            if row and accelerator.is_main_process:
                cell = config.merge(("", {"sample.sampler": chain}), base=cfg)
                results.add(row | {"repeat": sweep.repeat(options, cell, seed, row, data_keys)})
    pending = []
    for cell, seed in itertools.product(cells if metrics else [], seeds):
        protocol = scorer.protocol(cell, weights, seed, images, n)
        if known(cell_id(protocol)):
            cli.say(f"{scorer.label(cell, weights, options, seed)}: already in {results.out}")
        else:
            pending.append((cell, seed, protocol))
    cost = Cost([evaluations(cell) for cell, *_ in pending] if weights else [], n, accelerator.num_processes)
    for cell, seed, protocol in pending:
        if weights:
            found, seconds = scorer.generated(cell, weights, seed, protocol, options, cost)
        else:
            found, seconds = features_of(images, scorer.extractor, Path(cfg.evaluate.cache_dir), accelerator), None
        if accelerator.is_main_process:
            values, per_class = scorer.scores(found), scorer.class_scores(found) if options.per_class else None
            row = scorer.row(cell, weights, options, seed, protocol, values, seconds, per_class)
            results.add(row | {"repeat": sweep.repeat(options, cell, seed, row, data_keys)})
            cost.cell_done(row["label"], values)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(report(results.rows), end="")
    cli.say(f"\nresults: {results.out.resolve()}")
    return 0


def default_out(options, weights) -> Path:
    """SAVE_DIR-scores beside a folder of images; else where the weights have theirs."""
    if weights:
        return weights.scores
    folder = Path(options.images).resolve()
    return folder.with_name(f"{folder.name}-scores")


if __name__ == "__main__":
    run_script(main)

"""Generate images from a checkpoint.

    accelerate launch sample_ddpm.py --weights RUN --n_samples 64 --save_dir OUT [--sampler ddim --skip_steps 50] ...

Writes OUT/000000.png, ..., OUT/protocol.json and beside the folder OUT-grid.png. Image i depends on the weights, the
sampling options, --seed and i alone: not on --micro_batch, the number of processes, or interruptions; the same command
goes on where it stopped. Of the configuration, train.* and evaluate.* have no effect here.

modes:
  sample       one image per file
  denoise      one strip per file: x_t along the way, from the noise to the image
  progressive  one strip per file: the prediction of x0 along the way
"""

import sys
from pathlib import Path

from utils import cli, config, constraints
from utils.errors import InputError, run_script

MODES = ("sample", "denoise", "progressive")
ALIASES = {name: f"sample.{name}" for name in ("sampler", "skip_type", "skip_steps", "eta")}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file, where the weights have no stored one")
    parser.add_argument("--weights", metavar="PATH", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument("--n_samples", type=cli.positive, metavar="N", help="images in the folder when all is done")
    parser.add_argument("--save_dir", metavar="DIR", help="folder for the images; nothing else goes into it")
    parser.add_argument("--seed", type=cli.natural, default=2022, help="seed of the noise (default: 2022)")
    parser.add_argument("--load_ema", type=cli.boolean, metavar="BOOL", help="EMA (true, the default) or raw weights")
    parser.add_argument(
        "--sampler", "--var_type", metavar="NAME", help=", ".join(config.KEYS["sample.sampler"].choices)
    )
    parser.add_argument("--skip_type", metavar="TYPE", help=", ".join(config.KEYS["sample.skip_type"].choices))
    parser.add_argument("--skip_steps", metavar="S", help="sampling steps, 1 to T")
    parser.add_argument("--eta", metavar="E", help="DDIM's eta, 0 to 1")
    parser.add_argument(
        "--micro_batch", type=cli.positive_or_auto, metavar="B|auto", help="images at a time, per process"
    )
    parser.add_argument("--mode", choices=MODES, default="sample", help="what each file shows (default: sample)")
    parser.add_argument(
        "--n_denoise", type=cli.positive, metavar="N", help="frames of a denoise strip (default: min(20, S))"
    )
    parser.add_argument(
        "--n_progressive", type=cli.positive, metavar="N", help="frames of a progressive strip (likewise)"
    )
    options, overrides = parser.parse(argv)
    cli.alias(options, overrides, ALIASES)

    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    config.merge(*asked)  # a wrong key or value is told before torch is imported
    if options.print_config and options.weights is None:
        print(config.to_yaml(config.merge(*asked)), end="")
        return 0
    cli.require(options, "weights", *([] if options.print_config else ["n_samples", "save_dir"]))

    from utils.weights import open_weights

    weights = open_weights(options.weights, options.load_ema, asked)
    constraints.check(weights.config, training=False)
    if options.print_config:
        print(config.to_yaml(weights.config), end="")
        return 0
    n_frames = frames_asked(options, weights.config.sample.skip_steps or weights.config.diffusion.total_steps)
    return sample(options, weights, n_frames)


def frames_asked(options, steps: int) -> int:
    """Frames per strip for the mode; 0 in mode sample. Raises InputError for more than there are sampling steps."""
    for mode in ("denoise", "progressive"):
        asked = getattr(options, f"n_{mode}")
        if asked is not None and options.mode != mode:
            raise InputError(f"--n_{mode} belongs to --mode {mode}, but the mode is {options.mode}")
        if asked is not None and asked > steps:
            raise InputError(f"--n_{mode} {asked} is more than the {steps} sampling steps")
    if options.mode == "sample":
        return 0
    return getattr(options, f"n_{options.mode}") or min(20, steps)


def sample(options, weights, n_frames: int) -> int:
    """Generate what is missing in the folder, split over processes, then draw the grid."""
    from tqdm import tqdm

    from diffusions import build_process
    from utils import distributed, precision
    from utils.images import PngWriter, enlarge, grid, read_png, strip, write_png
    from utils.micro_batch import generate_fitting
    from utils.protocol import circumstances, sampling_identity
    from utils.sample_folder import check_folder, missing, sample_paths, start_folder
    from utils.weights import load_network

    accelerator = distributed.start()
    cfg, folder = weights.config, Path(options.save_dir).resolve()
    precision_name = precision.mixed_precision(cfg.sample.mixed_precision)
    precision.set_determinism(precision.wants_determinism("auto"), tf32=precision_name != "no")
    process = build_process(cfg.diffusion)
    identity = sampling_identity(weights, cfg, process, options.seed, precision_name)
    identity |= {"mode": options.mode, "frames": n_frames}
    check_folder(folder, identity)
    net = load_network(weights, accelerator.device)
    accelerator.wait_for_everyone()  # every process has looked at the folder before the main one changes it
    if accelerator.is_main_process:
        start_folder(folder, identity, circumstances(weights, accelerator))
    accelerator.wait_for_everyone()

    todo = missing(folder, options.n_samples)
    accelerator.wait_for_everyone()  # and has listed it before any writes
    mine = [todo[i] for i in distributed.share(len(todo), accelerator.process_index, accelerator.num_processes)]
    steps = cfg.sample.skip_steps or process.total_steps
    cli.say(
        f"{len(todo)} of {options.n_samples} images to make: {weights.describe()}, {cfg.sample.sampler}, "
        f"{cfg.sample.skip_type} {steps} steps, {precision_name}, seed {options.seed}"
    )
    batches = generate_fitting(
        net, process, cfg.sample, mine, options.seed, options.micro_batch,
        dtype=precision.DTYPES[precision_name], n_frames=n_frames, view="x0" if options.mode == "progressive" else "x",
    )  # fmt: skip
    writer = PngWriter(folder)
    with tqdm(
        total=len(mine), desc="sample", unit="img", disable=not accelerator.is_main_process, file=sys.stderr
    ) as bar:
        for batch in batches:
            for i, index in enumerate(batch.indices.tolist()):
                writer.write(index, strip(batch.frames[i]) if n_frames else batch.images[i])
            bar.update(len(batch.indices))
    writer.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shown = [read_png(path) for path in sample_paths(folder, min(options.n_samples, 16 if n_frames else 64))]
        picture = folder.with_name(f"{folder.name}-grid.png")
        write_png(picture, enlarge(grid(shown, 1 if n_frames else None)))  # strips stand one under the other
        print(f"{options.n_samples} images in {folder}\ngrid: {picture}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)

"""Generate images from a checkpoint.

    accelerate launch sample_ddpm.py --weights RUN --n_samples 64 --save_dir OUT [--sampler ddim --skip_steps 50] ...

Writes OUT/000000.png, ..., OUT/protocol.json and beside the folder OUT-grid.png. Image i depends on the weights, the
sampling options, --seed and i alone: not on --micro_batch, the number of processes, or interruptions; the same command
goes on where it stopped. Of train.* and evaluate.*, only evaluate.cache_dir has an effect here (compiled code).

modes, and what file i shows:
"""

import argparse
import sys
from pathlib import Path

from utils import cli, config, constraints, modes
from utils.captions import read_conditions
from utils.errors import is_main_process, run_script

__doc__ += "".join(f"  {name:<12} {mode.shows}\n" for name, mode in modes.MODES.items())
ALIASES = {name: f"sample.{name}" for name in ("sampler", "skip_type", "skip_steps", "eta", "guidance_scale")}


def main(argv: list[str]) -> int:
    options, asked = parse(argv)
    if options.print_config and options.weights is None:
        cli.show(config.to_yaml(config.merge(*asked)))
        return 0
    cli.require(options, "weights", *([] if options.look_only else ["n_samples", "save_dir"]))

    from utils.weights import open_weights

    weights = open_weights(options.weights, options.load_ema, asked)
    keys, notes = settle(options, weights.config, asked)
    if options.print_config:
        cli.show(config.to_yaml(weights.config))
        return 0
    if options.show_grid and is_main_process():
        print_grids(options, weights.config)
    return 0 if options.look_only else sample(options, weights, keys, notes)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, dict]]]:
    """(options, what is asked of the configuration); what is wrong without looking at weights is told here."""
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("-c", "--config", metavar="CONFIG", help="YAML file, where the weights have no stored one")
    add("--weights", metavar="PATH", help="run, checkpoint or diffusers folder, weights file, hub id")
    add("--n_samples", type=cli.positive, metavar="N", help="images in the folder when all is done")
    add("--save_dir", metavar="DIR", help="folder for the images; nothing else goes into it")
    add("--seed", type=cli.natural, default=2022, help="seed of the noise (default: 2022)")
    add("--load_ema", type=cli.boolean, metavar="BOOL", help="EMA (true, the default) or raw weights")
    add("--sampler", "--var_type", metavar="NAME", help=", ".join(config.KEYS["sample.sampler"].choices))
    add("--skip_type", metavar="TYPE", help=", ".join(config.KEYS["sample.skip_type"].choices))
    add("--skip_steps", nargs="+", metavar="S", help="sampling steps, 1 to T; several in mode consistency")
    add("--eta", metavar="E", help="DDIM's eta, 0 to 1")
    add("--labels", nargs="+", metavar="CLASS", help="class of each image, or all; a shorter list is repeated")
    add("--prompts", nargs="+", metavar="TEXT", help="text for each image; a shorter list is repeated")
    add("--prompt_file", metavar="FILE", help="the same, a line each")
    add("--guidance_scale", nargs="+", metavar="W", help="0 unconditional, 1 conditional, above: stronger; or several")
    add("--show_grid", action="store_true", help="print the timesteps; without --save_dir, only that")
    add("--micro_batch", type=cli.positive_or_auto, metavar="B|auto", help="images at a time, per process")
    add("--mode", choices=modes.MODES, default="sample", help="what each file shows (default: sample)")
    add("--n_denoise", type=cli.positive, metavar="N", help="frames of a denoise strip (default: min(20, S))")
    add("--n_progressive", type=cli.positive, metavar="N", help="frames of a progressive strip (likewise)")
    add("--animate", nargs="?", const="webp", choices=("webp", "gif"), help="also play the strips: OUT-animation.webp")
    add("--n_interpolate", type=cli.positive, metavar="N", help=f"images per row (default: {modes.N_INTERPOLATE})")
    add("--seed_to", type=cli.natural, metavar="SEED", help="rows from image i of --seed to image i of this seed")
    add("--corners", action="store_true", help="interpolate a square between four images instead of rows between two")
    add("--source", metavar="DIR|NAME", help="real images: a folder of the network's own size, or a data set[:split]")
    add("--mask", metavar="FILE|SIDE", help="what to fill in: white in a picture, or left, right, top, bottom, center")
    add("--profile", action="store_true", help="say where the time goes, and write a Chrome trace: OUT-trace.json")
    add("--n_resample", type=cli.positive, metavar="N", help=f"passes per inpainting step ({modes.N_RESAMPLE})")
    options, overrides = parser.parse(argv)
    options.look_only = options.print_config or (options.show_grid and options.save_dir is None)
    modes.check_options(options, overrides, options.look_only)
    cli.alias(options, overrides, ALIASES)

    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    config.merge(*asked)  # a wrong key or value is told before torch is imported
    return options, asked


def settle(options, cfg, asked) -> tuple[dict, list[str]]:
    """The weights' configuration made to fit the mode: (dotted keys asked for, what to say of it)."""
    keys = {name: value for _, layer in asked for name, value in layer.items()}
    notes = modes.adapt(cfg, options, keys)
    constraints.check(cfg, training=False)
    return keys, notes


def print_grids(options, cfg) -> None:
    """The timesteps that will be visited, and alpha_bar at both ends of every step."""
    from diffusions import build_process, time_grid

    alpha_bar = build_process(cfg.diffusion).alpha_bar
    for S in modes.step_counts(options, cfg):
        print(f"{S} {cfg.sample.skip_type} steps of {len(alpha_bar)}:\n{time_grid(alpha_bar, cfg.sample.skip_type, S)}")


def sample(options, weights, keys, notes) -> int:
    """Make the pictures that are missing in the folder, split over processes, then draw the overview."""
    asked_for = read_conditions(options, weights.config, keys)
    from tqdm import tqdm

    from utils import distributed, precision
    from utils.images import PngWriter, write_png
    from utils.overview import overview, write_animation, write_errors
    from utils.pictures import PICTURES, Job
    from utils.process import evaluations
    from utils.profiling import sampling_profile
    from utils.protocol import circumstances
    from utils.sample_folder import check_folder, missing, sample_paths, start_folder
    from utils.weights import load_network

    accelerator = distributed.start()
    folder, n_files = Path(options.save_dir).resolve(), modes.n_files(options)
    job = Job.open(options, weights, keys, accelerator, asked_for)
    precision.set_determinism(precision.wants_determinism("auto"), tf32=job.precision != "no")
    check_folder(folder, job.identity)
    share = evaluations(weights.config) * len(missing(folder, n_files)) // accelerator.num_processes
    job.net = load_network(weights, accelerator.device, precision.DTYPES[job.precision], share)
    accelerator.wait_for_everyone()  # every process has looked at the folder before the main one changes it
    if accelerator.is_main_process:
        start_folder(folder, job.identity, circumstances(weights, accelerator) | {"source": options.source})
    accelerator.wait_for_everyone()

    todo = missing(folder, n_files)
    accelerator.wait_for_everyone()  # and has listed it before any writes
    mine = [todo[i] for i in distributed.share(len(todo), accelerator.process_index, accelerator.num_processes)]
    for note in notes:
        cli.say(note)
    cli.say(f"{len(todo)} of {n_files} {job.unit} to make: {weights.describe()}, {job.describe()}")
    writer = PngWriter(folder)
    hidden = not accelerator.is_main_process
    trace = folder.with_name(f"{folder.name}-trace.json") if options.profile and not hidden else None
    bar = tqdm(total=len(mine), desc=options.mode, unit="img", disable=hidden, file=sys.stderr)
    with bar, sampling_profile(trace, job.net, writer) as job.net:
        for index, picture in PICTURES[options.mode](job, mine):
            writer.write(index, picture)
            bar.update()
        writer.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files, beside = sample_paths(folder, n_files), lambda end: folder.with_name(f"{folder.name}-{end}")
        write_png(beside("grid.png"), overview(job, files))
        print(f"{n_files} {job.unit} in {folder}\ngrid: {beside('grid.png')}")
        if options.animate:
            write_animation(beside(f"animation.{options.animate}"), job, files)
            print(f"animation: {beside(f'animation.{options.animate}')}")
        if options.mode == "reconstruct":
            mean = write_errors(beside("errors.csv"), files)
            print(f"error per pixel, in [0, 1]^2: mean {mean:.2e}; each: {beside('errors.csv')}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)

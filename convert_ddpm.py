"""Convert checkpoints: other projects' into a run folder of ours, ours into other formats.

    python convert_ddpm.py --weights google/ddpm-cifar10-32 --to native --out runs/cifar10
    python convert_ddpm.py --weights runs/demo --to diffusers --out out/demo-diffusers

--weights is what sample_ddpm.py takes: a run or checkpoint folder, a .safetensors file, the DDIM authors' ckpt.pth, a
DDPM release file, a diffusers folder or file, an id of the Hugging Face hub. What such a file does not say of its
network is assumed and told; -c and dotted keys say otherwise. Each direction and its limits: docs/checkpoints.md.

formats of --to:
  native       a run folder at step 0, to sample from, score, and train on: train_ddpm.py -e OUT -r auto
  diffusers    a folder for DDPMPipeline and DDIMPipeline, with a model card
  ddim         the DDIM authors' ckpt.pth and config.yml
  safetensors  one file with its configuration in the header
"""

from utils import cli, config, constraints
from utils.errors import run_script

FORMATS = ("native", "diffusers", "ddim", "safetensors")


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("-c", "--config", metavar="CONFIG", help="YAML file, for what the weights do not say")
    add("--weights", metavar="PATH", help="what to convert")
    add("--to", choices=FORMATS, help="format to write")
    add("--out", metavar="DIR", help="folder to write, new or empty")
    add("--load_ema", type=cli.boolean, metavar="BOOL", help="only EMA (true) or only raw weights (false)")
    options, overrides = parser.parse(argv)
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    merged = config.merge(*asked)  # a wrong key or value is told before torch is imported
    if options.print_config and options.weights is None:
        cli.show(config.to_yaml(merged))
        return 0
    cli.require(options, "weights", *([] if options.print_config else ["to", "out"]))

    from utils import export
    from utils.weights import open_weights

    out = None if options.print_config else export.check_free(options.out)
    weights = open_weights(options.weights, options.load_ema, asked, training=True)
    constraints.check(weights.config, training=options.to == "native")
    if options.print_config:
        cli.show(config.to_yaml(weights.config))
        return 0
    export.check(options.to, weights.config)
    export.write(options.to, weights, options.load_ema, out)
    print("\n".join(export.told(options.to, weights, options.load_ema, out)))
    return 0


if __name__ == "__main__":
    run_script(main)

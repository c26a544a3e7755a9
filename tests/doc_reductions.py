"""How the documentation's commands are made small enough to run in a test, and what can't be run here.

Every entry is checked to match some command, so that none outlives the text it was made for.

To extend: a new page or command needs nothing, unless it samples from a run that no documented command trains (one
line in RUNS), reads images of one's own (FOLDERS), needs something to be there first (a Rule with `before`), or can't
run here (a Rule with "parse": its options are still read by the real parser; "outside": another project's program).
"refused" is for a command that is shown with the error it ends in: that line must stand on the page.
"""

import re
from dataclasses import dataclass

from documentation import Command, commands

from utils import cli, config


@dataclass(frozen=True)
class Rule:
    pattern: str  # searched in the command's words, joined by blanks
    how: str  # run, parse, refused or outside
    why: str
    before: str = ""  # a command to run first, reduced like the others

    def matches(self, command: Command) -> bool:
        return re.search(self.pattern, " ".join(command.words)) is not None


RULES = [
    Rule(
        r"--reference (celeba|ffhq|lsun|data/)",
        "parse",
        "without labels it needs Inception, whose weights are a download",
    ),
    Rule(r"--data\.name huggingface", "parse", "the data set is a download"),
    Rule(r"--train\.shard true", "parse", "divides among several processes"),
    Rule(
        r"--model\.text_encoder openai/",
        "parse",
        "the encoder is a download; tests/test_frozen_encoder.py has tiny ones",
    ),
    Rule(r"--train\.random_flip ", "refused", "shows what a wrong key is answered with"),
    Rule(r"^python main\.py ", "outside", "the DDIM authors' script"),
    Rule(r"^accelerate launch train_unconditional\.py ", "outside", "diffusers' example"),
    Rule(r"^fidelity ", "outside", "torch-fidelity's own command; tests/test_fidelity_cli.py runs it"),
    Rule(r"^python -m pytorch_fid ", "outside", "pytorch-fid"),
    Rule(r"^python -c .*cleanfid", "outside", "clean-fid"),
    Rule(
        r"--verify runs/fashion16/scores/results.json",
        "run",
        "verifies what an evaluation left",
        before="python evaluate_ddpm.py --weights runs/fashion16 --reference fashion_mnist --out runs/fashion16/scores",
    ),
]

# Runs and weights that commands use and none of them trains: name -> recipe and overrides.
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "runs/demo": ("configs/ddpm_digits.yaml", {}),  # by make demo
    "runs/digits-learned": ("configs/ddpm_digits.yaml", {"diffusion.learn_variance": "true"}),
    "runs/tuned": ("configs/ddpm_cifar10.yaml", {}),  # by convert_ddpm.py
    "google/ddpm-cifar10-32": ("configs/ddpm_cifar10.yaml", {}),
    "ckpt.pth": ("configs/ddpm_celeba.yaml", {}),
    "model-790000.ckpt": ("configs/ddpm_cifar10.yaml", {}),
}

FOLDERS = ("photos", "photos/", "photos.zip", "birds/", "data/celeba_hq_256")  # data.root: a folder of images

LARGEST = {  # of an option's number
    "--n_samples": 16,
    "--n_denoise": 2,
    "--n_progressive": 2,
    "--n_interpolate": 3,
    "--repeats": 2,
    "--train.n_steps": 2,
}
INSTEAD = {"--train.compile": "false"}


def trained_runs() -> dict[str, tuple[str, dict[str, str]]]:
    """What the documentation's own train commands say of their run folders: the first one of each decides."""
    found = {}
    for command in commands():
        words = list(command.words)
        if "train_ddpm.py" in words and not command.is_synopsis:
            options, overrides = train_options(words[words.index("train_ddpm.py") + 1 :])
            if options.exp_dir and options.resume is None:
                found.setdefault(options.exp_dir, (options.config or "configs/ddpm_digits.yaml", overrides))
    return found


def train_options(words: list[str]):
    parser = cli.Parser()
    for short, name in (("-c", "--config"), ("-e", "--exp_dir"), ("-r", "--resume")):
        parser.add_argument(short, name)
    return parser.parse(words)


def tiny_keys(cfg) -> dict[str, str]:
    """Overrides that make a recipe's network and training small; its data, diffusion and kind of condition stay."""
    size = cfg.data.image_size
    attention, widths = (f"[{size // 2}]", "[1,2]") if size <= 64 else ("[]", "[1,1,1,1,1]")  # the middle attends
    keys = {"model.dim": "8", "model.norm_groups": "4", "model.dim_mults": widths, "model.num_res_blocks": "1"}
    keys |= {"model.n_heads": "1", "model.attn_resolutions": attention, "train.batch_size": "2", "train.n_samples": "1"}
    keys |= {"train.n_steps": "2", "train.n_epochs": "null", "train.n_valid": "2", "train.log_with": "none"}
    keys |= {"train.micro_batch": "null", "train.mixed_precision": "no", "train.warmup_steps": "0"}
    keys |= {"sample.skip_steps": "2", "sample.mixed_precision": "no", "data.num_workers": "0"}
    if cfg.model.condition == "text":
        keys |= {"model.text_dim": "32", "model.text_layers": "1"}
        keys |= {"model.cross_attn_resolutions": attention}
    return keys


def grouped(words: list[str]) -> list[list[str]]:
    """[option, value, ...] each."""
    found = []
    for word in words:
        if (word.startswith("-") and not re.fullmatch(r"-\d.*", word)) or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def reduced(script: str, words: list[str]) -> list[str]:
    """The words of a script's command line with smaller numbers, and more that make its work small."""
    found = []
    for option, *values in grouped(words):
        if option == "--n_samples" and "--per_class" in words:
            values = ["160"]  # each of ten classes needs neighbours
        elif option == "--n_samples" and script == "sample_ddpm.py":
            values = [str(min(int(values[0]), 4))]  # the smallest of the tiny test splits has five
        elif option in LARGEST:
            values = [str(min(int(value), LARGEST[option])) for value in values]
        elif option in INSTEAD:
            values = [INSTEAD[option]]
        elif option == "--skip_steps":  # as many counts as there were, in the same order of size
            order = sorted(set(map(int, values)))
            values = [str(2 + order.index(int(value))) for value in values]
        found += [option, *values]
    if script == "train_ddpm.py":
        options, overrides = train_options(words)
        if options.resume is not None:
            return [*found, "--train.n_steps", "4"]  # what is there has 2
        layers = [(options.config or "configs/ddpm_digits.yaml")]
        cfg = config.merge(*((layer, config.read_yaml(layer)) for layer in layers), ("command line", overrides))
        found += [word for key, value in tiny_keys(cfg).items() for word in (f"--{key}", value)]
    if script == "convert_ddpm.py" and "-c" in words:  # the weights that are converted are tiny ones of this recipe
        recipe = words[words.index("-c") + 1]
        keys = tiny_keys(config.merge((recipe, config.read_yaml(recipe))))
        found += [word for key, value in keys.items() if key.startswith("model.") for word in (f"--{key}", value)]
    if script == "evaluate_ddpm.py" and "--verify" not in words:
        found += ["--force"] * ("--force" not in words)
        found += ["--n_samples", "16"] * ("--n_samples" not in words and "--weights" in words)
        if "bpd" not in words:
            found += ["--feature_extractor", "dataset-classifier"]
    return found

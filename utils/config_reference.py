"""The reference page of every configuration key, written from the schema.

python -m utils.config_reference > docs/configuration.md
python -m utils.config_reference --check        # exit status 1 where docs/configuration.md is not current
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from utils.cli import Parser
from utils.config import KEYS
from utils.config_key import KeyInfo
from utils.constraints import MAY_CHANGE
from utils.errors import run_script

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
SECTIONS = {  # what is said above the table of each
    "data": "What is trained on. The data sets themselves: [data.md](data.md).",
    "model": "The network. Conditions: [conditional.md](conditional.md).",
    "diffusion": "The forward process, and what the network learns of it.",
    "train": "The optimisation, and what is written when. `*_every` counts optimizer updates.",
    "sample": "How images are made: the previews', and the default of `sample_ddpm.py` and `evaluate_ddpm.py`. "
    "Equations: [samplers.md](samplers.md).",
    "evaluate": "Scores. What they mean: [evaluation.md](evaluation.md).",
}
INTRODUCTION = """\
# Configuration

<!-- Written by `python -m utils.config_reference > docs/configuration.md`; a test holds it equal to the schema. -->

Every setting is a key of one typed schema, `utils/config.py`, the only place where a default lives. Three layers,
a later one winning:

1. the defaults below;
2. a YAML file, `-c configs/NAME.yaml` (`train_ddpm.py` without `-c` takes `configs/ddpm_digits.yaml`); for sampling,
   scoring and resuming, the configuration stored beside the weights;
3. `--section.key value` on the command line. Where a key is given twice, the last one counts.

`--print_config` prints the merged result, and nothing is trained:

```
python train_ddpm.py --print_config --train.lr 1e-4 --train.batch_size=64
python train_ddpm.py --print_config --model.dim_mults [1,2,4] --model.dim_mults[0] 2 --model.norm_groups 16
python train_ddpm.py --print_config -c configs/ddpm_cifar10.yaml --train.clip_grad_norm null --train.micro_batch 32
```

| form | meaning |
|---|---|
| `--train.lr 1e-4`, `--train.lr=1e-4` | the same |
| `--model.dim_mults [1,2,2,2]` | a whole list; `'[1,2,2,2]'` where the shell reads brackets (zsh) |
| `--model.dim_mults[0] 2` | one entry, counted from 0, of the list that is there already |
| `--train.clip_grad_norm null` | nothing; only where the type says "or null" |
| `true`, `yes`, `on`; `false`, `no`, `off` | a bool, in any case |
| `fixed_large` | the same word as `fixed-large`, in every choice |
| `--sampler ddim`, `--skip_steps 50` | in `sample_ddpm.py`, short for `--sample.sampler`, `--sample.skip_steps` |

In a YAML file the sections are mappings: `train: {lr: 1.0e-4}`. An unknown key, a value of another type, outside its
range or not among its choices, keys that contradict each other, and an option given in both its forms end in one line
that says what would be right, with exit status 2, before any work:

```
$ python train_ddpm.py --train.random_flip true
train_ddpm.py: error: command line: unknown key train.random_flip; did you mean data.random_flip?
```

A run stores its whole configuration, and resuming (`-r`) starts from it; then only the keys marked * may change.
Sampling and scoring refuse a `model.*`, `diffusion.*`, `data.image_size` or `data.channels` that contradicts the
weights.
"""


def row(info: KeyInfo) -> str:
    """One line of a section's table."""
    kind = ", ".join(f"`{word}`" for word in info.choices) if info.choices else info.type_name
    if info.choices:
        kind = ("list of " if info.is_list else "one of ") + kind + (" or null" if info.optional else "")
    mark = " *" if info.name in MAY_CHANGE else ""
    return f"| `{info.name}`{mark} | {kind} | {shown(info.default)} | {info.range_name or ''} | {info.doc} |"


def shown(default: Any) -> str:
    """A default as it would be written in YAML or on a command line."""
    if isinstance(default, list):
        return f"`[{', '.join(map(str, default))}]`"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if default is None or isinstance(default, bool) else default}`"


def page() -> str:
    """The whole page, as docs/configuration.md holds it."""
    parts = [INTRODUCTION]
    for section in dict.fromkeys(name.rpartition(".")[0] for name in KEYS):
        text = SECTIONS.get(section)
        infos = [info for info in KEYS.values() if info.name.rpartition(".")[0] == section]
        table = ["| key | type | default | range | meaning |", "|---|---|---|---|---|", *map(row, infos)]
        parts.append("\n".join([f"## {section or 'Top level'}", "", *([text, ""] if text else []), *table, ""]))
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = Parser.error.__get__(parser)  # one InputError line
    parser.add_argument("--check", action="store_true", help="compare with docs/configuration.md in place of printing")
    if not parser.parse_args(argv).check:
        print(page(), end="")
        return 0
    if not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE.name} is not current: python -m utils.config_reference > docs/{PAGE.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)

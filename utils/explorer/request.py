"""What the page's fields ask for, as the arguments of sample_ddpm.py that ask for the same. Imports no torch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.constraints import STOCHASTIC, TAKES_ETA
from utils.errors import InputError

if TYPE_CHECKING:
    from utils.weights import Weights

MOST_IMAGES = 64  # at a time: one micro-batch of sample_ddpm.py, whose images these are bit for bit
N_POINTS = 11  # of an interpolation
N_FRAMES = 20  # of an animation at most, as sample_ddpm.py's default
LONGEST_FIELD = 2000  # characters


@dataclass(frozen=True)
class Request:
    """The fields as they were filled in; nothing is checked yet."""

    sampler: str
    skip_type: str
    skip_steps: str
    eta: float = 0.0
    guidance_scale: float = 1.0
    seed: str = "2022"
    n_samples: str = "1"
    labels: tuple[str, ...] = ()
    prompts: str = ""  # one a line
    seed_to: str = ""  # of an interpolation
    source: str = ""  # the folder of an uploaded image
    mode: str = "sample"  # of sample_ddpm.py

    def deterministic(self, own: Mapping) -> Request:
        """For modes in which x_T alone decides: the checkpoint's own sampler and eta give way where they draw noise.

        own: the config's sample section. One that was chosen instead stays, and is refused as on the command line.
        """
        sampler = "ddim" if self.sampler == own["sampler"] and self.sampler in STOCHASTIC else self.sampler
        return replace(self, sampler=sampler, eta=0.0 if self.eta == own["eta"] else self.eta)

    def arguments(self) -> list[str]:
        """Of sample_ddpm.py, but for --weights and --save_dir. Raises InputError for what can't be an argument."""
        found = [] if self.mode == "sample" else ["--mode", self.mode]
        found += ["--n_samples", one(self.n_samples, "n_samples"), "--seed", one(self.seed, "seed")]
        if self.mode == "interpolate":
            found += ["--seed_to", one(self.seed_to, "seed_to"), "--n_interpolate", str(N_POINTS)]
        if self.source:
            found += ["--source", self.source]
        found += ["--sampler", self.sampler, "--skip_type", self.skip_type]
        found += ["--skip_steps", one(self.skip_steps, "skip_steps")]
        if self.sampler in TAKES_ETA:
            found += ["--eta", f"{self.eta:g}"]
        prompts = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        for name, words in (("labels", self.labels), ("prompts", prompts)):
            if words:
                found += [f"--{name}", *(one(word, name) for word in words)]
        if self.labels or prompts:
            found += ["--guidance_scale", f"{self.guidance_scale:g}"]
        return found


def one(text: object, option: str) -> str:
    """A field's text as one argument. Raises InputError for none, and for what would be read as an option."""
    text = str("" if text is None else text).strip()
    if not text:
        raise InputError(f"--{option} is empty: wanted a value")
    if len(text) > LONGEST_FIELD:
        raise InputError(f"--{option}: {len(text):,} characters; at most {LONGEST_FIELD:,} are read")
    if text.startswith("-") and not text[1:].replace(".", "").isdigit():
        raise InputError(f"--{option} {text}: a value can't begin with a dash")
    return text


def check_count(n_samples: int) -> None:
    """Raise InputError for more images than the page draws."""
    if n_samples > MOST_IMAGES:
        raise InputError(f"--n_samples {n_samples}: the page draws at most {MOST_IMAGES}; sample_ddpm.py has no limit")


def animated(arguments: Sequence[str], n_frames: int) -> list[str]:
    """The arguments that make the animation of a request in mode sample."""
    return ["--mode", "denoise", *arguments, "--n_denoise", str(n_frames), "--animate"]


def save_dir(arguments: Sequence[str]) -> str:
    """A folder of their own for the images of these arguments: a command that is repeated finds them there."""
    return f"out/explorer-{hashlib.sha256(repr(list(arguments)).encode()).hexdigest()[:8]}"


def command(fixed: Sequence[str], arguments: Sequence[str], script: Path) -> str:
    """The shell command; fixed: the arguments that say which weights. The script by name where it is at hand."""
    name = script.name if Path(script.name).resolve() == script.resolve() else str(script)
    words = [*fixed, *arguments, "--save_dir", save_dir([*fixed, *arguments])]
    return shlex.join(["python", name, *words])


def fixed_arguments(typed: str, weights: Weights, config_file: str | None, overrides: dict[str, str]) -> list[str]:
    """The arguments that name these very weights, also after the run has gone on; and the keys given for all requests.

    typed: --weights as it was given. overrides: dotted keys; those that the page has a field for are left to it.
    """
    place = Path(typed)
    if (place / "ckpt").is_dir():
        typed = str(weights.file.parent)
    elif place.is_symlink():
        typed = str(place.parent / place.resolve().name)
    found = ["--weights", typed]
    if weights.kind == "raw" and "EMA" in weights.kinds() and not place.is_file():
        found += ["--load_ema", "false"]
    if config_file:
        found += ["-c", config_file]
    fields = ("sampler", "skip_type", "skip_steps", "eta", "guidance_scale")
    kept = {name: value for name, value in overrides.items() if name.removeprefix("sample.") not in fields}
    return found + [word for name, value in kept.items() for word in (f"--{name}", value)]

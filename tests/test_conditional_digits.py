"""What the recipes ddpm_digits_class and ddpm_digits_text promise, judged by a classifier of real digits alone."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from utils import config
from utils.captions import DIGITS, captions_of

pytestmark = pytest.mark.slow
N = 1000
TEXT = config.merge(("", config.read_yaml(ROOT / "configs/ddpm_digits_text.yaml"))).data


@pytest.fixture(scope="module")
def judge() -> SVC:
    """A support-vector classifier, trained on 70 % of the real digits; it gets about 99 % of the others right."""
    pixels, labels = load_digits(return_X_y=True)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        np.round(pixels * 255 / 16) / 255, labels, test_size=0.3, random_state=0, stratify=labels
    )
    found = SVC(gamma=0.25).fit(seen, seen_labels)
    assert found.score(unseen, unseen_labels) >= 0.98
    return found


def digit(prompt: str) -> int:
    last = prompt.split()[-1]
    return DIGITS.index(last) if last in DIGITS else int(last)


def right(judge: SVC, folder: Path, prompts: list[str]) -> np.ndarray:
    """[N] bool: whether image i shows what entry i of the prompts, repeated, says."""
    images = [np.asarray(Image.open(path)).reshape(-1) / 255 for path in sorted(folder.glob("*.png"))]
    return judge.predict(np.stack(images)) == [digit(prompts[i % len(prompts)]) for i in range(len(images))]


def test_labels_are_drawn(judge: SVC, tmp_path: Path) -> None:
    run("train_ddpm.py", "-c", ROOT / "configs/ddpm_digits_class.yaml", "-e", "run", cwd=tmp_path)
    run("sample_ddpm.py", "--weights", "run", "--n_samples", N, "--save_dir", "out", "--labels", "all",
        "--guidance_scale", 2, cwd=tmp_path)  # fmt: skip
    found = right(judge, tmp_path / "out", list(map(str, range(10))))
    assert len(found) == N and found.mean() >= 0.97


def test_prompts_are_drawn_in_both_spellings_and_as_no_training_image_was_called(judge: SVC, tmp_path: Path) -> None:
    prompts = [caption for d in range(10) for caption in captions_of(str(d), TEXT.captions)]
    assert set(TEXT.captions_held_out) < set(prompts) and len(TEXT.captions_held_out) == 10
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    run("train_ddpm.py", "-c", ROOT / "configs/ddpm_digits_text.yaml", "-e", "run", cwd=tmp_path)
    run("sample_ddpm.py", "--weights", "run", "--n_samples", N, "--save_dir", "out", "--prompt_file", "prompts.txt",
        "--guidance_scale", 2, cwd=tmp_path)  # fmt: skip
    found = right(judge, tmp_path / "out", prompts)
    asked = [prompts[i % len(prompts)] for i in range(N)]
    words, unseen = (np.array(list(map(test, asked))) for test in (lambda p: p.split()[-1] in DIGITS,
                                                                    lambda p: p in TEXT.captions_held_out))  # fmt: skip
    for part in (np.ones(N, bool), words, ~words, unseen):
        assert part.sum() >= 100 and found[part].mean() >= 0.97

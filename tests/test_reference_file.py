"""--make_reference FILE.npz: the same scores as from the images, other projects' files, and files that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import call, random_weights, refused
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate_ddpm
from utils import classifier
from utils.config import merge
from utils.errors import InputError
from utils.fidelity import fid
from utils.reference_file import load

CLASSIFIER = ["--feature_extractor", "dataset-classifier"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, digits.npz, and the classifier that it was made with."""
    folder = tmp_path_factory.mktemp("made")
    random_weights(folder / "net", data__valid_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "N_STEPS", 40)
        call(evaluate_ddpm.main, "--make_reference", "digits:all", *CLASSIFIER, "--out", "digits.npz",
             "--evaluate.cache_dir", "cache", "--data.valid_fraction", 0.1, cwd=folder)  # fmt: skip
    next((folder / "cache").glob("dataset-*")).rename(folder / "classifier.safetensors")
    return folder


def evaluate(folder: Path, reference: str, out: str, *args: object) -> dict:
    n = ["--n_samples", 70, "--seed", 3, "--evaluate.kid_subset_size", 50]
    call(evaluate_ddpm.main, "--weights", "net/net.safetensors", "--reference", reference, *CLASSIFIER, *n, *args,
         "--out", out, cwd=folder)  # fmt: skip
    return json.loads((folder / out / "results.json").read_text())["rows"][-1]


def test_a_file_scores_as_its_images_do(made: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "N_STEPS", 40)
        images = evaluate(made, "digits:all", "images", "--evaluate.cache_dir", "cache2")
    stored = evaluate(made, "digits.npz", "stored", "--feature_extractor_weights", "classifier.safetensors")
    assert stored["scores"] == images["scores"] and set(stored["scores"]) > {"fid", "kid", "precision", "isc"}
    assert stored["reference"] == "digits:all" and stored["floor"] is None
    assert stored["protocol"]["reference_sha256"] != images["protocol"]["reference_sha256"]  # a file, not images
    with np.load(made / "digits.npz") as file:
        assert file["mu"].shape == (64,) and file["sigma"].shape == (64, 64)
        about = json.loads(str(file["about"]))
    assert (about["n"], about["size"], about["channels"], about["extractor"]) == (1797, 8, 1, "dataset-classifier")


def test_files_of_pytorch_fid_give_their_fid(tmp_path: Path) -> None:
    """mu and sigma alone, in double precision."""
    torch.manual_seed(0)
    real, made = torch.randn(300, 8), torch.randn(200, 8) * 1.5 + 0.3
    both = {name: value.astype(np.float64) for name, value in fid_features_to_statistics(real).items()}
    np.savez(tmp_path / "cifar10.npz", **both)
    stored = load(tmp_path / "cifar10.npz")
    ours = {name: value.astype(np.float64) for name, value in fid_features_to_statistics(made).items()}
    expected = fid_statistics_to_metric(ours, both, verbose=False)["frechet_inception_distance"]
    assert fid(made, stored.statistics) == expected == pytest.approx(fid(made, real), rel=1e-5)
    options = merge(("test", {"evaluate.metrics": ["fid", "isc"]})).evaluate
    stored.check(options, 32, 3)
    options.metrics = ["fid", "kid"]
    with pytest.raises(InputError, match=r"only their mean and covariance: no kid; use --metrics fid"):
        stored.check(options, 32, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "can't be read as .npz"),
        (b"PK\x03\x04nonsense", "can't be read as .npz"),
        ({"mu": np.zeros(3)}, "it lacks 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "mu and sigma are not"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "mu and sigma are not"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3)), "about": "{"}, "no statistics that can be used"),
        (
            {"mu": np.zeros(3), "sigma": np.zeros((3, 3)), "about": '{"format": 9, "n": 1, "extractor": "x"}'},
            "format 9",
        ),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "can't be read as .npz"),  # a pickle
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path: Path, content, says: str) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(InputError) as error:
        load(path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--reference", "digits.npz"], ["holds features of dataset-classifier", "--feature_extractor"]),
        (["--reference", "digits.npz", *CLASSIFIER], ["give that one's file", "--feature_extractor_weights"]),
        (["--reference", "digits.npz", *CLASSIFIER, "--feature_extractor_weights", "net/net.safetensors"],
         ["holds no dataset-classifier"]),
        (["--reference", "digits.npz", *CLASSIFIER, "--feature_extractor_weights", "other.safetensors"],
         ["other weights of dataset-classifier"]),
        (["--reference", "digits.npz", *CLASSIFIER, "--metrics", "bpd"], ["bpd needs images"]),
        (["--reference", "absent.npz", *CLASSIFIER], ["absent.npz", "can't be read"]),
        (["--make_reference", "digits"], ["--reference"]),
    ],
)  # fmt: skip
def test_statistics_that_do_not_fit_are_refused(made: Path, args: list[str], says: list[str]) -> None:
    other = made / "other.safetensors"
    if not other.exists():
        from safetensors.torch import load_file, save_file

        weights = {name: value + 1 for name, value in load_file(made / "classifier.safetensors").items()}
        from safetensors import safe_open

        with safe_open(made / "classifier.safetensors", "pt") as file:
            save_file(weights, other, file.metadata())
    few = ["--n_samples", 70, "--out", "refused"]
    refused(evaluate_ddpm.main, "--weights", "net/net.safetensors", *args, *few, cwd=made, says=says)


def test_another_size_or_a_wrong_name_is_refused(made: Path, tmp_path: Path) -> None:
    random_weights(tmp_path / "net", data__image_size=16, model__attn_resolutions=[8])
    args = ["--weights", "net/net.safetensors", "--reference", made / "digits.npz", *CLASSIFIER]
    refused(evaluate_ddpm.main, *args, cwd=tmp_path, says=["1 x 8^2 images", "1 x 16^2"])
    args = ["--make_reference", "digits", *CLASSIFIER]
    refused(evaluate_ddpm.main, *args, cwd=tmp_path, says=["--out FILE.npz"])
    refused(evaluate_ddpm.main, *args, "--out", "x", cwd=tmp_path, says=["--out x", "FILE.npz"])
    args = ["--make_reference", "digitz", *CLASSIFIER, "--out", "x.npz"]
    refused(evaluate_ddpm.main, *args, cwd=tmp_path, says=["--make_reference digitz", "did you mean digits"])

"""Scores: closed forms, torch-fidelity itself as the oracle, caches, and what an evaluation opens."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file

from utils import classifier, config
from utils.data import load_splits
from utils.data.image_set import ImageSet
from utils.errors import InputError
from utils.fidelity import fid, open_extractor, scores
from utils.images import file_name, write_png
from utils.reference import features_of, open_for
from utils.scoring import Scorer, check_count

CPU = torch.device("cpu")
INCEPTION = "inception-v3-compat"
METRICS = ["fid", "isc", "kid", "prc"]
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, device=CPU, wait_for_everyone=lambda: None
)


def data_options(**keys):
    return config.merge(("test", {f"data.{name}": value for name, value in keys.items()})).data


@pytest.fixture(autouse=True)
def few_classifier_steps(monkeypatch):
    monkeypatch.setattr(classifier, "N_STEPS", 30)


@pytest.fixture(scope="module")
def digits():
    return load_splits(data_options(valid_fraction=0.2))


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    """A classifier of the digits after a few steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifier, "N_STEPS", 30)
        return classifier.trained(digits["train"], digits["test"], tmp_path_factory.mktemp("cache"), CPU)


@pytest.fixture(scope="module")
def extractor(weights):
    return open_extractor(classifier.NAME, str(weights.path), METRICS, 64, CPU)


# FID


def features_with(mean, covariance, n=200, seed=0):
    """float64 [n, D] whose sample mean and covariance are exactly these."""
    rows = np.random.RandomState(seed).randn(n, len(mean))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return torch.from_numpy(rows @ np.linalg.cholesky(covariance).T + mean)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def gaussian(seed, dim=5):
    rng = np.random.RandomState(seed)
    spread = rng.randn(dim, dim)
    return rng.randn(dim), spread @ spread.T + 0.1 * np.eye(dim)


@pytest.mark.parametrize("seeds", [(1, 2), (3, 4), (5, 5)])
def test_fid_of_two_gaussians_is_the_closed_form(seeds):
    (mean_1, cov_1), (mean_2, cov_2) = (gaussian(seed) for seed in seeds)
    mean_2 = mean_2 + 1
    half = root(cov_1)
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root(half @ cov_2 @ half))
    found = fid(features_with(mean_1, cov_1, 200, 7), features_with(mean_2, cov_2, 333, 8))
    assert found == pytest.approx(expected, rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero_and_fid_is_symmetric():
    a, b = features_with(*gaussian(1)).float(), features_with(*gaussian(2)).float()
    assert abs(fid(a, a)) < 1e-4 and fid(a, b) > 1
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-6)
    assert fid(a, b) == pytest.approx(fid(a[torch.randperm(len(a))], b), rel=1e-4)


# torch-fidelity as the oracle


class Bare(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_scores_are_those_of_torch_fidelity(digits, weights, extractor, tmp_path, kind):
    real = digits["test"].images[:200]
    noise = torch.randint(-60, 61, real.shape, generator=torch.Generator().manual_seed(0))
    generated = (digits["train"].images[:250].roll(1, -1)[:200] + noise).clamp(0, 255).to(torch.uint8)
    inputs = []
    for name, images in (("generated", generated), ("real", real)):
        inputs.append(str(tmp_path / name) if kind == "folder" else Bare(images))
        if kind == "folder":
            (tmp_path / name).mkdir()
            for i, image in enumerate(images):
                write_png(tmp_path / name / file_name(i), image)
    oracle = torch_fidelity.calculate_metrics(
        input1=inputs[0], input2=inputs[1], isc=True, fid=True, kid=True, prc=True, kid_subset_size=100,
        feature_extractor=classifier.NAME, feature_extractor_weights_path=str(weights.path), cuda=False,
        save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    found = scores(METRICS, extractor, extractor(generated.split(90)), extractor([real]), 100)
    names = {"fid": "frechet_inception_distance", "isc": "inception_score_mean", "isc_std": "inception_score_std",
             "kid": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std",
             "precision": "precision", "recall": "recall", "f_score": "f_score"}  # fmt: skip
    assert found.keys() == names.keys()
    for name, theirs in names.items():
        assert found[name] == pytest.approx(oracle[theirs], rel=1e-6, abs=1e-9), name
    assert found["fid"] > 1e-3 and 0 < found["precision"] < 1 and found["isc"] > 1


def test_only_the_metrics_asked_for_are_computed(digits, extractor):
    features = extractor([digits["test"].images[:70]])
    assert set(scores(["fid"], extractor, features, features, 10)) == {"fid"}
    found = scores(["kid"], extractor, features, features, 10_000)  # fewer images than a subset
    assert set(found) == {"kid", "kid_std"}


def test_features_do_not_depend_on_batches(digits, extractor):
    images = digits["test"].images[:100]
    whole = extractor([images])
    parts = dataclasses.replace(extractor, batch_size=9)(images.split(13))
    assert whole.keys() == {"features", "logits"} and whole["features"].shape == (100, 64)
    for layer, value in whole.items():
        assert value.dtype == torch.float32 and torch.allclose(parts[layer], value, atol=1e-4)
    assert extractor.n_features(whole) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_only_uint8_images_are_scored(extractor, dtype):
    with pytest.raises(TypeError, match="uint8"):
        extractor([torch.zeros(2, 1, 8, 8, dtype=dtype)])


def test_a_gray_classifier_reads_gray_as_rgb_alike(digits, extractor):
    images = digits["test"].images[:9]
    gray, rgb = extractor([images]), extractor([images.expand(-1, 3, -1, -1)])
    assert all(torch.equal(gray[layer], rgb[layer]) for layer in gray)
    with pytest.raises(ValueError, match="8-pixel"):
        extractor([torch.zeros(1, 1, 16, 16, dtype=torch.uint8)])


# The dataset classifier


def changed_labels(images):
    return ImageSet(images.name, images.images, (images.labels + 1) % 10, images.classes)


def test_the_classifier_learns_and_is_trained_once(digits, weights, monkeypatch):
    assert weights.test_accuracy > 0.5
    before = torch.random.get_rng_state()
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("trained again"))
    assert classifier.trained(digits["train"], digits["test"], weights.path.parent, CPU) == weights
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_the_classifier_is_repeatable_and_leaves_torchs_generator_alone(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "N_STEPS", 3)
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        trained = classifier.trained(digits["train"], digits["test"], tmp_path / str(seed), CPU)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append((trained.path.name, load_file(trained.path)))
    (name, first), (other_name, second) = found
    assert name == other_name and all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_other_data_is_another_classifier(digits, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "N_STEPS", 2)
    train, test = digits["train"], digits["test"]
    half = train.subset(torch.arange(700), train.name)
    cases = [(train, test), (changed_labels(train), test), (train, changed_labels(test)), (train, None), (half, test)]
    found = [classifier.trained(*case, tmp_path, CPU) for case in cases]
    monkeypatch.setattr(classifier, "N_STEPS", 3)
    found.append(classifier.trained(train, test, tmp_path, CPU))
    assert len({trained.path for trained in found}) == len(found) == len(list(tmp_path.iterdir()))
    assert found[3].test_accuracy is None and found[0].test_accuracy is not None


def test_a_test_split_without_labels_has_no_accuracy(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "N_STEPS", 2)
    plain = ImageSet("plain", digits["test"].images, None, [])
    assert classifier.trained(digits["train"], plain, tmp_path, CPU).test_accuracy is None


def test_the_classifier_needs_labels(digits, tmp_path):
    for labels, classes in ((None, []), (digits["train"].labels * 0, ["one"])):
        with pytest.raises(InputError, match="needs labels"):
            classifier.trained(ImageSet("plain", digits["train"].images, labels, classes), None, tmp_path, CPU)


# Cached features


def test_cached_features_are_never_stale(digits, extractor, tmp_path):
    images = digits["test"].subset(torch.arange(20), "digits:test")
    calls = []

    def find(images, **changes):
        """(features, files that are new, times that the network was run)."""
        files = set(tmp_path.iterdir())
        calls.clear()
        value = features_of(images, dataclasses.replace(extractor, **changes), tmp_path, ALONE)
        return value, len(set(tmp_path.iterdir()) - files), len(calls)

    hook = extractor.net.register_forward_hook(lambda *_: calls.append(None))

    first, new, extracted = find(images)
    assert (new, extracted) == (1, 1)
    again, new, extracted = find(images)
    assert (new, extracted) == (0, 0) and again.keys() == first.keys()
    assert all(torch.equal(again[layer], first[layer]) for layer in first)
    other = ImageSet(images.name, images.images.clone(), images.labels, images.classes)
    other.images[7, 0, 3, 3] ^= 1
    for case in (other, images.subset(torch.arange(19), images.name)):
        assert find(case)[1:] == (1, 1)
    for change in ({"weights_sha256": "0" * 64}, {"layers": {"fid": "features"}}, {"name": "other"}):
        assert find(images, **change)[1:] == (1, 1)
    assert not torch.equal(find(other)[0]["features"], first["features"])
    for path in tmp_path.glob("features-*"):
        path.write_bytes(path.read_bytes()[:100])
    again, new, extracted = find(images)  # damaged files are made again
    assert (new, extracted) == (0, 1) and all(torch.equal(again[layer], first[layer]) for layer in first)
    hook.remove()


def test_a_damaged_classifier_file_is_made_again(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "N_STEPS", 2)
    first = classifier.trained(digits["train"], digits["test"], tmp_path, CPU)
    whole = {name: value.clone() for name, value in load_file(first.path).items()}  # not a view of the file
    first.path.write_bytes(first.path.read_bytes()[:100])
    assert classifier.trained(digits["train"], digits["test"], tmp_path, CPU) == first
    again = load_file(first.path)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


# An evaluation


@pytest.fixture
def scorer(digits, extractor):
    features = {split: extractor([found.images]) for split, found in digits.items()}
    reference = SimpleNamespace(name="digits:train", images=digits["train"], train=digits["train"], test=digits["test"])
    options = config.merge(("test", {"evaluate.kid_subset_size": 50}))
    return Scorer(ALONE, options, reference, extractor, features["train"], features["train"], features["test"], 0.9)


def test_too_few_images_are_refused_unless_forced(scorer, capsys):
    def check(n, force, real=scorer.reference):
        check_count(n, scorer.extractor, real, force)

    check(64, False)
    assert "@64" in "".join(capsys.readouterr())
    with pytest.raises(InputError, match=r"63 images.*64 dimensions.*--force"):
        check(63, False)
    check(63, True)
    with pytest.raises(InputError, match=r"9 images.*at least 10"):
        check(9, True)
    few = SimpleNamespace(images=scorer.reference.images.subset(torch.arange(63), "digits:train"))
    with pytest.raises(InputError, match=r"reference digits:train.* 63 images"):
        check(1000, False, few)
    check(1000, True, few)
    capsys.readouterr()
    check(10_000, True)
    assert not "".join(capsys.readouterr())


def test_the_floor_is_the_score_of_real_training_images(scorer, digits, extractor):
    floor = scorer.floor(300)
    rows = [i * 1438 // 300 for i in range(300)]
    real = extractor([digits["train"].images[rows]])
    expected = scores(METRICS, extractor, real, extractor([digits["test"].images]), 50)
    assert floor["floor"] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert "300 of digits:train" in floor["floor_label"] and "digits:test (359)" in floor["floor_label"]
    scorer.real_test, scorer.reference.test = None, digits["test"].subset(torch.arange(3), "digits:test")
    assert scorer.floor(200) == {"floor": None, "floor_label": "test split of 3 images is too small"}
    scorer.reference.test = None
    assert scorer.floor(200) == {"floor": None, "floor_label": "no test split"}


def test_an_evaluation_opens_with_the_classifier_of_its_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "N_STEPS", 5)
    recipe = config.read_yaml(Path(__file__).parent.parent / "configs" / "ddpm_digits.yaml")
    options = config.merge(("recipe", recipe), ("test", {"evaluate.cache_dir": str(tmp_path / "cache")}))
    opened = Scorer.open(ALONE, options, open_for(ALONE, options, "digits", None, {}), 100, None, False)
    assert opened.test_accuracy is not None
    assert (len(opened.real["features"]), len(opened.real_test["features"])) == (1617, 180)
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["dataset", "features", "features"]
    options.evaluate.feature_extractor_weights = "x.pth"
    with pytest.raises(InputError, match="trains its own"):
        Scorer.open(ALONE, options, open_for(ALONE, options, "digits", None, {}), 100, None, False)

"""Hostile files: nothing in them runs or is written outside, no bomb goes off, and one line says what is wrong."""

import gzip
import hashlib
import io
import pickle
import resource
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from in_process import call, random_weights, refused
from omegaconf import OmegaConf
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from test_fidelity import ALONE, CPU, INCEPTION, data_options
from test_fuzz_checkpoints import SMALL, forge
from torchvision.datasets import CIFAR10

import evaluate_ddpm
import sample_ddpm
import train_ddpm
from utils import checkpoint, classifier
from utils.data import load_splits
from utils.data.decode import image_header, read_image
from utils.errors import InputError
from utils.fidelity import open_extractor
from utils.reference import features_of

FORMS = ("pickle", "zip", "legacy")


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return __import__("os").mkdir, (self.path,)


def plant(path: Path, marker: Path, form: str) -> Path:
    """A file that makes the folder `marker` when it is unpickled, as pickle or torch.save write it."""
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state": Payload(marker)}))
    else:
        torch.save({"state": Payload(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture
def marker(tmp_path_factory):
    """Where the payload would leave its mark; it is looked for after the test."""
    path = tmp_path_factory.mktemp("marker") / "executed"
    yield path
    assert not path.exists(), "the file's code was run"


@contextmanager
def little_memory(n_bytes: int = 2**28):
    """At most n_bytes more than are in use."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_the_payload_works_and_memory_is_bounded(tmp_path):
    for form in FORMS:
        path, made = plant(tmp_path / form, tmp_path / f"made by {form}", form), tmp_path / f"made by {form}"
        (pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False))
        assert made.is_dir()
    with little_memory(), pytest.raises(MemoryError):
        bytearray(2**29)


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    call(train_ddpm.main, "-e", folder / "run", *SMALL, cwd=folder)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run whose newest checkpoint is to be changed."""
    (tmp_path / "cwd").mkdir()
    return shutil.copytree(finished, tmp_path / "cwd" / "run")


def one_line(main, *args, cwd: Path, says: str) -> None:
    error = call(main, *args, cwd=cwd, status=2).stderr
    assert error.count("\n") == 1 and error.startswith(f"{main.__module__}.py: error: ") and says in error, error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "ema.safetensors", "state.json", "config.yaml"])
def test_a_payload_in_a_checkpoint_never_runs(run, marker, name, form):
    folder = run / "ckpt" / "step000002"
    plant(folder / name, marker, form)
    forge(folder)
    assert checkpoint.problem(folder) is None
    line = call(train_ddpm.main, "-r", folder, cwd=run.parent, status=2).stderr.splitlines()[-1]
    assert line.startswith("train_ddpm.py: error: ") and name in line and not marker.exists()
    asked = ("--weights", folder, "--load_ema", "ema" in name, "--n_samples", 1, "--skip_steps", 1, "--save_dir", "out")
    if name in ("optimizer.pt", "state.json"):
        call(sample_ddpm.main, *asked, cwd=run.parent)  # reads neither
    else:
        one_line(sample_ddpm.main, *asked, cwd=run.parent, says=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors"])
def test_weights_that_are_pickled_are_refused(tmp_path, marker, suffix, form):
    path = plant(random_weights(tmp_path).with_suffix(suffix), marker, form)
    refused(sample_ddpm.main, "--weights", path, "--n_samples", 1, "--save_dir", "out", cwd=tmp_path, says=[str(path)])


@pytest.mark.parametrize("form", FORMS)
def test_a_payload_for_the_extractor_is_refused(tmp_path, marker, form):
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.new("L", (8, 8), i).save(tmp_path / "images" / f"{i}.png")
    path = plant(tmp_path / "inception.pth", marker, form)
    args = ("--images", "images", "--reference", "digits", "--feature_extractor", INCEPTION)
    refused(evaluate_ddpm.main, *args, "--feature_extractor_weights", path, cwd=tmp_path, says=[str(path)])


# Caches


@pytest.mark.parametrize("form", [*FORMS, "other tensors"])
def test_a_planted_cache_is_made_again(tmp_path, monkeypatch, marker, form):
    monkeypatch.setattr(classifier, "N_STEPS", 2)
    digits = load_splits(data_options(valid_fraction=0.9))

    def find():
        """(the cached classifier, the cached features, the features)."""
        path = classifier.trained(digits["train"], digits["test"], tmp_path, CPU).path
        extractor = open_extractor(classifier.NAME, str(path), ["fid"], 64, CPU)
        found = features_of(digits["train"], extractor, tmp_path, ALONE)
        return path, next(tmp_path.glob("features-*")), found.get("features", torch.empty(0))

    *files, first = find()
    for file in reversed(files):  # the features first: another classifier would have other ones
        if form == "other tensors":
            save_file({"x": torch.zeros(3)}, file)
        else:
            plant(file, marker, form)
        assert torch.allclose(find()[2], first, atol=1e-4)
        assert load_file(file).keys() != {"x"}


# Data sets


@pytest.fixture
def no_network(monkeypatch):
    def fails(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fails)


def test_a_payload_among_the_batches_of_cifar_never_runs(tmp_path, marker, no_network):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")]:
        plant(folder / name, marker, "pickle")
    for download in (False, True):
        with pytest.raises(InputError, match="CIFAR-10 is not in"):
            load_splits(data_options(name="cifar10", root=str(tmp_path), download=download))


@pytest.mark.parametrize("checked", [True, False], ids=["sum differs", "sum agrees"])
def test_an_archive_does_not_write_outside(tmp_path, monkeypatch, no_network, checked):
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        for name in ("../../escaped", str(tmp_path / "escaped")):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo(CIFAR10.base_folder)
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    if not checked:
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest())
    with pytest.raises(InputError, match="CIFAR-10 is not in"):
        load_splits(data_options(name="cifar10", root=str(root), download=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not (root / CIFAR10.base_folder).is_symlink()


def idx(*shape: int, data: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


BOMB = gzip.compress(idx(9, 28, 28)) + gzip.compress(bytes(2**26)) * 32  # 2 GiB
HEADERS = {
    "billions": idx(2**32 - 1, 28, 28), "terabytes": idx(2**20, 2**10, 2**10), "wraps to 0": idx(2**31, 2**31, 4),
    "no pixel": idx(9, 0, 28), "nothing": idx(0), "255 dimensions": bytes([0, 0, 8, 255]) + bytes(4 * 255),
    "fewer dimensions": idx(9, 784, data=bytes(9 * 784)), "more dimensions": idx(9, 1, 28, 28, data=bytes(9 * 784)),
    "other kind": b"\0\0\x0d" + idx(9, 28, 28, data=bytes(9 * 784))[3:],
}  # fmt: skip


@pytest.mark.parametrize("how", [*HEADERS, "gzip bomb"])
@pytest.mark.parametrize("which", ["images-idx3", "labels-idx1"])
def test_a_hostile_idx_file_is_named(tmp_path, how, which):
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(9, 28, 28, data=bytes(9 * 784)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(9, data=bytes(9)))
    options = data_options(name="mnist", root=str(tmp_path), image_size=32, download=False)
    assert len(load_splits(options)["train"]) == 9
    (tmp_path / f"train-{which}-ubyte").unlink()
    name = f"train-{which}-ubyte" + (".gz" if how == "gzip bomb" else "")
    (tmp_path / name).write_bytes(BOMB if how == "gzip bomb" else HEADERS[how])
    with little_memory(), pytest.raises(InputError, match=f"{name}|in the train files"):
        load_splits(options)


# Configurations

TAGS = ["!!python/object/apply:os.mkdir [{0}]", "!!python/object/new:os.mkdir [{0}]", "!!python/name:os.mkdir"]
TEXTS = [*TAGS, "'${{touch:{0}}}'", "'${{oc.env:HOME}}'", "'${{oc.create:{{a: 1}}}}'", "'${{${{touch:x}}}}'"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_runs_nothing(run, marker, text):
    OmegaConf.register_new_resolver("touch", lambda *_: marker.mkdir(), replace=True)
    value, cwd = text.format(marker), run.parent
    stored, given = run / "ckpt/step000002/config.yaml", cwd / "given.yaml"
    for content in (f"data: {{root: {value}}}", f"model: {{dim_mults: [1, {value}]}}", f"? {value}\n: 1", value):
        given.write_text(content)
        stored.write_text(content)
        forge(stored.parent)
        one_line(train_ddpm.main, "-c", given, "--print_config", cwd=cwd, says="given.yaml")
        one_line(train_ddpm.main, "-r", run, "--print_config", cwd=cwd, says="config.yaml")
        one_line(sample_ddpm.main, "--weights", run, "--print_config", cwd=cwd, says="config.yaml")
    if "$" in text:
        one_line(train_ddpm.main, "--data.root", value.strip("'"), "--print_config", cwd=cwd, says="data.root")


def test_the_tags_and_the_resolver_work(tmp_path):
    for i, text in enumerate(TAGS[:2]):
        yaml.unsafe_load(text.format(tmp_path / str(i)))
        assert (tmp_path / str(i)).is_dir()
    OmegaConf.register_new_resolver("touch", lambda path: Path(path).mkdir(), replace=True)
    assert OmegaConf.create({"a": f"${{touch:{tmp_path / 'made'}}}"}).a is None and (tmp_path / "made").is_dir()


# Images


def png(width: int, height: int) -> bytes:
    """A gray PNG that declares its size and holds nine bytes."""
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [14_000, 100_000, 2**31 - 1])
def test_an_image_bomb_is_refused_by_name(tmp_path, size):
    """The smallest is just above the bound."""
    weights, folder = random_weights(tmp_path / "weights"), tmp_path / "images"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "good.png")
    assert read_image(folder / "good.png", 1).shape == (1, 8, 8)
    for i in range(2):
        (folder / ("good.png" if i else "bomb.png")).write_bytes(png(size, size))
    Image.new("L", (8, 8)).save(tmp_path / "8.png")
    bomb, made = str(folder / "bomb.png"), ("--weights", weights, "--n_samples", 1, "--save_dir", "out")
    with little_memory():
        for read in (lambda: read_image(bomb, 3), lambda: image_header(Path(bomb))):
            with pytest.raises(InputError, match=r"bomb\.png"):
                read()
        inpaint = (*made, "--mode", "inpaint", "--source")
        refused(sample_ddpm.main, *inpaint, folder, "--mask", "left", cwd=tmp_path, says=[bomb])
        refused(sample_ddpm.main, *inpaint, "digits", "--mask", bomb, cwd=tmp_path, says=[bomb])
        refused(evaluate_ddpm.main, "--images", folder, "--reference", "digits", cwd=tmp_path, says=[bomb])
        data = ("--data.name", "image_folder", "--data.root", folder, "--data.num_workers", 0)
        data += ("--data.valid_fraction", 0, "-e", "run")
        refused(train_ddpm.main, *SMALL, *data, cwd=tmp_path, says=[bomb])


def test_pillow_does_not_warn_beside_the_one_line(tmp_path):
    """Below the bound it only suspects a bomb."""
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"large\.png declares 10000x10000 pixels"):
            image_header(tmp_path / "large.png")


def test_postscript_in_an_image_file_is_not_interpreted(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: called.append(1) or Image.new("L", (8, 8)).im)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a.eps").write_text(text)
    Image.open(tmp_path / "a.eps").load()
    assert called  # Pillow alone would run it
    called.clear()
    (tmp_path / "a.png").write_text(text)
    for read in (lambda: read_image(tmp_path / "a.png", 1), lambda: image_header(tmp_path / "a.png")):
        with pytest.raises(InputError, match=r"a\.png"):
            read()
    assert not called

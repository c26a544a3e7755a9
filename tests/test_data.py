"""Data sources: what they read, how channels and sizes come about, and what they say about files they can't read."""

import gzip
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from utils import config
from utils.data import DATASETS, idx, join, load_splits
from utils.data.decode import MAX_PIXELS, read_image
from utils.data.image_set import fit, to_channels
from utils.errors import InputError


def options(**keys):
    return config.merge(("test", {f"data.{name}": value for name, value in keys.items()})).data


def rows(images):
    """Every image of a set with its label, as sortable bytes."""
    return sorted(bytes([images.labels[i]]) + images[i].numpy().tobytes() for i in range(len(images)))


# Digits


def test_digits_are_complete_and_scaled_by_rounding():
    sets = load_splits(options())
    assert list(sets) == ["train"] and sets["train"].name == "digits:train" and len(sets["train"]) == 1797
    bunch = sklearn.datasets.load_digits()
    level = [round(x * 255 / 16) for x in range(17)]
    assert level[0] == 0 and level[16] == 255
    expected = np.vectorize(level.__getitem__)(bunch.images.astype(int))
    assert sets["train"].images.shape == (1797, 1, 8, 8) and sets["train"].images.dtype == torch.uint8
    assert np.array_equal(sets["train"].images[:, 0].numpy(), expected)
    assert np.array_equal(sets["train"].labels.numpy(), bunch.target)
    assert sets["train"].classes == list("0123456789")


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_split_is_disjoint_complete_and_always_the_same(fraction):
    whole = load_splits(options())["train"]
    first, again = (load_splits(options(valid_fraction=fraction)) for _ in range(2))
    assert len(first["test"]) == round(fraction * 1797) and len(first["train"]) + len(first["test"]) == 1797
    assert sorted(rows(first["train"]) + rows(first["test"])) == rows(whole)
    assert all(torch.equal(first[split].images, again[split].images) for split in first)
    assert first["test"].labels.unique().tolist() == list(range(10))
    assert not torch.equal(first["test"].images, whole.images[: len(first["test"])])
    assert first["test"].name == "digits:test"


def test_a_split_that_leaves_nothing_or_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"data\.valid_fraction"):
        load_splits(options(valid_fraction=0.9999))
    with pytest.raises(InputError, match=r"data\.valid_fraction"):
        join(load_splits(options()), "test")


def test_split_all_joins_both():
    sets = load_splits(options(valid_fraction=0.1))
    both = join(sets, "all")
    assert both.name == "digits:all" and rows(both) == rows(load_splits(options())["train"])
    assert join(sets, "train") is sets["train"]


@pytest.mark.parametrize("size, channels", [(8, 3), (16, 1)])
def test_digits_take_the_size_and_channels_asked_for(size, channels):
    images = load_splits(options(image_size=size, channels=channels))["train"].images
    assert images.shape == (1797, channels, size, size)


# IDX files

N_IMAGES = {"train": 12, "t10k": 11}
GRAY = {split: np.random.RandomState(n).randint(0, 256, (n, 28, 28), np.uint8) for split, n in N_IMAGES.items()}


def write_idx(path, array, zipped):
    raw = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_name(path.name + ".gz") if zipped else path
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


def write_mnist(folder, zipped=False):
    """The four files; returns their paths."""
    paths = []
    for split, images in GRAY.items():
        paths.append(write_idx(folder / f"{split}-images-idx3-ubyte", images, zipped))
        labels = np.arange(len(images), dtype=np.uint8) % 10
        paths.append(write_idx(folder / f"{split}-labels-idx1-ubyte", labels, zipped))
    return paths


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name, where", [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")])
def test_idx_files_are_found_and_read(tmp_path, name, where, zipped):
    write_mnist(tmp_path / where, zipped)
    sets = load_splits(options(name=name, root=str(tmp_path), image_size=28, download=False))
    for split, stem in (("train", "train"), ("test", "t10k")):
        assert np.array_equal(sets[split].images[:, 0].numpy(), GRAY[stem])
        assert sets[split].labels.tolist() == [i % 10 for i in range(len(GRAY[stem]))]
        assert sets[split].name == f"{name}:{split}" and len(sets[split].classes) == 10


def test_28_pixels_become_32_by_a_black_border(tmp_path):
    write_mnist(tmp_path)
    images = load_splits(options(name="mnist", root=str(tmp_path), image_size=32, channels=3))["train"].images
    assert images.shape == (12, 3, 32, 32)
    assert np.array_equal(images.numpy(), np.pad(GRAY["train"], ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, 1))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("keep", [0, 3, 6, 0.5, -1])
def test_a_truncated_idx_file_is_named(tmp_path, zipped, which, keep):
    path = write_mnist(tmp_path, zipped)[which]
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=re.escape(path.name)):
        load_splits(options(name="mnist", root=str(tmp_path), image_size=28))


def test_labels_that_do_not_match_the_images_are_refused(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(11, np.uint8), False)
    with pytest.raises(InputError, match="12 images but 11 labels"):
        load_splits(options(name="mnist", root=str(tmp_path), image_size=28))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_files_without_download_are_one_clear_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(idx, "DEBIAN", {})
    if name == "mnist":
        write_mnist(tmp_path)[1].unlink()  # three of the four files are not enough
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*data.download is false"):
        load_splits(options(name=name, root=str(tmp_path), image_size=32, channels=3, download=False))


def test_the_schema_names_the_registered_data_sets():
    assert config.KEYS["data.name"].choices == tuple(DATASETS)


# Folders of images

COLORS = {"red": (220, 20, 30), "green": (10, 200, 40), "blue": (30, 60, 210)}


def plain(mode, color, size=(6, 9)):
    return Image.new(mode, size, color)


def save(path, image, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)
    return path


def palette(transparent):
    """A palette image of one green entry, which is transparent or not."""
    image = plain("P", 3)
    image.putpalette([255, 0, 0] * 3 + [10, 200, 40] + [0, 0, 255] * 252)
    if transparent:
        image.info["transparency"] = 3
    return image


def deep(level):
    return Image.fromarray(np.full((9, 6), level, np.uint16))


FILES = {
    "gray.png": (plain("L", 200), (200, 200, 200)),
    "gray.jpg": (plain("L", 100), (100, 100, 100)),
    "bit.png": (plain("1", 1), (255, 255, 255)),
    "rgb.png": (plain("RGB", (10, 200, 40)), (10, 200, 40)),
    "rgb.JPG": (plain("RGB", (10, 200, 40)), (10, 200, 40)),
    "rgb.jpeg": (plain("RGB", (30, 60, 210)), (30, 60, 210)),
    "rgb.webp": (plain("RGB", (220, 20, 30)), (220, 20, 30)),
    "palette.png": (palette(False), (10, 200, 40)),
    "palette_transparent.png": (palette(True), (255, 255, 255)),
    "opaque.png": (plain("RGBA", (10, 200, 40, 255)), (10, 200, 40)),
    "transparent.png": (plain("RGBA", (10, 200, 40, 0)), (255, 255, 255)),
    "half.png": (plain("RGBA", (0, 100, 255, 51)), (204, 224, 255)),  # a fifth of the colour over white
    "transparent.webp": (plain("RGBA", (10, 200, 40, 0)), (255, 255, 255)),
    "gray_alpha.png": (plain("LA", (0, 51)), (204, 204, 204)),
    "deep.png": (deep(200 * 257), (200, 200, 200)),
    "deep_dark.png": (deep(255), (1, 1, 1)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_every_mode_becomes_the_channels_asked_for(tmp_path, name, channels):
    image, color = FILES[name]
    pixels = read_image(save(tmp_path / name, image), channels)
    assert pixels.dtype == torch.uint8 and pixels.shape == (channels, 9, 6)
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    expected = torch.tensor(color if channels == 3 else [luma])[:, None, None]
    tolerance = 0.55 if name.endswith("png") else 4  # PNG is exact, up to the rounding of luma
    assert (pixels - expected).abs().max() <= tolerance


def test_png_pixels_are_exact(tmp_path):
    levels = np.random.RandomState(0).randint(0, 256, (9, 6, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(levels))
    assert np.array_equal(read_image(path, 3).numpy(), levels.transpose(2, 0, 1))


def folder_set(root, **more):
    return load_splits(options(name="image_folder", root=str(root), **more))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_mixed_files_has_one_shape(tmp_path, channels):
    for i, (name, (image, _)) in enumerate(FILES.items()):
        save(tmp_path / ("deep" if i % 2 else "") / name, image.resize((5 + 3 * i, 40 - i)))
    save(tmp_path / ".hidden.png", plain("L", 0))
    (tmp_path / "notes.txt").write_text("not an image")
    found = folder_set(tmp_path, image_size=8, channels=channels)["train"]
    assert len(found) == len(FILES) and found.labels is None and found.n_bytes() == len(FILES) * channels * 64
    assert {tuple(found[i].shape) for i in range(len(found))} == {(channels, 8, 8)}


def test_the_class_is_the_first_folder_level(tmp_path):
    for folder, color in (("blue/x/y", "blue"), ("blue", "blue"), ("green", "green"), ("red/x", "red")):
        save(tmp_path / folder / "1.png", plain("RGB", COLORS[color]))
    found = folder_set(tmp_path, channels=3)["train"]
    assert found.classes == ["blue", "green", "red"] and found.name == f"{tmp_path.name}:train"
    assert sorted(found.labels.tolist()) == [0, 0, 1, 2]
    for i, label in enumerate(found.labels):
        assert tuple(found[i][:, 0, 0].tolist()) == COLORS[found.classes[label]]


@pytest.mark.parametrize("where", [("", ""), ("only", "only"), ("red", "")])
def test_folders_that_name_no_classes_have_no_labels(tmp_path, where):
    for i, folder in enumerate(where):
        save(tmp_path / folder / f"{i}.png", plain("L", i))
    assert folder_set(tmp_path)["train"].labels is None


@pytest.mark.parametrize("other", ["test", "val", "valid", "validation"])
def test_train_and_test_folders_are_splits(tmp_path, other):
    for folder, color in (("train", "red"), ("train", "blue"), (other, "red"), (other, "blue"), (other, "red")):
        save(tmp_path / folder / color / "x" / "1.png", plain("RGB", COLORS[color]))
        save(tmp_path / folder / color / f"{folder}.png", plain("RGB", COLORS[color]))
    sets = folder_set(tmp_path, channels=3)
    assert {split: (len(found), found.classes) for split, found in sets.items()} == dict.fromkeys(
        ("train", "test"), (4, ["blue", "red"])
    )
    test = sets["test"]
    assert all(test.source.paths[i].is_relative_to(tmp_path / other) for i in test.ids.tolist())


def test_a_class_without_test_images_does_not_shift_the_labels_of_the_others(tmp_path):
    for color in COLORS:
        save(tmp_path / "train" / color / "1.png", plain("RGB", COLORS[color]))
    for color in ("blue", "red"):
        save(tmp_path / "test" / color / "1.png", plain("RGB", COLORS[color]))
    sets = folder_set(tmp_path, channels=3)
    for found in sets.values():
        for i, label in enumerate(found.labels):
            assert tuple(found[i][:, 0, 0].tolist()) == COLORS[sets["train"].classes[label]]


def test_a_test_class_without_training_images_is_refused(tmp_path):
    for folder in ("train/a", "train/b", "test/a", "test/new"):
        save(tmp_path / folder / "1.png", plain("L", 0))
    with pytest.raises(InputError, match="class new"):
        folder_set(tmp_path)


def test_splits_of_which_one_has_no_classes_can_be_joined(tmp_path):
    for folder in ("train/a", "train/b", "test"):
        save(tmp_path / folder / "1.png", plain("L", 0))
    sets = folder_set(tmp_path)
    assert sets["train"].labels.tolist() == [0, 1] and sets["test"].labels is None
    both = join(sets, "all")
    assert len(both) == 3 and both.labels is None


def test_other_folders_beside_train_make_classes_not_splits(tmp_path):
    for folder in ("train", "test", "car"):
        save(tmp_path / folder / "1.png", plain("L", 0))
    sets = folder_set(tmp_path)
    assert list(sets) == ["train"] and sets["train"].classes == ["car", "test", "train"]


def test_held_out_images_of_a_folder_keep_their_labels(tmp_path):
    for i in range(10):
        save(tmp_path / ("a" if i < 5 else "b") / f"{i}.png", plain("L", i, (8, 8)))
    sets = folder_set(tmp_path, valid_fraction=0.3)
    assert len(sets["test"]) == 3
    seen = [(int(s[i][0, 0, 0]), int(s.labels[i])) for s in sets.values() for i in range(len(s))]
    assert sorted(seen) == [(i, i // 5) for i in range(10)]
    assert sets["train"].content_hash() != sets["test"].content_hash()


def test_files_are_read_for_their_hash_once(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", plain("L", i, (8, 8)))
    images, read = folder_set(tmp_path)["train"], []
    monkeypatch.setattr(images, "source", SimpleNamespace(read=lambda i: read.append(i) or b"file"))
    assert images.content_hash() == images.content_hash()
    assert read == [0, 1, 2]


@pytest.mark.parametrize("keep", [0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_truncated_image_is_named(tmp_path, suffix, keep):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8))
    path = save(tmp_path / f"broken.{suffix}", noise)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(InputError, match=rf"broken\.{suffix}"):
        folder_set(tmp_path, channels=3)["train"][0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [100_000, 15_000])
def test_a_picture_that_declares_too_many_pixels_is_refused_by_name(tmp_path, side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    assert side**2 > MAX_PIXELS
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(InputError, match=r"bomb\.png.* pixels"):
        folder_set(tmp_path)["train"][0]


@pytest.mark.parametrize("kind, text", [("missing", "does not exist"), ("file", "not a folder"), ("empty", "holds no")])
def test_no_folder_or_no_image_is_an_error(tmp_path, kind, text):
    root = tmp_path / "place"
    if kind == "file":
        root.write_text("")
    elif kind == "empty":
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=text):
        folder_set(root)


# Sizes and channels


def test_resizing_is_antialiased():
    board = (torch.arange(72)[:, None] + torch.arange(72)[None, :]) % 2 * 255  # every ninth pixel is black, white, ...
    small = fit(board.to(torch.uint8)[None], 8)
    assert small.shape == (1, 8, 8) and (small - 127.5).abs().max() <= 4


@pytest.mark.parametrize("wide", [True, False])
def test_the_shorter_side_is_resized_and_the_centre_kept(wide):
    image = torch.zeros(3, 16, 48, dtype=torch.uint8)
    image[0, :, :16], image[1, :, 16:32], image[2, :, 32:] = 255, 255, 255
    cut = fit(image if wide else image.transpose(1, 2), 16)
    assert torch.equal(cut, image[:, :, 16:32] if wide else image[:, :, 16:32].transpose(1, 2))
    half = fit(image if wide else image.transpose(1, 2), 8)[:, 2:6, 2:6]  # away from the colours' borders
    assert half.shape == (3, 4, 4) and half[1].min() > 250 and half[[0, 2]].max() < 5


def test_channels_are_made_by_rounded_luma_and_by_repetition():
    gray = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    rgb = to_channels(gray, 3)
    assert rgb.shape == (3, 16, 16) and all(torch.equal(channel, gray[0]) for channel in rgb)
    assert torch.equal(to_channels(rgb, 1), gray)  # truncating would darken 255 of the 256 levels
    noise = torch.randint(0, 256, (5, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    luma = torch.einsum("nchw,c->nhw", noise.float(), torch.tensor([0.299, 0.587, 0.114]))[:, None]
    assert (to_channels(noise, 1) - luma).abs().max() <= 0.6
    assert to_channels(noise, 3) is noise

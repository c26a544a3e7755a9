"""Data sets in archives and databases: the same images as from files, prepared as published, and bad ones named."""

import builtins
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import lmdb
import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image

from utils.data import load_splits
from utils.data.batches import Batches
from utils.errors import InputError


def options(**changes) -> SimpleNamespace:
    base = {"name": "image_folder", "image_size": 8, "channels": 3, "valid_fraction": 0.0, "download": False}
    return SimpleNamespace(**base | {name: str(v) if isinstance(v, Path) else v for name, v in changes.items()})


def photo(i: int, width: int, height: int) -> Image.Image:
    """Smooth and noisy at once, so that a filter and a place show."""
    y, x = np.mgrid[:height, :width] / 40 + i
    noise = np.random.RandomState(i).randint(0, 60, (height, width, 3))
    return Image.fromarray((np.stack([np.sin(x), np.cos(y), np.sin(x * y)], -1) * 90 + 100 + noise).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


PNGS = [encoded(photo(i, 12, 8 + i)) for i in range(10)]


def in_folder(root: Path, names: list[str]) -> Path:
    for name, data in zip(names, PNGS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def in_zip(path: Path, names: list[str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in zip(names, PNGS):
            archive.writestr(name, data)
        archive.writestr("notes.txt", "no image")
        archive.writestr("__MACOSX/._a.png", "no image either")
    return path


def in_lmdb(path: Path, values: dict[str, bytes]) -> Path:
    env = lmdb.open(str(path), map_size=2**26)
    with env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    env.close()
    return path


def in_parquet(path: Path, images: list[bytes], labels: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": datasets.Image()} | ({"label": datasets.ClassLabel(names=["a", "b"])} if labels else {})
    table = {"image": [{"bytes": data, "path": None} for data in images]} | ({"label": labels} if labels else {})
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(str(path))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """datasets keeps an Arrow copy of what it reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def stack(images) -> torch.Tensor:
    return torch.stack([images[i] for i in range(len(images))])


# --- zip archives ---

CLASSES = [f"{'ab'[i % 2]}/deep/{i}.png" for i in range(10)]
SPLIT = [f"{'train' if i < 6 else 'val'}/{'ab'[i % 2]}/{i}.png" for i in range(10)]
FLAT = [f"{i}.png" for i in range(10)]


@pytest.mark.parametrize("names", [CLASSES, SPLIT, FLAT])
@pytest.mark.parametrize("wrapper", ["", "images/all/"])
def test_a_zip_archive_is_the_folder_that_was_packed(tmp_path, names, wrapper):
    files = load_splits(options(root=in_folder(tmp_path / "x", names)))
    packed = load_splits(options(root=in_zip(tmp_path / "x.zip", [wrapper + name for name in names])))
    assert list(files) == list(packed)
    for split, found in files.items():
        other = packed[split]
        assert (found.name, found.classes, len(found)) == (other.name, other.classes, len(other))
        assert torch.equal(stack(found), stack(other)) and found.content_hash() == other.content_hash()
        assert (found.labels is None and other.labels is None) or torch.equal(found.labels, other.labels)


def batches_of(images, num_workers: int) -> torch.Tensor:
    stream = Batches(images, 0, 4, cache="false", num_workers=num_workers)
    return torch.stack([pixels for _, pixels in stream.from_step(0, 6)])


def test_workers_read_every_source_alike(tmp_path):
    """A handle that forks share would mix up what they read."""
    values = {f"{i:03d}": data for i, data in enumerate(PNGS)}
    in_lmdb(tmp_path / "cat", values)
    in_parquet(tmp_path / "p/train-00000.parquet", PNGS)
    folder = in_folder(tmp_path / "x", FLAT)
    sets = [
        load_splits(options(root=folder))["train"],
        load_splits(options(root=in_zip(tmp_path / "x.zip", FLAT)))["train"],
        load_splits(options(name="huggingface", root=tmp_path / "p"))["train"],
    ]
    alone = batches_of(sets[0], 0)
    for images in sets:
        images[0]  # opened before the fork
        assert torch.equal(batches_of(images, 2), alone) and torch.equal(batches_of(images, 0), alone)
    cats = load_splits(options(name="lsun_cat", root=tmp_path))["train"]
    assert cats[0] is not None and torch.equal(batches_of(cats, 2), batches_of(cats, 0))


# --- data sets as published ---


def by_pillow(image: Image.Image, size: int) -> np.ndarray:
    """torchvision's Resize and CenterCrop on Pillow images, which the DDIM authors use, in Pillow's own words."""
    scale = size / min(image.size)
    width, height = (size if side == min(image.size) else int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def celeba(root: Path, packed: bool = False) -> list[Image.Image]:
    faces, root = [photo(i, 178, 218) for i in range(9)], root / "celeba"
    root.mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(9)]
    files = {name: encoded(face, "JPEG", quality=95) for name, face in zip(names, faces)}
    if packed:
        with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"img_align_celeba/{name}", data)
    else:
        (root / "img_align_celeba").mkdir()
        for name, data in files.items():
            (root / "img_align_celeba" / name).write_bytes(data)
    parts = [0, 0, 2, 0, 1, 0, 2, 1, 0]
    (root / "list_eval_partition.txt").write_text("".join(f"{n} {part}\n" for n, part in zip(names, parts)))
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files.values()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 32])
def test_celeba_is_cut_and_split_as_the_ddim_authors_do(tmp_path, packed, size):
    faces = celeba(tmp_path, packed)
    sets = load_splits(options(name="celeba", root=tmp_path, image_size=size))
    assert [sets[split].ids.tolist() for split in ("train", "test")] == [[0, 1, 3, 5, 8], [2, 6]]
    for images in sets.values():
        for i, face in zip(images.ids.tolist(), stack(images)):
            theirs = by_pillow(faces[i].crop((89 - 64, 121 - 64, 89 + 64, 121 + 64)), size)
            assert np.array_equal(face.numpy(), theirs)


@pytest.mark.parametrize(
    ("name", "folder", "splits"),
    [
        ("lsun_bedroom", "bedroom_train_lmdb", ["train"]),
        ("lsun_bedroom", "lsun/bedroom_train_lmdb", ["train", "test"]),
        ("lsun_church", "church_outdoor_train_lmdb", ["train", "test"]),
        ("lsun_cat", "cat", ["train"]),
    ],
)
def test_lsun_is_resized_and_cut_as_the_ddim_authors_do(tmp_path, name, folder, splits):
    rooms = [photo(i, 70 + 5 * i, 64 if i % 2 else 90) for i in range(6)]
    webp = {f"{i:040x}": encoded(room, "WEBP", lossless=True) for i, room in enumerate(rooms)}
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    in_lmdb(tmp_path / folder, webp)
    if "test" in splits:
        in_lmdb(tmp_path / folder.replace("train", "val"), dict(list(webp.items())[:2]))
    sets = load_splits(options(name=name, root=tmp_path, image_size=32))
    assert list(sets) == splits and sets["train"].name == f"{name}:train"
    for found, room in zip(stack(sets["train"]), rooms):
        assert np.array_equal(found.numpy(), by_pillow(room, 32))
    held_out = load_splits(options(name=name, root=tmp_path, image_size=32, valid_fraction=0.34))
    assert len(held_out["train"]) == 4 and len(held_out["test"]) == 2


def test_ffhq_is_split_as_the_ddim_authors_do(tmp_path):
    faces = [encoded(photo(i, 16, 16)) for i in range(20)]
    values = {f"16-{i:05d}": data for i, data in enumerate(faces)} | {"length": b"20", "8-00000": faces[0]}
    in_lmdb(tmp_path / "FFHQ", values)
    sets = load_splits(options(name="ffhq", root=tmp_path, image_size=16))
    before = np.random.get_state()
    np.random.seed(2019)
    indices = list(range(20))
    np.random.shuffle(indices)
    np.random.set_state(before)
    assert sets["train"].ids.tolist() == sorted(indices[:18]) and sets["test"].ids.tolist() == sorted(indices[18:])
    for split in sets.values():
        for i, image in zip(split.ids.tolist(), stack(split)):
            assert np.array_equal(image.numpy(), np.asarray(Image.open(io.BytesIO(faces[i]))).transpose(2, 0, 1))
    for i, data in enumerate(faces):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / f"files/{i:05d}.png").write_bytes(data)
    files = load_splits(options(name="ffhq", root=tmp_path / "files", image_size=16))
    assert torch.equal(stack(files["train"]), stack(sets["train"]))


def test_parquet_gives_images_labels_and_splits(tmp_path):
    in_parquet(tmp_path / "d/train-00000-of-00002.parquet", PNGS[:4], [0, 1, 1, 0])
    in_parquet(tmp_path / "d/train-00001-of-00002.parquet", PNGS[4:7], [1, 1, 1])
    in_parquet(tmp_path / "d/test-00000-of-00001.parquet", PNGS[7:], [0, 0, 1])
    sets = load_splits(options(name="huggingface", root=tmp_path / "d"))
    files = load_splits(options(root=in_folder(tmp_path / "x", FLAT)))["train"]
    assert torch.equal(torch.cat([stack(sets["train"]), stack(sets["test"])]), stack(files))
    assert sets["train"].classes == ["a", "b"] and sets["train"].labels.tolist() == [0, 1, 1, 0, 1, 1, 1]
    assert sets["test"].labels.tolist() == [0, 0, 1]
    alone = load_splits(options(name="huggingface", root=in_parquet(tmp_path / "faces.parquet", PNGS)))
    assert list(alone) == ["train"] and alone["train"].name == "faces:train" and alone["train"].labels is None


# --- what is wrong is named ---


def test_broken_archives_are_named(tmp_path):
    path = in_zip(tmp_path / "x.zip", FLAT, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(PNGS[3]) + len(PNGS[3]) // 2] ^= 1
    path.write_bytes(raw)
    images = load_splits(options(root=path))["train"]
    assert images[2] is not None
    with pytest.raises(InputError, match=r"x\.zip:3\.png can't be read: Bad CRC-32"):
        images[3]
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"x\.zip can't be read: File is not a zip file"):
        load_splits(options(root=path))
    in_zip(path, [])
    with pytest.raises(InputError, match="holds no png"):
        load_splits(options(root=path))


def test_zip_bombs_and_locked_ones_are_refused(tmp_path):
    path = in_zip(tmp_path / "x.zip", FLAT[:1])
    raw = path.read_bytes()
    entry = raw.index(b"PK\x01\x02")
    for offset, data, why in ((24, b"\xff\xff\xff\x7f", "declares 2,147,483,647 bytes"), (8, b"\x01\x00", "encrypted")):
        changed = bytearray(raw)
        changed[entry + offset : entry + offset + len(data)] = data
        path.write_bytes(changed)
        with pytest.raises(InputError, match=why):
            load_splits(options(root=path))


def test_an_archive_that_inflates_beyond_its_word_is_cut_off(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**24))
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")  # uncompressed size
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a\.png can't be read"):
        load_splits(options(root=path))["train"][0]


@pytest.mark.parametrize(
    ("name", "files", "says"),
    [
        ("celeba", {}, ["CelebA is not in", "img_align_celeba", "list_eval_partition.txt"]),
        ("celeba", {"list_eval_partition.txt": b"1.jpg 0\n"}, ["CelebA is not in"]),
        ("celeba", {"list_eval_partition.txt": b"9.jpg 0\n8.jpg 2\n", "img_align_celeba/1.png": PNGS[0]},
         ["lacks 2 of the 2", "9.jpg"]),
        ("celeba", {"list_eval_partition.txt": b"1.png zero\n", "img_align_celeba/1.png": PNGS[0]},
         ["list_eval_partition.txt can't be read", "0, 1 or 2"]),
        ("celeba", {"list_eval_partition.txt": b"1.png 0\n", "img_align_celeba/1.png": PNGS[0]}, ["test split"]),
        ("lsun_bedroom", {}, ["bedroom", "bedroom_train_lmdb", "data.mdb"]),
        ("lsun_church", {"church_outdoor_train_lmdb/data.mdb": b"x" * 9000}, ["can't be read"]),
        ("ffhq", {}, ["holds no png"]),
        ("huggingface", {"a.txt": b""}, ["neither a .parquet file nor a folder"]),
        ("huggingface", {"a.parquet": b"PAR1"}, ["can't be read as parquet files"]),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(tmp_path, name, files, says):
    for file, data in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError) as error:
        load_splits(options(name=name, root=tmp_path))
    assert not [part for part in says if part not in str(error.value)], error.value


def test_faces_of_another_size_are_not_celebas(tmp_path):
    celeba(tmp_path)
    (tmp_path / "celeba/img_align_celeba/000001.jpg").write_bytes(encoded(photo(0, 64, 64), "JPEG"))
    with pytest.raises(InputError, match="178x218 pixels, this one 64x64"):
        load_splits(options(name="celeba", root=tmp_path))["train"][0]


def test_an_lmdb_of_another_kind_is_not_ffhqs(tmp_path):
    in_lmdb(tmp_path / "FFHQ", {"a": PNGS[0]})
    with pytest.raises(InputError, match="no number under the key `length`"):
        load_splits(options(name="ffhq", root=tmp_path))
    in_lmdb(tmp_path / "other/FFHQ".replace("/", "-"), {"length": b"20", "256-00000": PNGS[0]})
    with pytest.raises(InputError, match="lacks the key 8-00000"):
        load_splits(options(name="ffhq", root=tmp_path / "other-FFHQ"))


def test_a_table_without_images_says_what_it_has(tmp_path):
    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(path)
    with pytest.raises(InputError, match="no column of images: it has text, n"):
        load_splits(options(name="huggingface", root=path))
    in_parquet(tmp_path / "u.parquet", PNGS[:1])
    held = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]})
    held.to_parquet(str(tmp_path / "v.parquet"))
    in_folder(tmp_path, ["secret.png"])
    with pytest.raises(InputError, match="row 0 holds no image"):  # a file may not name others of this machine
        load_splits(options(name="huggingface", root=tmp_path / "v.parquet"))["train"][0]


@pytest.mark.parametrize("missing", ["lmdb", "datasets"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    in_lmdb(tmp_path / "cat", {"a": PNGS[0]})
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    name = {"lmdb": "lsun_cat", "datasets": "huggingface"}[missing]
    with pytest.raises(InputError, match=f"package {missing} is missing: pip install"):
        load_splits(options(name=name, root=tmp_path))


# --- python -m utils.data check ---


def check(cwd: Path, *args: object, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.data", "check", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done


def test_check_counts_and_shows_what_is_there(tmp_path):
    root, sheet = in_folder(tmp_path / "x", SPLIT), tmp_path / "out/sheet.png"
    (root / "train/a/broken.png").write_bytes(PNGS[0][:100])
    wanted = ["--data.name", "image_folder", "--data.root", root, "--data.image_size", 16, "--data.channels", 3]
    done = check(tmp_path, *wanted, "--sheet", sheet, "--data.num_workers", 2, status=1)
    for line in ("x:train: 7 images", "x:test: 4 images", "a 4, b 3", "12x8 (1)", "have a side below 16", "1 broken"):
        assert line in done.stdout, done.stdout
    assert f"BROKEN      image {root}/train/a/broken.png can't be read" in done.stdout
    assert max(Image.open(sheet).size) >= 512
    (root / "train/a/broken.png").unlink()
    assert check(tmp_path, *wanted, "--sheet", sheet).stdout.endswith("every image is good\n")


def test_check_refuses_what_it_can_not_do(tmp_path):
    for args, says in (
        (["--data.name", "image_folder", "--data.root", tmp_path / "no"], "does not exist"),
        (["--data.channels", 2], "wanted 1 (gray) or 3 (RGB)"),
        (["--data.size", 2], "unknown key data.size; did you mean"),
    ):
        done = check(tmp_path, *args, status=2)
        assert says in done.stderr and done.stderr.count("\n") == 1

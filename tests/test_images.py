"""Pictures on disk, and the folder that holds samples and nothing else."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from utils.captioned import captioned_grid
from utils.errors import InputError
from utils.images import PngWriter, enlarge, file_name, grid, read_png, strip, write_png
from utils.sample_folder import check_folder, missing, sample_paths, start_folder


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# Pictures


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 5, 9), (3, 1, 1)])
def test_a_png_holds_the_exact_pixels(tmp_path, shape):
    picture, path = noise(*shape), tmp_path / "a.png"
    write_png(path, picture.flip(-1).flip(-1))
    assert torch.equal(read_png(path), picture)
    image = Image.open(path)
    assert image.mode == ("L" if shape[0] == 1 else "RGB")
    assert np.array_equal(np.asarray(image).reshape(*shape[1:], shape[0]), picture.permute(1, 2, 0).numpy())
    assert list(tmp_path.iterdir()) == [path]


def test_all_256_levels_survive_and_a_second_write_replaces(tmp_path):
    path, levels = tmp_path / "a.png", torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    write_png(path, noise(3, 4, 4))
    write_png(path, levels.transpose(1, 2))  # not contiguous
    assert torch.equal(read_png(path), levels.transpose(1, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_the_images_row_by_row_on_white(channels):
    images = noise(7, channels, 4, 5)
    picture = grid(images, n_columns=3, padding=2)
    assert picture.shape == (channels, 3 * 6 + 2, 3 * 7 + 2) and picture.dtype == torch.uint8
    rest = picture.clone()
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 7
        assert torch.equal(picture[:, top : top + 4, left : left + 5], image)
        rest[:, top : top + 4, left : left + 5] = 255
    assert bool((rest == 255).all())


@pytest.mark.parametrize("n, columns, rows", [(64, 8, 8), (2, 1, 2), (10, 3, 4), (12, 3, 4)])
def test_grid_is_near_square(n, columns, rows):
    assert grid(noise(n, 1, 8, 8)).shape == (1, rows * 10 + 2, columns * 10 + 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_of_one_image_shows_it(channels):
    image = noise(1, channels, 8, 8)
    picture = grid(image)
    border = (picture.shape[-1] - 8) // 2
    assert picture.shape[0] == channels
    assert torch.equal(picture[:, border : border + 8, border : border + 8], image[0])


def test_strip_puts_frames_side_by_side():
    frames = noise(3, 3, 4, 5)
    picture = strip(frames)
    assert picture.shape == (3, 4, 15)
    assert all(torch.equal(picture[:, :, 5 * i : 5 * i + 5], frame) for i, frame in enumerate(frames))


@pytest.mark.parametrize("height, width, at_least", [(8, 8, 512), (82, 82, 512), (3, 10, 32), (600, 20, 512)])
def test_enlarge_repeats_pixels_until_the_longer_side_is_long_enough(height, width, at_least):
    picture = noise(1, height, width)
    large = enlarge(picture, at_least)
    factor = large.shape[1] // height
    assert large.shape == (1, factor * height, factor * width)
    assert torch.equal(large[:, factor // 2 :: factor, factor // 2 :: factor], picture)
    assert torch.equal(large, picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    assert max(large.shape) >= at_least and (factor == 1 or (factor - 1) * max(height, width) < at_least)


# Writing in threads


def test_the_writer_writes_everything(tmp_path):
    images, writer = noise(1300, 1, 2, 2), PngWriter(tmp_path)  # more than may wait
    for i, image in enumerate(images):
        writer.write(i, image)
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(1300)]
    assert all(torch.equal(read_png(tmp_path / file_name(i)), images[i]) for i in range(0, 1300, 100))


@pytest.mark.parametrize("bad", ["folder", "picture"])
def test_an_error_in_a_thread_surfaces_at_close(tmp_path, bad):
    writer = PngWriter(tmp_path if bad == "picture" else tmp_path / "nowhere")
    writer.write(0, noise(1, 2, 2))
    writer.write(1, noise(1, 2, 2) if bad == "folder" else torch.zeros(7, 2, 2, dtype=torch.uint8))
    writer.write(2, noise(1, 2, 2))
    with pytest.raises(FileNotFoundError if bad == "folder" else TypeError):
        writer.close()
    assert bad == "folder" or {path.name for path in tmp_path.iterdir()} == {"000000.png", "000002.png"}


@pytest.mark.parametrize("index, name", [(0, "000000.png"), (49_999, "049999.png"), (1_234_567, "1234567.png")])
def test_file_names(tmp_path, index, name):
    assert file_name(index) == name
    assert sample_paths(tmp_path, 3) == [tmp_path / file_name(i) for i in range(3)]


# The sample folder

IDENTITY = {"weights_sha256": "ab" * 32, "sampler": "ddim", "eta": 0.0, "timesteps": [0, 20, 40], "seed": 2022}


def test_a_folder_with_the_same_protocol_goes_on(tmp_path):
    folder = tmp_path / "deep" / "samples"
    check_folder(folder, IDENTITY)  # not there yet
    assert not folder.parent.exists()
    start_folder(folder, IDENTITY, {"hardware": "one"})
    for i in (0, 2, 1_234_567):
        write_png(folder / file_name(i), noise(1, 2, 2))
    check_folder(folder, dict(reversed(IDENTITY.items())))
    assert missing(folder, 5) == [1, 3, 4] and missing(folder, 0) == []
    start_folder(folder, IDENTITY, {"hardware": "other"})  # circumstances may change
    assert json.loads((folder / "protocol.json").read_text()) == {"identity": IDENTITY, "hardware": "other"}
    assert missing(folder, 5) == [1, 3, 4]


def test_missing_counts_only_sample_names(tmp_path):
    for name in ("000001.png", "0002.png", "000003.png.tmp", ".000004.png.tmp", "x000000.png", "000000-grid.png"):
        (tmp_path / name).write_bytes(b"")
    assert missing(tmp_path, 5) == [0, 2, 3, 4]
    assert missing(tmp_path / "not made yet", 2) == [0, 1]


@pytest.mark.parametrize("name, value, shown", [
    ("sampler", "fixed-large", ["ddim", "fixed-large"]),
    ("eta", 0.5, ["0.0", "0.5"]),
    ("timesteps", [0, 10], ["[0, 20, 40]", "[0, 10]"]),
    ("weights_sha256", "cd" * 32, ["abab", "cdcd"]),
    ("precision", "bf16", ["null", "bf16"]),
])  # fmt: skip
def test_another_protocol_is_refused_and_its_field_named(tmp_path, name, value, shown):
    start_folder(tmp_path, IDENTITY, {})
    with pytest.raises(InputError) as error:
        check_folder(tmp_path, {**IDENTITY, name: value})
    assert all(text in str(error.value) for text in [str(tmp_path), name, *shown])
    start_folder(tmp_path / "new", {**IDENTITY, name: value}, {})
    with pytest.raises(InputError, match=name):
        check_folder(tmp_path / "new", IDENTITY)


def test_a_folder_that_holds_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"holiday\.png"):
        check_folder(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", ["notes.txt", "000000-grid.png", "0001.png", "more"])
def test_a_foreign_file_beside_the_samples_is_refused(tmp_path, name):
    start_folder(tmp_path, IDENTITY, {})
    write_png(tmp_path / file_name(0), noise(1, 2, 2))
    check_folder(tmp_path, IDENTITY)
    (tmp_path / name).mkdir() if name == "more" else (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=name):
        check_folder(tmp_path, IDENTITY)


def test_a_path_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for refuse in (lambda: check_folder(path, IDENTITY), lambda: start_folder(path, IDENTITY, {})):
        with pytest.raises(InputError, match="save_dir"):
            refuse()


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"identity": 5}', '{"identity": null}'])
def test_a_protocol_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "protocol.json").write_text(text)
    with pytest.raises(InputError, match=r"protocol\.json"):
        check_folder(tmp_path, IDENTITY)


def test_half_written_files_of_a_killed_process_are_cleared(tmp_path):
    start_folder(tmp_path, IDENTITY, {})
    write_png(tmp_path / file_name(0), noise(1, 2, 2))
    for name in (".000001.png.tmp", ".protocol.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    check_folder(tmp_path, IDENTITY)
    start_folder(tmp_path, IDENTITY, {})
    assert {path.name for path in tmp_path.iterdir()} == {"000000.png", "protocol.json"}


def test_a_process_killed_before_its_protocol_was_whole_can_start_again(tmp_path):
    (tmp_path / ".protocol.json.tmp").write_bytes(b"half")
    check_folder(tmp_path, IDENTITY)
    start_folder(tmp_path, IDENTITY, {})
    assert {path.name for path in tmp_path.iterdir()} == {"protocol.json"}


def test_captions_stand_under_their_images_and_titles_beside_their_rows():
    image = torch.full((1, 8, 8), 128, dtype=torch.uint8)
    plain = captioned_grid([[image] * 3] * 2)
    assert plain.shape == (1, 4 + 2 * 68, 4 + 3 * 68) and (plain == 128).sum() == 6 * 64 * 64
    texts = [["seven", "a very long caption that can not fit", ""], ["", "", "x"]]
    below = captioned_grid([[image] * 3] * 2, texts)
    assert below.shape[1] == plain.shape[1] + 2 * 15 + 15 and (below == 128).sum() >= 6 * 64 * 64
    dark = lambda picture, x, y: bool((picture[0, y : y + 30, x : x + 64] < 100).any())
    assert dark(below, 4, 68) and dark(below, 72, 68) and not dark(below, 140, 68)
    beside = captioned_grid([[image] * 3] * 2, beside=["scale 0", "scale 1"])
    assert beside.shape[1] == plain.shape[1] and beside.shape[2] > plain.shape[2] + 20
    assert captioned_grid([[image.expand(3, -1, -1)]], [["x"]]).shape[0] == 3

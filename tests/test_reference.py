"""What --reference names: data sets with a split, and folders."""

import pytest
from PIL import Image
from test_fidelity import data_options

from utils.data import load_splits
from utils.data.image_folder import load_as_is
from utils.errors import InputError
from utils.reference import open_reference


def test_a_reference_is_a_data_set_with_a_split():
    data = data_options(valid_fraction=0.2)
    digits = load_splits(data)
    for text, n in (("digits", 1438), ("digits:train", 1438), ("digits:test", 359), ("digits:all", 1797)):
        found = open_reference(text, data.copy(), {}, 8, 1)
        assert found.name == (text if ":" in text else "digits:train") and len(found.images) == n
        assert found.train.content_hash() == digits["train"].content_hash()
        assert found.test.content_hash() == digits["test"].content_hash()


def test_a_reference_without_a_test_split_has_none():
    assert open_reference("digits", data_options(), {}, 8, 1).test is None
    with pytest.raises(InputError, match="no test split"):
        open_reference("digits:test", data_options(), {}, 8, 1)


@pytest.mark.parametrize("text, says", [
    ("digits:nope", ["digits:nope", "train", "test", "all"]),
    ("nope", ["nope", "digits", "cifar10"]),
    ("digitz", ["did you mean digits"]),
    ("/nowhere/at/all", ["/nowhere/at/all", "folder"]),
    ("image_folder", ["image_folder", "folder"]),
])  # fmt: skip
def test_a_reference_that_does_not_exist_says_what_would(text, says):
    with pytest.raises(InputError) as error:
        open_reference(text, data_options(valid_fraction=0.2), {}, 8, 1)
    assert all(part in str(error.value) for part in ["--reference", *says])


def test_a_folder_is_a_reference(tmp_path):
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20, 10), color).save(tmp_path / f"{i}.png")
    data = data_options(valid_fraction=0.5)
    found = open_reference(str(tmp_path), data, {}, 8, 3)
    assert len(found.images) == 3 and found.test is None and found.images[2].shape == (3, 8, 8)
    assert found.name == f"{tmp_path.name}:train" and data == data_options(valid_fraction=0.5)


def test_a_folder_of_splits_gives_each(tmp_path):
    tmp_path = tmp_path / "12:30"
    for split, colors in {"train": ["red", "blue"], "test": ["green"]}.items():
        (tmp_path / split / "class").mkdir(parents=True)
        for color in colors:
            Image.new("RGB", (8, 8), color).save(tmp_path / split / "class" / f"{color}.png")
    sizes = {end: len(open_reference(f"{tmp_path}{end}", None, {}, 8, 3).images) for end in ("", ":test", ":all")}
    assert sizes == {"": 2, ":test": 1, ":all": 3}
    own = data_options(name="image_folder", root=str(tmp_path), image_size=8, channels=3)
    assert open_reference(f"{tmp_path}:test", own, {}, 8, 3).name == f"{tmp_path.name}:test"
    with pytest.raises(InputError, match="the splits are train, test, all"):
        open_reference(f"{tmp_path}:valid", None, {}, 8, 3)


def test_another_data_set_takes_its_own_recipe_and_the_size_of_the_images(tmp_path):
    data = data_options(name="image_folder", root=str(tmp_path), image_size=16, channels=3)
    before = data.copy()
    found = open_reference("digits:test", data, {}, 16, 3)
    assert found.name == "digits:test" and found.images[0].shape == (3, 16, 16) and data == before


def test_without_a_checkpoint_a_data_set_is_that_of_its_recipe_and_of_the_keys_given():
    found = open_reference("digits", None, {}, 8, 1)
    assert (len(found.train), len(found.test)) == (1617, 180)
    found = open_reference("digits", None, {"data.valid_fraction": "0.5", "data.name": "cifar10"}, 8, 1)
    assert (len(found.train), len(found.test)) == (899, 898)
    with pytest.raises(InputError, match="elsewhere"):
        open_reference("cifar10", data_options(), {"data.root": "elsewhere", "data.download": "false"}, 32, 3)


def test_a_folder_to_score_keeps_its_size_and_colours(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "0.png")
    assert load_as_is(str(tmp_path), "--images").channels == 1
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "1.png")
    found = load_as_is(str(tmp_path), "--images")
    assert (found.channels, found.size, len(found)) == (3, 8, 2)
    Image.new("RGB", (8, 6)).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"0\.png is 8x8, 2\.png 8x6"):
        load_as_is(str(tmp_path), "--images")


def test_opening_a_reference_leaves_the_configuration_as_it_is():
    data = data_options()
    assert open_reference("digits", data, {}, 16, 3).images[0].shape == (3, 16, 16)
    assert data == data_options()

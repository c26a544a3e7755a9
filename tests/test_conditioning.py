"""What the network is told: tokens, embeddings, cross-attention, and what training draws of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from in_process import KEYS
from PIL import Image
from torch import nn

from diffusions.interpolation import interpolated_conditions
from models import build_model
from models.conditioning import PAD, START, ClassCondition, CrossAttention, TextCondition, tokenize
from utils import config, constraints
from utils.captions import captions_of, read_conditions, spellings
from utils.data import load_splits
from utils.data.conditions import Conditions, as_in_data, cond_of
from utils.data.image_set import ImageSet
from utils.errors import InputError

NAMES = ["0", "7", "T-shirt/top"]


def numbered(n: int = 30, captions: list[str] | None = None) -> ImageSet:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    return ImageSet("numbered:train", images, torch.arange(n) % 3, NAMES, captions)


def cfg_of(**more: object) -> config.DictConfig:
    keys = {name.replace("__", "."): value for name, value in more.items()}
    return config.merge(("test", KEYS | {"model.text_length": 24, "model.text_dim": 32} | keys))


def settled(images: ImageSet | None = None, **more: object) -> tuple[config.DictConfig, Conditions]:
    cfg = cfg_of(**more)
    return cfg, Conditions.settled(cfg, images or numbered(), "cpu")


def test_tokens_are_the_bytes_in_lower_case() -> None:
    found = tokenize(["Ab", "", "é"], 5)
    assert found.tolist() == [[START, 98, 99, PAD, PAD], [START, *[PAD] * 4], [START, 0xC3 + 1, 0xA9 + 1, PAD, PAD]]
    with pytest.raises(ValueError, match="5 bytes, but at most 4"):
        tokenize(["seven"], 5)


@pytest.mark.parametrize("name, words", [
    ("7", ["7", "seven"]), ("0", ["0", "zero"]), ("07", ["07"]), ("12", ["12"]), ("T-shirt/top", ["t-shirt", "top"]),
    ("Ankle boot", ["ankle boot"]), ("tabby_cat", ["tabby cat"]), ("/", ["/"]),
])  # fmt: skip
def test_spellings(name: str, words: list[str]) -> None:
    assert spellings(name) == words


def test_captions_are_every_template_with_every_spelling() -> None:
    assert captions_of("7", ["{}", "The digit {}"]) == ["7", "seven", "the digit 7", "the digit seven"]


def test_a_dropped_share_is_a_function_of_seed_and_position() -> None:
    _, conditions = settled(model__condition="class", train__condition_dropout=0.2)
    positions = torch.arange(20_000)
    ids = positions % 30
    labels = conditions.of(5, positions, ids, 0.2)["label"]
    dropped = labels == 3
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(labels[~dropped], (ids % 3)[~dropped])
    for part in (positions[7:9], positions[100:5000]):  # whatever the batch
        assert torch.equal(conditions.of(5, part, ids[part], 0.2)["label"], labels[part])
    assert not torch.equal(conditions.of(6, positions, ids, 0.2)["label"], labels)
    assert torch.equal(conditions.of(5, positions, ids)["label"], ids % 3)
    assert (conditions.of(5, positions, ids, 1.0)["label"] == 3).all()


def test_captions_are_drawn_evenly_and_held_out_ones_never() -> None:
    templates, held = ["{}", "a {}", "the digit {}"], ["a 7", "the digit zero"]
    _, conditions = settled(model__condition="text", data__captions=templates, data__captions_held_out=held)
    positions = torch.arange(9000)
    texts = conditions.texts(0, positions, positions % 30)
    by_class = {name: [text for i, text in enumerate(texts) if NAMES[i % 3] == name] for name in NAMES}
    for name, found in by_class.items():
        allowed = [text for text in captions_of(name, templates) if text not in held]
        assert set(found) == set(allowed)
        assert all(found.count(text) == pytest.approx(3000 / len(allowed), rel=0.15) for text in allowed)
    tokens = conditions.of(0, positions[:100], positions[:100] % 30, 0.5)["tokens"]
    empty = (tokens[:, 1] == PAD).tolist()
    assert 30 < sum(empty) < 70
    assert torch.equal(tokens[~torch.tensor(empty)], tokenize([t for t, e in zip(texts, empty) if not e], 24))


def test_the_configuration_learns_the_classes_and_templates() -> None:
    cfg, conditions = settled(model__condition="text")
    assert list(cfg.model.classes) == NAMES and list(cfg.data.captions) == ["{}"]
    assert conditions.shown(torch.arange(4))["tokens"].tolist() == tokenize(["0", "7", "t-shirt", "0"], 24).tolist()
    cfg, conditions = settled(model__condition="class")
    assert conditions.shown([0, 1, 5])["label"].tolist() == [0, 1, 2]
    assert Conditions.settled(cfg, numbered(), "cpu", resumed=True).n_classes == 3
    cfg.model.classes = ["x", "y"]
    with pytest.raises(InputError, match="not those of numbered"):
        Conditions.settled(cfg, numbered(), "cpu", resumed=True)
    assert Conditions.settled(cfg, numbered(), "cpu").n_classes == 3  # in a new run the data decides
    texts = [f"image {i}" for i in range(30)]
    cfg, conditions = settled(numbered(captions=texts), model__condition="text")
    assert not cfg.model.classes and cfg.data.captions is None
    assert conditions.texts(0, torch.arange(3), torch.tensor([4, 4, 9])) == ["image 4", "image 4", "image 9"]
    cfg, conditions = settled()
    assert conditions.of(0, torch.arange(3), torch.arange(3)) == {} and conditions.shown([0]) is None


PLAIN = ImageSet("plain", torch.zeros(3, 1, 8, 8), None, [])
TEXT = {"model__condition": "text"}


@pytest.mark.parametrize("images, keys, says", [
    (PLAIN, {"model__condition": "class"}, "needs labels, and plain has"),
    (PLAIN, TEXT, "metadata.jsonl"),
    (numbered(), TEXT | {"data__captions": ["a very long template indeed {}"]}, "model.text_length"),
    (numbered(), TEXT | {"data__captions_held_out": ["a 9"]}, "'a 9' is no caption"),
    (numbered(), TEXT | {"data__captions_held_out": ["0", "zero"]}, "leaves no caption for the class 0"),
    (numbered(captions=["x"] * 29 + [None]), TEXT, "image 29 of numbered:train has no text"),
    (numbered(captions=["x \ud800"] * 30), TEXT, "image 0 of numbered:train is not valid Unicode"),
    (numbered(captions=["x" * 24] * 30), TEXT, "24 bytes, so wanted at least 25"),
])  # fmt: skip
def test_data_that_does_not_fit_is_refused(images: ImageSet, keys: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        settled(images, **keys)


@pytest.mark.parametrize("text, says", [
    (None, "image 29 of numbered:train has no text"),
    ("x" * 24, "24 bytes, so wanted at least 25"),
    ("\ud800", "is not valid Unicode"),
])  # fmt: skip
def test_texts_of_other_splits_and_references_are_checked_as_well(text: str | None, says: str) -> None:
    good, bad = numbered(captions=["x"] * 30), numbered(captions=["x"] * 29 + [text])
    cfg, _ = settled(good, model__condition="text")
    with pytest.raises(InputError, match=says):
        Conditions(cfg, bad, "cpu")
    with pytest.raises(InputError, match=says):
        as_in_data(cfg, bad, 10)


def test_labels_as_in_the_data_are_a_permutation_and_do_not_depend_on_n() -> None:
    cfg, _ = settled(model__condition="class")
    images = numbered(30)
    images.labels = torch.tensor([0] * 20 + [1] * 9 + [2])
    asked, labels = as_in_data(cfg, images, 60)
    assert labels[:30].bincount().tolist() == [20, 9, 1] == labels[30:].bincount().tolist()
    assert as_in_data(cfg, images, 12)[0].entries == asked.entries[:12]
    assert cond_of(asked, 24, [1, 61])["label"].tolist() == [asked.entries[1], asked.entries[1]]


# ---------------------------------------------------------------------------------------------------------- networks


def test_no_class_starts_at_zero() -> None:
    condition = ClassCondition(3, 8)
    assert not condition(**condition.null(2))["emb"].any()
    assert condition(torch.arange(3))["emb"].abs().min() > 0


def text_condition() -> TextCondition:
    torch.manual_seed(0)
    return TextCondition(32, 2, 12, 16).eval()


def test_padding_is_not_read() -> None:
    """The same text in a longer window gives the same; and the text decides."""
    short, long = text_condition(), text_condition()
    long.position = nn.Parameter(torch.cat([short.position, torch.randn(4, 32)]))
    for name in ("token", "blocks", "norm", "pool"):
        setattr(long, name, getattr(short, name))
    found, wanted = (net(tokenize(["seven", "3"], n)) for net, n in ((short, 12), (long, 16)))
    assert torch.allclose(found["emb"], wanted["emb"], atol=1e-6)
    assert torch.allclose(found["context"][0, :6], wanted["context"][0, :6], atol=1e-6)
    assert found["presence"].sum(1).tolist() == [6, 2]
    assert (found["emb"][0] - found["emb"][1]).abs().max() > 0.01


def test_cross_attention_starts_as_if_there_were_no_text() -> None:
    torch.manual_seed(0)
    layer, x = CrossAttention(8, 32, 2, 4), torch.randn(2, 8, 4, 4)
    text = text_condition()(tokenize(["a", "bcd"], 12))
    found = layer(x, text["context"], text["presence"])
    assert (found - x).abs().max() < 1e-3


def test_absent_tokens_have_no_weight_and_a_share_of_presence_scales_it() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(8, 32, 2, 4)
    nn.init.normal_(layer.proj_out.weight)
    x, context = torch.randn(1, 8, 4, 4), torch.randn(1, 3, 32)
    some = layer(x, context, torch.tensor([[1.0, 1.0, 0.0]]))
    assert torch.allclose(some, layer(x, context[:, :2], torch.ones(1, 2)), atol=1e-5)
    double = torch.cat([context[:, :2], context[:, 1:2]], 1)  # the same token twice weighs twice
    assert torch.allclose(layer(x, double, torch.tensor([[1.0, 0.5, 0.5]])), some, atol=1e-5)


def build(**keys: object) -> nn.Module:
    cfg = cfg_of(**keys)
    torch.manual_seed(0)
    return build_model(cfg.model, 8, 1)


def test_every_parameter_gets_a_gradient_and_conditions_act() -> None:
    of_class = {"model__condition": "class", "model__classes": NAMES}
    crossed = {"model__condition": "text", "model__cross_attn_resolutions": [8, 4]}
    for keys, cond in (
        (of_class, {"label": torch.tensor([0, 3])}),
        (of_class | {"model__adaptive_norm": True}, {"label": torch.tensor([0, 3])}),
        (crossed, {"tokens": tokenize(["7", ""], 24)}),
    ):  # fmt: skip
        net = build(**keys)
        for value in net.parameters():
            value.data += 0.1 * torch.randn_like(value)
        net.eval()
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
        out = net(x, t, **cond)
        out.square().sum().backward()
        assert not [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()]
        assert torch.allclose(out[1], net(x, t)[1], atol=1e-6) and not torch.allclose(out[0], net(x, t)[0], atol=1e-3)
        assert torch.equal(net(x, t, **net.encode(**cond)), out)


def test_cross_attention_stands_where_it_was_asked_for() -> None:
    def places(**keys: object) -> list[str]:
        net = build(model__condition="text", **keys)
        return sorted(name for name, module in net.named_modules() if isinstance(module, CrossAttention))

    assert places() == ["mid.cross_1"]
    assert places(model__cross_attn_resolutions=[4]) == [
        "down.1.cross.0",
        "mid.cross_1",
        "up.1.cross.0",
        "up.1.cross.1",
    ]
    assert not [name for name in build().state_dict() if "cross" in name or "condition" in name]


def test_conditions_between_two_are_exact_at_the_ends() -> None:
    net = text_condition()
    tokens = tokenize(["3", "the digit 8", "a", "bc"], 12)
    encoded = lambda indices: net(tokens[indices])
    found = interpolated_conditions(encoded, 5, False)(torch.arange(10))
    ends = net(tokens)
    for name in ("emb", "context", "presence"):
        for item, end in ((0, 0), (4, 1), (5, 2), (9, 3)):
            assert torch.equal(found[name][item], ends[name][end])
        assert torch.allclose(found[name][2], (ends[name][0] + ends[name][1]) / 2, atol=1e-6)
    square = interpolated_conditions(encoded, 3, True)(torch.arange(9))
    assert torch.equal(square["emb"][6], ends["emb"][2]) and torch.allclose(
        square["emb"][4], ends["emb"].mean(0), atol=1e-6
    )


# ------------------------------------------------------------------------------------------- labels and prompts, read


def asked(condition: str, **given: object):
    more = {"data__captions": ["{}", "the digit {}"]} if condition == "text" else {}
    cfg = cfg_of(model__condition=condition, model__classes=NAMES, train__condition_dropout=0.1, **more)
    options = {"labels": None, "prompts": None, "prompt_file": None, "guidance_scales": []} | given
    return read_conditions(SimpleNamespace(**options), cfg, [])


def test_labels_are_names_or_numbers_and_cycle() -> None:
    found = asked("class", labels=["t-shirt/TOP", "7", "1"])
    assert found.entries == (2, 1, 1) and found.name(4) == "7"
    assert asked("class", labels=["all"]).entries == (0, 1, 2)
    assert asked("text", labels=["7", "2"]).entries == ("7", "t-shirt")
    assert asked("text", prompts=["Seven", "the digit 0"]).entries == ("Seven", "the digit 0")
    assert asked("class").entries == ()


@pytest.mark.parametrize("condition, given, says", [
    ("class", {"labels": ["8"]}, ["'8': no such class", "0, 7, T-shirt/top"]),
    ("class", {"labels": ["-1"]}, ["'-1'"]),
    ("class", {"prompts": ["7"]}, ["reads classes, not text"]),
    ("class", {"labels": ["7"], "prompts": ["7"]}, ["--labels and --prompts"]),
    ("text", {"prompts": ["7", " "]}, ["--prompts, entry 2 is empty"]),
    ("text", {"prompts": ["the digit eight"]}, ["'eight' was in no caption", "0, zero, 7, seven, t-shirt, top"]),
    ("text", {"prompts": ["the digit " * 3 + "7"]}, ["31 bytes", "at most 23"]),
    ("text", {"prompts": ["a \udcff"]}, ["--prompts, entry 1", "is not valid Unicode"]),
    ("text", {"prompt_file": "/nowhere/at/all"}, ["--prompt_file /nowhere/at/all can't be read"]),
])  # fmt: skip
def test_what_can_not_be_read_is_refused(condition: str, given: dict, says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        asked(condition, **given)
    assert "\n" not in str(error.value)
    assert not [part for part in says if part not in str(error.value)], str(error.value)


def test_prompts_come_from_a_file(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("seven\nthe digit 0\n")
    assert asked("text", prompt_file=str(tmp_path / "p.txt")).entries == ("seven", "the digit 0")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfseven\r\n7\r\n")  # as some editors of Windows save it
    assert asked("text", prompt_file=str(tmp_path / "p.txt")).entries == ("seven", "7")
    (tmp_path / "p.txt").write_text("seven\n\n7\n")
    with pytest.raises(InputError, match="entry 2 is empty"):
        asked("text", prompt_file=str(tmp_path / "p.txt"))


@pytest.mark.parametrize("keys, says", [
    ({"data__captions": ["a"], "model__condition": "text"}, "one {} in it"),
    ({"data__captions": ["{}"], "model__condition": "class"}, "data.captions needs model.condition = text"),
    ({"model__classes": ["a"]}, "model.classes needs a conditional network"),
    ({"model__classes": ["a", "a"], "model__condition": "class"}, "names a class twice"),
    ({"model__condition": "text", "model__text_dim": 40}, "model.text_dim = 40"),
    ({"model__condition": "text", "model__cross_attn_resolutions": [2]}, "2 never occurs; the levels are 8, 4"),
    ({"model__condition": "class", "model__cross_attn_resolutions": [4]}, "cross-attention reads a text"),
    ({"model__condition": "class", "sample__guidance_scale": 2}, "train.condition_dropout above 0"),
    ({"model__condition": "class", "train__condition_dropout": 0.1, "sample__guidance_scale": 2,
      "sample__guidance_interval": [2, 1]}, "wanted \\[lowest, highest\\]"),
    ({"sample__guidance_rescale": 0.5}, "need a conditional network"),
])  # fmt: skip
def test_combinations_that_can_not_work_are_refused(keys: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        constraints.check(cfg_of(**keys))


# ----------------------------------------------------------------------------------------------------- metadata.jsonl


def folder_of_texts(root, names: list[str], lines: list[object]):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(root / name)
    (root / "metadata.jsonl").write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return SimpleNamespace(
        name="image_folder", root=str(root), image_size=8, channels=1, valid_fraction=0.0, download=False
    )


def test_texts_belong_to_their_files(tmp_path) -> None:
    lines = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in (2, 0, 1)]
    found = load_splits(folder_of_texts(tmp_path, ["0.png", "1.png", "2.png", "3.png"], lines))["train"]
    assert found.captions == ["number 0", "number 1", "number 2", None]
    assert found.subset(torch.tensor([2, 0]), "x").captions == ["number 2", "number 0"]


def test_each_split_may_have_its_own_file(tmp_path) -> None:
    (tmp_path / "train").mkdir()
    options = folder_of_texts(
        tmp_path, ["train/a/0.png", "test/0.png"], [{"file_name": "test/0.png", "text": "held out"}]
    )
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a/0.png", "text": "seen"}\n')
    found = load_splits(options)
    assert found["train"].captions == ["seen"] and found["test"].captions == ["held out"]


@pytest.mark.parametrize("line, says", [
    ("{", "line 2: wanted an object"), ("[1]", "line 2: wanted"), ({"text": "x"}, "line 2: wanted"),
    ({"file_name": "9.png", "text": "x"}, "there is no image 9.png"), ({"file_name": "0.png"}, "for the second time"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, says: str) -> None:
    options = folder_of_texts(tmp_path, ["0.png", "1.png"], [{"file_name": "0.png", "text": "x"}, line])
    with pytest.raises(InputError, match=says):
        load_splits(options)

"""A frozen text encoder of Hugging Face: tiny ones with random weights, saved to a folder as transformers does."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY
from in_process import call, forked, refused
from safetensors.torch import load_file, save_file

import evaluate_ddpm
import sample_ddpm
import train_ddpm
from models.conditioning import FeatureCondition
from utils.frozen_encoder import FrozenEncoder, open_encoder
from utils.readers import FeatureReader

transformers = pytest.importorskip("transformers", reason="model.text_encoder needs transformers")
pytest.importorskip("tokenizers", reason="model.text_encoder needs tokenizers")

WORDS = ["<pad>", "<end>", "<unk>", *"0123456789", "zero", "one", "two", "three", "four", "five", "six", "seven"]
WORDS += ["eight", "nine", "a", "the", "digit", "red"]
WIDTH = 16


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def save_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "clip":
            sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
            special = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
            text = sizes | special | {"max_position_embeddings": 12}
            vision = sizes | {"image_size": 8, "patch_size": 4}
            net = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        else:
            sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            config = transformers.T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes)
            net = transformers.T5ForConditionalGeneration(config)
    net.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


KINDS = ("clip", "t5")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: save_encoder(folder / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers_whatever_surrounds_them(kind: str, encoders) -> None:
    found = FrozenEncoder(str(encoders[kind]), "cpu")
    assert found.width == WIDTH and not found.model.training and len(found.sha256) == 64
    assert not any(value.requires_grad for value in found.model.parameters())
    name = "CLIPTextModel" if kind == "clip" else "T5EncoderModel"
    oracle = getattr(transformers, name).from_pretrained(encoders[kind]).eval()
    ids = torch.tensor([[WORDS.index(word) for word in ("the", "digit", "seven", "<end>")]])
    with torch.no_grad():
        wanted = oracle(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(found.features("The digit SEVEN"), wanted, atol=1e-6)
    other = FrozenEncoder(str(encoders[kind]), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as where a validation loss asks first
        assert torch.equal(other.features("The digit SEVEN"), found.features("The digit SEVEN"))
    assert other.features("7") is other.features("7") and other.sha256 == found.sha256


def test_few_features_are_kept(encoders, monkeypatch) -> None:
    found = FrozenEncoder(str(encoders["t5"]), "cpu")
    monkeypatch.setattr("utils.frozen_encoder.CACHE_BYTES", 3 * found.features("7").nbytes)
    wanted = [found.features(str(i)).clone() for i in range(10)]
    assert len(found.cache) <= 3 and found.cached_bytes == sum(value.nbytes for value in found.cache.values())
    assert all(torch.equal(found.features(str(i)), value) for i, value in enumerate(wanted))


def test_other_weights_and_words_have_another_hash_and_other_names_do_not(encoders, tmp_path) -> None:
    first = FrozenEncoder(str(encoders["clip"]), "cpu").sha256
    shutil.copytree(encoders["clip"], tmp_path / "moved")
    assert FrozenEncoder(str(tmp_path / "moved"), "cpu").sha256 == first
    text = (tmp_path / "moved/tokenizer.json").read_text()
    (tmp_path / "moved/tokenizer.json").write_text(text.replace('"nine"', '"neun"'))
    assert FrozenEncoder(str(tmp_path / "moved"), "cpu").sha256 != first
    assert FrozenEncoder(str(save_encoder(tmp_path / "other", "clip", seed=1)), "cpu").sha256 != first


def test_the_reader_pads_and_an_empty_text_is_no_condition(encoders) -> None:
    reader = FeatureReader(str(encoders["t5"]), 6, None, "cpu")
    given = reader(["the digit 7", "", "7"])
    assert given["present"].sum(1).tolist() == [4, 0, 2] and given["features"].shape == (3, 6, WIDTH)
    net = FeatureCondition(WIDTH, 32, 6, 8)
    found, null = net(**given), net(**net.null(1))
    assert all(torch.allclose(found[name][1:2], null[name], atol=1e-6) for name in found)
    assert found["presence"].sum(1).tolist() == [5, 1, 3]
    noise = torch.where(given["present"][..., None], given["features"], torch.randn(3, 6, WIDTH))
    again = net(noise, given["present"])
    assert torch.allclose(again["emb"], found["emb"], atol=1e-6)  # what is absent has no say


TEXT = [
    *("--model.condition", "text", "--train.condition_dropout", "0.2", "--model.cross_attn_resolutions", "[4]"),
    *("--model.text_dim", "32", "--model.text_length", "8", "--data.captions", "[{}, the digit {}]"),
]
TRAIN = [*TINY, *TEXT, "--train.n_steps", 8, "--train.save_every", 4, "--train.valid_every", 3]
TRAIN += ["--train.mixed_precision", "no", "--train.lr", 3e-4]  # at which rounding stays below 1e-5 over 8 steps
DRAW = ["--n_samples", 4, "--prompts", "a 7", "the digit Three", "--guidance_scale", 2]


def not_trained(*args: object, cwd: Path, says: list[str]) -> None:
    """Refused, by a script that expects a fresh process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    refused(train_ddpm.main, *args, cwd=cwd, says=says)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(encoders, tmp_path_factory) -> Path:
    """A run with the tiny CLIP, of 8 steps."""
    folder = tmp_path_factory.mktemp("run")
    forked(train_ddpm.main, "-e", "run", *TRAIN, "--model.text_encoder", encoders["clip"], cwd=folder)
    return folder / "run"


def test_the_encoder_is_not_part_of_a_checkpoint_but_its_hash_is(trained, encoders) -> None:
    weights = load_file(trained / "ckpt/step000008/ema.safetensors")
    names = {name.removeprefix("condition.") for name in weights if name.startswith("condition.")}
    assert names == {"start", *(f"{part}.{leaf}" for part in ("norm", "proj", "pool") for leaf in ("weight", "bias"))}
    assert weights["condition.proj.weight"].shape == (32, WIDTH)
    config = (trained / "config.yaml").read_text()
    assert f"text_encoder: {encoders['clip']}" in config and open_encoder(str(encoders["clip"]), "cpu").sha256 in config
    assert f"40 captions, read by {encoders['clip']} (frozen)" in (trained / "train.log").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(trained, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt/step000008")  # as if killed before
    forked(train_ddpm.main, "-e", "run", "-r", "auto", cwd=tmp_path)
    for name in ("model.safetensors", "ema.safetensors"):
        found, wanted = (load_file(run / "ckpt/step000008" / name) for run in (tmp_path / "run", trained))
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


def test_two_processes_train_the_same(trained, encoders, tmp_path) -> None:
    forked(train_ddpm.main, "-e", "two", *TRAIN, "--model.text_encoder", encoders["clip"], cwd=tmp_path, processes=2)
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (trained, tmp_path / "two")]
    losses = [torch.tensor([json.loads(line)["loss"] for line in part if '"loss"' in line]) for part in lines]
    assert len(losses[0]) == 8 and torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize("mode, more", [("sample", []), ("interpolate", ["--n_interpolate", 3])])
def test_prompts_act_from_the_run_folder_alone(mode: str, more: list, trained, tmp_path) -> None:
    base = ["--weights", trained, "--mode", mode, *more, "--sample.mixed_precision", "no"]
    call(sample_ddpm.main, *base, *DRAW, "--save_dir", "a", cwd=tmp_path)
    call(sample_ddpm.main, *base, "--n_samples", 4, "--save_dir", "none", cwd=tmp_path)
    files = [sorted((tmp_path / name).glob("*.png")) for name in ("a", "none")]
    assert len(files[0]) == (4 if mode == "sample" else 2)
    identity = json.loads((tmp_path / "a/protocol.json").read_text())["identity"]["model"]
    assert len(identity["text_encoder_sha256"]) == 64 and "text_encoder" not in identity
    net = load_file(trained / "ckpt/step000008/ema.safetensors")
    save_file(
        {name: value + 0.1 * torch.randn_like(value) for name, value in net.items()}, tmp_path / "net.safetensors"
    )
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    base[1] = tmp_path / "net.safetensors"  # a condition acts more after longer than 8 steps
    for name, prompts in (("b", ["a 7", "the digit 3"]), ("c", ["red", "digit 3"])):
        call(sample_ddpm.main, *base, *DRAW[:2], "--prompts", *prompts, "--save_dir", name, cwd=tmp_path)
    files = [sorted((tmp_path / name).glob("*.png")) for name in ("b", "c")]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(*files))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_network_trains_the_same(kind: str, encoders, tmp_path) -> None:
    keys = [*TRAIN, "--model.text_encoder", encoders[kind]]
    forked(train_ddpm.main, "-e", "one", *keys, cwd=tmp_path)
    forked(train_ddpm.main, "-e", "divided", *keys, "--train.shard", "true", cwd=tmp_path, processes=2)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "divided")]
    losses = [torch.tensor([json.loads(line)["loss"] for line in part if '"loss"' in line]) for part in lines]
    assert len(losses[0]) == 8 and torch.allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_scores_are_had_from_the_run_folder(trained, tmp_path) -> None:
    call(evaluate_ddpm.main, "--weights", trained, "--reference", "digits", "--feature_extractor", "dataset-classifier",
         "--metrics", "condition_accuracy", "--n_samples", 70, "--guidance_scales", 0, 2, "--out", "out",
         "--data.valid_fraction", 0.1, cwd=tmp_path)  # fmt: skip
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["evaluations"] for row in rows] == [3, 6]


def test_other_weights_under_the_same_name_are_refused_and_another_place_is_not(trained, encoders, tmp_path) -> None:
    other, same = save_encoder(tmp_path / "other", "clip", seed=1), tmp_path / "same"
    shutil.copytree(encoders["clip"], same)
    base = ["--weights", trained, *DRAW, "--save_dir", "out"]
    says = [f"model.text_encoder = {other} has other weights", "SHA-256"]
    refused(sample_ddpm.main, *base, "--model.text_encoder", other, cwd=tmp_path, says=says)
    refused(evaluate_ddpm.main, "--weights", trained, "--reference", "digits", "--model.text_encoder", other,
            "--out", "scores", cwd=tmp_path, says=says)  # fmt: skip
    run = ["-e", trained, "-r", "auto", "--train.n_steps", 9]
    not_trained(*run, "--model.text_encoder", other, cwd=tmp_path, says=says)
    not_trained(*run, "--model.text_encoder", "null", cwd=tmp_path, says=["can't change"])
    call(sample_ddpm.main, *base, "--model.text_encoder", same, cwd=tmp_path)


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no .safetensors file"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "of type bert; wanted one of clip"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "can't be used"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be used"),
    (lambda folder: save_file({"text_model.final_layer_norm.bias": torch.zeros(WIDTH)}, folder / "model.safetensors",
                              {"format": "pt"}), "weights lack"),
])  # fmt: skip
def test_what_is_no_encoder_is_one_line(spoil, says: str, encoders, tmp_path) -> None:
    shutil.copytree(encoders["clip"], tmp_path / "clip")
    spoil(tmp_path / "clip")
    args = ["-e", "run", *TRAIN, "--model.text_encoder", tmp_path / "clip"]
    not_trained(*args, cwd=tmp_path, says=["model.text_encoder = ", says])


def test_what_can_not_be_read_is_one_line(trained, encoders, tmp_path, monkeypatch) -> None:
    base = ["--weights", trained, "--n_samples", 1, "--save_dir", "out", "--prompts"]
    refused(sample_ddpm.main, *base, "a " * 8, cwd=tmp_path, says=["has 9 tokens", "at most 8"])
    refused(sample_ddpm.main, *base, " ", cwd=tmp_path, says=["--prompts, entry 1 is empty"])
    args = ["-e", "run", *TRAIN, "--model.text_encoder", encoders["clip"]]
    not_trained(*args, "--model.text_length", 13, cwd=tmp_path, says=["reads at most 12 tokens"])
    not_trained(*args, "--model.text_length", 2, cwd=tmp_path, says=["wanted at least"])
    not_trained(*args, "--model.condition", "class", "--data.captions", "null", cwd=tmp_path,
            says=["model.text_encoder needs model.condition = text"])  # fmt: skip
    open_encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    not_trained(*args, cwd=tmp_path, says=["pip install transformers"])

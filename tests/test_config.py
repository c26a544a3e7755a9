"""The configuration: its grammar on the command line and in YAML, and its errors."""

import typing
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import evaluate_ddpm
import sample_ddpm
import train_ddpm
from utils import config, constraints
from utils.cli import Parser
from utils.errors import InputError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = ROOT / "configs" / "ddpm_digits.yaml"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def from_words(*argv: str):
    return config.merge(("command line", Parser().parse(list(argv))[1]))


def from_text(text: str | bytes, folder: Path):
    path = folder / "given.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.merge(("given.yaml", config.read_yaml(path)))


def assert_tells(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{message!r} does not say {missing}"


def assert_value(merged, name: str, expected) -> None:
    value = OmegaConf.select(merged, name, throw_on_missing=True)
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    assert value == expected and type(value) is type(expected)


# --- what is understood ---

GOOD_WORDS = [
    (["--train.lr", "1e-4"], "train.lr", 1e-4),
    (["--train.lr=1e-4"], "train.lr", 1e-4),
    (["--train.lr", "1"], "train.lr", 1.0),
    (["--train.n_steps", "7"], "train.n_steps", 7),
    (["--seed", "5"], "seed", 5),
    (["--seed=5"], "seed", 5),
    (["--seed", "3", "--seed", "4"], "seed", 4),
    (["--model.dim_mults", "[1,2]"], "model.dim_mults", [1, 2]),
    (["--model.dim_mults=[1, 2, 4]"], "model.dim_mults", [1, 2, 4]),
    (["--model.attn_resolutions", "[]"], "model.attn_resolutions", []),
    (["--model.dim_mults[0]", "2"], "model.dim_mults", [2, 2, 2, 2]),
    (["--model.dim_mults[3]=5"], "model.dim_mults", [1, 2, 2, 5]),
    (["--model.dim_mults", "[1,2]", "--model.dim_mults[1]", "3"], "model.dim_mults", [1, 3]),
    (["--train.betas", "[0.5,0.9]"], "train.betas", [0.5, 0.9]),
    (["--train.betas", "[-1,0.5]"], "train.betas", [-1.0, 0.5]),  # a value, not an option; constraints refuses it
    (["--data.root", "-1"], "data.root", "-1"),
    (["--data.root", "a=b #c"], "data.root", "a=b #c"),
    (["--data.root=a=b"], "data.root", "a=b"),
    (["--data.root", "12:30"], "data.root", "12:30"),
    (["--data.root", "no"], "data.root", "no"),
    (["--train.clip_grad_norm", "null"], "train.clip_grad_norm", None),
    (["--train.keep_last=None"], "train.keep_last", None),
    (["--sample.skip_steps", "null"], "sample.skip_steps", None),
    (["--train.compile", "true"], "train.compile", "true"),
    (["--train.compile", "False"], "train.compile", "false"),
    (["--train.mixed_precision", "no"], "train.mixed_precision", "no"),
    (["--train.log_with", "none"], "train.log_with", "none"),
    (["--data.random_flip", "true"], "data.random_flip", True),
    (["--data.random_flip", "False"], "data.random_flip", False),
    (["--sample.sampler", "fixed_large"], "sample.sampler", "fixed-large"),
    (["--sample.sampler", "fixed-large"], "sample.sampler", "fixed-large"),
    (["--sample.sampler=learned_range"], "sample.sampler", "learned-range"),
    (["--sample.sampler", "dpm++2m"], "sample.sampler", "dpm++2m"),
    (["--data.name", "fashion-mnist"], "data.name", "fashion_mnist"),
    (["--evaluate.metrics", "[kid,'fid']"], "evaluate.metrics", ["kid", "fid"]),
]

GOOD_TEXTS = [
    ("", "train.n_steps", 800000),
    ("train:\n", "train.n_steps", 800000),
    ("train: {lr: 1e-4}", "train.lr", 1e-4),
    ("train.lr: 1e-4", "train.lr", 1e-4),
    ("train: {lr: '1e-4'}", "train.lr", 1e-4),
    ("train: {compile: true}", "train.compile", "true"),
    ("train: {compile: off}", "train.compile", "false"),
    ("train: {compile: auto}", "train.compile", "auto"),
    ("train: {mixed_precision: no}", "train.mixed_precision", "no"),
    ("train: {log_with: none}", "train.log_with", "none"),
    ("train: {clip_grad_norm: null}", "train.clip_grad_norm", None),
    ("train: {n_epochs: }", "train.n_epochs", None),
    ("data: {random_flip: yes}", "data.random_flip", True),
    ("data: {root: 2024}", "data.root", "2024"),
    ("data: {root: '2024'}", "data.root", "2024"),
    ("model: {dim_mults: [1, 2]}", "model.dim_mults", [1, 2]),
    ("sample: {sampler: fixed_small}", "sample.sampler", "fixed-small"),
    ("sample: {sampler: dpm++2m, skip_type: logsnr}", "sample.sampler", "dpm++2m"),
]


@pytest.mark.parametrize("argv, name, expected", GOOD_WORDS, ids=[" ".join(argv) for argv, _, _ in GOOD_WORDS])
def test_override_is_understood(argv: list[str], name: str, expected) -> None:
    assert_value(from_words(*argv), name, expected)


@pytest.mark.parametrize("text, name, expected", GOOD_TEXTS)
def test_yaml_is_understood(tmp_path: Path, text: str, name: str, expected) -> None:
    assert_value(from_text(text, tmp_path), name, expected)


def test_precedence_is_schema_then_yaml_then_override(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("train: {lr: 0.5, n_steps: 9}\nmodel: {dim_mults: [3, 3]}\n")
    layers = [("given.yaml", config.read_yaml(tmp_path / "given.yaml"))]
    layers.append(("command line", Parser().parse(["--train.lr", "0.25", "--model.dim_mults[1]=4"])[1]))
    merged = config.merge(*layers)
    assert (merged.train.lr, merged.train.n_steps, merged.train.batch_size) == (0.25, 9, 128)
    assert list(merged.model.dim_mults) == [3, 4]
    assert list(config.merge().model.dim_mults) == [1, 2, 2, 2], "a merge changed the schema's defaults"


# --- what is refused: (arguments, what the message must say) ---

BAD_WORDS = [
    (["--train.lrr", "1"], ["train.lrr", "did you mean train.lr?"]),
    (["--trian.batch_size", "1"], ["trian.batch_size", "did you mean train.batch_size?"]),
    (["--diffusion.eta", "1"], ["diffusion.eta", "did you mean sample.eta?"]),
    (["--foo.bar", "1"], ["unknown key foo.bar"]),
    (["--train.lr.x", "1"], ["train.lr.x"]),
    (["--model.dim_mults.0", "3"], ["model.dim_mults.0"]),
    (["--lr", "1"], ["--lr", "did you mean --train.lr?"]),
    (["--zzz", "1"], ["unknown option --zzz"]),
    (["-x"], ["unknown option -x"]),
    (["stray"], ["'stray'"]),
    (["--train.lr"], ["--train.lr", "value"]),
    (["--train.lr", "--seed", "1"], ["--train.lr", "value"]),
    (["--train.lr="], ["train.lr = ''", "float"]),
    (["--train.lr", "abc"], ["train.lr = 'abc'", "float", "> 0"]),
    (["--train.lr", "0"], ["train.lr = '0'", "> 0"]),
    (["--train.lr", "-1"], ["train.lr = '-1'", "> 0"]),
    (["--train.lr", "nan"], ["train.lr = 'nan'"]),
    (["--train.lr", "inf"], ["train.lr = 'inf'"]),
    (["--train.lr", "1e400"], ["train.lr = '1e400'"]),
    (["--train.lr", "???"], ["train.lr", "'???'"]),
    (["--train.lr", "[1]"], ["train.lr = '[1]'", "float"]),
    (["--train.betas", "[0.9,nan]"], ["train.betas", "nan"]),
    (["--train.n_steps", "0"], ["train.n_steps = '0'", ">= 1"]),
    (["--train.n_steps", "010"], ["train.n_steps", "'010'"]),
    (["--train.n_steps", "0x10"], ["train.n_steps = '0x10'", "int"]),
    (["--train.n_steps", "yes"], ["train.n_steps = 'yes'", "int"]),
    (["--train.n_steps", "1.5"], ["train.n_steps = '1.5'", "int"]),
    (["--train.n_steps", "1e3"], ["train.n_steps = '1e3'", "int"]),
    (["--train.n_steps", "null"], ["train.n_steps = 'null'", "int"]),
    (["--train.n_steps", "5\n6"], ["train.n_steps", "int"]),
    (["--data.root", "null"], ["data.root = 'null'", "text"]),
    (["--seed", "-3"], ["seed = '-3'", ">= 0"]),
    (["--seed", "99999999999999999999999"], ["seed", "99999999999999999999999"]),  # torch's generator takes 64 bits
    (["--train", "3"], ["--train", "--train."]),
    (["--train=fast"], ["--train=fast", "--train."]),
    (["--data.valid_fraction", "1"], ["data.valid_fraction = '1'", "< 1"]),
    (["--sample.skip_steps", "0"], ["sample.skip_steps = '0'", ">= 1"]),
    (["--data.random_flip", "maybe"], ["data.random_flip = 'maybe'", "bool"]),
    (["--data.random_flip", "2"], ["data.random_flip", "'2'"]),
    (["--train.compile", "perhaps"], ["train.compile = 'perhaps'", "auto, true, false"]),
    (["--sample.sampler", "dim"], ["sample.sampler = 'dim'", "fixed-large", "did you mean ddim?"]),
    (["--evaluate.metrics", "[fid,bad]"], ["evaluate.metrics", "bad", "fid, isc, kid, prc"]),
    (["--model.dim_mults", "2"], ["model.dim_mults = '2'", "list of int"]),
    (["--model.dim_mults", "[1,,2]"], ["model.dim_mults = '[1,,2]'", "list of int"]),
    (["--model.dim_mults", "[1,[2]]"], ["model.dim_mults = '[1,[2]]'", "list of int"]),
    (["--model.dim_mults", "[1.5]"], ["model.dim_mults = '[1.5]'", "list of int"]),
    (["--model.dim_mults", "null"], ["model.dim_mults = 'null'", "list of int"]),
    (["--model.dim_mults[4]", "1"], ["model.dim_mults[4]", "4 entries"]),
    (["--model.dim_mults[-1]", "1"], ["model.dim_mults[-1]", "4 entries"]),
    (["--model.dim_mults[x]", "1"], ["model.dim_mults[x]", "4 entries"]),
    (["--model.dim_mults[0]", "wide"], ["model.dim_mults[0]", "'wide'", "int"]),
    (["--train.lr[0]", "1"], ["train.lr[0]", "not a list"]),
    (["--data.root", "${oc.env:HOME}"], ["data.root = '${oc.env:HOME}'", "interpolation"]),
    (["--seed", "${train.n_steps}"], ["seed = '${train.n_steps}'", "interpolation"]),
    (["--model.dim_mults", "[${oc.env:HOME}]"], ["model.dim_mults", "${oc.env:HOME}"]),
    (["--model.dim_mults", "[${seed},2]"], ["model.dim_mults", "${seed}"]),
]

BAD_TEXTS = [
    ("train: {lrr: 1}", ["given.yaml: unknown key train.lrr", "did you mean train.lr?"]),
    ("trian: {n_steps: 1}", ["trian.n_steps", "did you mean train.n_steps?"]),
    ("trian: {}", ["unknown key trian"]),
    ("speed: 1", ["unknown key speed", "did you mean seed?"]),
    ("train: fast", ["train", "section", "fast"]),
    ("train: [1]", ["train", "section", "[1]"]),
    ("train: {lr: .nan}", ["train.lr = nan", "> 0"]),
    ("train: {lr: true}", ["train.lr = True", "float"]),
    ("train: {lr: [1]}", ["train.lr = [1]", "float"]),
    ("train: {lr: {peak: 1}}", ["train.lr.peak"]),
    ("train: {lr: }", ["train.lr = None", "float"]),
    ("train: {n_steps: yes}", ["train.n_steps = True", "int"]),
    ("train: {n_steps: 1.5}", ["train.n_steps = 1.5", "int"]),
    ("train: {n_steps: 2001-01-01}", ["train.n_steps", "2001-01-01", "int"]),
    ("seed: ???", ["seed", "'???'"]),
    ("data: {root: null}", ["data.root = None", "text"]),
    ("model: {dim_mults: 2}", ["model.dim_mults = 2", "list of int"]),
    ("model: {dim_mults: [1, null]}", ["model.dim_mults = [1, None]", "list of int"]),
    ("model: {dim_mults: [1, true]}", ["model.dim_mults = [1, True]", "list of int"]),
    ("model: {dim_mults: ['${seed}', 2]}", ["model.dim_mults", "${seed}"]),
    ("data: {root: '${oc.env:HOME}'}", ["data.root = '${oc.env:HOME}'", "interpolation"]),
    ("sample: {sampler: [ddim]}", ["sample.sampler = ['ddim']", "one of"]),
    ("data: {root: !!python/object/apply:os.getcwd []}", ["given.yaml", "python/object/apply:os.getcwd"]),
    ("data: {root: !!python/name:os.system }", ["given.yaml", "python/name:os.system"]),
    ("train: {lr: 1\nmodel: [", ["given.yaml", "not valid YAML"]),
    ("train:\n\tlr: 1", ["given.yaml", "not valid YAML"]),
    ("train:\n  lr: 1\n  lr: 2", ["given.yaml", "not valid YAML"]),
    ("- train\n- model", ["given.yaml", "list"]),
    (b"\xff\xfe\x00", ["given.yaml", "not valid YAML"]),
]


@pytest.mark.parametrize("argv, says", BAD_WORDS, ids=[" ".join(argv) for argv, _ in BAD_WORDS])
def test_bad_arguments_are_told_in_one_line(argv: list[str], says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        from_words(*argv)
    assert_tells(error, *says)


@pytest.mark.parametrize("text, says", BAD_TEXTS)
def test_bad_yaml_is_told_in_one_line(tmp_path: Path, text: str | bytes, says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        from_text(text, tmp_path)
    assert_tells(error, *says)


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "absent.yaml", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(InputError) as error:
            config.read_yaml(path)
        assert_tells(error, str(path), says)


@pytest.mark.parametrize(
    "main, argv",
    [
        (sample_ddpm.main, ["--eta", "0.5", "--sample.eta", "0.5"]),
        (sample_ddpm.main, ["--sample.sampler=ddim", "--var_type", "ddim"]),
        (sample_ddpm.main, ["--skip_steps", "5", "--sample.skip_steps", "5"]),
        (evaluate_ddpm.main, ["--n_samples", "5", "--evaluate.n_samples", "5"]),
        (evaluate_ddpm.main, ["--metrics", "fid", "--evaluate.metrics", "[fid]"]),
        (evaluate_ddpm.main, ["--skip_steps", "5", "--sample.skip_steps", "5"]),
    ],
)
def test_an_option_and_its_dotted_form_together_are_refused(main, argv: list[str]) -> None:
    dotted = next(word for word in argv if "." in word and word.startswith("--")).partition("=")[0]
    with pytest.raises(InputError) as error:
        main([*argv, "--print_config"])
    assert_tells(error, dotted, "same option")


# --- the schema ---


def test_literals_equal_the_registries() -> None:
    from diffusions import BETA_SCHEDULES, SAMPLERS, SKIP_TYPES
    from models import MODELS
    from utils.data import DATASETS
    from utils.precision import DTYPES

    for literal, registry in [
        (config.DatasetName, DATASETS),
        (config.ModelName, MODELS),
        (config.BetaSchedule, BETA_SCHEDULES),
        (config.SkipType, SKIP_TYPES),
        (config.SamplerName, SAMPLERS),
        (config.Precision, ["auto", *DTYPES]),
    ]:
        assert sorted(typing.get_args(literal)) == sorted(registry)
    for names, trait in [
        (constraints.TAKES_ETA, "takes_eta"),
        (constraints.NEEDS_VARIANCE, "needs_variance"),
        (constraints.STOCHASTIC, "stochastic"),
    ]:
        assert sorted(names) == sorted(name for name, sampler in SAMPLERS.items() if getattr(sampler, trait))


@pytest.mark.parametrize("name", config.KEYS)
def test_every_key_is_documented_and_its_default_is_legal(name: str) -> None:
    info = config.KEYS[name]
    assert info.doc.strip()
    assert_value(config.merge(("default", {name: info.default})), name, info.default)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_round_trips(tmp_path: Path, recipe: Path) -> None:
    merged = config.merge((recipe.name, config.read_yaml(recipe)))
    constraints.check(merged)
    again = from_text(config.to_yaml(merged), tmp_path)
    assert config.differences(merged, again) == {}


@pytest.mark.parametrize("root", ["no", "1e3", "010", "12:30", "a: b #c", "- x", "", "[1]", "'", "tab\there", "ü"])
def test_awkward_values_survive_the_round_trip(tmp_path: Path, root: str) -> None:
    values = {"data.root": root, "train.mixed_precision": "no", "train.compile": "true", "train.lr": 3e-7}
    values |= {"train.clip_grad_norm": None, "model.attn_resolutions": [], "train.betas": [0.5, 1e-9]}
    merged = config.merge()
    for name, value in values.items():
        OmegaConf.update(merged, name, value, merge=False)
    again = from_text(config.to_yaml(merged), tmp_path)
    assert config.differences(merged, again) == {}
    assert set(config.differences(config.merge(), again)) == set(values)


def test_there_is_a_default_recipe(capsys: pytest.CaptureFixture) -> None:
    assert DIGITS in RECIPES
    assert train_ddpm.main(["--print_config"]) == 0
    assert capsys.readouterr().out == config.to_yaml(config.merge(("digits", config.read_yaml(DIGITS))))

"""The explorer without its page: commands that make the same files, refused requests, work that stops."""

import ast
import shlex
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from in_process import call, random_weights, refused
from PIL import Image

import explore_ddpm
import sample_ddpm
from utils import config, distributed
from utils.errors import InputError
from utils.explorer import html
from utils.explorer.drawing import Explorer
from utils.explorer.request import MOST_IMAGES, Request, command, fixed_arguments, one
from utils.explorer.results import Panel
from utils.explorer.upload import save_upload
from utils.explorer.watching import Stopped, Watched, Work, Works
from utils.images import read_png
from utils.weights import Weights, open_weights

NETWORKS = {
    "plain": {"sample__sampler": "fixed-small"},
    "rgb": {"data__channels": 3, "diffusion__objective": "pred_eps", "diffusion__beta_schedule": "linear"},
    "class": {"model__condition": "class", "model__classes": ["cat", "dog", "bird"], "train__condition_dropout": 0.2},
    "text": {
        "model__condition": "text",
        "model__classes": ["0", "1", "2"],
        "model__text_dim": 32,
        "model__text_layers": 1,
        "model__text_length": 24,
        "train__condition_dropout": 0.2,
    },
}
PLAIN = Request("ddim", "trailing", "5", n_samples="5")
SAMPLED = {  # network, request
    "ddim": ("plain", PLAIN),
    "ancestral": ("plain", Request("fixed-large", "uniform", "20", seed="7", n_samples="1")),
    "eta": ("rgb", Request("ddim", "quad", "6", eta=0.35, n_samples="6")),
    "heun": ("rgb", Request("heun", "linspace", "4", n_samples="2")),
    "classes": ("class", Request("unipc", "trailing", "4", guidance_scale=2.5, n_samples="7", labels=("bird", "cat"))),
    "all": ("class", Request("fixed-small", "trailing", "4", n_samples="4", labels=("all",))),
    "unconditional": ("class", Request("dpm++2m", "trailing", "4", guidance_scale=3.0, n_samples="4")),
    "prompts": (
        "text",
        Request("ddim", "trailing", "4", guidance_scale=1.7, n_samples="5", prompts="two\n\n 1 \nzero"),
    ),
}


@pytest.fixture(scope="module")
def explorers(tmp_path_factory: pytest.TempPathFactory):
    """name of a network -> an explorer of it."""
    place, made = tmp_path_factory.mktemp("explorers"), {}

    def explorer(name: str) -> Explorer:
        if name not in made:
            file = random_weights(place / name, **NETWORKS[name])
            weights = open_weights(str(file), None, [])
            fixed = fixed_arguments(str(file), weights, None, {})
            made[name] = Explorer(weights, distributed.start(), fixed, sample_ddpm)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        deterministic = torch.are_deterministic_algorithms_enabled()
        AcceleratorState._reset_state(reset_partial_state=True)
        yield explorer
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def drawn(tmp_path_factory: pytest.TempPathFactory):
    """A checked request -> its result."""
    place = tmp_path_factory.mktemp("results")

    def draw(function):
        with ThreadPoolExecutor(1) as pool:
            return Work(pool, function, place).result(60)

    return draw


def repeat(made, cwd: Path) -> list[bytes]:
    """What the command of a file writes: the grid, and the animation where there is one."""
    words = shlex.split(made.command)
    assert words[0] == "python" and Path(words[1]).resolve() == ROOT / "sample_ddpm.py"
    call(sample_ddpm.main, *words[2:], cwd=cwd)
    beside = cwd / words[words.index("--save_dir") + 1]
    return [path.read_bytes() for path in sorted(beside.parent.glob(f"{beside.name}-*.[pw]*"), reverse=True)]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_command_makes_the_very_files(name: str, explorers, drawn, tmp_path: Path) -> None:
    network, request = SAMPLED[name]
    result = drawn(explorers(network).sample(request))
    picture, animation = result.files
    assert [picture.path.read_bytes()] == repeat(picture, tmp_path)
    assert animation.path.read_bytes() == repeat(animation, tmp_path)[1]
    assert Image.open(animation.path).n_frames > 1


def test_what_is_on_the_page_is_what_is_downloaded(explorers, drawn) -> None:
    result = drawn(explorers("plain").sample(PLAIN))
    shown = result.panels[0].picture
    stored = torch.frombuffer(bytearray(Image.open(result.files[0].path).tobytes()), dtype=torch.uint8)
    assert torch.equal(shown.flatten(), stored)
    assert "5 network evaluations per image" in result.panels[0].caption


def test_compare_from_the_same_noise(explorers, drawn, tmp_path: Path) -> None:
    explorer = explorers("rgb")
    second = Request("heun", "trailing", "3", n_samples="5")
    result = drawn(explorer.compare(PLAIN, second))
    assert [made.path.read_bytes() for made in result.files] == [repeat(made, tmp_path)[0] for made in result.files]
    assert [panel.title for panel in result.panels] == ["A: ddim, 5 trailing steps", "B: heun, 3 trailing steps"]
    assert all("5 network evaluations" in panel.caption for panel in result.panels)  # heun: two a step but the last
    assert not torch.equal(result.panels[0].picture, result.panels[1].picture)


@pytest.mark.parametrize("network", ["plain", "text"])
def test_interpolate_between_two_seeds(network: str, explorers, drawn, tmp_path: Path) -> None:
    explorer = explorers(network)
    request = Request(explorer.weights.config.sample.sampler, "trailing", "5", seed="3", seed_to="9", prompts="")
    if network == "text":
        request = Request("ddim", "trailing", "5", guidance_scale=2.0, seed="3", seed_to="9", prompts="one\ntwo")
    result = drawn(explorer.interpolate(request))
    assert [made.path.read_bytes() for made in result.files] == [repeat(made, tmp_path)[0] for made in result.files]
    assert len(result.points) == 11 and "--sampler ddim" in result.files[0].command
    for seed, point, prompt in (("3", result.points[0], "one"), ("9", result.points[-1], "two")):
        alone = Request(
            "ddim", "trailing", "5", guidance_scale=2.0, seed=seed, prompts=prompt if request.prompts else ""
        )
        end = read_png(drawn(explorer.sample(alone)).files[0].path.with_name("images") / "000000.png")
        assert (end.int() - point.int()).abs().max() <= 1  # fp32 in another batch


def test_reconstruct_an_upload(explorers, drawn, tmp_path: Path) -> None:
    explorer = explorers("rgb")
    Image.effect_noise((40, 30), 90).convert("RGBA").save(tmp_path / "mine.png")
    source = save_upload(str(tmp_path / "mine.png"), tmp_path / "kept", 3, 8)
    assert source == save_upload(str(tmp_path / "mine.png"), tmp_path / "kept", 3, 8)
    result = drawn(explorer.reconstruct(Request("ddim", "trailing", "20", source=str(source))))
    assert [made.path.read_bytes() for made in result.files] == [repeat(made, tmp_path)[0] for made in result.files]
    assert "40 network evaluations" in result.panels[1].caption and "mean squared error" in result.panels[1].caption


WRONG = {  # what the page says, which the command line says too
    "seed": (Request("ddim", "trailing", "5", seed="abc"), "'abc' is not a whole number from 0 to 2^63 - 1"),
    "no seed": (Request("ddim", "trailing", "5", seed="-1"), "'-1' is not a whole number from 0"),
    "empty": (Request("ddim", "trailing", " "), "--skip_steps is empty"),
    "steps": (Request("ddim", "trailing", "21"), "sample.skip_steps = 21: wanted 1 to 20"),
    "half": (Request("ddim", "trailing", "2.5"), "sample.skip_steps = '2.5': wanted int"),
    "images": (Request("ddim", "trailing", "5", n_samples="0"), "'0' is not a whole number of at least 1"),
    "many": (Request("ddim", "trailing", "5", n_samples=str(MOST_IMAGES + 1)), "at most 64"),
    "sampler": (Request("ddimm", "trailing", "5"), "did you mean ddim?"),
    "variance": (Request("learned-range", "trailing", "5"), "needs a network that predicts its variance"),
    "labels": (Request("ddim", "trailing", "5", labels=("cat",)), "--labels needs a conditional network"),
    "option": (Request("ddim", "trailing", "5", seed="--mask"), "a value can't begin with a dash"),
    "long": (Request("ddim", "trailing", "5", seed="1" * 5000), "5,000 characters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_told_before_any_work(name: str, explorers, tmp_path: Path) -> None:
    request, says = WRONG[name]
    explorer = explorers("plain")
    with pytest.raises(InputError) as told:
        explorer.sample(request)
    assert says in str(told.value) and "\n" not in str(told.value)
    try:
        arguments = request.arguments()
    except InputError:
        return  # what can't be a command line
    if name != "many":
        args = [*explorer.fixed, *arguments, "--save_dir", "out"]
        refused(sample_ddpm.main, *args, cwd=tmp_path, says=[str(told.value)])


def test_prompts_can_not_smuggle_options(explorers) -> None:
    for prompts in ("one\n--save_dir\n/etc", "--print_config", "-c"):
        with pytest.raises(InputError, match="begin with a dash"):
            explorers("text").sample(Request("ddim", "trailing", "4", prompts=prompts))
    with pytest.raises(InputError, match="was in no caption of the training"):
        explorers("text").sample(Request("ddim", "trailing", "4", prompts="a whale"))
    assert one(" -5 ", "seed") == "-5"  # a number, which argparse tells is none of at least 0


def test_chosen_noisy_samplers_are_refused_where_latents_decide(explorers, drawn) -> None:
    explorer = explorers("plain")  # its own is fixed-small, which gives way
    assert (
        "--sampler ddim"
        in drawn(explorer.interpolate(Request("fixed-small", "trailing", "3", seed_to="1"))).files[0].command
    )
    with pytest.raises(InputError, match="with the sampler fixed-large, which draws noise"):
        explorer.interpolate(Request("fixed-large", "trailing", "3", seed_to="1"))
    with pytest.raises(InputError, match="--seed_to is empty"):
        explorer.interpolate(Request("ddim", "trailing", "3"))


def test_seed_to_of_the_command_line(explorers, tmp_path: Path) -> None:
    weights = explorers("plain").fixed[1]
    common = ["--weights", weights, "--save_dir", "out", "--n_samples", 4, "--skip_steps", 3]
    for more, says in (
        (["--seed_to", 0], "--seed_to belongs to --mode interpolate, but the mode is sample"),
        (["--mode", "interpolate", "--seed_to", 3, "--corners"], "--seed_to and --corners"),
        (["--mode", "interpolate", "--seed_to", 3, "--source", "digits"], "--seed_to and --source"),
        (["--mode", "interpolate", "--seed_to", -3], "--seed_to: '-3' is not a whole number"),
    ):
        refused(sample_ddpm.main, *common, *more, cwd=tmp_path, says=[says])
    call(sample_ddpm.main, *common, "--mode", "interpolate", "--seed_to", 0, "--n_interpolate", 3, cwd=tmp_path)
    ends = {}
    for seed in (2022, 0):
        out = ["--save_dir", f"seed{seed}", "--seed", seed, "--sampler", "ddim", "--n_samples", 2]
        call(sample_ddpm.main, "--weights", weights, "--skip_steps", 3, *out, cwd=tmp_path)
        ends[seed] = [Image.open(tmp_path / f"seed{seed}" / f"{i:06d}.png").tobytes() for i in range(2)]
    for i in range(2):
        row = Image.open(tmp_path / "out" / f"{i:06d}.png")
        for seed, left in ((2022, 0), (0, 16)):
            pairs = zip(row.crop((left, 0, left + 8, 8)).tobytes(), ends[seed][i])
            assert max(abs(a - b) for a, b in pairs) <= 1


def test_the_command_names_the_weights_that_were_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "ckpt" / "step000012"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    weights = Weights(folder / "model.safetensors", config.merge(), "raw", "step000012", tmp_path)
    overrides = {"sample.clip_denoised": "false", "sample.eta": "0.5"}
    fixed = fixed_arguments(str(tmp_path / "run"), weights, None, overrides)
    assert fixed == [
        *("--weights", str(folder), "--load_ema", "false"),
        *("--sample.clip_denoised", "false"),  # eta has a field
    ]
    text = command(fixed, ["--seed", "1"], ROOT / "sample_ddpm.py")
    assert shlex.split(text)[:4] == [
        "python",
        str(ROOT / "sample_ddpm.py") if Path.cwd() != ROOT else "sample_ddpm.py",
        "--weights",
        fixed[1],
    ]


def test_stop_ends_the_work_at_the_next_evaluation(explorers, tmp_path: Path) -> None:
    explorer, seen = explorers("plain"), threading.Event()
    function = explorer.sample(Request("ddim", "trailing", "20", n_samples="4"))
    with ThreadPoolExecutor(1) as pool:
        net, explorer.net = explorer.net, Slow(explorer.net, seen)
        try:
            work = Work(pool, function, tmp_path)
            assert seen.wait(30)
            work.stop()
            with pytest.raises(Stopped):
                work.result(30)
        finally:
            explorer.net = net
        assert 0 < work.evaluations < 20 * 4 and not work.running
        with pytest.raises(Stopped):
            Watched(net, work)(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))


class Slow:
    """A network that takes its time and says when it was first asked."""

    def __init__(self, net, seen: threading.Event) -> None:
        self._net, self._seen = net, seen

    def __call__(self, *args, **cond):
        self._seen.set()
        time.sleep(0.1)
        return self._net(*args, **cond)

    def __getattr__(self, name: str):
        return getattr(self._net, name)


def test_followers_see_it_come_and_their_going_stops_it(tmp_path: Path) -> None:
    def count(work: Work) -> int:
        for i in range(200):
            work.check()
            work.show(i)
            time.sleep(0.02)
        return 200

    works = Works(2, tmp_path)
    follower = works.start("one", count).follow()
    seen = [next(follower) for _ in range(4)]
    assert [value for value in seen if value is not None] == sorted({value for value in seen if value is not None})
    other = works.start("two", lambda work: "quick")
    assert other.result(5) == "quick" and works.of("one").running  # a long job holds nobody up
    follower.close()
    with pytest.raises(Stopped):
        works.of("one").result(5)
    first = works.start("two", count)
    second = works.start("two", lambda work: "second")  # who starts another ends the one before
    with pytest.raises(Stopped):
        first.result(5)
    assert second.result(5) == "second"
    works.leave("two")
    assert works.of("two") is None
    works.close()
    assert not any(tmp_path.iterdir())


def test_errors_inside_the_work_reach_its_follower(tmp_path: Path) -> None:
    def fail(work: Work) -> None:
        raise RuntimeError("out of luck")

    works = Works(1, tmp_path)
    work = works.start("one", fail)
    list(work.follow())
    with pytest.raises(RuntimeError, match="out of luck"):
        work.result()
    works.close()


def test_html_quotes_what_users_wrote() -> None:
    evil = '<img src=x onerror="alert(1)">'
    panel = Panel(evil, torch.zeros(1, 8, 8, dtype=torch.uint8), evil)
    for text in (html.wrong(evil), html.said(evil, [evil]), html.progress(0.5, evil), html.panels([panel])):
        assert "<img src=x" not in text and "&lt;img" in text
    big = html.data_uri(torch.zeros(3, 3000, 1500, dtype=torch.uint8))
    assert len(big) < 100_000


def test_wrong_command_lines(explorers, tmp_path: Path, monkeypatch) -> None:
    weights = explorers("plain").fixed[1]
    busy = socket.socket()
    busy.bind(("127.0.0.1", 0))
    busy.listen()
    monkeypatch.setattr(explore_ddpm.importlib.util, "find_spec", lambda name: True)
    for args, says in (
        ([], "--weights must be given"),
        (["--weights", "nowhere"], "--weights nowhere: no such file or folder"),
        (["--weights", weights, "--port", "0"], "'0' is not a port, 1 to 65535"),
        (["--weights", weights, "--port", busy.getsockname()[1]], "can't be used: Address already in use"),
        (["--weights", weights, "--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--weights", weights, "--model.dim", "16"], "contradicts the weights"),
        (["--weights", weights, "--n_samples", "3"], "unknown option --n_samples"),
    ):
        refused(explore_ddpm.main, *args, cwd=tmp_path, says=[says])
    monkeypatch.setattr(explore_ddpm.importlib.util, "find_spec", lambda name: None)
    refused(
        explore_ddpm.main,
        "--weights",
        weights,
        cwd=tmp_path,
        says=["gradio", "pip install -r requirements-explore.txt"],
    )
    busy.close()


def test_only_the_page_imports_gradio() -> None:
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name and name.split(".")[0] == "gradio" for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"utils/explorer/page.py", "utils/explorer/layout.py"}

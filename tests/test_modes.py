"""sample_ddpm.py's modes from the command line: what the files hold, restarts, two processes, and wrong input.

The network is not trained; everything here holds for any network.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from in_process import call, contents, on_two_processes, random_weights, refused
from PIL import Image

from sample_ddpm import main
from utils.images import read_png

STEPS = 5
CALLS = {  # folder -> (mode, its options); eight images each
    "sample": ("sample", []),
    "ddim": ("sample", ["--sampler", "ddim"]),
    "denoise": ("denoise", ["--n_denoise", 4]),
    "progressive": ("progressive", ["--n_progressive", 3]),
    "rows": ("interpolate", ["--n_interpolate", 3]),
    "squares": ("interpolate", ["--n_interpolate", 3, "--corners"]),
    "between": ("interpolate", ["--n_interpolate", 3, "--source", "{source}"]),
    "reconstruct": ("reconstruct", ["--source", "{source}"]),
    "inpaint": ("inpaint", ["--source", "{source}", "--mask", "left", "--n_resample", 2]),
    "consistency": ("consistency", ["--skip_steps", 2, STEPS]),
}
SHAPES = {  # of all files: how many, and height and width of each
    "sample": (8, 8, 8),
    "ddim": (8, 8, 8),
    "denoise": (8, 8, 4 * 8),
    "progressive": (8, 8, 3 * 8),
    "rows": (4, 8, 3 * 8),
    "squares": (2, 3 * 8, 3 * 8),
    "between": (4, 8, 3 * 8),
    "reconstruct": (8, 8, 2 * 8),
    "inpaint": (8, 8, 3 * 8),
    "consistency": (8, 8, 2 * 8),
}
every_call = pytest.mark.parametrize("name", CALLS)


def images(folder: Path) -> torch.Tensor:
    return torch.stack([read_png(path) for path in sorted(folder.glob("*.png"))])


def columns(folder: Path) -> torch.Tensor:
    """[N, columns, C, 8, 8] of strips."""
    return torch.stack(images(folder).split(8, dim=-1), dim=1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The promise of float32."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


def identity(folder: Path) -> dict:
    return json.loads((folder / "protocol.json").read_text())["identity"]


def errors(path: Path) -> dict[str, float]:
    return {row["file"]: float(row["error"]) for row in csv.DictReader(path.open())}


def save(path: Path, pixels: torch.Tensor) -> None:
    """uint8 [H, W] or [H, W, 3]."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network with T = 20, folders of images and masks, right and wrong ones."""
    folder = tmp_path_factory.mktemp("inputs")
    random_weights(folder / "weights", sample__sampler="fixed-small")
    random_weights(folder / "ddim")
    random_weights(folder / "noisy", sample__eta=0.5)
    generator = torch.Generator().manual_seed(0)
    pixels = lambda *shape: torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    for i in range(8):
        save(folder / f"source/{i}.png", pixels(8, 8))
        save(folder / f"other/{i}.png", pixels(8, 8))
        save(folder / f"colours/{i}.png", pixels(8, 8, 3))
        save(folder / f"large/{i}.png", pixels(16, 16))
    left = torch.zeros(8, 8, dtype=torch.uint8)
    left[:, :4] = 255
    for name, mask in {"left": left, "white": left * 0 + 255, "black": left * 0, "large": pixels(16, 16)}.items():
        save(folder / f"masks/{name}.png", mask)
    (folder / "masks/text.png").write_text("hello")
    return folder


def arguments(inputs: Path, folder: str, mode: str, options: list) -> list:
    common = ["--weights", inputs / "weights/net.safetensors", "--save_dir", folder, "--mode", mode, "--n_samples", 8]
    steps = [] if mode == "consistency" else ["--skip_steps", STEPS]
    return [*common, *steps, *(str(option).format(source=inputs / "source") for option in options)]


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every entry of CALLS, each made by one process."""
    folder = tmp_path_factory.mktemp("made")
    for name, entry in CALLS.items():
        done = call(main, *arguments(inputs, name, *entry), cwd=folder)
        (folder / f"{name}.txt").write_text(done.stdout + done.stderr)
    return folder


# --- every mode ---


@every_call
def test_a_folder_holds_its_pictures_and_the_protocol(made: Path, name: str) -> None:
    count, *size = SHAPES[name]
    names = sorted(path.name for path in (made / name).iterdir())
    assert names == [f"{i:06d}.png" for i in range(count)] + ["protocol.json"]
    assert images(made / name).shape == (count, 1, *size)
    assert len({image.numpy().tobytes() for image in images(made / name)}) == count
    unit = {"sample": "images", "ddim": "images", "rows": "rows", "between": "rows", "squares": "squares"}
    words = (made / f"{name}.txt").read_text()
    assert f"{count} {unit.get(name, 'strips')} in {made / name}" in words and (made / f"{name}-grid.png").exists()
    assert identity(made / name)["mode"] == CALLS[name][0]


def test_two_processes_make_the_same_pictures(inputs: Path, made: Path, tmp_path: Path) -> None:
    on_two_processes(
        tmp_path,
        *(["sample_ddpm.py", *arguments(inputs, name, *call), "--micro_batch", 3] for name, call in CALLS.items()),
    )
    for name in CALLS:
        assert close(images(tmp_path / name), images(made / name)), name
        assert identity(tmp_path / name) == identity(made / name)
    ours, theirs = (errors(place / "reconstruct-errors.csv") for place in (made, tmp_path))
    assert theirs == pytest.approx(ours, rel=0.02)
    assert not any(path.name.endswith(".tmp") for path in tmp_path.rglob("*"))


@every_call
def test_an_interrupted_call_goes_on(inputs: Path, made: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(made / name, tmp_path / name)
    (tmp_path / name / "000001.png").unlink()
    (tmp_path / name / ".000000.png.tmp").write_bytes(b"half")
    done = call(main, *arguments(inputs, name, *CALLS[name]), "--micro_batch", 2, cwd=tmp_path)
    assert f"1 of {SHAPES[name][0]} " in done.stderr
    assert close(images(tmp_path / name), images(made / name))
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(p.name for p in (made / name).iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("rows", ["--n_interpolate", 4], "n_interpolate"),
        ("rows", ["--corners"], "corners"),
        ("rows", ["--source", "{source}"], "source"),
        ("rows", ["--sampler", "heun"], "sampler"),
        ("reconstruct", ["--source", "{other}"], "source"),
        ("inpaint", ["--mask", "right"], "mask"),
        ("inpaint", ["--n_resample", 3], "n_resample"),
        ("consistency", ["--skip_steps", 2, 6], "grids"),
        ("sample", ["--mode", "denoise"], "mode"),
        ("denoise", ["--n_denoise", 5], "frames"),
    ],
)
def test_a_folder_holds_one_protocol(inputs: Path, made: Path, name: str, changes: list, word: str) -> None:
    changes = [str(change).format(source=inputs / "source", other=inputs / "other") for change in changes]
    args, says = arguments(inputs, name, *CALLS[name]), [f"{name} holds images of another protocol ({word}"]
    before = contents(made)
    done = call(main, *args, *changes, cwd=made, status=2)
    assert all(part in done.stderr for part in says), done.stderr
    assert done.stdout == "" and contents(made) == before


# --- what the pictures show ---


def test_the_ends_of_interpolations_are_samples(made: Path) -> None:
    samples = images(made / "ddim")
    rows = columns(made / "rows")
    assert close(rows[:, [0, -1]].flatten(0, 1), samples)
    squares = torch.stack(columns(made / "squares").split(8, dim=-2), dim=1)  # [2, row, column, C, 8, 8]
    assert close(squares[:, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(0, 1), samples)
    for middle in (rows[:, 1], squares[:, 1, 1]):
        assert not any(close(image, sample) for image in middle for sample in samples)


def test_interpolations_between_real_images_end_in_their_reconstructions(made: Path) -> None:
    decoded = columns(made / "reconstruct")[:, 1]
    assert close(columns(made / "between")[:, [0, -1]].flatten(0, 1), decoded)


def test_reconstruct_shows_the_source_and_writes_its_errors(inputs: Path, made: Path) -> None:
    real, decoded = columns(made / "reconstruct").double().div(255).unbind(1)
    assert torch.equal((real * 255).round().to(torch.uint8), images(inputs / "source"))
    expected = (real - decoded).square().mean((1, 2, 3)).tolist()
    found = errors(made / "reconstruct-errors.csv")
    assert list(found) == [f"{i:06d}.png" for i in range(8)]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    words = (made / "reconstruct.txt").read_text()
    assert f"mean {sum(expected) / 8:.2e}" in words and "reconstruct-errors.csv" in words


def test_a_data_set_is_a_source_by_name(inputs: Path, tmp_path: Path) -> None:
    """Its test split, as it is not what a network was trained on; another split by name."""
    from sklearn.datasets import load_digits

    splits = ("digits", "digits:test", "digits:train")
    for split in splits:
        options = ["--source", split, "--n_samples", 2]
        call(main, *arguments(inputs, split, "reconstruct", options), cwd=tmp_path)
    real = [columns(tmp_path / split)[:, 0] for split in splits]
    assert torch.equal(*real[:2]) and not torch.equal(*real[1:])
    known = {image.tobytes() for image in (load_digits().images / 16 * 255).round().astype("uint8")}
    assert all(image.numpy().tobytes() in known for image in torch.cat(real))


def test_inpaint_shows_the_source_its_known_part_and_the_whole(inputs: Path, made: Path, tmp_path: Path) -> None:
    source, known, whole = columns(made / "inpaint").unbind(1)
    assert torch.equal(source, images(inputs / "source"))
    assert torch.equal(known[..., 4:], source[..., 4:]) and torch.equal(whole[..., 4:], source[..., 4:])
    assert known[..., :4].unique().tolist() == [128]
    assert (whole[..., :4] != source[..., :4]).float().mean() > 0.5
    mode, options = CALLS["inpaint"]
    options = [inputs / "masks/left.png" if option == "left" else option for option in options]
    call(main, *arguments(inputs, "file", mode, options), cwd=tmp_path)
    assert identity(tmp_path / "file") == identity(made / "inpaint")
    assert torch.equal(images(tmp_path / "file"), images(made / "inpaint"))
    call(main, *arguments(inputs, "seed", mode, options), "--seed", 1, cwd=tmp_path)
    other = columns(tmp_path / "seed")[:, 2]
    assert torch.equal(other[..., 4:], source[..., 4:]) and not close(other[..., :4], whole[..., :4])


def test_consistency_is_the_sample_at_every_count(inputs: Path, made: Path, tmp_path: Path) -> None:
    few, many = columns(made / "consistency").unbind(1)
    assert close(many, images(made / "ddim"))
    call(main, *arguments(inputs, "two", "sample", ["--sampler", "ddim", "--skip_steps", 2]), cwd=tmp_path)
    assert close(few, images(tmp_path / "two"))
    call(main, *arguments(inputs, "default", "consistency", ["--n_samples", 2]), cwd=tmp_path)
    assert [len(grid) for grid in identity(tmp_path / "default")["grids"]] == [10, 20]  # of 10, 20, 50, 100 and T
    assert columns(tmp_path / "default").shape[1] == 2


@pytest.mark.parametrize(("kind", "mode"), [("webp", "denoise"), ("gif", "progressive")])
def test_animation(inputs: Path, made: Path, tmp_path: Path, kind: str, mode: str) -> None:
    """The strips, played; the last frame is the grid of the samples and stays longest."""
    shutil.copytree(made / mode, tmp_path / mode)
    options = ["--animate"] if kind == "webp" else ["--animate", kind]
    done = call(main, *arguments(inputs, mode, mode, [*CALLS[mode][1], *options]), cwd=tmp_path)
    path = tmp_path / f"{mode}-animation.{kind}"
    assert str(path) in done.stdout
    samples = Image.open(made / "sample-grid.png").convert("L")
    durations = []
    with Image.open(path) as played:
        assert played.format == kind.upper() and played.size == samples.size
        assert played.n_frames == columns(made / mode).shape[1] and played.info["loop"] == 0
        for i in range(played.n_frames):
            played.seek(i)
            frame = played.convert("L")
            durations.append(played.info["duration"])
    last, expected = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in (frame, samples))
    assert close(last, expected)
    assert kind == "webp" or durations[-1] > 5 * durations[0]  # a WebP's last frame tells the sum in some versions


def test_show_grid_prints_the_timesteps(inputs: Path, tmp_path: Path) -> None:
    look = ["--weights", inputs / "weights/net.safetensors", "--show_grid"]
    done = call(main, *look, "--skip_steps", 5, cwd=tmp_path)
    table = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    steps = [row for row in table if row[1].lstrip("-").isdigit()]
    assert [int(t) for _, t, *_ in steps] == [19, 15, 11, 7, 3]
    assert [int(t_prev) for _, _, t_prev, *_ in steps] == [15, 11, 7, 3, -1]
    assert [float(row[4]) for row in steps] == [*(float(row[3]) for row in steps[1:]), 1.0]
    done = call(main, *look, "--mode", "consistency", "--skip_steps", 2, 3, cwd=tmp_path)
    assert sum(line.split()[0].isdigit() and line.split()[1].isdigit() for line in done.stdout.splitlines()) == 5
    call(main, *look, "--mode", "reconstruct", cwd=tmp_path)  # nothing is missing where nothing is generated
    assert contents(tmp_path) == {}
    done = call(main, *look, "--skip_steps", 2, "--n_samples", 1, "--save_dir", "out", cwd=tmp_path)
    assert "alpha_bar" in done.stdout and "1 images in" in done.stdout and (tmp_path / "out/000000.png").exists()


def test_only_the_main_process_prints_the_timesteps(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    look = ["--weights", inputs / "weights/net.safetensors", "--show_grid"]
    assert call(main, *look, cwd=tmp_path).stdout == ""


def test_deterministic_modes_take_ddim_for_a_stochastic_sampler(inputs: Path, made: Path, tmp_path: Path) -> None:
    for name, (mode, _) in CALLS.items():
        says = "the sampler is ddim, because fixed-small draws noise" in (made / f"{name}.txt").read_text()
        assert says == (mode in ("interpolate", "reconstruct", "consistency"))
        expected = "ddim" if says or name == "ddim" else "fixed-small"
        assert identity(made / name)["sampler"] == expected
    args = ["--weights", inputs / "noisy/net.safetensors", "--n_samples", 2, "--skip_steps", 2]
    call(main, *args, "--save_dir", "rows", "--mode", "interpolate", "--n_interpolate", 2, cwd=tmp_path)
    call(main, *args, "--save_dir", "images", "--eta", 0, cwd=tmp_path)
    assert identity(tmp_path / "rows")["eta"] == 0
    assert close(columns(tmp_path / "rows")[0], images(tmp_path / "images"))
    call(main, *args, "--save_dir", "heun", "--mode", "interpolate", "--sampler", "heun", cwd=tmp_path)
    assert identity(tmp_path / "heun")["sampler"] == "heun" and identity(tmp_path / "heun")["eta"] == 0


# --- wrong input ---

SOURCE, MASK = "--source {inputs}/source", "--mask {inputs}/masks/left.png"
REFUSED = [
    ("--eta 1.5", ["eta", "<= 1"]),
    ("--eta=-0.1", ["eta", ">= 0"]),
    ("--eta nan", ["eta"]),
    ("--eta 0.5 --sampler fixed-small", ["eta", "fixed-small", "ignores"]),
    ("--eta 0.5 --sampler heun", ["eta", "heun", "ignores"]),
    ("--sampler learned-range", ["learned-range", "learn_variance"]),
    (f"--mode reconstruct {SOURCE} --sampler ddim --eta 0.5", ["reconstruct", "eta"]),
    (f"--mode reconstruct {SOURCE} --sampler fixed-small", ["reconstruct", "fixed-small", "ddim, heun, dpm++2m"]),
    ("--mode interpolate --sampler ddim --eta 0.5", ["interpolate", "eta"]),
    ("--mode interpolate --sample.sampler fixed_large", ["interpolate", "fixed-large", "ddim"]),
    ("--mode consistency --sampler fixed-large", ["consistency", "fixed-large", "ddim"]),
    ("--mode interpolate --n_samples 1", ["--n_samples 1", "multiple of 2"]),
    ("--mode interpolate --n_samples 3", ["--n_samples 3", "multiple of 2"]),
    ("--mode interpolate --corners --n_samples 6", ["--n_samples 6", "multiple of 4"]),
    ("--mode interpolate --n_interpolate 1", ["--n_interpolate 1", "at least 2"]),
    ("--mode interpolate --n_interpolate 0", ["--n_interpolate", "'0'"]),
    ("--mode reconstruct", ["reconstruct", "needs --source"]),
    (f"--mode inpaint {SOURCE}", ["inpaint", "needs --mask"]),
    (f"--mode inpaint {MASK}", ["inpaint", "needs --source"]),
    ("--mode reconstruct --source {inputs}/large", ["large", "16x16 gray", "8x8 gray"]),
    ("--mode reconstruct --source {inputs}/colours", ["colours", "8x8 RGB", "8x8 gray"]),
    ("--mode interpolate --source {inputs}/nothing", ["nothing", "folder"]),
    ("--mode reconstruct --source {inputs}/weights", ["weights", "holds no"]),
    ("--mode reconstruct --source digit", ["--source digit", "did you mean digits"]),
    ("--mode reconstruct --source digits:half", ["digits:half", "train, test, all"]),
    (f"--mode reconstruct {SOURCE} --n_samples 9", ["--n_samples 9", "8 images"]),
    (f"--mode inpaint {SOURCE} --mask {{inputs}}/masks/large.png", ["large.png", "16x16", "8x8"]),
    (f"--mode inpaint {SOURCE} --mask {{inputs}}/masks/white.png", ["white.png", "nothing is known"]),
    (f"--mode inpaint {SOURCE} --mask {{inputs}}/masks/black.png", ["black.png", "nothing to fill"]),
    (f"--mode inpaint {SOURCE} --mask {{inputs}}/masks/text.png", ["text.png", "can't be read"]),
    (f"--mode inpaint {SOURCE} --mask {{inputs}}/masks/none.png", ["none.png", "left, right, top"]),
    (f"--mode inpaint {SOURCE} --mask middle", ["middle", "left, right, top, bottom, center"]),
    (f"--mode inpaint {SOURCE} --mask left --n_resample 0", ["--n_resample", "'0'"]),
    ("--mask left", ["--mask", "inpaint", "sample"]),
    (f"--mode reconstruct {SOURCE} --n_resample 3", ["--n_resample", "inpaint", "reconstruct"]),
    (SOURCE, ["--source", "interpolate or reconstruct or inpaint"]),
    ("--corners", ["--corners", "interpolate"]),
    ("--mode denoise --n_interpolate 3", ["--n_interpolate", "interpolate", "denoise"]),
    ("--mode interpolate --animate", ["--animate", "denoise or progressive"]),
    ("--mode denoise --animate mp4", ["--animate", "mp4", "gif"]),
    ("--skip_steps 5 10", ["--skip_steps 5 10", "consistency", "sample"]),
    ("--skip_steps x", ["skip_steps", "'x'"]),
    ("--mode consistency --skip_steps 5 0", ["--skip_steps 0", "1 to 20"]),
    ("--mode consistency --skip_steps 2000", ["--skip_steps 2000", "1 to 20"]),
    ("--mode consistency --skip_steps x 5", ["--skip_steps x", "1 to 20"]),
    ("--mode consistency --skip_steps 5 --sample.skip_steps 4", ["skip_steps"]),
    ("--skip_type cubic", ["skip_type", "cubic", "logsnr"]),
]


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[line for line, _ in REFUSED])
def test_wrong_input_ends_in_one_line(inputs: Path, tmp_path: Path, line: str, says: list[str]) -> None:
    args = ["--weights", inputs / "ddim/net.safetensors", "--save_dir", "out", "--n_samples", 4]
    refused(main, *args, *line.format(inputs=inputs).split(), cwd=tmp_path, says=says)


def test_nothing_is_said_about_the_sampler_before_wrong_input(inputs: Path, tmp_path: Path) -> None:
    args = ["--weights", inputs / "weights/net.safetensors", "--save_dir", "out", "--n_samples", 4]
    refused(main, *args, "--mode", "consistency", "--skip_steps", 0, cwd=tmp_path, says=["--skip_steps 0"])

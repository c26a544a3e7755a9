"""Seeded noise in command lines and YAML files: understood, or refused in one clear line, soon and without torch."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from utils import config

# All lines in one fresh interpreter. Memory and time of a line are bounded, so that a bomb is an answer and not a wait.
DRIVER = """
import io, json, resource, signal, sys, time, traceback
from contextlib import redirect_stderr, redirect_stdout

resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
root, listed = sys.argv[1:]
sys.path.insert(0, root)
import evaluate_ddpm, sample_ddpm, train_ddpm, yaml
from utils.errors import run_script

def late(*_):
    raise TimeoutError("still busy")

def parsing():
    began = time.process_time()
    yaml.safe_load("[" + "1," * 9000 + "1]")
    return time.process_time() - began

signal.signal(signal.SIGPROF, late)
for line in open(listed):
    name, *args = json.loads(line)
    sys.argv = [f"{name}.py", *args]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how) for how in ("strict", "backslashreplace"))
    began, status, trace = time.process_time(), None, ""
    try:
        signal.setitimer(signal.ITIMER_PROF, 10)
        with redirect_stdout(out), redirect_stderr(err):
            run_script(getattr(sys.modules[name], "main"))
    except SystemExit as end:
        status = end.code
    except BaseException:
        trace = traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    times = seconds / parsing() if seconds > 0.5 else 1
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    print(json.dumps([status, *texts, times, trace[-1500:], "torch" in sys.modules]), flush=True)
"""
SOON = 4  # times what PyYAML takes, at that moment and on that machine, to read the longest list of the YAML files
SCRIPTS = ["train_ddpm", "sample_ddpm", "evaluate_ddpm"]
OPTIONS = [
    *("--seed", "--eta", "--skip_steps", "--n_samples", "--micro_batch", "--mode", "--load_ema", "--sampler"),
    *("--metrics", "--samplers", "--etas", "--repeats", "--n_denoise", "--mask", "--feature_extractor", "-e", "-x"),
]
NASTY = [
    *("", " ", "nan", "-inf", "1e400", "-1", "0", "010", "1_000", "0x10", "1e3", "1.5", "-0.0", "٣", "²", "9" * 23),
    *("1" + "0" * 400, "9" * 5000, "true", "No", "~", "null", "???", "${oc.env:HOME}", "${seed}", "${", "$(id)", "%s"),
    *("!!python/object/apply:os.system [id]", "!!binary aGk=", "*a", "&a [*a]", "{a: 1}", "a: b", "'", "[", "]", "[]"),
    *("[1,2", "[1,,2]", "[1,2,2]", "[nan]", "[${seed}]", "[[1],[2]]", "[" * 5000, "[" * 5000 + "]" * 5000),
    *("a" * 100_000, "[" + "1," * 20_000 + "1]", "ü\u202e\u2028\x1b[2J", "\udcff", "a\nb", "\t", "🙂", "..", "--", "-"),
]
LONG = [
    *(["--train.n_steps", "1" + "0" * 400], ["--seed", "1" + "0" * 400], ["--train.betas[" + "9" * 5000 + "]", "1"]),
    *(["--model.dim_mults", "[" + "1," * 15_000 + "1]"], ["-c", "a" * 10**5], ["--train.lr", "[" * 9]),
    *(["--data.image_size", "9" * 5000], ["--" + "a" * 10**5], ["--model." + "a" * 10**5, "1"], ["a" * 10**5]),
    *(["--seed", "1"] * 300, ["--data.root", "\udcff"], ["--model.attn_resolutions", "[" + "8," * 9000 + "8]"]),
]  # fmt: skip
FEW = 40  # characters of a case in a report


def mutated(rng, text: str) -> str:
    """One or two characters deleted, doubled, exchanged or replaced."""
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(text))
        new = rng.choice(["", text[i] * 2, text[i].swapcase(), *".[]-_=ü 0\x1b"])
        text = (text[:i] + new + text[i + 1 :]) or "-"
    return text


def good_value(rng, info: config.KeyInfo) -> str:
    if info.choices and not info.is_list:
        return rng.choice(info.choices)
    return "null" if info.default is None else str(info.default)


def words(rng) -> list[str]:
    """One option with its value, right or wrong."""
    info = config.KEYS[rng.choice(list(config.KEYS))]
    name, value = f"--{info.name}", good_value(rng, info)
    nasty = rng.choice(NASTY)
    kinds = {"good": 58, "nasty": 18, "name": 6, "index": 6, "bare": 4, "option": 8}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "nasty":
        value = nasty
    elif kind == "name":
        name = "--" + mutated(rng, info.name)
    elif kind == "index":
        lists = ["model.dim_mults", "train.betas", "evaluate.metrics", "model.attn_resolutions", info.name]
        index = rng.choice(["0", "1", "9", "-1", "", "0][0", "x", "0.5", "²", "9" * 5000, "${seed}"])
        name, value = f"--{rng.choice(lists)}[{index}]", rng.choice(["2", "fid", "0.5", nasty])
    elif kind == "bare":
        return [rng.choice([name, f"{name}=", "--", name.lstrip("-"), "-" + name])]
    elif kind == "option":
        name, value = rng.choice(OPTIONS), rng.choice([value, nasty, "1", "2"])
    return [f"{name}={value}"] if rng.random() < 0.4 else [name, value]


def command_line(rng) -> list[str]:
    """Up to four options, some of them twice; nothing starts."""
    groups = [words(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.2:
        groups.append(groups[0])
    groups.insert(rng.randrange(len(groups) + 1), ["--print_config"])
    return [rng.choice(SCRIPTS), *(word for group in groups for word in group)]


def mutated_bytes(rng, raw: bytes, n: int) -> bytes:
    """n bytes flipped, inserted or deleted."""
    found = bytearray(raw)
    for _ in range(n):
        i = rng.randrange(max(1, len(found)))
        kind = rng.randrange(3) if found else 1
        if kind == 0:
            found[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found.insert(i, rng.choice([*b"\t\n :-[]{}&*!'\"#%@0~", rng.randrange(256)]))
        else:
            del found[i]
    return bytes(found)


def laughs(depth: int) -> bytes:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines).encode()


YAML = {
    "empty": b"", "comment": b"# nothing", "laughs": laughs(9), "merged laughs": laughs(5) + b"\ntrain: *a4",
    "recursive list": b"model: {dim_mults: &a [1, *a]}", "recursive section": b"train: &a {lr: 1, x: *a}",
    "recursive merge": b"train: &a\n  <<: *a\n  lr: 1", "recursive root": b"&a {train: *a}", "scalar": b"train",
    "deep list": b"model: {dim_mults: " + b"[" * 3000 + b"]" * 3000 + b"}", "not closed": b"train: " + b"[" * 3000,
    "deep map": b"{a: " * 2000 + b"1" + b"}" * 2000, "latin-1": "data: {root: ü}".encode("latin-1"),
    "nul": b"data: {root: a\0b}", "escaped nul": b'data: {root: "a\\0b"}', "tab": b"train:\n\tlr: 1",
    "utf-16": "train: {lr: 1}".encode("utf-16"), "bom": b"\xef\xbb\xbftrain: {lr: 1}", "binary": bytes(range(256)),
    "two documents": b"train: {lr: 1}\n---\nseed: 1", "int key": b"1: 2", "null key": b"~: 2",
    "set": b"train: !!set {lr}", "list key": b"? [a]\n: 1", "float key": b"train: {1.5: 2}",
    "date": b"seed: 2001-13-45",
    "missing": b"seed: ???",
    "tagged": b"data: {root: !!binary aGk=}", "unknown tag": b"data: !foo {root: a}", "infinite": b"train: {lr: .inf}",
    "python": b"seed: !!python/object/apply:os.system [id]", "environment": b"data: {root: '${oc.env:HOME}'}",
    "environment key": b"'${oc.env:HOME}': 1", "huge": b"seed: 1" + b"0" * 400, "huger": b"seed: " + b"9" * 5000,
    "long": b"data: {root: " + b"a" * 10**6 + b"}", "long list": b"model: {dim_mults: [" + b"1," * 9000 + b"1]}",
    "dots": b"train.: 1", "brackets": b"model.dim_mults[0]: 1", "superscript": "model.dim_mults[²]: 1".encode(),
    "escape": b'"\\e]0;title\\a": 1',
}  # fmt: skip


def command_lines(folder: Path) -> list[list[str]]:
    rng = random.Random(0)
    lines = [command_line(rng) for _ in range(450)]
    (folder / "folder.yaml").mkdir()
    files = dict(YAML)
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        raw = recipe.read_bytes()
        files |= {f"{recipe.stem} {i}": mutated_bytes(rng, raw, 1 + i % 4) for i in range(10)}
    for name, raw in files.items():
        (folder / f"{name}.yaml").write_bytes(raw)
    paths = [f"{name}.yaml" for name in [*files, "folder", "absent", "a" * 5000, "\udcff"]]
    lines += [["train_ddpm", *words, "--print_config"] for words in LONG]
    return lines + [[rng.choice(SCRIPTS), "-c", path, "--print_config"] for path in paths]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[tuple]:
    """(command line, status, stdout, stderr, CPU time in parsings of a long list, traceback, torch was imported)."""
    folder = tmp_path_factory.mktemp("lines")
    lines = command_lines(folder)
    listed = folder / "lines.json"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(listed)]
    before = sorted(os.listdir(folder))
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines) > 500 and sorted(os.listdir(folder)) == before
    return [([word[:FEW] for word in line], *answer) for line, answer in zip(lines, found)]


def test_every_line_is_understood_or_refused(answers):
    def fine(line, status, out, err, *_):
        if status == 0:
            return err == "" and out.startswith(("seed: ", "usage: "))
        shown = err.removesuffix("\n")
        return status == 2 and out == "" and err.startswith(f"{line[0]}.py: error: ") and shown.splitlines() == [shown]

    wrong = [(line, status, err[-300:], trace) for line, status, out, err, _, trace, _ in answers
             if not fine(line, status, out, err)]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(answers)}\n" + "\n".join(map(str, wrong[:12]))
    statuses = [status for _, status, *_ in answers]
    assert min(statuses.count(0), statuses.count(2)) > len(answers) // 4


def test_every_line_is_answered_soon_and_without_torch(answers):
    slow = [(line, times) for line, _, _, _, times, *_ in answers if times > SOON]
    assert not slow
    assert not any(torch for *_, torch in answers)


def test_no_refusal_floods_the_terminal(answers):
    """A value of 100,000 characters is not repeated in full, and no control character passes."""
    flooding = [(line, len(err), err[:200]) for line, _, _, err, *_ in answers
                if len(err) > 2000 or not err.rstrip("\n").isprintable()]  # fmt: skip
    assert not flooding, f"{len(flooding)} of {len(answers)}: {flooding[:5]}"

"""The explorer's page in headless Chromium, as a visitor uses it; skipped where that or what it needs is missing."""

import importlib.util
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import ROOT, environment
from in_process import call, random_weights, refused
from PIL import Image
from test_upload import bomb

import sample_ddpm
from utils.explorer.upload import MOST_BYTES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium (apt-get install chromium)"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the page is not driven: {', '.join(MISSING)} not installed")
SECONDS = 60  # that anything may take here [s]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """(address, weights, folder, its temporary files): a page of a small network with T = 1000, in its own process."""
    place = tmp_path_factory.mktemp("page")
    weights = random_weights(place / "net", diffusion__total_steps=1000, sample__skip_steps=40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(ROOT / "explore_ddpm.py"), "--weights", str(weights), "--port", str(port)]
    (place / "tmp").mkdir()
    variables = {**environment(), "no_proxy": "127.0.0.1", "TMPDIR": str(place / "tmp")}
    with open(place / "log.txt", "w") as log:
        process = subprocess.Popen(words, cwd=place, env=variables, stdout=log, stderr=subprocess.STDOUT)
    began = time.monotonic()
    while f"http://127.0.0.1:{port}" not in (place / "log.txt").read_text():
        assert process.poll() is None and time.monotonic() - began < SECONDS, (place / "log.txt").read_text()
        time.sleep(0.1)
    (files,) = (place / "tmp").glob("explore-ddpm-*")
    yield f"http://127.0.0.1:{port}/", weights, place, files
    process.terminate()
    assert process.wait(30) == 143
    text = (place / "log.txt").read_text()
    assert "Traceback" not in text, text


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Visitor:
    """A browser's page of its own, and what it does there."""

    def __init__(self, browser, address: str) -> None:
        self.page = browser.new_context(viewport={"width": 1240, "height": 900}).new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#run-sample")

    def fill(self, field: str, text: str) -> None:
        self.page.fill(f"#{field} input, #{field} textarea", text)

    def choose(self, field: str, choice: str) -> None:
        self.page.click(f"#{field} input")
        self.page.get_by_role("option", name=choice, exact=True).click()

    def press(self, name: str, tab: str | None = None) -> None:
        if tab:
            self.page.get_by_role("tab", name=tab).click()
        self.page.click(f"#{name}")

    def said(self, *words: str) -> str:
        """Wait until the status says one of these."""
        self.page.wait_for_function(
            "words => words.some(word => document.querySelector('#status').innerText.includes(word))", arg=list(words)
        )
        return self.page.inner_text("#status")

    def pictures(self, where: str = "stage") -> list[str]:
        return self.page.eval_on_selector_all(f"#{where} img", "found => found.map(image => image.src)")

    def frames(self, n: int) -> set[str]:
        """Watch until so many different first pictures were seen."""
        seen, began = set(), time.monotonic()
        while len(seen) < n and time.monotonic() - began < SECONDS:
            seen.update(self.pictures()[:1])
            time.sleep(0.05)
        return seen

    def download(self, i: int, to: Path) -> bytes:
        with self.page.expect_download() as found:
            self.page.click(f"#download-{i}")
        found.value.save_as(to)
        return to.read_bytes()

    def command(self, i: int) -> list[str]:
        return shlex.split(self.page.input_value(f"#command-{i} textarea"))

    def repeats(self, i: int, cwd: Path, ending: str) -> bool:
        """Whether the i-th command makes the i-th download, byte for byte."""
        words = self.command(i)
        call(sample_ddpm.main, *words[2:], cwd=cwd)
        made = cwd / f"{words[words.index('--save_dir') + 1]}-{ending}"
        return made.read_bytes() == self.download(i, cwd / f"download-{i}")


@pytest.fixture
def visitor(browser, served):
    visitor = Visitor(browser, served[0])
    yield visitor
    visitor.page.context.close()
    assert visitor.errors == []
    hosts = {urlparse(url).hostname for url in visitor.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}  # the page needs no network


def test_sample_with_frames_on_the_way(visitor: Visitor, tmp_path: Path) -> None:
    visitor.fill("steps", "200")
    visitor.choose("sampler", "fixed-large")
    visitor.press("run-sample")
    assert len(visitor.frames(4)) == 4
    assert "of 200, t = " in visitor.said("step") and len(visitor.pictures()) == 2
    visitor.said("done in")
    assert len(visitor.pictures()) == 2 and "200 network evaluations per image" in visitor.page.inner_text("#stage")
    assert visitor.repeats(1, tmp_path, "grid.png")
    assert visitor.repeats(2, tmp_path, "animation.webp")
    assert "fixed-large" in visitor.command(1)


def test_compare(visitor: Visitor, tmp_path: Path) -> None:
    visitor.fill("n-samples", "4")
    visitor.press("run-compare", tab="Compare")
    visitor.said("done in")
    text = visitor.page.inner_text("#stage")
    assert "A: ddim, 40 trailing steps" in text and "B: ddim, 10 trailing steps" in text
    assert "40 network evaluations" in text and "10 network evaluations" in text and text.count(" s, ") == 2
    assert visitor.repeats(1, tmp_path, "grid.png") and visitor.repeats(2, tmp_path, "grid.png")


def test_interpolate_and_slide(visitor: Visitor, tmp_path: Path) -> None:
    visitor.press("run-interpolate", tab="Interpolate")
    visitor.said("done in")
    visitor.page.wait_for_selector("#point-picture img")
    middle = visitor.pictures("point-picture")
    visitor.page.fill("#point input[type=number]", "0")
    visitor.page.wait_for_function("document.querySelector('#point-picture').innerText.includes('point 0 of')")
    assert visitor.pictures("point-picture") != middle
    assert visitor.repeats(1, tmp_path, "grid.png")
    assert "--seed_to" in visitor.command(1)


def test_upload_reconstruct_and_bombs(visitor: Visitor, served, tmp_path: Path) -> None:
    Image.effect_noise((50, 40), 80).save(tmp_path / "mine.png")
    (tmp_path / "bomb.png").write_bytes(bomb("pixels"))
    (tmp_path / "heavy.png").write_bytes(bomb("bytes"))
    visitor.press("run-reconstruct", tab="Reconstruct")
    assert "no image was uploaded" in visitor.said("error:")
    upload(visitor, tmp_path / "mine.png")
    visitor.press("run-reconstruct")
    visitor.said("done in")
    assert len(visitor.pictures()) == 2 and "80 network evaluations" in visitor.page.inner_text("#stage")
    words = visitor.command(1)
    source = words.index("--source") + 1
    assert words[source].startswith("explored/source-")
    shutil.copytree(served[2] / words[source], tmp_path / words[source])
    assert visitor.repeats(1, tmp_path, "grid.png")
    visitor.page.click("#upload [aria-label='Clear']")
    upload(visitor, tmp_path / "bomb.png")
    visitor.press("run-reconstruct")
    assert "declares 5000x5001 pixels" in visitor.said("error:")
    visitor.page.click("#upload [aria-label='Clear']")
    visitor.page.set_input_files("#upload input[type=file]", tmp_path / "heavy.png")
    visitor.page.get_by_text("exceed the maximum").first.wait_for()  # the server takes no more than that
    visitor.press("run-sample", tab="Sample")  # nothing is broken
    visitor.said("done in")


def upload(visitor: Visitor, file: Path) -> None:
    visitor.page.set_input_files("#upload input[type=file]", file)
    visitor.page.locator("#upload").get_by_text(file.stem).first.wait_for()


def test_stop_and_go_on(visitor: Visitor) -> None:
    long_job(visitor)
    visitor.press("stop")
    assert "stopped: step" in visitor.said("stopped")
    seen = visitor.pictures()
    time.sleep(0.5)
    assert visitor.pictures() == seen
    assert not visitor.page.is_enabled("#stop")
    visitor.fill("n-samples", "1")
    visitor.fill("steps", "3")
    visitor.press("run-sample")
    visitor.said("done in")


def long_job(visitor: Visitor) -> None:
    """Takes minutes."""
    visitor.fill("n-samples", "64")
    visitor.fill("steps", "1000")
    visitor.choose("sampler", "heun")
    visitor.press("run-sample")
    visitor.frames(2)


def test_a_long_job_freezes_nobody(visitor: Visitor, browser, served) -> None:
    long_job(visitor)
    other = Visitor(browser, served[0])
    other.fill("n-samples", "1")
    other.press("run-sample")
    other.said("done in")
    assert "step" in visitor.page.inner_text("#status")  # still at it
    other.page.context.close()
    visitor.press("stop")
    visitor.said("stopped")


def test_who_leaves_stops_the_job(browser, served) -> None:
    visitor, before = Visitor(browser, served[0]), set(served[3].iterdir())
    long_job(visitor)
    (folder,) = set(served[3].iterdir()) - before
    visitor.page.context.close()
    began = time.monotonic()
    while folder.exists():  # until the work has ended
        assert time.monotonic() - began < SECONDS
        time.sleep(0.2)


def test_the_server_itself_takes_no_large_file(served) -> None:
    for size, status in ((1000, 200), (MOST_BYTES + 1, 413)):
        head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head.encode() + bytes(size) + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{served[0]}gradio_api/upload", body, kind)
        try:
            assert urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).status == status
        except urllib.error.HTTPError as error:
            assert error.code == status


def test_wrong_input_is_told_in_the_words_of_the_command_line(visitor: Visitor, served, tmp_path: Path) -> None:
    for field, text in (("seed", "abc"), ("steps", "1001"), ("n-samples", "0")):
        before = visitor.page.input_value(f"#{field} input, #{field} textarea")
        visitor.fill(field, text)
        visitor.press("run-sample")
        line = visitor.said(f"'{text}'" if text != "1001" else text).removeprefix("error: ")
        option = {"seed": "--seed", "steps": "--skip_steps", "n-samples": "--n_samples"}[field]
        args = {"--n_samples": "1", "--seed": "1", option: text}
        words = [word for pair in args.items() for word in pair]
        refused(sample_ddpm.main, "--weights", served[1], "--save_dir", "out", *words, cwd=tmp_path, says=[line])
        visitor.fill(field, before)
    assert visitor.pictures() == []

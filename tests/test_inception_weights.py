"""Files of Inception's weights: read, or refused in one clear line without running what they hold."""

import pickle
import re
import urllib.error

import pytest
import torch
from test_fidelity import CPU, INCEPTION
from torch_fidelity import feature_extractor_inceptionv3 as inception

from utils import classifier
from utils.errors import InputError
from utils.fidelity import open_extractor


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the right names and shapes."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(inception.FeatureExtractorInceptionV3(INCEPTION, ["2048"]).state_dict(), path)
    return path


def test_inception_reads_a_local_file_and_one_channel(inception_file):
    found = open_extractor(INCEPTION, str(inception_file), ["fid"], 4, CPU)
    images = torch.randint(0, 256, (4, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    gray = found([images])
    assert gray["2048"].shape == (4, 2048) and bool(gray["2048"].isfinite().all()) and found.n_features(gray) == 2048
    assert gray["2048"].std(0).max() > 0
    assert torch.allclose(gray["2048"][:1], found([images[:1].expand(-1, 3, -1, -1)])["2048"], rtol=1e-3, atol=1e-5)
    assert len(found.weights_sha256) == 64


def _truncated(path, source):
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def _payload(path, _):
    torch.save({"fc.bias": Payload(path.parent / "executed")}, path)


def _raw_payload(path, _):
    path.write_bytes(pickle.dumps(Payload(path.parent / "executed")))


BROKEN = {
    "truncated": _truncated,
    "empty": lambda path, _: path.write_bytes(b""),
    "missing": lambda path, _: None,
    "folder": lambda path, _: path.mkdir(),
    "payload": _payload,
    "raw payload": _raw_payload,
    "other network": lambda path, _: torch.save({"weight": torch.zeros(3)}, path),
    "other shape": lambda path, source: torch.save(torch.load(source) | {"fc.bias": torch.zeros(3)}, path),
    "list": lambda path, _: torch.save([torch.zeros(3)], path),
}


@pytest.mark.parametrize("how, name", [
    *((how, "weights.pth") for how in BROKEN),
    *((how, "weights.safetensors") for how in BROKEN if how != "other shape"),
])  # fmt: skip
def test_weights_that_cannot_be_used_are_one_clear_error(inception_file, tmp_path, how, name):
    path = tmp_path / name
    BROKEN[how](path, inception_file)
    try:
        with pytest.raises(InputError, match=re.escape(str(path))):
            open_extractor(INCEPTION, str(path), ["fid"], 4, CPU)
    finally:
        assert not (tmp_path / "executed").exists(), "the file's code was run"


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no network"), ConnectionResetError("reset"), TimeoutError("slow"), OSError(28, "No space"),
])  # fmt: skip
def test_without_a_network_the_error_says_what_to_do(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(inception, "load_state_dict_from_url", fails)
    with pytest.raises(InputError) as raised:
        open_extractor(INCEPTION, None, ["fid"], 4, CPU)
    assert all(text in str(raised.value) for text in ("--feature_extractor_weights PATH", classifier.NAME, INCEPTION))
    assert "\n" not in str(raised.value)

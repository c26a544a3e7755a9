"""evaluate_ddpm.py against torch-fidelity's own command line, on the same PNGs and the same weights file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment
from in_process import call
from torch_fidelity import feature_extractor_inceptionv3 as inception

from evaluate_ddpm import main
from utils.images import file_name, write_png

N = 24
NAMES = {
    "fid": "frechet_inception_distance",
    "isc": "inception_score_mean",
    "isc_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "f_score",
}


def random_inception(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        net = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        torch.save(net.state_dict(), path)


@pytest.mark.slow
def test_the_scores_are_those_of_the_fidelity_command(tmp_path: Path) -> None:
    random_inception(tmp_path / "weights.pth")
    generator = torch.Generator().manual_seed(0)
    for name, top in (("ours", 256), ("real", 200)):
        (tmp_path / name).mkdir()
        for i in range(N):
            image = torch.randint(0, top, (3, 16, 16), generator=generator).to(torch.uint8)
            write_png(tmp_path / name / file_name(i), image)
    line = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--fid", "--isc", "--kid", "--prc", "--json"]
    line += ["--input1", "ours", "--input2", "real", "--kid-subset-size", "10", "--silent", "--no-cache"]
    line += ["--feature-extractor-weights-path", "weights.pth", "--feature-extractor", "inception-v3-compat"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    args = ["--images", "ours", "--reference", "real", "--feature_extractor_weights", "weights.pth", "--force"]
    more = ["--evaluate.kid_subset_size", 10, "--evaluate.cache_dir", "cache", "--out", "out", "--data.image_size", 16]
    call(main, *args, *more, cwd=tmp_path)
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert row["scores"].keys() == NAMES.keys()
    for name, name_there in NAMES.items():
        assert row["scores"][name] == pytest.approx(theirs[name_there], rel=1e-6, abs=1e-9), name

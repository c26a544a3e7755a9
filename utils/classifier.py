"""The dataset classifier: a small network trained once on a data set's own labels, for its features.

It stands in for Inception where Inception can't be had or does not fit (8x8 digits). Its scores compare only with
scores of the same classifier, so they always carry its name: fid[dataset-classifier].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from tqdm import tqdm

from diffusions.transfer import on
from utils.checkpoint import write_atomically
from utils.data.batches import Batches, decode_all
from utils.data.image_set import ImageSet, to_channels
from utils.errors import InputError

NAME = "dataset-classifier"
N_FEATURES = 64
SEED = 0
BATCH = 128
N_STEPS = 1500
VERSION = 1  # part of the cache key: raise it when anything below changes


class Classifier(nn.Module):
    """Convolutions at full and halved sizes down to 4 pixels or less, their mean, 64 features, class logits."""

    def __init__(self, image_size: int, channels: int, n_classes: int) -> None:
        super().__init__()
        widths, size = [32], image_size
        while size > 4:
            widths.append(min(2 * widths[-1], 128))
            size = (size + 1) // 2
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip([channels, *widths], widths)):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, c_out),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(widths[-1] * 4, N_FEATURES)
        self.logits = nn.Linear(N_FEATURES, n_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, C, H, W] -> (features [B, 64], logits [B, classes])."""
        h = self.body(images.float() / 127.5 - 1)
        size, step = -(-h.shape[-1] // 2), max(1, h.shape[-1] // 2)  # to 2x2: an adaptive pooling that is deterministic
        pooled = F.avg_pool2d(h, size, step).expand(-1, -1, 2, 2)
        features = self.features(pooled.flatten(1))
        return features, self.logits(F.relu(features))


class DatasetClassifier(FeatureExtractorBase):
    """The classifier as an extractor of torch-fidelity; `feature_extractor_weights_path` is a file of `trained`."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_
    ) -> None:
        super().__init__(name, features_list)
        with safe_open(feature_extractor_weights_path, "pt") as file:
            shape = json.loads(file.metadata()["shape"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.image_size, self.channels = shape["image_size"], shape["channels"]
        self.net = Classifier(**shape)
        self.net.load_state_dict(weights)
        self.requires_grad_(False).eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric in ("isc", "condition_accuracy") else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"the classifier reads {self.image_size}-pixel images, not {tuple(images.shape[-2:])}")
        if self.channels == 1 and images.shape[1] == 3:
            images = images[:, :1] if bool((images == images[:, :1]).all()) else to_channels(images, 1)
        found = dict(zip(self.get_provided_features_list(), self.net(to_channels(images, self.channels))))
        return tuple(found[name] for name in self.features_list)


register_feature_extractor(NAME, DatasetClassifier)


@dataclass(frozen=True)
class Trained:
    """A classifier on disk, and how well it classifies the test split (None where there is none)."""

    path: Path
    test_accuracy: float | None


def trained(train: ImageSet, test: ImageSet | None, cache_dir: Path, device: torch.device) -> Trained:
    """The classifier of a data set: from the cache, else trained now (1,500 steps of 128) with a fixed seed.

    Raises:
        InputError: the images have no labels.
    """
    if train.labels is None or len(train.classes) < 2:
        raise InputError(
            f"{NAME} needs labels, and {train.name} has none (image folders: one sub-folder per class); "
            "use another evaluate.feature_extractor"
        )
    shape = {"image_size": train[0].shape[-1], "channels": train[0].shape[0], "n_classes": len(train.classes)}
    identity = json.dumps([VERSION, SEED, N_STEPS, BATCH, shape, train.content_hash(), test and test.content_hash()])
    path = cache_dir / f"{NAME}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.safetensors"
    accuracy = _stored_accuracy(path, shape)
    if accuracy is None:
        net = _train(train, shape, device)
        labelled = test is not None and test.labels is not None
        accuracy = [_accuracy(net, test, device) if labelled else None]
        cache_dir.mkdir(parents=True, exist_ok=True)
        metadata = {"shape": json.dumps(shape), "test_accuracy": json.dumps(accuracy[0])}
        write_atomically(path, lambda p: save_file({k: v.cpu() for k, v in net.state_dict().items()}, p, metadata))
    return Trained(path, accuracy[0])


def check_file(path: str) -> None:
    """Raise InputError for a file that holds no classifier."""
    try:
        with safe_open(path, "pt") as file:
            shape = json.loads(file.metadata()["shape"])
            sizes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            wanted = {key: list(value.shape) for key, value in Classifier(**shape).state_dict().items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--feature_extractor_weights {path} holds no {NAME}: {error}") from None
    if sizes != wanted:
        raise InputError(f"--feature_extractor_weights {path} holds no {NAME}: its tensors have other names or shapes")


def _stored_accuracy(path: Path, shape: dict[str, int]) -> list[float | None] | None:
    """[the test accuracy in a cached file]; None where there is no readable one, which is then made again."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            return [json.loads(metadata["test_accuracy"])] if json.loads(metadata["shape"]) == shape else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _train(images: ImageSet, shape: dict[str, int], device: torch.device) -> nn.Module:
    batches = Batches(images, SEED, BATCH, device=device, cache="true")
    labels = images.labels.to(device)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        net = Classifier(**shape).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=N_STEPS)
    steps = batches.from_step(0, N_STEPS)
    for positions, pixels in tqdm(steps, total=N_STEPS, desc="train the dataset classifier", unit="step"):
        loss = F.cross_entropy(net(pixels)[1], labels[on(batches.image_ids(positions), device)], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def _accuracy(net: nn.Module, test: ImageSet, device: torch.device) -> float:
    parts = decode_all(test).split(512)
    predicted = torch.cat([net(part.to(device))[1].argmax(1).cpu() for part in parts])
    return (predicted == test.labels).float().mean().item()

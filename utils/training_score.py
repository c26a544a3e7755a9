"""`train.evaluate_every`: a cheap score of the EMA weights on the way, on all processes."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from diffusions import GaussianDiffusion, generate
from utils import classifier
from utils.distributed import share
from utils.fidelity import scores
from utils.preview import SEED
from utils.reference import open_for
from utils.scoring import Scorer


class TrainingScore:
    """FID between n_evaluate generated images and the training images, in features of the dataset classifier."""

    def __init__(self, accelerator, config: DictConfig) -> None:
        """Trains the classifier, or takes it from the cache. A collective. Raises InputError for unlabelled data."""
        config = config.copy()
        config.evaluate.metrics, config.evaluate.feature_extractor = ["fid"], classifier.NAME
        config.evaluate.feature_extractor_weights = None
        is_folder = config.data.name == "image_folder"
        reference = str(Path(config.data.root).resolve()) if is_folder else config.data.name
        config.data.root = reference if is_folder else config.data.root
        self.n, self.options = config.train.n_evaluate, config.sample
        found = open_for(accelerator, config, reference, None, {})
        self.scorer = Scorer.open(accelerator, config, found, self.n, None, force=False)

    def __call__(self, net: nn.Module, process: GaussianDiffusion, micro_batch: int, dtype) -> dict[str, float]:
        """{"fid[dataset-classifier]@N": value}. A collective; the value is that of the main process."""
        accelerator = self.scorer.accelerator
        mine = share(self.n, accelerator.process_index, accelerator.num_processes)
        batches = generate(net, process, self.options, mine, SEED, micro_batch, dtype=dtype)
        found = self.scorer.features(batch.images for batch in batches)
        if not accelerator.is_main_process:
            return {}
        value = scores(["fid"], self.scorer.extractor, found, self.scorer.real, 2)["fid"]
        return {f"fid[{classifier.NAME}]@{self.n}": value}

"""`train.evaluate_every`: a cheap score of the EMA weights on the way, on all processes."""

from __future__ import annotations

import math
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from diffusions import GaussianDiffusion, generate
from utils.distributed import from_main, share
from utils.preview import SEED


class TrainingScore:
    """FID between n_evaluate generated images and the training images, in features of the dataset classifier."""

    def __init__(self, accelerator, config: DictConfig, best: dict[str, float] | None) -> None:
        """Trains the classifier, or takes it from the cache. A collective. Raises InputError for unlabelled data.

        best: {"step", "score"} of a run that is resumed; `self.best` is the lowest score since its start.
        """
        from utils import classifier  # with the extractors behind them, these take a second to import
        from utils.reference import open_for
        from utils.scoring import Scorer

        self.best, self.extractor = best, classifier.NAME
        config = config.copy()
        config.evaluate.metrics, config.evaluate.feature_extractor = ["fid"], self.extractor
        config.evaluate.feature_extractor_weights = None
        is_folder = config.data.name == "image_folder"
        reference = str(Path(config.data.root).resolve()) if is_folder else config.data.name
        config.data.root = reference if is_folder else config.data.root
        self.n, self.options = config.train.n_evaluate, config.sample
        found = open_for(accelerator, config, reference, None, {})
        self.scorer = Scorer.open(accelerator, config, found, self.n, None)

    def __call__(
        self, step: int, net: nn.Module, process: GaussianDiffusion, micro_batch: int, dtype
    ) -> dict[str, float]:
        """{"fid[dataset-classifier]@N": value}, the same on every process. A collective. Updates `best`."""
        from utils.fidelity import scores

        accelerator = self.scorer.accelerator
        mine = share(self.n, accelerator.process_index, accelerator.num_processes)
        batches = generate(net, process, self.options, mine, SEED, micro_batch, self.scorer.cond, dtype)
        found = self.scorer.features(batch.images for batch in batches)
        value = None
        if accelerator.is_main_process:
            value = scores(["fid"], self.scorer.extractor, found, self.scorer.real, 2)["fid"]
        value = from_main(accelerator, value)
        if math.isfinite(value) and (self.best is None or value < self.best["score"]):
            self.best = {"step": step, "score": value}
        return {f"fid[{self.extractor}]@{self.n}": value}

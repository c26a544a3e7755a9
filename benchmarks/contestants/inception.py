"""Inception-v3 with random weights in each project's own wrapping: its speed does not depend on their values."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def without_weights(module):
    """Within, `module` builds its Inception as it is initialised: nothing is downloaded, nothing loaded."""
    with (
        patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(torch.nn.Module, "load_state_dict"),
    ):
        yield


def of_torch_fidelity(device: torch.device):
    """torch-fidelity's extractor of FID's 2,048 features."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with without_weights(inception):
        net = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    return net.to(device).eval()


def generated(work):
    """Batches of uint8 images [batch_size, C, H, W], as if they had just been sampled."""
    generator = torch.Generator().manual_seed(0)
    size = (work.batch_size, work.preset.channels, work.preset.image_size, work.preset.image_size)
    while True:
        yield torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

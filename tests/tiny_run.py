"""A run folder with checkpoints of a tiny network, without training it: for tests of what comes after."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from models import build_model
from utils import checkpoint, config
from utils.optimizer import build_ema, build_optimizer


def tiny_run(folder: Path, cfg: DictConfig, steps: tuple[int, ...] = (2,)) -> Path:
    """Config and checkpoints as a training leaves them; the weights are random and drive the network a little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
        for value in net.parameters():
            value.data += 0.1 * torch.randn_like(value)
    ema, optimizer = build_ema(net, cfg.train), build_optimizer(net, cfg.train)
    for parameter in net.parameters():  # moments as after the first update
        held = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimizer.state[parameter] = {"step": torch.tensor(float(max(steps))), **held}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    resolved = {"mixed_precision": "no", "compile": False, "deterministic": True}
    for step in steps:
        state = {"step": step, "ema": {"step": int(ema.step), "initted": True}, "scaler": None, "best": None}
        parts = net.state_dict(), ema.ema_model.state_dict(), optimizer.state_dict()
        checkpoint.publish(folder / "ckpt", step, config.to_yaml(cfg), *parts, state | {"resolved": resolved})
    return folder

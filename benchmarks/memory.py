"""What training a recipe keeps in memory and computes, by arithmetic: no image is read and no network is run.

    python benchmarks/memory.py configs/*.yaml

State: weights, gradients, two Adam moments and the EMA weights, 20 bytes a parameter. Activations: the tensors that
autograd saves for the backward pass, each storage once, found by a forward pass of tensors without data; a batch of 2
minus a batch of 1 is what an image costs. bf16 means autocast as on GPUs, where group normalisation stays in float32. A
device needs more than their sum (temporaries of the backward pass, workspaces, fragmentation); compiled, it may keep
fewer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import build_model
from utils import config
from utils.utilisation import network_flops

STATE = 20  # bytes a parameter, all in float32


def saved_bytes(cfg, batch: int, dtype: torch.dtype | None) -> int:
    """Bytes that a forward pass and the loss keep for the backward pass, weights apart."""
    with FakeTensorMode():
        net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance).train()
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        x0 = torch.randn(batch, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        ):
            out = net(x0, torch.zeros(batch, dtype=torch.int64))
            loss = (out.float()[:, : cfg.data.channels] - x0).square().mean()
        assert loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="CONFIG")
    print("| recipe | parameters | state | an image, fp32 | an image, bf16 | multiply-adds of an image |")
    print("|---|---|---|---|---|---|")
    for path in parser.parse_args().recipes:
        cfg = config.merge((path, config.read_yaml(path)))
        with torch.device("meta"):
            net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
        n = sum(parameter.numel() for parameter in net.parameters())
        image = [saved_bytes(cfg, 2, dtype) - saved_bytes(cfg, 1, dtype) for dtype in (None, torch.bfloat16)]
        fp32, bf16 = (f"{value / 2**20:,.1f} MiB" for value in image)
        state, work = f"{n * STATE / 2**30:.2f} GiB", f"{network_flops(cfg) / 2e9:.3g} G"
        print(f"| `{Path(path).stem}` | {n:,} | {state} | {fp32} | {bf16} | {work} |")


if __name__ == "__main__":
    main()

"""`train.shard`: weights, gradients, Adam's moments and the EMA copy divided among the processes (FSDP2).

Each block's weights come together just for its forward and its backward pass. Checkpoints hold whole tensors, so that a
run goes on sharded or not, on any number of processes. What runs on the way (previews, validation, scores) runs on a
whole copy of the network that lives only as long as that: a forward pass of the divided one is a collective, and there
the processes have different numbers of batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models.conditioning import CrossAttention, TextBlock
from models.layers import Attention, ResBlock

BLOCKS = (ResBlock, Attention, CrossAttention, TextBlock)
NORMS = (nn.GroupNorm, nn.LayerNorm)


class Sharding:
    """How a run's tensors are spread; with `train.shard` false, or on one process, every method leaves things alone."""

    def __init__(self, accelerator: Accelerator, wanted: bool) -> None:
        self.accelerator, self.on = accelerator, wanted and accelerator.num_processes > 1
        self.outline: nn.Module | None = None  # the network without memory

    def apply(self, net: nn.Module, ema_net: nn.Module) -> None:
        """Divide the network and its average alike. Before the optimizer is made, which holds the divided weights."""
        if not self.on:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.outline = copy.deepcopy(net).to("meta")
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        policy = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            # Blocks come together in bf16: autocast would cast them again, into copies that stay until the backward
            # pass, for the whole network at once. The norms' few weights stay in fp32, as under autocast.
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for whole in (net, ema_net):
            for module in (*_blocks(whole), whole):
                if policy.param_dtype is not None:
                    fully_shard([child for child in module.children() if isinstance(child, NORMS)], mesh=mesh)
                fully_shard(module, mesh=mesh, mp_policy=policy)

    def start_device(self) -> torch.device:
        """Where the network waits to be divided, which brings it to the device block by block."""
        return torch.device("cpu") if self.on else self.accelerator.device

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, Any]:
        """(what computes the network in the run's precision, the optimizer): accelerate's prepare, without DDP."""
        if not self.on:
            return self.accelerator.prepare(net, optimizer)
        forward = net.forward

        def autocast(*args: Any, **kwargs: Any) -> Tensor:
            with self.accelerator.autocast():
                return forward(*args, **kwargs).float()

        net.forward = autocast
        return net, self.accelerator.prepare(optimizer)

    def whole(self, net: nn.Module) -> nn.Module:
        """The network with all of its weights on every process, in its mode. A collective where it is divided."""
        if not self.on:
            return net
        found = copy.deepcopy(self.outline).train(net.training)
        found.load_state_dict({name: plain(value) for name, value in net.state_dict().items()}, assign=True)
        return found

    def gathered(self, tree: Any) -> Any:
        """A state dict with whole tensors on the CPU; None in their place beside the main process. A collective.

        Not divided, it is for the main process to call, alone.
        """
        if isinstance(tree, Tensor):
            value = plain(tree)
            return value.cpu() if self.accelerator.is_main_process else None
        if isinstance(tree, dict):
            return {name: self.gathered(value) for name, value in tree.items()}
        return [self.gathered(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


def _blocks(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, BLOCKS)]


def plain(value: Tensor) -> Tensor:
    """A divided tensor made whole on every process (a collective); any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def divided_like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, known to every process, divided as `own` is."""
    if not hasattr(own, "full_tensor") or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)

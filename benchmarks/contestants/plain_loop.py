"""A loop of the kind of the DDIM authors' code: fp32, eager, Adam, an EMA parameter by parameter.

The network is ours, which is theirs, with PyTorch's norms and dropout.
"""

from __future__ import annotations

import torch


def build(work):
    from types import SimpleNamespace

    from models import build_model

    p = work.preset
    options = SimpleNamespace(
        name="unet", dim=p.dim, dim_mults=p.dim_mults, attn_resolutions=p.attn_resolutions,
        num_res_blocks=p.num_res_blocks, n_heads=1, norm_groups=p.norm_groups, dropout=p.dropout,
    )  # fmt: skip
    return build_model(options, p.image_size, p.channels).to(work.device)


def without_kernels() -> None:
    """From here on, this process normalises as PyTorch does."""
    from models import norm_silu, norm_silu_cpu

    norm_silu.KERNEL = False
    norm_silu_cpu.takes = lambda x: False


def gflop(work) -> float:
    from contestants import forward_gflop

    return forward_gflop(build(work), work.preset.image_size, work.preset.channels)


def train(work):
    from torchvision import datasets, transforms

    from contestants import endless, is_finite

    without_kernels()
    net = build(work).train()
    shadow = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    look = [transforms.Grayscale()] if work.preset.channels == 1 else []
    look += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.ImageFolder(work.images, transforms.Compose(look))
    loader = torch.utils.data.DataLoader(data, work.batch_size, shuffle=True, num_workers=2, drop_last=True)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).to(work.device)
    batches = iter(endless(loader))
    yield
    while True:
        x, _ = next(batches)
        x = 2 * x.to(work.device) - 1
        t = torch.randint(0, 1000, (len(x) // 2 + 1,), device=x.device)
        t = torch.cat([t, 999 - t])[: len(x)]
        eps = torch.randn_like(x)
        a = alpha_bar[t][:, None, None, None]
        loss = (net(a.sqrt() * x + (1 - a).sqrt() * eps, t) - eps).square().sum((1, 2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in net.named_parameters():
                shadow[name].copy_(0.9999 * shadow[name] + 0.0001 * value)
        is_finite(loss.item())
        yield


def sample(work):
    without_kernels()
    net, p = build(work).eval(), work.preset
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).to(work.device)
    yield
    while True:
        x = torch.randn(work.batch_size, p.channels, p.image_size, p.image_size, device=work.device)
        visited = list(range(0, 1000, 1000 // work.steps))
        with torch.no_grad():
            for t, t_next in zip(reversed(visited), [*reversed(visited[:-1]), -1]):
                a = alpha_bar[t]
                a_next = alpha_bar[t_next] if t_next >= 0 else torch.ones((), device=work.device)
                eps = net(x, torch.full((len(x),), t, device=work.device))
                x0 = (x - eps * (1 - a).sqrt()) / a.sqrt()
                if work.sampler == "ddim":
                    x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
                    continue
                beta = 1 - a / a_next
                mean = (a_next.sqrt() * beta * x0.clamp(-1, 1) + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
                x = mean + (beta * (1 - a_next) / (1 - a)).sqrt() * torch.randn_like(x)
        ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu()
        yield

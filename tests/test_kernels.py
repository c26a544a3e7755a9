"""The Triton kernels in Triton's interpreter, which needs no GPU, against PyTorch; on a GPU: test_gpu.py."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

NORM = """
import torch, torch.nn.functional as F
import models.norm_silu_kernel as kernel

for C, G, H, elements in ((32, 8, 6, 256), (24, 6, 4, 128), (48, 4, 3, 8192), (64, 1, 5, 64)):
    kernel.ELEMENTS = elements  # several tiles, or one
    torch.manual_seed(0)
    x = (torch.randn(2, C, H, H) + 1).to(memory_format=torch.channels_last).requires_grad_()
    emb, dy = torch.randn(2, C, requires_grad=True), torch.randn(2, C, H, H)
    norm = torch.nn.GroupNorm(G, C, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for add in (None, emb):
        for silu in (True, False):
            given = [x, norm.weight, norm.bias] + ([] if add is None else [add])
            wanted = norm(x if add is None else x + add[:, :, None, None])
            wanted = F.silu(wanted) if silu else wanted
            found = torch.ops.ddpm.norm_silu(x, add, norm.weight, norm.bias, G, norm.eps, silu)[0]
            pairs = [(found, wanted)]
            pairs += zip(torch.autograd.grad(found, given, dy), torch.autograd.grad(wanted, given, dy))
            for a, b in pairs:
                assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-3), (C, G, H, silu)
far = (1000 + torch.randn(2, 16, 8, 8)).to(memory_format=torch.channels_last)
norm = torch.nn.GroupNorm(4, 16)
found = torch.ops.ddpm.norm_silu(far, None, norm.weight, norm.bias, 4, norm.eps, False)[0]
assert (found - norm.double()(far.double())).abs().max() < 1e-3  # squares around 0 would be off by a tenth
print("equal")
"""
NOISE = """
import torch
from diffusions.noise import randn
from diffusions.noise_kernel import randn_on_gpu

index = torch.tensor([0, 1, 5, 2**33 + 7])
for seed, draw, n in ((0, 0, 64), (2022, 5, 192), (2**63 - 1, 2**31 + 3, 35), (7, 16, 1), (1, 1, 1030)):
    assert torch.equal(randn(seed, index, draw, (n,)), randn_on_gpu(seed, index, draw, n)), (seed, draw, n)
print("equal")
"""


@pytest.mark.parametrize("program", [NORM, NOISE], ids=["norm_silu", "randn"])
def test_kernel_equals_pytorch(program):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-3000:]

"""diffusers: the loop of its unconditional training example (--use_ema, as its page starts it), and DDIMPipeline.

Its defaults: fp32, AdamW with betas 0.95 and 0.999 and weight decay 1e-6, cosine schedule after 500 warm-up steps,
gradients clipped to 1, EMAModel with warm-up, no data workers, the loss read and logged at every step.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F


def build(work):
    from diffusers import UNet2DModel

    preset = work.preset
    levels = range(len(preset.dim_mults))
    down = ["AttnDownBlock2D" if preset.attends(i) else "DownBlock2D" for i in levels]
    up = ["AttnUpBlock2D" if preset.attends(i) else "UpBlock2D" for i in reversed(levels)]
    net = UNet2DModel(
        sample_size=preset.image_size, in_channels=preset.channels, out_channels=preset.channels,
        block_out_channels=[preset.dim * m for m in preset.dim_mults], layers_per_block=preset.num_res_blocks,
        down_block_types=down, up_block_types=up, dropout=preset.dropout, norm_eps=1e-6,
        norm_num_groups=preset.norm_groups, downsample_padding=0, freq_shift=1, flip_sin_to_cos=False,
        attention_head_dim=None,
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last) if work.on("channels_last") else net


def gflop(work) -> float:
    from contestants import forward_gflop

    sample = lambda net, x, t: net(x, t).sample
    return forward_gflop(build(work), work.preset.image_size, work.preset.channels, sample)


def train(work):
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torchvision import datasets, transforms
    from tqdm.auto import tqdm

    from contestants import endless, is_finite

    accelerator = Accelerator(
        mixed_precision="bf16" if work.on("bf16") else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=work.scratch, logging_dir=f"{work.scratch}/logs"),
        dynamo_backend="inductor" if work.on("compile") else None,
    )
    net = build(work)
    ema = EMAModel(
        net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4,
        foreach=work.on("foreach_ema"),
    )  # fmt: skip
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    size = work.preset.image_size
    look = [transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomHorizontalFlip()]
    look += [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    gray = [transforms.Grayscale()] if work.preset.channels == 1 else []
    data = datasets.ImageFolder(work.images, transforms.Compose(gray + look))
    workers = 2 if work.on("workers") else 0
    loader = torch.utils.data.DataLoader(data, work.batch_size, shuffle=True, num_workers=workers, drop_last=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    net, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    accelerator.init_trackers("train_unconditional")
    bar, step = tqdm(total=100_000), 0
    net.train()
    batches = iter(endless(loader))
    yield
    while True:
        clean, _ = next(batches)
        clean = clean.to(accelerator.device)
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        if work.on("channels_last"):
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(net):
            loss = F.mse_loss(net(noisy, t).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(net.parameters())
        step += 1
        bar.update(1)
        logs = {"loss": is_finite(loss.detach().item()), "lr": schedule.get_last_lr()[0], "step": step}
        bar.set_postfix(**logs)
        accelerator.log(logs, step=step)
        yield


def sample(work):
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    net = build(work).eval()
    if work.on("compile"):
        net = torch.compile(net)
    kinds = {"ddim": (DDIMPipeline, DDIMScheduler), "fixed-small": (DDPMPipeline, DDPMScheduler)}
    of, scheduler = kinds[work.sampler]
    pipeline = of(net, scheduler(1000, beta_schedule="linear")).to(work.device)  # DDPMScheduler's default: fixed_small
    yield
    while True:
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.on("bf16")):  # bf16 weights end in an error
            images = pipeline(batch_size=work.batch_size, num_inference_steps=work.steps, output_type="np").images
        assert len(images) == work.batch_size
        yield


def evaluate(work):
    """Features of pictures in a folder as torch-fidelity's command extracts them: diffusers itself has no such part."""
    from torch_fidelity.utils import extract_featuresdict_from_input_id
    from torchvision.transforms.functional import to_pil_image

    from contestants.inception import generated, of_torch_fidelity

    net, batches, folder = of_torch_fidelity(work.device), generated(work), Path(work.scratch, "pictures")
    folder.mkdir()
    options = {"input1": str(folder), "cuda": work.device.type == "cuda", "verbose": False}
    yield
    while True:
        for i, image in enumerate(next(batches)):
            to_pil_image(image).save(folder / f"{i}.png")
        features = extract_featuresdict_from_input_id(1, net, **options)
        assert features["2048"].shape == (work.batch_size, 2048)
        yield

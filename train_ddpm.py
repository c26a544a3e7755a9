"""Train a denoising diffusion model.

    accelerate launch train_ddpm.py [-c CONFIG] [-e EXP_DIR] [-r auto|PATH] [--key.sub value ...]

Without -c it trains configs/ddpm_digits.yaml, handwritten digits that need no download. Every key of the configuration
can be overridden on the command line. What lies in the run folder: docs/architecture.md.
"""

from pathlib import Path

from utils import cli, config, constraints
from utils.errors import run_script

ROOT = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file (default: configs/ddpm_digits.yaml)")
    parser.add_argument("-e", "--exp_dir", metavar="EXP_DIR", help="run folder (default: runs/exp-{time})")
    parser.add_argument(
        "-r", "--resume", metavar="auto|PATH", help="go on from the newest good checkpoint, or from PATH"
    )
    options, overrides = parser.parse(argv)
    if "train.n_steps" in overrides:  # asked for last, so it counts, also where a recipe or a stored run has n_epochs
        overrides.setdefault("train.n_epochs", "null")

    default = ROOT / "configs" / "ddpm_digits.yaml"
    default = (str(default), config.read_yaml(default))
    asked = [(options.config, config.read_yaml(options.config))] if options.config else []
    asked.append(("command line", overrides))
    new = config.merge(*([default] if not options.config else []), *asked)
    if options.resume is None:
        constraints.check(new)  # before torch is imported
        if options.print_config:
            cli.show(config.to_yaml(new))
            return 0

    from utils.run_folder import open_run

    run = open_run(default if not options.config else ("", {}), asked, options.exp_dir, options.resume)
    constraints.check(run.config)
    if options.print_config:
        cli.show(config.to_yaml(run.config))
        return 0
    return train(run)


def train(run) -> int:
    """Train `run` (utils.run_folder.Run) to its last step; returns the exit status."""
    import torch

    from diffusions import build_process
    from diffusions.noise import randn
    from diffusions.pixels import to_unit
    from models import build_model
    from utils import compilation, distributed, precision, training_state
    from utils.data import load_splits
    from utils.data.batches import DRAW_EPS, Batches, draw_timesteps, held_out
    from utils.data.conditions import Conditions
    from utils.logging import RunLog, banner
    from utils.meter import Meter
    from utils.optimizer import build_ema, build_optimizer, set_lr
    from utils.preview import preview, validation_loss
    from utils.profiling import TrainingProfile
    from utils.run_folder import claim
    from utils.sharding import Sharding, plain
    from utils.stopping import StopRule
    from utils.training_score import TrainingScore

    cfg, opts = run.config, run.config.train
    resolved = precision.resolve(cfg, run.stored_state().get("resolved"))
    tracker = opts.log_with if opts.log_with != "none" else None
    accelerator = distributed.start(resolved["mixed_precision"], log_with=tracker, project_dir=run.folder)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    dtype, sharding = precision.DTYPES[resolved["mixed_precision"]], Sharding(accelerator, opts.shard)

    with distributed.main_process_first(accelerator):  # one downloads
        splits = load_splits(cfg.data)
    conditions = Conditions.settled(cfg, splits["train"], device, bool(run.checkpoint))
    batches = Batches.of(cfg, splits["train"], rank, world, device)
    n_steps = opts.n_steps if opts.n_epochs is None else -(-opts.n_epochs * len(batches) // opts.batch_size)
    valid = held_out(splits.get("test"), opts.n_valid)
    told = Conditions(cfg, valid, device)
    score = TrainingScore(accelerator, cfg, run.stored_state().get("best")) if opts.evaluate_every else None
    claim(run, accelerator)  # everything that was asked for can be had: from here on, files are written

    torch.manual_seed(cfg.seed)
    net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
    weights_layout = torch.contiguous_format if sharding.on else torch.channels_last  # FSDP2 divides only the first
    net = net.to(sharding.start_device(), memory_format=weights_layout)
    net.gradient_checkpointing = opts.gradient_checkpointing
    process = build_process(cfg.diffusion)
    ema = build_ema(net, opts)
    sharding.apply(net, ema.ema_model)
    optimizer = build_optimizer(net, opts)
    if resolved["compile"]:
        compilation.compile_network(net, cfg)
    model, optimizer = sharding.prepare(net, optimizer)
    state = training_state.restore(run.checkpoint, accelerator, net, ema, optimizer) if run.checkpoint else {"step": 0}
    meter = Meter(accelerator, state.get("meter"))
    stop = StopRule(accelerator, opts)

    start, share = state["step"], opts.batch_size // world
    log = RunLog(accelerator, run.folder, start, n_steps, cfg)
    profile = TrainingProfile(opts.profile, log)
    banner(log, run, net, process, batches, conditions, valid, resolved, start, n_steps)
    if start >= n_steps:
        log.close()
        return 0

    micro = min(opts.micro_batch or share, share)
    model.train()
    with log, stop, profile:
        for step, (positions, images) in enumerate(batches.from_step(start, n_steps), start):
            x0 = to_unit(images).contiguous(memory_format=torch.channels_last)
            t = draw_timesteps(cfg.seed, positions, process.total_steps, cfg.diffusion.t_sampling, device)
            eps = randn(cfg.seed, positions, DRAW_EPS, tuple(x0.shape[1:]), device)
            lr = set_lr(optimizer, step, n_steps, opts)

            batch = {"x0": x0, "t": t, "eps": eps, **conditions.at(step, batches, opts.condition_dropout)}
            parts = [dict(zip(batch, part)) for part in zip(*(v.split(micro) for v in batch.values()))]
            profile.mark("data, noise, conditions")
            total = torch.zeros((), device=device)
            for i, part in enumerate(parts):
                distributed.seed_dropout(cfg.seed, step, rank, i)
                with distributed.sync_gradients(accelerator, model, i == len(parts) - 1):
                    loss = process.loss(model, **part).sum() / share
                    accelerator.backward(loss)
                total += loss.detach() / world
            profile.mark("network, forward and backward")
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), opts.clip_grad_norm or float("inf"))
            bad = meter.update(total, plain(grad_norm))
            stop.skip_if_bad(optimizer, bad)  # the fused update leaves weights alone where the gradient is not finite
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            profile.mark("optimizer")
            ema.update()
            profile.mark("EMA")

            done, shown = step + 1, {}
            ends, stops = done == n_steps, stop.wants_stop(done)
            if done % opts.log_every == 0 or ends:
                values = meter.read()
                shown = {"loss": values["loss"], "lr": lr} | log.rate(done, opts.batch_size)
                log.metrics(done, values | shown)
                stop.check_bad(values["bad_in_row"], log)
            if valid is not None and (done % opts.valid_every == 0 or ends):
                loss_of = lambda m: validation_loss(accelerator, sharding.whole(m), process, valid, told, micro, dtype)
                log.metrics(done, {"valid_loss": loss_of(net), "valid_loss_ema": loss_of(ema.ema_model)})
            if done % opts.sample_every == 0 or ends:
                view = sharding.whole(ema.ema_model), process, cfg.sample, opts.n_samples, conditions.shown
                log.preview(done, preview(accelerator, *view, micro, dtype))
            if score and (done % opts.evaluate_every == 0 or ends):
                log.metrics(done, score(done, sharding.whole(ema.ema_model), process, micro, dtype))
            best = score.best if score else state.get("best")
            if done % opts.save_every == 0 or ends or stops or (best and best["step"] == done):
                training_state.save(run, done, accelerator, sharding, net, ema, optimizer, meter, log,
                                    must=ends or stops, best=best, resolved=resolved)  # fmt: skip
            log.progress(**shown)
            profile.step("logs, previews, files")
            if stops and not ends:
                log.say(f"stopped     by {stop.describe()} at step {done:,}; go on with -e {run.folder} -r auto")
                break
    log.close()
    return stop.status if done < n_steps else 0


if __name__ == "__main__":
    run_script(main)

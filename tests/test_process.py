"""The forward process, the losses and what an output means, against formulas, autograd and torch.distributions."""

import math

import pytest
import torch
from scipy import integrate
from torch.distributions import Normal, kl_divergence

from diffusions.likelihood import discretized_gaussian_nll, log_variances, variational_bound_terms
from diffusions.process import GaussianDiffusion, Prediction
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha, rescale_zero_terminal_snr

T = 50
BETAS = BETA_SCHEDULES["linear"](T, 1e-3, 0.2)
ALPHA_BAR = cumulative_alpha(BETAS)
OBJECTIVES = ["pred_eps", "pred_x0", "pred_v"]
WEIGHTINGS = ["none", "min_snr", "p2"]


def process(objective="pred_eps", alpha_bar=ALPHA_BAR, **options):
    return GaussianDiffusion(alpha_bar, objective, **options)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def roots(t):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), one per example, by another route than the code."""
    alpha_bar = torch.stack([torch.prod(1 - BETAS[: i + 1]) for i in t.tolist()])[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def target(objective, x0, t, eps):
    signal, noise = roots(t)
    return {"pred_eps": eps, "pred_x0": x0, "pred_v": signal * eps - noise * x0}[objective]


def batch(size=8, seed=0):
    t = torch.tensor([0, 1, 5, T // 2, T - 2, T - 1, 3, 10])[:size]
    return normal(size, 3, 4, 4, seed=seed).clamp(-1, 1), t, normal(size, 3, 4, 4, seed=seed + 1)


# --- the forward process ---


def test_add_noise_has_the_moments_of_the_chain():
    """mean and variance of x_t equal those of t + 1 single steps x <- sqrt(1 - beta) x + sqrt(beta) z."""
    mean, variance, n = 0.75, 0.0, 20_000
    for t, beta in enumerate(BETAS.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 10, T - 1):
            steps = torch.full((n,), t)
            signal = process().add_noise(
                torch.full((n, 1, 1, 1), 0.75).double(), steps, torch.zeros(n, 1, 1, 1).double()
            )
            noise = process().add_noise(torch.zeros(n, 1, 1, 1).double(), steps, torch.ones(n, 1, 1, 1).double())
            assert signal.unique().tolist() == pytest.approx([mean], rel=1e-12)
            assert noise.square().unique().tolist() == pytest.approx([variance], rel=1e-12)
            x = process().add_noise(torch.full((n, 1, 1, 1), 0.75).double(), steps, normal(n, 1, 1, 1))
            assert abs(x.mean() - mean) < 4 * math.sqrt(variance / n)
            assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_reads_a_timestep_per_example(dtype):
    x0, t, eps = batch()
    signal, noise = roots(t)
    x_t = process().add_noise(x0.to(dtype), t, eps.to(dtype))
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, (signal * x0 + noise * eps).to(dtype))


@pytest.mark.parametrize("t", [1, 7, T - 1])
def test_posterior_variance_by_conditioning(t):
    """1 / var(x_{t-1} | x_t, x0) is the sum of the precisions of x_{t-1} given x0, and of x_t given x_{t-1}."""
    log_beta, log_posterior = log_variances(ALPHA_BAR[t], ALPHA_BAR[t - 1], torch.tensor(9.0).double())
    precision = 1 / (1 - ALPHA_BAR[t - 1]) + (1 - BETAS[t]) / BETAS[t]
    assert log_beta.exp().item() == pytest.approx(BETAS[t].item(), rel=1e-9)
    assert log_posterior.exp().item() == pytest.approx(1 / precision.item(), rel=1e-9)


def test_the_zero_posterior_variance_at_the_data_is_replaced():
    log_beta, log_posterior = log_variances(ALPHA_BAR[0], torch.tensor(1.0).double(), torch.tensor(0.25).double())
    assert log_beta.exp().item() == pytest.approx(BETAS[0].item(), rel=1e-9)
    assert log_posterior.exp().item() == pytest.approx(0.25)


# --- what a network output means ---


def consistent(t, seed=3):
    """x0, eps, x_t and the output that each objective would have there."""
    x0, eps = normal(2, 3, 4, 4, seed=seed), normal(2, 3, 4, 4, seed=seed + 1)
    steps = torch.full((2,), t)
    signal, noise = roots(steps)
    return x0, eps, signal * x0 + noise * eps, {name: target(name, x0, steps, eps) for name in OBJECTIVES}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("t", [0, 1, 20, T - 1])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predict(objective, t, clip):
    x0, eps, x_t, outputs = consistent(t)
    assert x0.abs().max() > 1.5
    prediction = process(objective).predict(outputs[objective], x_t, t, clip)
    signal, noise = (root[0].item() for root in roots(torch.tensor([t])))
    x0 = x0.clamp(-1, 1) if clip else x0
    eps = (x_t - signal * x0) / noise if clip else eps
    assert isinstance(prediction, Prediction) and prediction.var_frac is None
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(signal * prediction.x0 + noise * prediction.eps, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("objective", "out", "clip", "x0", "eps"),
    [  # alpha_bar = 0.36 and x_t = 2: signal 0.6, noise 0.8
        ("pred_eps", -0.5, False, 4.0, -0.5),
        ("pred_eps", -0.5, True, 1.0, 1.75),
        ("pred_eps", 4.0, True, -1.0, 3.25),
        ("pred_eps", 2.0, True, 2 / 3, 2.0),
        ("pred_x0", -3.0, False, -3.0, 4.75),
        ("pred_x0", -3.0, True, -1.0, 3.25),
        ("pred_v", 0.5, False, 0.8, 1.9),
        ("pred_v", -0.5, False, 1.6, 1.3),
        ("pred_v", -0.5, True, 1.0, 1.75),
    ],
)
def test_predict_golden_values(objective, out, clip, x0, eps):
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    prediction = process(objective, torch.tensor([0.9, 0.36])).predict(out * one, 2 * one, 1, clip)
    assert prediction.x0.item() == pytest.approx(x0, rel=1e-6)
    assert prediction.eps.item() == pytest.approx(eps, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_x0_from_reads_a_timestep_per_example(objective):
    x0, t, eps = batch()
    out, signal_noise = target(objective, x0, t, eps), roots(t)
    x_t = signal_noise[0] * x0 + signal_noise[1] * eps
    torch.testing.assert_close(process(objective).x0_from(out, x_t, t), x0, rtol=1e-9, atol=1e-9)


def test_learned_variance_is_read_from_the_second_half():
    _, _, x_t, outputs = consistent(20)
    out = torch.cat([outputs["pred_v"], torch.linspace(-1, 1, x_t.numel()).double().view_as(x_t)], dim=1)
    plain = process("pred_v").predict(outputs["pred_v"], x_t, 20, True)
    learned = process("pred_v", learn_variance=True).predict(out, x_t, 20, True)
    assert torch.equal(learned.x0, plain.x0) and torch.equal(learned.eps, plain.eps)
    torch.testing.assert_close(learned.var_frac.flatten(), torch.linspace(0, 1, x_t.numel()).double())


@pytest.mark.parametrize(
    "alpha_bar", [rescale_zero_terminal_snr(ALPHA_BAR), cumulative_alpha(BETA_SCHEDULES["jsd"](T, 0, 0))]
)
def test_no_signal_at_the_end(alpha_bar):
    with pytest.raises(ValueError, match=r"pred_eps.*pred_v or pred_x0"):
        process("pred_eps", alpha_bar)
    x_t, out = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    for objective, x0 in [("pred_v", -out), ("pred_x0", out)]:
        prediction = process(objective, alpha_bar).predict(out, x_t, T - 1, clip=False)
        torch.testing.assert_close(prediction.x0, x0)
        torch.testing.assert_close(prediction.eps, x_t)
        loss = process(objective, alpha_bar).loss(lambda x, t: x, x_t.clamp(-1, 1), torch.tensor([T - 1]), out)
        assert loss.isfinite().all()


@pytest.mark.parametrize(
    ("options", "choices"),
    [({"objective": "pred_x1"}, OBJECTIVES), ({"loss_weighting": "snr"}, WEIGHTINGS)],
)
def test_a_wrong_name_is_refused(options, choices):
    with pytest.raises(ValueError) as error:
        GaussianDiffusion(ALPHA_BAR, **options)
    assert all(choice in str(error.value) for choice in [*choices, *options.values()])


# --- the losses ---


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_the_oracle_is_zero(objective, weighting):
    x0, t, eps = batch()
    diffusion = process(objective, loss_weighting=weighting)
    oracle = target(objective, x0, t, eps)
    torch.testing.assert_close(
        diffusion.loss(lambda x, t: oracle, x0, t, eps), torch.zeros(8).double(), atol=1e-20, rtol=0
    )
    assert (diffusion.loss(lambda x, t: oracle + 0.1, x0, t, eps) > 1e-9).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_a_fixed_network(objective):
    x0, t, eps = batch()

    def network(x, t, shift):
        return torch.tanh(x * (1 + t[:, None, None, None] / T)) + shift

    signal, noise = roots(t)
    error = network(signal * x0 + noise * eps, t, 0.3) - target(objective, x0, t, eps)
    loss = process(objective).loss(network, x0, t, eps, shift=torch.tensor(0.3))
    assert loss.shape == (8,) and loss.dtype == torch.float64
    torch.testing.assert_close(loss, torch.stack([(row**2).sum() / 48 for row in error]), rtol=1e-6, atol=1e-8)


def test_loss_of_a_half_precision_network_is_computed_in_float32():
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch())
    assert process().loss(lambda x, t: x.bfloat16(), x0, t, eps).dtype == torch.float32


WEIGHTS = {  # of the objective's own squared error; Hang et al. 2023, section 3.4 (gamma 5), Choi et al. 2022, eq. 8
    "none": {name: lambda snr: 1.0 for name in OBJECTIVES},
    "min_snr": {
        "pred_x0": lambda snr: min(snr, 5),
        "pred_eps": lambda snr: min(snr, 5) / snr,
        "pred_v": lambda snr: min(snr, 5) / (snr + 1),
    },
    "p2": {
        "pred_x0": lambda snr: snr / (1 + snr),
        "pred_eps": lambda snr: 1 / (1 + snr),
        "pred_v": lambda snr: snr / (1 + snr) ** 2,
    },
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_weighting(objective, weighting):
    snr = [ab / (1 - ab) for ab in ALPHA_BAR.tolist()]
    assert snr[0] > 5 > snr[-1]
    t = torch.arange(T)
    x0, eps, out = (normal(T, 1, 2, 2, seed=seed) for seed in range(3))
    plain = process(objective).loss(lambda x, t: out, x0, t, eps)
    weighted = process(objective, loss_weighting=weighting).loss(lambda x, t: out, x0, t, eps)
    expected = [WEIGHTS[weighting][objective](value) for value in snr]
    assert (weighted / plain).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_weighted_loss_does_not_depend_on_the_objective(weighting):
    """The same belief about x0, stated as eps, x0 or v, costs the same."""
    x0, t, eps = batch()
    x0_hat, (signal, noise) = normal(8, 3, 4, 4, seed=9), roots(t)
    eps_hat = (signal * (x0 - x0_hat) + noise * eps) / noise
    losses = [
        process(name, loss_weighting=weighting).loss(lambda x, t: target(name, x0_hat, t, eps_hat), x0, t, eps)
        for name in OBJECTIVES
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-8, atol=0)


# --- learned variance ---


def posterior(x0, x_t, t):
    """q(x_{t-1} | x_t, x0) for one t > 0, as the product of two Gaussian densities of x_{t-1}."""
    prior, beta = torch.prod(1 - BETAS[:t]), BETAS[t]
    variance = 1 / (1 / (1 - prior) + (1 - beta) / beta)
    return variance * (prior.sqrt() * x0 / (1 - prior) + (1 - beta).sqrt() * x_t / beta), variance


def hybrid_batch(objective="pred_v"):
    x0, t, eps = batch()
    signal, noise = roots(t)
    return x0, t, eps, signal * x0 + noise * eps, normal(8, 6, 4, 4, seed=5) * 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_terms_are_the_kl_of_torch_distributions(objective):
    x0, t, _, x_t, out = hybrid_batch()
    bound = variational_bound_terms(process(objective, learn_variance=True), out, x0, x_t, t)
    assert bound.shape == (8,)
    signal, noise = roots(t)
    mean_out, var_frac = out[:, :3], (out[:, 3:] + 1) / 2
    x0_hat = {
        "pred_eps": (x_t - noise * mean_out) / signal,
        "pred_x0": mean_out,
        "pred_v": signal * x_t - noise * mean_out,
    }
    for i in range(1, 8):
        mean, variance = posterior(x0[i], x_t[i], t[i])
        model_mean, _ = posterior(x0_hat[objective][i], x_t[i], t[i])
        model_std = BETAS[t[i]] ** (var_frac[i] / 2) * variance ** ((1 - var_frac[i]) / 2)
        kl = kl_divergence(Normal(mean, variance.sqrt().expand_as(mean)), Normal(model_mean, model_std))
        assert bound[i].item() == pytest.approx(kl.mean().item() / math.log(2), rel=1e-8), f"t = {t[i]}"


def test_bound_term_at_zero_is_the_decoder():
    x0, t, _, x_t, out = hybrid_batch()
    x0 = (x0 * 127.5).round() / 127.5
    out = out * 0.02
    bound = variational_bound_terms(process("pred_x0", learn_variance=True), out, x0, x_t, t)
    _, second = posterior(x0[0], x_t[0], 1)
    nats = []
    for x, mean, fraction in zip(x0[0].flatten(), out[0, :3].flatten(), (out[0, 3:].flatten() + 1) / 2):
        std = math.sqrt(BETAS[0] ** fraction * second ** (1 - fraction))
        upper = math.inf if x > 0.999 else (x.item() + 1 / 255 - mean.item()) / std
        lower = -math.inf if x < -0.999 else (x.item() - 1 / 255 - mean.item()) / std
        nats.append(-math.log(max(0.5 * (math.erfc(-upper / 2**0.5) - math.erfc(-lower / 2**0.5)), 1e-12)))
    assert bound[0].item() == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-6)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("std", [0.004, 0.05, 0.7])
def test_decoder_by_numeric_integration(level, std):
    """The density over the level's bin, [x - 1/255, x + 1/255]; the first and the last reach to infinity."""
    x, mean = level / 127.5 - 1, level / 127.5 - 1 + 1.5 * std * (-1) ** level
    lower = max(x - 1 / 255, mean - 30 * std) if level > 0 else mean - 30 * std
    upper = min(x + 1 / 255, mean + 30 * std) if level < 255 else mean + 30 * std
    density = lambda y: math.exp(-0.5 * ((y - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    points = [mean] if lower < mean < upper else None
    mass = integrate.quad(density, lower, upper, points=points, epsabs=1e-13)[0]
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (x, mean, math.log(std)))
    assert discretized_gaussian_nll(*arguments).item() == pytest.approx(-math.log(mass), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("distance", [-0.05, -0.04, -0.01, 0.01, 0.04, 0.05])
def test_decoder_in_float32_is_that_of_float64(distance):
    """Down to the floor of 1e-12: training is in float32, and far from the mean it still has to move the variance."""
    results = []
    for dtype in (torch.float32, torch.float64):
        log_std = torch.tensor(math.log(0.008), dtype=dtype, requires_grad=True)
        nll = discretized_gaussian_nll(
            torch.tensor(0.2, dtype=dtype), torch.tensor(0.2 - distance, dtype=dtype), log_std
        )
        results.append((nll.item(), *(g.item() for g in torch.autograd.grad(nll, log_std))))
    assert results[1][0] < -math.log(1e-12)
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_decoder_levels_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_std in [(0.0, -3.0), (0.98, -2.0), (-1.3, -1.0)]:
        nll = discretized_gaussian_nll(levels, torch.full((256,), mean).double(), torch.full((256,), log_std).double())
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_bound_of_the_oracle_with_the_posterior_variance_is_zero():
    x0, t, _, x_t, _ = hybrid_batch()
    out = torch.cat([x0, torch.full_like(x0, -1)], dim=1)
    bound = variational_bound_terms(process("pred_x0", learn_variance=True), out, x0, x_t, t)
    torch.testing.assert_close(bound[1:], torch.zeros(7).double(), atol=1e-12, rtol=0)
    assert bound[0] > 0


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hybrid_loss_and_its_gradient(objective, weighting):
    """L_simple + T / 1000 of the bound (lambda = 0.001 of its sum); the bound trains the variance only."""
    x0, t, eps, x_t, out = hybrid_batch()
    out.requires_grad_()
    hybrid = process(objective, learn_variance=True, loss_weighting=weighting)
    simple = process(objective, loss_weighting=weighting)

    loss = hybrid.loss(lambda x, t: out, x0, t, eps)
    plain = simple.loss(lambda x, t: out[:, :3], x0, t, eps)
    bound = variational_bound_terms(hybrid, out, x0, x_t, t)
    torch.testing.assert_close(loss, plain + 1e-3 * T * bound)

    (of_loss,) = torch.autograd.grad(loss.sum(), out)
    (of_plain,) = torch.autograd.grad(plain.sum(), out)
    (of_bound,) = torch.autograd.grad(bound.sum(), out)
    torch.testing.assert_close(of_loss[:, :3], of_plain[:, :3])
    torch.testing.assert_close(of_loss[:, 3:], 1e-3 * T * of_bound[:, 3:])
    assert of_bound[:, :3].abs().amax((1, 2, 3)).min() > 0, "the bound alone would move the mean"
    assert of_loss[:, 3:].abs().amax((1, 2, 3)).min() > 0

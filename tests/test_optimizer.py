"""Learning rates and EMA decays in closed form; the meter; updates skipped where the gradient is not finite."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils import config
from utils.meter import Meter
from utils.optimizer import build_ema, build_optimizer, lr_at
from utils.stopping import StopRule

ALONE = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"), scaler=None)


def options(**keys):
    return config.merge(("test", {f"train.{name}": value for name, value in keys.items()})).train


# Learning rate


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule, decay", [
    ("constant", lambda p: 1.0),
    ("linear", lambda p: 1.0 - p),
    ("cosine", lambda p: math.cos(math.pi * p / 2) ** 2),
])  # fmt: skip
def test_learning_rate_in_closed_form(schedule, decay, warmup):
    opts, n = options(lr=3e-4, lr_schedule=schedule, warmup_steps=warmup), 110
    found = [lr_at(step, n, opts) for step in range(n)]
    rising = [3e-4 * (k + 1) / (warmup + 1) for k in range(warmup)]
    falling = [3e-4 * decay(k / (n - warmup)) for k in range(n - warmup)]
    assert found == pytest.approx(rising + falling, rel=1e-12)
    assert found[warmup] == max(found) == 3e-4 and min(found) > 0
    assert lr_at(n, n, opts) == pytest.approx(3e-4 if schedule == "constant" else 0, abs=1e-18)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    opts = options(lr=1.0, lr_schedule=schedule, warmup_steps=99)
    assert [lr_at(step, 20, opts) for step in range(20)] == pytest.approx([(k + 1) / 100 for k in range(20)])


# EMA


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self, x):
        return x * self.value


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_its_recurrence(decay, warmup):
    net = Scalar(3.0)
    ema = build_ema(net, options(ema_decay=decay, ema_warmup=warmup))
    average = ema.ema_model.value
    assert average.item() == 3.0
    expected, values = 3.0, torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    for k, value in enumerate(values, 1):
        net.value.data.fill_(value)
        ema.update()
        n = k - 1
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = d * expected + (1 - d) * value
        assert average.item() == pytest.approx(expected, abs=1e-5), f"update {k}"  # fp32 rounding
        assert net.value.item() == pytest.approx(value)


def test_ema_is_an_evaluation_copy_without_gradients():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    ema = build_ema(net.train(), options())
    assert not any(module.training for module in ema.ema_model.modules()) and net.training
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())
    assert ema.ema_model.state_dict().keys() == net.state_dict().keys()


def test_ema_moves_when_the_network_is_compiled_in_place():
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    ema = build_ema(net, options(ema_decay=0.5, ema_warmup=False))
    start = copy.deepcopy(net.state_dict())
    optimizer = build_optimizer(net, options(lr=0.1))
    net.compile(backend="eager")
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    ema.update()
    found = ema.ema_model.state_dict()
    assert found.keys() == net.state_dict().keys() == start.keys()
    for name, online in net.state_dict().items():
        assert not torch.equal(online, start[name])
        assert torch.allclose(found[name], (start[name] + online) / 2, atol=1e-6)


# Meter


def update(meter, *pairs):
    return [meter.update(torch.tensor(loss), torch.tensor(norm)).item() for loss, norm in pairs]


def test_meter_reads_means_and_starts_again():
    meter = Meter(ALONE)
    assert update(meter, (1.0, 2.0), (3.0, 6.0)) == [0, 0]
    assert meter.read() == {"loss": 2.0, "grad_norm": 4.0, "bad_steps": 0, "bad_in_row": 0}
    update(meter, (5.0, 1.0))
    assert meter.read() == {"loss": 5.0, "grad_norm": 1.0, "bad_steps": 0, "bad_in_row": 0}
    assert meter.read() == {"loss": 0.0, "grad_norm": 0.0, "bad_steps": 0, "bad_in_row": 0}


def test_meter_skips_and_counts_bad_steps():
    nan, inf = math.nan, math.inf
    meter = Meter(ALONE)
    assert update(meter, (1.0, 2.0), (nan, nan), (7.0, inf), (3.0, 4.0)) == [0, 1, 1, 0]
    assert meter.read() == {"loss": 2.0, "grad_norm": 3.0, "bad_steps": 2, "bad_in_row": 0}
    update(meter, (1.0, nan), (1.0, nan))
    assert meter.read() == {"loss": 0.0, "grad_norm": 0.0, "bad_steps": 2, "bad_in_row": 2}
    update(meter, (1.0, nan))  # the row goes on over a log line
    assert meter.read()["bad_in_row"] == 3
    update(meter, (1.0, 1.0))
    assert meter.read()["bad_in_row"] == 0


def test_meter_state_round_trip_is_exact():
    pairs = [(0.1 * k, 1 / (k + 1)) if k % 4 else (0.1, math.nan) for k in range(1, 21)]
    whole, first = Meter(ALONE), Meter(ALONE)
    update(whole, *pairs)
    update(first, *pairs[:8])
    state = first.state()
    assert all(isinstance(value, float) for value in state.values())
    resumed = Meter(ALONE, dict(state))
    update(resumed, *pairs[8:])
    update(first, *pairs[8:])  # taking the state changes nothing
    assert whole.state() == resumed.state() == first.state()
    assert whole.read() == resumed.read()


def test_the_past_loss_is_carried_by_the_main_process_only():
    meter = Meter(ALONE)
    update(meter, (1.0, 2.0), (3.0, math.nan))
    other = SimpleNamespace(is_main_process=False, num_processes=1, device=torch.device("cpu"))
    assert Meter(other, meter.state()).state() == {**meter.state(), "loss": 0.0}


# Skipped updates


def test_an_update_with_a_gradient_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    net, opts = nn.Linear(3, 2), options(lr=0.1, weight_decay=0.1)
    twin = copy.deepcopy(net)
    optimizer, other = build_optimizer(net, opts), build_optimizer(twin, opts)
    meter, stop, wrapped = Meter(ALONE), StopRule(ALONE, opts), SimpleNamespace(optimizer=optimizer)

    def step(gradient):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in net.parameters()])
        stop.skip_if_bad(wrapped, meter.update(norm, norm))
        optimizer.step()

    for gradient in (math.nan, 1.0, math.nan, -math.inf, 2.0):  # a bad one first: the state is made in that call
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        step(gradient)
        if math.isfinite(gradient):
            for parameter in twin.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            other.step()
        else:
            assert all(torch.equal(value, before[0][name]) for name, value in net.state_dict().items())
            for index, state in before[1].items():
                assert all(torch.equal(optimizer.state_dict()["state"][index][name], state[name]) for name in state)
    for mine, its in zip(net.parameters(), twin.parameters()):  # as if the bad updates had never been
        assert torch.equal(mine, its)
        assert optimizer.state[mine]["step"].item() == other.state[its]["step"].item() == 2
        assert torch.equal(optimizer.state[mine]["exp_avg"], other.state[its]["exp_avg"])
    assert meter.read()["bad_steps"] == 3

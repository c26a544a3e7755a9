"""Counter-based noise against published vectors, pure Python integers, and statistics."""

import math
import random
from itertools import count

import numpy as np
import pytest
import torch
from scipy import stats

from diffusions.noise import permutation, philox, randint, randn, random_words

BIG_SEED, BIG_INDEX = 0xFEDCBA9876543210, 0x0123456789ABCDEF


def python_philox(counter, key):
    """Philox4x32-10 as in Salmon et al. 2011, on Python integers of any size."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def python_words(seed, index, draw, n):
    """Words of one row: the counter is (block, draw, index), the key the seed, low halves first."""
    blocks = (python_philox((b, draw, index % 2**32, index >> 32), (seed % 2**32, seed >> 32)) for b in count())
    return [word for _, block in zip(range(-(-n // 4)), blocks) for word in block][:n]


def torch_philox(counter, key):
    return tuple(int(word) for word in philox(tuple(torch.tensor([word]) for word in counter), key))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
@pytest.mark.parametrize("function", [torch_philox, python_philox])
def test_random123_known_answers(function, counter, key, expected):
    counter, key, expected = (tuple(int(word, 16) for word in words.split()) for words in (counter, key, expected))
    assert function(counter, key) == expected


def test_philox_equals_pure_python_on_random_inputs():
    rng = random.Random(0)
    for _ in range(50):
        counter, key = [tuple(rng.getrandbits(32) for _ in range(n)) for n in (4, 2)]
        assert torch_philox(counter, key) == python_philox(counter, key)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("seed", [0, 2022, 2**32, BIG_SEED, 2**64 - 1])
@pytest.mark.parametrize("draw", [0, 1, 2**31 + 7, 2**32 - 1])
def test_words_use_every_bit_of_seed_index_and_draw(seed, draw, n):
    indices = [0, 1, 2**31, 2**32, 2**32 + 1, BIG_INDEX, 2**63 - 1]
    words = random_words(seed, torch.tensor(indices), draw, n)
    assert words.dtype == torch.int64
    assert words.tolist() == [python_words(seed, index, draw, n) for index in indices]


@pytest.mark.parametrize("shape", [(1,), (3,), (8,), (1, 1, 1), (3, 5, 7), (3, 4, 4)])
def test_randn_is_box_muller_of_the_words(shape):
    """Also the record of which images a seed stands for: changing this changes every published sample."""
    indices, n = [5, BIG_INDEX], math.prod(shape)
    noise = randn(BIG_SEED, torch.tensor(indices), 3, shape)
    assert noise.dtype == torch.float32 and noise.shape == (2, *shape)
    for row, index in zip(noise, indices):
        uniform = [(word + 0.5) / 2**32 for word in python_words(BIG_SEED, index, 3, n + 1)]
        pairs = [(math.sqrt(-2 * math.log(u)), 2 * math.pi * v) for u, v in zip(uniform[::2], uniform[1::2])]
        expected = [radius * f(angle) for radius, angle in pairs for f in (math.cos, math.sin)]
        torch.testing.assert_close(row.flatten(), torch.tensor(expected[:n]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", [0, BIG_SEED])
@pytest.mark.parametrize("first", [0, 2**32 - 500, BIG_INDEX])
def test_randn_is_standard_normal(seed, first):
    x = randn(seed, torch.arange(300) + first, 1, (3, 8, 8)).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    n = x.numel()
    for order, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**order).mean().item() - moment) < 4 * math.sqrt(variance / n), f"moment {order}"
    assert 4.2 < x.abs().max() < 6.67  # the tails are there


def pixels(seed=7, first=0, draw=0, rows=200):
    return randn(seed, torch.arange(rows) + first, draw, (3, 8, 8))


UNRELATED = {
    "rows": lambda: (pixels()[:-1], pixels()[1:]),
    "distant rows": lambda: (pixels(), pixels(first=2**32)),
    "draws": lambda: (pixels(), pixels(draw=1)),
    "seeds": lambda: (pixels(), pixels(seed=8)),
    "distant seeds": lambda: (pixels(), pixels(seed=7 + 2**32)),
    "seed and draw": lambda: (pixels(seed=1, draw=2), pixels(seed=2, draw=1)),
    "neighbours in a pair": lambda: (pixels()[..., ::2], pixels()[..., 1::2]),
    "neighbours across pairs": lambda: (pixels()[..., 1:-1:2], pixels()[..., 2::2]),
    "neighbours below": lambda: (pixels()[..., 1:, :], pixels()[..., :-1, :]),
    "channels": lambda: (pixels()[:, 0], pixels()[:, 1]),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_randn_is_uncorrelated(name):
    a, b = (x.flatten().double().numpy() for x in UNRELATED[name]())
    for f in (np.asarray, np.square):  # squares too: the pairs of Box-Muller share a radius
        assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("function", [lambda i: randn(3, i, 2, (3, 5, 5)), lambda i: randint(3, i, 2, 1000)])
def test_a_row_does_not_depend_on_the_others(function):
    index = torch.tensor([4, 0, 2**40, 9, 4, 1])
    together = function(index)
    assert torch.equal(together, torch.cat([function(index[i : i + 1]) for i in range(len(index))]))
    assert torch.equal(together.flip(0), function(index.flip(0)))
    assert torch.equal(together[0], together[4]) and not torch.equal(together[0], together[1])
    assert torch.equal(together, function(index)), "a draw repeats"
    assert len(function(index[:0])) == 0


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_randint_is_uniform(high):
    n = 50_000
    values = randint(11, torch.arange(n), 0, high)
    assert values.dtype == torch.int64 and values.shape == (n,)
    counts = torch.bincount(values, minlength=high)  # raises below 0
    assert len(counts) == high, "a value reached high"
    if high > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
        assert abs(np.corrcoef(values[1:].numpy(), values[:-1].numpy())[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("n", [0, 1, 2, 10, 1000, 20_000])
def test_permutation_is_a_permutation(n):
    order = permutation(1, n, 0)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(1, n, 0))


@pytest.mark.parametrize("other", [(2, 0), (1, 1), (1 + 2**32, 0), (1, 2**31)])
def test_permutation_differs_by_seed_and_draw(other):
    n, (seed, draw) = 1000, other
    first, second = permutation(1, n, 0), permutation(seed, n, draw)
    assert abs(stats.spearmanr(first.numpy(), second.numpy()).statistic) < 4 / math.sqrt(n)
    assert abs(stats.spearmanr(first.numpy(), np.arange(n)).statistic) < 4 / math.sqrt(n)


def test_permutation_is_uniform():
    counts = np.zeros((6, 6))
    for draw in range(1200):
        counts[np.arange(6), permutation(5, 6, draw).numpy()] += 1
    statistic = stats.chisquare(counts.flatten()).statistic  # mean 36 * (1 - 1/6) = 30, with 25 degrees of freedom
    assert stats.chi2.sf(statistic * 25 / 30, df=25) > 1e-3

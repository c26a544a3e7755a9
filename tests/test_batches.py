"""Training batches are a function of (seed, step): what resuming and changing the number of processes rests on."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import batches as batches_module
from utils.data.batches import Batches, decode_all, draw_timesteps, flips, held_out
from utils.data.image_folder import load_folder
from utils.data.image_set import ImageSet
from utils.errors import InputError

N = 37  # no multiple of any batch size below


def numbered(n=N):
    """Image i holds i in its left column and i + 100 in its right one, so that a mirrored image shows."""
    left = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 1)
    return ImageSet("numbered", torch.cat([left, left + 100], dim=-1), None, [])


def stream(first, last, seed=0, batch_size=8, images=None, **more):
    """Which image every example is, and whether it is mirrored: int64 [examples], bool [examples]."""
    found = list(Batches(images or numbered(), seed, batch_size, **more).from_step(first, last))
    pixels = torch.cat([pixels for _, pixels in found])
    return pixels.amin((1, 2, 3)).long(), pixels[:, 0, 0, 0] >= 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(N):
        pixels = np.array([[i, i + 100]] * 2, np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
    return root


# Order


@pytest.mark.parametrize("batch_size", [8, 2 * N + 5])
def test_restarting_anywhere_continues_the_uninterrupted_stream(batch_size):
    whole, mirrored = stream(0, 14, batch_size=batch_size, random_flip=True)
    for first in (1, 4, 5, 9, 13):  # 37 images are 4 5/8 batches of 8: step 4 crosses into the second epoch
        rest, rest_mirrored = stream(first, 14, batch_size=batch_size, random_flip=True)
        assert torch.equal(rest, whole[first * batch_size :])
        assert torch.equal(rest_mirrored, mirrored[first * batch_size :])


@pytest.mark.parametrize("batch_size", [1, 8, 2 * N + 5])
def test_every_epoch_sees_every_image_once_in_its_own_order(batch_size):
    seen, _ = stream(0, -(-5 * N // batch_size), batch_size=batch_size)
    epochs = seen[: 5 * N].reshape(5, N)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(N).expand(5, -1))
    assert len({tuple(epoch.tolist()) for epoch in [*epochs, torch.arange(N)]}) == 6


def test_another_seed_is_another_order():
    assert not torch.equal(stream(0, 4)[0], stream(0, 4, seed=1)[0])
    assert torch.equal(stream(0, 4)[0], stream(0, 4)[0])


def test_image_ids_name_the_images_that_were_given_out():
    batches = Batches(numbered(), 3, 8)
    for positions, pixels in batches.from_step(0, 10):
        assert torch.equal(batches.image_ids(positions), pixels[:, 0, 0, 0].long())


@pytest.mark.parametrize("t_sampling", ["uniform", "antithetic"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(world, t_sampling):
    def steps(rank, world):
        batches = Batches(numbered(), 5, 12, rank, world, random_flip=True)  # shares of 3 split antithetic pairs
        return [
            (positions, draw_timesteps(5, positions, 100, t_sampling), pixels)
            for positions, pixels in batches.from_step(2, 8)
        ]

    for alone, *shares in zip(steps(0, 1), *(steps(rank, world) for rank in range(world))):
        assert all(len(share[0]) == 12 // world for share in shares)
        for whole, parts in zip(alone, zip(*shares)):
            assert torch.equal(whole, torch.cat(parts))


def test_flips_mirror_about_half_and_only_when_asked():
    assert not stream(0, 20)[1].any()
    mirrored = stream(0, 250, random_flip=True)[1]  # 2,000 examples: five standard deviations are 0.056
    assert abs(mirrored.float().mean() - 0.5) < 0.056
    both = [flips(seed, torch.arange(4000)).float() - 0.5 for seed in (0, 1)]
    assert abs((both[0] * both[1]).mean()) < 0.02  # seeds are independent


# Reading


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_and_worker_reading_give_the_same_batches(folder, num_workers):
    images = load_folder(folder, 2, 1, "numbered")
    expected = stream(3, 7, random_flip=True)
    before = torch.random.get_rng_state()
    for cache in ("true", "false"):
        found = stream(3, 7, images=images, random_flip=True, cache=cache, num_workers=num_workers)
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert torch.equal(torch.random.get_rng_state(), before), "reading must not draw from torch's generator"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_whole_set_is_decoded_in_order(folder, num_workers):
    assert torch.equal(decode_all(load_folder(folder, 2, 1, "numbered"), num_workers), numbered().images)


def test_auto_caches_what_is_small_enough(folder, monkeypatch):
    images = load_folder(folder, 2, 1, "numbered")
    assert images.n_bytes() == N * 4
    for limit, cached in ((N * 4, True), (N * 4 - 1, False)):
        monkeypatch.setattr(batches_module, "CACHE_BYTES", limit)
        assert (Batches(images, 0, 8, cache="auto").cached is not None) == cached
        assert Batches(images, 0, 8, cache="true").cached is not None
        assert Batches(images, 0, 8, cache="false").cached is None


@pytest.mark.parametrize("cache", ["true", "false"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_an_input_error_from_any_process(folder, tmp_path, num_workers, cache):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "11.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InputError, match=re.escape(str(broken))):
        stream(0, 5, images=load_folder(tmp_path, 2, 1, "broken"), cache=cache, num_workers=num_workers)


# Timesteps and validation images


@pytest.mark.parametrize("total_steps", [2, 50, 1000])
@pytest.mark.parametrize("t_sampling", ["uniform", "antithetic"])
def test_timesteps_are_uniform(t_sampling, total_steps):
    n = 20_000
    t = draw_timesteps(0, torch.arange(n), total_steps, t_sampling)
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == total_steps - 1
    bins = min(total_steps, 10)
    counts = torch.bincount(t * bins // total_steps, minlength=bins).double()
    share = n / bins
    spread = (n if t_sampling == "uniform" else 2 * n) * (1 / bins) * (1 - 1 / bins)
    assert (counts - share).abs().max() < 5 * spread**0.5
    assert not torch.equal(t, draw_timesteps(1, torch.arange(n), total_steps, t_sampling))


def test_antithetic_timesteps_come_in_opposite_pairs():
    t = draw_timesteps(0, torch.arange(1000), 77, "antithetic")
    assert torch.equal(t[0::2] + t[1::2], torch.full((500,), 76))
    assert not torch.equal(t[0::2], t[1::2])
    independent = draw_timesteps(0, torch.arange(1000), 77, "uniform")
    assert not torch.equal(independent[0::2] + independent[1::2], torch.full((500,), 76))


@pytest.mark.parametrize("t_sampling", ["uniform", "antithetic"])
def test_timesteps_are_a_function_of_the_position(t_sampling):
    whole = draw_timesteps(7, torch.arange(64), 1000, t_sampling)
    picked = torch.tensor([3, 17, 18, 63])
    assert torch.equal(draw_timesteps(7, picked, 1000, t_sampling), whole[picked])


@pytest.mark.parametrize("n, expected", [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 5, 7]), (10, range(10)), (99, range(10))])
def test_held_out_images_are_evenly_spaced(n, expected):
    assert held_out(numbered(10), n)[:, 0, 0, 0].tolist() == list(expected)


def test_without_a_test_split_nothing_is_held_out():
    assert held_out(None, 5) is None

"""`--micro_batch auto`: sizes that are tried, and what happens when the device runs out of memory."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from utils import micro_batch


class Network(torch.nn.Module):
    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size, self.weight = image_size, torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("as_function", [True, False])
def test_a_batch_that_does_not_fit_is_halved_and_every_image_keeps_its_condition(monkeypatch, as_function):
    tried = []

    def generate(model, process, options, indices, seed, size, cond):
        rows = cond(torch.tensor(indices)) if callable(cond) else cond
        for start in range(0, len(indices), size):
            tried.append(size)
            if size > 8 or (start and size > 4):  # memory is short from the second batch on
                raise torch.cuda.OutOfMemoryError
            some = slice(start, start + size)
            yield SimpleNamespace(indices=indices[some], label=rows["label"][some].tolist())

    monkeypatch.setattr(micro_batch, "generate", generate)
    monkeypatch.setattr(micro_batch, "MOST", {"cpu": 16})
    cond = (lambda indices: {"label": indices * 10}) if as_function else {"label": torch.arange(40) * 10}
    batches = list(micro_batch.generate_fitting(Network(8), None, None, list(range(40)), 0, None, cond=cond))
    assert [i for batch in batches for i in batch.indices] == list(range(40))
    assert [label for batch in batches for label in batch.label] == [10 * i for i in range(40)]
    assert tried == [16, 8, 8] + [4] * 8


def test_what_the_failed_pass_held_is_gone_when_memory_is_given_back(monkeypatch):
    held, alive_at_release = [], []

    def generate(model, process, options, indices, seed, size, cond):
        activation = torch.zeros(1)
        held.append(weakref.ref(activation))
        if size > 64:
            raise torch.cuda.OutOfMemoryError
        yield SimpleNamespace(indices=indices)

    monkeypatch.setattr(micro_batch, "generate", generate)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive_at_release.append(held[0]() is not None))
    assert len(list(micro_batch.generate_fitting(Network(8), None, None, [0, 1], 0, None))) == 1
    assert alive_at_release == [False]


def test_memory_that_does_not_suffice_for_one_image_is_an_error(monkeypatch):
    def generate(*args):
        raise torch.cuda.OutOfMemoryError
        yield

    monkeypatch.setattr(micro_batch, "generate", generate)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(micro_batch.generate_fitting(Network(8), None, None, [0, 1], 0, None))


@pytest.mark.parametrize(("image_size", "size"), [(8, 128), (32, 128), (64, 32), (256, 2), (1024, 1)])
def test_large_images_come_fewer_at_a_time(image_size, size):
    assert micro_batch.first_size(Network(image_size)) == size

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import nn

from lit_gen.metrics.extractors import Extractor, ExtractorId


class Pixels(nn.Module):
    """Features: the pixels / 100; logits: the first ten of them."""

    def forward(self, x):
        features = x.flatten(1) / 100
        return features, features[:, :10]


@pytest.fixture
def pixels() -> Extractor:
    """Images (B, 1, 4, 4) -> 16 features with a known meaning."""
    return Extractor(ExtractorId("pixels", "1", "0" * 64, "none", "pixels", 16), Pixels(), channels=1)


def _rank(body: Callable, args: tuple, rank: int, world: int, folder) -> None:
    torch.set_num_threads(1)
    try:
        store, timeout = f"file://{folder}/store", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        answer = body(*args)
        dist.destroy_process_group()
    except BaseException:
        answer = traceback.format_exc()
    torch.save(answer, folder / f"answer{rank}.pt")


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(world, body, *args)`: the answers of `body(*args)` of every rank of a gloo group.

    The ranks are forks, which spares them the imports.
    """

    def run(world: int, body: Callable, *args) -> list:
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=_rank, args=(body, args, r, world, tmp_path)) for r in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        for process in processes:
            process.kill()
        answers = [torch.load(tmp_path / f"answer{r}.pt", weights_only=False) for r in range(world)]
        failures = [answer for answer in answers if isinstance(answer, str)]
        assert not failures, "\n".join(failures)
        return answers

    return run

"""Any division of the images over processes gives one process's numbers, also with uneven shards and an empty
rank.
"""

import pytest
import torch
from torch import distributed as dist

from lit_gen.errors import ConfigError
from lit_gen.metrics import (
    Evaluation,
    FeatureStatistics,
    Summary,
    compare,
    distributed,
    moments,
    reference_summary,
)
from lit_gen.metrics.distributed import gather_batches, long_from_rank_zero, own_batches


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, their indices and labels."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, 1, 4, 4, generator=g) * 40 + 120 + 5 * seed).clamp(0, 255).to(torch.uint8)
    return x, torch.arange(n), torch.randint(0, 3, (n,), generator=g)


def streaming(pixels, images, shards) -> dict:
    """What one rank sees of the sums; runs on every rank."""
    x = images.split(shards)[dist.get_rank()]
    statistics = FeatureStatistics(16)
    for batch in x.split(7) if len(x) else ():
        statistics.update(pixels(batch))
    answer = {"moments": statistics.compute(), "own": int(statistics.n)}
    statistics.update(pixels(x))
    answer["twice"] = statistics.compute()
    statistics.reset()
    statistics.update(pixels(x))
    answer["again"] = statistics.compute()
    statistics.update(torch.full((1, 16), torch.nan) if dist.get_rank() == 0 else torch.zeros(1, 16))
    try:
        statistics.compute()
    except ValueError as error:
        answer["error"] = error
    return answer


SHARDS = pytest.mark.parametrize("shards", [[120, 86], [206, 0], [0, 200, 6]], ids=str)


@SHARDS
def test_streaming_sums(pixels, on_ranks, shards):
    x, *_ = draw(206, 0)
    answers = on_ranks(len(shards), streaming, pixels, x, shards)
    once, twice = moments(pixels(x)), moments(pixels(torch.cat([x, x])))
    for rank, answer in enumerate(answers):
        assert (answer["moments"].n, answer["own"]) == (206, shards[rank])  # own sums are back after compute
        for name, expected in {"moments": once, "twice": twice, "again": once}.items():
            torch.testing.assert_close(answer[name].mean, expected.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(answer[name].cov, expected.cov, rtol=1e-12, atol=1e-13)
            assert torch.equal(answer[name].cov, answers[0][name].cov)
        assert "1 of" in str(answer["error"]) and "are NaN or infinite" in str(answer["error"])


def summary(pixels, images, index, labels, max_stored_features: int, shards=None) -> Summary:
    """Of this rank's share of the images, or of all of them in one process."""
    one = Evaluation(pixels, max_stored_features=max_stored_features, num_classes=3)
    rank = dist.get_rank() if shards else 0
    rows = torch.arange(len(images)).split(shards or len(images))[rank]
    for part in rows.split(11) if len(rows) else ():
        one.update(images[part], index[part], labels[part])
    return one.summary()


def evaluation(pixels, fake, real, shards, max_stored_features: int) -> tuple[Summary, dict]:
    generated = summary(pixels, *fake, max_stored_features, shards)
    # The reference is divided otherwise: all of it on the last rank.
    reference = summary(pixels, *real, max_stored_features, [0] * (len(shards) - 1) + [len(real[0])])
    return generated, compare(reference, generated, training=reference)


@SHARDS
@pytest.mark.parametrize("max_stored_features", [1000, 60])
def test_evaluation(pixels, on_ranks, shards, max_stored_features):
    fake, real = draw(206, 0), draw(160, 1)
    answers = on_ranks(len(shards), evaluation, pixels, fake, real, shards, max_stored_features)
    expected = summary(pixels, *fake, max_stored_features)
    reference = summary(pixels, *real, max_stored_features)
    results = compare(reference, expected, training=reference)
    for got, numbers in answers:
        for name in ("index", "features", "logits", "label"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert numbers == answers[0][1] and numbers.keys() == results.keys()
        for name, estimate in results.items():
            assert numbers[name] == pytest.approx(estimate, rel=1e-10, abs=1e-12), name


def repeated(pixels, images) -> ConfigError:
    one = Evaluation(pixels, max_stored_features=50)
    one.update(images, torch.arange(len(images)))
    with pytest.raises(ConfigError) as error:
        one.summary()
    return error.value


def test_images_that_two_ranks_count_are_an_error_on_both(pixels, on_ranks):
    errors = on_ranks(2, repeated, pixels, draw(20, 0)[0])
    assert all("An image index was given twice" in str(error) for error in errors)


def cached(pixels, images, folder) -> list:
    loads = []

    def batches():
        loads.append(1)
        return [(rows, images[rows.start : rows.stop], None) for rows in own_batches(len(images), 9)]

    options = {"data": "d", "n": len(images), "folder": folder}
    found = [reference_summary(batches, Evaluation(pixels), **options).moments for _ in range(2)]
    return [*found, len(loads), len(list(folder.iterdir()))]


def test_the_reference_is_computed_by_all_and_written_once(pixels, on_ranks, tmp_path):
    x, *_ = draw(160, 1)
    expected = moments(pixels(x))
    for computed, read, loads, files in on_ranks(2, cached, pixels, x, tmp_path / "cache"):
        assert (loads, files) == (1, 1)
        torch.testing.assert_close(computed.cov, expected.cov, rtol=1e-12, atol=1e-13)
        assert torch.equal(read.cov, computed.cov) and torch.equal(read.factor, computed.factor)


def gathered(n, size):
    parts = own_batches(n, size)
    rows = [torch.tensor([[i, dist.get_rank()] for i in part]) for part in parts]
    return gather_batches(rows, n, size), [len(part) for part in parts]


@pytest.mark.parametrize("n", [17, 4])
def test_whole_batches_are_divided_and_gathered_in_order(on_ranks, n):
    """Also where a rank has none."""
    (whole, *own), *others = on_ranks(3, gathered, n, 4)
    assert torch.equal(whole[:, 0], torch.arange(n))
    assert torch.equal(whole[:, 1], torch.arange(n) // 4 % 3)
    assert all(other[0] is None for other in others)
    assert [*own, *(sizes for _, sizes in others)] == ([[4, 4], [4, 1], [4]] if n == 17 else [[4], [], []])


def gathered_words(n, size):
    rows = [torch.tensor([[40_000 + i] * 3 for i in part]).to(torch.uint16) for part in own_batches(n, size)]
    return gather_batches(rows, n, size)


def test_16_bit_images_are_gathered(on_ranks):
    """gloo moves no uint16; also where a rank has none."""
    whole, *others = on_ranks(3, gathered_words, 6, 4)
    assert whole.dtype == torch.uint16 and others == [None, None]
    assert torch.equal(whole.long(), 40_000 + torch.arange(6)[:, None].expand(6, 3))


def waiting(beats: int, fails: bool) -> tuple[object, int]:
    """(answer or error, collectives that this rank waited in) of work that beats so often."""
    waits, says = 0, distributed._rank_zero_says

    def counted(more: bool) -> bool:
        nonlocal waits
        waits += 1
        return says(more)

    def work(beat) -> torch.Tensor:
        for _ in range(beats):
            beat()
        if fails:
            raise ConfigError(f"rank {dist.get_rank()} failed")
        return torch.tensor([dist.get_rank() + 0.1])

    distributed._rank_zero_says = counted
    try:
        return long_from_rank_zero(work, every=0), waits
    except ConfigError as error:
        return str(error), waits


def test_long_work_of_rank_zero_is_waited_for_beat_by_beat(on_ranks):
    """No wait is longer than the time between two beats, whatever the work takes; its end and its failure are
    everybody's."""
    assert on_ranks(3, waiting, 4, False) == 3 * [(torch.tensor([0.1]), 5)]
    assert on_ranks(2, waiting, 1, True) == 2 * [("rank 0 failed", 2)]

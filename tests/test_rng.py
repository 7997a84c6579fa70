"""One stream an image: the numbers of `PerSample`, bit for bit those of each stream drawn alone; and orders
that are never stored."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from lit_gen.rng import Permutation, PerSample, keyed_generator, rand, randint, randn

DRAWS = {
    "randn": (randn, lambda s, g: torch.randn(s, generator=g)),
    "rand": (rand, lambda s, g: torch.rand(s, generator=g)),
    "randint": (
        lambda s, g: randint(-2, 9, s, g),
        lambda s, g: torch.randint(-2, 9, s, generator=g),
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 7, 7), (1, 40, 41)])  # torch draws 16 numbers at a time
def test_rows_are_the_draws_of_their_streams(name, shape):
    together, alone = DRAWS[name]
    streams = PerSample.keyed(4, [7, 2, 9])
    singles = [keyed_generator(4, "sample", i) for i in (7, 2, 9)]
    for _ in range(2):
        expected = torch.stack([alone(shape, g) for g in singles])
        assert torch.equal(together((3, *shape), streams), expected)
    assert all(
        torch.equal(a.get_state(), b.get_state()) for a, b in zip(streams.generators, singles, strict=True)
    )


def test_wider_numbers_are_the_float32_ones():
    a, b = (randn((2, 9), PerSample.keyed(0, [1, 2]), dtype=d) for d in (torch.float32, torch.float64))
    assert b.dtype == torch.float64 and torch.equal(a.to(torch.float64), b)


def test_no_streams_give_no_rows():
    assert randn((0, 3, 4), PerSample([]), dtype=torch.float64).shape == (0, 3, 4)
    with pytest.raises(ValueError, match="PerSample has 0 streams but a draw of batch size 2"):
        randn((2, 3), PerSample([]))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 1023, 1024, 1025, 2**16 - 1, 2**16 + 1])
def test_a_permutation_has_every_element_once_and_an_inverse(size):
    order, places = Permutation(size, 5, "order", 2), np.arange(size)
    elements = order(places)
    assert np.array_equal(np.sort(elements), places)
    assert np.array_equal(order.inverse(elements), places)
    assert np.array_equal(order(places.reshape(1, -1, 1)), elements.reshape(1, -1, 1))
    assert order(size // 2) == elements[size // 2]


def test_keys_make_permutations_differ():
    orders = [Permutation(1000, *key)(np.arange(1000)) for key in ((0, 0), (0, 1), (1, 0))]
    for a, b in combinations(orders, 2):
        assert (a == b).sum() < 10  # one on average


@pytest.mark.parametrize("size", [2, 3, 7, 8, 17])
def test_over_many_keys_permutations_are_uniform(size):
    """Chi-square of the element at each place, and of the elements at two places; the keys are fixed, so that
    this passes or fails for good."""
    draws = 1500
    orders = np.stack([Permutation(size, k, "uniform")(np.arange(size)) for k in range(draws)])
    for place in range(size):
        assert chisquare(np.bincount(orders[:, place], minlength=size)).pvalue > 1e-4
    for a, b in [(0, 1), (0, size - 1), (size // 2, size - 1)]:
        if a != b and size > 2:
            pairs = np.bincount(orders[:, a] * size + orders[:, b], minlength=size**2).reshape(size, size)
            assert not pairs.diagonal().any()
            assert chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-4


def test_neighbours_of_a_large_permutation_are_unrelated():
    order = Permutation(10**9, 0, "order", 0)(np.arange(100_000)) / 1e9
    assert kstest(order, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015  # 4.7 standard deviations


def test_a_permutation_is_the_same_everywhere():
    small, large, largest = Permutation(10, 0, "order", 0), Permutation(10**9, 7), Permutation(2**62, 7)
    assert small(np.arange(10)).tolist() == [5, 3, 9, 0, 7, 2, 4, 6, 8, 1]
    assert large(np.arange(4)).tolist() == [573997507, 587799003, 594743892, 488669673]
    assert largest(np.array([0, 2**62 - 1])).tolist() == [3601270757320111574, 1869352293487530222]


@pytest.mark.parametrize("size", [0, 2**62 + 1])
def test_sizes_that_cannot_be_permuted_are_refused(size):
    with pytest.raises(ValueError, match="between 1 and 2"):
        Permutation(size, 0)

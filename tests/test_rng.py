"""One stream an image: the numbers of `PerSample`, bit for bit those of each stream drawn alone."""

import pytest
import torch

from lit_gen.rng import PerSample, keyed_generator, rand, randint, randn

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

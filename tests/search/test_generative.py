"""The search for augmentation of generative models: a symmetry of the images is worth having untold, and what
is no symmetry harms unless the network is told."""

import pytest
import torch

from lit_gen import rng
from lit_gen.metrics import pixel_means
from lit_gen.search import ConditionalSpace, GenerativeReward, Labelled

SPACE = ConditionalSpace(transforms=("xflip", "yflip"), probabilities=(1.0,))
FLIPPED, TOLD_UPSIDE_DOWN, UPSIDE_DOWN = (0, 2, 0), (0, 0, 1), (0, 0, 2)


def squares(n: int, seed: int) -> Labelled:
    """A white square anywhere in the upper half of a black image: left and right may change places, top and
    bottom may not."""
    g = rng.keyed_generator(seed, "squares")
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for image in images:
        y, x = (int(torch.randint(high, (), generator=g)) for high in (2, 6))
        image[:, y : y + 3, x : x + 3] = 255
    return Labelled(images, torch.zeros(n, dtype=torch.int64))


def test_a_row_of_choices_says_what_is_done_and_what_is_told():
    space = ConditionalSpace(transforms=("xflip", "rotate_frac", "translate_int"))
    assert space.sizes == (4, 3, 3, 3)
    pipe = space.decode((1, 0, 1, 2))
    assert pipe.p == 0.3 and pipe.active == ("translate_int", "rotate_frac")
    assert pipe.untold == ("translate_int",) and pipe.label_dim == 2
    assert space.decode((0, 0, 0, 0)).active == ()


def test_the_reward_is_reproducible_and_sees_the_augmentation():
    options = {"steps": 3, "batch_size": 4, "width": 8, "num_steps": 2, "extractor": pixel_means(1, 4)}
    reward = GenerativeReward(squares(6, 0), squares(20, 1), 1, **options)
    rows = (None, (0, 0, 0), FLIPPED, TOLD_UPSIDE_DOWN)
    values = [reward(None if row is None else SPACE.decode(row)) for row in rows]
    assert values[0] == values[1] == reward(None)  # nothing that is on is nothing
    assert len(set(values)) == 3 and max(values) < 0 and reward.images == 12


@pytest.mark.slow
def test_a_planted_symmetry_helps_and_a_leak_harms():
    """Six squares for training: flips to the other side help, upside down harms, and less so if told."""
    options = {"steps": 250, "batch_size": 32, "num_steps": 8, "extractor": pixel_means(1, 4)}
    reward = GenerativeReward(squares(6, 0), squares(300, 1), 1, **options)
    rows = (FLIPPED, TOLD_UPSIDE_DOWN, UPSIDE_DOWN)
    none, flipped, told, leaked = reward(None), *(reward(SPACE.decode(row)) for row in rows)
    assert flipped > none > leaked and told > leaked
    assert none - leaked > 4 * abs(none - told)

import pytest
import torch

from lit_gen.data import digits
from lit_gen.errors import ConfigError
from lit_gen.images import to_float, to_uint8


def test_the_split_is_fixed_disjoint_and_stratified():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    share = torch.bincount(train.labels) / 1437 - torch.bincount(test.labels) / 360
    assert share.abs().max() < 0.003
    assert train.fingerprint() == "digits-train-1437-" + train.fingerprint().split("-")[-1]
    assert train.fingerprint() != test.fingerprint()


def test_grey_levels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    levels = torch.cat([digits("train").images, digits("test").images]).unique()
    assert levels.tolist() == [round(v / 16 * 255) for v in range(17)]
    ours = torch.cat([digits("train").images, digits("test").images]).double().sum(0)
    theirs = torch.from_numpy(load_digits().images.sum(0)) / 16 * 255
    assert (ours[0] - theirs).abs().max() < 1797 / 2


def test_unknown_split():
    with pytest.raises(ConfigError, match="train, test"):
        digits("val")


def test_bytes_survive_the_round_trip_to_floats():
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(bytes_)), bytes_)
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]

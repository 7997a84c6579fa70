"""ncsn and ncsnv2 checkpoints: list layouts, three depths, both directions."""

import pytest
import torch
from official import edm_state, ncsn_state, score_sde_state

from lit_gen import pretrained
from lit_gen.errors import ConfigError
from lit_gen.score.networks.ncsn import NCSN
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.networks.ncsnv2 import NCSNv2

NETWORKS = {
    "ncsn": lambda: NCSN(32, 1, 4, num_levels=7),
    "ncsnv2": lambda: NCSNv2(32, 3, 4),
    "deeper": lambda: NCSNv2(128, 3, 2, depth=5),
    "deepest": lambda: NCSNv2(256, 3, 2, depth=6),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_architecture_and_average_are_read_off_the_list(tmp_path, name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    model = ncsn_state(net) | {"module.sigmas": torch.linspace(1, 0.01, 7)}
    average = {k.removeprefix("module."): 2 * v for k, v in ncsn_state(net).items()}
    torch.save([model, {}] if name == "ncsn" else [model, {}, 3, 40, average], tmp_path / "c.pth")
    read, info = pretrained.load(tmp_path / "c.pth", ema=False)
    x, c = torch.randn(1, net.channels, 32, 32), torch.tensor([3.0])
    assert torch.equal(read(x, c), net(x, c)) and type(read) is type(net) and len(info.sigmas) == 7
    official = ncsn_state(read)
    assert all(torch.equal(official[k], v) for k, v in ncsn_state(net).items())
    read, info = pretrained.load(tmp_path / "c.pth")
    scale = 1 if name == "ncsn" else 2
    assert (info.weights, info.step) == (("model", None) if name == "ncsn" else ("ema", 40))
    assert all(torch.equal(v, scale * net.state_dict()[k]) for k, v in read.state_dict().items())


def test_ncsn_says_the_score_of_its_own_images():
    """The official one gives the score of [0, 1] images, twice that of the same images on [-1, 1]."""
    net = NETWORKS["ncsn"]()
    torch.testing.assert_close(ncsn_state(net)["module.end_conv.weight"], 2 * net.head.weight.detach())


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "c.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ConfigError, match=r"c.pth: it is not an ncsn or ncsnv2 checkpoint"):
        pretrained.load(path)
    torch.save([{"module.conv.weight": torch.zeros(1)}, {}], path)
    with pytest.raises(ConfigError, match="not those of NCSN or NCSNv2"):
        pretrained.load(path)
    torch.save([ncsn_state(NETWORKS["ncsnv2"]()), {}], path)
    with pytest.raises(ConfigError, match="does not fit NCSNv2"):
        pretrained.load(path, NETWORKS["deeper"]())


def test_any_release_is_recognised(tmp_path):
    plus = NCSNpp(16, 3, 8, (1,), 1)
    files = {
        "ncsn": [ncsn_state(NETWORKS["ncsn"]()), {}],
        "score_sde": {"model": score_sde_state(plus), "ema": {}, "step": 1},
        "edm": edm_state(plus),
    }
    for release, content in files.items():
        torch.save(content, tmp_path / "c.pth")
        assert pretrained.load(tmp_path / "c.pth")[1].release == release
    torch.save({"gen": {}}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match="neither an EDM snapshot"):
        pretrained.load(tmp_path / "c.pth")

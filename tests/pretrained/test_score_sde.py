"""score_sde_pytorch checkpoints: architecture read off the tensors, the nameless average, both directions."""

import pytest
import torch
from official import score_sde_state
from torch import nn

from lit_gen import pretrained
from lit_gen.errors import ConfigError
from lit_gen.pretrained import score_sde
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.ncsnpp import NCSNpp

VE = {"embedding": "fourier", "fir": (1, 3, 3, 1), "input_pyramid": "residual"}
NETWORKS = {
    "ncsnpp": (NCSNpp, {"image_size": 32, "channel_mult": (1, 2, 2), "num_blocks": 2} | VE),
    "deep": (NCSNpp, {"image_size": 16, "channel_mult": (1, 2), "num_blocks": 4, "channels": 1} | VE),
    "discrete": (NCSNpp, {"image_size": 32, "channel_mult": (1, 2)} | VE | {"embedding": "positional"}),
    "ddpmpp": (NCSNpp, {"image_size": 32, "channel_mult": (1, 2), "num_blocks": 1}),
    "256px": (
        NCSNpp,
        {"image_size": 64, "channel_mult": (1, 1, 2, 2), "num_blocks": 2, "output_pyramid": "skip"}
        | VE
        | {"input_pyramid": "skip"},
    ),
    "no attention": (NCSNpp, {"image_size": 32, "channel_mult": (2, 1), "attention_resolutions": ()}),
    "ddpm": (DDPM, {"image_size": 32, "base_channels": 32, "channel_mult": (1, 2, 2)}),
    "flat ddpm": (DDPM, {"image_size": 16, "base_channels": 32, "channel_mult": (1, 1), "num_blocks": 1}),
}


def network(name):
    torch.manual_seed(0)
    cls, arguments = NETWORKS[name]
    net = cls(**{"base_channels": 8} | arguments).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def checkpoint(net):
    """The official layout; the moving average is ten times the weights."""
    model = score_sde_state(net)
    trainable = [v for k, v in model.items() if not k.endswith("all_modules.0.W")]
    model = {"module.sigmas": torch.linspace(50, 0.01, 10, dtype=torch.float64)} | model
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": [10 * p for p in trainable]}
    return {"optimizer": {}, "model": model, "ema": ema, "step": 7}


@pytest.mark.parametrize("name", NETWORKS)
def test_architecture_is_read_off_the_tensors(tmp_path, name):
    net = network(name)
    torch.save(checkpoint(net), tmp_path / "c.pth")
    size = net.resolutions[0]
    read, info = pretrained.load(tmp_path / "c.pth", ema=False, image_size=size)
    assert type(read) is type(net) and info.step == 7 and len(info.sigmas) == 10 and info.weights == "model"
    x, c = torch.randn(2, net.channels, size, size), torch.tensor([0.2, 1.4])
    assert torch.equal(read(x, c), net(x, c))
    official, again = score_sde_state(net), score_sde_state(read)
    assert official.keys() == again.keys() and all(torch.equal(again[k], v) for k, v in official.items())


DATA = {"image_size": 16, "num_channels": 2, "centered": True}
COMMON = {
    "nf": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.1,
    "nonlinearity": "swish",
    "conditional": True,
    "resamp_with_conv": True,
}
PLUS = COMMON | {
    "name": "ncsnpp",
    "fir": True,
    "fir_kernel": [1, 3, 3, 1],
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "fourier",
    "fourier_scale": 16,
}
CONFIGS = {
    "ncsnpp": PLUS,
    "256px": PLUS | {"progressive": "output_skip", "progressive_input": "input_skip"},
    "cat": PLUS | {"progressive_input": "input_skip", "progressive_combine": "cat", "skip_rescale": False},
    "strided": PLUS | {"fir": False, "nonlinearity": "lrelu", "embedding_type": "positional"},
    "unconditional": PLUS | {"conditional": False},
    "ddpm blocks": PLUS | {"resblock_type": "ddpm", "resamp_with_conv": False, "nonlinearity": "elu"},
    "ddpm": COMMON | {"name": "ddpm", "resamp_with_conv": False, "nonlinearity": "relu"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_official_configs_say_what_tensors_cannot(tmp_path, name):
    config = {"model": CONFIGS[name], "data": DATA}
    cls, arguments = score_sde.config_arguments(config)
    torch.manual_seed(0)
    net = cls(**arguments).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    torch.save(checkpoint(net), tmp_path / "c.pth")
    read, info = pretrained.load(tmp_path / "c.pth", ema=False, config=config)
    x, c = torch.randn(2, 2, 16, 16), torch.tensor([0.2, 1.4])
    assert torch.equal(read(x, c), net(x, c)) and info.network == arguments
    if name not in ("ncsnpp", "256px"):
        with pytest.raises(ConfigError, match=r"config=|does not fit"):
            pretrained.load(tmp_path / "c.pth", image_size=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonlinearity": "gelu"}, r"model.nonlinearity='gelu' has no network here: take one of swish, elu"),
        ({"name": "ncsnv2"}, "model.name='ncsnv2' has no network here"),
        ({"name": "ddpm", "conditional": False}, "conditional=False: the official code cannot run it"),
        ({"progressive": "residual"}, "model.progressive='residual' has no network"),
        ({"progressive": "output_skip", "fir": False}, "output_skip without fir: the official code cannot"),
        ({"resblock_type": "ddpm"}, "resblock_type=ddpm but with fir and resamp_with_conv=False"),
        ({"fir_kernel": [1, 2, 3, 4]}, "only symmetric filters"),
        ({"progressive_input": "sum"}, "model.progressive_input='sum'"),
    ],
)
def test_options_without_a_network_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        score_sde.config_arguments({"model": PLUS | change, "data": DATA})


@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp", "ddpm"])
def test_moving_average_skips_the_frozen_frequencies(tmp_path, name):
    net = network(name)
    torch.save(checkpoint(net), tmp_path / "c.pth")
    read, info = pretrained.load(tmp_path / "c.pth")
    assert info.weights == "ema" and info.network["image_size"] == net.resolutions[0]
    for key, value in net.state_dict().items():
        scale = 1 if key == "noise.embedding.frequencies" else 10
        assert torch.equal(read.state_dict()[key], scale * value)


def test_official_order_of_parameters_is_the_order_of_use():
    """The nameless list relies on it: our writer emits all_modules.0, 1, 2 ... in order."""
    numbers = [int(k.split(".")[2]) for k in score_sde_state(network("256px"))]
    assert numbers == sorted(numbers)


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "c.pth"
    good = checkpoint(network("ddpmpp"))
    torch.save(good, path)
    with pytest.raises(ConfigError, match="does not fit NCSNpp"):
        pretrained.load(path, NCSNpp(32, base_channels=8, channel_mult=(1, 2), num_blocks=2))
    with pytest.raises(ConfigError, match="does not match"):
        torch.save(good | {"ema": {"shadow_params": [torch.zeros(1)]}}, path)
        pretrained.load(path)
    with pytest.raises(ConfigError, match="no numbered 'all_modules'"):
        score_sde.from_state_dict({"module.conv.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="without labels only"):
        score_sde_state(NCSNpp(8, base_channels=8, channel_mult=(1,), num_classes=2))

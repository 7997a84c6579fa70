"""EDM and EDM2 snapshots: written here in the official pickle format, read without their code."""

import pickle
import sys
import types

import pytest
import torch
from official import edm_state
from torch import nn

from lit_gen import pretrained
from lit_gen.errors import ConfigError
from lit_gen.pretrained import edm
from lit_gen.score.networks.adm import ADM
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.edm2 import EDM2
from lit_gen.score.networks.ncsnpp import NCSNpp

NETWORKS = {
    "ddpmpp": lambda: NCSNpp(8, 3, 16, (1, 2), 2, (4,), num_classes=5, augment_dim=9),
    "ncsnpp": lambda: NCSNpp(
        16, 1, 8, (1, 2, 1), 1, (8, 4), "fourier_edm", 2, fir=(1, 3, 3, 1), input_pyramid="residual"
    ),
    "skips": lambda: NCSNpp(
        8, 3, 8, (2, 2), 1, (), emb_mult=2, input_pyramid="skip", output_pyramid="skip", out_channels=6
    ),
    "adm": lambda: ADM(8, 3, 32, (1, 4), 1, (8, 4), attention_width=64, num_classes=5, augment_dim=9),
    "edm2": lambda: EDM2(
        8,
        3,
        32,
        (1, 4),
        None,
        3,
        1,
        (4,),
        head_channels=32,
        attention_width=64,
        res_balance=0.4,
        num_classes=5,
    ),
}


@pytest.fixture
def official_modules(monkeypatch):
    """Stand-ins for the modules that EDM's pickles name; gone when they are read."""
    persistence = types.ModuleType("torch_utils.persistence")
    util = types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the reader must not call this")

    class EasyDict(dict):
        pass

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    for name in ("torch_utils", "dnnlib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.setitem(sys.modules, "dnnlib.util", util)
    return persistence, util


class Persistent:
    """Pickles as an object of a `persistent_class`: source code, class name and state as arguments."""

    def __init__(self, module, class_name, tensors, **kwargs):
        children, own = {}, {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = tensor
            else:
                own[head] = nn.Parameter(tensor)
        inner = {k: Persistent(module, "Inner", v) for k, v in children.items()}
        state = {"training": False, "_parameters": own, "_buffers": {}, "_modules": inner}
        source = "raise SystemExit('executed')"
        state |= {"_init_args": (), "_init_kwargs": kwargs}
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }
        self.function = module._reconstruct_persistent_obj

    def __reduce__(self):
        return self.function, (self.meta,)


def write(path, modules, net, prefix, half=False, extra=(), **kwargs):
    persistence, util = modules
    state = {prefix + k: v.half() if half else v for k, v in edm_state(net).items()} | dict(extra)
    kwargs |= {"img_resolution": 8, "resample_filter": [1, 1]} if not kwargs.get("resample_filter") else {}
    ema = Persistent(persistence, "EDMPrecond", state, **kwargs)
    data = {"ema": ema, "loss_fn": None, "dataset_kwargs": util.EasyDict(path="x.zip")}
    path.write_bytes(pickle.dumps(data))


def randomized(name):
    torch.manual_seed(1)
    net = NETWORKS[name]().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def inputs(net):
    x = torch.randn(2, net.channels, net.resolutions[0], net.resolutions[0])
    return x, torch.tensor([0.1, 0.7]), torch.tensor([1, 3]) if net.num_classes else None


@pytest.mark.parametrize("name", NETWORKS)
def test_snapshots_are_read_without_their_code(tmp_path, monkeypatch, official_modules, name):
    net = randomized(name)
    kwargs = {"resample_filter": [1, 3, 3, 1]} if name == "ncsnpp" else {}
    kwargs |= {"channels_per_head": 32, "res_balance": 0.4} if name == "edm2" else {}
    prefix = "unet." if name == "edm2" else "model."
    write(tmp_path / "s.pkl", official_modules, net, prefix, dropout=0.13, **kwargs)
    for module in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.delitem(sys.modules, module)
    read, info = pretrained.load(tmp_path / "s.pkl")
    assert type(read) is type(net) and info.snapshot["class"] == "EDMPrecond" and not read.training
    assert info.network["dropout"] == 0.13
    x, c, label = inputs(net)
    assert torch.equal(read(x, c, label), net(x, c, label))


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_round_trip(tmp_path, name):
    """Official names, there and back, bit for bit; also into a given network."""
    net = randomized(name)
    state = edm_state(net)
    hidden = {"fir": (1, 3, 3, 1)} if name == "ncsnpp" else {}
    hidden |= {"head_channels": 32, "res_balance": 0.4} if name == "edm2" else {}
    read, _ = edm.from_state_dict({f"model.{k}": v for k, v in state.items()}, hidden=hidden)
    again = edm_state(read)
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
    torch.save(state, tmp_path / "s.pt")
    given, _ = pretrained.load(tmp_path / "s.pt", NETWORKS[name]())
    x, c, label = inputs(net)
    assert torch.equal(given(x, c, label), net(x, c, label))


def test_half_precision_edm2_with_its_uncertainty(tmp_path, official_modules):
    """The network is read; the uncertainty, which sampling does not need, is left out."""
    net = randomized("edm2")
    extra = {
        "logvar_fourier.freqs": torch.randn(16),
        "logvar_fourier.phases": torch.rand(16),
        "logvar_linear.weight": torch.randn(1, 16),
    }
    write(tmp_path / "s.pkl", official_modules, net, "unet.", half=True, extra=extra, channels_per_head=32)
    read, _ = pretrained.load(tmp_path / "s.pkl")
    assert all(p.dtype == torch.float32 for p in read.parameters())
    assert all(
        torch.equal(p, q.half().float()) for p, q in zip(read.parameters(), net.parameters(), strict=True)
    )


def test_files_that_do_not_fit_are_named(tmp_path):
    net = randomized("ddpmpp")
    state = edm_state(net)
    torch.save(state, tmp_path / "state.pt")
    pretrained.load(tmp_path / "state.pt", image_size=8)
    with pytest.raises(ConfigError, match=r"state.pt: image_size=16: its network is of 8x8 images"):
        pretrained.load(tmp_path / "state.pt", image_size=16)
    torch.save({"epoch": 3, "weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="neither an EDM snapshot"):
        pretrained.load(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="not those of a network of EDM"):
        edm.from_state_dict({"conv.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"lacks map_layer0.bias and has nothing besides"):
        edm.from_state_dict({k: v for k, v in state.items() if k != "map_layer0.bias"})
    with pytest.raises(ConfigError, match=r"lacks nothing and has surplus.weight besides"):
        edm.from_state_dict(state | {"surplus.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"map_label.weight of this edm checkpoint has shape \(16, 5\)"):
        edm.from_state_dict(state, NCSNpp(8, 3, 16, (1, 2), 2, (4,), num_classes=6, augment_dim=9))
    with pytest.raises(ConfigError, match="no NCSNpp with rescale=False"):
        edm_state(NCSNpp(8, 3, 8, (1,), 1, rescale=False))
    with pytest.raises(ConfigError, match="no DDPM"):
        edm_state(DDPM(8, 3, 8, (1,), 1))

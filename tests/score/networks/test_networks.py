"""Networks: official sizes, layers against their formulas, labels, precision, compilation, recomputation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from lit_gen.errors import ConfigError
from lit_gen.score.networks.adm import ADM
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.edm2 import (
    EDM2,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    renormalize,
)
from lit_gen.score.networks.embeddings import FourierEmbedding, PositionalEmbedding
from lit_gen.score.networks.layers import (
    Attention,
    Resample,
    activation_of,
    class_rows,
    conv,
    group_norm,
)
from lit_gen.score.networks.ncsn import NCSN
from lit_gen.score.networks.ncsnpp import _PYRAMIDS, NCSNpp
from lit_gen.score.networks.ncsnv2 import NCSNv2
from lit_gen.score.networks.refinenet import instance_norm_plus
from lit_gen.score.networks.tokens import sinusoids
from lit_gen.score.networks.uvit import UViT

VE = {"embedding": "fourier", "fir": (1, 3, 3, 1), "input_pyramid": "residual"}
PX256 = VE | {
    "channel_mult": (1, 1, 2, 2, 2, 2, 2),
    "num_blocks": 2,
    "input_pyramid": "skip",
    "output_pyramid": "skip",
}
CIFAR = {"channel_mult": (2, 2, 2), "augment_dim": 9}

# Parameters of the official configurations; those of score_sde count the frozen Fourier frequencies.
COUNTS = [
    (NCSN, {"image_size": 32}, 30_117_635),
    (NCSNv2, {"image_size": 32}, 29_694_083),
    (NCSNv2, {"image_size": 128, "depth": 5}, 83_445_379),
    (NCSNv2, {"image_size": 256, "depth": 6}, 94_132_611),
    (DDPM, {"image_size": 32}, 35_218_947),
    (DDPM, {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4)}, 111_569_923),
    (NCSNpp, {"image_size": 32, "fir": (1, 3, 3, 1), "input_pyramid": "residual"}, 62_693_251),
    (NCSNpp, {"image_size": 32} | VE, 62_758_915),
    (NCSNpp, {"image_size": 32, "num_blocks": 8} | VE, 107_587_075),
    (NCSNpp, {"image_size": 32}, 61_804_419),
    (NCSNpp, {"image_size": 32, "num_blocks": 8}, 106_632_579),
    (NCSNpp, {"image_size": 256} | PX256, 65_574_549),
    (NCSNpp, {"image_size": 32} | CIFAR, 55_733_891),
    (NCSNpp, {"image_size": 32, "num_classes": 10} | CIFAR, 55_735_299),
    (NCSNpp, {"image_size": 32} | CIFAR | VE, 56_397_827 + 128),
    (NCSNpp, {"image_size": 32, "num_classes": 10} | CIFAR | VE, 56_400_643 + 128),
    (NCSNpp, {"image_size": 64, "augment_dim": 9}, 61_805_571),
    (NCSNpp, {"image_size": 64, "augment_dim": 9} | VE, 62_761_091 + 128),
    (ADM, {"image_size": 64, "num_classes": 1000}, 295_899_267),
    (ADM, {"image_size": 32, "augment_dim": 9}, 279_625_923),
    (ADM, {"image_size": 32, "num_classes": 10}, 279_631_875),
]

SMALL = {
    "ncsnpp": lambda **k: NCSNpp(8, 1, 16, (1, 2), 1, (4,), num_classes=3, augment_dim=9, **VE, **k),
    "ddpmpp": lambda **k: NCSNpp(8, 1, 16, (1, 2), 1, (4,), **k),
    "256px": lambda **k: NCSNpp(
        8, 1, 16, (1, 2), 1, (4,), **(VE | {"input_pyramid": "skip", "output_pyramid": "skip"}), **k
    ),
    "cat": lambda **k: NCSNpp(
        8, 1, 16, (1, 2), 1, (4,), fir=(1, 3, 3, 1), input_pyramid="cat", block="ddpm", rescale=False, **k
    ),
    "strided": lambda **k: NCSNpp(8, 1, 16, (1, 2), 1, input_pyramid="strided", activation="elu", **k),
    "ddpm": lambda **k: DDPM(8, 1, 16, (1, 2), 1, (4,), num_classes=3, **k),
    "ddpm plain": lambda **k: DDPM(8, 1, 16, (1, 2), 1, activation="elu", resample_conv=False, **k),
    "adm": lambda **k: ADM(8, 1, 16, (1, 2), 1, (4,), num_classes=3, augment_dim=9, **k),
    "edm2": lambda **k: EDM2(8, 1, 16, (1, 2), num_blocks=1, attention_resolutions=(4,), num_classes=3, **k),
    "uvit": lambda **k: UViT(8, 1, 2, 16, 5, 2, num_classes=3, **k),
    "uvit null": lambda **k: UViT(
        8, 1, 4, 18, 2, 3, qkv_bias=True, time_mlp=True, conv=False, num_classes=3, null_class=True, **k
    ),
    "dit": lambda **k: DiT(8, 1, 2, 16, 2, 2, num_classes=3, **k),
    "dit zeros": lambda **k: DiT(8, 1, 2, 16, 2, 2, num_classes=3, null_class=False, **k),
    "ncsn": lambda: NCSN(8, 1, 8),
    "ncsnv2": lambda: NCSNv2(8, 1, 8),
    "ncsnv2 deepest": lambda: NCSNv2(16, 1, 8, depth=6),
}
TRANSFORMERS = ["uvit", "uvit null", "dit", "dit zeros"]
UNETS = ["ncsnpp", "ddpmpp", "256px", "cat", "strided", "ddpm", "ddpm plain", "adm", "edm2"]


def small(name, **options):
    """A little network with no layer at zero, and inputs for it."""
    torch.manual_seed(0)
    net = SMALL[name](**options).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.2)
    size = 16 if name == "ncsnv2 deepest" else 8
    inputs = {"x": torch.randn(3, 1, size, size), "noise_label": torch.tensor([0.3, 1.0, 2.0])}
    if net.num_classes:
        inputs["label"] = torch.tensor([0, 2, -1])
    if net.augment_dim:
        inputs["augment_label"] = torch.randn(3, net.augment_dim)
    return net, inputs


@pytest.mark.parametrize(("cls", "arguments", "expected"), COUNTS)
def test_parameter_counts_of_the_official_configurations(cls, arguments, expected):
    with torch.device("meta"):
        net = cls(**arguments)
    frozen = sum(b.numel() for name, b in net.named_buffers() if name in net.state_dict())
    assert sum(p.numel() for p in net.parameters()) + frozen == expected


# Layers against their formulas


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, x = Attention(12, group_norm(12), heads=3), torch.randn(2, 12, 4, 6)
    q, k, v = layer.qkv(layer.norm(x).flatten(2).mT).mT.unflatten(1, (3, 3, 4)).unbind(1)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k).div(math.sqrt(4)).softmax(-1)
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).flatten(1, 2)
    expected = x + layer.proj(mixed.mT).mT.view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)])
def test_resampling_is_zero_stuffing_and_filtering(taps):
    torch.manual_seed(0)
    x, n = torch.randn(2, 3, 6, 4, dtype=torch.float64), len(taps)
    kernel = torch.outer(*2 * [torch.tensor(taps, dtype=torch.float64) / sum(taps)]).expand(3, 1, n, n)
    layer = Resample(taps).double()
    layer.kernel = kernel[:1, :1]
    stuffed = torch.zeros(2, 3, 12, 8, dtype=torch.float64)
    stuffed[:, :, ::2, ::2] = x
    padded = F.pad(stuffed, (n // 2, n // 2 - 1, n // 2, n // 2 - 1))
    torch.testing.assert_close(layer.up(x), F.conv2d(padded, 4 * kernel, groups=3))
    padded = F.pad(x, 4 * (n // 2 - 1,))
    torch.testing.assert_close(layer.down(x), F.conv2d(padded, kernel, groups=3)[:, :, ::2, ::2])
    # Up is four times the adjoint of down.
    y = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    torch.testing.assert_close((layer.up(x) * y).sum(), 4 * (x * layer.down(y)).sum())


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_strided_convolution_is_convolution_then_down(taps):
    torch.manual_seed(0)
    x, layer, resample = torch.randn(2, 3, 8, 8), conv(3, 5, padding=0), Resample(taps)
    pad = 1 + resample.pad
    wide = F.conv2d(F.pad(x, 4 * (pad,)), layer.weight)
    expected = F.conv2d(wide, resample.kernel.expand(5, -1, -1, -1), stride=2, groups=5)
    torch.testing.assert_close(resample.down_conv(x, layer), expected, rtol=1e-5, atol=1e-5)


def test_positional_embeddings_of_ddpm_and_adm():
    c = torch.tensor([0.0, 3.0])
    ddpm, adm = PositionalEmbedding(8)(c), PositionalEmbedding(8, endpoint=False, cos_first=True)(c)
    for i in range(4):
        assert ddpm[1, i].item() == pytest.approx(math.sin(3 * 10000 ** (-i / 3)), rel=1e-5, abs=1e-7)
        assert ddpm[1, 4 + i].item() == pytest.approx(math.cos(3 * 10000 ** (-i / 3)), rel=1e-5)
        assert adm[1, i].item() == pytest.approx(math.cos(3 * 10000 ** (-i / 4)), rel=1e-5)
    assert ddpm[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_fourier_features_of_both_releases_are_the_same_but_for_rounding():
    torch.manual_seed(0)
    ours, theirs = FourierEmbedding(64), FourierEmbedding(64, radians=True)
    theirs.load_state_dict(ours.state_dict())
    c = torch.tensor([-4.6, 7.2])
    assert not torch.equal(ours(c), theirs(c))
    phase = 2 * math.pi * c.double()[:, None] * ours.frequencies.double()
    exact = torch.cat([phase.sin(), phase.cos()], 1)
    for layer in (ours, theirs):
        torch.testing.assert_close(layer(c).double(), exact, rtol=0, atol=1e-3)
        torch.testing.assert_close(layer.double()(c.double()), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "expected"), [("silu", -0.2689), ("elu", -0.6321), ("relu", 0.0), ("leaky_relu", -0.2)]
)
def test_activations(name, expected):
    assert activation_of(name)(torch.tensor(-1.0)).item() == pytest.approx(expected, abs=1e-4)


def test_instance_norm_plus_keeps_its_digits_where_means_are_large():
    """A channel of mean 300 and deviation 1; the channels_last kernel alone is off in the second digit."""
    torch.manual_seed(0)
    x = (300 + torch.randn(2, 5, 8, 8)).contiguous(memory_format=torch.channels_last)
    gamma, alpha, beta = torch.randn(3, 5)
    wide = x.double()
    means, centred = wide.mean((2, 3)), wide - wide.mean((2, 3), keepdim=True)
    h = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    m = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
    expected = (h + (alpha * m)[..., None, None]) * gamma[:, None, None] + beta[:, None, None]
    out = instance_norm_plus(x, gamma, alpha, beta)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (8, 2), (24, 6), (36, 9), (128, 32), (132, 22)]
)
def test_groups_divide_the_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_class_rows():
    like = torch.zeros(3, 5)
    assert class_rows(torch.tensor([1, -1, 0]), 2, like).tolist() == [[0, 1], [0, 0], [1, 0]]
    assert class_rows(None, 2, like).tolist() == [[0, 0]] * 3
    soft = torch.rand(3, 2)
    assert torch.equal(class_rows(soft, 2, like), soft)


# Magnitude preservation, https://arxiv.org/abs/2312.02696: unit variance in, unit variance out


def test_edm2_layers_preserve_magnitude():
    torch.manual_seed(0)
    x, y = torch.randn(64, 96, 8, 8), torch.randn(64, 32, 8, 8)
    assert mp_silu(x).square().mean().sqrt().item() == pytest.approx(1, abs=0.01)
    assert mp_sum(x, torch.randn_like(x), 0.3).std().item() == pytest.approx(1, abs=0.01)
    both = mp_cat(x, 5 * y, 0.5)
    assert both[:, :96].square().sum().item() * 25 == pytest.approx(
        both[:, 96:].square().sum().item(), rel=0.02
    )
    assert mp_cat(x, y, 0.5).square().mean().item() == pytest.approx(1, abs=0.02)
    inner = MPConv(96, 48, 3)(x)[:, :, 1:-1, 1:-1]
    assert inner.std().item() == pytest.approx(1, abs=0.03)
    assert MPFourier(4096)(torch.tensor([0.7])).square().mean().item() == pytest.approx(1, abs=0.05)


def test_edm2_puts_weights_on_the_sphere_and_gradients_on_its_tangent():
    torch.manual_seed(0)
    layer, x = MPConv(8, 6, 3), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        layer.weight.mul_(7)
    out = layer.eval()(x)
    renormalize(layer)
    torch.testing.assert_close(layer(x), out, rtol=1e-3, atol=1e-3)
    layer(x).square().sum().backward()
    rms = layer.weight.detach().flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.ones(6), rtol=1e-3, atol=0)
    along = (layer.weight.grad * layer.weight).flatten(1).sum(1).abs()
    assert (along / layer.weight.grad.flatten(1).norm(dim=1) < 1e-2).all()


def test_edm2_starts_at_zero_and_ignores_the_scale_of_its_weights():
    torch.manual_seed(0)
    net = SMALL["edm2"]().eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, torch.zeros(2)), torch.zeros_like(x))
    torch.nn.init.ones_(net.out_gain)
    before = net(x, torch.zeros(2))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(3)
    torch.testing.assert_close(net(x, torch.zeros(2)), before, rtol=1e-2, atol=1e-2)
    assert normalize(torch.full((1, 4), 3.0)).square().mean().item() == pytest.approx(1, abs=1e-3)


# Whole networks


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_a_batch_do_not_see_each_other(name):
    net, inputs = small(name)
    net.double()  # in float32 another batch size is another order of sums
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    whole = net(**inputs)
    for i in range(3):
        torch.testing.assert_close(net(**{k: v[i : i + 1] for k, v in inputs.items()}), whole[i : i + 1])


@pytest.mark.parametrize("name", SMALL)
def test_float64_agrees_with_float32(name):
    net, inputs = small(name)
    expected = net(**inputs)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    out = copy.deepcopy(net).double()(**wide)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNETS + TRANSFORMERS)
def test_recomputed_blocks_have_the_same_gradients(name):
    net, inputs = small(name, **({} if name in TRANSFORMERS else {"dropout": 0.3}))
    net.train()
    grads = []
    for recompute in (False, True):
        again = copy.deepcopy(net)
        again.checkpoint_blocks = recompute
        torch.manual_seed(1)  # the same dropout
        loss = again(**inputs).square().sum()
        grads.append(torch.autograd.grad(loss, list(again.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "edm2", *TRANSFORMERS])
def test_labels_as_indices_rows_and_none(name):
    net, inputs = small(name)
    rows = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    by_index = net(**inputs)
    assert torch.equal(net(**inputs | {"label": rows}), by_index)
    nothing = net(**inputs | {"label": None})
    assert torch.equal(nothing, net(**inputs | {"label": torch.zeros(3, 3)}))
    assert torch.equal(nothing[2], by_index[2]) and not torch.allclose(nothing[:2], by_index[:2])
    if net.augment_dim:
        plain = net(**inputs | {"augment_label": None})
        assert torch.equal(plain, net(**inputs | {"augment_label": torch.zeros(3, 9)}))
        assert not torch.allclose(plain, by_index)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in TRANSFORMERS])
def test_heights_and_widths_may_differ(name):
    """With filters symmetric about the diagonal, a transposed image gives the transposed output."""
    net, inputs = small(name)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4:
                p.copy_((p + p.mT) / 2)
    size = inputs["x"].shape[-1]
    tall = torch.randn(3, 1, 2 * size, size)
    out = net(**inputs | {"x": tall})
    assert out.shape == tall.shape
    torch.testing.assert_close(net(**inputs | {"x": tall.mT}), out.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [UViT, DiT])
def test_tokens_of_oblong_images(cls):
    """With filters symmetric about the diagonal and the positions transposed, a transposed image gives the
    transposed output."""
    torch.manual_seed(0)
    tall, broad = (cls(size, 1, 2, 16, 2, 2) for size in ([12, 8], [8, 12]))
    state = {key: torch.randn_like(value) * 0.3 for key, value in tall.state_dict().items()}
    state["stem.weight"] = (state["stem.weight"] + state["stem.weight"].mT) / 2
    for key in ("head.weight", "head.bias"):  # the rows of a patch are its pixels, row by row
        pixels = state[key].unflatten(0, (2, 2))
        state[key] = (pixels + pixels.transpose(0, 1)).flatten(0, 1) / 2
    if cls is UViT:
        state["smooth.weight"] = (state["smooth.weight"] + state["smooth.weight"].mT) / 2
    tall.load_state_dict(state)
    extras = state["positions"].shape[1] - 24
    turned = state["positions"][:, extras:].unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)
    state["positions"] = torch.cat([state["positions"][:, :extras], turned], 1)
    broad.load_state_dict(state)
    x, c = torch.randn(2, 1, 12, 8), torch.ones(2)
    torch.testing.assert_close(broad(x.mT, c), tall(x, c).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [NCSNpp, DDPM, ADM, EDM2, NCSN, NCSNv2])
def test_attention_levels_are_told_by_the_height(cls):
    """The network of an oblong size is that of a square of its height."""
    options = {} if cls in (NCSN, NCSNv2) else {"channel_mult": (1, 1), "num_blocks": 1}
    options |= {"attention_resolutions": (6,)} if options else {}
    torch.manual_seed(0)
    oblong = cls([12, 8], 2, 8, **options).eval()
    square = cls(12, 2, 8, **options).eval()
    square.load_state_dict(oblong.state_dict())
    x, c = torch.randn(2, 2, 12, 8), torch.ones(2)
    assert torch.equal(oblong(x, c), square(x, c))
    assert set(cls([8, 12], 2, 8, **options).state_dict()) < set(square.state_dict()) or not options


@pytest.mark.parametrize("base", [1, 6, 10])
def test_odd_channel_counts_train(base):
    """Every parameter of a network of few, uneven channels gets a gradient, attention below 64 channels
    included.
    """
    torch.manual_seed(0)
    for cls in (NCSNpp, DDPM, ADM):
        net = cls(6, 2, base, (1, 3), num_blocks=1, attention_resolutions=(3, 6), dropout=0.0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.5)
        net(torch.randn(2, 2, 6, 6), torch.rand(2)).square().sum().backward()
        assert any("attention.qkv" in n for n, _ in net.named_parameters())
        missing = [n for n, p in net.named_parameters() if p.grad is None]
        assert not missing


def test_ncsn_conditions_on_the_nearest_level_and_ncsnv2_on_none():
    net, inputs = small("ncsn")

    def at(level):
        return net(inputs["x"], torch.full((3,), level))

    assert torch.equal(at(3.4), at(3.0)) and torch.equal(at(99.0), at(9.0))
    assert not torch.allclose(at(3.0), at(4.0))
    net, inputs = small("ncsnv2")
    assert torch.equal(net(inputs["x"], torch.zeros(3)), net(inputs["x"], torch.ones(3)))


def test_an_unconditional_network_ignores_the_noise_label():
    torch.manual_seed(0)
    net = NCSNpp(8, 1, 16, (1, 2), 1, conditional=False).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, torch.zeros(2)), net(x, torch.ones(2)))
    with pytest.raises(ConfigError, match="num_classes=0"):
        net(x, torch.zeros(2), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"num_classes=3: give conditional=True"):
        NCSNpp(8, conditional=False, num_classes=3)


def test_input_pyramids_see_the_shrunk_image():
    """Level by level, with an identity for the convolution: "cat" puts the image before h, "strided" takes
    every second pixel."""
    resample, h = Resample((1, 3, 3, 1)), torch.randn(1, 3, 4, 4)
    image = torch.randn(1, 3, 8, 8)
    cat, strided = (_PYRAMIDS[k](3, 3, resample, False) for k in ("cat", "strided"))
    for layer in (cat, strided):
        torch.nn.init.dirac_(layer.conv.weight)
    out, smaller = cat(h, image)
    torch.testing.assert_close(out, torch.cat([resample.down(image), h], 1))
    torch.testing.assert_close(smaller, resample.down(image))
    torch.testing.assert_close(strided(h, image)[0], h + image[:, :, 1::2, 1::2])


def test_learned_variances_double_the_output():
    net = NCSNpp(8, 3, 16, (1, 2), 1, out_channels=6)
    assert net(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 6, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_close(name):
    net, inputs = small(name)
    expected = net(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(**inputs)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiles_without_graph_breaks(name):
    net, inputs = small(name)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), net(**inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["ncsnpp", "ddpm", "adm", "edm2", "ncsnv2", "uvit", "dit", pytest.param("ncsn", marks=pytest.mark.slow)],
)
def test_traces_as_one_graph(name):
    """As torch.compile does it before generating code: a graph break or a look at a tensor's value would
    raise.
    """
    net, inputs = small(name)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs), net(**inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_forward_derivatives(name):
    """The directional derivative of every input at once, against a central difference in float64."""
    net, inputs = small(name)
    net.double()
    at, toward = ([v.double() for v in pair] for pair in zip(*directions(inputs), strict=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x, c: net(x, c, inputs["label"]), tuple(at), tuple(toward))
    near = [[a + h * d for a, d in zip(at, toward, strict=True)] for h in (1e-5, -1e-5)]
    after, before = (net(*place, inputs["label"]) for place in near)
    torch.testing.assert_close(tangent, (after - before) / 2e-5, rtol=1e-6, atol=1e-8)


def directions(inputs):
    torch.manual_seed(1)
    return [(inputs[key], torch.randn_like(inputs[key])) for key in ("x", "noise_label")]


def test_transformers_start_as_published():
    """U-ViT: nothing at zero but biases. DiT: each block changes nothing, and the output is zero."""
    torch.manual_seed(0)
    uvit, dit = UViT(8, 3, 2, 64, 4, 4, num_classes=50), DiT(8, 3, 2, 64, 2, 4, num_classes=50)
    x, c, label = torch.randn(2, 3, 8, 8), torch.ones(2), torch.tensor([0, -1])
    assert torch.equal(dit(x, c, label), torch.zeros_like(x))
    assert torch.equal(dit.blocks[0](torch.ones(1, 16, 64), torch.ones(1, 64)), torch.ones(1, 16, 64))
    stds = {"encoder.0.attention.qkv.weight": 0.02, "head.weight": 0.02, "positions": 0.02, "label.weight": 1}
    for name, std in stds.items():
        assert uvit.state_dict()[name].std().item() == pytest.approx(std, rel=0.05), name
    for name, std in {"label.weight": 0.02, "time.0.weight": 0.02, "time.2.weight": 0.02}.items():
        assert dit.state_dict()[name].std().item() == pytest.approx(std, rel=0.05), name
    for layer, fans in ((dit.blocks[0].attention.qkv, 64 + 192), (dit.stem, 12 + 64)):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
    biases = [p for name, p in [*uvit.named_parameters(), *dit.named_parameters()] if name.endswith("bias")]
    assert sum(bool(p.any()) for p in biases) == 2  # those of U-ViT's two convolutions, torch's own start
    assert not [name for name, p in uvit.named_parameters() if p.ndim > 1 and not p.any()]


def test_sinusoids_of_transformers():
    waves = sinusoids(torch.tensor([0.0, 3.0], dtype=torch.float64), 9)
    for i in range(4):
        assert waves[1, i].item() == pytest.approx(math.cos(3 * 10000 ** (-i / 4)), abs=1e-15)
        assert waves[1, 4 + i].item() == pytest.approx(math.sin(3 * 10000 ** (-i / 4)), abs=1e-15)
    assert waves[0].tolist() == [1] * 4 + [0] * 5 and waves[1, 8] == 0


@pytest.mark.parametrize("cls", [UViT, DiT])
def test_sizes_that_are_no_patches(cls):
    with pytest.raises(ConfigError, match=r"image_size=\[9, 8\] cannot be cut into patches of patch_size=2"):
        cls([9, 8])
    for name, size in (("depth", 0), ("width", 0), ("mlp_ratio", -1.0), ("channels", 0)):
        with pytest.raises(ConfigError, match=f"{name}={size}: must be above 0"):
            cls(8, **{name: size})
    with pytest.raises(ConfigError, match="width=64 cannot be shared out over heads=5"):
        cls(8, 1, 2, 64, 2, 5)
    net = cls(8, 1, 2, 16, 2, 2)
    with pytest.raises(ConfigError, match=r"takes \(B, 1, 8, 8\)"):
        net(torch.zeros(1, 1, 16, 8), torch.zeros(1))
    with pytest.raises(ConfigError, match="num_classes=0"):
        net(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1]))


def test_second_derivatives_for_sliced_score_matching():
    net, inputs = small("ncsnpp")
    x = inputs["x"].requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = net(x, inputs["noise_label"])
        (first,) = torch.autograd.grad((out * torch.ones_like(out)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), net.stem.weight)
    assert second.abs().max() > 0


@pytest.mark.parametrize(
    ("cls", "options"),
    [(NCSNpp, {}), (NCSNpp, PX256 | {"channel_mult": (1, 1)}), (DDPM, {}), (ADM, {}), (EDM2, {})],
)
def test_patches_are_channels(cls, options):
    """A network of squares of 2 x 2 pixels is that of images half as large with 4 times the channels."""
    options = {"channel_mult": (1, 1), "num_blocks": 1} | options
    torch.manual_seed(0)
    net = cls((8, 12), 2, 8, patch=2, condition_channels=1, **options).eval()
    plain = cls((4, 6), 8, 8, condition_channels=7, **options).eval()  # 7 and 1 that say where they are known
    for parameter in net.parameters():  # what begins at zero would hide what is before it
        torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(net.state_dict())
    x, image, noise = torch.randn(3, 2, 8, 12), torch.randn(3, 1, 8, 12), torch.rand(3)
    told = F.pixel_unshuffle(torch.cat([x, image, torch.ones_like(image)], 1), 2)
    expected = F.pixel_shuffle(plain(told[:, :8], noise, image=told[:, 8:15]), 2)
    torch.testing.assert_close(net(x, noise, image=image), expected)
    with pytest.raises(ConfigError, match=r"image_size=.8, 10. cannot be cut into squares of 2 and halved 1"):
        cls((8, 10), 2, 8, patch=2, **options)


# Errors that name the remedy


@pytest.mark.parametrize("cls", [NCSNpp, DDPM, ADM, EDM2])
def test_sizes_that_cannot_be_halved(cls):
    with pytest.raises(
        ConfigError, match=r"image_size=28 cannot be halved 3 times: .* of 8 \(e.g. 24 or 32\)"
    ):
        cls(28)
    with pytest.raises(ConfigError, match="channel_mult is empty"):
        cls(8, channel_mult=[])
    with pytest.raises(ConfigError, match="image_size=4 cannot be halved 3 times"):
        cls(4)
    with pytest.raises(ConfigError, match=r"image_size=\[48, 50\] .* \(e.g. \[48, 48\] or \[48, 56\]\)"):
        cls([48, 50])
    net = cls(8, 1, 8, (1, 1), num_blocks=1)
    with pytest.raises(ConfigError, match="7x8 pixels cannot be halved 1 times"):
        net(torch.zeros(1, 1, 7, 8), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"takes \(B, 1, H, W\)"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_labels_that_do_not_fit():
    net = NCSNpp(8, 1, 8, (1, 1), 1)
    x, c = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    with pytest.raises(ConfigError, match="num_classes=0"):
        net(x, c, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="augment_dim=0"):
        net(x, c, None, torch.zeros(2, 9))
    net = NCSNpp(8, 1, 8, (1, 1), 1, num_classes=4, augment_dim=9)
    with pytest.raises(ConfigError, match=r"label of shape \(2, 3\): give \(2, 4\)"):
        net(x, c, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"label of shape \(3,\)"):
        net(x, c, torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match=r"augment_label of shape \(2, 3\)"):
        net(x, c, None, torch.zeros(2, 3))


def test_unknown_options():
    with pytest.raises(ConfigError, match="embedding='fouier' is not known: take one of positional, fourier"):
        NCSNpp(32, embedding="fouier")
    with pytest.raises(ConfigError, match="activation='swish' is not known: take one of silu, elu, relu"):
        DDPM(32, activation="swish")
    with pytest.raises(ConfigError, match="block='resnet'"):
        NCSNpp(32, block="resnet")
    with pytest.raises(ConfigError, match="input_pyramid='sum'"):
        NCSNpp(32, input_pyramid="sum")
    with pytest.raises(ConfigError, match=r"fir=\(1, 2, 1\) cannot resample by 2"):
        NCSNpp(32, fir=(1, 2, 1))
    with pytest.raises(ConfigError, match="depth=3 of NCSNv2"):
        NCSNv2(32, depth=3)
    with pytest.raises(ConfigError, match="image_size=15"):
        NCSN(15)


@pytest.mark.parametrize("fir", [(1, 1), (1, 3, 3, 1)])
def test_activations_lie_in_memory_as_the_weights_do(fir):
    """Whichever way the weights lie: 3x3 convolutions convert nothing, and the output is the same."""
    torch.manual_seed(0)
    net = NCSNpp(8, base_channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), fir=fir)
    x, noise_label, outputs = torch.randn(2, 3, 8, 8), torch.rand(2), []
    for layout in (torch.contiguous_format, torch.channels_last):
        net.eval().to(memory_format=layout)
        seen = []
        hooks = [
            m.register_forward_pre_hook(
                lambda _, given, layout=layout, seen=seen: seen.append(
                    given[0].is_contiguous(memory_format=layout)
                )
            )
            for m in net.modules()
            if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
        ]
        outputs.append(net(x, noise_label))
        assert len(seen) == len(hooks) and all(seen)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(*outputs)

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_gen.errors import ConfigError
from lit_gen.funit.networks import (
    ActFirstResBlock,
    ContentConditionedGenerator,
    FewShotGenerator,
    PatchDiscriminator,
    UpsampleConv,
    adain,
)

SMALL = {"width": 4, "code_size": 6, "content_downs": 2, "class_downs": 3, "mlp_width": 8}


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def generator() -> FewShotGenerator:
    torch.manual_seed(0)
    return FewShotGenerator(**SMALL).double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_official_sizes():
    """The official animal-faces configuration, counted part by part."""
    with torch.device("meta"):
        generator, discriminator = FewShotGenerator(), PatchDiscriminator(num_classes=119)
    parts = {name: count(part) for name, part in generator.named_children()}
    assert parts == {
        "class_encoder": 2_779_328,
        "content_encoder": 12_202_112,
        "decoder": 13_749_891,
        "mlp": 1_135_104,
    }
    assert count(generator) == 29_866_435
    assert count(discriminator) == 54_252_599
    assert count(discriminator.head) == 121_975
    image = torch.empty(2, 3, 128, 128, device="meta")
    assert generator.content_code(image).shape == (2, 512, 16, 16)
    assert generator.class_code(image).shape == (2, 64)
    logits, features = discriminator(image, torch.empty(2, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 8, 8) and features.shape == (2, 1024, 8, 8)


def test_initial_weights():
    """Kaiming's variance 2 / fan_in, biases zero."""
    torch.manual_seed(0)
    layer = FewShotGenerator(width=32).content_encoder.blocks[0].conv0
    fan_in = layer.weight[0].numel()
    assert layer.weight.var().item() == pytest.approx(2 / fan_in, rel=0.02)
    assert not layer.bias.any()


def test_adain_sets_the_moments():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 5 + 2
    bias, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y = adain(x, bias, weight)
    shrunk = (x.var((2, 3), correction=0) / (x.var((2, 3), correction=0) + 1e-5)).sqrt()
    torch.testing.assert_close(y.mean((2, 3)), bias)
    torch.testing.assert_close(y.std((2, 3), correction=0), weight.abs() * shrunk)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (7, 3), (8, 8)])
def test_upsampling_convolution_is_enlarging_then_convolving(size):
    """Values and gradients, borders included."""
    torch.manual_seed(0)
    layer = UpsampleConv(3, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    enlarged = F.pad(F.interpolate(x, scale_factor=2), (2, 2, 2, 2), mode="reflect")
    expected, actual = F.conv2d(enlarged, layer.weight, layer.bias), layer(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    for a, e in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_shortcuts_of_the_activation_first_block():
    """Identity shortcut: activated input; learned shortcut: raw input. And the input is left alone."""
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    for c_out in (4, 6):
        block = ActFirstResBlock(4, c_out)
        a = F.leaky_relu(x, 0.2)
        residual = block.conv1(F.leaky_relu(block.conv0(a), 0.2))
        shortcut = a if c_out == 4 else block.shortcut(x)
        torch.testing.assert_close(block(x), shortcut + residual)
    assert torch.equal(x, before)


def test_content_code_forgets_brightness_and_contrast(generator, images):
    """What instance normalisation is there for: an affine change of each colour moves the code by rounding
    and eps only."""
    gray = images * 0.3
    a, b = generator.content_code(gray * 1000), generator.content_code(gray * 3000 + 7)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_k_shot_code_is_the_mean(generator, images):
    codes = torch.stack([generator.class_code(image[None])[0] for image in images])
    torch.testing.assert_close(generator.class_code(images[None])[0], codes.mean(0))
    torch.testing.assert_close(generator.class_code(images.flip(0)[None])[0], codes.mean(0))
    torch.testing.assert_close(generator.class_code(images[:, None]), codes)


@pytest.fixture
def conditioned() -> ContentConditionedGenerator:
    """Its content attention differs from the initial 1."""
    torch.manual_seed(0)
    generator = ContentConditionedGenerator(**SMALL, style_bias=5, adain_ups=True).double()
    torch.nn.init.normal_(generator.content_style[-1].weight)
    return generator


def test_the_style_is_the_papers(conditioned, images):
    """zeta_c * zeta_s, written out; the decoder gets it in the place of the class code."""
    content, code = conditioned.content_code(images), conditioned.class_code(images)
    weights = {name: p.detach().numpy() for name, p in conditioned.named_parameters()}
    mean = content.detach().numpy().mean((2, 3))
    hidden = np.maximum(mean @ weights["content_style.0.weight"].T + weights["content_style.0.bias"], 0)
    zeta_c = hidden @ weights["content_style.2.weight"].T + weights["content_style.2.bias"]
    told = np.concatenate([code.detach().numpy(), np.tile(weights["style_bias"], (3, 1))], 1)
    style = zeta_c * (told @ weights["style.weight"].T + weights["style.bias"])
    torch.testing.assert_close(conditioned.conditioned(content, code), torch.from_numpy(style))
    expected = conditioned.decoder(content, conditioned.mlp(torch.from_numpy(style)))
    torch.testing.assert_close(conditioned.decode(content, code), expected)


def test_the_mean_of_codes_is_the_mean_of_styles(conditioned, images):
    """So K images and interpolations mean what they do in FUNIT, whatever the content."""
    content = conditioned.content_code(images)
    codes = [conditioned.class_code(image.expand_as(images)) for image in images]
    styles = torch.stack([conditioned.conditioned(content, code) for code in codes])
    mean = conditioned.class_code(images.expand(3, *images.shape))
    torch.testing.assert_close(conditioned.conditioned(content, mean), styles.mean(0))


def test_without_attention_it_is_funit(generator, images):
    """With zeta_c = 1 and zeta_s = s, the same weights translate bit for bit as FUNIT's."""
    conditioned = ContentConditionedGenerator(**SMALL, style_bias=5).double()
    conditioned.load_state_dict(generator.state_dict(), strict=False)
    with torch.no_grad():
        conditioned.style.weight.copy_(torch.eye(6, 11))
    assert torch.equal(conditioned(images, images[:, None]), generator(images, images[:, None]))


def test_enlargements_take_the_last_parameters(generator, images):
    """Scale 1 and shift 0 are instance normalization, for which AdaIN stands in."""
    wide = FewShotGenerator(**SMALL, adain_ups=True).double()
    plain, more = generator.decoder.num_params, wide.decoder.num_params
    assert more - plain == 2 * (8 + 4)  # scale and shift of both enlargements
    weights = {k: v for k, v in generator.state_dict().items() if not k.startswith("mlp")}
    wide.load_state_dict(weights, strict=False)
    content, params = generator.content_code(images), torch.randn(3, plain, dtype=torch.float64)
    neutral = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(n) for n in (8, 4)])
    padded = torch.cat([params, neutral.expand(3, -1)], 1)
    torch.testing.assert_close(wide.decoder(content, padded), generator.decoder(content, params))


def test_batch_rows_are_independent(generator, images):
    """Row i of a batch of translations is the translation of row i."""
    together = generator(images, images.flip(0))
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], generator(images[i : i + 1], images.flip(0)[i : i + 1])
        )


def test_no_state_between_calls(generator, images):
    """AdaIN's parameters are arguments: a copy after a training pass works, and threads do not disturb each
    other."""
    generator(images, images.flip(0)).sum().backward()
    twin = copy.deepcopy(generator)
    expected = [generator(images, images[[i, i, i]]) for i in range(3)]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = twin(images, images[[i, i, i]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(3))


def test_discriminator_reads_the_labelled_class():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(num_classes=5, width=4, num_res_blocks=4)
    x, label = torch.randn(3, 3, 16, 16), torch.tensor([4, 0, 2])
    logits, features = discriminator(x, label)
    every_class = discriminator.head(features)
    assert all(torch.equal(logits[i], every_class[i, label[i]]) for i in range(3))


def test_sizes_that_networks_take(generator, images):
    """Any content size that halves evenly; any class size that is large enough, odd ones too."""
    wide = F.interpolate(images, size=(12, 20))
    odd = F.interpolate(images, size=(9, 13))
    assert generator(wide, odd).shape == wide.shape
    flat = FewShotGenerator(**SMALL | {"content_downs": 0}).double()
    assert flat(odd, wide).shape == odd.shape and flat.content_code(odd).shape == (3, 4, 9, 13)
    discriminator = PatchDiscriminator(2, width=4, num_res_blocks=6).double()
    assert discriminator(odd[..., :5, :5], torch.tensor([0, 1, 0]))[0].shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, x: g.content_code(x[..., :15]), r"16 x 15 pixels.*multiples of 4, at least 8: resize"),
        (lambda g, x: g.content_code(x[..., :4, :4]), r"4 x 4 pixels.*at least 8"),
        (lambda g, x: g.class_code(x[..., :7, :]), r"7 x 16 pixels.*at least 8"),
        (lambda g, x: g.class_code(x[:, None][:, :0]), r"\(3, 0, 3, 16, 16\).*K >= 1"),
        (lambda g, x: g.class_code(x[0]), r"\(3, 16, 16\).*K >= 1"),
        (lambda g, x: FewShotGenerator(class_downs=0), "class_downs=0"),
        (lambda g, x: FewShotGenerator(content_downs=-1), "content_downs=-1.*at least 0"),
        (lambda g, x: PatchDiscriminator(2, num_res_blocks=3), "num_res_blocks=3.*even"),
        (lambda g, x: PatchDiscriminator(0), "num_classes=0"),
        (
            lambda g, x: PatchDiscriminator(2, width=2).features(x.float()),
            "5 stages needs 17 x 17 pixels or more, got 16 x 16",
        ),
    ],
)
def test_refuses_with_value_and_remedy(generator, images, call, message):
    with pytest.raises(ConfigError, match=message):
        call(generator, images)


@pytest.mark.parametrize("which", ["generator", "conditioned", "discriminator"])
def test_compiles_as_one_graph(which):
    """No graph break, and the same numbers; the backend that runs the captured graph as it is makes this
    cheap."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    if which != "discriminator":
        kinds = {"generator": FewShotGenerator, "conditioned": ContentConditionedGenerator}
        network, arguments = kinds[which](**SMALL), (x, x.flip(0)[:, None])
    else:
        network, arguments = PatchDiscriminator(3, width=4, num_res_blocks=4), (x, torch.tensor([0, 2]))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments))


def test_bfloat16_autocast_stays_close(images):
    """Within the rounding of 8 bits, images and gradients of both networks."""
    torch.manual_seed(0)
    generator, x = FewShotGenerator(**SMALL), images.float()
    discriminator = PatchDiscriminator(3, width=4, num_res_blocks=4)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        translated = generator(x, x.flip(0))
        logits, _ = discriminator(translated, torch.tensor([0, 1, 2]))
        gradient = torch.autograd.grad(logits.float().mean(), generator.decoder.out.weight)[0]
        return translated.float(), gradient

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run()
    assert (rounded[0] - exact[0]).abs().mean() < 0.02
    assert F.cosine_similarity(rounded[1].flatten(), exact[1].flatten(), dim=0) > 0.98

"""Translation by a score model: codes, guidance, what training is told, resuming."""

import lightning.pytorch as pl
import pytest
import torch

from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.glyphs import Glyphs
from lit_gen.errors import ConfigError
from lit_gen.funit import translator
from lit_gen.models import classifier_free
from lit_gen.score.losses import LogNormal, Mixture
from lit_gen.score.networks.styled import StyledUNet
from lit_gen.score.sde import EDM


@pytest.fixture
def module(compose):
    from lit_gen.instantiate import instantiate

    torch.manual_seed(0)
    cfg = compose(*OPTIONS)
    module = instantiate(cfg.model).eval()
    for parameter in module.parameters():  # nothing is zero, as at the start
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module


OPTIONS = (
    "experiment=glyphs_diffusion",
    "data.image_size=16",
    "model.net={width: 32, outer_width: 16, num_blocks: 2, code_size: 8, encoder_width: 8, emb_width: 32}",
    "sampler.num_steps=3",
)
CONTENT = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
CLASSES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_the_code_of_a_class_is_the_mean_of_its_images_codes(module):
    code = module.class_code(CLASSES)
    each = module.class_code(CLASSES[:, None])
    torch.testing.assert_close(code, each.mean(0))
    torch.testing.assert_close(code, module.class_code(CLASSES.flip(0)))
    images = module.translate(CONTENT, CLASSES)
    assert torch.equal(images, module.translate(CONTENT, code))
    assert torch.equal(images, translator.translate(module, CONTENT, code))
    assert images.dtype == torch.uint8 and images.shape == CONTENT.shape
    assert not torch.equal(images, module.translate(CONTENT, 3 * code))
    with pytest.raises(ConfigError, match="adapt=0"):
        translator.adapted_code(module, CLASSES, steps=1)
    with pytest.raises(ConfigError, match="trainer=ddp"):
        module.sharded_networks()


def test_guidance_of_weight_1_is_no_guidance(module):
    """And that of weight 0 is the model without a style."""
    plain = module.translate(CONTENT, CLASSES)
    nothing = module.translate(CONTENT, torch.full((8,), torch.nan))
    denoiser = module.denoiser
    for weight, expected in ((1.0, plain), (0.0, nothing)):
        module.denoiser = classifier_free(module, weight, parts=["vector"])
        assert torch.equal(module.translate(CONTENT, CLASSES), expected)
        module.denoiser = denoiser
    assert not torch.equal(plain, nothing)


def test_a_dropped_style_teaches_the_encoder_nothing(module):
    net, x = module.network, torch.randn(2, 1, 16, 16)
    images = torch.stack([CLASSES[:2], CLASSES[2:]]).requires_grad_()
    code = net.style_code(images)
    code = code.where(torch.tensor([[True], [False]]), torch.nan)
    net(x, torch.zeros(2), vector=code, image=CONTENT[:2]).square().sum().backward()
    assert images.grad[0].abs().max() > 0 and not images.grad[1].any()
    with torch.no_grad():
        dropped = net(x, torch.zeros(2), vector=code, image=CONTENT[:2])[1]
        torch.testing.assert_close(dropped, net(x, torch.zeros(2), image=CONTENT[:2])[1])
    with pytest.raises(ConfigError, match="content image of shape None"):
        net(x, torch.zeros(2))
    with pytest.raises(ConfigError, match="multiples of 8"):
        StyledUNet(20)


def test_the_content_is_placed_by_an_affine_map():
    """At first the identity; a shift by a quarter of the image moves it by as many pixels."""
    net, code = StyledUNet(16), torch.zeros(3, 128)
    torch.testing.assert_close(net.warped(CONTENT, code), CONTENT)
    net.map.bias.data[2] = 0.5
    torch.testing.assert_close(net.warped(CONTENT, code)[..., :12], CONTENT[..., 4:])


def test_the_blur_of_the_content_has_its_variance():
    spot = torch.zeros(1, 1, 32, 32)
    spot[..., 16, 16] = 1.0
    blurred = StyledUNet(32, content_blur=2.0).blurred(spot)
    place = torch.arange(32.0) - 16
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert (blurred[0, 0].sum(0) * place**2).sum() == pytest.approx(4, rel=0.06)  # cut at three deviations
    assert torch.equal(StyledUNet(32).blurred(spot), spot)


def test_a_mixture_draws_from_each_of_its_parts():
    x_0, process = torch.zeros(1000, 1), EDM()
    t = Mixture([LogNormal(-1.0, 0.0), LogNormal(2.0, 0.0)])(process, x_0, torch.Generator().manual_seed(0))
    high = t > 1
    torch.testing.assert_close(t, torch.where(high, 2.0, -1.0).double().exp())
    assert 430 < high.sum() < 570  # deviation 15.8


def test_a_resumed_training_ends_bit_equal(compose, tmp_path):
    """Style images, views, noise and dropped styles are keyed by (seed, step)."""
    whole, half, resumed = (
        run(compose, tmp_path / name, steps) for name, steps in (("a", 4), ("b", 2), ("b", 4))
    )
    assert not same(whole, half)
    assert same(whole, resumed)


def run(compose, folder, steps):
    from lit_gen.instantiate import instantiate

    cfg = compose(*OPTIONS)
    torch.manual_seed(0)
    module = instantiate(cfg.model)
    data = FewShotDataModule(
        Glyphs(16, characters="abcdef", classes=list(FACES)),
        1,
        batch_size=4,
        style_images=3,
        num_workers=0,
        content_augment=instantiate(cfg.data.content_augment),
        image_size=16,
        channels=1,
        num_classes=3,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=False)
    trainer.save_checkpoint(last)
    return module.state_dict()


FACES = ("DejaVuSans", "DejaVuSans-Bold", "cmr10", "cmtt10")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)

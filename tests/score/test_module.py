"""ScoreModule's options, trained for a few steps."""

from functools import partial

import pytest
import torch

from lit_gen import checkpoints, runs
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.score import samplers

LABELLED = ("trainer.max_steps=3", "model.net.augment_dim=9")


def weights(folder):
    return checkpoints.read(checkpoints.folder(folder) / "last.ckpt")["state_dict"]


def test_augmentation_of_probability_zero_changes_nothing(fit, tmp_path):
    """Its draws come from a stream of their own; the network is told what was done to an image."""
    for name, options in {
        "none": (),
        "never": ("model/augment=edm", "model.augment.p=0"),
        "always": ("model/augment=edm", "model.augment.p=1"),
    }.items():
        fit(tmp_path / name, *LABELLED, "~callbacks.quality", *options)
    none, never, always = (
        runs.history(tmp_path / name)["train/loss"] for name in ("none", "never", "always")
    )
    assert never == pytest.approx(none, rel=1e-4)  # images pass through the filters of the identity
    assert always[1] != pytest.approx(none[1], rel=1e-3)
    label = "denoiser.net.noise.augment.weight"
    assert torch.equal(weights(tmp_path / "never")[label], weights(tmp_path / "none")[label])
    assert not torch.equal(weights(tmp_path / "always")[label], weights(tmp_path / "none")[label])


@pytest.mark.parametrize("loss", ["edm2", "sliced", "likelihood", "min_snr"])
def test_the_loss_of_an_image_does_not_depend_on_its_batch(fit, tmp_path, loss):
    experiment = "digits_vp" if loss in ("likelihood", "min_snr") else "digits_edm"
    options = [f"experiment={experiment}", f"model/loss={loss}", "trainer.max_steps=2"]
    module = fit(tmp_path, *options).module.eval()
    torch.manual_seed(0)
    batch = {
        "image": torch.rand(3, 1, 8, 8) * 2 - 1,
        "label": torch.tensor([3, 1, 4]),
        "index": torch.tensor([5, 9, 2]),
    }
    whole = module.validation_loss(batch)
    assert whole.shape == (3,) and whole.isfinite().all()
    for i in range(3):
        alone = module.validation_loss({k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_the_uncertainty_is_trained_and_saved(fit, tmp_path):
    fit(tmp_path, "experiment=digits_edm", "model/loss=edm2", "trainer.max_steps=3")
    assert weights(tmp_path)["loss.out"].abs().max() > 0  # it starts at zero


def test_no_indices_give_no_images(fit, tmp_path):
    module = fit(tmp_path, "trainer.max_steps=1").module
    assert module.num_classes == 10
    for images, shape in ((module.sample([]), (0, 1, 8, 8)), (module.sample_trajectory([]), (0, 1, 1, 8, 8))):
        assert images.shape == shape and images.dtype == torch.uint8


def test_dropped_labels_are_rows_of_zeros(fit, tmp_path):
    module = fit(tmp_path, "trainer.max_steps=1", "model.label_dropout=0.2").module
    label = torch.arange(10).repeat(1000)
    rows = module._labels({"label": label, "image": torch.zeros(1)})
    kept = rows.sum(1) == 1
    assert rows.sum(1).unique().tolist() == [0, 1]
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(rows[kept].argmax(1), label[kept])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consistency", "gives nan on Flow with t_max=1"),
        ("predictor_corrector", "reach 1, where nothing is left of the image"),
    ],
)
def test_a_sampler_that_divides_by_the_image_needs_one(compose, name, message):
    """At t = 1 of the rectified flow nothing is left of it."""
    module = instantiate(compose("experiment=digits_flow", "model.process.t_max=1").model)
    with pytest.raises(ConfigError, match=message):
        module.check(partial(getattr(samplers, name), num_steps=4))


def test_a_precondition_that_is_not_defined_where_sampling_starts_is_refused(compose):
    module = instantiate(
        compose("experiment=digits_edm", "model/process=flow", "model.process.t_max=1").model
    )
    with pytest.raises(ConfigError, match="EDMPrecondition on Flow is not defined at t=1"):
        module.check(partial(samplers.probability_flow, num_steps=4))

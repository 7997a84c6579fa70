"""Guidance at the command line, and the classifier of noisy images that guides."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lit_gen import models, runs
from lit_gen.config.experiment import build
from lit_gen.errors import ConfigError
from lit_gen.models import open_model
from lit_gen.score.guidance import classifier_free_guidance
from lit_gen.score.sde import VP

SHORT = ("~callbacks.quality", "~callbacks.grid", "callbacks.checkpoint.every=20")
OTHER = ("other", "experiment=digits_vp")  # another process, no classes
INDICES = range(6)


def checkpoint(folder: Path) -> Path:
    return next(folder.rglob("last.ckpt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guiding")


@pytest.fixture
def trained(fit, folder):
    """`trained(name, *overrides) -> checkpoint` of a tiny run, trained once."""

    def make(name: str, *overrides: str) -> Path:
        if not (folder / name).exists():
            fit(folder / name, *SHORT, *overrides)
        return checkpoint(folder / name)

    return make


@pytest.fixture
def judge(compose, folder):
    """A checkpoint of a tiny classifier, and what it logged."""
    from lit_gen.commands import train as training

    path = folder / "judge"
    if not path.exists():
        path.mkdir()
        tiny = ["model.net.base_channels=8", "trainer.max_steps=120", "data.batch_size=64", "log_every=20"]
        tiny += ["callbacks.validation.every=40", "callbacks.checkpoint.every=120", "callbacks.ema.decay=0.9"]
        logger = ["logger=csv", f"logger.csv.save_dir={path}", "trainer=cpu"]
        training._quiet()
        cfg = compose("experiment=digits_noisy_classifier", *tiny, *logger)
        experiment = build(cfg, path)
        experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    return checkpoint(path)


@pytest.fixture
def samples(compose):
    """`samples(run, *overrides)`: six images of a checkpoint, as the entry point opens it."""

    def draw(run: Path, *overrides: str):
        cfg = compose(f"run={run}", "device=cpu", *overrides, config_name="sample")
        return open_model(cfg)[0].sample(INDICES, seed=3)

    return draw


def test_classifier_free(trained, samples):
    """Weight 1 changes nothing, another weight does what `classifier_free_guidance` does."""
    run = trained("dropped", "model.label_dropout=0.5")
    plain = samples(run)
    assert torch.equal(samples(run, "guidance=classifier_free", "guidance.weight=1"), plain)
    guided = samples(run, "guidance=classifier_free", "guidance.weight=40")
    assert not torch.equal(guided, plain)
    module = models.load(run, device="cpu")[0]
    module.denoiser = classifier_free_guidance(module.denoiser, 40.0)
    assert torch.equal(module.sample(INDICES, seed=3), guided)
    nowhere = ("guidance.weight=40", "guidance.interval=[1000,2000]")
    assert torch.equal(samples(run, "guidance=classifier_free", *nowhere), plain)


def test_autoguidance(trained, samples):
    """By itself a model is guided nowhere; by another process's model it is, and by one without classes."""
    run = trained("dropped", "model.label_dropout=0.5")
    plain = samples(run)
    by_itself = samples(run, "guidance=auto", f"guidance.run={run}", "guidance.weight=3")
    assert (by_itself.int() - plain.int()).abs().max() <= 1  # rounding
    other = trained(*OTHER)
    assert not torch.equal(
        samples(run, "guidance=auto", f"guidance.run={other}", "guidance.weight=30"), plain
    )


def test_classifier_guidance(trained, judge, samples, compose):
    """Of an unconditional model: weight 0 changes nothing, a large one makes the classes asked for."""
    run = trained(*OTHER)
    plain, by_judge = samples(run), ("guidance=classifier", f"guidance.run={judge}")
    assert torch.equal(samples(run, *by_judge, "guidance.weight=0"), plain)
    guided = samples(run, *by_judge, "guidance.weight=30", "sampler=heun", "sampler.num_steps=8")
    classify = models.load(judge, device="cpu")[0]
    t = torch.full((len(guided),), 0.05)

    def likely(images):
        log_p = classify(images.double() / 127.5 - 1, t).log_softmax(1)
        return log_p[torch.arange(len(images)), torch.arange(len(images)) % 10].mean()

    assert likely(guided) > likely(plain)


def test_the_classifier_learns_and_reads_other_processes(judge):
    logged = runs.history(judge.parent.parent)["val/loss"]
    assert logged[120] < logged[40] < math.log(10)
    classify = models.load(judge, device="cpu")[0]
    x_0, z = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    levels, vp = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), VP()
    own = classify(classify.process.marginal(x_0, levels, z), levels)
    t = vp.time(levels)
    assert_close(classify.on(vp)(vp.marginal(x_0, t, z), t), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("which", "options", "says"),
    [
        ("plain", ["guidance=classifier_free"], "model.label_dropout=0.1"),
        ("other", ["guidance=classifier_free"], "no class"),
        ("plain", ["guidance=auto", "guidance.run={judge}"], "it is no score model"),
        ("plain", ["guidance=classifier", "guidance.run={plain}"], "no classifier of noisy images"),
        ("plain", ["guidance=auto", "guidance.run={plain}", "guidance.interval=[3,1]"], "interval"),
        ("judge", ["guidance=classifier_free"], "not for ClassifierModule"),
    ],
)
def test_what_cannot_be_guided_is_refused(trained, judge, samples, which, options, says):
    known = {
        "plain": trained("plain"),
        "other": trained(*OTHER),
        "judge": judge,
    }
    with pytest.raises(ConfigError, match=says):
        samples(known[which], *(option.format(**known) for option in options))

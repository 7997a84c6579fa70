"""conf/: every option composes; every experiment has the network of the published model."""

from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_gen.cli import CONF_DIR
from lit_gen.commands import train as training
from lit_gen.config.experiment import build, trainer_for
from lit_gen.instantiate import instantiate
from lit_gen.rng import PerSample
from lit_gen.score.denoiser import CountingDenoiser, GaussianDenoiser
from lit_gen.score.module import ScoreModule

COUNTS = {
    "celeba64_ncsnpp_ve": 62_693_251,
    "celeba64_ncsnv2": 29_694_083,
    "church256_ncsnpp_ve": 65_574_549 - 128,
    "cifar10_ddpm": 35_218_947,
    "cifar10_ddpmpp_subvp": 61_804_419,
    "cifar10_ddpmpp_vp": 61_804_419,
    "cifar10_ect": 55_732_739,
    "cifar10_edm_cond": 55_735_299,
    "cifar10_edm_ve": 56_397_827,
    "cifar10_edm_vp": 55_733_891,
    "cifar10_meanflow": 55_932_419,
    "cifar10_meanflow_edm": 55_750_275,
    "cifar10_ncsnpp_deep_ve": 107_587_075 - 128,
    "cifar10_ncsnpp_ve": 62_758_787,
    "cifar10_ncsnv2": 29_694_083,
    "cifar10_uvit": 44_255_328,
    "cifar10_scm": 55_732_739,
    "ffhq64_edm_ve": 62_761_091,
    "ffhq64_edm_vp": 61_805_571,
    "imagenet256_dit_xl": 674_834_720,
    "imagenet256_sit_xl": 674_834_720,
}
"""Trainable parameters of the official networks. The official counts of two have 128 frozen frequencies."""
LAPTOP = [
    "digits_ddpm",
    "digits_edm",
    "digits_flow",
    "digits_ncsnv2",
    "digits_subvp",
    "digits_uvit",
    "digits_ve",
    "digits_vp",
]

PARTS = ("predictor", "corrector", "discretization")  # of the predictor-corrector sampler
CALLS = {"ConsistencyLoss": 2, "MeanFlowLoss": 3}
"""Forward passes of a loss for each image, where it is not one, a derivative counting two; one has a backward
pass."""

TEST_IMAGES = {
    "cifar10": 10_000,
    "celeba64": 19_962,
    "ffhq64": 1_400,
    "church256": 1_262,
    "imagenet256": 50_000,
    "digits": 360,
    "omniglot": 218,
}
"""Of the data of an experiment, by the beginning of its name."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


FAMILIES = [
    name for name in options("model") if name not in ("funit", "detector", "noisy_classifier", "autoencoder")
]


def without_network(config) -> dict:
    container = {key: config.model[key] for key in config.model if key != "net"}
    return {
        k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v
        for k, v in container.items()
    }


def model_of(config) -> ScoreModule:
    """The model with a network that takes no memory."""
    with torch.device("meta"):
        net = instantiate(config.model.net)
    return instantiate(without_network(config), net=net)


def plain(compose, *overrides):
    return compose("~experiment", "name=x", "trainer.max_steps=10", *overrides)


@pytest.mark.parametrize("name", COUNTS)
def test_experiments_have_the_published_networks(compose, name):
    config = compose(f"experiment={name}")
    module = model_of(config)
    assert config.name == name
    assert sum(p.numel() for p in module.denoiser.net.parameters()) == COUNTS[name]
    assert module.denoiser.net.augment_dim == (module.augment.label_dim if module.augment else 0)
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    assert text.splitlines()[1].startswith(f"# python -m lit_gen.train experiment={name}")


@pytest.mark.parametrize("name", LAPTOP)
def test_laptop_experiments_share_one_budget_and_train(compose, tmp_path, name):
    config = compose(f"experiment={name}")
    assert (config.name, config.trainer.max_steps, config.data.batch_size) == (name, 1500, 128)
    short = ["trainer=cpu", "trainer.max_steps=2", "data.batch_size=8", "log_every=1", "sampler.num_steps=2"]
    off = [f"~callbacks.{name}" for name in ("quality", "grid", "validation", "progress", "checkpoint")]
    logger = ["logger=csv", f"logger.csv.save_dir={tmp_path}"]
    training._quiet()
    experiment = build(compose(f"experiment={name}", *short, *off, *logger), tmp_path)
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    assert experiment.module.batches_seen == 2
    assert experiment.module.results.logged["train/grad_norm"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compose(compose, family):
    module = model_of(plain(compose, "data=cifar10", f"model={family}"))
    x = torch.randn(2, 3, 32, 32)
    t = torch.full((2,), 0.5)
    row = module.denoiser.precondition(module.denoiser.process, t)
    assert all(torch.isfinite(c).all() for c in row)
    draws = module.loss.draw(module.denoiser.process, x)
    assert len(draws[0]) == 2


@pytest.mark.parametrize("group", ["net", "process", "precondition", "loss", "optimizer", "lr_schedule"])
def test_parts_of_a_model_compose(compose, group):
    with torch.device("meta" if group == "net" else "cpu"):
        process = ["model/process=ve"] if group == "precondition" else []  # two are of its noise levels
        made = every(compose, f"model/{group}", "data=cifar10", "data.image_size=64", *process)
    assert list(made) == options(f"model/{group}")


def every(compose, group: str, *overrides: str) -> dict:
    """What the options of a group make, by name: composed at once, each at a place of its own."""
    places = [f"+{group}@callbacks.an_option.{name}={name}" for name in options(group)]
    made = plain(compose, *overrides, *places).callbacks.an_option
    return {name: instantiate(made[name]) for name in options(group)}


def test_samplers_and_their_parts_compose(compose):
    samplers = every(compose, "sampler")
    assert all(callable(sampler) for sampler in samplers.values())
    assert samplers["euler_maruyama"].keywords["corrector"] is None
    for name, grid in every(compose, "sampler/grid").items():
        assert grid.func.__name__ == name
    chosen = {part: every(compose, f"sampler/{part}", "sampler=pc") for part in PARTS}
    last = (f"sampler/{part}={list(made)[-1]}" for part, made in chosen.items())
    sampler = instantiate(plain(compose, "sampler=pc", *last).sampler)
    assert all(sampler.keywords[part] is not None for part in PARTS)


def test_restoration_options_compose(compose):
    for operator, method in zip_longest(options("operator"), options("method"), fillvalue="denoise"):
        config = compose(f"operator={operator}", f"method={method}", "image_size=8", config_name="restore")
        instantiate(config.operator)
        assert callable(instantiate(config.method))
    compose("data=cifar10", config_name="suggest_noise")


def test_every_experiment_is_known():
    """A new experiment is added to a test here, or belongs to another system's tests."""
    score = {n for n in options("experiment") if "funit" not in n and "detect" not in n and "search" not in n}
    assert {*COUNTS, *LAPTOP, "omniglot"} <= score


def evaluations(sampler, process) -> int:
    """What the sampler asks of the network for one image."""
    return _evaluations(*(OmegaConf.to_yaml(node, resolve=True) for node in (sampler, process)))


@cache
def _evaluations(sampler: str, process: str) -> int:
    """Counted on a pixel whose denoiser is known."""
    sampler, process = instantiate(OmegaConf.create(sampler)), instantiate(OmegaConf.create(process))
    counted = CountingDenoiser(GaussianDenoiser(process, torch.zeros(1, 1, 1), torch.tensor(0.25)))
    generator = PerSample.keyed(0, [0])
    x = process.prior_sample((1, 1, 1, 1), generator)
    sampler(counted, x, label=None, generator=generator, trace=None)
    return counted.evaluations


def network_rows(config) -> dict[str, int]:
    """Rows that the network sees in an experiment: of its training, a backward pass counting two; of what is
    measured and shown while it trains; and of the last measurement.

    The last distance while training is part of the last measurement where both have one sampler and step.
    """
    steps, process = config.trainer.max_steps, config.model.process
    calls = config.callbacks
    own = evaluations(config.sampler, process)

    def while_training(callback) -> int:
        sampler = callback.get("sampler")
        return evaluations(sampler, process) if sampler else own

    test_images = next(n for name, n in TEST_IMAGES.items() if config.name.startswith(name))
    forward = CALLS.get(config.model.loss._target_.rpartition(".")[2], 1)
    rows = {
        "training": steps * config.data.batch_size * (forward + 2),
        "validation": steps // calls.validation.every * test_images * forward,
        "grids": steps // calls.grid.every * calls.grid.num * while_training(calls.grid),
        "trajectories": calls.grid.trajectories * own,
    }
    if (quality := calls.get("quality")) and quality._target_:
        once = quality.num_images * while_training(quality)
        reused = steps % quality.every == 0 and not quality.get("sampler")
        rows["distances"] = (steps // quality.every - reused) * once
        rows["last"] = (quality.final_images or 1437) * own  # null: the digits to train on
    return rows


@pytest.mark.parametrize("name", [*COUNTS, *LAPTOP, "digits", "digits_ect", "digits_meanflow", "omniglot"])
def test_what_a_recipe_measures_costs_a_tenth_of_its_training(compose, name):
    rows = network_rows(compose(f"experiment={name}"))
    meanwhile = sum(
        rows[part] for part in ("validation", "grids", "trajectories", "distances") if part in rows
    )
    assert meanwhile <= 0.1 * rows["training"], rows
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    header = " ".join(line.removeprefix("# ") for line in text.splitlines())
    assert f"{meanwhile / rows['training'] * 100:.1f} % of the training" in header, rows


def test_the_last_measurement_is_by_the_published_sampler(compose):
    published = {
        "cifar10_ddpm": 1000,
        "cifar10_ddpmpp_vp": 1000,
        "cifar10_ncsnpp_ve": 2000,
        "cifar10_ncsnv2": 1161,
    }
    published |= {"cifar10_uvit": 1000, "imagenet256_dit_xl": 250, "imagenet256_sit_xl": 250}
    published |= {"cifar10_edm_vp": 35, "ffhq64_edm_vp": 79, "celeba64_ncsnv2": 2501}
    for name, count in published.items():
        config = compose(f"experiment={name}")
        assert evaluations(config.model.sampler, config.model.process) == count, name


def test_auto_takes_no_gpu_of_apples(compose, tmp_path, monkeypatch):
    """They have no float64; `trainer.accelerator=mps` asks for them."""
    from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator

    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trainer = compose("trainer=auto").trainer
    assert isinstance(trainer_for(trainer, folder=tmp_path).accelerator, CPUAccelerator)


COMMANDS = [path.stem for path in CONF_DIR.glob("*.yaml") if path.stem != "train"]


def test_commands_agree_on_the_checkpoint_and_on_where_results_of_a_run_go(compose, tmp_path):
    (tmp_path / "run").mkdir()
    inside = {}
    for name in COMMANDS:
        cfg = OmegaConf.to_container(OmegaConf.load(CONF_DIR / f"{name}.yaml"))
        assert cfg.get("checkpoint", "best") == "best", name
        if "run" in cfg and cfg.get("out") not in (None, "???"):  # the others write one file, or as told
            cfg = compose(f"run={tmp_path / 'run'}", config_name=name)
            inside[name] = Path(cfg.out).parent.parent == tmp_path / "run"
    assert len(inside) == 7 and all(inside.values()), inside
    assert Path(compose("weights=a.pth", config_name="sample").out).parent == Path("samples")

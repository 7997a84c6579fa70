"""FUNIT through the entry points: it trains, resumes, translates, is evaluated and helps to classify."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException
from official import invert
from PIL import Image

from lit_gen import checkpoints, inputs, runs
from lit_gen.callbacks import NotFiniteError
from lit_gen.callbacks.translations import contact_sheet
from lit_gen.commands import fewshot_classify as classifying
from lit_gen.commands import train as training
from lit_gen.commands import translate as translating
from lit_gen.config.experiment import build
from lit_gen.errors import ConfigError
from lit_gen.evaluation import translation as translation_evaluation
from lit_gen.funit import translator
from lit_gen.funit.evaluation import copy_content, paired_l1
from lit_gen.images import save_png, to_float
from lit_gen.instantiate import instantiate
from lit_gen.models import content_augment
from lit_gen.pretrained.funit import rules


def state(folder, name="last"):
    return checkpoints.read(checkpoints.folder(folder) / f"{name}.ckpt")


def assert_same(a, b, at="checkpoint"):
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


def test_contact_sheet_puts_content_left_and_classes_above():
    contents = torch.full((2, 1, 64, 64), 10, dtype=torch.uint8)
    examples = [torch.full((k, 1, 64, 64), 100 + k, dtype=torch.uint8) for k in (1, 3)]
    inside = torch.arange(4, dtype=torch.uint8).view(2, 2, 1, 1, 1).expand(-1, -1, 1, 64, 64) + 200
    picture = contact_sheet(contents, examples, inside, inside + 50, shown=2)
    cells = picture[0, 1:, 1:].unfold(0, 64, 65).unfold(1, 64, 65)
    assert (cells == cells[..., :1, :1]).all()
    expected = [[96, 101, 103], [96, 96, 103], [10, 200, 201], [96, 250, 251], [10, 202, 203], [96, 252, 253]]
    assert cells[..., 0, 0].tolist() == expected


def test_trains_shows_and_chooses(fit_glyphs, tmp_path, capsys):
    """Numbers under their names, the grids' cells are the translations, best.ckpt is the best of `top1`."""
    experiment = fit_glyphs(tmp_path)
    module, data = experiment.module, experiment.data
    logged = runs.history(tmp_path)
    assert set(logged["k_shot/l1_k2"]) == set(logged["k_shot/top1_k1"]) == {2, 4}
    assert set(logged["train/discriminator/real"]) == set(logged["train/generator/loss"]) == {1, 2, 3, 4}
    callback = next(c for c in experiment.trainer.callbacks if hasattr(c, "task"))
    task, shown = callback.task, callback.task.examples
    made = {name: module.translate(to_float(task.contents), to_float(k)) for name, k in shown.items()}
    truth = {name: torch.stack([data.truth(int(i), name) for i in task.index]) for name in shown}
    expected = np.mean([paired_l1(made[name], truth[name]).mean().item() for name in shown])
    assert logged["k_shot/l1_k2"][4] == pytest.approx(expected, rel=1e-5)
    copied = np.mean([paired_l1(task.contents, truth[name]).mean().item() for name in shown])
    assert module.results.summary["copying/l1"] == pytest.approx(copied, abs=1e-5)
    picture = np.asarray(Image.open(tmp_path / "grids" / "translations_0000004.png"))
    # Two class images (of K = 2) stand above.
    cell = picture[1 + 2 * 65 :, 1 + 65 :][:64:2, :64:2, 0]
    assert np.array_equal(cell, made[next(iter(shown))][0, 0].numpy())
    best = max(logged["k_shot/top1_k2"].values())
    assert state(tmp_path, "best")["callbacks"][best_key(tmp_path)]["best"] == pytest.approx(best, abs=1e-6)
    training._finish(experiment, tmp_path, 1.0)
    out = capsys.readouterr().out
    assert "lit-gen translate run=" in out and "copying" in out and "lit-gen sample" not in out
    assert (tmp_path / "curves.png").exists() and (tmp_path / "summary.json").exists()


def best_key(folder):
    return next(k for k in state(folder)["callbacks"] if "Checkpoint" in k)


def test_resume_in_mid_epoch_is_bit_identical(fit_glyphs, tmp_path):
    """24 source images in batches of 4: both optimizers, the average and the data order go on."""
    fit_glyphs(tmp_path / "whole")
    fit_glyphs(tmp_path / "half", "trainer.max_steps=2", "model.lr_schedule.total=4")
    resumed = tmp_path / "again"
    last = checkpoints.folder(tmp_path / "half") / "last.ckpt"
    fit_glyphs(resumed, checkpoint=last)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "batches_seen", "global_step"):
        assert_same(state(tmp_path / "whole")[part], state(resumed)[part], part)
    a, b = runs.history(tmp_path / "whole"), runs.history(resumed)
    for name in b:
        if not name.startswith(("throughput", "memory")):
            assert b[name] == {step: v for step, v in a[name].items() if step > 2}, name


@pytest.mark.slow
def test_two_processes_equal_one_through_the_spine(fit_glyphs, tiny_glyphs, tmp_path):
    """SGD, so that gradients that differ would show in proportion. Weights and K-shot numbers."""
    sgd = ["model.optimizer._target_=torch.optim.SGD", "~model.optimizer.betas", "model.optimizer.lr=0.01"]
    sgd.append("model.discriminator_optimizer=null")
    fit_glyphs(tmp_path / "one", *sgd)
    ddp = ["trainer=ddp_cpu" if option == "trainer=cpu" else option for option in tiny_glyphs]
    command = [sys.executable, "-m", "lit_gen.train", *ddp, *sgd, f"hydra.run.dir={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    for key, value in state(tmp_path / "one")["state_dict"].items():
        torch.testing.assert_close(state(tmp_path / "two")["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    a, b = runs.history(tmp_path / "one"), runs.history(tmp_path / "two")
    for name in a:
        if not name.startswith(("throughput", "memory")):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


def test_nan_names_the_parts_and_our_clipping(fit_glyphs, tmp_path):
    with pytest.raises(NotFiniteError, match=r"generator/.*: nan.*model\.gradient_clip_val=1"):
        fit_glyphs(tmp_path, "model.optimizer.lr=1e38")


def test_the_papers_experiment(compose, tmp_path, monkeypatch):
    """Official sizes and settings; a step of it, with small networks, on class folders with list files."""
    monkeypatch.setenv("LITGEN_DATA", str(tmp_path))
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))
    names = [f"{c}/{i}.png" for c in "abcd" for i in range(5)]
    for j, name in enumerate(names):
        save_png(torch.full((3, 44, 40 + j), 10 * j, dtype=torch.uint8), tmp_path / "animal_faces" / name)
    (tmp_path / "animals_list_train.txt").write_text("\n".join(names[:15]))
    (tmp_path / "animals_list_test.txt").write_text("\n".join(names[15:]))
    whole = compose("experiment=funit_animal_faces")
    assert (whole.data.batch_size, whole.data.num_classes, whole.data.image_size) == (64, 119, 128)
    with torch.device("meta"):
        official = instantiate(whole.model)
    assert sum(p.numel() for p in official.generator.parameters()) == 29_866_435
    small = ["generator.width=2", "generator.mlp_width=4", "discriminator.width=2"]
    small += ["discriminator.num_res_blocks=4"]
    few = ["data.num_classes=3", "data.batch_size=3", "data.images.image_size=36", "data.image_size=32"]
    short = ["trainer=cpu", "logger=csv", "trainer.max_steps=1", "data.num_workers=0", "log_every=1"]
    judging = ["metrics.classifiers.steps=1", "metrics.classifiers.width=2"]
    options = [*few, *short, *judging, f"logger.csv.save_dir={tmp_path}", *(f"model.{o}" for o in small)]
    experiment = build(compose("experiment=funit_animal_faces", *options), tmp_path / "run")
    experiment.trainer.fit(experiment.module, datamodule=experiment.data)
    data = experiment.data
    assert (data.train.classes, data.test.classes) == (["a", "b", "c"], ["d"])
    assert experiment.module.batches_seen == 1 and data.test[0]["image"].shape == (3, 32, 32)


@pytest.fixture
def trained(fit_glyphs, tmp_path):
    return fit_glyphs(tmp_path / "run"), tmp_path / "run"


def test_translates_evaluates_and_classifies(trained, compose, tmp_path):
    experiment, run = trained
    module, data = experiment.module, experiment.data
    # Translations of a folder into folders are those of the module.
    letters = {name: data.test.of_class(i)[:3] for i, name in enumerate(data.test.classes)}
    for name, numbers in letters.items():
        for i in numbers.tolist():
            save_png(data.test[i]["image"], tmp_path / "classes" / name / f"{i}.png")
    content = data.train[0]["image"]
    save_png(content, tmp_path / "content.png")
    given = [f"content={tmp_path / 'content.png'}", f"classes={tmp_path / 'classes'}"]
    cfg = compose(
        f"run={run}",
        "checkpoint=last",
        *given,
        "interpolate=3",
        f"out={tmp_path / 't'}",
        config_name="translate",
    )
    translating.translate(cfg, tmp_path / "t")
    name = data.test.classes[0]
    shown = torch.stack([data.test[int(i)]["image"] for i in letters[name]])
    expected = module.translate(to_float(content[None]), to_float(shown))[0, 0]
    written = np.asarray(Image.open(tmp_path / "t" / "images" / name / "content.png"))
    assert np.array_equal(written, expected.numpy())
    ends = sorted((tmp_path / "t" / "interpolation").rglob("*.png"))
    assert len(ends) == 3 and np.array_equal(np.asarray(Image.open(ends[0])), expected.numpy())
    with pytest.raises(ConfigError, match="already holds translations"):
        translating.translate(cfg, tmp_path / "t")
    # With the code adapted to the class images, under the training's augmentation.
    cfg = compose(f"run={run}", "checkpoint=last", *given, "adapt=2", config_name="translate")
    assert translating.translate(cfg, tmp_path / "a")["adapt"] == 2
    augment = content_augment(runs.saved_config(run))
    code = translator.adapted_code(module.generator_ema, to_float(shown), 2, augment)
    adapted = np.asarray(Image.open(tmp_path / "a" / "images" / name / "content.png"))
    assert np.array_equal(adapted, module.translate(to_float(content[None]), code)[0, 0].numpy())
    # The same, from the weights in the official layout.
    file, average = tmp_path / "gen_00000004.pt", module.generator_ema
    torch.save({"gen_test": invert(average, rules(average))}, file)
    cfg = compose(
        f"weights={file}", *given, "image_size=32", f"out={tmp_path / 'o'}", config_name="translate"
    )
    translating.translate(cfg, tmp_path / "o")
    official = np.asarray(Image.open(tmp_path / "o" / "images" / name / "content.png")).astype(int)
    assert np.abs(official - written).max() <= 1  # another memory layout, another rounding
    # The evaluation: baselines and each K.
    options = [f"run={run}", "k=[1,3]", "num=5", "adapt=1", f"out={tmp_path / 'e'}"]
    cfg = compose(*options, config_name="evaluate_translation")
    record = translation_evaluation.evaluate_translator(cfg, tmp_path / "e")
    assert record["adapt"] == 1
    assert list(record["results"]) == ["copying", "pasting", "K = 1", "K = 3"]
    index = data.contents(5, cfg.seed)
    images = torch.stack([data.train[int(i)]["image"] for i in index])
    truth = [torch.stack([data.truth(int(i), c) for i in index]) for c in data.test.classes]
    copied = torch.cat([paired_l1(copy_content(to_float(images), images), t) for t in truth]).mean()
    assert record["results"]["copying"]["l1"] == pytest.approx(copied.item(), rel=1e-5)
    assert record["results"]["copying"]["dipd"] == 0
    assert {"evaluation.json", "k_sweep.png", "tsne.png"} <= {p.name for p in (tmp_path / "e").iterdir()}
    # Few-shot classification: the accuracies are shares of the images that were not shown.
    cfg = compose(
        f"run={run}", "num=[2]", "splits=2", f"out={tmp_path / 'c'}", config_name="fewshot_classify"
    )
    record = classifying.classify(cfg, tmp_path / "c")
    assert set(record["accuracy"]) == {"0", "2"}
    for values in record["accuracy"].values():
        assert len(values) == 2 and all((v * 10) == pytest.approx(round(v * 10)) for v in values)


def test_contents_beyond_num_are_announced(tmp_path, capsys):
    for i in range(3):
        save_png(torch.full((1, 8, 12), i, dtype=torch.uint8), tmp_path / f"{i}.png")
    assert list(inputs.read_pictures(tmp_path, 2, channels=1, image_size=8)) == ["0", "1"]
    assert "3 images, the first 2 are taken; num=3 takes all" in capsys.readouterr().out
    assert len(inputs.read_pictures(tmp_path, 3, channels=1, image_size=8, fit="stretch")) == 3
    assert capsys.readouterr().out == ""


def test_refuses_with_value_and_remedy(trained, compose, tmp_path):
    _, run = trained
    (tmp_path / "empty").mkdir()

    def translate(*overrides):
        cfg = compose(f"run={run}", *overrides, config_name="translate")
        translating.translate(cfg, tmp_path / "x")

    def evaluate(*overrides):
        cfg = compose(f"run={run}", *overrides, config_name="evaluate_translation")
        translation_evaluation.evaluate_translator(cfg, tmp_path / "x")

    with pytest.raises(ConfigError, match=r"35 x 35 pixels does not fit"):
        folder = tmp_path / "one"
        save_png(torch.zeros(1, 40, 40, dtype=torch.uint8), folder / "a.png")
        translate(f"content={folder}", f"classes={folder}", "image_size=35")
    with pytest.raises(ConfigError, match=r"k=2: class 'one' .* has 1 images"):
        translate(f"content={folder}", f"classes={folder}", "k=2")
    with pytest.raises(ConfigError, match=r"interpolate=1"):
        translate("interpolate=1")
    with pytest.raises(ConfigError, match=r"image_size=64: the run's own images have 32"):
        translate("image_size=64")
    with pytest.raises(ConfigError, match=r"no such image or folder"):
        translate("content=nowhere")
    with pytest.raises(ConfigError, match=r"no images"):
        translate(f"classes={tmp_path / 'empty'}")
    with pytest.raises(ConfigCompositionException, match="nll_images"):
        evaluate("nll_images=3")
    with pytest.raises(ConfigError, match=r"has 6 images, k=9"):
        evaluate("k=[1,9]")
    with pytest.raises(ConfigError, match=r"No target class has k=9 images; the largest has 6"):
        evaluate("k=[1,9]", "on_error=skip")
    with pytest.raises(ConfigError, match=r"fit=shorter: .* crop or stretch"):
        translate("fit=shorter")
    with pytest.raises(ConfigError, match=r"vgg=nowhere: there is no such file"):
        evaluate("vgg=nowhere", "k=[1,3]", "num=2")
    with pytest.raises(ConfigError, match=r"shots=6: no image of class .* is left to test on"):
        cfg = compose(f"run={run}", "shots=6", "num=[1]", config_name="fewshot_classify")
        classifying.classify(cfg, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"classifiers.style"):
        evaluate("+classifiers.style=x.pt")
    assert not any((tmp_path / "x").iterdir())


def test_interpolation_by_the_functions_is_the_modules(trained):
    module = trained[0].module
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    first, second = (translator.class_code(module.generator_ema, x[i : i + 1]) for i in (0, 1))
    way = module.interpolate(x, first, second, 3)
    assert torch.equal(way[:, 0], module.translate(x, x[:1]))
    assert torch.equal(way, translator.interpolate(module.generator_ema, x, first, second, 3))

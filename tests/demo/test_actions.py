"""What the page does, without the page."""

from types import SimpleNamespace

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from lit_gen.cli import CONF_DIR
from lit_gen.data.glyphs import LETTERS
from lit_gen.data.scenes import Scenes
from lit_gen.demo import actions, opened
from lit_gen.demo.actions import augment, gap_of, gapped, generate, restore, translate
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.models.api import Translator
from lit_gen.score.restoration import Inpainting


@pytest.fixture(scope="module")
def models():
    return opened.open_models([], device="cpu")


@pytest.fixture(scope="module")
def shipped(models):
    return models["digits"]


@pytest.fixture(scope="module")
def model(shipped):
    return shipped.model


@pytest.fixture(scope="module")
def digit(shipped):
    return shipped.examples[0][0]


MIDDLE = torch.zeros(1, 8, 8, dtype=torch.bool)
MIDDLE[:, 3:5] = True


def test_watching_changes_no_image_and_counts_all_evaluations(model):
    made = generate(model, num=6, num_steps=5, label=3)
    assert torch.equal(made.images, model.sample(6, sampler="heun", num_steps=5, label=3))
    assert made.nfe == 9 and made.frames.shape == (9, 4, 2, 1, 8, 8)
    assert generate(model, num=2, num_steps=5, sampler="dpm_solver").nfe == 5
    assert generate(model, num=2, num_steps=5, guidance=2.0).nfe == 18  # with and without the class


def test_the_film_ends_with_the_image(model):
    """The last estimate of the Euler sampler is the image; long films are thinned evenly."""
    made = generate(model, num=6, num_steps=60, sampler="euler")
    assert made.nfe == 60 and len(made.frames) == 15  # every fourth
    made = generate(model, num=6, num_steps=20, sampler="euler")
    assert torch.equal(made.frames[-1, :, 1], made.images[:4])
    assert made.frames[0, :, 0].float().std() > 50  # noise


def test_the_denoiser_is_put_back(model):
    own = model.module.denoiser
    with pytest.raises(ConfigError, match="label=10"):
        generate(model, num=2, label=10)
    with pytest.raises(ConfigError, match="between 1 and 64"):
        generate(model, num=65)
    assert model.module.denoiser is own


def test_noise_is_filled_in_and_silence_is_kept(model, digit):
    """A restoration of a gap that hides is the library's; of a gap that is believed, paper."""
    options = {"method": "pigdm", "num_steps": 20, "samples": 3}
    seen, noise = restore(model, digit, MIDDLE, gap="noise", **options)
    operator = Inpainting(~MIDDLE)
    assert torch.equal(noise.images, model.restore(operator(to_float(digit)[None]), operator, **options)[0])
    assert torch.equal(seen[~MIDDLE], digit[~MIDDLE]) and seen[MIDDLE].unique().numel() > 4
    paper, silence = restore(model, digit, MIDDLE, gap="silence", **options)
    assert paper[MIDDLE].unique().tolist() == [int(digit[~MIDDLE].median())]
    kept = (silence.images[:, MIDDLE].float() - paper[MIDDLE].float()).abs().mean()
    filled = (noise.images[:, MIDDLE].float() - paper[MIDDLE].float()).abs().mean()
    assert kept < 20 < 60 < filled


def test_samplers_are_known_by_name_while_a_command_runs(model):
    """A command is an application of Hydra, and what names a sampler composes within it."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert generate(model, num=1, num_steps=2, sampler="euler").nfe == 2
        assert running is not None and GlobalHydra.instance().hydra is running


@pytest.mark.parametrize("method", actions.METHODS)
def test_every_method_fills_a_gap(model, digit, method):
    _, result = restore(model, digit, MIDDLE, method=method, num_steps=4, samples=1)
    assert result.nfe >= 4 and (result.images[0][~MIDDLE].float() - digit[~MIDDLE].float()).abs().mean() < 60


@pytest.mark.parametrize("operator", ["half the size", "blur", "noise"])
def test_operators_without_a_gap(model, digit, operator):
    seen, result = restore(model, digit, operator=operator, noise_std=0.1, num_steps=4, samples=2)
    assert seen.shape == digit.shape and len(result.images) == 2 and not torch.equal(seen, digit)


def test_mistakes_are_named(model, digit):
    for options, says in (
        ({}, "Paint the gap"),
        ({"unknown": MIDDLE, "gap": "silence", "method": "ddrm"}, "pigdm or dps"),
        ({"unknown": MIDDLE, "noise_std": 3.0}, "noise_std=3.0"),
        ({"unknown": MIDDLE, "samples": 0}, "0 images"),
        ({"operator": "gray"}, "3 channels"),
        ({"unknown": MIDDLE, "method": "os.system"}, "method='os.system'"),
    ):
        with pytest.raises(ConfigError, match=says):
            restore(model, digit, **options)


def test_the_gap_is_cut_and_reduced_as_pictures_are():
    painted = torch.zeros(40, 60, dtype=torch.uint8)
    painted[10:20, 15:30] = 255  # of the square in the middle, whose columns are 10 to 50
    assert gap_of(painted, (8, 8))[0].nonzero().tolist() == [[r, c] for r in (2, 3) for c in (1, 2, 3)]
    painted[10:12] = 1  # less than half of the pixels of row 2
    assert gap_of(painted, (8, 8)).sum() == 6


def test_paper_is_the_median_of_what_is_left():
    x = torch.full((1, 3, 8, 8), 1.0)
    x[:, :, 3:5] = -1
    x[:, 1] -= 0.5
    assert gapped(x, MIDDLE, "silence", 0)[0, :, 4, 4].tolist() == [1.0, 0.5, 1.0]


def test_the_way_between_two_classes():
    """A translator whose class code is the mean brightness adds it to the content."""
    generator = SimpleNamespace(
        channels=1,
        class_code=lambda images: images.mean((1, 2, 3, 4))[:, None],
        content_code=lambda content: content,
        decode=lambda content, code: content + code[:, :, None, None],
        parameters=lambda: iter([torch.nn.Parameter(torch.zeros(()))]),
    )
    model = Translator(generator, None, None)
    content = torch.full((2, 1, 4, 4), 128, dtype=torch.uint8)
    dark, bright = (torch.full((3, 1, 4, 4), v, dtype=torch.uint8) for v in (100, 156))
    values = [int(translate(model, content, dark, bright, p)[0, 0, 0, 0]) for p in (0.0, 0.5, 1.0)]
    assert values[0] == int(translate(model, content, dark)[0, 0, 0, 0]) and values == [101, 129, 157]
    with pytest.raises(ConfigError, match="position=2"):
        translate(model, content, dark, bright, 2)


@pytest.mark.parametrize("policy", actions.POLICIES)
def test_sheets_depend_on_the_seed_alone(policy):
    scene = Scenes("test", size=1, image_size=64)[0]
    boxes = None if policy.startswith("classification") else scene["boxes"]
    sheet = augment(scene["image"], boxes, policy, columns=2)
    assert torch.equal(sheet, augment(scene["image"], boxes, policy, columns=2))
    assert not torch.equal(sheet, augment(scene["image"], boxes, policy, columns=2, seed=1))


def test_boxes_lie_in_the_image():
    with pytest.raises(ConfigError, match="64 pixels wide"):
        augment(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[70.0, 1, 80, 2]]), "detection_v1")


def test_names_of_models(monkeypatch):
    monkeypatch.setattr(opened, "load", lambda path, **_: path)
    assert list(opened.open_models(["a/x/1", "a/y/1"])) == ["x/1", "y/1"]
    with pytest.raises(ConfigError, match="twice"):
        opened.open_models(["a/x", "b/../a/x"])


def test_what_ships_is_small(models):
    files = [f for f in opened.WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 2e6
    assert {f.parent.name for f in files} == set(opened.SHIPPED) == set(models)
    assert models["digits"].classes == list("0123456789") and models["letters"].classes == list(LETTERS)
    assert models["letters"].label("c") == 28 and models["letters"].label("not told") is None
    assert all(len(model.examples) == 12 and model.restores for model in models.values())

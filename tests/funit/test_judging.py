"""Evaluation classifiers: trained once, when they are first asked for, and no training is another for it."""

from functools import partial

import pytest
import torch

from lit_gen import checkpoints, runs
from lit_gen.callbacks import ProgressBar
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.glyphs import Glyphs
from lit_gen.errors import ConfigError
from lit_gen.evaluation import classifiers as judging
from lit_gen.evaluation.classifiers import ClassifierTraining, evaluation_classifier
from lit_gen.funit.classifier import accuracy, load_classifier, save_classifier
from lit_gen.funit.module import FUNITModule
from lit_gen.instantiate import instantiate

TRAINING = ClassifierTraining(steps=2, width=4)


@pytest.fixture(scope="module")
def data() -> FewShotDataModule:
    faces = ["DejaVuSans", "DejaVuSerif", "cmr10", "cmss10"]
    return FewShotDataModule(Glyphs(32, 1, "ABCDEF", classes=faces), target=2)


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """What is trained, a step of the translator or a classifier, in its order."""
    events: list[str] = []

    def recorded(where, name, event):
        own = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, **k: (events.append(event), own(*a, **k))[1])

    recorded(judging, "train_classifier", "classifier")
    recorded(FUNITModule, "training_step", "step")
    return events


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_is_trained_once(data, trainings, tmp_path):
    first, again = (evaluation_classifier(data, "all", TRAINING, tmp_path) for _ in range(2))
    assert trainings == ["classifier"]
    assert first.classes == again.classes == data.classes
    assert same(first.network, again.network)
    everything = judging.all_images(data.train), judging.all_images(data.test)
    images = torch.cat([images for images, _ in everything])
    labels = torch.cat([everything[0][1], everything[1][1] + len(data.train.classes)])
    examined = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:5]  # a fifth
    assert first.accuracy == again.accuracy == accuracy(first.network, images[examined], labels[examined])


@pytest.mark.parametrize("other", [{"steps": 3}, {"width": 5}, {"seed": 1}, {"flip": True}])
def test_another_training_is_another_classifier(data, trainings, tmp_path, other):
    evaluation_classifier(data, "test", TRAINING, tmp_path)
    evaluation_classifier(data, "test", ClassifierTraining(**{"steps": 2, "width": 4} | other), tmp_path)
    assert trainings == 2 * ["classifier"]


def test_other_kinds_and_other_images_are_other_classifiers(data, trainings, tmp_path):
    for kind in judging.KINDS:
        evaluation_classifier(data, kind, TRAINING, tmp_path)
    fewer = FewShotDataModule(Glyphs(32, 1, "ABCDE", classes=["DejaVuSans", "cmr10", "cmss10"]), target=2)
    evaluation_classifier(fewer, "test", TRAINING, tmp_path)
    assert trainings == 5 * ["classifier"]
    with pytest.raises(ConfigError, match="no classifier 'style'"):
        evaluation_classifier(data, "style", TRAINING, tmp_path)


def test_a_damaged_file_is_trained_again(data, trainings, tmp_path, caplog):
    first = evaluation_classifier(data, "test", TRAINING, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = evaluation_classifier(data, "test", TRAINING, tmp_path)
    assert trainings == 2 * ["classifier"] and "again" in caplog.text and file.name in caplog.text
    assert same(first.network, again.network) and load_classifier(file)[1] == data.test.classes


def test_a_file_is_written_whole_or_not_at_all(data, tmp_path, monkeypatch):
    network = evaluation_classifier(data, "test", TRAINING, tmp_path / "cache").network
    kept = save_classifier(network, tmp_path / "one.pt", ["a", "b"], 0.5)
    save = torch.save

    def torn(content, path):
        save(content, path)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        save_classifier(network, kept, ["a", "b"], 0.9)
    assert load_classifier(kept)[2] == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "one.pt"]


def test_a_cache_that_cannot_be_written_is_said(data, tmp_path, caplog):
    (tmp_path / "file").touch()
    classifier = evaluation_classifier(data, "test", TRAINING, tmp_path / "file")
    assert classifier.classes == data.test.classes and "the next run trains it again" in caplog.text


def test_global_random_numbers_are_left_alone(data, tmp_path):
    """When it trains and when it reads; and they do not make another classifier."""
    networks = []
    for folder in ("one", "one", "two"):
        torch.manual_seed(len(networks))
        before = torch.get_rng_state()
        networks.append(evaluation_classifier(data, "test", TRAINING, tmp_path / folder).network)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(networks[0], networks[1]) and same(networks[0], networks[2])


def test_says_what_it_does_and_how_long(data, tmp_path, capsys):
    report = partial(ProgressBar(line_seconds=0).work, announce=False)
    evaluation_classifier(data, "test", TRAINING, tmp_path, report=report)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "Training an evaluation classifier (test) on the target classes: 2 steps, once;"
    )
    assert str(next(tmp_path.iterdir())) in said[0]
    assert [line.split(",")[0] for line in said[-2:]] == [
        f"evaluation classifier (test): {i} of 2" for i in (1, 2)
    ]
    assert said[-2].endswith(" s left") and said[-1].endswith("/s")
    evaluation_classifier(data, "test", TRAINING, tmp_path)
    assert capsys.readouterr().out == ""


def test_the_first_look_trains_and_the_training_is_the_same(fit_glyphs, trainings, tmp_path, monkeypatch):
    """A classifier trained within, one from the cache, and none: bit-identical checkpoints."""
    for name in ("made", "kept", "without"):
        monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))
        fit_glyphs(tmp_path / name, *(["metrics.classifiers=null"] if name == "without" else []))
    step, looks = ["step", "step"], ["classifier", "classifier"]  # of typefaces and of letters
    assert trainings == step + looks + step + 2 * (step + step)
    states = [
        checkpoints.read(checkpoints.folder(tmp_path / name) / "last.ckpt")
        for name in ("made", "kept", "without")
    ]
    for other in states[1:]:
        for part in ("state_dict", "optimizer_states"):
            torch.testing.assert_close(states[0][part], other[part], rtol=0, atol=0)
    logged = [runs.history(tmp_path / name) for name in ("made", "kept", "without")]
    assert logged[0]["k_shot/top1_k2"] == logged[1]["k_shot/top1_k2"]
    assert logged[0]["k_shot/l1_k2"] == logged[2]["k_shot/l1_k2"]
    assert not [name for name in logged[2] if "top1" in name or "content_k" in name]


def test_with_nothing_to_measure_there_are_pictures(fit_glyphs, trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(FewShotDataModule, "truth", lambda *_: None)
    fit_glyphs(tmp_path, "metrics.classifiers=null")
    assert trainings == 4 * ["step"]
    assert not [name for name in runs.history(tmp_path) if name.startswith("k_shot")]
    assert (tmp_path / "grids" / "translations_0000004.png").exists()
    assert checkpoints.newest_good(tmp_path)[1]["batches_seen"] == 4


@pytest.mark.parametrize("module", ["lit_gen.judging", "lit_gen.evaluation.classifiers"])
def test_configurations_of_earlier_versions_are_read(module):
    assert instantiate({"_target_": f"{module}.Schooling", "steps": 3}) == ClassifierTraining(steps=3)

"""The comparison of augmentations: what arms may see, what is paired with what, and a study that is stopped,
divided, and gone on with."""

import json

import pytest
import torch

from lit_gen.augment import Policy
from lit_gen.cli import CONF_DIR
from lit_gen.commands.compare_augmentation import main as command
from lit_gen.comparison import (
    Augmented,
    Cell,
    Copies,
    FlipsAndShifts,
    Nothing,
    OneOf,
    Searched,
    Source,
    Study,
    Treatment,
    Union,
    images,
    letters,
)
from lit_gen.comparison.results import overall, summarize
from lit_gen.comparison.task import split
from lit_gen.data import ImageDataModule
from lit_gen.data.digits import digits
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.glyphs import Glyphs, embedded_faces
from lit_gen.errors import ConfigError
from lit_gen.rng import key, keyed_generator
from lit_gen.search import ClassifierReward, DensityReward, Labelled, Random, classification_space
from lit_gen.search.rewards import train_classifier

CLASSIFIER = {"steps": 4, "batch_size": 8, "width": 2}


def source(**options) -> Source:
    """Two classes of noise, bright and dark."""
    g = keyed_generator(0)
    labels = torch.arange(40) % 2
    pictures = torch.rand(40, 1, 8, 8, generator=g) * 100 + labels[:, None, None, None] * 100
    pictures = pictures.to(torch.uint8)
    test, names = Labelled(pictures[20:], labels[20:]), [str(i) for i in range(20)]
    return Source(lambda rows: pictures[list(rows)], labels[:20], names, test, **options)


class Spy:
    """Notes what it is given; its second candidate makes the right images."""

    needs_other = False

    def __init__(self):
        self.seen: list[tuple] = []

    def treatments(self, train, classes, seed, other):
        self.seen.append((train, other))
        yield Treatment(made=Labelled(train.images, 1 - train.labels), setting="wrong")
        yield Treatment(made=train, setting="right")


def study(out, arms, settings: dict | None = None, **options) -> Study:
    named = {"arms": {name: {} for name in arms}} | (settings or {})
    options = {"classifier": CLASSIFIER, "options": named} | options
    return Study(options.pop("source", None) or source(), arms, out, **options)


def test_more_shots_keep_the_images_of_fewer_and_seeds_draw_others():
    made = source()
    two, five, again = made.task(2, 0), made.task(5, 0), made.task(2, 1)

    def content(task):
        return {image.numpy().tobytes() for image in task.train.images}

    assert content(two) < content(five) and content(two) != content(again)
    assert torch.equal(two.test.images, again.test.images)
    assert two.train.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="shots=11: class 0 has 10 images"):
        made.task(11, 0)


def test_letters_are_tested_on_designs_that_are_not_labelled():
    made = letters(characters="AB", image_size=8)
    task = made.task(2, 3)
    assert task.train.labels.tolist() == [0, 0, 1, 1] and task.classes == 2
    # The same typefaces show every letter: those that come first by the seed.
    chosen = sorted(set(made.names), key=lambda name: key(3, "shots", name))[:2]
    assert torch.equal(task.train.images[:2], made.read([made.names.index(name) for name in chosen]))
    assert task.other is not None and int(task.other.labels.max()) + 1 == len(task.other) // 2
    shown = {image.numpy().tobytes() for image in (*task.test.images, *task.other.images)}
    assert all(image.numpy().tobytes() not in shown for image in task.train.images)


def test_a_split_keeps_typefaces_together():
    """Otherwise a classifier tells letters by the typeface that showed them in the other part."""
    made = letters(characters="ABC", image_size=8)
    task = made.task(4, 0)
    faces = torch.arange(4).repeat(3)
    for held in (0.25, 0.5):
        first, second = split(task.train.labels, held, keyed_generator(1))
        assert not set(faces[first].tolist()) & set(faces[second].tolist())
        assert task.train.labels[second].bincount().tolist() == [4 * held] * 3
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(12))
    with pytest.raises(ConfigError, match="one image"):
        split(torch.tensor([0, 1, 1]), 0.5, keyed_generator(0))


def test_images_of_data_are_resized_shuffled_and_turned():
    data = ImageDataModule(lambda: digits("train"), lambda: digits("test"))
    plain = images(data, image_size=16, test_size=50)
    task = plain.task(3, 0)
    assert task.train.images.shape == (30, 1, 16, 16) and len(task.test) == 50 and task.other is None
    shuffled = images(data, image_size=16, test_size=50, labels="shuffled").task(3, 0)
    assert torch.equal(shuffled.train.images, task.train.images)
    assert not torch.equal(shuffled.train.labels, task.train.labels)
    assert torch.equal(shuffled.train.labels.bincount(), task.train.labels.bincount())
    assert torch.equal(shuffled.test.labels, task.test.labels)
    turned = images(data, image_size=16, test_size=50, rotate=45)
    few, more = turned.task(3, 0), turned.task(4, 0)
    assert not torch.equal(few.train.images, task.train.images)
    assert torch.equal(few.train.images[:3], more.train.images[:3])  # an image has one angle


def test_target_classes_of_few_shot_data_are_divided_and_its_source_classes_are_other():
    names = [face.name for face in embedded_faces()[:10]]
    data = FewShotDataModule(Glyphs(8, 1, "ABCDEF", names), target=4, batch_size=2)
    task = images(data).task(3, 0)
    assert task.classes == 4 and len(task.train) == len(task.test) == 12
    labelled, tested = ({i.numpy().tobytes() for i in part.images} for part in (task.train, task.test))
    assert not labelled & tested
    assert task.other is not None and task.other.labels.bincount().tolist() == [6] * 6


def test_an_arm_sees_the_labelled_images_alone_and_the_better_candidate_is_taken(tmp_path):
    spy, other = Spy(), source().test
    this = study(tmp_path, {"spy": spy}, source=source(other=other), classifier=CLASSIFIER | {"steps": 30})
    record = this.measure(Cell("spy", 4, 0))
    (fit, first_other), (train, second_other) = spy.seen
    task = this.source.task(4, 0)
    assert torch.equal(train.images, task.train.images) and first_other is None and second_other is None
    whole = {image.numpy().tobytes() for image in train.images}
    assert len(fit) == 4 and {image.numpy().tobytes() for image in fit.images} < whole
    assert record["setting"] == "right" and record["index"] == 1
    assert record["validation"] == max(value for _, value in record["candidates"])


def test_of_one_image_a_class_the_default_is_taken(tmp_path):
    record = study(tmp_path, {"spy": Spy()}).measure(Cell("spy", 1, 0))
    assert (record["setting"], record["candidates"], record["validation"]) == ("wrong", [], None)


def test_an_arm_that_needs_other_images_is_refused_without_them(tmp_path):
    spy = Spy()
    spy.needs_other = True
    with pytest.raises(ConfigError, match=r"arms\.spy learns from other classes"):
        study(tmp_path, {"spy": spy})


def test_all_arms_train_for_as_many_steps_and_half_of_a_batch_is_made(monkeypatch):
    seen: list[torch.Tensor] = []

    class Net(torch.nn.Linear):
        def forward(self, x):
            seen.append((x.flatten(1)[:, 0] > 0).float().mean())
            return super().forward(x.flatten(1))

    monkeypatch.setattr("lit_gen.search.rewards.small_cnn", lambda *_: Net(64, 2))
    dark = Labelled(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    bright = Labelled(torch.full((5, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0]))
    for made in (None, bright):
        train_classifier(dark, None, classes=2, made=made, **CLASSIFIER)
    assert [float(share) for share in seen] == [0.0] * 4 + [0.5] * 4
    with pytest.raises(ConfigError, match="steps="):
        train_classifier(dark, None, classes=2, made=bright)


def test_flips_and_shifts_move_whole_pixels():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 3, 2] = 255
    places = set()
    g = keyed_generator(0)
    augmentation = FlipsAndShifts(flip=0.5, shift=0.125, fill=0)
    for _ in range(200):
        out = augmentation.apply(image, None, augmentation.sample(0, g))[0]
        places |= {tuple(place) for place in out[0].nonzero().tolist()}
    assert places == {(y, x) for y in (2, 3, 4) for x in (1, 2, 3, 4, 5, 6)}


def test_one_of_gives_each_image_one_of_them():
    parts = [
        Policy([[("Invert", 1.0, None)]], "classification"),
        Policy([[("Solarize", 1.0, 9)]], "classification"),
    ]
    images = torch.full((64, 1, 8, 8), 10, dtype=torch.uint8)
    both = OneOf(parts)
    out = both.apply_batch(images, None, both.sample_batch(64, keyed_generator(0)))[0]
    found = out[:, 0, 0, 0].bincount()
    alone = [int(p.apply(images[0], None, p.sample())[0][0, 0, 0]) for p in parts]
    assert alone == [245, 245] or found[alone].min() > 16


def test_cells_are_resumed_divided_and_torn_lines_measured_again(tmp_path):
    arms = {"none": Nothing(), "copies": Copies()}
    whole = study(tmp_path / "whole", arms)
    cells = whole.cells([1, 2], [0, 1])
    whole.work(cells, report=lambda text: None)
    first = study(tmp_path / "parts", arms)
    first.work(cells[:3], report=lambda text: None)
    log = tmp_path / "parts" / "cells.jsonl"
    log.write_text(log.read_text()[:-20])  # killed while writing
    told: list[str] = []
    study(tmp_path / "parts", arms).work(cells, report=told.append)
    assert len(told) == len(cells) - 2

    def results(this):
        return {cell: record["accuracy"] for cell, record in this.records().items()}

    assert results(first) == results(whole) and set(results(whole)) == set(cells)
    with (
        first._claimed(cells[0]) as mine,
        whole._claimed(cells[0]) as others,
        first._claimed(cells[0]) as again,
    ):
        assert mine and others and not again  # other folders are other studies


def test_cells_of_other_options_do_not_count(tmp_path):
    arms = {"none": Nothing(), "copies": Copies()}
    this = study(tmp_path, arms)
    this.work(this.cells([2], [0]), report=lambda text: None)
    changed = study(tmp_path, arms, settings={"arms": {"none": {}, "copies": {"x": 1}}})
    assert set(changed.records()) == {Cell("none", 2, 0)}
    assert not study(tmp_path, arms, settings={"held_out": 0.3}).records()


def test_the_union_is_of_the_two_best_and_keeps_what_they_gave(tmp_path):
    spy = Spy()
    invert = Policy([[("Invert", 1.0, None)]], "classification")
    arms = {"none": Nothing(), "inverted": Augmented({"i": invert}), "spy": spy, "both": Union()}
    this = study(tmp_path, arms, classifier=CLASSIFIER | {"steps": 30})
    cells = this.cells([4], [0])
    assert cells[-1].arm == "both"
    this.work(cells, report=lambda text: None)
    calls = len(spy.seen)
    record = this.records()[cells[-1]]
    assert set(record["setting"].split(" + ")) == {"inverted", "spy"} and len(spy.seen) == calls
    assert record["made_a_class"] == 4
    treatment = this._union(cells[-1])
    assert treatment.augmentation.sub_policies == invert.sub_policies
    assert torch.equal(treatment.made.images, this.source.task(4, 0).train.images)
    with pytest.raises(ConfigError, match="unites two"):
        study(tmp_path / "alone", {"spy": spy, "both": Union()})


@pytest.mark.parametrize("folds", [0, 2])
def test_a_search_divides_the_labelled_images_and_merges_the_best(monkeypatch, folds):
    seen: list[tuple[Labelled, Labelled]] = []

    def planted(self, policy):
        if not folds:
            seen.append((self.train, self.validation))
        return sum(op == "Rotate" for sub in policy.sub_policies for op, _, _ in sub) / 2

    monkeypatch.setattr(ClassifierReward, "__call__", planted)
    monkeypatch.setattr(DensityReward, "__call__", planted)
    space = classification_space(ops=("Rotate", "Invert"), num_sub_policies=2, num_ops=1, options={"fill": 7})
    arm = Searched(space, Random, 20, {"steps": 2, "batch_size": 4, "width": 2}, top=2, folds=folds)
    train = source().task(5, 0).train
    (treatment,) = arm.treatments(train, 2, 0, None)
    policy = treatment.augmentation
    assert {op for sub in policy.sub_policies for op, _, _ in sub} == {"Rotate"} and policy.fill == 7
    assert len(policy.sub_policies) == 4 * max(1, folds) and "search" in treatment.cost
    whole = {image.numpy().tobytes() for image in train.images}
    for parts in seen:
        first, second = ({image.numpy().tobytes() for image in part.images} for part in parts)
        assert first | second == whole and not first & second
    (alone,) = arm.treatments(source().task(1, 0).train, 2, 0, None)
    assert alone.augmentation is None and alone.made is None


def test_fewer_made_images_are_the_first_of_each_class(tmp_path, monkeypatch):
    class Many:
        needs_other = False

        def treatments(self, train, classes, seed, other):
            numbers = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 8, 8)
            yield Treatment(made=Labelled(numbers.contiguous(), torch.arange(12) % 2))

    used: list[set[int]] = []

    def train_classifier(data, augmentation, *, made=None, **options):
        used.append(set(made.images[:, 0, 0, 0].tolist()))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))

    monkeypatch.setattr("lit_gen.comparison.study.train_classifier", train_classifier)
    record = study(tmp_path, {"many": Many()}, made=[1, 3, 6]).measure(Cell("many", 1, 0))
    assert used == [set(range(12)), {0, 1}, set(range(6))] and list(record["curve"]) == ["1", "3"]


def test_differences_are_paired_by_seed():
    """Arm b is .1 better on every seed, however different the seeds are."""
    records = {}
    for seed, base in enumerate((0.2, 0.5, 0.8)):
        for shots, gain in ((1, 0.0), (5, 0.1)):
            for arm, more in (("none", 0.0), ("b", 0.1)):
                record = {"accuracy": base + gain + more, "seconds": {"arm": 2.0}, "phases": {}}
                records[Cell(arm, shots, seed)] = record | {"curve": {}, "made_a_class": 0, "setting": ""}
    found = overall(records, ["none", "b"], [1, 5])
    assert found["b"]["accuracy"]["mean"] == pytest.approx(0.65)
    assert found["b"]["accuracy"]["se"] == pytest.approx(0.3 / 3**0.5)
    difference = found["b"]["minus"]["none"]
    assert difference["mean"] == pytest.approx(0.1) and difference["se"] == pytest.approx(0, abs=1e-9)
    assert difference["better"] == difference["n"] == 3
    del records[Cell("b", 5, 2)]  # a seed that is not whole is left out of the mean over shots
    assert overall(records, ["none", "b"], [1, 5])["b"]["minus"]["none"]["n"] == 2
    assert summarize(records, ["none", "b"], [1, 5])["seconds"]["b"] == {"arm": 2.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*more)`: the command, with two arms, in `tmp_path`; its results."""

    def call(*more: str) -> dict:
        argv = ["compare-augmentation", "arms=[none,flips]", "shots=[2]", "seeds=2", "task.test_size=40"]
        argv += ["classifier.steps=3", "wandb=disabled", "device=cpu", f"out={tmp_path}"]
        monkeypatch.setattr("sys.argv", [*argv, *more])
        command()
        return json.loads((tmp_path / "results.json").read_text())

    return call


def test_the_command_writes_results_and_measures_nothing_twice(run, tmp_path, capsys):
    result = run()
    assert len(result["cells"]) == 4 and result["test_images"] == 40
    assert result["overall"]["flips"]["minus"]["none"]["n"] == 2
    assert (tmp_path / "arms.png").stat().st_size > 10_000 and "flips" in capsys.readouterr().out
    lines = (tmp_path / "cells.jsonl").read_text()
    run()
    assert (tmp_path / "cells.jsonl").read_text() == lines
    assert len(run("seeds=3")["cells"]) == 6
    assert (tmp_path / "cells.jsonl").read_text().startswith(lines)


@pytest.mark.slow
def test_worker_processes_measure_the_same(run, tmp_path):
    def accuracies(result):
        return {(c["arm"], c["shots"], c["seed"]): c["accuracy"] for c in result["cells"]}

    alone = accuracies(run())
    (tmp_path / "cells.jsonl").unlink()
    assert accuracies(run("workers=2")) == alone


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("shots=[0]", "shots=[0] at least 1"),
        ("seeds=0", "seeds=0"),
        ("held_out=1", "held_out=1.0 must lie within"),
        ("task.labels=wrong", "labels"),
        ("shots=[1000]", "shots=1000: class 0 has"),
        ("classifier.steps=null", "classifier.steps must be given"),
    ],
)
def test_mistakes_are_told(run, capsys, change, told):
    with pytest.raises(SystemExit):
        run(change)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "experiment" / "comparison").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_comparison_composes(compose, path):
    cfg = compose(f"experiment=comparison/{path.stem}", config_name="compare_augmentation")
    assert cfg.name == f"comparison-{path.stem}" and {"none", "copies"} < set(cfg.arms)
    assert (
        path.read_text()
        .splitlines()[1]
        .startswith(f"# lit-gen compare-augmentation experiment=comparison/{path.stem}")
    )

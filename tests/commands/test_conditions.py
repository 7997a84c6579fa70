"""A run on a folder of one's own with classes, a table of numbers, and masks: trained, sampled, measured,
restored, and encoded by the commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import lit_gen
from lit_gen.commands.encode import encode
from lit_gen.commands.evaluate import evaluate
from lit_gen.commands.restore import restore
from lit_gen.commands.sample import sample
from lit_gen.errors import ConfigError
from lit_gen.images import save_png
from lit_gen.inputs import pictures
from lit_gen.instantiate import allowing
from lit_gen.models import load
from lit_gen.score import Condition
from lit_gen.score.networks.embeddings import VectorEmbedding

N = 40


def write_data(root: Path) -> Path:
    """photos/{cat,dog}/i.png, masks of the same names of half their size, and a table."""
    generator = torch.Generator().manual_seed(0)
    rows = [["file", "angle", "age"]]
    for i in range(N):
        name = f"{'cat' if i % 2 else 'dog'}/{i:02d}.png"
        for kind, side in (("photos", 8), ("masks", 4)):
            picture = torch.randint(0, 256, (1, side, side), dtype=torch.uint8, generator=generator)
            save_png(picture, root / kind / name)
        rows.append([name, str(10 * i), str(1000 + i)])
    with (root / "photos" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def options(data: Path) -> list[str]:
    return [
        "data=folder", f"data.train.path={data}/photos", "data.image_size=8", "data.channels=1",
        "data.num_classes=2", "data.condition.vector=labels.csv", "data.condition.columns=[angle,age]",
        f"data.condition.image={data}/masks", "data.condition.image_size=4", "model.vector_dim=2",
        "model.condition_channels=1", "model.label_dropout=0.1", "data.batch_size=4",
        "model.condition_dropout.vector=0.2",
    ]  # fmt: skip


SHORT = ["trainer.max_steps=2", "~callbacks.quality", "callbacks.grid.num=4", "callbacks.checkpoint.every=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run(fit, folder, data):
    """A checkpoint whose weights are moved away from where nothing has an effect."""
    if not list(folder.rglob("moved.ckpt")):
        fit(folder, *options(data), *SHORT)
        path = next(folder.rglob("last.ckpt"))
        state, generator = torch.load(path, weights_only=True), torch.Generator().manual_seed(0)
        averages = next(v["shadow"] for k, v in state["callbacks"].items() if k.startswith("EMA"))
        for name, weight in averages.items():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            state["state_dict"][f"denoiser.net.{name}"].copy_(weight)
        torch.save(state, path.with_name("moved.ckpt"))
    return next(folder.rglob("moved.ckpt"))


def sampled(compose, run, out, *overrides):
    cfg = compose(
        f"run={run}", f"out={out}", "device=cpu", "num=6", "format=npz", *overrides, config_name="sample"
    )
    sample(cfg, out)
    with (out / "labels.csv").open() as file:
        return torch.from_numpy(np.load(out / "images.npz")["arr_0"]), list(csv.DictReader(file))


def test_training_records_the_mean_and_deviation_of_the_training_set(run, fit, folder, data, tmp_path):
    module, cfg, _ = load(run, device="cpu")
    embedding = next(part for part in module.modules() if isinstance(part, VectorEmbedding))
    table = lit_gen.models.conditions.instantiate(cfg.data).train.vectors
    assert len(table) < N  # a tenth is for testing
    assert_close(embedding.mean, table.mean(0))
    assert_close(embedding.std, table.std(0, correction=0))
    path = data / "photos" / "labels.csv"
    before = path.read_text()
    path.write_text(before.replace(",10", ",99"))  # a run that goes on keeps what it was trained with
    try:
        resumed = fit(tmp_path, *options(data), *SHORT, "trainer.max_steps=3", checkpoint=run)
    finally:
        path.write_text(before)
    again = next(part for part in resumed.module.modules() if isinstance(part, VectorEmbedding))
    assert torch.equal(again.mean, embedding.mean) and torch.equal(again.std, embedding.std)


def test_samples_are_told_the_test_images_conditions_unless_told_otherwise(run, compose, tmp_path):
    images, rows = sampled(compose, run, tmp_path / "a")
    cfg = load(run, device="cpu")[1]
    test = lit_gen.models.conditions.instantiate(cfg.data).test
    for i, row in enumerate(rows):
        item = test[i % len(test)]
        assert list(row) == ["index", "seed", "label", "angle", "age"] and row["index"] == str(i)
        assert [int(row["label"]), float(row["angle"]), float(row["age"])] == [
            item["label"],
            *item["vector"].tolist(),
        ]
    some, later = sampled(compose, run, tmp_path / "b", "first=4", "batch_size=1")
    assert (some[:2].int() - images[4:].int()).abs().max() <= 1 and later[:2] == rows[4:]


def test_each_kind_of_condition_is_given_by_an_option(run, compose, data, tmp_path):
    base, _ = sampled(compose, run, tmp_path / "base")
    told = {
        "name": ["label=dog"],
        "number": ["label=1"],
        "numbers": ["condition.vector=[30,1001]", f"condition.image={data}/masks/cat/01.png"],
        "table": [f"condition.vector={data}/photos/labels.csv", f"condition.image={data}/masks"],
    }
    found = {name: sampled(compose, run, tmp_path / name, *given) for name, given in told.items()}
    assert torch.equal(found["name"][0], found["number"][0]) and not torch.equal(found["name"][0], base)
    assert {row["label"] for row in found["name"][1]} == {"1"}
    assert {(row["angle"], row["age"], row["image"]) for row in found["numbers"][1]} == {
        ("30", "1001", "01.png")
    }
    assert [row["angle"] for row in found["table"][1]] == [str(10 * i) for i in range(6)]
    assert [row["image"] for row in found["table"][1]] == [f"cat/{i:02d}.png" for i in range(1, 12, 2)]
    one = lit_gen.load(run, device="cpu").sample(
        [2],
        label=0,
        condition=Condition(None, torch.tensor([[20.0, 1002.0]]), mask(data / "masks" / "cat" / "05.png")),
    )
    assert (one[0].int() - found["table"][0][2].permute(2, 0, 1).int()).abs().max() <= 1


def mask(path):
    return torch.from_numpy(np.array(Image.open(path)))[None, None] / 127.5 - 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["label=bird"], "label=bird: the classes are cat, dog"),
        (["label=2"], "label=2: the model's classes are 0 to 1"),
        (["condition.vector=[1]"], r"always told a condition image in training: give condition\.image"),
        (["condition.vector=[1,2,3]", "condition.image=MASK"], "vector of 3 numbers: the model takes 2"),
        (["condition.vector=[a]", "condition.image=MASK"], "give numbers"),
        (["condition.vector=no.csv", "condition.image=MASK"], r"no\.csv: there is no such file"),
        (["condition.vector=[1,2]", "condition.image=LARGE"], "16x16 .* at most 8x8"),
        (["guidance=classifier_free"], r"knows images without a image: .*condition_dropout\.image"),
        (["guidance=classifier_free", "guidance.parts=[age]"], "told a label, vector, image, and no age"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_fit_are_refused_before_sampling(run, compose, data, tmp_path, given, message):
    large = save_png(torch.zeros(1, 16, 16, dtype=torch.uint8), tmp_path / "large.png")
    given = [g.replace("MASK", f"{data}/masks/cat/01.png").replace("LARGE", str(large)) for g in given]
    with pytest.raises(ConfigError, match=message):
        sampled(compose, run, tmp_path / "out", *given)
    assert not list((tmp_path / "out").glob("*.csv"))


BY_VECTOR = ["guidance=classifier_free", "guidance.parts=[vector]"]


def test_guidance_by_a_part(run, compose, tmp_path):
    plain, _ = sampled(compose, run, tmp_path / "plain")
    guided, _ = sampled(compose, run, tmp_path / "guided", *BY_VECTOR)
    one, _ = sampled(
        compose, run, tmp_path / "one", *BY_VECTOR, "guidance.weight=1"
    )  # fmt: skip
    assert torch.equal(one, plain) and not torch.equal(guided, plain)


def test_evaluate_restore_and_encode_take_the_test_images_conditions(run, compose, tmp_path):
    out = tmp_path / "evaluation"
    cfg = compose(
        f"run={run}", f"out={out}", "num=8", "device=cpu", "nll_images=2", "t_min=0.01", "measures=[fd]",
        "extractor=pixels", "extractor.channels=1", config_name="evaluate",
    )  # fmt: skip
    record = evaluate(cfg, out)
    assert record["n_fake"] == 8 and "bits_per_dim" in json.dumps(record["results"])
    common = [f"run={run}", "num=3", "device=cpu"]
    restored = {}
    for name, size in (("a", 3), ("b", 2)):
        out = tmp_path / name
        cfg = compose(
            *common, f"out={out}", f"batch_size={size}", "method=pigdm", "method.num_steps=3", "lpips=null",
            "operator=super_resolution", config_name="restore",
        )  # fmt: skip
        restore(cfg, out)
        restored[name] = json.loads((out / "restoration.json").read_text())
    assert restored["a"]["restored"]["psnr"] == pytest.approx(restored["b"]["restored"]["psnr"], abs=1e-2)
    assert restored["a"]["labels"] == [0, 0, 1]
    out = tmp_path / "encoding"
    record = encode(compose(*common, f"out={out}", "interpolate=2", config_name="encode"), out)
    assert record["round_trip"]["rms"] < 0.02


def test_a_run_that_lacks_what_its_model_takes_is_refused(fit, data, tmp_path):
    wrong = {
        "model.vector_dim=3": r"model\.vector_dim=3, and data\.condition\.vector gives 2: set model\.vector",
        "model.vector_dim=0": r"model\.vector_dim=0, and data\.condition\.vector gives 2",
        "data.condition.image=null": r"condition_channels=1, and data\.condition\.image gives none",
        "model.condition_channels=3": r"gives 1: set model\.condition_channels=1, or data\.condition\.chan",
        "data.condition.columns=[angle,size]": r"labels\.csv has no column 'size'; it has angle, age",
    }
    for change, message in wrong.items():
        more = ["model.condition_dropout.vector=0"]
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path, *options(data), *SHORT, change, *more)


def test_a_vector_that_is_left_out_is_nan_in_the_labels(run, compose, data, tmp_path):
    _, rows = sampled(compose, run, tmp_path / "out", f"condition.image={data}/masks")
    assert [row["image"] for row in rows] == [f"cat/{i:02d}.png" for i in range(1, 12, 2)]
    assert {(row["angle"], row["age"]) for row in rows} == {("nan", "nan")}


def test_other_images_than_the_runs_have_no_class(run, compose, data):
    told = [f"condition.image={data}/masks", f"images={data}/photos", "num=3", f"run={run}"]
    module, run_cfg, _ = load(run, device="cpu")
    _, condition = pictures(compose(*told, config_name="restore"), run_cfg, module)
    assert list(condition.parts()) == ["image"]
    _, condition = pictures(compose(*told, "label=dog", config_name="restore"), run_cfg, module)
    assert condition.label.tolist() == [1, 1, 1]
    module.label_dropout = 0.0
    with pytest.raises(ConfigError, match="always told a class"):
        pictures(compose(*told, config_name="restore"), run_cfg, module)


def test_data_that_tell_conditions_may_be_what_was_allowed_when_the_model_was_loaded(run):
    cfg = load(run, device="cpu")[1]
    cfg.data._target_ = f"{__name__}.Data"
    with allowing([f"{__name__}."]):
        told = lit_gen.models.conditions.TestConditions(cfg)
    assert told.conditions([3]) == {"label": [3]}
    with pytest.raises(ConfigError, match="outside the packages"):
        lit_gen.models.conditions.TestConditions(cfg).conditions([3])


class Data:
    """Tells a class alone."""

    def __init__(self, **options):
        pass

    def vectors(self):
        return None

    def conditions(self, indices):
        return {"label": indices}

"""`lit-gen evaluate-images` and `evaluate` give the numbers of the functions on the same pixels."""

import json
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lit_gen import models
from lit_gen.commands.evaluate import evaluate
from lit_gen.commands.evaluate_images import evaluate_images, main
from lit_gen.data import digits
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import with_error
from lit_gen.images import save_png
from lit_gen.metrics import Estimate, digits64, frechet_distance, moments
from lit_gen.metrics.functional import frechet_infinity, inception_score
from lit_gen.metrics.kernels import kernel_distance
from lit_gen.metrics.neighbours import authenticity, precision_recall_density_coverage
from lit_gen.metrics.vendi import vendi_score

ID = digits64().id
GENERATED, REFERENCE = range(200, 500), range(260)  # of the training images, of the test images


def write(dataset, rows, folder):
    for i in rows:
        row = dataset[i]
        save_png(row["image"], folder / str(row["label"]) / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write(digits("train"), GENERATED, folder / "a")
    write(digits("test"), REFERENCE, folder / "b")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))


def run(compose, tmp_path, *overrides, name="out"):
    out = tmp_path / name
    name, body = (
        ("evaluate", evaluate) if "run=" in " ".join(overrides) else ("evaluate_images", evaluate_images)
    )
    cfg = compose("extractor=digits64", "batch_size=100", f"out={out}", *overrides, config_name=name)
    record = body(cfg, out)
    assert json.loads((out / "evaluation.json").read_text()) == record
    assert (out / "grid.png").is_file()
    return {entry["key"]: entry for entry in record["results"]}


def values(results):
    return {name: entry["value"] for name, entry in results.items()}


def images(split, rows):
    """In the order of the files: by class, then by number."""
    dataset = digits(split)
    rows = sorted(rows, key=lambda i: (int(dataset.labels[i]), i))
    return dataset.images[rows], dataset.labels[rows]


def features(split, rows):
    return digits64().with_logits(images(split, rows)[0])


def test_every_number_is_that_of_the_functions(compose, pictures, tmp_path):
    a, b = pictures / "a", pictures / "b"
    results = run(
        compose, tmp_path, f"images={a}", f"reference={b}", f"training={a}", "per_class=true", "k=3"
    )
    (fake, logits), (real, _) = features("train", GENERATED), features("test", REFERENCE)
    expected = {
        "fd": frechet_distance(moments(real), moments(fake)),
        "kd": kernel_distance(real, fake).value,
        "is": inception_score(logits).value,
        "authpct": authenticity(fake, fake).value,
        "fdtrain": 0,
        "vendi": vendi_score(fake).value,
        **{n: e.value for n, e in precision_recall_density_coverage(real, fake, 3).items()},
    }
    labels = images("train", GENERATED)[1], images("test", REFERENCE)[1]
    by_class = [
        frechet_distance(moments(real[labels[1] == c]), moments(fake[labels[0] == c])) for c in range(10)
    ]
    keys = {ID.key(name, 300): value for name, value in expected.items()}
    keys[ID.key("fdclass", 300)] = float(np.mean(by_class))
    keys |= {ID.key(f"fdclass{c}", int((labels[0] == c).sum())): by_class[c] for c in range(10)}
    found = values(results)
    infinity, copied = found.pop(ID.key("fdinf", 300)), found.pop(ID.key("ct", 300))
    assert found == pytest.approx(keys, rel=1e-6, abs=1e-12)
    shuffled = frechet_infinity(moments(real), fake[torch.randperm(300)])  # its prefixes are random ones
    assert infinity == pytest.approx(shuffled.value, abs=4 * shuffled.se)
    # The generated images are the training images.
    assert found[ID.key("authpct", 300)] == 0 and copied < -8
    assert results[ID.key("fd", 300)]["se"] > 0 and results[ID.key("fd", 300)]["n_real"] == 260
    assert (tmp_path / "out" / "nearest.png").is_file()


def test_folder_zip_and_npz_are_one(compose, pictures, tmp_path):
    b = f"reference={pictures / 'b'}"
    expected = values(run(compose, tmp_path, f"images={pictures / 'a'}", b, name="folder"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted((pictures / "a").rglob("*.png")):
            archive.write(path, path.relative_to(pictures / "a"))
    assert values(run(compose, tmp_path, f"images={tmp_path / 'a.zip'}", b, name="zip")) == expected
    pixels = images("train", GENERATED)[0].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    assert values(run(compose, tmp_path, f"images={tmp_path / 'a.npz'}", b, name="npz")) == expected


def test_statistics_files_and_chosen_measures(compose, pictures, tmp_path):
    a, real = f"images={pictures / 'a'}", features("test", REFERENCE)[0]
    of_images = values(run(compose, tmp_path, a, f"reference={pictures / 'b'}", "measures=[fd,is]"))
    assert list(of_images) == [ID.key("fd", 300), ID.key("is", 300)]
    m = moments(real)
    np.savez(tmp_path / "ttur.npz", mu=m.mean.numpy(), sigma=m.cov.numpy())
    np.savez(tmp_path / "adm.npz", mu=m.mean.numpy(), sigma=m.cov.numpy(), arr_0=np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "clean.npz", feats=real.numpy())
    (tmp_path / "edm2.pkl").write_bytes(
        pickle.dumps({"num_images": 260, "fid": {"mu": m.mean.numpy(), "sigma": m.cov.numpy()}})
    )
    said = ["reference_n=260", f"reference_resize={ID.resize}"]
    for name in ("ttur.npz", "adm.npz", "clean.npz", "edm2.pkl"):
        reference = f"reference={tmp_path / name}"
        found = values(run(compose, tmp_path, a, reference, *said, name=f"of {name}"))
        assert set(found) == {ID.key(name, 300) for name in ("fd", "fdinf", "is", "vendi")}, name
        assert found[ID.key("fd", 300)] == pytest.approx(of_images[ID.key("fd", 300)], rel=1e-9), name
    with pytest.raises(ConfigError, match=r"does not say reference_n nor reference_resize.*digits64"):
        run(compose, tmp_path, a, f"reference={tmp_path / 'ttur.npz'}", name="x")
    with pytest.raises(ConfigError, match="kd needs the reference's images"):
        run(compose, tmp_path, a, f"reference={tmp_path / 'ttur.npz'}", *said, "measures=[kd]", name="x")
    assert not (tmp_path / "x" / "evaluation.json").exists()


def test_images_of_other_sizes_are_brought_to_one(compose, pictures, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(pictures / "a", odd)
    save_png(torch.zeros(1, 9, 9, dtype=torch.uint8), odd / "0" / "odd.png")
    reference = f"reference={pictures / 'b'}"
    with pytest.raises(ConfigError, match=r"odd\.png is 9x9.*image_size=64"):
        run(compose, tmp_path, f"images={odd}", reference)
    assert run(compose, tmp_path, f"images={odd}", reference, "image_size=8", name="fits")


MISTAKES = {
    "images=a": "reference is missing: give reference=",
    "reference=a": "images is missing: give images=",
    "images=a reference=b measures=[fid]": "no metric 'fid': choose among fd, ",
    "images=a reference=b nll_images=8": "Key 'nll_images' not in",
    "images=a reference=b sampler=heun": "sampler",
    "images=a reference=nowhere": "no such folder",
    "images=a reference=b num=1": "at least two are needed",
    "images=a reference=b reference_n=5": "describe a statistics file",
    "images=a reference=b measures=[authpct]": "authpct needs the training images",
    "images=a reference=b k=0": "at least 1",
    "images=a reference=flat per_class=true": "same classes",
}


@pytest.mark.parametrize(("options", "says"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_end_with_one_message(pictures, tmp_path, monkeypatch, capfd, options, says):
    monkeypatch.chdir(pictures)
    if not (pictures / "flat").exists():
        write(digits("test"), range(0, 360, 36), pictures / "flat")
        for path in (pictures / "flat").rglob("*.png"):
            path.rename(pictures / "flat" / path.name)
    arguments = ["evaluate-images", "extractor=digits64", f"out={tmp_path}/out", *options.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    err = capfd.readouterr().err
    assert end.value.code == 2 and says in err and "Traceback" not in err, err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_run_has_the_same_measures(fit, compose, tmp_path):
    """And while it trains: what the callback logs is what the evaluation of the same samples says."""
    from lit_gen import runs

    run_folder = tmp_path / "run"
    measures = "callbacks.quality.measures=[fd,kd,precision,authpct]"
    experiment = fit(run_folder, measures, "callbacks.quality.final_images=96", "trainer.max_steps=10")
    OmegaConf.save(OmegaConf.create(_config(experiment)), run_folder / "config.yaml")
    logged = runs.history(run_folder)
    options = [f"run={run_folder}", "num=96", "checkpoint=last", "device=cpu"]
    results = run(compose, tmp_path, *options, "nll_images=4", name="ev")
    for name in ("fd", "kd", "precision", "authpct"):
        key = ID.key(name, 96)
        assert logged[key][10] == pytest.approx(results[key]["value"], rel=1e-5), name
        assert logged[f"se/{key}"][10] == pytest.approx(results[key]["se"], rel=1e-4), name
    assert 0 < results["bits_per_dim"]["value"] < 20 and results["bits_per_dim"]["se"] > 0
    record = json.loads((tmp_path / "ev" / "evaluation.json").read_text())
    assert 0 <= record["class_accuracy"] <= 1 and record["guidance"] is None
    for mistake, says in {
        "elbo_images=4": "a sum over the steps",
        "nll_images=4 t_min=90": "between 0 and 80",
    }.items():
        with pytest.raises(ConfigError, match=says):
            run(compose, tmp_path, *options, *mistake.split(), name="never")


def test_densities_of_a_run_are_the_likelihoods_of_its_denoiser(fit, compose, tmp_path):
    """Bound and bits/dim of a DDPM on the first test images, whatever the batch size."""
    from lit_gen.images import to_float
    from lit_gen.rng import PerSample
    from lit_gen.score.likelihood import variational_bound

    folder = tmp_path / "run"
    steps = ["model.process.betas.num_steps=50", "sampler=ddim", "sampler.num_steps=3"]
    experiment = fit(folder, "experiment=digits_ddpm", *steps, "trainer.max_steps=2")
    OmegaConf.save(OmegaConf.create(_config(experiment)), folder / "config.yaml")
    options = [f"run={folder}", "num=8", "checkpoint=last", "device=cpu", "elbo_images=5", "nll_images=3"]
    results = run(compose, tmp_path, *options, "batch_size=2", name="two")
    module = models.load(folder, "last", device="cpu")[0]
    x_0 = to_float(torch.stack([digits("test")[i]["image"] for i in range(5)]))
    bound = variational_bound(module.denoiser, x_0, generator=PerSample.keyed(1, range(5))).total
    assert results["bound"]["value"] == pytest.approx(bound.mean().item(), rel=1e-5)
    again = run(compose, tmp_path, *options, "batch_size=8", name="eight")
    for name in ("bound", "bits_per_dim"):
        assert results[name]["value"] == pytest.approx(again[name]["value"], rel=1e-5)


def _config(experiment):
    saver = next(c for c in experiment.trainer.callbacks if type(c).__name__ == "SaveConfig")
    return saver.config


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.0051634, 0.00082), "0.00516 ± 0.00082"),
        (Estimate(1234.56, 21.0), "1235 ± 21"),
        (Estimate(0.5, None), "0.5"),
        (Estimate(0.0, 7.5e-15), "0"),
        (Estimate(float("nan"), None), "none"),
    ],
)
def test_errors_say_how_many_digits_count(estimate, text):
    assert with_error(estimate) == text

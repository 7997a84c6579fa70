"""`benchmarks/gpu.py` on the CPU, at tiny sizes: the program that a GPU runs, all but its numbers."""

import json
import runpy
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The two modules, with one network, and of the steps the two variants that the targets compare."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import gpu_sections

    monkeypatch.setattr(gpu_sections, "VARIANTS", gpu_sections.VARIANTS[:2])
    monkeypatch.delitem(gpu_sections.NETWORKS, "DDPM++")
    monkeypatch.setattr(gpu, "tiny", gpu_sections.Setting(torch.device("cpu"), tiny=True), raising=False)
    return gpu


@pytest.mark.slow
def test_every_section_but_the_steps_of_one_network_runs_without_hydra(gpu, tmp_path, monkeypatch):
    for package in ("hydra", "omegaconf", "optuna", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it is an ImportError
    sections = {name: section for name, section in gpu.SECTIONS.items() if "DDPM++" not in name}
    record = gpu.benchmark(gpu.tiny, 600, tmp_path, sections)
    assert record == json.loads((tmp_path / "gpu.json").read_text())
    rows = {name: section["rows"] for name, section in record["sections"].items()}
    assert not [s for s in record["sections"].values() if {"error", "skipped"} & set(s)]
    assert [len(part) for part in rows.values()] == [2, 4, 4, 1, 1, len(rows["training on real images"])]
    assert rows["training on real images"][-1]["batches"] == 4
    eager, compiled = rows["training step of NCSN++"]
    said = record["sections"]["training step of NCSN++"]["remarks"]
    times = eager["ms"] / compiled["ms"]
    assert said[0].endswith(f"(target 3): {times:.2f}: {'pass' if times >= 3 else 'miss'}")
    assert eager["TFLOP/s"] * eager["ms"] == pytest.approx(compiled["TFLOP/s"] * compiled["ms"])
    table = (tmp_path / "gpu.md").read_text()
    assert f"| NCSN++ | float32 | channels_last | {eager['ms']:.4g} |" in table
    assert "random weights" in table and "scikit-learn's digits" in table


def test_a_section_that_fails_or_lacks_a_package_is_recorded_and_the_next_runs(gpu, tmp_path):
    def fails(setting, deadline, emit):
        emit({"a": 1.0})
        raise RuntimeError("out of memory\nand more")

    def lacks(setting, deadline, emit):
        import no_such_package  # noqa: F401

    seen = []

    def next_one(setting, deadline, emit):
        seen.append(json.loads((tmp_path / "gpu.json").read_text()))  # what a kill would leave
        emit({"b": None})

    sections = {"fails": (fails, 0.5), "lacks": (lacks, 0.25), "next": (next_one, 0.25)}
    record = gpu.benchmark(gpu.tiny, 1, tmp_path, sections)
    parts = record["sections"]
    assert parts["fails"]["rows"] == [{"a": 1.0}] and parts["fails"]["error"] == "RuntimeError: out of memory"
    assert parts["lacks"]["skipped"] == "needs the package no_such_package"
    assert parts["next"]["rows"] == [{"b": None}]
    assert seen[0]["sections"]["fails"] == parts["fails"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_a_training_on_cifar_where_there_is_some(gpu, tmp_path):
    dice = np.random.default_rng(0)
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"cifar10-{split}.zip", "w") as archive:
            for i in range(16):
                file = BytesIO()
                Image.fromarray(dice.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "png")
                archive.writestr(f"{i:02}.png", file.getvalue())
    setting = type(gpu.tiny)(torch.device("cpu"), tiny=True, data=tmp_path)
    name = "training on real images"
    section = gpu.benchmark(setting, 600, tmp_path / "out", {name: gpu.SECTIONS[name]})["sections"][name]
    assert section["remarks"][0] == "real images: CIFAR-10; features: pixels-of-8x8"
    assert section["rows"][-1]["batches"] == 4
    assert all(np.isfinite(row["fd_pixels-of-8x8_00000000_n8"]) for row in section["rows"])


def test_peaks_and_no_device(gpu, tmp_path, capsys):
    from gpu_sections import peak_of

    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA L40S", "TF32") == 183e12
    assert peak_of("Tesla V100-SXM2-16GB", "TF32") == 15.7e12 and peak_of("Tesla T4", "bf16") is None
    assert peak_of("Some card of 2031", "bf16") is None
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as ended:
            sys_argv, sys.argv = sys.argv, ["gpu.py", "--out", str(tmp_path / "out")]
            try:
                runpy.run_path(str(FOLDER / "gpu.py"), run_name="__main__")
            finally:
                sys.argv = sys_argv
        assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()

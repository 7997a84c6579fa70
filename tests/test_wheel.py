"""What a user gets from a wheel: conf/ inside it, found from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh virtual environment with the wheel in it, and this one's libraries for its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    return wheel, folder / "venv" / "bin" / "python"


def test_the_wheel_has_all_of_conf_and_the_weights(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    conf = {
        str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml") if "local" not in p.parts
    }
    assert {n.removeprefix("lit_gen/conf/") for n in names if n.startswith("lit_gen/conf/")} == conf
    assert {"lit_gen/metrics/weights/digits64.safetensors", "lit_gen/py.typed"} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "notebooks/", "benchmarks/"))]


@pytest.mark.slow
def test_it_trains_three_steps_from_another_folder(installed, tmp_path, tiny):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments):
        done = subprocess.run(
            [str(installed[1]), "-m", "lit_gen.train", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    ask = [str(installed[1]), "-c", "import lit_gen.cli as c; print(c.CONF_DIR)"]
    where = subprocess.run(ask, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert str(installed[1].parents[1]) in where.stdout, where.stdout + where.stderr
    assert "max_steps: 7" in run("--cfg", "job", "trainer.max_steps=7")
    mine = tmp_path / "my" / "experiment"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /experiment/digits\n  - _self_\nname: mine\n"
    )
    run("--config-dir", str(tmp_path / "my"), "experiment=mine", *tiny, "trainer.max_steps=3")
    assert list((tmp_path / "runs" / "mine").glob("*/summary.json"))

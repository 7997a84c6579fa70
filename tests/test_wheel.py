"""What a user gets from a release: one version, conf/ inside the wheel, the same bytes from every build."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import lit_gen

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
    shipped = {f"lit_gen/demo/weights/{name}/model.safetensors" for name in ("digits", "letters")}
    assert shipped <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "notebooks/", "benchmarks/"))]


def build_of_a_copy(folder: Path, modified: float) -> dict[str, str]:
    """SHA-256 of the wheel and the sdist of a copy whose files were all modified at that time."""
    kept = shutil.ignore_patterns(".git", "__pycache__", "docs", "notebooks", "tests", "runs", "site")
    shutil.copytree(ROOT, folder / "copy", ignore=kept)
    for path in (folder / "copy").rglob("*"):
        os.utime(path, (modified, modified))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([*build, str(folder / "copy")], check=True, capture_output=True, env=environment)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "dist").iterdir()}


def test_two_builds_are_the_same_bytes(tmp_path):
    first, second = (build_of_a_copy(tmp_path / str(t), t) for t in (1.0e9, 1.6e9))
    version = lit_gen.__version__
    assert first == second
    assert set(first) == {f"lit_gen-{version}.tar.gz", f"lit_gen-{version}-py3-none-any.whl"}
    pytest.importorskip("twine")
    check = [
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        *map(str, (tmp_path / "1600000000.0/dist").iterdir()),
    ]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_version_is_the_same_everywhere():
    version = lit_gen.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_image_runs_the_commands_of_the_readme():
    readme, dockerfile = ((ROOT / name).read_text() for name in ("README.md", "Dockerfile"))
    train, test = re.findall(r"^python3 -m venv .venv && \. .venv/bin/activate && (.*)$", readme, re.M)
    for command in (train, test):
        install, run = command.split(" && ")
        arguments = ", ".join(f'"{word}"' for word in run.split())
        assert re.search(
            rf"^RUN {re.escape(install).replace('install', 'install.*')}\nCMD \[{re.escape(arguments)}\]$",
            dockerfile,
            re.M,
        )


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

"""conf/sweeps: expanded as `wandb agent` expands them, the files give command lines that compose and run."""

import itertools
import subprocess
import sys

import pytest
import yaml

from lit_gen import runs
from lit_gen.cli import CONF_DIR
from lit_gen.instantiate import instantiate

FILES = sorted((CONF_DIR / "sweeps").glob("*.yaml"))


def load(path):
    return yaml.safe_load(path.read_text())


def corners(sweep):
    """Points of the space, every value of every parameter in one of them."""
    values = {}
    for name, given in sweep["parameters"].items():
        values[name] = given.get("values") or [given["min"], given["max"]]
    rows = itertools.zip_longest(*values.values())
    return [
        {n: options[0] if v is None else v for (n, options), v in zip(values.items(), row, strict=True)}
        for row in rows
    ]


def expand(sweep, point):
    """The agent's own functions on what the server would send for this point."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in point.items()}})
    macros |= {"program": [sweep["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    line = []
    for word in utils.create_sweep_command(list(sweep["command"])):
        whole = word.startswith("${") and word.endswith("}")
        line += macros[word[2:-1]] if whole else [word]
    return line


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_point_composes(compose, path):
    sweep = load(path)
    for point in corners(sweep):
        line = expand(sweep, point)
        assert line[:4] == ["/usr/bin/env", "python", "-m", "lit_gen.train"]
        cfg = compose(*line[4:])
        instantiate(cfg.sampler)  # refuses options of another sampler
        for name, value in point.items():
            if name != "sampler":  # a group
                node = cfg
                for part in name.split("."):
                    node = node[part]
                assert node == value, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_metric_is_one_that_the_run_logs(compose, path):
    sweep = load(path)
    cfg = compose(*expand(sweep, corners(sweep)[0])[4:])
    quality, name = cfg.callbacks.quality, sweep["metric"]["name"]
    n = quality.num_images
    if "early_terminate" in sweep:
        intermediate = {f"fid{n // 1000}k", f"fd_digits64_0184e91c_n{n}"}
        assert name in intermediate and name.startswith("fid") == ("inception" in quality.extractor._target_)
        evaluations = cfg.trainer.max_steps // quality.every
        assert evaluations >= 2 * sweep["early_terminate"]["min_iter"]
    else:
        assert name == "summary/fd"


@pytest.mark.slow
def test_a_command_line_runs(tmp_path, tiny):
    path = CONF_DIR / "sweeps" / "digits_bayes.yaml"
    sweep = load(path)
    line = expand(sweep, corners(sweep)[1])
    line[1] = sys.executable
    cheap = [o for o in tiny if not o.startswith(("model.net.base_channels", "trainer.max_steps"))]
    more = [
        "trainer=cpu",
        "trainer.max_steps=2",
        "callbacks.quality.every=2",
        f"hydra.run.dir={tmp_path}/run",
    ]
    done = subprocess.run([*line, *cheap, *more], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    config = runs.saved_config(tmp_path / "run")
    assert config.model.optimizer.lr == sweep["parameters"]["model.optimizer.lr"]["max"]
    assert len(runs.history(tmp_path / "run")["train/loss"]) == 2

"""The commands divide their images among processes: the files are those of one process; one that fails ends
all."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from lit_gen import devices
from lit_gen.cli import CONF_DIR
from lit_gen.commands import compare as comparing
from lit_gen.commands import encode as encoding
from lit_gen.commands import evaluate, evaluate_images
from lit_gen.commands import restore as restoring
from lit_gen.commands import sample as sampling
from lit_gen.errors import ConfigError

COMMANDS = {
    "sample png": (sampling.sample, ["run={run}", "num=20", "batch_size=8", "grid=12"]),
    "sample npz": (sampling.sample, ["run={run}", "num=20", "batch_size=8", "format=npz", "first=3"]),
    "evaluate": (evaluate.evaluate, ["run={run}", "num=20", "batch_size=8", "nll_images=10"]),
    "evaluate_images": (
        evaluate_images.evaluate_images,
        ["images={run}/pictures", "reference={run}/pictures", "num=20", "batch_size=8", "extractor=digits64"],
    ),
    "compare": (comparing.compare_runs, ["runs=[{run},{run}/]", "names=[a,b]", "num=20", "batch_size=8"]),
    "restore": (restoring.restore, ["run={run}", "num=3", "samples=2", "batch_size=4", "method.num_steps=3"]),
    "encode": (encoding.encode, ["run={run}", "num=3", "interpolate=3", "batch_size=2", "rtol=1e-2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(fit, folder, monkeypatch):
    """A run of two steps, trained once, and pictures of digits in its folder."""
    monkeypatch.setenv("LITGEN_CACHE", str(folder / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path = folder / "run"
    if not path.exists():
        experiment = fit(path, "trainer.max_steps=2", "callbacks.checkpoint.every=2")
        saver = next(c for c in experiment.trainer.callbacks if type(c).__name__ == "SaveConfig")
        OmegaConf.save(OmegaConf.create(saver.config), path / "config.yaml")
        from lit_gen.data import digits
        from lit_gen.images import save_png

        for i in range(30):
            save_png(digits("test")[i]["image"], path / "pictures" / f"{i:02d}.png")
    return path


@pytest.fixture
def configured(compose, run):
    def make(name, out):
        given = [option.format(run=run) for option in COMMANDS[name][1]]
        return compose(*given, "device=cpu", f"out={out}", config_name=name.split()[0])

    return make


def on_rank(body, cfg, out, cache):
    os.environ["LITGEN_CACHE"] = str(cache)  # so that the reference is divided too
    body(cfg, out)


def contents(folder):
    """{path: bytes, or what a JSON file says but for speeds and the number of processes}"""
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {p: json.loads(x, object_hook=_lasting) if p.suffix == ".json" else x for p, x in files.items()}


def _lasting(node):
    return {k: v for k, v in node.items() if k not in ("samples_per_second", "world_size")}


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-9, abs=1e-11) if isinstance(b, float) else b)


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_write_what_one_writes(name, configured, on_ranks, tmp_path):
    """Pictures and latents bit by bit, measures to the rounding of sums in another order."""
    body, one, two = COMMANDS[name][0], tmp_path / "one", tmp_path / "two"
    on_ranks(1, on_rank, body, configured(name, one), one, tmp_path / "cache of one")
    on_ranks(2, on_rank, body, configured(name, two), two, tmp_path / "cache of two")
    assert_same(contents(one), contents(two))
    assert list(one.glob("*.png"))


CHOICES = {
    "": 8,
    "images=250": 3,
    "device=cuda images=1000": 8,
    "device=cuda:1": 1,
    "device=cpu": 1,
    "devices=2 images=10": 2,
    "devices=3 device=cpu": 3,
    "devices=9": "there are 8 GPUs",
    "devices=0": "auto or a number",
    "devices=all": "auto or a number",
    "devices=2 device=cuda:1": "device=cuda:1 is one device",
}


@pytest.mark.parametrize(("options", "expected"), CHOICES.items())
def test_how_many_processes_eight_gpus_get(options, expected, compose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.RUN}))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("lit_gen.commands.sample", None))
    images = 1000 if "images=1000" in options else 250 if "images=250" in options else None
    given = [option for option in options.split() if not option.startswith("images=")]
    cfg = compose(*given, "batch_size=100", "out=x", config_name="sample")
    if isinstance(expected, int):
        assert devices.wanted(cfg, images) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            devices.wanted(cfg, images)


def test_only_a_command_starts_processes(compose, monkeypatch):
    """Neither a job of a sweep nor somebody's program that calls the entry point."""
    mode = {"mode": RunMode.RUN}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(mode))
    cfg = compose("devices=2", "out=x", config_name="sample")
    with pytest.raises(ConfigError, match="start yours by torchrun"):
        devices.wanted(cfg)
    mode["mode"] = RunMode.MULTIRUN
    with pytest.raises(ConfigError, match="job of a sweep"):
        devices.wanted(cfg)
    cfg.devices = "auto"
    assert devices.wanted(cfg) == 1


def command(run, *options, start=("-m",)):
    """The environment is that of a user, with the samplers below."""
    return [sys.executable, *start, "lit_gen", "sample", f"run={run}", "num=20", "batch_size=8", *options]


def environment(tmp_path, **more):
    paths = [str(tmp_path), str(CONF_DIR.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def call(tmp_path, arguments, **more):
    return subprocess.run(
        arguments,
        cwd=tmp_path,
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        timeout=1800,
    )


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}


@pytest.fixture
def assert_one_folder_like(run):
    """Checks the one new folder of samples in the run's folder."""
    before = set((run / "samples").glob("*"))

    def check(expected):
        (out,) = set((run / "samples").iterdir()) - before  # no process has made one of its own
        assert_same(contents(out), contents(expected))

    return check


@pytest.mark.slow
def test_a_plain_call_starts_processes(run, configured, tmp_path, assert_one_folder_like):
    sampling.sample(configured("sample png", tmp_path / "one"), tmp_path / "one")
    done = call(tmp_path, command(run, "grid=12", "device=cpu", "devices=2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 images of") == 1
    assert all(line.startswith("sampling:") for line in done.stderr.replace("\r", "\n").split("\n") if line)
    assert done.stderr.count("100%") == 1  # one progress bar
    assert_one_folder_like(tmp_path / "one")


@pytest.mark.slow
def test_torchrun(run, configured, tmp_path, assert_one_folder_like):
    sampling.sample(configured("sample png", tmp_path / "one"), tmp_path / "one")
    done = call(tmp_path, command(run, "grid=12", start=TORCHRUN))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 images of") == 1
    assert_one_folder_like(tmp_path / "one")


@pytest.mark.slow
def test_srun(run, configured, tmp_path, assert_one_folder_like):
    """As far as its environment goes."""
    sampling.sample(configured("sample png", tmp_path / "one"), tmp_path / "one")
    same = SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713", "SLURM_NODEID": "0"}
    tasks = [
        subprocess.Popen(
            command(run, "grid=12", "device=cpu"),
            cwd=tmp_path,
            env=environment(tmp_path, **same, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
        )
        for i in range(2)
    ]
    assert [task.wait(1800) for task in tasks] == [0, 0]
    assert_one_folder_like(tmp_path / "one")


@pytest.mark.slow
def test_a_mistake_is_told_once(run, tmp_path):
    before = list(run.glob("samples/*"))
    done = call(tmp_path, command(run, "devices=2", "device=cpu", "label=99"))
    assert (done.returncode, done.stderr) == (2, "lit_gen: label=99: the model's classes are 0 to 9.\n")
    assert list(run.glob("samples/*")) == before


SAMPLERS = """
import os, time
from pathlib import Path
from torch import distributed as dist

def failing(denoiser, x, *, rank, **_):
    if dist.get_rank() == rank:
        raise RuntimeError(f"no luck on {rank}")
    time.sleep(600)

def killed(denoiser, x, **_):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)

def waiting(denoiser, x, **_):
    Path(f"started{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(600)
"""


def sampler(tmp_path, name, *more):
    (tmp_path / "odd_samplers.py").write_text(SAMPLERS)
    node = ",".join([f"_target_:odd_samplers.{name}", "_partial_:true", *more])
    return ["allow_targets=[odd_samplers.]", f"+sampler={{{node}}}"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", [("-m",), TORCHRUN], ids=["plain", "torchrun"])
def test_one_that_fails_ends_the_others_and_says_why(run, tmp_path, rank, start):
    """While the others are at work, where no exchange would tell them."""
    options = [] if start == TORCHRUN else ["devices=2"]
    arguments = command(
        run, "device=cpu", *options, *sampler(tmp_path, "failing", f"rank:{rank}"), start=start
    )
    done = call(tmp_path, arguments)
    assert done.returncode != 0
    assert (
        done.stderr.count(f"RuntimeError: no luck on {rank}") == 1 and f"process {rank} of 2" in done.stderr
    )


@pytest.mark.slow
def test_one_that_is_killed_ends_the_others(run, tmp_path):
    done = call(tmp_path, command(run, "device=cpu", "devices=2", *sampler(tmp_path, "killed")))
    assert done.returncode != 0 and "terminated with code -9" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["INT", "TERM", "KILL"])
def test_no_process_outlives_the_main_one(run, tmp_path, how):
    """Ctrl-C in a terminal reaches all of them, the others the main one alone."""
    process = subprocess.Popen(
        command(run, "device=cpu", "devices=2", *sampler(tmp_path, "waiting")),
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = [tmp_path / f"started{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in started))
    main, other = (int(path.read_text()) for path in started)
    assert main == process.pid
    if how == "INT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, getattr(signal, f"SIG{how}"))
    assert process.wait(60) != 0
    wait_for(lambda: not alive(other))
    assert process.stderr.read().count("Traceback") <= (
        how == "INT"
    )  # the main process's own, if it had time


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=1800):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)

"""Malformed command lines by the hundred, hostile files, and secrets: one message, exit code 2, no trace."""

import contextlib
import io
import os
import pickle
import string
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gen import loggers, train
from lit_gen.commands import evaluate_images, report, restore, sample

words = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=12)
INTEGERS = ["seed", "log_every", "trainer.max_steps", "trainer.num_nodes", "trainer.accumulate_grad_batches"]
GROUPS = ["data", "model", "sampler", "metrics", "callbacks", "logger", "trainer", "experiment", "model/net"]
RANGES = {
    "trainer.max_steps": st.integers(-(10**6), 0),
    "data.batch_size": st.integers(-(10**6), 0) | st.integers(1438, 10**9),
    "data.num_workers": st.integers(-(10**6), -1),
    "callbacks.checkpoint.every": st.integers(-(10**6), 0),
    "callbacks.quality.num_images": st.integers(-(10**6), 1),
    "callbacks.ema.decay": st.floats(1, 1e6) | st.floats(-1e6, -1e-3),
    "model.label_dropout": st.floats(1.001, 1e6) | st.floats(-1e6, -1e-3),
}


def unknown_group(pair):
    group, name = pair
    from lit_gen.cli import CONF_DIR

    return not (CONF_DIR / group / f"{name}.yaml").exists() and name != "null"


def unparsable(text):
    try:
        OverridesParser.create().parse_override(f"seed={text}")
    except HydraException:
        return True
    except Exception:
        return False  # what breaks the parser itself is not ours to promise
    return False


malformed = st.one_of(
    st.builds("{}.{}x=1".format, st.sampled_from(["trainer", "model", "data", "callbacks.grid"]), words),
    st.builds("x{}=1".format, words),
    st.builds("{}={}".format, st.sampled_from(INTEGERS), st.builds("v{}".format, words)),
    st.tuples(st.sampled_from(GROUPS), st.builds("z{}".format, words)).filter(unknown_group).map("=".join),
    st.builds("seed={}".format, st.text("[]{}()'\",:=a1 ", min_size=1, max_size=10).filter(unparsable)),
    st.sampled_from(sorted(RANGES)).flatmap(lambda k: st.builds(f"{k}={{}}".format, RANGES[k])),
    st.builds(
        "model.process._target_={}.{}".format, st.sampled_from(["os", "subprocess", "builtins"]), words
    ),
    st.builds("resume=nowhere/{}".format, words),
    st.builds("~{}x".format, words),
)


def run(main, *arguments):
    """(exit code, standard error) of an entry point in this process."""
    err, out, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [main.__module__, *arguments]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return code, err.getvalue()


def check(override):
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            code, err = run(train.main, "trainer=cpu", "logger=csv", override)
        finally:
            os.chdir(before)
        assert code == 2, (override, code, err)
        assert err.strip() and "Traceback" not in err, (override, err)
        assert not list(Path(folder).iterdir()), (override, list(Path(folder).rglob("*")))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(malformed)
def test_malformed_overrides(override):
    check(override)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(malformed)
def test_two_hundred_malformed_overrides(override):
    start = time.process_time()  # a busy machine's clock says nothing
    check(override)
    assert time.process_time() - start < 20


class Hostile:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def png_bomb(side=60_000):
    """A valid PNG of side x side black pixels, a few kilobytes long."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def hostile_files(folder, flag):
    with zipfile.ZipFile(folder / "climbs.zip", "w") as archive:
        archive.writestr("../../climbed.png", b"")
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(300 << 20))
    (folder / "bomb").mkdir()
    (folder / "bomb" / "a.png").write_bytes(png_bomb())
    torch.save({"config": {}, "state_dict": {}, "x": Hostile(flag)}, folder / "hostile.ckpt")
    (folder / "hostile.pkl").write_bytes(pickle.dumps({"fid": Hostile(flag)}))
    torch.save(Hostile(flag), folder / "hostile.pth")
    (folder / "good").mkdir()


COMMANDS = {
    "a zip that climbs out": (
        evaluate_images,
        "images=climbs.zip reference=climbs.zip",
        "leads out of the archive",
    ),
    "a zip bomb": (evaluate_images, "images=bomb.zip reference=bomb.zip", "zip bomb"),
    "a picture of 3,600 million pixels": (evaluate_images, "images=bomb reference=bomb", "bomb/a.png"),
    "a hostile reference": (
        evaluate_images,
        "images=bomb reference=hostile.pkl reference_n=5 reference_resize=antialias8",
        "which is no array",
    ),
    "a hostile checkpoint": (sample, "run=hostile.ckpt", "cannot be read"),
    "hostile weights": (sample, "weights=hostile.pth model=ve", "hostile.pth"),
    "a hostile checkpoint to restore with": (restore, "run=hostile.ckpt", "cannot be read"),
    "a report of what is no run": (report, "run=good", "neither a run folder"),
}


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    hostile_files(folder, folder / "executed")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_files_are_refused_at_the_command_line(traps, monkeypatch, name):
    module, arguments, says = COMMANDS[name]
    monkeypatch.chdir(traps)
    before = sorted(path.name for path in traps.rglob("*"))
    extra = ["extractor=digits64"] if module is evaluate_images else []
    code, err = run(module.main, *arguments.split(), *extra)
    assert code == 2 and says in err and "Traceback" not in err, err
    assert sorted(path.name for path in traps.rglob("*")) == before
    assert not (traps / "executed").exists() and not (traps.parent.parent / "climbed.png").exists()


def test_the_account_s_key_is_in_no_file_of_a_run(fit, tmp_path, monkeypatch):
    import wandb

    secret = "0123456789abcdef" * 2 + "deadbeef"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    wandb.teardown()
    given = ["logger=default", f"logger.wandb.save_dir={tmp_path}", "logger.wandb.mode=offline"]
    experiment = fit(tmp_path, *given, "trainer.max_steps=10")
    loggers.close(experiment.trainer.loggers)
    wandb.teardown()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert not [path for path in files if secret.encode() in path.read_bytes()]

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lit_gen import loggers, runs


@pytest.fixture(autouse=True)
def own_wandb():
    """W&B reads its environment once a process: every test begins and leaves with none read."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def deaf_server():
    """A server on loopback that takes connections and never answers; its address."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept():
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


def records(folder):
    """The offline run's history, as W&B's own reader gives it."""
    file = next(folder.glob("wandb/offline-run-*/*.wandb"))
    out = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def test_no_account_means_offline(no_account, tmp_path):
    assert not loggers.has_account()
    logger = loggers.wandb(str(tmp_path))
    assert logger._offline


def test_a_key_in_the_environment_or_netrc_is_an_account(no_account, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n login user\n password 0123\n")
    os.chmod(tmp_path / ".netrc", 0o600)
    assert loggers.has_account()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert loggers.has_account()


def test_reachable_knows_an_open_port(deaf_server):
    assert loggers.reachable(deaf_server)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not loggers.reachable(f"http://127.0.0.1:{port}")


def test_a_server_that_hangs_at_init_means_offline(no_account, monkeypatch, tmp_path, deaf_server):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", deaf_server)
    with pytest.warns(UserWarning, match="logging offline"):
        logger = loggers.wandb(str(tmp_path), init_timeout=3)
    assert logger._offline
    logger.log_metrics({"a": 1.0}, step=1)
    loggers.close([logger])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_run_id_follows_from_the_folder(tmp_path):
    ids = [loggers.wandb(str(tmp_path / name), mode="offline")._id for name in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]


def test_a_training_leaves_names_steps_and_pictures_in_the_offline_run(fit, tmp_path):
    experiment = fit(
        tmp_path, "logger=default", f"logger.wandb.save_dir={tmp_path}", "logger.wandb.mode=offline"
    )
    loggers.close(experiment.trainer.loggers)
    text = json.dumps(records(tmp_path))
    for name in (
        "train/loss",
        "val/loss",
        "train/grad_norm",
        "samples/grid",
        "samples/trajectory",
        "fd_digits64",
        "trainer/global_step",
    ):
        assert name in text, name
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/grid_*.png"))) == 2


def _log_from(folder, first, last):
    """Call k logs two numbers, the first of a new name, as long as those that measures have."""
    logger = loggers.csv(str(folder))
    for k in range(first, last):
        logger.log_metrics({f"fd_{k}_{'x' * 200}": k, "train/loss": -k / 3}, step=k)


def _read(folder):
    """The number of calls of which something is read, after it was held against what they logged."""
    history = runs.history(folder)
    losses = history.pop("train/loss", {})
    names = [f"fd_{k}_{'x' * 200}" for k in range(len(history))]
    assert history == {name: {k: float(k)} for k, name in enumerate(names)}
    assert losses == {k: -k / 3 for k in range(len(losses))}
    assert len(losses) in (len(history), len(history) - 1)  # of the last call, perhaps the first line alone
    return len(history)


def test_a_reader_of_a_live_run_sees_what_was_logged_so_far(tmp_path):
    calls = 400
    writer = multiprocessing.get_context("fork").Process(target=_log_from, args=(tmp_path, 0, calls))
    writer.start()
    seen = [0]
    while writer.is_alive():
        seen.append(_read(tmp_path))
    assert seen == sorted(seen)
    assert writer.exitcode == 0 and _read(tmp_path) == calls


def test_a_kill_loses_nothing_that_was_logged_and_the_next_launch_goes_on(tmp_path):
    numbers = tmp_path / "metrics.csv"
    for _ in range(8):
        first = len(runs.history(tmp_path).get("train/loss", ()))  # a call that was torn is made again
        launch = multiprocessing.get_context("fork").Process(target=_log_from, args=(tmp_path, first, 10**9))
        size = numbers.stat().st_size if numbers.exists() else 0
        launch.start()
        while not numbers.exists() or numbers.stat().st_size < size + 40 * 250:  # in the middle of writing
            assert launch.is_alive()
        launch.kill()
        launch.join()
        assert _read(tmp_path) >= first + 20


def test_a_line_torn_at_any_byte_is_left_out_and_cut_off(tmp_path):
    _log_from(tmp_path / "whole", 0, 3)
    whole = (tmp_path / "whole" / "metrics.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in range(len(whole) + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "metrics.csv").write_bytes(whole[:kept])
        complete = whole[: whole.rfind(b"\n", 0, kept) + 1]
        calls = _read(folder)
        assert calls == max(0, complete.count(b"\n") // 2)
        loggers.csv(str(folder)).log_metrics({"again": 0.1}, step=7)
        assert (folder / "metrics.csv").read_bytes() == (complete or lines[0]) + b"7,again,0.1\n"


def test_a_later_launch_wins_where_it_logs_again(tmp_path):
    """As of a run that goes on from an earlier checkpoint, first by the logger of before `metrics.csv`."""
    (tmp_path / "csv" / "version_0").mkdir(parents=True)
    (tmp_path / "csv" / "version_0" / "metrics.csv").write_text("a,b,step\n1.0,,1\n1.0,1.0,2\n1.0,,3\n1.0,9")
    for value, steps in ((2.0, (2, 3, 4)), (3.0, (3,))):
        logger = loggers.csv(str(tmp_path))
        for step in steps:
            logger.log_metrics({"a": torch.tensor(value)}, step=step)
    a = {1: 1.0, 2: 2.0, 3: 3.0, 4: 2.0}
    assert runs.history(tmp_path) == {"a": a, "b": {2: 1.0}}


@pytest.mark.parametrize("there", ["", "a", "a,b,st", "a,b,step\n", "a,b,step\n1.0,2.0"])
def test_a_file_that_lightning_is_writing_anew_is_no_error(tmp_path, there):
    (tmp_path / "csv" / "version_0").mkdir(parents=True)
    (tmp_path / "csv" / "version_0" / "metrics.csv").write_text(there)
    assert runs.history(tmp_path) == {}


def test_a_hundred_thousand_lines_are_read_in_seconds(tmp_path):
    count = 100_000
    lines = "".join(f"{k},train/loss_noise_q{k % 4},0.12345678901234567\n" for k in range(count))
    (tmp_path / "metrics.csv").write_text("step,name,value\n" + lines)
    start = time.process_time()
    assert sum(map(len, runs.history(tmp_path).values())) == count
    assert time.process_time() - start < 5  # 0.3 on an EPYC

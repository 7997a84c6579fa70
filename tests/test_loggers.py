import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lit_gen import loggers


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
        timeout=60,
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


def test_csv_of_a_second_launch_keeps_the_first(tmp_path):
    for value in (1.0, 2.0):
        logger = loggers.csv(str(tmp_path))
        logger.log_metrics({"a": value}, step=int(value))
        logger.save()
    from lit_gen.runs import history

    assert history(tmp_path) == {"a": {1: 1.0, 2: 2.0}}

"""A W&B server that answers, then dies or falls silent in mid-run: the training does not notice."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import lightning.pytorch as pl
import pytest

from lit_gen import loggers


class Answers(BaseHTTPRequestHandler):
    """The few answers that `wandb.init` needs, and an empty one to everything else."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.paths.append(self.path)
        if self.server.silent.is_set():
            time.sleep(300)
        answer = {"limits": {}}
        if self.path.endswith("/graphql"):
            name = json.loads(asked).get("variables", {}).get("name") or "run"
            project = {"id": "UA==", "name": "lit_gen", "entity": {"id": "RQ==", "name": "me"}}
            bucket = {"id": "Qg==", "name": name, "displayName": name, "config": "{}", "project": project}
            viewer = {"id": "VQ==", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            files = {"runID": "Qg==", "uploadHeaders": [], "files": []}
            answer = {
                "data": {
                    "viewer": viewer,
                    "model": {"bucket": None},
                    "upsertBucket": {"bucket": bucket, "inserted": True},
                    "createRunFiles": files,
                }
            }
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_PUT = do_POST


@pytest.fixture
def server():
    one = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    one.paths, one.silent, one.daemon_threads, one.block_on_close = [], threading.Event(), True, False
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["dies", "falls silent"])
def test_a_server_that_fails_in_mid_run_costs_no_step_and_no_number(fit, tmp_path, monkeypatch, server, fate):
    import wandb

    for name, value in {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()
    given = [f"logger.wandb.save_dir={tmp_path}", "logger.wandb.mode=online", "logger.wandb.finish_timeout=4"]

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if pl_module.batches_seen == 5:
                if fate == "dies":
                    server.shutdown()
                    server.socket.close()
                else:
                    server.silent.set()

    experiment = fit(tmp_path, "logger=default", *given, callbacks=[Fails()])
    began = time.monotonic()
    loggers.close(experiment.trainer.loggers)
    assert time.monotonic() - began < 30
    wandb.teardown()
    assert any(path.endswith("/graphql") for path in server.paths)  # it was online
    assert experiment.module.batches_seen == 20
    file = next(tmp_path.glob("wandb/run-*/*.wandb")).read_bytes()
    assert file.count(b"train/loss_noise_q1") >= 20  # all is kept here for `wandb sync`
    assert len(list(tmp_path.glob("wandb/run-*/files/media/images/samples/grid_*.png"))) == 2

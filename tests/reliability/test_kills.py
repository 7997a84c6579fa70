"""What a training survives: kills at any moment, preemption, the death of a rank, a full disk."""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from trainings import assert_same, said, start, state, wait_for

from lit_gen import checkpoints, runs

pytestmark = pytest.mark.slow
KILLS, EVERY, STEPS = 10, 5, 400


def options(tiny, *more):
    skipped = ("trainer.max_steps", "callbacks.checkpoint")
    return [*(o for o in tiny if not o.startswith(skipped)), f"callbacks.checkpoint.every={EVERY}", *more]


def test_ten_kills_and_the_end_is_that_of_an_undisturbed_run(tmp_path, tiny):
    """Kill -9 at random moments after the first batch of each launch: in steps, saves and evaluations."""
    given = options(tiny, f"trainer.max_steps={STEPS}", "trainer=cpu", "logger=csv")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, *given).wait(600) == 0, said(whole)
    dice, last = random.Random(0), cut / "checkpoints" / "last.ckpt"
    killed, before = 0, 0
    while killed < KILLS:
        process = start(cut, *given)
        first = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda first=first: last.exists() and last.stat().st_mtime_ns > first, process=process)
        time.sleep(dice.uniform(0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
        seen = checkpoints.newest_good(cut)[1]["batches_seen"]
        assert seen >= before, "a resume lost what had been saved"
        logged = max(runs.history(cut).get("val/loss", {0: 0}))  # written to disk as soon as they are known
        assert seen > logged - 2 * EVERY, "more than an interval was lost"
        before = seen
        if seen >= STEPS:
            pytest.fail("the training was over before the last kill")
    assert start(cut, *given).wait(600) == 0, said(cut)
    assert "Traceback" not in said(cut)
    assert_same(state(cut), state(whole))
    ours, theirs = runs.history(cut), runs.history(whole)
    for name in ("train/loss", "val/loss"):
        assert ours[name].items() <= theirs[name].items(), name


def test_preemption_saves_queues_the_job_again_and_goes_on(tmp_path, tiny):
    """SIGUSR1 as SLURM sends it, with an scontrol that writes down what it is asked."""
    asked, tools = tmp_path / "asked", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tools / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    run = tmp_path / "run"
    given = options(
        tiny, "trainer=cpu", "logger=csv", "callbacks.signals.requeue=true", "trainer.max_steps=300"
    )
    process = start(run, *given, environment=environment)
    wait_for((run / "checkpoints" / "last.ckpt").exists, process=process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(1800) == 128 + signal.SIGUSR1, said(run)
    assert asked.read_text() == "requeue 77\n"
    seen = state(run)["batches_seen"]
    assert f"Stopped by SIGUSR1 after batch {seen}" in said(run) and seen < 300
    assert start(run, *given, environment=environment).wait(300) == 0
    assert state(run)["batches_seen"] == 300


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_the_others(tmp_path, tiny, victim):
    run = tmp_path / "run"
    process = start(run, *options(tiny, "trainer=ddp_cpu", "logger=csv", "trainer.max_steps=100000"))
    wait_for((run / "checkpoints" / "last.ckpt").exists, process=process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ranks = [p for p in family if "lit_gen.train" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[victim].kill()
    if victim == 0:
        process.wait(1800)  # the launcher itself; psutil would take its exit code away
        _, alive = psutil.wait_procs(ranks[1:], timeout=1800)
        for p in alive:
            p.kill()
        assert not alive, f"rank 1 was still there after half an hour: {said(run)[-2000:]}"
    else:
        assert process.wait(1800) not in (0, -signal.SIGKILL), said(run)[-2000:]
        assert not ranks[1].is_running() or ranks[1].status() == psutil.STATUS_ZOMBIE
    checkpoints.newest_good(run)  # and what it had saved can be read


def _mount(folder: Path, megabytes: int) -> bool:
    folder.mkdir(parents=True)
    if shutil.which("mount") is None:
        return False
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
    )
    return mounted.returncode == 0


def test_a_full_disk_is_said_with_what_is_needed_and_the_checkpoint_lives(tmp_path, tiny):
    run, disk = tmp_path / "run", tmp_path / "disk"
    if os.geteuid() != 0 or not _mount(disk, 4):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        run.mkdir()
        (run / "checkpoints").symlink_to(disk)
        given = options(tiny, "trainer=cpu", "logger=csv")
        assert start(run, *given, "trainer.max_steps=5").wait(300) == 0, said(run)
        before = (disk / "last.ckpt").read_bytes()
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free - len(before) // 2))
        process = start(run, f"resume={run}", "trainer.max_steps=50")
        assert process.wait(300) == 1
        message = said(run).splitlines()[-1]
        assert "No space left on device: could not write" in message and "last.ckpt" in message
        needed = float(message.split("which needs ")[1].split(" MiB")[0]) * 2**20
        assert 0.5 * len(before) < needed <= len(before)
        assert "Traceback" not in said(run)
        assert (disk / "last.ckpt").read_bytes() == before
        assert {p.name for p in disk.iterdir()} <= {"last.ckpt", "previous.ckpt", "best.ckpt", "filler"}
        (disk / "filler").unlink()
        assert start(run, f"resume={run}", "trainer.max_steps=50").wait(300) == 0, said(run)
        assert state(run)["batches_seen"] == 50
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_becomes_read_only_is_named(tmp_path, tiny):
    """Also for root, whom permissions do not stop: the folder is replaced by a file."""
    run = tmp_path / "run"
    given = options(tiny, "trainer=cpu", "logger=csv", "trainer.max_steps=100000")
    process = start(run, *given)
    wait_for((run / "checkpoints" / "last.ckpt").exists, process=process)
    (run / "checkpoints").rename(run / "moved")
    (run / "checkpoints").write_text("")
    assert process.wait(1800) == 1
    assert "could not write" in said(run) or "File exists" in said(run)
    assert stat.S_ISREG((run / "checkpoints").stat().st_mode)
    checkpoints.read(run / "moved" / "last.ckpt")

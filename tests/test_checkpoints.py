import multiprocessing
import os
import time
from itertools import count

import pytest
import torch

from lit_gen import checkpoints
from lit_gen.errors import ConfigError, Exit


def save(path, step, size=1000):
    state = {"config": {}, "state_dict": {"w": torch.full((size,), float(step))}, "batches_seen": step}
    checkpoints.AtomicCheckpointIO().save_checkpoint(state, path)


def test_the_newest_good_one_is_found_and_the_bad_one_named(tmp_path):
    where = checkpoints.folder(tmp_path)
    save(where / "best.ckpt", 5)
    save(where / "previous.ckpt", 10)
    save(where / "last.ckpt", 20)
    assert checkpoints.newest_good(tmp_path)[0].name == "last.ckpt"
    size = (where / "last.ckpt").stat().st_size
    with open(where / "last.ckpt", "r+b") as file:
        file.truncate(size // 2)
    path, state, bad = checkpoints.newest_good(tmp_path)
    assert (path.name, state["batches_seen"]) == ("previous.ckpt", 10)
    assert len(bad) == 1 and "last.ckpt" in bad[0] and f"{size // 2} bytes" in bad[0]


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    save(path, 1)
    data = bytearray(path.read_bytes())
    where = data.find(torch.full((10,), 1.0).numpy().tobytes())
    data[where + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        checkpoints.read(path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoints.read(path)


def test_official_weights_are_not_taken_for_a_run(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="weights="):
        checkpoints.read(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoints.read(tmp_path / "b.ckpt")


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"config": {}, "state_dict": {}, "x": Hostile()}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoints.read(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "module, name",
    [("os", "getcwd"), ("torch.distributed.checkpoint.metadata", "os.getcwd"), ("torch", "load")],
)
def test_code_in_the_index_of_a_sharded_checkpoint_is_not_executed(tmp_path, module, name):
    """A name with a dot reaches the modules that a harmless module imports."""
    torch.save({"config": {}, "state_dict": {"w": torch.empty(2, device="meta")}}, tmp_path / "rest.pt")
    words = (b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"".join(words) + b"\x93)R.")  # calls it
    with pytest.raises(ConfigError, match=f"asks for {module}.{name}, which was refused, not run"):
        checkpoints.read(tmp_path)


def _save_again_and_again(path, saved):
    torch.set_num_threads(1)
    for k in count(1):
        save(path, k, 2_000_000)
        saved.value = k


def test_a_kill_in_a_save_leaves_the_previous_file(tmp_path):
    """Saves in a loop in another process, a fork, killed at whatever moment of a save it is."""
    path, fork = tmp_path / "last.ckpt", multiprocessing.get_context("fork")
    save(path, 0, 2_000_000)
    saved = fork.Value("i", 0)
    process = fork.Process(target=_save_again_and_again, args=(path, saved))
    process.start()
    deadline = time.monotonic() + 1800
    while saved.value < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert saved.value >= 3
    state = checkpoints.read(path)
    assert torch.equal(state["state_dict"]["w"], torch.full((2_000_000,), float(state["batches_seen"])))


def test_a_full_disk_is_said_and_the_previous_file_lives(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exit, match=r"No space left on device: could not write .*last\.ckpt") as stop:
        save(path, 2)
    assert stop.value.code == 1 and isinstance(stop.value.__cause__, OSError)
    assert checkpoints.read(path)["batches_seen"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

"""Reading foreign files: hostile ones are refused before they run, broken ones named."""

import collections
import io
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.pretrained import unpickle


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "system"),
        (eval, "eval"),
        (subprocess.check_output, "check_output"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_refused_and_does_not_run(tmp_path, function, name, protocol):
    flag = tmp_path / "ran"
    argument = f"__import__('pathlib').Path({str(flag)!r}).touch()" if function is eval else f"touch {flag}"
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(pickle.dumps({"ema": Hostile(function, argument)}, protocol))
    # Old protocols write the module by its name in Python 2.
    with pytest.raises(ConfigError, match=rf"asks for \w+\.{name}, .* refused, not run"):
        unpickle.load(path)
    assert not flag.exists()


def test_code_in_torch_files_and_storages_is_refused(tmp_path):
    flag = tmp_path / "ran"
    torch.save({"model": Hostile(os.system, f"touch {flag}")}, tmp_path / "a.pth")
    torch.save(Hostile(os.system, f"touch {flag}"), tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    buffer = io.BytesIO()
    torch.save(Hostile(os.system, f"touch {flag}"), buffer)
    loader = Hostile(torch.storage._load_from_bytes, buffer.getvalue())
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"ema": loader}))
    for name in ("a.pth", "b.pth", "c.pkl"):
        with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
            unpickle.load(tmp_path / name)
    assert not flag.exists()


def test_known_packages_become_records_that_do_nothing(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    path = tmp_path / "x.pkl"
    hostile = Hostile(torch.hub.load, "owner/repo", "model")  # would fetch and run code
    path.write_bytes(pickle.dumps({"net": module, "array": np.arange(3), "hub": hostile}))
    content = unpickle.load(path)
    assert isinstance(content["hub"], unpickle.Record) and content["hub"].args == ("owner/repo", "model")
    assert isinstance(content["array"], unpickle.Record)
    found = dict(unpickle.tensors(content["net"]))
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in module.state_dict().items())


def test_torch_files_of_every_layout_load(tmp_path):
    content = {"a": torch.arange(3.0), "lr": np.float64(0.1), "list": [torch.ones(2)], "n": 3}
    content["state"] = collections.OrderedDict(b=torch.eye(2))
    for new in (True, False):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        loaded = unpickle.load(tmp_path / "x.pth")
        assert torch.equal(loaded["a"], content["a"]) and float(loaded["lr"]) == 0.1 and loaded["n"] == 3
        assert torch.equal(loaded["state"]["b"], torch.eye(2))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": content["a"]}, tmp_path / "x.safetensors")
    assert torch.equal(unpickle.load(tmp_path / "x.safetensors")["a"], content["a"])


@pytest.mark.parametrize("new", [True, False])
def test_truncated_files_are_named(tmp_path, new):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=new)
    for part in (0.9, 0.5, 0.01):
        (tmp_path / "part.pth").write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(ConfigError, match=r"part.pth cannot be read as a checkpoint .* truncated"):
            unpickle.load(tmp_path / "part.pth")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        unpickle.load(tmp_path / "no.pth")
    for name, data in {
        "a.png": b"\x89PNG\r\n",
        "b.txt": b"hello",
        "c.pth": b"",
        "d.zip": b"PK\x03\x04rest",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name} cannot be read as a checkpoint"):
            unpickle.load(tmp_path / name)

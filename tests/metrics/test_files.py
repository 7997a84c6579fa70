"""Statistics files of others are read as what they are, and only with what they do not say; records say
everything.
"""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.images import grid
from lit_gen.metrics import (
    Estimate,
    files,
    frechet_distance,
    moments,
    read_images,
    read_reference,
    records,
)

FEATURES = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
STATISTICS = {"mu": FEATURES.double().mean(0).numpy(), "sigma": np.cov(FEATURES.double().numpy().T)}


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def write(kind: str, tmp_path):
    if kind == "mu and sigma":
        return npz(tmp_path / "a.npz", **STATISTICS)
    if kind == "guided-diffusion":
        images = np.zeros((3, 4, 4, 3), np.uint8)
        return npz(tmp_path / "b.npz", arr_0=images, mu_s=np.zeros(9), sigma_s=np.eye(9), **STATISTICS)
    if kind == "clean-fid features":
        return npz(tmp_path / "c.npz", feats=FEATURES.numpy())
    protocol = int(kind[-1])
    content = {"num_images": 40, "fid": STATISTICS, "fd_dinov2": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(content, protocol))
    return tmp_path / "d.pkl"


KINDS = ["mu and sigma", "guided-diffusion", "clean-fid features", "EDM2, protocol 3", "EDM2, protocol 5"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_published_files(kind, tmp_path, pixels):
    found = read_reference(write(kind, tmp_path), pixels.id, n=40, resize="none")
    assert found.n == 40
    assert frechet_distance(found, moments(FEATURES)) == pytest.approx(0, abs=1e-12)


def test_what_the_file_does_not_say_must_fit(tmp_path, pixels):
    path = write("mu and sigma", tmp_path)
    with pytest.raises(ConfigError, match="made with resize=tf1, the extractor uses none"):
        read_reference(path, pixels.id, n=40, resize="tf1")
    with pytest.raises(ConfigError, match="features of 40 images, n=50 was given"):
        read_reference(write("clean-fid features", tmp_path), pixels.id, n=50, resize="none")
    pkl = write("EDM2, protocol 5", tmp_path)
    with pytest.raises(ConfigError, match="has 3 features, pixels"):
        read_reference(pkl, pixels.id, n=40, resize="none", section="fd_dinov2")
    with pytest.raises(ConfigError, match="no section 'kid' but"):
        read_reference(pkl, pixels.id, n=40, resize="none", section="kid")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def bad_files(tmp_path):
    (tmp_path / "cut.npz").write_bytes(write("mu and sigma", tmp_path).read_bytes()[:300])
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps({"fid": Hostile()}))
    npz(tmp_path / "object.npz", mu=np.array([Hostile()], object), sigma=np.eye(2))
    npz(tmp_path / "other.npz", weights=np.zeros(3))
    npz(tmp_path / "nan.npz", mu=np.full(16, np.nan), sigma=np.eye(16))
    npz(tmp_path / "skew.npz", mu=np.zeros(16), sigma=np.arange(256.0).reshape(16, 16))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 58,)}
    )
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
    return {
        "cut.npz": "zip",
        "hostile.pkl": "builtins.exec",
        "object.npz": "pickle",
        "other.npz": "weights",
        "nan.npz": "not finite",
        "skew.npz": "not symmetric",
        "liar.npz": "cannot be read",
        "none.npz": "There is no reference file",
    }


def test_damaged_and_hostile_files_are_refused(tmp_path, pixels):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(ConfigError, match=message):
            read_reference(tmp_path / name, pixels.id, n=40, resize="none")


def test_a_zip_bomb_is_refused_unopened(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1000)
    path = npz(tmp_path / "bomb.npz", mu=np.zeros(16), sigma=np.zeros((100, 100)))
    assert path.stat().st_size < 1000
    with pytest.raises(ConfigError, match="sigma would unpack to 80128 bytes"):
        read_reference(path, pixels.id, n=40, resize="none")


def test_images_of_an_npz(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (5, 6, 7, 3), np.uint8)
    got = read_images(npz(tmp_path / "samples.npz", arr_0=images, arr_1=np.zeros(5)))
    assert torch.equal(got, torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert grid(got).dtype == torch.uint8
    with pytest.raises(ConfigError, match="arr_0 of float64"):
        read_images(npz(tmp_path / "float.npz", arr_0=images / 255))
    with pytest.raises(ConfigError, match="cannot be read as images"):
        read_images(npz(tmp_path / "none.npz", mu=images))


def test_records_say_what_a_number_depends_on(pixels):
    key = pixels.id.key("fd", 50)
    entries = records(
        {key: Estimate(1.5, 0.1)}, pixels, n_real=90, n_fake=50, reference="digits/test", seed=3
    )
    (entry,) = json.loads(json.dumps(entries, allow_nan=False))
    assert (entry["key"], entry["value"], entry["se"]) == (key, 1.5, 0.1)
    assert (entry["n_real"], entry["n_fake"], entry["seed"], entry["world_size"]) == (90, 50, 3, 1)
    assert entry["extractor"] == vars(pixels.id) and entry["reference"] == "digits/test"
    assert entry["versions"]["torch"] == torch.__version__
    (absent,) = records({key: Estimate(float("nan"), None)}, pixels, n_real=9, n_fake=0, reference="")
    assert absent["value"] is None

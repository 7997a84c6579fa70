"""The 2015 Inception: torch-fidelity's features from the folded graph, its resizes, and what happens without
its weights.
"""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_gen.errors import ConfigError
from lit_gen.metrics import weights_files
from lit_gen.metrics.extractors import ExtractorId
from lit_gen.metrics.inception import (
    WEIGHTS,
    inception2015,
    inception2015_clean,
    resize_pil_bicubic,
    resize_tf1,
)


class Blank(FeatureExtractorInceptionV3):
    """The graph as it is initialised, to read its names and shapes from."""

    def load_state_dict(self, state):
        pass


def seeded_state(seed: int = 31) -> dict[str, torch.Tensor]:
    """The recipe of expected_images.json (inception_seed<seed>)."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    shapes = Blank("blank", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    random, state = np.random.RandomState(seed), {}
    for key in sorted(shapes):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        z = random.standard_normal(tuple(shapes[key].shape))
        if key.endswith("conv.weight"):
            z = z * np.sqrt(2 / np.prod(z.shape[1:]))
        elif key.endswith("bn.weight"):
            z = 1 + 0.1 * z
        elif key.endswith("running_var"):
            z = 1 + 0.2 * np.abs(z)
        elif key == "fc.weight":
            z = z / np.sqrt(2048)
        else:
            z = 0.1 * z
        state[key] = torch.from_numpy(z.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(seeded_state(), path)
    return path


@pytest.mark.parity
def test_features_are_torch_fidelity_s(goldens, tmp_path):
    folder = goldens / "metrics"
    recorded = json.loads((folder / "expected_images.json").read_text())
    (name,) = (key for key in recorded if key.startswith("inception_seed"))
    state = seeded_state(int(name.removeprefix("inception_seed")))
    digest = hashlib.sha256()
    for _, value in sorted(state.items()):
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest() == recorded[name]["sha256_of_all_tensors_sorted"]
    torch.save(state, tmp_path / "seeded.pth")
    images = np.load(folder / "images_A_B.npz")
    expected = np.load(folder / f"{name}_features.npz")
    extractor = inception2015(tmp_path / "seeded.pth")
    for name in images.files:
        n = min(2, len(expected[f"{name}_2048"]))
        features, logits = extractor.with_logits(torch.from_numpy(images[name][:n]))
        for got, layer in ((features, "2048"), (logits, "logits_unbiased")):
            want = torch.from_numpy(expected[f"{name}_{layer}"][:n])
            assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parity
def test_resizes_are_tf1_s_and_pil_s(goldens):
    recorded = np.load(goldens / "metrics" / "resize.npz")
    for way in (name.removesuffix("_in") for name in recorded.files if name.endswith("_in")):
        x = torch.from_numpy(recorded[f"{way}_in"]).float()
        tf1, pil = (
            torch.from_numpy(recorded[f"{way}_{kind}"]) for kind in ("tf1", "pil_bicubic_float_clean")
        )
        assert torch.equal(resize_tf1(x, tf1.shape[-1]), tf1)
        assert torch.equal(resize_pil_bicubic(x, pil.shape[-1]), pil)


def test_tf1_s_resize_has_no_half_pixel():
    # Doubling: position i / 2, so even pixels are kept and odd ones are midpoints; the last repeats.
    x = torch.tensor([[[[0.0, 10.0, 30.0]]]])
    assert resize_tf1(x.expand(1, 1, 6, 3), 6)[0, 0, 0].tolist() == [0, 5, 10, 20, 30, 30]


def test_only_the_true_weights_may_be_called_fid(seeded):
    extractor = inception2015_clean(seeded)
    assert extractor.id.key("fd", 50_000) == f"fd_inception-2015-12-05_{extractor.id.hash8}_n50000"
    true = ExtractorId("inception-2015-12-05", "1", "6726825d" + "0" * 56, "tf1", "2048", 2048)
    keys = [true.key(metric, n) for metric, n in (("fd", 50_000), ("fd", 1797), ("kd", 5000), ("pr", 10))]
    assert keys == ["fid50k", "fid1797", "kid5k", "pr_inception-2015-12-05_6726825d_n10"]


def test_grey_is_repeated_and_an_empty_batch_is_empty(seeded):
    extractor = inception2015(seeded)
    grey = torch.randint(0, 256, (1, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    assert extractor(grey[:0]).shape == (0, 2048)


def test_without_the_weights_the_message_says_where_and_what(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("LITGEN_WEIGHTS", str(tmp_path))

    def offline(url, timeout):
        assert url == WEIGHTS.url
        raise OSError("Name or service not known")

    monkeypatch.setattr(weights_files.urllib.request, "urlopen", offline)
    with pytest.raises(ConfigError) as error:
        inception2015()
    for part in (*WEIGHTS.files, str(tmp_path), "checkpoints (absent)", "Name or service", "digits64"):
        assert part in str(error.value)


def test_bad_weights_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nowhere\.pth is no file"):
        inception2015(tmp_path / "nowhere.pth")
    torch.save({"conv": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth does not hold the Inception weights"):
        inception2015(tmp_path / "other.pth")
    (tmp_path / WEIGHTS.files[0]).write_bytes(b"cut short")
    monkeypatch.setenv("LITGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError, match="is damaged: its sha256 starts with"):
        inception2015()
    monkeypatch.setenv("LITGEN_WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(ConfigError, match="is no folder"):
        inception2015()


def test_a_download_is_kept_only_with_the_published_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.delenv("LITGEN_WEIGHTS", raising=False)
    monkeypatch.setattr(weights_files.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"content"))
    good = hashlib.sha256(b"content").hexdigest()
    published = weights_files.Published("weights", ("w.pth",), "https://example.org/w.pth", good[:8], "7 B")
    path, digest = weights_files.find_weights(published)
    assert (path.read_bytes(), digest) == (b"content", good)
    path.unlink()
    bad = weights_files.Published("weights", ("w.pth",), "https://example.org/w.pth", "00000000", "7 B")
    with pytest.raises(ConfigError, match="another sha256"):
        weights_files.find_weights(bad)
    assert list(path.parent.iterdir()) == []


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_hostile_pickle_does_not_run(tmp_path):
    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ConfigError, match="does not hold"):
        inception2015(tmp_path / "hostile.pth")

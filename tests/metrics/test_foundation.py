"""CLIP and DINOv2 with small random weights in the published layouts: torch-fidelity's features, our names
and messages.
"""

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP

from lit_gen.errors import ConfigError
from lit_gen.metrics import Evaluation, clip, compare, dinov2, weights_files
from lit_gen.metrics.kernels import cmmd

MODEL = "clip-vit-b-32"
IMAGES = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Node(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A TorchScript archive whose state_dict has the names of OpenAI's, width 64, one layer, 2 x 2 patches of
    16.
    """
    torch.manual_seed(0)
    state = CLIPVisual(32, 32, 1, 64, 16).state_dict() | {"text_projection": torch.zeros(8, 32)}
    root = Node()
    for name, value in state.items():
        node, *path = root, *name.split(".")[:-1]
        for part in path:
            if not hasattr(node, part):
                setattr(node, part, Node())
            node = getattr(node, part)
        node.register_parameter(name.split(".")[-1], nn.Parameter(value, requires_grad=False))
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.jit.script(root).save(path)
    return path


def test_clip_s_features_and_names(archive):
    extractor = clip(MODEL, archive)
    direct = FeatureExtractorCLIP(MODEL, ["clip"], feature_extractor_weights_path=str(archive))
    assert torch.equal(extractor(IMAGES), direct(IMAGES)[0])
    assert extractor.id.d == 32
    assert extractor.id.key("fd", 50_000) == f"fd_clip-vit-b-32_{weights_files.sha256_of(archive)[:8]}_n50000"
    real, fake = Evaluation(extractor), Evaluation(extractor)
    real.update(IMAGES, torch.arange(12))
    fake.update(IMAGES.flip(-1), torch.arange(12))
    real, fake = real.summary(), fake.summary()
    unit = [x / x.norm(dim=1, keepdim=True) for x in (real.features, fake.features)]
    value = compare(real, fake)[extractor.id.key("cmmd", 12)].value
    assert value == pytest.approx(cmmd(*unit).value, rel=1e-4)


def test_clip_s_messages(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model=clip is no CLIP; there are clip-rn50, "):
        clip("clip")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"bad\.pt does not hold OpenAI's CLIP weights"):
        clip(MODEL, tmp_path / "bad.pt")

    def offline(url, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.delenv("LITGEN_WEIGHTS", raising=False)
    monkeypatch.setattr(weights_files.urllib.request, "urlopen", offline)
    with pytest.raises(
        ConfigError, match=r"needs OpenAI's CLIP weights.*Name or service not known.*digits64"
    ):
        clip(MODEL)


def test_dinov2_comes_from_torch_hub(monkeypatch):
    torch.manual_seed(1)
    network = nn.Sequential(nn.AvgPool2d(14), nn.Flatten(), nn.Linear(3 * 16 * 16, 24))
    asked = []

    def load(repository, name):
        asked.append((repository, name))
        return network

    monkeypatch.setattr(torch.hub, "load", load)
    extractor = dinov2("dinov2-vit-s-14")
    assert asked == [("facebookresearch/dinov2", "dinov2_vits14")]
    assert extractor.id.d == 24 and extractor(IMAGES).shape == (12, 24)
    first = extractor.id
    assert dinov2("dinov2-vit-s-14").id == first
    network[2].bias.data += 1
    assert dinov2("dinov2-vit-s-14").id.hash8 != first.hash8  # other weights, another name


def test_dinov2_s_messages(monkeypatch):
    def offline(repository, name):
        raise RuntimeError("It looks like there is no internet connection and the repo could not be found")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(ConfigError, match=r"weights dinov2_vitl14, .* no internet connection .*digits64"):
        dinov2()
    with pytest.raises(ConfigError, match="model=dino is no DINOv2; there are dinov2-vit-s-14"):
        dinov2("dino")

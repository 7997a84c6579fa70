"""The paper's judges against torchvision's own networks, with weights drawn at random."""

import urllib.request

import pytest
import torch
from torchvision import models
from torchvision.transforms.v2.functional import normalize

from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.glyphs import Glyphs
from lit_gen.errors import ConfigError
from lit_gen.evaluation import classifiers as judging
from lit_gen.evaluation import translation as translation_evaluation
from lit_gen.funit.classifier import load_classifier, save_classifier
from lit_gen.funit.imagenet import InceptionV3, VGG16Maps
from lit_gen.metrics import weights_files


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    torch.manual_seed(0)
    network = models.inception_v3(weights=None, init_weights=False)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network.eval(), path


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    torch.manual_seed(0)
    features = models.vgg.make_layers(models.vgg.cfgs["D"])
    path = tmp_path_factory.mktemp("weights") / "vgg.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return features.eval(), path


@torch.no_grad()
def test_inception_is_torchvisions(inception, tmp_path):
    """Its pooled features of an image of 299 pixels; saved, it is read again as what it is."""
    theirs, path = inception
    ours = InceptionV3(3).load_imagenet(path).eval()
    theirs.fc, theirs.transform_input = torch.nn.Identity(), False
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    torch.testing.assert_close(ours.features(images), theirs(images / 127.5 - 1), rtol=1e-4, atol=1e-5)
    again, classes, _ = load_classifier(save_classifier(ours, tmp_path / "i.pt", ["a", "b", "c"]))
    small = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    assert classes == ["a", "b", "c"] and torch.equal(again(small), ours(small))
    assert torch.equal(ours(small), ours(small.expand(-1, 3, -1, -1)))


def test_vgg_is_torchvisions_up_to_its_fifth_block(vgg):
    theirs, path = vgg
    images = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    maps = VGG16Maps(path)(images)
    standard = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert maps.shape == (2, 512, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.functional.max_pool2d(maps, 2), theirs(standard))
    with pytest.raises(ConfigError, match=r"32 pixels, got \(31, 64\)"):
        VGG16Maps(path)(torch.zeros(1, 3, 31, 64, dtype=torch.uint8))


def test_refuses_other_files(vgg, tmp_path):
    with pytest.raises(ConfigError, match="does not hold torchvision's weights"):
        InceptionV3(2).load_imagenet(vgg[1])
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(ConfigError, match=r"text\.pth does not hold torchvision's weights"):
        VGG16Maps(tmp_path / "text.pth")


@pytest.mark.parametrize("name", ["inception", "vgg", "lpips"])
def test_weights_are_found_or_the_error_says_where(name, monkeypatch, tmp_path):
    file = judging.TORCHVISION[name][1]
    (tmp_path / "own.pth").write_bytes(b"weights")
    assert judging.weights_of(name, str(tmp_path / "own.pth")) == tmp_path / "own.pth"
    with pytest.raises(ConfigError, match=rf"{name}=nowhere.*{file}"):
        judging.weights_of(name, "nowhere")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("LITGEN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=rf"{file}.*no network.*{name}=<that file>"):
        judging.weights_of(name, "auto")
    (tmp_path / file).write_bytes(b"weights")
    with pytest.raises(ConfigError, match="is damaged"):
        judging.weights_of(name, "auto")
    prefix = file[:-4].rsplit("-", 1)[1]
    monkeypatch.setattr(weights_files, "sha256_of", lambda path: prefix.ljust(64, "0"))
    assert judging.weights_of(name, "auto") == tmp_path / file


def glyphs() -> FewShotDataModule:
    faces = ["DejaVuSans", "DejaVuSerif", "cmr10", "cmss10"]
    return FewShotDataModule(Glyphs(32, 1, "ABCD", classes=faces), target=2)


def test_a_fine_tuned_judge_starts_from_the_weights(inception, tmp_path):
    data, training = glyphs(), judging.ClassifierTraining(steps=1, batch_size=2, held_out=0.3)
    classifier = judging.evaluation_classifier(data, "test", training, tmp_path, inception[1])
    assert isinstance(classifier.network, InceptionV3) and classifier.classes == data.test.classes
    before = torch.load(inception[1], weights_only=True)["Mixed_6a.branch3x3.conv.weight"]
    after = classifier.network.blocks.Mixed_6a.branch3x3.conv.weight
    assert 0 < (after - before).abs().max() <= 2 * InceptionV3.fine_tuning_lr  # one step of AdamW
    key = judging.extractor_id(classifier, "test").key("fd", 7)
    assert key.startswith("fd_inception-v3-test_") and key.endswith("_n7")


def test_the_papers_networks_judge_where_they_are_given(vgg, tmp_path, monkeypatch):
    """DIPD is VGG's, LPIPS AlexNet's; without them other networks', or none, and the names say so."""
    torch.manual_seed(0)
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "home"))
    judges = {"all": judging.TrainedClassifier(torch.nn.Linear(1, 1), [], 1.0)}
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    maps, name = translation_evaluation._content_maps(judges, str(vgg[1]), torch.device("cpu"))
    assert name == "VGG-16, relu5_3 (vgg.pth)" and torch.equal(maps(images), VGG16Maps(vgg[1])(images))
    distance, name = translation_evaluation._perceptual(str(tmp_path / "alexnet.pth"), 32)
    assert name.endswith("alexnet.pth")
    assert distance(images, images).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (distance(images, 255 - images) > 0).all()
    distance, name = translation_evaluation._perceptual(None, 32)
    assert distance is None and "give lpips=<that file>" in name

"""Classifiers that judge: they learn, repeat themselves, survive saving, and the linear head is the
optimum."""

import pytest
import torch
import torch.nn.functional as F

from lit_gen.errors import ConfigError
from lit_gen.funit import classifier
from lit_gen.funit.classifier import (
    ResNet10,
    accuracy,
    fit_head,
    load_classifier,
    save_classifier,
    train_classifier,
)


def stripes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of 12 x 12 pictures that differ in texture, not in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    textures = torch.stack([x // 2 % 2, y // 2 % 2, (x // 2 + y // 2) % 2])[labels][:, None] * 120.0
    noise = 40 * torch.randn(n, 1, 12, 12, generator=generator)
    return (textures + 60 + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained() -> ResNet10:
    torch.manual_seed(0)
    return train_classifier(
        ResNet10(3, channels=1, width=4), *stripes(200, 0), steps=40, batch_size=32, lr=1e-2
    )


def test_learns_unseen_images(trained):
    assert accuracy(trained, *stripes(200, 1)) > 0.95
    assert not trained.training


def test_training_is_a_function_of_the_seed():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        network = train_classifier(
            ResNet10(3, channels=1, width=2), *stripes(50, 0), steps=3, batch_size=8, flip=True, seed=seed
        )
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_augmentation_moves_pixels_and_makes_none_up():
    """A shifted, mirrored image equals one of the (2 s + 1)^2 * 2 that can be made by padding and
    cropping."""
    images = torch.randint(0, 256, (20, 3, 7, 9), dtype=torch.uint8)
    moved = classifier._augmented(images, 2, True, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    found = set()
    for image, around in zip(moved, padded, strict=True):
        made = {
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if torch.equal(image, (c := around[:, dy : dy + 7, dx : dx + 9]) if not mirrored else c.flip(2))
        }
        assert len(made) == 1
        found |= made
    assert len(found) > 10


def test_saved_classifier_is_the_same(trained, tmp_path):
    path = save_classifier(trained, tmp_path / "judge.pt", ["columns", "rows", "checks"])
    again, classes, _ = load_classifier(path)
    images, _ = stripes(10, 2)
    assert classes == ["columns", "rows", "checks"]
    assert torch.equal(classifier.predict(again, images), classifier.predict(trained, images))


def test_linear_head_is_the_optimum():
    """The gradient of the penalised likelihood vanishes, in the standardised coordinates in which it is
    penalised."""
    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    features = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1]) + labels[:, None]
    head = fit_head(features, labels, 3, weight_decay=0.01, iterations=500)
    mean, std = features.mean(0), features.std(0, correction=0)
    x = (features - mean) / std
    weight = (head.weight.detach() * std).requires_grad_()
    bias = (head.bias + head.weight @ mean).detach().requires_grad_()
    torch.testing.assert_close(F.linear(x, weight, bias), head(features))
    loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.005 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(g.abs().max().item() for g in gradients) < 1e-5


def test_one_feature_a_class_is_enough_for_a_head():
    features = torch.eye(4).repeat(2, 1) + 0.01 * torch.randn(8, 4)
    head = fit_head(features[:4], torch.arange(4), 4)
    assert torch.equal(head(features[4:]).argmax(1), torch.arange(4))


def test_refusals(tmp_path):
    images, labels = stripes(5, 0)
    with pytest.raises(ConfigError, match="Label 2 for a classifier of 2 classes"):
        train_classifier(ResNet10(2, channels=1), images, torch.full((5,), 2))
    with pytest.raises(ConfigError, match="5 images and 4 labels"):
        train_classifier(ResNet10(3, channels=1), images, labels[:4])
    with pytest.raises(ConfigError, match="3 features and 2 labels"):
        fit_head(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ConfigError, match="num_classes=0"):
        ResNet10(0)
    with pytest.raises(ConfigError, match="There is no classifier"):
        load_classifier(tmp_path / "judge.pt")
    (tmp_path / "judge.pt").write_text("no")
    with pytest.raises(ConfigError, match="holds no classifier"):
        load_classifier(tmp_path / "judge.pt")

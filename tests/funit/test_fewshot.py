"""Few-shot classification where the gain of translations is known."""

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.funit.evaluation import copy_content
from lit_gen.funit.fewshot import few_shot_accuracy, generated_set


def images(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Class t is a level in the first channel; the second one holds strong content, unrelated to the
    class."""
    generator = torch.Generator().manual_seed(seed)
    level = 100 + 20 * labels[:, None, None, None].expand(-1, 1, 4, 4)
    content = torch.randint(0, 256, (len(labels), 1, 1, 1), generator=generator).expand(-1, 1, 4, 4)
    return torch.cat([level, content], 1).to(torch.uint8)


def features(x: torch.Tensor) -> torch.Tensor:
    """Two numbers an image that mix content and class, the content much louder."""
    level, content = (x.float().mean((2, 3)) / 255).unbind(1)
    return torch.stack([level + content, level - content], 1)


def translate(content: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The perfect translator: the level of the class, the content of the content."""
    level = classes[:1, :1].expand(len(content), -1, -1, -1)
    return ((torch.cat([level, content[:, 1:]], 1) + 1) * 127.5).round().to(torch.uint8)


TEST_LABELS = torch.arange(200) % 3
TEST = images(TEST_LABELS, 1)
SHOWN = {f"class {t}": images(torch.tensor([t]), t + 5) for t in range(3)}
CONTENTS = images(torch.full((50,), 4), 2)


def test_perfect_translations_teach_what_to_ignore():
    generated = generated_set(translate, SHOWN, CONTENTS, 40)
    alone = few_shot_accuracy(features, SHOWN, TEST, TEST_LABELS, weight_decay=1e-6)
    taught = few_shot_accuracy(features, SHOWN, TEST, TEST_LABELS, generated, weight_decay=1e-6)
    assert alone < 0.7
    assert taught > 0.98


def test_generated_set_is_a_function_of_the_seed_and_the_class():
    made, labels = generated_set(copy_content, SHOWN, CONTENTS, 20, batch_size=7)
    again, _ = generated_set(copy_content, {"class 1": SHOWN["class 1"]}, CONTENTS, 20)
    other, _ = generated_set(copy_content, SHOWN, CONTENTS, 20, seed=1)
    assert labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert torch.equal(made[20:40], again)
    assert not torch.equal(made, other)
    with pytest.raises(ConfigError, match="num=51: choose 1 to the 50"):
        generated_set(copy_content, SHOWN, CONTENTS, 51)

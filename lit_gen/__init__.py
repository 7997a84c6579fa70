"""PyTorch Lightning experiments for generative image models.

Three systems in one framework: score-based generation (`lit_gen.score`), few-shot image translation
(`lit_gen.funit`) and AutoAugment (`lit_gen.augment`). `python -m lit_gen.train` runs the default experiment;
`lit_gen.load` opens a trained model, `lit_gen.evaluate_images` measures images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gen.models.api import SampledModel, Translator, evaluate_images, load

__version__ = "0.2.0"
__all__ = ["SampledModel", "Translator", "__version__", "evaluate_images", "load"]


def __getattr__(name: str) -> Any:
    """Loads the API, and torch with it, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'lit_gen' has no attribute {name!r}")
    from lit_gen.models import api

    return getattr(api, name)

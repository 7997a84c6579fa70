"""Mean average precision of boxes, as COCO counts it (https://cocodataset.org/#detection-eval)."""

from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from lit_gen.errors import ConfigError


def mean_average_precision() -> MeanAveragePrecision:
    """A metric that takes lists of {"boxes", "scores", "labels"} and of {"boxes", "labels"}, xyxy pixels.

    Raises ConfigError where pycocotools is missing.
    """
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise ConfigError(
            "The mean average precision needs pycocotools: pip install 'lit-gen[detection]'."
        ) from None
    metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
    metric.warn_on_many_detections = False  # those beyond 100 an image count for nothing, as COCO has it
    return metric


def precision_scores(metric: MeanAveragePrecision) -> dict[str, float]:
    """{"map": over IoU .50 to .95, "map50", "map75"} in [0, 1]; 0 where nothing could be scored."""
    values: dict[str, Tensor] = metric.compute()
    names = {"map": "map", "map50": "map_50", "map75": "map_75"}
    return {ours: max(0.0, float(values[theirs])) for ours, theirs in names.items()}

"""Augments the images and boxes of a detector, in the manner of torchvision's reference training loop.

    python examples/detection_augmentation.py                          # scenes of digits, which lit_gen draws
    python examples/detection_augmentation.py --coco IMAGES ANNOTATIONS.json --num-classes 91

The one line to change in a loop of your own is `collate_fn`: here a mosaic for every second image, then
policy v1 of Zoph et al. 2019 (https://arxiv.org/abs/1906.11172).
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.transforms.v2 import PILToTensor
from torchvision.tv_tensors import BoundingBoxes, Image

from lit_gen.augment import BatchAugment, Chain, Policy
from lit_gen.data.scenes import Scenes


def sample(scene: dict) -> tuple:
    """(image, {"boxes", "labels"}), as torchvision's detection sets have it; class 0 is the background."""
    boxes = BoundingBoxes(scene["boxes"], format="XYXY", canvas_size=scene["image"].shape[1:])
    return Image(scene["image"]), {"boxes": boxes, "labels": scene["labels"] + 1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coco", nargs=2, metavar=("IMAGES", "ANNOTATIONS"))
    parser.add_argument("--num-classes", type=int, default=11)
    parser.add_argument("--images", type=int, default=256, help="the number of scenes")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--side", type=int, default=128, help="the smaller side of what the detector sees")
    args = parser.parse_args()
    if args.coco:
        dataset = CocoDetection(*args.coco, transform=PILToTensor())
        dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels"))
    else:
        scenes = Scenes("train", args.images, image_size=128)
        dataset = [sample(scenes[i]) for i in range(len(scenes))]
    augment = BatchAugment(Chain([Policy([[["Mosaic", 0.5, 10]]]), "detection_v1"]))
    loader = DataLoader(dataset, 4, shuffle=True, drop_last=True, collate_fn=augment)
    classes, side = args.num_classes, args.side
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None, num_classes=classes, min_size=side)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    for epoch in range(args.epochs):
        for images, targets in loader:
            losses = model([image.float() / 255 for image in images], targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        print(f"epoch {epoch}:", ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))


if __name__ == "__main__":
    main()

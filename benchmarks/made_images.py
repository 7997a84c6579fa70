"""What the arms of `lit-gen compare-augmentation` have made: do the images show their label, and how near are
they to the labelled ones?

    python benchmarks/made_images.py digits=OUT letters=OUT

A classifier is trained on all images that labelled ones are drawn from (30 seconds on a core). "shows its
label" is the share of made images that it assigns to their label, "distance" the mean root-mean-square
distance of a made image to the nearest labelled one, in gray values of 0 to 1; both over the seeds in OUT.
The title says what the classifier reads of the test images. `OUT/made.png` shows ten classes of the first
seed: four labelled images, then five of each arm, in the order of the table.
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from lit_gen.cli import CONF_DIR, show, table
from lit_gen.comparison import Source
from lit_gen.comparison.generators import sheet
from lit_gen.config import schema
from lit_gen.images import save_png
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.search import Labelled
from lit_gen.search.rewards import accuracy, train_classifier

ORDER = ("score", "score_guided", "restoration", "funit")  # then the pretrained ones


def source_of(experiment: str) -> Source:
    schema.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("compare_augmentation", [f"experiment=comparison/{experiment}", "arms=[none]", "out=."])
    return instantiate(config_dict(cfg)["task"])


def made_by(out: Path) -> dict[tuple[str, int], dict[int, Labelled]]:
    """(arm, shots) -> seed -> the made images, the newest where options were changed."""
    found: dict[tuple[str, int], dict[int, Labelled]] = {}
    for file in sorted((out / "treatments").glob("*.pt"), key=lambda file: file.stat().st_mtime):
        arm, shots, seed, _ = file.stem.rsplit("-", 3)
        made = torch.load(file, weights_only=True).get("made")
        if made is not None and arm not in ("copies", "union"):
            found.setdefault((arm, int(shots)), {})[int(seed)] = Labelled(**made)
    place = {arm: i for i, arm in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (item[0][1], place.get(item[0][0], 9), item[0][0])))


def distance(made: Labelled, labelled: Labelled) -> float:
    a, b = (data.images.flatten(1).float() / 255 for data in (made, labelled))
    return float(torch.cdist(a, b).amin(1).mean()) / a.shape[1] ** 0.5


def measure(experiment: str, out: Path) -> None:
    source, found = source_of(experiment), made_by(out)
    pool = Labelled(source.read(range(len(source.pool_labels))), source.pool_labels)
    judge = train_classifier(pool, None, classes=source.classes, steps=800, batch_size=64, seed=5)
    rows, pictures = [], []
    largest, first = max(shots for _, shots in found), min(min(seeds) for seeds in found.values())
    for (arm, shots), seeds in found.items():
        labelled = {seed: source.task(shots, seed).train for seed in seeds}
        right = sum(accuracy(judge, made) for made in seeds.values()) / len(seeds)
        away = sum(distance(made, labelled[seed]) for seed, made in seeds.items()) / len(seeds)
        rows.append((arm, str(shots), f"{100 * right:.0f} %", f"{away:.3f}", str(len(seeds))))
        if shots == largest and first in seeds:
            made = seeds[first][seeds[first].labels < 10]
            pictures.append(sheet(labelled[first], made, (0 if pictures else 4, 5)))
    title = f"{experiment}; test images: {100 * accuracy(judge, source.test):.1f} %"
    show(table(title, ("arm", "shots", "shows its label", "distance", "seeds"), rows))
    show(f"written to {save_png(torch.cat(pictures, 2), out / 'made.png')}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        measure(name, Path(folder))

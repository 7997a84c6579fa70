"""Any choice of any group, in an experiment written for another one, builds or is refused in words."""

import pytest

from lit_gen.cli import CONF_DIR, _users_mistake
from lit_gen.config.experiment import build

GROUPS = ["augment", "callbacks", "callbacks/averages", "data", "metrics", "model", "sampler", "trainer"]
GROUPS += [f"model/{part}" for part in ("augment", "loss", "net", "optimizer", "precondition", "process")]
GROUPS += [
    "model/loss/reduction",
    "model/lr_schedule",
    "sampler/corrector",
    "sampler/grid",
    "sampler/predictor",
]
FETCHED = {"data=cifar10", "data=celeba64", "metrics=inception"}  # where there is a network
RANKS = {"trainer=slurm"}  # asks for a cluster


def choices() -> list[str]:
    found = []
    for group in GROUPS:
        for path in sorted((CONF_DIR / group).glob("*.yaml")):
            found.append(f"{group}=[{path.stem}]" if group.endswith("averages") else f"{group}={path.stem}")
    return [choice for choice in found if choice not in FETCHED | RANKS]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["digits", "digits_ve", "funit_glyphs", "detector_scenes"])
def test_every_choice_builds_or_is_refused(compose, tmp_path, experiment):
    built = 0
    for choice in choices():
        base = [o for o in ("trainer=cpu", "logger=csv") if o.split("=")[0] != choice.split("=")[0]]
        try:
            cfg = compose(f"experiment={experiment}", *base, f"logger.csv.save_dir={tmp_path}", choice)
            build(cfg, tmp_path)
            built += 1
        except Exception as error:
            assert _users_mistake(error), (choice, repr(error))
    assert built >= 10

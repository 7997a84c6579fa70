"""Knowledge points one way (docs/architecture.md): who may import whom, read off the source."""

import ast
from pathlib import Path

import pytest

import lit_gen

PACKAGE = Path(lit_gen.__file__).parent
MATHEMATICS = ("score", "funit", "augment", "metrics", "pretrained")
ENTRY_POINTS = {"cli", "schema", "instantiate", "runs", "training", "trials"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def imports(path: Path):
    """Absolute names of everything that the file imports anywhere, functions included."""
    package = ["lit_gen", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_direction(name, path):
    top = name.split(".")[0]
    found = set(imports(path))
    if top in MATHEMATICS:
        others = [o for o in MATHEMATICS[:-1] if o != top and top != "pretrained"]
        assert not [f for f in found if f.startswith(tuple(f"lit_gen.{o}" for o in others))]
        if not name.endswith((".module", "classifier")):
            assert not [f for f in found if f.split(".")[0] in ("lightning", "hydra", "omegaconf", "wandb")]
    if top in (
        *MATHEMATICS,
        "data",
        "callbacks",
        "detection",
        "module",
        "images",
        "precision",
        "rng",
        "errors",
        "schedules",
    ):
        assert not [f for f in found if f.split(".")[0] in ("hydra", "omegaconf")]
    if top == "data":
        assert not [f for f in found if f.startswith(tuple(f"lit_gen.{o}" for o in MATHEMATICS))]
    if "." in name and top != "sweeps":  # which start trainings
        assert not [f for f in found if f.removeprefix("lit_gen.") in ENTRY_POINTS]


def test_the_walk_sees_imports():
    assert "lit_gen.errors" in set(imports(PACKAGE / "data" / "keyed.py"))
    assert "lightning.pytorch" in set(imports(PACKAGE / "module.py"))

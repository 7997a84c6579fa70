"""Knowledge points one way (docs/architecture.md): who may import whom, read off the source."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lit_gen

PACKAGE = Path(lit_gen.__file__).parent
MATHEMATICS = ("score", "funit", "augment", "metrics", "autoencoder")  # torch, and what torch's users have
SYSTEMS = (*MATHEMATICS, "detection", "data", "callbacks", "pretrained")
ANYBODYS = ("errors", "rng", "images", "precision", "module", "schedules", "sharding")
HYDRA = ("hydra", "omegaconf")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


@cache
def imports(path: Path) -> set[str]:
    """Absolute names of everything that the file imports anywhere, functions included."""
    return set(_imports(path))


def _imports(path: Path):
    package = ["lit_gen", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def rooms(found: set[str]) -> set[str]:
    """The rooms of lit_gen, and its modules at the root, among the names."""
    return {name.split(".")[1] for name in found if name.startswith("lit_gen.")}


def libraries(found: set[str]) -> set[str]:
    return {name.split(".")[0] for name in found}


MODULES = list(modules())
each_module = pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])


@each_module
def test_the_mathematics_knows_torch(name, path):
    top, found = name.split(".")[0], imports(path)
    if top not in MATHEMATICS:
        return
    assert not rooms(found) & (set(MATHEMATICS) - {top})
    if not name.endswith((".module", ".classifier")):
        assert not libraries(found) & {"lightning", *HYDRA, "wandb"}


@each_module
def test_only_the_outer_rooms_know_hydra(name, path):
    if name.split(".")[0] in (*SYSTEMS, *ANYBODYS, "figures"):
        assert not libraries(imports(path)) & set(HYDRA)


@each_module
def test_systems_do_not_know_what_uses_them(name, path):
    top, found = name.split(".")[0], rooms(imports(path))
    if top in SYSTEMS:
        outer = {"commands", "evaluation", "search", "sweeps", "config", "models", "inputs", "cli", "runs"}
        outer |= {"comparison", "demo", "export", "hearing", "reporting"}
        assert not found & (outer - {"evaluation"} if top == "callbacks" else outer)
    if top == "data":
        assert not found & {*MATHEMATICS, "detection", "callbacks", "pretrained"}
    if top in ANYBODYS:
        assert not found - set(ANYBODYS)


@each_module
def test_no_command_imports_another(name, path):
    if name != "train":  # the entry point of `python -m lit_gen.train`
        assert "commands" not in rooms(imports(path))


@each_module
def test_only_figures_draws_with_matplotlib(name, path):
    if name not in ("figures", "data.glyphs"):  # glyphs are rendered from matplotlib's fonts
        assert "matplotlib" not in libraries(imports(path))
    if name == "figures":
        assert not libraries(imports(path)) & {"torch", *HYDRA} and not rooms(imports(path))


def test_the_root_stays_small():
    root = [name for name, _ in MODULES if "." not in name]
    assert len(root) <= 18, root


def test_the_walk_sees_imports():
    assert "lit_gen.errors" in imports(PACKAGE / "data" / "keyed.py")
    assert "lightning.pytorch" in imports(PACKAGE / "module.py")
    assert "commands" in rooms(imports(PACKAGE / "train.py"))


def test_the_score_package_exports_its_names_without_lightning():
    code = (
        "import sys, lit_gen.score as score\n"
        "assert 'lightning' not in sys.modules\n"
        "public = 'Denoiser EDM PredictNoise Guidance edm_loss bits_per_dim networks samplers'\n"
        "assert all(hasattr(score, name) for name in public.split())\n"
        "assert score.ScoreModule.__name__ == 'ScoreModule'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The commands and links of the README and of docs/: each command is a configuration that exists, those of
docs/getting-started.md run, and every link leads somewhere, on GitHub as on the site.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lit_gen.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OLD = Path(__file__).parent / "fixtures" / "run_2026_11"
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
# What lies in a user's folder: a configuration or plugin of their own, or one that an earlier command writes.
OWN = ("--config-dir", "experiment=mine", "augment=found", "allow_targets")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command of lit_gen, its arguments) of every line of a page's blocks of bash."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(re.sub(r"<[^>]*>", "X", line), comments=True)
            if "lit_gen.train" in words:
                found.append(("train", words[words.index("lit_gen.train") + 1 :]))
            elif "lit-gen" in words[:2]:
                found.append((words[words.index("lit-gen") + 1], words[words.index("lit-gen") + 2 :]))
    return found


def one_of_each(words: list[str]) -> list[str]:
    """The overrides among the words; of a sweep its first value."""
    kept = [word for word in words if "=" in word or word[0] in "~+"]
    kept = [word for word in kept if not word.startswith(("hydra/launcher", "hydra.launcher"))]  # of extras
    parsed = OverridesParser.create().parse_overrides(kept)
    swept = [p.is_sweep_override() and "interval" not in w for p, w in zip(parsed, kept, strict=True)]
    return [
        f"{word.split('=')[0]}={next(iter(p.sweep_string_iterator()))}" if sweep else word
        for word, p, sweep in zip(kept, parsed, swept, strict=True)
        if sweep or not p.is_sweep_override()
    ]


@each_page
def test_every_command_is_a_configuration_that_exists(page, compose):
    for command, words in commands(page):
        assert command in COMMANDS, command
        if not any(word.startswith(OWN) for word in words):
            compose(*one_of_each(words), config_name=command.replace("-", "_"))


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            anchors = [slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)]
            assert anchor in anchors, link


SMALL = {"sample": ["format=npz"], "restore": ["method.num_steps=2"], "encode": ["num=2"]}
SMALL |= {"evaluate": ["measures=[fd]"]}
STARTED = [c for c in commands(ROOT / "docs" / "getting-started.md") if c[0] != "train"]


@pytest.mark.parametrize(("name", "words"), STARTED, ids=[" ".join((n, *w)) for n, w in STARTED])
def test_getting_started_runs(name, words, command, tmp_path):
    """On a run of a few steps."""
    shutil.copytree(OLD, tmp_path / "runs" / "first")
    device = [] if name == "report" else ["device=cpu"]
    last = [] if name == "report" else ["checkpoint=last"]
    code, out, err = command(main, name, *words, *SMALL.get(name, []), *device, *last)
    assert code == 0, err
    assert str(tmp_path / "runs" / "first") in out or "runs/first" in out

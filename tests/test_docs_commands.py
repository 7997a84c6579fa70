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
READ_FIRST = ("README", "getting-started")
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


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=() if page.stem in READ_FIRST else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_every_command_is_a_configuration_that_exists(page, compose):
    for command, words in commands(page):
        assert command in COMMANDS, command
        if not any(word.startswith(OWN) for word in words):
            compose(*one_of_each(words), config_name=command.replace("-", "_"))


def test_every_recipe_is_in_the_tables_of_recipes():
    rows = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    named = re.findall(r"`([\w{},]+)`", "".join(row.split("|")[1] for row in rows if row.startswith("| `")))
    words = [word for name in named for word in braces(name)]
    files = (ROOT / "conf" / "experiment").glob("*.yaml")
    assert {path.stem for path in files} == {word for word in words if word.islower()}


def braces(name: str) -> list[str]:
    """a_{b,c} is a_b and a_c."""
    start, _, rest = name.partition("{")
    middle, _, end = rest.partition("}")
    return [f"{start}{choice}{end}" for choice in middle.split(",")]


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


SMALL = {"sample": ["format=npz"], "encode": ["num=2"], "evaluate": ["measures=[fd]"]}
SMALL |= {"restore": ["method.num_steps=2", "num=2"]}
ON_A_RUN = [c for c in commands(ROOT / "docs" / "getting-started.md") if c[0] != "train"]
OTHERS = [c for page in PAGES for c in commands(page) if {"run=RUN", "run=X", "data=digits"} & {*c[1]}]
OTHERS = [c for c in OTHERS if c[0] in ("sample", "restore", "encode", "report", "suggest-noise")]
OTHERS = [c for c in OTHERS if not re.search("condition|guidance|images=|RESULTS", " ".join(c[1]))]


@pytest.mark.parametrize(("name", "words"), ON_A_RUN, ids=[" ".join((n, *w)) for n, w in ON_A_RUN])
def test_getting_started_runs(name, words, command, tmp_path):
    """On a run of a few steps."""
    shutil.copytree(OLD, tmp_path / "runs" / "first")
    words = [re.sub(r"^run=(RUN|X)$", "run=runs/first", word) for word in words]
    last = ["checkpoint=last"] if "run=runs/first" in words and name != "report" else []
    device = [] if name in ("report", "suggest-noise") else ["device=cpu"]
    code, out, err = command(main, name, *words, *SMALL.get(name, []), *device, *last)
    assert code == 0, err
    assert name == "suggest-noise" or "runs/first" in out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), OTHERS, ids=[" ".join((n, *w)) for n, w in OTHERS])
def test_commands_of_other_pages_run(name, words, command, tmp_path):
    test_getting_started_runs(name, words, command, tmp_path)

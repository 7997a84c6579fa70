"""docs/dashboards.md says what is logged: a short run logs its names, no other ones, and all of them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "dashboards.md"


def documented(heading):
    """The names in the table under a heading, as regular expressions."""
    part = DOC.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    names = []
    for row in part.splitlines():
        if row.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
                names += expand(name)
    return names


def expand(name):
    """a/{b,c} is a/b and a/c; <...> stands for anything, <1-4> for a digit."""
    if found := re.search(r"\{([^}]+)\}", name):
        return [n for x in found[1].split(",") for n in expand(name.replace(found[0], x, 1))]
    parts = re.split(r"(<[^>]+>)", name)
    return ["".join(p if not p.startswith("<") else "[1-4]" if p == "<1-4>" else ".+" for p in parts)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("logged") / "run"
    given = [*tiny, "trainer=cpu", "logger.wandb.mode=offline", "logger.wandb.checkpoints=true"]
    given += ["callbacks.quality.final_images=96"]
    command = [sys.executable, "-m", "lit_gen.train", f"hydra.run.dir={folder}", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return folder


def inspected(run):
    file = next(run.glob("wandb/offline-run-*/*.wandb"))
    tool = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    out = subprocess.run(tool, capture_output=True, text=True, timeout=1800).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def test_a_run_logs_what_the_table_says(run):
    items = [r["history"]["item"] for r in inspected(run) if r.get("type") == "history"]
    logged = {
        key for item in items for key in item if not key.startswith("_") and key != "trainer/global_step"
    }
    logged = {re.sub(r"^(samples/(?:grid|trajectory))\..*", r"\1", key) for key in logged}
    patterns = documented("Score models")
    strange = [key for key in logged if not any(re.fullmatch(p, key) for p in patterns)]
    absent = [p for p in patterns if not any(re.fullmatch(p, key) for key in logged)]
    assert not strange and not absent, (strange, absent)


def test_the_environment_is_kept_and_the_checkpoints_are_sent(run):
    around = json.loads((run / "environment.json").read_text())
    assert "lit_gen.train" in around["command"] and around["versions"]["torch"]
    assert around["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", around["commit"])
    text = json.dumps(inspected(run))
    assert '"run-' in text and "best.ckpt" in text and "last.ckpt" in text
    assert "orig_argv" not in text and around["commit"] in (None, *re.findall(r"[0-9a-f]{40}\+?", text))


def dashboards():
    pytest.importorskip("wandb_workspaces")
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "scripts" / "dashboards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("system", "heading"), [("score", "Score models"), ("funit", "FUNIT"), ("detection", "Detection")]
)
def test_workspaces_show_documented_names(system, heading):
    module = dashboards()
    names = [n for h in {heading, "Score models"} for n in documented(h)]
    made = module.workspace(system, "someone", "lit_gen")
    model = json.loads(made._to_model().model_dump_json())
    assert len(json.dumps(model)) > 2000
    shown = []
    for section in made.sections:
        for panel in section.panels:
            shown += getattr(panel, "media_keys", None) or []
            shown += [y for y in getattr(panel, "y", None) or [] if isinstance(y, str)]
            shown += [
                getattr(y, "name", "") for y in getattr(panel, "y", None) or [] if not isinstance(y, str)
            ]
    assert len(shown) > 5
    assert not [name for name in shown if name and not any(re.fullmatch(p, name) for p in names)]
    examples = {"fd_digits64_0184e91c_n360", "fid5k", "k_shot/top1_k5", "kd_x_0_n5", "se/fid5k"}
    for section in made.sections:
        for panel in section.panels:
            if regex := getattr(panel, "metric_regex", None):
                assert re.compile(regex) and (
                    system != "score" or "precision" in regex or any(re.match(regex, e) for e in examples)
                )


def test_a_panel_of_an_unknown_option_is_refused():
    module = dashboards()
    with pytest.raises(Exception, match=r"[Ee]xtra|unexpected"):
        module.wr.LinePlot(nonsense=1)

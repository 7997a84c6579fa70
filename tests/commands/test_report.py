"""`lit-gen report`: one file that asks for nothing else, with the run's own numbers, and without secrets."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from lit_gen.commands import report as reporting
from lit_gen.errors import ConfigError

HOSTILE = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What is in a page: its tags, its links, its table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.cells, self.open = [], [], [], []
        self.feed(text)
        assert not [tag for tag in self.open if tag not in ("html", "body")], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta", "input", "br", "path", "use", "link"):
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "td" in self.open and self.cells:
            self.cells[-1] += data


def config_of(experiment):
    saver = next(c for c in experiment.trainer.callbacks if type(c).__name__ == "SaveConfig")
    return OmegaConf.create(saver.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture
def run(fit, folder):
    if not (folder / "0").exists():
        experiment = fit(folder / "0")
        OmegaConf.save(config_of(experiment), folder / "0" / "config.yaml")
        (folder / "0" / "summary.json").write_text(
            json.dumps(experiment.module.results.summary | {"steps": 20})
        )
    return folder / "0"


def make(compose, folder, *overrides):
    path = reporting.report(compose(f"run={folder}", *overrides, config_name="report"))
    return Page(path.read_text()), path


@pytest.fixture
def path(run, compose, folder):
    """The report of the run, made once."""
    if not (folder / "r.html").exists():
        make(compose, run, f"out={folder}/r.html")
    return folder / "r.html"


def test_the_file_stands_alone_and_has_the_numbers(run, path):
    page = Page(path.read_text())
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"""(src|href|url\()=?["']?https?://""", path.read_text())
    assert page.tags.count("svg") >= 6 and page.tags.count("input") >= 1
    grids = len(list(run.glob("grids/*.png")))
    assert page.tags.count("img") == grids == 3  # two grids, one trajectory
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['fd']:.5g}" in page.cells and f"{summary['fd_train_test']:.5g}" in page.cells
    text = path.read_text()
    for name in ("train/loss", "val/loss", "fd_digits64_0184e91c_n32", "gradient norm"):
        assert name in text, name


def test_names_are_escaped_secrets_hidden_drawings_the_same(run, path, compose, tmp_path, monkeypatch):
    drawings = re.findall(r"<svg.*?</svg>", path.read_text(), re.S)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    config = OmegaConf.load(run / "config.yaml")
    config.name = HOSTILE
    config.logger.csv.update(
        {"api_key": "hunter2", "note": "k" * 40, "store": "postgres://me:hunter2@host/db"}
    )
    shutil.copytree(run, tmp_path / "run")
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    _, path = make(compose, tmp_path / "run")
    text = path.read_text()
    assert path == tmp_path / "run" / "report.html"
    assert re.findall(r"<svg.*?</svg>", text, re.S) == drawings
    assert HOSTILE not in text and "&lt;script&gt;alert" in text
    assert "hunter2" not in text and "k" * 40 not in text and "postgres://me:(hidden)@host/db" in text


def test_a_sweep_has_all_trials_and_the_best_one_s_pictures(run, compose, tmp_path, monkeypatch):
    sweep = tmp_path / "sweep"
    for number, fd in enumerate((0.5, 0.25)):
        shutil.copytree(run, sweep / str(number))
        config = OmegaConf.load(run / "config.yaml")
        config.model.optimizer.lr = 0.001 * (number + 1)
        OmegaConf.save(config, sweep / str(number) / "config.yaml")
        (sweep / str(number) / "summary.json").write_text(json.dumps({"fd": fd}))
    trials = [
        {"number": 0, "state": "complete", "value": 0.5, "error": None},
        {"number": 1, "state": "fail", "value": None, "error": "exit code 9"},
    ]
    best = {"number": 0, "value": 0.5, "command": "python -m lit_gen.train seed=1"}
    (sweep / "sweep.json").write_text(json.dumps({"objective": "fd", "best": best, "trials": trials}))
    page, path = make(compose, sweep)
    assert page.cells[:8] == ["1", "fail", "0.25", "0.002", "0", "complete", "0.5", "0.001"]  # by value
    text = path.read_text()
    assert "python -m lit_gen.train seed=1" in text and "exit code 9" in text and "Trial 0: pictures" in text
    monkeypatch.setattr(reporting, "_curves", lambda histories: [])  # drawn above
    record = {"objective": "fd", "direction": "maximize", "best": best, "trials": trials}
    (sweep / "sweep.json").write_text(json.dumps(record))
    page, _ = make(compose, sweep)
    assert page.cells[0] == "0"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it(path, tmp_path):
    probe = (
        "<script>addEventListener('load', () => { const s = document.querySelector('input');"
        "s.value = 0; s.dispatchEvent(new Event('input'));"
        "document.title = [...document.images].every(i => i.complete && i.naturalWidth > 0) + ' ' +"
        "document.querySelector('figcaption').textContent; })</script>"
    )
    page = tmp_path / "r.html"
    page.write_text(path.read_text().replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    dom = subprocess.run(
        [
            CHROMIUM,
            *options,
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert "<title>true grid, batch 10</title>" in dom.stdout  # all pictures loaded; the slider's first one
    assert "Uncaught" not in dom.stderr and "ERR_" not in dom.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=nowhere"], "no such folder"),
        (["run=."], "neither a run folder"),
        (["run={run}", "grids=0"], "at least 1"),
        (["run={run}", "out={run}"], "name a file"),
    ],
)
def test_mistakes_are_named(run, compose, tmp_path, monkeypatch, overrides, says):
    monkeypatch.chdir(tmp_path)
    cfg = compose(*(o.format(run=run) for o in overrides), config_name="report")
    with pytest.raises(ConfigError, match=says):
        reporting.report(cfg)
    assert not list(tmp_path.iterdir())

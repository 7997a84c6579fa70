"""`lit-gen report`: one file that asks for nothing else, with the run's own numbers, and without secrets."""

import html
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lit_gen import runs
from lit_gen.augment import Policy
from lit_gen.commands import report as reporting
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.reporting import drawings, parts, sweep

HOSTILE = "<script>alert(1)</script>"
PLOTS = re.compile(r'<script type="application/json">(.*?)</script>', re.S)


class Page(HTMLParser):
    """What is in a page: its tags, its links, its table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.cells, self.open, self.plots = [], [], [], [], []
        self.feed(text)
        assert not [tag for tag in self.open if tag not in ("html", "body")], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta", "input", "br", "path", "use", "link"):
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]
        if tag == "td":
            self.cells.append("")
        self.plots += [dict(attributes)] if "plot" in dict(attributes).get("class", "").split() else []

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


def plots_of(path) -> list[dict]:
    """What plotly.js is asked to draw. Its Python package raises for what it cannot."""
    graphs = pytest.importorskip("plotly.graph_objects")
    plots = [json.loads(text) for text in PLOTS.findall(path.read_text())]
    for plot in plots:
        graphs.Figure(data=plot["data"], layout=plot["layout"])
    return plots


def test_the_file_stands_alone_and_has_the_numbers(run, path):
    page = Page(path.read_text())
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "default-src 'none'" in path.read_text()  # the browser asks nobody for anything
    assert path.read_text().count("plotly.js v") == 1 and page.tags.count("input") >= 2
    grids = len(list(run.glob("grids/grid_*.png")))
    assert grids == 2 and page.tags.count("img") == grids + 4  # x_t before each of three steps, and the image
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['fd']:.5g}" in page.cells and f"{summary['fd_train_test']:.5g}" in page.cells
    plots = {plot["layout"]["title"]["text"]: plot for plot in plots_of(path)}
    assert {"gradient norm", "learning rate", "loss", "fd_digits64_0184e91c_n32"} <= plots.keys()
    history = runs.history(run)
    for curve in plots["loss"]["data"]:
        assert dict(zip(curve["x"], curve["y"], strict=True)) == history[curve["name"]]


def test_names_are_escaped_secrets_hidden_drawings_the_same(run, path, compose, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    config = OmegaConf.load(run / "config.yaml")
    config.name = HOSTILE
    config.logger.csv.update(
        {"api_key": "hunter2", "note": "k" * 40, "store": "postgres://me:hunter2@host/db"}
    )
    shutil.copytree(run, tmp_path / "run")
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write(f"20,train/{HOSTILE},1.0\n20,train/overflow,nan\n")
    _, other = make(compose, tmp_path / "run")
    text = other.read_text()
    assert other == tmp_path / "run" / "report.html"
    known, shown = ({p["layout"]["title"]["text"]: p for p in plots_of(file)} for file in (path, other))
    assert shown.pop(html.escape(f"train/{HOSTILE}"))["data"][0]["y"] == [1.0]
    assert shown.pop("train/overflow")["data"][0]["y"] == [] and shown == known
    assert HOSTILE not in text and "&lt;script&gt;alert" in text
    assert "hunter2" not in text and "k" * 40 not in text and "postgres://me:(hidden)@host/db" in text


def test_a_sweep_has_all_trials_and_the_best_one_s_pictures(run, compose, tmp_path, monkeypatch):
    sweep_folder = tmp_path / "sweep"
    for number, fd in enumerate((0.5, 0.25)):
        shutil.copytree(run, sweep_folder / str(number))
        config = OmegaConf.load(run / "config.yaml")
        config.model.optimizer.lr = 0.001 * (number + 1)
        OmegaConf.save(config, sweep_folder / str(number) / "config.yaml")
        (sweep_folder / str(number) / "summary.json").write_text(json.dumps({"fd": fd}))
    trials = [
        {"number": 0, "state": "complete", "value": 0.5, "error": None},
        {"number": 1, "state": "fail", "value": None, "error": "exit code 9"},
    ]
    best = {"number": 0, "value": 0.5, "command": "python -m lit_gen.train seed=1"}
    (sweep_folder / "sweep.json").write_text(
        json.dumps(
            {"objective": "fd", "best": best, "trials": trials, "importance": {"model.optimizer.lr": 1}}
        )
    )
    page, path = make(compose, sweep_folder)
    assert page.cells[:8] == ["1", "fail", "0.25", "0.002", "0", "complete", "0.5", "0.001"]  # by value
    text = path.read_text()
    assert "python -m lit_gen.train seed=1" in text and "exit code 9" in text and "Trial 0: pictures" in text
    parallel, importance, slice_ = plots_of(path)[:3]
    lr, objective = parallel["data"][0]["dimensions"]
    assert (lr["values"], objective["values"]) == ([0.002, 0.001], [0.25, 0.5])
    assert importance["data"][0]["x"] == [100.0] and slice_["data"][0]["text"] == ["1", "0"]
    monkeypatch.setattr(sweep, "curves", lambda histories: [])  # drawn above
    record = {"objective": "fd", "direction": "maximize", "best": best, "trials": trials}
    (sweep_folder / "sweep.json").write_text(json.dumps(record))
    page, _ = make(compose, sweep_folder)
    assert page.cells[0] == "0"


def test_importance_finds_the_key_that_matters():
    pytest.importorskip("optuna")
    draws = np.random.default_rng(0).random((2, 60)).tolist()
    shares = sweep._importance(
        dict(zip("ab", draws, strict=True)), [10 * a + b for a, b in zip(*draws, strict=True)]
    )
    assert shares["a"] > 0.9 and sum(shares.values()) == pytest.approx(1)


def test_axes_of_parallel_coordinates():
    keys = {"lr": [1e-4, 1e-2], "width": [8, 16], "net": ["ddpm", None]}
    *axes, objective = drawings.parallel_coordinates(keys, "fd", [1.0, 2.0], True)["data"][0]["dimensions"]
    assert axes[0]["values"] == pytest.approx([-4, -2]) and axes[0]["ticktext"][::4] == ["0.0001", "0.01"]
    assert axes[1]["values"] == [8, 16] and "tickvals" not in axes[1]
    assert [axes[2]["ticktext"][k] for k in axes[2]["values"]] == ["ddpm", "None"]
    assert objective["values"] == [1.0, 2.0]


def test_error_bars_stand_at_their_points():
    errors = {10: 0.5, 30: 0.25}
    (curve,) = drawings.curve_panel("fd", [("a", {30: 3.0, 10: 1.0, 20: math.nan}, errors)])["data"]
    assert (curve["x"], curve["y"], curve["error_y"]["array"]) == ([10, 30], [1.0, 3.0], [0.5, 0.25])


def test_long_curves_keep_their_extremes():
    points = {step: float(np.sin(step / 300)) for step in range(20_000)} | {777: 9.0, 778: -9.0}
    (curve,) = drawings.curve_panel("loss", [("a", points, {})], 100)["data"]
    assert len(curve["x"]) <= 100 and curve["x"] == sorted(curve["x"])
    assert {777, 778} <= set(curve["x"]) and all(
        points[x] == y for x, y in zip(curve["x"], curve["y"], strict=True)
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (2, 5), (3, 1)])
def test_a_trajectory_is_cut_where_it_was_put_together(tmp_path, rows, columns):
    images = torch.randint(0, 256, (rows * columns, 3, 6, 4), dtype=torch.uint8)
    save_png(grid(images, columns=columns, scale=2), tmp_path / "trajectory_0000010.png")
    shown = parts.frames(tmp_path / "trajectory_0000010.png", 10, 4)
    assert [p["caption"] for p in shown] == [
        f"trajectory, frame {k + 1} of {columns}" for k in range(columns)
    ]
    for k, shot in enumerate(shown):
        expected = parts.drawn(padded(images[k::columns]), "")
        assert shot["source"] == expected["source"]


def padded(images):
    """The images of a row of a grid of scale 2, each with the line at its right and below."""
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.cat(torch.nn.functional.pad(large, (0, 1, 0, 1), value=32).unbind(), -1)


def test_the_model_draws_all_steps_and_what_it_expects(run, compose, folder):
    _, path = make(compose, run, "trajectories=2", f"out={folder}/steps.html")
    captions = re.findall(r'alt="(step [^"]*)"', path.read_text())
    assert captions == [f"step {k} of 3" for k in range(4)]


def test_a_run_shows_its_policy(run, compose, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    policy = {
        "_target_": "lit_gen.augment.Policy",
        "ops": "classification",
        "sub_policies": [[["Invert", 0.5, None], ["Rotate", 1.0, 9]]],
    }
    config.data.augment = {"_target_": "lit_gen.augment.AutoAugment", "policy": policy}
    (tmp_path / "run").mkdir()
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    page, path = make(compose, tmp_path / "run", "sheets=2")
    (table,) = plots_of(path)
    assert table["data"][0]["z"] == [[0.5, 1.0]] and table["data"][0]["text"] == [["Invert", "Rotate, 9"]]
    assert page.tags.count("img") == 2  # two draws
    config.data.train = {"_target_": "lit_gen.data.Folder", "path": str(tmp_path / "gone")}
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    assert "cannot be read here" in make(compose, tmp_path / "run")[1].read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("python -m x data.password=hunter2 seed=1", "python -m x data.password=(hidden) seed=1"),
        ("x 'data.password=hunter two' seed=1", "x data.password=(hidden) seed=1"),
        ("x logger.api_key='a b' seed=1", "x logger.api_key=(hidden) seed=1"),
        ("https://host/file?token=abc&n=1", "https://host/file?token=(hidden)&n=1"),
        ("model.num_tokens=16 seed=1", "model.num_tokens=16 seed=1"),
    ],
)
def test_secrets_in_commands_are_hidden(text, shown):
    assert runs.redacted({"best": {"command": text}}) == {"best": {"command": shown}}


def test_a_policy_search(compose, tmp_path):
    OmegaConf.save({"name": "search", "strategy": {}}, tmp_path / "config.yaml")
    lines = [{"search": {}}, *({"number": k, "reward": r} for k, r in enumerate([0.5, 0.75, 0.25]))]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"numb')
    results = {"none": {"test": 0.5}, "found": {"reward": 0.75, "test": 0.625, "test_scores": [0.625]}}
    (tmp_path / "report.json").write_text(json.dumps({"results": results}))
    found = Policy([[("Equalize", 0.25, 2)], [("Rotate_BBox", 0.5, 3), ("FlipX_BBox", 1.0, 4)]])
    (tmp_path / "policy.yaml").write_text(found.to_yaml())
    page, path = make(compose, tmp_path)
    rewards, table = plots_of(path)
    assert [trace["y"] for trace in rewards["data"]] == [[0.5, 0.75, 0.25], [0.5, 0.75, 0.75]]
    assert table["data"][0]["z"] == [[0.25, None], [0.5, 1.0]]
    assert page.cells == ["none", "0.5", "", "found", "0.625", "0.75"]
    with pytest.raises(ConfigError, match="policy search"):
        make(compose, tmp_path, "trajectories=2")


def test_without_plotly_the_extra_is_named(run, compose, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-gen\[report\]'"):
        make(compose, run, f"out={tmp_path}/r.html")


@pytest.fixture(scope="module")
def browser():
    """A browser without a window; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, found = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not (driver and found):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    window.set_script_timeout(600)
    yield window
    window.quit()


def script(browser, text):
    """The value of a promise of the page."""
    code = f"const done = arguments[0]; (async () => {{ {text} }})().then(done, error => done('' + error))"
    return browser.execute_async_script(code)


DRAWN = """
    for (const plot of document.querySelectorAll(".plot")) {
      plot.scrollIntoView();
      while (!plot.querySelector(".main-svg")) await new Promise(done => setTimeout(done, 20));
    }
"""


@pytest.mark.slow
def test_a_browser_zooms_hovers_and_scrubs(browser, path):
    browser.get(path.as_uri())
    assert script(browser, DRAWN + "return document.querySelectorAll('.plot .main-svg').length") >= 6
    loss = "const loss = [...document.querySelectorAll('.plot')].find(p => p.layout?.title.text == 'loss');"
    shown = script(
        browser,
        loss
        + """
        await Plotly.relayout(loss, {"xaxis.range": [0, 10]});
        Plotly.Fx.hover(loss, [{curveNumber: 0, pointNumber: 3}]);
        await new Promise(done => setTimeout(done, 300));
        const linear = [...loss.querySelectorAll(".updatemenu-button")].find(b => b.textContent == "linear");
        linear.dispatchEvent(new MouseEvent("click", {bubbles: true}));
        return [loss._fullLayout.xaxis.range[1], loss.querySelector(".hoverlayer").textContent,
                loss._fullLayout.yaxis.type];
    """,
    )
    assert shown[0] == 10 and "train/loss" in shown[1] and shown[2] == "linear"
    scrubbed = script(
        browser,
        """
        const figure = [...document.querySelectorAll(".sequence")].at(-1);
        const slider = figure.querySelector("input"), images = [...figure.querySelectorAll("img")];
        const state = () => [figure.querySelector("figcaption").textContent,
                             images.filter(i => !i.hidden && i.naturalWidth).length];
        const states = [state()];
        slider.value = 0; slider.dispatchEvent(new Event("input")); states.push(state());
        figure.querySelector("button").click();
        while (slider.value != slider.max) await new Promise(done => setTimeout(done, 20));
        states.push(state());
        figure.querySelector("img").click();
        return [...states, figure.querySelectorAll("img.large").length];
    """,
    )
    last, first = ["trajectory, frame 4 of 4", 1], ["trajectory, frame 1 of 4", 1]
    assert scrubbed == [last, first, last, 4]
    quiet(browser)


@pytest.mark.slow
def test_a_browser_draws_and_sorts_a_sweep(browser, run, compose, tmp_path):
    scores = [0.5, 0.25, 0.75]
    for number, fd in enumerate(scores):
        shutil.copytree(run, tmp_path / str(number), ignore=shutil.ignore_patterns("checkpoints"))
        config = OmegaConf.load(run / "config.yaml")
        config.model.optimizer.lr = 0.0001 * 10**number
        OmegaConf.save(config, tmp_path / str(number) / "config.yaml")
        (tmp_path / str(number) / "summary.json").write_text(json.dumps({"objective": fd}))
    _, path = make(compose, tmp_path)
    browser.get(path.as_uri())
    parallel = script(
        browser,
        """
        const plot = document.querySelector(".plot");
        while (!plot.querySelector(".parcoords .axis-title")) await new Promise(done => setTimeout(done, 20));
        return [...plot.querySelectorAll(".axis-title")].map(title => title.textContent);
    """,
    )
    assert parallel == ["model.optimizer.lr", "objective"]
    column = "[...document.querySelectorAll('table:first-of-type td:nth-child(3)')].map(c => c.textContent)"
    assert browser.execute_script(f"return {column}") == ["0.25", "0.5", "0.75"]
    click = "document.querySelectorAll('th')[2].click();"
    assert browser.execute_script(f"{click}{click} return {column}") == ["0.75", "0.5", "0.25"]
    quiet(browser)


def quiet(browser):
    """No error in the page, and no request to a network."""
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=nowhere"], "no such folder"),
        (["run=."], "neither a run folder"),
        (["run={run}", "grids=0"], "at least 1"),
        (["run={run}", "sheets=-1"], "at least 0"),
        (["run={run}", "out={run}"], "name a file"),
    ],
)
def test_mistakes_are_named(run, compose, tmp_path, monkeypatch, overrides, says):
    monkeypatch.chdir(tmp_path)
    cfg = compose(*(o.format(run=run) for o in overrides), config_name="report")
    with pytest.raises(ConfigError, match=says):
        reporting.report(cfg)
    assert not list(tmp_path.iterdir())


def test_figures_are_strict_json_whatever_the_numbers_are():
    panel = drawings.curve_panel("fid", [("a", {1: 1.0, 2: 2.0}, {1: math.nan})])
    searched = drawings.search_rewards({"s": [0.1, math.nan]})
    json.dumps(drawings.finite([panel, searched]), allow_nan=False)
    parallel = drawings.parallel_coordinates({"S_max": [1.0, math.inf]}, "fid", [1.0, 2.0], True)
    axes = parallel["data"][0]["dimensions"]
    assert axes[0]["ticktext"] == ["1.0", "inf"]

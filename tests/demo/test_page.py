"""The page: what it is made of, and, in a real browser, what its tabs show.

The test in the browser writes the pictures of docs/demo.md where LITGEN_SCREENSHOTS names a folder.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.commands import demo
from lit_gen.demo import actions, opened, page
from lit_gen.errors import ConfigError
from lit_gen.export.source import Source
from lit_gen.export.weights import write_safetensors
from lit_gen.instantiate import config_dict, instantiate

gr = pytest.importorskip("gradio")
WAIT_SECONDS = 300  # of the slowest machine


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # restored at the end
        package = page.package(uploads)
        yield page.build(package, opened.open_models([], device="cpu"), uploads), uploads


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def components(built, kind):
    return [block for block in built[0].blocks.values() if isinstance(block, kind)]


def test_the_page_has_the_tabs_that_the_models_allow_and_tells_nobody(built):
    names = [tab.label for tab in components(built, gr.Tab)]
    assert names == ["Generate", "Restore", "Augment"] + ["Compare"] * (len(opened.SHIPPED) > 1)
    assert built[0].analytics_enabled is False
    for block in components(built, (gr.Image, gr.Gallery, gr.ImageEditor)):
        assert "share" not in (block.buttons or ["share"]) or block.buttons == []


def test_the_canvas_refuses_what_an_upload_may_not_be(built):
    from gradio.components.image_editor import EditorData
    from gradio.data_classes import FileData

    (canvas,) = components(built, gr.ImageEditor)
    for name, data, says in (("bomb.png", png(2500, 2500), "4 million"), ("text.png", b"text", "decoded")):
        (built[1] / name).write_bytes(data)
        with pytest.raises(gr.Error, match=says):
            canvas.preprocess(EditorData(background=FileData(path=str(built[1] / name)), layers=[]))
    (built[1] / "fine.png").write_bytes(png(20, 30))
    drawn = canvas.preprocess(EditorData(background=FileData(path=str(built[1] / "fine.png")), layers=[]))
    image, gap = page.image_and_gap(drawn, (1, 8, 8))
    assert image.shape == (1, 8, 8) and gap is None and not image.any()


def test_the_page_is_served_to_this_machine_alone():
    said = {}

    class Page:
        def queue(self, **options):
            said.update(options)

        def launch(self, **options):
            said.update(options)
            if options["server_port"] == 80:
                raise OSError("in use")
            return None, "http://127.0.0.1:7860/", None

    assert page.launch(gr, Page(), port=None, share=False, wait=False) == "http://127.0.0.1:7860/"
    assert said["server_name"] == "127.0.0.1" and said["share"] is False and said["api_open"] is False
    assert said["max_size"] == 16 and said["max_file_size"] == "8mb"
    assert not said["theme"]._stylesheets  # no fonts from elsewhere
    with pytest.raises(ConfigError, match="port=80"):
        page.launch(gr, Page(), port=80, share=False, wait=False)


def test_two_models_are_compared_and_mistakes_are_messages(built):
    actions = {f.fn.__qualname__: f.fn for f in built[0].fns.values() if f.fn is not None}
    compare = actions["Tabs.compare.<locals>.run"]
    one, cost, other, _ = compare("digits", "digits", "dpm_solver", 3, 2, 1)
    assert np.array_equal(one, other) and cost.startswith("3 network evaluations")
    with pytest.raises(gr.Error, match="number is missing"):
        compare("digits", "digits", "dpm_solver", None, 2, 1)
    with pytest.raises(gr.Error, match="not among the uploaded files"):
        actions["Tabs.augment.<locals>.run"]("/etc/passwd", "", "detection_v1", 2, 0)


def test_what_is_missing_is_said(compose):
    with pytest.raises(ConfigError, match="give run="):
        demo.demo(compose("ema=false", config_name="demo"))
    with pytest.raises(ConfigError, match="choose a test image"):
        page.image_and_gap(None, (1, 8, 8))
    with pytest.raises(ConfigError, match="number is missing"):
        page.whole(3, None)


def test_a_layer_of_the_canvas_is_the_gap():
    layer = np.zeros((40, 40, 4), np.uint8)
    layer[10:20, :, 3] = 255
    background = np.full((40, 40, 4), 255, np.uint8)
    image, gap = page.image_and_gap({"background": background, "layers": [layer]}, (3, 8, 8))
    assert image.shape == (3, 8, 8) and gap is not None and gap[0].any(1).nonzero()[:, 0].tolist() == [2, 3]


def test_transparency_is_laid_over_white_and_layers_are_of_one_size():
    clear = np.zeros((40, 40, 4), np.uint8)
    image, _ = page.image_and_gap({"background": clear, "layers": []}, (1, 8, 8))
    assert (image == 255).all()
    with pytest.raises(ConfigError, match="differ in size"):
        page.image_and_gap({"background": clear, "layers": [clear, clear[:20]]}, (1, 8, 8))


def test_one_computation_runs_at_a_time_whatever_the_tab(built):
    runs = [f for f in built[0].fns.values() if f.fn is not None and f.fn.__qualname__.endswith(".run")]
    assert len(runs) >= 5 and {(f.concurrency_id, f.concurrency_limit) for f in runs} == {("one", 1)}


@contextmanager
def served(folder, *options):
    """The address of `lit-gen demo`, as a user starts it in an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lit_gen", "demo", f"port={port}", "device=cpu", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
    assert not list(folder.iterdir())


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1010"):
        options.add_argument(argument)
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    browser.set_page_load_timeout(WAIT_SECONDS)
    yield browser
    browser.quit()


def cells(picture: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """(rows, columns, side, side): the pixels of images in a grid of cells of 128 pixels, and a line."""
    assert picture.shape == (rows * 129 + 1, columns * 129 + 1)
    images = [np.split(row, columns, 1) for row in np.split(picture[1:, 1:], rows)]
    step = 128 // side
    return np.stack(
        [np.stack([image[step // 2 : 128 : step, step // 2 : 128 : step] for image in row]) for row in images]
    )


class Person:
    """Who looks at the page, and waits."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, selector: str):
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            found = [e for e in self.browser.find_elements("css selector", selector) if e.is_displayed()]
            if found:
                return found[0]
            time.sleep(0.5)
        toasts = [e.text for e in self.browser.find_elements("css selector", ".toast-body")]
        raise AssertionError(f"{selector} did not appear; messages: {toasts}")

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def tab(self, name: str) -> None:
        self.find("button[role=tab]")
        next(
            e for e in self.browser.find_elements("css selector", "button[role=tab]") if e.text == name
        ).click()

    def picture(self, name: str) -> np.ndarray:
        source = self.find(f"#{name} img").get_attribute("src")
        with urllib.request.urlopen(source) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))

    def save(self, name: str) -> None:
        if folder := os.environ.get("LITGEN_SCREENSHOTS"):
            time.sleep(3)
            self.browser.execute_script("window.scrollTo(0, 0)")
            shot = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
            shot.quantize(256).save(Path(folder) / f"demo_{name}.png", optimize=True)


@pytest.mark.slow
def test_in_a_browser_a_gap_is_painted_and_restored(browser, tmp_path):
    with served(tmp_path) as address:
        _use_the_shipped_models(address, browser)


def _use_the_shipped_models(address, browser):
    from selenium.webdriver import ActionChains, Keys

    person = Person(browser)
    browser.get(address)
    person.click("#generate")
    generated = person.picture("generated")
    assert generated.shape[0] > 300
    last = person.picture("frame")
    person.save("generate")
    person.find("#moment input[type=range]").send_keys(Keys.HOME)
    end = time.monotonic() + WAIT_SECONDS
    while np.array_equal(person.picture("frame"), last):  # noise instead of the image
        assert time.monotonic() < end
        time.sleep(1)

    person.tab("Restore")
    person.click("#tests button img")
    time.sleep(5)  # until the image is on the canvas
    canvas = person.find("#canvas canvas")
    brush = ActionChains(browser).move_to_element_with_offset(canvas, -140, 20).click_and_hold()
    for _ in range(28):
        brush.move_by_offset(10, 0)
    brush.release().perform()
    time.sleep(2)
    person.click("#restore")
    pixels = cells(person.picture("restored"), 2, 5, 32)  # letters are the largest pictures
    gap = pixels[0, 0] != pixels[1, 0]  # noise and paper, as they are shown
    assert 32 < gap.sum() < 400
    paper = pixels[1, 0][gap].astype(int)
    noise, silence = (np.abs(row[1:, gap].astype(int) - paper).mean() for row in pixels)
    assert silence < 10 < 30 < noise  # what was believed stays, and what was hidden is filled
    person.save("restore")

    person.tab("Augment")
    person.click("#augment")
    assert person.picture("sheet").shape[1] > 300
    person.save("augment")

    person.tab("Compare")
    person.click("#compare")
    assert np.array_equal(person.picture("model1"), generated)  # the same model, seeds, and sampler
    assert person.picture("model2").shape[0] > 300
    person.save("compare")

    resources = "return performance.getEntriesByType('resource').map(e => e.name)"
    loaded = browser.execute_script(resources)
    assert loaded and [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def translator(compose, tmp_path):
    """An exported FUNIT of random weights."""
    torch.manual_seed(0)
    small = ("data.image_size=32", "model.generator.width=4", "data.num_classes=4", "data.target=4")
    cfg = compose("experiment=funit_glyphs", *small)
    module = instantiate(cfg.model).eval().requires_grad_(False)
    config = {"model": config_dict(cfg.model), "data": config_dict(cfg.data)}
    source = Source(module, config, tmp_path / "last.ckpt", None, True, 5)
    (tmp_path / "translator").mkdir()
    write_safetensors(source, tmp_path / "translator")
    return os.environ.get("LITGEN_TRANSLATOR") or str(tmp_path / "translator")


@pytest.mark.slow
def test_in_a_browser_images_are_translated_between_two_classes(translator, browser, tmp_path):
    from selenium.webdriver import Keys

    (tmp_path / "empty").mkdir()
    model = opened.load(translator, device="cpu")
    content, first, second = opened.own_images(model)
    with served(tmp_path / "empty", f"run={translator}") as address:
        person = Person(browser)
        browser.get(address)
        person.tab("Translate")
        person.click("#translate")
        shown = person.picture("translated")
        made = actions.translate(model, content, first, second, 0.0)
        assert np.array_equal(shown, page.picture(torch.cat([content, made]), len(content))[..., 0])
        person.find("#position input[type=range]").send_keys(Keys.END)
        person.click("#translate")
        end, made = time.monotonic() + WAIT_SECONDS, actions.translate(model, content, second)
        expected = page.picture(torch.cat([content, made]), len(content))[..., 0]
        while not np.array_equal(person.picture("translated"), expected):
            assert time.monotonic() < end
            time.sleep(1)
        person.save("translate")

        one = tmp_path / "own.png"
        Image.fromarray(content[1, 0].numpy()).save(one)
        browser.find_elements("css selector", "input[type=file]")[0].send_keys(str(one))
        person.find(".file-preview")
        person.click("#translate")
        own = page.picture(torch.cat([content[1:2], actions.translate(model, content[1:2], second)]), 1)
        while not np.array_equal(person.picture("translated"), own[..., 0]):
            assert time.monotonic() < end
            time.sleep(1)

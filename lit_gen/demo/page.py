"""The page: its tabs, and which function each button calls. What the functions do is in `actions`."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.decode import fit_to
from lit_gen.data.scenes import Scenes
from lit_gen.demo import actions
from lit_gen.demo.opened import ScoreModel, image_shape, own_images
from lit_gen.demo.uploads import boxes_of, file_bytes, read_drawing, read_upload, read_uploads
from lit_gen.errors import ConfigError
from lit_gen.images import grid
from lit_gen.models.api import Translator

EACH, UNKNOWN, OWN, BOTH = "each in turn", "not told", "the model's own", "both, one below the other"
GAP_INFO = "noise hides what was there; silence is paper, and believed"
CANVAS, SIDE = 384, 128  # pixels of the canvas, and that pictures are enlarged to at least
ONE: dict[str, Any] = {"concurrency_id": "one", "concurrency_limit": 1}  # of all tabs, at a time
NOTE = "Everything is computed on this machine, and nothing leaves it."


def package(uploads: Path) -> Any:
    """The package gradio, which then sends no statistics and keeps files in the folder `uploads`. Raises
    ConfigError where it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    try:
        import gradio  # pyright: ignore[reportMissingImports] an extra
    except ImportError as error:
        raise ConfigError("The page needs the package gradio: pip install 'lit-gen[demo]'.") from error
    return gradio


def build(gr: Any, models: dict[str, ScoreModel | Translator], uploads: Path, share: bool = False) -> Any:
    """The page, a `gradio.Blocks`, with the tabs that the models allow."""
    score = {name: model for name, model in models.items() if isinstance(model, ScoreModel)}
    translators = {name: model for name, model in models.items() if isinstance(model, Translator)}
    largest = sorted(score.items(), key=lambda item: -item[1].model.module.image_shape[-1])
    restorers = {name: model for name, model in largest if model.restores}
    with gr.Blocks(title="lit_gen", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# lit_gen\n{', '.join(models)}{'' if share else f'. {NOTE}'}")
        tabs = Tabs(gr, uploads)
        if score:
            tabs.generate(score)
        if restorers:
            tabs.restore(restorers)
        if translators:
            tabs.translate(translators)
        tabs.augment()
        if len(score) > 1:
            tabs.compare(score)
    return page


def launch(gr: Any, page: Any, *, port: int | None, share: bool, wait: bool = True) -> str:
    """Serves the page, to this machine alone unless `share` is true, and returns its address; with `wait`,
    when it is interrupted. One computation runs at a time, and at most 16 wait."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
    try:
        _, address, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=True, quiet=True,
            max_file_size="8mb", theme=theme, ssr_mode=False, css="img {image-rendering: pixelated}",
            footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"port={port}: the page cannot be served there ({error}).") from error
    print(f"The page is at {address}{f' and {public}' if public else ''} until Ctrl-C.", flush=True)
    if wait:
        page.block_thread()
    return address


class Tabs:
    """The tabs, each a method that is called within the page."""

    def __init__(self, gr: Any, uploads: Path):
        self.gr, self.uploads = gr, uploads

    def generate(self, models: dict[str, ScoreModel]) -> None:
        gr = self.gr
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                name, label = self._model(models, EACH)
                sampler, steps = self._sampler()
                guidance = gr.Slider(1, 5, 1, step=0.25, label="Guidance (1: none)")
                num = gr.Slider(1, actions.MAX_IMAGES, 20, step=1, label="Images")
                seed = gr.Number(0, label="Seed", precision=0)
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                images = self._picture("Images", "generated", height=330)
                cost = gr.Markdown()
                strip = self._picture(
                    "The first one, from noise; below, what the network takes it for", "strip"
                )
                moment = gr.Slider(
                    0, 1, 1, step=0.01, label="From noise (0) to the image (1)", elem_id="moment"
                )
                frame = self._picture("The first images at that moment", "frame", height=240)
                film = gr.State()

        def run(name: str, label: str, sampler: str, guidance: float, *numbers: float | None) -> Any:
            steps, num, seed = whole(*numbers)
            own = models[name]
            made = actions.generate(
                own.model, num=num, label=own.label(label), sampler=None if sampler == OWN else sampler,
                num_steps=steps, guidance=guidance, seed=seed,
            )  # fmt: skip
            first = made.frames[:, 0].transpose(0, 1).flatten(0, 1)  # noise, then what it is taken for
            film = picture(first, len(made.frames))
            return picture(made.images), made.cost, film, made.frames, 1, still(made.frames, 1)

        inputs = [name, label, sampler, guidance, steps, num, seed]
        button.click(self._told(run), inputs, [images, cost, strip, film, moment, frame], **ONE)
        moment.change(still, [film, moment], frame, queue=False, show_progress="hidden")

    def restore(self, models: dict[str, ScoreModel]) -> None:
        gr = self.gr
        with gr.Tab("Restore"), gr.Row():
            with gr.Column(scale=2):
                canvas = self._canvas()
                gr.Markdown("Or choose a test image:")
                tests = gr.Gallery(
                    thumbnails(next(iter(models.values()))), show_label=False, columns=6, height=160,
                    allow_preview=False, elem_id="tests", format="png", interactive=False, buttons=[],
                )  # fmt: skip
            with gr.Column(scale=1):
                name, label = self._model(models, UNKNOWN)
                operator = gr.Dropdown(list(actions.OPERATORS), label="What happened to the image")
                gap = gr.Radio([*actions.GAPS, BOTH], value=BOTH, label="The gap is ...", info=GAP_INFO)
                method = gr.Dropdown(list(actions.METHODS), label="Method")
                noise = gr.Slider(0, 1, 0, step=0.05, label="Noise (standard deviation)")
                steps = gr.Slider(1, actions.MAX_STEPS, 50, step=1, label="Steps")
                samples = gr.Slider(1, 8, 4, step=1, label="Answers")
                seed = gr.Number(0, label="Seed", precision=0)
                button = gr.Button("Restore", variant="primary", elem_id="restore")
            with gr.Column(scale=2):
                answers = self._picture("First what the model is shown, then its answers", "restored")
                cost = gr.Markdown()

        def choose(name: str, event: Any) -> Any:
            image, label = models[name].examples[event.index]
            shown = enlarged(image, CANVAS)
            told = UNKNOWN if label is None else models[name].classes[label]
            return {"background": shown, "layers": [], "composite": shown}, told

        def run(name: str, drawn: Any, label: str, operator: str, gap: str, *others: Any) -> Any:
            method, noise, *numbers = others
            steps, samples, seed = whole(*numbers)
            own = models[name]
            image, unknown = image_and_gap(drawn, own.model.module.image_shape)
            rows, costs = [], []
            for kind in gaps(operator, gap):
                seen, made = actions.restore(
                    own.model, image, unknown, operator=operator, gap=kind, method=method, num_steps=steps,
                    noise_std=noise, label=own.label(label), samples=samples, seed=seed,
                )  # fmt: skip
                rows += [seen[None], made.images]
                costs.append(f"{kind}: {made.cost}" if operator == "gap" else made.cost)
            return picture(torch.cat(rows), samples + 1), "; ".join(costs)

        choose.__annotations__["event"] = gr.SelectData
        tests.select(choose, name, [canvas, label])
        name.change(lambda name: (thumbnails(models[name]), None), name, [tests, canvas])
        inputs = [name, canvas, label, operator, gap, method, noise, steps, samples, seed]
        button.click(self._told(run), inputs, [answers, cost], **ONE)

    def translate(self, models: dict[str, Translator]) -> None:
        gr = self.gr
        texts = ("Content images", "Images that show a class", "Images that show another class")
        with gr.Tab("Translate"), gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown(list(models), label="Model", visible=len(models) > 1)
                gr.Markdown("Without images of yours, those of the run are taken.")
                files = [
                    gr.File(label=text, file_count="multiple", file_types=["image"], height=130)
                    for text in texts
                ]
                position = gr.Slider(
                    0, 1, 0, step=0.05, label="From the first class (0) to the other (1)", elem_id="position"
                )
                button = gr.Button("Translate", variant="primary", elem_id="translate")
            with gr.Column(scale=2):
                classes = self._picture("The two classes", "classes")
                result = self._picture("Content, and below it, translated", "translated")

        def run(name: str, content: Any, first: Any, second: Any, position: float) -> Any:
            model = models[name]
            given, (channels, *size) = (content, first, second), image_shape(model)
            own = (None,) * 3 if all(given) else own_images(model)
            images, *shown = (
                read_uploads(paths, self.uploads, channels=channels, image_size=size)
                if o is None or paths
                else o
                for paths, o in zip(given, own, strict=True)
            )
            made = actions.translate(model, images, shown[0], shown[1], position)
            columns = max(map(len, shown))
            rows = [torch.cat([x, x.new_zeros(columns - len(x), *x.shape[1:])]) for x in shown]
            return picture(torch.cat(rows), columns), picture(torch.cat([images, made]), len(images))

        inputs, outputs = [name, *files, position], [classes, result]
        button.click(self._told(run), inputs, outputs, **ONE)
        position.release(self._told(run), inputs, outputs, **ONE)

    def augment(self) -> None:
        gr = self.gr
        scene = Scenes("test", size=1, image_size=96)[0]
        text = "\n".join(", ".join(f"{x:g}" for x in box) for box in scene["boxes"].tolist())
        with gr.Tab("Augment"), gr.Row():
            with gr.Column(scale=1):
                sources = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
                file = self._picture("Image", "scene", value=array(scene["image"]), height=200, **sources)
                boxes = gr.Textbox(text, label="Boxes: x0, y0, x1, y1 in pixels, one a line", lines=3)
                policy = gr.Dropdown(list(actions.POLICIES), value="detection_v1", label="Policy")
                columns = gr.Slider(1, 8, 5, step=1, label="Draws")
                seed = gr.Number(0, label="Seed", precision=0)
                button = gr.Button("Draw", variant="primary", elem_id="augment")
                again = gr.Button("Draw with the next seed")
            with gr.Column(scale=2):
                sheet = self._picture("The image, and a row for each sub-policy of the policy", "sheet")

        def run(file: str | None, boxes: str, policy: str, *numbers: float | None) -> Any:
            columns, seed = whole(*numbers)
            if file is None:
                raise ConfigError("Give an image.")
            image = read_upload(file, self.uploads)
            return array(actions.augment(image, boxes_of(boxes), policy, columns=columns, seed=seed))

        inputs = [file, boxes, policy, columns, seed]
        button.click(self._told(run), inputs, sheet, **ONE)
        again.click(lambda seed: (seed or 0) + 1, seed, seed).then(self._told(run), inputs, sheet, **ONE)

    def compare(self, models: dict[str, ScoreModel]) -> None:
        gr, names = self.gr, list(models)
        with gr.Tab("Compare"):
            with gr.Row():
                chosen = [gr.Dropdown(names, value=names[i], label=f"Model {i + 1}") for i in (0, 1)]
                sampler, steps = self._sampler()
                num = gr.Slider(1, actions.MAX_IMAGES, 20, step=1, label="Images")
                seed = gr.Number(0, label="Seed of both", precision=0)
            button = gr.Button("Compare", variant="primary", elem_id="compare")
            with gr.Row():
                columns = []
                for i in (1, 2):
                    with gr.Column():
                        columns += [self._picture(f"Model {i}", f"model{i}"), gr.Markdown()]

        def run(one: str, other: str, sampler: str, *numbers: float | None) -> Any:
            steps, num, seed = whole(*numbers)
            solver = None if sampler == OWN else sampler
            made = [
                actions.generate(models[name].model, num=num, sampler=solver, num_steps=steps, seed=seed)
                for name in (one, other)
            ]
            return [part for result in made for part in (picture(result.images), result.cost)]

        button.click(self._told(run), [*chosen, sampler, steps, num, seed], columns, **ONE)

    def _told(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action, whose ConfigErrors appear as messages in the page."""

        @wraps(action)
        def call(*inputs: Any) -> Any:
            try:
                return action(*inputs)
            except ConfigError as error:
                raise self.gr.Error(str(error), print_exception=False) from error

        return call

    def _picture(self, text: str, name: str, **options: Any) -> Any:
        """A place for a picture, below its text; without gradio's button that puts it on the internet."""
        self.gr.Markdown(text)
        buttons = ["download", "fullscreen"]
        return self.gr.Image(show_label=False, format="png", elem_id=name, buttons=buttons, **options)

    def _model(self, models: dict[str, ScoreModel], default: str) -> tuple[Any, Any]:
        """The choice of a model, and that of a class, which follows it."""
        gr, first = self.gr, next(iter(models.values()))
        name = gr.Dropdown(list(models), label="Model", visible=len(models) > 1)
        label = gr.Dropdown(
            [default, *first.classes], value=default, label="Class", visible=bool(first.classes)
        )

        def update(name: str) -> Any:
            classes = models[name].classes
            return gr.Dropdown([default, *classes], value=default, visible=bool(classes))

        name.change(update, name, label)
        return name, label

    def _sampler(self) -> tuple[Any, Any]:
        sampler = self.gr.Dropdown([OWN, *actions.SAMPLERS], label="Sampler")
        return sampler, self.gr.Slider(1, actions.MAX_STEPS, 18, step=1, label="Steps")

    def _canvas(self) -> Any:
        gr = self.gr
        canvas = gr.ImageMask(
            label="Upload an image, and paint the gap", canvas_size=(CANVAS, CANVAS), fixed_canvas=True,
            sources=("upload", "clipboard"), transforms=(), elem_id="canvas", height=CANVAS + 140, buttons=[],
            brush=gr.Brush(default_size=CANVAS // 10, colors=["#e0503c"], color_mode="fixed"),
        )  # fmt: skip
        canvas.convert_and_format_image = self._sent  # instead of gradio's, which decodes whatever is sent
        return canvas

    def _sent(self, file: Any, flatten_on_white: bool = False) -> np.ndarray | None:
        """What was sent of the canvas, a file or its bytes, as uint8 (H, W, 4)."""
        if file is None:
            return None
        try:
            if isinstance(file, bytes | bytearray | memoryview):
                return read_drawing(bytes(file))
            return read_drawing(file_bytes(file.path, self.uploads))
        except ConfigError as error:
            raise self.gr.Error(str(error), print_exception=False) from error


def image_and_gap(drawn: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """(image uint8 (C, H, W) of `shape`, gap bool (1, H, W)) of what is on the canvas, transparency
    laid over white; None for no gap. Raises ConfigError for an empty canvas."""
    if drawn is None or drawn["background"] is None:
        raise ConfigError("Give an image: upload one, or choose a test image.")
    channels, *size = shape
    background = Image.fromarray(drawn["background"]).convert("RGBA")
    background = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background)
    background = background.convert("L" if channels == 1 else "RGB")
    image = torch.from_numpy(np.array(fit_to(background, size, "crop"))).reshape(*size, channels)
    painted = [torch.from_numpy(layer[..., 3].copy()) for layer in drawn["layers"]]
    if len({layer.shape for layer in painted}) > 1:
        raise ConfigError("The layers of the drawing differ in size: paint the gap again.")
    gap = actions.gap_of(torch.stack(painted).amax(0), size) if painted else None
    return image.permute(2, 0, 1), gap if gap is not None and gap.any() else None


def gaps(operator: str, gap: str) -> tuple[str, ...]:
    """The gaps that are restored, one after another; an operator without a gap is restored once."""
    if operator != "gap":
        return actions.GAPS[:1]
    return actions.GAPS if gap == BOTH else (gap,)


def whole(*values: float | None) -> list[int]:
    """Numbers of the page as integers. Raises ConfigError for a field that was emptied."""
    if None in values:
        raise ConfigError("A number is missing.")
    return [int(value) for value in values if value is not None]


def thumbnails(model: ScoreModel) -> list[np.ndarray]:
    """The test images, uint8 (H', W', 3), enlarged for the gallery."""
    return [enlarged(image, SIDE // 2) for image, _ in model.examples]


def picture(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images uint8 (N, C, H, W) as one picture (H', W', 3), small ones enlarged without smoothing."""
    scale = max(1, (SIDE if len(images) <= 24 else SIDE // 2) // max(images.shape[-2:]))
    return array(grid(images, columns, scale=scale))


def still(frames: Tensor | None, moment: float) -> np.ndarray | None:
    """The frames (F, n, 2, C, H, W) at `moment` in [0, 1]: the noisy images, and the estimates below."""
    if frames is None:
        return None
    frame = frames[round(moment * (len(frames) - 1))]
    return picture(torch.cat([frame[:, 0], frame[:, 1]]), len(frame))


def enlarged(image: Tensor, side: int) -> np.ndarray:
    """uint8 (C, H, W) as (H', W', 3), about `side` pixels long, without smoothing."""
    scale = max(1, side // max(image.shape[-2:]))
    return array(image.repeat_interleave(scale, -1).repeat_interleave(scale, -2))


def array(image: Tensor) -> np.ndarray:
    """uint8 (C, H, W) as (H, W, 3)."""
    return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()

"""What a few-shot translator does with unseen classes while it trains: a picture, and numbers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_gen.callbacks.contracts import Periodic, Translates, data_of, of
from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.grid import show
from lit_gen.callbacks.progress import working
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.errors import ConfigError
from lit_gen.evaluation.classifiers import ClassifierTraining, evaluation_classifier, has_contents
from lit_gen.evaluation.translation import TranslationTask
from lit_gen.funit.classifier import predict
from lit_gen.funit.evaluation import Measures, TargetClassifier, copy_content, evaluate, paste_example
from lit_gen.images import grid, to_float
from lit_gen.module import BaseModule, Results
from lit_gen.rng import keyed_generator


class Translations(Periodic):
    """Every `every` batches and at the end, with the averaged generator: translations of source images into
    every target class, which K images show.

    A picture, `grids/translations_<batches>.png` and W&B's `samples/translations`: content down the side, the
    class images along the top, translations inside. Numbers for each K of `ks`: `k_shot/top1_k<K>`, the
    share that a classifier of the target classes finds, and where the data know the answers `k_shot/l1_k<K>`
    to the true translation and `k_shot/content_k<K>`, the share whose content is still read. Those of the
    largest K are the scores `top1`, `l1` and `content`, by which a checkpoint can be chosen.

    The classifiers (`lit_gen.evaluation.classifiers`) are trained, where no earlier run has left them in the
    cache, at the first look, on the device of the training.

    Arguments
        contents: source images that are translated for the numbers.
        rows, columns: contents and target classes in the picture.
        classifiers: how the classifiers are trained; None trains none and leaves `top1` and `content` out.
        seed: of the content images and of the pasted images in the baseline.
    """

    requires = Translates

    def __init__(
        self,
        every: int = 1000,
        ks: Sequence[int] = (1, 5),
        contents: int = 32,
        rows: int = 8,
        columns: int = 8,
        classifiers: ClassifierTraining | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        super().__init__(every, "callbacks.translations")
        counts = {"contents": contents, "rows": rows, "columns": columns, "batch_size": batch_size}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"callbacks.translations.{name}={value}: must be at least 1.")
        if not ks or min(ks) < 1:
            raise ConfigError(
                f"callbacks.translations.ks={list(ks)}: give numbers of class images, such as [1, 5]."
            )
        self.ks, self.num_contents = sorted(set(ks)), contents
        self.rows, self.columns, self.training = rows, columns, classifiers
        self.batch_size, self.seed = batch_size, seed
        self._done, self.judged = -1, {}  # accuracies of the classifiers, once they are there

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.num_contents < trainer.world_size:
            raise ConfigError(
                f"callbacks.translations.contents={self.num_contents}: fewer than devices; "
                f"give each of the {trainer.world_size} one."
            )
        data = data_of(trainer, FewShotDataModule)
        self.task = TranslationTask.of(data, self.num_contents, self.ks[-1], self.seed)
        self.measures = Measures(truth=self.task.truth())

    def _judge(self, trainer: Trainer) -> None:
        """Adds the classifiers to what is measured."""
        data = data_of(trainer, FewShotDataModule)
        made = partial(
            evaluation_classifier,
            data,
            training=self.training,
            device=trainer.strategy.root_device,
            report=partial(working, trainer, announce=False),
        )
        classes = made("test")
        self.judged["classifier/test_accuracy"] = round(classes.accuracy, 4)
        classifiers = {"test": TargetClassifier(partial(predict, classes.network), self.task.places)}
        self.measures = replace(self.measures, classifiers=classifiers)
        if has_contents(data):
            letters = made("content")
            self.judged["classifier/content_accuracy"] = round(letters.accuracy, 4)
            self.measures = replace(self.measures, content_logits=partial(predict, letters.network))

    def finish(self, trainer: Trainer, module: BaseModule) -> None:
        start = time.perf_counter()
        if self._done != module.batches_seen:
            self.act(trainer, module)
        results, k = module.results, self.ks[-1]
        results.record(**{f"k_shot/{name}": round(value, 5) for name, value in self.newest.items()})
        paste = partial(paste_example, generator=keyed_generator(self.seed, "paste"))
        for name, baseline in {"copying": copy_content, "pasting": paste}.items():
            numbers = self._numbers(trainer, baseline, k)
            results.record(**{f"{name}/{key}": round(value, 5) for key, value in numbers.items()})
        results.record(**self.judged, **{"k_shot/seconds": round(time.perf_counter() - start, 1)})
        self._rows(k, results)

    def act(self, trainer: Trainer, module: BaseModule) -> None:
        """Measures and draws. Every rank translates its share of the contents; rank 0 draws."""
        step, model = module.batches_seen, of(module, Translates)
        self._done, self.newest = step, {}
        with evaluating(trainer):
            if self.training is not None and not self.judged:
                self._judge(trainer)
            for k in self.ks:
                numbers = self._numbers(trainer, model.translate, k)
                self.newest |= {f"{name}_k{k}": value for name, value in numbers.items()}
            if trainer.is_global_zero:
                self._draw(trainer, model, step)
        module.write({f"k_shot/{name}": value for name, value in self.newest.items()}, step)
        for name in ("top1", "l1", "content"):
            if (value := self.newest.get(f"{name}_k{self.ks[-1]}")) is not None:
                module.results.score(name, step, value)

    def _numbers(
        self, trainer: Trainer, translate: Callable[[Tensor, Tensor], Tensor], k: int
    ) -> dict[str, float]:
        """Means over all contents and target classes, on every rank the same."""
        if not self.measures.classifiers and self.measures.truth is None:
            return {}
        mine = self.task.part(trainer.global_rank, trainer.world_size)
        measures = replace(self.measures, truth=mine.truth(), content_label=mine.content_label)
        shown = {name: images[:k] for name, images in mine.examples.items()}
        found = evaluate(translate, mine.contents, shown, measures, self.batch_size)
        names = {"top1_test": "top1", "l1": "l1", "content": "content"}
        found = {short: found[name] for name, short in names.items() if name in found}
        if trainer.world_size > 1 and found:
            weighted = torch.tensor([*found.values(), 1.0], dtype=torch.float64) * len(mine.contents)
            total = trainer.strategy.reduce(weighted.to(trainer.strategy.root_device), reduce_op="sum")
            found = dict(zip(found, (total[:-1] / total[-1]).tolist(), strict=True))
        return found

    def _draw(self, trainer: Trainer, model: Translates, step: int) -> None:
        k = self.ks[-1]
        names = list(self.task.examples)[:: max(1, len(self.task.examples) // self.columns)][: self.columns]
        contents, examples = self.task.contents[: self.rows], [self.task.examples[name] for name in names]
        columns = [model.translate(to_float(contents), to_float(images)).cpu() for images in examples]
        picture = contact_sheet(contents, examples, torch.stack(columns, 1))
        show(trainer, "translations", picture, step, f"batch {step}, K = {k}, {', '.join(names)}")

    @staticmethod
    def _rows(k: int, results: Results) -> None:
        """Rows of the closing table: what was reached, and what copying and pasting reach."""
        titles = {
            "top1": f"translations that the classifier puts into the target class (K = {k})",
            "content": "translations whose content is read",
            "l1": "mean difference to the true translation",
        }
        for name, title in titles.items():
            if f"k_shot/{name}_k{k}" in results.summary:
                reached, copying, pasting = (
                    results.summary[key]
                    for key in (f"k_shot/{name}_k{k}", f"copying/{name}", f"pasting/{name}")
                )
                results.row(title, f"{reached:.3f} (copying {copying:.3f}, pasting {pasting:.3f})")


def contact_sheet(
    contents: Tensor,
    examples: Sequence[Tensor],
    translations: Tensor,
    truth: Tensor | None = None,
    shown: int = 3,
    scale: int = 0,
) -> Tensor:
    """Content down the side, the class images along the top, translations inside: one RGB picture (3, H, W).

    contents: uint8 (N, C, H, W). examples: T times uint8 (K, C, H, W), of which the first `shown` are drawn.
    translations, truth: (N, T, C, H, W); below every row of translations a row of the true ones.
    """
    empty = torch.full_like(contents[:1], 96)
    rows = []
    for k in range(min(shown, max(len(e) for e in examples))):
        rows.append(torch.cat([empty, *(e[k : k + 1] if k < len(e) else empty for e in examples)]))
    for i, content in enumerate(contents):
        rows.append(torch.cat([content[None], translations[i]]))
        if truth is not None:
            rows.append(torch.cat([empty, truth[i]]))
    return grid(torch.cat(rows), columns=len(examples) + 1, scale=scale)

"""Long work says what it is doing: before the first item, its pace and the time left, on rank 0 alone."""

from types import SimpleNamespace

import pytest

from lit_gen.callbacks import ProgressBar
from lit_gen.callbacks import progress as module
from lit_gen.callbacks.progress import working
from lit_gen.module import BaseModule


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def trainer(*callbacks, rank=0):
    return SimpleNamespace(callbacks=list(callbacks), is_global_zero=rank == 0)


def test_lines_of_a_log_file(clock, capsys):
    with working(trainer(ProgressBar(line_seconds=15)), "features of the test images", 1000) as advance:
        assert capsys.readouterr().out == "features of the test images: 1,000\n"  # before the first item
        for _ in range(4):
            clock.now += 10
            advance(250)
    assert capsys.readouterr().out.splitlines() == [
        "features of the test images: 500 of 1,000, 25/s, 20 s left",
        "features of the test images: 1,000 of 1,000, 25/s",
    ]


def test_lines_of_a_training_begin_without_numbers(clock, monkeypatch, capsys):
    bar, run = ProgressBar(line_seconds=15), BaseModule()
    one = SimpleNamespace(is_global_zero=True, max_steps=5, accumulate_grad_batches=1, callbacks=[bar])
    monkeypatch.setattr(BaseModule, "batches_seen", 0)
    bar.on_train_start(one, run)
    clock.now += 20
    monkeypatch.setattr(BaseModule, "batches_seen", 2)
    bar.on_train_batch_end(one, run)
    assert capsys.readouterr().out == "batch 2 of 5: 30 s left\n"


def test_short_work_that_is_not_announced_prints_nothing(clock, capsys):
    with working(trainer(ProgressBar()), "sampling", 10, announce=False) as advance:
        clock.now += 3
        advance(10)
    assert capsys.readouterr().out == ""


def test_other_ranks_and_trainings_without_a_bar_are_silent(clock, capsys):
    for quiet in (trainer(ProgressBar(), rank=1), trainer()):
        with working(quiet, "sampling", 10) as advance:
            clock.now += 100
            advance(10)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_bar_with_a_row_for_the_work(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = ProgressBar()
    alone = trainer(bar)
    with working(alone, "features", 4) as advance:
        advance(4)
    assert bar._bar is None  # closed: there is no training yet
    run = BaseModule()
    one = SimpleNamespace(is_global_zero=True, max_steps=5, accumulate_grad_batches=1, callbacks=[bar])
    bar.on_train_start(one, run)
    with pytest.raises(RuntimeError), working(one, "sampling", 8) as advance:
        advance(3)
        assert [(t.description, t.completed, t.total) for t in bar._bar.tasks] == [
            ("training", 0, 5),
            ("sampling", 3, 8),
        ]
        raise RuntimeError
    assert [t.description for t in bar._bar.tasks] == ["training"]
    bar.on_train_end(one, run)
    assert bar._bar is None
    assert "features" in capsys.readouterr().out

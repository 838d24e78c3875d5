"""Callbacks see the run; the progress bar writes for people and only where they look."""

import io
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from rich.console import Console

from convolt.callbacks import Callback, ProgressBar, StepEvent, epoch_line
from convolt.history import Epoch
from convolt.run import Run

EPOCH = Epoch(3, 0.04534, 0.9861, 0.0512, 0.984, 9.1e-4, 4.93, 12_345.6)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.create({}, out=tmp_path / "run") as run:
        return run


def step(number: int) -> StepEvent:
    return StepEvent(
        step=number, epoch=(number - 1) // 4 + 1, epochs=10, steps_per_epoch=4, loss=0.5, lr=1e-3, images=32
    )


def play(callback: Callback, run: Run) -> None:
    callback.on_start(run)
    for epoch in (1, 2):
        for number in range(1, 5):
            callback.on_step(step((epoch - 1) * 4 + number))
        callback.on_epoch(replace(EPOCH, epoch=epoch))
    callback.on_end({"test_accuracy": 0.5})


def test_without_a_terminal_there_is_one_line_per_epoch(run: Run) -> None:
    stream = io.StringIO()
    play(ProgressBar(Console(file=stream, width=40)), run)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == ("epoch  1/10  train 0.0453  98.61%  valid 0.0512  98.40%  lr 0.00091  12,346 images/s  4.9 s")
    assert lines[1].startswith("epoch  2/10")
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_the_bar_shows_and_leaves(run: Run) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    play(ProgressBar(console), run)
    text = stream.getvalue()
    assert "4/4" in text
    assert text.count("images/s") == 2
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_default_stream_is_standard_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    play(ProgressBar(), run)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 2


def test_end_before_start_is_harmless() -> None:
    ProgressBar(Console(file=io.StringIO())).on_end(None)


def test_line_without_validation_and_with_skipped_steps() -> None:
    line = epoch_line(replace(EPOCH, valid_loss=None, valid_accuracy=None, skipped_steps=2))
    assert line == (
        "epoch 3  train 0.0453  98.61%  lr 0.00091  12,346 images/s  4.9 s  2 steps skipped (loss not finite)"
    )


def test_a_callback_defines_only_what_it_wants(run: Run) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_step(self, step: StepEvent) -> None:
            self.seen.append(step.loss)

    losses = Losses()
    play(losses, run)
    assert losses.seen == [0.5] * 8


def test_events_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        step(1).loss = 0.0  # type: ignore[misc]

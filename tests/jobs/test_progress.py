"""Where a run is, as lines without a terminal."""

import io

import pytest
from rich.console import Console

from jobs import progress as module
from jobs.progress import TrainingProgress

METRICS = {"train/loss": 2.5, "train/tokens_per_s": 1234.0, "train/step_s": 60.0}
VALID = {"valid/loss": 2.25, "valid/bits_per_byte": 1.5}


def shown(*events: tuple[int, dict[str, float]], terminal: bool = False) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
    with TrainingProgress(100, console) as progress:
        progress.line("a [bracket] stays")
        for step, metrics in events:
            progress.step(step, metrics)
    return output.getvalue().splitlines()


def test_lines_without_a_terminal() -> None:
    assert shown((10, METRICS)) == [
        "starting workers",
        "a [bracket] stays",
        "step 10/100 | loss 2.500 | 1,234 tokens/s | eta 1:30:00",
    ]


def test_a_loss_that_is_no_number_is_shown_as_such() -> None:
    metrics = {name: value for name, value in METRICS.items() if name != "train/loss"}
    assert shown((10, metrics))[-1] == "step 10/100 | loss nan | 1,234 tokens/s | eta 1:30:00"


def test_steps_that_come_fast_are_left_out_but_not_validations_and_the_end() -> None:
    lines = shown((1, METRICS), (2, METRICS), (3, METRICS | VALID), (4, METRICS), (100, METRICS))
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "step 1/100",
        "step 3/100",
        "step 100/100",
    ]
    assert lines[3].endswith("held-out loss 2.250, 1.500 bits per byte")


def test_steps_that_come_slowly_are_all_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    assert len(shown((1, METRICS), (2, METRICS), (3, METRICS))) == 5


def test_a_terminal_has_a_live_line_that_keeps_validations() -> None:
    text = "\n".join(
        shown((50, METRICS), (51, METRICS | VALID | {"train/mfu": 0.4}), terminal=True)
    )
    assert "51/100" in text
    assert "held-out loss 2.250" in text
    assert "mfu 40.0%" in text

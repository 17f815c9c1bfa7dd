"""Recall of pairs, tries at problems, intervals, and names of tasks that do not exist."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.runs import EvaluateRun
from nsa_platform.config.tasks import AimeTask, MqarTask
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding, Prompt, one_by_one
from nsa_platform.evaluate.scores import AnswerScore, ModelScorer
from nsa_platform.evaluate.tasks.aime import boxed_integer
from nsa_platform.evaluate.tasks.results import Row, TaskResult, bootstrap, score_of, wilson
from nsa_platform.evaluate.tasks.suite import open_task, run_task
from nsa_platform.evaluate.tasks.task import (
    ForcedSample,
    ReasonedSample,
    Sample,
    Task,
    WrittenSample,
)


def never(*_: object) -> NoReturn:
    raise AssertionError("not asked for")


def mqar(**settings: object) -> MqarTask:
    return MqarTask.parse(
        {"kind": "mqar", "lengths": [64, 128], "pairs": 8, "samples": 3, **settings}
    )


def test_pairs_are_asked_for_again(corpus) -> None:
    samples = list(open_task(mqar(), corpus.tokenizer).samples())
    assert len(samples) == 6
    for sample in samples:
        assert isinstance(sample, ForcedSample)
        assert len(sample.prompt) + len(sample.answer) == int(sample.cells[0])
        table = dict(zip(sample.prompt[::2], sample.prompt[1::2], strict=True))
        assert len(table) == len(sample.counted) == 8
        asked = [(sample.answer[place - 1], sample.answer[place]) for place in sample.counted]
        assert dict(asked) == table
        ids = {*sample.prompt, *sample.answer}
        assert not ids & set(corpus.tokenizer.control_tokens)


def test_recall_is_told_from_guessing(corpus, model) -> None:
    def recall(prompt: list[int], answer: list[int]) -> AnswerScore:
        table = dict(zip(prompt[::2], prompt[1::2], strict=True))
        guesses = [table.get(before) for before in [prompt[-1], *answer[:-1]]]
        hits = tuple(guess == token for guess, token in zip(guesses, answer, strict=True))
        return AnswerScore((0.0,) * len(answer), hits)

    task = open_task(mqar(), corpus.tokenizer)
    result = run_task(task, corpus.tokenizer, write=never, score=recall)
    assert result.mean == 1.0
    untrained = ModelScorer(model).answer
    result = run_task(task, corpus.tokenizer, write=never, score=untrained)
    assert result.mean < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 20}, "lengths=64 must be at least 4 x pairs=80"),
        ({"vocabulary": 10}, "vocabulary=10 must lie in"),
        ({"vocabulary": 100_000}, "vocabulary=100000 must lie in"),
    ],
)
def test_pairs_need_room(corpus, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_task(mqar(**settings), corpus.tokenizer)


def aime(file: Path, **settings: object) -> AimeTask:
    return AimeTask.parse(
        {"kind": "aime", "file": str(file), "attempts": 4, "max_new_tokens": [16, 32], **settings}
    )


def test_problems_are_tried_several_times(corpus, tmp_path: Path) -> None:
    file = tmp_path / "aime.jsonl"
    rows = [{"problem": "1+1?", "answer": 2}, {"problem": "9*111?", "answer": "0999"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: list[Decoding] = []

    def answer(prompt: Prompt) -> list[int]:
        drawn.append(prompt.decoding)
        assert "1+1?" in corpus.tokenizer.decode(prompt.ids) or prompt.max_new_tokens in (16, 32)
        lucky = prompt.decoding.seed % 4 == 0
        easy = "1+1?" in corpus.tokenizer.decode(prompt.ids)
        return corpus.tokenizer.encode(f"\\boxed{{{2 if easy else 999 if lucky else 7}}}")

    task = open_task(aime(file), corpus.tokenizer)
    result = run_task(task, corpus.tokenizer, write=one_by_one(answer), score=never)
    assert (task.size, len(result.rows)) == (16, 16)
    assert len({each.seed for each in drawn[:8]}) == 8, "each try has its own seed"
    assert {(each.temperature, each.top_p) for each in drawn} == {(0.7, 0.95)}
    score = result.cells["16"]
    assert (score.mean, score.samples, score.units) == ((4 + 1) / 8, 8, 2)
    assert (score.method, score.low, score.high) == ("bootstrap", 0.25, 1.0)
    assert score.new_tokens > 5
    file.write_text('{"problem": "x", "answer": "1/2"}\n')
    with pytest.raises(ValueError, match="line 1: answer='1/2': must be an integer from 0 to 999"):
        open_task(aime(file), corpus.tokenizer)
    file.write_text(json.dumps({"problem": "long " * 900, "answer": 1}))
    with pytest.raises(ValueError, match="more than tasks: aime: max_problem_tokens=2048"):
        open_task(aime(file), corpus.tokenizer)
    with pytest.raises(OSError, match="it should be JSON lines with `problem` and `answer`"):
        open_task(aime(tmp_path / "none"), corpus.tokenizer)


class Asked:
    """A task of written, forced and reasoned samples in turn, and a model that answers the last
    prompt first; both tell what happened in `events`."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.events: list[str] = []
        self.task = Task("mixed", size, self._samples)
        self._size = size

    def write(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        texts = [self.tokenizer.decode(prompt.ids) for prompt in prompts]
        self.events.append(f"asked {' '.join(texts)}")
        for place in reversed(range(len(prompts))):
            yield place, self.tokenizer.encode(f"re:{texts[place]}")

    def score(self, prompt: list[int], answer: list[int]) -> AnswerScore:
        self.events.append("scored")
        return AnswerScore((0.0,) * len(answer), (True,) * len(answer))

    def _samples(self) -> Iterator[Sample]:
        for number in range(self._size):
            self.events.append(f"made {number}")
            match number % 3:
                case 0:
                    yield self._written(f"w{number}", str(number))
                case 1:
                    yield ForcedSample(("f",), str(number), [1, 2], [3], (0,))
                case _:
                    yield ReasonedSample(
                        self.tokenizer.encode(f"r{number}"),
                        9,
                        Decoding(),
                        lambda thought, unit=str(number): self._written(f"({thought})", unit),
                    )

    def _written(self, text: str, unit: str) -> WrittenSample:
        return WrittenSample(
            ("w",), unit, self.tokenizer.encode(text), (), 9, lambda written: float(len(written))
        )


@pytest.mark.parametrize("group_size", [1, 2, 4, 7, 256])
def test_rows_are_in_the_order_of_samples_whatever_the_groups(corpus, group_size: int) -> None:
    asked, done = Asked(corpus.tokenizer, 7), []
    result = run_task(
        asked.task,
        corpus.tokenizer,
        write=asked.write,
        score=asked.score,
        group_size=group_size,
        advance=lambda: done.append(None),
    )
    assert len(done) == 7
    assert [row.unit for row in result.rows] == [str(number) for number in range(7)]
    written = ["re:w0", "", "re:r2\n\nre:(re:r2)", "re:w3", "", "re:r5\n\nre:(re:r5)", "re:w6"]
    assert [row.written for row in result.rows] == written
    thought, concluded = (len(corpus.tokenizer.encode(text)) for text in ("re:r2", "re:(re:r2)"))
    assert result.rows[2].new_tokens == thought + concluded
    assert result.rows[2].prompt_tokens == len(corpus.tokenizer.encode("r2"))
    assert result.rows[2].score == len("re:(re:r2)")


def test_a_group_is_made_when_the_one_before_is_answered(corpus) -> None:
    asked = Asked(corpus.tokenizer, 6)
    run_task(asked.task, corpus.tokenizer, write=asked.write, score=asked.score, group_size=3)
    assert asked.events == [
        *("made 0", "made 1", "made 2", "scored", "asked r2", "asked w0 (re:r2)"),
        *("made 3", "made 4", "made 5", "scored", "asked r5", "asked w3 (re:r5)"),
    ]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (r"so \boxed{12} or \boxed{ 034 }.", 34),
        (r"\boxed{1{,}000}", None),
        (r"\boxed{1,000}", 1000),
        (r"\boxed{\frac12}", None),
        (r"\boxed{5} then \boxed{\frac{1}{2}}", None),
        (r"\boxed{\frac{1}{2}} then \boxed{5}", 5),
        (r"\boxed{1, 2}", None),
        (r"\boxed{12,3456}", None),
        (r"\boxed{$\ 1\,234 $}", 1234),
        (r"\boxed{5} then \boxed{12", 5),
        (r"\boxed{7 \} } then \boxed{\boxed{8}}", 8),
        (rf"\boxed{{{'9' * 5000}}}", None),
        (r"\\boxed{6}", 6),
        (r"x \\\boxed{6} \\{", 6),
        ("the answer is 12", None),
    ],
)
def test_the_answer_is_the_last_box(written: str, found: int | None) -> None:
    assert boxed_integer(written) == found


def rows(scores: list[float], unit: str = "") -> list[Row]:
    return [Row(("a",), unit or str(i), 1, (), "", 1, score) for i, score in enumerate(scores)]


def test_intervals() -> None:
    assert wilson([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson([1.0] * 10)[1] == pytest.approx(1.0)
    assert score_of(rows([1.0, 0.0, 1.0])).method == "wilson"
    fractions = score_of(rows([0.25, 0.5, 0.75, 1.0] * 10))
    assert fractions.method == "bootstrap"
    assert fractions.low < fractions.mean == 0.625 < fractions.high
    # Standard error of 40 such values: 0.28 / sqrt(40) = 0.044.
    assert fractions.high - fractions.low == pytest.approx(3.92 * 0.0442, rel=0.15)
    alike = score_of(rows([1.0, 0.0, 1.0, 1.0], unit="same"))
    assert (alike.low, alike.high, alike.units) == (0.0, 1.0, 1)
    assert bootstrap([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_equal_scores_are_no_certainty(score: float) -> None:
    """30 problems with 4 tries each, all with the same mean."""
    tries = [score] * 4 if score != 0.5 else [0.0, 1.0, 1.0, 0.0]
    cell = score_of([row for unit in range(30) for row in rows(tries, unit=str(unit))])
    assert (cell.method, cell.mean, cell.samples, cell.units) == ("wilson", score, 120, 30)
    # z^2 / (n + z^2) with z = 1.96 and n = 30; in the middle 1.96 x 0.5 / sqrt(n + z^2).
    bounds = {0.0: (0.0, 0.1135), 0.5: (0.3315, 0.6685), 1.0: (0.8865, 1.0)}
    assert (cell.low, cell.high) == pytest.approx(bounds[score], abs=1e-4)


def test_the_mean_is_over_first_cells() -> None:
    scores = {("a", "x"): [1.0, 1.0, 1.0], ("b", "x"): [0.0]}
    made = [
        Row(cells, f"{cells}/{i}", 1, (), "", 1, score)
        for cells, each in scores.items()
        for i, score in enumerate(each)
    ]
    result = TaskResult("t", made)
    assert {cell: score.mean for cell, score in result.cells.items()} == {"a": 1, "x": 0.75, "b": 0}
    assert result.mean == 0.5


def test_names_and_keys_of_tasks_are_checked() -> None:
    def parsed(*tasks: dict[str, object]) -> EvaluateRun:
        tree = {"name": "x", "checkpoint": "model", "data": "data", "tasks": list(tasks)}
        return EvaluateRun.parse(tree)

    with pytest.raises(ConfigError, match="unknown kind 'niah_singel_1'; did you mean 'niah_singl"):
        parsed({"kind": "niah_singel_1"})
    with pytest.raises(ConfigError, match=r"tasks\.0\.lenghts: unknown key; did you mean 'length"):
        parsed({"kind": "vt", "lenghts": [4096]})
    with pytest.raises(ConfigError, match=r"tasks\.1\.file: is required"):
        parsed({"kind": "vt"}, {"kind": "qa_1"})
    with pytest.raises(ConfigError, match=r"tasks\.0: essays is of no use to niah_multikey_2"):
        parsed({"kind": "niah_multikey_2", "essays": "essays"})
    with pytest.raises(ConfigError, match="tasks: vt must not stand twice"):
        parsed({"kind": "vt"}, {"kind": "vt", "lengths": [8192]})
    run = parsed({"kind": "vt", "lengths": [128, 256]}, {"kind": "mqar"})
    assert [task.longest for task in run.tasks] == [256, 4096]
    assert EvaluateRun.parse(run.model_dump(mode="json")) == run

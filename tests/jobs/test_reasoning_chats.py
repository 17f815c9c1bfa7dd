"""Problems against a solver that reads their text alone; chats against the task that asks them."""

import json
import re
from pathlib import Path

import pytest

from jobs import reasoning_chats as job
from nsa_platform.config.tasks import AimeTask
from nsa_platform.data.tokenizer import train_tokenizer
from nsa_platform.evaluate.tasks.aime import aime, boxed_integer
from nsa_platform.evaluate.tasks.task import WrittenSample

NAMES = [f"n{i}" for i in range(60)]


def solved(text: str) -> tuple[int, int]:
    """The answer, and the steps to it, by following from the start what each name leads to."""
    lines = re.findall(r"^([A-Z]\w+) (\w+) (\w+)\.$", text, re.MULTILINE)
    leads = {first.lower(): (name, job.NUMBERS.index(more)) for first, name, more in lines}
    assert len(leads) == len(lines)  # told once for each name
    asked = re.search(r"If (\w+) is (\w+), what is (\w+)\?", text)
    assert asked
    last, value, steps = asked[1], job.NUMBERS.index(asked[2]), 0
    while last != asked[3]:
        last, more = leads[last]
        value, steps = (value + more) % 10, steps + 1
    return value, steps


def added(line: str) -> tuple[int, int, int]:
    """The numbers of a sum that is told."""
    told = re.fullmatch(r"(?:so )?(\w+) plus (\w+) is (\w+)\.", line)
    assert told
    first, second, total = (job.NUMBERS.index(word) for word in told.groups())
    assert total == (first + second) % 10
    return first, second, total


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_the_answer_follows_from_the_text_and_the_steps_lead_there(steps):
    problem = job.make_problem(NAMES, steps=steps, seed=f"a/{steps}")
    assert solved(problem.text) == (problem.answer, steps)
    assert problem.answer == boxed_integer(problem.solution)
    assert len(problem.steps) == steps
    value = None
    for step in problem.steps:
        told, line = step.split(": ")
        first, second, total = added(line)
        assert value in (None, first) and told.split()[2] == job.NUMBERS[second]
        assert f"{told}." in problem.text
        value = total
    assert value == problem.answer
    # More is told than the way needs, and not in its order.
    assert problem.text.count("\n") == steps + steps // 2
    assert problem == job.make_problem(NAMES, steps=steps, seed=f"a/{steps}")


def test_a_problem_of_128_steps_has_names_enough():
    problem = job.make_problem(job.names(128), steps=128, seed="long")
    assert solved(problem.text) == (problem.answer, 128)
    assert len(set(job.names(215))) == job.num_names(215) == 324
    with pytest.raises(ValueError, match="--steps=216 needs 326 names, there are 325"):
        job.names(216)


def test_what_is_written_is_what_the_task_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [str(tmp_path), "--chats", "12", "--problems", "4", "--steps", "2", "8"]
    for told in ("", f"warning: {tmp_path}: the problems and chats that were there are replaced\n"):
        job.main(command)
        assert capsys.readouterr().err == told
    read = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("text", "chats", "problems")
    }
    others = [row["text"] for row in read["text"] if "what is" not in row["text"]]
    sums = [text for text in others if text.startswith("so ")]
    assert [len(rows) for rows in read.values()] == [12 + 12, 12, 4]
    assert len(others) == 12 and len(sums) == 6
    assert all(line.startswith("so ") and added(line) for line in "".join(sums).splitlines())
    for lines in (text.splitlines() for text in others if text not in sums):
        first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        assert first != second and sorted(first) == sorted(second)
        assert len({line.split()[0] for line in first}) == len(first) == job.num_names(8)
    assert [row["steps"] for row in read["problems"]] == [2, 8, 2, 8]
    worked = [row["text"] for row in read["text"] if row["text"] not in others]
    assert all(each.count(": ") == 2 for each in worked)  # short ones alone
    asked = {row["messages"][0]["content"].split("\n\n")[0] for row in read["chats"]}
    assert len(asked) == 12 and not asked & {row["problem"] for row in read["problems"]}

    texts = [row["text"] for row in read["text"]]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer")
    task = aime(
        AimeTask(kind="aime", file=str(tmp_path / "problems.jsonl"), attempts=1, chat=True),
        tokenizer,
    )
    sample = next(iter(task.samples()))
    assert isinstance(sample, WrittenSample)
    chat = job._messages(job.make_problem(job.names(8), steps=2, seed="0/held out/0"))
    assert chat[0]["content"].strip() in tokenizer.decode(sample.prompt)
    assert sample.score(chat[1]["content"]) == 1.0 and sample.score("\\boxed{1000}") == 0.0


@pytest.mark.parametrize("flags", [("0", "4", "2"), ("4", "0", "2"), ("4", "4", "0")])
def test_sizes_that_make_nothing_are_refused(tmp_path, flags, capsys):
    chats, problems, steps = flags
    with pytest.raises(SystemExit):
        job.main([str(tmp_path / "x"), "--chats", chats, "--problems", problems, "--steps", steps])
    assert "must be at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="9 steps need 15 names, got 5"):
        job.make_problem(NAMES[:5], steps=9, seed="x")

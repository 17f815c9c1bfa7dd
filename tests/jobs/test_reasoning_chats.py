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


def solved(text: str) -> int:
    """The answer by reading the sentences again and again until the asked name is known."""
    known: dict[str, int] = {}
    asked = re.search(r"What is (\w+)\?", text)
    assert asked
    while asked[1] not in known:
        before = len(known)
        for name, told in re.findall(r"(\w+) is ([^.]+)\.", text):
            parts = told.split()
            if len(parts) == 1:
                known[name] = int(parts[0])
            elif parts[0] in known and parts[2] in known:
                sign = 1 if parts[1] == "+" else -1
                known[name] = (known[parts[0]] + sign * known[parts[2]]) % 1000
        assert len(known) > before or asked[1] in known
    return known[asked[1]]


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_the_answer_follows_from_the_text_and_the_steps_lead_there(steps):
    problem = job.make_problem(NAMES, steps=steps, seed=f"a/{steps}")
    assert problem.answer == solved(problem.text) == boxed_integer(problem.solution)
    assert len(problem.steps) == steps
    for step in problem.steps:
        name, _, numbers, value = step.split(" = ")
        left, sign, right = numbers.split()
        wanted = int(left) + (int(right) if sign == "+" else -int(right))
        assert int(value) == wanted % 1000 and f"{name} is " in problem.text
    # More is told than the way needs, and not in its order.
    assert problem.text.count(" is ") == 3 + steps + steps // 2 + 1
    assert problem == job.make_problem(NAMES, steps=steps, seed=f"a/{steps}")


def test_what_is_written_is_what_the_task_asks(tmp_path: Path):
    job.main([str(tmp_path), "--chats", "12", "--problems", "4", "--steps", "2", "8"])
    read = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("text", "chats", "problems")
    }
    assert [len(rows) for rows in read.values()] == [12, 12, 4]
    assert [row["steps"] for row in read["problems"]] == [2, 8, 2, 8]
    assert all(row["text"].count("\n") == 2 + 2 for row in read["text"])  # short ones alone
    asked = {row["messages"][0]["content"].split("\n")[0] for row in read["chats"]}
    assert len(asked) == 12 and not asked & {row["problem"] for row in read["problems"]}

    texts = [row["text"] for row in read["text"]]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer")
    task = aime(
        AimeTask(kind="aime", file=str(tmp_path / "problems.jsonl"), attempts=1, chat=True),
        tokenizer,
    )
    sample = next(iter(task.samples()))
    assert isinstance(sample, WrittenSample)
    chat = job._messages(job.make_problem(job.names(), steps=2, seed="0/held out/0"))
    assert chat[0]["content"].strip() in tokenizer.decode(sample.prompt)
    assert sample.score(chat[1]["content"]) == 1.0 and sample.score("\\boxed{1000}") == 0.0


@pytest.mark.parametrize("flags", [("0", "4", "2"), ("4", "0", "2"), ("4", "4", "0")])
def test_sizes_that_make_nothing_are_refused(tmp_path, flags, capsys):
    chats, problems, steps = flags
    with pytest.raises(SystemExit):
        job.main([str(tmp_path / "x"), "--chats", chats, "--problems", problems, "--steps", steps])
    assert "must be at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="9 steps need 16 names, got 5"):
        job.make_problem(NAMES[:5], steps=9, seed="x")

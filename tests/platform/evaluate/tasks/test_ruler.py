"""RULER's thirteen: exact lengths, the same samples again, and readers that solve them by rule."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.config.tasks import NiahTask, QaTask, TaskConfig, VariableTrackingTask, WordsTask
from nsa_platform.data.chat import render_prompt
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Prompt, one_by_one
from nsa_platform.evaluate.tasks.fitting import largest
from nsa_platform.evaluate.tasks.niah import SHAPES
from nsa_platform.evaluate.tasks.ruler_scores import any_of, share_of
from nsa_platform.evaluate.tasks.suite import open_task, run_task
from nsa_platform.evaluate.tasks.task import WrittenSample

LENGTHS = (2000, 2600)


def read_needles(text: str) -> str:
    """Every value of the keys that the question names."""
    names = re.findall(r"Which magic \w+ of (.+) does the text above name", text)[-1]
    wanted = re.split(r", | and ", names)
    pairs = re.findall(r"A magic \w+ of (\S+(?: \S+)?) is (\S+)\.\n", text)
    return " ".join(value for key, value in pairs if key in wanted or any(
        each.endswith(key) for each in wanted
    ))  # fmt: skip


def follow_chains(text: str) -> str:
    text = text[text.rindex("Follow the chains") :]
    value = re.findall(r"hold the value (\d+)", text)[-1]
    holding = {name for name, number in re.findall(r"VAR (\w+) = (\d+)", text) if number == value}
    for _ in range(20):
        holding |= {
            new for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", text) if old in holding
        }
    return " ".join(sorted(holding))


def count_words(text: str) -> str:
    listed = text[text.rindex("A numbered list") : text.rindex("\nQuestion:")].split("\n", 1)[1]
    counts = Counter(re.findall(r"\d+\. ([^\d]+?)(?= \d+\. |$)", listed))
    return ", ".join(word for word, _ in counts.most_common(10))


def count_codes(text: str) -> str:
    body = text[text.index("\n") : text.rindex("\nQuestion:")]
    codes = Counter(word for word in body.split() if re.fullmatch("[a-z]{6}", word))
    return " ".join(word for word, _ in codes.most_common(3))


GENERATED: list[tuple[str, Callable[[str], str]]] = [
    *((kind, read_needles) for kind in SHAPES),
    ("vt", follow_chains),
    ("cwe", count_words),
    ("fwe", count_codes),
]


def written(config: TaskConfig, tokenizer: Tokenizer) -> list[WrittenSample]:
    samples = list(open_task(config, tokenizer).samples())
    assert all(isinstance(sample, WrittenSample) for sample in samples)
    return [sample for sample in samples if isinstance(sample, WrittenSample)]


def config_of(kind: str, **settings: object):
    model = {"vt": VariableTrackingTask, "cwe": WordsTask, "fwe": WordsTask}.get(kind, NiahTask)
    return model.parse({"kind": kind, "lengths": LENGTHS, "samples": 2, **settings})


@pytest.mark.parametrize(("kind", "reader"), GENERATED, ids=[kind for kind, _ in GENERATED])
def test_samples_have_their_length_and_can_be_solved(corpus, kind: str, reader) -> None:
    tokenizer = corpus.tokenizer
    task = open_task(config_of(kind), tokenizer)
    samples = written(config_of(kind), tokenizer)
    assert len(samples) == task.size == 4
    assert samples[0].prompt != samples[1].prompt
    for sample in samples:
        assert len(sample.prompt) + sample.max_new_tokens == int(sample.cells[0])
        text = tokenizer.decode(sample.prompt)
        assert sample.score(reader(text)) == 1.0, (reader(text), sample.references)
        assert sample.score("nothing of it") == 0.0
    again = written(config_of(kind), tokenizer)
    assert [each.prompt for each in again] == [each.prompt for each in samples]
    other = written(config_of(kind, seed=1), tokenizer)[0]
    assert other.prompt != samples[0].prompt
    with pytest.raises(ValueError, match=rf"tasks: {kind}: lengths=200 must be at least \d+"):
        open_task(config_of(kind, lengths=[3000, 200]), tokenizer)


def test_kinds_differ_as_ruler_says(corpus) -> None:
    first = {kind: written(config_of(kind), corpus.tokenizer)[0] for kind in SHAPES}
    counts = {kind: len(sample.references) for kind, sample in first.items()}
    assert counts == dict.fromkeys(SHAPES, 1) | {"niah_multivalue": 4, "niah_multiquery": 4}
    texts = {kind: corpus.tokenizer.decode(sample.prompt) for kind, sample in first.items()}
    needles = {kind: len(re.findall(r"A magic \w+ of", text)) for kind, text in texts.items()}
    assert needles["niah_single_1"] == 1
    assert needles["niah_multikey_1"] == needles["niah_multivalue"] == 4
    assert needles["niah_multikey_2"] > 10
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, first["niah_single_3"].references[0])
    assert len(re.findall(uuid, texts["niah_multikey_3"])) >= 6
    one = {kind for kind, text in texts.items() if text.endswith("that the text names is")}
    many = {kind for kind, text in texts.items() if text.endswith("that the text names are")}
    assert many == {"niah_multivalue", "niah_multiquery"} == set(SHAPES) - one
    limits = {kind: sample.max_new_tokens for kind, sample in first.items()}
    assert limits == dict.fromkeys(SHAPES, 128)
    others = {kind: written(config_of(kind), corpus.tokenizer)[0] for kind in ("vt", "cwe", "fwe")}
    assert {kind: each.max_new_tokens for kind, each in others.items()} == {
        "vt": 30, "cwe": 120, "fwe": 50,
    }  # fmt: skip
    assert {kind: len(each.references) for kind, each in others.items()} == {
        "vt": 5, "cwe": 10, "fwe": 3,
    }  # fmt: skip


def test_needles_of_the_noise_lie_between_lines(corpus) -> None:
    samples = written(config_of("niah_single_1", samples=12), corpus.tokenizer)
    before = set()
    for sample in samples:
        text = corpus.tokenizer.decode(sample.prompt)
        hay, _ = text.split("A magic number of")
        assert hay.endswith("There and back again.\n") or hay.count("\n") == 1
        before.add(hay.count("There and back again."))
    assert len(before) > 3, "at any line"


def test_the_example_of_variables_is_the_same_and_short(corpus) -> None:
    texts = [
        corpus.tokenizer.decode(sample.prompt)
        for sample in written(config_of("vt"), corpus.tokenizer)
    ]
    examples = {text[: text.rindex("Variables are assigned")] for text in texts}
    assert len(examples) == 1
    (example,) = examples
    # Five of these noises take the 500 tokens of this small vocabulary already.
    assert example.count("There and back again.") == 5
    assert len(re.findall("VAR [A-Z]{3} = ", example)) == 5


def test_essays_are_the_haystack(corpus, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Zebras graze. They   sleep.\n\nThey run.\n")
    essays = config_of("niah_single_2", essays=str(tmp_path))
    text = corpus.tokenizer.decode(written(essays, corpus.tokenizer)[0].prompt)
    assert re.search(r"\. A magic number of \S+ is \d{7}\.( They|Zebras)", text), "a sentence of it"
    assert "They sleep. They run.Zebras graze." in text and "The grass is green" not in text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        open_task(essays, corpus.tokenizer)


def test_the_chat_template_goes_around_the_text(corpus) -> None:
    tokenizer = corpus.tokenizer
    sample = written(config_of("niah_single_1", chat=True), tokenizer)[0]
    assert len(sample.prompt) + sample.max_new_tokens == min(LENGTHS)
    text = tokenizer.decode(sample.prompt, skip_special_tokens=False)
    asked, answer = text.split("<|im_end|>")[:2]
    message = asked.split("user\n", 1)[1]
    frame = render_prompt(tokenizer, [{"role": "user", "content": "x"}])
    frame_text = tokenizer.decode(frame, skip_special_tokens=False)
    assert text.startswith(frame_text.split("x")[0])
    assert message.endswith("does the text above name?")
    assert answer.split("assistant\n")[1].startswith(" The magic number of")


def squad() -> dict[str, object]:
    def paragraph(name: str, possible: bool) -> dict[str, object]:
        question = {
            "question": f"Where is {name}?",
            "is_impossible": not possible,
            "answers": [{"text": f"{name} Bay"}, {"text": f"the bay of {name}"}],
        }
        return {"context": f"{name} lies at {name} Bay, far out.", "qas": [question]}

    articles = [
        [("Ayr", True), ("Bex", False)],
        [("Cos", True), *((f"D{i}", False) for i in range(60))],
    ]
    return {
        "data": [{"paragraphs": [paragraph(*each) for each in article]} for article in articles]
    }


def hotpot() -> list[dict[str, object]]:
    return [
        {
            "question": f"What is the colour of {i}?",
            "answer": f"colour{i}",
            "context": [[f"Title{i}", [f"Thing {i}", f" is colour{i}."]], [f"Other{i}", ["No."]]],
        }
        for i in range(80)
    ]


@pytest.mark.parametrize(("kind", "tree"), [("qa_1", squad()), ("qa_2", hotpot())])
def test_questions_come_with_their_documents(corpus, tmp_path: Path, kind: str, tree) -> None:
    file = tmp_path / "qa.json"
    file.write_text(json.dumps(tree))
    config = QaTask.parse({"kind": kind, "file": str(file), "lengths": [1500], "samples": 5})
    task = open_task(config, corpus.tokenizer)
    samples = written(config, corpus.tokenizer)
    assert len(samples) == task.size == (2 if kind == "qa_1" else 5)
    for sample in samples:
        assert len(sample.prompt) + sample.max_new_tokens == 1500
        text = corpus.tokenizer.decode(sample.prompt)
        assert sample.references[0] in text
        numbers = [int(n) for n in re.findall(r"Document (\d+):", text)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 8
        assert sample.score(f"It is {sample.references[-1].upper()}.") == 1.0
    if kind == "qa_1":
        assert {sample.references[0] for sample in samples} == {"Ayr Bay", "Cos Bay"}
        ayr = next(s for s in samples if s.references[0] == "Ayr Bay")
        assert "Bex lies" in corpus.tokenizer.decode(ayr.prompt), "the article's own come first"
    with pytest.raises(ValueError, match=f"tasks: {kind}: lengths=150 must be at least"):
        open_task(config.model_copy(update={"lengths": (150,)}), corpus.tokenizer)


def test_a_missing_or_wrong_file_says_which_is_wanted(corpus, tmp_path: Path) -> None:
    config = QaTask.parse({"kind": "qa_1", "file": str(tmp_path / "no.json")})
    with pytest.raises(OSError, match=r"no\.json.*dev-v2\.0\.json of SQuAD 2\.0 \(rajpurkar"):
        open_task(config, corpus.tokenizer)
    (tmp_path / "no.json").write_text("[]")
    said = r"is not dev-v2\.0\.json of SQuAD.*: it has a list where that has an object"
    with pytest.raises(ValueError, match=said):
        open_task(config, corpus.tokenizer)
    (tmp_path / "no.json").write_text('{"version": "v2.0"}')
    with pytest.raises(ValueError, match="it has no 'data' where that has one"):
        open_task(config, corpus.tokenizer)


def test_scores_are_recall_of_strings() -> None:
    assert share_of(("12", "Ab", "x y"))(" ab\x07 12 X\nY") == pytest.approx(2 / 3)
    assert any_of(("one", "two"))("TWO") == 1.0
    assert any_of(("one", "two"))("three") == 0.0


@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=60), room=st.integers(0, 300))
def test_the_largest_that_fits_is_found(steps: list[int], room: int) -> None:
    sizes = list(itertools.accumulate(steps, initial=0))
    expected = max(count for count, size in enumerate(sizes) if size <= room)
    assert largest(sizes.__getitem__, room, 0, len(steps)) == expected


def test_the_harness_generates_greedily_and_scores(corpus) -> None:
    task = open_task(config_of("niah_multivalue", samples=1), corpus.tokenizer)
    half: list[int] = []

    def answer(prompt: Prompt) -> list[int]:
        assert (prompt.max_new_tokens, prompt.decoding.temperature) == (128, 0.0)
        values = read_needles(corpus.tokenizer.decode(prompt.ids)).split()
        half.append(len(prompt.ids))
        return corpus.tokenizer.encode(" ".join(values[:2]))

    def never(*_: object) -> NoReturn:
        raise AssertionError("does not score")

    result = run_task(task, corpus.tokenizer, write=one_by_one(answer), score=never)
    assert [row.score for row in result.rows] == [0.5, 0.5]
    assert {cell: score.mean for cell, score in result.cells.items()} == {"2000": 0.5, "2600": 0.5}
    assert [row.prompt_tokens for row in result.rows] == half

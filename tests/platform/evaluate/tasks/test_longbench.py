"""LongBench's scores as its own code gives them, its files, and the frames around its prompts."""

import json
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.tasks import LONGBENCH_ANSWER_TOKENS, LongBenchTask, LongBenchV2Task
from nsa_platform.evaluate.prompt import Decoding, Prompt, one_by_one
from nsa_platform.evaluate.tasks import longbench_scores as scores
from nsa_platform.evaluate.tasks.longbench import DATASETS, Dataset, middle_left_out, scorer
from nsa_platform.evaluate.tasks.longbench_v2 import letter_of
from nsa_platform.evaluate.tasks.suite import check_tasks, open_task, run_task
from nsa_platform.evaluate.tasks.task import WrittenSample


@pytest.mark.parametrize(
    ("score", "prediction", "answer", "classes", "expected"),
    [
        (scores.f1_english, "The cat, sat.", "a cat ran", (), 2 * 1 / (2 + 2)),
        (scores.f1_english, "dog", "cat", (), 0.0),
        (scores.f1_chinese, "我来到，北京", "我来到北京", (), 1.0),
        (scores.f1_chinese, "清华大学", "北京", (), 0.0),
        (scores.rouge_l, "the cat sat", "the cat ran", (), 2 / 3),
        (scores.rouge_l, "", "the cat", (), 0.0),
        (scores.rouge_l, " . ", "the cat", (), 0.0),
        (scores.rouge_l_chinese, "我来到北京", "我来到北京", (), 1.0),
        (scores.classification, "It is Food or Sport", "Food", ("Food", "Sport", "Art"), 0.5),
        (scores.classification, "Sport", "Food", ("Food", "Sport"), 0.0),
        (scores.classification, "Food other", "Food other", ("Food", "Food other"), 1.0),
        (scores.retrieval, "Paragraph 7 or 8", "Paragraph 7", (), 0.5),
        (scores.retrieval_chinese, "段落3", "段落3", (), 1.0),
        (scores.count, "There are 12 of 20, so 12", "12", (), 2 / 3),
        (scores.count, "none", "12", (), 0.0),
        (scores.code_similarity, "\n# first\nx = 10\ny", "x = 11", (), 0.83),
        (scores.code_similarity, "x = 1 // two\n`x`", "x = 1", (), 0.0),
    ],
)
def test_scores(score, prediction: str, answer: str, classes, expected: float) -> None:
    assert score(prediction, answer, classes) == pytest.approx(expected, abs=1e-6)


def test_a_sentence_that_the_package_cannot_walk_counts_as_0() -> None:
    long = " ".join(map(str, range(1000)))
    assert scores.rouge_l(long, long) == 0.0
    # Also where others have raised the limit, as torch's compiler does.
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    try:
        assert scores.rouge_l(long, long) == 0.0
        assert sys.getrecursionlimit() == 5000
    finally:
        sys.setrecursionlimit(before)


def absent(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let imports of these packages fail, as where they are not installed."""
    for name in (*packages, *sys.modules):
        if name.partition(".")[0] in packages:
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_a_score_needs_the_packages_that_it_names(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, needed = "Paragraph 3 段落3 北京", scores.PACKAGES.get(dataset.against, ())
    absent(monkeypatch, *{"jieba", "rapidfuzz", "rouge"}.difference(needed))
    assert 0 <= dataset.against(text, text, (text,)) <= 1
    for package in needed:
        with monkeypatch.context() as without:
            absent(without, package)
            with pytest.raises(ModuleNotFoundError):
                dataset.against(text, text, (text,))


def test_packages_that_are_not_installed_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*datasets: str) -> None:
        tree = {"kind": "longbench", "folder": "nowhere", "datasets": list(datasets)}
        check_tasks([LongBenchTask.parse(tree)])

    check(*DATASETS)
    absent(monkeypatch, "jieba", "rouge")
    message = (
        "tasks: longbench: qmsum_e, vcsum: scored with jieba, rouge, not installed here: "
        "pip install jieba rouge"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        check("hotpotqa", "qmsum_e", "lcc", "vcsum")
    check("hotpotqa", "lcc")


def test_the_best_answer_counts_and_of_examples_only_the_first_line() -> None:
    assert scorer(DATASETS["hotpotqa"], ["dog", "red cat"], ())("red cat") == 1.0
    assert scorer(DATASETS["triviaqa"], ["cat"], ())("\ncat\nPassage: dog") == 1.0
    assert scorer(DATASETS["hotpotqa"], ["cat"], ())("\ncat\nPassage: dog") == 0.5


def test_all_datasets_are_there() -> None:
    assert len(DATASETS) == 21 and set(DATASETS) == set(LONGBENCH_ANSWER_TOKENS)
    limits = LONGBENCH_ANSWER_TOKENS
    assert {limits[n] for n in ("narrativeqa", "qasper", "dureader", "samsum")} == {128}
    assert {limits[n] for n in ("gov_report", "qmsum", "multi_news", "vcsum")} == {512}
    assert sum(limit == 32 for limit in limits.values()) == 7
    assert {n for n, each in DATASETS.items() if each.is_plain} == {
        *("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"),
    }


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("\n".join(lines) + "\n")


def row(**changes: object) -> dict[str, object]:
    empty = {
        "input": "Who?",
        "context": "Ann {did} it.",
        "answers": ["Ann"],
        "all_classes": None,
        "length": 4000,
    }
    return {**empty, **changes}


def test_files_become_samples(corpus, tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa.jsonl", [row(), row(context="long " * 400), row()])
    write(tmp_path, "lcc_e.jsonl", [row(context="x = 1\n", input="", answers=["y = 2"])])
    (tmp_path / "prompts.json").write_text(json.dumps({"lcc": "CODE {context}NEXT"}))
    config = LongBenchTask.parse(
        {
            "kind": "longbench",
            "folder": str(tmp_path),
            "datasets": ["hotpotqa", "lcc_e"],
            "prompts": str(tmp_path / "prompts.json"),
            "max_length": 400,
            "samples": 2,
            "chat": True,
        }
    )
    task = open_task(config, corpus.tokenizer)
    first, long, code = task.samples()
    assert task.size == 3
    assert isinstance(first, WrittenSample) and isinstance(code, WrittenSample)
    assert (first.cells, first.max_new_tokens, first.score("ann!")) == (("hotpotqa",), 32, 1.0)
    text = corpus.tokenizer.decode(first.prompt, skip_special_tokens=False)
    assert "Ann {did} it." in text and "Who?" in text and text.endswith("assistant\n")
    assert len(long.prompt) == 400
    assert corpus.tokenizer.decode(long.prompt).rstrip().endswith("assistant")
    assert corpus.tokenizer.decode(code.prompt) == "CODE x = 1\nNEXT", "no template around code"
    assert code.cells == ("lcc_e", "lcc_e/4-8k") and code.score("y = 2\nz") == 1.0


def test_what_is_missing_is_named(corpus, tmp_path: Path) -> None:
    def opened(**changes: object) -> None:
        tree = {"kind": "longbench", "folder": str(tmp_path), "datasets": ["qasper"], **changes}
        open_task(LongBenchTask.parse(tree), corpus.tokenizer)

    with pytest.raises(OSError, match=r"qasper\.jsonl of LongBench's data\.zip"):
        opened()
    with pytest.raises(ConfigError, match="there is no dataset 'qaspar'; did you mean 'qasper"):
        opened(datasets=["qaspar"])
    write(tmp_path, "qasper.jsonl", [row(), {"input": "x", "context": "y"}])
    with pytest.raises(ValueError, match="line 2 has no answers, all_classes, length"):
        opened()
    (tmp_path / "qasper.jsonl").write_text("not JSON")
    with pytest.raises(ValueError, match="is neither JSON lines nor a JSON list"):
        opened()


def test_the_middle_is_left_out() -> None:
    assert middle_left_out([1, 2, 3, 4, 5], 5) == [1, 2, 3, 4, 5]
    assert middle_left_out([1, 2, 3, 4, 5], 3) == [1, 2, 5]
    assert middle_left_out([1, 2, 3, 4, 5], 2) == [1, 5]


def test_choices_are_read_from_the_answer() -> None:
    assert letter_of("So **The correct answer is (B)**.") == "B"
    assert letter_of("The correct answer is C") == "C"
    assert letter_of("B") is None


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """One question of version 2, whose texts look like a prompt's marks."""
    question = {
        "_id": "q1", "difficulty": "easy", "length": "short", "question": "Which $C_A$?",
        "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four",
        "answer": "B", "context": " The $Q$ text. ",
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([question]))
    return tmp_path


def version_2(folder: Path, **changes: object) -> LongBenchV2Task:
    tree = {"kind": "longbench_v2", "file": str(folder / "data.json"), **changes}
    return LongBenchV2Task.parse(tree)


def test_version_2_asks_four_choices(corpus, questions: Path) -> None:
    (sample,) = open_task(version_2(questions), corpus.tokenizer).samples()
    assert isinstance(sample, WrittenSample)
    text = corpus.tokenizer.decode(sample.prompt)
    assert "\n\nThe $Q$ text.\n\nQuestion: Which $C_A$?\n(A) one\n(B) two\n(C) three" in text
    assert sample.cells == ("all", "easy", "short")
    assert sample.decoding.temperature == 0.1
    assert sample.score("The correct answer is (B)") == 1.0
    assert sample.score("The correct answer is (A)") == 0.0


@pytest.mark.parametrize("own_prompts", [False, True])
def test_a_chain_of_thought_is_asked_twice(corpus, questions: Path, own_prompts: bool) -> None:
    files = {}
    if own_prompts:
        (questions / "cot.txt").write_text("READ $DOC$ ASKED $Q$ THINK:")
        (questions / "ans.txt").write_text("ASKED $Q$ OF $C_A$ $C_D$ THOUGHT $COT$ ANSWER:")
        names = {"prompt": "cot.txt", "answer_prompt": "ans.txt"}
        files = {key: str(questions / name) for key, name in names.items()}
    config = version_2(questions, cot=True, **files)
    calls: list[tuple[str, int, Decoding]] = []
    answers = ["Two of $Q$ fits.", "**The correct answer is (B)**"]

    def answer(prompt: Prompt) -> list[int]:
        text = corpus.tokenizer.decode(prompt.ids)
        calls.append((text, prompt.max_new_tokens, prompt.decoding))
        return corpus.tokenizer.encode(answers[len(calls) - 1])

    def never(*_: object) -> NoReturn:
        raise AssertionError("not forced")

    task = open_task(config, corpus.tokenizer)
    result = run_task(task, corpus.tokenizer, write=one_by_one(answer), score=never)
    (thinking, first, decoding), (concluding, second, again) = calls
    assert (first, second, decoding.temperature) == (1024, 128, 0.1) and again == decoding
    assert "The $Q$ text." in thinking and "Which $C_A$?" in thinking
    assert "The $Q$ text." not in concluding and "Which $C_A$?" in concluding
    assert "Two of $Q$ fits." in concluding
    if own_prompts:
        assert concluding == "ASKED Which $C_A$? OF one four THOUGHT Two of $Q$ fits. ANSWER:"
    (row,) = result.rows
    assert (row.cells, row.score) == (("all", "easy", "short"), 1.0)
    assert row.written == "\n\n".join(answers)
    assert row.new_tokens == sum(len(corpus.tokenizer.encode(each)) for each in answers)
    assert row.prompt_tokens == len(corpus.tokenizer.encode(thinking))


def test_prompts_of_a_chain_of_thought_belong_together(corpus, questions: Path) -> None:
    with pytest.raises(ConfigError, match="answer_prompt is of no use without cot: true"):
        version_2(questions, answer_prompt="x.txt")
    with pytest.raises(ConfigError, match="given both or neither"):
        version_2(questions, cot=True, prompt="x.txt")
    assert version_2(questions, cot=True, max_length=100).longest == 1124
    (questions / "x.txt").write_text("no mark")
    same = {"prompt": str(questions / "x.txt"), "answer_prompt": str(questions / "x.txt")}
    with pytest.raises(ValueError, match=r"x\.txt has no place \$COT\$ for the thoughts"):
        open_task(version_2(questions, cot=True, **same), corpus.tokenizer)

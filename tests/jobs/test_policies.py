"""What jobs.evaluate does with policies: budgets that say nothing, documented ones, tasks."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import evaluate as job
from jobs.policies import budget_warning, by_length
from jobs.policy_tables import policy_tables
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.config.runs import EvaluateRun, PretrainRun
from nsa_platform.config.tasks import TaskConfig
from nsa_platform.evaluate.tasks.suite import open_task
from nsa_platform.evaluate.tasks.task import ReasonedSample
from nsa_platform.model.cost import key_counts
from tests.platform.evaluate.small import make_corpus

ROOT = Path(__file__).parents[2]
PLACES = {"name": "x", "checkpoint": "model", "data": "data"}


@pytest.mark.parametrize("baselines", [{"tokens": 100}, {}], ids=["tokens", "nsa"])
def test_a_budget_that_is_a_whole_context_is_told(
    baselines: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {
        **PLACES,
        "bits_per_byte": {"context_length": 100},
        "needle": {"lengths": [4096, 80]},
        "tasks": [{"kind": "mqar", "lengths": [8192, 96]}],
        "baselines": baselines,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    job.main(["--config", str(path), "--dry-run"])
    assert capsys.readouterr().err == (
        "warning: baselines: at 80 and 96 and 100 tokens the budget is the whole context, and "
        "every policy reads everything\n"
    )
    for setting in ("baselines=null", "baselines={budget: published}", "baselines={tokens: 79}"):
        job.main(["--config", str(path), "--set", setting, "--dry-run"])
        assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "preset"), [("baselines", "nsa_150m"), ("evaluation", "nsa_needle")]
)
def test_documented_budgets_are_those_of_the_nsa_they_are_compared_with(
    document: str, preset: str
) -> None:
    text = (ROOT / "docs" / f"{document}.md").read_text().replace("\\\n", " ")
    (command,) = (
        line for line in text.splitlines() if "nsa: {" in line or "baselines.nsa={" in line
    )
    words = shlex.split(command)
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    run = EvaluateRun.load(ROOT / words[words.index("--config") + 1], overrides)
    model = PretrainRun.load(ROOT / "jobs" / "configs" / "pretrain" / f"{preset}.yaml").model
    assert model is not None and isinstance(model.attention, NsaAttentionConfig)
    assert run.baselines is not None and run.needle is not None
    for length in (1000, *run.needle.lengths):
        assert key_counts(run.baselines.nsa, length) == key_counts(model.attention, length)
    assert budget_warning(run) is None


def test_the_length_up_to_which_the_papers_sizes_read_everything_is_documented() -> None:
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "baselines.md").read_text())
    (length,) = re.findall(r"with the sizes above up to about ([\d,]+) tokens", text)
    at = int(length.replace(",", ""))

    def warning(length: int) -> str | None:
        tree = {**PLACES, "bits_per_byte": None, "needle": {"lengths": [length]}, "baselines": {}}
        return budget_warning(EvaluateRun.parse(tree))

    assert warning(at) and not warning(at + 100)


@pytest.mark.parametrize("kind", ["vt", "cwe", "fwe", "niah_multivalue", "mqar"])
def test_a_task_by_length_has_the_samples_of_the_whole_task(kind: str, tmp_path: Path) -> None:
    tree = {"kind": kind, "lengths": [2600, 1800], "samples": 2}
    (config,) = EvaluateRun.parse({**PLACES, "tasks": [tree]}).tasks
    tokenizer = make_corpus(tmp_path / "data").tokenizer

    def samples(of: TaskConfig) -> list[tuple[object, ...]]:
        made = open_task(of, tokenizer).samples()
        return [(e.cells, e.unit, e.prompt) for e in made if not isinstance(e, ReasonedSample)]

    parts = [(length, samples(part)) for length, part in by_length(config)]
    assert [length for length, _ in parts] == [1800, 2600]
    assert [len(part) for _, part in parts] == [2, 2]
    assert [each for _, part in parts for each in part] == samples(config)


def test_what_was_not_measured_has_no_column() -> None:
    needles = {
        "needle_exact": 0.5,
        "needle_tokens": 0.75,
        "intervals": {"needle_exact": (0.1, 0.9), "needle_tokens": (0.6, 0.9)},
        "reads": [{"task": "needle", "length": 80, "count": {"keys_per_query": 3.0}}],
    }
    (table,) = policy_tables({"quest": needles, "full": needles})
    scores = ["50% (10 to 90)", "75% (60 to 90)"]
    assert table == (
        ["policy", "numbers exact (95 %)", "tokens of the numbers (95 %)"],
        [["quest", *scores], ["full", *scores]],
    )
    text = {
        "bits_per_byte": 1.25,
        "intervals": {},
        "reads": [{"task": "text", "length": 64, "count": {"keys_per_query": 20.0}}],
    }
    (table,) = policy_tables({"full": text})
    assert table == (
        ["policy", "bits per byte", "keys per query (text)"],
        [["full", "1.250", "20.0"]],
    )


def test_policies_that_only_have_tasks_are_compared_by_their_scores() -> None:
    measured = {
        name: {
            "vt/512": score,
            "vt/1024": 0.0,
            "intervals": {"vt/512": (0.1, 0.9), "vt/1024": (0.0, 0.2)},
            "reads": [],
        }
        for name, score in (("quest", 0.5), ("full", 0.75))
    }
    (table,) = policy_tables(measured)
    assert table == (
        ("task", "cell", "policy", "score", "95 % interval"),
        [
            ("vt", "512", "quest", "0.500", "0.100 to 0.900"),
            ("vt", "512", "full", "0.750", "0.100 to 0.900"),
            ("vt", "1024", "quest", "0.000", "0.000 to 0.200"),
            ("vt", "1024", "full", "0.000", "0.000 to 0.200"),
        ],
    )

"""lm-eval-harness on tasks made here sees what our scorer sees; no task is downloaded."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from jobs import lm_eval as job
from nsa_platform.evaluate.scores import ModelScorer
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.sampler import Sampling
from tests.platform.evaluate.small import Corpus, export, make_corpus, make_model

MAX_CONTEXT = 160
BOUND_NATS = 1e-4
"""Of an answer's log-likelihood: batches add up in another order in float32, 1e-5 was seen."""
TASK = """
task: {name}
custom_dataset: !function rows.rows
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
{rest}
metadata: {{version: 1.0}}
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
num_fewshot: 0
"""
TEXT = """doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
ROWS = """
import datasets

def rows(**_):
    table = [
        {"question": "the cat", "choices": [" sat", " under the tree"], "right": 0},
        {"question": "a bird over", "choices": [" the dog", " fish"], "right": 1},
    ]
    return {"test": datasets.Dataset.from_list(table)}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("lm_eval") / "data")


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Transformer:
    return make_model(corpus.tokenizer.vocab_size, max_context=MAX_CONTEXT)


@pytest.fixture(scope="module")
def adapter(corpus: Corpus, model: Transformer) -> job.NsaModel:
    folder = export(corpus, model, corpus.path.parent / "model")
    return job.NsaModel(str(folder), batch_size="3")


def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]  # type: ignore[arg-type]


def expected(corpus: Corpus, model: Transformer, context: str, answer: str) -> float:
    """Log-likelihood by hand: one forward pass over all ids."""
    ids = corpus.tokenizer.encode(context + answer)
    begin = len(corpus.tokenizer.encode(context))
    score = ModelScorer(model).answer(ids[:begin], ids[begin:])
    return -sum(score.nats)


def test_the_model_is_registered() -> None:
    assert get_model("nsa") is job.NsaModel


def test_log_likelihoods_are_those_of_our_scorer(
    corpus: Corpus, model: Transformer, adapter: job.NsaModel
) -> None:
    asked = [("the cat", " sat"), ("a bird over ", "the house"), ("the", " dog ran"), ("a", ".\n")]
    found = adapter.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    for (context, answer), (value, _) in zip(asked, found, strict=True):
        blanks = len(context) - len(context.rstrip())
        whole = (context.rstrip(), context[len(context) - blanks :] + answer)
        assert value == pytest.approx(expected(corpus, model, *whole), abs=1e-4)
    (value, _), = adapter.loglikelihood(instances("loglikelihood", ("", "the cat")))  # fmt: skip
    ids = corpus.tokenizer.encode("the cat")
    alone = ModelScorer(model).answer([corpus.tokenizer.eos_id], ids)
    assert value == pytest.approx(-sum(alone.nats), abs=1e-4)


def test_greedy_answers_are_told(corpus: Corpus, model: Transformer, adapter: job.NsaModel) -> None:
    tokenizer, told = corpus.tokenizer, []
    for context in ("the cat", "a bird over", "tree tree a"):
        ids = tokenizer.encode(context)
        hidden = model(torch.tensor(ids), PackedInputs.from_lengths([len(ids)])).hidden
        likeliest = int(model.logits(hidden[-1]).argmax())
        texts = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
        usable = [i for i, text in texts.items() if tokenizer.encode(context + text) == [*ids, i]]
        asked = instances("loglikelihood", *((context, texts[i]) for i in usable))
        found = adapter.loglikelihood(asked, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [i == likeliest for i in usable]
        told += [greedy for _, greedy in found]
    assert any(told), "one of the likeliest tokens is a text of its own"


def test_long_texts_are_scored_whole_in_windows(
    corpus: Corpus, model: Transformer, adapter: job.NsaModel
) -> None:
    text = "".join(corpus.documents["validation"])[:1400]
    ids = corpus.tokenizer.encode(text)
    assert len(ids) > 2 * MAX_CONTEXT
    (found,) = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    total, before = 0.0, corpus.tokenizer.eos_id
    scorer = ModelScorer(model)
    full = len(ids) // MAX_CONTEXT * MAX_CONTEXT
    for start in range(0, full, MAX_CONTEXT):
        part = ids[start : start + MAX_CONTEXT]
        total += sum(scorer.answer([before], part).nats)
        before = part[-1]
    # The last window is filled with context: only its last tokens count.
    last = len(ids) - full
    tail = scorer.answer(ids[-MAX_CONTEXT - 1 : -last], ids[-last:])
    assert found == pytest.approx(-total - sum(tail.nats), rel=1e-4)


def test_generation_ends_at_a_stop_string_and_is_reproducible(adapter: job.NsaModel) -> None:
    free = {"until": [], "max_gen_toks": 12}
    (whole,) = adapter.generate_until(instances("generate_until", ("the", free)))
    stop = whole[3:5]
    (cut,) = adapter.generate_until(instances("generate_until", ("the", {**free, "until": stop})))
    assert cut == whole[: whole.index(stop)]
    drawn = {"do_sample": True, "temperature": 1.5, "seed": 3, **free}
    once, again = adapter.generate_until(
        instances("generate_until", ("the", drawn), ("the", drawn))
    )
    assert once == again != whole
    with pytest.raises(ValueError, match="gen_kwargs: num_beams not known"):
        adapter.generate_until(instances("generate_until", ("the", {**free, "num_beams": 4})))


def alone(corpus: Corpus, model: Transformer, context: str, settings: dict[str, Any]) -> str:
    """What the model writes to one prompt without an engine, looked at after each token."""
    tokenizer, stops = corpus.tokenizer, settings["until"]
    sampling = Sampling(settings.get("temperature", 0.0), seed=settings.get("seed", 0))
    ids: list[int] = []
    for token in Generator(model).stream(
        tokenizer.encode(context),
        settings["max_gen_toks"],
        stop_ids=tokenizer.stop_ids(),
        sampling=sampling,
    ):
        ids.append(token)
        if any(stop in tokenizer.decode(ids) for stop in stops):
            break
    text = tokenizer.decode(ids)
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]


@pytest.mark.parametrize("kind", ["nsa", "full"])
def test_batches_say_what_is_said_to_one_request_at_a_time(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    model = make_model(corpus.tokenizer.vocab_size, max_context=MAX_CONTEXT, kind=kind)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # An untrained model says the same to everything.
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    folder = export(corpus, model, tmp_path / kind)
    text = "".join(corpus.documents["validation"])
    contexts = [text[31 * i : 31 * i + 5 + 23 * (i % 7)] for i in range(12)]
    free = {"until": [], "max_gen_toks": 16}
    whole = [alone(corpus, model, context, free) for context in contexts]
    assert len(set(whole)) > 9
    asked: list[tuple[str, dict[str, Any]]] = [(context, free) for context in contexts]
    for i, (context, said) in enumerate(zip(contexts, whole, strict=True)):
        # One to three characters that tokens part or hold; noise makes broken ones too.
        pieces = re.findall(f"[^\ufffd]{{{1 + i % 3}}}", said) or [" "]
        asked.append((context, {**free, "until": ["nowhere", pieces[i % len(pieces)]]}))
        asked.append((context, {**free, "do_sample": True, "temperature": 0.8, "seed": i}))
    wanted = [alone(corpus, model, *each) for each in asked]
    scored = [(context, text[400 + 9 * i : 420 + 10 * i]) for i, context in enumerate(contexts)]
    found = {}
    for size in (1, 7, 64):
        adapter = job.NsaModel(str(folder), batch_size=size)
        written = adapter.generate_until(instances("generate_until", *asked), disable_tqdm=True)
        assert written == wanted
        found[size] = adapter.loglikelihood(instances("loglikelihood", *scored), disable_tqdm=True)
    for size in (7, 64):
        for (value, greedy), (other, same) in zip(found[1], found[size], strict=True):
            assert value == pytest.approx(other, abs=BOUND_NATS)
            assert greedy == same


def test_too_long_a_prompt_keeps_its_end_and_says_so(
    corpus: Corpus, model: Transformer, adapter: job.NsaModel, caplog: pytest.LogCaptureFixture
) -> None:
    adapter._has_cut = False
    long = "the cat sat over the house " * 40
    with caplog.at_level(logging.WARNING, logger="nsa_platform"):
        (value, _), = adapter.loglikelihood(instances("loglikelihood", (long, "and")))  # fmt: skip
    ids = corpus.tokenizer.encode(long.rstrip())
    answer = corpus.tokenizer.encode(long.rstrip() + " and")[len(ids) :]
    kept = ids[-(MAX_CONTEXT - len(answer) + 1) :]
    assert value == pytest.approx(-sum(ModelScorer(model).answer(kept, answer).nats), abs=1e-4)
    assert "is cut to its last" in caplog.text


def test_arguments_without_a_meaning_are_refused(adapter: job.NsaModel) -> None:
    with pytest.raises(ValueError, match="batch_size='auto' must be a number"):
        job.NsaModel("nowhere", batch_size="auto")
    with pytest.raises(ValueError, match="dtype='int8' must be one of bfloat16"):
        job.NsaModel("nowhere", dtype="int8")


def test_the_harness_runs_tasks_by_the_name_of_the_model(
    corpus: Corpus, model: Transformer, adapter: job.NsaModel, tmp_path: Path
) -> None:
    (tmp_path / "rows.py").write_text(ROWS)
    tasks = {"tiny_choice": ("multiple_choice", CHOICE), "tiny_text": ("generate_until", TEXT)}
    for name, (kind, rest) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, rest=rest))
    run: Any = simple_evaluate
    results = run(
        model="nsa",
        model_args=f"checkpoint={corpus.path.parent / 'model'}",
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    assert "exact_match,none" in results["results"]["tiny_text"]
    rows = results["samples"]["tiny_choice"]
    for row in rows:
        given = [float(value) for ((value, _),) in row["resps"]]
        choices = row["doc"]["choices"]
        wanted = [expected(corpus, model, row["doc"]["question"], each) for each in choices]
        assert given == pytest.approx(wanted, abs=1e-3)
        best = max(range(2), key=wanted.__getitem__)
        assert row["acc"] == float(best == row["doc"]["right"])
    accuracy = sum(row["acc"] for row in rows) / 2
    assert results["results"]["tiny_choice"]["acc,none"] == accuracy


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda:0', but torch sees no GPU here"):
        job.NsaModel("nowhere", device="cuda:0")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "--model_args: checkpoint is missing (there are checkpoint,"),
        ("--model_args checkpoint=nowhere,pretrained=x", "--model_args: pretrained not known"),
        ("--model_args checkpoint=nowhere", "nowhere"),
        ("--model_args checkpoint=nowhere --batch_size auto", "batch_size='auto' must be a number"),
    ],
)
def test_the_command_line_ends_with_one_line(
    flags: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lm_eval", "--model", "nsa", "--tasks", "hellaswag", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*words, *flags.split()])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == 1
    assert line in capsys.readouterr().err.splitlines()[-1]

"""LongBench: 21 datasets of long texts in English and Chinese, from the user's copy of the files.

Sets of LongBench-E (`_e`) are also reported by length, in words: below 4,000, 8,000, and more. Of a
prompt that is too long the middle is left out. Five datasets of examples or code go without
the chat template; of four only the first line of an answer counts. The prompts are our own words
for the same; those of the benchmark are read from the user's dataset2prompt.json.

Source: arXiv 2308.14508; github.com/THUDM/LongBench, pred.py and eval.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from nsa_platform import storage
from nsa_platform.config.tasks import EXTENDED, LongBenchTask, longbench_answer_tokens
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.tasks import longbench_scores as scores
from nsa_platform.evaluate.tasks.frame import Frame, open_frame
from nsa_platform.evaluate.tasks.longbench_rows import ROWS, LongBenchRow, read_prompts
from nsa_platform.evaluate.tasks.rows import read_rows
from nsa_platform.evaluate.tasks.task import Scorer, Task, WrittenSample

SOURCE = "{name}.jsonl of LongBench's data.zip (huggingface.co/datasets/THUDM/LongBench)"
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))


@dataclass(frozen=True, slots=True)
class Dataset:
    """How a dataset is asked and scored."""

    against: scores.Against
    prompt: str
    is_few_shot: bool = False
    """Its prompt is examples: only the first line of an answer counts."""
    is_plain: bool = False
    """No chat template, whatever the configuration says."""


PASSAGES = (
    "Below are passages, and then a question about them. Answer it in as few words as you can and "
    "write nothing else.\n\n{context}\n\nQuestion: {input}\nAnswer:"
)
DOCUMENT = (
    "Below is a text, and then a question about it. Answer it as briefly as you can and do not "
    "explain.\n\n{context}\n\nQuestion: {input}\nAnswer:"
)
ARTICLE = (
    "Below is a scientific article, and then a question about it. Answer it as briefly as you can, "
    'yes or no where that is asked, "unanswerable" if the article does not say.\n\n{context}\n\n'
    "Question: {input}\nAnswer:"
)
SUMMARY = "Summarize the following in one page.\n\n{context}\n\nSummary:"
QUERY = (
    "Below is what was said in a meeting. Answer the query about it in a few sentences.\n\n"
    "{context}\n\nQuery: {input}\nAnswer:"
)
CHINESE_QUESTION = (
    "阅读下面的内容，然后用最简短的中文回答问题。\n\n{context}\n\n问题：{input}\n答案："
)
CHINESE_SUMMARY = "以下是会议的记录，请写出会议内容的总结。\n\n{context}\n\n总结："
EXAMPLES = "Go on in the manner of the examples.\n\n{context}\n{input}"
COUNT = (
    "Below are paragraphs, some of which come more than once. How many different ones are there? "
    "Write only the number.\n\n{context}\n\nNumber of different paragraphs:"
)
WHICH = (
    "Below are numbered paragraphs, and then a summary of one of them. Write which one it is, "
    'as in "Paragraph 1".\n\n{context}\n\nSummary: {input}\n\nAnswer:'
)
CHINESE_WHICH = (
    "下面有若干带编号的段落和其中一段的摘要。请写出摘要对应的段落，格式如“段落1”。\n\n"
    "{context}\n\n摘要：{input}\n\n答案："
)
CODE = "Write the line of code that comes next.\n{context}{input}"

DATASETS = {
    "narrativeqa": Dataset(scores.f1_english, DOCUMENT),
    "qasper": Dataset(scores.f1_english, ARTICLE),
    "multifieldqa_en": Dataset(scores.f1_english, DOCUMENT),
    "multifieldqa_zh": Dataset(scores.f1_chinese, CHINESE_QUESTION),
    "hotpotqa": Dataset(scores.f1_english, PASSAGES),
    "2wikimqa": Dataset(scores.f1_english, PASSAGES),
    "musique": Dataset(scores.f1_english, PASSAGES),
    "dureader": Dataset(scores.rouge_l_chinese, CHINESE_QUESTION),
    "gov_report": Dataset(scores.rouge_l, SUMMARY),
    "qmsum": Dataset(scores.rouge_l, QUERY),
    "multi_news": Dataset(scores.rouge_l, SUMMARY),
    "vcsum": Dataset(scores.rouge_l_chinese, CHINESE_SUMMARY),
    "trec": Dataset(scores.classification, EXAMPLES, is_few_shot=True, is_plain=True),
    "triviaqa": Dataset(scores.f1_english, EXAMPLES, is_few_shot=True, is_plain=True),
    "samsum": Dataset(scores.rouge_l, EXAMPLES, is_few_shot=True, is_plain=True),
    "lsht": Dataset(scores.classification, EXAMPLES, is_few_shot=True, is_plain=True),
    "passage_count": Dataset(scores.count, COUNT),
    "passage_retrieval_en": Dataset(scores.retrieval, WHICH),
    "passage_retrieval_zh": Dataset(scores.retrieval_chinese, CHINESE_WHICH),
    "lcc": Dataset(scores.code_similarity, CODE, is_plain=True),
    "repobench-p": Dataset(scores.code_similarity, CODE, is_plain=True),
}


def check_packages(config: LongBenchTask) -> None:
    """Tell that a package is missing before anything is done for answers that it is to score.

    Raises:
        ValueError: it is not installed.
    """
    needed = {
        name: [each for each in _packages(name) if find_spec(each) is None]
        for name in config.datasets
    }
    missing = sorted({package for packages in needed.values() for package in packages})
    if missing:
        affected = [name for name, packages in needed.items() if packages]
        raise ValueError(
            f"tasks: longbench: {', '.join(affected)}: scored with {', '.join(missing)}, not "
            f"installed here: pip install {' '.join(missing)}"
        )


def longbench(config: LongBenchTask, tokenizer: Tokenizer) -> Task:
    """The samples of the chosen datasets, one cell for each.

    Raises:
        ValueError: a file is not what it should be.
        OSError: a file cannot be read.
    """
    datasets = {name: _dataset(name) for name in config.datasets}
    prompts = read_prompts(config.prompts, [name.removesuffix(EXTENDED) for name in datasets])
    rows = {
        name: read_rows(
            storage.join(config.folder, f"{name}.jsonl"),
            ROWS.get(dataset.against, LongBenchRow),
            source=SOURCE.format(name=name),
        )[: config.samples]
        for name, dataset in datasets.items()
    }
    chat, plain = open_frame(tokenizer, chat=config.chat), Frame()

    def samples() -> Iterator[WrittenSample]:
        for name, dataset in datasets.items():
            frame = plain if dataset.is_plain else chat
            prompt = prompts.get(name.removesuffix(EXTENDED), dataset.prompt)
            for number, row in enumerate(rows[name]):
                text = prompt.format(context=row.context, input=row.input)
                ids = middle_left_out(tokenizer.encode(text), config.max_length - frame.size)
                yield WrittenSample(
                    cells=_cells(name, row.length),
                    unit=f"{name}/{number}",
                    prompt=frame.around(ids),
                    references=tuple(row.answers),
                    max_new_tokens=longbench_answer_tokens(name),
                    score=scorer(dataset, row.answers, row.all_classes or ()),
                )

    return Task("longbench", sum(map(len, rows.values())), samples)


def scorer(dataset: Dataset, answers: Sequence[str], classes: Sequence[str]) -> Scorer:
    """The best score of a prediction over all answers."""

    def score(written: str) -> float:
        if dataset.is_few_shot:
            written = written.lstrip("\n").split("\n")[0]
        return max((dataset.against(written, answer, classes) for answer in answers), default=0.0)

    return score


def middle_left_out(ids: list[int], size: int) -> list[int]:
    """The first and the last halves of `size` ids, or all if there are no more."""
    if len(ids) <= size:
        return ids
    return ids[: size - size // 2] + ids[len(ids) - size // 2 :]


def _cells(name: str, words: int) -> tuple[str, ...]:
    if not name.endswith(EXTENDED):
        return (name,)
    bucket = next((label for limit, label in BUCKETS if words < limit), "8k+")
    return name, f"{name}/{bucket}"


def _packages(name: str) -> tuple[str, ...]:
    return scores.PACKAGES.get(_dataset(name).against, ())


def _dataset(name: str) -> Dataset:
    return DATASETS[name.removesuffix(EXTENDED)]

"""Tasks of an evaluation: which, at which lengths, how often, from which files."""

import difflib
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from nsa_platform.config.base import Strict, each_once
from nsa_platform.config.locations import Location

Lengths = Annotated[
    tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1), AfterValidator(each_once)
]

LONGBENCH_OF_THE_PAPER = (
    *("multifieldqa_en", "multifieldqa_zh", "qasper", "hotpotqa", "2wikimqa"),
    *("gov_report", "dureader", "passage_retrieval_en", "passage_retrieval_zh", "lcc"),
)

LONGBENCH_ANSWER_TOKENS = {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht"), 64),
    **dict.fromkeys(("lcc", "repobench-p"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
"""Tokens of an answer, by dataset (config/dataset2maxlen.json of github.com/THUDM/LongBench)."""
EXTENDED = "_e"
"""Ending of the names of LongBench-E's datasets."""

WITHOUT_ESSAYS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")


def longbench_answer_tokens(name: str) -> int:
    """Tokens of an answer to a dataset of LongBench or LongBench-E."""
    return LONGBENCH_ANSWER_TOKENS[name.removesuffix(EXTENDED)]


class Generated(Strict):
    """A task whose samples are made, and measured by length."""

    samples: PositiveInt = 100
    """Samples of each length; RULER's own number is 500."""
    lengths: Lengths = (4096,)
    """Tokens of a prompt together with those left for the answer."""
    seed: int = 0

    longest_of: ClassVar[str] = "the longest of lengths"
    """What `longest` is made of, for messages."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(self.lengths)


class _Asked(Strict):
    chat: bool = False
    """Prompts go through the tokenizer's chat template as one message of a user's."""


class NiahTask(Generated, _Asked):
    """RULER's needles in a haystack: what an asked key stands for."""

    kind: Literal[
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue",
        "niah_multiquery",
    ]
    essays: Location | None = None
    """Folder of .txt files, the haystack of single_2, single_3, multikey_1, multivalue and
    multiquery; without it their haystack is the noise of single_1."""

    @model_validator(mode="after")
    def _essays_are_read(self) -> Self:
        if self.essays is not None and self.kind in WITHOUT_ESSAYS:
            raise ValueError(f"essays is of no use to {self.kind}, whose haystack is no prose")
        return self


class VariableTrackingTask(Generated, _Asked):
    """RULER's variable tracking: which variables hold a value through a chain of assignments."""

    kind: Literal["vt"]
    chains: PositiveInt = 1
    hops: PositiveInt = 4
    """Assignments from variable to variable in a chain."""


class WordsTask(Generated, _Asked):
    """RULER's common words (cwe) and frequent words (fwe)."""

    kind: Literal["cwe", "fwe"]


class QaTask(Generated, _Asked):
    """RULER's question answering among distracting documents: SQuAD (qa_1), HotpotQA (qa_2)."""

    kind: Literal["qa_1", "qa_2"]
    file: Location
    """qa_1: dev-v2.0.json of SQuAD 2.0. qa_2: hotpot_dev_distractor_v1.json of HotpotQA."""


class MqarTask(Generated):
    """Multi-query associative recall: pairs of tokens, then each key again, asked for its value."""

    kind: Literal["mqar"]
    pairs: PositiveInt = 16
    vocabulary: Annotated[int, Field(ge=8)] | None = None
    """Ids below this are used: keys from the lower half, values from the upper one. Default: all
    ids of the tokenizer."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if min(self.lengths) < 4 * self.pairs:
            raise ValueError(
                f"lengths={min(self.lengths)} must be at least 4 x pairs={4 * self.pairs}"
            )
        return self

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        if self.vocabulary is not None and self.vocabulary < 2 * self.pairs:
            raise ValueError(
                f"vocabulary={self.vocabulary} must lie in [2 x pairs = {2 * self.pairs} and "
                "control tokens, the tokenizer's]: its lower half are the keys"
            )
        return self


class LongBenchTask(_Asked):
    """LongBench, from the user's copy of its files."""

    kind: Literal["longbench"]
    folder: Location
    """Holds <dataset>.jsonl for each dataset, as data.zip of
    huggingface.co/datasets/THUDM/LongBench does."""
    datasets: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(each_once)] = (
        LONGBENCH_OF_THE_PAPER
    )
    """Default: the ten that the paper reports. <dataset>_e: those of LongBench-E."""
    prompts: Location | None = None
    """dataset2prompt.json of github.com/THUDM/LongBench: published scores are made with it.
    Without it prompts ask the same in our own words."""
    max_length: Annotated[int, Field(ge=64)] = 31500
    """Tokens of a prompt; of a longer one the middle is left out."""
    samples: PositiveInt | None = None
    """The first so many rows of each file; default: all."""

    longest_of: ClassVar[str] = "max_length and the longest answer of datasets"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return self.max_length + max(map(longbench_answer_tokens, self.datasets))

    @field_validator("datasets")
    @classmethod
    def _datasets_exist(cls, datasets: tuple[str, ...]) -> tuple[str, ...]:
        for name in datasets:
            if name.removesuffix(EXTENDED) not in LONGBENCH_ANSWER_TOKENS:
                near = difflib.get_close_matches(name, LONGBENCH_ANSWER_TOKENS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                known = ", ".join(LONGBENCH_ANSWER_TOKENS)
                raise ValueError(f"there is no dataset {name!r}{hint} (there are {known})")
        return datasets


class LongBenchV2Task(_Asked):
    """LongBench v2: questions with four choices about very long texts."""

    kind: Literal["longbench_v2"]
    file: Location
    """data.json of huggingface.co/datasets/THUDM/LongBench-v2, or its rows as .jsonl."""
    cot: bool = False
    """Chain of thought: the model thinks in up to 1,024 tokens, and answers a second prompt that
    has the question and what it thought, but not the text."""
    prompt: Location | None = None
    """prompts/0shot.txt of github.com/THUDM/LongBench, with cot prompts/0shot_cot.txt; without it
    our own words."""
    answer_prompt: Location | None = None
    """With cot and prompt: prompts/0shot_cot_ans.txt."""
    max_length: Annotated[int, Field(ge=64)] = 120_000
    """Tokens of a prompt; of a longer one the middle is left out."""
    temperature: Annotated[float, Field(ge=0)] = 0.1
    samples: PositiveInt | None = None
    """The first so many questions; default: all."""
    seed: int = 0

    longest_of: ClassVar[str] = "max_length and the answer (128 tokens, with cot 1024)"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return self.max_length + (1024 if self.cot else 128)

    @model_validator(mode="after")
    def _prompts_belong_together(self) -> Self:
        if self.answer_prompt is not None and not self.cot:
            raise ValueError("answer_prompt is of no use without cot: true")
        if self.cot and (self.prompt is None) != (self.answer_prompt is None):
            raise ValueError("with cot: true, prompt and answer_prompt are given both or neither")
        return self


class AimeTask(_Asked):
    """Competition problems with an integer answer, each tried several times."""

    kind: Literal["aime"]
    file: Location
    """JSONL with `problem` and `answer` in each row, such as the 30 of AIME 2024."""
    attempts: PositiveInt = 16
    """Answers drawn for each problem; pass@1 is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: Annotated[
        tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(each_once)
    ] = (8192, 16384)
    """Limits of an answer's length; each is a measurement of its own."""
    max_problem_tokens: PositiveInt = 2048
    """A longer problem is an error."""
    samples: PositiveInt | None = None
    """The first so many problems; default: all."""
    seed: int = 0

    longest_of: ClassVar[str] = "max_problem_tokens and the longest of max_new_tokens"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return self.max_problem_tokens + max(self.max_new_tokens)


TaskConfig = Annotated[
    NiahTask
    | VariableTrackingTask
    | WordsTask
    | QaTask
    | MqarTask
    | LongBenchTask
    | LongBenchV2Task
    | AimeTask,
    Field(discriminator="kind"),
]

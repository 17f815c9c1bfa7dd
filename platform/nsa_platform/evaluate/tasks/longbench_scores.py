"""LongBench's scores, each of a prediction against one answer, 0 to 1.

F1 of words (English without articles and punctuation; Chinese as jieba cuts it), ROUGE-L of the
`rouge` package, the named class, the named paragraph, the count, and the edit similarity of the
first line of code. Odd cases are the original's, and kept, so that scores compare.

Source: github.com/THUDM/LongBench, metrics.py.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nsa_platform.evaluate.tasks import library

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼"
    "］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖"
    "〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
PYTHONS_RECURSION_LIMIT = 1000
"""Of an interpreter in which nobody has raised it. How long a sentence may be hangs on it."""
Against = Callable[[str, str, Sequence[str]], float]
"""A score of a prediction against one answer, where there are classes among these."""

_ENGLISH = str.maketrans("", "", string.punctuation)
_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def f1_english(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of words in lower case, without punctuation and articles."""
    return _f1(_english_words(prediction), _english_words(answer))


def f1_chinese(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that jieba finds, without punctuation."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of the longest common subsequence of words; 0 where one side has no word."""
    if not _has_words(prediction) or not _has_words(answer):
        return 0.0
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(PYTHONS_RECURSION_LIMIT)
    try:
        scores: Any = library.Rouge(["rouge-l"]).get_scores(prediction, answer)
    except RecursionError:
        # The package walks a sentence's words by recursion; the original counts such pairs as 0.
        return 0.0
    finally:
        sys.setrecursionlimit(before)
    return float(scores[0]["rouge-l"]["f"])


def rouge_l_chinese(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(library.cut(prediction)), " ".join(library.cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that are named, if the right one is among them."""
    named = [each for each in classes if each in prediction]
    # The original walks the list while it removes from it, and so passes over a neighbour.
    for each in named:
        if each in answer and each != answer:
            named.remove(each)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in a prediction that are the paragraph of the answer."""
    return _share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_chinese(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same for a Chinese answer."""
    return _share_of_numbers(prediction, re.findall(r"段落(\d+)", answer)[0])


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in a prediction that are the answer."""
    return _share_of_numbers(prediction, answer)


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that has no backquote and no comment."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    return round(library.ratio(code, answer)) / 100


PACKAGES: dict[Against, tuple[str, ...]] = {
    f1_chinese: ("jieba",),
    rouge_l: ("rouge",),
    rouge_l_chinese: ("jieba", "rouge"),
    code_similarity: ("rapidfuzz",),
}
"""Packages that a score needs; those that are not named here need none."""


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def _english_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ENGLISH)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_CHINESE).split()) for word in library.cut(text))
    return [word for word in words if word]


def _has_words(text: str) -> bool:
    return any(sentence.split() for sentence in text.split("."))


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0

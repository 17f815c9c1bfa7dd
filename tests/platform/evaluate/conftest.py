"""The small corpus and model, made once for this folder's tests."""

import pytest

from nsa_platform.model.transformer import Transformer
from tests.platform.evaluate.small import Corpus, make_corpus, make_model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def model(corpus: Corpus) -> Transformer:
    return make_model(corpus.tokenizer.vocab_size)

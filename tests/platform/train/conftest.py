"""A process group of one, which the training code needs as much as one of many."""

from collections.abc import Iterator

import pytest

from tests.platform.train.workers import group_of_one


@pytest.fixture
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield

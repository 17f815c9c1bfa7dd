"""A process group of one, which the training code needs as much as one of many."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting: Path = tmp_path_factory.mktemp("group") / "file"
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

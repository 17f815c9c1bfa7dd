"""A profile covers the steps it says, lands in the artifacts and ends by itself."""

import gzip
import json
from pathlib import Path

import torch

from nsa_platform.train.profiling import FIRST_STEP, NUM_STEPS, profiled_steps


class Folder:
    """Keeps what a run would log."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.files: dict[str, bytes] = {}

    def log_text(self, text: str, path: str) -> None:
        self.texts[path] = text

    def log_file(self, local: str | Path, folder: str = "") -> None:
        self.files[f"{folder}/{Path(local).name}"] = Path(local).read_bytes()


def test_three_steps_are_profiled() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    descent = torch.optim.SGD([weight], lr=0.1)
    kept = Folder()
    with profiled_steps(descent, kept, device=torch.device("cpu")):
        for step in range(1, FIRST_STEP + NUM_STEPS + 2):
            torch.linalg.matrix_norm(weight @ weight).backward()
            descent.step()
            assert step >= FIRST_STEP + NUM_STEPS - 1 or not kept.files
    events = json.loads(gzip.decompress(kept.files["profile/trace.json.gz"]))["traceEvents"]
    products = [e for e in events if e.get("name") == "aten::matmul"]
    assert len(products) == NUM_STEPS
    assert "aten::mm" in kept.texts["profile/operators.txt"]
    assert not descent._optimizer_step_post_hooks

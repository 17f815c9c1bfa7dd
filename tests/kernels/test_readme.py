"""kernels/README.md keeps its word: its example runs, its tables name what there is."""

import re
from pathlib import Path

import pytest

import nsa_kernels
from nsa_kernels import NsaConfig, reference

README = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    trained, decoded = ({}, {})
    for example, names in zip(EXAMPLES, (trained, decoded), strict=True):
        exec(example, names)
    assert trained["q"].grad.abs().sum() > 0
    assert decoded["out"].shape == (1, 8, 64)
    assert decoded["out"].isfinite().all()


def test_every_public_name_is_explained() -> None:
    for name in nsa_kernels.__all__:
        assert f"`{name}" in README or name == "NsaConfig", name
    for field in NsaConfig.__dataclass_fields__:
        assert f"`{field}`" in README, field


def test_every_op_has_its_twin_in_the_reference() -> None:
    for name in nsa_kernels.__all__:
        if name.endswith("_attention") or name == "select_blocks":
            assert callable(getattr(reference, name)), name

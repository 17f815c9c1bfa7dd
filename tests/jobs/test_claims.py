"""docs/claims.md is what the records make it, holds every claim, and names its sources."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from jobs.claims import CLAIMS, PAGE, Claims, Records, main, page
from nsa_platform.config.base import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def claims() -> Claims:
    return Claims.parse(yaml.safe_load((RESULTS / CLAIMS).read_text()))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of records that a test may change."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page(RESULTS), "stale: python -m jobs.claims"


def test_every_claim_is_there_once(claims: Claims) -> None:
    assert [claim.id for claim in claims.all] == list(range(1, 59))
    for claim in claims.all:
        assert set(claim.by) <= set(claims.sources)


def test_what_was_measured_says_how(claims: Claims) -> None:
    for claim in claims.all:
        named = set(re.findall(r"\{(\w+)\}", claim.measured))
        assert named == set(claim.figures), claim.id
        if claim.status in ("reproduced", "directionally"):
            assert claim.command and claim.measured and claim.quantity, claim.id
        if claim.figures:
            assert claim.command, claim.id
            origins = Records(RESULTS).origins(claim)
            assert origins and all(re.search(r", [0-9a-f]{7,}, 20\d\d-", each) for each in origins)
        if claim.status == "nothing to measure":
            assert not claim.measured and not claim.command


def test_commands_name_what_exists(claims: Claims) -> None:
    seen = 0
    for claim in claims.all:
        for word in shlex.split(claim.command):
            path, _, test = word.partition("::")
            if word.startswith("jobs."):
                assert (ROOT / f"{word.replace('.', '/')}.py").is_file(), claim.id
            elif path.endswith((".py", ".yaml")):
                assert (ROOT / path).is_file(), claim.id
                assert f"def {test}(" in (ROOT / path).read_text() if test else True, claim.id
                seen += 1
    assert seen > 20


def test_a_new_measurement_changes_the_page(copy: Path) -> None:
    records = json.loads((copy / "kernels.json").read_text())
    measured = {record["name"]: record for record in records}
    changing = measured["64k-k192/nsa_real/forward"]
    changing["value"] /= 2
    changing["date"] = "2031-01-01"
    times = measured["64k-k192/full/forward"]["value"] / changing["value"]
    (copy / "kernels.json").write_text(json.dumps(records))
    before, after = page(RESULTS).splitlines(), page(copy).splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 2
    assert "| 34 | At 64k" in changed[0] and f"forward {times:.1f}" in changed[0]
    assert changed[1].startswith("- 34: ") and "2031-01-01" in changed[1]


def test_what_is_wrong_is_named(copy: Path) -> None:
    text = (copy / CLAIMS).read_text()
    (copy / CLAIMS).write_text(text.replace("status: reproduced", "status: proven", 1))
    with pytest.raises(ConfigError, match=r"parts\.1\.claims\.0\.status: Input should be 'repro"):
        page(copy)
    (copy / CLAIMS).write_text(text.replace("#64k/full/forward", "#64k/fool/forward", 1))
    with pytest.raises(ValueError, match=r"kernels\.json#64k/fool/forward: no such record"):
        page(copy)
    (copy / CLAIMS).write_text(text.replace("@read_bytes", "@red_bytes", 1))
    with pytest.raises(ValueError, match="@red_bytes: no such number"):
        page(copy)


def test_the_command_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "results/claims.yaml" in capsys.readouterr().out

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
from nsa_platform.config.runs import EvaluateRun

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
    with pytest.raises(ConfigError, match=r"parts\.0\.claims\.3\.status: must be 'repro"):
        page(copy)
    (copy / CLAIMS).write_text(text.replace("#64k/full/forward", "#64k/fool/forward", 1))
    with pytest.raises(ValueError, match=r"kernels\.json#64k/fool/forward: no such record"):
        page(copy)
    (copy / CLAIMS).write_text(text.replace("@read_bytes", "@red_bytes", 1))
    with pytest.raises(ValueError, match="@red_bytes: no such number"):
        page(copy)


BROKEN = [
    (
        "measured: exactly w tokens",
        "measured: exactly {w} tokens",
        "claim 12: measured cannot be filled",
    ),
    ('show: "{:.1%}"', 'show: "{:.1q}"', r"claim 14: show='\{:\.1q\}' cannot be filled in"),
    ("id: 2\n", "id: 1\n", "claims must have different ids, got twice: 1"),
]


@pytest.mark.parametrize(("old", "new", "told"), BROKEN)
def test_a_broken_claim_is_named(old: str, new: str, told: str, copy: Path) -> None:
    text = (copy / CLAIMS).read_text()
    (copy / CLAIMS).write_text(text.replace(old, new, 1))
    assert text != (copy / CLAIMS).read_text()
    with pytest.raises(ValueError, match=told):
        page(copy)


def test_a_broken_record_is_named_with_its_claim(copy: Path) -> None:
    path = copy / "kernels.json"
    records = json.loads(path.read_text())
    dense = next(each for each in records if each["name"] == "32k/full/forward")
    for changed, told in (
        ([*records, dense | {"value": 0}], "claim 1: kernels.json#32k/full/forward: is 0"),
        (
            [*records, dense | {"commit": ""}],
            "claim 1: kernels.json#32k/full/forward: says no commit",
        ),
        ([{"value": 1}], "claim 1: kernels.json: one of its records has no 'name'"),
        ({"name": "kernels"}, "claim 1: kernels.json: holds no list of records"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=told):
            page(copy)
    path.write_text("[")
    with pytest.raises(ValueError, match=r"claims\.yaml: claim 1: kernels\.json: is not JSON"):
        page(copy)


def test_a_command_measures_every_record_of_its_claim(claims: Claims) -> None:
    records = Records(RESULTS)
    for claim in claims.all:
        for place in {
            p.partition("@")[0] for f in claim.figures.values() for p in (*f.of, *f.over)
        }:
            measured_by = records.record(place)["command"].split(",")[0]
            script = re.search(r"jobs\.\w+|kernels/\S+\.py", measured_by)
            assert (script.group() if script else "bench.py") in claim.command, (claim.id, place)


def test_evaluations_that_are_named_measure_what_is_claimed(claims: Claims) -> None:
    wanted = {3: "bits_per_byte", 26: "needle", 27: "needle"}
    for claim in claims.all:
        if claim.id not in wanted:
            continue
        policies: list[bool] = []
        for command in claim.command.split("&&"):
            words = shlex.split(command)
            if "jobs.needle_record" in words:
                assert words.count("RUN_ID") == len(policies), "a record names each evaluation"
                continue
            sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            run = EvaluateRun.load(ROOT / words[words.index("--config") + 1], sets)
            policies.append(run.baselines is not None)
            assert getattr(run, wanted[claim.id]) is not None, claim.id
            if wanted[claim.id] == "needle":
                assert run.needle is not None and max(run.needle.lengths) == 65536
        assert any(policies) is (claim.id == 3)


def test_a_record_says_which_of_its_values_are_rounded() -> None:
    tree = json.loads((RESULTS / "ablations_nsa_50m_h100.json").read_text())
    digits, told = tree["rounded"]["digits"], tree["rounded"]["variants"]
    losses = {run["variant"]: [value for _, value in run["valid"]] for run in tree["runs"]}
    rounded = [
        name for name, values in losses.items() if [round(v, digits) for v in values] == values
    ]
    assert rounded == told


def test_the_documents_tell_what_the_device_does_for_a_byte() -> None:
    text = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    (told,) = re.findall(r"an H100 could do (\d+) meanwhile", text)
    records = Records(RESULTS)
    ridge = records.value("kernels.json#ceiling/matmul") / records.value(
        "kernels.json#ceiling/copy"
    )
    assert told == f"{ridge:.0f}"


def test_the_command_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "results/claims.yaml" in capsys.readouterr().out

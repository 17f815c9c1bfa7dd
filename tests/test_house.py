"""The laws of the house that a machine can check."""

import ast
import importlib
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from house_tree import README, packages_tree, sources

from nsa_platform.config.convert import ConvertRun
from nsa_platform.config.generate import GenerateRun
from nsa_platform.config.runs import EvaluateRun, PrepareDataRun, PretrainRun, SftRun, SweepRun

ROOT = Path(__file__).resolve().parents[1]
CODE = [path for path in sources() if path.is_relative_to(ROOT) and "tests" not in path.parts]
RUNS = {
    "prepare_data": PrepareDataRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "evaluate": EvaluateRun,
    "generate": GenerateRun,
    "convert": ConvertRun,
    "sweep": SweepRun,
}
CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120


def test_platform_is_the_standard_library() -> None:
    for folder in ("platform", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must stay a plain folder"
    assert platform.system()
    command = [sys.executable, "-c", "import platform; print(platform.system())"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.strip()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_has_a_caption(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "the first line of a file says what it is"
    assert len(docstring.splitlines()[0]) <= 100


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("jit" in ast.unparse(mark) for mark in node.decorator_list)
            limit = MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines, at most {limit}"


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_is_annotated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{path.name}:{node.lineno} {node.name}: {bare}"
        assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}: no return type"


def test_readme_tree_is_generated() -> None:
    readme = README.read_text()
    assert packages_tree() in readme, "README's file tree is stale: make tree"


def test_there_are_configurations() -> None:
    assert {path.parent.name for path in CONFIGS} == set(RUNS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_configuration_loads(path: Path) -> None:
    run = RUNS[path.parent.name].load(path)
    assert type(run).parse(yaml.safe_load(run.to_yaml())) == run


@pytest.mark.parametrize(
    "module",
    [*(f"jobs.{job}" for job in (*RUNS, "quickstart", "submit")), "deployments.serve"],
)
def test_entry_point_has_the_shared_flags(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = module.rpartition(".")[2]
    # In this process: starting another for each would import torch, Ray and MLflow ten times.
    entry = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        entry.main(["--help"])
    assert end.value.code == 0
    last = ast.parse(Path(str(entry.__file__)).read_text()).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    assert "main()" in ast.unparse(last.body[0])
    flags = set(
        re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    )
    shared = {"--help", "--config", "--set", "--dry-run"}
    extra = {
        "submit": {"--address", "--no-wait", "--k8s", "--namespace", "--image"},
        "quickstart": {"--folder"},
    }
    expected = {"--help"} if job == "quickstart" else shared
    assert flags == expected | extra.get(job, set())


def test_every_op_has_reference_test_and_workload() -> None:
    tree = ast.parse((ROOT / "kernels/nsa_kernels/__init__.py").read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    ops = {n for n in names if n.endswith("attention") or n == "select_blocks"}
    assert len(ops) == 8
    reference = (ROOT / "kernels/nsa_kernels/reference.py").read_text()
    tests = "".join(p.read_text() for p in (ROOT / "tests/kernels").rglob("*.py"))
    benchmarks = "".join(p.read_text() for p in (ROOT / "kernels/benchmarks").glob("*.py"))
    for op in ops:
        assert f"def {op}(" in reference, f"{op} has no reference"
        assert f"{op}(" in tests, f"{op} has no test"
        assert op in benchmarks, f"{op} has no workload"


def test_tree_names_no_machine_and_no_registry() -> None:
    pattern = r"python[h]osted|pypi[.]org|npm[j]s|(^|[^A-Za-z0-9_.])/(w[o]rk|f[a]rm|r[o]ot)/"
    found = subprocess.run(
        ["git", "grep", "-nIE", pattern, "--", ".", ":!tests/test_house.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""

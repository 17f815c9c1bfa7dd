"""The file tree of README, generated from the first docstring line of every file.

python tests/house_tree.py        rewrites the tree in README.md
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = (
    "kernels/nsa_kernels",
    "kernels/benchmarks",
    "platform/nsa_platform",
    "jobs",
    "deployments",
)
FENCE = re.compile(r"(<!-- tree -->\n)```text\n.*?```", flags=re.DOTALL)


def sources() -> list[Path]:
    """Every Python file of the house, tests included."""
    return sorted(
        path
        for folder in (*FOLDERS, "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def caption(path: Path) -> str:
    """First line of the file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].rstrip(".")


def packages_tree() -> str:
    """The tree as text: folders, and under each its files with their captions."""
    lines: list[str] = []
    folder: Path | None = None
    for path in sources():
        if "tests" in path.parts:
            continue
        if path.parent != folder:
            folder = path.parent
            about = caption(path) if path.name == "__init__.py" else ""
            lines.append(f"{folder.relative_to(ROOT)}/".ljust(44) + about)
        if path.name != "__init__.py":
            lines.append(f"    {path.name}".ljust(32) + caption(path))
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    tree = packages_tree().replace("\\", "\\\\")
    README.write_text(FENCE.sub(rf"\1```text\n{tree}```", README.read_text()))

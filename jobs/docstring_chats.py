"""Questions and answers from the documentation strings of Python sources: a small real SFT set.

python -m jobs.docstring_chats SOURCES OUTPUT.jsonl
"""

import argparse
import ast
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import fail, interruptible

MAX_ANSWER_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Written:
    """What write_chats has done."""

    chats: int
    unreadable: list[Path]
    """Files that are not UTF-8 or not Python of this version; nothing was taken from them."""


def write_chats(sources: Path, output: Path) -> Written:
    """Write one chat for each documented function or class below `sources`, as JSON lines.

    Rows are `{"messages": [...]}` in OpenAI's shape, in the order of the files' names. The file
    appears whole or not at all.

    Raises:
        ValueError: `sources` is no folder, or nothing below it has a documentation string.
    """
    if not sources.is_dir():
        raise ValueError(f"{sources}: is no folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    count, unreadable = 0, []
    with partial.open("w", encoding="utf-8") as stream:
        for path in sorted(sources.rglob("*.py")):
            if _is_tests(path.relative_to(sources)):
                continue
            try:
                module = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                unreadable.append(path)
                continue
            for messages in _chats_of(module, path.relative_to(sources)):
                stream.write(json.dumps({"messages": messages}) + "\n")
                count += 1
    if not count:
        partial.unlink()
        raise ValueError(f"{sources}: no documentation string found in any .py file")
    os.replace(partial, output)
    return Written(count, unreadable)


@interruptible("interrupted; the same command begins anew")
def main() -> None:
    """Write the chats of a folder of Python sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, help="a folder of .py files")
    parser.add_argument("output", type=Path, help="the JSON lines file to write")
    options = parser.parse_args()
    try:
        written = write_chats(options.sources, options.output)
    except (ValueError, OSError) as error:
        fail(str(error))
    print(f"{options.output}: {written.chats:,} chats")
    if written.unreadable:
        first = written.unreadable[0]
        print(f"skipped {len(written.unreadable):,} files that are not Python, {first} the first")


def _is_tests(path: Path) -> bool:
    return any(part in ("test", "tests", "idlelib", "site-packages") for part in path.parts)


def _chats_of(module: ast.Module, path: Path) -> Iterator[list[dict[str, str]]]:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _about(node, name)


def _about(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, module: str
) -> Iterator[list[dict[str, str]]]:
    documentation = ast.get_docstring(node)
    if not documentation or node.name.startswith("_"):
        return
    answer = " ".join(documentation.split("\n\n")[0].split())[:MAX_ANSWER_CHARACTERS]
    yield _chat(f"What does {module}.{node.name} do?", answer)
    if not isinstance(node, ast.ClassDef):
        signature = f"{node.name}({ast.unparse(node.args)})"
        yield _chat(f"What is the signature of {module}.{node.name}?", signature)


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    main()

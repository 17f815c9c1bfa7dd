"""Folders to write to are looked at, and left as they are."""

from pathlib import Path

import pytest

from jobs.places import check_output


@pytest.mark.parametrize("replaced", [False, True])
def test_what_can_be_written_is_left_as_it_is(tmp_path: Path, replaced: bool) -> None:
    (tmp_path / "there").mkdir()
    for output in ("there", "new", "new/below/it"):
        check_output(str(tmp_path / output), replaced=replaced)
    check_output("s3://nowhere/is/asked", replaced=replaced)
    assert [each.name for each in tmp_path.rglob("*")] == ["there"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output, line in (
        (tmp_path / "file", "file: is a file, must be a folder"),
        (tmp_path / "file" / "below", f"nothing can be written in {tmp_path}/file"),
        (Path("/proc/folder"), "output=/proc/folder: nothing can be written in /proc"),
    ):
        with pytest.raises(ValueError, match=line):
            check_output(str(output))


def test_a_folder_is_written_in_and_replaced_beside_it() -> None:
    with pytest.raises(ValueError, match="nothing can be written in /proc/self "):
        check_output("/proc/self")
    with pytest.raises(ValueError, match="nothing can be written in /proc "):
        check_output("/proc/self", replaced=True)

"""The files that commands write: looked at before the work, and written whole or not at all after it."""

import os
from pathlib import Path

import pytest

from ipa_kernels.cli.errors import UserError
from ipa_kernels.cli.output_files import json_file, writable, written


def test_a_folder_that_is_read_only_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root no folder is read-only."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"--json .*a\.json: cannot be written there"):
        json_file(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match=r"--output .*a\.png: cannot be written there"):
        writable(str(tmp_path / "a.png"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_ends_in_the_middle_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")

    def stop() -> None:
        with written("--json", file) as part:
            part.write_text("ne")
            raise error

    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        stop()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"
    with written("--json", file) as part:
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "new"


def test_links_and_pipes_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json /dev/stdout`: root could replace it by a file. Their folder need not be writable."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    file.write_text("old")
    link.symlink_to(file)
    assert json_file(str(pipe)) == pipe
    assert json_file(str(link)) == link
    with written("--json", pipe):
        pass
    with written("--json", link) as part:
        part.write_text("new")
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_a_link_to_what_is_not_there_yet_is_followed(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    assert json_file(str(link)) == link
    with written("--json", link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_a_file_that_is_read_only_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root no file is read-only."""
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    file.write_text("old")
    picture.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == tmp_path)
    with pytest.raises(UserError, match=r"--json .*a\.json: cannot be written there"):
        json_file(str(file))
    with pytest.raises(UserError, match=r"--output .*a\.png: cannot be written there"):
        writable(str(picture))

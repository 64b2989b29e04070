"""Checkpoints that a kill at any moment, or a loss of power, leaves whole: each is there completely or not at all.

A checkpoint is a folder that is written under another name, brought to the disk and then renamed, which is atomic; one that
goes is first renamed, too. What is found under another name than `checkpoint-N` is the rest of a process that was killed.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _REMOVED = ".unfinished-", ".removed-"


def write(folder: Path, step: int, contents: Callable[[Path], None], keep: int) -> Path:
    """Make `checkpoint-{step}` in a folder, with what `contents` writes into the place that it is given; keep the last few."""
    final = folder / f"checkpoint-{step:08d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    contents(unfinished)
    for path in (*unfinished.iterdir(), unfinished):
        to_disk(path)
    unfinished.rename(final)
    to_disk(folder)
    for old in finished(folder)[:-keep]:
        _remove(old)
    return final


def write_file(file: Path, contents: Callable[[Path], None]) -> None:
    """The same for one file: the one before stays until the new one is complete."""
    unfinished = file.with_name(f"{_UNFINISHED}{file.name}")
    contents(unfinished)
    to_disk(unfinished)
    unfinished.replace(file)
    to_disk(file.parent)


def finished(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, the last one last."""
    return sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def tidy(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for path in (*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REMOVED}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(checkpoint: Path) -> None:
    removed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

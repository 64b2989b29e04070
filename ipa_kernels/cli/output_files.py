"""The files that a command writes, as its options name them. Needs nothing but Python."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError, why


def writable(path: str) -> Path:
    """The file of --output, which is written at the end: a mistake in it should not wait until then."""
    output = Path(path)
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise UserError(f"--output {path}: needs the name of a .png file in a folder that exists")
    if output.is_dir() or not _is_writable(output):
        raise UserError(f"--output {path}: cannot be written there")
    return output


def json_file(path: str | None) -> Path | None:
    """The file of --json. Raises UserError where there can be none of that name."""
    if path is None:
        return None
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--json {path}: needs the name of a file in a folder that exists")
    if not _is_writable(file):
        raise UserError(f"--json {path}: cannot be written there")
    return file


def check_overwriting(outputs: Iterable[Path], given: Iterable[str | None]) -> None:
    """Raises UserError where an output is one of the other files of the command line."""
    known = {Path(path).resolve() for path in given if path is not None}
    for path in outputs:
        if path.resolve() in known:
            raise UserError(f"--output: {path} would replace another file of the command line")


@contextmanager
def written(option: str, path: Path) -> Iterator[Path]:
    """What the block writes to, which is the file at its end: whole, or not there. Raises UserError where it cannot be."""
    part = _part(path)
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{option} {path}: {why(error)}") from error
    finally:
        if part != path:
            with suppress(OSError):
                part.unlink()


def _part(path: Path) -> Path:
    """A name beside the file; a link stays one, and a device or a pipe has no place to take: they are written to themselves."""
    stays = path.is_symlink() or (path.exists() and not path.is_file())
    return path if stays else path.with_name(f"{path.name}.part")


def _is_writable(path: Path) -> bool:
    """Whether what is there may be written, and, where a file is made, its folder."""
    if path.exists() and not os.access(path, os.W_OK):
        return False
    return (path.exists() and _part(path) == path) or os.access(path.resolve().parent, os.W_OK)

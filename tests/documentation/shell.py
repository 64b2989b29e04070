"""The commands of the pages: `ipa-kernels` runs where the page says what it prints; of all others the arguments are checked."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ipa_kernels import cli

from .pages import ROOT, Block


class Parsed(Exception):
    """A command's parser has taken its arguments."""


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, without comments and settings of the environment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words:
            yield words


def command(block: Block, words: list[str]) -> str:
    """Check one line of a shell; run it, and return what it prints, where the page says what that is."""
    name, *arguments = words
    name = Path(name).name
    if name in ("ipa-kernels", "ipa_kernels"):
        return run(arguments) if block.kind == "run" else parse(lambda: cli.main(arguments), words)
    if block.kind == "run":
        pytest.fail(f"{block}: the tests run ipa-kernels, and compare what it prints; not {name}")
    if name.startswith("python") and arguments[:1] == ["-m"]:
        return check_module(arguments[1], arguments[2:])
    if name.startswith("python"):
        return check_script(arguments)
    if name == "accelerate":
        return check_script(arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :])
    if name == "make":
        return check_targets(arguments)
    if name == "pip":
        return check_requirements(arguments)
    if name in ("git", "cd", "pre-commit"):
        return ""
    pytest.fail(f"{block}: no test knows the command {name}")


def run(arguments: list[str]) -> str:
    """What `ipa-kernels` prints: on stderr only where it fails, as progress bars go there too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
    return out.getvalue() + (err.getvalue() if code == cli.USER_ERROR else "")


def parse(main: Callable[[], object], words: list[str]) -> str:
    """Let a program read its arguments, and stop it there."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> NoReturn:
        real(parser, *arguments, **options)
        raise Parsed

    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            main()
        except Parsed:
            return ""
        except SystemExit as stop:
            if stop.code == 0:  # --help, --version
                return ""
            pytest.fail(f"{shlex.join(words)}: {err.getvalue() or stop.code}")
    pytest.fail(f"{shlex.join(words)}: it reads no arguments")


def check_module(name: str, arguments: list[str]) -> str:
    if name in ("pip", "pytest", "venv"):
        return check_requirements(arguments) if name == "pip" else ""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # another test has imported it
        patch.setattr(sys, "argv", [name, *arguments])
        return parse(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), [name, *arguments])


def check_script(words: list[str]) -> str:
    """A script of the repository, or one that the page wrote."""
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]}: no such file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.syspath_prepend(str(script.parent))
        return parse(lambda: runpy.run_path(str(script), run_name="__main__"), words)


def check_targets(words: list[str]) -> str:
    """`make TARGET NAME=value`: the targets and the names are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, _, value = word.partition("=")
        known = f"$({name})" in makefile if value else re.search(rf"^{name}:.*## ", makefile, re.MULTILINE)
        assert known, f"make {word}: not in the Makefile"
    return ""


def check_requirements(words: list[str]) -> str:
    """`pip install 'ipa-kernels[extra]'`: the extras are in pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= set(extras), f"pip {word}: no such extra"
    return ""

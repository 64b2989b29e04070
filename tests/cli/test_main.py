"""The command line around its commands: what ends them, and what a terminal cannot show."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ipa_kernels
from ipa_kernels import cli
from ipa_kernels.cli import verify


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(options: Any) -> int:
        raise error

    monkeypatch.setattr(verify, "run", run)


def test_an_interrupt_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ending(monkeypatch, KeyboardInterrupt())
    assert cli.main(["verify"]) == 130
    assert capsys.readouterr().err == "ipa-kernels verify: interrupted\n"


def test_what_is_ours_alone_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(5, "Input/output error"), ModuleNotFoundError("nothing"), ValueError("no")):
        ending(monkeypatch, error)
        with pytest.raises(type(error)):
            cli.main(["verify"])


def test_names_that_are_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a" * 300 + ".png"
    for arguments in (
        ["demo", "--output", long],
        ["demo", "--image", long],
        ["verify", "--json", long],
        ["bench", "--json", long],
    ):
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "File name too long" in line


def test_a_reader_that_has_enough() -> None:
    """As `head -1`: no traceback, and the picture is there, since it is written before anything is said of it."""
    code = "import sys; from ipa_kernels.cli import main; sys.exit(main(['verify', '--quick', '--case', 'sd15_512_mid']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 141
    assert done.stderr == ""


def test_what_is_made_is_written_before_it_is_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_folder: None
) -> None:
    def broken(*arguments: Any) -> None:
        raise BrokenPipeError

    for command, made in (("demo", ["demo.png"]), ("generate", ["generated.png"])):
        monkeypatch.setattr("ipa_kernels.cli.pipeline_run.print_outcome", broken)
        image = [] if command == "demo" else ["--image", "reference.png"]
        if image:
            from ipa_kernels.cli.pictures import draw_reference

            draw_reference().save("reference.png")
        assert cli.main([command, "--steps", "2", "--device", "cpu", *image]) == 141
        assert all(Path(name).exists() for name in made)


def test_letters_that_a_terminal_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["demo", "--image", "猫.png"]) == 2
    stream.flush()
    assert b"--image \\u732b.png" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--version"], ipa_kernels.__version__), (["demo", "--help"], "--ip-adapter")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    """Of all commands: it is there at once."""
    code = """
import contextlib, io, sys
from ipa_kernels.cli import main
for command in ([], ["demo"], ["generate"], ["doctor"], ["verify"], ["bench"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*command, "--help"])
print({"torch", "diffusers", "transformers", "PIL", "matplotlib", "tqdm"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"

"""What tests of the command line share: saved weights, and a command line that has to fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ipa_kernels import cli

from .saved_weights import save


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `saved_weights.save`; nothing is changed in it."""
    folder = tmp_path_factory.mktemp("weights")
    save(folder)
    return folder


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str], empty_folder: None) -> Callable[..., str]:
    """Runs a command line that has to fail as a user's mistake does, with nothing written, and returns its one line.

    Progress bars may come before it.
    """

    def run(*arguments: object) -> str:
        capsys.readouterr()
        before = sorted(Path().iterdir())
        try:
            code: object = cli.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s]" not in line]
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("ipa-kernels")
        assert sorted(Path().iterdir()) == before
        return lines[0]

    return run

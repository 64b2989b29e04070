"""The mutations fit the code that they break; `make mutations` runs them."""

import ast
from functools import cache
from pathlib import Path

import pytest

from .table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


@cache
def functions(path: Path) -> set[str]:
    """The names of a file's functions."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_there_is_one_for_each_promise() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 25


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_fits(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    ast.parse(source.replace(mutation.old, mutation.new))
    path, _, test = mutation.test.partition("::")
    assert test.partition("[")[0] in functions(ROOT / path)

"""The messages that the code can give, read from its source: each a template with … for what is filled in.

In the package proper every text with the form of the house, "what: why", is one, and whatever is raised. In the commands, which
print much else, what they raise is.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import ipa_kernels

GAP = "…"
PACKAGE = Path(ipa_kernels.__file__).parent
NOT_FOR_USERS = (
    "kernels/primitives.py",
    "kernels/forward.py",
    "kernels/backward.py",
    "kernels/gradient_tiles.py",
    "testing/tiny_pipelines.py",
)
EDITS = ("replace", "define", "sub", "removeprefix", "strip", "lstrip", "join", "startswith")
"""Methods whose arguments are pieces of text, not messages."""


@functools.cache
def messages() -> dict[str, str]:
    """Each message, and where it is in the source."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in NOT_FOR_USERS:
            for line, text in _of_module(path, only_raised=name.startswith("cli/")):
                found.setdefault(text, f"{name}:{line}")
    return found


def _of_module(path: Path, only_raised: bool) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ignored = {id(leaf) for node in _not_messages(tree) for leaf in ast.walk(node)}
    constants = _constants(tree)
    own: dict[int, dict[str, str]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        local = constants | _constants(function)
        own |= {id(node): local for node in ast.walk(function)}
    raised = {id(leaf) for node in ast.walk(tree) for leaf in _arguments_of_errors(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            ignored |= {id(leaf) for leaf in ast.walk(node) if leaf is not node}
        if id(node) in ignored or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        text = _template(node, own.get(id(node), constants))
        is_message = id(node) in raised or (not only_raised and ": " in text)
        if is_message and _has_words(text):
            yield node.lineno, text.strip()


def _has_words(text: str) -> bool:
    """Whether it says something, beside what is filled in."""
    return len([word for word in text.split() if any(map(str.isalpha, word))]) >= 2


def _not_messages(tree: ast.Module) -> Iterator[ast.AST]:
    """Docstrings, what assertions say, annotations, pieces for edits of texts."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement
        if isinstance(node, ast.Assert) and node.msg is not None:
            yield node.msg
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in EDITS:
            yield from node.args
        if isinstance(node, ast.FunctionDef):
            yield from _pieces(node)


def _pieces(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Texts that get a name, and are filled into another by it."""
    filled = {
        node.value.id
        for node in ast.walk(function)
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name)
    }
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in filled
            and _is_text(node.value)
        ):
            yield node.value


def _arguments_of_errors(node: ast.AST) -> Iterator[ast.AST]:
    """The texts that an error is made of: `raise Kind(text)`, `parser.error(text)`, `_fail(name, text)`."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call):
        return
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if isinstance(node, ast.Raise) or name in ("error", "_fail"):
        for argument in call.args:
            yield from ast.walk(argument)


def _constants(scope: ast.AST) -> dict[str, str]:
    """Names that stand for one text in a module or a function."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            text = _template(node.value, {}) if _is_text(node.value) else GAP
            found.setdefault(node.targets[0].id, []).append(text)
    return {name: texts[0] for name, texts in found.items() if len(texts) == 1 and texts[0] != GAP}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _template(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return names.get(node.value.id, GAP)
    return GAP

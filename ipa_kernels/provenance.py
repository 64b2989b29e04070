"""Whether a function is torch's or diffusers' own, or one that someone has put in its place.

A function is known by the module whose globals it has and by the file of its code: `functools.wraps` copies neither. When it is
looked at does not matter, so that a patch which is there before this package is imported is seen too.
"""

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

PACKAGES = ("torch", "diffusers")

# of own functions alone, which live as long as their modules: a patch may hold a whole pipeline
_FUNCTIONS: dict[tuple[str, ...], set[FunctionType]] = {}
_METHODS: dict[tuple[type, str], Any] = {}


def _settled_when_traced(function: F) -> F:
    """`torch.compiler.assume_constant_result`, without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_settled_when_traced
def is_own(function: object, packages: tuple[str, ...] = PACKAGES) -> bool:
    """Whether a function is of one of these packages, and so is what it decorates.

    A user's function in one of torch's decorators (`torch.no_grad`, `torch.compile`) is the user's. An object that is called
    like a function (`functools.partial`, a mock) is nobody's own.
    """
    known = _FUNCTIONS.setdefault(packages, set())
    if function in known:
        return True
    if not _is_of(function, packages, []):
        return False
    if type(function) is FunctionType:
        known.add(function)
    return True


@_settled_when_traced
def runs_own(kind: type, name: str, packages: tuple[str, ...] = PACKAGES) -> bool:
    """Whether what a class runs under this name is a package's own function, of the class that it was written for.

    A subclass that overrides it with code of its own does not, and neither does a class that was given another class's method.
    """
    function = getattr(kind, name)
    if _METHODS.get((kind, name)) is function:
        return True
    owner = next(base for base in kind.__mro__ if name in vars(base))
    if not is_own(function, packages) or not _is_written_in(owner, function):
        return False
    _METHODS[kind, name] = function
    return True


def _is_written_in(owner: type, function: Any) -> bool:
    """Whether a function's code stands in the body of a class, or is one that torch gives to every module."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    place, _, name = function.__code__.co_qualname.rpartition(".")
    return bool(place == owner.__qualname__ or name == "_forward_unimplemented")


def _is_of(function: object, packages: tuple[str, ...], seen: list[object]) -> bool:
    if isinstance(function, MethodType):
        function = function.__func__
    if isinstance(function, BuiltinFunctionType):
        return str(function.__module__).partition(".")[0] in packages
    if not isinstance(function, FunctionType):
        return False
    if any(function is other for other in seen):
        return True
    seen.append(function)
    module = str(function.__globals__.get("__name__"))
    path = module.replace(".", "/")
    file = function.__code__.co_filename.replace("\\", "/")
    if module.partition(".")[0] not in packages or not file.endswith((f"{path}.py", f"{path}/__init__.py")):
        return False
    return all(_is_of(inner, packages, seen) for inner in _decorated(function))


def _decorated(function: FunctionType) -> list[object]:
    """The functions that a decorator's function was made of."""
    found = [vars(function)["__wrapped__"]] if "__wrapped__" in vars(function) else []
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if callable(content) and not isinstance(content, type):
            found.append(content)
    return found

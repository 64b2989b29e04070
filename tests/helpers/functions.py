"""The calls of torch's functions, seen without a hook or a replaced function: with either, nothing would be remembered."""

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class SeenFunctions(TorchFunctionMode):
    """Tells of each call in a with-block: see(function, arguments, keyword arguments)."""

    def __init__(self, see: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

"""Compiled kernels, each compiled and loaded once in a process."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVarTuple

Key = TypeVarTuple("Key")


class Compiled(Generic[*Key]):
    """A cache of what `compile_` returns. One thread compiles and loads a kernel, and the others that want it wait.

    `functools.cache` holds no lock: each thread that comes first would load a module of its own, and a module that nobody
    refers to any more is unloaded, perhaps while its kernel runs or a graph holds it. What is in the cache is found without
    the lock. What fails is not kept. A compiler's hook may come back here from within.

    kernels: by the arguments of `compile_`.
    """

    def __init__(self, compile_: Callable[[*Key], Any]) -> None:
        self.kernels: dict[tuple[Any, ...], Any] = {}
        self._compile = compile_
        self._lock = threading.RLock()

    def __call__(self, *key: *Key) -> Any:
        kernel = self.kernels.get(key)
        if kernel is None:
            with self._lock:
                kernel = self.kernels.get(key)
                if kernel is None:
                    kernel = self._loaded(*key)
                    # not what was made last: a hook may have been given another one meanwhile
                    kernel = self.kernels.setdefault(key, kernel)
        return kernel

    def _loaded(self, *key: *Key) -> Any:
        kernel = self._compile(*key)
        # any grid: with a first one Triton loads the module
        kernel[(1, 1, 1)]
        return kernel

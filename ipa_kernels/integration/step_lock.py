"""A lock for steps: reentrant, and given up by a call that was interrupted, whichever thread notices."""

import inspect
import sys
import threading
from types import FrameType

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class StepLock:
    """Held by calls of one thread, as many as acquire it; another thread waits while one of those runs."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner = threading.current_thread()
        self._held: list[FrameType] = []
        self._is_over = False

    def __reduce__(self) -> tuple[object, ...]:
        return StepLock, ()

    def acquire(self, frame: FrameType | None = None, waits: bool = True) -> bool:
        """Whether it is held now: always, where this waits.

        frame: the call that holds it, by default the caller; reclaimed if that call was unwound by KeyboardInterrupt, for which
        torch runs no hooks.
        """
        frame = frame or sys._getframe(1)
        me = threading.current_thread()
        with self._free:
            while self._is_held_by_another(me) and not self._is_over:
                if not waits:
                    return False
                self._free.wait(timeout=1.0)
            self._owner = me
            self._held.append(frame)
            return True

    def release(self, frame: FrameType | None = None) -> None:
        """Of what a frame holds, by default the caller; does nothing where that was reclaimed already."""
        frame = frame or sys._getframe(1)
        with self._free:
            if self._owner is threading.current_thread() and frame in self._held:
                self._held.remove(frame)
                if not self._held:
                    self._free.notify_all()

    def end(self) -> None:
        """Nobody waits any more: what it was for is gone."""
        with self._free:
            self._is_over = True
            self._free.notify_all()

    def _is_held_by_another(self, me: threading.Thread) -> bool:
        self._held = [frame for frame in self._held if is_running(frame, self._owner)]
        return bool(self._held) and self._owner is not me


def is_running(frame: FrameType, thread: threading.Thread) -> bool:
    """Whether a frame is on the stack of a thread.

    True in doubt: another thread may leave a generator while its stack is walked, and the frame of one that was left leads no
    further. What any other call was called from stays known.
    """
    last = None
    current = sys._current_frames().get(thread.ident or 0)
    while current is not None and current is not frame:
        last, current = current, current.f_back
    is_doubtful = last is not None and bool(last.f_code.co_flags & _GENERATORS)
    return current is frame or (is_doubtful and thread is not threading.current_thread())

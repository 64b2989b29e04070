"""A lock for steps: reentrant, and given up for a thread that has ended, or for a step that was interrupted."""

import sys
import threading
from types import FrameType


class Turn:
    """Held by one thread, as often as it takes it; whoever else wants it waits."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: threading.Thread | None = None
        self._held: list[FrameType | None] = []
        self._is_over = False

    def __reduce__(self) -> tuple[object, ...]:
        return Turn, ()

    def take(self, frame: FrameType | None = None) -> None:
        """frame: of the step that it is taken for; a step that is no longer running when the same thread comes again, since
        it was interrupted in a way that torch runs no hooks for, has given it up.
        """
        me = threading.current_thread()
        with self._free:
            while self._owner not in (None, me) and not self._is_over:
                self._free.wait(timeout=1.0)
                if self._owner is not None and not self._owner.is_alive():
                    self._owner, self._held = None, []
            if self._owner is me:
                self._held = [held for held in self._held if held is None or is_running(held)]
            self._owner = me
            self._held.append(frame)

    def give(self, frame: FrameType | None = None) -> None:
        """Give back what was taken for a frame; does nothing where that is given up already."""
        with self._free:
            if self._owner is threading.current_thread() and frame in self._held:
                self._held.remove(frame)
                if not self._held:
                    self._owner = None
                    self._free.notify_all()

    def end(self) -> None:
        """Nobody waits any more: what it was for is gone."""
        with self._free:
            self._is_over = True
            self._free.notify_all()


def is_running(frame: FrameType) -> bool:
    """Whether a frame is on the stack of this thread."""
    current: FrameType | None = sys._getframe()
    while current is not None and current is not frame:
        current = current.f_back
    return current is frame

"""The lock for steps: who holds it after an interrupt."""

import sys
import threading
from types import FrameType

from ipa_kernels.turn import Turn


def interrupted(turn: Turn) -> FrameType:
    """A step that took the turn and ended without giving it back; its frame."""
    frame = sys._getframe()
    turn.take(frame)
    return frame


def is_free(turn: Turn) -> bool:
    """Whether another thread gets it."""
    taken = threading.Event()

    def other() -> None:
        turn.take()
        taken.set()
        turn.give()

    threading.Thread(target=other, daemon=True).start()
    return taken.wait(timeout=0.2)


def test_an_interrupted_step_gives_back_nothing_that_another_took() -> None:
    turn = Turn()
    frame = interrupted(turn)
    turn.take()
    # whoever tidies up after the step: its turn was given up when the thread came again
    turn.give(frame)
    assert not is_free(turn)
    turn.give()
    assert is_free(turn)


def test_each_frame_gives_back_its_own() -> None:
    turn = Turn()
    turn.take(sys._getframe())
    turn.take()
    turn.give(sys._getframe())
    assert not is_free(turn)
    turn.give()
    assert is_free(turn)

"""The lock for steps: who holds it after an interrupt."""

import sys
import threading
from types import FrameType

from ipa_kernels.integration.step_lock import Turn

from .steady import NEVER


def interrupted(turn: Turn) -> FrameType:
    """A step that took the turn and ended without giving it back; its frame."""
    frame = sys._getframe()
    turn.take(frame)
    return frame


def order(turn: Turn) -> list[str]:
    """What happens first: this thread, which holds the turn once, gives it back, or another takes it."""
    begun, happened = threading.Event(), []

    def other() -> None:
        begun.set()
        turn.take()
        happened.append("taken")
        turn.give()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    begun.wait()
    # time for one that does not wait to be caught; one that waits never fails for want of it
    thread.join(timeout=0.2)
    happened.append("given")
    turn.give()
    thread.join(timeout=NEVER)
    return happened


def test_an_interrupted_step_gives_back_nothing_that_another_took() -> None:
    turn = Turn()
    frame = interrupted(turn)
    turn.take()
    # whoever tidies up after the step: its turn was given up when the thread came again
    turn.give(frame)
    assert order(turn) == ["given", "taken"]


def test_each_frame_gives_back_its_own() -> None:
    turn = Turn()
    turn.take(sys._getframe())
    turn.take()
    turn.give(sys._getframe())
    assert order(turn) == ["given", "taken"]

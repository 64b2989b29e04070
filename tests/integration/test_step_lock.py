"""The lock for steps: who holds it after an interrupt."""

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from ipa_kernels.integration.step_lock import StepLock, is_running

from ..helpers.steady import NEVER


def interrupted(lock: StepLock) -> FrameType:
    """A step that took the lock and ended without giving it back; its frame."""
    frame = sys._getframe()
    lock.acquire(frame)
    return frame


def is_free(lock: StepLock, seconds: float = NEVER) -> bool:
    """Whether another thread gets it within so many seconds."""
    installed = threading.Event()

    def other() -> None:
        lock.acquire()
        installed.set()
        lock.release()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    return installed.wait(timeout=seconds)


def test_an_interrupted_step_gives_back_nothing_that_another_took() -> None:
    lock = StepLock()
    frame = interrupted(lock)
    lock.acquire()
    # whoever tidies up after the step: its lock was given up when the thread came again
    lock.release(frame)
    assert not is_free(lock, 1.5)
    lock.release()
    assert is_free(lock)


def test_each_frame_gives_back_its_own() -> None:
    lock = StepLock()
    lock.acquire(sys._getframe())
    lock.acquire()
    lock.release(sys._getframe())
    assert not is_free(lock, 1.5)
    lock.release()
    assert is_free(lock)


def test_a_step_that_was_interrupted_in_this_thread_holds_up_no_other() -> None:
    lock = StepLock()
    interrupted(lock)
    assert is_free(lock)


def test_whoever_takes_it_without_a_step_gives_it_up_too() -> None:
    """An interrupt may come before the first line of its `try`."""

    def tidies(lock: StepLock) -> None:
        lock.acquire()
        raise KeyboardInterrupt

    lock = StepLock()
    with pytest.raises(KeyboardInterrupt):
        tidies(lock)
    assert is_free(lock)


def test_a_step_is_seen_from_another_thread_for_as_long_as_it_runs() -> None:
    begun, go_on = threading.Event(), threading.Event()
    frames: list[FrameType] = []

    def step() -> None:
        frames.append(sys._getframe())
        sum(waiting())

    def waiting() -> Iterator[int]:
        begun.set()
        go_on.wait(NEVER)
        yield 1

    thread = threading.Thread(target=lambda: (step(), begun.clear(), go_on.clear(), begun.set(), go_on.wait(NEVER)))
    thread.start()
    begun.wait(NEVER)
    assert is_running(frames[0], thread)
    assert not is_running(sys._getframe(), thread)
    begun.clear()
    go_on.set()
    begun.wait(NEVER)
    assert not is_running(frames[0], thread)
    go_on.set()
    thread.join()
    assert not is_running(frames[0], thread)


def test_a_stack_that_ends_in_a_generator_is_none_to_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was left while the stack was walked: whether the step still runs, the next look tells."""

    def left() -> Iterator[int]:
        yield 1

    generator: Any = left()
    next(generator)
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    monkeypatch.setattr(sys, "_current_frames", lambda: {thread.ident: generator.gi_frame})
    assert is_running(sys._getframe(), thread)
    monkeypatch.undo()
    assert not is_running(sys._getframe(), thread)
    go_on.set()
    thread.join()

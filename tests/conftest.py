"""What every test gets: the interpreter where there is no GPU, a device, a seed, memory that is poisoned until written."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Tiny tensors on two test processes: more threads only wait for each other.
torch.set_num_threads(1)

# Hundreds of loads of tiny adapters would say hundreds of times that they come without an image encoder.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# Triton reads this when a kernel is decorated, so it is set before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    lifted = pytest.mark.skip(reason="needs a CUDA or ROCm GPU: run `make test-gpu` on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(lifted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted, summed up: `record_property("cells of the matrix", 230)`."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update({name: value for name, value in report.user_properties if isinstance(value, int)})
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count:,}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernel runs: a GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs in an empty folder, on one thread: cores are shared, and threads that wait for each other are slow."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SEED = int(os.environ.get("TEST_SEED", "0"))
"""Of every test. Errors of rounding are statistics: one draw in some hundred exceeds its bound by chance, so that runs with
seeds of their own would be red by chance too. `TEST_SEED=1 make test` draws other numbers."""


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever test ran before in the worker. What `verify` draws for its seed is the same, too."""
    torch.manual_seed(SEED)
    monkeypatch.setattr("secrets.randbelow", lambda below: SEED % below)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN: a value that a kernel forgot to write cannot pass for one that it wrote."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Captures on the CPU, as `helpers.recorder.Recorder`; `runs` of each counts its replays."""
    from ipa_kernels.graphs import cuda_graphs

    from .helpers.recorder import Recorder, record, stand_in

    found: list[Recorder] = []

    def capture(run: Callable[[], Any], *_: Any) -> tuple[Callable[[], None], Any]:
        recorder, outputs = record(run)
        found.append(recorder)
        return recorder.replay, outputs

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    stand_in(monkeypatch)
    return found


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test compiled counts here, nor the other way round."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

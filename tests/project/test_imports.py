"""Importing does nothing, and works with torch alone. Each test runs in a fresh interpreter."""

import pytest

from ..helpers.fresh_interpreter import run


def test_the_import_loads_opens_and_starts_nothing() -> None:
    """So that it is fast: less than a millisecond where it was measured."""
    run(
        """
        from pathlib import Path
        before, done = set(sys.modules), []
        torch.cuda._lazy_init = None  # a touch of CUDA would raise
        sys.addaudithook(lambda event, details: done.append((event, *details)))
        import ipa_kernels
        happened = list(done)
        loaded = set(sys.modules) - before
        assert loaded == {"ipa_kernels"}, loaded
        assert not torch.cuda.is_initialized()
        folder = Path(ipa_kernels.__file__).parent
        opened = {str(details[0]) for event, *details in happened if event == "open"}
        assert opened, "the hook saw nothing"
        assert all(Path(path).is_relative_to(folder) for path in opened), opened
        started = {event for event, *_ in happened if event.split(".")[0] in ("subprocess", "socket", "ctypes", "_thread")}
        assert not started, started
        """,
        "triton",
        "diffusers",
    )


def test_every_public_name_can_be_looked_up_with_torch_alone() -> None:
    run(
        """
        import ipa_kernels
        for name in ipa_kernels.__all__:
            assert getattr(ipa_kernels, name) is not None
            assert name in dir(ipa_kernels)
        assert ipa_kernels.__version__
        assert ipa_kernels.reference.decoupled_attention
        try:
            ipa_kernels.nonsense
        except AttributeError as error:
            assert "'ipa_kernels' has no attribute 'nonsense'" in str(error)
        else:
            raise AssertionError
        """,
        "triton",
        "diffusers",
    )


def test_the_op_works_with_torch_alone_and_names_what_the_kernel_lacks() -> None:
    run(
        """
        import ipa_kernels
        q = torch.randn(1, 2, 5, 8)
        out = ipa_kernels.decoupled_attention(q, q, q, [q], [q], image_scales=0.5)
        torch.testing.assert_close(out, 1.5 * torch.nn.functional.scaled_dot_product_attention(q, q, q))
        try:
            ipa_kernels.decoupled_attention(q, q, q, [q], [q], impl="triton")
        except ipa_kernels.UnsupportedError as error:
            assert "triton: cannot be imported, so there is no kernel" in str(error)
            assert "device cpu" in str(error)
        else:
            raise AssertionError
        """,
        "triton",
        "diffusers",
    )


@pytest.mark.parametrize("function", ["enable", "disable", "explain", "clear_cache"])
def test_without_diffusers_the_switch_names_the_extra(function: str) -> None:
    run(
        f"""
        import ipa_kernels
        try:
            ipa_kernels.{function}(torch.nn.Linear(2, 2))
        except ImportError as error:
            assert "pip install 'ipa-kernels[diffusers]'" in str(error)
            assert "cannot be imported (No module named 'diffusers" in str(error), str(error)
        else:
            raise AssertionError
        """,
        "diffusers",
    )


def test_without_triton_pipelines_run_eagerly() -> None:
    run(
        """
        import warnings
        warnings.simplefilter("ignore")
        import ipa_kernels
        from tests.helpers.generate import generate
        from tests.helpers.pipelines import build
        pipe = build("sd", ("base",))
        stock = generate(pipe, ("base",))
        report = ipa_kernels.enable(pipe)
        assert "triton: cannot be imported" in report.layers[0].reason
        assert torch.equal(generate(pipe, ("base",)), stock)
        assert ipa_kernels.explain(pipe).eager == len(report.layers)
        """,
        "triton",
    )


def test_auto_never_chooses_the_interpreter_and_triton_demands_it() -> None:
    run(
        """
        import ipa_kernels
        q = torch.randn(1, 2, 5, 8)
        eager = ipa_kernels.decoupled_attention(q, q, q, [q], [q], impl="eager")
        assert torch.equal(ipa_kernels.decoupled_attention(q, q, q, [q], [q]), eager)
        try:
            ipa_kernels.decoupled_attention(q, q, q, [q], [q], impl="triton")
        except ipa_kernels.UnsupportedError as error:
            assert "device cpu: the kernel needs a GPU" in str(error)
        else:
            raise AssertionError
        """
    )

"""What a user's type checker sees, in strict mode: `test_wheel` has mypy read this file beside the installed package.

Each `type: ignore` is a mistake that it has to find: one that it does not find is an error too.
"""

from contextlib import AbstractContextManager
from typing import Any, assert_type

import torch

import ipa_kernels


def of_a_pipeline(pipe: object) -> None:
    report = ipa_kernels.enable(pipe, impl="auto", cache=True)
    assert_type(report, ipa_kernels.Report)
    assert_type(ipa_kernels.explain(pipe), ipa_kernels.Report)
    assert_type(ipa_kernels.prepare(pipe, prompt="a cat"), ipa_kernels.Report)
    assert_type(ipa_kernels.graphed(pipe), ipa_kernels.Report)
    block: AbstractContextManager[ipa_kernels.Report] = ipa_kernels.accelerated(pipe, impl="eager")
    with block as inside, ipa_kernels.accelerated(pipe) as again:
        assert_type(inside, ipa_kernels.Report)
        assert_type(again, ipa_kernels.Report)
    ipa_kernels.disable(pipe)
    ipa_kernels.clear_cache(pipe)

    assert_type(report.layers, list[ipa_kernels.LayerReport])
    assert_type(report.layers[0].impl, str | None)
    assert_type((report.triton, report.cache.hits, report.prepared), tuple[int, int, int])
    assert_type(report.graphs, ipa_kernels.GraphReport | None)
    assert_type(report.to_dict(), dict[str, Any])

    ipa_kernels.enable(pipe, impl=1)  # type: ignore[arg-type]
    ipa_kernels.enable()  # type: ignore[call-arg]
    print(report.layer)  # type: ignore[attr-defined]


def of_tensors(query: torch.Tensor, image: torch.Tensor, scales: torch.Tensor) -> None:
    attend = ipa_kernels.decoupled_attention
    assert_type(attend(query, query, query, [image], (image,), image_scales=0.7), torch.Tensor)
    assert_type(attend(query, query, query, [], [], image_scales=scales, image_masks=[None, image]), torch.Tensor)
    assert_type(ipa_kernels.reference.decoupled_attention(query, query, query, [image], [image]), torch.Tensor)
    try:
        attend(query, query, query, [image], [image], impl="triton")
    except ipa_kernels.UnsupportedError as error:
        value_error: ValueError = error
        print(value_error)

    attend(query, query, query, image, [image])  # type: ignore[arg-type]
    attend(query, query, query, [image], [image], 0.7)  # type: ignore[call-arg]


def of_the_package() -> None:
    assert_type(ipa_kernels.__version__, str)
    warning: type[UserWarning] = ipa_kernels.FallbackWarning
    print(warning)
    print(ipa_kernels.enabel)  # type: ignore[attr-defined]

"""Whose a function is: torch's and diffusers' own, and everything that may be put in its place."""

import functools
import types
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor, embeddings
from torch import nn

from ipa_kernels.integration.processors import unet as families
from ipa_kernels.integration.provenance import is_own, runs_own

from ..helpers.adapters import load
from ..helpers.pipelines import build

Attention = attention_processor.Attention


def mine(*arguments: Any) -> None:
    """A user's function."""


@functools.wraps(Attention.forward)
def wrapping(*arguments: Any) -> Any:
    return Attention.forward(*arguments)


def compiled_elsewhere() -> Any:
    """Code that a tool puts into diffusers' module."""
    space = vars(attention_processor)
    exec("def elsewhere(self): pass", space)
    return space.pop("elsewhere")


@pytest.mark.parametrize("kind", ["sdxl", "kolors", "animatediff"])
def test_every_module_of_a_unet_runs_its_own(kind: str) -> None:
    """Decorated ones (`apply_lora_scale`) and those of torch that have no forward among them."""
    pipe = build(kind)
    load(pipe, "plus")
    for module in pipe.unet.modules():
        assert runs_own(type(module), "forward"), type(module)
        assert runs_own(type(module), "__call__"), type(module)


def test_own_functions() -> None:
    for kind in (*families.FUSED, attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0):
        assert runs_own(kind, "__call__")
    for kind in vars(embeddings).values():
        if isinstance(kind, type) and issubclass(kind, nn.Module) and "Image" in kind.__name__:
            assert runs_own(kind, "forward"), kind
    for function in (F.linear, F.layer_norm, F.gelu, F.scaled_dot_product_attention, F.interpolate, F.dropout):
        assert is_own(function)
    assert is_own(torch.no_grad()(Attention.forward))
    assert is_own(Attention(8).forward)


OTHERS: dict[str, Any] = {
    "a user's": mine,
    "a wrapper with the names of what it wraps": wrapping,
    "partial": functools.partial(Attention.forward),
    "a mock": mock.Mock(),
    "a user's, decorated by torch": torch.no_grad()(mine),
    "a user's, compiled": torch.compile(mine),
    "a mock, decorated by torch": torch.no_grad()(mock.Mock(__name__="f")),
    "a user's, as a method": types.MethodType(mine, object()),
    "put into diffusers' module": compiled_elsewhere(),
    "Python's own": len,
    "a class": Attention,
}


@pytest.mark.parametrize("name", OTHERS)
def test_functions_of_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = OTHERS[name]
    assert not is_own(function)
    assert not is_own(function), "the second answer is the first"
    monkeypatch.setattr(nn.Linear, "forward", function)
    assert not runs_own(nn.Linear, "forward")
    monkeypatch.undo()
    assert runs_own(nn.Linear, "forward")


def test_a_method_of_another_class_is_not_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = attention_processor.IPAdapterAttnProcessor2_0
    monkeypatch.setattr(kind, "__call__", attention_processor.IPAdapterAttnProcessor.__call__)
    assert is_own(kind.__call__)
    assert not runs_own(kind, "__call__")


def test_a_subclass() -> None:
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    assert runs_own(Same, "forward")
    assert not runs_own(Other, "forward")


def test_other_packages() -> None:
    lora = pytest.importorskip("peft.tuners.lora.layer")
    assert not runs_own(lora.Linear, "forward")
    assert is_own(lora.Linear.forward, ("peft", "torch"))


def test_a_patch_is_not_kept_alive() -> None:
    def patch() -> None:
        pass

    seen = weakref.ref(patch)
    assert not is_own(patch)
    del patch
    assert seen() is None


def test_a_scripted_module_is_nobodys_own() -> None:
    """What it runs is compiled code."""
    assert not runs_own(torch.jit.ScriptModule, "forward")
    assert not runs_own(object, "forward")

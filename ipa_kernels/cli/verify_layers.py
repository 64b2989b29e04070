"""The IP-Adapter layers of a running pipeline, one by one on what they are given: enabled, beside stock and float64.

The pipeline runs enabled, with all that it remembers between steps. Whenever a layer has run, a copy of it, which is diffusers'
own, runs on the same input, and then computes its attention in float64, from queries, keys and values as its projections round
them. What is compared by the rule is the output of the attention, before the layer's output projection; what the layer returns
has to be what stock makes of that output.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import reference
from ..integration.api import accelerated, explain, unet_of
from ..report import LayerReport, Report
from .progress import progress
from .verify_results import Checked, Finding, failure, layer_shape

STEPS = 3
"""The first prepares what the others find again; and one of three largest errors may be chance (`reference.kept`)."""


def verify_layers(pipe: Any, impl: str, generate: Callable[[int], object]) -> tuple[list[Checked], Report]:
    """Each layer that has an IP-Adapter, while `generate` runs the pipeline for a number of steps, and the report of that run.

    Raises what `enable(pipe, impl=impl)` and `generate` raise. Where a layer raises, stock runs in its place.
    """
    unet = unet_of(pipe)
    layers = [_Layer(unet.get_submodule(layer.name)) for layer in explain(pipe).layers]
    with progress(STEPS * len(layers)) as step, accelerated(pipe, impl=impl) as report, _intercepted(layers, step):
        generate(STEPS)
    return [layer.checked(ran, unet.dtype) for layer, ran in zip(layers, report.layers, strict=True)], report


class _Layer:
    """One attention of a UNet, and what its calls showed."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.shape = ""
        self.device = ""
        self.calls = 0
        self.draws: list[reference.Comparison] = []
        self.error = ""

    def run(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call of the attention, compared; returns what it returns."""
        self.calls += 1
        try:
            actual, out = _attended(forward, self.attention, arguments, options)
        except Exception as error:
            self.error = self.error or f"raised {failure(error)}"
            return forward(copy.deepcopy(self.attention), *arguments, **options)
        try:
            self._compare(forward, actual, out, arguments, options)
        except Exception as error:  # what raises is not verified; the next layer may be
            self.error = self.error or failure(error)
        return out

    def _compare(self, forward: Callable[..., Any], actual: Tensor, out: Any, arguments: Any, options: Any) -> None:
        self.device, self.shape = actual.device.type, _shape(self.attention, *arguments, **options)
        # a copy of an enabled layer is diffusers' own
        stock = copy.deepcopy(self.attention)
        expected, finished = _attended(forward, stock, arguments, options, instead=actual)
        if not _same(out, finished):
            self.error = self.error or "returns something else than stock makes of its attention's output"
        if torch.equal(actual, expected):
            return
        stock.to_q, stock.to_k, stock.to_v = (_Rounded(module, actual.dtype) for module in (stock.to_q, stock.to_k, stock.to_v))
        for projections in (stock.processor.to_k_ip, stock.processor.to_v_ip):
            for i, module in enumerate(projections):
                projections[i] = _Rounded(module, actual.dtype)
        stock.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
        exact, exact_options = pytree.tree_map_only(Tensor, Tensor.double, (arguments, options))
        truth = forward(stock, *exact, **exact_options)
        query, *keys = (
            projected.flatten(1, -2).unflatten(-1, (stock.heads, -1)).transpose(1, 2)
            for module in (stock.to_q, stock.to_k, *stock.processor.to_k_ip)
            for projected in module.outputs
        )
        score = reference.largest_score(query, keys)
        self.draws.append(reference.compare(actual, expected, truth, score=score, text_only=len(keys) == 1))

    def checked(self, ran: LayerReport, dtype: torch.dtype) -> Checked:
        """All calls together."""
        impl = ran.impl or ran.planned
        error = self.error if self.calls else "was not called"
        must_equal = impl != "triton" and self.device == "cpu" and dtype == torch.float32
        return Checked(ran.name, self.shape, dtype, {impl: Finding(tuple(self.draws), must_equal, error)}, ran.reason)


class _Rounded(nn.Module):
    """A projection in its own dtype, from and to float64: its rounding is no error of the attention. outputs: of its calls."""

    def __init__(self, projection: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.projection = projection
        self.dtype = dtype
        self.outputs: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] to [B, N, H·D]."""
        self.outputs.append(self.projection(tokens.to(self.dtype)))
        return self.outputs[-1].double()


@contextmanager
def _intercepted(layers: list[_Layer], step: Callable[[str], None]) -> Iterator[None]:
    """Calls of these attentions go through `_Layer.run`. Not by hooks on them, with which an enabled UNet does other things."""
    indices = {layer.attention: i for i, layer in enumerate(layers)}
    plain = Attention.forward

    def forward(attention: Any, *arguments: Any, **options: Any) -> Any:
        if attention not in indices:
            return plain(attention, *arguments, **options)
        step(f"layer {indices[attention] + 1} of {len(layers)}")
        return layers[indices[attention]].run(plain, *arguments, **options)

    Attention.forward = forward
    try:
        yield
    finally:
        Attention.forward = plain


def _attended(
    forward: Callable[..., Any], attention: Any, arguments: Any, options: Any, instead: Tensor | None = None
) -> tuple[Tensor, Any]:
    """What the attention gives to its output projection, and what the layer makes of that, or of another output `instead`."""
    given: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        given.append(inputs[0])
        return None if instead is None else (instead,)

    hook = attention.to_out[0].register_forward_pre_hook(take)
    try:
        out = forward(attention, *arguments, **options)
    finally:
        hook.remove()
    return given[0], out


def _same(out: Any, finished: Any) -> bool:
    """The same operations on the same numbers; a GPU's libraries may round them in another order."""
    if out.shape != finished.shape:
        return False
    # not torch.equal: NaN is the same as NaN here
    same = torch.allclose(out, finished, rtol=0, atol=0, equal_nan=True)
    return same or (out.device.type != "cpu" and _rounded_alike(out, finished))


def _rounded_alike(out: Tensor, finished: Tensor) -> bool:
    """Whether a few roundings are all that is between the two: over what is finite, beside which all is the same."""
    finite = finished.isfinite()
    if not torch.allclose(out[~finite], finished[~finite], equal_nan=True):
        return False
    out, finished = out[finite].double(), finished[finite]
    distance = (out - finished.double()).norm()
    return bool(distance <= 4 * torch.finfo(finished.dtype).eps * finished.double().norm())


def _shape(attention: Any, hidden_states: Tensor, encoder_hidden_states: Any, *rest: Any, **options: Any) -> str:
    text, images = encoder_hidden_states
    keys = "+".join(str(tokens.shape[1:-1].numel()) for tokens in (text, *images))
    return layer_shape(attention.heads, attention.inner_dim // attention.heads, hidden_states.shape[1], keys)

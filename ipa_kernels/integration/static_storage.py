"""Keys, values and mask vectors of a whole UNet in memory that never moves: what compiled and captured steps read.

A graph cannot ask whether the prompt that it was given is the one that it knows. The hook that runs before each step does
(`hooks`): the storage is filled anew when something that it was computed from has changed, and is not used where it no longer
fits. What it is filled with are the values that eager steps use.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import UNetMotionModel
from torch import Tensor
from torch._dynamo import mark_static_address

from . import image_projection, running_step
from .attention_layers import AttentionLayers
from .guards import LayerGuard, ModuleGuard, TensorGuard, is_plain, layer_guard
from .processors import branches, traced
from .replaced import are_functions_own
from .state import Layer, ModelContext, StaticKV, layer_of


class StepInputs(NamedTuple):
    """What a step of a UNet was given that stays the same during a generation.

    text [B, N, C]; images: embeddings of each adapter, as `added_cond_kwargs["image_embeds"]`; masks: None or an entry for each
    adapter, as `cross_attention_kwargs["ip_adapter_masks"]`; sample: the latents, for their size, dtype and device.
    """

    text: Tensor
    images: list[Tensor]
    masks: list[Any] | None
    sample: Tensor

    @classmethod
    def of(cls, named: dict[str, Any]) -> "StepInputs | None":
        """From the arguments of a UNet's forward by name; None where there is a `refusal`."""
        return None if cls.refusal(named) is not None else cls(*_read(named))

    @staticmethod
    def refusal(named: dict[str, Any]) -> str | None:
        """Which of the arguments is not of the usual kind, in words of `prepare`; None where all are."""
        text, images, masks, sample = _read(named)
        scale = (named.get("cross_attention_kwargs") or {}).get("scale")
        if scale not in (None, 1):
            # the UNet scales the weights of its LoRAs with it, for as long as it runs
            return f"cross_attention_kwargs: expected no scale of LoRAs, got {scale}; use pipe.set_adapters(name, strength)"
        if not isinstance(text, Tensor) or not isinstance(sample, Tensor):
            return "pipe: expected a pipeline that gives its UNet latents and text as tensors, got another one"
        if not isinstance(images, list) or not all(isinstance(image, Tensor) for image in images):
            return "ip_adapter_image: expected one for each adapter, or ip_adapter_image_embeds, got none"
        if masks is not None and not (isinstance(masks, list) and len(masks) == len(images)):
            got = f"a list of {len(masks)}" if isinstance(masks, list) else type(masks).__name__
            return f"ip_adapter_masks: expected a list with an entry for each of the {len(images)} adapters, got {got}"
        for mask in masks or ():
            if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
                came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                return f"ip_adapter_masks: expected a tensor [1, images, height, width] or None for each adapter, got {came}"
        return None

    def tensors(self) -> list[Tensor]:
        """Those whose contents matter."""
        return [self.text, *self.images, *(mask for mask in self.masks or () if mask is not None)]


def _read(named: dict[str, Any]) -> tuple[Any, ...]:
    """What `StepInputs` are made of, of whatever kind."""
    images = (named.get("added_cond_kwargs") or {}).get("image_embeds")
    masks = (named.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    return named.get("encoder_hidden_states"), images, masks, named.get("sample")


class StaticStorage:
    """What one UNet has prepared. Whoever reads or changes it holds the lock of its `ModelState`.

    attention_layers: of the UNet by name, and the modules on the way to them. Raises ValueError where none of the
    layers was installed, or where something else takes part in a call of one of those: it may change what a layer is given, or
    where weights are.
    """

    def __init__(self, unet: Any, attention_layers: AttentionLayers, context: ModelContext, inputs: StepInputs) -> None:
        self._unet = unet
        self._context = context
        self._attention_layers = attention_layers
        self._layers = list(_layers(attention_layers))
        if not self._layers:
            raise ValueError(
                "pipe: expected IP-Adapter processors of diffusers' own, got others in every layer; explain(pipe) names them"
            )
        self._refuse_obstacle()
        if len({id(processor) for _, processor, _ in self._layers}) < len(self._layers):
            raise ValueError("pipe: expected a processor of its own for each attention, got one that is shared")
        self._signature = _signature(inputs)
        self._inputs: list[TensorGuard] = []
        self._guards: list[LayerGuard | ModuleGuard] = []
        self._used: Any = None
        self._sizes: dict[int, list[Tensor | None]] = {}
        self._static: list[StaticKV] = []
        self._fill(inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of a UNet, or a pickle, has none
        return type(None), ()

    def hand_out(self) -> None:
        """Let the layers have them."""
        for (_, _, layer), static in zip(self._layers, self._static, strict=True):
            layer.static = static

    @property
    def bytes(self) -> int:
        """The size of all of it."""
        tensors = [tensor for static in self._static for tensor in (*static.keys, *static.values)]
        tensors += [vector for vectors in self._sizes.values() for vector in vectors if vector is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def mismatch(self, inputs: StepInputs) -> str | None:
        """What does not fit, in words; None where all does."""
        for name, value in _signature(inputs).items():
            if value != self._signature[name]:
                return f"{name}: expected {self._signature[name]}, for which the static storage was made, got {value}"
        return None

    def are_current(self) -> bool:
        """Whether the layers are still those that it was made for."""
        return self._attention_layers.are_current() and all(
            attention.processor is processor and layer_of(processor) is layer for attention, processor, layer in self._layers
        )

    def refresh(self, inputs: StepInputs, anew: bool) -> str:
        """Have them hold what the step that begins was given. "" where it may read them, else why not.

        anew: compute everything again, whatever is known.
        """
        if torch.is_grad_enabled():
            return "gradients: nothing is kept of a step that is differentiated; use torch.no_grad()"
        mismatch = self.mismatch(inputs)
        if mismatch is not None:
            return mismatch
        if not self.are_current():
            return "attention layers or processors were exchanged since; call prepare again"
        obstacle = self._attention_layers.obstacle(self._unet)
        if obstacle is not None:
            return f"got {obstacle}: it may change what a layer is given; remove it"
        if anew or not self._is_known(inputs):
            self._fill(inputs)
        elif _queries(self._unet, inputs) - self._sizes.keys():
            self._fill_masks(inputs)
        return ""

    def refill(self, inputs: StepInputs) -> None:
        """Compute everything again, whatever is known. Raises ValueError as for new storage."""
        self._refuse_obstacle()
        self._fill(inputs)

    def begin(self, stream: Any) -> None:
        """What reads or changes them begins, on a CUDA stream or None: after what ended last, perhaps on another stream."""
        if self._used is not None and stream is not None:
            stream.wait_event(self._used)

    def end(self, stream: Any) -> None:
        """What began has ended; whoever waits for the last of these has waited for all."""
        if stream is not None:
            self._used = stream.record_event()

    def _refuse_obstacle(self) -> None:
        obstacle = self._attention_layers.obstacle(self._unet)
        if obstacle is not None:
            raise ValueError(
                "pipe: expected a UNet whose layers are called by torch's and diffusers' own code alone, without hooks (which "
                f"offloading adds), got {obstacle}; remove it, or do without prepare"
            )

    def drop(self) -> None:
        """Take it away from the layers, when no stream reads them any more: their memory is that of the one they were
        made on.
        """
        if self._used is not None:
            self._used.synchronize()
        for _, _, layer in self._layers:
            layer.static = None

    def _compute(self, inputs: StepInputs) -> Iterator[tuple[Tensor, Tensor]]:
        """(key, value) of each branch of each layer, [B, H, N, D]; what a step has computed for its inputs is not again."""
        text, images = _layer_inputs(self._unet, inputs)
        counts = traced.image_counts(_masks(inputs))
        keeper = running_step.keeper(inputs.sample.device.type)
        for attention, processor, layer in self._layers:
            keeps = None if keeper is None else branches.Keeps(keeper, layer_guard(layer.guards, attention, processor))
            yield from branches.all_keys_and_values(layer, processor, attention, text, images, counts, keeps)

    def _fill(self, inputs: StepInputs) -> None:
        # forgotten first: what raises in the middle leaves storage that nobody takes for filled
        self._inputs, self._guards = [], []
        is_known = all(map(is_plain, inputs.tensors()))
        guards, snapshots = self._current_guards(), [TensorGuard(tensor) for tensor in inputs.tensors()] if is_known else []
        with torch.no_grad():
            computed = [tuple(map(_rows, pair)) for pair in self._compute(inputs)]
            if not self._static:
                each = len(computed) // len(self._layers)
                for first in range(0, len(computed), each):
                    keys, values = zip(*computed[first : first + each], strict=True)
                    self._static.append(StaticKV(list(map(_fixed, keys)), list(map(_fixed, values)), {}))
            held = [
                tensor for static in self._static for pair in zip(static.keys, static.values, strict=True) for tensor in pair
            ]
            # one launch for many tensors
            torch._foreach_copy_(held, [tensor for pair in computed for tensor in pair])
            self._fill_masks(inputs)
        if is_known and all(guard.check() for guard in guards):
            self._inputs, self._guards = snapshots, guards

    def _fill_masks(self, inputs: StepInputs) -> None:
        """For every number of queries that a level of the UNet has, now or before; others are computed in the graph."""
        dtype, device = self._static[0].keys[0].dtype, inputs.sample.device
        for queries in sorted(_queries(self._unet, inputs) | self._sizes.keys()):
            vectors = traced.mask_vectors(_masks(inputs), queries, dtype, device)
            if queries not in self._sizes:
                self._sizes[queries] = [None if vector is None else _fixed(vector) for vector in vectors]
                for static in self._static:
                    static.vectors[queries] = self._sizes[queries]
            for vector, new in zip(self._sizes[queries], vectors, strict=True):
                if vector is not None and new is not None:
                    vector.copy_(new)

    def _is_known(self, inputs: StepInputs) -> bool:
        tensors = inputs.tensors()
        if len(tensors) != len(self._inputs):
            return False
        if not all(is_plain(tensor) and known.matches(tensor) for known, tensor in zip(self._inputs, tensors, strict=True)):
            return False
        # a guard that has been replaced is another object
        return are_functions_own() and self._current_guards() == self._guards

    def _current_guards(self) -> list[LayerGuard | ModuleGuard]:
        """Of everything that the values are computed with; one in doubt is never the same."""
        guards: list[LayerGuard | ModuleGuard] = [
            self._context.guard(module).verified() for module in image_projection.of(self._unet)
        ]
        for attention, processor, layer in self._layers:
            guard = layer_guard(layer.guards, attention, processor)
            guards += [guard] if guard.is_pure else [ModuleGuard(None)]
        return guards


def _layers(attention_layers: AttentionLayers) -> Iterator[tuple[Any, Any, Layer]]:
    """(attention, processor, layer) of everything that was installed."""
    for attention in attention_layers.attentions.values():
        layer = layer_of(attention.processor)
        if layer is not None:
            yield attention, attention.processor, layer


def _layer_inputs(unet: Any, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
    """(text, image tokens of each adapter) as a UNet passes them to its layers: what its forward does before them."""
    if not isinstance(unet, UNetMotionModel):
        given = {"image_embeds": inputs.images}
        return unet.process_encoder_hidden_states(encoder_hidden_states=inputs.text, added_cond_kwargs=given)  # type: ignore[no-any-return]
    frames = inputs.sample.shape[2]
    return inputs.text, [tokens.repeat_interleave(frames, dim=0) for tokens in unet.encoder_hid_proj(inputs.images)]


def _masks(inputs: StepInputs) -> list[Any]:
    return branches.of_adapters(inputs.masks, len(inputs.images))


def _queries(unet: Any, inputs: StepInputs) -> set[int]:
    """The queries of each level: a level has half the rows and columns of the one above, rounded up."""
    height, width = inputs.sample.shape[-2:]
    return {-(-height // 2**level) * -(-width // 2**level) for level in range(len(unet.config.block_out_channels))}


def _signature(inputs: StepInputs) -> dict[str, Any]:
    """What all sizes and dtypes follow from, by the names of what a user passes to a pipeline."""
    device = inputs.sample.device.type
    return {
        "prompt (embeddings)": list(inputs.text.shape),
        "ip_adapter_image (embeddings of each adapter)": [list(image.shape) for image in inputs.images],
        "ip_adapter_masks (batch and images of each adapter)": [m if m is None else list(m.shape[:2]) for m in _masks(inputs)],
        "batch and frames": [inputs.sample.shape[0], *inputs.sample.shape[2:-2]],
        "dtype": inputs.sample.dtype,
        "device": inputs.sample.device,
        "autocast": torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    }


def _rows(projected: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H·D]."""
    return projected.transpose(1, 2).flatten(2)


def _fixed(tensor: Tensor) -> Tensor:
    """A copy that graphs may know by its address; one made in inference mode could not be written to outside."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    mark_static_address(copy, guard=False)
    return copy

"""Keys, values and mask vectors of a whole UNet in memory that never moves: what compiled and captured steps read.

A graph cannot ask whether the prompt that it was given is the one that it knows. The hook that runs before each step does
(`hooks`): the buffers are filled anew when something that they were computed from has changed, and are not used where it no
longer fits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import UNetMotionModel
from torch import Tensor, nn
from torch._dynamo import mark_static_address

from . import image_projection
from .attention_layers import AttentionLayers
from .guards import Snapshot, State, is_plain
from .processors import branches
from .state import Held, Layer, layer_of


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


class Buffers:
    """The buffers of one UNet. Whoever reads or changes them holds the turn of its `ModelState`.

    attention_layers: of the UNet by name, and the modules on the way to them. Raises ValueError where none of the
    layers was installed, or where something else takes part in a call of one of those: it may change what a layer is given, or
    where weights are.
    """

    def __init__(self, unet: Any, attention_layers: AttentionLayers, inputs: StepInputs) -> None:
        self._unet = unet
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
        self._known: list[Snapshot] = []
        self._state: State | None = None
        self._used: Any = None
        self._sizes: dict[int, list[Tensor | None]] = {}
        self._held: list[Held] = []
        self._fill(inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of a UNet, or a pickle, has none
        return type(None), ()

    def hand_out(self) -> None:
        """Let the layers have them."""
        for (_, _, layer), held in zip(self._layers, self._held, strict=True):
            layer.held = held

    @property
    def bytes(self) -> int:
        """The size of all buffers."""
        tensors = [tensor for held in self._held for tensor in (*held.keys, *held.values)]
        tensors += [vector for vectors in self._sizes.values() for vector in vectors if vector is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def mismatch(self, inputs: StepInputs) -> str | None:
        """What does not fit, in words; None where all does."""
        for name, value in _signature(inputs).items():
            if value != self._signature[name]:
                return f"{name}: expected {self._signature[name]}, for which the buffers were made, got {value}"
        return None

    def are_current(self) -> bool:
        """Whether the layers are still those that the buffers were made for."""
        return self._attention_layers.are_current() and all(
            attention.processor is processor and layer_of(processor) is layer for attention, processor, layer in self._layers
        )

    def fit(self, inputs: StepInputs, anew: bool) -> str:
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
        """Compute everything again, whatever is known. Raises ValueError as for new buffers."""
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
        """Take the buffers away from the layers, when no stream reads them any more: their memory is that of the one they were
        made on.
        """
        if self._used is not None:
            self._used.synchronize()
        for _, _, layer in self._layers:
            layer.held = None

    def _compute(self, inputs: StepInputs) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each layer the projected (key, value) of each branch."""
        with torch.no_grad():
            text, images = _layer_inputs(self._unet, inputs)
            for attention, processor, _ in self._layers:
                found = branches.projections(processor, attention, text, images, branches.image_counts(_masks(inputs)))
                yield [(_rows(to_k(tokens)), _rows(to_v(tokens))) for tokens, to_k, to_v in found]

    def _fill(self, inputs: StepInputs) -> None:
        # forgotten first: what raises in the middle leaves buffers that nobody takes for filled
        self._known, self._state = [], None
        state = self._state_of_all()
        snapshots = [Snapshot(tensor) for tensor in inputs.tensors()] if all(map(is_plain, inputs.tensors())) else []
        with torch.no_grad():
            computed = list(self._compute(inputs))
            if not self._held:
                self._held = [Held([_fixed(k) for k, _ in pairs], [_fixed(v) for _, v in pairs], {}) for pairs in computed]
            for held, pairs in zip(self._held, computed, strict=True):
                for key, value, (new_key, new_value) in zip(held.keys, held.values, pairs, strict=True):
                    key.copy_(new_key)
                    value.copy_(new_value)
            self._fill_masks(inputs)
        self._known, self._state = snapshots, state

    def _fill_masks(self, inputs: StepInputs) -> None:
        """For every number of queries that a level of the UNet has, now or before; others are computed in the graph."""
        dtype, device = self._held[0].keys[0].dtype, inputs.sample.device
        for queries in sorted(_queries(self._unet, inputs) | self._sizes.keys()):
            vectors = branches.mask_vectors(_masks(inputs), queries, dtype, device)
            if queries not in self._sizes:
                self._sizes[queries] = [None if vector is None else _fixed(vector) for vector in vectors]
                for held in self._held:
                    held.vectors[queries] = self._sizes[queries]
            for vector, new in zip(self._sizes[queries], vectors, strict=True):
                if vector is not None and new is not None:
                    vector.copy_(new)

    def _is_known(self, inputs: StepInputs) -> bool:
        tensors = inputs.tensors()
        if self._state is None or len(tensors) != len(self._known):
            return False
        if not all(is_plain(tensor) and known.matches(tensor) for known, tensor in zip(self._known, tensors, strict=True)):
            return False
        state = self._state_of_all()
        return state is not None and state.marks == self._state.marks

    def _state_of_all(self) -> State | None:
        """Of everything that the values are computed with."""
        modules: list[nn.Module] = list(image_projection.of(self._unet))
        for attention, processor, _ in self._layers:
            modules += (attention.to_k, attention.to_v, *processor.to_k_ip, *processor.to_v_ip)
        return image_projection.state_with_ours(modules)


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
    """What the sizes and dtypes of all buffers follow from, by the names of what a user passes to a pipeline."""
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
    """[B, N, H·D] of [B, images, N, H·D] too."""
    return projected.reshape(projected.shape[0], -1, projected.shape[-1])


def _fixed(tensor: Tensor) -> Tensor:
    """A copy that graphs may know by its address; one made in inference mode could not be written to outside."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    mark_static_address(copy, guard=False)
    return copy

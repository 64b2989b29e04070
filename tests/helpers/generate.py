"""One generation of any pipeline: inputs from a seed, what comes out as a tensor or as the error it raised."""

import inspect
from typing import Any

import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.testing import tiny_pipelines

from .adapters import Draw, embeddings, seeded, set_face_embeddings
from .controls import Control, callback
from .own import ModularXL, OwnLoop
from .pipelines import KOLORS_TEXT_DIM

FRAMES = 2

Outcome = Tensor | tuple[type, str]


def target(pipe: Any) -> Any:
    """What a user passes to `ipa_kernels.enable`."""
    return pipe.unet if isinstance(pipe, OwnLoop) else getattr(pipe, "pipe", pipe)


def takes(pipe: Any, control: Control) -> bool:
    """Whether a control exists for a pipeline: some take no callback, some guide without a second half of the batch."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if control.callback and "callback_on_step_end" not in parameters:
        return False
    if control.callback == "guidance cut-off":
        return hasattr(pipe, "_callback_tensor_inputs") and "negative_prompt_embeds" in parameters
    return control.images_per_prompt == 1 or not _is_motion(pipe)  # AnimateDiff sets its number of videos per prompt to 1


def refuses(pipe: Any, control: Control, adapters: int) -> bool:
    """Whether stock raises: for any pipeline, or for one that its own inputs or callbacks do not fit."""
    kind = type(pipe).__name__
    if control.callback == "guidance cut-off":
        # these keep two halves of something that the callback does not know: frames, perturbed rows, the control picture
        return _is_motion(pipe) or "PAG" in kind or kind == "StableDiffusionControlNetPipeline"
    if control.images_per_prompt > 1 and kind == "KolorsPipeline":
        return True  # does not repeat `prompt_embeds`
    return control.raises(adapters)


def generate(pipe: Any, *choices: Any, **options: Any) -> Tensor:
    """The latents, from inputs that depend on the seed and the control alone. Does not set the scales."""
    return pipe(**arguments(pipe, *choices, **options))[0]


def arguments(pipe: Any, adapters: tuple[str, ...] = (), control: Control | None = None, *, size: int = 8, steps: int = 2,
              seed: int = 1, **options: Any) -> dict[str, Any]:  # fmt: skip
    """What `generate` calls a pipeline with."""
    control = control or Control()
    dtype = pipe.unet.dtype
    draw = seeded(seed, dtype)
    accepted = inspect.signature(type(pipe).__call__).parameters
    guided = control.guidance > 1 and "negative_prompt_embeds" in accepted
    call = {name: value for name, value in _inputs(pipe, draw, control, size).items() if name in accepted}
    if not guided:
        call = {name: value for name, value in call.items() if not name.startswith("negative_")}
    if adapters:
        call["ip_adapter_image_embeds"] = embeddings(adapters, draw, 1 + guided, control.images, negative=control.negative)
        set_face_embeddings(pipe, draw, _projected_rows(pipe, control, guided), control.images)
    if control.masks is not None:
        call["cross_attention_kwargs"] = {"ip_adapter_masks": control.masks(len(adapters), _rows(pipe, control, guided))}
    if control.callback:
        call["callback_on_step_end"] = change = callback(control.callback, pipe)
        if hasattr(change, "tensor_inputs"):
            call["callback_on_step_end_tensor_inputs"] = change.tensor_inputs
    call |= {"num_inference_steps": steps, "guidance_scale": control.guidance, "output_type": "latent"} | options
    return {name: value for name, value in call.items() if name in accepted}


def outcome(pipe: Any, *arguments: Any, **options: Any) -> Outcome:
    """What `generate` returns, or the type and the text of what it raises."""
    try:
        return generate(pipe, *arguments, **options)
    except Exception as error:
        return type(error), str(error)


def same(first: Outcome, second: Outcome) -> bool:
    """Whether two outcomes are equal: bit for bit (NaN being NaN), or in type and text."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.dtype == second.dtype
            and torch.equal(first.isnan(), second.isnan())
            and torch.equal(first.nan_to_num(), second.nan_to_num())
        )
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def classes(unet: Any) -> dict[str, tuple[type, int]]:
    """Which class each attention processor has, and which object it is, where it is an adapter's: PAG makes others anew."""
    processors = unet.attn_processors.items()
    return {name: (type(processor), id(processor) * hasattr(processor, "to_k_ip")) for name, processor in processors}


def traces(unet: Any) -> list[object]:
    """Everything that `enable` leaves on a UNet; empty after `disable`."""
    state = [name for module in unet.modules() for name in vars(module) if "ipa" in name]
    ours = [kind for kind in map(type, unet.modules()) if kind.__module__.startswith(ipa_kernels.__name__)]
    return [*state, *unet._forward_pre_hooks.values(), *ours]


def _inputs(pipe: Any, draw: Draw, control: Control, size: int) -> dict[str, Any]:
    """Every input that some pipeline takes, by the name of its parameter."""
    kolors = "Kolors" in type(pipe).__name__
    prompts, width = control.prompts, KOLORS_TEXT_DIM if kolors else tiny_pipelines.CROSS_ATTENTION_DIM
    shape = (prompts * control.images_per_prompt, 4, *((FRAMES,) if _is_motion(pipe) else ()), size, size)
    pixels = draw(prompts if hasattr(pipe, "adapter") else 1, 3, 2 * size, 2 * size).sigmoid()
    inputs = {
        "prompt_embeds": draw(prompts, 77, width),
        "negative_prompt_embeds": draw(prompts, 77, width),
        "pooled_prompt_embeds": draw(prompts, tiny_pipelines.IMAGE_EMBED_DIM),
        "negative_pooled_prompt_embeds": draw(prompts, tiny_pipelines.IMAGE_EMBED_DIM),
        "latents": draw(*shape),
        "height": 2 * size,
        "width": 2 * size,
        "num_images_per_prompt": control.images_per_prompt,
        "num_videos_per_prompt": control.images_per_prompt,
        "num_frames": FRAMES,
        "image": pixels,
        "mask_image": (draw(1, 1, 2 * size, 2 * size) > 0).to(pixels.dtype),
        "strength": 1.0,
        "generator": torch.Generator().manual_seed(7),
        "pag_scale": 2.0,
    }
    if "Img2Img" in type(pipe).__name__:
        inputs["image"] = draw(*shape)
        del inputs["latents"]
    if isinstance(getattr(pipe, "controlnet", None), torch.nn.Module) and hasattr(pipe.controlnet, "nets"):
        inputs["image"] = [pixels] * len(pipe.controlnet.nets)
    return inputs


def _projected_rows(pipe: Any, control: Control, guided: bool) -> int:
    """Rows of the image embeddings when they are projected: before they are repeated for frames, after they are for prompts."""
    if isinstance(pipe, ModularXL):
        return control.prompts * control.images_per_prompt
    perturbed = "PAG" in type(pipe).__name__
    return (1 + guided + perturbed) * control.prompts * control.images_per_prompt


def _rows(pipe: Any, control: Control, guided: bool) -> int:
    """Rows of a UNet's batch."""
    return _projected_rows(pipe, control, guided) * (FRAMES if _is_motion(pipe) else 1)


def _is_motion(pipe: Any) -> bool:
    return "AnimateDiff" in type(pipe).__name__

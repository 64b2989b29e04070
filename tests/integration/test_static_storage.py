"""What is copied and what is projected for static storage, where conditions alternate as with guidance in two calls."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

import ipa_kernels
from ipa_kernels.integration import hooks
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.functions import SeenFunctions
from ..helpers.generate import arguments
from ..helpers.pipelines import build

NAMES = ("base",)


def test_alternating_conditions_are_copied_at_once_and_projected_once() -> None:
    pipe = build("sd", NAMES)
    ipa_kernels.prepare(pipe, **arguments(pipe, NAMES))
    unet = pipe.unet
    layers = len(ipa_kernels.explain(pipe).layers)
    projections = {
        id(module.weight): name
        for name, module in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v", "to_k_ip.0", "to_v_ip.0"))
    }
    assert len(projections) == 4 * layers
    draw = seeded(3)
    texts = [draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM) for _ in range(2)]
    images = [draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)]
    seen: Counter[str] = Counter()

    def see(function: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        if function is F.linear and id(given[1]) in projections:
            seen[projections[id(given[1])].rpartition(".to_")[2]] += 1
        if function is torch._foreach_copy_:
            seen["copies"] += 1

    state = hooks.of(unet)
    assert state is not None
    with torch.no_grad(), SeenFunctions(see):
        for time in (900, 600, 300):
            for text in texts:
                sample = draw(2, 4, 8, 8)
                unet(sample, time, text, added_cond_kwargs={"image_embeds": images})
                assert state.unread == "", "was not refilled, so that this proves nothing"
                key = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
                static = key.processor._ipa_layer.static
                assert torch.equal(static.keys[0], key.to_k(text))
    # the control above projects too
    assert seen["copies"] == 6, "one for all layers, at each change of the condition"
    assert {name: count - 6 * (name == "k") for name, count in seen.items() if name != "copies"} == {
        "k": 2 * layers, "v": 2 * layers, "k_ip.0": layers, "v_ip.0": layers,
    }  # fmt: skip

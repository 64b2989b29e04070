"""The real shapes by name: one table for tests, benchmarks and ahead-of-time compilation. torch only.

Every case is one cross-attention layer with classifier-free guidance (batch 2). The shapes are those of diffusers'
UNets, in one case of its HunyuanDiT, at the resolution in the name; the largest layers are the ones that cost time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments of `decoupled_attention`, by name."""

    query: Tensor
    key: Tensor
    value: Tensor
    image_keys: tuple[Tensor, ...]
    image_values: tuple[Tensor, ...]
    image_scales: Tensor
    image_masks: tuple[Tensor | None, ...]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in another dtype; the scales stay in float32, their own dtype."""
        return Inputs(
            self.query.to(dtype),
            self.key.to(dtype),
            self.value.to(dtype),
            tuple(k.to(dtype) for k in self.image_keys),
            tuple(v.to(dtype) for v in self.image_values),
            self.image_scales,
            tuple(m if m is None else m.to(dtype) for m in self.image_masks),
        )

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """(positional, keyword) arguments for `decoupled_attention` and its oracle."""
        positional = (self.query, self.key, self.value, self.image_keys, self.image_values)
        return positional, {"image_scales": self.image_scales, "image_masks": self.image_masks}

    @property
    def bytes(self) -> int:
        """Of every tensor once. With the size of the query once more, for the output: the least that an attention moves."""
        tensors = (self.query, self.key, self.value, *self.image_keys, *self.image_values, self.image_scales, *self.image_masks)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Case:
    """One cross-attention layer: B = batch, H = heads, M = queries, D = head_dim, and the number of keys per branch.

    by_row: whether each row of the batch has scales and masks of its own.
    """

    name: str
    heads: int
    queries: int
    head_dim: int
    text: int = 77
    images: tuple[int, ...] = (4,)
    masked: bool = False
    batch: int = 2
    by_row: bool = False

    @property
    def flops(self) -> int:
        """Useful floating-point operations: a multiply and an add for Q·Kᵗ and for P·V, per query, key and channel."""
        return 4 * self.batch * self.heads * self.queries * self.head_dim * (self.text + sum(self.images))

    def small(self) -> "Case":
        """The same structure on two heads and 99 queries: what fits an interpreter."""
        return replace(self, name=f"{self.name}_small", heads=2, queries=min(self.queries, 99))

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Random inputs as a processor makes them: [B, N, H, D] in memory, seen as [B, H, N, D]; masks overshoot [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.batch if self.by_row else 1

        def heads(length: int) -> Tensor:
            values = torch.randn(self.batch, length, self.heads, self.head_dim, generator=generator)
            return values.to(device=device, dtype=dtype).transpose(1, 2)

        def mask() -> Tensor:
            return torch.empty(rows, self.queries).uniform_(-0.2, 1.2, generator=generator).to(device=device, dtype=dtype)

        # exact in bfloat16 and float16, so that an error is the attention's and not the rounding of a scale
        scales = torch.empty(rows, len(self.images)).uniform_(0.3, 1.1, generator=generator).bfloat16().float()
        return Inputs(
            heads(self.queries),
            heads(self.text),
            heads(self.text),
            tuple(heads(n) for n in self.images),
            tuple(heads(n) for n in self.images),
            scales.expand(self.batch, -1).to(device),
            tuple(mask() if self.masked else None for _ in self.images),
        )


def _table(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = _table(
    # Stable Diffusion 1.5 at 512×512: 8 heads everywhere, so the head dim grows as the resolution shrinks
    Case("sd15_512_head40", 8, 4096, 40),
    Case("sd15_512_head80", 8, 1024, 80),
    Case("sd15_512_head160", 8, 256, 160),
    Case("sd15_512_mid", 8, 64, 160),
    Case("sd15_512_head40_plus", 8, 4096, 40, images=(16,)),
    Case("sd15_512_head40_full", 8, 4096, 40, images=(257,)),
    Case("sd15_512_head40_two_masked", 8, 4096, 40, images=(4, 16), masked=True),
    # SDXL at 1024×1024: 10 layers at 64×64, 60 at 32×32
    Case("sdxl_1024_64x64", 10, 4096, 64),
    Case("sdxl_1024_32x32", 20, 1024, 64),
    Case("sdxl_1024_64x64_text_only", 10, 4096, 64, images=()),
    Case("sdxl_1024_64x64_plus", 10, 4096, 64, images=(16,)),
    Case("sdxl_1024_64x64_masked", 10, 4096, 64, masked=True),
    Case("sdxl_1024_64x64_two", 10, 4096, 64, images=(4, 16)),
    Case("sdxl_1024_64x64_three", 10, 4096, 64, images=(16, 16, 16)),
    Case("sdxl_1024_64x64_three_masked", 10, 4096, 64, images=(16, 16, 16), masked=True),
    Case("sdxl_1024_32x32_three_masked", 20, 1024, 64, images=(16, 16, 16), masked=True),
    Case("sdxl_1024_64x64_full", 10, 4096, 64, images=(257,)),
    Case("sdxl_1024_64x64_long_prompt", 10, 4096, 64, text=154),
    # the 1216×832 bucket: 152×104 latents, halved and halved again; no multiple of any tile
    Case("sdxl_1216x832_76x52", 10, 3952, 64),
    Case("sdxl_1216x832_38x26_masked", 20, 988, 64, images=(16,), masked=True),
    # Kolors: the SDXL UNet behind 256 tokens of ChatGLM
    Case("kolors_1024_64x64", 10, 4096, 64, text=256, images=(16,)),
    # HunyuanDiT: 77 CLIP and 256 T5 tokens, a head dim that is no multiple of 16
    Case("hunyuandit_1024", 16, 4096, 88, text=333, images=(8,)),
)

BY_ROW = _table(Case("sdxl_1024_64x64_two_by_row", 10, 4096, 64, images=(4, 16), masked=True, by_row=True))
"""What the op takes and no layer of diffusers, which has one scale for all rows."""

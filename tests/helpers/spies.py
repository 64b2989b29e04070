"""What is computed, counted below Python's functions: without a hook or a replaced function, with either of which a layer takes
another path."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul}


class LinearCalls(TorchDispatchMode):
    """In a with-block, in this thread: counts the matrix products with the weights of a model's linear layers.

    calls: by the name of the layer. resizes: how many masks were resized.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.resizes = 0
        linears = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self._names = {weight.data_ptr(): name for name, weight in linears}
        assert len(self._names) == len(linears), "two layers share a weight, so that their calls cannot be told apart"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            tensors = (one for one in args if isinstance(one, Tensor) and not one.is_meta)
            # as `F.linear` transposes a weight, it begins where it began
            self.calls.update(name for tensor in tensors if (name := self._names.get(tensor.data_ptr())))
        # the UNet resizes too, in another mode
        self.resizes += packet is aten.upsample_bicubic2d
        return func(*args, **(kwargs or {}))

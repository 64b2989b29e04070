"""What is computed, seen below Python's functions: without a hook or a replaced function, with either of which a layer takes
another path."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul}


def pass_by(name: str) -> None:
    """Do nothing."""


class AtLayers(TorchDispatchMode):
    """In a with-block, in this thread: calls before(name) and after(name) around each product with a linear layer's weight.

    names: of the layers; by default, all of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str] | None = None,
        after: Callable[[str], object] = pass_by,
        before: Callable[[str], object] = pass_by,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after
        linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        seen = linears if names is None else names
        self._names = {linears[name].data_ptr(): name for name in seen}
        assert len(self._names) == len(seen), "two layers share a weight, so that their calls cannot be told apart"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = self._layers(args) if func.overloadpacket in _PRODUCTS else []
        for name in names:
            self._before(name)
        result = func(*args, **(kwargs or {}))
        for name in names:
            self._after(name)
        return result

    def _layers(self, arguments: Any) -> list[str]:
        # `F.linear` transposes a weight, which begins where it began
        tensors = (one for one in arguments if isinstance(one, Tensor) and not one.is_meta)
        return [name for tensor in tensors if (name := self._names.get(tensor.data_ptr()))]


class LinearCalls(AtLayers):
    """In a with-block, in this thread: counts the products with the weights of a model's linear layers.

    calls: by the name of the layer. resizes: how many masks were resized.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self.resizes = 0
        super().__init__(model, after=lambda name: self.calls.update([name]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # the UNet resizes too, in another mode
        self.resizes += func.overloadpacket is aten.upsample_bicubic2d
        return super().__torch_dispatch__(func, types, args, kwargs)

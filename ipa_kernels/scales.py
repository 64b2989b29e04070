"""`processor.scale` where a compiled or captured graph can read it: a list that writes each change into a tensor.

Stock reads the list while a graph is traced, so that each value is compiled in (diffusers `attention_processor.py`,
`IPAdapterAttnProcessor2_0.__call__`). A graph of ours reads the tensor: a new scale is new data.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import mark_static_address

IMAGES = 16
"""The most images of one adapter that have a column without a graph being compiled anew."""

_CHANGES = (
    "__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove", "reverse",
    "sort",
)  # fmt: skip


class Scales(list[Any]):
    """A list, of numbers or of lists of numbers, that tells when it is changed; copies and pickles are plain lists."""

    def __init__(self, values: Any, changed: Callable[[], None]) -> None:
        super().__init__(Scales(value, changed) if isinstance(value, list) else value for value in values)
        self._changed = changed

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (plain(self),)

    def _settle(self) -> None:
        for i, value in enumerate(self):
            if isinstance(value, list) and not isinstance(value, Scales):
                list.__setitem__(self, i, Scales(value, self._changed))
        self._changed()


def _telling(name: str) -> Any:
    change = getattr(list, name)

    def method(self: Scales, *arguments: Any, **options: Any) -> Any:
        result = change(self, *arguments, **options)
        self._settle()
        return result

    method.__name__ = name
    method.__doc__ = change.__doc__
    return method


for _name in _CHANGES:
    setattr(Scales, _name, _telling(_name))


def plain(scales: list[Any]) -> list[Any]:
    """The same numbers in lists of Python's own class."""
    return [plain(value) if isinstance(value, list) else value for value in scales]


class Table:
    """The scales of one layer as data: `tensor` [adapters, 1 + images], float32, rewritten in place.

    Column 0 is for an adapter without masks, column 1 + i for image i of one with masks. NaN where diffusers would raise: a
    list without masks, more images than numbers. is_data: whether all scales are numbers or lists of numbers; others are only
    for diffusers' own code.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = _blank((0, 0), device)
        self.is_data = False

    def write(self, scales: Any) -> None:
        """Take over what a list holds now."""
        if not isinstance(scales, list):
            self.is_data = False
            return
        images = max([IMAGES, *(len(scale) for scale in scales if isinstance(scale, list))])
        try:
            rows = [_row(scale, images) for scale in scales]
        except (TypeError, ValueError):
            self.is_data = False
            return
        self.is_data = True
        shape = len(rows), 1 + images
        if self.tensor.shape != shape:
            self.tensor = _blank(shape, self.tensor.device)
        for row, values in zip(self.tensor, rows, strict=True):
            if len(set(values)) == 1:
                # without a copy from the host, which would wait for the GPU
                row.fill_(values[0])
            else:
                row.copy_(torch.tensor(values, device="cpu"))

    def to(self, device: torch.device) -> None:
        """Move the tensor."""
        if self.tensor.device != device:
            self.tensor = _blank(self.tensor.shape, device).copy_(self.tensor)

    def branches(self, images: list[int | None]) -> Tensor:
        """[1, n] for the branches of each adapter: one for None, else one for each of so many images."""
        rows = [
            self.tensor[i : i + 1, :1] if count is None else self.tensor[i : i + 1, 1 : 1 + count]
            for i, count in enumerate(images)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _blank(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # a tensor made in inference mode could not be written to outside
    with torch.inference_mode(False):
        table = torch.zeros(shape, dtype=torch.float32, device=device)
    mark_static_address(table, guard=False)
    return table


def _row(scale: Any, images: int) -> list[float]:
    if not isinstance(scale, list):
        return [_number(scale)] * (1 + images)
    numbers = [_number(s) for s in scale]
    shared = float("nan") if any(numbers) else 0.0
    return [shared, *numbers, *[float("nan")] * (images - len(numbers))]


def _number(scale: Any) -> float:
    if type(scale) not in (int, float):
        raise TypeError
    return float(scale)


def tell(processor: Any, table: Table) -> None:
    """Let `processor.scale` write its changes into a table, from what it holds now on."""
    known: Any = weakref.ref(processor)
    values = vars(processor)["scale"]

    def changed() -> None:
        owner = known()
        # a list that was replaced since is nobody's
        if owner is not None and vars(owner).get("scale") is scales:
            table.write(scales)

    scales = Scales(values, changed) if isinstance(values, list) else values
    vars(processor)["scale"] = scales
    table.write(scales)


def untold(processor: Any, found: Any) -> Any:
    """What `processor.scale` is once nobody listens: the list that was there before `tell`, with the numbers of today."""
    values = vars(processor)["scale"]
    if not isinstance(values, Scales):
        return values
    original = found if type(found) is list else []
    original[:] = plain(values)
    return original

"""Is everything that a value was computed from unchanged? What tells a tensor, or modules, from what they were."""

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn


class State(NamedTuple):
    """What a result depends on besides its source: comparable marks, and the objects whose identities are among them."""

    marks: tuple[Hashable, ...] = ()
    held: tuple[object, ...] = ()


class Snapshot:
    """A tensor as it was; it is not kept alive."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self.tensor = weakref.ref(tensor, forget)
        self.version = tensor._version
        self.address = tensor.data_ptr()

    def matches(self, tensor: Any) -> bool:
        """Whether this is the same tensor, and nobody has written to it."""
        same = self.tensor() is tensor
        return same and self.version == tensor._version and self.address == tensor.data_ptr()


def doubt_of_tensor(tensor: Tensor) -> str:
    """Why identity and version of a tensor that is not plain do not tell what is in it."""
    if tensor.is_inference():
        return "torch.inference_mode: a write to a tensor that was made in it leaves no trace; use torch.no_grad() instead"
    if tensor.requires_grad:
        return "requires_grad: of a prompt, an image or a mask; use .detach() where none is needed"
    return f"{type(tensor).__name__} on {tensor.device}: a write to such an input may leave no trace"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's identity and version tell what is in it."""
    return type(tensor) is Tensor and not (tensor.is_meta or tensor.is_inference() or tensor.requires_grad)


def state_of(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> State | None:
    """The state of modules whose output depends on nothing but their input, parameters and buffers; None where in doubt.

    known: from a module to the state of its own attributes, or None for a kind of module that is not known.
    """
    found = _examined(modules, known)
    return None if isinstance(found, str) else found


def doubt_of(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> str:
    """Why `state_of` is None."""
    found = _examined(modules, known)
    return found if isinstance(found, str) else ""


def _examined(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> State | str:
    marks: list[Hashable] = []
    held: list[object] = []
    for root in modules:
        if not isinstance(root, nn.Module):
            return f"{type(root).__name__}: no module, so that it may depend on anything"
        for module in (root,) if type(root) is nn.Linear else root.modules():
            own, kind = known(module), type(module)
            if own is None:
                name = f"{kind.__module__}.{kind.__name__}"
                return f"{name}: may depend on more than its input and weights; torch.nn.Linear does not"
            if is_hooked(module):
                return f"{kind.__name__}: has a hook or a forward of its own (offloading adds such); remove it"
            # a tensor that is a plain attribute is nobody's parameter, and its exchange leaves no trace
            if kind is nn.Linear and "weight" not in module._parameters:
                return "Linear: its weight is no parameter; make it one"
            marks += (id(module), *own.marks)
            held += (module, *own.held)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or tensor.is_meta:
                    made = ", made in torch.inference_mode" if tensor.is_inference() else ""
                    return f"{type(tensor).__name__} on {tensor.device}{made}: a write to such a weight may leave no trace"
                marks += (id(tensor), tensor._version, tensor.data_ptr())
                held.append(tensor)
    return State(tuple(marks), tuple(held))


def is_hooked(module: nn.Module) -> bool:
    """Whether something else takes part in a call of a module: hooks of torch, accelerate or diffusers."""
    own = vars(module)
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "forward" in own or "_hf_hook" in own or "_diffusers_hook" in own
    )

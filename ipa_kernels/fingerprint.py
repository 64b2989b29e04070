"""What a recorded step of a model was recorded from: where its weights are, and the settings that Python code has read."""

from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OURS = ("_ipa_layer", "_ipa_kernels")


class Fingerprint:
    """A model as it is now: its modules, their classes, tensors, hooks and attributes. It keeps the tensors alive.

    Not seen: what lies within attributes that are neither plain values, containers of such, tensors nor modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(module._modules)) for module in model.modules()]
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None, int]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._values: list[tuple[dict[str, Any], str, Any]] = []
        self._objects: list[tuple[dict[str, Any], str, Any]] = []
        for module, _, _ in self._modules:
            own = vars(module)
            for tensors in (module._parameters, module._buffers):
                self._sizes.append((tensors, len(tensors)))
                for name, tensor in tensors.items():
                    self._tensors.append((tensors, name, tensor, 0 if tensor is None else tensor.data_ptr()))
            self._attributes(own)
            processor = own.get("processor")
            if processor is not None and hasattr(processor, "__dict__"):
                self._attributes(vars(processor))

    def _attributes(self, own: dict[str, Any]) -> None:
        self._sizes.append((own, len(own)))
        for name, value in own.items():
            # the scales of a layer that was taken over are data of a graph
            if name in (*_OURS, "_parameters", "_buffers", "_modules") or (name == "scale" and "_ipa_layer" in own):
                continue
            if type(value) in _PLAIN:
                self._values.append((own, name, value))
            elif isinstance(value, dict | list | tuple | set):
                self._values.append((own, name, _copy(value)))
                self._objects.append((own, name, value))
            elif isinstance(value, Tensor):
                self._tensors.append((own, name, value, value.data_ptr()))
            else:
                self._objects.append((own, name, value))

    def addresses_are_still(self) -> bool:
        """Whether the modules and the tensors are the same, and where they were."""
        if any(module._modules != known for module, _, known in self._modules):
            return False
        return all(
            tensors.get(name) is tensor and (tensor is None or tensor.data_ptr() == address)
            for tensors, name, tensor, address in self._tensors
        )

    def is_still(self) -> bool:
        """Whether classes, hooks and attributes are the same."""
        if any(type(module) is not kind for module, kind, _ in self._modules):
            return False
        if any(len(own) != size for own, size in self._sizes):
            return False
        if any(own.get(name) is not value for own, name, value in self._objects):
            return False
        return all(_is_same(own.get(name), value) for own, name, value in self._values)


def _copy(value: Any) -> Any:
    """A container of plain values and tensors as it is now; of other things, which they are."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, set):
        return {_copy(item) for item in value}
    return value if type(value) in _PLAIN else id(value)


def _is_same(value: Any, known: Any) -> bool:
    if type(known) in _PLAIN:
        return type(value) is type(known) and bool(value == known)
    return bool(_copy(value) == known)

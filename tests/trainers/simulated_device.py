"""An accelerator that is not there: tensors that say they lie on it, computed on the CPU, and a list of every wait.

What a CPU cannot show is the line between host and device. Here it is drawn by PyTorch's own means: a device type of
its own (PrivateUse1), so that ``tensor.device``, autograd and `.to` behave as for any accelerator, and what would stop
the host until a GPU is done, or copy what the host computed in a way that may stop it, is noted with the line of this
project that did so. To be used in a process of its own: a device type cannot be unregistered.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
ROOT = str(Path(__file__).parents[2])
# Their results' shapes or values are known only once the device is done: PyTorch's CUDA code reads them back.
_READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2", "unique_dim"),
    *("unique_consecutive", "histc", "multinomial", "linalg_svd", "_linalg_svd", "_linalg_eigh", "linalg_eig"),
    *("unique_dim_consecutive", "allclose", "_assert_scalar"),
}
_MAY_TAKE_HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class _Backend:
    """What PyTorch asks of the module of a device type."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def simulated_device() -> torch.device:
    """Register the device type; once in a process."""
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Backend())
    return torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor that lies on the device; ``held`` is the CPU's tensor behind it."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: OnDevice) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    inside = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
    inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, inside))
    made = function(*inner_args, **inner_kwargs)
    if to_host:
        return made
    return return_and_correct_aliasing(function, args, kwargs, tree_map_only(Tensor, OnDevice, made))


class Waits(TorchDispatchMode):
    """Notes what stops the host: (where in the project, what)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.operations = 0  # that would each be a launch at least
        self.by_place: dict[str, int] = {}
        self.addresses: set[int] = set()  # of memory that was pinned
        self.count_places = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(leaf, OnDevice) for leaf in leaves)
        asked = kwargs.get("device")
        made_there = asked is not None and torch.device(asked).type == NAME
        if not on_device and not made_there:
            return function(*args, **kwargs)
        name = function._schema.name.partition("::")[2]
        if what := self._wait(name, args, kwargs, leaves):
            self.note(what)
        if function not in _FREE and not function.is_view:
            self.operations += 1
            if self.count_places:
                place = f"{_place()} {name}"
                self.by_place[place] = self.by_place.get(place, 0) + 1
        return _computed(function, args, kwargs)

    def note(self, what: str) -> None:
        self.found.append((_place(), what))

    def _wait(self, name: str, args: Any, kwargs: dict[str, Any], leaves: list[Tensor]) -> str | None:
        if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return name
        hosts = [leaf for leaf in leaves if not isinstance(leaf, OnDevice)]
        if name == "_to_copy":
            to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
            return self._copied(args[0], kwargs.get("non_blocking", False), to_host)
        if name in ("copy_", "copy"):
            target, source = args[:2]
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            to_host = not isinstance(target, OnDevice)
            if to_host or not isinstance(source, OnDevice):
                return self._copied(source, asynchronous, to_host)
            return None
        if name in _MAY_TAKE_HOST_INDICES:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, OnDevice) for index in indices):
                return f"{name} by indices on the host"
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return f"{name} by a mask"
            return None
        if any(host.dim() or name in ("stack", "cat") for host in hosts):
            raise RuntimeError(f"{name}: {[list(host.shape) for host in hosts]} on the host, others on the device")
        return None

    def _copied(self, source: Tensor, asynchronous: bool, to_host: bool) -> str | None:
        if to_host:
            return "read back"
        if isinstance(source, OnDevice):
            return None
        if not asynchronous:
            return "copied to the device, and waited for"
        if source.untyped_storage().data_ptr() not in self.addresses:
            return "copied to the device from memory that is not pinned"
        return None

    def pinned(self, tensor: Tensor) -> Tensor:
        copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)  # as PyTorch does
        _keep.append(copied)  # its address must not be given to another
        self.addresses.add(copied.untyped_storage().data_ptr())
        return copied


_keep: list[Tensor] = []
_FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default}


class _Python(TorchFunctionMode):
    """What Python's side does before an operation is dispatched: numbers become tensors, memory is pinned."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.pin_memory:  # without an accelerator PyTorch pins nothing: a copy stands for it
            return self.waits.pinned(args[0])
        if function is Tensor.is_pinned:
            return args[0].untyped_storage().data_ptr() in self.waits.addresses
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            if device is None or torch.device(device).type != NAME:
                return made
            self.waits.note("numbers copied to the device, and waited for")
            return OnDevice(made)
        if function is Tensor.tolist and isinstance(args[0], OnDevice):
            self.waits.note("read back")
            return args[0].held.tolist()
        if function is Tensor.new_tensor and isinstance(args[0], OnDevice):
            self.waits.note("numbers copied to the device, and waited for")
            return OnDevice(args[0].held.new_tensor(*args[1:], **kwargs))
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], listed, *args[2:])
        return function(*args, **kwargs)


@contextmanager
def waits_noted() -> Iterator[Waits]:
    """Inside, everything that would wait for the device, and how much is launched on it."""
    waits = Waits()
    with waits, _Python(waits):
        yield waits
    _keep.clear()


def _place() -> str:
    """The innermost line of the project, or of DeepSpeed, that is running."""
    for frame in reversed(traceback.extract_stack()):
        ours = frame.filename.startswith(ROOT) and not frame.filename.endswith("simulated_device.py")
        if ours and "/site-packages/" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}"
    return "autograd"

"""A device that is not there, for tests of what lies where.

Its tensors are tensors of the CPU in a wrapper that says it lies on ``meta``. What a GPU refuses is
refused: to compute with tensors of both places, to read values through numpy, to touch the device's
tensors outside a worker's lane. So a method that forgets on which device it makes a tensor fails.
This checks places and nothing else: kernels, streams, rounding and memory of a GPU are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from merge_kit.devices import BLOCK

PLACE = torch.device("meta")
_WITH_A_NUMBER = {"add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "where"}
"""What takes a tensor without dimensions from the CPU, as CUDA's elementwise kernels do."""


class MisplacedError(Exception):
    """A GPU would refuse this, or wait for ever."""


class Placed(Tensor):
    """A tensor on the device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=PLACE,
        )
        made.inner = inner
        return made

    def numpy(self, *, force=False):
        """Torch opens no wrapper to numpy, so that this stands in for its own."""
        if not force:
            raise MisplacedError("numpy() on the device")
        return self.cpu().numpy()

    def tolist(self):
        """As `numpy`."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise MisplacedError(f"{function} on the device, outside a lane")


class _Lane(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        placed = {id(x.inner): x for x in tensors if isinstance(x, Placed)}
        _check(function, tensors, placed)
        there = bool(placed)
        if kwargs.get("device") is not None:
            there = kwargs["device"] == PLACE
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(_inside, (args, kwargs))
        found = function(*args, **kwargs)
        return tree_map(lambda x: _outside(x, placed), found) if there else found


def _check(function, tensors, placed):
    """What lies on the CPU may meet the device as a number, or be copied."""
    name = function.overloadpacket.__name__.removesuffix("_")
    strangers = [x for x in tensors if not isinstance(x, Placed)]
    if not placed or name == "copy":
        return
    if any(x.dim() or name not in _WITH_A_NUMBER for x in strangers):
        raise MisplacedError(f"{function} of the device and of the CPU")


def _inside(value):
    return value.inner if isinstance(value, Placed) else value


def _outside(value, placed):
    """Results are wrapped; what was changed in place is what it was."""
    if not isinstance(value, Tensor):
        return value
    known = placed.get(id(value))
    assert known is None or known.shape == value.shape
    return Placed(value) if known is None else known


@dataclass
class Emulated:
    """A `merge_kit.devices.Device` of such tensors, with the CPU's blocks: the same bytes."""

    place: torch.device = PLACE
    name: str = "emulated (of wrapped tensors)"
    block: int = BLOCK
    ahead: int = 1
    lanes: int = 0
    buffers: list[Tensor] = field(default_factory=list)

    def workers(self, threads: int, *, whole: bool) -> int:
        """As of a GPU."""
        return min(threads, 2)

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Plain memory."""
        self.buffers.append(torch.empty(size, dtype=dtype))
        return self.buffers[-1]

    @contextmanager
    def lane(self) -> Iterator[None]:
        """The only place where the device's tensors may be touched."""
        self.lanes += 1
        with _Lane():
            yield

"""Where the arithmetic of blocks runs: on the CPU, or on a GPU by CUDA. Nothing else names CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from merge_kit.errors import MergeKitError, UsageError

BLOCK = 65536
"""Values of each vector in one block: with its float64 temporaries it stays in the cache."""
_GPU_BLOCK = 1 << 20
"""The same on a GPU: starting an operation takes some 10 microseconds, about what it takes there to
work through so many values. A multiple of 8: masks are kept in bytes."""
_GPU_WORKERS, _GPU_WORKERS_WHOLE = 4, 2
"""While one computes, the others read and copy. Blocks of whole tensors fill the GPU's memory."""


class Device(Protocol):
    """Where blocks are worked on. How they are cut follows from the kind of device alone."""

    @property
    def place(self) -> torch.device:
        """Where the tensors of a block lie."""

    @property
    def name(self) -> str:
        """What the last digits of a result may depend on, for records."""

    @property
    def block(self) -> int:
        """Values of each vector in one block."""

    @property
    def ahead(self) -> int:
        """How many results may wait for each worker."""

    def workers(self, threads: int, *, whole: bool) -> int:
        """How many of so many threads work at once, on blocks or on whole tensors."""

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,) memory of the CPU that files are read into, again and again by one thread."""

    def lane(self) -> AbstractContextManager[None]:
        """Within it a thread reads and works on one block; on its end all of that is done."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor; each block is read to where it is worked on."""

    place: torch.device
    name: str = "cpu"
    block: int = BLOCK
    ahead: int = 4

    def workers(self, threads: int, *, whole: bool) -> int:
        """All of them."""
        return threads

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Plain memory."""
        return torch.empty(size, dtype=dtype)

    def lane(self) -> AbstractContextManager[None]:
        """Nothing has to be waited for."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class Cuda:
    """A GPU; each worker copies and computes on a stream of its own."""

    place: torch.device
    name: str
    block: int = _GPU_BLOCK
    ahead: int = 1
    _idle: list[torch.cuda.Stream] = field(default_factory=list)
    """Streams that nobody is using: torch keeps the memory of each stream apart."""

    def workers(self, threads: int, *, whole: bool) -> int:
        """A few: they share one bus."""
        return min(threads, _GPU_WORKERS_WHOLE if whole else _GPU_WORKERS)

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory, from which the GPU copies while the thread goes on."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    @contextmanager
    def lane(self) -> Iterator[None]:
        """A stream, which is empty in the end: buffers may be filled again, results be given away.

        Raises
        ------
        MergeKitError
            The GPU's memory is full.
        """
        try:
            stream = self._idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    stream.synchronize()
        except torch.OutOfMemoryError as error:
            raise MergeKitError(
                f"{self.place} has too little memory for this merge: end what else runs on it, or "
                "give --device cpu."
            ) from error
        finally:
            self._idle.append(stream)


CPU: Device = Cpu(torch.device("cpu"))


def existing(name: str, remedy: str) -> torch.device:
    """The device of this name, with its number.

    Raises
    ------
    UsageError
        It is not there; `remedy` says what else to give.
    """
    try:
        found = torch.zeros(1, device=name)
        found.tolist()  # a meta tensor has no values
        return found.device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"the device '{name}' is not there: {remedy}, or see 'merge-kit doctor'."
        ) from error


def choose(name: str) -> Device:
    """The device that merges run on: ``cpu``, ``cuda`` or ``cuda:1``. CUDA is touched by name only.

    Raises
    ------
    UsageError
        There is no such GPU, or merges do not run on such a device.
    """
    if name == "cpu":
        return CPU
    if name.partition(":")[0] != "cuda":
        raise UsageError(f"--device {name}: merges run on cpu, or on cuda, cuda:1 and so on.")
    place = existing(name, "give --device cpu")
    # Torch loads its linear algebra for GPUs on first use, and fails if two threads are the first.
    torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=place))
    return Cuda(place, f"cuda ({torch.cuda.get_device_name(place)})")

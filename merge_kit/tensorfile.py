"""Safetensors files: strict lazy reading, streaming atomic writing, fingerprint of the tensors.

Nothing of a tensor is read until it is asked for; the header has been checked by then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from merge_kit.errors import TensorFileError
from merge_kit.files import canonical_json, partial_path, storage_errors
from merge_kit.tensorheader import DTYPE_NAMES, TensorSpec, read_header


class Tensors(Protocol):
    """Named tensors, read whole or stretch by stretch: what a merge needs of a base or a vector."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor, sorted by name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory."""

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""


class StoredTensors(Tensors, Protocol):
    """Tensors that lie in a file or in several, with what the file says of itself."""

    @property
    def path(self) -> Path:
        """Where they lie, for messages."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's texts."""


class TensorFile:
    """An open safetensors file whose header has been checked.

    Use as a context manager. `specs` maps each name, in sorted order, to its dtype and shape;
    `metadata` is the header's ``__metadata__``; `start` is the bytes before the first tensor's.

    Raises
    ------
    TensorFileError
        The file is missing, truncated, or breaks the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A named pipe that nobody writes to must not keep us waiting.
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise TensorFileError(f"{path} does not exist: check the path.") from None
        except OSError as error:
            raise TensorFileError(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            if not os.path.isfile(path):
                what = "a folder" if os.path.isdir(path) else "a device or a pipe"
                raise TensorFileError(f"{path} is {what}, not a safetensors file.")
            self.start, self.metadata, self.specs, self._offsets = read_header(self._handle, path)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        os.close(self._handle)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, in the dtype and shape of the file."""
        spec = self.specs[name]
        tensor = torch.empty(spec.elements, dtype=spec.dtype)
        self.read_into(name, 0, tensor)
        return tensor.reshape(spec.shape)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""
        view = memoryview(out.view(torch.uint8).numpy().data)
        position = self._offsets[name] + begin * out.dtype.itemsize
        while len(view):
            count = os.preadv(self._handle, [view], position)
            if count == 0:
                raise TensorFileError(
                    f"{self.path}: tensor '{name}' ends early, the file was cut while it was read: "
                    "copy it again."
                )
            view, position = view[count:], position + count

    def in_file_order(self) -> list[str]:
        """The names in the order of their bytes, which follow `start` without holes."""
        return sorted(self.specs, key=self._offsets.__getitem__)

    def identity(self) -> tuple[int, ...]:
        """Device, inode, size, and times of the open file: they change when its bytes do."""
        return identity_of(os.fstat(self._handle))


def identity_of(found: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another without reading it."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class TensorWriter:
    """Write a safetensors file stretch by stretch, in any order, in one stretch's memory.

    The bytes depend only on `specs`, `metadata` and the values. The file grows beside `path` and is
    renamed when the block ends with every tensor written; otherwise nothing is left. `metadata` is
    one text: with several keys the format has no fixed order.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: tuple[str, str] | None = None
    ) -> None:
        self.path = path
        self.specs = dict(specs)
        self._missing = {name: spec.elements for name, spec in specs.items()}
        # Widest dtype first keeps every tensor aligned, as the reference writer does.
        order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict([metadata])} if metadata else {}
        self._offsets, position = {}, 0
        for name in order:
            end = position + specs[name].nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[specs[name].dtype],
                "shape": list(specs[name].shape),
                "data_offsets": [position, end],
            }
            self._offsets[name], position = position, end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._header = len(raw).to_bytes(8, "little") + raw
        self._partial = partial_path(path)

    def __enter__(self) -> TensorWriter:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb", buffering=0)
        try:
            self._put(memoryview(self._header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its dtype and shape must be those that were announced."""
        spec = self.specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise TensorFileError(
                f"{self.path}: tensor '{name}' should be {spec} and is "
                f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}."
            )
        self.write_part(name, 0, tensor.detach().cpu().contiguous().reshape(-1))

    def write_part(self, name: str, begin: int, values: torch.Tensor) -> None:
        """Write a stretch of a tensor: flat, of its dtype, from index `begin` on; each once."""
        view = memoryview(values.view(torch.uint8).numpy().data)
        self._put(view, len(self._header) + self._offsets[name] + begin * values.dtype.itemsize)
        self._missing[name] -= values.numel()

    def _put(self, view: memoryview, position: int) -> None:
        with storage_errors(self.path):
            while len(view):
                count = os.pwrite(self._file.fileno(), view, position)
                view, position = view[count:], position + count

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if missing := [name for name, left in self._missing.items() if left]:
            raise TensorFileError(
                f"{self.path}: tensor '{min(missing)}' was never written; nothing is kept."
            )
        with storage_errors(self.path):
            os.fsync(self._file.fileno())
            self._partial.replace(self.path)


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """The dtype and shape of each tensor, sorted by name."""
    return {
        name: TensorSpec(tensors[name].dtype, tuple(tensors[name].shape))
        for name in sorted(tensors)
    }


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: tuple[str, str] | None = None
) -> None:
    """Write tensors that are in memory as one safetensors file, atomically."""
    with TensorWriter(path, specs_of(tensors), metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class Fingerprint:
    """Hash of names, dtypes, shapes and bytes, as ``sha256:<64 hex digits>``.

    It speaks of the tensors and not of the file: two files with other layouts or metadata and the
    same tensors have one fingerprint. Names must come sorted, values in their order.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"merge-kit-tensors-v1\n")

    def begin(self, name: str, spec: TensorSpec) -> None:
        """The next tensor."""
        entry = [name, DTYPE_NAMES[spec.dtype], list(spec.shape)]
        self._digest.update(canonical_json(entry) + b"\n")

    def values(self, flat: torch.Tensor) -> None:
        """The next of its values: flat, contiguous, in memory."""
        self._digest.update(flat.view(torch.uint8).numpy().data)

    def __str__(self) -> str:
        return "sha256:" + self._digest.hexdigest()


def fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The `Fingerprint` of tensors in memory; names must come sorted."""
    found = Fingerprint()
    for name, tensor in named_tensors:
        found.begin(name, TensorSpec(tensor.dtype, tuple(tensor.shape)))
        found.values(tensor.detach().cpu().contiguous().reshape(-1))
    return str(found)


def fingerprint_file(path: Path) -> str:
    """The fingerprint of a safetensors file's tensors, one tensor in memory at a time."""
    with TensorFile(path) as file:
        return fingerprint(read_all(file))


def read_all(file: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name and tensor of a file, sorted by name."""
    for name in file.specs:
        yield name, file.read(name)

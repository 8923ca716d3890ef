"""What the header of a safetensors file says, read strictly: the file may come from anybody.

The format is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. The
safetensors library accepts duplicate keys, unknown fields and names such as ``../x``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_kit.errors import TensorFileError
from merge_kit.strictjson import RepeatedKeyError, loads

HEADER_LIMIT = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]} {list(self.shape)}"


def read_header(
    handle: int, path: Path
) -> tuple[bytes, dict[str, str], dict[str, TensorSpec], dict[str, int]]:
    size = os.fstat(handle).st_size
    start = os.pread(handle, 10, 0)
    if len(start) < 10:
        raise TensorFileError(
            f"{path} is no safetensors file: it has only {size} bytes; copy it again."
        )
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") and start[8:9] != b"{":
        raise TensorFileError(
            f"{path} is a pickled checkpoint, not safetensors: pickles can run code and are not "
            "read; convert it with torch.load(weights_only=True) and safetensors.torch.save_file."
        )
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_LIMIT:
        raise TensorFileError(
            f"{path} has a header of {length} bytes, above the limit of {HEADER_LIMIT}: "
            "it is no safetensors file, or one made to exhaust memory."
        )
    if 8 + length > size:
        raise TensorFileError(f"{path} is truncated inside its header: copy it again.")
    raw = os.pread(handle, length, 8)
    header = _parse_header(raw, path)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    return start[:8] + raw, metadata, *_check_entries(header, path, 8 + length, size)


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise TensorFileError(f"{path} is no safetensors file: its header is not a JSON object.")
    try:
        header = loads(raw)
    except RepeatedKeyError as error:
        raise TensorFileError(
            f"{path} names {error.key} twice in its header: it is refused."
        ) from error
    except ValueError as error:
        raise TensorFileError(
            f"{path} is no safetensors file: its header is not valid JSON."
        ) from error
    if not isinstance(header, dict):
        raise TensorFileError(f"{path} is no safetensors file: its header is not a JSON object.")
    return header


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TensorFileError(f"{path} has metadata that is not text: it is refused.")
    return metadata


def _check_entries(
    header: Mapping[str, Any], path: Path, data_start: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name in sorted(header):
        spec, begin, end = _check_entry(name, header[name], path)
        specs[name] = spec
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise TensorFileError(
                f"{path}: tensor '{name}' starts at byte {begin} instead of {position}: "
                "the tensors must cover the file without holes or overlaps."
            )
        position = end
    if data_start + position != size:
        kind = "is truncated" if data_start + position > size else "has extra bytes at its end"
        raise TensorFileError(
            f"{path} {kind}: it should have {data_start + position} bytes and has {size}; "
            "copy it again."
        )
    return specs, {name: data_start + begin for begin, _, name in spans}


def _check_entry(name: str, entry: Any, path: Path) -> tuple[TensorSpec, int, int]:
    if not is_safe(name):
        raise TensorFileError(f"{path} has a tensor with the unsafe name {name!r}: it is refused.")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise TensorFileError(
            f"{path}: tensor '{name}' must have exactly the fields dtype, shape and data_offsets."
        )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise TensorFileError(
            f"{path}: tensor '{name}' has the dtype {entry['dtype']!r}, which is not supported; "
            f"use one of {', '.join(DTYPES)}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_whole_numbers(shape) or not _is_whole_numbers(offsets) or len(offsets) != 2:
        raise TensorFileError(
            f"{path}: tensor '{name}' has a shape or offsets that are not whole numbers."
        )
    spec = TensorSpec(DTYPES[entry["dtype"]], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise TensorFileError(
            f"{path}: tensor '{name}' ({spec}) needs {spec.nbytes} bytes and is given "
            f"{offsets[1] - offsets[0]}."
        )
    return spec, offsets[0], offsets[1]


def is_safe(name: str) -> bool:
    """Whether a tensor may be called so."""
    return bool(name) and name.isprintable() and ".." not in name and not set(" /\\") & set(name)


def _is_whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)

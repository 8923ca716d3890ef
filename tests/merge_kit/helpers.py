"""What several tests of this folder share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from merge_kit.engine import Part
from merge_kit.errors import MergeKitError
from merge_kit.remembered import SETTLED
from merge_kit.tensorfile import TensorFile, read_all
from merge_kit.tensorheader import TensorSpec

quick = settings(
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def says(error: type[MergeKitError], sentence: str) -> Iterator[None]:
    """The block must raise exactly this error with exactly this sentence."""
    with pytest.raises(error) as caught:
        yield
    assert str(caught.value) == sentence
    assert type(caught.value) is error


def blob(header: bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with this header, sound or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    """A header entry; by default bytes."""
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def assemble(parts: Iterable[Part], specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Whole tensors from the stretches of a merge, which must come in order."""
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        known = found.setdefault(part.name, [])
        assert part.begin == sum(values.numel() for values in known)
        known.append(part.values)
    assert list(found) == sorted(found)
    return {name: torch.cat(values).reshape(specs[name].shape) for name, values in found.items()}


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    with TensorFile(path) as file:
        return dict(read_all(file))


def listing(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def settle(folder: Path) -> None:
    """Wait until every file under a folder has been left alone long enough to be remembered."""
    times = [path.stat().st_ctime_ns for path in folder.rglob("*") if path.is_file()]
    while (left := max(times) + SETTLED - time.time_ns()) > -200_000_000:
        time.sleep(left / 1e9 + 0.25)

"""Checkpoints as people have them: one safetensors file, a timm folder, or shards with an index.

A checkpoint reads like a `TensorFile`, so it can be the base of a merge; against a base it reads
like the task vector that `vector.subtract` would write.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_kit import vector
from merge_kit.errors import TensorFileError, VectorError
from merge_kit.parameters import Role, is_carried, vector_specs
from merge_kit.strictjson import read_json
from merge_kit.tensorfile import Fingerprint, StoredTensors, TensorFile, Tensors, identity_of
from merge_kit.tensorheader import HEADER_LIMIT, TensorSpec, is_safe

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pth.tar")
_STEP = 1 << 18
_HUGE = torch.finfo(torch.float32).max / 2


class Checkpoint:
    """An open state dict, in one file or in several; use as a context manager.

    `path` is a safetensors file, or a folder with ``model.safetensors``, with shards and their
    ``model.safetensors.index.json`` (the convention of Hugging Face), or with a single safetensors
    file of any name; the first of these that is there counts.

    A tensor that was dropped because it is tied to another, as ``safetensors.torch.save_model`` and
    ``huggingface_hub.save_torch_state_dict`` do, is there under both names when the metadata says
    so.

    Raises
    ------
    TensorFileError
        There is no such file, it breaks the format, or the index and its shards disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        weights = _weights_of(path)
        self._index = weights if weights.name == INDEX else None
        with ExitStack() as stack:
            if weights.name == INDEX:
                self.metadata, where = _read_index(weights)
                shards = {
                    name: stack.enter_context(_open_shard(weights, name))
                    for name in sorted(set(where.values()))
                }
                _check_index(weights, where, shards)
                files = list(shards.values())
            else:
                files = [stack.enter_context(TensorFile(weights))]
                self.metadata = files[0].metadata
            homes = {name: (file, name) for file in files for name in file.specs}
            tied = {
                name: homes[kept]
                for name, kept in self.metadata.items()
                if name not in homes and kept in homes and is_safe(name)
            }
            self._homes = {**homes, **tied}
            self.specs = {
                name: self._homes[name][0].specs[self._homes[name][1]]
                for name in sorted(self._homes)
            }
            self._shards = files
            self._files = stack.pop_all()

    def identity(self) -> tuple[int, ...]:
        """`TensorFile.identity` of each file, and of the index where there is one."""
        parts = [shard.identity() for shard in self._shards]
        if self._index is not None:
            parts.append(identity_of(self._index.stat()))
        return tuple(number for part in parts for number in part)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._files.close()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, in the dtype and shape of the file."""
        file, stored = self._homes[name]
        return file.read(stored)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""
        file, stored = self._homes[name]
        file.read_into(stored, begin, out)


def _weights_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (WEIGHTS, INDEX):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise TensorFileError(
            f"{path} holds {len(found)} safetensors files and no {INDEX}: name one of them, "
            f"such as {found[0]}."
        )
    if pickles := sorted(file for pattern in _PICKLES for file in path.glob(pattern)):
        raise TensorFileError(
            f"{pickles[0]} is a pickled checkpoint, not safetensors: pickles can run code and are "
            "not read; convert it with torch.load(weights_only=True) and "
            "safetensors.torch.save_file."
        )
    raise TensorFileError(
        f"{path} is no checkpoint: it holds no {WEIGHTS}, no {INDEX} and no other safetensors file."
    )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The texts among the index's metadata, and the shard of each tensor."""

    if path.stat().st_size > HEADER_LIMIT:
        raise TensorFileError(f"{path} is larger than {HEADER_LIMIT} bytes: it is no index.")
    otherwise = f"{path} is not valid JSON: copy it again."
    content = read_json(path.read_bytes(), str(path), TensorFileError, otherwise)
    where = content.get("weight_map") if isinstance(content, dict) else None
    metadata = content.get("metadata") or {} if isinstance(content, dict) else {}
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(shard, str) for shard in where.values())
        or not isinstance(metadata, dict)
    ):
        raise TensorFileError(
            f"{path} is no index of shards: its 'weight_map' must give the file of each tensor."
        )
    return {key: text for key, text in metadata.items() if isinstance(text, str)}, where


def _open_shard(index: Path, name: str) -> TensorFile:
    if not is_safe(name.replace(" ", "")) or not name.endswith(".safetensors"):
        raise TensorFileError(
            f"{index} names the shard {name!r}: a shard is a safetensors file beside the index."
        )
    if not (index.parent / name).is_file():
        raise TensorFileError(
            f"{index} names the shard '{name}', which is not there: copy the whole folder again."
        )
    return TensorFile(index.parent / name)


def _check_index(index: Path, where: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    for tensor, shard in sorted(where.items()):
        if tensor not in shards[shard].specs:
            raise TensorFileError(
                f"{index} lists the tensor '{tensor}' in '{shard}', which does not hold it: copy "
                "the whole folder again."
            )
    for shard, file in shards.items():
        for tensor in file.specs:
            if tensor not in where:
                raise TensorFileError(
                    f"{file.path} holds the tensor '{tensor}', which the index does not list: "
                    "copy the whole folder again."
                )
            if where[tensor] != shard:
                raise TensorFileError(
                    f"the tensor '{tensor}' is in two shards of {index}, '{shard}' and "
                    f"'{where[tensor]}': copy the whole folder again."
                )


class Start:
    """The base as vectors subtract it: floats as float32.

    Each thread keeps the stretch that it read last: the vectors of a block are read one after the
    other, so the base is read once for all of them.
    """

    def __init__(self, base: Tensors, roles: Mapping[str, Role]) -> None:
        self.specs = vector_specs(base.specs, roles)
        self._base = base
        self._kept = threading.local()

    def stretch(self, name: str, begin: int, size: int) -> torch.Tensor:
        """(size,) values from index `begin` on, in the vector's dtype; not to be changed."""
        if getattr(self._kept, "place", None) != (name, begin, size):
            values = torch.empty(size, dtype=self._base.specs[name].dtype)
            self._base.read_into(name, begin, values)
            self._kept.values = values.to(self.specs[name].dtype)
            self._kept.place = name, begin, size
        kept: torch.Tensor = self._kept.values
        return kept


class Difference:
    """A checkpoint read as its task vector, float32(theta) - float32(theta_0), stretch by stretch.

    Gives bit for bit what `vector.subtract` writes, without writing it or holding a tensor.
    """

    def __init__(self, start: Start, tuned: Tensors) -> None:
        self.specs = start.specs
        self._start, self._tuned = start, tuned

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the vector in fresh memory."""
        spec = self.specs[name]
        values = torch.empty(spec.elements, dtype=spec.dtype)
        self.read_into(name, 0, values)
        return values.reshape(spec.shape)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill `out`, flat, float32 (or a counter's dtype), with values from index `begin` on."""
        stored = self._tuned.specs[name].dtype
        if stored == out.dtype:
            self._tuned.read_into(name, begin, out)
        else:
            values = torch.empty(out.numel(), dtype=stored)
            self._tuned.read_into(name, begin, values)
            out.copy_(values)
        out.sub_(self._start.stretch(name, begin, out.numel()))


@dataclass(frozen=True, slots=True)
class WithHead:
    """A base with a head of zeros in place of its own, for checkpoints with other classes."""

    body: Tensors
    specs: Mapping[str, TensorSpec]
    """Of body and head, sorted by name."""
    head: frozenset[str]
    """Names of the tensors that are zeros."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory."""
        if name not in self.head:
            return self.body.read(name)
        return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""
        if name in self.head:
            out.zero_()
        else:
            self.body.read_into(name, begin, out)


def check_fit(tuned: StoredTensors, base: Tensors, roles: Mapping[str, Role]) -> None:
    """Compare a checkpoint's tensors with the base's: names, shapes, kinds, and constant tables.

    Floats may be of another precision than the base's.

    Raises
    ------
    VectorError
        Names the first tensor that does not fit.
    """
    path = tuned.path
    if missing := sorted(set(base.specs) - set(tuned.specs)):
        name, count = missing[0], len(missing)
        if twin := _twin(base, name):
            raise VectorError(
                f"{path} lacks the tensor '{name}', which equals '{twin}' in the base: if they are "
                "tied, save it with both names or with safetensors.torch.save_model, which "
                "records the tie."
            )
        raise VectorError(
            f"{path} lacks the tensor '{name}' that the base has ({count} in all): is it another "
            "architecture?"
        )
    if extra := sorted(set(tuned.specs) - set(base.specs)):
        name, count = extra[0], len(extra)
        if twin := _twin(tuned, name):
            raise VectorError(
                f"{path} has the tensor '{name}', equal to its '{twin}', and the base lacks it: if "
                "they are tied, save the base with both names or with "
                "safetensors.torch.save_model, which records the tie."
            )
        raise VectorError(
            f"{path} has the tensor '{name}' that the base does not have ({count} in all): is it "
            "another architecture?"
        )
    for name, spec in base.specs.items():
        found = tuned.specs[name]
        if found.shape != spec.shape:
            raise VectorError(
                f"{path}: tensor '{name}' is {found}, the base's is {spec}: is it another "
                "architecture, or a head that no config.json names?"
            )
        floats = found.dtype.is_floating_point and spec.dtype.is_floating_point
        if not floats and found.dtype != spec.dtype:
            raise VectorError(
                f"{path}: tensor '{name}' is {found}, the base's is {spec}: convert it first."
            )
        if is_carried(spec, roles[name]):
            continue
        if not torch.equal(tuned.read(name), base.read(name)):
            raise VectorError(
                f"{path}: the integer table '{name}' differs from the base's: is it another "
                "architecture or input size?"
            )


def _twin(tensors: Tensors, name: str) -> str | None:
    """Another tensor with the same values, as a tied one has; biases of zeros are no sign."""
    values, spec = tensors.read(name), tensors.specs[name]
    if bool((values == values.flatten()[:1]).all()):
        return None
    alike = (other for other, found in tensors.specs.items() if found == spec and other != name)
    return next((other for other in alike if torch.equal(tensors.read(other), values)), None)


def fingerprint_checked(file: StoredTensors) -> str:
    """The fingerprint of all tensors, read once, stretch by stretch; every value must be finite.

    Raises
    ------
    NonFiniteError
        Names the tensor.
    """
    return read_checked(file)[0]


def read_checked(file: StoredTensors) -> tuple[str, tuple[str, ...]]:
    """As `fingerprint_checked`, and the tensors with values so large that a difference of two such
    may overflow float32.
    """
    found, huge = Fingerprint(), dict[str, None]()
    for name, spec in file.specs.items():
        found.begin(name, spec)
        for begin in range(0, spec.elements, _STEP):
            values = torch.empty(min(_STEP, spec.elements - begin), dtype=spec.dtype)
            file.read_into(name, begin, values)
            found.values(values)
            if not values.is_floating_point():
                continue
            least, most = (float(end) for end in torch.aminmax(values))
            largest = max(-least, most)
            if not math.isfinite(largest):
                where, remedy = str(file.path), "give a sound checkpoint."
                vector.check_finite(file.read(name), name, where, remedy)
            if largest > _HUGE:
                huge[name] = None
    return str(found), tuple(huge)

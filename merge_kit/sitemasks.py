"""What a merged model keeps of each site: one bit for each value of the weights, and a rescaler.

Close to a site's own model is theta_0 + r M * (theta_merged - theta_0) with its bits M and, in each
tensor, its rescaler r (EMR, arXiv 2405.17461).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import StringConstraints
from torch import Tensor

from merge_kit.blocks import BLOCK
from merge_kit.engine import Part, Source
from merge_kit.errors import RecipeError, VectorError
from merge_kit.files import canonical_json, storage_errors
from merge_kit.schema import Digest, Document, SiteName
from merge_kit.tensorfile import StoredTensors, Tensors, TensorWriter
from merge_kit.tensorheader import TensorSpec
from merge_kit.vector import METADATA_KEY, check_finite, parse_header

MASKS = "masks"
_SUFFIX = ".safetensors"


class MaskHeader(Document):
    """What a file of masks says of itself, in its one metadata key."""

    format: Literal[1] = 1
    site: SiteName
    contribution: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Its id; of a plain checkpoint the digits of its fingerprint."""
    merged: Digest
    """Fingerprint of the merged model that the masks belong to."""
    rescalers: dict[str, float]
    """By tensor: the factor of the merged model's difference from the base."""


def pack(masks: Tensor) -> NDArray[np.uint8]:
    """(N, n) of True and False give (N, ceil(n / 8)); the first value is the lowest bit."""
    return np.packbits(masks.numpy(force=True), axis=1, bitorder="little")


def unpack(packed: Tensor, size: int) -> Tensor:
    """The first `size` values of one packed row."""
    bits = np.unpackbits(packed.numpy(), count=size, bitorder="little")
    return torch.from_numpy(bits).bool()


def packed_spec(spec: TensorSpec) -> TensorSpec:
    """What the bits of a tensor are in a file."""
    return TensorSpec(torch.uint8, (-(-spec.elements // 8),))


class MaskWriter:
    """Write ``masks/<site>.safetensors`` for each source of a merge, if its parts have masks.

    Use as a context manager beside the writer of the merged model. Bits wait in an unnamed file on
    the same disk until the model's fingerprint is known; memory is one part's.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self._folder, self._sources = folder / MASKS, sorted(sources, key=lambda s: s.id)
        self._specs: dict[str, TensorSpec] = {}
        self._rescalers: dict[str, list[float]] = {}
        self._places: list[tuple[str, int, int]] = []
        self._bits: IO[bytes] | None = None

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bits:
            with suppress(OSError):
                self._bits.close()

    def seen(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The same parts, those of one tensor in order; masks are kept as they pass.

        Raises
        ------
        RecipeError
            A part is 0 times the merged vector, from which no site's values can come back.
        """
        for part in parts:
            if part.masks is not None:
                self._add(part, part.masks, checked_rescalers(part))
            yield part

    def _add(self, part: Part, masks: Tensor, rescalers: list[float]) -> None:
        packed = pack(masks)
        with storage_errors(self._folder):
            if self._bits is None:
                self._folder.mkdir(parents=True)
                self._bits = tempfile.TemporaryFile(dir=self._folder)
            self._bits.write(packed.data)
        size = part.begin + masks.shape[1]
        self._specs[part.name] = packed_spec(TensorSpec(torch.bool, (size,)))
        self._rescalers[part.name] = rescalers
        self._places.append((part.name, part.begin // 8, packed.shape[1]))

    def finish(self, merged: str) -> None:
        """Write the files; `merged` is the fingerprint of the model that they belong to."""
        if self._bits is None:
            return
        for index, (name, source) in enumerate(by_name(self._sources).items()):
            metadata = metadata_of(source, index, merged, self._rescalers)
            with TensorWriter(self._folder / name, self._specs, metadata) as writer:
                for tensor, begin, row in self._rows(self._bits, index):
                    writer.write_part(tensor, begin, row)

    def _rows(self, bits: IO[bytes], index: int) -> Iterator[tuple[str, int, Tensor]]:
        at = 0
        for name, begin, size in self._places:
            with storage_errors(self._folder):
                bits.seek(at + index * size)
                row = bytearray(bits.read(size))
            at += len(self._sources) * size
            yield name, begin, torch.frombuffer(row, dtype=torch.uint8)


def checked_rescalers(part: Part) -> list[float]:
    """The rescaler of each source in a part that has masks.

    Raises
    ------
    RecipeError
        The part is 0 times the merged vector, from which no site's values can come back.
    """
    found: list[float] = [] if part.rescalers is None else part.rescalers.tolist()
    if not all(map(math.isfinite, found)):
        raise RecipeError(
            f"nothing is left of the sites' vectors in the tensor '{part.name}', so their own "
            "models could not come back: choose a 'scale', and an 'alpha' of 'lines', other "
            "than 0."
        )
    return found


def by_name(sources: Sequence[Source]) -> dict[str, Source]:
    """Sources by the name of their file of masks, in the order of the ids."""
    ordered = sorted(sources, key=lambda source: source.id)
    sites = [source.site for source in ordered]
    stems = [file_stem(s.site, s.id, alone=sites.count(s.site) == 1) for s in ordered]
    return {f"{stem}{_SUFFIX}": s for stem, s in zip(stems, ordered, strict=True)}


def metadata_of(
    source: Source, index: int, merged: str, rescalers: Mapping[str, Sequence[float]]
) -> tuple[str, str]:
    """The metadata of a file of masks; `rescalers` has every source's, by tensor."""
    header = MaskHeader(
        site=source.site,
        contribution=source.id,
        merged=merged,
        rescalers={name: found[index] for name, found in rescalers.items()},
    )
    return METADATA_KEY, canonical_json(header.model_dump()).decode()


def file_stem(site: str, contribution: str, *, alone: bool = True) -> str:
    """Name of a site's file of masks; with several contributions of one site, of each of them."""
    return site if alone else f"{site}.{contribution[:12]}"


def find_masks(folder: Path, site: str) -> Path:
    """The masks that a merged model's folder keeps of a site.

    Raises
    ------
    VectorError
        It keeps none, or none of this site; the sentence names those that are there.
    """
    found = {path.name.removesuffix(_SUFFIX): path for path in (folder / MASKS).glob(f"*{_SUFFIX}")}
    if not found:
        raise VectorError(
            f"{folder} keeps no masks of its sites: merge with '--method emr', which writes them."
        )
    if site not in found:
        raise VectorError(
            f"{folder} has no masks of the site '{site}'; there are {', '.join(sorted(found))}."
        )
    return found[site]


def read_header(file: StoredTensors) -> MaskHeader:
    """The header of a file of masks.

    Raises
    ------
    VectorError
        merge-kit did not write the file, or it is another site's.
    """
    header = parse_header(file, MaskHeader, "holds no masks")
    stems = [file_stem(header.site, header.contribution, alone=alone) for alone in (True, False)]
    if file.path.name not in [f"{stem}{_SUFFIX}" for stem in stems]:
        raise VectorError(
            f"{file.path} holds the masks of the site '{header.site}': it was renamed; merge again."
        )
    return header


def check_masks(file: StoredTensors, header: MaskHeader, merged: Tensors, base: Tensors) -> None:
    """Compare the tensors of a file of masks with those of the merged model and the base.

    Raises
    ------
    VectorError
        Names the tensor whose mask does not fit, or has no rescaler.
    """
    if odd := sorted(set(file.specs) ^ set(header.rescalers)):
        raise VectorError(
            f"{file.path}: the tensor '{odd[0]}' has a mask or a rescaler but not both."
        )
    for name, spec in file.specs.items():
        model, start = merged.specs.get(name), base.specs.get(name)
        if not (model and start and start.dtype.is_floating_point and start.shape == model.shape):
            raise VectorError(
                f"{file.path} has a mask of '{name}', which the merged model and the base do not "
                "both have as floats of one shape."
            )
        if spec != packed_spec(model):
            raise VectorError(
                f"{file.path}: the mask of '{name}' is {spec}, the merged model asks for "
                f"{packed_spec(model)}."
            )


def unmasked(merged: Tensors, base: Tensors, masks: Tensors, header: MaskHeader) -> Iterator[Part]:
    """A model close to a site's own, stretch by stretch, in the merged one's dtypes.

    Tensors with masks are theta_0 + r M * (theta_merged - theta_0), summed in float64; all others,
    such as heads, norm statistics and counters, are the merged model's.

    Raises
    ------
    NonFiniteError
        A value overflows.
    """
    for name, spec in merged.specs.items():
        for begin in range(0, spec.elements, BLOCK):
            size = min(BLOCK, spec.elements - begin)
            values = torch.empty(size, dtype=spec.dtype)
            merged.read_into(name, begin, values)
            if name in masks.specs:
                start = torch.empty(size, dtype=base.specs[name].dtype)
                base.read_into(name, begin, start)
                packed = torch.empty(-(-size // 8), dtype=torch.uint8)
                masks.read_into(name, begin // 8, packed)
                theta = start.double()
                own = (values.double() - theta) * header.rescalers[name] * unpack(packed, size)
                values = (theta + own).to(spec.dtype)
                where = f"the model of the site '{header.site}'"
                check_finite(values, name, where, "its masks are damaged; merge again.")
            yield Part(name, begin, values)

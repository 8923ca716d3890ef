"""What lies beside a merged model's weights, compared as the blocks of the rebuilt one come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from merge_kit import running
from merge_kit.checks import Check
from merge_kit.engine import Part
from merge_kit.errors import MergeKitError
from merge_kit.running import FOLDER, RECORD, SUMS, Recorder, Sums, sum_specs
from merge_kit.sitemasks import MASKS, by_name, checked_rescalers, metadata_of, pack, packed_spec
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec
from merge_kit.weighing import Source

EQUAL = "as merging again gives it"


class _Compared:
    """One safetensors file, and the first thing in it that is not as it should be."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.odd: str | None = None
        self._file: TensorFile | None = None
        self._seen: set[str] = set()
        try:
            self._file = stack.enter_context(TensorFile(path))
        except MergeKitError as error:
            self.odd = str(error)

    def add(self, name: str, begin: int, values: torch.Tensor, spec: TensorSpec) -> None:
        """A stretch that a tensor of the specification `spec` should have, bit by bit."""
        self._seen.add(name)
        if self.odd or self._file is None:
            return
        found = self._file.specs.get(name)
        if found != spec:
            self.odd = f"has {found or 'nothing'} for '{name}', merging again gives {spec}."
            return
        there = torch.empty_like(values)
        self._file.read_into(name, begin, there)
        if not torch.equal(there.view(torch.uint8), values.view(torch.uint8)):
            self.odd = f"differs in '{name}' from what merging again gives."

    def check(self, subject: str, metadata: Mapping[str, str]) -> Check:
        """What came of it, once all has been added."""
        if self._file and not self.odd:
            if extra := sorted(set(self._file.specs) - self._seen):
                self.odd = f"has the tensor '{extra[0]}', which merging again does not give."
            elif self._file.metadata != metadata:
                self.odd = "says other things of itself than merging again gives."
        return Check(subject, "differs", self.odd) if self.odd else Check(subject, "ok", EQUAL)


class MaskFiles:
    """The files of masks of a merged model; there are some when the first part has masks."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        specs: Mapping[str, TensorSpec],
        stack: ExitStack,
    ) -> None:
        self._folder, self._specs, self._stack = folder / MASKS, specs, stack
        self._sources = by_name(sources)
        self._files: dict[str, _Compared] = {}
        self._rescalers: dict[str, list[float]] = {}

    def add(self, part: Part) -> None:
        """Compare one stretch; see `checked_rescalers`."""
        if part.masks is None:
            return
        self._rescalers[part.name] = checked_rescalers(part)
        if not self._files:
            self._files = {n: _Compared(self._folder / n, self._stack) for n in self._sources}
        spec = packed_spec(self._specs[part.name])
        for row, file in zip(torch.from_numpy(pack(part.masks)), self._files.values(), strict=True):
            file.add(part.name, part.begin // 8, row, spec)

    def checks(self, merged: str) -> list[Check]:
        """One of each file; `merged` is the fingerprint of the rebuilt model."""
        return [
            file.check(
                f"{MASKS}/{name}",
                dict([metadata_of(self._sources[name], index, merged, self._rescalers)]),
            )
            for index, (name, file) in enumerate(self._files.items())
        ]


class SumFiles:
    """The files of a running sum."""

    def __init__(
        self,
        folder: Path,
        base: str,
        specs: Mapping[str, TensorSpec],
        groups: Sequence[Sequence[str]],
        sums: Sequence[Sums],
        stack: ExitStack,
    ) -> None:
        self._folder = folder / FOLDER
        self._specs = sum_specs(groups, specs)
        self._recorder = Recorder(base, groups, sums)
        self._file = _Compared(self._folder / SUMS, stack)

    def add(self, part: Part) -> None:
        """Compare one stretch; see `Recorder.add`."""
        if part.pair is not None:
            self._recorder.add(part.name, part.begin, part.pair)
            high = torch.from_numpy(part.pair[0])
            self._file.add(part.name, part.begin, high, self._specs[part.name])

    def checks(self) -> list[Check]:
        """One of each file."""
        sums = self._file.check(f"{running.FOLDER}/{SUMS}", {})
        subject = f"{FOLDER}/{RECORD}"
        same = has_bytes(self._folder / RECORD, self._recorder.to_bytes())
        if same is None:
            return [sums, Check(subject, "differs", "is missing, or cannot be read.")]
        text = EQUAL if same else "is not what merging again gives: merge with --keep-sum again."
        return [sums, Check(subject, "ok" if same else "differs", text)]


def has_bytes(path: Path, expected: bytes) -> bool | None:
    """Whether a file holds these very bytes; None where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return None
        with path.open("rb") as file:
            return file.read(len(expected) + 1) == expected
    except OSError:
        return None

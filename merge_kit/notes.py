"""Figures that first passes found, noted by the content of the vectors they were measured on.

A threshold speaks of one vector, an inner product of two: when another vector arrives or one is
withdrawn, those of the others are still right, and are not measured again. What is noted changes
no result, it only saves a reading; a note that was damaged or cannot be written is measured anew,
and a folder that belongs to somebody else, or that others may write to, is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit.errors import MergeKitError
from merge_kit.files import canonical_json, sha256_bytes, write_atomic
from merge_kit.remembered import is_private
from merge_kit.strictjson import loads

LIMIT = 200
"""Notes that are kept; above it the oldest go."""
_OURS = "[0-9a-f]" * 64 + ".json"


@dataclass(frozen=True, slots=True)
class Notes:
    """A folder of notes on vectors of one base."""

    folder: Path
    base: str
    """Fingerprint of the base."""

    def read(self, subject: Sequence[Any]) -> dict[str, list[float]]:
        """What was measured on a subject: figures by the ids of the vectors."""
        try:
            if not is_private(self.folder):
                return {}
            note = loads(self._place(subject).read_bytes())
            figures: dict[str, list[float]] = note["figures"]
            sound = note["digest"] == sha256_bytes(canonical_json(figures))
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return figures if sound else {}

    def add(self, subject: Sequence[Any], figures: Mapping[str, list[float]]) -> None:
        """Note further figures on a subject."""
        known = {**self.read(subject), **figures}
        with suppress(OSError, ValueError, MergeKitError):  # JSON has no infinity
            note = {"figures": known, "digest": sha256_bytes(canonical_json(known))}
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(self.folder):
                write_atomic(self._place(subject), canonical_json(note))
                self._prune()

    def _place(self, subject: Sequence[Any]) -> Path:
        name = sha256_bytes(canonical_json([self.base, *subject])).removeprefix("sha256:")
        return self.folder / f"{name}.json"

    def _prune(self) -> None:
        notes = sorted(self.folder.glob(_OURS), key=lambda path: path.stat().st_mtime_ns)
        for path in notes[:-LIMIT]:
            path.unlink(missing_ok=True)

"""The one interface that every storage offers. A hub knows names and bytes, never tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol


class Hub(Protocol):
    """Where contributions lie. Names are relative, with forward slashes."""

    @property
    def uri(self) -> str:
        """How a user writes this hub."""

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted; nothing when the folder is not there."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file."""

    def fetch(self, name: str) -> Path:
        """A local path with the bytes of a file of any size."""

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Put a whole folder in place, all files or none; False when it is there already."""

    def replace(self, name: str, data: bytes) -> None:
        """Replace the federation file; nothing else on a hub is ever rewritten."""

"""Files that somebody takes for a policy and that no command reads."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from merge_kit.errors import PolicyError
from merge_kit.schema import shown

_ALIKE = 0.7
"""Of the letters of "policy": `policies` and `site-policy` are alike too, `public` is not."""


def refuse_misnamed(folder: Path, remedy: str, *but: str) -> None:
    """Refuse a file such as ``policy.yml``, ``Policy.yaml``, ``policy.yaml.txt`` or ``polcy.yaml``:
    who wrote it believes in a policy that is not there. Backups of editors are let be.

    Raises
    ------
    PolicyError
        Names the file; `remedy` says what to do with it.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if name not in but and _resembles(name) and not (folder / name).is_dir():
            raise PolicyError(f"{folder}/{shown(name)} is read by nobody: {remedy}")


def _resembles(name: str) -> bool:
    plain = name.casefold().strip().removeprefix(".").removesuffix(".txt")
    stem, _, ending = plain.partition(".")
    alike = difflib.SequenceMatcher(None, stem, "policy").ratio() >= _ALIKE
    return alike and ending in ("", "yaml", "yml", "json", "toml")

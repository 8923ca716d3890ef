"""What a run has done so far, line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.tasks import Report
from merge_kit.files import write_atomic


class RunLog:
    """metrics.jsonl: one line per step and validation, kept in step with the checkpoint."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path, self._report = path, report
        self._fresh = True

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "resumed":
            # Steps after the checkpoint are taken again: their lines would stand twice.
            kept = [line for line in self.lines() if line["step"] <= event["step"]]
            self._write(kept)
        elif kind in ("step", "validation"):
            if self._fresh and event["step"] == 0:
                self._write([])
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(event)) + "\n")
        self._fresh = False if kind in ("step", "validation", "resumed") else self._fresh
        self._report(event)

    def lines(self) -> list[dict[str, Any]]:
        """What has been logged; a line cut by a kill is left out."""
        if not self._path.is_file():
            return []
        found = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        write_atomic(self._path, "".join(json.dumps(dict(line)) + "\n" for line in lines))

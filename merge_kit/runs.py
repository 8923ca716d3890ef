"""A site's fine-tuning runs, as folders."""

from __future__ import annotations

from pathlib import Path

RUNS = "runs"
SUMMARY = "summary.json"


def latest_run(site_root: Path) -> Path | None:
    """The run that finished last, or None."""
    finished = (site_root / RUNS).glob(f"[!.]*/{SUMMARY}")
    newest = max(finished, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
    return newest.parent if newest else None

"""What was compared of a merged model, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared."""

    subject: str
    ok: bool
    text: str
    """What was found, or what differs and what that means."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was compared."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing differs."""
        return all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.verified:
            return "Verified: merging again gives the very tensors of this model."
        failed = [check.subject for check in self.checks if not check.ok]
        return f"Not verified: {len(failed)} of {len(self.checks)} differ: {', '.join(failed)}."

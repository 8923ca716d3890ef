"""What was compared of a merged model, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "differs", "unknown"]
"""Made again and equal, or as stated; not so; or nothing to compare it with."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    subject: str
    state: State
    text: str
    """What was found, or what differs and what that means."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was looked at."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing differs."""
        return not self._of("differs")

    @property
    def verdict(self) -> str:
        """One sentence, and one on what nobody can vouch for."""
        if failed := self._of("differs"):
            found = f"{len(failed)} of {len(self.checks)} differ: {', '.join(failed)}"
            return f"Not verified: {found}."
        found = "Verified: merging again gives the very tensors of this model."
        if unknown := self._of("unknown"):
            return f"{found} Nothing here vouches for {', '.join(unknown)}."
        return found

    def _of(self, state: State) -> list[str]:
        return [check.subject for check in self.checks if check.state == state]

"""Who may speak for a site, since when and how long: the keys of a federation file."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import field_validator

from merge_kit import signing
from merge_kit.errors import FederationError
from merge_kit.schema import Document, SiteName, Timestamp


class _Keyed(Document):
    """An entry with a public key."""

    name: SiteName
    public_key: str

    @field_validator("public_key")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        try:
            signing.parse_public_key(text)
        except FederationError as fault:
            raise ValueError(str(fault).rstrip(".")) from fault
        return text


class AdmittedSite(_Keyed):
    """A site that may contribute, and the key that speaks for it."""


class RetiredKey(_Keyed):
    """A key that its site has replaced: what says that it was made by then still counts."""

    until: Timestamp


class RevokedKey(_Keyed):
    """A key that may be in other hands: nothing that it has signed counts, whatever its date."""

    since: Timestamp


def same_key_twice(*groups: Sequence[_Keyed]) -> str | None:
    """A key that stands in two places."""
    keys = [entry.public_key for group in groups for entry in group]
    return next((key for key in keys if keys.count(key) > 1), None)

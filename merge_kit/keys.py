"""Who may speak for a site, since when and how long: the keys of a federation file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer

from merge_kit import signing
from merge_kit.addresses import check_address
from merge_kit.errors import FederationError
from merge_kit.schema import Document, SiteName, Timestamp


class _Keyed(Document):
    """An entry with a public key."""

    name: SiteName
    public_key: str
    hub: str | None = None
    """A hub of the site's own, where its contributions lie as well; None where it has none."""

    @field_validator("public_key")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        try:
            signing.parse_public_key(text)
        except FederationError as fault:
            raise ValueError(str(fault).rstrip(".")) from fault
        return text

    @field_validator("hub")
    @classmethod
    def _is_an_address(cls, text: str | None) -> str | None:
        if text is not None:
            check_address(text)
        return text

    @model_serializer(mode="wrap")
    def _without_an_empty_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was signed before there were hubs of sites must keep its bytes.
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if key != "hub" or value is not None}


class AdmittedSite(_Keyed):
    """A site that may contribute, and the key that speaks for it."""


class RetiredKey(_Keyed):
    """A key that its site has replaced: what says that it was made by then still counts."""

    until: Timestamp


class RevokedKey(_Keyed):
    """A key that may be in other hands: nothing that it has signed counts, whatever its date. Its
    site's own hub is still looked at: what an earlier key has signed or withdrawn lies there."""

    since: Timestamp


def same_key_twice(*groups: Sequence[_Keyed]) -> str | None:
    """A key that stands in two places."""
    keys = [entry.public_key for group in groups for entry in group]
    return next((key for key in keys if keys.count(key) > 1), None)

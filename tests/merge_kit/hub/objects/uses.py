"""Whatever can be asked of a hub."""

from __future__ import annotations

from tests.merge_kit.hub.contract import FILE, publish

USES = {
    "has": lambda hub: hub.has(FILE),
    "size": lambda hub: hub.size(FILE),
    "read": lambda hub: hub.read(FILE),
    "fetch": lambda hub: hub.fetch(FILE),
    "list": lambda hub: list(hub.list("contributions")),
    "publish": publish,
    "replace": lambda hub: hub.replace(FILE, b"two", b"one"),
    "remove": lambda hub: hub.remove(FILE),
}

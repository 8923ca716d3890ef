"""A federation of honest sites and one that attacks; what a merge makes of it before and after."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from merge_kit import signing, site
from merge_kit.contributions import SIGNATURE, bundle, folder_of
from merge_kit.federation import read_federation
from merge_kit.files import sha256_bytes
from merge_kit.manifest import Manifest


class Field:
    """Two honest sites, `north` and `south`, and `mallory`, who is admitted and attacks."""

    def __init__(self, hub, contribute, run_cli, ok, root):
        self.hub, self.contribute, self.run_cli, self.ok, self.root = (
            hub, contribute, run_cli, ok, root,
        )  # fmt: skip
        self.north = contribute("north", seed=1)
        self.south = contribute("south", seed=2)
        self.expected: dict[str, bytes] = {}
        self._merges = 0

    def key(self, name):
        return self.root / name / site.KEY_FILE

    def federation(self):
        return read_federation(self.hub.root)

    def model(self, *options, hub=None):
        """The weights and configuration that a merge gives."""
        self._merges += 1
        out = self.root / f"merged{self._merges}"
        self.ok("merge", hub or self.hub.root, "--out", out, *options)
        return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json")}

    def before(self, *options):
        """Keep what the honest rest gives before anything is attacked."""
        self.expected = self.model(*options)

    def refused(self, sentence, site_name, *options):
        """The merge stops with this sentence, writes nothing, and leaves the rest as it was."""
        out = self.root / "refused"
        result = self.run_cli("merge", self.hub.root, "--out", out, *options)
        assert result.exit_code == 1
        ending = f" Leave it out with --exclude {site_name} or --skip-refused.\n"
        assert result.stderr == f"Error: {sentence}{ending}"
        assert not out.exists()
        assert self.model("--skip-refused", *options) == self.expected
        shown = self.ok("status", self.hub.root)
        if "is not signed (" not in sentence and "that is not admitted" not in sentence:
            assert f"Refused: {sentence}" in shown

    def ignored(self, *options):
        """The merge is what it was."""
        assert self.model(*options) == self.expected

    def altered(self, parcel, **changes):
        return Manifest.model_validate({**parcel.manifest.model_dump(), **changes})

    def put(self, manifest, payload, signer, *, folder=None, context=signing.MANIFEST_CONTEXT):
        """A contribution as an attacker writes it; gives its folder."""
        signature = signing.sign(self.key(signer), context, manifest.to_bytes())
        place = folder or folder_of(manifest)
        self.hub.publish(place, bundle(manifest, payload, signature))
        return place

    def mallory(self, **options):
        """The attacker's own contribution, as sound as any, not on the hub any more."""
        parcel = self.contribute("mallory", seed=3, **options)
        shutil.rmtree(self.hub.root / folder_of(parcel.manifest))
        return parcel

    def signed_payload(self, content, norm=1.0, **options):
        """What an admitted site signs though it is no sound vector; gives how messages name it."""
        parcel = self.mallory(**options)
        data = content(parcel.payload) if callable(content) else content
        path = self.root / "attack.safetensors"
        path.write_bytes(data)
        stated = {"sha256": sha256_bytes(data), "size": len(data), "norm": norm}
        manifest = self.altered(parcel, payload=stated)
        self.put(manifest, path, "mallory")
        self.place = self.hub.root / folder_of(manifest)
        self.payload = self.place / "payload.safetensors"
        return f"contribution mallory/{manifest.id[:12]}"


@pytest.fixture
def field(hub, contribute, run_cli, ok, tmp_path: Path) -> Field:
    """See `Field`."""
    return Field(hub, contribute, run_cli, ok, tmp_path)


@pytest.fixture
def unsign(hub):
    return lambda parcel: (hub.root / folder_of(parcel.manifest) / SIGNATURE).unlink()

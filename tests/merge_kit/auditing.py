"""A merged model, and everything that somebody could change of it."""

from __future__ import annotations

import json

from merge_kit.contributions import folder_of
from merge_kit.federation import FEDERATION_FILE, read_federation
from merge_kit.tensorfile import write_tensors
from tests.merge_kit.helpers import load


class Bench:
    """A model that was merged from three sites, and everything that somebody could change."""

    def __init__(self, hub, contribute, run_cli, tmp_path):
        self.hub, self._run, self.folder = hub, run_cli, tmp_path / "merged"
        counts = [{"round": 30, "lobed": 5, "granular": 0}, None, None]
        self.parcels = [
            contribute(name, seed=seed, counts=count)
            for seed, (name, count) in enumerate(zip(("a", "b", "c"), counts, strict=True))
        ]
        self.places = [hub.root / folder_of(parcel.manifest) for parcel in self.parcels]
        self.labels = [f"{p.manifest.site}/{p.manifest.id[:12]}" for p in self.parcels]

    def merge(self, *options):
        result = self._run("merge", self.hub.root, "--out", self.folder, *options)
        assert result.exit_code == 0, result.stderr

    def verify(self, *options):
        result = self._run("verify", self.folder, "--hub", self.hub.root, *options)
        assert result.exit_code in (0, 1), result.exception
        return result

    def differing(self, *options):
        """The checks that failed, and what is said of them; the exit status must agree."""
        result = self.verify("--json", *options)
        report = json.loads(result.stdout)
        found = {c["subject"]: c["text"] for c in report["checks"] if c["state"] == "differs"}
        assert (result.exit_code == 1) is bool(found) is not report["verified"]
        return found

    def states(self, *options):
        """State and text of each check, by subject."""
        report = json.loads(self.verify("--json", *options).stdout)
        return {c["subject"]: (c["state"], c["text"]) for c in report["checks"]}

    @property
    def record(self):
        return json.loads((self.folder / "provenance.json").read_bytes())

    def state(self, **changes):
        (self.folder / "provenance.json").write_text(json.dumps({**self.record, **changes}))

    def state_of(self, site, **changes):
        """Change what is said of one site's contribution."""
        parts = [{**c, **(changes if c["site"] == site else {})}
                 for c in self.record["contributions"]]  # fmt: skip
        self.state(contributions=parts)

    def change_weights(self, change):
        """Other weights in the model, by a function of its tensors."""
        tensors = load(self.folder / "model.safetensors")
        change(tensors)
        write_tensors(self.folder / "model.safetensors", tensors, ("format", "pt"))

    def change_federation(self, **changes):
        federation = read_federation(self.hub.root).model_copy(update=changes)
        self.hub.replace(
            FEDERATION_FILE, federation.to_yaml().encode(), self.hub.read(FEDERATION_FILE)
        )

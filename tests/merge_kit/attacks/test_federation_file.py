"""The federation file in other hands: rolled back, changed, exchanged, or made to exhaust."""

from __future__ import annotations

import os

import pytest

from merge_kit import signing, site, trust
from merge_kit.cards import literal
from merge_kit.creation import create
from merge_kit.errors import FederationError
from merge_kit.federation import FEDERATION_FILE, Policy, parse_federation
from merge_kit.hub import FolderHub
from merge_kit.policies import POLICY_FILE
from merge_kit.trust import signed
from merge_kit.yamlfile import parse_yaml
from tests.conftest import CLASSES, write_run
from tests.merge_kit.helpers import says

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


class Place:
    """A signed federation with one site that has published."""

    def __init__(self, root, ok, run_cli):
        self.root, self.ok, self.run_cli = root, ok, run_cli
        self.folder = root / "clinic" / "hub"
        self.key = trust.default_key(self.folder)
        create(
            self.folder, name="cells", architecture="test_resnet", classes=CLASSES, weights="none",
            model_args={}, preprocessing={"input_size": (3, 32, 32), "crop_pct": 1.0},
            policy=Policy(), seed=1, key_file=self.key,
        )  # fmt: skip
        self.file = self.folder / FEDERATION_FILE
        self.site = root / "north"
        ok("join", self.folder, "--site", "north", "--folder", self.site)
        ok("admit", self.folder, "north", self.site / "keys" / "site.pub")
        self.run = self.site / "runs" / "one"
        write_run(site.open_site(self.site), self.run, seed=1)
        ok("publish", self.site, "--run", self.run)

    def federation(self):
        return parse_federation(parse_yaml(self.file.read_bytes(), "x", ValueError).data, "x")

    def refused(self, sentence, *command):
        """The command stops with this sentence, and nothing is written."""
        merge = ("merge", self.folder, "--out", self.root / "refused")
        result = self.run_cli(*(command or merge))
        assert result.exit_code == 1
        assert result.stderr == f"Error: {sentence}\n"
        assert not (self.root / "refused").exists()

    def model(self, out):
        self.ok("merge", self.folder, "--out", self.root / out)
        return (self.root / out / "model.safetensors").read_bytes()


@pytest.fixture
def place(tmp_path, ok, run_cli):
    return Place(tmp_path, ok, run_cli)


def test_a_federation_file_rolled_back(place):
    """To before a revocation."""
    before, old = place.model("a"), place.file.read_bytes()
    place.ok("admit", place.folder, "south", signing.create_key(place.root / "south.pem"))
    place.ok("revoke", place.folder, "south")
    now = place.file.read_bytes()
    place.file.write_bytes(old)
    place.refused(
        f"{place.file} has the serial number 2, and 4 was seen from this machine: somebody has put "
        "an older file in its place; ask the coordinator."
    )
    place.file.write_bytes(now)
    assert place.model("b") == before


def test_a_federation_file_changed_without_its_coordinator(place):
    text = place.file.read_bytes()
    place.file.write_bytes(text.replace(b"minimum_class_count: 5", b"minimum_class_count: 1"))
    assert place.file.read_bytes() != text
    place.refused(
        f"{place.file} is not as its coordinator has signed it: if you are the coordinator and "
        "have changed it, sign it with 'merge-kit sign'; else ask the coordinator."
    )


def exchanged(place, **changes):
    """Another contract in the same place."""
    other = place.federation().model_copy(update={"signature": None, **changes})
    if other.coordinator:
        other = signed(other, place.root / "evil.pem")
    place.file.write_text(other.to_yaml())
    return other.contract_hash


@pytest.mark.parametrize("stripped", [False, True], ids=["another key", "none"])
def test_a_federation_file_of_another_coordinator(place, stripped, monkeypatch, tmp_path):
    """Sites have pinned the contract at `join`; a merger has seen it on this hub before."""
    pinned = place.federation().contract_hash
    evil = signing.create_key(place.root / "evil.pem")
    found = exchanged(place, coordinator=None if stripped else evil)
    result = place.run_cli("merge", place.folder, "--out", place.root / "refused")
    assert result.exit_code == 1
    sentence = (
        f"Error: {place.file} is the contract {found}, and {pinned} with its coordinator's "
        "signature was seen there from this machine: somebody has put another federation in its "
        "place; ask the coordinator, and remove "
    )
    assert result.stderr.startswith(sentence)
    assert result.stderr.endswith(".contract if that is as it should be.\n")
    assert not (place.root / "refused").exists()
    monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path / "elsewhere"))  # the site's own pin
    place.refused(
        f"{place.folder} holds the contract {found}, site 'north' joined {pinned}: ask the "
        "coordinator, and join again if the change is wanted.",
        "publish", place.site, "--run", place.run,
    )  # fmt: skip


def test_references_that_explode_in_a_federation_file(place):
    place.file.write_text(BOMB)
    place.refused(f"{place.file}, line 2: a reference (*name) has no place here: write it out.")


def test_references_that_explode_in_a_policy(place):
    (place.site / POLICY_FILE).write_text(BOMB)
    place.refused(
        f"{place.site / POLICY_FILE}, line 2: a reference (*name) has no place here: write it "
        "out.", "publish", place.site, "--run", place.run,
    )  # fmt: skip


def test_a_key_twice_in_a_federation_file(place):
    lines = [*place.file.read_text().splitlines(), "sites: []"]
    place.file.write_text("\n".join(lines) + "\n")
    place.refused(
        f"{place.file}, line {len(lines)}: the key 'sites' stands there already, in line "
        f"{lines.index('sites:') + 1}: leave one of the two."
    )


@pytest.mark.parametrize(
    "name",
    ["a\x1b[2Jb", "a\nb", "a\u202eb", "a\u200bb", "a\x07b"],
    ids=["escape", "line", "override", "invisible", "bell"],
)
@pytest.mark.parametrize("field", ["classes", "architecture", "weights_source"])
def test_control_characters_in_a_federation_file(place, name, field):
    told = place.federation().model_dump(mode="json")
    told[field] = [name, "b"] if field == "classes" else name
    where = "classes.0" if field == "classes" else field
    with says(
        FederationError,
        f"federation.yaml: '{where}': control characters, line ends and invisible characters are "
        f"not allowed (got {name!r}).",
    ):
        parse_federation(told, "federation.yaml")


def test_markdown_in_the_names_of_classes(tmp_path, hub, contribute, ok):
    """A model card shows a name as it is written, whatever it is."""
    evil = "[x](http://evil)<img src=x>"
    folder = tmp_path / "evil"
    create(
        folder, name="cells", architecture="test_resnet", classes=(evil, "b"), weights="none",
        model_args={}, preprocessing={"input_size": (3, 32, 32)}, policy=Policy(), seed=1,
    )  # fmt: skip
    ok("join", folder, "--site", "north", "--folder", tmp_path / "n")
    ok("admit", folder, "north", tmp_path / "n" / "keys" / "site.pub")
    write_run(site.open_site(tmp_path / "n"), tmp_path / "n" / "runs" / "r", seed=1)
    ok("publish", tmp_path / "n", "--run", tmp_path / "n" / "runs" / "r")
    ok("merge", folder, "--out", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert evil not in card
    assert f"\n0. {literal(evil)}\n" in card
    assert literal(evil) == r"\[x\]\(http://evil\)\<img src=x\>"


def test_a_link_where_the_federation_file_grows(place):
    """Whoever may write to the hub does not write the coordinator's other files."""
    precious = place.root / "precious"
    precious.write_text("precious")
    os.symlink(precious, place.folder / ".federation.yaml.partial")
    place.ok("admit", place.folder, "south", signing.create_key(place.root / "south.pem"))
    assert precious.read_text() == "precious"
    assert FolderHub(place.folder).has(FEDERATION_FILE)
    assert not place.file.is_symlink()

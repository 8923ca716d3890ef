"""Names and links that lead elsewhere, and bytes that change between two readings."""

from __future__ import annotations

import shutil

import pytest

from merge_kit import pulling, signing
from merge_kit.contributions import MANIFEST, PAYLOAD, SIGNATURE, folder_of
from merge_kit.errors import HubError, TensorFileError
from merge_kit.files import canonical_json
from merge_kit.hub import FolderHub
from merge_kit.remembered import check_unchanged, look
from merge_kit.tensorfile import TensorFile
from merge_kit.vector import Measured, decoded, measure
from tests.merge_kit.helpers import says

ODD = {
    "path": "../north",
    "Cyrillic": "n\u043erth",
    "case": "North",
    "override": "north\u202e",
    "composed": "n\u00f6rth",
    "decomposed": "no\u0308rth",
    "dot": "north.",
    "space": "north ",
    "escape": "\x1b[2Jnorth",
    "hyphen": "-north",
}
RULE = "a name has 1 to 63 characters: a-z, 0-9, and hyphens inside"


def shown(text):
    return "".join(c if c.isprintable() else "?" for c in repr(text))


@pytest.mark.parametrize("kind", ODD)
def test_a_name_that_looks_like_anothers_or_leads_elsewhere(field, kind):
    """Nobody joins or is admitted by such a name."""
    name, key = ODD[kind], signing.create_key(field.root / "new.pem")
    before = field.hub.read("federation.yaml")
    joined = field.run_cli("join", field.hub.root, f"--site={name}", "--folder", field.root / "x")
    assert joined.exit_code == 1
    assert joined.stderr.startswith("Error: site '")
    assert joined.stderr.endswith(f"'name': {RULE} (got {shown(name)}).\n")
    admitted = field.run_cli("admit", "--", field.hub.root, name, key)
    assert admitted.exit_code == 1
    assert f"'name': {RULE} (got {shown(name)})." in admitted.stderr
    assert field.hub.read("federation.yaml") == before
    assert not (field.root / "x").exists()


@pytest.mark.parametrize("kind", ODD)
def test_a_name_in_a_manifest_that_leads_elsewhere(field, kind):
    field.before()
    parcel = field.mallory()
    told = {**parcel.manifest.model_dump(mode="json"), "site": ODD[kind]}
    told = {name: value for name, value in told.items() if value is not None}
    data = canonical_json(told)
    signed = signing.sign(field.key("mallory"), signing.MANIFEST_CONTEXT, data)
    files = {
        PAYLOAD: parcel.payload,
        SIGNATURE: canonical_json({"key": signed.key, "signature": signed.signature}),
        MANIFEST: data,
    }
    place = folder_of(parcel.manifest)
    field.hub.publish(place, files)
    field.refused(f"{place}/{MANIFEST}: 'site': {RULE} (got {shown(ODD[kind])}).", "mallory")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "\u202eb", ".hidden", "a\\b"])
def test_a_folder_whose_name_would_drive_a_terminal(field, name):
    """No publisher writes it, so nobody looks at it."""
    field.before()
    place = field.hub.root / folder_of(field.north.manifest)
    shutil.copytree(place, field.hub.root / "contributions" / name / place.name)
    shutil.copytree(place, place.with_name(name))
    field.ignored()
    said = field.ok("status", field.hub.root) + field.ok("pull", field.hub.root, field.root / "c")
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert sorted(p.name for p in (field.root / "c" / "contributions").iterdir()) == [
        "north", "south",
    ]  # fmt: skip


def test_a_folder_whose_name_looks_like_a_sites(field):
    """Cyrillic: its contribution is refused by the name in its manifest."""
    field.before()
    place, name = field.hub.root / folder_of(field.north.manifest), "n\u043erth"
    shutil.copytree(place, field.hub.root / "contributions" / name / place.name)
    field.refused(
        f"contributions/{name}/{place.name} holds contribution north/{place.name}: it was moved or "
        "changed; it is refused.", name,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "a\0b", ""])
def test_a_path_that_leads_out_of_a_hub(field, name):
    with says(HubError, f"'{name}' is no name inside a hub: it must be relative and plain."):
        field.hub.fetch(name)


@pytest.mark.parametrize("file", [PAYLOAD, MANIFEST, SIGNATURE])
def test_a_link_in_the_place_of_a_file(field, file):
    field.before("--exclude", "north")
    path = field.hub.root / folder_of(field.north.manifest) / file
    path.unlink()
    path.symlink_to("/etc/passwd")
    field.refused(f"{path} is a symbolic link: a hub must hold the files themselves.", "north")


def test_a_link_in_the_place_of_a_folder(field, tmp_path):
    field.before("--exclude", "north")
    folder = field.hub.root / "contributions" / "north"
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    field.refused(f"{folder} is a symbolic link: a hub must hold the files themselves.", "north")


def test_a_site_does_not_publish_through_a_link(field, tmp_path):
    """Nor does a withdrawal remove what lies behind one."""
    folder, outside = field.hub.root / "contributions" / "north", tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    sentence = f"{folder} is a symbolic link: a hub must hold the files themselves."
    with says(HubError, sentence):
        field.contribute("north", seed=7)
    with says(HubError, sentence):
        field.hub.remove(f"{folder_of(field.north.manifest)}/{PAYLOAD}")
    assert sorted(outside.rglob("*")) == before


def test_a_file_exchanged_after_it_was_checked(field):
    """What is merged is the very file that was looked at."""
    path = field.hub.root / folder_of(field.north.manifest) / PAYLOAD
    with TensorFile(path) as file:
        _, checked = look(decoded(file), Measured, measure)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-4] + bytes(4))
    with TensorFile(path) as file, pytest.raises(TensorFileError, match="changed after it was"):
        check_unchanged(file, checked)


@pytest.mark.parametrize("link", [False, True], ids=["other bytes", "a link"])
def test_a_payload_exchanged_while_it_is_copied(field, monkeypatch, link, tmp_path):
    """Between the digest and the copy: nothing of it stays in the copy."""
    there = field.hub.root / folder_of(field.north.manifest) / PAYLOAD
    digest = pulling.sha256_file

    def then_exchanged(path):
        found = digest(path)
        if path == there:
            path.unlink()
            path.symlink_to("/etc/passwd") if link else path.write_bytes(b"other")
        return found

    monkeypatch.setattr(pulling, "sha256_file", then_exchanged)
    done = pulling.pull(field.hub, tmp_path / "copy")
    place = f"{field.hub.root}/{folder_of(field.north.manifest)}"
    assert done.left_out == [f"{place}/{PAYLOAD} changed while it was copied."]
    assert done.new == 1
    assert [p.name for p in (tmp_path / "copy").rglob(PAYLOAD)] == [PAYLOAD]
    assert field.model(hub=tmp_path / "copy") == field.model("--exclude", "north")


class TwoFaced(FolderHub):
    """Gives other bytes when a file is read again."""

    def __init__(self, root, name, other):
        super().__init__(root)
        self.name, self.other, self.asked = name, other, 0

    def read(self, name):
        if name == self.name:
            self.asked += 1
            if self.asked > 1:
                return self.other
        return super().read(name)


@pytest.mark.parametrize("file", [MANIFEST, SIGNATURE])
def test_a_hub_that_gives_other_bytes_the_second_time(field, file, tmp_path):
    """What was checked is what is copied."""
    name = f"{folder_of(field.north.manifest)}/{file}"
    pulling.pull(TwoFaced(field.hub.root, name, b"other"), tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_bytes() == field.hub.read(name)
    assert field.model(hub=tmp_path / "copy") == field.model()


def test_a_hub_that_gives_another_federation_the_second_time(field, tmp_path):
    other = field.federation().admit("evil", signing.create_key(tmp_path / "evil.pem"))
    hub = TwoFaced(field.hub.root, "federation.yaml", other.to_yaml().encode())
    pulling.pull(hub, tmp_path / "copy")
    assert hub.asked == 1
    assert (tmp_path / "copy" / "federation.yaml").read_bytes() == field.hub.read("federation.yaml")

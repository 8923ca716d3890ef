"""Addresses of hubs in a federation's file."""

from __future__ import annotations

import re

import pytest

from merge_kit.addresses import check_address, full_address
from merge_kit.errors import HubError

GOOD = [
    "/mnt/share/north",
    "/mnt/Shared Drive/north",
    "hf+https://huggingface.co/north-hospital/cells",
    "hf+https://hub.example.org/artifactory/api/huggingfaceml/models/north/cells",
    "hf+http://127.0.0.1:8000/north/cells",
    "s3://north/cells",
    "s3://north",
    "gs://north/cells",
    "az://north/cells",
    "sftp://north@host.example.org:2222/~/cells",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_full_address_is_taken_and_stays_as_it_is(text):
    check_address(text)
    assert full_address(text) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a hub in a folder is written as its absolute path"),
        ("hub", "a hub in a folder is written as its absolute path"),
        ("/", "a hub in a folder is written as its absolute path"),
        ("/a/../b", "a hub in a folder is written as its absolute path"),
        ("/a/b/", "a hub in a folder is written as its absolute path"),
        ("hf://north/cells", "write the address in full, as hf+https://host/owner/name"),
        ("file:///a", "write the address in full"),
        ("http://a/b/c", "write the address in full"),
        ("hf+https://user:secret@hub/north/cells", "holds no credentials"),
        ("s3://key:secret@north/cells", "holds no credentials"),
        ("s3://key@north/cells", "holds no credentials"),
        ("sftp://north:secret@host/cells", "holds no credentials"),
        ("s3://north/cells?token=1", "no spaces"),
        ("s3://north/a b", "no spaces"),
        ("s3:///cells", "write the address as s3://bucket/folder"),
        ("s3://north/../south", "write the address as s3://bucket/folder"),
        ("s3://north/cells/", "write the address as s3://bucket/folder"),
        ("hf+https://hub.example.org/north", "write the address as hf+https://host/owner/name"),
        ("hf+https://hub:port/north/cells", "write the address as hf+https://host/owner/name"),
        ("/a\nb", "one printable line"),
        ("/" + "a" * 1000, "one printable line of at most 1000 letters"),
    ],
)
def test_what_others_could_misread_and_secrets_are_refused(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_address(text)


def test_a_users_address_is_written_so_that_everybody_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert full_address("north") == str(tmp_path / "north")
    assert full_address(f"file://{tmp_path}/north/") == str(tmp_path / "north")
    assert full_address("hf://north/cells") == "hf+https://huggingface.co/north/cells"
    assert full_address("s3://north/cells/") == "s3://north/cells"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org/models")
    assert full_address("hf://north/cells") == "hf+https://hub.example.org/models/north/cells"
    full = "hf+https://huggingface.co/north/cells"
    assert full_address(full) == full


def test_a_secret_in_an_address_is_not_shown():
    with pytest.raises(HubError) as refused:
        full_address("s3://key:secret@north/cells")
    assert "secret" not in str(refused.value)

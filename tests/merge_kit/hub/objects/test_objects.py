"""A hub in an object store: the contract, and what is such a hub's own."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import tracemalloc

import pytest

from merge_kit import contributions, withdrawals
from merge_kit.errors import HubError, MissingExtraError
from merge_kit.hub import objects, open_hub
from merge_kit.hub.objects import PIECE
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import ENTRY, FILE, RemoteContract, digest_of, publish
from tests.merge_kit.hub.objects.conftest import LARGE, SECRET

MANIFEST, PAYLOAD = f"{ENTRY}/manifest.json", f"{ENTRY}/payload.safetensors"
WHOLE = [MANIFEST, f"{ENTRY}/manifest.sig", PAYLOAD]


class TestObjects(RemoteContract):
    """The contract."""


class TestUnderNoFolder(RemoteContract):
    """The contract, where a hub has a bucket to itself."""

    @pytest.fixture
    def uri(self, bucket):
        return f"s3://{bucket}"


def test_what_an_entry_is_committed_by_is_what_those_who_read_it_ask_for():
    assert objects.LAST == {
        contributions.ROOT: contributions.MANIFEST, withdrawals.ROOT: withdrawals.FILE
    }  # fmt: skip


# Where it is


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_an_address_is_shown_as_it_is_written(surroundings, monkeypatch, scheme):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert open_hub(f"{scheme}://bucket/some/folder/").uri == f"{scheme}://bucket/some/folder"
    assert open_hub(f"{scheme}://bucket").uri == f"{scheme}://bucket"


@pytest.mark.parametrize("rest", ["AKIA:hush@bucket/x", "bucket/x?key=hush", "bucket#hush"])
def test_an_address_with_credentials_is_refused_and_not_shown(surroundings, rest):
    with says(
        HubError,
        "the address of a hub is written as s3://bucket/folder and nothing more: credentials are "
        "given by environment variables.",
    ):
        open_hub(f"s3://{rest}")


def test_an_address_without_a_bucket_is_refused(surroundings):
    with says(HubError, "'s3:///x' names no bucket: write it as s3://bucket/folder."):
        open_hub("s3:///x")
    with says(HubError, "'a/../b' is no name inside a hub: it must be relative and plain."):
        open_hub("s3://bucket/a/../b")


def test_a_folder_hub_never_loads_the_library(tmp_path):
    code = (
        "import sys; from merge_kit.hub import open_hub; open_hub(sys.argv[1]); "
        "assert 'obstore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)


def test_without_the_library_the_extra_is_named(tmp_path):
    (tmp_path / "obstore.py").write_text("raise ModuleNotFoundError(name='obstore')")
    code = (
        "import sys; from merge_kit.hub import open_hub\n"
        "try: open_hub('s3://bucket/x')\nexcept Exception as e: print(type(e).__name__, e)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), "."])
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.stdout.strip() == (
        f"{MissingExtraError.__name__} a hub in an object store needs the extra 's3', which is "
        "not installed: run pip install 'merge-kit[s3]'."
    )


def test_nothing_that_is_shown_of_a_hub_has_credentials(hub):
    for text in (repr(hub), str(hub), hub.uri, repr(hub._store)):
        assert SECRET not in text


# What is on the way


def test_large_files_go_in_parts_and_come_in_pieces(hub, again, large, line, keys):
    with line.counted() as sent:
        assert publish(hub, large) is True
    assert sum("partNumber" in request for request in sent) == 2 + 2  # and two copies
    with line.counted() as asked:
        assert again().fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE
    assert sum(request.startswith("GET") for request in asked) == 2
    assert keys() == WHOLE


def test_large_files_take_no_more_memory_than_small_ones(uri, line, tmp_path):
    """Measured in a process of its own: the library's memory is not Python's."""
    code = (
        "import resource, sys; from pathlib import Path; from merge_kit.hub import open_hub\n"
        "hub, size = open_hub(sys.argv[1]), int(sys.argv[2])\n"
        "file = Path(sys.argv[3])\n"
        "with file.open('wb') as out: out.truncate(size)\n"
        "hub.publish('contributions/north/a', {'payload': file, 'manifest.json': b'm'})\n"
        "hub.fetch('contributions/north/a/payload')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for size in (2 * PIECE, 8 * PIECE):
        done = subprocess.run(
            [sys.executable, "-c", code, f"{uri}/{size}", str(size), tmp_path / "file"],
            check=True, timeout=120, capture_output=True, text=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 3 * PIECE


def test_publishing_asks_for_little(hub, line):
    """One look, three questions whether the storage refuses, three files, one look for litter."""
    with line.counted() as sent:
        publish(hub)
    assert [request.split()[0] for request in sent] == [
        "HEAD", "GET", "PUT", "PUT", "POST", "PUT", "PUT", "PUT", "GET"
    ]  # fmt: skip
    with line.counted() as sent:
        publish(hub, folder="contributions/north/second")
    assert [request.split()[0] for request in sent] == ["HEAD", "PUT", "PUT", "PUT", "GET"]


def test_a_small_file_is_read_by_one_request(hub, line):
    publish(hub)
    with line.counted() as asked:
        assert hub.read(MANIFEST) == b"m"
    assert len(asked) == 1


@pytest.fixture
def crowded(server, bucket):
    """300 contributions of 100 sites, and half of one."""
    names = [f"contributions/site-{n % 100}/{n:064x}" for n in range(300)]
    files = [
        f"{name}/{file}"
        for name in names
        for file in ("payload.safetensors", "manifest.sig", "manifest.json")
    ]
    for file in [*files, "contributions/late/1/payload.safetensors"]:
        connection = http.client.HTTPConnection("127.0.0.1", server)
        connection.request("PUT", f"/{bucket}/some/folder/{file}", b"x")
        assert connection.getresponse().status == 200
        connection.close()
    return names


def test_hundreds_of_contributions_are_listed_by_one_request_in_little_memory(crowded, hub, line):
    """One for each thousand files, however many sites there are."""
    tracemalloc.start()
    with line.counted() as asked:
        found = [
            f"contributions/{site}/{name}"
            for site in hub.list("contributions")
            for name in hub.list(f"contributions/{site}")
        ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(found) == sorted(crowded)
    assert len(asked) == 1
    assert peak < 2 * 2**20


def test_names_are_listed_sorted(hub):
    """A store sorts whole paths, where 'a-b/x' stands before 'a/x'."""
    for site in ("a-b", "a", "b"):
        for entry in ("y-z", "y"):
            publish(hub, folder=f"contributions/{site}/{entry}")
    assert list(hub.list("contributions")) == ["a", "a-b", "b"]
    assert list(hub.list("contributions/a-b")) == ["y", "y-z"]


def test_a_list_is_as_new_as_the_one_before_it_at_most(hub, again):
    publish(hub)
    assert list(hub.list("contributions")) == ["north"]
    publish(again(), folder="contributions/north/second")
    assert list(hub.list("contributions/north")) == ["abc"]  # seen together with the sites
    assert list(hub.list("contributions/north")) == ["abc", "second"]


# What is not whole


def test_an_entry_without_its_manifest_is_not_there(hub, other, bucket):
    for name in ("payload.safetensors", "manifest.sig"):
        other.put_object(Bucket=bucket, Key=f"some/folder/{ENTRY}/{name}", Body=b"s")
    other.put_object(
        Bucket=bucket, Key="some/folder/withdrawals/north/abc/withdrawal.sig", Body=b""
    )
    for folder in ("contributions", "contributions/north", ENTRY):
        assert list(hub.list(folder)) == []
    for folder in ("withdrawals", "withdrawals/north", "withdrawals/north/abc"):
        assert list(hub.list(folder)) == []


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_next_publisher_completes_what_was_broken_off(
    hub, again, large, other, bucket, keys, size, line
):
    payload = large if size == "large" else b"payload"
    body = LARGE if size == "large" else payload
    other.put_object(Bucket=bucket, Key=f"some/folder/{PAYLOAD}", Body=body)
    other.put_object(Bucket=bucket, Key=f"some/folder/{ENTRY}/.payload.0123", Body=b"litter")
    assert publish(hub, payload) is True
    assert again().fetch(PAYLOAD, digest_of(body)).read_bytes() == body
    assert keys() == WHOLE


@pytest.mark.parametrize(
    "body", [b"PAYLOAD", b"payloa", LARGE[:-1] + b"?", LARGE + b"."],
    ids=["others", "fewer", "large others", "large more"],
)  # fmt: skip
def test_other_bytes_under_the_same_name_are_never_overwritten(
    hub, large, other, bucket, keys, body
):
    other.put_object(Bucket=bucket, Key=f"some/folder/{PAYLOAD}", Body=body)
    with says(
        HubError,
        f"{hub.uri}/{PAYLOAD} is there already with other bytes: ask the coordinator to remove "
        "this folder, then publish again.",
    ):
        publish(hub, large if len(body) > 9 else b"payload")
    assert keys() == [PAYLOAD]
    assert other.get_object(Bucket=bucket, Key=f"some/folder/{PAYLOAD}")["Body"].read() == body


def test_eight_publishers_of_a_large_entry_leave_one_and_no_litter(hub, again, large, keys):
    answers, faults, barrier = [], [], threading.Barrier(8)

    def go():
        own = again()
        barrier.wait()
        try:
            answers.append(publish(own, large))
        except HubError as error:
            faults.append(str(error))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(answers) == [False] * 7 + [True]
    assert keys() == WHOLE
    assert again().fetch(PAYLOAD, digest_of(LARGE))


def test_eight_coordinators_replace_one_after_another(hub, again):
    """Each adds a line to what it has read, as often as it takes: none is lost."""
    hub.replace(FILE, b"", None)

    def go(number):
        own = again()
        while True:
            before = own.read(FILE)
            try:
                own.replace(FILE, before + b"%d\n" % number, before)
                return
            except HubError as error:
                assert "changed by somebody else meanwhile" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=go, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hub.read(FILE).split()) == [b"%d" % n for n in range(8)]


def test_a_file_beyond_what_a_store_takes_is_refused_before_anything_is_sent(hub, tmp_path, keys):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(5 * 2**30 + 1)
    with says(
        HubError,
        "payload.safetensors has 5368709121 bytes, and an object store takes 5368709120 at most: "
        "send less with publish --compress.",
    ):
        publish(hub, tmp_path / "huge")
    assert keys() == []


def test_a_file_that_is_gone_is_named_before_anything_is_sent(hub, tmp_path, keys):
    with says(
        HubError,
        f"{hub.uri}/{ENTRY} cannot be written: {tmp_path}/gone: No such file or directory: run the "
        "command that makes this file again.",
    ):
        publish(hub, tmp_path / "gone")
    assert keys() == []


# Who else is there


def test_files_of_others_beside_ours_are_invisible(hub, other, bucket):
    publish(hub)
    below = ("note.txt", "manifest.json", ".hidden/manifest.json", "a\\b/manifest.json")
    for key in (
        "", "x", "readme.txt", "/contributions/x/y/manifest.json", "contributions/", f"{ENTRY}/",
        f"{ENTRY}/deep/manifest.json", "contributions/.hidden/y/manifest.json",
        "contributions/a\\b/y/manifest.json", *(f"contributions/{name}" for name in below),
        *(f"contributions/north/{name}" for name in ("", *below)),
    ):  # fmt: skip
        for prefix in ("some/", "some/folder-2/", "some/folder/"):
            other.put_object(Bucket=bucket, Key=prefix + key, Body=b"")
    assert list(hub.list("contributions")) == ["north"]
    assert list(hub.list("contributions/north")) == ["abc"]
    assert list(hub.list(ENTRY)) == ["deep", *(name.rpartition("/")[2] for name in WHOLE)]


def test_a_bucket_that_keeps_old_versions_says_so(hub, again, other, bucket):
    """What was removed can be brought back: a withdrawal must not claim otherwise."""
    other.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    publish(hub)
    assert hub.remove(PAYLOAD) is False
    assert not again().has(PAYLOAD)
    assert hub.remove(PAYLOAD) is True
    hub.replace(FILE, b"one", None)
    hub.replace(FILE, b"two", b"one")
    assert again().read(FILE) == b"two"


def test_what_is_removed_for_good_is_said_to_be(hub, keys):
    publish(hub)
    assert hub.remove(PAYLOAD) is True
    assert hub.remove(PAYLOAD) is True
    assert keys() == WHOLE[:2]


def test_a_file_of_no_bytes_is_a_file(hub, again):
    publish(hub, b"")
    assert again().size(PAYLOAD) == 0
    assert again().fetch(PAYLOAD, digest_of(b"")).read_bytes() == b""
    assert again().read(PAYLOAD) == b""

"""Objects whose names no publisher writes, in the bucket of a hub: they hide nothing."""

from __future__ import annotations

import contextlib
import re

import boto3
import pytest

from merge_kit.errors import HubError, UnreachableError
from merge_kit.hub.s3list import lister
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import ENTRY, FILE, publish
from tests.merge_kit.hub.objects.conftest import SECRET
from tests.merge_kit.hub.objects.proxy import cut_download, flip, redirect, slow, status
from tests.merge_kit.hub.objects.test_object_rights import as_user, strict_server  # noqa: F401

NAMES = ["manifest.json", "manifest.sig", "payload.safetensors"]
ODD = {
    "empty part": "north//x", "two empty parts": "//", "parent": "../x", "here": "north/./e/x",
    "escape": "no\x1b[2Jrth/e/manifest.json", "tab": "north/e\t/manifest.json",
    "delete": "north/e\x7f/manifest.json", "no end": "north/abc/", "parent entry": "north/../x",
    "backslash": "north\\x/e/manifest.json", "plus and blank": "north/a +%2B/x",
    "override": "north/\u202emanifest/manifest.json", "in an entry": "north/abc//manifest.json",
    "long": "north/" + "x" * 900 + "//",
}  # fmt: skip


def put(other, bucket, key, place="some/folder/contributions/"):
    other.put_object(Bucket=bucket, Key=f"{place}{key}", Body=b"")


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_name_is_left_out_and_hides_nothing(hub, again, other, bucket, odd):
    publish(hub)
    put(other, bucket, ODD[odd])
    assert list(again().list("contributions")) == ["north"]
    assert list(again().list("contributions/north")) == ["abc"]
    assert list(again().list(ENTRY)) == NAMES
    assert again().read(f"{ENTRY}/manifest.json") == b"m"
    assert publish(again()) is False
    assert publish(again(), folder="contributions/south/e") is True
    assert list(again().list("contributions")) == ["north", "south"]


def test_all_of_them_at_once_hide_nothing(hub, again, other, bucket):
    for number in range(3):
        publish(hub, folder=f"contributions/s{number}/e")
    for key in ODD.values():
        for place in ("", "some/folder/", "some/folder/contributions/", f"some/folder/{ENTRY}/"):
            put(other, bucket, key, place)
    fresh = again()
    assert list(fresh.list("contributions")) == ["s0", "s1", "s2"]
    assert list(fresh.list("contributions/s1")) == ["e"]
    assert not again().has(FILE)
    assert list(again().list("withdrawals")) == []


def test_a_hub_with_a_bucket_to_itself(again, other, bucket):
    hub = again(f"s3://{bucket}")
    publish(hub)
    for key in ("//", "../x", "a\x1bb"):
        put(other, bucket, key, "")
        put(other, bucket, key, "contributions/")
    assert list(again(hub.uri).list("contributions")) == ["north"]
    assert not again(hub.uri).has(FILE)


def test_printable_names_in_other_letters_are_listed(hub, again, other, bucket):
    """They are refused by name where they look like a site's; so are they beside odd ones."""
    put(other, bucket, "n\u043erth/e +%2B=\u00e9/manifest.json")
    for _ in range(2):
        fresh = again()
        assert list(fresh.list("contributions")) == ["n\u043erth"]
        assert list(fresh.list("contributions/n\u043erth")) == ["e +%2B=\u00e9"]
        put(other, bucket, "//")


def test_more_names_than_one_answer_has(hub, again, line, other, bucket):
    put(other, bucket, "a//b")
    for number in range(1100):
        put(other, bucket, f"s/e{number:04}/manifest.json")
    fresh = again()
    with line.counted() as sent:
        assert list(fresh.list("contributions")) == ["s"]
    assert sum("encoding-type=url" in request for request in sent) == 2
    assert list(fresh.list("contributions/s")) == [f"e{n:04}" for n in range(1100)]


def refusal_cut(handler, request):
    """A refusal that breaks off within a chunk of its body."""
    handler.wfile.write(
        b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n<Error>"
    )
    handler.cut(orderly=True)
    return True


def no_status(handler, request):
    """What begins like no answer of HTTP."""
    handler.server.proxy.ask(request)
    handler.wfile.write(b"HTSP/1.1 2OO\r\n\r\n")
    handler.cut(orderly=True)
    return True


def no_encoding(handler, request):
    """A page in an encoding that nobody knows as one of text."""
    page = handler.server.proxy.ask(request)
    page.body = page.body.replace(b"UTF-8", b"utf-7").replace(b"utf-8", b"utf-7")
    assert b"utf-7" in page.body
    handler.answer(page)
    return True


@pytest.mark.parametrize(
    "fault", [cut_download, status(503, "SlowDown"), flip, no_status, no_encoding],
    ids=["cut", "busy", "flipped", "no status", "no encoding"],
)  # fmt: skip
def test_a_fault_that_passes_is_not_noticed(hub, again, line, other, bucket, fault):
    publish(hub)
    put(other, bucket, "north//x")
    with line.faulty("encoding-type", fault, times=1):
        with contextlib.suppress(AssertionError):  # one bit of a name is a name, too
            assert list(again().list("contributions")) == ["north"]
    assert list(again().list("contributions")) == ["north"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (status(503, "SlowDown"), "{host} answers '503 SlowDown' each time: try again later."),
        (status(403, "InvalidAccessKeyId"), "{host} does not accept the credentials for {uri} "
         "(403 InvalidAccessKeyId): check or renew them."),
        (redirect("http://127.0.0.1:9"), "{uri} lies in another region than was asked (307): set "
         "AWS_REGION to it."),
        (cut_download, "the connection to {host} broke off again and again: run the same command "
         "again."),
        (no_status, "the connection to {host} broke off again and again: run the same command "
         "again."),
    ],
    ids=["503", "403", "redirect", "cut", "no status"],
)  # fmt: skip
def test_a_fault_that_stays_is_named(hub, line, other, bucket, fault, told):
    put(other, bucket, "north//x")
    with (
        line.faulty("encoding-type", fault),
        says(UnreachableError, told.format(host=line.host, uri=hub.uri)),
    ):
        list(hub.list("contributions"))


def test_a_refusal_that_breaks_off_is_named(hub, line, other, bucket):
    put(other, bucket, "north//x")
    with (
        line.faulty("encoding-type", refusal_cut),
        pytest.raises(HubError, match="may not be listed"),
    ):
        list(hub.list("contributions"))


def test_a_store_that_is_silent_is_named(hub, line, other, bucket):
    put(other, bucket, "north//x")
    with (
        line.faulty("encoding-type", slow(4)),
        says(UnreachableError, f"{line.host} did not answer in 3 seconds: try again later."),
    ):
        list(hub.list("contributions"))


def test_a_right_that_is_missing_is_named(hub, line, other, bucket):
    put(other, bucket, "north//x")
    with (
        line.faulty("encoding-type", status(403, "AccessDenied")),
        says(
            HubError,
            f"{hub.uri}/contributions may not be listed with these credentials (403 AccessDenied): "
            "ask whoever runs the storage for the right to do so.",
        ),
    ):
        list(hub.list("contributions"))


def test_the_store_checks_the_signature(strict_server, as_user):  # noqa: F811
    """On a server that knows its users' keys."""
    port, users = strict_server
    key, secret = users["coordinator"]
    s3 = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id=key, aws_secret_access_key=secret,
    )  # fmt: skip
    s3.put_object(Bucket="bucket", Key="h/contributions/a b+//\x1b", Body=b"")
    assert list(as_user("reader").list("contributions")) == ["a"]
    with pytest.raises(UnreachableError, match="SignatureDoesNotMatch"):
        list(as_user("forger").list("contributions"))


def test_who_asks_is_read_of_the_environment_and_shows_no_secret(surroundings, monkeypatch):
    found = lister("bucket")
    assert found is not None
    assert (found.url, found.region) == ("https://s3.us-east-1.amazonaws.com/bucket", "us-east-1")
    assert SECRET not in repr(found)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    assert lister("b").url == "https://b.s3.eu-central-1.amazonaws.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://b.store.example.org/")
    assert lister("b").url == "https://b.store.example.org"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert lister("b").key is None


def test_without_keys_of_our_own_an_odd_name_is_named(open_apart, line, other, bucket, uri):
    """The library may find some, in Amazon's cloud; here nobody checks them."""
    put(other, bucket, "no\x1b[2Jrth/x")
    hub = open_apart()
    hub._lister = None
    with says(
        HubError,
        f"{hub.uri}/contributions holds an object with a name that no publisher writes, "
        "'some/folder/contributions/no?[2Jrth/x': have it removed from the bucket.",
    ):
        list(hub.list("contributions"))


def test_a_session_token_and_a_public_bucket(open_apart, line, other, bucket, monkeypatch):
    put(other, bucket, "north//x")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    assert list(open_apart().list("contributions")) == []
    sent = [h for r, h in zip(line.seen, line.headers, strict=True) if "encoding-type" in r]
    lower = {name.lower(): value for name, value in sent[-1].items()}
    assert lower["x-amz-security-token"] == "a-token"
    assert re.search("SignedHeaders=.*x-amz-security-token", lower["authorization"])
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert list(open_apart().list("contributions")) == []
    assert "authorization" not in {name.lower() for name in line.headers[-1]}

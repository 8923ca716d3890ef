"""Lines that break or are slow, storages that overwrite: nothing is lost, nothing half there."""

from __future__ import annotations

import re

import pytest

from merge_kit.errors import HubError, MergeKitError, UnreachableError
from merge_kit.hub.objectstores import Patience
from tests.merge_kit.helpers import listing, says
from tests.merge_kit.hub.contract import ENTRY, FILE, digest_of, publish
from tests.merge_kit.hub.objects.conftest import LARGE
from tests.merge_kit.hub.objects.proxy import (
    Answer,
    cut_answer,
    cut_download,
    cut_upload,
    flip,
    late,
    slow,
    status,
    without,
)
from tests.merge_kit.hub.objects.uses import USES

MANIFEST, PAYLOAD = f"{ENTRY}/manifest.json", f"{ENTRY}/payload.safetensors"
WHOLE = [MANIFEST, f"{ENTRY}/manifest.sig", PAYLOAD]


# Storages that would overwrite


@pytest.mark.parametrize("use", ["publish", "replace", "create"])
def test_a_storage_that_would_overwrite_is_refused(line, hub, again, large, keys, use):
    """The server does not hear of the condition, as one that does not know it."""
    hub.replace(FILE, b"one", None)
    fresh = again()
    header = "If-Match" if use == "replace" else "If-None-Match"
    with (
        line.faulty("PUT|POST", without(header)),
        says(
            HubError,
            f"{hub.uri} does not refuse to overwrite a file (conditional writes, If-None-Match and "
            "If-Match), so two publishers could destroy each other's work: use a storage that "
            "does, or a newer version of this one.",
        ),
    ):
        if use == "publish":
            publish(fresh)
        else:
            fresh.replace(FILE, b"two", b"one" if use == "replace" else None)
    assert again().read(FILE) == b"one"
    assert keys() == [FILE]


def test_a_storage_that_would_copy_over_a_file_is_refused(line, hub, large, keys):
    with (
        line.faulty("POST", without("If-None-Match")),
        pytest.raises(HubError, match="does not refuse to overwrite"),
    ):
        publish(hub, large)
    assert keys() == []
    with line.faulty("POST", without("If-None-Match")):
        assert publish(hub) is True  # nothing is copied


@pytest.mark.parametrize("pattern", ["PUT", "POST .*uploads"])
def test_a_storage_that_says_it_cannot_refuse_is_refused(line, hub, large, keys, pattern):
    with (
        line.faulty(pattern, status(501, "NotImplemented")),
        pytest.raises(HubError, match="does not refuse to overwrite"),
    ):
        publish(hub, large)
    assert keys() == []


# Lines that break


def another_each_time():
    """Answers whose first byte is another one each time."""
    numbers = iter(range(256))

    def fault(handler, request):
        answer = handler.server.proxy.ask(request)
        answer.body = bytes([next(numbers)]) + answer.body[1:]
        handler.answer(answer)
        return True

    return fault


def shortened(handler, request):
    """Half of the answer, which says that it is whole; what has a name of ours is no answer."""
    answer = handler.server.proxy.ask(request)
    handler.answer(Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))
    return True


def spoilt(name, other):
    """One of the answer's headers has another name."""

    def fault(handler, request):
        head, body = handler.packed(handler.server.proxy.ask(request))
        handler.wfile.write(re.sub(rf"(?i)\b{name}:".encode(), f"{other}:".encode(), head) + body)
        return True

    return fault


def parting(sent):
    """Where large publications begin to differ: what comes before is tested by small ones."""
    return next((n for n, request in enumerate(sent) if ".payload" in request), 0)


FAULTS = {
    "upload": cut_upload,
    "answer": cut_answer,
    "answer's body": cut_download,
    "senseless answer": shortened,
    "senseless header": spoilt("Date", "{ate"),
    "no ETag": spoilt("ETag", "ETah"),
    "503": status(503, "SlowDown"),
    "500": status(500, "InternalError"),
    "503 afterwards": status(503, after=True),
}


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        *(("small", name) for name in FAULTS),
        *(("large", name) for name in FAULTS if "answer" in name or "ET" in name),
    ],
)
def test_a_fault_that_passes_is_not_noticed(line, hub, again, large, keys, fault, size):
    """Each request of a publication in turn; what has gone through is not taken for another's."""
    payload = large if size == "large" else b"payload"
    with line.counted() as sent:
        publish(again(), payload, folder="contributions/north/unbroken")
    for number in range(parting(sent), len(sent)):
        folder = f"contributions/n{number}/e"
        with line.faulty("", FAULTS[fault], times=1, skip=number):
            publish(again(), payload, folder=folder)
        assert sorted(again().list(folder)) == [
            "manifest.json", "manifest.sig", "payload.safetensors"
        ]  # fmt: skip
    # An upload whose number was lost with the answer can be taken back by nobody.
    assert not any("/." in name for name in keys() if not name.startswith("unfinished"))


@pytest.mark.parametrize("fault", ["answer's body", "senseless answer"])
@pytest.mark.parametrize("folder", ["contributions", ENTRY])
def test_a_listing_that_breaks_off_is_asked_for_again(line, hub, again, fault, folder):
    """The library asks again where no answer came, and not where one has begun."""
    publish(hub)
    expected = list(again().list(folder))
    assert len(expected) in (1, 3)
    with line.faulty("GET .*list-type", FAULTS[fault], times=2), line.counted() as asked:
        assert list(again().list(folder)) == expected
    assert sum("list-type" in request for request in asked) == 3


def test_a_listing_that_always_breaks_off_is_named(line, hub):
    with (
        line.faulty("GET .*list-type", cut_download),
        line.counted() as asked,
        says(
            UnreachableError,
            f"the connection to {hub.uri} broke off again and again: run the same command again.",
        ),
    ):
        list(hub.list("contributions"))
    assert len(asked) == 1 + 2  # QUICK


@pytest.mark.parametrize(("size", "fault"), [("small", "answer"), ("large", "answer")])
def test_a_line_that_stays_dead_leaves_the_old_state_or_the_new_one(
    line, again, large, fault, size
):
    """Dead from each request on in turn; the same publication then goes on."""
    payload = large if size == "large" else b"payload"
    with line.counted() as sent:
        publish(again(), payload, folder="contributions/north/unbroken")
    seen = []
    for number in range(parting(sent), len(sent)):
        folder = f"contributions/n{number}/e"
        with line.faulty("", FAULTS[fault], skip=number):
            try:
                publish(again(), payload, folder=folder)
            except HubError as error:
                seen.append(str(error))
        there = list(again().list(f"contributions/n{number}"))
        whole = list(again().list(folder))
        assert (there, whole) in (
            ([], []), (["e"], ["manifest.json", "manifest.sig", "payload.safetensors"])
        )  # fmt: skip
        assert publish(again(), payload, folder=folder) is (not there)
        body = LARGE if size == "large" else b"payload"
        assert again().size(f"{folder}/payload.safetensors") == len(body)
    broken = f"the connection to {line.host} broke off again and again: run the same command"
    assert set(seen) == {f"{broken} again."}


def test_parts_that_do_not_arrive_are_taken_back(line, hub, large, keys):
    with line.faulty("partNumber=2", cut_upload), pytest.raises(HubError, match="broke off"):
        publish(hub, large)
    assert keys() == []


def test_a_download_that_breaks_off_goes_on(line, hub, large, again):
    publish(hub, large)
    with line.faulty(f"GET .*{PAYLOAD}", cut_download, times=2):
        assert again().fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_a_download_that_stays_broken_is_named_and_leaves_nothing(line, hub, large, again):
    publish(hub, large)
    fresh = again()
    with (
        line.faulty(f"GET .*{PAYLOAD}", cut_download, skip=1),
        says(
            UnreachableError,
            f"the connection to {hub.uri} broke off again and again: run the same command again.",
        ),
    ):
        fresh.fetch(PAYLOAD, digest_of(LARGE))
    assert listing(fresh._cache / "arriving") == []
    assert fresh.fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_a_download_that_is_damaged_is_refused_and_not_kept(line, hub, large, again):
    publish(hub, large)
    fresh = again()
    with (
        line.faulty(f"GET .*{PAYLOAD}", flip, times=1),
        pytest.raises(
            HubError, match=r"was promised as sha256:\w+ and arrived as sha256:\w+: it was damaged"
        ),
    ):
        fresh.fetch(PAYLOAD, digest_of(LARGE))
    assert fresh.fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


@pytest.mark.parametrize("damaged", [1, 3])
def test_a_damaged_reading_accuses_nobody_when_a_publication_goes_on(
    line, hub, other, bucket, keys, damaged
):
    """What a killed publisher has left is read again before it is called another's."""
    other.put_object(Bucket=bucket, Key=f"some/folder/{PAYLOAD}", Body=b"payload")
    with line.faulty(f"GET .*{PAYLOAD}", another_each_time(), times=damaged):
        assert publish(hub) is True
    assert keys() == WHOLE


def test_readings_that_are_always_damaged_are_named(line, hub, again, other, bucket, keys):
    other.put_object(Bucket=bucket, Key=f"some/folder/{PAYLOAD}", Body=b"payload")
    with (
        line.faulty(f"GET .*{PAYLOAD}", another_each_time()),
        says(
            UnreachableError,
            f"{hub.uri}/{PAYLOAD} arrives with other bytes each time: the connection damages "
            "them; take another one, then publish again.",
        ),
    ):
        publish(hub)
    assert publish(again()) is True
    assert keys() == WHOLE


def test_a_file_that_changes_while_it_is_read_is_not_mixed(line, hub, large, other, bucket):
    """Somebody else has written over it, which no publisher of ours does."""
    key = f"some/folder/{PAYLOAD}"
    other.put_object(Bucket=bucket, Key=key, Body=LARGE)

    def change(handler, request):
        other.put_object(Bucket=bucket, Key=key, Body=LARGE[::-1])
        return False

    with (
        line.faulty(f"GET .*{PAYLOAD}", change, times=1, skip=1),
        says(HubError, f"{hub.uri}/{PAYLOAD} was changed meanwhile: run the same command again."),
    ):
        hub.fetch(PAYLOAD)


def test_a_disk_that_is_full_here_is_named(hub, large, small_disk, again):
    publish(hub, large)
    fresh = again()
    fresh._cache = small_disk / "cache"
    with pytest.raises(MergeKitError, match=r"cannot be written: no space left \(0 MiB free\): "):
        fresh.fetch(PAYLOAD, digest_of(LARGE))
    assert listing(small_disk / "cache" / "arriving") == []


# Publishers that are faster


@pytest.mark.parametrize(
    ("size", "moment"), [("small", "PUT .*/[.]manifest"), ("large", f"POST .*{PAYLOAD}[?]uploads")]
)
def test_who_is_overtaken_finds_the_entry_there(line, hub, again, large, keys, size, moment):
    """The faster one has removed whatever was hidden: the slower one's trial, or its upload."""
    payload = large if size == "large" else b"payload"

    def overtake(handler, request):
        assert publish(again(), payload) is True
        return False

    with line.faulty(moment, overtake, times=1, skip=1 if size == "small" else 0):
        assert publish(hub, payload) is False
    assert keys() == WHOLE


# Lines that are slow


def test_a_server_that_does_not_answer_in_time_is_named(line, open_apart):
    hub = open_apart(patience=Patience(0.2, 1, 1, 0.01))
    with line.faulty("", slow(0.5)):
        for use in USES.values():
            with says(
                UnreachableError, f"{line.host} did not answer in 0.2 seconds: try again later."
            ):
                use(hub)


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_write_that_was_answered_too_late_is_looked_at(
    line, open_apart, again, size, large, keys
):
    """The library does not repeat it, for it may have gone through."""
    payload = large if size == "large" else b"payload"
    hub = open_apart(patience=Patience(1.5, 1, 1, 0.01))
    publish(hub, payload, folder="contributions/other/e")
    pattern = f"(PUT|POST) .*{PAYLOAD}" if size == "small" else f"POST .*{PAYLOAD}.uploadId"
    with line.faulty(pattern, late(2.0), times=1), line.counted() as sent:
        assert publish(hub, payload) is True
    step = "POST {}?uploadId" if size == "large" else "PUT {}"
    assert sum(step.format(f"/{hub.uri[5:]}/{PAYLOAD}") in request for request in sent) == 2
    assert [name for name in keys() if "north" in name] == WHOLE


def test_a_replacement_that_was_answered_too_late_is_looked_at(line, open_apart, again):
    hub = open_apart(patience=Patience(0.5, 1, 1, 0.01))
    hub.replace(FILE, b"zero", None)
    for before, after in ((b"zero", b"one"), (b"one", b"two")):
        with line.faulty(f"PUT .*{FILE}", late(1.0), times=1, skip=0 if before == b"one" else 3):
            hub.replace(FILE, after, before)
        assert again().read(FILE) == after


@pytest.mark.parametrize(
    "fault", [cut_answer, status(503, after=True), status(409, "ConditionalRequestConflict")],
    ids=["cut", "503", "409"],
)  # fmt: skip
def test_a_replacement_whose_answer_is_lost_is_not_taken_for_anothers(line, hub, again, fault):
    hub.replace(FILE, b"zero", None)
    hub.replace(FILE, b"one", b"zero")
    with line.faulty(f"PUT .*/{FILE}", fault, times=1):
        hub.replace(FILE, b"two", b"one")
    assert again().read(FILE) == b"two"
    fresh = again()
    hub.remove(FILE)
    with line.faulty(f"PUT .*/{FILE}", fault, times=1):
        fresh.replace(FILE, b"three", None)
    assert again().read(FILE) == b"three"


def test_a_conflict_that_has_written_nothing_is_tried_again(line, hub, again):
    """S3 answers 409 where two writes meet, and neither need have arrived."""
    with line.faulty(f"PUT .*{ENTRY}/[mp]", status(409, "ConditionalRequestConflict"), times=2):
        assert publish(hub) is True
    assert again().read(PAYLOAD) == b"payload"


def test_a_conflict_without_an_end_is_named(line, hub, keys):
    with (
        line.faulty(f"PUT .*{MANIFEST}", status(409, "ConditionalRequestConflict")),
        says(
            HubError,
            f"{hub.uri}/{MANIFEST} has been changed by somebody else meanwhile: run the same "
            "command again.",
        ),
    ):
        publish(hub)
    assert not hub.has(MANIFEST)

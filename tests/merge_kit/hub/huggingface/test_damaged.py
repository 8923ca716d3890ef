"""Bytes that a line changes on their way to or from the Hugging Face Hub: nothing is taken for what
it is not, and nothing ends in a traceback."""

from __future__ import annotations

import base64
import threading
from signal import SIGKILL

import pytest
from starlette.responses import Response

from merge_kit.errors import HubError, UnreachableError
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import ENTRY, FILE, digest_of, publish
from tests.merge_kit.hub.huggingface.conftest import NAME, opened, uri_of
from tests.merge_kit.hub.huggingface.test_faults import Clock
from tests.merge_kit.hub.killing import Publisher
from tests.merge_kit.hub.objects.proxy import Answer, Proxy, status

PAYLOAD = f"{ENTRY}/payload.safetensors"
MANIFEST = f"{ENTRY}/manifest.json"
FILES = {MANIFEST: b"m", f"{ENTRY}/manifest.sig": b"s", PAYLOAD: b"payload"}


@pytest.fixture
def line(server):
    """What lies between this machine and the server."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def hub(server, line):
    return opened(server, url=line.url)


def files(server):
    """All that lies in the repository, but for what it was made with."""
    found = server.repos[NAME].files()
    return {path: blob.data for path, blob in found.items() if path != ".gitattributes"}


def titles(server):
    """Of all commits but the first."""
    return [commit.title for commit in server.repos[NAME].commits.values()][1:]


# Answers

DAMAGED = {
    "no UTF-8": b'{"\xff\xfe": 1}', "cut": b'{"sha": "ab', "nothing": b"", "no object": b"null",
    "empty object": b"{}", "list": b"[]", "list of lists": b"[[1]]", "word": b'"x"',
    "other names": b'[{"tyqe": "file"}]', "no list": b'{"files": 1, "objects": null}',
}  # fmt: skip
ASKED = [("GET", "/api/models/"), ("GET", "/tree/"), ("POST", "/preupload/"),
         ("POST", "/objects/batch"), ("POST", "/commit/")]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("method", "part"), ASKED)
def test_an_answer_that_was_damaged_is_asked_for_again(server, method, part, damage):
    server.fault(method, part, "answer", Response(DAMAGED[damage], media_type="application/json"))
    assert publish(opened(server)) is True
    assert files(server) == FILES
    assert opened(server).fetch(PAYLOAD, digest_of(b"payload")).read_bytes() == b"payload"


@pytest.mark.parametrize("damage", ["no UTF-8", "no object", "word", "cut"])
@pytest.mark.parametrize(("method", "part"), ASKED)
def test_answers_that_are_always_damaged_end_in_one_sentence(server, method, part, damage):
    answer = Response(DAMAGED[damage], media_type="application/json")
    server.fault(method, part, "answer", answer, times=100)
    with pytest.raises(UnreachableError) as caught:
        publish(opened(server))
    assert "answers in a way that huggingface_hub" in str(caught.value)
    assert "\n" not in str(caught.value)
    server.faults.clear()
    assert files(server) == {}
    assert publish(opened(server)) is True


@pytest.mark.parametrize("wait", ["\xb2", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "", "9e9"])
def test_a_pause_that_is_no_number_of_seconds_is_not_waited_for(line, hub, monkeypatch, wait):
    waited = []
    monkeypatch.setattr("merge_kit.hub.repository.time", Clock(waited))
    with line.faulty("GET", status(429, headers={"Retry-After": wait}), times=1):
        assert not hub.has(FILE)
    assert [int(seconds) for seconds in waited] == [0]


def test_an_answer_that_does_not_say_what_is_missing_is_asked_for_again(line, hub):
    """That a folder is not there, and that a repository is not, differ by a header alone."""

    def unsaid(handler, request):
        answer = handler.server.proxy.ask(request)
        answer.headers = [each for each in answer.headers if each[0].lower() != "x-error-code"]
        assert answer.status == 404
        handler.answer(answer)
        return True

    with line.faulty("GET .*/tree/", unsaid, times=2):
        assert publish(hub) is True
    with line.faulty("GET .*/tree/", unsaid), pytest.raises(UnreachableError, match="has no repos"):
        publish(hub, folder="contributions/south/e")


def expired(handler, request):
    """What a storage says to an address whose time is over, by its own clock."""
    body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    handler.answer(Answer(403, [("Content-Type", "application/xml")], body))
    return True


def test_an_address_that_has_expired_is_asked_for_anew(line, server, hub):
    """Those for uploads are signed with a time in them: a slow upload may be longer."""
    server.upload_root = line.url
    with line.faulty("PUT .*/lfs/", expired, times=1):
        assert publish(hub) is True
    assert files(server) == FILES
    assert server.asked("POST", "/objects/batch") == 2


def test_addresses_that_always_have_expired_are_named(line, server, hub):
    server.upload_root = line.url
    with (
        line.faulty("PUT .*/lfs/", expired),
        says(
            UnreachableError,
            f"{line.host} gives addresses that have expired when they are used: its clock, or that "
            "of its storage, is wrong; ask whoever runs it.",
        ),
    ):
        publish(hub)
    assert files(server) == {}


# Commits


def changed(old, new):
    """The line makes other bytes of what a client sends."""

    assert len(old) == len(new)  # or its other headers would be wrong

    def fault(handler, request):
        assert old in request.body
        request.body = request.body.replace(old, new)
        return False

    return fault


CHANGES = {
    "content": (base64.b64encode(b"s"), base64.b64encode(b"S")),
    "name": (b"manifest.sig", b"manifest.siG"),
    "folder": (b"/abc/manifest.sig", b"/abd/manifest.sig"),
    "place": (b"contributions/north/abc/manifest.json", b"contributions/south/abc/manifest.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_commit_that_arrived_damaged_is_mended(server, line, hub, change):
    publish(opened(server), folder="contributions/other/e")
    with line.faulty("POST .*/commit/", changed(*CHANGES[change]), times=1):
        assert publish(hub) is True
    there = files(server)
    others = {path for path in there if path.startswith("contributions/other/e/")}
    assert len(others) == 3
    assert {path: data for path, data in there.items() if path not in others} == FILES
    assert titles(server)[1:] == [f"Add {ENTRY}", f"Mend: Add {ENTRY}"]


def killed_after_its_commit(server, line, tmp_path, monkeypatch, change):
    """A publisher whose commit the line has changed, and who is killed before it hears of it."""
    old, new = CHANGES[change]
    (tmp_path / "payload").write_bytes(b"payload")
    monkeypatch.setenv("HF_ENDPOINT", line.url)
    one, ended = Publisher(uri_of(line), ENTRY, tmp_path / "payload"), threading.Event()

    def fault(handler, request):
        changed(old, new)(handler, request)
        handler.server.proxy.ask(request)
        one.signal(SIGKILL)
        one.end()
        ended.set()
        return True

    with line.faulty("POST .*/commit/", fault, times=1):
        one.begin()
        assert ended.wait(60)


@pytest.mark.parametrize("change", CHANGES)
def test_a_commit_that_nobody_compared_is_mended_by_the_next_run(
    server, line, hub, tmp_path, monkeypatch, change
):
    killed_after_its_commit(server, line, tmp_path, monkeypatch, change)
    assert files(server) != FILES
    publish(opened(server), folder="contributions/other/e")
    assert publish(hub) is True
    assert {path: data for path, data in files(server).items() if "other" not in path} == FILES
    assert titles(server) == [f"Add {ENTRY}", "Add contributions/other/e", f"Mend: Add {ENTRY}"]
    assert publish(hub) is False
    assert len(titles(server)) == 3


def test_what_was_removed_is_not_taken_for_damage(server, line, hub):
    """A withdrawal takes the tensors back, and what is there then was never changed by a line."""
    publish(hub)
    hub.remove(PAYLOAD)
    assert publish(opened(server)) is False
    assert PAYLOAD not in files(server)


def test_what_others_do_while_a_commit_is_mended_stays(server, line, hub):
    def overtaken(handler, request):
        publish(opened(server), folder="contributions/other/e")
        return False

    with (
        line.faulty("POST .*/commit/", changed(*CHANGES["folder"]), times=1),
        line.faulty("POST .*/commit/", overtaken, times=1),
    ):
        assert publish(hub) is True
    there = files(server)
    assert sorted(path for path in there if "other" not in path) == sorted(FILES)
    assert sum("contributions/other/e/" in path for path in there) == 3


def test_a_commit_that_was_changed_into_anothers_file_is_named(server, line, hub):
    """What that file was is for its history: to mend it would be to write over what was there."""
    other = "contributions/north/abd/manifest.sig"
    opened(server).publish("contributions/north/abd", {"manifest.sig": b"o", "manifest.json": b"m"})
    with (
        line.faulty("POST .*/commit/", changed(*CHANGES["folder"]), times=1),
        pytest.raises(HubError) as caught,
    ):
        publish(hub)
    commit = server.repos[NAME].refs["main"]
    assert str(caught.value) == (
        f"commit {commit} of {hub.uri} arrived damaged and has changed {other}: take it back from "
        "the commit before, then run the same command again."
    )
    assert titles(server) == ["Add contributions/north/abd", f"Add {ENTRY}"]
    before = server.repos[NAME].commits[commit].parent
    assert server.repos[NAME].files(before)[other].data == b"o"


@pytest.mark.parametrize("times", [1, 2])
def test_a_listing_that_was_damaged_mends_nothing(server, line, hub, times):
    """What is wrong is believed when it is said twice in the same words."""
    seen = []

    def damaged(handler, request):
        seen.append(request.target)
        answer = handler.server.proxy.ask(request)
        answer.body = answer.body.replace(b"manifest", b"manif%dst" % len(seen))
        handler.answer(answer)
        return True

    with line.faulty("GET .*/tree/.*north", damaged, times=times, skip=2):
        assert publish(hub) is True
    assert len(seen) == times
    assert titles(server) == [f"Add {ENTRY}"]
    assert files(server) == FILES


def test_commits_that_always_arrive_damaged_are_named(server, line, hub):
    with (
        line.faulty("POST .*/commit/", changed(*CHANGES["content"])),
        says(
            HubError,
            f"{hub.uri} has {ENTRY}/manifest.sig with other bytes than were sent, several times: "
            "the connection damages them; take another one, have this file removed, and run the "
            "command again.",
        ),
    ):
        publish(hub)


def test_a_file_that_was_replaced_and_arrived_damaged_is_mended(server, line, hub):
    hub.replace(FILE, b"one", None)
    old, new = base64.b64encode(b"two"), base64.b64encode(b"twO")
    with line.faulty("POST .*/commit/", changed(old, new), times=1):
        hub.replace(FILE, b"two", b"one")
    assert files(server) == {FILE: b"two"}


def test_a_proposal_that_arrived_damaged_is_named(server, line, hub):
    with (
        line.faulty("POST .*/commit/", changed(*CHANGES["content"]), times=1),
        pytest.raises(HubError) as caught,
    ):
        publish(hub.by_pull_request())
    assert str(caught.value) == (
        f"{server.url}/{NAME}/discussions/1 arrived damaged, with other bytes than were sent: "
        "close it, and run the same command again."
    )
    assert files(server) == {}


def test_a_head_that_is_no_commit_is_asked_for_again(server, line, hub):
    oid = server.repos[NAME].refs["main"].encode()

    def damaged(handler, request):
        answer = handler.server.proxy.ask(request)
        answer.body = answer.body.replace(oid, b"x" + oid[1:])
        handler.answer(answer)
        return True

    with line.faulty("GET", damaged, times=1):
        assert publish(hub) is True


def test_an_answer_to_a_part_that_was_damaged_is_asked_for_again(server):
    """The library wraps what it raises over it."""
    server.part_size = 100_000
    server.fault("PUT", "/lfs/", "answer", Response(b""))  # without an ETag
    assert publish(opened(server), b"x" * 250_000) is True
    assert files(server)[PAYLOAD] == b"x" * 250_000


# Requests


@pytest.mark.parametrize(
    ("part", "old", "new", "told"),
    [
        ("preupload", b'"files"', b'"filex"', "400, Malformed request (KeyError)"),
        ("/commit/", b'"base64"', b'"base64 ', "400, Malformed request (JSONDecodeError)"),
    ],
)
def test_a_request_that_arrived_damaged_is_named(server, line, hub, part, old, new, told):
    server.upload_root = line.url
    with (
        line.faulty(f"POST .*{part}", changed(old, new)),
        says(
            UnreachableError,
            f"{line.host} finds a request wrong ({told}): run the same command again, it may have "
            "been damaged on its way; ask whoever runs it if it stays so.",
        ),
    ):
        publish(hub)
    assert files(server) == {}


def test_a_file_that_arrived_damaged_is_sent_again(server, line, hub):
    server.upload_root = line.url
    with line.faulty("PUT .*/lfs/", changed(b"payload", b"paYload"), times=1):
        assert publish(hub) is True
    assert files(server) == FILES


def test_a_question_whether_a_file_is_there_that_arrived_damaged_is_no_end(server, line, hub):
    server.upload_root = line.url
    with line.faulty("POST .*/info/lfs/verify", changed(b'"size":7', b'"size":8'), times=1):
        assert publish(hub) is True
    assert files(server) == FILES


def test_an_address_that_arrived_damaged_is_asked_for_anew(server, line, hub):
    def damaged(handler, request):
        answer = handler.server.proxy.ask(request)
        answer.body = answer.body.replace(b"/lfs/", b"/lfS/")
        handler.answer(answer)
        return True

    with line.faulty("POST .*/objects/batch", damaged, times=1):
        assert publish(hub) is True
    assert files(server) == FILES
    with (
        line.faulty("POST .*/objects/batch", damaged),
        pytest.raises(UnreachableError, match=r"finds a request wrong \(404, .*\): run the same"),
    ):
        publish(hub, b"other", "contributions/s/e")

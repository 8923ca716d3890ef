"""What is a hub's own on the Hugging Face Hub: commits, listings, other people's files."""

from __future__ import annotations

import pytest

from merge_kit.errors import HubError, UnreachableError, UsageError
from merge_kit.hub import by_pull_request, create_hub, open_hub, repository
from merge_kit.hub.huggingface import HuggingFaceHub
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import ENTRY, FILE, digest_of, publish
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER, opened, uri_of
from tests.merge_kit.hub.huggingface.repos import Blob
from tests.merge_kit.hub.huggingface.server import HubServer

PAYLOAD = f"{ENTRY}/payload.safetensors"


@pytest.fixture
def hub(server):
    return opened(server)


@pytest.fixture
def repo(server):
    """The repository as the server keeps it."""
    return server.repos[NAME]


def titles(repo):
    return [commit.title for commit in repo.commits.values()]


def somebody_commits(repo, **files):
    """What another publisher does meanwhile."""
    more = {name.replace("__", "/"): Blob(data) for name, data in files.items()}
    repo.add("main", {**repo.files(), **more}, "somebody else", "hospital")


def test_an_entry_is_one_commit(hub, repo):
    publish(hub)
    assert titles(repo) == ["initial commit", f"Add {ENTRY}"]


@pytest.mark.parametrize("size", [100, 1000, 3500])
def test_a_hub_without_xet_takes_files_in_one_piece_and_in_several(hub, server, size):
    server.part_size = 1000
    data = bytes(range(250)) * (size // 250) + b"x" * (size % 250)
    publish(hub, data)
    assert opened(server).fetch(PAYLOAD, digest_of(data)).read_bytes() == data
    assert not server.asked("GET", "xet")
    assert server.asked("POST", "/done") == (size > 1000)
    assert server.asked("POST", "/verify") == 1


def test_what_the_storage_has_already_is_not_sent_again(hub, server):
    publish(hub, b"the same" * 100)
    publish(hub, b"the same" * 100, "contributions/south/def")
    assert server.asked("PUT", "/lfs/") == 1


@pytest.mark.parametrize("status", [409, 412])
def test_whoever_is_overtaken_tries_again_and_uploads_once(hub, server, repo, status):
    server.fault("POST", "/commit/", "status", status, times=3)
    assert publish(hub) is True
    assert (server.asked("POST", "/commit/"), server.asked("PUT", "/lfs/")) == (4, 1)
    assert titles(repo) == ["initial commit", f"Add {ENTRY}"]


def just_before_the_commit(hub, monkeypatch, action):
    """Between a look at the head and the commit that is made for it."""
    original = hub.repository._api.create_commit

    def late(*arguments, **named):
        monkeypatch.setattr(hub.repository._api, "create_commit", original)
        action()
        return original(*arguments, **named)

    monkeypatch.setattr(hub.repository._api, "create_commit", late)


def test_whoever_is_overtaken_by_the_same_entry_finds_it_there(hub, server, repo, monkeypatch):
    just_before_the_commit(hub, monkeypatch, lambda: publish(opened(server)))
    assert publish(hub) is False
    assert titles(repo) == ["initial commit", f"Add {ENTRY}"]


def test_what_came_and_went_meanwhile_is_not_taken_for_published(hub, server, repo, monkeypatch):
    """The library sends nothing that was there when it asked: then nothing was committed."""
    original = hub.repository.additions

    def between(*arguments, **named):
        publish(opened(server))
        return original(*arguments, **named)

    change = hub.repository.change

    def late(*arguments, **named):
        repo.add("main", repo.files(next(iter(repo.commits))), "undone", "hospital")
        return change(*arguments, **named)

    monkeypatch.setattr(hub.repository, "additions", between)
    monkeypatch.setattr(hub.repository, "change", late)
    with says(
        HubError,
        f"{hub.uri} has been changed by somebody else meanwhile: run the same command again.",
    ):
        publish(hub)


def test_whoever_is_always_overtaken_is_told(hub, server, monkeypatch):
    monkeypatch.setattr(repository, "PATIENCE", 0.2)
    server.fault("POST", "/commit/", "status", 412, times=1000)
    with says(
        HubError,
        f"others are always faster with {hub.uri}: run the same command again when fewer publish.",
    ):
        publish(hub)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, server, repo):
    server.fault("POST", "/commit/", "lost")
    assert publish(hub) is True
    assert titles(repo) == ["initial commit", f"Add {ENTRY}"]


def test_a_replacement_whose_answer_was_lost_has_gone_through(hub, server, repo):
    server.fault("POST", "/commit/", "lost")
    hub.replace(FILE, b"one", None)
    assert repo.files()[FILE].data == b"one"
    assert len(repo.commits) == 2


def test_a_replacement_goes_on_top_of_what_others_published_meanwhile(hub, server, repo):
    hub.replace(FILE, b"one", None)
    server.fault("POST", "/commit/", "status", 412)
    somebody_commits(repo, contributions__s__e__manifest=b"m")
    hub.replace(FILE, b"two", b"one")
    assert repo.files()[FILE].data == b"two"
    assert "contributions/s/e/manifest" in repo.files()


def test_a_replacement_does_not_overwrite_what_came_between(hub, server, repo, monkeypatch):
    """Between the look at what was expected and the commit: the commit names its parent."""
    hub.replace(FILE, b"one", None)
    just_before_the_commit(hub, monkeypatch, lambda: somebody_commits(repo, **{FILE: b"other"}))
    with says(
        HubError,
        f"{hub.uri}/{FILE} has been changed by somebody else meanwhile: run the same command "
        "again.",
    ):
        hub.replace(FILE, b"two", b"one")
    assert repo.files()[FILE].data == b"other"


def test_replacing_with_the_same_bytes_changes_nothing(hub, repo):
    hub.replace(FILE, b"one", None)
    hub.replace(FILE, b"one", b"one")
    assert len(repo.commits) == 2


def test_what_is_removed_is_gone_from_the_head_and_kept_by_the_history(hub, server, repo):
    publish(hub)
    before = repo.refs["main"]
    assert hub.has(PAYLOAD)
    assert hub.remove(PAYLOAD) is False
    assert not hub.has(PAYLOAD)
    assert not opened(server).has(PAYLOAD)
    assert PAYLOAD in repo.files(before)
    assert hub.remove(PAYLOAD) is False


def test_reading_many_entries_asks_for_one_listing(hub, server):
    for number in range(5):
        publish(hub, b"x", f"contributions/s{number}/e")
    reader = opened(server)
    server.log.clear()
    for site in reader.list("contributions"):
        for entry in reader.list(f"contributions/{site}"):
            place = f"contributions/{site}/{entry}"
            assert reader.has(f"{place}/manifest.sig")
            assert reader.size(f"{place}/payload.safetensors") == 1
            assert reader.read(f"{place}/manifest.json") == b"m"
    listings, copies = server.asked("GET", "/tree/"), server.asked("GET", "/resolve/")
    assert (listings, copies) == (1, 5)
    assert len(server.log) == 7  # and which commit is the latest


def test_a_listing_is_of_one_commit_whatever_others_do(hub, server, repo):
    publish(hub, b"one", "contributions/a/e")
    publish(hub, b"two", "contributions/b/e")
    reader = opened(server)
    sites = reader.list("contributions")
    assert next(sites) == "a"
    opened(server).remove("contributions/b/e/manifest.json")
    publish(opened(server), b"three", "contributions/c/e")
    assert list(sites) == ["b"]
    assert reader.read("contributions/b/e/manifest.json") == b"m"
    assert list(reader.list("contributions")) == ["a", "b", "c"]
    assert not reader.has("contributions/b/e/manifest.json")


def test_what_was_published_later_is_found_when_it_is_asked_for(hub, server):
    reader = opened(server)
    assert list(reader.list("contributions")) == []
    publish(hub)
    assert reader.has(PAYLOAD)
    assert reader.fetch(PAYLOAD, digest_of(b"payload")).read_bytes() == b"payload"


def test_a_publisher_sees_what_it_has_published(hub):
    assert list(hub.list("contributions")) == []
    publish(hub)
    assert list(hub.list("contributions/north")) == ["abc"]
    hub.replace(FILE, b"x", None)
    assert hub.size(FILE) == 1


def test_what_never_changes_is_copied_once(hub, server):
    publish(hub)
    for _ in range(2):
        reader = opened(server)
        assert reader.read(f"{ENTRY}/manifest.json") == b"m"
        assert reader.fetch(PAYLOAD).read_bytes() == b"payload"
    assert server.asked("GET", "/resolve/") == 2


def test_a_kept_copy_of_other_bytes_is_not_believed(hub, server):
    """Another hub of the same name, on another server, keeps its copies in the same place."""
    publish(hub)
    hub.read(f"{ENTRY}/manifest.json")
    kept = hub.fetch(f"{ENTRY}/manifest.json")
    kept.write_bytes(b"another")
    assert hub.read(f"{ENTRY}/manifest.json") == b"m"


def test_a_listing_may_come_in_pages(hub, server):
    for number in range(7):
        publish(hub, b"x", f"contributions/s{number}/e")
    server.page_size = 4
    assert list(opened(server).list("contributions")) == [f"s{n}" for n in range(7)]
    assert server.asked("GET", "/tree/") > 5


def test_foreign_files_are_invisible_or_harmless(hub, server, repo):
    """Whoever has cloned the repository can commit any name."""
    publish(hub)
    odd = ["../x", "contributions/../y/e", "contributions/a\\b/e", "contributions/a\x1b[2J/e",
           "contributions/.git/e", "contributions//e", "/etc/x"]  # fmt: skip
    more = {name: Blob(b"odd") for name in (*odd, "README.md", "contributions/notes.txt")}
    repo.add("main", {**repo.files(), **more}, "by hand", "hospital")
    reader = opened(server)
    assert list(reader.list("contributions")) == ["north", "notes.txt"]
    assert list(reader.list("contributions/notes.txt")) == []
    assert list(reader.list(ENTRY)) == ["manifest.json", "manifest.sig", "payload.safetensors"]
    assert reader.read(f"{ENTRY}/manifest.json") == b"m"


def test_files_that_the_repository_ignores_are_not_taken_for_published(hub, repo):
    repo.add("main", {**repo.files(), ".gitignore": Blob(b"*.json\n")}, "by hand", "hospital")
    with says(
        HubError,
        f"{hub.uri} has left out {ENTRY}/manifest.json: remove the rule that does so from the "
        f"repository's .gitignore, remove {ENTRY}, and publish again.",
    ):
        publish(hub)


def test_a_server_may_live_below_a_path(server):
    """As registries of artefacts do it."""
    with HubServer(prefix="/artifactory/api/huggingfaceml/models") as below:
        below.tokens = {OWNER: "hospital"}
        below.create(NAME, writers="hospital")
        hub = opened(below)
        assert publish(hub, b"x" * 5000) is True
        assert opened(below).fetch(PAYLOAD, digest_of(b"x" * 5000)).stat().st_size == 5000
        assert by_pull_request(hub).publish("contributions/s/e", {"manifest": b"m"}) is True


def test_a_new_repository_is_private(server, monkeypatch):
    hub = create_hub("hf://hospital/other")
    assert server.repos["hospital/other"].private
    assert publish(hub) is True
    assert create_hub("hf://hospital/other").uri == hub.uri
    with says(
        UnreachableError,
        f"you may not make the repository {uri_of(server, 'elsewhere/x')}: ask its owner, or take "
        "a token that may write.",
    ):
        create_hub("hf://elsewhere/x")


def test_a_repository_that_everybody_may_read_is_not_taken_for_a_private_one(server):
    server.create("hospital/open", writers="hospital", private=False)
    with says(
        HubError,
        f"{uri_of(server, 'hospital/open')} is there already, and everybody may read it: make it "
        "private in its settings first, or choose another name.",
    ):
        create_hub("hf://hospital/open")


def test_folders_need_not_be_created(tmp_path):
    (tmp_path / "place").mkdir()
    assert create_hub(str(tmp_path / "place")).uri == str(tmp_path / "place")


@pytest.mark.parametrize(
    "name",
    ["", "name", "a/b/c", "datasets/a/b", "a//b", "../b", "a/b--c", "a/b.git", "a/b c", "ä/b"],
)
def test_a_name_that_no_repository_has_is_named(server, name):
    with says(
        HubError,
        f"'{name}' is no name of a repository: write it as owner/name, in letters, digits, '-', "
        "'_' and '.'.",
    ):
        open_hub(f"hf://{name}")


@pytest.mark.parametrize("written", ["hf://{name}/", "hf+{url}/{name}"])
def test_a_uri_opens_the_repository(server, written):
    found = open_hub(written.format(name=NAME, url=server.url))
    assert isinstance(found, HuggingFaceHub)
    assert found.uri == uri_of(server)
    assert server.log == []


def test_a_hub_stays_on_its_server_wherever_the_environment_leads(server, monkeypatch):
    """A site keeps the address from the day that it joined: nothing goes to another server."""
    uri = open_hub(f"hf://{NAME}").uri
    monkeypatch.delenv("HF_ENDPOINT")
    assert open_hub(uri).uri == uri
    assert open_hub(f"hf://{NAME}").uri == f"hf://{NAME}"
    assert open_hub(uri).repository.endpoint.url == server.url


def test_a_uri_may_have_a_path(server):
    with HubServer(prefix="/artifactory/models") as below:
        below.create(NAME, writers="hospital", private=False)
        hub = open_hub(f"hf+{below.url}/{NAME}")
        assert hub.uri == f"hf+http://127.0.0.1:{below.port}/artifactory/models/{NAME}"
        assert list(hub.list("contributions")) == []


@pytest.mark.parametrize(
    "uri", ["hf+https://a", "hf+https://", "hf+https:///b/c", "hf+http://a:b/c/d"]
)
def test_a_uri_without_a_server_or_a_name_is_refused(server, uri):
    with pytest.raises(HubError, match=r"is no (address of a server|name of a repository): write"):
        open_hub(uri)


def test_an_entry_can_be_proposed_by_who_may_not_write(server, repo):
    site = by_pull_request(opened(server, READER))
    assert publish(site, b"x" * 5000) is True
    assert site.proposed == {ENTRY: f"{server.url}/{NAME}/discussions/1"}
    assert not opened(server).has(f"{ENTRY}/manifest.json")
    opened(server).repository._api.merge_pull_request(NAME, 1)
    assert opened(server).fetch(PAYLOAD, digest_of(b"x" * 5000))
    assert publish(by_pull_request(opened(server, READER)), b"x" * 5000) is False


def test_an_entry_that_waits_is_not_proposed_twice(server, repo):
    for _ in range(2):
        site = by_pull_request(opened(server, READER))
        assert publish(site) is True
        assert site.proposed == {ENTRY: f"{server.url}/{NAME}/discussions/1"}
    assert len(repo.pulls) == 1


def test_what_others_have_proposed_is_not_looked_into(server, repo):
    publish(by_pull_request(opened(server, READER)), folder="contributions/south/def")
    server.log.clear()
    publish(by_pull_request(opened(server, READER)))
    assert server.asked("GET", "refs%2Fpr%2F1") == 0


def test_a_request_of_the_same_title_with_other_bytes_stops_nobody(server, repo):
    publish(by_pull_request(opened(server, READER)), b"forged")
    site = by_pull_request(opened(server, READER))
    assert publish(site) is True
    assert site.proposed == {ENTRY: f"{server.url}/{NAME}/discussions/2"}


def test_other_hubs_have_no_pull_requests(tmp_path):
    (tmp_path / "place").mkdir()
    with says(
        UsageError,
        "--create-pr is for repositories on the Hugging Face Hub (hf://owner/name), and "
        f"{tmp_path}/place is none: leave it out.",
    ):
        by_pull_request(open_hub(str(tmp_path / "place")))

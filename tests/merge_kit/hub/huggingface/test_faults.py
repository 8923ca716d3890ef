"""What goes wrong on the way to the Hugging Face Hub: one sentence each, and nothing lost."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import time
import traceback

import pytest
from huggingface_hub import get_session
from starlette.responses import HTMLResponse

from merge_kit.errors import HubError, UnreachableError
from merge_kit.hub import endpoint, open_hub
from merge_kit.hub.answers import is_transient
from merge_kit.hub.endpoint import HUGGING_FACE, Endpoint, chosen
from merge_kit.hub.repository import Repository
from tests.merge_kit.helpers import listing, says
from tests.merge_kit.hub.contract import ENTRY, FILE, digest_of, publish
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER, STRANGER, opened, uri_of
from tests.merge_kit.hub.huggingface.server import HubServer

PAYLOAD = f"{ENTRY}/payload.safetensors"
LARGE = bytes(range(256)) * 2000


@pytest.fixture
def hub(server):
    return opened(server)


def host(server):
    return server.url.removeprefix("http://")


def entries(server):
    return [name for name in server.repos[NAME].files() if name.startswith("contributions/")]


# Who may do what.


def test_a_private_repository_is_not_shown_to_strangers(server):
    with says(
        UnreachableError,
        f"{host(server)} shows no repository {NAME} to strangers: set HF_ENDPOINT to {server.url}, "
        "and HF_TOKEN to a token of this server; if that is done, check the name.",
    ):
        opened(server, None).has(FILE)


@pytest.mark.parametrize("name", [NAME, "hospital/none"])
def test_a_repository_that_one_may_not_see_is_as_one_that_is_not_there(server, name):
    with says(
        UnreachableError,
        f"{host(server)} has no repository {name} that you may see: check the name, and ask its "
        "owner to let you in.",
    ):
        opened(server, STRANGER, name).has(FILE)


@pytest.mark.parametrize("use", [lambda hub: hub.has(FILE), publish])
def test_a_wrong_token_is_named_but_not_shown(server, use):
    with says(
        UnreachableError,
        f"{host(server)} does not know the token: make a new one there and set HF_TOKEN to it.",
    ):
        use(opened(server, "hf_wrong"))


def test_whoever_may_only_read_is_shown_the_other_way(server):
    site = opened(server, READER)
    assert list(site.list("contributions")) == []
    with says(
        UnreachableError,
        f"you may not write to {uri_of(server)}: ask its owner, or take a token that may write; a "
        "site can also propose with --create-pr.",
    ):
        publish(site)
    assert entries(server) == []


def test_nobody_writes_without_a_token(server):
    """The library would look for one of its own."""
    server.create("hospital/open", writers="hospital", private=False)
    hub = opened(server, None, "hospital/open")
    sentence = (
        f"writing to {uri_of(server, 'hospital/open')} needs a token: set HF_ENDPOINT to "
        f"{server.url}, and HF_TOKEN to a token of this server."
    )
    for write in (publish, lambda hub: hub.replace(FILE, b"x", None), lambda hub: hub.remove("a")):
        with says(HubError, sentence):
            write(hub)
    assert server.asked("POST", "") == 0


# Tokens stay at home.


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A token that 'hf auth login' has stored."""
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")


def test_a_stored_token_goes_to_hugging_face_alone(server, stored, monkeypatch):
    server.create("hospital/open", writers="hospital", private=False)
    hub = open_hub("hf://hospital/open")
    assert not hub.has(FILE)
    with pytest.raises(HubError, match="needs a token"):
        publish(hub)
    assert {asked for _, _, asked in server.log} == {""}
    monkeypatch.delenv("HF_ENDPOINT")
    assert (chosen().url, chosen().token) == (HUGGING_FACE, "hf_stored")


def test_a_token_of_the_environment_belongs_to_its_endpoint(server):
    publish(open_hub(f"hf://{NAME}"))
    sent = {asked for _, path, asked in server.log if not path.startswith("/lfs/")}
    assert sent == {f"Bearer {OWNER}"}


def test_a_token_is_not_sent_to_a_server_that_the_environment_does_not_name(server, monkeypatch):
    """HF_TOKEN is of the server HF_ENDPOINT, or else of huggingface.co."""
    server.create("hospital/open", writers="hospital", private=False)
    for elsewhere in ("https://elsewhere.example.org", None):
        if elsewhere:
            monkeypatch.setenv("HF_ENDPOINT", elsewhere)
        else:
            monkeypatch.delenv("HF_ENDPOINT")
        hub = open_hub(uri_of(server, "hospital/open"))
        assert not hub.has(FILE)
        with pytest.raises(HubError, match="needs a token: set HF_ENDPOINT to http://127"):
            publish(hub)
    assert {asked for _, _, asked in server.log} == {""}


def test_on_hugging_face_one_may_log_in():
    with says(
        HubError,
        f"writing to hf://{NAME} needs a token: log in with 'hf auth login', or set HF_TOKEN.",
    ):
        Repository(NAME, Endpoint(HUGGING_FACE)).check_writable()


def test_a_token_leaves_for_no_other_server(server):
    """Uploads, their verification, downloads and the next page of a listing may lie elsewhere."""
    with HubServer() as other:
        other.objects = server.objects
        server.upload_root = other.url
        hub = opened(server)
        assert publish(hub, LARGE) is True
        assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE
        assert other.asked("PUT", "/lfs/") == other.asked("POST", "/verify") == 1
        assert other.asked("GET", "/cdn/") == 1
        server.page_size = 1
        with pytest.raises(UnreachableError):
            list(opened(server).list("contributions"))
        assert other.asked("GET", "/tree/") == 1
        assert {asked for _, _, asked in other.log} == {""}


def test_what_we_ask_the_library_for_is_no_warning(hub, caplog):
    """It would say that Xet could not be used."""
    publish(hub, LARGE)
    assert caplog.text == ""


def test_a_connection_that_another_thread_has_closed_is_made_anew():
    session = type(get_session())()
    session.close()
    with pytest.raises(RuntimeError) as caught:
        session.get("http://127.0.0.1:1")
    assert is_transient(caught.value)


def test_nothing_secret_is_told(server, hub, caplog):
    """Addresses that uploads go to are signed."""
    server.fault("PUT", "/lfs/", "status", 503)
    publish(hub, LARGE)
    assert "/lfs/" in caplog.text
    server.fault("PUT", "/lfs/", "status", 503, times=100)
    with pytest.raises(UnreachableError) as caught:
        publish(hub, b"other", "contributions/s/e")
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(hub.__dict__)
    told += repr(hub.repository.endpoint) + str(caught.value.__cause__)
    assert "503" in told
    for secret in (OWNER, "upload-secret", "X-Signature"):
        assert secret not in told


@pytest.mark.parametrize(
    "address", ["hub.example.org", "ftp://x", "https://", "http://a:b:c", "x y"]
)
def test_an_endpoint_that_is_no_address_is_named(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with says(
        HubError,
        f"HF_ENDPOINT is '{address}', which is no address: write it as https://hub.example.org.",
    ):
        open_hub(f"hf://{NAME}")


def test_a_password_in_an_endpoint_is_not_shown(server, monkeypatch):
    address = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(UnreachableError) as caught:
        opened(server, None, url=address).has(FILE)
    assert str(caught.value).startswith(f"{host(server)} ")
    monkeypatch.setenv("HF_ENDPOINT", "ftp://user:secret@host")
    with pytest.raises(HubError) as other:
        chosen()
    assert "secret" not in str(caught.value) + str(caught.value.__cause__) + str(other.value)


# Faults of the moment, and those that stay.


@pytest.mark.parametrize(
    ("method", "part"),
    [("GET", "/api/models/"), ("GET", "/tree/"), ("GET", "/resolve/"), ("POST", "/preupload/"),
     ("POST", "/objects/batch"), ("PUT", "/lfs/"), ("POST", "/verify"), ("POST", "/commit/")],
)  # fmt: skip
@pytest.mark.parametrize(("kind", "value"), [("status", 500), ("status", 503), ("drop", None)])
def test_a_fault_of_the_moment_is_lived_through(server, hub, method, part, kind, value):
    fault = server.fault(method, part, kind, value, times=2)
    assert publish(hub, LARGE) is True
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE
    assert fault.times < 2
    assert len(server.repos[NAME].commits) == 2


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("status", 503, "{host} failed by itself (503), several times: try again later."),
        ("status", 429, "{host} has had too many requests of yours: try again in some minutes."),
        ("status", 418, "{host} refused with 418 (fault 418): ask whoever runs it."),
        ("drop", None, "{host} broke the connection off, several times: run the same command "
         "again; what has arrived stays."),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "part"), [("GET", "/api/models/"), ("PUT", "/lfs/"), ("POST", "/commit/")]
)
def test_a_fault_that_stays_is_named(server, hub, method, part, kind, value, sentence):
    server.fault(method, part, kind, value, times=100)
    with says(UnreachableError, sentence.format(host=host(server))):
        publish(hub, LARGE)
    server.faults.clear()
    assert entries(server) == []
    assert publish(hub, LARGE) is True


def test_a_server_may_ask_to_wait(server, hub, monkeypatch):
    waited = []
    monkeypatch.setattr("merge_kit.hub.repository.time", Clock(waited))
    for headers in ({"Retry-After": "3"}, {"RateLimit": '"api";r=0;t=7'}, {"Retry-After": "9999"}):
        response = HTMLResponse("slower", 429, headers)
        server.fault("GET", "/api/models/", "answer", response)
    assert not hub.has(FILE)
    assert [int(seconds) for seconds in waited] == [3, 7, 300]


class Clock:
    """Time that only notes for how long it should have waited."""

    def __init__(self, waited):
        self.sleep, self.monotonic = waited.append, time.monotonic


def test_a_server_that_is_silent_is_named(server, hub, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    server.fault("GET", "/api/models/", "slow", 0.6, times=100)
    with says(
        UnreachableError,
        f"{host(server)} was silent for 0.2 s, several times: try again later, or ask whoever "
        "runs it.",
    ):
        hub.has(FILE)


def test_a_server_that_is_slow_once_is_waited_for(server, hub, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.3)
    server.fault("POST", "/commit/", "slow", 0.6)  # it goes through after we have given up
    assert publish(hub) is True
    time.sleep(0.5)
    assert len(server.repos[NAME].commits) == 2
    assert opened(server).read(f"{ENTRY}/manifest.json") == b"m"


def test_a_server_that_is_not_there_is_named(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        UnreachableError,
        match=rf"127\.0\.0\.1:{port} cannot be reached \(.*\): check HF_ENDPOINT, the network and "
        "the proxy",
    ):
        opened(server, url=f"http://127.0.0.1:{port}").has(FILE)


def test_a_host_that_nobody_knows_is_named(server):
    with says(
        UnreachableError,
        "the host of no-such-host.invalid is not known: check HF_ENDPOINT and the network.",
    ):
        opened(server, url="http://no-such-host.invalid").has(FILE)


def test_being_offline_on_purpose_is_named(server, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with says(
        UnreachableError, f"HF_HUB_OFFLINE is set, so {host(server)} is not asked: unset it."
    ):
        hub.has(FILE)


def test_a_page_of_something_else_is_not_taken_for_a_hub(server, hub):
    page = HTMLResponse("<html>Please log in</html>")
    server.fault("GET", "/api/models/", "answer", page, times=100)
    with pytest.raises(
        UnreachableError, match=r"answers in a way that huggingface_hub .* does not"
    ):
        hub.has(FILE)


def test_a_certificate_that_cannot_be_verified_is_refused(server, certificate):
    with HubServer(ssl_certfile=certificate[0], ssl_keyfile=certificate[1]) as secret:
        secret.tokens = {OWNER: "hospital"}
        secret.create(NAME, writers="hospital")
        with says(
            UnreachableError,
            f"the certificate of 127.0.0.1:{secret.port} cannot be verified: give the file of your "
            "organisation's certificate authority as SSL_CERT_FILE.",
        ):
            opened(secret).has(FILE)
        assert secret.log == []


@pytest.fixture
def certificate(tmp_path):
    """A certificate that its server has signed itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


# Bytes on the way.


@pytest.mark.parametrize("name", [PAYLOAD, f"{ENTRY}/manifest.json"])
def test_bytes_that_were_changed_on_the_way_are_refused(server, hub, name):
    """A plain download has no checksum of its own."""
    publish(hub, LARGE)
    server.fault("GET", "/resolve/", "corrupt")
    reader = opened(server)
    with says(
        HubError,
        f"{reader.uri}/{name} arrived damaged: its bytes are not those that {host(server)} lists; "
        "try again.",
    ):
        reader.fetch(name)
    assert listing(reader._cache / "arriving") == []
    assert reader.fetch(name).stat().st_size == (len(LARGE) if name == PAYLOAD else 1)


def test_a_download_that_breaks_off_goes_on_where_it_was(server, hub):
    publish(hub, LARGE)
    server.fault("GET", "/resolve/", "cut", 100_000, times=2)
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in server.ranges]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(LARGE)


def test_a_server_that_gives_no_parts_is_asked_for_the_whole(server, hub):
    publish(hub, LARGE)
    server.whole = True
    server.fault("GET", "/resolve/", "cut", 100_000, times=2)
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_a_download_that_always_gets_further_is_not_given_up(server, hub):
    publish(hub, LARGE)
    server.fault("GET", "/resolve/", "cut", 70_000, times=7)  # more often than tries are made
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_a_download_that_never_gets_further_is_named(server, hub):
    publish(hub, LARGE)
    server.fault("GET", "/resolve/", "cut", 0, times=100)
    reader = opened(server)
    with says(
        UnreachableError,
        f"{host(server)} broke the connection off, several times: run the same command again; "
        "what has arrived stays.",
    ):
        reader.fetch(PAYLOAD, digest_of(LARGE))
    assert listing(reader._cache / "arriving") == []


def test_an_upload_that_breaks_off_is_sent_again(server, hub):
    server.fault("PUT", "/lfs/", "cut upload", 100_000, times=2)
    assert publish(hub, LARGE) is True
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_an_upload_that_the_library_has_given_up_is_begun_again(server, hub):
    server.fault("PUT", "/lfs/", "status", 503, times=8)
    assert publish(hub, LARGE) is True
    assert opened(server).fetch(PAYLOAD, digest_of(LARGE)).read_bytes() == LARGE


def test_an_upload_that_always_breaks_off_leaves_nothing_to_be_seen(server, hub):
    server.fault("PUT", "/lfs/", "cut upload", 100_000, times=100)
    with says(
        UnreachableError,
        f"{host(server)} broke the connection off, several times: run the same command again; "
        "what has arrived stays.",
    ):
        publish(hub, LARGE)
    assert entries(server) == []


def test_a_file_that_cannot_be_read_is_named(hub, tmp_path):
    with says(HubError, f"{tmp_path}/gone cannot be read: No such file or directory."):
        publish(hub, tmp_path / "gone")


def test_a_full_disk_here_is_no_fault_of_what_is_there(server, hub, small_disk, monkeypatch):
    publish(hub, LARGE)
    monkeypatch.setenv("MERGE_KIT_CACHE", str(small_disk))
    reader = opened(server)
    with pytest.raises(
        UnreachableError,
        match=r"cannot be written: no space left \(0 MiB free\): make room and run the same",
    ):
        reader.fetch(PAYLOAD, digest_of(LARGE))
    assert listing(reader._cache / "arriving") == []

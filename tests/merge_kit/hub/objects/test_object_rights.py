"""Who is asked, and who may: credentials, rights, addresses; one sentence each, without secrets."""

from __future__ import annotations

import http.client
import json
import traceback
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from merge_kit.errors import HubError, UnreachableError
from merge_kit.hub.objects import PIECE, ObjectHub
from merge_kit.hub.objectstores import Patience
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import ENTRY, FILE, publish
from tests.merge_kit.hub.objects.conftest import SECRET, client, start_server, stop_server
from tests.merge_kit.hub.objects.proxy import Answer, Proxy, redirect, status
from tests.merge_kit.hub.objects.uses import USES

MANIFEST, PAYLOAD = f"{ENTRY}/manifest.json", f"{ENTRY}/payload.safetensors"


# Credentials and rights


@pytest.fixture(scope="module")
def strict_server():
    """A server that knows who may do what: users by name, as environment variables."""
    process, port = start_server(INITIAL_NO_AUTH_ACTION_COUNT="1000000")
    client(port).create_bucket(Bucket="bucket")
    client(port).put_object(Bucket="bucket", Key=f"h/{FILE}", Body=b"one")
    client(port).put_object(Bucket="bucket", Key="h/contributions/a/b/manifest.json", Body=b"")
    users, iam = {}, client(port, "iam")
    for name, rights in {
        "coordinator": ["s3:*"],
        "publisher": ["s3:GetObject", "s3:ListBucket", "s3:PutObject"],
        "reader": ["s3:GetObject", "s3:ListBucket"],
        "stranger": ["ec2:*"],
    }.items():
        policy = {"Effect": "Allow", "Action": rights, "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        users[name] = (key["AccessKeyId"], key["SecretAccessKey"])
    users["unknown"] = ("AKIAIOSFODNN7EXAMPLE", SECRET)
    users["forger"] = (users["coordinator"][0], SECRET)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    assert connection.getresponse().status == 200
    connection.close()
    yield port, users
    stop_server(process)


@pytest.fixture
def as_user(strict_server, surroundings, monkeypatch):
    """Open the hub on that server as one of its users."""
    port, users = strict_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")

    def opened(name):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", users[name][0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", users[name][1])
        return ObjectHub("s3://bucket/h", Patience(5, 2, 1, 0.02))

    return opened


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("user", "code"), [("unknown", "InvalidAccessKeyId"), ("forger", "SignatureDoesNotMatch")]
)
def test_credentials_that_are_not_accepted_are_named(as_user, strict_server, user, code, use):
    with says(
        UnreachableError,
        f"127.0.0.1:{strict_server[0]} does not accept the credentials for s3://bucket/h "
        f"(403 {code}): check or renew them.",
    ):
        USES[use](as_user(user))


@pytest.mark.parametrize(
    ("user", "use", "name", "done"),
    [
        ("stranger", "has", FILE, "read"),
        ("stranger", "size", FILE, "read"),
        ("stranger", "read", FILE, "read"),
        ("stranger", "fetch", FILE, "read"),
        ("stranger", "list", "contributions", "listed"),
        ("stranger", "publish", MANIFEST, "read"),
        ("reader", "publish", MANIFEST, "written"),
        ("reader", "replace", FILE, "written"),
    ],
)
def test_a_right_that_is_missing_is_named(as_user, user, use, name, done):
    with says(
        HubError,
        f"s3://bucket/h/{name} may not be {done} with these credentials (403 AccessDenied): ask "
        "whoever runs the storage for the right to do so.",
    ):
        USES[use](as_user(user))


def test_who_may_not_remove_is_told_so(as_user):
    with says(
        HubError,
        f"s3://bucket/h/{FILE} may not be removed with these credentials (AccessDenied): ask "
        "whoever runs the storage for the right to do so.",
    ):
        as_user("publisher").remove(FILE)
    assert as_user("reader").has(FILE)


def test_who_may_not_remove_may_publish(as_user, tmp_path):
    """Sites need no right to remove: hidden files stay, and are seen by nobody."""
    for number, size in enumerate((5, PIECE + 5)):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert publish(as_user("publisher"), tmp_path / "file", f"contributions/north/{number}")
    assert list(as_user("reader").list("contributions/north")) == ["0", "1"]
    names = list(as_user("reader").list("contributions/north/1"))
    assert names == ["manifest.json", "manifest.sig", "payload.safetensors"]


def test_without_credentials_the_variables_are_named(line, open_apart, monkeypatch):
    """The library asks the machine that it runs on, as in Amazon's cloud; here nobody answers."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    hub = open_apart()
    for use in USES.values():
        with says(
            UnreachableError,
            f"there are no credentials for {hub.uri}: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        ):
            use(hub)
    assert line.seen == []


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_a_token_that_has_expired_is_named(line, hub, code):
    with (
        line.faulty("GET", status(400, code)),
        says(
            UnreachableError,
            f"{line.host} does not accept the credentials for {hub.uri} (400 {code}): check or "
            "renew them.",
        ),
    ):
        hub.read(FILE)


# Places that are not there


def test_a_bucket_that_is_not_there_is_named(line, open_apart):
    hub = open_apart("s3://no-such-bucket/h")
    for use in USES.values():
        with says(
            UnreachableError,
            f"{line.host} has no bucket 'no-such-bucket': check the name, or have it created.",
        ):
            use(hub)


def test_a_host_that_does_not_answer_is_named(line, open_apart, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for use in USES.values():
        with says(
            UnreachableError,
            "127.0.0.1:9 cannot be reached: check the address, the network and the firewall.",
        ):
            use(open_apart())


def test_a_host_that_there_is_not_is_named(line, open_apart, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@no-such-host.invalid")
    with says(
        UnreachableError,
        "no-such-host.invalid cannot be reached: check the address, the network and the firewall.",
    ):
        open_apart().has(FILE)


def test_a_line_without_encryption_must_be_wanted(line, open_apart, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with says(
        UnreachableError,
        f"{line.host} would be asked without encryption: give an https:// address, or set "
        "AWS_ALLOW_HTTP=true where you trust the network.",
    ):
        open_apart().has(FILE)
    assert line.seen == []


@pytest.fixture
def certificates(tmp_path):
    """A file with the certificate of an organisation, and one with a server's and its key."""
    now, day = datetime.now(timezone.utc), timedelta(days=1)
    own, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    server = ec.generate_private_key(ec.SECP256R1())
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    extensions = ((own, x509.BasicConstraints(True, None)), (server, address))
    made = [
        x509.CertificateBuilder(name, name, key.public_key(), number, now - day, now + day)
        .add_extension(extension, critical=True)
        .sign(own, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        for number, (key, extension) in enumerate(extensions, 1)
    ]
    secret = server.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "organisation.pem").write_bytes(made[0])
    (tmp_path / "server.pem").write_bytes(made[1] + secret)
    return tmp_path / "organisation.pem", tmp_path / "server.pem"


def test_a_certificate_of_ones_own_organisation(
    line, server, open_apart, certificates, monkeypatch
):
    organisation, own = certificates
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with Proxy(server, own) as encrypted:
        monkeypatch.setenv("AWS_ENDPOINT_URL", encrypted.url)
        with says(
            UnreachableError,
            f"{encrypted.host} shows a certificate that this machine does not trust: check the "
            "address, or have SSL_CERT_FILE name the file with your organisation's certificate.",
        ):
            open_apart().has(FILE)
        monkeypatch.setenv("SSL_CERT_FILE", str(organisation))
        assert publish(open_apart())


def test_a_bucket_in_another_region_is_named(line, hub):
    with (
        line.faulty("GET", status(400, "AuthorizationHeaderMalformed")),
        says(
            UnreachableError,
            f"{hub.uri} lies in another region than was asked (400 AuthorizationHeaderMalformed): "
            "set AWS_REGION to it.",
        ),
    ):
        hub.read(FILE)


def test_a_clock_that_is_wrong_is_named(line, hub):
    with (
        line.faulty("GET", status(403, "RequestTimeTooSkewed")),
        says(
            UnreachableError,
            f"{line.host} says that this machine's clock is wrong: set it, then try again.",
        ),
    ):
        hub.read(FILE)


def test_a_storage_that_is_full_is_named(line, hub, keys):
    with (
        line.faulty(f"PUT .*{PAYLOAD}", status(507, "XMinioStorageFull")),
        says(
            HubError,
            f"{line.host} has no space left for {hub.uri}/{PAYLOAD}: make room there and run the "
            "command again.",
        ),
    ):
        publish(hub)
    assert keys() == []


def test_a_refusal_that_nobody_has_thought_of_is_passed_on(line, hub):
    with (
        line.faulty("GET", status(418, "ImATeapot")),
        says(
            HubError,
            f"{hub.uri}/{FILE} could not be read: {line.host} answers '418 ImATeapot': ask whoever "
            "runs it.",
        ),
    ):
        hub.read(FILE)


# Secrets


def test_no_error_shows_credentials_or_what_a_server_wrote(line, hub):
    """Not even where the whole chain of errors is shown."""

    def quoting(handler, request):
        said = request.headers.get("authorization", "") + SECRET
        handler.answer(
            Answer(403, [], f"<Error><Code>Odd</Code><Message>{said}</Message></Error>".encode())
        )
        return True

    for use in USES.values():
        with line.faulty("", quoting), pytest.raises(HubError) as caught:
            use(hub)
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in shown
        assert "AWS4-HMAC-SHA256" not in shown
        assert "a-test" not in shown


def test_no_signature_follows_a_redirect(line, hub, server, other, bucket):
    """A session's token does: the library offers no way to hold it back; without its secret key,
    which never travels, it is of no use."""
    hub.replace(FILE, b"one", None)
    with Proxy(server) as elsewhere, line.faulty("GET|PUT|HEAD", redirect(elsewhere.url)):
        for use in USES.values():
            try:
                use(hub)
            except HubError as error:
                assert SECRET not in str(error)  # noqa: PT017
        assert elsewhere.seen
        for headers in elsewhere.headers:
            assert "authorization" not in {name.lower() for name in headers}
            assert SECRET not in str(headers)
        assert all(request.split()[0] in ("GET", "HEAD") for request in elsewhere.seen)

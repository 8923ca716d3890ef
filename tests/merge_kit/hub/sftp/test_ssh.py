"""Which servers are spoken to, and with which keys; what is asked of whom."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import subprocess
import sys
import threading

import asyncssh
import pytest

from merge_kit.errors import HubError, MissingExtraError, UnreachableError
from merge_kit.hub import open_hub, ssh
from merge_kit.hub.sshhost import PASSPHRASE
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.sftp.sshd import free_port, make_key, running

SECRET = "a passphrase of the tests"
ASK = "import sys; from merge_kit.hub import open_hub; print(open_hub(sys.argv[1]).has('file'))"


def fingerprint(path):
    """A key's, as ssh-keygen shows it."""
    command = ["ssh-keygen", "-l", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.split()[1]


@pytest.fixture
def home(sshd, tmp_path, monkeypatch):
    """An empty home folder."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder / ".ssh"


@pytest.fixture
def known(sshd, home):
    """A home folder that knows the server."""
    (home / "known_hosts").write_text(f"127.0.0.1 {sshd.host_key}\n")
    return home


@pytest.fixture
def settled(sshd, known):
    """A home folder that knows the server, and has a key for it."""
    (known / "id_ed25519").symlink_to(sshd.home / ".ssh" / "id_ed25519")
    return known


@pytest.fixture
def locked(sshd, known):
    """A home folder whose key is encrypted; gives the key's file."""
    path = known / "id_ed25519"
    path.write_bytes((sshd.home / ".ssh" / "id_ed25519").read_bytes())
    path.chmod(0o600)
    command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", SECRET, "-f", str(path)]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """An ssh-agent that holds no key yet."""
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    while not os.path.exists(path):
        assert process.poll() is None
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    yield
    process.terminate()
    process.wait(20)


def add(*key):
    """Give the agent a key."""
    done = subprocess.run(["ssh-add", "-q", *map(str, key)], check=False, timeout=20)
    assert done.returncode == 0


# addresses


@pytest.mark.parametrize(
    "uri",
    [
        "sftp://user:secret@host/path", "sftp://user:@host/path", "sftp://user:se/cret@host/path",
        "sftp://user:se@cret@host:22/path", "sftp://:secret@host", "sftp://user:[secret@host/path",
    ],
)  # fmt: skip
def test_a_password_in_an_address_is_refused_and_not_shown(uri):
    with says(
        HubError,
        "an address of a hub holds no password, as it is written into files: write "
        "sftp://user@host:port/path (an @ in the path as %40), and use a key, or type the "
        "password when you are asked.",
    ):
        open_hub(uri)


@pytest.mark.parametrize(
    "uri",
    ["sftp://", "sftp:///path", "sftp://host:port/path", "sftp://host:99999/path", "sftp://[::1/p",
     "sftp://host/path?x", "sftp://host/path#x", "sftp://user@/path"],
)  # fmt: skip
def test_a_malformed_address_is_named(uri):
    with says(HubError, f"'{uri}' is no address of a hub: write sftp://user@host:port/path."):
        open_hub(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sftp://host", ("host", None, None, "/")),
        ("sftp://me@host:2222/a/b/", ("host", 2222, "me", "/a/b")),
        ("sftp://host/~", ("host", None, None, ".")),
        ("sftp://host/~/a%20b", ("host", None, None, "./a b")),
        ("sftp://a%40b@[::1]:22/x", ("::1", 22, "a@b", "/x")),
    ],
)
def test_addresses_are_taken_apart(uri, expected):
    found = ssh.parse_address(uri)
    assert (found.host, found.port, found.user, found.path) == expected


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(MissingExtraError, match=r"a hub on an SFTP server needs the extra 'sftp'"):
        open_hub("sftp://host/path")


def test_a_path_may_begin_at_home(sshd, settled, opened, tmp_path):
    """At the account's home on the server, which is that of whoever runs the tests."""
    hub = opened(sshd.uri("/~"))
    assert hub.uri.endswith("/~")
    assert isinstance(list(hub.list("no-such-folder-of-a-test")), list)


def test_a_folder_that_is_not_there_is_named(sshd, root, opened):
    (root / "file").write_text("")
    for name in ("gone", "file"):
        uri = sshd.uri(root / name)
        with says(
            UnreachableError,
            f"the hub {uri} is not there: check the path, or make the folder on the server.",
        ):
            opened(uri).has("federation.yaml")


def test_nobody_who_listens_is_named(sshd, opened):
    port = free_port()
    with says(
        UnreachableError,
        f"{sshd.user}@127.0.0.1:{port} cannot be reached (Connection refused): check the address, "
        "and that its SSH server runs.",
    ):
        opened(sshd.uri("/hub", port)).has("file")


def test_a_host_without_a_number_is_named(sshd, opened):
    uri = "sftp://nobody.invalid/hub"
    with says(
        UnreachableError,
        f"{uri}: this machine knows no host nobody.invalid: check the name, and the network.",
    ):
        opened(uri).has("file")


@pytest.mark.parametrize("sftp", ["", "/bin/echo hello"])
def test_a_server_without_sftp_is_named(tmp_path, root, opened, monkeypatch, sftp):
    with running(tmp_path / "own", sftp) as own:
        monkeypatch.setenv("HOME", str(own.home))
        with pytest.raises(UnreachableError, match=r"lets us in, but offers no SFTP \(.+\): ask"):
            opened(own.uri(root)).has("file")


# who the server is


def test_an_unknown_server_is_refused_and_not_remembered(sshd, home, root, opened):
    for text in (None, "", "other.example ssh-ed25519 AAAA\n"):
        if text is not None:
            (home / "known_hosts").write_text(text)
        with says(
            UnreachableError,
            f"the host key of {sshd.user}@127.0.0.1:{sshd.port} is not known here, it shows "
            f"ssh-ed25519 {fingerprint(sshd.folder / 'host_key')}: if who runs it confirms this "
            f"key, add it by connecting once with 'sftp -P {sshd.port} {sshd.user}@127.0.0.1'.",
        ):
            opened(sshd.uri(root)).has("file")
        assert not text or (home / "known_hosts").read_text() == text
    assert not (home / "known_hosts2").exists()


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_server_that_shows_another_key_is_refused(sshd, home, root, opened, tmp_path, kind):
    """Also where the key that is known is of a kind that this server does not have."""
    (home / "known_hosts").write_text(f"127.0.0.1 {make_key(tmp_path / 'other', kind)}\n")
    with says(
        UnreachableError,
        f"the host key of {sshd.user}@127.0.0.1:{sshd.port} is not the one that is known here, it "
        f"shows ssh-ed25519 {fingerprint(sshd.folder / 'host_key')}: somebody may be listening in "
        "between; only if who runs it confirms this key, forget the old one with 'ssh-keygen -R "
        f"[127.0.0.1]:{sshd.port}' and add it by connecting once with 'sftp -P {sshd.port} "
        f"{sshd.user}@127.0.0.1'.",
    ):
        opened(sshd.uri(root)).has("file")


@pytest.mark.parametrize("option", ["UserKnownHostsFile none", "StrictHostKeyChecking no"])
def test_no_option_lets_an_unknown_server_pass(sshd, home, root, opened, option):
    (home / "config").write_text(f"Host *\n{option}\n")
    with pytest.raises(UnreachableError, match="is not known here, it shows ssh-ed25519 SHA256:"):
        opened(sshd.uri(root)).has("file")


def test_a_revoked_key_is_refused(sshd, home, root, opened):
    (home / "known_hosts").write_text(
        f"127.0.0.1 {sshd.host_key}\n@revoked 127.0.0.1 {sshd.host_key}\n"
    )
    with pytest.raises(UnreachableError, match=r"is not to be trusted \(Host key is revoked"):
        opened(sshd.uri(root)).has("file")


@pytest.mark.parametrize("how", ["port", "hashed", "alias", "file"])
def test_servers_are_known_in_all_ways_that_ssh_knows(sshd, settled, root, opened, how):
    path = settled / "known_hosts"
    if how == "port":
        path.write_text(f"[127.0.0.1]:{sshd.port} {sshd.host_key}\n")
    elif how == "hashed":
        command = ["ssh-keygen", "-H", "-f", str(path)]
        subprocess.run(command, check=True, timeout=20, capture_output=True)
        assert "127.0.0.1" not in path.read_text()
    else:
        name = "cells" if how == "alias" else "127.0.0.1"
        path.rename(settled / "others")
        (settled / "others").write_text(f"{name} {sshd.host_key}\n")
        alias = "HostKeyAlias cells\n" if how == "alias" else ""
        (settled / "config").write_text(f"Host *\nUserKnownHostsFile ~/.ssh/others\n{alias}")
    assert not opened(sshd.uri(root)).has("file")


def test_a_server_may_be_vouched_for(tmp_path, root, home, opened, monkeypatch):
    authority = make_key(tmp_path / "authority")
    with running(
        tmp_path / "own", lines=f"HostCertificate {tmp_path}/own/host_key-cert.pub\n"
    ) as own:
        command = ["ssh-keygen", "-q", "-s", str(tmp_path / "authority"), "-I", "cells", "-h"]
        subprocess.run(
            [*command, "-n", "127.0.0.1", str(own.folder / "host_key.pub")], check=True, timeout=20
        )
        own.kill()
        own.start()
        (home / "id_ed25519").symlink_to(own.home / ".ssh" / "id_ed25519")
        (home / "known_hosts").write_text(f"@cert-authority 127.0.0.1 {authority}\n")
        assert not opened(own.uri(root)).has("file")
        (home / "known_hosts").write_text(f"@cert-authority other.example {authority}\n")
        with pytest.raises(UnreachableError, match=r"is not (known here|to be trusted)"):
            opened(own.uri(root)).has("file")


def test_a_malformed_list_of_hosts_is_named(sshd, home, root, opened):
    (home / "known_hosts").write_text("rubbish\n")
    with says(
        UnreachableError,
        f"{home}/known_hosts cannot be used: Invalid known hosts entry: rubbish: correct it.",
    ):
        opened(sshd.uri(root)).has("file")


# the ways of ~/.ssh/config


def test_an_alias_says_all(sshd, known, root, opened):
    (known / "special").symlink_to(sshd.home / ".ssh" / "id_ed25519")
    (known / "config").write_text(
        f"Host cells\nHostName 127.0.0.1\nPort {sshd.port}\nUser {sshd.user}\n"
        "IdentityFile ~/.ssh/gone\nIdentityFile ~/.ssh/special\n"
    )
    hub = opened(f"sftp://cells{root}")
    assert not hub.has("file")
    assert hub.uri == f"sftp://cells{root}"


def test_a_malformed_config_is_named(sshd, settled, root, opened):
    (settled / "config").write_text("Host *\nPort many\n")
    with says(
        UnreachableError,
        f"~/.ssh/config cannot be used for 127.0.0.1: {settled}/config line 2: Invalid Port "
        "integer value: many.",
    ):
        opened(f"sftp://127.0.0.1{root}").has("file")


def through(sshd, jump="", inner="ProxyJump jump"):
    """A config with a host behind another one."""
    where = f"HostName 127.0.0.1\nPort {sshd.port}\nUser {sshd.user}\n"
    return f"Host inner\n{where}{inner}\nHost jump\n{where}{jump}\n"


def test_a_server_behind_another_one_is_reached(sshd, settled, root, opened):
    (settled / "config").write_text(through(sshd))
    hub = opened(f"sftp://inner{root}")
    hub.replace("file", b"text", None)
    assert hub.read("file") == b"text"
    before = (sshd.folder / "log").read_text().count("Accepted publickey")
    hub.close()
    assert hub.has("file")
    assert (sshd.folder / "log").read_text().count("Accepted publickey") == before + 2


@pytest.mark.parametrize("option", ["", "UserKnownHostsFile none"])
def test_a_server_on_the_way_must_be_known_too(sshd, settled, root, opened, option):
    (settled / "known_hosts").write_text(f"cells {sshd.host_key}\n")
    (settled / "config").write_text(
        through(sshd, jump=option, inner="HostKeyAlias cells\nProxyJump jump")
    )
    with pytest.raises(UnreachableError, match=r"is not known here.*'sftp -P \d+ .*@jump'"):
        opened(f"sftp://inner{root}").has("file")


def test_servers_in_a_circle_are_named(sshd, settled, root, opened):
    (settled / "config").write_text(through(sshd, jump="ProxyJump inner"))
    with pytest.raises(UnreachableError, match=r"^ProxyJump in .* leads to \w+ in a circle\.$"):
        opened(f"sftp://inner{root}").has("file")


def test_a_jump_that_is_no_host_is_named(sshd, settled, root, opened):
    (settled / "config").write_text(through(sshd, inner="ProxyJump a:b:c"))
    with says(UnreachableError, "ProxyJump in ~/.ssh/config: 'a:b:c' is no host: correct it."):
        opened(f"sftp://inner{root}").has("file")


RELAY = """
import os, socket, sys, threading
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def down():
    while data := line.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=down, daemon=True).start()
while data := os.read(0, 65536):
    line.sendall(data)
"""


def test_a_command_may_be_the_way(sshd, settled, root, opened, tmp_path):
    (tmp_path / "relay.py").write_text(RELAY)
    command = f"ProxyCommand {sys.executable} {tmp_path}/relay.py %p"
    (settled / "config").write_text(through(sshd, inner=command))
    hub = opened(f"sftp://inner{root}")
    hub.replace("file", b"text", None)
    assert hub.read("file") == b"text"


# who we are


def denied(sshd, home, *tried):
    keys = "".join(f", {home}/{name}" for name in tried)
    return (
        f"{sshd.user}@127.0.0.1:{sshd.port} does not let us in with the keys of the ssh-agent{keys}"
        ": ask who runs it to add your public key, or name another key with IdentityFile in "
        "~/.ssh/config."
    )


def test_without_a_key_nobody_gets_in(sshd, known, root, opened):
    with says(UnreachableError, denied(sshd, known)):
        opened(sshd.uri(root)).has("file")


def test_a_wrong_key_is_named(sshd, known, root, opened):
    make_key(known / "id_rsa", "rsa")
    (known / "id_ecdsa").write_text("rubbish")
    with says(UnreachableError, denied(sshd, known, "id_ecdsa", "id_rsa")):
        opened(sshd.uri(root)).has("file")


def test_only_the_keys_that_are_named_are_shown(sshd, settled, root, opened):
    """The default key would do: but it may be for something else."""
    (settled / "config").write_text("Host *\nIdentityFile ~/.ssh/gone\n")
    with says(UnreachableError, denied(sshd, settled)):
        opened(sshd.uri(root)).has("file")


def test_too_many_keys_are_named(tmp_path, root, home, opened):
    with running(tmp_path / "own", lines="MaxAuthTries 1\n") as own:
        (home / "known_hosts").write_text(f"127.0.0.1 {own.host_key}\n")
        for name, kind in (("id_ecdsa", "ecdsa"), ("id_rsa", "rsa")):
            make_key(home / name, kind)
        with says(UnreachableError, denied(own, home, "id_ecdsa", "id_rsa")):
            opened(own.uri(root)).has("file")


def test_the_agent_is_asked(sshd, known, root, opened, agent):
    with pytest.raises(UnreachableError, match="does not let us in"):
        opened(sshd.uri(root)).has("file")
    add(sshd.home / ".ssh" / "id_ed25519")
    assert not opened(sshd.uri(root)).has("file")


def test_the_agent_may_have_what_is_encrypted_here(sshd, locked, root, opened, agent):
    add(sshd.home / ".ssh" / "id_ed25519")
    (locked.parent / "config").write_text("Host *\nIdentitiesOnly yes\n")
    assert not opened(sshd.uri(root)).has("file")


def test_an_agents_key_that_is_not_named_is_not_shown(sshd, known, root, opened, agent):
    add(sshd.home / ".ssh" / "id_ed25519")
    (known / "config").write_text("Host *\nIdentitiesOnly yes\n")
    with pytest.raises(UnreachableError, match="does not let us in"):
        opened(sshd.uri(root)).has("file")


def test_an_encrypted_key_asks_for_its_passphrase(sshd, locked, root, opened, monkeypatch):
    start = (
        f"{sshd.user}@127.0.0.1:{sshd.port} does not let us in with the keys that are open, and "
        f"{locked} is encrypted"
    )
    end = f": set {PASSPHRASE}, or give the key to the ssh-agent with 'ssh-add {locked}'."
    with says(UnreachableError, start + end):
        opened(sshd.uri(root)).has("file")
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with says(UnreachableError, f"{start} with another passphrase than {PASSPHRASE} holds{end}"):
        opened(sshd.uri(root)).has("file")
    monkeypatch.setenv(PASSPHRASE, SECRET)
    assert not opened(sshd.uri(root)).has("file")


def test_the_key_that_the_passphrase_opens_is_found(sshd, locked, root, opened, monkeypatch):
    make_key(locked.with_name("id_ecdsa"), "ecdsa", "another one")
    make_key(locked.with_name("id_rsa"), "rsa", SECRET)
    monkeypatch.setenv(PASSPHRASE, SECRET)
    assert not opened(sshd.uri(root)).has("file")


def at_terminal(uri, *answers):
    """Ask a hub from a process at a terminal, and answer what it asks there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ASK, uri],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    for question, answer in answers:
        while question.encode() not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, f"{answer}\n".encode())
    said, _ = process.communicate(timeout=60)
    while True:
        try:
            shown += os.read(ours, 1000)
        except OSError:  # it has hung up
            break
    os.close(ours)
    return process.returncode, said, shown.decode()


def test_a_passphrase_is_asked_for_at_the_terminal(sshd, locked, root):
    question = f"Passphrase of {locked}: "
    code, said, shown = at_terminal(sshd.uri(root), (question, SECRET))
    assert (code, said) == (0, "False\n"), shown
    assert SECRET not in shown
    code, _, shown = at_terminal(sshd.uri(root), (question, "wrong"))
    assert code == 1
    assert f"that passphrase does not open {locked}: try again." in shown


class PasswordServer(asyncssh.SSHServer):
    """It lets whoever knows the password in."""

    def begin_auth(self, username):
        return True

    def password_auth_supported(self):
        return True

    def validate_password(self, username, password):
        return password == SECRET


@pytest.fixture
def password_server(tmp_path, home, sshd):
    """Another implementation of a server, which takes passwords; gives its port."""
    make_key(tmp_path / "host_key")
    loop, started, ports = asyncio.new_event_loop(), threading.Event(), []

    async def serve():
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[str(tmp_path / "host_key")],
            server_factory=PasswordServer, sftp_factory=True,
        )  # fmt: skip
        ports.append(server.get_port())
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            await server.wait_closed()

    task = loop.create_task(serve())

    def run():
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            left = asyncio.all_tasks(loop)
            for other in left:
                other.cancel()
            loop.run_until_complete(asyncio.wait(left)) if left else None
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    host_key = (tmp_path / "host_key.pub").read_text()
    (home / "known_hosts").write_text(f"127.0.0.1 {host_key}")
    yield ports[0]
    loop.call_soon_threadsafe(task.cancel)
    thread.join()


def test_a_password_is_asked_for_at_the_terminal(sshd, password_server, root):
    uri = sshd.uri(root, password_server)
    question = f"Password of {sshd.user}@127.0.0.1:{password_server}: "
    code, said, shown = at_terminal(uri, (question, SECRET))
    assert (code, said) == (0, "False\n"), shown
    assert SECRET not in shown
    code, _, shown = at_terminal(uri, (question, "wrong"))
    assert code == 1
    assert "does not let us in with the keys of the ssh-agent, the password: ask who" in shown


def test_without_a_terminal_no_password_is_asked_for(sshd, password_server, root, opened):
    with pytest.raises(
        UnreachableError, match="does not let us in with the keys of the ssh-agent:"
    ):
        opened(sshd.uri(root, password_server)).has("file")


def test_another_implementation_of_a_server_will_do(sshd, password_server, root, opened):
    hub = opened(sshd.uri(root, password_server))
    label = f"{sshd.user}@127.0.0.1:{password_server}"
    hub._server._secrets.passwords[label] = SECRET
    files = {"payload": b"x" * 300_000, "manifest": b"m"}
    assert hub.publish("contributions/north/abc", files) is True
    assert hub.publish("contributions/north/abc", files) is False
    assert list(hub.list("contributions/north")) == ["abc"]
    assert hub.fetch("contributions/north/abc/payload").read_bytes() == b"x" * 300_000
    hub.replace("file", b"one", None)
    hub.replace("file", b"two", b"one")
    with pytest.raises(HubError, match="changed by somebody else meanwhile"):
        hub.replace("file", b"three", b"one")
    assert hub.read("file") == b"two"


# what is told of secrets


def test_secrets_are_shown_nowhere(sshd, locked, root, opened, monkeypatch, caplog):
    monkeypatch.setenv(PASSPHRASE, SECRET)
    asyncssh.set_debug_level(2)
    try:
        with caplog.at_level(logging.DEBUG):
            hub = opened(sshd.uri(root))
            hub.has("file")
    finally:
        asyncssh.set_debug_level(1)
    assert "Accepted" in (sshd.folder / "log").read_text()
    assert caplog.records
    for text in (caplog.text, repr(hub), hub.uri, repr(hub._server), repr(hub._server._secrets)):
        assert SECRET not in text


def test_nothing_of_the_environment_is_sent(sshd, settled, root, opened, monkeypatch, caplog):
    """As ~/.ssh/config may say for logins."""
    monkeypatch.setenv("LC_SECRET", SECRET)
    (settled / "config").write_text(
        f"Host *\nSendEnv LC_*\nSetEnv MORE={SECRET.replace(' ', '-')}\n"
    )
    asyncssh.set_debug_level(2)
    try:
        with caplog.at_level(logging.DEBUG, "asyncssh"):
            assert not opened(sshd.uri(root)).has("file")
    finally:
        asyncssh.set_debug_level(1)
    assert "LC_SECRET" not in caplog.text
    assert "MORE" not in caplog.text


# threads and ends


def test_threads_share_one_connection(sshd, place, root, at_once):
    (root / "file").write_bytes(b"x" * 500_000)
    before = (sshd.folder / "log").read_text().count("Accepted publickey")
    gave, said = at_once(8, lambda _: place.fetch("file").stat().st_size)
    assert (gave, said) == ([500_000] * 8, [])
    assert (sshd.folder / "log").read_text().count("Accepted publickey") == before + 1


def test_a_hub_that_nobody_holds_hangs_up(sshd, root):
    before = threading.active_count()
    hub = open_hub(sshd.uri(root))
    hub.has("file")
    assert threading.active_count() > before
    del hub
    assert threading.active_count() == before


def test_a_process_ends_while_a_hub_is_open(sshd, root):
    """As most do: in a global name, at the very end."""
    code = (
        f"from merge_kit.hub import open_hub; hub = open_hub({sshd.uri(root)!r}); hub.has('file')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

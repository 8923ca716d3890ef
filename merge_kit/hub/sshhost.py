"""A host of SSH as ~/.ssh/config speaks of it: how it is known here, and which keys it is shown.

asyncssh reads the same files, but leaves out checks: ``UserKnownHostsFile none`` would trust any
host, a key that cannot be read ends everything, and what is asked for a passphrase is not used.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import asyncssh

from merge_kit.errors import UnreachableError

PASSPHRASE = "MERGE_KIT_SFTP_PASSPHRASE"
CONNECTING = 30.0
"""Seconds within which a connection must be made, where ~/.ssh/config has no ConnectTimeout."""
ALIVE = 15.0
"""Seconds between questions whether the server is there, where it has no ServerAliveInterval."""
_KEYS = ("id_ed25519_sk", "id_ecdsa_sk", "id_ed25519", "id_ecdsa", "id_rsa")
_KNOWN = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_KNOWN_TO_ALL = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
# They stand behind those of the keys that are known: a server that has none of these shows another
# key, which is refused by its fingerprint, where it would only have hung up.
_ALGORITHMS = (
    "+ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,"
    "rsa-sha2-256"
)

T = TypeVar("T")


class Denied(Exception):
    """A host takes none of the keys that it was shown."""

    def __init__(self, host: Host, password: bool) -> None:
        super().__init__(host.label)
        self.host = host
        self.password = password
        """Whether it would take a password."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host, and the options that ~/.ssh/config has for it."""

    alias: str
    """As the user calls it."""
    options: asyncssh.SSHClientConnectionOptions = field(repr=False)

    @classmethod
    def of(cls, alias: str, port: int | None, user: str | None) -> Host:
        """Look a host up; `port` and `user` go before what the file says.

        Raises
        ------
        UnreachableError
            The file is malformed.
        """
        given: dict[str, Any] = {}
        if port is not None:
            given["port"] = port
        if user is not None:
            given["username"] = user
        try:
            options = asyncssh.SSHClientConnectionOptions(
                host=alias, config=(), client_keys=None, known_hosts=b"", **given
            )
        except (ValueError, OSError) as error:
            raise UnreachableError(f"~/.ssh/config cannot be used for {alias}: {error}.") from error
        return cls(alias, options)

    @property
    def name(self) -> str:
        """The name or number under which it is reached."""
        return str(self.options.host)

    @property
    def label(self) -> str:
        """How messages name it."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{self.options.username}@{name}:{self.options.port}"

    @property
    def timeout(self) -> float:
        """Seconds within which a connection must be made."""
        return float(self._says("ConnectTimeout", None) or CONNECTING)

    @property
    def key_files(self) -> list[Path]:
        """Files that may hold a key for this host."""
        names = self._says("IdentityFile", [f"~/.ssh/{name}" for name in _KEYS])
        return [path for name in names if (path := Path(name).expanduser()).is_file()]

    @property
    def jumps(self) -> Iterator[Host]:
        """The hosts that it is reached through, the first one first."""
        text = self.options.tunnel
        for part in text.split(",") if isinstance(text, str) else ():
            try:
                found = urlsplit(f"ssh://{part.strip().removeprefix('ssh://')}")
                host, port, user = found.hostname, found.port, found.username
            except ValueError:
                host = None
            if not host:
                raise UnreachableError(
                    f"ProxyJump in ~/.ssh/config: '{part}' is no host: correct it."
                )
            yield Host.of(host, port, user)

    async def connect(
        self, tunnel: asyncssh.SSHClientConnection | None, secrets: Secrets
    ) -> asyncssh.SSHClientConnection:
        """Open a connection, through another one where there is a `tunnel`.

        Raises
        ------
        UnreachableError
            The host is not known, or shows another key than the one that is known.
        Denied
            It does not let us in.
        """
        known, client = self._known(), _Client()
        try:
            return await asyncssh.connect(
                self.alias,
                self.options.port,
                username=self.options.username,
                tunnel=tunnel,
                client_factory=lambda: client,
                known_hosts=known,
                x509_trusted_certs=None,  # the host's key must be known, whoever speaks for it
                server_host_key_algs=() if self._says("HostKeyAlgorithms", "") else _ALGORITHMS,
                client_keys=secrets.keys(self),
                agent_identities=self._agent_keys(),
                password=secrets.passwords.get(self.label),
                connect_timeout=self.timeout,
                login_timeout=0,  # part of the above
                keepalive_interval=self._says("ServerAliveInterval", None) or ALIVE,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._stranger(client.shown, known, str(error)) from error
        except asyncssh.PermissionDenied as error:
            raise Denied(self, client.password) from error
        except asyncssh.ProtocolError as error:
            if "authentication" not in str(error):  # too many keys were shown
                raise
            raise Denied(self, client.password) from error

    def _says(self, name: str, default: T) -> T:
        return cast(T, self.options.config.get(name, default))

    def _agent_keys(self) -> Sequence[bytes] | None:
        """Which of the agent's keys may be shown; None: all."""
        if not self._says("IdentitiesOnly", False):
            return None
        found = []
        for path in self.key_files:
            for candidate in (path.with_name(f"{path.name}.pub"), path):
                with suppress(OSError, asyncssh.KeyImportError):
                    found.append(asyncssh.read_public_key(candidate).public_data)
        return found or [b""]  # nothing would be all of them

    def _known(self) -> asyncssh.SSHKnownHosts:
        # Nothing would be what asyncssh takes for its own default, or for anybody.
        known = asyncssh.import_known_hosts("")
        names = (
            *self._says("UserKnownHostsFile", _KNOWN),
            *self._says("GlobalKnownHostsFile", _KNOWN_TO_ALL),
        )
        for path in (Path(name).expanduser() for name in names):
            try:
                known.load(path.read_text())
            except ValueError as error:
                raise UnreachableError(f"{path} cannot be used: {error}: correct it.") from error
            except OSError:  # what cannot be read makes nobody known
                continue
        return known

    def _stranger(
        self, key: asyncssh.SSHKey | None, known: asyncssh.SSHKnownHosts, reason: str
    ) -> UnreachableError:
        """What is said of a host whose key is not known."""
        if key is None:
            return UnreachableError(
                f"{self.label} is not to be trusted ({reason}): ask who runs it."
            )
        shown = f"{key.get_algorithm()} {key.get_fingerprint()}"
        name = self._says("HostKeyAlias", None) or self.name
        port = None if self.options.port == 22 else self.options.port
        accept = f"'sftp -P {self.options.port} {self.options.username}@{self.alias}'"
        if not any(known.match(name, "", port)[:2]):
            return UnreachableError(
                f"the host key of {self.label} is not known here, it shows {shown}: if who runs it "
                f"confirms this key, add it by connecting once with {accept}."
            )
        old = name if port is None else f"[{name}]:{port}"
        return UnreachableError(
            f"the host key of {self.label} is not the one that is known here, it shows {shown}: "
            "somebody may be listening in between; only if who runs it confirms this key, forget "
            f"the old one with 'ssh-keygen -R {old}' and add it by connecting once with {accept}."
        )


class _Client(asyncssh.SSHClient):
    """What a host shows of itself, and asks for."""

    def __init__(self) -> None:
        self.shown: asyncssh.SSHKey | None = None
        self.password = False

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        """Called for a key that is not known, which is never taken."""
        self.shown = key
        return False

    def password_auth_requested(self) -> None:
        """The host would take a password; who sits at the terminal is asked between attempts."""
        self.password = True

    def kbdint_auth_requested(self) -> None:
        """As for a password."""
        self.password = True


class _Keys(list[asyncssh.SSHKeyPair]):
    """A list that counts even when it is empty: asyncssh would look for keys by itself."""

    def __bool__(self) -> bool:
        return True


class Secrets:
    """What opens keys and doors: kept while the hub is open, and shown nowhere."""

    def __init__(self) -> None:
        self.count = 0
        """How many have been found."""
        self.passwords: dict[str, str] = {}
        self._passphrases: dict[Path, str] = {}

    def keys(self, host: Host) -> list[asyncssh.SSHKeyPair]:
        """Keys for a host, from those files that are not encrypted or have been opened."""
        found = _Keys()
        for path in host.key_files:
            with suppress(OSError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
                found += asyncssh.load_keypairs(str(path), self._passphrases.get(path))
        return found

    def find(self, denied: Denied) -> None:
        """Find what has not been tried yet, in the environment or by asking at the terminal.

        Raises
        ------
        UnreachableError
            There is nothing, or nobody to ask.
        """
        host, given = denied.host, os.environ.get(PASSPHRASE)
        locked = [p for p in host.key_files if p not in self._passphrases and _is_locked(p)]
        opened = next((path for path in locked if given and _opens(path, given)), None)
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if opened and given:
            self._passphrases[opened] = given
        elif locked and terminal:
            text = _asked(f"Passphrase of {locked[0]}: ")
            if not _opens(locked[0], text):
                raise UnreachableError(f"that passphrase does not open {locked[0]}: try again.")
            self._passphrases[locked[0]] = text
        elif locked:
            other = f" with another passphrase than {PASSPHRASE} holds" if given else ""
            raise UnreachableError(
                f"{host.label} does not let us in with the keys that are open, and {locked[0]} is "
                f"encrypted{other}: set {PASSPHRASE}, or give the key to the ssh-agent with "
                f"'ssh-add {locked[0]}'."
            )
        elif denied.password and terminal and host.label not in self.passwords:
            self.passwords[host.label] = _asked(f"Password of {host.label}: ")
        else:
            raise self._nothing_left(host)
        self.count += 1

    def _nothing_left(self, host: Host) -> UnreachableError:
        tried = ["the keys of the ssh-agent", *map(str, host.key_files)]
        tried += ["the password"] * (host.label in self.passwords)
        return UnreachableError(
            f"{host.label} does not let us in with {', '.join(tried)}: ask who runs it to add your "
            "public key, or name another key with IdentityFile in ~/.ssh/config."
        )


def _asked(text: str) -> str:
    try:
        return getpass.getpass(text)
    except EOFError as error:
        raise UnreachableError(f"{text.rstrip(': ')}: nothing was typed: try again.") from error


def _is_locked(path: Path) -> bool:
    """Whether a file holds a private key that needs a passphrase."""
    try:
        asyncssh.read_private_key(path)
    except asyncssh.KeyImportError as error:
        return str(error).startswith("Passphrase")
    except (OSError, asyncssh.KeyEncryptionError):
        return False
    return False


def _opens(path: Path, passphrase: str) -> bool:
    try:
        asyncssh.read_private_key(path, passphrase)
    except (OSError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
        return False
    return True

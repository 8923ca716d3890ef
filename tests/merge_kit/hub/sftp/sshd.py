"""A real SSH server of the tests' own, and a line to it that cuts and delays."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
USER = getpass.getuser()
CONFIG = """
ListenAddress 127.0.0.1
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
"""
ALL_AT_ONCE = "MaxStartups 100\n"


def need_sshd() -> str:
    """The server's program."""
    if SSHD and shutil.which("ssh-keygen"):
        return SSHD
    reason = "OpenSSH's server is not installed"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> str:
    """A new key; gives its public half."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path.with_name(f"{path.name}.pub").read_text().strip()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Sshd:
    """An OpenSSH server for the user who runs the tests, and a home folder that knows it."""

    def __init__(self, folder: Path, sftp: str = "internal-sftp", lines: str = ALL_AT_ONCE) -> None:
        self.folder = folder
        self.user = USER
        self.home = folder / "home"
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True)
        self.host_key = make_key(folder / "host_key")
        (folder / "authorized_keys").write_text(make_key(ssh / "id_ed25519") + "\n")
        self.knows(f"127.0.0.1 {self.host_key}\n")
        files = f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        subsystem = f"Subsystem sftp {sftp}\n" if sftp else ""
        (folder / "sshd_config").write_text(lines + files + CONFIG + subsystem)
        self.port = 0
        self.start()

    def knows(self, text: str) -> None:
        """What the home folder knows of hosts."""
        (self.home / ".ssh" / "known_hosts").write_text(text)

    def uri(self, path: object = "", port: int | None = None) -> str:
        """The address of a folder."""
        return f"sftp://{USER}@127.0.0.1:{port or self.port}{path}"

    def start(self) -> None:
        """Start it, at the same port again where it has had one."""
        if os.geteuid() == 0:  # where it keeps children without rights; packages make it at boot
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for _ in range(5):
            port = self.port or free_port()
            command = [need_sshd(), "-D", "-p", str(port), "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(
                [*command, "-E", str(self.folder / "log")],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if self._answers(port):
                self.port = port
                return
        raise AssertionError((self.folder / "log").read_text())

    def _answers(self, port: int) -> bool:
        for _ in range(200):
            if self.process.poll() is not None:
                return False
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as line:
                return line.recv(4) == b"SSH-"
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        """kill -9, of the server and of its children, of which each serves a client."""
        self.process.send_signal(signal.SIGSTOP)  # no further ones
        for child in self.children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.kill()
        self.process.wait(20)

    def children(self) -> list[int]:
        """Its processes but the first."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True, timeout=20
        )
        pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
        found, left = [], [self.process.pid]
        while left:
            parent = left.pop()
            below = [pid for pid, above in pairs if above == parent]
            found += below
            left += below
        return found


class Line:
    """A TCP line to the server, through this process, that can be cut, damaged and held up."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.calls = 0
        """Connections so far."""
        self.passed = {"up": 0, "down": 0}
        """Bytes so far."""
        self.delay = 0.0
        """Seconds by which all bytes are late, in each direction."""
        self.cuts: list[tuple[str, int]] = []
        """Of the next connections: in which direction, and after how many bytes each breaks."""
        self.flips: list[tuple[str, int]] = []
        """The same, for those in which a bit changes."""
        self.then: Callable[[], object] = lambda: None
        """What happens when a connection breaks."""
        self.held = threading.Event()
        """While it is set, nothing passes, and nobody is told."""
        self._hanging = 0
        self._over = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._listener.settimeout(0.1)
        self._threads[0].start()

    def hang(self) -> None:
        """Let nothing more pass on the connections that there are."""
        self._hanging = self.calls

    def _accept(self) -> None:
        while not self._over:
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.calls += 1
            cut = self.cuts.pop(0) if self.cuts else ("", 0)
            flip = self.flips.pop(0) if self.flips else ("", 0)
            try:
                far = socket.create_connection(("127.0.0.1", self._port), 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):  # as both ends do: small messages must not wait for each other
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = (near, far, self.calls, cut, flip)
            self._threads.append(threading.Thread(target=self._serve, args=line, daemon=True))
            self._threads[-1].start()

    def _serve(
        self, near: socket.socket, far: socket.socket, number: int,
        cut: tuple[str, int], flip: tuple[str, int],
    ) -> None:  # fmt: skip
        """One connection, until both of its directions are over."""
        with near, far:
            pumps = []
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                faults = [place if way == at else None for at, place in (cut, flip)]
                line = (source, sink, way, number, *faults)
                pumps.append(threading.Thread(target=self._pump, args=line, daemon=True))
                pumps[-1].start()
            while any(pump.is_alive() for pump in pumps):
                if self._over:
                    _hang_up(near)
                    _hang_up(far)
                pumps[0].join(0.05)

    def _pump(
        self, source: socket.socket, sink: socket.socket, way: str, number: int,
        cut: int | None, flip: int | None,
    ) -> None:  # fmt: skip
        passed = 0
        with suppress(OSError):
            while data := source.recv(16384):
                time.sleep(self.delay)
                while (self.held.is_set() or number <= self._hanging) and not self._over:
                    time.sleep(0.01)
                if flip is not None and passed <= flip < passed + len(data):
                    damaged = bytearray(data)
                    damaged[flip - passed] ^= 1
                    data = bytes(damaged)
                if cut is not None and passed + len(data) > cut:
                    sink.sendall(data[: cut - passed])
                    self.then()
                    break
                sink.sendall(data)
                passed += len(data)
                self.passed[way] += len(data)
        _hang_up(source)
        _hang_up(sink)

    def close(self) -> None:
        """Cut all. A socket is closed when nobody waits at it: another one may get its number."""
        self._over = True
        for thread in self._threads:
            thread.join()
        self._listener.close()


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(folder: Path, sftp: str = "internal-sftp", lines: str = ALL_AT_ONCE) -> Iterator[Sshd]:
    """A server of its own."""
    need_sshd()
    server = Sshd(folder, sftp, lines)
    try:
        yield server
    finally:
        server.kill()

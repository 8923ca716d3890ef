"""Hubs in object stores: S3 and what speaks its language, Google Cloud Storage and Azure.

Such a store has no folders and no renames, but it can refuse to overwrite: every file is written
only if nothing is there (If-None-Match), an entry's manifest last; without its manifest an entry is
not there. Entries are named after their content, so whoever restarts finds its own files and goes
on. Large files are sent in parts under a hidden name and then copied to their own one by the store
itself, which is the step that is refused where a file is: parts are never put together over one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
)

from merge_kit.errors import HubError, UnreachableError
from merge_kit.files import sha256_bytes, sha256_file, storage_errors
from merge_kit.hub.base import SMALL, changed_meanwhile, check_name, is_plain
from merge_kit.hub.objecterrors import explained, is_broken, is_unknown, unconditional
from merge_kit.hub.objectstores import Patience, open_store, parts_of
from merge_kit.hub.remote import RemoteHub, content_size
from merge_kit.hub.s3list import lister

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion

Names = list[str]
T = TypeVar("T")
PIECE = 8 * 2**20
"""Bytes that one request carries; what is larger goes in parts."""
LARGEST = 5 * 2**30
"""Bytes that a store copies in one step."""
LAST = {"contributions": "manifest.json", "withdrawals": "withdrawal.json"}
"""Entries of the sites below these folders are there when this file is."""
_PROBE = b"merge-kit asks whether this file can be overwritten\n"
_TRIES = 4


class ObjectHub(RemoteHub):
    """A hub under a prefix of a bucket; written as ``s3://bucket/prefix``."""

    def __init__(self, uri: str, patience: Patience | None = None) -> None:
        scheme, bucket, prefix = parts_of(uri)
        super().__init__("/".join(filter(None, (f"{scheme}://{bucket}", prefix))))
        self._patience = patience or Patience()
        self._store = open_store(scheme, bucket, prefix, self._patience)
        self._lister = lister(bucket) if scheme == "s3" else None
        self._prefix = f"{prefix}/" if prefix else ""
        self._listed: dict[str, Names] = {}
        self._proven: set[str] = set()
        self._answered = False

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted; contributions only with their manifest.

        All contributions take one request for each thousand files: what was seen of the sites' own
        folders meanwhile answers the next question about each of them, once.
        """
        check_name(folder)
        names = self._listed.pop(folder, None)
        yield from self._names(folder) if names is None else names

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Write the files one after another, each only if nothing is there.

        What lies there of an attempt that was broken off is compared and kept. Whoever is killed
        leaves files that nobody sees, and perhaps one under a hidden name, which the next publisher
        of the same entry removes.

        Raises
        ------
        HubError
            A file is there with other bytes, or the storage would overwrite.
        """
        for name in (folder, *files):
            check_name(name)
        *others, last = files
        if self.has(f"{folder}/{last}"):
            return False
        large = _check_sources(f"{self.uri}/{folder}", files)
        try:
            self._check_refusal(f"{folder}/{last}", "copied" if large else "written")
            for name in others:
                if not self._create(f"{folder}/{name}", files[name]):
                    if self.has(f"{folder}/{last}"):
                        return False
                    self._check_same(folder, name, files[name])
            published = self._create(f"{folder}/{last}", files[last])
        except HubError:
            if self._is_there(f"{folder}/{last}"):  # who was faster has removed all that is hidden
                return False
            raise
        self._tidy(folder)
        return published

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace a small file on the condition that it is still the one that was read.

        Raises
        ------
        HubError
            It does not hold what was expected, or the storage would overwrite all the same.
        """
        check_name(name)
        self._check_refusal(name, "written" if expected is None else "replaced")
        if expected is None:
            if not self._create(name, data) and self.read(name) != data:
                raise changed_meanwhile(f"{self.uri}/{name}")
            return
        for attempt in range(_TRIES):
            now, version = self._small(name)
            if now == data and attempt:  # the try that was not heard of has gone through
                return
            if now != expected:
                break
            try:
                self._store.put(name, data, mode=version)
                return
            except PreconditionError:
                pass
            except BaseError as error:
                if not is_unknown(error) or attempt == _TRIES - 1:
                    raise self._explained(error, name, "written") from None
            self._wait(attempt)
        raise changed_meanwhile(f"{self.uri}/{name}")

    def read(self, name: str) -> bytes:
        """The bytes of a small file, in one request.

        Raises
        ------
        HubError
            The file is not there, or is not small.
        """
        check_name(name)
        return self._small(name)[0]

    def remove(self, name: str) -> bool:
        """Remove a file; False where the bucket keeps old versions."""
        check_name(name)
        if (meta := self._head(name)) is None:
            return True
        self._ask(name, "removed", lambda: self._store.delete(name))
        return meta["version"] in (None, "null")

    def _look(self, name: str) -> tuple[int, str] | None:
        meta = self._head(name)
        return None if meta is None else (meta["size"], f"{meta['e_tag']} {meta['version']}")

    def _copy(self, name: str, target: Path) -> None:
        size, _ = self._found(name)
        with storage_errors(target), target.open("xb") as file:
            for piece in self._pieces(name, size):
                file.write(piece)

    def _pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of a file, each request for some of them: a slow line needs no patience."""
        options: Any = {}
        for begin in range(0, size, PIECE):
            options["range"] = (begin, min(begin + PIECE, size))
            meta, piece = self._ask(name, "read", lambda: self._got(name, options))
            options["if_match"] = meta["e_tag"]
            yield piece

    def _got(self, name: str, options: Any) -> tuple[ObjectMeta, bytes]:
        found = self._store.get(name, options=options)
        return found.meta, found.bytes().to_bytes()

    def _small(self, name: str) -> tuple[bytes, UpdateVersion]:
        """The bytes of a small file, and what tells it from any later one."""

        def got() -> tuple[ObjectMeta, bytes]:
            found = self._store.get(name)
            if found.meta["size"] > SMALL:
                where = f"{self.uri}/{name}"
                raise HubError(
                    f"{where} is larger than {SMALL} bytes: it is no file of a federation."
                )
            return found.meta, found.bytes().to_bytes()

        meta, data = self._ask(name, "read", got)
        version: Any = {k: meta[k] for k in ("e_tag", "version") if meta[k]}
        return data, version

    def _head(self, name: str) -> ObjectMeta | None:
        def look() -> ObjectMeta:
            try:
                return self._store.head(name)
            except PermissionDeniedError:  # an answer without a body does not say why
                return self._store.get(name).meta

        try:
            return self._ask(name, "read", look, passing=(FileNotFoundError,))
        except FileNotFoundError:
            if not self._answered:  # without a bucket no file is there either, and nobody says why
                with suppress(InvalidPathError):
                    self._ask(
                        "", "listed", self._store.list_with_delimiter, passing=(InvalidPathError,)
                    )
                self._answered = True
            return None

    def _is_there(self, name: str) -> bool:
        with suppress(HubError):
            return self._head(name) is not None
        return False

    def _names(self, folder: str) -> Names:
        root, *below = folder.split("/")
        if root in LAST and len(below) < 2:
            return self._entries(folder)
        start = f"{folder}/"  # a folder may be an object, too
        found = (path for path in self._paths(folder) if path.startswith(start))
        names = {path.removeprefix(start).partition("/")[0] for path in found}
        if root in LAST and len(below) == 2 and LAST[root] not in names:
            return []
        return sorted(filter(_is_sound, names))

    def _entries(self, folder: str) -> Names:
        """Sites that have entries, or the entries of one."""
        root = folder.partition("/")[0]
        found: dict[str, set[str]] = {}
        for path in self._paths(folder):
            _, *parts = path.split("/")
            if len(parts) == 3 and parts[2] == LAST[root] and all(map(_is_sound, parts)):
                found.setdefault(f"{root}/{parts[0]}", set()).add(parts[1])
        if folder != root:
            return sorted(found.get(folder, ()))
        self._listed.update((site, sorted(names)) for site, names in found.items())
        return sorted(site.rpartition("/")[2] for site in found)

    def _paths(self, folder: str) -> Names:
        """All objects below a folder, whatever they are called."""

        def listed() -> Names:
            try:
                pages = self._store.list(folder, chunk_size=1000)
                return [meta["path"] for page in pages for meta in page]
            except InvalidPathError:
                if self._lister is None:
                    raise
                keys = self._lister.keys(f"{self._prefix}{folder}/", self._patience)
                return [key.removeprefix(self._prefix) for key in keys]

        return self._ask(folder, "listed", listed)

    def _create(self, name: str, content: Path | bytes) -> bool:
        """Write a new file; False when one is there, perhaps by a try that was not heard of."""
        if content_size(content) > PIECE:
            assert isinstance(content, Path)  # what is held in memory is small
            return self._create_large(name, content)
        data = content if isinstance(content, bytes) else content.read_bytes()
        return self._new(name, lambda: self._store.put(name, data, mode="create"))

    def _create_large(self, name: str, content: Path) -> bool:
        hidden = _hidden(name)

        def send() -> None:
            self._store.put(
                hidden, content, use_multipart=True, chunk_size=PIECE, max_concurrency=2
            )

        try:
            self._ask(name, "written", send)
            return self._new(name, lambda: self._store.copy(hidden, name, overwrite=False))
        finally:
            self._discard(hidden)

    def _new(self, name: str, write: Callable[[], object]) -> bool:
        for attempt in range(_TRIES):
            try:
                write()
                return True
            except AlreadyExistsError:
                if self._head(name):
                    return False
                # 409: another write was under way, and has not come to its end.
            except (BaseError, FileNotFoundError) as error:
                if not is_unknown(error) or attempt == _TRIES - 1:
                    raise self._explained(error, name, "written") from None
            self._wait(attempt)
        raise changed_meanwhile(f"{self.uri}/{name}")

    def _check_same(self, folder: str, name: str, content: Path | bytes) -> None:
        """Refuse what lies there in the place of a file when its bytes are others.

        A reading may have been damaged on its way: it accuses only where a second one is the same.
        """
        where, seen = f"{folder}/{name}", None
        digest = sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
        ours = (content_size(content), digest)
        for attempt in range(_TRIES):
            before, seen = seen, self._bytes_of(where, ours[0])
            if seen == ours:
                return
            if seen == before:
                raise HubError(
                    f"{self.uri}/{where} is there already with other bytes: ask the coordinator to "
                    "remove this folder, then publish again."
                )
            self._wait(attempt)
        raise UnreachableError(
            f"{self.uri}/{where} arrives with other bytes each time: the connection damages them; "
            "take another one, then publish again."
        )

    def _bytes_of(self, name: str, expected: int) -> tuple[int, str]:
        """Size and digest of what lies there; no digest where the size is another one."""
        size, _ = self._found(name)
        if size != expected:
            return size, ""
        digest = hashlib.sha256()
        for piece in self._pieces(name, size):
            digest.update(piece)
        return size, f"sha256:{digest.hexdigest()}"

    def _check_refusal(self, target: str, step: str) -> None:
        """Refuse a storage that would overwrite; each step is tried once, on a hidden file."""
        if step in self._proven:
            return
        name = _hidden(target)
        steps: dict[str, Callable[[], object]] = {
            "written": lambda: self._store.put(name, _PROBE, mode="create"),
            "copied": lambda: self._store.copy(name, name, overwrite=False),
            "replaced": lambda: self._store.put(
                name, _PROBE, mode={"e_tag": '"0"', "version": "1"}
            ),
        }
        try:
            with suppress(AlreadyExistsError):
                self._ask(target, "written", steps["written"], passing=(AlreadyExistsError,))
            for each in dict.fromkeys(("written", step)):
                refusals = (AlreadyExistsError, PreconditionError)
                try:
                    self._ask(target, "written", steps[each], passing=refusals)
                except refusals:
                    self._proven.add(each)
                else:
                    raise unconditional(self.uri)
        finally:
            self._discard(name)

    def _tidy(self, folder: str) -> None:
        """Remove hidden files that killed publishers left; who may not leaves them."""
        with suppress(HubError):
            for path in self._paths(folder):
                name = path.removeprefix(f"{folder}/")
                if name.startswith(".") and "/" not in name and _is_sound(name[1:]):
                    self._discard(path)

    def _discard(self, name: str) -> None:
        with suppress(BaseError, FileNotFoundError):
            self._store.delete(name)

    def _wait(self, attempt: int) -> None:
        time.sleep(self._patience.pause * 2**attempt)

    def _explained(self, error: Exception, name: str, done: str) -> HubError:
        return explained(error, self.uri, name, done, self._patience.timeout)

    def _ask(
        self,
        name: str,
        done: str,
        what: Callable[[], T],
        *,
        passing: tuple[type[Exception], ...] = (),
    ) -> T:
        """What the storage answers, or one sentence for what it says, but for what is `passing`.

        The library repeats a request; where an answer breaks off after its headers, we do.
        """
        attempt = 0
        while True:
            try:
                return what()
            except passing:
                raise
            except (BaseError, FileNotFoundError) as error:
                if not is_broken(error) or attempt == self._patience.retries:
                    raise self._explained(error, name, done) from None
            self._wait(attempt)
            attempt += 1


def _is_sound(name: str) -> bool:
    return bool(name) and is_plain(name)


def _check_sources(where: str, files: Mapping[str, Path | bytes]) -> bool:
    """Whether one of the files is large; all of them must be readable before any is sent."""
    try:
        sizes = {name: content_size(content) for name, content in files.items()}
        for content in files.values():
            if isinstance(content, Path):
                content.open("rb").close()
    except OSError as error:
        raise HubError(
            f"{where} cannot be written: {error.filename}: {error.strerror}: run the command that "
            "makes this file again."
        ) from error
    for name, size in sizes.items():
        if size > LARGEST:
            raise HubError(
                f"{name} has {size} bytes, and an object store takes {LARGEST} at most: send less "
                "with publish --compress."
            )
    return max(sizes.values()) > PIECE


def _hidden(name: str) -> str:
    folder, separator, leaf = name.rpartition("/")
    return f"{folder}{separator}.{leaf}.{uuid4().hex}"

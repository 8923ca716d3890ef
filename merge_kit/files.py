"""Files that are whole or not there: atomic writing, digests, canonical JSON."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from merge_kit.errors import MergeKitError, UsageError

_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no white space and no NaN: one value, one sequence of bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sha256_bytes(data: bytes) -> str:
    """Digest of bytes, as ``sha256:<64 hex digits>``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes, as ``sha256:<64 hex digits>``."""
    with path.open("rb") as file:
        return sha256_open(file)


def sha256_open(file: BinaryIO) -> str:
    """The same of what is left to read of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def partial_path(path: Path) -> Path:
    """Where a file or folder grows before it is renamed to `path`.

    The name is fixed, so that whatever a killed run left there is replaced by the next one.
    """
    return path.with_name(f".{path.name}.partial")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a file system says while `path` is written into one sentence."""
    try:
        yield
    except OSError as error:
        raise MergeKitError(_explain(error, path)) from error


def _explain(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing_parent(path)).free // 2**20
        return (
            f"{path} cannot be written: no space left ({free} MiB free): "
            "make room and run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{path} cannot be written: {error.strerror}: choose a folder that you may write to."
    return f"{path} cannot be written: {error.strerror or error}: check the folder and the disk."


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, never a part.

    Raises
    ------
    MergeKitError
        The storage is full, read-only or gone.
    """
    if isinstance(data, str):
        data = data.encode()
    partial = partial_path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(_begun(partial), "wb") as file:  # the lock ends with it, hence all in here
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def _begun(partial: Path) -> int:
    """A new, empty, locked file. Waits for another writer of the same name; what a killed one left
    has no lock and is removed, and so is a link that somebody put there.
    """
    while True:
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_left(partial)
            continue
        if _locked(handle, partial):
            return handle
        os.close(handle)


def _remove_left(partial: Path) -> None:
    """Remove `partial` unless somebody is writing it: then wait a moment."""
    try:
        handle = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES):
            raise
        partial.unlink(missing_ok=True)  # a link, or another user's
        return
    try:
        if _locked(handle, partial):
            partial.unlink(missing_ok=True)
        else:
            time.sleep(0.01)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path` that becomes `path` when the block ends without an error.

    With `replace` an existing `path` gives way at the last moment; a run killed between the two
    renames leaves the old folder under a name that the next call puts back. Where `path` is a link,
    the folder that it leads to is made or replaced.

    Raises
    ------
    UsageError
        `path` exists and `replace` is false.
    MergeKitError
        Another process is writing it, or the storage is full, read-only or gone.
    """
    shown = path
    path = Path(os.path.realpath(path) if path.is_symlink() else os.path.abspath(path))
    if path.exists() and not replace:
        raise _exists(shown)
    with _alone(path, shown):
        retired = path.with_name(f".{path.name}.old")
        if retired.exists() and not path.exists():
            retired.rename(path)
        if path.exists() and not replace:
            raise _exists(shown)
        partial = partial_path(path)
        with storage_errors(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        with storage_errors(path):
            sync_folder(partial)
            if path.exists():
                shutil.rmtree(retired, ignore_errors=True)
                path.rename(retired)
            partial.rename(path)
            shutil.rmtree(retired, ignore_errors=True)


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already: choose another folder or remove this one.")


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process writes `path`, and keep others waiting meanwhile."""
    lock = path.with_name(f".{path.name}.lock")
    while (handle := _held(lock, path)) is None:
        time.sleep(0.05)
    with _until_released(handle, lock):
        yield


@contextmanager
def _alone(path: Path, shown: Path) -> Iterator[None]:
    """Keep a second process from writing `path`; the lock ends with the process that holds it."""
    lock = path.with_name(f".{path.name}.lock")
    handle = _held(lock, path)
    if handle is None:
        raise MergeKitError(
            f"{shown} is being written by another process: wait for it, or choose another folder."
        )
    with _until_released(handle, lock):
        yield


@contextmanager
def _until_released(handle: int, lock: Path) -> Iterator[None]:
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _held(lock: Path, path: Path) -> int | None:
    """The open lock, or None while another process has it."""
    with storage_errors(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    if _locked(handle, lock):
        return handle
    os.close(handle)
    return None


def _locked(handle: int, lock: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks must do without
    # Whoever held the lock has removed its file: what was opened may not be there any more.
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Ask the disk to keep a folder's entries, so that a rename never outruns its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""One repository on the Hugging Face Hub, or on a server that speaks its protocol.

Files go up as plain LFS uploads, which every server takes: Xet is not asked for, so that none of
the variables that the client library reads at import matter. Its settings for certificates and
proxies hold, and it retries uploads by itself.
"""

from __future__ import annotations

import importlib.metadata
import io
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub.errors import EntryNotFoundError

from merge_kit.errors import HubError, MergeKitError, UnreachableError
from merge_kit.files import storage_errors
from merge_kit.hub.answers import (
    OVERTAKEN,
    Doing,
    asked_pause,
    discreet,
    explained,
    how_to_log_in,
    is_transient,
    status_of,
)
from merge_kit.hub.base import changed_meanwhile
from merge_kit.hub.commits import Done, Found, Operation, Plan, afresh, unlike
from merge_kit.hub.endpoint import Endpoint, at, chosen, prepare_session

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries of what a fault of the moment has stopped."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 8.0
"""Bounds of the seconds, drawn at random, after which one whom others overtook tries again."""
PATIENCE = 900.0
"""Seconds after which one whom others always overtake gives up."""
MENDS = 3
"""Further commits for one that arrived damaged."""
_MEND = "Mend: "
_NAME = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)

_COMMIT = re.compile("[0-9a-f]{40}")

T = TypeVar("T")


class Repository:
    """A model repository; its commits are named by their 40 hex digits."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name, self.endpoint, self.uri = name, endpoint, endpoint.uri(name)
        if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            raise HubError(
                f"'{name}' is no name of a repository: write it as owner/name, in letters, digits, "
                "'-', '_' and '.'."
            )
        self._api = HfApi(
            endpoint=endpoint.url,
            token=endpoint.authorization,
            library_name="merge-kit",
            library_version=importlib.metadata.version("merge-kit"),
        )

    def head(self) -> str:
        """The latest commit."""

        def ask() -> str:
            found = str(self._api.model_info(self.name, expand=["sha"]).sha)
            if not _COMMIT.fullmatch(found):
                raise ValueError("no commit")
            return found

        return self._ask(ask)

    def files(
        self, commit: str, folder: str | None = None, *, deep: bool = True
    ) -> dict[str, Found]:
        """The files at a commit, or of one folder there, by their paths; none where it is not.

        With `deep` those of the folders below too.
        """

        def ask() -> dict[str, Found]:
            rows = self._api.list_repo_tree(self.name, folder, recursive=deep, revision=commit)
            return {
                row.path: Found(
                    row.size, f"sha256:{row.lfs.sha256}" if row.lfs else f"git:{row.blob_id}"
                )
                for row in rows
                if isinstance(row, RepoFile)
            }

        try:
            return self._ask(ask)
        except _Absent:
            return {}

    def settled(self, commit: str) -> dict[str, Found]:
        """All files at a commit, as they are listed twice: a listing has no digest of its own.

        Raises
        ------
        HubError
            It is another one each time.
        """
        return self._twice(lambda: self.files(commit))

    def _twice(self, look: Callable[[], T]) -> T:
        seen = look()
        for _ in PAUSES:
            before, seen = seen, look()
            if seen == before:
                return seen
        raise HubError(
            f"{self.endpoint.shown} lists {self.name} in another way each time: the connection "
            "damages what it says; take another one."
        )

    def download(self, path: str, commit: str, found: Found, target: Path) -> None:
        """Write a file's bytes to a new local file, going on where a connection broke off.

        Raises
        ------
        HubError
            They do not arrive, or are not those that the server lists.
        """
        url = hf_hub_url(self.name, path, revision=commit, endpoint=self.endpoint.url)
        try:
            with storage_errors(target), target.open("wb") as file:
                self._ask(lambda: self._stream(url, found.size, file), progress=file.tell)
        except HubError:
            raise
        except MergeKitError as error:  # a full disk here says nothing of what is there
            raise UnreachableError(str(error)) from error
        if target.stat().st_size != found.size or not found.is_of(target):
            raise HubError(
                f"{self.uri}/{path} arrived damaged: its bytes are not those that "
                f"{self.endpoint.shown} lists; try again."
            )

    def _stream(self, url: str, size: int, file: BinaryIO) -> None:
        begun = file.tell()
        if begun and begun >= size:
            return
        headers = {"Accept-Encoding": "identity"}  # a part of a compressed stream is of no use
        if self.endpoint.token:
            headers["Authorization"] = f"Bearer {self.endpoint.token}"
        if begun:
            headers["Range"] = f"bytes={begun}-"
        with get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if begun and response.status_code != 206:
                file.seek(0)
                file.truncate()
            for chunk in response.iter_bytes():  # of a larger size, a broken one would be lost
                with storage_errors(Path(file.name)):
                    file.write(chunk)
                if file.tell() > size:
                    return

    @contextmanager
    def additions(
        self, files: Mapping[str, Path | bytes], *, for_pull_request: bool = False
    ) -> Iterator[list[Operation]]:
        """Upload what is large, and give the operations of a commit with all of the files."""
        self.check_writable()
        with ExitStack() as stack:
            opened = {path: stack.enter_context(_opened(it)) for path, it in files.items()}
            # Always as open files: the library would send paths and bytes by Xet.
            operations = [CommitOperationAdd(path, file) for path, file in opened.items()]

            def upload() -> None:
                for file in opened.values():
                    file.seek(0)
                self._api.preupload_lfs_files(
                    self.name, operations, create_pr=for_pull_request, free_memory=False
                )

            self._ask(upload, "write", pauses=PAUSES[:2])  # the library tries again by itself
            yield list(operations)

    def change(
        self, message: str, plan: Plan, *, pull_request: bool = False, mends: int = MENDS
    ) -> Done:
        """One commit on top of the head, however often others are faster.

        `plan` looks at a commit and gives the operations to put on top of it, or None when nothing
        is left to be done. It is asked again whenever the head has moved, or an answer was lost.
        What a line has made of the commit is looked at, and mended by at most `mends` further ones.

        Raises
        ------
        HubError
            The server cannot be reached or does not let us, or the line damages what is sent.
        """
        self.check_writable()
        lost, end, bound = 0, time.monotonic() + PATIENCE, FIRST_PAUSE
        while True:
            head = self.head()
            operations = plan(head)
            if operations is None:
                return Done(head, ours=lost > 0)
            wait = 0.0
            try:
                prepare_session(self.endpoint)
                made = self._api.create_commit(
                    self.name,
                    operations,
                    commit_message=message,
                    parent_commit=head,
                    create_pr=pull_request,
                )
            except Exception as error:
                if is_transient(error) and lost < len(PAUSES):
                    lost += 1  # it may have gone through all the same
                    wait = asked_pause(error)
                elif status_of(error) not in OVERTAKEN:
                    raise explained(error, self.endpoint, self.name, "write") from discreet(error)
            else:
                if made.oid == head:  # the library found nothing new, as somebody has undone it
                    raise changed_meanwhile(self.uri)
                done = Done(made.pr_revision or made.oid, True, made.pr_url)
                return self.compared(message, head, done, operations, mends)
            if time.monotonic() > end:
                raise HubError(
                    f"others are always faster with {self.uri}: run the same command again "
                    "when fewer publish."
                )
            time.sleep(wait + random.uniform(0, bound))
            bound = min(2 * bound, LONGEST_PAUSE)

    def compared(
        self, message: str, before: str, done: Done, operations: Sequence[Operation],
        mends: int = MENDS,
    ) -> Done:  # fmt: skip
        """What becomes of a commit on top of `before`: where the line has changed it, it is mended.

        Raises
        ------
        HubError
            See `change`.
        """
        wrong = self._wrong(done.revision, operations)
        return self._mended(message, before, done, operations, wrong, mends) if wrong else done

    def _wrong(self, revision: str, operations: Sequence[Operation]) -> list[Operation]:
        """Those of the operations that have not come out as they were meant."""
        folders = {operation.path_in_repo.rpartition("/")[0] for operation in operations}

        def look() -> dict[str, Found]:
            listings = [self.files(revision, f or None, deep=False) for f in sorted(folders)]
            return dict(item for listing in listings for item in listing.items())

        wrong = unlike(look(), operations)
        return unlike(self._twice(look), operations) if wrong else []

    def _mended(
        self, message: str, before: str, done: Done, operations: Sequence[Operation],
        wrong: Sequence[Operation], mends: int,
    ) -> Done:  # fmt: skip
        """What becomes of a commit on top of `before` that is not what was sent.

        Nothing but TLS guards a commit on its way, and its server cannot know what was meant.
        """
        old, new = self.settled(before), self.settled(done.revision)
        sent = {operation.path_in_repo for operation in operations}
        strays = sorted(new.keys() - old.keys() - sent)
        changed = sorted(path for path in old.keys() - sent if old[path] != new.get(path))
        paths = [operation.path_in_repo for operation in wrong]
        if not (strays or changed or new.keys() & set(paths)):  # the repository wants none of these
            return replace(done, left_out=tuple(sorted(paths)))
        if done.pull_request:
            raise HubError(
                f"{done.pull_request} arrived damaged, with other bytes than were sent: close it, "
                "and run the same command again."
            )
        if changed:
            raise HubError(
                f"commit {done.revision} of {self.uri} arrived damaged and has changed "
                f"{changed[0]}: take it back from the commit before, then run the same command "
                "again."
            )
        if not mends:
            raise HubError(
                f"{self.uri} has {[*strays, *paths][0]} with other bytes than were sent, several "
                "times: the connection damages them; take another one, have this file removed, "
                "and run the command again."
            )

        def plan(head: str) -> Sequence[Operation] | None:
            there = self.settled(head)
            deletions = [CommitOperationDelete(p, is_folder=False) for p in strays if p in there]
            return [*map(afresh, unlike(there, operations)), *deletions] or None

        title = message if message.startswith(_MEND) else f"{_MEND}{message}"
        return self.change(title, plan, mends=mends - 1)

    def check_writable(self) -> None:
        """Refuse to write without a token: the library would look for one of its own.

        Raises
        ------
        HubError
            There is none for this server.
        """
        if self.endpoint.token is None:
            raise HubError(f"writing to {self.uri} needs a token: {how_to_log_in(self.endpoint)}.")

    def create(self, *, private: bool = True) -> None:
        """Make the repository, where it is not there.

        Raises
        ------
        HubError
            It is there and everybody may read it, but it should be `private`.
        """
        self.check_writable()
        self._ask(lambda: self._api.create_repo(self.name, private=private, exist_ok=True), "make")
        info = self._ask(lambda: self._api.model_info(self.name, expand=["private"]))
        if private and info.private is False:
            raise HubError(
                f"{self.uri} is there already, and everybody may read it: make it private in "
                "its settings first, or choose another name."
            )

    def exists(self) -> bool:
        """Whether it is there, as far as our token can see."""
        return self._ask(lambda: bool(self._api.repo_exists(self.name)))

    def commits(self, revision: str) -> list[tuple[str, str]]:
        """The commits that lead to a revision, with their titles, the latest first."""
        found = self._ask(lambda: self._api.list_repo_commits(self.name, revision=revision))
        return [(str(one.commit_id), one.title) for one in found]

    def pull_requests(self) -> list[tuple[str, str, str]]:
        """Title, revision and address of each that is open."""
        found = self._ask(
            lambda: list(
                self._api.get_repo_discussions(
                    self.name, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
        return [(one.title, str(one.git_reference), one.url) for one in found]

    def _ask(
        self,
        what: Callable[[], T],
        doing: Doing = "read",
        *,
        pauses: Sequence[float] | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> T:
        """Ask the server, several times where a fault of the moment comes between.

        `progress` tells whether a try got further than the one before: then it does not count.
        """
        left, reached = list(PAUSES if pauses is None else pauses), progress()
        while True:
            try:
                prepare_session(self.endpoint)
                return what()
            except MergeKitError:
                raise
            except EntryNotFoundError as error:
                raise _Absent from error
            except Exception as error:  # whatever the library lets through is the server's doing
                if progress() > reached:
                    left, reached = list(PAUSES), progress()
                if not (left and is_transient(error)):
                    raise explained(error, self.endpoint, self.name, doing) from discreet(error)
                wait = asked_pause(error)
            time.sleep(wait + left.pop(0) * random.uniform(0.5, 1.5))


def named(text: str) -> Repository:
    """The repository that a user names.

    ``owner/name`` or ``hf://owner/name`` lies on the server that HF_ENDPOINT names, or else on
    huggingface.co; ``hf+https://host/owner/name`` on that host, which may have a path.

    Raises
    ------
    HubError
        It is no such name.
    """
    if not text.startswith(("hf+http://", "hf+https://")):
        return Repository(text.removeprefix("hf://").rstrip("/"), chosen())
    address, *name = text.removeprefix("hf+").rstrip("/").rsplit("/", 2)
    return Repository("/".join(name), at(address))


class _Absent(HubError):
    """A file or folder is not there."""


@contextmanager
def _opened(content: Path | bytes) -> Iterator[BinaryIO]:
    if isinstance(content, bytes):
        yield io.BytesIO(content)
        return
    try:
        file = content.open("rb")
    except OSError as error:
        raise HubError(f"{content} cannot be read: {error.strerror}.") from error
    with file:
        yield file

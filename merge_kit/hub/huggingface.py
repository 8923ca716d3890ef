"""A hub that is a repository on the Hugging Face Hub, or on a server that speaks its protocol.

An entry appears in one commit, which names the commit that it was made for as its parent: whoever
was overtaken looks again. All that is read comes from one commit, so that a listing is consistent,
until a listing begins anew, the federation file is asked for, or a file is not in that commit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from merge_kit.errors import HubError
from merge_kit.hub.base import SMALL, changed_meanwhile, check_name, is_plain
from merge_kit.hub.commits import Done, Found, Operation
from merge_kit.hub.remote import RemoteHub
from merge_kit.hub.repository import Repository, named

_PAGE = "README.md"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    commit: str
    files: Mapping[str, Found]
    """Those whose names a publisher writes."""


class HuggingFaceHub(RemoteHub):
    """A federation in a repository of its own."""

    def __init__(self, repository: Repository, *, pull_requests: bool = False) -> None:
        super().__init__(repository.uri)
        self.repository = repository
        self._by_pull_request = pull_requests
        self._seen: _Snapshot | None = None
        self._pinned: str | None = None
        self.proposed: dict[str, str] = {}
        """Entries that wait to be let in, with the addresses of their pull requests."""

    def by_pull_request(self) -> HuggingFaceHub:
        """The same hub for whom may not write to it: an entry is proposed, and somebody who may
        write lets it in."""
        return HuggingFaceHub(self.repository, pull_requests=True)

    def at(self, revision: str) -> HuggingFaceHub:
        """The same hub as it would be at a revision, to be read alone."""
        there, commit = HuggingFaceHub(self.repository), self.repository.commits(revision)[0][0]
        there._pinned = commit
        return there

    def proposals(self) -> list[tuple[str, str]]:
        """Revision and address of each pull request that is open."""
        return [(revision, url) for _, revision, url in self.repository.pull_requests()]

    def touched_by(self, revision: str) -> dict[str, str]:
        """What a pull request's revision adds, changes and removes, by path, since it left what is
        there now: ``added``, ``changed``, ``removed``."""
        main, own = (
            [commit for commit, _ in self.repository.commits(at)]
            for at in (self.repository.head(), revision)
        )
        begun = next((commit for commit in own if commit in main), None)
        before = self.repository.files(begun) if begun else {}
        after = self.repository.files(own[0])
        found = {}
        for path in sorted({*before, *after}):
            if path not in before:
                found[path] = "added"
            elif path not in after:
                found[path] = "removed"
            elif before[path] != after[path]:
                found[path] = "changed"
        return found

    def create(self) -> None:
        """Make the repository where it is not there: private, as only its owner can see it."""
        self.repository.create()

    def exists(self) -> bool:
        """Whether the repository is there, as far as our token can see."""
        return self.repository.exists()

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted."""
        anew = len(check_name(folder)) == 1
        seen = self._latest() if anew or self._seen is None else self._seen
        prefix = f"{folder}/"
        yield from sorted(
            {
                name.removeprefix(prefix).partition("/")[0]
                for name in seen.files
                if name.startswith(prefix)
            }
        )

    def read(self, name: str) -> bytes:
        """The bytes of a small file; what never changes is kept here.

        Raises
        ------
        HubError
            The file is not there, or is not small.
        """
        if not _is_fixed(name) or self._found(name)[0] > SMALL:
            return super().read(name)
        data = self.fetch(name).read_bytes()
        # Another process may have replaced the copy by one of another hub of the same name.
        return data if self._place(name)[1].is_of(data) else super().read(name)

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Put a whole folder in place with one commit; False when it is there already.

        A commit of somebody who was killed before it was compared is compared, and mended, now.

        Raises
        ------
        HubError
            The server cannot be reached, or does not let us.
        """
        paths = {f"{folder}/{name}": content for name, content in files.items()}
        for path in (folder, *paths):
            check_name(path)
        last, title, head = list(paths)[-1], f"Add {folder}", self.repository.head()
        there = self.repository.files(head, folder)
        sent = self._sent(title, head) if self._is_damaged(there, paths) else None
        if last in there and sent is None:
            return False
        if self._by_pull_request and (waiting := self._waiting(title, folder, paths)):
            self.proposed[folder] = waiting
            return True
        with self.repository.additions(paths, for_pull_request=self._by_pull_request) as additions:

            def plan(head: str) -> Sequence[Operation] | None:
                return None if last in self.repository.files(head, folder) else additions

            if sent:
                commit, before = sent
                done = self.repository.compared(title, before, Done(commit, False), additions)
            else:
                done = self.repository.change(title, plan, pull_request=self._by_pull_request)
        self._seen = None
        if done.pull_request:
            self.proposed[folder] = done.pull_request
        if done.left_out:
            raise HubError(
                f"{self.uri} has left out {done.left_out[0]}: remove the rule that does so from "
                f"the repository's .gitignore, remove {folder}, and publish again."
            )
        return done.ours

    def _is_damaged(self, there: Mapping[str, Found], paths: Mapping[str, Path | bytes]) -> bool:
        """Whether an entry is not the one that is to be published, but may be what a line has made
        of it: that changes names and small files. A commit that names another large file is refused
        on its way, so such a file is another's, and stays."""
        if self._by_pull_request or not there:
            return False
        others = [p for p, content in paths.items() if p in there and not there[p].is_of(content)]
        if not others and there.keys() == paths.keys():
            return False
        return all(there[path].digest.startswith("git:") for path in others)

    def _sent(self, title: str, head: str) -> tuple[str, str] | None:
        """The latest commit of this title, and the one that it lies on."""
        commits = self.repository.commits(head)
        for (commit, told), (before, _) in pairwise(commits):
            if told == title:
                return commit, before
        return None

    def _waiting(self, title: str, folder: str, paths: Mapping[str, Path | bytes]) -> str | None:
        """The address of an open pull request with exactly these files."""
        for there, revision, url in self.repository.pull_requests():
            if there != title:
                continue
            found = self.repository.files(revision, folder)
            if found.keys() == paths.keys() and all(found[p].is_of(c) for p, c in paths.items()):
                return url
        return None

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace a small file with one commit.

        Raises
        ------
        HubError
            It does not hold what was expected.
        """
        check_name(name)
        tried = False

        def plan(head: str) -> Sequence[Operation] | None:
            nonlocal tried
            found = self._at(head, name)
            if found and found.is_of(data) and (tried or data == expected):
                return None
            as_expected = found is None if expected is None else found and found.is_of(expected)
            if not as_expected:
                raise changed_meanwhile(f"{self.uri}/{name}")
            tried = True
            return [CommitOperationAdd(name, io.BytesIO(data))]

        self.repository.change(f"Change {name}", plan)
        self._seen = None

    def is_described(self, card: bytes) -> bool:
        """Whether the repository's page is this one already, or is not ours to write."""
        found = None if self._by_pull_request else self._at(self.repository.head(), _PAGE)
        return self._by_pull_request or (found is not None and found.is_of(card))

    def describe(self, card: bytes) -> None:
        """Put the repository's page, which people look at and the Hub's search goes by, with one
        commit; we never read it."""

        def plan(head: str) -> Sequence[Operation] | None:
            found = self._at(head, _PAGE)
            same = found is not None and found.is_of(card)
            return None if same else [CommitOperationAdd(_PAGE, io.BytesIO(card))]

        self.repository.change("Describe what lies here", plan)
        self._seen = None

    def remove(self, name: str) -> bool:
        """Remove a file; always False, because the repository's history keeps its bytes."""
        check_name(name)

        def plan(head: str) -> Sequence[Operation] | None:
            there = self._at(head, name)
            return [CommitOperationDelete(name, is_folder=False)] if there else None

        self.repository.change(f"Remove {name}", plan)
        self._seen = None
        return False

    def _at(self, commit: str, name: str) -> Found | None:
        folder = name.rpartition("/")[0]
        return self.repository.files(commit, folder or None, deep=False).get(name)

    def _look(self, name: str) -> tuple[int, str] | None:
        seen = self._seen
        if seen is None or name not in seen.files or not _is_fixed(name):
            seen = self._latest()
        found = seen.files.get(name)
        return (found.size, found.digest) if found else None

    def _copy(self, name: str, target: Path) -> None:
        commit, found = self._place(name)
        self.repository.download(name, commit, found, target)

    def _place(self, name: str) -> tuple[str, Found]:
        """Where a file is, which may have been looked for before."""
        seen = self._seen
        if seen is None or name not in seen.files:
            seen = self._latest()
            if name not in seen.files:
                self._found(name)  # says that it is not there
        return seen.commit, seen.files[name]

    def _latest(self) -> _Snapshot:
        """What is there now."""
        head, seen = self._pinned or self.repository.head(), self._seen
        if seen is None or seen.commit != head:
            found = self.repository.files(head)
            seen = _Snapshot(head, {path: one for path, one in found.items() if _is_sound(path)})
            self._seen = seen
        return seen


def _is_fixed(name: str) -> bool:
    """Whether a file never changes once it is there: all but those beside the federation's."""
    return "/" in name


def _is_sound(path: str) -> bool:
    return all(part and is_plain(part) for part in path.split("/"))


def open_repository(uri: str) -> HuggingFaceHub:
    """The hub in the repository that a user names: see `repository.named`."""
    return HuggingFaceHub(named(uri))

"""Several processes of one command, as torchrun starts them: who does what, and waiting.

They share a folder and, through gloo, a sentence each when they meet; nothing goes from GPU to GPU,
so that gloo serves there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

from merge_kit.errors import MergeKitError, UsageError

_SENTENCE = 1024
_TO_START = timedelta(minutes=10)
_TO_END = timedelta(days=1)  # of slow processes: one that dies is noticed at once

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those of the command; by default it is the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its machine."""
    meeting: distributed.ProcessGroup | None = None
    """Where they meet; None for one alone."""

    @property
    def first(self) -> bool:
        """Whether this process goes on alone when the common work is done."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does: every size-th item."""
        return items[self.rank :: self.size]

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process, where the command names no certain one.

        Raises
        ------
        UsageError
            There are fewer GPUs than processes.
        """
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {self.local_rank + 1} on this machine has no GPU, there are "
                f"{torch.cuda.device_count()}: start fewer with --nproc-per-node, or use "
                "--device cpu."
            )
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Common work: at its end all wait for each other, and none goes on when one has failed.

        Raises
        ------
        MergeKitError
            Another process failed, with its sentence, or is gone.
        """
        try:
            yield
        except BaseException as error:
            if self.size > 1 and isinstance(error, Exception):
                self._tell(f"{error}" or type(error).__name__)
            raise
        if self.size > 1:
            for rank, problem in enumerate(self._tell("")):
                if problem:
                    raise MergeKitError(f"process {rank + 1} of {self.size} failed: {problem}")

    def _tell(self, problem: str) -> list[str]:
        """Give a sentence, empty when all is well; the sentences of all."""
        said = problem.encode()[:_SENTENCE].ljust(_SENTENCE, b"\0")
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        heard = [torch.zeros_like(mine) for _ in range(self.size)]
        try:
            distributed.all_gather(heard, mine, group=self.meeting)
        except RuntimeError:
            if problem:
                return []  # the error that is being raised says more
            raise MergeKitError(
                "another process of this command ended before its work was done: see what it "
                "said, and run the same command again; what is done is kept."
            ) from None
        texts = (bytes(one.numpy()).rstrip(b"\0") for one in heard)
        return [text.decode(errors="ignore") for text in texts]


@contextmanager
def joined() -> Iterator[Group]:
    """The processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or this one alone.

    Raises
    ------
    UsageError
        The variables do not fit together, or the processes cannot find each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Group()
        return
    try:
        size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        distributed.init_process_group("gloo", timeout=_TO_START)
        meeting = cast(distributed.ProcessGroup, distributed.new_group(timeout=_TO_END))
    except (KeyError, ValueError, RuntimeError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"the processes of this command cannot find each other ({detail}): start them with "
            "torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield Group(rank, size, local, meeting)
    finally:
        distributed.destroy_process_group()

"""What a person sees of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_LINE_SECONDS = 10.0


class Progress:
    """Receives the events of a training and shows them on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._spoken = time.monotonic()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event of a training."""
        kind = event["event"]
        if kind == "stage":
            self.stage(event["name"], event["done"], event["of"])
        elif kind == "step":
            self.stage("training", event["step"], event["of"], f"loss {event['loss']:.3f}")
        elif kind == "validation":
            self._say(
                f"step {event['step']}: validation loss {event['validation_loss']:.3f}, "
                f"balanced accuracy {_figure(event['balanced_accuracy'])}, "
                f"macro AUROC {_figure(event['macro_auroc'])}"
                + (" (best so far)" if event["best_step"] == event["step"] else "")
            )
        elif kind == "head":
            self._say(f"starts from {event['text']}")
        elif kind == "resumed":
            self._say(f"going on after step {event['step']}")

    def stage(self, name: str, done: int, of: int, note: str = "") -> None:
        """Show how far one stage of the work is."""
        text = f"{name} {note}".strip()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=of)
        self._bars.update(self._tasks[name], description=text, completed=done, total=of)
        if done == of:
            self._bars.remove_task(self._tasks.pop(name))
        elif self._bars.disable and time.monotonic() - self._spoken > _LINE_SECONDS:
            self._say(f"{name} {done}/{of} {note}".rstrip())

    def _say(self, text: str) -> None:
        self._spoken = time.monotonic()
        self._bars.console.print(text, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

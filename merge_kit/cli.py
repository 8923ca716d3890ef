"""The door: one program, each command's module loaded only when it is called."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import click

from merge_kit.errors import MergeKitError

# command -> (module:attribute, one line for --help); the order is the order of a day's work
COMMANDS = {
    "init": ("merge_kit.commands.init:init", "Create a federation: backbone, classes, policy."),
    "join": ("merge_kit.commands.join:join", "Join a federation as a site: base and key pair."),
    "admit": ("merge_kit.commands.admit:admit", "Admit a site's public key to a federation."),
    "revoke": (
        "merge_kit.commands.admit:revoke",
        "Let nothing count that a site's key has signed.",
    ),
    "sign": ("merge_kit.commands.admit:sign", "Sign a federation file that was changed by hand."),
    "key": ("merge_kit.commands.key:key", "Make, show or replace a key."),
    "finetune": ("finetune.command:finetune", "Fine-tune the base on a site's own images."),
    "statistics": (
        "finetune.command:statistics",
        "Make what some merge methods need beside a vector.",
    ),
    "calibrate": (
        "finetune.calibrate_command:calibrate",
        "Measure a site's own images for the classifier of the base or a merged model.",
    ),
    "approve": ("merge_kit.commands.approve:approve", "Approve, as a second, what is to leave."),
    "publish": ("merge_kit.commands.publish:publish", "Sign a vector and put it on the hub."),
    "pull": ("merge_kit.commands.pull:pull_command", "Copy a whole hub into a folder, checked."),
    "status": ("merge_kit.commands.status:status", "Show what lies on a hub."),
    "withdraw": (
        "merge_kit.commands.withdraw:withdraw_command",
        "Take back what a site has published.",
    ),
    "merge": ("merge_kit.commands.merge:merge", "Merge contributions into one model."),
    "predict-proxy": (
        "finetune.predict_command:predict_proxy",
        "Say what a private model makes of images that everybody has.",
    ),
    "distill": (
        "finetune.distill_command:distill",
        "Merge what the sites' models know, on images without labels.",
    ),
    "restore": (
        "finetune.restore_command:restore",
        "Measure a merged model's norm statistics again, on its own weights.",
    ),
    "head": (
        "finetune.head_command:head",
        "Solve a model's classifier from all sites' moments.",
    ),
    "personalise": (
        "finetune.personalise_command:personalise_command",
        "Make a merged model a site's own, by its own images.",
    ),
    "push": ("merge_kit.commands.push:push", "Publish a merged model on the Hugging Face Hub."),
    "verify": ("merge_kit.commands.verify:verify", "Make a merged model again and compare."),
    "remerge": (
        "merge_kit.commands.remerge:remerge_command",
        "Make merged models again, without what was withdrawn.",
    ),
    "unmask": ("merge_kit.commands.unmask:unmask", "Give back a model close to a site's own."),
    "select": ("evaluate.select_command:select", "Choose a merge on validation images."),
    "tune": (
        "evaluate.tune_command:tune",
        "Learn how much each site counts in each block, on images.",
    ),
    "evaluate": ("evaluate.command:evaluate", "Evaluate models on labelled images."),
    "compare": ("evaluate.command:compare", "Compare models with one of them."),
    "experiment": (
        "evaluate.experiments.command:experiment",
        "Run a whole federation from one file, with baselines.",
    ),
    "rounds": (
        "evaluate.experiments.rounds_command:rounds",
        "Train in synchronous rounds: the yardstick of experiments.",
    ),
    "methods": ("merge_kit.commands.methods:methods", "List the merge methods."),
    "demo": ("evaluate.demo:demo", "Run the whole job on generated or your own images."),
    "audit-log": (
        "merge_kit.commands.audit_log:audit_log",
        "Show or check what has left a site.",
    ),
    "doctor": ("merge_kit.commands.doctor:doctor", "Check this machine."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a day's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(_imported(module), attribute)
        except (ImportError, AttributeError) as error:
            raise MergeKitError(
                f"'{cmd_name}' cannot be loaded ({error}): see 'merge-kit doctor'."
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _imported(module: str) -> ModuleType:
    """Import a module for the first time without looking for garbage: torch brings hundreds of
    thousands of objects that stay, and each look goes through all that are there."""
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


class FewOfAKind(logging.Filter):
    """Let a kind of warning through three times: a folder may give ten thousand of them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Count by the text before its arguments are filled in."""
        count = self._seen[str(record.msg)] = self._seen.get(str(record.msg), 0) + 1
        if count == 3:
            record.msg = f"{record.msg} (more of this kind are not shown)"
        return count <= 3


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="merge-kit")
@click.option(
    "--debug", is_flag=True, help="Show the traceback of an error; anywhere in a command."
)
def cli(debug: bool) -> None:
    """One good image classifier out of many private data sets.

    Each hospital fine-tunes the same pretrained backbone once and publishes the difference of the
    weights; a merger adds up whatever has arrived. No image leaves a hospital.
    """
    handler = logging.StreamHandler()
    handler.addFilter(FewOfAKind())
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[handler])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; one sentence on stderr and a non-zero exit when it cannot do its job."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    try:
        cli.main(
            args=[a for a in given if a != "--debug"], prog_name="merge-kit", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "Stopped; nothing is half-written. 'finetune' goes on when it is called again alike.",
            err=True,
        )
        sys.exit(130)
    except MergeKitError as error:
        _explain(debug, str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _explain(debug, f"{place}{error.strerror or error}.")
        sys.exit(1)


def _explain(debug: bool, sentence: str) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"Error: {sentence}", err=True)

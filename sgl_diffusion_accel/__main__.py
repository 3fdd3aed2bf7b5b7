"""The command line: `python -m sgl_diffusion_accel info | check | perf-diff`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sgl_diffusion_accel._version import __version__
from sgl_diffusion_accel.auto.checking.check_pipeline import check
from sgl_diffusion_accel.errors import AccelError, unknown_name
from sgl_diffusion_accel.profiling.machine import describe
from sgl_diffusion_accel.profiling.results.perf_diff import perf_diff

_USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        about: What it does, for the help.
        run: Does it with the arguments that were given, and returns what is to be shown.
        arguments: Name of each argument to what it is, for the help.
        flags: Name of each flag, which goes to `run` by its name, to what it does.
    """

    about: str
    run: Callable[..., str]
    arguments: dict[str, str]
    flags: dict[str, str] = field(default_factory=dict)


COMMANDS = {
    "info": Command("versions, devices, attention backends: what a bug report needs", describe, {}),
    "check": Command(
        "what each patch can do on a model, of its configuration alone: nothing is run or fetched",
        check,
        {
            "model": "folder of a pipeline or a transformer, name of a class of diffusers, or of a model in the Hub's "
            "local cache"
        },
        {"json": "as JSON"},
    ),
    "perf-diff": Command(
        "two files of timings side by side, as Markdown",
        perf_diff,
        {
            "before": "JSON of prof.save_perf() or of SGLang-Diffusion's --perf-dump-path",
            "after": "the same, to be compared with it",
        },
    ),
}
"""Subcommands by name; another one is another row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; None for the process's.

    Returns:
        The exit code: 0, or 2 where the command was given what it cannot take.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m sgl_diffusion_accel", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    chosen = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = chosen.add_parser(name, help=command.about, description=command.about)
        for argument, about in command.arguments.items():
            added.add_argument(argument, help=about)
        for flag, about in command.flags.items():
            added.add_argument(f"--{flag}", action="store_true", help=about)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        parser.error(str(unknown_name("command", given[0], COMMANDS)))
    read = vars(parser.parse_args(given))
    name = read.pop("command")
    flags = {flag: read.pop(flag) for flag in COMMANDS[name].flags}
    try:
        shown = COMMANDS[name].run(*read.values(), **flags)
    except AccelError as error:
        sys.stderr.write(f"{parser.prog} {name}: {error}\n")
        return _USAGE_ERROR
    sys.stdout.write(f"{shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

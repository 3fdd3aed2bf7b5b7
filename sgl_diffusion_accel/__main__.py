"""The command line: `python -m sgl_diffusion_accel info | perf-diff | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgl_diffusion_accel._version import __version__
from sgl_diffusion_accel.errors import AccelError

_USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        about: What it does, for the help.
        arguments: Adds its arguments to a parser.
        run: Does it, and returns what is to be shown.
    """

    about: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _info(given: argparse.Namespace) -> str:
    from sgl_diffusion_accel.profiling.machine import describe

    del given
    return describe()


def _two_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", help="JSON of prof.save_perf() or of SGLang-Diffusion's --perf-dump-path")
    parser.add_argument("after", help="the same, to be compared with it")


def _perf_diff(given: argparse.Namespace) -> str:
    from sgl_diffusion_accel.profiling.perf_diff import perf_diff

    return perf_diff(given.before, given.after)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from sgl_diffusion_accel.comparing.bench import add_arguments

    add_arguments(parser)


def _bench(given: argparse.Namespace) -> str:
    from sgl_diffusion_accel.comparing.bench import run

    return run(given)


COMMANDS = {
    "info": Command("versions, devices, attention backends: what a bug report needs", _no_arguments, _info),
    "perf-diff": Command("two files of timings side by side, as Markdown", _two_files, _perf_diff),
    "bench": Command("the main settings compared on a small trained model of a clone", _bench_arguments, _bench),
}
"""Subcommands by name; another one is another row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; None for the process's.

    Returns:
        The exit code: 0, or 2 where the command was given what it cannot take.
    """
    parser = argparse.ArgumentParser(prog="python -m sgl_diffusion_accel", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    chosen = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.arguments(chosen.add_parser(name, help=command.about, description=command.about))
    given = parser.parse_args(arguments)
    try:
        shown = COMMANDS[given.command].run(given)
    except AccelError as error:
        sys.stderr.write(f"{parser.prog} {given.command}: {error}\n")
        return _USAGE_ERROR
    sys.stdout.write(f"{shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line of Nsight Systems that goes with `profile(pipe, nvtx=True)`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import count, names_checked


@names_checked
def nsys_command(command: str | Sequence[str] | None = None, *, output: str = "profile_%p", calls: int = 1) -> str:
    """Tells how to run a script under Nsight Systems, so that it records what `profile(pipe, nvtx=True)` chooses.

    The capture begins and ends with the denoising steps (or pipeline calls) that are profiled; loading and compiling
    stay out of it. CUDA graphs are shown kernel by kernel, and worker processes are followed.

    Args:
        command: The script with its arguments: a line, or a list such as `["run.py", "--steps", "50"]`. What does not
            begin with a program is run by this Python. None for the command that is running now.
        output: The report's name; `%p` becomes the process id and `%n` a running number, so nothing is overwritten.
        calls: Pipeline calls that are profiled, each of which becomes a report of its own.

    Returns:
        One line for a shell.

    Raises:
        ConfigError: The command is empty, or `calls` is less than 1.
        ConfigTypeError: A setting has a wrong type.

    Example:
        >>> print(nsys_command("python run.py").partition(" --capture-range")[0])
        nsys profile --trace=cuda,nvtx,osrt,cudnn,cublas
    """
    words = _words(command)
    if not isinstance(output, str):
        raise ConfigTypeError(f"output={output!r} is a {type(output).__name__}; allowed: a name such as 'profile_%p'.")
    calls = count("calls", calls, 1)
    options = [
        "--trace=cuda,nvtx,osrt,cudnn,cublas",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop" if calls == 1 else f"--capture-range-end=repeat:{calls}",
        "--cuda-graph-trace=node",
        "--trace-fork-before-exec=true",
        "--sample=none",
        f"--output={shlex.quote(output)}",
    ]
    return " ".join(["nsys profile", *options, shlex.join(words)])


def _words(command: object) -> list[str]:
    if command is None:
        return [sys.executable, *sys.argv]
    if isinstance(command, str):
        words = shlex.split(command)
    elif isinstance(command, Sequence) and all(isinstance(word, str) for word in command):
        words = list(command)
    else:
        raise ConfigTypeError(
            f"command is a {type(command).__name__}; allowed: a line such as 'python run.py', or a list of its words."
        )
    if not words:
        raise ConfigError("command is empty. Type: nsys_command('python run.py').")
    return words if not words[0].endswith(".py") else [sys.executable, *words]

"""Training from the command line:

    python -m crcjax.main --config configs/demo.py --workdir RUN [--config.FIELD=VALUE ...]

Exit status: 0 trained; 2 the config, cohort, store or run directory is not usable; 3 the output cannot be written.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

# jax 0.10 queues collectives on a thread pool as large as the cores and hangs where several CPU devices share few.
os.environ.setdefault("PJRT_NPROC", "16")

from absl import flags
from ml_collections import ConfigDict, config_flags

from crcjax.config import get_config
from crcjax.errors import CrcjaxError, InputError, OutputError

STATUS = {InputError: 2, OutputError: 3}


def main(arguments: list[str] | None = None) -> int:
    """Trains as the arguments (by default the command line's) say and returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments:
        print(__doc__)
        return 0
    try:
        config, workdir = read_config(arguments)
        from crcjax.train.loop import train  # loads jax, which an error above need not wait for

        train(config, workdir)
    except CrcjaxError as error:
        print(f"crcjax: {error}", file=sys.stderr)
        return STATUS.get(type(error), 1)
    return 0


def read_config(arguments: list[str]) -> tuple[ConfigDict, Path]:
    """The config and the directory that arguments of the command line give. Raises InputError."""
    known = _fields(get_config())
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--config."):
            _check_known(name.removeprefix("--config."), known, "--config.")
    arguments = [sys.argv[0], *arguments]
    values = flags.FlagValues()
    file = config_flags.DEFINE_config_file(
        "config", None, "file with get_config()", flag_values=values, sys_argv=arguments
    )
    workdir = flags.DEFINE_string("workdir", None, "the run's directory, new or to be resumed", flag_values=values)
    try:
        rest = values(arguments)
        config = file.value
        if config is not None:
            config.lock()  # raises, where the file could not be read
    except Exception as error:  # a config file is a program and may raise anything
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"the command line or the config file is wrong: {type(error).__name__}: {reason}") from error
    if len(rest) > 1:
        raise InputError(f"what is {rest[1]!r}? Arguments are --config, --workdir and --config.FIELD=VALUE")
    if config is None or not workdir.value:
        raise InputError("give --config FILE and --workdir DIR")
    given = _fields(config)
    for name in given:
        _check_known(name, known, "config.")
    missing = [name for name in known if name not in given]
    if missing:
        raise InputError(f"the config file has no {missing[0]}; start it from crcjax.config.get_config()")
    return config, Path(workdir.value)


def _check_known(name: str, known: list[str], prefix: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0)[0]
        raise InputError(f"{prefix}{name}: there is no such field; did you mean {prefix}{near}?")


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    fields: list[str] = []
    for name, value in config.items():
        fields += _fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return fields


if __name__ == "__main__":
    sys.exit(main())

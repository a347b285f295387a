"""Training from the command line:

    crcjax train --config configs/demo.py --workdir RUN [--config.FIELD=VALUE ...]

`python -m crcjax.main` is the same command.

Several processes find each other by the variables of SLURM, Open MPI or Kubernetes, or by flags (docs/distributed.md):

    --coordinator HOST:PORT --processes N --process I    address of process 0, number of processes, index of this one
    --wait_s S                                           seconds that processes wait for each other at the start (300)

Processes that meet over a network share a secret of at least 16 characters: CRCJAX_RENDEZVOUS_SECRET, or a file named by
CRCJAX_RENDEZVOUS_SECRET_FILE. The launchers in launch/ set it.

Exit status: 0 trained; 2 the config, cohort, store or run directory is not usable, or the processes differ in them; 3
the output cannot be written; 4 a process of the run did not start, failed, was lost or stood still; 5 training
diverged; 6 a step that was computed again had another result: a device or its memory is faulty; 85 stopped by SIGTERM,
SIGUSR1 or Ctrl-C with everything saved, or a device of several processes ran out of memory: the same command resumes,
in the second case with smaller micro-batches; 130 interrupted by Ctrl-C before the first step, or by a second Ctrl-C:
the same command resumes from the last checkpoint.
"""

# ruff: noqa: E402 - signals and the environment are set before the packages load
from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

_INTERRUPTED = (
    "crcjax: interrupted; the same command resumes from the run's last checkpoint, or starts anew without one"
)


def _end_while_loading(*_: object) -> None:
    os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(130)


# Until the packages are loaded: a KeyboardInterrupt while jaxlib is imported crashes the process.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, _end_while_loading)

from absl import flags
from ml_collections import ConfigDict, config_flags

from crcjax.config import get_config
from crcjax.config_check import check_config
from crcjax.config_names import renamed_argument
from crcjax.environment import check_platform
from crcjax.errors import CrcjaxError, InputError, exit_status
from crcjax.monitor.logs import log

# 128 + SIGINT, as shells report it.
INTERRUPTED_STATUS = 130


def main(arguments: list[str] | None = None) -> int:
    """Trains by command line arguments, and returns the exit status. None takes those of this process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments:
        print(__doc__)
        return 0
    is_distributed = False
    try:
        check_platform()
        config, workdir, cluster_flags, wait_s = _read(arguments)
        check_config(config)
        # These import JAX, which takes seconds; the errors above are reported before.
        from crcjax.audit.commands import audited_command, record_details
        from crcjax.monitor.goodput import process_age_s
        from crcjax.parallel.cluster_env import detect_cluster
        from crcjax.parallel.process_group import process_group
        from crcjax.runs.run_directory import common_facts, training_facts
        from crcjax.train.loop import train

        if signal.getsignal(signal.SIGINT) is _end_while_loading:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cluster = detect_cluster(os.environ, *cluster_flags)
        is_distributed = cluster is not None
        facts = common_facts(config, workdir) if cluster else {}
        timeouts_s = config.train.stall_timeout_s, config.train.peer_timeout_s
        # One entry for a run, not one for each of its processes.
        is_first = cluster is None or cluster.process_index == 0
        with (
            audited_command("train") if is_first else nullcontext(),
            process_group(cluster, facts, wait_s, *timeouts_s, config.train.preemption_notice) as group,
        ):
            train(config, workdir, group, process_age_s())
            record_details(**training_facts(config, workdir))
        status = 0
    except CrcjaxError as error:
        log.error(f"crcjax: {error}")
        status = exit_status(error)
    except KeyboardInterrupt:
        log.error(_INTERRUPTED)
        status = INTERRUPTED_STATUS
    except Exception:
        if not is_distributed:
            raise
        traceback.print_exc()
        status = 1
    if is_distributed:
        sys.stdout.flush()
        # At a normal exit, JAX would wait for processes that have ended.
        os._exit(status)
    return status


def read_config(arguments: list[str]) -> tuple[ConfigDict, Path]:
    """Reads the config and the run directory from command line arguments. Raises InputError."""
    return _read(arguments)[:2]


def _read(
    arguments: list[str],
) -> tuple[ConfigDict, Path, tuple[str | None, int | None, int | None], float]:
    """Like `_parsed`, and logs one line for each old field name that the arguments or the config file use."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed = _parsed(arguments)
    for warning in caught:
        if warning.category is FutureWarning:
            log.warning(f"crcjax: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return parsed


def _parsed(arguments: list[str]) -> tuple[ConfigDict, Path, tuple[str | None, int | None, int | None], float]:
    """The config, the run directory, (coordinator, processes, process), and wait_s."""
    known = _fields(get_config())
    arguments = [_with_tuple(renamed_argument(argument)) for argument in _joined(arguments)]
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
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    processes = flags.DEFINE_integer("processes", None, "number of processes", 1, flag_values=values)
    process = flags.DEFINE_integer("process", None, "index of this process, from 0", 0, flag_values=values)
    wait_s = flags.DEFINE_float(
        "wait_s", 300.0, "seconds that processes wait for each other at the start", 0.1, flag_values=values
    )
    try:
        positional = values(arguments)
        config = file.value
        if config is not None:
            # Raises an error if the file could not be read.
            config.lock()
    # A config file is a program, which can raise any exception.
    except Exception as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"the command line or the config file is wrong: {type(error).__name__}: {reason}") from error
    if len(positional) > 1:
        raise InputError(
            f"arguments must be --config, --workdir and --config.FIELD=VALUE, got {positional[1]!r}; see --help for all"
        )
    if config is None or not workdir.value:
        raise InputError("give --config FILE and --workdir DIR")
    fields = _fields(config)
    for name in fields:
        _check_known(name, known, "config.")
    missing = [name for name in known if name not in fields]
    if missing:
        raise InputError(f"the config file has no {missing[0]}; start it from crcjax.config.get_config()")
    return config, Path(workdir.value), (coordinator.value, processes.value, process.value), wait_s.value


def _joined(arguments: Sequence[str]) -> list[str]:
    """Joins --config.FIELD VALUE to one argument, --config.FIELD=VALUE."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.fullmatch(r"--config\.[\w.]+", joined[-1]) and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _with_tuple(argument: str) -> str:
    """Converts --config.FIELD=a,b of a field that holds a tuple to Python's notation; absl reads a,b as one text."""
    name, _, text = argument.partition("=")
    default: object = get_config()
    for key in name.removeprefix("--config.").split("."):
        default = default.get(key) if isinstance(default, ConfigDict) else None
    if not isinstance(default, tuple) or text.lstrip().startswith(("(", "[")):
        return argument
    items = [item.strip() for item in text.split(",") if item.strip()]
    # The items of an empty default have no type; they are texts in all such fields.
    is_integer = all(isinstance(value, int) for value in default) and all(item.isdecimal() for item in items)
    return f"{name}={tuple(int(item) if is_integer and default else item for item in items)!r}"


def _check_known(name: str, known: list[str], prefix: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0)[0]
        raise InputError(f"{prefix}{name}: there is no such field; did you mean {prefix}{nearest}?")


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all fields."""
    fields: list[str] = []
    for name, value in config.items():
        fields += _fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return fields


if __name__ == "__main__":
    sys.exit(main())

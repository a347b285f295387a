"""The exceptions of crcjax. Every message names the file or field, the fault, and a remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

# Exit status of a run that stopped with everything saved; launch/slurm/train.sbatch starts the same command again.
AGAIN_STATUS = 85
# Exit status of a process whose run lacks or lost another one; a supervisor starts it again.
PEER_STATUS = 4
# Remedies for a failed write, in addition to another place. A file where a folder is needed has no other remedy.
_WRITE_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EACCES: "ask for permission to write there",
    errno.EPERM: "ask for permission to write there",
    errno.EROFS: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.EEXIST: "",
    errno.ENAMETOOLONG: "shorten the name",
}


class CrcjaxError(Exception):
    """An error that a user can act on; shown as one line, without a traceback."""


class SlideError(CrcjaxError):
    """One slide cannot be processed; the other slides of the run still are.

    `status` is written to tables and manifests: one of `missing`, `corrupt`, `unsupported`, `mpp_missing`, `too_coarse`,
    `no_tissue`, `storage`, `failed`. `reason` and `remedy` do not name the path, which may be confidential.
    """

    def __init__(self, path: str | PathLike[str], status: str, reason: str, remedy: str):
        name = str(path)
        # A folder named `1` or `slide` would match numbers and words.
        if "/" in name or re.search(r"\.[A-Za-z]", name):
            # A library's message may name the path. Longer paths that contain it are not changed.
            reason = re.sub(rf"(?<![\w./~-]){re.escape(name)}(?![\w/-]|\.\w)", "the file", reason)
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path = str(path)
        self.status = status
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        return SlideError, (self.path, self.status, self.reason, self.remedy)


class InputError(CrcjaxError):
    """The cohort, the config, the store or the run directory cannot be used; nothing was started."""


class OutputError(CrcjaxError):
    """The output cannot be written (disk full, no permission); the run stops, and finished results are kept."""


class StoppedError(CrcjaxError):
    """A signal stopped the run; everything is saved, and the same command resumes."""


class PeerError(CrcjaxError):
    """Another process of the run did not start, or ended before the run began; the same command may succeed."""


class DivergedError(CrcjaxError):
    """The loss of a run became infinite or NaN; its last checkpoint is finite, but training further gives no result."""


class CorruptionError(CrcjaxError):
    """A device computed a wrong result; the run ends without saving, and resumes from its last checkpoint."""


class DeviceMemoryError(CrcjaxError):
    """A device's memory ran out within a step; the same command resumes from the last checkpoint with smaller micro-batches.

    `micro_batches` is the number of micro-batches of the step that failed.
    """

    def __init__(self, message: str, micro_batches: int):
        super().__init__(message)
        self.micro_batches = micro_batches


class BusyError(CrcjaxError):
    """Another process uses the resource; it will be free again."""


_STATUS: dict[type, int] = {
    **{InputError: 2, OutputError: 3, PeerError: PEER_STATUS, DivergedError: 5, CorruptionError: 6},
    **{StoppedError: AGAIN_STATUS, DeviceMemoryError: AGAIN_STATUS},
}


def exit_status(error: BaseException, otherwise: int = 1) -> int:
    """The exit status of a training that ends by an error, by its class or the nearest base class that has one."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), otherwise)


@contextmanager
def writing(
    path: str | PathLike[str], instead: str = "choose another --out", catch: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Converts a file system error that is raised while `path` is written to an OutputError of one line.

    Args:
      path: the file or folder that the message names.
      instead: a remedy that helps for every reason, such as "choose another --workdir".
      catch: the exceptions that report file system errors here; TensorStore and Orbax raise ValueError for some.

    Raises:
      OutputError: "PATH: cannot be written (REASON); REMEDY".
    """
    try:
        yield
    except catch as error:
        code = _error_code(error)
        reason = os.strerror(code) if code else str(error).partition("\n")[0].split(" [")[0] or type(error).__name__
        remedy = " or ".join(filter(None, (_WRITE_REMEDIES.get(code, ""), instead)))
        raise OutputError(f"{path}: cannot be written ({reason}); {remedy}") from error


def _error_code(error: Exception) -> int:
    """The system's error number, also if a library quotes only its text; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((code for code in _WRITE_REMEDIES if os.strerror(code) in str(error)), 0)

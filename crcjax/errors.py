"""The exceptions of crcjax. Every message says where, what was found, and what to do."""

from __future__ import annotations

from os import PathLike

AGAIN_STATUS = 85  # the exit status of a run that the same command goes on with, by itself (launch/slurm/train.sbatch)


class CrcjaxError(Exception):
    """An error that a user can act on; shown as one line, without a traceback."""


class SlideError(CrcjaxError):
    """One slide cannot be used; the other slides of the run go through.

    `status` is the word for tables and manifests: one of `missing`, `corrupt`, `unsupported`, `mpp_missing`,
    `too_coarse`, `no_tissue`, `storage`, `failed`. `reason` and `remedy` do not name the path, which may have to stay hidden.
    """

    def __init__(self, path: str | PathLike[str], status: str, reason: str, remedy: str):
        if str(path):
            reason = reason.replace(str(path), "the file")  # a library's words may name it
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path = str(path)
        self.status = status
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        return SlideError, (self.path, self.status, self.reason, self.remedy)


class InputError(CrcjaxError):
    """The cohort, the config, the store or the run directory is not usable: nothing is started."""


class OutputError(CrcjaxError):
    """The output cannot be written (disk full, no permission): the run stops, what is finished is kept."""


class StoppedError(CrcjaxError):
    """A signal asked the run to stop; what is done is saved, and the same command goes on from there."""


class DeviceMemoryError(CrcjaxError):
    """A device's memory ran out within a step; the same command goes on from the last checkpoint, in smaller parts than
    the `parts` that were tried.
    """

    def __init__(self, message: str, parts: int):
        super().__init__(message)
        self.parts = parts


class BusyError(CrcjaxError):
    """Another process holds what is needed; it will be free again."""

"""Readings of NVIDIA GPUs by NVML, the library that nvidia-smi uses.

NVML states a missing value by an error or by a number such as 2^32 - 1, which depends on the driver. Both become None here, so
that no code for "not available" is ever shown, exported or compared as a reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU because something is wrong. The others are usual: idle,
# clocks set by the user, the power limit under load, and synchronised boards.
_THROTTLE_REASONS = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_MAX_NVLINKS = 18
# NVLinks change seldom, and take dozens of calls for each GPU.
_READINGS_OF_NVLINKS = 10
# The codes for "not available" that were seen: all bits, and DCGM's blank values (not found to not permitted).
_BLANKS_32 = range(0x7FFFFFF0, 0x80000000)
_BLANKS_64 = range(0x7FFFFFFFFFFFFFF0, 0x8000000000000000)


@dataclass(frozen=True)
class GpuReading:
    """One reading of a GPU. None is a value that this GPU, driver or permission does not give.

    Attributes:
      index: its index in NVML, which is that of nvidia-smi.
      uuid: its identity, which outlives a restart.
      name: its model.
      utilisation: fraction of the last interval in which a kernel ran.
      memory_used_bytes, memory_total_bytes: the memory of the board.
      temperature_c: in degrees Celsius.
      power_w, energy_j: power now, and energy since the driver was loaded.
      sm_clock_mhz, max_sm_clock_mhz: the clock of the processors, and its maximum.
      throttle_reasons: faults that slow it; empty if there are none.
      ecc_corrected, ecc_uncorrected: errors of its memory since the last reset.
      xid: the last error that the driver reported since the sensors were opened, and `xid_count` how many.
      nvlinks_active, nvlinks_inactive: its NVLinks that are up and down.
      nvlink_errors: replayed and recovered transfers and errors of CRC on all of its links.
    """

    index: int
    uuid: str
    name: str
    utilisation: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    xid: int | None = None
    xid_count: int = 0
    nvlinks_active: int | None = None
    nvlinks_inactive: int | None = None
    nvlink_errors: int | None = None


class GpuSensors:
    """The GPUs that this process may use, by CUDA_VISIBLE_DEVICES; `absent` says in words why there are none."""

    def __init__(self, environment: Mapping[str, str] = os.environ):
        self._handles: dict[int, Any] = {}
        self._names: dict[int, tuple[str, str]] = {}
        self._xids: dict[int, list[int]] = {}
        self._events: Any = None
        self._nvlinks: dict[int, tuple[int | None, int | None, int | None]] = {}
        self._readings = 0
        self._nvml, self.absent = _load_nvml()
        if self._nvml is None:
            return
        nvml = self._nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        identities = [_text(self._value(nvml.nvmlDeviceGetUUID, handle)) for handle in handles]
        for index in visible_indices(environment.get("CUDA_VISIBLE_DEVICES"), identities):
            self._handles[index] = handles[index]
            self._names[index] = (identities[index], _text(self._value(nvml.nvmlDeviceGetName, handles[index])))
        self._watch_xids()

    def read(self) -> tuple[GpuReading, ...]:
        """A reading of each GPU. A GPU that no longer answers has a reading without values."""
        self._collect_xids()
        if self._readings % _READINGS_OF_NVLINKS == 0:
            self._nvlinks = {index: self._read_nvlinks(handle) for index, handle in self._handles.items()}
        self._readings += 1
        return tuple(self._read(index, handle) for index, handle in self._handles.items())

    def close(self) -> None:
        """Releases NVML."""
        if self._nvml is not None:
            nvml, self._nvml, self._handles = self._nvml, None, {}
            if self._events is not None:
                self._value(nvml.nvmlEventSetFree, self._events)
            self._value(nvml.nvmlShutdown)

    def _read(self, index: int, handle: Any) -> GpuReading:
        nvml, value = self._nvml, self._value
        assert nvml
        memory = value(nvml.nvmlDeviceGetMemoryInfo, handle)
        utilisation = value(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = _number(value(nvml.nvmlDeviceGetPowerUsage, handle))
        energy_mj = _number(value(nvml.nvmlDeviceGetTotalEnergyConsumption, handle))
        reasons = value(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        percent = _number(utilisation.gpu) if utilisation else None
        active, inactive, errors = self._nvlinks[index]
        xids = self._xids.get(index, [])
        uuid, name = self._names[index]
        return GpuReading(
            *(index, uuid, name),
            utilisation=percent / 100 if percent is not None and percent <= 100 else None,
            memory_used_bytes=_number(memory.used) if memory else None,
            memory_total_bytes=_number(memory.total) if memory else None,
            temperature_c=_number(value(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)),
            power_w=None if power_mw is None else power_mw / 1e3,
            energy_j=None if energy_mj is None else energy_mj / 1e3,
            sm_clock_mhz=_number(value(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)),
            max_sm_clock_mhz=_number(value(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)),
            throttle_reasons=_throttle_reasons(_number(reasons)),
            ecc_corrected=self._ecc(handle, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=self._ecc(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            xid=xids[-1] if xids else None,
            xid_count=len(xids),
            nvlinks_active=active,
            nvlinks_inactive=inactive,
            nvlink_errors=errors,
        )

    def _ecc(self, handle: Any, kind: int) -> int | None:
        assert self._nvml
        return _number(self._value(self._nvml.nvmlDeviceGetTotalEccErrors, handle, kind, self._nvml.NVML_VOLATILE_ECC))

    def _read_nvlinks(self, handle: Any) -> tuple[int | None, int | None, int | None]:
        """The links that are up, those that are down, and the errors of the former."""
        nvml, value = self._nvml, self._value
        assert nvml
        states = [value(nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(_MAX_NVLINKS)]
        active = [link for link, state in enumerate(states) if state == 1]
        if all(state is None for state in states):
            return None, None, None
        codes = [getattr(nvml, f"NVML_NVLINK_ERROR_DL_{kind}") for kind in ("REPLAY", "RECOVERY", "CRC_FLIT")]
        counts = [
            _number(value(nvml.nvmlDeviceGetNvLinkErrorCounter, handle, link, code))
            for link in active
            for code in codes
        ]
        known = [count for count in counts if count is not None]
        return len(active), sum(state == 0 for state in states), sum(known) if known else None

    def _watch_xids(self) -> None:
        nvml = self._nvml
        assert nvml
        events = self._value(nvml.nvmlEventSetCreate)
        for handle in self._handles.values() if events is not None else ():
            self._value(nvml.nvmlDeviceRegisterEvents, handle, nvml.nvmlEventTypeXidCriticalError, events)
        self._events = events

    def _collect_xids(self) -> None:
        nvml = self._nvml
        if nvml is None or self._events is None:
            return
        # Without a new event, NVML raises its time-out error at once.
        while (event := self._value(nvml.nvmlEventSetWait, self._events, 0)) is not None:
            index = self._value(nvml.nvmlDeviceGetIndex, event.device)
            if index not in self._handles:
                return
            self._xids.setdefault(index, []).append(int(event.eventData))

    def _value(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The value of a function of NVML; None if it is not supported, not permitted, or the GPU is lost."""
        try:
            return function(*arguments)
        except Exception as error:
            # pynvml makes its classes of errors when it is loaded.
            if type(error).__name__.startswith("NVMLError"):
                return None
            raise


def visible_indices(visible: str | None, uuids: list[str]) -> list[int]:
    """The indices of the GPUs that CUDA_VISIBLE_DEVICES names by index or by the start of its UUID; None names all.

    Like CUDA, it stops at the first entry that names no GPU.
    """
    if visible is None:
        return list(range(len(uuids)))
    indices: list[int] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        by_uuid = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        index = int(entry) if entry.isdecimal() else by_uuid[0] if by_uuid else -1
        if not 0 <= index < len(uuids):
            break
        indices.append(index)
    return indices


def _load_nvml() -> tuple[ModuleType | None, str]:
    """NVML, or why it cannot be used."""
    try:
        import pynvml
    except ImportError:
        return None, "GPUs are not read: pip install 'crcjax[monitor]'"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"GPUs are not read: {error}"
    return pynvml, ""


def _number(value: Any) -> Any:
    """The value, or None if it is a code for "not available"."""
    if value is None or value < 0 or value in (2**32 - 1, 2**64 - 1) or value in _BLANKS_32 or value in _BLANKS_64:
        return None
    return value


def _throttle_reasons(bits: int | None) -> tuple[str, ...] | None:
    return None if bits is None else tuple(name for bit, name in _THROTTLE_REASONS.items() if bits & bit)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "unknown")

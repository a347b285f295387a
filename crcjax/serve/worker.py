"""A worker process: claims jobs, predicts them with the engine, and commits the results.

`python -m crcjax.serve.worker` is started by `crcjax serve`. The process ends when its standard input is closed, which happens
when the service dies, and on SIGTERM: it claims no more jobs, and gives the current one `drain_s` to end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from crcjax.encryption.keys import open_keys
from crcjax.encryption.memory import memory_folder
from crcjax.errors import CrcjaxError, InputError, OutputError
from crcjax.monitor.logs import log
from crcjax.serve.open_queue import REDIS_VARIABLE, open_queue
from crcjax.serve.queue import Lease, LeaseLostError, Queue, QueueLimits, QueueUnavailableError
from crcjax.serve.results import attempt_folder, job_key, remove_other_attempts, result_object, slide_id, sync
from crcjax.serve.vault import KEYS, Vault

_POLL_S = 0.2
# A worker reports and renews its lease this many times within the lease's duration.
_RENEWALS = 6
# Times that a worker tries to reach the queue again, up to a second apart, before it leaves its job to another.
_PATIENCE = 30

# (payload, folder, progress) → result. `progress` takes a fraction and what is done now.
Progress = Callable[[float, str], None]
Predict = Callable[[Mapping[str, Any], Path, Progress], dict[str, Any]]


class CaseFailedError(CrcjaxError):
    """No slide of the case can be predicted, and another try would not change that."""


class _Interrupted(BaseException):
    """The main thread is to leave the current job."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with, as JSON on its command line."""

    name: str
    state: str
    bundle: str | None = None
    models: str | None = None
    trust: tuple[str, ...] = ()
    encoder_weights: str | None = None
    threads: int | None = None
    drain_s: float = 30.0
    lease_s: float = QueueLimits.lease_s
    max_tries: int = QueueLimits.max_tries
    keys: str | None = None


class Worker:
    """The loop of a worker; `run` ends after SIGTERM.

    Args:
      name: unique among the workers of the queue.
      queue: where the jobs are.
      predict: computes a job's result; it runs in the main thread, where it can be interrupted.
      results: the folder of all results.
      drain_s: seconds that the current job gets after SIGTERM.
      vault: decrypts slides and encrypts results; None, or one without keys: both are plain.
    """

    def __init__(
        self, name: str, queue: Queue, predict: Predict, results: Path, drain_s: float, vault: Vault | None = None
    ):
        self._name, self._queue, self._predict = name, queue, predict
        self._vault = vault if vault and vault.is_encrypting else None
        self._results, self._drain_s = results, drain_s
        self._stopping = threading.Event()
        self._stop_at = math.inf
        self._lease: Lease | None = None
        self._progress = (0.0, "starting")

    def run(self) -> None:
        """Works until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGUSR1, self._interrupt)
        reporter = threading.Thread(target=self._report, name="reporter", daemon=True)
        reporter.start()
        while not self._stopping.is_set():
            try:
                lease = self._queue.claim(self._name)
            except (sqlite3.OperationalError, QueueUnavailableError) as error:
                # Such as a full disk. The models stay loaded for the time after it.
                log.error(f"{self._name}: cannot claim ({error})")
                self._stopping.wait(1.0)
                continue
            if lease is None:
                self._stopping.wait(_POLL_S)
                continue
            try:
                self._work(lease)
            except (LeaseLostError, QueueUnavailableError) as error:
                # The job is another's, or will be once the lease has expired.
                log.info(f"{self._name}: {error}")
        self._queue.worker_died(self._name)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping.is_set():
            self._stop_at = time.monotonic() + self._drain_s
            self._stopping.set()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # The job may have ended in the meantime.
        if self._lease is not None:
            self._lease = None
            raise _Interrupted

    def _work(self, lease: Lease) -> None:
        folder = attempt_folder(self._results, lease)
        try:
            self._progress, self._lease = (0.0, "starting"), lease
            folder.mkdir(parents=True)
            result = self._predicted(lease, folder)
            sync(folder)
            self._lease = None
            self._queue.commit(lease, result | {"token": lease.token})
            remove_other_attempts(self._results, lease)
        except _Interrupted:
            log.info(f"{self._name}: left job {lease.job_id}")
            self._queue.release(lease)
        except CaseFailedError as error:
            self._lease = None
            self._queue.fail(lease, str(error))
        except (LeaseLostError, QueueUnavailableError):
            raise
        except Exception as error:
            # Another try may succeed, such as after an error of the disk; a job that always fails is quarantined.
            self._lease = None
            log.exception(f"{self._name}: job {lease.job_id}")
            self._queue.abandon(lease, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        finally:
            self._lease = None

    def _predicted(self, lease: Lease, folder: Path) -> dict[str, Any]:
        """The result of a job, whose files are then in `folder`. What is decrypted stays in memory."""
        vault = self._vault
        if vault is None:
            return self._predict(lease.payload, folder, self._set_progress)
        with vault.readable_slides(lease.payload) as payload, memory_folder() as plain:
            result = self._predict(payload, plain, self._set_progress)
            site = payload["slides"][0]["site"]
            vault.encrypt_folder(plain, folder, result_object(lease), site, job_key(site, lease.job_id))
        return result

    def _set_progress(self, fraction: float, stage: str) -> None:
        self._progress = fraction, stage

    def _report(self) -> None:
        """Renews the lease and says that the worker is alive; interrupts a job that was cancelled or is to stop."""
        interval_s = min(1.0, self._queue.limits.lease_s / _RENEWALS)
        while True:
            lease = self._lease
            try:
                self._queue.report_worker(self._name, "ready" if lease is None else "busy")
                if lease is not None:
                    self._queue.renew(lease, *self._progress)
            except LeaseLostError:
                self._signal_main_thread(lease)
            except Exception as error:
                # Such as a full disk. If it lasts, the lease expires, and the commit is refused.
                log.error(f"{self._name}: cannot report ({error})")
            if time.monotonic() > self._stop_at:
                self._signal_main_thread(lease)
            time.sleep(interval_s)

    def _signal_main_thread(self, lease: Lease | None) -> None:
        if lease is not None and lease == self._lease:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def bundle_predictor(settings: WorkerSettings) -> Predict:
    """Loads the bundle that predicts most cases, compiles its programs, and returns the function that predicts a case.

    The engines' threads live from case to case. Raises InputError.
    """
    from crcjax.lifecycle.releases import Releases
    from crcjax.predict.predict_slides import PredictJob, predict_slides
    from crcjax.serve.loaded_bundles import LoadedBundles

    weights = Path(settings.encoder_weights) if settings.encoder_weights else None
    bundles = LoadedBundles([Path(key) for key in settings.trust], weights, settings.threads)
    # Another bundle may be in production by now than at the start of the service.
    first = Path(settings.bundle) if settings.bundle else Releases(Path(settings.models or "")).production
    bundles.get(first)

    def predict(payload: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
        slides = payload["slides"]
        # Jobs of earlier versions name no bundle.
        loaded = bundles.get(Path(payload.get("bundle", first)))
        bundle, predictor = loaded.bundle, loaded.predictor
        jobs = [
            PredictJob(
                *(slide_id(slide["content"]), "case", Path(slide["path"]), slide["mpp"], slide["site"]),
                names_path=False,
            )
            for slide in slides
        ]
        finished: list[str] = []

        def on_row(row: Any) -> None:
            finished.append(row.slide_id)
            progress(len(finished) / len(slides), f"{len(finished)} of {len(slides)} slides")

        progress(0.0, f"0 of {len(slides)} slides")
        work = loaded.begin()
        try:
            rows = predict_slides(predictor, jobs, folder, work=work, calibration=bundle.calibration, on_row=on_row)
        except BaseException:
            # The slides of an interrupted case must not take the time of the next one.
            loaded.stop()
            raise
        if not any(row.has_prediction for row in rows):
            raise CaseFailedError("; ".join(row.reason for row in rows))
        return {
            "target": bundle.target.name,
            "classes": list(predictor.classes),
            "bundle_id": bundle.id,
            "slides": [asdict(row) for row in rows],
        }

    return predict


def _end_with_the_service() -> None:
    """Sends SIGTERM to this process once its standard input is closed."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Runs a worker; returns 2 if the bundle or the state folder is not usable."""
    values = json.loads(arguments[0])
    settings = WorkerSettings(**values | {"trust": tuple(values["trust"])})
    try:
        limits = QueueLimits(lease_s=settings.lease_s, max_tries=settings.max_tries)
        queue = open_queue(Path(settings.state), limits, os.environ.get(REDIS_VARIABLE), _PATIENCE)
        queue.report_worker(settings.name, "loading")
        predict = bundle_predictor(settings)
        _end_with_the_service()
        vault = Vault(Path(settings.state) / KEYS, open_keys(settings.keys) if settings.keys else None)
        Worker(settings.name, queue, predict, Path(settings.state) / "results", settings.drain_s, vault).run()
    except (InputError, OutputError) as error:
        print(f"crcjax serve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

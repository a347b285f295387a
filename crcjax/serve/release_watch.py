"""Carries changes of the model registry into the queue: what a withdrawn bundle has not predicted, another one does."""

from __future__ import annotations

import threading

from crcjax.lifecycle.registry_state import ROLLED_BACK, RegistryState
from crcjax.lifecycle.releases import Choice
from crcjax.monitor.logs import log
from crcjax.serve.queue import QueueFullError, Status
from crcjax.serve.service import Service

_POLL_S = 0.5
# Cases that shadows may have in the queue at a time; they are queued only while no user's case waits.
_SHADOWS = 2


class ReleaseWatch:
    """A thread that watches the registry of a service; a context manager. Without a registry it does nothing."""

    def __init__(self, service: Service):
        self._service = service
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="releases", daemon=True)
        self._events = 0

    def __enter__(self) -> ReleaseWatch:
        if self._service.releases:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            try:
                self.look()
            except Exception as error:
                # Such as a full disk; the next look may succeed.
                log.error(f"the registry of models: {error}")

    def look(self) -> None:
        """Moves requests away from bundles that were withdrawn since the last look, and queues what shadows repeat."""
        assert self._service.releases is not None
        state = self._service.releases.state
        for event in state.events[self._events :]:
            if event.kind == ROLLED_BACK and event.facts["bundle_id"] in state.withdrawn:
                self._withdraw(event.facts["bundle_id"])
            self._events += 1
        self._queue_shadows(state)

    def _withdraw(self, bundle_id: str) -> None:
        """Raises QueueFullError if the queue has no room; the next look goes on then."""
        service = self._service
        assert service.releases is not None
        service.predictions.drop_shadows(bundle_id)
        records = service.predictions.of_bundle(bundle_id)
        moved = sum(service.predictions.move(r, service.releases.choose(r.site, r.case_id)) for r in records)
        service.log.append("bundle_withdrawn", bundle_id=bundle_id, moved=moved)

    def _queue_shadows(self, state: RegistryState) -> None:
        shadow = state.aliases.get("shadow")
        stats = self._service.queue.stats() if shadow else None
        # A user's case then waits at most for the shadow's cases that workers have begun.
        if shadow is None or stats is None or stats.counts.get(Status.QUEUED, 0):
            return
        for prediction_id in self._service.predictions.waiting_shadows(shadow, _SHADOWS):
            try:
                self._service.predictions.queue_shadow(prediction_id, Choice(shadow, state.folder(shadow)))
            except QueueFullError:
                return

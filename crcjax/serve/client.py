"""The Python client of the service.

from crcjax.serve.client import Client

with Client.sign_in("https://127.0.0.1:8443", "dr.frost", password, verify="STATE/tls/certificate.pem") as client:
    slide = client.upload("A-017-1.svs", case_id="A-017")
    prediction = client.predict([slide["id"]], urgent=True)
    print(client.wait(prediction["id"])["slides"][0]["call"])
"""

from __future__ import annotations

import hashlib
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import httpx

from crcjax.errors import CrcjaxError, InputError

_CHUNK_BYTES = 16 * 2**20
_READ_BYTES = 1 << 20
_TRIES = 5
# Statuses after which the same request may succeed.
_TRY_AGAIN = (429, 502, 503, 504)


class ServiceError(CrcjaxError):
    """The service refused a request; `status` is the HTTP status."""

    def __init__(self, status: int, detail: str):
        super().__init__(f"the service answered {status}: {detail}")
        self.status = status


class PredictionFailedError(CrcjaxError):
    """A prediction ended without a result."""


class Client:
    """A session with a service; a context manager.

    Args:
      url: the service, such as https://127.0.0.1:8443.
      token: of a service account or of a sign-in.
      verify: the file of the certificate that the service must show; by default, one that this machine trusts.
      timeout_s: seconds for which an answer may take.
    """

    def __init__(self, url: str, token: str = "", verify: str | PathLike[str] | None = None, timeout_s: float = 60.0):
        try:
            context = ssl.create_default_context(cafile=verify)
        except OSError as error:
            raise InputError(f"{verify}: cannot be read as a certificate; give STATE/tls/certificate.pem") from error
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, verify=context, timeout=timeout_s)

    @classmethod
    def sign_in(
        cls, url: str, name: str, password: str, code: str = "", verify: str | PathLike[str] | None = None
    ) -> Client:
        """Signs in with a password, and with a one-time code if the account has a second factor. Raises ServiceError."""
        client = cls(url, verify=verify)
        body = {"name": name, "password": password, "code": code}
        try:
            token = client.request("POST", "/v1/sign-in", json=body).json()["token"]
        except ServiceError:
            client.close()
            raise
        client._http.headers["Authorization"] = f"Bearer {token}"
        return client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; the token stays valid."""
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request; waits and tries again while the service is busy. Raises ServiceError."""
        for attempt in range(_TRIES):
            try:
                response = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if attempt == _TRIES - 1:
                    raise ServiceError(0, f"{type(error).__name__} ({error})") from error
                time.sleep(2.0**attempt / 4)
                continue
            if response.status_code not in _TRY_AGAIN or attempt == _TRIES - 1:
                break
            time.sleep(min(60.0, float(response.headers.get("Retry-After", 2.0**attempt))))
        if response.is_error:
            raise ServiceError(response.status_code, _detail(response))
        return response

    def get_once(self, path: str) -> httpx.Response:
        """One GET request that is not tried again, whatever is answered. Raises httpx.TransportError."""
        return self._http.get(path)

    def upload(
        self,
        path: str | PathLike[str],
        case_id: str,
        mpp: float | None = None,
        on_bytes: Callable[[int], None] = lambda sent: None,
    ) -> dict[str, Any]:
        """Uploads a slide file in chunks, continues after broken connections, and returns the slide.

        Args:
          path: the file.
          case_id: the patient's pseudonym.
          mpp: µm per level-0 px, in place of the file's value.
          on_bytes: called with the number of bytes that have arrived.
        """
        file_path = Path(path)
        with open(file_path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file_path.stat().st_size
            body = {"name": file_path.name, "case_id": case_id, "bytes": size, "sha256": sha256, "mpp": mpp}
            upload = self.request("POST", "/v1/uploads", json=body).json()
            state: dict[str, Any] = {"upload": upload, "slide": None}
            while state["slide"] is None:
                offset = state["upload"]["offset"]
                on_bytes(offset)
                file.seek(offset)
                chunk = file.read(_CHUNK_BYTES)
                headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
                try:
                    state = self.request("PATCH", f"/v1/uploads/{upload['id']}", content=chunk, headers=headers).json()
                except ServiceError as error:
                    # The chunk may have arrived, though its answer did not.
                    if error.status not in (404, 409):
                        raise
                    state = self.request("GET", f"/v1/uploads/{upload['id']}").json()
            on_bytes(size)
            return state["slide"]

    def add_slide(self, path: str, case_id: str, mpp: float | None = None) -> dict[str, Any]:
        """Adds a slide that the service can read itself, and returns it."""
        return self.request("POST", "/v1/slides", json={"path": path, "case_id": case_id, "mpp": mpp}).json()

    def predict(
        self, slides: Sequence[str], urgent: bool = False, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """Queues the prediction of a case from the ids of its slides, and returns where it stands."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        body = {"slides": list(slides), "urgent": urgent}
        return self.request("POST", "/v1/predictions", json=body, headers=headers).json()

    def prediction(self, prediction_id: str) -> dict[str, Any]:
        """Where a prediction stands."""
        return self.request("GET", f"/v1/predictions/{prediction_id}").json()

    def predictions(self) -> Iterator[dict[str, Any]]:
        """The predictions of the account's site, newest first."""
        before: int | None = None
        while True:
            page = self.request("GET", "/v1/predictions", params={} if before is None else {"before": before}).json()
            yield from page["items"]
            before = page["next"]
            if before is None:
                return

    def wait(
        self,
        prediction_id: str,
        timeout_s: float = float("inf"),
        on_status: Callable[[dict[str, Any]], None] = lambda status: None,
    ) -> dict[str, Any]:
        """Waits for the end, and returns the result.

        Raises PredictionFailedError if it has none, and TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while (status := self.prediction(prediction_id))["status"] in ("queued", "running"):
            on_status(status)
            if time.monotonic() > deadline:
                raise TimeoutError(f"prediction {prediction_id} is still {status['status']} after {timeout_s:g} s")
            time.sleep(0.5)
        on_status(status)
        if status["status"] != "done":
            raise PredictionFailedError(f"prediction {prediction_id} is {status['status']}: {status['reason']}")
        return self.result(prediction_id)

    def cancel(self, prediction_id: str) -> dict[str, Any]:
        """Cancels a prediction, and returns where it stands."""
        return self.request("POST", f"/v1/predictions/{prediction_id}/cancel").json()

    def result(self, prediction_id: str) -> dict[str, Any]:
        """The result of a prediction that is done."""
        return self.request("GET", f"/v1/predictions/{prediction_id}/result").json()

    def sign(
        self, prediction_id: str, password: str, code: str, call: str | None = None, reason: str = ""
    ) -> dict[str, Any]:
        """Signs a result, or corrects its signature, and returns the new version. Raises ServiceError.

        Args:
          prediction_id: a prediction that is done, whose result and signatures you have read.
          password: the account's.
          code: a one-time code of the account's second factor, which no sign-in has used.
          call: another class, or "not evaluable"; None agrees with the predicted class.
          reason: required for another call, and for a correction.
        """
        result, history = self.result(prediction_id), self.signatures(prediction_id)
        body = {
            "result_sha256": result["sha256"],
            "after_version": len(history["versions"]),
            "call": call,
            "reason": reason,
            "password": password,
            "code": code,
        }
        return self.request("POST", f"/v1/predictions/{prediction_id}/signatures", json=body).json()

    def signatures(self, prediction_id: str) -> dict[str, Any]:
        """All versions of a result's signature, oldest first, and whether they are intact."""
        return self.request("GET", f"/v1/predictions/{prediction_id}/signatures").json()

    def heatmap(self, prediction_id: str, slide_id: str) -> bytes:
        """The heatmap of a slide as PNG."""
        return self.request("GET", f"/v1/predictions/{prediction_id}/slides/{slide_id}/heatmap.png").content

    def regions(self, prediction_id: str, slide_id: str) -> dict[str, Any]:
        """The regions of a slide with attention and attribution as GeoJSON."""
        return self.request("GET", f"/v1/predictions/{prediction_id}/slides/{slide_id}/regions.geojson").json()


def _detail(response: httpx.Response) -> str:
    try:
        return response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]

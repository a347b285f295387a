"""Requests made up from the OpenAPI document: whatever they hold, none is an error of the service."""

from collections import Counter
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from crcjax.serve.client import Client
from crcjax.serve.permissions import EVERY_SITE, Role

# These would end the sessions and accounts of the others, or say rightly that no worker is there.
_LEFT_OUT = ("/sign-out", "/disable", "/totp/confirm", "/readyz")


@pytest.fixture
def callers(server, pathologist: Client, administrator: Client) -> list[Client]:
    """Clients that reach every endpoint between them, and one that has not signed in."""
    return [pathologist, administrator, server.account("auditor", Role.AUDITOR, EVERY_SITE), server.client()]


def _send(callers: list[Client], operation, mode, examples: int) -> Counter[int]:
    """Sends requests to one endpoint, of the form that the document allows or of others, and counts the statuses."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        request = case.as_transport_kwargs(base_url=str(callers[0]._http.base_url))
        request.pop("cookies", None)
        if isinstance(request.get("data"), bytes | str):
            request["content"] = request.pop("data")
        for caller in callers:
            headers = {**dict(request.get("headers") or {}), **caller._http.headers}
            reply = caller._http.send(caller._http.build_request(**{**request, "headers": headers}))
            statuses[reply.status_code] += 1
            assert reply.status_code < 500, (operation.label, request, reply.text)

    # An endpoint without parameters has no request of another form.
    with suppress(Unsatisfiable):
        send()
    return statuses


@pytest.mark.slow
def test_no_request_that_the_document_allows_or_forbids_is_an_error_of_the_service(
    server, callers: list[Client]
) -> None:
    schema = schemathesis.openapi.from_dict(server.client().request("GET", "/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 25
    statuses: Counter[int] = Counter()
    for operation in operations:
        if not operation.path.endswith(_LEFT_OUT):
            for mode in schemathesis.GenerationMode:
                statuses += _send(callers, operation, mode, 2)
    assert {200, 401, 403, 404, 422} <= set(statuses)

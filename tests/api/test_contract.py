"""schemathesis against the description: whatever it makes up, the API answers as described and never fails by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from hvbackup.auth import Role
from tests.api.conftest import Site, made_site

pytestmark = pytest.mark.walk

LEFT_OUT = ("/api/v1/events", "/api/v1/sql")  # one never ends, the other starts a process each time
EXAMPLES = 200 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 4  # of each operation


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site of its own: strangers add users and pause machines here."""
    yield from made_site(tmp_path_factory.mktemp("tried"))


@pytest.mark.timeout(1800)
def test_the_api_keeps_to_its_description(tried: Site) -> None:
    loaded = schemathesis.openapi.from_asgi("/api/v1/openapi.json", tried.app)
    headers = {"Authorization": f"Bearer {tried.tokens[Role.ADMIN]}"}
    operations = [found.ok() for found in loaded.get_all_operations()]
    asked = set()
    for operation in operations:
        if operation.path in LEFT_OUT:
            continue

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None,
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        def ask(case: Any) -> None:
            tried.desk.accounts.guard._failures.clear()
            answer = case.call(headers=headers)
            case.validate_response(answer, checks=[not_a_server_error, response_schema_conformance])

        ask()
        asked.add((operation.method, operation.path))
    assert len(asked) == len(operations) - len(LEFT_OUT) >= 54

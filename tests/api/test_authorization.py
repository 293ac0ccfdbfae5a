"""The authorization matrix: each route with each role; and what belongs to somebody else does not exist."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from fastapi.routing import APIRoute

from hvbackup.api import folders, pages
from hvbackup.auth import GRANTS, Permission, Role
from tests.api.conftest import Site

OPEN = {("GET", "/healthz"), ("POST", "/api/v1/login"), ("GET", "/api/v1/openapi.json")}
FORGED = "hvb_" + "x" * 43


def routes(site: Site) -> list[tuple[str, str, Any]]:
    """Every route of the API: method, path, and what its gate asks for."""
    found = []
    for route in walk(site.app.routes):
        if isinstance(route, APIRoute) and route.path.startswith(("/api/", "/metrics", "/healthz")):
            gates = [d.call for d in route.dependant.dependencies if hasattr(d.call, "permission")]
            found += [(method, route.path, gates[0] if gates else None) for method in route.methods]
    return found


def walk(routes_: Any) -> Any:
    for route in routes_:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            yield from walk(inner)
        else:
            yield route


def filled(site: Site, path: str) -> str:
    values = {
        "key": site.key("db1"),
        "job_id": "20260101-000000-00000000",
        "store": "main",
        "hold": "0" * 16,
        "token": "0" * 12,
        "request": "0" * 16,
    }
    return re.sub(r"{(\w+)}", lambda m: values.get(m[1], "nobody"), path)


def test_every_route_has_a_gate(site: Site) -> None:
    found = routes(site)
    assert len(found) >= 54
    assert {(m, p) for m, p, gate in found if gate is None} == OPEN - {("GET", "/api/v1/openapi.json")}


@pytest.mark.walk
def test_each_role_on_each_route(site: Site) -> None:
    """A refusal is 403 and nothing else; who may gets anything but 401 and 403 (an empty order is then 422)."""
    wrong = []
    for method, path, gate in routes(site):
        if gate is None or path.endswith("/events"):
            continue
        address = filled(site, path)
        for role in Role:
            status = site.client(role).request(method, address).status_code
            allowed = gate.permission in GRANTS[role]
            if (status == 403) == allowed or status == 401:
                wrong.append((method, path, str(role), status))
        for token in ("", FORGED):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            client = site.client()
            site.desk.accounts.guard._failures.clear()
            if client.request(method, address, headers=headers).status_code != 401:
                wrong.append((method, path, token or "nobody", 0))
        limited = site.client("admin of web").request(method, address).status_code
        if (limited == 403) != gate.everything:
            wrong.append((method, path, "admin of web", limited))
    assert wrong == []


GATES = {
    pages.visitor: (Permission.READ, False),
    pages.reader: (Permission.READ, False),
    pages.overseer: (Permission.READ, True),
    pages.admin: (Permission.ADMIN, True),
    folders.restorer: (Permission.RESTORE, False),
}
OPEN_PAGES = {
    ("GET", "/"),  # sends on to one that is not
    ("GET", "/login"),
    ("POST", "/login"),
    ("GET", "/login/provider"),
    ("GET", "/login/provider/back"),
    ("GET", "/static/{name}"),
}


def page_routes(site: Site) -> list[tuple[str, str, Any]]:
    """Every route of the console: method, path, and who it asks for."""
    found = []
    for route in walk(site.app.routes):
        if isinstance(route, APIRoute) and not route.path.startswith(("/api/", "/metrics", "/healthz")):
            gates = [d.call for d in route.dependant.dependencies if d.call in GATES]
            found += [(method, route.path, gates[0] if gates else None) for method in route.methods]
    return found


def test_each_role_on_each_page(site: Site) -> None:
    found = page_routes(site)
    assert {(m, p) for m, p, gate in found if gate is None} == OPEN_PAGES
    assert len(found) >= 19
    wrong = []
    for method, path, gate in found:
        if gate is None:
            continue
        address, (permission, everything) = filled(site, path).replace(site.key("db1"), site.key("web1")), GATES[gate]
        for who in [*Role, "viewer of web", "admin of web"]:
            role, limited = Role(who.split()[0]), who not in list(Role)
            status = site.client(who).request(method, address, follow_redirects=False).status_code
            allowed = permission in GRANTS[role] and not (everything and limited)
            if (status == 403) == allowed or status == 401:
                wrong.append((method, path, who, status))
        for headers in ({}, {"Authorization": f"Bearer {FORGED}"}):
            site.desk.accounts.guard._failures.clear()
            answer = site.client().request(method, address, headers=headers, follow_redirects=False)
            sent_to_login = answer.status_code == 303 and answer.headers["location"].startswith("/login?")
            if not (sent_to_login if method == "GET" else answer.status_code == 401):
                wrong.append((method, path, str(headers), answer.status_code))
    assert wrong == []


@pytest.mark.parametrize("action", [*pages.ACTIONS, "nosuch"])
def test_each_role_on_each_button(site: Site, action: str) -> None:
    permission = pages.ACTIONS[action][0] if action in pages.ACTIONS else Permission.ADMIN
    for role in Role:
        status = site.client(role).post(f"/machines/{'0' * 32}", data={"action": action, "csrf": ""}).status_code
        assert (status == 403) != (permission in GRANTS[role]), (role, status)


LIMITED = {
    ("GET", "/api/v1/events"),
    ("GET", "/api/v1/jobs"),
    ("GET", "/api/v1/jobs/{job_id}"),
    ("DELETE", "/api/v1/jobs/{job_id}"),
    ("GET", "/api/v1/jobs/{job_id}/log"),
    ("GET", "/api/v1/machines"),
    ("GET", "/api/v1/me"),
    ("POST", "/api/v1/logout"),
    ("GET", "/api/v1/status"),
}


def test_what_concerns_no_single_machine_is_closed_to_who_is_limited(site: Site) -> None:
    """Those above show and change what is theirs only; a route that is new has to be thought about."""
    found = {(m, p) for m, p, gate in routes(site) if gate and not gate.everything and "{key}" not in p}
    assert found == LIMITED


def test_what_is_somebody_elses_does_not_exist(site: Site) -> None:
    mine, other = site.key("web1"), site.key("db1")
    jobs = len(site.keeper.jobs.all())
    for who in ("viewer of web", "admin of web"):
        client = site.client(who)
        assert [m["name"] for m in client.get("/api/v1/machines").json()["machines"]] == ["web1"]
        assert client.get(f"/api/v1/machines/{mine}").status_code == 200
        for path in ("", "/points", "/timeline", "/at?time=-1s"):
            assert client.get(f"/api/v1/machines/{other}{path}").status_code == 404
        assert client.get("/api/v1/status").json()["machines"]["protected"] == 1
    orders = {
        "backup": {},
        "restore": {"to": "x"},
        "boot": {},
        "map": {},
        "tag": {"tag": "x"},
        "holds": {"point": "0" * 16},
    }
    for verb, body in orders.items():
        assert site.client("admin of web").post(f"/api/v1/machines/{other}/{verb}", json=body).status_code == 404
    assert len(site.keeper.jobs.all()) == jobs


def test_the_local_socket_is_the_administrators(site: Site) -> None:
    assert site.local.get("/api/v1/me").json()["role"] == "admin"
    assert site.client().get("/api/v1/me").status_code == 401


def test_roles_grow() -> None:
    order = [GRANTS[r] for r in (Role.VIEWER, Role.OPERATOR, Role.RESTORER, Role.ADMIN)]
    assert all(a < b for a, b in itertools.pairwise(order))
    assert GRANTS[Role.ADMIN] == set(Permission)


@pytest.mark.parametrize("header", ["Basic YWRtaW46YWRtaW4=", "Bearer", "Bearer ", "bearer \x00", "Bearer hvb_ü"])
def test_odd_authorizations_are_refused(site: Site, header: str) -> None:
    site.desk.accounts.guard._failures.clear()
    headers = [(b"authorization", header.encode("utf-8"))]
    assert site.client().get("/api/v1/machines", headers=headers).status_code == 401


def test_guessing_tokens_is_slowed_down(site: Site) -> None:
    site.desk.accounts.guard._failures.clear()
    seen = [
        site.client().get("/api/v1/me", headers={"Authorization": f"Bearer {FORGED}{n}"}).status_code for n in range(9)
    ]
    assert seen[:5] == [401] * 5
    assert 429 in seen
    site.desk.accounts.guard._failures.clear()

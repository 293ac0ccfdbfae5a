"""The API over real machines: orders become jobs that run, what is recovered is right, everything is in the audit."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import Request

from hvbackup.api.app import create
from hvbackup.api.gate import COOKIE, Caller, is_still_admitted
from hvbackup.api.work import _events
from hvbackup.auth import Principal, Role
from hvbackup.jobs import State
from tests.api.conftest import SIZE, Site

ROOT = Path(__file__).resolve().parents[2]


def test_machines_points_and_timeline(site: Site) -> None:
    client = site.client("viewer")
    listed = client.get("/api/v1/machines").json()
    assert listed["total"] == 3
    by_name = {m["name"]: m for m in listed["machines"]}
    assert (by_name["web1"]["state"], by_name["web1"]["points"], by_name["web1"]["policy"]) == ("protected", 2, "daily")
    assert by_name["<script>alert(1)</script>"]["state"] == "unprotected"
    key = by_name["web1"]["key"]
    points = client.get(f"/api/v1/machines/{key}/points").json()
    assert points["total"] == 2
    newest = points["points"][0]
    band = client.get(f"/api/v1/machines/{key}/timeline").json()
    assert [p["id"] for p in band["points"]][-1] == newest["id"]
    at = client.get(f"/api/v1/machines/{key}/at", params={"time": newest["time"]}).json()
    assert (at["kind"], at["at"]) == ("point", newest["id"])
    before = client.get(f"/api/v1/machines/{key}/at", params={"time": "2001-01-01 00:00"}).json()
    assert (before["kind"], before["at"]) == ("nothing", "")
    assert client.get("/api/v1/machines", params={"q": "WEB"}).json()["total"] == 1
    assert client.get("/api/v1/machines", params={"state": "late"}).json()["total"] == 0


def test_an_unprotected_machine_and_a_policy_for_nothing_are_alarms(site: Site) -> None:
    site.keeper._next.pop("alarms", None)
    site.keeper.step()
    said = [a["text"] for a in site.client("viewer").get("/api/v1/status").json()["alarms"]]
    assert "unprotected: No policy names it" in said
    assert "Policy none matches no machine" in said


def test_a_broken_configuration_changes_nothing_and_is_an_alarm(site: Site) -> None:
    keeper, path = site.keeper, site.world.configuration / "config.toml"
    before, good = keeper.settings, path.read_text()

    def alarms() -> list[str]:
        keeper._next.pop("alarms", None)
        keeper.step()
        return [a["text"] for a in site.client("viewer").get("/api/v1/status").json()["alarms"]]

    path.write_text(good.replace("[policy.daily]", "[polcy.daily]"))
    try:
        assert not keeper.reload()
        assert keeper.settings == before
        assert any("the old one holds" in text and "polcy" in text for text in alarms())
    finally:
        path.write_text(good)
    assert keeper.reload()
    assert not any("the old one holds" in text for text in alarms())


def test_a_restore_gives_the_bytes_and_stays_below_its_folder(site: Site) -> None:
    client, key = site.client("restorer"), site.key("web1")
    job = client.post(f"/api/v1/machines/{key}/restore", json={"to": "r1"}).json()
    assert job["state"] == "queued"
    done = site.finish(job["id"])
    assert done["state"] == "done", done
    [disk] = done["answer"]["disks"]
    assert Path(disk["file"]).read_bytes() == (site.world.folder / "a.raw").read_bytes()
    assert Path(disk["file"]).is_relative_to(site.world.folder)
    for to in ("../x", "/etc", "a/b", "..", "", "-x", "x\n", "a\0", "~", "." * 99):
        assert client.post(f"/api/v1/machines/{key}/restore", json={"to": to}).status_code == 422, to
    for at in ("--help", "-1d --to=/etc", "x\ny"):
        answer = client.post(f"/api/v1/machines/{key}/restore", json={"to": "r2", "at": at})
        if answer.status_code == 202:
            assert site.finish(answer.json()["id"])["state"] == "failed"
    assert not (site.world.folder / "restores/r2").exists() or not list((site.world.folder / "restores/r2").iterdir())


def test_a_backup_a_hold_and_a_check(site: Site) -> None:
    client, key = site.client("operator"), site.key("db1")
    assert site.finish(client.post(f"/api/v1/machines/{key}/backup", json={}).json()["id"])["state"] == "done"
    site.keeper.refresh()
    newest = client.get(f"/api/v1/machines/{key}/points").json()["points"][0]["id"]
    held = client.post(f"/api/v1/machines/{key}/holds", json={"point": newest, "why": "the audit"})
    assert held.status_code == 201
    assert client.get(f"/api/v1/machines/{key}/timeline").json()["holds"][0]["point"] == newest
    assert client.get("/api/v1/holds").json()["holds"][0]["why"] == "the audit"
    assert client.delete(f"/api/v1/holds/{held.json()['hold']}").status_code == 403
    assert site.client("admin").delete(f"/api/v1/holds/{held.json()['hold']}").json()["waits"] is None
    check = client.post("/api/v1/stores/main/check", json={"deep": True}).json()
    assert site.finish(check["id"])["state"] == "done"
    assert client.post("/api/v1/stores/nosuch/check", json={}).status_code == 404
    assert client.post(f"/api/v1/machines/{key}/tag", json={"tag": "now"}).status_code == 404, "nobody protects it"


def test_an_export_lasts_until_it_is_cancelled(site: Site) -> None:
    from hvbackup.nbd.client import NbdClient

    client = site.client("restorer")
    job = client.post(f"/api/v1/machines/{site.key('web1')}/map", json={"at": "latest"}).json()["id"]
    end = time.monotonic() + 180
    while not (answer := client.get(f"/api/v1/jobs/{job}").json()["answer"]):
        assert time.monotonic() < end
        site.keeper.step()
        time.sleep(0.05)
    with NbdClient.open(answer["disks"][0]["uri"]) as export:
        buffer = bytearray(SIZE)
        export.read_into(0, memoryview(buffer))
    assert bytes(buffer) == (site.world.folder / "a.raw").read_bytes()
    assert client.delete(f"/api/v1/jobs/{job}").status_code == 200
    assert site.finish(job)["state"] in ("done", "cancelled")
    assert client.delete(f"/api/v1/jobs/{job}").status_code == 422


@pytest.mark.walk
def test_queries_only_read(site: Site) -> None:
    client = site.client("viewer")
    rows = client.post("/api/v1/sql", json={"query": "select count(*) from machines"}).json()["rows"]
    assert rows == [[2]]
    for query in ("drop table x", "copy (select 1) to '/tmp/x'", "select * from read_csv('/etc/passwd')"):
        assert client.post("/api/v1/sql", json={"query": query}).status_code == 422, query


def test_everything_that_changes_or_reads_protected_data_is_in_the_audit(site: Site) -> None:
    site.client("restorer").post(f"/api/v1/machines/{site.key('web1')}/restore", json={"to": "audited", "at": "ffff"})
    [entry] = site.client("admin").get("/api/v1/audit", params={"count": 1}).json()["entries"]
    assert (entry["what"], entry["who"]) == ("restore", "token the restorer")
    assert entry["details"]["command"].startswith("hvbackup restore --at=ffff --to=")
    web1 = next(r for r in site.keeper.rows() if r.name == "web1")
    assert entry["machine"] == {"id": web1.id, "name": "web1", "key": web1.key}
    told = site.world.done("sql", "select count(*) from runs where kind = 'audit'", "--json").json["rows"]
    assert told[0][0] >= 1
    again = type(site.desk)(site.keeper, site.desk.accounts)
    again.load_audit()
    assert again.audited[-1]["details"] == entry["details"]
    assert site.world.run("check").code == 0


def test_the_audit_says_names_and_ids_where_nobody_knows_the_machine_any_more(site: Site) -> None:
    caller = Caller(Principal("ann", Role.ADMIN), "192.0.2.7")
    site.desk.audit(caller, "hold", "done", next(r.id for r in site.keeper.rows() if r.name == "db1"))
    site.desk.audit(caller, "hold", "done", "long-gone")
    text = site.local.get("/audit").text
    assert f'<a href="/machines/{site.key("db1")}">db1</a>' in text
    assert '<span class="id">long-gone</span>' in text
    entries = site.client("admin").get("/api/v1/audit", params={"count": 2}).json()["entries"]
    assert entries[0]["machine"] == {"id": "long-gone", "name": None, "key": None}
    assert entries[1]["machine"]["name"] == "db1"


def test_people_are_added_and_removed_by_admins(site: Site) -> None:
    client = site.client("admin")
    made = client.post("/api/v1/tokens", json={"name": "ci", "role": "viewer", "lasts": "1h"}).json()
    assert (
        site.client().get("/api/v1/me", headers={"Authorization": f"Bearer {made['token']}"}).json()["role"] == "viewer"
    )
    assert all("digest" not in t and "token" not in t for t in client.get("/api/v1/tokens").json()["tokens"])
    assert client.delete(f"/api/v1/tokens/{made['id']}").status_code == 200
    assert site.client().get("/api/v1/me", headers={"Authorization": f"Bearer {made['token']}"}).status_code == 401
    user = client.post(
        "/api/v1/users", json={"name": "eve", "password": "a long password", "role": "viewer", "totp": True}
    )
    assert len(user.json()["totp"]) == 32
    assert all("password" not in u and "totp" not in u for u in client.get("/api/v1/users").json()["users"])
    assert client.delete("/api/v1/users/eve").status_code == 200


def test_metrics(site: Site) -> None:
    text = site.client("viewer").get("/metrics").text
    assert 'hvbackup_covered{machine="web1",id=' in text
    assert 'hvbackup_source_up{source="a"} 1' in text
    assert "hvbackup_store_free_bytes" in text


def test_metrics_say_how_the_newest_capture_ended(site: Site) -> None:
    job = site.client("operator").post(f"/api/v1/machines/{site.key('web1')}/backup", json={}).json()["id"]
    site.finish(job)
    for state, value in ((State.DEGRADED, 1), (State.FAILED, 2), (State.DONE, 0)):
        site.keeper.jobs._put(replace(site.keeper.jobs.get(job), state=state))
        text = site.client("viewer").get("/metrics").text
        found = [line for line in text.splitlines() if line.startswith('hvbackup_run_status{machine="web1"')]
        assert [line.split()[-1] for line in found] == [str(value)]


def test_errors_are_json_with_the_kind_and_the_exit_code(site: Site) -> None:
    answer = site.client("viewer").get(f"/api/v1/machines/{'0' * 32}")
    assert answer.status_code == 404
    assert answer.json()["error"]["kind"] == "NotFound"
    assert answer.json()["error"]["exit_code"] == 2
    assert (
        site.client("operator").post(f"/api/v1/machines/{site.key('web1')}/backup", json={"fulll": True}).status_code
        == 422
    )
    huge = b"x" * (300 * 1024)
    assert site.client("operator").post(f"/api/v1/machines/{site.key('web1')}/backup", content=huge).status_code in (
        413,
        422,
    )


def test_the_description_in_docs_is_the_one_that_is_served(site: Site) -> None:
    served = site.client().get("/api/v1/openapi.json").json()
    assert served["openapi"].startswith("3.1")
    shipped = json.loads((ROOT / "docs/openapi.json").read_text())
    assert shipped == create(None).openapi(), "write it again: python -m hvbackup.api.describe docs/openapi.json"
    assert shipped == served


def test_no_machine_name_becomes_an_option_or_a_word_of_its_own(site: Site) -> None:
    """Ids come from hosts: whatever they are, they stand behind `--`."""

    from hvbackup.api import orders

    row = next(r for r in site.keeper.rows() if r.name == "web1")
    for evil in ("--help", "-rf", "$(reboot)", "; rm -rf /", "a\nb", "--store=/elsewhere"):
        bad = replace(row, id=evil, name=evil)
        for task in (
            orders.boot(site.keeper, bad, orders.Boot(generic=True), "x"),
            orders.map_(site.keeper, bad, orders.Which(), "x"),
            orders.prune(site.keeper, bad, orders.Prune(keep={"daily": 1}), "x"),
        ):
            assert list(task.words[-2:]) == ["--", evil]
        made = orders.backup(site.keeper, bad, orders.Backup(), "x")
        assert f"--only={evil}" in made.words


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"]
)
def test_static_files_are_those_there_are(site: Site, path: str) -> None:
    assert site.client().get(path).status_code in (404, 422)


def test_a_stream_of_events_ends_with_who_listens(site: Site) -> None:
    token, text = site.desk.accounts.add_token("listener", Role.VIEWER, ["*"], 0)
    request = Request(
        {"type": "http", "headers": [(b"authorization", f"Bearer {text}".encode())], "app": site.app, "method": "GET"}
    )
    assert is_still_admitted(request)
    site.desk.accounts.remove_token(token.id)
    assert not is_still_admitted(request)
    site.desk.accounts.add_user("bob", Role.VIEWER, [], "a long password", totp=False)
    cookie = site.desk.sessions.begin(Principal("bob", Role.VIEWER))
    request = Request(
        {"type": "http", "headers": [(b"cookie", f"{COOKIE}={cookie}".encode())], "app": site.app, "method": "GET"}
    )
    assert is_still_admitted(request)
    site.desk.accounts.remove_user("bob")
    assert not is_still_admitted(request)

    async def heard() -> list[str]:
        return [text async for text in _events(request, site.desk, Caller(Principal("bob", Role.VIEWER), "a"))]

    assert asyncio.run(heard()) == []


def test_no_time_is_beyond_what_can_be_written(site: Site) -> None:
    admin = site.client("admin")
    answer = admin.post("/api/v1/tokens", json={"name": "old", "role": "viewer", "lasts": "420000w"})
    assert answer.status_code == 422
    assert "hundred years" in answer.text
    assert admin.get("/api/v1/tokens").status_code == 200

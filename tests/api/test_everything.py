"""Everything the command line can do, the API can: no verb is forgotten, and what it can't do has a reason."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvbackup.auth import Principal, Role
from hvbackup.cli.command import build
from tests.api.conftest import Site, made_site
from tests.api.test_authorization import routes

V = "/api/v1"
ROUTES: Mapping[str, tuple[str, str]] = {
    "init": ("POST", f"{V}/stores/{{store}}"),
    "status": ("GET", f"{V}/status"),
    "key list": ("GET", f"{V}/stores/{{store}}/keys"),
    "key paper": ("POST", f"{V}/stores/{{store}}/keys"),
    "key remove": ("DELETE", f"{V}/stores/{{store}}/keys/{{key}}"),
    "check": ("POST", f"{V}/stores/{{store}}/check"),
    "sql": ("POST", f"{V}/sql"),
    "backup": ("POST", f"{V}/machines/{{key}}/backup"),
    "points": ("GET", f"{V}/machines/{{key}}/points"),
    "protect pause": ("POST", f"{V}/machines/{{key}}/pause"),
    "protect resume": ("POST", f"{V}/machines/{{key}}/resume"),
    "tag": ("POST", f"{V}/machines/{{key}}/tag"),
    "timeline": ("GET", f"{V}/machines/{{key}}/timeline"),
    "restore": ("POST", f"{V}/machines/{{key}}/restore"),
    "boot": ("POST", f"{V}/machines/{{key}}/boot"),
    "drill": ("POST", f"{V}/machines/{{key}}/drill"),
    "discard": ("DELETE", f"{V}/boots/{{name}}"),
    "map": ("POST", f"{V}/machines/{{key}}/map"),
    "files": ("GET", f"{V}/machines/{{key}}/files"),
    "copy": ("POST", f"{V}/stores/{{store}}/copy"),
    "prune": ("POST", f"{V}/machines/{{key}}/prune"),
    "forget": ("POST", f"{V}/stores/{{store}}/forget"),
    "hold": ("POST", f"{V}/machines/{{key}}/holds"),
    "holds": ("GET", f"{V}/holds"),
    "release": ("DELETE", f"{V}/holds/{{hold}}"),
    "approve": ("POST", f"{V}/stores/{{store}}/requests/{{request}}/approve"),
    "settings": ("PATCH", f"{V}/stores/{{store}}/settings"),
    "reclaim": ("POST", f"{V}/stores/{{store}}/reclaim"),
    "audit list": ("GET", f"{V}/audit"),
    "audit verify": ("GET", f"{V}/stores/{{store}}/records"),
    "stats": ("GET", f"{V}/stores/{{store}}/stats"),
    "size": ("POST", f"{V}/stores/{{store}}/size"),
    "regroup": ("POST", f"{V}/stores/{{store}}/regroup"),
    "parity": ("POST", f"{V}/stores/{{store}}/parity"),
    "doctor": ("POST", f"{V}/stores/{{store}}/doctor"),
    "config check": ("GET", f"{V}/configuration/check"),
    "config show": ("GET", f"{V}/configuration"),
    "jobs": ("GET", f"{V}/jobs"),
    "user add": ("POST", f"{V}/users"),
    "user list": ("GET", f"{V}/users"),
    "user remove": ("DELETE", f"{V}/users/{{name}}"),
    "token add": ("POST", f"{V}/tokens"),
    "token list": ("GET", f"{V}/tokens"),
    "token remove": ("DELETE", f"{V}/tokens/{{token}}"),
}
WITHOUT = {
    "key add": "a key or passphrase of one's own choice does not travel: it is a file of the host; `key paper` makes one",
    "protect": "policies say which machines have workers, and the service keeps them; pause and resume are routes",
    "audit keep": "the copy of the heads belongs where whoever can reach the service can't write it",
    "serve": "it is what answers",
    "watch": "the service watches by itself; what it hears is in `event` of a machine",
    "benchmark": "it measures a host, which is then busy with nothing else",
    "completion": "of a shell",
    "man": "of a terminal",
}


def verbs(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                inside = list(verbs(verb, f"{before}{name} "))
                yield from inside or [f"{before}{name}"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose points are forgotten and whose settings change."""
    yield from made_site(tmp_path_factory.mktemp("everything"))


def test_every_verb_is_a_route_or_has_a_reason(site: Site) -> None:
    there = {(method, path) for method, path, _ in routes(site)}
    known = {*verbs(build()), "protect pause", "protect resume"}
    assert known == {*ROUTES, *WITHOUT}
    assert not set(ROUTES) & set(WITHOUT)
    assert set(ROUTES.values()) <= there


def person(site: Site, name: str) -> tuple[Any, dict[str, str]]:
    """Somebody who has logged in."""
    site.desk.accounts.add_user(name, Role.ADMIN, ["*"], "a long password", totp=False)
    client = site.client()
    answer = client.post(f"{V}/login", json={"name": name, "password": "a long password"})
    return client, {"X-Hvbackup-Csrf": answer.json()["csrf"]}


def test_forgetting_and_having_back(own: Site) -> None:
    admin, key = own.client("admin"), own.key("web1")
    points = admin.get(f"{V}/machines/{key}/points").json()["points"]
    oldest = points[-1]["id"]
    assert admin.post(f"{V}/stores/main/forget", json={"points": [points[0]["id"]]}).status_code == 422, "the newest"
    assert admin.post(f"{V}/stores/none/forget", json={"points": [oldest]}).status_code == 404
    done = admin.post(f"{V}/stores/main/forget", json={"points": [oldest], "why": "too old"})
    assert done.status_code == 200, done.text
    [there] = admin.get(f"{V}/stores/main/trash").json()["trash"]
    assert (there["id"], there["why"]) == (oldest, "too old")
    assert "admin" in there["by"], "who asked, not who runs the service"
    assert admin.post(f"{V}/stores/main/forget/undo", json={"points": [oldest]}).json() == {"restored": [oldest]}
    assert admin.get(f"{V}/stores/main/trash").json() == {"trash": []}


def test_a_prune_of_the_whole_store_takes_every_rule(own: Site) -> None:
    """What the command line's `prune` can be told, this route can, as words that are never options of somebody's choice."""
    admin, path = own.client("admin"), f"{V}/stores/main/prune"
    order = {"keep": {"last": "all", "daily": 7}, "within": "30d", "tags": ["--x"], "zone": "UTC", "count": "proxmox",
             "group_by": "disks", "dry_run": True, "machines": ["web1"]}  # fmt: skip
    job = admin.post(path, json=order).json()
    assert job["command"].startswith(
        "hvbackup prune --keep-last=all --keep-daily=7 --keep-tag=--x --keep-within=30d --zone=UTC --count=proxmox"
    )
    done = own.finish(job["id"])
    assert (done["state"], [p["machine"]["name"] for p in done["answer"]["plans"]]) == ("done", ["web1"])
    assert all(p["keep"] for p in done["answer"]["plans"][0]["points"])
    nothing = own.finish(admin.post(path, json={}).json()["id"])
    assert (nothing["state"], nothing["exit_code"]) == ("failed", 2), "a policy that keeps nothing is refused"
    for wrong in ({"keep": {"last": 0}}, {"keep": {"ever": 1}}, {"zone": "a\nb"}, {"wait_seconds": 1e9}):
        assert admin.post(path, json=wrong).status_code == 422, wrong
    assert own.client("admin of web").post(path, json=order).status_code == 403


def test_two_persons_over_the_api(own: Site) -> None:
    """Ann asks, and neither she, a token nor the socket approves; Bob does."""
    key = own.key("web1")
    ann, her = person(own, "ann")
    bob, his = person(own, "bob")
    point = ann.get(f"{V}/machines/{key}/points").json()["points"][-1]["id"]
    assert ann.patch(f"{V}/stores/main/settings", json={"two_person": True}, headers=her).status_code == 200
    asked = ann.post(f"{V}/stores/main/forget", json={"points": [point]}, headers=her).json()["request"]["id"]
    where = f"{V}/stores/main/requests/{asked}/approve"
    refused = ann.post(where, headers=her)
    assert refused.status_code == 422
    assert "can't be told from them" in refused.text
    assert own.client("admin").post(where).status_code == 422
    assert own.local.post(where).status_code == 422
    assert own.world.run("approve", asked).code == 2, "nor whoever has a shell, who may be Ann as well"
    done = bob.post(where, headers=his)
    assert done.status_code == 200, done.text
    assert [t["id"] for t in bob.get(f"{V}/stores/main/trash").json()["trash"]] == [point]
    weaker = ann.patch(f"{V}/stores/main/settings", json={"two_person": False}, headers=her).json()["request"]["id"]
    assert bob.post(f"{V}/stores/main/requests/{weaker}/approve", headers=his).status_code == 200
    assert bob.get(f"{V}/stores/main/settings").json()["settings"]["two_person"] is False


def test_keys_figures_and_the_configuration(own: Site) -> None:
    admin = own.client("admin")
    made = admin.post(f"{V}/stores/main/keys", json={"label": "safe"}).json()
    assert made["text"]
    listed = admin.get(f"{V}/stores/main/keys").json()["keys"]
    assert "safe" in [k["label"] for k in listed]
    assert made["text"] not in admin.get(f"{V}/audit").text
    assert admin.delete(f"{V}/stores/main/keys/{made['key']['id']}").json()["removed"] == made["key"]["id"]
    assert {m["machine"]["name"] for m in admin.get(f"{V}/stores/main/stats").json()["machines"]} == {"web1", "db1"}
    told = admin.post(f"{V}/stores/main/size", json={"keep": {"daily": 7}, "machines": ["db1"]})
    assert told.status_code == 422, "it has one point"
    assert "db1" in told.json()["error"]["message"]
    assert admin.get(f"{V}/stores/main/records").json()["ok"] is True
    assert admin.get(f"{V}/configuration").json()["policy"]["daily"]["rpo"] == "1000d"
    assert admin.get(f"{V}/configuration/check").json() == {"ok": True, "problems": []}
    more = own.world.configuration / "conf.d"
    more.mkdir()
    (more / "x.toml").write_text("[polcy.x]\n")
    assert "polcy" in admin.get(f"{V}/configuration/check").json()["problems"][0]
    (more / "x.toml").unlink()
    assert "password" not in admin.get(f"{V}/configuration").text.replace("password_file", "")


def test_a_drill_is_verified_on_the_timeline_and_in_metrics(own: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made when its policy says so."""
    drilled = {n: replace(p, drill="1s") for n, p in own.keeper.settings.policies.items()}
    monkeypatch.setattr(own.keeper, "settings", replace(own.keeper.settings, policies=drilled))
    own.keeper._begin_drills()
    own.keeper._begin_drills()
    [job] = [j for j in own.keeper.jobs.all() if j.task.kind == "drill" and j.task.name == "web1"]
    done = own.finish(job.id)
    assert done["answer"]["ok"], done
    key = own.key("web1")
    [verified] = own.local.get(f"{V}/machines/{key}/timeline").json()["verified"]
    assert verified["at"] == done["answer"]["at"]
    assert verified["error"] is None
    assert 'hvbackup_drill_rto_seconds{machine="web1"' in own.local.get("/metrics").text


def test_upkeep_runs_as_jobs(own: Site) -> None:
    admin = own.client("admin")
    for verb, order in (("reclaim", {"dry_run": True}), ("regroup", {}), ("doctor", {})):
        made = admin.post(f"{V}/stores/main/{verb}", json=order)
        assert made.status_code == 202, made.text
        done = own.finish(made.json()["id"])
        assert done["answer"] is not None, (verb, done)
    refused = admin.post(f"{V}/stores/main/copy", json={"to": "/tmp/elsewhere"})
    assert refused.status_code == 404, "a store is named as the configuration names it, never by a path"


def test_a_store_of_the_configuration_is_made(own: Site, tmp_path: Path) -> None:
    """And once only."""
    (own.world.configuration / "conf.d").mkdir(exist_ok=True)
    extra = own.world.configuration / "conf.d/second.toml"
    extra.write_text(f'[store.second]\npath = "{own.world.folder}/second"\n')
    config = own.world.configuration / "config.toml"
    before = config.read_text()
    config.write_text(before.replace('machines = ["web1", "db1"]', 'machines = ["web1", "db1"]\nstore = "main"').replace(
        'machines = ["nosuch"]', 'machines = ["nosuch"]\nstore = "main"'))  # fmt: skip
    try:
        assert own.keeper.reload(), own.keeper.reload_error
        made = own.client("admin").post(f"{V}/stores/second", json={})
        assert made.status_code == 201, made.text
        assert Path(made.json()["key_file"]).exists()
        assert own.client("admin").post(f"{V}/stores/second", json={}).status_code in (409, 422)
        key = own.key("web1")
        copied = own.client("admin").post(f"{V}/stores/main/copy", json={"to": "second"})
        done = own.finish(copied.json()["id"])
        assert done["state"] in ("done", "degraded"), done
        own.keeper.refresh()
        own.client("admin").post(f"{V}/stores/second/keys", json={})
        told = [r.value["what"] for r in own.keeper.estate("second").store.runs if r.value.get("kind") == "audit"]
        assert told == ["key add"], "in the chain of the store that it concerns"
        scraped = own.local.get("/metrics").text
        assert 'hvbackup_store_free_bytes{store="second"}' in scraped
        assert 'hvbackup_store_free_bytes{store="main"}' in scraped
        assert key
    finally:
        extra.unlink()
        config.write_text(before)
        own.keeper.reload()


def test_whoever_is_limited_to_some_machines_has_no_say_over_stores(own: Site) -> None:
    assert Principal("x", Role.ADMIN, ("web*",)).is_unlimited is False
    limited = own.client("admin of web")
    for method, path in (("GET", "/stores/main/trash"), ("POST", "/stores/main/forget"), ("GET", "/configuration")):
        assert limited.request(method, V + path, json={"points": ["0" * 16]}).status_code == 403

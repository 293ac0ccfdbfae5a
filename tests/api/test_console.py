"""The console in a real browser: a person finds a moment, restores it, and nothing on the page is anybody else's."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

from hvbackup import config
from hvbackup.api import orders
from hvbackup.api.server import answering
from hvbackup.auth import Accounts, Role
from hvbackup.capture import Options, capture
from hvbackup.config import KeyOptions
from hvbackup.configuration import ProviderSettings
from hvbackup.daemon.keeper import Keeper
from hvbackup.hypervisors.fake import FakeDisk, FakeHypervisor, FakeMachine
from hvbackup.jobs import State
from hvbackup.model import SECOND, Instant, MiB
from hvbackup.service.session import Session
from tests.api.provider import CLIENT, SECRET, Provider
from tests.api.provider import answering as provider_answering
from tests.api.test_guestfiles import filesystem
from tests.cli.rig import World, make_disk
from tests.hypervisors.daemon import Daemon, make_image, node

expect.set_options(timeout=60_000)  # a page that is right at once costs nothing by it
pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
PASSWORD = "a password for tests"
DAY = 86400 * SECOND
SHOTS = os.environ.get("HVBACKUP_SCREENSHOTS", "")
CONFIG = """
[service]
listen = "127.0.0.1:0"
prune = ""
[source.kvm1]
uri = "qemu:{folder}/m/qmp.sock"
name = "web1"
tags = ["prod"]
[source.files]
uri = "image:{folder}/db.raw"
name = "db1"
[source.old]
uri = "image:{folder}/old.raw"
name = "legacy-erp"
[policy.continuous]
machines = ["tag:prod"]
protect = true
every = "1s"
fold = "5s"
rpo = "1m"
keep = {{hourly = 48, daily = 14}}
[policy.daily]
machines = ["db*"]
schedule = "*-02-29"
rpo = "80h"
[store.main]
check = ""
reclaim = ""
regroup = ""
"""


@dataclass
class Console:
    """A running service with a browser's address."""

    world: World
    keeper: Keeper
    address: str
    since: int  # the time of a moment of web1


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    folder = tmp_path_factory.mktemp("console")
    world = World(folder)
    world.done("init")
    for name in ("db", "old"):
        make_disk(folder / f"{name}.raw", MiB)
    (world.configuration / "config.toml").write_text(CONFIG.format(folder=folder))
    (folder / "m").mkdir()
    daemon = Daemon(folder / "m", [node("vda", make_image(folder / "m/vda.raw", 4 * MiB, "raw"), "raw")]).start()
    past(world, f"qemu:{folder}/m/qmp.sock", "web1")
    past(world, str(folder / "db.raw"), "db1", guest_files(folder))
    keeper = Keeper(config.places(environment=world.environment, root=False), KeyOptions())
    keeper.environment = keeper.discovery.environment = keeper.workers.environment = world.environment
    keeper.jobs._environment = keeper.questions.environment = dict(world.environment)
    stop = threading.Event()
    looping = threading.Thread(target=lambda: [(keeper.step(), time.sleep(0.3)) for _ in iter(stop.is_set, True)])
    with answering(keeper) as desk:
        desk.accounts.add_user("ann", Role.ADMIN, [], PASSWORD, totp=False)
        desk.accounts.add_user("vic", Role.VIEWER, ["db*"], PASSWORD, totp=False)
        looping.start()
        try:
            wait(lambda: any(r.note and r.note.seq > 8 and r.points > 40 for r in keeper.rows()))
            yield Console(world, keeper, f"https://localhost:{desk.port}", newest_moment(keeper))
        finally:
            stop.set()
            looping.join()
            world.run("serve", "--end-workers")
            daemon.kill()
    keeper.close()


def newest_moment(keeper: Keeper) -> int:
    """The time of web1's."""
    return next(r.note.newest for r in keeper.rows() if r.name == "web1" and r.note)


def guest_files(folder: Path) -> bytes:
    """An ext4 with a few files, as the newest state of a disk."""
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "var/log").mkdir(parents=True)
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc/<b>bold<b>").write_text("x")
    (tree / "etc/mtab").symlink_to("/proc/mounts")
    (tree / "etc/services").write_bytes(random.Random(2).randbytes(200_000))
    filesystem(tree, folder / "guest.ext4", "4M")
    return (folder / "guest.ext4").read_bytes()


def past(world: World, machine: str, name: str, newest: bytes = b"") -> None:
    """Points of two years, ever denser."""
    now, ages = time.time_ns(), [*range(2, 26), *range(28, 240, 24), *range(300, 17000, 700)]
    clock = Clock()
    disk = FakeDisk(4 * MiB)
    disk.write(0, random.Random(1).randbytes(2 * MiB))
    hypervisor = FakeHypervisor([FakeMachine(machine, {"vda": disk})], clock=clock)
    session = Session(config.places(environment=world.environment, root=False))
    with session.open() as store, store.writing:
        for hours in sorted(ages, reverse=True):
            clock.now = now - hours * 3600 * SECOND
            disk.write(random.Random(hours).randrange(32) * 65536, random.Random(hours).randbytes(65536))
            if newest and hours == min(ages):
                disk.write(0, newest)
            capture(store, hypervisor, hypervisor.machines()[0], Options(name=name, clock=clock))


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> Instant:
        self.now += SECOND // 1000
        return Instant(self.now)


def wait(done: Any, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, console: Console) -> Iterator[Page]:
    context = browser.new_context(
        base_url=console.address, ignore_https_errors=True, viewport={"width": 1280, "height": 860}
    )
    context.set_default_timeout(60_000)
    made = context.new_page()
    complaints: list[str] = []
    made.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    made.on("pageerror", lambda e: complaints.append(str(e)))
    yield made
    context.close()
    assert [c for c in complaints if "status of 40" not in c] == [], "no script failed, and no policy was broken"


def enter(page: Page, name: str = "ann") -> None:
    page.goto("/")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_be_visible()


def hold_back(page: Page, what: str) -> list[Route]:
    """Requests for it wait in the list that is returned."""
    held: list[Route] = []
    page.route(what, lambda route: held.append(route))  # playwright takes no method of C
    return held


def shot(page: Page, name: str) -> None:
    """For people to look at, where they asked for it."""
    if SHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_a_person_sees_at_a_glance_what_is_protected(page: Page) -> None:
    page.goto("/")
    shot(page, "login")
    page.get_by_label("Name").fill("ann")
    page.get_by_label("Password").fill("wrong password")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    enter(page)
    expect(page.get_by_role("heading", level=1)).to_have_text("1 of 3 machines needs a look")
    row = page.get_by_role("row").filter(has_text="legacy-erp")
    expect(row).to_contain_text("unprotected")
    expect(page.get_by_role("row").filter(has_text="web1")).to_contain_text("protected")
    shot(page, "estate")
    page.emulate_media(color_scheme="dark")
    shot(page, "estate-dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than a phone"
    shot(page, "estate-phone")


def test_a_person_restores_a_machine_to_a_moment(page: Page, console: Console) -> None:
    """By typing a time and pressing a button; what comes back is the moment that the page named."""
    wait(lambda: newest_moment(console.keeper) > console.since + 11 * SECOND)
    enter(page)
    page.get_by_role("link", name="web1").click()
    expect(page.locator("#answer")).not_to_have_text("Choose a moment")
    page.get_by_role("button", name="hour", exact=True).click()
    shot(page, "machine")
    then = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(console.since // SECOND))
    page.get_by_label("A time to go to").fill(then)
    form = page.locator("form.do[data-action=restore]")
    expect(form.get_by_role("button", name="Restore")).to_be_enabled()
    before = form.locator("input[name=at]").input_value()
    held = hold_back(page, "**/at?time=*")
    page.get_by_role("button", name="Go", exact=True).click()
    wait(lambda: held or page.wait_for_timeout(50))
    expect(form.get_by_role("button", name="Restore")).to_be_disabled()
    assert form.locator("input[name=at]").input_value() == "", (
        "nobody restores the moment at which the cursor was before"
    )
    for answer in held:
        answer.continue_()
    page.unroute_all()
    expect(page.locator("#detail")).to_contain_text("at risk")
    expect(form.get_by_role("button", name="Restore")).to_be_enabled()
    assert form.locator("input[name=at]").input_value() != before
    seq = form.locator("input[name=at]").input_value()
    assert seq.startswith("seq:")
    form.get_by_label("To folder").fill("back")
    expect(form.locator(".line")).to_contain_text(f"hvbackup restore web1 --at={seq} --to=")
    shot(page, "machine-cursor")
    form.get_by_role("button", name="Restore").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("done")
    expect(page.locator(".line")).to_contain_text(f"--at={seq} ")
    shot(page, "job")
    [disk] = list((console.world.folder / "restores/back").glob("*.raw"))
    again = console.world.folder / "again"
    console.world.done("restore", "web1", "--at", seq, "--to", again)
    assert disk.read_bytes() == (again / disk.name).read_bytes()


def test_a_person_takes_one_file_out_with_the_keyboard_alone(page: Page, console: Console) -> None:
    enter(page)
    page.get_by_role("link", name="db1").click()
    form = page.locator("form.do[data-action=files]")
    expect(form.locator(".line")).to_contain_text("hvbackup files db1 --at=")
    expect(form.get_by_role("button", name="Browse")).to_be_enabled()
    at = form.locator("input[name=at]").input_value()
    form.get_by_role("button", name="Browse").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Files of db1")
    assert "csrf" not in page.url, "the session's word is in no address"
    shot(page, "files-disks")
    page.get_by_role("link", name="partition 0").press("Enter")
    page.get_by_role("link", name="etc").press("Enter")
    expect(page.get_by_role("row").filter(has_text="services")).to_contain_text("195.3 KiB")
    expect(page.get_by_role("row").filter(has_text="mtab")).to_contain_text("/proc/mounts")
    expect(page.locator(".same .line").first).to_contain_text(f"--at={at}")
    shot(page, "files")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "files-phone-dark")
    with page.expect_download() as got:
        page.get_by_role("link", name="Download hosts").press("Enter")
    assert Path(got.value.path()).read_bytes() == b"127.0.0.1 localhost\n"
    assert got.value.suggested_filename == "hosts"
    page.get_by_role("navigation", name="Folder").get_by_role("link", name="disks").press("Enter")
    expect(page.get_by_role("link", name="partition 0")).to_be_visible()
    page.goto(page.url.replace("path=%2F", "path=%2F0%2Fnosuch"))
    expect(page.get_by_role("heading", level=1)).to_have_text("Not there")


def test_the_timeline_works_with_the_keyboard_from_years_to_seconds(page: Page) -> None:
    enter(page)
    page.get_by_role("link", name="web1").click()
    band = page.locator("#band")
    expect(page.locator("#answer")).not_to_have_text("Choose a moment")
    newest = page.locator("#answer").inner_text()
    page.get_by_role("button", name="all", exact=True).click()
    shot(page, "timeline-years")
    band.focus()
    page.keyboard.press("Home")
    expect(page.locator("#detail")).to_contain_text("Recovery point")
    oldest = page.locator("#answer").inner_text()
    assert int(newest[:4]) - int(oldest[:4]) >= 1
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#answer")).not_to_have_text(oldest)
    page.keyboard.press("End")
    for _ in range(14):
        page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#detail")).to_contain_text("at risk")
    page.emulate_media(color_scheme="dark")
    shot(page, "timeline-seconds-dark")
    assert band.get_attribute("aria-valuetext")


def test_a_time_before_everything_is_refused_by_name(page: Page) -> None:
    enter(page)
    page.get_by_role("link", name="db1").click()
    page.get_by_label("A time to go to").fill("2001-01-01 00:00")
    page.get_by_role("button", name="Go", exact=True).click()
    expect(page.locator("#detail")).to_contain_text("The oldest that can be recovered")
    expect(page.locator("form.do[data-action=boot] button")).to_be_disabled()


def test_every_page_is_there_and_phones_can_read_it(page: Page) -> None:
    enter(page)
    for name in ("Jobs", "Stores", "Policies", "Audit"):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        shot(page, name.lower())
    page.set_viewport_size({"width": 390, "height": 844})
    for path in ("/machines", "/jobs", "/stores", "/policies", "/audit"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.goto("/machines")
    page.get_by_role("link", name="web1").click()
    expect(page.locator("#answer")).not_to_have_text("Choose a moment")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "machine-phone")


def test_jobs_are_seen_as_they_go_on(page: Page, console: Console) -> None:
    """One that runs, one that failed, one that came later; without a reload, and on a phone."""
    row = next(r for r in console.keeper.rows() if r.name == "db1")
    jobs = console.keeper.jobs
    lost = jobs.submit(orders.restore(console.keeper, row, orders.Restore(at="ffff", to="lost"), "ann"))
    mapped = jobs.submit(orders.map_(console.keeper, row, orders.Which(at="latest"), "ann"))
    wait(lambda: jobs.get(lost.id).state is State.FAILED and jobs.answer(mapped.id))
    progress = jobs.folder(mapped.id) / "progress"
    progress.write_text(json.dumps({"what": "reading", "done_bytes": 3 * MiB, "total_bytes": 12 * MiB, "seconds": 9.0}))
    enter(page)
    page.goto("/jobs")
    runs = page.locator(f"[data-job='{mapped.id}']")
    expect(runs).to_contain_text("25 % of 12.0 MiB")
    failed = page.locator(f"[data-job='{lost.id}']")
    expect(failed).to_contain_text("ffff")
    shot(page, "jobs-running")
    progress.write_text(
        json.dumps({"what": "reading", "done_bytes": 9 * MiB, "total_bytes": 12 * MiB, "seconds": 20.0})
    )
    expect(runs).to_contain_text("75 % of 12.0 MiB")
    expect(page.locator("#newer")).to_be_hidden()
    later = jobs.submit(orders.drill(console.keeper, row, orders.Drill(), "ann"))
    expect(page.locator("#newer")).to_be_visible()
    shot(page, "jobs-newer")
    page.emulate_media(color_scheme="dark")
    shot(page, "jobs-dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "jobs-phone-dark")
    page.emulate_media(color_scheme="light")
    shot(page, "jobs-phone")
    jobs.cancel(mapped.id)
    expect(runs).to_contain_text("done")
    expect(runs.locator("progress")).to_have_count(0)
    page.set_viewport_size({"width": 1280, "height": 860})
    failed.get_by_role("link").click()
    expect(page.get_by_role("alert")).to_contain_text("ffff")
    page.wait_for_timeout(2500)  # news of jobs come each second
    expect(page.locator(".far")).to_be_empty()  # the reason is said once
    shot(page, "job-failed")
    wait(lambda: not jobs.get(later.id).state.is_open)


def test_who_may_less_sees_less(page: Page, console: Console) -> None:
    enter(page, "vic")
    expect(page.get_by_role("row").filter(has_text="db1")).to_be_visible()
    assert page.get_by_role("link", name="web1").count() == 0
    assert page.get_by_role("link", name="Audit").count() == 0
    page.get_by_role("link", name="db1").click()
    assert page.locator("form.do").count() == 0
    other = next(r.key for r in console.keeper.rows() if r.name == "web1")
    page.goto(f"/machines/{other}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not there")
    page.goto("/audit")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not allowed")


def test_a_person_comes_in_by_single_sign_on(page: Page, console: Console) -> None:
    """The browser comes back from another site: what keeps others out must let it in."""
    secret = console.world.folder / "client-secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    Accounts(console.keeper.places.configuration, console.keeper.clock).add_user(
        "sam", Role.VIEWER, [], None, totp=False
    )
    before = console.keeper.settings
    with provider_answering(Provider(console.address)) as provider:
        settings = ProviderSettings(
            issuer=provider.address, client=CLIENT, secret_file=str(secret), console=console.address, label="the house"
        )
        console.keeper.settings = replace(before, provider=settings)
        try:
            page.goto("/jobs")
            shot(page, "login-provider")
            page.get_by_role("link", name="Log in with the house").click()
            expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")
            expect(page.get_by_text("sam")).to_be_visible()
        finally:
            console.keeper.settings = before


def test_another_site_can_not_order_anything(page: Page, console: Console) -> None:
    """Neither with the session's cookie, nor with a form that lacks the session's word, nor from another origin."""
    enter(page)
    key = next(r.key for r in console.keeper.rows() if r.name == "db1")
    before = len(console.keeper.jobs.all())
    order = "action=backup&csrf="
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    cookies = {c["name"]: c for c in page.context.cookies()}
    cookie = cookies["__Host-hvbackup"]
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Strict")
    assert page.request.post(f"/machines/{key}", data=order, headers=headers).status == 403
    good = page.locator("input[name=csrf]").first.get_attribute("value")
    foreign = {**headers, "Origin": "https://evil.example"}
    assert page.request.post(f"/machines/{key}", data=order + str(good), headers=foreign).status == 403
    assert (
        page.request.post(
            f"/api/v1/machines/{key}/backup", data="{}", headers={"Content-Type": "application/json"}
        ).status
        == 403
    )
    assert len(console.keeper.jobs.all()) == before
    assert page.request.post(f"/machines/{key}", data=order + str(good), headers=headers, max_redirects=0).status == 303
    assert page.request.get("/login?to=https://evil.example").text().count("evil.example") == 0


def test_names_are_shown_and_never_run(page: Page, console: Console) -> None:
    enter(page)
    for evil in ('"><script>document.title="owned"</script>', "' onfocus=alert(1) autofocus='"):
        page.goto("/machines?q=" + evil)
        assert page.get_by_role("searchbox").input_value() == evil
        assert "owned" not in page.title()
    answer = page.request.get("/machines")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    page.get_by_role("button", name="Log out").click()
    page.goto("/machines")
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")

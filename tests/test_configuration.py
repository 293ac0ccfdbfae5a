"""The configuration: strict, every mistake at once with its file and nearest valid name; and which policy a machine gets."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from hvbackup import configuration
from hvbackup.configuration import Configuration, PolicySettings, Problems, load
from hvbackup.selection import Found, select

GOOD = """
[service]
listen = "0.0.0.0:8443"
[source.kvm1]
uri = "qemu:/run/vm/qmp.sock"
tags = ["prod"]
[policy.gold]
machines = ["web*"]
protect = true
rpo = "30s"
[notify.office]
kind = "mail"
server = "localhost:25"
sender = "hvbackup@example.org"
to = ["ops@example.org"]
"""


def configured(folder: Path, text: str, **more: str) -> Configuration:
    (folder / "conf.d").mkdir(exist_ok=True)
    (folder / "config.toml").write_text(text)
    for name, content in more.items():
        (folder / "conf.d" / f"{name}.toml").write_text(content)
    return load(folder)


def problems(folder: Path, text: str, **more: str) -> list[str]:
    with pytest.raises(Problems) as caught:
        configured(folder, text, **more)
    return caught.value.found


def test_without_any_file_the_defaults_hold(tmp_path: Path) -> None:
    assert list(load(tmp_path).stores) == ["main"]
    assert load(tmp_path).policies == {}


def test_files_add_tables_to_each_other(tmp_path: Path) -> None:
    found = configured(tmp_path, GOOD, b='[policy.rest]\nmachines = ["*"]\nschedule = "Mon..Fri 22:00"\n', a="")
    assert list(found.policies) == ["gold", "rest"]
    assert found.service.listen == "0.0.0.0:8443"


def test_what_is_shown_means_the_same_when_it_is_read(tmp_path: Path) -> None:
    found = configured(tmp_path, GOOD + '[machine."a b\\"c"]\nunprotected = true\n')
    for every in (True, False):
        again = tmp_path / f"again-{every}"
        again.mkdir()
        text = "\n".join(configuration.lines(found, every=every))
        assert tomllib.loads(text)
        assert configured(again, text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[polcy.x]\n", "there is no table [polcy] (did you mean policy?)"),
        ('[policy.x]\nmachines=["*"]\nschedle="daily"\n', "[policy.x] schedle: is unknown (did you mean schedule?)"),
        ('[policy.x]\nmachines=["*"]\nschedule="dayly"\n', "'dayly' is no schedule"),
        ('[policy.x]\nmachines="web1"\n', "[policy.x] machines: is a list of texts"),
        ('[policy.x]\nmachines=["*"]\nprotect="yes"\n', "[policy.x] protect: is true or false"),
        ('[policy.x]\nmachines=["*"]\nprotect=true\nschedule="daily"\n', "a protected machine gets its points by fold"),
        ('[policy.x]\nmachines=["*"]\nstore="man"\n[store.main]\n', "there is no [store.man] (did you mean main?)"),
        ('[policy.x]\nmachines=["*"]\n[store.a]\n[store.b]\n', "does not say which store; there are a, b"),
        ("[policy.x]\n", "names no machines"),
        ("[source.k]\n", "[source.k] has no uri"),
        ('[source.k]\nuri="a\\nb"\n', "on one line"),
        ('[notify.m]\nkind="mail"\nsender="a"\nto=["b"]\n', "[notify.m] has no server"),
        ('[provider]\nissuer="https://id"\nsecret_file="/s"\nconsole="https://c"\n', "[provider] has no client"),
        (
            '[provider]\nissuer="http://id"\nclient="a"\nsecret_file="/s"\nconsole="https://c"\n',
            "issuer is an address that begins with https://",
        ),
        (
            '[provider]\nissuer="https://id"\nclient="a"\nsecret_file="/s"\nconsole="https://c/"\n',
            "[provider] console ends without a slash",
        ),
        ('[notify.m]\nkind="pigeon"\n', "kind is mail, webhook or syslog"),
        ("[service]\njobs = 0\n", "[service] jobs: is a number from 1 to 1000"),
        ('[service]\ncertificate = "x"\n', "certificate and key belong together"),
        ("[service\n", "config.toml"),
        ("service = 3\n", "[service] is a table"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_was_meant(tmp_path: Path, text: str, said: str) -> None:
    [problem] = problems(tmp_path, text)
    assert said in problem


def test_all_mistakes_are_told_at_once_with_their_files(tmp_path: Path) -> None:
    found = problems(tmp_path, "[service]\nlisen='x'\n", x='[policy.a]\nmachines=["*"]\nrpo=5\n', y="[policy.a]\n")
    assert len(found) == 3
    assert "config.toml: [service] lisen" in found[0]
    assert "x.toml: [policy.a] rpo" in found[1]
    assert "y.toml: [policy.a] is in" in found[2]


WEB = Found("u1", "web1", "kvm1")


def policies(**words: list[str]) -> Configuration:
    return Configuration(
        policies={n: PolicySettings(machines=w, rpo=f"{i + 1}h") for i, (n, w) in enumerate(words.items())}
    )


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ({"a": ["*"], "b": ["web*"]}, "b"),
        ({"a": ["web*"], "b": ["source:kvm1"]}, "b"),
        ({"a": ["source:kvm1"], "b": ["web1"]}, "b"),
        ({"a": ["web*"], "b": ["id:u1"]}, "b"),
        ({"a": ["*", "!web*"]}, None),
        ({"a": ["db*"]}, None),
        ({}, None),
    ],
)
def test_the_policy_that_names_a_machine_most_closely_counts(words: dict[str, list[str]], policy: str | None) -> None:
    [chosen] = select(policies(**words), [WEB]).chosen
    assert chosen.policy == policy


def test_two_policies_that_name_a_machine_alike_protect_it_by_the_shorter_rpo_and_that_is_said() -> None:
    found = select(policies(slow=["web*"], also=["we*"]), [WEB])
    assert found.chosen[0].policy == "slow"
    [warning] = found.warnings
    assert "web1 is named alike by policies slow and also; slow protects it" in warning


def test_a_policy_that_matches_nothing_and_a_machine_found_twice_are_said() -> None:
    found = select(policies(a=["*"], b=["nosuch"]), [WEB, Found("u1", "web1", "kvm2")])
    assert "Policy b matches no machine" in found.warnings
    assert any("more than one source: kvm1, kvm2" in w for w in found.warnings)


def test_tags_come_from_source_and_machine(tmp_path: Path) -> None:
    text = '[source.k]\nuri="qemu:/x"\ntags=["prod"]\n[machine.web1]\ntags=["web"]\n[machine.db1]\nunprotected=true\n'
    more = '[policy.p]\nmachines=["tag:web"]\n'
    found = select(configured(tmp_path, text + more), [Found("u1", "web1", "k"), Found("u2", "db1", "k")])
    assert [c.policy for c in found.chosen] == ["p", None]
    assert found.chosen[0].machine.tags == ("prod", "web")
    assert found.chosen[1].unprotected_on_purpose

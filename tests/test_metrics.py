"""Metrics: what Prometheus reads, and the page that lists it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hvbackup import metrics
from hvbackup.metrics import MachineSample, ServiceSample, StoreSample

LINE = re.compile(r'[a-z_]+(\{[a-z]+="(\\.|[^"\\\n])*"(,[a-z]+="(\\.|[^"\\\n])*")*\})? -?\d+(\.\d+)?(e[-+]\d+)?')


def test_a_scrape() -> None:
    machines = [
        MachineSample("1", 'a "quoted"\nname\\', 3, 12.5, 60.0, recording=True, run_status=2),
        MachineSample("2", "db", 1, covered=False),
    ]
    stores = [StoreSample("main", {"packs": 7}, 10**13), StoreSample("off site", {"packs": 8}, damaged=2)]
    service = ServiceSample("1.0", alarms={"late": 1}, source_up={"kvm1": False})
    text = metrics.exposition(service, stores, machines)
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in samples), samples
    assert 'hvbackup_point_age_seconds{machine="a \\"quoted\\"\\nname\\\\",id="1"} 12.5' in samples
    assert 'hvbackup_recording{machine="a \\"quoted\\"\\nname\\\\",id="1"} 1' in samples
    assert 'hvbackup_covered{machine="db",id="2"} 0' in samples
    assert 'hvbackup_source_up{source="kvm1"} 0' in samples
    assert 'hvbackup_store_free_bytes{store="main"} 10000000000000' in samples
    assert 'hvbackup_store_bytes{store="off site",kind="packs"} 8' in samples
    assert 'hvbackup_damaged{store="off site"} 2' in samples
    assert not any(line.startswith("hvbackup_journal_lag") for line in text.splitlines())  # nobody knows it
    for name in {re.match("[a-z_]+", line)[0] for line in samples}:  # type: ignore[index]
        assert text.count(f"# TYPE {name} gauge") == text.count(f"# HELP {name} ") == 1


def test_the_page_lists_every_metric() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    assert sorted(re.findall(r"^\| `(hvbackup_\w+)", page, re.MULTILINE)) == sorted(metrics.names())


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    packaging = Path(__file__).parents[1] / "packaging"
    rules = (packaging / "prometheus-alerts.yml").read_text()
    used = set(re.findall(r"\bhvbackup_[a-z_]+", rules + (packaging / "grafana-dashboard.json").read_text()))
    assert used <= set(metrics.names())
    json.loads((packaging / "grafana-dashboard.json").read_text())
    assert len(re.findall(r"- alert: ", rules)) == len(set(re.findall(r"- alert: (\w+)", rules))) == 12

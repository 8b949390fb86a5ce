"""docs/deploy/: every metric that is asked for exists, and systemd takes the unit."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "docs" / "deploy"


def metrics_named(text: str) -> set[str]:
    return set(re.findall(r"hatespeech_[a-z_]+", text))


@pytest.fixture
def exposed(client) -> set[str]:
    client.post("/infer", data="some text")
    return metrics_named(client.get("/metrics").text)


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + [
        rule["expr"] for rule in rules
    ]


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(exposed):
    asked = set().union(*map(metrics_named, expressions()))
    # Ollama has failed nothing yet, so its errors have a name and no sample.
    assert {name.removesuffix("_total") for name in asked} <= {name.removesuffix("_total") for name in exposed}
    assert len(asked) == 6


def test_each_expression_has_its_brackets_closed():
    for expression in expressions():
        for opened, closed in ("()", "{}", "[]"):
            assert expression.count(opened) == expression.count(closed), expression


def test_prometheus_asks_with_a_key_where_the_metrics_are(client):
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] in {rule.rule for rule in client.application.url_map.iter_rules()}
    assert "credentials_file" in job["authorization"]


def test_systemd_takes_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    # Its user and its checkout are not on this machine.
    unit = (DEPLOY / "hatespeech.service").read_text().replace("/opt/hatespeech", str(ROOT))
    (tmp_path / "hatespeech.service").write_text(unit.replace("User=hatespeech", "User=root"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "hatespeech.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "hatespeech.service" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr

"""Several Ollama hosts, several app instances, one PostgreSQL: what dies is stood in for by what does not."""

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import yaml

from hatespeech import ollama, runs
from hatespeech.hosts import LEFT_OUT_S, Hosts
from hatespeech.ollama import BadAnswer, Ollama, OllamaError, TextTooLong, TooSlow
from hatespeech.serving.settings import Settings
from hatespeech.serving.store import ANSWERED, Store
from tests.conftest import ROOT, RUN, free_port, some_texts
from tests.serving.test_service import start  # noqa: F401  the fixture


class Server:
    """A server whose answers the test decides."""

    def __init__(self, url: str):
        self.url, self.model, self.error, self.asked = url, "m", None, 0
        self.release = threading.Event()
        self.release.set()

    def ask(self, text: str):
        self.asked += 1
        self.release.wait(5)
        if self.error:
            raise self.error
        return self.url


def test_the_least_busy_is_asked_and_one_that_fails_is_left_out_for_a_while(monkeypatch):
    a, b = Server("a"), Server("b")
    hosts = Hosts([a, b])
    a.release.clear()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(hosts.ask, "x")
        while not a.asked:
            time.sleep(0.01)
        assert [hosts.ask("x") for _ in range(3)] == ["b"] * 3
        a.release.set()
        assert slow.result() == "a"
    a.error = OllamaError("dead")
    assert [hosts.ask("x") for _ in range(4)] == ["b"] * 4  # the first tried a as well
    assert a.asked == 2
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LEFT_OUT_S + 1)
    a.error = None
    assert hosts.ask("x") == "a"


def test_where_none_answers_the_last_error_is_told():
    a, b = Server("a"), Server("b")
    a.error = b.error = OllamaError("dead")
    with pytest.raises(OllamaError, match="dead"):
        Hosts([a, b]).ask("x")
    assert (a.asked, b.asked) == (1, 1)


@pytest.mark.parametrize("error", [BadAnswer("an HTML page of a proxy"), OllamaError("status 500"), TooSlow("10 s")])
def test_an_answer_that_cannot_be_read_is_its_hosts_fault(error):
    a, b = Server("a"), Server("b")
    a.error = error
    hosts = Hosts([a, b])
    assert [hosts.ask("x") for _ in range(5)] == ["b"] * 5
    assert a.asked == 1  # however quickly it answers, it is left out for a while
    a.error = TextTooLong()  # which another would find as well
    with pytest.raises(TextTooLong):
        Hosts([a, b]).ask("x")


def test_a_dead_host_is_told_by_the_health_check(make_client, server, ollama_host):
    dead = f"127.0.0.1:{free_port()}"
    client = make_client("", OLLAMA_HOSTS=f"{dead}, {ollama_host}")
    assert client.post("/infer", data="I hope you all have a lovely day").text == "Supportive"
    health = client.get("/healthcheck", headers={"Accept": "application/json"}).get_json()
    assert health["ollama"][ollama.base_url(ollama_host)] == "OK"
    assert "can't be reached" in health["ollama"][ollama.base_url(dead)]


class Killable:
    """An Ollama of the test's own, with the shipped model, that can die and come back."""

    def __init__(self, folder, run):
        self.host, self.store = f"127.0.0.1:{free_port()}", folder
        self.start()
        ollama.create(self.host, runs.model_name(RUN), run)
        Ollama(self.host, runs.model_name(RUN), (), timeout_s=60).preload()

    def start(self) -> None:
        environment = os.environ | {"OLLAMA_HOST": self.host, "OLLAMA_MODELS": str(self.store)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["ollama", "serve"], env=environment, start_new_session=True, **quiet)
        for _ in range(200):
            try:
                return Ollama(self.host, "", ()).version()
            except OllamaError:
                time.sleep(0.1)
        raise AssertionError("ollama does not answer")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_two_apps_two_ollamas_one_postgresql_and_a_kill(start, run, database_url, tmp_path):  # noqa: F811
    """Of the requests under way when one Ollama is killed and after, none is lost; back, it is asked again."""
    if "postgresql" not in database_url:
        pytest.skip("several machines share a PostgreSQL, not a SQLite file")
    servers = [Killable(tmp_path / name, run) for name in "ab"]
    hosts = ",".join(server.host for server in servers)
    apps = [start(database_url, OLLAMA_HOSTS=hosts, OLLAMA_TIMEOUT_S="30") for _ in range(2)]
    texts, times, statuses, lock = some_texts(), [], Counter(), threading.Lock()
    end = time.monotonic() + 18

    def client(number: int) -> None:
        while time.monotonic() < end:
            answer = apps[number % 2].infer(texts[(number * 31 + len(times)) % len(texts)])
            with lock:
                times.append(time.monotonic())
                statuses[answer.status_code] += 1

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(client, number) for number in range(6)]
        time.sleep(6)
        killed_at = time.monotonic()
        servers[1].kill()
        time.sleep(6)
        back_at = time.monotonic()
        servers[1].start()
        for each in running:
            each.result()
    both = sum(time_ < killed_at for time_ in times) / 6
    one = sum(killed_at <= time_ < back_at for time_ in times) / (back_at - killed_at)
    print(f"{dict(statuses)}; {both:.1f} requests/s with both, {one:.1f} with one")
    assert set(statuses) == {200}
    assert one > 0.4 * both  # half the hosts on the same cores: no less than their share, but for chance
    health = requests.get(f"{apps[0].url}/healthcheck", headers={"Accept": "application/json"}, timeout=30).json()
    assert set(health["ollama"].values()) == {"OK"}
    rows = list(Store(database_url).answered())
    assert len(rows) == statuses[200]
    assert {row.status for row in rows} == {ANSWERED}
    servers[1].kill()
    servers[0].kill()


def test_the_compose_file_names_settings_and_models_that_exist():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(compose["app"]["environment"]) <= {name.upper() for name in Settings.model_fields}
    hosts = [host.partition(":")[0] for host in compose["app"]["environment"]["OLLAMA_HOSTS"].split(",")]
    assert all(host in compose for host in hosts)
    for model in (compose["model-1"], compose["model-2"]):
        assert model["entrypoint"][2] == runs.model_name(RUN)
        assert (ROOT / model["volumes"][0].partition(":")[0]) == RUN
    assert compose["proxy"]["ports"] == ["127.0.0.1:5000:80"]  # loopback, unless told otherwise

"""The page, through the real service. HTML is read by the standard library's parser."""

import csv
import io
import re
import time
from html import unescape
from html.parser import HTMLParser

import pytest

from hatespeech import task
from hatespeech.serving import pages
from hatespeech.serving.store import Store
from tests.serving.test_app import run_with

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} &amp; </textarea>"


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text of each kind of tag."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_text_is_classified_and_shown_with_how_sure_it_is(client):
    assert "log, with its text." in client.get("/").text
    empty = Page(client.get("/").text)
    assert [form["action"] for form in empty.all("form")] == ["/"]
    shown = Page(client.post("/", data={"text": "I hope you all have a lovely day"}).text)
    api = client.post("/infer", json={"text": "I hope you all have a lovely day"}).get_json()
    assert shown.texts["h2"] == api["label"] == "Supportive"
    assert shown.texts["textarea"] == "I hope you all have a lovely day"
    bars = [float(bar["width"].rstrip("%")) for bar in shown.all("rect")[:3]]
    assert bars == pytest.approx([100 * p for p in api["probabilities"].values()], abs=0.1)
    assert float(shown.all("circle")[0]["cx"].rstrip("%")) == pages.position(api["score"])
    assert "Needs a person" not in client.post("/", data={"text": "I hope you all have a lovely day"}).text
    assert "yes" in shown.texts["dd"]  # calibrated
    assert len(list(Store(f"sqlite:///{client.database}").answered())) == 3


@pytest.fixture
def try_with(make_client, ollama_host, server, run, tmp_path):
    """try_with(p_hate, setting, **changes): the page with a text's answer, under test_app.run_with's calibration."""

    def page_of(p_hate: float, setting: str = "", **changes) -> str:
        other = run_with(run, tmp_path, p_hate, **changes)
        client = make_client(ollama_host, MODEL_DIR=str(other), FLAG_ABOVE=setting)
        return client.post("/", data={"text": "some text"}).text

    return page_of


def test_an_unsure_answer_needs_a_person(try_with):
    assert "Needs a person:" in try_with(0.4, abstain_below=0.99)
    assert "Needs a person:" not in try_with(0.4, abstain_below=0.01)


def words(html: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


@pytest.mark.parametrize(
    ("p_hate", "flag", "curve", "row"),
    [
        (
            0.6,
            "Flagged: its probability of Hate reaches 50 %, the threshold.",
            "with a probability of Hate of at least 50 %, 70.0 % were Hate, and that finds 93.3 % of all Hate.",
            "50 %, this text 40 70.0 % 93.3 %",
        ),
        (
            0.2,
            "Not flagged: its probability of Hate is below 50 %, the threshold.",
            "with a probability of Hate of at least 5 %, 30.0 % were Hate, and that finds 100.0 % of all Hate.",
            "5 %, this text 100 30.0 % 100.0 %",
        ),
        (0.01, "Not flagged:", "Its probability of Hate is below 5 %, the lowest threshold that was measured.", None),
    ],
)
def test_a_text_is_shown_with_its_flag_and_its_place_on_the_curve(try_with, p_hate, flag, curve, row):
    html = try_with(p_hate)
    assert flag in words(html)
    assert curve in words(html)
    table = html[html.index("<details") : html.index("</details>")]
    rows = re.findall(r"<tr ([^>]*)>(.*?)</tr>", table, re.DOTALL)
    marked = [words(cells) for attributes, cells in rows if "aria-current" in attributes]
    assert len(rows) == 3
    assert marked == ([row] if row else [])
    assert table.count("this text") == len(marked)
    assert not [tag for tag, attributes in Page(html).tags if tag in ("script", "style") or "style" in attributes]


def test_the_setting_decides_on_the_page_as_well(try_with):
    shown = words(try_with(0.6, setting="0.725"))
    assert "Not flagged: its probability of Hate is below 72.5 %, the threshold." in shown


def test_a_calibration_may_have_found_no_threshold_to_flag_from(try_with):
    shown = words(try_with(0.6, flag_above=None))
    assert "Not judged for a flag: no threshold is set, and the calibration found none to propose." in shown
    assert "All thresholds" in shown


@pytest.mark.parametrize("changes", [{"thresholds": []}, {"model_sha256": "0" * 64}])
def test_without_a_curve_that_applies_none_is_shown(try_with, changes):
    html = try_with(0.6, flag_above=None, **changes)
    assert "<details" not in html
    assert "validation comments" not in html
    assert "for a flag" not in html


def test_an_answer_is_corrected_in_one_click(client):
    shown = Page(client.post("/", data={"text": "some text"}).text)
    request_id = next(field["value"] for field in shown.all("input") if field["name"] == "id")
    said = client.post("/correct", data={"id": request_id, "label": "Neutral"})
    assert said.status_code == 303
    assert "kept as Neutral" in client.get(said.location).text
    ((asked, newest),) = Store(f"sqlite:///{client.database}").newest_feedback()
    assert (asked.id, newest.label) == (request_id, "Neutral")
    assert client.post("/correct", data={"id": request_id, "label": "Nice"}).status_code == 400
    assert client.post("/correct", data={"id": "none", "label": "Hate"}).status_code == 404


def test_user_text_is_never_markup(client):
    html = client.post("/", data={"text": HOSTILE}).text
    shown = Page(html)
    assert shown.texts["textarea"] == HOSTILE
    assert not shown.all("script") + shown.all("img")
    assert "{{ 7 * 7 }}" in html
    assert HOSTILE not in client.get("/", query_string={"kept": HOSTILE}).text


def test_a_strict_policy_and_nothing_inline(client):
    for response in (
        client.get("/"),
        client.post("/", data={"text": "some text"}),
        client.post("/", data={"text": ""}),
    ):
        assert response.headers["Content-Security-Policy"] == pages.CONTENT_SECURITY_POLICY
        assert not [
            tag for tag, attributes in Page(response.text).tags if tag in ("script", "style") or "style" in attributes
        ]
    sheet = client.get("/static/style.css")
    assert (sheet.status_code, sheet.mimetype) == (200, "text/css")
    assert "url(" not in sheet.text  # nothing from elsewhere


def test_errors_are_pages(client):
    empty = client.post("/", data={"text": " "})
    assert (empty.status_code, empty.mimetype) == (400, "text/html")
    assert "there is no text" in Page(empty.text).texts["p"]
    assert client.get("/nowhere").mimetype == "application/problem+json"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 200),
        ({"Origin": "http://localhost"}, 200),
    ],
)
def test_forms_of_other_sites_are_refused(client, headers, status):
    assert client.post("/", data={"text": "some text"}, headers=headers).status_code == status


def test_off_loopback_the_browser_asks_for_the_key(make_client, ollama_host, server):
    client = make_client(ollama_host)
    key = Store(f"sqlite:///{client.database}").create_key("person", ["infer"])
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    asked = client.get("/", environ_overrides=elsewhere)
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic ")
    assert client.get("/", environ_overrides=elsewhere, auth=("anyone", "wrong")).status_code == 401
    assert client.get("/", environ_overrides=elsewhere, auth=("anyone", key)).status_code == 200


def test_hostile_texts_stay_text_on_every_page(client):
    for _ in range(2):
        client.post("/infer", data=HOSTILE)
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for path in ("/report", "/review?decided=all"):
        shown = client.get(path).text
        assert escaped in shown
        assert "<script>alert" not in shown
        assert "<img" not in shown
    shown = client.get("/review", query_string={"words": HOSTILE, "decided": "all"})
    assert Page(shown.text).texts["p"].count("1 to see") == 0  # the words are in it, and both texts are found
    assert "2 to see" in shown.text
    assert "script-src 'self'" in shown.headers["Content-Security-Policy"]
    assert "unsafe" not in shown.headers["Content-Security-Policy"]
    exported = client.get("/review.csv", query_string={"words": "alert", "decided": "all"}).text
    assert len(list(csv.DictReader(io.StringIO(exported)))) == 2


def test_a_file_is_finished_when_ollama_is_back(make_client, stand_in, server, ollama_host, tmp_path):
    """Ollama is away after the service came up; with the next process, where it is back, the file is finished."""
    folder = {"UPLOADS_DIR": str(tmp_path / "files")}
    stand_in.status = 500
    broken = make_client(stand_in.host, **folder)
    sent = {"file": (io.BytesIO(b"text\nthank you\nsome text\n"), "my file.csv")}
    place = broken.post("/file", data=sent).location
    assert broken.post("/file", data={"file": (io.BytesIO(b"x"), "x.exe")}).status_code == 400
    empty = broken.post("/file", data={"file": (io.BytesIO(b""), "x.csv")}).location
    assert "x.csv: is empty, without a header" in broken.get(empty).text
    assert broken.post(place, data={"column": "no such"}).status_code == 400
    broken.post(place, data={"column": "text"})
    stopped = wait(broken, place)
    assert "Stopped: " in broken.get(place).text
    assert stopped["error"]
    assert not stopped["finished"]
    assert broken.get(f"{place}/download").status_code == 404

    client = make_client(ollama_host, **folder)
    assert "my file.csv" in client.get("/file").text
    client.post(place, data={"column": "text"})
    assert wait(client, place)["finished"]
    assert client.post(place, data={"column": "text"}).status_code == 409
    rows = list(csv.DictReader(io.StringIO(client.get(f"{place}/download").text)))
    assert [row["text"] for row in rows] == ["thank you", "some text"]
    assert all(row["label"] for row in rows)
    for each in (place, empty):
        client.post(each, data={"action": "delete"})
    assert list((tmp_path / "files").iterdir()) == []
    assert client.get(place).status_code == 404


def test_a_file_is_read_as_its_sender_says(client):
    """One of Latin-1 with a semicolon between fields, which is asked for what can't be found out."""
    sent = "id;text;pr\u00e9nom\n1;such a day, isn't it;Ren\u00e9e\n".encode("latin-1")
    place = client.post("/file", data={"file": (io.BytesIO(sent), "rows.csv")}).location
    asked = client.get(place).text
    assert "rows.csv, line 1: not UTF-8 (byte 10), but perhaps" in asked
    assert "name its encoding" in asked
    assert '<select id="column"' not in asked
    assert "rows.csv" in client.get("/file").text  # it harms no other page
    client.post(place, data={"action": "read", "encoding": "latin-1", "delimiter": "", "prefix": "model_"})
    asked = client.get(place).text
    assert "Read as CSV, semicolon between fields, ISO8859-1" in asked
    assert "pr\u00e9nom" in asked
    client.post(place, data={"column": "text", "encoding": "latin-1", "delimiter": "", "prefix": "model_"})
    assert wait(client, place)["finished"]
    (row,) = csv.DictReader(io.StringIO(client.get(f"{place}/download").data.decode("latin-1")), delimiter=";")
    assert (row["text"], row["pr\u00e9nom"]) == ("such a day, isn't it", "Ren\u00e9e")
    assert row["model_label"] in task.LABELS


def test_what_is_no_table_is_told_before_anything_is_asked(client):
    sent = io.BytesIO(b'id,text\n1,a\n2,"he said hi\n3,b\n')
    place = client.post("/file", data={"file": (sent, "rows.csv")}).location
    refused = client.post(place, data={"column": "text"})
    assert refused.status_code == 400
    assert "rows.csv, line 3: a quote that opens in this row is not closed" in unescape(refused.text)
    assert not list(Store(f"sqlite:///{client.database}").answered())


def wait(client, place: str) -> dict:
    for _ in range(300):
        state = client.get(f"{place}/state").get_json()
        if not state["running"]:
            return state
        time.sleep(0.1)
    raise AssertionError(state)

"""Who may use which route: every route of the app's own URL map, with every kind of key, from everywhere."""

import io
import itertools
import re

import pytest

from app import create_app
from hatespeech import UserError
from hatespeech.serving import auth
from hatespeech.serving.store import Store
from tests.conftest import ROOT, RUN

TABLE_ROW = re.compile(r"^\| `([A-Z]+) (\S+)` \| ([a-z, ]+) \|$", re.MULTILINE)
# What docs/SECURITY.md promises: (method, rule) -> scopes.
DOCUMENTED = {
    (method, rule): set(scopes.split(", ")) - {"none"}
    for method, rule, scopes in TABLE_ROW.findall((ROOT / "docs" / "SECURITY.md").read_text())
}
KEYS = (None, "wrong", "infer", "read", "review")
ELSEWHERE = {"environ_overrides": {"REMOTE_ADDR": "192.0.2.7"}}
HEADERS = (
    *("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Anything"),
    *("x-forwarded-port", "X-Forwarded", "X-Real-IP", "Via", "CF-Connecting-IP", "True-Client-IP", "Cf-Ray"),
    *("Client-IP", "Forwarded-For", "X-Remote-Addr", "X-Original-URL", "X-Envoy-Attempt-Count", "Tailscale-User-Login"),
)
FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:5000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "192.0.2.1",
    "",
)
FOREIGN_ORIGINS = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:8080"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


class Site:
    """The app with one key of each scope. No Ollama: whoever is let in gets 200, 4xx or 503, but not 401 or 403."""

    def __init__(self, folder, **config):
        database = f"sqlite:///{folder}/requests.sqlite3"
        store = Store(database)
        self.keys = {scope: store.create_key(scope, [scope]) for scope in auth.SCOPES} | {"wrong": "wrong", None: None}
        settings = {"MODEL_DIR": str(RUN), "OLLAMA_HOST": "127.0.0.1:1", "DATABASE_URL": database}
        self.app = create_app(settings | {"UPLOADS_DIR": str(folder / "files")} | config)
        self.client = self.app.test_client()

    def status(self, method: str, rule: str, key: str | None = None, headers: dict | None = None, **more) -> int:
        headers = dict(headers or {})
        if self.keys[key]:
            headers["Authorization"] = f"Bearer {self.keys[key]}"
        path = rule.replace("<name>", "0" * 32).replace("<path:filename>", "style.css")
        return self.client.open(path, method=method, headers=headers, **more).status_code


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module", params=[{"HOST": "0.0.0.0"}, {"REQUIRE_API_KEY": "1"}, {"TRUSTED_PROXIES": "1"}])
def open_site(request, tmp_path_factory):
    """A service that others can reach, in each of the ways there are."""
    return Site(tmp_path_factory.mktemp("open"), **request.param)


def routes(site: Site) -> set[tuple[str, str]]:
    rules = site.app.url_map.iter_rules()
    return {(method, rule.rule) for rule in rules for method in rule.methods - {"HEAD", "OPTIONS"}}


def by_key(key: str | None, scopes: set[str]) -> int | None:
    """The refusal that a key gets where one is demanded; None where it is let in."""
    if not scopes or key in scopes:
        return None
    return 401 if key in (None, "wrong") else 403


def check(site: Site, refusal, **request) -> None:
    """Ask every route with every key. refusal(method, key, scopes): the status expected, or None if it is let in."""
    wrong = []
    for (method, rule), key in itertools.product(DOCUMENTED, KEYS):
        expected, found = refusal(method, key, DOCUMENTED[method, rule]), site.status(method, rule, key, **request)
        if found != expected if expected else found in (401, 403):
            wrong.append((method, rule, key, found, expected))
    assert not wrong


def test_the_documented_routes_are_all_the_app_has(site):
    assert routes(site) == set(DOCUMENTED)


def test_a_route_that_nobody_said_who_may_use_is_refused_at_start(tmp_path):
    app = Site(tmp_path).app
    app.url_map.add(app.url_rule_class("/new", endpoint="new"))
    with pytest.raises(KeyError, match="new"):
        auth.require_scopes(app)


def test_here_no_key_is_needed_but_a_key_of_ours_needs_its_scope(site):
    check(site, lambda method, key, scopes: None if key in (None, "wrong") else by_key(key, scopes))


def test_elsewhere_a_key_with_the_scope_is_demanded(site):
    check(site, lambda method, key, scopes: by_key(key, scopes), **ELSEWHERE)


@pytest.mark.parametrize("header", HEADERS)
def test_behind_a_proxy_on_this_machine_a_key_is_demanded(site, header):
    check(site, lambda method, key, scopes: by_key(key, scopes), headers={header: "127.0.0.1"})


def test_a_service_that_others_can_reach_demands_keys_of_all(open_site):
    check(open_site, lambda method, key, scopes: by_key(key, scopes))


@pytest.mark.parametrize("forged", ["127.0.0.1", "::1", "localhost"])
def test_an_address_in_a_header_makes_nobody_local(open_site, forged):
    headers = {"X-Forwarded-For": forged, "X-Forwarded-Host": "localhost", "Host": "localhost"}
    check(open_site, lambda method, key, scopes: by_key(key, scopes), headers=headers, **ELSEWHERE)


def test_the_bound_address_counts_whatever_host_says(site):
    """gunicorn --bind 0.0.0.0, with HOST unset and a proxy that adds no header."""
    here = {"environ_overrides": {"SERVER_NAME": "0.0.0.0"}}
    check(site, lambda method, key, scopes: by_key(key, scopes), **here)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_not_answered_where_no_key_is_demanded(site, host):
    """But to who has a key, which a page of another site can't have."""

    def refusal(method, key, scopes):
        return 403 if key in (None, "wrong") else by_key(key, scopes)

    check(site, refusal, headers={"Host": host})


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1", "127.8.9.10:80", "[::1]:5000", "mods.example.org"])
def test_loopback_names_and_trusted_hosts_are_answered(tmp_path, host):
    site = Site(tmp_path, TRUSTED_HOSTS="other.example, .example.org")
    check(
        site,
        lambda method, key, scopes: None if key in (None, "wrong") else by_key(key, scopes),
        headers={"Host": host},
    )


@pytest.mark.parametrize("headers", FOREIGN_ORIGINS, ids=str)
def test_no_page_of_another_site_can_change_anything(site, open_site, headers):
    timed = "Sec-Fetch-Site" in headers  # what it can't read it could still time

    def refusal(method, key, scopes):
        return 403 if method == "POST" or (timed and scopes) else by_key(key, scopes)

    check(open_site, refusal, headers=headers)
    check(site, refusal, headers=headers, **ELSEWHERE)
    assert {site.status(method, rule, headers=headers) for method, rule in DOCUMENTED if method == "POST"} == {403}


def test_a_link_on_another_site_may_be_followed(site):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert site.status("GET", "/report", headers=link) == 200
    assert site.status("GET", "/report", headers=link | {"Sec-Fetch-Dest": "iframe"}) == 403
    assert site.status("POST", "/review", headers=link) == 403


def test_pages_of_an_allowed_origin_may_call_the_api_and_nothing_else(tmp_path):
    site = Site(tmp_path, REQUIRE_API_KEY="1", CORS_ORIGINS="https://www.example.org, http://localhost:3000")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin in ("https://www.example.org", "http://localhost:3000"):
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        for method, rule in DOCUMENTED:
            before = site.client.open(rule, method="OPTIONS", headers=headers | asks)
            allowed = before.headers.get("Access-Control-Allow-Origin")
            status = site.status(method, rule, "infer", headers)
            if method == "POST" and rule.startswith(("/infer", "/feedback", "/v1")):
                assert (before.status_code, allowed) == (200, origin), rule
                assert status not in (401, 403), rule
                assert site.status(method, rule, None, headers) == 401, rule
            else:
                assert allowed is None, rule
                assert status == 403 or not DOCUMENTED[method, rule], rule


def test_an_allowed_page_does_not_borrow_the_key_that_the_browser_keeps(tmp_path):
    site = Site(tmp_path, REQUIRE_API_KEY="1", CORS_ORIGINS="http://[::1]:3000")
    headers = {"Origin": "http://[::1]:3000", "Sec-Fetch-Site": "cross-site"}
    kept = {"auth": ("anyone", site.keys["review"])}
    assert site.client.post("/feedback", json={}, headers=headers, **kept).status_code == 401
    assert site.client.post("/feedback", json={}, **kept).status_code == 400
    own = headers | {"Authorization": f"Bearer {site.keys['review']}"}
    sent = site.client.post("/feedback", json={}, headers=own)
    assert (sent.status_code, sent.headers["Access-Control-Allow-Origin"]) == (400, "http://[::1]:3000")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://www.example.org.evil.example", "http://www.example.org", "null", ""]
)
def test_pages_of_other_origins_may_not(tmp_path, origin):
    site = Site(tmp_path, REQUIRE_API_KEY="1", CORS_ORIGINS="https://www.example.org")
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    before = site.client.options("/v1alpha1/comments:analyze", headers=headers)
    assert "Access-Control-Allow-Origin" not in before.headers
    sent = site.client.post("/infer", data="some words", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert (sent.status_code, sent.headers.get("Access-Control-Allow-Origin")) == (403, None)


@pytest.mark.parametrize("origin", ["http://[", "null", "file://", "http://"])
def test_an_origin_that_is_none_is_another_site(site, origin):
    for host in ("localhost", "my_host:5000"):
        headers = {"Origin": origin, "Host": host}
        assert site.status("POST", "/infer", "infer", headers) == 403


def test_the_host_is_compared_as_it_was_sent(open_site):
    for host, origin in (("my_host:5000", "http://my_host:5000"), ("LOCALHOST:5000", "http://localhost:5000")):
        assert open_site.status("POST", "/infer", "infer", {"Host": host, "Origin": origin}) not in (401, 403)


def test_http_1_0_is_how_nginx_passes_on_what_others_asked(site):
    passed_on = {"environ_overrides": {"SERVER_PROTOCOL": "HTTP/1.0"}}
    check(site, lambda method, key, scopes: by_key(key, scopes), **passed_on)


def test_a_bearer_token_may_be_spelled_in_lower_case(open_site):
    sent = open_site.client.get("/metrics", headers={"Authorization": f"bearer {open_site.keys['read']}"})
    assert sent.status_code == 200


def test_a_new_key_of_an_old_name_sees_no_old_file(tmp_path):
    site = Site(tmp_path, REQUIRE_API_KEY="1")
    own = {"Authorization": f"Bearer {site.keys['infer']}"}
    sent = {"file": (io.BytesIO(b"text\nsome words\n"), "mine.csv")}
    place = site.client.post("/file", data=sent, headers=own).location
    new = site.app.extensions["hatespeech"].store.create_key("infer", ["infer"])
    assert site.client.get(place, headers={"Authorization": f"Bearer {new}"}).status_code == 404


@pytest.mark.parametrize(
    "body", [b"\xff\xfe\x00\x01,a\n1,2\n", b'"' + b"a" * 200_000 + b'"\n1\n', b"", b"n\xe4me\n1\n"]
)
@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_broken_upload_harms_nobody(tmp_path, body, name):
    site = Site(tmp_path)
    place = site.client.post("/file", data={"file": (io.BytesIO(body), name)}).location
    assert site.client.get("/file").status_code == 200
    asked = site.client.get(place)
    assert (asked.status_code, name in asked.text) == (200, True)
    assert site.client.post(place, data={"column": "text"}).status_code == 400
    assert site.client.post(place, data={"action": "delete"}).status_code == 303
    assert not list((tmp_path / "files").iterdir())


def test_a_file_is_for_the_key_it_was_sent_with(tmp_path):
    site = Site(tmp_path, REQUIRE_API_KEY="1")
    other = site.app.extensions["hatespeech"].store.create_key("other", ["infer", "read", "review"])
    file = tmp_path / "mine.csv"
    file.write_text("text\nsome words\n")
    theirs, own = {"Authorization": f"Bearer {other}"}, {"Authorization": f"Bearer {site.keys['infer']}"}
    with file.open("rb") as sent:
        place = site.client.post("/file", data={"file": (sent, file.name)}, headers=own).location
    assert "mine.csv" in site.client.get("/file", headers=own).text
    assert "mine.csv" not in site.client.get("/file", headers=theirs).text
    for path in (place, f"{place}/state", f"{place}/download"):
        assert site.client.get(path, headers=theirs).status_code == 404
    assert site.client.post(place, data={"action": "delete"}, headers=theirs).status_code == 404
    assert site.client.get(place, headers=own).status_code == 200
    assert site.client.post(place, data={"action": "delete"}, headers=own).status_code == 303


def test_a_trusted_proxys_client_is_seen_and_needs_a_key(tmp_path):
    site = Site(tmp_path, TRUSTED_PROXIES="1")
    headers = {
        "X-Forwarded-For": "127.0.0.1, 198.51.100.4",
        "X-Forwarded-Host": "mods.example",
        "X-Forwarded-Proto": "https",
    }
    with site.client:
        assert site.client.get("/$discovery/rest", headers=headers).get_json()["rootUrl"] == "https://mods.example/"
    assert site.status("POST", "/infer", None, headers) == 401


@pytest.mark.parametrize("setting", ["-1", "one", "1.5", "17"])
def test_a_number_of_proxies_that_makes_no_sense_is_refused_by_name(tmp_path, setting):
    with pytest.raises(UserError, match="TRUSTED_PROXIES"):
        Site(tmp_path, TRUSTED_PROXIES=setting)


@pytest.mark.parametrize("setting", ["HOST", "REQUIRE_API_KEY", "TRUSTED_PROXIES"])
def test_it_does_not_start_open_to_others_without_a_key(tmp_path, setting):
    settings = {"MODEL_DIR": str(RUN), "DATABASE_URL": f"sqlite:///{tmp_path}/requests.sqlite3"}
    with pytest.raises(UserError, match=r"there is no API key yet.*keys create"):
        create_app(settings | {setting: "0.0.0.0" if setting == "HOST" else "1"})

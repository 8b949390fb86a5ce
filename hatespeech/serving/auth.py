"""Who may do what. Every request passes admit() before its route: the name it was sent to, where it was sent from, and
the key with the scope that the route demands (docs/SECURITY.md).

Without a key only this machine is served, and only as long as nobody else can speak through it: the service listens on
loopback alone, the connection comes from loopback, and no proxy says that it brought somebody else's request.
"""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from flask import Flask, g, request
from flask_cors import CORS
from werkzeug.exceptions import Forbidden, Unauthorized
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.sansio.utils import host_is_trusted

from hatespeech import UserError
from hatespeech.serving.settings import Settings
from hatespeech.serving.store import ApiKey, Store

# infer: classify texts and files, and correct the answers. read: figures and logged texts. review: decide on them.
SCOPES = ("infer", "read", "review")
OPEN = ()
# Which scopes let a key in, any of them, by endpoint. A route that is not here is refused at start.
SCOPES_OF = {
    "api.infer": ("infer",),
    "api.infer_batch": ("infer",),
    "perspective.analyze": ("infer",),
    "perspective.suggest_score": ("infer",),
    "api.feedback": ("infer", "review"),
    "api.metrics": ("read",),
    "api.report": ("read",),
    "api.healthcheck": OPEN,
    "moderations.moderate": ("infer",),
    "perspective.discovery": OPEN,
    "api.specification": OPEN,
    "pages.static": OPEN,
    "pages.start": ("infer",),
    "pages.answer": ("infer",),
    "pages.correct": ("infer", "review"),
    "pages.report": ("read",),
    "pages.review": ("read", "review"),
    "pages.export": ("read", "review"),
    "pages.decide": ("review",),
    "pages.file": ("infer",),
    "pages.upload": ("infer",),
    "pages.one_file": ("infer",),
    "pages.file_state": ("infer",),
    "pages.start_file": ("infer",),
    "pages.download": ("infer",),
}
# What proxies add to a request that they pass on: any of these headers says that one did.
FORWARDING_HEADER = re.compile(
    r"forwarded(-for)?|x-forwarded.*|via|cdn-loop|(.*-)?client-ip|x-(real|remote|proxyuser)-(ip|addr)|x-scheme|x-host"
    r"|x-(original|rewrite|envoy|azure|amzn|arr|appengine|vercel|nf)-.*|(cf|fly|tailscale)-.*",
    re.IGNORECASE,
)
# What pages of the origins in CORS_ORIGINS may call: the API, to classify and to correct.
FOR_OTHER_PAGES = {name for name, scopes in SCOPES_OF.items() if "infer" in scopes and not name.startswith("pages.")}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def register(app: Flask, store: Store, settings: Settings, serves: bool = True) -> None:
    """Check every request of the app. Raises UserError where it is open to others while there is no key."""
    n_proxies = settings.trusted_proxies
    if n_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=n_proxies, x_proto=n_proxies, x_host=n_proxies)
    keys_demanded = demands_keys(settings)
    if serves and keys_demanded and not store.api_keys():
        opening = {"TRUSTED_PROXIES": n_proxies, "REQUIRE_API_KEY": settings.require_api_key}
        cause = next((name for name, value in opening.items() if value), f"HOST={settings.host}")
        raise UserError(
            f"{cause} opens the service to others, and there is no API key yet. "
            "Make one: hatespeech keys create NAME --scopes infer,read,review"
        )

    CORS(
        app,
        resources=[r"/infer.*", r"/feedback", r"/v1.*"],
        origins=[re.compile(re.escape(origin) + r"\Z") for origin in settings.allowed_origins],
        allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        expose_headers=["X-Answer-Id", "X-Request-Id", "X-Truncated-To", "Retry-After"],
        max_age=600,
        always_send=False,
    )

    @app.before_request
    def admit() -> None:
        welcome = request.endpoint in FOR_OTHER_PAGES and request.headers.get("Origin", "") in settings.allowed_origins
        if welcome and request.method == "OPTIONS":
            return  # a browser asks whether it may ask; it sends no key with that
        scopes = SCOPES_OF.get(request.endpoint, OPEN)
        strange = not keys_demanded and not is_one_of_our_names(settings.trusted_names)
        # Where no key can matter, on a route that is open to all, the database is not asked for one.
        offered = key_offered(welcome) if scopes or strange or request.endpoint == "api.healthcheck" else ""
        entry = store.key_named(offered) if offered else None
        if strange and entry is None:
            raise Forbidden("this service has no such name: TRUSTED_HOSTS lists those it has besides localhost")
        if not welcome and not is_same_origin(changes=request.method not in SAFE_METHODS, opens=not scopes):
            raise Forbidden("this request was sent by a page of another site")
        g.is_known = entry is not None or (not keys_demanded and is_local())
        if scopes:
            authorise(entry, scopes)

    def authorise(entry: ApiKey | None, scopes: tuple[str, ...]) -> None:
        if entry is None:
            # Here, the key of another service does no harm.
            if not keys_demanded and is_local():
                return
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY", www_authenticate=None)
        if not set(scopes) & set(entry.scopes.split()):
            raise Forbidden(f"the key {entry.name} lacks the scope {' or '.join(scopes)}")
        g.api_key, g.api_key_id = entry.name, entry.sha256


def demands_keys(settings: Settings) -> bool:
    """Whether others can reach the service, so that nobody is served without a key."""
    return bool(settings.trusted_proxies or settings.require_api_key or not is_loopback(settings.host))


def require_scopes(app: Flask) -> None:
    """Call it when all routes are there. Raises KeyError for one that nobody said who may use."""
    missing = sorted({rule.endpoint for rule in app.url_map.iter_rules()} - SCOPES_OF.keys())
    if missing:
        raise KeyError(f"auth.SCOPES_OF lacks {', '.join(missing)}")


def key_offered(of_another_page: bool = False) -> str:
    """The key that came with the request: a bearer token, a browser's password, or `?key=` as Google's clients send.

    of_another_page: a browser adds the password that it keeps for this service to whatever a page sends; such a page
    has to send a key of its own.
    """
    sent = request.authorization
    if sent and sent.type == "basic" and not of_another_page:
        return sent.password or ""
    if sent and sent.type == "bearer":
        return sent.token or ""
    return request.args.get("key", "")


def is_local() -> bool:
    """Whether the request was made on this machine, for this machine: SERVER_NAME is the address that was bound.

    nginx, as it comes, passes requests on as HTTP/1.0 and without a word of whom they are from.
    """
    forwarded = any(FORWARDING_HEADER.fullmatch(name) for name, _ in request.headers)
    forwarded = forwarded or request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
    return not forwarded and is_loopback(request.remote_addr or "") and is_loopback(request.environ["SERVER_NAME"])


def is_same_origin(changes: bool, opens: bool) -> bool:
    """No other site sent this request. A browser says so in Sec-Fetch-Site or Origin; what is no browser needs neither.

    changes: whether the request changes something. One that only reads may come from elsewhere where a person follows a
    link, or where the route is open to all; a page that embeds it could not read the answer, but could time it.
    https://developer.mozilla.org/en-US/docs/Web/HTTP/Headers/Sec-Fetch-Site
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site:
        link = (request.headers.get("Sec-Fetch-Mode"), request.headers.get("Sec-Fetch-Dest")) == (
            "navigate",
            "document",
        )
        return site in ("same-origin", "none") or (not changes and (opens or link))
    if origin is None or not changes:
        return True
    try:
        sender = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    return bool(sender) and sender == host_header()


def host_header() -> str:
    """As it was sent, in lower case; request.host is empty for names that werkzeug takes for none."""
    return request.headers.get("Host", "").lower()


def is_one_of_our_names(trusted_hosts: list[str]) -> bool:
    """Whether the Host header is a loopback name, or among TRUSTED_HOSTS (werkzeug takes an empty list for all)."""
    try:
        name = urlsplit(f"//{host_header()}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) or bool(trusted_hosts and host_is_trusted(host_header(), trusted_hosts))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False

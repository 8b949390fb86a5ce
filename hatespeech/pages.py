"""The page for people: try a text, see how sure the answer is, correct it. HTML from here, without scripts.

Routes: GET / the form, POST / the answer, POST /correct feedback on it. What a request goes through is the API's.
"""

from collections.abc import Callable
from urllib.parse import urlsplit

from flask import Blueprint, Flask, Response, g, redirect, render_template, request, url_for
from werkzeug.exceptions import BadRequest, Forbidden, NotFound

from hatespeech import task
from hatespeech.service import Answer, Service
from hatespeech.store import Store

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# The part of MHS's scale that is drawn; a score beyond is drawn at its end.
SCALE = (-4.0, 3.0)


def register(
    app: Flask, service: Service, store: Store, authorise: Callable[[str], None], classified: Callable[[bytes], Answer]
) -> None:
    """Add the pages. authorise(scope) and classified(body) are the API's own."""
    pages = Blueprint("pages", __name__, template_folder="templates", static_folder="static", static_url_path="/static")

    @pages.before_request
    def only_from_here() -> None:
        if request.endpoint != "pages.static":
            authorise("infer")
        if request.method == "POST" and not is_same_origin():
            raise Forbidden("this form was sent from another site")

    @pages.get("/")
    def start() -> str:
        return page(kept=request.args.get("kept", ""))

    @pages.post("/")
    def answer() -> str:
        text = request.form.get("text", "")
        return page(text=text, answer=classified(text.encode("utf-8", "surrogatepass")))

    @pages.post("/correct")
    def correct() -> Response:
        label = request.form.get("label")
        if label not in task.LABELS:
            raise BadRequest(f"a label is {', '.join(task.LABELS)}")
        if not store.add_feedback(request.form.get("id", ""), label, None, None, g.api_key):
            raise NotFound("no request has this id")
        return redirect(url_for("pages.start", kept=label), 303)

    def page(**shown) -> str:
        """The page, with an answer or without."""
        return render_template("try.html", labels=task.LABELS, position=position, cuts=CUTS, **shown)

    @pages.app_context_processor
    def about() -> dict:
        return {"model": service.ollama.model, "prompt_version": task.PROMPT_VERSION, "log_text": store.log_text}

    app.register_blueprint(pages)


def position(score: float) -> float:
    """Where a score stands on the drawn scale, in percent."""
    low, high = SCALE
    return round(100 * (min(max(score, low), high) - low) / (high - low), 1)


CUTS = (("Supportive", task.SUPPORTIVE_BELOW), ("Hate", task.HATE_ABOVE))


def is_same_origin() -> bool:
    """No other site sent this form. A browser says so in Sec-Fetch-Site or Origin; what is no browser needs neither.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Headers/Sec-Fetch-Site
    """
    if site := request.headers.get("Sec-Fetch-Site"):
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.host


def error(status: int, reason: str, headers: dict) -> Response:
    """An error, as a page says it."""
    if status == 401:
        headers = headers | {"WWW-Authenticate": 'Basic realm="hatespeech: the API key is the password"'}
    return Response(render_template("error.html", status=status, reason=reason), status, headers, mimetype="text/html")

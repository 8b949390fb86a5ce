"""The pages for people: try a text, see how the service is doing, review what it was least sure of, classify a file.

What a request goes through is the API's. All but the charts, the keys of the review and the progress of a file works
without scripts; there is no inline script or style.
"""

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import urlencode

from flask import Blueprint, Response, g, redirect, render_template, request, stream_with_context, url_for
from werkzeug.exceptions import BadRequest, NotFound

from hatespeech import tables, task
from hatespeech.serving import queries, reporting
from hatespeech.serving.api import classified
from hatespeech.serving.parameters import filter_arguments, filter_of, span_of
from hatespeech.serving.parts import parts
from hatespeech.serving.uploads import READING

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
MAX_UPLOAD_BYTES = 256 * 1024 * 1024
# The part of MHS's scale that is drawn; a score beyond is drawn at its end.
SCALE = (-4.0, 3.0)


pages = Blueprint("pages", __name__, template_folder="templates", static_folder="static", static_url_path="/static")


@pages.app_context_processor
def about() -> dict:
    known = {"model": parts().service.ollama.model, "prompt_version": task.PROMPT_VERSION}
    return known | {"log_text": parts().settings.log_text}


@pages.get("/")
def start() -> str:
    return page(kept=request.args.get("kept", ""))


@pages.post("/")
def answer() -> str:
    text = request.form.get("text", "")
    found = classified(text.encode("utf-8", "surrogatepass"))
    return page(text=text, answer=found, standing=parts().service.standing(found))


def page(**shown) -> str:
    """The page to try a text, with an answer and its standing or without."""
    return render_template("try.html", labels=task.LABELS, position=position, cuts=CUTS, **shown)


@pages.post("/correct")
def correct() -> Response:
    return redirect(url_for("pages.start", kept=keep_feedback()), 303)


def keep_feedback() -> str:
    """The label that the form says, kept; `undone` where it takes one back."""
    label = request.form.get("label")
    if label not in (*task.LABELS, "undo"):
        raise BadRequest(f"a label is {', '.join(task.LABELS)}")
    said = (None, None, "undone") if label == "undo" else (label, None, None)
    if not parts().store.add_feedback(request.form.get("id", ""), *said, g.api_key):
        raise NotFound("no request has this id")
    return label


@pages.get("/report")
def report() -> str:
    span = span_of(request.args)
    found = reporting.report(parts().store, span, parts().reference)
    return render_template("report.html", report=found, charts=charts(found), span=span, labels=task.LABELS)


@pages.get("/review")
def review() -> str:
    chosen = filter_of(request.args)
    confidence, _, seen = request.args.get("after", "").partition(",")
    try:
        after = (float(confidence), seen) if confidence else None
    except ValueError as error:
        raise BadRequest("after is a confidence and an id") from error
    if "\0" in seen:
        raise BadRequest("after is a confidence and an id")
    found = queries.least_sure(parts().store, chosen, after)
    shown = {"item": found[0][0], "said": found[0][1]} if found else {"item": None, "said": None}
    decided = {name: request.args.get(name, "") for name in ("last", "kept")}
    left = queries.count(parts().store, chosen)
    query = urlencode(filter_arguments(request.args))
    return render_template("review.html", labels=task.LABELS, left=left, query=query, **decided, **shown)


@pages.post("/review")
def decide() -> Response:
    label, request_id = keep_feedback(), request.form["id"]
    told = {} if label == "undo" else {"last": request_id, "kept": label}
    return redirect(f"{url_for('pages.review')}?{urlencode(filter_arguments(request.args) | told)}", 303)


@pages.get("/review.csv")
def export() -> Response:
    """The review's rows. What a spreadsheet would take for a formula gets an apostrophe before it, unless raw=1."""
    chosen, raw = filter_of(request.args), request.args.get("raw") == "1"
    store = parts().store

    def lines() -> Iterator[str]:
        yield _csv_line((*queries.EXPORTED, "feedback"))
        for row in queries.exported(store, chosen):
            yield _csv_line(row if raw else map(_no_formula, row))

    headers = {"Content-Disposition": "attachment; filename=review.csv"}
    headers["X-Formulas"] = "as they are" if raw else "with an apostrophe before them; raw=1 leaves them as they are"
    return Response(stream_with_context(lines()), headers=headers, mimetype="text/csv")


def _csv_line(row) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(row)  # this line end has a lone \r quoted, too
    return line.getvalue()


def _no_formula(cell: object) -> object:
    """https://owasp.org/www-community/attacks/CSV_Injection"""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


@pages.get("/file")
def file() -> str:
    return render_template("file.html", uploads=parts().uploads.all(g.api_key_id))


@pages.post("/file")
def upload() -> Response:
    request.max_content_length = MAX_UPLOAD_BYTES
    sent = request.files.get("file")
    if not sent or not sent.filename:
        raise BadRequest("choose a file")
    return redirect(url_for("pages.one_file", name=parts().uploads.keep(sent, g.api_key_id)), 303)


@pages.get("/file/<name>")
def one_file(name: str) -> str:
    state = parts().uploads.state(name, g.api_key_id)
    return render_template("one_file.html", upload=state, delimiters=tables.DELIMITERS)


@pages.get("/file/<name>/state")
def file_state(name: str) -> dict:
    return parts().uploads.state(name, g.api_key_id)


@pages.post("/file/<name>")
def start_file(name: str) -> Response:
    action, uploads = request.form.get("action"), parts().uploads
    if action == "delete":
        uploads.delete(name, g.api_key_id)
        return redirect(url_for("pages.file"), 303)
    reading = {option: request.form.get(option, "") for option in READING}
    if action == "restart":
        uploads.forget_answers(name, g.api_key_id)
    if action == "read":
        uploads.read_again(name, reading, g.api_key_id)
    else:
        uploads.start(name, request.form.get("column", ""), reading, g.api_key_id)
    return redirect(url_for("pages.one_file", name=name), 303)


@pages.get("/file/<name>/download")
def download(name: str) -> Response:
    return parts().uploads.send(name, g.api_key_id)


def charts(report: dict) -> list[dict]:
    """What static/charts.js draws with uPlot: x, and lines with a name, values and a colour of style.css."""
    steps = report["over_time"]
    times = [datetime.fromisoformat(step["start"]).replace(tzinfo=UTC).timestamp() for step in steps]
    lost = [sum(step["not_answered"].values()) for step in steps]
    colours = {label: label.lower() for label in task.LABELS}
    drawn = [
        {
            "title": f"Requests by {report['by']} and label",
            "x": times,
            "lines": [
                *({"name": x, "values": [s["labels"][x] for s in steps], "colour": colours[x]} for x in task.LABELS),
                {"name": "not answered", "values": lost, "colour": "ink", "dash": True},
            ],
        },
        {
            "title": f"Latency by {report['by']}, ms",
            "x": times,
            "lines": [
                {"name": "median", "values": [s["latency_ms"]["median"] for s in steps], "colour": "supportive"},
                {"name": "95th", "values": [s["latency_ms"]["p95"] for s in steps], "colour": "hate", "dash": True},
            ],
        },
    ]
    scores = report["drift"].get("scores")
    if scores:
        n = {name: max(1, sum(row[name] for row in scores)) for name in ("answers", "reference")}
        share = {name: [round(100 * row[name] / n[name], 2) for row in scores] for name in n}
        drawn.append(
            {
                "title": "Expected scores, % of answers",
                "x": [row["score"] for row in scores],
                "numeric": True,
                "lines": [
                    {"name": "these answers", "values": share["answers"], "colour": "supportive"},
                    {"name": "test comments", "values": share["reference"], "colour": "neutral", "dash": True},
                ],
            }
        )
    return drawn


def position(score: float) -> float:
    """Where a score stands on the drawn scale, in percent."""
    low, high = SCALE
    return round(100 * (min(max(score, low), high) - low) / (high - low), 1)


CUTS = (("Supportive", task.SUPPORTIVE_BELOW), ("Hate", task.HATE_ABOVE))


def error_response(status: int, reason: str | None, headers: dict) -> Response:
    """An error, as a page says it."""
    if status == 401:
        headers = headers | {"WWW-Authenticate": 'Basic realm="hatespeech: the API key is the password"'}
    return Response(render_template("error.html", status=status, reason=reason), status, headers, mimetype="text/html")

"""What URL parameters say: the report's time range, the review's filter. BadRequest for what says nothing."""

import math
from datetime import UTC, datetime, timedelta

from werkzeug.exceptions import BadRequest

from hatespeech import task
from hatespeech.serving.queries import Filter, Span

FILTERS = ("label", "low", "high", "since", "until", "words", "decided")


def span_of(arguments) -> Span:
    """The report's time range from URL parameters since, until (ISO 8601, UTC) and model; the last 30 days."""
    now = datetime.now(UTC).replace(tzinfo=None)
    until = _time(arguments, "until") or now + timedelta(minutes=1)
    since = _time(arguments, "since") or until - timedelta(days=30)
    if since >= until:
        raise BadRequest("since is not before until")
    model = arguments.get("model", "")
    if "\0" in model:
        raise BadRequest("a model's digest holds no NUL character")
    return Span(since, until, model)


def filter_arguments(arguments) -> dict[str, str]:
    """Of a request's URL parameters those that filter, to go on with."""
    return {name: value for name, value in arguments.items() if name in FILTERS and value}


def filter_of(arguments) -> Filter:
    label, decided = arguments.get("label", ""), arguments.get("decided") or "open"
    if label not in ("", *task.LABELS):
        raise BadRequest(f"label is one of {', '.join(task.LABELS)}")
    if decided not in ("open", "done", "all"):
        raise BadRequest("decided is open, done or all")
    try:
        low, high = (float(arguments[name]) if arguments.get(name) else None for name in ("low", "high"))
    except ValueError:
        low = high = math.nan
    if not all(math.isfinite(score or 0) for score in (low, high)):
        raise BadRequest("low and high are scores, numbers")
    if "\0" in arguments.get("words", ""):
        raise BadRequest("words hold no NUL character")
    since, until = _time(arguments, "since"), _time(arguments, "until")
    return Filter(label, low, high, since, until, arguments.get("words", ""), decided)


def _time(arguments, name: str) -> datetime | None:
    if not arguments.get(name):
        return None
    try:
        found = datetime.fromisoformat(arguments[name])
        found = found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"{name} is a date or time as in 2026-11-25 or 2026-11-25T14:00") from error
    if not 1900 < found.year < 3000:
        raise BadRequest(f"{name} is a time between the years 1901 and 2999")
    return found

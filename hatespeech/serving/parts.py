"""What the routes of an app share: app.py makes it, each route asks for it."""

import threading
from dataclasses import dataclass, field

from flask import current_app

from hatespeech.serving.metrics import Metrics
from hatespeech.serving.service import Service
from hatespeech.serving.settings import Settings
from hatespeech.serving.store import Store
from hatespeech.serving.uploads import Uploads

# So many batches are answered at once: each takes a thread for as long as its client listens, and the health check
# needs one too (gunicorn_conf.py).
MAX_BATCHES = 16


@dataclass(frozen=True)
class Parts:
    """reference: reporting.load_reference's."""

    settings: Settings
    store: Store
    service: Service
    uploads: Uploads
    metrics: Metrics
    reference: dict | None
    batches: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(MAX_BATCHES))


def parts() -> Parts:
    """Those of the app that answers this request."""
    return current_app.extensions["hatespeech"]

"""How gunicorn runs the app: gunicorn -c python:hatespeech.serving.gunicorn_conf 'app:create_app()'."""

import sys

from hatespeech import UserError
from hatespeech.serving import settings
from hatespeech.serving.parts import MAX_BATCHES

try:
    _settings = settings.read()
except UserError as error:
    sys.exit(f"hatespeech: {error}")

# One process: the gate before Ollama, the metrics and the files of the page are a process's own. Several machines, or
# several ports, take several services (docs/several-machines.md).
workers = 1
# So many that all slots, the queue and the batches leave some to refuse the rest at once and to answer health checks.
threads = len(_settings.hosts) * _settings.max_in_flight + _settings.max_queue + MAX_BATCHES + 12
# Longer than clients wait between two requests: a connection closed under a client's hands is a request lost to it.
keepalive = 75
loglevel = "warning"


def on_starting(server) -> None:
    """Refuse what would break in silence."""
    if server.cfg.workers != 1:
        sys.exit(f"hatespeech: {server.cfg.workers} workers were asked for, and one process has to serve: leave out -w")

"""What Prometheus sees of one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hatespeech.serving.service import Gate


class Metrics:
    """Counters of one app; each app has a registry of its own."""

    def __init__(self, gate: Gate):
        self._registry = CollectorRegistry()
        named = {"registry": self._registry, "namespace": "hatespeech"}
        self._requests = Counter("http_requests", "Requests by route and status.", ["route", "status"], **named)
        self._seconds = Histogram("http_request_duration_seconds", "Time to the answer.", ["route"], **named)
        self._answers = Counter("answers", "Texts classified, by label and abstention.", ["label", "abstain"], **named)
        self._errors = Counter("ollama_errors", "Calls that Ollama failed, by kind.", ["kind"], **named)
        Gauge("ollama_in_flight", "Texts at Ollama.", **named).set_function(lambda: gate.inside)
        Gauge("queue_length", "Texts waiting for a place at Ollama.", **named).set_function(lambda: gate.waiting)

    def request(self, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(duration_s)

    def answer(self, label: str, abstain: bool | None) -> None:
        self._answers.labels(label, str(abstain).lower()).inc()

    def ollama_error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

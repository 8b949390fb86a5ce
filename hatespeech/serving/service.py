"""A text's way through the service: row received -> a place at Ollama -> calibration -> row finished -> answer."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException

from hatespeech import task
from hatespeech.answers import Verdict, threshold, verdicts
from hatespeech.calibration import Calibration
from hatespeech.hosts import Hosts
from hatespeech.ollama import OllamaError, Prediction, TextTooLong
from hatespeech.serving.store import ANSWERED, FAILED, REFUSED, Store


class Busy(Exception):
    """All slots at Ollama and in the queue are taken."""

    retry_after_s = 1


@dataclass(frozen=True)
class Answer(Verdict):
    """A verdict, the id of its request in the log, and what model gave it.

    cut_to: of how many characters of the text it is, where it was cut.
    """

    request_id: str
    model: dict
    duration_ms: float
    cut_to: int | None = None

    def as_json(self, their_id: object = None) -> dict:
        """their_id: what whoever asked calls the text, if anything."""
        answer = asdict(self) | {"probabilities": self.by_label}
        if answer["cut_to"] is None:
            del answer["cut_to"]
        return {"id": self.request_id if their_id is None else their_id} | answer


@dataclass(frozen=True)
class Standing:
    """Where an answer's P(Hate) stands among the thresholds.

    flag_above: the threshold in force; None where there is none. thresholds: of the calibration that the answer went
    through, lowest first; empty where it has none. reached: the highest of these that P(Hate) reaches, if any.
    """

    flag_above: float | None
    thresholds: tuple[dict, ...]
    reached: dict | None


class Gate:
    """At most `slots` callers inside and `queue` waiting; the next one is Busy. Ollama's own queue has no bound."""

    def __init__(self, slots: int, queue: int, timeout_s: float):
        self._slots, self._queue = threading.Semaphore(slots), threading.Semaphore(slots + queue)
        self.slots, self.timeout_s, self._lock = slots, timeout_s, threading.Lock()
        self.inside, self.waiting = 0, 0

    @contextmanager
    def slot(self, wait_for_queue: bool = False) -> Iterator[None]:
        """A slot, while the block runs. wait_for_queue: wait where the queue is full, too. Raises Busy."""
        if not self._queue.acquire(timeout=self.timeout_s if wait_for_queue else 0):
            raise Busy("too many requests are waiting")
        try:
            self._count(waiting=1)
            try:
                if not self._slots.acquire(timeout=self.timeout_s):
                    raise Busy(f"no slot at Ollama came free within {self.timeout_s:g} s")
            finally:
                self._count(waiting=-1)
            try:
                self._count(inside=1)
                yield
            finally:
                self._count(inside=-1)
                self._slots.release()
        finally:
            self._queue.release()

    def _count(self, inside: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self.inside += inside
            self.waiting += waiting


class Service:
    """Classifies texts and logs each. Threads may share it.

    run: the folder of the model that Ollama serves; its calibration.json is applied only to the weights it is for.
    class_scores: what the expected score is made of where no calibration applies.
    flag_above: the P(Hate) from which on an answer is flagged; None for the calibration's own.
    """

    def __init__(
        self,
        run: Path,
        ollama: Hosts,
        store: Store,
        gate: Gate,
        class_scores: tuple[float, float, float],
        flag_above: float | None = None,
    ):
        self.ollama, self.store, self.gate, self.class_scores = ollama, store, gate, class_scores
        self.flag_above = flag_above
        self._stored = Calibration.of_run(run)

    def classify(
        self,
        body: bytes,
        *,
        route: str,
        api_key: str | None = None,
        wait_for_queue: bool = False,
        keep_text: bool = True,
        truncate: bool = False,
    ) -> Answer:
        """Log, classify, log, answer.

        wait_for_queue: for an item of a batch, which waits where a caller would be sent away. keep_text: False where
        the log is to forget the text. truncate: a text that is too long is cut, where it would be refused.
        Raises BadRequest (no text), Busy, OllamaError, SQLAlchemyError (nothing is answered that can't be logged).
        """
        started = time.perf_counter()
        request_id = self.store.received(body, self.ollama.model, route=route, api_key=api_key, keep_text=keep_text)

        def finish(**outcome) -> float:
            duration_ms = round((time.perf_counter() - started) * 1000, 2)
            self.store.finished(request_id, duration_ms=duration_ms, **outcome)
            return duration_ms

        try:
            text = text_of(body)
            with self.gate.slot(wait_for_queue):
                (prediction, digest, weights_sha256), cut_to = self._ask(text, truncate)
            calibration, _ = Calibration.for_weights(self._stored, weights_sha256)
        except Exception as error:
            status, reason = status_of(error)
            finish(status=REFUSED if status < 500 else FAILED, http_status=status, error=reason)
            raise
        (verdict,) = verdicts([prediction.probabilities], calibration, self.class_scores, self.flag_above)
        duration_ms = finish(
            status=ANSWERED,
            http_status=HTTPStatus.OK,
            probabilities=verdict.probabilities,
            score=verdict.score,
            abstain=verdict.abstain,
            model_digest=digest,
            calibration=calibration and calibration.version,
        )
        model = self._model(digest, calibration)
        return Answer(**vars(verdict), request_id=request_id, model=model, duration_ms=duration_ms, cut_to=cut_to)

    def _ask(self, text: str, truncate: bool) -> tuple[tuple[Prediction, str, str], int | None]:
        """Ollama's answer, and to how many characters the text was cut, if it was."""
        length = len(text)
        while True:
            try:
                return self.ollama.ask(text[:length]), None if length == len(text) else length
            except TextTooLong as error:
                if not truncate or length < 2:
                    raise
                # By the share that is too much and a little more: how characters become tokens differs within a text.
                fits = (task.CONTEXT_TOKENS - 64) / error.n_tokens if error.n_tokens else 0.8
                length = max(1, int(length * min(0.95, fits)))
                length -= len(re.search("(&[#a-zA-Z0-9]*)?$", text[:length])[0])  # the beginning of an entity is none
                if task.text_error(text[:length]):  # blanks alone are left: what there is to read comes after them
                    raise

    def standing(self, answer: Answer) -> Standing:
        """Where an answer of this service stands among the thresholds."""
        calibration = self._stored if answer.model["calibrated"] else None
        thresholds = calibration.thresholds if calibration else ()
        reached = [row for row in thresholds if row["threshold"] <= answer.by_label["Hate"]]
        return Standing(threshold(calibration, self.flag_above), thresholds, reached[-1] if reached else None)

    def refuse(self, body: bytes | None, status: int, error: str, *, route: str, api_key: str | None = None) -> None:
        """Log a request without a text to classify: unread (too large, broken off), or not as the route takes it."""
        request_id = self.store.received(body, self.ollama.model, route=route, api_key=api_key)
        self.store.finished(request_id, status=REFUSED, http_status=status, error=error, duration_ms=0.0)

    def provenance(self) -> dict:
        """What answers now, and how: where any of it changes, other answers are to be expected."""
        digest, weights_sha256 = self.ollama.model_served()
        calibration, _ = Calibration.for_weights(self._stored, weights_sha256)
        return {
            "model": digest,
            "prompt": task.PROMPT_VERSION,
            "calibration": calibration and calibration.version,
            "flag_above": threshold(calibration, self.flag_above),
        }

    def health(self) -> dict:
        """Raises OllamaError or SQLAlchemyError where no text could be classified and logged now."""
        self.store.check()
        hosts = self.ollama.health()
        digest, weights_sha256 = self.ollama.model_served()
        calibration, why_not = Calibration.for_weights(self._stored, weights_sha256)
        return {
            "status": "OK",
            "model": self._model(digest, calibration),
            "flag_above": threshold(calibration, self.flag_above),
            "uncalibrated_because": why_not,
            "ollama": hosts,
        }

    def _model(self, digest: str, calibration: Calibration | None) -> dict:
        return {
            "name": self.ollama.model,
            "digest": digest,
            "prompt_version": task.PROMPT_VERSION,
            "calibrated": calibration is not None,
        }


def text_of(body: bytes) -> str:
    """The text in a body. Raises BadRequest where there is none."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the text is not UTF-8 (byte {error.start})") from error
    if reason := task.text_error(text):
        raise BadRequest(reason)
    return text


def status_of(error: Exception) -> tuple[int, str]:
    """The HTTP status an error answers with, and words that hold nothing of a text."""
    if isinstance(error, HTTPException):
        return error.code, error.description
    if isinstance(error, OllamaError):
        return error.status, str(error)
    if isinstance(error, Busy):
        return HTTPStatus.SERVICE_UNAVAILABLE, str(error)
    if isinstance(error, SQLAlchemyError):  # its own words would hold the text
        return HTTPStatus.SERVICE_UNAVAILABLE, "the request log can't be written, and nothing is answered unlogged"
    return HTTPStatus.INTERNAL_SERVER_ERROR, f"an unexpected {type(error).__name__}; the service's own log has it"

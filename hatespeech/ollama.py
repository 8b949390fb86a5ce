"""The client: classify a text with one call of Ollama. The only module that knows Ollama's API.

https://docs.ollama.com/api/chat; log-probabilities need Ollama 0.12.11 or later. /api/generate would give the same, but
in Ollama 0.24 it reads the model file's metadata three times for each request, 15 ms each, where /api/chat does twice.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from hatespeech import UserError, task

MIN_VERSION = (0, 12, 11)
_DIGEST_AGE_S = 5.0


class OllamaError(Exception):
    """Ollama gave no usable answer. `status` is the HTTP status the caller's own client should get."""

    status = 503


class TooSlow(OllamaError):
    """No answer in time."""


class TextTooLong(OllamaError):
    """n_tokens: how long the prompt is, where Ollama tells."""

    status = 413

    def __init__(self, n_tokens: int | None = None):
        super().__init__(f"the text is too long: with the instruction it may take {task.CONTEXT_TOKENS} tokens")
        self.n_tokens = n_tokens


class BadAnswer(OllamaError):
    status = 502


@dataclass(frozen=True)
class Prediction:
    """probabilities: in task.LABELS' order, summing to 1. prompt_tokens: what Ollama evaluated, BOS included."""

    probabilities: tuple[float, float, float]
    prompt_tokens: int


def base_url(host: str) -> str:
    """OLLAMA_HOST as Ollama itself understands it (`host`, `host:port`, `:port`, a URL) -> a URL. Else ValueError."""
    scheme, _, rest = host.rpartition("://")
    if scheme not in ("", "http", "https") or re.search(r"[\s@?#\0]", rest):
        raise ValueError(f"{host!r} is no address of an Ollama, such as 127.0.0.1:11434")
    location = urlsplit(f"//{rest.rstrip('/')}")
    name = location.hostname or "127.0.0.1"
    name = {"0.0.0.0": "127.0.0.1"}.get(name, f"[{name}]" if ":" in name else name)
    port = location.port or {"http": 80, "https": 443}.get(scheme, 11434)
    return f"{scheme or 'http'}://{name}:{port}{location.path}"


@contextmanager
def private_server(scratch: Path, command: str = "ollama") -> Iterator[str]:
    """An Ollama for a moment, as host:port: on a free port, with a model store in scratch that goes with it.

    Raises UserError where there is no such command or it does not start.
    """
    if shutil.which(command) is None:
        raise UserError(f"there is no `{command}` command on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".ollama-") as store:
        environment = os.environ | {"OLLAMA_HOST": host, "OLLAMA_MODELS": store}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # A session of its own, so that its helpers, one llama-server for each model, can be ended with it.
        server = subprocess.Popen([command, "serve"], env=environment, start_new_session=True, **quiet)
        try:
            for _ in range(300):
                try:
                    Ollama(host, "none", ()).version()
                    break
                except OllamaError:
                    time.sleep(0.1)
            else:
                raise UserError("`ollama serve` does not answer")
            yield host
        finally:
            _end(server)


def _end(server: subprocess.Popen, patience_s: float = 10.0) -> None:
    """SIGTERM to a process and its helpers, those of its group, and SIGKILL to what is left of them then."""
    deadline = time.monotonic() + patience_s
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            server.poll()  # an ended process is of the group until it is waited for
            os.killpg(server.pid, 0)
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def create(host: str, model: str, run: Path) -> None:
    """Give a run's folder to Ollama, as its Modelfile says. Raises UserError with Ollama's own words."""
    command = ["ollama", "create", model, "-f", str(run / "Modelfile")]
    done = subprocess.run(command, env=os.environ | {"OLLAMA_HOST": host}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ollama create {model}: {done.stderr.strip()[-300:]}")


def served_once(run: Path, tokens: tuple[str, ...], texts: list[str]) -> list[tuple[float, float, float]]:
    """The texts' label probabilities from a run's folder, served for the moment. Raises UserError, OllamaError."""
    with private_server(run) as host:
        create(host, "once", run)
        server = Ollama(host, "once", tokens, timeout_s=120)
        return [server.classify(text).probabilities for text in texts]


class Ollama:
    """One model of one Ollama server.

    timeout_s: for the answer to one call; connecting is given at most 2 s of it. load_timeout_s: for loading the model,
    which a text that ran out of its time starts in the background. Safe to share between threads.
    """

    def __init__(
        self, host: str, model: str, tokens: tuple[str, ...], timeout_s: float = 10.0, load_timeout_s: float = 300.0
    ):
        self.url, self.model, self.tokens = base_url(host), model, tokens
        self.timeout_s, self.load_timeout_s = timeout_s, load_timeout_s
        self._loading: threading.Thread | None = None
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=64))
        self._session.trust_env = False  # a proxy from the environment has no business with these texts
        self._digest: tuple[float, str] = (float("-inf"), "")
        self._weights: dict[str, str] = {}  # by digest, which never changes its weights
        self._lock = threading.Lock()

    def classify(self, text: str) -> Prediction:
        """The label probabilities of a text, from the log-probabilities of the first generated token.

        Raises OllamaError: not reachable, too slow, model not there; TextTooLong; BadAnswer.
        """
        self.check_loaded()
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": task.as_read(text)}],
            "stream": False,
            "logprobs": True,
            "top_logprobs": 20,
            "truncate": False,
            "keep_alive": -1,
            "options": {
                "num_ctx": task.CONTEXT_TOKENS,
                "num_predict": 1,
                "temperature": 0,
                "repeat_penalty": 1,
                "seed": 0,
            },
        }
        try:
            answer = self._call("POST", "/api/chat", body)
        except TooSlow:
            self._load()
            raise
        try:
            first = answer["logprobs"][0]
            logprobs = {entry["token"]: float(entry["logprob"]) for entry in reversed(first["top_logprobs"])}
            probabilities = task.probabilities_from_logprobs(logprobs, self.tokens)
            return Prediction(probabilities, int(answer["prompt_eval_count"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadAnswer(f"Ollama's answer holds no label probabilities ({error!r})") from error

    def check_loaded(self) -> None:
        """Raise OllamaError while the model is being loaded: texts would only wait for it."""
        if self._loading and self._loading.is_alive():
            raise OllamaError(f"Ollama at {self.url} is slow to answer: the model may still be loading")

    def _load(self) -> None:
        """Load the model in the background. Ollama gives up on a load when whoever asked for it hangs up, so that one
        that takes longer than an answer may would never end."""
        with self._lock:
            if not (self._loading and self._loading.is_alive()):
                self._loading = threading.Thread(target=self._load_quietly, daemon=True)
                self._loading.start()

    def _load_quietly(self) -> None:
        with suppress(OllamaError):  # who asks next is told
            self.preload()

    def ask(self, text: str) -> tuple[Prediction, str, str]:
        """classify, and model_served of what answered."""
        self.digest()  # where the model is not there, before the text is sent
        prediction = self.classify(text)
        return prediction, *self.model_served()

    def model_served(self) -> tuple[str, str]:
        """The model's digest, at most 5 s old, and its weights' sha256."""
        digest = self.digest()
        if digest not in self._weights:
            self._weights[digest] = self.weights_sha256()
        return digest, self._weights[digest]

    def digest(self) -> str:
        """The sha256 of the model that answers, at most 5 s old. Raises OllamaError where the model is not there."""
        with self._lock:
            read_at, digest = self._digest
            if time.monotonic() - read_at < _DIGEST_AGE_S:
                return digest
        models = self._call("GET", "/api/tags").get("models", [])
        for model in models:
            if model.get("name") in (self.model, f"{self.model}:latest"):
                with self._lock:
                    self._digest = (time.monotonic(), model["digest"])
                return model["digest"]
        raise OllamaError(f"Ollama at {self.url} has no model {self.model}: run ./bootstrap.sh")

    def weights_sha256(self) -> str:
        """The sha256 of the GGUF behind the model, which unlike the digest does not change with the Modelfile.

        Raises OllamaError where the model is not there; BadAnswer where Ollama does not tell.
        """
        return self.weights_path().name.removeprefix("sha256-")

    def weights_path(self) -> Path:
        """Where Ollama, on its own machine, keeps the model's GGUF."""
        modelfile = self._call("POST", "/api/show", {"model": self.model}).get("modelfile", "")
        found = re.search(r"^FROM (.*sha256-[0-9a-f]{64})\s*$", modelfile, re.MULTILINE)
        if not found:
            raise BadAnswer(f"Ollama does not tell the weights of {self.model}")
        return Path(found.group(1))

    def version(self) -> str:
        """The server's version. Raises OllamaError where it is too old to give log-probabilities."""
        version = str(self._call("GET", "/api/version").get("version", ""))
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
        # A build from source without a release's linker flags calls itself 0.0.0.
        if (0, 0, 0) < numbers < MIN_VERSION:
            raise OllamaError(
                f"Ollama at {self.url} is {version}; {'.'.join(map(str, MIN_VERSION))} or later is needed"
            )
        return version

    def preload(self) -> None:
        """Load the model into memory, so that the first request need not wait for it."""
        self._call(
            "POST",
            "/api/generate",
            {"model": self.model, "keep_alive": -1, "options": {"num_ctx": task.CONTEXT_TOKENS}},
            self.load_timeout_s,
        )

    def _call(self, method: str, path: str, body: dict | None = None, timeout_s: float | None = None) -> dict:
        timeout_s = timeout_s or self.timeout_s
        try:
            response = self._session.request(
                method, self.url + path, json=body, timeout=(min(2.0, timeout_s), timeout_s)
            )
        except requests.Timeout as error:
            raise TooSlow(f"Ollama at {self.url} did not answer within {timeout_s:g} s") from error
        except requests.RequestException as error:
            raise OllamaError(f"Ollama at {self.url} can't be reached ({type(error).__name__})") from error
        try:
            answer = response.json()
        except ValueError as error:
            raise BadAnswer(f"Ollama's answer to {path} is not JSON (status {response.status_code})") from error
        if not isinstance(answer, dict):
            raise BadAnswer(f"Ollama's answer to {path} is not a JSON object")
        if response.ok:
            return answer
        reason = str(answer.get("error", ""))
        if response.status_code == 400 and "exceeds" in reason and "context" in reason:
            counted = re.search(r"n_prompt_tokens\D*(\d+)|request \((\d+) tokens", reason)
            raise TextTooLong(int(counted[1] or counted[2]) if counted else None)
        # Ollama's own words are for its own log: they may quote the request.
        if response.status_code == 404:
            raise OllamaError(f"Ollama at {self.url} has no model {self.model}: run ./bootstrap.sh")
        raise OllamaError(f"Ollama at {self.url} answered {path} with status {response.status_code}")

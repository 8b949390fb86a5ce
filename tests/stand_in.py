"""An Ollama that is none: answers by a few words in the text, at once, and goes wrong where a test says so."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hatespeech import runs

RUN = Path(__file__).parents[1] / "results" / "smollm2-135m"
TOKENS = runs.read_settings(RUN)["label_tokens"]
WEIGHTS = json.loads((RUN / "calibration.json").read_text())["model_sha256"]
# The label by what is in a text; of others the model is unsure.
WORDS = {"hate": 0, "idiot": 0, "lovely": 2, "thank": 2}
# In llama-server's words, which Ollama passes on.
TOO_LONG = '{"error":{"code":400,"message":"exceeds the available context size","n_prompt_tokens":%d}}'


class StandIn(ThreadingHTTPServer):
    """status, body: where a body is given, every text gets it. delay_s: before each answer to a text."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.status, self.body, self.delay_s = 200, None, 0.0

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["StandIn"]:
        server = cls()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = [{"name": f"{runs.model_name(RUN)}:latest", "digest": "0" * 64}]
        self.reply(200, json.dumps({"models": models, "version": "0.24.0"}).encode())

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            return self.reply(200, json.dumps({"modelfile": f"FROM /models/sha256-{WEIGHTS}"}).encode())
        time.sleep(self.server.delay_s)
        if self.server.status != 200 or self.server.body is not None:
            return self.reply(self.server.status, self.server.body or b"{}")
        text = sent.get("messages", [{"content": ""}])[0]["content"]
        n_tokens = 45 + len(text.encode()) // 2
        if n_tokens > 2048:
            return self.reply(400, json.dumps({"error": TOO_LONG % n_tokens}).encode())
        likely = next((label for word, label in WORDS.items() if word in text), None)
        logprobs = [{"token": token, "logprob": -0.2 if n == likely else -3.0} for n, token in enumerate(TOKENS)]
        answer = {"logprobs": [{"top_logprobs": logprobs}], "prompt_eval_count": n_tokens}
        self.reply(200, json.dumps(answer).encode())

    def reply(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

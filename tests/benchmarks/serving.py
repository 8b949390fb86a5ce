"""The service against Ollama called directly, in one run: what do logging, calibration and the gate cost?

    python -m tests.benchmarks.serving            # some minutes; writes results/benchmarks/serving.json
    python -m tests.benchmarks.serving --quick    # seconds, prints only
    python -m tests.benchmarks.serving --old .cache/ollama-0.24/bin/ollama    # and against another Ollama

Closed loop: each client sends the next test comment when its last is answered, until all have been; both paths get the
same comments in the same order and take turns with every few. The load generator shares the cores with what it
measures, for both alike. `profile` is Ollama's own account of a request's time; `settings` are rows of Ollama alone, by
the weights' format and its environment.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import psutil
import requests

from hatespeech import ollama, runs, task
from hatespeech.training import export, recording
from tests.conftest import ROOT, RUN, free_port

CLIENTS = (1, 4, 16)


def load(calls: dict[str, Callable[[str], None]], texts: list[str], clients: int) -> list[dict]:
    """Requests a second and latency of so many clients over all the texts, a row for each path.

    The paths take turns with every few texts, and in who begins, so that a processor that slows down slows both.
    more_ms: the median of what a text took longer than on the first path.
    """
    durations_ms, seconds = {path: [] for path in calls}, dict.fromkeys(calls, 0.0)

    def timed(path: str, text: str) -> float:
        started = time.monotonic()
        calls[path](text)
        return (time.monotonic() - started) * 1000

    with ThreadPoolExecutor(clients) as pool:
        for call in calls.values():
            list(pool.map(call, texts[: 2 * clients]))
        turn = 4 * clients
        for number, start in enumerate(range(0, len(texts), turn)):
            for path in list(calls) if number % 2 else reversed(calls):
                started = time.monotonic()
                durations_ms[path] += pool.map(timed, [path] * turn, texts[start : start + turn])
                seconds[path] += time.monotonic() - started
    first = np.array(next(iter(durations_ms.values())))
    return [
        {
            "path": path,
            "clients": clients,
            "requests_per_s": round(len(texts) / seconds[path], 2),
            "p50_ms": round(float(np.percentile(durations_ms[path], 50)), 1),
            "p95_ms": round(float(np.percentile(durations_ms[path], 95)), 1),
            "more_ms": round(float(np.median(np.array(durations_ms[path]) - first)), 1),
        }
        for path in calls
    ]


def start_app(host: str, scratch: str) -> tuple[subprocess.Popen, str, float]:
    """gunicorn as bootstrap.sh starts it, its log in a file: its process, URL and the seconds to its first answer."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"OLLAMA_HOST": host, "MODEL_DIR": str(RUN)}
    environment |= {"DATABASE_URL": f"sqlite:///{scratch}/requests.sqlite3"}
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--config",
        "python:hatespeech.serving.gunicorn_conf",
        "--bind",
        address,
    ]
    started = time.monotonic()
    options = {"cwd": ROOT, "env": environment, "start_new_session": True}
    with open(f"{scratch}/app.log", "w") as log:
        process = subprocess.Popen([*command, "app:create_app()"], stderr=log, **options)
    while True:
        try:
            requests.post(f"http://{address}/infer", data="some text", timeout=60).raise_for_status()
            return process, f"http://{address}", time.monotonic() - started
        except requests.ConnectionError:
            time.sleep(0.02)


def profile(host: str, model: str, texts: list[str]) -> dict:
    """Where a request's time goes, by Ollama's own durations: means over texts it has not seen."""
    options = {"num_ctx": task.CONTEXT_TOKENS, "num_predict": 1}
    answers = []
    for text in texts:
        messages = [{"role": "user", "content": task.spell_out(text)}]
        body = {"model": model, "messages": messages, "stream": False, "options": options}
        body |= {"logprobs": True, "top_logprobs": 20, "keep_alive": -1}
        answers.append(requests.post(f"{ollama.base_url(host)}/api/chat", json=body, timeout=60).json())
    means = {
        name: np.mean([answer[f"{name}_duration"] for answer in answers]) for name in ("load", "prompt_eval", "total")
    }
    return {f"{name}_ms": round(float(mean) / 1e6, 1) for name, mean in means.items()} | {
        "prompt_tokens": round(float(np.mean([answer["prompt_eval_count"] for answer in answers])), 1)
    }


def in_format(name: str, folder: Path) -> Path:
    """A copy of the shipped run with its weights in another GGUF format."""
    kind = gguf.GGMLQuantizationType[name]
    source, path = gguf.GGUFReader(RUN / "model.gguf"), folder / "model.gguf"
    file_type = gguf.LlamaFileType[f"MOSTLY_{name}"]
    writer = export.start_gguf(path, source, {"general.file_type": int(file_type)})
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    export.write_gguf(writer, path, path)
    (folder / "Modelfile").write_text(export.MODELFILE)
    return folder


def sweep(n_texts: int) -> list[dict]:
    """Ollama alone with one and four clients, by format of the weights and by its settings."""
    texts, rows = texts_of("test")[:n_texts], []
    tokens = tuple(runs.read_settings(RUN)["label_tokens"])
    tries = [(name, {}) for name in ("F16", "BF16", "Q8_0")]
    tries += [("F16", {"OLLAMA_NUM_PARALLEL": n}) for n in ("1", "2", "4")]
    tries += [("F16", {"OLLAMA_FLASH_ATTENTION": "1"}), ("F16", {"LLAMA_ARG_UBATCH": "128"})]
    tries += [("F16", {"LLAMA_ARG_THREADS": "1"}), ("F16", {"LLAMA_ARG_CACHE_REUSE": "16"})]
    for name, environment in tries:
        os.environ |= environment
        with tempfile.TemporaryDirectory() as scratch, ollama.private_server(Path(scratch)) as host:
            ollama.create(host, "model", in_format(name, Path(scratch)))
            client = ollama.Ollama(host, "model", tokens, timeout_s=60)
            client.preload()
            for clients in (1, 4):
                (row,) = load({"ollama": client.classify}, texts, clients)
                rows.append({"format": name, "environment": environment} | row)
                print(json.dumps(rows[-1]), flush=True)
        for variable in environment:
            del os.environ[variable]
    return rows


def against(old: str, n_texts: int) -> list[dict]:
    """The Ollama on the PATH and another executable, which take turns with the same texts."""
    texts, tokens = texts_of("test")[:n_texts], tuple(runs.read_settings(RUN)["label_tokens"])
    with ExitStack() as stack:
        scratch, calls = Path(stack.enter_context(tempfile.TemporaryDirectory())), {}
        for command in (old, "ollama"):
            host = stack.enter_context(ollama.private_server(scratch, command))
            ollama.create(host, "model", RUN)
            client = ollama.Ollama(host, "model", tokens, timeout_s=60)
            client.preload()
            calls[f"ollama {client.version()}"] = client.classify
        rows = [row for clients in (1, 4) for row in load(calls, texts, clients)]
    for before, now in zip(rows[::2], rows[1::2], strict=True):
        ratio = now["requests_per_s"] / before["requests_per_s"]
        print(f"{now['clients']} clients: {now['path']} / {before['path']} throughput {ratio:.2f}")
    return rows


def texts_of(name: str) -> list[str]:
    return pd.read_parquet(ROOT / "tests" / "data" / f"{name}.parquet")["text"].tolist()


def measure(n_texts: int) -> dict:
    model, texts, unseen = runs.model_name(RUN), texts_of("test")[:n_texts], texts_of("train")[:40]
    tokens = tuple(runs.read_settings(RUN)["label_tokens"])
    with tempfile.TemporaryDirectory() as scratch, ollama.private_server(Path(scratch)) as host:
        ollama.create(host, model, RUN)
        direct = ollama.Ollama(host, model, tokens, timeout_s=60)
        direct.preload()
        process, url, first_answer_s = start_app(host, scratch)
        try:
            local = threading.local()

            def through_app(text: str) -> None:
                if not hasattr(local, "session"):
                    local.session = requests.Session()
                local.session.post(f"{url}/infer", data=text.encode(), timeout=60).raise_for_status()

            paths = {"ollama": direct.classify, "app": through_app}
            rows = []
            for clients in CLIENTS:
                rows += load(paths, texts, clients)
                print(json.dumps(rows[-2:]), flush=True)
            memory = psutil.Process(process.pid)
            app_mb = sum(p.memory_info().rss for p in [memory, *memory.children()]) / 1e6
            return {
                "start_to_first_answer_s": round(first_answer_s, 2),
                "app_memory_mb": round(app_mb),
                "ollama_version": direct.version(),
                "profile": profile(host, model, unseen),
                "rows": rows,
            }
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 requests a row, print only")
    parser.add_argument("--old", metavar="OLLAMA", help="another Ollama's executable, to take turns with this one's")
    arguments = parser.parse_args()
    quick = arguments.quick
    if not (RUN / "model.gguf").exists():
        sys.exit(f"benchmark: {RUN} has no model.gguf yet: run ./bootstrap.sh first")
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    result = {
        "command": "python -m tests.benchmarks.serving",
        "commit": recording.commit(),
        "hardware": f"{processor.split(':')[-1].strip()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()},
        "requests_a_row": 16 if quick else 232,
    }
    result |= measure(result["requests_a_row"])
    table = pd.DataFrame(result["rows"]).pivot(index="clients", columns="path")
    print(table.to_string())
    by_path = {path: rows.set_index("clients") for path, rows in pd.DataFrame(result["rows"]).groupby("path")}
    for clients in CLIENTS:
        app, direct = (by_path[path].loc[clients] for path in ("app", "ollama"))
        print(
            f"{clients} clients: app / Ollama throughput {app.requests_per_s / direct.requests_per_s:.3f}, "
            f"median {app.p50_ms - direct.p50_ms:+.1f} ms, of the same text {app.more_ms:+.1f} ms"
        )
    print("profile of a request:", result["profile"])
    if arguments.old:
        result["engines"] = against(arguments.old, result["requests_a_row"])
    if not quick:
        result["settings"] = sweep(80)
        path = ROOT / "results" / "benchmarks" / "serving.json"
        path.parent.mkdir(exist_ok=True)
        runs.write_json(path, result)
        print(f"stored in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

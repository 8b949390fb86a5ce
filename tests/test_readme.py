"""What the README says, held against the code: every command runs, every figure is one that was stored."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib

import nbformat
import pandas as pd
import pytest
import yaml
from nbclient import NotebookClient
from werkzeug.serving import make_server

import train
from app import create_app
from tests.conftest import ROOT, RUN

# The README and what it leads to, read as one.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(path.read_text() for path in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines() if line.strip()))
# Commands that set up or train: here each is parsed; the test named runs it.
RUN_ELSEWHERE = {
    "./bootstrap.sh": "test_bootstrap.py::test_from_bare_to_answers_and_rows",
    "./bootstrap.sh test": "what runs these tests (.ci/run)",
    "MODEL_DIR=results/mine ./bootstrap.sh": "test_bootstrap.py, with MODEL_DIR of its own",
    "conda env create -f environment.yml": "test_environment_yml_is_the_train_extra (no conda here)",
    "conda activate hatespeech": "as above",
    "TRUSTED_PROXIES=1 ./bootstrap.sh": "test_auth.py, without the set-up",
    **{
        command: "test_bulk.py, on files, hosts and a cluster of its own"
        for command in COMMANDS
        if command.startswith(".venv/bin/hatespeech bulk")
    },
    "python -m hatespeech.training.evaluation results/smollm2-135m results/mine": "test_train.py, evaluate-only",
    **{
        command: "test_data.py, on a published set of its own"
        for command in COMMANDS
        if command.startswith("python -m hatespeech.training.data")
    },
    **{
        command: "test_checkpoint.py::test_two_processes_train_what_one_does, on one host"
        for command in COMMANDS
        if command.startswith("torchrun")
    },
}


@pytest.fixture
def served(run, server, ollama_host, tmp_path):
    """The real app on a real port."""
    config = {
        "MODEL_DIR": str(run),
        "OLLAMA_HOST": ollama_host,
        "DATABASE_URL": f"sqlite:///{tmp_path}/.data/requests.sqlite3",
    }
    listener = make_server("127.0.0.1", 0, create_app(config), threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield listener.port
    listener.shutdown()


def test_every_command_is_known():
    for command in COMMANDS:
        words = shlex.split(command)
        run_below = words[0] in ("curl", "sqlite3", ".venv/bin/hatespeech") or words[:3] == ["python", "-m", "train"]
        assert command in RUN_ELSEWHERE or run_below, command


def test_curl_commands_answer_as_shown(served, tmp_path):
    (tmp_path / "comment.txt").write_text("such a comment")
    outputs = []
    readme = [command for command in COMMANDS if command in PAGES[0].read_text()]
    others = [command for command in COMMANDS if command not in readme]
    for command in (*readme, *others):
        if command.startswith("curl"):
            command = command.replace("localhost:5000", f"localhost:{served}").replace("curl", "curl -sS --fail")
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
            outputs.append(done.stdout)
    shown = re.search(r"```\n(\w+)\n```", README).group(1)
    assert outputs[0] == shown == "Supportive"
    assert set(outputs[1:3]) <= {"Hate", "Neutral", "Supportive"}
    assert outputs[3] == "OK"
    labels = [re.search("Hate|Neutral|Supportive", output)[0] for output in outputs[5:]]
    assert len(labels) == sum(command.startswith("curl") for command in others) == 4
    example = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL).group(1))
    answer = json.loads(outputs[4])
    assert answer.keys() == example.keys()
    assert answer["label"] == example["label"]
    assert answer["score"] == pytest.approx(example["score"], abs=0.1)
    for key in ("probabilities", "model"):
        assert answer[key].keys() == example[key].keys()
    query = next(shlex.split(command)[2] for command in COMMANDS if command.startswith("sqlite3"))
    code = "import sqlite3, sys; print(len(sqlite3.connect('.data/requests.sqlite3').execute(sys.argv[1]).fetchall()))"
    done = subprocess.run([sys.executable, "-c", code, query], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "9\n"


@pytest.mark.slow
def test_the_commands_run(served, tmp_path, run, ollama_host):
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/.data/requests.sqlite3"}
    environment |= {"MODEL_DIR": str(run), "OLLAMA_HOST": ollama_host}
    (tmp_path / "comments.csv").write_text("text\nsuch a comment\n")
    (tmp_path / "comments.txt").write_text("such a comment\n")
    ran = 0
    for command in COMMANDS:
        if command.startswith(".venv/bin/hatespeech") and command not in RUN_ELSEWHERE:
            command = command.replace(".venv/bin/hatespeech", f"{sys.executable} -m hatespeech.cli").replace(
                "> ", f"> {tmp_path}/"
            )
            command = command.replace(" comments.txt", f" {tmp_path}/comments.txt")
            command = re.sub(r"(\w+)\.csv (\w+)\.csv", rf"{tmp_path}/\1.csv {tmp_path}/\2.csv", command)
            subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, check=True, capture_output=True)
            ran += 1
    assert ran == 8
    assert "such a comment," in (tmp_path / "classified.csv").read_text()


def test_train_commands_parse():
    parsed = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "train"] and "--help" not in words:
            assert isinstance(train.parse(words[3:]), train.Settings)
            parsed += 1
    assert parsed == 6
    done = subprocess.run(
        [sys.executable, "-m", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for flag in ("--model", "--dataset", "--also", "--output", "--epochs", "--gate", "--evaluate-only"):
        assert flag in done.stdout


def interval(found: dict) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def stored(name: str) -> dict:
    return json.loads((RUN / name).read_text())


WORDS = " ".join(README.split())
TABLE = {
    "always the commonest class": "majority_class",
    "the base, untrained": "zero_shot",
    "TF-IDF + logistic regression, same rows": "tfidf_logistic_regression",
    "the same, calibrated as the model below is": "tfidf_calibrated",
    "**shipped: SmolLM2-135M, as served**": "as_served",
}
COLUMNS = ("accuracy", "macro_f1", "pearson_r", "roc_auc_hate", "expected_calibration_error")


@pytest.mark.parametrize("shown", TABLE)
def test_every_figure_of_the_table_was_measured(shown):
    measured = stored("metrics.json")["test"][TABLE[shown]]
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {shown} |")]
    values = [measured[metric]["value"] for metric in COLUMNS]
    assert [cell.strip() for cell in line.split("|")[2:7]] == [
        "-" if value is None else f"{value:.3f}" for value in values
    ]


def test_every_other_figure_of_how_good_it_is_was_measured():
    metrics, settings = stored("metrics.json"), stored("settings.json")
    for metric in COLUMNS:
        assert interval(metrics["test"]["as_served"][metric]) in WORDS, metric
    differences = metrics["test_differences"]["as_served"]
    assert differences["baseline"] == "tfidf_calibrated"
    for metric in COLUMNS[:4]:
        found = differences["metrics"][metric]
        shown = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}, p = {found['p']:.3f})"
        assert shown in WORDS, metric
    functional, annotators = metrics["functional"]["as_served"], metrics["test_annotators"]["as_served"]
    assert f"of {functional['accuracy_hate']['n']} short texts" in WORDS
    for found in (functional["accuracy_hate"], functional["accuracy"], annotators["annotator"], annotators["model"]):
        assert interval(found) in WORDS
    worst = (
        f"{row['kind'].replace('_', ' ')} {row['accuracy_hate']['value']:.2f}" for row in functional["by_kind"][:4]
    )
    assert f"The worst kinds: {', '.join(worst)}." in WORDS
    for name in ("dynahate_dev", "hatemojibuild_dev"):
        found = stored(f"evaluations/{name}.json")["as_served"]
        assert re.search(rf"{found['accuracy_hate']['value']:.3f} (right )?of {found['n']:,} ", WORDS), name
    comments = settings["data"]["comments"]
    assert f"On {comments['test']:,} comments of MHS" in WORDS
    assert f"{comments['train']:,} comments: MHS's own" in WORDS
    assert f"calibrated on {comments['validation']:,} validation comments" in WORDS
    assert settings["command"].replace("results/smollm2-135m", "results/again") in COMMANDS


def test_what_the_hard_cases_cost_was_measured():
    tries = pd.read_csv(RUN / "tries.csv")
    alike = tries[(tries["members"] == 3) & (tries["learning_rate"] == 0.002) & (tries["normal_form"] == "1")]
    (half,), (whole,) = (
        alike[alike["also"] == f"hatemojibuild {weight} dynahate {weight}"].to_dict("records")
        for weight in ("0.5", "1")
    )
    assert f"{half['roc_auc_hate']:.3f} against {whole['roc_auc_hate']:.3f}" in WORDS
    assert f"{whole['functional']:.2f} against {half['functional']:.2f}" in WORDS


def thresholds_table() -> str:
    lines = ["| at least | comments | precision | recall |", "| ---: | ---: | ---: | ---: |"]
    for row in stored("calibration.json")["thresholds"][1::2]:
        lines.append(f"| {row['threshold']:.1f} | {row['n']:,} | {row['precision']:.2f} | {row['recall']:.2f} |")
    return "\n".join(lines)


def test_perspectives_thresholds_are_those_of_the_calibration():
    assert thresholds_table() in README


def test_every_speed_was_measured():
    stored = json.loads((ROOT / "results" / "benchmarks" / "serving.json").read_text())
    rate = {(row["path"], row["clients"]): f"{row['requests_per_s']:.1f}" for row in stored["rows"]}
    assert f"answers {rate['app', 1]} requests a second, one client at a time" in WORDS
    assert f"directly {rate['ollama', 1]}. With 4 clients it is {rate['app', 4]} and {rate['ollama', 4]}" in WORDS
    assert f"with 16 {rate['app', 16]} and {rate['ollama', 16]}" in WORDS
    more_ms = next(row["more_ms"] for row in stored["rows"] if (row["path"], row["clients"]) == ("app", 1))
    assert f"HTTP take {more_ms:.0f} ms" in WORDS
    total_ms, prompt_ms = stored["profile"]["total_ms"], stored["profile"]["prompt_eval_ms"]
    assert f"Of the {total_ms:.0f} ms that a new text takes Ollama, {prompt_ms:.0f} go" in WORDS
    before, now = stored["engines"][::2], stored["engines"][1::2]
    ratios = [f"{b['requests_per_s'] / a['requests_per_s']:.2f}" for a, b in zip(before, now, strict=True)]
    assert f"answers {ratios[0]} times as many requests as 0.24 with one client, {ratios[1]} times with four" in WORDS
    assert now[0]["path"] == f"ollama {stored['ollama_version']}"


def test_every_training_speed_was_measured():
    stored = json.loads((ROOT / "results" / "benchmarks" / "training.json").read_text())
    measured = {(row["recipe"], row["workload"]): row["rows_per_s"] for row in stored["rows"]}
    shown = {
        "| unsloth's notebooks": "unsloth notebook",
        "| TRL + PEFT": "TRL + PEFT + bitsandbytes",
        "| unsloth + SFTTrainer": "unsloth + SFTTrainer, tuned",
        "| **`python -m train`": "ours",
        "| the same, all but 22 GB": "ours, in 22 GB",
    }
    for start, recipe in shown.items():
        (line,) = [line for line in README.splitlines() if line.startswith(start)]
        for cell, workload in zip(line.split("|")[2:4], ("SmolLM2-135M", "Mistral-7B"), strict=True):
            if cell.strip() != "-":
                figure = measured[recipe, workload]
                assert cell.strip(" *") == (f"{figure:.1f}" if figure < 10 else f"{figure:,.0f}")


def test_the_speed_of_two_gpus_was_measured():
    stored = json.loads((ROOT / "results" / "benchmarks" / "several_gpus.json").read_text())
    assert f"{stored['Mistral-7B shape']['speed_up']:.2f} times as fast as one" in WORDS


def test_every_bulk_speed_was_measured():
    stored = json.loads((ROOT / "results" / "benchmarks" / "bulk.json").read_text())
    for device in ("cpu", "gpu"):
        for row in stored[device]["rows"]:
            figure = row["texts_per_s"]
            shown = f"{figure:.1f}" if figure < 100 else f"{figure:,.0f}"
            assert re.search(rf"\| {re.escape(row['way'])} .*\| \**{re.escape(shown)}\** \|", README), row


def test_the_reports_speed_was_measured():
    stored = json.loads((ROOT / "results" / "benchmarks" / "reporting.json").read_text())
    assert stored["requests"] == 1_000_000
    seconds = {row["database"]: row["report_s"] for row in stored["rows"]}
    words = " ".join(README.split())
    assert f"takes {seconds['sqlite']:.2f} s in SQLite and {seconds['postgresql']:.2f} s in PostgreSQL" in words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bulk", "reporting", *(pytest.param(name, marks=pytest.mark.long) for name in ("full_size", "tries"))]
)
def test_the_other_benchmarks_run_quickly(name, tmp_path):
    options = {"tries": ["--quick", "--output", str(tmp_path)], "reporting": ["--rows", "2000"]}
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options.get(name, ["--quick"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
def test_the_training_benchmark_runs_quickly_on_a_cpu():
    command = [sys.executable, "-m", "tests.benchmarks.training", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("tiny")]
    assert len(lines) == 3
    print(done.stdout)


def test_every_module_is_in_the_tour_of_its_wing():
    tour = (ROOT / "docs" / "how-it-is-built.md").read_text().split("\n## ")
    for folder, wing in {"": "The ground floor", "training": "Training", "serving": "Serving", "bulk": "Bulk"}.items():
        (described,) = [part for part in tour if part.startswith(wing)]
        modules = {path.name for path in (ROOT / "hatespeech" / folder).glob("[a-z]*.py")}
        assert set(re.findall(r"^\| `(\w+\.py)` \|", described, re.MULTILINE)) == modules


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(PAGES[0].read_text().splitlines()) <= 200
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_environment_yml_is_the_train_extra():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert listed == ["-e .", *extras["train"]]


def test_what_bulk_shares_with_training_is_pinned_alike():
    """Looser, pip tries the newest first and goes back and forth for minutes."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [{re.split("[=<>[]", requirement)[0] for requirement in extras[extra]} for extra in ("bulk", "train")]
    assert {"torch", "transformers"} < set.intersection(*names)
    for requirement in extras["bulk"]:
        assert requirement in extras["train"] or requirement.startswith("ray")


def test_top_level_is_as_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    agreed = {
        *("train.py", "app.py", "bootstrap.sh", "environment.yml", "Modelfile", "notebooks", "results", "tests"),
        *("README.md", "pyproject.toml", "LICENSE", "hatespeech", "docs", "compose.yaml", "Dockerfile"),
    }
    assert {name.split("/")[0] for name in tracked.split()} - agreed <= {".gitignore", ".ci", ".dockerignore"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exploration", "results"])
def test_notebooks_run(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    assert any(cell.get("outputs") for cell in notebook.cells)  # stored as they ran
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()

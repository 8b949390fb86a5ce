"""Training that is stopped, killed, out of disk or spread over processes ends as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from hatespeech import runs
from hatespeech.training import checkpoint, checks
from tests.benchmarks.exactness import SHAPE, random_base
from tests.conftest import ROOT, TRAIN
from tests.training.test_checks import SMALL


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> str:
    return random_base(tokenizer, str(tmp_path_factory.mktemp("base")), **SHAPE)


@pytest.fixture(scope="module")
def arguments(base, tmp_path_factory) -> list[str]:
    """Of two members, so that a run can be stopped in either."""
    folder = tmp_path_factory.mktemp("rows")
    pd.read_parquet(TRAIN)[:400].to_csv(folder / "some.csv", index=False)
    pd.DataFrame(SMALL, columns=checks.COLUMNS).to_csv(folder / "checks.csv", index=False)
    settings = {"model": base, "dataset": folder / "some.csv", "functional": folder / "checks.csv", "members": 2}
    settings |= {"batch-size": 8, "max-steps": 40, "learning-rate": 3e-3, "checkpoint-every-s": 0}
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def start(arguments: list[str], output: Path, *launcher: str) -> subprocess.Popen:
    """Without Ollama on the PATH: this is about training alone."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [*(launcher or (sys.executable,)), "-m", "train", *arguments, "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return output


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(arguments, folder))
    return folder


def weights(run: Path) -> torch.Tensor:
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([adapter[name].flatten() for name in sorted(adapter)])


def wait_for_checkpoint(path: Path, after: float) -> None:
    while not path.exists() or path.stat().st_mtime <= after:
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_then_kill_9_then_the_same_result(arguments, whole, tmp_path):
    """To the bit: adapter and metrics."""
    folder = tmp_path / "run"
    saved = tmp_path / "run.incomplete" / runs.checkpoint_name(0)
    of_the_second = saved.with_name(runs.checkpoint_name(1))
    first = start(arguments, folder)
    wait_for_checkpoint(saved, 0)
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "train: stopped. The same command goes on from the last checkpoint" in errors
    assert "Traceback" not in errors

    second = start(arguments, folder)
    wait_for_checkpoint(of_the_second, 0)
    second.kill()
    second.wait()
    assert not folder.exists()

    output = finish(start(arguments, folder))
    assert "resumed from step 40, which" in output
    assert output.count("resumed from step ") == 2
    assert torch.equal(weights(folder), weights(whole))
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert not list(folder.glob("checkpoint*"))
    training = json.loads((folder / "settings.json").read_text())["training"]
    assert (training["members"], training["steps"], training["rows"]) == (2, 2 * 40, 2 * 40 * 8)
    assert 0 < training["update_lost_by_the_rank"] < 0.5


@pytest.mark.slow
def test_two_processes_train_what_one_does(arguments, whole, tmp_path):
    """torchrun, gloo: the gradients' sums differ in their order alone. One process writes and prints."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    output = finish(start(arguments, tmp_path / "run", *launcher))
    assert output.count("is complete. Serve it") == 1
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["training"]["processes"] == 2
    one, two = weights(whole), weights(tmp_path / "run")
    print(f"adapters of one and two processes differ by {(one - two).norm() / one.norm():.1e} of their norm")
    assert (one - two).norm() / one.norm() < 1e-3
    one, two = (json.loads((run / "metrics.json").read_text())["test"]["torch"] for run in (whole, tmp_path / "run"))
    assert one["accuracy"]["value"] == pytest.approx(two["accuracy"]["value"], abs=0.04)  # a comment of 30


EACH_PROCESS = """
import sys, torch
from pathlib import Path
from torch import distributed
from transformers import AutoModelForCausalLM
from hatespeech.training import processes
with processes.joined() as rank:
    folder = Path(sys.argv[2], str(rank))
    AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(folder)
    assert any(folder.glob("*.safetensors")), "as a .gguf base is made ready, in each process"
    processes.connect()
    if rank == 1:
        raise SystemExit("process 1 can't go on")
    distributed.all_reduce(torch.zeros(1))
"""


def test_where_one_process_fails_all_end(base, tmp_path):
    """The others wait for it, and would for ever. Each has written its files before."""
    (tmp_path / "each.py").write_text(EACH_PROCESS)
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "each.py"), base, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "process 1 can't go on" in done.stderr
    assert [any((tmp_path / rank).glob("*.safetensors")) for rank in "01"] == [True, True]


def progress(path: Path, key: str = "a run") -> checkpoint.Checkpoint:
    weights = [torch.zeros(1000, requires_grad=True)]
    return checkpoint.Checkpoint(path, key, weights, [torch.optim.AdamW(weights)])


def test_what_was_saved_is_gone_on_from(tmp_path):
    done = progress(tmp_path / "checkpoint.pt")
    done.step, done.rows, done.seconds, done.losses = 7, 56, 1.5, [torch.tensor(2.0)] * 7
    done.weights[0].data += 3
    assert done.save() is None
    again = progress(tmp_path / "checkpoint.pt")
    again.resume()
    assert (again.step, again.rows, again.seconds, len(again.losses)) == (7, 56, 1.5, 7)
    assert np.array_equal(again.weights[0].detach(), done.weights[0].detach())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_runs_checkpoint_is_said_and_left_aside(tmp_path, capsys):
    done = progress(tmp_path / "checkpoint.pt")
    done.step, done.losses = 7, [torch.tensor(2.0)]
    done.save()
    other = progress(tmp_path / "checkpoint.pt", key="other settings")
    other.resume()
    assert other.step == 0
    assert "is of other settings, data or code: starting from nothing" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk's."""
    code = (
        "import resource, sys, torch; from pathlib import Path; from tests.training.test_checkpoint import progress\n"
        "done = progress(Path(sys.argv[1]) / 'checkpoint.pt')\n"
        "done.step, done.losses = 1, [torch.tensor(2.0)]\n"
        "assert done.save() is None\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "done.step = 2\n"
        "print(done.save())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "step 2 could not be saved" in done.stdout
    assert "the last good one stays" in done.stdout
    again = progress(tmp_path / "checkpoint.pt")
    again.resume()
    assert again.step == 1


def test_signals_ask_to_stop_and_a_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with checkpoint.stop_asked() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

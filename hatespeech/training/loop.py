"""The training loop: batches of packed prompts, exact gradients, steps that can be stopped and resumed.

Read Loop.run first. One step is: take a batch, add up its gradients piece by piece (Loop.backward), sum them over the
processes (processes.py), clip, and let AdamW step. The pieces are as large as the memory allows, so the batch size
never depends on the GPU. On a CUDA GPU a piece is computed as a CUDA graph (gpu.py).
"""

import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hatespeech import UserError, packing
from hatespeech.training import gpu, processes, tuning
from hatespeech.training.checkpoint import Checkpoint, stop_asked


def fit(
    classifier: tuning.Classifier,
    prompts: Sequence[list[int]],
    targets: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 60.0,
) -> dict:
    """Train the LoRA on what is known of the classes; return seconds, rows/s, peak memory (GB), the loss's curve.

    targets: (n, 4), data.targets' weights of each prompt's events. The loss is their negative log-probability over the
    whole vocabulary at the label position, its mean over the batch. AdamW, linear warm-up over 5 % of the steps, then a
    cosine to 0.

    checkpoint: a file, written as often as said, at the end, and when SIGINT or SIGTERM asks to stop, which then raises
    KeyboardInterrupt. Where it holds a run of these very arguments, training is resumed from it.
    Raises UserError where the GPU's memory can't hold one row, or the loss is no finite number.
    """
    processes.connect()
    lora = classifier.model.peft_config["default"]
    settings = (lora.base_model_name_or_path, lora.r, lora.lora_alpha, steps, batch_size, learning_rate, seed)
    optimization = Optimization(classifier.model, steps, learning_rate)
    progress = Checkpoint(
        checkpoint, _digest(settings, prompts, targets), optimization.weights, optimization.with_state()
    )
    progress.resume()
    loop = Loop(classifier, prompts, targets, batch_size, optimization, progress)
    loop.run(steps, seed, checkpoint_every_s)
    return loop.summary(steps)


class Optimization:
    """What turns gradients into a step: AdamW, its schedule, and the scaler."""

    def __init__(self, model, steps: int, learning_rate: float):
        import torch
        from transformers import get_cosine_schedule_with_warmup

        cuda = torch.cuda.is_available()
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)  # it stays where it is: a CUDA graph adds to this very memory
        self.adamw = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=0.0, fused=cuda)
        self.schedule = get_cosine_schedule_with_warmup(self.adamw, round(0.05 * steps), steps)
        # float16 needs its gradients scaled. With bfloat16 the scaler is there for what else it does: a step whose
        # gradients are no finite numbers, as now and then one's are, is left out.
        scale = 65536.0 if cuda and tuning.half_precision() == torch.float16 else 1.0
        self.scaler = torch.amp.GradScaler("cuda", init_scale=scale, enabled=cuda)

    def with_state(self) -> list:
        """What a checkpoint must hold beside the weights."""
        return [self.adamw, self.schedule, self.scaler]

    def step(self) -> None:
        """One step by the gradients, which are 0 after it."""
        import torch

        self.scaler.unscale_(self.adamw)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.schedule.step()
        self.forget()

    def forget(self) -> None:
        """Set the gradients to 0, in place."""
        self.adamw.zero_grad(set_to_none=False)


class Loop:
    """The steps of one training, with the progress they have made (a Checkpoint)."""

    def __init__(
        self,
        classifier: tuning.Classifier,
        prompts: Sequence[list[int]],
        targets: np.ndarray,
        batch_size: int,
        optimization: Optimization,
        progress: Checkpoint,
    ):
        self.classifier, self.prompts, self.targets = classifier, prompts, targets
        self.batch_size, self.optimization, self.progress = batch_size, optimization, progress
        self.rank, self.world_size = processes.rank_and_size()
        self.device = optimization.weights[0].device
        classifier.model.train()
        self.compute, self.rows_per_piece = self._way_to_compute()

    def run(self, steps: int, seed: int, checkpoint_every_s: float) -> None:
        """Make the steps that are missing. Raises KeyboardInterrupt where a signal asked to stop before the last."""
        progress = self.progress
        batches = _batches(len(self.prompts), self.batch_size, seed, skip=progress.step)
        with stop_asked() as stop, Display(progress, steps, visible=self.rank == 0) as display:
            while progress.step < steps and not stop:
                rows = next(batches)
                loss = self._backward_in_memory(rows, display)
                if self.world_size > 1:
                    loss, asked = processes.sum_gradients(self.optimization.weights, loss, bool(stop))
                    # All processes stop after the same step, whichever of them was asked.
                    stop += [signal.SIGTERM] * asked
                self.optimization.step()
                progress.add(loss, len(rows))
                is_last = progress.step == steps or bool(stop)
                display.update(at_once=is_last)
                due = is_last or time.monotonic() - progress.saved_at > checkpoint_every_s
                if due and self.rank == 0 and (failure := progress.save()):
                    display.write(failure)
        if progress.step < steps:
            raise KeyboardInterrupt

    def backward(self, rows: np.ndarray):
        """Add this process's share of the batch to the gradients; its share of the loss, a tensor of no dimensions."""
        import torch

        mine = rows[self.rank :: self.world_size]
        total = torch.zeros((), device=self.device)
        if len(mine) == 0:
            return total
        for piece in tuning.pieces(self.classifier, [self.prompts[row] for row in mine]):
            arrays = tuning.inputs_of(self.classifier, piece)
            arrays["goals"] = (self.targets[mine[piece.rows]] / len(rows)).astype(np.float32)
            # Every piece gets as many label positions, spare ones of no weight, so that fewer shapes come.
            spare = max(0, self.rows_per_piece - len(piece.rows))
            arrays["ends"] = np.pad(arrays["ends"], (0, spare))
            arrays["goals"] = np.pad(arrays["goals"], ((0, spare), (0, 0)))
            total += self.compute(arrays)
        return total

    def summary(self, steps: int) -> dict:
        """What the run reports of its training."""
        import torch

        progress, losses = self.progress, torch.stack(self.progress.losses)
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None
        return {
            "steps": steps,
            "rows": progress.rows,
            "seconds": round(progress.seconds, 2),
            "rows_per_s": round(progress.rows / max(progress.seconds, 1e-9), 1),
            "processes": self.world_size,
            "tokens_at_once": self.classifier.tokens_at_once,
            "peak_memory_gb": peak,
            "steps_left_out": int((~losses.isfinite()).sum()),
            "last_loss": round(losses[-max(1, steps // 10) :].nanmean().item(), 4),
            "curve": {
                "rows": np.linspace(0, progress.rows, steps + 1)[1:].astype(int),
                "loss": losses.tolist(),
            },
        }

    def _way_to_compute(self) -> tuple[Callable[[dict], object], int]:
        """How a piece is computed, and to how many label positions it is filled up: graphs need few shapes."""
        import torch

        def eagerly(arrays: dict):
            return self._one_pass(packing.all_to_device(arrays, self.device))

        if not torch.cuda.is_available():
            return eagerly, 0
        recomputed = _fit_memory(self.classifier, self.prompts, self.optimization.weights)
        torch.cuda.reset_peak_memory_stats()
        if torch.cuda.device_count() > 1:
            print("this process sees several GPUs: no CUDA graphs, which is slower (set CUDA_VISIBLE_DEVICES=0)")
            return eagerly, 0
        if recomputed:  # no graph holds activations that are computed twice
            return eagerly, 0
        return gpu.Graphs(self._one_pass), -(-self.batch_size // self.world_size)

    def _one_pass(self, tensors: dict):
        """Forward and backward over one piece: adds to the gradients, returns the loss."""
        goals = tensors.pop("goals")
        loss = -(goals * tuning.event_logprobs(tuning.forward(self.classifier, **tensors))).sum()
        self.optimization.scaler.scale(loss).backward()
        return loss.detach()

    def _backward_in_memory(self, rows: np.ndarray, display: "Display"):
        """backward, in smaller pieces where others took of the GPU's memory meanwhile."""
        import torch

        while True:
            try:
                return self.backward(rows)
            except torch.cuda.OutOfMemoryError:
                self.optimization.forget()  # of the pieces that were computed before
                in_use = sum(len(self.prompts[row]) for row in rows)
                display.write(_halve(self.classifier, in_use))


class Display:
    """The progress bar. It shows the loss once a second, since reading the loss waits for the GPU."""

    def __init__(self, progress: Checkpoint, steps: int, visible: bool):
        from tqdm.auto import tqdm

        self.progress, self.rows_before = progress, progress.rows
        self.started = self.shown = time.monotonic()
        self.bar = tqdm(
            total=steps, initial=progress.step, desc="training", unit="step", mininterval=1.0, disable=not visible
        )

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def write(self, line: str) -> None:
        self.bar.write(line)

    def update(self, at_once: bool) -> None:
        """One step more. Raises UserError where the last losses are no finite numbers."""
        import torch

        self.bar.update()
        if time.monotonic() - self.shown <= 1 and not at_once:
            return
        progress = self.progress
        recent = torch.stack(progress.losses[-20:]).nanmean().item()
        now = time.monotonic()
        progress.seconds += now - self.shown
        self.shown = now
        rate = (progress.rows - self.rows_before) / (now - self.started)
        self.bar.set_postfix(loss=f"{recent:.3f}", rows_per_s=f"{rate:.0f}")
        if not np.isfinite(recent):
            raise UserError(f"the loss is {recent} at step {progress.step}: try a smaller --learning-rate")


def _batches(n: int, batch_size: int, seed: int, skip: int) -> Iterator[np.ndarray]:
    """Row numbers, shuffled anew in each epoch, without end; the first `skip` batches left out."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            if skip:
                skip -= 1
            else:
                yield order[start : start + batch_size]


def _fit_memory(classifier: tuning.Classifier, prompts: Sequence[list[int]], weights: list) -> bool:
    """Set tokens_at_once to what the GPU's memory holds; whether activations are then computed twice."""

    def run(tokens: int) -> int:
        classifier.tokens_at_once = tokens
        piece = next(tuning.pieces(classifier, prompts[: tokens // 16]))
        tuning.label_logprobs(classifier, piece).sum().backward()
        return piece.ids.size

    longest = min(gpu.MAX_TOKENS_AT_ONCE, max(1024, *map(len, prompts)))
    classifier.tokens_at_once, recomputed = gpu.tokens_that_fit(run, classifier.model, weights, longest)
    return recomputed


def _halve(classifier: tuning.Classifier, in_use: int) -> str:
    """Half as many tokens at once from here on, after the GPU ran out of memory; what to tell the user."""
    import torch

    if classifier.tokens_at_once <= packing.BLOCK:
        raise UserError("the GPU's memory can't hold one row: choose a smaller base with --model") from None
    torch.cuda.empty_cache()
    classifier.tokens_at_once = max(packing.BLOCK, min(classifier.tokens_at_once, in_use) // 2)
    return f"out of GPU memory: training continues with {classifier.tokens_at_once:,} tokens at once"


def _digest(*values: object) -> str:
    """sha256 that names a run by its base, settings and data."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()

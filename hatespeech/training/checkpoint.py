"""A training run's progress on disk, so that nothing but the last seconds is lost when it is stopped or killed."""

import io
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Checkpoint:
    """What training has reached: weights, optimizer, step, seconds and losses.

    path: the file, or None to keep none. key: names the run; a file of another key is not gone on from.
    weights: list of tensors, changed in place by resume. states: objects with state_dict(), e.g. the optimizer.
    """

    def __init__(self, path: Path | None, key: str, weights: list, states: list):
        self.path, self.key, self.weights, self.states = path, key, weights, states
        self.step, self.rows, self.seconds, self.losses = 0, 0, 0.0, []
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the file, if it is there and of this run. Under torchrun, process 0 reads it for all."""
        import torch
        from torch import distributed

        stored = [None]
        if self.path and self.path.exists():
            stored = [torch.load(self.path, map_location="cpu", weights_only=True)]
            if stored[0]["key"] != self.key:
                print(f"{self.path} is of other settings, data or code: starting from nothing")
                stored = [None]
        if distributed.is_initialized():
            distributed.broadcast_object_list(stored)
        if stored[0] is None:
            return
        with torch.no_grad():
            for weight, value in zip(self.weights, stored[0]["weights"], strict=True):
                weight.copy_(value)
        for state, value in zip(self.states, stored[0]["states"], strict=True):
            state.load_state_dict(value)
        self.step, self.rows, self.seconds = (stored[0][name] for name in ("step", "rows", "seconds"))
        self.losses = list(stored[0]["losses"].to(self.weights[0].device))
        print(f"resumed from step {self.step}, which {self.path} holds")

    def add(self, loss, n_rows: int) -> None:
        """One step more. loss: a tensor of no dimensions."""
        self.losses.append(loss)
        self.step += 1
        self.rows += n_rows

    def save(self) -> str | None:
        """Replace the file by the present state, whole or not at all; what went wrong, where the disk is at fault.

        A full disk must not end a long training: the last good checkpoint stays, and the next save may succeed.
        """
        import torch

        self.saved_at = time.monotonic()
        if self.path is None:
            return None
        buffer = io.BytesIO()
        state = {"key": self.key, "step": self.step, "rows": self.rows, "seconds": self.seconds}
        state |= {"losses": torch.stack(self.losses).cpu(), "states": [state.state_dict() for state in self.states]}
        torch.save(state | {"weights": [weight.detach().cpu() for weight in self.weights]}, buffer)
        part = self.path.with_name(self.path.name + ".part")
        try:
            with open(part, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            return f"step {self.step} could not be saved to {self.path} ({error.strerror}); the last good one stays"
        return None


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """The signals that asked to stop since: SIGINT (Ctrl-C), SIGTERM. A second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def note(number: int, _frame) -> None:
        if number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

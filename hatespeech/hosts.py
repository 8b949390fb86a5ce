"""Several Ollama servers as one: the least busy that is well is asked first, one that fails is left out for a while.

A text whose server dies is asked of another, so its caller notices nothing but the time.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from hatespeech.ollama import Ollama, OllamaError, Prediction, TextTooLong

# After a failure a server is asked again only where no other is left, or after so many seconds.
LEFT_OUT_S = 5.0
T = TypeVar("T")


class Hosts:
    """Servers of one model, which each must have. Safe to share between threads."""

    def __init__(self, servers: list[Ollama]):
        self.servers, self.model = servers, servers[0].model
        self._lock = threading.Lock()
        self._busy, self._failed_at = [0] * len(servers), [float("-inf")] * len(servers)

    def ask(self, text: str) -> tuple[Prediction, str, str]:
        """Ollama.ask of the first that answers. Raises the last one's OllamaError where none does."""
        return self._first(lambda server: server.ask(text))

    def digest(self) -> str:
        """Ollama.digest of the first that answers."""
        return self._first(Ollama.digest)

    def model_served(self) -> tuple[str, str]:
        """Ollama.model_served of the first that answers."""
        return self._first(Ollama.model_served)

    def health(self) -> dict[str, str]:
        """`OK` or what is wrong, by the servers' URLs. Asks them all, so that one that is back is known to be.

        Raises the last one's OllamaError where none is well.
        """
        found = {}
        for number, server in enumerate(self.servers):
            try:
                server.version()
                server.model_served()
                server.check_loaded()
                found[server.url], self._failed_at[number] = "OK", float("-inf")
            except OllamaError as error:
                found[server.url], self._failed_at[number], last = str(error), time.monotonic(), error
        if "OK" not in found.values():
            raise last
        return found

    def _first(self, call: Callable[[Ollama], T]) -> T:
        tried: set[int] = set()
        while True:
            with self._lock:
                left = [number for number in range(len(self.servers)) if number not in tried]
                number = min(left, key=lambda number: (self._is_left_out(number), self._busy[number]))
                self._busy[number] += 1
            tried.add(number)
            try:
                answer = call(self.servers[number])
                self._failed_at[number] = float("-inf")
                return answer
            except TextTooLong:  # the text's fault, which another server would find as well
                raise
            except OllamaError:
                self._failed_at[number] = time.monotonic()
                if len(tried) == len(self.servers):
                    raise
            finally:
                with self._lock:
                    self._busy[number] -= 1

    def _is_left_out(self, number: int) -> bool:
        return time.monotonic() - self._failed_at[number] < LEFT_OUT_S

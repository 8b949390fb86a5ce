"""For Python: `from hatespeech import Classifier`.

    classifier = Classifier()    # asks the Ollama at OLLAMA_HOST, as ./bootstrap.sh leaves it
    classifier = Classifier(service="http://localhost:5000", api_key=KEY)    # asks the service, which logs each text
    classifier = Classifier("results/mine", torch=True)    # computes here: pip install '.[bulk]'

    classifier.classify("some text").label    # Hate, Neutral or Supportive
    classifier.classify(["some text", "another"])    # a list of verdicts
    for verdict in classifier.classify(open("comments.txt")):    # what is neither a text nor a list is streamed
        print(verdict.by_label["Hate"], verdict.flagged, verdict.abstain)

All give the service's answers. Nothing is logged but by the service.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

import requests

from hatespeech import UserError, runs, task
from hatespeech.answers import Verdict, verdicts
from hatespeech.calibration import Calibration
from hatespeech.hosts import Hosts
from hatespeech.ollama import Ollama, TextTooLong

SHIPPED = Path(__file__).parents[1] / "results" / "smollm2-135m"
# Of a stream, so many texts are asked or computed at once.
AT_ONCE = {"ollama": 4, "service": 4, "torch": 1024}


class Classifier:
    """Verdicts (answers.Verdict: label, probabilities, score, confidence, abstain, flagged) on texts.

    run: the folder of the model; not needed where a service is asked. ollama: hosts that serve it, separated by
    commas; OLLAMA_HOST without. service: a service's URL instead, with its api_key where it demands one. torch: compute
    here instead. flag_above: the P(Hate) from which on a text is flagged, where it is not to be the calibration's.
    Raises UserError where there is no such run, or torch is asked for and not installed.
    """

    def __init__(
        self,
        run: str | Path = SHIPPED,
        *,
        ollama: str | None = None,
        service: str | None = None,
        api_key: str | None = None,
        torch: bool = False,
        flag_above: float | None = None,
        timeout_s: float = 60.0,
    ):
        if sum((ollama is not None, service is not None, torch)) > 1:
            raise UserError("a Classifier asks Ollama, or a service, or computes with torch: one of them")
        self._flag_above, self._timeout_s = flag_above, timeout_s
        self._engine = "service" if service is not None else "torch" if torch else "ollama"
        if service is not None:
            self._verdicts = self._of_service(service.rstrip("/"), api_key)
            return
        run = Path(run)
        settings = runs.read_settings(run)
        self._class_scores, self._calibration = settings["class_scores"], Calibration.of_run(run)
        if torch:
            self._verdicts = self._of_torch(run)
        else:
            hosts = ollama if ollama is not None else os.environ.get("OLLAMA_HOST", "")
            self._verdicts = self._of_ollama(hosts, runs.model_name(run), tuple(settings["label_tokens"]))

    @overload
    def classify(self, texts: str) -> Verdict: ...
    @overload
    def classify(self, texts: list[str]) -> list[Verdict]: ...
    @overload
    def classify(self, texts: Iterable[str]) -> Iterator[Verdict]: ...
    def classify(self, texts):
        """A verdict on a text, a list of them on a list, or a stream of them on anything else that yields texts.

        Raises ValueError for what the service would refuse (no text, a NUL in it, too long), by its number in the list;
        OllamaError or requests' exceptions where nobody answers.
        """
        if isinstance(texts, str):
            return next(self._stream([texts]))
        stream = self._stream(texts)
        return list(stream) if isinstance(texts, list) else stream

    def _stream(self, texts: Iterable[str]) -> Iterator[Verdict]:
        numbered = enumerate(texts)
        while some := list(itertools.islice(numbered, AT_ONCE[self._engine])):
            for number, text in some:
                if reason := task.text_error(text):
                    raise ValueError(f"text {number}: {reason}")
            yield from self._verdicts([text for _, text in some])

    def _of_ollama(self, hosts: str, model: str, tokens: tuple[str, ...]) -> Callable[[list[str]], list[Verdict]]:
        servers = Hosts([Ollama(host.strip(), model, tokens, self._timeout_s) for host in hosts.split(",")])

        def one(text: str) -> Verdict:
            prediction, _, weights_sha256 = servers.ask(text)
            calibration, _ = Calibration.for_weights(self._calibration, weights_sha256)
            return verdicts([prediction.probabilities], calibration, self._class_scores, self._flag_above)[0]

        return _in_threads(one)

    def _of_service(self, url: str, api_key: str | None) -> Callable[[list[str]], list[Verdict]]:
        session = requests.Session()
        session.headers.update({"Authorization": f"Bearer {api_key}"} if api_key else {})

        def one(text: str) -> Verdict:
            answered = session.post(f"{url}/infer", json={"text": text}, timeout=self._timeout_s)
            if answered.status_code in (400, 413):
                raise ValueError(answered.json()["detail"])
            answered.raise_for_status()
            found = answered.json()
            names = ("label", "score", "confidence", "abstain", "flagged")
            probabilities = tuple(found["probabilities"][label] for label in task.LABELS)
            return Verdict(probabilities=probabilities, **{name: found[name] for name in names})

        return _in_threads(one)

    def _of_torch(self, run: Path) -> Callable[[list[str]], list[Verdict]]:
        try:
            from hatespeech.bulk import scoring
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install '.[bulk]'") from error
        weights_sha256 = runs.sha256_of(scoring.weights_path(run))
        calibration, _ = Calibration.for_weights(self._calibration, weights_sha256)
        scorer = scoring.load(run, calibration)

        def several(texts: list[str]) -> list[Verdict]:
            probabilities = scorer.label_probabilities(texts)
            if (probabilities != probabilities).any():
                raise ValueError(str(TextTooLong()))
            return verdicts(probabilities, calibration, self._class_scores, self._flag_above)

        return several


def _in_threads(one: Callable[[str], Verdict]) -> Callable[[list[str]], list[Verdict]]:
    def several(texts: list[str]) -> list[Verdict]:
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(one, texts))

    return several

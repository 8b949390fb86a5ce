"""Classifier gives the service's answers, whatever computes them."""

import subprocess
import sys
import threading

import pytest
from werkzeug.serving import make_server

from hatespeech import Classifier, UserError
from hatespeech.answers import Verdict
from tests.conftest import ROOT, some_texts


@pytest.fixture
def service(client) -> str:
    """The service's URL."""
    listener = make_server("127.0.0.1", 0, client.application, threaded=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.port}"
    listener.shutdown()


def check_alike(found: list[Verdict], expected: list[Verdict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.06)
        assert one.score == pytest.approx(other.score, abs=0.3)
    assert sum(one.label == other.label for one, other in zip(found, expected, strict=True)) >= 0.99 * len(found)


def test_a_text_a_list_and_a_stream(service):
    classifier = Classifier(service=service)
    verdict = classifier.classify("I hope you all have a lovely day")
    assert (verdict.label, verdict.flagged, verdict.abstain) == ("Supportive", False, False)
    assert verdict.by_label["Supportive"] == max(verdict.probabilities) == verdict.confidence
    texts = ["I hope you all have a lovely day", "some text", "thank you"]
    listed = classifier.classify(texts)
    assert isinstance(listed, list)
    stream = classifier.classify(iter(texts))
    assert not isinstance(stream, list)
    check_alike(list(stream), listed)
    assert classifier.classify([]) == []


def test_what_the_service_would_refuse_is_a_value_error(service):
    classifier = Classifier(service=service)
    for texts, reason in (
        (" ", "there is no text"),
        (["a", "a\0b"], "text 1: the text holds a NUL"),
        ("a " * 9000, "too long"),
    ):
        with pytest.raises(ValueError, match=reason):
            classifier.classify(texts)


def test_what_can_not_be_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="one of them"):
        Classifier(service="http://localhost:5000", torch=True)
    with pytest.raises(UserError, match="is no finished run"):
        Classifier(tmp_path)


def test_ollama_gives_the_services_answers(run, server, ollama_host, service):
    texts = some_texts(30)
    check_alike(Classifier(run, ollama=ollama_host).classify(texts), Classifier(service=service).classify(texts))


@pytest.mark.train
@pytest.mark.parametrize("n_texts", [30, pytest.param(200, marks=pytest.mark.long)])
def test_torch_gives_the_services_answers(run, server, service, n_texts):
    texts = some_texts(n_texts)
    check_alike(Classifier(run, torch=True).classify(texts), Classifier(service=service).classify(texts))


def test_it_imports_in_under_a_second():
    code = "import time; t = time.monotonic(); from hatespeech import Classifier; print(time.monotonic() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    print("import Classifier:", min(float(run.stdout) for run in runs), "s")
    code = "from hatespeech import Classifier; import sys; print({'torch', 'flask', 'pandas'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"

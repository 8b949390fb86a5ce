"""The task: labels, cut points, prompt and decoding. Every other module takes these from here.

Pure standard library, so that the service and the training share them without sharing torch.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

from hatespeech.normal import FORM, normal_form

LABELS = ("Hate", "Neutral", "Supportive")
# Of some comments no more is known: Neutral or Supportive. No answer of the model is this.
NOT_HATE = "Not hate"

# The cut points of MHS's dataset card: above 0.5 is hate speech, below -1 counter or supportive speech.
HATE_ABOVE = 0.5
SUPPORTIVE_BELOW = -1.0
# The classes' mean scores in MHS, for expected scores where a run's own comments have none.
TYPICAL_SCORES = (1.42, -0.25, -2.84)

# Ollama's template syntax, since the Modelfile carries it to the letter. It ends at `[/INST]` with no space:
# the space belongs to the completion, where it fuses with the label's first letters into one token.
TEMPLATE = (
    "[INST] ### Instruction: Below is a short text that you need to classify into one of three classes: "
    "Hate / Neutral / Supportive.\n ### Text: {{ .Prompt }}\n ### Answer: [/INST]"
)
COMPLETIONS = tuple(f" {label}" for label in LABELS)

# Longest prompt, in tokens, that training and serving take: a longer text is refused by both, cut by neither.
CONTEXT_TOKENS = 2048

# A tokenizer reads these as control tokens wherever they stand: <|im_end|>, <s>, <start_of_turn>, [/INST] ...
_CONTROL_TOKEN = re.compile(r"<(?=[^<>\s]{1,40}>)|\[(?=/?[A-Z_]{2,40}\])")

# Changes whenever the words or the spelling-out change, so that a logged answer says which prompt gave it.
PROMPT_VERSION = hashlib.sha256((TEMPLATE + _CONTROL_TOKEN.pattern + FORM).encode()).hexdigest()[:12]


def label_of(score: float) -> str:
    """The label of a continuous MHS hate speech score."""
    if not math.isfinite(score):
        raise ValueError(f"a score must be a finite number, not {score}")
    if score > HATE_ABOVE:
        return "Hate"
    return "Supportive" if score < SUPPORTIVE_BELOW else "Neutral"


def spell_out(text: str) -> str:
    """The text with a space in every control token (`<|im_end|>` -> `< |im_end|>`), so that none is obeyed."""
    return _CONTROL_TOKEN.sub(lambda match: match.group() + " ", text)


def as_read(text: str) -> str:
    """The text as the model reads it, in training as in serving: its normal form, its control tokens spelled out."""
    return spell_out(normal_form(text))


def prompt(text: str) -> str:
    """The whole of what the model reads for a text."""
    return TEMPLATE.replace("{{ .Prompt }}", as_read(text))


def probabilities_from_logprobs(
    logprobs: Mapping[str, float], label_tokens: Sequence[str]
) -> tuple[float, float, float]:
    """Renormalise the log-probabilities of the first completion token over LABELS.

    logprobs: token text -> natural log-probability, for the most likely tokens of the vocabulary.
    label_tokens: the first token of each of COMPLETIONS in the model's tokenizer, in LABELS' order.
    A label that is not among the likely tokens is less likely than all of them: it gets the smallest log-probability
    given, an upper bound. None of the three there: ValueError, since the model was not trained for this prompt.
    """
    if not any(token in logprobs for token in label_tokens):
        raise ValueError(f"none of {', '.join(LABELS)} is among the {len(logprobs)} most likely first tokens")
    if not all(math.isfinite(value) for value in logprobs.values()):
        raise ValueError("a log-probability is no finite number")
    floor = min(logprobs.values())
    return softmax([logprobs.get(token, floor) for token in label_tokens])


def softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Probabilities of log-weights, computed without overflow."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return tuple(weight / sum(weights) for weight in weights)


def decide(probabilities: Sequence[float]) -> str:
    """The most probable label."""
    return LABELS[max(range(len(LABELS)), key=probabilities.__getitem__)]


def text_error(text: str | None) -> str:
    """Why a text can't be classified, in words that hold nothing of it; empty where it can."""
    if not normal_form(text or "").strip():
        return "there is no text"
    if "\0" in text:
        return f"the text holds a NUL character (at {text.index(chr(0))}), where Ollama would end it"
    return ""

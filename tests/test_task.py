import math

import pytest

from hatespeech import task


@pytest.mark.parametrize(
    ("score", "label"),
    [(0.51, "Hate"), (0.5, "Neutral"), (0.0, "Neutral"), (-1.0, "Neutral"), (-1.01, "Supportive"), (8, "Hate")],
)
def test_cut_points_of_the_dataset_card(score, label):
    assert task.label_of(score) == label


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_must_be_finite(score):
    with pytest.raises(ValueError, match="finite"):
        task.label_of(score)


def test_prompt_to_the_character():
    assert task.prompt("x y") == (
        "[INST] ### Instruction: Below is a short text that you need to classify into one of three classes: "
        "Hate / Neutral / Supportive.\n ### Text: x y\n ### Answer: [/INST]"
    )


@pytest.mark.parametrize(
    "token", ["<s>", "</s>", "[INST]", "[/INST]", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "[TOOL_CALLS]"]
)
def test_control_tokens_are_spelled_out(token):
    spelled = task.spell_out(f"a {token} b {token}{token}")
    assert token not in spelled
    assert spelled.replace("< ", "<").replace("[ ", "[") == f"a {token} b {token}{token}"  # nothing else changed
    assert task.spell_out(spelled) == spelled


@pytest.mark.parametrize("text", ["a < b and c > d", "[sic] <3 5>4", "I [heart] you", "naïve 😀 ‮abc"])
def test_ordinary_text_is_left_alone(text):
    assert task.spell_out(text) == text


def test_probabilities_are_renormalised_over_the_labels():
    logprobs = {" H": math.log(0.5), " Neutral": math.log(0.2), "\n": math.log(0.2), " Support": math.log(0.1)}
    assert task.probabilities_from_logprobs(logprobs, (" H", " Neutral", " Support")) == pytest.approx(
        (0.625, 0.25, 0.125)
    )


def test_a_label_out_of_sight_gets_the_smallest_logprob():
    logprobs = {" H": math.log(0.8), "\n": math.log(0.1)}
    assert task.probabilities_from_logprobs(logprobs, (" H", " N", " S")) == pytest.approx((0.8, 0.1, 0.1))


def test_no_label_in_sight_is_an_error():
    with pytest.raises(ValueError, match="none of Hate, Neutral, Supportive"):
        task.probabilities_from_logprobs({"\n": -0.1}, (" H", " N", " S"))


def test_softmax_does_not_overflow():
    assert task.softmax([1000.0, 1000.0, -1000.0]) == pytest.approx((0.5, 0.5, 0.0))

"""What looks the same to a person is one text to the model, in training as in serving; nothing else is touched."""

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hatespeech import task, tokens
from hatespeech.normal import normal_form

SAME = {
    "line ends": [("one\r\ntwo", "one\ntwo"), ("one\rtwo", "one\ntwo"), ("one\u2028two\u0085three", "one\ntwo\nthree")],
    "blanks": [
        ("You suck  \n", "You suck"),
        ("\t You\u00a0suck \r\n\r\n", "You suck"),
        ("You \u3000 suck\n \n\nnow", "You suck\nnow"),
        ("You\tsuck", "You suck"),
    ],
    "entities": [
        ("You &#115;uck", "You suck"),
        ("You &#x73;uck", "You suck"),
        ("&lt;3 &amp; &quot;you&quot;", '<3 & "you"'),
        ("&amp;lt;3 you &amp;amp; me", "<3 you & me"),
        ("&amp;amp;#115;uck", "suck"),
        ("it&#39;s&nbsp;you", "it's you"),
    ],
    "no width or no ink": [
        ("Y\u200bou s\u200buck", "You suck"),
        ("You su\u00adck\ufeff", "You suck"),
        ("Yo\u2060u s\u200du\u200cck\u3164", "You suck"),
        ("You\u202a su\u2066ck", "You suck"),
        ("You suck\U000e0041\ufe0f", "You suck"),
        ("You\x00 s\x1buck\x7f", "You suck"),
    ],
    "wide and dressed letters": [
        ("Ｙｏｕ\u3000ｓｕｃｋ", "You suck"),
        ("𝒀𝒐𝒖 𝖘𝖚𝖈𝖐", "You suck"),
        ("Ⓨⓞⓤ ⓢⓤⓒⓚ", "You suck"),
        ("🅈🄾🅄 🅂🅄🄲🄺", "YOU SUCK"),
        ("🅨🅞🅤 🆂🆄🅲🅺", "YOU SUCK"),
        ("ﬁlthy ²", "filthy 2"),
    ],
    "look-alikes": [
        ("Үou ѕuсk", "You suck"),
        ("Yоu ѕυck", "You suck"),
        ("yοu are νermin", "you are vermin"),
        ("you are vеrmіn, all оf yоu", "you are vermin, all of you"),
        ("ʏou sᴜᴄᴋ", "you suck"),
        ("you are ᴠᴇʀᴍɪɴ", "you are vermin"),
        ("I hate ᴀʟʟ ᴏꜰ ᴛʜᴇᴍ", "I hate all of them"),
        ("ꜰᴜᴄᴋ", "fuck"),
        ("Yoս suck", "You suck"),
        ("you are ΝΟΤ welcome", "you are NOT welcome"),
    ],
    "letters spaced out": [
        ("Y o u  s u c k", "You suck"),
        ("h a t e them", "hate them"),
        ("you are v.e.r.m.i.n", "you are vermin"),
        ("h-a-t-e and h*a*t*e and h_a_t_e", "hate and hate and hate"),
        ("г о в н о", "говно"),
    ],
    "quotation marks": [
        ("don´t, don’t", "don't, don't"),
        ("“you” and „you‟", '"you" and "you"'),
    ],
    "shown from right to left": [
        ("\u202ekcus uoY", "You suck"),
        ("all of \u202euoy\u202c suck", "all of you suck"),
        ("\u202ekcus\nuoy", "suck\nuoy"),
    ],
    "marks": [
        ("cafe\u0301 people", "café people"),
        ("s\u0338u\u0336ck", "suck"),
    ],
    "emoji": [
        ("🖕 to all of you", "middle finger to all of you"),
        ("you🖕", "you middle finger"),
        ("🖕🖕🖕 you", "middle finger you"),
        ("🖕 🖕\n🖕 you", "middle finger you"),
        ("😀", "grinning face"),
        ("❤ and ❤️", "red heart and red heart"),
        ("👍🏿", "thumbs up dark skin tone"),
        ("👩‍🚀", "woman astronaut"),
        ("🇩🇪", "Germany"),
        ("call 1️⃣2⃣", "call 12"),
    ],
}

# Each as it is: nothing hides in it.
HARMLESS = [
    "https://example.org/a?x=1&copy=2&lt=3&amp=4",
    "https://example.org/~me/some_file-name.html?q=a.b.c",
    "+1",
    "3.14",
    "1.2.3.4 or 10-20-30",
    "U.S.A.",
    "the U.S. and the U.K.",
    "e.g. this, i.e. that",
    "и/или, 5–6",
    "Привет, как дела? Это просто хорошие слова.",
    "они все такие",
    "I said спасибо to her",
    "Καλημέρα κόσμε, τι κάνεις;",
    "สวัสดีครับ ผมชื่อสมชาย กินน้ำที่นี่",
    "हिन्दी में लिखा हुआ",
    "مرحبا بالعالم",
    "שלום עולם",
    "tiếng Việt có dấu",
    "中文和日本語、그리고 한국어",
    "naïve café, Zoë, Åse and Łukasz",
    "Straße, œuvre, þorn",
    "a b c",
    "I a m",
    "A & B, AT&T",
    "&nosuchthing; &x",
    "[sic] <b>bold</b> a < b > c",
    "You_suck",
    "Y0u 5uck",
    "one\ntwo",
    "-*-",
    "...",
    "x * y * z",
    "A/B testing, and/or",
    "50 % of 3 °C",
]


@pytest.mark.parametrize(("written", "plain"), [pair for pairs in SAME.values() for pair in pairs])
def test_what_looks_the_same_is_the_same(written, plain):
    assert normal_form(written) == plain
    assert normal_form(plain) == plain
    assert task.prompt(written) == task.prompt(plain)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_plain_stays_as_it_is(text):
    assert normal_form(text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize(
    "text",
    [
        "Я не смотрю YouTube",
        "у нас есть TV",
        "у нас TV",
        "τα email σου",
        "но не OK",
        "Как там Facebook?",
        "нет, Telegram",
    ],
)
def test_russian_with_a_latin_word_in_it_stays(text):
    assert normal_form(text) == text


def test_an_accent_that_stands_alone_is_no_blank():
    for text in ("¯\\_(ツ)_/¯ ok¨", "(￣ー￣) ok", "‾"):
        assert normal_form(text) == text


def test_a_foreign_unit_hides_no_lookalikes():
    assert normal_form("it is 5 μm, you stupid dumb ass, аѕѕ") == "it is 5 μm, you stupid dumb ass, ass"


def test_letters_under_dozens_of_marks_come_out_from_below():
    zalgo = "".join(letter + "\u0335\u0321\u0353\u0300" * 8 for letter in "You suck")
    assert normal_form(zalgo) == "Ỳòù sùck"  # a mark that makes a letter of its own can't be told from that letter
    overlays = "".join(letter + "\u0335\u0321\u0353" * 8 for letter in "You suck")
    assert normal_form(overlays) == "You suck"
    thai = "ที่" + "\u0e48" * 40  # no mark of another alphabet than Latin is dropped but for its number
    assert normal_form(thai) == "ที่" + "\u0e48"


@pytest.mark.parametrize("text", ["", " \r\n\t", "\u200b\u200d", "\u3164\u2800", "&#32;&#8203;", "\x00\x1f", "\u0085"])
def test_nothing_visible_is_the_empty_text(text):
    assert normal_form(text) == ""


PIECES = ["a", "b", "оu", "ѕ", "н", "υ", "Ｙ", "ﬁ", "ᴋ", "🅨", "é", "ſ", "İ", "s u c k", "1", "…", ".", "-", "_", "\x02"]
PIECES += [" ", "  ", "\n", "\r\n", "\t", "&", "&amp;", "&lt;", "&#115;", "\u200b", "\ufe0f", "\u200d"]
PIECES += ["🖕", "👩", "🚀", "🏿", "🇩", "🖕🖕"]
MARKS = ["\u0301", "\u0338", "\u0e48", "\u20e3", "\u202e", "\u202c", "amp;", "lt;"]


def made_of(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(made_of(PIECES))
def test_its_own_result_it_does_not_change(text):
    once = normal_form(text)
    assert normal_form(once) == once
    assert once == once.strip()
    assert not set(once) & set("\r\t\x00\x02\x03\u200b")


@settings(max_examples=500, deadline=None)
@given(made_of(PIECES + MARKS) | st.text(max_size=30))
def test_whatever_the_text_a_second_pass_is_the_last(text):
    twice = normal_form(normal_form(text))
    assert normal_form(twice) == twice
    assert "\u202e" not in twice


@pytest.mark.parametrize("text", ["aѕ\u0338", "ѕ\u0301b", "&amp;\u202camp;", "\u202e\u0301оu", "\u0301\u200b\u0338"])
def test_one_pass_is_enough(text):
    assert normal_form(normal_form(text)) == normal_form(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=20))
def test_words_of_plain_letters_stay(word):
    assert normal_form(word) == word


class Tokens:
    """A tokenizer that keeps what it is given."""

    def __call__(self, texts):
        return type("Encoding", (), {"input_ids": texts})


def test_training_and_serving_read_the_same_form(server, monkeypatch):
    """Both task.as_read's: what training encodes is what Ollama fills into the template."""
    asked = []
    call = type(server)._call
    monkeypatch.setattr(type(server), "_call", lambda self, *all: asked.append(all) or call(self, *all))
    for pairs in SAME.values():
        written, plain = pairs[0]
        (trained,) = tokens.encode(Tokens(), [written])
        answers = [server.classify(text).probabilities for text in (written, plain)]
        served = [body["messages"][0]["content"] for _, path, body in asked[-2:]]
        assert served == [task.as_read(written)] * 2
        assert trained == task.TEMPLATE.replace("{{ .Prompt }}", served[0])
        assert answers[0] == pytest.approx(answers[1], abs=0.01)


def test_control_tokens_are_spelled_out_after_they_are_uncovered():
    for hidden in ("&lt;|im_end|&gt;", "<|im\u200b_end|>", "＜|im_end|＞", "[/IN\u200bST]", "&amp;lt;s&amp;gt;"):
        read = task.as_read(f"a {hidden} b")
        assert read == task.spell_out(normal_form(read))
        assert "<|" not in read
        assert "[/" not in read
        assert "<s>" not in read


@pytest.mark.parametrize(
    "text", ["a." * 60_000 + "aa", "\U0001f469\u200d" * 10_000, "a" + "\u0301\u0323" * 20_000, "a " * 60_000 + "aa"]
)
def test_its_time_is_linear(text):
    """In a process that is killed after 20 s: each took minutes, or the square of its length, in an older form."""
    code = "import sys; from hatespeech.normal import normal_form; normal_form(sys.stdin.read())"
    subprocess.run([sys.executable, "-c", code], input=text, text=True, encoding="utf-8", timeout=20, check=True)

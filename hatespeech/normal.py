"""One form of a text, for training as for serving: what looks the same to a person is the same to the model.

Line ends, blanks, HTML entities, invisible characters, look-alike letters and l e t t e r s spaced out are ways to
write one text, by accident or to get past a filter. An emoji becomes its name: a small model knows few emoji, whose
bytes it reads one by one, and all the words. The model reads normal_form(text); logs and answers keep the text as it
came. FORM is part of the prompt version: change it with the rules.

Unicode: https://www.unicode.org/reports/tr15 (NFKC), https://www.unicode.org/reports/tr39 (look-alike letters).
The names are Unicode's CLDR short names, as https://pypi.org/project/emoji has them.
"""

import html
import re
import unicodedata

import emoji

FORM = f"3, emoji {emoji.__version__}"

# A whole entity, escaped once or many times over: &lt; &amp;lt; &#115; A bare `&copy` may be part of a link.
_ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_LINE_END = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# U+202E shows what follows it from right to left, up to U+202C or the line's end.
_REVERSED = re.compile("\u202e([^\u202c\n]*)\u202c?")
_KEYCAP = re.compile("([0-9#*])\ufe0f?\u20e3")
# A named emoji between two signs that no text holds any more; one that is repeated counts once.
_NAMED = "\x02{}\x03"
_REPEATED = re.compile("(\x02[^\x03]*\x03)(?:\\s*\\1)+")
# They have no width or no ink, though Unicode does not count them as format characters.
_BLANK = dict.fromkeys(map(ord, "\u115f\u1160\u3164\uffa0\u2800"))
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_WORD = re.compile(r"[^\W\d_]+")
# What joins emoji to one; none has more than a handful. The emoji library takes the square of their number.
_JOINED = re.compile("((?:[^\u200d]\u200d){9})(?:[^\u200d]\u200d)+")
_MOST_MARKS = 3  # of accents and vowel signs on one letter; no language needs more, Zalgo has dozens

# Four letters or more, one at a time, with the same one sign between them. Between words stand two blanks.
_SPACED_OUT = re.compile(r"(?<![^\W_])(?:[^\W\d_] {1,4}){3,}[^\W\d_](?!\w)")
_SIGNS_BETWEEN = re.compile(r"(?<![\w.*~|/-])[^\W\d_]([._*~|/-])[^\W\d_](?:\1[^\W\d_]){2,}+(?![\w.*~|/-]*\w)")


def _pairs(lookalikes: str, latin: str) -> dict[str, str]:
    return dict(zip(lookalikes, latin, strict=True))


# Letters of other alphabets, and Latin's small capitals, that look like a Latin letter.
_LOOKALIKES = (
    _pairs("аеорсухіјѕһԁԛԝѵӏүкмтн", "aeopcyxijshdqwvlykmth")
    | _pairs("АВЕІЈКМНОРСЅТУХҮԌԚԜѴҺ", "ABEIJKMHOPCSTYXYGQWVH")
    | _pairs("αονικρτυχεηγ", "aovikptuxeny")
    | _pairs("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABEZHIKMNOPTYX")
    | _pairs("օսհոզ", "ouhnq")
    | _pairs("ıɑɡᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "iagabcdefghijklmnoprstuvwyz")
)
# Those whose letters are in _LOOKALIKES.
_ALPHABETS = {"CYRILLIC", "GREEK", "ARMENIAN"}
# Quotation marks, and the accents that are typed for an apostrophe, as U+00B4.
_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u00b4\u2032", "'") | dict.fromkeys("“”„‟″", '"'))
# An accent that stands alone, as in ¯\_(ツ)_/¯, would become a blank and a mark: NFKC is for all but these.
_SPACING_ACCENTS = (
    "\u00a8\u00af\u00b8\u02d8-\u02dd\u037a\u0384\u0385\u1fbd-\u1fc1\u1fcd-\u1fcf\u1fdd-\u1fdf\u1fed\u1fee\u1ffd\u1ffe"
    "\u2017\u203e\u309b\u309c\ufc5e-\ufc63\ufe70-\ufe7f\uffe3"
)
_FOR_NFKC = re.compile(f"[^{_SPACING_ACCENTS}]+")
# Letters in a black circle or square, which NFKC leaves.
_ENCLOSED = {start + k: chr(ord("A") + k) for start in (0x1F150, 0x1F170) for k in range(26)}


def normal_form(text: str) -> str:
    """The text as the model reads it; empty where nothing visible is in it. Its own result it does not change.

    What one rule uncovers, an entity behind an invisible character say, may be for a rule before it: so all rules are
    applied until none changes anything. Real texts need two rounds; where four are not enough, somebody plays.
    """
    for _ in range(4):
        before, text = text, _one_round(text)
        if text == before:
            break
    return text


def _one_round(text: str) -> str:
    for _ in range(8):
        before, text = text, _ENTITY.sub(lambda match: html.unescape(f"&{match[1]};"), text)
        if text == before:
            break
    text = _LINE_END.sub("\n", text)
    text = _CONTROL.sub("", text.replace("\t", " "))
    if not text.isascii():
        text = _REVERSED.sub(lambda match: match[1][::-1], _JOINED.sub(r"\1", _without_piles(text)))
        text = _KEYCAP.sub(r"\1", text).translate(_BLANK).translate(_ENCLOSED).translate(_QUOTES)
        text = _FOR_NFKC.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
        text = _one_alphabet(_visible(_named(text)))
    text = _SPACED_OUT.sub(lambda match: re.sub("  +", "\n", match[0]).replace(" ", "").replace("\n", " "), text)
    text = _SIGNS_BETWEEN.sub(lambda match: match[0].replace(match[1], ""), text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(filter(None, lines))


def _named(text: str) -> str:
    """With every emoji as its name: 🖕 -> middle finger."""

    def name(_, about: dict) -> str:
        return _NAMED.format(about["en"].strip(":").replace("_", " "))

    text = _REPEATED.sub(r"\1", emoji.replace_emoji(text, name))
    return text.replace("\x02", " ").replace("\x03", " ")


def _without_piles(text: str) -> str:
    """With at most 30 marks on a letter, since NFKC, which puts them in order, takes the square of their number."""
    kept, marks = [], 0
    for c in text:
        marks = marks + 1 if unicodedata.combining(c) else 0
        if marks <= 30:
            kept.append(c)
    return "".join(kept)


def _visible(text: str) -> str:
    """Without format characters and variation selectors, and with at most _MOST_MARKS marks on a letter."""
    kept, marks = [], 0
    for c in text:
        category = unicodedata.category(c)
        if category == "Cf" or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef":
            continue
        if category in ("Mn", "Me"):
            # NFKC has composed what is a letter of its own, as é; what is left on a Latin letter only hides it.
            marks += 1
            if marks > _MOST_MARKS or (kept and _is_latin(kept[-1])):
                continue
        else:
            marks = 0
        kept.append(c)
    return "".join(kept)


def _one_alphabet(text: str) -> str:
    """Look-alikes as the Latin letters they pass for: in words of both, and in words of nothing else where these are
    few in a Latin text. Words of another alphabet's own letters stay, and so do short words beside them."""
    latin, lookalike, foreign = 0, 0, set()
    for match in _WORD.finditer(text):
        word = match[0]
        own = {_alphabet(c) for c in word if c not in _LOOKALIKES} & _ALPHABETS
        foreign |= own
        if all(c in _LOOKALIKES for c in word) and _alphabet(word[0]) in _ALPHABETS:
            lookalike += len(word)
        elif not own and (word.isascii() or len(word) > 1):
            latin += len(word)
    few = 3 * lookalike < latin

    def mend(match: re.Match) -> str:
        word = match[0]
        if not all(c in _LOOKALIKES or _is_latin(c) for c in word):
            return word
        if any(c.isascii() for c in word):
            return "".join(_LOOKALIKES.get(c, c) for c in word)
        # No language is written in Latin's small capitals; one alone may be a sign of phonetics.
        alphabet = _alphabet(word[0])
        stays = len(word) == 1 if alphabet == "LATIN" else not few or alphabet in foreign
        if stays:
            return word
        return "".join(_LOOKALIKES.get(c, c) for c in word)

    return _WORD.sub(mend, text) if latin else text


def _alphabet(c: str) -> str:
    return unicodedata.name(c, "").partition(" ")[0]


def _is_latin(c: str) -> bool:
    return c.isascii() or unicodedata.name(c, "").startswith("LATIN ")

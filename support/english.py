"""English as ArtEmis's own code prepares it: cleaning and words.

ArtEmis corrects spelling with tables and SymSpell, which are not ours to copy. What needs no such data we do alike:
lower case, quotes around a word dropped, contractions expanded, punctuation to blanks. Two differences are on purpose:
"'d" becomes "would", and a possessive 's stays on its word, as GPT-2 knows it ("the man's").
"""
import re

PUNCTUATION = ".?!,:;/\\-~*_=[]{}$^@|%#<>"
TO_BLANKS = bytes.maketrans(PUNCTUATION.encode(), b" " * len(PUNCTUATION))
QUOTES_AND_DASHES = str.maketrans({**dict.fromkeys("’‘‛´`", "'"), **dict.fromkeys("“”„«»", '"'),
                                   **dict.fromkeys("…―–—", " ")})
QUOTED = re.compile(r"['\"](\w+)['\"]")
APOSTROPHE = re.compile(r"\b(\w*)'(t|re|ve|ll|d|s|m)\b")
WOULD = ("i", "you", "he", "she", "it", "we", "they", "that", "there")
IS = ("he", "she", "it", "that", "there", "here", "what", "where", "who", "how", "why", "when", "so")
CONTRACTIONS = {"can't": "cannot", "won't": "will not", "shan't": "shall not", "ain't": "am not", "let's": "let us",
                "i'm": "i am", **{f"{who}'d": f"{who} would" for who in WOULD},
                **{f"{what}'s": f"{what} is" for what in IS}}
ENDINGS = {"re": " are", "ve": " have", "ll": " will"}
TREEBANK = re.compile(r"can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|[\"()&]|'(?:s|m|d)?(?![^\s\"()&])|"
                      r"(?:[^\s\"()&']|'(?!(?:s|m|d)?(?![^\s\"()&])))+")
JOINED = ("cannot", "gonna", "wanna", "gotta")


def clean(text: str) -> str:
    """As a model reads it: lower case, no punctuation, single blanks instead of any others and of line breaks."""
    if not text.isascii():
        text = text.translate(QUOTES_AND_DASHES)
    text = text.lower()
    if text.count("'") + text.count('"') > 1:
        text = QUOTED.sub(r" \1 ", text)
    if "'" in text:
        text = " ".join(APOSTROPHE.sub(expanded, token) if "'" in token else token for token in text.split())
    blank = text.encode(errors="replace").translate(TO_BLANKS).decode()  # as bytes: a sixth of the time
    return " ".join(blank.split())


def expanded(match: re.Match) -> str:
    """A contraction as words: it's -> it is, don't -> do not; but the man's stays."""
    whole, (stem, ending) = match[0], match.groups()
    if whole in CONTRACTIONS:
        return CONTRACTIONS[whole]
    if ending == "t" and stem.endswith("n"):
        return f"{stem[:-1]} not"
    return stem + ENDINGS[ending] if ending in ENDINGS else whole


def words(text: str) -> list[str]:
    """Cleaned text as Treebank tokens: possessive 's, quotes and parentheses are words of their own."""
    found: list[str] = []
    for token in text.split():
        if token.isalpha() and token not in JOINED:
            found.append(token)
        else:
            found += TREEBANK.findall(token)
    return found

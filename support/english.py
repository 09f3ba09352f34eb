"""English: texts cleaned and cut into words as ArtEmis's own code does it, and the base forms of words.

ArtEmis corrects spelling with tables and SymSpell, which are not ours to copy. What needs no such data we do alike:
lower case, quotes around a word dropped, contractions expanded, punctuation to blanks. Two differences are on purpose:
"'d" becomes "would", and a possessive 's stays on its word, as GPT-2 knows it ("the man's").
"""
import re
from functools import cache
from pathlib import Path

# Cleaning

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


# Words

TREEBANK = re.compile(r"""
      can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b)   # the first half of two words in one
    | ["()&]
    | '(?:s|m|d)? (?=["()&]|\Z)                               # at the end: a possessive, a quote
    | (?: [^"()&'] | ' (?!(?:s|m|d)? (?:["()&]|\Z)) )+        # the word before it, or without it
""", re.VERBOSE)
JOINED = ("cannot", "gonna", "wanna", "gotta")


def words(text: str) -> list[str]:
    """Cleaned text as Treebank tokens: possessive 's, quotes and parentheses are words of their own."""
    found: list[str] = []
    for token in text.split():
        if token.isalpha() and token not in JOINED:
            found.append(token)
        else:
            found += TREEBANK.findall(token)
    return found


# Base forms. Those that a rule makes of a word, likeliest first; a dictionary says which of them there are. With all of
# WordNet's words the first is WordNet's own lemma for 99.85% of the 10,000 most frequent English words, with a random
# 60% of them for 99.6% (tests/lemmas_against_wordnet.py). As in WordNet, adverbs in -ly are words of their own.
#
# A rule says what a word looks like and what it may be a form of. Only the first that fits a word is applied.

RULES = [(re.compile(pattern), results) for pattern, results in (
    (r"(.)ies", r"\1ie"),  # ties
    (r"(.+)ies", r"\1y \1ie"),  # cities, movies
    (r"(.+(?:ss|x|zz|ch|sh))es", r"\1 \1e"),  # boxes, aches
    (r"(.+[szo])es", r"\1e \1"),  # houses, heroes
    (r"(.+[^s])s", r"\1"),  # trees
    (r"(.+)men", r"\1man"),  # women
    (r"(.)(?:ied|ying)", r"\1ie"),  # dying
    (r"(.+)(?:ied|ier|iest)", r"\1y"),  # carried, happier
    (r"(.+l)l(?:ed|ing)", r"\1l \1"),  # calling, travelling
    (r"(.+([bdgkmnprtv]))\2(?:ed|ing)", r"\1 \1\2"),  # putting, adding
    (r"([^aeiouy]+[aeiouy][^aeiouwxy])(?:ed|ing)", r"\1e"),  # hoping: "hop" would double its last letter
    (r"(.*(?:[^aeiou][aeiou][^aeiouwxy]|[^s]s|[cvz]|th))(?:ed|ing)", r"\1e \1"),  # admired, opened, loving
    (r"(...+)(?:ed|ing)", r"\1 \1e"),  # singing, dancing, looked
    (r"(.+([^aeiou]))\2e(?:r|st)", r"\1 \1\2"),  # bigger, taller
    (r"(.+)e(?:r|st)", r"\1 \1e"),  # darkest, larger
)]
COMPARED = re.compile(r".*[^i]e(r|st)")  # "bigger", but "corner" is not "corn"; "happier" needs no further check
CLITIC = re.compile(r"(n't|'\w*)$")  # "the child's", "didn't", "they're"
SHORTEST = 3  # letters of a base: "his" is no plural of "hi"
EXCEPTIONS = Path(__file__).with_name("lemmas.txt")


@cache
def exceptions() -> tuple[dict[str, str], set[str]]:
    """Irregular forms with their bases, and the adjectives that -er and -est are taken from; the file explains."""
    irregular, compared = {}, set()
    for line in EXCEPTIONS.read_text(encoding="utf-8").splitlines():
        base, _, forms = line.partition("#")[0].partition(":")
        if base == "-er -est":
            compared.update(forms.split())
        else:
            irregular.update((form, form if base == "itself" else base) for form in forms.split())
    return irregular, compared


def bases(word: str) -> list[str]:
    """What a lower-case word may be a form of, likeliest first. An irregular form has one base and no other."""
    irregular, compared = exceptions()
    if word in irregular:
        return [irregular[word]]
    if clitic := CLITIC.search(word):
        host = word[:clitic.start()]
        return [host, *bases(host)]
    fitting = (match.expand(results) for pattern, results in RULES if (match := pattern.fullmatch(word)))
    found = [base for base in next(fitting, "").split() if len(base) >= SHORTEST]
    if COMPARED.fullmatch(word):
        found = [base for base in found if base in compared]
    return found

"""METEOR 1.5 (Denkowski and Lavie 2014) as the COCO caption evaluation runs it, and its authors' own program.

    1. stem                Porter's second English stemmer
    2. meteor_words        a caption in METEOR's words
    3. align               which word of the one is which of the other
    4. meteor              the score, from counts that can be summed over captions
    5. original_counts     the same counts by the original, in Java

Of METEOR's four stages two are here: equal words, and words of equal stem. Synonyms need WordNet, paraphrases a table
of 60 MB; together they add about 0.02. The numbers are the original's to the last digit, oddities included.
"""
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from support.program import UserError

# 1. The stemmer (Snowball's "English" of 2010). It replaces endings in steps, each only where enough of the word stands
# before the ending: up to r1, behind the first consonant after a vowel, or up to r2, the same once more from r1 on.

IRREGULAR = {"skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl",
             "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl", "sky": "sky",
             "news": "news", "howe": "howe", "atlas": "atlas", "cosmos": "cosmos", "bias": "bias", "andes": "andes"}
COMPLETE = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = {"tional": "tion", "enci": "ence", "anci": "ance", "abli": "able", "entli": "ent", "izer": "ize",
          "ization": "ize", "ational": "ate", "ation": "ate", "ator": "ate", "alism": "al", "aliti": "al",
          "alli": "al", "fulness": "ful", "ousli": "ous", "ousness": "ous", "iveness": "ive", "iviti": "ive",
          "biliti": "ble", "bli": "ble", "ogi": "og", "fulli": "ful", "lessli": "less", "li": ""}
STEP_3 = {"tional": "tion", "ational": "ate", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic",
          "ful": "", "ness": "", "ative": ""}
STEP_4 = dict.fromkeys(["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent",
                        "ism", "ate", "iti", "ous", "ive", "ize", "ion"], "")
MAY_FOLLOW = {"ogi": "l", "li": "cdeghkmnrt", "ion": "st"}  # the letters that these endings may stand behind
VOWEL, CONSONANT = "[aeiouy]", "[^aeiouy]"
REGION = f"{CONSONANT}*{VOWEL}+{CONSONANT}"
SHORT_SYLLABLE = f"(?:^{VOWEL}{CONSONANT}|{CONSONANT}{VOWEL}[^aeiouywxY])$"


@lru_cache(maxsize=1 << 17)
def stem(word: str) -> str:
    if len(word) <= 2 or word in IRREGULAR:
        return IRREGULAR.get(word, word)
    word = re.sub(f"(^|{VOWEL})y", r"\1Y", word.removeprefix("'"))  # Y: a y that is a consonant
    match = re.match(f"gener|commun|arsen|{REGION}", word)
    r1 = match.end() if match else len(word)
    match = re.compile(REGION).match(word, r1)
    r2 = match.end() if match else len(word)
    word = without_plural(re.sub("('s'|'s|')$", "", word))
    if word in COMPLETE:
        return word
    word = without_ed_or_ing(word, r1)
    word = re.sub(f"(?<=.{CONSONANT})[yY]$", "i", word)
    for step, region in (STEP_2, r1), (STEP_3, r1), (STEP_4, r2):
        ending = next((word[-size:] for size in range(7, 1, -1) if word[-size:] in step), "")
        base = word.removesuffix(ending)
        start = r2 if ending == "ative" else region
        if ending and len(base) >= start and base[-1] in MAY_FOLLOW.get(ending, base):
            word = base + step[ending]
    short = re.search(SHORT_SYLLABLE, word[:-1])
    if word[-1:] == "e" and (word[r2:] or word[r1:] and not short) or word[-2:] == "ll" and word[r2:]:
        word = word[:-1]
    return word.replace("Y", "y")


def without_plural(word: str) -> str:
    if word.endswith("sses") or word.endswith(("ied", "ies")) and len(word) > 4:
        return word[:-2]
    if word.endswith(("ied", "ies")) or re.search("[^su]s$", word) and re.search(VOWEL, word[:-2]):
        return word[:-1]
    return word


def without_ed_or_ing(word: str, r1: int) -> str:
    ending = re.search("(eedly|eed|ingly|edly|ing|ed)$", word)
    if not ending:
        return word
    base = word[:ending.start()]
    if ending[0].startswith("ee"):
        return base + "ee" if len(base) >= r1 else word
    if not re.search(VOWEL, base):
        return word
    if base.endswith(("at", "bl", "iz")) or len(base) <= r1 and re.search(SHORT_SYLLABLE, base):
        return base + "e"  # hoping: hope
    return re.sub(r"([bdfgmnprt])\1$", r"\1", base)  # hopping: hop


# 2. Words

LETTER = "a-zÀ-ÖØ-öø-žЀ-ԧᴀ-ᵿ"  # the lower-case letters that METEOR's normaliser knows
NORMALISE = (
    (rf"([^{LETTER}0-9\s.'`,\-‘’])", r" \1 "),
    (r"(\.{2,})", r" \1 "), (r"(?<![0-9]),|,(?![0-9])", " , "),
    ("[`‘’]", "'"), ("''", '"'), ("--", "-"),
    (rf"([{LETTER}0-9.])-([{LETTER}0-9])", r"\1 \2"),  # well-dressed: two words
    (rf"(?<![{LETTER}])'|'(?![{LETTER}])", " ' "),
    (rf"(?<=[{LETTER}])'(?=[{LETTER}])", " '"),  # n't: n and 't
)


@lru_cache(maxsize=1 << 17)
def normalise(token: str) -> list[str]:
    token = f" {token} "
    for pattern, replacement in NORMALISE:
        token = re.sub(pattern, replacement, token)
    return token.split()


def meteor_words(caption: str) -> list[str]:
    """A tokenized caption in METEOR's words: u.s. is us; other full stops go apart unless a word follows."""
    words = [word for token in caption.split(" ") for word in normalise(token)]
    if "." not in caption:
        return words
    apart = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        base, stop = word[:-1], word.endswith(".") and word.strip(".")
        belongs = (base in ("rev", "v", "vs") or re.match("[a-z]", following)
                   or base == "pp" and re.match("[0-9]", following))
        if stop and "." in base and re.search(f"[{LETTER}]", base):
            apart.append(word.replace(".", ""))
        elif stop and not belongs:
            apart += [base, "."]
        else:
            apart.append(word)
    return apart


# 3. The alignment

EXACT, STEM = 0, 1  # the stages; synonym and paraphrase would be 2 and 3


def align(hypothesis: list[str], reference: list[str], beam: int = 40) -> list[tuple[int, int, int]]:
    """Triples of a place in the reference, a place in the hypothesis and a stage.

    A beam search over the reference's words: a path takes one of a word's matches, or none. The better path has more
    words, then fewer chunks (runs of neighbours in both captions), then less distance between matched places. Oddities
    of the original: a stem adds no words (half a word, rounded down); a choice adds its distance to the path that it
    branches off, not to its own; a match without rivals is taken even where it does not pay.
    """
    if hypothesis == reference:  # the search would find the same, in more time
        return [(place, place, EXACT) for place in range(len(reference))]
    matches, wanted = find_matches(hypothesis, reference)
    # A path: (-words, chunks, distance); the place that would continue its chunk; places used, as bits; its last match
    # with what came before that.
    paths = [((0, 0, 0), -1, 0, None)]
    for i, word in enumerate(reference):
        paths = sorted(paths, key=itemgetter(0))[:beam] if len(paths) > 1 else paths
        found = matches[word]
        forced = len(found) == 1 and wanted[found[0][0]] == 1
        branches = []
        for (words, chunks, distance), continuing, used, trail in paths:
            ended = chunks + (continuing >= 0)
            choices = 0
            for j, stage in found:
                if used >> j & 1:
                    continue
                choices += 1
                if choices <= beam or j == continuing:  # no other could survive
                    order = (words - (stage == EXACT), chunks if j == continuing else ended,
                             distance + abs(i - j) if forced else distance)
                    branches.append((order, j + 1, used | 1 << j, ((i, j, stage), trail)))
                distance += abs(i - j)
            if not forced:
                branches.append(((words, ended, distance), -1, used, trail))
        paths = branches
    finished = [((words, chunks + (continuing >= 0), distance), trail)
                for (words, chunks, distance), continuing, _, trail in sorted(paths, key=itemgetter(0))[:beam]]
    trail = min(finished, key=itemgetter(0))[1]
    alignment = []
    while trail:
        last, trail = trail
        alignment.append(last)
    return alignment[::-1]


def find_matches(hypothesis: list[str], reference: list[str]) -> tuple[dict[str, list[tuple[int, int]]], list[int]]:
    """Word of the reference -> its places in the hypothesis, with stages; how often each of those places is wanted."""
    same, same_stem = defaultdict(list), defaultdict(list)
    for place, word in enumerate(hypothesis):
        same[word].append((place, EXACT))
        same_stem[stem(word)].append((place, STEM))
    matches, wanted = {}, [0] * len(hypothesis)
    for word, times in Counter(reference).items():
        stems = [match for match in same_stem.get(stem(word), ()) if hypothesis[match[0]] != word]
        matches[word] = same.get(word, []) + stems
        for place, _ in matches[word]:
            wanted[place] += times
    return matches, wanted


def count_chunks(alignment: Sequence[tuple[int, int, int]]) -> int:
    return len(alignment) - sum((i + 1, j + 1) == (k, m) for (i, j, _), (k, m, _) in pairwise(alignment))


# 4. The score. A caption's counts are the original's 23 numbers; where two belong together, the hypothesis comes first.

WORDS, FUNCTION, MATCHED, CHUNKS, ALIGNED = slice(0, 2), slice(2, 4), slice(4, 20), 20, slice(21, 23)
FUNCTION_WORDS = frozenset(re.findall(r"\S+", """
    the , . to of and a in that for " is on 's it with was as said at he by be from have has are his but an
    this not i will they ) -rrb- ( -lrb- who their had we which were been more or s its would about new one
    after you : also up when there than $ all out her people she year two - can if last first over other
    into some what so -- no time years could ? 't '
"""))
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # weight of recall, shape and weight of fragments, of content words


def pair_counts(hypothesis: list[str], reference: list[str]) -> list[int]:
    """Words, function words, for each of four stages matched content and matched function words, chunks, matched."""
    matched = [0] * 16
    alignment = align(hypothesis, reference)
    for i, j, stage in alignment:
        matched[4 * stage + 2 * (hypothesis[j] in FUNCTION_WORDS)] += 1
        matched[4 * stage + 2 * (reference[i] in FUNCTION_WORDS) + 1] += 1
    function = [sum(word in FUNCTION_WORDS for word in words) for words in (hypothesis, reference)]
    chunks, aligned = count_chunks(alignment), len(alignment)
    return [len(hypothesis), len(reference), *function, *matched, chunks, aligned, aligned]


def precision_and_recall(counts: np.ndarray) -> np.ndarray:
    """Weighted matches per weighted words of each side: (..., 23) -> (..., 2)."""
    matched = STAGE_WEIGHTS @ counts[..., MATCHED].reshape(*counts.shape[:-1], 4, 4)
    content, function = matched[..., :2], matched[..., 2:]
    words, function_words = counts[..., WORDS], counts[..., FUNCTION]
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((DELTA * content + (1 - DELTA) * function)
                / (DELTA * (words - function_words) + (1 - DELTA) * function_words))


def meteor(counts: np.ndarray) -> np.ndarray:
    """The score of one caption's counts, or of their sums: (..., 23) -> (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(precision_and_recall(counts), -1, 0)
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        fragmentation = counts[..., CHUNKS] / counts[..., ALIGNED].mean(-1)
        score = mean * (1 - GAMMA * fragmentation ** BETA)
    return np.maximum(0, np.nan_to_num(score))  # nan: nothing matched


def perfect_without_chunks(counts: np.ndarray) -> np.ndarray:
    """A perfect match has no fragments, so that it reaches 1."""
    perfect = (counts[:, WORDS] == counts[:, ALIGNED]).all(1) & (counts[:, CHUNKS] == 1)
    counts = counts.copy()
    counts[perfect, CHUNKS] = 0
    return counts


def exact_stem_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Tokenized captions, and their references -> the counts with each caption's best reference (N, 23)."""
    pairs = [pair_counts(hypothesis, meteor_words(text))
             for hypothesis, texts in zip(map(meteor_words, hypotheses), references, strict=True) for text in texts]
    counts = perfect_without_chunks(np.array(pairs, dtype=float).reshape(-1, 23))
    scores, bounds = meteor(counts), np.cumsum([0] + [len(texts) for texts in references])
    best = [first + int(scores[first:last].argmax()) for first, last in pairwise(bounds)]
    return counts[best]


# 5. The original: it counts, we score, so that it can be resampled like other scores

def original_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]], jar: str | Path) -> np.ndarray:
    """As `exact_stem_counts`, with all four stages, by meteor-1.5.jar and the paraphrases beside it."""
    jar = Path(jar).absolute()
    paraphrases = jar.parent / "data" / "paraphrase-en.gz"
    for file in jar, paraphrases:
        if not file.is_file():
            raise UserError(f"there is no {file}; METEOR's own program needs meteor-1.5.jar and, beside it, "
                            "data/paraphrase-en.gz")
    java = shutil.which("java")
    if not java:
        raise UserError("METEOR's own program needs Java; without it there is METEOR (exact+stem)")
    captions = [["SCORE", *texts, hypothesis] for hypothesis, texts in zip(hypotheses, references, strict=True)]
    lines = [" ||| ".join(" ".join(text.replace("|||", "").splitlines()) for text in row) for row in captions]
    # The program looks for its paraphrases beside itself, but misses them if the path has a blank: hence -a.
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
               "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm", "-a", paraphrases]
    questions = "\n".join([*lines, ""])
    run = subprocess.run(command, input=questions, capture_output=True, encoding="utf-8", errors="replace", check=False)
    rows = [line.split() for line in run.stdout.splitlines()]
    if run.returncode or [len(row) for row in rows] != [23] * len(lines):
        message = run.stderr.strip()[-1000:] or f"it gave {len(rows)} answers to {len(lines)} questions"
        raise UserError(f"{jar.name} failed with code {run.returncode}: {message}")
    return perfect_without_chunks(np.array(rows, dtype=float).reshape(-1, 23))

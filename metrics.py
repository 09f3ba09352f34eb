"""Scores for predicted emotions and explanations (section 5.1, Table 1), with no Java and in seconds.

    1. Tokens           the Penn Treebank tokens of the COCO caption evaluation
    2. Score            a formula over what each image adds, so that images can be resampled
    3. N-grams          BLEU-1 .. BLEU-4, CIDEr-D
    4. ROUGE-L          by the longest common subsequence
    5. METEOR           its exact and stem stages by hand; the original through Java
    6. Explanations     unique, length, metaphors, novelty
    7. Emotions         ACC, EA, and how good the predicted distribution is
    8. TextClassifier   the judge of EA: a bidirectional LSTM, after ArtEmis
    9. Significance     bootstrap intervals, paired tests
    10. Files, main     any system's predictions against any references

Begin with `evaluate` in part 10, where all scores meet. Parts 1 and 3 to 5 give the numbers of pycocoevalcap
1.2, oddities included, because published scores have them. Left out of the tokenizer is what captions hardly
contain: web and e-mail addresses, telephone numbers, marks of scripts other than Latin, Greek and Cyrillic.

    python metrics.py --predictions ours.jsonl --versus theirs.json --references test.json
"""
import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from data import Art, add_data_options, art_of, fingerprint
from sevlm import EMOTIONS
from vad import UserError, progress, replacing, run_program

# 1. Tokens, as Stanford's PTBTokenizer makes them (CoreNLP 3.4.1). Its lexer takes the longest match of all
# rules; here the first match counts, and the order of the rules makes it the longest. What no rule matches is
# dropped: quotes, commas, single marks, emoji.

BLANK = r"[ \t\u00a0\u2000-\u200a\u3000]"
QUOTE = "['’`‘‛]"
LETTER = r"[A-Za-zªµº\u00adÀ-ÖØ-öø-\u1fff\u2c00-\u2dff\u3041-\ud7ff\uf900-\ufdff\uff21-\uffdc]"
ALNUM = LETTER.replace("A-Z", "0-9A-Z")
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"  # "sad.The" is one word
SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of a slash
CLITIC = "(?:'(?i:[dms]|ll|re|ve)(?![A-Za-z])|’(?i:[dmns]|ll|re|ve))"
STOP = r"(?:\.(?=[,:;]))?"  # a full stop before another mark stays with its word
ABBREVIATION = (
    r"adj adm adv ala? alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif "
    r"capt cf cie cmdr col colo comdr conn corp cos? cpl ct dak dec dept det drs? ed\.d elec ens esq est "
    r"etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt "
    r"ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms msgr mt mtg natl neb nev nov oct "
    r"okla penn pfc ph ph\.d plc pres profs? p?ptes? p?ptys? pvt rd reps? rev rt sens? sept? seq sfc sgt "
    r"spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"
).replace(" ", "|")
SENTENCE_START = (
    r"A About According Additionally After An As At But Earlier He Her Here However If In It Last Many "
    r"More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Then There These They This We "
    r"When While What Yet You"
).replace(" ", "|")
TOKEN = re.compile(rf"""
    [ ] | [A-Za-z]+(?=,?[ ]|$)                                                 # most of any text
  | [A-Za-z]*[A-MO-Za-mo-z](?=[nN]{QUOTE}[tT]) | [nN]{QUOTE}[tT](?![A-Za-z])   # do|n't
  | {WORD}(?={CLITIC}) | [yY]['’](?={LETTER})                                  # she|'s, y'|all
  | \d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}                                        # 24/12/1888
  | \d{{1,4}}[-\ \u00a0]\d{{1,4}}/\d{{1,4}} | {SIDE}(?:/{SIDE}){{1,2}}         # 2 1/2, and/or
  | [A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+(?!_|{ALNUM}){STOP}             # well-dressed, 3.5-inch
  | (?:[dloDLO]{QUOTE}(?={LETTER}))?{ALNUM}+(?:[-_‐‑]{ALNUM}+)+{STOP}          # déjà-vu
  | [A-HJ-XZn]{QUOTE}{LETTER}{{2,}} | [dlo]{QUOTE}{ALNUM}{{2,}}{STOP}          # O'Keeffe, o'clock
  | {LETTER}+[aeiouAEIOU]{QUOTE}[aeiouA-Z]{LETTER}*                            # ma'am
  | (?i:[djl]['’]|c'mon|cap['’]n|[eo]'er|ev'ry|li'l|ol['’]|somethin['’]|'tis|'twas)
  | ['’](?:[nN]['’]|(?i:cause|em|till?)|\d0[sS]|(?:[nN]|\d\d)(?={BLANK}|$))    # 'em, '90s
  | {CLITIC} | (?i:anti|pro)- | [A-Z]+(?:\$|(?:[&+][A-Z]+)+)                   # US$, AT&T
  | (?i:{ABBREVIATION})\.(?!{LETTER})                                          # mr., etc.
  | (?=[A-Z])(?i:ark|az|del|ill|la|mass|miss|ore|pa|tex|wash)\.(?!{LETTER})
  | (?i:art|ca|figs?|nos?|op|pp|prop)\.(?={BLANK}?[0-9])                       # no. 5
  | (?:[A-Za-z]\.)+[A-Za-z](?!{ALNUM})\.?                                      # u.s., a.m.
  | [A-Za-z]\.(?!{LETTER}|{BLANK}+(?=[A-Z])(?i:{SENTENCE_START}){BLANK})       # j. smith; not: and i. She
  | {WORD}{STOP} | [-+]?\d*(?:[.:,]\d+)+ | \d+(?:{LETTER}{ALNUM}*)?{STOP} | [-+]\d+   # 1,200, 1st
  | [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?![A-Za-z0-9]) | \([-=^]_[-=^]\) | [-=^]_[-=^]   # :-) and ^_^
  | </?[A-Za-z][^<>]*> | <<? | >>? | &(?:amp|apos|gt|lt|nbsp|quot|\#\d+); | \#{LETTER}+ | @[A-Za-z_]\w*
  | [?!]{{2,}} | -{{2,}} | \*+ | @+ | \#+ | _+ | [`‘’‛‹›“”«»„‚]{{2}}
  | [$%&+/=\\^|~()[\]{{}}¡-©¬®-´¶-¹¼-¿×÷‚„-‣‰-‸※‾-⁂⁄⁰-₎€℀-⅏⅓-⅞←-⯿]
""", re.VERBOSE)
SPELLED = {
    "cannot": "can not", "gimme": "gim me", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me",
    "wanna": "wan na", "'tis": "'t is", "'twas": "'t was", "£": "#", "€": "$", "¤": "$", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&amp;": "&", "&gt;": ">", "&lt;": "<",
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    **dict.fromkeys(["``", "''", "--", "---", "----", "&apos;", "&nbsp;", "&quot;"], ""),  # dropped
}
QUOTES = str.maketrans(
    {"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''", "»": "''"})
SPELLED_QUOTES = re.compile("n[’‘‛]t|’(?:[dms]|ll|re|ve)|[`‘’‛‹›“”«»„‚]{2}")  # o’clock keeps its own


@lru_cache(maxsize=1 << 17)
def spell(token: str) -> str:
    """A token as the original writes it: lower case, brackets by name, quotes in ASCII; "" if it drops it."""
    token = token.lower().replace("\u00ad", "").strip()
    if SPELLED_QUOTES.fullmatch(token):
        token = token.translate(QUOTES)
    token = re.sub(r"\s", "\u00a0", token).replace("(", "-lrb-").replace(")", "-rrb-")  # "2 1/2" is one token
    return SPELLED.get(token, token)


def tokenize(caption: str) -> str:
    """The caption as the COCO scorers see it: lower-cased tokens between blanks, without punctuation."""
    caption = re.sub("[\U00010000-\U0010ffff]", "\u200b", caption.replace("\n", " "))  # emoji part words
    return " ".join(filter(None, map(spell, TOKEN.findall(caption))))


# 2. Score

@dataclass
class Score:
    """A score as a formula over sums of what each image adds: one row of `statistics` per image.

    BLEU and METEOR pool counts over all images; for most others a row is (value, weight). Written like this,
    the score of resampled images is one product with `statistics`.
    """
    statistics: np.ndarray  # (images, k)
    formula: Callable[[np.ndarray], np.ndarray]  # sums (..., k) -> scores (...)

    @property
    def value(self) -> float:
        return float(self.formula(self.statistics.sum(0)))

    @property
    def per_image(self) -> np.ndarray:
        return self.formula(self.statistics)

    @property
    def images(self) -> int:
        """How many images the score rests on."""
        return int(self.statistics.any(1).sum())

    def spread(self, present: np.ndarray) -> "Score":
        """The same score with a row for every image; an absent one adds nothing."""
        statistics = np.zeros((len(present), self.statistics.shape[1]))
        statistics[present] = self.statistics
        return Score(statistics, self.formula)


Scores = dict[str, Score]  # by name
Intervals = dict[str, tuple[float, float]]


def ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]  # nan where nothing is counted


def mean_score(values: Sequence[float], counted: Sequence[bool] | None = None) -> Score:
    """The mean of the values that are counted."""
    counted = np.ones(len(values), dtype=bool) if counted is None else np.asarray(counted, dtype=bool)
    return Score(np.column_stack([np.where(counted, values, 0.0), counted]), ratio)


# 3. N-grams, numbered by numpy: an n-gram is an (n-1)-gram and the word after it

def ngrams(captions: list[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For n = 1 .. 4 three arrays, sorted by the first: a caption, an n-gram it has, how often it has it."""
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for text in captions for word in text], int)
    lengths = [len(text) for text in captions]
    caption = np.repeat(np.arange(len(captions)), lengths)
    end = np.cumsum(lengths)[caption]
    start, gram = np.arange(len(words)), words
    for n in range(1, 5):
        if n > 1:
            inside = start + n <= end[start]
            start = start[inside]
            gram = np.unique(gram[inside] * len(numbers) + words[start + n - 1], return_inverse=True)[1]
        base = len(words) + 1  # above every n-gram's number
        pairs, counts = np.unique(caption[start] * base + gram, return_counts=True)
        yield pairs // base, pairs % base, counts


def ngram_scores(hypotheses: list[str], references: list[list[str]]) -> Scores:
    """BLEU-1 .. BLEU-4 with the closest reference length, and CIDEr-D with sigma 6, of tokenized captions."""
    images = np.arange(len(hypotheses))
    captions = [text.split() for texts in [hypotheses, *references] for text in texts]
    image = np.concatenate([images, np.repeat(images, [len(texts) for texts in references])])  # of a caption
    length = np.array([len(words) for words in captions])
    clipped, similarity = np.zeros((len(images), 4)), np.zeros(len(captions))
    for n, (caption, gram, count) in enumerate(ngrams(captions)):
        own = np.searchsorted(caption, len(images))  # from here on n-grams of references, not of hypotheses
        base = gram.max(initial=0) + 1
        key = image[caption] * base + gram
        shared = own + np.flatnonzero(np.isin(key[own:], key[:own]))  # n-grams that the hypothesis has too
        partner = np.searchsorted(key[:own], key[shared])
        highest = np.zeros(own)
        np.maximum.at(highest, partner, count[shared])
        clipped[:, n] = np.bincount(caption[:own], np.minimum(count[:own], highest), minlength=len(images))

        documents = np.bincount(np.unique(key[own:]) % base, minlength=base)  # images with this n-gram
        weight = count * np.log(len(images) / np.maximum(1, documents))[gram]  # tf-idf
        norm = np.sqrt(np.bincount(caption, weight ** 2, minlength=len(captions)))
        overlap = np.minimum(weight[partner], weight[shared]) * weight[shared]
        product = np.bincount(caption[shared], overlap, minlength=len(captions))
        norms = norm * norm[image]
        similarity += np.divide(product, norms, out=np.zeros(len(captions)), where=norms > 0)
    bigrams = np.maximum(length - 1, 0)  # what CIDEr-D calls the length
    similarity *= np.exp(-(bigrams - bigrams[image]) ** 2 / (2 * 6 ** 2))
    of_reference = image[len(images):]
    cider = 10 / 4 * np.bincount(of_reference, similarity[len(images):]) / np.bincount(of_reference)
    guesses = np.maximum(length[images, None] - np.arange(4), 0)
    closest = [min((len(text.split()) for text in texts), key=lambda r, h=h: (abs(r - h), r))
               for h, texts in zip(length[images], references)]
    counts = np.column_stack([clipped, guesses, closest])
    scores = {f"BLEU-{n}": Score(counts, partial(bleu, n=n)) for n in range(1, 5)}
    return scores | {"CIDEr": mean_score(cider)}


def bleu(sums: np.ndarray, n: int) -> np.ndarray:
    """Geometric mean of the first n precisions, less if too short; the tiny numbers are the original's."""
    clipped, guesses, hypothesis, reference = sums[..., :n], sums[..., 4:4 + n], sums[..., 4], sums[..., 8]
    precision = np.prod((clipped + 1e-15) / (guesses + 1e-9), axis=-1) ** (1 / n)
    length_ratio = (hypothesis + 1e-15) / (reference + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / length_ratio))


# 4. ROUGE-L

def lcs_lengths(words: list[str], others: list[list[str]]) -> list[int]:
    """The longest common subsequence with each of the others; places of `words` are bits of an integer."""
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(words):
        places[word] |= 1 << place
    everywhere = (1 << len(words)) - 1
    lengths = []
    for other in others:
        free = everywhere  # Crochemore et al. 2001: a bit turns 0 where the subsequence grows by one
        for word in other:
            hits = free & places.get(word, 0)
            free = (free + hits) | (free - hits)
        lengths.append(len(words) - (free & everywhere).bit_count())
    return lengths


def rouge_l(hypothesis: str, references: list[str], beta: float = 1.2) -> float:
    words, others = hypothesis.split(" "), [reference.split(" ") for reference in references]
    common = lcs_lengths(words, others)
    precision = max(common) / len(words)
    recall = max(length / len(other) for length, other in zip(common, others))  # perhaps of another reference
    if not precision:
        return 0.0
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


# 5. METEOR 1.5 (Denkowski and Lavie 2014) with two of its four stages: equal words, words of equal stem. The
# others need WordNet and 60 MB of paraphrases, and add about 0.02.

STEMS = {"skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl",
         "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl",
         "sky": "sky", "news": "news", "howe": "howe", "atlas": "atlas", "cosmos": "cosmos", "bias": "bias",
         "andes": "andes"}
COMPLETE = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = {"tional": "tion", "enci": "ence", "anci": "ance", "abli": "able", "entli": "ent", "izer": "ize",
          "ization": "ize", "ational": "ate", "ation": "ate", "ator": "ate", "alism": "al", "aliti": "al",
          "alli": "al", "fulness": "ful", "ousli": "ous", "ousness": "ous", "iveness": "ive", "iviti": "ive",
          "biliti": "ble", "bli": "ble", "ogi": "og", "fulli": "ful", "lessli": "less", "li": ""}
STEP_3 = {"tional": "tion", "ational": "ate", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic",
          "ful": "", "ness": "", "ative": ""}
STEP_4 = dict.fromkeys(["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent",
                        "ism", "ate", "iti", "ous", "ive", "ize", "ion"], "")
MAY_FOLLOW = {"ogi": "l", "li": "cdeghkmnrt", "ion": "st"}  # letters before an ending
VOWEL, CONSONANT = "[aeiouy]", "[^aeiouy]"
REGION = re.compile(f"{CONSONANT}*{VOWEL}+{CONSONANT}")
SHORT_SYLLABLE = re.compile(f"(?:^{VOWEL}{CONSONANT}|{CONSONANT}{VOWEL}[^aeiouywxY])$")


@lru_cache(maxsize=1 << 17)
def stem(word: str) -> str:
    """Porter's second English stemmer (Snowball) as it was in METEOR's time."""
    if len(word) <= 2 or word in STEMS:
        return STEMS.get(word, word)
    word = re.sub(f"(^|{VOWEL})y", r"\1Y", word.removeprefix("'"))  # Y: a y that is a consonant
    match = re.match("gener|commun|arsen", word) or REGION.match(word)
    r1 = match.end() if match else len(word)
    match = REGION.match(word, r1)
    r2 = match.end() if match else len(word)
    word = re.sub("('s'|'s|')$", "", word)
    if word.endswith("sses") or word.endswith(("ied", "ies")) and len(word) > 4:
        word = word[:-2]
    elif word.endswith(("ied", "ies")) or re.search("[^su]s$", word) and re.search(VOWEL, word[:-2]):
        word = word[:-1]
    if word in COMPLETE:
        return word
    suffix = re.search("(eedly|eed|ingly|edly|ing|ed)$", word)
    base = word[:suffix.start()] if suffix else word
    if suffix and suffix[0].startswith("ee"):
        word = base + "ee" if len(base) >= r1 else word
    elif suffix and re.search(VOWEL, base):
        if base.endswith(("at", "bl", "iz")) or len(base) <= r1 and SHORT_SYLLABLE.search(base):
            word = base + "e"
        else:
            word = re.sub(r"([bdfgmnprt])\1$", r"\1", base)
    word = re.sub(f"(?<=.{CONSONANT})[yY]$", "i", word)
    for step, region in (STEP_2, r1), (STEP_3, r1), (STEP_4, r2):
        ending = next((word[-size:] for size in range(7, 1, -1) if word[-size:] in step), "")
        base = word.removesuffix(ending)
        start = r2 if ending == "ative" else region
        if ending and len(base) >= start and base[-1] in MAY_FOLLOW.get(ending, base):
            word = base + step[ending]
    short = SHORT_SYLLABLE.search(word[:-1])
    if word[-1:] == "e" and (word[r2:] or word[r1:] and not short) or word[-2:] == "ll" and word[r2:]:
        word = word[:-1]
    return word.replace("Y", "y")


LOWER = "a-zÀ-ÖØ-öø-žЀ-ԧᴀ-ᵿ"  # the letters that METEOR's normaliser knows
NORMALISE = [(re.compile(pattern), replacement) for pattern, replacement in (
    (rf"([^{LOWER}0-9\s.'`,\-‘’])", r" \1 "),
    (r"(\.{2,})", r" \1 "), (r"(?<![0-9]),|,(?![0-9])", " , "),
    ("[`‘’]", "'"), ("''", '"'), ("--", "-"),
    (rf"([{LOWER}0-9.])-([{LOWER}0-9])", r"\1 \2"),  # well-dressed: two words
    (rf"(?<![{LOWER}])'|'(?![{LOWER}])", " ' "),
    (rf"(?<=[{LOWER}])'(?=[{LOWER}])", " '"),  # n't: n and 't
)]
FUNCTION_WORDS = frozenset(re.findall(r"\S+", """
    the , . to of and a in that for " is on 's it with was as said at he by be from have has are his but an
    this not i will they ) -rrb- ( -lrb- who their had we which were been more or s its would about new one
    after you : also up when there than $ all out her people she year two - can if last first over other
    into some what so -- no time years could ? 't '
"""))
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


@lru_cache(maxsize=1 << 17)
def normalise(token: str) -> list[str]:
    token = f" {token} "
    for pattern, replacement in NORMALISE:
        token = pattern.sub(replacement, token)
    return token.split()


def meteor_words(caption: str) -> list[str]:
    """A tokenized caption in METEOR's words: u.s. is us; other full stops go apart unless a word follows."""
    words = [word for token in caption.split(" ") for word in normalise(token)]
    if "." not in caption:
        return words
    apart = []
    for word, following in zip(words, [*words[1:], ""]):
        base, stop = word[:-1], word.endswith(".") and word.strip(".")
        belongs = (base in ("rev", "v", "vs") or re.match("[a-z]", following)
                   or base == "pp" and re.match("[0-9]", following))
        if stop and "." in base and re.search(f"[{LOWER}]", base):
            apart.append(word.replace(".", ""))
        elif stop and not belongs:
            apart += [base, "."]
        else:
            apart.append(word)
    return apart


def align(hypothesis: list[str], reference: list[str], beam: int = 40) -> list[tuple[int, int, int]]:
    """METEOR's alignment: triples of a place in the reference, a place in the hypothesis and a stage.

    A beam search over the reference: a path takes one of a word's matches or none. The order of paths is most
    words, then fewest chunks, then least distance, written as the digits of one integer. Oddities of the
    original: a stem adds no words (half a word, rounded down); a choice adds its distance to the path that it
    branches off, not to its own; a match without rivals is always taken, even where it does not pay.
    """
    if hypothesis == reference:  # the search would find the same, in more time
        return [(place, place, 0) for place in range(len(reference))]
    chunk, two_words = 1 << 32, -1 << 65
    same, same_stem = defaultdict(list), defaultdict(list)
    for place, word in enumerate(hypothesis):
        same[word].append((place, 0))
        same_stem[stem(word)].append((place, 1))
    matches = {}
    rivals = [0] * len(hypothesis)
    for word, times in Counter(reference).items():
        stems = [match for match in same_stem.get(stem(word), ()) if hypothesis[match[0]] != word]
        matches[word] = same.get(word, []) + stems
        for place, _ in matches[word]:
            rivals[place] += times

    paths = [(0, -1, 0, None)]  # order, place that would continue the chunk, bits of places used, pairs
    for i, word in enumerate(reference):
        if len(paths) > 1:
            paths = sorted(paths, key=itemgetter(0))[:beam]
        found = matches[word]
        forced = len(found) == 1 and rivals[found[0][0]] == 1
        branches = []
        for order, continuing, used, pairs in paths:
            ended = chunk if continuing >= 0 else 0
            choices = 0
            for j, stage in found:
                if used >> j & 1:
                    continue
                choices += 1
                distance = abs(i - j)
                if choices <= beam or j == continuing:  # no other could survive
                    taken = (order + (0 if stage else two_words) + (0 if j == continuing else ended)
                             + (distance if forced else 0))
                    branches.append((taken, j + 1, used | 1 << j, (pairs, (i, j, stage))))
                order += distance
            if not forced:
                branches.append((order + ended, -1, used, pairs))
        paths = branches
    paths = sorted(paths, key=itemgetter(0))[:beam]
    *_, pairs = min(paths, key=lambda path: path[0] + (chunk if path[1] >= 0 else 0))
    alignment = []
    while pairs:
        pairs, last = pairs
        alignment.append(last)
    return alignment[::-1]


def meteor_statistics(hypothesis: list[str], reference: list[str]) -> list[int]:
    """The original's 23 numbers, in pairs for hypothesis and reference: words, function words, for each of
    four stages matched content and matched function words, (one number) chunks, all matched words."""
    counts = [0] * 16
    pairs = align(hypothesis, reference)
    for i, j, stage in pairs:
        counts[4 * stage + 2 * (hypothesis[j] in FUNCTION_WORDS)] += 1
        counts[4 * stage + 2 * (reference[i] in FUNCTION_WORDS) + 1] += 1
    chunks = len(pairs) - sum((i + 1, j + 1) == (k, m) for (i, j, _), (k, m, _) in pairwise(pairs))
    functions = [sum(word in FUNCTION_WORDS for word in words) for words in (hypothesis, reference)]
    return [len(hypothesis), len(reference), *functions, *counts, chunks, len(pairs), len(pairs)]


def meteor(sums: np.ndarray, alpha: float = 0.85, beta: float = 0.2, gamma: float = 0.6, delta: float = 0.75
           ) -> np.ndarray:
    words, functions, chunks = sums[..., :2], sums[..., 2:4], sums[..., 20]
    matched = STAGE_WEIGHTS @ sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = ((delta * matched[..., :2] + (1 - delta) * matched[..., 2:])
                  / (delta * (words - functions) + (1 - delta) * functions))
        f_mean = 1 / ((1 - alpha) / shares[..., 0] + alpha / shares[..., 1])  # of precision and recall
        score = f_mean * (1 - gamma * (chunks / sums[..., 21:].mean(-1)) ** beta)
    return np.maximum(0, np.nan_to_num(score))  # nan: nothing matched


def meteor_score(statistics: np.ndarray) -> Score:
    """From rows of 23 numbers. A perfect match has no chunks, so that it reaches 1."""
    perfect = (statistics[:, :2] == statistics[:, 21:]).all(1) & (statistics[:, 20] == 1)
    statistics = statistics.copy()
    statistics[perfect, 20] = 0
    return Score(statistics, meteor)


def meteor_exact_stem(hypotheses: list[str], references: list[list[str]]) -> Score:
    """METEOR without synonyms and paraphrases, of tokenized captions; an image's best reference counts."""
    statistics = [meteor_statistics(hypothesis, meteor_words(text))
                  for hypothesis, texts in zip(map(meteor_words, hypotheses), references) for text in texts]
    score = meteor_score(np.array(statistics, dtype=float).reshape(-1, 23))
    values, bounds = score.per_image, np.cumsum([0] + [len(texts) for texts in references])
    best = [first + int(values[first:last].argmax()) for first, last in pairwise(bounds)]
    return Score(score.statistics[best], meteor)


def meteor_original(hypotheses: list[str], references: list[list[str]], jar: str | Path) -> Score:
    """METEOR by its authors' program: it counts, we score, so that it can be resampled like the others."""
    jar = Path(jar).absolute()
    paraphrases = jar.parent / "data" / "paraphrase-en.gz"
    for file in jar, paraphrases:
        if not file.is_file():
            raise UserError(f"no {file}: --meteor-jar needs meteor-1.5.jar, data/paraphrase-en.gz beside it")
    java = shutil.which("java")
    if not java:
        raise UserError("--meteor-jar needs Java; without the option there is METEOR (exact+stem)")
    captions = [["SCORE", *texts, hypothesis] for hypothesis, texts in zip(hypotheses, references)]
    lines = [" ||| ".join(" ".join(text.replace("|||", "").splitlines()) for text in row) for row in captions]
    # The program looks for its paraphrases beside itself, but misses them if the path has a blank: hence -a.
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
               "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm", "-a", paraphrases]
    questions = "\n".join([*lines, ""])
    run = subprocess.run(command, input=questions, capture_output=True, encoding="utf-8", check=False)
    rows = [line.split() for line in run.stdout.splitlines()]
    if run.returncode or [len(row) for row in rows] != [23] * len(lines):
        message = run.stderr.strip()[-1000:] or f"it gave {len(rows)} answers to {len(lines)} questions"
        raise UserError(f"{jar.name} failed with code {run.returncode}: {message}")
    return meteor_score(np.array(rows, dtype=float).reshape(-1, 23))


def text_scores(explanations: list[str], references: list[list[str]], jar: str | Path | None = None
                ) -> Scores:
    """BLEU, METEOR, ROUGE-L and CIDEr-D of one explanation per image against all references of the image."""
    hypotheses = [tokenize(text) for text in explanations]
    references = [[tokenize(text) for text in texts] for texts in references]
    scores = ngram_scores(hypotheses, references)
    scores["METEOR (exact+stem)"] = meteor_exact_stem(hypotheses, references)
    if jar:
        scores["METEOR"] = meteor_original(hypotheses, references, jar)
    scores["ROUGE-L"] = mean_score([rouge_l(text, texts) for text, texts in zip(hypotheses, references)])
    return scores


# 6. Explanations

METAPHORS = ("could be", "appears to be", "appear to be", "reminds me", "remind me", "seems like",
             "looks like", "look like", "is like", "are like", "think of", "resembles", "resembling")


def is_metaphor(text: str) -> bool:
    """Whether it has one of ArtEmis's thirteen phrases of comparison."""
    return any(phrase in text.lower() for phrase in METAPHORS)


def unique_share(explanations: Sequence[str]) -> Score:
    """Distinct explanations / explanations: each of k equal ones counts 1 / k."""
    copies = Counter(explanations)
    return mean_score([1 / copies[text] for text in explanations])


def novelty(explanations: Sequence[str], training: Sequence[str], samples: tuple[int, int] = (800, 25_000),
            seed: int = 0) -> Scores:
    """The longest common subsequence with training explanations: its maximum and its mean over them.

    As ArtEmis does, of 800 predictions and 25,000 training explanations drawn at random; the maximum grows
    with their number, so only equal numbers compare. The training explanations lie side by side in the bits
    of one integer, with a gap behind each for its carry, and `lcs_lengths` runs on all of them at once.
    """
    draw = np.random.default_rng(seed)
    captions = [tokenize(training[row]).split() for row in draw.permutation(len(training))[:samples[1]]]
    numbers: dict[str | None, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for text in captions for word in [*text, None]])
    sizes = np.array([len(text) + 1 for text in captions])

    @lru_cache(maxsize=500)
    def places(word: str | None) -> int:
        bits = np.packbits(words == numbers.get(word, -1), bitorder="little")
        return int.from_bytes(bits.tobytes(), "little")

    everywhere = (1 << len(words)) - 1 - places(None)
    longest, mean, counted = np.zeros((3, len(explanations)))
    for row in draw.permutation(len(explanations))[:samples[0]]:
        free = everywhere
        for word in tokenize(explanations[row]).split():
            hits = free & places(word)
            free = ((free + hits) | (free - hits)) & everywhere
        taken = (everywhere - free).to_bytes(len(words) // 8 + 1, "little")
        bits = np.unpackbits(np.frombuffer(taken, dtype=np.uint8), bitorder="little", count=len(words))
        common = np.add.reduceat(bits, np.cumsum(sizes) - sizes, dtype=int)
        longest[row], mean[row], counted[row] = common.max(), common.mean(), True
    return {"LCS-max": mean_score(longest, counted), "LCS-mean": mean_score(mean, counted)}


# 7. Emotions, as places in EMOTIONS; None stands for no dominant one, no prediction or an unknown word

def histogram(emotions: Sequence[str]) -> list[int]:
    return [list(emotions).count(emotion) for emotion in EMOTIONS]


def dominant_emotion(votes: Sequence[int], half_is_enough: bool = False) -> int | None:
    """The emotion with more than half of the votes; ArtEmis itself takes half, if no other has as many."""
    second, first = sorted(votes)[-2:]
    enough = 2 * first >= sum(votes) if half_is_enough else 2 * first > sum(votes)
    return list(votes).index(first) if enough and first > second else None


def split_caption(caption: str) -> tuple[str, str]:
    """Emotion and explanation of "awe because it glows", as the authors cut it: before the first "because"
    and after the last; without one all is the emotion, and all but the first two words the explanation."""
    emotion, because, _ = caption.partition("because")
    explanation = caption.rpartition("because")[2] if because else " ".join(caption.split()[2:])
    return emotion.strip(), explanation.strip()


def accuracy(predicted: Sequence[int | None], targets: Sequence[int | None]) -> Score:
    """ACC: the share of paintings with a dominant emotion for which it is predicted."""
    return mean_score([p == t for p, t in zip(predicted, targets)], [t is not None for t in targets])


def emotion_alignment(classified: Sequence[int], votes: Sequence[Sequence[int]], half_is_enough: bool = False
                      ) -> Score:
    """EA: as ACC, with the emotion that a text classifier reads from the explanation."""
    return accuracy(classified, [dominant_emotion(row, half_is_enough) for row in votes])


def confusion_matrix(predicted: Sequence[int | None], targets: Sequence[int | None]) -> np.ndarray:
    """Row: dominant emotion. Column: predicted emotion, the last one for none of the nine."""
    matrix = np.zeros((len(EMOTIONS), len(EMOTIONS) + 1), dtype=int)
    for p, t in zip(predicted, targets):
        if t is not None:
            matrix[t, -1 if p is None else p] += 1
    return matrix


def calibration_error(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]


def distribution_scores(probabilities: np.ndarray, votes: np.ndarray, bins: int = 10) -> Scores:
    """KL(votes || prediction) in nats; on paintings with a dominant emotion the expected calibration error
    (confidence against accuracy, bin by bin) and how often that emotion is among the two likeliest."""
    shares = votes / votes.sum(1, keepdims=True)
    surprise = np.log(np.maximum(shares, 1e-9)) - np.log(np.maximum(probabilities, 1e-9))  # never infinite
    targets = [dominant_emotion(row) for row in votes.tolist()]
    counted = np.array([target is not None for target in targets])
    hits = np.argsort(-probabilities, axis=1, kind="stable")[:, :2] == np.array(targets, dtype=float)[:, None]
    confidence = probabilities.max(1)
    gaps = np.zeros((len(votes), bins + 1))
    gaps[np.arange(len(votes)), np.minimum(bins * confidence, bins - 1).astype(int)] = confidence - hits[:, 0]
    gaps[:, -1] = 1
    return {"KL": mean_score((shares * surprise).sum(1)),
            "ECE": Score(gaps * counted[:, None], calibration_error),
            "Top-2": mean_score(hits.any(1), counted)}


# 8. TextClassifier

class TextClassifier(nn.Module):
    """The emotion of an explanation: words -> 100 -> LSTM 2 x 256 -> maximum over the words -> 100 -> 9."""

    def __init__(self, words: list[str], accuracy: float = math.nan, hidden: int = 256):
        super().__init__()
        self.words, self.accuracy = words, accuracy  # accuracy: on the test split, printed beside every EA
        self.rows = {word: row for row, word in enumerate(words, 2)}  # 0: padding, 1: unknown
        self.embedding = nn.Embedding(len(words) + 2, 100, padding_idx=0)
        self.lstm = nn.LSTM(100, hidden, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 100), nn.ReLU(), nn.Linear(100, len(EMOTIONS)))

    @property
    def credit(self) -> str:
        return f"EA: by a classifier that is right for {100 * self.accuracy:.1f}% of the test texts"

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.rows.get(word, 1) for word in tokenize(text).split()] or [1])

    def forward(self, encoded: Sequence[Tensor]) -> Tensor:
        ids = pad_sequence(encoded, batch_first=True).to(self.embedding.weight.device)
        lengths = torch.tensor([len(row) for row in encoded])
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-torch.inf)
        return self.head(states.amax(1))  # (B, 9)

    @torch.no_grad()
    def predict(self, texts: Sequence[str], batch: int = 1024) -> list[int]:
        self.eval()
        encoded = [self.encode(text) for text in texts]
        return [emotion for first in range(0, len(encoded), batch)
                for emotion in self(encoded[first:first + batch]).argmax(1).tolist()]

    def save(self, path: str | Path) -> None:
        about = {"words": json.dumps(self.words), "accuracy": str(self.accuracy), "hidden": str(self.lstm.hidden_size)}
        with replacing(path) as temporary:
            save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, temporary, about)

    @classmethod
    def load(cls, path: str | Path) -> "TextClassifier":
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                classifier = cls(json.loads(about["words"]), float(about["accuracy"]), int(about["hidden"]))
                classifier.load_state_dict({name: file.get_tensor(name) for name in classifier.state_dict()})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"cannot read the text classifier {path}: {error}") from None
        return classifier


def train_text_classifier(texts: Sequence[str], labels: Sequence[int], validation_texts: Sequence[str],
                          validation_labels: Sequence[int], seed: int = 0, rare: int = 5, batch: int = 1024,
                          epochs: int = 40, patience: int = 5, hidden: int = 256, device: str = "cpu"
                          ) -> TextClassifier:
    """ArtEmis's recipe: Adam at 5e-4, halved at epochs 10, 20 and 30; the epoch that validates best is kept.

    Words seen fewer than `rare` times are unknown; `patience` epochs without a gain end the training.
    """
    seen = Counter(word for text in texts for word in tokenize(text).split())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = sorted(word for word, count in seen.items() if count >= rare)
        classifier = TextClassifier(known, hidden=hidden).to(device)
    encoded, answers = [classifier.encode(text) for text in texts], torch.tensor(labels)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20, 30], gamma=0.5)
    shuffle = torch.Generator().manual_seed(seed)
    best, best_epoch, best_weights = -1.0, 0, {}
    for epoch in range(epochs):
        classifier.train()
        batches = torch.randperm(len(encoded), generator=shuffle).split(batch)
        for rows in progress(batches, f"text classifier, epoch {epoch + 1}"):
            logits = classifier([encoded[row] for row in rows.tolist()])
            loss = F.cross_entropy(logits, answers[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        share = accuracy(classifier.predict(validation_texts), validation_labels).value
        if share > best:
            best, best_epoch = share, epoch
            best_weights = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        if epoch - best_epoch >= patience:
            break
    classifier.load_state_dict(best_weights)
    return classifier


SMALL = 50_000  # texts; fewer need neither ArtEmis's width nor its batches of 1,024


def text_classifier_of(art: Art) -> TextClassifier:
    """The judge of a data set, trained on its training explanations at first need and stored beside them.

    One judge scores every system, so that its own mistakes are the same for all.
    """
    path = art.folder / "cache" / f"{art.name}-ea-{fingerprint(art.texts)[:8]}.safetensors"
    if path.is_file():
        return TextClassifier.load(path)
    def split(name: str) -> tuple[list[str], list[int]]:
        rows = art.rows(name)
        return [art.texts[row] for row in rows], art.emotion[rows].tolist()
    train = split("train")
    size = dict(hidden=64, batch=64, epochs=4) if len(train[0]) < SMALL else {}
    classifier = train_text_classifier(*train, *split("val"), **size,
                                       device="cuda" if torch.cuda.is_available() else "cpu")
    texts, labels = split("test")
    classifier.accuracy = accuracy(classifier.predict(texts), labels).value
    classifier.save(path)
    return classifier.cpu()


# 9. Significance

def resampled(scores: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Each score of images drawn with replacement, the same draws for all scores and for every system.

    The document frequencies of CIDEr and the copies that Unique counts stay those of the whole set.
    """
    images = len(next(iter(scores.values())).statistics)
    draw = np.random.default_rng(seed)
    values = {name: [] for name in scores}
    for _ in range(resamples):
        times = np.bincount(draw.integers(images, size=images), minlength=images)
        for name, score in scores.items():
            values[name].append(score.formula(times @ score.statistics))
    return {name: np.array(column, float) for name, column in values.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    low, high = np.percentile(defined if len(defined) else [math.nan], [2.5, 97.5]).tolist()
    return low, high


def bootstrap(scores: Scores, resamples: int = 1000, seed: int = 0) -> Intervals:
    """95% intervals."""
    return {name: interval(values) for name, values in resampled(scores, resamples, seed).items()}


def differences(scores: Scores, others: Scores, mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
                ) -> dict[str, dict]:
    """For each score of two systems the difference, its paired 95% interval, and the p-value. `mine` and `theirs`
    are `resampled` of the two."""
    chances = p_values(scores, others)
    return {name: {"difference": scores[name].value - others[name].value,
                   "interval": interval(mine[name] - theirs[name]), "p": p} for name, p in chances.items()}


def mcnemar(first: Score, second: Score) -> float:
    """Exact two-sided p-value of two systems that are right or wrong: a coin per image they differ in."""
    difference = first.statistics[:, 0] - second.statistics[:, 0]
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def permutation_test(first: Score, second: Score, signs: np.ndarray) -> float:
    """How often the systems differ as much when they swap their results for a random half of the images."""
    total = (first.statistics + second.statistics).sum(0)
    swing = signs @ (first.statistics - second.statistics)
    gaps = np.abs(first.formula((total + swing) / 2) - first.formula((total - swing) / 2))
    smaller = int((gaps < abs(first.value - second.value) - 1e-12).sum())
    return 1 - smaller / (1 + len(signs))


def p_values(scores: Scores, others: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Paired p-values of the scores both systems have: McNemar for ACC and EA, permutation for the others."""
    images = len(next(iter(scores.values())).statistics)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, images))
    both = {name: (score, others[name]) for name, score in scores.items() if name in others}
    return {name: mcnemar(*pair) if name in ("ACC", "EA") and pair[0].statistics.max() <= 1
            else permutation_test(*pair, signs) for name, pair in both.items()}


# 10. Files, main

@dataclass
class Prediction:
    emotion: str
    explanation: str
    probabilities: list[float] | None = None  # of the nine EMOTIONS


@dataclass
class Reference:
    emotions: list[str]  # of the annotations whose explanations count
    explanations: list[str]
    votes: list[int] = field(default_factory=list)  # nine, of all annotations; default: those in `emotions`

    def __post_init__(self) -> None:
        self.votes = self.votes or histogram(self.emotions)


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None


def read_prediction(record: dict) -> tuple[str, Prediction]:
    image = str(record["image"] if "image" in record else record["image_id"])
    if "caption" in record:
        return image, Prediction(*split_caption(record["caption"]))
    probabilities = record.get("probabilities")
    if isinstance(probabilities, dict):
        probabilities = [probabilities[emotion] for emotion in EMOTIONS]
    if probabilities and (len(probabilities) != len(EMOTIONS) or not abs(sum(probabilities) - 1) < 1e-3):
        raise ValueError
    return image, Prediction(record["emotion"].strip(), record["explanation"].strip(), probabilities)


def read_predictions(path: Path, last: bool = False) -> dict[str, Prediction]:
    """From JSON lines of image, emotion, explanation, probabilities, or COCO results of image_id, caption."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"entry {number}", record) for number, record in enumerate(parse_json(text, path), 1)]
    else:
        records = [(f"line {number}", parse_json(line, path, number))
                   for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not records:
        raise UserError(f"{path} is empty")
    predictions = {}
    for where, record in records:
        try:
            image, predictions[image] = read_prediction(record)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}, {where}: expected image, emotion, explanation and perhaps nine "
                            "probabilities that sum to 1, or image_id and caption") from None
    if len(predictions) < len(records) and not last:
        raise UserError(f"{path}: {len(records) - len(predictions)} of {len(records)} predictions are for an "
                        "image that has one already; name --last to let the last one count")
    return predictions


def read_references(path: Path) -> dict[str, Reference]:
    """From JSON {image: {emotions, explanations}}, or COCO annotations, perhaps like "awe because ..."."""
    content = parse_json(read_text(path), path)
    try:
        if "annotations" in content:
            entries: dict[str, dict[str, list[str]]] = {}
            for annotation in content["annotations"]:
                entry = entries.setdefault(str(annotation["image_id"]), {"emotions": [], "explanations": []})
                emotion, explanation = split_caption(annotation["caption"])
                if emotion in EMOTIONS:
                    entry["emotions"].append(emotion)
                entry["explanations"].append(explanation if emotion in EMOTIONS else annotation["caption"])
            content = entries
        references = {image: Reference(**entry) for image, entry in content.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: expected image: {{emotions, explanations}} or COCO annotations") from None
    for image, reference in references.items():
        unknown = set(reference.emotions) - set(EMOTIONS)
        if unknown:
            raise UserError(f"{path}: image {image} has the unknown emotion {min(unknown)!r}; "
                            f"the emotions are {', '.join(EMOTIONS)}")
        texts = reference.explanations
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            raise UserError(f"{path}: image {image} needs a list of one or more explanations")
    if not references:
        raise UserError(f"{path} has no images")
    return references


def references_of(art: Art, split: str) -> dict[str, Reference]:
    return {name: Reference(**entry) for name, entry in art.references(split).items()}


def load_references(options: argparse.Namespace) -> tuple[dict[str, Reference], list[str], TextClassifier | None]:
    """References by image; with --data also the training explanations, for novelty, and the judge of EA."""
    judge = TextClassifier.load(options.text_classifier) if options.text_classifier else None
    if options.references:
        return read_references(options.references), [], judge
    art = art_of(options)
    training = [art.texts[row] for row in art.rows("train")]
    return references_of(art, options.split), training, judge or text_classifier_of(art)


def load_predictions(path: Path, references: Mapping[str, Reference], options: argparse.Namespace
                     ) -> dict[str, Prediction]:
    """Predictions that go with the references: none of other images, none missing unless allowed."""
    predictions = read_predictions(path, options.last)
    strangers = [image for image in predictions if image not in references]
    if strangers:
        raise UserError(f"{path}: {len(strangers)} of {len(predictions)} predictions are for images that the "
                        f"references do not have, such as {strangers[0]}")
    missing = [image for image in references if image not in predictions]
    if missing and not options.allow_missing:
        raise UserError(f"{path}: {len(missing)} of {len(references)} images have no prediction, such as "
                        f"{missing[0]}; name --allow-missing to go on without them")
    if missing:
        print(f"{path}: {len(missing)} of {len(references)} images have no prediction; ACC counts them as "
              "wrong, the other scores leave them out", file=sys.stderr)
    return predictions


def emotions_of(predictions: Mapping[str, Prediction], references: Mapping[str, Reference]
                ) -> tuple[list[int | None], list[int | None]]:
    """Predicted and dominant emotion of every image."""
    names = [predictions[image].emotion if image in predictions else None for image in references]
    return ([EMOTIONS.index(name) if name in EMOTIONS else None for name in names],
            [dominant_emotion(reference.votes) for reference in references.values()])


def evaluate(predictions: Mapping[str, Prediction], references: Mapping[str, Reference],
             training: Sequence[str] = (), classifier: TextClassifier | None = None,
             jar: str | Path | None = None) -> Scores:
    """All scores. An image without prediction is wrong for ACC and left out of the others."""
    present = np.array([image in predictions for image in references])
    given = [predictions[image] for image in references if image in predictions]
    known = [reference for image, reference in references.items() if image in predictions]
    explanations = [prediction.explanation for prediction in given]
    scores = {}
    if classifier:
        votes = [histogram(reference.emotions) for reference in known]
        scores["EA"] = emotion_alignment(classifier.predict(explanations), votes)
    scores |= text_scores(explanations, [reference.explanations for reference in known], jar)
    scores["Unique"] = unique_share(explanations)
    scores["Words"] = mean_score([len(text.split()) for text in explanations])
    scores["Metaphors"] = mean_score([is_metaphor(text) for text in explanations])
    if training:
        scores |= novelty(explanations, training)
    if all(prediction.probabilities and any(reference.votes) for prediction, reference in zip(given, known)):
        scores |= distribution_scores(np.array([prediction.probabilities for prediction in given]),
                                      np.array([reference.votes for reference in known]))
    acc = accuracy(*emotions_of(predictions, references))
    return {"ACC": acc} | {name: score.spread(present) for name, score in scores.items()}


def display(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value if name in ('Words', 'LCS-max', 'LCS-mean', 'KL') else 100 * value:.2f}"


def table(scores: Scores, intervals: Intervals, others: Scores, chances: dict[str, float]) -> str:
    """A line per score: value, 95% interval, number of images; then the other system's value and p-value."""
    rows = [["", "score", "95% interval", "images", *(["versus", "p"] if others else [])]]
    for name, score in scores.items():
        low, high = (display(name, bound) for bound in intervals[name])
        rows.append([name, display(name, score.value), f"{low} .. {high}", f"{score.images:,}"])
        if others:
            known = name in others
            rows[-1] += [display(name, others[name].value), f"{chances[name]:.3f}"] if known else ["-", "-"]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, numbers to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, row, widths)]) for name, *row in rows)


def number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)  # JSON has no nan


def as_json(scores: Scores, intervals: Intervals, others: Scores, chances: dict[str, float]) -> dict:
    """Scores as they are, not times 100; null where there is nothing to score."""
    result = {name: number(score.value) for name, score in scores.items()}
    result["intervals"] = {name: [number(bound) for bound in bounds] for name, bounds in intervals.items()}
    result["counts"] = {"images": len(scores["ACC"].statistics)}
    result["counts"] |= {name: score.images for name, score in scores.items()}
    if others:
        result["versus"] = {name: number(score.value) for name, score in others.items()}
        result["p"] = dict(chances)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Score predicted emotions and explanations.")
    parser.add_argument("--predictions", type=Path, metavar="FILE",
                        help="JSON lines of image, emotion, explanation (and probabilities), or COCO results")
    parser.add_argument("--versus", type=Path, metavar="FILE", help="predictions of a system to compare with")
    parser.add_argument("--references", type=Path, metavar="FILE",
                        help="JSON of image: {emotions, explanations}, or COCO annotations; or name --data")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="of --data")
    parser.add_argument("--train-ea", action="store_true", help="train the judge of EA for --data, if there is none")
    parser.add_argument("--text-classifier", type=Path, metavar="FILE", help="another judge of EA, a .safetensors")
    parser.add_argument("--meteor-jar", type=Path, metavar="FILE",
                        help="meteor-1.5.jar, for the full METEOR; needs Java, takes half a minute")
    parser.add_argument("--last", action="store_true", help="of several predictions for an image the last")
    parser.add_argument("--allow-missing", action="store_true", help="score although predictions are missing")
    parser.add_argument("--json", action="store_true", help="print JSON; scores are not times 100")
    parser.add_argument("--per-image", action="store_true", help="print JSON with every image's scores too")
    add_data_options(parser, data=None)
    options = parser.parse_args()
    if options.train_ea and options.data:
        print(text_classifier_of(art_of(options)).credit)
        if not options.predictions:
            return
    if not options.predictions or bool(options.references) == bool(options.data):
        parser.error("name --predictions, and either --references or --data; or --train-ea and --data")
    references, training, judge = load_references(options)
    predictions = load_predictions(options.predictions, references, options)
    scores, others = evaluate(predictions, references, training, judge, options.meteor_jar), {}
    if options.versus:
        rivals = load_predictions(options.versus, references, options)
        others = evaluate(rivals, references, training, judge, options.meteor_jar)
    intervals, chances = bootstrap(scores), p_values(scores, others)
    if not (options.json or options.per_image):
        print(table(scores, intervals, others, chances))
        if judge:
            print(judge.credit)
        return
    result = as_json(scores, intervals, others, chances)
    result["confusion"] = confusion_matrix(*emotions_of(predictions, references)).tolist()
    if judge:
        result["EA classifier"] = number(judge.accuracy)
    if options.per_image:
        columns = {name: score.per_image for name, score in scores.items()}
        result["per_image"] = {image: {name: number(column[row]) for name, column in columns.items()}
                               for row, image in enumerate(references) if image in predictions}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_program(main)

"""Words to emotion: valence, arousal and dominance (VAD) of a text, token by token (sections 4.2.1 and 4.2.2).

Psychologists have rated words on three scales: valence (unpleasant .. pleasant), arousal (calm .. excited)
and dominance (powerless .. in control). This file turns a sentence into such vectors and encodes them:

    1. Lexicon          the table word -> (v, a, d), read from the NRC VAD lexicon or our own small list
    2. Lemmas           "cities" -> "city", by suffix rules and a list of irregular forms; no library
    3. WordVAD          token ids -> rows of the lexicon, by the word spelled so far            (N, L) -> (N, L)
    4. EmotionEncoder   VAD vectors -> emotion features f^E, a transformer of width 3 (Eq. 2)   (N, L, 3)
    5. vad_loss         the emotion loss on the VAD head's predictions (Eq. 5)

Shapes: N sentences, L tokens, V vocabulary. It imports nothing of the project; the last part holds the few
household helpers that all our programs share. To see parts 1 to 3 at work:

    python vad.py "a gloomy sky over the quiet sea"
"""
import argparse
import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
OUR_LEXICON = HERE / "examples" / "lexicon.txt"
OUR_TOKENIZER = HERE / "examples" / "toy" / "tokenizer.json"


# 1. Lexicon

@dataclass
class Lexicon:
    """Rated words. Row 0 of `values` is (0, 0, 0) and stands for every word that is not known."""
    rows: dict[str, int]  # word -> row of `values`
    values: Tensor  # (words + 1, 3), all in -1..1
    phrases_skipped: int  # terms of several words: tokens are looked up word by word

    def lemma(self, word: str) -> str | None:
        """The word itself, or the first base form of it that the lexicon knows."""
        return next((lemma for lemma in lemmas(word.lower()) if lemma in self.rows), None)


def read_lexicon(path: str | Path = OUR_LEXICON) -> Lexicon:
    """Read NRC VAD v1 (0..1), its bipolar version (-1..1) or v2 (-1..1), told apart by their content."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the lexicon {path}: {error}") from None
    header = [cell.strip().lower() for cell in lines[0].split("\t")] if lines else []
    has_header = header[1:] == ["valence", "arousal", "dominance"]
    rated, phrases = {}, 0
    for number, line in enumerate(lines[has_header:], 1 + has_header):
        if not line.strip():
            continue
        try:
            word, *numbers = line.split("\t")
            valence, arousal, dominance = map(float, numbers)
        except ValueError:
            raise UserError(f"{path}, line {number}: expected a word and three numbers (valence, arousal, "
                            f"dominance) between tabs, found {line[:60]!r}") from None
        if not all(-1 <= rating <= 1 for rating in (valence, arousal, dominance)):  # nor nan
            raise UserError(f"{path}, line {number}: ratings must lie in -1..1 or 0..1, found {line[:60]!r}")
        if " " in word.strip():
            phrases += 1
        else:
            rated.setdefault(word.strip().lower(), (valence, arousal, dominance))
    if not rated:
        raise UserError(f"{path}: no rated words; expected lines of word, valence, arousal, dominance")
    values = torch.tensor(list(rated.values()))
    if header[:1] != ["term"] and values.min() >= 0:  # only v1 rates in 0..1
        values = 2 * values - 1
    rows = {word: row for row, word in enumerate(rated, 1)}
    return Lexicon(rows, torch.cat([torch.zeros(1, 3), values]), phrases)


# 2. Lemmas. A rule (suffix, ending) takes a suffix off and puts the ending on: ("ies", "y") makes "cities"
# "city". Rules are tried in this order and the first result that the lexicon knows wins, so the order says
# what is likelier: "hoping" is "hope" before "hop", "calling" is "call" before "cal".

DOUBLED = "bdfgklmnprstz"  # consonants that English doubles before a suffix: "hopped" is "hop"
SUFFIXES = ("ed", "ing", "er", "est")
RULES = [
    ("sses", "ss"), ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"),
    ("ied", "y"), ("ier", "y"), ("iest", "y"), ("ying", "ie"), ("cking", "c"), ("cked", "c"),
    *((2 * letter + suffix, kept * letter) for letter in DOUBLED for suffix in SUFFIXES for kept in (2, 1)),
    ("nging", "ng"), ("nged", "ng"),  # "singing" is "sing" before "singe"
    *((suffix, ending) for suffix in SUFFIXES for ending in ("e", "")),
    ("ically", "ic"), ("ily", "y"), ("lly", "ll"), ("ly", "le"), ("ly", ""),
]
SHORTEST = 3  # letters that a rule must leave: "his" is no plural of "hi"

IRREGULAR = {form: base for base, *forms in map(str.split, """
be am is are was were been being isn't aren't wasn't weren't|have has had having haven't hasn't hadn't
do does did done doing don't doesn't didn't|can can't cannot|could couldn't|will won't|would wouldn't
shall shan't|should shouldn't|must mustn't|need needn't|might mightn't|dare daren't|ought oughtn't
arise arose arisen|awake awoke awoken|bear bore borne born|beat beaten|become became|befall befell befallen
begin began begun|behold beheld|bend bent|bind bound|bite bit bitten|bleed bled|blow blew blown
break broke broken|breed bred|bring brought|build built|burn burnt|buy bought|catch caught|choose chose chosen
cling clung|come came|creep crept|deal dealt|die dying|dig dug|draw drew drawn|dream dreamt|drink drank drunk
drive drove driven|dwell dwelt|dye dyeing|eat ate eaten|fall fell fallen|feed fed|feel felt|fight fought
find found|flee fled|fling flung|fly flew flown|forbid forbade forbidden|foresee foresaw foreseen
forget forgot forgotten|forgive forgave forgiven|freeze froze frozen|get got gotten|give gave given
go goes went gone|grind ground|grow grew grown|hang hung|hear heard|hide hid hidden|hold held|keep kept
kneel knelt|know knew known|lay laid|lead led|lean leant|leap leapt|learn learnt|leave left|lend lent
lie lay lain lying|light lit|lose lost|make made|mean meant|meet met|mistake mistook mistaken|mow mown
overcome overcame|overtake overtook overtaken|pay paid|plead pled|prove proven|ride rode ridden|ring rang rung
rise rose risen|run ran|say said|see saw seen|seek sought|sell sold|send sent|sew sewn|shake shook shaken
shear shorn|shine shone|shoot shot|show shown|shrink shrank shrunk|sing sang sung|sink sank sunk|sit sat
slay slew slain|sleep slept|slide slid|sling slung|smell smelt|sow sown|speak spoke spoken|speed sped
spell spelt|spend spent|spill spilt|spin spun|spit spat|spoil spoilt|spring sprang sprung|stand stood
steal stole stolen|stick stuck|sting stung|stink stank stunk|strew strewn|stride strode stridden|strike struck
string strung|strive strove striven|swear swore sworn|sweep swept|swell swollen|swim swam swum|swing swung
take took taken|teach taught|tear tore torn|tell told|think thought|throw threw thrown|tread trod trodden
understand understood|undergo underwent undergone|undertake undertook undertaken|wake woke woken
wear wore worn|weave wove woven|weep wept|win won|wind wound|withdraw withdrew withdrawn|withstand withstood
wring wrung|write wrote written|child children|foot feet|goose geese|louse lice|mouse mice|ox oxen|tooth teeth
person people|penny pence|die dice|leaf leaves|loaf loaves|half halves|axis axes|basis bases|crisis crises
analysis analyses|thesis theses|oasis oases|hypothesis hypotheses|phenomenon phenomena|criterion criteria
bacterium bacteria|medium media|datum data|curriculum curricula|formula formulae|stimulus stimuli
nucleus nuclei|radius radii|cactus cacti|fungus fungi|index indices|matrix matrices|appendix appendices
bus buses busses|quiz quizzes|good better best|bad worse worst|far farther further farthest furthest
little less least|many more most|much|well|truly|due duly|whole wholly|true truer truest|dry drier dryer
""".replace("\n", "|").strip("|").split("|")) for form in forms}


def lemmas(word: str) -> Iterator[str]:
    """What a lower-case word may be a form of, likeliest first, itself before all."""
    yield word
    for clitic in ("'s", "'"):
        if word.endswith(clitic):
            word = word.removesuffix(clitic)
            yield word
    if word in IRREGULAR:
        yield IRREGULAR[word]
    for suffix, ending in RULES:
        if word.endswith(suffix) and len(word) - len(suffix) + len(ending) >= SHORTEST:
            yield word.removesuffix(suffix) + ending


def spellings(lexicon: Lexicon) -> dict[str, int]:
    """`lemmas` read backwards: every spelling whose lemma the lexicon knows, with its row."""
    rows = dict(lexicon.rows)
    for form, base in IRREGULAR.items():
        if base in lexicon.rows:
            rows.setdefault(form, lexicon.rows[base])
    for suffix, ending in RULES:
        for word, row in lexicon.rows.items():
            if word.endswith(ending) and len(word) >= SHORTEST:
                rows.setdefault(word[:len(word) - len(ending)] + suffix, row)
    return rows


# 3. WordVAD. A token has the VAD of the word spelled so far, from the last word start through this token:
# after " melan" the word is "melan", after "choly" it is "melancholy". The rule looks only back, so training
# and decoding see the same values. Special tokens and unknown words have row 0.

def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each token of a byte-level BPE spells; bytes that are no whole letter become U+DC80..U+DCFF."""
    # Byte-level BPE writes the 188 printable bytes as themselves and the others as U+0100, U+0101, ...
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    special = tokenizer.get_added_tokens_decoder()
    texts = ["\n"] * tokenizer.get_vocab_size()  # special tokens separate words, as a line break does
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            texts[index] = bytes(byte_of[letter] for letter in token).decode("utf-8", "surrogateescape")
    return texts


def continue_word(text: str) -> tuple[bool, str]:
    """Does this token's text end the word before it, and which letters does it add to the current word?"""
    text = text.lower().replace("’", "'")
    *before, tail = re.split(r"[^\w'\udc80-\udcff]|_", text)
    if before:
        tail = tail.lstrip("'")  # an opening quote
    return bool(before), re.sub(r"('s?)+$", "", tail)  # a closing quote or 's adds nothing to the word


WORD_BASE = 0x9E3779B97F4A7C15  # any odd number with well-mixed bits will do (this is 2^64 / golden ratio)


def hash_word(words: list[str]) -> np.ndarray:
    """sum_i byte_i * base^(n-1-i) mod 2^64: appending letters to a word is one multiplication and addition."""
    padded = np.array([word.encode("utf-8", "surrogateescape") for word in words])
    letters = padded.view(np.uint8).reshape(len(words), -1)
    hashes = np.zeros(len(words), np.uint64)
    for column in letters.T.astype(np.uint64):
        hashes = np.where(column > 0, hashes * np.uint64(WORD_BASE) + column, hashes)
    return hashes.view(np.int64)


class WordVAD(nn.Module):
    """Follows the words of many sentences at once, token by token, and finds their rows in the lexicon.

    A word so far is kept as a 64-bit hash of its letters, so one step of a whole batch is a multiplication,
    an addition and a binary search among the hashes of all known spellings: no strings, on any device. Two
    of 300,000 spellings and a million other words share a hash with probability 2e-8. The tables are
    buffers, so a checkpoint brings them along and needs no lexicon file.
    """

    def __init__(self, token_starts: Tensor, token_scale: Tensor, token_hash: Tensor,
                 spelling_hash: Tensor, spelling_row: Tensor, values: Tensor):
        super().__init__()
        self.register_buffer("token_starts", token_starts)  # (V,) bool: the token ends the word before it
        self.register_buffer("token_scale", token_scale)  # (V,) int64: base^(letters that it adds)
        self.register_buffer("token_hash", token_hash)  # (V,) int64: hash of these letters
        self.register_buffer("spelling_hash", spelling_hash)  # sorted, of every known spelling
        self.register_buffer("spelling_row", spelling_row)  # the spelling's row of `values`
        self.register_buffer("values", values)  # (words + 1, 3), row 0: unknown

    @classmethod
    def build(cls, tokenizer: Tokenizer, lexicon: Lexicon, each_token_alone: bool = False) -> "WordVAD":
        """The tables for a tokenizer and a lexicon. The authors look up `each_token_alone`."""
        starts, tails = zip(*map(continue_word, token_texts(tokenizer)), strict=True)
        sizes = np.array([len(tail.encode("utf-8", "surrogateescape")) for tail in tails])
        scale = np.uint64(WORD_BASE) ** np.arange(sizes.max() + 1, dtype=np.uint64)
        known = spellings(lexicon)
        hashes, order = torch.from_numpy(hash_word(list(known))).sort()
        rows = torch.tensor(list(known.values()), dtype=torch.int32)
        return cls(torch.tensor(starts) | each_token_alone, torch.from_numpy(scale[sizes].view(np.int64)),
                   torch.from_numpy(hash_word(tails)), hashes, rows[order], lexicon.values)

    @classmethod
    def per_token(cls, values: Tensor) -> "WordVAD":
        """A table with one row of `values` (V, 3) for each token and no words at all."""
        ids = torch.arange(len(values))
        known = (values != 0).any(1)
        return cls(torch.ones(len(ids), dtype=torch.bool), torch.ones_like(ids), ids, ids,
                   torch.where(known, ids + 1, 0).int(), torch.cat([values.new_zeros(1, 3), values]))

    def spell(self, words: Tensor, ids: Tensor) -> Tensor:
        """The hashes (N,) of the words so far after one more token each; 0 is the empty word."""
        continued = torch.where(self.token_starts[ids], 0, words)
        return continued * self.token_scale[ids] + self.token_hash[ids]

    def look_up(self, words: Tensor) -> Tensor:
        """Lexicon rows of hashed words, 0 where a word is not known."""
        place = torch.searchsorted(self.spelling_hash, words).clamp(max=len(self.spelling_hash) - 1)
        return torch.where(self.spelling_hash[place] == words, self.spelling_row[place], 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Lexicon rows for each token of whole sentences: (N, L) -> (N, L)."""
        words, steps = ids.new_zeros(len(ids)), []
        for column in ids.unbind(1):  # along the sentence, for all sentences at once, as decoding does
            words = self.spell(words, column)
            steps.append(words)
        return self.look_up(torch.stack(steps, 1))


# 4. Emotion encoder

class EmotionBlock(nn.Module):
    """Self-attention with one head and a feed-forward layer, each followed by its LayerNorm (post-norm).

    As in the authors' code the attention has no output projection, and the whole block stands inside one
    more residual connection.
    """

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.rise, self.fall = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        query, key, value = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))  # (N, 1, L, 3)
        rate = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, rate, causal).squeeze(1)
        y = self.norm_attention(x + self.dropout(attended))
        y = self.norm_feedforward(y + self.dropout(self.fall(F.relu(self.rise(y)))))
        return x + y


class EmotionEncoder(nn.Module):
    """Eq. 2, f^E = EE(VAD): (N, L, 3) -> (N, L, 3).

    Ours attends causally: with both ways, as in the authors' code, position t would see the VAD of the words
    that it must predict, and a cache of earlier positions would be stale at every step of decoding.
    """

    def __init__(self, causal: bool = True, blocks: int = 3, inner: int = 128, positions: int = 5000,
                 dropout: float = 0.1):
        super().__init__()
        self.causal = causal
        self.positions = nn.Embedding(positions, 3)
        self.norm = nn.LayerNorm(3)
        self.blocks = nn.ModuleList(EmotionBlock(3, inner, dropout) for _ in range(blocks))

    def forward(self, vad: Tensor, padding: Tensor | None = None) -> Tensor:
        """`padding` (N, L) is True where there is no word; it ends a sentence, so causal needs no mask."""
        mask = None if self.causal or padding is None else ~padding[:, None, None, :]
        x = self.norm(vad + self.positions.weight[:vad.shape[1]])
        for block in self.blocks:
            x = block(x, mask, self.causal)
        return x


# 5. VAD loss

def vad_loss(predicted: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Eq. 5: the mean squared error over the words that the lexicon knows; 0, not nan, if it knows none."""
    error = (predicted - target).square().mean(-1)  # (N, L)
    return (error * known).sum() / known.sum().clamp(min=1)


# Household: what all our programs share, here because this file is at the bottom.

class UserError(Exception):
    """A mistake that the user can mend: shown as one message, without a traceback."""


def run_program(main: Callable[[], int | None]) -> None:
    """Call a program's `main`; a UserError ends it with exit code 1, a bug keeps its traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: no reason to complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` once all is on disk: old or new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """All of a text file or nothing of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Pass `items` on; on a terminal, show count, rate and time left twice a second."""
    total = len(items) if total is None else total
    shown, start, last = sys.stderr.isatty(), time.monotonic(), 0.0
    for count, item in enumerate(items):
        now = time.monotonic()
        if shown and count and now - last > 0.5:
            last, rate = now, count / (now - start)
            left = math.ceil((total - count) / rate)
            line = f"{what} {count:,}/{total:,}  {100 * count // total}%  {rate:.1f}/s"
            print(f"\r{line}  {left // 60}:{left % 60:02} left\x1b[K", end="", file=sys.stderr, flush=True)
        yield item
    if shown and last:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the words, lemmas, tokens and VAD of a text.")
    parser.add_argument("text")
    parser.add_argument("--lexicon", type=Path, default=OUR_LEXICON, help="NRC VAD lexicon (default: our own list)")
    parser.add_argument("--tokenizer", type=Path, default=OUR_TOKENIZER,
                        help="a byte-level tokenizer.json (default: the toy's)")
    options = parser.parse_args()
    lexicon = read_lexicon(options.lexicon)
    if not options.tokenizer.is_file():
        raise UserError(f"no tokenizer at {options.tokenizer}; name a tokenizer.json with --tokenizer")
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    ids = tokenizer.encode(" " + options.text, add_special_tokens=False).ids
    if not ids:
        raise UserError("the text is empty")
    reader = WordVAD.build(tokenizer, lexicon)
    texts, word = token_texts(tokenizer), ""
    print(f"{len(lexicon.rows):,} words of {options.lexicon.name}"
          + (" (our own small list: name the NRC lexicon with --lexicon)" if options.lexicon == OUR_LEXICON else "")
          + (f", {lexicon.phrases_skipped:,} phrases skipped" if lexicon.phrases_skipped else ""))
    print(f"{'token':16}{'word so far':16}{'lemma':16}{'V':>6}{'A':>7}{'D':>7}")
    for index, row in zip(ids, reader(torch.tensor([ids]))[0], strict=True):
        starts, tail = continue_word(texts[index])
        word = tail if starts else word + tail
        token = texts[index].replace(" ", "␣").encode("utf-8", "backslashreplace").decode()
        v, a, d = lexicon.values[row].tolist()
        ratings = f"{v:+6.2f}{a:+7.2f}{d:+7.2f}" if row else f"{'.':>6}{'.':>7}{'.':>7}"
        print(f"{token:16}{word.encode('utf-8', 'replace').decode():16}{lexicon.lemma(word) or '-':16}{ratings}")


if __name__ == "__main__":
    run_program(main)

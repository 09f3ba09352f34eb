"""Words to emotion: valence, arousal and dominance (VAD) of a text, token by token (sections 4.2.1 and 4.2.2).

Psychologists have rated words on three scales: valence (unpleasant .. pleasant), arousal (calm .. excited)
and dominance (powerless .. in control). This file turns a sentence into such vectors and encodes them:

    1. Lexicon          the table word -> (v, a, d), read from the NRC VAD lexicon or our own small list
    2. last_word        the word that a text ends in: "two quiet cities" -> "cities", for the lexicon "city"
    3. WordVAD          token ids -> rows of the lexicon, by the word spelled so far            (N, L) -> (N, L)
    4. EmotionEncoder   VAD vectors -> emotion features f^E, a transformer of width 3 (Eq. 2)   (N, L, 3)
    5. vad_loss         the emotion loss on the VAD head's predictions (Eq. 5)

Shapes: N sentences, L tokens. This is the first of the six files to read. To see parts 1 to 3 at work:

    python vad.py "a gloomy sky over the quiet sea"
"""
import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from support.english import bases
from support.files import read_tokenizer
from support.program import UserError, printable, read_text, run_program
from support.tokens import token_texts

HERE = Path(__file__).parent
OUR_LEXICON = HERE / "toy" / "lexicon.txt"
OUR_TOKENIZER = HERE / "examples" / "toy"


# 1. Lexicon. The authors ask WordNet for a word's base form; ours is the first that the lexicon knows of those that the
# rules of support/english.py make.

@dataclass
class Lexicon:
    """Rated words. Row 0 of `values` is (0, 0, 0), neutral, and stands for every word that is not known."""
    rows: dict[str, int]  # word -> row of `values`
    values: Tensor  # (words + 1, 3), all in -1..1
    phrases_skipped: int  # terms of several words: tokens are looked up word by word
    text: str  # the file's content, which travels with a checkpoint

    def lemma(self, word: str) -> str | None:
        """The word itself, or else the likeliest base form of it that the lexicon knows."""
        word = word.lower()
        return next((form for form in (word, *bases(word)) if form in self.rows), None)

    def row(self, word: str) -> int:
        return self.rows.get(self.lemma(word), 0)


def read_lexicon(path: str | Path) -> Lexicon:
    return parse_lexicon(read_text(path), path)


def parse_lexicon(text: str, path: str | Path) -> Lexicon:
    """NRC VAD v1 (0..1), its bipolar version (-1..1) or v2 (-1..1), told apart by their content."""
    lines = text.split("\n")
    first_cell, *titles = [cell.strip().lower() for cell in lines[0].split("\t")]
    has_header = titles == ["valence", "arousal", "dominance"]
    is_v2 = has_header and first_cell == "term"
    rated, phrases = {}, 0
    for number, line in enumerate(lines, 1):
        if not line.strip() or number == 1 and has_header:
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
    if values.min() >= 0 and not is_v2:  # only v1 rates in 0..1
        values = 2 * values - 1
    rows = {word: row for row, word in enumerate(rated, 1)}
    return Lexicon(rows, torch.cat([torch.zeros(1, 3), values]), phrases, text)


# 2. The last word of a text

SEPARATOR = re.compile(r"[^\w'’\udc80-\udcff]|_")  # what no word contains; U+DC80 and on are the bytes of a cut letter
LAST_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*(?='*$)")  # not the quotes around it


def last_word(text: str) -> str:
    """The lower-case word that a text ends in, or "": the quiet 'Sea' -> sea."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")  # cut letters become whole
    found = LAST_WORD.search(whole.lower().replace("’", "'"))
    return found[0] if found else ""


# 3. WordVAD. A token has the VAD of the word spelled so far, from the last word start through this token:
# after " melan" the word is "melan", after "choly" it is "melancholy". The rule looks only back, so training
# and decoding see the same values. Special tokens and unknown words have row 0.

CHUNK = 1000  # sentences at once: they fit a processor's cache, and all of ArtEmis takes 3 s instead of 5


class WordVAD:
    """Follows the words of many sentences at once, token by token, and finds their VAD in the lexicon.

    The state of a sentence is a text: the last token that holds more than letters (" melan") and the tokens since
    ("choly"). Each different text is looked up once.
    """

    def __init__(self, tokenizer: Tokenizer, lexicon: Lexicon, each_token_alone: bool = False):
        """The authors look up `each_token_alone`."""
        self.values = lexicon.values
        self.texts = token_texts(tokenizer)
        self.separates = [each_token_alone or bool(SEPARATOR.search(text)) for text in self.texts]
        self.row = cache(lambda state: lexicon.row(last_word(state)))  # of the lexicon; 0 where it lacks the word

    def begin(self, count: int) -> list[str]:
        """The states of sentences without any token."""
        return [""] * count

    def extend(self, states: Sequence[str], tokens: Sequence[int]) -> list[str]:
        """The states after one more token for each sentence."""
        texts, separates = self.texts, self.separates
        return [texts[token] if separates[token] else state + texts[token]
                for state, token in zip(states, tokens, strict=True)]

    def vad(self, states: Sequence[str]) -> Tensor:
        """The VAD of the words so far: (n, 3)."""
        return self.values[list(map(self.row, states))]

    def rows(self, ids: Tensor | np.ndarray) -> Tensor:
        """The lexicon's rows for each token of whole sentences: (N, L) -> (N, L)."""
        ids, rows = np.asarray(ids), np.zeros(ids.shape, np.int64)
        for first in range(0, len(ids), CHUNK):
            some = slice(first, first + CHUNK)
            states = self.begin(len(ids[some]))
            for step, tokens in enumerate(ids[some].T.tolist()):
                states = self.extend(states, tokens)
                rows[some, step] = list(map(self.row, states))
        return torch.from_numpy(rows)


# 4. Emotion encoder

class EmotionBlock(nn.Module):
    """Self-attention with one head and a feed-forward layer, each followed by its LayerNorm (post-norm).

    As in the authors' code the attention has no output projection, and the whole block stands inside one
    more residual connection.
    """

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.ln_1 = nn.LayerNorm(width)
        self.c_fc, self.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ln_2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` (L, L) is 0 where a token may attend and -inf where not."""
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(x.shape[2])  # (N, L, L)
        attended = self.dropout((scores + mask).softmax(2)) @ self.value(x)  # (N, L, 3)
        y = self.ln_1(x + self.dropout(attended))
        y = self.ln_2(y + self.dropout(self.c_proj(F.relu(self.c_fc(y)))))
        return x + y


class EmotionEncoder(nn.Module):
    """Eq. 2, f^E = EE(VAD): (N, L, 3) -> (N, L, 3).

    Ours attends causally: with both ways, as in the authors' code, position t would see the VAD of the words
    that it must predict, and a cache of earlier positions would be stale at every step of decoding. Nothing
    masks padding: it stands after all words, so that ours does not reach it, and theirs attends to it.
    """

    def __init__(self, causal: bool = True, blocks: int = 3, inner: int = 128, positions: int = 5000,
                 dropout: float = 0.1):
        super().__init__()
        self.causal = causal
        self.wpe = nn.Embedding(positions, 3)
        self.ln_pre = nn.LayerNorm(3)
        self.blocks = nn.ModuleList(EmotionBlock(3, inner, dropout) for _ in range(blocks))

    def forward(self, vad: Tensor) -> Tensor:
        length = vad.shape[1]
        x = self.ln_pre(vad + self.wpe.weight[:length])
        mask = vad.new_full((length, length), -torch.inf if self.causal else 0.0).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return x


# 5. VAD loss

def vad_loss(predicted: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Eq. 5: the mean squared error (a scalar) of predictions (N, L, 3) where `known` (N, L); 0 if nothing is.

    The paper prints f^E as the target, at all words of X. We take the words' own VAD, at the words that the lexicon
    knows, as the authors' code does: a target that moves with the encoder could be met by a constant.
    """
    error = (predicted - target).square().mean(-1)  # (N, L)
    return (error * known).sum() / known.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the words, lemmas, tokens and VAD of a text.")
    parser.add_argument("text")
    parser.add_argument("--lexicon", type=Path, metavar="FILE", default=OUR_LEXICON,
                        help="NRC VAD lexicon (default: our own small list)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", default=OUR_TOKENIZER,
                        help="folder of a byte-level tokenizer (default: the toy's)")
    options = parser.parse_args()
    lexicon, tokenizer = read_lexicon(options.lexicon), read_tokenizer(options.tokenizer)
    text = " " + options.text.encode("utf-8", "replace").decode()  # a terminal may pass bytes that are no text
    if not text.strip():
        raise UserError("the text is empty")
    print(f"{len(lexicon.rows):,} words of {options.lexicon.name}"
          + (" (our own small list: name the NRC lexicon with --lexicon)" if options.lexicon == OUR_LEXICON else "")
          + (f", {lexicon.phrases_skipped:,} phrases skipped" if lexicon.phrases_skipped else ""))
    print(f"{'token':16}{'word so far':16}{'lemma':16}{'V':>6}{'A':>7}{'D':>7}")
    word_vad = WordVAD(tokenizer, lexicon)
    states = word_vad.begin(1)
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        states = word_vad.extend(states, [token])
        word = last_word(states[0])
        piece = printable(word_vad.texts[token].replace(" ", "␣").replace("\n", "␤"))
        ratings = "".join(f"{rating:+7.2f}" for rating in word_vad.vad(states)[0].tolist())
        print(f"{piece:16}{word:16}{lexicon.lemma(word) or '-':15}{ratings if lexicon.row(word) else '      .' * 3}")


if __name__ == "__main__":
    run_program(main)

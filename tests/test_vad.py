"""vad.py: every lexicon format and its errors, lemmas against WordNet, word-so-far VAD against plain strings."""
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from vad import (
    OUR_LEXICON,
    EmotionEncoder,
    UserError,
    WordVAD,
    continue_word,
    lemmas,
    read_lexicon,
    spellings,
    token_texts,
    vad_loss,
)

WORDNET = Path("/usr/share/wordnet")


ROOT = Path(__file__).parents[1]
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [
    "Word\tValence\tArousal\tDominance\nsea\t0.75\t0.5\t0.67\nTomb\t0.25\t0\t1\n",  # v1 with header
    "sea\t0.75\t0.5\t0.67\r\nTomb\t0.25\t0\t1\r\n",  # v1 without, Windows line ends
    "sea\t0.5\t0\t0.34\nTomb\t-0.5\t-1\t1",  # bipolar, no newline at the end
    "\ufeffterm\tvalence\tarousal\tdominance\nsea\t0.5\t0\t0.34\ntomb\t-0.5\t-1\t1\nsea of love\t1\t1\t1\n",  # v2
])
def test_lexicon_formats_agree(tmp_path, text):
    lexicon = read_lexicon(write(tmp_path / "any name", text))
    assert list(lexicon.rows) == ["sea", "tomb"]
    expected = torch.tensor([[0, 0, 0], [.5, 0, .34], [-.5, -1, 1]])
    assert torch.allclose(lexicon.values, expected)
    assert lexicon.phrases_skipped == ("love" in text)


def test_lexicon_v2_without_negative_ratings_is_not_stretched(tmp_path):
    text = "term\tvalence\tarousal\tdominance\nsea\t0.5\t0.25\t0.5\n"
    assert read_lexicon(write(tmp_path / "v2", text)).values[1].tolist() == [0.5, 0.25, 0.5]


@pytest.mark.parametrize("text, message", [
    ("sea\t0.5\t0.5\t0.5\ntomb\t0.1\t0.2\n", "line 2: expected a word and three numbers"),
    ("sea\t0.5\thigh\t0.5\n", "line 1: expected a word and three numbers"),
    ("Word\tValence\tArousal\tDominance\nsea\t0.5\t0.5\t7\n", "line 2: ratings must lie"),
    ("sea\t0.5\tnan\t0.5\n", "line 1: ratings must lie"),
    ("Word\tValence\tArousal\tDominance\n", "no rated words"),
    ("", "no rated words"),
])
def test_bad_lexicon_names_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=f"bad.txt.*{message}"):
        read_lexicon(write(tmp_path / "bad.txt", text))


def test_missing_lexicon(tmp_path):
    with pytest.raises(UserError, match="cannot read the lexicon .*none.txt"):
        read_lexicon(tmp_path / "none.txt")


def test_lexicon_of_20000_words_loads_fast(tmp_path):
    lines = "".join(f"word{i}\t0.{i % 1000:03}\t0.5\t0.123\n" for i in range(20000))
    path = write(tmp_path / "big.txt", lines)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        read_lexicon(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2


@pytest.mark.parametrize("form, base", [
    ("gloomy", "gloomy"), ("cities", "city"), ("hoped", "hope"), ("hopped", "hop"), ("called", "call"),
    ("dancing", "dance"), ("singing", "sing"), ("happiest", "happy"), ("bigger", "big"), ("sadly", "sad"),
    ("gently", "gentle"), ("happily", "happy"), ("women", "woman"), ("children's", "child"), ("dogs'", "dog"),
    ("didn't", "do"), ("wept", "weep"), ("leaves", "leaf"), ("dying", "die"), ("his", None), ("xyzzy", None),
])
def test_lemmas(form, base):
    words = ["gloomy", "city", "hope", "hop", "call", "cal", "dance", "sing", "singe", "happy", "big", "sad", "gentle",
             "woman", "child", "dog", "do", "weep", "leaf", "die", "hi"]
    assert next((lemma for lemma in lemmas(form) if lemma in words), None) == base


def test_spellings_are_lemmas_read_backwards():
    lexicon = read_lexicon(OUR_LEXICON)
    known = spellings(lexicon)
    assert all(lexicon.rows[lexicon.lemma(form)] == row for form, row in known.items())
    forms = {word + suffix for word in lexicon.rows for suffix in ("", "s", "es", "ed", "ing", "er", "ly", "ying")}
    assert all(form in known for form in forms if lexicon.lemma(form))


def common_wordnet_words() -> list[tuple[str, str]]:
    """The 400 verbs, 400 nouns and 200 adjectives that WordNet's texts use most."""
    uses = defaultdict(int)
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        word, kind = key.split("%")[0], {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}.get(key.split("%")[1][0])
        if kind and word.isascii() and word.isalpha():
            uses[word, kind] += int(count)
    ranked = sorted(uses, key=uses.get, reverse=True)
    return [pair for kind, most in (("verb", 400), ("noun", 400), ("adj", 200))
            for pair in [pair for pair in ranked if pair[1] == kind][:most]]


def inflect(word: str, kind: str, irregular: set[str]) -> set[str]:
    """Inflected forms: WordNet's exceptions and, where they leave a gap, school grammar."""
    on_y = word[-1] == "y" and word[-2:-1] not in "aeiou"
    stem = word[:-1] if word.endswith("e") else word[:-1] + "i" if on_y else word
    plural = word[:-1] + "ies" if on_y else word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")
    ing = word[:-2] + "ying" if word.endswith("ie") else \
        (word[:-1] if word.endswith("e") and not word.endswith(("ee", "ye", "oe")) else word) + "ing"
    if kind == "noun":
        return irregular or {plural}
    if kind == "adj":
        return irregular or ({stem + "er", stem + "est"} if len(word) <= 6 else set())
    past = {form for form in irregular if not form.endswith("ing")} or {stem + "ed"}
    return past | ({form for form in irregular if form.endswith("ing")} or {ing}) | {plural}


@pytest.mark.skipif(not (WORDNET.is_dir() and shutil.which("wn")), reason="Debian's wordnet is not installed")
def test_lemmas_agree_with_wordnet(capsys):
    """Measured: 99.5% of 1,840 forms with the 1,000 words as the lexicon, 97.7% of 1,868 with all of WordNet's."""
    common = common_wordnet_words()
    exceptions = defaultdict(set)
    for kind in ("noun", "verb", "adj"):
        for line in (WORDNET / f"{kind}.exc").read_text().splitlines():
            form, *bases = line.split()
            for base in bases:
                exceptions[base, kind].add(form)
    forms = sorted({form for pair in common for form in inflect(*pair, exceptions[pair])})
    everything = {line.split(" ")[0] for kind in ("noun", "verb", "adj", "adv")
                  for line in (WORDNET / f"index.{kind}").read_text().splitlines() if line[0] != " "}
    words = {word for word, _ in common}
    agreed = {"common": [], "everything": []}
    for form in forms:
        # wn's exit code is the number of senses that it found
        report = subprocess.run(["wn", form, "-over"], capture_output=True, text=True, check=False).stdout
        answers = set(re.findall(r"^Overview of \w+ (\S+)", report, re.MULTILINE))
        for name, known in (("common", words), ("everything", everything)):
            if name == "everything" or answers & words - {form}:
                ours = next((lemma for lemma in lemmas(form) if lemma in known), None)
                agreed[name].append((ours in answers, form, ours, answers))
    for name, results in agreed.items():
        share = sum(ok for ok, *_ in results) / len(results)
        with capsys.disabled():
            print(f"\nlemmas with {name} words as the lexicon: {share:.1%} of {len(results)} forms as WordNet")
        assert share >= 0.95, [result for result in results if not result[0]]


RANDOM_LETTERS = ["a", "B", "é", "ß", "'", "-", "—", "_", " ", " ", "\n", "7", "😍", "中", ".", "’", "s", "ing", "sad", "Sea"]


def random_texts(words, count=200):
    """Sentences of known, inflected, capitalised, hyphenated, quoted and unknown words, and plain nonsense."""
    rng = random.Random(0)
    shapes = ["{}", "{}s", "{}'s", "{}ing", "{},", "'{}'", "({})", "{}-{}", "{}—{}", "xq{}", "{}n't", "{}7", "😍 {}"]
    texts = []
    for _ in range(count):
        parts = [rng.choice(shapes).format(*rng.choices(words, k=2)) for _ in range(10)]
        texts.append(" " + " ".join(part if rng.random() < 0.7 else part.upper() for part in parts))
        texts.append(" " + "".join(rng.choices(RANDOM_LETTERS, k=30)))
    return texts


@pytest.fixture(params=["small", "gpt2"])
def any_tokenizer(request):
    return request.getfixturevalue("tokenizer" if request.param == "small" else "gpt2_tokenizer")


def test_the_last_token_of_a_word_has_the_words_row(any_tokenizer):
    """Independent of tokens: each word of the text, found by a regular expression, has its lemma's row."""
    lexicon = read_lexicon()
    reader, checked = WordVAD.build(any_tokenizer, lexicon), 0
    for text in random_texts(list(lexicon.rows))[::2]:
        if any_tokenizer.token_to_id("âĢĶ") is None:
            text = text.replace("—", "-")  # no token for a dash: its three bytes count as letters of a foreign word
        encoded = any_tokenizer.encode(text, add_special_tokens=False)
        rows = reader(torch.tensor([encoded.ids]))[0].tolist()
        last = {end: row for (_, end), row in zip(encoded.offsets, rows, strict=True)}
        for match in WORD.finditer(text):
            if match.end() in last:  # unless a closing quote shares a token with what follows
                word = match[0].lower()
                # "'s" has a token of its own in GPT-2's rule, "'S" has not: MAN'S is then spelled "mans"
                lemma = lexicon.lemma(word) or lexicon.lemma(word.replace("'", ""))
                assert last[match.end()] == lexicon.rows.get(lemma, 0), (text, word)
                checked += bool(lemma)
    assert checked > 500


def test_every_token_has_the_row_of_the_letters_so_far(any_tokenizer):
    """Plain strings instead of hashes, on text, nonsense and random ids, in one pass and step by step."""
    lexicon = read_lexicon()
    reader, texts = WordVAD.build(any_tokenizer, lexicon), token_texts(any_tokenizer)
    rng = random.Random(1)
    sentences = [any_tokenizer.encode(text, add_special_tokens=False).ids for text in random_texts(list(lexicon.rows))]
    sentences += [rng.choices(range(len(texts)), k=40) for _ in range(200)]
    length = max(map(len, sentences))
    ids = torch.tensor([sentence + [0] * (length - len(sentence)) for sentence in sentences])
    rows, words = reader(ids), torch.zeros(len(ids), dtype=torch.long)
    for step, column in enumerate(ids.unbind(1)):
        words = reader.spell(words, column)
        assert torch.equal(reader.look_up(words), rows[:, step])
    for sentence, found in zip(sentences, rows.tolist(), strict=True):
        word = ""
        for index, row in zip(sentence, found, strict=False):
            starts, tail = continue_word(texts[index])
            word = tail if starts else word + tail
            assert row == lexicon.rows.get(lexicon.lemma(word) if word else None, 0), (word, sentence)


def test_special_tokens_and_pieces_of_letters(gpt2_tokenizer):
    texts = token_texts(gpt2_tokenizer)
    assert len(texts) == gpt2_tokenizer.get_vocab_size() and "".join(texts).isprintable() is False
    ids = gpt2_tokenizer.encode(" CAFÉ naïve 中文 — sea", add_special_tokens=False).ids
    spelled = "".join(texts[i] for i in ids).encode("utf-8", "surrogateescape").decode()
    assert spelled == " CAFÉ naïve 中文 — sea"


def test_a_token_alone_as_the_authors_look_it_up(gpt2_tokenizer):
    lexicon = read_lexicon()
    melancholy = torch.tensor([gpt2_tokenizer.encode(" Melancholy sea", add_special_tokens=False).ids])
    together, alone = (WordVAD.build(gpt2_tokenizer, lexicon, flag)(melancholy)[0].tolist() for flag in (False, True))
    assert lexicon.rows["melancholy"] in together and lexicon.rows["melancholy"] not in alone
    assert lexicon.rows["sea"] in alone


def test_emotion_encoder_is_the_authors_arrangement():
    """The same computation, written out with plain matrix products."""
    torch.manual_seed(0)
    vad, padding = torch.rand(2, 7, 3), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for causal in (True, False):
        encoder = EmotionEncoder(causal=causal).eval()
        ours = encoder(vad, padding)
        x = torch.nn.functional.layer_norm(vad + encoder.positions.weight[:7], (3,), encoder.norm.weight, encoder.norm.bias)
        allowed = ~padding[:, None, :].expand(2, 7, 7) & (torch.ones(7, 7).tril().bool() if causal else True)
        for block in encoder.blocks:
            scores = block.query(x) @ block.key(x).transpose(1, 2) / 3 ** 0.5
            attended = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ block.value(x)
            y = block.norm_attention(x + attended)
            x = x + block.norm_feedforward(y + block.fall(block.rise(y).clamp(min=0)))
        assert torch.allclose(ours[~padding], x[~padding], atol=1e-5)
    assert len(encoder.positions.weight) == 5000 and len(encoder.blocks) == 3 and encoder.blocks[0].rise.out_features == 128


def test_vad_loss():
    predicted, target = torch.tensor([[[1., 0, 0], [5, 5, 5]]]), torch.tensor([[[0., 0, 2], [0, 0, 0]]])
    assert vad_loss(predicted, target, torch.tensor([[True, False]])).item() == pytest.approx(5 / 3)
    assert vad_loss(predicted, target, torch.tensor([[False, False]])).item() == 0


def test_program(tmp_path, tokenizer_json):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    command = [sys.executable, ROOT / "vad.py", "--tokenizer", tmp_path / "tokenizer.json"]
    shown = subprocess.run([*command, "a gloomy sky"], capture_output=True, text=True, check=True).stdout
    assert "our own small list" in shown
    assert re.search(r"gloomy +gloomy +-0\.56 +-0\.30 +-0\.36\n", shown)
    failed = subprocess.run([*command, "sky", "--lexicon", "none.txt"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: cannot read the lexicon none.txt")

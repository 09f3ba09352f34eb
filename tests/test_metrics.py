"""The scores against closed forms, brute force, and the field's own scorers where they are installed."""
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import (
    Prediction,
    Reference,
    accuracy,
    confusion_matrix,
    distribution_scores,
    dominant_emotion,
    emotions_of,
    evaluate,
    read_predictions,
    read_references,
    rouge_l,
    split_caption,
    text_classifier_of,
    text_scores,
    unique_share,
    without_prediction,
    worked_example,
)
from sevlm import EMOTIONS
from support.meteor import (
    align,
    exact_stem_counts,
    meteor,
    meteor_words,
    original_counts,
    perfect_without_chunks,
    stem,
)
from support.overlap import common_subsequence, lcs_lengths
from support.program import UserError
from support.ptb import tokenize
from support.scores import (
    bootstrap,
    compare,
    holm,
    how_tested,
    mcnemar,
    mean_score,
    p_values,
    permutation,
    pooled,
    test_of,
)
from support.text_classifier import TextClassifier, train_text_classifier

test_of.__test__ = False  # not a test, though its name begins like one
FIXTURE = Path(__file__).parent / "fixtures" / "metrics"
WORDS = ["the", "a", "of", "woman", "is", "sad", "sadly", "and", "dances", "dancing", "light", "lights", "it",
         "looks", "like", "dark", "so", "she", "in"]
PIECES = ["don't", "she's", "they’ve", "“love”", "'love'", "well-dressed", "and/or", "u.s.", "mr.", "etc.",
          "3,50", "1/2", "10:30", "1st", "café", "...", "…", "—", "--", "?!", "(left)", ":)", "😍", "50%",
          "$3", "x,", "o'clock", "cannot", "j. smith", "A&B", "déjà-vu", "'90s", "y;", "no. 5", "r.i.p", "½"]


def sentence(rng, pieces=(), longest=14):
    return " ".join(rng.choice(pieces if pieces and rng.random() < 0.3 else WORDS)
                    for _ in range(rng.randrange(longest)))


def coco(module):
    """A module of pycocoevalcap and Java, or skip."""
    if not shutil.which("java"):
        pytest.skip("needs Java")
    return pytest.importorskip(f"pycocoevalcap.{module}")


# Tokens

@pytest.mark.parametrize("caption, tokens", [
    ("", ""), ("   ", ""), ("...!", ""), ("😍", ""), ("sad", "sad"),
    ("I can’t; it's dark, she'd've cried.", "i ca n't it 's dark she 'd 've cried"),
    ("‘Fake’ “smile” — so-so…", "fake smile so-so"),
    ("Mr. Smith (left) of the U.S., at 5 p.m.", "mr. smith -lrb- left -rrb- of the u.s. at 5 p.m."),
    ("b/w and black&white, $3.50 or £5 or 2 1/2", "b/w and black & white $ 3.50 or # 5 or 2\u00a01/2"),
    ("so do i. She cannot, j. smith", "so do i she can not j. smith"),
    ("sad😍happy!!! really?!", "sad happy !!! really ?!"),
    ("one\rtwo\u2028three\nfour", "one two three four"),
])
def test_tokens_of(caption, tokens):
    assert tokenize(caption) == tokens


def test_tokens_equal_stanfords():
    rng = random.Random(0)
    captions = [sentence(rng, PIECES) + rng.choice(["", ".", "!", "...", " ."]) for _ in range(2000)]
    # A sentence between the captions keeps one from changing the next, as the original lets it.
    asked = {n: [{"caption": text}] for n, text in enumerate(text for c in captions for text in (c, "guard"))}
    theirs = coco("tokenizer.ptbtokenizer").PTBTokenizer().tokenize(asked)
    assert [tokenize(caption) for caption in captions] == [theirs[2 * n][0] for n in range(len(captions))]


# BLEU, CIDEr-D, ROUGE-L

def test_one_equal_word_gives_the_known_bleu():
    scores = text_scores(["sad", ""], [["sad"], ["happy"]])
    assert scores["BLEU-1"].per_image == pytest.approx([1, 0], abs=1e-8)
    one = [scores[f"BLEU-{n}"].per_image[0] for n in (2, 3, 4)]
    assert one == pytest.approx([1e-3, 1e-4, 10 ** -4.5], rel=1e-6)


def test_cider_of_equal_and_of_single_images():
    texts = ["the sky is calm today", "a dog runs very fast"]
    assert text_scores(texts, [[text] for text in texts])["CIDEr"].per_image == pytest.approx([10, 10])
    assert text_scores(texts[:1], [texts[:1]])["CIDEr"].value == 0  # one document has no inverse frequency


def ngrams(text, n):
    words = text.split()
    return Counter(tuple(words[start:start + n]) for start in range(len(words) - n + 1))


def slow_bleu_counts(hypothesis, references):
    """Correct and guessed n-grams, the length and the closest length."""
    correct = [sum(min(count, max(ngrams(text, n)[gram] for text in references))
                   for gram, count in ngrams(hypothesis, n).items()) for n in range(1, 5)]
    length = len(hypothesis.split())
    closest = min((abs(len(text.split()) - length), len(text.split())) for text in references)[1]
    return [*correct, *(max(0, length - n) for n in range(4)), length, closest]


def slow_cider(hypotheses, references):
    """The formula of CIDEr-D, with a dictionary for each caption."""
    scores = np.zeros(len(hypotheses))
    for n in range(1, 5):
        documents = Counter(gram for texts in references for gram in set().union(*(ngrams(text, n) for text in texts)))

        def vector(text, n=n, documents=documents):
            return {gram: count * (math.log(len(hypotheses)) - math.log(max(1, documents[gram])))
                    for gram, count in ngrams(text, n).items()}
        for image, (said, texts) in enumerate(zip(hypotheses, references, strict=True)):
            for text in texts:
                ours, theirs = vector(said), vector(text)
                product = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys())
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                gap = max(0, len(said.split()) - 1) - max(0, len(text.split()) - 1)
                scores[image] += 10 / 4 * (product / norms if norms else 0) * math.exp(-gap ** 2 / 72) / len(texts)
    return scores


def test_bleu_and_cider_equal_dictionaries_of_ngrams():
    rng = random.Random(1)
    references = [[sentence(rng) for _ in range(rng.randrange(1, 5))] for _ in range(60)]
    hypotheses = [rng.choice(texts)[:rng.randrange(60)] for texts in references]
    scores = text_scores(hypotheses, references)
    tokens = [tokenize(text) for text in hypotheses], [[tokenize(text) for text in texts] for texts in references]
    expected = [slow_bleu_counts(*pair) for pair in zip(*tokens, strict=True)]
    assert scores["BLEU-4"].statistics.tolist() == expected
    assert scores["CIDEr"].per_image == pytest.approx(slow_cider(*tokens), abs=1e-9)


def test_bleu_rouge_and_cider_equal_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    rng = random.Random(1)
    references = [[sentence(rng) for _ in range(rng.randrange(1, 5))] for _ in range(200)]
    hypotheses = [rng.choice(texts)[:rng.randrange(60)] for texts in references]
    ours = text_scores(hypotheses, references)
    # what `text_scores` sees after tokenizing
    asked = ({n: [tokenize(text) for text in texts] for n, texts in enumerate(references)},
             {n: [tokenize(text)] for n, text in enumerate(hypotheses)})
    bleu, bleu_per_image = Bleu(4).compute_score(*asked, verbose=0)
    theirs = {f"BLEU-{n}": (bleu[n - 1], bleu_per_image[n - 1]) for n in range(1, 5)}
    theirs |= {"CIDEr": Cider().compute_score(*asked), "ROUGE-L": Rouge().compute_score(*asked)}
    for name, (corpus, per_image) in theirs.items():
        assert ours[name].value == pytest.approx(corpus, abs=1e-9), name
        assert ours[name].per_image.tolist() == pytest.approx(list(per_image), abs=1e-9), name


def slow_lcs(first, second):
    row = [0] * (len(second) + 1)
    for word in first:
        previous = row
        row = [0]
        for place, other in enumerate(second):
            row.append(previous[place] + 1 if word == other else max(row[-1], previous[place + 1]))
    return row[-1]


def is_subsequence(words, text):
    remaining = iter(text)
    return all(word in remaining for word in words)


def test_common_subsequences_equal_the_textbook():
    rng = random.Random(2)
    texts = [sentence(rng, longest=90).split() for _ in range(30)]
    others = [sentence(rng).split() for _ in range(50)]
    assert [lcs_lengths(text, others) for text in texts] == [[slow_lcs(text, other) for other in others] for text in texts]
    for text, other in zip(texts, others, strict=False):
        common = common_subsequence(text, other)
        assert len(common) == slow_lcs(text, other) and is_subsequence(common, text) and is_subsequence(common, other)


# METEOR

@pytest.mark.parametrize("word, expected", [
    # from the sample vocabulary of the stemmer's description
    ("consigned", "consign"), ("consistency", "consist"), ("consolations", "consol"), ("knocked", "knock"),
    ("conspicuously", "conspicu"), ("knightly", "knight"), ("kneeling", "kneel"), ("happily", "happili"),
    ("skies", "sky"), ("dying", "die"), ("hopping", "hop"), ("hoping", "hope"), ("generously", "generous"),
    ("relational", "relat"), ("electrical", "electr"), ("sensibilities", "sensibl"), ("adoption", "adopt"),
    ("ties", "tie"), ("cries", "cri"), ("gas", "gas"), ("news", "news"), ("sayings", "say"), ("adding", "ad"),
    ("youthful", "youth"), ("boys", "boy"), ("arsenal", "arsenal"), ("belly", "belli"), ("gladly", "glad"),
    ("agreed", "agre"), ("proceed", "proceed"), ("rolled", "roll"),
])
def test_stems(word, expected):
    assert stem(word) == expected


def test_meteor_by_hand():
    counts = exact_stem_counts(["dark sea", "dancing", "joy", "", "sad dark sea"],
                               [["sea", "dark sea"], ["danced"], ["sea"], ["sad"], ["sad sea"]])
    f_mean = 1 / (0.15 / (2 / 3) + 0.85 / 1)  # two words of three, two of two, in as many chunks
    assert meteor(counts).tolist() == pytest.approx([1, 0.6, 0, 0, f_mean * (1 - 0.6)])


def test_full_stops_of_meteor():
    words = meteor_words("u.s. rev. no. etc. b. pp. 5 the st.")
    assert " ".join(words) == "us rev. no. etc. b. pp. 5 the st ."
    assert meteor_words("rev.") == ["rev."] and meteor_words("well-dressed n't") == ["well", "dressed", "n", "'t"]


def test_alignment_prefers_few_chunks():
    pairs = align(["the", "cat", "and", "the", "dog"], ["and", "the", "dog"])
    assert pairs == [(0, 2, 0), (1, 3, 0), (2, 4, 0)]
    assert align(["she", "looks", "sad"], ["looking"]) == [(0, 1, 1)]


def jar_path():
    return Path(coco("meteor.meteor").__file__).parent / "meteor-1.5.jar"


def test_meteor_equals_the_original_without_synonyms():
    rng = random.Random(3)
    references = [[sentence(rng, longest=25) or "x" for _ in range(3)] for _ in range(500)]
    hypotheses = [sentence(rng, longest=25) for _ in references]
    lines = ["SCORE ||| " + " ||| ".join([*texts, text]) for texts, text in zip(references, hypotheses, strict=True)]
    command = ["java", "-jar", jar_path(), "-", "-", "-stdio", "-l", "en", "-norm", "-m", "exact stem"]
    run = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, text=True, check=True)
    theirs = perfect_without_chunks(np.array([line.split() for line in run.stdout.splitlines()], dtype=float))
    assert exact_stem_counts(hypotheses, references).tolist() == theirs.tolist()


def test_meteor_jar_in_a_folder_with_a_blank(tmp_path):
    jar = jar_path()
    folder = tmp_path / "a folder"
    (folder / "data").mkdir(parents=True)
    shutil.copy(jar, folder)
    (folder / "data" / "paraphrase-en.gz").symlink_to(jar.parent / "data" / "paraphrase-en.gz")
    images = json.loads((FIXTURE / "tokenized.json").read_text(encoding="utf-8"))["images"]
    expected = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
    nasty = ["a\nb", "a\r\u2028b ||| c", "\x85", "ñ “é”", "half \ud800"]  # still one line each
    counts = original_counts([*(image["hypothesis"] for image in images), *nasty],
                             [*(image["references"] for image in images), *([text] for text in nasty)],
                             folder / "meteor-1.5.jar")[:len(images)]
    assert meteor(counts).tolist() == pytest.approx([expected["per_image"][image["id"]]["METEOR"] for image in images], abs=1e-9)
    assert meteor(counts.sum(0)) == pytest.approx(expected["corpus"]["METEOR"], abs=1e-9)


def test_meteor_jar_that_fails_says_why(tmp_path, monkeypatch):
    jar = tmp_path / "meteor-1.5.jar"
    with pytest.raises(UserError, match=r"no .*meteor-1\.5\.jar"):
        original_counts(["a"], [["a"]], jar)
    jar.write_text("no jar")
    with pytest.raises(UserError, match=r"paraphrase-en\.gz"):
        original_counts(["a"], [["a"]], jar)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paraphrase-en.gz").touch()
    with monkeypatch.context() as context, pytest.raises(UserError, match="needs Java"):
        context.setenv("PATH", "")
        original_counts(["a"], [["a"]], jar)
    if shutil.which("java"):
        with pytest.raises(UserError, match="(?i)corrupt jarfile"):
            original_counts(["a"], [["a"]], jar)


# Explanations of any kind

def test_long_texts_take_little_memory():
    long = " ".join(random.Random(4).choices(WORDS + [f"w{n}" for n in range(500)], k=2_000))
    tracemalloc.start()
    references = [["the light is the light"], ["a word, a word"], [long]]
    scores = text_scores([long, "word " * 2_000, long], references)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # a table of 2,000 x 2,000 numbers would take 32 MB
    assert scores["METEOR (exact+stem)"].per_image[2] == pytest.approx(1)
    assert scores["ROUGE-L"].per_image[2] == 1


def test_unique_share():
    assert unique_share(["a", "b", "a", "a"]).value == pytest.approx(0.5)


def test_scores_of_a_test_split_take_seconds():
    """7,000 images with 7 references take under 5 s on an idle core; here a tenth of them, and processor time."""
    rng = random.Random(5)
    words = [f"w{n}" for n in range(3000)]
    shares = [1 / (n + 3) for n in range(3000)]
    references = [[" ".join(rng.choices(words, shares, k=rng.randint(6, 26))) for _ in range(7)] for _ in range(700)]
    hypotheses = [rng.choice(texts) for texts in references]
    start = time.process_time()
    text_scores([text[:60] for text in hypotheses], references)
    assert time.process_time() - start < 2.5  # 0.5 when nobody else computes


# Emotions

def votes(**counts):
    return dict.fromkeys(EMOTIONS, 0) | counts


def test_dominant_emotion():
    assert dominant_emotion(votes(awe=3, contentment=2)) == "awe"
    assert dominant_emotion(votes(awe=2, contentment=1, fear=1)) is None
    assert dominant_emotion(votes(awe=2, contentment=1, fear=1), half_is_enough=True) == "awe"
    assert dominant_emotion(votes(awe=2, fear=2), half_is_enough=True) is None
    assert dominant_emotion(votes()) is None and dominant_emotion(votes(), half_is_enough=True) is None
    assert dominant_emotion({"awe": 1}) == "awe"


@pytest.mark.parametrize("annotators", range(1, 60))
def test_shares_decide_like_the_votes_they_were_made_of(annotators):
    for first in range(annotators + 1):
        for second in range(annotators - first + 1):
            counts = np.array([first, second, annotators - first - second])
            shares = (counts / annotators).astype(np.float32)
            for half in (False, True):
                exact = dict(enumerate(counts.tolist()))
                assert dominant_emotion(dict(enumerate(shares.tolist())), half) == dominant_emotion(exact, half)


@pytest.mark.parametrize("caption, emotion, explanation", [
    ("awe because it glows", "awe", "it glows"),
    ("fear because he left because of her ", "fear", "of her"),
    ("something else", "something else", ""),
    ("a calm sea under a pale sky", "", "a calm sea under a pale sky"),
    ("she is alone because he left", "", "she is alone because he left"),
    ("because it is so bright", "", "because it is so bright"),
])
def test_captions_are_cut_only_behind_an_emotion(caption, emotion, explanation):
    assert split_caption(caption) == (emotion, explanation)


def test_emotions_of_ones_own():
    assert split_caption("quiet joy because it glows", ["quiet joy", "dread"]) == ("quiet joy", "it glows")
    references = {"a": Reference(["quiet joy"], ["it glows"]), "b": Reference(["dread", "dread"], ["it is dark"])}
    predictions = {"a": Prediction("quiet joy", "it glows", {"quiet joy": 0.9, "dread": 0.1}),
                   "b": Prediction("quiet joy", "it glows", {"quiet joy": 0.6, "dread": 0.4})}
    scores = evaluate(predictions, references, ["quiet joy", "dread"])
    assert scores["ACC"].value == 0.5 and scores["Top-2"].value == 1
    assert scores["KL"].per_image == pytest.approx([-math.log(0.9), -math.log(0.4)])
    assert confusion_matrix(*emotions_of(predictions, references), ["quiet joy", "dread"]).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_accuracy_counts_missing_and_unknown_as_wrong():
    score = accuracy(["awe", None, "fear", "joy"], ["awe", "awe", "fear", None])
    assert score.value == pytest.approx(2 / 3) and score.images == 3
    assert math.isnan(accuracy(["awe"], [None]).value)
    counts = confusion_matrix(["awe", None, "joy", "fear"], ["awe", "awe", "awe", None], EMOTIONS)
    assert counts[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 2] and counts.sum() == 3


def test_acc_without_the_images_that_have_no_prediction():
    references = {name: Reference(["awe"], ["it glows"]) for name in "abcd"}
    predictions = {"a": Prediction("awe", ""), "b": Prediction("awe", ""), "c": Prediction("fear", "")}
    assert evaluate(predictions, references)["ACC"].value == 0.5
    assert without_prediction(predictions, references) == (1, pytest.approx(2 / 3))


def test_distribution_scores_by_hand():
    probabilities = [{"awe": 0.75, "fear": 0.25}, {"awe": 0.25, "fear": 0.75}, {"awe": 0.5, "fear": 0.5}]
    scores = distribution_scores(probabilities, [{"awe": 3, "fear": 1}, {"awe": 3, "fear": 1}, {"awe": 1, "fear": 1}], EMOTIONS)
    divergence = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert scores["KL"].per_image == pytest.approx([0, divergence, 0])
    assert scores["ECE"].value == pytest.approx(0.25)  # confidence 0.75 twice, right once
    assert scores["Top-2"].value == 1 and scores["Top-2"].images == 2


# EA's judge

LABELS = ("calm", "dread", "joy", "pity")


@pytest.fixture(scope="module")
def explanations():
    rng = random.Random(5)
    labels = [rng.choice(LABELS) for _ in range(300)]
    return [f"{sentence(rng, longest=4)} feeling{label} {sentence(rng, longest=4)}" for label in labels], labels


def train(explanations, **settings):
    texts, labels = explanations
    recipe = metrics.RECIPE | {"batch": 16} | settings
    return train_text_classifier(texts[:200], labels[:200], texts[200:], labels[200:], LABELS, **recipe)


@pytest.fixture(scope="module")
def judge(explanations):
    return train(explanations, epochs=6)


def test_the_judge_is_artemis_one(judge):
    """Its layers and sizes; dropout and batch normalisation rest when it judges."""
    sizes = {name: tuple(parameter.shape) for name, parameter in judge.named_parameters() if "weight" in name}
    assert sizes == {"embedding.weight": (len(judge.words) + 2, 100), "project.1.weight": (256, 100),
                     "project.4.weight": (256, 256), "lstm.weight_ih_l0": (1024, 256), "lstm.weight_hh_l0": (1024, 256),
                     "head.0.weight": (100, 256), "head.1.weight": (100,), "head.4.weight": (4, 100)}
    assert [layer.p for layer in judge.modules() if isinstance(layer, torch.nn.Dropout)] == [0.25] * 3
    assert not judge.training


def test_the_judge_learns(explanations, judge):
    texts, labels = explanations
    assert accuracy(judge.predict(texts[200:]), labels[200:]).value > 0.9


def test_equal_seeds_train_equal_judges(explanations):
    before = torch.get_rng_state()
    first, second = train(explanations, epochs=1), train(explanations, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_judge_does_not_notice_padding(explanations, judge):
    rows = [judge.encode(text) for text in [*explanations[0][:5], ""]]
    together, alone = judge(rows), torch.cat([judge([row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_rare_words_are_unknown():
    few = train_text_classifier(["dark"] * 4 + ["light"] * 5, ["joy"] * 9, [], [], LABELS, **metrics.RECIPE | {"epochs": 1})
    assert few.words == ("light",)
    with pytest.raises(UserError, match="1 training texts are too few"):
        train_text_classifier(["dark"], ["joy"], [], [], LABELS, **metrics.RECIPE)


def test_glove_vectors_stay_as_they_are(tmp_path, explanations):
    vectors = tmp_path / "glove.txt"
    lines = [f"{word} " + " ".join([f"{number}.5"] * 100) for number, word in enumerate(["the", "feelingjoy", "sad", "unheardof"])]
    vectors.write_text("\n".join(lines), encoding="utf-8")
    judge = train(explanations, epochs=1, vectors=vectors)
    assert judge.words == ("feelingjoy", "sad", "the")
    assert judge.embedding.weight[2:, 0].tolist() == [1.5, 2.5, 0.5]
    for line, message in (("the 1 2 3", "line 1: expected a word and 100 numbers"), ("the " + "x " * 100, "line 1"),
                          ("the " + "nan " * 100, "line 1"), ("unheardof 1", "a vector for none of the")):
        vectors.write_text(line, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            train(explanations, epochs=1, vectors=vectors)


def test_a_judge_survives_saving(tmp_path, explanations, judge):
    path = tmp_path / "ea.safetensors"
    judge.accuracy = 0.625
    judge.save(path)
    loaded = TextClassifier.load(path)
    assert loaded.accuracy == 0.625 and loaded.labels == LABELS and loaded.predict(explanations[0]) == judge.predict(explanations[0])
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (b"", b"other", whole[:len(whole) // 2], whole.replace(b'\\"labels\\"', b'\\"Labels\\"'), whole[:8] + b"[" * 50 + whole[58:],
                    whole.replace(b"[100,256]", b"[256,100]"), whole[start:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"ea\.safetensors"):
            TextClassifier.load(path)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        TextClassifier.load(tmp_path / "missing.safetensors")


class SmallArt:
    """What `text_classifier_of` needs of a data set."""
    emotions = LABELS

    def __init__(self, folder, texts, labels, split):
        self.folder, self.texts, self.emotion, self.split = folder, texts, np.array([LABELS.index(l) for l in labels]), np.array(split)
        self.owner = np.arange(len(texts))

    def rows(self, split):
        return np.flatnonzero(self.split == ["train", "val", "test"].index(split))


def test_a_stored_judge_serves_only_what_it_was_trained_on(tmp_path, explanations, monkeypatch):
    texts, labels = explanations
    split = [0] * 200 + [1] * 50 + [2] * 50
    monkeypatch.setattr(metrics, "RECIPE", metrics.RECIPE | {"epochs": 1})
    art = SmallArt(tmp_path, texts, labels, split)
    assert text_classifier_of(art) is None and not list(tmp_path.iterdir())  # never unasked
    judge = text_classifier_of(art, train=True)
    assert judge.accuracy == accuracy(judge.predict(texts[250:]), labels[250:]).value
    assert torch.equal(text_classifier_of(art).lstm.weight_hh_l0, judge.lstm.weight_hh_l0)
    assert text_classifier_of(SmallArt(tmp_path, [*texts[1:], "another"], labels, split)) is None
    assert text_classifier_of(SmallArt(tmp_path, texts, [*labels[1:], labels[0]], split)) is None
    assert text_classifier_of(SmallArt(tmp_path, texts, labels, split[::-1])) is None
    monkeypatch.setattr(art, "emotions", LABELS[::-1], raising=False)
    assert text_classifier_of(art) is None
    monkeypatch.undo()
    assert text_classifier_of(SmallArt(tmp_path, texts, labels, split)) is None  # of another recipe


def test_ea_under_both_rules(judge):
    references = {"half": Reference(["joy", "joy", "pity", "calm"], ["a"]), "more": Reference(["joy", "joy", "pity"], ["a"]),
                  "tie": Reference(["joy", "pity"], ["a"])}
    predictions = {name: Prediction("joy", "she is feelingjoy in it") for name in references}
    scores = evaluate(predictions, references, LABELS, judge)
    assert judge.predict(["she is feelingjoy in it"]) == ["joy"]
    assert scores["EA"].images == 1 and scores["EA (>= half)"].images == 2 and scores["EA"].value == 1


# Significance

def test_resampled_statistics_are_scores_of_resampled_texts():
    rng = random.Random(6)
    references = [[sentence(rng) or "x" for _ in range(2)] for _ in range(30)]
    hypotheses = [sentence(rng) for _ in references]
    drawn = rng.choices(range(30), k=30)
    scores = text_scores(hypotheses, references)
    resampled = text_scores([hypotheses[n] for n in drawn], [references[n] for n in drawn])
    times = np.array([Counter(drawn)[n] for n in range(30)])
    for name in set(scores) - {"CIDEr"}:  # whose document frequencies stay
        total = scores[name].formula(times @ scores[name].statistics)
        assert total == pytest.approx(resampled[name].value), name


def test_bootstrap_interval_of_a_mean():
    score = mean_score([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap({"ACC": score})["ACC"]
    error = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.006)
    assert bootstrap({"ACC": score}) == bootstrap({"ACC": score})


def test_mcnemar_is_the_permutation_test_with_all_swaps():
    rng = random.Random(7)
    for _ in range(5):
        first, second = (accuracy(rng.choices("ab", k=11), ["a"] * 11) for _ in range(2))
        observed = abs(first.value - second.value)
        difference = first.statistics[:, 0] - second.statistics[:, 0]
        all_swaps = [abs(sum(np.multiply(signs, difference))) / 11 for signs in itertools.product((-1, 1), repeat=11)]
        exact = np.mean(np.array(all_swaps) >= observed - 1e-12)
        assert mcnemar(first, second) == pytest.approx(exact)
        assert permutation({"ACC": (first, second)}, 10_000, 0)["ACC"] == pytest.approx(exact, abs=0.02)


def test_p_values():
    right, wrong = accuracy("a" * 10, "aaaaabbbbb"), accuracy("b" * 10, "aaaaaccccc")
    assert p_values({"ACC": right, "EA": right}, {"ACC": wrong}) == {"ACC": 2 / 2 ** 5}
    better, worse = mean_score(np.arange(100) + 1.0), mean_score(np.arange(100))
    assert p_values({"Words": better}, {"Words": worse}) == {"Words": pytest.approx(1 / 10_001)}
    assert p_values({"Words": better}, {"Words": better}) == {"Words": 1}
    assert p_values({"ACC": accuracy(["a"], [None])}, {"ACC": right}) == {}  # nothing counted, nothing tested


def test_which_test_is_said_and_one_serves_several_seeds():
    one = {"ACC": accuracy("ab", "aa"), "Words": mean_score([1, 2])}
    assert {name: test_of(score) for name, score in one.items()} == {"ACC": "McNemar", "Words": "permutation"}
    assert "for ACC" in how_tested(one) and "McNemar" in how_tested(one)
    both = pooled([one, {"ACC": accuracy("aa", "aa"), "Words": mean_score([3, 4])}])
    assert both["ACC"].value == 0.75 and both["Words"].value == 2.5 and both["ACC"].images == 2
    assert {test_of(score) for score in both.values()} == {"permutation"}
    assert "McNemar" not in how_tested(both)
    assert test_of(pooled([one])["ACC"]) == "McNemar"


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.5}) == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1, "b": 1} and holm({}) == {}


def test_systems_are_compared_with_the_first():
    first, second, third = ({"ACC": accuracy(said, "a" * 12)} for said in ("a" * 12, "b" * 12, "a" * 11 + "b"))
    found = compare([first, second, third])
    assert found[0]["ACC"]["difference"] == -1 and found[0]["ACC"]["p"] == 2 / 2 ** 12 and found[0]["ACC"]["holm"] == 4 / 2 ** 12
    assert found[1]["ACC"]["value"] == pytest.approx(11 / 12) and found[1]["ACC"]["holm"] == 1
    assert found[1]["ACC"]["interval"][0] < 0 == found[1]["ACC"]["interval"][1]


# One example

@pytest.mark.parametrize("said, references", [
    ("the light feels holy and calmly bright", ["the calm light feels like something holy", "a holy, bright light"]),
    ("the the the sea", ["the sea", "sea of the sea"]), ("", ["a calm sea"]), ("Awe!", ["awe"]),
    ("she looks so sad and alone " * 8, ["a sad woman sits alone in the dark " * 6]),
])
def test_the_example_shows_what_the_scores_are_made_of(said, references):
    text = worked_example(said, references)
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()
    scores = {name: score.value for name, score in text_scores([said], [references]).items()}
    shown = dict(re.findall(r"^  ([^=\n]+) = (?:.* = )?(\S+)$", text, re.MULTILINE))
    for name in scores.keys() - {"CIDEr"}:
        assert float(shown[name]) == pytest.approx(scores[name], abs=6e-5), name
    tokens = [tokenize(text) for text in (said, *references)]
    correct = list(map(int, re.findall(r"(\d+) of \d+ \d-grams", text)))
    guessed = list(map(int, re.findall(r"\d+ of (\d+) \d-grams", text)))
    length, closest = map(int, re.search(r"(\d+) words said, (\d+) in the reference", text).groups())
    assert [*correct, *guessed, length, closest] == slow_bleu_counts(tokens[0], tokens[1:])
    penalty = float(re.search(r"brevity penalty (\S+)", text)[1])
    assert penalty == pytest.approx(min(1, math.exp(1 - closest / max(length, 1e-15))), abs=6e-5)
    for n in range(1, 5):
        listed = re.search(rf"{n}-grams +((?:.|\n {{18}})*)", text)[1].split(", ")
        assert len(listed) == correct[n - 1] or listed == ["-"] and correct[n - 1] == 0
    common = [int(number) for number in re.findall(r"(\d+) of the \d+ words said", text)]
    assert common == [slow_lcs(tokens[0].split(" "), other.split(" ")) for other in tokens[1:]]
    precision, recall = map(float, re.search(r"what was said P = (\S+), of a reference R = (\S+)", text).groups())
    assert rouge_l(tokens[0], tokens[1:]) == pytest.approx(
        0 if precision == 0 else 2.44 * precision * recall / (recall + 1.44 * precision), abs=2e-4)
    parts = re.findall(r"P = (\S+), R = (\S+), (\d+) chunks of (\d+) pairs: (\S+)", text)
    assert len(parts) == len(references)
    for p, r, chunks, pairs, score in ((*map(float, part),) for part in parts):
        mean = p * r / (0.15 * r + 0.85 * p) if p else 0
        assert score == pytest.approx(mean * (1 - 0.6 * (chunks / max(1, pairs)) ** 0.2), abs=2e-4)
    assert max(float(part[-1]) for part in parts) == pytest.approx(scores["METEOR (exact+stem)"], abs=6e-5)


# Files and command line

REFERENCES = {"one": {"emotions": ["awe", "awe", "fear"], "explanations": ["it glows", "the light is holy"]},
              "two": {"emotions": ["fear"], "explanations": ["the sea is dark"]},
              "three": {"emotions": ["awe", "fear"], "explanations": ["so calm"]}}
PREDICTIONS = [{"image": "one", "emotion": "awe", "explanation": "it glows",
                "probabilities": [0, 1] + [0] * 7},
               {"image": "two", "emotion": "joy", "explanation": "a dark sea",
                "probabilities": dict.fromkeys(EMOTIONS, 1 / 9)},
               {"image": "three", "emotion": "awe", "explanation": "calm", "probabilities": [1] + [0] * 8}]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run metrics.py in this process: what it printed."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
        metrics.main()
        return capsys.readouterr()
    return run


@pytest.fixture
def score(tmp_path, command):
    """Run the command line on predictions and references, given as text or as what to write as JSON."""
    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / name

    def run(predictions, *options, references=REFERENCES, **files):
        if isinstance(predictions, list):
            predictions = "\n".join(json.dumps(record) for record in predictions)
        more = [argument for name, content in files.items() for argument in (f"--{name}", write(f"{name}.json", content))]
        return command("--predictions", write("predictions.jsonl", predictions),
                       "--references", write("references.json", references), *options, *more).out
    return run


def test_json_output(score):
    result = json.loads(score(PREDICTIONS, "--json", "--per-image"))
    assert result["ACC"] == 0.5 and result["counts"]["ACC"] == 2 and result["counts"]["images"] == 3
    assert {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique", "KL",
            "ECE", "Top-2", "Words"} <= set(result)
    assert "METEOR" not in result and "EA" not in result
    assert result["per_image"]["one"]["BLEU-1"] == pytest.approx(1)
    assert result["per_image"]["three"]["ACC"] is None
    low, high = result["intervals"]["ROUGE-L"]
    assert low <= result["ROUGE-L"] <= high
    assert result["confusion"][1][1] == 1 and result["confusion"][6][9] == 1 and result["emotions"] == list(EMOTIONS)


def no_nan(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("options", [(), ("--versus",)])
def test_json_has_no_nan(score, tmp_path, options):
    nothing = {"one": {"emotions": [], "explanations": ["it glows"]}, "two": {"emotions": ["awe"], "explanations": [""]}}
    said = [{"image": "one", "emotion": "awe", "explanation": "", "probabilities": [1] + [0] * 8},
            {"image": "two", "emotion": "awe", "explanation": ""}]
    files = dict(versus="\n".join(map(json.dumps, said))) if options else {}
    text = score(said, "--per-image", references=nothing, **files)
    result = json.loads(text, parse_constant=no_nan)
    assert result["per_image"]["one"]["ACC"] is None and result["EA classifier"] is None


def test_plain_captions_keep_all_their_words(score):
    captions = json.dumps([{"image_id": 1, "caption": "a calm sea under a pale sky"}])
    annotations = {"annotations": [{"image_id": 1, "caption": "a calm sea under a pale sky"}]}
    result = json.loads(score(captions, "--json", references=annotations))
    assert result["BLEU-4"] == pytest.approx(1) and result["ACC"] is None
    lines = score(captions, references={"1": {"emotions": ["awe"], "explanations": ["a calm sea"]}}).splitlines()
    assert lines[1].split() == ["ACC", "-", "not", "counted", "0"]
    assert "ACC is not counted: no prediction names an emotion" in lines


def test_systems_in_one_table(score, tmp_path, judge):
    """Every system against the first, with p-values and Holm's; what they are stands below, and who judged."""
    references = {str(n): {"emotions": ["joy"], "explanations": ["she is feelingjoy"]} for n in range(8)}
    def said(emotion):
        return "\n".join(json.dumps({"image": str(n), "emotion": emotion, "explanation": "she is feelingjoy"}) for n in range(8))
    (tmp_path / "other.jsonl").write_text(said("dread"), encoding="utf-8")
    judge.accuracy = 0.634
    judge.save(tmp_path / "ea.safetensors")
    options = ["--versus", tmp_path / "other.jsonl", "--emotions", ",".join(LABELS), "--text-classifier", tmp_path / "ea.safetensors"]
    lines = score(said("joy"), *options, references=references, versus=said("joy")).splitlines()
    assert lines[0].split() == ["score", "95%", "interval", "images", "system", "2", "p", "Holm", "system", "3", "p", "Holm"]
    assert lines[1].split() == ["ACC", "100.00", "100.00", "..", "100.00", "8", "0.00", "0.0078", "0.1875", "100.00", "1.0000", "1.0000"]
    assert lines[2].startswith("EA ") and lines[3].startswith("EA (>= half) ") and "63.4" in lines[-1]
    scored = next(number for number, line in enumerate(lines) if line.startswith("system 1:"))
    assert 2 * (scored - 1) == round(0.1875 / 0.0078125)  # as many p-values did Holm correct for
    assert "swapping two systems' results" in " ".join(lines) and "McNemar" in " ".join(lines)
    result = json.loads(score(said("joy"), "--json", *options, references=references))
    gap = result["versus"][str(tmp_path / "other.jsonl")]["ACC"]
    assert gap["difference"] == -1 and gap["interval"] == [-1, -1] and gap["p"] == 2 / 2 ** 8 <= gap["holm"]


def test_coco_files(score):
    captions = [{"image_id": 1, "caption": "awe because it glows"},
                {"image_id": 2, "caption": "fear because of the sea"}]
    annotations = {"annotations": [*captions, {"image_id": 1, "caption": "because it is so bright"}]}
    result = json.loads(score(json.dumps(captions), "--json", references=annotations))
    assert result["ACC"] == 1 and result["BLEU-1"] == pytest.approx(1)


def test_references_from_the_authors_files(tmp_path):
    third, half = np.float32(1 / 3).item(), np.float32(0.5).item()
    entries = {"7": {"emotions": ["awe", "fear"], "explanations": ["it glows", "it is dark"], "image_name": "Cubism/a.b.jpg",
                     "origin_emotion_distribution": [0, half, 0, 0, 0, 0, third, 0, np.float32(1 / 6).item()], "extra": None},
               "8": {"emotions": ["awe"], "explanations": ["it glows"], "image_name": "Cubism/c.jpg",
                     "origin_emotion_distribution": [0, 2 * third, 0, 0, 0, 0, third, 0, 0]}}
    (tmp_path / "artEmisX_test.json").write_text(json.dumps(entries), encoding="utf-8")
    references = read_references(tmp_path / "artEmisX_test.json")
    assert emotions_of({}, references)[1] == [None, "awe"]
    assert emotions_of({}, references, half_is_enough=True)[1] == ["awe", "awe"]
    assert references["7"].file == "Cubism/a.b.jpg" and references["7"].explanations == ["it glows", "it is dark"]


def test_answers_of_sample_py_are_predictions(tmp_path):
    lines = [{"image": "a.jpg", "emotion": "awe", "explanation": "it glows", "probabilities": dict.fromkeys(EMOTIONS, 0.111),
              "words": [], "explanations": []}, {"image": "b.jpg", "error": "no such file"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (name, prediction), = read_predictions(path)
    assert name == "a.jpg" and prediction.probabilities["fear"] == 0.111
    path.write_text(json.dumps(lines[0] | {"probabilities": [0, 1] + [0] * 7}), encoding="utf-8")  # as it was once
    assert read_predictions(path)[0][1].probabilities == dict.fromkeys(EMOTIONS, 0) | {"awe": 1}
    with pytest.raises(UserError, match="by name"):
        read_predictions(path, ["joy", "dread"])


@pytest.mark.parametrize("names", [
    ["Cubism/a.b", "Cubism/café", "Realism/sea"], ["Cubism/a.b.jpg", "Cubism/caf#U00e9.png", "Realism/sea.JPG"],
    ["a.b", "cafe\u0301", "/data/wikiart/Realism/sea.jpg"],
])
def test_images_go_by_many_names(score, names, capsys):
    references = {name: {"emotions": ["awe"], "explanations": [f"text of {name[-3:]}"]} for name in
                  ("Cubism/a.b", "Cubism/caf\u00e9", "Realism/sea", "Cubism/sea")}
    wanted = list(references)[:3]
    said = [{"image": name, "emotion": "awe", "explanation": f"text of {image[-3:]}"}
            for name, image in zip(names, wanted, strict=True)]
    said += [{"image": "sea.jpg", "emotion": "awe", "explanation": "which?"}, {"image": "Dada/a.b", "emotion": "awe", "explanation": "x"}]
    result = json.loads(score(said, "--per-image", "--allow-missing", references=references))
    assert list(result["per_image"]) == wanted and result["BLEU-1"] == pytest.approx(1)


def test_what_fits_no_image_is_listed(tmp_path, command):
    (tmp_path / "r.json").write_text(json.dumps({"A/sea": {"emotions": ["awe"], "explanations": ["x"]},
                                                 "B/sea": {"emotions": ["awe"], "explanations": ["x"]}}))
    said = [{"image": name, "emotion": "awe", "explanation": "x"} for name in ("A/sea.jpg", "B/sea", "sea", "C/sea\x1b[2J")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, said)))
    complaint = command("--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.json").err
    assert "sea (it could be A/sea or B/sea)" in complaint and "C/sea\\x1b[2J" in complaint


def test_ids_of_coco_and_of_the_authors_files(score):
    annotations = {"images": [{"id": 1, "file_name": "COCO_val_000001.jpg"}, {"id": 2, "file_name": "x/two.png"}],
                   "annotations": [{"image_id": 1, "caption": "a sea"}, {"image_id": 2, "caption": "a sky"}]}
    said = [{"image": "COCO_val_000001", "emotion": "", "explanation": "a sea"}, {"image_id": 2, "caption": "a sky"}]
    assert json.loads(score(said, "--json", references=annotations))["BLEU-1"] == pytest.approx(1)


def test_only_some_images(score, tmp_path):
    """As if the rest did not exist: also in CIDEr's document frequencies and in Unique."""
    references = {f"Cubism/{n}": {"emotions": ["awe"], "explanations": [f"the sea number {n % 3} is calm", "so calm"]} for n in range(6)}
    said = [{"image": name, "emotion": "awe" if name[-1] in "024" else "fear", "explanation": entry["explanations"][0]}
            for name, entry in references.items()]
    names = ["Cubism/0.jpg", "1", "Cubism/2", 5]
    only = ["Cubism/0", "Cubism/1", "Cubism/2", "Cubism/5"]
    found = json.loads(score(said, "--per-image", references=references, only=names))
    alone = json.loads(score([one for one in said if one["image"] in only], "--per-image",
                             references={name: references[name] for name in only}))
    assert found == alone and found["counts"]["images"] == 4
    with pytest.raises(UserError, match=r"only\.json: the references have none of its 1 images, such as nowhere"):
        score(said, references=references, only=["nowhere"])
    with pytest.raises(UserError, match="expected a list of image names"):
        score(said, references=references, only={"Cubism/0": 1})


def test_last_and_missing_predictions(score):
    twice = [*PREDICTIONS, {"image": "two", "emotion": "fear", "explanation": "dark"}]
    assert json.loads(score(twice, "--json", "--last"))["ACC"] == 1
    result = json.loads(score(PREDICTIONS[:1], "--json", "--allow-missing"))
    assert result["ACC"] == 0.5 and result["BLEU-1"] == pytest.approx(1) and result["counts"]["BLEU-1"] == 1


def test_unknown_emotions_of_a_system_are_said(tmp_path, command):
    (tmp_path / "r.json").write_text(json.dumps(REFERENCES), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, PREDICTIONS)), encoding="utf-8")
    complaint = command("--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.json").err
    assert "1 predictions name an emotion" in complaint and "'joy'" in complaint


def changed(**changes):
    return json.dumps(PREDICTIONS[0] | changes)


@pytest.mark.parametrize("predictions, message", [
    ("", "holds no predictions"), ("[]", "holds no predictions"), ("\ufeff\n \n", "holds no predictions"),
    ('{"image": "one"}\n{"image"', r"line 2: not JSON"), ("[" * 100_000, "not JSON"), ("3\n", "line 1: expected image"),
    ("[[]]", "entry 1: expected image"), ('[{"image_id": "one"}]', "entry 1: emotion is null; it must be text"),
    ('{"image": "one", "emotion": "awe"}', "line 1: explanation is null; it must be text"),
    (changed(explanation=5), "line 1: explanation is 5; it must be text"), (changed(emotion=["awe"]), "emotion is"),
    (changed(image=True), "expected image"), (changed(image={"a": 1}), "expected image"),
    ('{"image_id": 1, "caption": null}', "caption is null"), (changed(probabilities=[0.5, 0.4]), "by name"),
    (changed(probabilities=[0.1] * 8), "by name"), (changed(probabilities=[0.05] * 9), "sum to 0.45, not to 1"),
    (changed(probabilities={"awe": math.nan}), "awe is NaN"), (changed(probabilities={"awe": -1, "fear": 2}), "awe is -1"),
    (changed(probabilities={"awe": math.inf}), "awe is Infinity"), (changed(probabilities={"awe": 10 ** 400}), "awe is 1000"),
    (changed(probabilities={"joy": 1}), "by name"), (changed(probabilities={"awe": "1"}), 'awe is "1"'),
    (changed(probabilities={"awe": True}), "awe is true"), (changed(probabilities="awe"), "by name"),
    (PREDICTIONS[:2], "1 of 3 images have no prediction, such as three; .* --allow-missing"),
    ([*PREDICTIONS, PREDICTIONS[0]], "1 of 4 predictions .* --last"),
    ([{**PREDICTIONS[0], "image": "four"}], "none of its 1 images, such as four"),
])
def test_mistakes_in_predictions_are_explained(score, predictions, message):
    with pytest.raises(UserError, match=message) as error:
        score(predictions)
    assert "predictions.jsonl" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("references, message", [
    ("{\n\n]", "line 3: not JSON"), ("[1]", "expected image"), ("{}", "expected image"), ("", "not JSON"),
    ({"one": []}, "image one: emotions must be a list"), ({"one": {"emotions": "awe", "explanations": ["a"]}}, "emotions must be a list"),
    ({"one": {"emotions": [1], "explanations": ["a"]}}, "emotions must be a list"),
    ({"one": {"emotions": ["awe"], "explanations": []}}, "image one needs one explanation"),
    ({"one": {"emotions": ["awe"], "explanations": [None]}}, "explanations must be a list"),
    ({"one": {"emotions": ["joy"], "explanations": ["a"]}}, "unknown emotion 'joy'; .* --emotions"),
    ({"one": {"emotions": ["awe"], "explanations": ["a"], "votes": [1, 2]}}, "image one, votes: expected a number"),
    ({"one": {"emotions": ["awe"], "explanations": ["a"], "votes": [-1] + [0] * 8}}, "amusement is -1"),
    ({"one": {"emotions": ["awe"], "explanations": ["a"], "image_name": 3}}, "image_name is 3"),
    ({"annotations": {}}, "annotations: expected a list"), ({"annotations": [{}]}, "annotation 1: expected an object with image_id"),
    ({"annotations": [{"image_id": 1, "caption": 2}]}, "annotation 1: caption is 2"), ({"annotations": []}, "expected image"),
    ({"annotations": [{"image_id": 1, "caption": "a"}], "images": [{"file_name": "a"}]}, "image 1: expected an object with id"),
])
def test_mistakes_in_references_are_explained(score, references, message):
    with pytest.raises(UserError, match=message) as error:
        score(PREDICTIONS, references=references)
    assert "references.json" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("arguments", [
    [], ["said"], ["said", "reference", "--json"], ["--predictions", "p"], ["--references", "r"], ["--json"], ["--data", "toy"],
    ["--predictions", "p", "--references", "r", "--data", "toy"], ["--train-ea"], ["--train-ea", "--references", "r"],
    ["--predictions", "p", "--references", "r", "--train-ea"], ["--predictions", "p", "--references", "r", "--split", "val"],
    ["--predictions", "p", "--references", "r", "--data-root", "x"], ["--predictions", "p", "--data", "toy", "--emotions", "a,b"],
    ["--predictions", "p", "--data", "toy", "--text-classifier", "c", "--glove", "g"],
    ["--data", "toy", "--train-ea", "--versus", "v"], ["--data", "toy", "--train-ea", "--last"],
])
def test_flags_that_make_no_sense_are_refused(command, arguments, capsys):
    with pytest.raises((UserError, SystemExit)) as stop:
        command(*arguments)
    assert "no effect" in str(stop.value) or stop.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--text-classifier", "none.safetensors"], "none.safetensors"), (["--only", "none.json"], "none.json"),
    (["--versus", "none.jsonl"], "none.jsonl"), (["--emotions", "awe"], "2 to 40"), (["--emotions", "awe,fear,awe"], "2 to 40"),
    (["--emotions", "awe,,fear"], "2 to 40"), (["--meteor-jar", "none.jar"], "none.jar"),
])
def test_mistakes_in_flags_are_explained(score, options, message):
    with pytest.raises(UserError, match=message):
        score(PREDICTIONS, *options)


def test_a_judge_of_other_emotions_is_refused(score, tmp_path, judge):
    judge.save(tmp_path / "ea.safetensors")
    with pytest.raises(UserError, match="other emotions than the references: calm, dread"):
        score(PREDICTIONS, "--text-classifier", tmp_path / "ea.safetensors")


def test_a_mistake_ends_with_code_1(tmp_path):
    command = [sys.executable, metrics.__file__, "--predictions", tmp_path / "a.jsonl", "--references"]
    run = subprocess.run([*command, tmp_path / "none.json"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "none.json" in run.stderr and "Traceback" not in run.stderr


def test_scoring_on_a_data_set_needs_neither_pictures_nor_a_judge(tmp_path, toy_root, toy, command, monkeypatch):
    """--data: the references and emotions of its split; EA only once --train-ea was asked for."""
    root = tmp_path / "data"
    shutil.copytree(toy_root, root, ignore=shutil.ignore_patterns("wikiart", "cache"))
    references = metrics.references_of(toy, "val")
    lines = [{"image": name, "emotion": emotions_of({}, {name: one})[1][0] or "awe", "explanation": one.explanations[0]}
             for name, one in references.items()]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = "--data", "toy", "--data-root", root, "--toy-paintings", 60
    out = command("--predictions", tmp_path / "p.jsonl", *data, "--split", "val").out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["ACC"][1] == rows["ROUGE-L"][1] == "100.00" and "EA" not in rows
    assert "--train-ea trains one" in out and not list(root.rglob("*.safetensors"))
    monkeypatch.setattr(metrics, "RECIPE", metrics.RECIPE | {"epochs": 1})
    assert "right for" in command(*data, "--train-ea").out
    out = command("--predictions", tmp_path / "p.jsonl", *data, "--split", "val").out
    assert "\nEA " in out and "\nEA (>= half) " in out and "right for" in out


def test_evaluate_without_emotions_probabilities_or_predictions():
    references = {"a": Reference([], ["a dark sky"])}
    scores = evaluate({"a": Prediction("awe", "dark sky")}, references)
    assert math.isnan(scores["ACC"].value) and scores["ROUGE-L"].images == 1 and "KL" not in scores
    assert math.isnan(bootstrap(scores)["ACC"][0])
    nothing = evaluate({}, {"a": Reference(["awe"], ["a dark sky"])})
    assert all(math.isnan(score.value) and score.images == 0 for score in nothing.values())

"""The scores against closed forms, brute force, and the field's own scorers where they are installed."""
import json
import math
import random
import shutil
import subprocess
import sys
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
    TextClassifier,
    accuracy,
    align,
    bootstrap,
    confusion_matrix,
    distribution_scores,
    dominant_emotion,
    emotion_alignment,
    evaluate,
    is_metaphor,
    lcs_lengths,
    mcnemar,
    mean_score,
    meteor_exact_stem,
    meteor_original,
    meteor_words,
    novelty,
    p_values,
    split_caption,
    stem,
    text_scores,
    tokenize,
    train_text_classifier,
    unique_share,
)
from sevlm import EMOTIONS
from vad import UserError

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


def test_lcs_and_novelty_equal_the_textbook():
    rng = random.Random(2)
    texts = [sentence(rng, longest=90) for _ in range(30)]
    training = [sentence(rng) for _ in range(50)]
    table = np.array([[slow_lcs(text.split(), other.split()) for other in training] for text in texts])
    others = [other.split() for other in training]
    assert [lcs_lengths(text.split(), others) for text in texts] == table.tolist()
    scores = novelty(texts, training)
    assert scores["LCS-max"].per_image.tolist() == table.max(1).tolist()
    assert scores["LCS-mean"].per_image == pytest.approx(table.mean(1))
    assert novelty(texts, training, samples=(7, 10))["LCS-max"].images == 7


# METEOR

@pytest.mark.parametrize("word, expected", [
    # from the sample vocabulary of the stemmer's description
    ("consigned", "consign"), ("consistency", "consist"), ("consolations", "consol"), ("knocked", "knock"),
    ("conspicuously", "conspicu"), ("knightly", "knight"), ("kneeling", "kneel"), ("happily", "happili"),
    ("skies", "sky"), ("dying", "die"), ("hopping", "hop"), ("hoping", "hope"), ("generously", "generous"),
    ("relational", "relat"), ("electrical", "electr"), ("sensibilities", "sensibl"), ("adoption", "adopt"),
    ("ties", "tie"), ("cries", "cri"), ("gas", "gas"), ("news", "news"), ("sayings", "say"), ("adding", "ad"),
    ("youthful", "youth"), ("boys", "boy"), ("arsenal", "arsenal"), ("belly", "belli"), ("gladly", "glad"),
])
def test_stems(word, expected):
    assert stem(word) == expected


def test_meteor_by_hand():
    scores = meteor_exact_stem(["dark sea", "dancing", "joy", "", "sad dark sea"],
                               [["sea", "dark sea"], ["danced"], ["sea"], ["sad"], ["sad sea"]])
    f_mean = 1 / (0.15 / (2 / 3) + 0.85 / 1)  # two words of three, two of two, in as many chunks
    assert scores.per_image.tolist() == pytest.approx([1, 0.6, 0, 0, f_mean * (1 - 0.6)])


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
    lines = ["SCORE ||| " + " ||| ".join([*texts, text]) for texts, text in zip(references, hypotheses)]
    command = ["java", "-jar", jar_path(), "-", "-", "-stdio", "-l", "en", "-norm", "-m", "exact stem"]
    run = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, text=True, check=True)
    theirs = metrics.meteor_score(np.array([line.split() for line in run.stdout.splitlines()], dtype=float))
    assert meteor_exact_stem(hypotheses, references).statistics.tolist() == theirs.statistics.tolist()


def test_meteor_jar_in_a_folder_with_a_blank(tmp_path):
    jar = jar_path()
    folder = tmp_path / "a folder"
    (folder / "data").mkdir(parents=True)
    shutil.copy(jar, folder)
    (folder / "data" / "paraphrase-en.gz").symlink_to(jar.parent / "data" / "paraphrase-en.gz")
    images = json.loads((FIXTURE / "tokenized.json").read_text(encoding="utf-8"))["images"]
    expected = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
    nasty = ["a\nb", "a\r\u2028b ||| c", "\x85", "ñ “é”"]  # still one line each
    score = meteor_original([*(image["hypothesis"] for image in images), *nasty],
                            [*(image["references"] for image in images), *([text] for text in nasty)],
                            folder / "meteor-1.5.jar")
    theirs = [expected["per_image"][image["id"]]["METEOR"] for image in images]
    assert score.per_image[:-4].tolist() == pytest.approx(theirs, abs=1e-9)
    pooled = score.formula(score.statistics[:-4].sum(0))
    assert pooled == pytest.approx(expected["corpus"]["METEOR"], abs=1e-9)


def test_meteor_jar_that_fails_says_why(tmp_path, monkeypatch):
    jar = tmp_path / "meteor-1.5.jar"
    with pytest.raises(UserError, match="no .*meteor-1.5.jar"):
        meteor_original(["a"], [["a"]], jar)
    jar.write_text("no jar")
    with pytest.raises(UserError, match="paraphrase-en.gz"):
        meteor_original(["a"], [["a"]], jar)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paraphrase-en.gz").touch()
    with monkeypatch.context() as context, pytest.raises(UserError, match="needs Java"):
        context.setenv("PATH", "")
        meteor_original(["a"], [["a"]], jar)
    if shutil.which("java"):
        with pytest.raises(UserError, match="(?i)corrupt jarfile"):
            meteor_original(["a"], [["a"]], jar)


# Explanations of any kind

def test_long_texts_take_little_memory():
    long = " ".join(random.Random(4).choices(WORDS + [f"w{n}" for n in range(500)], k=10_000))
    tracemalloc.start()
    references = [["the light is the light"], ["a word, a word"], [long]]
    scores = text_scores([long, "word " * 10_000, long], references)
    novelty([long], ["the dark light"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # a table of 10,000 x 10,000 bytes alone would be that
    assert scores["METEOR (exact+stem)"].per_image[2] == pytest.approx(1)
    assert scores["ROUGE-L"].per_image[2] == 1


def test_unique_and_metaphors():
    assert unique_share(["a", "b", "a", "a"]).value == pytest.approx(0.5)
    assert is_metaphor("The cloud Looks like a whale") and not is_metaphor("she looks at a whale")


# Emotions

def test_dominant_emotion():
    assert dominant_emotion([0, 3, 2, 0, 0, 0, 0, 0, 0]) == 1
    assert dominant_emotion([0, 2, 1, 1, 0, 0, 0, 0, 0]) is None
    assert dominant_emotion([0, 2, 1, 1, 0, 0, 0, 0, 0], half_is_enough=True) == 1
    assert dominant_emotion([2, 2, 0, 0, 0, 0, 0, 0, 0], half_is_enough=True) is None
    assert dominant_emotion([0] * 9) is None


@pytest.mark.parametrize("caption, emotion, explanation", [
    ("awe because it glows", "awe", "it glows"),
    ("fear because he left because of her ", "fear", "of her"),
    ("something else", "something else", ""),
    ("amusement the man smiles", "amusement the man smiles", "man smiles"),
])
def test_split_caption(caption, emotion, explanation):
    assert split_caption(caption) == (emotion, explanation)


def test_accuracy_counts_missing_and_unknown_as_wrong():
    score = accuracy([1, None, 2, 3], [1, 1, 2, None])
    assert score.value == pytest.approx(2 / 3) and score.images == 3
    assert math.isnan(accuracy([1], [None]).value)
    votes = [[2, 1, 1, 0, 0, 0, 0, 0, 0], [0, 3, 1, 0, 0, 0, 0, 0, 0]]
    assert emotion_alignment([0, 0], votes).value == 0
    assert emotion_alignment([0, 0], votes, half_is_enough=True).value == 0.5
    assert confusion_matrix([1, None, 2], [1, 1, None])[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_distribution_scores_by_hand():
    rest = [0.0] * 7
    scores = distribution_scores(np.array([[0.75, 0.25, *rest], [0.25, 0.75, *rest], [0.5, 0.5, *rest]]),
                                 np.array([[3, 1] + [0] * 7, [3, 1] + [0] * 7, [1, 1] + [0] * 7]))
    divergence = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert scores["KL"].per_image == pytest.approx([0, divergence, 0])
    assert scores["ECE"].value == pytest.approx(0.25)  # confidence 0.75 twice, right once
    assert scores["Top-2"].value == 1 and scores["Top-2"].images == 2


# TextClassifier

@pytest.fixture(scope="module")
def toy():
    rng = random.Random(5)
    labels = [rng.randrange(9) for _ in range(240)]
    texts = [f"{sentence(rng, longest=4)} feeling{label} {sentence(rng, longest=4)}" for label in labels]
    return texts, labels


def train(toy, epochs):
    texts, labels = toy
    return train_text_classifier(texts[:160], labels[:160], texts[160:], labels[160:],
                                 epochs=epochs, batch=16)


@pytest.fixture(scope="module")
def classifier(toy):
    return train(toy, epochs=9)


def test_classifier_learns(toy, classifier):
    texts, labels = toy
    assert accuracy(classifier.predict(texts[160:]), labels[160:]).value > 0.9


def test_equal_seeds_train_equal_classifiers(toy):
    first, second = train(toy, epochs=1), train(toy, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_classifier_does_not_see_padding(toy, classifier):
    rows = [classifier.encode(text) for text in [*toy[0][:5], ""]]
    together, alone = classifier(rows), torch.cat([classifier([row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_rare_words_are_unknown():
    few = train_text_classifier(["dark"] * 4 + ["light"] * 5, [0] * 9, ["dark"], [0], epochs=1)
    assert few.words == ["light"]


def test_classifier_survives_saving(tmp_path, toy, classifier):
    classifier.accuracy = 0.625
    classifier.save(tmp_path / "ea.safetensors")
    loaded = TextClassifier.load(tmp_path / "ea.safetensors")
    assert loaded.accuracy == 0.625 and loaded.predict(toy[0]) == classifier.predict(toy[0])
    (tmp_path / "other.safetensors").write_bytes(b"other")
    for name in ("other.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match=name):
            TextClassifier.load(tmp_path / name)


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
        pooled = scores[name].formula(times @ scores[name].statistics)
        assert pooled == pytest.approx(resampled[name].value), name


def test_bootstrap_interval_of_a_mean():
    score = mean_score([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap({"ACC": score})["ACC"]
    error = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.006)
    assert bootstrap({"ACC": score}) == bootstrap({"ACC": score})


def test_p_values():
    right, wrong = mean_score([1] * 5 + [0] * 5), mean_score([0] * 10)
    assert mcnemar(right, wrong) == 2 / 2 ** 5
    better, worse = mean_score(np.arange(100) + 1.0), mean_score(np.arange(100))
    assert p_values({"ACC": right, "EA": right}, {"ACC": wrong}) == {"ACC": 2 / 2 ** 5}
    assert p_values({"Words": better}, {"Words": worse}) == {"Words": pytest.approx(1 / 1001)}
    assert p_values({"Words": better}, {"Words": better}) == {"Words": 1}


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
def score(tmp_path, monkeypatch, capsys):
    """Run the command line on predictions and references, given as text or as what to write as JSON."""
    def run(predictions, *options, references=REFERENCES):
        if isinstance(predictions, list):
            predictions = "\n".join(json.dumps(record) for record in predictions)
        files = tmp_path / "predictions.jsonl", tmp_path / "references.json"
        files[0].write_text(predictions, encoding="utf-8")
        if not isinstance(references, str):
            references = json.dumps(references)
        files[1].write_text(references, encoding="utf-8")
        arguments = ["metrics.py", "--predictions", files[0], "--references", files[1], *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        metrics.main()
        return capsys.readouterr().out
    return run


def test_json_output(score):
    result = json.loads(score(PREDICTIONS, "--json", "--per-image"))
    assert result["ACC"] == 0.5 and result["counts"]["ACC"] == 2 and result["counts"]["images"] == 3
    assert {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR (exact+stem)", "ROUGE-L", "CIDEr", "Unique", "KL",
            "ECE", "Top-2", "Words", "Metaphors"} <= set(result)
    assert "METEOR" not in result and "EA" not in result
    assert result["per_image"]["one"]["BLEU-1"] == pytest.approx(1)
    assert result["per_image"]["three"]["ACC"] is None
    low, high = result["intervals"]["ROUGE-L"]
    assert low <= result["ROUGE-L"] <= high
    assert result["confusion"][1][1] == 1 and result["confusion"][6][9] == 1


def test_table_compares_systems_and_names_the_judge(score, tmp_path, classifier):
    other = [{**record, "emotion": "fear"} for record in PREDICTIONS]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    classifier.accuracy = 0.634
    classifier.save(tmp_path / "ea.safetensors")
    lines = score(PREDICTIONS, "--versus", tmp_path / "other.jsonl",
                  "--text-classifier", tmp_path / "ea.safetensors").splitlines()
    assert lines[0].split() == ["score", "95%", "interval", "images", "versus", "p"]
    assert lines[1].split() == ["ACC", "50.00", "0.00", "..", "100.00", "2", "50.00", "1.000"]
    assert lines[2].startswith("EA") and "63.4%" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned


def test_coco_files(score):
    captions = [{"image_id": 1, "caption": "awe because it glows"},
                {"image_id": 2, "caption": "fear because of the sea"}]
    annotations = {"annotations": [*captions, {"image_id": 1, "caption": "because it is so bright"}]}
    result = json.loads(score(json.dumps(captions), "--json", references=annotations))
    assert result["ACC"] == 1 and result["BLEU-1"] == pytest.approx(1)


def test_last_and_missing_predictions(score):
    twice = [*PREDICTIONS, {"image": "two", "emotion": "fear", "explanation": "dark"}]
    assert json.loads(score(twice, "--json", "--last"))["ACC"] == 1
    result = json.loads(score(PREDICTIONS[:1], "--json", "--allow-missing"))
    assert result["ACC"] == 0.5 and result["BLEU-1"] == pytest.approx(1) and result["counts"]["BLEU-1"] == 1


@pytest.mark.parametrize("predictions, options, references, message", [
    ("", [], REFERENCES, "is empty"),
    ("[]", [], REFERENCES, "is empty"),
    ('{"image": "one"}\n{"image"', [], REFERENCES, r"line 2: not JSON"),
    ('{"image": "one", "emotion": "awe"}', [], REFERENCES, "line 1: expected"),
    ('[{"image_id": "one"}]', [], REFERENCES, "entry 1: expected"),
    (json.dumps(PREDICTIONS[0] | {"probabilities": [0.5, 0.4]}), [], REFERENCES, "sum to 1"),
    (PREDICTIONS[:2], [], REFERENCES, "1 of 3 images have no prediction, such as three; .* --allow-missing"),
    ([*PREDICTIONS, PREDICTIONS[0]], [], REFERENCES, "1 of 4 predictions .* --last"),
    ([{**PREDICTIONS[0], "image": "four"}], ["--allow-missing"], REFERENCES, "do not have, such as four"),
    (PREDICTIONS, [], "{\n\n]", "line 3: not JSON"),
    (PREDICTIONS, [], "[1]", "expected image"),
    (PREDICTIONS, [], "{}", "no images"),
    (PREDICTIONS, [], {"one": {"emotions": ["awe"], "explanations": []}}, "image one needs a list"),
    (PREDICTIONS, [], {"one": {"emotions": ["joy"], "explanations": ["a"]}}, "unknown emotion 'joy'"),
    (PREDICTIONS, ["--text-classifier", "none.safetensors"], REFERENCES, "none.safetensors"),
])
def test_mistakes_are_explained(score, predictions, options, references, message):
    with pytest.raises(UserError, match=message):
        score(predictions, *options, references=references)


def test_a_mistake_ends_with_code_1(tmp_path):
    command = [sys.executable, metrics.__file__, "--predictions", tmp_path / "a.jsonl", "--references"]
    run = subprocess.run([*command, tmp_path / "none.json"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "none.json" in run.stderr and "Traceback" not in run.stderr


def test_evaluate_without_emotions_or_probabilities():
    references = {"a": Reference([], ["a dark sky"])}
    scores = evaluate({"a": Prediction("awe", "dark sky")}, references, ["a dark sky", "light"])
    assert math.isnan(scores["ACC"].value) and scores["LCS-max"].value == 2 and scores["LCS-mean"].value == 1
    assert "KL" not in scores
    assert math.isnan(bootstrap(scores)["ACC"][0])

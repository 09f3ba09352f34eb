"""Scores for predicted emotions and explanations (section 5.1, Table 1), with no Java and in seconds.

    1. evaluate       what is scored, and where all scores meet
    2. BLEU, CIDEr-D  by n-grams
    3. ROUGE-L        by the longest common subsequence
    4. Emotions       ACC, EA, and how good the predicted distribution is
    5. EA's judge     a text classifier after ArtEmis's, trained once for a data set
    6. Files          any system's predictions against any references
    7. One example    why BLEU, ROUGE-L and METEOR are what they are for one explanation
    8. Many systems   the table, the command line

The numbers are those of pycocoevalcap 1.2, oddities included, because published scores have them. Rooms of their own in
support/ have its tokens (ptb.py), METEOR (meteor.py), the classifier (text_classifier.py), and what makes intervals and
p-values of scores (scores.py): there a `Score` is explained, a formula over what each image adds.

    python metrics.py "a calm sea" "the sea is so calm" "calm water"
    python metrics.py --predictions ours.jsonl --versus theirs.json --references test.json
"""
import argparse
import hashlib
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import Art, load_art
from sevlm import EMOTIONS
from support import meteor
from support.device import choose_device, choose_precision
from support.flags import named_flags, refuse_nonsense
from support.names import pictures_meant
from support.overlap import Corpus, common_subsequence, lcs_lengths
from support.program import UserError, aligned, printable, read_json, run_program
from support.ptb import tokenize
from support.records import finite_only, json_records, numbers_by_name, objects_in, text_in, texts_in
from support.scores import Intervals, Score, Scores, bootstrap, compare, how_tested, mean_score
from support.text_classifier import TextClassifier, train_text_classifier

# 1. evaluate

@dataclass
class Prediction:
    emotion: str  # "" from a system that names none
    explanation: str
    probabilities: Mapping[str, float] | None = None  # of every emotion


@dataclass
class Reference:
    emotions: list[str]  # of the annotations whose explanations count
    explanations: list[str]
    votes: Mapping[str, float] | None = None  # annotators for each emotion, or their share; default: from `emotions`
    file: str = ""  # the picture's, where images go by other names

    def __post_init__(self) -> None:
        self.votes = self.votes or Counter(self.emotions)


def evaluate(predictions: Mapping[str, Prediction], references: Mapping[str, Reference],
             emotions: Sequence[str] = EMOTIONS, classifier: TextClassifier | None = None,
             jar: str | Path | None = None) -> Scores:
    """All scores, by name. An image without a prediction is wrong for ACC and left out of the others."""
    present = np.array([image in predictions for image in references], bool)
    given = [predictions[image] for image in references if image in predictions]
    answered = [reference for image, reference in references.items() if image in predictions]
    explanations = [prediction.explanation for prediction in given]
    scores = {}
    if classifier:
        understood = classifier.predict(explanations)
        for name, half_is_enough in (("EA", False), ("EA (>= half)", True)):  # as the authors count, as ArtEmis does
            felt = [dominant_emotion(Counter(one.emotions), half_is_enough) for one in answered]
            scores[name] = accuracy(understood, felt)
    scores |= text_scores(explanations, [reference.explanations for reference in answered], jar)
    scores["Unique"] = unique_share(explanations)
    scores["Words"] = mean_score([len(text.split()) for text in explanations])
    if all(one.probabilities for one in given) and all(any(one.votes.values()) for one in answered):
        scores |= distribution_scores([one.probabilities for one in given], [one.votes for one in answered], emotions)
    named, felt = emotions_of(predictions, references)
    if not any(named):  # plain captions: ACC counts nothing, rather than all of it as wrong
        felt = [None] * len(felt)
    return {"ACC": accuracy(named, felt)} | {name: score.spread(present) for name, score in scores.items()}


def text_scores(explanations: Sequence[str], references: Sequence[Sequence[str]], jar: str | Path | None = None
                ) -> Scores:
    """Scores of one explanation for each image against all references of the image."""
    hypotheses = [tokenize(text) for text in explanations]
    references = [[tokenize(text) for text in texts] for texts in references]
    corpus = Corpus(hypotheses, references)
    scores = bleu_scores(corpus)
    scores["METEOR (exact+stem)"] = Score(meteor.exact_stem_counts(hypotheses, references), meteor.meteor)
    if jar:
        scores["METEOR"] = Score(meteor.original_counts(hypotheses, references, jar), meteor.meteor)
    scores["ROUGE-L"] = mean_score([rouge_l(text, texts) for text, texts in zip(hypotheses, references, strict=True)])
    scores["CIDEr"] = cider_d(corpus)
    return scores


def unique_share(explanations: Sequence[str]) -> Score:
    """Distinct explanations / explanations: each of k equal ones counts 1 / k."""
    copies = Counter(explanations)
    return mean_score([1 / copies[text] for text in explanations])


# 2. BLEU, CIDEr-D. Of a corpus captions 0 .. images - 1 are the hypotheses; all references follow.

def bleu_scores(corpus: Corpus) -> Scores:
    """BLEU-1 .. BLEU-4. An n-gram of a hypothesis is correct at most as often as one reference has it."""
    correct = np.zeros((corpus.images, 4))
    for n, grams in enumerate(corpus.ngrams):
        most = np.zeros(len(grams.count))  # how often one reference has it
        np.maximum.at(most, grams.in_hypothesis, grams.count[grams.in_reference])
        of_caption = np.bincount(grams.caption, np.minimum(grams.count, most), minlength=len(corpus.captions))
        correct[:, n] = of_caption[:corpus.images]
    length = corpus.length[:corpus.images]
    guessed = np.maximum(length[:, None] - np.arange(4), 0)
    closest = [closest_length(own, texts) for own, texts in zip(length.tolist(), corpus.references, strict=True)]
    statistics = np.column_stack([correct, guessed, length, closest])  # (images, 4 + 4 + 1 + 1)
    return {f"BLEU-{n}": Score(statistics, partial(bleu, n=n)) for n in range(1, 5)}


def closest_length(length: int, references: Iterable[Sequence[str]]) -> int:
    """Of the references' lengths; the smaller one of two that are equally close."""
    return min(map(len, references), key=lambda theirs: (abs(theirs - length), theirs))


def bleu(sums: np.ndarray, n: int) -> np.ndarray:
    """Geometric mean of the first n precisions, less if too short; the tiny numbers are the original's."""
    correct, guessed, length, closest = sums[..., :n], sums[..., 4:4 + n], sums[..., 8], sums[..., 9]
    precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / n)
    return precision * brevity_penalty(length, closest)


def brevity_penalty(length: np.ndarray, closest: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(0, 1 - (closest + 1e-9) / (length + 1e-15)))


def cider_d(corpus: Corpus, sigma: float = 6) -> Score:
    """CIDEr-D: ten times the mean cosine, over n and over references, of n-gram counts weighted by rarity (tf-idf).

    What a hypothesis repeats counts no more than in the reference; another length costs by a Gaussian of width `sigma`.
    """
    captions = len(corpus.captions)
    similarity = np.zeros(captions)  # of a reference to its image's hypothesis
    for grams in corpus.ngrams:
        rarity = np.log(max(1, corpus.images) / np.maximum(1, corpus.documents(grams)))
        weight = grams.count * rarity[grams.gram]
        norm = np.sqrt(np.bincount(grams.caption, weight ** 2, minlength=captions))
        norms = norm * norm[corpus.image]
        ours, theirs = weight[grams.in_hypothesis], weight[grams.in_reference]
        overlap = np.minimum(ours, theirs) * theirs
        product = np.bincount(grams.caption[grams.in_reference], overlap, minlength=captions)
        similarity += np.divide(product, norms, out=np.zeros(captions), where=norms > 0)
    bigrams = np.maximum(corpus.length - 1, 0)  # what the original calls the length
    similarity *= np.exp(-(bigrams - bigrams[corpus.image]) ** 2 / (2 * sigma ** 2))
    of_references, image = similarity[corpus.images:], corpus.image[corpus.images:]
    return mean_score(10 / 4 * np.bincount(image, of_references) / np.bincount(image))


# 3. ROUGE-L

def rouge_l(hypothesis: str, references: Sequence[str], beta: float = 1.2) -> float:
    precision, recall = lcs_shares(hypothesis, references)
    if not precision:
        return 0.0
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def lcs_shares(hypothesis: str, references: Sequence[str]) -> tuple[float, float]:
    """The largest share of the hypothesis in a common subsequence, and of a reference, perhaps another one."""
    words, others = hypothesis.split(" "), [reference.split(" ") for reference in references]
    common = lcs_lengths(words, others)
    return max(common) / len(words), max(length / len(other) for length, other in zip(common, others, strict=True))


# 4. Emotions, by name

def dominant_emotion(votes: Mapping[str, float], half_is_enough: bool = False) -> str | None:
    """The emotion with more than half of the votes, as the authors count; to ArtEmis half is enough, without a tie.

    Votes may be shares stored as float32, where half is off by 3e-8; a vote more or less moves a share by much more.
    """
    total, tolerance = sum(votes.values()), 1e-6 * sum(votes.values())
    first, second = [*sorted(votes.values(), reverse=True), 0, 0][:2]
    enough = first >= total / 2 - tolerance if half_is_enough else first > total / 2 + tolerance
    return max(votes, key=votes.get) if enough and first - second > tolerance else None


def emotions_of(predictions: Mapping[str, Prediction], references: Mapping[str, Reference],
                half_is_enough: bool = False) -> tuple[list[str | None], list[str | None]]:
    """Predicted and dominant emotion of every image; None where there is none."""
    return ([predictions[image].emotion if image in predictions else None for image in references],
            [dominant_emotion(reference.votes, half_is_enough) for reference in references.values()])


def accuracy(predicted: Sequence[str | None], felt: Sequence[str | None]) -> Score:
    """ACC, and EA: the share of images with a dominant emotion for which it is predicted."""
    right = [p == f for p, f in zip(predicted, felt, strict=True)]
    return mean_score(right, [emotion is not None for emotion in felt], right_or_wrong=True)


def without_prediction(predictions: Mapping[str, Prediction], references: Mapping[str, Reference]) -> tuple[int, float]:
    """How many images have no prediction (their picture cannot be used, say), and what ACC is without them."""
    answered = {image: reference for image, reference in references.items() if image in predictions}
    return len(references) - len(answered), accuracy(*emotions_of(predictions, answered)).value


def confusion_matrix(predicted: Sequence[str | None], felt: Sequence[str | None], emotions: Sequence[str]
                     ) -> np.ndarray:
    """Row: dominant emotion. Column: predicted emotion, the last one for none of them."""
    matrix = np.zeros((len(emotions), len(emotions) + 1), int)
    for p, f in zip(predicted, felt, strict=True):
        if f is not None:
            matrix[emotions.index(f), emotions.index(p) if p in emotions else -1] += 1
    return matrix


def distribution_scores(probabilities: Sequence[Mapping[str, float]], votes: Sequence[Mapping[str, float]],
                        emotions: Sequence[str], bins: int = 10) -> Scores:
    """KL(votes || prediction) in nats; on images with a dominant emotion the expected calibration error (confidence
    against accuracy, bin by bin) and how often that emotion is among the two likeliest."""
    predicted, counts = matrix(probabilities, emotions), matrix(votes, emotions)  # (images, E)
    shares = counts / counts.sum(1, keepdims=True)
    surprise = np.log(np.maximum(shares, 1e-9)) - np.log(np.maximum(predicted, 1e-9))  # never infinite
    felt = [dominant_emotion(one) for one in votes]
    counted = np.array([emotion is not None for emotion in felt], bool)
    target = np.array([emotions.index(emotion) if emotion is not None else -1 for emotion in felt], int)
    hits = np.argsort(-predicted, axis=1, kind="stable")[:, :2] == target[:, None]
    confidence = predicted.max(1, initial=0)
    gaps = np.zeros((len(votes), bins + 1))  # an image's gap in its bin, and 1 to count it
    gaps[np.arange(len(votes)), np.minimum(bins * confidence, bins - 1).astype(int)] = confidence - hits[:, 0]
    gaps[:, -1] = 1
    return {"KL": mean_score((shares * surprise).sum(1)),
            "ECE": Score(gaps * counted[:, None], calibration_error),
            "Top-2": mean_score(hits.any(1), counted)}


def matrix(values: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    return np.array([[one.get(name, 0) for name in names] for one in values], float).reshape(-1, len(names))


def calibration_error(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]


# 5. EA's judge

RECIPE = dict(rare=5, rate=5e-4, batch=128, epochs=30, patience=5)  # ArtEmis's


def text_classifier_of(art: Art, train: bool = False, glove: Path | None = None) -> TextClassifier | None:
    """The judge of a data set, stored beside it; None if there is none yet and it is not to be trained.

    One judge scores every system, so that its own mistakes are the same for all. It is another one as soon as anything
    is different that made it: texts, labels, splits, word vectors, layers, recipe.
    """
    vectors = hashlib.sha256(glove.read_bytes()).hexdigest() if glove else None
    layers = repr(TextClassifier((), art.emotions))
    parts = art.texts, art.emotion.tolist(), art.split[art.owner].tolist(), art.emotions, vectors, layers, RECIPE
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = art.folder / "cache" / f"ea-{key[:16]}.safetensors"
    if path.is_file():
        return TextClassifier.load(path)
    if not train:
        return None
    texts, labels = {}, {}
    for split in ("train", "val", "test"):
        rows = art.rows(split)
        texts[split], labels[split] = [art.texts[row] for row in rows], [art.emotions[e] for e in art.emotion[rows]]
    device = choose_device("auto")
    dtype, _ = choose_precision("auto", device, width=256)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16 would need scaled losses
    judge = train_text_classifier(texts["train"], labels["train"], texts["val"], labels["val"], art.emotions, glove,
                                  device, dtype, **RECIPE).cpu()
    judge.accuracy = accuracy(judge.predict(texts["test"]), labels["test"]).value
    judge.save(path)
    return judge


def credit(judge: TextClassifier) -> str:
    return f"EA: by a classifier that is right for {display('EA', judge.accuracy)}% of the test texts"


# 6. Files

def split_caption(caption: str, emotions: Sequence[str] = EMOTIONS) -> tuple[str, str]:
    """Emotion and explanation of "awe because it glows", cut where the authors cut it: before the first "because" and
    after the last. A caption that begins with none of the emotions is an explanation, all of it."""
    emotion, because, _ = caption.partition("because")
    if emotion.strip() not in emotions:
        return "", caption.strip()
    return emotion.strip(), caption.rpartition("because")[2].strip() if because else ""


def by_emotion(values: Any, emotions: Sequence[str], where: str) -> dict[str, float]:
    """Numbers by name of the emotion; a mere list can only be of ArtEmis's nine, in their order."""
    return numbers_by_name(values, emotions, where, in_order=tuple(emotions) == EMOTIONS)


def read_predictions(path: Path, emotions: Sequence[str] = EMOTIONS) -> list[tuple[str, Prediction]]:
    """Images and their predictions, from JSON lines such as `sample.py --json` prints, or COCO results."""
    answered = [(where, record) for where, record in json_records(path)
                if not (isinstance(record, dict) and "error" in record)]  # a picture that sample.py could not open
    if not answered:
        raise UserError(f"{path} holds no predictions")
    return [read_prediction(record, emotions, where) for where, record in answered]


def read_prediction(record: Any, emotions: Sequence[str], where: str) -> tuple[str, Prediction]:
    image = record.get("image", record.get("image_id")) if isinstance(record, dict) else None
    if type(image) not in (str, int):
        raise UserError(f"{where}: expected image, emotion, explanation (and probabilities), or image_id and caption")
    if "caption" in record:
        return str(image), Prediction(*split_caption(text_in(record, "caption", where), emotions))
    probabilities = record.get("probabilities")
    if probabilities is not None:
        probabilities = by_emotion(probabilities, emotions, f"{where}, probabilities")
        if abs(sum(probabilities.values()) - 1) > 0.01:  # they may be rounded
            raise UserError(f"{where}: the probabilities sum to {sum(probabilities.values()):.4g}, not to 1")
    return str(image), Prediction(text_in(record, "emotion", where), text_in(record, "explanation", where),
                                  probabilities)


def read_references(path: Path, emotions: Sequence[str] = EMOTIONS) -> dict[str, Reference]:
    """From JSON {image: {emotions, explanations}}, the authors' artEmisX_*.json, or COCO annotations."""
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        content = from_coco(content, emotions, path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected image: {{emotions, explanations}} for each image, or COCO annotations")
    return {image: read_reference(entry, emotions, f"{path}, image {image}") for image, entry in content.items()}


def read_reference(entry: Any, emotions: Sequence[str], where: str) -> Reference:
    felt, explanations = texts_in(entry, "emotions", where), texts_in(entry, "explanations", where)
    if unknown := sorted(set(felt) - set(emotions)):
        raise UserError(f"{where}: unknown emotion {unknown[0]!r}; there are {', '.join(emotions)}. "
                        "Name other ones with --emotions")
    if not explanations:
        raise UserError(f"{where} needs one explanation or more")
    votes = entry.get("votes", entry.get("origin_emotion_distribution"))
    return Reference(felt, explanations, votes if votes is None else by_emotion(votes, emotions, f"{where}, votes"),
                     text_in(entry, "image_name", where) if "image_name" in entry else "")


def from_coco(content: dict, emotions: Sequence[str], path: Path) -> dict[str, dict]:
    """COCO annotations as {image: {emotions, explanations, image_name}}."""
    entries: dict[str, dict] = {}
    for where, record in objects_in(content["annotations"], "image_id", f"{path}, annotation"):
        emotion, explanation = split_caption(text_in(record, "caption", where), emotions)
        entry = entries.setdefault(str(record["image_id"]), {"emotions": [], "explanations": []})
        entry["emotions"] += [emotion] if emotion else []
        entry["explanations"].append(explanation)
    for where, record in objects_in(content.get("images", []), "id", f"{path}, image"):
        if str(record["id"]) in entries and "file_name" in record:
            entries[str(record["id"])]["image_name"] = text_in(record, "file_name", where)
    return entries


def references_of(art: Art, split: str) -> dict[str, Reference]:
    """Each painting's explanations with their emotions, and all of its votes."""
    return {art.names[p]: Reference([art.emotions[art.emotion[row]] for row in art.rows_of(p)],
                                    [art.texts[row] for row in art.rows_of(p)],
                                    dict(zip(art.emotions, art.votes[p].tolist(), strict=True)))
            for p in art.paintings(split)}


def images_meant(names: Iterable[str], references: Mapping[str, Reference], source: Path) -> dict[str, str]:
    """Which images of the references ids and file names mean."""
    return pictures_meant(names, {image: one.file or image for image, one in references.items()}, source)


def load_references(options: argparse.Namespace
                    ) -> tuple[dict[str, Reference], Sequence[str], TextClassifier | None]:
    """References of a file or a data set, their emotions, and the judge of EA if there is one."""
    judge = TextClassifier.load(options.text_classifier) if options.text_classifier else None
    if options.references:
        emotions = emotion_names(options.emotions) if options.emotions else EMOTIONS
        references = read_references(options.references, emotions)
    else:
        art = load_art(options.data, options.data_root, toy_paintings=options.toy_paintings, pictures=False)
        emotions, references = art.emotions, references_of(art, options.split)
        if not references:
            raise UserError(f"{options.data} has no explanations in its split {options.split}")
        judge = judge or text_classifier_of(art, options.train_ea, options.glove)
    if judge and set(judge.labels) != set(emotions):
        raise UserError(f"the text classifier knows other emotions than the references: {', '.join(judge.labels)}")
    return references, emotions, judge


def emotion_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not 2 <= len(set(names)) == len(names) <= 40 or "" in names:
        raise UserError(f"--emotions {text}: expected 2 to 40 different names with commas between them")
    return names


def read_only(path: Path, references: Mapping[str, Reference]) -> dict[str, Reference]:
    """The references of the images that a JSON list names."""
    names = read_json(path)
    if not isinstance(names, list) or not names or not all(type(name) in (str, int) for name in names):
        raise UserError(f"{path}: expected a list of image names")
    wanted = set(images_meant(map(str, names), references, path).values())
    return {image: reference for image, reference in references.items() if image in wanted}


def load_predictions(path: Path, references: Mapping[str, Reference], wanted: Mapping[str, Reference],
                     emotions: Sequence[str], last: bool, allow_missing: bool) -> dict[str, Prediction]:
    """Predictions for those of the references that are wanted."""
    given = read_predictions(path, emotions)
    found = images_meant(dict(given), references, path)
    kept = [(found[name], prediction) for name, prediction in given if found.get(name) in wanted]
    predictions = dict(kept)
    if len(predictions) < len(kept) and not last:
        raise UserError(f"{path}: {len(kept) - len(predictions)} of {len(kept)} predictions are for an image that has "
                        "one already; name --last to let the last one count")
    if strange := Counter(one.emotion for one in predictions.values() if one.emotion not in (*emotions, "")):
        print(printable(f"{path}: {strange.total()} predictions name an emotion that no reference can have, such as "
                        f"{next(iter(strange))!r}; ACC counts them as wrong"), file=sys.stderr)
    missing = [image for image in wanted if image not in predictions]
    if missing and not allow_missing:
        raise UserError(f"{path}: {len(missing)} of {len(wanted)} images have no prediction, such as {missing[0]}; "
                        "name --allow-missing to go on without them")
    if missing:
        acc = display("ACC", without_prediction(predictions, wanted)[1])
        print(printable(f"{path}: {len(missing)} of {len(wanted)} images have no prediction; ACC counts them as wrong "
                        f"(without them it is {acc}), the other scores leave them out"), file=sys.stderr)
    return predictions


# 7. One example

def worked_example(said: str, references: Sequence[str]) -> str:
    """Which n-grams, which common subsequences, which pairs of words and which lengths make an explanation's scores."""
    scores = text_scores([said], [references])
    tokens = [tokenize(text) for text in (said, *references)]
    words = [shown(name, text.split()) for name, text in zip(["said", *numbered(references)], tokens, strict=True)]
    parts = [["What is compared: words in lower case, without punctuation", *words],
             explain_bleu(tokens, scores), explain_rouge(tokens, scores), explain_meteor(tokens, scores)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def numbered(references: Sequence) -> list[str]:
    return [f"reference {number}" for number in range(1, len(references) + 1)]


def shown(label: str, items: Iterable[str], separator: str = " ") -> str:
    text = separator.join(items) or "-"
    return textwrap.fill(f"  {label:15} {text}", width=100, subsequent_indent=" " * 18)


def explain_bleu(tokens: list[str], scores: Scores) -> list[str]:
    correct, guessed, (length, closest) = np.split(scores["BLEU-4"].statistics[0].astype(int), [4, 8])
    penalty = brevity_penalty(length, closest)
    lines = ["BLEU: n-grams that a reference has too, each at most as often as one reference has it"]
    for n in range(1, 5):
        grams, *theirs = [Counter(zip(*(text.split()[start:] for start in range(n)), strict=False)) for text in tokens]
        common = grams & reduce(Counter.__or__, theirs)
        share = f"{correct[n - 1]} of {guessed[n - 1]} {n}-grams"
        lines.append(shown(share, map(" ".join, common.elements()), separator=", "))
    lines.append(f"  {length} words said, {closest} in the reference of the closest length: "
                 f"brevity penalty {penalty:.4f}")
    for n in range(1, 5):
        shares = " * ".join(f"{c}/{g}" for c, g in zip(correct[:n], guessed[:n], strict=True))
        lines.append(f"  BLEU-{n} = {penalty:.4f} * ({shares})^(1/{n}) = {scores[f'BLEU-{n}'].value:.4f}")
    return lines if correct.all() else [*lines, "  (a 0 counts as 1e-15)"]


def explain_rouge(tokens: list[str], scores: Scores) -> list[str]:
    words, *others = [text.split(" ") for text in tokens]
    lines = ["ROUGE-L: the longest common subsequence"]
    for name, other in zip(numbered(others), others, strict=True):
        common = common_subsequence(words, other)
        share = f"{len(common)} of the {len(words)} words said, {len(common)} of the reference's {len(other)}"
        lines += [shown(name, common), f"{'':18}{share}"]
    precision, recall = lcs_shares(tokens[0], tokens[1:])
    return [*lines, f"  largest share of what was said P = {precision:.4f}, of a reference R = {recall:.4f}",
            f"  ROUGE-L = (1 + 1.2^2) P R / (R + 1.2^2 P) = {scores['ROUGE-L'].value:.4f}"]


def explain_meteor(tokens: list[str], scores: Scores) -> list[str]:
    words, *others = map(meteor.meteor_words, tokens)
    lines = ["METEOR (exact+stem): pairs of equal words, or of words of one stem (a~b), in chunks of neighbours"]
    for name, other in zip(numbered(others), others, strict=True):
        pairs = [words[j] if stage == meteor.EXACT else f"{words[j]}~{other[i]}"
                 for i, j, stage in meteor.align(words, other)]
        counts = meteor.perfect_without_chunks(np.array([meteor.pair_counts(words, other)], float))[0]
        precision, recall = np.nan_to_num(meteor.precision_and_recall(counts))
        score = (f"P = {precision:.4f}, R = {recall:.4f}, {counts[meteor.CHUNKS]:.0f} chunks of {len(pairs)} pairs: "
                 f"{meteor.meteor(counts):.4f}")
        lines += [shown(name, pairs), f"{'':18}{score}"]
    return [*lines, "  P and R: shares of what was said and of the reference; function words count 0.25, others 0.75,",
            "  words of one stem 0.6 of that. The reference with the best of",
            "  P R / (0.15 R + 0.85 P) * (1 - 0.6 * (chunks / pairs)^0.2) counts:",
            f"  METEOR (exact+stem) = {scores['METEOR (exact+stem)'].value:.4f}"]


# 8. Many systems

def display(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value if name in ('Words', 'KL') else 100 * value:.2f}"


def table(scores: Scores, intervals: Intervals, compared: Sequence[dict[str, dict]] = ()) -> str:
    """A line for each score: value, 95% interval, number of images; each other system's value and p-values."""
    titles = [title for number in range(2, len(compared) + 2) for title in (f"system {number}", "p", "Holm")]
    rows = [["", "score", "95% interval", "images", *titles]]
    for name, score in scores.items():
        bounds = " .. ".join(display(name, bound) for bound in intervals[name])
        row = [name, display(name, score.value), bounds if score.images else "not counted", f"{score.images:,}"]
        for gap in (found.get(name) for found in compared):
            row += [display(name, gap["value"]), f"{gap['p']:.4f}", f"{gap['holm']:.4f}"] if gap else ["-"] * 3
        rows.append(row)
    return aligned(rows)


def as_json(scores: Scores, intervals: Intervals) -> dict:
    """Scores as they are, not times 100; null where there is nothing to score."""
    values = {name: score.value for name, score in scores.items()}
    counts = {"images": len(scores["ACC"].statistics)} | {name: score.images for name, score in scores.items()}
    return finite_only(values | {"intervals": intervals, "counts": counts})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score predicted emotions and explanations, or show how it is done.")
    add = parser.add_argument
    add("texts", nargs="*", default=[], metavar="TEXT", help="an example: what was said, then its references")
    add("--predictions", type=Path, metavar="FILE",
        help="JSON lines of image, emotion, explanation (and probabilities), or COCO results")
    add("--versus", type=Path, action="append", default=[], metavar="FILE",
        help="predictions of a system to compare with; may be named several times")
    add("--references", type=Path, metavar="FILE",
        help="JSON of image: {emotions, explanations}, artEmisX_*.json or COCO annotations; or name --data")
    add("--emotions", metavar="NAMES", help="of --references, with commas, where they are not ArtEmis's nine")
    add("--data", metavar="NAME", help="references of toy, artemis_v1, artemis_v2, or of a file of your own")
    add("--data-root", metavar="FOLDER", help="where data sets are (default: $SEVLM_DATA or data/)")
    add("--toy-paintings", type=int, default=2000, metavar="N", help="size of the toy world (default: 2000)")
    add("--split", default="test", choices=("train", "val", "test"), help="of --data (default: test)")
    add("--only", type=Path, metavar="FILE", help="a JSON list of images to score, as if there were no others")
    add("--train-ea", action="store_true", help="train EA's classifier for --data, if there is none")
    add("--glove", type=Path, metavar="FILE", help="word vectors for it, such as glove.6B.100d.txt")
    add("--text-classifier", type=Path, metavar="FILE", help="another one, a .safetensors")
    add("--meteor-jar", type=Path, metavar="FILE",
        help="meteor-1.5.jar, for the full METEOR; needs Java, takes half a minute")
    add("--last", action="store_true", help="of several predictions for an image the last")
    add("--allow-missing", action="store_true", help="score although predictions are missing")
    add("--json", action="store_true", help="print JSON; scores are not times 100")
    add("--per-image", action="store_true", help="print JSON with every image's scores too")
    return parser


NEEDS = {  # a flag has no effect without another
    **dict.fromkeys(("references", "versus", "only", "text_classifier", "meteor_jar", "last", "allow_missing", "json",
                     "per_image"), "predictions"),
    **dict.fromkeys(("data_root", "toy_paintings", "split", "train_ea", "glove"), "data"), "emotions": "references"}
NOT_WITH = {"references": ("data",), "text_classifier": ("train_ea", "glove")}


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    named = named_flags(parser, options)
    if options.texts:
        if len(options.texts) < 2 or len(named) > 1:
            parser.error("an example is what was said and one reference or more, without any flag")
        print(worked_example(options.texts[0], options.texts[1:]))
        return
    refuse_nonsense(named, NEEDS, {}, NOT_WITH)
    if not (options.references or options.data) or not (options.predictions or options.train_ea):
        parser.error("name --predictions with --references or --data; or --train-ea with --data; or an example")
    references, emotions, judge = load_references(options)
    if not options.predictions:
        print(credit(judge))
        return
    wanted = read_only(options.only, references) if options.only else references
    paths = [options.predictions, *options.versus]
    predictions = [load_predictions(path, references, wanted, emotions, options.last, options.allow_missing)
                   for path in paths]
    systems = [evaluate(given, wanted, emotions, judge, options.meteor_jar) for given in predictions]
    scores, intervals, compared = systems[0], bootstrap(systems[0]), compare(systems) if options.versus else []
    if options.json or options.per_image:
        result = as_json(scores, intervals) | {"emotions": emotions}
        result["confusion"] = confusion_matrix(*emotions_of(predictions[0], wanted), emotions).tolist()
        result["EA classifier"] = judge.accuracy if judge else None
        result["versus"] = {str(path): found for path, found in zip(options.versus, compared, strict=True)}
        if options.per_image:
            columns = {name: score.per_image for name, score in scores.items()}
            result["per_image"] = {image: {name: column[row] for name, column in columns.items()}
                                   for row, image in enumerate(wanted) if image in predictions[0]}
        print(json.dumps(finite_only(result), indent=1))
        return
    print(table(scores, intervals, compared))
    if compared:
        print(printable("\n".join(f"system {row}: {path}" for row, path in enumerate(paths, 1))))
        print(textwrap.fill(how_tested(scores) + " Holm: p corrected for all that stand in this table.", 100))
    if not any(prediction.emotion for prediction in predictions[0].values()):
        print("ACC is not counted: no prediction names an emotion")
    if judge:
        print(credit(judge))
    elif options.data:
        print("EA is not counted: these explanations have no classifier yet; --train-ea trains one")


if __name__ == "__main__":
    run_program(main)

"""Tokens and scores against those of the COCO caption evaluation and its Java programs.

Another folder of the same format can be named by the environment variable SEVLM_METRICS_FIXTURE.
"""
import json

import pytest
from conftest import fixture_folder

from metrics import text_scores, unique_share
from support.ptb import tokenize

FOLDER = fixture_folder("SEVLM_METRICS_FIXTURE", "metrics")
THEIR_NAMES = {"BLEU-1": "BLEU-1", "BLEU-2": "BLEU-2", "BLEU-3": "BLEU-3", "BLEU-4": "BLEU-4", "CIDEr": "CIDEr",
               "ROUGE-L": "ROUGE_L", "METEOR (exact+stem)": "METEOR_exact_stem"}


def read(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def images():
    return read("inputs.json")["images"]


@pytest.fixture(scope="module")
def scores(images):
    return text_scores([image["hypothesis"] for image in images], [image["references"] for image in images])


def test_tokens(images):
    theirs = {image["id"]: [image["hypothesis"], *image["references"]] for image in read("tokenized.json")["images"]}
    different = [(caption, tokenize(caption), expected) for image in images
                 for caption, expected in zip([image["hypothesis"], *image["references"]], theirs[image["id"]], strict=True)
                 if tokenize(caption) != expected]
    assert not different


@pytest.mark.parametrize("name", THEIR_NAMES)
def test_scores(name, images, scores):
    expected = read("expected.json")
    assert scores[name].value == pytest.approx(expected["corpus"][THEIR_NAMES[name]], abs=1e-9, rel=0)
    theirs = [expected["per_image"][image["id"]][THEIR_NAMES[name]] for image in images]
    assert scores[name].per_image.tolist() == pytest.approx(theirs, abs=1e-9, rel=0)


def test_unique(images):
    corpus = read("expected.json")["corpus"]
    texts = [image["hypothesis"] for image in images]
    assert unique_share(texts).value == pytest.approx(corpus["unique_raw"], abs=1e-12)
    assert unique_share([tokenize(text) for text in texts]).value == pytest.approx(corpus["unique_tokenized"], abs=1e-12)

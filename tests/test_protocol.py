"""Splits, votes, file names, cleaning and the evaluation, against a fixture made with ArtEmis's and the authors' code.

SEVLM_PROTOCOL_FIXTURE names another folder of the same format. `pytest -s` shows how far our cleaning agrees.
"""
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import fixture_folder

from data import (
    LONGEST_PERCENTILE,
    SHORTEST,
    V1_FILE,
    V2_FILE,
    Annotations,
    Art,
    Examples,
    assemble,
    length_limit,
    read_artemis,
    read_rows,
)
from metrics import (
    Prediction,
    Reference,
    accuracy,
    dominant_emotion,
    emotions_of,
    split_caption,
    unique_share,
)
from sevlm import EMOTIONS
from support.english import clean, words
from support.pictures import index_pictures, spelling
from support.splits import SPLITS, combined, splits_v1
from support.tables import Table

LETTERS = {"train": "t", "val": "v", "test": "x", "rest": "r"}
FOLDER = fixture_folder("SEVLM_PROTOCOL_FIXTURE", "protocol")


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows() -> Table:
    return read_rows(FOLDER / "artemis_v1.csv")


@pytest.fixture(scope="module")
def names(expected) -> list[str]:
    return ["/".join(painting) for painting in expected["paintings"]]


@pytest.fixture(scope="module")
def keys(expected) -> list[str]:
    """By which ArtEmis splits; two paintings may share one, such as Cubism + us_x and Cubismus + _x."""
    return ["".join(painting) for painting in expected["paintings"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fixture's files under their released names."""
    root = tmp_path_factory.mktemp("artemis")
    shutil.copy(FOLDER / "artemis_v1.csv", root / V1_FILE)
    shutil.copy(FOLDER / "contrastive.csv", root / V2_FILE)
    return root


@pytest.fixture(scope="module")
def kept(expected) -> np.ndarray:
    """ArtEmis's own choice of rows, so that a word spelled otherwise cannot change a vote."""
    return np.array([bit == "1" for bit in expected["v1"]["kept"]])


@pytest.fixture(scope="module")
def kept_votes(rows, names, kept) -> np.ndarray:
    votes = np.zeros((len(names), len(EMOTIONS)), int)
    owners, emotions = np.array([names.index(name) for name in rows["name"]]), np.array([EMOTIONS.index(label) for label in rows["emotion"]])
    np.add.at(votes, (owners[kept], emotions[kept]), 1)
    return votes


@pytest.mark.parametrize("setting, too_many", [("split_deep", {}), ("split_minimal", {"too_many": math.inf})])
def test_splits_of_v1(expected, rows, keys, setting, too_many):
    splits = splits_v1(rows["key"], rows["repetition"], **too_many)
    assert "".join(LETTERS[splits[key]] for key in keys) == expected["v1"][setting]


def art_of(version: int, folder) -> Art:
    return assemble(f"artemis_v{version}", folder, read_artemis(version, folder))


@pytest.mark.parametrize("version", [1, 2])
def test_a_data_set_has_the_published_splits(expected, keys, folder, version):
    art = art_of(version, folder)
    found = {painting.replace("/", "", 1): LETTERS[SPLITS[split]] for painting, split in zip(art.names, art.split)}
    wanted = (keys, expected["v1"]["split_deep"]) if version == 1 else (
        expected["v2"]["unique_ids"], expected["v2"]["split_sorted_set"])
    wanted = dict(zip(*wanted, strict=True))
    assert {key: found[key] for key in wanted} == wanted
    assert {found[key] for key in found.keys() - wanted.keys()} <= {"r"}


def test_the_old_rows_that_join_v2(expected):
    new, old = expected["v2"]["n_new_rows"], expected["v2"]["n_old_rows"]
    keys = list(map(str, range(new + old)))
    chosen = combined(keys, ["train"] * len(keys), ["new"] * new + ["old"] * old, np.ones(len(keys), bool))
    assert chosen[:new].all() and chosen[new:].sum() == new
    assert chosen[new:][expected["v2"]["combined_old_positions_first20"]].all()


def by_name(votes: list[int]) -> dict[str, int]:
    return dict(zip(EMOTIONS, votes, strict=True))


def test_votes_and_dominant_emotions(expected, folder, names, kept_votes):
    art = art_of(1, folder)
    votes = [art.votes[art.names.index(name)].astype(int).tolist() for name in names]
    assert votes == expected["histogram"]
    rules = expected["dominant"]
    for name, rows_of in (("raw", votes), ("deep", kept_votes.tolist())):
        for rule, half in (("v1_ge", True), ("sevlm_gt", False)):
            for row, wanted in zip(rows_of, rules[f"{name}_{rule}"], strict=True):
                if wanted is None:
                    assert sum(row) == 0
                else:
                    assert dominant_emotion(by_name(row), half) == (EMOTIONS[wanted[1]] if wanted[0] else None), (name, rule, row)
    targets = rules["raw_sevlm_proc_distribution"]
    assert [dominant_emotion(by_name(row)) for row in votes] == [None if target is None else EMOTIONS[target] for target in targets]


def test_training_paintings_with_several_emotions(expected, rows, names, kept, folder):
    splits = splits_v1(rows["key"], rows["repetition"])
    rows.columns["split"] = [splits[key] for key in rows["key"]]
    art = assemble("artemis_v1", folder, Annotations("the rows that ArtEmis keeps", rows, kept))
    examples = Examples(art, None, None, None, None, np.ones(len(art.names), bool), seed=0, drop_single_emotion=True)
    assert sorted(names.index(art.names[painting]) for painting in examples.paintings) == expected["sevlm"]["cl_train_ids"]


def test_escaped_file_names_are_found(expected, names, tmp_path):
    escaped = {names[int(index)]: tmp_path / path for index, path in expected["sevlm"]["image_fallback_path"].items()}
    for path in escaped.values():
        path.parent.mkdir(exist_ok=True)
        path.touch()
    index = index_pictures(tmp_path)
    assert [index[spelling(name)] for name in escaped] == [[path] for path in escaped.values()]


def test_cleaning_agrees_with_artemis(expected, rows, kept, capsys):
    """Theirs also corrects the spelling with a dictionary that we do not have, so equality is not to be had."""
    texts, v1 = [clean(text) for text in rows["text"]], expected["v1"]
    lengths = np.array([len(words(text)) for text in texts])
    splits = splits_v1(rows["key"], rows["repetition"])
    limit = length_limit(lengths, np.array([splits[key] == "train" for key in rows["key"]]))
    assert LONGEST_PERCENTILE == 95 and abs(limit - v1["too_long_len"]) <= 1
    ours = (lengths >= SHORTEST) & (lengths <= limit)
    capped = [ord(letter) - 48 for letter in v1["tokens_len"]]
    shares = {"rows kept or dropped alike": (ours == kept).mean(), "lengths": (np.minimum(lengths, 70) == capped).mean(),
              "texts": np.mean([ours == theirs for ours, theirs in zip(texts, v1["spelled"], strict=True)])}
    with capsys.disabled():
        print("\nour cleaning against ArtEmis's: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
    assert shares["rows kept or dropped alike"] >= 0.97


@pytest.fixture(params=["test", "val"])
def made_up(request, expected) -> dict:
    return expected["predictions"][request.param]


def test_captions_are_cut_as_the_authors_do(made_up):
    """Those that begin with an emotion; of the others the authors take the first words for one."""
    cuts = {text: cut for text, *cut in zip(made_up["full"], made_up["emotion"], made_up["explanation"], strict=True)}
    assert sum(emotion in EMOTIONS for emotion, _ in cuts.values()) > len(cuts) / 2
    for text, (emotion, explanation) in cuts.items():
        assert split_caption(text) == ((emotion, explanation) if emotion in EMOTIONS else ("", text.strip()))


@pytest.mark.parametrize("case", ["all", "subset_every_third_missing", "with_duplicates_last_wins", "with_unknown_image", "all_wrong"])
def test_acc(expected, made_up, case):
    ids = made_up["image_ids"]
    references = {str(i): Reference([], [], by_name(expected["histogram"][i])) for i in ids}
    targets = dict(zip(references, emotions_of({}, references)[1], strict=True))
    assert {image: target for image, target in targets.items() if target} == made_up["acc_targets"]
    said = dict(zip(map(str, ids), made_up["full"], strict=True))
    if case == "subset_every_third_missing":
        said = {image: text for place, (image, text) in enumerate(said.items()) if place % 3}
    elif case == "with_duplicates_last_wins":
        said |= dict(zip(map(str, made_up["dup_ids"]), made_up["dup_full"], strict=True))
    elif case == "with_unknown_image":
        said["unheard of"] = "awe because it is unknown"
    elif case == "all_wrong":
        said = dict.fromkeys(said, "boredom because it is wrong")
    predictions = {image: Prediction(*split_caption(text)) for image, text in said.items()}
    acc = accuracy(*emotions_of(predictions, references))
    assert acc.value == pytest.approx(max(made_up["acc"][case], 0), abs=1e-12)
    assert acc.images == len(made_up["acc_targets"])


@pytest.mark.parametrize("rule, half", [("ea_v1_ge", True), ("ea_sevlm_gt", False)])
def test_ea(made_up, rule, half):
    felt = [dominant_emotion(Counter(EMOTIONS[label] for label in labels), half) for labels in made_up["emotion_labels"]]
    classified = [EMOTIONS[label] for label in made_up["fake_clf_argmax"]]
    assert accuracy(classified, felt).value == pytest.approx(made_up[rule][0], abs=1e-12)


def test_unique(made_up):
    assert unique_share(made_up["explanation"]).value == pytest.approx(made_up["unique"], abs=1e-12)

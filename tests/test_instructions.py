"""EmoVIT's instruction data: EmoSet, clues, requests, replies and records against the original's (fixture); held-out
sets; then what is made without a language model, on the toy and on paintings."""
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import fixture_folder
from PIL import Image

from data import load_art
from related import clues, emoset, instructions
from related.emoset import authors_pairs, emoset_clue, pairs_of, positions, read_emoset, read_split
from related.heldout import held_out
from related.instructions import clue_questions, reason_question, records_from_replies, records_of, right
from related.questions import (
    ANSWER,
    INSTRUCTIONS,
    KINDS,
    PARAPHRASES,
    Record,
    closed_answer,
    closed_question,
    kind_of,
    named,
    processed,
    read_records,
    stem,
    write_records,
)
from support.program import UserError
from support.splits import SPLITS
from toy import painter

FIXTURE = fixture_folder("SEVLM_EMOVIT_FIXTURE", "emovit")
DATA = FIXTURE / "data"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def art() -> emoset.EmoSet:
    return read_emoset(DATA)


def picture_of(art, identity: str) -> int:
    return list(map(stem, art.names)).index(identity)


def published(records, tmp_path: Path) -> Counter:
    """What the file says, in any order."""
    write_records(tmp_path / "records.json", records)
    return as_multiset(json.loads((tmp_path / "records.json").read_text(encoding="utf-8")))


def as_multiset(content: list) -> Counter:
    return Counter(json.dumps(one, sort_keys=True) for one in content)


# the original's files and numbers

def test_splits_of_both_forms_and_what_is_missing(art):
    for split, entries in EXPECTED["splits"].items():
        assert list(map(list, read_split(DATA, split, []))) == entries
        assert [stem(art.names[p]) for p in art.paintings(split)] == [identity for _, identity, *_ in entries]
        assert [art.emotions[art.votes[p].argmax()] for p in art.paintings(split)] == [label for label, *_ in entries]
    assert [stem(name) for name, file in zip(art.names, art.files) if not file] == EXPECTED["missing_pictures"]
    assert {stem(name) for name, path in zip(art.names, art.captions) if not path.is_file()} == set(EXPECTED["no_caption"])
    for identity in EXPECTED["missing_pictures"]:
        assert any(identity in problem for problem in art.problems)


def test_clues_are_the_originals_and_what_stopped_it_is_said(art):
    for identity, expected in EXPECTED["clues"].items():
        if "text" in expected:
            assert emoset_clue(art, picture_of(art, identity)) == expected["text"]
        else:
            with pytest.raises(UserError, match=identity):
                emoset_clue(art, picture_of(art, identity))


def test_attributes_are_those_of_emosets_reader_and_survive_what_stops_it(art):
    info = emoset.read_info(DATA)
    for expected in itertools.chain(*EXPECTED["emoset_reader"].values()):
        picture = picture_of(art, expected["id"])
        found = art.attributes[picture]
        if "error" not in expected:
            label = art.emotions[art.votes[picture].argmax()]
            indices = {"emotion": info["emotion"][label], "object": sorted(info["object"][one] for one in found.get("object", []))}
            indices |= {name: info[name].get(found.get(name), -1) for name in emoset.SINGLE}
            assert indices == {name: value for name, value in expected.items() if name not in ("id", "sentiment")}
        elif not any(expected["id"] in problem for problem in art.problems):  # only whole numbers were in its way
            annotation = art.annotations[picture]
            assert all(float(found[name]) == annotation[name] for name in emoset.SCALES if name in annotation)


@pytest.mark.parametrize("span", EXPECTED["categorical"])
def test_categorical_records_are_the_published_ones(art, span, tmp_path):
    inside = {art.names[p] for p in positions(art, *map(int, span.split(":")))}
    found = published([one for one in records_of(art, kinds=["categorical"]) if one.image in inside], tmp_path)
    there = [one for one in EXPECTED["categorical"][span] if stem(one["image"]) not in EXPECTED["missing_pictures"]]
    assert found == as_multiset(there)


@pytest.mark.parametrize("reply", EXPECTED["replies"], ids=lambda reply: reply["file"])
def test_replies_are_split_by_the_authors_rule_and_by_ours(reply):
    text = (DATA / reply["file"]).read_text(encoding="utf-8")
    if reply["authors"] is not None:
        turns = [[turn["value"] for turn in one["conversations"]] for one in reply["authors"]]
        assert list(map(list, authors_pairs(text, reply["kind"]))) == turns
    assert list(map(list, pairs_of(text, reply["kind"]))) == reply["intended"]


def test_markers_count_only_where_a_line_begins_and_in_pairs():
    for text, expected in (
            ("Question: a\nQuestion: b\nAnswer: c\nAnswer: d", [("b", "c\nAnswer: d")]),
            ("Answer: a\nQuestion: b? An answer: no\n# Answer: c", [("b? An answer: no", "c")]),
            ("- (Complex) Question 3 : a\n**ANSWER 3:** **b**\n\n", [("a", "b")]),
            ("Q1: a\nA1: b\nq: c\na: d", [("a", "b"), ("c", "d")]),
            ("So, question: a answer: b", [("a", "b")]), ("Question: a", []), ("", [])):
        assert pairs_of(text, "conversation") == expected, text


def test_the_authors_records_load_as_they_did(art):
    """(image, text, answer) of all that the authors' scripts made; they delete the word "Complex", even inside words."""
    made = [(one["image"], *(turn["value"] for turn in one["conversations"]))
            for one in itertools.chain(*EXPECTED["categorical"].values(), *(reply["authors"] or [] for reply in EXPECTED["replies"]))]
    loaded = {(image, processed(question), answer.replace("Complex", "")) for image, question, answer in made}
    assert {tuple(one.values()) for one in EXPECTED["loaded"]} <= loaded
    dialogues = {one for one in loaded if not one[2].startswith(ANSWER)}
    assert dialogues <= {tuple(one.values()) for one in EXPECTED["loaded"]}


def test_a_model_reads_questions_as_the_original_does():
    for one in json.loads((FIXTURE / "texts.json").read_text(encoding="utf-8")):
        assert processed(one["text"]) == one["caption_prompt"]
    for wording in PARAPHRASES:  # not one loses its end, which the answer begins with
        assert processed(wording(painter.EMOTIONS)).endswith(" predict emotion") and kind_of(wording("ab")) == "categorical"
    assert len(set(INSTRUCTIONS)) == 5


def test_danger_is_not_anger():
    """What substrings count (the fixture's trap) is not what is named."""
    labels = list(emoset.read_info(DATA)["emotion"])
    for one in EXPECTED["matching"]:
        tokens = re.findall(r"\w+", one["output"].lower())
        assert named(one["output"], labels) == [label for label in labels if label in tokens]
    assert named("Predict emotion: danger", ["anger", "fear"]) == [] and named("An ANGER.", ["anger"]) == ["anger"]
    assert named("it is something else", ["something else", "fear"]) == ["something else"]


# replies become records of training pictures only

def test_replies_from_a_folder_and_from_json_lines_are_the_same_records(art, tmp_path):
    problems, usable = [], {stem(art.names[p]) for p in art.paintings("train") if art.files[p]}
    records = records_from_replies(art, DATA, problems)
    assert sorted((one.image, one.kind, one.question, one.answer) for one in records) == sorted(
        (f"{reply['id']}.jpg", reply["kind"], *turn) for reply in EXPECTED["replies"] if reply["id"] in usable for turn in reply["intended"])
    for reply in EXPECTED["replies"]:
        useless = not reply["intended"] or reply["id"] not in usable
        assert useless == any(f"{reply['kind']} {reply['emotion']}/{reply['id']}:" in problem for problem in problems)
    lines = [json.dumps({"id": reply["id"], "kind": reply["kind"], "reply": (DATA / reply["file"]).read_text(encoding="utf-8")})
             for reply in EXPECTED["replies"]]
    (tmp_path / "replies.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert sorted(records_from_replies(art, tmp_path / "replies.jsonl", []), key=str) == sorted(records, key=str)


def test_no_reply_about_a_held_out_picture_is_taken(art, tmp_path):
    for split in ("val", "test"):
        identity = stem(art.names[art.paintings(split)[0]])
        (tmp_path / "reasoning" / split).mkdir(parents=True)
        (tmp_path / "reasoning" / split / f"{identity}.txt").write_text("Question: a\nAnswer: b")
    (tmp_path / "conversation").mkdir()
    (tmp_path / "conversation" / "nobody.txt").write_text("Question: a\nAnswer: b")
    (tmp_path / "conversation" / "latin.txt").write_bytes(b"Question: \xe9\nAnswer: b")
    problems = []
    assert records_from_replies(art, tmp_path, problems) == [] and len(problems) == 4
    assert sum("of val, not of train" in one or "of test, not of train" in one for one in problems) == 2
    with pytest.raises(UserError, match="expected a folder in it named conversation or reasoning"):
        records_from_replies(art, tmp_path / "reasoning", [])
    for line in ("3", '{"id": "a", "kind": [], "reply": "b"}', '{"id": "a", "kind": "reasoning", "reply": 3}', "{"):
        (tmp_path / "replies.jsonl").write_text(line)
        with pytest.raises(UserError, match="replies.jsonl, (line|entry) 1"):
            records_from_replies(art, tmp_path / "replies.jsonl", [])


def test_requests_carry_the_clues_of_training_pictures(art):
    problems, train = [], {stem(art.names[p]) for p in art.paintings("train") if art.files[p]}
    asked = list(map(json.loads, instructions.requests_of(art, problems)))
    texts = {identity: one["text"] for identity, one in EXPECTED["clues"].items() if "text" in one and identity in train}
    for kind in emoset.SYSTEM:
        assert {one["id"]: one["user"] for one in asked if one["kind"] == kind} == texts
    assert all(one["temperature"] == 1 and one["system"] == emoset.SYSTEM[one["kind"]] for one in asked)
    assert all(any(identity in problem for problem in problems) for identity in train - texts.keys())


def test_a_broken_emoset_loses_only_what_is_broken(art, tmp_path):
    def whole() -> Path:
        """A copy that may be written to."""
        root = Path(shutil.copytree(DATA, tmp_path / "data", copy_function=shutil.copyfile, dirs_exist_ok=True))
        for folder in [root, *filter(Path.is_dir, root.rglob("*"))]:
            folder.chmod(0o755)
        return root

    root = whole()
    train, test = (json.loads((root / f"{split}.json").read_text()) for split in ("train", "test"))
    (root / "train.json").write_text(json.dumps([["fear"], 3, *train, train[0], test[0], ["bliss", "image/a.jpg", "b.json"]]))
    (root / "val.json").unlink()
    victim = next(path for entry in train if (path := root / entry[-1]).is_file())
    for content in (b"[]", b"\xff", b'{"emotion": {}, "brightness": [], "object": "Kite", "colorfulness": 1e400}', b'{"object": [{}, 3], "brightness": 1' + 400 * b"0" + b"}"):
        victim.write_bytes(content)
        found = read_emoset(root)
        assert [found.names[p] for p in found.paintings("train")] == [art.names[p] for p in art.paintings("train")]
        told = "\n".join(found.problems)
        for part in ("train.json, entry 1", "train.json, entry 2", f"train.json: {Path(test[0][-2]).stem} is in test.json too",
                     f"train.json: {Path(train[0][-2]).stem} is in train.json too", "unknown emotion, 'bliss'", "no val.json", victim.stem):
            assert part in told
        assert len(records_of(found)) > 0
    for name, content in (("info.json", '{"emotion": 3}'), ("train.json", "{}"), ("train.json", None)):
        whole()
        (root / name).unlink() if content is None else (root / name).write_text(content)
        with pytest.raises(UserError, match=name):
            read_emoset(root)


# held-out sets

def test_seven_held_out_sets_are_read_as_they_come():
    for name, expected in json.loads((FIXTURE / "heldout" / "expected.json").read_text()).items():
        root = FIXTURE / "heldout" / name
        cases = {(root, "testing"): expected}
        if name == "EmotionROI":
            cases = {(root, part): pictures for part, pictures in expected.items()}
        if name == "WEBEmo":
            cases = {(root, "testing"): expected["by_number"], (root / "test", "testing"): expected["by_name"]}
        for (folder, part), pictures in cases.items():
            found = held_out(folder, part)
            assert {Path(file).relative_to(root).as_posix(): label for file, label in found.items()} == dict(pictures)
            assert list(found.values()) == sorted(found.values()) and all(map(Path.is_file, map(Path, found)))


def test_labels_in_odd_folders(tmp_path):
    def picture(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    with pytest.raises(UserError, match="no such folder"):
        held_out(tmp_path / "nothing")
    with pytest.raises(UserError, match="expected two or more folders"):
        held_out(tmp_path)
    for name in ("votes/a.jpg", "web/test/joy/1.png", "web/test/rage/2.png", "odd/images/test25/30/1.png"):
        picture(name)
    assert list(held_out(tmp_path / "web").values()) == ["joy", "rage"]
    with pytest.raises(UserError, match="30 is none of WEBEmo's folders, 0 to 24"):
        held_out(tmp_path / "odd")
    table = tmp_path / "votes" / "ABSTRACT_groundTruth.csv"
    table.write_text("'','Anger','Sad'\n'a.jpg',9,10\n'b.jpg',10,9\n'c.jpg',1,1\n")
    assert list(held_out(table.parent).items()) == [(str(table.parent / "b.jpg"), "anger"), (str(table.parent / "a.jpg"), "sadness")]
    for line in ("'d.jpg',1", "'d.jpg',1,many"):
        table.write_text(f"'','Anger','Sad'\n{line}\n")
        with pytest.raises(UserError, match="line 2: expected a picture and 2 numbers"):
            held_out(table.parent)


# without a language model

@pytest.fixture(scope="module")
def toy_records(toy_root) -> tuple:
    art = load_art("toy", toy_root, toy_paintings=60)
    return art, records_of(art)


def test_the_toys_records_say_what_annotators_and_the_maker_know(toy_records):
    art, records = toy_records
    train = {art.names[p]: p for p in art.paintings("train")}
    assert {one.image for one in records} == set(train) and {one.kind for one in records} == set(KINDS)
    assert records == records_of(art), "the same each time"
    assert all(kind_of(one.question) == one.kind for one in records)
    for image, p in train.items():
        mine = {kind: [one for one in records if one.image == image and one.kind == kind] for kind in KINDS}
        assert Counter(one.answer for one in mine["categorical"]) == {
            closed_answer(emotion): votes for emotion, votes in zip(art.emotions, art.votes[p].tolist()) if votes}
        assert {one.question for one in mine["categorical"]} == {closed_question(art.emotions)}
        palette, subject = re.fullmatch(r".*_(\w+)-(\w+)-\d+-\d+", image).groups()
        said = [one.answer for one in mine["conversation"]]
        assert sum(named(answer, painter.SHAPES) == [subject] for answer in said) == 2
        assert sum(named(answer, painter.PALETTES) == [palette] for answer in said) == 1
        for one in mine["conversation"]:
            if one.answer[:3] in ("Yes", "No,"):
                assert (one.answer[:3] == "Yes") == (named(one.question, painter.SHAPES) == [subject])
        said = [(art.emotions[art.emotion[row]], art.texts[row]) for row in art.rows_of(p)]
        reasons, differently = mine["reasoning"][:len(said)], mine["reasoning"][len(said):]
        assert [(one.emotion, one.answer.rpartition(", because ")[2]) for one in reasons] == said
        assert all(one.emotion in one.question or one.answer.startswith(one.emotion) for one in reasons)
        dissent = [one for one in said if one[0] != art.emotions[art.votes[p].argmax()]]
        if dissent:
            assert [(one.emotion, one.answer.rpartition(", because ")[2]) in dissent and one.answer.startswith("Yes") for one in differently] == [True]
        else:
            assert [one.answer[:6] for one in differently] == ["Hardly"] * int(art.votes[p].max() == art.votes[p].sum())
    asked = {one.question for one in records if one.kind == "conversation"}
    assert sum("Is the" in question or "show the" in question or "see the" in question for question in asked) > 5


def test_clue_questions_know_the_truth_and_paraphrases_are_not_trained_on(toy_records):
    art, records = toy_records
    trained = {processed(one.question) for one in records}
    known = {processed(question) for wording in clues.WORDINGS.values() for question in wording.questions}
    for split, paraphrased in itertools.product(("val", "test"), (False, True)):
        questions = clue_questions(art, split, paraphrased)
        assert len(questions) == 3 * len(art.paintings(split))
        assert {one.image for one in questions} == {art.names[p] for p in art.paintings(split)}
        for one in questions:
            made = painter.painting(int(one.image.split("-")[-2]))
            light = np.asarray(made.image.convert("L")).mean() / 255
            truth = dict(zip(("colour", "subject"), one.image.split("_")[1].split("-")), brightness="dark" if light < 0.35 else "dim" if light < 0.5 else "bright")
            assert one.truth == truth[one.asked] and one.truth in one.choices
            assert (processed(one.question) in known) != paraphrased
            assert not (paraphrased and processed(one.question) in trained)
            other = next(choice for choice in one.choices if choice != one.truth)
            assert right(one, f"It is the {one.truth.upper()}.") and not right(one, f"{one.truth} or {other}")
            assert not right(one, other) and not right(one, f"un{one.truth}") and not right(one, "")
    assert not trained & {processed(wording(art.emotions)) for wording in PARAPHRASES[1:]}
    assert processed(reason_question("awe")) in {processed(one.question.replace(one.emotion, "awe")) for one in records if one.kind == "reasoning"}


def test_a_toy_world_without_the_truth_is_painted_anew(toy_root, tmp_path, monkeypatch, toy):
    about = json.loads((toy_root / "toy-60" / "toy.json").read_text())
    monkeypatch.setattr(painter, "TRUTH", ())
    assert painter.toy_key(60) != about["key"], "what is kept beside the pictures is among what the key stands for"
    toy.folder = tmp_path
    (tmp_path / "toy.json").write_text(json.dumps({**about, "truth": {}}))
    with pytest.raises(UserError, match="does not say what the pictures show"):
        records_of(toy)


@pytest.mark.parametrize("colour, hue", [((220, 30, 30), "red"), ((40, 60, 200), "blue"), ((60, 160, 60), "green"), ((128, 128, 128), None)])
def test_flat_pictures_are_measured_as_the_formulas_say(colour, hue):
    """Without any spread, colourfulness is 0.3 times the length of the mean opponent colour."""
    brightness, colourfulness, *shares = clues.measured(Image.new("RGB", (90, 50), colour))
    red, green, blue = colour
    assert colourfulness == pytest.approx(0.3 * np.hypot(red - green, (red + green) / 2 - blue) / 109, abs=1e-5)
    assert brightness == pytest.approx((0.299 * red + 0.587 * green + 0.114 * blue) / 255, abs=0.003)
    assert dict(zip(clues.HUES, shares)) == {name: float(name == hue) for name in clues.HUES}


def test_colourfulness_grows_with_the_spread_of_opponent_colours():
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32], half[32:] = (255, 0, 0), (0, 255, 0)  # red-green: +-255, yellow-blue: 127.5 everywhere
    _, colourfulness, *shares = clues.measured(Image.fromarray(half))
    assert colourfulness == 1 and dict(zip(clues.HUES, shares))["red"] == 0.5
    half[:32], half[32:] = (110, 100, 100), (100, 110, 100)
    assert clues.measured(Image.fromarray(half))[1] == pytest.approx((10 + 0.3 * 5) / 109, abs=1e-5)
    assert [clues.colourfulness_in_words(value / 109) for value in (0, 7, 8, 40, 200)] == ["not", "not", "slightly", "averagely", "extremely"]


def test_paintings_are_asked_about_style_artist_and_what_two_mention(toy_root, tmp_path):
    """The toy's files, read as ArtEmis."""
    shutil.copytree(toy_root / "toy-60", tmp_path / "artemis_v1", ignore=shutil.ignore_patterns("cache", "toy.json"))
    art = load_art("artemis_v1", tmp_path)
    broken = art.paintings("train")[0]
    art.files[broken].write_bytes(b"junk")
    records = records_of(art, kinds=["conversation"])
    assert {one.image for one in records} == {art.names[p] for p in art.paintings("train")} - {art.names[broken]}
    assert clue_questions(art, "test") == []
    found = clues.clues_of(art, art.paintings("train"))
    for p, known in found.items():
        style, rest = art.names[p].split("/")
        assert known["style"] == style and known["artist"].lower().replace(" ", "-") == rest.split("_")[0]
        texts = [art.texts[row].split() for row in art.rows_of(p)]
        for word in filter(None, re.split(", | and ", known.get("mentioned", ""))):
            assert sum(word in text for text in texts) > 1
        assert any(known["style"] in one.answer for one in records if one.image == art.names[p])
    assert sum("mentioned" in known for known in found.values()) > len(found) / 2
    light = {p: np.asarray(Image.open(art.files[p]).convert("L")).mean() / 255 for p in found}
    assert all(known["brightness"] == clues.brightness_in_words(light[p]) for p, known in found.items() if min(abs(light[p] - 0.35), abs(light[p] - 0.5)) > 0.01)
    asked = list(map(json.loads, instructions.requests_of(art, [])))
    assert {one["id"] for one in asked} == {art.names[p] for p in art.paintings("train")}
    assert all(art.texts[art.rows_of(p)[0]] in next(one["user"] for one in asked if one["id"] == art.names[p]) for p in found)


def test_shared_words_are_content_words_of_two():
    assert clues.shared_words(["the sky is blue and calm", "a calm blue sea", "the sky looks like home", "blue blue"]) == ["blue", "calm", "sky"]
    assert clues.shared_words(["it is it", "it is"]) == []


# files and the program

def test_records_are_read_as_they_were_written(art, toy_records, tmp_path):
    for records in (toy_records[1], records_of(art)):
        write_records(tmp_path / "records.json", records)
        found = read_records(tmp_path / "records.json")
        assert [(one.image, one.question, one.answer, one.kind) for one in found] == [(one.image, one.question, one.answer, one.kind) for one in records]
    assert found == records, "EmoSet's names tell the emotion"
    (tmp_path / "records.json").write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I"}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So"}]}]))
    assert read_records(tmp_path / "records.json") == [Record("a.jpg", "Who?", "I", "conversation", ""), Record("a.jpg", "Why?", "So", "reasoning", "")]
    for bad in ({}, {"image": "a", "conversations": []}, {"image": 3, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
                {"image": "a", "conversations": [{"from": "gpt", "value": "a"}]}, {"image": "a", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}):
        (tmp_path / "records.json").write_text(json.dumps([bad]))
        with pytest.raises(UserError, match="records.json, entry 1"):
            read_records(tmp_path / "records.json")


def test_the_program_counts_shows_and_writes(toy_root, toy_records, tmp_path, monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["instructions", *map(str, arguments)])
        instructions.main()
        return capsys.readouterr().out

    _, records = toy_records
    told = run("--data-root", toy_root, "--toy-paintings", 60, "--show", 3, "--out", tmp_path / "records.json")
    counts = [sum(one.kind == kind for one in records) for kind in KINDS]
    assert re.search(rf"^{len(records):,} records +{counts[0]:,} +{counts[1]:,} +{counts[2]:,}$", told, re.MULTILINE)
    assert sum(line in {one.image for one in records} for line in told.split("\n")) == 3
    assert len(read_records(tmp_path / "records.json")) == len(records)
    told = run("--emoset", DATA, "--replies", DATA, "--out", tmp_path / "records.json")
    written, art = read_records(tmp_path / "records.json"), read_emoset(DATA)
    held_out = {art.names[p] for p in range(len(art.names)) if SPLITS[art.split[p]] != "train"}
    assert written and not held_out & {one.image for one in written} and "things that cannot be used" in told
    told = run("--emoset", DATA, "--requests", tmp_path / "requests.jsonl")
    assert f"{len((tmp_path / 'requests.jsonl').read_text().splitlines())} requests" in told
    with pytest.raises(UserError, match="--requests makes no records"):
        run("--emoset", DATA, "--requests", tmp_path / "requests.jsonl", "--show", 2)
    with pytest.raises(UserError, match="there is no file .*info.json"):
        run("--emoset", tmp_path)

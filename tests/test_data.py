"""data.py and what is below it: tables, ArtEmis's files, one's own, pictures, stores, the toy world; then captions,
epochs and negatives."""
import csv
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image

import data
from data import (
    BATCH,
    GROUP,
    JSON_FILES,
    PREPROCESSED_FILE,
    SPLITS,
    V1_FILE,
    Art,
    Examples,
    PictureBatches,
    best_accuracy,
    fill_store,
    find_lexicon,
    find_tokenizer,
    load_art,
    load_captions,
    negatives,
    open_store,
    read_rows,
)
from sevlm import EMOTIONS, SEVLM, Config, Text, initialise, load_pixels, normalise
from support import store as store_module
from support.annotations import whole_numbers
from support.english import clean, words
from support.pictures import MOST_PIXELS, BadPicture, index_pictures, open_picture, picture_files, spelling, squared
from support.program import UserError
from support.store import Store
from support.tables import read_table
from toy import painter
from vad import read_lexicon

HEADER = "art_style,painting,emotion,utterance,repetition\n"


# Tables

def test_rows_of_every_honest_kind(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffrepetition,emotion,utterance,painting,art_style\r\n"
                     '5,awe,"a ""great"", wide\r\nsea",a-b.c_d(1),Baroque\r\n\r\n'
                     "5,Something Else ,nan,é,Cubism\r\n5,fear,null,NA,Cubism".encode())
    rows = read_rows(path)
    assert rows.problems == []
    assert rows["text"] == ['a "great", wide\r\nsea', "nan", "null"]
    assert rows["name"] == ["Baroque/a-b.c_d(1)", "Cubism/é", "Cubism/NA"]
    assert rows["emotion"] == ["awe", "something else", "fear"]
    assert rows["key"] == ["Baroquea-b.c_d(1)", "Cubismé", "CubismNA"]


@pytest.mark.parametrize("line, problem", [
    ("Cubism,x,joy,nice,5", "line 3: unknown emotion 'joy'"), ("Cubism,x,awe,  ,5", "line 3: blank utterance"),
    ("Cubism,x,awe,nice", "line 3: 4 columns instead of 5"), ("Cubism,x,awe,nice,five", "line 3: repetition is 'five'"),
    ('Cubism,x,awe,"cut off in the mid', "line 3: 4 columns instead of 5"),
    (f'Cubism,x,awe,"{"x" * 200_000}",5', "line 3: field larger than field limit"),
])
def test_bad_rows_are_named_and_the_rest_is_read(tmp_path, line, problem):
    path = tmp_path / "rows.csv"
    after = "" if "cut off" in line else "\nCubism,z,fear,dark,5\n"
    path.write_text(f"{HEADER}Cubism,y,awe,calm,5\n{line}{after}")
    rows = read_rows(path)
    assert rows["text"] == (["calm", "dark"] if after else ["calm"])
    assert len(rows.problems) == 1 and rows.problems[0].startswith(f"rows.csv, {problem}")


@pytest.mark.parametrize("closing", ['Cubism,p9,awe,"so, so wide",5', 'Cubism,p9,awe,wide,5', 'Cubism,p9,awe,it is 5" wide,5'])
def test_a_quote_that_is_not_closed_loses_its_own_line_alone(tmp_path, closing):
    """Whether another row's quotes close it, or nothing does; and line breaks between quotes stay what they are."""
    lines = [f"Cubism,p{i},{EMOTIONS[i % 3]},text {i},5" for i in range(9)]
    lines[3] = 'Cubism,p3,awe,"never closed,5'
    lines[6] = 'Cubism,p6,awe,"one\nblue, wide, deep, far\ntwo",5'
    (tmp_path / "rows.csv").write_text(HEADER + "\n".join([*lines, closing, *lines[:2]]) + "\n")
    rows = read_rows(tmp_path / "rows.csv")
    assert rows["name"] == [f"Cubism/p{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 0, 1)]
    assert rows["text"][5] == "one\nblue, wide, deep, far\ntwo"
    [problem] = rows.problems
    first, last, after = map(int, re.fullmatch(
        r"rows\.csv, line (\d+) to (\d+): a quote is not closed; its line is lost, and the (\d+) after it are read on "
        r"their own", problem).groups())
    assert first == 5 and last > 5 and after == last - first


def test_rows_that_a_quote_has_swallowed_are_found_in_a_small_file_too(tmp_path):
    (tmp_path / "a.csv").write_text('image,emotion,text\na,joy,"so\nb,rage,dark\nc,joy,"bright"\nd,rage,"one\nred, wide, big\n"\n')
    table = read_table(tmp_path / "a.csv", "emotion")
    assert table["image"] == ["b", "c", "d"] and table["text"][2] == "one\nred, wide, big\n"
    assert table.problems == ["a.csv, line 2 to 4: a quote is not closed; its line is lost, and the 2 after it are read on their own"]


def test_a_quote_without_end_in_a_large_file_costs_one_line_and_little_time(tmp_path):
    rows = [f"Cubism,p{i},awe,calm and wide {i},5" for i in range(20_000)]
    for i in range(0, 20_000, 500):
        rows[i] = f'Cubism,p{i},awe,"calm,5'
    (tmp_path / "rows.csv").write_text(HEADER + "\n".join(rows))
    started = time.process_time()
    table = read_rows(tmp_path / "rows.csv")
    assert len(table) == 20_000 - 40 and len(table.problems) == 40
    assert time.process_time() - started < 3


def test_missing_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("art_style,painting\n")
    with pytest.raises(UserError, match="rows.csv: no column emotion, utterance, repetition among art_style, painting"):
        read_rows(tmp_path / "rows.csv")


def test_objects_as_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"b": "x\\u2028y", "c": 5}\n\n{"c": null, "d": ["no text"]}\nnonsense\n[1]\n{"b": "\\ud800"}')
    table = read_table(tmp_path / "a.jsonl", "emotion")
    assert table.columns == {"b": ["x\u2028y", "", "?"], "c": ["5", "", ""], "d": ["", "", ""]} and table.lines == [1, 3, 6]
    assert table.problems == ["a.jsonl, line 4: not JSON", "a.jsonl, line 5: no object with names and values"]
    (tmp_path / "a.json").write_text('[{"b": 1}, 2]')
    assert read_table(tmp_path / "a.json", "emotion").problems == ["a.json, entry 2: no object with names and values"]
    for content, message in (('{"b": 1}', "expected a list"), ("[1,\n2", "line 2: not JSON"), ("[" * 10**5, "not JSON that can")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=f"a.json.*{message}"):
            read_table(tmp_path / "a.json", "emotion")


# Text

@pytest.mark.parametrize("text, cleaned", [
    ("The man's face -- it's “scary”!", "the man's face it is scary"),
    ("I can't say, won't say & don't CARE...", "i cannot say will not say & do not care"),
    ("He’d say 'fire', they're (all) gone;it’ll burn", "he would say fire they are (all) gone it will burn"),
    ("I should've gone—let's   look\nat\u2028blue/grey well-lit things", "i should have gone let us look at blue grey well lit things"),
    ("?!", ""),
])
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_words_are_treebank_tokens():
    assert words("the man's dogs' cannot (see) \"it\" o'clock & so") == [
        "the", "man", "'s", "dogs", "'", "can", "not", "(", "see", ")", '"', "it", '"', "o'clock", "&", "so"]
    assert words("i cannot and wanna go") == ["i", "can", "not", "and", "wan", "na", "go"]


# ArtEmis's files

@pytest.mark.parametrize("name, file", [("artemis_v1", "artemis_dataset_release_v0.csv"), ("artemis_v2", "Contrastive.csv")])
def test_missing_data_says_what_to_get(tmp_path, name, file):
    (tmp_path / "wikiart").mkdir()
    if name == "artemis_v2":
        shutil.copy(FIXTURES / "protocol" / "artemis_v1.csv", tmp_path / V1_FILE)
    with pytest.raises(UserError) as error:
        load_art(name, tmp_path)
    for part in (f"{file} is not in {tmp_path}", "https://www.artemisdataset.org", "https://github.com/cs-chan/ArtGAN",
                 "research use", "non-commercial", "wikiart/<art_style>/<painting>.jpg", "--data-root", "SEVLM_DATA", "--data toy"):
        assert part in str(error.value)


def test_missing_pictures_and_unknown_names(v1_folder):
    with pytest.raises(UserError, match="wikiart/ is not in"):
        load_art("artemis_v1", v1_folder)
    assert len(load_art("artemis_v1", v1_folder, pictures=False).texts) > 1000
    (v1_folder / "wikiart").mkdir()
    with pytest.raises(UserError, match=r"none of the [\d,]+ pictures .* --images names their folder"):
        load_art("artemis_v1", v1_folder)
    with pytest.raises(UserError, match="--images nowhere: there is no such folder"):
        load_art("artemis_v1", v1_folder, "nowhere")
    with pytest.raises(UserError, match="unknown data 'imagenet'; there are artemis_v1, artemis_v2 and toy, and files"):
        load_art("imagenet", v1_folder)
    (v1_folder / V1_FILE).write_text(HEADER + "Cubism,x,joy,calm and wide and deep,5\n")
    with pytest.raises(UserError, match="no row that can be used: .*line 2: unknown emotion 'joy'"):
        load_art("artemis_v1", v1_folder, pictures=False)


@pytest.fixture
def v1_folder(tmp_path):
    shutil.copy(FIXTURES / "protocol" / "artemis_v1.csv", tmp_path / V1_FILE)
    return tmp_path


def texts_of(art: Art, name: str) -> list[str]:
    return [art.texts[row] for row in art.rows_of(art.names.index(name))]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_preprocessed_file_is_used_as_it_is(v1_folder):
    said = [("x", "test", "the man 's\u2028eyes\nhere"), ("x", "test", "so"), ("x", "train", "no"), ("y", "tset", "no"), ("z", "train", "last")]
    write_csv(v1_folder / PREPROCESSED_FILE, [
        dict(art_style="Cubism", painting=painting, emotion="awe", utterance="RAW", repetition=5, split=split,
             utterance_spelled=text, tokens_len=3) for painting, split, text in said])
    (v1_folder / V1_FILE).write_text(HEADER + "Cubism,x,awe,one,5\nCubism,x,fear,two,5\nCubism,x,fear,three,5\nCubism,other,awe,four,5\n")
    art = load_art("artemis_v1", v1_folder, pictures=False)
    assert art.source == PREPROCESSED_FILE and art.dropped == 0
    assert texts_of(art, "Cubism/x") == ["the man 's\u2028eyes\nhere", "so"]
    assert texts_of(art, "Cubism/z") == ["last"], "line breaks have shifted the texts"
    assert [problem.split(": ")[1] for problem in art.problems] == [
        "Cubism/x is in train here, but in test before", "split is 'tset'; there are train, val, test, rest"]
    assert art.votes[0, EMOTIONS.index("fear")] == 2 and art.votes[0].sum() == 3  # of the raw file's annotations
    with pytest.raises(UserError, match="is of ArtEmis v1"):
        load_art("artemis_v2", v1_folder, pictures=False)


def test_the_authors_json(v1_folder):
    for split, file in JSON_FILES.items():
        item = {"emotions": ["awe", "fear"], "explanations": ["so\nwide", f"so dark\u2028{split}"], "image_name": f"Cubism/{split}.x.jpg",
                "origin_emotion_distribution": [0, .5, 0, 0, 0, 0, .5, 0, 0], "another": "key"}
        broken = {str(i): item | change for i, change in enumerate((
            {"emotions": ["joy", "awe"]}, {"image_name": 5}, {"explanations": ["one"]}, {"origin_emotion_distribution": [1]},
            {"explanations": [1, 2]}, {"emotions": [["awe"], "fear"]}))} | {"list": [1], "again": item}
        (v1_folder / file).write_text(json.dumps({"17": item} | (broken if split == "val" else {})))
    art = load_art("artemis_v1", v1_folder, pictures=False)
    assert art.names == ["Cubism/test.x", "Cubism/train.x", "Cubism/val.x"] and len(art.problems) == 8
    assert all(problem.startswith("artEmisX_val.json, id ") for problem in art.problems)
    [test] = art.paintings("test")
    assert test == 0 and texts_of(art, art.names[0]) == ["so\nwide", "so dark\u2028test"]
    assert [art.emotions[e] for e in art.emotion[art.rows("test")]] == ["awe", "fear"] and art.votes[0].tolist() == [0, 1, 0, 0, 0, 0, 1, 0, 0]
    (v1_folder / JSON_FILES["val"]).write_text("[]")
    with pytest.raises(UserError, match="artEmisX_val.json: expected an object"):
        load_art("artemis_v1", v1_folder, pictures=False)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_votes_come_back_from_their_shares(kind):
    """Half of the votes is exactly half, though float32 has put it a little above."""
    rng = np.random.default_rng(0)
    votes = rng.multinomial(rng.integers(1, 120, 500), np.full(9, 1 / 9))
    votes[0], votes[1] = [7, 7, 0, 0, 0, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0, 0, 0, 0]
    shares = (votes / votes.sum(1, keepdims=True)).astype(kind)
    found = whole_numbers(shares * (1 + 1e-7))
    common = np.gcd.reduce(votes, axis=1, keepdims=True)
    assert np.array_equal(found, votes // common)
    assert 2 * found[0].max() == found[0].sum()


def test_nothing_is_remembered_of_a_file_that_has_changed(v1_folder):
    first = load_art("artemis_v1", v1_folder, pictures=False)
    with open(v1_folder / V1_FILE, "a") as file:
        file.write("Cubism,a-new-one,awe,something quite new to be seen,5\n")
    assert len(load_art("artemis_v1", v1_folder, pictures=False).texts) == len(first.texts) + 1
    assert os.listdir(v1_folder) == [V1_FILE]


# Own data

def mine(folder: Path, rows: list[dict], suffix: str = ".csv") -> Path:
    """A file of one's own in each format, and its pictures."""
    path = folder / f"mine{suffix}"
    if suffix == ".csv":
        write_csv(path, rows)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    for row in rows:
        picture = folder / (row["image"].strip() or "x.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(picture)
    return path


ROWS = [dict(image=f"pictures/deep/{i}.png", emotion=emotion, explanation=f"It is so {emotion}, isn't it?", split=split, annotator="")
        for i in range(40) for emotion, split in [(("Quiet  joy", "awe", "Zest")[i % 3], ("train", "val", "test", "train")[i % 4])]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_own_data_of_each_format(tmp_path, suffix):
    art = load_art(str(mine(tmp_path, ROWS, suffix)))
    assert art.name == f"mine{suffix}" and art.problems == [] and None not in art.files
    assert art.emotions == ("awe", "quiet joy", "zest"), "ArtEmis's first, the others by alphabet"
    assert len(art.names) == 40 and texts_of(art, "pictures/deep/4.png") == ["it is so awe is not it"]
    assert np.bincount(art.split).tolist() == [20, 10, 10]
    assert art.notes == ["val has only 10 paintings: its scores mean little", "test has only 10 paintings: its scores mean little"]


def test_artemis_columns_and_images_elsewhere(tmp_path):
    rows = [dict(art_style="Cubism", painting=f"p.{i}", emotion=EMOTIONS[i % 2], utterance="red and wide", repetition=5) for i in range(40)]
    (tmp_path / "elsewhere" / "Cubism").mkdir(parents=True)
    for i in range(1, 40):
        Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "Cubism" / f"p.{i}.png")
    write_csv(tmp_path / "mine.csv", rows)
    art = load_art(str(tmp_path / "mine.csv"), images=tmp_path / "elsewhere")
    assert art.names[0] == "Cubism/p.0" and art.emotions == EMOTIONS[:2]
    assert art.files[0] is None and all(file.stem == name.split("/")[1] for file, name in zip(art.files[1:], art.names[1:]))
    with pytest.raises(UserError, match="none of the 40 pictures of mine.csv"):
        load_art(str(tmp_path / "mine.csv"))


def test_own_splits_follow_from_the_names_alone(tmp_path):
    def splits(rows: list[dict]) -> dict[str, str]:
        write_csv(tmp_path / "mine.csv", rows)
        art = load_art(str(tmp_path / "mine.csv"), pictures=False)
        return {name: SPLITS[split] for name, split in zip(art.names, art.split)}
    rows = [dict(image=f"{i}.png", emotion=f"e{i % 4}", explanation="red") for i in range(4000)]
    few, many = splits(rows[:400]), splits(rows[::-1] + rows[:50])
    assert few.items() <= many.items(), "a picture has moved"
    shares = Counter(many.values())
    assert [shares[split] / 4000 for split in SPLITS[:3]] == pytest.approx([.85, .05, .1], abs=.015)
    for count in (3, 5, 20):
        assert set(splits(rows[:4 * count:4] + rows[1:4 * count:4])) and set(splits(rows[:4 * count]).values()) == {"train", "val", "test"}


def test_a_split_of_ones_own_is_completed(tmp_path):
    rows = [row | {"split": "" if i % 5 == 0 else "train"} for i, row in enumerate(ROWS * 2)]
    art = load_art(str(mine(tmp_path, rows)))
    notes = "\n".join(art.notes)
    assert "8 pictures have no split: it follows from their names" in notes and min(np.bincount(art.split)[:3]) > 0
    art = load_art(str(mine(tmp_path, [row | {"split": "test"} for row in ROWS])))
    assert set(art.split) == {SPLITS.index("test")}, "for scoring, none is needed to train"


def test_annotators_vote_once(tmp_path):
    rows = [dict(image="a.png", emotion=emotion, explanation=f"{emotion} {n}", annotator=who) for n, (emotion, who) in enumerate(
        [("joy", "x"), ("joy", "x"), ("rage", "x"), ("joy", "y"), ("rage", ""), ("rage", "")])]
    art = load_art(str(mine(tmp_path, rows)), pictures=False)
    assert art.votes.tolist() == [[2, 3]] and len(art.texts) == 6


@pytest.mark.parametrize("change, problem", [
    ({"image": " "}, "line 5: blank image"), ({"emotion": ""}, "line 5: blank emotion"), ({"explanation": "?!"}, "line 5: blank explanation"),
    ({"emotion": "zset"}, "line 5: the emotion 'zset' occurs only here"), ({"split": "dev"}, "line 5: split is 'dev'; there are train, val, test, rest"),
    ({"image": "pictures/deep/0.png"}, "line 5: pictures/deep/0.png is in train here, but in test before"),
])
def test_rows_of_ones_own_that_cannot_be_used(tmp_path, change, problem):
    rows = [row | {"split": "train" if i else "test"} for i, row in enumerate(ROWS)]
    rows[3] |= change
    art = load_art(str(mine(tmp_path, rows)))
    assert art.problems == [f"mine.csv, {problem}"] and len(art.texts) == 39


@pytest.mark.parametrize("content, message", [
    ("a;b\n1;2\n", "mine.csv needs columns image or painting, emotion, explanation or utterance; it has a;b"),
    ("image,emotion,explanation\n", "mine.csv has 0 emotions; there must be 2 to 40"),
    ("image,emotion,explanation\na.png,joy,one\na.png,joy,two\na.png,,x\n",
     r"mine.csv has 1 emotions \(joy\); .*1 rows cannot be used: mine.csv, line 4: blank emotion"),
    ("image,emotion,explanation\n" + "".join(f"a.png,e{i},x\nb.png,e{i},x\n" for i in range(41)),
     r"mine.csv has 41 emotions \(e0, e1, e10, ...\)"),
    ("", "it has none"), ("PK\x03\x04" + "x," * 100_000, r"it has PK\x03\x04x, x, $"), ("x" * 200_000, "line 1: field larger"), (None, "there is no file .*mine.csv"),
])
def test_files_of_ones_own_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_art(str(tmp_path / "mine.csv"))


def test_pictures_that_are_missing_are_named(tmp_path):
    path = mine(tmp_path, ROWS)
    (tmp_path / ROWS[7]["image"]).unlink()
    shown = subprocess.run([sys.executable, ROOT / "data.py", "--data", path, "--small", "--show"], check=True,
                           capture_output=True, text=True)
    assert re.search(r"pictures not found +1\n    pictures/deep/7.png\n", shown.stdout)
    assert "remarks                     2\n    val has only 10 paintings" in shown.stdout
    assert "quiet joy" in shown.stdout and "wrong image" in shown.stdout


# Pictures

def picture(image: Image.Image, file_format: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def grey(value: float, kind) -> Image.Image:
    return Image.fromarray(np.full((40, 60), value, kind))


@pytest.mark.parametrize("make, corner", [
    (lambda: picture(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    (lambda: picture(Image.new("P", (60, 40), 3)), (3, 3, 3)),  # Pillow's default palette is grey
    (lambda: picture(Image.new("RGBA", (60, 40), (9, 9, 9, 0))), (255, 255, 255)),
    (lambda: picture(Image.new("LA", (60, 40), (0, 128))), (127, 127, 127)),
    (lambda: picture(Image.new("P", (60, 40), 0), transparency=0), (255, 255, 255)),
    (lambda: picture(Image.new("1", (60, 40), 1)), (255, 255, 255)),
    (lambda: picture(Image.new("L", (60, 40), 77)), (77, 77, 77)),
    (lambda: picture(grey(32896, np.uint16)), (128, 128, 128)),
    (lambda: picture(grey(200, np.uint16)), (0, 0, 0)),  # dark, and stays so
    (lambda: picture(grey(.5, np.float32), "TIFF"), (127, 127, 127)),
    (lambda: picture(grey(np.nan, np.float32), "TIFF"), (0, 0, 0)),
    (lambda: picture(grey(200, np.float32), "TIFF"), (200, 200, 200)),
    (lambda: picture(grey(2**30, np.int32), "TIFF"), (127, 127, 127)),
    (lambda: picture(grey(32896, np.int32), "TIFF"), (128, 128, 128)),
    (lambda: picture(grey(100, np.int32), "TIFF"), (100, 100, 100)),
])
def test_pictures_of_every_mode_keep_their_look(make, corner):
    image = open_picture(make(), 16)
    assert image.mode == "RGB" and image.size == (60, 40)
    assert np.abs(np.array(image.getpixel((2, 2))) - corner).max() <= 3


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 60, 8))  # the top edge becomes the right one
    upright = open_picture(picture(image, "JPEG", exif=exif, quality=95), 40)
    assert upright.size == (40, 60)
    assert upright.getpixel((38, 30))[0] < 60 and upright.getpixel((4, 30))[0] > 200


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("source, problem", [
    (lambda: io.BytesIO(b"no picture at all"), "no picture, or of another kind than JPEG"), (lambda: io.BytesIO(b""), "no picture, or of another kind than JPEG"),
    (lambda: io.BytesIO(picture(Image.new("RGB", (120, 80), "red"), "JPEG").getvalue()[:500]), "OSError"),
    (lambda: "/nowhere/x.jpg", "no such file"), (lambda: io.BytesIO(POSTSCRIPT), "no picture, or of another kind than JPEG"),
    (lambda: picture(Image.new("L", (60, 40)), "ICO"), "no picture, or of another kind than JPEG"),
    (lambda: picture(Image.new("1", (8000, 5001))), "8000 x 5001 pixels are too many"),
])
def test_bad_pictures(source, problem):
    with pytest.raises(BadPicture, match=problem):
        open_picture(source(), 64)


def test_a_thread_of_pixels_does_not_become_a_sheet():
    image = open_picture(picture(Image.new("1", (MOST_PIXELS // 10, 1))), 64)
    assert squared(image, 64, crop=False, resample=Image.Resampling.BICUBIC).shape == (3, 64, 64)
    with pytest.raises(BadPicture, match="pixels are too many"):
        squared(image, 64, crop=True, resample=Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (32, 32), (33, 32), (31, 77), (500, 20)])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("authors", [False, True])
def test_pixels_are_those_of_torchvisions_transforms(size, crop, authors):
    """The authors' are resized bilinearly, torchvision's default."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    how = [v2.InterpolationMode.BILINEAR] if authors else [v2.InterpolationMode.BICUBIC]
    sizing = [v2.Resize(32, *how), v2.CenterCrop(32)] if crop else [v2.Resize((32, 32), *how)]
    image = Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = load_pixels(picture(image), Config(image_size=32, crop=crop, authors_pixels=authors))
    assert torch.equal(ours, v2.Compose([*sizing, v2.PILToTensor()])(image))


def test_pixels_are_normalised_as_clip_or_the_authors_do():
    images = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), Config(image_size=32))
    assert images[0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in ((.48145466, .26862954), (.4578275, .26130258),
                                                                               (.40821073, .27577711))], rel=1e-6)
    other = normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), Config(image_size=32, authors_pixels=True))
    assert other[0, 0, 0, 0].item() == pytest.approx(-.485 / .229, rel=1e-6)


def test_names_in_the_wild(tmp_path):
    wanted = ["Cubism/zo\u00eb_a", "Cubism/zo\u00eb_b", "Cubism/zo\u00eb_c", "Cubism/jos\u00e3\u00a9_d", "Cubism/jos\u00e3\u00a9_e",
              "Cubism/\u00e5\u0082ucja_f", "Cubism/x.y(1),'z'_g", "Cubism/\u4e2d_h"]
    on_disk = ["zo\u00eb_a.jpg", unicodedata.normalize("NFD", "zo\u00eb_b.jpg"), "zo#U00eb_c.jpg", "jos\u00e9_d.jpg",
               "jos#U00e3#U00a9_e.jpg", "\u0142ucja_f.jpg", "x.y(1),'z'_g.jpg", "\\u4e2d_h.jpg"]
    (tmp_path / "Cubism").mkdir()
    for name in [*on_disk, "notes.txt"]:
        (tmp_path / "Cubism" / name).touch()
    (tmp_path / "top.PNG").touch()
    found = index_pictures(tmp_path)
    assert [[path.name for path in found[spelling(name)]] for name in wanted] == [[name] for name in on_disk]
    assert found["top"] == [tmp_path / "top.PNG"] and "Cubism/notes" not in found and "Cubism/missing" not in found


def test_of_two_files_of_one_name_the_choice_is_fixed_and_said(tmp_path):
    rows = [dict(art_style="Cubism", painting=name, emotion=emotion, utterance="red") for name in ("both", "zo\u00eb") for emotion in ("awe", "fear")]
    write_csv(tmp_path / "mine.csv", rows)
    (tmp_path / "Cubism").mkdir()
    for name in ("both.png", "both.jpg", "zo\u00eb.jpg", "zoe\u0308.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "Cubism" / name)
    art = load_art(str(tmp_path / "mine.csv"))
    assert [file.name for file in art.files] == ["both.jpg", "zoe\u0308.jpg"]
    assert "Cubism/both has 2 files: both.jpg is used" in art.notes


def test_picture_files_of_names_folders_and_patterns(tmp_path):
    for name in ("b.png", "a.JPG", "c/d.webp", "c/no.txt", "odd name [1].gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = picture_files([str(tmp_path / "b.png"), str(tmp_path), str(tmp_path / "*.png"), str(tmp_path / "odd name [1].gif")])
    assert [path.name for path in found] == ["b.png", "a.JPG", "d.webp", "odd name [1].gif"]
    for argument in (tmp_path / "nothing*.png", tmp_path / "c" / "no"):
        with pytest.raises(UserError, match="no such file"):
            picture_files([str(argument)])


# Stores

@pytest.fixture
def small_model(toy) -> SEVLM:
    torch.manual_seed(0)
    config = Config.toy(image_size=32, width=32, tower_width=32, tower_layers=1, layers=1, heads=2, tower_heads=2, train_tower=False)
    return initialise(SEVLM(config, find_tokenizer(toy, ""), find_lexicon(toy, None))).eval()


@pytest.fixture
def filled(tmp_path, toy, small_model) -> Store:
    store = open_store(toy, small_model, tmp_path)
    assert fill_store(store, toy, small_model) == {}
    return store


def test_stored_features_equal_direct_encoding(tmp_path, toy, small_model, filled):
    paintings = np.array([3, 0, 50])
    pixels = torch.stack([load_pixels(toy.files[p], small_model.config) for p in paintings])
    with torch.no_grad():
        direct = small_model.encode_image(pixels)
    stored = filled.get(paintings)
    assert stored.dtype == np.float16 and np.allclose(stored, direct, rtol=2e-3, atol=2e-3)
    small_model.config.train_tower = True
    pixel_store = open_store(toy, small_model, tmp_path)
    assert pixel_store.path != filled.path and fill_store(pixel_store, toy, small_model, workers=1) == {}
    assert np.array_equal(pixel_store.get(paintings), pixels.numpy())


def test_a_store_goes_to_workers_as_its_path(filled):
    sent = ForkingPickler.dumps(filled)  # what a worker process is sent
    again = ForkingPickler.loads(sent)
    assert len(sent) < 20_000 and again.done.all() and np.array_equal(again.get([5, 2]), filled.get([5, 2]))


@pytest.mark.parametrize("moment", range(5))
def test_an_interrupted_pass_goes_on_and_never_claims_what_it_lacks(tmp_path, toy, small_model, filled, monkeypatch, moment):
    """Stopped at any flush: before entries are written, before they are on the disk, before they are marked, after."""
    store = open_store(toy, small_model, tmp_path / "again")
    real, flushes = os.fsync, []

    def fsync(file):
        flushes.append(file)
        if len(flushes) == moment + 1:
            raise KeyboardInterrupt
        real(file)
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            fill_store(store, toy, small_model)
    assert store.done.sum() == [0, 0, BATCH, BATCH, BATCH][moment]
    again = open_store(toy, small_model, tmp_path / "again")
    assert fill_store(again, toy, small_model) == {} and again.done.all()
    assert np.array_equal(again.get(range(60)), filled.get(range(60)))


def test_an_entry_half_replaced_is_nobodys(tmp_path, monkeypatch):
    def store(stamp: str) -> Store:
        return Store(tmp_path / "x.store", [stamp] * 2, (4,), np.uint8, "numbers")
    old, new = store("old"), store("new")
    old.put([0, 1], np.ones((2, 4)))
    flushes = iter([None, KeyboardInterrupt])

    def fsync(_):
        if stop := next(flushes):
            raise stop
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            new.put([1], np.full((1, 4), 2))
    assert old.done.tolist() == [True, False] and new.done.tolist() == [False, False]


def test_parts_are_cut_by_index_whenever_each_begins(tmp_path, toy, small_model, filled):
    """A process that asks after another has begun must not be given other paintings."""
    store = open_store(toy, small_model, tmp_path / "parts")
    fill_store(store, toy, small_model, paintings=np.arange(10), part=1, parts=3)
    assert np.flatnonzero(store.done).tolist() == [1, 4, 7]
    for part in range(3):
        fill_store(store, toy, small_model, part=part, parts=3)
    assert store.done.all() and np.array_equal(store.get(range(60)), filled.get(range(60)))


FILLING = """
import sys, numpy as np
from support.store import Store
store = Store(sys.argv[1], [str(i) for i in range(200)], (7, 3), np.uint16, "numbers")
for index in store.missing(int(sys.argv[2]), 2):
    store.put([index], np.full((1, 7, 3), index))
"""


def test_two_processes_fill_one_file(tmp_path):
    store = Store(tmp_path / "x.store", [str(i) for i in range(200)], (7, 3), np.uint16, "numbers")
    parts = [subprocess.Popen([sys.executable, "-c", FILLING, store.path, str(part)], cwd=ROOT) for part in range(2)]
    assert [part.wait(60) for part in parts] == [0, 0]
    assert store.done.all() and np.array_equal(store.get(range(200))[:, 6, 2], np.arange(200))


def test_an_entry_is_as_good_as_what_it_was_made_from(tmp_path, toy, small_model, filled):
    """A mended picture, other --images or another tower are encoded anew."""
    toy.files[3] = tmp_path / "mended.jpg"
    shutil.copy(toy.files[4], toy.files[3])
    changed = open_store(toy, small_model, tmp_path)
    assert changed.path == filled.path and changed.missing().tolist() == [3]
    fill_store(changed, toy, small_model)
    assert np.array_equal(*changed.get([3, 4]))
    os.utime(toy.files[3], ns=(0, 1))
    assert open_store(toy, small_model, tmp_path).missing().tolist() == [3]
    with torch.no_grad():
        small_model.tower.class_embedding += 1e-3
    other = open_store(toy, small_model, tmp_path)
    assert other.path != filled.path and not other.done.any() and filled.done.sum() == 59


def test_a_file_that_is_no_store_of_this_is_made_anew(tmp_path, toy, small_model, filled):
    filled.path.write_bytes(b"damaged")
    assert not open_store(toy, small_model, tmp_path).done.any()
    store = open_store(toy, small_model, tmp_path)
    filled.path.write_bytes(bytes(filled.path.stat().st_size))
    assert not store.done.any()
    with open(filled.path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match="has been cut short; delete it"):
        store.get([40])


@pytest.mark.parametrize("system", ["posix_fallocate", "writing"])
def test_a_store_takes_its_space_at_the_start_or_says_what_lacks(tmp_path, monkeypatch, system):
    if system == "writing":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    store = Store(tmp_path / "x.store", ["a", "b"], (500, 1000), np.float16, "features")
    assert store.path.stat().st_blocks * 512 >= 2_000_000, "the file is hollow"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store_module, "reserve", full)
    with pytest.raises(UserError, match=r"y.store needs 0.00 GB for features, and .* GB are free there. Make room, or .*--cache"):
        Store(tmp_path / "y.store", ["a", "b"], (500, 1000), np.float16, "features")
    assert os.listdir(tmp_path) == ["x.store"]


def test_a_store_reads_each_entry_once_and_in_the_order_of_the_disk(tmp_path, monkeypatch):
    store = Store(tmp_path / "x.store", [str(i) for i in range(50)], (100,), np.int32, "numbers")
    store.put(range(50), np.arange(50)[:, None].repeat(100, 1))
    reads = []

    class Spy(io.FileIO):
        def readinto(self, buffer):
            reads.append((self.tell(), len(memoryview(buffer).cast("B"))))
            return super().readinto(buffer)
    monkeypatch.setattr(store_module, "open", lambda path, mode, buffering: Spy(path, mode), raising=False)
    assert store.get([40, 3, 17, 3])[:, 0].tolist() == [40, 3, 17, 3]
    assert reads == sorted(reads) and {size for _, size in reads} == {400}


def test_pictures_that_cannot_be_used_are_named(tmp_path, toy, small_model):
    (tmp_path / "broken.jpg").write_bytes(toy.files[1].read_bytes()[:400])
    toy.files[1], toy.files[2] = tmp_path / "broken.jpg", None
    store = open_store(toy, small_model, tmp_path)
    for _ in range(2):  # and again at the next start
        problems = fill_store(store, toy, small_model)
        assert {p: problem.split(":")[0] for p, problem in problems.items()} == {1: "OSError", 2: "no such file"}
    assert np.flatnonzero(~store.done).tolist() == [1, 2]
    indices, pictures = PictureBatches(store, np.arange(8), 5)[0]
    assert indices.tolist() == [0, 3, 4, 5, 6] and pictures.shape == (5, 16, 32)
    training = Examples(toy, load_captions(toy, small_model), small_model.text, None, store, store.done, seed=0)
    assert not {1, 2} & set(training.paintings)


# Captions

def test_ids_labels_and_segments_equal_the_authors(gpt2_tokenizer):
    expected = json.loads((FIXTURES / "sentences" / "dataset_tokens.json").read_text())
    text = Text(gpt2_tokenizer, EMOTIONS)
    assert (text.end, text.pad, text.emotion, text.explanation, text.because) == (50256, 50257, 50259, 50260, 780)
    for record in expected["train"]:
        item = expected["data"][str(record["image_id"])]
        candidates = text.encode(item["emotions"], item["explanations"], 30)
        segments, labels = text.segments(candidates), text.labels(candidates)
        for ids, label, segment in zip(record["input_ids"], record["labels"], record["segment_ids"], strict=True):
            place = candidates.tolist().index(ids)
            assert labels[place].tolist() == label and segments[place].tolist() == segment
    for record in expected["eval"]:
        assert record["input_ids"] == text.prompt and set(record["segment_ids"]) == {text.emotion}


def test_round_trip_on_the_real_vocabulary(gpt2_tokenizer):
    text = Text(gpt2_tokenizer, EMOTIONS)
    for sentence in ("the café's naïve blue-grey sky", "emoji 😍 & 中文", "it is 1.5 times \"larger\"", "a  double  blank"):
        ids = text.encode(["something else"], [sentence], 40)
        assert text.decode(ids[0].tolist()) == f"the emotion is something else because {sentence}"


def test_captions(toy, small_model):
    text, captions = small_model.text, load_captions(toy, small_model)
    for row in (0, 7, len(toy.texts) - 1):
        ids = captions.ids[row].tolist()
        sentence = f"the emotion is {EMOTIONS[toy.emotion[row]]} because {toy.texts[row]}"
        assert captions.cut[row] or text.decode(ids) == sentence
        assert captions.predicted[row] == sum(i != text.pad for i in ids) - 1
        found = small_model.word_vad.rows(torch.tensor([ids]))[0]
        assert np.array_equal(captions.vad_rows[row], found)
        start = ids.index(text.because)
        assert captions.known[row] == sum(small_model.lexicon.values[found[at]].any() for at in range(start, len(ids)))
    small_model.config.length = 12
    shorter = load_captions(toy, small_model)
    assert shorter.ids.shape[1] == 12 and shorter.cut.mean() > captions.cut.mean()


def test_what_is_to_be_known_is_what_the_loss_counts(toy, small_model, examples):
    """Shares of the VAD loss follow Captions.known; the model counts for itself."""
    batch = examples().epoch(0, 16)[0]
    inputs = batch.inputs
    explanation = small_model.in_explanation(inputs["ids"], inputs["segments"])
    known = ((inputs["vad"] != 0).any(-1) & explanation)[:, 1:].sum(1)
    rows = examples().epoch(0, 16).pairs[examples().epoch(0, 16).order[:16]].ravel()
    assert np.array_equal(load_captions(toy, small_model).known[rows], known)


# Epochs and negatives

@pytest.fixture(scope="session")
def store_of_all(tmp_path_factory):
    """Entries for every painting of the toy, whatever they hold."""
    store = Store(tmp_path_factory.mktemp("store") / "x.store", [str(i) for i in range(60)], (4, 8), np.float16, "features")
    store.put(range(60), np.arange(60)[:, None, None].repeat(4, 1).repeat(8, 2))
    return store


@pytest.fixture
def examples(toy, small_model, store_of_all) -> Callable[..., Examples]:
    captions = load_captions(toy, small_model)

    def make(**options) -> Examples:
        return Examples(toy, captions, small_model.text, small_model.lexicon.values, store_of_all, store_of_all.done,
                        **dict(seed=3, trim=False) | options)
    return make


def met(epoch, start=0) -> list[tuple]:
    """Painting and sentences of everything that has weight."""
    return [(int(p), *batch.inputs["ids"][2 * i:2 * i + 2].flatten().tolist())
            for batch in map(epoch.__getitem__, range(start, len(epoch))) if batch.shares["contrastive"] > 0
            for i, p in enumerate(batch.paintings)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_an_epoch_visits_every_painting_once(examples, parts, accumulate):
    training = examples()
    for number in (0, 7):
        whole = met(training.epoch(number, batch=16))
        assert sorted(p for p, *_ in whole) == sorted(training.paintings.tolist())
        split = [met(training.epoch(number, 16, part, parts, accumulate)) for part in range(parts)]
        assert sorted(itertools.chain(*split)) == sorted(whole)
        steps = {len(training.epoch(number, 16, part, parts, accumulate)) for part in range(parts)}
        assert steps == {accumulate * -(-len(training) // 16)}, "every process takes part in every step"


def test_a_batch_has_its_paintings_own_pictures(examples):
    batch = examples().epoch(1, 16)[1]
    assert batch.pictures.dtype == torch.float16 and batch.pictures[:, 0, 0].tolist() == batch.paintings.tolist()
    assert batch.inputs["vad"].shape == (32, 30, 3) and batch.inputs["vad"].any()
    assert "vad" not in examples_without_vad(examples()).epoch(1, 16)[1].inputs


def examples_without_vad(training: Examples) -> Examples:
    training.values = None
    return training


def test_resuming_anywhere_continues_the_same_epoch(examples):
    whole = met(examples().epoch(4, batch=8))
    for start in range(len(examples().epoch(4, batch=8))):
        assert whole[8 * start:] == met(examples().epoch(4, batch=8), start)


def test_seeds_and_epochs_differ(examples):
    first = met(examples().epoch(0, 16))
    assert met(examples(seed=4).epoch(0, 16)) != first != met(examples().epoch(1, 16))
    assert first == met(examples().epoch(0, 16))


def test_the_fingerprint_is_that_of_the_paintings(examples):
    assert examples().fingerprint == examples(seed=9).fingerprint != examples(drop_single_emotion=True).fingerprint


def test_all_annotations_get_their_turn_and_pairs_differ_in_emotion(toy, examples):
    training = examples()
    turns = [Counter() for _ in training.paintings]
    for epoch in range(training.count.max()):
        _, pairs, _ = training.draw(epoch)
        for i, (first, second) in enumerate(pairs):
            rows = toy.rows_of(training.paintings[i])
            turns[i][first] += 1
            assert first in rows and second in rows and (first != second or len(rows) == 1)
            several = len(set(toy.emotion[list(rows)])) > 1
            assert (toy.emotion[first] != toy.emotion[second]) == several
    assert all(len(turn) == count for turn, count in zip(turns, training.count, strict=True))


def test_single_emotion_paintings_stay_unless_dropped(toy, examples):
    single = [p for p in toy.paintings("train") if len(set(toy.emotion[list(toy.rows_of(p))])) == 1]
    assert single, "the toy has none: the test has lost its point"
    assert set(single) <= set(examples().paintings)
    assert not set(single) & set(examples(drop_single_emotion=True).paintings)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_negatives_are_what_they_claim(examples, parts):
    training, missing, sentences = examples(), 0, 0
    for part in range(parts):
        epoch = training.epoch(2, 16, part, parts)
        for index in range(len(epoch)):
            batch = epoch[index]
            inputs, n = batch.inputs, 2 * len(batch.paintings)
            text = [training.text.decode(ids.tolist()) for ids in inputs["ids"]]
            emotion = [sentence.removeprefix("the emotion is ").split(" because")[0] for sentence in text]
            for i in range(n):
                wrong_emotion, wrong_image = inputs["wrong_emotion"][i].item(), inputs["wrong_image"][i].item()
                missing, sentences = missing + (wrong_emotion < 0), sentences + 1
                if wrong_emotion >= 0:
                    assert emotion[wrong_emotion] != emotion[i]
                    if emotion[i ^ 1] != emotion[i]:
                        assert wrong_emotion == i ^ 1
                    else:
                        assert wrong_emotion // 2 != i // 2
                if n > 2:
                    assert wrong_image >= 0 and batch.paintings[wrong_image // 2] != batch.paintings[i // 2]
    assert missing < sentences / 5, "of few sentences does the whole group share the emotion"


def test_parts_have_the_same_negatives_as_the_whole(examples):
    """What makes gradients equal for any number of processes: the same texts contrast with the same texts."""
    training = examples()

    def contrasts(epochs):
        found = []
        for epoch in epochs:
            for batch in map(epoch.__getitem__, range(len(epoch))):
                ids, inputs = batch.inputs["ids"].tolist(), batch.inputs
                found += [(ids[i], inputs[kind][i].item() >= 0 and ids[inputs[kind][i]]) for kind in ("wrong_emotion", "wrong_image")
                          for i in range(len(ids)) if batch.shares["contrastive"] > 0]
        return sorted(found, key=str)
    whole = contrasts([training.epoch(1, 16)])
    for parts, accumulate in ((2, 1), (1, 2), (2, 2)):
        assert contrasts([training.epoch(1, 16, part, parts, accumulate) for part in range(parts)]) == whole


def test_shares_add_up(examples):
    training = examples()
    for parts, accumulate in ((1, 1), (3, 1), (2, 2), (5, 1)):
        epochs = [training.epoch(1, 16, part, parts, accumulate) for part in range(parts)]
        for step in range(len(epochs[0]) // accumulate):
            batches = [epoch[step * accumulate + turn] for epoch in epochs for turn in range(accumulate)]
            assert all(len(batch.paintings) for batch in batches)
            for name in ("language", "vad", "contrastive"):
                assert sum(batch.shares[name] for batch in batches) == pytest.approx(1)


def test_a_lonely_painting_has_no_negatives():
    wrong_emotion, wrong_image = negatives(np.array([3, 3]), np.array([0]), np.zeros((1, 2, 2)))
    assert wrong_emotion.tolist() == wrong_image.tolist() == [-1, -1]
    group = np.repeat(np.arange(3), GROUP)
    _, wrong_image = negatives(np.zeros(6 * GROUP, int), group, np.random.default_rng(0).random((3 * GROUP, 2, 2)))
    assert (wrong_image // 2 // GROUP == np.arange(6 * GROUP) // 2 // GROUP).all()


def test_workers_change_nothing(examples):
    training = examples()
    alone, helped = (list(data.loader(training.epoch(0, 16), workers, torch.device("cpu"), start=1)) for workers in (0, 2))
    assert len(alone) == len(helped) == len(training.epoch(0, 16)) - 1
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.pictures, b.pictures) and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


# The toy world

def test_the_toy_is_the_same_everywhere():
    first, again = painter.painting(17), painter.painting(17)
    assert np.array_equal(first.image, again.image) and vars(first) | {"image": 0} == vars(again) | {"image": 0}
    assert painter.painting(18).name != first.name


def test_the_toy_looks_like_artemis(toy):
    rows = read_rows(toy.folder / V1_FILE)
    assert rows.problems == [] and len(set(rows["key"])) == 60 and set(Counter(rows["key"]).values()) == {5, 6, 7}
    assert toy.emotions == EMOTIONS == painter.EMOTIONS
    assert all(file and file.parent.parent.name == "wikiart" for file in toy.files)
    lexicon = read_lexicon(toy.folder / "lexicon.txt")
    vocabulary = {word for text in toy.texts for word in words(text)}
    assert len(vocabulary) > 250 and sum(bool(lexicon.lemma(word)) for word in vocabulary) > 100
    assert Text(find_tokenizer(toy, ""), EMOTIONS).size <= 1010


def test_best_accuracy_is_what_knowing_the_mood_gives(toy):
    """Recomputed from the votes of the CSV and the likeliest emotion of each painting."""
    likeliest = {f"{one.style}/{one.name}": one.likeliest for one in map(painter.painting, range(60))}
    for split in ("train", "test"):
        target = {toy.names[p]: toy.votes[p].argmax() for p in np.flatnonzero(toy.split == SPLITS.index(split))
                  if toy.votes[p].max() > toy.votes[p].sum() / 2}
        share = np.mean([likeliest[name] == EMOTIONS[emotion] for name, emotion in target.items()])
        assert best_accuracy(toy, split) == pytest.approx(share) and 0.5 < share <= 1
    assert best_accuracy(SimpleNamespace(name="artemis_v1"), "test") is None


def test_annotators_say_what_is_there_and_how_they_feel():
    grammar = painter.grammar()
    everyone = [painter.painting(number) for number in range(40)]
    assert len({word for one in everyone for _, text in one.annotations for word in words(clean(text))}) > 250
    for one in everyone:
        palette, subject = one.name.split("_")[1].split("-")[:2]
        for emotion, text in one.annotations:
            felt = [choice for part in ("adj", "feel", "gives", "like", "memory", "story") for choice in grammar[f"{part}.{emotion}"]]
            there = [choice for rule in (f"thing.{subject}", f"color.{palette}") for choice in grammar[rule]]
            assert any(choice in text.lower() for choice in felt) and any(choice in text.lower() for choice in there), text


def test_the_toy_is_painted_anew_when_its_rules_change_and_only_where_it_owns_the_folder(tmp_path, toy_root, monkeypatch, capsys):
    folder = tmp_path / "toy-60"
    shutil.copytree(toy_root / "toy-60", folder)
    marked = folder / "wikiart" / "mark"
    marked.touch()
    painter.paint_toy(folder, 60)
    assert marked.exists() and capsys.readouterr().out == "", "painted though nothing has changed"
    monkeypatch.setattr(painter, "fill", lambda folder, count, key: (folder.mkdir(), (folder / "new").touch()))
    changed = tmp_path / "grammar.txt"
    changed.write_text(painter.GRAMMAR.read_text() + "# one more word\n")
    for name, value in (("GRAMMAR", changed), ("LEXICON", changed), ("TOY_VERSION", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(painter, name, value)
            painter.paint_toy(folder, 60)
        assert os.listdir(folder) == ["new"]
        shutil.rmtree(folder)
        shutil.copytree(toy_root / "toy-60", folder)
    about = json.loads((folder / "toy.json").read_text())
    for content in (None, "[]", '{"version": 1}', "{"):
        (folder / "toy.json").unlink() if content is None else (folder / "toy.json").write_text(content)
        with pytest.raises(UserError, match="is no toy world and is not painted over|toy.json, line 1: not JSON"):
            load_art("toy", tmp_path, toy_paintings=60)
        assert (folder / V1_FILE).is_file()
    del about["key"]
    (folder / "toy.json").write_text(json.dumps(about))
    painter.paint_toy(folder, 60)
    assert os.listdir(folder) == ["new"], "a world of an earlier version is ours too"
    with pytest.raises(UserError, match="--toy-paintings 5: at least 20"):
        painter.paint_toy(tmp_path / "few", 5)


PAINTING = """
import sys
from pathlib import Path
from support.program import run_program
from toy.painter import paint_toy
run_program(lambda: paint_toy(Path(sys.argv[1]), 5000))
"""


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_ctrl_c_while_painting_leaves_nothing_behind(tmp_path):
    program = subprocess.Popen([sys.executable, "-c", PAINTING, tmp_path / "data" / "toy-5000"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(.05)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said, error = program.communicate(timeout=60)
    assert said.startswith("Painting 5,000 pictures") and error == "" and program.returncode == 130
    assert os.listdir(tmp_path) == []


# Lexicon, tokenizer, program

def test_a_data_set_brings_its_lexicon_or_says_so(tmp_path, toy):
    bare = Art("artemis_v1", tmp_path, "", EMOTIONS, [], *[np.zeros(0)] * 4, [], [])
    with pytest.raises(UserError, match="no VAD lexicon in .*name it with --lexicon; .*without VAD: --no-vad-input --no-vad-head"):
        find_lexicon(bare, None)
    assert find_lexicon(bare, None, required=False) is None, "never our small list unasked"
    shutil.copy(toy.folder / "lexicon.txt", tmp_path / "NRC-VAD-Lexicon-v2.1.txt")
    assert find_lexicon(bare, None).rows == find_lexicon(toy, None).rows
    assert find_lexicon(bare, toy.folder / "lexicon.txt").rows


def test_a_tokenizer_of_the_datas_own_words_is_trained_anew_when_they_change(toy):
    first = find_tokenizer(toy, "").to_str()
    assert find_tokenizer(toy, "").to_str() == first
    toy.texts = [text.replace("sea", "fjord") for text in toy.texts]
    changed = find_tokenizer(toy, "")
    assert changed.to_str() != first and changed.token_to_id("Ġfjord") is not None


def test_program(toy_root):
    run = subprocess.run([sys.executable, ROOT / "data.py", "--data-root", toy_root, "--toy-paintings", "60", "--show", "2"],
                         capture_output=True, text=True, check=True, env={**os.environ, "SEVLM_DATA": "nowhere"})
    for part in ("explanations of 60 paintings", "best ACC", "something else", "lexicon coverage", "cut at 30 tokens",
                 "pictures not found          0", "explanation   "):
        assert part in run.stdout
    assert len(re.findall(r"<\|endoftext\|> +emotion +␣the", run.stdout)) == 2
    assert len(re.findall(r"^(other sentence|wrong emotion|wrong image) ", run.stdout, re.MULTILINE)) == 6
    assert max(map(len, run.stdout.splitlines())) <= 100


def test_the_programs_negatives_are_the_ones_trained_on(toy, small_model):
    """What --show prints for a painting's first sentence, found again in that painting's batch."""
    captions = load_captions(toy, small_model)
    shown = " ".join(" ".join(data.show(toy, small_model, captions, 1)).split())
    epoch = Examples(toy, captions, small_model.text, None, None, np.ones(60, bool), seed=0).epoch(0, BATCH)
    _, own, group = epoch.cut(0)
    inputs = epoch.sentences(own, group)
    wrong_image = small_model.text.decode(inputs["ids"][inputs["wrong_image"][0]].tolist())
    assert f"wrong image {wrong_image} (of " in shown and f"other sentence {small_model.text.decode(inputs['ids'][1].tolist())}" in shown

"""data.py: bad rows and pictures, every source of annotations, captions, epochs and negatives, stores, the toy world."""
import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image

import data
from data import (
    GROUP,
    BadPicture,
    Examples,
    OnTheFly,
    PictureBatches,
    Store,
    clean,
    find_pictures,
    load_art,
    load_captions,
    load_pixels,
    negatives,
    normalise,
    open_picture,
    read_rows,
    toy_painting,
    words,
)
from sevlm import EMOTIONS, SEVLM, Config, Text, read_tokenizer
from vad import UserError, read_lexicon

HEADER = "art_style,painting,emotion,utterance,repetition\n"


# Annotation files

def test_rows_of_every_honest_kind(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffrepetition,emotion,utterance,painting,art_style\r\n"
                     '5,awe,"a ""great"", wide\r\nsea",a-b.c_d(1),Baroque\r\n\r\n'
                     "5,Something Else ,nan,é,Cubism\r\n5,fear,null,NA,Cubism".encode())
    rows = read_rows(path)
    assert rows.problems == []
    assert rows.text == ['a "great", wide\r\nsea', "nan", "null"] and rows.painting == ["a-b.c_d(1)", "é", "NA"]
    assert [EMOTIONS[e] for e in rows.emotion] == ["awe", "something else", "fear"]
    assert rows.keys == ["Baroquea-b.c_d(1)", "Cubismé", "CubismNA"]


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
    assert rows.text == (["calm", "dark"] if after else ["calm"])
    assert len(rows.problems) == 1 and rows.problems[0].startswith(problem)


def test_missing_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("art_style,painting\n")
    with pytest.raises(UserError, match="rows.csv, line 1: no column emotion, utterance, repetition among art_style"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("name, file", [("artemis_v1", "artemis_dataset_release_v0.csv"), ("artemis_v2", "Contrastive.csv")])
def test_missing_data_says_what_to_get(tmp_path, name, file):
    (tmp_path / "wikiart").mkdir()
    if name == "artemis_v2":
        shutil.copy(FIXTURES / "protocol" / "artemis_v1.csv", tmp_path / "artemis_dataset_release_v0.csv")
    with pytest.raises(UserError) as error:
        load_art(name, tmp_path)
    for part in (f"{file} is not in {tmp_path}", "https://www.artemisdataset.org", "https://github.com/cs-chan/ArtGAN",
                 "research use", "non-commercial", "wikiart/<art_style>/<painting>.jpg", "--data-root", "SEVLM_DATA", "--data toy"):
        assert part in str(error.value)


def test_missing_pictures_and_unknown_names(tmp_path):
    shutil.copy(FIXTURES / "protocol" / "artemis_v1.csv", tmp_path / "artemis_dataset_release_v0.csv")
    with pytest.raises(UserError, match="wikiart/ is not in"):
        load_art("artemis_v1", tmp_path)
    with pytest.raises(UserError, match="unknown data 'imagenet'; there are artemis_v1, artemis_v2 and toy"):
        load_art("imagenet", tmp_path)


@pytest.mark.parametrize("text, cleaned", [
    ("The man's face -- it's “scary”!", "the man's face it is scary"),
    ("I can't say, won't say & don't CARE...", "i cannot say will not say & do not care"),
    ("He’d say 'fire', they're (all) gone;it’ll burn", "he would say fire they are (all) gone it will burn"),
    ("let's   look\nat blue/grey well-lit things", "let us look at blue grey well lit things"), ("?!", ""),
])
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_words_are_treebank_tokens():
    assert words("the man's dogs' cannot (see) \"it\" o'clock & so") == [
        "the", "man", "'s", "dogs", "'", "can", "not", "(", "see", ")", '"', "it", '"', "o'clock", "&", "so"]


@pytest.fixture
def v1_folder(tmp_path):
    shutil.copy(FIXTURES / "protocol" / "artemis_v1.csv", tmp_path / "artemis_dataset_release_v0.csv")
    (tmp_path / "wikiart").mkdir()
    return tmp_path


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_preprocessed_file_is_used_as_it_is(v1_folder):
    write_csv(v1_folder / "artemis_preprocessed.csv", [
        dict(art_style="Cubism", painting="x", emotion="awe", utterance="RAW", repetition=5, split=split,
             utterance_spelled=text, tokens_len=3) for split, text in (("test", "the man 's eyes"), ("test", "so"))])
    with open(v1_folder / "artemis_dataset_release_v0.csv", "w") as file:
        file.write(HEADER + "Cubism,x,awe,one,5\nCubism,x,fear,two,5\nCubism,x,fear,three,5\nCubism,other,awe,four,5\n")
    art = load_art("artemis_v1", v1_folder)
    assert art.source == "artemis_preprocessed.csv" and art.texts == ["the man 's eyes", "so"] and art.dropped == 0
    assert art.paintings("test").tolist() == [0]
    assert art.votes[0, EMOTIONS.index("fear")] == 2 and art.votes[0].sum() == 3  # of the raw file's annotations
    with pytest.raises(UserError, match="is of ArtEmis v1"):
        load_art("artemis_v2", v1_folder)


def test_the_authors_json(v1_folder):
    for split in ("train", "val", "test"):
        item = {"emotions": ["awe", "fear"], "explanations": ["so wide", f"so dark {split}"], "image_name": f"Cubism/{split}.jpg",
                "origin_emotion_distribution": [0, .5, 0, 0, 0, 0, .5, 0, 0]}
        broken = {"emotions": ["joy"], "explanations": ["x"], "image_name": "Cubism/y.jpg", "origin_emotion_distribution": []}
        (v1_folder / f"artEmisX_{split}.json").write_text(json.dumps({"17": item, "18": broken} if split == "val" else {"17": item}))
    art = load_art("artemis_v1", v1_folder)
    assert art.names == ["Cubism/train", "Cubism/val", "Cubism/test"] and len(art.problems) == 1
    assert "artEmisX_val.json, id 18" in art.problems[0]
    assert art.references("test") == {"Cubism/test": {"emotions": ["awe", "fear"], "explanations": ["so wide", "so dark test"],
                                                      "votes": [0, .5, 0, 0, 0, 0, .5, 0, 0]}}


def test_art_is_cached_until_the_file_changes(v1_folder, monkeypatch):
    first = load_art("artemis_v1", v1_folder)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_art", lambda *_: pytest.fail("read again"))
        again = load_art("artemis_v1", v1_folder)
    assert first.texts == again.texts and first.names == again.names and np.array_equal(first.votes, again.votes)
    with open(v1_folder / "artemis_dataset_release_v0.csv", "a") as file:
        file.write("Cubism,a-new-one,awe,something quite new to be seen,5\n")
    assert len(load_art("artemis_v1", v1_folder).texts) == len(first.texts) + 1
    (v1_folder / "cache" / "artemis_v1.npz").write_bytes(b"damaged")
    assert len(load_art("artemis_v1", v1_folder).texts) == len(first.texts) + 1


# Pictures

def jpeg(**options) -> bytes:
    file = BytesIO()
    options.pop("image", Image.new("RGB", (120, 80), (200, 30, 30))).save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def painted(image, file_format="PNG", **options) -> BytesIO:
    return BytesIO(jpeg(image=image, format=file_format, **options))


def gradient() -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8))


@pytest.mark.parametrize("make, corner", [
    (lambda: painted(gradient()), None), (lambda: painted(gradient().convert("L")), None),
    (lambda: painted(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    (lambda: painted(Image.new("P", (60, 40), 3)), (0, 0, 3)),
    (lambda: painted(Image.new("RGBA", (60, 40), (9, 9, 9, 0))), (255, 255, 255)),
    (lambda: painted(Image.new("LA", (60, 40), (0, 128))), (127, 127, 127)),
    (lambda: painted(Image.new("P", (60, 40), 0), transparency=0), (255, 255, 255)),
    (lambda: painted(Image.fromarray(np.full((40, 60), 32896, np.uint16))), (128, 128, 128)),
    (lambda: painted(Image.new("1", (60, 40), 1)), (255, 255, 255)),
])
def test_pictures_of_every_mode(make, corner):
    image = open_picture(make(), 16)
    assert image.mode == "RGB" and image.size == (60, 40)
    if corner == (0, 0, 3):  # Pillow's default palette is grey
        corner = (3, 3, 3)
    assert corner is None or np.abs(np.array(image.getpixel((2, 2))) - corner).max() <= 3


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 60, 8))  # the top edge becomes the right one
    upright = open_picture(painted(image, "JPEG", exif=exif, quality=95), 40)
    assert upright.size == (40, 60)
    assert upright.getpixel((38, 30))[0] < 60 and upright.getpixel((4, 30))[0] > 200


@pytest.mark.parametrize("source, problem", [
    (lambda: BytesIO(b"no picture at all"), "UnidentifiedImageError"), (lambda: BytesIO(jpeg()[:500]), "OSError"),
    (lambda: BytesIO(b""), "UnidentifiedImageError"), (lambda: "/nowhere/x.jpg", "no such file"),
    (lambda: painted(Image.new("1", (12000, 9000))), "12000 x 9000 pixels are too many"),
])
def test_bad_pictures(source, problem):
    with pytest.raises(BadPicture, match=problem):
        open_picture(source(), 64)


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (32, 32), (33, 32), (31, 77), (500, 20)])
@pytest.mark.parametrize("crop", [False, True])
def test_pixels_are_those_of_torchvisions_transforms(size, crop):
    from torchvision.transforms import v2
    bicubic = v2.InterpolationMode.BICUBIC
    sizing = [v2.Resize(32, bicubic), v2.CenterCrop(32)] if crop else [v2.Resize((32, 32), bicubic)]
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    buffer.seek(0)
    assert torch.equal(load_pixels(buffer, Config(image_size=32, crop=crop)), v2.Compose([*sizing, v2.PILToTensor()])(image))


def test_pixels_are_normalised_as_clip_or_imagenet_wants_them():
    config = Config(image_size=32)
    images = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), config)
    assert images[0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in ((.48145466, .26862954), (.4578275, .26130258),
                                                                               (.40821073, .27577711))], rel=1e-6)
    other = normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), Config(image_size=32, imagenet_pixels=True))
    assert other[0, 0, 0, 0].item() == pytest.approx(-.485 / .229, rel=1e-6)


def test_names_in_the_wild(tmp_path):
    wanted = ["Cubism/zo\u00eb_a", "Cubism/zo\u00eb_b", "Cubism/zo\u00eb_c", "Cubism/jos\u00e3\u00a9_d", "Cubism/jos\u00e3\u00a9_e",
              "Cubism/\u00e5\u0082ucja_f", "Cubism/x.y(1),'z'_g", "Cubism/\u4e2d_h", "Cubism/missing"]
    on_disk = ["zo\u00eb_a.jpg", unicodedata.normalize("NFD", "zo\u00eb_b.jpg"), "zo#U00eb_c.jpg", "jos\u00e9_d.jpg",
               "jos#U00e3#U00a9_e.jpg", "\u0142ucja_f.jpg", "x.y(1),'z'_g.jpg", "\\u4e2d_h.jpg"]
    (tmp_path / "Cubism").mkdir()
    for name in on_disk:
        (tmp_path / "Cubism" / name).touch()
    found = find_pictures(tmp_path, wanted)
    assert [path and path.name for path in found] == [*on_disk, None]


# Captions

def test_ids_labels_and_segments_equal_the_authors(gpt2_tokenizer):
    expected = json.loads((FIXTURES / "sentences" / "dataset_tokens.json").read_text())
    text = Text(gpt2_tokenizer)
    assert (text.end, text.pad, text.emotion, text.explanation, text.because) == (50256, 50257, 50259, 50260, 780)
    for record in expected["train"]:
        item = expected["data"][str(record["image_id"])]
        candidates = text.encode(item["emotions"], item["explanations"], 30)
        segments, labels = text.segments(candidates[1], 30), text.labels(candidates[0])
        for ids, label, segment in zip(record["input_ids"], record["labels"], record["segment_ids"], strict=True):
            place = [row.tolist() for row in candidates[0]].index(ids)
            assert labels[place].tolist() == label and segments[place].tolist() == segment
    for record in expected["eval"]:
        assert record["input_ids"] == text.prompt and set(record["segment_ids"]) == {text.emotion}


def test_round_trip_on_the_real_vocabulary(gpt2_tokenizer):
    text = Text(gpt2_tokenizer)
    for sentence in ("the café's naïve blue-grey sky", "emoji 😍 & 中文", "it is 1.5 times \"larger\"", "a  double  blank"):
        ids, _ = text.encode(["something else"], [sentence], 40)
        assert text.decode(ids[0].tolist()) == f"the emotion is something else because {sentence}"


@pytest.fixture
def small_model(toy) -> SEVLM:
    torch.manual_seed(0)
    config = Config.toy(image_size=32, width=32, tower_width=32, tower_layers=1, layers=1, heads=2, tower_heads=2)
    return SEVLM(config, read_tokenizer(toy.folder), read_lexicon(toy.folder / "lexicon.txt")).eval()


def test_captions_and_their_cache(toy, small_model, monkeypatch):
    captions = load_captions(toy, small_model)
    text = small_model.text
    for row in (0, 7, len(toy.texts) - 1):
        ids = captions.ids[row].tolist()
        assert captions.cut[row] or text.decode(ids) == f"the emotion is {EMOTIONS[toy.emotion[row]]} because {toy.texts[row]}"
        assert ids[captions.starts[row]] == text.because
        assert captions.labels[row] == sum(i != text.pad for i in ids) - 1
        assert np.array_equal(captions.rows[row], small_model.word_vad(torch.tensor([ids]))[0])
    with monkeypatch.context() as patch:
        patch.setattr(Text, "encode", lambda *_: pytest.fail("tokenised again"))
        assert np.array_equal(load_captions(toy, small_model).ids, captions.ids)
    small_model.config.length = 12
    shorter = load_captions(toy, small_model)
    assert shorter.ids.shape[1] == 12 and shorter.cut.mean() > captions.cut.mean()


# Epochs and negatives

@pytest.fixture
def examples(toy, small_model) -> Callable[..., Examples]:
    def make(**options) -> Examples:
        return Examples(toy, load_captions(toy, small_model), small_model.text, OnTheFly(toy, small_model.config),
                        **dict(seed=3, trim=False) | options)
    return make


def seen(epoch, start=0) -> list[tuple]:
    """Painting and sentences of everything that has weight."""
    return [(int(p), *batch.inputs["ids"][2 * i:2 * i + 2].flatten().tolist())
            for batch in map(epoch.__getitem__, range(start, len(epoch))) if batch.shares["contrastive"] > 0
            for i, p in enumerate(batch.paintings)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_an_epoch_visits_every_painting_once(examples, parts, accumulate):
    training = examples()
    for number in (0, 7):
        whole = seen(training.epoch(number, batch=16))
        assert sorted(p for p, *_ in whole) == sorted(training.paintings.tolist())
        split = [seen(training.epoch(number, 16, part, parts, accumulate)) for part in range(parts)]
        assert sorted(itertools.chain(*split)) == sorted(whole)
        steps = {len(training.epoch(number, 16, part, parts, accumulate)) for part in range(parts)}
        assert steps == {accumulate * -(-len(training) // 16)}, "every process takes part in every step"


def test_resuming_anywhere_continues_the_same_epoch(examples):
    whole = seen(examples().epoch(4, batch=8))
    for start in range(len(examples().epoch(4, batch=8))):
        assert whole[8 * start:] == seen(examples().epoch(4, batch=8), start)


def test_seeds_and_epochs_differ(examples):
    first = seen(examples().epoch(0, 16))
    assert seen(examples(seed=4).epoch(0, 16)) != first != seen(examples().epoch(1, 16))
    assert first == seen(examples().epoch(0, 16))


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
            for name in ("language", "vad", "contrastive"):
                assert sum(batch.shares[name] for batch in batches) == pytest.approx(1)


def test_a_lonely_painting_has_no_negatives():
    wrong_emotion, wrong_image = negatives(np.array([3, 3]), np.array([0]), np.zeros((1, 2, 2)))
    assert wrong_emotion.tolist() == wrong_image.tolist() == [-1, -1]
    group = np.repeat(np.arange(3), GROUP)
    _, wrong_image = negatives(np.zeros(6 * GROUP, int), group, np.random.default_rng(0).random((3 * GROUP, 2, 2)))
    assert (wrong_image // 2 // GROUP == np.arange(6 * GROUP) // 2 // GROUP).all()


def test_a_picture_that_breaks_is_left_out_of_its_batch(toy, examples):
    training = examples()
    victim = training.epoch(0, 16)[0].paintings[5]
    before, file = toy.files[victim].read_bytes(), toy.files[victim]
    try:
        file.write_bytes(before[:300])
        batch = training.epoch(0, 16)[0]
        assert victim not in batch.paintings and len(batch.paintings) == 15 == len(batch.pictures)
        assert len(batch.inputs["ids"]) == 30 and batch.inputs["wrong_image"].max() < 30
        assert "OSError" in batch.problems[victim]
        alone = training.epoch(0, 1)[5]
        assert victim in alone.problems and len(alone.pictures) == 1 and not alone.pictures.any()
        assert len(alone.inputs["ids"]) == 2 and set(alone.shares.values()) == {0.0}
        seen, pictures, problems = PictureBatches(training.pictures, training.paintings, 40)[0]
        assert len(seen) == len(pictures) == 40 - len(problems)
    finally:
        file.write_bytes(before)


def test_workers_change_nothing(examples):
    training = examples()
    alone, helped = (list(data.loader(training.epoch(0, 16), workers, torch.device("cpu"), start=1)) for workers in (0, 2))
    assert len(alone) == len(helped) == len(training.epoch(0, 16)) - 1
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.pictures, b.pictures) and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


# Stores

def test_stored_features_equal_direct_encoding(tmp_path, toy, small_model):
    store = Store(tmp_path / "features.npy", toy, small_model, features=True).open().fill()
    paintings = np.array([3, 0, 50])
    pixels = torch.stack([load_pixels(toy.files[p], small_model.config) for p in paintings])
    with torch.no_grad():
        direct = small_model.see(normalise(pixels, small_model.config))
    stored, problems = store.get(paintings)
    assert problems == {} and stored.dtype == torch.float16
    assert torch.allclose(stored.float(), direct, rtol=2e-3, atol=2e-3)
    pixel_store = Store(tmp_path / "pixels.npy", toy, small_model, features=False).open().fill(workers=1)
    assert torch.equal(pixel_store.get(paintings)[0], pixels)


def test_an_interrupted_pass_goes_on(tmp_path, toy, small_model, monkeypatch):
    calls = []

    def interrupted(self, pixels, whole=Store.encode):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, pixels)
    monkeypatch.setattr(Store, "encode", interrupted)
    store = Store(tmp_path / "features.npy", toy, small_model, features=True).open()
    with pytest.raises(KeyboardInterrupt):
        store.fill(batch=8)
    assert store.usable().sum() == 16
    again = Store(tmp_path / "features.npy", toy, small_model, features=True).open().fill(batch=8)
    assert again.usable().all() and sum(calls[3:]) == len(toy.names) - 16
    fresh = Store(tmp_path / "fresh.npy", toy, small_model, features=True).open().fill()
    assert np.array_equal(again.array, fresh.array)


def test_a_store_of_another_tower_is_refused(tmp_path, toy, small_model):
    Store(tmp_path / "features.npy", toy, small_model, features=True).open()
    with torch.no_grad():
        small_model.tower.class_embedding += 1e-3
    with pytest.raises(UserError, match="was made with another vision tower.*--cache"):
        Store(tmp_path / "features.npy", toy, small_model, features=True).open()


def test_a_store_wants_room(tmp_path, toy, small_model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**3))
    with pytest.raises(UserError, match=r"needs 0.0 GB and 0.0 GB are free.*--cache off"):
        Store(tmp_path / "features.npy", toy, small_model, features=True).open()
    assert not (tmp_path / "features.npy").exists()


def test_pictures_that_a_store_cannot_use_are_listed(tmp_path, toy, small_model):
    (tmp_path / "broken.jpg").write_bytes(toy.files[1].read_bytes()[:400])
    toy.files[1], toy.files[2] = tmp_path / "broken.jpg", None
    store = Store(tmp_path / "pixels.npy", toy, small_model, features=False).open().fill()
    assert {p: problem.split(":")[0] for p, problem in store.problems.items()} == {1: "OSError", 2: "no such file"}
    assert np.flatnonzero(~store.usable()).tolist() == [1, 2]
    training = Examples(toy, load_captions(toy, small_model), small_model.text, store, seed=0)
    assert not {1, 2} & set(training.paintings)


# The toy world

def test_the_toy_is_the_same_everywhere():
    style, name, annotations, likeliest, image = toy_painting(17)
    again = toy_painting(17)
    assert (style, name, annotations, likeliest) == again[:4] and np.array_equal(image, again[4])
    assert toy_painting(18)[1] != name


def test_the_toy_looks_like_artemis(toy):
    rows = read_rows(toy.folder / "artemis_dataset_release_v0.csv")
    assert rows.problems == [] and len(set(rows.keys)) == 60 and set(Counter(rows.keys).values()) == {5, 6, 7}
    assert all(file and file.parent.parent.name == "wikiart" for file in toy.files)
    lexicon = read_lexicon(toy.folder / "lexicon.txt")
    vocabulary = {word for text in toy.texts for word in words(text)}
    assert len(vocabulary) > 250 and sum(bool(lexicon.lemma(word)) for word in vocabulary) > 100
    assert Text(read_tokenizer(toy.folder)).size <= 1010
    stored = json.loads((toy.folder / "toy.json").read_text())
    assert 0.5 < stored["best_accuracy"]["train"] <= 1


def test_best_accuracy_is_what_knowing_the_mood_gives(toy):
    """Recomputed from the votes of the CSV and the likeliest emotion of each painting."""
    likeliest = {f"{style}/{name}": guess for style, name, _, guess, _ in map(toy_painting, range(60))}
    for split in ("train", "test"):
        target = {toy.names[p]: toy.votes[p].argmax() for p in np.flatnonzero(toy.split == data.SPLITS.index(split))
                  if toy.votes[p].max() > toy.votes[p].sum() / 2}
        share = np.mean([likeliest[name] == emotion for name, emotion in target.items()])
        assert data.best_accuracy(toy, split) == pytest.approx(share)


def test_annotators_say_what_is_there_and_how_they_feel():
    grammar = data.grammar()
    said = {word for number in range(40) for _, text in toy_painting(number)[2] for word in words(clean(text))}
    assert len(said) > 250
    for number in range(40):
        _, name, annotations, _, _ = toy_painting(number)
        palette, subject = name.split("_")[1].split("-")[:2]
        for emotion, text in annotations:
            rules = [f"thing.{subject}", f"color.{palette}"]
            felt = [choice for part in ("adj", "feel", "gives", "like", "memory", "story") for choice in grammar[f"{part}.{EMOTIONS[emotion]}"]]
            seen = [choice for rule in rules for choice in grammar[rule]]
            lower = text.lower()
            assert any(choice in lower for choice in felt) and any(choice in lower for choice in seen), text


def test_program(toy_root):
    run = subprocess.run([sys.executable, ROOT / "data.py", "--data-root", toy_root, "--toy-paintings", "60", "--show", "2"],
                         capture_output=True, text=True, check=True, env={**os.environ, "SEVLM_DATA": "nowhere"})
    for part in ("explanations of 60 paintings", "best ACC", "something else", "lexicon coverage", "cut at 30 tokens",
                 "pictures not found          0", "explanation   "):
        assert part in run.stdout
    assert len(re.findall(r"<\|endoftext\|> +emotion +␣the", run.stdout)) == 2

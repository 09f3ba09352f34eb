"""What a user can get wrong, over all programs: each case ends with code 1 or 2 and one message, and changes no file."""
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import data
import metrics
import sample
import sevlm
import vad
from sevlm import Config, load, save
from support.program import UserError
from support.settings import flag

PROGRAMS = {"vad": vad, "sevlm": sevlm, "data": data, "metrics": metrics, "sample": sample}
PICTURE, LEXICON = str(ROOT / "examples" / "awe-moon.png"), str(ROOT / "toy" / "lexicon.txt")
PREDICTION = {"image": "a", "emotion": "awe", "explanation": "it glows"}
REFERENCES = {"a": {"emotions": ["awe"], "explanations": ["it glows"]}}
NO_JSON = {"nothing": b"", "half": b'{"a": [1, 2', "brackets": b"[" * 100_000, "a number": b"1" * 5000, "noise": bytes(range(128, 256)),
           "not UTF-8": b'{"a": "\xff"}', "null": b"null", "a list": b"[1, 2]", "a text": b'"text"', "true": b"true"}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Call a program with wrong arguments: what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(program: str, *arguments) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        with pytest.raises((UserError, SystemExit, OSError)) as refusal:  # of an OSError run_program makes one line
            PROGRAMS[program].main()
        said = capsys.readouterr()
        if isinstance(refusal.value, SystemExit):
            assert refusal.value.code == 2, arguments
            message = said.err.strip().splitlines()[-1]
        else:
            message = str(refusal.value)
        assert message and "Traceback" not in said.err, arguments
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, f"{arguments} changed files"
        return message
    return call


def beyond(kind: type) -> list[tuple[str, object]]:
    """For each number of a dataclass of options, values that it may not have."""
    cases = []
    for known in dataclasses.fields(kind):
        limits = known.metadata
        if not limits or not isinstance(known.default, (int, float)):
            continue
        if isinstance(known.default, bool):
            cases += [(known.name, "yes"), (known.name, 1), (known.name, None)]
            continue
        cases += [(known.name, wrong) for wrong in ("nonsense", None, [], float("nan"), float("inf"))]
        cases += [(known.name, limits[edge] + step) for edge, step in (("least", -1), ("most", 1)) if limits[edge] is not None]
        cases += [(known.name, limits[edge]) for edge in ("above", "below") if limits[edge] is not None]
    return cases


def test_answers(refused, tmp_path):
    wishes = [(flag(name), value) for name, value in beyond(sample.Wish) if value not in (None, 1) and value != []]
    wrong = [f"{name}={value}" for name, value in wishes if not isinstance(value, str) or value != "yes"]
    for one in [*wrong, "--seed=" + "9" * 5000, "--temperature=1e999", "--emotion=joy", "--device=tpu", "--precision=int8",
                "--checkpoint=runs/typo", "--checkpoint=/", "--nonsense"]:
        refused("sample", PICTURE, one)
    for flags in (["--greedy", "--beam", "2"], ["--samples", "2", "--best-of", "2"], ["--emotion", "awe", "--all-emotions"],
                  ["--serve", "99999"], ["--serve", "-1"], ["--serve", "x"], ["--serve", "80", PICTURE], ["--serve", "--json"],
                  [], ["nowhere.png"], ["no*.png"], ["."]):
        refused("sample", *flags)
    Path("notes.txt").write_text("mine\n")
    for flags in (["--out", "notes.txt"], ["--html", "notes.txt"]):
        refused("sample", PICTURE, *flags)
    assert len(wrong) >= 25


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "lexicon.txt", "model.safetensors"])
def test_damaged_checkpoints(refused, tmp_path, file):
    whole = (ROOT / "examples" / "toy" / file).read_bytes()
    harms = {**NO_JSON, "half of it": whole[:len(whole) // 2], "begun": whole[:7]}
    for harm, content in harms.items():
        run = tmp_path / harm.replace(" ", "-")
        shutil.copytree(ROOT / "examples" / "toy", run)
        (run / file).write_bytes(content)
        for program, arguments in (("sample", [PICTURE]), ("sevlm", [PICTURE, "awe because it glows"])):
            assert str(run) in refused(program, *arguments, "--checkpoint", run), (harm, program)
    for gone in ("missing", "a-folder"):
        run = tmp_path / gone
        shutil.copytree(ROOT / "examples" / "toy", run)
        (run / file).unlink()
        if gone == "a-folder":
            (run / file).mkdir()
        assert str(run) in refused("sample", PICTURE, "--checkpoint", run)


def test_wrong_values_in_a_checkpoint(refused, tmp_path):
    shutil.copytree(ROOT / "examples" / "toy", tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    cases = [*beyond(Config), ("emotions", []), ("emotions", ["awe"]), ("emotions", ["awe"] * 3), ("emotions", [1, 2]), ("emotions", "awe"),
             ("emotions", ["because", "awe"]), ("emotions", ["", "awe"]), ("wings", 2), ("width", 100), ("length", 100)]
    for name, value in cases:
        (tmp_path / "run" / "config.json").write_text(json.dumps(stored | {"sevlm": stored["sevlm"] | {name: value}}))
        refused("sample", PICTURE, "--checkpoint", tmp_path / "run")
    assert len(cases) >= 120


def test_words(refused, tmp_path):
    lexicons = {"none": "", "blank": "\n\n", "words": "calm\n", "two": "calm\t1\t2\n", "letters": "calm\ta\tb\tc\n", "nan": "calm\tnan\t0\t0\n",
                "range": "calm\t1.5\t0\t0\n", "four": "calm\t0\t0\t0\t0\n", "commas": "calm,0,0,0\n", "header": "Word\tValence\tArousal\tDominance\n"}
    for name, text in lexicons.items():
        (tmp_path / name).write_text(text)
        assert name in refused("vad", "a calm sea", "--lexicon", name)
    (tmp_path / "bytes").write_bytes(b"calm\xff\t0\t0\t0\n")
    for flags in (["--lexicon", "bytes"], ["--lexicon", "nowhere"], ["--lexicon", "."], ["--tokenizer", "nowhere"], ["--tokenizer", LEXICON]):
        refused("vad", "a calm sea", *flags)
    refused("vad", " ")
    for flags in ([PICTURE, "awe"], [PICTURE, "joy because it glows"], ["nowhere.png", "awe because it glows"],
                  [LEXICON, "awe because it glows"], [PICTURE, "awe because it glows", "--checkpoint", "runs/typo"]):
        refused("sevlm", *flags)


def test_own_data(refused, tmp_path):
    head = "image,emotion,explanation\n"
    files = {"none.csv": "", "head.csv": head, "columns.csv": "a,b\n1,2\n", "blank.csv": head + ",,\n", "quote.csv": head + 'a.jpg,awe,"it glows\n',
             "one.csv": head + "a.jpg,awe,it glows\nb.jpg,awe,it shines\n", "once.csv": head + "a.jpg,awe,it glows\na.jpg,fear,it is dark\n",
             "missing.csv": head + "a.jpg,awe,it glows\na.jpg,awe,it shines\na.jpg,fear,so dark\na.jpg,fear,darker\n",
             "two.csv": "image,image,emotion,explanation\na,b,c,d\n", "nul.csv": head + "\0,\0,\0\n",
             "list.json": "[]", "numbers.json": "[1, 2]", "lines.jsonl": "1\n2\n", "half.jsonl": '{"image": \n', "object.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        refused("data", "--data", name)
        refused("metrics", "--predictions", name, "--data", name)
    for name, content in NO_JSON.items():
        (tmp_path / "own.json").write_bytes(content)
        refused("data", "--data", "own.json"), name
    for flags in (["--data", "artemis_v3"], ["--data", "nowhere.csv"], ["--data", "artemis_v1"], ["--data", "artemis_v2", "--data-root", "no"],
                  ["--toy-paintings", "5"], ["--toy-paintings", "-1"], ["--toy-paintings", "x"], ["--show", "x"],
                  ["--images", "nowhere", "--data", "missing.csv"], ["--data-root", LEXICON]):
        refused("data", *flags)


def test_predictions_and_references(refused, tmp_path):
    Path("references.json").write_text(json.dumps(REFERENCES))
    Path("predictions.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    records = [{}, {"image": "a"}, {"image": None}, {"image": ["a"]}, PREDICTION | {"emotion": 1}, PREDICTION | {"explanation": None},
               PREDICTION | {"probabilities": [1]}, PREDICTION | {"probabilities": {"joy": 1}}, PREDICTION | {"probabilities": {"awe": -1}},
               PREDICTION | {"probabilities": {"awe": "x"}}, PREDICTION | {"probabilities": {"awe": 0.5}}, {"image_id": 1, "caption": 1},
               PREDICTION | {"image": "stranger"}]
    for number, record in enumerate(records):
        Path("wrong.jsonl").write_text(json.dumps(record) + "\n")
        assert "wrong.jsonl" in refused("metrics", "--predictions", "wrong.jsonl", "--references", "references.json"), number
    entries = [{}, [], {"emotions": "awe", "explanations": ["x"]}, {"emotions": ["joy"], "explanations": ["x"]}, {"emotions": ["awe"], "explanations": []},
               {"emotions": ["awe"], "explanations": [1]}, {"emotions": ["awe"], "explanations": ["x"], "votes": [1]},
               {"emotions": ["awe"], "explanations": ["x"], "votes": {"awe": "x"}}]
    for entry in entries:
        Path("wrong.json").write_text(json.dumps({"a": entry}))
        assert "wrong.json" in refused("metrics", "--predictions", "predictions.jsonl", "--references", "wrong.json")
    for content in NO_JSON.values():
        Path("wrong.json").write_bytes(content)
        for flags in (["--predictions", "wrong.json", "--references", "references.json"], ["--predictions", "predictions.jsonl", "--references", "wrong.json"],
                      ["--predictions", "predictions.jsonl", "--references", "references.json", "--only", "wrong.json"],
                      ["--predictions", "predictions.jsonl", "--references", "references.json", "--text-classifier", "wrong.json"]):
            assert "wrong.json" in refused("metrics", *flags)
    for flags in ([], ["one text"], ["--predictions", "predictions.jsonl"], ["--references", "references.json"], ["said", "it", "--json"], ["--train-ea"],
                  ["--predictions", "nowhere", "--references", "references.json"], ["--predictions", "predictions.jsonl", "--references", "nowhere"],
                  ["--predictions", "predictions.jsonl", "--references", "references.json", "--data", "toy"],
                  ["--predictions", "predictions.jsonl", "--references", "references.json", "--glove", "x"],
                  ["--predictions", "predictions.jsonl", "--references", "references.json", "--emotions", "awe"],
                  ["--predictions", "predictions.jsonl", "--references", "references.json", "--meteor-jar", "nowhere.jar"],
                  ["--predictions", "predictions.jsonl", "--data", "nowhere.csv"], ["--only", "references.json", "--data", "toy"]):
        refused("metrics", *flags)


def test_a_checkpoint_of_another_kind_is_refused(refused, tmp_path):
    model = load(ROOT / "examples" / "toy")
    save(model, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("vad_head", "contrastive_head", "vad_input"):  # weights without their part
        (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"sevlm": config["sevlm"] | {name: False}}))
        assert "unexpected" in refused("sample", PICTURE, "--checkpoint", tmp_path / "run")

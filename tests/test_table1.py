"""Table 1: the commands it trains by really train, nothing is trained twice, and the numbers are metrics.py's."""
import json
import re
import sys

import pytest

pytest.importorskip("torchvision")
import train
from metrics import evaluate, read_predictions, references_of, text_classifier_of
from related import emotion_classifier, meshed_memory, nlx_gpt, show_attend_tell, table1
from support.program import UserError

MAINS = {"related.emotion_classifier": emotion_classifier.main, "related.show_attend_tell": show_attend_tell.main,
         "related.meshed_memory": meshed_memory.main, "related.nlx_gpt": nlx_gpt.main}
EXACT = ["--precision", "float32"]
QUICK = {train.main: [*EXACT, "--epochs", "1"], nlx_gpt.main: EXACT} | {
    module.main: [*EXACT, "--epochs", "1", "--side", "32"] for module in (emotion_classifier, show_attend_tell, meshed_memory)}


class Bench:
    """A folder for a table, and every command that was run for it, in order."""

    def __init__(self, folder, toy_root):
        self.folder, self.toy_root, self.commands = folder, toy_root, []

    def __call__(self, *flags):
        """Call the program; what it would run in processes of their own runs here, with flags that make it quick."""
        with pytest.MonkeyPatch.context() as patch:
            def here(words):
                self.commands.append(words)
                main, flags = (MAINS[words[1]], words[2:]) if words[0] == "-m" else (train.main, words[1:])
                patch.setattr(sys, "argv", ["program", *flags, *QUICK[main]])
                main()
            patch.setattr(table1, "run_to_its_end", here)
            patch.setattr(sys, "argv", ["table1", "--data-root", str(self.toy_root), "--toy-paintings", "60", "--out", str(self.folder), *map(str, flags)])
            table1.main()

    def json(self, path: str):
        return json.loads((self.folder / path).read_text())


@pytest.fixture(scope="module")
def bench(tmp_path_factory, toy_root):
    bench = Bench(tmp_path_factory.mktemp("table") / "table", toy_root)
    bench()
    return bench


def test_everything_is_trained_scored_and_written(bench, toy):
    trained = [words[1] if words[0] == "-m" else words[words.index("--name") + 1] for words in bench.commands]
    assert trained == ["related.emotion_classifier", "related.show_attend_tell", "related.meshed_memory", "baseline-0",
                       "related.nlx_gpt", "SEVLM-0"]
    results, systems = bench.json("results.json"), ["SAT", "M2", "NLX-GPT", "baseline", "SEVLM"]
    assert list(results["systems"]) == systems and list(results["told the emotion"]) == systems[:3]
    paths = {"SAT": "SAT-0/test-predicted.jsonl", "NLX-GPT": "NLX-GPT-greedy-0/test-predicted.jsonl", "SEVLM": "SEVLM-0/test-greedy.jsonl"}
    for system, path in paths.items():
        scores = evaluate(dict(read_predictions(bench.folder / path)), references_of(toy, "test"), toy.emotions, text_classifier_of(toy))
        for name in ("ACC", "EA", "EA (>= half)", "BLEU-4", "ROUGE-L", "Unique"):
            assert results["systems"][system][name]["value"] == pytest.approx(scores[name].value)
    assert len({results["systems"][system]["ACC"]["value"] for system in systems[:3]}) == 1  # one classifier for all three
    assert all(score["against"] is None for score in results["systems"]["SEVLM"].values())
    assert all(0 <= score["against"]["p"] <= score["against"]["holm"] <= 1 for score in results["systems"]["M2"].values())
    assert all(min(results["costs"][system].values()) > 0 for system in systems)
    assert results["costs"]["M2"]["parameters"] == sum(bench.json(f"{name}/results.json")["parameters"] for name in ("emotions-0", "M2-0"))
    rows = [line for line in (bench.folder / "table1.tex").read_text().splitlines() if line.endswith(r"\\")]
    assert len(rows) == 6 and {row.count("&") for row in rows} == {len(table1.TABLE) + 3} and r"$\geq$" in rows[0]
    text, page = ((bench.folder / name).read_text() for name in ("table1.txt", "report.html"))
    assert re.search(r"^BLEU-4 ( +\d+\.\d\d){5}$", text, re.MULTILINE) and "which no system may know" in text
    assert page.count("<svg") == len(table1.TABLE) and "NLX-GPT" in page


def test_nothing_is_trained_twice_and_others_may_join(bench, tmp_path, toy, capsys):
    trained, images = len(bench.commands), list(references_of(toy, "test"))
    (tmp_path / "theirs.json").write_text(json.dumps([{"image": image, "caption": "a quiet sea"} for image in images]))
    bench("--rows", "M2", "SEVLM", "--add", f"Plain={tmp_path / 'theirs.json'}")
    results = bench.json("results.json")
    assert len(bench.commands) == trained and list(results["systems"]) == ["M2", "SEVLM", "Plain"] and list(results["costs"]) == ["M2", "SEVLM"]
    plain = results["systems"]["Plain"]
    assert plain["ACC"]["value"] is plain["ACC (>= half)"]["value"] is None and plain["Unique"]["value"] == pytest.approx(1 / len(images))
    assert (bench.folder / "table1.txt").read_text() in capsys.readouterr().out


def test_another_decoding_asks_only_nlx_gpt_again(bench):
    trained = len(bench.commands)
    bench("--decoding", "nucleus", "--rows", "NLX-GPT", "baseline")
    assert [words[1] for words in bench.commands[trained:]] == ["related.nlx_gpt"]
    assert bench.json("NLX-GPT-nucleus-0/config.json")["decoding"] == "nucleus" and "nucleus decoding" in bench.json("results.json")["note"]


def test_what_cannot_be_is_said_in_one_line(bench, tmp_path, toy):
    trained = len(bench.commands)
    other, empty, some = tmp_path / "other.jsonl", tmp_path / "empty.jsonl", tmp_path / "some.jsonl"
    other.write_text(json.dumps({"image": "elsewhere/picture.jpg", "emotion": "awe", "explanation": "it is"}))
    some.write_text(json.dumps({"image": toy.names[toy.paintings("test")[0]], "emotion": "awe", "explanation": "it is"}))
    empty.write_text("")
    for flags, told in ((["--add", f"X={other}"], "the references have none of its 1 images"), (["--add", f"X={some}"], "have no prediction"),
                        (["--add", f"X={empty}"], "holds no predictions"), (["--add", f"X={tmp_path / 'nothing.jsonl'}"], "there is no file"),
                        (["--add", str(other)], "expected NAME=FILE"), (["--add", f"SAT={other}"], "no other system has"), (["--seeds", "0"], "at least 1")):
        with pytest.raises(UserError, match=told) as error:
            bench(*flags)
        assert len(str(error.value).splitlines()) == 1
    assert len(bench.commands) == trained  # an error comes before hours of training


def test_a_training_that_fails_ends_the_table():
    with pytest.raises(UserError, match="did not come to its end"):
        table1.run_to_its_end(["-c", "raise SystemExit(1)"])
    table1.run_to_its_end(["-c", "pass"])


def test_the_systems_on_patches_come_after_the_tower_that_makes_them(tmp_path):
    runs = table1.Runs(tmp_path, "greedy", ["--data", "mine.csv"])
    assert runs.needed("M2-clip") == ["emotions", "SEVLM", "M2-clip"] and runs.needed("M2") == ["emotions", "M2"]
    words = runs.command("M2-clip", 3)
    assert words[words.index("--weights") + 1] == str(tmp_path / "SEVLM-3") and words[words.index("--features") + 1] == "clip"
    assert {"--no-vad-input", "--no-vad-head", "--no-contrastive-head"} <= set(runs.command("baseline", 0))

"""The training loop, its run folder, and what it refuses. Tiny models on a toy world of 60 paintings."""
import dataclasses
import html.parser
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import Captions, Examples, find_lexicon, load_art, load_captions, normalise
from sevlm import EMOTIONS, SEVLM, Config, load, read_tokenizer, write
from vad import UserError

ROOT = Path(__file__).parents[1]
TINY = ["--toy-paintings", "60", "--tower-width", "16", "--tower-layers", "1", "--tower-heads", "1", "--width", "16", "--layers", "1",
        "--heads", "1", "--batch", "8", "--epochs", "3", "--validate-every", "7", "--warmup", "0"]


@pytest.fixture
def flags(toy_root, tmp_path) -> list[str]:
    return ["--data-root", str(toy_root), "--runs", str(tmp_path), *TINY]


@pytest.fixture
def run(flags):
    """Train in this process: `run("--lr", "1")` returns the run's folder and what it found."""
    names = (f"run{number}" for number in itertools.count())

    def start(*more: str) -> tuple[Path, dict]:
        options = train.parser().parse_args([*flags, "--name", next(names), *more])
        folder = train.find_run(options)
        return folder.folder, train.train(folder, train.Plan.of(options), quiet=True)
    return start


def program(flags, *more, launcher=("train.py",)) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, *flags, *more], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def log_of(folder: Path) -> list[dict]:
    """The log without what depends on the clock and the machine."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("pictures_per_second", "memory_gb")} for record in records]


def apart(first: Path, second: Path) -> float:
    """The largest difference between two runs' weights at their ends."""
    one, other = (load_file(folder / "state" / "state.safetensors") for folder in (first, second))
    return max(float((one[name] - other[name]).abs().max()) for name in one if name.startswith("model."))


def test_overfits_four_paintings_to_their_sentences(toy):
    kept = [p for p in toy.paintings("train") if len({toy.emotion[r] for r in toy.rows_of(p)}) > 1][:4]
    pairs = [[next(r for r in toy.rows_of(p) if toy.emotion[r] == e) for e in sorted({toy.emotion[r] for r in toy.rows_of(p)})[:2]]
             for p in kept]
    rows = [row for pair in pairs for row in pair]
    four = dataclasses.replace(toy, names=[toy.names[p] for p in kept], split=toy.split[kept], votes=toy.votes[kept],
                               files=[toy.files[p] for p in kept], owner=torch.arange(4).repeat_interleave(2).numpy(),
                               emotion=toy.emotion[rows], texts=[toy.texts[r] for r in rows], folder=toy.folder)
    torch.manual_seed(0)
    model = SEVLM(Config.toy(tower_layers=1, layers=2, width=64), read_tokenizer(toy.folder), find_lexicon(toy, None))
    pixels = train.OnTheFly(four, model.config)
    captions = load_captions(toy, model)
    own = Captions(*(getattr(captions, field.name)[rows] for field in dataclasses.fields(Captions)))
    examples = Examples(four, own, model.text, pixels, seed=0)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, train.Settings(lr=3e-3, vad_lr=6e-3)), 3e-3)
    world = train.World(train.Settings(device="cpu"))
    for number in range(120):
        train.backward(model, model, iter([examples.epoch(number, 4)[0]]), 1, torch.amp.GradScaler("cpu", enabled=False), world)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    pictures = normalise(pixels.get(range(4))[0], model.config).repeat_interleave(2, 0)
    written = write(model, pictures, [model.text.opening(EMOTIONS[e]) for e in four.emotion])
    assert [model.text.reason(ids) for ids in written.ids.tolist()] == [model.text.reason(ids) for ids in own.ids.tolist()]


def test_a_run_leaves_what_it_promises_and_scores_again_alike(run, flags, capsys):
    folder, results = run()
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "state", "log.jsonl", "samples.jsonl", "results.json", "report.html",
        "test-nucleus.jsonl", "test-greedy.jsonl"}
    assert results == json.loads((folder / "results.json").read_text())
    steps = [record for record in log_of(folder) if "losses" in record]
    assert [record["step"] for record in steps] == list(range(1, 1 + len(steps)))
    assert set(steps[0]["losses"]) == {"language", "vad", "contrastive"} and len(steps[0]["lr"]) == 2
    assert steps[0]["losses"]["language"] > steps[-1]["losses"]["language"]
    assert 0 < results["best_possible_acc"] <= 1 and results["test"]["greedy"]["counts"]["images"] == len(
        (folder / "test-greedy.jsonl").read_text().splitlines())
    train.evaluate_again(train.parser().parse_args([*flags, "--evaluate", str(folder), "--name", "again"]))
    again = json.loads((folder.parent / "again" / "results.json").read_text())
    assert again["test"] == results["test"]
    assert "BLEU-4" in capsys.readouterr().out


def test_the_report_is_one_page_that_needs_nothing_else(run):
    folder, _ = run()
    text = (folder / "report.html").read_text()
    seen = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(tag)
            for name, value in attributes:
                assert name not in ("src", "href") or value.startswith(("data:", "#")), value
    Reader().feed(text)
    shown = {json.loads(line)["image"] for line in (folder / "samples.jsonl").read_text().splitlines()}
    assert seen.count("svg") == 6 and seen.count("polyline") >= 9 and seen.count("article") == len(shown) > 1
    assert "url(http" not in text and "@import" not in text


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_ends_like_one_that_was_never_stopped(flags, seed):
    root, chance = Path(flags[3]), random.Random(seed)
    whole = program(flags, "--name", "whole")
    assert whole.wait() == 0, whole.stdout.read()
    total = len(log_of(root / "whole"))
    stops = sorted(chance.sample(range(1, total), 2))
    for stop, how in zip(stops, (signal.SIGKILL, signal.SIGTERM)):
        running = program(flags, "--name", "parts", *(["--resume"] if stop != stops[0] else []))
        log = root / "parts" / "log.jsonl"
        while running.poll() is None and (not log.is_file() or log.read_text().count("\n") < stop):
            time.sleep(0.01)
        running.send_signal(how)
        code, said = running.wait(), running.stdout.read()
        assert code in (-signal.SIGKILL, 1, 0) and "Traceback" not in said, said
    last = program(flags, "--name", "parts", "--resume")
    assert last.wait() == 0, last.stdout.read()
    for name in ("model.safetensors", "samples.jsonl", "test-greedy.jsonl", "test-nucleus.jsonl"):
        assert (root / "whole" / name).read_bytes() == (root / "parts" / name).read_bytes(), name
    assert log_of(root / "whole") == log_of(root / "parts")
    assert apart(root / "whole", root / "parts") == 0


def test_two_processes_and_accumulation_equal_one(flags, run):
    root, more = Path(flags[3]), ["--lr", "1e-4", "--vad-lr", "2e-4"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")
    two = program(flags, "--name", "two", *more, launcher=torchrun)
    one, results = run(*more)
    assert two.wait() == 0, two.stdout.read()
    accumulated, _ = run(*more, "--accumulate", "2")
    assert apart(one, root / "two") < 1e-5 and apart(one, accumulated) < 1e-5
    assert json.loads((root / "two" / "results.json").read_text())["processes"] == 2
    for other in (root / "two", accumulated):
        assert log_of(one)[0]["losses"] == pytest.approx(log_of(other)[0]["losses"], rel=1e-5)
    assert json.loads((root / "two" / "results.json").read_text())["test"]["greedy"]["counts"] == results["test"]["greedy"]["counts"]


def test_a_frozen_tower_stays_as_it_was(run, flags):
    folder, _ = run("--no-train-tower")
    plan = train.Plan.of(train.parser().parse_args([*flags, "--no-train-tower"]))
    before, after = plan.model(plan.art()), load(folder)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]) == name.startswith(("tower.", "word_vad.")) or "norm" in name, name


def test_learning_rates_are_the_papers(make_model):
    model, settings = make_model(), train.Settings()
    rest, vad = train.parameter_groups(model, settings)
    assert (rest["base"], vad["base"]) == (2e-5, 4e-5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].split(".")[0] for p in vad["params"]} == {"emotion_encoder", "fusion"}
    assert {names[p].split(".")[0] for p in rest["params"]} == {"decoder", "vad_head", "contrastive_head"}
    assert [train.pace(step, 10, 0) for step in (0, 5, 9)] == [1.0, 0.5, pytest.approx(0.1)]
    assert train.pace(0, 100, 10) == pytest.approx(0.1) and train.pace(9, 100, 10) == pytest.approx(0.91)


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_state(run, tmp_path):
    with pytest.raises(UserError, match=r"not finite.*last good state is saved.*The batch: .*-\d{4}"):
        run("--lr", "1e38")
    state = load_file(tmp_path / "run0" / "state" / "state.safetensors")
    assert len(state) > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
def test_fp16_learns_and_counts_skipped_steps(run):
    folder, results = run("--precision", "fp16")
    losses = [record["losses"]["language"] for record in log_of(folder) if "losses" in record]
    assert losses[-1] < losses[0] and results["precision"] == "float16"


def test_precision_is_chosen_by_what_the_device_has(monkeypatch):
    cuda = torch.device("cuda")
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert train.choose_precision("auto", cuda)[0] == dtype
    assert train.choose_precision("auto", torch.device("cpu"))[0] == torch.float32


def test_a_full_disk_leaves_the_last_state_whole(run, monkeypatch):
    folder, _ = run()
    file = folder / "state" / "state.safetensors"
    before = file.read_bytes()

    def fill_up(tensors, path, *rest):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_file", fill_up)
    model = load(folder)
    with pytest.raises(OSError, match="No space"):
        train.Run(folder).save_state(model, torch.optim.AdamW(model.parameters()), {})
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize("bad, message", [
    (["--data", "artemis_v1", "--data-root", "nowhere"], "artemis_dataset_release_v0.csv is not in nowhere"),
    (["--data", "elsewhere"], "unknown data 'elsewhere'"),
    (["--no-contrastive-head", "--alpha", "1"], "--alpha has no effect with --no-contrastive-head"),
    (["--no-wrong-emotion", "--no-wrong-image"], "the contrastive head needs a negative"),
    (["--width", "33", "--heads", "2"], "width 33 is no multiple of heads 2"),
    (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a GPU"),
    (["--precision", "double"], "there are auto, bf16, fp16 and float32"),
    (["--epochs", "0"], "--epochs must be above 0"),
    (["--top-p", "1.5"], "--top-p 1.5"),
    (["--lexicon", "nowhere.txt"], "nowhere.txt"),
    (["--evaluate", "nowhere"], "nowhere"),
    (["--study", "components", "--no-vad-head"], "itself varies vad_head"),
    (["--resume", "--name", "none"], "holds no run"),
    pytest.param(["--device", "cuda"], "this machine has cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it does")),
])
def test_bad_starts_are_refused(flags, bad, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *bad])
    with pytest.raises(UserError) as refusal:
        train.main()
    assert message in str(refusal.value)


def test_missing_weights_say_what_to_download(toy_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    art = load_art("toy", toy_root, toy_paintings=60)
    plan = train.Plan.of(train.parser().parse_args(["--data-root", str(toy_root), "--toy-paintings", "60"]))
    plan.sources |= {"clip": "someone/nothing"}
    with pytest.raises(UserError, match=r"Download it from\s+https://huggingface.co/someone/nothing and name its folder with --clip"):
        plan.model(dataclasses.replace(art, name="artemis_v1"))


def test_a_used_folder_and_other_flags_on_resuming_are_refused(run, flags, monkeypatch):
    folder, _ = run()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--name", folder.name])
    with pytest.raises(UserError, match=r"is not empty; go on with --resume --name run0"):
        train.main()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--name", folder.name, "--resume", "--lr", "0.5"])
    with pytest.raises(UserError, match=r"--lr 0.5 contradicts .*run0, which began with 0.001"):
        train.main()


def test_a_mistake_ends_with_code_1_and_no_traceback(flags):
    wrong = program(flags, "--device", "tpu")
    assert wrong.wait() == 1
    assert wrong.stdout.read().strip().startswith("error: --device tpu: this machine has ")


def test_a_study_trains_each_variant_once_and_compares_them(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--epochs", "1", "--study", "encoder", "--name", "study"])
    train.main()
    folder = Path(flags[3]) / "study"
    assert {path.name for path in folder.iterdir()} == {"full-0", "raw-VAD-0", "no-VAD-input-0", "results.json", "report.html"}
    assert not json.loads((folder / "no-VAD-input-0" / "config.json").read_text())["sevlm"]["vad_input"]
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {f"{how}: {which}" for how in ("greedy", "nucleus") for which in ("full", "raw VAD", "no VAD input")}
    entry, full = results["greedy: raw VAD"]["BLEU-1"], results["greedy: full"]["BLEU-1"]
    gap = entry["against_full"]
    assert gap["difference"] == pytest.approx(entry["value"] - full["value"]) and 0 < gap["p"] <= 1
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    train.main()
    assert "raw VAD" in capsys.readouterr().out


def test_alpha_of_the_study_that_is_the_full_model_is_not_trained_twice():
    assert list(train.study_variants("alpha", Config())) == ["full", "alpha 0", "alpha 0.5", "alpha 1", "alpha 4"]
    assert len(train.study_variants("ours", Config())) == 7


def test_the_profile_counts_parameters_and_operations(flags):
    work = torch.nn.Linear(30, 20, bias=False)
    assert train.flops(lambda: work(torch.ones(5, 30))) == pytest.approx(2 * 5 * 20 * 30 / 1e9)
    options = train.parser().parse_args([*flags, "--image-size", "16"])
    text = train.profile(train.Plan.of(options))
    tower = 3 * 16 * 8 * 8 + 16 + 5 * 16 + 4 * 16 + 12 * 16 * 16 + 13 * 16  # patches, class, positions, norms, one block
    assert f"{tower:,}" in text and "emotion and explanation" in text

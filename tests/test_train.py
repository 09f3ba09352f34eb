"""The training loop, its run folder, and what it refuses. Tiny models on a toy world of 60 paintings."""
import contextlib
import dataclasses
import html.parser
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from data import Captions, Examples, find_lexicon, find_tokenizer, load_art, load_captions
from sevlm import SEVLM, Config, emotion_log_probs, generate, initialise, load, load_pixels
from support import run as run_module
from support.program import UserError
from support.run import Run, stop_requests
from support.world import World

ROOT = Path(__file__).parents[1]
TINY = ["--toy-paintings", "60", "--tower-width", "16", "--tower-layers", "1", "--tower-heads", "1", "--width", "16", "--layers", "1",
        "--heads", "1", "--batch", "8", "--epochs", "3", "--validate-every", "7", "--warmup", "0", "--precision", "float32", "--device", "cpu"]


@pytest.fixture
def flags(toy_root, tmp_path) -> list[str]:
    return ["--data-root", str(toy_root), "--runs", str(tmp_path), *TINY]


@pytest.fixture
def call(flags, monkeypatch):
    """The program in this process: `call("--lr", "1")`; a flag named twice counts the last time."""
    def start(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *map(str, more)])
        train.main()
    return start


@pytest.fixture
def plain(toy_root, tmp_path, monkeypatch):
    """The program without the flags of a training."""
    def start(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, more), "--runs", str(tmp_path), "--device", "cpu"])
        monkeypatch.setenv("SEVLM_DATA", str(toy_root))
        train.main()
    return start


@pytest.fixture
def run(call, tmp_path):
    """Train in this process: `run("--lr", "1")` returns the run's folder and its results."""
    names = (f"run{number}" for number in itertools.count())

    def start(*more: str) -> tuple[Path, dict]:
        folder = tmp_path / next(names)
        call("--name", folder.name, *more)
        return folder, json.loads((folder / "results.json").read_text())
    return start


def program(flags, *more, launcher=("train.py",), **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *launcher, *flags, *more], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def log_of(folder: Path) -> list[dict]:
    """The log without what depends on the clock and the machine."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("pictures_per_second", "memory_gb")} for record in records]


def steps_of(folder: Path) -> list[dict]:
    return [record for record in log_of(folder) if "losses" in record]


def apart(first: Path, second: Path) -> float:
    """The largest difference between two runs' weights at their ends."""
    one, other = (load_file(folder / "state" / "state.safetensors") for folder in (first, second))
    return max(float((one[name] - other[name]).abs().max()) for name in one if name.startswith("model."))


def same_end(first: Path, second: Path) -> None:
    """Bit for bit the same model, sentences and log."""
    for name in ("model.safetensors", "config.json", "samples.jsonl", "test-greedy.jsonl", "test-nucleus.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert log_of(first) == log_of(second) and apart(first, second) == 0


# Learning

def test_overfits_four_paintings_to_their_sentences(toy, tmp_path):
    kept = [p for p in toy.paintings("train") if len({toy.emotion[r] for r in toy.rows_of(p)}) > 1][:4]
    pairs = [[next(r for r in toy.rows_of(p) if toy.emotion[r] == e) for e in sorted({toy.emotion[r] for r in toy.rows_of(p)})[:2]]
             for p in kept]
    rows = [row for pair in pairs for row in pair]
    four = dataclasses.replace(toy, names=[toy.names[p] for p in kept], split=toy.split[kept], votes=toy.votes[kept],
                               files=[toy.files[p] for p in kept], owner=torch.arange(4).repeat_interleave(2).numpy(),
                               emotion=toy.emotion[rows], texts=[toy.texts[r] for r in rows])
    torch.manual_seed(0)
    model = initialise(SEVLM(Config.toy(tower_layers=1, layers=2, width=64), find_tokenizer(toy, ""), find_lexicon(toy, None)))
    world, settings = World(), train.Settings(lr=3e-3, vad_lr=6e-3, cache=str(tmp_path))
    pictures = train.open_pictures(four, model, settings, world)
    captions = load_captions(toy, model)
    own = Captions(*(getattr(captions, field.name)[rows] for field in dataclasses.fields(Captions)))
    examples = Examples(four, own, model.text, model.lexicon.values, pictures.store, pictures.usable, seed=0)
    learner = train.Learner(model, settings, world, train.parameter_groups(model, settings))
    for number in range(120):
        learner.step([examples.epoch(number, 4)[0]], 1.0)
    model.eval()
    features = model.encode_image(torch.from_numpy(pictures.store.get(range(4)))).repeat_interleave(2, 0)
    found = generate(model, features, [model.text.opening(four.emotions[e]) for e in four.emotion])
    assert [model.text.reason(ids) for ids in found.ids.tolist()] == [model.text.reason(ids) for ids in own.ids.tolist()]


def test_learning_rates_are_the_papers(make_model):
    model, settings = make_model(), train.Settings()
    rest, vad = train.parameter_groups(model, settings)
    assert (rest["base"], vad["base"]) == (2e-5, 4e-5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].split(".")[0] for p in vad["params"]} == {"emotion_encoder", "fusion"}
    assert {names[p].split(".")[0] for p in rest["params"]} == {"decoder", "vad_head", "contrastive_head"}
    assert [train.pace(step, 10, 0) for step in (0, 5, 9)] == [1.0, 0.5, pytest.approx(0.1)]
    assert train.pace(0, 100, 10) == pytest.approx(0.1) and train.pace(9, 100, 10) == pytest.approx(0.91)


def test_a_frozen_tower_stays_as_it_was(run, flags):
    folder, _ = run("--no-train-tower")
    plan = train.Plan.of(train.parser().parse_args([*flags, "--no-train-tower"]))
    before, after = plan.model(plan.art()), load(folder)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]) == name.startswith("tower.") or ".ln_" in name or "norm" in name, name


def test_two_processes_and_accumulation_equal_one(flags, run, tmp_path):
    more = ["--lr", "1e-4", "--vad-lr", "2e-4"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")
    two = program(flags, "--name", "two", *more, launcher=torchrun)
    one, results = run(*more)
    assert two.wait() == 0, two.stdout.read()
    accumulated, _ = run(*more, "--accumulate", "2")
    assert apart(one, tmp_path / "two") < 1e-5 and apart(one, accumulated) < 1e-5
    theirs = json.loads((tmp_path / "two" / "results.json").read_text())
    assert theirs["environment"]["processes"] == 2
    for other in (tmp_path / "two", accumulated):
        assert steps_of(one)[0]["losses"] == pytest.approx(steps_of(other)[0]["losses"], rel=1e-5)
    assert theirs["test"]["greedy"]["counts"] == results["test"]["greedy"]["counts"]


def test_two_machines_without_a_common_disk_equal_one(flags, run, toy_root, tmp_path):
    """Each node has its own copy of the data and its own folder for runs; only the first writes a run."""
    more = ["--lr", "1e-4", "--vad-lr", "2e-4", "--epochs", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for rank in range(2):
        shutil.copytree(toy_root, tmp_path / f"data{rank}", ignore=shutil.ignore_patterns("cache"))
        own = ["--data-root", str(tmp_path / f"data{rank}"), "--runs", str(tmp_path / f"node{rank}"), "--name", "both", *more]
        nodes.append(program(flags, *own, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank),
                             MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    one, _ = run(*more)
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert not (tmp_path / "node1").exists() and apart(one, tmp_path / "node0" / "both") < 1e-5
    for mine, theirs in zip(steps_of(one), steps_of(tmp_path / "node0" / "both"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


# Precision

def test_bf16_loses_less_than_a_hundredth(run):
    """Step by step, at a small size: heads, losses and optimizer stay in float32."""
    sizes = ["--width", "64", "--heads", "4", "--tower-width", "64", "--tower-heads", "4", "--epochs", "5", "--validate-every", "1000"]
    exact, half = (run(*sizes, "--precision", precision)[0] for precision in ("float32", "bf16"))
    pairs = list(zip(steps_of(exact), steps_of(half), strict=True))[:30]
    assert len(pairs) == 30
    for one, other in pairs:
        assert one["losses"] != other["losses"] and other["losses"] == pytest.approx(one["losses"], rel=0.01), one["step"]


def test_fp16_on_a_cpu_learns_skips_and_resumes_bit_for_bit(run, call, tmp_path, monkeypatch):
    half = ["--precision", "fp16", "--validate-every", "1000"]
    whole, results = run(*half)
    losses = [record["losses"]["language"] for record in steps_of(whole)]
    assert losses[-1] < losses[0] and results["environment"]["precision"] == "fp16"
    stop_after(monkeypatch, 2)  # before anything was saved by a validation
    with pytest.raises(UserError, match="stopped after step 2"):
        call("--name", "parts", *half)
    monkeypatch.undo()
    call("--name", "parts", *half, "--resume")
    same_end(whole, tmp_path / "parts")


def stop_after(monkeypatch, step: int) -> None:
    """As if Ctrl-C was pressed during a step."""
    class Asked:
        asks = 0

        def is_set(self) -> bool:
            self.asks += 1
            return self.asks >= step
    monkeypatch.setattr(train, "stop_requests", lambda say: contextlib.nullcontext(Asked()))


def spoil_gradients(monkeypatch, steps) -> None:
    """The gradient of these steps (from 1) is not a number."""
    count, backward = itertools.count(1), train.Learner.backward

    def spoilt(self, parts):
        losses = backward(self, parts)
        if next(count) in steps:
            next(self.model.parameters()).grad.fill_(math.nan)
        return losses
    monkeypatch.setattr(train.Learner, "backward", spoilt)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_gradient_that_is_no_number_is_skipped_and_counted(run, monkeypatch, precision):
    spoil_gradients(monkeypatch, {2, 3, 5})
    folder, results = run("--precision", precision, "--epochs", "1")
    assert results["skipped_steps"] >= 3 and "of them skipped" in (folder / "report.html").read_text()
    assert [record["gradient"] is None for record in steps_of(folder)][1:3] == [True, True]
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())


def test_ten_in_a_row_end_the_run_and_leave_the_last_good_state(call, monkeypatch, tmp_path):
    spoil_gradients(monkeypatch, range(9, 100))
    with pytest.raises(UserError, match=r"step 18: for the 10th time in a row.*keeps its last good state.*The batch: .*-\d{4}"):
        call("--name", "bad")
    state = load_file(tmp_path / "bad" / "state" / "state.safetensors")
    assert len(state) > 10 and all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_weights_that_are_no_numbers_never_replace_good_ones(call, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        call("--name", "hot", "--lr", "1e38", "--vad-lr", "1e38", "--validate-every", "1")
    for file in (tmp_path / "hot").rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file


def test_without_any_number_the_last_weights_are_kept_and_it_is_said(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_: ({"ACC": math.nan}, {}))
    folder, _ = run()
    assert "no validation gave a number: the last weights are kept" in capsys.readouterr().out
    state = load_file(folder / "state" / "state.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, state[f"model.{name}"])


# A run and its folder

def test_a_run_leaves_what_it_promises_and_scores_again_alike(run, plain, tmp_path, capsys):
    folder, results = run()
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "lexicon.txt", "README.md", "state", "log.jsonl", "samples.jsonl",
        "results.json", "report.html", "test-nucleus.jsonl", "test-greedy.jsonl", ".gitignore"}
    steps = steps_of(folder)
    assert [record["step"] for record in steps] == list(range(1, 1 + len(steps)))
    assert set(steps[0]["losses"]) == {"language", "vad", "contrastive"} and len(steps[0]["lr"]) == 2
    assert steps[0]["losses"]["language"] > steps[-1]["losses"]["language"]
    assert 0 < results["best_possible_acc"] <= 1 and results["test"]["greedy"]["counts"]["images"] == len(
        (folder / "test-greedy.jsonl").read_text().splitlines())
    assert "EA (>= half)" in results["test"]["greedy"]
    plain("--toy-paintings", "60", "--evaluate", folder, "--name", "again")
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["test"] == results["test"] and {path.name for path in (tmp_path / "again").iterdir()} == {
        "results.json", "report.html", "test-nucleus.jsonl", "test-greedy.jsonl"}
    assert "BLEU-4" in capsys.readouterr().out
    with pytest.raises(UserError, match="again is there already"):
        plain("--toy-paintings", "60", "--evaluate", folder, "--name", "again")
    with pytest.raises(UserError, match="holds no run to go on with"):
        plain("--resume", "--name", "again")


def test_a_run_can_be_given_away(run, tmp_path):
    """A card with data, scores and terms; nothing that says where on this machine anything is."""
    folder, results = run()
    card = (folder / "README.md").read_text()
    acc = results["test"]["greedy"]
    assert f"{100 * acc['ACC']:.2f} | {100 * acc['intervals']['ACC'][0]:.2f} .. " in card and "random weights" in card
    assert all(emotion in card for emotion in results["emotions"]) and "MIT licence" in card and "- epochs: 3" in card
    public = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    assert (folder / ".gitignore").read_text().split() == ["/state/", "/report.html"]
    for path in public:
        assert str(tmp_path.parent) not in path.read_text(), path
    assert str(tmp_path.parent) in (folder / "state" / "plan.json").read_text()


def test_another_lexicon_is_named_with_its_terms(run, tmp_path):
    (tmp_path / "NRC-VAD.txt").write_text("sky\t0.8\t0.4\t0.5\nsea\t0.7\t0.3\t0.4\n")
    folder, _ = run("--lexicon", tmp_path / "NRC-VAD.txt", "--epochs", "1")
    assert "must not be passed on" in (folder / "README.md").read_text()


def test_the_report_is_one_page_that_needs_nothing_else(run):
    folder, _ = run()
    text, tags = (folder / "report.html").read_text(), []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            for name, value in attributes:
                assert name not in ("src", "href") or value.startswith(("data:", "#")), value
    Reader().feed(text)
    shown = {json.loads(line)["image"] for line in (folder / "samples.jsonl").read_text().splitlines()}
    assert tags.count("polyline") >= 9 and tags.count("article") == len(shown) > 1
    assert "url(http" not in text and "@import" not in text and "EA (&gt;= half)" in text


def test_without_git_and_without_resource_a_run_ends_well(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "resource", None)
    _, results = run("--epochs", "1")
    assert results["environment"]["revision"] == "unknown" and results["memory_gb"] is None


def test_a_killed_run_ends_like_one_that_was_never_stopped(flags, tmp_path):
    whole = program(flags, "--name", "whole")
    assert whole.wait() == 0, whole.stdout.read()
    stops = sorted(random.Random(0).sample(range(1, len(log_of(tmp_path / "whole"))), 3))
    for stop, how in zip(stops, (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)):
        running = program(flags, "--name", "parts", *(["--resume"] if stop != stops[0] else []))
        log = tmp_path / "parts" / "log.jsonl"
        while running.poll() is None and (not log.is_file() or log.read_text().count("\n") < stop):
            time.sleep(0.01)
        running.send_signal(how)
        code, said = running.wait(), running.stdout.read()
        assert code in (-how, 1, 0) and "Traceback" not in said, said  # -how: it came before or after the loop
        assert code != 1 or "stopping after this step" in said and "--resume --name parts goes on" in said
    last = program(flags, "--name", "parts", "--resume")
    assert last.wait() == 0, last.stdout.read()
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_every_write_of_a_run_may_fail_once(call, run, tmp_path, monkeypatch):
    """Each file that is replaced and each line that is appended fails the first time, half written, and the run dies of
    it. Resumed each time, it ends bit for bit like a run that nothing happened to."""
    short = ["--epochs", "2", "--batch", "24", "--validate-every", "2"]
    whole, _ = run(*short)
    parts, replace, failed = tmp_path / "parts", os.replace, set()

    def fail_once(name: str) -> None:
        log = parts / "log.jsonl"
        write = name, log.read_text().count("\n") if log.is_file() else 0  # which of the writes to this file it is
        if write not in failed:
            failed.add(write)
            raise OSError(28, "No space left on device", name)

    def failing_open(path, mode="r", **more):
        if Path(path).suffix == ".jsonl":
            try:
                fail_once(Path(path).name)
            except OSError:
                with open(path, mode) as file:
                    file.write('{"step": 1, "ha')
                raise
        return open(path, mode, **more)

    def failing_replace(source, target):
        fail_once(Path(target).name)
        replace(source, target)
    monkeypatch.setattr(run_module, "open", failing_open, raising=False)
    monkeypatch.setattr(os, "replace", failing_replace)
    while not (parts / "results.json").is_file():
        before = len(failed)
        with contextlib.suppress(OSError):
            call("--name", "parts", *(["--resume"] if parts.exists() else []), *short)
        assert len(failed) == before + 1 or (parts / "results.json").is_file()
        assert not list(tmp_path.glob("**/*.tmp"))
    same_end(whole, parts)
    assert {name for name, _ in failed} == {
        "plan.json", ".gitignore", "log.jsonl", "samples.jsonl", "config.json", "tokenizer.json", "lexicon.txt", "model.safetensors",
        "state.safetensors", "test-greedy.jsonl", "test-nucleus.jsonl", "report.html", "README.md", "results.json"} and len(failed) > 20


def test_the_first_ctrl_c_says_what_happens_and_the_second_does_not_wait(capsys):
    with stop_requests(print) as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set() and "stopping after this step" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stop_requests(print) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_log_is_cut_back_to_whole_lines_and_never_lengthened(tmp_path):
    run = Run.begin(tmp_path / "run", {})
    run.append("log.jsonl", {"step": 1}, {"step": 2})
    run.save_state({"weights": torch.ones(2)}, {"step": 2})
    log = tmp_path / "run" / "log.jsonl"
    run.append("log.jsonl", {"step": 3})
    with open(log, "a") as file:
        file.write('{"step": 4, "los')
    assert run.position() == {"step": 2} and run.records("log.jsonl") == [{"step": 1}, {"step": 2}]
    os.truncate(log, log.stat().st_size - 3)  # a power cut took what the state has counted
    assert run.position() == {"step": 2}
    assert log.read_text() == '{"step": 1}\n'
    run.state_file.unlink()
    assert run.position() == run.tensors() == {} and log.read_text() == ""


def test_a_run_has_one_owner_at_a_time(call, flags, tmp_path):
    call("--name", "mine")
    (tmp_path / "mine" / "results.json").unlink()
    code = "import sys; from pathlib import Path; from support.run import Run\nwith Run(Path(sys.argv[1])).lock(): print('held', flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "mine"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="mine is in use by another program"):
        call("--resume")
    owner.kill()
    owner.wait()
    call("--resume")
    assert (tmp_path / "mine" / "results.json").is_file()


def test_default_names_do_not_collide(call, tmp_path, monkeypatch):
    class Noon(train.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 1, 1, 12)
    monkeypatch.setattr(train, "datetime", Noon)
    monkeypatch.setattr(train, "train", lambda *_: None)
    for _ in range(3):
        call()
    assert {path.name for path in tmp_path.iterdir()} == {"toy-20250101-120000", "toy-20250101-120000-2", "toy-20250101-120000-3"}


def test_resume_takes_the_newest_run_that_is_not_finished(call, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train", lambda run, plan, world: trained.append(run.folder.name))
    monkeypatch.setattr(train, "study", lambda run, plan, world: trained.append(run.folder.name))
    for age, (name, more) in enumerate({"old": [], "new": [], "done": [], "ablations": ["--study", "alpha"]}.items()):
        call("--name", name, *more)
        os.utime(tmp_path / name / "state" / "plan.json", (age, age))
    (tmp_path / "done" / "results.json").write_text("{}")
    (tmp_path / "ablations" / "results.json").write_text("{}")
    call("--resume")
    assert trained.pop() == "new"
    (tmp_path / "new" / "results.json").write_text("{}")
    call("--resume")
    assert trained.pop() == "old"
    (tmp_path / "old" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds no run that is not finished"):
        call("--resume")


def test_what_a_run_began_with_stays(run, call, tmp_path):
    run()
    with pytest.raises(UserError, match=r"run0 is there already; name another one"):
        call("--name", "run0")
    for flag, value, known in (("--lr", "0.5", "0.0015"), ("--alpha", "1.0", "0.1"), ("--seed", "1", "0"), ("--width", "32", "16")):
        with pytest.raises(UserError, match=f"{flag} {value} contradicts .*run0, which began with {known}"):
            call("--name", "run0", "--resume", flag, value)
    call("--name", "run0", "--resume", "--accumulate", "2", "--workers", "0")  # these compute the same


def test_a_run_goes_on_with_its_own_paintings_and_model(run, call, toy_root, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(UserError, match="stopped after step 2 of"):
        call("--name", "parts")
    monkeypatch.undo()
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("sky\t0.8\t0.4\t0.5\nsea\t0.7\t0.3\t0.4\n")
    with pytest.raises(UserError, match="began with another CLIP, tokenizer, lexicon or configuration"):
        call("--name", "parts", "--resume", "--lexicon", lexicon)
    other = tmp_path / "data"
    shutil.copytree(toy_root, other, ignore=shutil.ignore_patterns("cache"))
    art = load_art("toy", other, toy_paintings=60)
    art.files[art.paintings("train")[0]].write_bytes(b"broken")
    with pytest.raises(UserError, match=r"was trained on 50 paintings \(.*\); now there are 49 paintings"):
        call("--name", "parts", "--resume", "--data-root", other)


@pytest.mark.parametrize("file, damage, message", [
    ("state/plan.json", "{", "plan.json, line 1: not JSON"),
    ("state/plan.json", "[]", "plan.json is damaged"),
    ("state/plan.json", "{}", "plan.json is damaged or of another version"),
    ("state/plan.json", ('"lr": 0.0015', '"lr": NaN'), "plan.json: --lr is nan; it must be a finite number"),
    ("state/plan.json", ('"batch": 8', '"batch": 0'), "plan.json: --batch is 0; it must be at least 1"),
    ("state/plan.json", ('"toy_paintings": 60', '"toy_paintings": "many"'), "plan.json is damaged"),
    ("state/state.safetensors", "junk", "state.safetensors is damaged .*delete it, and --resume trains from the beginning"),
    ("log.jsonl", ('"losses"', "losses"), "log.jsonl, line 1: not JSON.*delete it"),
])
def test_a_damaged_file_is_named(run, call, file, damage, message):
    folder, _ = run()
    (folder / "results.json").unlink()
    path = folder / file
    path.write_text(path.read_text().replace(*damage) if isinstance(damage, tuple) else damage)
    with pytest.raises(UserError, match=message) as error:
        call("--name", folder.name, "--resume")
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_last_state_whole(run, monkeypatch):
    folder, _ = run("--epochs", "1")
    file = folder / "state" / "state.safetensors"
    before = file.read_bytes()

    def fill_up(tensors, path, *rest):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(run_module, "save_file", fill_up)
    with pytest.raises(OSError, match="No space"):
        Run(folder).save_state({"weights": torch.ones(1)}, {})
    assert file.read_bytes() == before and {path.name for path in file.parent.iterdir()} == {"plan.json", "state.safetensors", "lock"}
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_pictures_that_cannot_be_used_are_counted_and_priced(call, toy_root, tmp_path, capsys):
    shutil.copytree(toy_root, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    art = load_art("toy", tmp_path / "data", toy_paintings=60)
    test = art.paintings("test")
    decided = [p for p in test if 2 * art.votes[p].max() > art.votes[p].sum()]
    art.files[decided[0]].write_bytes(b"no picture")
    call("--name", "run", "--data-root", tmp_path / "data", "--epochs", "1")
    results, said = json.loads((tmp_path / "run" / "results.json").read_text()), capsys.readouterr().out
    assert list(results["unusable_pictures"]) == [art.names[decided[0]]] and results["test_paintings_without_picture"] == 1
    right = results["test"]["greedy"]["ACC"] * len(decided)
    assert results["their_cost_in_acc"] == pytest.approx(right / (len(decided) - 1) - right / len(decided))
    line = f"1 test paintings have no usable picture; ACC counts them as wrong, which costs it {100 * results['their_cost_in_acc']:.1f} points"
    assert line in said and line in (tmp_path / "run" / "report.html").read_text() and "1 pictures cannot be used, such as" in said


# Saved models

def test_a_saved_model_is_scored_with_the_pictures_of_the_test_split_only(run, plain, toy_root, tmp_path, monkeypatch):
    folder, _ = run("--epochs", "1")
    encoded, fill = [], train.fill_store
    monkeypatch.setattr(train, "fill_store", lambda store, art, model, wanted, *rest: encoded.append(wanted) or fill(store, art, model, wanted, *rest))
    plain("--toy-paintings", "60", "--evaluate", folder, "--cache", tmp_path / "cache", "--name", "again")
    art = load_art("toy", toy_root, toy_paintings=60)
    assert encoded[0].tolist() == art.paintings("test").tolist()


def test_torchrun_evaluates_on_data_that_is_not_there_yet(run, tmp_path):
    folder, _ = run("--epochs", "1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")
    both = program([], "--evaluate", str(folder), "--data-root", str(tmp_path / "fresh"), "--toy-paintings", "60", "--runs", str(tmp_path),
                   "--name", "scored", "--device", "cpu", launcher=torchrun)
    assert both.wait() == 0, both.stdout.read()
    assert json.loads((tmp_path / "scored" / "results.json").read_text())["environment"]["processes"] == 2


def labelled(folder: Path, art, classes) -> dict[str, list[int]]:
    """Toy paintings in a folder for each class, the first of some emotions."""
    found = {}
    for name, emotions in classes.items():
        (folder / name).mkdir(parents=True)
        found[name] = [p for p in range(len(art.names)) if art.emotions[art.votes[p].argmax()] in emotions][:5]
        for p in found[name]:
            shutil.copy(art.files[p], folder / name)
    return found


def test_labelled_folders_are_scored_by_their_own_names_and_by_a_map(run, plain, toy, tmp_path, capsys):
    model_folder, _ = run()
    found = labelled(tmp_path / "labels", toy, {"Happy_mood": ["amusement", "awe", "contentment", "excitement"], "sad": ["sadness", "fear"]})
    (tmp_path / "labels" / "sad" / "broken.jpg").write_bytes(b"junk")
    model = load(model_folder)
    pictures = {p: model.encode_image(load_pixels(toy.files[p], model.config)[None]) for ps in found.values() for p in ps}
    asked = train.adapted(model, emotions=("happy mood", "sad"))
    own = {p: emotion_log_probs(asked, features).argmax(1).item() for p, features in pictures.items()}
    emotions = {p: emotion_log_probs(model, features).exp()[0] for p, features in pictures.items()}
    joy, grief = ([model.text.emotions.index(name) for name in names] for names in (["amusement", "excitement"], ["sadness"]))
    mapped = {p: int(shares[grief].sum() > shares[joy].sum()) for p, shares in emotions.items()}
    for name, more, said in (("own", [], own), ("mapped", ["--map", "Happy_mood=amusement+excitement, sad=sadness"], mapped)):
        plain("--evaluate", model_folder, "--labels", tmp_path / "labels", "--name", name, *more, "--precision", "float32")
        results = json.loads((tmp_path / name / "results.json").read_text())
        right = {label: sum(said[p] == index for p in ps) for index, (label, ps) in enumerate(found.items())}
        assert results["accuracy"]["value"] == pytest.approx(sum(right.values()) / len(pictures))
        assert {label: one["value"] for label, one in results["recall"].items()} == pytest.approx(
            {label: count / len(found[label]) for label, count in right.items()})
        assert np.trace(results["confusion"]) == sum(right.values()) and np.sum(results["confusion"]) == len(pictures)
        assert len(results["unusable_pictures"]) == 1 and len((tmp_path / name / "labels.jsonl").read_text().splitlines()) == len(pictures)
        low, high = results["accuracy"]["interval"]
        assert 0 <= low <= results["accuracy"]["value"] <= high <= 1
    assert "accuracy" in capsys.readouterr().out
    for bad, message in ((["--map", "sad=sadness"], "Happy_mood is a folder there"), (["--map", "Happy_mood=joy,sad=sadness"], "'joy' is none of"),
                         (["--map", "Happy_mood=awe,sad=sadness,angry=anger"], "angry is here, no folder there")):
        with pytest.raises(UserError, match=message):
            plain("--evaluate", model_folder, "--labels", tmp_path / "labels", *bad)


# Own data

@pytest.fixture
def own_data(tmp_path) -> Path:
    """Pictures of four plain colours, four emotions of somebody's own, one of two words."""
    feelings = {"quiet joy": (220, 180, 40), "fear": (20, 20, 40), "anger": (200, 30, 20), "sadness": (40, 70, 160)}
    lines, draw = ["image,emotion,explanation"], np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for number in range(40):
        emotion, colour = list(feelings.items())[number % 4]
        shade = np.clip(np.array(colour) + draw.integers(-20, 20, 3), 0, 255).astype(np.uint8)
        Image.fromarray(np.tile(shade, (24, 24, 1))).save(tmp_path / "own" / f"{number}.png")
        lines += [f"{number}.png,{emotion},the {word} colour makes me feel it" for word in ("whole", "plain")]
    (tmp_path / "own" / "mine.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "own" / "mine.csv"


def test_own_data_and_own_emotions_train_small_and_from_a_run(call, run, own_data, tmp_path):
    small = ["--data", own_data, "--lexicon", ROOT / "toy" / "lexicon.txt"]
    call("--name", "mine", *small, "--small", "--epochs", "1")
    model = load(tmp_path / "mine")
    assert set(model.config.emotions) == {"fear", "anger", "sadness", "quiet joy"}
    assert model.about == {"data": "mine.csv"}
    toy_run, _ = run("--epochs", "1")
    call("--name", "tuned", *small[:2], "--from", toy_run, "--lr", "1e-9", "--vad-lr", "1e-9", "--epochs", "1")
    tuned, before = load(tmp_path / "tuned"), load(toy_run)
    assert set(tuned.config.emotions) == set(model.config.emotions)
    for name, tensor in before.state_dict().items():
        assert torch.allclose(tensor, tuned.state_dict()[name], atol=1e-5), name
    both = ("anger", "sadness")  # what a label of both says is what it said before
    features = before.encode_image(load_pixels(own_data.parent / "0.png", before.config)[None])
    one, other = (emotion_log_probs(train.adapted(m, emotions=both), features) for m in (before, tuned))
    assert torch.allclose(one, other, atol=1e-3)
    assert "the weights of run0" in (tmp_path / "tuned" / "README.md").read_text()


# One step

def test_one_step_shows_the_numbers_of_a_training_step(monkeypatch, capsys):
    """What is printed adds up, fits the page, and is what the loop's own step computes on the same batch."""
    kept = []
    step = train.Learner.backward
    monkeypatch.setattr(train.Learner, "backward", lambda self, parts: (kept.append((self, parts)), step(self, parts))[1])
    monkeypatch.setattr(sys, "argv", ["train.py", "--one-step", "--device", "cpu", "--precision", "float32"])
    train.main()
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    losses = {name: [float(number) for number in numbers] for name, *numbers in re.findall(
        r"^(language|VAD|contrastive|all) \(.*\)(?: +[\d.]+)?? +(\d+\.\d{4}) +(\d+\.\d{4})", text, re.MULTILINE)}
    groups = {name.strip(): (float(norm), float(rate)) for name, norm, rate in re.findall(
        r"^([^\d\n]+?)  +[\d,]+ +([\d.]+) +(\d\.\d+e-\d+)$", text, re.MULTILINE)}
    for when in (0, 1):
        assert losses["all"][when] == pytest.approx(
            losses["language"][when] + losses["VAD"][when] + 0.1 * losses["contrastive"][when], abs=2e-4)
    assert losses["all"][1] < losses["all"][0]
    learner, [batch] = kept[0]
    assert train.losses_of(learner.model, batch, learner.world)["total"] == pytest.approx(losses["all"][1], abs=1e-4)
    assert {name: rate for name, (_, rate) in groups.items()} == pytest.approx(
        {"all other weights": 1.5e-3 / 50, "VAD emotion modelling": 3e-3 / 50})
    assert all(norm > 0 for norm, _ in groups.values())


# Studies

def test_a_study_trains_each_variant_once_and_compares_them(call, tmp_path, monkeypatch, capsys):
    call("--epochs", "1", "--study", "encoder", "--name", "study")
    folder = tmp_path / "study"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"full-0", "raw-VAD-0", "no-VAD-input-0", "state"}
    assert not json.loads((folder / "no-VAD-input-0" / "config.json").read_text())["sevlm"]["vad_input"]
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {f"{how}: {which}" for how in ("greedy", "nucleus") for which in ("full", "raw VAD", "no VAD input")}
    entry, full = results["greedy: raw VAD"]["BLEU-1"], results["greedy: full"]["BLEU-1"]
    gap = entry["against"]
    assert gap["difference"] == pytest.approx(entry["value"] - full["value"]) and 0 < gap["p"] <= gap["holm"] <= 1
    said = capsys.readouterr().out
    assert "p, Holm" in said and "Holm corrects for the 20 p-values of a table" in said and "McNemar" in said
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    call("--resume", "--name", "study", "--epochs", "1")
    assert "raw VAD" in capsys.readouterr().out
    with pytest.raises(UserError, match="--seeds 2 contradicts .*study, which began with 1"):
        call("--resume", "--name", "study", "--study", "encoder", "--seeds", "2", "--epochs", "1")


def test_a_stopped_study_goes_on(call, tmp_path, monkeypatch):
    short = ["--epochs", "1", "--study", "encoder"]
    stop_after(monkeypatch, 3)
    with pytest.raises(UserError, match="stopped after step 3"):
        call("--name", "study", *short)
    monkeypatch.undo()
    call("--resume", *short)
    call("--name", "whole", *short)
    for name in ("full-0", "raw-VAD-0"):
        same_end(tmp_path / "whole" / name, tmp_path / "study" / name)


def test_study_variants_differ_from_the_full_model():
    full = dataclasses.asdict(train.Settings()) | dataclasses.asdict(Config())
    assert list(train.study_variants("alpha", full)) == ["full", "alpha 0", "alpha 0.5", "alpha 1", "alpha 4"]
    assert len(train.study_variants("ours", full)) == 8 and len(train.study_variants("components", full)) == 5


# What is refused

@pytest.mark.parametrize("bad, message", [
    (["--data", "artemis_v1", "--data-root", "nowhere"], "artemis_dataset_release_v0.csv is not in nowhere"),
    (["--data", "elsewhere"], "unknown data 'elsewhere'"),
    (["--no-contrastive-head", "--alpha", "1"], "--alpha has no effect with --no-contrastive-head"),
    (["--no-wrong-emotion", "--no-wrong-image"], "the contrastive head needs a negative"),
    (["--width", "33", "--heads", "2"], "--width 33 is no multiple of --heads 2"),
    (["--lexicon", "nowhere.txt"], "nowhere.txt"),
    (["--evaluate", "nowhere"], "has no effect with --evaluate"),
    (["--study", "components", "--no-vad-head"], "--vad-head has no effect with --study"),
    (["--resume", "--name", "none"], "holds no run to go on with"),
    (["--resume"], "holds no run that is not finished"),
    (["--seeds", "2"], "--seeds has no effect without --study"),
    (["--study", "alpha", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
    (["--labels", "folder"], "--labels has no effect without --evaluate"),
    (["--map", "a=b"], "--map has no effect without --labels"),
    (["--small", "--clip", "somewhere"], "--clip has no effect with --small"),
    (["--from", "run", "--small"], "--small has no effect with --from"),
    (["--from", "nowhere"], "nowhere"),
    (["--one-step"], "has no effect with --one-step"),
    pytest.param(["--device", "cuda"], "this machine has cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it does")),
])
def test_bad_starts_are_refused(call, bad, message):
    with pytest.raises(UserError) as refusal:
        call(*bad)
    assert message in str(refusal.value)


def test_evaluate_cannot_be_combined_with_what_trains(plain):
    for more in (["--resume"], ["--lr", "1"], ["--from", "x"], ["--small"], ["--alpha", "1"], ["--lexicon", "x"]):
        with pytest.raises(UserError, match=f"{more[0]} has no effect with --evaluate"):
            plain("--evaluate", "run", *more)


def wrong_values() -> list[list[str]]:
    """For each setting of a training and of the model, values outside of its range, or of another kind."""
    cases = []
    for kind in (train.Settings, Config):
        for known in dataclasses.fields(kind):
            limits, name = known.metadata, train.flag(known.name)
            if not limits or isinstance(known.default, bool):
                continue
            bad = ["nonsense", ""] if isinstance(known.default, int | float) or limits["choices"] else []
            if isinstance(known.default, float):
                bad += ["nan", "inf", "-inf", "1e999"]
            elif isinstance(known.default, int):
                bad += ["128.5", "1e3", "9" * 400, "-" + "9" * 30]
            bad += [repr(limits[edge] + step) for edge, step in (("least", -1), ("most", 1)) if limits[edge] is not None]
            bad += [repr(limits[edge]) for edge in ("above", "below") if limits[edge] is not None]
            cases += [[f"{name}={value}"] for value in bad]
    return cases


def test_no_wrong_value_gets_through_or_changes_anything(call, tmp_path, capsys):
    cases = wrong_values()
    assert len(cases) >= 120
    for case in cases:
        with pytest.raises((UserError, SystemExit)) as refusal:
            call(*case)
        if isinstance(refusal.value, SystemExit):
            assert refusal.value.code == 2 and case[0].split("=")[0] in capsys.readouterr().err
        else:
            assert case[0].split("=")[0] in str(refusal.value) and "\n" not in str(refusal.value), case
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_with_code_1_and_no_traceback(flags):
    wrong = program(flags, "--device", "tpu")
    assert wrong.wait() == 1
    assert wrong.stdout.read().strip().startswith("error: --device is 'tpu'; there are auto, cpu, cuda, mps")


def test_missing_weights_say_what_to_download(toy_root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    art = load_art("toy", toy_root, toy_paintings=60)
    options = train.parser().parse_args(["--data-root", str(toy_root), "--toy-paintings", "60", "--data", "artemis_v1", "--clip", "someone/nothing"])
    with pytest.raises(UserError, match=r"Download it from\s+https://huggingface.co/someone/nothing and name its folder with --clip"):
        train.Plan.of(options).model(art)

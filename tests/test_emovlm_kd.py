"""EmoVLM-KD: student, distillation loss and gates against the original's numbers; then the program on a small world."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fixture_folder
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import metrics
from data import load_art
from related import emotion_classifier, emovlm_kd, gates
from related.emovlm_kd import Student, distillation_loss
from related.gates import GATES, first_as_good, fit_gate, one_answer, published_gate, sum_gate
from sevlm import save
from support.program import UserError
from train import adapted

FIXTURE = fixture_folder("SEVLM_EMOVLM_KD_FIXTURE", "emovlm_kd")
META = json.loads((FIXTURE / "meta.json").read_text())
C = META["C"]
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def same(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda text: f"{what}: {text}")


def same_gradients(module: nn.Module, gradients: dict[str, Tensor]) -> None:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        same(found[name], gradient, f"gradient of {name}")


# the original's numbers

@pytest.mark.parametrize("name", META["students"])
def test_a_student_is_the_originals(expected, name):
    about, own = META["students"][name], part(expected, f"student.{name}.")
    student = Student(META["E"], C, tuple(about["hidden"])).eval()
    student.load_state_dict(part(own, "weights.distillation_head."))
    assert weights(student) == about["parameters"]
    pictures = expected["features"].split(META["tokens"])  # (tokens, E) each
    same(torch.cat([student(picture[None]) for picture in pictures]), own["logits"], "logits from tokens")
    logits = student(expected["pooled"])
    same(logits, own["logits"], "logits from means")
    same(student.mlp[:2](expected["pooled"]), own["hidden"], "hidden")
    labels, teacher = expected["labels"], expected["teacher_logits"]
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(about["accuracy"])
    same(distillation_loss(logits, teacher, labels, about["alpha"], tau=1).mean(), own["eval_loss"], "evaluation loss")
    loss = distillation_loss(logits, teacher, labels, about["alpha"], about["tau"]).mean()
    same(loss, own["loss"], "loss")
    loss.backward()
    same_gradients(student, part(own, "grad.distillation_head."))


@pytest.mark.parametrize("case", range(len(META["distill"])))
def test_the_distillation_loss_and_its_gradient_are_the_originals(expected, case):
    alpha, tau = META["distill"][case]["alpha"], META["distill"][case]["tau"]
    own, labels, teacher = part(expected, f"distill.{case}."), expected["labels"], expected["teacher_logits"]
    student = expected["distill.student_logits"].clone().requires_grad_()
    each = distillation_loss(student, teacher, labels, alpha, tau)
    same(each, own["loss_each"], "each loss")
    same(distillation_loss(student, teacher, labels, 1, tau), own["kl_each"], "divergence")
    same(distillation_loss(student, teacher, labels, 0, tau), own["ce_each"], "cross entropy")
    same(distillation_loss(student, teacher, labels, alpha, 1), own["eval_loss_each"], "evaluation loss")
    same(each.mean(), own["loss"], "loss")
    [gradient] = torch.autograd.grad(each.sum(), student, retain_graph=True)
    same(gradient, own["grad_each"], "each gradient")
    same(torch.autograd.grad(each.mean(), student)[0], own["grad"], "gradient")
    votes = distillation_loss(student, teacher, F.one_hot(labels, C).float(), alpha, tau)
    same(votes, each, "a unanimous vote and a label")


@pytest.mark.parametrize("name", META["gates"])
def test_a_gate_is_the_originals(expected, name):
    about, own = META["gates"][name], part(expected, f"gate.{name}.")
    gate = GATES[name](C, about["experts"]) if "experts" in about else GATES[name](C)
    gate.load_state_dict(part(own, "weights."))
    assert weights(gate) == about["parameters"]
    output = gate(expected["gate.student_logits"], expected["gate.onehot"])
    same(output, own["output"], "output")
    same(gate(expected["gate.student_probabilities"], expected["gate.soft"]), own["output_soft"], "output of soft inputs")
    labels = expected["gate.labels"]
    assert (output.argmax(1) == labels).float().mean().item() == pytest.approx(about["accuracy"])
    loss = F.cross_entropy(output, labels)
    same(loss, own["loss"], "loss")
    loss.backward()
    same_gradients(gate, part(own, "grad."))


def test_parameters_at_full_size():
    for case in META["counts"]["student"]:
        with torch.device("meta"):
            student = Student(case["E"], case["C"], tuple(case["hidden"]))
        assert weights(student) == case["parameters"]
    for name, by_classes in META["counts"]["gates"].items():
        more = {(), (META["gates"]["MoEGate"]["experts"],)} if name == "MoEGate" else {()}
        for classes, parameters in by_classes.items():
            assert parameters in [weights(GATES[name](int(classes), *experts)) for experts in more]
    assert weights(Student(768, 9)) == 796_681  # on CLIP's features: under a million


# gates on few pictures

@pytest.mark.parametrize("name", GATES)
def test_a_gate_starts_as_the_weighted_sum(name):
    v1, v2 = torch.rand(2, 20, 5, generator=torch.Generator().manual_seed(0)).softmax(2)
    gate = sum_gate(name, 0.7, 2.5, 5, seed=0)
    torch.testing.assert_close(gate(v1, v2), 0.7 * v1 + 2.5 * v2)
    assert all(parameter.requires_grad for parameter in gate.parameters())


def pictures_of_two_experts(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Answers of one who knows classes 0 and 1 and one who knows 2 and 3; for the others each names one of his own."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=draw)

    def answers(known: list[int]) -> Tensor:
        mine = torch.isin(label, torch.tensor(known))
        said = torch.where(mine, label, torch.tensor(known)[torch.randint(2, (count,), generator=draw)])
        sure = torch.where(mine, 1.0, 1.2)  # and is the surer, the less he knows
        return F.one_hot(said, 4) * sure[:, None] * 3
    return answers([0, 1]), answers([2, 3]).log_softmax(1), F.one_hot(label, 4).float()


@pytest.mark.parametrize("name", GATES)
def test_a_gate_learns_whom_to_trust_from_many_pictures(name, monkeypatch):
    monkeypatch.setattr(gates, "STEPS", (0, 100))
    gate = fit_gate(name, *pictures_of_two_experts(300, seed=0))
    expert, decoder, shares = pictures_of_two_experts(1000, seed=1)
    right = (gate(expert, decoder).argmax(1) == shares.argmax(1)).float().mean()
    total = ((expert.log_softmax(1) + decoder).argmax(1) == shares.argmax(1)).float().mean()
    assert gate.steps > 0 and right > total + 0.05


def test_a_gate_stays_a_sum_where_few_pictures_teach_it_nothing():
    draw = torch.Generator().manual_seed(0)
    shares = torch.rand(30, 9, generator=draw).pow(4)
    shares /= shares.sum(1, keepdim=True)
    expert, decoder = ((shares * noise).clamp(1e-3).log().log_softmax(1)
                       for noise in torch.rand(2, 30, 9, generator=draw) + 0.2)
    gate = fit_gate("ConcatLinearGate", expert, decoder, shares)
    assert gate.steps == 0 and gate.form == "logits"


def test_steps_must_pay_by_two_standard_errors():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    losses = torch.ones(400, len(gates.STEPS))
    losses[:, 2] = 0.999 + 0.5 * noise
    assert first_as_good(losses) == 0  # 0.001 better, give or take 0.025
    losses[:, 3] = 0.8 + 0.5 * noise
    assert first_as_good(losses) == 3


def test_the_published_gate_knows_one_answer_drawn_at_its_temperature():
    decoder = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(20_000, -1)
    share = one_answer(decoder, seed=0).mean(0)
    torch.testing.assert_close(share, (decoder[0] / 0.8).softmax(0), atol=0.02, rtol=0)
    expert, decoder, shares = pictures_of_two_experts(200, seed=0)
    first, second = (published_gate(expert, decoder, shares.argmax(1), seed=3, epochs=2) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.equal(other)


# the program, on a toy world of 60 paintings and a model that knows nothing

@pytest.fixture
def world(tmp_path, toy_root, make_model, monkeypatch):
    """A run, the predictions of a teacher, and a way to call the program with them."""
    monkeypatch.setitem(metrics.RECIPE, "epochs", 1)
    monkeypatch.setattr(gates, "STEPS", (0, 5))
    monkeypatch.chdir(tmp_path)
    save(make_model(), tmp_path / "run")
    write_teacher(tmp_path / "teacher.jsonl", load_art("toy", toy_root, toy_paintings=60))

    toy_data = f"--data-root {toy_root} --toy-paintings 60 --teacher teacher.jsonl --epochs 4 --batch 16".split()

    def call(*flags, data=toy_data):
        monkeypatch.setattr(sys, "argv", ["emovlm_kd", "--run", "run", "--precision", "float32", *data, *map(str, flags)])
        return emovlm_kd.main()
    return call


def write_teacher(path: Path, art, order=lambda names: names) -> None:
    """Half of the votes, half of everything."""
    lines = []
    for name, votes in order(list(zip(art.names, art.votes, strict=True))):
        shares = dict(zip(art.emotions, (votes / votes.sum() + 1 / len(votes)).tolist(), strict=True))
        lines.append(json.dumps({"image": name, "probabilities": dict(order(list(shares.items())))}))
    path.write_text("\n".join(lines) + "\n")


def results(run: str = "run") -> dict:
    return json.loads(Path(run, "emovlm_kd-toy", "results.json").read_text())


def numbers(found: dict) -> dict:
    """What does not depend on the clock, or on which files were read."""
    return {name: found[name] for name in ("scores", "exactly one right", "chosen", "against", "sentences")}


def answers_in(path: str) -> dict[str, dict]:
    return {record["image"]: record for record in map(json.loads, Path(path).read_text().splitlines())}


def test_the_table_is_right_and_the_sentence_follows_the_gate(world, toy, capsys):
    world("--as-published")
    text, found = capsys.readouterr().out, results()
    before, after = (answers_in(f"run/emovlm_kd-toy/test-{name}.jsonl") for name in ("before", "after"))
    felt = {toy.names[p]: toy.votes[p] for p in toy.paintings("test")}
    assert before.keys() == after.keys() == felt.keys()
    counted = {name: toy.emotions[votes.argmax()] for name, votes in felt.items() if 2 * votes.max() > votes.sum()}
    for system, said in (("decoder alone", before), (found["chosen"], after)):
        share = np.mean([said[name]["emotion"] == emotion for name, emotion in counted.items()])
        assert found["scores"][system]["ACC"]["value"] == pytest.approx(share)
        for answer in said.values():
            assert answer["emotion"] == max(answer["probabilities"], key=answer["probabilities"].get)
    scores = {name: one["ACC"]["value"] for name, one in found["scores"].items()}
    one = found["exactly one right"]["ACC"]
    assert 2 * scores["whichever is right"] == pytest.approx(scores["decoder alone"] + scores["student"] + one)
    assert found["systems"]["ConcatLinearGate"]["adds"]["parameters"] == weights(Student(24, 9)) + 171
    assert found["sentences"].keys() == {"before", "after"}
    assert all(name in text for name in (*GATES, "teacher", "plain mean", "as published", "McNemar", "ECE", "EA", "Unique"))


def test_a_second_call_trains_nothing_and_a_killed_one_goes_on(world, monkeypatch):
    world()
    whole, log = numbers(results()), Path("run/emovlm_kd-toy/student/log.jsonl").read_text()
    world()
    assert numbers(results()) == whole and Path("run/emovlm_kd-toy/student/log.jsonl").read_text() == log
    shutil.rmtree("run/emovlm_kd-toy")
    calls, loss = [], distillation_loss

    def killed(*given):
        calls.append(given)
        if len(calls) == 10:  # in the second epoch
            raise KeyboardInterrupt
        return loss(*given)
    monkeypatch.setattr(emovlm_kd, "distillation_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        world()
    assert not Path("run/emovlm_kd-toy/results.json").exists()
    monkeypatch.setattr(emovlm_kd, "distillation_loss", loss)
    world()
    assert numbers(results()) == whole and Path("run/emovlm_kd-toy/student/log.jsonl").read_text() == log


def test_another_student_does_not_take_the_place_of_one(world):
    world()
    with pytest.raises(UserError, match="alpha"):
        world("--alpha", 0.3)


def test_the_order_of_classes_on_disk_changes_nothing(world, toy, make_model):
    world()
    expected = numbers(results())
    write_teacher(Path("teacher.jsonl"), toy, order=lambda items: items[::-1])
    save(adapted(make_model(), emotions=toy.emotions[::-1]), "run")
    shutil.rmtree("run/emovlm_kd-toy")
    world()
    found = numbers(results())
    assert found["chosen"] == expected["chosen"]
    for system, scores in expected["scores"].items():
        for score, one in scores.items():
            assert found["scores"][system][score]["value"] == pytest.approx(one["value"], abs=1e-4), (system, score)


def test_a_model_without_contrastive_head_and_vad_needs_neither(world, make_model):
    save(make_model(contrastive_head=False, vad_input=False, vad_head=False), "run")
    world()
    assert results()["scores"]["student"]["ACC"]["value"] is not None


# answers

def test_answers_are_the_gates_and_say_what_each_alone_would(world, toy, capsys):
    world()
    expected = answers_in("run/emovlm_kd-toy/test-after.jsonl")
    painting = toy.paintings("test")[0]
    capsys.readouterr()
    assert world(toy.files[painting], "--json", "--greedy", data=[]) == 0
    found, same = json.loads(capsys.readouterr().out), expected[toy.names[painting]]
    for emotion, share in same["probabilities"].items():
        assert found["probabilities"][emotion] == pytest.approx(share, abs=0.02)  # from features of 16 bits
    assert found["emotion"] == same["emotion"]
    decoder = answers_in("run/emovlm_kd-toy/test-before.jsonl")[toy.names[painting]]["emotion"]
    assert found["note"].startswith(f"The decoder alone says {decoder} (") and "the expert " in found["note"]
    world(toy.files[painting], "--html", "page.html", data=[])
    assert "The decoder alone says" in capsys.readouterr().out and "The decoder alone says" in Path("page.html").read_text()


def test_an_answer_of_another_expert_is_asked_again(world, toy):
    picture = toy.files[toy.paintings("test")[0]]
    for seed, answers in ((0, 1), (0, 1), (1, 2)):
        shutil.rmtree("run/emovlm_kd-toy", ignore_errors=True)
        world("--seed", seed)
        world(picture, "--out", "answers.jsonl", data=[])
        assert len(Path("answers.jsonl").read_text().splitlines()) == answers


# labelled pictures

def paint(folder: Path, classes: dict[str, str], order: int = 1) -> None:
    """Plain pictures of each class's colour, a little different each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for label in sorted(classes)[::order]:
            (folder / split / label).mkdir(parents=True)
        for label in sorted(classes):
            for number in range(count):
                pixels = np.full((20, 20, 3), Image.new("RGB", (1, 1), classes[label]).getpixel((0, 0)))
                noisy = (pixels + rng.integers(-40, 40, pixels.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / split / label / f"{number}.png")


COLOURS = {"quiet_joy": "#f0d040", "anger": "#c02010", "sadness": "#2040a0"}


def label_teacher(folder: Path, path: Path, classes=("quiet joy", "anger", "sadness")) -> None:
    lines = []
    for file in sorted(folder.glob("*/*/*.png")):
        label = file.parent.name.replace("_", " ")
        lines.append(json.dumps({"image": file.relative_to(folder).as_posix(),
                                 "probabilities": {name: 0.8 if name == label else 0.1 for name in classes}}))
    path.write_text("\n".join(lines))


def test_labelled_pictures_train_without_sentences_in_any_order(world, capsys):
    found = []
    for name, order in (("one", 1), ("other", -1)):
        paint(Path(name), COLOURS, order)
        label_teacher(Path(name), Path("teacher.jsonl"))
        world(data=["--labels", name, "--teacher", "teacher.jsonl"])
        found.append(json.loads(Path(f"run/emovlm_kd-{name}/results.json").read_text()))
    assert found[0]["emotions"] == ["anger", "quiet joy", "sadness"] and "sentences" not in found[0]
    assert found[0]["scores"] == found[1]["scores"]
    assert found[0]["scores"]["student"]["ACC"]["value"] > 0.9
    capsys.readouterr()
    world("one/test/anger/0.png", "--json", data=[])
    assert json.loads(capsys.readouterr().out)["probabilities"].keys() == set(found[0]["emotions"])


def test_a_teacher_is_trained_where_there_is_none(world, monkeypatch):
    monkeypatch.setattr(emotion_classifier, "preset", lambda art: dict(side=32, released=0, epochs=1, batch=18))
    paint(Path("pictures"), COLOURS)
    world("--resnet", "none", data=["--labels", "pictures", "--epochs", "2"])
    found = json.loads(Path("run/emovlm_kd-pictures/results.json").read_text())
    assert found["systems"]["teacher"]["adds"]["parameters"] > 21e6
    assert len(Path("runs/pictures-emotions/predictions.jsonl").read_text().splitlines()) == 60


# what is wrong is said

def test_errors(world, toy, toy_root, make_model):
    teacher = Path("teacher.jsonl").read_text()
    with pytest.raises(UserError, match="no expert yet"):
        world(toy.files[0], data=[])
    with pytest.raises(UserError, match="no such folder|no SEVLM checkpoint"):
        world("--run", "nowhere")
    with pytest.raises(UserError, match="--html.*name pictures"):
        world("--html", "page.html")
    Path("teacher.jsonl").write_text(teacher.replace('"awe"', '"boredom"'))
    with pytest.raises(UserError, match="teacher.jsonl.*awe"):
        world()
    Path("teacher.jsonl").write_text("\n".join(teacher.splitlines()[:-1]))
    if toy.names[-1] in {toy.names[p] for split in ("train", "val", "test") for p in toy.paintings(split)}:
        with pytest.raises(UserError, match=f"says nothing of 1 .* such as {toy.names[-1]}"):
            world()
    Path("teacher.jsonl").write_text(teacher)
    world()
    save(make_model(alpha=1.0), "run")
    with pytest.raises(UserError, match="no longer there"):
        world(toy.files[0], data=[])


def test_pictures_that_cannot_be_used(world, toy, toy_root, tmp_path):
    broken = tmp_path / "data" / "toy-60"
    shutil.copytree(toy_root / "toy-60", broken, ignore=shutil.ignore_patterns("cache"))
    files = {split: [broken / toy.files[p].relative_to(toy_root / "toy-60") for p in toy.paintings(split)]
             for split in ("train", "val")}
    data = ["--data-root", str(broken.parent), "--toy-paintings", "60", "--teacher", "teacher.jsonl", "--epochs", "2"]
    files["train"][0].write_bytes(b"no picture")
    world(data=data)
    assert len(results()["unusable pictures"]) == 1
    shutil.rmtree("run/emovlm_kd-toy")
    for file in files["val"]:
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no two val pictures that can be used"):
        world(data=data)


def test_classes_without_pictures(world, tmp_path):
    data = ["--labels", "pictures", "--teacher", "teacher.jsonl"]
    paint(Path("pictures"), COLOURS)
    label_teacher(Path("pictures"), Path("teacher.jsonl"), (*COLOURS, "fear"))
    (Path("pictures") / "train" / "fear").mkdir()
    with pytest.raises(UserError, match="no pictures in .*fear"):
        world(data=data)
    (Path("pictures") / "train" / "fear").rmdir()
    shutil.copytree(Path("pictures") / "test" / "anger", Path("pictures") / "test" / "fear")
    label_teacher(Path("pictures"), Path("teacher.jsonl"), ("quiet joy", "anger", "sadness", "fear"))
    with pytest.raises(UserError, match="no training picture .* class fear"):
        world(data=data)
    shutil.rmtree("pictures/val")
    with pytest.raises(UserError, match="no such folder"):
        world(data=data)

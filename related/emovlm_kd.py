"""EmoVLM-KD: a small expert beside the language model, and a gate between them (Lee, Lee and Park, 2025).

A model that explains pictures and a classifier that only names the emotion err on different ones. So the classifier,
the teacher, is distilled into a student of under a million weights, which reads the patch features that the model has
computed anyway; and a gate merges what the two say. Here SEVLM is the language model, ResNet-34 the teacher.

    1. Student         patch features -> logits                                   (B, K, d) or (B, d) -> (B, C)
    2. Distillation    the student learns what the teacher says, and what people felt
    3. The table       decoder, teacher, student, mean, gates: how often right, how sure, at what cost
    4. Answers         those of sample.py, with the gate's emotion
    5. Program

gates.py has the five gates and how they are fitted; said.py, what teacher and decoder say of every picture. Other than
in the original, the gate is fitted on pictures that nobody was trained on and knows the decoder's probabilities, not
one answer that it drew (--as-published shows what that costs); and the sentence follows the gate.

    python -m related.emovlm_kd --data toy --run RUN      train what is missing, print the table
    python -m related.emovlm_kd --labels FI --run RUN     the same for FI/{train,val,test}/CLASS/, without sentences
    python -m related.emovlm_kd PICTURES --run RUN        answer

Shapes: B pictures, K patches, d their width, C classes. The order of the classes is the data's, everywhere.
"""
import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data import Art, add_data_options, art_of
from metrics import evaluate, references_of, text_classifier_of
from related import emotion_classifier
from related.comparison import RULES, System, chance, cost, cost_table, jointly, score_table, scores_of, told
from related.gates import GATES, Fitted, first_as_good, fit_gate, one_answer, published_gate
from related.said import Said, explained, labelled_pictures, said_of, stored_features
from related.training import CONFIG, WEIGHTS, Machine, config_of, descend, finish, fit, load_weights, opened
from sample import Wish, add_options, find_checkpoint, fingerprint, introduce, respond
from sevlm import SEVLM, emotion_log_probs, load_model
from support.program import UserError, progress, read_json, replacing, run_program, write_json
from support.records import finite_only
from support.scores import how_tested, p_values
from support.settings import add_flags, check, flag, given, option
from support.store import Store
from train import adapted, write_predictions

SYSTEM, FOLDER = "EmoVLM-KD", "emovlm_kd-{data}"  # the folder is in that of the run whose features the expert reads
WIDTHS = (1024, 512, 256, 128, 64)


@dataclass
class Settings:
    """How the student is trained. Published: rate 1e-5, one picture a step, five epochs, the last one kept."""
    depth: int = option(1, f"hidden layers of the student, the first of {', '.join(map(str, WIDTHS))}", least=1,
                        most=len(WIDTHS))
    alpha: float = option(0.5, "weight of what the teacher says; what people felt has the rest", least=0, most=1)
    tau: float = option(2.0, "temperature of teacher and student while the one learns from the other", above=0)
    rate: float = option(3e-3, "Adam's learning rate", above=0)
    batch: int = option(64, "pictures of a step", least=1)
    epochs: int = option(60, "passes over the training pictures, at most", least=1)
    patience: int = option(8, "stop after so many epochs in a row without a lower validation loss", least=1)

    def __post_init__(self):
        check(self)


# 1. Student

class Student(nn.Module):
    """Linear, exact GELU and dropout for each hidden layer; raw logits at the end."""

    def __init__(self, width: int, classes: int, hidden: Sequence[int] = WIDTHS[:1], dropout: float = 0.1):
        super().__init__()
        layers = []
        for inputs, outputs in zip([width, *hidden], hidden):
            layers += [nn.Linear(inputs, outputs), nn.GELU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], classes))

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (B, K, d), or their means (B, d)."""
        return self.mlp(features.mean(1) if features.dim() == 3 else features)


# 2. Distillation

def distillation_loss(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.5, tau: float = 2.0) -> Tensor:
    """Each picture's loss (B,) from logits (B, C) of both and a class (B,), or shares of the votes (B, C).

    The gradient of the divergence shrinks with tau squared, so it is multiplied by that.
    """
    log_q, log_r = (F.log_softmax(logits / tau, 1) for logits in (teacher, student))
    divergence = (log_q.exp() * (log_q - log_r)).sum(1)  # KL(teacher || student)
    return alpha * tau**2 * divergence + (1 - alpha) * F.cross_entropy(student, target, reduction="none")


def train_student(folder: Path, said: Mapping[str, Said], settings: Settings, seed: int, about: dict) -> Student:
    """The student that did best on the validation split; trained once, and resumed by epochs."""
    torch.manual_seed(seed)
    train, val = said["train"], said["val"]
    student = Student(train.pooled.shape[1], train.votes.shape[1], WIDTHS[:settings.depth])
    optimizer = torch.optim.Adam(student.parameters(), settings.rate, weight_decay=1e-4)

    def loss_of(split: Said, pictures: Tensor | slice, tau: float) -> Tensor:
        return distillation_loss(student(split.pooled[pictures]), split.teacher[pictures], split.shares[pictures],
                                 settings.alpha, tau).mean()

    def epoch(_) -> float:
        total = 0.0
        for pictures in torch.randperm(len(train.votes)).split(settings.batch):
            total += len(pictures) * descend(optimizer, loss_of(train, pictures, settings.tau))
        return total / len(train.votes)

    @torch.no_grad()
    def validate() -> float:
        return loss_of(val, slice(None), tau=1.0).item()

    learned_from = {split: said[split].digest() for split in ("train", "val")}
    config = {"system": f"{SYSTEM}'s student", **about, **learned_from, "seed": seed, **asdict(settings)}
    with opened(folder, config) as run:
        if not run.finished:
            losses = fit(run, student, optimizer, epoch, validate, settings.epochs, settings.patience, seed)
            finish(run, {"epochs": len(losses), "validation loss": min(losses)})
    load_weights(student, folder)
    return student.eval()


# 3. The table

OF_SENTENCES = ("EA", "EA (>= half)", "BLEU-4", "Unique")
DECODER, STUDENT, PUBLISHED = "decoder alone", "student", "as published"


def systems_of(said: Mapping[str, Said], student: Student, gates: Sequence[Fitted], teacher: str | Path, patches: int
               ) -> dict[str, System]:
    """All with their answers on the test split."""
    test, picture = said["test"], torch.rand(1, patches, said["test"].pooled.shape[1])
    with torch.no_grad():
        logits = student(test.pooled)
    alone, mean = cost(lambda: student(picture), student), (logits.softmax(1) + test.decoder.exp()) / 2
    found = {DECODER: System(test.decoder), "teacher": System(test.teacher, cost_of_teacher(teacher)),
             STUDENT: System(logits, alone), "plain mean": System(mean.log(), alone)}
    for gate in gates:
        both = cost(lambda gate=gate: gate(student(picture), test.decoder[:1]), student, gate.gate)
        note = "{:.2f} student + {:.2f} decoder, {}, and {} steps".format(*gate.start, gate.form, gate.steps)
        found[gate.name] = System(gate(logits, test.decoder), both, note)
    return found


def cost_of_teacher(teacher: str | Path) -> dict[str, float]:
    """As its run has measured it; a file of predictions does not say."""
    path = Path(teacher) / "results.json"
    if not path.is_file():
        return {}
    known = read_json(path)
    return {"parameters": known["parameters"], "GFLOP": known["gflop"], "ms": 1e3 / known["pictures_per_second"]}


def published(said: Mapping[str, Said], student: Student, seed: int) -> System:
    """The default gate, fitted where student and decoder were trained; it knows one answer of the decoder."""
    with torch.no_grad():
        logits = {split: student(said[split].pooled) for split in ("train", "test")}
    gate = published_gate(logits["train"], said["train"].decoder, said["train"].votes.argmax(1), seed)
    with torch.no_grad():
        return System(gate(logits["test"], one_answer(said["test"].decoder, seed)), note="fitted on the training split")


def compared(systems: Mapping[str, System], chosen: str, test: Said, emotions: Sequence[str]) -> dict:
    """The table in numbers. The chosen gate stands besides against the better of its inputs, and the published gate."""
    scores = {name: scores_of(system.log_probs, test.votes, emotions) for name, system in systems.items()}
    decoder, student = scores[DECODER], scores[STUDENT]
    better = max((DECODER, STUDENT), key=lambda name: scores[name]["ACC"].value)
    against = {name: {"difference": scores[chosen]["ACC"].value - scores[name]["ACC"].value,
                      "p": p_values(scores[chosen], scores[name]).get("ACC")}
               for name in (better, PUBLISHED) if name in scores}
    return {"scores": told(scores | {"whichever is right": jointly(np.maximum, decoder, student)}),
            "systems": {name: {"adds": system.adds, "note": system.note} for name, system in systems.items()},
            "exactly one right": {rule: one.value for rule, one in jointly(np.not_equal, decoder, student).items()},
            "chosen": chosen, "against": against, "how tested": how_tested(decoder)}


def sentences(folder: Path, art: Art, model: SEVLM, features: Store, test: Said, systems: Sequence[System],
              machine: Machine) -> dict[str, dict]:
    """What the decoder says of its own emotion, and of the gate's. (The original keeps its first text.)"""
    found = {name: explained(art, model, features, test.paintings, system.log_probs.log_softmax(1), machine)
             for name, system in zip(("before", "after"), systems, strict=True)}
    write_predictions(folder, found)
    judge, references = text_classifier_of(art, train=True), references_of(art, "test")
    return told({name: evaluate(each, references, art.emotions, judge) for name, each in found.items()})


def summary(results: Mapping) -> str:
    one = " and ".join(f"{100 * share:.1f}% ({RULES[rule]})" for rule, share in results["exactly one right"].items())
    found = [f"Of the pictures that count exactly one of decoder and student is right about {one}.",
             f"Validation chose {results['chosen']}. Its ACC differs from that of"]
    found += [f"    {name:13} by {100 * gap['difference']:+.2f}, p {chance(gap['p'])}"
              for name, gap in results["against"].items()]
    parts = [score_table(results["scores"], list(RULES)), cost_table(results["scores"], results["systems"]),
             "\n".join(found)]
    if "sentences" in results:
        parts += ["The sentence for the decoder's own emotion, and for the gate's:",
                  score_table(results["sentences"], OF_SENTENCES)]
    return "\n\n".join([*parts, results["how tested"]])


# 4. Answers

class Expert:
    """The student and the gate of a folder, for the model with this fingerprint."""

    def __init__(self, folder: Path, identity: str):
        config = config_of(folder, SYSTEM)
        if config["decoder"] != identity:
            raise UserError(f"{folder} is the expert of a model that is no longer there; delete it, and train another")
        self.emotions, classes = config["emotions"], len(config["emotions"])
        self.student, gate = Student(config["width"], classes, config["hidden"]).eval(), GATES[config["gate"]](classes)
        load_weights(self.student, folder / "student")
        load_weights(gate, folder)
        self.gate = Fitted(config["gate"], config["reads"], config["start"], config["steps"], gate)

    def __call__(self, model: SEVLM, features: Tensor) -> tuple[Tensor, list[str]]:
        """What sample.py asks for: log-probabilities (B, C), and a line about each picture."""
        decoder, pooled = (x.float().cpu() for x in (emotion_log_probs(model, features), features.float().mean(1)))
        with torch.autocast("cpu", enabled=False):  # a head of float32, as the model's own
            logits = self.student(pooled)
            fused = self.gate(logits, decoder)
        alone = [[f"{self.emotions[int(one.argmax())]} ({one.max():.0%})" for one in each]
                 for each in (decoder.exp(), logits.softmax(1))]
        return fused, [f"The decoder alone says {one}, the expert {other}." for one, other in zip(*alone, strict=True)]


def newest_expert(run: Path) -> Path:
    found = sorted(run.glob(f"{FOLDER.format(data='*')}/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{run} has no expert yet; python -m related.emovlm_kd --data NAME --run {run} trains one")
    return found[-1].parent


def answer(run: Path, options: argparse.Namespace) -> int:
    model, folder = load_model(run), newest_expert(run)
    expert, about = Expert(folder, fingerprint(model)), f"{introduce(model, run)}, with {folder.name}"
    model = adapted(model, emotions=expert.emotions)
    model.about["expert"] = read_json(folder / CONFIG)  # earlier answers (--out) are those of model and expert
    return respond(model, about, options, expert)


# 5. Program

def train_expert(run: Path, options: argparse.Namespace) -> dict:
    """Train what is missing, and compare all on the test split."""
    settings, seed = Settings(**given(options, Settings)), given(options, Wish).get("seed", 0)
    art = labelled_pictures(Path(options.labels)) if options.labels else art_of(options)
    model, folder = load_model(run), run / FOLDER.format(data=art.name)
    identity, teacher = fingerprint(model), options.teacher or teacher_of(art, options.resnet)
    machine = Machine.chosen(options.device, options.precision, model.config.width)
    model = adapted(model, emotions=art.emotions, train_tower=False).to(machine.device)
    features, problems = stored_features(art, model, machine)
    asked = ("train", "val", "test") if options.as_published else ("val", "test")
    said = said_of(art, model, identity, features, teacher, machine, asked)
    about = {"data": art.name, "emotions": art.emotions, "decoder": identity, "width": model.config.tower_width,
             "hidden": WIDTHS[:settings.depth]}
    student = train_student(folder / "student", said, settings, seed, about)
    with torch.no_grad():
        logits = student(said["val"].pooled)
    gates = [fit_gate(name, logits, said["val"].decoder, said["val"].shares, seed)
             for name in progress(list(GATES), "gates")]
    best = gates[first_as_good(torch.stack([gate.losses for gate in gates], 1))]
    systems = systems_of(said, student, gates, teacher, model.config.patches)
    if options.as_published:
        systems[PUBLISHED] = published(said, student, seed)
    results = about | compared(systems, best.name, said["test"], art.emotions) | {"unusable pictures": problems}
    if art.texts:
        both = systems[DECODER], systems[best.name]
        results["sentences"] = sentences(folder, art, model, features, said["test"], both, machine)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(best.gate.state_dict(), temporary)
    write_json(folder / "results.json", finite_only(results))
    write_json(folder / CONFIG, {"system": SYSTEM, **about, "gate": best.name, "reads": best.form, "start": best.start,
                                 "steps": best.steps})
    return results


def teacher_of(art: Art, resnet: str | None) -> Path:
    """The ResNet's run on this data, trained if there is none."""
    folder = Path("runs") / f"{art.name}-emotions"
    settings = emotion_classifier.Settings(**emotion_classifier.preset(art) | {"resnet": resnet}) if resnet else None
    emotion_classifier.trained(folder, art, settings)
    return folder


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="python -m related.emovlm_kd", allow_abbrev=False,
                                     description="Distil a classifier into an expert beside a model, and ask both.")
    add_options(parser)
    add_data_options(parser)
    parser.add_argument("--labels", metavar="FOLDER", help="FOLDER/{train,val,test}/CLASS/ instead of --data")
    parser.add_argument("--run", type=Path, metavar="RUN", help="of train.py (default: the newest, else examples/toy)")
    parser.add_argument("--teacher", metavar="RUN", help="of related.emotion_classifier, or a file of predictions "
                                                         "(default: runs/DATA-emotions, trained if there is none)")
    parser.add_argument("--resnet", metavar="SOURCE", help="what a new teacher starts from: ImageNet's weights in a "
                                                           "file or folder or on the hub, or none")
    parser.add_argument("--as-published", action="store_true", help="also fit a gate as the original's was")
    add_flags(parser, "training the expert", Settings)
    options = parser.parse_args()
    run = options.run or find_checkpoint()
    if options.pictures or options.serve is not None:
        return answer(run, options)
    answering = {"out", "html", "heatmap", *given(options, Wish)} - {"seed"}
    if idle := [flag(name) for name in sorted(answering) if getattr(options, name)]:
        raise UserError(f"{', '.join(idle)}: name pictures to answer")
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way; the result alone can be piped
        results = train_expert(run, options)
    print(json.dumps(finite_only(results), indent=1) if options.json else summary(results))
    return None


if __name__ == "__main__":
    run_program(main)

"""The emotion classifier, Show, Attend and Tell, and M2 against numbers from their original code, and what these do not
reach. SEVLM_SAT_FIXTURE and SEVLM_M2_FIXTURE name other folders of the same formats.
"""
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

torchvision = pytest.importorskip("torchvision")
from related import emotion_classifier, mesh
from related import meshed_memory as m2
from related import show_attend_tell as sat
from related.captions import Vocabulary, emotions_for
from related.emotion_classifier import (
    EmotionClassifier,
    accuracies,
    divergence,
    head,
    load_trunk,
    read_logits,
    shares,
)
from related.resnet import normalise, pixels_of, squash, trunk
from related.training import best_epoch, finished, fit, opened
from support.files import load_checked, read_tensors, renamed
from support.program import UserError

ROOT = Path(__file__).parents[1]
FIXTURE = Path(os.environ.get("SEVLM_SAT_FIXTURE") or Path(__file__).parent / "fixtures" / "show_attend_tell")
META = json.loads((FIXTURE / "meta.json").read_text())
TENSORS = read_tensors(FIXTURE / "expected.safetensors")
SPEAKER_NAMES = [(r"^decoder\.", ""), (r"^word_embedding", "embedding"), (r"^auxiliary_net\.0", "emotion"),
                 (r"^decode_step", "cell"), (r"^attention\.encoder_att", "key"), (r"^attention\.decoder_att", "query"),
                 (r"^attention\.full_att", "attention"), (r"^init_([hc])", r"start_\1"), (r"^f_beta", "gate"),
                 (r"^next_word", "output")]
CLASSIFIER_NAMES = [(r"^img_encoder\.resnet", "trunk"), (r"^clf_head\.net", "head")]
MODELS = tuple(META["models"])


def close(ours, theirs, absolute=1e-5, relative=0.0):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=absolute, rtol=relative,
                               check_dtype=False)


def under(prefix):
    return {key[len(prefix):]: tensor.clone() for key, tensor in TENSORS.items() if key.startswith(prefix)}


class Case:
    """One of the fixture's models as ours, and what is put into it."""

    def __init__(self, name):
        self.name, self.meta, sizes, self.given = name, META["models"][name], META["models"][name]["sizes"], under(f"{name}.")
        self.speaker = sat.Speaker(sizes["vocabulary"], sizes["channels"], sizes["emotions"], sizes["embedding"], sizes["hidden"],
                                   sizes["attention"], sizes["emotion_features"], self.meta["dropout"]).eval()
        load_checked(self.speaker, renamed(under(f"{name}.weights."), SPEAKER_NAMES), name)
        self.vocabulary, self.grid = Vocabulary(self.meta["vocabulary"]), sizes["grid"]
        self.pixels = pixels_of(self.given["trunk_map"], sizes["pool_to"])
        self.tokens, self.emotion = self.given["tokens"], self.given.get("emotion")
        self.hidden = sizes["hidden"]

    def scene(self, rows=slice(None)):
        return self.speaker.scene(self.pixels[rows], None if self.emotion is None else self.emotion[rows])

    def teach(self, rows=slice(None)):
        return sat.teach(self.speaker, self.scene(rows), self.tokens[rows])

    def told(self, rows, tokens):
        """Logits after each of these tokens, and where the speaker attended."""
        hidden, alphas = self.speaker(self.scene(rows), tokens)
        return self.speaker.output(hidden), alphas

    def compare(self, lesson, prefix=""):
        logits = self.given[f"{prefix}logits"]
        close(lesson.logits, logits[lesson.spoken])
        close(lesson.alphas * lesson.spoken[:, :, None], self.given[f"{prefix}alphas"])
        assert not logits[~lesson.spoken].any()


@pytest.fixture(params=MODELS)
def case(request):
    with torch.set_grad_enabled("step" in request.node.name):
        yield Case(request.param)


def test_words_rows_and_output_bias(case):
    meta, vocabulary = case.meta, sat.vocabulary_of(case.meta["texts"], case.meta["min_count"])
    assert list(vocabulary.words) == meta["vocabulary"] and vocabulary.index.get("and", sat.UNKNOWN) == meta["and_id"]
    assert sat.rows_of(meta["extra_texts"], vocabulary, meta["max_len"]).tolist() == meta["extra_rows"]
    rows = sat.rows_of(meta["texts"], vocabulary, meta["max_len"])
    assert rows.tolist() == meta["rows"]
    close(sat.output_bias(rows, len(vocabulary)), case.given["token_bias"])
    close(sat.output_bias(rows[:meta["part"]], len(vocabulary)), case.given["token_bias_part"])
    assert sat.lengths_of(case.tokens).tolist() == case.given["lengths"].tolist()


def log_probs(lesson, temperature=1.0):
    """ln p of each word to be predicted, where it stands: (B, L), 0 elsewhere."""
    logs = -F.cross_entropy(lesson.logits / temperature, lesson.targets, reduction="none")
    return logs.new_zeros(lesson.spoken.shape).masked_scatter(lesson.spoken, logs)


def test_teacher_forcing(case):
    close(case.pixels.unflatten(1, (case.grid, -1)), case.given["feature_map"])
    case.compare(case.teach())
    batch, total, count = case.meta["nll_two_batches"]["batch"], 0.0, 0
    for start in range(0, len(case.tokens), batch):
        lesson = case.teach(slice(start, start + batch))
        total, count = total - float(log_probs(lesson).sum()), count + len(lesson.targets)
    close(total / count, case.meta["nll_two_batches"]["value"])


def test_one_training_step(case):
    meta, lesson = case.meta["training_step"], case.teach()
    cross_entropy, attention = F.cross_entropy(lesson.logits, lesson.targets), meta["alpha_c"] * sat.attention_loss(lesson)
    close(cross_entropy, meta["cross_entropy"])
    close(attention, meta["attention_term"])
    meant = case.given["lengths"] / case.pixels.shape[1]  # theirs was a whole number, which changes no gradient
    close(attention + meta["alpha_c"] * (meant - meant.floor()).square().mean(), meta["attention_term_as_run"])
    optimizer = torch.optim.Adam(case.speaker.parameters(), meta["learning_rate"])
    (cross_entropy + attention).backward()
    ours = {name: float(weight.grad.norm()) for name, weight in case.speaker.named_parameters()}
    theirs = renamed({name: torch.tensor(norm) for name, norm in meta["grad_norms"].items()}, SPEAKER_NAMES)
    assert ours.keys() == theirs.keys()
    for name, norm in ours.items():
        close(norm, theirs[name], 1e-6, 1e-4)
    close(torch.nn.utils.clip_grad_norm_(case.speaker.parameters(), meta["grad_clip"]), meta["grad_norm"], 1e-6, 1e-4)
    close(torch.nn.utils.get_total_norm([weight.grad for weight in case.speaker.parameters()]), meta["grad_norm_clipped"], 1e-6, 1e-4)
    optimizer.step()
    after, weights = renamed(under(f"{case.name}.after_step."), SPEAKER_NAMES), case.speaker.state_dict()
    assert after
    for name, tensor in after.items():
        close(weights[name], tensor, 2e-5)


class Masks(torch.nn.Module):
    """Dropout with the fixture's masks of h instead of its own, one for each step."""

    def __init__(self, keep, rate):
        super().__init__()
        self.left, self.rate = iter(keep.unbind(1)), rate

    def forward(self, h):
        return h * next(self.left) / (1 - self.rate)


def test_dropout_thins_what_the_next_word_starts_from(case):
    case.speaker.dropout = Masks(case.given["dropout.keep"], case.meta["dropout"])
    case.compare(case.teach(), "dropout.")


@pytest.mark.parametrize("name", [name for name in MODELS if "perplexity" in META["models"][name]])
@torch.no_grad()
def test_log_probabilities_and_perplexity(name):
    case = Case(name)
    lesson = case.teach()
    for i, temperature in enumerate(case.meta["log_prob_temperatures"]):
        logs = log_probs(lesson, temperature)
        close(F.pad(logs, (0, case.given[f"log_probs.{i}"].shape[1] - logs.shape[1])), case.given[f"log_probs.{i}"])
    bits = log_probs(lesson).sum() / math.log(2)
    close(2 ** -(bits / len(lesson.targets)), case.meta["perplexity"], 1e-4)


class Noting:
    """Chooses as told, and notes what was chosen, and of which probabilities."""

    def __init__(self, choose, k=0):
        self.choose, self.k, self.words, self.probabilities = choose, k, [], []

    def __call__(self, logits):
        self.probabilities.append(sat.likeliest(logits, self.k).softmax(1))
        self.words.append(self.choose(logits))
        return self.words[-1]


def test_sampled_sentences(case):
    """What was drawn is drawn again. All steps count, also those beyond <eos>."""
    for i, run in enumerate(case.meta["sampled"]):
        given, rows = {key: case.given.get(f"sampled.{i}.{key}") for key in ("raw_tokens", "tokens", "step_logits", "attention", "probabilities")}, run["rows"]
        drawn = iter(given["raw_tokens"].T)
        choose = Noting(sat.greedy if run["rule"] == "argmax" else lambda _, drawn=drawn: next(drawn), run.get("topk") or 0)
        tokens = sat.sample(case.speaker, case.scene(rows), run["max_len"], choose,
                            run["temperature"], run["drop_unk"], run["drop_bigrams"], slip=True)
        raw = torch.stack(choose.words, 1)
        assert raw.tolist() == given["raw_tokens"].tolist() and tokens.tolist() == given["tokens"].tolist()
        assert [case.vocabulary.text(ids, sat.SILENT) for ids in tokens.tolist()] == run["strings"]
        logits, alphas = case.told(rows, torch.cat([torch.full_like(raw[:, :1], sat.SOS), raw[:, :-1]], 1))
        close(logits, given["step_logits"])
        close(alphas[:, 1:].unflatten(2, (case.grid, -1)), given["attention"])
        if given["probabilities"] is not None:
            close(torch.stack(choose.probabilities, 1), given["probabilities"])


def test_without_the_slip_a_row_says_what_it_says_alone(case):
    rows = range(len(case.tokens))
    together = sat.sample(case.speaker, case.scene(), 9)
    assert together.tolist() == [sat.sample(case.speaker, case.scene([row]), 9)[0].tolist() for row in rows]


def test_beam_search(case):
    for i, run in enumerate(case.meta["beam"]):
        for j, row in enumerate(run["rows"]):
            found = sat.beam_search(case.speaker, case.scene([row]), run["beam"], run["temperature"], run["max_iter"],
                                    run["drop_unk"], run["drop_bigrams"], case.meta["and_id"])
            assert [tokens for _, tokens in found] == run["tokens"][j]
            close([score for score, _ in found], torch.tensor(run["scores"][j]), 1e-4)
            if found:
                best = found[0][1]
                _, alphas = case.told([row], torch.tensor([best[:-1]]))
                theirs = case.given[f"beam.{i}.alphas.{row}"]  # those before <sos>, which was given, are ones
                close(alphas[0].unflatten(1, (case.grid, -1)), theirs[1:])
                if run.get("strings"):
                    assert case.vocabulary.text(best, sat.SILENT) == run["strings"][j]


@pytest.mark.parametrize("schedule", META["schedules"])
def test_rates_and_the_epoch_that_is_kept(schedule):
    losses, rates = [], {"encoder": [], "decoder": []}
    for loss in schedule["validation"]:
        if not losses or not finished(losses, 50, 5):
            losses.append(loss)
            for part, so_far in rates.items():
                so_far.append(sat.rate_after(losses, schedule[f"{part}_lr_start"]))
    assert len(losses) == schedule["epochs_run"] and best_epoch(losses) == schedule["best_epoch"]
    assert [n for n in range(1, len(losses) + 1) if best_epoch(losses[:n]) == n] == schedule["saved_at"]
    for part, so_far in rates.items():
        close(so_far, schedule[f"{part}_lr"], 1e-12, 1e-6)


@pytest.mark.parametrize("case", META["classifier"]["stopping"])
def test_when_the_classifier_stops(case):
    losses = []
    while len(losses) < len(case["validation"]) and not finished(losses, 25, 5):
        losses.append(case["validation"][len(losses)])
    assert (len(losses), best_epoch(losses)) == (case["epochs_run"], case["best_epoch"])


@pytest.mark.parametrize("i", range(len(META["images"])))
def test_pictures(i):
    about, pixels = META["images"][i], TENSORS[f"image.{i}.pixels"].numpy()
    image = Image.fromarray(pixels, about["mode"])
    resample = Image.Resampling.LANCZOS if about["lanczos"] else Image.Resampling.BILINEAR
    close(normalise(squash(image, about["side"], resample)), TENSORS[f"image.{i}.tensor"])


def classifier_head():
    """The head alone: the fixture's map stands for what the trunk returns."""
    meta = META["classifier"]
    module = head(meta["emotions"], meta["channels"], meta["hidden"], meta["dropout"])
    load_checked(module, under("classifier.weights.clf_head.net."), "classifier")
    return module


def counted(score):
    """The share of paintings that a rule counts."""
    return score.statistics[:, 1].mean()


@torch.no_grad()
def test_classifier_head_loss_and_accuracy():
    meta, given, module = META["classifier"], under("classifier."), classifier_head().eval()
    features, targets = pixels_of(given["trunk_map"], 1).squeeze(1), shares(given["votes"])
    close(features, given["features"])
    close(targets, given["targets"])
    logits = module(features)
    close(logits.log_softmax(1), given["log_probabilities"])
    close(divergence(logits, targets), meta["kl"])
    batches = torch.arange(len(features)).split(meta["loader_batch"])
    close(sum(float(divergence(logits[b], targets[b])) * len(b) for b in batches) / len(features), meta["kl_over_loader"])
    for name, score in accuracies(logits.argmax(1).numpy(), given["votes"].numpy()).items():
        rule = meta["rules"][name.replace(" ", "_")]
        close(score.value, rule["accuracy"])
        close(counted(score), rule.get("share", counted(score)))


def test_classifier_head_in_training():
    given, module = under("classifier."), classifier_head().train()
    module[3] = Masks(given["train.keep"][:, None], META["classifier"]["dropout"])
    logits = module(given["features"])
    close(logits.log_softmax(1), given["train.log_probabilities"])
    close(divergence(logits, given["targets"]), META["classifier"]["train_kl"])
    close(module[1].running_mean, given["train.running_mean_after"])
    close(module[1].running_var, given["train.running_var_after"])


def count(module):
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def test_full_size_names_and_counts():
    with torch.device("meta"):
        classifier, resnet = EmotionClassifier(9), trunk(5)
        speakers = {"plain": sat.Speaker(14469, emotions=0), "grounded": sat.Speaker(14469)}
    assert count(classifier) == 13_166_777 and count(classifier.head) == 52_409 and count(resnet) == 21_053_184
    assert {name: count(speaker) for name, speaker in speakers.items()} == {"plain": 12_951_814, "grounded": 12_970_336}
    for name, shapes in META.get("full_size_names", {}).items():
        ours = ({**{f"trunk.{key}": value for key, value in resnet.state_dict().items()}, **speakers[name].state_dict()}
                if name in speakers else classifier.state_dict())
        table = [(r"^encoder\.resnet", "trunk"), *SPEAKER_NAMES] if name in speakers else CLASSIFIER_NAMES
        theirs = renamed({key: torch.empty(shape) for key, shape in shapes.items()}, table)
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@torch.no_grad()
def test_imagenet_weights_go_where_torchvision_has_them(tmp_path):
    """Also from an old file, which has no num_batches_tracked."""
    theirs, pixels = torchvision.models.resnet34().eval(), torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.save({key: tensor for key, tensor in theirs.state_dict().items() if "tracked" not in key}, tmp_path / "resnet.pth")
    ours = load_trunk(str(tmp_path / "resnet.pth")).eval()
    expected = torch.nn.Sequential(*list(theirs.children())[:-2])(normalise(pixels))
    close(ours(normalise(pixels)), expected)
    torch.save({key: tensor for key, tensor in theirs.state_dict().items() if "layer2.0.conv1" not in key}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="missing: 5.0.conv1.weight"):
        load_trunk(str(tmp_path / "resnet.pth"))
    with pytest.raises(UserError, match="--weights nowhere: there is no such file"):
        load_trunk("nowhere")


def test_rules_on_ties():
    votes = np.array([[2, 2, 0], [3, 1, 0], [1, 2, 1], [1, 1, 1]])
    found = accuracies(np.array([0, 0, 1, 2]), votes)
    assert {name: (counted(score), score.value) for name, score in found.items()} == {
        "more than half": (0.25, 1.0), "at least half": (0.75, 1.0), "unique maximum": (0.5, 1.0)}


# Runs

def regression(folder, fail_at=None):
    """A small training whose every number depends on random ones; `fail_at`: killed in this epoch."""
    torch.manual_seed(5)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)), torch.randn(64, 3)
    optimizer, loss_of = torch.optim.Adam(model.parameters(), 0.05), lambda: (model(inputs).squeeze(1) - inputs[:, 0]).square().mean()

    def train(losses):
        for _ in range(4):
            if len(losses) + 1 == fail_at:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
        return loss.item()

    with torch.enable_grad(), opened(folder, {"system": "test"}) as run:
        return fit(run, model, optimizer, train, lambda: loss_of().item(), epochs=6, patience=6), model.state_dict()


def test_a_killed_training_ends_like_one_that_was_not(tmp_path):
    losses, weights = regression(tmp_path / "whole")
    for epoch in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            regression(tmp_path / "killed", epoch)
    again, restored = regression(tmp_path / "killed")
    assert losses == again and all(torch.equal(weights[name], restored[name]) for name in weights)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()
    with pytest.raises(UserError, match="begun with system"), opened(tmp_path / "whole", {"system": "other"}):
        pass


def test_predictions_are_read_by_name(tmp_path, toy):
    path, named = tmp_path / "said.jsonl", dict(zip(reversed(toy.emotions), range(9), strict=True))
    path.write_text(json.dumps({"image": toy.names[3], "logits": named}) + "\n" + json.dumps({"image": "elsewhere", "logits": named}))
    logits = read_logits(path, toy)
    assert logits[3].tolist() == list(range(8, -1, -1)) and np.isnan(np.delete(logits, 3, 0)).all()
    named = {name: share / 36 for name, share in named.items()}
    path.write_text(json.dumps({"image": toy.names[3], "probabilities": named}))
    np.testing.assert_allclose(np.exp(read_logits(path, toy)[3]), np.arange(8, -1, -1) / 36, atol=1e-9)
    for line, told in ((json.dumps({"image": "elsewhere", "probabilities": named}), "nothing of any picture"),
                       ('{"image": "x", "probabilities": {"joy": 1}}', "line 1: expected"), ("[[]]", "entry 1: expected"), ("{", "line 1: not JSON")):
        path.write_text(line)
        with pytest.raises(UserError, match=told):
            read_logits(path, toy)


def test_the_programs(tmp_path, toy, toy_root, monkeypatch, capsys):
    """From the toy's pictures to the scores of both stages, on ResNet's maps, on pixels, and on a tower's patches."""
    def run(main, *flags):
        monkeypatch.setattr("sys.argv", ["program", "--data-root", str(toy_root), "--toy-paintings", "60", "--epochs", "1", "--precision", "float32", "--side", "32", *map(str, flags)])
        with torch.enable_grad():
            main()
        return capsys.readouterr().out

    assert "more than half" in run(emotion_classifier.main, "--out", tmp_path / "emotions")
    lines = [json.loads(line) for line in (tmp_path / "emotions" / "predictions.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "val", "test"} and len(lines) == 60
    assert run(emotion_classifier.main, "--out", tmp_path / "emotions").startswith("ACC")  # finished: shown again
    for name, flags in (("maps", ["--decoding", "greedy"]), ("pixels", ["--released", "7", "--layers", "8", "--decoding", "sample", "--top-k", "3"]),
                        ("patches", ["--features", "clip", "--weights", ROOT / "examples" / "toy", "--beams", "2"])):
        assert "annotated" in run(sat.main, "--emotions", tmp_path / "emotions", "--out", tmp_path / name, *flags)
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert 0 <= results["predicted"]["ACC"] <= results["annotated"]["ACC"] == 1 and results["parameters"] > 0 < results["gflop"]
        answers = [json.loads(line) for line in (tmp_path / name / "test-predicted.jsonl").read_text().splitlines()]
        assert [answer["image"] for answer in answers] == [toy.names[p] for p in toy.paintings("test")]
    with pytest.raises(UserError, match="begun with longest"):
        run(sat.main, "--emotions", tmp_path / "emotions", "--out", tmp_path / "maps", "--decoding", "greedy", "--longest", "20")


def test_nothing_is_begun_before_all_is_there(tmp_path, toy, toy_root, monkeypatch):
    """Each mistake is named before a run's folder is made, so that the same command works once it is mended."""
    some = [json.dumps({"image": name, "probabilities": dict.fromkeys(toy.emotions, 1 / 9)}) for name in toy.names]
    (tmp_path / "all.jsonl").write_text("\n".join(some))
    left_out = toy.names[toy.paintings("test")[-1]]
    (tmp_path / "most.jsonl").write_text("\n".join(line for line in some if left_out not in line))
    lacking = "cuda" if torch.backends.mps.is_available() else "mps"
    everything = ["--emotions", tmp_path / "all.jsonl", "--features", "clip", "--weights", ROOT / "examples" / "toy"]
    for main, flags, told in ((sat.main, ["--emotions", tmp_path / "nothing.jsonl"], "nothing.jsonl"),
                              (sat.main, [*everything, "--emotions", tmp_path / "most.jsonl"], f"says nothing of {left_out}"),
                              (sat.main, [*everything, "--weights", tmp_path / "nowhere"], "--weights .*nowhere"),
                              (sat.main, [*everything, "--device", lacking], f"--device {lacking}"),
                              (emotion_classifier.main, ["--resnet", tmp_path / "nowhere"], "--resnet .*nowhere")):
        monkeypatch.setattr("sys.argv", ["program", "--data-root", str(toy_root), "--toy-paintings", "60", "--side", "32", "--out", str(tmp_path / "run"), *map(str, flags)])
        with pytest.raises(UserError, match=told):
            main()
        assert not (tmp_path / "run").exists()


# M2

M2_FIXTURE = Path(os.environ.get("SEVLM_M2_FIXTURE") or Path(__file__).parent / "fixtures" / "meshed_memory")
MESH_NAMES = [(r"^model\.", ""), (r"^emotion_encoder\.0\.", "emotion."), (r"^encoder\.fc\.", "encoder.project."),
              (r"^encoder\.layer_norm\.", "encoder.ln_in."), (r"^decoder\.word_emb\.", "decoder.wte."),
              (r"^decoder\.pos_emb\.", "decoder.wpe."), (r"^decoder\.fc\.", "decoder.head."), (r"\.layers\.", ".blocks."),
              (r"(mhatt|self_att)\.attention\.", "attn."), (r"(mhatt|self_att)\.layer_norm\.", "ln_1."),
              (r"enc_att\.attention\.", "cross_attn."), (r"enc_att\.layer_norm\.", "ln_cross."),
              (r"pwff\.layer_norm\.", "ln_2."), (r"pwff\.fc1\.", "mlp.0."), (r"pwff\.fc2\.", "mlp.3."),
              (r"fc_q\.", "query."), (r"fc_k\.", "key."), (r"fc_v\.", "value."), (r"fc_o\.", "out."),
              (r"m_k$", "slot_keys"), (r"m_v$", "slot_values"), (r"fc_alpha1\.", "gates.0."), (r"fc_alpha2\.", "gates.1."),
              (r"fc_alpha3\.", "gates.2.")]


@pytest.fixture(scope="module")
def meta() -> dict:
    return json.loads((M2_FIXTURE / "meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return read_tensors(M2_FIXTURE / "expected.safetensors")


class MeshCase:
    """The grounded or the basic model of the fixture, its input, and what the original gives for it."""

    def __init__(self, name: str, meta: dict, tensors: dict):
        grounded, sizes = name == "grounded", meta["sizes"]
        self.name, self.tensors, self.meta = name, tensors, meta
        weights = {key: value for key, value in tensors.items() if key.startswith("model.")}
        if grounded:
            weights |= {key: value for key, value in tensors.items() if key.startswith("emotion_encoder.")}
        weights |= {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.model.")}
        settings = m2.Settings(
            emotion_width=sizes["emotion_dim"], width=sizes["d_model"], attention_heads=sizes["heads"], key_width=sizes["d_k"],
            value_width=sizes["d_v"], slots=sizes["memory_slots"], inner=sizes["d_ff"], steps=meta["beam"]["steps"],
            encoder_layers=sizes["encoder_layers"], decoder_layers=sizes["decoder_layers"],
            positions=len(tensors["model.decoder.pos_emb.weight"]) - 1, exact_zero_mask=True)
        emotions = sizes["emotions"] if grounded else 0
        self.model = m2.MeshedMemory(settings, sizes["feature_dim"], sizes["vocab_size"], emotions).eval()
        load_checked(self.model, renamed(weights, MESH_NAMES), str(M2_FIXTURE))
        self.regions = tensors["features"]
        self.emotions = tensors["emotion_onehot"].argmax(1) if grounded else None

    def close(self, ours: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
        assert_close(ours, self.tensors[f"{self.name}.{what}"], atol=tolerance, rtol=0)

    def picture(self) -> mesh.Picture:
        return self.model.encode(self.regions, self.emotions)


@pytest.fixture(params=["grounded", "basic"])
def mesh_case(request, meta, tensors) -> MeshCase:
    return MeshCase(request.param, meta, tensors)


@torch.no_grad()
def test_encoder(mesh_case):
    joined = mesh_case.regions if mesh_case.emotions is None else mesh_case.model.join(mesh_case.regions, mesh_case.emotions)
    if mesh_case.emotions is not None:
        mesh_case.close(joined, "detections", 1e-5)
    (projected, *outputs), hidden = mesh_case.model.encoder(joined)
    mesh_case.close(projected, "projected", 1e-5)
    mesh_case.close(torch.stack(outputs, 1), "enc_outputs")
    assert torch.equal(hidden, mesh_case.tensors[f"{mesh_case.name}.enc_mask"])


@torch.no_grad()
def test_decoder_in_parallel_and_word_by_word(mesh_case):
    tokens, picture, past, steps = mesh_case.tensors["tokens"], mesh_case.picture(), None, []
    mesh_case.close(mesh_case.model.decoder(tokens, picture)[0], "teacher_log_probs")
    for place in range(tokens.shape[1]):
        log_probs, past = mesh_case.model.decoder(tokens[:, place:place + 1], picture, past)
        steps.append(log_probs)
    mesh_case.close(torch.cat(steps, 1), "stateful_log_probs")


def test_loss_and_gradients(mesh_case, meta):
    loss = mesh_case.model(mesh_case.regions, mesh_case.emotions, mesh_case.tensors["tokens"])
    mesh_case.close(loss.detach(), "xe_loss", 1e-5)
    trained = {name: parameter for name, parameter in mesh_case.model.named_parameters() if parameter.requires_grad}
    counts = meta["trainable_parameters"]
    assert sum(p.numel() for p in trained.values()) == counts["basic" if mesh_case.name == "basic" else "grounded_with_emotion_encoder"]
    assert mesh_case.model.decoder.wpe.weight.numel() == counts["frozen_position_table"]
    if mesh_case.name == "grounded":
        loss.backward()
        expected = renamed({name: torch.tensor(norm) for name, norm in meta["grad_norms"].items()}, MESH_NAMES)
        assert expected.keys() == trained.keys()
        for name, norm in expected.items():
            assert_close(trained[name].grad.norm(), norm, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_beam_search_and_captions(mesh_case, meta):
    words, scores = m2.beam_search(mesh_case.model.decoder, mesh_case.picture(), meta["beam"]["size"], meta["beam"]["steps"])
    assert torch.equal(words, mesh_case.tensors[f"{mesh_case.name}.beam_ids"])
    with torch.no_grad():  # all beams of a picture again, in parallel
        said = torch.cat([torch.full_like(words[..., :1], m2.BEGIN), words], 2).flatten(0, 1)
        log_probs = mesh_case.model.decoder(said[:, :-1], mesh_case.picture())[0].gather(2, said[:, 1:, None]).view(words.shape)
    mesh_case.close(log_probs * ((words == m2.END).cumsum(2) - (words == m2.END).long() == 0), "beam_log_probs")
    mesh_case.close(scores, "beam_scores")
    vocabulary = m2.Vocabulary(meta["itos"])
    for best, caption in zip(words[:, 0].tolist(), meta["captions"][mesh_case.name], strict=True):
        assert vocabulary.text(itertools.takewhile(lambda i: i != m2.END, best)) == " ".join(caption["words"])
        assert m2.sentence(vocabulary, best) == caption["collapsed"]


@torch.no_grad()
def test_one_beam_takes_the_likeliest_word_each_time(mesh_case):
    picture = mesh_case.picture()
    said = m2.beam_search(mesh_case.model.decoder, picture, beams=1, steps=mesh_case.meta["beam"]["steps"])[0][:, 0]
    ids = torch.cat([torch.full_like(said[:, :1], m2.BEGIN), said], 1)
    likeliest = mesh_case.model.decoder(ids[:, :-1], picture)[0].argmax(2)
    unfinished = (ids[:, :-1] == m2.END).cumsum(1) == 0
    assert torch.equal(said[unfinished], likeliest[unfinished]) and not said[~unfinished].any()


def test_schedule_of_m2(meta):
    schedule = meta["lr_schedule"]
    per_epoch = schedule["iterations_per_epoch"]
    ours = [m2.rate(i, i // per_epoch, schedule["d_model"], schedule["warmup"]) for i in range(schedule["epochs"] * per_epoch)]
    assert ours == pytest.approx(schedule["lr"], abs=1e-5, rel=1e-9)


def test_text_of_m2(meta):
    ids, text = meta["ids"], meta["text"]
    assert (ids["unk"], ids["pad"], ids["bos"], ids["eos"]) == (mesh.UNKNOWN, m2.PAD, m2.BEGIN, m2.END)
    captions = [m2.spoken(caption.split()) for caption in text["captions"]]
    vocabulary = m2.vocabulary_of(captions, text["min_freq"])
    assert list(vocabulary.words) == text["itos"]
    rows = m2.rows_of([*captions[:3], captions[-1]], vocabulary, max(map(len, captions)) + 1)
    assert rows.tolist() == text["encoded_first3_and_last"]
    assert [m2.sentence(vocabulary, row) for row in text["decode_rows"]] == text["collapsed"]


def test_emotions_to_explain_are_the_classifiers_or_the_annotators(meta, tmp_path):
    """The original's oracle is the most frequent annotated emotion; ours stands apart, beside the classifier's."""
    pictures, emotions = [f"p{i}" for i in range(len(meta["oracle_emotion"]))], [f"e{i}" for i in range(meta["sizes"]["emotions"])]
    votes = np.stack([np.bincount(one["emotions_of_the_references"], minlength=len(emotions)) for one in meta["oracle_emotion"]])
    chosen = [i % len(emotions) for i in range(len(pictures))]
    (tmp_path / "said.jsonl").write_text("".join(
        json.dumps({"image": name, "logits": {emotion: float(i == answer) for i, emotion in enumerate(emotions)}}) + "\n"
        for name, answer in zip(pictures, chosen, strict=True)))
    art = SimpleNamespace(names=pictures, emotions=emotions, votes=votes, source="made up")
    found = emotions_for(art, np.arange(len(pictures)), read_logits(tmp_path / "said.jsonl", art))
    assert found["annotated"][0].tolist() == [one["used"] for one in meta["oracle_emotion"]]
    assert found["predicted"][0].tolist() == chosen


def small_model(vocabulary: int = 30) -> m2.MeshedMemory:
    torch.manual_seed(0)
    settings = m2.Settings(width=16, attention_heads=2, key_width=6, value_width=10, slots=3, inner=24, emotion_width=4)
    return m2.MeshedMemory(settings, region_width=7, vocabulary=vocabulary, emotions=5).eval()


@torch.no_grad()
def test_padding_changes_nothing_where_the_number_of_regions_is_known():
    model, words = small_model(), torch.tensor([[m2.BEGIN, 9, 5, 7]])
    regions, emotions = torch.randn(1, 4, 7), torch.tensor([3])
    padded = torch.cat([regions, torch.zeros(1, 6, 7)], 1)
    alone, _ = model.decoder(words, model.encode(regions, emotions))
    with_padding, _ = model.decoder(words, model.encode(padded, emotions, count=torch.tensor([4])))
    assert_close(with_padding, alone, atol=1e-5, rtol=0)
    unmasked, _ = model.decoder(words, model.encode(padded, emotions))
    assert (unmasked - alone).abs().max() > 1e-3


@torch.no_grad()
def test_words_drawn_at_random_follow_the_probabilities():
    model, count, chance = small_model(), 20_000, torch.Generator().manual_seed(1)
    model.decoder.head.weight.mul_(4)  # far from uniform
    picture = model.encode(torch.randn(1, 4, 7).expand(count, -1, -1), torch.full((count,), 3))
    first, second = m2.draw(model.decoder, picture, 2, chance).T
    begin = torch.full((count, 1), m2.BEGIN)
    log_probs, _ = model.decoder(torch.cat([begin, first[:, None]], 1), picture)
    assert_close(first.bincount(minlength=30) / count, log_probs[0, 0].exp(), atol=0.015, rtol=0)
    after = first == first.mode().values
    assert_close(second[after].bincount(minlength=30) / after.sum(), log_probs[after][0, 1].exp(), atol=0.03, rtol=0)


def test_training_lowers_the_loss_and_leaves_the_positions_alone():
    model, rows = small_model(), torch.tensor([[m2.BEGIN, 9, 5, 7, m2.END], [m2.BEGIN, 4, m2.END, m2.PAD, m2.PAD]])
    m2.initialise(model)
    positions = model.decoder.wpe.weight.clone()
    assert positions.abs().max() <= (6 / sum(positions.shape)) ** 0.5 and not model.encoder.blocks[0].attn.query.bias.any()
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        losses.append(model(torch.ones(2, 4, 7), torch.tensor([0, 1]), rows))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0] and torch.equal(model.decoder.wpe.weight, positions)


def test_the_program_of_m2(tmp_path, toy, toy_root, monkeypatch, capsys):
    """From a classifier to scores; on ResNet's maps and on a tower's patches; a finished run is shown again."""
    def run(main, *flags):
        monkeypatch.setattr("sys.argv", ["program", "--data-root", str(toy_root), "--toy-paintings", "60", "--epochs", "1",
                                         "--precision", "float32", *map(str, flags)])
        main()
        return capsys.readouterr().out

    run(emotion_classifier.main, "--out", tmp_path / "emotions", "--side", "32")
    resnet = ["--side", "32", "--layers", "6", "--decoding", "sample"]
    tower = ["--features", "clip", "--weights", ROOT / "examples" / "toy", "--beams", "2"]
    for name, flags in (("maps", resnet), ("patches", tower)):
        told = run(m2.main, "--emotions", tmp_path / "emotions", "--out", tmp_path / name, *flags)
        assert "annotated" in told and "epoch 1" in told
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert 0 <= results["predicted"]["ACC"] <= results["annotated"]["ACC"] == 1 and results["parameters"] > 0 < results["gflop"]
        answers = [json.loads(line) for line in (tmp_path / name / "test-predicted.jsonl").read_text().splitlines()]
        assert [answer["image"] for answer in answers] == [toy.names[p] for p in toy.paintings("test")]
    assert "epoch 1" not in run(m2.main, "--emotions", tmp_path / "emotions", "--out", tmp_path / "maps", *resnet)


def test_what_cannot_be_is_said_in_one_line(tmp_path, toy, toy_root, monkeypatch):
    def problem(*flags) -> str:
        monkeypatch.setattr("sys.argv", ["program", "--data-root", str(toy_root), "--toy-paintings", "60", "--out", str(tmp_path / f"run{len(told)}"), *map(str, flags)])
        with pytest.raises(UserError) as error:
            m2.main()
        told.append(str(error.value))
        return told[-1]

    told = []
    assert "--steps 60 is beyond --positions 54" in problem("--steps", "60")
    assert "--key-width is 0" in problem("--key-width", "0")
    assert str(tmp_path / "nowhere") in problem("--emotions", tmp_path / "nowhere")
    assert "python -m related.emotion_classifier --data toy" in told[-1]
    (tmp_path / "empty").mkdir()
    (tmp_path / "said.jsonl").write_text(json.dumps({"image": toy.names[0], "logits": dict.fromkeys(toy.emotions, 0)}))
    for flags in (["--emotions", tmp_path / "empty"],
                  ["--emotions", tmp_path / "said.jsonl", "--features", "clip", "--weights", tmp_path / "empty"]):
        assert str(tmp_path / "empty") in problem(*flags)
    assert all(len(message.splitlines()) == 1 for message in told)

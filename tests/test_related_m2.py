"""M2 against numbers from the original code (fixture), and what the fixture does not reach."""
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

pytest.importorskip("torchvision")
from related import emotion_classifier, mesh
from related import meshed_memory as m2
from related.captions import emotions_for
from related.emotion_classifier import read_logits
from support.files import load_checked, renamed
from support.program import UserError

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("SEVLM_M2_FIXTURE") or Path(__file__).parent / "fixtures" / "meshed_memory")
NAMES = [(r"^model\.", ""), (r"^emotion_encoder\.0\.", "emotion."), (r"^encoder\.fc\.", "encoder.project."),
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
    return json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


class Case:
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
        load_checked(self.model, renamed(weights, NAMES), str(FOLDER))
        self.regions = tensors["features"]
        self.emotions = tensors["emotion_onehot"].argmax(1) if grounded else None

    def close(self, ours: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
        assert_close(ours, self.tensors[f"{self.name}.{what}"], atol=tolerance, rtol=0)

    def picture(self) -> mesh.Picture:
        return self.model.encode(self.regions, self.emotions)


@pytest.fixture(params=["grounded", "basic"])
def case(request, meta, tensors) -> Case:
    return Case(request.param, meta, tensors)


@torch.no_grad()
def test_encoder(case):
    joined = case.regions if case.emotions is None else case.model.join(case.regions, case.emotions)
    if case.emotions is not None:
        case.close(joined, "detections", 1e-5)
    (projected, *outputs), hidden = case.model.encoder(joined)
    case.close(projected, "projected", 1e-5)
    case.close(torch.stack(outputs, 1), "enc_outputs")
    assert torch.equal(hidden, case.tensors[f"{case.name}.enc_mask"])


@torch.no_grad()
def test_decoder_in_parallel_and_word_by_word(case):
    tokens, picture, past, steps = case.tensors["tokens"], case.picture(), None, []
    case.close(case.model.decoder(tokens, picture)[0], "teacher_log_probs")
    for place in range(tokens.shape[1]):
        log_probs, past = case.model.decoder(tokens[:, place:place + 1], picture, past)
        steps.append(log_probs)
    case.close(torch.cat(steps, 1), "stateful_log_probs")


def test_loss_and_gradients(case, meta):
    loss = case.model(case.regions, case.emotions, case.tensors["tokens"])
    case.close(loss.detach(), "xe_loss", 1e-5)
    trained = {name: parameter for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    counts = meta["trainable_parameters"]
    assert sum(p.numel() for p in trained.values()) == counts["basic" if case.name == "basic" else "grounded_with_emotion_encoder"]
    assert case.model.decoder.wpe.weight.numel() == counts["frozen_position_table"]
    if case.name == "grounded":
        loss.backward()
        expected = renamed({name: torch.tensor(norm) for name, norm in meta["grad_norms"].items()}, NAMES)
        assert expected.keys() == trained.keys()
        for name, norm in expected.items():
            assert_close(trained[name].grad.norm(), norm, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_beam_search_and_captions(case, meta):
    words, scores = m2.beam_search(case.model.decoder, case.picture(), meta["beam"]["size"], meta["beam"]["steps"])
    assert torch.equal(words, case.tensors[f"{case.name}.beam_ids"])
    with torch.no_grad():  # all beams of a picture again, in parallel
        said = torch.cat([torch.full_like(words[..., :1], m2.BEGIN), words], 2).flatten(0, 1)
        log_probs = case.model.decoder(said[:, :-1], case.picture())[0].gather(2, said[:, 1:, None]).view(words.shape)
    case.close(log_probs * ((words == m2.END).cumsum(2) - (words == m2.END).long() == 0), "beam_log_probs")
    case.close(scores, "beam_scores")
    vocabulary = m2.Vocabulary(meta["itos"])
    for best, caption in zip(words[:, 0].tolist(), meta["captions"][case.name], strict=True):
        assert vocabulary.text(itertools.takewhile(lambda i: i != m2.END, best)) == " ".join(caption["words"])
        assert m2.sentence(vocabulary, best) == caption["collapsed"]


@torch.no_grad()
def test_one_beam_takes_the_likeliest_word_each_time(case):
    picture = case.picture()
    said = m2.beam_search(case.model.decoder, picture, beams=1, steps=case.meta["beam"]["steps"])[0][:, 0]
    ids = torch.cat([torch.full_like(said[:, :1], m2.BEGIN), said], 1)
    likeliest = case.model.decoder(ids[:, :-1], picture)[0].argmax(2)
    unfinished = (ids[:, :-1] == m2.END).cumsum(1) == 0
    assert torch.equal(said[unfinished], likeliest[unfinished]) and not said[~unfinished].any()


def test_schedule(meta):
    schedule = meta["lr_schedule"]
    per_epoch = schedule["iterations_per_epoch"]
    ours = [m2.rate(i, i // per_epoch, schedule["d_model"], schedule["warmup"]) for i in range(schedule["epochs"] * per_epoch)]
    assert ours == pytest.approx(schedule["lr"], abs=1e-5, rel=1e-9)


def test_text(meta):
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


def test_the_program(tmp_path, toy, toy_root, monkeypatch, capsys):
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

"""Our model with the authors' weights computes what the authors' code computed (SEVLM_OFFICIAL_FIXTURE)."""
import json
import re

import pytest
import torch
from conftest import fixture_folder
from safetensors.torch import load_file

from sevlm import (
    EMOTION_NAMES,
    EMOTION_UNUSED,
    GPT2_NAMES,
    GPT2_UNUSED,
    SEVLM,
    Decoding,
    clip_tensors,
    gpt2_tensors,
    renamed,
)
from vad import WordVAD

FOLDER = fixture_folder("SEVLM_OFFICIAL_FIXTURE", "official")
META = json.loads((FOLDER / "meta.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def model(expected):
    model = SEVLM.from_official(FOLDER, clip=FOLDER / "clip_openai.safetensors", tower_heads=META["vision_heads"])
    model.word_vad = WordVAD.per_token(expected["vad_table"])
    return model.eval()


@pytest.fixture(scope="module")
def output(model, expected):
    ids = expected["full.input_ids"]
    rows = model.word_vad(ids)
    assert torch.equal(model.word_vad.values[rows], expected["full.vad"])
    sentence = torch.arange(len(ids))
    wrong_image = torch.tensor(META["negative_images"])[sentence // 2] * 2 + sentence % 2
    return model(expected["images"], ids, expected["full.segment_ids"], rows, expected["full.labels"],
                 wrong_emotion=sentence ^ 1, wrong_image=wrong_image)


def assert_close(ours, theirs, limit):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= limit


def test_patch_features(model, expected):
    assert_close(model.see(expected["images"]), expected["patches"], 1e-4)


@pytest.mark.parametrize("ours, theirs", [("emotion_features", "emotion_features"), ("embedded", "fused_embedding"),
                                          ("hidden", "hidden")])
def test_tensors(output, expected, ours, theirs):
    assert_close(getattr(output, ours), expected[f"full.{theirs}"], 1e-4)


def test_logits(model, output, expected):
    assert_close(model.decoder.logits(output.hidden), expected["full.logits"], 1e-4)


def test_losses(model, output, expected):
    losses = output.losses | {"contrastive_x2": 2 * output.losses["contrastive"]}
    assert model.config.alpha == 2
    for name in ("language", "vad", "contrastive_x2", "total"):
        assert losses[name].item() == pytest.approx(expected[f"full.loss_{name}"].item(), rel=1e-5), name


def test_gradients(model, output):
    model.zero_grad()
    output.losses["total"].backward(retain_graph=True)
    parameters, empty = dict(model.named_parameters()), torch.empty(0)
    for name, norm in META["full_grad_norms"].items():
        if name.startswith("emo."):
            ours = [f"emotion_encoder.{n}" for n in renamed({name[4:]: empty}, EMOTION_NAMES, EMOTION_UNUSED)]
        else:
            ours = list(renamed({name: empty}, GPT2_NAMES, GPT2_UNUSED))
        measured = parameters[ours[0]].grad.norm().item()
        if norm < 1e-4:
            assert measured < 1e-4, name
        else:
            assert measured == pytest.approx(norm, rel=1e-3), name


@torch.no_grad()
def test_greedy_decoding(model, expected):
    """25 steps without stopping; the fixture raised the logit of "because" at some steps, as meta.json tells."""
    ids, step_logits, greedy = expected["greedy.ids"], expected["greedy.step_logits"], META["greedy"]
    boost = float(re.search(r"\+(\d+)", greedy["forced"])[1])
    raised = {int(step): [int(row) for row in rows.split(",")]
              for step, rows in re.findall(r"at step (\d+) for rows? (\d+(?:, ?\d+)*)", greedy["forced"])}
    assert model.text.because == greedy["because"]
    prompt = torch.tensor([greedy["prompt"]] * len(ids))
    decoding = Decoding(model, model.see(expected["images"]), prompt)
    for step in range(step_logits.shape[1]):
        logits = decoding.logits()
        logits[raised.get(step, []), greedy["because"]] += boost
        assert_close(logits, step_logits[:, step], 1e-3)
        decoding.append(logits.argmax(1))
    assert torch.equal(decoding.ids, ids)
    assert torch.equal(decoding.segments, expected["greedy.segment_ids"])


def test_full_size_names_all_have_their_place(paper_model):
    """The names and shapes of the authors' full-size checkpoint are exactly those of a model of the paper's size."""
    files = json.loads((FOLDER / "full_size_names.json").read_text())
    decoder, emotion, tower = ({name: torch.empty(shape, device="meta") for name, (shape, _) in files[file].items()}
                               for file in ("decoder_pytorch_model_bin", "emo_encoder_state_dict",
                                            "image_encoder_state_dict_only_when_not_frozen"))
    del decoder["lm_head.weight"]
    theirs = gpt2_tensors(decoder, FOLDER) | clip_tensors({n.removeprefix("encoder."): t for n, t in tower.items()})
    theirs |= {f"emotion_encoder.{n}": t for n, t in renamed(emotion, EMOTION_NAMES, EMOTION_UNUSED).items()}
    ours = {name: tensor.shape for name, tensor in paper_model.state_dict().items() if "word_vad" not in name}
    assert {name: tensor.shape for name, tensor in theirs.items()} == ours

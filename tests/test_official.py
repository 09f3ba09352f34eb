"""Our model with the authors' weights computes what the authors' code computed (SEVLM_OFFICIAL_FIXTURE)."""
import json
import re

import pytest
import torch
from conftest import fixture_folder
from safetensors.torch import load_file

from related.authors import DECODER_NAMES, emotion_tensors, from_authors
from sevlm import Decoding
from support.files import renamed
from support.public import GPT2_UNUSED, clip_tensors, gpt2_tensors
from vad import OUR_LEXICON, read_lexicon

FOLDER = fixture_folder("SEVLM_OFFICIAL_FIXTURE", "official")
META = json.loads((FOLDER / "meta.json").read_text())
BATCHES = ["full", "padded"]


class TokenTable:
    """The fixture's stand-in for lexicon and lemmas: each token has a row of (V, 3), whatever word it is part of."""

    def __init__(self, values):
        self.values = values

    def begin(self, count):
        return [0] * count

    def extend(self, states, tokens):
        return tokens

    def vad(self, states):
        return self.values[states]


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def model(expected):
    model = from_authors(FOLDER, read_lexicon(OUR_LEXICON), FOLDER / "clip_openai.safetensors",
                         tower_heads=META["vision_heads"])
    model.word_vad = TokenTable(expected["vad_table"])
    return model


@pytest.fixture(scope="module")
def outputs(model, expected):
    def run(batch):
        sentence = torch.arange(len(expected[f"{batch}.input_ids"]))
        wrong_image = torch.tensor(META["negative_images"])[sentence // 2] * 2 + sentence % 2
        return model(expected["images"], expected[f"{batch}.input_ids"], expected[f"{batch}.segment_ids"],
                     expected[f"{batch}.vad"], expected[f"{batch}.labels"], sentence ^ 1, wrong_image)
    return {batch: run(batch) for batch in BATCHES}


def assert_close(ours, theirs, limit):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= limit


def test_patch_features(model, expected):
    assert_close(model.encode_image(expected["images"]), expected["patches"], 1e-4)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ours, theirs", [("emotion_features", "emotion_features"), ("embedded", "fused_embedding"),
                                          ("hidden", "hidden")])
def test_tensors(outputs, expected, batch, ours, theirs):
    assert_close(getattr(outputs[batch], ours), expected[f"{batch}.{theirs}"], 1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_logits(model, outputs, expected, batch):
    assert_close(model.decoder.logits(outputs[batch].hidden), expected[f"{batch}.logits"], 1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_losses(model, outputs, expected, batch):
    losses = outputs[batch].losses
    losses = losses | {"contrastive_x2": 2 * losses["contrastive"]}
    assert model.config.alpha == 2
    for name in ("language", "vad", "contrastive_x2", "total"):
        assert losses[name].item() == pytest.approx(expected[f"{batch}.loss_{name}"].item(), rel=1e-5), name


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if f"{batch}_grad_norms" in META])
def test_gradients(model, outputs, batch):
    model.zero_grad()
    outputs[batch].losses["total"].backward(retain_graph=True)
    parameters, empty = dict(model.named_parameters()), torch.empty(0)
    for name, norm in META[f"{batch}_grad_norms"].items():
        ours = emotion_tensors({name[4:]: empty}) if name.startswith("emo.") else renamed(
            {name: empty}, DECODER_NAMES, GPT2_UNUSED)
        [ours] = ours
        measured = parameters[ours].grad.norm().item()
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
    decoding = Decoding(model, model.encode_image(expected["images"]), prompt, prompt.shape[1] + step_logits.shape[1])
    for step in range(step_logits.shape[1]):
        logits = decoding.logits()
        logits[raised.get(step, []), greedy["because"]] += boost
        assert_close(logits, step_logits[:, step], 1e-3)
        decoding.append(logits.argmax(1))
    assert torch.equal(decoding.ids, ids)
    assert torch.equal(model.text.segments(decoding.ids), expected["greedy.segment_ids"])


def test_full_size_names_all_have_their_place(paper_model):
    """The names and shapes of the authors' full-size checkpoint are exactly those of a model of the paper's size."""
    files = json.loads((FOLDER / "full_size_names.json").read_text())
    decoder, emotion, tower = ({name: torch.empty(shape, device="meta") for name, (shape, _) in files[file].items()}
                               for file in ("decoder_pytorch_model_bin", "emo_encoder_state_dict",
                                            "image_encoder_state_dict_only_when_not_frozen"))
    del decoder["lm_head.weight"]
    theirs = gpt2_tensors(decoder, FOLDER, DECODER_NAMES) | emotion_tensors(emotion)
    theirs |= clip_tensors({name.removeprefix("encoder."): tensor for name, tensor in tower.items()})
    ours = {name: tensor.shape for name, tensor in paper_model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == ours

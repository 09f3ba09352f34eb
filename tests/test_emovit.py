"""EmoVIT: Q-Former and language model against InstructBLIP's numbers (fixture) and `transformers`; feeding, answers and
weights against slow and obvious versions; then training, on a small world."""
import dataclasses
import json
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fixture_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from related import emovit, emovit_training
from related.emovit import Config, EmoVIT, Encoded, from_public, from_run, load_emovit
from related.instructions import records_of
from related.language_model import Decoding, LanguageModel
from related.qformer import QFormer, Sizes, instructblip_tensors
from related.questions import KINDS, processed, write_records
from sevlm import IGNORE, VisionTower, load_model
from sevlm import save as save_run
from support.program import UserError
from support.public import gpt2_tensors
from support.world import World
from train import Pictures

FIXTURE = fixture_folder("SEVLM_EMOVIT_FIXTURE", "emovit")
META = json.loads((FIXTURE / "qformer.json").read_text())
NUMBERS = load_file(FIXTURE / "qformer.safetensors")
SMALL = dict(queries=3, q_blocks=2, q_width=16, q_heads=2, q_inner=24, q_positions=100, question_length=100,
             answer_length=40, dropout=0.0)
QUESTIONS = ["what is there?", "which of these many different things can you see in this picture?", "why?"]
ANSWERS = ["the sea", "a lonely tree under a dark sky", "it is sad"]


def near(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# InstructBLIP's numbers

class Theirs(nn.Module):
    """The fixture's Q-Former, projection and language model, filled by their names."""

    def __init__(self):
        super().__init__()
        about, lm = META["qformer"], META["lm"]
        sizes = Config(
            queries=META["num_query_tokens"], q_blocks=about["num_hidden_layers"], q_width=about["hidden_size"],
            q_heads=about["num_attention_heads"], q_inner=about["intermediate_size"],
            q_positions=about["max_position_embeddings"], cross_every=about["cross_attention_frequency"],
            width=lm["n_embd"], heads=lm["n_head"], layers=lm["n_layer"], positions=lm["n_positions"], question_length=2,
            answer_length=2)
        self.qformer = QFormer(sizes, about["encoder_hidden_size"], about["vocab_size"])
        self.projection = nn.Linear(about["hidden_size"], lm["n_embd"])
        self.decoder = LanguageModel(sizes, lm["vocab_size"])
        weights = {name: NUMBERS[name] for name in NUMBERS
                   if name.startswith(("qformer.", "language_projection.")) or name == "query_tokens"}
        found = instructblip_tensors(weights) | {"qformer.wte.weight": weights["qformer.embeddings.word_embeddings.weight"]}
        found |= gpt2_tensors(part("lm."), FIXTURE)
        self.load_state_dict(found)  # strict
        self.eval()

    def soft_prompt(self) -> Tensor:
        rows = self.qformer(NUMBERS["image_embeds"], NUMBERS["input_ids"], NUMBERS["text_mask"].bool())
        return self.projection(rows[:, :META["num_query_tokens"]])


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in NUMBERS.items() if name.startswith(prefix)}


@pytest.fixture
def theirs() -> Theirs:
    return Theirs()


@pytest.fixture(scope="module")
def records() -> Encoded:
    """The fixture's questions and answers, cut out of its padded rows."""
    asked, answered = (NUMBERS[f"answer.{name}_len"].tolist() for name in ("question", "answer"))
    ids = NUMBERS["answer.input_ids"].tolist()
    return Encoded([row[:q] for row, q in zip(ids, asked)], [row[q:q + a] for row, q, a in zip(ids, asked, answered)])


def test_every_row_of_every_block_is_instructblips(theirs):
    found = []
    for block in theirs.qformer.blocks:
        block.register_forward_hook(lambda *passed: found.append(passed[2]))
    features, ids, asked = NUMBERS["image_embeds"], NUMBERS["input_ids"], NUMBERS["text_mask"].bool()
    near(theirs.qformer.embed(len(features), ids), NUMBERS["out.embedding"])
    near(theirs.qformer(features, ids, asked), NUMBERS["out.last"])
    for number, rows in enumerate(found):
        near(rows, NUMBERS[f"out.block.{number}"])
    near(theirs.qformer(features, ids, asked, NUMBERS["image_mask"].bool()), NUMBERS["out.image_masked.last"])
    near(theirs.qformer(features), NUMBERS["out.no_text.last"])
    near(theirs.soft_prompt(), NUMBERS["out.soft_prompt"])


def test_rows_logits_loss_and_gradients_are_instructblips(theirs, records):
    inputs, soft = records.inputs(), theirs.soft_prompt()
    real, Q = NUMBERS["answer.attention_mask"].bool(), soft.shape[1]
    assert inputs["ids"][real[:, Q:]].equal(NUMBERS["answer.input_ids"][real[:, Q:]])
    assert inputs["labels"].equal(NUMBERS["answer.labels"][:, Q:]) and (NUMBERS["answer.labels"][:, :Q] == IGNORE).all()
    logits = theirs.decoder.logits(theirs.decoder(theirs.decoder.embed(soft, inputs["ids"])))
    near(logits[real], NUMBERS["answer.logits"][real])
    surprise = theirs.decoder.surprise(soft, inputs["ids"], inputs["labels"])
    loss = surprise.sum() / (inputs["labels"] != IGNORE).sum()
    near(loss, NUMBERS["answer.loss"], 1e-5)
    loss.backward()
    near(theirs.qformer.queries.grad, NUMBERS["grad.query_tokens"])
    near(theirs.projection.weight.grad, NUMBERS["grad.language_projection.weight"])
    ours = {name: torch.tensor(float(norm or 0)) for name, norm in META["gradient_norms"].items()}
    words = {"qformer.wte.weight": ours["qformer.embeddings.word_embeddings.weight"]}
    norms = instructblip_tensors(ours) | words
    assert norms.keys() == {name for name, _ in theirs.named_parameters() if not name.startswith("decoder.")}
    for name, norm in norms.items():
        found = theirs.get_parameter(name).grad.norm().item()
        assert found == pytest.approx(norm.item(), rel=1e-3, abs=1e-6), name


def test_the_likelihood_of_given_answers_is_instructblips(theirs, records):
    answers = [ids[:length] for ids, length in zip(NUMBERS["candidates.ids"].tolist(), NUMBERS["candidates.len"].tolist())]
    with torch.no_grad():
        soft, found = theirs.soft_prompt(), []
        for row, (start, asked) in enumerate(zip(records.start, records.asked)):
            question = torch.from_numpy(records.ids[start:start + asked].astype(np.int64))[None]
            decoding = Decoding(theirs.decoder, soft[row:row + 1], question, asked + max(map(len, answers)))
            found.append(decoding.log_probs(answers))
    near(-torch.cat(found), NUMBERS["candidates.nll"], 1e-3)


def test_the_q_former_is_transformers_at_full_size():
    transformers = pytest.importorskip("transformers")
    noise = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)) * 0.02  # 163 million would take longer
    with torch.device("meta"):
        theirs = transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(vocab_size=1000))
    theirs = theirs.to_empty(device="cpu").eval()
    for place, (name, weight) in enumerate(theirs.named_parameters()):
        own = noise.roll(place) + ("orm.weight" in name)
        for chunk in weight.data.view(-1).split(len(own)):
            chunk.copy_(own[:len(chunk)])
    theirs.embeddings.position_ids = torch.arange(512)[None]
    ours = QFormer(Sizes(q_blocks=12), source=1408, vocabulary=1000).eval()
    weights = {f"qformer.{name}": weight.detach() for name, weight in theirs.named_parameters()}
    weights = instructblip_tensors(weights) | {"qformer.wte.weight": weights["qformer.embeddings.word_embeddings.weight"],
                                               "qformer.queries": noise[:32 * 768].view(1, 32, 768)}
    ours.load_state_dict({name.removeprefix("qformer."): weight for name, weight in weights.items()}, assign=True)
    features, ids = torch.randn(2, 7, 1408), torch.randint(1000, (2, 9))
    asked = torch.arange(9) < torch.tensor([[9], [4]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.cat([torch.ones(2, 32), asked], 1).long(),
                          query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=features).last_hidden_state
        near(ours(features, ids, asked), expected)


# feeding: the answer alone is learned, whatever stands beside it

@pytest.fixture
def model(tokenizer) -> EmoVIT:
    return small(tokenizer)


def small(tokenizer: Tokenizer, **changes) -> EmoVIT:
    """Lively random weights."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=8, tower_width=24, tower_layers=1, tower_heads=2, width=32, layers=2, heads=4,
                 positions=150)
    model = EmoVIT(Config(**sizes | SMALL | changes), tokenizer)
    for name, parameter in model.named_parameters():
        if "ln" not in name:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(1))


def slow_log_prob(model: EmoVIT, picture: Tensor, question: str, answer: str) -> Tensor:
    """log p of an answer and its end, one token after the other, alone and without padding: (tokens,)."""
    ids = torch.tensor([model.text.tokens([processed(question)])[0]])
    told = [*model.text.tokens([" " + answer])[0], model.text.end]
    soft, found = model.soft_prompt(picture[None], ids, torch.ones_like(ids, dtype=torch.bool)), []
    for token in told:
        x = torch.cat([soft, model.decoder.wte(ids)], 1) + model.decoder.wpe.weight[:soft.shape[1] + ids.shape[1]]
        hidden = model.decoder(x)[0, -1]
        found.append((model.decoder.wte.weight @ hidden).log_softmax(0)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return torch.stack(found)


def test_the_loss_is_the_mean_over_all_tokens_of_the_answers(model, features):
    each = [slow_log_prob(model, *one) for one in zip(features, QUESTIONS, ANSWERS)]
    near(model.loss(features, QUESTIONS, ANSWERS), -torch.cat(each).mean())


def test_padding_and_other_records_change_no_loss(model, features):
    inputs = model.inputs(model.text.questions(QUESTIONS), model.text.answers(ANSWERS))
    surprise = model(features, **inputs).surprise
    length = torch.tensor([len(q) + len(a) for q, a in zip(model.text.questions(QUESTIONS), model.text.answers(ANSWERS))])
    padding = torch.arange(surprise.shape[1]) >= length[:, None]
    assert padding.any() and not surprise[padding].any()
    others = inputs | {"ids": torch.where(padding, 7, inputs["ids"])}
    assert model(features, **others).surprise.equal(surprise)
    for row in range(3):
        alone = model.inputs(model.text.questions(QUESTIONS[row:row + 1]), model.text.answers(ANSWERS[row:row + 1]))
        near(model(features[row:row + 1], **alone).surprise[0], surprise[row, :length[row]], 1e-5)


def test_the_question_carries_no_loss_but_is_read(model, features):
    inputs = model.inputs(model.text.questions(QUESTIONS), model.text.answers(ANSWERS))
    for row, question in enumerate(model.text.questions(QUESTIONS)):
        assert (inputs["labels"][row, :len(question)] == IGNORE).all() and inputs["asked"][row].sum() == len(question)
    other = model.soft_prompt(features, inputs["ids"][:, :5], torch.ones(3, 5, dtype=torch.bool))
    assert not other.allclose(model.soft_prompt(features, inputs["ids"][:, :4], torch.ones(3, 4, dtype=torch.bool)))


def test_what_is_too_long_is_cut_where_it_hurts_least(tokenizer):
    model = small(tokenizer, question_length=30, answer_length=12)
    words = " ".join(f"sea sky tree {i}" for i in range(10))
    [question], [whole] = model.text.questions([words]), model.text.tokens([processed(words)])
    assert len(whole) > 30 and question == whole[-30:]
    [answer], [whole] = model.text.answers([words]), model.text.tokens([" " + words])
    assert answer == [*whole[:11], model.text.end]


# answers

def test_given_answers_are_as_likely_as_one_by_one(model, features):
    found = model.answer_log_probs(features, QUESTIONS, ANSWERS[:2])
    expected = [[slow_log_prob(model, picture, question, answer).sum().item() for answer in ANSWERS[:2]]
                for picture, question in zip(features, QUESTIONS)]
    near(found, torch.tensor(expected), 1e-3)


def test_greedy_answers_are_those_without_a_cache(model, features):
    for picture, question, said in zip(features, QUESTIONS, model.answer(features, QUESTIONS, length=8)):
        ids = torch.tensor(model.text.questions([question]))
        soft, start = model.soft_prompt(picture[None], ids, torch.ones_like(ids, dtype=torch.bool)), ids.shape[1]
        while ids.shape[1] < start + 8 and ids[0, -1] != model.text.end:
            logits = model.decoder.logits(model.decoder(model.decoder.embed(soft, ids)))[:, -1]
            ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
        assert said == model.text.decode(ids[0, start:].tolist())
    assert len(set(model.answer(features, QUESTIONS, length=8))) > 1


def test_beams_find_the_likeliest_of_all_answers_of_two_tokens(model, features):
    ids, V = torch.tensor(model.text.questions(QUESTIONS[:1])), model.text.size
    soft = model.soft_prompt(features[:1], ids, torch.ones_like(ids, dtype=torch.bool))
    both = torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], 1)
    hidden = model.decoder(model.decoder.embed(soft.expand(V, -1, -1), both))
    first, second = (model.decoder.logits(hidden[:, place]).log_softmax(1) for place in (-2, -1))
    mean = (first[0, :, None] + second) / 2
    mean[model.text.end] = first[0, model.text.end]
    best = divmod(int(mean.argmax()), V)
    assert model.answer(features[:1], QUESTIONS[:1], beams=V, length=2) == [model.text.decode(best)]


def test_what_is_drawn_does_not_depend_on_neighbours(model, features):
    drawn = model.answer(features, QUESTIONS, top_p=0.9, seeds=[5, 6, 7], length=6)
    for place, (picture, question) in enumerate(zip(features, QUESTIONS)):
        assert model.answer(picture[None], [question], top_p=0.9, seeds=[5 + place], length=6) == [drawn[place]]
    assert drawn != model.answer(features, QUESTIONS, top_p=0.9, seeds=[1, 2, 3], length=6)


# weights

def test_a_saved_model_is_the_same(model, features, tmp_path):
    model.about = {"data": "toy", "kinds": ["categorical"]}
    emovit.save(model, tmp_path / "runs" / "one")
    again = load_emovit(tmp_path / "runs" / "one")
    assert again.about == model.about and again.config == model.config
    assert again.loss(features, QUESTIONS, ANSWERS).equal(model.loss(features, QUESTIONS, ANSWERS))
    assert again.encode_image(torch.ones(1, 3, 16, 16)).equal(model.encode_image(torch.ones(1, 3, 16, 16)))
    with pytest.raises(UserError, match="holds no EmoVIT yet"):  # it is not finished
        emovit.newest_emovit(tmp_path / "runs")
    (tmp_path / "runs" / "one" / "results.json").write_text("{}")
    assert emovit.newest_emovit(tmp_path / "runs") == tmp_path / "runs" / "one"


SIZES = dict(d=64, inner=96, E=24, w=64, blocks=2, positions=40, V=50)  # heads are 64 wide


def layers(prefix: str, inner: str, cross: bool, norm=("weight", "bias")) -> dict[str, Tensor]:
    """Tensors by the names of BERT; `inner` is what a library calls the attention's inner part."""
    d, f, E = SIZES["d"], SIZES["inner"], SIZES["E"]
    shapes = {}

    def dense(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    for number in range(SIZES["blocks"]):
        block = f"{prefix}encoder.layer.{number}."
        attentions = {"attention": d} | ({"crossattention": E} if cross and number % 2 == 0 else {})
        for attention, source in attentions.items():
            dense(f"{block}{attention}.{inner}.query", d, d)
            dense(f"{block}{attention}.{inner}.key", d, source)
            dense(f"{block}{attention}.{inner}.value", d, source)
            dense(f"{block}{attention}.output.dense", d, d)
            shapes |= {f"{block}{attention}.output.LayerNorm.{one}": (d,) for one in norm}
        for which in ("", "_query") if cross else ("",):
            dense(f"{block}intermediate{which}.dense", f, d)
            dense(f"{block}output{which}.dense", d, f)
            shapes |= {f"{block}output{which}.LayerNorm.{one}": (d,) for one in norm}
    shapes |= {f"{prefix}embeddings.word_embeddings.weight": (SIZES["V"], d),
               f"{prefix}embeddings.position_embeddings.weight": (SIZES["positions"], d)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def bert(prefix: str = "bert.", norm=("gamma", "beta")) -> dict[str, Tensor]:
    d = SIZES["d"]
    return layers(prefix, "self", False, norm) | {f"{prefix}embeddings.LayerNorm.{one}": torch.randn(d) for one in norm} | {
        f"{prefix}embeddings.token_type_embeddings.weight": torch.randn(2, d), f"{prefix}pooler.dense.weight": torch.randn(d, d),
        f"{prefix}pooler.dense.bias": torch.randn(d), "cls.predictions.bias": torch.randn(SIZES["V"])}


def instructblip(library: str) -> dict[str, Tensor]:
    d, w, hf = SIZES["d"], SIZES["w"], library == "transformers"
    prefix, norm = ("qformer.", "layernorm") if hf else ("Qformer.bert.", "LayerNorm")
    projection = "language_projection" if hf else "llm_proj"
    return layers(prefix, "attention" if hf else "self", True) | {
        f"{prefix}embeddings.{norm}.weight": torch.randn(d), f"{prefix}embeddings.{norm}.bias": torch.randn(d),
        "query_tokens": torch.randn(1, 5, d), f"{projection}.weight": torch.randn(w, d), f"{projection}.bias": torch.randn(w),
        ("vision_model.post_layernorm.weight" if hf else "ln_vision.weight"): torch.randn(9)}


@pytest.fixture
def public(tmp_path, tokenizer_json):
    """CLIP and GPT-2 in small; `public(bert=tensors)` builds on them."""
    torch.manual_seed(0)
    sizes = Config(image_size=16, patch_size=8, tower_width=24, tower_layers=1, tower_heads=1, width=64, layers=2, heads=1,
                   positions=150, **SMALL)
    tower, decoder = VisionTower(sizes), LanguageModel(sizes, Tokenizer.from_str(tokenizer_json).get_vocab_size())
    for parameter in (*tower.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter)
    names = {"blocks": "h"}
    gpt2 = {".".join(names.get(one, one) for one in name.split(".")): tensor.T if tensor.dim() == 2 and ".c_" in name else tensor
            for name, tensor in decoder.state_dict().items()}
    clip = {name.replace("blocks", "transformer.resblocks").replace("attn.c_attn.", "attn.in_proj_").replace(
        "attn.c_proj", "attn.out_proj"): tensor for name, tensor in tower.state_dict().items()}
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "tokenizer.json").write_text(tokenizer_json)
    save_file({name: tensor.contiguous() for name, tensor in gpt2.items()}, tmp_path / "gpt2" / "model.safetensors")
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in clip.items()}, tmp_path / "clip.safetensors")

    def build(**given) -> tuple[EmoVIT, dict]:
        files = {}
        for flag, tensors in given.items():
            files[flag] = tmp_path / f"{flag}.safetensors"
            save_file(tensors, files[flag])
        sizes = SMALL if not given else dict(q_blocks=2, queries=5, question_length=30, answer_length=12)
        model = from_public(tmp_path / "clip.safetensors", tmp_path / "gpt2", **files, **sizes)
        return model, tower.state_dict() | {f"lm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    return build


def test_clip_and_gpt2_are_in_their_places_and_the_rest_is_random(public):
    model, given = public()
    for name, tensor in given.items():
        found = model.decoder.state_dict()[name[3:]] if name.startswith("lm.") else model.tower.state_dict()[name]
        assert found.equal(tensor), name
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"qformer", "projection"}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("prefix, norm", [("bert.", ("gamma", "beta")), ("", ("weight", "bias"))])
def test_berts_weights_serve_both_feed_forwards(public, prefix, norm):
    tensors = bert(prefix, norm)
    model, _ = public(bert=tensors)
    for number, block in enumerate(model.qformer.blocks):
        layer = f"{prefix}encoder.layer.{number}."
        assert block.attn.key.weight.equal(tensors[layer + "attention.self.key.weight"])
        assert block.attn.ln.bias.equal(tensors[layer + "attention.output.LayerNorm." + norm[1]])
        for mlp in (block.mlp, block.mlp_query):
            assert mlp.c_fc.weight.equal(tensors[layer + "intermediate.dense.weight"])
            assert mlp.ln.weight.equal(tensors[layer + "output.LayerNorm." + norm[0]])
        assert block.mlp.c_fc.weight.data_ptr() != block.mlp_query.c_fc.weight.data_ptr()
    assert model.qformer.wpe.weight.equal(tensors[prefix + "embeddings.position_embeddings.weight"])
    assert model.qformer.blocks[0].cross is not None and model.qformer.blocks[1].cross is None


def test_instructblips_weights_come_by_either_librarys_names(public):
    for library, inner, prefix in (("transformers", "attention", "qformer."), ("lavis", "self", "Qformer.bert.")):
        tensors = instructblip(library)
        model, _ = public(qformer=tensors)
        block, layer = model.qformer.blocks[0], f"{prefix}encoder.layer.0."
        assert block.cross.value.weight.equal(tensors[f"{layer}crossattention.{inner}.value.weight"])
        assert block.mlp_query.c_proj.weight.equal(tensors[f"{layer}output_query.dense.weight"])
        assert block.mlp.ln.weight.equal(tensors[f"{layer}output.LayerNorm.weight"])
        assert model.qformer.queries.equal(tensors["query_tokens"])
        assert model.projection.weight.equal(tensors[f"{'language_projection' if library == 'transformers' else 'llm_proj'}.weight"])


def test_of_a_larger_q_former_for_another_tower_the_rest_is_taken(public):
    for name, size in (("E", 32), ("w", 128), ("blocks", 4)):
        before = SIZES[name]
        SIZES[name] = size
        try:
            tensors = instructblip("lavis")
        finally:
            SIZES[name] = before
        model, _ = public(qformer=tensors)
        block, layer = model.qformer.blocks[0].cross, "Qformer.bert.encoder.layer.0.crossattention.self."
        assert block.query.weight.equal(tensors[layer + "query.weight"])
        assert (block.key.weight.shape == tensors[layer + "key.weight"].shape) == (name != "E")
        assert (model.projection.bias.shape == tensors["llm_proj.bias"].shape) == (name != "w")
        assert len(model.qformer.blocks) == 2


def test_weights_that_do_not_fit_are_named(public, tmp_path):
    whole = bert()
    with pytest.raises(UserError, match="unexpected: qformer.blocks.0.attn.something.weight"):
        public(bert=whole | {"bert.encoder.layer.0.attention.something.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="missing: qformer.blocks.1.attn.query.bias"):
        public(bert={name: tensor for name, tensor in whole.items() if name != "bert.encoder.layer.1.attention.self.query.bias"})
    with pytest.raises(UserError, match="holds no Q-Former, nor BERT"):
        public(bert={"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="--bert nowhere: there is no such file or folder"):
        from_public(tmp_path / "clip.safetensors", tmp_path / "gpt2", bert="nowhere")


def test_errors_say_what_is_wrong(tmp_path, tokenizer):
    with pytest.raises(UserError, match="--run none: there is no such folder"):
        load_emovit("none")
    with pytest.raises(UserError, match="is no EmoVIT"):
        load_emovit(tmp_path)
    with pytest.raises(UserError, match="lower --question-length or --answer-length"):
        Config(positions=100)
    with pytest.raises(UserError, match="--q-width 10 is no multiple of --q-heads 3"):
        Config(q_width=10, q_heads=3)
    with pytest.raises(UserError, match="there is no poems; there are categorical, conversation, reasoning"):
        emovit_training.Settings(kinds="categorical,poems")


# training, on a toy world of 60 paintings and a run that knows nothing

@pytest.fixture
def call(tmp_path, toy_root, make_model, monkeypatch):
    """The program, on a small run; returns the folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_run(make_model(train_tower=True), "base")

    def call(*flags, name: str = "one") -> Path:
        own = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        argv = ["emovit", "--from", "base", "--data-root", toy_root, "--toy-paintings", 60, "--name", name, *own, "--per-picture", 1,
                "--question-length", 30, "--answer-length", 12, "--epochs", 2, "--batch", 24, "--warmup", 2, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        emovit.main()
        return Path("runs") / name
    return call


def losses(run: Path) -> list:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(record["step"], record.get("losses"), record.get("validation")) for record in records]


@pytest.mark.parametrize("language_model", [True, False])
def test_what_is_frozen_stays_equal_to_the_bit(call, language_model):
    run, base = call(f"--{'' if language_model else 'no-'}train-language-model"), load_file("base/model.safetensors")
    after = load_file(run / "model.safetensors")
    for name in sorted(after.keys() & base.keys() - {"decoder.wpe.weight"}):
        assert after[name].equal(base[name]) != (language_model and name.startswith("decoder.")), name
    torch.manual_seed(0)
    before = from_run(load_model("base"), **asdict(load_emovit(run).config)).state_dict()
    for name in after.keys() - base.keys():
        unread = re.match(r"qformer\.blocks\.1\.mlp\.(ln|.*bias)", name)  # what the last block says of the question
        assert after[name].equal(before[name]) == bool(unread), name  # its matrices decay
    results, about = json.loads((run / "results.json").read_text()), load_emovit(run).about
    assert len(results["validation"]) == 2 and results["records"].keys() == set(KINDS)
    assert about["data"] == "toy" and about["kinds"] == list(KINDS) and emovit.newest_emovit("runs") == run


@pytest.mark.parametrize("how", [signal.SIGTERM, "killed"])
def test_a_stopped_training_ends_like_a_whole_one(call, monkeypatch, how):
    whole, step, calls = call("--dropout", 0.1), emovit_training.Learner.step, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 9:  # in the second epoch
            if how == "killed":
                raise KeyboardInterrupt
            os.kill(os.getpid(), how)
        return step(*given)
    monkeypatch.setattr(emovit_training.Learner, "step", stopped)
    with pytest.raises(KeyboardInterrupt if how == "killed" else UserError):
        call("--dropout", 0.1, name="parts")
    monkeypatch.setattr(emovit_training.Learner, "step", step)
    parts = call("--dropout", 0.1, name="parts")
    assert losses(parts) == losses(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_alone_and_another_does_not_take_its_place(call, capsys):
    run = call("--epochs", 1, "--kinds", "categorical")
    before = (run / "model.safetensors").stat().st_mtime_ns
    call("--epochs", 1, "--kinds", "categorical")
    assert (run / "model.safetensors").stat().st_mtime_ns == before and "is finished" in capsys.readouterr().out
    assert load_emovit(run).about["kinds"] == ["categorical"]
    with pytest.raises(UserError, match="--epochs, .*: nothing is trained here"):
        call("--ask", "why?")
    with pytest.raises(UserError, match="--html: name pictures to ask about"):
        call("--html", "page.html")
    with pytest.raises(UserError, match="--bert has no effect"):
        call("--bert", "somewhere", name="two")
    with pytest.raises(UserError, match="lr"):
        call("--epochs", 1, "--kinds", "categorical", "--lr", 0.5)


def test_records_of_a_file_are_learned_from_if_they_are_of_training_pictures(call, toy):
    records = records_of(toy)
    write_records("some.json", records[:30])
    run = call("--epochs", 1, "--records", "some.json")
    results = json.loads((run / "results.json").read_text())
    assert sum(results["records"].values()) == 30
    write_records("others.json", [dataclasses.replace(records[0], image=toy.names[toy.paintings("test")[0]])])
    with pytest.raises(UserError, match="1 pictures are none of toy's training pictures, such as"):
        call("--records", "others.json", name="two")


@pytest.fixture
def examples(toy, model):
    """Of the training split, with features that tell the paintings apart."""
    class Store:
        def get(self, paintings):
            return np.random.default_rng(0).normal(size=(len(toy.names), 4, 24)).astype(np.float16)[paintings]
    pictures = Pictures(Store(), np.ones(len(toy.names), bool), {})

    def make(**settings):
        return emovit_training.Examples(toy, records_of(toy), model.text, pictures, emovit_training.Settings(**settings))
    return make


def test_every_record_has_its_turn(examples, toy):
    some, everything = examples(per_picture=2), records_of(toy)
    often = np.zeros(len(everything), int)
    for epoch in range(12):
        visited = some.visited(epoch)
        assert len(visited) == len(some) == len(set(visited))
        group = some.group[visited]
        assert np.bincount(group).tolist() == np.minimum(some.count, 2).tolist()
        often[visited] += 1
    share = np.minimum(some.count, 2) / some.count  # of an epoch
    assert (abs(often - 12 * share[some.group]) <= 2).all()
    assert len(examples(per_picture=0)) == len(everything)
    batches = examples(per_picture=0).epoch(3, 16)
    seen = np.sort(np.concatenate(batches.steps))
    assert seen.tolist() == list(range(len(everything)))


def test_the_parts_of_a_step_add_up_to_its_gradient(examples, model):
    some, gradients = examples(per_picture=1, leave_out=0.5), []
    world = World()
    for parts, accumulate in ((1, 1), (2, 2)):
        settings = emovit_training.Settings()
        learner = emovit_training.Learner(model, settings, world, emovit_training.parameter_groups(model, settings))
        learner.optimizer.zero_grad()
        for part in range(parts):
            own = some.epoch(0, 10, part, parts, accumulate)
            learner.backward([own[turn] for turn in range(accumulate)])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    near(gradients[1], gradients[0], 1e-5)


def test_only_words_of_questions_are_left_out(examples, model):
    plain, thinned = (examples(leave_out=share).epoch(2, 32) for share in (0.0, 0.8))
    left = []
    for step in range(20):
        before, after = plain[step].inputs, thinned[step].inputs
        for row in range(len(before["ids"])):
            whole, less = ({"q": one["ids"][row][:one["asked"][row].sum()].tolist(),
                            "a": one["labels"][row][one["labels"][row] != IGNORE].tolist(), "ids": one["ids"][row].tolist()}
                           for one in (before, after))
            rest = iter(whole["q"])
            assert all(token in rest for token in less["q"])  # the others, in their order
            assert less["a"] == whole["a"] and less["ids"][:len(less["q"] + less["a"])] == less["q"] + less["a"]
            left.append(len(less["q"]) / len(whole["q"]))
    assert min(left) < 0.4 and max(left) == 1 and abs(np.mean(left) - 0.6) < 0.05

"""The model against slow and obvious versions of itself: losses, decoding, caches, beams, emotion distribution."""
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SENTENCES

from sevlm import (
    EMOTIONS,
    IGNORE,
    Config,
    Decoding,
    attention_maps,
    beam_search,
    emotion_log_probs,
    generate,
    load,
    match_scores,
    normalise,
    nucleus,
)
from support.device import held_in
from support.program import UserError

MODES = [dict(), dict(two_way_emotions=True), dict(vad_input=False, vad_head=False, contrastive_head=False),
         dict(emotion_encoder=False), dict(fixed_boundary=True, vad_on_emotion=True, two_way_emotions=True)]


@pytest.fixture
def features():
    """Of three pictures."""
    return torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(1))


def step_by_step(model, features, ids):
    """Next-token logits (V,) of one sentence on one picture, reading all of it from scratch."""
    return model.decoder.logits(model(features, **model.inputs(torch.tensor([ids]))).hidden[0, -1])


@torch.no_grad()
def slow_generate(model, features, opening, length, choose):
    """Finish one sentence without caches; `choose` is given logits and position."""
    ids, total = list(opening), 0.0
    while len(ids) < length:
        logits = step_by_step(model, features, ids)
        ids.append(choose(logits, len(ids)))
        total += logits.log_softmax(0)[ids[-1]].item()
        if ids[-1] in model.text.special:
            break
    return ids + [model.text.pad] * (length - len(ids)), total


@pytest.fixture
def batch(make_model):
    """Two sentences of different emotions for each of three pictures, with negatives."""
    def make(model):
        data = model.sentence(["awe", "something else", "fear", "sadness", "anger", "contentment"], SENTENCES)
        return data | {"labels": model.text.labels(data["ids"]), "wrong_emotion": torch.arange(6) ^ 1,
                       "wrong_image": torch.tensor([2, 3, 4, 5, 0, 1])}
    return make


@pytest.mark.parametrize("changes", MODES)
def test_cached_greedy_decoding_equals_uncached(make_model, features, changes):
    model = make_model(**changes)
    openings = [model.text.prompt, model.text.opening("something else"), model.text.opening("awe")]  # ragged
    found = generate(model, features, openings)
    for i, opening in enumerate(openings):
        ids, total = slow_generate(model, features[i:i + 1], opening, 30, lambda logits, _: logits.argmax().item())
        assert found.ids[i].tolist() == ids
        assert found.log_probs[i].item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("changes", MODES)
def test_cached_samples_equal_uncached(make_model, features, changes):
    """Five samples for each picture, some of which end early, drawn by the same uniform numbers."""
    model = make_model(**changes)
    openings = [model.text.opening("fear"), model.text.prompt, model.text.opening("something else")]
    found = generate(model, features, openings, samples=5, top_p=0.9, temperature=0.8, seeds=[31, 32, 33])
    for i, opening in enumerate(openings):
        uniform = torch.rand(5, 30, generator=torch.Generator().manual_seed(31 + i))
        for j in range(5):
            ids, total = slow_generate(model, features[i:i + 1], opening, 30, lambda logits, place, j=j, uniform=uniform:
                                    nucleus(logits[None], 0.9, 0.8, uniform[None, j, place])[0].item())
            assert found.ids[5 * i + j].tolist() == ids
            assert found.log_probs[5 * i + j].item() == pytest.approx(total, abs=1e-3)
    lengths = (found.ids != model.text.pad).sum(1)
    assert lengths.min() < lengths.max(), "no sentence ended early: the test has lost its point"


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES[:2])
def test_cached_logits_equal_uncached(make_model, features, changes):
    model = make_model(**changes)
    ids = torch.randint(5, 400, (3, 20), generator=torch.Generator().manual_seed(2))
    ids[:, 7] = model.text.because
    decoding = Decoding(model, features, ids[:, :4], 20)
    for place in range(4, 20):
        logits = decoding.logits()
        for i in range(3):
            assert torch.allclose(logits[i], step_by_step(model, features[i:i + 1], ids[i, :place].tolist()), atol=1e-4)
        decoding.append(ids[:, place])


def test_a_picture_answers_alike_alone_and_in_company(make_model, features):
    model = make_model()
    together = generate(model, features, samples=2, top_p=0.9, seeds=7).ids
    alone = [generate(model, features[i:i + 1], samples=2, top_p=0.9, seeds=7).ids for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, generate(model, features, samples=2, top_p=0.9, seeds=8).ids)


def test_nucleus_draws_from_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[None]
    uniform = torch.linspace(0, 0.9999, 1000)
    drawn = nucleus(logits.expand(1000, -1), 0.8, 1.0, uniform).bincount(minlength=4) / 1000  # 0.5 + 0.25 + 0.15 >= 0.8
    assert torch.allclose(drawn, torch.tensor([0.5, 0.25, 0.15, 0]) / 0.9, atol=2e-3)
    assert nucleus(logits, 0, 1.0, torch.tensor([0.99])).tolist() == [0]
    assert nucleus(logits.expand(1000, -1), 1.0, 1.0, uniform).max() == 3


@pytest.mark.parametrize("sharpness", [0.1, 8.0])  # the nucleus has nearly all of 3,000 tokens, or a few
def test_nucleus_draws_as_after_sorting_everything(sharpness):
    logits, uniform = sharpness * torch.randn(20, 3000, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    probs, order = logits.softmax(1).sort(1, descending=True)
    for row, drawn in enumerate(nucleus(logits, 0.9, 1.0, uniform).tolist()):
        size = int((probs[row].cumsum(0) < 0.9).sum()) + 1
        parts = probs[row, :size].cumsum(0) / probs[row, :size].sum()
        assert drawn == order[row, int((parts < uniform[row]).sum())]


def test_beam_search_finds_what_exhaustive_search_finds(make_model, features):
    """With as many beams as there are sentences nothing is cut off; two tokens after the opening."""
    model = make_model()
    opening, V = model.text.opening("awe"), model.text.size
    length = len(opening) + 2
    found = beam_search(model, features[:2], [opening] * 2, beams=3, length=length)
    wide = beam_search(model, features[:2], [opening] * 2, beams=V, length=length)
    for i in range(2):
        picture, scores = features[i:i + 1], {}
        first = step_by_step(model, picture, opening).log_softmax(0)
        for a in range(V):
            if a in model.text.special:
                scores[a, model.text.pad] = first[a].item()
        for a in first.topk(40).indices.tolist():
            if a not in model.text.special:
                second = step_by_step(model, picture, [*opening, a]).log_softmax(0)
                scores |= {(a, b): (first[a] + second[b]).item() for b in range(V)}
        best = max(scores, key=lambda pair: scores[pair] / (1 if pair[0] in model.text.special else 2))
        assert tuple(wide.ids[i * V, -2:].tolist()) == best
        assert wide.log_probs[i * V].item() == pytest.approx(scores[best], abs=1e-4)
        assert found.log_probs[3 * i] <= wide.log_probs[i * V] + 1e-4


def test_one_beam_is_greedy_and_openings_may_differ(make_model, features):
    model = make_model()
    openings = [model.text.prompt, model.text.opening("something else"), model.text.opening("awe")]
    greedy, beam = generate(model, features, openings), beam_search(model, features, openings, beams=1)
    assert torch.equal(greedy.ids, beam.ids)
    assert torch.allclose(greedy.log_probs, beam.log_probs, atol=1e-3)
    three = beam_search(model, features, openings, beams=3)
    for i, opening in enumerate(openings):
        assert three.ids[3 * i, :len(opening)].tolist() == opening
        alone = beam_search(model, features[i:i + 1], [opening], beams=3)
        assert torch.equal(alone.ids, three.ids[3 * i:3 * i + 3])


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES)
def test_emotion_distribution_equals_brute_force(make_model, features, changes):
    model = make_model(**changes)
    assert {len(name) for name in model.text.names} != {1}, "all names are one token: the test has lost its point"
    ours = emotion_log_probs(model, features)
    for i in range(len(features)):
        picture, scores = features[i:i + 1], []
        for emotion in EMOTIONS:
            ids, score = list(model.text.prompt), 0.0
            for token in model.text.tokens(" " + emotion):
                score += step_by_step(model, picture, ids).log_softmax(0)[token].item()
                ids.append(token)
            scores.append(score)
        assert torch.allclose(ours[i], torch.tensor(scores).log_softmax(0), atol=1e-4)


@torch.no_grad()
def test_sharing_keys_and_values_changes_nothing(make_model, features, batch):
    model = make_model()
    data = batch(model)
    shared, apart = model(features, **data), model(features.repeat_interleave(2, 0), **data)
    assert torch.allclose(shared.hidden, apart.hidden, atol=1e-5)
    for name, loss in shared.losses.items():
        assert torch.allclose(loss, apart.losses[name], atol=1e-5), name


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(wrong_image=False), dict(fixed_boundary=True, padding_in_means=True)])
def test_losses_equal_a_slow_version(make_model, features, batch, changes):
    model = make_model(**changes)
    data, text, config = batch(model), model.text, model.config
    output = model(features, **data)
    language, vad, contrastive = [], [], []
    parts = []
    for n, ids in enumerate(data["ids"].tolist()):
        because = 6 if config.fixed_boundary else ids.index(text.because)
        end = 30 if config.padding_in_means else next((i for i in range(1, 30) if ids[i] == text.pad), 30)
        hidden, words = output.hidden[n], data["vad"][n]
        parts.append((features[n // 2].mean(0), hidden[:because].mean(0), hidden[because:end].mean(0)))
        for t in range(29):
            if ids[t + 1] != text.pad:
                language.append(-model.decoder.logits(hidden[t]).log_softmax(0)[ids[t + 1]].item())
            if t + 1 >= because and words[t + 1].any():
                vad.append(((model.vad_head(hidden[t]) - words[t + 1]) ** 2).mean().item())
    for n, (image, m, x) in enumerate(parts):
        rivals = [x, parts[n ^ 1][2]] + ([parts[(n + 2) % 6][2]] if config.wrong_image else [])
        scores = [math.exp(model.contrastive_head(torch.cat([image, m, rival])).item()) for rival in rivals]
        assert output.match[n].exp().item() == pytest.approx(scores[0], rel=1e-4)
        contrastive.append(-math.log(scores[0] / sum(scores)))
    expected = {name: sum(values) / len(values) for name, values in
                (("language", language), ("vad", vad), ("contrastive", contrastive))}
    expected["total"] = expected["language"] + expected["vad"] + config.alpha * expected["contrastive"]
    assert vad, "no known words: the test has lost its point"
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_missing_negative_does_not_count(make_model, features, batch):
    model = make_model()
    data = batch(model)
    both, none = dict(data), dict(data, wrong_emotion=torch.full((6,), -1), wrong_image=torch.full((6,), -1))
    assert model(features, **none).losses["contrastive"].item() == 0
    one = dict(data, wrong_emotion=torch.full((6,), -1))
    without = make_model(wrong_emotion=False)
    without.load_state_dict(model.state_dict())
    assert torch.allclose(model(features, **one).losses["contrastive"], without(features, **both).losses["contrastive"])


@torch.no_grad()
def test_a_token_changes_nothing_before_it(make_model, features, batch):
    model = make_model()
    data = batch(model)
    before = model(features, **data)
    for t in range(1, 30):
        changed = data["ids"].clone()
        changed[:, t] = torch.tensor(model.text.tokens(" gloomy")[-1])
        after = model(features, changed, data["segments"], model.vad(changed))
        assert torch.allclose(before.hidden[:, :t], after.hidden[:, :t], atol=1e-5)
        assert torch.allclose(before.emotion_features[:, :t], after.emotion_features[:, :t], atol=1e-6)
        assert torch.equal(data["vad"][:, :t], model.vad(changed)[:, :t])
    leaky = make_model(two_way_emotions=True)
    changed[:, 10] = model.text.tokens(" sea")[0]
    first, second = (leaky(features, ids, data["segments"], leaky.vad(ids)).emotion_features
                     for ids in (data["ids"], changed))
    assert not torch.allclose(first[:, :10], second[:, :10]), "both ways must leak, as in the authors' code"


@torch.no_grad()
def test_padding_does_not_matter(make_model, features, batch):
    """A sentence's hidden states and match are the same however much padding follows."""
    model = make_model()
    data = batch(model)
    longer = torch.cat([data["ids"], torch.full((6, 5), model.text.pad)], 1)
    short, long = model(features, **model.inputs(data["ids"])), model(features, **model.inputs(longer))
    real = data["ids"] != model.text.pad
    assert torch.allclose(short.hidden[real], long.hidden[:, :30][real], atol=1e-5)
    assert torch.allclose(short.match, long.match, atol=1e-5)


@torch.no_grad()
def test_attention_maps_are_the_softmax_that_the_model_used(make_model, features):
    model = make_model(layers=1)
    found = generate(model, features, samples=2, top_p=0.9)
    maps = attention_maps(model, features, found.ids)
    assert maps.shape == (6, 30, 4)
    assert torch.allclose(maps[:, 1:].sum(2), torch.ones(6, 29)) and maps[:, 0].abs().max() == 0
    block = model.decoder.blocks[0]
    embedded, _ = model.embed(**model.inputs(found.ids))
    x = embedded + block.attn(block.ln_1(embedded))
    query = block.cross_attn.q_attn(block.ln_cross(x))[3, 8].view(4, 8)  # picture 1's second, token 9
    key, value = block.cross_attn.c_attn(features[1]).view(4, 2, 4, 8).unbind(1)
    weights = [(key[:, head] @ query[head] / 8 ** 0.5).softmax(0) for head in range(4)]
    assert torch.allclose(maps[3, 9], torch.stack(weights).mean(0), atol=1e-5)
    attended = torch.cat([weights[head] @ value[:, head] for head in range(4)])
    ours = block.cross_attn(block.ln_cross(x), block.cross_attn.keys_values(features))[3, 8]
    assert torch.allclose(ours, block.cross_attn.c_proj(attended), atol=1e-4)


def test_score_ranks_by_the_contrastive_head(make_model, features):
    model = make_model()
    scores = model.score(features, ["awe"] * 6, SENTENCES)
    alone = torch.cat([model.score(features[i // 2:i // 2 + 1], ["awe"], [SENTENCES[i]]) for i in range(6)])
    assert torch.allclose(scores, alone, atol=1e-5)
    ids = model.sentence(["awe"] * 6, SENTENCES)["ids"]
    assert torch.equal(match_scores(model, features, ids), scores)


def test_the_frozen_tower_has_no_gradient(make_model, images, batch):
    for trained in (False, True):
        model = make_model(train_tower=trained).train()
        model(images, **batch(model)).losses["total"].backward()
        assert all((parameter.grad is not None) == trained for parameter in model.tower.parameters())
        assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("tower"))


@torch.no_grad()
def test_pixels_are_normalised_once(make_model):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for theirs, mean in ((False, 0.48145466), (True, 0.485)):
        model = make_model(authors_pixels=theirs)
        deviation = 0.229 if theirs else 0.26862954
        assert torch.allclose(normalise(pixels, model.config)[:, 0], (pixels[:, 0] / 255 - mean) / deviation)
        assert torch.equal(model.encode_image(pixels), model.encode_image(normalise(pixels, model.config)))


@torch.no_grad()
def test_weights_held_in_bf16_compute_what_autocast_computes(make_model, images, batch):
    """Bit for bit, but for the word embedding, whose rows are rounded too."""
    plain, narrow = make_model(), held_in(make_model(), torch.bfloat16)
    plain.decoder.wte.weight.copy_(plain.decoder.wte.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (model(images, **batch(model)) for model in (plain, narrow))
        told = [generate(model, model.encode_image(images)).ids for model in (plain, narrow)]
    assert torch.equal(expected.hidden, found.hidden) and torch.equal(expected.match, found.match)
    assert all(torch.equal(expected.losses[name], found.losses[name]) for name in expected.losses)
    assert torch.equal(*told)
    kept = {name for name, parameter in narrow.named_parameters() if parameter.dtype == torch.float32}
    heads = ("fusion", "vad_head", "contrastive_head", "emotion_encoder")
    assert {name for name in kept if not name.startswith(heads) and "ln_" not in name} == {
        "tower.class_embedding", "tower.positional_embedding", "decoder.wpe.weight"}


@pytest.mark.parametrize("part, absent", [
    (dict(vad_input=False, vad_head=False), "fusion|emotion_encoder|vad_head|word_vad"), (dict(vad_head=False), "vad_head"),
    (dict(contrastive_head=False), "contrastive_head"), (dict(emotion_encoder=False), "emotion_encoder")])
def test_parts_switched_off_leave_no_weights(make_model, features, batch, part, absent):
    model = make_model(**part)
    assert not any(name.startswith(tuple(absent.split("|"))) for name in model.state_dict())
    losses = model(features, **batch(model)).losses
    assert ("vad" in losses) == model.config.vad_head and ("contrastive" in losses) == model.config.contrastive_head


def test_text_round_trip(make_model):
    text = make_model().text
    ids = text.encode(["something else", "awe"], ["the man's face is blue-grey because", "of it"], 30)
    starts = [row.index(text.because) for row in ids.tolist()]
    assert starts == [len(text.opening(emotion)) - 1 for emotion in ("something else", "awe")]
    assert [row.index(text.explanation) for row in text.segments(ids).tolist()] == starts
    assert text.decode(ids[0].tolist()) == "the emotion is something else because the man's face is blue-grey because"
    assert text.decode(ids[1].tolist()) == "the emotion is awe because of it"
    labels = text.labels(ids)
    assert labels[:, 0].tolist() == [IGNORE] * 2 and ((labels == IGNORE) == (ids == text.pad))[:, 1:].all()


def test_emotions_of_ones_own_with_names_that_begin_alike(make_model, features):
    """What the model says of "joy" and of "joy of life" adds up to what it says of "joy"."""
    own = ("joy", "joy of life", "quiet grief")
    model = make_model(emotions=own)
    text, ours = model.text, emotion_log_probs(model, features)
    assert ours.shape == (3, 3) and torch.allclose(ours.exp().sum(1), torch.ones(3))

    def spoken(picture, tokens):
        ids, score = list(text.prompt), 0.0
        for token in tokens:
            score += step_by_step(model, features[picture:picture + 1], ids).log_softmax(0)[token].item()
            ids.append(token)
        return score
    for picture in range(3):
        scores = [spoken(picture, name + [text.because] * (name == text.names[0])) for name in text.names]
        assert torch.allclose(ours[picture], torch.tensor(scores).log_softmax(0), atol=1e-4)
    found = generate(model, features, [text.opening(name) for name in own])
    assert [text.decode(row).split(" because")[0] for row in found.ids.tolist()] == [f"the emotion is {name}" for name in own]


def test_the_way_through_figure_4_shows_the_models_numbers():
    """`python sevlm.py` prints what the model computes."""
    sentence = "awe because the light is holy"
    command = [sys.executable, "sevlm.py", "examples/awe-moon.png", sentence]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert max(map(len, shown.splitlines())) <= 100
    from sevlm import load_pixels
    model = load(ROOT / "examples" / "toy")
    pixels = load_pixels(ROOT / "examples" / "awe-moon.png", model.config)[None]
    other, its_own = re.search('and "(.*) because (.*)"', shown).groups()
    data = model.sentence(["awe", other], ["the light is holy", its_own])
    with torch.no_grad():
        output = model(pixels, **data, labels=model.text.labels(data["ids"]), wrong_emotion=torch.tensor([1, 0]))
    for name, loss in output.losses.items():
        assert re.search(rf"{name} loss.* {loss:.3f}\b", shown), name
    last = len(model.text.opening("awe")) + 3  # "holy" in the toy's tokens
    assert " ".join(f"{number:+.3f}" for number in output.hidden[0, last, :3].tolist()) in shown


@pytest.mark.parametrize("call, message", [
    (lambda m, x: m(x, torch.full((3, 5), m.text.size), *[torch.zeros(3, 5, dtype=int)] * 2), "token ids"),
    (lambda m, x: m.encode_image(torch.zeros(3, 3, 16, 8)), r"images must be \(B, 3, 16, 16\), not \(3, 3, 16, 8\)"),
    (lambda m, x: m(x[:0], **m.sentence(["awe"], ["calm"])), "1 sentences do not divide among 0 pictures"),
    (lambda m, x: m(x, **m.sentence(["awe"], ["calm"])), "1 sentences do not divide among 3 pictures"),
    (lambda m, x: m(x, *[torch.zeros(3, 49, dtype=int)] * 2, torch.zeros(3, 49, 3)), "beyond the position table's 48 rows"),
    (lambda m, x: generate(m, x, length=49), "position table of 48 rows"),
    (lambda m, x: generate(m, x, [m.text.prompt]), "1 openings for 3 pictures"),
    (lambda m, x: m.text.opening("joy"), "unknown emotion 'joy'; the emotions are amusement, awe"),
    (lambda m, x: Config(length=2000), "--length 2000 is beyond the position table's --positions 1024"),
    (lambda m, x: Config(wrong_emotion=False, wrong_image=False), "needs a negative"),
    (lambda m, x: Config(image_size=225), "--image-size 225 is no multiple of --patch-size 16"),
    (lambda m, x: Config(emotions=["awe"]), "2 to 40 different emotions, not 1"),
])
def test_bad_input_is_named(make_model, features, call, message):
    with pytest.raises((ValueError, UserError), match=message):
        call(make_model(), features)

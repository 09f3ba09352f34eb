"""The model against slow and obvious versions of itself: losses, decoding, caches, beams, emotion distribution."""
import math

import pytest
import torch
from conftest import SENTENCES
from torch.nn import functional as F

from sevlm import (
    EMOTIONS,
    IGNORE,
    PACKS,
    Config,
    Decoding,
    Linear,
    attention,
    beam_search,
    emotion_log_probs,
    nucleus,
    still_writing,
    write,
)
from vad import UserError

MODES = [dict(), dict(two_way_emotions=True), dict(vad_input=False, vad_head=False, contrastive_head=False),
         dict(emotion_encoder=False), dict(fixed_boundary=True, vad_on_emotion=True, two_way_emotions=True)]


def step_by_step(model, patches, ids):
    """Next-token logits (V,) of one sentence on one picture, reading all of it from scratch."""
    ids, text = torch.tensor([ids]), model.text
    starts = [row.index(text.because) if text.because in row else 99 for row in ids.tolist()]
    segments = text.segments(torch.tensor(starts), ids.shape[1])
    rows = model.word_vad(ids) if model.config.uses_vad else None
    return model.decoder.logits(model(patches, ids, segments, rows).hidden[0, -1])


@torch.no_grad()
def slow_write(model, patches, opening, length, choose):
    """Finish one sentence without caches; `choose` is given logits and position."""
    ids, total = list(opening), 0.0
    while len(ids) < length:
        logits = step_by_step(model, patches, ids)
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
def test_cached_greedy_decoding_equals_uncached(make_model, images, changes):
    model = make_model(**changes)
    openings = [model.text.prompt, model.text.opening("something else"), model.text.opening("awe")]  # ragged
    written = write(model, images, openings)
    for i, opening in enumerate(openings):
        ids, total = slow_write(model, model.see(images[i:i + 1]), opening, 30, lambda logits, _: logits.argmax().item())
        assert written.ids[i].tolist() == ids
        assert written.log_probs[i].item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("changes", MODES)
def test_cached_samples_equal_uncached(make_model, images, changes):
    """Five samples for each picture, some of which end early, drawn by the same uniform numbers."""
    model = make_model(**changes)
    openings = [model.text.opening("fear"), model.text.prompt, model.text.opening("something else")]
    written = write(model, images, openings, samples=5, top_p=0.9, temperature=0.8, seeds=[4, 5, 6])
    for i, opening in enumerate(openings):
        uniform = torch.rand(5, 30, generator=torch.Generator().manual_seed(4 + i))
        for j in range(5):
            ids, total = slow_write(model, model.see(images[i:i + 1]), opening, 30, lambda logits, place, j=j, uniform=uniform:
                                    nucleus(logits[None], 0.9, 0.8, uniform[None, j, place])[0].item())
            assert written.ids[5 * i + j].tolist() == ids
            assert written.log_probs[5 * i + j].item() == pytest.approx(total, abs=1e-3)
    lengths = (written.ids != model.text.pad).sum(1)
    assert lengths.min() < lengths.max(), "no sentence ended early: the test has lost its point"


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES[:2])
def test_cached_logits_equal_uncached(make_model, images, changes):
    model = make_model(**changes)
    patches, ids = model.see(images), torch.randint(5, 400, (3, 20), generator=torch.Generator().manual_seed(2))
    ids[:, 7] = model.text.because
    decoding = Decoding(model, patches, ids[:, :4])
    for place in range(4, 20):
        logits = decoding.logits()
        for i in range(3):
            assert torch.allclose(logits[i], step_by_step(model, patches[i:i + 1], ids[i, :place].tolist()), atol=1e-4)
        decoding.append(ids[:, place])


def test_a_picture_answers_alike_alone_and_in_company(make_model, images):
    model = make_model()
    together = write(model, images, samples=2, top_p=0.9, seeds=7).ids
    alone = [write(model, images[i:i + 1], samples=2, top_p=0.9, seeds=7).ids for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, write(model, images, samples=2, top_p=0.9, seeds=8).ids)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_follows_its_weight(bias):
    layer, x = Linear(768, 512, bias=bias), torch.randn(3, 5, 768)

    def agrees():
        return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-3)
    assert agrees() and hasattr(layer.weight, "packed") == PACKS
    layer.weight.mul_(-2)  # as an optimizer does
    assert agrees()
    layer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()})
    assert agrees()
    layer.weight.data = torch.randn(512, 768)  # as moving to a device and back does
    assert agrees()


def test_still_writing_keeps_pictures_together():
    done = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    rows, kept = still_writing(done)
    assert kept.tolist() == [0, 2]
    assert set(rows[:2].tolist()) >= {0} and set(rows[2:].tolist()) == {7, 8}
    assert all(row // 3 == 0 for row in rows[:2].tolist())


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


def test_beam_search_finds_what_exhaustive_search_finds(make_model, images):
    """With as many beams as there are sentences nothing is cut off; two tokens after the opening."""
    model = make_model()
    opening, V = model.text.opening("awe"), model.text.size
    length = len(opening) + 2
    found = beam_search(model, images[:2], [opening] * 2, beams=3, length=length)
    wide = beam_search(model, images[:2], [opening] * 2, beams=V, length=length)
    for i in range(2):
        patches, scores = model.see(images[i:i + 1]), {}
        first = step_by_step(model, patches, opening).log_softmax(0)
        for a in range(V):
            if a in model.text.special:
                scores[a, model.text.pad] = first[a].item()
        for a in first.topk(40).indices.tolist():
            if a not in model.text.special:
                second = step_by_step(model, patches, [*opening, a]).log_softmax(0)
                scores |= {(a, b): (first[a] + second[b]).item() for b in range(V)}
        best = max(scores, key=lambda pair: scores[pair] / (1 if pair[0] in model.text.special else 2))
        assert tuple(wide.ids[i * V, -2:].tolist()) == best
        assert wide.log_probs[i * V].item() == pytest.approx(scores[best], abs=1e-4)
        assert found.log_probs[3 * i] <= wide.log_probs[i * V] + 1e-4


def test_one_beam_is_greedy_and_openings_may_differ(make_model, images):
    model = make_model()
    openings = [model.text.prompt, model.text.opening("something else"), model.text.opening("awe")]
    greedy, beam = write(model, images, openings), beam_search(model, images, openings, beams=1)
    assert torch.equal(greedy.ids, beam.ids)
    assert torch.allclose(greedy.log_probs, beam.log_probs, atol=1e-3)
    three = beam_search(model, images, openings, beams=3)
    for i, opening in enumerate(openings):
        assert three.ids[3 * i, :len(opening)].tolist() == opening
        alone = beam_search(model, images[i:i + 1], [opening], beams=3)
        assert torch.equal(alone.ids, three.ids[3 * i:3 * i + 3])


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES)
def test_emotion_distribution_equals_brute_force(make_model, images, changes):
    model = make_model(**changes)
    assert {len(name) for name in model.text.names} != {1}, "all names are one token: the test has lost its point"
    ours = emotion_log_probs(model, images)
    for i in range(len(images)):
        patches, scores = model.see(images[i:i + 1]), []
        for emotion in EMOTIONS:
            ids, score = list(model.text.prompt), 0.0
            for token in model.text.tokens(" " + emotion):
                score += step_by_step(model, patches, ids).log_softmax(0)[token].item()
                ids.append(token)
            scores.append(score)
        assert torch.allclose(ours[i], torch.tensor(scores).log_softmax(0), atol=1e-4)


@torch.no_grad()
def test_sharing_keys_and_values_changes_nothing(make_model, images, batch):
    model = make_model()
    data, patches = batch(model), model.see(images)
    shared, apart = model(patches, **data), model(patches.repeat_interleave(2, 0), **data)
    assert torch.allclose(shared.hidden, apart.hidden, atol=1e-5)
    for name, loss in shared.losses.items():
        assert torch.allclose(loss, apart.losses[name], atol=1e-5), name


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(wrong_image=False), dict(fixed_boundary=True, padding_in_means=True)])
def test_losses_equal_a_slow_version(make_model, images, batch, changes):
    model = make_model(**changes)
    data, text, config = batch(model), model.text, model.config
    output, patches = model(images, **data), model.see(images)
    language, vad, contrastive = [], [], []
    parts = []
    for n, ids in enumerate(data["ids"].tolist()):
        because = 6 if config.fixed_boundary else ids.index(text.because)
        end = 30 if config.padding_in_means else next((i for i in range(1, 30) if ids[i] == text.pad), 30)
        hidden, words = output.hidden[n], data["rows"][n]
        parts.append((patches[n // 2].mean(0), hidden[:because].mean(0), hidden[because:end].mean(0)))
        for t in range(29):
            if ids[t + 1] != text.pad:
                language.append(-model.decoder.logits(hidden[t]).log_softmax(0)[ids[t + 1]].item())
            if t + 1 >= because and words[t + 1] > 0:
                vad.append(((model.vad_head(hidden[t]) - model.word_vad.values[words[t + 1]]) ** 2).mean().item())
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
def test_a_missing_negative_does_not_count(make_model, images, batch):
    model = make_model()
    data = batch(model)
    both, none = dict(data), dict(data, wrong_emotion=torch.full((6,), -1), wrong_image=torch.full((6,), -1))
    assert model(images, **none).losses["contrastive"].item() == 0
    one = dict(data, wrong_emotion=torch.full((6,), -1))
    without = make_model(wrong_emotion=False)
    without.load_state_dict(model.state_dict())
    assert torch.allclose(model(images, **one).losses["contrastive"], without(images, **both).losses["contrastive"])


@torch.no_grad()
def test_a_token_changes_nothing_before_it(make_model, images, batch):
    model = make_model()
    data = batch(model)
    before = model(images, **data)
    for t in range(1, 30):
        changed = data["ids"].clone()
        changed[:, t] = torch.tensor(model.text.tokens(" gloomy")[-1])
        after = model(images, changed, data["segments"], model.word_vad(changed))
        assert torch.allclose(before.hidden[:, :t], after.hidden[:, :t], atol=1e-5)
        assert torch.allclose(before.emotion_features[:, :t], after.emotion_features[:, :t], atol=1e-6)
        assert torch.equal(data["rows"][:, :t], model.word_vad(changed)[:, :t])
    leaky = make_model(two_way_emotions=True)
    changed[:, 10] = model.text.tokens(" sea")[0]
    features = [leaky(images, ids, data["segments"], leaky.word_vad(ids)).emotion_features for ids in (data["ids"], changed)]
    assert not torch.allclose(features[0][:, :10], features[1][:, :10]), "both ways must leak, as in the authors' code"


@torch.no_grad()
def test_padding_does_not_matter(make_model, images, batch):
    """A sentence's hidden states and match are the same however much padding follows, both ways too."""
    for changes in MODES[:2]:
        model = make_model(**changes)
        data = batch(model)
        long = {name: torch.cat([data[name], torch.full((6, 5), fill)], 1) for name, fill in
                (("ids", model.text.pad), ("segments", model.text.explanation), ("rows", 0))}
        short_output, long_output = model(images, **{name: data[name] for name in long}), model(images, **long)
        real = data["ids"] != model.text.pad
        assert torch.allclose(short_output.hidden[real], long_output.hidden[:, :30][real], atol=1e-5)
        assert torch.allclose(short_output.match, long_output.match, atol=1e-5)


@torch.no_grad()
def test_attention_is_the_softmax_that_the_model_used(make_model, images):
    model = make_model()
    written = write(model, images, samples=2, top_p=0.9)
    looks = attention(model, images, written.ids)
    assert looks.shape == (6, 30, 4)
    assert torch.allclose(looks[:, 1:].sum(2), torch.ones(6, 29)) and looks[:, 0].abs().max() == 0
    layers = torch.stack([attention(model, images, written.ids, layer) for layer in range(2)])
    assert torch.allclose(layers.mean(0), looks)
    block, patches = model.decoder.blocks[0], model.see(images)
    embedded, _ = model.read(written.ids, torch.where((written.ids == model.text.because).cumsum(1) > 0,
                                                      model.text.explanation, model.text.emotion),
                             model.word_vad(written.ids))
    x = embedded + block.self_attention(block.norm_self(embedded))
    query = block.cross_attention.query(block.norm_cross(x))[3, 8].view(4, 8)  # picture 1's second, token 9
    key = block.cross_attention.key_value(patches[1])[:, :32].view(4, 4, 8)
    by_hand = torch.stack([(key[:, head] @ query[head] / 8 ** 0.5).softmax(0) for head in range(4)]).mean(0)
    assert torch.allclose(layers[0][3, 9], by_hand, atol=1e-5)


def test_score_ranks_by_the_contrastive_head(make_model, images):
    model = make_model()
    scores = model.score(images, ["awe"] * 6, SENTENCES)
    alone = torch.cat([model.score(images[i // 2:i // 2 + 1], ["awe"], [SENTENCES[i]]) for i in range(6)])
    assert torch.allclose(scores, alone, atol=1e-5)


def test_the_frozen_tower_has_no_gradient(make_model, images, batch):
    for trained in (False, True):
        model = make_model(train_tower=trained).train()
        model(images, **batch(model)).losses["total"].backward()
        assert all((parameter.grad is not None) == trained for parameter in model.tower.parameters())
        assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("tower"))


@pytest.mark.parametrize("part, absent", [
    (dict(vad_input=False, vad_head=False), "fusion|emotion_encoder|vad_head|word_vad"), (dict(vad_head=False), "vad_head"),
    (dict(contrastive_head=False), "contrastive_head"), (dict(emotion_encoder=False), "emotion_encoder")])
def test_parts_switched_off_leave_no_weights(make_model, images, batch, part, absent):
    model = make_model(**part)
    assert not any(name.startswith(tuple(absent.split("|"))) for name in model.state_dict())
    losses = model(images, **batch(model)).losses
    assert ("vad" in losses) == model.config.vad_head and ("contrastive" in losses) == model.config.contrastive_head


def test_text_round_trip(make_model):
    text = make_model().text
    ids, starts = text.encode(["something else", "awe"], ["the man's face is blue-grey", "of it"], 30)
    assert text.decode(ids[0].tolist()) == "the emotion is something else because the man's face is blue-grey"
    assert ids[1, starts[1]] == text.because and text.decode(ids[1].tolist()) == "the emotion is awe because of it"
    labels = text.labels(ids)
    assert labels[:, 0].tolist() == [IGNORE] * 2 and ((labels == IGNORE) == (ids == text.pad))[:, 1:].all()


@pytest.mark.parametrize("call, message", [
    (lambda m, x: m(x, torch.full((3, 5), m.text.size), torch.zeros(3, 5, dtype=int), torch.zeros(3, 5, dtype=int)), "token ids"),
    (lambda m, x: m(x[..., :8], **m.sentence(["awe"], ["calm"])), r"images must be \(B, 3, 16, 16\), not \(3, 3, 16, 8\)"),
    (lambda m, x: m(x[:0], **m.sentence(["awe"], ["calm"])), "the batch is empty"),
    (lambda m, x: m(x, **m.sentence(["awe"], ["calm"])), "1 sentences do not divide among 3 pictures"),
    (lambda m, x: m(x, *[torch.zeros(3, 49, dtype=int)] * 3), "49 tokens are beyond the position table's 48 rows"),
    (lambda m, x: write(m, x, length=49), "position table of 48 rows"),
    (lambda m, x: write(m, x, [m.text.prompt]), "1 openings for 3 pictures"),
    (lambda m, x: m.text.opening("joy"), "unknown emotion 'joy'; the emotions are amusement, awe"),
    (lambda m, x: Config(length=2000), "length 2000 is beyond the position table's 1024 rows"),
    (lambda m, x: Config(wrong_emotion=False, wrong_image=False), "needs a negative"),
    (lambda m, x: Config(image_size=225), "image_size 225 is no multiple of patch_size 16"),
])
def test_bad_input_is_named(make_model, images, call, message):
    with pytest.raises((ValueError, UserError), match=message):
        call(make_model(), images)

"""t-SNE, and the numbers and the picture of Figure 8, against brute force and scikit-learn."""
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from related import figure8, tsne
from sevlm import load_pixels, save


def sheets(count, width=20, kinds=5, seed=0):
    """Points on a few flat sheets in space: data whose neighbourhoods a map can keep."""
    draw = np.random.default_rng(seed)
    kind = draw.integers(kinds, size=count)
    directions, origins = draw.normal(size=(kinds, 2, width)), 3 * draw.normal(size=(kinds, width))
    places = 2 * draw.uniform(size=(count, 2))
    points = np.einsum("nk,nkd->nd", places, directions[kind]) + origins[kind] + 0.01 * draw.normal(size=(count, width))
    return points.astype(np.float32), kind


def distances(points):
    return np.sqrt(np.square(points[:, None].astype(np.float64) - points).sum(2))


def test_neighbours_and_their_attention():
    points, _ = sheets(120)
    indices, squared = tsne.neighbours(points, 40)
    slow = distances(points) + np.diag(np.full(120, np.inf))
    assert (indices == slow.argsort(1)[:, :40]).all()
    np.testing.assert_allclose(squared, np.sort(slow, 1)[:, :40] ** 2, atol=1e-3)
    p = tsne.attention(squared, 12.5)
    np.testing.assert_allclose(np.exp(-(p * np.log(p.clip(1e-300))).sum(1)), 12.5, rtol=1e-4)  # the perplexity
    assert (np.diff(p, axis=1) <= 0).all()


def test_the_forces_are_the_gradient_of_the_divergence():
    points, _ = sheets(40)
    pulls = j, p, begins = tsne.affinities(points, 8)
    dense = np.zeros((40, 40))
    dense[np.arange(40).repeat(np.diff(begins, append=len(j))), j] = p
    np.testing.assert_allclose(dense, dense.T, atol=1e-7)
    y = torch.tensor(np.random.default_rng(1).normal(size=(40, 2)), requires_grad=True)
    closeness = 1 / (1 + torch.cdist(y, y).square()) * (1 - torch.eye(40))
    (-torch.tensor(dense) * (closeness / closeness.sum() + torch.eye(40)).log()).sum().backward()
    at = y.detach().float().numpy()
    with ThreadPoolExecutor(2) as pool:
        forces = 4 * (tsne.attraction(at, *pulls) - tsne.repulsion(at, pool))
    np.testing.assert_allclose(forces, y.grad, atol=2e-5)


def test_maps_agree_with_scikit_learn():
    """Of its own two methods, exact and Barnes-Hut, the maps agree as well as ours does with either."""
    manifold = pytest.importorskip("sklearn.manifold")
    points, _ = sheets(300)
    ours, theirs = tsne.tsne(points), manifold.TSNE(init="pca", random_state=0).fit_transform(points)
    near, near_too = (tsne.neighbours(found.astype(np.float32), 30)[0] for found in (ours, theirs))
    assert np.mean([np.isin(one, other).mean() for one, other in zip(near, near_too, strict=True)]) > 0.9


def test_maps_are_the_same_every_time_and_keep_neighbours():
    points, kind = sheets(90)
    drawn = tsne.tsne(points, 10)
    assert np.array_equal(drawn, tsne.tsne(points, 10)) and figure8.alike(drawn, kind).mean() > 0.95


def test_silhouettes_and_neighbours_alike():
    points, kind = sheets(80)
    kind[kind == 4] = 3
    kind[0] = 9  # alone in its group
    between = distances(points)
    for i, found in enumerate(figure8.silhouettes(points, kind)):
        means = {other: between[i, (kind == other) & (np.arange(80) != i)].mean() for other in set(kind) if other != kind[i] or i}
        a = means.pop(kind[i]) if i else 0
        assert found == pytest.approx((min(means.values()) - a) / max(a, min(means.values())) if i else 0)
    share = [np.mean(kind[np.argsort(row)[1:11]] == kind[i]) for i, row in enumerate(between)]
    np.testing.assert_allclose(figure8.alike(points, kind), share)
    assert np.isnan(figure8.silhouettes(points, np.zeros(80))).all()


def test_means_are_of_the_explanations_words(make_model):
    model = make_model()
    ids = model.text.encode(["awe", "something else"], ["the sea because of the sky", "rain"], 30)
    words = [[model.text.tokenizer.id_to_token(t) for t in row[mask].tolist()] for row, mask in zip(ids, figure8.in_words(model, ids), strict=True)]
    assert ["".join(row).replace("Ġ", " ") for row in words] == [" the sea because of the sky", " rain"]
    assert figure8.by_position(model, ids).sum(1).tolist() == [24, 24]


@pytest.fixture
def run(tmp_path, toy, make_model):
    """A finished run, as far as this program wants to know: a model and its answers to ten test paintings."""
    save(make_model(width=24, emotions=toy.emotions), tmp_path / "run")
    names = [toy.names[p] for p in np.flatnonzero([file is not None for file in toy.files])[:10]]
    lines = [{"image": name, "emotion": ["awe", "fear"][i % 3 == 0], "explanation": ["the calm sea", "dark eyes"][i % 2]} for i, name in enumerate(names)]
    (tmp_path / "run" / "test-greedy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "run"


def test_vectors_are_the_means_of_what_the_model_computes(run, toy):
    model, answers = figure8.load(run), figure8.read_answers(run, toy.emotions)
    found = figure8.vectors_of(model, toy, answers, authors=False, batch=4)
    place = 5
    name, answer = list(answers.items())[place]
    features = model.encode_image(load_pixels(toy.files[toy.names.index(name)], model.config)[None])
    inputs = model.sentence([answer.emotion], [answer.explanation])
    hidden = model(features, **inputs).hidden[0, figure8.in_words(model, inputs["ids"])[0]]
    torch.testing.assert_close(torch.from_numpy(found.explanations[place]), hidden.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found.pictures[place]), features.mean(1)[0], atol=1e-3, rtol=1e-3)


def test_the_program(run, toy_root, tmp_path, monkeypatch, capsys):
    def figure(*flags):
        monkeypatch.setattr("sys.argv", ["figure8", "--data-root", str(toy_root), "--toy-paintings", "60", "--out", str(tmp_path / "f.png"), *flags])
        figure8.main()

    figure("--runs", f"ours={run}", f"again={run}", "--authors", "--emotion", "awe")
    numbers = json.loads((tmp_path / "f.json").read_text())
    assert [panel["points"] for panel in numbers["panels"]] == [10, 12, 10, 12] and "ours: explanations" in capsys.readouterr().out
    assert Image.open(tmp_path / "f.png").width > 2 * figure8.SIDE
    for flags, told in (((f"={run}",), "label"), ((f"a={tmp_path}",), "not finished"), ((f"a={run}", "--emotion", "joy"), "joy")):
        with pytest.raises(figure8.UserError, match=told):
            figure("--runs", *flags)

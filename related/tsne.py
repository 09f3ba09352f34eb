"""t-SNE by hand (van der Maaten and Hinton, 2008): points in many dimensions drawn in two, neighbours kept together.

    1. Neighbours       p_ij: how much of each point's attention its neighbours get
    2. Forces           p pulls neighbours together, q pushes all points apart
    3. The map          gradient descent from the two main directions of the data

Shapes: N points of D dimensions, k neighbours of each, E pairs of neighbours.

The gradient is exact: all N^2 pairs push each other, in float32, block by block on all cores. 8,000 points take 83
seconds of one core, so approximations (Barnes-Hut, interpolation on a grid) need not be learned here.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 16  # rows at once: 16 x 8,000 floats stay in a core's cache; 256 rows take twice the time
EXAGGERATION, EARLY_STEPS, STEPS = 12, 250, 1000  # neighbours pull harder at first, so that clusters form


# 1. Neighbours

def neighbours(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each point's k nearest others, nearest first: indices and squared distances (N, k)."""
    squares = np.square(points).sum(1)
    indices, distances = np.empty((len(points), k), np.int64), np.empty((len(points), k), np.float32)
    for rows in np.array_split(np.arange(len(points)), 1 + len(points) // 256):
        squared = squares[rows, None] + squares - 2 * points[rows] @ points.T
        squared[np.arange(len(rows)), rows] = np.inf  # a point is no neighbour of its own
        nearest = np.argpartition(squared, k - 1)[:, :k]
        order = np.take_along_axis(squared, nearest, 1).argsort(1)
        indices[rows] = np.take_along_axis(nearest, order, 1)
        distances[rows] = np.take_along_axis(squared, indices[rows], 1).clip(0)
    return indices, distances


def attention(distances: np.ndarray, perplexity: float) -> np.ndarray:
    """p_j|i = softmax of -beta_i d_ij^2, (N, k), with the beta_i that spreads it over `perplexity` neighbours."""
    distances = distances.astype(np.float64) - distances.min(1, keepdims=True)
    low, high = np.zeros((len(distances), 1)), np.full((len(distances), 1), np.inf)
    beta = np.ones((len(distances), 1))
    for _ in range(100):  # halves the interval each time, once it has two ends
        p = np.exp(-beta * distances)
        p /= p.sum(1, keepdims=True)
        wide = -(p * np.log(p.clip(1e-300))).sum(1, keepdims=True) > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + high) / 2)
    return p


def affinities(points: np.ndarray, perplexity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p_ij = (p_j|i + p_i|j) / 2N as a list of pairs, row by row: j and p, (E,), and where each row begins, (N,)."""
    count = len(points)
    indices, distances = neighbours(points, min(count - 1, int(3 * perplexity + 1)))
    p = attention(distances, perplexity).ravel()
    i, j = np.arange(count).repeat(indices.shape[1]), indices.ravel()
    pairs, place = np.unique(np.concatenate([i * count + j, j * count + i]), return_inverse=True)
    sums = np.bincount(place, np.concatenate([p, p]))
    return pairs % count, (sums / sums.sum()).astype(np.float32), np.searchsorted(pairs, np.arange(count) * count)


# 2. Forces

def attraction(y: np.ndarray, j: np.ndarray, p: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """sum_j p_ij q_ij Z (y_i - y_j), (N, 2); q_ij Z = 1 / (1 + |y_i - y_j|^2)"""
    lengths = np.diff(begins, append=len(j))
    apart = [part.repeat(lengths) - part.take(j) for part in y.T.copy()]  # (E,) each
    weight = p / (1 + np.square(apart[0]) + np.square(apart[1]))
    return np.stack([np.add.reduceat(weight * part, begins) for part in apart], 1)


def repulsion(y: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """sum_j q_ij^2 Z (y_i - y_j), (N, 2)"""
    one, squares = np.ones(len(y), np.float32), np.square(y).sum(1)
    left, right = np.stack([*-2 * y.T, squares, one], 1), np.stack([*y.T, one, squares + 1])
    place = np.stack([*y.T, one], 1)

    def block(start: int) -> tuple[np.ndarray, float]:
        q = np.reciprocal(left[start:start + BLOCK] @ right)  # 1 / (1 + |y_i - y_j|^2), (BLOCK, N)
        total = float(q.sum())
        pushed = np.square(q, out=q) @ place  # sum_j q^2 [y_j ; 1]
        return y[start:start + BLOCK] * pushed[:, 2:] - pushed[:, :2], total

    forces, totals = zip(*pool.map(block, range(0, len(y), BLOCK)), strict=True)
    return np.concatenate(forces) / (sum(totals) - len(y))  # Z is over pairs of two


# 3. The map

def main_directions(points: np.ndarray) -> np.ndarray:
    """Where the points lie along the two directions in which they differ most, (N, 2)."""
    centred = points - points.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # rising eigenvalues
    return centred @ directions[:, :-3:-1]


def tsne(points: np.ndarray, perplexity: float = 30) -> np.ndarray:
    """A map (N, 2) of points (N, D)."""
    points = np.asarray(points, np.float32)
    pulls = affinities(points, perplexity)
    start = main_directions(points)
    y = (1e-4 * start / start[:, 0].std()).astype(np.float32)
    rate = max(len(points) / EXAGGERATION / 4, 50)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for pull, momentum, steps in ((EXAGGERATION, 0.5, EARLY_STEPS), (1, 0.8, STEPS - EARLY_STEPS)):
            move, gain = np.zeros_like(y), np.ones_like(y)
            for _ in range(steps):
                gradient = 4 * (pull * attraction(y, *pulls) - repulsion(y, pool))
                turned = move * gradient >= 0  # the last move went up: smaller steps along this coordinate
                gain = np.where(turned, gain * 0.8, gain + 0.2).clip(0.01)
                move = (momentum * move - rate * gain * gradient).astype(np.float32)
                y = y + move
    return y - y.mean(0)

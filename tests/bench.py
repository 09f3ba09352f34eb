"""How fast, and how much memory: `python tests/bench.py` prints a table, `--json` the same as JSON.

Medians of several runs in one process, random weights at the paper's size. On a GPU the model's rows come in fp16
and bf16, with peak memory; on a CPU in float32.

    training   32 paintings with two explanations each: as the authors' code does it (every image encoded twice, keys
               and values for every explanation, logits at every position), every image once, features from a cache
    decoding   25 tokens for 1, 16 and 64 paintings: without any cache, ours, and `transformers`' generate()
    data       a made-up ArtEmis of 455,000 rows: reading, tokenising, starting again, fetching features
    scores     7,000 predictions against 7 references each
    sample     sample.py with the bundled model on 1 and 100 pictures, and the paper's size one by one and together
"""
import argparse
import contextlib
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import V1_FILE, Store, load_captions, read_art, read_rows
from metrics import bootstrap, text_scores
from sample import Wish, answer
from sevlm import EMOTIONS, IGNORE, SEVLM, Config, write
from train import stand_in_tokenizer
from vad import read_lexicon, vad_loss

ROOT = Path(__file__).parents[1]
PAIRS, TOKENS = 32, 25
SENTENCE = "the light that breaks through the heavy clouds over the sea feels like something holy and calm"  # 24 tokens


class Bench:
    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int):
        self.device, self.dtype, self.rounds, self.rows = device, dtype, rounds, []

    def precision(self):
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()

    def measure(self, name: str, run, items: int) -> float:
        """Time `run`, note the median; the first run warms up."""
        times = []
        for round in range(self.rounds + 1):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            with self.precision():
                run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if round:
                times.append(time.perf_counter() - start)
        row = {"what": name, "precision": str(self.dtype).removeprefix("torch."), "seconds": statistics.median(times),
               "items_per_second": items / statistics.median(times)}
        if self.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.rows.append(row)
        print(f"{name:58}{row['precision']:>10}{row['seconds']:10.3f} s{row['items_per_second']:11,.1f}/s"
              + (f"{row['peak_memory_gb']:8.2f} GB" if "peak_memory_gb" in row else ""), file=sys.stderr, flush=True)
        return row["seconds"]


def authors_loss(model: SEVLM, images: torch.Tensor, data: dict) -> torch.Tensor:
    """The same losses with the work that the authors' scheme does for them."""
    patches = model.see(images.repeat_interleave(2, 0))
    output = model(patches, **{name: value for name, value in data.items() if name != "labels"})
    logits = model.decoder.logits(output.hidden)
    language = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), data["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    known = data["rows"][:, 1:] > 0
    emotion = vad_loss(model.vad_head(output.hidden[:, :-1]).float(), model.word_vad.values[data["rows"][:, 1:]], known)
    return language + emotion + model.config.alpha * output.losses["contrastive"]


def training(bench: Bench, model: SEVLM) -> None:
    model.train()
    images = torch.randn(PAIRS, 3, 224, 224, device=bench.device)
    data = model.sentence(["awe", "sadness"] * PAIRS, [SENTENCE] * (2 * PAIRS))
    order = torch.arange(2 * PAIRS, device=bench.device)
    data |= {"labels": model.text.labels(data["ids"]), "wrong_emotion": order ^ 1, "wrong_image": order.roll(2)}
    features = model.see(images).to(bench.dtype)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-5, fused=True)

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    theirs = bench.measure("training step, as the authors' code", lambda: step(lambda: authors_loss(model, images, data)), PAIRS)
    once = bench.measure("training step, images encoded once", lambda: step(lambda: model(images, **data).losses["total"]), PAIRS)
    cached = bench.measure("training step, cached features", lambda: step(lambda: model(features, **data).losses["total"]), PAIRS)
    print(f"    {theirs / once:.2f} and {theirs / cached:.2f} times as fast", file=sys.stderr)


@torch.no_grad()
def write_without_cache(model: SEVLM, patches: torch.Tensor) -> torch.Tensor:
    """Greedy decoding as the authors' code does it: every step reads the whole sentence and the picture again."""
    text = model.text
    ids = torch.tensor([text.prompt] * len(patches), device=model.device)
    for _ in range(TOKENS):
        segments = torch.where((ids == text.because).cumsum(1) > 0, text.explanation, text.emotion)
        hidden = model(patches, ids, segments, model.word_vad(ids)).hidden
        ids = torch.cat([ids, model.decoder.logits(hidden)[:, -1:].argmax(2)], 1)
    return ids


def decoding(bench: Bench, model: SEVLM) -> None:
    model.eval()
    special, model.text.special = model.text.special, []  # random weights must not stop early
    for count in (1, 16, 64):
        decoding_of(bench, model, count)
    model.text.special = special


def decoding_of(bench: Bench, model: SEVLM, count: int) -> None:
    patches, length = torch.randn(count, 196, 768, device=bench.device), len(model.text.prompt) + TOKENS
    what = f"decoding {TOKENS} tokens, {count} paintings"
    slow = bench.measure(f"{what}, no cache", lambda: write_without_cache(model, patches), count)
    ours = bench.measure(f"{what}, ours", lambda: write(model, patches, length=length), count)
    print(f"    {slow / ours:.2f} times as fast", file=sys.stderr)
    if theirs := transformers_generate(bench, model, patches):
        print(f"    ours is {theirs / ours:.2f} times as fast as generate()", file=sys.stderr)
    words, tokens = torch.zeros(count, dtype=torch.long, device=bench.device), torch.full((count,), 300, device=bench.device)
    bench.measure(f"word-so-far VAD of {TOKENS} steps, {count} paintings",
                  lambda: [model.word_vad.look_up(model.word_vad.spell(words, tokens)) for _ in range(TOKENS)], count)


def transformers_generate(bench: Bench, model: SEVLM, patches: torch.Tensor) -> float | None:
    """Their GPT-2 of the same size; it has no VAD and no segments."""
    try:
        import transformers
    except ImportError:
        return None
    settings = transformers.GPT2Config(n_layer=6, add_cross_attention=True, vocab_size=model.text.size,
                                       eos_token_id=None, pad_token_id=model.text.pad)
    theirs = transformers.GPT2LMHeadModel(settings).eval().to(bench.device)
    prompt = torch.tensor([model.text.prompt] * len(patches), device=bench.device)
    return bench.measure(f"decoding {TOKENS} tokens, {len(patches)} paintings, transformers", lambda: theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), encoder_hidden_states=patches, max_new_tokens=TOKENS,
        min_new_tokens=TOKENS, do_sample=False), len(patches))


def made_up_sentences(count: int, rng: np.random.Generator) -> list[str]:
    """Of about 16 words, as ArtEmis's are."""
    vocabulary = np.array(list(read_lexicon().rows))
    lengths = rng.poisson(16, count).clip(5, 40)
    words = vocabulary[rng.integers(len(vocabulary), size=lengths.sum())].tolist()
    ends = lengths.cumsum()
    return [" ".join(words[end - length:end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def data(bench: Bench, model: SEVLM) -> None:
    rng, rows = np.random.default_rng(0), 455_000
    owner = np.sort(rng.integers(80_000, size=rows))
    annotations = np.bincount(owner, minlength=80_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / V1_FILE
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["art_style", "painting", "emotion", "utterance", "repetition"])
            table.writerows([f"style{p % 27}", f"painter_{p}", EMOTIONS[e], text, annotations[p]] for p, e, text in zip(
                owner, rng.integers(9, size=rows), made_up_sentences(rows, rng), strict=True))
        bench.measure("reading a CSV of 455,000 rows", lambda: read_rows(path), rows)
        bench.measure("the same, cleaned and split", lambda: read_art("artemis_v1", Path(folder)), rows)
        art, cache = read_art("artemis_v1", Path(folder)), Path(folder) / "cache"

        def tokenise() -> None:
            for file in cache.glob("*") if cache.is_dir() else ():
                file.unlink()
            load_captions(art, model)
        bench.measure("tokenising, with words and VAD", tokenise, len(art.texts))
        bench.measure("the same from its cache", lambda: load_captions(art, model), len(art.texts))
        art.names = art.names[:1000]
        store = Store(Path(folder) / "features.npy", art, model, features=True).open()
        store.array[:] = 1
        bench.measure("features of 32 paintings, warm", lambda: store.get(rng.integers(1000, size=32))[0].sum(), 32)


def scores(bench: Bench, model: SEVLM) -> None:
    texts = made_up_sentences(8 * 7000, np.random.default_rng(0))
    said, references = texts[:7000], [texts[7000 + 7 * i:7007 + 7 * i] for i in range(7000)]
    found = text_scores(said, references)
    bench.measure("text scores, 7,000 predictions x 7 references", lambda: text_scores(said, references), 7000)
    bench.measure("bootstrap of them, 1,000 resamples", lambda: bootstrap(found), 1000)


def sample(bench: Bench, model: SEVLM) -> None:
    model.eval()
    pixels = torch.randint(0, 255, (16, 3, 224, 224), dtype=torch.uint8)
    names, wish = [str(i) for i in range(16)], Wish()
    bench.measure("sample.py's answer, paper's size, 1 picture", lambda: answer(model, pixels[:1], names[:1], wish), 1)
    bench.measure("sample.py's answer, paper's size, 16 pictures", lambda: answer(model, pixels, names, wish), 16)
    with tempfile.TemporaryDirectory() as folder:
        example = next((ROOT / "examples").glob("*.png")).read_bytes()
        for number in range(100):
            (Path(folder) / f"{number}.png").write_bytes(example)
        for count, what in ((1, f"{folder}/0.png"), (100, folder)):
            command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(ROOT / "examples" / "toy"), what, "--json"]
            bench.measure(f"python sample.py, bundled model, {count} pictures", lambda command=command: subprocess.run(
                command, check=True, capture_output=True), count)


PARTS = {"training": training, "decoding": decoding, "sample": sample, "data": data, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each row")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    rows = []
    for dtype in (torch.float16, torch.bfloat16) if cuda else (torch.float32,):
        bench = Bench(torch.device("cuda" if cuda else "cpu"), dtype, options.rounds)
        torch.manual_seed(0)
        model = SEVLM(Config(), stand_in_tokenizer()).to(bench.device)
        for name, part in PARTS.items():
            if options.only in (None, name) and (dtype != torch.bfloat16 or name in ("training", "decoding")):
                part(bench, model)
        rows += bench.rows
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

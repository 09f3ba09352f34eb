"""How fast, and how much memory: `python tests/bench.py` prints a table, `--json` the same as JSON.

Medians of several runs in one process, random weights at the paper's size. On a GPU every row comes in fp16 and
bf16, with peak memory; on a CPU in float32.

    training   32 paintings with two explanations each: as the authors' code does it (every image encoded twice, keys
               and values for every explanation, logits at every position), every image once, features from a cache
    decoding   25 tokens for 1, 16 and 64 paintings: without any cache, ours, and `transformers`' generate()
"""
import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from sevlm import EMOTIONS, IGNORE, SEVLM, Config, write
from vad import read_lexicon, vad_loss

PAIRS, TOKENS = 32, 25
SENTENCE = "the light that breaks through the heavy clouds over the sea feels like something holy and calm"  # 24 tokens


def full_size_tokenizer() -> Tokenizer:
    """Whole words of the benchmark's sentences and fillers, 50,257 in all: GPT-2's own is not ours to ship."""
    words = sorted({f" {word}" for text in (SENTENCE, "the emotion is because", *EMOTIONS, *read_lexicon().rows)
                    for word in text.split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict.fromkeys(["<|endoftext|>", *alphabet])
    merges = {}
    for word in words:  # merge each word from its first letter on
        text = word.replace(" ", "Ġ")
        for end in range(2, len(text) + 1):
            vocabulary[text[:end]] = merges[text[:end - 1], text[end - 1]] = None
    vocabulary |= dict.fromkeys(f"filler{i}" for i in range(50257 - len(vocabulary)))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


class Bench:
    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int):
        self.device, self.dtype, self.rounds, self.rows = device, dtype, rounds, []

    def precision(self):
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()

    def measure(self, name: str, run, pictures: int) -> float:
        """Time `run` and note the median; the first run warms up."""
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
               "pictures_per_second": pictures / statistics.median(times)}
        if self.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.rows.append(row)
        print(f"{name:58}{row['precision']:>10}{row['seconds']:10.3f} s{row['pictures_per_second']:9.1f}/s"
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
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-5,
                                  fused=bench.device.type == "cuda")

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
    model.text.special = []  # random weights must not stop early
    for count in (1, 16, 64):
        patches = torch.randn(count, 196, 768, device=bench.device)
        length = len(model.text.prompt) + TOKENS
        slow = bench.measure(f"decoding {TOKENS} tokens, {count} paintings, no cache", lambda: write_without_cache(model, patches), count)
        ours = bench.measure(f"decoding {TOKENS} tokens, {count} paintings, ours", lambda: write(model, patches, length=length), count)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--only", choices=["training", "decoding"], help="one part of the table")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each row")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    rows = []
    for dtype in (torch.float16, torch.bfloat16) if cuda else (torch.float32,):
        bench = Bench(torch.device("cuda" if cuda else "cpu"), dtype, options.rounds)
        torch.manual_seed(0)
        model = SEVLM(Config(), full_size_tokenizer()).to(bench.device)
        for name, part in (("training", training), ("decoding", decoding)):
            if options.only in (None, name):
                part(bench, model)
        rows += bench.rows
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

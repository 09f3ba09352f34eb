"""How fast, and how much memory: `python tests/bench.py` prints tables, `--json` the same as JSON.

Random weights of the paper's size, all in one process. Ways of doing the same take turns, round by round, so that a
machine's moods meet them alike; a row shows the median, the fastest and the slowest round, and how many times as fast
as the first way it is. Ours is run in float32 and, where it is faster here, in bf16 (on a GPU in fp16 too); the
authors' scheme always in float32.

    training   32 paintings with two explanations each: as the authors' code does it (every image encoded twice, keys
               and values for every explanation, logits at every position), every image once, features from a store
    decoding   25 tokens for 1, 16 and 64 paintings: without any cache, `transformers`' generate(), ours; from pixels
    sample     sample.py's answers to 1 and 16 pictures, and to 100 with the bundled model
    start      a model of the paper's size from disk; sample.py from start to end
    data       a made-up ArtEmis of 455,000 rows: read, cleaned and split, tokenised; features fetched
    scores     7,000 predictions against 7 references each
    growth     time and memory for more paintings, tokens, samples and rows: the exponents of their growth
    table3     parameters, GFLOP, speed, memory and size (Table 3)
"""
import argparse
import copy
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import V1_FILE, load_art, load_captions
from metrics import text_scores
from sample import Wish, answer
from sevlm import BUNDLED, EMOTIONS, IGNORE, SEVLM, Config, generate, initialise, load, save
from support.device import PRECISIONS, autocast, choose_device, choose_precision, held_in
from support.files import byte_level
from support.memory import peak_bytes, python_peak, step_memory
from support.program import aligned
from support.scores import bootstrap
from support.store import Store
from train import made_up_batch
from vad import OUR_LEXICON, read_lexicon, vad_loss

ROOT = Path(__file__).parents[1]
PAINTINGS, TOKENS = 32, 25
BATCHES = (8, 16, 32, 64, 128)
ROWS, PREDICTIONS, REFERENCES = 455_000, 7000, 7
SENTENCE = "the light that breaks through the heavy clouds over the sea feels like something holy and calm"  # 24 tokens
PICTURE = ROOT / "examples" / "awe-moon.png"
PRECISION = {dtype: name for name, dtype in PRECISIONS.items()} | {None: ""}
CPU_FEATURES = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "sve"}

Run = Callable[[], object]
Way = tuple[str, torch.dtype | None, Run]  # one of several to do the same: its name, its precision


class Bench:
    def __init__(self, rounds: int, out):
        self.rounds, self.out, self.rows = rounds, out, []
        self.device = choose_device("auto")
        best, why = choose_precision("auto", self.device, Config().width)
        tried = [torch.float32, torch.float16, best] if self.device.type == "cuda" else [torch.float32, best]
        self.dtypes = list(dict.fromkeys(tried))  # the fastest is last
        self.machine = f"{machine(self.device)}; {PRECISION[best]}: {why}; median of {rounds} rounds"
        self.note(self.machine)

    def note(self, line: str, row: dict | None = None) -> None:
        """A line for people, and what JSON has of it."""
        print(line, file=self.out, flush=True)
        self.rows += [row] if row else []

    def ways(self, name: str, run: Run) -> list[Way]:
        """In each precision."""
        return [(name, dtype, run) for dtype in self.dtypes]

    def answering(self, name: str, model: SEVLM, run: Callable, *inputs, **wishes) -> list[Way]:
        """In each precision, by a model as sample.py holds it."""
        return [(name, dtype, partial(run, held_in(copy.deepcopy(model), dtype), *inputs, **wishes))
                for dtype in self.dtypes]

    def compare(self, what: str, items: int, *ways: Way) -> None:
        """Time all ways in turns; the first round warms up and does not count."""
        self.note(f"\n{what}")
        rounds = [[self.time(run, dtype) for _, dtype, run in ways] for _ in range(1 + self.rounds)][1:]
        first = statistics.median(seconds for seconds, *_ in rounds)
        for (name, dtype, _), times in zip(ways, zip(*rounds, strict=True), strict=True):
            median = statistics.median(times)
            row = dict(what=what, way=name, precision=PRECISION[dtype], seconds=median, fastest=min(times),
                       slowest=max(times), items_per_second=items / median, times_the_first=first / median)
            self.note("  {way:26}{precision:>9}{seconds:11.4f} s ({fastest:.4f} .. {slowest:.4f})"
                      "{items_per_second:13,.1f}/s{times_the_first:8.2f} x".format(**row), row)

    def measure(self, what: str, items: int, run: Run) -> None:
        """What has one way, and no precision of its own."""
        self.compare(what, items, ("", None, run))

    def time(self, run: Run, dtype: torch.dtype | None) -> float:
        start = time.perf_counter()
        with autocast(self.device, dtype or torch.float32):
            run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def grow(self, what: str, sizes: Sequence[int], prepare: Callable[[int], Run],
             peak: Callable[[Run], int] = peak_bytes) -> None:
        """What `prepare(size)` costs in the fastest precision, and the exponents by which that grows."""
        self.note(f"\n{what}")
        dtype, smaller = self.dtypes[-1], None
        for size in sizes:
            run = prepare(size)
            seconds = statistics.median([self.time(run, dtype) for _ in range(1 + self.rounds)][1:])
            with autocast(self.device, dtype):
                cost = np.array([size, seconds, peak(run)])
            row = dict(what=what, size=size, precision=PRECISION[dtype], seconds=seconds, megabytes=cost[2] / 1e6)
            line = "  {size:>9,}{seconds:11.4f} s{megabytes:12,.1f} MB".format(**row)
            if smaller is not None:
                size_grew, *others = np.log(cost / smaller)
                row["time_exponent"], row["memory_exponent"] = (grew / size_grew for grew in others)
                line += "   time ~ size^{time_exponent:.2f}, memory ~ size^{memory_exponent:.2f}".format(**row)
            self.note(line, row)
            smaller = cost

    def table(self, rows: list[list[str]]) -> None:
        self.note("\n" + aligned(rows), {"what": rows[0][0], "table": rows})


def machine(device: torch.device) -> str:
    """What the times depend on besides our code."""
    facts = [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", platform.machine()]
    if device.type == "cuda":
        facts.append(torch.cuda.get_device_name(device))
    if Path("/proc/cpuinfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        known = {key.strip(): value.strip() for key, _, value in lines}
        flags = (known.get("flags") or known.get("Features", "")).split()  # as x86 and ARM call them
        facts += [known.get("model name", ""), " ".join(sorted(CPU_FEATURES.intersection(flags)))]
    return ", ".join(filter(None, facts))


# What is worked on

def stand_in_tokenizer() -> Tokenizer:
    """As large as GPT-2's, with the words of our lexicon: for speed and memory, it does not matter which words."""
    texts = ("the emotion is because", *EMOTIONS, *read_lexicon(OUR_LEXICON).rows)
    vocabulary, merges = dict.fromkeys(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]), {}
    for word in sorted({f"Ġ{word}" for text in texts for word in text.split()}):
        for end in range(2, len(word) + 1):  # merge it from its first letter on
            vocabulary[word[:end]] = merges[word[:end - 1], word[end - 1]] = None
    vocabulary |= dict.fromkeys(f"filler{i}" for i in range(50_257 - len(vocabulary)))
    return byte_level(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))


def paper_model(device: torch.device) -> SEVLM:
    torch.manual_seed(0)
    model = initialise(SEVLM(Config(), stand_in_tokenizer(), read_lexicon(OUR_LEXICON))).to(device)
    model.text.special = [-1]  # random weights must not end a sentence early
    return model


def features_of(model: SEVLM, paintings: int) -> Tensor:
    """As a store has them."""
    return torch.randn(paintings, model.config.patches, model.config.tower_width, device=model.device).half()


def full_step(model: SEVLM, dtype: torch.dtype, paintings: int, length: int = 30) -> None:
    """Sentences without padding there and back: nothing takes more memory."""
    with autocast(model.device, dtype):
        features, data = made_up_batch(model, paintings, "sea " * length, length)
        model(features, **data).losses["total"].backward()
    model.zero_grad()


def made_up_sentences(count: int) -> list[str]:
    """Of about 16 words, as ArtEmis's are."""
    rng, vocabulary = np.random.default_rng(0), np.array(list(read_lexicon(OUR_LEXICON).rows))
    lengths = rng.poisson(16, count).clip(5, 40)
    words = vocabulary[rng.integers(len(vocabulary), size=lengths.sum())]
    return [" ".join(part) for part in np.split(words, lengths.cumsum()[:-1])]


def made_up_artemis(folder: Path, rows: int) -> Path:
    """A release of v1 with as many rows for a painting as there."""
    rng, folder = np.random.default_rng(0), folder / str(rows)
    painting = np.sort(rng.integers(max(1, rows * 80_000 // 455_000), size=rows))
    repetition, emotion = np.bincount(painting)[painting], rng.choice(EMOTIONS, rows)
    folder.mkdir()
    with open(folder / V1_FILE, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["art_style", "painting", "emotion", "utterance", "repetition"])
        table.writerows(zip(painting % 27, painting, emotion, made_up_sentences(rows), repetition, strict=True))
    return folder


def made_up_captions(count: int) -> tuple[list[str], list[list[str]]]:
    """Explanations and their references."""
    texts = iter(made_up_sentences(count * (1 + REFERENCES)))
    return [next(texts) for _ in range(count)], [[next(texts) for _ in range(REFERENCES)] for _ in range(count)]


# Parts

def authors_loss(model: SEVLM, pixels: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The same losses, with the work that the authors' scheme does for them."""
    features = model.encode_image(pixels.repeat_interleave(2, 0))
    output = model(features, **{name: value for name, value in data.items() if name != "labels"})
    logits = model.decoder.logits(output.hidden[:, :-1])
    language = F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    target = data["vad"][:, 1:]
    emotion = vad_loss(model.vad_head(output.hidden[:, :-1]), target, (target != 0).any(-1))
    return language + emotion + model.config.alpha * output.losses["contrastive"]


def training(bench: Bench, model: SEVLM) -> None:
    model.train()
    pixels = torch.randn(PAINTINGS, 3, 224, 224, device=bench.device)
    features, data = made_up_batch(model, PAINTINGS, SENTENCE, model.config.length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-5, fused=True)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    bench.compare(
        f"a training step of {PAINTINGS} paintings, two explanations each", PAINTINGS,
        ("the authors' scheme", torch.float32, partial(step, lambda: authors_loss(model, pixels, data))),
        *bench.ways("ours, images encoded once", partial(step, lambda: model(pixels, **data).losses["total"])),
        *bench.ways("ours, from features", partial(step, lambda: model(features, **data).losses["total"])))


@torch.no_grad()
def generate_without_cache(model: SEVLM, features: Tensor) -> None:
    """Greedy decoding as the authors' code does it: every step reads the whole sentence and the picture again."""
    ids = torch.tensor([model.text.prompt] * len(features), device=model.device)
    for _ in range(TOKENS):
        hidden = model(features, **model.inputs(ids)).hidden
        ids = torch.cat([ids, model.decoder.logits(hidden)[:, -1:].argmax(2)], 1)


def transformers_generate(model: SEVLM) -> Callable[[Tensor], None]:
    """By their GPT-2 of the same size; it has no VAD and no segments."""
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=6, add_cross_attention=True, vocab_size=model.text.size,
                                        eos_token_id=None, pad_token_id=model.text.pad)).eval().to(model.device)

    def run(features: Tensor) -> None:
        prompt = torch.tensor([model.text.prompt] * len(features), device=model.device)
        theirs.generate(prompt, attention_mask=torch.ones_like(prompt), encoder_hidden_states=features.float(),
                        max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return run


def decoding(bench: Bench, model: SEVLM) -> None:
    model.eval()
    length, theirs = len(model.text.prompt) + TOKENS, transformers_generate(model)
    for count in (1, 16, 64):
        features = features_of(model, count)
        bench.compare(f"decoding {TOKENS} tokens for {count} paintings", count,
                      ("without any cache", torch.float32, partial(generate_without_cache, model, features)),
                      *bench.ways("transformers' generate()", partial(theirs, features)),
                      *bench.answering("ours", model, generate, features, length=length))
    pixels = torch.randn(16, 3, 224, 224, device=bench.device)
    bench.compare("the same for 16, from pixels to words", 16,
                  ("without any cache", torch.float32,
                   lambda: generate_without_cache(model, model.encode_image(pixels))),
                  *bench.answering("ours", model,
                                   lambda held: generate(held, held.encode_image(pixels), length=length)))
    words, token = model.word_vad, model.text.tokens(" melancholy")[:1]
    bench.measure("one token's VAD for 64 paintings", 64, lambda: words.vad(words.extend([""] * 64, token * 64)))


def answers(bench: Bench, model: SEVLM, count: int) -> None:
    pixels = torch.randint(0, 255, (count, 3, 224, 224), dtype=torch.uint8)
    bench.compare(f"emotion and explanation of {count} pictures, as sample.py answers", count, *bench.answering(
        "ours", model.eval(), lambda held: answer(held, pixels, [""] * count, Wish(), held.decoder.wte.weight.dtype)))


def run_sample(checkpoint: str | Path, pictures: str | Path) -> None:
    command = [sys.executable, ROOT / "sample.py", "--checkpoint", checkpoint, pictures, "--json"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def sample(bench: Bench, model: SEVLM) -> None:
    answers(bench, model, 1)
    answers(bench, model, 16)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(100):
            Path(folder, f"{number}.png").symlink_to(PICTURE)
        bench.measure("python sample.py, the bundled model, 100 pictures", 100, partial(run_sample, BUNDLED, folder))


def start(bench: Bench, model: SEVLM) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        bench.measure("loading a model of the paper's size", 1, partial(load, folder))
        bench.measure("python sample.py, the paper's size, a picture", 1, partial(run_sample, folder, PICTURE))
    bench.measure("python sample.py, the bundled model, a picture", 1, partial(run_sample, BUNDLED, PICTURE))


def data(bench: Bench, model: SEVLM) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = made_up_artemis(Path(temporary), ROWS)
        read = partial(load_art, "artemis_v1", folder, pictures=False)
        bench.measure(f"reading, cleaning and splitting {ROWS:,} rows", ROWS, read)
        art = read()
        bench.measure("tokenising them, with words and VAD", len(art.texts), partial(load_captions, art, model))
        shape, rng = (model.config.patches, model.config.tower_width), np.random.default_rng(0)
        store = Store(folder / "features.store", list(map(str, range(1000))), shape, np.float16, "features")
        for part in np.split(np.arange(1000), 10):
            store.put(part, np.ones((len(part), *shape)))
        bench.measure("fetching features of 32 paintings, warm", 32, lambda: store.get(rng.integers(1000, size=32)))


def scores(bench: Bench, model: SEVLM) -> None:
    said, references = made_up_captions(PREDICTIONS)
    bench.measure(f"scores of {PREDICTIONS:,} x {REFERENCES}", PREDICTIONS, partial(text_scores, said, references))
    bench.measure("their intervals, 1,000 resamples", 1000, partial(bootstrap, text_scores(said, references)))


def growth(bench: Bench, model: SEVLM) -> None:
    step = partial(full_step, model.train(), bench.dtypes[-1])
    bench.grow("a training step of so many paintings", BATCHES[::2], lambda size: partial(step, size))
    bench.grow("a training step of 8, sentences of so many tokens", (30, 60, 120), lambda size: partial(step, 8, size))
    model.eval()
    features = features_of(model, 8)
    bench.grow("decoding for 8 paintings, sentences of so many tokens", (30, 60, 120),
               lambda size: partial(generate, model, features, length=size))
    bench.grow("decoding for a painting, so many samples", (1, 4, 16, 64),
               lambda size: partial(generate, model, features[:1], samples=size, top_p=0.9))
    with tempfile.TemporaryDirectory() as folder:
        sizes = [ROWS // 400, ROWS // 40, ROWS // 4]
        read = {rows: partial(load_art, "artemis_v1", made_up_artemis(Path(folder), rows), pictures=False)
                for rows in sizes}
        bench.grow("reading, cleaning and splitting so many rows", sizes, read.get, python_peak)
        bench.grow("tokenising them", sizes, lambda size: partial(load_captions, read[size](), model), python_peak)
    bench.grow(f"scores of so many x {REFERENCES}", [PREDICTIONS // 100, PREDICTIONS // 10, PREDICTIONS],
               lambda size: partial(text_scores, *made_up_captions(size)), python_peak)


def table3(bench: Bench, model: SEVLM) -> None:
    rows = [["parameters", "all", "trained"]]
    for name, part in (*model.named_children(), ("all", model)):
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        rows.append([name.replace("_", " "), f"{sum(p.numel() for p in part.parameters()):,}", f"{trained:,}"])
    bench.table(rows)
    features, pair = features_of(model.eval(), 1), model.sentence(EMOTIONS[:2], ["sea " * model.config.length] * 2)
    tower = gflop(lambda: model.encode_image(torch.zeros(1, 3, 224, 224, device=bench.device)))
    reading = gflop(lambda: model.decoder.logits(model(features, **pair).hidden))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    bench.table([["the model", ""], ["GFLOP of encoding a picture", f"{tower:.2f}"],
                 ["GFLOP of reading two explanations of it, with logits", f"{reading:.2f}"],
                 ["MB of a checkpoint", f"{size / 1e6:.1f}"]])
    bench.table(memory_rows(bench, model))
    model.train()
    bench.compare(f"gradients of {PAINTINGS} paintings, from features", PAINTINGS, *(
        ("ours", dtype, partial(full_step, model, dtype, PAINTINGS)) for dtype in bench.dtypes))
    answers(bench, model, PAINTINGS)


def memory_rows(bench: Bench, model: SEVLM) -> list[list[str]]:
    """GB of a training step on a GPU, counted, and measured where there is one.

    Without one, dropout is off: on a CPU it makes attention keep its weights, and its masks are as large as what they
    mask. A GPU's kernels keep no weights, and their masks, of a byte a number, are about 1% of a step.
    """
    measured = bench.dtypes if bench.device.type == "cuda" else []
    step = partial(full_step, model.train(bool(measured)))
    counted = [step_memory(partial(step, dtype), model) for dtype in (torch.float32, torch.bfloat16)]
    rows = [["GB of a training step", "float32", "fp16 or bf16", *(f"measured: {PRECISION[one]}" for one in measured)]]
    for batch in BATCHES:
        gigabytes = [needed(batch) / 1e9 for needed in counted]
        gigabytes += [gpu_peak(model, partial(step, dtype, batch)) / 1e9 for dtype in measured]
        rows.append([f"{batch} paintings", *map("{:.2f}".format, gigabytes)])
    return rows


def gpu_peak(model: SEVLM, step: Run) -> int:
    """Bytes, those of AdamW's moments added."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() + 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def gflop(work: Run) -> float:
    """Counted operator by operator; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products the counter knows
        work()
    return counter.get_total_flops() / 1e9


PARTS = {"training": training, "decoding": decoding, "sample": sample, "start": start, "data": data, "scores": scores,
         "growth": growth, "table3": table3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON on standard output; the tables go to standard error")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some parts (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row (default: 5)")
    options = parser.parse_args()
    bench = Bench(options.rounds, sys.stderr if options.json else sys.stdout)
    model = paper_model(bench.device)
    for name in options.only:
        PARTS[name](bench, model)
    if options.json:
        print(json.dumps({"machine": bench.machine, "rows": bench.rows}, indent=1))


if __name__ == "__main__":
    main()

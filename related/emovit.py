"""EmoVIT: ask the picture (Xie et al., CVPR 2024). A Q-Former between a frozen vision tower and a frozen GPT-2.

    [soft prompt][question][answer, end][padding]

    1. Config, Text     sizes; questions and answers as token ids
    2. EmoVIT           tower -> Q-Former (qformer.py), which has read the question -> projection -> language model
                        (language_model.py): loss, the likelihood of given answers, answers in the model's own words
    3. Weights          from CLIP, GPT-2, BERT or InstructBLIP, or from a run of train.py; saved and loaded
    4. Program

    python -m related.emovit                                 train on the toy
    python -m related.emovit --data artemis_v1               CLIP and GPT-2 small, for one GPU of 11 GB
    python -m related.emovit PICTURES --ask "what is in the picture?"
    python -m related.emovit --evaluate RUN

instructions.py makes the records, emovit_training.py trains on them, asked.py answers, emovit_scores.py evaluates.
Shapes: B pictures, K patches of width E, Q queries, N rows of L tokens, w width of the language model, V vocabulary,
C given answers.
"""
import argparse
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import add_data_options
from related.language_model import Decoding, LanguageModel
from related.qformer import (
    FOREIGN,
    QFormer,
    Sizes,
    bert_tensors,
    fitting,
    initialise,
    instructblip_tensors,
    sizes_of,
)
from related.questions import processed
from sevlm import IGNORE, SEVLM, Linear, VisionTower, beam_search, generate, normalise
from support.files import fetch, find_file, is_hub_id, load_checked, read_tensors, read_tokenizer
from support.program import UserError, read_json, replacing, run_program, write_json, write_text
from support.public import CLIP_FILES, CLIP_HUB, GPT2_FILES, clip_tensors, decoder_sizes, gpt2_tensors, tower_sizes
from support.settings import flag, given, option, restored

# 1. Config, Text

MOST_POSITIONS = 2**20


@dataclass
class Config(Sizes):
    """Beside the Q-Former's sizes those of the models around it, which their weights tell."""
    image_size: int = 224
    patch_size: int = 16
    tower_width: int = 768  # E
    tower_layers: int = 12
    tower_heads: int = 12
    crop: bool = False
    authors_pixels: bool = False
    width: int = 768  # w
    layers: int = 12
    heads: int = 12
    positions: int = 1024
    question_length: int = option(128, "tokens of a question; a longer one loses its beginning", least=1, most=2**20)
    answer_length: int = option(256, "tokens of an answer, its end among them; a longer one loses its end", least=2,
                                most=2**20)
    train_language_model: bool = option(False, "train the language model too")

    train_tower = False  # no field: data.py stores features of frozen towers

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "patch_size", "tower_width", "tower_layers", "tower_heads", "width", "layers",
                     "heads", "positions"):
            if not 1 <= getattr(self, name) <= MOST_POSITIONS:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a size")
        for whole, part in (("image_size", "patch_size"), ("tower_width", "tower_heads"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.question_length > self.q_positions:
            raise UserError(f"--question-length {self.question_length} is beyond the Q-Former's {self.q_positions} "
                            "positions (--q-positions)")
        if self.longest > self.positions:
            raise UserError(f"soft prompt, question and answer may take {self.longest} rows, and the language model "
                            f"has {self.positions} positions: lower --question-length or --answer-length")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # K

    @property
    def longest(self) -> int:
        """Rows that the language model may have to read."""
        return self.queries + self.question_length + self.answer_length


class Text:
    """GPT-2's tokens. Nothing is added to them: a frozen model would have no idea of a new one."""

    def __init__(self, tokenizer: Tokenizer, config: Config):
        self.tokenizer, self.config = tokenizer, config
        self.size, self.end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|endoftext|>")
        if self.end is None:
            raise UserError("the tokenizer knows no <|endoftext|>: it is not GPT-2's, nor one of ours")
        self.special, self.pad = [self.end], -1  # behind an answer that has ended: no token, for none is read there

    def tokens(self, texts: Iterable[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def questions(self, questions: Iterable[str]) -> list[list[int]]:
        return [ids[-self.config.question_length:] for ids in self.tokens(map(processed, questions))]

    def answers(self, answers: Iterable[str]) -> list[list[int]]:
        """A blank in front, for the first word is no beginning of a text, and the end token behind."""
        most = self.config.answer_length - 1
        return [[*ids[:most], self.end] for ids in self.tokens(" " + answer for answer in answers)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first end token."""
        return self.tokenizer.decode(list(itertools.takewhile(lambda index: index != self.end, ids))).strip()


class Encoded:
    """Records as token ids, [question][answer, end], one after the other."""

    def __init__(self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]):
        self.asked, self.answered = (np.array(list(map(len, part))) for part in (questions, answers))  # tokens
        self.length = self.asked + self.answered
        self.start = np.cumsum(self.length) - self.length
        both = itertools.chain.from_iterable(zip(questions, answers, strict=True))
        self.ids = np.fromiter(itertools.chain.from_iterable(both), np.int32)

    def inputs(self, which: np.ndarray | slice = slice(None)) -> dict[str, Tensor]:
        """N records as the model's forward pass takes them, padding last: ids and labels (N, L), where the answer and
        its end alone are labels, and `asked` (N, longest question), True where the question is."""
        asked, length, start = (each[which, None] for each in (self.asked, self.length, self.start))
        place = np.arange(length.max())
        ids = self.ids[start + np.minimum(place, length - 1)]  # padding repeats the end
        labels = np.where((asked <= place) & (place < length), ids, IGNORE)
        inputs = dict(ids=ids.astype(np.int64), labels=labels.astype(np.int64), asked=place[:asked.max()] < asked)
        return {name: torch.from_numpy(array) for name, array in inputs.items()}


# 2. EmoVIT

@dataclass
class Output:
    surprise: Tensor  # (N, L) -log p of each answer's tokens
    losses: dict[str, Tensor]  # "language": the mean over all tokens of all answers


class EmoVIT(nn.Module):
    """Its weights come from files, or from `initialise`: the constructor leaves them unset."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.text, self.about = config, Text(tokenizer, config), {}
        self.tower = VisionTower(config).requires_grad_(False)
        self.qformer = QFormer(config, config.tower_width, self.text.size)
        self.projection = Linear(config.q_width, config.width)
        self.decoder = LanguageModel(config, self.text.size).requires_grad_(config.train_language_model)

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, 3, S, S) -> patch features (B, K, E)."""
        return self.tower(normalise(pixels, self.config))

    def soft_prompt(self, features: Tensor, ids: Tensor, asked: Tensor) -> Tensor:
        """What the Q-Former sees in pictures (B, K, E) after reading their questions (B, L): (B, Q, w)."""
        rows = self.qformer(features.to(self.projection.weight.dtype), ids, asked)
        return self.projection(rows[:, :self.config.queries])

    def forward(self, features: Tensor, ids: Tensor, labels: Tensor, asked: Tensor) -> Output:
        """A picture for each record; what `Encoded.inputs` gives."""
        soft = self.soft_prompt(features, ids[:, :asked.shape[1]], asked)
        surprise = self.decoder.surprise(soft, ids, labels)
        return Output(surprise, {"language": surprise.sum() / (labels != IGNORE).sum()})

    def weight(self, loss: str) -> float:
        return 1.0

    def inputs(self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in Encoded(questions, answers).inputs().items()}

    def loss(self, features: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """The mean of -log p over the tokens of the answers and their ends."""
        inputs = self.inputs(self.text.questions(questions), self.text.answers(answers))
        return self(features, **inputs).losses["language"]

    def prompted(self, features: Tensor, questions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Soft prompts (B, Q, w), and the questions that they are of, padded (B, L)."""
        inputs = self.inputs(questions, [[self.text.end]] * len(questions))
        asked = inputs["asked"]
        ids = inputs["ids"][:, :asked.shape[1]]
        return self.soft_prompt(features, ids, asked), ids

    @torch.no_grad()
    def answer_log_probs(self, features: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """log p of each whole answer with its end, after each picture's question: (B, C)."""
        asked, given = self.text.questions(questions), self.text.answers(answers)
        soft, ids = self.prompted(features, asked)
        lengths = torch.tensor(list(map(len, asked)), device=self.device)
        total = torch.zeros(len(asked), len(given), device=self.device)
        for length in sorted(set(map(len, asked))):  # those of a length together
            same = (lengths == length).nonzero().squeeze(1)
            decoding = Decoding(self.decoder, soft[same], ids[same, :length], length + max(map(len, given)))
            total[same] = decoding.log_probs(given)
        return total

    @torch.no_grad()
    def answer(self, features: Tensor, questions: Sequence[str], top_p: float = 0.0, beams: int = 0,
               seeds: Sequence[int] | int = 0, length: int | None = None) -> list[str]:
        """An answer to each picture's question: the likeliest words, or drawn (top_p), or found by beam search."""
        asked, most = self.text.questions(questions), self.config.answer_length
        most = min(length or most, most)  # beyond that there may be no positions
        soft, _ = self.prompted(features, asked)
        longest = max(map(len, asked)) + most
        ids = (beam_search(self, soft, asked, beams, longest).ids[::beams] if beams else
               generate(self, soft, asked, top_p=top_p, seeds=seeds, length=longest).ids)
        return [self.text.decode(row[len(question):len(question) + most])
                for row, question in zip(ids.tolist(), asked, strict=True)]

    def decoding(self, soft: Tensor, ids: Tensor, length: int) -> Decoding:
        return Decoding(self.decoder, soft, ids, length)


# 3. Weights

ASK = "python -m related.emovit PICTURES --ask QUESTION --run FOLDER"  # for who shows a run to another program
GPT2_SMALL = "openai-community/gpt2"
RUN_SIZES = ("image_size", "patch_size", "tower_width", "tower_layers", "tower_heads", "crop", "authors_pixels",
             "width", "layers", "heads")


def from_public(clip: str | Path = CLIP_HUB, gpt2: str | Path = GPT2_SMALL, bert: str | Path | None = None,
                qformer: str | Path | None = None, **changes) -> EmoVIT:
    """CLIP's tower and GPT-2 from files, folders or the hub; the Q-Former from BERT's or InstructBLIP's file, or not.

    BERT has no queries, no cross-attention and no projection; neither has words that are ours. These stay random.
    """
    clip_file, gpt2_file = find_file(clip, CLIP_FILES, "--clip"), find_file(gpt2, GPT2_FILES, "--gpt2")
    if not Path(gpt2).exists():
        find_file(gpt2, ["tokenizer.json"], "--gpt2")  # the hub's cache puts it beside the weights
    files, known, random = [clip_file, gpt2_file], {}, r"(qformer|projection)\..*"
    if bert:
        files.append(find_file(bert, GPT2_FILES, "--bert"))
        known = bert_tensors(read_tensors(files[-1]))
        random = r"qformer\.(queries|wte\..*|blocks\.\d+\.cross\..*)|projection\..*"
    elif qformer:
        files.append(find_file(qformer, ["model.safetensors"], "--qformer"))
        known, random = instructblip_tensors(read_tensors(files[-1])), rf"qformer\.wte\..*|{FOREIGN}"
    frozen = clip_tensors(read_tensors(clip_file)) | gpt2_tensors(read_tensors(gpt2_file), gpt2_file)
    config = Config(**tower_sizes(frozen, clip_file) | decoder_sizes(frozen, gpt2_file) | sizes_of(known, files[-1])
                    | changes)
    tokenizer, words = read_tokenizer(gpt2_file.parent), len(frozen["decoder.wte.weight"])
    if tokenizer.get_vocab_size() != words:
        raise UserError(f"{gpt2_file} has {words} words and its tokenizer {tokenizer.get_vocab_size()}")
    model = EmoVIT(config, tokenizer)
    return filled(model, frozen | fitting(known, model), " and ".join(map(str, files)), random)


def from_run(model: SEVLM, **changes) -> EmoVIT:
    """Tower, tokenizer and decoder of a run of train.py, without cross-attention and with positions for a question."""
    sizes = {name: getattr(model.config, name) for name in RUN_SIZES}
    config = Config(**sizes | {"positions": MOST_POSITIONS} | changes)
    more = config.longest if config.train_language_model else 0  # what is frozen cannot learn new ones
    config = dataclasses.replace(config, positions=max(more, model.config.positions))
    found = EmoVIT(config, model.text.tokenizer)
    tensors = {name: tensor for name, tensor in model.state_dict().items()
               if re.match(r"(tower|decoder)\.(?!.*(ln_cross|cross_attn))", name)}
    known = tensors["decoder.wpe.weight"]
    positions = torch.randn(config.positions, config.width) * known.std()
    positions[:len(known)] = known
    return filled(found, tensors | {"decoder.wpe.weight": positions}, "the run", r"(qformer|projection)\..*")


def filled(model: EmoVIT, tensors: dict[str, Tensor], source: str, random: str) -> EmoVIT:
    """A model with these weights; what its file does not have is random, where the pattern allows it."""
    for part in (model.qformer, model.projection):
        initialise(part, model.config.q_width)
    load_checked(model, tensors, source, random)
    model.about["random"] = sum(weight.numel() for name, weight in model.named_parameters() if name not in tensors)
    return model.eval()


def save(model: EmoVIT, folder: str | Path) -> None:
    """config.json, tokenizer.json and, last, model.safetensors, with what was frozen too: the folder needs no other."""
    folder = Path(folder)
    write_json(folder / "config.json", {"emovit": asdict(model.config), "about": model.about, "ask": ASK})
    write_text(folder / "tokenizer.json", model.text.tokenizer.to_str())
    with replacing(folder / "model.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    stored = read_json(path) if path.is_file() else None
    if not isinstance(stored, dict) or "emovit" not in stored or not isinstance(stored.get("about", {}), dict):
        raise UserError(f"{folder} is no EmoVIT: train one with python -m related.emovit")
    return stored


def load_emovit(source: str | Path, flag: str = "--run") -> EmoVIT:
    """A folder that `save` wrote, or a hub repository that holds one; `flag` is where the user named it."""
    folder = Path(source)
    if is_hub_id(source):
        *_, folder = (fetch(str(source), [name], flag).parent
                      for name in ("config.json", "tokenizer.json", "model.safetensors"))
    elif not folder.is_dir():
        raise UserError(f"{flag} {source}: there is no such folder")
    stored = read_config(folder)
    model = EmoVIT(restored(Config, stored["emovit"], folder / "config.json"), read_tokenizer(folder))
    weights = find_file(folder, ["model.safetensors"], flag)
    load_checked(model, {name: tensor.float() for name, tensor in read_tensors(weights).items()}, str(weights))
    model.about = stored.get("about", {})
    return model.eval()


def newest_emovit(runs: str | Path = "runs") -> Path:
    """The newest finished run of this kind."""
    found = sorted(Path(runs).glob("**/results.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in found):
        try:
            read_config(folder)
            return folder
        except UserError:
            continue
    raise UserError(f"{runs} holds no EmoVIT yet; python -m related.emovit trains one")


# 4. Program

def main() -> int | None:
    from related import asked, emovit_scores, emovit_training  # they import this file
    parser = argparse.ArgumentParser(prog="python -m related.emovit", allow_abbrev=False,
                                     description="Tune a Q-Former to answer questions about pictures, and ask it.")
    asked.add_options(parser)
    emovit_scores.add_options(parser)
    add_data_options(parser)
    parser.add_argument("--emoset", metavar="FOLDER", help="EmoSet's folder, instead of --data")
    emovit_training.add_options(parser)
    options = parser.parse_args()
    asks = options.pictures or options.ask or options.serve is not None
    if asks or options.evaluate:
        idle = given(options, emovit_training.Settings).keys() | given(options, Config).keys()
        why = "nothing is trained here"
    else:
        idle = {name for name in ("html", "out", *given(options, asked.Wish)) if getattr(options, name)}
        why = "name pictures to ask about"
    if idle := sorted(idle - {"seed", "precision", "device"}):
        raise UserError(f"{', '.join(map(flag, idle))}: {why}")
    if options.evaluate:
        return emovit_scores.evaluate(options)
    return asked.ask(options) if asks else emovit_training.learn(options)


if __name__ == "__main__":
    run_program(main)

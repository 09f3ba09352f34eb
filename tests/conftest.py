"""Shared set-up of the tests.

What each file guards:
  test_vad.py              lexicon formats and errors, lemmas, word-so-far VAD, emotion encoder, VAD loss
  test_official.py         the model against numbers from the authors' code (fixture)
  test_transformers.py     tower and decoder against `transformers`, at full size
  test_model.py            losses, generation, caches, beams, emotion distribution against slow and obvious versions
  test_weights.py          loading and saving: every naming, every kind of broken file, the authors' release
  test_protocol.py         splits, votes, file names, cleaning, ACC, EA against ArtEmis's and the authors' code (fixture)
  test_data.py             bad rows and pictures, own data, captions, epochs and negatives, stores, the toy world
  test_metrics_fixture.py  tokens and scores against the COCO caption evaluation (fixture)
  test_metrics.py          every score's edge cases, significance, EA's classifier, files and their errors
  test_train.py            learning, stopping at every write, several processes and nodes, refusals, studies, reports
  test_memory.py           the memory that a training step needs, counted
  test_hub.py              from a hub to a run and back, over a local server
  test_wrong_input.py      over 500 things that a user can get wrong, over all programs
  test_sample.py           answers, terminal, heatmaps, pages, in a real browser where there is one
  test_server.py           hostile requests, uploads, pages
  test_readme.py           the README's commands, snippet, flags and files; imports run downward
  test_instructions.py     EmoVIT's records, clues, requests, replies, the held-out sets (fixture)
  test_emovit.py           its Q-Former and language model, masks, weights, training stopped and gone on with (fixture)
  test_asked.py            questions about pictures in every way, scores of answers whose truth is known
  test_related.py, test_emovlm_kd.py, test_figure8.py, test_table1.py   the other systems of related/ (fixtures)

Programs beside them: bench.py measures speed and memory, lemmas_against_wordnet.py how often lemmas are WordNet's.
"""
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Art, load_art
from sevlm import EMOTIONS, SEVLM, Config, initialise
from support.files import read_tokenizer
from vad import OUR_LEXICON, read_lexicon

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SENTENCES = ["the gloomy sky hangs over a quiet sea", "two dancers' dresses glow in warm light",
             "the man's empty eyes frighten me", "it reminds me of melancholy autumn evenings",
             "i can't look away from the blue-grey storm", "the children laugh and the colors are bright"]


def pytest_configure() -> None:
    """A job in the background begins with Ctrl-C ignored, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fixture_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, by default our copy."""
    return Path(os.environ.get(variable, FIXTURES / default))


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level BPE of about 500 tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>"], show_progress=False)
    texts = [f" the emotion is {emotion} because {text}" for emotion in EMOTIONS for text in SENTENCES]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(tokenizer_json) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's real vocabulary, which is not ours to ship."""
    folder = Path(os.environ.get("SEVLM_GPT2", ROOT.parent / "shared" / "gpt2"))
    if not (folder / "vocab.json").is_file():
        pytest.skip("GPT-2's vocab.json and merges.txt are not at hand (SEVLM_GPT2 names their folder)")
    return read_tokenizer(folder)


@pytest.fixture(scope="session")
def full_size_tokenizer_json(tokenizer_json) -> str:
    """The same, filled up to GPT-2's 50,257 tokens."""
    stored = json.loads(tokenizer_json)
    vocabulary = stored["model"]["vocab"]
    stored["model"]["vocab"] = vocabulary | {f"filler{i}": i for i in range(len(vocabulary), 50257)}
    return json.dumps(stored)


@pytest.fixture(scope="session")
def paper_model(full_size_tokenizer_json) -> SEVLM:
    """The paper's size with random weights."""
    return initialise(SEVLM(Config(), Tokenizer.from_str(full_size_tokenizer_json), read_lexicon(OUR_LEXICON))).eval()


@pytest.fixture
def make_model(tokenizer_json):
    """Small models with lively random weights: `make_model(two_way_emotions=True)`."""
    def make(**changes) -> SEVLM:
        torch.manual_seed(0)
        sizes = dict(image_size=16, patch_size=8, tower_width=24, tower_layers=2, tower_heads=2, width=32, layers=2,
                     heads=4, positions=48, length=30)
        model = SEVLM(Config(**sizes | changes), Tokenizer.from_str(tokenizer_json), read_lexicon(OUR_LEXICON))
        for name, parameter in initialise(model).named_parameters():  # 0.02 would leave every prediction nearly uniform
            if "ln_" not in name:
                torch.nn.init.normal_(parameter, std=0.25)
        return model.eval()
    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory) -> Path:
    """A data root with a toy world of 60 paintings."""
    root = tmp_path_factory.mktemp("data")
    load_art("toy", root, toy_paintings=60)
    return root


@pytest.fixture
def toy(toy_root) -> Art:
    return load_art("toy", toy_root, toy_paintings=60)

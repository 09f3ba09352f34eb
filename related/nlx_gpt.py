"""NLX-GPT in two stages, as the paper compares itself with it (5.2): our baseline, GPT-2 on CLIP's patches without VAD
and without the contrastive head, is not asked for an emotion but told what a classifier says, and explains that.

    python -m related.emotion_classifier --data toy
    python train.py --name baseline --no-vad-input --no-vad-head --no-contrastive-head
    python -m related.nlx_gpt --data toy --emotions runs/toy-emotions --weights runs/baseline

Nothing is trained here. What the baseline itself makes of the same pictures stands in its own report.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Art
from related.captions import Captioner, Captioning, program, stored_features
from related.training import Machine, parameters_of
from sevlm import SEVLM, generate, load_model
from support.program import run_program
from support.run import Run
from support.settings import option


@dataclass
class Settings(Captioning):
    features: str = option("clip", "what the baseline attends to: clip, its own tower's patches", choices=("clip",))
    weights: str = option("runs/baseline", "the baseline: a run, a model folder, or a hub id")
    decoding: str = option("greedy", "greedy, or nucleus: words at random, the unlikeliest left out",
                           choices=("greedy", "nucleus"))
    top_p: float = option(0.9, "the nucleus (5.1)", above=0, most=1)


def reasons(model: SEVLM, features: Tensor, emotions: Sequence[str], top_p: float = 0.0, seeds: Sequence[int] | int = 0
            ) -> list[str]:
    """An explanation of each picture's emotion; nucleus 0 is greedy decoding."""
    openings = [model.text.opening(emotion) for emotion in emotions]
    sentences = generate(model, features, openings, top_p=top_p, seeds=seeds)
    return [model.text.reason(ids) for ids in sentences.ids.tolist()]


class NLXGPT(Captioner):
    def __init__(self, art: Art, settings: Settings, machine: Machine):
        model, pictures = load_model(settings.weights, "--weights"), stored_features(art, settings, machine)
        machine = Machine.chosen(settings.device, settings.precision, model.config.width)  # as it was trained
        super().__init__(pictures, model, settings, machine)
        for emotion in art.emotions:
            model.text.emotion_index(emotion)  # one that it does not know is named now
        self.emotions = art.emotions
        self.parameters = parameters_of(model)  # the tower's are among them

    def train(self, run: Run) -> int:
        return 0

    @torch.no_grad()
    def explain(self, paintings: np.ndarray, emotions: np.ndarray) -> list[str]:
        settings, said = self.settings, []
        top_p = settings.top_p if settings.decoding == "nucleus" else 0.0
        for part, features, emotion in self.in_parts(paintings, emotions):
            names = [self.emotions[index] for index in emotion.tolist()]
            with self.machine.autocast():
                said += reasons(self.model, features.float(), names, top_p, (settings.seed + part).tolist())
        return said


def main() -> None:
    program("nlx_gpt", "NLX-GPT in two stages", Settings, {}, NLXGPT)


if __name__ == "__main__":
    run_program(main)

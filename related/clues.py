"""What there is to see in a picture, in words: known to the toy's maker, annotated in EmoSet, or else measured.

    1. Measured         brightness, colourfulness (Hasler and Suesstrunk 2003), hues
    2. Said             style and artist by the path, and words that two annotators share
    3. Clues            all of that for the pictures of a data set
    4. Wordings         how it is asked for and told
"""
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data import Art
from related.emoset import EmoSet
from support.english import words
from support.labels import in_words
from support.meteor import FUNCTION_WORDS
from support.pictures import BadPicture, open_picture
from support.program import UserError, progress, read_json
from support.store import Store, stamp
from toy.painter import ABOUT

Clues = dict[str, str]  # what is known of a picture: subject, colour, brightness, style, ...


def enumerated(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


# 1. Measured

BRIGHTNESS = ((0.35, "dark"), (0.5, "dim"), (1, "bright"))  # up to these means; a third of the toy's pictures each
COLOURFULNESS = ((0, "not"), (15, "slightly"), (33, "moderately"), (45, "averagely"), (59, "quite"), (82, "highly"),
                 (109, "extremely"))  # what people called pictures of such values
HUES = {"red": 0, "orange": 30, "yellow": 58, "green": 120, "turquoise": 178, "blue": 225, "purple": 275, "pink": 325}
GRAY, DOMINANT = 0.1, 0.25  # chroma below which a pixel has no hue, share of the pixels from which a hue counts
SIDE = 64  # pixels are enough for it


def brightness_in_words(share: float) -> str:
    return next(word for most, word in BRIGHTNESS if share <= most)


def colourfulness_in_words(share: float) -> str:
    """Of a share of the scale, whose end is "extremely"."""
    end = COLOURFULNESS[-1][0]
    return min(COLOURFULNESS, key=lambda step: abs(step[0] - share * end))[1]


def measured(image: Image.Image) -> np.ndarray:
    """Brightness and colourfulness as shares of their scales, and the share of each hue's pixels: (2 + hues,)."""
    pixels = np.asarray(image.resize((SIDE, SIDE)), np.float32).reshape(-1, 3)
    red, green, blue = pixels.T
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    colourfulness = np.linalg.norm(opponents.std(1)) + 0.3 * np.linalg.norm(opponents.mean(1))
    brightness = np.asarray(image.convert("L")).mean() / 255
    hue = np.asarray(image.resize((SIDE, SIDE)).convert("HSV"))[..., 0].ravel() * (360 / 256)
    away = np.abs((hue[:, None] - np.array(list(HUES.values())) + 180) % 360 - 180)  # (pixels, hues)
    coloured = pixels.max(1) - pixels.min(1) >= 255 * GRAY
    shares = np.bincount(away.argmin(1)[coloured], minlength=len(HUES)) / len(pixels)
    return np.array([brightness, min(1, colourfulness / COLOURFULNESS[-1][0]), *shares], np.float32)


def measurements(art: Art, paintings: np.ndarray) -> dict[int, np.ndarray]:
    """Of those paintings whose picture can be read; each is measured once."""
    store = Store(art.folder / "cache" / f"{art.name}-clues.store", [stamp(file) for file in art.files],
                  (2 + len(HUES),), np.float32, "clues")
    missing = paintings[~store.done[paintings]]
    for part in progress(np.array_split(missing, 1 + len(missing) // 500), "measuring, x500"):
        found = {}
        for painting in part:
            try:
                found[painting] = measured(open_picture(art.files[painting] or "", SIDE))
            except BadPicture:
                continue  # whoever trains on pictures says which are broken
        if found:
            store.put(list(found), np.stack(list(found.values())))
    usable = paintings[store.done[paintings]]
    return dict(zip(usable.tolist(), store.get(usable), strict=True))


# 2. Said

ABOUT_ANY_PICTURE = frozenset((
    "artist", "color", "colors", "emotion", "feel", "feeling", "feels", "felt", "gives", "image", "like", "look",
    "looks", "makes", "mood", "painted", "painter", "painting", "picture", "reminds", "scene", "see", "seem", "seems"))


def shared_words(texts: Iterable[str], most: int = 4) -> list[str]:
    """Content words that two annotators or more have in common, the most frequent ones."""
    often = Counter(word for text in texts for word in sorted(set(words(text)) - FUNCTION_WORDS - ABOUT_ANY_PICTURE)
                    if len(word) > 2 and word.isalpha())
    return [word for word, count in often.most_common() if count > 1][:most]


# 3. Clues

def clues_of(art: Art, paintings: np.ndarray) -> dict[int, Clues]:
    """What there is to see, in words."""
    if isinstance(art, EmoSet):
        return {painting: attributes_in_words(art.attributes[painting]) for painting in paintings.tolist()}
    if art.name == "toy":
        return truth_of(art, paintings)
    found = measurements(art, paintings)
    return {painting: painting_in_words(art, painting, values) for painting, values in found.items()}


SIZES = {"high": "large", "low": "small"}


def truth_of(art: Art, paintings: np.ndarray) -> dict[int, Clues]:
    """What the toy's maker knows."""
    truth = read_json(art.folder / ABOUT).get("truth", {})
    if not truth.keys() >= set(art.names):
        raise UserError(f"{art.folder / ABOUT} does not say what the pictures show: delete {art.folder}, and it is "
                        "painted anew")
    found = {}
    for painting in paintings.tolist():
        known = truth[art.names[painting]]
        found[painting] = {"subject": known["subject"], "colour": known["colour"],
                           "brightness": brightness_in_words(known["brightness"])}
        if known["size"] in SIZES:
            found[painting]["size"] = SIZES[known["size"]]
    return found


def attributes_in_words(attributes: dict) -> Clues:
    found = {name: in_words(attributes[name]) for name in ("scene", "facial_expression", "human_action")
             if name in attributes}
    if "brightness" in attributes:
        found["brightness"] = brightness_in_words(float(attributes["brightness"]))
    if "colorfulness" in attributes:
        found["colourfulness"] = colourfulness_in_words(float(attributes["colorfulness"]))
    if attributes["object"]:
        found["object"] = enumerated(list(map(in_words, attributes["object"])))
    return found


def painting_in_words(art: Art, painting: int, values: np.ndarray) -> Clues:
    brightness, colourfulness, *shares = values.tolist()
    found = {"brightness": brightness_in_words(brightness), "colourfulness": colourfulness_in_words(colourfulness)}
    hues = sorted(zip(shares, HUES, strict=True), reverse=True)
    dominant = ["gray"] if sum(shares) < DOMINANT else [hue for share, hue in hues if share >= DOMINANT]
    if dominant:  # otherwise motley
        found["colour"] = enumerated(dominant)
    if art.name.startswith("artemis"):  # STYLE/artist_title
        style, _, rest = art.names[painting].partition("/")
        found |= {"style": style.replace("_", " "), "artist": rest.partition("_")[0].replace("-", " ").title()}
    if shared := shared_words(art.texts[row] for row in art.rows_of(painting)):
        found["mentioned"] = enumerated(shared)
    return found


# 4. Wordings

@dataclass(frozen=True)
class Wording:
    """How something is asked for and told; {} is what it is. The paraphrases are for tests: never trained on."""
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()


WORDINGS = {
    "subject": Wording(
        ("What is in the picture?", "What does the painting show?", "What can be seen here?", "What do you see?",
         "Which thing is painted here?", "What is the subject of this picture?", "What did the painter paint?",
         "Name the main thing in the painting."),
        ("The picture shows the {}.", "It shows the {}.", "One can see the {}."),
        ("What is the main subject here?", "What can you see in this painting?", "Which thing does the picture show?")),
    "colour": Wording(
        ("Which colour is it?", "What is the main colour of the picture?", "Which color does the painting have?",
         "In which colour is it painted?", "What color do you see most?", "Name the colour of the light.",
         "Which colours are there in the picture?", "What is the color of the scene?"),
        ("The main colour is {}.", "It is mostly {}.", "Most of it is {}."),
        ("What colour is this painting?", "Which is the main color here?", "Name the colour that you see in it.")),
    "brightness": Wording(
        ("How bright is the picture?", "Is the painting dark, dim or bright?", "How much light is there?",
         "How dark is it?", "Is there much light in the picture?", "Is this a bright scene or a dark one?"),
        ("The picture is {}.", "It is {}.", "The scene is {}."),
        ("How bright is this scene?", "Is it dark here, or is there light?", "How dark is the painting?")),
    "size": Wording(("How large is it?", "Is the subject large or small?", "What size does the main thing have?"),
                    ("It is {}.", "The subject is {}.")),
    "colourfulness": Wording(("How colourful is the picture?", "Are there many colours, or few?",
                              "How strong are the colors?"), ("It is {} colourful.", "The picture is {} colourful.")),
    "style": Wording(("In which style is it painted?", "What is the style of the painting?",
                      "Which movement does the picture belong to?"), ("The style is {}.", "It is painted in {}.")),
    "artist": Wording(("Who painted it?", "Who is the artist?", "Whose work is the picture?"),
                      ("It is by {}.", "The artist is {}.")),
    "mentioned": Wording(("What is in the picture?", "What do people see here?", "What would somebody mention?"),
                         ("People mention {}.", "There is talk of {}.")),
    "scene": Wording(("Where is this?", "What kind of place is it?", "Which scene is it?"),
                     ("The scene: {}.", "The place is of this kind: {}.")),
    "object": Wording(("Which objects are in the picture?", "What can be seen?", "What is there?"),
                      ("These are there: {}.", "One can see: {}.")),
    "facial_expression": Wording(("What does the face show?", "Which expression does the face have?"),
                                 ("The face shows this: {}.", "Its expression: {}.")),
    "human_action": Wording(("What is somebody doing?", "What happens in the picture?", "What do the people do?"),
                            ("One sees this: {}.", "Somebody is {}."))}
SHOWN = Wording(("Is the {} in the picture?", "Does it show the {}?", "Can one see the {}?"),
                ("Yes, it shows the {}.", "No, it shows the {}."))

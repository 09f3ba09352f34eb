"""The authors' release as a folder of ours, set to compute what their code computes.

    python -m related.authors jing5566/SEVLM --lexicon NRC-VAD-Lexicon.txt --out authors-v2
    python sample.py image.jpg --checkpoint authors-v2
    python train.py --evaluate authors-v2 --data artemis_v2

SOURCE is a hub repository, the folder that holds `nle_model_*`, `nle_gpt2_tokenizer_*` and `ckpt_stats_*.tar`, or
one of its `nle_model_*` folders where it has several. Their files hold no picture statistics and no lexicon: the
vision tower is CLIP's, unless they trained it, and the lexicon is the one that you name.
"""
import argparse
from pathlib import Path

from torch import Tensor

from sevlm import SEVLM, Config, save
from support.files import fetch_folder, find_file, is_hub_id, load_checked, read_tensors, read_tokenizer, renamed
from support.program import UserError, read_json, run_program
from support.public import CLIP_FILES, CLIP_HUB, GPT2_NAMES, clip_tensors, decoder_sizes, gpt2_tensors, tower_sizes
from vad import Lexicon, read_lexicon

DECODER_NAMES = [*GPT2_NAMES, (r"^(transformer\.)?VAD_linear\b", "fusion"), (r"^VAD_head\b", "vad_head"),
                 (r"^sim_mlp\.pred\b", "contrastive_head")]
EMOTION_NAMES = [(r"^pos_encoder\b", "wpe"), (r"^norm\b", "ln_pre"), (r"^encoder\.layers\b", "blocks"),
                 (r"\bself_attention\.", ""), (r"\bnorm([12])\b", r"ln_\1"), (r"\bfc\.0\b", "c_fc"),
                 (r"\bfc\.2\b", "c_proj")]
EMOTION_UNUSED = r"decoder\.(weight|bias)"  # a linear layer whose output their code drops


def from_authors(source: str | Path, lexicon: Lexicon, clip: str | Path = CLIP_HUB, **changes) -> SEVLM:
    """Their checkpoint as our model."""
    folder = model_folder(source)
    files = {"model": folder / "pytorch_model.bin", "config": folder / "config.json",
             "state": folder.parent / f"ckpt_stats_{folder.name.removeprefix('nle_model_')}.tar",
             "tokenizer": next(iter(sorted(folder.parent.glob("nle_gpt2_tokenizer_*"))),
                               folder.parent / "nle_gpt2_tokenizer_0")}
    for file in files.values():
        if not file.exists():
            raise UserError(f"{source} lacks {file.relative_to(folder.parent)} of the authors' layout")
    theirs, state = read_json(files["config"]), read_tensors(files["state"])
    for key, value in (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5), ("len_prefix", 0)):
        if theirs.get(key, value) != value:
            raise UserError(f"{files['config']}: {key} is {theirs[key]!r}, and only {value!r} is supported")
    decoder = gpt2_tensors(read_tensors(files["model"]), files["model"], DECODER_NAMES)
    emotion = emotion_tensors(state.get("emo_encoder_state_dict", {}))
    if trained := state.get("encoder_state_dict"):  # only there if they trained the tower too
        tower_file, tower = files["state"], clip_tensors({n.removeprefix("encoder."): t for n, t in trained.items()})
    else:
        tower_file = find_file(clip, CLIP_FILES, "--clip")
        tower = clip_tensors(read_tensors(tower_file))
    try:
        parts = dict(vad_input=bool(emotion), vad_head=bool(theirs.get("use_VAD_loss")), heads=theirs["n_head"],
                     contrastive_head=bool(theirs.get("use_cl_loss")), length=theirs["max_seq_len"])
    except KeyError as error:
        raise UserError(f"{files['config']} lacks {error} of the authors' layout") from None
    sizes = tower_sizes(tower, tower_file) | decoder_sizes(decoder, files["model"])
    model = SEVLM(Config.authors(**sizes | parts | changes), read_tokenizer(files["tokenizer"]), lexicon)
    if not emotion:  # their baseline keeps a fusion layer that it never uses
        decoder = {name: tensor for name, tensor in decoder.items() if not name.startswith("fusion.")}
    load_checked(model, tower | decoder | emotion, f"{folder} and {tower_file}")
    model.about = {"data": "ArtEmis, by the authors"}
    return model.eval()


def emotion_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"emotion_encoder.{name}": tensor
            for name, tensor in renamed(tensors, EMOTION_NAMES, EMOTION_UNUSED).items()}


def model_folder(source: str | Path) -> Path:
    """The `nle_model_*` folder that `source` means."""
    root = Path(source)
    if is_hub_id(source):
        root = fetch_folder(str(source), ["*nle_*", "*ckpt_stats_*"])
    if not root.is_dir():
        raise UserError(f"{source}: there is no such folder")
    if root.name.startswith("nle_model_"):
        return root
    found = sorted(root.rglob("nle_model_*"))
    if len(found) != 1:
        names = "; name one of them: " + ", ".join(map(str, found)) if found else ""
        raise UserError(f"{source} holds {len(found)} folders nle_model_*{names}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn the authors' release into a folder of ours.")
    parser.add_argument("source", metavar="SOURCE", help="their folder, or the hub repository jing5566/SEVLM")
    parser.add_argument("--lexicon", required=True, metavar="FILE", help="the NRC VAD lexicon")
    parser.add_argument("--clip", default=CLIP_HUB, metavar="SOURCE",
                        help=f"CLIP: file, folder or hub id (default: {CLIP_HUB})")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to put our folder")
    options = parser.parse_args()
    if Path(options.out).exists():
        raise UserError(f"{options.out} is there already; name another --out")
    save(from_authors(options.source, read_lexicon(options.lexicon), options.clip), options.out)
    print(f"{options.out}: now try python sample.py PICTURE --checkpoint {options.out}")


if __name__ == "__main__":
    run_program(main)

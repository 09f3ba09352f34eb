"""Weights in and out: every naming that the public files use, and every kind of file that does not fit."""
import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES, ROOT
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from related.authors import from_authors
from sevlm import from_public, generate, load, load_model, save
from support.files import find_file, load_checked, read_tensors
from support.program import UserError
from support.public import clip_tensors
from vad import OUR_LEXICON, read_lexicon


def openai_names(model, prefix="visual."):
    """The tower as OpenAI and open_clip store it, with what else their files hold."""
    ours = {n.removeprefix("tower."): t for n, t in model.state_dict().items() if n.startswith("tower.")}
    theirs = {"class_embedding": ours["class_embedding"], "positional_embedding": ours["positional_embedding"],
              "conv1.weight": ours["conv1.weight"], "proj": torch.zeros(24, 8)}
    for kind in ("weight", "bias"):
        theirs |= {f"ln_pre.{kind}": ours[f"ln_pre.{kind}"], f"ln_post.{kind}": ours[f"ln_post.{kind}"]}
        for i in range(2):
            them, us = f"transformer.resblocks.{i}", f"blocks.{i}"
            theirs |= {f"{them}.ln_1.{kind}": ours[f"{us}.ln_1.{kind}"],
                       f"{them}.ln_2.{kind}": ours[f"{us}.ln_2.{kind}"],
                       f"{them}.attn.in_proj_{kind}": ours[f"{us}.attn.c_attn.{kind}"],
                       f"{them}.attn.out_proj.{kind}": ours[f"{us}.attn.c_proj.{kind}"],
                       f"{them}.mlp.c_fc.{kind}": ours[f"{us}.mlp.c_fc.{kind}"],
                       f"{them}.mlp.c_proj.{kind}": ours[f"{us}.mlp.c_proj.{kind}"]}
    theirs = {prefix + name: tensor for name, tensor in theirs.items()}
    text_tower = {"transformer.resblocks.0.ln_1.weight": torch.zeros(5), "positional_embedding": torch.zeros(7, 5),
                  "token_embedding.weight": torch.zeros(9, 5), "ln_final.bias": torch.zeros(5),
                  "text_projection": torch.zeros(5, 8), "logit_scale": torch.tensor(1.0)}
    return theirs | (text_tower if prefix else {})


def hugging_face_names(model, prefix="vision_model."):
    ours = {n.removeprefix("tower."): t for n, t in model.state_dict().items() if n.startswith("tower.")}
    theirs = {"embeddings.class_embedding": ours["class_embedding"], "embeddings.patch_embedding.weight": ours["conv1.weight"],
              "embeddings.position_embedding.weight": ours["positional_embedding"], "embeddings.position_ids": torch.arange(5)[None]}
    for kind in ("weight", "bias"):
        theirs |= {f"pre_layrnorm.{kind}": ours[f"ln_pre.{kind}"], f"post_layernorm.{kind}": ours[f"ln_post.{kind}"]}
        for i in range(2):
            them, us = f"encoder.layers.{i}", f"blocks.{i}"
            for part, tensor in zip("qkv", ours[f"{us}.attn.c_attn.{kind}"].chunk(3), strict=True):
                theirs[f"{them}.self_attn.{part}_proj.{kind}"] = tensor.clone()
            theirs |= {f"{them}.layer_norm1.{kind}": ours[f"{us}.ln_1.{kind}"],
                       f"{them}.layer_norm2.{kind}": ours[f"{us}.ln_2.{kind}"],
                       f"{them}.self_attn.out_proj.{kind}": ours[f"{us}.attn.c_proj.{kind}"],
                       f"{them}.mlp.fc1.{kind}": ours[f"{us}.mlp.c_fc.{kind}"],
                       f"{them}.mlp.fc2.{kind}": ours[f"{us}.mlp.c_proj.{kind}"]}
    extra = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2), "visual_projection.weight": torch.zeros(8, 24),
             "text_projection.weight": torch.zeros(8, 5), "logit_scale": torch.tensor(1.0)}
    return {prefix + name: tensor for name, tensor in theirs.items()} | (extra if prefix else {})


def gpt2_names(model, prefix="transformer."):
    """The decoder without cross-attention and without the four added tokens, with an old file's masks."""
    ours = {n.removeprefix("decoder."): t for n, t in model.state_dict().items() if n.startswith("decoder.")}
    theirs = {"wte.weight": ours["wte.weight"][:-4], "wpe.weight": ours["wpe.weight"]}
    for kind in ("weight", "bias"):
        theirs[f"ln_f.{kind}"] = ours[f"ln_f.{kind}"]
        for i in range(2):
            for them, us in (("attn.c_attn", "attn.c_attn"), ("attn.c_proj", "attn.c_proj"),
                             ("mlp.c_fc", "mlp.c_fc"), ("mlp.c_proj", "mlp.c_proj")):
                theirs[f"h.{i}.{them}.{kind}"] = ours[f"blocks.{i}.{us}.{kind}"].t()
            theirs |= {f"h.{i}.ln_1.{kind}": ours[f"blocks.{i}.ln_1.{kind}"],
                       f"h.{i}.ln_2.{kind}": ours[f"blocks.{i}.ln_2.{kind}"]}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    return {prefix + name: tensor.contiguous() for name, tensor in (theirs | masks).items()}


@pytest.fixture
def folders(tmp_path, make_model, tokenizer_json):
    """A model, and public files of its weights in two folders."""
    model = make_model()
    for folder in ("clip", "gpt2"):
        (tmp_path / folder).mkdir()
    save_file(openai_names(model), tmp_path / "clip" / "open_clip_model.safetensors")
    save_file(gpt2_names(model), tmp_path / "gpt2" / "model.safetensors")
    (tmp_path / "gpt2" / "tokenizer.json").write_text(tokenizer_json)
    return model, tmp_path / "clip", tmp_path / "gpt2"


def public(folders, **changes):
    return from_public(clip=folders[1], gpt2=folders[2], lexicon=read_lexicon(OUR_LEXICON), tower_heads=2, heads=4, **changes)


@pytest.mark.parametrize("names, prefix", [(openai_names, "visual."), (openai_names, ""),
                                           (hugging_face_names, "vision_model."), (hugging_face_names, "")])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_naming_of_the_tower(tmp_path, make_model, names, prefix, file):
    model = make_model()
    (save_file if "safe" in file else torch.save)(names(model, prefix), tmp_path / file)
    loaded = clip_tensors(read_tensors(tmp_path / file))
    ours = {n: t for n, t in model.state_dict().items() if n.startswith("tower.")}
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_public_weights_and_grown_embedding(folders, prefix):
    model, _, gpt2 = folders
    save_file(gpt2_names(model, prefix), gpt2 / "model.safetensors")
    loaded = public(folders)
    assert (loaded.config.image_size, loaded.config.layers, loaded.config.positions) == (16, 2, 48)
    before, after = model.state_dict(), loaded.state_dict()
    random = [n for n in after if not torch.equal(before[n], after[n])]
    assert not [n for n in random if n.startswith("tower") or (n.startswith("decoder") and "cross" not in n)
                and n != "decoder.wte.weight"]
    words = after["decoder.wte.weight"]
    assert torch.equal(words[:-4], before["decoder.wte.weight"][:-4])
    std = 0.02 * (768 / 32) ** 0.5  # at the tests' width
    assert words[-4:].std().item() == pytest.approx(std, rel=0.3)
    assert loaded.decoder.blocks[0].cross_attn.c_proj.weight.std().item() == pytest.approx(std / 4 ** 0.5, rel=0.2)
    assert not loaded.training


def test_missing_extra_and_transposed_tensors_come_in_one_error(folders):
    model, clip, gpt2 = folders
    tower, decoder = openai_names(model), gpt2_names(model)
    del tower["visual.ln_pre.bias"]
    tower["visual.ln_strange.bias"] = torch.zeros(3)
    decoder["transformer.h.0.attn.c_attn.weight"] = decoder["transformer.h.0.attn.c_attn.weight"].T.contiguous()
    save_file(tower, clip / "open_clip_model.safetensors")
    save_file(decoder, gpt2 / "model.safetensors")
    with pytest.raises(UserError) as error:
        public(folders)
    for part in ("3 tensors do not fit", "missing: tower.ln_pre.bias", "unexpected: tower.ln_strange.bias",
                 "misshapen: decoder.blocks.0.attn.c_attn.weight is (32, 96), expected (96, 32)"):
        assert part in str(error.value)


def test_a_tokenizer_of_another_size_is_refused(folders):
    model, _, gpt2 = folders
    names = gpt2_names(model)
    save_file(names | {"transformer.wte.weight": names["transformer.wte.weight"][:-1]}, gpt2 / "model.safetensors")
    with pytest.raises(UserError, match=r"has \d+ words and its tokenizer \d+"):
        public(folders)


def test_an_untied_head_is_refused(folders):
    model, _, gpt2 = folders
    save_file(gpt2_names(model) | {"lm_head.weight": torch.zeros(7, 32)}, gpt2 / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        public(folders)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "pytorch_model.bin"])
def test_truncated_weights(folders, name):
    model, clip, _ = folders
    file = clip / name
    (save_file if "safe" in name else torch.save)(openai_names(model), file)
    (clip / "open_clip_model.safetensors").rename(file) if "safe" in name else (clip / "open_clip_model.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{name} is truncated or no file of weights"):
        public(folders)


def test_code_in_a_bin_file_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UserError, match="bomb.bin"):
        read_tensors(tmp_path / "bomb.bin")
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_something_else(folders):
    _, clip, gpt2 = folders
    with pytest.raises(UserError, match="holds no CLIP vision transformer"):
        from_public(clip=gpt2, gpt2=gpt2)
    with pytest.raises(UserError, match="holds no GPT-2"):
        from_public(clip=clip, gpt2=clip / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="holds none of model.safetensors"):
        from_public(clip=clip, gpt2=clip)
    (gpt2 / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer.json, nor vocab.json and merges.txt"):
        public(folders)
    with pytest.raises(UserError, match="--clip no such/folder/anywhere: there is no such file or folder"):
        from_public(clip="no such/folder/anywhere", gpt2=gpt2)


def test_a_wrong_path_is_no_strangers_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source in ("runs/typo", "./typo", "typo"):
        with pytest.raises(UserError, match=f"--checkpoint {source}: there is no such folder"):
            load_model(source)


def test_a_lexicon_is_never_taken_unasked(folders):
    with pytest.raises(UserError, match="needs a VAD lexicon; name one with --lexicon"):
        from_public(clip=folders[1], gpt2=folders[2], tower_heads=2, heads=4)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr("support.files.knock", lambda: None)
    with pytest.raises(UserError, match=r"cannot fetch a.safetensors or b.bin from our/model: no network\n"
                                        r"Download it from https://huggingface.co/our/model and name its folder with --clip"):
        find_file("our/model", ("a.safetensors", "b.bin"), "--clip")


def test_checkpoint_round_trip(tmp_path, make_model, images):
    model = make_model(two_way_emotions=True, crop=True)
    model.about = {"data": "toy"}
    save(model, tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.config == model.config and loaded.about == {"data": "toy"}
    assert not loaded.training and loaded.lexicon.rows == model.lexicon.rows
    features = model.encode_image(images)
    assert torch.equal(generate(loaded, features).ids, generate(model, features).ids)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "lexicon.txt",
                                                                           "model.safetensors", "tokenizer.json"]


def test_checkpoint_in_half_precision_is_half_the_size(tmp_path, make_model):
    for dtype in (torch.float32, torch.float16):
        save(make_model(), tmp_path / str(dtype), dtype)
    full, half = (load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in (torch.float32, torch.float16))
    assert half["decoder.wte.weight"].dtype == torch.float16
    assert full["decoder.wte.weight"].dtype == torch.float32
    assert load(tmp_path / str(torch.float16)).decoder.wte.weight.dtype == torch.float32


def change_config(run, **changes):
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | {"sevlm": stored["sevlm"] | changes}))


@pytest.mark.parametrize("harm, message", [
    (lambda run: (run / "config.json").unlink(), "is no SEVLM checkpoint: it has no config.json"),
    (lambda run: (run / "config.json").write_text("{}"), "config.json was not written by SEVLM"),
    (lambda run: (run / "config.json").write_text(json.dumps({"sevlm": {"wings": 2}})), "does not know: wings"),
    (lambda run: (run / "model.safetensors").unlink(), "holds none of model.safetensors"),
    (lambda run: (run / "model.safetensors").write_bytes(b"PK nonsense"), "is truncated or no file of weights"),
    (lambda run: (run / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    (lambda run: (run / "lexicon.txt").unlink(), "lexicon.txt"),
    (lambda run: change_config(run, layers=-1), "config.json: layers is -1; it must be at least 1"),
    (lambda run: change_config(run, dropout=float("nan")), "config.json: dropout is nan"),
    (lambda run: change_config(run, crop="yes"), "config.json: crop is 'yes'; it must be true or false"),
    (lambda run: change_config(run, width=32.5), "config.json: width is 32.5; it must be a whole number"),
    (lambda run: change_config(run, emotions=["awe", "awe"]), "2 to 40 different emotions"),
])
def test_broken_checkpoints(tmp_path, make_model, harm, message):
    save(make_model(), tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, make_model, monkeypatch):
    save(make_model(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(make_model(dropout=0.5), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_the_authors_folder_becomes_one_of_ours(tmp_path):
    """Of several models one is to be named; what comes out loads like any checkpoint, with the lexicon inside."""
    source, lexicon = FIXTURES / "official", read_lexicon(OUR_LEXICON)
    for name in ("best-acc", "best-res"):
        shutil.copytree(source / "nle_model_best", tmp_path / f"nle_model_{name}")
        shutil.copy(source / "ckpt_stats_best.tar", tmp_path / f"ckpt_stats_{name}.tar")
    shutil.copytree(source / "nle_gpt2_tokenizer_0", tmp_path / "nle_gpt2_tokenizer_0")
    with pytest.raises(UserError, match="holds 2 folders nle_model_.*name one of them"):
        from_authors(tmp_path, lexicon)
    with pytest.raises(UserError, match="python -m related.authors"):
        load_model(tmp_path)
    command = [sys.executable, "-m", "related.authors", tmp_path / "nle_model_best-res", "--clip",
               source / "clip_openai.safetensors", "--lexicon", OUR_LEXICON, "--out", tmp_path / "ours"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr == ""
    ours = load(tmp_path / "ours")
    assert ours.config.two_way_emotions and ours.config.authors_pixels and ours.lexicon.rows == lexicon.rows
    (tmp_path / "ckpt_stats_best-res.tar").unlink()
    with pytest.raises(UserError, match="lacks ckpt_stats_best-res.tar"):
        from_authors(tmp_path / "nle_model_best-res", lexicon)


def test_load_checked_wants_every_tensor(make_model):
    model = make_model()
    with pytest.raises(UserError, match="somewhere: 1 tensors do not fit\n  missing: vad_head.bias"):
        load_checked(model, {n: t for n, t in model.state_dict().items() if n != "vad_head.bias"}, "somewhere")

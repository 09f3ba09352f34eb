"""Full-size random weights saved by `transformers` load into ours and compute the same."""
import pytest
import torch

from sevlm import from_public
from vad import OUR_LEXICON, read_lexicon

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, full_size_tokenizer_json):
    """Their tower and decoder, and ours loaded from the folders in which they saved themselves."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=16)).eval()
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6, add_cross_attention=True)).eval()
    tower.save_pretrained(folder / "clip")
    decoder.save_pretrained(folder / "gpt2")
    (folder / "gpt2" / "tokenizer.json").write_text(full_size_tokenizer_json)
    return tower, decoder, from_public(clip=folder / "clip", gpt2=folder / "gpt2", lexicon=read_lexicon(OUR_LEXICON))


@torch.no_grad()
def test_tower(reference):
    tower, _, ours = reference
    images = torch.randn(2, 3, 224, 224)
    inner = getattr(tower, "vision_model", tower)
    theirs = inner.post_layernorm(tower(images).last_hidden_state[:, 1:])
    assert (ours.encode_image(images) - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_decoder(reference):
    _, decoder, ours = reference
    features, ids = torch.randn(2, 196, 768), torch.randint(0, 50257, (4, 30))
    segments = torch.randint(0, 50257, (4, 30))
    theirs = decoder(ids, token_type_ids=segments, encoder_hidden_states=features.repeat_interleave(2, 0)).logits
    hidden = ours.decoder(ours.decoder.embed(ids, segments), ours.decoder.keys_values(features))
    assert (ours.decoder.logits(hidden)[..., :50257] - theirs).abs().max() < 1e-4


def test_parameter_counts(paper_model):
    def count(*parts):
        return sum(parameter.numel() for part in parts for parameter in part.parameters())
    model = paper_model
    assert count(model.tower) == 85_799_424
    assert count(model.decoder, model.fusion, model.vad_head, model.contrastive_head) == 100_237_060
    assert count(model.emotion_encoder) == 17_851 - 4  # theirs holds a linear layer 3 -> 1 that nothing uses

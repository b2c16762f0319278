"""The caption encoder of latent diffusion against diffusers' LDMBertModel, its tokens against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer
from ldm.util import UserError
from tests.goldens.fill import data, fill

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of dog ##s cafe ! , virus mon ##ster 狗 3".split()
SMALL: dict[str, Any] = {"n_embed": 32, "n_layer": 2, "vocab_size": 40, "max_seq_len": 12, "dim_head": 8}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


def test_tokens_are_berts(vocabulary: Path) -> None:
    peer = BertTokenizer(str(vocabulary))
    texts = ["A photo of dogs!", "", "virus monster, café 狗3", "zebra"]
    ours = BERTTokenizer(vocabulary.parent, max_length=12)
    expected = peer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ours(texts), expected)
    assert ours(["A photo of dogs!"])[0].tolist() == [2, 5, 6, 7, 8, 9, 11, 3, 0, 0, 0, 0]
    with pytest.warns(UserWarning, match="10 tokens; left out: 'A photo'"):
        assert ours(["dog " * 10 + "A photo"])[0].tolist() == [2, *[8] * 10, 3]


def test_a_missing_vocabulary_is_named(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.txt.*vocab_path"):
        BERTEmbedder(**SMALL, vocab_path="nowhere.txt")
    later = BERTEmbedder(**SMALL)
    for use in (later.check_files, lambda: later(["a dog"])):
        with pytest.raises(UserError, match=r"models/bert-base-uncased/vocab\.txt"):
            use()
    with pytest.raises(UserError, match="has 18 lines, the model 10"):
        BERTEmbedder(**SMALL | {"vocab_size": 10}, vocab_path=vocabulary)
    vocabulary.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no line \[PAD\]"):
        BERTEmbedder(**SMALL, vocab_path=vocabulary)
    vocabulary.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text"):
        BERTEmbedder(**SMALL, vocab_path=vocabulary)


@torch.no_grad()
def test_agrees_with_diffusers() -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint

    ours = fill(BERTEmbedder(**SMALL, use_tokenizer=False)).eval()
    config = LDMBertConfig(
        vocab_size=40, d_model=32, encoder_layers=2, encoder_attention_heads=8, head_dim=8, encoder_ffn_dim=128,
        max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    peer = convert_ldm_bert_checkpoint(ours, config)
    tokens = torch.tensor([[2, 5, 6, 7, 8, 9, 11, 3, 0, 0, 0, 0], [2, 39, 3] + [0] * 9])
    states = ours(tokens)
    assert states.shape == (2, 12, 32)
    torch.testing.assert_close(states, peer.model(tokens)[0])
    torch.testing.assert_close(ours.transformer(tokens), peer.to_logits(states))


@torch.no_grad()
def test_agrees_with_torchs_transformer() -> None:
    ours = fill(BERTEmbedder(**SMALL | {"dim_head": 4}, use_tokenizer=False)).eval()
    x = data("bertx", (2, 12, 32))
    layer = torch.nn.TransformerEncoderLayer(32, 8, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    peer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    layers = ours.transformer.attn_layers.layers
    for i, theirs in enumerate(peer.layers):
        (norm1, attention), (norm2, feed_forward) = layers[2 * i], layers[2 * i + 1]
        theirs.norm1, theirs.norm2 = norm1, norm2
        theirs.linear1, theirs.linear2 = feed_forward.net[0][0], feed_forward.net[2]
        theirs.self_attn.out_proj = attention.to_out
        parts = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        theirs.self_attn.in_proj_weight.copy_(torch.cat(parts))
        theirs.self_attn.in_proj_bias.zero_()
    torch.testing.assert_close(ours.transformer.attn_layers(x), peer(x), rtol=1e-4, atol=1e-4)


def test_captions_and_layouts(vocabulary: Path) -> None:
    captions = fill(BERTEmbedder(**SMALL, vocab_path=str(vocabulary))).eval()
    layouts = fill(BERTEmbedder(**SMALL, use_tokenizer=False)).eval()
    states = captions(["a dog", "a photo"])
    assert torch.equal(states, layouts(captions.tknz_fn(["a dog", "a photo"])))
    assert torch.equal(captions.encode("a dog")[0], captions("a dog")[0])
    states.sum().backward()
    assert captions.transformer.token_emb.weight.grad.abs().sum() > 0  # it is trained along


def test_sizes_and_names_of_the_large_text_to_image_model() -> None:
    with torch.device("meta"):
        state = BERTEmbedder(n_embed=1280, n_layer=32).state_dict()
    assert state["transformer.token_emb.weight"].shape == (30522, 1280)
    assert state["transformer.pos_emb.emb.weight"].shape == (77, 1280)
    assert state["transformer.attn_layers.layers.63.1.net.0.0.weight"].shape == (5120, 1280)
    assert state["transformer.attn_layers.layers.62.1.to_q.weight"].shape == (512, 1280)
    assert state["transformer.to_logits.weight"].shape == (30522, 1280)
    assert sum(value.numel() for key, value in state.items() if "to_logits" not in key) == 542_895_360

"""Classes of the transformers library from tiny configurations; transformers itself is imported when one is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


BART = {"attention_heads": 4, "ffn_dim": 32}


def tokens() -> torch.Tensor:
    """Two sentences of seven tokens."""
    return torch.randint(0, 40, (2, 7))


def build(model: str, config: str, settings: dict[str, Any], **inputs: torch.Tensor) -> tuple[torch.nn.Module, Example]:
    """A model class with a configuration class, both by name; skips the test where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    network = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return network, Example((), inputs)


def bert() -> tuple[torch.nn.Module, Example]:
    """Encoder with a pooler and a classifier."""
    return build("BertForSequenceClassification", "BertConfig", SIZES, input_ids=tokens())


def distilbert() -> tuple[torch.nn.Module, Example]:
    """Encoder with a classifier."""
    settings = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}
    return build("DistilBertForSequenceClassification", "DistilBertConfig", settings, input_ids=tokens())


def vit() -> tuple[torch.nn.Module, Example]:
    """Patches of an image."""
    settings = {**SIZES, "image_size": 32, "patch_size": 8}
    return build("ViTForImageClassification", "ViTConfig", settings, pixel_values=torch.randn(2, 3, 32, 32))


def gpt2() -> tuple[torch.nn.Module, Example]:
    """Decoder whose linear layers are Conv1D, and whose head is tied."""
    settings = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "use_cache": False}
    settings |= {"bos_token_id": 1, "eos_token_id": 2}
    return build("GPT2LMHeadModel", "GPT2Config", settings, input_ids=tokens())


def llama() -> tuple[torch.nn.Module, Example]:
    """Decoder with rotary positions, a gated MLP, and four heads of keys for eight of queries."""
    settings = {**SIZES, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
    settings |= {"max_position_embeddings": 32}
    return build("LlamaForCausalLM", "LlamaConfig", settings, input_ids=tokens())


def neox() -> tuple[torch.nn.Module, Example]:
    """Decoder whose queries, keys and values are interleaved head by head."""
    settings = {**SIZES, "max_position_embeddings": 32, "use_cache": False}
    return build("GPTNeoXForCausalLM", "GPTNeoXConfig", settings, input_ids=tokens())


def bart() -> tuple[torch.nn.Module, Example]:
    """Encoder and decoder with cross-attention, which share their embedding."""
    settings = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "use_cache": False}
    settings |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART.items()}
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    return build("BartForConditionalGeneration", "BartConfig", settings, **inputs)


def swin() -> tuple[torch.nn.Module, Example]:
    """Windows with biases of positions for every head, in two stages."""
    settings = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [4, 4]}
    settings |= {"window_size": 4, "mlp_ratio": 2.0}
    return build("SwinForImageClassification", "SwinConfig", settings, pixel_values=torch.randn(2, 3, 32, 32))


def t5() -> tuple[torch.nn.Module, Example]:
    """Encoder and decoder that share their embedding."""
    settings = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    settings |= {"use_cache": False, "decoder_start_token_id": 0}
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    return build("T5ForConditionalGeneration", "T5Config", settings, **inputs)


HUGGINGFACE: dict[str, Builder] = {
    "BERT (transformers)": bert,
    "DistilBERT (transformers)": distilbert,
    "ViT (transformers)": vit,
    "GPT-2 (transformers)": gpt2,
    "LLaMA (transformers)": llama,
    "GPT-NeoX (transformers)": neox,
    "BART (transformers)": bart,
    "Swin (transformers)": swin,
    "T5 (transformers)": t5,
}

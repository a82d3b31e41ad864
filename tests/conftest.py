"""Small models and data, made here: no network, no GPU, nothing from ../shared."""
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once

import datasets
import pytest
import torch
import transformers

import common

datasets.disable_progress_bars()

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
             max_position_embeddings=512, vocab_size=259, bos_token_id=257, eos_token_id=258, pad_token_id=256)
ARCHITECTURES = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=259, n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=257, eos_token_id=258),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "phi": lambda: transformers.PhiConfig(**SMALL),  # a head with a bias
}


def random_model(name, seed=0):
    """A small random model of an architecture, its head far enough from 0 for soft-capping and scaling to matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=1.0)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return common.tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """architecture name -> folder with a small random model and the byte-level tokenizer."""
    def make(name):
        folder = tmp_path_factory.getbasetemp() / f"model-{name}"
        if not folder.exists():
            random_model(name).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)
    return make


@pytest.fixture()
def write_jsonl(tmp_path):
    """(name, records) -> path of a .jsonl file."""
    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return str(path)
    return write

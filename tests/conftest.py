"""What the tests share: small models (no network, no GPU), and how a run is read and compared."""

import contextlib
import copy
import json
import os
import tempfile
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same sums everywhere, and one core a worker

import datasets
import numpy as np
import pytest
import torch
import transformers

import common
import data

datasets.disable_progress_bars()
cache = tempfile.TemporaryDirectory(prefix="cleansft-tests-")  # gone at the end
os.environ["CLEANSFT_CACHE"] = cache.name  # of the tests' processes, too

# ------------------------------------------------------------------------ models

SPECIAL_TOKENS = dict(bos_token_id=257, eos_token_id=258)
GPT2 = dict(vocab_size=259, n_positions=512, n_embd=32, n_layer=2, n_head=4)
SMALL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=512,
    vocab_size=259,
    pad_token_id=256,
    **SPECIAL_TOKENS,
)
GEMMA2 = dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0)
ARCHITECTURES = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **SPECIAL_TOKENS),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **GEMMA2),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "phi": lambda: transformers.PhiConfig(**SMALL),  # a head with a bias
}


def random_model(name, seed=0):
    """A small random model of an architecture.

    Its head is far enough from 0 for soft-capping and scaling to matter.
    """
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


# ------------------------------------------------------------------------ examples


def plain(tokenizer):
    """A tokenizer with the plain prompt's template."""
    return data.with_template(tokenizer, "plain")


def plain_text(row):
    """The plain prompt of a row, written out."""
    contents = [message[1] for message in row.messages] + ([row.input] if row.input else [])
    return "".join(content + "\n" for content in contents)


def alpaca_text(row):
    """Stanford Alpaca's prompt for one question, written out."""
    more = ", paired with an input that provides further context" if row.input else ""
    text = f"Below is an instruction that describes a task{more}. Write a response that "
    text += f"appropriately completes the request.\n\n### Instruction:\n{row.messages[0][1]}\n\n"
    return text + (f"### Input:\n{row.input}\n\n" if row.input else "") + "### Response:"


def encode_one(row, tokenizer, template="alpaca", max_length=2048):
    """The example of one row, which must not be skipped."""
    examples, skipped = data.encode([row], data.with_template(tokenizer, template), max_length)
    assert not skipped
    return examples[0]


def leaves(tensors):
    """Copies to differentiate in, apart from those of another call."""
    return [tensor.clone().requires_grad_() for tensor in tensors]


def own_logits(model, example):
    """The model's own logits of one unpadded example -> logits (R, V) in float64, targets (R,)."""
    ids = torch.from_numpy(example.ids)[None]
    logits = model(input_ids=ids).logits[0].double()
    return logits[example.start - 1 : -1], ids[0, example.start :]


def own_nll(model, example):
    """Summed negative log-likelihood of a response by the model's own logits (a float)."""
    with torch.no_grad():
        logits, targets = own_logits(model, example)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()


def adamw(model, lr=1e-3, weight_decay=0.1):
    """The optimizer of all scripts."""
    return common.make_optimizer(model, Namespace(lr=lr, weight_decay=weight_decay))


def plain_step(model, optimizer, examples, lr):
    """One step of plain training: mean loss over the tokens of the batch, norm clipped to 1."""
    batch = common.collate(examples, "cpu")
    hidden, head = common.response_states(model, batch, "fp32")
    loss, _ = common.response_loss(hidden, batch.targets, head)
    (loss / len(batch.targets)).backward()
    common.optimizer_step(model, optimizer, lr, 1.0)


# ------------------------------------------------------------------------ files


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path):
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def to_jsonl(path, rows):
    """Write rows as .jsonl -> the path as a string."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture()
def write_jsonl(tmp_path):
    """(name, rows) -> path of a .jsonl file."""
    return lambda name, rows: to_jsonl(tmp_path / name, rows)


# ------------------------------------------------------------------------ runs


def without_timers(record):
    return {key: value for key, value in record.items() if not key.startswith("time/")}


def records(folder):
    """metrics.jsonl without the timers."""
    return [without_timers(record) for record in read_jsonl(Path(folder) / "metrics.jsonl")]


def values(folder, key):
    """One metric of metrics.jsonl, where it was logged."""
    return [record[key] for record in records(folder) if key in record]


def windowed(folder, key, every):
    """A run that logged every step -> what it would have logged with --log_every `every` as `key`,
    a mean over tokens: at the first step, every so many, at the last, over the last `every`."""
    rows = [record for record in records(folder) if key in record]
    tokens = np.diff([0] + [row["tokens"] for row in rows])
    totals, result = tokens * [row[key] for row in rows], []
    for step in range(1, len(rows) + 1):
        if step % every == 0 or step in (1, len(rows)):
            part = slice(max(0, step - every), step)
            result.append(totals[part].sum() / tokens[part].sum())
    return result


def weights(folder, name="final"):
    """The state dict of a saved model."""
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / name).state_dict()


def same(one, other):
    """Equal bit for bit: tensors, and lists and dicts of them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def state_of(model, optimizer):
    """All that a step changes: weights, optimizer state and rates, gradients, RNG and modes."""
    weights = [p.detach() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    parts = {"weights": weights, "gradients": gradients, "modes": modes}
    parts |= {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    return copy.deepcopy(parts)


class Killed(BaseException):
    """Stands in for a signal: nothing catches it."""


@contextlib.contextmanager
def killed_at(step, key):
    """The run started inside is killed right after it has logged the metric `key` at `step`."""
    log = common.Run.log

    def log_and_die(self, at, values, line=""):
        log(self, at, values, line)
        if at == step and key in values:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "log", log_and_die)
        with pytest.raises(Killed):
            yield


def error_line(capsys, start, *args):
    """`start(*args)` ends with exit status 2 and `error: ...` as the last line on stderr.

    -> that line
    """
    with pytest.raises(SystemExit) as stop:
        start(*args)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert line.startswith("error: ")
    return line

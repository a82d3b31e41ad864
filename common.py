"""What the training loop of any method needs, and no equation of a paper describes.

Sections: flags · batches · chunked response loss · scoring · optimisation · names of metrics, the
end of a run · snapshots

Shapes: B examples, T tokens, R response rows (one per supervised token), V vocabulary, H hidden,
K datasets.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import models
import prepare
import ranks
import runs
from data import Example, Examples, UserError, data_rng
from models import (
    DTYPES,
    Head,
    cast,
    causal_lm,
    describe_model,
    hidden_states,
    load_model,
    load_tokenizer,
    load_trainable,
    output_head,
    pick_device,
    pick_dtype,
    place,
    trainable,
    wide_product,
)
from prepare import Prepared, Recipe
from runs import Run, rng_state, set_rng_state

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def __getattr__(name: str):
    """What stands in data.py, models.py and runs.py is common.X too, as before there were they."""
    return getattr(next((m for m in (runs, models) if hasattr(m, name)), data), name)


# ---- Flags ---------------------------------------------------------------------------------------
class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        unsaid = action.default in (None, False, argparse.SUPPRESS, []) or "default" in action.help
        return action.help if unsaid else f"{action.help} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a bad flag in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n" if ranks.speaks() else None)


MOST, MOST_STEPS = 10**9, 10**7  # of a number in a flag; beyond them a run would hang or overflow


def _number(kind: type, valid: Callable, what: str, most: float, text: str):
    """An argparse type: a number of at most `most` for which valid(number)."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if value > most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large, at most {most:,} is taken")
    if not valid(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}")
    return value


number = functools.partial(functools.partial, _number)
positive_int = number(int, lambda n: n > 0, "a positive whole number", MOST)
non_negative_int = number(int, lambda n: n >= 0, "a whole number of at least 0", MOST)
positive_float = number(float, lambda x: x > 0, "a positive number", MOST)
non_negative_float = number(float, lambda x: x >= 0, "a number of at least 0", MOST)
fraction = number(float, lambda x: 0 <= x <= 1, "between 0 and 1", math.inf)
share_below_1 = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1", math.inf)
step_count = number(int, lambda n: n > 0, "a positive whole number", MOST_STEPS)
few = number(int, lambda n: n > 0, "a positive whole number", 10_000)
few_or_0 = number(int, lambda n: n >= 0, "a whole number of at least 0", 10_000)
any_seed = number(int, lambda n: n >= 0, "a whole number of at least 0", 2**63 - 1)  # torch's most


def add_shared_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of all three scripts: same name, same help. Each script then sets its paper's
    recipe with parser.set_defaults."""
    # fmt: off
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="tiny", metavar="NAME",
        help="hub id, local folder, .gguf file, or tiny (about 1M random parameters, byte-level "
             "tokenizer)")
    add("--data", nargs="+", default=["toy"], metavar="SPEC",
        help="training datasets: [label=]SOURCE[#N]; SOURCE = alias, hub id, .json .jsonl .csv "
             ".parquet .arrow file (.gz .zst too), folder of them, or toy; #N = N random rows; "
             "default toy")
    add("--eval_data", nargs="+", default=[], metavar="SPEC", help="fixed evaluation sets")
    add("--source_column", metavar="NAME",
        help="split every training file into one dataset per value of this column")
    add("--no_cache", action="store_true",
        help="prepare the data anew; else its tokens are kept in $CLEANSFT_CACHE, or "
             "~/.cache/cleansft")
    add("--template", default="auto", metavar="NAME",
        help="alpaca, plain, chat (the tokenizer's own template) or a Jinja file; auto: chat if "
             "the tokenizer has a template, else alpaca")
    add("--max_length", type=positive_int, metavar="TOKENS",
        help="longest example, at most what the model has positions for; without a number 2048")
    add("--show_batch", action="store_true",
        help="print decoded training examples with the supervised tokens marked, then go on")
    add = parser.add_argument_group("optimisation").add_argument
    length = parser.add_mutually_exclusive_group().add_argument
    length("--epochs", type=positive_float, metavar="N", help="passes over the training data")
    length("--max_steps", type=step_count, metavar="N", help="optimizer steps, not --epochs")
    add("--batch_size", type=step_count, help="examples per optimizer step, over all ranks")
    add("--micro_batch_size", type=positive_int, default=8,
        help="examples per forward pass; changes memory and speed, not the result")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--weight_decay", type=non_negative_float,
        help="AdamW's decay, on matrices only (not on biases and norms)")
    add("--schedule", choices=["cosine", "linear", "constant"],
        help="learning rate after warm-up: to 0 along a cosine or a line, or constant")
    add("--warmup_ratio", type=fraction, help="share of the steps with a rising learning rate")
    add("--max_grad_norm", type=positive_float, default=1.0,
        help="clip the global gradient norm to this (not in the papers)")
    add = parser.add_argument_group("precision and memory").add_argument
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="bf16: autocast over fp32 master weights; auto: bf16 on a GPU that has it, else fp32 "
             "(on a CPU with avx512_bf16, bf16 trains 2.3 times as fast)")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, about 1.3x the time")
    add("--lora_rank", type=few_or_0, default=0,
        help="train a LoRA adapter of this rank on all linear layers; 0 = full fine-tuning")
    add("--lora_alpha", type=positive_float, help="LoRA scale, update = alpha/R · BA; default 2R")
    add("--lora_dropout", type=share_below_1, default=0.0, help="dropout on the adapter's input")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=any_seed, default=0,
        help="of data order, sampling and adapter init; data order ignores the model's RNG")
    add("--output_dir", metavar="DIR", help="default runs/<script>-<model>-<seed>-<time>")
    add("--resume", nargs="?", const=True, metavar="DIR",
        help="continue the run in DIR (or in --output_dir) with its flags, bit for bit on CPU; "
             "start one where there is none")
    add("--log_every", type=positive_int, default=10, help="steps between lines of metrics.jsonl")
    add("--eval_every", type=non_negative_int, default=0,
        help="steps between evaluations of --eval_data; 0 = only at the end")
    add("--save_every", type=non_negative_int, default=500,
        help="steps between checkpoints for --resume; 0 = none")
    add("--save_minutes", type=non_negative_float, default=15.0, metavar="N",
        help="a checkpoint at least that often, too; 0 = none")
    add("--keep_checkpoint", action="store_true",
        help="keep checkpoint/, 12 bytes a trained parameter, when the run is finished")
    add("--save_dtype", choices=["auto", *DTYPES], default="auto",
        help="of final/, whose evaluation ends the run; auto: the base's, of a .gguf file fp32")
    add("--track", choices=["tensorboard", "wandb"], help="log to a tracker too")
    # fmt: on
    return parser


def read_json(path: str, flag: str, expected: str) -> dict:
    """The object in a JSON file that a flag names. Raises UserError."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{flag} {path}: expected {expected} ({error})") from None


def read_weights(path: str, flag: str, labels: list[str]) -> np.ndarray:
    """{label: weight} in a JSON file that a flag names -> weights (K,), of sum 1. Raises
    UserError."""
    form = f"{{label: weight}} for {', '.join(labels)}"
    given = read_json(path, flag, form)
    try:
        weights = np.array([float(given.pop(label)) for label in labels])
    except (ValueError, TypeError, KeyError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{flag} {path}: expected {form} ({cause})") from None
    if given:
        problem = f"{sorted(given)[0]!r} is no label of --data; there are {', '.join(labels)}"
        raise UserError(f"{flag} {path}: {problem}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise UserError(f"{flag} {path}: weights must be at least 0, and not all 0")
    return weights / weights.sum()


def setup(args: Namespace):
    """-> the tokenizer of --model, with the chat template that the run trains by. Fills in what the
    flags leave open: dtype, template and the date it writes, max_length, lora_alpha. Raises
    UserError."""
    args.dtype = pick_dtype(args.dtype, pick_device())
    if args.lora_rank and not args.lora_alpha:
        args.lora_alpha = 2.0 * args.lora_rank
    tokenizer, longest = load_tokenizer(args.model)
    tokenizer = set_template(tokenizer, args)
    args.max_length = min(args.max_length or 2048, longest)
    return tokenizer


def recipe(args: Namespace, tokenizer, split: str = "train") -> Recipe:
    """How the flags have data prepared for this tokenizer."""
    column = args.source_column if split == "train" else None
    cache = None if args.no_cache else prepare.cache_folder()
    return Recipe(tokenizer, args.max_length, args.seed, split, column, cache)


def load_datasets(args: Namespace, tokenizer) -> tuple[list[Prepared], list[Prepared]]:
    """-> the datasets of --data and of --eval_data, tokenised. Raises UserError."""
    training = prepare.load(args.data, recipe(args, tokenizer))
    return training, prepare.load(args.eval_data, recipe(args, tokenizer, "eval"))


def load_start(args: Namespace):
    """-> the model that is trained, as it starts. Fills in --save_dtype. Raises UserError."""
    model = load_trainable(args.model, args)[0]
    describe_model(model, args.model, args.dtype)
    if args.save_dtype == "auto":
        names = {dtype: name for name, dtype in DTYPES.items()}
        args.save_dtype = names.get(causal_lm(model).base_dtype, "fp32")
    return model


def read_card(model: str) -> dict:
    """cleansft.json of a folder that one of the scripts saved; {} for any other model."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        card = json.loads(Path(model, "cleansft.json").read_text(encoding="utf-8"))
        if isinstance(card, dict) and {"template", "max_length"} <= set(card):
            return card
    return {}


def choose_template(model: str, tokenizer, args: Namespace) -> tuple[str, int | None]:
    """-> --template and --max_length. Where they are left open, a model of ours goes on as it was
    trained: its tokenizer carries that template, cleansft.json the length. Raises UserError."""
    card, name = read_card(model), data.pick_template(args.template, tokenizer)
    length = args.max_length or card.get("max_length")
    if card:
        trained = f"--template {card['template']} --max_length {card['max_length']}"
        print(f"template {name}, max_length {length}: {model} was trained with {trained}")
        if args.template not in ("auto", "chat", card["template"]):
            print(f"warning: --template {args.template} is not what {model} was trained with")
    return name, length


def set_template(tokenizer, args: Namespace):
    """-> a copy of the tokenizer whose chat template is --template's: the one that the run trains
    by and final/ carries. args.template and args.template_date say which. Raises UserError."""
    args.template, args.max_length = choose_template(args.model, tokenizer, args)
    first = first_start(args).get("template_date")
    args.template_date = data.template_date(args.template, tokenizer, first)
    if tokenizer.chat_template and args.template != "chat":
        print(f"template {args.template}: replaces the model's own chat template, in final/ too")
    if args.template_date:
        print(f"template {args.template}: writes the date {args.template_date}, in final/ too")
    return data.with_template(tokenizer, args.template, args.template_date)


def first_start(args: Namespace) -> dict:
    """The flags of the run that --resume goes on with; {} for a new run."""
    folder = args.output_dir if args.resume is True else args.resume
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["flags"]
    return {}


def batch_arithmetic(args: Namespace) -> str:
    micro = min(args.micro_batch_size, args.batch_size)
    times = math.ceil(args.batch_size / (micro * ranks.world()))
    parts = f"micro-batch {micro} x accumulation {times} x {ranks.world()} rank"
    parts += "s" * (ranks.world() > 1)
    return f"{parts} = {args.batch_size} examples a step"


def whole_bytes(module: torch.nn.Module) -> int:
    """Of its parameters, over all ranks."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def memory_plan(model, args: Namespace, snapshot: bool) -> dict[str, int]:
    """Bytes that this rank holds in training, by part. snapshot: of a method that tries steps. What
    is sharded counts with this rank's part. Activations are an estimate: 34 numbers of the hidden
    size a token and block, 1 where they are recomputed; twice the bytes of Korthikanti et al. 2022,
    table 2, since nothing is fused here."""
    lm = causal_lm(model)
    config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
    size, layers = config.hidden_size, config.num_hidden_layers
    own = sum(ranks.local(p).numel() for p in trainable(model)) * 4
    weights = sum(ranks.local(p).numel() * p.element_size() for p in model.parameters())
    parts = {"weights": weights, "gradients": own, "moments": 2 * own}
    parts["snapshot"] = 3 * own if snapshot else 0
    parts["head gradient"] = head.numel() * 4 if head.requires_grad else 0
    if ranks.active():
        blocks = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or ())]
        inside, everything = [*map(whole_bytes, blocks)], whole_bytes(model)
        # all but the blocks with its gradient, and two blocks on their way
        parts["gathered"] = 2 * (everything - sum(inside)) + 2 * max(inside, default=0)
    longest = args.micro_batch_size * args.max_length
    kept = layers + 34 if args.gradient_checkpointing else 34 * layers
    parts["activations"] = longest * size * kept * (2 if args.dtype == "bf16" else 4)
    parts["logits"] = 3 * 4 * chunk_rows(len(head), model.device) * len(head)
    return parts


def print_memory(model, args: Namespace, snapshot: bool = False) -> None:
    """What memory_plan says, and what is free on a GPU. Raises UserError where gradients and
    moments alone do not fit."""
    parts, free = memory_plan(model, args, snapshot), math.inf
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    line = f"plan  GB a rank: {listed}; together {sum(parts.values()) / 1e9:.2f}"
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        line += f"; free beside the weights {free / 1e9:.2f}"
    print(line)
    rest = sum(parts.values()) - parts["weights"]
    if rest <= free:
        return
    sharded = sum(parts[name] for name in ("weights", "gradients", "moments", "snapshot"))
    room = parts["weights"] + free - (sum(parts.values()) - sharded)
    advice = (
        "--lora_rank 16, --gradient_checkpointing, a smaller --micro_batch_size or --max_length"
    )
    if room > 0:
        advice += f", or torchrun --nproc_per_node {math.ceil(sharded * ranks.world() / room)}"
    if parts["gradients"] + parts["moments"] > free:
        raise UserError(f"--model {args.model}: its training does not fit this GPU; try {advice}")
    print(f"warning: this may not fit the GPU; if it does not: {advice}")


def check_gradients(model, example: Example, dtype: str) -> None:
    """Raise UserError unless a backward pass reaches every trainable parameter (LoRA +
    checkpointing can cut it off). Experts that no token is routed to are excused."""
    batch = collate([example], model.device)
    states, head = response_states(model, batch, dtype)
    response_loss(states, batch.targets, head)[0].backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    missing = [name for name in names if name not in reached and "expert" not in name]
    if missing:
        counts = f"{len(missing)} of {len(names)} trainable tensors get no gradient"
        raise UserError(f"{counts}, the first is {missing[0]}")


# ---- Batches. Their order comes from data.data_rng: a cursor is (seed, stream, position). --------


def batch_sizes(total: int, batch_size: int) -> np.ndarray:
    """(steps,) near-equal sizes of at most batch_size that add up to total: no tiny last batch."""
    return deal(total, -(-total // batch_size))


def deal(total: int, parts: int) -> np.ndarray:
    """(parts,) near-equal sizes that add up to total."""
    return np.diff(np.linspace(0, total, parts + 1).round().astype(int))


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch of batches, drawn uniformly -> arrays of indices below count; each occurs once."""
    order = data_rng(seed, "order", epoch).permutation(count)
    return np.split(order, np.cumsum(batch_sizes(count, batch_size))[:-1])


class MixtureSampler:
    """Batches whose examples come from K datasets with given probabilities.

    For each example a dataset is drawn, then that dataset's next example. Every dataset is passed
    through in a random order without replacement, reshuffled for each pass. The order is a function
    of (seed, dataset, pass) and the draws one of (seed, step), so `cursors` is the whole state.

    sizes (K,) examples of each dataset; an example's index is its place among all, dataset after
    dataset. cursors (K,): examples taken from each dataset so far."""

    def __init__(self, sizes, batch_size: int, seed: int):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch_size, self.seed = batch_size, seed
        self.cursors, self._order = np.zeros(len(self.sizes), dtype=np.int64), {}

    def _take(self, k: int, count: int) -> np.ndarray:
        """The next count examples of dataset k, over as many passes as that needs -> indices."""
        parts = []
        while count:
            number, at = divmod(int(self.cursors[k]), int(self.sizes[k]))
            if self._order.get(k, (None,))[0] != number:
                rng = data_rng(self.seed, "pass", k, number)
                self._order[k] = number, rng.permutation(self.sizes[k])
            part = self._order[k][1][at : at + count]
            parts.append(part)
            self.cursors[k] += len(part)
            count -= len(part)
        return self.starts[k] + np.concatenate(parts)

    def batch(self, probabilities, step: int) -> np.ndarray:
        """The batch of optimizer step `step`, every example's dataset drawn with probabilities (K,)
        -> (batch_size,) indices."""
        rng = data_rng(self.seed, "mixture", step)
        arms = rng.choice(len(self.sizes), self.batch_size, p=probabilities)
        indices = np.empty(self.batch_size, dtype=np.int64)
        for k in np.unique(arms):
            indices[arms == k] = self._take(k, int((arms == k).sum()))
        return indices


def micro_batches(items: Sequence, lengths: Sequence[int], micro_batch_size: int) -> list[list]:
    """Split a batch into micro-batches of similar length, this rank's part of each. All ranks get
    equally many, some perhaps empty, since a sharded model needs every rank in every pass. items,
    lengths: equally long, of the whole batch."""
    # longest first: memory peaks at once
    order = sorted(range(len(items)), key=lambda i: (-lengths[i], i))
    chosen, size = [items[i] for i in order], micro_batch_size * ranks.world()
    groups = [chosen[at : at + size] for at in range(0, len(order), size)]
    return [group[ranks.rank() :: ranks.world()] for group in groups]


# An example shorter than this share of the longest in its slice begins a new slice. More slices
# have less padding and are more forward passes (docs/sftmix.md, Padding).
SLICE_RATIO = 0.8


def length_slices(lengths: Sequence[int]) -> list[list[int]]:
    """Cut the examples of a micro-batch into slices of similar length, longest first -> lists of
    indices. Each slice is padded to its own longest and has a forward pass of its own: padding is
    saved and the loss, which gets all of them, is the same. Under torchrun it is one slice, since
    all ranks make the same passes."""
    if ranks.active():
        return [sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))]
    slices = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not slices or lengths[i] < SLICE_RATIO * lengths[slices[-1][0]]:
            slices.append([])
        slices[-1].append(i)
    return slices


@dataclass
class Batch:
    """A micro-batch. Rows run through example 0's response, then example 1's, ..."""

    slices: list[Tensor]  # token ids, each (b, t) right-padded; together all B examples
    positions: Tensor  # (R,) index into all slices' tokens of the one that predicts each supervised
    targets: Tensor  # (R,) the supervised tokens
    response_lengths: Tensor  # (B,) supervised tokens of each example, on the CPU


def collate(examples: Sequence[Example | None], device: torch.device) -> Batch:
    """Pad examples on the right, slice by slice (length_slices). Supervision goes by position,
    never by token id, so padding with any id is harmless. None, a missing partner in a batch of
    pairs, has length 0 and no line. Without examples it is one token that supervises nothing."""
    present = [example for example in examples if example is not None]
    if not present:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return Batch([ids], nothing, nothing, torch.zeros(len(examples), dtype=torch.int64))
    slices, positions, at = [], [None] * len(present), 0
    for part in length_slices([len(example.ids) for example in present]):
        ids = np.zeros((len(part), len(present[part[0]].ids)), dtype=np.int64)
        for row, b in enumerate(part):
            example = present[b]
            ids[row, : len(example.ids)] = example.ids
            first = at + row * ids.shape[1] + example.start - 1
            positions[b] = np.arange(first, first + example.response_length)
        at += ids.size
        slices.append(ids)
    targets = np.concatenate([example.ids[example.start :] for example in present])
    arrays = *slices, np.concatenate(positions), targets
    *slices, positions, targets = (
        torch.from_numpy(a).to(device, non_blocking=True) for a in arrays
    )
    counts = [0 if example is None else example.response_length for example in examples]
    return Batch(slices, positions, targets, torch.tensor(counts))


def response_states(model, batch: Batch, dtype: str) -> tuple[Tensor, Head]:
    """-> the states that predict a micro-batch's supervised tokens (R, H), and the head that makes
    logits of them. bf16: matrix products under autocast, over fp32 master weights."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        hidden = [hidden_states(model, ids).flatten(0, 1) for ids in batch.slices]  # (b·t, H) each
    return torch.cat(hidden)[batch.positions], output_head(model)


# ---- Chunked response loss: logits of a few hundred rows at a time, gradient in the forward pass -
def cross_entropy_(
    logits: Tensor, targets: Tensor, head: Head, probs: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each row's softmax with its target, in place.

    logits (R, V): raw products hidden @ weight.T + bias, fp32 or float64; overwritten with
    d nll / d logits (the chain through the head's scale and soft-cap included). targets (R,) token
    ids; or (R, k) with probs (R, k), a target that spreads over k tokens.
    -> nll (R,) = logsumexp(s) - Σ_k probs_k s[targets_k]"""
    if probs is None:
        targets = targets[:, None]
        probs = torch.ones_like(targets, dtype=logits.dtype)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits**2
        logits.mul_(head.softcap)
    probs = probs.to(logits.dtype)
    picked = (logits.gather(1, targets) * probs).sum(1)
    peak = logits.amax(1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(1, keepdim=True)
    nll = (peak + total.log()).squeeze(1) - picked
    logits.div_(total).scatter_add_(1, targets, -probs)  # p - y, in the logits' own precision
    if head.softcap:
        logits.mul_(slope)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    return nll


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of logits held at once: 128 to 1,024 are equally fast, fewer are slow, more only cost
    memory."""
    return max(128, min(1024, (2**27 if device.type == "cuda" else 2**25) // vocabulary))


class _ChunkedHead(torch.autograd.Function):
    """Σ over blocks of block_loss(logits of the block); see chunked_head_loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, blocks, block_loss, want_gradient):
        needs = [want_gradient and need for need in ctx.needs_input_grad[:3]]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # On a GPU products take bf16 inputs; a CPU gains nothing by it.
        narrow = hidden.dtype if hidden.is_cuda else wide
        matrix = weight.detach().to(narrow)
        d_hidden, d_weight, d_bias = (
            torch.zeros(tensor.shape, dtype=wide, device=hidden.device) if need else None
            for tensor, need in zip((hidden, weight, bias), needs)
        )
        totals = 0.0
        for rows, *extra in blocks:
            states = hidden[rows].to(narrow)
            logits = wide_product(states, matrix)  # (rows, V)
            if bias is not None:
                logits += bias
            totals = totals + block_loss(logits, rows, *extra)  # logits now hold d loss / d logits
            if d_bias is not None:
                d_bias += logits.sum(0)
            gradient = logits.to(narrow) if needs[0] or needs[1] else None
            if needs[0]:
                d_hidden[rows] = wide_product(gradient, matrix.T)  # (rows, H)
            if needs[1] and narrow == wide:
                d_weight.addmm_(gradient.T, states)
            elif needs[1]:
                d_weight += wide_product(gradient.T, states.T)
            del logits, gradient
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return totals

    @staticmethod
    def backward(ctx, d_totals):
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes):
            if gradient is not None:
                scale = d_totals[0].to(gradient.dtype)  # only the first total is differentiable
                # In place, since (V, H) is large; float64 is for gradient checks, which call
                # backward again.
                in_place = gradient.dtype != torch.float64
                gradient = (gradient.mul_(scale) if in_place else gradient * scale).to(dtype)
            gradients.append(gradient)
        return (*gradients, None, None, None)


def chunked_head_loss(hidden: Tensor, head: Head, blocks: list, block_loss: Callable) -> Tensor:
    """A loss over the logits of many rows without ever holding more than a block of them.

    hidden (R, H); blocks: list of (rows (r,), ...) tuples; block_loss(logits (r, V), rows, ...) ->
    (k,) float64 sums, after overwriting logits with the gradient of the first sum. -> (k,) totals;
    the first is differentiable in hidden, weight and bias. Under no_grad nothing but the values is
    computed. In fp32 and bf16 backward may be called only once."""
    gradient = torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, head.weight, head.bias, blocks, block_loss, gradient)


def row_blocks(count: int, head: Head) -> list[tuple[Tensor]]:
    """All rows in order, in blocks of a good size."""
    rows = torch.arange(count, device=head.weight.device)
    return [(part,) for part in rows.split(chunk_rows(len(head.weight), rows.device))]


def response_loss(
    hidden: Tensor, targets: Tensor, head: Head, correct: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain cross-entropy summed over response tokens. hidden (R, H), targets (R,).

    -> loss (float64 scalar, differentiable), nll (R,) fp32 per token without gradient.
    correct: a (R,) bool tensor to fill with "the argmax is the target"."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll = torch.empty(len(targets), dtype=wide, device=hidden.device)

    def block_loss(logits, rows):
        if correct is not None:
            correct[rows] = logits.argmax(1) == targets[rows]
        nll[rows] = cross_entropy_(logits, targets[rows], head)
        return nll[rows].sum(dtype=torch.float64)[None]

    blocks = row_blocks(len(targets), head)
    return chunked_head_loss(hidden, head, blocks, block_loss)[0], nll


# ---- Scoring and evaluation ----------------------------------------------------------------------
@contextlib.contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """model.eval() inside, without gradients; afterwards the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        ranks.reshard(causal_lm(model))


def score(
    model, examples: Sequence[Example], batch_size: int, dtype: str, progress="", last=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss of every example, in evaluation mode, sums accumulated in float64.

    -> nll (N,) summed over the response, tokens (N,) int64, correct (N,) int64 tokens whose argmax
    is the target. last: an (N, H) array to fill with the states of the final tokens."""
    nll = np.zeros(len(examples))
    tokens, correct = np.zeros((2, len(examples)), np.int64)
    lengths = [len(example.ids) for example in examples]
    bar = tqdm(desc=progress, total=len(nll), disable=not progress, leave=False, unit="ex")
    with evaluation_mode(model), bar:
        for group in micro_batches(range(len(examples)), lengths, batch_size):
            batch = collate([examples[i] for i in group], model.device)
            states, head = response_states(model, batch, dtype)
            hits = torch.zeros(len(batch.targets), dtype=torch.bool, device=model.device)
            _, rows = response_loss(states, batch.targets, head, hits)
            sizes = batch.response_lengths.tolist()
            nll[group] = [part.sum().item() for part in rows.double().cpu().split(sizes)]
            correct[group] = [part.sum().item() for part in hits.cpu().split(sizes)]
            tokens[group] = sizes
            if last is not None:
                last[group] = states[batch.response_lengths.cumsum(0) - 1].float().cpu().numpy()
            bar.update(len(group))
    if last is not None:
        last[:] = ranks.all_sum(last)
    # each example is scored on one rank, and 0 on the others
    return ranks.all_sum(nll), ranks.all_sum(tokens), ranks.all_sum(correct)


def evaluate(model, eval_sets: dict, batch_size: int, dtype: str, progress: bool = True) -> dict:
    """{label: examples} -> {label: {"nll", "ppl", "accuracy", "tokens"}}, weighted by tokens over
    the whole set."""
    result = {}
    for label, examples in eval_sets.items():
        name = f"evaluate {label}" if progress else ""
        nll, tokens, correct = score(model, examples, batch_size, dtype, name)
        count, mean = int(tokens.sum()), float(nll.sum() / tokens.sum())
        row = {"nll": mean, "ppl": float(np.exp(min(mean, 700.0)))}
        result[label] = {**row, "accuracy": float(correct.sum() / count), "tokens": count}
    return result


def evaluate_and_log(model, eval_sets: dict, step: int, args, run: Run) -> dict:
    """evaluate() on --eval_data, logged under eval/. -> its numbers, {} where there is no set."""
    if not eval_sets:
        return {}
    with run.timer("eval"):
        result = evaluator(eval_sets, args)(model)
    run.log(step, flat("eval", result))
    return result


def evaluator(eval_sets: dict, args: Namespace) -> Callable:
    """-> function(model) = evaluate() on these sets as the run does it."""
    how = {"batch_size": 2 * args.micro_batch_size, "dtype": args.dtype}
    return functools.partial(evaluate, eval_sets=eval_sets, **how)


def evaluate_before(model, eval_sets: dict, args: Namespace, run: Run) -> dict:
    """evaluate() before training, logged as step 0 and printed; of a resumed run what it had logged
    then."""
    result = run.logged("eval", 0)
    if not result:
        result = evaluate_and_log(model, eval_sets, 0, args, run)
        print_evaluation(result)
    return result


def print_evaluation(result: dict) -> None:
    """A table of evaluate()'s numbers."""
    width = max(map(len, result), default=0)
    for label, row in result.items():
        numbers = "  ".join(f"{key} {row[key]:.4f}" for key in ("nll", "ppl", "accuracy"))
        print(f"eval  {label:<{width}}  {numbers}  ({row['tokens']:,} tokens)")


def print_changes(before: dict, after: dict) -> None:
    """A table of evaluate()'s loss before and after training, and of the error where right answers
    are chosen. Nothing where there is no set."""
    width = max(map(len, after), default=0)
    if after:
        print("eval  before training -> final/")
    for label, row in after.items():
        pairs = [("loss", before[label]["nll"], row["nll"])]
        if "choice_accuracy" in row:
            pairs.append(("error", before[label]["loss"], row["loss"]))
        cells = [f"{name} {old:.4f} -> {new:.4f} ({new - old:+.4f})" for name, old, new in pairs]
        print(f"eval  {label:<{width}}  {'  '.join(cells)}")


# ---- Optimisation --------------------------------------------------------------------------------
def make_optimizer(model, args: Namespace) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, biases and norms do not."""
    groups = []
    for matrices, decay in ((True, args.weight_decay), (False, 0.0)):
        chosen = [p for p in trainable(model) if (p.dim() >= 2) == matrices]
        groups += [{"params": chosen, "weight_decay": decay}] if chosen else []
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def backward(model, examples: Sequence[Example], args: Namespace) -> np.ndarray:
    """Add the gradient of a batch's loss, the mean over all its response tokens: summed over
    micro-batches and ranks, divided once by the tokens of the whole batch.

    -> mean loss of each example (B,) float64, as the model has it in the mode it is in."""
    lengths = [len(example.ids) for example in examples]
    tokens = np.array([example.response_length for example in examples])
    losses, order, rows = np.zeros(len(examples)), [], []
    for part in micro_batches(range(len(examples)), lengths, args.micro_batch_size):
        batch = collate([examples[i] for i in part], model.device)
        states, head = response_states(model, batch, args.dtype)  # (R, H)
        loss, nll = response_loss(states, batch.targets, head)  # sum, (R,)
        (loss / int(tokens.sum())).backward()
        order += part
        rows.append(nll)
    by_example = torch.cat(rows).double().cpu().split(tokens[order].tolist())
    losses[order] = [nll.mean().item() for nll in by_example]
    return ranks.all_sum(losses)


def learning_rate(step: int, total: int, args: Namespace) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`, by --lr, --schedule and
    --warmup_ratio: rises linearly over warmup_ratio · total steps, then cosine or linear to 0, or
    constant. The first step is not at 0 and the last not yet."""
    warmup = math.ceil(args.warmup_ratio * total)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[args.schedule]


def optimizer_step(model, optimizer, lr: float, max_grad_norm: float) -> float:
    """Set the learning rate, clip the global norm, step, clear. -> gradient norm before clipping.
    Raises UserError where it is not finite; nothing is updated then."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), max_grad_norm).item()
    if not math.isfinite(norm):
        advice = "training diverged; lower --lr (the last checkpoint is kept)"
        raise UserError(f"the gradient norm is {norm}: {advice}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def every(count: int, steps: int) -> range:
    """The steps after which that is done which is done every `count` steps (0: never), but for the
    last of all `steps`, after which everything is done anyway."""
    return range(count, steps, count) if count else range(0)


def total_steps(args: Namespace, steps_per_epoch: int) -> int:
    """--max_steps, or --epochs turned into optimizer steps. Raises UserError."""
    steps = args.max_steps or max(1, math.ceil(args.epochs * steps_per_epoch - 1e-9))
    if steps > MOST_STEPS:
        problem = f"are {steps:,} steps, at most {MOST_STEPS:,} are taken"
        raise UserError(f"--epochs {args.epochs:g}: {problem}; give fewer, or --max_steps")
    return steps


# ---- Names of metrics, the end of a run ----------------------------------------------------------
def flat(prefix: str, rows: dict[str, dict]) -> dict:
    """{label: {key: value}} -> {"prefix/label/key": value}, as metrics.jsonl has it."""
    return {f"{prefix}/{a}/{b}": value for a, row in rows.items() for b, value in row.items()}


def by_label(prefix: str, labels: Iterable[str], numbers: Iterable) -> dict[str, float]:
    """{"prefix/label": number}, as metrics.jsonl has it."""
    return {f"{prefix}/{label}": float(number) for label, number in zip(labels, numbers)}


def shares(seen: np.ndarray, sizes: np.ndarray, labels: list[str]) -> dict[str, float]:
    """What was drawn so far, as metrics.jsonl has it. seen (2, K): examples and response tokens of
    each dataset; sizes (K,)."""
    total = seen.sum(1, keepdims=True)
    result = {"examples": int(total[0, 0]), "tokens": int(total[1, 0])}
    result |= by_label("share", labels, (seen / total)[0])
    result |= by_label("token_share", labels, (seen / total)[1])
    return result | by_label("passes", labels, seen[0] / sizes)


ROUNDING = 0.002  # nats by which rounding may move an evaluation without a word


def save_final(model, tokenizer, measure: Callable, step: int, run: Run, part: str = "eval"):
    """Save final/ as --save_dtype says; then measure, log and return what was saved, as whoever
    loads it will find it: rounded, an adapter merged into its base. model is used up.
    measure(model) -> {label: {"nll": .., ..}}; part: of the timers and of the metrics' names."""
    dtype = DTYPES[run.args.save_dtype]
    rounded = any(parameter.dtype != dtype for parameter in trainable(model))
    with run.timer(part):
        trained = measure(model) if rounded else {}
    run.save_model(model, tokenizer, dtype=dtype)
    with run.timer(part):
        if model is not causal_lm(model):
            model.to("cpu")  # room for the other
            model = place(load_model(str(run.folder / "final"), torch.device("cpu"))[0])
        elif not ranks.active():
            cast(trainable(model), torch.float32)
        result = measure(model)
    for label, row in trained.items():
        moved = result[label]["nll"] - row["nll"]
        if not abs(moved) <= ROUNDING:
            what = f"saving final/ as {run.args.save_dtype} moved the loss on {label!r}"
            print(f"warning: {what} by {moved:+.4f} nats; --save_dtype fp32 keeps every bit")
    if result:
        run.log(step, flat(part, result))
    return result


def print_figures(paths: list[Path]) -> None:
    """The names of the figures that were drawn, if any."""
    if paths:
        print(f"figures {', '.join(path.name for path in paths)}")


def end_run(run: Run, before: dict, after: dict, summary: dict, draw: Callable) -> None:
    """What every run ends with: figures, evaluation sets before and after, summary.json.
    draw(folder) -> paths of the figures."""
    with run.timer("figures"):
        figures = [] if ranks.rank() else draw(run.folder)
    print_changes(before, after)
    print_figures(figures)
    run.finish({**summary, "eval": after, "eval_before": before})


def data_config(training: list, evaluation: list, examples: Examples) -> dict:
    """What config.json says of the data; a resumed run must find the same. training, evaluation:
    data.Dataset or Prepared; examples: all that are trained on. The text's fingerprint serves any
    tokenizer."""
    config = {"data_fingerprint": data.fingerprint(training)}
    config["eval_fingerprint"] = data.fingerprint(evaluation)
    config["ids_fingerprint"] = examples.fingerprint()
    config["datasets"] = {dataset.label: dataset.size for dataset in training}
    for name, sets in (("data", training), ("eval_data", evaluation)):
        counted = {each.label: each.left_out for each in sets if each.left_out}
        config.setdefault("left_out", {})[name] = counted
        unused = {each.label: each.unused for each in sets if each.unused}
        config.setdefault("columns_not_used", {})[name] = unused
    return config


# ---- Snapshots: try a step and put everything back, bit for bit ----------------------------------
class Snapshot:
    """A copy of trainable parameters, optimizer state, RNGs and train/eval mode, to be restored any
    number of times.

    On a GPU the copy stays there if it fits into half of what is free, else it goes to the CPU's
    memory (self.device says). Data cursors need no copy: see data.data_rng."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.parameters = model, optimizer, trainable(model)
        self.device = self.parameters[0].device
        if self.device.type == "cuda":
            # weights and Adam's two moments
            needed = sum(3 * ranks.local(p).numel() * p.element_size() for p in self.parameters)
            if needed > torch.cuda.mem_get_info()[0] / 2:
                self.device = torch.device("cpu")
        self.weights = [self._copy(p.detach()) for p in self.parameters]
        self.moments = []
        for p in self.parameters:
            state = optimizer.state.get(p)
            self.moments.append(state and {key: self._copy(value) for key, value in state.items()})
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.rng, self.modes = rng_state(), [(m, m.training) for m in model.modules()]

    def _copy(self, tensor: Tensor) -> Tensor:
        where = self.device if tensor.dim() else tensor.device
        return tensor.detach().to(where, copy=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was; gradients are cleared."""
        for parameter, weight, moments in zip(self.parameters, self.weights, self.moments):
            parameter.copy_(weight)
            parameter.grad = None
            if not moments:
                self.optimizer.state.pop(parameter, None)
                continue
            for key, value in moments.items():
                self.optimizer.state[parameter][key].copy_(value)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate
        for module, training in self.modes:
            module.training = training
        set_rng_state(self.rng)

"""Speed and memory of an optimizer step: SFTMix against NTP, and both against TRL's SFTTrainer.

    python benchmarks/speed.py --model a               # GPT-2 4 x 256, vocabulary 8,192
    python benchmarks/speed.py --model b               # Llama-style 4 x 256, vocabulary 128,256
    python benchmarks/speed.py --model b --trl         # also TRL (pip install trl)
    python benchmarks/speed.py --throughput --model 1b      # a GPU: Llama-3.2-1B's shape, full
    python benchmarks/speed.py --throughput --model 8b-lora # a GPU: Llama-3.1-8B's, LoRA rank 16
    torchrun --nproc_per_node 8 benchmarks/speed.py --throughput --model 8b # N GPUs: 8B, full
    python benchmarks/speed.py --epoch tiny FILE[#N]   # sftmix.py, an epoch of SFTMix against NTP
    python benchmarks/speed.py --epoch FOLDER|FILE.gguf FILE[#N]   # a random Llama-style 4 x 256
                                                       # with the tokenizer found there

All weights are random. Variants take turns step by step in one process on the same batches, so that
a noisy machine is as noisy for all; the number is the median of the ratios within a turn, with the
quartiles. Peak memory is that of a process of its own for each variant (--only), since one process
would report the largest for all.

--throughput trains as dynamix_sft.py and dynamics.py do, on any number of ranks, and gives tokens a
second without padding, MFU and peak memory; with --trl TRL's trainer with packing too, each in a
process of its own.

--epoch runs the script itself, SFTMix on random halves and NTP in turn on the same rows, and takes
the seconds of its training.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shared
import torch
import transformers

import common
import models
import ranks
import runs
import sftmix
from data import Example, UserError

LR = 1e-5
MAX_GRAD_NORM = 1.0
WARM_UP = 2  # turns that do not count
MEMORY_STEPS = 6
# FLOP/s in dense bf16 by the data sheets; the PCIe and NVL cards have other names, and less.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


class Shape(NamedTuple):
    """A model, and what the flags of the same name are where they are not given."""

    config: transformers.PretrainedConfig
    prompt: int  # mean tokens
    response: int  # mean tokens
    max_length: int  # tokens of an example, at most
    batch_size: int = 8
    micro_batch_size: int = 8
    lora_rank: int = 0
    gradient_checkpointing: bool = False


SHAPES = {
    "a": Shape(
        transformers.GPT2Config(
            vocab_size=8192,
            n_embd=256,
            n_layer=4,
            n_head=4,
            n_positions=1024,
            bos_token_id=0,
            eos_token_id=0,
        ),
        prompt=68,
        response=101,
        max_length=512,
    ),
    "b": Shape(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=688,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        prompt=68,
        response=101,
        max_length=512,
    ),
    "1b": Shape(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        ),
        prompt=300,
        response=600,
        max_length=1024,
        batch_size=32,
    ),
    "8b": Shape(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        ),
        prompt=300,
        response=600,
        max_length=8192,
        batch_size=16,
        micro_batch_size=1,
        gradient_checkpointing=True,
    ),
}
SHAPES["8b-lora"] = SHAPES["8b"]._replace(
    max_length=4096, batch_size=32, lora_rank=16, gradient_checkpointing=False
)


# ---- data


def random_length(rng: np.random.Generator, mean: int, longest: int) -> int:
    """Tokens of a prompt or a response: log-normal, as in instruction data."""
    drawn = rng.lognormal(np.log(mean) - 0.32, 0.8)
    return int(np.clip(drawn, 4, longest // 2))


def random_examples(count: int, args: argparse.Namespace) -> list[Example]:
    """With --full_length all are of the greatest length, and all but the first token supervised."""
    rng, shape, longest = np.random.default_rng(0), SHAPES[args.model], args.max_length
    examples = []
    for row in range(count):
        start, length = 1, longest - 1
        if not args.full_length:
            start = random_length(rng, shape.prompt, longest)
            length = random_length(rng, shape.response, longest)
        ids = rng.integers(3, shape.config.vocab_size, start + length)
        examples.append(Example(ids, start, row))
    return examples


class Workload:
    """The batches that all variants train on: 32 of random examples, in pairs."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = common.pick_device()
        self.examples = random_examples(32 * args.batch_size, args)
        self.lengths = np.array([len(example.ids) for example in self.examples])
        one, other = np.split(np.arange(len(self.lengths)), 2)
        halves = sftmix.Halves(one, other, one[:0])
        self.batches = sftmix.paired_batches(halves, args.batch_size, 0, 0)

    def pairs(self, k: int) -> np.ndarray:
        """(2, n) examples of batch k, a pair a column; they begin again after the last."""
        return self.batches[k % len(self.batches)]

    def mean_tokens(self) -> float:
        """Tokens of a batch, prompts and responses."""
        return self.lengths.sum() / len(self.batches)


# ---- an optimizer step of each variant, called with the number of a batch


class Step:
    """NTP's or SFTMix's step."""

    def __init__(self, variant: str, work: Workload, model: torch.nn.Module):
        self.work = work
        self.model = model
        self.optimizer = common.make_optimizer(model, work.args)
        self.mu = 0.2 if variant == "sftmix" else 0.0

    def __call__(self, k: int) -> None:
        size = self.work.args.micro_batch_size // 2  # in pairs
        chosen = self.work.pairs(k)  # (2, n)
        tokens = sum(self.work.examples[i].response_length for i in chosen.flat)
        lam = np.random.default_rng(k).beta(0.5, 0.5, chosen.shape[1])
        widths = self.work.lengths[chosen].max(0)
        for part in common.micro_batches(range(len(widths)), widths, size):
            loss = self.loss(chosen[:, part], lam[part])
            (loss / tokens).backward()
        common.optimizer_step(self.model, self.optimizer, LR, MAX_GRAD_NORM)

    def loss(self, chosen: np.ndarray, lam: np.ndarray) -> torch.Tensor:
        """Sum over the tokens of a micro-batch of pairs, chosen (2, n)."""
        members = [self.work.examples[i] for i in chosen.flat]  # all first members, then all second
        micro = common.collate(members, self.model.device)
        states, head = common.response_states(self.model, micro, self.work.args.dtype)
        y, n = micro.targets, micro.response_lengths
        return sftmix.sftmix_loss(states, y, n, lam, head.weight, self.mu)[0]


class PlainStep:
    """A step as dynamix_sft.py and dynamics.py take it."""

    def __init__(self, variant: str, work: Workload, model: torch.nn.Module):
        self.work, self.model = work, model
        self.optimizer = common.make_optimizer(model, work.args)

    def __call__(self, k: int) -> None:
        common.backward(self.model, self.batch(k), self.work.args)
        common.optimizer_step(self.model, self.optimizer, LR, MAX_GRAD_NORM)

    def batch(self, k: int) -> list[Example]:
        return [self.work.examples[i] for i in self.work.pairs(k).T.flat]

    def tokens(self, k: int) -> int:
        """Tokens of batch k, prompts and responses, over all ranks."""
        return sum(len(example.ids) for example in self.batch(k))


class TRLStep:
    """TRL's SFTTrainer on the same examples, loss on the response alone.

    Variant `trl` has its defaults, `trl-tuned` no checkpointing, `trl-packed` packing (as many
    tokens a batch) and checkpointing as asked for. The loss is TRL's chunked one, the default from
    1.16 on. A step is the trainer's own collator, loss and training_step, without its logging and
    callbacks.
    """

    def __init__(self, variant: str, work: Workload, model: torch.nn.Module):
        import datasets
        import trl

        args = work.args
        self.work = work
        self.model = model
        examples = []
        for k in range(len(work.batches)):
            examples += [self.example(work.examples[i]) for i in work.pairs(k).T.flat]
        config = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.micro_batch_size,
            learning_rate=LR,
            completion_only_loss=True,
            bf16=args.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **self.options(variant, args),
        )
        self.trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(examples),
            processing_class=common.tiny_tokenizer(),
        )
        self.trainer.create_optimizer()
        model.train()
        packed = len(self.trainer.train_dataset) / len(examples)
        self.batch_size = max(1, round(packed * args.batch_size))  # in rows, packed or not
        self.micro_batch_size = max(1, round(packed * args.micro_batch_size))

    @staticmethod
    def options(variant: str, args: argparse.Namespace) -> dict:
        if variant == "trl-packed":
            own = {"gradient_checkpointing": args.gradient_checkpointing}
            return {**own, "packing": True, "max_length": args.max_length}
        own = {} if variant == "trl" else {"gradient_checkpointing": False}
        return {**own, "max_length": None}

    @staticmethod
    def example(example: Example) -> dict:
        mask = [0] * example.start + [1] * example.response_length
        return {"input_ids": example.ids.tolist(), "completion_mask": mask}

    def batch(self, k: int) -> list[dict]:
        rows, size = self.trainer.train_dataset, self.batch_size
        return [rows[i % len(rows)] for i in range(k * size, (k + 1) * size)]

    def tokens(self, k: int) -> int:
        return sum(len(row["input_ids"]) for row in self.batch(k))

    def __call__(self, k: int) -> None:
        trainer, rows, size = self.trainer, self.batch(k), self.micro_batch_size
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        inputs = [trainer.data_collator(part) for part in parts]
        count = sum((micro["labels"] != -100).sum() for micro in inputs)
        for micro in inputs:
            trainer.training_step(self.model, micro, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def random_model(variant: str, args: argparse.Namespace) -> torch.nn.Module:
    """A model of random weights as models.load_trainable makes one of a checkpoint: under torchrun
    rank 0 draws the weights, the others hold nothing until each gets its part."""
    torch.manual_seed(0)
    options = {"dtype": torch.float32}
    if args.lora_rank and args.dtype == "bf16":
        options["dtype"] = torch.bfloat16
    if variant == "trl-packed" and transformers.utils.is_flash_attn_2_available():
        options["attn_implementation"] = "flash_attention_2"  # which packing is made for
    with torch.device("meta" if ranks.rank() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[args.model].config, **options)
    if ranks.rank():
        model.to_empty(device="cpu").tie_weights()
    with models.quiet_transformers():
        if args.lora_rank:
            model = models.add_adapter(model, args)
        if args.gradient_checkpointing:
            models.enable_checkpointing(model)
    model.config.use_cache = False
    return models.place(model).train()


STEPS = {"ntp": Step, "sftmix": Step, "plain": PlainStep}


def make_step(variant: str, work: Workload) -> Callable[[int], None]:
    """The variant's step, with a model of its own."""
    model = random_model(variant, work.args)
    return STEPS.get(variant, TRLStep)(variant, work, model)


# ---- measuring


def time_turns(variants: list[str], work: Workload) -> dict[str, np.ndarray]:
    """-> variant -> seconds of its steps (turns,)."""
    steps = {variant: make_step(variant, work) for variant in variants}
    seconds = {variant: [] for variant in variants}
    for k in range(work.args.steps + WARM_UP):
        for variant in variants if k % 2 else variants[::-1]:
            seconds[variant].append(shared.timed(work.device, steps[variant], k))
    return {variant: np.array(values[WARM_UP:]) for variant, values in seconds.items()}


def memory_gib(device: torch.device) -> float:
    """The largest so far, of the GPU or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()  # not ru_maxrss: a child inherits its parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def peak_memory(variant: str, work: Workload) -> dict[str, float]:
    """GiB of this process after some steps, and before the model was made."""
    before = memory_gib(work.device)
    step = make_step(variant, work)
    for k in range(MEMORY_STEPS):
        step(k)
    return {"peak": memory_gib(work.device), "before": before}


def only(variant: str, args: argparse.Namespace) -> list[str]:
    """The command of a process for this variant alone."""
    command = [sys.executable, __file__, "--only", variant]
    for flag in ("model", "steps", "dtype", *DEFAULTS):
        value = getattr(args, flag)
        if flag == "gradient_checkpointing":
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command + [f"--{flag}" for flag in ("full_length", "throughput") if getattr(args, flag)]


def peak_memory_apart(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """peak_memory in a process of its own; a peak of nan where that fails."""
    done = subprocess.run(only(variant, args), capture_output=True, text=True)
    if done.returncode:
        return {"peak": float("nan"), "before": 0}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- tokens a second


def flop_a_token(model: torch.nn.Module, examples: list[Example]) -> float:
    """FLOP that training takes for a token of the examples, prompts and responses, on average.

    As in PaLM's appendix B: 6 for each weight it is multiplied with, 2 forward and 4 backward, and
    12 · layers · hidden size · length for attention. A frozen weight is 4, since nobody asks for
    its gradient. The head counts for response tokens alone; table look-ups, norms and what is
    computed twice (checkpointing) do not.
    """
    lm = models.causal_lm(model)
    config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
    modules = [module for module in lm.modules() if isinstance(module, torch.nn.Embedding)]
    apart = {id(head), *(id(module.weight) for module in modules)}
    weights = [p for p in lm.parameters() if p.dim() == 2 and id(p) not in apart]
    body = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
    lengths = np.array([len(example.ids) for example in examples], np.float64)
    responses = sum(example.response_length for example in examples)
    total = body * lengths.sum() + (6 if head.requires_grad else 4) * head.numel() * responses
    total += 12 * config.num_hidden_layers * config.hidden_size * (lengths**2).sum()
    return total / lengths.sum()


def throughput(variant: str, work: Workload) -> None:
    """Print tokens a second and a rank, MFU where PEAK knows the card, peak memory of each rank."""
    args = work.args
    step = make_step(variant, work)
    if variant == "plain":
        models.describe_model(step.model, args.model, args.dtype)
        common.print_memory(step.model, args)
    flop = flop_a_token(step.model, work.examples)
    seconds = tokens = 0
    for k in range(args.steps + WARM_UP):
        spent = shared.timed(work.device, step, k)
        if k >= WARM_UP:
            seconds, tokens = seconds + spent, tokens + step.tokens(k)
    rate = tokens / seconds / ranks.world()
    speed = f"{rate:,.0f} tokens/s a rank, {flop / 1e9:.4g} GFLOP a token"
    speed += f", {rate * flop / 1e12:.4g} TFLOP/s"
    peak = PEAK.get(shared.device_name(work.device)) if args.dtype == "bf16" else None
    if peak:
        speed += f", MFU {rate * flop / peak:.3f}"
    memory = ", ".join(f"{size:.2f}" for size in ranks.gather([memory_gib(work.device)]))
    print(f"{variant:>10}: {speed}; peak memory {memory} GiB", flush=True)


def time_throughput(args: argparse.Namespace) -> None:
    """The plain step; with --trl also TRL's, each in a process of its own. Raises UserError."""
    if not args.trl:
        throughput(args.only or "plain", Workload(args))
        return
    if ranks.active():
        raise UserError("--trl: TRL is timed in one process; leave torchrun away")
    for variant in ("plain", "trl-packed"):
        if subprocess.run(only(variant, args)).returncode:
            raise UserError(f"{variant} failed; its own line or traceback is above")


# ---- whole epochs of the script


def epoch_model(name: str, folder: Path) -> str:
    """--model of the runs: tiny, or a folder with a random Llama of shape b and this tokenizer."""
    if name == "tiny":
        return name
    tokenizer = shared.load_tokenizer(name)
    config = copy.deepcopy(SHAPES["b"].config)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 2048
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def epoch_seconds(variant: str, model: str, args: argparse.Namespace) -> float:
    """Seconds that sftmix.py trains for one epoch."""
    own = ["--partition", "random"] if variant == "sftmix" else ["--mu", "0"]
    flags = ["--model", model, "--data", args.epoch[1], "--epochs", "1", "--template", "alpaca"]
    flags += ["--lr", str(LR), "--dtype", args.dtype, "--save_every", "0", *own]
    with tempfile.TemporaryDirectory() as folder:
        run = shared.run(sftmix, Path(folder) / "run", *flags)
        return shared.summary(run)["time"]["train"]


def time_epochs(args: argparse.Namespace) -> None:
    """A line a turn: both epochs, and their ratio."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model = epoch_model(args.epoch[0], Path(folder))
        for turn in range(args.turns):
            order = ["ntp", "sftmix"] if turn % 2 else ["sftmix", "ntp"]
            spent = {variant: epoch_seconds(variant, model, args) for variant in order}
            ratios.append(spent["sftmix"] / spent["ntp"])
            seconds = f"NTP {spent['ntp']:.1f} s, SFTMix {spent['sftmix']:.1f} s"
            print(f"turn {turn}: {seconds}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {np.median(ratios):.3f}, {shared.device_name(common.pick_device())}")


def report(variant: str, seconds: dict[str, np.ndarray], work: Workload) -> None:
    memory = peak_memory_apart(variant, work.args)
    low, middle, high = np.quantile(seconds[variant] / seconds["ntp"], [0.25, 0.5, 0.75])
    speed = ""
    if work.device.type == "cuda":
        speed = f", {work.mean_tokens() / np.median(seconds[variant]):,.0f} tokens/s"
    print(
        f"{variant:>9}: {middle:.3f} x an NTP step (quartiles {low:.3f} to {high:.3f}){speed}; "
        f"peak memory {memory['peak']:.2f} GiB, "
        f"{memory['peak'] - memory['before']:.2f} above the start"
    )


# What the shape says where the flag is not given.
DEFAULTS = ("batch_size", "micro_batch_size", "max_length", "lora_rank", "gradient_checkpointing")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="a")
    add("--steps", type=int, default=20, help="turns that count, after 2 to warm up")
    add("--batch_size", type=int, help="examples a step, over all ranks")
    add("--micro_batch_size", type=int, help="examples a forward pass")
    add("--max_length", type=int, help="tokens of an example, at most")
    add("--full_length", action="store_true", help="all examples of max_length, as published rates")
    add("--lora_rank", type=int)
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")
    add("--trl", action="store_true", help="also time TRL's SFTTrainer")
    add("--throughput", action="store_true", help="tokens a second, MFU and peak memory")
    add("--epoch", nargs=2, metavar=("MODEL", "FILE"), help="time whole epochs instead of steps")
    add("--turns", type=int, default=3, help="of --epoch")
    add("--only", help="this variant alone (used by the script itself)")
    # the rest of what the scripts' functions ask for
    parser.set_defaults(seed=0, lora_alpha=None, lora_dropout=0.0, lr=LR, weight_decay=0.1)
    args = parser.parse_args(argv)
    args.dtype = common.pick_dtype(args.dtype, common.pick_device())
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(SHAPES[args.model], name))
    return args


@runs.command_line
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if ranks.active() and not args.throughput:
        raise UserError("under torchrun give --throughput")
    if args.trl and not importlib.util.find_spec("trl"):
        raise UserError("--trl needs: pip install trl")
    if args.epoch:
        time_epochs(args)
        return
    sizes = f"batch {args.batch_size}, micro-batch {args.micro_batch_size}"
    lengths = f"length {'' if args.full_length else 'up to '}{args.max_length}"
    if not args.only:
        device = shared.device_name(common.pick_device())
        where = f"{args.dtype}, {device}, {ranks.world()} rank(s)"
        print(f"model {args.model}, {sizes}, {lengths}, {where}", flush=True)
    if args.throughput:
        time_throughput(args)
        return
    work = Workload(args)
    if args.only:
        print(json.dumps(peak_memory(args.only, work)))
        return
    variants = ["ntp", "sftmix"]
    if args.trl:
        variants += ["trl", "trl-tuned"]
    seconds = time_turns(variants, work)
    for variant in variants:
        report(variant, seconds, work)


if __name__ == "__main__":
    main()

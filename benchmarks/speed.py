"""Speed and memory of an optimizer step: SFTMix against NTP, and both against TRL's SFTTrainer.

    python benchmarks/speed.py --model a               # GPT-2 4 x 256, vocabulary 8,192
    python benchmarks/speed.py --model b               # Llama-style 4 x 256, vocabulary 128,256
    python benchmarks/speed.py --model 1b --dtype bf16 # a GPU: Llama-3.2-1B's shape, length 1,024
    python benchmarks/speed.py --model b --trl         # also TRL (pip install trl)
    python benchmarks/speed.py --epoch tiny FILE[#N]   # sftmix.py, an epoch of SFTMix against NTP
    python benchmarks/speed.py --epoch FOLDER|FILE.gguf FILE[#N]   # a random Llama-style 4 x 256
                                                       # with the tokenizer found there

All weights are random. Variants take turns step by step in one process on the same batches, so that
a noisy machine is as noisy for all; the number is the median of the ratios within a turn, with the
quartiles. Peak memory is that of a process of its own for each variant (--only), since one process
would report the largest for all. --epoch runs the script itself, SFTMix on random halves and NTP
in turn on the same rows, and takes the seconds of its training.
"""

from __future__ import annotations

import argparse
import copy
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
import sftmix
from data import Example

LR = 1e-5
MAX_GRAD_NORM = 1.0
WARM_UP = 2  # turns that do not count
MEMORY_STEPS = 6


class Shape(NamedTuple):
    config: transformers.PretrainedConfig
    prompt: int  # mean tokens
    response: int  # mean tokens
    longest: int  # tokens of an example, at most


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
        longest=512,
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
        longest=512,
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
        longest=1024,
    ),
}


# ---- data


def random_length(rng: np.random.Generator, mean: int, longest: int) -> int:
    """Tokens of a prompt or a response: log-normal, as in instruction data."""
    drawn = rng.lognormal(np.log(mean) - 0.32, 0.8)
    return int(np.clip(drawn, 4, longest // 2))


def random_examples(count: int, shape: Shape, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        start = random_length(rng, shape.prompt, shape.longest)
        length = random_length(rng, shape.response, shape.longest)
        ids = rng.integers(3, shape.config.vocab_size, start + length)
        examples.append(Example(ids, start, row))
    return examples


class Workload:
    """The batches that all variants train on: 32 of random examples, in pairs."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = common.pick_device()
        self.config = SHAPES[args.model].config
        self.examples = random_examples(32 * args.batch_size, SHAPES[args.model])
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
        recipe = argparse.Namespace(lr=LR, weight_decay=0.1)
        self.optimizer = common.make_optimizer(model, recipe)
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


class TRLStep:
    """TRL's SFTTrainer on the same examples, loss on the response alone.

    Variant `trl` has its defaults, `trl-tuned` no checkpointing. A step is the trainer's own
    collator, loss and training_step, without its logging and callbacks.
    """

    def __init__(self, variant: str, work: Workload, model: torch.nn.Module):
        import datasets
        import trl

        args = work.args
        self.work = work
        self.model = model
        rows = []
        for k in range(len(work.batches)):
            rows += [self.row(work.examples[i]) for i in work.pairs(k).T.flat]
        options = {} if variant == "trl" else {"gradient_checkpointing": False}
        config = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.micro_batch_size,
            gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
            learning_rate=LR,
            completion_only_loss=True,
            max_length=None,
            bf16=args.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **options,
        )
        self.trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=common.tiny_tokenizer(),
        )
        self.trainer.create_optimizer()
        model.train()

    @staticmethod
    def row(example: Example) -> dict:
        mask = [0] * example.start + [1] * example.response_length
        return {"input_ids": example.ids.tolist(), "completion_mask": mask}

    def __call__(self, k: int) -> None:
        trainer, size = self.trainer, self.work.args.micro_batch_size
        start = (k % len(self.work.batches)) * self.work.args.batch_size
        inputs = []
        for at in range(start, start + self.work.args.batch_size, size):
            rows = [trainer.train_dataset[i] for i in range(at, at + size)]
            inputs.append(trainer.data_collator(rows))
        count = sum((micro["labels"] != -100).sum() for micro in inputs)
        for micro in inputs:
            trainer.training_step(self.model, micro, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def make_step(variant: str, work: Workload) -> Callable[[int], None]:
    """The variant's step, with a model of its own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(work.config)
    model.to(work.device).train()
    model.config.use_cache = False
    kind = TRLStep if variant.startswith("trl") else Step
    return kind(variant, work, model)


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


def peak_memory_apart(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """peak_memory in a process of its own; a peak of nan where that fails."""
    command = [sys.executable, __file__, "--only", variant]
    for flag in ("model", "batch_size", "micro_batch_size", "dtype"):
        command += [f"--{flag}", str(getattr(args, flag))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"peak": float("nan"), "before": 0}
    return json.loads(done.stdout.strip().splitlines()[-1])


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="a")
    add("--steps", type=int, default=20, help="turns that count, after 2 to warm up")
    add("--batch_size", type=int, default=8)
    add("--micro_batch_size", type=int, default=8)
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--trl", action="store_true", help="also time TRL's SFTTrainer")
    add("--epoch", nargs=2, metavar=("MODEL", "FILE"), help="time whole epochs instead of steps")
    add("--turns", type=int, default=3, help="of --epoch")
    add("--only", help="print this variant's peak memory alone (used by the script itself)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.epoch:
        time_epochs(args)
        return
    work = Workload(args)
    if args.only:
        print(json.dumps(peak_memory(args.only, work)))
        return
    sizes = f"batch {args.batch_size}, micro-batch {args.micro_batch_size}"
    print(f"model {args.model}, {sizes}, {args.dtype}, {shared.device_name(work.device)}")
    variants = ["ntp", "sftmix"]
    if args.trl:
        variants += ["trl", "trl-tuned"]
    seconds = time_turns(variants, work)
    for variant in variants:
        report(variant, seconds, work)


if __name__ == "__main__":
    main()

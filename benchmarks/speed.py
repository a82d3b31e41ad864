"""Speed and memory of an optimizer step: SFTMix against NTP, and both against TRL's SFTTrainer on the same rows.

    python benchmarks/speed.py --model a                     # GPT-2 4 x 256, vocabulary 8,192
    python benchmarks/speed.py --model b                     # Llama-style 4 x 256, vocabulary 128,256, tied head
    python benchmarks/speed.py --model 1b --dtype bf16       # a GPU: Llama-3.2-1B's shape, random weights, length 1,024
    python benchmarks/speed.py --model b --trl               # also TRL (pip install trl)

Variants take turns step by step in one process on the same batches, so that a noisy machine is as noisy for all; the
number is the median of the ratios within a turn, with the quartiles. Peak memory is that of a process of its own for each
variant (--only), since one process would report the largest for all.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers

import common
import sftmix

SHAPES = {  # config, mean prompt and response tokens, longest example
    "a": (lambda: transformers.GPT2Config(vocab_size=8192, n_embd=256, n_layer=4, n_head=4, n_positions=1024, bos_token_id=0, eos_token_id=0), 68, 101, 512),
    "b": (lambda: transformers.LlamaConfig(vocab_size=128256, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                                           intermediate_size=688, max_position_embeddings=1024, tie_word_embeddings=True), 68, 101, 512),
    "1b": (lambda: transformers.LlamaConfig(vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                                            num_key_value_heads=8, intermediate_size=8192, max_position_embeddings=2048,
                                            tie_word_embeddings=True), 300, 600, 1024),
}


def random_examples(count, vocabulary, prompt, response, longest, seed=0):
    """Examples of random ids whose lengths spread like instruction data (log-normal)."""
    rng = np.random.default_rng(seed)
    draw = lambda mean: int(np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8), 4, longest // 2))  # noqa: E731
    examples = []
    for row in range(count):
        start, length = draw(prompt), draw(response)
        examples.append(common.Example(rng.integers(3, vocabulary, start + length), start, row))
    return examples


def make_step(variant, config, args, device, examples, batches):
    """-> function(k): one optimizer step of the variant on batch k, with a model of its own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(device).train()
    model.config.use_cache = False
    if variant.startswith("trl"):
        return trl_step(variant, model, args, examples, batches)
    optimizer, head = common.make_optimizer(model, 1e-5, 0.1), common.output_head(model)
    mu = 0.2 if variant == "sftmix" else 0.0

    def step(k):
        batch = batches[k % len(batches)]
        tokens = sum(examples[i].response_tokens for pair in batch for i in pair)
        lam = np.random.default_rng(k).beta(0.5, 0.5, len(batch))
        widths = [max(len(examples[i].ids) for i in pair) for pair in batch]
        for part in common.micro_batches(range(len(batch)), widths, args.micro_batch_size // 2):
            micro = common.collate([examples[batch[j][side]] for side in (0, 1) for j in part], device)
            with common.autocast(device, args.dtype):
                hidden = common.hidden_states(model, micro.ids)
            loss, _, _ = sftmix.sftmix_loss(micro.select(hidden), micro.targets, micro.lengths, lam[part], head.weight, mu)
            (loss / tokens).backward()
        common.optimizer_step(model, optimizer, 1e-5, 1.0)

    return step


def trl_step(variant, model, args, examples, batches):
    """TRL's SFTTrainer on the same examples; `trl` its defaults, `trl-tuned` without checkpointing. Completion-only loss."""
    import datasets
    import tempfile
    import trl
    rows = [{"input_ids": examples[i].ids.tolist(), "completion_mask": [0] * examples[i].start + [1] * examples[i].response_tokens}
            for batch in batches for pair in batch for i in pair]
    tokenizer = common.tiny_tokenizer()
    cpu = not torch.cuda.is_available()
    options = {} if variant == "trl" else {"gradient_checkpointing": False}
    config = trl.SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.micro_batch_size, report_to=[], max_length=None,
                           gradient_accumulation_steps=args.batch_size // args.micro_batch_size, use_cpu=cpu, bf16=args.dtype == "bf16",
                           learning_rate=1e-5, completion_only_loss=True, disable_tqdm=True, save_strategy="no", **options)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.create_optimizer()
    size = args.micro_batch_size

    def step(k):  # the trainer's own collator, loss and training_step, without its logging and callbacks
        start = (k % len(batches)) * args.batch_size
        micros = [[trainer.train_dataset[i] for i in range(at, at + size)] for at in range(start, start + args.batch_size, size)]
        inputs = [trainer.data_collator(micro) for micro in micros]
        count = sum((batch["labels"] != -100).sum() for batch in inputs)
        for batch in inputs:
            trainer.training_step(model, batch, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    model.train()
    return step


def memory_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    status = Path("/proc/self/status").read_text()  # not ru_maxrss: a child inherits its parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="a")
    parser.add_argument("--steps", type=int, default=20, help="turns that count, after 2 to warm up")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--trl", action="store_true", help="also time TRL's SFTTrainer")
    parser.add_argument("--only", help="run this variant alone and print its peak memory (used by the script itself)")
    args = parser.parse_args(argv)
    device = common.pick_device()
    build, prompt, response, longest = SHAPES[args.model]
    config = build()
    examples = random_examples(32 * args.batch_size, config.vocab_size, prompt, response, longest)
    half = len(examples) // 2
    batches = sftmix.paired_batches(np.arange(half), np.arange(half, 2 * half), [], [len(e.ids) for e in examples], args.batch_size, 0, 0)
    tokens = [sum(len(examples[i].ids) for pair in batch for i in pair) for batch in batches]
    variants = ["ntp", "sftmix"] + (["trl", "trl-tuned"] if args.trl else [])
    if args.only:
        before = memory_gib(device)
        step = make_step(args.only, config, args, device, examples, batches)
        for k in range(6):
            step(k)
        print(json.dumps({"peak": memory_gib(device), "before": before}))
        return
    print(f"model {args.model}, batch {args.batch_size}, micro-batch {args.micro_batch_size}, {args.dtype}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}")
    steps = {variant: make_step(variant, config, args, device, examples, batches) for variant in variants}
    seconds = {variant: [] for variant in variants}
    for k in range(args.steps + 2):
        for variant in (variants if k % 2 else variants[::-1]):
            started = time.perf_counter()
            steps[variant](k)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[variant].append(time.perf_counter() - started)
    seconds = {variant: np.array(values[2:]) for variant, values in seconds.items()}
    del steps
    for variant in variants:
        command = [sys.executable, __file__, "--only", variant, "--model", args.model, "--batch_size", str(args.batch_size),
                   "--micro_batch_size", str(args.micro_batch_size), "--dtype", args.dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        memory = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {"peak": float("nan"), "before": 0}
        low, middle, high = np.quantile(seconds[variant] / seconds["ntp"], [0.25, 0.5, 0.75])
        speed = f", {np.sum(tokens) / len(tokens) / np.median(seconds[variant]):,.0f} tokens/s" if device.type == "cuda" else ""
        print(f"{variant:>9}: {middle:.3f} x an NTP step (quartiles {low:.3f} to {high:.3f}){speed}; peak memory {memory['peak']:.2f} GiB, "
              f"{memory['peak'] - memory['before']:.2f} above the start")


if __name__ == "__main__":
    main()

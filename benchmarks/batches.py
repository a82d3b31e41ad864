"""What the batches of an epoch are like: pairs, and how much of a forward pass is padding.

    python benchmarks/batches.py FILE[#N] [--tokenizer FOLDER|FILE.gguf|tiny]

Halves are random: no model is needed. Padding efficiency is the share of a forward pass's positions
that hold a token: of the micro-batches as the scripts cut them, each padded to its longest example
(without slices) and in slices of similar length (common.SLICE_RATIO and, for comparison, others).
"""

from __future__ import annotations

import argparse

import numpy as np
import shared

import common
import data
import sftmix

RATIOS = (0.0, 0.6, 0.7, 0.8, 0.9)  # 0: without slices


def pair_numbers(batches: list[np.ndarray], lengths: np.ndarray) -> tuple[float, int]:
    """-> correlation of the log lengths of partners, number of examples without one. batches:
    (2, n) each."""
    chosen = np.concatenate(batches, 1)
    pairs = chosen[:, chosen.min(0) >= 0]
    correlation = np.corrcoef(np.log(lengths[pairs]))[0, 1]
    return float(correlation), chosen.shape[1] - pairs.shape[1]


def micro_batches(batch: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """A batch (2, n) cut as sftmix.train cuts it -> example indices of each. size: examples."""
    width = np.append(lengths, 0)[batch].max(0)
    paired = batch.min() >= 0 or (batch.min(0) >= 0).any()
    result = []
    for part in common.micro_batches(range(len(width)), width, size // 2 if paired else size):
        members = batch[:, part].ravel()
        result.append(members[members >= 0])
    return result


def efficiency(micros: list[np.ndarray], lengths: np.ndarray) -> tuple[float, float]:
    """-> padding efficiency under common.SLICE_RATIO, slices a micro-batch."""
    tokens, positions, slices = 0, 0, 0
    for members in micros:
        own = lengths[members]
        parts = common.length_slices(own)
        tokens += own.sum()
        positions += sum(len(part) * own[part[0]] for part in parts)
        slices += len(parts)
    return float(tokens / positions), slices / len(micros)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("file")
    add("--tokenizer", default="tiny")
    add("--batch_size", type=int, default=32)
    add("--micro_batch_size", type=int, default=8)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tokenizer = shared.load_tokenizer(args.tokenizer)
    datasets = data.load_data([args.file])
    (examples, *_) = data.encode_datasets(datasets, data.with_template(tokenizer, "alpaca"), 2048)
    lengths = np.array([len(example.ids) for example in examples])
    order = common.data_rng(args.seed, "random").random(len(lengths))
    confident, unconfident = sftmix.partition(order)
    options = args.batch_size, args.seed, 0
    halves = sftmix.Halves(confident, unconfident, confident[:0])
    epochs = {"SFTMix": sftmix.paired_batches(halves, *options)}
    epochs["NTP"] = sftmix.ntp_batches(np.arange(len(lengths)), *options)
    sizes = f"batch {args.batch_size}, micro-batch {args.micro_batch_size}"
    print(
        f"{args.file}: {len(lengths):,} examples, {lengths.mean():.0f} tokens on average, {sizes}"
    )
    correlation, alone = pair_numbers(epochs["SFTMix"], lengths)
    print(f"pairs: correlation of log lengths {correlation:+.3f}, {alone} examples unpaired\n")
    rows = []
    for ratio in RATIOS:
        common.SLICE_RATIO = ratio
        row = [f"slices, ratio {ratio}" if ratio else "without slices"]
        for batches in epochs.values():
            micros = []
            for batch in batches:
                micros += micro_batches(batch, lengths, args.micro_batch_size)
            share, slices = efficiency(micros, lengths)
            row += [f"{share:.3f}", f"{slices:.1f}"]
        rows.append(row)
    header = ["padding efficiency", "SFTMix", "slices a micro-batch", "NTP", "slices a micro-batch"]
    shared.print_table(header, rows)


if __name__ == "__main__":
    main()

"""SFTMix against the NTP baseline on the toy tasks: held-out loss per task, mean and standard error over seeds.

    python benchmarks/sftmix.py --seeds 5            # runs what is missing under runs/bench-sftmix, then prints the table

The seed changes the model's initial weights, the data order and λ. Further flags go to every run: --epochs 10, ...
SFTMix changes two things about NTP: the loss, and the make-up of a batch, which holds a confident and an unconfident half.
"SFTMix's batches, no Mixup" keeps the second and takes the first away (a μ too small to matter).
"""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "NTP": ["--mu", "0", "--ntp_on", "full"],
    "SFTMix": [],
    "SFTMix's batches, no Mixup": ["--mu", "1e-9", "--confidence", "{folder}/sftmix-{seed}/confidence.jsonl"],
    "SFTMix, random halves": ["--partition", "random"],
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/bench-sftmix")
    args, flags = parser.parse_known_args(argv)
    losses = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant, own in VARIANTS.items():
            folder = Path(args.output_dir) / f"{re.sub('[^a-z]+', '-', variant.lower())}-{seed}"
            own_flags = [flag.format(folder=args.output_dir, seed=seed) for flag in own]
            if not (folder / "summary.json").exists():
                resume = ["--resume"] if (folder / "config.json").exists() else []
                subprocess.run([sys.executable, str(ROOT / "sftmix.py"), "--model", "tiny", "--data", "toy", "--eval_data", "toy", "--template",
                                "plain", "--lr", "1e-3", "--seed", str(seed), "--output_dir", str(folder), *own_flags, *flags, *resume],
                               check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            result = json.loads((folder / "summary.json").read_text())["eval"]
            losses[variant].append([row["nll"] for row in result.values()])
    tasks = list(result)
    print(f"held-out loss (nats per response token), mean ± standard error over {args.seeds} seeds\n")
    print(f"| | {' | '.join(tasks)} | macro average |\n|---|{'---|' * (len(tasks) + 1)}")
    for variant, values in losses.items():
        values = np.array(values)                                            # (seeds, tasks)
        values = np.concatenate([values, values.mean(1, keepdims=True)], 1)
        error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.full(values.shape[1], np.nan)
        print(f"| {variant} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(values.mean(0), error)) + " |")
    pairs = [(variant, "NTP") for variant in list(losses)[1:]] + [("SFTMix", "SFTMix's batches, no Mixup")]
    for one, other in pairs:
        difference = (np.array(losses[one]) - np.array(losses[other])).mean(1)
        print(f"\n{one} - {other}, macro average, paired by seed: {difference.mean():+.4f} ± {difference.std(ddof=1) / np.sqrt(len(difference)):.4f}")


if __name__ == "__main__":
    main()

"""SFTMix against the NTP baseline on the toy tasks: held-out loss per task over seeds.

    python benchmarks/sftmix.py --seeds 5

Runs that are missing are made under runs/bench-sftmix, then the table is printed. The seed changes
the model's initial weights, the data order and λ. Further flags go to every run: --epochs 10, ...

SFTMix changes two things about NTP: the loss, and the make-up of a batch, which holds a confident
and an unconfident half. "SFTMix's batches, no Mixup" keeps the second and takes the first away (a μ
too small to matter).
"""

from __future__ import annotations

from pathlib import Path

import shared

import sftmix

RECIPE = "--model tiny --data toy --eval_data toy --template plain --lr 1e-3"
NO_MIXUP = "SFTMix's batches, no Mixup"
VARIANTS = {
    "NTP": "--mu 0 --ntp_on full",
    "SFTMix": "",
    NO_MIXUP: "--mu 1e-9 --confidence {folder}/sftmix-{seed}/confidence.jsonl",
    "SFTMix, random halves": "--partition random",
}


def run_variants(folder: Path, names: list[str], seed: int, flags: list[str]) -> dict[str, Path]:
    """-> variant -> its run folder."""
    found = {}
    for variant in names:
        given = f"{RECIPE} {VARIANTS[variant]}".split()
        given = [flag.format(folder=folder, seed=seed) for flag in given]
        target = folder / f"{shared.slug(variant.lower())}-{seed}"
        found[variant] = shared.run(sftmix, target, "--seed", seed, *given, *flags)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/bench-sftmix")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="NAME")
    args, flags = parser.parse_known_args(argv)
    folder, runs = Path(args.output_dir), []
    for seed in range(args.seeds):
        runs.append(run_variants(folder, args.variants, seed, flags))
    losses = {}
    for variant in args.variants:
        losses[variant] = shared.eval_losses([found[variant] for found in runs])
    tasks = list(shared.summary(runs[0]["NTP"])["eval"])
    shared.print_losses(losses, tasks, args.seeds)
    pairs = [(variant, "NTP") for variant in losses if variant != "NTP"]
    for one, other in [*pairs, ("SFTMix", NO_MIXUP)]:
        if one in losses and other in losses:
            print(f"\n{shared.paired(losses, one, other, '+')}")


if __name__ == "__main__":
    main()

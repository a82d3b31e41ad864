"""The two halves of SFTMix's Table 4: GPT-4's answers to a random half of Alpaca's prompts (High),
the original answers to the other half (Low).

    python benchmarks/quality.py --low alpaca --high vicgalle/alpaca-gpt4 --output_dir DIR

Writes DIR/high.jsonl and DIR/low.jsonl. Both sources must hold the same prompts in the same order.
The paper's own halves are not published.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shared  # before the project's modules

import common
import data

COLUMNS = ("instruction", "input", "output")


def read_rows(source: str) -> list[dict]:
    """Rows of a hub dataset's training split, or of a local file or folder of that form."""
    rows = []
    for file, number, record in data.find_source(source, None, 0, "train").records():
        missing = [column for column in COLUMNS if record.get(column) is None]
        if missing:
            raise data.UserError(f"{file}, row {number}: no {missing[0]}")
        rows.append({column: record[column] for column in COLUMNS})
    return rows


def halves(low: list[dict], high: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of the same prompts -> high's of a random half (of an odd number one more), low's of the
    other. Raises UserError where the prompts differ."""
    pairs = [[(row["instruction"], row["input"]) for row in rows] for rows in (low, high)]
    if pairs[0] != pairs[1]:
        raise data.UserError(f"{len(low)} and {len(high)} rows do not hold the same prompts")
    order = data.data_rng(0, "quality").permutation(len(low))
    chosen, others = np.split(order, [(len(order) + 1) // 2])
    return [high[i] for i in sorted(chosen)], [low[i] for i in sorted(others)]


@common.command_line
def main(argv: list[str] | None = None) -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--low", required=True, help="the original answers")
    parser.add_argument("--high", required=True, help="the better ones")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = halves(read_rows(args.low), read_rows(args.high))
    for name, own in zip(("high", "low"), rows):
        common.write_jsonl(folder / f"{name}.jsonl", own)
        print(f"{folder / name}.jsonl: {len(own)} rows")


if __name__ == "__main__":
    main()

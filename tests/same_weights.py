"""Fixed-seed runs of all three scripts end with the same weights as at another commit, bit for bit.

    python tests/same_weights.py REVISION [SCRIPT ...]     # run by hand around a change

Every command below is run at REVISION (once: its results are kept under runs/same_weights/) and in
this working tree, on one thread; a line a command says whether final/ holds the same bytes. Exit
status 1 if one differs.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "same_weights"
TOY = shlex.split("--data toy#100 --template plain --lr 1e-3 --batch_size 8 --max_steps 6")
ARMS = shlex.split(
    "--data toy/copy#24 toy/add#12 toy/describe#30 --template plain --lr 5e-3 --batch_size 8 "
    "--max_steps 7 --update_every 2 --reward_batch_size 4 --micro_batch_size 4"
)
DOMAINS = shlex.split(
    "--data toy/add#40 toy/copy#40 toy/count --eval_data toy/add#24 toy/copy#24 toy/count#24 "
    "--targets add --constraints copy --template plain --lr 1e-3 --eval_limit 6 "
    "--probe_steps 2 --max_steps 8 --updates 0,2,5"
)
COMMANDS = {
    "sftmix": {
        "default": TOY,
        "odd": [*TOY, "--data", "toy#51", "--micro_batch_size", "4"],
        "tiny-data": [*TOY, "--data", "toy#9", "--num_checkpoints", "2", "--max_steps", "4"],
        "epochs": [*TOY[:-2], "--data", "toy#60", "--epochs", "2", "--batch_size", "16"],
        "mean": [*TOY, "--mixup_norm", "mean", "--alpha", "2", "--mu", "0.7"],
        "confident": [*TOY, "--ntp_on", "confident"],
        "unconfident": [*TOY, "--ntp_on", "unconfident", "--mixup_norm", "mean"],
        "none": [*TOY, "--ntp_on", "none", "--mu", "1"],
        "one-half": [*TOY, "--ntp_on", "unconfident", "--mu", "0"],
        "thirds": [*TOY, "--split", "thirds", "--num_checkpoints", "3"],
        "source": [*TOY, "--data", "toy/copy#20", "toy/describe#45", "--partition", "source"],
        "source-other": [
            *TOY,
            "--data",
            "toy/copy#45",
            "toy/describe#20",
            "--partition",
            "source",
            "--ntp_on",
            "unconfident",
        ],
        "random": [*TOY, "--partition", "random"],
        "baseline": [*TOY, "--mu", "0", "--schedule", "linear", "--weight_decay", "0.3"],
        "longest": [*TOY, "--select", "longest", "--select_n", "40"],
        "lora": [*TOY, "--lora_rank", "2", "--lora_dropout", "0.1", "--gradient_checkpointing"],
        "bf16": [*TOY, "--dtype", "bf16"],
        "gemma2": ["--model", "gemma2", *TOY, "--seed", "3"],
        "phi": ["--model", "phi", *TOY, "--partition", "random"],
        "llama-alpaca": ["--model", "llama", *TOY, "--template", "alpaca", "--max_length", "400"],
        "weaker": ["--ref_model", "llama", *TOY],
    },
    "dynamix_sft": {
        "default": ARMS,
        "proportional": [*ARMS, "--sampling", "proportional"],
        "uniform": [*ARMS, "--sampling", "uniform", "--model", "llama"],
        "multidds": [*ARMS, "--sampling", "multidds", "--actor_lr", "1e-3"],
        "multiuat": [*ARMS, "--sampling", "multiuat", "--uncertainty", "probability"],
        "hbo": [*ARMS, "--sampling", "hbo", "--actor_lr", "1e-3", "--model", "llama"],
        "entropy": [*ARMS, "--reward", "entropy", "--beta", "9", "--gamma", "0.1"],
        "first-order": [*ARMS, "--lookahead", "first_order", "--beta", "9", "--alpha", "0.2"],
        "first-order-fresh": [*ARMS, "--lookahead", "first_order", "--reward_on", "fresh"],
        "fresh": [*ARMS, "--reward_on", "fresh", "--model", "llama", "--weight_decay", "0.1"],
        "start": [*ARMS, "--no-prior", "--init", "proportional"],
        "lora": [*ARMS, "--lora_rank", "2", "--lora_dropout", "0.2", "--gradient_checkpointing"],
        "bf16": [*ARMS, "--dtype", "bf16"],
    },
    "dynamics": {
        "default": DOMAINS,
        "gradient": [*DOMAINS, "--mixture", "gradient", "--damping", "0.5"],
        "mass": [*DOMAINS, "--mixture", "uniform", "--target_mass", "0.7"],
        "proportional": [*DOMAINS, "--mixture", "proportional", "--eval_every", "3"],
        "reference": [
            *DOMAINS,
            "--reference",
            "copy=+5%",
            "--updates",
            "dense",
            "--model",
            "llama",
        ],
        "cost": [*DOMAINS[:-6], "--max_steps", "20", "--max_cost", "3", "--batch_size", "4"],
        "lora": [*DOMAINS, "--lora_rank", "4", "--gradient_checkpointing"],
        "accuracy": [
            *DOMAINS,
            "--eval_data",
            "toy/add#24",
            "CHOICES",
            "--constraints",
            "choices",
            "--accuracy",
            "choices",
        ],
    },
}


def make_inputs(folder):
    """Small random models and a multiple-choice file, the same for both trees."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    common, conftest = importlib.import_module("common"), importlib.import_module("conftest")
    for name in ("llama", "gemma2", "phi"):
        if not (folder / name / "config.json").exists():
            conftest.random_model(name).save_pretrained(folder / name)
            common.tiny_tokenizer().save_pretrained(folder / name)
    rows = [
        {"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "choices.jsonl").write_text(text, encoding="utf-8")


def run_all(tree, out, scripts):
    """Run what is missing under out with the scripts of tree; in this process, one thread."""
    sys.path[:0] = [str(tree)]
    os.chdir(tree)
    importlib.import_module("torch").set_num_threads(1)
    for script in scripts:
        main = importlib.import_module(script).main
        for name, flags in COMMANDS[script].items():
            folder = out / script / name
            if (folder / "summary.json").exists():
                continue
            names = {model: str(FOLDER / "inputs" / model) for model in ("llama", "gemma2", "phi")}
            names["CHOICES"] = str(FOLDER / "inputs" / "choices.jsonl")
            flags = [names.get(flag, flag) for flag in flags]
            log = io.StringIO()
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    main([*flags, "--output_dir", str(folder)])
            except BaseException as error:
                print(f"{script} {name}: {error!r}\n{log.getvalue()[-2000:]}", file=sys.stderr)


def digest(folder):
    """sha256 of the weights a run saved, or None where it did not finish."""
    files = sorted((folder / "final").glob("*.safetensors"))
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest() if files else None


def main():
    resolve = ["git", "rev-parse", sys.argv[1]]
    done = subprocess.run(resolve, cwd=ROOT, capture_output=True, text=True, check=True)
    revision, scripts = done.stdout.strip(), sys.argv[2:] or list(COMMANDS)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tree, old, new = FOLDER / f"tree-{revision[:12]}", FOLDER / revision[:12], FOLDER / "worktree"
    if not tree.exists():
        tree.mkdir()
        archive = subprocess.run(
            ["git", "archive", revision], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    make_inputs(FOLDER / "inputs")
    subprocess.run(["rm", "-rf", str(new)], check=True)
    children = []
    for where, out in ((tree, old), (ROOT, new)):
        command = [sys.executable, __file__, "--run", str(where), str(out), *scripts]
        children.append(subprocess.Popen(command))
    for child in children:
        child.wait()
    differ = 0
    for script in scripts:
        for name in COMMANDS[script]:
            one, other = digest(old / script / name), digest(new / script / name)
            verdict = "same" if one == other and one else "DIFFERS" if one and other else "MISSING"
            differ += verdict != "same"
            print(f"{verdict:8} {script} {name}")
    print(f"{differ} differ")
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_all(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()

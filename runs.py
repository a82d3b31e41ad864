"""A run's folder: what is written there, how a run is stopped and how it goes on.

Sections: how a command ends · files · state of a model · trackers · the run folder"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from data import UserError
from models import cast, causal_lm, lasting_name, trainable


# ---- How a command ends --------------------------------------------------------------------------
def command_line(main: Callable) -> Callable:
    """Decorator of `main(argv=None)`: a UserError becomes one line on stderr and exit status 2."""
    return functools.wraps(main)(functools.partial(_run_command, main))


def _run_command(main: Callable, argv: list[str] | None = None):
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            problem = "several processes are not supported yet"
            raise UserError(f"WORLD_SIZE: {problem}; start the script with plain python")
        return main(argv)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted: continue with --resume and the run folder", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        release_locks()


# ---- Files ---------------------------------------------------------------------------------------
_locks = []  # open files: a lock lasts as long as its file is open


def lock(folder: Path) -> None:
    """Hold a folder for this command alone, until it ends in whatever way. Raises UserError where
    another process holds it."""
    file = open(folder / ".lock", "w")  # noqa: SIM115 (open for the command's life)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another process writes it") from None
    _locks.append(file)


def release_locks() -> None:
    while _locks:
        _locks.pop().close()


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator:
    """A file to be written that takes its name once it is whole: nobody sees half of it."""
    with open(f"{path}.tmp", mode, encoding=None if "b" in mode else "utf-8") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{path}.tmp", path)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as stream:
        stream.write(text)


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))


# ---- State of a model ----------------------------------------------------------------------------
def rng_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def same_rng(state: dict) -> bool:
    """Whether no random number was drawn since rng_state() gave this state."""
    now = rng_state()
    pairs = zip([state["torch"], *state["cuda"]], [now["torch"], *now["cuda"]])
    return all(torch.equal(one, other) for one, other in pairs)


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def trainable_state(model) -> dict[str, Tensor]:
    """name -> tensor of the trainable parameters (all of them, or the adapter's)."""
    named = model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def load_trainable_state(model, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state[name])


def restore(state: dict, model, optimizer) -> None:
    """Model, optimizer and RNG as Run.save_checkpoint found them."""
    load_trainable_state(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])


# ---- Trackers, and what a run was made with ------------------------------------------------------
def versions() -> dict[str, str]:
    """What a run's numbers depend on beside its flags."""
    names = "torch", "transformers", "datasets", "numpy"
    threads = f"cpu, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found, "device": device}


def git_commit() -> str | None:
    """Commit of these scripts, "-dirty" where files differ from it; None outside of git."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return found.stdout.strip() or None
    return None


def import_tracker(name: str) -> None:
    """Raise UserError unless --track's library is there, with all that it needs itself."""
    try:
        importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except Exception as error:  # a library that is there but broken raises any type
        cause = "" if getattr(error, "name", None) == name else f" ({error})"
        raise UserError(f"--track {name} needs: pip install {name}{cause}") from None


def open_tracker(name: str, folder: Path, args: Namespace) -> Callable:
    """-> function(step, {metric: number}). A method's stages each count their own steps."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
        return lambda step, values: [writer.add_scalar(*item, step) for item in values.items()]
    import wandb

    identity = {"name": folder.name, "id": re.sub(r"\W", "-", folder.name)}
    wandb.init(dir=str(folder), config=vars(args), resume="allow", **identity)
    wandb.define_metric("*", step_metric="step")
    return lambda step, values: wandb.log({"step": step, **values})


# ---- The run folder ------------------------------------------------------------------------------

# Flags that may differ when a run is resumed: they change what is written, not what is computed.
RESUME_FREE = {"output_dir", "resume", "log_every", "eval_every", "save_every"}
RESUME_FREE |= {"track", "show_batch", "save_dtype"}


class Run:
    """The run folder: config.json, metrics.jsonl, checkpoint/, figures, final/, last summary.json.

    Open it once everything that can be wrong with the user's input has been checked: nothing is
    written before. state: the checkpoint that --resume found, or None. finished: there is nothing
    left to do. time: seconds by part."""

    def __init__(self, script: str, args: Namespace, **config):
        self.folder, self.args = self._folder(script, args), args
        self.state, self.time, offset = None, {}, 0
        self._before, self._started = 0.0, time.perf_counter()
        self.finished = (self.folder / "summary.json").exists()
        flags = {key: value for key, value in vars(args).items() if key != "resume"}
        self.config = config = {"script": script, "flags": flags, **config}
        if args.resume:
            self._check_same(config)
            saved = self.folder / "checkpoint" / "state.pt"
            if saved.exists() and not self.finished:
                self.state = torch.load(saved, map_location="cpu", weights_only=True)
                offset, self.time = self.state["metrics_offset"], self.state["time"]
                self._before = self.state["seconds"]
        track = None if self.finished else args.track
        if track:
            import_tracker(track)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tracker = track and open_tracker(track, self.folder, args)
        if not args.resume:
            made = {"versions": versions(), "git_commit": git_commit(), "command": sys.argv}
            write_json(self.folder / "config.json", {**config, **made})
        if self.finished:
            print(f"{self.folder} is finished: nothing to resume")
            return
        self._metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115 (open for the run)
        self._metrics.truncate(offset)  # lines after the checkpoint will be written again
        print(f"run   {self.folder}" + (" (resumed)" if self.state else ""))

    @staticmethod
    def _folder(script: str, args: Namespace) -> Path:
        """The run's folder, fit to be started or resumed. Raises UserError."""
        if args.resume and args.resume is not True:
            args.output_dir = args.resume
        if args.resume and not args.output_dir:
            raise UserError("--resume: which run? give its folder, --resume runs/...")
        name = f"{script}-{Path(args.model).name or 'model'}-{args.seed}"
        folder = Path(args.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        args.output_dir = str(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: is a file")
        exists = (folder / "config.json").exists()
        if exists and not args.resume:
            advice = f"continue it with --resume {folder}, or choose another --output_dir"
            raise UserError(f"{folder} already holds a run: {advice}")
        if args.resume and not exists:
            raise UserError(f"--resume {folder}: there is no run in this folder (no config.json)")
        return folder

    def _check_same(self, config: dict) -> None:
        """Raise UserError where the run in the folder was started otherwise."""
        old = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if old["script"] != config["script"]:
            made = f"the run was made by {old['script']}.py, not {config['script']}.py"
            raise UserError(f"--resume: {made}")
        # DynaMiCS chooses its checkpoint by the evaluations
        free = RESUME_FREE - ({"eval_every"} if config["script"] == "dynamics" else set())
        new = json.loads(json.dumps(config))
        for key in sorted(set(new["flags"]) - free):
            before, now = old["flags"].get(key), new["flags"][key]
            if before != now:
                change = f"--{key} was {before!r} and is now {now!r}"
                raise UserError(f"--resume: {change}; give the flags of the first start")
        for key in sorted(set(new) - {"flags"}):
            if old.get(key) != new[key]:
                change = f"{key.replace('_', ' ')} differs from the first start"
                raise UserError(f"--resume: {change}; has a data file or the model changed?")

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to time[name]."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.time[name] = self.time.get(name, 0.0) + time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its starts."""
        return self._before + time.perf_counter() - self._started

    def rounded_time(self) -> dict[str, float]:
        return {name: round(seconds, 3) for name, seconds in self.time.items()}

    def log(self, step: int, values: dict, line: str = "") -> None:
        """One JSON line (with time/<part> in seconds so far), and one human line where given."""
        record = {"step": step, **values}
        record |= {f"time/{name}": seconds for name, seconds in self.rounded_time().items()}
        self._metrics.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._metrics.flush()
        if self._tracker:
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            numbers.pop("step")
            self._tracker(step, numbers)
        if line:
            tqdm.write(line)

    def log_training(self, stage: str, step: int, steps: int, values: dict, others: dict) -> None:
        """A log line of the loop: values go under <stage>/ and into the human line, others not."""
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        named = {f"{stage}/{key}": value for key, value in values.items()}
        self.log(step, {**others, **named}, f"{stage} {step}/{steps}  {text}")

    def save_checkpoint(self, state: dict, model, optimizer) -> None:
        """Everything the loop needs to go on as if nothing had happened: its own state, and model,
        optimizer and RNG (see restore)."""
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        os.fsync(self._metrics.fileno())
        arrays = {k: torch.tensor(v) for k, v in state.items() if isinstance(v, np.ndarray)}
        state = {**state, **arrays, "model": trainable_state(model)}
        state |= {"optimizer": optimizer.state_dict()}
        state |= {"rng": rng_state(), "metrics_offset": self._metrics.tell()}
        state |= {"time": self.time, "seconds": self.seconds}
        with atomic(folder / "state.pt", "wb") as stream:
            torch.save(state, stream)

    def cost(self, *parts: str) -> dict[str, float]:
        """Seconds of these parts as multiples of the training's; total: with training itself."""
        result = {part: self.time.get(part, 0.0) / self.time["train"] for part in parts}
        return {**result, "total": 1 + sum(result.values())}

    def save_model(self, model, tokenizer, name: str = "final", dtype=None) -> None:
        """Model (or adapter) and tokenizer in Hugging Face format under <name>/, complete or not
        there at all. The trained weights are rounded to dtype, in place; None: kept as they are."""
        temporary, final = self.folder / f"{name}.tmp", self.folder / name
        shutil.rmtree(temporary, ignore_errors=True)
        cast(trainable(model) if dtype else (), dtype)
        lm, own = causal_lm(model), {}
        if model is not lm:  # else PEFT asks the hub for the base's vocabulary
            own = {"save_embedding_layers": False}
        lm.config.use_cache = True  # as it came: users generate with what we save
        model.save_pretrained(temporary, **own)
        lm.config.use_cache = False
        generation, ends = lm.generation_config.to_diff_dict(), data.end_tokens(tokenizer)
        generation.pop("_from_model_config", None)  # else config.json could take its place
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        write_json(temporary / "generation_config.json", generation)
        tokenizer.save_pretrained(temporary)
        about = {"script": self.config["script"], "base": lasting_name(self.args.model)}
        about |= {"template": self.args.template, "max_length": self.args.max_length}
        about["template_date"] = self.args.template_date
        write_json(temporary / "cleansft.json", about | {"seed": self.args.seed})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)

    def finish(self, summary: dict) -> None:
        """Write summary.json: the sign that the run is complete."""
        parts = self.rounded_time()
        counted = {"left_out": self.config.get("left_out", {})}
        summary = {**summary, **counted, "seconds": round(self.seconds, 3), "time": parts}
        write_json(self.folder / "summary.json", summary)
        self._metrics.close()
        spent = ", ".join(f"{name} {value:.0f} s" for name, value in parts.items())
        print(f"done  {self.folder}/summary.json after {summary['seconds']:.0f} s: {spent}")

"""A run's folder: what is written there, how a run is stopped and how it goes on.

Sections: how a command ends · files · state of a model · flags of a resumed run · trackers ·
checkpoints · the run folder. What is promised: docs/reliability.md."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import ranks
from data import UserError, sha256
from models import cast, causal_lm, is_hub_id, lasting_name, model_fingerprint, no_bars, trainable


# ---- How a command ends --------------------------------------------------------------------------
class Stopped(BaseException):
    """A signal ends the command. number: which; after: what was saved, for the last line."""

    def __init__(self, number: int, after: str = ""):
        super().__init__(number)
        self.number, self.after = number, after


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# waits: a training loop runs, which stops after its step; number: the signal that asked it to;
# advice: how to go on
_stop = Namespace(waits=False, number=None, advice="nothing was written")


NEWS = r"(peft|transformers)\b"  # modules whose FutureWarnings only a programmer can follow


def command_line(main: Callable) -> Callable:
    """Decorator of `main(argv=None)`: what the user, a signal or the machine is the cause of ends
    in one line on stderr. Exit status 2, and 128 + its number after a signal. What PEFT and
    transformers say of their own future versions is not shown: it is for who writes the code."""
    return functools.wraps(main)(functools.partial(_run_command, main))


def _run_command(main: Callable, argv: list[str] | None = None):
    handlers = _handle(_on_signal)
    try:
        ranks.join()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=NEWS)
            result = main(argv)
        ranks.leave()
        return result
    except UserError as error:
        _exit(2, f"error: {error}")
    except (Stopped, KeyboardInterrupt) as stop:
        number, after = getattr(stop, "number", signal.SIGINT), getattr(stop, "after", "")
        _exit(128 + number, f"{signal.Signals(number).name}: stopped; {after}{_stop.advice}")
    except Exception as error:
        line = machine_trouble(error)
        if line is None:
            raise  # a mistake of ours
        _exit(2, f"error: {line}")
    finally:
        _stop.waits, _stop.number, _stop.advice = False, None, "nothing was written"
        release_locks()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _handle(handler) -> dict:
    """Handle signals so from now on -> how each was handled. Only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler) for number in SIGNALS} if main else {}


def _exit(status: int, line: str):
    _handle(signal.SIG_IGN)  # torchrun ends all ranks once one has ended: the line comes first
    for bar in list(tqdm._instances):
        bar.close()  # the line is the last one
    if ranks.speaks():
        start = "\n" if ranks.rank() else ""  # rank 0 may have a bar in this line
        print(start + " ".join(line.split()), file=sys.stderr)
    raise SystemExit(status) from None


def _on_signal(number: int, frame) -> None:
    """The first signal lets a training loop finish its step, the second is the system's own."""
    _handle(signal.SIG_DFL)
    if not _stop.waits:
        raise Stopped(number)
    _stop.number = number
    text = "a checkpoint follows after this step; once more ends at once"
    if not ranks.rank():  # print may be in the middle of a line
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


@contextlib.contextmanager
def finish_step() -> Iterator[None]:
    """Inside, a first signal waits for the checkpoint after the current step: see Run.due."""
    _stop.waits = True
    try:
        yield
    finally:
        _stop.waits = False
    if _stop.number:
        raise Stopped(_stop.number)


def when_stopped(advice: str) -> None:
    """What the last line says after a signal: how to go on."""
    _stop.advice = advice


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def machine_trouble(error: Exception) -> str | None:
    """One line for what disk or memory are the cause of; None for anything else."""
    inner = error.__context__  # torch.save hides a full disk behind an error of its own
    if isinstance(error, RuntimeError) and isinstance(inner, OSError):
        error = inner
    text = str(error)
    if ranks.active() and any(part in text for part in GONE):
        return "another rank has ended, or does not answer: see its own lines or torchrun's"
    if isinstance(error, MemoryError) or any(part in text.lower() for part in MEMORY):
        advice = "try a smaller --micro_batch_size (eval.py: --batch_size), "
        advice += "--gradient_checkpointing, or --lora_rank 16"
        return f"out of memory ({text.splitlines()[0][:200] if text else 'MemoryError'}); {advice}"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        then = _stop.advice if "--" in _stop.advice else "or choose another --output_dir"
        advice = f"; make room or give the rights, {then}"
        cause = f"{error.strerror or text or type(error).__name__}{where}"
        return cause + (advice if error.errno in DISK else "")
    if type(error).__name__ == "SafetensorError" and "os error" in text:
        return f"{text}; make room; {_stop.advice}"
    return None


# ---- Files ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator:
    """A file to be written that takes its name once it is whole: nobody sees half of it."""
    with open(f"{path}.tmp", mode, encoding=None if "b" in mode else "utf-8") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{path}.tmp", path)


def write_text(path: str | Path, text: str) -> None:
    if ranks.rank():
        return  # rank 0 writes it
    with atomic(path) as stream:
        stream.write(text)


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))


def replace_folder(new: Path, place: Path) -> None:
    """A folder takes the place of another: at any time one of them is there, under the name or
    under name.old."""
    old = place.with_name(f"{place.name}.old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


_locks: dict = {}  # folder: open file, of this process


def lock(folder: Path) -> None:
    """Hold the folder until the command ends. Raises UserError where another process does."""
    if folder.resolve() in _locks:
        return
    stream = open(folder / ".lock", "ab")  # noqa: SIM115 (the lock lives as long as it is open)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        advice = "wait for it, or choose another --output_dir"
        raise UserError(f"{folder}: another process writes into this folder; {advice}") from None
    except OSError as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked ({error.strerror}); start no second run there")
    _locks[folder.resolve()] = stream


def release_locks() -> None:
    while _locks:
        _locks.popitem()[1].close()


# ---- State of a model ----------------------------------------------------------------------------
def rng_state() -> dict:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []  # this process's GPU
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def same_rng(state: dict) -> bool:
    """Whether no random number was drawn since rng_state() gave this state."""
    now = rng_state()
    pairs = zip([state["torch"], *state["cuda"]], [now["torch"], *now["cuda"]])
    return all(torch.equal(one, other) for one, other in pairs)


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def trainable_state(model) -> dict[str, Tensor]:
    """name -> tensor of the trainable parameters (all of them, or the adapter's)."""
    named = model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def load_trainable_state(model, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(ranks.like(state[name], parameter))


def optimised(optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moments(optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by the place of its parameter: "0", "1", ..."""
    places = {str(i): optimizer.state.get(p) for i, p in enumerate(optimised(optimizer))}
    return {place: dict(state) for place, state in places.items() if state}


def load_moments(optimizer, saved: dict[str, dict[str, Tensor]]) -> None:
    for i, parameter in enumerate(optimised(optimizer)):
        for key, value in saved.get(str(i), {}).items():
            value = ranks.like(value, parameter) if value.dim() else value
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def restore(state: dict, model, optimizer) -> None:
    """Model, optimizer and RNG as Run.save_checkpoint found them, on any number of ranks; state
    lets go of them. The RNG, on which dropout depends, goes on where there are as many ranks."""
    shards = state.pop("shards", None)
    whole = {name: state.pop(name, None) for name in ("model", "optimizer")}
    saved = load_shards(shards, model, optimizer) if shards else whole
    load_trainable_state(model, saved["model"])
    load_moments(optimizer, saved["optimizer"])
    if "rng" in state:
        set_rng_state(state["rng"])


def load_shards(folder: str, model, optimizer) -> dict:
    """Parameters and moments that torch.distributed.checkpoint wrote, each rank's own part, for as
    many ranks as there are now."""
    import torch.distributed.checkpoint as dcp

    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    held = {"model": {}, "optimizer": {}}
    for name, parameter in trainable_state(model).items():
        held["model"][name] = torch.empty_like(parameter)
    for i, parameter in enumerate(optimised(optimizer)):
        if f"optimizer.{i}.step" in known:
            parameter = parameter.detach()
            pair = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            held["optimizer"][str(i)] = pair | {"step": torch.zeros(())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process
        dcp.load(held, checkpoint_id=folder, no_dist=not ranks.active())
    return held


# ---- Flags of a resumed run ----------------------------------------------------------------------
# They may differ when a run is resumed: they change what is written, not what is computed.
RESUME_FREE = {"output_dir", "resume", "log_every", "eval_every", "save_every", "save_minutes"}
RESUME_FREE |= {"keep_checkpoint", "track", "show_batch", "save_dtype", "no_cache"}


def free_flags(script: str) -> set[str]:
    """DynaMiCS chooses its checkpoint by the evaluations."""
    return RESUME_FREE - ({"eval_every"} if script == "dynamics" else set())


def parse_flags(parser: ArgumentParser, argv: list[str] | None, script: str) -> Namespace:
    """The flags; args.given: those that were named. With --resume and a run in its folder what is
    not named is as that run has it, and what is named must agree, or be free. Raises UserError."""
    args, unnamed = parser.parse_args(argv), object()
    nothing = Namespace(**dict.fromkeys(vars(args), unnamed))
    found = vars(parser.parse_args(argv, nothing))
    args.given = {name: value for name, value in found.items() if value is not unnamed}
    if args.resume:
        defaults = {name: parser.get_default(name) for name in vars(args)}
        take_first_flags(args, script, defaults)
    return args


def take_first_flags(args: Namespace, script: str, defaults: dict) -> None:
    """Fill in what config.json of --resume's folder says. A run that has trained nothing yet is
    started anew: there the named flags win."""
    folder = args.output_dir if args.resume is True else args.resume
    if not folder:
        raise UserError("--resume: which run? give its folder, --resume runs/...")
    if args.output_dir not in (None, folder):
        raise UserError(f"--resume {folder}: --output_dir names another folder")
    config, args.output_dir = read_config(Path(folder)), folder
    if not config:
        if set(args.given) <= {"resume", "output_dir"}:
            advice = "to start one give its flags, too"
            raise UserError(f"--resume {folder}: there is no run in this folder; {advice}")
        return
    if config["script"] != script:
        made = f"the run was made by {config['script']}.py, not {script}.py"
        raise UserError(f"--resume {folder}: {made}")
    first, named = config["flags"], config.get("given", {})
    free, anew = free_flags(script), not has_trained(Path(folder))
    for name, value in args.given.items():
        now = json.loads(json.dumps(value))
        agrees = now in (first.get(name), named.get(name, defaults[name]))
        if not (agrees or anew or name in free):
            change = f"--{name} was {first.get(name)!r} and is now {now!r}"
            raise UserError(f"--resume: {change}; give the flags of the first start, or none")
    known = named if anew else first
    for name in vars(args).keys() & known.keys() - {"output_dir"}:  # the folder may have moved
        if name not in args.given or not (anew or name in free):
            setattr(args, name, known[name])


def read_config(folder: Path) -> dict:
    """config.json of a run; {} where there is no run. Raises UserError where it is damaged."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config["flags"], dict) and config["script"]:
            return config
        raise ValueError
    except (ValueError, KeyError, TypeError):
        advice = "choose another --output_dir; its checkpoint cannot be resumed"
        raise UserError(f"{path}: is damaged, or not of a run; {advice}") from None


def has_trained(folder: Path) -> bool:
    """Whether a run in this folder has anything to lose: a checkpoint, or a step in its log."""
    if any((folder / name).exists() for name in ("checkpoint", "checkpoint.old", "summary.json")):
        return True
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return not all(line.startswith(b'{"step": 0,') for line in lines)
    return False


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


class Tracker:
    """Sends the lines of metrics.jsonl to TensorBoard or W&B, each once however often the run was
    killed. TensorBoard's files are made again from the lines that a resumed run keeps. W&B gets the
    line's number as its step: of a number that it has already it takes no second one."""

    def __init__(self, args: Namespace, folder: Path, run_id: str, kept: list[dict]):
        self.name, self.lines, self.sent = args.track, 0, {}
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            self.writer = SummaryWriter(folder / "tensorboard")
            for record in kept:
                self.log(record)
            return
        import wandb

        self.wandb, self.lines = wandb, len(kept)
        how = {"name": folder.name, "id": run_id, "resume": "allow"}
        wandb.init(dir=str(folder), config=vars(args), **how)
        wandb.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        """SFTMix's two stages count their own steps, so what they share stands under reference/,
        too. time/ stands in several lines of a step: the first one is taken."""
        first = any(key.startswith("reference/") for key in record)
        step, values = record["step"], {}
        for key, value in record.items():
            tag = f"reference/{key}" if first and not key.startswith("reference/") else key
            if isinstance(value, (int, float)) and key != "step" and self.sent.get(tag) != step:
                values[tag] = value
                self.sent[tag] = step
        if self.name == "tensorboard":
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)
        else:
            self.wandb.log({"step": step, **values}, step=self.lines)
        self.lines += 1

    def close(self) -> None:
        self.writer.close() if self.name == "tensorboard" else self.wandb.finish()


@torch.no_grad()
def rounded_state(model, dtype: torch.dtype | None) -> dict:
    """Round the trained weights to dtype, in place -> what save_pretrained is given: the whole
    state where the model is sharded, whose weights stay fp32 numbers."""
    if not ranks.active():
        cast(trainable(model) if dtype else (), dtype)
        return {}
    for parameter in trainable(model) if dtype else ():
        parameter.copy_(parameter.to(dtype))
    names, state = trainable_state(model), ranks.whole_state(model)
    for name in names if dtype else ():
        if name in state:
            state[name] = state[name].to(dtype)
    return {"state_dict": state}


# ---- Checkpoints ---------------------------------------------------------------------------------
def write_checkpoint(folder: Path, state: dict, model, optimizer) -> None:
    """checkpoint/: state.pt, under torchrun with parameters and moments apart in shards/ and every
    rank's RNG, and SHA256SUMS as `sha256sum -c` reads it. The previous checkpoint stays until this
    one is whole."""
    new, rank = folder / "checkpoint.tmp", ranks.rank()
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    parts = {"model": trainable_state(model), "optimizer": moments(optimizer)}
    ranks.barrier()
    if ranks.active():
        import torch.distributed.checkpoint as dcp

        dcp.save(parts, checkpoint_id=new / "shards")
        save_tensors(new / f"rng-{rank}.pt", rng_state())
    else:
        state = state | parts | {"rng": rng_state()}
    if rank == 0:
        save_tensors(new / "state.pt", state | {"world": ranks.world()})
    own = [*new.glob(f"shards/__{rank}_*"), *new.glob(f"rng-{rank}.pt")]
    own += [*new.glob("state.pt"), *new.glob("shards/.metadata")] if rank == 0 else []
    lines = [f"{sha256(file)}  {file.relative_to(new)}\n" for file in own]
    lines = ranks.gather(lines)
    if rank == 0:
        write_text(new / "SHA256SUMS", "".join(lines))
        replace_folder(new, folder / "checkpoint")
    ranks.barrier()


def save_tensors(path: Path, state: dict) -> None:
    with open(path, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def read_checkpoint(folder: Path) -> dict | None:
    """The state in a run's folder; None where there is none yet. Raises UserError where it is not
    what was written."""
    places = (folder / "checkpoint", folder / "checkpoint.old")
    place = next((place for place in places if place.exists()), None)
    if place is None:
        return None
    own = slice(ranks.rank(), None, ranks.world())
    problems = ranks.gather(damaged_files(place, ["state.pt"], own))
    if problems:
        advice = f"restore it, or remove {place} to start over with --resume"
        raise UserError(f"{problems[0]}; {advice}")
    state = torch.load(place / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    if (place / "shards").exists():
        state["shards"] = str(place / "shards")
    own = place / f"rng-{ranks.rank()}.pt"
    if state["world"] != ranks.world():
        state.pop("rng", None)  # of other ranks: each has its seed
    elif own.exists():
        state["rng"] = torch.load(own, weights_only=True)
    return state


def damaged_files(place: Path, needed: Sequence[str], part=slice(None)) -> list[str]:
    """What is wrong with the files that SHA256SUMS of a folder lists, or with that part of them.
    needed: files that must be among them."""
    try:
        lines = (place / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        listed = [line.split(maxsplit=1) for line in lines]
        missing = set(needed) - {name for _, name in listed}
        if missing:
            raise ValueError(f"no {sorted(missing)[0]}")
        for digest, name in listed[part]:
            if sha256(place / name) != digest:
                return [f"{place / name}: is not what was written (its sha256 differs)"]
    except (FileNotFoundError, ValueError) as error:
        return [f"{place}: is incomplete ({error})"]
    return []


def read_metrics(path: Path, size: int) -> list[dict]:
    """The lines that metrics.jsonl had when the checkpoint was written, `size` bytes. Raises
    UserError where they are not there."""
    whole = path.read_bytes()[:size] if path.exists() else b""
    if len(whole) < size:
        problem = f"has {len(whole):,} bytes, {size:,} when the checkpoint was written"
        raise UserError(f"{path}: {problem}; restore the file, or choose another --output_dir")
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append({"step": 0} | json.loads(line))
        except (ValueError, TypeError):
            advice = "restore the file, or choose another --output_dir"
            raise UserError(f"{path}, row {number}: is no line of metrics; {advice}") from None
    return records


# ---- The run folder ------------------------------------------------------------------------------
# What a run may write there, beside config.json and .lock.
WRITTEN = "final best checkpoint tensorboard wandb metrics.jsonl summary.json confidence.jsonl "
WRITTEN += "embeddings.jsonl test_rows.jsonl confidence.png perplexity.png embeddings.png loss.png "
WRITTEN += "mixture.png rewards.png groups.png coverage.png losses.png slopes.png prediction.png "
WRITTEN += "results.png"


class Run:
    """The run folder: config.json, metrics.jsonl, checkpoint/, figures, final/, last summary.json.

    Made first, it looks at folder and flags; `open` it once everything that can be wrong with the
    user's input has been checked: nothing is written before. state: the checkpoint that --resume
    found, or None. finished: there is nothing left to do. time: seconds by part."""

    def __init__(self, script: str, args: Namespace):
        self.script, self.args = script, args
        self.folder = ranks.first_rank(self._folder, script, args)
        args.output_dir = str(self.folder)
        self.state, self.time, self._kept = None, {}, []
        self._before, self._started = 0.0, time.perf_counter()
        if args.track:
            import_tracker(args.track)
        self._first, self.finished = ranks.first_rank(self._look)
        if self.finished:
            print(f"{self.folder} is finished: nothing to resume")
        elif self._first:
            self.state = read_checkpoint(self.folder)
        if self.state:
            size = self.state["metrics_offset"]
            self._kept = read_metrics(self.folder / "metrics.jsonl", size)
            self.time, self._before = self.state["time"], self.state["seconds"]

    @staticmethod
    def _folder(script: str, args: Namespace) -> Path:
        """The run's folder, fit to be started or resumed. Raises UserError."""
        name = f"{script}-{Path(args.model).name or 'model'}-{args.seed}"
        folder = Path(args.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: is a file")
        if (folder / "config.json").exists():
            if not args.resume and has_trained(folder):
                advice = f"continue it with --resume {folder}, or choose another --output_dir"
                raise UserError(f"{folder} already holds a run: {advice}")
            return folder
        foreign = [name for name in WRITTEN.split() if os.path.lexists(folder / name)]
        if foreign:
            problem = f"holds {foreign[0]}, which is not of a run (no config.json)"
            raise UserError(f"--output_dir {folder}: {problem}; choose another folder")
        return folder

    def _look(self) -> tuple[dict, bool]:
        """-> config.json of a run that has trained, {} for one that starts (anew); whether it is
        finished."""
        config = read_config(self.folder)
        if config:
            lock(self.folder)
        if not config or not has_trained(self.folder):
            return {}, False
        finished = (self.folder / "summary.json").exists()
        if finished:
            self._clear()
        return config, finished

    def open(self, **config) -> None:
        """Start to write. config: what is known of data and model by now; a resumed run must find
        the same. Raises UserError."""
        args, folder = self.args, self.folder
        flags = {key: value for key, value in vars(args).items() if key not in ("resume", "given")}
        names = (args.model, getattr(args, "ref_model", None))
        config["model_fingerprint"] = [model_fingerprint(name) for name in names if name]
        self.config = {"script": self.script, "flags": flags, **config}
        self._first = ranks.first_rank(self._start)
        when_stopped(f"go on with --resume {folder}")
        self._saved, self._tracker = time.monotonic(), None
        if ranks.rank():
            return
        if args.track:
            self._tracker = Tracker(args, folder, self._first.get("run_id"), self._kept)
        self._metrics = open(folder / "metrics.jsonl", "ab")  # noqa: SIM115 (open for the run)
        # lines after the checkpoint will be written again
        self._metrics.truncate(self.state["metrics_offset"] if self.state else 0)
        resumed = "resumed" if self.state else "no checkpoint yet: from its start"
        print(f"run   {folder}" + (f" ({resumed})" if args.resume else ""))

    def _start(self) -> dict:
        """-> config.json, written where the run is new."""
        if self._first:
            self._check_same(self.config)
            return self._first
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        self._folder(self.script, self.args)  # another process may have been here in the meantime
        made = {"versions": versions(), "git_commit": git_commit(), "command": sys.argv}
        made |= {"given": getattr(self.args, "given", {}), "run_id": secrets.token_hex(4)}
        write_json(self.folder / "config.json", self.config | made)
        return self.config | made

    def _check_same(self, config: dict) -> None:
        """Raise UserError where the run in the folder was started otherwise."""
        old, new = self._first, json.loads(json.dumps(config))
        for key in sorted(set(new["flags"]) - free_flags(self.script)):
            before, now = old["flags"].get(key), new["flags"][key]
            if before != now:
                change = f"--{key} was {before!r} and is now {now!r}"
                raise UserError(f"--resume: {change}; give the flags of the first start")
        for key in sorted(set(new) - {"flags"}):
            if old.get(key) != new[key]:
                change = f"{key.replace('_', ' ')} differs from the first start"
                raise UserError(f"--resume: {change}; has a data file or the model changed?")

    def _clear(self) -> None:
        """Remove what only an unfinished run needs."""
        parts = ["checkpoint.tmp", "checkpoint.old", "final.tmp", "final.old"]
        for name in [*parts, "best.tmp", "best.old"]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if not self.args.keep_checkpoint:
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)

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
        if ranks.rank():
            return
        record = {"step": step, **values}
        record |= {f"time/{name}": seconds for name, seconds in self.rounded_time().items()}
        self._metrics.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._metrics.flush()
        if self._tracker:
            self._tracker.log(record)
        if line:
            tqdm.write(line)

    def log_training(self, stage: str, step: int, steps: int, values: dict, others: dict) -> None:
        """A log line of the loop: values go under <stage>/ and into the human line, others not."""
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        named = {f"{stage}/{key}": value for key, value in values.items()}
        self.log(step, {**others, **named}, f"{stage} {step}/{steps}  {text}")

    def due(self, done: int, steps: int) -> bool:
        """Whether a checkpoint is written after step `done` of `steps`: by --save_every or
        --save_minutes, not after the last; or because a signal asks the run to stop. All ranks
        agree, though a signal or the clock reaches them at different steps."""
        late = time.monotonic() - self._saved >= 60 * (self.args.save_minutes or float("inf"))
        found = ranks.all_max(np.array([_stop.number or 0, late]))
        _stop.number = int(found[0]) or None
        often = self.args.save_every and done % self.args.save_every == 0
        return bool(_stop.number) or (done < steps and bool(found[1] or often))

    def save_checkpoint(self, state: dict, model, optimizer) -> None:
        """Everything the loop needs to go on as if nothing had happened: its own state, and model,
        optimizer and RNG (see restore). Raises Stopped where a signal has asked for it."""
        arrays = {k: torch.tensor(v) for k, v in state.items() if isinstance(v, np.ndarray)}
        state, done = {**state, **arrays}, state["counts"]["steps"]
        if ranks.rank() == 0:
            os.fsync(self._metrics.fileno())
            state["metrics_offset"] = self._metrics.tell()
        state |= {"time": self.time, "seconds": self.seconds}
        write_checkpoint(self.folder, state, model, optimizer)
        self._saved = time.monotonic()
        if _stop.number:
            raise Stopped(_stop.number, f"checkpoint of step {done} in {self.folder}; ")

    def logged(self, prefix: str, step: int) -> dict[str, dict]:
        """What a resumed run had logged at a step under prefix/label/key -> {label: {key: value}};
        {} where there is none."""
        rows = {}
        for record in self._kept:
            for key, value in record.items() if record["step"] == step else ():
                if key.startswith(f"{prefix}/"):
                    label, name = key.removeprefix(f"{prefix}/").rsplit("/", 1)
                    rows.setdefault(label, {})[name] = value
        return rows

    def cost(self, *parts: str) -> dict[str, float]:
        """Seconds of these parts as multiples of the training's; total: with training itself."""
        result = {part: self.time.get(part, 0.0) / self.time["train"] for part in parts}
        return {**result, "total": 1 + sum(result.values())}

    def save_model(self, model, tokenizer, name: str = "final", dtype=None) -> None:
        """Model (or adapter) and tokenizer in Hugging Face format under <name>/, complete or not
        there at all. The trained weights are rounded to dtype, in place; None: kept as they are."""
        temporary, final = self.folder / f"{name}.tmp", self.folder / name
        own = rounded_state(model, dtype)
        if ranks.rank():
            return ranks.barrier()
        shutil.rmtree(temporary, ignore_errors=True)
        lm = causal_lm(model)
        if model is not lm:  # else PEFT asks the hub for the base's vocabulary
            own["save_embedding_layers"] = False
        lm.config.use_cache = True  # as it came: users generate with what we save
        generation, ends = lm.generation_config, data.end_tokens(tokenizer)
        lm.generation_config = type(generation)()  # transformers 5.0 refuses a hub model's own
        with no_bars():
            model.save_pretrained(temporary, **own)
        if not all(map(is_hub_id, (lm.name_or_path, lm.config.name_or_path))):
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's card would name the path
        lm.config.use_cache, lm.generation_config = False, generation
        generation = generation.to_diff_dict()
        generation.pop("_from_model_config", None)  # else config.json could take its place
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        write_json(temporary / "generation_config.json", generation)
        tokenizer.save_pretrained(temporary)
        about = {"script": self.script, "base": lasting_name(self.args.model)}
        about |= {"template": self.args.template, "max_length": self.args.max_length}
        about["template_date"] = self.args.template_date
        write_json(temporary / "cleansft.json", about | {"seed": self.args.seed})
        replace_folder(temporary, final)
        ranks.barrier()

    def finish(self, summary: dict) -> None:
        """Write summary.json: the sign that the run is complete."""
        if ranks.rank():
            return
        parts = self.rounded_time()
        counted = {"left_out": self.config.get("left_out", {})}
        summary = {**summary, **counted, "seconds": round(self.seconds, 3), "time": parts}
        write_json(self.folder / "summary.json", summary)
        self._metrics.close()
        if self._tracker:
            self._tracker.close()
        self._clear()
        spent = ", ".join(f"{name} {value:.0f} s" for name, value in parts.items())
        print(f"done  {self.folder}/summary.json after {summary['seconds']:.0f} s: {spent}")

"""The run folder of runs.py: signals, locks, foreign folders, resumed runs and their flags,
checkpoints, trackers, what the machine lacks."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    adamw,
    error_line,
    killed_at,
    read_json,
    read_jsonl,
    records,
    same,
    to_jsonl,
    weights,
)

import common
import dynamics
import dynamix_sft
import models
import runs
import sftmix
from data import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sftmix": sftmix, "dynamix_sft": dynamix_sft, "dynamics": dynamics}
SHORT = ["--template", "plain", "--lr", "1e-3", "--log_every", "1", "--batch_size", "4"]
FLAGS = {
    "sftmix": [*SHORT, "--data", "toy/copy#12", "--num_checkpoints", "2"],
    "dynamix_sft": [*SHORT, "--data", "toy/copy#8", "toy/add#8", "--reward_batch_size", "2"],
    "dynamics": [*SHORT, "--data", "toy/copy#20", "--eval_data", "toy/add#8", "--targets", "add"],
}
FLAGS["dynamix_sft"] += ["--update_every", "2"]
FLAGS["dynamics"] += ["--probe_steps", "1", "--eval_limit", "4", "--updates", "0,2"]


def start(script, folder, *flags):
    SCRIPTS[script].main([*FLAGS[script], "--output_dir", str(folder), *map(str, flags)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of SFTMix in 6 steps -> its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start("sftmix", folder, "--max_steps", 6, "--keep_checkpoint", "--save_every", 2)
    return folder


@pytest.fixture
def cut(tmp_path):
    """The same run, killed after step 5, its checkpoint of step 4."""
    return cut_run(tmp_path / "run")


def cut_run(folder, *flags):
    with killed_at(5, "train/loss"):
        start("sftmix", folder, "--max_steps", 6, "--save_every", 2, *flags)
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------ signals


def spawn(script, folder, *flags):
    """The script as a process of its own, once it has logged 3 steps of training."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *FLAGS[script], *map(str, flags)]
    command += ["--output_dir", str(folder)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **streams)
    end, metrics = time.monotonic() + 120, folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b'/grad_norm"') >= 3:
            return process
        time.sleep(0.02)
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(
    "script, number, status",
    [("sftmix", "TERM", 143), ("dynamix_sft", "INT", 130), ("dynamics", "HUP", 129)],
)
def test_a_signal_saves_a_checkpoint(tmp_path, script, number, status, capsys):
    """The step is finished, the checkpoint holds it, and the resumed run is the uninterrupted one;
    so it is after a SIGKILL, from the last checkpoint."""
    length = ["--max_steps", 40, "--save_every", 0]
    process = spawn(script, tmp_path / "run", *length)
    process.send_signal(getattr(signal, f"SIG{number}"))
    *_, line = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == status
    step = torch.load(tmp_path / "run" / "checkpoint" / "state.pt")["counts"]["steps"]
    logged = records(tmp_path / "run")[-1]["step"]
    assert step == logged >= 3
    saved = f"checkpoint of step {step} in {tmp_path / 'run'}"
    assert line == f"SIG{number}: stopped; {saved}; go on with --resume {tmp_path / 'run'}"
    start(script, tmp_path / "run", "--resume")
    start(script, tmp_path / "whole", *length)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    process = spawn(script, tmp_path / "killed", *length[:2], "--save_every", 2)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    start(script, tmp_path / "killed", "--resume")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def in_child(work):
    """work() in a forked child -> its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_signal_ends_at_once():
    """... by the system's own handler, even within a step that takes long."""

    @runs.command_line
    @runs.finish_step()
    def main(argv):
        for _ in range(argv):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    assert in_child(lambda: main(1)) == 143  # after the loop, of which there was no other step
    assert in_child(lambda: main(2)) == -signal.SIGTERM


def test_a_signal_outside_of_training_ends_at_once(tmp_path, capsys, monkeypatch):
    """Nothing is waited for, nothing is written, the handlers are the caller's again."""
    before = signal.getsignal(signal.SIGTERM)

    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(common, "load_datasets", load)
    with pytest.raises(SystemExit) as stop:
        start("sftmix", tmp_path / "run")
    assert stop.value.code == 143
    assert capsys.readouterr().err == "SIGTERM: stopped; nothing was written\n"
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_save_minutes(tmp_path, monkeypatch):
    """A checkpoint as soon as the last one is so many minutes old; 0: never."""
    saved, clock = [], iter(range(0, 10**9, 61))
    save = common.Run.save_checkpoint

    def save_checkpoint(run, state, *rest):
        saved.append(state["counts"]["steps"])
        return save(run, state, *rest)

    monkeypatch.setattr(common.Run, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))  # a minute a look
    short = ["--mu", "0", "--save_every", "0", "--max_steps", "8"]
    for minutes, expected in ((15, []), (1, list(range(1, 8))), (3.05, [3, 6]), (0, [])):
        saved.clear()
        start("sftmix", tmp_path / str(minutes), *short, "--save_minutes", minutes)
        assert saved == expected, minutes
    assert sftmix.parse_args([]).save_minutes == 15


# ------------------------------------------------------------------------ one process a folder


def test_a_second_process_is_refused(cut, capsys):
    """... by one line, before data and model are loaded, and the folder stays as it is."""
    before = files(cut)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
    holder += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(cut / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        line = error_line(capsys, start, "sftmix", cut, "--resume")
        assert f"{cut}: another process writes into this folder" in line
        process.stdin.close()
    assert files(cut) == before
    start("sftmix", cut, "--resume")  # it is free again


def test_the_folder_is_held_until_the_command_ends(tmp_path, monkeypatch):
    free = []

    def look(*args, **options):
        with open(tmp_path / "run" / ".lock", "ab") as stream:
            try:
                runs.fcntl.flock(stream, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)

    monkeypatch.setattr(sftmix.plots, "draw", look)
    start("sftmix", tmp_path / "run", "--max_steps", 2)
    look()
    assert free == [False, False, True]  # twice drawn


def test_what_a_run_would_overwrite_is_refused(tmp_path, whole, capsys):
    """Every name that a run writes; other files do not matter."""
    known = {*runs.WRITTEN.split(), "config.json", ".lock"}
    assert {path.name for path in whole.iterdir()} <= known
    figures = {plot.__name__[5:] for plots in sftmix.plots.FIGURES.values() for plot in plots}
    assert {f"{name}.png" for name in figures} <= known
    for name in runs.WRITTEN.split():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        (folder / "notes.txt").write_text("mine")
        line = error_line(capsys, start, "sftmix", folder, "--max_steps", 2)
        assert f"--output_dir {folder}: holds {name}, which is not of a run" in line
        assert sorted(path.name for path in folder.iterdir()) == sorted([name, "notes.txt"])
    (folder / name).unlink()
    start("sftmix", folder, "--max_steps", 2)
    assert (folder / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------ resumed runs


def test_resume_starts_a_run_where_there_is_none(tmp_path, whole):
    start("sftmix", tmp_path / "run", "--max_steps", 6, "--save_every", 2, "--resume")
    assert records(tmp_path / "run") == records(whole)


def test_resume_alone_takes_every_flag(cut, whole, capsys):
    """... also those that the first start has derived, and in a folder that was moved; a wrong
    folder starts nothing."""
    cut = cut.rename(cut.with_name("moved"))
    sftmix.main(["--resume", str(cut)])
    assert not cut.with_name("run").exists()
    assert records(cut) == records(whole)
    assert same(weights(cut), weights(whole))
    line = error_line(capsys, sftmix.main, ["--resume", str(cut / "nowhere")])
    assert "there is no run in this folder; to start one give its flags, too" in line
    assert not (cut / "nowhere").exists()
    assert "which run?" in error_line(capsys, sftmix.main, ["--resume"])
    line = error_line(capsys, sftmix.main, ["--resume", str(cut), "--output_dir", "other"])
    assert "--output_dir names another folder" in line
    assert "made by sftmix.py" in error_line(capsys, dynamics.main, ["--resume", str(cut)])


def test_flags_beside_resume(cut, capsys, monkeypatch):
    """Those that were named must agree, as they were named or as what became of them; the harmless
    ones win. All before data and model are loaded."""
    monkeypatch.setattr(common, "load_datasets", lambda *_: 1 / 0)
    agreeing = ["--dtype", "auto", "--max_steps", "6", "--max_length", "2048", "--template"]
    first = sftmix.parse_args(["--resume", str(cut)])
    assert (first.template, first.max_steps, first.epochs) == ("plain", 6, None)
    for value in ("plain", "alpaca"):
        flags = ["--resume", str(cut), *agreeing, value]
        if value == "alpaca":
            line = error_line(capsys, sftmix.main, flags)
            assert "--resume: --template was 'plain' and is now 'alpaca'" in line
        else:
            with pytest.raises(ZeroDivisionError):
                sftmix.main(flags)
    for flag, value in (("--dtype", "bf16"), ("--micro_batch_size", "2"), ("--alpha", "0.4")):
        line = error_line(capsys, sftmix.main, ["--resume", str(cut), flag, value])
        assert f"--resume: {flag} was" in line
    free = "--log_every 3 --eval_every 5 --save_every 7 --save_minutes 9 --save_dtype bf16"
    args = sftmix.parse_args(["--resume", str(cut), *free.split(), "--keep_checkpoint"])
    assert (args.log_every, args.eval_every, args.save_every, args.save_minutes) == (3, 5, 7, 9)
    assert args.save_dtype == "bf16" and args.keep_checkpoint and args.lr == 1e-3
    assert "eval_every" not in runs.free_flags("dynamics")


def test_a_run_that_has_trained_nothing_is_started_anew(tmp_path, whole, monkeypatch):
    """After an error in the first step the corrected command runs in the same folder, with --resume
    or without; and with the other flags of the first start, where it names one alone."""
    flags = ["--max_steps", 6, "--save_every", 2]

    def failing(*args):
        raise MemoryError

    for number, again in enumerate(([], ["--resume", "--micro_batch_size", 8], None)):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(common, "optimizer_step", failing)
            start("sftmix", folder, *flags, "--micro_batch_size", 16)
        if again is None:
            sftmix.main(["--resume", str(folder), "--micro_batch_size", "8"])
        else:
            start("sftmix", folder, *flags, *again)
        assert records(folder) == records(whole)
        assert read_json(folder / "config.json")["flags"]["micro_batch_size"] == 8


def test_resume_notices_another_model(tmp_path, model_folder, capsys):
    """Other weights, not another time or place."""
    name = tmp_path / "model"
    shutil.copytree(model_folder("llama"), name)
    folder = cut_run(tmp_path / "run", "--model", name)
    own = models.model_fingerprint(str(name))
    shutil.copytree(name, tmp_path / "copy")
    (tmp_path / "copy" / ".hidden").write_text("x")
    assert models.model_fingerprint(str(tmp_path / "copy")) == own
    model = common.load_model(str(name), torch.device("cpu"))[0]
    next(model.parameters()).data[0, 0] += 1
    model.save_pretrained(name)
    assert models.model_fingerprint(str(name)) != own
    line = error_line(capsys, start, "sftmix", folder, "--resume")
    assert "model fingerprint differs from the first start" in line


def test_a_large_file_is_sampled_all_over(tmp_path):
    """64 pieces: one that changes anywhere in a trained model's file changes nearly everywhere."""
    content = bytearray(64 * 2**20)
    (tmp_path / "model.safetensors").write_bytes(content)
    own = models.model_fingerprint(str(tmp_path))
    for at in (0, 5 * 2**20 + 1, 63 * 2**20):
        changed = bytearray(content)
        changed[at] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert models.model_fingerprint(str(tmp_path)) != own


def test_resume_notices_data_with_the_same_time_stamp(tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "response": "hello"} for i in range(12)]
    file = tmp_path / "train.jsonl"
    to_jsonl(file, rows)
    folder, stat = cut_run(tmp_path / "run", "--data", file), file.stat()
    to_jsonl(file, [{**row, "response": "jello"} for row in rows])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    line = error_line(capsys, start, "sftmix", folder, "--data", file, "--resume")
    assert "data fingerprint differs from the first start" in line


def test_adapter_files_are_the_same_bytes(tmp_path):
    lora = ["--lora_rank", 2, "--mu", "0"]
    flags = ["--max_steps", 6, "--save_every", 2, *lora]
    start("sftmix", tmp_path / "whole", *flags)
    cut_run(tmp_path / "run", *lora)
    start("sftmix", tmp_path / "run", *flags, "--resume")
    one, other = (files(tmp_path / name / "final") for name in ("whole", "run"))
    assert list(one.values()) == list(other.values()) and len(one) > 4
    config = read_json(tmp_path / "run" / "final" / "adapter_config.json")
    assert repr(config["lora_alpha"]) == "4.0"
    assert config["target_modules"] == sorted(config["target_modules"])  # not as the hashes are


# ------------------------------------------------------------------------ checkpoints


def test_a_finished_run_has_no_checkpoint(whole, cut):
    assert (whole / "checkpoint" / "state.pt").exists()  # --keep_checkpoint
    start("sftmix", cut, "--resume")
    assert not list(cut.glob("checkpoint*"))
    shutil.copytree(whole / "checkpoint", cut / "checkpoint")  # killed before it was removed
    start("sftmix", cut, "--resume")
    assert not list(cut.glob("checkpoint*"))


def test_sha256_of_a_checkpoint(cut, capsys):
    """One flipped bit anywhere is noticed, as are a cut and a missing file; nothing is touched."""
    state = cut / "checkpoint" / "state.pt"
    content = state.read_bytes()
    listed = (cut / "checkpoint" / "SHA256SUMS").read_text()
    assert listed == f"{hashlib.sha256(content).hexdigest()}  state.pt\n"
    for at in (100, len(content) // 2, len(content) - 5):
        damaged = bytearray(content)
        damaged[at] ^= 0x40
        state.write_bytes(damaged)
        line = error_line(capsys, start, "sftmix", cut, "--resume")
        assert f"{state}: is not what was written (its sha256 differs)" in line
    state.write_bytes(content[:-9])
    assert "sha256 differs" in error_line(capsys, start, "sftmix", cut, "--resume")
    state.unlink()
    assert "is incomplete" in error_line(capsys, start, "sftmix", cut, "--resume")
    assert not (cut / "final").exists()


def test_the_previous_checkpoint_stays_until_the_new_one_is_whole(cut, monkeypatch, whole):
    """A disk that is full in the middle of a save, and a kill between the two renames."""
    saved, step = torch.save, torch.load(cut / "checkpoint" / "state.pt")["counts"]["steps"]
    assert step == 4

    def full(state, stream):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit):
        start("sftmix", cut, "--resume", "--save_every", 1)
    monkeypatch.setattr(torch, "save", saved)
    assert runs.read_checkpoint(cut)["counts"]["steps"] == 4
    (cut / "checkpoint").rename(cut / "checkpoint.old")
    assert runs.read_checkpoint(cut)["counts"]["steps"] == 4
    start("sftmix", cut, "--resume")
    assert records(cut) == records(whole)


def test_metrics_that_are_not_those_of_the_checkpoint(cut, capsys):
    metrics = cut / "metrics.jsonl"
    content = metrics.read_bytes()
    size = runs.read_checkpoint(cut)["metrics_offset"]
    for bad, words in (
        (content[:150], f"has 150 bytes, {size:,} when the checkpoint was written"),
        (b"", f"has 0 bytes, {size:,} when"),
        (b"oops" + content[4:], "metrics.jsonl, row 1: is no line of metrics"),
    ):
        metrics.write_bytes(bad)
        assert words in error_line(capsys, start, "sftmix", cut, "--resume")
        assert metrics.read_bytes() == bad
    metrics.write_bytes(content + b'{"step": 5, "tra')  # killed in the middle of a later line
    start("sftmix", cut, "--resume")


@pytest.mark.parametrize("text", ["", "{}", '{"script": "sftmix", "fl', "[]"])
def test_a_damaged_config_is_one_line(cut, capsys, text):
    (cut / "config.json").write_text(text)
    line = error_line(capsys, start, "sftmix", cut, "--resume")
    assert f"{cut / 'config.json'}: is damaged, or not of a run" in line


# ------------------------------------------------------------------------ trackers


def test_tensorboard_has_every_step_once(tmp_path):
    """Read back from the event files after a kill and a resume: the numbers of metrics.jsonl."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = cut_run(tmp_path / "run", "--track", "tensorboard")
    start("sftmix", folder, "--resume")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    found = records(folder)
    for tag, key in (("train/loss", "train/loss"), ("epoch", "epoch"), ("reference/ntp",) * 2):
        own = [(r["step"], r[key]) for r in found if key in r and f"{tag.split('/')[0]}" != "x"]
        if tag == "epoch":
            own = [(r["step"], r["epoch"]) for r in found if "train/loss" in r]
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in got] == [step for step, _ in own] == list(range(1, 7))
        assert [value for _, value in got] == pytest.approx([value for _, value in own])
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag


def fake_trackers(monkeypatch):
    """Both libraries replaced by what they promise -> a list that both write into."""
    got, inits = [], []

    class Writer:
        def __init__(self, folder):
            got.clear()  # a new folder

        def add_scalar(self, name, value, step):
            got.append((step, name, value))

        def close(self):
            got.append("closed")

    def log(values, step):
        if step >= len(rows):  # W&B takes no second row of a step
            rows.append(values)

    rows = []
    wandb = {"init": lambda **options: inits.append(options), "log": log}
    wandb |= {"define_metric": lambda *args, **options: None, "finish": lambda: None}
    wandb["__spec__"] = runs.importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**wandb))
    tensorboard = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    return got, rows, inits


def test_trackers_log_each_line_once_after_a_kill(tmp_path, monkeypatch):
    """TensorBoard: every tag once a step, stages share none. W&B: a row a line of metrics.jsonl,
    under one random id that config.json keeps."""
    got, rows, inits = fake_trackers(monkeypatch)
    folder = cut_run(tmp_path / "board", "--track", "tensorboard")
    start("sftmix", folder, "--resume")
    assert got[-1] == "closed"
    numbers = {(step, tag): value for step, tag, value in got[:-1]}
    assert len(numbers) == len(got) - 1
    for record in read_jsonl(folder / "metrics.jsonl"):
        prefix = "reference/" if "reference/ntp" in record else ""
        assert numbers[record["step"], f"{prefix}epoch"] == record["epoch"]
    folder = cut_run(tmp_path / "wandb", "--track", "wandb")
    killed = len(rows)
    start("sftmix", folder, "--resume")
    found = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [record["step"] for record in found]
    assert killed < len(rows) == len(found)
    first, second = inits
    assert first["id"] == second["id"] == read_json(folder / "config.json")["run_id"]
    assert len(first["id"]) == 8 and first["id"] not in folder.name
    cut_run(tmp_path / "other", "--track", "wandb")
    assert inits[-1]["id"] != first["id"]


# ------------------------------------------------------------------------ what the machine lacks


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "device: x/y; make room"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "Read-only file system: x; make"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "z"), "too long: z; make room or"),
        (PermissionError(errno.EACCES, "Permission denied", "z"), "Permission denied: z; make"),
        (ConnectionError("no network"), "error: no network"),
        (MemoryError(), "out of memory (MemoryError); try a smaller --micro_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "(CUDA out of memory. Tried);"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 99"), "--gradient_checkpoint"),
    ],
)
def test_disk_and_memory_are_one_line(tmp_path, capsys, monkeypatch, error, words):
    """... the last on stderr, once training runs; the bars are closed."""

    def failing(*args):
        raise error

    monkeypatch.setattr(common, "optimizer_step", failing)
    assert words in error_line(capsys, start, "sftmix", tmp_path / "run", "--mu", "0")


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "optimizer_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start("sftmix", tmp_path / "run", "--mu", "0")
    assert not runs._locks


def test_a_full_disk_behind_an_error_of_torch():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None
    except RuntimeError as error:
        assert runs.machine_trouble(error).startswith("No space left on device; make room")
    assert runs.machine_trouble(RuntimeError("shapes do not fit")) is None


# ------------------------------------------------------------------------ before any training


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data toy/copy#1", "--data: 1 examples are too few for --split halves by confidence"),
        ("--data toy/copy#1 --partition random", "too few for --split halves by random"),
        ("--data toy/copy#2 --split thirds", "2 examples are too few for --split thirds"),
        ("--data toy/copy#1 --mu 0 --ntp_on unconfident", "too few for --split halves"),
        ("--data toy/copy#9 --max_steps 1", "--num_checkpoints 2: the reference trains for only 1"),
        ("--data toy/copy#9 --select longest --select_n 10", "--select_n 10: only 9 rows"),
    ],
)
def test_too_few_rows_are_noticed_before_training(tmp_path, capsys, flags, words):
    line = error_line(capsys, start, "sftmix", tmp_path / "run", *flags.split())
    assert words in line
    assert not (tmp_path / "run").exists()


def test_foreign_checkpoint_and_no_config(cut, capsys):
    (cut / "config.json").unlink()
    line = error_line(capsys, start, "sftmix", cut, "--resume")
    assert "which is not of a run (no config.json)" in line


def test_given_flags_are_kept(tmp_path):
    args = sftmix.parse_args(["--lr", "0.5", "--data", "a", "b"])
    assert args.given == {"lr": 0.5, "data": ["a", "b"]}
    args = dynamix_sft.parse_args(["--no-prior", "--output_dir", str(tmp_path)])
    assert args.given == {"prior": False, "output_dir": str(tmp_path)}
    run = common.Run("dynamix_sft", args)
    run.open(data_fingerprint="x")
    runs.release_locks()
    config = read_json(tmp_path / "config.json")
    assert config["given"] == args.given and config["data_fingerprint"] == "x"
    assert "given" not in config["flags"] and "resume" not in config["flags"]
    with pytest.raises(UserError, match="data fingerprint differs"):
        (tmp_path / "checkpoint").mkdir()
        state = {"metrics_offset": 0, "time": {}, "seconds": 0.0}
        model = common.tiny_model()
        runs.write_checkpoint(tmp_path, state, model, adamw(model))
        again = Namespace(**{**vars(args), "resume": True})
        common.Run("dynamix_sft", again).open(data_fingerprint="y")
    runs.release_locks()
    assert json.loads((tmp_path / "config.json").read_text()) == config

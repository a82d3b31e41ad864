"""Several processes: torchrun with FSDP2 on CPUs gives what one process gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import killed_at, read_json, records, same, weights
from safetensors.torch import load_file

import common
import dynamics
import dynamix_sft
import sftmix

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sftmix": sftmix, "dynamix_sft": dynamix_sft, "dynamics": dynamics}
SHORT = "--template plain --lr 1e-3 --log_every 1 --micro_batch_size 2 --save_every 2 --batch_size"
TWO = "--data toy/copy#20 toy/add#21"
JOBS = {
    # 5 and 7 examples a step: micro-batches of which one rank has fewer, or none
    "sftmix": f"{SHORT} 6 {TWO} --max_steps 4 --num_checkpoints 2 --eval_data toy/sort#7",
    "dynamix_sft": f"{SHORT} 7 {TWO} --max_steps 6 --update_every 2 --reward_batch_size 3",
    "dynamics": f"{SHORT} 5 {TWO} --max_steps 5 --probe_steps 1 --eval_limit 5 --updates 0,3 "
    "--eval_data toy/sort#12 toy/copy#12 --targets sort --constraints copy --lora_rank 4 "
    "--gradient_checkpointing",
}


def flags(name, folder):
    return [*JOBS[name].split(), "--output_dir", str(folder)]


def start(path, jobs, processes=2):
    """-> the finished torchrun of tests/ranks_worker.py, with all that was printed."""
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--standalone", str(ROOT / "tests" / "ranks_worker.py"), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env=environment, timeout=240, **streams)


def torchrun(path, jobs, processes=2):
    """-> what tests/ranks_worker.py found out."""
    done = start(path, jobs, processes)
    assert done.returncode == 0, done.stdout[-4000:]
    return read_json(f"{path}.out")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `NAME-1` of one process and `NAME-2` of two for every job, and `cut-2`: SFTMix
    on two ranks, stopped by a signal to rank 1 after step 3, resumed on two ranks in `resumed-2`;
    `from-1`: DynamixSFT killed on one process and resumed on two. -> folder, results"""
    place = tmp_path_factory.mktemp("ranks")
    for name, script in SCRIPTS.items():
        script.main(flags(name, place / f"{name}-1"))
    with killed_at(5, "train/loss"):
        dynamix_sft.main(flags("dynamix_sft", place / "from-1"))
    jobs = [{"script": name, "flags": flags(name, place / f"{name}-2")} for name in SCRIPTS]
    cut, resumed = place / "cut-2", place / "resumed-2"
    jobs.append({"script": "sftmix", "flags": flags("sftmix", cut), "stop": [1, 3]})
    again = {"script": "sftmix", "flags": ["--resume", str(resumed)]}
    jobs.append({**again, "copy": [str(cut), str(resumed)]})
    jobs.append({"script": "dynamix_sft", "flags": ["--resume", str(place / "from-1")]})
    return place, torchrun(place / "jobs.json", jobs)


def close(one, other, limit=1e-6):
    """Every metric but grad_norm and what is far from 1 (perplexity, λ) agrees to limit."""
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, (int, float)):
                assert b[key] == pytest.approx(value, rel=10 * limit, abs=limit), key


def plain(folder):
    skipped = ("grad_norm", "ppl", "lambda", "epsilon")
    found = []
    for record in records(folder):
        found.append({k: v for k, v in record.items() if not k.endswith(skipped)})
    return found


def final(folder):
    (file,) = (folder / "final").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", list(JOBS))
def test_two_ranks_give_what_one_process_gives(place, name):
    """Losses and rewards to 1e-6, the same draws and mixtures to 1e-5, the same files."""
    folder, results = place
    assert [job["status"] for job in results] == [0, 0, 0, 143, 0, 0]
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    close(plain(one), plain(two))
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    assert names[0] == names[1]
    a, b = final(one), final(two)
    assert max((a[key].float() - b[key].float()).abs().max() for key in a) < 1e-4  # lr 1e-3


def test_confidence_is_the_same(place):
    folder, _ = place
    one, two = (
        [json.loads(line) for line in (folder / name / "confidence.jsonl").open()][1:]
        for name in ("sftmix-1", "sftmix-2")
    )
    for a, b in zip(one, two, strict=True):
        assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-5)
        assert (a["index"], a["source"]) == (b["index"], b["source"])


def test_what_a_rank_holds_falls_as_one_over_n(place):
    """Weights and moments of rank 0 and rank 1 together are those of one process (fully_shard pads
    nothing that is counted here)."""
    _, results = place
    total = 3 * sum(p.numel() for p in common.tiny_model().parameters())
    for job in (results[0], results[1]):
        assert sum(job["held"]) == total
        assert max(job["held"]) < 0.51 * total


def test_a_signal_to_one_rank_stops_all_at_the_same_step(place):
    """... with a checkpoint, from which two ranks go on bit for bit, and one process to 1e-6."""
    folder, _ = place
    state = torch.load(folder / "cut-2" / "checkpoint" / "state.pt", weights_only=True)
    assert (state["stage"], state["counts"]["steps"], state["world"]) == ("reference", 3, 2)
    assert records(folder / "resumed-2") == records(folder / "sftmix-2")
    assert same(weights(folder / "resumed-2"), weights(folder / "sftmix-2"))
    shutil.copytree(folder / "cut-2", folder / "resumed-1")
    sftmix.main(["--resume", str(folder / "resumed-1")])
    close(plain(folder / "resumed-1"), plain(folder / "sftmix-2"))


def test_a_rank_that_fails_ends_all_with_one_line(tmp_path):
    job = {"script": "sftmix", "flags": flags("sftmix", tmp_path / "run"), "error": [1, 3]}
    done = start(tmp_path / "jobs.json", [job])
    said = [text for text in done.stdout.splitlines() if "error: " in text]
    assert done.returncode == 1 and said == ["error: rank 1 is unwell"]
    assert "[rank" not in done.stdout  # a rank's traceback
    assert (tmp_path / "run" / "checkpoint" / "SHA256SUMS").exists()


def test_a_run_of_one_process_goes_on_with_two(place):
    folder, _ = place
    close(plain(folder / "from-1"), plain(folder / "dynamix_sft-1"))


def test_samplers_decide_alike(tmp_path):
    """MultiDDS, MultiUAT and HBO on two ranks: the rewards, mixtures and groups of one process."""
    names, jobs = ("multidds", "multiuat", "hbo"), []
    short = f"{SHORT} 7 --data toy/copy#30 toy/add#21 --max_steps 5 --update_every 2"
    for name in names:
        own = [*short.split(), "--reward_batch_size", "3", "--sampling", name, "--output_dir"]
        dynamix_sft.main([*own, str(tmp_path / f"{name}-1")])
        jobs.append({"script": "dynamix_sft", "flags": [*own, str(tmp_path / f"{name}-2")]})
    torchrun(tmp_path / "jobs.json", jobs)
    for name in names:
        one, two = plain(tmp_path / f"{name}-1"), plain(tmp_path / f"{name}-2")
        assert sum("reward/copy" in record for record in one) == 2
        close(one, two)


def test_micro_batches_of_ranks(monkeypatch):
    """Every rank gets as many, together they are the batch, each example once; long ones first."""
    lengths = [3, 9, 5, 1, 7, 4, 8]
    for world in (1, 2, 3, 8):
        found = []
        for rank in range(world):
            monkeypatch.setattr(common.ranks, "world", lambda world=world: world)
            monkeypatch.setattr(common.ranks, "rank", lambda rank=rank: rank)
            found.append(common.micro_batches(range(7), lengths, 2))
        assert len({len(parts) for parts in found}) == 1
        assert len(found[0]) == -(-7 // (2 * world))
        taken = [i for parts in found for part in parts for i in part]
        assert sorted(taken) == list(range(7))
        assert found[0][0][0] == 1  # the longest

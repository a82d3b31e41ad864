"""benchmarks/speed.py: its count of FLOP by hand, a small run of each way to train, and
docs/performance.md's table of estimates."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import common
import models
from data import Example

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--throughput --model a --steps 1 --batch_size 2 --micro_batch_size 1 --max_length 16"


@pytest.fixture(scope="module")
def speed():
    """The module; its folder comes last on the path, since it holds files of the scripts' names."""
    sys.path.append(str(ROOT / "benchmarks"))
    specification = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks/speed.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@functools.cache
def shape(speed, name, lora_rank=0):
    """A model of the shape that takes no memory."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(speed.SHAPES[name].config)
        if lora_rank:
            adapter = {"lora_alpha": None, "lora_dropout": 0.0, "seed": 0}
            model = models.add_adapter(model, SimpleNamespace(lora_rank=lora_rank, **adapter))
    if lora_rank:
        models.cast((p for p in model.parameters() if not p.requires_grad), torch.bfloat16)
    return model


def test_flop_by_hand(speed):
    """Two blocks of GPT-2 at hidden 4, vocabulary 10; one example of 3 + 2 tokens, one of 1 + 4."""
    config = transformers.GPT2Config(vocab_size=10, n_embd=4, n_layer=2, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    examples = [Example(np.arange(5), 3, 0), Example(np.arange(5), 1, 1)]
    block = 4 * 12 + 4 * 4 + 4 * 16 + 16 * 4  # qkv, projection, up, down
    attention = 12 * 2 * 4 * 5
    head = 4 * 10 * 6 / 10  # 6 of the 10 tokens are responses
    assert speed.flop_a_token(model, examples) == 6 * 2 * block + attention + 6 * head
    recipe = SimpleNamespace(lora_rank=1, lora_alpha=None, lora_dropout=0.0, seed=0)
    adapter = (4 + 12) + (4 + 4) + (4 + 16) + (16 + 4)
    found = speed.flop_a_token(models.add_adapter(model, recipe), examples)
    assert found == 4 * 2 * block + 6 * 2 * adapter + attention + 4 * head


def test_flop_of_the_published_rate(speed):
    """torchtitan says 33 to 39 % for its 5,762 and 6,667 tokens/s of Llama-3.1-8B at 8,192."""
    examples = [Example(np.zeros(8192, np.int64), 1, 0)]
    flop = speed.flop_a_token(shape(speed, "8b"), examples)
    peak = speed.PEAK["NVIDIA H100 80GB HBM3"]
    assert (5762 * flop / peak, 6667 * flop / peak) == pytest.approx((0.337, 0.390), abs=1e-3)


def test_full_length_and_packed_tokens(speed):
    args = speed.parse_args([*SMALL.split(), "--full_length"])
    work = speed.Workload(args)
    assert {len(example.ids) for example in work.examples} == {16}
    assert {example.start for example in work.examples} == {1}
    assert speed.PlainStep("plain", work, common.tiny_model()).tokens(0) == 2 * 16


def test_defaults_are_the_shape_s(speed):
    args = speed.parse_args(["--model", "8b-lora"])
    assert (args.lora_rank, args.max_length, args.batch_size) == (16, 4096, 32)
    assert not args.gradient_checkpointing
    args = speed.parse_args(["--model", "8b", "--no-gradient_checkpointing", "--batch_size", "3"])
    assert (args.lora_rank, args.gradient_checkpointing, args.batch_size) == (0, False, 3)
    again = speed.parse_args(speed.only("plain", args)[2:])
    assert {**vars(again), "only": None} == vars(args)


def lines(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rates(text):
    """-> tokens a second, FLOP of a token, peak memory of each rank"""
    found = re.search(r"plain: ([\d,]+) tokens/s a rank, ([\d.]+) GFLOP.*memory (.*) GiB", text)
    rate, flop, memory = found.groups()
    return int(rate.replace(",", "")), 1e9 * float(flop), [float(x) for x in memory.split(", ")]


def test_throughput_in_one_process(speed, capsys):
    speed.main([*SMALL.split(), "--lora_rank", "2", "--gradient_checkpointing"])
    rate, flop, memory = rates(capsys.readouterr().out)
    assert rate > 0 and len(memory) == 1
    args = speed.parse_args([*SMALL.split(), "--lora_rank", "2"])
    own = speed.flop_a_token(shape(speed, "a", 2), speed.Workload(args).examples)
    assert flop == pytest.approx(own, rel=1e-3)


def test_throughput_of_two_ranks(speed):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "benchmarks" / "speed.py")
    text = lines([*torchrun, "--nproc_per_node", "2", script, *SMALL.split()])
    rate, flop, memory = rates(text)
    assert rate > 0 and len(memory) == 2
    examples = speed.Workload(speed.parse_args(SMALL.split())).examples
    assert flop == pytest.approx(speed.flop_a_token(shape(speed, "a"), examples), rel=1e-3)


def test_trl_is_asked_for_in_a_line(speed, capsys, monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        speed.main(["--trl"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --trl needs: pip install trl\n"


# ---- docs/performance.md


PARTS = "weights", "gradients", "moments", "head gradient", "gathered", "activations", "logits"


def estimates():
    """The table's rows: shape, LoRA rank, ranks, GB."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (8b|1b), (?:full|LoRA (\d+)) \| (\d+) \| (.*) \|$", text, re.M)


def plan(speed, row, monkeypatch):
    """common.memory_plan of a GPU, of a rank among as many as the row says -> GB"""
    name, lora_rank, world, _ = row
    monkeypatch.setattr(common, "chunk_rows", lambda *_: 1024)  # a GPU's
    monkeypatch.setattr(common.ranks, "active", lambda: int(world) > 1)
    monkeypatch.setattr(common.ranks, "local", lambda p: p.flatten()[:: int(world)])
    args = SimpleNamespace(micro_batch_size=1, max_length=4096, dtype="bf16")
    args.gradient_checkpointing = True
    parts = common.memory_plan(shape(speed, name, int(lora_rank or 0)), args, True)
    return {part: size / 1e9 for part, size in parts.items()}


def test_estimates_are_found():
    assert len(estimates()) == 7


@pytest.mark.parametrize("row", estimates())
def test_table_of_estimates(row, speed, monkeypatch):
    found = plan(speed, row, monkeypatch)
    expected = [f"{found.get(name, 0):.1f}" for name in PARTS]
    without = sum(found.values()) - found["snapshot"]
    expected += [f"{without:.1f}", f"{found['snapshot']:.1f}"]
    assert row[3].split(" | ") == expected

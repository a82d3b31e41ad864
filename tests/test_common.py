"""Model and loss, batches, schedules, run folder and snapshots of common.py."""

import argparse
import datetime
import importlib
import importlib.machinery
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    adamw,
    encode_one,
    error_line,
    killed_at,
    leaves,
    own_logits,
    own_nll,
    plain_step,
    random_model,
    read_json,
    same,
    state_of,
    to_jsonl,
)

import common
import data
import dynamix_sft
import models
import sftmix
from data import Row, UserError

CPU = torch.device("cpu")


def toy_examples(tokenizer, every, template):
    """Every n-th row of the toy data, encoded."""
    rows = data.toy_rows()[::every]
    return data.encode(rows, data.with_template(tokenizer, template), 512)[0]


# ------------------------------------------------------------------------ model and loss


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_head_is_the_models_own(name):
    common.check_head(random_model(name))


def test_unknown_head_is_an_error(monkeypatch):
    def head_without_cap(model):
        return common.Head(model.get_output_embeddings().weight)

    model = random_model("gemma2")
    monkeypatch.setattr(models, "output_head", head_without_cap)
    with pytest.raises(UserError, match="head is not supported"):
        common.check_head(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale, softcap, bias", [(1.0, None, False), (0.3, 5.0, True)])
def test_response_loss_equals_torch(monkeypatch, dtype, scale, softcap, bias):
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 5)
    rng = torch.Generator().manual_seed(0)
    shapes = [(17, 6), (13, 6), (13,)] if bias else [(17, 6), (13, 6)]
    tensors = [torch.randn(*shape, generator=rng, dtype=dtype) for shape in shapes]
    targets = torch.randint(0, 13, (17,), generator=rng)
    ours, exact = leaves(tensors), leaves(tensors)

    head = common.Head(ours[1], ours[2] if bias else None, scale, softcap)
    loss, nll = common.response_loss(ours[0], targets, head)
    (loss / 7).backward()

    logits = scale * torch.nn.functional.linear(*exact)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    exact_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (exact_nll.sum() / 7).backward()

    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert (nll - exact_nll).abs().max() < limit
    assert not nll.requires_grad
    for one, other in zip(ours, exact):
        assert (one.grad - other.grad).abs().max() < limit


def test_no_gradient_work_under_no_grad(monkeypatch):
    calls = []
    product = common.wide_product

    def counted(a, b):
        calls.append(1)
        return product(a, b)

    monkeypatch.setattr(common, "wide_product", counted)
    hidden = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        loss, _ = common.response_loss(hidden, targets, common.Head(weight))
    assert len(calls) == 1
    assert not loss.requires_grad
    frozen, _ = common.response_loss(hidden, targets, common.Head(weight.detach()))
    frozen.backward()
    assert hidden.grad is not None


def detached(module, inputs, output):
    """A forward hook that cuts the gradient."""
    if torch.is_tensor(output):
        return output.detach()
    return output[0].detach(), *output[1:]


def test_lora_with_checkpointing_gets_gradients(tokenizer):
    args = sftmix.parse_args(["--lora_rank", "2", "--gradient_checkpointing"])
    model, _ = common.load_trainable("tiny", args)
    example = encode_one(Row((("user", "u"),), "answer"), tokenizer)
    common.check_gradients(model, example, "fp32")
    assert all(p.grad is None for p in model.parameters())
    cut = common.tiny_model()
    cut.transformer.h[1].register_forward_hook(detached)
    with pytest.raises(UserError, match="get no gradient"):
        common.check_gradients(cut, example, "fp32")


def test_score_is_that_of_unpadded_examples(tokenizer):
    model = random_model("llama")
    examples = toy_examples(tokenizer, 150, "alpaca")
    model.train()
    nll, tokens, correct = common.score(model, examples, 4, "fp32")
    assert model.training
    assert len(nll) == len(tokens) == len(correct) == len(examples)
    for i, example in enumerate(examples):
        logits, targets = own_logits(model, example)
        assert nll[i] == pytest.approx(own_nll(model, example), rel=1e-5)
        assert tokens[i] == example.response_length
        assert correct[i] == (logits.argmax(1) == targets).sum()
    result = common.evaluate(model, {"toy": examples}, 3, "fp32", progress=False)["toy"]
    assert result["nll"] == pytest.approx(nll.sum() / tokens.sum(), rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(result["nll"]))


# ------------------------------------------------------------------------ batches


def test_epoch_batches_cover_everything_once_and_differ_by_epoch():
    epochs = [common.epoch_batches(1003, 32, seed=3, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert max(map(len, batches)) <= 32
        assert min(map(len, batches)) >= 31
    assert any(set(a) != set(b) for a, b in zip(*epochs))
    again = common.epoch_batches(1003, 32, seed=3, epoch=0)
    assert len(again) == len(epochs[0])
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[0]))


def test_data_order_ignores_the_models_rng():
    first = common.epoch_batches(50, 8, 0, 0)
    torch.manual_seed(99)
    np.random.seed(99)
    again = common.epoch_batches(50, 8, 0, 0)
    assert len(first) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))


def log_normal_examples(count, seed=0):
    """Examples of about 100 tokens, of very unlike length."""
    rng, examples = np.random.default_rng(seed), []
    for row in range(count):
        length = int(np.clip(rng.lognormal(4.2, 0.7), 4, 400))
        ids = rng.integers(0, 256, length)
        examples.append(data.Example(ids, int(rng.integers(1, length)), row))
    return examples


def test_batches_are_drawn_uniformly():
    """... over the whole epoch, whatever the lengths: any two examples share a batch as often."""
    together, epochs = np.zeros((24, 24)), 3000
    for epoch in range(epochs):
        for batch in common.epoch_batches(24, 6, 0, epoch):
            together[np.ix_(batch, batch)] += 1
    others = together[~np.eye(24, dtype=bool)] / epochs
    assert np.abs(others - 5 / 23).max() < 5 * np.sqrt(5 / 23 * 18 / 23 / epochs)


def padded(slices):
    return sum(ids.numel() for ids in slices)


def test_slices_save_padding():
    """Micro-batches of 8 of a uniform batch of 32."""
    examples, tokens, whole, sliced = log_normal_examples(960), 0, 0, 0
    lengths = [len(example.ids) for example in examples]
    for batch in common.epoch_batches(960, 32, 0, 0):
        for micro in common.micro_batches(batch, [lengths[i] for i in batch], 8):
            tokens += sum(lengths[i] for i in micro)
            whole += 8 * max(lengths[i] for i in micro)
            sliced += padded(common.collate([examples[i] for i in micro], "cpu").slices)
    assert tokens / whole < 0.75 < 0.9 < tokens / sliced


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_slices_change_nothing(monkeypatch, name):
    """States, loss and gradients are those of one padded pass, row by row, in float64."""
    examples = log_normal_examples(9)
    results = []
    for ratio in (common.SLICE_RATIO, 0.0):  # 0: one slice
        monkeypatch.setattr(common, "SLICE_RATIO", ratio)
        model = random_model(name).double().eval()
        batch = common.collate([*examples[:4], None, *examples[4:]], "cpu")
        states, head = common.response_states(model, batch, "fp32")
        common.response_loss(states, batch.targets, head)[0].backward()
        gradients = [p.grad for p in model.parameters()]
        results.append((len(batch.slices), batch.targets, states, gradients))
    (several, *one), (single, *other) = results
    assert several > 3 > single == 1
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).abs().max() < 1e-5  # norms and rotations are in fp32
    for a, b in zip(one[2], other[2]):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def draws(sampler, probabilities, steps):
    return [sampler.batch(probabilities, step) for step in steps]


def test_mixture_sampler_passes_through_every_dataset_without_replacement():
    sizes, mixture = [30, 7, 1], [0.5, 0.3, 0.2]
    sampler = common.MixtureSampler(sizes, 8, seed=1)
    drawn = draws(sampler, mixture, range(20))
    assert [len(batch) for batch in drawn] == [8] * 20
    flat = np.concatenate(drawn)
    first, second, third = flat[flat < 30], flat[(flat >= 30) & (flat < 37)], flat[flat == 37]
    assert sampler.cursors.tolist() == [len(first), len(second), len(third)]
    for counts in (np.bincount(first, minlength=30), np.bincount(second - 30, minlength=7)):
        assert counts.max() - counts.min() <= 1  # nothing comes again before its dataset is through
    assert second[:7].tolist() != second[7:14].tolist()  # reshuffled for each pass
    assert sorted(second[:7]) == sorted(second[7:14])
    again = common.MixtureSampler(sizes, 8, seed=1)
    draws(again, mixture, range(10))
    other = common.MixtureSampler(sizes, 8, seed=1)
    other.cursors[:] = again.cursors  # `cursors` is the whole state
    rest = draws(other, mixture, range(10, 20))
    assert all(np.array_equal(a, b) for a, b in zip(rest, drawn[10:]))


def test_mixture_sampler_draws_the_target_share():
    sampler = common.MixtureSampler([100, 200, 50], 1000, seed=0)
    draws(sampler, [0.1, 0.2, 0.7], range(20))
    share = sampler.cursors / 20000
    assert np.abs(share - [0.1, 0.2, 0.7]).max() < 4 * np.sqrt(0.25 / 20000)
    sampler.batch([0.0, 1.0, 0.0], 20)
    assert sampler.cursors.sum() == 21000


def test_every_row_of_a_batch_is_drawn_by_itself():
    """How many of a batch come from each dataset is multinomial: of 8 from two datasets, half and
    half, 2 · 2^-8 of the batches hold one alone, and the variance of the count is 8 / 4."""
    sampler = common.MixtureSampler([3000, 5000], 8, seed=2)
    drawn = np.array(draws(sampler, [0.5, 0.5], range(4000)))
    first = (drawn < 3000).sum(1)
    assert np.mean((first == 0) | (first == 8)) == pytest.approx(2 / 256, abs=0.006)
    assert first.var() == pytest.approx(2.0, abs=0.15)
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(0, abs=0.06)


# ------------------------------------------------------------------------ optimisation


def test_learning_rate_by_hand():
    def rate(step, schedule, warmup="0.2"):
        flags = ["--lr", "1", "--schedule", schedule, "--warmup_ratio", warmup]
        return common.learning_rate(step, 10, sftmix.parse_args(flags))

    assert [rate(step, "linear") for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert rate(6, "cosine") == pytest.approx(0.5)
    assert rate(9, "constant") == 1.0
    assert 0 < rate(9, "cosine") < 0.05
    assert rate(0, "cosine", warmup="0") == 1.0


def test_only_matrices_decay():
    model = common.tiny_model()
    decayed, rest = adamw(model).param_groups
    assert [decayed["weight_decay"], rest["weight_decay"]] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in rest["params"])


def test_diverged_step_is_an_error_and_updates_nothing():
    model = common.tiny_model()
    optimizer = adamw(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="diverged"):
        common.optimizer_step(model, optimizer, 1e-3, 1.0)
    assert same(before, list(model.parameters()))


@pytest.mark.parametrize("warm", [0, 3])
def test_snapshot_leaves_no_trace(tokenizer, warm):
    """Steps tried and undone change nothing: parameters, moments, step count, learning rate, RNG,
    mode, gradients."""
    examples = toy_examples(tokenizer, 250, "plain")
    model = common.tiny_model()
    optimizer = adamw(model)
    for _ in range(warm):
        plain_step(model, optimizer, examples, 1e-3)
    before = state_of(model, optimizer)
    snapshot = common.Snapshot(model, optimizer)
    for _ in range(2):
        model.eval()
        torch.rand(3)
        plain_step(model, optimizer, examples[:3], 1e-3)
        assert not same(before["weights"], list(model.parameters()))
        snapshot.restore()
        assert same(before, state_of(model, optimizer))
        assert model.training
        assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------ run folder and flags


def test_half_written_files_are_never_seen(tmp_path, monkeypatch):
    def disk_full(*paths):
        raise OSError("disk full")

    path = tmp_path / "x.json"
    common.write_text(path, "old")
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError):
        common.write_text(path, "new")
    assert path.read_text() == "old"


TINY_RUN = ["--data", "toy#20", "--max_steps", "2", "--mu", "0", "--log_every", "1"]


BROKEN = [
    ("tensorboard", "tensorboard", ""),  # not installed
    ("wandb", "wandb", ""),
    ("tensorboard", "numpy", " (No module named 'numpy')"),  # installed, but without what it needs
    ("wandb", None, " (broken)"),  # installed, and broken
]


@pytest.mark.parametrize("track, missing, cause", BROKEN)
def test_tracker_hint(tmp_path, monkeypatch, capsys, track, missing, cause):
    imported = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[track]
    import_module = importlib.import_module

    def refuse(module, *rest, **options):
        if module != imported:
            return import_module(module, *rest, **options)
        raise ImportError(f"No module named '{missing}'" if missing else "broken", name=missing)

    monkeypatch.setattr(importlib, "import_module", refuse)
    flags = [*TINY_RUN, "--output_dir", str(tmp_path / "run"), "--track", track]
    error = error_line(capsys, sftmix.main, flags)
    assert error == f"error: --track {track} needs: pip install {track}{cause}"
    assert not (tmp_path / "run").exists()


def test_resume_refuses_changed_data_and_another_scripts_folder(tmp_path, capsys):
    """... in a sentence, and what is in the folder stays as it is."""
    folder, rows = tmp_path / "run", [{"prompt": str(i), "response": "r"} for i in range(20)]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    flags = ["--data", to_jsonl(train, rows), "--eval_data", to_jsonl(held_out, rows[:4])]
    flags += ["--max_steps", "2", "--mu", "0", "--output_dir", str(folder), "--save_every", "1"]
    flags += ["--log_every", "1"]
    with killed_at(2, "train/loss"):
        sftmix.main(flags)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for file, kept, name in ((train, 20, "data"), (held_out, 4, "eval")):
        to_jsonl(file, [*rows[: kept - 1], {"prompt": "new", "response": "r"}])
        error = error_line(capsys, sftmix.main, [*flags, "--resume"])
        problem = f"{name} fingerprint differs from the first start"
        assert error == f"error: --resume: {problem}; has a data file or the model changed?"
        to_jsonl(file, rows[:kept])

    other = ["--data", str(train), "--max_steps", "2", "--resume", str(folder)]
    error = error_line(capsys, dynamix_sft.main, other)
    assert error.endswith("the run was made by sftmix.py, not dynamix_sft.py")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    sftmix.main([*flags, "--resume"])  # the same rows again: nothing is wrong


CLOCKED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 5, 6)


def test_the_date_of_the_first_start_is_kept(
    tmp_path, tokenizer, model_folder, monkeypatch, capsys
):
    """A template that writes today's date writes the first start's after a resume, and in final/;
    --resume notices other token ids, here those of a changed Jinja file."""
    folder, file = tmp_path / "run", tmp_path / "mine.jinja"
    file.write_text(CLOCKED)
    train = to_jsonl(tmp_path / "x.jsonl", [{"prompt": str(i), "response": "r"} for i in range(8)])
    flags = f"--model {model_folder('llama')} --data {train} --template {file} --mu 0 --ntp_on full"
    flags = [*flags.split(), "--max_steps", "2", "--output_dir", str(folder), "--save_every", "1"]
    flags += ["--log_every", "1"]
    with killed_at(2, "train/loss"):
        sftmix.main(flags)
    today = datetime.date.today()
    assert read_json(folder / "config.json")["flags"]["template_date"] == today.isoformat()
    monkeypatch.setattr(data.datetime, "date", Tomorrow)
    file.write_text(CLOCKED.replace("assistant: ", "assistant:"))
    error = error_line(capsys, sftmix.main, [*flags, "--resume"])
    assert "ids fingerprint differs from the first start" in error
    file.write_text(CLOCKED)
    sftmix.main([*flags, "--resume"])
    saved = transformers.AutoTokenizer.from_pretrained(folder / "final")
    text = saved.apply_chat_template([{"role": "user", "content": "u"}], tokenize=False)
    assert text == f"{today.strftime('%d %B %Y')}user: u\n"


def test_a_model_of_ours_goes_on_as_it_was_trained(tmp_path, tokenizer, capsys):
    """auto: the template that its tokenizer carries and the length that cleansft.json names; a
    flag that says otherwise is warned of; a base's own template is replaced aloud."""
    card = {"script": "sftmix", "base": "tiny", "template": "alpaca", "max_length": 77}
    (tmp_path / "cleansft.json").write_text(json.dumps(card))
    trained, auto = data.with_template(tokenizer, "alpaca"), {"model": str(tmp_path)}

    def chosen(name, length=None, tokenizer=trained, **model):
        args = SimpleNamespace(template=name, max_length=length, resume=None, **(model or auto))
        found = common.set_template(tokenizer, args)
        return args.template, args.max_length, found.chat_template, capsys.readouterr().out

    name, length, text, out = chosen("auto")
    assert (name, length, text) == ("chat", 77, trained.chat_template)
    assert "was trained with --template alpaca --max_length 77" in out
    assert "warning" not in out
    name, length, text, out = chosen("plain", 50)
    assert (name, length) == ("plain", 50)
    assert f"warning: --template plain is not what {tmp_path} was trained with" in out
    assert "template plain: replaces the model's own chat template" in out
    assert "warning" not in chosen("alpaca")[3]
    assert chosen("auto", None, tokenizer, model="tiny")[:2] == ("alpaca", None)


def test_what_moved_to_data_is_still_there():
    for name in ("Dataset", "Example", "Row", "encode", "fingerprint", "load_data", "toy_rows"):
        assert getattr(common, name) is getattr(data, name)
    assert not hasattr(common, "nothing")


def shared_flags():
    """flag name -> (option strings, help) of the flags that all scripts have."""
    parser = common.add_shared_flags(argparse.ArgumentParser(add_help=False))
    return {action.dest: (action.option_strings, action.help) for action in parser._actions}


SHARED_FLAGS = """
model data eval_data source_column template max_length show_batch
epochs max_steps batch_size micro_batch_size lr weight_decay schedule warmup_ratio max_grad_norm
dtype gradient_checkpointing lora_rank lora_alpha lora_dropout
seed output_dir resume log_every eval_every save_every save_minutes keep_checkpoint save_dtype
no_cache track
"""


def test_shared_flags_are_complete_and_explained():
    flags = shared_flags()
    assert set(flags) == set(SHARED_FLAGS.split())
    assert all(text for _, text in flags.values())


@pytest.mark.parametrize("script", ["sftmix", "dynamix_sft", "dynamics"])
def test_shared_flags_are_the_same_in_every_script(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for name, (options, text) in shared_flags().items():
        assert options[0] in shown, name
        assert "".join(text.replace("%%", "%").split()) in shown, name


def test_memory_that_does_not_fit_is_said(monkeypatch, capsys):
    """The plan's bytes by hand; refused where gradients and moments alone do not fit a GPU, warned
    of where the estimate of the rest does not."""
    model = common.tiny_model()
    args = argparse.Namespace(micro_batch_size=2, max_length=64, dtype="fp32", model="tiny")
    args.gradient_checkpointing = False
    size = 4 * sum(p.numel() for p in model.parameters())
    parts = common.memory_plan(model, args, snapshot=True)
    assert (parts["weights"], parts["gradients"], parts["moments"]) == (size, size, 2 * size)
    assert (parts["snapshot"], parts["head gradient"]) == (3 * size, 4 * 259 * 128)
    assert parts["activations"] == 2 * 64 * 128 * 34 * 4 * 4
    args.gradient_checkpointing, args.dtype = True, "bf16"
    assert common.memory_plan(model, args, False)["activations"] == 2 * 64 * 128 * (4 + 34) * 2
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    for free, said in ((3 * size, "warning: this may not fit"), (2**50, "free beside the weights")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        common.print_memory(model, args)
        out = capsys.readouterr().out
        assert said in out and ("warning" in out) == (free < 2**50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * size - 1, size))
    with pytest.raises(UserError, match="does not fit this GPU; try --lora_rank 16"):
        common.print_memory(model, args)

"""The flags that all scripts share do the same in all of them, and what they set off in common.py.

The runs are seen from outside (traced.py) and compared with numbers that are computed here.
"""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    adamw,
    killed_at,
    own_nll,
    random_model,
    read_json,
    records,
    same,
    to_jsonl,
    values,
    weights,
)

import common
import data
from traced import TOKENIZER, traced

SIZES = [3, 9, 5, 1, 7, 4, 8, 2, 6, 5, 3, 9]
ROWS = [{"prompt": f"say {i}", "response": chr(97 + i) * n} for i, n in enumerate(SIZES)]
HELD_OUT = [{"prompt": f"tell {i}", "response": f"<{'z' * i}>"} for i in range(6)]
TEXTS = [row["response"] for row in ROWS]
# Shared flags do not depend on the method: plain training in every script, and SFTMix's pairs.
METHODS = {
    "sftmix": ["--mu", "0"],
    "sftmix-pairs": ["--partition", "random"],
    "dynamix_sft": ["--update_every", "0"],
    "dynamics": ["--mixture", "uniform", "--targets", "held", "--updates", "0"],
}
FLAGS = ["--template", "plain", "--batch_size", "4", "--log_every", "1", "--lora_rank", "0"]
each_script = pytest.mark.parametrize("script", list(METHODS))


@pytest.fixture(scope="module")
def start(tmp_path_factory, model_folder):
    """start(script, *flags, folder=a new one) -> the steps of a run on the twelve rows, folder.
    With --resume DIR among the flags there is no --output_dir."""
    place = tmp_path_factory.mktemp("shared")
    train = to_jsonl(place / "train.jsonl", ROWS)
    held = "held=" + to_jsonl(place / "held_out.jsonl", HELD_OUT)
    model = model_folder("llama")
    number = iter(range(1000))

    def run(script, *flags, folder=None):
        folder = folder or place / f"run{next(number)}"
        inputs = ["--model", model, "--data", train, "--eval_data", held]
        flags = [*FLAGS, *inputs, *METHODS[script], *flags]
        if "--resume" not in flags[:-1]:
            flags += ["--output_dir", str(folder)]
        return traced(script.split("-")[0], *flags), folder

    return run


RUN = ["--epochs", "2", "--schedule", "linear", "--warmup_ratio", "0.3", "--lr", "1e-2"]
RUN += ["--weight_decay", "0.5", "--max_grad_norm", "3", "--micro_batch_size", "2"]
RUN += ["--eval_every", "2", "--save_every", "4"]


@pytest.fixture(scope="module")
def runs(start):
    """script -> steps, folder of one run each."""
    found = {}

    def get(script):
        if script not in found:
            found[script] = start(script, *RUN)
        return found[script]

    return get


# ------------------------------------------------------------------------ how long, which batches


@each_script
def test_epochs_and_batch_size(runs, start, script):
    """12 rows in batches of 4: 3 steps an epoch, every row once in each, in another order."""
    steps, folder = runs(script)
    assert [len(step.texts) for step in steps] == [4] * 6
    epochs = [[text for step in steps[at : at + 3] for text in step.texts] for at in (0, 3)]
    if script == "dynamics":  # draws several batches ahead and sorts them by length
        assert sorted(epochs[0] + epochs[1]) == sorted(TEXTS * 2)
    else:
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(TEXTS)
    assert [set(step.texts) for step in steps[:3]] != [set(step.texts) for step in steps[3:]]
    summary = read_json(folder / "summary.json")
    tokens = 2 * sum(len(text) + 1 for text in TEXTS)
    assert [summary[key] for key in ("steps", "examples", "tokens")] == [6, 24, tokens]
    assert len(start(script, "--epochs", "0.5", "--batch_size", "6")[0]) == 1
    half = start(script, "--epochs", "1.1", "--batch_size", "6")[0]
    assert [len(step.texts) for step in half] == [6] * 3
    assert len(start(script, "--max_steps", "2")[0]) == 2


@each_script
def test_micro_batch_size_changes_no_result(runs, start, script):
    steps, _ = runs(script)
    assert {len(micro) for step in steps for micro in step.micros} == {2}
    whole, _ = start(script, *RUN, "--micro_batch_size", "8")
    assert {len(step.micros) for step in whole} == {1}
    for one, other in zip(steps, whole):
        assert sorted(one.texts) == sorted(other.texts)
        assert one.norm == pytest.approx(other.norm, 1e-4)
    for name, gradient in whole[0].gradients.items():
        limit = 1e-5 * gradient.abs().max()
        assert (steps[0].gradients[name] - gradient).abs().max() < limit, name


@each_script
def test_seed(runs, start, script):
    """--seed decides on the order: the same for the same seed, bit for bit."""
    steps, folder = runs(script)
    again, folder_again = start(script, *RUN, "--seed", "0")
    assert records(folder) == records(folder_again)
    assert same(steps[-1].after, again[-1].after)
    other, _ = start(script, *RUN, "--seed", "1")
    assert [step.texts for step in other] != [step.texts for step in steps]


# ------------------------------------------------------------------------ the optimizer


@each_script
def test_learning_rate(runs, script):
    """2 of 6 steps (0.3 of them, rounded up) warm up, then a line to 0: logged, and what AdamW
    takes."""
    steps, folder = runs(script)
    rates = [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    assert values(folder, "train/lr") == pytest.approx(rates)
    assert [step.rates for step in steps] == [{rate} for rate in values(folder, "train/lr")]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@each_script
def test_schedule(start, script, schedule):
    _, folder = start(script, "--schedule", schedule, "--warmup_ratio=0", "--lr=2", "--max_steps=4")
    cosine = [2, 1 + math.cos(math.pi / 4), 1, 1 - math.cos(math.pi / 4)]
    expected = cosine if schedule == "cosine" else [2] * 4
    assert values(folder, "train/lr") == pytest.approx(expected)


@each_script
def test_weight_decay(runs, script):
    """A matrix' row with no gradient (the embedding of a byte that does not occur) shrinks by lr ·
    decay in every step; a norm's weights do not decay: Adam's first step moves each by lr at most
    (and by lr · decay = half of that less without it)."""
    steps, _ = runs(script)
    (unused,) = TOKENIZER("?", add_special_tokens=False).input_ids
    name, expected = "model.embed_tokens.weight", 1.0
    for step, rate in zip(steps, [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]):
        assert not step.gradients[name][unused].any()
        expected *= 1 - rate * 0.5
        ratio = step.after[name][unused] / steps[0].before[name][unused]
        assert ratio.numpy() == pytest.approx(expected, rel=1e-5)
    first, name = steps[0], "model.norm.weight"
    moved = (first.after[name] - first.before[name]).abs()
    assert moved.numpy() == pytest.approx(0.005, rel=1e-3)


@each_script
def test_max_grad_norm(runs, script):
    """Logged is the norm before clipping, and Adam's first moment is a tenth of the gradient scaled
    to norm 3."""
    steps, folder = runs(script)
    norms = [torch.stack([g.norm() for g in step.gradients.values()]).norm() for step in steps]
    assert values(folder, "train/grad_norm") == pytest.approx([norm.item() for norm in norms])
    assert norms[0] > 30
    moments = steps[0].moments
    for name, gradient in steps[0].gradients.items():
        limit = 1e-5 * moments[name].abs().max()
        assert (moments[name] - gradient * 0.3 / norms[0]).abs().max() < limit


def test_gradient_below_max_grad_norm_stays(start):
    (step,), _ = start("sftmix", "--max_steps", "1", "--max_grad_norm", "1e6")
    for name, gradient in step.gradients.items():
        assert step.moments[name].numpy() == pytest.approx(gradient.numpy() / 10, rel=1e-5)


def test_adamw_by_hand():
    """Two steps on gradients near eps, in float64: β = (0.9, 0.999), eps 1e-8, decay of the matrix
    alone, gradients cleared, norm before clipping."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    optimizer = adamw(model, 1.0, 0.1)
    exact = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    mean = {name: 0.0 for name in exact}
    square = {name: 0.0 for name in exact}
    for step, (lr, limit) in enumerate([(1e-2, 1e-9), (3e-3, 1.0)], 1):
        total = 0.0
        for p in model.parameters():
            p.grad = 1e-8 * torch.randn_like(p)
            total += p.grad.pow(2).sum().item()
        norm = math.sqrt(total)
        gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        assert common.optimizer_step(model, optimizer, lr, limit) == pytest.approx(norm)
        for name, p in model.named_parameters():
            g = gradients[name] * min(1.0, limit / (norm + 1e-6))  # torch's own clipping
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            root = np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8
            decay = 0.1 if name == "weight" else 0.0
            exact[name] *= 1 - lr * decay
            exact[name] -= lr * mean[name] / (1 - 0.9**step) / root
            assert p.detach().numpy() == pytest.approx(exact[name], rel=1e-9)
            assert p.grad is None


# ------------------------------------------------------------------------ precision and memory


@each_script
def test_dtype(runs, start, script):
    """bf16: the linear layers compute in it, weights and updates do not. On a CPU auto is fp32."""
    assert {dtype for step in runs(script)[0] for dtype in step.dtypes} == {torch.float32}
    steps, folder = start(script, "--max_steps", "1", "--dtype", "bf16")
    assert steps[0].dtypes == {torch.bfloat16}
    assert {weight.dtype for weight in steps[0].after.values()} == {torch.float32}
    flags = [read_json(place / "config.json")["flags"] for place in (folder, runs(script)[1])]
    assert [chosen["dtype"] for chosen in flags] == ["bf16", "fp32"]


@each_script
def test_gradient_checkpointing_changes_no_result(runs, start, script):
    steps, _ = start(script, *RUN, "--gradient_checkpointing")
    assert steps[0].model.is_gradient_checkpointing
    assert not runs(script)[0][0].model.is_gradient_checkpointing
    assert same(steps[-1].after, runs(script)[0][-1].after)


@each_script
def test_lora(start, script):
    """Only adapters are trained, on every linear layer but the head, of rank R, with scale alpha/R
    (default 2) and dropout on their input."""
    flags = ["--lora_rank", "3", "--lora_dropout", "0.25", "--max_steps", "1", "--lr", "1e-2"]
    scales = {}
    for alpha in ([], ["--lora_alpha", "12"]):
        (step,), folder = start(script, *flags, *alpha)
        trained = {name for name in step.before if not same(step.before[name], step.after[name])}
        assert trained
        assert all(".lora_" in name for name in {*trained, *step.gradients})
        modules = dict(step.model.named_modules())
        adapted = [module for module in modules.values() if hasattr(module, "lora_A")]
        assert len(adapted) == 2 * 7  # q, k, v, o, gate, up, down of two layers
        assert {module.lora_A["default"].out_features for module in adapted} == {3}
        assert {module.lora_dropout["default"].p for module in adapted} == {0.25}
        scales[tuple(alpha)] = {module.scaling["default"] for module in adapted}
        saved = read_json(folder / "final" / "adapter_config.json")
        assert saved["r"] == 3
    assert scales == {(): {2.0}, ("--lora_alpha", "12"): {4.0}}


# ------------------------------------------------------------------------ what is written


@each_script
def test_log_eval_and_save_every(start, script, monkeypatch):
    """Steps that are logged (first and last, too), evaluated (also before and after training), and
    saved (never the last: it is finished then)."""
    saved, save = [], common.Run.save_checkpoint

    def save_checkpoint(run, state, *rest):
        saved.append(state["counts"]["steps"])
        return save(run, state, *rest)

    monkeypatch.setattr(common.Run, "save_checkpoint", save_checkpoint)
    every = ["--log_every", "3", "--eval_every", "2", "--save_every", "4"]
    _, folder = start(script, "--max_steps", "8", *every)
    found = records(folder)
    assert [record["step"] for record in found if "train/loss" in record] == [1, 3, 6, 8]
    evaluated = [record["step"] for record in found if "eval/held/nll" in record]
    assert evaluated == [0, 2, 4, 6, 8]
    if script != "dynamics":  # it keeps the best checkpoint, too
        assert saved == [4]
    assert 4 in saved
    saved.clear()
    never = ["--log_every", "100", "--eval_every", "0", "--save_every", "0"]
    _, folder = start(script, "--max_steps", "3", *never)
    found = records(folder)
    assert [record["step"] for record in found if "train/loss" in record] == [1, 3]
    assert [record["step"] for record in found if "eval/held/nll" in record] == [0, 3]
    assert saved == [] or script == "dynamics"


@each_script
def test_output_dir_is_what_the_run_leaves(runs, script):
    steps, folder = runs(script)
    final = weights(folder)
    kept = [same(final, {**final, **step.after}) for step in steps]
    assert any(kept) if script == "dynamics" else kept[-1]  # its final/ is the best checkpoint
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "final"} <= files
    loaded = transformers.AutoTokenizer.from_pretrained(folder / "final")
    assert loaded("abc").input_ids == TOKENIZER("abc").input_ids


def test_output_dir_has_a_default(start, tmp_path, monkeypatch):
    _, folder = start("sftmix", "--max_steps", "1")
    flags = read_json(folder / "config.json")["flags"]
    assert flags["output_dir"] == str(folder)
    monkeypatch.chdir(tmp_path)
    args = Namespace(resume=None, output_dir=None, model="some/where/llama", seed=7)
    assert str(common.Run._folder("sftmix", args)).startswith("runs/sftmix-llama-7-20")


@pytest.mark.parametrize("form", ["--resume DIR", "--output_dir DIR --resume"])
@each_script
def test_resume(runs, start, tmp_path, script, form):
    """Killed after step 5, continued from the checkpoint of step 4: nothing is different."""
    whole, folder = runs(script)
    with killed_at(5, "train/loss"):
        start(script, *RUN, folder=tmp_path)
    torch.rand(10)  # another place in the model's RNG
    flags = ["--resume", str(tmp_path)] if form == "--resume DIR" else ["--resume"]
    steps, _ = start(script, *RUN, *flags, folder=tmp_path)
    assert len(steps) == 2
    assert same(steps[-1].after, whole[-1].after)
    assert records(tmp_path) == records(folder)


# ------------------------------------------------------------------------ the data


@each_script
def test_template_and_max_length(start, script):
    """The ids that are trained on: the template's text, and what is left of it at --max_length."""
    steps, _ = start(script, "--epochs", "1", "--max_length", "12")
    ids = [example for step in steps for micro in step.micros for example in micro]
    plain = [f"say {i}\n{text}" for i, text in enumerate(TEXTS)]
    whole = [[257, *TOKENIZER(text, add_special_tokens=False).input_ids, 258] for text in plain]
    assert sorted(ids) == sorted(example[:12] for example in whole)
    steps, _ = start(script, "--max_steps", "1", "--template", "alpaca")
    (first, *_), *_ = steps[0].micros
    prompt = "Below is an instruction that describes a task. Write a response that appropriately "
    prompt += "completes the request.\n\n### Instruction:\nsay "
    assert TOKENIZER.decode(first[1:]).startswith(prompt)


@each_script
def test_source_column_makes_datasets(start, tmp_path, script):
    """One dataset a value of the column."""
    rows = [{**row, "origin": "ab"[i % 2]} for i, row in enumerate(ROWS)]
    file = to_jsonl(tmp_path / "columns.jsonl", rows)
    _, folder = start(script, "--data", file, "--source_column", "origin", "--max_steps", "1")
    assert read_json(folder / "config.json")["datasets"] == {"a": 6, "b": 6}


@each_script
def test_show_batch(start, capsys, script):
    """Decoded examples, what is supervised between marks, and training goes on."""
    steps, _ = start(script, "--max_steps", "1", "--show_batch")
    assert "<s>say 0\n⟦aaa</s>⟧" in capsys.readouterr().out
    assert len(steps) == 1


def test_eval_data_is_evaluated_as_a_whole(start, model_folder):
    """NLL per response token over the set, at the start by the model as it comes."""
    _, folder = start("sftmix", "--max_steps", "1")
    rows = [data.rows_from_record(row)[0] for row in HELD_OUT]
    examples, _ = data.encode(rows, data.with_template(TOKENIZER, "plain"), 512)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    total = sum(own_nll(model, example) for example in examples)
    tokens = sum(len(example.ids) - example.start for example in examples)
    assert values(folder, "eval/held/nll")[0] == pytest.approx(total / tokens, 1e-5)
    assert values(folder, "eval/held/tokens")[0] == tokens
    assert read_json(folder / "summary.json")["eval"]["held"]["nll"] != total / tokens


# ------------------------------------------------------------------------ common.py by hand


def encoded(count, seed=0):
    """Examples with prompts and responses of many lengths."""
    rng, found = np.random.default_rng(seed), []
    for row in range(count):
        ids = rng.integers(0, 256, rng.integers(4, 30))
        found.append(data.Example(ids, int(rng.integers(1, len(ids))), row))
    return found


@pytest.mark.parametrize("micro", [1, 3, 16])
def test_backward_is_the_gradient_of_the_mean_over_tokens(micro):
    """In float64 by the model's own logits: one mean over all tokens of the batch, whatever the
    micro-batches; and every example's own mean."""
    model, examples = random_model("qwen2").double(), encoded(7)
    args = Namespace(micro_batch_size=micro, dtype="fp32")
    losses = common.backward(model, examples, args)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = tokens = 0
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.ids)
        logits = model(input_ids=ids[None]).logits[0, example.start - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[example.start :], reduction="sum")
        count = len(ids) - example.start
        assert losses[i] == pytest.approx(nll.item() / count, rel=1e-9)
        total, tokens = total + nll, tokens + count
    (total / tokens).backward()
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).abs().max() < 1e-9 * p.grad.abs().max(), name


def test_score_and_evaluate_by_hand():
    """Two sets: sums over each, weighted by tokens; the states of the final tokens; modes."""
    model, examples = random_model("gpt2").double().eval(), encoded(9)
    for example in examples[::2]:  # ends with what the model expects: one hit
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.ids[:-1])[None]).logits
        example.ids[-1] = logits[0, -1].argmax()
    model.train()  # with dropout, which is off meanwhile
    last = np.zeros((9, 32))
    nll, tokens, correct = common.score(model, examples, 4, "fp32", last=last)
    assert model.training
    sets = {"one": examples[:4], "two": examples[4:]}
    result = common.evaluate(model, sets, 2, "fp32", progress=False)
    model.eval()
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.ids)
        with torch.no_grad():
            out = model(input_ids=ids[None], output_hidden_states=True)
        hits = out.logits[0, example.start - 1 : -1].argmax(1) == ids[example.start :]
        assert nll[i] == pytest.approx(own_nll(model, example), rel=1e-9)
        assert [tokens[i], correct[i]] == [len(ids) - example.start, hits.sum()]
        assert last[i] == pytest.approx(out.hidden_states[-1][0, -2].numpy(), rel=1e-5, abs=1e-6)
    assert correct.sum() >= 5
    for label, part in (("one", slice(0, 4)), ("two", slice(4, 9))):
        count, mean = tokens[part].sum(), nll[part].sum() / tokens[part].sum()
        row = {"nll": mean, "ppl": math.exp(mean), "tokens": count}
        assert result[label] == pytest.approx({**row, "accuracy": correct[part].sum() / count})


def test_collate_by_hand():
    one = data.Example(np.array([257, 5, 6, 7, 258]), 3, 0)
    two = data.Example(np.array([257, 9, 258]), 1, 1)
    batch = common.collate([one, None, two], "cpu")
    assert [ids.tolist() for ids in batch.slices] == [[[257, 5, 6, 7, 258]], [[257, 9, 258]]]
    assert batch.positions.tolist() == [2, 3, 5, 6]  # of the tokens before
    assert batch.targets.tolist() == [7, 258, 9, 258]
    assert batch.response_lengths.tolist() == [2, 0, 2]
    four = data.Example(np.array([257, 8, 8, 258]), 2, 2)
    batch = common.collate([two, four, one], "cpu")  # 4 of 5 share a slice, 3 do not
    assert batch.slices[0].tolist() == [[257, 5, 6, 7, 258], [257, 8, 8, 258, 0]]
    assert batch.slices[1].tolist() == [[257, 9, 258]]
    assert batch.positions.tolist() == [10, 11, 6, 7, 2, 3]
    assert batch.targets.tolist() == [9, 258, 8, 258, 7, 258]


def test_slices_by_hand():
    """Longest first, equal ones in order; a new slice below 0.8 of its slice's longest."""
    assert common.length_slices([80, 100, 79, 64, 63, 79]) == [[1, 0], [2, 5, 3], [4]]
    assert common.length_slices([7]) == [[0]]


def test_micro_batches_by_hand():
    items, lengths = list("abcdefg"), [3, 9, 5, 1, 9, 4, 2]
    found = common.micro_batches(items, lengths, 3)
    assert found == [["b", "e", "c"], ["f", "a", "g"], ["d"]]


def test_batch_sizes_are_near_equal():
    assert common.batch_sizes(10, 4).tolist() == [3, 4, 3]
    assert common.batch_sizes(8, 4).tolist() == [4, 4]
    assert common.batch_sizes(9, 100).tolist() == [9]
    assert common.deal(7, 3).tolist() == [2, 3, 2]


def test_epoch_batches_follow_seed_and_epoch():
    """Every position of the order is another in another epoch and under another seed."""
    cases = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]

    def batches(seed, epoch):
        return [batch.tolist() for batch in common.epoch_batches(64, 8, seed, epoch)]

    found = [batches(*case) for case in cases]
    assert len({str(order) for order in found}) == 6
    assert found == [batches(*case) for case in cases]
    sizes = [len(batch) for batch in common.epoch_batches(10, 4, 0, 0)]
    assert sizes == [3, 4, 3]


def test_mixture_sampler_by_hand():
    """Draws depend on seed and step, the order within a dataset on seed, dataset and pass. Of a
    dataset with probability 0 nothing is drawn."""
    sizes, mixture = [5, 3, 4], [0.5, 0.0, 0.5]

    def sampler(seed=0):
        return common.MixtureSampler(sizes, 6, seed)

    one = sampler()
    first, second = one.batch(mixture, 0), one.batch(mixture, 1)
    assert one.cursors[1] == 0
    assert one.cursors.sum() == 12
    assert set(first) | set(second) <= {0, 1, 2, 3, 4, 8, 9, 10, 11}
    both = np.concatenate([first, second])
    assert sampler().batch(mixture, 0).tolist() == first.tolist()
    assert len({str(sampler(seed).batch(mixture, 0)) for seed in range(5)}) == 5
    assert len({str(sampler().batch(mixture, step)) for step in range(5)}) > 2
    for start, size in ((0, 5), (8, 4)):
        part = both[(both >= start) & (both < start + size)]
        assert len(set(part[:size])) == min(size, len(part))  # without replacement
    whole = common.MixtureSampler([6], 6, 0)
    passes = [whole.batch([1.0], step).tolist() for step in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(6))
    assert passes[0] != passes[1]
    drawn = set()
    for seed, step in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 3)):
        large = common.MixtureSampler([999] * 3, 200, seed)
        large.batch([0.2, 0.3, 0.5], step)
        drawn.add(tuple(large.cursors.tolist()))
    assert len(drawn) == 7  # counts of each dataset, by seed and step
    orders = [sampler()._take(0, 20), sampler(1)._take(0, 20)]
    assert len({str(order[at : at + 5]) for order in orders for at in (0, 5, 10, 15)}) > 4


def test_learning_rates_by_hand():
    def rates(steps, **flags):
        args = Namespace(**{"lr": 6.0, "schedule": "linear", "warmup_ratio": 0.0, **flags})
        return [common.learning_rate(step, steps, args) for step in range(steps)]

    assert rates(3) == pytest.approx([6, 4, 2])
    assert rates(3, warmup_ratio=1.0) == pytest.approx([2, 4, 6])
    assert rates(4, warmup_ratio=0.26) == pytest.approx([3, 6, 6, 3])
    assert rates(3, schedule="constant", warmup_ratio=0.5) == pytest.approx([3, 6, 6])
    assert rates(3, schedule="cosine") == pytest.approx([6, 4.5, 1.5])


HEADS = [(False, 1.0, None), (True, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias, scale, softcap", HEADS)
def test_cross_entropy_of_bf16_states_row_by_row(bias, scale, softcap, soft):
    """Rows of a model that is sure (p ~ 0.999) and rows of one that is not, hard and mixed targets:
    value and gradient of each row against float64. A global norm would hide that the sure rows'
    gradient is lost; in bf16 p - y would be 0 there."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 64, generator=rng) / 8, torch.randn(300, 64, generator=rng)
    targets = torch.randint(0, 300, (40, 2), generator=rng)
    for row in range(0, 40, 2):  # every second row's state towards its target
        sure = weight[targets[row, 0]]
        hidden[row] = 16.0 / scale * sure / sure.norm() ** 2
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    added = torch.randn(300, generator=rng) if bias else None
    lam = torch.rand(40, 1, generator=rng)
    probs = torch.cat([lam, 1 - lam], 1) if soft else torch.tensor([[1.0, 0.0]]).expand(40, 2)
    head = common.Head(weight, added, scale, softcap)

    logits = common.wide_product(hidden, weight)
    raw = (logits if added is None else logits + added).double().requires_grad_()
    exact = scale * raw
    exact = softcap * torch.tanh(exact / softcap) if softcap else exact
    label = torch.zeros(40, 300, dtype=torch.float64).scatter_add_(1, targets, probs.double())
    exact_nll = torch.nn.functional.cross_entropy(exact, label, reduction="none")
    exact_nll.sum().backward()

    ours = raw.detach().float()
    given = (targets, head, probs) if soft else (targets[:, 0].contiguous(), head)
    nll = common.cross_entropy_(ours, *given)
    assert nll.double().numpy() == pytest.approx(exact_nll.detach().numpy(), rel=2e-4, abs=1e-6)
    error = (ours.double() - raw.grad).norm(dim=1) / raw.grad.norm(dim=1)
    assert error.max() < 5e-3
    if not (soft or softcap):
        assert exact_nll[::2].max() < 0.02


def test_head_with_everything_in_bf16_row_by_row():
    """The whole way of a bf16 run: bf16 states, fp32 master weights with bias, scale and cap."""
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(30, 16, generator=rng).bfloat16()
    weight, bias = torch.randn(200, 16, generator=rng), torch.randn(200, generator=rng)
    targets = torch.randint(0, 200, (30,), generator=rng)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, nll = common.response_loss(ours[0], targets, common.Head(*ours[1:], 0.5, 4.0))
    loss.backward()
    logits = 4.0 * torch.tanh(0.5 * (exact[0] @ exact[1].T + exact[2]) / 4.0)
    exact_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    exact_nll.sum().backward()
    assert nll.numpy() == pytest.approx(exact_nll.detach().numpy(), rel=1e-5)
    for one, other in zip(ours, exact):
        error = (one.grad.double() - other.grad).reshape(len(one), -1).norm(dim=1)
        size = other.grad.reshape(len(one), -1).norm(dim=1)
        limit = 5e-3 if one.dtype == torch.bfloat16 else 1e-4
        assert (error / size).max() < limit
    assert ours[0].grad.dtype == torch.bfloat16

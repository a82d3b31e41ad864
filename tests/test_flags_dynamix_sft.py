"""Every flag of dynamix_sft.py, bound to numbers that are computed apart from it.

A run is spied on: what was drawn with which probabilities, what a gradient was taken of, at which
weights and moments, with which learning rate. From that the oracles below, float64 and written out,
say what the rewards, values, mixtures, log lines and shares must be.
"""

import contextlib
import copy
import inspect
import io
import time
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import GPT2, adamw, own_logits, random_model, read_json, records

import common
import data
import dynamix_sft
import plots
import runs

SPECS = ["toy/describe#24", "toy/add#12", "toy/reverse#6"]
LABELS = ["describe", "add", "reverse"]
SIZES = np.array([24, 12, 6])
PRIOR = SIZES / 42
UNIFORM = np.full(3, 1 / 3)
EPS = 1e-6
BACKWARD, SCORE = 1.0, 0.25  # seconds they take on the clock of a spied run


# ------------------------------------------------------------------------ the spy


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy().astype(np.float64)


class Spy:
    """What happened, in order: .events, each with
    name, given {parameter: argument}, result, update (the step of the update that it is part of, or
    None), training (the model's mode), and the weights and moments at its start:
    theta, m, v (P,) float64, t."""

    def __init__(self, patch):
        self.events, self.model, self.optimizer = [], None, None
        self.update, self.clock = None, 0.0
        for name in ("make_optimizer", "backward", "optimizer_step", "score", "response_states"):
            self.wrap(patch, common, name)
        self.wrap(patch, common, "epoch_batches")
        self.wrap(patch, common.MixtureSampler, "batch")
        self.wrap(patch, common.Snapshot, "restore")
        self.wrap(patch, common.Run, "save_checkpoint")
        self.wrap(patch, dynamix_sft, "reward_batches")
        self.wrap(patch, dynamix_sft, "arm_rewards")
        real = {"strftime": time.strftime, "monotonic": time.monotonic}
        clock = SimpleNamespace(perf_counter=lambda: self.clock, **real)
        patch.setattr(runs, "time", clock)

    def wrap(self, patch, owner, name):
        original = getattr(owner, name)

        def spied(*args, **kwargs):
            given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
            self.model = given.get("model", self.model)
            self.optimizer = given.get("optimizer") or self.optimizer
            event = SimpleNamespace(name=name, given=given, update=self.update, **self.picture())
            for key in {"state", "probabilities"} & given.keys():
                given[key] = copy.deepcopy(given[key])
            self.events.append(event)
            self.update = given["step"] if name == "arm_rewards" else self.update
            event.result = original(*args, **kwargs)
            self.update = None if name == "arm_rewards" else self.update
            self.clock += {"backward": BACKWARD, "score": SCORE}.get(name, 0)
            return event.result

        patch.setattr(owner, name, spied)

    def picture(self):
        """Mode, weights and moments of this moment."""
        if self.model is None:
            return {}
        parameters = list(self.model.parameters())
        result = {"training": self.model.training, "theta": flat(parameters)}
        states = [self.optimizer.state.get(p) for p in parameters] if self.optimizer else [None]
        if not states[0]:
            return result | {"m": 0.0, "v": 0.0, "t": 0}
        result |= {"m": flat([state["exp_avg"] for state in states])}
        result |= {"v": flat([state["exp_avg_sq"] for state in states])}
        return result | {"t": int(states[0]["step"])}

    def of(self, *names):
        return [event for event in self.events if event.name in names]

    def training(self, name):
        """Those that are part of no update."""
        return [event for event in self.of(name) if event.update is None]


def key(example):
    return example.dataset, example.row


def keys(event):
    return [key(example) for example in event.given["examples"]]


# ------------------------------------------------------------------------ the oracles


class Twin:
    """A float64 copy of a model, in evaluation mode, at weights theta (P,)."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double().eval()
        for module in self.model.modules():
            if type(module).__name__ == "LlamaRMSNorm":  # it computes in fp32
                module.forward = MethodType(exact_norm, module)
        matrices = [torch.full_like(p, p.dim() > 1) for p in self.model.parameters()]
        self.matrices = flat(matrices)  # (P,) 1 where AdamW decays

    def at(self, theta):
        parameters = self.model.parameters()
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), parameters)
        return self.model

    def measures(self, theta, examples):
        """Mean loss and mean entropy (nats) per response token of each example, (b, 2)."""
        model, result = self.at(theta), []
        for example in examples:
            with torch.no_grad():
                logits, targets = own_logits(model, example)
            p = torch.softmax(logits, 1).numpy()
            loss = -np.log(p[np.arange(len(p)), targets.numpy()])
            result.append([loss.mean(), -(p * np.log(p)).sum(1).mean()])
        return np.array(result)

    def gradient(self, theta, examples):
        """Of the mean loss over all response tokens of the batch, (P,)."""
        model, total, tokens = self.at(theta), 0.0, 0
        for example in examples:
            logits, targets = own_logits(model, example)
            total = total - torch.log_softmax(logits, 1)[range(len(targets)), targets].sum()
            tokens += len(targets)
        return flat(torch.autograd.grad(total / tokens, list(model.parameters())))


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)


def adamw_step(event, gradient, lr, decay, max_norm):
    """What AdamW (β = 0.9, 0.999, ε = 1e-8) adds to the weights of `event`: clipped gradient,
    moments, bias correction, decoupled decay (P,). (P,) -> (P,)"""
    clipped = gradient * min(1.0, max_norm / np.sqrt(gradient @ gradient))
    m, v, t = 0.9 * event.m + 0.1 * clipped, 0.999 * event.v + 0.001 * clipped**2, event.t + 1
    direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return -lr * direction - lr * decay * event.theta


def own_reward(twin, event, on, measured, lr, args):
    """The reward of one dataset by the formulas, from the weights and moments of `event`."""
    gradient, decay = twin.gradient(event.theta, on), args.weight_decay * twin.matrices
    step = adamw_step(event, gradient, lr, decay, args.max_grad_norm)
    column = ["loss", "entropy"].index(args.reward)
    if args.lookahead == "first_order":
        tokens = np.array([len(example.ids) - example.start for example in measured])
        loss = twin.measures(event.theta, measured)[:, 0] @ tokens / tokens.sum()
        return -(twin.gradient(event.theta, measured) @ step) / (loss + EPS)
    before = twin.measures(event.theta, measured)[:, column]
    after = twin.measures(event.theta + step, measured)[:, column]
    return np.mean((before - after) / (before + EPS))


def own_probabilities(values, prior, beta, gamma):
    weights = np.exp(beta * np.asarray(values)) * prior
    return (1 - gamma) * weights / weights.sum() + gamma / len(weights)


def own_values(values, rewards, alpha):
    """Q after an update with these raw rewards."""
    scaled = (rewards - min(rewards)) / (max(rewards) - min(rewards))
    return alpha * np.asarray(values) + (1 - alpha) * scaled


# ------------------------------------------------------------------------ spied runs of the command


def start(folder, model, *flags):
    """The command on a small Llama -> its spy, with .folder, .summary, .printed, .args."""
    command = ["--model", model, "--data", *SPECS, "--template", "plain", "--lr", "1e-2"]
    command += ["--batch_size", "8", "--reward_batch_size", "5", "--max_grad_norm", "0.5", *flags]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        spy = Spy(patch)
        patch.setattr(plots, "draw", lambda folder: None)
        dynamix_sft.main([*command, "--output_dir", str(folder)])
    spy.folder, spy.printed, spy.summary = folder, printed.getvalue(), read_json(folder / SUMMARY)
    spy.args = dynamix_sft.parse_args(command)
    spy.twin = Twin(transformers.AutoModelForCausalLM.from_pretrained(model))
    return spy


SUMMARY = "summary.json"
# 7 steps, of which 6 are an epoch; updates after 2, 4 and 6
RATES = np.array([1 / 3, 2 / 3, 1, 1, 0.75, 0.5, 0.25]) * 1e-2  # rises for ceil(0.3 · 7) steps
FLAGS = ["--max_steps", "7", "--update_every", "2", "--beta", "3", "--gamma", "0.2"]
FLAGS += ["--alpha", "0.6", "--warmup_ratio", "0.3", "--weight_decay", "0.3", "--log_every", "3"]
FLAGS += ["--eval_data", "toy/sort#6", "--eval_every", "2", "--save_every", "4"]


@pytest.fixture(scope="module")
def spied(tmp_path_factory, model_folder):
    """(name, flags) -> the spied run with these flags."""
    return lambda name, *flags: start(tmp_path_factory.mktemp(name), model_folder("llama"), *flags)


@pytest.fixture(scope="module")
def main_run(spied):
    return spied("main", *FLAGS)


@pytest.fixture(scope="module")
def examples(tokenizer):
    """The examples of every dataset."""
    return data.encode_datasets(
        data.load_data(SPECS), data.with_template(tokenizer, "plain"), 512, quiet=True
    )


def vector(record, prefix):
    return np.array([record[f"{prefix}/{label}"] for label in LABELS])


def updates(spy):
    """The log lines of the updates."""
    return [record for record in records(spy.folder) if "reward/add" in record]


def check_draws(spy, prior, values):
    """From the logged raw rewards follow Q, p, the log lines and the p that every batch is drawn
    with."""
    args, lines = spy.args, {record["step"]: record for record in updates(spy)}
    first, draws = records(spy.folder), spy.of("batch")
    (first,) = [r for r in first if r["step"] == 0 and "mixture/add" in r]
    assert not any(name.startswith("reward") for name in first)
    assert vector(first, "value") == pytest.approx(values, abs=1e-12)
    assert vector(first, "mixture") == pytest.approx(
        own_probabilities(values, prior, args.beta, args.gamma), abs=1e-12
    )
    assert [event.given["step"] for event in draws] == list(range(len(draws)))
    for step, event in enumerate(draws):
        if step in lines:
            values = own_values(values, vector(lines[step], "reward"), args.alpha)
            assert vector(lines[step], "value") == pytest.approx(values, abs=1e-12)
        p = own_probabilities(values, prior, args.beta, args.gamma)
        assert event.given["probabilities"] == pytest.approx(p, abs=1e-12)
        if step in lines:
            assert vector(lines[step], "mixture") == pytest.approx(p, abs=1e-12)
    return values, p


def check_rewards(spy):
    """The logged rewards are those of the formulas, from the state that training is in, with the
    learning rate of the next step."""
    rates = [event.given["lr"] for event in spy.training("optimizer_step")]
    states = {event.given["step"]: event for event in spy.of("arm_rewards")}
    for record in updates(spy):
        step = record["step"]
        batches = [event.result for event in spy.of("reward_batches") if event.update == step]
        arms, expected = states[step].given["arms"], []
        assert list(arms) == LABELS
        assert len(batches) == 3
        for arm, (on, other) in zip(arms.values(), batches):
            parts = [arm[i] for i in on], [arm[i] for i in other]
            expected.append(own_reward(spy.twin, states[step], *parts, rates[step], spy.args))
        assert vector(record, "reward") == pytest.approx(expected, rel=2e-3, abs=1e-6)
        assert np.ptp(expected) > 0.01


def check_steps(spy):
    """Every step of training is AdamW's on the batch that was drawn, from where the last one
    ended: nothing that is tried on the way remains."""
    batches, steps = spy.training("backward"), spy.training("optimizer_step")
    ends = [event.theta for event in batches[1:]]
    for batch, step, end in zip(batches, steps, ends):
        lr, args, drawn = step.given["lr"], spy.args, batch.given["examples"]
        assert batch.training
        losses = spy.twin.measures(batch.theta, drawn)[:, 0]
        assert batch.result == pytest.approx(losses, rel=1e-4)
        gradient, decay = spy.twin.gradient(batch.theta, drawn), args.weight_decay
        own = adamw_step(batch, gradient, lr, decay * spy.twin.matrices, args.max_grad_norm)
        error = np.linalg.norm(end - batch.theta - own)
        assert error < 2e-3 * np.linalg.norm(own)


# ------------------------------------------------------------------------ the recipe


def test_the_recipe_as_it_stands_after_parsing():
    """TÜLU-2 with Llama-3.2-1B: γ 0.3, α 0.95, β 4, T 50, lr 1e-5, linear after 3 % warm-up, 2
    epochs of batches of 128, no weight decay. The last lines are not in the paper."""
    recipe = {"sampling": "dynamix", "gamma": 0.3, "alpha": 0.95, "beta": 4.0, "update_every": 50}
    recipe |= {"prior": True, "init": "zero", "reward": "loss"}
    recipe |= {"lr": 1e-5, "schedule": "linear", "warmup_ratio": 0.03, "weight_decay": 0.0}
    recipe |= {"epochs": 2.0, "max_steps": None, "batch_size": 128, "lora_rank": 0}
    ours = {"lookahead": "virtual", "reward_on": "same", "reward_batch_size": 16}
    ours |= {"max_grad_norm": 1.0, "seed": 0, "lora_dropout": 0.0}
    found = vars(dynamix_sft.parse_args([]))
    assert {name: found[name] for name in recipe | ours} == recipe | ours
    assert dynamix_sft.EPSILON == EPS
    shorter = dynamix_sft.parse_args(["--max_steps", "9"])
    assert (shorter.epochs, shorter.max_steps) == (None, 9)
    assert dynamix_sft.parse_args(["--epochs", "3"]).epochs == 3.0
    assert not dynamix_sft.parse_args(["--no-prior"]).prior


def test_equal_rewards_prefer_no_dataset():
    values = dynamix_sft.update_values([0.5, 0.2, 0.0], [0.3] * 3, 0.9)
    assert values == pytest.approx([0.45, 0.18, 0.0])


# ------------------------------------------------------------------------ one run, all of it


def test_learning_rates_and_steps(main_run):
    steps = main_run.training("optimizer_step")
    assert [event.given["lr"] for event in steps] == pytest.approx(RATES)
    assert {event.given["max_grad_norm"] for event in steps} == {0.5}
    assert min(event.result for event in steps) > 0.6  # so clipping changes every step
    check_steps(main_run)


def test_batches_are_what_was_drawn(main_run):
    """8 examples a step; index i of the pool is the i-th example, dataset after dataset."""
    pool = [(k, i) for k, size in enumerate(SIZES) for i in range(size)]
    draws, batches = main_run.of("batch"), main_run.training("backward")
    assert len(draws) == len(batches) == 7
    for draw, batch in zip(draws, batches):
        assert [pool[i] for i in draw.result] == keys(batch)
        assert len(keys(batch)) == 8
    assert len({tuple(keys(batch)) for batch in batches}) == 7


def test_values_and_probabilities(main_run):
    """--beta, --gamma, --alpha, the prior, Q = 0 at the start; no update before step 2."""
    values, p = check_draws(main_run, PRIOR, np.zeros(3))
    rows = main_run.summary["mixture"]
    assert [rows[label]["value"] for label in LABELS] == pytest.approx(values)
    assert [rows[label]["probability"] for label in LABELS] == pytest.approx(p)
    assert 0.01 < np.ptp(values) < 1


def test_rewards_equal_a_float64_look_ahead(main_run):
    check_rewards(main_run)


def test_when_and_where_rewards_are_measured(main_run):
    """After steps 2, 4 and 6, none after the last; for every dataset a gradient in training mode on
    5 of its examples (no two the same), at the weights that training has, and one step with the
    next learning rate."""
    events = main_run.of("arm_rewards")
    assert [event.given["step"] for event in events] == [2, 4, 6]
    assert [record["step"] for record in updates(main_run)] == [2, 4, 6]
    assert "mix   3 updates of 3 x 5 examples" in main_run.printed
    tried = []
    for event in events:
        step = event.given["step"]
        inside = [other for other in main_run.events if other.update == step]
        gradients = [other for other in inside if other.name == "backward"]
        moved = [other for other in inside if other.name == "optimizer_step"]
        assert [other.given["lr"] for other in moved] == pytest.approx([RATES[step]] * 3)
        after = main_run.training("backward")[step]
        for k, gradient in enumerate(gradients):
            assert gradient.training
            assert (gradient.theta == after.theta).all()
            assert gradient.t == step
            assert {dataset for dataset, _ in keys(gradient)} == {k}
            assert len(set(keys(gradient))) == 5
            tried.append(tuple(sorted(row for _, row in keys(gradient))))
    assert len(set(tried)) > 6  # other examples at every update


def test_measuring_is_in_evaluation_mode_and_fp32(main_run):
    inside = [e for e in main_run.of("response_states") if e.update is not None]
    measured = [event for event in inside if not event.training]
    assert measured
    assert {event.given["dtype"] for event in measured} == {"fp32"}
    # 3 looks after; before, the gradient's own losses serve
    scores = [e for e in main_run.of("score") if e.update == 2]
    assert len(scores) == 3


def counted(batches, upto):
    """Examples and response tokens by dataset in the first batches, (2, 3)."""
    seen = np.zeros((2, 3), int)
    for batch in batches[:upto]:
        for example in batch.given["examples"]:
            seen[:, example.dataset] += 1, len(example.ids) - example.start
    return seen


def test_training_lines(main_run):
    """After step 1, every 3 steps and the last: loss over the last 3 steps by tokens, learning rate
    and norm of the step, the mixture it was drawn with, what was drawn so far."""
    batches, steps = main_run.training("backward"), main_run.training("optimizer_step")
    lines = [record for record in records(main_run.folder) if "train/loss" in record]
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    for line in lines:
        step, total, tokens = line["step"], 0.0, 0
        for batch in batches[max(0, step - 3) : step]:
            counts = [len(example.ids) - example.start for example in batch.given["examples"]]
            total, tokens = total + batch.result @ counts, tokens + sum(counts)
        assert line["train/loss"] == pytest.approx(total / tokens)
        assert line["train/lr"] == pytest.approx(RATES[step - 1])
        assert line["train/grad_norm"] == steps[step - 1].result
        assert line["epoch"] == pytest.approx(step / 6)
        p = main_run.of("batch")[step - 1].given["probabilities"]
        assert vector(line, "mixture") == pytest.approx(p)
        seen = counted(batches, step)
        assert (line["step"], line["examples"], line["tokens"]) == (step, 8 * step, seen[1].sum())
        assert vector(line, "share") == pytest.approx(seen[0] / seen[0].sum())
        assert vector(line, "token_share") == pytest.approx(seen[1] / seen[1].sum())
        assert vector(line, "passes") == pytest.approx(seen[0] / SIZES)


def test_summary_counts_what_was_drawn(main_run):
    """Coverage 1 is one example drawn for each of a dataset in each of 7/6 epochs."""
    seen, summary = counted(main_run.training("backward"), 7), main_run.summary
    assert (summary["steps"], summary["examples"], summary["updates"]) == (7, 56, 3)
    assert summary["tokens"] == seen[1].sum()
    for k, label in enumerate(LABELS):
        row, (drawn, tokens) = summary["mixture"][label], seen[:, k]
        assert (row["size"], row["examples"], row["tokens"]) == (SIZES[k], drawn, tokens)
        assert row["share"] == pytest.approx(drawn / 56)
        assert row["token_share"] == pytest.approx(tokens / seen[1].sum())
        assert row["passes"] == pytest.approx(drawn / SIZES[k])
        assert row["coverage"] == pytest.approx(drawn / (SIZES[k] * 7 / 6))
        shares = f"({drawn / 56:.1%} of the examples, {row['token_share']:.1%} of the tokens)"
        assert f"drawn {drawn} {shares}" in main_run.printed
        assert f"coverage {row['coverage']:.0%}" in main_run.printed


def test_update_lines_name_the_extremes(main_run):
    for record in updates(main_run):
        rewards = vector(record, "reward")
        high, low = np.argmax(rewards), np.argmin(rewards)
        line = f"reward {record['step']}  highest {LABELS[high]} {rewards[high]:.4g}"
        assert f"{line}  lowest {LABELS[low]} {rewards[low]:.4g}" in main_run.printed


def test_cost_is_the_seconds_of_updates_over_those_of_training(main_run):
    """On a clock on which a gradient takes 1 s, a scoring 1/4 s and nothing else any."""
    inside = [event for event in main_run.of("score") if event.update is not None]
    reward = 9 * BACKWARD + SCORE * len(inside)
    spent = main_run.summary["time"]
    assert (spent["train"], spent["reward"], spent["eval"]) == (7, reward, 5 * SCORE)
    cost = main_run.summary["cost"]
    assert cost == {"reward": pytest.approx(reward / 7), "total": pytest.approx(1 + reward / 7)}
    assert f"cost  {1 + reward / 7:.3f}x static sampling" in main_run.printed


def test_evaluations_and_checkpoints_around_updates(main_run):
    """Evaluated is the model that the step made (before the update), and a checkpoint has the
    values that the update made."""
    batches, folder = main_run.training("backward"), main_run.folder
    found = [record for record in records(folder) if "eval/sort/nll" in record]
    assert [record["step"] for record in found] == [0, 2, 4, 6, 7]
    scored = [event for event in main_run.training("score")]
    weights = [batches[step].theta for step in (0, 2, 4, 6)] + [scored[-1].theta]
    for record, theta, event in zip(found, weights, scored):
        parts = event.given["examples"]
        tokens = np.array([len(example.ids) - example.start for example in parts])
        own = main_run.twin.measures(theta, parts)[:, 0] @ tokens / tokens.sum()
        assert record["eval/sort/nll"] == pytest.approx(own, rel=1e-4)
    assert main_run.summary["eval"]["sort"]["nll"] == found[-1]["eval/sort/nll"]
    assert np.abs(scored[-1].theta - batches[-1].theta).max() > 0
    after_four = [set(r) for r in records(folder) if r["step"] == 4]
    assert ["eval/sort/nll" in names for names in after_four] == [True, False]

    (saved,) = main_run.of("save_checkpoint")
    state = saved.given["state"]
    assert state["sampler"]["values"].tolist() == pytest.approx(
        vector(updates(main_run)[1], "value")
    )
    assert (state["counts"]["steps"], state["counts"]["updates"]) == (4, 2)
    seen = counted(batches, 4)
    assert state["seen"].tolist() == seen.tolist()
    assert state["cursors"].tolist() == seen[0].tolist()
    assert (saved.theta == batches[4].theta).all()


# ------------------------------------------------------------------------ --sampling


def test_full_coverage(spied):
    """--sampling proportional: every epoch is one shuffled pass over everything, in near-equal
    batches; no rewards, no values, whatever --update_every says."""
    run = spied("full", "--sampling", "proportional", "--epochs", "2", "--update_every", "1")
    batches = run.training("backward")
    assert not run.of("batch", "arm_rewards", "restore")
    everything = [(k, i) for k, size in enumerate(SIZES) for i in range(size)]
    assert len(batches) == 12
    orders = []
    for epoch in range(2):
        drawn = [keys(batch) for batch in batches[6 * epoch : 6 * epoch + 6]]
        assert sorted(sum(drawn, [])) == everything
        assert {len(batch) for batch in drawn} == {7}
        shuffled = data.data_rng(0, "order", epoch).permutation(42).reshape(6, 7)
        for batch, order in zip(drawn, shuffled):
            assert set(batch) == {everything[i] for i in order}
        orders.append(drawn)
    assert orders[0] != orders[1]
    rates = [event.given["lr"] for event in run.of("optimizer_step")]
    assert rates == pytest.approx([1e-2, *np.arange(11, 0, -1) / 11 * 1e-2])  # the paper's schedule
    summary = run.summary
    assert (summary["steps"], summary["examples"], summary["updates"]) == (12, 84, 0)
    assert summary["cost"] == {"reward": 0, "total": 1}
    for label, share in zip(LABELS, PRIOR):
        row = summary["mixture"][label]
        assert (row["passes"], row["coverage"], row["value"]) == (2, 1, 0)
        assert row["probability"] == pytest.approx(share)
        assert row["share"] == pytest.approx(share)


def test_uniform(spied):
    """--sampling uniform: every batch is drawn with 1/K, and there is no update."""
    run = spied("uniform", "--sampling", "uniform", "--max_steps", "3", "--update_every", "1")
    assert len(run.of("batch")) == 3
    for event in run.of("batch"):
        assert event.given["probabilities"] == pytest.approx(UNIFORM)
    assert not run.of("arm_rewards", "restore")
    for record in records(run.folder):
        assert vector(record, "mixture") == pytest.approx(UNIFORM)
    assert run.summary["updates"] == 0


def test_no_updates(spied):
    """--update_every 0: the batches of the start's mixture to the end."""
    run = spied("static", "--update_every", "0", "--max_steps", "2", "--gamma", "0.5")
    assert not run.of("arm_rewards", "restore", "reward_batches")
    check_draws(run, PRIOR, np.zeros(3))
    assert "no update in this run" in run.printed


# ------------------------------------------------------------------------ --prior, --init

SHORT = ["--max_steps", "3", "--update_every", "1", "--save_every", "0", "--log_every", "1"]


def test_without_the_prior(spied):
    """--no-prior: uniform at Q = 0, and the weights are exp(β Q) alone."""
    run = spied("no-prior", *SHORT, "--no-prior", "--gamma", "0.1", "--alpha", "0.2")
    assert run.of("batch")[0].given["probabilities"] == pytest.approx(UNIFORM)
    check_draws(run, UNIFORM, np.zeros(3))
    check_rewards(run)


def test_proportional_start(spied):
    """--init proportional: Q = log p0 / β up to a constant (largest 0), kept at the rate α."""
    flags = ["--no-prior", "--init", "proportional", "--beta", "2.5", "--gamma", "0.3"]
    run = spied("init", *SHORT, *flags, "--alpha", "0.7")
    start = 0.7 * PRIOR + 0.3 / 3
    assert run.of("batch")[0].given["probabilities"] == pytest.approx(start)
    check_draws(run, UNIFORM, np.log([1, 12 / 24, 6 / 24]) / 2.5)


# ------------------------------------------------------------------------ rewards, one by one


def make_args(*flags):
    common_flags = ["--micro_batch_size", "3", "--reward_batch_size", "8"]
    args = dynamix_sft.parse_args([*common_flags, "--weight_decay", "0.5", *flags])
    args.dtype = "bf16" if "bf16" in flags else "fp32"
    return args


def trained(model, examples, args, steps):
    """A model after some steps of training -> its optimizer. The last rates are not the next."""
    optimizer = adamw(model.train(), 5e-3, args.weight_decay)
    for step in range(steps):
        common.backward(model, [part[step] for part in examples], args)
        common.optimizer_step(model, optimizer, 5e-3, 1.0)
    return optimizer


def spied_rewards(model, optimizer, examples, args, lr=2e-3, step=4):
    """-> rewards (K,), and the spy that watched."""
    arms = dict(zip(LABELS, examples))
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        return dynamix_sft.arm_rewards(model, optimizer, arms, step, lr, args), spy


VARIANTS = {
    "virtual": [],
    "virtual-fresh": ["--reward_on", "fresh"],
    "entropy": ["--reward", "entropy"],
    "entropy-fresh": ["--reward", "entropy", "--reward_on", "fresh"],
    "first-order": ["--lookahead", "first_order"],
    "first-order-fresh": ["--lookahead", "first_order", "--reward_on", "fresh"],
}


def batches_of(spy, examples):
    """What each dataset's reward was stepped and measured on, by the chosen indices."""
    pairs = zip(examples, spy.of("reward_batches"))
    return [[[part[i] for i in chosen] for chosen in event.result] for part, event in pairs]


@pytest.mark.parametrize("steps, max_norm", [(0, "1e9"), (3, "0.2")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_equal_the_formulas(examples, variant, steps, max_norm):
    """--reward, --lookahead and --reward_on: gradient, clipping, AdamW's moments, bias correction
    and decay in numpy, the full softmax. The datasets are too small for two batches of 8 (12
    examples, 6) or for one (6)."""
    args, model = make_args(*VARIANTS[variant], "--max_grad_norm", max_norm), random_model("llama")
    optimizer = trained(model, examples, args, steps)
    rewards, spy = spied_rewards(model, optimizer, examples, args)
    first, batches, fresh = spy.of("arm_rewards")[0], batches_of(spy, examples), "fresh" in variant
    assert first.t == steps
    sizes = [(len(on), len(measured)) for on, measured in batches]
    assert sizes == ([(8, 8), (6, 6), (3, 3)] if fresh else [(8, 8), (8, 8), (6, 6)])
    twin, expected = Twin(model), []
    for k, (on, measured) in enumerate(batches):
        assert len({key(example) for example in on + measured}) == sum(sizes[k]) // (2 - fresh)
        assert {example.dataset for example in on + measured} == {k}
        expected.append(own_reward(twin, first, on, measured, 2e-3, args))
    assert rewards == pytest.approx(expected, rel=1e-3, abs=2e-7)
    assert len(set(np.round(expected, 4))) == 3
    gradients = [keys(event) for event in spy.of("backward")]
    taken = [list(map(key, on)) for on, _ in batches]
    if variant == "first-order-fresh":
        assert gradients[::2] == taken
    else:
        assert gradients == taken


def test_fresh_losses_after_a_dataset_of_one_example(examples):
    """One example is stepped on and measured on, so the gradient's own losses would do for it; they
    would not for the datasets that follow."""
    parts = [examples[0][:1], *examples[1:]]
    args, model = make_args("--reward_on", "fresh"), random_model("llama")
    optimizer = trained(model, examples, args, 1)
    rewards, spy = spied_rewards(model, optimizer, parts, args)
    twin, first, expected = Twin(model), spy.of("arm_rewards")[0], []
    for on, measured in batches_of(spy, parts):
        expected.append(own_reward(twin, first, on, measured, 2e-3, args))
    assert rewards == pytest.approx(expected, rel=1e-3, abs=2e-7)


def test_first_order_takes_no_step(spied):
    """--lookahead first_order in a run: the rewards are those of the formula and training goes on
    from where it was."""
    run = spied("first", *SHORT, *VARIANTS["first-order-fresh"], "--weight_decay", "0.2")
    assert len(run.of("optimizer_step")) == 3
    assert not run.of("restore")
    check_rewards(run)
    check_draws(run, PRIOR, np.zeros(3))
    check_steps(run)


def dropout_model():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


@pytest.mark.parametrize("variant", list(VARIANTS)[:4])
@pytest.mark.parametrize("kind", ["bf16", "dropout"])
def test_measured_in_fp32_and_without_dropout(examples, kind, variant):
    """The step is one of training (bf16, dropout), the measurement is not: the reward is the
    relative drop, in float64 and evaluation mode, between the states before and after the step."""
    torch.manual_seed(0)
    flags = ["--dtype", "bf16"] if kind == "bf16" else []
    args = make_args(*flags, *VARIANTS[variant])
    model = random_model("llama") if kind == "bf16" else dropout_model()
    optimizer = trained(model, examples, args, 3)
    rewards, spy = spied_rewards(model, optimizer, examples, args)
    twin, expected = Twin(model), []
    for event, (_, measured) in zip(spy.of("restore"), batches_of(spy, examples)):
        before, after = (
            twin.measures(theta, measured)[:, int(args.reward == "entropy")]
            for theta in (spy.events[0].theta, event.theta)
        )
        expected.append(np.mean((before - after) / (before + EPS)))
    assert rewards == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for event in spy.of("response_states"):
        assert event.given["dtype"] == (kind if event.training and kind == "bf16" else "fp32")
    assert all(event.training for event in spy.of("backward"))
    assert model.training


def test_first_order_under_dropout_leaves_the_generator(examples):
    args, model = make_args("--lookahead", "first_order"), dropout_model()
    optimizer = trained(model, examples, args, 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    spied_rewards(model, optimizer, examples, args)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_entropies_and_losses_are_nats_per_response_token(examples):
    model, parts = random_model("llama"), [examples[0][0], examples[1][0], examples[2][0]]
    measures = Twin(model).measures(flat(model.parameters()), parts)
    for column, reward in enumerate(("loss", "entropy")):
        got = dynamix_sft.look(model.train(), parts, make_args("--reward", reward))
        assert got == pytest.approx(measures[:, column], rel=1e-5)


def test_epsilon_counts_where_losses_are_small(examples, monkeypatch):
    """Losses of 3e-6 nats per token before and 1e-6 after: r = 2e-6 / (3e-6 + 1e-6). To first
    order: the same gradients, by a loss of 1e-6 and of 3e-6, differ by the factor 2."""
    model, looks = random_model("llama"), []
    optimizer = trained(model, examples, make_args(), 1)

    def tiny(model, examples, *_):
        tokens = np.array([len(example.ids) - example.start for example in examples])
        looks.append(3e-6 if len(looks) % 2 == 0 else 1e-6)
        return looks[-1] * tokens, tokens, None

    with monkeypatch.context() as patch:
        patch.setattr(common, "score", tiny)
        patch.setattr(common, "same_rng", lambda state: False)  # both losses are measured
        rewards, _ = spied_rewards(model, optimizer, examples, make_args())
    assert rewards == pytest.approx([0.5] * 3)

    backward, pairs = common.backward, []
    for loss in (1e-6, 3e-6):
        with monkeypatch.context() as patch:
            constant = lambda *args, loss=loss: 0 * backward(*args) + loss  # noqa: E731
            patch.setattr(common, "backward", constant)
            args = make_args("--lookahead", "first_order")
            pairs.append(spied_rewards(model, optimizer, examples, args)[0])
    assert pairs[0] / pairs[1] == pytest.approx([2.0] * 3)


def test_reward_batches_are_random(examples):
    """Every example is as likely as any other; other ones for another step and another seed."""
    chosen = np.zeros((2, 20))
    for seed in range(600):
        rng = np.random.default_rng(seed)
        for half, indices in enumerate(dynamix_sft.reward_batches(20, 5, True, rng)):
            chosen[half, indices] += 1
    assert np.abs(chosen / 600 - 0.25).max() < 0.08  # 4.5 standard deviations
    args, model = make_args("--lookahead", "first_order"), random_model("llama")
    optimizer = trained(model, examples, args, 1)
    drawn = []
    for seed, step in ((0, 4), (0, 8), (1, 4), (0, 4)):
        args.seed = seed
        _, spy = spied_rewards(model, optimizer, examples, args, step=step)
        drawn.append([keys(event) for event in spy.of("backward")])
    assert drawn[0] == drawn[3]
    assert all(drawn[0] != other for other in drawn[1:3])

"""DynamixSFT: equations by hand, the virtual step against a plain loop, no traces, baselines,
resume, the command."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    GPT2,
    adamw,
    error_line,
    killed_at,
    own_logits,
    plain_step,
    random_model,
    read_json,
    records,
    same,
    state_of,
    values,
    weights,
    windowed,
)
from safetensors.torch import load_file

import common
import data
import dynamix_sft

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# ------------------------------------------------------------------------ sampling and values


def test_probabilities_by_hand():
    # exp(β Q) = 3, 1 and p0 = 1/4, 3/4: weights 3/4, 3/4
    q = [math.log(3) / 2, 0.0]
    p = dynamix_sft.sampling_probabilities(q, [0.25, 0.75], 2.0, 0.2)
    assert p == pytest.approx([0.5, 0.5])
    # exp(β Q) = 9, 1, 3 and p0 = 1/2, 3/10, 1/5: weights 4.5, 0.3, 0.6 of 5.4
    p = dynamix_sft.sampling_probabilities([1.0, 0.0, 0.5], [5, 3, 2], math.log(9), 0.3)
    assert p == pytest.approx([0.7 * 45 / 54 + 0.1, 0.7 * 3 / 54 + 0.1, 0.7 * 6 / 54 + 0.1])


def test_probabilities_invariants():
    rng = np.random.default_rng(0)
    for K in (1, 2, 7, 19):
        q, prior, gamma = rng.random(K), rng.random(K) + 0.01, rng.random()
        proportions = prior / prior.sum()

        p = dynamix_sft.sampling_probabilities(q, prior, 4.0, gamma)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p >= gamma / K - 1e-15).all()

        for constant in (0.0, 0.7, -300.0):  # Q constant: the mixed prior
            flat = dynamix_sft.sampling_probabilities(np.full(K, constant), prior, 4.0, gamma)
            assert flat == pytest.approx((1 - gamma) * proportions + gamma / K)

        order = rng.permutation(K)
        permuted = dynamix_sft.sampling_probabilities(q[order], prior[order], 4.0, gamma)
        assert permuted == pytest.approx(p[order])

        cold = dynamix_sft.sampling_probabilities(q, prior, 0.0, 0.0)
        assert cold == pytest.approx(proportions)
        uniform = dynamix_sft.sampling_probabilities(q, prior, 4.0, 1.0)
        assert uniform == pytest.approx(np.full(K, 1 / K))

        higher = q + np.eye(K)[0] * 0.1  # a higher value is never drawn less
        assert dynamix_sft.sampling_probabilities(higher, prior, 4.0, gamma)[0] >= p[0]


def test_probabilities_of_huge_beta_and_tiny_priors():
    for beta in (1e3, 1e9, 1e300):
        p = dynamix_sft.sampling_probabilities([0.2, 1.0, 0.9], [0.5, 0.3, 0.2], beta, 0.3)
        assert p == pytest.approx([0.1, 0.8, 0.1])
    p = dynamix_sft.sampling_probabilities([1.0, 0.0], [0.0, 1.0], 1e6, 0.1)
    assert p == pytest.approx([0.05, 0.95])  # an empty arm keeps the floor
    p = dynamix_sft.sampling_probabilities([0.0, 1.0], [1.0, 1e-300], 5.0, 0.3)
    assert np.isfinite(p).all()


def test_bad_input_is_refused():
    bad_probabilities = [
        ([0.0, math.nan], [1, 1], 1, 0),
        ([0.0], [1, 1], 1, 0),
        ([0.0, 0.0], [0, 0], 1, 0),
        ([0.0, 0.0], [2, -1], 1, 0),
        ([0.0, 0.0], [1, 1], -1, 0),
        ([0.0, 0.0], [1, 1], 1, 1.5),
        ([], [], 1, 0),
    ]
    for arguments in bad_probabilities:
        with pytest.raises(ValueError):
            dynamix_sft.sampling_probabilities(*arguments)
    bad_losses = [([1.0, math.inf], [1.0, 1.0]), ([1.0], [math.nan]), ([1.0, 2.0], [1.0]), ([], [])]
    for before, after in bad_losses:
        with pytest.raises(ValueError):
            dynamix_sft.lookahead_reward(before, after, 1e-6)
    bad_rewards = [
        ([0.0, 0.0], [1.0, math.nan], 0.9),
        ([0.0], [1.0, 2.0], 0.9),
        ([0.0], [1.0], 1.1),
    ]
    for arguments in bad_rewards:
        with pytest.raises(ValueError):
            dynamix_sft.update_values(*arguments)


def test_reward_by_hand():
    reward = dynamix_sft.lookahead_reward([2.0, 4.0], [1.0, 5.0], 0.0)
    assert reward == pytest.approx((1 / 2 - 1 / 4) / 2)
    reward = dynamix_sft.lookahead_reward([2.0, 4.0], [1.0, 5.0], 1.0)
    assert reward == pytest.approx((1 / 3 - 1 / 5) / 2)
    assert dynamix_sft.lookahead_reward([0.0, 1.0], [0.0, 1.0], 1e-6) == 0.0


def test_values_by_hand():
    assert dynamix_sft.min_max([1.0, 3.0, 2.0]).tolist() == [0.0, 1.0, 0.5]
    assert dynamix_sft.min_max([0.1] * 3).tolist() == [0.0] * 3
    assert dynamix_sft.min_max([7.0]).tolist() == [0.0]
    q = dynamix_sft.update_values([0.2, 0.4, 0.0], [-1.0, 3.0, 1.0], 0.9)
    assert q == pytest.approx([0.18, 0.46, 0.05])
    q = dynamix_sft.update_values([0.5, 0.5], [2.0, 2.0], 0.9)
    assert q == pytest.approx([0.45, 0.45])


def test_proportional_start_is_the_priors_start():
    p0, uniform = np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    q = dynamix_sft.proportional_values(p0, 4.0)
    start = dynamix_sft.sampling_probabilities(np.zeros(3), p0, 4.0, 0.3)
    assert dynamix_sft.sampling_probabilities(q, uniform, 4.0, 0.3) == pytest.approx(start)
    for _ in range(200):  # a prior stays, a start is forgotten
        q = dynamix_sft.update_values(q, [1.0, 1.0, 1.0], 0.95)
    end = dynamix_sft.sampling_probabilities(q, uniform, 4.0, 0.3)
    assert end == pytest.approx(uniform, abs=1e-3)


# ------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    "size, count, fresh, on, measured",
    [
        (50, 8, False, 8, 8),
        (5, 8, False, 5, 5),
        (50, 8, True, 8, 8),
        (13, 8, True, 7, 6),
        (2, 8, True, 1, 1),
        (1, 8, True, 1, 1),
        (1, 8, False, 1, 1),
    ],
)
def test_reward_batches(size, count, fresh, on, measured):
    rng = data.data_rng(0, "reward", 5, 0)
    a, b = dynamix_sft.reward_batches(size, count, fresh, rng)
    assert (len(a), len(b)) == (on, measured)
    assert len(set(a.tolist())) == on
    assert len(set(b.tolist())) == measured
    assert max(*a, *b) < size
    if fresh and size > 1:
        assert not set(a.tolist()) & set(b.tolist())
    else:
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("scale, softcap, bias", [(1.0, None, False), (0.5, 2.0, True)])
def test_entropy_equals_full_logits(monkeypatch, scale, softcap, bias):
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 4)
    rng = torch.Generator().manual_seed(0)
    shapes = [(10, 6), (11, 6), (11,)] if bias else [(10, 6), (11, 6)]
    hidden, *head = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes)
    logits = scale * torch.nn.functional.linear(hidden, *head)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    exact = torch.distributions.Categorical(logits=logits).entropy()
    head = common.Head(head[0], head[1] if bias else None, scale, softcap)
    assert (dynamix_sft.response_entropy(hidden, head) - exact).abs().max() < 1e-12
    flat = dynamix_sft.response_entropy(torch.zeros(2, 6), common.Head(torch.randn(11, 6)))
    assert flat.tolist() == pytest.approx([math.log(11)] * 2)


def make_args(*flags):
    small = ["--micro_batch_size", "3", "--reward_batch_size", "8", "--weight_decay", "0.1"]
    args = dynamix_sft.parse_args([*small, *flags])
    args.dtype = "fp32"
    return args


def make_arms(tokenizer, *specs):
    loaded = data.load_data(list(specs))
    return data.encode_datasets(loaded, data.with_template(tokenizer, "plain"), 256, quiet=True)


def trained(model, arms, args, steps=3):
    """A model in the middle of training -> its optimizer."""
    optimizer = adamw(model.train(), 1e-3, args.weight_decay)
    for step in range(steps):
        common.backward(model, [arm[step] for arm in arms], args)
        common.optimizer_step(model, optimizer, 1e-3, 1.0)
    return optimizer


def rewards_of(model, optimizer, arms, args, lr=2e-3):
    """The rewards after step 4; the arms are called a, b, c."""
    return dynamix_sft.arm_rewards(model, optimizer, dict(zip("abc", arms)), 4, lr, args)


def plain_losses(model, examples):
    """Per example: mean loss and mean entropy of the model's own logits, one example at a time,
    evaluation mode -> (b, 2)."""
    model.eval()
    result = []
    for example in examples:
        with torch.no_grad():
            logits, targets = own_logits(model, example)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        result.append([loss.item(), entropy.item()])
    return np.array(result)


def own_optimizer(model, optimizer, lr):
    """torch's AdamW over `model`, in the state of `optimizer`."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    own = torch.optim.AdamW(groups, lr=lr, foreach=False)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"] = own.state_dict()["param_groups"]
    own.load_state_dict(state)
    return own


def own_step(model, optimizer, examples, max_norm):
    """Full logits, mean over the batch's tokens, clip, step; one example after the other."""
    total = 0.0
    for example in examples:
        logits, targets = own_logits(model, example)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (total / sum(len(e.ids) - e.start for e in examples)).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for p in model.parameters():
        p.grad *= min(1.0, max_norm / norm.item())
    optimizer.step()


@pytest.mark.parametrize("max_norm", [1e9, 0.3])
@pytest.mark.parametrize("flags", [[], ["--reward_on", "fresh"], ["--reward", "entropy"]])
def test_virtual_step_equals_a_plain_loop(tokenizer, flags, max_norm):
    """A copy of the model and of torch's own AdamW, written out: full logits, mean over the batch's
    tokens, clip, step."""
    args = make_args(*flags, "--max_grad_norm", str(max_norm))
    arms = make_arms(tokenizer, "toy/copy#30", "toy/describe#30", "toy/add#5")
    model = random_model("llama")
    optimizer = trained(model, arms, args)
    fresh, column = "fresh" in flags, int("entropy" in flags)
    expected = []
    for k, arm in enumerate(arms):
        seed = [args.seed, data.stream_id("reward"), 4, k]
        order = np.random.default_rng(seed).permutation(len(arm))
        count = min(8, (len(arm) + 1) // 2) if fresh else min(8, len(arm))
        on = [arm[i] for i in order[:count]]
        measured = [arm[i] for i in order[count : 2 * count]] if fresh else on
        assert len({e.row for e in on + measured}) == min(len(arm), 16 if fresh else 8)
        twin = copy.deepcopy(model)
        before = plain_losses(twin, measured)
        own_step(twin, own_optimizer(twin, optimizer, 2e-3), on, max_norm)
        after = plain_losses(twin, measured)
        expected.append(np.mean((before - after)[:, column] / before[:, column]))
    got = rewards_of(model, optimizer, arms, args)
    assert got == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert len(set(np.round(got, 6))) == 3


def test_reward_does_not_depend_on_micro_batches(tokenizer):
    arms = make_arms(tokenizer, "toy/copy#30", "toy/describe#30")
    rewards = []
    for size in ("1", "3", "8"):
        model, args = random_model("llama"), make_args("--micro_batch_size", size)
        optimizer = trained(model, arms, args)
        rewards.append(rewards_of(model, optimizer, arms, args))
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-3)
    assert rewards[2] == pytest.approx(rewards[0], rel=1e-3)


def dropout_model(share=0.1):
    """GPT-2 with its own dropout, of 0.1."""
    shares = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), share)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **shares))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--reward_on", "fresh"],
        ["--reward", "entropy"],
        ["--lookahead", "first_order"],
        ["--lookahead", "first_order", "--reward_on", "fresh"],
    ],
)
@pytest.mark.parametrize("kind", ["full", "dropout", "lora", "cold"])
def test_rewards_leave_no_trace(tokenizer, model_folder, kind, flags):
    """Bit for bit: weights, moments, step count, learning rate, RNG, mode, no gradients; and so the
    steps that follow."""
    args = make_args(*flags)
    arms = make_arms(tokenizer, "toy/copy#20", "toy/add#20")
    torch.manual_seed(0)
    if kind == "lora":
        adapter = make_args("--lora_rank", "2", "--lora_dropout", "0.2")
        model, _ = common.load_trainable(model_folder("llama"), adapter)
    else:
        model = dropout_model() if kind == "dropout" else random_model("llama")
    optimizer = trained(model, arms, args, 0 if kind == "cold" else 3)
    twin = copy.deepcopy(model)
    twin_optimizer = adamw(twin, 1e-3, args.weight_decay)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    next(model.modules()).eval()
    next(model.children()).train()  # a mixed mode comes back as it was
    before = state_of(model, optimizer)
    rewards = rewards_of(model, optimizer, arms, args)
    assert (rewards != 0).all()
    assert same(before, state_of(model, optimizer))
    model.train()
    assert rewards.tolist() == rewards_of(model, optimizer, arms, args).tolist()

    for each, its_optimizer in ((model, optimizer), (twin.train(), twin_optimizer)):
        torch.manual_seed(5)
        common.backward(each, arms[0][:8], args)
        common.optimizer_step(each, its_optimizer, 1e-3, 1.0)
    assert same(list(model.parameters()), list(twin.parameters()))


@pytest.fixture()
def measured(monkeypatch):
    """A list that grows by one at every call of dynamix_sft.look."""
    calls, look = [], dynamix_sft.look

    def counted(*args):
        calls.append(1)
        return look(*args)

    monkeypatch.setattr(dynamix_sft, "look", counted)
    return calls


def test_losses_before_the_step_are_evaluation_losses(tokenizer, measured, monkeypatch):
    """The training forward's losses are taken only where they are the evaluation losses: not under
    dropout, however little it changes, not in bf16."""
    arms = make_arms(tokenizer, "toy/copy#20", "toy/add#20", "toy/sort#20")
    cases = [(0.0, "fp32", 3), (0.1, "fp32", 6), (1e-9, "fp32", 6), (0.0, "bf16", 6)]
    for dropout, dtype, expected in cases:
        torch.manual_seed(0)
        model = dropout_model(dropout) if dropout else random_model("llama")
        args = make_args()
        args.dtype = dtype
        optimizer = trained(model, arms, args)
        measured.clear()
        fast = rewards_of(model, optimizer, arms, args)
        assert len(measured) == expected
        with monkeypatch.context() as patch:
            patch.setattr(common, "same_rng", lambda state: False)
            slow = rewards_of(model, optimizer, arms, args)
        assert fast == pytest.approx(slow, rel=1e-3)


def test_a_reward_batch_holds_one_dataset(tokenizer):
    """... and is stepped on and measured alike; what is credited to dataset k comes from k's
    examples alone."""
    one, two = make_arms(tokenizer, "toy/copy#20", "toy/add#20")
    args, model = make_args(), random_model("llama")
    optimizer = trained(model, [one, two], args)
    only_one = rewards_of(model, optimizer, [one, one], args)
    only_two = rewards_of(model, optimizer, [two, two], args)
    both = rewards_of(model, optimizer, [one, two], args)
    assert both.tolist() == [only_one[0], only_two[1]]


@pytest.mark.parametrize("flags", [[], ["--reward", "entropy"], ["--reward_on", "fresh"]])
def test_non_finite_losses_name_the_dataset(tokenizer, write_jsonl, flags):
    bad = write_jsonl("bad.jsonl", [{"prompt": "~", "response": f"{i} ~~"} for i in range(10)])
    arms = make_arms(tokenizer, "toy/copy#20", f"tilde={bad}")
    model, args = random_model("llama"), make_args(*flags)
    optimizer = trained(model, [arms[0]], args)
    (tilde,) = tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[tilde] = math.inf
    message = r"reward of dataset 'tilde' after step 4: .*(finite|nan|inf)"
    with pytest.raises(data.UserError, match=message):
        named = {"copy": arms[0], "tilde": arms[1]}
        dynamix_sft.arm_rewards(model, optimizer, named, 4, 2e-3, args)


def test_non_finite_first_order_reward_names_the_dataset(tokenizer, monkeypatch):
    arms = make_arms(tokenizer, "toy/copy#20", "toy/add#20")
    args, model = make_args("--lookahead", "first_order"), random_model("llama")
    optimizer = trained(model, arms, args)
    backward = common.backward

    def infinite_on_add(model, examples, args):
        return backward(model, examples, args) * (math.inf if examples[0].dataset else 1)

    monkeypatch.setattr(common, "backward", infinite_on_add)
    with pytest.raises(data.UserError, match="reward of dataset 'add' after step 4"):
        named = {"copy": arms[0], "add": arms[1]}
        dynamix_sft.arm_rewards(model, optimizer, named, 4, 2e-3, args)


@pytest.mark.parametrize("max_norm", [1e9, 0.1])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_adamw_update_is_what_the_optimizer_does(tokenizer, max_norm, steps):
    arms = make_arms(tokenizer, "toy/copy#20", "toy/add#20")
    args, model = make_args(), random_model("llama")
    optimizer = trained(model, arms, args, steps)
    common.backward(model, arms[0][:5], args)
    before = state_of(model, optimizer)
    updates = list(dynamix_sft.next_updates(model, optimizer, 3e-3, max_norm))
    assert same(before, state_of(model, optimizer))
    common.optimizer_step(model, optimizer, 3e-3, max_norm)
    parameters = list(model.parameters())
    assert len(updates) == len(parameters)
    for p, old, update in zip(parameters, before["weights"], updates):
        limit = 1e-5 * 3e-3 + 3e-7 * old.abs().max()
        assert (p.detach() - old - update).abs().max() < limit


def test_first_order_reward_by_hand_and_as_the_limit_of_small_steps(tokenizer):
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    updates = [torch.tensor([-0.1, 0.2]), torch.tensor([[-1.0]])]
    reward = dynamix_sft.first_order_reward(gradients, updates, 2.0, 0.5)
    assert reward == pytest.approx(-(-0.1 + 0.4 - 3.0) / 2.5)
    arms = make_arms(tokenizer, "toy/describe#20", "toy/copy#20")
    model = random_model("llama")
    optimizer = trained(model, arms, make_args())
    for on in ("same", "fresh"):  # one example: its relative loss drop is the batch's
        flags = ["--reward_batch_size", "1", "--reward_on", on]
        virtual, first_order = (
            rewards_of(model, optimizer, arms, make_args(*flags, "--lookahead", kind), lr=2e-5)
            for kind in ("virtual", "first_order")
        )
        assert first_order == pytest.approx(virtual, rel=0.03)


# ------------------------------------------------------------------------ the command

GOLDEN = [5.57778, 5.02748, 4.75429]
SPECS = ["toy/copy#24", "toy/add#12", "toy/reverse#6"]
SIZES = [24, 12, 6]
SHORT = ["--lr", "1e-2", "--batch_size", "8", "--micro_batch_size", "4"]
SHORT += ["--reward_batch_size", "4", "--log_every", "1"]


@pytest.fixture()
def run(model_folder, monkeypatch):
    """The command on a small Llama; without figures, which take longer than these runs."""
    monkeypatch.setattr(dynamix_sft.plots, "draw", lambda folder: [])
    start = ["--model", model_folder("llama"), "--data", *SPECS, "--template", "plain", *SHORT]

    def main(folder, *flags):
        dynamix_sft.main([*start, "--output_dir", str(folder), *flags])
        return read_json(folder / "summary.json")

    return main


def vector(record, prefix):
    return np.array([value for key, value in record.items() if key.startswith(f"{prefix}/")])


def training(folder):
    """The records of training steps."""
    return [record for record in records(folder) if "train/loss" in record]


@pytest.fixture()
def batches(monkeypatch):
    """A list of the batches that common.backward gets."""
    seen, backward = [], common.backward

    def kept(model, examples, args):
        seen.append(examples)
        return backward(model, examples, args)

    monkeypatch.setattr(common, "backward", kept)
    return seen


def test_run_folder_and_golden_losses(tmp_path):
    """Golden losses: recorded from this implementation on CPU; a change of draws, masks,
    initialisation or loss shows here."""
    folder = tmp_path / "run"
    data = ["--data", "toy#60", "--eval_data", "toy/copy", "toy/add", "--template", "plain"]
    steps = ["--lr", "1e-3", "--batch_size", "8", "--max_steps", "5", "--log_every", "1"]
    steps += ["--update_every", "2", "--reward_batch_size", "2", "--save_every", "3"]
    dynamix_sft.main([*data, *steps, "--output_dir", str(folder)])

    files = {"config.json", "metrics.jsonl", "summary.json", ".lock", "final"}
    figures = {"mixture.png", "rewards.png", "coverage.png", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files | figures
    assert values(folder, "train/loss")[:3] == pytest.approx(GOLDEN, abs=2e-4)

    summary = read_json(folder / "summary.json")
    assert (summary["steps"], summary["examples"], summary["updates"]) == (5, 40, 2)
    assert set(summary["eval"]) == {"copy", "add"}
    assert set(summary["time"]) >= {"train", "reward", "eval"}
    train, reward = summary["time"]["train"], summary["time"]["reward"]
    # summary.json gives seconds to the millisecond
    cost = summary["cost"]
    rounding = 0.0005 * (1 + cost["total"]) / train
    assert cost["total"] == pytest.approx((train + reward) / train, abs=1.1 * rounding)
    assert cost == {"reward": pytest.approx(cost["total"] - 1), "total": cost["total"]}

    last = training(folder)[-1]
    for prefix in ("mixture", "share", "token_share"):
        assert vector(last, prefix).sum() == pytest.approx(1)
    rows = summary["mixture"]
    assert sum(row["examples"] for row in rows.values()) == 40
    assert sum(row["tokens"] for row in rows.values()) == summary["tokens"]
    for label, row in rows.items():
        passes = row["examples"] / row["size"]
        assert last[f"share/{label}"] == pytest.approx(row["examples"] / 40)
        assert last[f"passes/{label}"] == pytest.approx(passes)
        assert row["coverage"] == pytest.approx(passes * 8 / 5)  # 8 steps are an epoch of 60


def test_the_run_is_the_equations(tmp_path, run, monkeypatch):
    """From the logged raw rewards alone Q and p follow by hand, and the batches are drawn with the
    p that was in force."""
    drawn, rates = [], []
    batch, arm_rewards = common.MixtureSampler.batch, dynamix_sft.arm_rewards

    def kept_batch(self, p, step):
        drawn.append(p)
        return batch(self, p, step)

    def kept_rewards(*args):
        rates.append(args[3:5])
        return arm_rewards(*args)

    monkeypatch.setattr(common.MixtureSampler, "batch", kept_batch)
    monkeypatch.setattr(dynamix_sft, "arm_rewards", kept_rewards)
    flags = ["--update_every", "2", "--beta", "3", "--gamma", "0.2", "--alpha", "0.5"]
    run(tmp_path / "run", "--max_steps", "7", *flags)

    updates = {r["step"]: r for r in records(tmp_path / "run") if "reward/copy" in r}
    assert list(updates) == [2, 4, 6]
    recipe = dynamix_sft.parse_args(SHORT)
    lr = [common.learning_rate(step, 7, recipe) for step in (2, 4, 6)]
    assert rates == list(zip((2, 4, 6), lr))
    prior, q, expected = np.array(SIZES) / 42, np.zeros(3), []
    for step in range(7):
        if step in updates:
            rewards = vector(updates[step], "reward")
            scaled = (rewards - rewards.min()) / (rewards.max() - rewards.min())
            q = 0.5 * q + 0.5 * scaled
            assert vector(updates[step], "value") == pytest.approx(q)
        boltzmann = np.exp(3 * q) * prior
        expected.append(0.8 * boltzmann / boltzmann.sum() + 0.2 / 3)
    expected = np.array(expected)
    assert np.array(drawn) == pytest.approx(expected)
    assert np.ptp(expected[:, 2]) > 0.01
    logged = np.array([vector(record, "mixture") for record in training(tmp_path / "run")])
    assert logged == pytest.approx(expected)


def test_updates_without_effect_change_nothing(tmp_path, run):
    """β = γ = 0: with virtual steps every second step the weights end bit-identical to a run
    without any (and elsewhere not)."""
    none, two, on = tmp_path / "none", tmp_path / "two", tmp_path / "on"
    flags = ["--max_steps", "7", "--weight_decay", "0.1", "--micro_batch_size", "3"]
    flags += ["--reward_batch_size", "5", "--gamma", "0"]
    run(none, *flags, "--beta", "0", "--update_every", "0")
    run(two, *flags, "--beta", "0", "--update_every", "2")
    run(on, *flags, "--beta", "9", "--alpha", "0", "--update_every", "2")
    assert same(weights(none), weights(two))
    assert not same(weights(none), weights(on))
    assert len(values(two, "reward/copy")) == 3
    assert values(none, "train/loss") == values(two, "train/loss")


def test_proportional_is_plain_training(tmp_path, run, tokenizer, model_folder, batches):
    """Full Coverage: every example exactly once an epoch, and the same weights bit for bit as a
    loop of a few lines."""
    flags = ["--sampling", "proportional", "--epochs", "2", "--micro_batch_size", "8"]
    summary = run(tmp_path / "run", *flags)
    assert (summary["steps"], summary["updates"], summary["cost"]["total"]) == (12, 0, 1.0)
    everything = sorted((k, i) for k, size in enumerate(SIZES) for i in range(size))
    for epoch in range(2):
        seen = sum(batches[6 * epoch : 6 * epoch + 6], [])
        assert sorted((e.dataset, e.row) for e in seen) == everything
    for row in summary["mixture"].values():
        assert row["passes"] == 2
        assert row["coverage"] == 1

    pool = sum(make_arms(tokenizer, *SPECS), [])
    lengths = [len(example.ids) for example in pool]
    model, _ = common.load_model(model_folder("llama"), CPU)
    optimizer, recipe = adamw(model.train(), 1e-2, 0.0), dynamix_sft.parse_args(SHORT)
    for step in range(12):
        order = common.epoch_batches(len(pool), 8, 0, step // 6)[step % 6]
        batch = [pool[i] for i in sorted(order, key=lambda i: -lengths[i])]
        plain_step(model, optimizer, batch, common.learning_rate(step, 12, recipe))
    saved, own = weights(tmp_path / "run"), model.state_dict()
    assert same(saved, {key: own[key] for key in saved})


def test_uniform_and_the_lengths_of_runs(tmp_path, run):
    summary = run(tmp_path / "uniform", "--sampling", "uniform", "--epochs", "2")
    assert (summary["steps"], summary["examples"], summary["updates"]) == (12, 96, 0)
    for record in training(tmp_path / "uniform"):
        assert vector(record, "mixture") == pytest.approx([1 / 3] * 3)
    coverage = {label: row["coverage"] for label, row in summary["mixture"].items()}
    assert coverage["reverse"] > 1.8 > 1 > coverage["copy"]  # expected 2.3, 1.1, 0.6 of 2 passes
    assert run(tmp_path / "dynamix", "--epochs", "0.5")["steps"] == 3


def test_draws_are_without_replacement(tmp_path, run, batches):
    run(tmp_path / "run", "--max_steps", "8", "--update_every", "0")
    seen = sum(batches, [])
    assert len(seen) == 64
    for k, size in enumerate(SIZES):
        rows = [example.row for example in seen if example.dataset == k]
        for at in range(0, len(rows), size):  # each pass in another order
            one_pass = rows[at : at + size]
            assert len(set(one_pass)) == len(one_pass)


@pytest.mark.parametrize(
    "at, flags",
    [
        (7, []),
        (7, ["--sampling", "proportional"]),
        (7, ["--lora_rank", "2", "--lora_dropout", "0.2", "--no-prior", "--init", "proportional"]),
        (8, ["--log_every", "4"]),
    ],
)
def test_killed_and_resumed_is_bit_identical(tmp_path, run, at, flags):
    """Killed between updates, after a checkpoint that itself lies between updates; and between two
    lines of the log, whose means go back to before the checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ["--max_steps", "11", "--update_every", "4", "--save_every", "3"]
    flags = [*steps, "--eval_data", "toy/sort#10", *flags]
    summary = run(whole, *flags)
    with killed_at(at, "train/loss"):
        run(cut, *flags)
    torch.rand(100)  # another place in the model's RNG
    resumed = run(cut, *flags, "--resume")
    assert records(cut) == records(whole)
    assert resumed["mixture"] == summary["mixture"]
    assert same(weights(cut), weights(whole))


def test_one_dataset_and_one_example(tmp_path, run):
    every_step = ["--update_every", "1"]
    one = run(tmp_path / "one", "--data", "toy/copy#10", "--max_steps", "3", *every_step)
    assert one["mixture"]["copy"]["probability"] == 1
    assert one["mixture"]["copy"]["value"] == 0
    assert one["updates"] == 2
    data = ["--data", "toy/copy#10", "toy/add#1", "--max_steps", "4"]
    for on in ("same", "fresh"):
        summary = run(tmp_path / on, *data, *every_step, "--reward_on", on)
        add = summary["mixture"]["add"]
        assert add["examples"] == add["passes"] > 1


def test_start_of_the_variants(tmp_path, run):
    """Prior, no prior, no prior started at the proportions; with the prior off Q = 0 is uniform."""
    prior = 0.7 * np.array(SIZES) / 42 + 0.1
    cases = [
        ("prior", [], prior),
        ("none", ["--no-prior"], [1 / 3] * 3),
        ("init", ["--no-prior", "--init", "proportional"], prior),
    ]
    for name, flags, start in cases:
        run(tmp_path / name, "--max_steps", "2", "--update_every", "1", *flags)
        assert vector(records(tmp_path / name)[0], "mixture") == pytest.approx(start)


VARIANT = ["--max_steps", "3", "--update_every", "1"]


def rewards_logged(folder):
    """Raw rewards of all updates -> (updates, K)."""
    return np.array([vector(r, "reward") for r in records(folder) if "reward/copy" in r])


@pytest.fixture()
def ordinary(tmp_path, run):
    """The folder of a run with VARIANT's flags alone."""
    run(tmp_path / "ordinary", *VARIANT)
    return tmp_path / "ordinary"


@pytest.mark.parametrize(
    "flags, near",
    [
        (["--reward", "entropy"], None),
        (["--lookahead", "first_order", "--reward_on", "fresh"], None),
        (["--lookahead", "first_order"], None),
        (["--reward_on", "fresh"], None),
        (["--dtype", "bf16"], 0.05),
    ],
)
def test_variants_run(tmp_path, run, ordinary, flags, near):
    """The first step is the ordinary run's, the rewards after it are others (near: almost the
    same), and what follows from them is the equations'."""
    folder = tmp_path / "run"
    summary = run(folder, *VARIANT, *flags)
    assert summary["updates"] == 2
    first, expected = values(folder, "train/loss")[0], values(ordinary, "train/loss")[0]
    assert first == pytest.approx(expected, rel=0.01 if near else 1e-6)
    rewards, others = rewards_logged(folder), rewards_logged(ordinary)
    assert np.isfinite(rewards).all()
    assert (rewards != others).all()
    if near:
        assert rewards[0] == pytest.approx(others[0], abs=near)
    q = np.zeros(3)
    for reward in rewards:
        q = dynamix_sft.update_values(q, reward, 0.95)
    update = [record for record in records(folder) if "reward/copy" in record][-1]
    assert vector(update, "value") == pytest.approx(q)


def test_lora_trains_the_adapter_alone(tmp_path, run):
    """Checkpointing changes nothing, neither the rewards nor what is learnt."""
    adapters, rewards = [], []
    for name, flags in (("plain", []), ("checkpointing", ["--gradient_checkpointing"])):
        folder = tmp_path / name
        assert run(folder, *VARIANT, "--lora_rank", "2", *flags)["updates"] == 2
        adapters.append(load_file(folder / "final" / "adapter_model.safetensors"))
        rewards.append(rewards_logged(folder))
        assert not (folder / "final" / "model.safetensors").exists()
    one, other = adapters
    assert all(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-3)


def test_logged_losses_are_means_over_the_last_steps(tmp_path, run):
    every, fourth = tmp_path / "every", tmp_path / "fourth"
    run(every, "--max_steps", "10")
    run(fourth, "--max_steps", "10", "--log_every", "4")
    assert values(fourth, "train/loss") == pytest.approx(windowed(every, "train/loss", 4))
    assert len(values(fourth, "train/loss")) == 4


def test_short_runs_say_that_nothing_is_updated(tmp_path, run, capsys):
    assert run(tmp_path / "run", "--max_steps", "2")["updates"] == 0
    assert "no update in this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gamma", "1.5"], "argument --gamma: '1.5' is not between 0 and 1"),
        (["--beta", "-1"], "argument --beta: '-1' is not a number of at least 0"),
        (["--alpha", "2"], "argument --alpha: '2' is not between 0 and 1"),
        (
            ["--sampling", "roulette"],
            "--sampling roulette: expected dynamix, proportional, uniform, ",
        ),
        (["--init", "proportional"], "--init proportional goes with --no-prior and a positive"),
        (["--reward_batch_size", "0"], "--reward_batch_size: '0' is not a positive whole number"),
        (
            ["--no-prior", "--init", "proportional", "--beta", "0"],
            "--init proportional goes with --no-prior and a positive --beta",
        ),
        (
            ["--reward", "entropy", "--lookahead", "first_order"],
            "--lookahead first_order goes with --reward loss",
        ),
        (
            ["--data", "toy", "toy/copy"],
            "two datasets are called 'copy'; name them with label=SOURCE",
        ),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, message):
    start = ["--output_dir", str(tmp_path / "run"), "--data", "toy#20"]
    assert message in error_line(capsys, dynamix_sft.main, [*start, *flags])
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_papers_recipe():
    args = dynamix_sft.parse_args([])
    assert (args.gamma, args.alpha, args.beta, args.update_every) == (0.3, 0.95, 4.0, 50)
    assert (args.lr, args.schedule, args.warmup_ratio) == (1e-5, "linear", 0.03)
    assert (args.epochs, args.batch_size) == (2.0, 128)
    assert args.prior
    assert (args.sampling, args.reward) == ("dynamix", "loss")
    assert (args.lookahead, args.reward_on) == ("virtual", "same")


def test_command_from_the_shell(tmp_path, write_jsonl):
    """One file split by its source column, four turns in one of the rows."""

    def row(dataset, *texts):
        roles = ["user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        return {"dataset": dataset, "messages": messages}

    rows = [row("chat", "Hi", "Hello!", "And?", "Bye.")]
    rows += [row("qa", f"{i}?", str(i)) for i in range(5)]
    data = ["--data", write_jsonl("all.jsonl", rows), "--source_column", "dataset"]
    steps = ["--max_steps", "3", "--batch_size", "4", "--update_every", "1"]
    flags = [*data, *steps, "--template", "plain", "--show_batch"]
    script = [sys.executable, str(ROOT / "dynamix_sft.py")]
    command = [*script, *flags, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "</s>⟧" in done.stdout
    assert "x static sampling" in done.stdout
    assert read_json(tmp_path / "run" / "config.json")["datasets"] == {"chat": 2, "qa": 5}

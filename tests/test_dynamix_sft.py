"""DynamixSFT: equations by hand, the virtual step against a plain loop, no traces, baselines, resume, the command."""
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import common
import dynamix_sft
from conftest import random_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- sampling and values


def test_probabilities_by_hand():
    # exp(β Q) = 3, 1 and p0 = 1/4, 3/4: weights 3/4, 3/4
    assert dynamix_sft.sampling_probabilities([math.log(3) / 2, 0.0], [0.25, 0.75], 2.0, 0.2) == pytest.approx([0.5, 0.5])
    # exp(β Q) = 9, 1, 3 and p0 = 1/2, 3/10, 1/5: weights 4.5, 0.3, 0.6 of 5.4
    p = dynamix_sft.sampling_probabilities([1.0, 0.0, 0.5], [5, 3, 2], math.log(9), 0.3)
    assert p == pytest.approx([0.7 * 45 / 54 + 0.1, 0.7 * 3 / 54 + 0.1, 0.7 * 6 / 54 + 0.1])


def test_probabilities_invariants():
    rng = np.random.default_rng(0)
    for K in (1, 2, 7, 19):
        values, prior, gamma = rng.random(K), rng.random(K) + 0.01, rng.random()
        p = dynamix_sft.sampling_probabilities(values, prior, 4.0, gamma)
        assert p.sum() == pytest.approx(1, abs=1e-12) and (p >= gamma / K - 1e-15).all()
        for constant in (0.0, 0.7, -300.0):  # Q constant: the mixed prior
            assert dynamix_sft.sampling_probabilities(np.full(K, constant), prior, 4.0, gamma) == pytest.approx((1 - gamma) * prior / prior.sum() + gamma / K)
        order = rng.permutation(K)
        assert dynamix_sft.sampling_probabilities(values[order], prior[order], 4.0, gamma) == pytest.approx(p[order])
        assert dynamix_sft.sampling_probabilities(values, prior, 0.0, 0.0) == pytest.approx(prior / prior.sum())
        assert dynamix_sft.sampling_probabilities(values, prior, 4.0, 1.0) == pytest.approx(np.full(K, 1 / K))
        higher = values + np.eye(K)[0] * 0.1  # a higher value is never drawn less
        assert dynamix_sft.sampling_probabilities(higher, prior, 4.0, gamma)[0] >= p[0]


def test_probabilities_of_huge_beta_and_tiny_priors():
    for beta in (1e3, 1e9, 1e300):
        assert dynamix_sft.sampling_probabilities([0.2, 1.0, 0.9], [0.5, 0.3, 0.2], beta, 0.3) == pytest.approx([0.1, 0.8, 0.1])
    assert dynamix_sft.sampling_probabilities([1.0, 0.0], [0.0, 1.0], 1e6, 0.1) == pytest.approx([0.05, 0.95])  # an empty arm keeps the floor
    assert np.isfinite(dynamix_sft.sampling_probabilities([0.0, 1.0], [1.0, 1e-300], 5.0, 0.3)).all()


def test_bad_input_is_refused():
    for values, prior, beta, gamma in (([0.0, math.nan], [1, 1], 1, 0), ([0.0], [1, 1], 1, 0), ([0.0, 0.0], [0, 0], 1, 0), ([0.0, 0.0], [2, -1], 1, 0),
                                       ([0.0, 0.0], [1, 1], -1, 0), ([0.0, 0.0], [1, 1], 1, 1.5), ([], [], 1, 0)):
        with pytest.raises(ValueError):
            dynamix_sft.sampling_probabilities(values, prior, beta, gamma)
    for before, after in (([1.0, math.inf], [1.0, 1.0]), ([1.0], [math.nan]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(ValueError):
            dynamix_sft.lookahead_reward(before, after, 1e-6)
    for values, rewards, alpha in (([0.0, 0.0], [1.0, math.nan], 0.9), ([0.0], [1.0, 2.0], 0.9), ([0.0], [1.0], 1.1)):
        with pytest.raises(ValueError):
            dynamix_sft.update_values(values, rewards, alpha)


def test_reward_by_hand():
    assert dynamix_sft.lookahead_reward([2.0, 4.0], [1.0, 5.0], 0.0) == pytest.approx((1 / 2 - 1 / 4) / 2)
    assert dynamix_sft.lookahead_reward([2.0, 4.0], [1.0, 5.0], 1.0) == pytest.approx((1 / 3 - 1 / 5) / 2)
    assert dynamix_sft.lookahead_reward([0.0, 1.0], [0.0, 1.0], 1e-6) == 0.0


def test_values_by_hand():
    assert dynamix_sft.min_max([1.0, 3.0, 2.0]).tolist() == [0.0, 1.0, 0.5]
    assert dynamix_sft.min_max([0.1] * 3).tolist() == [0.0] * 3 and dynamix_sft.min_max([7.0]).tolist() == [0.0]
    assert dynamix_sft.update_values([0.2, 0.4, 0.0], [-1.0, 3.0, 1.0], 0.9) == pytest.approx([0.18, 0.46, 0.05])
    assert dynamix_sft.update_values([0.5, 0.5], [2.0, 2.0], 0.9) == pytest.approx([0.45, 0.45])


def test_proportional_start_is_the_priors_start():
    p0, uniform = np.array([0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    values = dynamix_sft.proportional_values(p0, 4.0)
    start = dynamix_sft.sampling_probabilities(np.zeros(3), p0, 4.0, 0.3)
    assert dynamix_sft.sampling_probabilities(values, uniform, 4.0, 0.3) == pytest.approx(start)
    for _ in range(200):  # a prior stays, a start is forgotten
        values = dynamix_sft.update_values(values, [1.0, 1.0, 1.0], 0.95)
    assert dynamix_sft.sampling_probabilities(values, uniform, 4.0, 0.3) == pytest.approx(uniform, abs=1e-3)


# ---------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("size, count, fresh, on, measured", [(50, 8, False, 8, 8), (5, 8, False, 5, 5), (50, 8, True, 8, 8), (13, 8, True, 7, 6),
                                                              (2, 8, True, 1, 1), (1, 8, True, 1, 1), (1, 8, False, 1, 1)])
def test_reward_batches(size, count, fresh, on, measured):
    a, b = dynamix_sft.reward_batches(size, count, fresh, common.data_rng(0, "reward", 5, 0))
    assert (len(a), len(b)) == (on, measured) and len(set(a.tolist())) == on and max(*a, *b) < size
    if fresh and size > 1:
        assert not set(a.tolist()) & set(b.tolist())
    else:
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("scale, softcap, bias", [(1.0, None, False), (0.5, 2.0, True)])
def test_entropy_equals_full_logits(monkeypatch, scale, softcap, bias):
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 4)
    rng = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((10, 6), (11, 6), (11,)))
    logits = scale * (hidden @ weight.T + (b if bias else 0))
    exact = torch.distributions.Categorical(logits=softcap * torch.tanh(logits / softcap) if softcap else logits).entropy()
    ours = dynamix_sft.response_entropy(hidden, common.Head(weight, b if bias else None, scale, softcap))
    assert (ours - exact).abs().max() < 1e-12
    flat = dynamix_sft.response_entropy(torch.zeros(2, 6), common.Head(torch.randn(11, 6)))
    assert flat.tolist() == pytest.approx([math.log(11)] * 2)


def make_args(*flags):
    args = dynamix_sft.parse_args(["--micro_batch_size", "3", "--reward_batch_size", "8", "--weight_decay", "0.1", *flags])
    args.dtype = "fp32"
    return args


def make_arms(tokenizer, *specs):
    return common.encode_datasets(common.load_data(list(specs)), tokenizer, "plain", 256, quiet=True)


def trained(model, arms, args, steps=3):
    """A model in the middle of training -> its optimizer."""
    optimizer = common.make_optimizer(model.train(), 1e-3, args.weight_decay)
    for step in range(steps):
        dynamix_sft.backward(model, [arm[step] for arm in arms], args)
        common.optimizer_step(model, optimizer, 1e-3, 1.0)
    return optimizer


def plain_losses(model, examples):
    """Per example: mean loss and mean entropy of the model's own logits, one example at a time, evaluation mode -> (b, 2)."""
    model.eval()
    result = []
    for example in examples:
        ids = torch.from_numpy(example.ids)[None]
        logits = model(input_ids=ids).logits[0, example.start - 1:-1].double()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        result.append([torch.nn.functional.cross_entropy(logits, ids[0, example.start:]).item(), entropy.mean().item()])
    return np.array(result)


@pytest.mark.parametrize("max_norm", [1e9, 0.3])
@pytest.mark.parametrize("flags", [[], ["--reward_on", "fresh"], ["--reward", "entropy"]])
def test_virtual_step_equals_a_plain_loop(tokenizer, flags, max_norm):
    """A copy of the model and of torch's own AdamW, written out: full logits, mean over the batch's tokens, clip, step."""
    args = make_args(*flags, "--max_grad_norm", str(max_norm))
    arms = make_arms(tokenizer, "toy/copy#30", "toy/describe#30", "toy/add#5")
    model = random_model("llama")
    optimizer = trained(model, arms, args)
    expected = []
    for k, arm in enumerate(arms):
        twin = copy.deepcopy(model)
        order = np.random.default_rng([args.seed, common._stream("reward"), 4, k]).permutation(len(arm))
        count = min(8, (len(arm) + 1) // 2) if "fresh" in flags else min(8, len(arm))
        on = [arm[i] for i in order[:count]]
        measured = [arm[i] for i in order[count:2 * count]] if "fresh" in flags else on
        assert len({e.row for e in on + measured}) == min(len(arm), 16 if "fresh" in flags else 8)
        decay, rest = [p for p in twin.parameters() if p.dim() > 1], [p for p in twin.parameters() if p.dim() == 1]
        own = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1.0, foreach=False)
        own.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "param_groups": own.state_dict()["param_groups"]})
        for group in own.param_groups:
            group["lr"] = 2e-3
        before = plain_losses(twin, measured)
        total = 0.0
        for example in on:
            ids = torch.from_numpy(example.ids)[None]
            logits = twin(input_ids=ids).logits[0, example.start - 1:-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, example.start:], reduction="sum")
        (total / sum(len(example.ids) - example.start for example in on)).backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
        for p in twin.parameters():
            p.grad *= min(1.0, max_norm / norm.item())
        own.step()
        after = plain_losses(twin, measured)
        column = int("entropy" in flags)
        expected.append(np.mean((before - after)[:, column] / before[:, column]))
    got = dynamix_sft.arm_rewards(model, optimizer, arms, ["a", "b", "c"], 4, 2e-3, args)
    assert got == pytest.approx(expected, rel=2e-3, abs=2e-6) and len(set(np.round(got, 6))) == 3


def test_reward_does_not_depend_on_micro_batches(tokenizer):
    arms, rewards = make_arms(tokenizer, "toy/copy#30", "toy/describe#30"), []
    for size in ("1", "3", "8"):
        model, args = random_model("llama"), make_args("--micro_batch_size", size)
        rewards.append(dynamix_sft.arm_rewards(model, trained(model, arms, args), arms, ["a", "b"], 4, 2e-3, args))
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-3) and rewards[2] == pytest.approx(rewards[0], rel=1e-3)


def state_of(model, optimizer):
    moments = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters() if p in optimizer.state]
    return ([p.detach().clone() for p in model.parameters()], moments, [group["lr"] for group in optimizer.param_groups], torch.get_rng_state(),
            [module.training for module in model.modules()], [p.grad for p in model.parameters()])


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


def dropout_model():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=259, n_positions=512, n_embd=32, n_layer=2, n_head=4))  # p = 0.1


@pytest.mark.parametrize("flags", [[], ["--reward_on", "fresh"], ["--reward", "entropy"], ["--lookahead", "first_order"],
                                   ["--lookahead", "first_order", "--reward_on", "fresh"]])
@pytest.mark.parametrize("kind", ["full", "dropout", "lora", "cold"])
def test_rewards_leave_no_trace(tokenizer, model_folder, kind, flags):
    """Bit for bit: weights, moments, step count, learning rate, RNG, mode, no gradients; and so the steps that follow."""
    args = make_args(*flags)
    arms = make_arms(tokenizer, "toy/copy#20", "toy/add#20")
    torch.manual_seed(0)
    if kind == "lora":
        model, _ = common.load_model(model_folder("llama"), CPU, lora_rank=2, lora_dropout=0.2)
    else:
        model = dropout_model() if kind == "dropout" else random_model("llama")
    optimizer = trained(model, arms, args, 0 if kind == "cold" else 3)
    twin = copy.deepcopy(model)
    twin_optimizer = common.make_optimizer(twin, 1e-3, args.weight_decay)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    next(model.modules()).eval()
    next(model.children()).train()  # a mixed mode comes back as it was
    before = state_of(model, optimizer)
    rewards = dynamix_sft.arm_rewards(model, optimizer, arms, ["a", "b"], 4, 2e-3, args)
    assert (rewards != 0).all() and equal(before, state_of(model, optimizer))
    model.train()
    assert rewards.tolist() == dynamix_sft.arm_rewards(model, optimizer, arms, ["a", "b"], 4, 2e-3, args).tolist()
    for m, o in ((model, optimizer), (twin.train(), twin_optimizer)):
        torch.manual_seed(5)
        dynamix_sft.backward(m, arms[0][:8], args)
        common.optimizer_step(m, o, 1e-3, 1.0)
    assert equal([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


def test_losses_before_the_step_are_evaluation_losses(tokenizer, monkeypatch):
    """The training forward's losses are taken only where they are the evaluation losses: not under dropout, not in bf16."""
    arms, calls, measure = make_arms(tokenizer, "toy/copy#20", "toy/add#20", "toy/sort#20"), [], dynamix_sft.measure
    monkeypatch.setattr(dynamix_sft, "measure", lambda *args: calls.append(1) or measure(*args))
    for make, dtype, expected in ((lambda: random_model("llama"), "fp32", 4), (dropout_model, "fp32", 6), (lambda: random_model("llama"), "bf16", 6)):
        torch.manual_seed(0)
        model, args = make(), make_args()
        args.dtype = dtype
        optimizer = trained(model, arms, args)
        calls.clear()
        fast = dynamix_sft.arm_rewards(model, optimizer, arms, list("abc"), 4, 2e-3, args)
        assert len(calls) == expected
        with monkeypatch.context() as patch:
            patch.setattr(np, "allclose", lambda *args, **kwargs: False)
            assert fast == pytest.approx(dynamix_sft.arm_rewards(model, optimizer, arms, list("abc"), 4, 2e-3, args), rel=1e-3)


def test_a_reward_batch_holds_one_dataset(tokenizer, monkeypatch):
    """... and is stepped on and measured alike; what is credited to dataset k comes from k's examples alone."""
    arms, args = make_arms(tokenizer, "toy/copy#20", "toy/add#20"), make_args()
    model = random_model("llama")
    optimizer = trained(model, arms, args)
    alone = [dynamix_sft.arm_rewards(model, optimizer, [arms[0], arms[0]], ["a", "b"], 4, 2e-3, args),
             dynamix_sft.arm_rewards(model, optimizer, [arms[1], arms[1]], ["a", "b"], 4, 2e-3, args)]
    both = dynamix_sft.arm_rewards(model, optimizer, arms, ["a", "b"], 4, 2e-3, args)
    assert both.tolist() == [alone[0][0], alone[1][1]]


@pytest.mark.parametrize("flags", [[], ["--reward", "entropy"], ["--reward_on", "fresh"]])
def test_non_finite_losses_name_the_dataset(tokenizer, write_jsonl, flags):
    bad = write_jsonl("bad.jsonl", [{"prompt": "~", "response": f"{i} ~~"} for i in range(10)])
    arms = make_arms(tokenizer, "toy/copy#20", f"tilde={bad}")
    model, args = random_model("llama"), make_args(*flags)
    optimizer = trained(model, [arms[0]], args)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~", add_special_tokens=False).input_ids[0]] = math.inf
    with pytest.raises(common.UserError, match=r"reward of dataset 'tilde' after step 4: .*(finite|nan|inf)"):
        dynamix_sft.arm_rewards(model, optimizer, arms, ["copy", "tilde"], 4, 2e-3, args)


def test_non_finite_first_order_reward_names_the_dataset(tokenizer, monkeypatch):
    arms, args, backward = make_arms(tokenizer, "toy/copy#20", "toy/add#20"), make_args("--lookahead", "first_order"), dynamix_sft.backward
    model = random_model("llama")
    optimizer = trained(model, arms, args)
    monkeypatch.setattr(dynamix_sft, "backward", lambda model, examples, args: backward(model, examples, args) * (math.inf if examples[0].dataset else 1))
    with pytest.raises(common.UserError, match="reward of dataset 'add' after step 4"):
        dynamix_sft.arm_rewards(model, optimizer, arms, ["copy", "add"], 4, 2e-3, args)


@pytest.mark.parametrize("max_norm", [1e9, 0.1])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_adamw_update_is_what_the_optimizer_does(tokenizer, max_norm, steps):
    arms, args = make_arms(tokenizer, "toy/copy#20", "toy/add#20"), make_args()
    model = random_model("llama")
    optimizer = trained(model, arms, args, steps)
    dynamix_sft.backward(model, arms[0][:5], args)
    gradients = [p.grad.clone() for p in model.parameters()]
    updates = list(dynamix_sft.next_updates(model, optimizer, 3e-3, max_norm))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    before = [p.detach().clone() for p in model.parameters()]
    common.optimizer_step(model, optimizer, 3e-3, max_norm)
    for p, old, update in zip(model.parameters(), before, updates):
        assert (p.detach() - old - update).abs().max() < 1e-5 * 3e-3 + 3e-7 * old.abs().max()


def test_first_order_reward_by_hand_and_as_the_limit_of_small_steps(tokenizer):
    ours = dynamix_sft.first_order_reward([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([-0.1, 0.2]), torch.tensor([[-1.0]])], 2.0, 0.5)
    assert ours == pytest.approx(-(-0.1 + 0.4 - 3.0) / 2.5)
    arms = make_arms(tokenizer, "toy/describe#20", "toy/copy#20")
    model, rewards = random_model("llama"), {}
    optimizer = trained(model, arms, make_args())
    for fresh in ("same", "fresh"):  # one example: its relative loss drop is the batch's
        for lookahead in ("virtual", "first_order"):
            args = make_args("--reward_batch_size", "1", "--lookahead", lookahead, "--reward_on", fresh)
            rewards[lookahead] = dynamix_sft.arm_rewards(model, optimizer, arms, ["a", "b"], 4, 2e-5, args)
        assert rewards["first_order"] == pytest.approx(rewards["virtual"], rel=0.03)


# ---------------------------------------------------------------------------------------------------- the command

GOLDEN = [5.57778, 5.02748, 4.75429]
COLLECTION = ["--data", "toy/copy#24", "toy/add#12", "toy/reverse#6", "--template", "plain"]


@pytest.fixture()
def run(model_folder, monkeypatch):
    """The command on a small Llama; without figures, which take longer than these runs."""
    for name in ("plot_mixture", "plot_rewards", "plot_coverage", "plot_loss"):
        monkeypatch.setattr(dynamix_sft, name, lambda *args: None)

    def start(folder, *flags):
        dynamix_sft.main(["--model", model_folder("llama"), *COLLECTION, "--lr", "1e-2", "--batch_size", "8", "--micro_batch_size", "4",
                          "--reward_batch_size", "4", "--log_every", "1", "--output_dir", str(folder), *flags])
        return json.loads((Path(folder) / "summary.json").read_text())
    return start


def records(folder):
    """metrics.jsonl without the timers."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "final").state_dict()


def vector(record, prefix):
    return np.array([value for key, value in record.items() if key.startswith(f"{prefix}/")])


def test_run_folder_and_golden_losses(tmp_path):
    """Golden losses: recorded from this implementation on CPU; a change of draws, masks, initialisation or loss shows here."""
    folder = tmp_path / "run"
    dynamix_sft.main(["--data", "toy#60", "--eval_data", "toy/copy", "toy/add", "--template", "plain", "--lr", "1e-3", "--batch_size", "8", "--max_steps", "5",
                      "--update_every", "2", "--reward_batch_size", "2", "--log_every", "1", "--save_every", "3", "--output_dir", str(folder)])
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "mixture.png", "rewards.png", "coverage.png",
                                                         "loss.png", "checkpoint", "final"}
    log, summary = records(folder), json.loads((folder / "summary.json").read_text())
    assert [r["train/loss"] for r in log if "train/loss" in r][:3] == pytest.approx(GOLDEN, abs=2e-4)
    assert summary["steps"] == 5 and summary["examples"] == 40 and summary["updates"] == 2 and set(summary["eval"]) == {"copy", "add"}
    assert set(summary["time"]) >= {"train", "reward", "eval"}
    rounding = 0.0005 * (1 + summary["overhead"]) / summary["time"]["train"]  # summary.json gives seconds to the millisecond
    assert summary["overhead"] == pytest.approx((summary["time"]["train"] + summary["time"]["reward"]) / summary["time"]["train"], abs=1.1 * rounding)
    last = [r for r in log if "train/loss" in r][-1]
    for prefix in ("mixture", "share", "token_share"):
        assert vector(last, prefix).sum() == pytest.approx(1)
    rows = summary["mixture"]
    assert sum(row["examples"] for row in rows.values()) == 40 and sum(row["tokens"] for row in rows.values()) == summary["tokens"]
    for label, row in rows.items():
        assert last[f"share/{label}"] == pytest.approx(row["examples"] / 40) and last[f"passes/{label}"] == pytest.approx(row["examples"] / row["size"])
        assert row["coverage"] == pytest.approx(row["examples"] / (row["size"] * 5 / 8))  # 8 steps are an epoch of 60


def test_the_run_is_the_equations(tmp_path, run, monkeypatch):
    """From the logged raw rewards alone Q and p follow by hand, and the batches are drawn with the p that was in force."""
    drawn, rates, batches, rewards = [], [], common.MixtureSampler.batches, dynamix_sft.arm_rewards
    monkeypatch.setattr(common.MixtureSampler, "batches", lambda self, p, step, steps=1: drawn.append(p) or batches(self, p, step, steps))
    monkeypatch.setattr(dynamix_sft, "arm_rewards", lambda *args: rates.append(args[4:6]) or rewards(*args))
    run(tmp_path / "run", "--max_steps", "7", "--update_every", "2", "--beta", "3", "--gamma", "0.2", "--alpha", "0.5")
    log = records(tmp_path / "run")
    updates = [r for r in log if "reward/copy" in r]
    assert [r["step"] for r in updates] == [2, 4, 6]
    assert rates == [(step, common.learning_rate(step, 7, 1e-2, "linear", 0.03)) for step in (2, 4, 6)]
    prior, q, expected = np.array([24, 12, 6]) / 42, np.zeros(3), []
    for step in range(7):
        if step in (2, 4, 6):
            record = updates[step // 2 - 1]
            r = vector(record, "reward")
            q = 0.5 * q + 0.5 * (r - r.min()) / (r.max() - r.min())
            assert vector(record, "value") == pytest.approx(q)
        boltzmann = np.exp(3 * q) * prior
        expected.append(0.8 * boltzmann / boltzmann.sum() + 0.2 / 3)
    assert np.array(drawn) == pytest.approx(np.array(expected)) and np.ptp(np.array(expected)[:, 2]) > 0.01
    assert np.array([vector(r, "mixture") for r in log if "train/loss" in r]) == pytest.approx(np.array(expected))


def test_updates_without_effect_change_nothing(tmp_path, run):
    """β = γ = 0: with virtual steps every second step the weights end bit-identical to a run without any (and elsewhere not)."""
    flags = ["--max_steps", "7", "--weight_decay", "0.1", "--micro_batch_size", "3", "--reward_batch_size", "5"]
    run(tmp_path / "none", *flags, "--beta", "0", "--gamma", "0", "--update_every", "0")
    run(tmp_path / "two", *flags, "--beta", "0", "--gamma", "0", "--update_every", "2")
    run(tmp_path / "on", *flags, "--beta", "9", "--gamma", "0", "--alpha", "0", "--update_every", "2")
    assert equal(weights(tmp_path / "none"), weights(tmp_path / "two")) and not equal(weights(tmp_path / "none"), weights(tmp_path / "on"))
    assert sum("reward/copy" in r for r in records(tmp_path / "two")) == 3
    losses = [[r["train/loss"] for r in records(tmp_path / name) if "train/loss" in r] for name in ("none", "two")]
    assert losses[0] == losses[1]


def test_proportional_is_plain_training(tmp_path, run, tokenizer, model_folder, monkeypatch):
    """Full Coverage: every example exactly once an epoch, and the same weights bit for bit as a loop of a few lines."""
    seen, backward = [], dynamix_sft.backward
    monkeypatch.setattr(dynamix_sft, "backward", lambda model, examples, args: seen.append(examples) or backward(model, examples, args))
    summary = run(tmp_path / "run", "--sampling", "proportional", "--epochs", "2", "--micro_batch_size", "8")
    assert summary["steps"] == 12 and summary["updates"] == 0 and summary["overhead"] == 1.0
    everything = sorted((k, i) for k, size in enumerate((24, 12, 6)) for i in range(size))
    for epoch in range(2):
        assert sorted((e.dataset, e.row) for batch in seen[6 * epoch:6 * epoch + 6] for e in batch) == everything
    assert all(row["passes"] == 2 and row["coverage"] == 1 for row in summary["mixture"].values())
    pool = [example for arm in make_arms(tokenizer, *COLLECTION[1:4]) for example in arm]
    model, _ = common.load_model(model_folder("llama"), CPU)
    optimizer, head = common.make_optimizer(model.train(), 1e-2, 0.0), common.output_head(model)
    for step in range(12):
        order = common.epoch_batches([len(example.ids) for example in pool], 8, 0, step // 6, window=1)[step % 6]
        batch = common.collate([pool[i] for i in sorted(order, key=lambda i: -len(pool[i].ids))], CPU)
        loss, _ = common.response_loss(batch.select(common.hidden_states(model, batch.ids)), batch.targets, head)
        (loss / len(batch.targets)).backward()
        common.optimizer_step(model, optimizer, common.learning_rate(step, 12, 1e-2, "linear", 0.03), 1.0)
    saved = weights(tmp_path / "run")
    assert equal(saved, {key: value for key, value in model.state_dict().items() if key in saved})


def test_uniform_and_the_lengths_of_runs(tmp_path, run):
    summary = run(tmp_path / "uniform", "--sampling", "uniform", "--epochs", "2")
    assert summary["steps"] == 12 and summary["examples"] == 96 and summary["updates"] == 0
    assert all(vector(r, "mixture") == pytest.approx([1 / 3] * 3) for r in records(tmp_path / "uniform") if "train/loss" in r)
    assert summary["mixture"]["reverse"]["coverage"] > 1.8 > 1 > summary["mixture"]["copy"]["coverage"]  # expected 2.3, 1.1, 0.6 of 2 passes
    assert run(tmp_path / "dynamix", "--epochs", "0.5")["steps"] == 3


def test_draws_are_without_replacement(tmp_path, run, monkeypatch):
    seen, backward = [], dynamix_sft.backward
    monkeypatch.setattr(dynamix_sft, "backward", lambda model, examples, args: seen.extend(examples) or backward(model, examples, args))
    run(tmp_path / "run", "--max_steps", "8", "--update_every", "0")
    for k, size in enumerate((24, 12, 6)):
        rows = [e.row for e in seen if e.dataset == k]
        for at in range(0, len(rows), size):  # each pass in another order
            assert len(set(rows[at:at + size])) == len(rows[at:at + size])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flags", [[], ["--sampling", "proportional"], ["--lora_rank", "2", "--lora_dropout", "0.2", "--no-prior", "--init", "proportional"]])
def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch, run, flags):
    """Killed between updates, after a checkpoint that itself lies between updates."""
    flags = ["--max_steps", "11", "--update_every", "4", "--save_every", "3", "--eval_data", "toy/sort#10", *flags]
    whole = run(tmp_path / "whole", *flags)
    log = common.Run.log

    def kill(self, step, values, line=None):
        log(self, step, values, line)
        if step == 7 and "train/loss" in values:
            raise Killed

    monkeypatch.setattr(common.Run, "log", kill)
    with pytest.raises(Killed):
        run(tmp_path / "cut", *flags)
    monkeypatch.setattr(common.Run, "log", log)
    torch.rand(100)  # another place in the model's RNG
    resumed = run(tmp_path / "cut", *flags, "--resume")
    assert records(tmp_path / "cut") == records(tmp_path / "whole") and resumed["mixture"] == whole["mixture"]
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_one_dataset_and_one_example(tmp_path, run):
    summary = run(tmp_path / "one", "--data", "toy/copy#10", "--max_steps", "3", "--update_every", "1")
    assert summary["mixture"]["copy"]["probability"] == 1 and summary["mixture"]["copy"]["value"] == 0 and summary["updates"] == 2
    for name, flags in (("same", []), ("fresh", ["--reward_on", "fresh"])):
        summary = run(tmp_path / name, "--data", "toy/copy#10", "toy/add#1", "--max_steps", "4", "--update_every", "1", *flags)
        assert summary["mixture"]["add"]["examples"] == summary["mixture"]["add"]["passes"] > 1


def test_start_of_the_variants(tmp_path, run):
    """Prior, no prior, no prior started at the proportions; with the prior off Q = 0 is uniform."""
    prior = 0.7 * np.array([24, 12, 6]) / 42 + 0.1
    for name, flags, start in (("prior", [], prior), ("none", ["--no-prior"], [1 / 3] * 3), ("init", ["--no-prior", "--init", "proportional"], prior)):
        run(tmp_path / name, "--max_steps", "2", "--update_every", "1", *flags)
        assert vector(records(tmp_path / name)[0], "mixture") == pytest.approx(start)


@pytest.mark.parametrize("flags", [["--reward", "entropy"], ["--lookahead", "first_order", "--reward_on", "fresh"], ["--dtype", "bf16"],
                                   ["--lora_rank", "2", "--gradient_checkpointing"]])
def test_variants_run(tmp_path, run, flags):
    assert run(tmp_path / "run", "--max_steps", "3", "--update_every", "1", *flags)["updates"] == 2


def test_short_runs_say_that_nothing_is_updated(tmp_path, run, capsys):
    assert run(tmp_path / "run", "--max_steps", "2")["updates"] == 0
    assert "no update in this run" in capsys.readouterr().out


def test_bad_flags_are_one_line(tmp_path, capsys):
    for flags in (["--gamma", "1.5"], ["--beta", "-1"], ["--alpha", "2"], ["--sampling", "multidds"], ["--init", "proportional"], ["--reward_batch_size", "0"],
                  ["--no-prior", "--init", "proportional", "--beta", "0"], ["--reward", "entropy", "--lookahead", "first_order"], ["--data", "toy", "toy/copy"]):
        with pytest.raises(SystemExit) as exit:
            dynamix_sft.main(["--output_dir", str(tmp_path / "run"), "--data", "toy#20", *flags])
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and lines[-1].startswith("error: "), flags
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_papers_recipe():
    args = dynamix_sft.parse_args([])
    assert (args.gamma, args.alpha, args.beta, args.update_every, args.lr, args.schedule, args.warmup_ratio, args.epochs, args.batch_size) == (
        0.3, 0.95, 4.0, 50, 1e-5, "linear", 0.03, 2.0, 128)
    assert args.prior and args.sampling == "dynamix" and args.reward == "loss" and (args.lookahead, args.reward_on) == ("virtual", "same")


def test_command_from_the_shell(tmp_path, write_jsonl):
    """One file split by its source column, four turns in one of the rows."""
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("user", "And?"), ("assistant", "Bye."))]
    file = write_jsonl("all.jsonl", [{"dataset": "chat", "messages": turns}] + [
        {"dataset": "qa", "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]} for i in range(5)])
    done = subprocess.run([sys.executable, str(ROOT / "dynamix_sft.py"), "--data", file, "--source_column", "dataset", "--max_steps", "3", "--batch_size", "4",
                           "--update_every", "1", "--template", "plain", "--output_dir", str(tmp_path / "run"), "--show_batch"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "⟦</s>⟧" in done.stdout and "x static sampling" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["datasets"] == {"chat": 2, "qa": 5}

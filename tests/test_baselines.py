"""The samplers of DynamixSFT's table: the actor, rewards and groups against independent float64
loops, no traces, held-out rows, resume, the command, a rule of one's own."""

import copy
import json
import re
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
    plain,
    random_model,
    read_json,
    records,
    same,
    state_of,
    values,
    weights,
)

import baselines
import common
import data
import dynamix_sft

ROOT = Path(__file__).resolve().parent.parent
LEARNT = ["multidds", "multiuat", "hbo"]
LABELS = ["copy", "describe", "add"]
SPECS = ["toy/copy#30", "toy/describe#24", "toy/add#6"]

# ------------------------------------------------------------------------ the actor


def adam_loop(logits, rewards, updates):
    """torch's own Adam in float64 on -Σ r log softmax(w), 200 steps an update -> w after each."""
    w = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    optimizer, found = torch.optim.Adam([w], lr=1e-4), []
    for r in rewards[:updates]:
        for _ in range(200):
            optimizer.zero_grad()
            (-(torch.tensor(r) * torch.log_softmax(w, 0)).sum()).backward()
            optimizer.step()
        found.append(w.detach().numpy().copy())
    return found


@pytest.mark.parametrize("sizes", [[5, 3, 2], [1], [900, 50, 30, 10, 5, 3, 1, 1]])
def test_actor_equals_a_float64_loop(sizes):
    """Started at the sizes' log shares; the moments are kept from update to update."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(3, len(sizes)))
    start = np.log(np.array(sizes) / sum(sizes))
    expected, actor = adam_loop(start, rewards, 3), baselines.actor_start(sizes)
    assert actor[0] == pytest.approx(start, abs=1e-15)
    assert baselines.softmax(actor[0]) == pytest.approx(np.array(sizes) / sum(sizes))
    for own, r in zip(expected, rewards):
        before = actor.copy()
        after = baselines.actor_update(actor, r)
        assert (actor == before).all()  # pure
        # steps · lr; after a change of sign, at most (1 - 0.9) / sqrt(1 - 0.999) times that
        limit = 3.17 if actor[3].any() else 1 + 1e-6
        assert np.abs(after[0] - actor[0]).max() <= limit * 200 * 1e-4
        actor = after
        assert actor[0] == pytest.approx(own, abs=1e-12)
    assert actor[3].tolist() == [600] * len(sizes)


def test_fixed_point_of_the_actor():
    """For positive rewards p = r / Σr, from any start."""
    rewards = np.array([0.2, 0.5, 1.3, 2.0])
    for sizes in ([1, 1, 1, 1], [97, 1, 1, 1]):
        actor = baselines.actor_start(sizes)
        for lr in (1e-1, 1e-2, 1e-3):
            actor = baselines.actor_update(actor, rewards, 1500, lr)
        assert baselines.softmax(actor[0]) == pytest.approx(rewards / 4, abs=1e-4)
    at = np.log(rewards / 4)
    assert baselines.actor_gradient(at, rewards) == pytest.approx([0] * 4, abs=1e-15)


def test_gradient_of_the_actor_by_hand():
    # p = 1/4, 3/4; Σr = 2: p Σr - r = 1/2 - 1/2, 3/2 - 3/2
    gradient = baselines.actor_gradient(np.log([1, 3]), np.array([0.5, 1.5]))
    assert gradient == pytest.approx([0, 0], abs=1e-15)
    gradient = baselines.actor_gradient(np.log([1, 3]), np.array([1.0, -2.0]))
    assert gradient == pytest.approx([-0.25 - 1, -0.75 + 2])


def test_actor_refuses_what_is_not_finite():
    for rewards in ([1.0, np.nan], [np.inf, 0.0], [1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError):
            baselines.actor_update(baselines.actor_start([1, 2]), rewards)


def test_static_samplers(arms, tmp_path):
    sizes = np.array([30, 24, 6])
    assert baselines.Sampler(arms, None).mixture() == pytest.approx(sizes / 60)
    assert baselines.Uniform(arms, None).mixture() == pytest.approx([1 / 3] * 3)
    file = tmp_path / "weights.json"
    file.write_text('{"describe": 1, "add": 0, "copy": 3}')
    sampler = baselines.Fixed(arms, make_args(str(file)))
    assert sampler.mixture() == pytest.approx([0.75, 0.25, 0])
    for each in (sampler, baselines.Uniform(arms, None)):
        assert np.concatenate(each.groups()).tolist() == list(range(60))
        assert [len(group) for group in each.groups()] == sizes.tolist()


def test_distance_by_hand():
    assert baselines.total_variation([0.5, 0.3, 0.2], [5, 3, 2]) == pytest.approx(0)
    assert baselines.total_variation([0.2, 0.3, 0.5], [50, 30, 20]) == pytest.approx(0.3)
    assert baselines.total_variation([0.0, 1.0], [1, 0]) == 1


# ------------------------------------------------------------------------ rewards, by oracles


def make_args(sampling, *flags):
    small = ["--micro_batch_size", "3", "--reward_batch_size", "5", "--sampling", sampling]
    args = dynamix_sft.parse_args([*small, *flags])
    args.dtype = "fp32"
    return args


@pytest.fixture(scope="module")
def arms(tokenizer):
    parts = data.encode_datasets(data.load_data(SPECS), plain(tokenizer), 256, quiet=True)
    return dict(zip(LABELS, parts))


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    shares = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **shares))
    with torch.no_grad():  # far from uniform
        model.get_output_embeddings().weight.normal_(std=0.3)
    return model.train()


def exact(model):
    return copy.deepcopy(model).double().eval()


def gradient(twin, examples, start=None):
    """Of the mean loss over the response tokens, or over all but the first `start`, (P,)."""
    total, tokens = 0.0, 0
    for example in examples:
        if start:
            example = data.Example(example.ids, start, example.row)
        logits, targets = own_logits(twin, example)
        total = total - torch.log_softmax(logits, 1)[range(len(targets)), targets].sum()
        tokens += len(targets)
    parts = torch.autograd.grad(total / tokens, list(twin.parameters()))
    return torch.cat([part.flatten() for part in parts]).numpy()


def own_loss(twin, ids, start):
    """Mean loss of ids[start:], token by token."""
    with torch.no_grad():
        log_p = torch.log_softmax(twin(torch.from_numpy(ids)[None]).logits[0], 1).numpy()
    return -np.mean([log_p[at - 1, ids[at]] for at in range(start, len(ids))])


@pytest.fixture()
def taken(monkeypatch):
    """A list of the batches that common.backward gets."""
    seen, backward = [], common.backward

    def kept(model, examples, args):
        seen.append(examples)
        return backward(model, examples, args)

    monkeypatch.setattr(common, "backward", kept)
    return seen


def rows_of(examples):
    return {(example.dataset, example.row) for example in examples}


def test_multidds_is_the_mean_cosine(arms, taken):
    """r_j = mean over i of cos(∇ held-out i, ∇ training j), from the whole K x K matrix."""
    sampler, model = baselines.MultiDDS(arms, make_args("multidds")), gpt2()
    rewards = sampler.rewards(model, 4)
    assert len(taken) == 6
    assert [len(batch) for batch in taken] == [3, 2, 1, 5, 5, 5]
    for k, examples in enumerate(arms.values()):
        held = {(k, int(i)) for i in sampler.held_out[k]}
        assert rows_of(taken[k]) <= held
        assert not rows_of(taken[3 + k]) & held
        assert rows_of(taken[3 + k]) <= rows_of(examples)
    twin = exact(model)
    held, trained = ([gradient(twin, b) for b in part] for part in (taken[:3], taken[3:]))
    cosine = lambda g, h: g @ h / np.sqrt((g @ g) * (h @ h))  # noqa: E731
    expected = [np.mean([cosine(g, h) for g in held]) for h in trained]
    assert rewards == pytest.approx(expected, abs=2e-6)
    assert np.ptp(expected) > 0.05


def test_cosines_by_hand():
    """Held-out gradients (3, 4) and (0, 2), of directions (.6, .8) and (0, 1)."""
    total = [torch.zeros(1), torch.zeros(1)]
    pair = lambda a, b: [torch.tensor([a]), torch.tensor([b])]  # noqa: E731
    assert baselines.add_direction(total, pair(3.0, 4.0), 0.5) == 5
    assert baselines.add_direction(total, pair(0.0, 2.0), 0.5) == 2
    assert torch.cat(total).tolist() == pytest.approx([0.3, 0.9])
    assert baselines.mean_cosine(total, pair(2.0, 0.0)) == pytest.approx(0.3)
    assert baselines.mean_cosine(total, pair(-4.0, 3.0)) == pytest.approx((-1.2 + 2.7) / 5)
    assert baselines.add_direction(total, pair(0.0, 0.0), 0.5) == 0
    assert baselines.mean_cosine(total, pair(0.0, 0.0)) == 0
    assert torch.cat(total).tolist() == pytest.approx([0.3, 0.9])


@pytest.mark.parametrize("kind", ["entropy", "probability"])
def test_multiuat_is_the_uncertainty_of_held_out_rows(arms, kind, capsys):
    sampler = baselines.MultiUAT(arms, make_args("multiuat", "--uncertainty", kind))
    model, expected = gpt2(), []
    rewards = sampler.rewards(model, 4)
    twin = exact(model)
    for k, examples in enumerate(arms.values()):
        rng = data.data_rng(0, "multiuat", 4, k)
        own = []
        for i in rng.permutation(sampler.held_out[k])[:5]:
            with torch.no_grad():
                p = torch.softmax(own_logits(twin, examples[i])[0], 1).numpy()
            entropy = np.mean([-sum(row * np.log(row)) for row in p])
            own.append(entropy if kind == "entropy" else np.exp(np.log(p.max(1)).mean()))
        expected.append(np.mean(own) if kind == "entropy" else 1 - np.mean(own))
    assert rewards == pytest.approx(expected, rel=1e-5)
    assert np.ptp(expected) > 1e-3
    sampler.rewards(model, 8)
    assert capsys.readouterr().out.count("no dropout: one pass") == 1


def test_uncertainties_by_hand():
    assert baselines.expected_entropy([[1.0, 2.0], [3.0, 6.0]]) == 3
    log_max = np.log([[0.5, 0.25], [0.75, 0.1]])
    assert baselines.expected_probability(log_max) == pytest.approx(1 - 1.6 / 4)


def test_monte_carlo_passes_differ_under_dropout(arms, capsys):
    """M passes with dropout on, whatever mode the model was in; each another draw."""
    examples, args = arms["copy"][:4], make_args("multiuat", "--mc_passes", "6")
    found = baselines.monte_carlo(gpt2(0.2).eval(), examples, args)
    assert found.shape == (2, 6, 4)
    assert len({tuple(row) for row in found[0]}) == 6
    assert baselines.monte_carlo(gpt2(), examples, args).shape == (2, 1, 4)
    sampler = baselines.MultiUAT(arms, args)
    sampler.rewards(gpt2(0.2), 4)
    assert "one pass" not in capsys.readouterr().out


def test_difficulty_is_the_ratio_of_perplexities(arms):
    """With the response alone behind the example's first token; the whole thing token by token."""
    sampler, model = baselines.HBO(arms, make_args("hbo")), gpt2(0.3)
    before = state_of(model, adamw(model))
    sampler.split(model)
    assert same(before, state_of(model, adamw(model)))
    twin, at = exact(model), 0
    for k, examples in enumerate(arms.values()):
        expected = []
        for example in examples:
            response = np.append(example.ids[:1], example.ids[example.start :])
            loss = own_loss(twin, example.ids, example.start)
            expected.append(np.exp(loss) / np.exp(own_loss(twin, response, 1)))
            assert sampler.start_loss[at] == pytest.approx(loss, rel=1e-5)
            assert sampler.difficulty[at] == pytest.approx(expected[-1], rel=1e-4)
            at += 1
        parts = sampler.parts[k]
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(examples)))
        found = [[expected[i] for i in part] for part in parts]
        for easier, harder in zip(found, found[1:]):
            assert max(easier) <= min(harder) + 1e-4
    assert [len(parts) for parts in sampler.parts] == [4, 4, 1]
    assert [len(part) for part in sampler.parts[1]] == [6, 6, 6, 6]


def test_groups_by_hand():
    groups = baselines.difficulty_groups([5, 1, 7, 3, 2, 8, 4, 6])
    assert [group.tolist() for group in groups] == [[1, 4], [3, 6], [0, 7], [2, 5]]
    assert [len(group) for group in baselines.difficulty_groups(np.arange(10))] == [2, 3, 3, 2]
    assert [group.tolist() for group in baselines.difficulty_groups(range(7))] == [[*range(7)]]
    assert [group.tolist() for group in baselines.difficulty_groups([1.0])] == [[0]]
    assert len(baselines.difficulty_groups(np.ones(8))) == 4
    ifd = baselines.instruction_following_difficulty([1.0, 2.0, 900.0], [2.0, 2.0, 0.0])
    assert ifd[:2] == pytest.approx([np.exp(-1), 1]) and np.isfinite(ifd[2])


def test_perplexity_ratios_by_hand():
    # ratios 2, 4, 9 and 1, 3: means 5 and 2, over their mean 3.5
    now, before = np.log([2, 8, 9, 3, 6]), np.log([1, 2, 1, 3, 2])
    ratios = baselines.perplexity_ratios(now, before, [[0, 1, 2], [3, 4]])
    assert ratios == pytest.approx([5 / 3.5, 2 / 3.5])
    assert baselines.perplexity_ratios([0.7], [0.1], [[0]]) == pytest.approx([1])


def test_hbo_rewards_are_norms_and_ratios(arms, taken):
    """Global: the mean norm of 8 single examples' gradients a group, whole text, no dropout; local:
    perplexity now over perplexity before training, of up to 16 a group."""
    sampler, model = baselines.HBO(arms, make_args("hbo")), gpt2(0.1)
    sampler.split(model)
    start, local = exact(model), sampler.local.copy()
    optimizer = adamw(model, 1e-2)
    for _ in range(3):
        common.backward(model, arms["copy"][:6], sampler.args)
        common.optimizer_step(model, optimizer, 1e-2, 1.0)
    taken.clear()
    rewards = sampler.update(model, optimizer, 4, 1e-3)
    twin, expected, column = exact(model), [], 0
    assert {len(batch) for batch in taken} == {1}
    assert len(taken) == 4 * 7 + 2 + 4 * 6 + 6  # copy's groups have 7 or 8, of describe's all 6
    for k, examples in enumerate(arms.values()):
        norms, ratios = [], []
        for m, part in enumerate(sampler.parts[k]):
            order = data.data_rng(0, "hbo", 4, k, m).permutation(part)
            own = [gradient(twin, [examples[i]], 1) for i in order[:8]]
            norms.append(np.mean([np.sqrt(g @ g) for g in own]))
            own = [(examples[i].ids, examples[i].start) for i in order[:16]]
            own = [np.exp(own_loss(twin, *x) - own_loss(start, *x)) for x in own]
            ratios.append(np.mean(own))
        expected.append(np.mean(norms))
        ratios = np.array(ratios) / np.mean(ratios)
        assert sampler.local_rewards[k] == pytest.approx(ratios, rel=1e-4)
        own = slice(column, column + len(ratios))
        (after,) = adam_loop(local[0, own], [ratios], 1)
        assert sampler.local[0, own] == pytest.approx(after, abs=1e-3 if k == 2 else 1e-4)
        column += len(ratios)
    assert rewards == pytest.approx(expected, rel=1e-4)
    (after,) = adam_loop(np.log(np.array([30, 24, 6]) / 60), [rewards], 1)
    assert sampler.values == pytest.approx(after, abs=1e-12)
    groups = sampler.group_mixture()
    assert groups.sum() == pytest.approx(1)
    assert groups[:4].sum() == pytest.approx(sampler.mixture()[0])
    conditional = np.exp(sampler.local[0, :4]) / np.exp(sampler.local[0, :4]).sum()
    assert groups[:4] / groups[:4].sum() == pytest.approx(conditional)


# ------------------------------------------------------------------------ no traces


def ready(kind, arms, tokenizer, model_folder):
    """-> a model in the middle of training, its optimizer."""
    torch.manual_seed(0)
    if kind == "lora":
        flags = ["--lora_rank", "2", "--lora_dropout", "0.2", "--gradient_checkpointing"]
        model, _ = common.load_trainable(model_folder("llama"), make_args("hbo", *flags))
    else:
        model = gpt2(0.1 if kind == "dropout" else 0)
    optimizer = adamw(model.train())
    for step in range(2):
        common.backward(model, [arm[step] for arm in arms.values()], make_args("hbo"))
        common.optimizer_step(model, optimizer, 1e-3, 1.0)
    return model, optimizer


@pytest.mark.parametrize("kind", ["full", "dropout", "lora"])
@pytest.mark.parametrize("sampling", LEARNT)
def test_updates_leave_no_trace(arms, tokenizer, model_folder, sampling, kind):
    """Bit for bit: weights, moments, rates, RNG, a mixed mode, no gradients; and asked again from
    the same state they say the same."""
    model, optimizer = ready(kind, arms, tokenizer, model_folder)
    first, again = (dynamix_sft.SAMPLERS[sampling](arms, make_args(sampling)) for _ in "ab")
    next(model.modules()).eval()
    next(model.children()).train()
    before = state_of(model, optimizer)
    found = []
    for sampler in (first, again):
        if sampler.parts is None:
            sampler.split(model)
        found.append(sampler.update(model, optimizer, 4, 1e-3).tolist())
        assert same(before, state_of(model, optimizer))
    assert found[0] == found[1]
    assert (first.mixture() == again.mixture()).all()
    assert (first.mixture() != first.proportions).all()


@pytest.mark.parametrize("sampling", LEARNT)
def test_not_finite_names_the_dataset(arms, tokenizer, write_jsonl, sampling):
    bad = write_jsonl("bad.jsonl", [{"prompt": "~", "response": f"{i} ~~"} for i in range(10)])
    (tilde,) = data.encode_datasets(data.load_data([bad]), plain(tokenizer), 64, quiet=True)
    sampler = dynamix_sft.SAMPLERS[sampling]({**arms, "tilde": tilde}, make_args(sampling))
    model = random_model("llama")
    if sampler.parts is None:
        sampler.split(model)
    (token,) = tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = np.inf
    message = "reward of dataset 'tilde' after step 4: (nan|inf)"
    with pytest.raises(data.UserError, match=message), np.errstate(all="ignore"):
        sampler.update(model, adamw(model), 4, 1e-3)


# ------------------------------------------------------------------------ held-out rows


@pytest.mark.parametrize("size, held", [(2, 1), (9, 1), (19, 1), (20, 2), (319, 31), (5000, 32)])
def test_held_out_rows(size, held):
    one, others = baselines.held_out_rows(size, data.data_rng(0, "held_out", 1))
    assert len(one) == held
    assert sorted([*one, *others]) == list(range(size))
    assert (np.diff(others) > 0).all()
    again, _ = baselines.held_out_rows(size, data.data_rng(0, "held_out", 1))
    assert (one == again).all()


# ------------------------------------------------------------------------ the command

SHORT = ["--template", "plain", "--lr", "1e-2", "--batch_size", "8", "--micro_batch_size", "4"]
SHORT += ["--reward_batch_size", "4", "--log_every", "1"]


@pytest.fixture()
def run(model_folder, monkeypatch):
    monkeypatch.setattr(dynamix_sft.plots, "draw", lambda folder: [])
    start = ["--model", model_folder("llama"), "--data", *SPECS, *SHORT]

    def main(folder, *flags):
        dynamix_sft.main([*start, "--output_dir", str(folder), *flags])
        return read_json(folder / "summary.json")

    return main


def vector(record, prefix):
    return np.array([record[f"{prefix}/{label}"] for label in LABELS])


def trained(folder):
    return [record for record in records(folder) if "train/loss" in record]


@pytest.mark.parametrize("sampling", LEARNT)
def test_discarded_answers_are_a_proportional_run(tmp_path, run, monkeypatch, sampling):
    """What an update says is thrown away: weights and every logged number of training are, bit for
    bit, those of a run that draws by the shares and is never asked."""
    steps = ["--sampling", sampling, "--max_steps", "7", "--weight_decay", "0.1"]
    still, asked, on = tmp_path / "still", tmp_path / "asked", tmp_path / "on"
    run(still, *steps, "--update_every", "0")
    run(on, *steps, "--update_every", "2", "--actor_lr", "1e-2")
    monkeypatch.setattr(baselines, "actor_update", lambda actor, rewards, lr: actor)
    summary = run(asked, *steps, "--update_every", "2")
    assert (summary["updates"], len(values(asked, "reward/copy"))) == (3, 3)
    assert same(weights(still), weights(asked))
    assert trained(still) == trained(asked)
    assert not same(weights(still), weights(on))
    sizes = [27, 22, 5] if sampling != "hbo" else [30, 24, 6]
    for record in trained(still):
        assert vector(record, "mixture") == pytest.approx(np.array(sizes) / sum(sizes))


def test_weights_of_a_file(tmp_path, run):
    """The shares as weights are DynamixSFT without exploration or updates, bit for bit."""
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"describe": 24, "add": 6, "copy": 30}))
    summary = run(tmp_path / "file", "--sampling", str(file), "--max_steps", "5")
    still = ["--beta", "0", "--gamma", "0", "--update_every", "0", "--max_steps", "5"]
    run(tmp_path / "still", *still)
    assert same(weights(tmp_path / "file"), weights(tmp_path / "still"))
    assert summary["updates"] == 0 and summary["distance"]["datasets"] < 1e-12
    file.write_text(json.dumps({"describe": 1, "add": 0, "copy": 3}))
    summary = run(tmp_path / "other", "--sampling", str(file), "--max_steps", "5")
    rows = summary["mixture"]
    assert [rows[label]["probability"] for label in LABELS] == [0.75, 0.25, 0]
    assert rows["add"]["examples"] == 0
    assert summary["distance"]["datasets"] == pytest.approx((0.25 + 0.15 + 0.1) / 2)


@pytest.mark.parametrize("sampling", [*LEARNT, "file"])
def test_killed_and_resumed_is_bit_identical(tmp_path, run, sampling, monkeypatch):
    """... and the difficulty before training is not measured again; a file is not read again."""
    whole, cut, file = tmp_path / "whole", tmp_path / "cut", tmp_path / "weights.json"
    file.write_text(json.dumps({"describe": 1, "add": 2, "copy": 3}))
    flags = ["--sampling", str(file) if sampling == "file" else sampling, "--max_steps", "11"]
    flags += ["--update_every", "4", "--save_every", "3", "--actor_lr", "1e-3"]
    summary = run(whole, *flags)
    with killed_at(7, "train/loss"):
        run(cut, *flags)
    torch.rand(100)
    file.write_text(json.dumps({"describe": 5, "add": 5, "copy": 1}))
    monkeypatch.delattr(baselines.HBO, "split")
    resumed = run(cut, *flags, "--resume")
    assert records(cut) == records(whole)
    assert resumed["mixture"] == summary["mixture"]
    assert resumed["distance"] == summary["distance"]
    assert same(weights(cut), weights(whole))


@pytest.mark.parametrize("sampling", ["multidds", "multiuat"])
def test_held_out_rows_are_never_trained_on(tmp_path, run, taken, capsys, sampling):
    """Not in two epochs; said at the start, with the numbers."""
    summary = run(tmp_path / "run", "--sampling", sampling, "--epochs", "2")
    printed = capsys.readouterr().out
    assert "held out from training, for the rewards: 3 of copy, 2 of describe, 1 of add" in printed
    assert [row["size"] for row in summary["mixture"].values()] == [27, 22, 5]
    seen = set().union(*map(rows_of, taken))
    for k, size in enumerate((30, 24, 6)):
        held, others = baselines.held_out_rows(size, data.data_rng(0, "held_out", k))
        assert not seen & {(k, int(i)) for i in held}
    assert len(seen) > 45
    assert summary["steps"] == 16  # as long as any other sampling's


def test_hbo_draws_from_its_groups(tmp_path, run, taken, monkeypatch):
    """A group of probability 0 is not drawn from; group/ holds conditional probabilities."""
    only = lambda sampler: np.eye(9)[6]  # noqa: E731  the third group of describe
    monkeypatch.setattr(baselines.HBO, "group_mixture", only)
    kept, split = [], baselines.HBO.split
    keep = lambda sampler, model: (split(sampler, model), kept.append(sampler))  # noqa: E731
    monkeypatch.setattr(baselines.HBO, "split", keep)
    run(tmp_path / "run", "--sampling", "hbo", "--max_steps", "3", "--update_every", "0")
    assert set().union(*map(rows_of, taken)) == {(1, int(i)) for i in kept[0].parts[1][2]}
    first = records(tmp_path / "run")[0]
    groups = {key: value for key, value in first.items() if key.startswith("group/")}
    assert groups["group/add/1"] == 1
    assert sum(groups[f"group/copy/{m}"] for m in range(1, 5)) == pytest.approx(1)
    assert groups["group/copy/1"] == pytest.approx(7 / 30, abs=0.04)
    assert len(groups) == 9


@pytest.mark.parametrize("sampling", LEARNT)
def test_updates_cost_and_distance(tmp_path, run, capsys, sampling):
    """The logged mixture follows from the logged rewards by the actor alone; overhead and distance
    from the prior are printed and kept."""
    folder = tmp_path / "run"
    summary = run(folder, "--sampling", sampling, "--max_steps", "7", "--update_every", "3")
    printed = capsys.readouterr().out
    sizes = [row["size"] for row in summary["mixture"].values()]
    lines = [record for record in records(folder) if "reward/copy" in record]
    assert [record["step"] for record in lines] == [3, 6]
    rewards = [vector(record, "reward") for record in lines]
    expected = adam_loop(np.log(np.array(sizes) / sum(sizes)), rewards, 2)
    for record, w in zip(lines, expected):
        assert vector(record, "value") == pytest.approx(w, abs=1e-12)
        assert vector(record, "mixture") == pytest.approx(np.exp(w) / np.exp(w).sum())
    p, shares = vector(lines[-1], "mixture"), np.array(sizes) / sum(sizes)
    distance = summary["distance"]["datasets"]
    assert distance == pytest.approx(np.abs(p - shares).sum() / 2) and distance > 1e-3
    assert f"distance from the prior (total variation): {distance:.4f}" in printed
    assert ("groups" in summary["distance"]) == (sampling == "hbo")
    assert summary["cost"]["reward"] > 0
    assert f"cost  {summary['cost']['total']:.3f}x static sampling" in printed
    assert f"mix   2 updates of 3 datasets by {sampling}" in printed


@pytest.mark.parametrize("sampling", [*dynamix_sft.UNREAD, "weights.json", "own"])
def test_a_flag_that_a_sampler_does_not_read_is_said(arms, monkeypatch, capsys, sampling):
    """A rule of one's own may read any."""
    monkeypatch.setitem(dynamix_sft.SAMPLERS, "own", baselines.Uniform)
    rule = ["--beta", "3", "--gamma", "0.1", "--alpha", "0.5", "--prior", "--init", "zero"]
    rule += ["--reward", "loss", "--lookahead", "virtual", "--reward_on", "same"]
    others = ["--uncertainty", "entropy", "--mc_passes", "2", "--actor_lr", "1e-3"]
    others += ["--reward_batch_size", "2", "--update_every", "1"]
    args = dynamix_sft.parse_args(["--sampling", sampling, *rule, *others, "--lr", "1e-3"])
    flags = {flag[2:] for flag in [*rule, *others] if flag.startswith("--")}
    read = {
        "dynamix": flags - {"uncertainty", "mc_passes", "actor_lr"},
        "multidds": {"actor_lr", "reward_batch_size", "update_every"},
        "multiuat": {flag[2:] for flag in others if flag.startswith("--")},
        "hbo": {"actor_lr", "update_every"},
        "own": flags,
    }.get(sampling, set())
    assert set(dynamix_sft.unread_flags(args)) == flags - read
    dynamix_sft.make_plan(baselines.Sampler(arms, args), args)
    said = f"--sampling {sampling} does not use --" in capsys.readouterr().out
    assert said == (read != flags)


def test_methods_own_intervals():
    expected = {"dynamix": 50, "multidds": 1000, "multiuat": 1000, "hbo": 200}
    expected |= {"proportional": 0, "uniform": 0, "weights.json": 0}
    for name, every in expected.items():
        assert dynamix_sft.parse_args(["--sampling", name]).update_every == every
        own = ["--sampling", name, "--update_every", "7"]
        assert dynamix_sft.parse_args(own).update_every == 7
    args = dynamix_sft.parse_args([])
    assert (args.actor_lr, args.uncertainty, args.mc_passes) == (1e-4, "entropy", 10)
    assert (baselines.ACTOR_STEPS, baselines.GROUPS, baselines.FEWEST) == (200, 4, 8)


@pytest.mark.parametrize("sampling", ["multidds", "multiuat"])
def test_one_row_cannot_be_held_out(tmp_path, run, capsys, sampling):
    flags = ["--data", "toy/copy#20", "toy/add#1", "--sampling", sampling]
    line = error_line(capsys, run, tmp_path / "run", *flags)
    assert "dataset 'add' has one row, of which none can be held out" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"copy": 1, "describe": 1}', "expected {label: weight} for copy, describe, add"),
        ('{"copy": 1, "describe": 1, "add": 1, "x": 1}', "'x' is no label of --data"),
        ('{"copy": 1, "describe": 1, "add": -1}', "at least 0, and not all 0"),
        ('{"copy": 0, "describe": 0, "add": 0}', "at least 0, and not all 0"),
        ('{"copy": 1, "describe": "much", "add": 1}', "expected {label: weight}"),
        ("[1, 2]", "expected {label: weight}"),
        (None, "expected {label: weight}"),
    ],
)
def test_bad_files_of_weights_are_one_line(tmp_path, run, capsys, content, words):
    file = tmp_path / "weights.json"
    if content:
        file.write_text(content)
    line = error_line(capsys, run, tmp_path / "run", "--sampling", str(file))
    assert line.startswith(f"error: --sampling {file}: ") and words in line
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------ a rule of one's own


def test_the_rule_in_the_docs(tmp_path, run, monkeypatch, capsys):
    """docs/dynamix_sft.md shows a rule as a script: it runs, resumes, and does what it says."""
    page = (ROOT / "docs" / "dynamix_sft.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 20
    space, parts = {}, block.rpartition("dynamix_sft.main(")
    monkeypatch.setattr(dynamix_sft, "SAMPLERS", dict(dynamix_sft.SAMPLERS))
    exec(parts[0], space)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (name,) = set(dynamix_sft.SAMPLERS) - {"dynamix", "proportional", "uniform", *LEARNT}
    flags = ["--sampling", name, "--max_steps", "9", "--update_every", "2", "--save_every", "3"]
    run(whole, *flags)
    with killed_at(5, "train/loss"):
        run(cut, *flags)
    run(cut, *flags, "--resume")
    assert records(cut) == records(whole)
    assert same(weights(cut), weights(whole))
    last = [record for record in records(whole) if "reward/copy" in record][-1]
    losses = vector(last, "reward")
    assert vector(last, "mixture") == pytest.approx(np.exp(losses) / np.exp(losses).sum())

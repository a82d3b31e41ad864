"""DynamixSFT (arXiv 2508.12116): the mixture of a collection, learnt in training by a bandit.

    python dynamix_sft.py --model meta-llama/Llama-3.2-1B --data tulu2      # the paper's recipe
    python dynamix_sft.py --data toy --eval_data toy --epochs 1             # tiny model, minutes
    python dynamix_sft.py --data tulu2 --sampling proportional              # Full Coverage

The method, as it stands below from top to bottom:
  Sampling  every dataset is an arm with a value Q; batches are drawn from the datasets' original
            proportions, scaled by exp(β Q), with a floor γ/K (prior-scaled Boltzmann exploration)
  Reward    every T_update steps, for every dataset: one virtual optimizer step on a mini-batch of
            it, the relative loss drop that it brings, and everything put back (1-step look-ahead)
  Update    Q <- α Q + (1-α) · rewards, min-max scaled over the datasets
The paper's baselines and what any sampler is: baselines.py (--sampling multidds, multiuat, hbo).
What the paper leaves open, and what we chose: docs/dynamix_sft.md.

Shapes: K datasets (arms), N examples of all of them, B examples of a batch, b examples of a reward
mini-batch, R response tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import baselines
import common
import data
import plots
import ranks
from baselines import Sampler
from data import Example, Examples, UserError, data_rng

EPSILON = 1e-6  # ε of the reward; the paper gives no value. fp32 losses below it are rounding


# ---- Sampling and values -------------------------------------------------------------------------
def vectors(*arrays) -> list[np.ndarray]:
    """float64 copies. Raises ValueError unless all are finite and of one shape (K,), K >= 1."""
    result = [np.asarray(array, dtype=np.float64) for array in arrays]
    shapes = {array.shape for array in result}
    if len(shapes) > 1 or result[0].ndim != 1 or not len(result[0]):
        raise ValueError(f"expected arrays of one shape (K,), found {sorted(shapes)}")
    if not np.isfinite(result).all():
        raise ValueError(f"a number is not finite: {result}")
    return result


def sampling_probabilities(values, prior, beta: float, gamma: float) -> np.ndarray:
    """Prior-scaled Boltzmann exploration: p_k = (1-γ) exp(β Q_k) p0_k / Σ_j exp(β Q_j) p0_j + γ/K.

    values (K,) Q; prior (K,) p0, not negative, of any positive sum; beta >= 0 inverse temperature;
    gamma in [0, 1] share that is spread evenly. -> (K,) float64, sums to 1, each at least γ/K. Any
    size of β Q is safe. Raises ValueError."""
    values, prior = vectors(values, prior)
    if not ((prior >= 0).all() and prior.sum() > 0):
        raise ValueError(f"the prior must not be negative and not all 0: {prior}")
    if not (beta >= 0 and math.isfinite(beta) and 0 <= gamma <= 1):
        raise ValueError(f"beta {beta} must be at least 0 and gamma {gamma} between 0 and 1")
    with np.errstate(divide="ignore"):
        logits = beta * (values - values.max()) + np.log(prior / prior.sum())
    weights = np.exp(logits - logits.max())  # the largest is 1: no overflow, and never all 0
    return (1 - gamma) * weights / weights.sum() + gamma / len(values)


def lookahead_reward(loss_before, loss_after, eps: float) -> float:
    """r = mean over x of (ℓ_pre(x) - ℓ_post(x)) / (ℓ_pre(x) + ε): the 1-step look-ahead reward.

    loss_before, loss_after (b,): mean loss per response token (nats) of each example before and
    after the virtual step. Positive where the step helped. Raises ValueError where a loss is not
    finite."""
    before, after = vectors(loss_before, loss_after)
    return float(((before - after) / (before + eps)).mean())


def min_max(rewards) -> np.ndarray:
    """r~_k = (r_k - min r) / (max r - min r) over the K arms; all equal -> all 0. (K,) -> (K,) in
    [0, 1]. Raises ValueError where a reward is not finite."""
    (rewards,) = vectors(rewards)
    low, high = rewards.min(), rewards.max()
    return (rewards - low) / (high - low) if high > low else np.zeros_like(rewards)


def update_values(values, rewards, alpha: float) -> np.ndarray:
    """Q_k <- α Q_k + (1-α) r~_k, r~ the min-max of the raw rewards over the arms.

    values (K,), rewards (K,) raw, alpha in [0, 1] -> (K,) float64. Raises ValueError."""
    values, rewards = vectors(values, rewards)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must be between 0 and 1")
    return alpha * values + (1 - alpha) * min_max(rewards)


def proportional_values(proportions, beta: float) -> np.ndarray:
    """Q at the start of the variant "w/o prior + prop. init": β Q_k = log p0_k + constant. So a
    uniform prior and these values give the probabilities that the prior p0 gives with Q = 0. Unlike
    a prior, they are forgotten at the rate α.

    proportions (K,) positive, beta > 0 -> (K,) with maximum 0; the constant cancels."""
    log = np.log(np.asarray(proportions, dtype=np.float64))
    return (log - log.max()) / beta


# ---- Rewards -------------------------------------------------------------------------------------
@torch.no_grad()
def response_entropy(hidden: Tensor, head: common.Head) -> Tensor:
    """Entropy (nats) of the model's prediction at every response token, H = -Σ_v p_v log p_v, p the
    softmax of the head's logits. (R, H) -> (R,) fp32, a chunk of logits at a time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    entropy = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    for (rows,) in common.row_blocks(len(hidden), head):
        log_p = torch.log_softmax(head.logits(hidden[rows]), 1)  # (r, V)
        entropy[rows] = -(log_p.exp() * log_p).sum(1)
    return entropy


def look(model, examples: list[Example], args: Namespace) -> np.ndarray:
    """What a reward compares: each example's mean loss, or mean entropy, per response token ->
    (b,) float64. In evaluation mode and in fp32 whatever --dtype is: one step changes so little
    that bf16's rounding would show in the difference."""
    size = 2 * args.micro_batch_size
    if args.reward == "loss":
        nll, tokens, _ = common.score(model, examples, size, "fp32")
        return nll / tokens
    result, lengths = np.zeros(len(examples)), [len(example.ids) for example in examples]
    with common.evaluation_mode(model):
        for part in common.micro_batches(range(len(examples)), lengths, size):
            batch = common.collate([examples[i] for i in part], model.device)
            entropy = response_entropy(*common.response_states(model, batch, "fp32")).double().cpu()
            by_example = entropy.split(batch.response_lengths.tolist())
            result[part] = [entropy.mean().item() for entropy in by_example]
    return ranks.all_sum(result)


def reward_batches(size: int, count: int, fresh: bool, rng) -> tuple[np.ndarray, np.ndarray]:
    """Which examples of a dataset of `size` the virtual step is taken on, and which it is measured
    on -> two index arrays.

    The same `count` examples, or all where there are fewer. fresh: measured on as many others; a
    dataset with too few for both is cut in two, and one of a single example is measured on that."""
    order = rng.permutation(size)
    if not fresh or size == 1:
        return order[:count], order[:count]
    count = min(count, (size + 1) // 2)
    return order[:count], order[count : 2 * count]


def adamw_update(weight: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
    """What AdamW's next step on this gradient would add to the weight (not in the paper):
    Δθ = -lr (λ θ + m^ / (sqrt(v^) + eps)), m^ and v^ the moments after it, bias-corrected.

    weight, gradient: of one shape; state: the optimizer's for this weight ({} before its first
    step), group: its parameter group."""
    beta1, beta2 = group["betas"]
    step = float(state["step"]) + 1 if state else 1.0
    mean = gradient * (1 - beta1) + (state["exp_avg"] * beta1 if state else 0)
    square = gradient**2 * (1 - beta2) + (state["exp_avg_sq"] * beta2 if state else 0)
    root = (square / (1 - beta2**step)).sqrt() + group["eps"]
    return -group["lr"] * (mean / (1 - beta1**step) / root + group["weight_decay"] * weight)


def first_order_reward(gradients, updates, loss: float, eps: float) -> float:
    """r = -Σ ∇ℓ · Δθ / (ℓ + ε): the look-ahead reward to first order in the step, of the batch's
    loss instead of each example's (not in the paper). gradients, updates: tensors, parameter by
    parameter; loss: mean per token. Raises ValueError where it is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    pairs = zip(gradients, updates, strict=True)
    products = []
    for gradient, update in pairs:
        products.append((ranks.local(gradient) * ranks.local(update)).sum(dtype=torch.float64))
    return -ranks.all_sum(torch.stack(products).sum()).item() / (loss + eps)


@torch.no_grad()
def next_updates(model, optimizer, lr: float, max_grad_norm: float) -> Iterator[Tensor]:
    """AdamW's update of every trainable parameter from the gradients they hold, clipped as
    common.optimizer_step would."""
    parameters = common.trainable(model)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own clip_grad_norm_
    groups = {p: {**group, "lr": lr} for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        if p.grad is None:
            yield torch.zeros_like(p)
        else:
            yield adamw_update(p, p.grad * clip, optimizer.state.get(p, {}), groups[p])


def arm_rewards(
    model, optimizer, arms: dict[str, Examples], step: int, lr: float, args: Namespace
) -> np.ndarray:
    """Raw rewards of all datasets after `step` optimizer steps, from one state; nothing remains.

    virtual      a real step in everything (gradient, clipping, moments, decay; lr is that of the
                 next step) on a mini-batch of one dataset, the loss of each example before and
                 after, then parameters, moments, RNG, mode and gradients back.
    first_order  the gradient times the update that the optimizer would make; it is not made.
    The mini-batches have their own generator: training's order does not notice. -> (K,). Raises
    UserError naming the dataset whose losses or gradients are not finite."""
    rewards, rng = np.zeros(len(arms)), common.rng_state()
    virtual, fresh = args.lookahead == "virtual", args.reward_on == "fresh"
    snapshot = common.Snapshot(model, optimizer) if virtual else None
    if virtual and step == args.update_every:
        tqdm.write(f"reward: the copy of weights and moments is kept on {snapshot.device}")
    for k, (label, examples) in enumerate(arms.items()):
        own = data_rng(args.seed, "reward", step, k)
        first, other = reward_batches(len(examples), args.reward_batch_size, fresh, own)
        on = [examples[i] for i in first]
        measured = [examples[i] for i in other]
        try:
            losses = common.backward(model, on, args)
            if virtual:
                # The gradient's forward pass has each example's loss already: that of evaluation
                # mode, where it ran in fp32 and drew no random number (dropout).
                reuse = args.reward == "loss" and args.dtype == "fp32" and not fresh
                reuse = reuse and common.same_rng(rng)
                before = losses if reuse else look(model, measured, args)
                common.optimizer_step(model, optimizer, lr, args.max_grad_norm)
                rewards[k] = lookahead_reward(before, look(model, measured, args), EPSILON)
                snapshot.restore()
            else:
                updates = next_updates(model, optimizer, lr, args.max_grad_norm)
                if fresh:
                    updates = list(updates)
                    model.zero_grad(set_to_none=True)
                    losses = common.backward(model, measured, args)
                tokens, parameters = [e.response_length for e in measured], common.trainable(model)
                gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
                loss = float(np.average(losses, weights=tokens))
                rewards[k] = first_order_reward(gradients, updates, loss, EPSILON)
                model.zero_grad(set_to_none=True)
                common.set_rng_state(rng)
            vectors(rewards)  # all finite
        except (ValueError, UserError) as error:
            raise UserError(f"reward of dataset {label!r} after step {step}: {error}") from None
    return rewards


class Dynamix(Sampler):
    """The method's own sampler: values Q, drawn from by prior-scaled Boltzmann exploration."""

    every = 50

    def __init__(self, arms: dict[str, Examples], args: Namespace):
        super().__init__(arms, args)
        uniform = np.full(len(arms), 1 / len(arms))
        self.prior = self.proportions if args.prior else uniform
        if args.init == "proportional":
            self.values = proportional_values(self.proportions, args.beta)

    def mixture(self) -> np.ndarray:
        return sampling_probabilities(self.values, self.prior, self.args.beta, self.args.gamma)

    def update(self, model, optimizer, step: int, lr: float) -> np.ndarray:
        rewards = arm_rewards(model, optimizer, self.arms, step, lr, self.args)
        self.values = update_values(self.values, rewards, self.args.alpha)
        return rewards


# What --sampling takes, besides a .json file of weights. proportional: every example once an epoch.
SAMPLERS = {"dynamix": Dynamix, "proportional": Sampler, "uniform": baselines.Uniform}
SAMPLERS |= {"multidds": baselines.MultiDDS, "multiuat": baselines.MultiUAT, "hbo": baselines.HBO}


# ---- The loop ------------------------------------------------------------------------------------
@common.finish_step()
def train(model, sampler: Sampler, eval_sets: dict, plan: dict, args, run):
    """Train model on the sampler's datasets for plan["steps"] optimizer steps, from where the run's
    checkpoint stopped.
    -> {"steps", "examples", "tokens", "updates"}, {label: how often it was drawn (mixture_rows)}"""
    steps, steps_per_epoch = plan["steps"], plan["steps_per_epoch"]
    optimizer = common.make_optimizer(model, args)
    rates = [common.learning_rate(step, steps, args) for step in range(steps)]
    torch.manual_seed(args.seed + ranks.rank())  # of dropout
    labels, sizes = sampler.labels, sampler.sizes
    pool = Examples.join([*sampler.arms.values()])
    eval_at = common.every(args.eval_every, steps)
    update_at = common.every(args.update_every if sampler.every else 0, steps)
    counts = dict.fromkeys(("steps", "examples", "tokens", "updates"), 0)
    window = deque(maxlen=args.log_every)  # of each step: sum of the loss, tokens
    seen = np.zeros((2, len(labels)), np.int64)  # examples and response tokens drawn by dataset
    if run.state:
        common.restore(run.state, model, optimizer)
        counts, seen = run.state["counts"], run.state["seen"].numpy()
        window.extend(run.state["window"])
        sampler.load({name: array.numpy() for name, array in run.state["sampler"].items()})
    if sampler.parts is None:
        with run.timer("reward"):
            sampler.split(model)
    groups = sampler.groups()
    members, draws = np.concatenate(groups), [*map(len, groups)]
    draws = common.MixtureSampler(draws, args.batch_size, args.seed)
    if run.state:
        draws.cursors = run.state["cursors"].numpy()
    else:
        log_mixture(run, 0, sampler)
    model.train()
    bar, epoch = tqdm(total=steps, initial=counts["steps"], desc="train", unit="step"), None
    for step in range(counts["steps"], steps):
        with run.timer("train"):
            # ---- Sampling: for every example a dataset k ~ p, then the next example of D_k
            if args.sampling != "proportional":
                drawn = members[draws.batch(sampler.group_mixture(), step)]
            else:  # Full Coverage: every example exactly once an epoch
                if step // steps_per_epoch != epoch:
                    epoch = step // steps_per_epoch
                    order = len(pool), args.batch_size, args.seed, epoch
                    batches = common.epoch_batches(*order)
                drawn = batches[step % steps_per_epoch]
            batch = [pool[i] for i in drawn]
            losses = common.backward(model, batch, args)
            grad_norm = common.optimizer_step(model, optimizer, rates[step], args.max_grad_norm)
        tokens = np.array([example.response_length for example in batch])
        for example in batch:
            seen[:, example.dataset] += 1, example.response_length
        window.append([float(losses @ tokens), int(tokens.sum())])
        done, counts["steps"] = step + 1, step + 1
        counts["examples"], counts["tokens"] = map(int, seen.sum(1))
        bar.update(1)
        if done % args.log_every == 0 or done in (1, steps):
            loss, tokens = np.sum(window, axis=0)
            current = {"loss": loss / tokens, "lr": rates[step], "grad_norm": grad_norm}
            others = {"epoch": done / steps_per_epoch, **common.shares(seen, sizes, labels)}
            others |= common.by_label("mixture", labels, sampler.mixture())
            run.log_training("train", done, steps, current, others)
        if done in eval_at:
            common.evaluate_and_log(model, eval_sets, done, args, run)
        if done in update_at:
            # ---- Reward and update, with the learning rate of the next step
            with run.timer("reward"):
                rewards = sampler.update(model, optimizer, done, rates[done])
            counts["updates"] += 1
            log_mixture(run, done, sampler, rewards)
        if run.due(done, steps):
            state = {"counts": counts, "window": list(window), "seen": seen}
            state |= {"sampler": tensors(sampler.state()), "cursors": draws.cursors}
            run.save_checkpoint(state, model, optimizer)
    bar.close()
    return counts, mixture_rows(sampler, seen, steps / steps_per_epoch)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """As a checkpoint has them: copies."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


def log_mixture(run, step: int, sampler: Sampler, rewards=None) -> None:
    """Mixture and values that are in force after `step`, and the rewards that led to them."""
    record, line, labels = sampler.metrics(), "", sampler.labels
    if rewards is not None:
        record |= common.by_label("reward", labels, rewards)
        high, low = rewards.argmax(), rewards.argmin()
        highest, lowest = f"{labels[high]} {rewards[high]:.4g}", f"{labels[low]} {rewards[low]:.4g}"
        line = f"reward {step}  highest {highest}  lowest {lowest}"
    run.log(step, record, line)


def mixture_rows(sampler: Sampler, seen: np.ndarray, epochs: float) -> dict[str, dict]:
    """What was drawn of each dataset. Instance coverage = drawn / (size · epochs): 1 for every
    dataset under proportional sampling."""
    rows, share = {}, seen / seen.sum(1, keepdims=True)
    sizes, mixture = sampler.sizes, sampler.mixture()
    for k, label in enumerate(sampler.labels):
        row = {"size": int(sizes[k]), "probability": float(mixture[k])}
        row["value"] = float(sampler.values[k])
        row |= {"examples": int(seen[0, k]), "tokens": int(seen[1, k])}
        row |= {"share": float(share[0, k]), "token_share": float(share[1, k])}
        passes = float(seen[0, k] / sizes[k])
        rows[label] = {**row, "passes": passes, "coverage": passes / epochs}
    return rows


# ---- The script ----------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.ArgumentParser(description=__doc__)
    common.add_shared_flags(parser)
    # The paper's recipe, which names no weight decay: none.
    parser.set_defaults(epochs=2.0, batch_size=128, lr=1e-5, weight_decay=0.0)
    parser.set_defaults(schedule="linear", warmup_ratio=0.03)
    # fmt: off
    add = parser.add_argument_group("DynamixSFT").add_argument
    add("--sampling", default="dynamix",
        metavar="dynamix|proportional|uniform|multidds|multiuat|hbo|FILE.json",
        help="proportional: every example exactly once an epoch (Full Coverage); uniform: every "
             "dataset equally often; a file is {training label: weight}; the others are the "
             "paper's dynamic baselines")
    add("--beta", type=common.non_negative_float, default=4.0,
        help="sharpness of the Boltzmann weights exp(beta · Q); the paper: 4 for 1B, 5 for 8B")
    add("--gamma", type=common.fraction, default=0.3,
        help="share of the draws that is spread evenly over the datasets")
    add("--alpha", type=common.fraction, default=0.95, help="how much of Q an update keeps")
    add("--update_every", type=common.non_negative_int,
        help="steps between updates of the mixture, 0 = never; default the method's own: dynamix "
             "50, multidds and multiuat 1000, hbo 200")
    add("--reward_batch_size", type=common.positive_int, default=16,
        help="examples of a dataset per virtual step (multidds: gradient; multiuat: pass): what an "
             "update costs (not in the paper)")
    add("--reward", choices=["loss", "entropy"], default="loss",
        help="relative drop of the loss, or of the entropy of the model's predictions (ablation)")
    add("--prior", action=argparse.BooleanOptionalAction, default=True,
        help="scale the weights by the datasets' original proportions (ablation: --no-prior)")
    add("--init", choices=["zero", "proportional"], default="zero",
        help="Q at the start; proportional, with --no-prior: as if from the prior (ablation)")
    add("--lookahead", choices=["virtual", "first_order"], default="virtual",
        help="first_order: gradient times the optimizer's would-be update (not in the paper)")
    add("--reward_on", choices=["same", "fresh"], default="same",
        help="fresh: measure on other examples than those stepped on (not in the paper)")
    add = parser.add_argument_group("multidds, multiuat, hbo").add_argument
    add("--actor_lr", type=common.positive_float, default=1e-4,
        help="learning rate of the actors; an update moves a logit by at most about 200 times this")
    add("--uncertainty", choices=["entropy", "probability"], default="entropy",
        help="multiuat: expected entropy (ENTTP), or 1 - expected probability (EXPTP)")
    add("--mc_passes", type=common.few, default=10,
        help="multiuat: Monte-Carlo passes, where the model has dropout")
    # fmt: on
    args = common.parse_flags(parser, argv, "dynamix_sft")
    if args.sampling not in SAMPLERS and not args.sampling.endswith(".json"):
        forms = f"{', '.join(SAMPLERS)} or a .json file"
        parser.error(f"--sampling {args.sampling[:40]}: expected {forms}")
    if args.update_every is None:
        args.update_every = SAMPLERS.get(args.sampling, baselines.Fixed).every
    if args.max_steps:
        args.epochs = None
    if args.init == "proportional" and (args.prior or not args.beta):
        parser.error("--init proportional goes with --no-prior and a positive --beta")
    if args.init == "proportional" and args.beta < 1e-6:
        parser.error(f"--beta {args.beta:g}: --init proportional divides by it, at least 1e-6")
    if args.lookahead == "first_order" and args.reward == "entropy":
        parser.error("--lookahead first_order goes with --reward loss")
    return args


# What each --sampling has no use for; a .json file is as uniform.
RULE = {"beta", "gamma", "alpha", "prior", "init", "reward", "lookahead", "reward_on"}
UNCERTAINTY = {"uncertainty", "mc_passes"}
STATIC = RULE | UNCERTAINTY | {"actor_lr", "reward_batch_size", "update_every"}
UNREAD = {"dynamix": UNCERTAINTY | {"actor_lr"}, "proportional": STATIC, "uniform": STATIC}
UNREAD |= {"multidds": RULE | UNCERTAINTY, "multiuat": RULE}
UNREAD |= {"hbo": RULE | UNCERTAINTY | {"reward_batch_size"}}


def unread_flags(args: Namespace) -> list[str]:
    """Those that were named and that --sampling does not read."""
    name = "uniform" if args.sampling.endswith(".json") else args.sampling
    return [flag for flag in args.given if flag in UNREAD.get(name, ())]


def make_plan(sampler: Sampler, args: Namespace) -> dict[str, int]:
    """How long the run is -> {"steps", "steps_per_epoch"}; printed."""
    arms, total = sampler.arms, sum(map(len, sampler.arms.values()))
    per_epoch = len(common.batch_sizes(total, args.batch_size))
    steps = common.total_steps(args, per_epoch)
    length = f"{steps} steps, {args.epochs or steps / per_epoch:.3g} epochs"
    counts = f"{total:,} examples of {len(arms)} datasets"
    print(f"train {length}; {common.batch_arithmetic(args)}; {counts}")
    unread = [f"--{name}" for name in unread_flags(args)]
    if unread:
        print(f"mix   --sampling {args.sampling} does not use {', '.join(unread)}")
    updates = len(common.every(args.update_every if sampler.every else 0, steps))
    if args.sampling == "dynamix" and updates:
        print(f"mix   {updates} updates of {len(arms)} x {args.reward_batch_size} examples")
    elif updates:
        print(f"mix   {updates} updates of {len(arms)} datasets by {args.sampling}")
    elif sampler.every:
        print(f"mix   no update in this run: --update_every {args.update_every} of {steps} steps")
    return {"steps": steps, "steps_per_epoch": per_epoch}


def print_mixture(rows: dict[str, dict]) -> None:
    width = max(map(len, rows))
    for label, row in rows.items():
        shares = f"{row['share']:.1%} of the examples, {row['token_share']:.1%} of the tokens"
        drawn = f"drawn {row['examples']:,} ({shares})  {row['passes']:.2f} passes"
        chance = f"p {row['probability']:.4f}"
        print(f"mix   {label:<{width}}  {chance}  {drawn}  coverage {row['coverage']:.0%}")


def distances(sampler: Sampler) -> dict[str, float]:
    """How far the last mixture is from proportional sampling, printed: total variation over the
    datasets, and over the groups that a sampler makes of them."""
    result = {"datasets": baselines.total_variation(sampler.mixture(), sampler.sizes)}
    groups = [len(part) for part in sampler.groups()]
    line = f"mix   distance from the prior (total variation): {result['datasets']:.4f}"
    if len(groups) > len(sampler.labels):
        result["groups"] = baselines.total_variation(sampler.group_mixture(), groups)
        line += f", of the groups {result['groups']:.4f}"
    print(line)
    return result


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    run = common.Run("dynamix_sft", args)
    if run.finished:
        return
    tokenizer = common.setup(args)
    datasets, eval_datasets = common.load_datasets(args, tokenizer)
    model = common.load_start(args)
    arms = {dataset.label: dataset.examples for dataset in datasets}
    sampler = SAMPLERS.get(args.sampling, baselines.Fixed)(arms, args)
    eval_sets = {dataset.label: dataset.examples for dataset in eval_datasets}
    examples = Examples.join([*arms.values()])
    tries = args.sampling == "dynamix" and args.lookahead == "virtual"
    common.print_memory(model, args, snapshot=tries)
    common.check_gradients(model, examples[0], args.dtype)
    run.open(**common.data_config(datasets, eval_datasets, examples))
    if args.show_batch:
        data.show_examples(examples, tokenizer)
    plan = make_plan(sampler, args)
    before = common.evaluate_before(model, eval_sets, args, run)
    counts, rows = train(model, sampler, eval_sets, plan, args, run)
    measure = common.evaluator(eval_sets, args)
    after = common.save_final(model, tokenizer, measure, counts["steps"], run)
    print_mixture(rows)
    distance = distances(sampler)
    cost = run.cost("reward")
    print(f"cost  {cost['total']:.3f}x static sampling: training 1 + rewards {cost['reward']:.3f}")
    summary = {**counts, "mixture": rows, "cost": cost, "distance": distance}
    common.end_run(run, before, after, summary, plots.draw)


if __name__ == "__main__":
    main()

"""DynamixSFT (arXiv 2508.12116): the mixture of an instruction-tuning collection, learnt during training by a bandit.

    python dynamix_sft.py --model meta-llama/Llama-3.2-1B --data tulu2      # the paper's recipe
    python dynamix_sft.py --data toy --eval_data toy --epochs 1             # the built-in tiny model, minutes on a laptop
    python dynamix_sft.py --data tulu2 --sampling proportional              # the Full Coverage baseline

The method, as it stands below from top to bottom:
  Sampling  every dataset is an arm with a value Q; batches are drawn from the datasets' original proportions, scaled by
            exp(β Q), with a floor γ/K                                       (prior-scaled Boltzmann exploration)
  Reward    every T_update steps, for every dataset: one virtual optimizer step on a mini-batch of it, the relative loss
            drop that it brings, and everything put back                     (1-step look-ahead reward)
  Update    Q <- α Q + (1-α) · rewards, min-max scaled over the datasets
What the paper leaves open, and what we chose: docs/dynamix_sft.md.

Shapes: K datasets (arms), N examples of all of them, B examples of a batch, b examples of a reward mini-batch, R response
tokens, V vocabulary, H hidden.
"""
from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError

EPSILON = 1e-6  # ε of the reward; the paper gives no value. fp32 losses below it are rounding

# ----------------------------------------------------------------------------------------------------------------------
# The method: sampling and values
# ----------------------------------------------------------------------------------------------------------------------


def sampling_probabilities(values, prior, beta, gamma):
    """p_k = (1-γ) · exp(β Q_k) p0_k / Σ_j exp(β Q_j) p0_j + γ/K: the paper's prior-scaled Boltzmann exploration.

    values (K,) Q; prior (K,) p0, not negative, of any positive sum; beta >= 0 inverse temperature; gamma in [0, 1] share that
    is spread evenly. -> (K,) float64, sums to 1, each at least γ/K. Any size of β Q is safe. Raises ValueError.
    """
    values, prior = np.asarray(values, dtype=np.float64), np.asarray(prior, dtype=np.float64)
    if values.ndim != 1 or values.shape != prior.shape or not len(values):
        raise ValueError(f"values {values.shape} and prior {prior.shape} must be of one shape (K,)")
    if not np.isfinite(values).all():
        raise ValueError(f"a value is not finite: {values}")
    if not (np.isfinite(prior).all() and (prior >= 0).all() and prior.sum() > 0):
        raise ValueError(f"the prior must be finite, not negative and not all 0: {prior}")
    if not (beta >= 0 and math.isfinite(beta) and 0 <= gamma <= 1):
        raise ValueError(f"beta {beta} must be at least 0 and gamma {gamma} between 0 and 1")
    with np.errstate(divide="ignore"):
        logits = beta * (values - values.max()) + np.log(prior / prior.sum())
    weights = np.exp(logits - logits.max())  # the largest is 1: no overflow, and never all 0
    return (1 - gamma) * weights / weights.sum() + gamma / len(values)


def lookahead_reward(loss_before, loss_after, eps):
    """r = mean over x of (ℓ_pre(x) - ℓ_post(x)) / (ℓ_pre(x) + ε): the 1-step look-ahead reward.

    loss_before, loss_after (b,): mean loss per response token (nats) of each example before and after the virtual step.
    -> float; positive where the step helped. Raises ValueError where a loss is not finite.
    """
    before, after = np.asarray(loss_before, dtype=np.float64), np.asarray(loss_after, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise ValueError(f"losses before {before.shape} and after {after.shape} must be of one shape (b,)")
    for name, losses in (("before", before), ("after", after)):
        if not np.isfinite(losses).all():
            raise ValueError(f"{np.sum(~np.isfinite(losses))} of {len(losses)} losses {name} the virtual step are not finite")
    return float(((before - after) / (before + eps)).mean())


def min_max(rewards):
    """r~_k = (r_k - min r) / (max r - min r) over the K arms; all equal -> all 0. (K,) -> (K,) in [0, 1].
    Raises ValueError where a reward is not finite."""
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(f"a reward is not finite: {rewards}")
    low, high = rewards.min(), rewards.max()
    return (rewards - low) / (high - low) if high > low else np.zeros_like(rewards)


def update_values(values, rewards, alpha):
    """Q_k <- α Q_k + (1-α) r~_k, r~ the min-max of the raw rewards over the arms.

    values (K,), rewards (K,) raw, alpha in [0, 1] -> (K,) float64. Raises ValueError.
    """
    values, rewards = np.asarray(values, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.shape != rewards.shape or not len(values):
        raise ValueError(f"values {values.shape} and rewards {rewards.shape} must be of one shape (K,)")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must be between 0 and 1")
    return alpha * values + (1 - alpha) * min_max(rewards)


def proportional_values(proportions, beta):
    """Q at the start of the variant "w/o prior + prop. init": β Q_k = log p0_k + constant, so that a uniform prior and these
    values give the probabilities that the prior p0 gives with Q = 0. Unlike a prior, they are forgotten at the rate α.

    proportions (K,) positive, beta > 0 -> (K,) with maximum 0. The constant cancels in the probabilities, now and later.
    """
    log = np.log(np.asarray(proportions, dtype=np.float64))
    return (log - log.max()) / beta


# ----------------------------------------------------------------------------------------------------------------------
# The method: rewards
# ----------------------------------------------------------------------------------------------------------------------


def backward(model, examples, args):
    """Add the gradient of a batch's loss, the mean over its response tokens: summed over micro-batches, divided once by the
    tokens of the whole batch. The training step and the virtual steps both take it from here.

    -> mean loss of each example (B,) float64, as the model has it in the mode it is in, in the order of examples.
    """
    device, head = next(model.parameters()).device, common.output_head(model)
    tokens = np.array([example.response_tokens for example in examples])
    order, rows = [], []
    for part in common.micro_batches(range(len(examples)), [len(example.ids) for example in examples], args.micro_batch_size):
        micro = common.collate([examples[i] for i in part], device)
        with common.autocast(device, args.dtype):
            hidden = common.hidden_states(model, micro.ids)                           # (B, T, H)
        loss, nll = common.response_loss(micro.select(hidden), micro.targets, head)   # sum, (R,)
        (loss / int(tokens.sum())).backward()
        order += part
        rows.append(nll)
    losses = np.zeros(len(examples))
    nll = torch.cat(rows).double().cpu()
    losses[order] = [row.mean().item() for row in nll.split(tokens[order].tolist())]
    return losses


@torch.no_grad()
def response_entropy(hidden, head):
    """Entropy (nats) of the model's prediction at every response token, H = -Σ_v p_v log p_v, p = softmax of the head's logits.
    hidden (R, H) -> (R,) fp32, without ever holding more than a chunk of logits."""
    entropy = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

    def block(logits, rows):
        logits = logits * head.scale
        logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        log_p = torch.log_softmax(logits, 1)                                          # (r, V)
        entropy[rows] = -(log_p.exp() * log_p).sum(1)
        return entropy[rows].sum(dtype=torch.float64)[None]

    rows = torch.arange(len(hidden), device=hidden.device).split(common.chunk_rows(len(head.weight), hidden.device))
    common.chunked_head_loss(hidden, head, [(part,) for part in rows], block)
    return entropy


@torch.no_grad()
def measure(model, examples, args):
    """What a reward compares: each example's mean loss, or mean entropy, per response token -> (b,) float64. In evaluation mode
    and fp32 whatever --dtype is: one step changes so little that bf16's rounding would show in the difference."""
    device, size = next(model.parameters()).device, 2 * args.micro_batch_size
    if args.reward == "loss":
        nll, tokens, _ = common.score(model, examples, size, device, "fp32")
        return nll / tokens
    head, training, result = common.output_head(model), model.training, np.zeros(len(examples))
    model.eval()
    for part in common.micro_batches(range(len(examples)), [len(example.ids) for example in examples], size):
        batch = common.collate([examples[i] for i in part], device)
        rows = response_entropy(batch.select(common.hidden_states(model, batch.ids)), head).double().cpu()
        result[part] = [entropy.mean().item() for entropy in rows.split(batch.lengths.tolist())]
    model.train(training)
    return result


def reward_batches(size, count, fresh, rng):
    """Which examples of a dataset of `size` the virtual step is taken on, and which it is measured on -> two index arrays.

    The same `count` examples, or all where there are fewer. fresh: measured on as many others; a dataset with too few for
    both is cut in two, and one of a single example is measured on that.
    """
    order = rng.permutation(size)
    if not fresh or size == 1:
        return order[:count], order[:count]
    count = min(count, (size + 1) // 2)
    return order[:count], order[count:2 * count]


def adamw_update(weight, gradient, state, group):
    """What AdamW's next step on this gradient would add to the weight, without taking it (not in the paper).

    weight, gradient: tensors of one shape; state: the optimizer's for this weight ({} before its first step), group: its
    parameter group. -> Δθ = -lr (λ θ + m^ / (sqrt(v^) + eps)), m^ and v^ the moments after this gradient, bias-corrected.
    """
    beta1, beta2 = group["betas"]
    step = float(state["step"]) + 1 if state else 1.0
    mean = gradient * (1 - beta1) + (state["exp_avg"] * beta1 if state else 0)
    square = gradient ** 2 * (1 - beta2) + (state["exp_avg_sq"] * beta2 if state else 0)
    direction = mean / (1 - beta1 ** step) / ((square / (1 - beta2 ** step)).sqrt() + group["eps"])
    return -group["lr"] * (direction + group["weight_decay"] * weight)


def first_order_reward(gradients, updates, loss, eps):
    """r = -Σ ∇ℓ · Δθ / (ℓ + ε): the look-ahead reward to first order in the step, of the batch's loss instead of each
    example's (not in the paper). gradients, updates: tensors, parameter by parameter; loss: mean per token. -> float
    Raises ValueError where the loss is not finite: dividing by it would hide that."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    products = [(gradient * update).sum(dtype=torch.float64) for gradient, update in zip(gradients, updates, strict=True)]
    return -torch.stack(products).sum().item() / (loss + eps)


@torch.no_grad()
def next_updates(model, optimizer, lr, max_grad_norm):
    """AdamW's update of every trainable parameter from the gradients they hold, clipped as optimizer_step would; an iterator."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own clip_grad_norm_
    groups = {p: {**group, "lr": lr} for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        yield torch.zeros_like(p) if p.grad is None else adamw_update(p, p.grad * clip, optimizer.state.get(p, {}), groups[p])


def arm_rewards(model, optimizer, arms, labels, step, lr, args):
    """Raw rewards of all datasets after `step` optimizer steps, from one and the same state; nothing of it remains.

    virtual      a real step in everything (gradient, clipping, moments, decay; lr is that of the next step) on a mini-batch of
                 one dataset, the loss of each example before and after, then parameters, moments, RNG, mode and gradients back.
    first_order  the gradient times the update that the optimizer would make; it is not made, so there is nothing to put back.
    arms: K lists of examples. The mini-batches have their own generator: training's order does not notice. -> (K,)
    Raises UserError naming the dataset whose losses or gradients are not finite.
    """
    rewards, snapshot, rng, reuse = np.zeros(len(arms)), None, common.rng_state(), None
    if args.lookahead == "virtual":
        snapshot = common.Snapshot(model, optimizer)
        if step == args.update_every:
            tqdm.write(f"reward: the copy of weights and moments is kept on {snapshot.device}")
    for k, examples in enumerate(arms):
        on, measured = reward_batches(len(examples), args.reward_batch_size, args.reward_on == "fresh", common.data_rng(args.seed, "reward", step, k))
        on, measured = [examples[i] for i in on], [examples[i] for i in measured]
        try:
            losses = backward(model, on, args)
            if args.lookahead == "first_order":
                updates = next_updates(model, optimizer, lr, args.max_grad_norm)
                if args.reward_on == "fresh":
                    updates = list(updates)
                    model.zero_grad(set_to_none=True)
                    losses = backward(model, measured, args)
                gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad)
                rewards[k] = first_order_reward(gradients, updates, np.average(losses, weights=[e.response_tokens for e in measured]), EPSILON)
                model.zero_grad(set_to_none=True)
                common.set_rng_state(rng)
            else:
                # The gradient's forward pass has each example's loss already: the same one, in fp32 and without dropout.
                before = losses if reuse else measure(model, measured, args)
                if reuse is None:
                    reuse = args.reward == "loss" and args.reward_on == "same" and np.allclose(losses, before, rtol=1e-5, atol=1e-6)
                common.optimizer_step(model, optimizer, lr, args.max_grad_norm)
                rewards[k] = lookahead_reward(before, measure(model, measured, args), EPSILON)
                snapshot.restore()
            if not math.isfinite(rewards[k]):
                raise ValueError(f"the reward is {rewards[k]}")
        except (ValueError, UserError) as error:
            raise UserError(f"reward of dataset {labels[k]!r} after step {step}: {error}") from None
    return rewards


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


def train(model, arms, labels, steps, steps_per_epoch, args, run, state=None, eval_sets=None):
    """Train model on the datasets arms (K lists of examples) for `steps` optimizer steps. state: where a checkpoint stopped.
    -> {"step", "examples", "tokens", "updates"}, {label: how often it was drawn, see mixture_row}"""
    optimizer = common.make_optimizer(model, args.lr, args.weight_decay)
    torch.manual_seed(args.seed)
    pool = [example for arm in arms for example in arm]
    sizes, lengths = np.array([len(arm) for arm in arms]), [len(example.ids) for example in pool]
    proportions, uniform = sizes / sizes.sum(), np.full(len(arms), 1 / len(arms))
    prior = proportions if args.prior else uniform
    values = proportional_values(proportions, args.beta) if args.init == "proportional" else np.zeros(len(arms))
    sampler = common.MixtureSampler(sizes, lengths, args.batch_size, args.seed)
    counts, window = {"step": 0, "examples": 0, "tokens": 0, "updates": 0}, np.zeros(2)
    drawn, tokens = np.zeros(len(arms), np.int64), np.zeros(len(arms), np.int64)  # examples and response tokens by dataset
    if state:
        common.load_trainable_state(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        common.set_rng_state(state["rng"])
        counts, window, values = dict(state["counts"]), state["window"].numpy().copy(), state["values"].numpy().copy()
        drawn, tokens, sampler.drawn = (state[key].numpy().copy() for key in ("drawn", "tokens", "cursors"))

    def probabilities():
        if args.sampling == "dynamix":
            return sampling_probabilities(values, prior, args.beta, args.gamma)
        return uniform if args.sampling == "uniform" else proportions

    def named(prefix, numbers):
        return {f"{prefix}/{label}": float(number) for label, number in zip(labels, numbers)}

    p, epoch, batches = probabilities(), -1, []
    if not state:
        run.log(0, {**named("mixture", p), **named("value", values)})
    model.train()
    bar = tqdm(total=steps, initial=counts["step"], desc="train", unit="step")
    while counts["step"] < steps:
        step = counts["step"]
        with run.timer("train"):
            # ---- Sampling: for every example of the batch a dataset k ~ p, then the next example of D_k
            if args.sampling == "proportional":  # Full Coverage: every example exactly once an epoch
                if step // steps_per_epoch != epoch:
                    epoch = step // steps_per_epoch
                    # window=1: each batch by itself, as mixed as those of the other samplings
                    batches = common.epoch_batches(lengths, args.batch_size, args.seed, epoch, window=1)
                batch = batches[step % steps_per_epoch]
            else:
                batch = sampler.batches(p, step, 1)[0]
            examples = [pool[i] for i in batch]
            losses = backward(model, examples, args)
            lr = common.learning_rate(step, steps, args.lr, args.schedule, args.warmup_ratio)
            grad_norm = common.optimizer_step(model, optimizer, lr, args.max_grad_norm)
        length = np.array([example.response_tokens for example in examples])
        for example in examples:
            drawn[example.dataset] += 1
            tokens[example.dataset] += example.response_tokens
        window += [losses @ length, length.sum()]
        step += 1
        counts = {**counts, "step": step, "examples": int(drawn.sum()), "tokens": int(tokens.sum())}
        bar.update(1)
        if step % args.log_every == 0 or step in (1, steps):
            logged = {"train/loss": window[0] / window[1], "train/lr": lr, "train/grad_norm": grad_norm}
            line = "  ".join(f"{key.split('/')[1]} {value:.4g}" for key, value in logged.items())
            run.log(step, {"epoch": step / steps_per_epoch, "examples": counts["examples"], "tokens": counts["tokens"], **logged,
                           **named("mixture", p), **named("share", drawn / drawn.sum()), **named("token_share", tokens / tokens.sum()),
                           **named("passes", drawn / sizes)}, f"train {step}/{steps}  {line}")
            window[:] = 0
        if eval_sets and args.eval_every and step % args.eval_every == 0 and step < steps:
            evaluate(model, eval_sets, step, args, run)
        if args.sampling == "dynamix" and args.update_every and step % args.update_every == 0 and step < steps:
            # ---- Reward: a virtual step on every dataset, with the learning rate of the next step. Update: Q, then p.
            with run.timer("reward"):
                lr = common.learning_rate(step, steps, args.lr, args.schedule, args.warmup_ratio)
                rewards = arm_rewards(model, optimizer, arms, labels, step, lr, args)
                values = update_values(values, rewards, args.alpha)
                p = probabilities()
            counts["updates"] += 1
            run.log(step, {**named("reward", rewards), **named("value", values), **named("mixture", p)},
                    f"reward {step}/{steps}  highest {labels[rewards.argmax()]} {rewards.max():.4g}  lowest {labels[rewards.argmin()]} {rewards.min():.4g}")
        if args.save_every and step % args.save_every == 0 and step < steps:
            run.save_checkpoint({"counts": counts, "window": torch.from_numpy(window), "values": torch.from_numpy(values),
                                 "drawn": torch.from_numpy(drawn), "tokens": torch.from_numpy(tokens), "cursors": torch.from_numpy(sampler.drawn),
                                 "model": common.trainable_state(model), "optimizer": optimizer.state_dict()})
    bar.close()
    rows = {}
    for k, label in enumerate(labels):
        # Instance coverage: drawn / (size · epochs). Proportional sampling gives every dataset 1.
        rows[label] = {"size": int(sizes[k]), "probability": float(p[k]), "value": float(values[k]), "examples": int(drawn[k]), "tokens": int(tokens[k]),
                       "share": float(drawn[k] / drawn.sum()), "token_share": float(tokens[k] / tokens.sum()), "passes": float(drawn[k] / sizes[k]),
                       "coverage": float(drawn[k] / (sizes[k] * steps / steps_per_epoch))}
    return counts, rows


def evaluate(model, eval_sets, step, args, run):
    """Evaluate on --eval_data, log, and return common.evaluate's numbers."""
    with run.timer("eval"):
        result = common.evaluate(model, eval_sets, 2 * args.micro_batch_size, next(model.parameters()).device, args.dtype)
    run.log(step, {f"eval/{label}/{key}": value for label, row in result.items() for key, value in row.items()})
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def colors(count):
    """As many distinct colours as there are datasets."""
    import matplotlib
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["tab20"](i) for i in range(count)] if count <= 20 else list(matplotlib.colormaps["turbo"](np.linspace(0, 1, count)))


def series(records, prefix, labels):
    """-> steps (S,), values (S, K) of the records that hold prefix/<label>."""
    found = [record for record in records if f"{prefix}/{labels[0]}" in record]
    return np.array([record["step"] for record in found]), np.array([[record[f"{prefix}/{label}"] for label in labels] for record in found])


def plot_mixture(path, records, labels, steps):
    """Sampling probabilities over the steps, stacked; each holds from one update to the next."""
    at, p = series([record for record in records if f"value/{labels[0]}" in record], "mixture", labels)
    figure, axes = common.new_figure(width=7.4, height=max(3.6, 0.6 + 0.17 * len(labels)))
    axis = axes[0, 0]
    areas = axis.stackplot(np.append(at, steps), np.concatenate([p, p[-1:]]).T, step="post", colors=colors(len(labels)), linewidth=0)
    axis.set(xlim=(0, steps), ylim=(0, 1), xlabel="optimizer step", ylabel="sampling probability", title="Mixture")
    axis.legend(areas[::-1], [f"{label} {first:.1%} → {last:.1%}" for label, first, last in zip(labels, p[0], p[-1])][::-1],
                loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    common.save_figure(figure, path)


def plot_rewards(path, records, labels):
    """Raw reward and value Q of every dataset over the updates."""
    figure, axes = common.new_figure(columns=2, width=5.2, height=max(3.6, 0.6 + 0.17 * len(labels)))
    for axis, prefix, title, name in ((axes[0, 0], "reward", "1-step look-ahead reward", "reward"), (axes[0, 1], "value", "Value", "Q")):
        at, values = series(records, prefix, labels)
        for k, color in enumerate(colors(len(labels))):
            axis.plot(at, values[:, k], color=color, linewidth=1.2, marker="o" if len(at) < 3 else None, label=labels[k])
        axis.set(xlabel="optimizer step", ylabel=name, title=title)
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    common.save_figure(figure, path)


COVERAGE_SHOWN = 400  # %; longer bars are cut, their number is written beside them


def plot_coverage(path, rows):
    """Instance coverage of every dataset, drawn / (size · epochs), beside the 100 % that proportional sampling gives."""
    figure, axes = common.new_figure(width=6.4, height=max(2.4, 1.0 + 0.24 * len(rows)))
    axis, y = axes[0, 0], np.arange(len(rows))
    coverage = [100 * row["coverage"] for row in rows.values()]
    axis.barh(y, np.minimum(coverage, COVERAGE_SHOWN), color=colors(len(rows)))
    for at, value, row in zip(y, coverage, rows.values()):
        arrow = " →" if value > COVERAGE_SHOWN else ""
        axis.text(min(value, COVERAGE_SHOWN) + 2, at, f"{value:.0f} %{arrow}, {row['passes']:.1f} passes", va="center", fontsize=7,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axis.axvline(100, color="black", linestyle="--", linewidth=1, zorder=0.5)
    axis.set(yticks=y, xlim=(0, 1.4 * min(max(coverage + [100]), COVERAGE_SHOWN)), xlabel="examples drawn / (examples · epochs), %", title="Instance coverage")
    axis.set_yticklabels([f"{label} ({row['size']:,})" for label, row in rows.items()], fontsize=8)
    axis.invert_yaxis()
    common.save_figure(figure, path)


def plot_loss(path, records):
    """Training loss per token over the steps, and that of every evaluation set."""
    figure, axes = common.new_figure(width=6.4, height=3.6)
    axis = axes[0, 0]
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("eval/") and key.endswith("/nll"))
    lines = [("train/loss", "train")] + [(key, key[len("eval/"):-len("/nll")]) for key in keys]
    for (key, label), color in zip(lines, ["black", *colors(len(keys))]):
        points = [(record["step"], record[key]) for record in records if key in record]
        axis.plot(*zip(*points), label=label, linewidth=1.2, color=color, markersize=4,
                  **({} if key == "train/loss" else {"marker": "o", "linestyle": ":"}))
    axis.set(xlabel="optimizer step", ylabel="loss per token (nats)", title="Loss")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    common.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_flags(parser)
    # The paper's recipe, which names no weight decay: none.
    parser.set_defaults(epochs=2.0, batch_size=128, lr=1e-5, weight_decay=0.0, schedule="linear", warmup_ratio=0.03)
    add = parser.add_argument_group("DynamixSFT").add_argument
    add("--sampling", choices=["dynamix", "proportional", "uniform"], default="dynamix", help="proportional: every example exactly once an epoch (Full Coverage); uniform: every dataset equally often")
    add("--beta", type=common.non_negative_float, default=4.0, help="sharpness of the Boltzmann weights exp(beta · Q); the paper takes 4 for 1B and 5 for 8B models")
    add("--gamma", type=common.fraction, default=0.3, help="share of the draws that is spread evenly over the datasets")
    add("--alpha", type=common.fraction, default=0.95, help="how much of Q is kept at an update")
    add("--update_every", type=common.non_negative_int, default=50, metavar="STEPS", help="steps between updates of the mixture; 0 = never")
    add("--reward_batch_size", type=common.positive_int, default=16, metavar="EXAMPLES", help="examples of a dataset per virtual step: what an update costs (not in the paper)")
    add("--reward", choices=["loss", "entropy"], default="loss", help="relative drop of the loss, or of the entropy of the model's predictions (ablation)")
    add("--prior", action=argparse.BooleanOptionalAction, default=True, help="scale the weights by the datasets' original proportions (ablation: --no-prior)")
    add("--init", choices=["zero", "proportional"], default="zero", help="Q at the start; proportional, with --no-prior: so that the run starts at the proportions (ablation)")
    add("--lookahead", choices=["virtual", "first_order"], default="virtual", help="first_order: gradient times the optimizer's would-be update, no step and no second forward pass (not in the paper)")
    add("--reward_on", choices=["same", "fresh"], default="same", help="fresh: measure the loss drop on other examples of the dataset than those stepped on (not in the paper)")
    args = parser.parse_args(argv)
    if args.max_steps:
        args.epochs = None
    if args.init == "proportional" and (args.prior or not args.beta):
        parser.error("--init proportional goes with --no-prior and a positive --beta")
    if args.lookahead == "first_order" and args.reward == "entropy":
        parser.error("--lookahead first_order goes with --reward loss")
    return args


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    common.distributed_rank()
    device = common.pick_device()
    args.dtype = common.pick_dtype(args.dtype, device)

    # ---- data and model; nothing is written before all of it has been read
    datasets = common.load_data(args.data, args.source_column, args.seed)
    eval_rows = common.load_data(args.eval_data, seed=args.seed, split="eval")
    model, tokenizer = common.load_model(args.model, device, seed=args.seed, dtype=args.dtype, gradient_checkpointing=args.gradient_checkpointing,
                                         lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    common.check_head(model, device)
    common.describe_model(model, args.model, args.dtype)
    args.template = common.pick_template(args.template, tokenizer)
    args.max_length = min(args.max_length or 2048, common.max_positions(model))
    if args.lora_rank and not args.lora_alpha:
        args.lora_alpha = 2.0 * args.lora_rank
    arms = common.encode_datasets(datasets, tokenizer, args.template, args.max_length)
    eval_sets = {dataset.label: part for dataset, part in
                 zip(eval_rows, common.encode_datasets(eval_rows, tokenizer, args.template, args.max_length))}
    common.check_gradients(model, arms[0][0], device, args.dtype)
    labels, total = [dataset.label for dataset in datasets], sum(len(arm) for arm in arms)
    run = common.Run("dynamix_sft", args, data_fingerprint=common.fingerprint(datasets), eval_fingerprint=common.fingerprint(eval_rows),
                     datasets={label: len(arm) for label, arm in zip(labels, arms)})
    if run.finished:
        print(f"{run.folder} is finished: nothing to resume")
        return
    if args.show_batch:
        for label, arm in zip(labels, arms):
            print(f"dataset {label}")
            common.show_examples(arm, tokenizer, 1)

    steps_per_epoch = len(common.batch_sizes(total, args.batch_size))
    steps = common.total_steps(args, steps_per_epoch)
    micro = min(args.micro_batch_size, args.batch_size)
    print(f"train {steps} steps, {args.epochs or steps / steps_per_epoch:.3g} epochs; micro-batch {micro} x accumulation "
          f"{math.ceil(args.batch_size / micro)} x 1 rank = {args.batch_size} examples a step; {total:,} examples of {len(arms)} datasets")
    if args.sampling == "dynamix":
        updates = (steps - 1) // args.update_every if args.update_every else 0
        print(f"mix   {updates} updates of {len(arms)} x {args.reward_batch_size} examples" if updates else "mix   no update in this run: "
              f"--update_every {args.update_every} of {steps} steps")
    if eval_sets and not run.state:
        common.print_evaluation(evaluate(model, eval_sets, 0, args, run))
    counts, rows = train(model, arms, labels, steps, steps_per_epoch, args, run, run.state, eval_sets)
    result = evaluate(model, eval_sets, steps, args, run) if eval_sets else {}
    if result:
        common.print_evaluation(result)
    width = max(map(len, labels))
    for label, row in rows.items():
        print(f"mix   {label:<{width}}  p {row['probability']:.4f}  drawn {row['examples']:,} ({row['share']:.1%} of the examples, {row['token_share']:.1%} of the "
              f"tokens)  {row['passes']:.2f} passes  coverage {row['coverage']:.0%}")
    seconds = {name: run.time.get(name, 0.0) for name in ("train", "reward", "eval")}
    overhead = (seconds["train"] + seconds["reward"]) / seconds["train"]
    print(f"cost  train {seconds['train']:.1f} s + reward {seconds['reward']:.1f} s = {overhead:.3f} x static sampling; eval {seconds['eval']:.1f} s")
    run.save_model(model, tokenizer)
    records = run.metrics()
    with run.timer("figures"):
        plot_mixture(run.folder / "mixture.png", records, labels, steps)
        plot_coverage(run.folder / "coverage.png", rows)
        plot_loss(run.folder / "loss.png", records)
        if counts["updates"]:
            plot_rewards(run.folder / "rewards.png", records, labels)
    run.finish({"steps": counts["step"], "examples": counts["examples"], "tokens": counts["tokens"], "updates": counts["updates"], "eval": result,
                "mixture": rows, "overhead": overhead})


if __name__ == "__main__":
    main()

"""DynaMiCS (arXiv 2605.10770): fine-tuning under performance constraints with dynamic mixtures.

    python dynamics.py --model Qwen/Qwen2.5-3B --data numinamath code_feedback fineweb#20000 --eval_data math=gsm8k tinymmlu bbq.jsonl \\
        --targets math --constraints tinymmlu bbq --accuracy tinymmlu bbq                          # the paper's recipe
    python dynamics.py --data toy --eval_data toy --targets add sort --constraints copy compare --template plain --lr 1e-3 --max_steps 256
    python dynamics.py ... --mixture uniform --target_mass 0.5                                     # a fixed mixture, in the same loop

The method, as it stands below from top to bottom (METHODS.md is the description we worked from; we had no more of the paper):
  1  at each update step measure every domain's loss, then train c probing steps on each dataset alone from the same
     checkpoint: the slope matrix S says what a step on dataset j does to the loss of domain i
  2  predict the losses until the next update as linear in the mixture; solve for the mixture that lowers the targets while
     every constrained domain stays below its reference level
  3  train with that mixture until the next update; keep the best checkpoint on which all constraints hold
What the sources leave open, and what we chose: docs/dynamics.md.

Shapes: N fine-tuning datasets, M evaluation domains (targets and constraints), B examples of a batch, P parameters.
"""
from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.optimize import minimize
from tqdm import tqdm

import common
from common import UserError

# ----------------------------------------------------------------------------------------------------------------------
# The method: slopes and the mixture. Losses in the units of their metric: nats per response token, or 1 - accuracy.
# ----------------------------------------------------------------------------------------------------------------------


def slope_matrix(before, after, steps):
    """S_ij = (L_i(after c steps on dataset j alone) - L_i(before)) / c (METHODS.md 3, step 1).

    before (M,), after (M, N), steps = c -> (M, N) float64, loss per optimizer step. Raises ValueError for shapes that do
    not fit, c < 1 and losses that are not finite.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.ndim != 1 or after.ndim != 2 or len(before) != len(after) or steps < 1:
        raise ValueError(f"before {before.shape} and after {after.shape} must be (M,) and (M, N), steps {steps} at least 1")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a loss is not finite")
    return (after - before[:, None]) / steps


def gradient_slopes(domain_gradients, dataset_gradients, lr):
    """S_ij = -lr ∇L_i · ∇L_j: the change of L_i by one plain gradient step on dataset j, to first order (METHODS.md 3,
    baseline "gradient alignment"). M and N vectors (P,) of torch, float -> (M, N) float64."""
    return -lr * np.array([[torch.dot(own, other).item() for other in dataset_gradients] for own in domain_gradients], dtype=np.float64)


# A loss may exceed its level by this much and still counts as holding it: 0.01 % of a perplexity.
FEASIBILITY_TOLERANCE = 1e-4
# The grid of (λ, ε), in units that do not depend on the problem (see solve_mixture).
LAMBDAS = (1.0, 1e2, 1e4, 1e6)
EPSILONS = (0.0, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)
OPTIMALITY_GAP = 1e-2  # of the penalised problem, in spreads of the objective: above it other starts are tried


def solve_mixture(losses, slopes, reference, targets, constraints, horizon):
    """The mixture that lowers the targets most while the constrained domains are predicted to keep their levels
    (METHODS.md 3, step 2). Predicted is L^_i(w) = L_i + H (S w)_i; for each (λ, ε) of a grid the problem

        min_w  Σ_{i in T} (S w)_i  +  λ Σ_{i in C} max(0, L^_i(w) - L_ref_i + ε)²       w on the simplex

    is solved, and of the solutions that are predicted feasible (L^_i <= L_ref_i + FEASIBILITY_TOLERANCE for all i in C)
    the one with the best target objective is returned, or, if there is none, the one with the least Σ max(0, L^_i - L_ref_i)².

    losses (M,), slopes (M, N), reference (M,) (only its constrained entries are read), targets and constraints: lists of
    indices into M, horizon H >= 1 steps. Deterministic. -> weights (N,) float64 on the simplex and a dict: "feasible", "lambda",
    "epsilon" (both as in the equation), "predicted" (M,) L^, "objective" Σ_T (S w)_i, "violation" (per constraint, >= 0).
    Raises ValueError for shapes that do not fit and numbers that are not finite.

    The problem is convex, so one start would do; where the duality gap max_j ∇f·(w - e_j) shows that SLSQP stopped early, it
    starts again from the uniform mixture and from the best vertex. Scaling (the paper's is unknown): the objective is divided by
    its spread over the vertices and the constraints by the largest change H |S_ij| of a constrained loss, and the grid is in
    those units; so multiplying all losses or all slopes by a number changes nothing.
    """
    losses, slopes, reference = (np.asarray(array, dtype=np.float64) for array in (losses, slopes, reference))
    targets, constraints = np.asarray(targets, dtype=np.int64), np.asarray(constraints, dtype=np.int64)
    if slopes.ndim != 2 or losses.shape != slopes.shape[:1] or reference.shape != losses.shape or not slopes.shape[1] or horizon < 1:
        raise ValueError(f"losses {losses.shape}, slopes {slopes.shape} and reference {reference.shape} must be (M,), (M, N), (M,), horizon {horizon} >= 1")
    if not (np.isfinite(losses).all() and np.isfinite(slopes).all() and np.isfinite(reference[constraints]).all()):
        raise ValueError("a loss, slope or reference level is not finite")
    count = slopes.shape[1]
    objective = slopes[targets].sum(0)                                               # (N,) Σ_T S_ij
    change = horizon * slopes[constraints]                                           # (|C|, N) of the constrained losses
    excess = losses[constraints] - reference[constraints]                            # (|C|,) before the interval
    spread, scale = np.ptp(objective) or 1.0, np.abs(change).max(initial=0.0) or 1.0
    g, a, b = (objective - objective.min()) / spread, change / scale, excess / scale
    uniform, best = np.full(count, 1 / count), None
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}

    for epsilon in EPSILONS:
        w = uniform
        for lam in LAMBDAS:
            def penalised(w):
                violation = np.maximum(a @ w + b + epsilon, 0)                       # (|C|,)
                value, gradient = g @ w + lam * violation @ violation, g + 2 * lam * a.T @ violation
                return value / (1 + lam), gradient / (1 + lam)

            solutions = []
            vertex = np.eye(count)[np.argmin([penalised(corner)[0] for corner in np.eye(count)])]
            for start in (w, uniform, vertex):                                       # w: the solution for the smaller λ
                found = minimize(penalised, start, jac=True, method="SLSQP", bounds=[(0, 1)] * count, constraints=simplex,
                                 options={"ftol": 1e-12, "maxiter": 60}).x
                found = np.where(found > 1e-9, found, 0.0)                            # rounding of SLSQP; NaN becomes 0
                found = found / found.sum() if found.sum() > 0.5 else start
                value, gradient = penalised(found)
                solutions.append((value, len(solutions), found))
                if (gradient @ found - gradient.min()) * (1 + lam) < OPTIMALITY_GAP:
                    break
            w = min(solutions)[2]
            violation = np.maximum(change @ w + excess, 0)
            feasible = bool(violation.max(initial=0.0) <= FEASIBILITY_TOLERANCE)
            rank = (not feasible, objective @ w if feasible else violation @ violation)
            if best is None or rank < best[0]:
                best = rank, w, {"feasible": feasible, "lambda": lam * spread / scale ** 2, "epsilon": epsilon * scale,
                                 "predicted": losses + horizon * (slopes @ w), "objective": float(objective @ w), "violation": violation}
        if best[2]["feasible"]:                                                      # a larger ε only narrows the region
            break
    return best[1], best[2]


def damp(weights, previous, damping):
    """(1 - D) w* + D w_previous: against jumps from vertex to vertex of the simplex. Not in the paper; D = 0 is off."""
    return (1 - damping) * np.asarray(weights, dtype=np.float64) + damping * np.asarray(previous, dtype=np.float64)


def fixed_mixture(sizes, serves_target, rule, target_mass=None):
    """Baseline of fixed weights (METHODS.md 3): "uniform" or "proportional" to the datasets' sizes; with target_mass the
    datasets that serve a target share that much, by the same rule, and the others the rest.

    sizes (N,), serves_target (N,) bool -> (N,) float64. Raises ValueError where a part of the mass has no dataset to go to.
    """
    shares = np.ones(len(sizes)) if rule == "uniform" else np.asarray(sizes, dtype=np.float64)
    if target_mass is None:
        return shares / shares.sum()
    serves, weights = np.asarray(serves_target, dtype=bool), np.zeros(len(sizes))
    for part, mass in ((serves, target_mass), (~serves, 1 - target_mass)):
        if mass > 0 and not part.any():
            raise ValueError("no dataset serves a target" if part is serves else "all datasets serve a target")
        weights[part] = mass * shares[part] / max(shares[part].sum(), 1e-300)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# The method: when to update, at which learning rate to probe, on how many rows to measure
# ----------------------------------------------------------------------------------------------------------------------

EVEN_UPDATES = 6                                   # intervals without warm-up (the paper's number is not in our sources)
HALVINGS = {"none": 0, "light": 2, "dense": 4}     # the first interval is halved this often: H/4, H/4, H/2, H, ...


def update_steps(schedule, steps):
    """Steps at which the mixture is updated (METHODS.md 3, "Schedules"); the first is 0.

    none: every H = steps / EVEN_UPDATES steps. light, dense: also at H/2^k, k = HALVINGS .. 1, so that the first intervals
    grow geometrically from H/4 or H/16 to H. "STEP,STEP,...": these, and 0. Raises ValueError.
    """
    if schedule in HALVINGS:
        even = steps / EVEN_UPDATES
        points = [even / 2 ** k for k in range(HALVINGS[schedule], 0, -1)] + [even * k for k in range(EVEN_UPDATES)]
        return sorted({round(point) for point in points if round(point) < steps} | {0})
    try:
        points = sorted({int(point) for point in schedule.split(",")} | {0})
    except ValueError:
        raise ValueError(f"{schedule!r} is neither none, light, dense nor a list of steps like 0,50,200") from None
    if points[0] < 0 or points[-1] >= steps:
        raise ValueError(f"{schedule!r} has a step outside of 0 .. {steps - 1}")
    return points


def probe_rates(rates, probe_steps):
    """The probe is the coming interval in miniature: its step k uses the learning rate of the middle of the k-th c-th of the
    interval (our choice). So a probe in the learning-rate warm-up sees the rates that follow, not the first, near 0.
    rates (H,) of the interval's steps, c -> (c,)."""
    return [rates[int((k + 0.5) * len(rates) / probe_steps)] for k in range(probe_steps)]


FORWARD_SHARE = 0.4  # a forward pass costs a third to two fifths of a training step, by the token
COST_MARGIN = 0.9    # of the allowed extra cost is planned with
FEWEST_ROWS = 16


def affordable_rows(max_cost, steps, evaluations, updates, probe_steps, batch_size, lengths, probe_row, eval_row):
    """Validation rows per domain with which probing and evaluating cost at most about max_cost - 1 static runs (ours, counted in
    tokens): at each update a probe of probe_steps · batch_size examples on each dataset, followed by an evaluation of probe_row
    tokens (one row of every target and constraint, all choices), and `evaluations` of eval_row tokens. lengths (N,): mean tokens of
    each dataset's examples; the static run is taken to draw the shortest, since a mixture may. -> int, at least FEWEST_ROWS."""
    static = steps * batch_size * min(lengths)
    left = COST_MARGIN * (max_cost - 1) * static - updates * probe_steps * batch_size * sum(lengths)
    return max(FEWEST_ROWS, int(left / (FORWARD_SHARE * (updates * len(lengths) * probe_row + evaluations * eval_row))))


# ----------------------------------------------------------------------------------------------------------------------
# Domains: what is measured, on which rows, against which level
# ----------------------------------------------------------------------------------------------------------------------

VALIDATION_FRACTION = 0.5  # of an evaluation set decides, the rest reports
SPLIT_SEED = 0             # not --seed: runs of all seeds report on the same rows


@dataclass
class Domain:
    """One evaluation set. metric "nll": mean NLL per response token; "error": 1 - accuracy on multiple-choice rows."""
    label: str
    role: str              # "target", "constraint" or "watched" (reported only)
    metric: str
    validation: list       # Examples (error: of all choices, question after question)
    test: list             # Examples of the right answers
    test_choices: list     # error: Examples of all choices of the test rows
    sizes: dict            # error: {"validation": choices per question, "test": ...}
    answers: dict          # error: the right choice of each question


def prompt_of(row):
    """What may not be on both sides of a split: the prompt, or a plain text itself."""
    return (row.messages, row.input) if row.messages else row.response


def split_rows(rows, fraction, label):
    """Rows of an evaluation set -> (validation rows, test rows). The first `fraction` of the distinct prompts, in a random order
    that depends on label alone, decide; rows of the same prompt stay together. Raises UserError where a side stays empty."""
    prompts = list(dict.fromkeys(prompt_of(row) for row in rows))
    order = common.data_rng(SPLIT_SEED, f"split/{label}").permutation(len(prompts))
    place = {prompts[i]: at for at, i in enumerate(order)}
    cut = round(fraction * len(prompts))
    if not 0 < cut < len(prompts):
        raise UserError(f"evaluation set {label!r}: {len(prompts)} prompts cannot be split into validation and test rows by {fraction}")
    ranked = sorted(rows, key=lambda row: place[prompt_of(row)])
    return [row for row in ranked if place[prompt_of(row)] < cut], [row for row in ranked if place[prompt_of(row)] >= cut]


def choice_error(log_likelihoods, sizes, answers):
    """1 - accuracy: the share of questions whose right answer has not the highest log-likelihood (lm-eval's `acc`; of equal
    ones the first counts). log_likelihoods (all choices,), sizes (Q,) choices per question, answers (Q,) -> float."""
    parts = np.split(np.asarray(log_likelihoods), np.cumsum(sizes)[:-1])
    return 1 - float(np.mean([int(np.argmax(part)) == answer for part, answer in zip(parts, answers)]))


def measure(model, domains, args):
    """L_i of every domain on its validation rows, all in one pass over the examples sorted by length -> (len(domains),). In fp32
    whatever --dtype is: bf16 would round away much of what a few probing steps change."""
    examples = [example for domain in domains for example in domain.validation]
    nll, tokens, _ = common.score(model, examples, 2 * args.micro_batch_size, next(model.parameters()).device, "fp32")
    if not np.isfinite(nll).all():
        raise UserError("a validation loss is not finite: training diverged; lower --lr")
    losses, at = [], 0
    for domain in domains:
        part = slice(at, at + len(domain.validation))
        at = part.stop
        if domain.metric == "error":
            losses.append(choice_error(-nll[part], domain.sizes["validation"], domain.answers["validation"]))
        else:
            losses.append(nll[part].sum() / tokens[part].sum())
    return np.array(losses)


def report_test(model, domains, args):
    """Test rows -> {label: common.evaluate's numbers of the response, for "error" of the right answer, and "loss", the metric}."""
    device, size = next(model.parameters()).device, 2 * args.micro_batch_size
    result = common.evaluate(model, {domain.label: domain.test for domain in domains}, size, device, args.dtype)
    for domain in domains:
        row = result[domain.label]
        if domain.metric == "error":
            nll, _, _ = common.score(model, domain.test_choices, size, device, args.dtype)
            row["choice_accuracy"] = 1 - choice_error(-nll, domain.sizes["test"], domain.answers["test"])
        row["loss"] = 1 - row["choice_accuracy"] if domain.metric == "error" else row["nll"]
    return result


def parse_references(items, constraints):
    """--reference: LABEL=NUMBER, LABEL=+2% or FILE.json ({label: number or "+2%"}) -> {label: (number, is it relative)}.
    Raises UserError."""
    entries = []
    for item in items:
        label, equals, text = item.rpartition("=")
        if equals:
            entries.append((label, text))
            continue
        try:
            entries += json.loads(Path(item).read_text(encoding="utf-8")).items()
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--reference {item}: expected LABEL=NUMBER, LABEL=+2% or a JSON file of them ({error})") from None
    rules = {}
    for label, text in entries:
        match = re.fullmatch(r"(?P<slack>[+-]\d+(\.\d*)?)%|(?P<level>\d+(\.\d*)?([eE][+-]?\d+)?)", str(text).strip())
        if not match:
            raise UserError(f"--reference {label}={text}: expected a level like 1.25, or a slack like +2% of the loss before training")
        if label not in constraints:
            raise UserError(f"--reference {label}: is no constraint; constraints are {', '.join(constraints) or 'none'}")
        rules[label] = (float(match["slack"]) / 100, True) if match["slack"] else (float(match["level"]), False)
    return rules


def reference_levels(domains, before, rules):
    """L_ref per domain on the rows that `before` was measured on: the loss before training, unless a rule says otherwise."""
    levels = np.array(before, dtype=np.float64)
    for i, domain in enumerate(domains):
        value, relative = rules.get(domain.label, (0.0, True))
        levels[i] = levels[i] * (1 + value) if relative else value
    return levels


def violations(domains, losses, levels):
    """By how much each constrained domain is above its level -> {label: float > FEASIBILITY_TOLERANCE}; {} where all hold."""
    return {domain.label: float(loss - level) for domain, loss, level in zip(domains, losses, levels)
            if domain.role == "constraint" and loss - level > FEASIBILITY_TOLERANCE}


def target_total(domains, losses):
    return float(sum(loss for domain, loss in zip(domains, losses) if domain.role == "target"))


# ----------------------------------------------------------------------------------------------------------------------
# Training steps and probes
# ----------------------------------------------------------------------------------------------------------------------


def backward(model, batch, args):
    """Gradient of the mean NLL per response token of the whole batch, added up over micro-batches. -> (NLL sum, tokens)"""
    device, head = next(model.parameters()).device, common.output_head(model)
    tokens, total = sum(example.response_tokens for example in batch), 0.0
    for part in common.micro_batches(batch, [len(example.ids) for example in batch], args.micro_batch_size):
        micro = common.collate(part, device)
        with common.autocast(device, args.dtype):
            hidden = common.hidden_states(model, micro.ids)                           # (B, T, H)
        loss, _ = common.response_loss(micro.select(hidden), micro.targets, head)
        (loss / tokens).backward()
        total = total + loss.detach()
    return total, tokens


def probe_batches(examples, probe_steps, batch_size, seed, step, j):
    """c batches of dataset j alone for the probe at `step`: a stream of their own that the training's cursors never see.
    Each example at most once, unless the dataset has fewer than c · batch_size."""
    rng, need, order = common.data_rng(seed, "probe", step, j), probe_steps * batch_size, []
    while len(order) < need:
        order += rng.permutation(len(examples)).tolist()
    batches = common.length_grouped(np.array(order[:need]), np.array([len(example.ids) for example in examples]),
                                    [batch_size] * probe_steps, rng, window=probe_steps)
    return [[examples[i] for i in batch] for batch in batches]


def probe(model, optimizer, examples, domains, step, rates, args, run):
    """c steps on each dataset alone, all from this checkpoint and with the run's own optimizer state; everything is put back
    after each, bit for bit. rates (c,) -> losses after (M, N)."""
    after = np.zeros((len(domains), len(examples)))
    with run.timer("probe"):
        snapshot = common.Snapshot(model, optimizer)
    for j in tqdm(range(len(examples)), desc="probe", leave=False):
        with run.timer("probe"):
            for batch, rate in zip(probe_batches(examples[j], len(rates), args.batch_size, args.seed, step, j), rates):
                backward(model, batch, args)
                common.optimizer_step(model, optimizer, rate, args.max_grad_norm)
        with run.timer("eval"):
            after[:, j] = measure(model, domains, args)
        with run.timer("probe"):
            snapshot.restore()
    return after


def align(model, examples, domains, step, rates, args, run):
    """Gradient alignment instead of probing: gradients of each domain's validation loss and, on the batches that a probe would
    train on, of each dataset's -> slopes (M, N). Holds M + N gradients of P numbers."""
    def gradient(batch):
        backward(model, batch, args)
        parts = [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters() if p.requires_grad]
        model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    with run.timer("probe"):
        model.eval()                                                                 # no dropout, and the RNG stays as it was
        own = [gradient(domain.validation) for domain in domains]
        other = [gradient(sum(probe_batches(part, len(rates), args.batch_size, args.seed, step, j), [])) for j, part in enumerate(examples)]
        model.train()
        return gradient_slopes(own, other, float(np.mean(rates)))


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------

DRAW_AHEAD = 16  # batches drawn at once and sorted by length; never across an update


def train(model, tokenizer, labels, examples, domains, levels, before, fixed, steps, updates, args, run):
    """Train with the mixture of each interval. labels, examples: of the N datasets; domains: all, the M targets and constraints
    first; levels: their reference levels on validation rows; before: {"validation": losses, "test": report_test's} of the untrained
    model; fixed (N,): weights of a fixed mixture, or None. -> counts {"step", "examples", "tokens"}, the best feasible checkpoint
    {"step", "total", "losses"} or None"""
    pool = [example for part in examples for example in part]
    sampler = common.MixtureSampler([len(part) for part in examples], [len(example.ids) for example in pool], args.batch_size, args.seed)
    optimizer = common.make_optimizer(model, args.lr, args.weight_decay)
    torch.manual_seed(args.seed)
    decided = [domain for domain in domains if domain.role != "watched"]              # the M of the slope matrix
    roles = {role: [i for i, domain in enumerate(decided) if domain.role == role] for role in ("target", "constraint")}
    counts, window = {"step": 0, "examples": 0, "tokens": 0}, np.zeros(2)
    seen = np.zeros((2, len(labels)))                                                # examples and response tokens drawn per dataset
    base, queue, interval, best = np.array(before["validation"]), [], None, None
    weights = np.full(len(labels), 1 / len(labels)) if fixed is None else fixed      # what the first update is damped towards
    if run.state:
        state = run.state
        common.load_trainable_state(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        common.set_rng_state(state["rng"])
        counts, window, seen, weights = dict(state["counts"]), *(state[key].numpy().copy() for key in ("window", "seen", "weights"))
        queue, interval, best, sampler.drawn = state["queue"], state["interval"], state["best"], state["drawn"].numpy().copy()

    def rate(step):
        return common.learning_rate(step, steps, args.lr, args.schedule, args.warmup_ratio)

    model.train()
    bar = tqdm(total=steps, initial=counts["step"], desc="train", unit="step")
    while True:
        step, improved = counts["step"], False
        # ---- evaluate: at updates, every --eval_every steps and at the end
        if step in updates or step == steps or (args.eval_every and step % args.eval_every == 0):
            if step == 0:
                losses = base
            else:
                with run.timer("eval"):
                    losses = measure(model, domains, args)
            failed, total = violations(domains, losses, levels), target_total(domains, losses)
            feasible = not failed and total < target_total(domains, base)
            values = {f"eval/{domain.label}/{domain.metric}": float(loss) for domain, loss in zip(domains, losses)}
            values |= {"eval/target_total": total, "eval/violation": sum(failed.values()), "eval/feasible": int(feasible)}
            if interval and (step in updates or step == steps):                      # what has become of the last prediction
                values |= {f"update/{domain.label}/observed": float(loss) - earlier
                           for domain, loss, earlier in zip(decided, losses, interval["losses"])}
            verdict = "before training" if step == 0 else "feasible" if feasible else "not feasible: " + (
                ", ".join(f"{label} +{excess:.4f}" for label, excess in failed.items()) or "the targets did not fall")
            run.log(step, values, f"eval {step}/{steps}  targets {total:.4f}  {verdict}")
            # ---- Step 3, the choice: the best checkpoint on which all constraints hold and the target total fell
            if feasible and (best is None or total < best["total"]):
                best, improved = {"step": step, "total": total, "losses": losses.tolist()}, True
                with run.timer("save"):
                    run.save_model(model, tokenizer, "best")
        if step == steps:
            break
        # ---- update the mixture
        if step in updates:
            horizon = min([point for point in updates if point > step] + [steps]) - step
            losses, interval = losses[:len(decided)], {"step": step, "losses": losses[:len(decided)].tolist()}
            values, line = {}, f"update {step}/{steps}  {horizon} steps"
            if fixed is None:
                # ---- Step 1: the slope matrix
                rates = probe_rates([rate(step + k) for k in range(horizon)], args.probe_steps)
                if args.mixture == "gradient":
                    slopes = align(model, examples, decided, step, rates, args, run)
                else:
                    slopes = slope_matrix(losses, probe(model, optimizer, examples, decided, step, rates, args, run), args.probe_steps)
                # ---- Step 2: the mixture of the next interval
                with run.timer("probe"):
                    solution, info = solve_mixture(losses, slopes, levels[:len(decided)], roles["target"], roles["constraint"], horizon)
                weights = damp(solution, weights, args.damping)
                change = horizon * (slopes @ weights)
                values = {"update/feasible": int(not violations(decided, losses + change, levels)),
                          "update/lambda": info["lambda"], "update/epsilon": info["epsilon"]}
                values |= {f"update/{domain.label}/predicted": float(c) for domain, c in zip(decided, change)}
                values |= {f"slope/{domain.label}/{label}": float(slope) for domain, row in zip(decided, slopes) for label, slope in zip(labels, row)}
                line += f"  {'predicted feasible' if values['update/feasible'] else 'predicted infeasible'}  λ {info['lambda']:.2g}  ε {info['epsilon']:.2g}"
            run.log(step, {"update/horizon": horizon, **values, **{f"mixture/{label}": float(w) for label, w in zip(labels, weights)}},
                    line + "  " + "  ".join(f"{label} {w:.3f}" for label, w in zip(labels, weights)))
        # ---- Step 3: an optimizer step on a batch drawn by the mixture
        with run.timer("train"):
            if not queue:
                ahead = min([point for point in updates if point > step] + [steps, step + DRAW_AHEAD]) - step
                queue = [batch.tolist() for batch in sampler.batches(weights, step, ahead)]
            indices = queue.pop(0)
            batch = [pool[i] for i in indices]
            loss, tokens = backward(model, batch, args)
            grad_norm = common.optimizer_step(model, optimizer, rate(step), args.max_grad_norm)
            window += [loss.item(), tokens]
        for example in batch:
            seen[:, example.dataset] += 1, example.response_tokens
        counts = {"step": step + 1, "examples": counts["examples"] + len(batch), "tokens": counts["tokens"] + tokens}
        step += 1
        bar.update(1)
        if step % args.log_every == 0 or step in (1, steps):
            values = {"train/loss": window[0] / window[1], "train/lr": rate(step - 1), "train/grad_norm": grad_norm}
            line = "  ".join(f"{key.split('/')[1]} {value:.4g}" for key, value in values.items())
            for j, label in enumerate(labels):
                values |= {f"mixture/{label}": float(weights[j]), f"share/{label}": seen[0, j] / seen[0].sum(),
                           f"token_share/{label}": seen[1, j] / seen[1].sum(), f"passes/{label}": seen[0, j] / len(examples[j])}
            run.log(step, {"examples": counts["examples"], "tokens": counts["tokens"], **values}, f"train {step}/{steps}  {line}")
            window[:] = 0
        if step < steps and (improved or (args.save_every and step % args.save_every == 0)):
            with run.timer("save"):
                run.save_checkpoint({"counts": counts, "queue": queue, "interval": interval, "best": best, "before": before,
                                     **{key: torch.from_numpy(np.array(value)) for key, value in
                                        (("window", window), ("seen", seen), ("weights", weights), ("drawn", sampler.drawn))},
                                     "model": common.trainable_state(model), "optimizer": optimizer.state_dict()})
    bar.close()
    return counts, best


def load_best(model, folder):
    """Put the weights that save_model wrote to folder back into model, bit for bit."""
    if hasattr(model, "peft_config"):
        import peft
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
    else:
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        common.load_trainable_state(model, common.trainable_state(saved))


def final_report(domains, before, after, rules, best):
    """What the chosen checkpoint does on test rows (METHODS.md 3, "Metrics"). before, after: report_test's numbers.

    -> {"feasible": all constraints hold on the test rows, the target total fell there, and a feasible checkpoint was chosen on
    validation rows; "reduction_percent": 100 (1 - exp(mean over targets of the change of NLL)), 0 if infeasible;
    "unconstrained_reduction_percent": the same whether feasible or not; "targets", "constraints": per domain}
    """
    old, new = ([numbers[domain.label]["loss"] for domain in domains] for numbers in (before, after))
    levels = reference_levels(domains, old, rules)
    failed = violations(domains, new, levels)
    targets = [domain.label for domain in domains if domain.role == "target"]
    change = np.mean([after[label]["nll"] - before[label]["nll"] for label in targets])
    reduction = 100 * (1 - math.exp(min(change, 700.0)))
    feasible = best is not None and not failed and target_total(domains, new) < target_total(domains, old)
    return {"feasible": feasible, "feasible_on_validation": best is not None, "step": best and best["step"],
            "reduction_percent": reduction if feasible else 0.0, "unconstrained_reduction_percent": reduction,
            "targets": {domain.label: {"metric": domain.metric, "before": a, "after": b}
                        for domain, a, b in zip(domains, old, new) if domain.role == "target"},
            "constraints": {domain.label: {"metric": domain.metric, "before": a, "after": b, "reference": float(level),
                                           "violation": failed.get(domain.label, 0.0)}
                            for domain, a, b, level in zip(domains, old, new, levels) if domain.role == "constraint"}}


def print_report(report, cost):
    for label, row in report["targets"].items():
        print(f"test  target {label}: {row['metric']} {row['before']:.4f} -> {row['after']:.4f}")
    for label, row in report["constraints"].items():
        print(f"test  constraint {label}: {row['metric']} {row['before']:.4f} -> {row['after']:.4f}, level {row['reference']:.4f}: "
              + (f"fails by {row['violation']:.4f}" if row["violation"] else "holds"))
    where = f"checkpoint of step {report['step']}" if report["step"] is not None else "no checkpoint was feasible on validation rows, final/ is the last"
    print(f"test  {'feasible' if report['feasible'] else 'NOT feasible'} ({where}); target perplexity {-report['unconstrained_reduction_percent']:+.1f} % "
          f"(geometric mean), counts as a reduction of {report['reduction_percent']:.1f} %")
    print(f"cost  {cost['total']:.2f}x a static run: training 1 + probes {cost['probe']:.2f} + evaluation {cost['eval']:.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def series(records, key):
    """-> steps, values of a key of metrics.jsonl."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return tuple(np.array(column) for column in zip(*points)) if points else (np.array([]), np.array([]))


def plot_losses(path, records, domains, levels, updates, best):
    """Every domain's validation loss over the steps; a constraint with its reference line and the feasible region shaded, a target
    with its loss before training; dotted lines are updates, the star is the chosen checkpoint."""
    columns = min(4, len(domains))
    figure, axes = common.new_figure(columns, -(-len(domains) // columns), width=3.3, height=2.6)
    for axis in axes.flat[len(domains):]:
        axis.axis("off")
    for axis, domain, level in zip(axes.flat, domains, levels):
        steps, values = series(records, f"eval/{domain.label}/{domain.metric}")
        for step in updates[1:]:
            axis.axvline(step, color="0.8", linewidth=0.6, linestyle=":")
        color = {"target": "tab:blue", "constraint": "tab:orange", "watched": "0.4"}[domain.role]
        axis.plot(steps, values, color=color, marker="o", markersize=2.5, linewidth=1.3)
        if domain.role != "watched":
            axis.axhline(level if domain.role == "constraint" else values[0], color="black", linestyle="--", linewidth=0.9)
        low, high = axis.get_ylim()
        if domain.role == "constraint":
            axis.axhspan(low, level, color="tab:green", alpha=0.13, linewidth=0)
        axis.set_ylim(low, high)
        if best and best["step"] in steps:
            axis.plot(best["step"], values[steps == best["step"]][0], marker="*", markersize=9, color=color, markeredgecolor="black", markeredgewidth=0.5)
        axis.set_title(f"{domain.role} {domain.label}", fontsize=9)
        axis.set_ylabel("NLL (nats per token)" if domain.metric == "nll" else "1 − accuracy", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("optimizer step", fontsize=9)
    common.save_figure(figure, path)


def plot_weights(path, records, labels, steps):
    """The mixture over the steps, stacked; constant between updates."""
    figure, axes = common.new_figure(width=6.4, height=3.4)
    updates = [record for record in records if "update/horizon" in record]
    edges = [record["step"] for record in updates] + [steps]
    heights = np.array([[record[f"mixture/{label}"] for record in updates + updates[-1:]] for label in labels])
    from matplotlib import colormaps
    colors = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors
    axes[0, 0].stackplot(edges, heights, step="post", labels=labels, colors=colors, alpha=0.85)
    axes[0, 0].set(xlim=(0, steps), ylim=(0, 1), xlabel="optimizer step", ylabel="sampling weight", title="Mixture over time")
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    common.save_figure(figure, path)


FIGURE_PANELS = 8  # slope matrices shown, evenly spread over the updates


def plot_slopes(path, records, domains, labels):
    """The slope matrix at up to FIGURE_PANELS updates: change of each domain's loss per 1,000 steps on each dataset, blue falls. Every
    panel has its own scale, given in its title: slopes fall with the learning rate."""
    updates = [record for record in records if any(key.startswith("slope/") for key in record)]
    updates = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, min(FIGURE_PANELS, len(updates))).round().astype(int))]
    matrices = [1000 * np.array([[record[f"slope/{domain.label}/{label}"] for label in labels] for domain in domains]) for record in updates]
    columns = min(4, len(updates))
    figure, axes = common.new_figure(columns, -(-len(updates) // columns), width=1.3 + 0.42 * len(labels), height=1.2 + 0.3 * len(domains))
    for axis in axes.flat[len(updates):]:
        axis.axis("off")
    for at, (axis, record, matrix) in enumerate(zip(axes.flat, updates, matrices)):
        limit = max(np.abs(matrix).max(), 1e-9)
        image = axis.imshow(matrix / limit, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_title(f"step {record['step']}, scale ±{limit:.3g}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=7)
        names = [f"{domain.label} ({domain.role[0].upper()})" for domain in domains]
        axis.set_yticks(range(len(domains)), names if at % columns == 0 else [""] * len(domains), fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("loss change per 1,000 steps / scale", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("trained on", fontsize=9)
    figure.supylabel("measured on (T target, C constraint)", fontsize=9)
    common.save_figure(figure, path)


def plot_prediction(path, records, domains):
    """Predicted against observed change of each domain over each interval; a good linear model lies on the diagonal."""
    figure, axes = common.new_figure(width=5.6, height=4.2)
    axis, everything = axes[0, 0], []
    for number, domain in enumerate(domains):
        _, predicted = series(records, f"update/{domain.label}/predicted")
        _, observed = series(records, f"update/{domain.label}/observed")
        predicted = predicted[:len(observed)]
        everything += [predicted, observed]
        axis.scatter(predicted, observed, s=22, marker="o" if domain.role == "target" else "^", color=f"C{number % 10}",
                     alpha=0.8, label=f"{domain.role} {domain.label}", linewidths=0)
    values = np.abs(np.concatenate(everything))
    width = 1.3 * max(values.max(), 1e-6)
    linear = max(np.median(values), 1e-6)
    axis.plot([-width, width], [-width, width], color="black", linewidth=0.8, linestyle="--")
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    if width > 10 * linear:  # probes predict some changes far too large: equal room for small ones
        axis.set_xscale("symlog", linthresh=linear)
        axis.set_yscale("symlog", linthresh=linear)
    axis.set(xlim=(-width, width), ylim=(-width, width), xlabel="predicted change of loss until the next update", ylabel="observed change",
             title="How good the linear model is")
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    common.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------

DEFAULT_STEPS, DEFAULT_LORA_RANK = 2048, 32


def parse_args(argv=None):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   epilog=f"without --max_steps and --epochs: {DEFAULT_STEPS} steps; without --lora_rank: {DEFAULT_LORA_RANK}, and 0 for tiny")
    common.add_shared_flags(parser)
    # The paper's recipe (METHODS.md 3): 2,048 steps, batch 8, length 512, LoRA rank 32. Rate, decay and schedule are ours.
    parser.set_defaults(batch_size=8, max_length=512, lora_rank=None, lr=2e-4, weight_decay=0.0, schedule="cosine", warmup_ratio=0.03)
    add = parser.add_argument_group("DynaMiCS").add_argument
    add("--targets", nargs="+", default=[], metavar="LABEL", help="labels of --eval_data whose loss is to fall")
    add("--constraints", nargs="+", default=[], metavar="LABEL", help="labels of --eval_data whose loss must stay at or below its reference level")
    add("--accuracy", nargs="+", default=[], metavar="LABEL", help="labels of --eval_data measured by 1 - accuracy on multiple-choice rows instead of mean NLL")
    add("--reference", nargs="+", default=[], metavar="LEVEL", help="LABEL=1.25, LABEL=+2%% (of the loss before training) or FILE.json of them; default: the loss before training")
    add("--updates", default="light", metavar="none|light|dense|STEP,STEP,...", help="when the mixture is updated: evenly, with geometrically growing intervals first, or at these steps; always at 0")
    add("--probe_steps", type=common.positive_int, default=4, metavar="C", help="steps on each dataset alone that estimate its slopes (the paper's number is not in our sources)")
    add("--damping", type=common.fraction, default=0.0, metavar="D", help="keep this share of the previous mixture at an update, at first of the uniform one (not in the paper)")
    add("--mixture", default="dynamics", metavar="dynamics|gradient|uniform|proportional|FILE.json", help="gradient: slopes from gradient alignment; the others are fixed mixtures, a file is {training label: weight}")
    add("--target_mass", type=common.fraction, metavar="M", help="fixed mixtures: total weight of the training datasets that serve a target (the paper sweeps 0, 0.2, 0.5, 0.8, 1)")
    add("--target_data", nargs="+", default=[], metavar="LABEL", help="labels of --data that serve the targets; default: those that are also a target's label")
    add("--validation_fraction", type=common.fraction, default=VALIDATION_FRACTION, metavar="F", help="share of each evaluation set's prompts that decides (mixture, checkpoint); the others report, never the same rows")
    add("--max_cost", type=common.positive_float, default=1.4, metavar="X", help="planned cost in multiples of a static run: it sets the validation rows per domain (the paper reports 1.4 to 1.7)")
    add("--eval_limit", type=common.positive_int, metavar="N", help="validation rows per domain, instead of --max_cost")
    args = parser.parse_args(argv)
    if not (args.max_steps or args.epochs):
        args.max_steps = DEFAULT_STEPS
    if args.lora_rank is None:
        args.lora_rank = 0 if args.model == "tiny" else DEFAULT_LORA_RANK
    if not args.targets:
        parser.error("--targets: name at least one label of --eval_data")
    if args.max_cost <= 1:
        parser.error(f"--max_cost {args.max_cost:g}: a static run costs 1, so more than 1 is needed")
    if args.damping == 1:
        parser.error("--damping 1: the mixture would never change")
    fixed = args.mixture not in ("dynamics", "gradient")
    if fixed and args.mixture not in ("uniform", "proportional") and not args.mixture.endswith(".json"):
        parser.error(f"--mixture {args.mixture}: expected dynamics, gradient, uniform, proportional or a .json file")
    if args.target_mass is not None and args.mixture not in ("uniform", "proportional"):
        parser.error("--target_mass goes with --mixture uniform or proportional")
    if args.target_data and args.target_mass is None:
        parser.error("--target_data goes with --target_mass")
    if fixed and args.damping:
        parser.error("--damping goes with --mixture dynamics or gradient")
    return args


def check_labels(args, eval_labels, train_labels):
    """Every label that a flag names exists, and no domain is target and constraint at once."""
    for flag, labels, known, where in (("targets", args.targets, eval_labels, "eval_data"), ("constraints", args.constraints, eval_labels, "eval_data"),
                                       ("accuracy", args.accuracy, eval_labels, "eval_data"), ("target_data", args.target_data, train_labels, "data")):
        for label in labels:
            if label not in known:
                raise UserError(f"--{flag} {label}: no such label in --{where}; there are {', '.join(known) or 'none'}")
    both = set(args.targets) & set(args.constraints)
    if both:
        raise UserError(f"{sorted(both)[0]!r} is both in --targets and in --constraints")
    if args.mixture == "gradient" and set(args.accuracy) & {*args.targets, *args.constraints}:
        raise UserError("--mixture gradient needs differentiable metrics: a target or constraint in --accuracy has no gradient")


def read_fixed_mixture(args, labels, sizes):
    """Weights (N,) of a fixed --mixture; None for dynamics and gradient. Raises UserError."""
    if args.mixture in ("dynamics", "gradient"):
        return None
    if not args.mixture.endswith(".json"):
        serves = [label in (args.target_data or args.targets) for label in labels]
        try:
            return fixed_mixture(sizes, serves, args.mixture, args.target_mass)
        except ValueError as error:
            raise UserError(f"--target_mass {args.target_mass:g}: {error}; say with --target_data which labels of --data do") from None
    try:
        given = json.loads(Path(args.mixture).read_text(encoding="utf-8"))
        weights = np.array([float(given.pop(label)) for label in labels])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--mixture {args.mixture}: expected {{label: weight}} for {', '.join(labels)} ({type(error).__name__}: {error})") from None
    if given:
        raise UserError(f"--mixture {args.mixture}: {sorted(given)[0]!r} is no label of --data; there are {', '.join(labels)}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise UserError(f"--mixture {args.mixture}: weights must be at least 0, and not all 0")
    return weights / weights.sum()


def make_domain(dataset, args, tokenizer):
    """An evaluation set -> Domain with all its validation rows (cut to size later) and its test rows."""
    label = dataset.label
    role = "target" if label in args.targets else "constraint" if label in args.constraints else "watched"
    metric = "error" if label in args.accuracy else "nll"
    sides = dict(zip(("validation", "test"), split_rows(dataset.rows, args.validation_fraction, label)))
    encoded = {side: common.encode(rows, tokenizer, args.template, args.max_length)[0] for side, rows in sides.items()}
    questions = {side: [] for side in sides}
    if metric == "error":
        questions = {side: common.encode_choices(rows, tokenizer, args.template, args.max_length)[0] for side, rows in sides.items()}
    for side in sides:
        if not encoded[side] or (metric == "error" and not questions[side]):
            raise UserError(f"evaluation set {label!r}: no {side} row is left at --max_length {args.max_length}")
    answers = {side: [sides[side][question[0].row].answer for question in questions[side]] for side in sides}
    sizes = {side: [len(question) for question in questions[side]] for side in sides}
    kept = {side: len(questions[side] if metric == "error" else encoded[side]) for side in sides}
    left_out = sum(map(len, sides.values())) - sum(kept.values())
    print(f"data  {role} {label}: {kept['validation']:,} validation and {kept['test']:,} test {'questions' if metric == 'error' else 'examples'}, "
          + ("1 - accuracy" if metric == "error" else "mean NLL") + (f", left out {left_out:,} (too long, or no response)" if left_out else ""))
    flat = {side: [example for question in questions[side] for example in question] for side in sides}
    return Domain(label, role, metric, flat["validation"] if metric == "error" else encoded["validation"], encoded["test"], flat["test"], sizes, answers)


def cut_validation(domain, rows):
    """Keep the first `rows` validation rows (they are in random order) or questions, with all their choices."""
    if domain.metric == "error":
        domain.sizes["validation"], domain.answers["validation"] = domain.sizes["validation"][:rows], domain.answers["validation"][:rows]
        rows = sum(domain.sizes["validation"])
    domain.validation = domain.validation[:rows]


def row_tokens(domain):
    """Tokens of a validation row, all its choices together, on average."""
    total = sum(len(example.ids) for example in domain.validation)
    return total / (len(domain.sizes["validation"]) or len(domain.validation))


def check_eval_every(args):
    """--eval_every may change on --resume for a script that only logs; here evaluations choose the checkpoint."""
    folder = args.output_dir if args.resume is True else args.resume
    config = Path(folder or "", "config.json")
    if args.resume and config.is_file():
        old = json.loads(config.read_text(encoding="utf-8"))["flags"].get("eval_every")
        if old != args.eval_every:
            raise UserError(f"--resume: --eval_every was {old!r} and is now {args.eval_every!r}; evaluations choose the checkpoint, give the flags of the first start")


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    common.distributed_rank()
    device = common.pick_device()
    args.dtype = common.pick_dtype(args.dtype, device)

    # ---- data and model; nothing is written before all of it has been read
    datasets = common.load_data(args.data, args.source_column, args.seed)
    eval_rows = common.load_data(args.eval_data, seed=args.seed, split="eval")
    labels = [dataset.label for dataset in datasets]
    check_labels(args, [dataset.label for dataset in eval_rows], labels)
    rules = parse_references(args.reference, args.constraints)
    check_eval_every(args)
    model, tokenizer = common.load_model(args.model, device, seed=args.seed, dtype=args.dtype, gradient_checkpointing=args.gradient_checkpointing,
                                         lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    common.check_head(model, device)
    common.describe_model(model, args.model, args.dtype)
    args.template = common.pick_template(args.template, tokenizer)
    args.max_length = min(args.max_length, common.max_positions(model))
    if args.lora_rank and not args.lora_alpha:
        args.lora_alpha = 2.0 * args.lora_rank
    examples = common.encode_datasets(datasets, tokenizer, args.template, args.max_length)
    sizes = [len(part) for part in examples]
    fixed = read_fixed_mixture(args, labels, sizes)
    domains = sorted((make_domain(dataset, args, tokenizer) for dataset in eval_rows), key=lambda domain: ("target", "constraint", "watched").index(domain.role))
    decided = [domain for domain in domains if domain.role != "watched"]
    trained_on = {prompt_of(row) for dataset in datasets for row in dataset.rows}
    for dataset in eval_rows:
        shared = sum(prompt_of(row) in trained_on for row in dataset.rows)
        if shared:
            print(f"warning: {shared:,} of {len(dataset.rows):,} rows of evaluation set {dataset.label!r} have a prompt that is trained on")
    steps = common.total_steps(args, math.ceil(sum(sizes) / args.batch_size))
    try:
        updates = update_steps(args.updates, steps)
    except ValueError as error:
        raise UserError(f"--updates {error}") from None

    # ---- how many validation rows decide: the same for every --mixture, so that all choose on the same rows
    evaluations = len({*updates, steps, *(range(0, steps, args.eval_every) if args.eval_every else ())})
    rows = args.eval_limit or affordable_rows(
        args.max_cost, steps, evaluations, len(updates), args.probe_steps, args.batch_size,
        [float(np.mean([len(example.ids) for example in part])) for part in examples],
        sum(row_tokens(domain) for domain in decided), sum(row_tokens(domain) for domain in domains))
    for domain in domains:
        cut_validation(domain, rows)
    common.check_gradients(model, examples[0][0], device, args.dtype)
    run = common.Run("dynamics", args, data_fingerprint=common.fingerprint(datasets), eval_fingerprint=common.fingerprint(eval_rows),
                     datasets={dataset.label: len(dataset.rows) for dataset in datasets}, update_steps=updates, validation_rows=rows)
    if run.finished:
        print(f"{run.folder} is finished: nothing to resume")
        return
    if args.show_batch:
        common.show_examples([example for part in examples for example in part[:2]], tokenizer, count=2 * len(examples))
    micro = min(args.micro_batch_size, args.batch_size)
    print(f"train {steps} steps; micro-batch {micro} x accumulation {math.ceil(args.batch_size / micro)} x 1 rank = {args.batch_size} examples a step")
    print(f"train updates at steps {', '.join(map(str, updates))}; up to {rows} validation rows a domain decide"
          + (f"; {args.probe_steps} probe steps on each of {len(labels)} datasets" if args.mixture == "dynamics" else ""))
    if rows == FEWEST_ROWS and not args.eval_limit:
        print(f"warning: at these steps, datasets and domains --max_cost {args.max_cost:g} is too little for {FEWEST_ROWS} validation rows a domain")

    # ---- before training: base model on validation and on test rows
    if run.state:
        before = run.state["before"]
    else:
        with run.timer("eval"):
            before = {"validation": measure(model, domains, args).tolist()}
        with run.timer("test"):
            before["test"] = report_test(model, domains, args)
        run.log(0, {f"test/{label}/{key}": value for label, row in before["test"].items() for key, value in row.items()})
    levels = reference_levels(domains, before["validation"], rules)
    counts, best = train(model, tokenizer, labels, examples, domains, levels, before, fixed, steps, updates, args, run)

    # ---- the choice, on test rows. final/ is the best feasible checkpoint, or the last one where none was feasible.
    if best:
        load_best(model, run.folder / "best")
    with run.timer("test"):
        after = report_test(model, domains, args)
    run.log(counts["step"], {f"test/{label}/{key}": value for label, row in after.items() for key, value in row.items()})
    with run.timer("save"):
        run.save_model(model, tokenizer)
    report = final_report(domains, before["test"], after, rules, best)
    cost = {part: run.time.get(part, 0.0) / run.time["train"] for part in ("probe", "eval")}
    cost["total"] = 1 + sum(cost.values())
    with run.timer("figures"):
        records = run.metrics()
        plot_losses(run.folder / "losses.png", records, domains, levels, updates, best)
        plot_weights(run.folder / "weights.png", records, labels, steps)
        if fixed is None:
            plot_slopes(run.folder / "slopes.png", records, decided, labels)
            plot_prediction(run.folder / "prediction.png", records, decided)
    common.print_evaluation(after)
    print_report(report, cost)
    run.finish({"steps": counts["step"], "examples": counts["examples"], "tokens": counts["tokens"], "eval": after, "eval_before": before["test"],
                "validation": {"before": dict(zip((d.label for d in domains), before["validation"])), "chosen": best and
                               {"step": best["step"], **dict(zip((d.label for d in domains), best["losses"]))},
                               "levels": {d.label: float(level) for d, level in zip(domains, levels) if d.role == "constraint"}},
                "report": report, "cost": cost})


if __name__ == "__main__":
    main()

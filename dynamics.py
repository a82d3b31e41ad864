"""DynaMiCS (arXiv 2605.10770): fine-tuning under performance constraints with dynamic mixtures.

    python dynamics.py --model Qwen/Qwen2.5-3B --data numinamath code_feedback fineweb#20000 \\
        --eval_data math=gsm8k tinymmlu bbq.jsonl --targets math --constraints tinymmlu bbq \\
        --accuracy tinymmlu bbq                                             # the paper's recipe
    python dynamics.py --data toy --eval_data toy --targets add sort --constraints copy compare \\
        --template plain --lr 1e-3 --max_steps 256                          # tiny model, minutes
    python dynamics.py ... --mixture uniform --target_mass 0.5              # a fixed mixture

The method, as it stands below from top to bottom (docs/dynamics.md, The method: we had no more of
the paper than its summaries):
  Step 1  at each update measure every domain's loss, then train c probing steps on each dataset
          alone from the same checkpoint: the slope matrix S says what a step on dataset j does to
          the loss of domain i
  Step 2  predict the losses until the next update as linear in the mixture; solve for the mixture
          that lowers the targets while every constrained domain stays below its reference level
  Step 3  train with that mixture until the next update; keep the best checkpoint on which all
          constraints hold
What the sources leave open, and what we chose: docs/dynamics.md.

Shapes: N fine-tuning datasets, M evaluation domains (targets and constraints), B examples of a
batch, P parameters, H steps of an interval, c probing steps.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import plots
import prepare
import ranks
from data import Example, Examples, UserError, data_rng


# ---- Step 1: slopes. Losses in the units of their metric: nats per response token, or 1 - accuracy
def slope_matrix(before, after, steps: int) -> np.ndarray:
    """S_ij = (L_i(after c steps on dataset j alone) - L_i(before)) / c (step 1).

    before (M,), after (M, N), steps = c -> (M, N) float64, loss per optimizer step. Raises
    ValueError for shapes that do not fit, c < 1 and losses that are not finite."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.ndim != 1 or after.ndim != 2 or len(before) != len(after) or steps < 1:
        shapes = f"before {before.shape} and after {after.shape} must be (M,) and (M, N)"
        raise ValueError(f"{shapes}, steps {steps} at least 1")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a loss is not finite")
    return (after - before[:, None]) / steps


def gradient_slopes(domain_gradients, dataset_gradients, lr: float) -> np.ndarray:
    """S_ij = -lr ∇L_i · ∇L_j: the change of L_i by one plain gradient step on dataset j, to first
    order (baseline "gradient alignment"). M and N vectors (P,) -> (M, N) float64."""
    rows = []
    for own in domain_gradients:
        rows.append([torch.dot(own, other).item() for other in dataset_gradients])
    return -lr * np.array(rows, dtype=np.float64)


# ---- Step 2: the mixture -------------------------------------------------------------------------

# A loss may exceed its level by this much and still holds it: 0.01 % of a perplexity.
FEASIBILITY_TOLERANCE = 1e-4
# The grid of (λ, ε), in units of the problem (see solve_mixture).
LAMBDAS = (1.0, 1e2, 1e4, 1e6)
EPSILONS = (0.0, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)
OPTIMALITY_GAP = 1e-2  # of the penalised problem, in spreads of the objective: else another start


def penalised(w, objective, change, excess, epsilon: float, lam: float):
    """g·w + λ Σ_i max(0, (a w)_i + b_i + ε)² and its gradient, both divided by 1 + λ.
    w (N,), objective g (N,), change a (|C|, N), excess b (|C|,) -> float, (N,)"""
    violation = np.maximum(change @ w + excess + epsilon, 0)
    value = objective @ w + lam * violation @ violation
    gradient = objective + 2 * lam * change.T @ violation
    return value / (1 + lam), gradient / (1 + lam)


def minimise_on_simplex(function, start: np.ndarray, gap: float) -> np.ndarray:
    """w on the simplex that minimises a convex function (w -> value, gradient). One start would do;
    where the duality gap max_j ∇f·(w - e_j) shows that SLSQP stopped early, it starts again from
    the uniform mixture and from the best vertex. -> (N,)"""
    from scipy.optimize import minimize

    corners = np.eye(len(start))
    vertex = corners[np.argmin([function(corner)[0] for corner in corners])]
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    bounds, options = [(0, 1)] * len(start), {"ftol": 1e-12, "maxiter": 60}
    problem = {"jac": True, "method": "SLSQP", "bounds": bounds, "constraints": simplex}
    solutions = []
    for number, first in enumerate((start, np.full(len(start), 1 / len(start)), vertex)):
        found = minimize(function, first, options=options, **problem).x
        found = np.where(found > 1e-9, found, 0.0)  # rounding of SLSQP; NaN becomes 0
        found = found / found.sum() if found.sum() > 0.5 else first
        value, gradient = function(found)
        solutions.append((value, number, found))
        if gradient @ found - gradient.min() < gap:
            break
    return min(solutions)[2]


def solve_mixture(losses, slopes, reference, targets, constraints, horizon: int):
    """The mixture that lowers the targets most while the constrained domains are predicted to keep
    their levels (step 2). Predicted is L^_i(w) = L_i + H (S w)_i; for each (λ, ε) of a grid

        min_w  Σ_{i in T} (S w)_i  +  λ Σ_{i in C} max(0, L^_i(w) - L_ref_i + ε)²   w on the simplex

    is solved. Of the solutions that are predicted feasible (L^_i <= L_ref_i + FEASIBILITY_TOLERANCE
    for all i in C) the one with the best target objective is returned; if there is none, the one
    with the least Σ max(0, L^_i - L_ref_i)².

    losses (M,), slopes (M, N), reference (M,) (only its constrained entries are read), targets and
    constraints: lists of indices into M, horizon H >= 1 steps. Deterministic. -> weights (N,) on
    the simplex and a dict: "feasible", "lambda", "epsilon" (both as in the equation), "predicted"
    (M,) L^, "objective" Σ_T (S w)_i, "violation" (per constraint, >= 0). Raises ValueError for
    shapes that do not fit and numbers that are not finite.

    The grid is in units of the problem (the paper's is unknown): the objective is divided by its
    spread over the vertices, the constraints by the largest change H |S_ij| of a constrained loss.
    So the targets' slopes may have any scale, and only H S counts, not H. The constrained losses
    may not: FEASIBILITY_TOLERANCE is in their units, and what changes by less holds its level."""
    losses, slopes = np.asarray(losses, dtype=np.float64), np.asarray(slopes, dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    targets, constraints = np.array(targets, dtype=np.int64), np.array(constraints, dtype=np.int64)
    fits = slopes.ndim == 2 and losses.shape == reference.shape == slopes.shape[:1]
    if not fits or not slopes.shape[1] or horizon < 1:
        shapes = f"losses {losses.shape}, slopes {slopes.shape}, reference {reference.shape}"
        raise ValueError(f"{shapes} must be (M,), (M, N), (M,), horizon {horizon} >= 1")
    if not np.isfinite([*losses, *slopes.flat, *reference[constraints]]).all():
        raise ValueError("a loss, slope or reference level is not finite")
    objective = slopes[targets].sum(0)  # (N,) Σ_T S_ij
    change = horizon * slopes[constraints]  # (|C|, N) of the constrained losses
    excess = losses[constraints] - reference[constraints]  # (|C|,) before the interval
    spread, scale = np.ptp(objective) or 1.0, np.abs(change).max(initial=0.0) or 1.0
    scaled = {"change": change / scale, "excess": excess / scale}
    scaled["objective"] = (objective - objective.min()) / spread
    best = None
    for epsilon in EPSILONS:
        w = np.full(slopes.shape[1], 1 / slopes.shape[1])
        for lam in LAMBDAS:  # w: from the solution for the smaller λ
            problem = partial(penalised, **scaled, epsilon=epsilon, lam=lam)
            w = minimise_on_simplex(problem, w, OPTIMALITY_GAP / (1 + lam))
            violation = np.maximum(change @ w + excess, 0)
            feasible = bool(violation.max(initial=0.0) <= FEASIBILITY_TOLERANCE)
            rank = (not feasible, objective @ w if feasible else violation @ violation)
            if best is None or rank < best[0]:
                info = {"feasible": feasible, "objective": float(objective @ w)}
                info |= {"lambda": lam * spread / scale**2, "epsilon": epsilon * scale}
                info |= {"predicted": losses + horizon * (slopes @ w), "violation": violation}
                best = rank, w, info
        if best[2]["feasible"]:  # a larger ε only narrows the region
            break
    return best[1], best[2]


def damp(weights, previous, damping: float) -> np.ndarray:
    """(1 - D) w* + D w_previous: against jumps from vertex to vertex of the simplex. Not in the
    paper; D = 0 is off."""
    weights, previous = np.asarray(weights, dtype=np.float64), np.asarray(previous, np.float64)
    return (1 - damping) * weights + damping * previous


def fixed_mixture(sizes, serves_target, rule: str, target_mass: float | None = None) -> np.ndarray:
    """Baseline of fixed weights: "uniform" or "proportional" to the datasets' sizes; with
    target_mass the datasets that serve a target share that much, by the same rule, the others the
    rest.

    sizes (N,), serves_target (N,) bool -> (N,) float64. Raises ValueError where a part of the mass
    has no dataset to go to."""
    shares = np.ones(len(sizes)) if rule == "uniform" else np.asarray(sizes, dtype=np.float64)
    if target_mass is None:
        return shares / shares.sum()
    serves, weights = np.asarray(serves_target, dtype=bool), np.zeros(len(sizes))
    for part, mass in ((serves, target_mass), (~serves, 1 - target_mass)):
        if mass > 0 and not part.any():
            problem = "no dataset serves" if part is serves else "all datasets serve"
            raise ValueError(f"{problem} a target")
        weights[part] = mass * shares[part] / max(shares[part].sum(), 1e-300)
    return weights


# ---- When to update, at which learning rate to probe, on how many rows to measure ----------------

EVEN_UPDATES = 6  # intervals without warm-up (the paper's number is not in our sources)
HALVINGS = {"none": 0, "light": 2, "dense": 4}  # of the first interval: H/4, H/4, H/2, H, ...


def update_steps(schedule: str, steps: int) -> list[int]:
    """Steps at which the mixture is updated; the first is 0.

    none: every H = steps / EVEN_UPDATES steps. light, dense: also at H/2^k, k = HALVINGS .. 1, so
    that the first intervals grow geometrically from H/4 or H/16 to H. "STEP,STEP,...": these, and
    0. Raises ValueError."""
    if schedule in HALVINGS:
        even = steps / EVEN_UPDATES
        points = [even / 2**k for k in range(HALVINGS[schedule], 0, -1)]
        points += [even * k for k in range(EVEN_UPDATES)]
        return sorted({round(point) for point in points if round(point) < steps} | {0})
    try:
        points = sorted({int(point) for point in schedule.split(",")} | {0})
    except ValueError:
        forms = "none, light, dense nor a list of steps like 0,50,200"
        raise ValueError(f"{schedule[:60]!r} is neither {forms}") from None
    if points[0] < 0 or points[-1] >= steps:
        raise ValueError(f"{schedule[:60]!r} has a step outside of 0 .. {steps - 1}")
    return points


def probe_rates(rates: list[float], probe_steps: int) -> list[float]:
    """The probe is the coming interval in miniature: its step k uses the learning rate of the
    middle of the k-th c-th of the interval (our choice). So a probe in the warm-up sees the rates
    that follow, not the first, near 0. rates (H,) of the interval's steps, c -> (c,)."""
    return [rates[int((k + 0.5) * len(rates) / probe_steps)] for k in range(probe_steps)]


FORWARD_SHARE = 0.4  # a forward pass costs a third to two fifths of a training step, by the token
COST_MARGIN = 0.9  # of the allowed extra cost is planned with
FEWEST_ROWS = 16


def affordable_rows(args: Namespace, steps: int, evaluations: int, updates: int, lengths, tokens):
    """Validation rows per domain with which probing and evaluating cost at most about
    --max_cost - 1 static runs (ours, counted in tokens).

    At each update --probe_steps batches are trained on for each dataset, followed by an evaluation
    of tokens[0] tokens a row (of every target and constraint, all choices), and `evaluations` of
    tokens[1]. lengths (N,): mean tokens of each dataset's examples; the static run is taken to draw
    the shortest, since a mixture may. -> int, at least FEWEST_ROWS."""
    static = steps * args.batch_size * min(lengths)
    probing = updates * args.probe_steps * args.batch_size * sum(lengths)
    left = COST_MARGIN * (args.max_cost - 1) * static - probing
    row = updates * len(lengths) * tokens[0] + evaluations * tokens[1]
    return max(FEWEST_ROWS, int(left / (FORWARD_SHARE * row)))


# ---- Domains: what is measured, on which rows, against which level -------------------------------

VALIDATION_FRACTION = 0.5  # of an evaluation set decides, the rest reports
SPLIT_SEED = 0  # not --seed: runs of all seeds report on the same rows


@dataclass
class Side:
    """The validation or the test rows of a domain. Under the metric "error" examples holds all
    choices, question after question."""

    examples: list[Example]
    sizes: list[int]  # choices of each question
    answers: list[int]  # the right choice of each question
    responses: list[Example]  # the rows' responses, under "error" the right answers

    def loss(self, metric: str, nll: np.ndarray, tokens: np.ndarray) -> float:
        """The domain's loss of examples' summed NLL and response tokens, both (n,)."""
        if metric == "error":
            return choice_error(-nll, self.sizes, self.answers)
        return nll.sum() / tokens.sum()


@dataclass
class Domain:
    """One evaluation set. metric "nll": mean NLL per response token; "error": 1 - accuracy on
    multiple-choice rows."""

    label: str
    role: str  # "target", "constraint" or "monitored" (reported only)
    metric: str
    validation: Side
    test: Side
    test_rows: list[dict] = field(default_factory=list)  # which ones they are (list_rows)


ROLES = ("target", "constraint", "monitored")


def split_rows(rows: list[data.Row], fraction: float, label: str) -> tuple[list, list]:
    """Rows of an evaluation set -> (validation rows, test rows). The first `fraction` of the
    distinct prompts, in a random order that depends on label alone, decide; rows of the same prompt
    stay together. Raises UserError where a side stays empty."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    order = data_rng(SPLIT_SEED, f"split/{label}").permutation(len(prompts))
    place = {prompts[i]: at for at, i in enumerate(order)}
    cut = round(fraction * len(prompts))
    if not 0 < cut < len(prompts):
        problem = f"{len(prompts)} prompts cannot be split into validation and test rows"
        raise UserError(f"evaluation set {label!r}: {problem} by {fraction}")
    ranked = sorted(rows, key=lambda row: place[row.prompt])
    first = sum(place[row.prompt] < cut for row in rows)
    return ranked[:first], ranked[first:]


def choice_error(log_likelihoods, sizes, answers) -> float:
    """1 - accuracy: the share of questions whose right answer has not the highest log-likelihood
    (lm-eval's `acc`; of equal ones the first counts). log_likelihoods (all choices,), sizes (Q,)
    choices per question, answers (Q,)."""
    parts = np.split(np.asarray(log_likelihoods), np.cumsum(sizes)[:-1])
    right = [int(np.argmax(part)) == answer for part, answer in zip(parts, answers)]
    return 1 - float(np.mean(right))


def validation_losses(model, domains: list[Domain], args: Namespace) -> np.ndarray:
    """L_i of every domain on its validation rows, all in one pass over the examples sorted by
    length -> (len(domains),). In fp32 whatever --dtype is: bf16 would round away much of what a few
    probing steps change. Raises UserError where one is not finite."""
    examples = [example for domain in domains for example in domain.validation.examples]
    nll, tokens, _ = common.score(model, examples, 2 * args.micro_batch_size, "fp32")
    if not np.isfinite(nll).all():
        raise UserError("a validation loss is not finite: training diverged; lower --lr")
    losses, at = [], 0
    for domain in domains:
        part = slice(at, at + len(domain.validation.examples))
        losses.append(domain.validation.loss(domain.metric, nll[part], tokens[part]))
        at = part.stop
    return np.array(losses)


def report_test(model, domains: list[Domain], args: Namespace) -> dict[str, dict]:
    """Test rows -> {label: common.evaluate's numbers of the response, under "error" of the right
    answer, and "loss", the metric}."""
    size, sets = 2 * args.micro_batch_size, {d.label: d.test.responses for d in domains}
    result = common.evaluate(model, sets, size, args.dtype)
    for domain in domains:
        row = result[domain.label]
        row["loss"] = row["nll"]
        if domain.metric == "error":
            scores = common.score(model, domain.test.examples, size, args.dtype)
            row["choice_accuracy"] = 1 - domain.test.loss("error", *scores[:2])
            row["loss"] = 1 - row["choice_accuracy"]
    return result


def parse_references(items: list[str], constraints: list[str]) -> dict[str, tuple[float, bool]]:
    """--reference: LABEL=NUMBER, LABEL=+2% or FILE.json ({label: number or "+2%"})
    -> {label: (number, is it relative)}. Raises UserError."""
    entries = []
    for item in items:
        label, equals, text = item.rpartition("=")
        forms = "LABEL=NUMBER, LABEL=+2% or a JSON file of them"
        entries += (
            [(label, text)] if equals else common.read_json(item, "--reference", forms).items()
        )
    rules = {}
    for label, text in entries:
        slack = re.fullmatch(r"([+-]\d+(\.\d*)?)%", str(text).strip())
        level = re.fullmatch(r"\d+(\.\d*)?([eE][+-]?\d+)?", str(text).strip())
        if not slack and not level:
            problem = "expected a level like 1.25, or a slack like +2% of the loss before training"
            raise UserError(f"--reference {label}={text}: {problem}")
        if label not in constraints:
            known = ", ".join(constraints) or "none"
            raise UserError(f"--reference {label}: is no constraint; constraints are {known}")
        rules[label] = (float(slack[1]) / 100, True) if slack else (float(level[0]), False)
        if not abs(rules[label][0]) <= common.MOST:
            problem = f"is too large, at most {common.MOST:,} is taken"
            raise UserError(f"--reference {label}={str(text)[:40]}: {problem}")
    return rules


def reference_levels(domains: list[Domain], before, rules: dict) -> np.ndarray:
    """L_ref of each domain on the rows that `before` was measured on: the loss before training,
    unless a rule says otherwise."""
    levels = np.array(before, dtype=np.float64)
    for i, domain in enumerate(domains):
        value, relative = rules.get(domain.label, (0.0, True))
        levels[i] = levels[i] * (1 + value) if relative else value
    return levels


def violations(domains: list[Domain], losses, reference) -> dict[str, float]:
    """By how much each constrained domain is above its level, where by more than
    FEASIBILITY_TOLERANCE; {} where all hold."""
    result = {}
    for domain, loss, level in zip(domains, losses, reference):
        if domain.role == "constraint" and loss - level > FEASIBILITY_TOLERANCE:
            result[domain.label] = float(loss - level)
    return result


def target_total(domains: list[Domain], losses) -> float:
    pairs = zip(domains, losses)
    return float(sum(loss for domain, loss in pairs if domain.role == "target"))


# ---- Step 1 of a run: probes ---------------------------------------------------------------------
@dataclass
class Problem:
    """What a run is given."""

    labels: list[str]  # of the N training datasets
    examples: list[Examples]  # of each of them
    domains: list[Domain]  # all, the M targets and constraints first
    steps: int
    updates: list[int]  # steps at which the mixture is updated
    fixed: np.ndarray | None  # (N,) weights of a fixed mixture
    rows: int = 0  # validation rows of a domain that decide
    before: np.ndarray | None = None  # validation losses of all domains before training
    test: dict | None = None  # report_test's numbers before training
    reference: np.ndarray | None = None  # reference levels of all domains on validation rows

    @property
    def decided(self) -> list[Domain]:
        """The M domains of the slope matrix."""
        return [domain for domain in self.domains if domain.role != "monitored"]


@dataclass
class Interval:
    """The H steps from one update to the next."""

    step: int
    rates: list[float]  # (H,) learning rates
    losses: np.ndarray  # (M,) before it
    mixture: np.ndarray | None = None  # (N,) in force before it


def probe_batches(
    examples: Examples, probe_steps: int, batch_size: int, seed: int, step: int, j: int
):
    """c batches of dataset j alone for the probe at `step`: a stream of their own that the
    training's cursors never see. Each example at most once, unless there are fewer than
    c · batch_size."""
    rng, need, order = data_rng(seed, "probe", step, j), probe_steps * batch_size, []
    while len(order) < need:
        order += rng.permutation(len(examples)).tolist()
    drawn = [examples[i] for i in order[:need]]
    return [drawn[at : at + batch_size] for at in range(0, need, batch_size)]


def probe(model, optimizer, problem: Problem, interval: Interval, args, run) -> np.ndarray:
    """c steps on each dataset alone, all from this checkpoint and with the run's own optimizer
    state; everything is put back after each, bit for bit. -> losses after (M, N)"""
    rates = probe_rates(interval.rates, args.probe_steps)
    after = np.zeros((len(problem.decided), len(problem.examples)))
    with run.timer("probe"):
        snapshot = common.Snapshot(model, optimizer)
    for j, examples in enumerate(tqdm(problem.examples, desc="probe", leave=False)):
        options = len(rates), args.batch_size, args.seed, interval.step, j
        with run.timer("probe"):
            for batch, rate in zip(probe_batches(examples, *options), rates):
                common.backward(model, batch, args)
                common.optimizer_step(model, optimizer, rate, args.max_grad_norm)
        with run.timer("eval"):
            after[:, j] = validation_losses(model, problem.decided, args)
        with run.timer("probe"):
            snapshot.restore()
    return after


def flat_gradient(model, batch: list[Example], args: Namespace) -> torch.Tensor:
    """∇ of the mean NLL per response token of a batch, as one vector (P,)."""
    common.backward(model, batch, args)
    parts = []
    for p in common.trainable(model):
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        parts.append(ranks.local(gradient).flatten())
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def align(model, problem: Problem, interval: Interval, args, run) -> np.ndarray:
    """Gradient alignment instead of probing: gradients of each domain's validation loss and, on the
    batches that a probe would train on, of each dataset's -> slopes (M, N). Holds M + N gradients
    of P numbers."""
    rates, other = probe_rates(interval.rates, args.probe_steps), []
    with run.timer("probe"):
        model.eval()  # no dropout, and the RNG stays as it was
        own = [flat_gradient(model, d.validation.examples, args) for d in problem.decided]
        for j, examples in enumerate(problem.examples):
            options = len(rates), args.batch_size, args.seed, interval.step, j
            batch = sum(probe_batches(examples, *options), [])
            other.append(flat_gradient(model, batch, args))
        model.train()
        # every rank has its part of the gradients, and so of the products
        return ranks.all_sum(gradient_slopes(own, other, float(np.mean(rates))))


# ---- The loop ------------------------------------------------------------------------------------
@common.finish_step()
def train(model, tokenizer, problem: Problem, args: Namespace, run: common.Run):
    """Train with the mixture of each interval, from where the run's checkpoint stopped.
    -> {"steps", "examples", "tokens"}, the best feasible checkpoint {"step", "total", "losses"} or
    None"""
    labels, steps, updates = problem.labels, problem.steps, problem.updates
    pool = Examples.join(problem.examples)
    sizes = np.array([*map(len, problem.examples)])
    sampler = common.MixtureSampler(sizes, args.batch_size, args.seed)
    optimizer = common.make_optimizer(model, args)
    rates = [common.learning_rate(step, steps, args) for step in range(steps)]
    torch.manual_seed(args.seed + ranks.rank())  # of dropout
    eval_at = {*updates, steps, *common.every(args.eval_every, steps)}
    counts = {"steps": 0, "examples": 0, "tokens": 0}
    window = deque(maxlen=args.log_every)  # of each step: sum of the loss, tokens
    seen = np.zeros((2, len(labels)), np.int64)  # examples and response tokens drawn by dataset
    last_update, best = None, None
    mixture = np.full(len(labels), 1 / len(labels)) if problem.fixed is None else problem.fixed
    if run.state:
        state = run.state
        common.restore(state, model, optimizer)
        counts, best = state["counts"], state["best"]
        seen, mixture = state["seen"].numpy(), state["mixture"].numpy()
        sampler.cursors, last_update = state["cursors"].numpy(), state["last_update"]
        window.extend(state["window"])
    model.train()
    bar = tqdm(total=steps, initial=counts["steps"], desc="train", unit="step")
    for step in range(counts["steps"], steps + 1):
        improved = False
        if step in eval_at:
            losses, found = evaluate(model, problem, step, last_update, args, run)
            improved = found["feasible"] and (not best or found["total"] < best["total"])
            # ---- Step 3, the choice: the best checkpoint on which all constraints hold
            best = found if improved else best
        if improved:
            with run.timer("save"):
                run.save_model(model, tokenizer, "best")
        if step == steps:
            break
        if step in updates:
            # ---- Steps 1 and 2: the slope matrix and the mixture of the next interval
            end = min([point for point in updates if point > step] + [steps])
            known = losses[: len(problem.decided)]
            interval = Interval(step, rates[step:end], known, mixture)
            mixture = update_mixture(model, optimizer, problem, interval, args, run)
            last_update = known.tolist()
        with run.timer("train"):
            # ---- Step 3: an optimizer step on a batch drawn by the mixture
            batch = [pool[i] for i in sampler.batch(mixture, step)]
            by_example = common.backward(model, batch, args)
            grad_norm = common.optimizer_step(model, optimizer, rates[step], args.max_grad_norm)
        tokens = np.array([example.response_length for example in batch])
        for example in batch:
            seen[:, example.dataset] += 1, example.response_length
        window.append([float(by_example @ tokens), int(tokens.sum())])
        done, counts["steps"] = step + 1, step + 1
        counts["examples"], counts["tokens"] = map(int, seen.sum(1))
        bar.update(1)
        if done % args.log_every == 0 or done in (1, steps):
            loss, tokens = np.sum(window, axis=0)
            current = {"loss": loss / tokens, "lr": rates[step], "grad_norm": grad_norm}
            others = common.by_label("mixture", labels, mixture)
            others |= common.shares(seen, sizes, labels)
            run.log_training("train", done, steps, current, others)
        if run.due(done, steps) or (improved and done < steps):
            state = {"counts": counts, "best": best, "last_update": last_update}
            state |= {"seen": seen, "mixture": mixture, "cursors": sampler.cursors}
            state |= {"window": list(window), "before": problem.before, "test": problem.test}
            with run.timer("save"):
                run.save_checkpoint(state, model, optimizer)
    bar.close()
    return counts, best


def evaluate(model, problem: Problem, step: int, last_update, args, run) -> tuple[np.ndarray, dict]:
    """Validation losses of all domains after `step`, logged. last_update: losses (M,) at the last
    update, for what has become of its prediction. -> losses, {"step", "feasible", "total",
    "losses"}: feasible where all constraints hold and the target total fell"""
    domains, losses = problem.domains, problem.before
    if step:
        with run.timer("eval"):
            losses = validation_losses(model, domains, args)
    failed, total = violations(domains, losses, problem.reference), target_total(domains, losses)
    feasible = not failed and total < target_total(domains, problem.before)
    record = {f"eval/{d.label}/{d.metric}": float(loss) for d, loss in zip(domains, losses)}
    record |= {"eval/target_total": total, "eval/violation": sum(failed.values())}
    record["eval/feasible"] = int(feasible)
    if last_update and (step in problem.updates or step == problem.steps):
        for domain, loss, earlier in zip(problem.decided, losses, last_update):
            record[f"update/{domain.label}/observed"] = float(loss) - earlier
    excesses = ", ".join(f"{label} +{excess:.4f}" for label, excess in failed.items())
    verdict = f"not feasible: {excesses or 'the targets did not fall'}"
    if step == 0 or feasible:
        verdict = "feasible" if step else "before training"
    run.log(step, record, f"eval {step}/{problem.steps}  targets {total:.4f}  {verdict}")
    found = {"step": step, "feasible": feasible, "total": total, "losses": losses.tolist()}
    return losses, found


def update_mixture(model, optimizer, problem: Problem, interval: Interval, args, run):
    """Steps 1 and 2: slopes, solution, damping; logged. -> the interval's mixture (N,)"""
    horizon, decided, mixture = len(interval.rates), problem.decided, interval.mixture
    record, line = {"update/horizon": horizon}, f"update {interval.step}  {horizon} steps"
    if problem.fixed is None:
        # ---- Step 1: the slope matrix
        if args.mixture == "gradient":
            slopes = align(model, problem, interval, args, run)
        else:
            after = probe(model, optimizer, problem, interval, args, run)
            slopes = slope_matrix(interval.losses, after, args.probe_steps)
        # ---- Step 2: the mixture of the next interval
        reference = problem.reference[: len(decided)]
        targets = [i for i, domain in enumerate(decided) if domain.role == "target"]
        constraints = [i for i, domain in enumerate(decided) if domain.role == "constraint"]
        known = interval.losses, slopes, reference
        with run.timer("probe"):
            solution, info = solve_mixture(*known, targets, constraints, horizon)
        mixture = damp(solution, mixture, args.damping)
        change = horizon * (slopes @ mixture)
        feasible = not violations(decided, interval.losses + change, reference)
        record |= {"update/feasible": int(feasible)}
        record |= {f"update/{key}": info[key] for key in ("lambda", "epsilon")}
        for domain, predicted, row in zip(decided, change, slopes):
            record[f"update/{domain.label}/predicted"] = float(predicted)
            record |= common.by_label(f"slope/{domain.label}", problem.labels, row)
        verdict = "predicted feasible" if feasible else "predicted infeasible"
        line += f"  {verdict}  λ {info['lambda']:.2g}  ε {info['epsilon']:.2g}"
    record |= common.by_label("mixture", problem.labels, mixture)
    shares = [f"{label} {weight:.3f}" for label, weight in zip(problem.labels, mixture)]
    run.log(interval.step, record, "  ".join([line, *shares]))
    return mixture


# ---- Step 3: the choice and the report -----------------------------------------------------------
def load_best(model, folder: Path) -> None:
    """Put the weights that save_model wrote to folder back into model, bit for bit."""
    if hasattr(model, "peft_config"):
        import peft

        saved = peft.load_peft_weights(folder, device="cpu")
        names = common.trainable_state(model)
        own = {name: saved[name.replace(".default.", ".")] for name in names}
        common.load_trainable_state(model, own)
        return
    saved, _ = common.load_model(str(folder), torch.device("cpu"))
    if ranks.active():
        ranks.fill(model, saved.state_dict())
    else:
        common.load_trainable_state(model, common.trainable_state(saved))


def final_report(domains: list[Domain], before: dict, after: dict, rules: dict, best) -> dict:
    """What the chosen checkpoint does on test rows. before, after: report_test's numbers.

    -> {"feasible": all constraints hold on the test rows, the target total fell there, and a
    feasible checkpoint was chosen on validation rows; "reduction_percent": 100 (1 - exp(mean over
    targets of the change of NLL)), 0 if infeasible; "unconstrained_reduction_percent": the same
    whether feasible or not; "targets", "constraints": per domain}"""
    old = [before[domain.label]["loss"] for domain in domains]
    new = [after[domain.label]["loss"] for domain in domains]
    reference = reference_levels(domains, old, rules)
    failed, rows = violations(domains, new, reference), {role: {} for role in ROLES}
    for domain, a, b, level in zip(domains, old, new, reference):
        rows[domain.role][domain.label] = row = {"metric": domain.metric, "before": a, "after": b}
        if domain.role == "constraint":
            excess = failed.get(domain.label, 0.0)
            row |= {"reference": float(level), "violation": excess}
    change = [after[label]["nll"] - before[label]["nll"] for label in rows["target"]]
    reduction = 100 * (1 - math.exp(min(np.mean(change), 700.0)))
    fell = target_total(domains, new) < target_total(domains, old)
    feasible = best is not None and not failed and fell
    report = {"feasible": feasible, "feasible_on_validation": best is not None}
    report |= {"step": best and best["step"], "reduction_percent": reduction if feasible else 0.0}
    report["unconstrained_reduction_percent"] = reduction
    return {**report, "targets": rows["target"], "constraints": rows["constraint"]}


def print_report(report: dict, cost: dict) -> None:
    for label, row in report["constraints"].items():
        line = f"{row['metric']} {row['after']:.4f}, level {row['reference']:.4f}"
        verdict = f"fails by {row['violation']:.4f}" if row["violation"] else "holds"
        print(f"test  constraint {label}: {line}: {verdict}")
    where = "no checkpoint was feasible on validation rows, final/ is the last"
    if report["step"] is not None:
        where = f"checkpoint of step {report['step']}"
    verdict, change = "feasible", -report["unconstrained_reduction_percent"]
    if not report["feasible"]:
        verdict = "NOT feasible"
    print(f"test  {verdict} ({where}); target perplexity {change:+.1f} % (geometric mean)")
    print(f"test  counts as a reduction of {report['reduction_percent']:.1f} %")
    parts = f"training 1 + probes {cost['probe']:.2f} + evaluation {cost['eval']:.2f}"
    print(f"cost  {cost['total']:.2f}x a static run: {parts}")


# ---- The script ----------------------------------------------------------------------------------

DEFAULT_STEPS, DEFAULT_LORA_RANK = 2048, 32


def parse_args(argv: list[str] | None = None) -> Namespace:
    rank = f"{DEFAULT_LORA_RANK}, and 0 for tiny"
    note = f"without --max_steps and --epochs: {DEFAULT_STEPS} steps; without --lora_rank: {rank}"
    parser = common.ArgumentParser(description=__doc__, epilog=note)
    common.add_shared_flags(parser)
    # The paper's recipe: 2,048 steps, batch 8, length 512, LoRA rank 32. The rest is ours.
    parser.set_defaults(batch_size=8, max_length=512, lora_rank=None, lr=2e-4, weight_decay=0.0)
    parser.set_defaults(schedule="cosine", warmup_ratio=0.03)
    # fmt: off
    add = parser.add_argument_group("DynaMiCS").add_argument
    labels = {"nargs": "+", "default": [], "metavar": "LABEL"}
    add("--targets", **labels, help="labels of --eval_data whose loss is to fall")
    add("--constraints", **labels,
        help="labels of --eval_data whose loss must stay at or below its reference level")
    add("--accuracy", **labels,
        help="labels of --eval_data measured by 1 - accuracy on multiple-choice rows, not mean NLL")
    add("--reference", nargs="+", default=[], metavar="LEVEL",
        help="LABEL=1.25, LABEL=+2%% (of the loss before training) or FILE.json of them; default: "
             "the loss before training")
    add("--updates", default="light", metavar="none|light|dense|STEP,STEP,...",
        help="when the mixture is updated: evenly, with geometrically growing intervals first, or "
             "at these steps; always at 0")
    add("--probe_steps", type=common.few, default=4, metavar="C",
        help="steps on each dataset alone that estimate its slopes (the paper's number is unknown)")
    add("--damping", type=common.fraction, default=0.0,
        help="share of the previous mixture, at first the uniform one, that an update keeps (not "
             "in the paper)")
    add("--mixture", default="dynamics", metavar="dynamics|gradient|uniform|proportional|FILE.json",
        help="gradient: slopes from gradient alignment; the others are fixed mixtures, a file is "
             "{training label: weight}")
    add("--target_mass", type=common.fraction, metavar="M",
        help="fixed mixtures: total weight of the training datasets that serve a target (the paper "
             "sweeps 0, 0.2, 0.5, 0.8, 1)")
    add("--target_data", **labels,
        help="labels of --data that serve the targets; default: those that are a target's label")
    add("--validation_fraction", type=common.fraction, default=VALIDATION_FRACTION, metavar="F",
        help="share of each evaluation set's prompts that decides (mixture, checkpoint); the "
             "others report, never the same rows")
    add("--max_cost", type=common.positive_float, default=1.4, metavar="X",
        help="planned cost in multiples of a static run: it sets the validation rows per domain "
             "(the paper reports 1.4 to 1.7)")
    add("--eval_limit", type=common.positive_int,
        help="validation rows per domain, instead of --max_cost")
    # fmt: on
    args = common.parse_flags(parser, argv, "dynamics")
    if not (args.max_steps or args.epochs):
        args.max_steps = DEFAULT_STEPS
    if args.lora_rank is None:
        args.lora_rank = 0 if args.model == "tiny" else DEFAULT_LORA_RANK
    problem = flag_conflict(args)
    if problem:
        parser.error(problem)
    return args


def flag_conflict(args: Namespace) -> str | None:
    """What is wrong with the flags, if anything."""
    shares, mass = args.mixture in ("uniform", "proportional"), args.target_mass is not None
    slopes, file = args.mixture in ("dynamics", "gradient"), args.mixture.endswith(".json")
    forms = "expected dynamics, gradient, uniform, proportional or a .json file"
    conflicts = [
        (not args.targets, "--targets: name at least one label of --eval_data"),
        (args.max_cost <= 1, "--max_cost: a static run costs 1, so more than 1 is needed"),
        (args.damping == 1, "--damping 1: the mixture would never change"),
        (not (shares or slopes or file), f"--mixture {args.mixture}: {forms}"),
        (mass and not shares, "--target_mass goes with --mixture uniform or proportional"),
        (args.target_data and not mass, "--target_data goes with --target_mass"),
        (args.damping and not slopes, "--damping goes with --mixture dynamics or gradient"),
    ]
    return next((message for wrong, message in conflicts if wrong), None)


def check_labels(args: Namespace, training: list, evaluation: list) -> None:
    """Raise UserError unless every label that a flag names exists, and no domain is target and
    constraint at once."""
    known = {"data": [dataset.label for dataset in training]}
    known["eval_data"] = [dataset.label for dataset in evaluation]
    for flag in ("targets", "constraints", "accuracy", "target_data"):
        source = "data" if flag == "target_data" else "eval_data"
        missing = [label for label in getattr(args, flag) if label not in known[source]]
        if missing:
            there = ", ".join(known[source]) or "none"
            problem = f"no such label in --{source}; there are {there}"
            raise UserError(f"--{flag} {missing[0]}: {problem}")
    both = set(args.targets) & set(args.constraints)
    if both:
        raise UserError(f"{sorted(both)[0]!r} is both in --targets and in --constraints")
    if args.mixture == "gradient" and set(args.accuracy) & {*args.targets, *args.constraints}:
        problem = "a target or constraint in --accuracy has no gradient"
        raise UserError(f"--mixture gradient needs differentiable metrics: {problem}")


def read_fixed_mixture(args: Namespace, labels: list[str], sizes: list[int]) -> np.ndarray | None:
    """Weights (N,) of a fixed --mixture; None for dynamics and gradient. Raises UserError."""
    if args.mixture in ("dynamics", "gradient"):
        return None
    if not args.mixture.endswith(".json"):
        serves = [label in (args.target_data or args.targets) for label in labels]
        try:
            return fixed_mixture(sizes, serves, args.mixture, args.target_mass)
        except ValueError as error:
            advice = "say with --target_data which labels of --data do"
            raise UserError(f"--target_mass {args.target_mass:g}: {error}; {advice}") from None
    return common.read_weights(args.mixture, "--mixture", labels)


def make_side(rows: list, metric: str, args: Namespace, tokenizer, left_out: Counter) -> Side:
    """Rows of one side of a split -> what is measured on them. left_out: is added to."""
    responses, found = data.encode(rows, tokenizer, args.max_length)
    if metric == "nll":
        left_out.update(found)
        return Side(responses, [], [], responses)
    questions, found = data.encode_choices(rows, tokenizer, args.max_length)
    left_out.update(found)
    answers = [rows[question[0].row].answer for question in questions]
    return Side(sum(questions, []), [len(question) for question in questions], answers, responses)


def list_rows(dataset: data.Dataset, rows: list[data.Row], side: Side) -> list[dict]:
    """The rows that a side measures, for test_rows.jsonl: {"label", "index": in the dataset,
    "row": file and number, "nll": response measured, "choice": question measured}."""
    index = {id(row): i for i, row in enumerate(dataset.rows)}
    nll = {example.row for example in side.responses}
    choice = {example.row for example in side.examples} if side.sizes else set()
    listed = []
    for i in sorted(nll | choice, key=lambda i: index[id(rows[i])]):
        place = {"label": dataset.label, "index": index[id(rows[i])], "row": rows[i].where}
        listed.append({**place, "nll": i in nll, "choice": i in choice})
    return listed


def make_domain(dataset: data.Dataset, args: Namespace, tokenizer) -> Domain:
    """An evaluation set -> Domain with all its validation rows (cut to size later) and its test
    rows. Raises UserError where a side is empty."""
    label, role = dataset.label, "monitored"
    if label in args.targets or label in args.constraints:
        role = "target" if label in args.targets else "constraint"
    metric = "error" if label in args.accuracy else "nll"
    parts = split_rows(dataset.rows, args.validation_fraction, label)
    left_out = Counter(dataset.left_out)
    validation, test = (make_side(rows, metric, args, tokenizer, left_out) for rows in parts)
    dataset.left_out = dict(left_out)
    for name, side in (("validation", validation), ("test", test)):
        if not side.examples:
            problem = f"no {name} row is left at --max_length {args.max_length}"
            raise UserError(f"evaluation set {label!r}: {problem}")
    kept = [len(side.sizes or side.examples) for side in (validation, test)]
    unit, what = ("questions", "1 - accuracy") if metric == "error" else ("examples", "mean NLL")
    counts = f"{kept[0]:,} validation and {kept[1]:,} test {unit}"
    print(f"data  eval  {label}: {role}, {counts}, {what}{data.notes(dataset)}")
    return Domain(label, role, metric, validation, test, list_rows(dataset, parts[1], test))


def cut_validation(domain: Domain, rows: int) -> None:
    """Keep the first `rows` validation rows (they are in random order) or questions, with all
    their choices."""
    side = domain.validation
    side.sizes, side.answers = side.sizes[:rows], side.answers[:rows]
    side.examples = side.examples[: sum(side.sizes) or rows]


def row_tokens(domain: Domain) -> float:
    """Tokens of a validation row, all its choices together, on average."""
    side = domain.validation
    total = sum(len(example.ids) for example in side.examples)
    return total / len(side.sizes or side.examples)


def load_datasets(args: Namespace, tokenizer) -> tuple[list, list]:
    """-> the datasets of --data, tokenised, and of --eval_data as rows, since they are split by
    row. Raises UserError."""
    training = prepare.load(args.data, common.recipe(args, tokenizer))
    return training, data.load_data(args.eval_data, seed=args.seed, split="eval")


def make_problem(datasets: list, eval_datasets: list, tokenizer, args: Namespace) -> Problem:
    """Everything that is known before training. How many validation rows decide is the same for
    every --mixture, so that all choose on the same rows. Raises UserError."""
    examples = [dataset.examples for dataset in datasets]
    labels, sizes = [dataset.label for dataset in datasets], [*map(len, examples)]
    fixed = read_fixed_mixture(args, labels, sizes)
    domains = [make_domain(dataset, args, tokenizer) for dataset in eval_datasets]
    domains.sort(key=lambda domain: ROLES.index(domain.role))
    trained_on = np.concatenate([dataset.digests["prompt"] for dataset in datasets])
    for dataset in eval_datasets:
        shared = int(np.isin(dataset.digests["prompt"], trained_on).sum())
        if shared:
            count = f"{shared:,} of {len(dataset.rows):,} rows of evaluation set"
            print(f"warning: {count} {dataset.label!r} have a prompt that is trained on")
    steps = common.total_steps(args, math.ceil(sum(sizes) / args.batch_size))
    try:
        updates = update_steps(args.updates, steps)
    except ValueError as error:
        raise UserError(f"--updates {error}") from None
    problem = Problem(labels, examples, domains, steps, updates, fixed)
    often = range(0, steps, args.eval_every) if args.eval_every else ()
    evaluations = len({*updates, steps, *often})
    lengths = []
    for part in examples:
        lengths.append(float(part.lengths.mean()))
    tokens = [sum(map(row_tokens, part)) for part in (problem.decided, domains)]
    affordable = affordable_rows(args, steps, evaluations, len(updates), lengths, tokens)
    problem.rows = args.eval_limit or affordable
    for domain in domains:
        cut_validation(domain, problem.rows)
    print(f"train {steps} steps; {common.batch_arithmetic(args)}")
    plan = f"updates at steps {', '.join(map(str, updates))}"
    print(f"train {plan}; up to {problem.rows} validation rows a domain decide")
    if affordable == FEWEST_ROWS and not args.eval_limit:
        what = f"--max_cost {args.max_cost:g} is too little for {FEWEST_ROWS} validation rows"
        print(f"warning: at these steps, datasets and domains {what} a domain")
    return problem


def measure_before(model, problem: Problem, rules: dict, args: Namespace, run) -> None:
    """The base model on validation and on test rows, or what a resumed run had found."""
    if run.state:
        problem.before, problem.test = run.state["before"].numpy(), run.state["test"]
    else:
        with run.timer("eval"):
            problem.before = validation_losses(model, problem.domains, args)
        with run.timer("test"):
            problem.test = report_test(model, problem.domains, args)
        common.print_evaluation(problem.test)
    problem.reference = reference_levels(problem.domains, problem.before, rules)
    if not run.state:
        decided = [domain.label for domain in problem.decided]
        levels = common.by_label("reference", decided, problem.reference)
        run.log(0, {**common.flat("test", problem.test), **levels})


def summarise(problem: Problem, best: dict | None) -> dict:
    """What summary.json says of the validation rows."""
    labels = [domain.label for domain in problem.domains]
    chosen = best and {"step": best["step"], **dict(zip(labels, best["losses"]))}
    levels = {}
    for domain, level in zip(problem.domains, problem.reference):
        if domain.role == "constraint":
            levels[domain.label] = float(level)
    before = dict(zip(labels, problem.before.tolist()))
    return {"before": before, "chosen": chosen, "reference": levels}


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    run = common.Run("dynamics", args)
    if run.finished:
        return
    rules = parse_references(args.reference, args.constraints)
    tokenizer = common.setup(args)
    datasets, eval_datasets = load_datasets(args, tokenizer)
    check_labels(args, datasets, eval_datasets)
    problem = make_problem(datasets, eval_datasets, tokenizer, args)
    model = common.load_start(args)
    common.print_memory(model, args, snapshot=args.mixture == "dynamics")
    common.check_gradients(model, problem.examples[0][0], args.dtype)
    examples = Examples.join(problem.examples)
    config = common.data_config(datasets, eval_datasets, examples)
    config |= {"update_steps": problem.updates, "validation_rows": problem.rows}
    config["domains"] = {d.label: {"role": d.role, "metric": d.metric} for d in problem.domains}
    run.open(**config)
    if args.show_batch:
        data.show_examples(examples, tokenizer)
    test_rows = [row for domain in problem.domains for row in domain.test_rows]
    common.write_jsonl(run.folder / "test_rows.jsonl", test_rows)
    measure_before(model, problem, rules, args, run)
    counts, best = train(model, tokenizer, problem, args, run)
    if best:  # final/ is the best feasible checkpoint, or the last one where none was feasible
        load_best(model, run.folder / "best")
    measure = partial(report_test, domains=problem.domains, args=args)
    after = common.save_final(model, tokenizer, measure, counts["steps"], run, "test")
    cost = run.cost("probe", "eval")
    report = final_report(problem.domains, problem.test, after, rules, best)
    print_report(report, cost)
    summary = {**counts, "report": report, "cost": cost, "validation": summarise(problem, best)}
    common.end_run(run, problem.test, after, summary, plots.draw)


if __name__ == "__main__":
    main()

"""Deliberate privacy bugs, each of which must turn the suite red: `make mutants`.

Every mutant is one replaced piece of text in a copy of the tree; the tests named beside it run
there until the first failure. A mutant that survives, or whose text is no longer found, is a
failure of this program.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATISTICAL = ("tests/statistical", "tests/unit/test_plan.py")
RANKS = ("tests/statistical/test_ranks.py",)
DP_SGD, CENTRAL = "core/privacy/mechanisms/dp_sgd.py", "core/privacy/mechanisms/central_images.py"
PLAN, SAMPLING = "core/privacy/plan/plan.py", "core/privacy/mechanisms/sampling.py"
STAGE_PLANS, FREQUENCY = "core/privacy/plan/releases.py", "core/privacy/mechanisms/frequency.py"
NOISE = "flat = flat + (self.noise_multiplier * self.max_grad_norm) * noise"
NORMS = "norms = _norm(torch.stack([_norms(pieces) for pieces in rows]), dim=0)"
CLIP = "(self.max_grad_norm / norms).clamp(max=1.0)"
SUMS = "sums = class_sums(small[chosen], train.labels[chosen], num_classes, config)"
RELEASE = "yield (sums + plan.noise_stddev * drawn).float()"
FEATURES = "sums + plan.noise_stddev * noise.normal(0, sums.numel()).view_as(sums)"
REDUCE = """        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
"""
SCOPES = "core/privacy/plan/scopes.py"
SHARES, BUDGET = "core/privacy/plan/shares.py", "core/privacy/plan/budget.py"
SELECTED = "core/privacy/accounting/selection.py"
BEST, BOUNDED = ("tests/unit/test_best_of_trials.py",), ("tests/unit/test_selection_shares.py",)
TRADE_OFF, ATTACKS = "core/privacy/accounting/tradeoff.py", ("tests/unit/test_tradeoff.py",)
AUDIT, PROVEN = ("tests/integration/test_audit.py",), "core/publish/proven.py"
PAIRS, TUNED = "core/privacy/accounting/references.py", ("tests/unit/test_tuning_shares.py",)
CAPPED = ("tests/unit/test_sweep_references.py",)
TUNED_RUNS = ("tests/unit/test_tuned_runs.py",)
FAR = ("tests/unit/test_far_accounting.py",)
KEPT = ("tests/unit/test_plan.py",)
SPENDING_CODE, CHARGES = "core/privacy/ledger/account.py", ("tests/unit/test_run_and_ledger.py",)
KEEPER, OF_KEEPER = "sweep/trials/keeper.py", ("tests/unit/test_keeper.py",)
COPY, OF_COPY = "core/privacy/ledger/durable_copy.py", ("tests/integration/test_durable_copy.py",)
COPIES, OF_COPIES = "sweep/results/folder_copy.py", ("tests/integration/test_folder_copy.py",)
LOSSES_OF_LEDGERS = ("tests/unit/test_ledger_losses.py",)
SPENDING = ("tests/integration/test_scope_spending.py",)
EARLY = ("tests/integration/test_early_scores.py",)
EPOCHS = ("tests/integration/test_epoch_chosen_privately.py",)
SHARED = ("tests/integration/test_shared_warm_up.py",)
SECRET = ("tests/integration/test_secret_number.py",)
CHANGED = ("tests/integration/test_changed_code.py",)
LOSSES, LOSS_TESTS = "core/privacy/accounting/quick.py", ("tests/unit/test_loss_distribution.py",)
CLAIMS = ("tests/unit/test_claims.py",)
DIVERGING = ("tests/integration/test_diverging_runs.py",)
CHARGED = "_made(getattr(self, name) for name in RELEASES"
KEPT_CODE, KEPT_TESTS = "core/privacy/accounting/kept.py", ("tests/unit/test_kept_composition.py",)
MOMENTS, OF_MOMENTS = "core/privacy/mechanisms/moments.py", ("tests/statistical/test_moments.py",)
NORM_KERNEL, NORM_TESTS = "core/diffusion/norm_kernel.py", ("tests/unit/test_norm_kernel.py",)
DP_SGD_EVENT = "self.sample_rate, self.noise_multiplier, self.num_steps"


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, `old` becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = STATISTICAL


MUTANTS = (
    Mutant("large losses not amplified", LOSSES, "losses - math.log(rate)", "losses", LOSS_TESTS),
    Mutant("one release composed for all", LOSSES, "size) ** count", "size) ** 1", LOSS_TESTS),
    Mutant("DP-SGD noise halved", DP_SGD, NOISE, f"{NOISE} / 2"),
    Mutant("DP-SGD noise over sqrt(2)", DP_SGD, NOISE, f"{NOISE} / 2**0.5"),
    Mutant("no DP-SGD noise", DP_SGD, NOISE, f"{NOISE} * 0"),
    Mutant("same DP-SGD noise every step", DP_SGD, "normal(self._step,", "normal(0,"),
    Mutant("no clipping", DP_SGD, CLIP, "torch.ones_like(norms)"),
    Mutant("clip at 2 C", DP_SGD, CLIP, f"(2 * {CLIP[1:]}"),
    Mutant(
        "the batch is clipped, not each example",
        DP_SGD,
        NORMS,
        "norms = torch.cat([torch.cat(pieces).sum(0) for pieces in rows]).double().norm()"
        ".expand(sum(map(len, rows[0])))",
    ),
    Mutant(
        "K copies counted as examples",
        "core/training/stages.py",
        "PerExampleGradients(denoiser, settings.noise_multiplicity, fused)",
        "PerExampleGradients(denoiser, 1)",
    ),
    Mutant(
        "division by the actual batch",
        DP_SGD,
        "finite = torch.isfinite(norms)",
        "finite = torch.isfinite(norms); self.expected_batch_size = max(len(norms), 1)",
    ),
    Mutant(
        "DP-SGD spends on where the network is no longer finite",
        "core/training/loop.py",
        "self._require_finite(stage, done, [*self.model.denoiser.parameters(), decides])",
        "stage.public_loss or self._require_finite(stage, done, [decides])",
        DIVERGING,
    ),
    Mutant(
        "a private loss decides whether training goes on",
        "core/training/loop.py",
        "loss if stage.public_loss is None else stage.public_loss(number)",
        "loss",
        DIVERGING,
    ),
    Mutant(
        "one record's gradient can end the training",
        DP_SGD,
        "finite = torch.isfinite(norms)",
        "finite = torch.isfinite(norms); assert finite.all()",
        DIVERGING,
    ),
    Mutant(
        "sample rate doubled",
        SAMPLING,
        "int(sample_rate * 2.0**64)",
        "int(min(1.0, 2 * sample_rate) * 2.0**64)",
    ),
    Mutant(
        "no noise on one class's central images",
        CENTRAL,
        RELEASE,
        f"drawn[0] = 0; {RELEASE}",
    ),
    Mutant("central noise halved", CENTRAL, RELEASE, RELEASE.replace("* drawn", "/ 2 * drawn")),
    Mutant(
        "central sums rounded before the noise",
        CENTRAL,
        RELEASE,
        "yield sums.float() + (plan.noise_stddev * drawn).float()",
    ),
    Mutant(
        "norms of gradients in float32",
        DP_SGD,
        "_norm(piece, dim=1, dtype=torch.float64)",
        "_norm(piece, dim=1).double()",
    ),
    Mutant(
        "clipped gradients summed in float32",
        DP_SGD,
        "part @ finite_piece",
        "part.float() @ finite_piece.float()",
    ),
    Mutant(
        "TF32 rounds gradients after their norms were taken",
        DP_SGD,
        "part @ finite_piece",
        "part.float() @ finite_piece.float()",
        ("tests/integration/test_pretended_gpu.py::test_tf32_reaches_neither_clipping_nor_noise",),
    ),
    Mutant(
        "the kernel of convolutions reads into the next example",
        "core/privacy/mechanisms/convolution_kernel.py",
        " & (row < height)",
        "",
        ("tests/unit/test_convolution_kernel.py",),
    ),
    Mutant(
        "the kernel of norms takes the statistics of another image",
        NORM_KERNEL,
        "mean = tl.load(means + image * groups + c",
        "mean = tl.load(means + c",
        NORM_TESTS,
    ),
    Mutant(
        "the kernel of norms joins groups",
        NORM_KERNEL,
        "same = lane[:, None] // size == lane[None, :] // size",
        "same = lane[:, None] // size >= lane[None, :] // size",
        NORM_TESTS,
    ),
    Mutant(
        "gradients of scale and shift are the batch's for each example",
        "core/privacy/mechanisms/per_example_gradients.py",
        "s.unflatten(0, (-1, ctx.copies)).sum(1) for s in",
        "s.sum(0).expand(len(s) // ctx.copies, -1) for s in",
        NORM_TESTS,
    ),
    Mutant(
        "what an example draws depends on its place in the batch",
        "core/diffusion/draws_kernel.py",
        "tl.load(keys + row)",
        "tl.load(keys + row) + row",
        ("tests/unit/test_draws_kernel.py",),
    ),
    Mutant(
        "noise rounded before it is added",
        "core/privacy/keys.py",
        "torch.empty(2 * pairs, dtype=torch.float64)",
        "torch.empty(2 * pairs)",
        ("tests/statistical/test_frequency.py",),
    ),
    Mutant(
        "central images divided by the actual class count",
        CENTRAL,
        SUMS,
        f"{SUMS}; counts = torch.bincount(train.labels[chosen], minlength=num_classes); "
        "shape = (-1, *[1] * (sums.ndim - 1)); "
        "sums = sums / counts.clamp(min=1).view(shape) * plan.expected_class_count",
    ),
    Mutant(
        "moments: the norm of a matrix off by sqrt(2)",
        MOMENTS,
        "torch.full((len(rows),), 2.0**0.5,",
        "torch.full((len(rows),), 2.0,",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: private counts of clusters",
        MOMENTS,
        "counts=(sums[..., 0] / plan.count_norm).float()",
        "counts=cluster_sums(points, train.labels, clusters, centers, plan)[..., 0].float()",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: one share uncharged",
        STAGE_PLANS,
        "1 - sum(shares),",
        "1 - sum(shares[:2]),",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: noise halved",
        STAGE_PLANS,
        "return self.noise_stddev * norm / math.sqrt(share)",
        "return self.noise_stddev * norm / math.sqrt(share) / 2",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: noise 2 % too small",
        MOMENTS,
        "plan.stddev(norm, share) * drawn",
        "plan.stddev(norm, share) * 0.98 * drawn",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: images not clipped",
        MOMENTS,
        "yield clipped(rows, max_norm)",
        "yield rows",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: all rounds share their noise",
        MOMENTS,
        "noisy(2 + number, sums",
        "noisy(2, sums",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: a round charged once for all",
        STAGE_PLANS,
        "central.class_mean_share / rounds",
        "central.class_mean_share",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: an image counts for more than its norm",
        MOMENTS,
        "(len(points), 1), plan.count_norm",
        "(len(points), 1), plan.max_norm",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: a cluster's second moment not clipped",
        MOMENTS,
        "clipped(points - centers[labels, clusters], reach)",
        "points - centers[labels, clusters]",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: noise of a smaller reach than the clip's",
        MOMENTS,
        "noisy(2 + plan.num_rounds, seconds, reach**2,",
        "noisy(2 + plan.num_rounds, seconds, 0.98 * reach**2,",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: rounding depends on the other images",
        MOMENTS,
        "(0, 0, 0, _CHUNK - len(rows))",
        "(0, 0, 0, 0)",
        OF_MOMENTS,
    ),
    Mutant(
        "moments not charged",
        PLAN,
        CHARGED,
        f"{CHARGED} if name != 'moments'",
        OF_MOMENTS,
    ),
    Mutant("frequency noise halved", FREQUENCY, FEATURES, f"{FEATURES} / 2"),
    Mutant(
        "frequency features of a norm above 1",
        FREQUENCY,
        "phases.shape[1] ** -0.5",
        "phases.shape[1] ** -0.4",
    ),
    Mutant(
        "frequency features not charged",
        PLAN,
        CHARGED,
        f"{CHARGED} if name != 'frequency'",
    ),
    Mutant(
        "frequency features not paid for by DP-SGD",
        PLAN,
        "_repeated((each.mechanism for each in others), times)",
        "_repeated((each.mechanism for each in others if each.kind != 'frequency'), times)",
    ),
    Mutant("half of the steps charged", STAGE_PLANS, DP_SGD_EVENT, f"{DP_SGD_EVENT} // 2"),
    Mutant(
        "a kept plan above the target taken", PLAN, "if used > 1 + _ROUNDING", "if used > 2", KEPT
    ),
    Mutant("a kept plan's epsilon believed", PLAN, "rel_tol=_ROUNDING", "rel_tol=1", KEPT),
    Mutant(
        "a kept plan of other numbers taken",
        PLAN,
        "if getattr(plan, name) != value",
        "if False",
        KEPT,
    ),
    Mutant("sensitivity halved", STAGE_PLANS, "sensitivity = reach *", "sensitivity = reach / 2 *"),
    Mutant(
        "norm clipped at twice the bound", CENTRAL, "(max_norm / norms)", "(2 * max_norm / norms)"
    ),
    Mutant(
        "noise added by every rank",
        DP_SGD,
        REDUCE,
        "        flat = flat + (self.noise_multiplier * self.max_grad_norm) * self._noise.normal("
        f"self._step + 7, flat.numel())\n{REDUCE}",
        RANKS,
    ),
    Mutant(
        "every rank computes the whole batch",
        SAMPLING,
        "return indices[rank::world_size]",
        "return indices",
        RANKS,
    ),
    Mutant(
        "noise of the private accuracy halved",
        "core/evaluation/metrics.py",
        "plan.noise_stddev * float(noise.normal(release, 1))",
        "plan.noise_stddev / 2 * float(noise.normal(release, 1))",
        SPENDING,
    ),
    Mutant(
        "private scores of one run draw the same noise",
        "core/evaluation/metrics.py",
        "noise.normal(release, 1)",
        "noise.normal(0, 1)",
        EARLY,
    ),
    Mutant(
        "private scores during training not charged",
        STAGE_PLANS,
        "cls(stddev, 1 + at_early + by_epoch)",
        "cls(stddev, 1 + by_epoch)",
        EARLY,
    ),
    Mutant(
        "the choice of a classifier's epoch not charged",
        STAGE_PLANS,
        "cls(stddev, 1 + at_early + by_epoch)",
        "cls(stddev, 1 + at_early)",
        EPOCHS,
    ),
    Mutant(
        "the scores of two epochs share their noise",
        "core/evaluation/private_scores.py",
        "settings.classifier_epochs + epoch - 1",
        "settings.classifier_epochs",
        EPOCHS,
    ),
    Mutant(
        "private accuracy not charged",
        PLAN,
        CHARGED,
        f"{CHARGED} if name != 'score'",
        ("tests/unit/test_scopes.py",),
    ),
    Mutant(
        "a sweep's target given to every trial",
        SCOPES,
        "math.sqrt(2 * room / order / privacy.num_shares)",
        "math.sqrt(2 * room / order)",
        ("tests/unit/test_scopes.py",),
    ),
    Mutant(
        "selection: phi' at the wrong end of a grid cell",
        SELECTED,
        "np.concatenate([[0.0], ends]), np.concatenate([reach, [1.0]])",
        "np.concatenate([[0.0], ends]), np.concatenate([sticks[-1:], reach])",
        BEST,
    ),
    Mutant(
        "selection: one direction only",
        SELECTED,
        "for forth, back in (deltas, deltas[::-1])",
        "for forth, back in (deltas,)",
        BEST,
    ),
    Mutant(
        "selection: the mass at infinity dropped",
        SELECTED,
        "slopes @ falls + most * sticks[-1]",
        "slopes @ falls",
        BEST,
    ),
    Mutant("audit: DP-SGD noise halved", DP_SGD, NOISE, f"{NOISE} / 2", AUDIT),
    Mutant(
        "audit: no delta in its bound",
        "core/evaluation/audit.py",
        "reached + 2 * canaries * delta * steepest",
        "reached",
        AUDIT,
    ),
    Mutant(
        "audit: right guesses held for rarer than they are",
        "core/evaluation/audit.py",
        "1 / (1 + math.exp(-epsilon))",
        "1 / (1 + math.exp(-epsilon / 2))",
        AUDIT,
    ),
    Mutant(
        "audit: each bound fails as often as all together may",
        "core/evaluation/audit.py",
        "(1 - CONFIDENCE) / (2 * len(_GUESSED))",
        "1 - CONFIDENCE",
        AUDIT,
    ),
    Mutant(
        "audit: canaries far from synthetic images are guessed",
        "core/evaluation/audit.py",
        "scores[own] = -found.distances",
        "scores[own] = found.distances",
        AUDIT,
    ),
    Mutant(
        "audit: a bound above epsilon is no failure",
        PROVEN,
        'each["epsilon_lower_bound"] > each["epsilon"]',
        "False",
        AUDIT,
    ),
    Mutant(
        "audit: another one makes a failure forgotten",
        PROVEN,
        "**found, **stays}",
        "**found}",
        AUDIT,
    ),
    Mutant(
        "audit: what a plan's noise spends is held for what the plan states",
        "core/commands/audit.py",
        "min(plan.epsilon, plan.epsilon_dp_sgd)",
        "plan.epsilon_dp_sgd",
        AUDIT,
    ),
    Mutant(
        "a card is made of a plan that was not charged",
        "core/privacy/ledger/card.py",
        'for event in entry["events"]] != planned:',
        'for event in entry["events"]] == []:',
        ("tests/unit/test_card.py",),
    ),
    Mutant(
        "a release states whatever epsilon its file says",
        "core/publish/release.py",
        "resumed_plan(config, run.plan())",
        "run.plan()",
        CLAIMS,
    ),
    Mutant(
        "audit: of another plan",
        PROVEN,
        'found.get("plan") == _about(run)["plan"]',
        "True",
        AUDIT,
    ),
    Mutant(
        "audit: a bundle holds all that it found",
        PROVEN,
        'form: each["epsilon_lower_bound"] for',
        "form: each for",
        AUDIT,
    ),
    Mutant(
        "attack: members and non-members changed over",
        TRADE_OFF,
        "hockey_sticks(with_record, without, step)",
        "hockey_sticks(without, with_record, step)",
        ATTACKS,
    ),
    Mutant(
        "attack: what a scope proves at one epsilon taken for all",
        SHARES,
        "self.delta_of_all(self.largest, epsilon)",
        "self.delta_of_all(self.largest, self.epsilon)",
        ("tests/unit/test_tuning_shares.py",),
    ),
    Mutant(
        "ledger: a kept composition that others wrote is believed",
        KEPT_CODE,
        'if not hmac.compare_digest(whole[:_SEAL], hmac.digest(key, whole[_SEAL:], "sha256")):',
        "if len(whole) <= _SEAL:",
        KEPT_TESTS,
    ),
    Mutant(
        "tuning: a trial without the final reference takes all that all have",
        SCOPES,
        "if not final and not privacy.is_final_run:",
        "if False:",
        ("tests/unit/test_tuning_shares.py",),
    ),
    Mutant(
        "attack: half of the false alarms",
        TRADE_OFF,
        "ratios * false_alarms + sticks",
        "ratios * false_alarms / 2 + sticks",
        ATTACKS,
    ),
    Mutant(
        "attack: ratios of another grid",
        "core/privacy/accounting/profile.py",
        "ratios = np.exp(places * step)",
        "ratios = np.exp(places * step / 2)",
        ATTACKS,
    ),
    Mutant(
        "attack: the epsilon of a selection left out",
        "core/privacy/ledger/totals.py",
        "math.exp(min(sum(targets), 700.0)) * false_alarms",
        "false_alarms",
        ATTACKS,
    ),
    Mutant(
        "attack: a sweep's Renyi divergence halved",
        SCOPES,
        "exponent = min(epsilon - renyi.offset(order, delta), _LARGEST_EXPONENT)",
        "exponent = min(epsilon - renyi.offset(order, delta), _LARGEST_EXPONENT) / 2",
        ATTACKS,
    ),
    Mutant(
        "selection: a trial compared with the reference at one epsilon alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[:, int(self.epsilon / step / 2)].max()",
        BOUNDED,
    ),
    Mutant(
        "selection: a trial compared with the reference in one direction alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[0].max()",
        BOUNDED,
    ),
    Mutant(
        "selection: a reference that exceeds the target",
        SCOPES,
        "> 1 + _ROUNDING:\n",
        "> 1e9:\n",
        BOUNDED,
    ),
    Mutant(
        "tuning: a trial compared with its reference at one epsilon alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[:, 0].max()",
        TUNED,
    ),
    Mutant(
        "tuning: a trial compared with its reference in one direction alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[1].max()",
        TUNED,
    ),
    Mutant(
        "tuning: one tuning trial composed for all",
        PAIRS,
        "composed([each], [count], step)",
        "composed([each], [1], step)",
        TUNED,
    ),
    Mutant(
        "tuning: the final run at what tuning trials add instead of what they leave",
        PAIRS,
        "left = epsilon - apart *",
        "left = epsilon + apart *",
        TUNED,
    ),
    Mutant(
        "tuning: a final run's own tail left out",
        "core/privacy/accounting/profile.py",
        "deltas = way.infinite + upper[above]",
        "deltas = upper[above]",
        TUNED,
    ),
    Mutant(
        "tuning: losses below 0 dropped from the pair",
        PAIRS,
        "seen = below * against[: len(below)]",
        "seen = 0 * below * against[: len(below)]",
        TUNED,
    ),
    Mutant(
        "tuning: the tails of the references not kept back",
        SHARES,
        "return composed + (1 + _CUT) * _COMPOSED_SLACK * self.delta",
        "return composed",
        TUNED,
    ),
    Mutant(
        "tuning: a profile that ends above what is kept back",
        SHARES,
        "(deltas > _CUT * tail)",
        "(deltas > 8 * tail)",
        TUNED,
    ),
    Mutant(
        "tuning: every tuning trial has the reference of the final run",
        SCOPES,
        "reference=final if last else tuning",
        "reference=final",
        TUNED,
    ),
    Mutant(
        "tuning: more trials than have references",
        "core/privacy/ledger/admission.py",
        "if others >= most.get(key.stage, 0):",
        "if others > 10**9:",
        TUNED_RUNS,
    ),
    Mutant(
        "tuning: trials charged one by one",
        BUDGET,
        "bool(self.selection or self.tuning_trials)",
        "bool(self.selection)",
        TUNED_RUNS,
    ),
    Mutant(
        "sweep: a trial compared with the reference at one epsilon alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[:, 0].max()",
        CAPPED,
    ),
    Mutant(
        "sweep: a trial compared with the reference in one direction alone",
        SHARES,
        "(deltas / bound).max()",
        "(deltas / bound)[0].max()",
        CAPPED,
    ),
    Mutant(
        "sweep: fewer references composed than there are trials",
        SHARES,
        "return ((largest, self.trials),)",
        "return ((largest, self.trials - 1),)",
        CAPPED,
    ),
    Mutant(
        "sweep: the reference taken from the trial itself",
        SCOPES,
        '"tuning_reference", replace(alike, reference=reference))',
        '"tuning_reference", alike)',
        CAPPED,
    ),
    Mutant(
        "sweep: more trials than were composed",
        "core/privacy/ledger/admission.py",
        'most, paid = {"all": trials}',
        'most, paid = {"all": 10**9}',
        CAPPED,
    ),
    Mutant(
        "sweep: trials below references charged by the filter",
        BUDGET,
        "if last or (privacy.has_shares and privacy.tuning_reference):",
        "if last:",
        CAPPED,
    ),
    Mutant(
        "a sweep forgets its earlier trials",
        "core/privacy/ledger/admission.py",
        'totals.within(within, [*others, Charge(asked.events, "", "")])',
        'totals.within(within, [Charge(asked.events, "", "")])',
        SPENDING,
    ),
    Mutant(
        "a selection's trials counted one by one elsewhere",
        "core/privacy/ledger/book.py",
        "return self.within.epsilon if self.within.is_one_release else 0.0",
        "return 0.0",
        SECRET,
    ),
    Mutant(
        "the delta of a selection not added",
        "core/privacy/ledger/totals.py",
        "bool(events) + len(targets)",
        "bool(events)",
        SECRET,
    ),
    Mutant(
        "a selection begun anew taken for the same release",
        "core/privacy/ledger/account.py",
        "run_budget(self.config, self._selection())",
        'run_budget(self.config, "the same")',
        SECRET,
    ),
    Mutant(
        "a second trial of a selection leaves",
        "core/privacy/ledger/ledger.py",
        "elif noted != trial:",
        "elif not noted:",
        SECRET,
    ),
    Mutant(
        "MLflow told of all trials of a selection",
        "sweep/driver/launch.py",
        "[*observers, *([] if secret else [mirror])]",
        "[*observers, mirror]",
        ("tests/e2e/test_scopes_in_sweeps.py",),
    ),
    Mutant(
        "the released trial's epsilon stated for each",
        "core/privacy/ledger/card.py",
        "max(plan.epsilon, ledger.largest_epsilon(run))",
        "plan.epsilon",
        SECRET,
    ),
    Mutant(
        "a claim while trials of the sweep are still to come",
        "sweep/results/table.py",
        "if covers.claims_each and (left := num_left(sweep, rows)):",
        "if (left := 0):",
        CLAIMS,
    ),
    Mutant(
        "the first trial of a sweep given beforehand",
        "core/privacy/ledger/card.py",
        'in_sweep = searched or run in summary["sweeps"]',
        "in_sweep = searched",
        CLAIMS,
    ),
    Mutant(
        "epsilons rounded to the nearest",
        "core/privacy/accounting/rounding.py",
        "_rounded(bound, digits, ROUND_CEILING)",
        "_rounded(bound, digits, 'ROUND_HALF_EVEN')",
        ("tests/unit/test_rounding.py",),
    ),
    Mutant(
        "lines verified before are trusted, whatever they are now",
        "core/privacy/ledger/file.py",
        "hashlib.sha256(content[:length]).digest() != digest",
        "len(content) < length",
        ("tests/unit/test_ledger.py",),
    ),
    Mutant(
        "lines added up before count, whatever they are now",
        "core/privacy/ledger/book.py",
        'count > len(chain.entries) or chain.entries[count - 1]["hash"] != last',
        "count > len(chain.entries)",
        ("tests/unit/test_ledger.py",),
    ),
    Mutant(
        "a lost count of an open run is taken for none",
        SPENDING_CODE,
        "    except ValueError:\n        return None",
        "    except ValueError:\n        return 0",
        CHARGES,
    ),
    Mutant(
        "a count older than the checkpoint is believed",
        SPENDING_CODE,
        "not resumed <= begun",
        "not settled <= begun",
        CHARGES,
    ),
    Mutant(
        "what the ledger has settled is forgotten when a run goes on",
        SPENDING_CODE,
        "begun = max(settled, *(",
        "begun = max(0, *(",
        CHARGES,
    ),
    Mutant(
        "a lease is accepted after its end",
        SPENDING_CODE,
        'not in ("", self._holder)',
        "in ()",
        OF_KEEPER,
    ),
    Mutant(
        "a worker settles after the end of its lease",
        SPENDING_CODE,
        "if self._counters[0].exists():",
        "if False:",
        OF_KEEPER,
    ),
    Mutant(
        "steps run on after the trial is settled",
        SPENDING_CODE,
        '" nobody, as it is settled"',
        '""',
        CHARGES,
    ),
    Mutant(
        "a commit is acknowledged before it is written",
        KEEPER,
        "answer = getattr(account, question)(*arguments)",
        'answer = account._begun if question == "commit" else '
        "getattr(account, question)(*arguments)",
        OF_KEEPER,
    ),
    Mutant(
        "a step begins before the keeper has counted it",
        KEEPER,
        'self._asked("count", step)',
        "pass",
        OF_KEEPER,
    ),
    Mutant(
        "a stopped run tells fewer steps than its ledger counts",
        "core/pipeline/run.py",
        "plan.epsilon_after(steps)",
        "plan.epsilon_after(stop.step - run.config.warm_up_steps)",
        EARLY,
    ),
    Mutant(
        "a kept composition of other mechanisms stands for those that were settled",
        KEPT_CODE,
        "any(count > wanted.get(mechanism, 0) for mechanism, count in have.items())",
        "False",
        KEPT_TESTS,
    ),
    Mutant(
        "a kept composition for another relation is taken",
        KEPT_CODE,
        '(about["by"], about["relation"], about["grid"]) != (_version(), relation, grid)',
        '(about["by"], about["grid"]) != (_version(), grid)',
        KEPT_TESTS,
    ),
    Mutant(
        "what was settled since a composition was kept costs nothing",
        KEPT_CODE,
        "        total = _joined(total, new, relation, grid)",
        "        total = total or _joined(total, new, relation, grid)",
        KEPT_TESTS,
    ),
    Mutant(
        "trials that run cost nothing beside a kept composition",
        KEPT_CODE,
        "_less(_counts(everything), wanted)",
        "_less(wanted, wanted)",
        KEPT_TESTS,
    ),
    Mutant(
        "a lost ledger of which a note tells is not shown",
        "core/privacy/ledger/sources.py",
        "            names.add(name)",
        "            pass",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "a ledger shorter than noted is accepted",
        "core/privacy/ledger/notes.py",
        "if 0 <= number < len(entries) and",
        "if number >= len(entries) or",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "a loss that is noted already explains an older copy",
        "core/privacy/ledger/notes.py",
        'any(entry["hash"] not in note["losses"] for entry in losses)',
        "bool(losses)",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "a lost ledger that a note knows of is begun anew",
        "core/privacy/ledger/file.py",
        "for place in (beside_secret(path), *notes) if os.path.exists(place)]",
        "for place in () if os.path.exists(place)]",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "a lost ledger that its lock knows of is begun anew",
        "core/privacy/ledger/file.py",
        "if absent and (witnesses or not create) and not copied:",
        "if absent and (known or not create) and not copied:",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "a ledger cut to its first line, without its head, is accepted",
        "core/privacy/ledger/file.py",
        "begun = os.fstat(descriptor).st_size > 0",
        "begun = False",
        LOSSES_OF_LEDGERS,
    ),
    Mutant(
        "two machines make the copy of one line",
        COPY,
        ', IfNoneMatch="*")',
        ")",
        OF_COPY,
    ),
    Mutant(
        "a line is written although its copy is another machine's",
        COPY,
        "return self.line(name, number) == line",
        "return bool(self.line(name, number))",
        OF_COPY,
    ),
    Mutant(
        "a store that overwrites is taken for the copy",
        COPY,
        """        if self._created(key, b""):
""",
        """        if not self._created(key, b""):
            return
        if not key:
""",
        OF_COPY,
    ),
    Mutant(
        "a copy with a gap is restored up to it",
        COPY,
        "if numbers != [*range(first, first + len(numbers))]:",
        "if numbers != sorted(numbers):",
        OF_COPY,
    ),
    Mutant(
        "a restored ledger lacks its last line",
        "core/privacy/ledger/file.py",
        "for number in range(known, copied):",
        "for number in range(known, copied - 1):",
        OF_COPY,
    ),
    Mutant(
        "a ledger goes on beside the copy of another history",
        "core/privacy/ledger/file.py",
        "if last >= 0 and self._copy.line(name, last) !=",
        "if last < 0 and self._copy.line(name, last) !=",
        OF_COPY,
    ),
    Mutant(
        "a run's key for the durable copy is not heeded",
        SPENDING_CODE,
        "keep_copy(self.folder, self.config.runtime.ledger_copy)",
        "keep_copy(self.folder, None)",
        OF_COPY,
    ),
    Mutant(
        "a run is charged whose origin may be lost with its machine",
        "core/pipeline/run.py",
        "distributed.on_rank_0(run.link.keep)  # Its",
        "pass  # Its",
        OF_COPIES,
    ),
    Mutant(
        "released images are used that may be summed again elsewhere",
        "core/training/checkpoint.py",
        "        self.keep()\n",
        "",
        OF_COPIES,
    ),
    Mutant(
        "a private early score is told that may be drawn again elsewhere",
        "core/pipeline/early_scores.py",
        "        self._run.link.keep()\n",
        "",
        OF_COPIES,
    ),
    Mutant(
        "a private score is told that may be drawn again elsewhere",
        "core/evaluation/private_scores.py",
        "        self.keep()\n",
        "",
        OF_COPIES,
    ),
    Mutant(
        "a copy keeps an older state of a file of the same size",
        COPIES,
        "(known.size, known.mtime) == (state.st_size, state.st_mtime_ns)",
        "known.size == state.st_size",
        OF_COPIES,
    ),
    Mutant(
        "a worker that was given up writes over its heir's copy",
        COPIES,
        "if last > self.session:",
        "if last < self.session:",
        OF_COPIES,
    ),
    Mutant(
        "the private inspection of a run goes to its copy",
        "sweep/trials/own_folder.py",
        "never = RunFolder(self.path).non_private.name",
        "never = None",
        OF_COPIES,
    ),
    Mutant(
        "a lost ledger that the sources know of is begun anew",
        SPENDING_CODE,
        "Ledger.open(self.folder, terms, self.lease, [*notes], known)",
        "Ledger.open(self.folder, terms, self.lease, [*notes])",
        CHARGES,
    ),
    Mutant(
        "data sets of a family have a budget each",
        "core/privacy/ledger/names.py",
        "hexdigest() if family else fingerprint",
        "hexdigest() if family is None else fingerprint",
        CHARGES,
    ),
    Mutant(
        "one release of each mechanism counted",
        "core/privacy/accounting/exact.py",
        "release.self_compose(count)",
        "release",
        ("tests/unit/test_loss_distribution.py",),
    ),
    Mutant(
        "a figure of Renyi DP called PLD",
        "core/privacy/accounting/solve.py",
        "(LARGEST < epsilon < math.inf or delta < least):\n        return",
        "False:\n        return",
        FAR,
    ),
    Mutant(
        "PLD believed below the delta that it resolves",
        "core/privacy/accounting/mechanism.py",
        "return 1e-12 + 1e-14 * sum(count for *_, count in mechanisms)",
        "return 1e-15",
        FAR,
    ),
    Mutant(
        "Renyi DP of one relation taken for the other",
        "core/privacy/accounting/solve.py",
        'renyi.epsilon(mechanisms, delta), relation == "zero_out"',
        "renyi.epsilon(mechanisms, delta), True",
        FAR,
    ),
    Mutant(
        "a term of Renyi DP's small orders lost",
        "core/privacy/accounting/renyi.py",
        "for power, side in ((j, 1.0), (order - j, -1.0))",
        "for power, side in ((j[:2], 1.0), (order - j[:2], -1.0))",
        FAR,
    ),
    Mutant(
        "a rank whose group is lost trains alone",
        "core/distributed.py",
        "        _group.set()\n",
        "        return True\n",
        ("tests/unit/test_distributed.py",),
    ),
    Mutant(
        "secret number of trials of a smaller mean",
        SCOPES,
        "uniform: float, law: str, mean: float) -> int:",
        "uniform: float, law: str, mean: float) -> int:\n    mean = 0.9 * mean",
        ("tests/statistical/test_selection.py",),
    ),
    Mutant(
        "a resumed run draws new noise",
        "core/pipeline/run.py",
        'noise=run.stream("private_training", "noise")',
        'noise=run.stream("private_training", f"noise {time.time()}")',
        ("tests/integration/test_replay.py",),
    ),
    Mutant(
        "different central images of a sweep counted as one release",
        "core/privacy/ledger/totals.py",
        '(event.release, event) if event.release else ("", number)',
        '("", event.kind) if event.release else ("", number)',
        SHARED,
    ),
    Mutant(
        "central images charged as shared, but drawn anew by each trial",
        "core/pipeline/context.py",
        'self.identity.central if stage == "central_images" else self.identity.run',
        "self.identity.run",
        SHARED,
    ),
    Mutant(
        "other code draws the same noise",
        "core/pipeline/identity.py",
        "    run = digest_of(parts)\n",
        "    run = digest_of(parts | {'computed by': {}})\n",
        CHANGED,
    ),
    Mutant(
        "other code draws the same noise on a sweep's central images",
        "core/pipeline/identity.py",
        "        shared_central = digest_of(central)\n",
        "        shared_central = digest_of(central | {'computed by': {}})\n",
        CHANGED,
    ),
    Mutant(
        "the code of the loss decides nothing",
        "core/io/code_digest.py",
        '"evaluation/membership.py"',
        '"evaluation/membership.py", "diffusion/loss.py"',
        ("tests/unit/test_code_digest.py",),
    ),
    Mutant(
        "a search that learns from results counts as one that ignores them",
        "sweep/config/scope.py",
        'settings["privacy.adaptive"] = sampler not in NON_ADAPTIVE',
        'settings["privacy.adaptive"] = False',
        ("tests/unit/test_sweep_config.py",),
    ),
)


def killed(mutant: Mutant) -> bool:
    """Whether the tests fail on the mutant.

    Raises:
        ValueError: the text to replace is not found exactly once.
    """
    source = (ROOT / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text is not found exactly once in {mutant.file}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("core", "sweep", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    # 1 is a failed test; anything else, such as an import error, proves nothing.
    if ended.returncode not in (0, 1):
        raise ValueError(f"{mutant.name}: pytest ended with {ended.returncode}\n{ended.stdout}")
    return ended.returncode == 1


def main() -> int:
    """Runs all mutants, two at a time; 0 if every one of them was killed."""
    began, survivors = time.monotonic(), 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for mutant, dead in zip(MUTANTS, pool.map(killed, MUTANTS), strict=True):
            survivors += not dead
            seconds = time.monotonic() - began
            print(
                f"{seconds:6.0f} s  {'killed' if dead else 'SURVIVED':<8}  {mutant.name}",
                flush=True,
            )
    print(f"{len(MUTANTS)} mutants, {len(MUTANTS) - survivors} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

"""What do latent actions contain? Correlations, probes, swaps, pairs (Sec. IV, Q4; Table III, Fig. 7).

    python cca.py                                        # runs/pretrain/last.pt on data/robot
    python cca.py --checkpoint A/last.pt B/last.pt       # both in one table; swap and pairs use the first
    python cca.py --smoke                                # a few windows, to check that everything runs

A pretrained policy has never seen an action. This script compares its latent actions z with the true actions
a of labelled demonstrations. Canonical correlation analysis (CCA) finds pairs of directions, one in each
space, whose projections correlate most. Each pair is uncorrelated with all pairs before it:

    rho_i = max corr(A_i^T z, B_i^T a)    solved by the SVD of  S_zz^-1/2 S_za S_aa^-1/2         (Eq. 8, 9)

Directions and ridge are fitted on training episodes. The correlations are measured on held-out episodes, with
95 % intervals from resampling these episodes. On the rows that it was fitted on, CCA overfits: 70 latent and
70 action columns correlate even if they are independent. The paper reports such in-sample values; here they
have their own column. Latent actions are a function of the image and the instruction, and so are the actions
of an expert. ANY function of the image thus correlates with the actions: compare with the baselines.

    1 statistics    cca_fit, choose_ridge, correlation, r2, bootstrap
    2 inputs        policies, labelled windows, video clips
    3 analyses      correlations, probes, collapse, swap, pairs: each returns (title, rows, picture)
    4 report        report.html, cca.json and the pictures, written to --out
"""
import argparse
import base64
import html
import inspect
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from scipy.spatial.distance import cdist
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (HelpFormatter, InputError, InverseDynamics, WorldModel, at_least, by_position, file_hash,
                    load_policy, make_policy, markdown_table, optical_flow, pick_device, provenance,
                    r_squared, ridge_probe, run, targets, to_device, write_atomically, write_json)
from prepare_data import EpisodeDataset, read_manifest

SMOKE = dict(max_windows=300, random_policies=1, clips=24)
RESAMPLES = 500                         # bootstrap samples of the held-out episodes
FEWEST_EPISODES = 5                     # no interval is given for fewer held-out episodes
FOLDS = 5                               # cross-validation over training episodes
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)       # added to variances of 1; the first of equally good ones is chosen
BUDGETS = (1, 5, 10, 50)                # numbers of labelled episodes that a probe is fitted on
DRAWS = 5                               # random choices of that many episodes
MOVES_METRES, MOVES_PIXELS = 0.01, 2.0  # the direction of a shorter motion is not compared
SIDE = 16                               # pixels, of the small frames that serve as a baseline
# The paper's four groups (Table III). ASSUMPTION: the paper does not say which verbs belong to which group.
GROUPS = {"Put": "put place stack insert drop pour", "Move": "move push pull slide turn rotate open close",
          "Remove": "remove", "Take": "take pick grab lift"}


def group_of(instruction):
    """The task group of the first word of an instruction that GROUPS lists, or "other"."""
    return next((group for word in instruction.lower().split() for group, verbs in GROUPS.items()
                 if word in verbs.split()), "other")


# ---- 1 statistics ----------------------------------------------------------------------------------------


def cca_fit(X, Y, ridge=1e-3):
    """Canonical directions of X (N, dx) and Y (N, dy) -> A (dx, r), B (dy, r) with r = min(dx, dy).
    corr(X A_i, Y B_i) falls with i.

    The ridge is added to the variances of the standardised columns, so it has no unit.
    """
    def inverse_root(S):
        values, vectors = np.linalg.eigh(S + ridge * np.eye(len(S)))
        return vectors / np.sqrt(values) @ vectors.T

    S, dx = np.cov(np.c_[X, Y], rowvar=False, bias=True), X.shape[1]
    scale = np.sqrt(S.diagonal())
    scale = np.where(scale > 1e-9, scale, 1)                    # a column may be constant in a fold
    S = S / np.outer(scale, scale)
    white_x, white_y = inverse_root(S[:dx, :dx]), inverse_root(S[dx:, dx:])
    left, _, right = np.linalg.svd(white_x @ S[:dx, dx:] @ white_y, full_matrices=False)          # (Eq. 8, 9)
    return white_x @ left / scale[:dx, None], white_y @ right.T / scale[dx:, None]


def choose_ridge(X, Y, episode):
    """The ridge of RIDGES whose directions correlate most on validation episodes (cross-validation over
    episodes). X (N, dx), Y (N, dy), episode (N,)."""
    fold = np.unique(episode, return_inverse=True)[1] % FOLDS

    def validate(k, ridge):
        A, B = cca_fit(X[fold != k], Y[fold != k], ridge)
        return correlation(np.ones((1, (fold == k).sum())), X[fold == k] @ A, Y[fold == k] @ B).sum()

    # Rounded, so that rounding errors do not decide between equally good ridges.
    return max(RIDGES, key=lambda ridge: sum(validate(k, ridge) for k in np.unique(fold)).round(9))


# The next three functions compute statistics of S weighted samples at once -> (S, d). weights (S, N) says how
# often each row counts in each sample.


def mean(weights, x):
    """Means of the columns of x (N, d); nan where all weights are 0."""
    with np.errstate(invalid="ignore"):
        return weights @ x / weights.sum(1, keepdims=True)


def correlation(weights, u, v):
    """Correlations of the columns of u and v (N, d), column by column; 0 where one of them is constant."""
    u, v = u - u.mean(0), v - v.mean(0)
    mean_u, mean_v = mean(weights, u), mean(weights, v)
    variances = (mean(weights, u * u) - mean_u ** 2) * (mean(weights, v * v) - mean_v ** 2)
    covariance = mean(weights, u * v) - mean_u * mean_v
    return np.where(variances > 1e-20, covariance / np.sqrt(np.maximum(variances, 1e-20)), 0.0)


def r2(weights, predicted, true):
    """R2 of predictions (N, d); nan where the truth is constant. In a sample where it hardly varies, the
    variance is taken as 1 % of that of all rows."""
    true, error, floor = true - true.mean(0), (true - predicted) ** 2, 0.01 * true.var(0)
    variance = mean(weights, true ** 2) - mean(weights, true) ** 2
    return 1 - mean(weights, error) / np.maximum(variance, np.where(floor > 1e-14, floor, np.nan))


def bootstrap(statistic, columns, episode, seed):
    """A statistic of all rows, then of RESAMPLES bootstrap samples of the episodes -> (1 + RESAMPLES, d).

    statistic  function of weights (S, N) and the columns -> (S, d)
    columns    arrays (N, d)
    episode    (N,), or (N, 2) if a row belongs to two episodes, as a pair of clips does: both are resampled

    Rows of an episode are alike: drawing single rows would give intervals that are far too narrow. With fewer
    than FEWEST_EPISODES episodes the samples are nan.
    """
    ids, which = np.unique(episode, return_inverse=True)
    E = len(ids)
    drawn = np.random.default_rng(seed).multinomial(E, np.full(E, 1 / E), RESAMPLES)
    weights = np.r_[np.ones((1, E)), drawn][:, which.reshape(len(episode), -1)].prod(-1)   # (1 + R, N)
    samples = statistic(weights, *columns)
    samples[1:] = samples[1:] if E >= FEWEST_EPISODES else np.nan
    return samples


def estimate(samples):
    """(1 + R,) of bootstrap() -> [value, low, high] with a 95 % interval; None stands for unknown."""
    kept = samples[1:][np.isfinite(samples[1:])]
    ends = np.percentile(kept, (2.5, 97.5)).tolist() if len(kept) else [None, None]
    return [float(samples[0]) if np.isfinite(samples[0]) else None, *ends]


# ---- 2 inputs --------------------------------------------------------------------------------------------


def load_models(paths, device):
    """Checkpoints of pretrain.py -> {path: policy, name: inverse dynamics if there is one}, [checkpoint]."""
    models, checkpoints = {}, []
    for path in paths:
        models[path], checkpoint = load_policy(path, device, stage="pretrain")
        checkpoints.append(checkpoint)
        if not all(v.isfinite().all() for part in ("world_model", "inverse")
                   for v in checkpoint.get(part, {}).values()):
            raise InputError(f"{path} has NaN or infinity in its world model: train it again")
        if models[path].chunk != models[paths[0]].chunk:
            raise InputError(f"{path} has chunks of {models[path].chunk} actions, {paths[0]} of "
                             f"{models[paths[0]].chunk}: compare policies of one --chunk")
        if "inverse" in checkpoint:
            inverse = InverseDynamics(checkpoint["world_config"]).to(device).eval()
            inverse.load_state_dict(checkpoint["inverse"])
            models[f"{path}, inverse dynamics (sees the future)"] = inverse
    return models, checkpoints


def open_data(args, checkpoints):
    """-> training and held-out windows of --data, held-out windows of --video (None without video). By its
    stride, a latent action lasts about as long as in pretraining."""
    pretraining, config = checkpoints[0]["data"]["mixture"][0], checkpoints[0]["config"]

    def windows(path, split, cameras, views):
        stride = max(1, round(read_manifest(path)[0]["fps"] * pretraining["stride"] / pretraining["fps"]))
        data = EpisodeDataset(path, config["chunk"], cameras, future=views, split=split, stride=stride)
        if data.image_size != config["image_size"] or len(data.cameras) < cameras:
            raise InputError(f"{path} has {len(data.cameras)} cameras of {data.image_size} pixels, the "
                             f"policies need {cameras} of {config['image_size']}: prepare the data again")
        return data

    cameras = max(len(c["config"]["cameras"]) for c in checkpoints)
    views = max([c["world_config"]["views"] for c in checkpoints if "inverse" in c], default=0)
    train = windows(args.data, "train", cameras, views)
    held_out = windows(args.data, "val", cameras, max(1, views))
    if train.action_dim is None:
        raise InputError(f"{args.data} has no actions to compare with: give labelled demonstrations; "
                         "python prepare_data.py sim makes some in data/robot")
    views, video = checkpoints[0]["world_config"]["views"], args.video or pretraining["path"]
    wanted = video != "none" if args.video else Path(video).exists()
    return train, held_out, windows(video, "val", views, views) if wanted else None


@torch.no_grad()
def random_policies(args, config, data, device):
    """-> {"random 1": untrained policy, ...}. The statistics of the BatchNorms before the tanh are measured
    on windows of the data: with the initial ones (mean 0, variance 1) the latents would hardly vary, and the
    baseline would be too weak."""
    policies = {}
    for k in range(args.random_policies):
        torch.manual_seed(args.seed + k)
        policies[f"random {k + 1}"] = make_policy(config).to(device).eval()
    norms = [m for policy in policies.values() for m in policy.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                    # a cumulative mean over all batches
        norm.train()
    rows = data.spaced(min(512, args.max_windows))
    # A last batch of a single row would have no variance: an incomplete last batch is dropped.
    for batch in DataLoader(Subset(data, rows), batch_size=64, drop_last=len(rows) > 64):
        obs = to_device(batch["obs"], device)
        for policy in policies.values():
            noise = torch.randn(len(obs["instruction"]), policy.chunk, config["latent_dim"], device=device)
            policy.latent_actions({**by_position(obs, policy.cameras), "noise": noise})     # as in training
    for norm in norms:
        norm.eval()
    return policies


def image_motion(frames):
    """Motion in clips (B, T, 3, H, W) in [0, 1] -> displacement (B, 2), place (B, 2), x and y in pixels.

    The optical flow is averaged over the image, weighted by the squared change of each pixel (on a plain
    background the flow merely repeats that of its surroundings), then summed over the frames. The place is
    the mean position of the pixels over all frames, with the same weights.
    """
    grey = frames.mean(2, keepdim=True)                                               # (B, T, 1, H, W)
    flow = 2 * optical_flow(grey).float()                                             # (B, T-1, 2, h, w)
    weight = F.avg_pool2d((grey[:, 1:] - grey[:, :-1]).flatten(0, 1) ** 2, 2)
    weight = weight.unflatten(0, flow.shape[:2])                                      # (B, T-1, 1, h, w)
    motion = ((flow * weight).sum((3, 4)) / weight.sum((3, 4)).clamp(min=1e-6)).sum(1)
    y, x = 2 * torch.stack(torch.meshgrid(*map(torch.arange, flow.shape[3:]), indexing="ij")).to(flow)
    place = (torch.stack([x, y]) * weight).sum((1, 3, 4)) / weight.sum((1, 3, 4)).clamp(min=1e-6)
    return motion.cpu(), place.cpu()


@torch.no_grad()
def collect(models, data, count, device, keep_frames=False):
    """Run policies and inverse dynamics, {name: module}, on `count` evenly spaced windows -> dict of arrays:

    "latents" {name: (N, n, Z)}, "frame" (N, D) small first frames of all cameras, "actions" (N, n, A),
    "is_pad" (N, n), "episode", "t", "instruction_id" (N,). Data with future frames also give "picture"
    (N, 3, H, W) uint8, the first frame of the main camera, and "motion" and "place" (N, 2), see
    image_motion(); with keep_frames also "frames" (N, n+1, 3V, H, W) uint8.
    """
    parts, latents = {}, {name: [] for name in models}
    batches = DataLoader(Subset(data, data.spaced(count)), batch_size=64)
    for batch in tqdm(batches, data.path, unit="batch", leave=False, dynamic_ncols=True):
        obs, frames = to_device(batch.pop("obs"), device), batch.pop("frames", None)
        for name, model in models.items():
            if isinstance(model, InverseDynamics):
                views = model.encoder[0].in_channels // 6                             # 3V of o_k, 3V of o_k+1
                z = model(frames[:, :, :3 * views].to(device))
            else:
                z = model.latent_actions(by_position(obs, model.cameras))
            latents[name].append(z.double().cpu())                                    # (B, n, Z)
        small = [F.adaptive_avg_pool2d(x.float() / 255, SIDE) for x in obs["images"].values()]
        batch["frame"] = torch.cat(small, 1).flatten(1).cpu()
        if frames is not None:
            batch["picture"] = frames[:, 0, :3]
            batch["motion"], batch["place"] = image_motion(frames[:, :, :3].float() / 255)
        if keep_frames:
            batch["frames"] = frames
        for key, values in batch.items():
            parts.setdefault(key, []).append(values)
    return {"latents": {name: torch.cat(z).numpy() for name, z in latents.items()},
            **{key: torch.cat(values).numpy() for key, values in parts.items()}}


def representations(study, steps):
    """What is compared with the actions, rows of training episodes first, then of held-out episodes:

    -> X {name: (N, dx)}, Y (N, dy), episode (N,), held_out (N,) bool, group (N,) of the task
    steps  "single": z_t and a_t; "chunk": all n of both, from windows without padding
    """
    splits = [{**split, **split["latents"]} for split in (study.train, study.held_out)]
    n = study.train["actions"].shape[1] if steps == "chunk" else 1

    def join(key):
        return np.concatenate([split[key][~split["is_pad"][:, :n].any(1)] for split in splits])

    episode, instruction = join("episode"), join("instruction_id")
    held_out = np.isin(episode, study.held_out["episode"])
    X = {name: join(name)[:, :n].reshape(len(episode), -1) for name in study.train["latents"]}
    Y = join("actions")[:, :n].reshape(len(episode), -1).astype(float)
    # The frame and the time get as many columns as the latents, for a fair comparison. Frame: its principal
    # components. Time: one indicator per instruction (at most half of the columns), then cosines.
    latents, frames = X[study.names[0]], study.train["frame"]
    width = latents.shape[1]
    axes = np.linalg.eigh(np.cov(frames, rowvar=False))[1][:, ::-1][:, :width]        # (D, width)
    X["frame"] = (join("frame") - frames.mean(0)) @ axes
    named = instruction[:, None] == np.arange(min(len(study.instructions) - 1, width // 2))
    order = np.arange(1, width - named.shape[1] + 1)
    X["time"] = np.c_[named, np.cos(np.pi * order * join("t")[:, None] / (study.train["t"].max() + 1))]
    rng = np.random.default_rng(study.args.seed)
    X["shuffled"] = np.concatenate([rng.permutation(latents[half]) for half in (~held_out, held_out)])
    X["true actions"] = Y
    group = np.array([group_of(text) for text in study.instructions])[instruction]
    return X, Y, episode, held_out, group


# ---- 3 analyses ------------------------------------------------------------------------------------------

# Each takes the study (see main) and returns a title, the rows of a table, and a figure or None. A row is a
# dict of text, numbers and estimates [value, low, high]; its "detail" is only written to cca.json. The report
# prints the docstring as the explanation. An analysis that raises InputError is left out, with a note.


def analyse(X, Y, episode, held_out, seed):
    """CCA between X (N, dx) and Y (N, dy), fitted on training rows, measured on the rows held_out (N,) ->
    samples of bootstrap() (1 + R, dy), in-sample correlations (dy,), ridge. InputError if there are too few.

    Constant columns are left out. Components that X has too few columns for count as 0.
    """
    fit = ~held_out
    episodes = [len(np.unique(episode[half])) for half in (fit, held_out)]
    if min(episodes) < 2:
        raise InputError("{} training and {} held-out episodes have such windows, but at least 2 of each are "
                         "needed: prepare more demonstrations".format(*episodes))
    X, Y = (M[:, M[fit].std(0) > 1e-6] for M in (X, Y))
    dx, dy = X.shape[1], Y.shape[1]
    if not dy or fit.sum() <= dx + dy:
        raise InputError(f"{fit.sum()} training windows, but {dx} + {dy} dimensions that vary need more than "
                         f"{dx + dy}: raise --max-windows, or prepare more demonstrations")
    ridge = choose_ridge(X[fit], Y[fit], episode[fit])
    A, B = cca_fit(X[fit], Y[fit], ridge)
    u, v, missing = X @ A, Y @ B, (0, dy - A.shape[1])
    samples = bootstrap(correlation, [u[held_out], v[held_out]], episode[held_out], seed)
    in_sample = correlation(np.ones((1, fit.sum())), u[fit], v[fit])[0]
    return np.pad(samples, [(0, 0), missing]), np.pad(in_sample, missing), ridge


def pooled(results):
    """Results of analyse() of several random policies as one. The bootstrap samples take turns among the
    policies, so that the interval also covers the differences between policies."""
    samples = np.stack([samples for samples, *_ in results])                          # (policies, 1 + R, dy)
    turns = np.arange(samples.shape[1])
    mixed = samples[turns % len(results), turns]
    mixed[0] = samples[:, 0].mean(0)
    return mixed, np.mean([in_sample for _, in_sample, _ in results], 0), None


def correlations(study):
    """CCA between latent actions and true actions, for single steps (z_t, a_t) and for whole chunks, measured
    on held-out episodes. 1 means that one is a linear function of the other, 0 that they are unrelated.

    Random weights, the raw frame, and the time in the episode with the instruction all predict some of an
    expert's actions: "A minus B" is the difference between a pretrained policy and such a baseline, with its
    own interval. The baselines have as many columns as the latents. Shuffled rows must give 0, and the true
    actions 1.

    Intervals: 95 % over the n held-out episodes, for random weights also over the policies. They are too
    narrow for fewer than about 20 episodes and are not given for fewer than 5. "In sample" is the first
    correlation on the training rows, as the paper reports it; it grows with the number of columns.
    """
    rows, panels = [], []
    for steps, title in (("single", "single steps: z_t, a_t"), ("chunk", "whole chunks")):
        X, Y, episode, held_out, group = representations(study, steps)
        groups = np.unique(group)
        for tasks in ("all", *groups) if len(groups) > 1 else ("all",):
            inside = (group == tasks) | (tasks == "all")
            try:
                results = {name: analyse(x[inside], Y[inside], episode[inside], held_out[inside],
                                         study.args.seed) for name, x in X.items()}
            except InputError as reason:
                if not rows:
                    raise InputError(f"{study.args.data}: {reason}") from None
                study.notes.append(f"correlations of {tasks}, {steps}: left out, {reason}")
                continue
            results["random weights"] = pooled([results.pop(name) for name in list(results)
                                                if name.startswith("random ")])
            if tasks == "all":
                curves = {name: list(map(estimate, r[0].T[:10])) for name, r in results.items()}
                panels.append((title, "canonical component (number)", range(1, 1 + len(curves["time"])),
                               curves))
                for name, other in itertools.product(study.names, ("random weights", "frame", "time")):
                    results[f"{name} minus {other}"] = results[name][0] - results[other][0], None, None
            rows += [{"tasks": tasks, "steps": steps, "latents": name, "1st": estimate(samples[:, 0]),
                      "mean": estimate(samples.mean(1)),
                      "in sample": None if in_sample is None else float(in_sample[0]),
                      "n": len(np.unique(episode[inside & held_out])),
                      "detail": {"components": [estimate(s) for s in samples.T], "ridge": ridge,
                                 "windows": [int((inside & half).sum()) for half in (~held_out, held_out)]}}
                     for name, (samples, in_sample, ridge) in results.items()]
    return ("Canonical correlations with the true actions", rows,
            draw("held-out correlation (no unit)", *panels))


def probes(study):
    """R2 of a ridge regression from the latent actions of a chunk to its first true action, on held-out
    episodes. 1 is perfect, 0 is no better than predicting the mean.

    Left, and first columns: fitted on all training windows; 95 % intervals over held-out episodes. Right, and
    last columns: fitted on k labelled episodes, with as many windows of each as --max-windows leaves; mean,
    lowest and highest of five random choices of episodes. "random 1" is one policy with random weights.
    """
    X, Y, episode, held_out, _ = representations(study, "chunk")
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise InputError("nearly all windows are padded: the episodes are shorter than a chunk")
    Y = Y[:, list(study.moves.values())]                        # a chunk begins with the columns of a_t
    Y, Y_test, episode, episode_test = Y[~held_out], Y[held_out], episode[~held_out], episode[held_out]
    ids, rng = np.unique(episode), np.random.default_rng(study.args.seed)
    budgets = {k: [rng.choice(ids, k, replace=False) for _ in range(DRAWS)] for k in BUDGETS if k < len(ids)}
    budgets[len(ids)] = [ids]
    rows = []
    for name in (*study.names, "random 1", "frame", "time"):
        x, x_test = X[name][~held_out], X[name][held_out]
        samples = bootstrap(r2, [ridge_probe(x, Y, x_test, episode), Y_test], episode_test, study.args.seed)
        row = {"latents": name, "mean": estimate(samples[:, np.isfinite(samples[0])].mean(1)),
               **dict(zip(study.moves, map(estimate, samples.T)))}
        for k, draws in budgets.items():
            chosen = [np.isin(episode, draw) for draw in draws]
            scores = [float(np.nanmean(r_squared(ridge_probe(x[i], Y[i], x_test, episode[i]), Y_test)))
                      for i in chosen]
            row[f"from {k}"] = [float(np.mean(scores)), min(scores), max(scores)]
        rows.append(row)
    return "Probes of the true actions", rows, draw(
        "held-out R2 (no unit)",
        ("fitted on all episodes", "action dimension", list(study.moves),
         {row["latents"]: [row[name] for name in study.moves] for row in rows}),
        ("mean over the dimensions",
         f"labelled episodes (number), about {len(Y) / len(ids):.0f} windows each", list(budgets),
         {row["latents"]: [row[f"from {k}"] for k in budgets] for row in rows}))


def collapse(study):
    """Collapsed latent actions are constant (std near 0), vary along one direction only (rank near 1), or
    merely name the task (instruction near 1).

    std: of the dimension that varies least. rank: (sum of eigenvalues)^2 / sum of their squares. saturated:
    share of values beyond 0.98, where the tanh passes hardly any gradient. instruction: share of the variance
    that lies between instructions.
    """
    def rank(x):
        values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        return float(values.sum() ** 2 / np.maximum((values ** 2).sum(), 1e-300))

    rows, ids = [], study.held_out["instruction_id"]
    for name, z in study.held_out["latents"].items():                                 # (N, n, Z)
        if z.std(0).max() < 1e-6:
            study.notes.append(f"the latent actions of {name} are constant: they say nothing")
        flat = z.reshape(len(z), -1)
        between = sum((ids == i).sum() * (flat[ids == i].mean(0) - flat.mean(0)) ** 2 for i in np.unique(ids))
        rows.append({"latents": name, "std": float(z.std(0).mean(0).min()), "rank of z_t": rank(z[:, 0]),
                     "rank of chunks": rank(flat), "saturated": float((np.abs(z) > 0.98).mean()),
                     "instruction": float(between.sum() / np.maximum(len(z) * flat.var(0).sum(), 1e-300))})
    return "Have the latent actions collapsed?", rows, None


def cosine(a, b):
    """Cosines between vectors (..., d) and (..., d), broadcast; 0 where one of them is 0."""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)


@torch.no_grad()
def swap(study):
    """The world model imagines a clip from the first frame of clip B and the latent actions of clip A, which
    is of another episode. If the latents stand for motion, the imagined clip moves as A does. If they mean
    nothing, or if the scene decides, it moves as B does.

    Motion is measured by optical flow. A cosine of 1 is the same direction, 0 is unrelated. Only pairs whose
    true motions are longer than 2 pixels and differ by more than 60 degrees count. If objects of A appear in
    the scene of B, the latents carry more than motion. Intervals: 95 % over the n episodes of A and B.
    """
    config, video, seed = study.checkpoint["world_config"], study.video, study.args.seed
    latents = study.checkpoint["args"]["latents"]
    if video is None:
        raise InputError("there are no video clips: the pretraining video is not here; --video names another")
    if latents == "true" or config["target"] in ("features", "flow") or not config["context_frame"]:
        raise InputError("the world model does not imagine pixels from latents and a first frame: this needs "
                         "another --target or --latents, or --context-frame, in pretrain.py")
    world_model = WorldModel(config).to(study.device).eval()
    world_model.load_state_dict(study.checkpoint["world_model"])
    frames = torch.from_numpy(video["frames"]).to(study.device)                       # (B, n+1, 3V, H, W)
    z = torch.from_numpy(video["latents"][study.names[0]]).float().to(study.device)   # (B, n, Z)
    true, still = frames[:, :, :3].float() / 255, targets(frames[:, :1], config["target"])[0]

    def imagine(z):
        torch.manual_seed(seed)                                                       # the same noise
        start = world_model.context(world_model.embed(frames[:, :1])[:, 0])
        future = world_model.decode(world_model.imagine(start, z), still)             # (B, n, C, h, w)
        return torch.cat([true[:, :1], world_model.picture(future, true[:, 0])], 1)   # (B, n+1, 3, H, W)

    of_a = np.random.default_rng(seed).permutation(len(z))                            # clip A for each clip B
    own, swapped = imagine(z), imagine(z[of_a])
    b, a = video["motion"], video["motion"][of_a]                                     # true motions (B, 2)
    motion_own, motion_swapped = (image_motion(x)[0].numpy() for x in (own, swapped))
    whole, episode = ~video["is_pad"].any(1), np.stack([video["episode"], video["episode"][of_a]], 1)
    counted = whole & whole[of_a] & (episode[:, 0] != episode[:, 1]) & (cosine(a, b) < 0.5)
    counted &= np.minimum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)) > MOVES_PIXELS
    rows = [{"imagined from": source, "compared with": true_motion,
             "mean cosine": None if counted.sum() < 4 else estimate(
                 bootstrap(mean, [cosine(x, y)[counted, None]], episode[counted], seed)[:, 0]),
             "pairs": int(counted.sum()), "n": len(np.unique(episode[counted]))}
            for source, true_motion, x, y in (("B, latents of B", "true motion of B", motion_own, b),
                                              ("B, latents of A", "true motion of A", motion_swapped, a),
                                              ("B, latents of A", "true motion of B", motion_swapped, b))]
    shown = np.flatnonzero(counted | ~counted.any())
    shown = shown[np.linspace(0, len(shown) - 1, min(3, len(shown))).astype(int)]
    pictures = torch.stack([x for i in shown for x in (true[i], own[i], swapped[i], true[of_a[i]])])
    columns = np.unique(np.linspace(0, z.shape[1], min(6, z.shape[1] + 1)).astype(int))
    pictures = (255 * pictures[:, columns].permute(0, 1, 3, 4, 2).cpu().numpy()).astype(np.uint8)
    return "Latent actions of clip A in the scene of clip B", rows, mosaic(
        pictures, [f"frame t + {k}" for k in columns],
        ["B, true", "B, latents of B", "B, latents of A", "A, true"] * len(shown))


def metres_per_unit(action):
    """Unit of the first three actions in metres -> (3,). InputError if they are not changes of a position."""
    units, delta = action["units"][:3], action["delta"][:3]
    lengths = [re.fullmatch(r"([\d.]*) ?m", unit) for unit in units]
    if len(units) < 3 or not all(delta) or not all(lengths):
        raise InputError("the first three actions are not changes of a position (units "
                         f"{list(units)}, delta {list(delta)})")
    return np.array([float(length[1] or 1) for length in lengths])


def pairs(study):
    """Nearest neighbours in the space of latent actions, among held-out clips of other episodes (Fig. 7).

    Two motions agree if their directions differ by less than 60 degrees. Between robot clips the motion is
    the true displacement of the end effector, between robot and video the optical flow. Only clips that move
    more than 1 cm, or 2 pixels, count. "Any such pair" is the rate at which random pairs agree. The pictures
    are evenly spaced over the clips, not selected. Arrows: where and how far a clip moves, by optical flow.
    Intervals: 95 % over the n episodes of the clips.
    """
    def latents(clips, name):                                                         # (N, d), standardised
        main_camera = clips["frame"][:, :3 * SIDE ** 2]
        x = clips["latents"].get(name, main_camera).reshape(len(main_camera), -1)
        return (x - x.mean(0)) / (x.std(0) + 1e-8)

    robot, video, rows, shown = study.held_out, study.video, [], {}
    shift = robot["actions"][:, :, :3].sum(1) * metres_per_unit(study.action)         # (Q, 3), m
    same_task = robot["instruction_id"][:, None] == robot["instruction_id"]
    other_episode = robot["episode"][:, None] != robot["episode"]
    kinds = {"same task, other episode": (robot, shift, shift, MOVES_METRES, same_task & other_episode),
             "other task": (robot, shift, shift, MOVES_METRES, ~same_task)}
    if video is not None and Path(video["path"]).resolve() != Path(study.args.data).resolve():
        kinds["robot and video"] = video, robot["motion"], video["motion"], MOVES_PIXELS, True
    for kind, (bank, a, b, least, allowed) in kinds.items():
        agrees = cosine(a[:, None], b) > 0.5                                          # (Q, M)
        moves = [np.linalg.norm(x, axis=1) > least for x in (a, b)]
        allowed = allowed & moves[0][:, None] & moves[1]
        query = np.flatnonzero(allowed.any(1))
        if not len(query):
            continue
        chance = (agrees & allowed).sum(1)[query] / allowed.sum(1)[query]
        for name in (study.names[0], "random 1", "frame"):
            distance = np.where(allowed, cdist(latents(robot, name), latents(bank, name)), np.inf)
            nearest = distance[query].argmin(1)
            values = np.stack([agrees[query, nearest], chance], 1)
            samples = bootstrap(mean, [values], robot["episode"][query], study.args.seed)
            rows.append({"nearest pairs": kind, "by": name, "motions agree": estimate(samples[:, 0]),
                         "any such pair": estimate(samples[:, 1]), "pairs": len(query),
                         "n": len(np.unique(robot["episode"][query]))})
            if name == study.names[0]:
                shown[kind] = [clip for i in np.linspace(0, len(query) - 1, 6).astype(int)
                               for clip in ((robot, query[i]), (bank, nearest[i]))]
    if not rows:
        raise InputError("no two held-out clips of different episodes move")
    pictures, *arrows = (np.array([[clips[key][i] for clips, i in line] for line in shown.values()])
                         for key in ("picture", "place", "motion"))
    return "Nearest pairs of latent actions", rows, mosaic(
        pictures.transpose(0, 1, 3, 4, 2), ["clip", "nearest"] * 6, list(shown), *arrows)


ANALYSES = (correlations, probes, collapse, swap, pairs)


# ---- 4 report --------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart. Baselines look the same in all pictures.
BASELINES = {"random weights": ("#E69F00", "s"), "random 1": ("#E69F00", "s"), "frame": ("#009E73", "^"),
             "time": ("#CC79A7", "D"), "shuffled": ("#999999", "x"), "true actions": ("#000000", "*")}
OTHERS = [("#0072B2", "o"), ("#D55E00", "v"), ("#56B4E9", "<"), ("#F0E442", ">")]


def mosaic(pictures, columns, rows, places=None, motions=None):
    """Pictures (R, K, h, w, 3) uint8 with the names of columns and rows -> figure. motions (R, K, 2), x and y
    in pixels, are drawn as arrows through the places (R, K, 2)."""
    R, K, h, w, _ = pictures.shape
    figure = Figure(figsize=(2 + K * w / h, 0.4 + R), layout="compressed")
    for (i, k), axes in np.ndenumerate(figure.subplots(R, K, squeeze=False)):
        axes.imshow(pictures[i, k])
        axes.set(xticks=[], yticks=[])
        axes.set_title(columns[k] if i == 0 else "", fontsize=8)
        axes.set_ylabel(rows[i] if k == 0 else "", fontsize=8, rotation=0, ha="right", va="center")
        if motions is not None:
            start, end = (places[i, k] + sign * motions[i, k] / 2 for sign in (-1, 1))
            axes.add_patch(FancyArrowPatch(
                start, end, arrowstyle="simple,head_length=0.8,head_width=0.6", mutation_scale=12, shrinkA=0,
                shrinkB=0, facecolor="white", edgecolor="black", linewidth=0.7))
    return figure


def draw(ylabel, *panels):
    """Panels (title, label of x, K values of x, {name: K estimates}) side by side -> figure."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (title, xlabel, x, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        others = itertools.cycle(OTHERS)
        for k, (name, estimates) in enumerate(curves.items()):
            colour, mark = BASELINES.get(name) or next(others)
            value, low, high = np.array(estimates, float).T
            axes.errorbar(np.arange(len(x)) + 0.08 * (k - len(curves) / 2), value,          # side by side
                          np.clip([value - low, high - value], 0, None), marker=mark, ms=5, elinewidth=0.8,
                          lw=0 if isinstance(x[0], str) else 1.2, capsize=2, color=colour, label=name)
        axes.axhline(0, color="black", lw=0.6)
        axes.grid(alpha=0.3)
        axes.set(ylim=(-0.3, 1.03), title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(range(len(x)), x)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def text_rows(rows):
    """Rows of an analysis -> lists of text, the heading first: numbers rounded, "detail" left out."""
    def text(value):
        if isinstance(value, list):
            value, low, high = value
            ends = f"n < {FEWEST_EPISODES}" if low is None else f"{low:.2f}, {high:.2f}"
            return "-" if value is None else f"{value:.2f} [{ends}]"
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    keys = [key for key in rows[0] if key != "detail"]
    return [keys, *([text(row[key]) for key in keys] for row in rows)]


def html_report(title, facts, sections):
    """One self-contained page -> bytes. sections: (heading, explanation, rows, path of a PNG or None)."""
    style = ("body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "p{max-width:50em}pre{background:#eee;padding:1em;overflow-x:auto;font-size:12px}")
    text = html.escape
    page = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{text(title)}</title>'
            f"<style>{style}</style><h1>{text(title)}</h1><pre>{text(facts)}</pre>"]
    for heading, explanation, rows, picture in sections:
        page += [f"<h2>{text(heading)}</h2>", *(f"<p>{text(x)}</p>" for x in explanation.split("\n\n")),
                 f"<pre>{text(markdown_table(text_rows(rows)))}</pre>"]
        if picture:
            page.append(f'<img alt="{text(heading)}" src="data:image/png;base64,'
                        f'{base64.b64encode(picture.read_bytes()).decode()}">')
    return "\n".join([*page, "</html>\n"]).encode()


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    g = p.add_argument_group("input")
    g.add_argument("--checkpoint", nargs="+", default=["runs/pretrain/last.pt"], help="pretrained policies")
    g.add_argument("--data", default="data/robot", help="labelled demonstrations")
    g.add_argument("--video", help="dataset whose held-out clips swap and pairs use; none = no video "
                   "(default: the first dataset that the first checkpoint was pretrained on)")
    g = p.add_argument_group("analysis")
    g.add_argument("--max-windows", type=int, default=2000, help="windows per split, evenly spaced")
    g.add_argument("--clips", type=int, default=192, help="held-out video clips for swap and pairs")
    g.add_argument("--random-policies", type=int, default=5, help="policies with random weights")
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder for the report (default: cca beside the first checkpoint)")
    g.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    g.add_argument("--seed", type=int, default=0, help="random seed")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    at_least(args, 0, "seed")
    at_least(args, 1, "max_windows", "random_policies")
    at_least(args, 4, "clips")
    return args


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    out = Path(args.out or Path(args.checkpoint[0]).parent / "cca")
    if (out / "cca.json").exists() and not args.overwrite:
        raise InputError(f"{out} already holds a result: --overwrite replaces it, --out writes elsewhere")

    # ---- policies and data ----
    models, checkpoints = load_models(args.checkpoint, device)
    *data, clips = open_data(args, checkpoints)
    models |= random_policies(args, checkpoints[0]["config"], data[0], device)
    train, held_out = (collect(models, d, args.max_windows, device) for d in data)
    shown = {name: models[name] for name in (args.checkpoint[0], "random 1")}
    video = clips and {"path": clips.path, **collect(shown, clips, args.clips, device, keep_frames=True)}
    action, instructions = data[0].attrs["action"], data[0].instructions
    names = action["names"]
    moves = {name if names.count(name) == 1 else f"{name}{d}": d
             for d, name in enumerate(names) if train["actions"][:, 0, d].std() > 1e-6}
    groups = {}
    for text in instructions:
        groups.setdefault(group_of(text), []).append(text)
    study = SimpleNamespace(
        args=args, device=device, notes=[], checkpoint=checkpoints[0],
        names=args.checkpoint,                                  # of the pretrained policies
        train=train, held_out=held_out, video=video,            # see collect(); video may be None
        action=action, moves=moves, instructions=instructions)  # {name: dimension} of actions that vary
    facts = "\n".join([
        *(f"policy       {path}, step {c['step']:,}, hash {file_hash(path)}"
          for path, c in zip(args.checkpoint, checkpoints)),
        f"actions      {len(names)}; constant and left out: {len(names) - len(moves) or 'none'}",
        f"data         {args.data}, {data[0].stride} frames per latent action, hash {data[0].fingerprint}",
        *(f"{use:12s} {d.num_episodes} episodes, {len(split['t']):,} windows"
          for use, d, split in zip(("training", "held-out"), data, (train, held_out))),
        *(f"{group:12s} {', '.join(texts)[:200]}" for group, texts in groups.items())])
    print(facts)

    # ---- analyses ----
    sections, result = [], {}
    for analysis in ANALYSES:
        try:
            title, rows, figure = analysis(study)
        except InputError as reason:
            if not sections:            # without correlations there is nothing to report
                raise
            study.notes.append(f"{analysis.__name__}: left out, {reason}")
            continue
        print(f"\n{title}\n\n{markdown_table(text_rows(rows))}")
        path = figure and out / f"{analysis.__name__}.png"
        out.mkdir(parents=True, exist_ok=True)
        if figure:
            figure.savefig(path, dpi=130)
        sections.append((title, inspect.getdoc(analysis), rows, path))
        result[analysis.__name__] = {"title": title, "rows": rows}

    # ---- report ----
    origin, notes = provenance(), "".join(f"\nnote         {text}" for text in study.notes)
    print(notes)
    facts += f"{notes}\ncommand      {origin['command']}, commit {origin['commit']}, {origin['machine']}"
    write_atomically(out / "report.html",
                     html_report("Latent actions of " + ", ".join(args.checkpoint), facts, sections))
    write_json(out / "cca.json",
               {**result, "facts": facts.splitlines(), "args": vars(args), "provenance": origin})
    print(f"\nwrote        {out}/report.html, cca.json and the pictures")


if __name__ == "__main__":
    run(main)

"""What is in the latent actions? Correlations, probes, swaps, nearest pairs (Sec. IV, Q4; Table III, Fig. 7).

    python cca.py                                        # runs/pretrain/last.pt on data/robot
    python cca.py --checkpoint A/last.pt B/last.pt       # both in one table; swap and pairs use the first
    python cca.py --smoke                                # a few windows, to check that everything runs

The script compares the latent actions z of a pretrained policy, which has never seen an action, with the true
actions a of labelled demonstrations. Canonical correlation analysis (CCA) finds pairs of directions, one in
each space, along which the projections correlate most. Every further pair is uncorrelated with those before:

    rho_i = max corr(A_i^T z, B_i^T a)    solved by the SVD of  S_zz^-1/2 S_za S_aa^-1/2         (Eq. 8, 9)

Directions and ridge are fitted on the training episodes. The correlations are measured on held-out episodes,
with 95 % intervals from resampling these episodes. Two warnings:

1. In sample, CCA of many columns is inflated: 70 latent and 70 action columns correlate in any few hundred
   rows, whatever they mean. The paper's figures are in sample; here they have a column of their own.
2. Latent actions are a function of the picture and the instruction, and so are the actions of an expert: ANY
   function of the picture correlates with the actions. Compare with the baselines in the same table: policies
   with random weights, the raw frame, the time in the episode, shuffled rows. True actions are the ceiling.

    1 statistics    cca_fit, choose_ridge, correlation, r2, bootstrap
    2 inputs        policies, labelled windows, video clips
    3 analyses      correlations, probes, collapse, swap, pairs: each returns (title, rows, picture)
    4 report        report.html, cca.json and the pictures, written to --out
"""
import argparse
import base64
import html
import inspect
import io
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (HelpFormatter, InputError, InverseDynamics, WorldModel, at_least, by_position, file_hash,
                    load_policy, make_policy, markdown_table, optical_flow, pick_device, provenance,
                    ridge_probe, run, to_device, write_atomically, write_json)
from prepare_data import EpisodeDataset, read_manifest

SMOKE = dict(max_windows=300, random_policies=1, clips=24)
RESAMPLES = 500                         # bootstrap samples of the held-out episodes
FEWEST_EPISODES = 5                     # with fewer held-out episodes no interval is given
FOLDS = 5                               # of the cross-validation over training episodes
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)       # added to variances of 1; among equally good ones the first is taken
BUDGETS = (1, 5, 10, 50)                # numbers of labelled episodes that a probe is fitted on
DRAWS = 5                               # random choices of that many episodes
MOVES_METRES, MOVES_PIXELS = 0.01, 2.0  # a chunk that moves less has no direction that could be compared
# The paper's four groups (Table III). ASSUMPTION: the paper does not say which verbs belong to which group.
GROUPS = {"Put": "put place stack insert drop pour", "Move": "move push pull slide turn rotate open close",
          "Remove": "remove", "Take": "take pick grab lift"}


class LeftOut(Exception):
    """Why an analysis, or a part of it, cannot be done with these data: a note in the report."""


def group_of(instruction):
    """Task group of an instruction: that of its first word that GROUPS lists, or "other"."""
    verbs = {verb: group for group, words in GROUPS.items() for verb in words.split()}
    return next((verbs[word] for word in instruction.lower().split() if word in verbs), "other")


# ---- 1 statistics ----------------------------------------------------------------------------------------


def inverse_root(S):
    """S^-1/2 of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(S)
    return vectors / np.sqrt(values) @ vectors.T


def cca_fit(X, Y, ridge=1e-3):
    """Canonical directions of X (N, dx), Y (N, dy) -> a function that projects X (M, dx), Y (M, dy) on them:
    u, v (M, r), r = min(dx, dy). On the fitted rows corr(u_i, v_i) falls with i.

    The ridge is added to the variances of the standardised columns, so it has no unit.
    """
    # A column may be constant in one fold of the cross-validation: its scale must not be 0.
    (mean_x, scale_x), (mean_y, scale_y) = ((M.mean(0), np.maximum(M.std(0), 1e-10)) for M in (X, Y))
    x, y = (X - mean_x) / scale_x, (Y - mean_y) / scale_y
    white_x = inverse_root(x.T @ x / len(x) + ridge * np.eye(x.shape[1]))
    white_y = inverse_root(y.T @ y / len(y) + ridge * np.eye(y.shape[1]))
    left, _, right = np.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y, full_matrices=False)   # (Eq. 8, 9)
    A, B = white_x @ left / scale_x[:, None], white_y @ right.T / scale_y[:, None]    # (dx, r), (dy, r)
    return lambda X, Y: ((X - mean_x) @ A, (Y - mean_y) @ B)


def choose_ridge(X, Y, episode):
    """The ridge of RIDGES whose directions correlate most on episodes that they were not fitted on.

    X (N, dx), Y (N, dy), episode (N,). Each fold of the cross-validation holds whole episodes.
    """
    fold = np.unique(episode, return_inverse=True)[1] % FOLDS

    def score(ridge, k):
        project = cca_fit(X[fold != k], Y[fold != k], ridge)
        return correlation(np.ones((1, (fold == k).sum())), *project(X[fold == k], Y[fold == k])).mean()

    return max(RIDGES, key=lambda ridge: sum(score(ridge, k) for k in np.unique(fold)))


# Statistics of rows that count `weights` (S, N) times, in S samples at once -> (S, d).


def mean(weights, x):
    """Means of the columns of x (N, d); nan where no row counts."""
    with np.errstate(invalid="ignore"):
        return weights @ x / weights.sum(1, keepdims=True)


def correlation(weights, u, v):
    """Correlations of the columns of u and v (N, d); 0 where one of them does not vary."""
    u, v = u - u.mean(0), v - v.mean(0)
    mean_u, mean_v = mean(weights, u), mean(weights, v)
    variances = (mean(weights, u * u) - mean_u ** 2) * (mean(weights, v * v) - mean_v ** 2)
    covariance = mean(weights, u * v) - mean_u * mean_v
    return np.where(variances > 1e-20, covariance / np.sqrt(np.maximum(variances, 1e-20)), 0.0)


def r2(weights, predicted, true):
    """R2 of predictions (N, d); nan where the truth is constant. A sample may lack what varies elsewhere: its
    variance counts as 1 % of that of all rows at least."""
    true, error, floor = true - true.mean(0), (true - predicted) ** 2, 0.01 * true.var(0)
    variance = mean(weights, true ** 2) - mean(weights, true) ** 2
    return 1 - mean(weights, error) / np.maximum(variance, np.where(floor > 1e-14, floor, np.nan))


def bootstrap(statistic, columns, episode, seed):
    """A statistic of the rows, then of RESAMPLES samples of their episodes -> (1 + RESAMPLES, d).

    statistic  function of weights (S, N) and the columns -> (S, d)
    columns    arrays (N, d)
    episode    (N,), or (N, 2) if a row belongs to two episodes, as a pair of clips does: both are resampled

    Whole episodes are drawn: rows of one episode are so similar that drawing single rows would give intervals
    that are far too narrow. With fewer than FEWEST_EPISODES the samples are nan: any interval would mislead.
    """
    ids, which = np.unique(episode, return_inverse=True)
    E = len(ids)
    drawn = np.random.default_rng(seed).multinomial(E, np.full(E, 1 / E), RESAMPLES)
    weights = np.r_[np.ones((1, E)), drawn][:, which.reshape(len(episode), -1)].prod(-1)   # (1 + R, N)
    samples = statistic(weights, *columns)
    samples[1:] = samples[1:] if E >= FEWEST_EPISODES else np.nan
    return samples


def estimate(samples):
    """(1 + R,) of bootstrap() -> [value, low, high], the ends of a 95 % interval; None = not known."""
    kept = samples[1:][np.isfinite(samples[1:])]
    ends = np.percentile(kept, (2.5, 97.5)).tolist() if len(kept) else [None, None]
    return [float(samples[0]) if np.isfinite(samples[0]) else None, *ends]


# ---- 2 inputs --------------------------------------------------------------------------------------------


def load_policies(args, device):
    """-> {name: policy}: the pretrained ones, then "random 1", ...; {name: inverse dynamics}; checkpoints."""
    policies, inverses, checkpoints = {}, {}, []
    for path in args.checkpoint:
        policy, checkpoint = load_policy(path, device, stage="pretrain")
        broken = [k for part in ("world_model", "inverse") for k, v in checkpoint.get(part, {}).items()
                  if not v.isfinite().all()]
        if broken:
            raise InputError(f"{path} holds NaN or infinity in its world model (first: {broken[0]}): its "
                             "training diverged, train again")
        if checkpoints and policy.chunk != checkpoints[0]["config"]["chunk"]:
            raise InputError(f"{path} has chunks of {policy.chunk} actions, {args.checkpoint[0]} of "
                             f"{checkpoints[0]['config']['chunk']}: compare policies of one --chunk")
        policies[path] = policy
        checkpoints.append(checkpoint)
        if "inverse" in checkpoint:
            inverse = InverseDynamics(checkpoint["world_config"])
            inverse.load_state_dict(checkpoint["inverse"])
            inverse.views = checkpoint["world_config"]["views"]
            inverses[f"{path}, inverse dynamics (sees the future)"] = inverse.to(device).eval()
    for k in range(args.random_policies):
        torch.manual_seed(args.seed + k)
        policies[f"random {k + 1}"] = make_policy(checkpoints[0]["config"]).to(device).eval()
    return policies, inverses, checkpoints


def open_windows(path, split, checkpoint, cameras, future):
    """Windows of a dataset, at the stride at which a latent action lasts about as long as in pretraining."""
    pretraining, config = checkpoint["data"]["mixture"][0], checkpoint["config"]
    stride = max(1, round(read_manifest(path)[0]["fps"] * pretraining["stride"] / pretraining["fps"]))
    data = EpisodeDataset(path, config["chunk"], cameras, future=future, split=split, stride=stride)
    if data.image_size != config["image_size"] or len(data.cameras) < cameras:
        raise InputError(f"{path} has {len(data.cameras)} cameras of {data.image_size} pixels, the policies "
                         f"need {cameras} of {config['image_size']}: give other data, or prepare them again")
    return data


def open_data(args, policies, inverses, checkpoint):
    """-> training and held-out windows of --data; held-out video clips, or None if there are none."""
    cameras = max(len(policy.cameras) for policy in policies.values())
    views = max([inverse.views for inverse in inverses.values()], default=0)
    train, held_out = (open_windows(args.data, split, checkpoint, cameras, future)
                       for split, future in (("train", views), ("val", max(1, views))))
    if train.action_dim is None:
        raise InputError(f"{args.data} has no actions to compare with: give labelled demonstrations; "
                         "python prepare_data.py sim makes some in data/robot")
    if min(train.num_episodes, held_out.num_episodes) < 2:
        raise InputError(f"{args.data} has {train.num_episodes} training and {held_out.num_episodes} "
                         "held-out episodes: at least 2 of each are needed")
    path, views = args.video or checkpoint["data"]["mixture"][0]["path"], checkpoint["world_config"]["views"]
    wanted = path != "none" if args.video else Path(path).exists()
    return train, held_out, open_windows(path, "val", checkpoint, views, views) if wanted else None


@torch.no_grad()
def estimate_latent_statistics(policies, data, count, device):
    """Measure the statistics of the BatchNorms before the tanh, for policies that have never been trained.

    With the initial statistics (mean 0, variance 1) the tanh of a random policy would see unscaled numbers,
    and the baseline would be too easy to beat.
    """
    norms = [m for policy in policies for m in policy.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                # a cumulative mean over all batches
        norm.train()
    rows = data.spaced(count)
    # A last batch of one row would have no variance: it is dropped.
    for batch in DataLoader(Subset(data, rows), batch_size=64, drop_last=len(rows) > 64):
        for policy in policies:
            obs = by_position(to_device(batch["obs"], device), policy.cameras)
            obs["noise"] = torch.randn(len(obs["instruction"]), policy.chunk,         # as drawn in training
                                       policy.config["latent_dim"], device=device)
            policy.latent_actions(obs)
    for norm in norms:
        norm.eval()


def thumbnails(images, side=16):
    """Frames (B, C, H, W) uint8 -> (B, C * side * side) in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)


def image_motion(frames):
    """What moves in clips (B, T, 3, H, W) in [0, 1]: how far and where -> (B, 2), (B, 2), x and y in pixels.

    Optical flow, averaged where the picture changes (the squared change is the weight: on a plain ground the
    flow is that of whatever is near) and added up over the frames.
    """
    grey = frames.mean(2, keepdim=True)                                               # (B, T, 1, H, W)
    flow = 2 * optical_flow(grey).float()                                             # (B, T-1, 2, h, w)
    weight = (grey[:, 1:] - grey[:, :-1]) ** 2
    weight = F.avg_pool2d(weight.flatten(0, 1), 2).unflatten(0, weight.shape[:2])     # (B, T-1, 1, h, w)
    motion = ((flow * weight).sum((3, 4)) / weight.sum((3, 4)).clamp(min=1e-6)).sum(1)             # (B, 2)
    h, w = flow.shape[-2:]
    places = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")).to(flow)
    where = 2 * (places * weight).sum((1, 3, 4)) / weight.sum((1, 3, 4)).clamp(min=1e-6)
    return motion.cpu(), where.cpu()


@torch.no_grad()
def collect(policies, inverses, data, count, device, title, keep_frames=False):
    """Run policies and inverse dynamics, {name: module}, on `count` evenly spaced windows -> dict of arrays:

    "latents" {name: (N, n, Z)}, "frame" (N, D) small first frames of all cameras, "actions" (N, n, A),
    "is_pad" (N, n), "episode", "t", "instruction_id" (N,). Of data with future frames also "picture"
    (N, 3, H, W) uint8, the first frame of the main camera, "motion" and "where" (N, 2) of image_motion(), and
    with keep_frames "frames" (N, n+1, 3V, H, W) uint8.
    """
    parts, latents = {}, {name: [] for name in [*policies, *inverses]}
    for batch in tqdm(DataLoader(Subset(data, data.spaced(count)), batch_size=64), title, unit="batch",
                      leave=False, dynamic_ncols=True):
        obs, frames = to_device(batch.pop("obs"), device), batch.pop("frames", None)
        for name, policy in policies.items():
            latents[name].append(policy.latent_actions(by_position(obs, policy.cameras)).cpu())   # (B, n, Z)
        for name, inverse in inverses.items():
            latents[name].append(inverse(frames[:, :, :3 * inverse.views].to(device)).cpu())
        batch["frame"] = torch.cat([thumbnails(x).cpu() for x in obs["images"].values()], 1)
        if frames is not None:
            batch["picture"] = frames[:, 0, :3]
            batch["small picture"] = thumbnails(batch["picture"])
            batch["motion"], batch["where"] = image_motion(frames[:, :, :3].float() / 255)
        if keep_frames:
            batch["frames"] = frames
        for key, values in batch.items():
            parts.setdefault(key, []).append(values)
    return {"latents": {name: torch.cat(z).double().numpy() for name, z in latents.items()},
            **{key: torch.cat(values).numpy() for key, values in parts.items()}}


def clock(split, width, longest, instructions):
    """The time in the episode and the instruction as `width` columns -> (N, width): one column for each
    instruction, half of the columns at most; then cosines of rising order over `longest` frames."""
    named = split["instruction_id"][:, None] == np.arange(min(instructions - 1, width // 2))
    order = np.arange(1, width - named.shape[1] + 1)
    return np.c_[named, np.cos(np.pi * order * split["t"][:, None] / longest)]


def representations(study, steps):
    """All that is compared with the actions, for rows of the training and of the held-out split:

    -> X {name: (N, dx) of both splits}, Y (N, dy), episode (N,), group (N,) of both
    steps  "single": z_t and a_t; "chunk": all n of both, from windows without padding
    """
    splits, first, frames = (study.train, study.held_out), study.names[0], study.train["frame"]
    n = study.train["actions"].shape[1] if steps == "chunk" else 1
    rows = [~split["is_pad"][:, :n].any(1) for split in splits]

    def both(make):
        return [make(split)[k] for split, k in zip(splits, rows)]

    X = {name: both(lambda split, name=name: split["latents"][name][:, :n].reshape(len(split["t"]), -1))
         for name in study.train["latents"]}
    Y = both(lambda split: split["actions"][:, :n].reshape(len(split["t"]), -1).astype(float))
    # The frame (principal components) and the time get as many columns as the latents: none wins by width.
    width, center = X[first][0].shape[1], frames.mean(0)
    axes = np.linalg.eigh(np.cov(frames, rowvar=False))[1][:, ::-1][:, :width]        # (D, width)
    X["frame"] = both(lambda split: (split["frame"] - center) @ axes)
    longest, instructions = study.train["t"].max() + 1, len(study.instructions)
    X["time"] = both(lambda split: clock(split, width, longest, instructions))
    rng = np.random.default_rng(study.args.seed)
    X["shuffled"], X["true actions"] = [rng.permutation(x) for x in X[first]], Y
    return X, Y, both(lambda split: split["episode"]), both(lambda split: split["group"])


# ---- 3 analyses ------------------------------------------------------------------------------------------

# Each takes the study (see main) and returns a title, the rows of a table, and a PNG or None. A row is a dict
# of text, numbers and estimates [value, low, high]; "detail" goes to cca.json and the picture alone. The
# report prints the docstring as the explanation of the table and the picture.


def analyse(X, X_test, Y, Y_test, episode, episode_test, seed):
    """CCA fitted on X (N, dx), Y (N, dy), measured on held-out rows -> samples of bootstrap() (1 + R, dy),
    in-sample correlations (dy,), ridge. LeftOut if the rows are too few.

    Constant columns are left out; components that are missing for lack of columns count as 0.
    """
    if min(len(np.unique(e)) for e in (episode, episode_test)) < 2:
        raise LeftOut("there are fewer than 2 training or held-out episodes")
    x, y = X.std(0) > 1e-6, Y.std(0) > 1e-6                     # columns that vary
    if not y.any() or len(X) <= x.sum() + y.sum():
        raise LeftOut(f"{len(X)} training windows are too few for {x.sum()} + {y.sum()} dimensions "
                      "that vary: raise --max-windows, or give more data")
    if not x.any():                                     # e.g. the time, where every episode has one window
        return np.zeros((1 + RESAMPLES, y.sum())), np.zeros(y.sum()), None
    X, X_test, Y, Y_test = X[:, x], X_test[:, x], Y[:, y], Y_test[:, y]
    missing = 0, max(0, Y.shape[1] - X.shape[1])
    ridge = choose_ridge(X, Y, episode)
    project = cca_fit(X, Y, ridge)
    samples = bootstrap(correlation, project(X_test, Y_test), episode_test, seed)
    in_sample = correlation(np.ones((1, len(X))), *project(X, Y))[0]
    return np.pad(samples, [(0, 0), missing]), np.pad(in_sample, missing), ridge


def pooled(results):
    """Results of analyse() of several random policies as one. Each sample takes the next policy, so that the
    interval also shows how much the policies differ."""
    samples = np.stack([samples for samples, *_ in results])                          # (policies, 1 + R, dy)
    mixed = samples[np.arange(samples.shape[1]) % len(results), np.arange(samples.shape[1])]
    mixed[0] = samples[:, 0].mean(0)
    return mixed, np.mean([in_sample for _, in_sample, _ in results], 0), None


def correlations(study):
    """CCA between the latents and the true actions, for single steps (z_t, a_t) and for whole chunks.

    Directions and ridge were fitted on other episodes. 1 is a linear map, 0 is no relation. What counts is
    how far the pretrained policies are above random weights, the raw frame and the time in the episode (with
    the instruction), which all tell something about an expert's actions; "A minus B" is the difference, with
    an interval of its own. The frame and the time have as many columns as the latents. Shuffled rows must be
    at 0.

    Intervals: 95 % over the n held-out episodes, for random weights also over the policies. They are too
    narrow for fewer than about 20 episodes, and there is none for fewer than 5. "In sample" is the first
    component as the paper reports it; it grows with the number of columns.
    """
    rows, panels = [], []
    for steps in ("single", "chunk"):
        X, Y, episode, groups = representations(study, steps)
        for group in ("all", *study.groups):
            inside = [(g == group) | (group == "all") for g in groups]
            try:
                results = {name: analyse(*(v[i] for pair in (x, Y, episode) for v, i in zip(pair, inside)),
                                         study.args.seed) for name, x in X.items()}
            except LeftOut as reason:
                if not rows:
                    raise InputError(f"{study.args.data}: {reason}") from None
                study.note(f"correlations of {group}, {steps}, are left out: {reason}")
                continue
            results["random weights"] = pooled([results.pop(name) for name in list(results)
                                                if name.startswith("random ")])
            if group == "all":
                curves = {name: list(map(estimate, r[0].T[:10])) for name, r in results.items()}
                panels.append((range(1, 1 + len(curves["time"])), curves, {
                    "title": {"single": "single steps: z_t, a_t", "chunk": "whole chunks"}[steps],
                    "xlabel": "canonical component (number)", "ylabel": "held-out correlation (no unit)"}))
                for name, other in itertools.product(study.names, ("random weights", "frame", "time")):
                    results[f"{name} minus {other}"] = results[name][0] - results[other][0], None, None
            rows += [{"tasks": group, "steps": steps, "latents": name, "1st": estimate(samples[:, 0]),
                      "mean": estimate(samples.mean(1)),
                      "in sample": None if in_sample is None else float(in_sample[0]),
                      "n": len(np.unique(episode[1][inside[1]])),
                      "detail": {"components": [estimate(s) for s in samples.T], "ridge": ridge,
                                 "windows": [int(i.sum()) for i in inside]}}
                     for name, (samples, in_sample, ridge) in results.items()]
    return "Canonical correlations with the true actions", rows, draw(*panels)


def probes(study):
    """R2 of a ridge regression from all latents of a chunk to the true first action, on held-out episodes.

    1 is perfect, 0 is no better than predicting the mean. Left, and in the first columns: fitted on all
    training windows; the brackets are 95 % over held-out episodes. Right, and in the last columns: fitted on
    k labelled episodes, with as many windows of each as --max-windows leaves (the picture gives the number);
    the mean of five random choices of episodes, in brackets the lowest and the highest. "random 1" is one of
    the policies with random weights.
    """
    X, Y, episode, _ = representations(study, "chunk")
    if min(map(len, episode)) < 2:
        raise LeftOut("nearly all windows are padded: the episodes are shorter than a chunk")
    Y, Y_test = (y[:, list(study.moves.values())] for y in Y)   # a chunk begins with the columns of a_t
    ids, rng, whole = np.unique(episode[0]), np.random.default_rng(study.args.seed), np.ones((1, len(Y_test)))
    budgets = {k: [rng.choice(ids, k, replace=False) for _ in range(DRAWS)] for k in BUDGETS if k < len(ids)}
    budgets[len(ids)] = [ids]
    rows = []
    for name in (*study.names, "random 1", "frame", "time"):
        x, x_test = X[name]
        guess = ridge_probe(x, Y, x_test, episode[0])
        samples = bootstrap(r2, [guess, Y_test], episode[1], study.args.seed)
        row = {"latents": name, "mean": estimate(samples[:, np.isfinite(samples[0])].mean(1)),
               **dict(zip(study.moves, map(estimate, samples.T)))}
        for k, draws in budgets.items():
            chosen = [np.isin(episode[0], draw) for draw in draws]
            scores = [float(np.nanmean(r2(whole, ridge_probe(x[i], Y[i], x_test, episode[0][i]), Y_test)))
                      for i in chosen]
            row[f"from {k}"] = [float(np.mean(scores)), min(scores), max(scores)]
        rows.append(row)
    names, label = list(study.moves), "held-out R2 (no unit)"
    return "Probes of the true actions", rows, draw(
        (names, {row["latents"]: [row[name] for name in names] for row in rows},
         {"title": "fitted on all episodes", "xlabel": "action dimension", "ylabel": label}),
        (list(budgets), {row["latents"]: [row[f"from {k}"] for k in budgets] for row in rows},
         {"title": "mean over the dimensions", "xscale": "log", "ylabel": label,
          "xlabel": f"labelled episodes (number), about {len(Y) / len(ids):.0f} windows each"}))


def collapse(study):
    """Do the latents say anything? A standard deviation near 0, a rank near 1 or an instruction share near 1
    mean that they say nothing, or merely name the task.

    std: the smallest of the Z dimensions. rank: (sum of eigenvalues)^2 / sum of their squares, the number of
    directions that are really used. saturated: share of the numbers beyond 0.98, where the tanh passes hardly
    any gradient. instruction: share of the variance that lies between instructions.
    """
    def rank(x):
        values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        return float(values.sum() ** 2 / np.maximum((values ** 2).sum(), 1e-300))

    rows, ids = [], study.held_out["instruction_id"]
    for name, z in study.held_out["latents"].items():                                 # (N, n, Z)
        flat = z.reshape(len(z), -1)
        between = sum((ids == i).sum() * (flat[ids == i].mean(0) - flat.mean(0)) ** 2 for i in np.unique(ids))
        rows.append({"latents": name, "std": float(z.std(0).mean(0).min()), "rank of z_t": rank(z[:, 0]),
                     "rank of chunks": rank(flat), "saturated": float((np.abs(z) > 0.98).mean()),
                     "instruction": float(between.sum() / np.maximum(len(z) * flat.var(0).sum(), 1e-300))})
    return "Have the latents collapsed?", rows, None


def cosine(a, b):
    """Cosines between vectors (..., d) and (..., d), broadcast; 0 where one of them is 0."""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)


@torch.no_grad()
def imagined(world_model, frames, z, seed):
    """Clips imagined from the first of frames (B, n+1, 3V, H, W) uint8 and latents (B, n, Z), with the same
    noise in every call -> (B, n+1, 3, H, W) in [0, 1]; the first frame is the given one."""
    torch.manual_seed(seed)
    first = frames[:, 0, :3].float() / 255                                            # (B, 3, H, W)
    start = world_model.context(world_model.embed(frames[:, :1])[:, 0])
    future = world_model.decode(world_model.imagine(start, z))                        # (B, n, C, h, w)
    return torch.cat([first[:, None], world_model.picture(future, first)], 1)


def swap(study):
    """The latents of clip A, imagined by the world model from the first frame of clip B of another episode.

    Counted are pairs whose true motions (optical flow, 2 pixels or more) differ by more than 60 degrees. If
    the latents mean motion, the imagined clip moves as A does; if they mean nothing, or if the scene decides,
    it moves as B does. A cosine of 1 is the same direction, 0 is unrelated. Things of A that appear in B's
    scene show what else the latents carry. Intervals: 95 % over the n episodes of A and B, both resampled.
    """
    config, video, seed = study.checkpoint["world_config"], study.video, study.args.seed
    if video is None:
        raise LeftOut("there are no video clips: the pretraining video is not here; --video names another")
    if study.checkpoint["args"]["latents"] == "true":
        raise LeftOut("the world model was trained on true actions (--latents true), not on latents")
    if config["target"] in ("features", "flow"):
        raise LeftOut(f"the world model predicts {config['target']}, in which motion cannot be measured")
    if not config["context_frame"]:
        raise LeftOut("the world model does not see the first frame (--no-context-frame)")
    world_model = WorldModel(config).to(study.device).eval()
    world_model.load_state_dict(study.checkpoint["world_model"])
    frames = torch.from_numpy(video["frames"]).to(study.device)                       # (B, n+1, 3V, H, W)
    z = torch.from_numpy(video["latents"][study.names[0]]).float().to(study.device)   # (B, n, Z)
    of_a = np.random.default_rng(seed).permutation(len(z))                            # clip A for each clip B
    true, own, swapped = (frames[:, :, :3].float() / 255, imagined(world_model, frames, z, seed),
                          imagined(world_model, frames, z[of_a], seed))
    b, a = video["motion"], video["motion"][of_a]                                     # true motions (B, 2)
    mine, theirs = (image_motion(x)[0].numpy() for x in (own, swapped))
    whole, episode = ~video["is_pad"].any(1), np.stack([video["episode"], video["episode"][of_a]], 1)
    counted = whole & whole[of_a] & (episode[:, 0] != episode[:, 1]) & (cosine(a, b) < 0.5)
    counted &= np.minimum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)) > MOVES_PIXELS
    rows = [{"the imagined motion against": text, "mean cosine": None if counted.sum() < 4 else estimate(
                bootstrap(mean, [cosine(x, y)[counted, None]], episode[counted], seed)[:, 0]),
             "pairs": int(counted.sum()), "n": len(np.unique(episode[counted]))}
            for text, x, y in (("its own true motion, without a swap", mine, b),
                               ("that of A, whose latents it got", theirs, a),
                               ("that of B, whose scene it got", theirs, b))]
    shown = np.flatnonzero(next(x for x in (counted, whole, whole | True) if x.any()))
    shown = shown[np.linspace(0, len(shown) - 1, min(3, len(shown))).astype(int)]
    pictures = torch.stack([x for i in shown for x in (true[i], own[i], swapped[i], true[of_a[i]])])
    columns = np.unique(np.linspace(0, z.shape[1], min(6, z.shape[1] + 1)).astype(int))
    pictures = (255 * pictures[:, columns].permute(0, 1, 3, 4, 2).cpu().numpy()).astype(np.uint8)
    return "Latents of A in the scene of B", rows, mosaic(
        pictures.repeat(2, 2).repeat(2, 3), [f"k = {k}" for k in columns],
        ["B, true", "B, its own latents", "B, latents of A", "A, true"] * len(shown))


def metres_per_unit(action):
    """Unit of the first three actions in metres -> (3,). LeftOut if they are not changes of a position."""
    units, delta = action["units"][:3], action["delta"][:3]
    lengths = [re.fullmatch(r"([\d.]*) ?m", unit) for unit in units]
    if len(units) < 3 or not all(delta) or not all(lengths):
        raise LeftOut(f"the first three actions are not changes of a position (units {list(units)}, delta "
                      f"{list(delta)})")
    return np.array([float(length[1] or 1) for length in lengths])


def pairs(study):
    """Nearest neighbours in latent space among held-out clips of other episodes (Fig. 7).

    Two motions agree when they point the same way within 60 degrees: the true displacement of the end
    effector between robot clips, the motion in the picture (optical flow, drawn as an arrow) between robot
    and video. Only clips that move count: 1 cm, or 2 pixels. "Any such pair" is what chance gives. The pairs
    shown are evenly spaced, not the best. Intervals: 95 % over the n episodes of the first clip.
    """
    def latents(clips, name):                                                         # (N, d), standardised
        x = clips["latents"].get(name, clips["small picture"]).reshape(len(clips["t"]), -1)
        return (x - x.mean(0)) / (x.std(0) + 1e-8)

    robot, video, rows, pictures = study.held_out, study.video, [], {}
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
                shown = np.linspace(0, len(query) - 1, 6).astype(int)
                pictures[kind] = [np.concatenate([arrow(robot, query[i]), arrow(bank, nearest[i])], 1)
                                  for i in shown]
    if not rows:
        raise LeftOut("no two held-out clips of different episodes move")
    return "Nearest pairs in latent space", rows, mosaic(
        np.array(list(pictures.values())), [f"pair {k + 1}" for k in range(6)], list(pictures), gap=16)


ANALYSES = (correlations, probes, collapse, swap, pairs)


# ---- 4 report --------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart. Baselines look the same in all pictures.
BASELINES = {"random weights": ("#E69F00", "s"), "random 1": ("#E69F00", "s"), "frame": ("#009E73", "^"),
             "time": ("#CC79A7", "D"), "shuffled": ("#999999", "x"), "true actions": ("#000000", "*")}
OTHERS = [("#0072B2", "o"), ("#D55E00", "v"), ("#56B4E9", "<"), ("#F0E442", ">")]


def png(figure):
    """A matplotlib figure -> PNG as bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def mosaic(pictures, columns, rows, gap=3):
    """Pictures (R, K, h, w, 3) uint8 with the names of columns and rows -> PNG."""
    R, K, h, w, _ = pictures.shape
    pictures = np.pad(pictures, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    figure = Figure(figsize=(1.7 + K * w / h, 0.3 + R), layout="constrained")
    axes = figure.subplots()
    axes.imshow(pictures.transpose(0, 2, 1, 3, 4).reshape(R * (h + gap), K * (w + gap), 3))
    axes.set_yticks((np.arange(R) + 0.5) * (h + gap), rows, fontsize=8)
    axes.set_xticks((np.arange(K) + 0.5) * (w + gap), columns, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return png(figure)


def arrow(clips, i, scale=3):
    """First frame of clip i, enlarged, with its motion over the chunk as an arrow -> (H, W, 3) uint8."""
    picture = clips["picture"][i].transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
    picture = np.pad(picture[:, :-6], [(0, 0), (0, 6), (0, 0)], constant_values=255)  # a gap on the right
    start, motion, edge = scale * clips["where"][i], scale * clips["motion"][i], len(picture) - 6
    # The arrow is shortened where it would leave the picture.
    room = np.where(motion > 0, edge - start, start - 6) / np.maximum(np.abs(motion), 1e-6)
    end = start + motion * np.clip(room.min(), 0, 1)
    for colour, thick in (((0, 0, 0), 5), ((255, 255, 255), 2)):                      # visible on any ground
        cv2.arrowedLine(picture, start.astype(int).tolist(), end.astype(int).tolist(), colour, thick,
                        cv2.LINE_AA, tipLength=0.3)
    return picture


def draw(*panels):
    """Panels side by side -> PNG. panel: (x (K,), {name: K estimates}, settings of the axes); x of text is a
    list of categories."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (x, curves, settings) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        others, places, text = itertools.cycle(OTHERS), np.arange(len(x)), isinstance(x[0], str)
        for k, (name, estimates) in enumerate(curves.items()):
            colour, mark = BASELINES.get(name) or next(others)
            value, low, high = np.array(estimates, float).T
            at = places + 0.1 * (k - (len(curves) - 1) / 2) if text else x      # categories: side by side
            axes.errorbar(at, value, np.clip([value - low, high - value], 0, None), marker=mark, ms=5,
                          lw=0 if text else 1.2, elinewidth=0.8, capsize=2, color=colour, label=name)
        axes.axhline(0, color="black", lw=0.6)
        axes.grid(alpha=0.3)
        axes.set(ylim=(-0.3, 1.03), **settings)
        axes.set_xticks(places if text else x, x)
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return png(figure)


def text_rows(rows):
    """Rows of an analysis -> tuples of text, the heading first: numbers rounded, "detail" left out."""
    def text(value):
        if isinstance(value, list):
            value, low, high = value
            return "-" if value is None else f"{value:.2f} " + (
                f"[n < {FEWEST_EPISODES}]" if low is None else f"[{low:.2f}, {high:.2f}]")
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    keys = [key for key in rows[0] if key != "detail"]
    return [tuple(keys), *(tuple(text(row[key]) for key in keys) for row in rows)]


def html_report(title, facts, sections):
    """One self-contained page -> bytes. sections: (heading, explanation, rows, PNG or None)."""
    body = [f"<h1>{html.escape(title)}</h1><pre>{html.escape(facts)}</pre>"]
    for heading, explanation, rows, picture in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in explanation.split("\n\n")]
        body.append(f"<pre>{html.escape(markdown_table(text_rows(rows)))}</pre>")
        if picture:
            body.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,'
                        f'{base64.b64encode(picture).decode()}">')
    style = ("body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "p{max-width:50em}pre{background:#eee;padding:1em;overflow-x:auto;font-size:12px}")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{style}</style>" + "\n".join(body) + "</html>\n").encode()


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
    g.add_argument("--seed", type=int, default=0, help="seed of everything that is random here")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(args)), "SMOKE names a flag that does not exist"
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
    notes = []

    def note(text):
        notes.append(text)
        print(f"note         {text}")

    # ---- policies and data ----
    policies, inverses, checkpoints = load_policies(args, device)
    names, randoms = args.checkpoint, {k: v for k, v in policies.items() if k not in args.checkpoint}
    *data, clips = open_data(args, policies, inverses, checkpoints[0])
    estimate_latent_statistics(randoms.values(), data[0], min(512, args.max_windows), device)
    train, held_out = (collect(policies, inverses, d, args.max_windows, device, title)
                       for d, title in zip(data, ("training episodes", "held-out episodes")))
    for name in (*names, *inverses):
        if train["latents"][name].std(0).max() < 1e-6:
            raise InputError(f"the latent actions of {name} are constant (collapsed): pretrain it again")
    action, instructions = data[0].attrs["action"], data[0].instructions
    labels = [n if action["names"].count(n) == 1 else f"{n}{d}" for d, n in enumerate(action["names"])]
    moves = {n: d for d, n in enumerate(labels) if train["actions"][:, 0, d].std() > 1e-6}
    still = [n for n in labels if n not in moves]
    for split in (train, held_out):
        split["group"] = np.array([group_of(instructions[i]) for i in split["instruction_id"]])
    groups = [g for g in (*GROUPS, "other") if g in train["group"]]
    shown = {name: policies[name] for name in (names[0], "random 1")}
    video = clips and collect(shown, {}, clips, args.clips, device, "video clips", keep_frames=True) | {
        "path": clips.path}
    study = SimpleNamespace(
        args=args, device=device, note=note, checkpoint=checkpoints[0],
        names=names,                                            # of the pretrained policies
        train=train, held_out=held_out, video=video,            # see collect(); video may be None
        action=action, moves=moves,                             # {name: dimension} of actions that vary
        instructions=instructions, groups=groups if len(groups) > 1 else [])
    facts = "\n".join([
        *(f"policy       {path}, step {c['step']:,}" for path, c in zip(args.checkpoint, checkpoints)),
        f"actions      {data[0].action_dim}; constant and left out: {', '.join(still) or 'none'}",
        f"data         {args.data}, {data[0].stride} frames per latent action: fitted on "
        f"{data[0].num_episodes} episodes ({len(train['t']):,} windows), reported on {data[1].num_episodes} "
        f"held-out episodes ({len(held_out['t']):,} windows)",
        *(f"{g:12s} {', '.join(t for t in instructions if group_of(t) == g)[:200]}" for g in groups)])
    print(facts)

    # ---- analyses ----
    sections, result = [], {}
    out.mkdir(parents=True, exist_ok=True)
    for analysis in ANALYSES:
        try:
            title, rows, picture = analysis(study)
        except LeftOut as reason:
            note(f"{analysis.__name__}: left out, {reason}")
            continue
        print(f"\n{title}\n\n{markdown_table(text_rows(rows))}")
        sections.append((title, inspect.getdoc(analysis), rows, picture))
        result[analysis.__name__] = {"title": title, "rows": rows}
        if picture:
            write_atomically(out / f"{analysis.__name__}.png", picture)

    # ---- report ----
    origin = provenance()
    facts += ("".join(f"\nnote         {text}" for text in notes)
              + f"\ncommand      {origin['command']}, commit {origin['commit']}, {origin['machine']}")
    write_atomically(out / "report.html",
                     html_report("Latent actions of " + ", ".join(names), facts, sections))
    write_json(out / "cca.json", {
        **result, "notes": notes, "constant_actions": still, "args": vars(args), "provenance": origin,
        "checkpoints": [{"path": path, "hash": file_hash(path), "step": c["step"]}
                        for path, c in zip(args.checkpoint, checkpoints)],
        "data": {"path": args.data, "fingerprint": data[0].fingerprint, "stride": data[0].stride,
                 "episodes": [d.num_episodes for d in data],
                 "windows": [len(train["t"]), len(held_out["t"])]}})
    print(f"\nwrote        {out}/report.html, cca.json and the pictures")


if __name__ == "__main__":
    run(main)

"""What is in the latent actions? CCA, probes, pairs and pictures (Sec. IV, Q4; Table III, Fig. 7).

    python cca.py                                        # runs/pretrain/last.pt on data/robot
    python cca.py --checkpoint A/last.pt B/last.pt       # both in one table; pictures and probes: the first
    python cca.py --smoke                                # few windows, to see that everything runs

Latent actions z of a pretrained policy, which has seen no action, against the true actions a of labelled
demonstrations. CCA finds pairs of directions, one in each space, whose projections correlate most; every
further pair is uncorrelated with those before it:

    rho_i = max corr(A_i^T z, B_i^T a)    solved by the SVD of  S_zz^-1/2 S_za S_aa^-1/2         (Eq. 8, 9)

Directions and ridge come from the training episodes, correlations from held-out ones. Two warnings:

1. In sample, CCA of many columns is inflated: 70 latent and 70 action columns correlate in any sample of a
   few hundred rows, whatever they mean. The in-sample figures, as the paper has them, stand apart.
2. Latent actions are a function of the picture and the instruction, and so is what an expert does: ANY
   function of the picture correlates with the actions. Baselines decide, in the same table: policies with
   random weights, the raw frame, the time in the episode, shuffled rows; true actions are the ceiling.

    1 statistics         cca_fit, choose_ridge, correlations and R2 with intervals over episodes
    2 representations    latents of policies, and what they are compared with
    3 correlations       per task group, single steps and whole chunks
    4 probes             actions from k labelled episodes; the motion ahead; what must not be needed
    5 the world model    does it use the latents: shuffled, swapped between scenes, one dimension at a time
    6 nearest pairs      across episodes, tasks and embodiments
    7 report             report.html, cca.json and the pictures under --out

Measured for three tiny policies (64 pixels): 3 minutes on one thread beside other work.
"""
import argparse
import base64
import html
import io
import json
from pathlib import Path

import cv2
import numpy as np
import scipy.linalg
import scipy.spatial
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (InputError, at_least, by_position, file_hash, load_policy, make_policy, pick_device,
                    provenance, run, to_device, write_atomically)
from prepare_data import EpisodeDataset, Mixture
from world_model import InverseDynamics, WorldModel, optical_flow, shuffled_within

SMOKE = dict(max_windows=300, bootstrap=50, random_policies=1, clips=24, draws=1)
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)       # added to variances of 1; of equally good ones the largest is taken
BUDGETS = (1, 5, 10, 50)                # labelled episodes that a probe may learn from
# The paper's four groups (Table III). ASSUMPTION: which verbs belong to which; the paper does not say.
GROUPS = {"Put": "put place stack insert drop pour", "Move": "move push pull slide turn rotate open close",
          "Remove": "remove", "Take": "take pick grab lift"}


def group_of(instruction):
    """Put, Move, Remove or Take: that of the first of GROUPS' verbs in the instruction, else other."""
    verbs = {verb: group for group, words in GROUPS.items() for verb in words.split()}
    return next((verbs[word] for word in instruction.lower().split() if word in verbs), "other")


# ---- 1 statistics ----------------------------------------------------------------------------------------


def inverse_root(S):
    """S^-1/2 of a symmetric positive matrix; directions in which it has no extent are left out."""
    values, vectors = scipy.linalg.eigh(S)
    kept = values > 1e-10 * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept]) @ vectors[:, kept].T


def moments(X, Y):
    """X (N, dx), Y (N, dy) -> N, sums, second moments of the columns of both: all that a fit needs."""
    Z = np.c_[X, Y]
    return len(Z), Z.sum(0), Z.T @ Z


def directions(moments, dx, ridge):
    """Canonical directions from moments -> A (dx, r), B (dy, r), r = min(dx, dy), for columns as they are."""
    n, sums, second = moments
    S = second / n - np.outer(sums / n, sums / n)
    scale = np.sqrt(np.maximum(S.diagonal(), 1e-20))      # a fold may lack what varies elsewhere
    S = S / np.outer(scale, scale)
    white_x = inverse_root(S[:dx, :dx] + ridge * np.eye(dx))
    white_y = inverse_root(S[dx:, dx:] + ridge * np.eye(len(S) - dx))
    u, _, vt = scipy.linalg.svd(white_x @ S[:dx, dx:] @ white_y, full_matrices=False)             # (Eq. 8, 9)
    return (white_x @ u) / scale[:dx, None], (white_y @ vt.T) / scale[dx:, None]


def cca_fit(X, Y, ridge=1e-3):
    """Canonical directions of X (N, dx), Y (N, dy) -> A (dx, r), B (dy, r), (means of X, Y); r = min(dx, dy).

    corr((X - mx) A_i, (Y - my) B_i) falls with i. ridge is added to the variances of the standardised
    columns, hence it has no unit. No column may be constant.
    """
    means = X.mean(0), Y.mean(0)
    return *directions(moments(X - means[0], Y - means[1]), X.shape[1], ridge), means


def choose_ridge(X, Y, episode, folds, ridges=RIDGES):
    """The ridge whose directions correlate most on episodes that were not fitted, by cross-validation.

    X (N, dx), Y (N, dy), episode (N,). Every fold has its moments; those of the others are a subtraction.
    """
    X, Y = X - X.mean(0), Y - Y.mean(0)
    dx, fold = X.shape[1], np.unique(episode, return_inverse=True)[1] % folds
    parts = [moments(X[fold == k], Y[fold == k]) for k in range(folds)]
    whole = [sum(part[i] for part in parts) for i in range(3)]
    scores = np.zeros(len(ridges))
    for n, sums, second in parts:
        S = second / n - np.outer(sums / n, sums / n)                                 # of the fold left out
        for i, ridge in enumerate(ridges):
            A, B = directions((whole[0] - n, whole[1] - sums, whole[2] - second), dx, ridge)
            var_x, var_y = (A * (S[:dx, :dx] @ A)).sum(0), (B * (S[dx:, dx:] @ B)).sum(0)      # (r,) each
            scores[i] += ((A * (S[:dx, dx:] @ B)).sum(0) / np.sqrt(np.maximum(var_x * var_y, 1e-20))).mean()
    return ridges[int(scores.argmax())]


def per_episode(columns, episode):
    """Sums over the rows of each episode: list of (N, r), (N,) -> (E, len(columns), r)."""
    order = np.argsort(episode, kind="stable")
    starts = np.flatnonzero(np.diff(episode[order], prepend=episode.min() - 1))
    return np.stack([np.add.reduceat(c[order], starts) for c in columns], 1)


def episode_sums(u, v, episode):
    """Projections u, v (N, r), episode of each row (N,) -> (E, 6, r): what a correlation needs of it."""
    return per_episode([np.ones_like(u), u, v, u * u, v * v, u * v], episode)


def correlation(sums):
    """Correlations from sums (..., 6, r) -> (..., r); 0 where one side does not vary."""
    n, u, v, uu, vv, uv = np.moveaxis(sums, -2, 0)
    n = np.maximum(n, 1)
    variances = np.clip(uu / n - (u / n) ** 2, 0, None) * np.clip(vv / n - (v / n) ** 2, 0, None)
    return np.where(variances > 1e-20, (uv / n - u * v / n ** 2) / np.sqrt(np.maximum(variances, 1e-20)), 0.0)


def cca_correlations(X, Y, A, B, means):
    """Correlations (r,) of rows X (N, dx), Y (N, dy), fitted on or not, along directions of cca_fit."""
    u, v = (X - means[0]) @ A, (Y - means[1]) @ B                                     # (N, r) each
    return correlation(np.stack([np.full(u.shape[1], len(u)), u.sum(0), v.sum(0), (u * u).sum(0),
                                 (v * v).sum(0), (u * v).sum(0)]))


def resampled_correlations(X, Y, A, B, means, episode, weights):
    """The same with whole episodes resampled: weights (resamples, E) -> (resamples, r).

    Episodes, not rows: rows of one episode are so alike that resampling them makes intervals far too narrow.
    """
    sums = episode_sums((X - means[0]) @ A, (Y - means[1]) @ B, episode)              # (E, 6, r)
    return correlation(np.einsum("se,ekr->skr", weights, sums))


def r_squared(predicted, true, episode, weights):
    """R2 of predictions (N, d) with whole episodes resampled: weights (resamples, E) -> (resamples, d)."""
    n, y, yy, error = np.moveaxis(np.einsum("se,ekr->skr", weights, per_episode(
        [np.ones_like(true), true, true ** 2, (true - predicted) ** 2], episode)), 1, 0)
    n = np.maximum(n, 1)
    # A resample may lack what varies: never less than a hundredth of the variance of all rows.
    return 1 - error / n / np.maximum(yy / n - (y / n) ** 2, np.maximum(0.01 * true.var(0), 1e-12))


def resamples(episode, count, seed):
    """Weights (count, E) of bootstrap samples of the episodes that occur in episode (N,)."""
    E = len(np.unique(episode))
    return np.random.default_rng(seed).multinomial(E, np.full(E, 1 / E), count)


def interval(samples):
    """95 % bootstrap interval over the first axis -> list of [low, high], or one [low, high]."""
    return np.stack(np.percentile(samples, (2.5, 97.5), axis=0), -1).tolist()


def varying(X):
    """Which columns of X (N, d) are not constant -> (d,) bool. A constant correlates with nothing."""
    return X.std(0) > 1e-6


def linear_probe(X, Y, X_test, ridges=(10.0, 1.0, 1e-1, 1e-2, 1e-3)):
    """Ridge regression of standardised columns: X (N, dx), Y (N, dy), X_test (M, dx) -> (M, dy).

    The ridge is chosen on blocks of neighbouring rows, a fifth each: with few labels it decides everything.
    """
    mx, sx, my, sy = X.mean(0), X.std(0) + 1e-8, Y.mean(0), Y.std(0) + 1e-8
    x, y, x_test = (X - mx) / sx, (Y - my) / sy, (X_test - mx) / sx

    def fit(xx, xy, n, ridge):
        return scipy.linalg.solve(xx + ridge * max(n, 1) * np.eye(len(xx)), xy, assume_a="pos")

    xx, xy, errors = x.T @ x, x.T @ y, np.zeros(len(ridges))
    for a, b in zip(np.array_split(x, 5), np.array_split(y, 5)):
        rest = xx - a.T @ a, xy - a.T @ b, len(x) - len(a)
        for i, ridge in enumerate(ridges):
            errors[i] += ((b - a @ fit(*rest, ridge)) ** 2).sum()
    return x_test @ fit(xx, xy, len(x), ridges[int(errors.argmin())]) * sy + my


def mlp_probe(X, Y, X_test, width=64, steps=200, batch=512):
    """The same by one hidden layer; the last fifth of the rows says when to stop."""
    mx, sx, my, sy = X.mean(0), X.std(0), Y.mean(0), Y.std(0) + 1e-8
    sx = np.where(sx < 1e-6, np.inf, sx)                 # what is constant among few labels says nothing
    x, y, x_test = (torch.from_numpy(v).float() for v in ((X - mx) / sx, (Y - my) / sy, (X_test - mx) / sx))
    first, last = max(1, len(x) * 4 // 5), min(len(x) * 4 // 5, len(x) - 1)
    held = slice(last, None, max(1, (len(x) - last) // 2000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, y.shape[1]))
        nn.init.zeros_(net[2].weight)
        optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=0.1, fused=True)
        best = np.inf, None
        for step in range(steps + 1):
            if step % 10 == 0:
                with torch.no_grad():
                    error = F.mse_loss(net(x[held]), y[held]).item()
                if error < best[0]:
                    best = error, {k: v.clone() for k, v in net.state_dict().items()}
            rows = torch.randint(first, (min(batch, first),))
            optimizer.zero_grad()
            F.mse_loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.load_state_dict(best[1])
    with torch.no_grad():
        return net(x_test).double().numpy() * sy + my


# ---- 2 representations -----------------------------------------------------------------------------------


def estimate_latent_statistics(policies, data, rows, device):
    """Measure the statistics of the BatchNorms before the tanh, for policies that have never been trained.

    With initial statistics (mean 0, variance 1) a random policy's tanh sees unscaled numbers: a straw man.
    """
    norms = [m for policy in policies for m in policy.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                # a cumulative mean over all batches
        norm.train()
    with torch.no_grad():
        # A last batch of one would have no variance: it is left out.
        for batch in DataLoader(Subset(data, rows), batch_size=64, drop_last=len(rows) > 64):
            for policy in policies:
                obs = by_position(to_device(batch["obs"], device), policy.cameras)
                obs["noise"] = torch.randn(len(obs["instruction"]), policy.chunk,     # as drawn in training
                                           policy.config["latent_dim"], device=device)
                policy.latent_actions(obs)
    for norm in norms:
        norm.eval()


def thumbnails(images, side=16):
    """Frames (B, C, H, W) uint8 -> (B, C * side * side) in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)


@torch.no_grad()
def collect(policies, inverses, data, rows, device, title):
    """Windows -> {"latents": {name: (N, n, Z)}, "frame": (N, D), "actions": (N, n, A), "is_pad": (N, n),
    "episode", "t", "instruction_id": (N,)}. policies, inverses: {name: module}."""
    parts = {key: [] for key in ("frame", "actions", "is_pad", "episode", "t", "instruction_id")}
    latents = {name: [] for name in [*policies, *inverses]}
    for batch in tqdm(DataLoader(Subset(data, rows), batch_size=64), title, unit="batch", leave=False,
                      dynamic_ncols=True):
        obs = to_device(batch["obs"], device)
        for name, policy in policies.items():
            latents[name].append(policy.latent_actions(by_position(obs, policy.cameras)).cpu())   # (B, n, Z)
        for name, inverse in inverses.items():
            latents[name].append(inverse(batch["frames"][:, :, :3 * inverse.views].to(device)).cpu())
        batch["frame"] = torch.cat([thumbnails(x) for x in batch["obs"]["images"].values()], 1)
        for key, mine in parts.items():
            mine.append(batch[key])
    return {"latents": {name: torch.cat(z).double().numpy() for name, z in latents.items()},
            **{key: torch.cat(x).numpy() for key, x in parts.items()}}


def representations(train, held_out, steps, rng):
    """What is compared with the actions: {name: (X of training windows, X of held-out ones)}, Y of both, the
    rows of both that these are.

    steps  "single": z_t and a_t; "chunk": all n of both, of windows without padding
    """
    n = train["actions"].shape[1] if steps == "chunk" else 1
    keep = [~split["is_pad"][:, :n].any(1) for split in (train, held_out)]

    def both(make):
        return tuple(make(split)[k] for split, k in zip((train, held_out), keep))

    X = {name: both(lambda split, name=name: split["latents"][name][:, :n].reshape(len(split["t"]), -1))
         for name in train["latents"]}
    Y = both(lambda split: split["actions"][:, :n].reshape(len(split["t"]), -1).astype(float))
    width = next(iter(X.values()))[0].shape[1]
    # As many principal components of the small frames as there are latents: none wins by width alone.
    middle = train["frame"].mean(0)
    axes = scipy.linalg.svd(train["frame"][::max(1, len(train["frame"]) // 2000)] - middle,
                            full_matrices=False)[2][:width]
    X["frame"] = both(lambda split: ((split["frame"] - middle) @ axes.T).astype(float))
    X["time"] = both(lambda split: (split["t"][:, None] / 100.0) ** [1, 2, 3])
    first = X[next(iter(train["latents"]))]
    X["shuffled"] = tuple(rng.permutation(x) for x in first)
    return X, Y, keep


# ---- 3 correlations --------------------------------------------------------------------------------------


def analyse(X, Y, episode, held_out_X, held_out_Y, held_out_episode, folds, weights):
    """Fit on X (N, dx), Y (N, dy), report on held-out rows -> correlations (dy,), their resamples, ridge.

    Constant columns of X are dropped; a component missing for want of columns counts as correlation 0.
    """
    kept, missing = varying(X), (0, max(0, Y.shape[1] - int(varying(X).sum())))
    if not kept.any():
        raise InputError("the latent actions are constant: the policy has collapsed (z_std is 0); "
                         "pretrain it again")
    if len(np.unique(episode)) < folds:
        raise InputError(f"{len(np.unique(episode))} training episodes are fewer than the {folds} folds of "
                         "the cross-validation: give more data, or a smaller --folds")
    if len(X) <= kept.sum() + Y.shape[1] or len(held_out_X) < 2:
        raise InputError(f"{len(X)} training and {len(held_out_X)} held-out windows are too few for "
                         f"{kept.sum()} + {Y.shape[1]} dimensions: raise --max-windows, or give more data")
    X, held_out_X = X[:, kept], held_out_X[:, kept]
    ridge = choose_ridge(X, Y, episode, folds)
    fit = cca_fit(X, Y, ridge)
    return {"held_out": np.pad(cca_correlations(held_out_X, held_out_Y, *fit), missing),
            "in_sample": np.pad(cca_correlations(X, Y, *fit), missing), "ridge": ridge,
            "resampled": np.pad(resampled_correlations(held_out_X, held_out_Y, *fit, held_out_episode,
                                                       weights), [(0, 0), missing]),
            "constant": np.flatnonzero(~kept).tolist()}


def pooled(results):
    """Several random policies as one row: means, and an interval that holds the luck of single ones, too."""
    return {"held_out": np.mean([r["held_out"] for r in results], 0),
            "in_sample": np.mean([r["in_sample"] for r in results], 0),
            "ridge": float(np.median([r["ridge"] for r in results])), "constant": [],
            "resampled": np.stack([results[k % len(results)]["resampled"][k]     # each time another policy's
                                   for k in range(len(results[0]["resampled"]))])}


def plain(a):
    """A result of analyse as plain data."""
    return {"held_out": a["held_out"].tolist(), "held_out_interval": interval(a["resampled"]),
            "mean": float(a["held_out"].mean()), "mean_interval": interval(a["resampled"].mean(1)),
            "in_sample": a["in_sample"].tolist(), "ridge": a["ridge"], "constant": a["constant"]}


def correlations(train, held_out, groups, names, args, note):
    """CCA of every representation in every task group: {group: {steps: {"rows": {name: plain}, ...}}}.

    groups: {name: masks of the training and of the held-out rows}; names: of the pretrained policies. What is
    too few for a fit of its own is left out with a note.
    """
    table = {group: {} for group in groups}
    for steps in ("single", "chunk"):
        X, Y, keep = representations(train, held_out, steps, np.random.default_rng(args.seed))
        moving = varying(Y[0])
        Y = [y[:, moving] for y in Y]
        X["true actions"] = Y
        for group, masks in groups.items():
            inside = [mask[k] for mask, k in zip(masks, keep)]
            episode = [split["episode"][k][i] for split, k, i in zip((train, held_out), keep, inside)]
            here = [y[i] for y, i in zip(Y, inside)]
            moves = varying(here[0])
            results = {}
            try:
                if not moves.any() or len(np.unique(episode[1])) < 2:
                    raise InputError("no action varies, or there are fewer than two held-out episodes")
                weights = resamples(episode[1], args.bootstrap, args.seed)
                for name, x in X.items():
                    a, b = (v[i] for v, i in zip(x, inside))
                    if name == "true actions":
                        a, b = a[:, moves], b[:, moves]
                    results[name] = analyse(a, here[0][:, moves], episode[0], b, here[1][:, moves],
                                            episode[1], args.folds, weights)
            except InputError as e:
                if (group, steps) == ("all", "single"):
                    raise
                note(f"{group}, {steps}: left out, {e}")
                continue
            randoms = [results.pop(name) for name in list(results) if name.startswith("random ")]
            mine = {name: r for name, r in results.items() if name in train["latents"]}
            results = {**mine, "random weights": pooled(randoms), **{k: r for k, r in results.items()
                                                                     if k not in mine}}
            table[group][steps] = {
                "rows": {name: plain(r) for name, r in results.items()},
                "random_policies": [r["held_out"].tolist() for r in randoms],
                "episodes": len(np.unique(episode[1])), "windows": len(here[1]), "fitted_on": len(here[0]),
                "gain": {name: {other: {
                    "first": float(results[name]["held_out"][0] - results[other]["held_out"][0]),
                    "first_interval": interval(results[name]["resampled"][:, 0]
                                               - results[other]["resampled"][:, 0]),
                    "mean": float(results[name]["held_out"].mean() - results[other]["held_out"].mean()),
                    "mean_interval": interval((results[name]["resampled"]
                                               - results[other]["resampled"]).mean(1))}
                    for other in ("random weights", "frame", "time")} for name in names}}
    return table


def cca_table(table):
    """Rows of text: group, representation, then 1st and mean correlation of single steps and of chunks."""
    rows = [("group", "latents", "single: 1st", "mean", "in sample", "chunk: 1st", "mean", "in sample")]
    for group, kinds in table.items():
        for name in (next(iter(kinds.values()))["rows"] if kinds else ()):
            cells = []
            for steps in ("single", "chunk"):
                r = kinds.get(steps, {"rows": {}})["rows"].get(name)
                cells += ["-"] * 3 if r is None else [
                    "{:.2f} [{:.2f}, {:.2f}]".format(r["held_out"][0], *r["held_out_interval"][0]),
                    "{:.2f} [{:.2f}, {:.2f}]".format(r["mean"], *r["mean_interval"]),
                    f"({r['in_sample'][0]:.2f})"]
            rows.append((group, name, *cells))
    return rows


# ---- 4 probes --------------------------------------------------------------------------------------------


def probes(train, held_out, names, action_names, delta, args):
    """R2 on held-out episodes of probes from a chunk's latents: {"actions" | "motion" | "budgets": ...}.

    actions  a_t, per dimension; linear and MLP
    motion   where the actions of the whole chunk bring the end effector: the sum of its first three, if they
             are changes of position
    budgets  mean R2 over the dimensions that vary, fitted on k episodes: mean and range of several draws
    """
    X, Y, keep = representations(train, held_out, "chunk", np.random.default_rng(args.seed))
    X = {name: X[name] for name in (*names, "frame", "time")}
    actions = [y.reshape(len(y), *train["actions"].shape[1:]) for y in Y]             # (N, n, A)
    episode = [split["episode"][k] for split, k in zip((train, held_out), keep)]
    weights = resamples(episode[1], args.bootstrap, args.seed)
    weights = np.r_[np.ones((1, weights.shape[1])), weights]                          # first as it is
    moves = varying(actions[0][:, 0])
    wanted = {"actions": ([a[:, 0][:, moves] for a in actions],
                          [n for n, m in zip(action_names, moves) if m])}
    if all(delta[:3]) and moves[:3].any():
        wanted["motion"] = ([a[:, :, :3][..., moves[:3]].sum(1) for a in actions],
                            [f"{n} over chunk" for n, m in zip(action_names[:3], moves) if m])
    result = {}
    for target, (Y, columns) in wanted.items():
        result[target] = {"columns": columns, "rows": {}}
        for name, x in X.items():
            for kind, probe in (("linear", linear_probe), ("MLP", mlp_probe)):
                r2 = r_squared(probe(x[0], Y[0], x[1]), Y[1], episode[1], weights)
                result[target]["rows"][f"{name}, {kind}"] = {
                    "r2": r2[0].tolist(), "interval": interval(r2[1:]), "mean": float(r2[0].mean()),
                    "mean_interval": interval(r2[1:].mean(1))}
    Y, ids = wanted["actions"][0], np.unique(episode[0])
    budgets, rng = [k for k in BUDGETS if k < len(ids)] + [len(ids)], np.random.default_rng(args.seed)
    draws = [[rng.choice(ids, k, replace=False) for _ in range(args.draws if k < len(ids) else 1)]
             for k in budgets]
    result["budgets"] = {"episodes": budgets, "rows": {}}
    for name, x in X.items():
        for kind, probe in (("linear", linear_probe), ("MLP", mlp_probe)):
            r2 = [[float(r_squared(probe(x[0][rows], Y[0][rows], x[1]), Y[1], episode[1],
                                   weights[:1]).mean())
                   for rows in (np.isin(episode[0], chosen) for chosen in several)] for several in draws]
            result["budgets"]["rows"][f"{name}, {kind}"] = {
                "mean": [float(np.mean(r)) for r in r2], "range": [[min(r), max(r)] for r in r2]}
    return result


@torch.no_grad()
def nuisances(policies, batch, seed):
    """Do the latents tell what must not matter? Every clip is looked at again with its camera moved by up to
    4 pixels and its light by up to 25 %, at random: R2 of a linear probe to both, on clips of other episodes;
    and how far the latents move, as a share of how far they differ between clips. {name: {...}}"""
    generator = torch.Generator().manual_seed(seed)
    images = {c: x.cpu() for c, x in batch["obs"]["images"].items()}
    B = len(batch["is_pad"])
    moved = torch.randint(-4, 5, (B, 2), generator=generator)                         # pixels: x, y
    light = torch.rand(B, generator=generator) / 2 + 0.75

    def seen(x):                                                  # (B, 3, H, W) uint8, as if filmed so
        x = F.pad(x.float(), (4, 4, 4, 4), mode="replicate")
        x = torch.stack([x[i, :, 4 + dy:x.shape[2] - 4 + dy, 4 + dx:x.shape[3] - 4 + dx]
                         for i, (dx, dy) in enumerate(moved.tolist())])
        return (x * light[:, None, None, None]).clamp(0, 255).round().byte()

    shaken = {c: seen(x) for c, x in images.items()}
    device = batch["is_pad"].device
    obs = [{"images": {c: x.to(device) for c, x in views.items()},
            "instruction": batch["obs"]["instruction"]} for views in (images, shaken)]
    Y = np.c_[moved.numpy(), light.numpy()]
    train = np.unique(batch["episode"].cpu().numpy(), return_inverse=True)[1] % 2 == 0
    train = np.arange(B) < B // 2 if train.all() else train                           # a single episode
    rows = {}
    for name, look in [*((name, lambda o, p=p: p.latent_actions(by_position(o, p.cameras)).flatten(1))
                         for name, p in policies.items()),
                       ("frame", lambda o: thumbnails(next(iter(o["images"].values()))))]:
        before, after = (look(o).cpu().double().numpy() for o in obs)
        r2 = r_squared(linear_probe(after[train], Y[train], after[~train]), Y[~train],
                       np.zeros((~train).sum(), int), np.ones((1, 1)))[0]
        share = np.sqrt(((after - before) ** 2).mean() / np.maximum(before.var(0).mean(), 1e-12))
        rows[name] = dict(zip(("camera_x", "camera_y", "light", "moved"), [*r2.tolist(), float(share)]))
    return rows


def collapse(z, instruction_id):
    """Latents (N, n, Z) -> {"std": (Z,), "rank": of z_t and of chunks, "saturated", "instruction": shares}.

    rank         (sum of eigenvalues)^2 / sum of their squares: how many directions the latents really use
    saturated    share of the numbers beyond 0.98, where tanh gives hardly any gradient
    instruction  share of the variance between instructions: 1 = they name the task and nothing else
    """
    def rank(x):
        values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        return float(values.sum() ** 2 / np.maximum((values ** 2).sum(), 1e-300))

    flat = z.reshape(len(z), -1)
    ids, which, counts = np.unique(instruction_id, return_inverse=True, return_counts=True)
    between = counts @ (np.stack([flat[which == i].mean(0) for i in range(len(ids))]) - flat.mean(0)) ** 2
    return {"std": z.std(0).mean(0).tolist(), "rank": rank(z[:, 0]), "rank_of": z.shape[2],
            "rank_chunk": rank(flat), "rank_chunk_of": flat.shape[1],
            "saturated": float((np.abs(z) > 0.98).mean()),
            "instruction": float(between.sum() / np.maximum(len(flat) * flat.var(0).sum(), 1e-300))}


# ---- 5 the world model -----------------------------------------------------------------------------------


def image_motion(frames):
    """What moves in clips (B, T, 3, H, W) in [0, 1]: pixels it moves by in all (B, 2), where it is (B, 2).

    Optical flow, averaged where the picture changes (squared change as weight: on a plain ground the flow is
    that of whatever is near) and added up over the frames.
    """
    grey = frames.mean(2, keepdim=True)                                               # (B, T, 1, H, W)
    flow = 2 * optical_flow(grey).float()                                             # (B, T-1, 2, h, w)
    weight = (grey[:, 1:] - grey[:, :-1]) ** 2
    weight = F.avg_pool2d(weight.flatten(0, 1), 2).unflatten(0, weight.shape[:2])     # (B, T-1, 1, h, w)
    motion = ((flow * weight).sum((3, 4)) / weight.sum((3, 4)).clamp(min=1e-6)).sum(1)             # (B, 2)
    h, w = flow.shape[-2:]
    places = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")).to(flow)
    where = 2 * (places * weight).sum((1, 3, 4)) / weight.sum((1, 3, 4)).clamp(min=1e-6)
    return motion.numpy(force=True), where.numpy(force=True)


def cosine(a, b):
    """Cosine between rows (N, d), (N, d) -> (N,)"""
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)


class Imagination:
    """The world model on a batch of held-out clips: what it makes of latents (B, n, Z)."""

    def __init__(self, world_model, batch, seed):
        self.model, self.batch, self.seed = world_model, batch, seed
        self.first = batch["frames"][:, 0, :3].float() / 255                          # (B, 3, H, W)

    def true(self, rows=slice(None)):
        """The frames (B, n+1, 3, H, W) in [0, 1]."""
        return self.batch["frames"][rows, :, :3].float() / 255

    @torch.no_grad()
    def loss(self, z):
        """Open-loop error of each step (B, n), the same noise every time."""
        torch.manual_seed(self.seed)
        return self.model.losses(self.batch["frames"], z, self.batch.get("proprio"), predict="prior",
                                 decode_steps=z.shape[1])["open_loop"]

    @torch.no_grad()
    def __call__(self, z, rows=slice(None)):
        """Imagined frames (B, n+1, 3, H, W), the first one as given, with the same noise for every clip."""
        frames, proprio = self.batch["frames"][rows], self.batch.get("proprio")
        torch.manual_seed(self.seed)
        start = self.model.context(self.model.embed(frames[:, :1], proprio if proprio is None
                                                    else proprio[rows, :1])[:, 0])
        imagined = self.model.decode(self.model.imagine(start, z))
        first = self.first[rows]
        return torch.cat([first[:, None], self.model.picture(imagined, first)], 1)


def use_per_step(z, imagination, args):
    """Open-loop error with latents of another clip over that with the right ones, for each step of the chunk:
    {"instruction" | "episode": {"ratio": (n,), "interval": ...}}, 1 = the latents make no difference."""
    batch, generator = imagination.batch, torch.Generator().manual_seed(args.seed)
    true, is_pad = imagination.loss(z), batch["is_pad"]
    result = {}
    for name, groups in (("instruction", batch["instruction_id"]), ("episode", batch["episode"])):
        index, paired = shuffled_within(groups.cpu(), generator)
        shuffled = imagination.loss(z[index.to(z.device)])
        use = (paired.to(z.device)[:, None] & ~is_pad).double()
        if not use.any(0).all():
            continue
        sums = per_episode([(x * use).cpu().double().numpy() for x in (shuffled, true)],
                           batch["episode"].cpu().numpy())                            # (E, 2, n)
        weights = resamples(batch["episode"].cpu().numpy(), args.bootstrap, args.seed)
        drawn = np.einsum("se,ekn->skn", weights, sums)
        result[name] = {"ratio": (sums[:, 0].sum(0) / sums[:, 1].sum(0)).tolist(),
                        "interval": interval(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9))}
    return result


def swap(z, imagination, args):
    """Latents of clip A imagined in the scene of clip B: does the motion come along? -> numbers, picture.

    Counted are pairs that move by 2 pixels or more each, in directions more than 60 degrees apart. Numbers:
    mean cosine of what is imagined with A's true motion and with B's; `own`: without a swap.
    """
    B = len(z)
    other = torch.from_numpy(np.random.default_rng(args.seed).permutation(B))
    whole = ~imagination.batch["is_pad"].any(1).cpu().numpy()
    own, swapped = imagination(z), imagination(z[other.to(z.device)])
    (true, _), (mine, _), (theirs, _) = (image_motion(x) for x in (imagination.true(), own, swapped))
    a, b = true[other.numpy()], true
    moving = whole & whole[other.numpy()] & (np.linalg.norm(true, axis=1) > 2)
    moving &= moving[other.numpy()] & (cosine(a, b) < 0.5)
    episode = imagination.batch["episode"].cpu().numpy()[moving]
    result = {"pairs": int(moving.sum())}
    if moving.sum() >= 4:
        weights = resamples(episode, args.bootstrap, args.seed)
        for name, x, y in (("own", mine, b), ("follows_latents", theirs, a), ("follows_scene", theirs, b)):
            values = cosine(x, y)[moving]
            sums = per_episode([np.ones((len(values), 1)), values[:, None]], episode)[..., 0]      # (E, 2)
            drawn = weights @ sums
            result[name] = {"cosine": float(values.mean()), "interval": interval(drawn[:, 1] / drawn[:, 0])}
    shown = np.flatnonzero(next(x for x in (moving, whole, whole | True) if x.any()))
    shown = shown[np.linspace(0, len(shown) - 1, min(3, len(shown))).astype(int)]
    rows, labels = [], []
    for i in shown:
        rows += [imagination.true(slice(i, i + 1))[0], own[i], swapped[i],
                 imagination.true(slice(int(other[i]), int(other[i]) + 1))[0]]
        labels += ["B, true", "B, its own latents", "B, latents of A", "A, true"]
    frames = torch.stack(rows)                                                        # (R, n+1, 3, H, W)
    columns = np.unique(np.linspace(0, frames.shape[1] - 1, min(6, frames.shape[1])).astype(int))
    return result, grid(frames[:, columns], labels, [f"k = {k}" for k in columns])


def sweep(z, imagination, values=(-0.9, -0.45, 0.0, 0.45, 0.9)):
    """One latent dimension at a time, the same at every step, the others as they are -> effect, picture.

    effect: mean absolute change of the last imagined frame between the ends, grey levels of 255, (Z,).
    """
    count, pictures, effect = min(32, len(z)), [], []
    rows = slice(0, count)
    for d in range(z.shape[2]):
        ends = []
        for value in values:
            changed = z[rows].clone()
            changed[:, :, d] = value
            ends.append(imagination(changed, rows)[:, -1])                            # (count, 3, H, W)
        effect.append(255 * (ends[-1] - ends[0]).abs().mean().item())
        pictures.append(torch.stack([x[0] for x in ends]))
    picture = grid(torch.stack(pictures), [f"dimension {d + 1}" for d in range(z.shape[2])],
                   [f"z = {value:g}" for value in values])
    return effect, picture


# ---- 6 nearest pairs -------------------------------------------------------------------------------------


def nearest_pairs(query, bank, allowed):
    """For each row of query (Q, d) the nearest allowed row of bank (M, d): index (Q,), has one (Q,) bool."""
    distance = scipy.spatial.distance.cdist(query, bank)
    distance[~allowed] = np.inf
    return distance.argmin(1), np.isfinite(distance.min(1))


def standardised(x):
    return (x - x.mean(0)) / (x.std(0) + 1e-8)


def agreement(index, usable, agrees, allowed, episode, args):
    """Share of nearest pairs whose motions agree, and of all allowed pairs: what chance gives.

    agrees (Q, M) bool; resampled by the episode of the query.
    """
    rows = np.flatnonzero(usable)
    if not len(rows):
        return None
    hit = agrees[rows, index[rows]].astype(float)
    chance = (agrees & allowed).sum(1)[rows] / np.maximum(allowed.sum(1)[rows], 1)
    sums = per_episode([np.ones((len(rows), 1)), hit[:, None], chance[:, None]], episode[rows])[..., 0]
    drawn = resamples(episode[rows], args.bootstrap, args.seed) @ sums
    return {"pairs": len(rows), "agree": float(hit.mean()), "interval": interval(drawn[:, 1] / drawn[:, 0]),
            "chance": float(chance.mean()), "chance_interval": interval(drawn[:, 2] / drawn[:, 0])}


def pairs(robot, video, names, args):
    """Nearest pairs in latent space (Fig. 7) -> table {kind: {latents: agreement}}, pictures.

    robot, video  {"latents": {name: (N, d)}, "episode", "instruction_id" (N,), "motion" of the picture and
                  "where" (N, 2), "picture" (N, 3, H, W), and for the robot "displacement" (N, 3), m}
    Motions agree when they point the same way within 60 degrees: true displacement between robot clips,
    motion in the picture between embodiments. Only clips that move: 1 cm, 2 pixels.
    """
    same_task = robot["instruction_id"][:, None] == robot["instruction_id"]
    other_episode = robot["episode"][:, None] != robot["episode"]
    moves = np.linalg.norm(robot["displacement"], axis=1) > 0.01
    unit = robot["displacement"] / np.maximum(np.linalg.norm(robot["displacement"], axis=1), 1e-9)[:, None]
    both = moves[:, None] & moves
    kinds = {"same task, other episode": (robot, same_task & other_episode & both, unit @ unit.T > 0.5),
             "other task": (robot, ~same_task & both, unit @ unit.T > 0.5)}
    if video is not None:
        seen = [np.linalg.norm(x["motion"], axis=1) > 2 for x in (robot, video)]
        a, b = (x["motion"] / np.maximum(np.linalg.norm(x["motion"], axis=1), 1e-9)[:, None]
                for x in (robot, video))
        kinds["robot and video"] = video, seen[0][:, None] & seen[1], a @ b.T > 0.5
    table, pictures = {}, []
    for kind, (bank, allowed, agrees) in kinds.items():
        table[kind] = {}
        for name in names:
            index, usable = nearest_pairs(standardised(robot["latents"][name]),
                                          standardised(bank["latents"][name]), allowed)
            table[kind][name] = agreement(index, usable, agrees, allowed, robot["episode"], args)
            if name == names[0] and usable.any():
                rows = np.flatnonzero(usable)
                # Evenly spaced, not the best ones: what is typical.
                for i in rows[np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int)]:
                    pictures.append((kind, arrow(robot, i), arrow(bank, index[i])))
    return table, pictures


def arrow(clips, i, scale=3):
    """A clip's first frame with its motion over the chunk, drawn from where it happens and shortened where it
    would leave the picture -> (H, W, 3) uint8."""
    picture = (255 * clips["picture"][i].permute(1, 2, 0).numpy(force=True)).astype(np.uint8)
    picture = np.ascontiguousarray(picture.repeat(scale, 0).repeat(scale, 1))
    start, motion, edge = scale * clips["where"][i], scale * clips["motion"][i], len(picture) - 6
    room = np.where(motion > 0, edge - start, start - 6) / np.maximum(np.abs(motion), 1e-6)
    end = start + motion * np.clip(room.min(), 0, 1)
    for colour, thick in (((0, 0, 0), 5), ((255, 255, 255), 2)):                      # seen on any ground
        cv2.arrowedLine(picture, start.astype(int).tolist(), end.astype(int).tolist(), colour, thick,
                        cv2.LINE_AA, tipLength=0.3)
    return picture


# ---- 7 report --------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = 3 * ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]


READING = {
    "correlations":
    "Held out: directions and ridge were fitted on other episodes. 1 is a linear map, 0 nothing. What "
    "counts is how far the pretrained policies are from random weights, the raw frame and the time in the "
    "episode, which all say something about an expert's actions; shuffled rows must be at 0, true actions "
    "are the ceiling. Intervals: 95 % over held-out episodes, for random weights also over the policies. "
    "In parentheses: the first component in sample, as the paper reports it; it grows with the number of "
    "columns.",
    "probes":
    "R2 of predicting true actions of held-out episodes from all latents of a chunk: 1 is perfect, 0 is "
    "no better than the mean. Left: bars with 95 % over episodes. Right: from few labelled episodes; mean "
    "of several draws, the band spans them.",
    "collapse":
    "Standard deviations near 0, a rank near 1 or an instruction share near 100 % mean that the latents "
    "say nothing, or merely name the task. Saturated: beyond 0.98, where tanh passes hardly any gradient.",
    "nuisances":
    "Every clip is looked at again with its camera moved by up to 4 pixels and its light by up to 25 %. "
    "R2 near 0: the latents do not tell. Moved: how far they move then, as a share of how far they differ "
    "between clips.",
    "use":
    "Left: above 1 the world model needs the right latents; the band is 95 % over episodes. Latents of "
    "another moment of the same episode leave only the motion to tell. Right: how much each dimension "
    "changes the last imagined frame.",
    "swap":
    "Pairs whose true motions differ by more than 60 degrees. If latents mean motion, the swapped clip "
    "moves as A does; if they mean nothing, or the scene decides, as B does. 1 = same direction, 0 = "
    "unrelated. Things of A that turn up in B's scene show what else the latents carry.",
    "sweep":
    "The last imagined frame of one clip when one dimension is set at every step, the others as they are. "
    "A dimension with a meaning moves one thing steadily from left to right.",
    "pairs":
    "Nearest neighbours among held-out clips of other episodes, evenly spaced, not picked. Arrows: how "
    "the picture moves over the chunk (optical flow). Motions agree when they point the same way within "
    "60 degrees: true displacement of the end effector between robot clips, motion in the picture between "
    "embodiments.",
}


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def mosaic(pictures, rows, columns, inches=1.0, gap=3):
    """Pictures (R, K, h, w, 3) uint8 with names of rows and columns -> PNG."""
    R, K, h, w, _ = pictures.shape
    pictures = np.pad(pictures, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    picture = pictures.transpose(0, 2, 1, 3, 4).reshape(R * (h + gap), K * (w + gap), 3)
    figure = Figure(figsize=(1.7 + inches * K * w / h, 0.3 + inches * R), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture)
    axes.set_yticks((np.arange(R) + 0.5) * (h + gap), rows, fontsize=8)
    axes.set_xticks((np.arange(K) + 0.5) * (w + gap), columns, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return png(figure)


def grid(frames, rows, columns):
    """The same of frames (R, K, 3, H, W) in [0, 1], twice as large."""
    frames = (255 * frames.permute(0, 1, 3, 4, 2).numpy(force=True).clip(0, 1)).astype(np.uint8)
    return mosaic(frames.repeat(2, 2).repeat(2, 3), rows, columns)


def draw_correlations(table):
    """Held-out correlation of every component, of single steps and of chunks, all tasks together."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    for axes, (steps, r) in zip(figure.subplots(1, len(table["all"]), sharey=True, squeeze=False)[0],
                                    table["all"].items()):
        for (name, row), colour, mark in zip(r["rows"].items(), COLOURS, 3 * "os^Dv<>X"):
            count = min(10, len(row["held_out"]))
            low, high = np.array(row["held_out_interval"])[:count].T
            x = np.arange(1, count + 1)
            axes.plot(x, row["held_out"][:count], marker=mark, ms=4, lw=1.2, color=colour, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(title={"single": "single steps: z_t, a_t", "chunk": "whole chunks"}[steps],
                 xlabel="canonical component (number)", ylim=(-0.25, 1.03), xticks=x)
        axes.axhline(0, color="black", lw=0.6)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out correlation (no unit)")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return png(figure)


def draw_probes(result):
    """R2 per action dimension, and against the number of labelled episodes."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, columns = result["actions"]["rows"], result["actions"]["columns"]
    linear = [name for name in rows if name.endswith("linear")]
    width = 0.8 / len(linear)
    for k, name in enumerate(linear):
        height, ends = np.array(rows[name]["r2"]), np.array(rows[name]["interval"])
        error = np.clip([height - ends[:, 0], ends[:, 1] - height], 0, None)
        x = np.arange(len(columns)) + width * (k - len(linear) / 2 + 0.5)
        left.bar(x, np.clip(height, -0.3, 1), width, color=COLOURS[k], yerr=error,
                 error_kw={"lw": 0.8}, label=name.removesuffix(", linear"))
    left.axhline(0, color="black", lw=0.6)
    left.set(xticks=range(len(columns)), xticklabels=columns, xlabel="action dimension", ylim=(-0.3, 1),
             ylabel="held-out R2 (no unit)", title="linear probe, all labelled episodes")
    budgets = result["budgets"]
    for k, name in enumerate(linear):
        for kind, style in (("linear", "-"), ("MLP", "--")):
            row = budgets["rows"][f"{name.removesuffix(', linear')}, {kind}"]
            right.plot(budgets["episodes"], row["mean"], style, marker="o", ms=3, color=COLOURS[k])
            if kind == "linear":
                right.fill_between(budgets["episodes"], *np.transpose(row["range"]), color=COLOURS[k],
                                   alpha=0.15, lw=0)
    right.axhline(0, color="black", lw=0.6)
    right.set(xscale="log", xlabel="labelled episodes (number)", ylim=(-0.3, 1),
              ylabel="held-out R2, mean over dimensions", title="full line: linear, dashed: MLP",
              xticks=budgets["episodes"], xticklabels=budgets["episodes"])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return png(figure)


def draw_use(per_step, effect):
    """Error with other clips' latents over that with the right ones, per step; effect of each dimension."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, r), colour, mark in zip(per_step.items(), COLOURS, "os"):
        x = np.arange(1, len(r["ratio"]) + 1)
        left.plot(x, r["ratio"], marker=mark, color=colour, label=f"latents of another clip, same {name}")
        left.fill_between(x, *np.transpose(r["interval"]), color=colour, alpha=0.2, lw=0)
    left.axhline(1, color="black", lw=0.6)
    x = np.arange(1, max([len(r["ratio"]) for r in per_step.values()], default=1) + 1)
    left.set(xlabel="step of the chunk (frames after o_t)",
             ylabel="open-loop error, shuffled / right (no unit)", xticks=x,
             title="does the world model use the latents?")
    if per_step:
        left.legend(fontsize=7)
    right.bar(np.arange(1, len(effect) + 1), effect, color=COLOURS[0])
    right.set(xlabel="latent dimension (number)", ylabel="change of last frame (grey levels of 255)",
              title="from -0.9 to 0.9, the others fixed", xticks=range(1, len(effect) + 1))
    return png(figure)


def draw_pairs(pictures):
    """Nearest pairs side by side, one kind per row."""
    kinds = list(dict.fromkeys(kind for kind, *_ in pictures))
    lines = [[np.concatenate([a, np.full_like(a[:, :6], 255), b], 1) for k, a, b in pictures if k == kind]
             for kind in kinds]
    K = max(map(len, lines))
    lines = [line + [np.full_like(line[0], 255)] * (K - len(line)) for line in lines]
    return mosaic(np.array(lines), kinds, [f"pair {k + 1}" for k in range(K)], inches=1.1, gap=16)


def text_table(rows):
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], tuple("-" * w for w in widths), *rows[1:]]
    return "\n".join("| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths)) + " |"
                     for row in rows)


def html_table(rows):
    def line(row, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def write_report(out, title, facts, sections):
    """report.html, with every picture inside, and the pictures as files. sections: (name, heading, how to
    read it, table rows or None, PNG or None)."""
    body = [f"<h1>{html.escape(title)}</h1>", "<pre>" + html.escape(facts) + "</pre>"]
    for name, heading, reading, rows, picture in sections:
        body += [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(reading)}</p>"]
        body += [html_table(rows)] if rows else []
        if picture:
            write_atomically(out / f"{name}.png", picture)
            body.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,'
                        f'{base64.b64encode(picture).decode()}">')
    style = ("body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #999;padding:2px 8px;"
             "text-align:left}pre{background:#eee;padding:1em;white-space:pre-wrap}")
    write_atomically(out / "report.html", (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
                                           f"{html.escape(title)}</title><style>{style}</style>"
                                           + "\n".join(body) + "</html>\n").encode())


# ---- the run ---------------------------------------------------------------------------------------------


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--checkpoint", nargs="+", default=["runs/pretrain/last.pt"],
                   help="pretrained policies (default %(default)s)")
    g.add_argument("--data", default="data/robot", help="labelled demonstrations (default %(default)s)")
    g.add_argument("--video", help="dataset whose held-out clips world model and pairs are shown; none = "
                   "leave these out (default: the first one that the first checkpoint was pretrained on)")
    g.add_argument("--stride", type=int, help="frames per latent action of --data (default: as many as last "
                   "about as long as in the first checkpoint's pretraining)")
    g = p.add_argument_group("analysis")
    g.add_argument("--folds", type=int, default=5, help="of the cross-validation over training episodes that "
                   "chooses the ridge (default %(default)s)")
    g.add_argument("--max-windows", type=int, default=2000,
                   help="per split, evenly spaced (default %(default)s)")
    g.add_argument("--clips", type=int, default=192,
                   help="held-out clips for world model and pairs (default %(default)s)")
    g.add_argument("--random-policies", type=int, default=5,
                   help="randomly initialised policies (default %(default)s)")
    g.add_argument("--bootstrap", type=int, default=500,
                   help="resamples of held-out episodes (default %(default)s)")
    g.add_argument("--draws", type=int, default=5, help="of k labelled episodes that a probe learns from "
                   "(default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder for the report (default: cca beside the first checkpoint)")
    g.add_argument("--overwrite", action="store_true", help="replace the result that stands in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    g.add_argument("--seed", type=int, default=0, help="of everything random here (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="default %(default)s")
    g.add_argument("--threads", type=int, default=1, help="torch CPU threads (default %(default)s)")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(p.parse_args([]))), "SMOKE names a flag that does not exist"
    at_least(args, 0, "seed")
    at_least(args, 1, "max_windows", "random_policies", "bootstrap", "stride", "draws")
    at_least(args, 2, "folds", "clips")
    return args


def load_policies(args):
    """-> {name: policy}, pretrained ones, then "random 1" ...; {name: inverse dynamics}; checkpoints."""
    policies, inverses, checkpoints = {}, {}, []
    for path in args.checkpoint:
        policy, checkpoint = load_policy(path, args.device)
        broken = [f"{part}.{k}" for part in ("world_model", "inverse")
                  for k, v in checkpoint.get(part, {}).items() if not v.isfinite().all()]
        if broken:
            raise InputError(f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): "
                             "its training diverged, train again")
        if checkpoint["stage"] != "pretrain":
            raise InputError(f"{path} has been finetuned on actions: give the pretrained checkpoint")
        policy.check_latent()
        if policy.config["head"] != "latent":
            print(f"note         {path} was also trained on true actions (--labels-frac): what follows is no "
                  "evidence that video alone gives them")
        if checkpoints and checkpoint["text_encoder"] != checkpoints[0]["text_encoder"]:
            raise InputError(f"{path} reads {checkpoint['text_encoder']} instructions, {args.checkpoint[0]} "
                             f"{checkpoints[0]['text_encoder']}: compare those of one text encoder")
        if checkpoints and policy.chunk != checkpoints[0]["config"]["chunk"]:
            raise InputError(f"{path} has chunks of {policy.chunk}, {args.checkpoint[0]} of "
                             f"{checkpoints[0]['config']['chunk']}: compare those of one length")
        name = Path(path).parent.name or path
        reserved = ("frame", "time", "shuffled", "true actions")
        name = path if name in policies or name in reserved or name.startswith("random ") else name
        policies[name] = policy
        checkpoints.append(checkpoint)
        if "inverse" in checkpoint:
            inverse = InverseDynamics(checkpoint["world_config"])
            inverse.views = checkpoint["world_config"]["views"]
            inverse.load_state_dict(checkpoint["inverse"])
            inverses[f"{name}, inverse dynamics (sees the future)"] = inverse.to(args.device).eval()
    for k in range(args.random_policies):
        torch.manual_seed(args.seed + k)
        policies[f"random {k + 1}"] = make_policy(checkpoints[0]["config"]).to(args.device).eval()
    return policies, inverses, checkpoints


def open_data(args, policies, inverses, checkpoint):
    """-> training and held-out windows of args.data, of as many cameras as the policies look through."""
    name, chunk = checkpoint["text_encoder"], checkpoint["config"]["chunk"]
    whole = EpisodeDataset(args.data, chunk, text_encoder=name)
    if whole.action_dim is None:
        raise InputError(f"{args.data} has no actions to compare with: give labelled demonstrations, "
                         "python prepare_data.py sim makes some in data/robot")
    cameras = max(len(policy.cameras) for policy in policies.values())
    if len(whole.cameras) < cameras:
        raise InputError(f"{args.checkpoint[0]} looks through {cameras} cameras, {args.data} has "
                         f"{len(whole.cameras)}")
    if args.stride is None:
        pretraining = checkpoint["data"]["mixture"][0]                    # seconds that a latent action lasts
        args.stride = max(1, round(whole.fps * pretraining["stride"] / pretraining["fps"]))
    views = max([inverse.views for inverse in inverses.values()], default=0)
    splits = [EpisodeDataset(args.data, chunk, cameras, split=s, text_encoder=name, stride=args.stride,
                             future=views) for s in ("train", "val")]
    if splits[0].num_episodes < args.folds or splits[1].num_episodes < 2:
        raise InputError(f"{args.data} has {splits[0].num_episodes} training and {splits[1].num_episodes} "
                         f"held-out episodes: {args.folds} (--folds) and 2 are the least")
    return splits


def open_video(args, checkpoint, note):
    """-> held-out clips that the world model is shown, as one batch, and their folder; or None, None."""
    if args.video == "none" or not checkpoint["world_config"]:
        note("the world model is left out: " + ("--video none" if args.video == "none" else
                                               "this checkpoint was pretrained without one"))
        return None, None
    if checkpoint["args"]["latents"] == "true":
        note("the world model is left out: it was pretrained on true actions (--latents true)")
        return None, None
    world, first = checkpoint["world_config"], checkpoint["data"]["mixture"][0]
    path = args.video or first["path"]
    if not args.video and not Path(path).exists():
        note(f"the world model is left out: {path}, which it was pretrained on, is not here; --video names "
             "another dataset")
        return None, None
    data = Mixture([path], checkpoint["config"]["chunk"], strides=[1 if args.video else first["stride"]],
                   cameras=world["views"], future=world["views"], split="val",
                   labels=["proprio"] * bool(world["proprio_dim"]), text_encoder=checkpoint["text_encoder"])
    # Four windows near each other at a time, mostly of one episode: latents can be permuted within it.
    anchors = np.linspace(0, len(data) - 1, max(1, args.clips // 4)).astype(int)
    rows = np.unique((anchors[:, None] + [0, 6, 12, 18]) % len(data))
    if len(rows) < 4:
        note(f"the world model is left out: {path} has {len(rows)} held-out clips, 4 are the least")
        return None, None
    return next(iter(DataLoader(Subset(data, rows.tolist()), batch_size=len(rows)))), path


@torch.no_grad()
def clips_for_pairs(batch, policies, names, device):
    """What pairs() wants of a batch of clips."""
    frames = batch["frames"][:, :, :3].float() / 255
    motion, where = image_motion(frames)
    obs = to_device(batch["obs"], device)
    clips = {"motion": motion, "where": where, "picture": frames[:, 0], "episode": batch["episode"].numpy(),
             "instruction_id": batch["instruction_id"].numpy(),
             "latents": {name: policies[name].latent_actions(by_position(obs, policies[name].cameras))
                         .flatten(1).cpu().double().numpy() for name in names}}
    # Frames of one camera, of both embodiments alike.
    clips["latents"]["frame"] = thumbnails(frames[:, 0] * 255).double().numpy()
    if "actions" in batch:
        clips["displacement"] = batch["actions"][:, :, :3].sum(1).double().numpy()
    return clips


def main(argv=None):
    args = arguments(argv)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    out = Path(args.out or Path(args.checkpoint[0]).parent / "cca")
    if (out / "cca.json").exists() and not args.overwrite:
        raise InputError(f"{out} already holds a result: --overwrite replaces it, --out puts this one "
                         "elsewhere")
    notes = []

    def note(text):
        notes.append(text)
        print(f"note         {text}")

    # ---- latent and true actions ----
    policies, inverses, checkpoints = load_policies(args)
    names = [name for name in policies if not name.startswith("random ")]
    data = open_data(args, policies, inverses, checkpoints[0])
    estimate_latent_statistics([policies[name] for name in policies if name not in names], data[0],
                               data[0].spaced(min(512, args.max_windows)), device)
    train, held_out = (collect(policies, inverses, d, d.spaced(args.max_windows), device, title)
                       for d, title in zip(data, ("training episodes", "held-out episodes")))
    action = data[0].attrs.get("action") or {}
    action_names = action.get("names") or [f"action {i}" for i in range(data[0].action_dim)]
    still = [n for n, moves in zip(action_names, varying(train["actions"][:, 0])) if not moves]
    if len(still) == len(action_names):
        raise InputError(f"no action of {args.data} varies: there is nothing to compare with")
    group = [np.array([group_of(data[0].instructions[i]) for i in split["instruction_id"]])
             for split in (train, held_out)]
    groups = {"all": [np.ones(len(g), bool) for g in group],
              **{name: [g == name for g in group] for name in [*GROUPS, "other"]
                 if 0 < (group[0] == name).sum() < len(group[0])}}
    facts = ("".join(f"policy       {path}, step {c['step']:,}\n"
                     for path, c in zip(args.checkpoint, checkpoints))
             + f"actions      {data[0].action_dim}"
             + (f"; constant and left out: {', '.join(still)}" if still else "")
             + f"\ndata         {args.data}, {args.stride} frames per latent action: fitted on "
             f"{data[0].num_episodes} episodes ({len(train['t']):,} windows), reported on "
             f"{data[1].num_episodes} held-out episodes ({len(held_out['t']):,})\n"
             + "\n".join(f"{name:12s} {len(texts)} instructions, as {texts[0]!r}"
                          for name in [*GROUPS, "other"]
                          for texts in [[t for t in data[0].instructions if group_of(t) == name]] if texts))
    print(facts + "\n")

    # ---- 3 correlations ----
    table = correlations(train, held_out, groups, names, args, note)
    cca_rows = cca_table(table)
    print(text_table(cca_rows) + "\n")
    gain = table["all"]["single"]["gain"][names[0]]
    for other, g in gain.items():
        print("gain over {:14s} 1st {:+.2f} [{:+.2f}, {:+.2f}], mean {:+.3f} [{:+.3f}, {:+.3f}]".format(
            other, g["first"], *g["first_interval"], g["mean"], *g["mean_interval"]))
    sections = [("correlations", "Canonical correlations with the true actions", READING["correlations"],
                 cca_rows, draw_correlations(table))]

    # ---- 4 probes, collapse ----
    probed = probes(train, held_out, [*names, "random 1"], action_names,
                    action.get("delta") or [False] * len(action_names), args)
    rows = [("R2, held out", *(probed["actions"]["columns"]), "mean [95 %]",
             *(probed.get("motion", {}).get("columns", [])))]
    for name, r in probed["actions"]["rows"].items():
        motion = probed["motion"]["rows"][name]["r2"] if "motion" in probed else []
        rows.append((name, *(f"{x:.2f}" for x in r["r2"]),
                     "{:.2f} [{:.2f}, {:.2f}]".format(r["mean"], *r["mean_interval"]),
                     *(f"{x:.2f}" for x in motion)))
    print("\n" + text_table(rows))
    sections.append(("probes", "Probes of the true actions", READING["probes"], rows, draw_probes(probed)))
    collapsed = {name: collapse(held_out["latents"][name], held_out["instruction_id"])
                 for name in [*names, *inverses, "random 1"]}
    rows = [("latents", "std of each dimension", "rank of z_t", "rank of chunks", "saturated", "instruction")]
    rows += [(name, " ".join(f"{x:.2f}" for x in c["std"]), f"{c['rank']:.1f} of {c['rank_of']}",
              f"{c['rank_chunk']:.1f} of {c['rank_chunk_of']}", f"{c['saturated']:.0%}",
              f"{c['instruction']:.0%}") for name, c in collapsed.items()]
    print("\n" + text_table(rows))
    sections.append(("collapse", "Have they collapsed?", READING["collapse"], rows, None))
    result = {"cca": table, "probes": probed, "collapse": collapsed}

    # ---- 5 world model, 6 pairs ----
    batch, video = open_video(args, checkpoints[0], note)
    if batch:
        world_model = WorldModel(checkpoints[0]["world_config"]).to(device)
        world_model.load_state_dict(checkpoints[0]["world_model"])
        batch = to_device(batch, device)
        policy = policies[names[0]]
        with torch.no_grad():
            z = policy.latent_actions(by_position(batch["obs"], policy.cameras))
        one_camera = {n: p for n, p in policies.items() if len(p.cameras) == 1 and n in (*names, "random 1")}
        result["nuisances"] = nuisances(one_camera, batch, args.seed)
        rows = [("R2, clips of other episodes", "camera x", "camera y", "light", "moved by both")]
        rows += [(name, *(f"{r[k]:.2f}" for k in ("camera_x", "camera_y", "light", "moved")))
                 for name, r in result["nuisances"].items()]
        print("\n" + text_table(rows))
        sections.append(("nuisances", "What must not be needed", READING["nuisances"], rows, None))

        imagination = Imagination(world_model.eval(), batch, args.seed)
        result["use_per_step"] = use_per_step(z, imagination, args)
        result["effect"], sweep_png = sweep(z, imagination)
        result["swap"], swap_png = swap(z, imagination, args)
        sections.append(("use", "Does the world model use them?", READING["use"], None,
                         draw_use(result["use_per_step"], result["effect"])))
        rows = [("motion of the imagined clip points as", "mean cosine [95 %]")]
        rows += [(text, "{cosine:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**result["swap"][k]))
                 for k, text in (("own", "its own true one, without a swap"),
                                 ("follows_latents", "that of A, whose latents it has"),
                                 ("follows_scene", "that of B, whose scene it has")) if k in result["swap"]]
        for name, r in result["use_per_step"].items():
            print(f"shuffled     same {name}: open-loop error x "
                  + " ".join(f"{x:.2f}" for x in r["ratio"]))
        print(f"\n{text_table(rows)}\nof {result['swap']['pairs']} pairs that move in different directions")
        sections.append(("swap", f"Latents of A in the scene of B ({result['swap']['pairs']} pairs counted)",
                         READING["swap"], rows, swap_png))
        sections.append(("sweep", "One latent dimension at a time", READING["sweep"], None, sweep_png))

        robot_data = EpisodeDataset(args.data, policy.chunk, 1, future=1, split="val", stride=args.stride)
        robot = next(iter(DataLoader(Subset(robot_data, robot_data.spaced(3 * args.clips)),
                                     batch_size=3 * args.clips)))
        compared = [n for n in (names[0], "random 1") if n in one_camera]
        clips = [clips_for_pairs(to_device(b, "cpu"), policies, compared, device)
                 for b in ([robot, batch] if Path(video).resolve() != Path(args.data).resolve() else [robot])]
        result["pairs"], pictures = pairs(clips[0], clips[1] if len(clips) > 1 else None,
                                          [*compared, "frame"], args)
        rows = [("nearest pairs", "by", "motions agree [95 %]", "any such pair", "pairs")]
        rows += [(kind, name, "{:.0%} [{:.0%}, {:.0%}]".format(r["agree"], *r["interval"]),
                  f"{r['chance']:.0%}", r["pairs"])
                 for kind, several in result["pairs"].items() for name, r in several.items() if r]
        print("\n" + text_table(rows))
        sections.append(("pairs", "Nearest pairs in latent space", READING["pairs"], rows,
                         draw_pairs(pictures) if pictures else None))

    # ---- files ----
    out.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    facts += ("".join(f"\nnote         {n}" for n in notes)
              + f"\ncommand      {origin['command']}, commit {origin['commit']}, {origin['machine']}")
    write_report(out, "Latent actions of " + ", ".join(names), facts, sections)
    result |= {"checkpoints": [{"path": path, "hash": file_hash(path), "step": c["step"]}
                               for path, c in zip(args.checkpoint, checkpoints)],
               "data": args.data, "fingerprint": data[0].fingerprint, "video": video,
               "constant_actions": still, "notes": notes,
               "training": {"episodes": data[0].num_episodes, "windows": len(train["t"])},
               "held_out": {"episodes": data[1].num_episodes, "windows": len(held_out["t"])},
               "args": vars(args), "provenance": origin}
    write_atomically(out / "cca.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\nwrote        {out}/report.html, cca.json, "
          + ", ".join(f"{name}.png" for name, *_, picture in sections if picture))


if __name__ == "__main__":
    run(main)

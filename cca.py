"""Do latent actions line up with true ones? Canonical correlation analysis (Sec. IV, Q4).

    python cca.py                                # runs/pretrain/last.pt on data/robot: z_t against a_t
    python cca.py --steps chunk                  # all n latent actions of a chunk against all n true ones
    python cca.py --smoke                        # few windows, to see that everything runs

Latent actions z of the pretrained policy, which has seen no action, against the true actions a of labelled
demonstrations. CCA finds pairs of directions, one in each space, whose projections correlate most; every
further pair is uncorrelated with those before it:

    rho_i = max corr(A_i^T z, B_i^T a)    solved by the SVD of  S_zz^-1/2 S_za S_aa^-1/2         (Eq. 8, 9)

Directions are fitted on the training episodes, correlations reported on held-out ones. Two warnings:

1. In sample, CCA of many columns is inflated: 70 latent and 70 action columns correlate in any sample of a
   few hundred rows, whatever they mean. The in-sample figures stand apart and are marked.
2. Latent actions are a function of the picture and the instruction, and so is what an expert does: ANY
   function of the picture correlates with the actions, also a randomly initialised policy's output. Only the
   gain over it says anything.

Baselines in the same table: policies with random weights, training rows with shuffled actions, and the time
in the episode. Beside them the held-out R2 of a linear probe. Writes cca.json and cca.png under --out.
Measured for the tiny policy (64 pixels): 50 s on one core.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (InputError, at_least, by_position, file_hash, load_policy, make_policy, pick_device,
                    probe_r2, provenance, run, to_device, write_atomically)
from prepare_data import EpisodeDataset

SMOKE = dict(max_windows=200, bootstrap=50, random_policies=1)


# ---- canonical correlations ------------------------------------------------------------------------------


def inverse_root(S):
    """S^-1/2 of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(S)
    return vectors / np.sqrt(values) @ vectors.T


def cca_fit(X, Y, ridge=1e-3):
    """Canonical directions of X (N, dx), Y (N, dy) -> A (dx, r), B (dy, r), (means of X, Y); r = min(dx, dy).

    corr((X - mx) A_i, (Y - my) B_i) falls with i. ridge is added to the variances of the standardised
    columns, hence it has no unit. No column may be constant.
    """
    (mx, sx), (my, sy) = ((v.mean(0), v.std(0)) for v in (X, Y))
    x, y = (X - mx) / sx, (Y - my) / sy
    white_x = inverse_root(x.T @ x / len(x) + ridge * np.eye(x.shape[1]))
    white_y = inverse_root(y.T @ y / len(y) + ridge * np.eye(y.shape[1]))
    u, _, vt = np.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y, full_matrices=False)         # (Eq. 8, 9)
    return (white_x @ u) / sx[:, None], (white_y @ vt.T) / sy[:, None], (mx, my)


def episode_sums(u, v, episode):
    """Projections u, v (N, r), episode of each row (N,) -> (E, 6, r): what a correlation needs of it."""
    _, index = np.unique(episode, return_inverse=True)
    parts = np.stack([np.ones_like(u), u, v, u * u, v * v, u * v], 1)                 # (N, 6, r)
    sums = np.zeros((index.max() + 1, *parts.shape[1:]))
    np.add.at(sums, index, parts)
    return sums


def correlation(sums):
    """Correlations from sums (..., 6, r) -> (..., r); 0 where one side does not vary."""
    n, u, v, uu, vv, uv = np.moveaxis(sums, -2, 0)
    variances = np.clip(uu / n - (u / n) ** 2, 0, None) * np.clip(vv / n - (v / n) ** 2, 0, None)
    return np.where(variances > 1e-20, (uv / n - u * v / n ** 2) / np.sqrt(np.maximum(variances, 1e-20)), 0.0)


def cca_correlations(X, Y, A, B, means):
    """Correlations (r,) of rows X (N, dx), Y (N, dy), fitted on or not, along directions of cca_fit."""
    return correlation(episode_sums((X - means[0]) @ A, (Y - means[1]) @ B, np.zeros(len(X))).sum(0))


def resampled_correlations(X, Y, A, B, means, episode, weights):
    """The same with whole episodes resampled: weights (resamples, E) -> (resamples, r).

    Episodes, not rows: rows of one episode are so alike that resampling them makes intervals far too narrow.
    """
    sums = episode_sums((X - means[0]) @ A, (Y - means[1]) @ B, episode)              # (E, 6, r)
    return correlation(np.einsum("se,ekr->skr", weights, sums))


def varying(X):
    """Which columns of X (N, d) are not constant -> (d,) bool. A constant correlates with nothing."""
    return X.std(0) > 1e-6


# ---- latent actions of the data --------------------------------------------------------------------------


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


@torch.no_grad()
def collect(policies, data, rows, device, steps, title):
    """-> per policy latent actions (N, Z or n*Z), true actions (N, 7 or n*7), episode (N,), time (N, 3)."""
    latents, actions, episode, t = [[] for _ in policies], [], [], []
    loader = DataLoader(Subset(data, rows), batch_size=64)
    for batch in tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True):
        keep = ~batch["is_pad"].any(1) if steps == "chunk" else ~batch["is_pad"][:, 0]
        n = batch["is_pad"].shape[1] if steps == "chunk" else 1
        obs = to_device(batch["obs"], device)
        for mine, policy in zip(latents, policies):
            z = policy.latent_actions(by_position(obs, policy.cameras))               # (B, n, Z)
            mine.append(z[keep.to(device), :n].flatten(1).cpu())
        actions.append(batch["actions"][keep, :n].flatten(1))
        episode.append(batch["episode"][keep])
        t.append(batch["t"][keep])
    t = torch.cat(t).double().numpy() / 100
    return ([torch.cat(mine).double().numpy() for mine in latents], torch.cat(actions).double().numpy(),
            torch.cat(episode).numpy(), np.stack([t, t ** 2, t ** 3], 1))


# ---- the analysis ----------------------------------------------------------------------------------------


def analyse(X, Y, held_out_X, held_out_Y, episode, ridge, weights):
    """Fit on X (N, dx), Y (N, dy), report on held-out rows -> correlations (dy,), their resamples, probe R2.

    Constant columns of X are dropped; a component missing for want of columns counts as correlation 0.
    """
    kept, missing = varying(X), [(0, 0), (0, max(0, Y.shape[1] - int(varying(X).sum())))]
    if not kept.any():
        raise InputError("the latent actions are constant: the policy has collapsed (z_std is 0); "
                         "pretrain it again")
    if len(X) <= kept.sum() + Y.shape[1] or len(held_out_X) < 2:
        raise InputError(f"{len(X)} training and {len(held_out_X)} held-out windows are too few for "
                         f"{kept.sum()} + {Y.shape[1]} dimensions: raise --max-windows, or give more data")
    X, held_out_X = X[:, kept], held_out_X[:, kept]
    fit = cca_fit(X, Y, ridge)
    return {"held_out": np.pad(cca_correlations(held_out_X, held_out_Y, *fit), missing[1]),
            "in_sample": np.pad(cca_correlations(X, Y, *fit), missing[1]),
            "resampled": np.pad(resampled_correlations(held_out_X, held_out_Y, *fit, episode, weights),
                                missing),
            "probe_r2": float(np.nanmean(probe_r2(X, Y, held_out_X, held_out_Y))),
            "constant_latents": np.flatnonzero(~kept).tolist()}


def interval(samples):
    """95 % bootstrap interval over the first axis -> list of [low, high], or one [low, high]."""
    return np.stack(np.percentile(samples, (2.5, 97.5), axis=0), -1).tolist()


def summarise(pretrained, randoms, shuffled, time):
    """Everything as plain data. The gain is pretrained minus random on the same resampled episodes, each time
    minus another one of the random policies: what one of them gets by luck is inside the interval."""
    mean_random = {k: np.mean([r[k] for r in randoms], 0)
                   for k in ("held_out", "in_sample", "resampled", "probe_r2")}
    per_policy = np.array([r["held_out"] for r in randoms])                           # (policies, r)
    gain = pretrained["resampled"] - np.stack([
        randoms[k % len(randoms)]["resampled"][k]
        for k in range(len(pretrained["resampled"]))])                                # (resamples, r)

    def plain(a):
        return {"held_out": a["held_out"].tolist(), "held_out_interval": interval(a["resampled"]),
                "mean": float(a["held_out"].mean()), "mean_interval": interval(a["resampled"].mean(1)),
                "in_sample": a["in_sample"].tolist(), "probe_r2": float(a["probe_r2"])}

    return {"pretrained": plain(pretrained) | {"constant_latents": pretrained["constant_latents"]},
            "random": plain(mean_random) | {"policies": len(randoms), "low": per_policy.min(0).tolist(),
                                            "high": per_policy.max(0).tolist(), "all": per_policy.tolist(),
                                            "all_probe_r2": [r["probe_r2"] for r in randoms]},
            "shuffled": plain(shuffled), "time": plain(time),
            "gain_over_random": {"mean": float((pretrained["held_out"] - mean_random["held_out"]).mean()),
                                 "mean_interval": interval(gain.mean(1)), "held_out_interval": interval(gain),
                                 "probe_r2": float(pretrained["probe_r2"] - mean_random["probe_r2"])}}


def print_table(r, shown=10):
    p, q = r["pretrained"], r["random"]
    rows = [("component", "pretrained", "[95 %]", "random", f"[range of {q['policies']}]", "shuffled", "time",
             "in sample: pretrained", "random")]
    for i in range(min(shown, len(p["held_out"]))):
        low, high = p["held_out_interval"][i]
        numbers = [r[name]["held_out"][i] for name in ("pretrained", "random", "shuffled", "time")]
        a, b, c, d, e, f = (f"{x:.2f}" for x in (*numbers, p["in_sample"][i], q["in_sample"][i]))
        ends = f"[{low:.2f}, {high:.2f}]", f"[{q['low'][i]:.2f}, {q['high'][i]:.2f}]"
        rows.append((str(i + 1), a, ends[0], b, ends[1], c, d, e, f))
    for title, key in (("mean", "mean"), ("probe R2", "probe_r2")):
        a, b, c, d = (f"{r[name][key]:.2f}" for name in ("pretrained", "random", "shuffled", "time"))
        ends = "[{:.2f}, {:.2f}]".format(*p["mean_interval"]) if key == "mean" else ""
        rows.append((title, a, ends, b, "", c, d, "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * w for w in widths))
    print("\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows))
    g = r["gain_over_random"]
    print("\ngain over random weights: mean correlation {:+.3f} [{:+.3f}, {:+.3f}], probe R2 {:+.3f}".format(
        g["mean"], *g["mean_interval"], g["probe_r2"]))


def draw(r, path, title, shown=10):
    """Bars: held-out correlation of each component, pretrained beside random beside shuffled."""
    count = min(shown, len(r["pretrained"]["held_out"]))
    figure = Figure(figsize=(1.6 + 0.9 * count, 3.6), layout="constrained")
    axes, x = figure.subplots(), np.arange(count)
    bars = (("pretrained", "#0072B2", "pretrained (bars: 95 % over episodes)",   # Okabe and Ito's colours
             r["pretrained"]["held_out_interval"]),
            ("random", "#E69F00", f"random weights (mean and range of {r['random']['policies']})",
             list(zip(r["random"]["low"], r["random"]["high"]))),
            ("shuffled", "#999999", "shuffled actions", r["shuffled"]["held_out_interval"]))
    for k, (name, colour, label, ends) in enumerate(bars):
        height, ends = np.array(r[name]["held_out"])[:count], np.array(ends)[:count]
        error = np.clip([height - ends[:, 0], ends[:, 1] - height], 0, None)
        axes.bar(x + 0.27 * (k - 1), height, 0.25, yerr=error, color=colour, label=label, capsize=2,
                 error_kw={"lw": 1})
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xticks=x, xticklabels=x + 1, xlabel="canonical component (number)", title=title,
             ylabel="held-out correlation (no unit)", ylim=(min(-0.1, axes.get_ylim()[0]), 1))
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


# ---- the run ---------------------------------------------------------------------------------------------


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--checkpoint", default="runs/pretrain/last.pt",
                   help="pretrained policy (default %(default)s)")
    g.add_argument("--data", default="data/robot", help="labelled demonstrations (default %(default)s)")
    g.add_argument("--steps", choices=("first", "chunk"), default="first",
                   help="z_t against a_t, or whole chunks: n*Z against n*7 columns (default %(default)s)")
    g = p.add_argument_group("analysis")
    g.add_argument("--ridge", type=float, default=1e-3, help="added to the variances of the standardised "
                   "columns, no unit; 0 = off (default %(default)s)")
    g.add_argument("--max-windows", type=int, default=2000,
                   help="per split, evenly spaced (default %(default)s)")
    g.add_argument("--random-policies", type=int, default=5,
                   help="randomly initialised policies (default %(default)s)")
    g.add_argument("--bootstrap", type=int, default=500,
                   help="resamples of held-out episodes (default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder for cca.json and cca.png (default: cca beside the checkpoint)")
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
    at_least(args, 0, "ridge", "seed")
    at_least(args, 1, "max_windows", "random_policies", "bootstrap")
    return args


def open_data(args, policy, checkpoint):
    """-> training and held-out windows of args.data, looked at through as many cameras as the policy has."""
    name = checkpoint["text_encoder"]
    whole = EpisodeDataset(args.data, policy.chunk, text_encoder=name)
    if whole.action_dim is None:
        raise InputError(f"{args.data} has no actions to compare with: give labelled demonstrations, "
                         "python prepare_data.py sim makes some in data/robot")
    if len(whole.cameras) < len(policy.cameras):
        raise InputError(f"{args.checkpoint} looks through {len(policy.cameras)} cameras, {args.data} has "
                         f"{len(whole.cameras)}")
    splits = [EpisodeDataset(args.data, policy.chunk, len(policy.cameras), split=s, text_encoder=name)
              for s in ("train", "val")]
    if min(d.num_episodes for d in splits) < 2:
        raise InputError(f"{args.data} has {splits[0].num_episodes} training and {splits[1].num_episodes} "
                         "held-out episodes: 2 of each are the least, 20 episodes in all give that")
    return splits


def load_policies(args):
    """-> the pretrained policy and those with random weights, and the checkpoint."""
    policy, checkpoint = load_policy(args.checkpoint, args.device)
    if checkpoint["stage"] != "pretrain":
        raise InputError(f"{args.checkpoint} has been finetuned on actions: give the pretrained checkpoint")
    if policy.config["head"] != "latent":
        print(f"note         {args.checkpoint} was also trained on true actions (--labels-frac): what "
              "follows is no evidence that video alone gives them")
    policies = [policy]
    for k in range(args.random_policies):
        torch.manual_seed(args.seed + k)
        policies.append(make_policy(checkpoint["config"]).to(args.device).eval())
    return policies, checkpoint


def action_names(data, steps, chunk):
    """Names of the action columns, as the dataset has them or numbers."""
    names = (data.attrs.get("action") or {}).get("names") or [str(i) for i in range(data.action_dim)]
    return names if steps == "first" else [f"{name} of k={k}" for k in range(chunk) for name in names]


def main(argv=None):
    args = arguments(argv)
    pick_device(args.device)
    torch.set_num_threads(args.threads)
    out = Path(args.out or Path(args.checkpoint).parent / "cca")
    if (out / "cca.json").exists() and not args.overwrite:
        raise InputError(f"{out} already holds a result: --overwrite replaces it, --out puts this one "
                         "elsewhere")

    # ---- latent and true actions ----
    policies, checkpoint = load_policies(args)
    data = open_data(args, policies[0], checkpoint)
    estimate_latent_statistics(policies[1:], data[0], data[0].spaced(min(512, args.max_windows)),
                               args.device)
    (Xs, Y, _, time), (held_out_Xs, held_out_Y, episode, held_out_time) = (
        collect(policies, d, d.spaced(args.max_windows), args.device, args.steps, title)
        for d, title in zip(data, ("training episodes", "held-out episodes")))
    kept = varying(Y)
    Y, held_out_Y = Y[:, kept], held_out_Y[:, kept]
    names = action_names(data[0], args.steps, policies[0].chunk)
    dropped = [name for name, varies in zip(names, kept) if not varies]

    # ---- correlations ----
    rng = np.random.default_rng(args.seed)
    episodes = len(np.unique(episode))
    weights = rng.multinomial(episodes, np.full(episodes, 1 / episodes), args.bootstrap)   # (resamples, E)
    rest = (held_out_Y, episode, args.ridge, weights)
    pretrained, *randoms = [analyse(X, Y, held_out_X, *rest) for X, held_out_X in zip(Xs, held_out_Xs)]
    shuffled = analyse(Xs[0], rng.permutation(Y), held_out_Xs[0], rng.permutation(held_out_Y), *rest[1:])
    result = summarise(pretrained, randoms, shuffled, analyse(time, Y, held_out_time, *rest))
    print(f"policy       {args.checkpoint}, step {checkpoint['step']:,}\n"
          f"dimensions   {Xs[0].shape[1]} latent, {Y.shape[1]} action"
          + (f"; constant and left out: {', '.join(dropped)}" if dropped else "")
          + f"\ndata         {args.data}: fitted on {data[0].num_episodes} episodes ({len(Y):,} windows), "
          f"reported on {episodes} held-out episodes ({len(held_out_Y):,})\n")
    print_table(result)

    # ---- files ----
    out.mkdir(parents=True, exist_ok=True)
    draw(result, out / "cca.png", f"{args.data}: {episodes} held-out episodes, {len(held_out_Y):,} windows")
    result |= {"checkpoint": args.checkpoint, "hash": file_hash(args.checkpoint), "step": checkpoint["step"],
               "data": args.data, "fingerprint": data[0].fingerprint, "constant_actions": dropped,
               "training": {"episodes": data[0].num_episodes, "windows": len(Y)},
               "held_out": {"episodes": episodes, "windows": len(held_out_Y)}, "args": vars(args),
               "provenance": provenance()}
    write_atomically(out / "cca.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\nwrote        {out}/cca.json, cca.png")


if __name__ == "__main__":
    run(main)

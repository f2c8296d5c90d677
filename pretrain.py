"""Stage 1 of LAWM (Sec. III-A): learn latent actions from video, without action labels.

    python pretrain.py                           # data/hand -> runs/pretrain/last.pt (policy and world model)
    python pretrain.py --smoke                   # a few steps, to see that everything runs
    python pretrain.py --resume                  # go on where a stopped run stood, with the same result
    python pretrain.py --data data/bridge data/ssv2 --probe-data none --policy-size paper --world-model 50m
    python pretrain.py --predict posterior --motion-weight 0 --latent-norm none  # the paper's plain objective

The policy sees the first frame and the instruction and emits n latent actions; the world model must predict
the next n frames from that frame and those latents. One optimiser trains both. Writes, under --out: last.pt,
metrics.jsonl, TensorBoard events, and open_loop.png (truth, imagined, error) from held-out clips.

Default run, measured on two CPU cores: 4 to 6 minutes, 1.2 GB, shuffle_ratio 1.22 at the end. The paper's
sizes on a GPU: not run.
ASSUMPTION: a chunk is n frames of one dataset; of several, strides make it span about the same time in each
(--strides). The paper does not say how it treats different rates, nor how it weighs its datasets (--weights).
Later stages take the architecture from last.pt: there are no architecture flags after this script.
"""
import argparse
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (POLICIES, WORLD_MODEL_SIZES, InputError, Log, WorldModel, at_least, by_position, count,
                    make_policy, masked_mean, open_run, pick_device, policy_numbers, probe_r2, provenance,
                    random_shift, run, save_checkpoint, to_device, write_atomically)
from prepare_data import EpisodeDataset, Mixture

SMOKE = dict(steps=6, batch_size=8, log_every=2, save_every=4, eval_every=6, eval_windows=16)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["data/hand"], help="dataset folders; actions in them are "
                   "not read; paper: BridgeData V2 and Something-Something v2 (default data/hand)")
    g.add_argument("--weights", nargs="+", type=float, help="share of the windows drawn from each, to any "
                   "scale (default: every window is as likely)")
    g.add_argument("--strides", nargs="+", type=int, help="frames per step in each; 1 = every frame "
                   "(default: a chunk spans about as long as in the slowest)")
    g.add_argument("--probe-data", default="data/robot", help="labelled demonstrations for the linear probe "
                   "that is logged while training; never trained on; "
                   "'none' turns it off (default %(default)s)")
    g.add_argument("--shift", type=int, default=3,
                   help="random shift of whole clips, pixels; 0 = off, paper (default %(default)s)")
    g.add_argument("--workers", type=int, default=0,
                   help="loader processes; 4 to 8 on a large machine (default %(default)s)")
    g = p.add_argument_group("policy")
    g.add_argument("--policy", choices=POLICIES, default="baku", help="default %(default)s")
    g.add_argument("--policy-size", default="tiny", help="tiny or paper (default %(default)s)")
    g.add_argument("--chunk", type=int, default=10,
                   help="n, latent actions per chunk; paper 10 for BAKU (default %(default)s)")
    g.add_argument("--latent-dim", type=int, default=7,
                   help="Z, width of a latent action; paper 7 (default %(default)s)")
    g.add_argument("--latent-norm", choices=("batch", "none"), default="batch", help="standardise latents "
                   "over the batch before the tanh; paper none (default %(default)s)")
    g = p.add_argument_group("world model")
    g.add_argument("--world-model", choices=WORLD_MODEL_SIZES, default="tiny",
                   help="paper 50m (default %(default)s)")
    g.add_argument("--predict", choices=("posterior", "prior", "both"), default="both",
                   help="what frames are reconstructed from; paper posterior (default %(default)s)")
    g.add_argument("--motion-weight", type=float, default=10.0, help="extra weight of pixels that change "
                   "after the first frame; paper 0 (default %(default)s)")
    g.add_argument("--free-bits", type=float, default=1.0,
                   help="nats of KL that cost nothing; paper 1 (default %(default)s)")
    g.add_argument("--decode-steps", type=int, default=4, help="frames decoded per window and step, drawn at "
                   "random: same expected loss, less work; 0 = all, paper (default %(default)s)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=800, help="optimiser steps (default %(default)s)")
    g.add_argument("--batch-size", type=int, default=32,
                   help="windows per step; release 256 (default %(default)s)")
    g.add_argument("--lr", type=float, default=3e-4,
                   help="policy learning rate; release 1e-4 (default %(default)s)")
    g.add_argument("--world-model-lr", type=float, default=1e-3, help="release 1e-4 (default %(default)s)")
    g.add_argument("--warmup", type=int, default=50,
                   help="steps of linear warm-up; release 1000 (default %(default)s)")
    g.add_argument("--weight-decay", type=float, default=1e-6,
                   help="AdamW; release 1e-6 (default %(default)s)")
    g.add_argument("--clip", type=float, default=100.0,
                   help="norm of the whole gradient; release 100 (default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/pretrain", help="run folder (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    g.add_argument("--overwrite", action="store_true", help="throw away what stands in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    g.add_argument("--seed", type=int, default=0,
                   help="everything random follows from it (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="default %(default)s")
    g.add_argument("--threads", type=int, default=0,
                   help="torch CPU threads; 0 = all cores. On a busy machine 1 is faster")
    g.add_argument("--log-every", type=int, default=20, help="steps (default %(default)s)")
    g.add_argument("--save-every", type=int, default=100, help="steps (default %(default)s)")
    g.add_argument("--eval-every", type=int, default=200, help="steps (default %(default)s)")
    g.add_argument("--eval-windows", type=int, default=128,
                   help="held-out windows for the report (default %(default)s)")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(args)), "SMOKE names a flag that does not exist"
    return args


# ---- what is watched while latent actions are learnt -----------------------------------------------------


def shuffled_within(groups, generator):
    """A permutation giving every row another row of its group -> (index (B,), has a partner (B,) bool)."""
    index, paired = torch.arange(len(groups)), torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        index[rows], paired[rows] = rows.roll(1), len(rows) > 1
    return index, paired


@torch.no_grad()
def latent_action_report(policy, world_model, batch, seed):
    """Three failure modes on held-out clips: collapse (z_std), unused latents (shuffle_ratio), copied frames
    (copy_ratio).

    shuffle_ratio          loss with z permuted among clips of the same instruction / loss with z (same clips,
                           same noise)
    shuffle_ratio/TERM     the same for one term of the loss; open_loop: frames imagined from o_t and z alone;
                           open_loop_plain: their squared error without the weight on moving pixels
    shuffle_ratio/episode  loss with z of another moment of the same episode / loss with z: same scene, same
                           light, so what is left is what z says about the motion
    zero_ratio/open_loop   the same with z = 0 instead of permuted
    copy_ratio             open_loop_plain / squared error of repeating o_t: below 1 it beats standing still
    """
    z = policy.latent_actions(batch["obs"])                                           # (B, n, Z)
    generator = torch.Generator().manual_seed(seed)
    index, paired = shuffled_within(batch["instruction_id"].cpu(), generator)
    same_episode, paired_too = shuffled_within(batch["episode"].cpu(), generator)
    paired &= paired_too
    if not paired.any():
        raise InputError("shuffle_ratio needs two held-out windows of one episode: use more data or "
                         "--eval-windows")

    def measure(actions):
        torch.manual_seed(seed)                                                       # same noise each time
        terms = world_model.losses(batch["frames"], actions, predict="both", decode_steps=actions.shape[1])
        terms["loss"] = world_model.total({k: v for k, v in terms.items() if k in trained})
        return {k: masked_mean(v[paired], batch["is_pad"][paired]).item() for k, v in terms.items()}

    trained = {"context", "kl_dyn", "kl_rep"} | {
        "posterior": {"recon"}, "prior": {"open_loop"}, "both": {"recon", "open_loop"},
    }[world_model.config["predict"]]
    true, shuffled, zero = measure(z), measure(z[index]), measure(torch.zeros_like(z))
    episode = measure(z[same_episode])
    frames = batch["frames"].float() / 255
    still = ((frames[:, 1:] - frames[:, :1]) ** 2).sum((2, 3, 4))                     # (B, n)
    return {"z_std": z.std(0).mean().item(),
            "shuffle_ratio": shuffled["loss"] / true["loss"],
            **{f"shuffle_ratio/{k}": shuffled[k] / true[k]
               for k in ("recon", "open_loop", "open_loop_plain", "kl_dyn")},
            "shuffle_ratio/episode": episode["loss"] / true["loss"],
            "zero_ratio/open_loop": zero["open_loop"] / true["open_loop"],
            "copy_ratio": (true["open_loop_plain"]
                           / masked_mean(still[paired], batch["is_pad"][paired]).item())}


@torch.no_grad()
def latent_probe(policy, dataset, device, windows=3000):
    """Held-out R2 of a linear probe from z_t ... z_t+n-1 to a_t, mean over the action dimensions that vary.

    Fitted on the training episodes' windows, scored on the held-out episodes'.
    """
    latents, actions = {}, {}
    for split, data in dataset.items():
        rows, zs, acts = data.spaced(windows if split == "train" else windows // 3), [], []
        for batch in DataLoader(Subset(data, rows), batch_size=256):
            obs = by_position(to_device(batch["obs"], device), policy.cameras)
            zs.append(policy.latent_actions(obs).flatten(1).cpu())
            acts.append(batch["actions"][:, 0])
        latents[split], actions[split] = torch.cat(zs).double().numpy(), torch.cat(acts).double().numpy()
    return float(np.nanmean(probe_r2(latents["train"], actions["train"], latents["val"], actions["val"])))


@torch.no_grad()
def open_loop_strip(policy, world_model, batch, path, clips=4, scale=2):
    """PNG: per clip three rows (truth, imagined, |error| x 2); columns: context frame, o_t+1 ... o_t+n."""
    whole = torch.argsort(batch["is_pad"].sum(1), stable=True)[:len(batch["is_pad"]) // 2]    # least padded
    rows = whole[torch.linspace(0, len(whole) - 1, clips).long()].sort().values
    obs, frames = take(batch["obs"], rows), batch["frames"][rows]
    torch.manual_seed(0)
    start = world_model.context(world_model.embed(frames[:, :1])[:, 0])
    imagined = world_model.decode(
        world_model.imagine(start, policy.latent_actions(obs)))                       # (clips, n, 3, H, W)
    imagined = torch.cat([world_model.decode({k: v[:, None] for k, v in start.items()}), imagined], 1)
    truth = frames.float() / 255
    picture = torch.stack([truth, imagined,
                           (2 * (truth - imagined).abs()).clamp(max=1)], 1)       # (clips, 3, n+1, 3, H, W)
    picture = picture.permute(0, 1, 4, 2, 5, 3).flatten(0, 2).flatten(1, 2)       # (clips*3*H, (n+1)*W, 3)
    picture = (picture.cpu().numpy() * 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    write_atomically(path, cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def take(tree, rows):
    """Rows of every tensor in a nested dict."""
    return {k: take(v, rows) if isinstance(v, dict) else v[rows] for k, v in tree.items()}


def check_gradients(policy):
    """The claim the method stands on: the world-model loss reaches every parameter of the policy."""
    dead = [n for n, p in policy.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    if dead:
        total = sum(1 for _ in policy.parameters())
        raise InputError(f"the world-model loss gives no finite, non-zero gradient to {len(dead)} of {total} "
                         f"policy tensors (first: {dead[0]}): something between latent_actions and "
                         "WorldModel.loss detaches the latents")


# ---- the run ---------------------------------------------------------------------------------------------


def main(argv=None):
    args = arguments(argv)
    out = Path(args.out)
    checkpoint = open_run(args, free={"resume", "overwrite", "smoke", "out", "data", "probe_data", "workers",
                                      "log_every", "save_every", "eval_every"})
    at_least(args, 1, "chunk", "latent_dim", "steps", "log_every", "save_every", "eval_every", "eval_windows")
    at_least(args, 0, "shift", "workers", "decode_steps", "warmup", "threads", "seed")
    at_least(args, 2 if args.latent_norm == "batch" else 1, "batch_size")    # one sample has no variance
    origin = provenance()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    # ---- data ----
    train, held_out = (Mixture(args.data, args.chunk, args.weights, args.strides, cameras=1, future=True,
                               split=split, labels=False)
                       for split in ("train", "val"))      # the world model watches the main view
    # Four windows near each other at a time, mostly of one episode: latents can be permuted within it.
    anchors = np.random.default_rng(args.seed).integers(len(held_out), size=max(1, args.eval_windows // 4))
    rows = np.unique((anchors[:, None] + [0, 6, 12, 18]) % len(held_out))
    eval_batch = to_device(next(iter(DataLoader(Subset(held_out, rows), batch_size=len(rows)))), device)
    probe = None
    if args.probe_data != "none":
        if not Path(args.probe_data).exists():
            raise InputError(f"no labelled demonstrations at {args.probe_data}: name some, "
                             "or type --probe-data none")
        probe = {split: EpisodeDataset(args.probe_data, args.chunk, cameras=1, split=split,
                                       text_encoder=train.text_encoder) for split in ("train", "val")}
        if probe["val"].action_dim is None or probe["val"].image_size != train.image_size:
            raise InputError(f"--probe-data {args.probe_data} must hold actions and images of "
                             f"{train.image_size} pixels, as {args.data[0]}: name others, or "
                             "--probe-data none")

    # ---- policy, world model, one optimiser over both ----
    config = dict(policy=args.policy, cameras=train.cameras, image_size=train.image_size, chunk=args.chunk,
                  text_dim=train.text_dim, proprio_dim=None, action_dim=None, latent_dim=args.latent_dim,
                  latent_norm=args.latent_norm == "batch", head="latent", proprio_dropout=0.0,
                  **policy_numbers(args.policy, args.policy_size))
    world_config = dict(size=args.world_model, image_size=train.image_size, action_dim=args.latent_dim,
                        predict=args.predict, motion_weight=args.motion_weight, free_bits=args.free_bits,
                        decode_steps=args.decode_steps)
    policy, world_model = make_policy(config).to(device), WorldModel(world_config).to(device)
    # UPSTREAM: betas (0.95, 0.999), no decay of biases and norms; at 1e-6 the decay hardly matters.
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "peak": args.lr},
                                   {"params": world_model.parameters(), "peak": args.world_model_lr}],
                                  betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    print(f"{train.describe()}\n{'':12s} and {held_out.num_episodes:,} held-out episodes\n"
          f"policy       {args.policy} {args.policy_size}, {count(policy):,} parameters, chunk {args.chunk}, "
          f"latents of {args.latent_dim}\n"
          f"world model  {args.world_model}, {count(world_model):,} parameters")
    start = 0
    if checkpoint:
        if checkpoint["fingerprint"] != train.fingerprint:
            raise InputError(f"{' '.join(args.data)} is not the data that {out}/last.pt was trained on: "
                             "restore it, or give another --out")
        policy.load_state_dict(checkpoint["policy"])
        world_model.load_state_dict(checkpoint["world_model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")

    # ---- loop ----
    log = Log(out, start)

    def save(step):
        save_checkpoint(out / "last.pt", dict(
            stage="pretrain", step=step, config=config, policy=policy.state_dict(), world_config=world_config,
            world_model=world_model.state_dict(), optimizer=optimizer.state_dict(),
            args=vars(args), text_encoder=train.text_encoder, data=train.attrs, fingerprint=train.fingerprint,
            provenance=origin))

    def report(step):
        policy.eval(), world_model.eval()
        metrics = latent_action_report(policy, world_model, eval_batch, args.seed)
        if probe:
            metrics["probe_r2"] = latent_probe(policy, probe, device)
        open_loop_strip(policy, world_model, eval_batch, out / "open_loop.png")
        policy.train(), world_model.train()
        log(step, metrics)

    # Batch and noise of a step follow from (seed, step) alone: no more need be saved for an exact resume.
    batches = (train.draw(np.random.default_rng([args.seed, step]), args.batch_size)
               for step in range(start, args.steps))
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers)
    if start == 0:
        report(0)
    bar, clock, waited = (tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True),
                          time.time(), 0.0)
    for step, batch in enumerate(loader, start):
        waited += time.time() - clock
        torch.manual_seed(args.seed * 1_000_003 + step)
        batch = to_device(batch, device)
        # DEVIATION: clips are shifted by a few pixels, all frames alike; there are few of them at this scale.
        batch["frames"] = random_shift(batch["frames"], args.shift)
        for group in optimizer.param_groups:                                          # warm-up, cosine to 5 %
            group["lr"] = (group["peak"] * min(1, (step + 1) / max(1, args.warmup))
                           * (0.525 + 0.475 * math.cos(math.pi * step / args.steps)))
        obs = {"images": {train.cameras[0]: batch["frames"][:, 0]},
               "instruction": batch["obs"]["instruction"]}

        z = policy.latent_actions(obs)                                      # (B, n, Z)
        loss, logs = world_model.loss(batch["frames"], z, batch["is_pad"])  # (Eq. 5); gradients flow into z
        loss.backward()                                                     # ... and the policy: no detach!
        if not loss.isfinite():
            raise InputError(f"loss is {loss.item()} at step {step}: lower --lr or --clip; "
                             "last.pt is from before")
        norms = [torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None])
                 for m in (policy, world_model)]
        if step == start:
            check_gradients(policy)
        torch.nn.utils.clip_grad_norm_([*policy.parameters(), *world_model.parameters()], args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            log(done, {"loss": loss.item(), **logs, "grad_norm/policy": norms[0].item(),
                       "grad_norm/world_model": norms[1].item(), "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if done % args.eval_every == 0 or done == args.steps:
            report(done)
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl, open_loop.png")


if __name__ == "__main__":
    run(main)

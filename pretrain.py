"""Stage 1 of LAWM (Sec. III-A): learn latent actions from video, without action labels.

    python pretrain.py                           # data/hand, data/robot -> runs/pretrain/last.pt
    python pretrain.py --data data/hand          # hand videos alone: no robot is seen
    python pretrain.py --smoke                   # a few steps, to see that everything runs
    python pretrain.py --resume                  # go on where a stopped run stood, with the same result
    python pretrain.py --data data/bridge data/ssv2 --probe-data none --policy-size paper --world-model 50m
    python pretrain.py --predict posterior --motion-weight 0 --latent-norm none  # the paper's plain objective
    python pretrain.py --policy diffusion        # or act: all else is the same
    python pretrain.py --data data/robot --world-model none --labels-frac 1   # supervised baseline
    python pretrain.py --latents zero            # a control arm: the world model learns, the policy cannot

The policy sees the first frame and the instruction and emits n latent actions; the world model must predict
the next n frames from that frame and those latents. One optimiser trains both. Writes, under --out: last.pt,
metrics.jsonl, TensorBoard events, and open_loop.png (truth, imagined, error) from held-out clips.

Default run, measured on one CPU thread beside other work: 9 minutes, 1.2 GB; shuffle_ratio 1.64, probe_r2
0.41 at the end. The paper's sizes on a GPU: not run.
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
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm import tqdm

from models import (POLICIES, InputError, Log, Normalizer, at_least, by_position, count, make_policy,
                    masked_mean, open_run, pick_device, policy_numbers, probe_r2, provenance, random_shift,
                    run, save_checkpoint, to_device, write_atomically)
from prepare_data import EpisodeDataset, Mixture, even_strides, read_manifest
from world_model import (TARGETS, WORLD_MODEL_SIZES, InverseDynamics, WorldModel, shuffled_within,
                         targets)

SMOKE = dict(steps=6, batch_size=8, log_every=2, save_every=4, eval_every=6, eval_windows=16)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["data/hand", "data/robot"],
                   help="dataset folders; actions in them are not read, unless --labels-frac or --latents "
                   "true say so; paper: BridgeData V2 and Something-Something v2 (default data/hand "
                   "data/robot)")
    g.add_argument("--weights", nargs="+", type=float, help="share of the windows drawn from each, to any "
                   "scale (default: every window is as likely)")
    g.add_argument("--strides", nargs="+", type=int, help="frames per step in each, those of --label-data "
                   "last; 1 = every frame (default: a chunk spans about as long as in the slowest)")
    g.add_argument("--views", choices=("main", "all"), default="main", help="cameras that policy and world "
                   "model see; paper main, all is its future work (default %(default)s)")
    g.add_argument("--labels-frac", type=float, default=0.0, metavar="SHARE", help="share of the episodes of "
                   "--label-data whose true actions are learnt, too, through a layer behind the latent "
                   "actions; 0 = off, paper (default %(default)s)")
    g.add_argument("--label-data", nargs="+", help="dataset folders with actions (default: those of --data)")
    g.add_argument("--labels-weight", type=float, default=1.0,
                   help="of the action loss beside the world model's (default %(default)s)")
    g.add_argument("--probe-data", default="data/robot", help="labelled demonstrations for the linear probe "
                   "that is logged while training; not trained on for it; "
                   "'none' turns it off (default %(default)s)")
    g.add_argument("--shift", type=int, default=3,
                   help="random shift of whole clips, pixels; 0 = off, paper (default %(default)s)")
    g.add_argument("--workers", type=int, default=0,
                   help="loader processes; 4 to 8 on a large machine (default %(default)s)")
    g = p.add_argument_group("policy")
    g.add_argument("--policy", choices=POLICIES, default="baku", help="default %(default)s")
    g.add_argument("--policy-size", default="tiny", help="tiny or paper (default %(default)s)")
    g.add_argument("--chunk", type=int, help="n, latent actions per chunk; paper 10 for BAKU, 16 for "
                   "diffusion (default: "
                   + ", ".join(f"{name} {cls.CHUNK}" for name, cls in POLICIES.items()) + ")")
    g.add_argument("--latent-dim", type=int, default=7,
                   help="Z, width of a latent action; paper 7 (default %(default)s)")
    g.add_argument("--latent-norm", choices=("batch", "none"), default="batch", help="standardise latents "
                   "over the batch before the tanh; paper none (default %(default)s)")
    g.add_argument("--latent-calls", type=int, help="diffusion: network calls that make a latent chunk; 1 = "
                   "release, 10 = its whole sampler, unrolled (default 1)")
    g.add_argument("--latent-source", choices=("policy", "inverse"), default="policy", help="inverse: an "
                   "encoder that sees the future frames makes the latents, as LAPA's, and the policy learns "
                   "to predict them; paper policy (default %(default)s)")
    g.add_argument("--latents", choices=("learned", "shuffled", "zero", "detached", "true"),
                   default="learned", help="what the world model is fed; for control: latents of other "
                   "clips, zeros, latents without gradient (what the release does), the true actions "
                   "(default %(default)s)")
    g = p.add_argument_group("world model")
    g.add_argument("--world-model", choices=[*WORLD_MODEL_SIZES, "none"], default="tiny", help="paper 50m; "
                   "none: supervised on true actions, needs --labels-frac (default %(default)s)")
    g.add_argument("--context-frame", action=argparse.BooleanOptionalAction, default=True,
                   help="the roll starts from o_t; paper yes (default %(default)s)")
    g.add_argument("--target", choices=TARGETS, default="pixels", help="what is predicted of the next "
                   "frames; paper pixels (default %(default)s)")
    g.add_argument("--mask", type=float, default=0.0, metavar="SHARE", help="of each frame's patches that "
                   "the world model does not see; 0 = off, paper (default %(default)s)")
    g.add_argument("--proprio", action="store_true", help="the world model sees and predicts proprioception, "
                   "too; the policy does not; paper no")
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
    args.chunk = args.chunk or POLICIES[args.policy].CHUNK
    assert set(SMOKE) <= set(vars(args)), "SMOKE names a flag that does not exist"
    return args


# ---- what is watched while latent actions are learnt -----------------------------------------------------


@torch.no_grad()
def latent_action_report(z, world_model, batch, seed):
    """What latent actions z (B, n, Z) do in the world model, on a batch of held-out clips (B).

    Three failure modes: collapse (z_std), unused latents (shuffle_ratio), copied frames (copy_ratio).

    shuffle_ratio          loss with z permuted among clips of the same instruction / loss with z (same clips,
                           same noise)
    shuffle_ratio/TERM     the same for one term of the loss; open_loop: frames imagined from o_t and z alone;
                           open_loop_plain: their squared error without the weight on moving pixels
    shuffle_ratio/episode  loss with z of another moment of the same episode / loss with z: same scene, same
                           light, so what is left is what z says about the motion
    zero_ratio/open_loop   the same with z = 0 instead of permuted
    copy_ratio             open_loop_plain / squared error of repeating o_t: below 1 it beats standing still
    """
    generator = torch.Generator().manual_seed(seed)
    index, paired = shuffled_within(batch["instruction_id"].cpu(), generator)
    same_episode, paired_too = shuffled_within(batch["episode"].cpu(), generator)
    paired &= paired_too
    if not paired.any():
        raise InputError("shuffle_ratio needs two held-out windows of one episode: use more data or "
                         "--eval-windows")

    def measure(actions):
        torch.manual_seed(seed)                                                       # same noise each time
        terms = world_model.losses(batch["frames"], actions, batch.get("proprio"), predict="both",
                                   decode_steps=actions.shape[1])
        terms["loss"] = world_model.total(terms)
        return {k: masked_mean(v[paired], batch["is_pad"][paired]).item() for k, v in terms.items()}

    true, shuffled, zero = measure(z), measure(z[index]), measure(torch.zeros_like(z))
    episode = measure(z[same_episode])
    return {"z_std": z.std(0).mean().item(),
            "shuffle_ratio": shuffled["loss"] / true["loss"],
            **{f"shuffle_ratio/{k}": shuffled[k] / true[k]
               for k in ("recon", "open_loop", "open_loop_plain", "kl_dyn")},
            "shuffle_ratio/episode": episode["loss"] / true["loss"],
            "zero_ratio/open_loop": zero["open_loop"] / true["open_loop"],
            "copy_ratio": true["open_loop_plain"] / true["still"]}


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
def open_loop_strip(z, world_model, batch, path, clips=4, scale=2):
    """PNG: per clip three rows (truth, imagined, |error| x 2); columns: context frame, o_t+1 ... o_t+n. What
    is not pixels is shown as WorldModel.picture says."""
    whole = torch.argsort(batch["is_pad"].sum(1), stable=True)[:len(batch["is_pad"]) // 2]    # least padded
    rows = whole[torch.linspace(0, len(whole) - 1, clips).long()].sort().values
    frames, proprio = batch["frames"][rows], batch["proprio"][rows] if "proprio" in batch else None
    torch.manual_seed(0)
    start = world_model.context(world_model.embed(frames, proprio)[:, 0])
    imagined = world_model.decode(world_model.imagine(start, z[rows]))                # (clips, n, C, h, w)
    imagined = torch.cat([world_model.decode({k: v[:, None] for k, v in start.items()}), imagined], 1)
    truth = torch.cat(targets(frames, world_model.config["target"]), 1)               # (clips, n+1, C, h, w)
    first = frames[:, 0, :3].float() / 255
    truth, imagined = (world_model.picture(x, first) for x in (truth, imagined))  # (clips, n+1, 3, H, W)
    picture = torch.stack([truth, imagined,
                           (2 * (truth - imagined).abs()).clamp(max=1)], 1)       # (clips, 3, n+1, 3, H, W)
    picture = picture.permute(0, 1, 4, 2, 5, 3).flatten(0, 2).flatten(1, 2)       # (clips*3*H, (n+1)*W, 3)
    picture = (picture.cpu().numpy() * 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    write_atomically(path, cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def check_gradients(policy, loss, of, feed):
    """The claim that the method stands on: the world-model loss reaches every parameter of the policy.

    Of a policy that labels teach as well, what touches true actions (action_*, style_*) is left to them.
    """
    named = dict(policy.named_parameters())
    if feed and not feed.teaches:
        tqdm.write(f"gradient     of the {of} loss reaches none of {len(named)} policy tensors: --latents "
                   f"{feed.kind} is a control, its policy is trained by labels alone, if at all")
        return
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    dead = [n for n, g in zip(named, gradients) if g is None or not g.isfinite().all() or not g.any()]
    left = [n for n in dead if any(part.startswith(("action_", "style_")) for part in n.split("."))
            and policy.config["head"] == "add"]
    if len(dead) > len(left):
        raise InputError(f"the {of} loss gives no finite, non-zero gradient to {len(dead)} of {len(named)} "
                         f"policy tensors ({', '.join(dead[:5])}): something on the way detaches it")
    tqdm.write(f"gradient     of the {of} loss reaches {len(named) - len(left)} of {len(named)} policy "
               "tensors" + (f"; left to the labels: {', '.join(left)}" if left else ", all"))


# ---- ablations: what else the world model can be fed -------------------------------------------------------


class Feed:
    """--latents and --latent-source: latent actions of the policy -> actions of the world model, and what the
    policy must learn besides. By default: z, 0."""

    def __init__(self, args, world_config, limits, device):
        self.kind, self.actions, self.inverse = args.latents, None, None
        if args.latents == "true":
            self.actions = Normalizer(world_config["action_dim"])
            self.actions.fit(limits)
            self.actions.to(device)
        if args.latent_source == "inverse":
            self.inverse = InverseDynamics(world_config).to(device)

    def __call__(self, z, batch):
        """(B, n, Z), batch -> (B, n, Z), scalar"""
        if self.inverse:                # the policy never sees the future, so it can only learn the mean
            seen = self.inverse(batch["frames"])
            return seen, masked_mean(((z - seen.detach()) ** 2).mean(-1), batch["is_pad"])
        if self.kind == "shuffled":
            z = z.roll(len(z) // 2, 0)      # of another clip of the batch: the gradient reaches the policy
        elif self.kind == "zero":
            z = torch.zeros_like(z)
        elif self.kind == "detached":   # UPSTREAM: torch.tensor() does this unintentionally
            z = z.detach()
        elif self.kind == "true":
            z = self.actions.normalize(batch["actions"])
        return z, 0.0

    @property
    def teaches(self):
        """Whether the policy gets a gradient."""
        return self.inverse is not None or self.kind in ("learned", "shuffled")


# ---- the run ---------------------------------------------------------------------------------------------


def check(args):
    """InputError for what cannot be, and for flags that would do nothing."""
    at_least(args, 1, "chunk", "latent_dim", "latent_calls", "steps", "log_every", "save_every",
             "eval_every", "eval_windows")
    at_least(args, 0, "shift", "workers", "decode_steps", "warmup", "threads", "seed")
    # One sample has no variance, and no other clip whose latents could be taken.
    at_least(args, 2 if args.latent_norm == "batch" or args.latents == "shuffled" else 1, "batch_size")
    supervised, defaults = args.world_model == "none", vars(arguments([]))
    for when, names in (("with --world-model none", [
            "label_data", "labels_weight", "latent_calls", "latent_source", "latents", "context_frame",
            "predict", "target", "mask", "proprio", "motion_weight", "free_bits",
            "decode_steps"] * supervised),
            ("without --labels-frac", ["label_data", "labels_weight"] * (not args.labels_frac))):
        for name in names:
            if getattr(args, name) != defaults[name]:
                raise InputError(f"--{name.replace('_', '-')} does nothing {when}: leave it out")
    if args.labels_weight <= 0:
        raise InputError(f"--labels-weight takes more than 0, got {args.labels_weight}; off: --labels-frac 0")
    for name in ("labels_frac", "mask"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} is a share from 0 to 1, got {getattr(args, name)}")
    if supervised and not args.labels_frac:
        raise InputError("--world-model none learns from true actions alone: give --labels-frac, 1 for all")
    if args.latent_source == "inverse" and args.latents != "learned":
        raise InputError(f"--latents {args.latents} is a control of the policy's own latents: leave out "
                         "--latent-source inverse")


def open_data(args, views):
    """-> windows to train on, held-out ones, those whose true actions are learnt (or None): Mixtures."""
    paths = [*args.data, *(args.label_data or [])]
    strides = args.strides or even_strides(paths)
    if len(strides) != len(paths):
        raise InputError(f"--strides has {len(strides)} numbers for {len(paths)} datasets: one each, those "
                         "of --label-data last")
    supervised, labelled = args.world_model == "none", None
    if args.labels_frac:
        source, weights = (args.label_data, None) if args.label_data else (args.data, args.weights)
        labelled = Mixture(source, args.chunk, weights, strides[-len(source):], cameras=views, split="train",
                           fraction=args.labels_frac)
        if labelled.action_dim is None:
            raise InputError(f"{source[0]} holds video only: name demonstrations with "
                             + ("--data" if supervised else "--label-data"))
    if supervised:
        return labelled, Mixture(args.data, args.chunk, args.weights, strides, cameras=views,
                                 split="val"), labelled
    labels = [*["actions"] * (args.latents == "true"), *["proprio"] * args.proprio]
    train, held_out = (Mixture(args.data, args.chunk, args.weights, strides[:len(args.data)], cameras=views,
                               future=views, split=split, labels=labels) for split in ("train", "val"))
    for key in ("image_size", "text_encoder") if labelled else ():
        if getattr(labelled, key) != getattr(train, key):
            raise InputError(f"--label-data {source[0]} has {key} {getattr(labelled, key)}, "
                             f"{args.data[0]} has {getattr(train, key)}: prepare one of them again")
    if labelled and len(labelled.cameras) != views:
        raise InputError(f"--label-data {source[0]} has {len(labelled.cameras)} cameras, --views "
                         f"{args.views} of {args.data[0]} are {views}")
    for name, wanted, got in (("latents true", args.latents == "true", train.action_dim),
                              ("proprio", args.proprio, train.proprio_dim)):
        if wanted and not got:
            raise InputError(f"--{name} needs data that have it, {args.data[0]} has video only")
    return train, held_out, labelled


def open_probe(args, views, train):
    """-> {"train" | "val": labelled windows for the probe}, or None"""
    if args.probe_data == "none" or args.world_model == "none":
        return None
    if not Path(args.probe_data).exists():
        raise InputError(f"no labelled demonstrations at {args.probe_data}: name some, "
                         "or type --probe-data none")
    probe = {split: EpisodeDataset(args.probe_data, args.chunk, cameras=views, split=split,
                                   text_encoder=train.text_encoder) for split in ("train", "val")}
    if (probe["val"].action_dim is None or probe["val"].image_size != train.image_size
            or len(probe["val"].cameras) < views):
        raise InputError(f"--probe-data {args.probe_data} must hold actions and {views} cameras of "
                         f"{train.image_size} pixels, as {args.data[0]}: name others, or "
                         "--probe-data none")
    return probe


def main(argv=None):
    args = arguments(argv)
    out = Path(args.out)
    checkpoint = open_run(args, free={"resume", "overwrite", "smoke", "out", "data", "label_data",
                                      "probe_data", "workers", "log_every", "save_every", "eval_every"})
    check(args)
    origin = provenance()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    # ---- data ----
    views = 1 if args.views == "main" else len(read_manifest(args.data[0])[0]["cameras"])
    train, held_out, labelled = open_data(args, views)
    probe, supervised = open_probe(args, views, train), args.world_model == "none"
    # Four windows near each other at a time, mostly of one episode: latents can be permuted within it.
    anchors = np.random.default_rng(args.seed).integers(len(held_out), size=max(1, args.eval_windows // 4))
    rows = np.unique((anchors[:, None] + [0, 6, 12, 18]) % len(held_out))
    eval_batch = to_device(next(iter(DataLoader(Subset(held_out, rows), batch_size=len(rows)))), device)

    # ---- policy, world model, one optimiser over both ----
    numbers = dict(policy_numbers(args.policy, args.policy_size))
    if args.latent_calls:
        if "latent_calls" not in numbers:
            raise InputError(f"--latent-calls is of --policy diffusion, {args.policy} calls its network once")
        numbers["latent_calls"] = args.latent_calls
    head = "action" if supervised else "add" if labelled else "latent"
    config = dict(policy=args.policy, cameras=train.cameras, image_size=train.image_size, chunk=args.chunk,
                  text_dim=train.text_dim, proprio_dim=None, action_dim=labelled and labelled.action_dim,
                  latent_dim=args.latent_dim, latent_norm=args.latent_norm == "batch", head=head,
                  proprio_dropout=0.0, **numbers)
    policy = make_policy(config).to(device)
    if labelled:
        policy.action_norm.fit(labelled.limits("actions"))
    world_config, world_model, feed = None, None, None
    if not supervised:
        fed_dim = train.action_dim if args.latents == "true" else args.latent_dim
        world_config = dict(size=args.world_model, image_size=train.image_size, action_dim=fed_dim,
                            predict=args.predict, target=args.target, motion_weight=args.motion_weight,
                            free_bits=args.free_bits, decode_steps=args.decode_steps, mask=args.mask,
                            context_frame=args.context_frame, views=views,
                            proprio_dim=train.proprio_dim if args.proprio else None)
        world_model = WorldModel(world_config).to(device)
        if args.proprio:
            world_model.proprio_norm.fit(train.limits("proprio"))
        feed = Feed(args, world_config, args.latents == "true" and train.limits("actions"), device)
    modules = {"policy": policy, **({"world_model": world_model} if world_model else {}),
               **({"inverse": feed.inverse} if feed and feed.inverse else {})}
    # UPSTREAM: betas (0.95, 0.999), no decay of biases and norms; at 1e-6 the decay hardly matters.
    optimizer = torch.optim.AdamW([
        {"params": module.parameters(), "peak": args.lr if name == "policy" else args.world_model_lr}
        for name, module in modules.items()], betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    print(f"{train.describe()}\n{'':12s} and {held_out.num_episodes:,} held-out episodes\n"
          f"policy       {args.policy} {args.policy_size}, {count(policy):,} parameters, chunk {args.chunk}, "
          + ("true actions" if supervised else f"latents of {args.latent_dim}"))
    if world_model:
        print(f"world model  {args.world_model}, {count(world_model):,} parameters, predicts {args.target}")
    if labelled and world_model:
        print(f"labels       of {labelled.num_episodes:,} episodes of "
              + " ".join(args.label_data or args.data))
    start, fingerprint = 0, train.fingerprint + (f"+{labelled.fingerprint}" if labelled else "")
    if checkpoint:
        if checkpoint["fingerprint"] != fingerprint:
            raise InputError(f"{' '.join(args.data)} is not the data that {out}/last.pt was trained on: "
                             "restore it, or give another --out")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")

    # ---- loop ----
    log = Log(out, start)

    def save(step):
        save_checkpoint(out / "last.pt", dict(
            stage="pretrain", step=step, config=config, world_config=world_config,
            **{name: module.state_dict() for name, module in modules.items()},
            optimizer=optimizer.state_dict(), args=vars(args), text_encoder=train.text_encoder,
            data=train.attrs, fingerprint=fingerprint, provenance=origin))

    @torch.no_grad()
    def report(step):
        for module in modules.values():
            module.eval()
        metrics = {}
        if world_model:
            z = policy.latent_actions(eval_batch["obs"])
            if not feed.inverse:        # whose latents know the future: what counts is the policy's guess
                z, _ = feed(z, eval_batch)
            metrics = latent_action_report(z, world_model, eval_batch, args.seed)
            open_loop_strip(z, world_model, eval_batch, out / "open_loop.png")
        if supervised:
            torch.manual_seed(args.seed)
            action_loss, more = policy.loss(eval_batch)
            metrics.update({"held_out/action_loss": action_loss.item(),
                            **{f"held_out/{k}": v for k, v in more.items()}})
        if probe:
            metrics["probe_r2"] = latent_probe(policy, probe, device)
        for module in modules.values():
            module.train()
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
        if labelled and world_model:                                        # a quarter more windows
            rows = labelled.draw(np.random.default_rng([args.seed, step, 1]), max(2, args.batch_size // 4))
            labels = default_collate([labelled[row] for row in rows])
        waited += time.time() - clock
        torch.manual_seed(args.seed * 1_000_003 + step)
        batch = to_device(batch, device)
        for group in optimizer.param_groups:                                          # warm-up, cosine to 5 %
            group["lr"] = (group["peak"] * min(1, (step + 1) / max(1, args.warmup))
                           * (0.525 + 0.475 * math.cos(math.pi * step / args.steps)))
        if world_model:
            # DEVIATION: clips are shifted by a few pixels, all frames alike; there are few at this scale.
            batch["frames"] = random_shift(batch["frames"], args.shift)               # (B, n+1, 3V, H, W)
            obs = {"images": dict(zip(train.cameras, batch["frames"][:, 0].split(3, 1))),
                   "instruction": batch["obs"]["instruction"]}

            z = policy.latent_actions(obs)                                            # (B, n, Z)
            fed, distilled = feed(z, batch)                                           # z, 0; see --latents
            loss, logs = world_model.loss(batch["frames"], fed, batch["is_pad"], batch.get("proprio"))
            loss = loss + distilled                 # (Eq. 5); its gradient flows through z into the policy
            if feed.inverse:
                logs["distilled"] = distilled.item()
            if step == start:
                check_gradients(policy, loss, "world-model", feed)
        if labelled:
            batch = to_device(labels, device) if world_model else batch
            batch["obs"] = by_position(batch["obs"], policy.cameras)
            batch["obs"]["images"] = {c: random_shift(x, args.shift)
                                      for c, x in batch["obs"]["images"].items()}
            if world_model:         # the running statistics of the latents are those of the video alone
                policy.latent_norm.momentum = 0.0
            action_loss, more = policy.loss(batch)                                    # (Eq. 6), (Eq. 7)
            if world_model:
                policy.latent_norm.momentum = 0.1
            else:
                loss, logs = 0.0, {}
                if step == start:
                    check_gradients(policy, action_loss, "action", None)
            loss = loss + args.labels_weight * action_loss
            logs.update({"labels/action_loss": action_loss.item(),
                         **{f"labels/{k}": v for k, v in more.items()}})
        loss.backward()
        if not loss.isfinite():
            raise InputError(f"loss is {loss.item()} at step {step}: lower --lr or --clip; "
                             "last.pt is from before")
        norms = {f"grad_norm/{name}": torch.nn.utils.get_total_norm(
            [p.grad for p in module.parameters() if p.grad is not None]).item()
            for name, module in modules.items()}
        torch.nn.utils.clip_grad_norm_([p for m in modules.values() for p in m.parameters()], args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            log(done, {"loss": loss.item(), **logs, **norms, "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if done % args.eval_every == 0 or done == args.steps:
            report(done)
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl"
          + ", open_loop.png" * (world_model is not None))


if __name__ == "__main__":
    run(main)

"""Stage 1 of LAWM (Sec. III-A): learn latent actions from video, without action labels.

    python pretrain.py                           # data/hand and data/robot -> runs/pretrain/last.pt
    python pretrain.py --data data/hand          # hand videos alone: the policy never sees a robot
    python pretrain.py --smoke                   # a few steps, to see that everything runs
    python pretrain.py --resume                  # continue a stopped run; the result is the same
    python pretrain.py --data data/bridge data/ssv2 --probe-data none --policy-size paper --world-model 50m
    python pretrain.py --predict posterior --motion-weight 0 --latent-norm none --no-gate  # the paper's
    python pretrain.py --policy diffusion        # or act; everything else stays the same
    python pretrain.py --latents zero            # a control: the world model learns, the policy does not
    torchrun --nproc-per-node 8 pretrain.py --batch-size 256    # eight GPUs, each with 32 windows of a batch

The policy sees the first frame and the instruction and emits n latent actions. The world model must predict
the next n frames from that frame and those latent actions. One optimiser trains both. The script writes
last.pt, metrics.jsonl, TensorBoard events and open_loop.png to --out. The picture has three rows for each of
four held-out clips: the frames, what the world model imagines from the first one, and the error. The default
run takes 4.5 minutes and 1.7 GB on two CPU cores (measured). On a GPU: not run.

ASSUMPTION: a chunk is n frames of one dataset. With several datasets, strides make it span about the same
time in each (--strides). The paper does not say how it treats different frame rates, nor how it weighs its
datasets (--weights). Later stages read the architecture from last.pt, so they have no architecture flags.

Logged metrics:

    loss                  what is minimised: Eq. 5 and what the flags add to it
    recon                 squared error of frames drawn from the posterior, summed over a frame, moving pixels
                          weighted (--predict posterior or both)
    context               squared error of the first frame, which is given
    open_loop             as recon, for frames imagined from the first frame and the latent actions alone
    open_loop_plain       the same without the weight on moving pixels
    kl_dyn, kl_rep        KL of posterior and prior, nats per step (one number, two gradients)
    z_std                 standard deviation of the latent actions over held-out clips. Near 0: collapse, but
                          with --latent-norm batch it is about 0.6 whatever they hold, and 0 at step 0
    shuffle_ratio         held-out loss with latent actions permuted among clips of the same instruction,
                          divided by that with the right ones; 1: the world model ignores them
    shuffle_ratio/episode  the same with latent actions of another moment of the same episode: same scene and
                          light, so only motion is left to tell
    shuffle_ratio/recon, /open_loop, /open_loop_plain, /kl_dyn      shuffle_ratio of one term
    zero_ratio/open_loop  open-loop error with zeros as latent actions / with the right ones
    copy_ratio            open-loop error / error of repeating the first frame; below 1: better than a still
                          picture. Compare this one between --latents learned and its controls
    probe_r2              held-out R2 of a ridge regression from a chunk's latent actions to the true first
                          action, mean over its dimensions; at step 0: of the untrained policy
    distilled             squared difference of the policy's latent actions and the inverse model's
    grad_norm/policy, /world_model, /inverse    norm of the gradient before clipping
    lr                    learning rate of the policy
    waiting               share of the time spent waiting for data
"""
import argparse
import math
import time
from pathlib import Path

# First: models.py makes settings before torch starts.
from models import (POLICIES, TARGETS, WORLD_MODEL_SIZES, HelpFormatter, InputError, InverseDynamics, Log,
                    Normalizer, TextEncoder, WorldModel, at_least, by_position, check_agreed, check_same,
                    describe_size, for_training, make_policy, masked_mean, open_run, policy_numbers,
                    process_mean, provenance, r_squared, random_shift, ridge_probe, run, save_checkpoint,
                    shuffled_within, start_processes, targets, to_device, to_numbers, write_atomically)

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm import tqdm

from prepare_data import EpisodeDataset, Mixture, read_manifest

SMOKE = dict(steps=6, batch_size=8, every=6, eval_windows=16, workers=0)
# Flags that may change when a run is resumed.
FREE = {"resume", "overwrite", "smoke", "out", "data", "probe_data", "workers", "every"}

# --latents: what the world model is fed, as a function of the policy's latent actions z, and as a text that
# says which metrics to compare with those of a run with --latents learned.
CONTROLS = {
    "learned": (lambda z: z, "latent actions"),
    "shuffled": (lambda z: z.roll(len(z) // 2, 0),
                 "latent actions of other clips, so all ratios are near 1: compare copy_ratio"),
    "zero": (torch.zeros_like, "zeros, so z_std is 0 and all ratios are 1: compare copy_ratio"),
    "detached": (torch.Tensor.detach,                  # UPSTREAM: the effect of its torch.tensor(z)
                 "latent actions without their gradient: compare z_std, the ratios and probe_r2"),
    "true": (None, "true actions: latent actions can hardly reach better ratios or a better copy_ratio"),
}


def arguments(argv):
    """Parse the flags. InputError for values that cannot work."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["data/hand", "data/robot"], help="datasets; paper Bridge and SSv2")
    add("--weights", nargs="+", type=float, help="share of each dataset, to any scale (default: by size)")
    add("--strides", nargs="+", type=int, help="frames per step in each dataset (default: by frame rate)")
    add("--views", choices=("main", "all"), default="main", help="cameras that both models see; paper main")
    add("--probe-data", default="data/robot", help="labelled data for the logged linear probe; none = off")
    add("--shift", type=int, default=3, help="random shift of whole clips, pixels; 0 = off, paper")
    add("--workers", type=int, default=1, help="loader processes; 0 = none; on a GPU 8, for each GPU")
    add = p.add_argument_group("policy").add_argument
    add("--policy", choices=POLICIES, default="baku", help="architecture; paper baku and diffusion")
    add("--policy-size", default="tiny", help="tiny or paper")
    add("--text-encoder", choices=TextEncoder.DIM, default="hash", help="frozen; BAKU minilm, release clip")
    add("--chunk", type=int, help="n, latent actions per chunk (default and paper: 10; diffusion 16)")
    add("--latent-dim", type=int, default=7, help="Z, width of a latent action; paper 7")
    add("--latent-norm", choices=("batch", "none"), default="batch", help="standardise latent actions over "
        "the batch before the tanh; paper none")
    add("--latent-source", choices=("policy", "inverse"), default="policy", help="inverse: an encoder of the "
        "future frames makes them, and the policy learns to predict them (LAPA); paper policy")
    add("--latents", choices=CONTROLS, default="learned", help="what the world model is fed; paper learned")
    add = p.add_argument_group("world model").add_argument
    add("--world-model", choices=WORLD_MODEL_SIZES, default="tiny", help="size; paper 50m")
    add("--context-frame", action=argparse.BooleanOptionalAction, default=True, help="start from the "
        "posterior of o_t; paper yes")
    add("--gate", action=argparse.BooleanOptionalAction, default=True, help="the decoder chooses per pixel "
        "between what it draws and o_t; off with --no-context-frame; paper no")
    add("--target", choices=TARGETS, default="pixels", help="what is predicted of a frame; paper pixels")
    add("--predict", choices=("posterior", "prior", "both"), default="prior", help="decode posteriors "
        "(they have seen the frame), priors (open loop) or both; paper posterior")
    add("--motion-weight", type=float, default=10.0, help="extra weight of moving pixels; 0 = off, paper")
    add("--free-bits", type=float, default=1.0, help="KL without penalty, nats per step; 0 = off; paper 1")
    add("--decode-steps", type=int, default=2, help="frames decoded per window, at random; 0 = all, paper")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=1000, help="optimiser steps; the learning rate decays over all of them")
    add("--batch-size", type=int, default=32, help="windows per step, on all GPUs together; release 256")
    add("--lr", type=float, default=3e-4, help="learning rate of the policy; release 1e-4")
    add("--world-model-lr", type=float, default=1e-3, help="learning rate of the world model; release 1e-4")
    add("--warmup", type=int, default=50, help="steps of linear warm-up; 0 = off; release 1000")
    add("--weight-decay", type=float, default=1e-6, help="of AdamW; 0 = off; release 1e-6")
    add("--clip", type=float, default=100.0, help="largest norm of the gradient; inf = off; release 100")
    add = p.add_argument_group("run").add_argument
    add("--out", default="runs/pretrain", help="run folder")
    add("--resume", action="store_true", help="continue from OUT/last.pt")
    add("--overwrite", action="store_true", help="delete the run that is in OUT")
    add("--smoke", action="store_true", help=f"tiny preset {SMOKE}; explicit flags still win")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--compile", action="store_true", help="torch.compile, on GPUs only: slow first steps, then faster")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None, help="compute in bfloat16 where its "
        "precision is enough, on a CPU best with --threads 1; release no (default: on GPUs that have it)")
    add("--threads", type=int, default=2, help="CPU threads; another number rounds differently, so results "
        "differ")
    add("--every", type=int, default=200, help="steps between checkpoints, each with a report; training "
        "metrics are logged ten times as often")
    add("--eval-windows", type=int, default=128, help="held-out windows of the report")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    args.chunk = POLICIES[args.policy].CHUNK if args.chunk is None else args.chunk
    at_least(args, 1, "chunk", "latent_dim", "steps", "every", "threads")
    at_least(args, 0, "shift", "workers", "decode_steps", "warmup", "seed")
    at_least(args, 4, "eval_windows")
    # A single sample has no variance, and no other clip whose latent actions it could get.
    at_least(args, 2 if args.latent_norm == "batch" or args.latents == "shuffled" else 1, "batch_size")
    if args.latent_source == "inverse" and args.latents != "learned":
        raise InputError(f"--latents {args.latents} does not go with --latent-source inverse: leave out one")
    return args


# ---- data and models ---------------------------------------------------------------------------------------


def open_data(args):
    """-> training windows, held-out windows, {"train", "val": labelled windows} for the probe, or None."""
    views = 1 if args.views == "main" else len(read_manifest(args.data[0])[0]["cameras"])
    labels = ["actions"] if args.latents == "true" else []             # otherwise no action is ever read
    train, held_out = (Mixture(args.data, args.chunk, args.weights, args.strides, cameras=views, future=views,
                               split=split, labels=labels) for split in ("train", "val"))
    if labels and train.action_dim is None:
        raise InputError(f"--latents true needs actions, but {args.data[0]} has video only")
    seconds = min(part.chunk * part.stride / part.fps for part in train.parts)
    if seconds < 0.5:
        longer = " ".join(str(math.ceil(0.5 / seconds) * part.stride) for part in train.parts)
        print(f"warning      a chunk spans {seconds:.2f} s, in which little moves: try --strides {longer}")
    if args.probe_data == "none":
        return train, held_out, None
    probe = Path(args.probe_data).exists() and {
        split: EpisodeDataset(args.probe_data, args.chunk, cameras=views, split=split)
        for split in ("train", "val")}
    if not probe or (probe["val"].action_dim is None or probe["val"].image_size != train.image_size
                     or len(probe["val"].cameras) < views):
        raise InputError(f"--probe-data {args.probe_data} must be a dataset with actions and {views} cameras "
                         f"of {train.image_size} pixels: give another or, for video alone, --probe-data none")
    return train, held_out, probe


def build(args, train):
    """-> ModuleDict of policy, world_model and, with --latent-source inverse, inverse."""
    config = dict(policy=args.policy, cameras=train.cameras, image_size=train.image_size, chunk=args.chunk,
                  text_encoder=args.text_encoder, proprio_dim=None, action_dim=None, proprio_dropout=0.0,
                  latent_dim=args.latent_dim, latent_norm=args.latent_norm == "batch", head="latent",
                  **policy_numbers(args.policy, args.policy_size))
    world_config = dict(size=args.world_model, image_size=train.image_size, views=len(train.cameras),
                        action_dim=train.action_dim or args.latent_dim, predict=args.predict,
                        target=args.target, motion_weight=args.motion_weight, free_bits=args.free_bits,
                        dyn_scale=0.5, rep_scale=0.1,              # KL balancing, as in the release
                        decode_steps=args.decode_steps, gate=args.gate, context_frame=args.context_frame)
    modules = torch.nn.ModuleDict({"policy": make_policy(config), "world_model": WorldModel(world_config)})
    if args.latent_source == "inverse":
        modules["inverse"] = InverseDynamics(world_config)
    return modules


def make_feed(args, train, modules):
    """-> function feed(z, batch) -> actions (B, n, Z) for the world model, a loss to add (scalar).

    They are the policy's latent actions z and 0, unless --latents or --latent-source asks for an ablation.
    """
    if "inverse" in modules:
        see = for_training(modules["inverse"].forward, args)

        def feed(z, batch):             # the policy does not see the future, so it learns the mean
            seen = see(batch["frames"])
            return seen, masked_mean(((z - seen.detach()) ** 2).mean(-1), batch["is_pad"])
        return feed
    if args.latents == "true":
        action_norm = Normalizer(train.action_dim).to(args.device)
        action_norm.fit(train.limits("actions"))
        return lambda z, batch: (action_norm.normalize(batch["actions"]), 0.0)
    return lambda z, batch: (CONTROLS[args.latents][0](z), 0.0)


# ---- what is watched while latent actions are learnt -------------------------------------------------------


def check_gradients(modules, feed, batch, latents):
    """The claim of the method: the gradient of the world-model loss reaches every parameter of the policy.

    InputError if it does not, unless --latents asks for that. The modules must be in eval mode.
    """
    actions, extra = feed(modules["policy"].latent_actions(batch["obs"]), batch)
    loss = modules["world_model"].loss(batch["frames"], actions, batch["is_pad"])[0] + extra
    names, parameters = zip(*modules["policy"].named_parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    missed = [name for name, g in zip(names, gradients) if g is None or not g.any()]
    reached = f"of the world-model loss reaches {len(names) - len(missed)} of {len(names)} policy tensors"
    if latents not in ("learned", "shuffled"):
        assert len(missed) == len(names), f"--latents {latents}, but the gradient {reached}"
        reached += ": the policy is not trained, and probe_r2 is that of random weights"
    elif len(missed) == len(names) or any(g is None for g in gradients):
        raise InputError(f"the gradient {reached}, but not {', '.join(missed[:5])}: something detaches the "
                         "latent actions, latent_actions() does not use these tensors, or the world model "
                         "ignores what it is fed")
    elif missed:                        # no error: the data can be the reason, and all other tensors learn
        reached += (f"\nwarning      it is zero for {', '.join(missed)}: these tensors do not learn from "
                    "such clips. A common reason is an input that is always zero")
    print(f"gradient     {reached}")


@torch.no_grad()
def latent_action_report(z, world_model, batch, seed):
    """What the world model makes of the latent actions z (B, n, Z) of held-out clips (batch of B) -> metrics.

    A ratio is the loss, or one term of it, with other latent actions / with z, for the same clips and noise.
    The others are zero, or permuted among clips of the same instruction; for /episode among moments of one
    episode, so that only the motion differs. copy_ratio: open-loop error / error of repeating o_t.
    """
    generator = torch.Generator().manual_seed(seed)
    index, paired = shuffled_within(batch["instruction_id"].cpu(), generator)
    same_episode, paired_too = shuffled_within(batch["episode"].cpu(), generator)
    paired &= paired_too
    if not paired.any():
        raise InputError("shuffle_ratio needs two held-out windows of one episode: use more data, or a "
                         "larger --eval-windows")

    def measure(actions):
        torch.manual_seed(seed)                                                       # same noise each time
        terms = world_model.losses(batch["frames"], actions, predict="both", decode_steps=actions.shape[1])
        terms["loss"] = world_model.total(terms)
        return {k: masked_mean(v[paired], batch["is_pad"][paired]).item() for k, v in terms.items()}

    true, shuffled, zero = measure(z), measure(z[index]), measure(torch.zeros_like(z))
    return {"z_std": z.std(0).mean().item(),
            "shuffle_ratio": shuffled["loss"] / true["loss"],
            **{f"shuffle_ratio/{k}": shuffled[k] / true[k]
               for k in ("recon", "open_loop", "open_loop_plain", "kl_dyn")},
            "shuffle_ratio/episode": measure(z[same_episode])["loss"] / true["loss"],
            "zero_ratio/open_loop": zero["open_loop"] / true["open_loop"],
            "copy_ratio": true["open_loop_plain"] / true["still"]}


@torch.no_grad()
def latent_probe(policy, probe, device):
    """Held-out R2 of a linear probe from z_t ... z_t+n-1 to a_t, mean over the action dimensions that vary.

    It is fitted to windows of the training episodes and scored on windows of held-out episodes.
    """
    rows = {}
    for split, windows in (("train", 3000), ("val", 1000)):
        data, batches = probe[split], []
        for batch in DataLoader(Subset(data, data.spaced(windows)), batch_size=64):
            z = policy.latent_actions(by_position(to_device(batch["obs"], device), policy.cameras))
            batches.append((z.flatten(1).cpu(), batch["actions"][:, 0], batch["episode"]))
        rows[split] = [torch.cat(column).double().numpy() for column in zip(*batches)]
    (z, actions, episode), (z_val, actions_val, _) = rows["train"], rows["val"]
    return float(np.nanmean(r_squared(ridge_probe(z, actions, z_val, episode), actions_val)))


@torch.no_grad()
def open_loop_strip(z, world_model, batch, path):
    """Write a PNG of four clips: per clip three rows (truth, imagined, |error| x 2), per frame o_t ... o_t+n
    a column. WorldModel.picture says how targets other than pixels are shown."""
    whole = torch.argsort(batch["is_pad"].sum(1), stable=True)[:len(z) // 2]          # the least padded clips
    rows = whole[torch.linspace(0, len(whole) - 1, 4).long()]
    frames = batch["frames"][rows]
    start = world_model.context(world_model.embed(frames)[:, 0])
    imagined = world_model.imagine(start, z[rows])
    still, future = targets(frames, world_model.config["target"])
    imagined = world_model.decode({k: torch.cat([start[k][:, None], imagined[k]], 1)
                                   for k in ("deter", "stoch")}, still)               # (4, n+1, C, h, w)
    truth = torch.cat([still, future], 1)                                             # (4, n+1, C, h, w)
    first = frames[:, 0, :3].float() / 255
    truth, imagined = (world_model.picture(x, first) for x in (truth, imagined))      # (4, n+1, 3, H, W)
    picture = torch.stack([truth, imagined, (2 * (truth - imagined).abs()).clamp(max=1)], 1)
    picture = picture.permute(0, 1, 4, 2, 5, 3).flatten(0, 2).flatten(1, 2)           # (12 * H, (n+1) * W, 3)
    picture = (picture.cpu().numpy() * 255).astype(np.uint8)
    write_atomically(path, cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


# ---- the run -----------------------------------------------------------------------------------------------


def clip_gradients(modules, largest):
    """Scale all gradients to a common norm of at most `largest` -> {"grad_norm/MODULE": norm before that}."""
    norms = {f"grad_norm/{name}": torch.nn.utils.clip_grad_norm_(module.parameters(), math.inf)
             for name, module in modules.items()}
    torch.nn.utils.clip_grad_norm_(modules.parameters(), largest)
    return norms


def main(argv=None):
    args = arguments(argv)
    rank, world, device = start_processes(args, rows=2 if args.latents == "shuffled" else 1)
    out, origin = Path(args.out), provenance()
    checkpoint = open_run(args, FREE)
    torch.manual_seed(args.seed)

    # ---- data ----
    train, held_out, probe = open_data(args)
    check_agreed(args, FREE, data=train.fingerprint, step=checkpoint["step"] if checkpoint else 0)
    # Groups of four windows, mostly of one episode, so that latent actions can be permuted within it.
    anchors = np.random.default_rng(args.seed).integers(len(held_out), size=max(1, args.eval_windows // 4))
    rows = np.unique((anchors[:, None] + [0, 6, 12, 18]) % len(held_out))
    eval_batch = to_device(next(iter(DataLoader(Subset(held_out, rows), batch_size=len(rows)))), device)
    few = to_device(default_collate([held_out[row] for row in rows[:8]]), device)

    # ---- policy, world model, one optimiser for both ----
    modules = build(args, train)
    policy, world_model = modules["policy"], modules["world_model"]
    feed = make_feed(args, train, modules.to(device))
    # UPSTREAM: betas (0.95, 0.999), no decay of biases and norms; at 1e-6 the decay hardly matters.
    optimizer = torch.optim.AdamW([
        {"params": module.parameters(), "peak": args.lr if name == "policy" else args.world_model_lr}
        for name, module in modules.items()], betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    print(f"{train.describe()}\n{'':12s} and {held_out.num_episodes:,} held-out episodes\n"
          f"policy       {args.policy}, chunk {args.chunk}, {describe_size(policy)}\n"
          f"world model  {args.world_model}, {describe_size(world_model)}\n"
          f"{'':12s} and is fed {CONTROLS[args.latents][1]}")
    start = 0
    if checkpoint:
        check_same(out / "last.pt", {"data": checkpoint["fingerprint"]}, {"data": train.fingerprint})
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")
    check_gradients(modules.eval(), feed, few, args.latents)
    log = Log(out, start) if rank == 0 else lambda *_: None

    @torch.no_grad()
    def report(step):
        modules.eval()
        z = policy.latent_actions(eval_batch["obs"])
        if "inverse" not in modules:    # the inverse model has seen the future, so the policy's z is reported
            z, _ = feed(z, eval_batch)
        metrics = latent_action_report(z, world_model, eval_batch, args.seed)
        open_loop_strip(z, world_model, eval_batch, out / "open_loop.png")
        if probe:
            metrics["probe_r2"] = latent_probe(policy, probe, device)
        log(step, metrics)
        modules.train()

    # ---- loop ----
    # A step's batch follows from (seed, step), its noise from (seed, step, rank): an exact resume needs
    # nothing else. Each process takes its own rows of the batch.
    batches = (train.draw(np.random.default_rng([args.seed, step]), args.batch_size)[rank::world]
               for step in range(start, args.steps))
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    if start == 0 and rank == 0:
        report(0)
    modules.train()
    policy.requires_grad_(args.latents in ("learned", "shuffled"))      # the others train no policy
    latent_actions = for_training(policy.latent_actions, args)
    world_model_loss = for_training(world_model.loss, args)
    bar = tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True, disable=rank > 0)
    clock, waited = time.time(), 0.0
    for step, batch in enumerate(loader, start):
        waited += time.time() - clock
        torch.manual_seed(args.seed * 1_000_003 + step + (rank << 24))    # a CPU uses 32 bits of a seed only
        batch = to_device(batch, device)
        # DEVIATION: clips are shifted by a few pixels, all frames alike; there are few clips at this scale.
        batch["frames"] = random_shift(batch["frames"], args.shift)                   # (B, n+1, 3V, H, W)
        obs = {**batch["obs"], "images": dict(zip(train.cameras, batch["frames"][:, 0].split(3, 1)))}
        for group in optimizer.param_groups:                                          # warm-up, cosine to 5 %
            group["lr"] = (group["peak"] * min(1, (step + 1) / max(1, args.warmup))
                           * (0.525 + 0.475 * math.cos(math.pi * step / args.steps)))
        valid = (~batch["is_pad"]).sum()
        share = valid / process_mean(valid)             # weight of this process, 1 if there are no others

        z = latent_actions(obs)                                                       # (B, n, Z)
        actions, extra = feed(z, batch)                 # z and 0, unless a flag asks for an ablation
        loss, logs = world_model_loss(batch["frames"], actions, batch["is_pad"])      # (Eq. 5)
        loss = share * (loss + extra)
        loss.backward()                                 # the gradient flows back through z into the policy
        norms = clip_gradients(modules, args.clip)
        optimizer.step()

        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        bar.update()
        save = done % args.every == 0 or done == args.steps
        if save or done % max(1, args.every // 10) == 0:
            logs.update({"distilled": extra} if "inverse" in modules else {})
            numbers = to_numbers(done, {"loss": loss, **{k: share * v for k, v in logs.items()}, **norms})
            log(done, {**numbers, "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if save and rank == 0:
            report(done)
            save_checkpoint(out / "last.pt", dict(
                stage="pretrain", step=done, config=policy.config, world_config=world_model.config,
                **{name: module.state_dict() for name, module in modules.items()},
                optimizer=optimizer.state_dict(), args=vars(args), data=train.attrs,
                fingerprint=train.fingerprint, provenance=origin))
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl, open_loop.png")


if __name__ == "__main__":
    run(main)

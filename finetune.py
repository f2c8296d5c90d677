"""Stage 2 of LAWM (Sec. III-B): finetune the policy alone on few labelled robot demonstrations.

    python finetune.py                                   # runs/pretrain/last.pt, data/robot -> runs/finetune
    python finetune.py --init scratch --out runs/scratch # same policy, data and budget, without pretraining
    python finetune.py --smoke                           # a few steps, to see that everything runs
    python finetune.py --resume                          # go on where a stopped run stood, with same result
    python finetune.py --demos-per-task 5                # low data, where pretraining should matter most
    python finetune.py --data data/libero --steps 6000   # LIBERO on a laptop; the paper's size: README

The world model is thrown away and the policy's last layer is re-initialised (--head reinit, the paper's
choice). The architecture comes from the checkpoint; further cameras and proprioception are added when the
data have them; what is new is printed by name. Writes last.pt, metrics.jsonl and TensorBoard under --out.
Default run, measured on two CPU cores: 4 to 5 minutes, 0.8 GB. On a GPU: not run.
"""
import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import (POLICIES, InputError, Log, at_least, colour_jitter, count, init_from_pretrained,
                    load_checkpoint, make_policy, open_run, pick_device, policy_numbers, provenance,
                    random_shift, run, save_checkpoint, to_device)
from prepare_data import Mixture

SMOKE = dict(steps=6, batch_size=8, log_every=2, save_every=4, eval_every=6)
SCRATCH = dict(policy="baku", policy_size="tiny", chunk=None)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["data/robot"], help="dataset folders with actions, of the "
                   "same kind, cameras and proprioception (default data/robot)")
    g.add_argument("--weights", nargs="+", type=float, help="share of the windows drawn from each, to any "
                   "scale (default: every window is as likely)")
    g.add_argument("--strides", nargs="+", type=int, help="frames per step in each: the changes of so many "
                   "actions are added up (default: all to the rate of the slowest; one dataset: 1)")
    g.add_argument("--demos-per-task", type=int,
                   help="use the first N training demonstrations of each task (default all)")
    g.add_argument("--no-proprio", action="store_true",
                   help="leave proprioception out even where the data have it")
    g.add_argument("--shift", type=int, default=4,
                   help="random shift of each image, pixels; 0 = off (default %(default)s)")
    g.add_argument("--jitter", type=float, default=0.0, help="brightness, contrast and saturation of each "
                   "image times 1 +- this; release 0.3 on LIBERO (default %(default)s)")
    g.add_argument("--workers", type=int, default=0,
                   help="loader processes; 4 to 8 on a large machine (default %(default)s)")
    g = p.add_argument_group("policy")
    g.add_argument("--init", default="runs/pretrain/last.pt",
                   help="checkpoint to start from, or the word scratch (default %(default)s)")
    g.add_argument("--head", choices=("reinit", "add"), default="reinit", help="new last layer, or one more "
                   "layer behind the latent actions; paper reinit (default %(default)s)")
    g.add_argument("--freeze-steps", type=int, default=0, help="first steps in which only what is new is "
                   "trained; 0 = off, release (default %(default)s)")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, which are then evaluated; 0 = "
                   "off; in step t at most (1 + t) / (10 + t) (default: diffusion 0.9999, as the "
                   "release, others 0)")
    g.add_argument("--proprio-dropout", type=float, default=0.3, help="share of samples that do not see "
                   "their own pose; 0 = off, release (default %(default)s)")
    g = p.add_argument_group("policy, only with --init scratch (else the checkpoint says)")
    g.add_argument("--policy", choices=POLICIES, help=f"default {SCRATCH['policy']}")
    g.add_argument("--policy-size", help=f"tiny or paper (default {SCRATCH['policy_size']})")
    g.add_argument("--chunk", type=int, help="n, actions per chunk; paper 10 for BAKU, 16 for diffusion "
                   "(default: " + ", ".join(f"{name} {cls.CHUNK}" for name, cls in POLICIES.items()) + ")")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=1500, help="optimiser steps (default %(default)s)")
    g.add_argument("--batch-size", type=int, default=32,
                   help="windows per step; release 256 (default %(default)s)")
    g.add_argument("--lr", type=float, default=5e-4, help="learning rate; release 1e-4 (default %(default)s)")
    g.add_argument("--warmup", type=int, default=50,
                   help="steps of linear warm-up; release 1000 (default %(default)s)")
    g.add_argument("--weight-decay", type=float, default=1e-4,
                   help="AdamW; release 1e-6 (default %(default)s)")
    g.add_argument("--clip", type=float, default=10.0,
                   help="gradient norm; release 100 (default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/finetune", help="run folder (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    g.add_argument("--overwrite", action="store_true", help="throw away what stands in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    g.add_argument("--seed", type=int, default=0,
                   help="everything random follows from it (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="default %(default)s")
    g.add_argument("--threads", type=int, default=0,
                   help="torch CPU threads; 0 = all cores. On a busy machine 1 is faster")
    g.add_argument("--log-every", type=int, default=50, help="steps (default %(default)s)")
    g.add_argument("--save-every", type=int, default=200, help="steps (default %(default)s)")
    g.add_argument("--eval-every", type=int, default=500, help="steps (default %(default)s)")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(args)), "SMOKE names a flag that does not exist"
    return args


def starting_point(args):
    """What --init names -> pretrained checkpoint, or None for scratch; the chunk length either way."""
    given = [k for k in SCRATCH if getattr(args, k) is not None]
    if args.init == "scratch":
        for flag, given_too in (("--head add", args.head == "add"), ("--freeze-steps", args.freeze_steps)):
            if given_too:
                raise InputError(f"{flag} keeps what was pretrained: it needs --init CHECKPOINT")
        return None, args.chunk or POLICIES[args.policy or SCRATCH["policy"]].CHUNK
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --init scratch; {args.init} brings its "
                         "own architecture")
    checkpoint = load_checkpoint(args.init)
    if args.head == "add" and checkpoint["config"]["head"] == "action":
        raise InputError(f"--head add puts a layer behind latent actions, and {args.init} has none: leave it "
                         "out")
    return {k: checkpoint[k] for k in ("config", "policy", "text_encoder")}, checkpoint["config"]["chunk"]


def policy_config(args, pretrained, data):
    """Architecture from the checkpoint or the scratch flags, cameras and proprioception from the data."""
    if pretrained is None:
        choice = {k: getattr(args, k) or default for k, default in SCRATCH.items()}
        config = dict(policy=choice["policy"], chunk=data.chunk, latent_dim=7, latent_norm=False,
                      image_size=data.image_size, text_dim=data.text_dim,
                      **policy_numbers(choice["policy"], choice["policy_size"]))
        text_encoder = data.text_encoder
    else:
        config, text_encoder = dict(pretrained["config"]), pretrained["text_encoder"]
    if text_encoder != data.text_encoder:
        raise InputError(f"{args.init} was pretrained with --text-encoder {text_encoder}, "
                         f"{args.data[0]} was embedded with {data.text_encoder}: python prepare_data.py "
                         f"embed --data {args.data[0]} --text-encoder {text_encoder}")
    if config["image_size"] != data.image_size:
        raise InputError(f"{args.init} was trained on {config['image_size']}-pixel images, "
                         f"{args.data[0]} has {data.image_size}: prepare the data with --image-size "
                         f"{config['image_size']}")
    if pretrained and len(config["cameras"]) > len(data.cameras):
        raise InputError(f"{args.init} was pretrained on {len(config['cameras'])} cameras, {args.data[0]} "
                         f"has {len(data.cameras)}: finetune with data that have as many, or pretrain with "
                         "--views main")
    config.update(cameras=data.cameras, head={"reinit": "action", "add": "add"}[args.head],
                  action_dim=data.action_dim, proprio_dim=None if args.no_proprio else data.proprio_dim,
                  proprio_dropout=args.proprio_dropout)
    return config


@torch.no_grad()
def validate(policy, data, device, windows=512):
    """Mean absolute error of the actions on held-out episodes, in the data's units, per dimension (A,)."""
    errors, valid = 0, 0
    for batch in DataLoader(Subset(data, data.spaced(windows)), batch_size=128):
        batch = to_device(batch, device)
        keep = ~batch["is_pad"]                                                       # (B, n)
        errors = errors + (policy.act(batch["obs"]) - batch["actions"]).abs()[keep].sum(0)
        valid += keep.sum()
    return errors / valid


@torch.no_grad()
def average(averaged, policy, decay):
    """averaged <- decay * averaged + (1 - decay) * policy, in place."""
    for mean, now in zip(averaged.state_dict().values(), policy.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


# ---- the run ---------------------------------------------------------------------------------------------


def main(argv=None):
    args = arguments(argv)
    out = Path(args.out)
    checkpoint = open_run(args, free={"resume", "overwrite", "smoke", "out", "data", "workers", "log_every",
                                      "save_every", "eval_every"})
    at_least(args, 1, "chunk", "steps", "batch_size", "log_every", "save_every", "eval_every")
    at_least(args, 0, "shift", "jitter", "workers", "warmup", "threads", "seed", "freeze_steps")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise InputError(f"--ema takes a decay from 0 to below 1, got {args.ema}")
    origin = provenance()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    # ---- data ----
    if checkpoint:                                         # all that --init gave is in it
        pretrained, chunk = None, checkpoint["config"]["chunk"]
    else:
        pretrained, chunk = starting_point(args)
    train, held_out = (
        Mixture(args.data, chunk, args.weights, args.strides, split=split, demos_per_task=demos)
        for split, demos in (("train", args.demos_per_task), ("val", None)))
    if train.action_dim is None:
        raise InputError(f"{args.data[0]} holds video only: finetuning needs actions (python prepare_data.py "
                         "sim makes some)")

    # ---- policy ----
    config = checkpoint["config"] if checkpoint else policy_config(args, pretrained, train)
    policy = make_policy(config)
    print(f"policy       {config['policy']}, {count(policy):,} parameters, chunk {chunk}, from {args.init}")
    new = checkpoint["new"] if checkpoint else []
    if pretrained:
        names = init_from_pretrained(policy, pretrained["policy"], args.init)
        for kind, keys in names.items():
            print(f"{kind:12s} {len(keys)} tensors" + (f": {', '.join(keys)}" if kind != "loaded" else ""))
        new = names["new"]
    policy.action_norm.fit(train.limits("actions"))
    if config["proprio_dim"]:
        policy.proprio_norm.fit(train.limits("proprio"))
    low, high = policy.action_norm.low.tolist(), policy.action_norm.high.tolist()
    print("normaliser   actions: " + ", ".join(f"[{a:.3f}, {b:.3f}]" for a, b in zip(low, high)))
    print(f"{train.describe()}\n{'':12s} and {held_out.num_episodes:,} held-out episodes; cameras "
          f"{', '.join(train.cameras)}")
    policy = policy.to(device)
    decay = policy.EMA if args.ema is None else args.ema
    averaged = copy.deepcopy(policy).eval() if decay else policy                      # what is evaluated
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=args.weight_decay, fused=True)
    start = 0
    if checkpoint:
        if checkpoint["fingerprint"] != train.fingerprint:
            raise InputError(f"{' '.join(args.data)} is not the data that {out}/last.pt was trained on: "
                             "restore it, or give another --out")
        averaged.load_state_dict(checkpoint["policy"])
        policy.load_state_dict(checkpoint["last_weights"] or checkpoint["policy"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")
    log = Log(out, start)

    # ---- loop ----
    # Batch and noise of a step follow from (seed, step) alone: no more need be saved for an exact resume.
    batches = (train.draw(np.random.default_rng([args.seed, step]), args.batch_size)
               for step in range(start, args.steps))
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers)
    bar, clock, waited = (tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True),
                          time.time(), 0.0)
    policy.train()
    for step, batch in enumerate(loader, start):
        waited += time.time() - clock
        torch.manual_seed(args.seed * 1_000_003 + step)
        batch = to_device(batch, device)
        for group in optimizer.param_groups:                                          # warm-up, cosine to 1 %
            group["lr"] = (args.lr * min(1, (step + 1) / max(1, args.warmup))
                           * (0.505 + 0.495 * math.cos(math.pi * step / args.steps)))
        if args.freeze_steps and step in (start, args.freeze_steps):
            for name, parameter in policy.named_parameters():
                parameter.requires_grad_(step >= args.freeze_steps or name in new)
        # DEVIATION: images are shifted, each on its own, and proprioception is dropped for a share of the
        # samples (models.py): else a policy from few demonstrations replays its own pose and does not look.
        batch["obs"]["images"] = {c: colour_jitter(random_shift(x, args.shift), args.jitter)
                                  for c, x in batch["obs"]["images"].items()}

        loss, logs = policy.loss(batch)                                               # (Eq. 6), (Eq. 7)
        loss.backward()
        if not loss.isfinite():
            raise InputError(f"loss is {loss.item()} at step {step}: lower --lr or --clip; "
                             "last.pt is from before")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if decay:                                          # early on over the last tenth of the steps
            average(averaged, policy, min(decay, (1 + done) / (10 + done)))

        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            log(done, {"loss": loss.item(), **logs, "grad_norm/policy": norm.item(),
                       "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if done % args.eval_every == 0 or done == args.steps:
            policy.eval()
            error = validate(averaged, held_out, device)
            policy.train()
            log(done, {f"val_l1/{i}": e.item() for i, e in enumerate(error)})
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(out / "last.pt", dict(
                stage="finetune", step=done, config=config, policy=averaged.state_dict(),
                last_weights=policy.state_dict() if decay else None, new=new,
                optimizer=optimizer.state_dict(), args=vars(args), text_encoder=train.text_encoder,
                data=train.attrs, fingerprint=train.fingerprint,
                provenance=origin))
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl")


if __name__ == "__main__":
    run(main)

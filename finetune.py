"""Stage 2 of LAWM (Sec. III-B): finetune the policy alone on a few labelled robot demonstrations.

    python finetune.py                                   # runs/pretrain/last.pt, data/robot -> runs/finetune
    python finetune.py --init scratch --out runs/scratch # same policy, data and budget, without pretraining
    python finetune.py --smoke                           # a few steps, to see that everything runs
    python finetune.py --resume                          # continue a stopped run; the result is the same
    python finetune.py --demos-per-task 5                # few demonstrations: where pretraining should help
    python finetune.py --init runs/scratch/last.pt --demos-per-task 5 --out runs/supervised  # see below
    python finetune.py --data data/libero --steps 6000   # LIBERO on a laptop; the paper's size: README

The world model is discarded and the last layer of the policy is initialised anew (--head reinit, the paper's
choice). The architecture comes from the checkpoint. Cameras and proprioception that only the demonstrations
have are added; everything new is printed by name. The script writes last.pt, metrics.jsonl and TensorBoard
events to --out. A checkpoint of this script can be --init as well: after training from scratch on all
demonstrations, that is the paper's supervised baseline.
The default run takes 4 to 5 minutes and 0.8 GB on two CPU cores (measured). On a GPU: not run.
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

from models import (POLICIES, HelpFormatter, InputError, Log, TextEncoder, at_least, check_same,
                    colour_jitter, count, init_from_pretrained, load_checkpoint, make_policy, open_run,
                    pick_device, policy_numbers, provenance, random_shift, run, save_checkpoint, to_device)
from prepare_data import Mixture

SMOKE = dict(steps=6, batch_size=8, every=4)
SCRATCH = dict(policy="baku", policy_size="tiny", text_encoder="hash", chunk=None)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["data/robot"],
        help="dataset folders, all with the same kind of actions, cameras and proprioception")
    add("--weights", nargs="+", type=float,
        help="share of the training windows from each dataset, to any scale (default: all windows are alike)")
    add("--strides", nargs="+", type=int, help="frames per step in each dataset; the changes of so "
        "many actions are added up (default: all near the lowest rate; one dataset: 1)")
    add("--demos-per-task", type=int,
        help="use the first N training demonstrations of each task alone (default: all)")
    add("--no-proprio", action="store_true", help="ignore the proprioception of the data")
    add("--shift", type=int, default=4, help="random shift of each image, pixels; 0 = off")
    add("--jitter", type=float, default=0.0, help="brightness, contrast and saturation of each image are "
        "multiplied by 1 +- this at most; 0 = off; release 0.3 on LIBERO")
    add("--workers", type=int, default=0, help="loader processes; 4 to 8 on a large machine")
    add = p.add_argument_group("policy").add_argument
    add("--init", default="runs/pretrain/last.pt",
        help="checkpoint of pretrain.py or finetune.py to start from, or the word scratch")
    add("--head", choices=("reinit", "add"), default="reinit",
        help="initialise the last layer anew, or add a layer after the latent actions; paper reinit")
    add("--freeze-steps", type=int, default=0,
        help="number of first steps in which only new layers are trained; 0 = off, release")
    add("--ema", type=float, help="decay of the averaged weights, which are then evaluated; in step t at "
        "most (1 + t) / (10 + t); 0 = off (default: diffusion 0.9999, as the release; others 0)")
    add("--proprio-dropout", type=float, default=0.3,
        help="share of the samples in which proprioception is hidden; 0 = off, release")
    add = p.add_argument_group("policy, only with --init scratch (else see the checkpoint)").add_argument
    add("--policy", choices=POLICIES, help=f"architecture (default: {SCRATCH['policy']})")
    add("--policy-size", help=f"tiny or paper (default: {SCRATCH['policy_size']})")
    add("--text-encoder", choices=TextEncoder.DIM,
        help=f"frozen encoder of the instruction (default: {SCRATCH['text_encoder']})")
    add("--chunk", type=int, help="n, actions per chunk; paper 10 (BAKU), 16 (diffusion) (default: "
        + ", ".join(f"{name} {cls.CHUNK}" for name, cls in POLICIES.items()) + ")")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=1500, help="optimiser steps")
    add("--batch-size", type=int, default=32, help="windows per step; release 256")
    add("--lr", type=float, default=5e-4, help="learning rate; release 1e-4")
    add("--warmup", type=int, default=50, help="steps of linear warm-up; 0 = off; release 1000")
    add("--weight-decay", type=float, default=1e-4, help="weight decay of AdamW; 0 = off; release 1e-6")
    add("--clip", type=float, default=10.0, help="largest norm of the gradient; inf = off; release 100")
    add = p.add_argument_group("run").add_argument
    add("--out", default="runs/finetune", help="run folder")
    add("--resume", action="store_true", help="continue from OUT/last.pt")
    add("--overwrite", action="store_true", help="delete the run that is in OUT")
    add("--smoke", action="store_true", help=f"tiny preset {SMOKE}; explicit flags still win")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--threads", type=int, default=0, help="CPU threads; 0 = one per core; on a busy machine 1 is faster")
    add("--every", type=int, default=500, help="steps between two checkpoints, each with a validation; "
        "training metrics are logged ten times as often")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    return p.parse_args(argv)


def starting_point(args):
    """What --init names -> {"config", "policy": weights}; for scratch only "config". InputError"""
    if args.init == "scratch":
        if args.head == "add" or args.freeze_steps:
            raise InputError("--head add and --freeze-steps keep what was pretrained: they need --init "
                             "CHECKPOINT")
        choice = {name: getattr(args, name) or default for name, default in SCRATCH.items()}
        numbers = policy_numbers(choice["policy"], choice.pop("policy_size"))
        choice["chunk"] = choice["chunk"] or POLICIES[choice["policy"]].CHUNK
        return {"config": {**choice, "latent_dim": 7, "latent_norm": False, **numbers}}
    given = [name for name in SCRATCH if getattr(args, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --init scratch: {args.init} has its own "
                         "architecture")
    checkpoint = load_checkpoint(args.init)
    if args.head == "add" and checkpoint["config"]["head"] == "action":
        raise InputError(f"--head add puts a layer after the latent actions, but {args.init} has none: leave "
                         "it out")
    return {name: checkpoint[name] for name in ("config", "policy")}


def finetuning_config(args, config, data):
    """The architecture for these demonstrations: their cameras, proprioception and actions. InputError"""
    proprio_dim = None if args.no_proprio else data.proprio_dim
    if args.init != "scratch":
        if config["image_size"] != data.image_size:
            raise InputError(f"{args.init} expects images of {config['image_size']} pixels, {args.data[0]} "
                             f"has {data.image_size}: prepare it with --image-size {config['image_size']}")
        if len(config["cameras"]) > len(data.cameras):
            raise InputError(f"{args.init} expects {len(config['cameras'])} cameras, {args.data[0]} has "
                             f"{len(data.cameras)}: give data with as many, or pretrain with --views main")
        if config["proprio_dim"] and not proprio_dim:
            raise InputError(f"{args.init} expects proprioception: give data that have it, and leave out "
                             "--no-proprio")
    return {**config, "image_size": data.image_size, "cameras": data.cameras, "proprio_dim": proprio_dim,
            "action_dim": data.action_dim, "head": {"reinit": "action", "add": "add"}[args.head],
            "proprio_dropout": args.proprio_dropout}


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
    checkpoint = open_run(args, free={"resume", "overwrite", "smoke", "out", "data", "workers", "every"})
    at_least(args, 1, "chunk", "steps", "batch_size", "every")
    at_least(args, 0, "shift", "jitter", "workers", "warmup", "threads", "seed", "freeze_steps")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise InputError(f"--ema takes a decay from 0 to below 1, got {args.ema}")
    origin, device = provenance(), pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    # ---- data ----
    begin = checkpoint or starting_point(args)             # a run that is resumed no longer needs --init
    chunk = begin["config"]["chunk"]
    train, held_out = (
        Mixture(args.data, chunk, args.weights, args.strides, split=split, demos_per_task=demos)
        for split, demos in (("train", args.demos_per_task), ("val", None)))
    if train.action_dim is None:
        raise InputError(f"{args.data[0]} has video only: finetuning needs actions (python prepare_data.py "
                         "sim makes some)")

    # ---- policy ----
    config = checkpoint["config"] if checkpoint else finetuning_config(args, begin["config"], train)
    policy = make_policy(config)
    print(f"policy       {config['policy']}, {count(policy):,} parameters, chunk {chunk}, from {args.init}")
    new = checkpoint["new"] if checkpoint else []
    if "policy" in begin and not checkpoint:
        names = init_from_pretrained(policy, begin["policy"], args.init)
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
        check_same(out / "last.pt", {"data": checkpoint["fingerprint"]}, {"data": train.fingerprint})
        averaged.load_state_dict(checkpoint["policy"])
        policy.load_state_dict(checkpoint["last_weights"] or checkpoint["policy"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")
    log = Log(out, start)

    # ---- loop ----
    # The batch and the noise of a step follow from (seed, step) alone: an exact resume needs nothing else.
    batches = (train.draw(np.random.default_rng([args.seed, step]), args.batch_size)
               for step in range(start, args.steps))
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers)
    bar = tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True)
    clock, waited = time.time(), 0.0
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
        # DEVIATION: each image is shifted on its own, and proprioception is hidden in a share of the samples
        # (models.py): otherwise a policy from few demonstrations continues its own motion without looking.
        batch["obs"]["images"] = {c: colour_jitter(random_shift(x, args.shift), args.jitter)
                                  for c, x in batch["obs"]["images"].items()}

        loss, logs = policy.loss(batch)                                               # (Eq. 6), (Eq. 7)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} at step {step}: lower --lr or --clip. {out}/last.pt "
                             "is from before")
        done = step + 1
        if decay:                                          # early on over the last tenth of the steps
            average(averaged, policy, min(decay, (1 + done) / (10 + done)))
        bar.update()
        if done % max(1, args.every // 10) == 0 or done == args.steps:
            log(done, {"loss": loss.item(), **logs, "grad_norm/policy": norm.item(),
                       "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if done % args.every == 0 or done == args.steps:
            policy.eval()
            log(done, {f"val_l1/{i}": e.item() for i, e in enumerate(validate(averaged, held_out, device))})
            policy.train()
            save_checkpoint(out / "last.pt", dict(
                stage="finetune", step=done, config=config, policy=averaged.state_dict(),
                last_weights=policy.state_dict() if decay else None, new=new,
                optimizer=optimizer.state_dict(), args=vars(args), data=train.attrs,
                fingerprint=train.fingerprint, provenance=origin))
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl")


if __name__ == "__main__":
    run(main)

"""Stage 2 of LAWM (Sec. III-B): finetune the policy alone on a few labelled robot demonstrations.

    python finetune.py                                   # runs/pretrain/last.pt, data/robot -> runs/finetune
    python finetune.py --init scratch --out runs/scratch # same policy, data and budget, without pretraining
    python finetune.py --smoke                           # a few steps, to see that everything runs
    python finetune.py --resume                          # continue a stopped run; the result is the same
    python finetune.py --demos-per-task 5                # few demonstrations: where pretraining should help
    python finetune.py --init runs/scratch/last.pt --demos-per-task 5 --out runs/supervised  # see below
    python finetune.py --data data/libero --steps 6000   # LIBERO on a laptop; the paper's size: README
    torchrun --nproc-per-node 8 finetune.py --batch-size 256     # eight GPUs, each with 32 windows of a batch

The world model is discarded and the last layer of the policy is initialised anew (--head reinit, the paper's
choice). The architecture comes from the checkpoint. Cameras and proprioception that only the demonstrations
have are added; everything new is printed by name. The script writes last.pt, metrics.jsonl and TensorBoard
events to --out. A checkpoint of this script can be --init as well: after training from scratch on all
demonstrations, that is the paper's supervised baseline.
The default run takes 3.5 minutes and 0.8 GB on two CPU cores (measured). On a GPU: not run.

Logged metrics:

    loss                Eq. 6 (BAKU), a weighted Eq. 7 (diffusion), or L1 and KL (ACT)
    l1                  mean absolute error of normalised actions on the training batch (BAKU, ACT)
    style_kl            ACT: KL of the style from its prior, nats; 0: the style is not used
    val_l1/0..6         mean absolute error on held-out demonstrations, in the data's units (m, rad, gripper)
    grad_norm/policy    norm of the gradient before clipping
    lr                  learning rate of the new weights
    waiting             share of the time spent waiting for data
"""
import argparse
import copy
import math
import time
from pathlib import Path

# First: models.py makes settings before torch starts.
from models import (POLICIES, HelpFormatter, InputError, Log, TextEncoder, at_least, check_agreed, check_same,
                    colour_jitter, describe_size, for_training, init_from_pretrained, load_checkpoint,
                    make_policy, open_run, policy_numbers, process_mean, provenance, random_shift, run,
                    save_checkpoint, start_processes, to_device, to_numbers)

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from prepare_data import Mixture

SMOKE = dict(steps=6, batch_size=8, every=6, workers=0)
# Flags that may change when a run is resumed.
FREE = {"resume", "overwrite", "smoke", "out", "data", "workers", "every"}


def arguments(argv):
    """Parse the flags. InputError for values that cannot work."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["data/robot"], help="datasets with the same actions and cameras")
    add("--weights", nargs="+", type=float, help="share of each dataset, to any scale (default: by size)")
    add("--strides", nargs="+", type=int, help="frames per step in each dataset (default: by frame rate)")
    add("--demos-per-task", type=int, help="use N demonstrations of each task, which --seed "
        "chooses; 2 are a part of 5 (default: all)")
    add("--no-proprio", action="store_true", help="ignore the proprioception of the data")
    add("--shift", type=int, default=2, help="random shift of each image, pixels; 0 = off")
    add("--jitter", type=float, default=0.0, help="brightness, contrast and saturation of each image are "
        "multiplied by up to 1 +- this; 0 = off; release 0.3 on LIBERO")
    add("--workers", type=int, default=1, help="loader processes; 0 = none; on a GPU 8, for each GPU")
    add = p.add_argument_group("policy").add_argument
    add("--init", default="runs/pretrain/last.pt", help="checkpoint to start from, or the word scratch")
    add("--head", choices=("reinit", "add"), default="reinit", help="a new last layer, or a new layer after "
        "the latent actions; paper reinit")
    add("--ema", type=float, help="decay of the averaged weights, which are then evaluated; in step t at "
        "most (1 + t) / (10 + t); 0 = off (default: diffusion 0.9999, as the release; others 0)")
    add("--proprio-dropout", type=float, default=0.3, help="share of the samples in which proprioception is "
        "hidden; 0 = off, release")
    add = p.add_argument_group("policy, only with --init scratch (else see the checkpoint)").add_argument
    add("--policy", choices=POLICIES, help="architecture (default: baku)")
    add("--policy-size", help="tiny or paper (default: tiny)")
    add("--text-encoder", choices=TextEncoder.DIM, help="frozen (default: hash); BAKU minilm, release clip")
    add("--chunk", type=int, help="n, actions per chunk (default and paper: 10; diffusion 16)")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=1500, help="optimiser steps; the learning rate decays over all of them")
    add("--batch-size", type=int, default=32, help="windows per step, on all GPUs together; release 256")
    add("--lr", type=float, default=5e-4, help="learning rate of new weights; release 1e-4")
    add("--trunk-lr", type=float, help="learning rate of pretrained weights; 0 = frozen (default and "
        "release: that of new weights)")
    add("--warmup", type=int, default=50, help="steps of linear warm-up; 0 = off; release 1000")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW; 0 = off; release 1e-6")
    add("--clip", type=float, default=10.0, help="largest norm of the gradient; inf = off; release 100")
    add = p.add_argument_group("run").add_argument
    add("--out", default="runs/finetune", help="run folder")
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
    add("--every", type=int, default=500, help="steps between checkpoints, each with a validation; training "
        "metrics are logged ten times as often")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    args.trunk_lr = args.lr if args.trunk_lr is None else args.trunk_lr
    at_least(args, 1, "chunk", "steps", "batch_size", "every", "threads")
    at_least(args, 0, "shift", "jitter", "workers", "warmup", "seed", "lr", "trunk_lr")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise InputError(f"--ema takes a decay from 0 to below 1, got {args.ema}")
    return args


def starting_point(args):
    """-> config and weights of the policy that --init names; for scratch the weights are None. InputError"""
    chosen = {name: value for name in ("policy", "policy_size", "text_encoder", "chunk")
              if (value := getattr(args, name)) is not None}
    if args.init == "scratch":
        if args.head == "add":
            raise InputError("--head add keeps a pretrained layer: give --init CHECKPOINT")
        config = {"policy": "baku", "policy_size": "tiny", "text_encoder": "hash", **chosen}
        numbers = policy_numbers(config["policy"], config.pop("policy_size"))
        return {"chunk": POLICIES[config["policy"]].CHUNK, **config, "latent_dim": 7, "latent_norm": False,
                **numbers}, None
    if chosen:
        raise InputError(f"--{list(chosen)[0].replace('_', '-')} goes with --init scratch: {args.init} has "
                         "its own architecture")
    checkpoint = load_checkpoint(args.init)
    if args.head == "add" and (checkpoint["config"]["head"] == "action"
                               or checkpoint["config"]["policy"] == "diffusion"):
        raise InputError(f"--head add needs a policy whose last layer makes latent actions; {args.init} has "
                         "none (a finetuned policy, or diffusion): leave it out")
    if checkpoint["step"] < checkpoint["args"]["steps"]:
        print(f"warning      {args.init} is of an unfinished run, at step {checkpoint['step']:,} of "
              f"{checkpoint['args']['steps']:,}: the command that made it finishes it with --resume")
    return checkpoint["config"], checkpoint["policy"]


def finetuning_config(args, start, data):
    """-> start, the config of --init, with the cameras, proprioception and actions of the demonstrations.
    InputError when the pretrained policy needs an input that they do not have."""
    config = {**start, "image_size": data.image_size, "cameras": data.cameras, "action_dim": data.action_dim,
              "proprio_dim": None if args.no_proprio else data.proprio_dim,
              "proprio_dropout": args.proprio_dropout,
              "head": "add" if args.head == "add" else "action"}

    def needs(c):
        return (f"images of {c['image_size']} pixels, {len(c['cameras'])} cameras and "
                f"{'proprioception' if c['proprio_dim'] else 'no proprioception'}")

    if args.init != "scratch" and (start["image_size"] != config["image_size"]
                                   or len(start["cameras"]) > len(config["cameras"])
                                   or (start["proprio_dim"] and not config["proprio_dim"])):
        raise InputError(f"{args.init} expects {needs(start)}, but {args.data[0]} gives {needs(config)}: "
                         "cameras and proprioception may be added only; prepare_data.py has --image-size")
    return config


@torch.no_grad()
def validate(policy, data, device):
    """Mean absolute error of the actions on held-out episodes, in the data's units, per dimension (A,)."""
    errors, valid = 0, 0
    for batch in DataLoader(Subset(data, data.spaced(512)), batch_size=64):
        batch = to_device(batch, device)
        keep = ~batch["is_pad"]                                                       # (B, n)
        errors = errors + (policy.act(batch["obs"]) - batch["actions"]).abs()[keep].sum(0)
        valid += keep.sum()
    return errors / valid


@torch.no_grad()
def average(averaged, policy, decay):
    """averaged <- decay * averaged + (1 - decay) * policy, in place; counters are copied."""
    for mean, now in zip(averaged.state_dict().values(), policy.state_dict().values()):
        mean.copy_(torch.lerp(mean, now, 1 - decay) if mean.is_floating_point() else now)


# ---- the run -----------------------------------------------------------------------------------------------


def main(argv=None):
    args = arguments(argv)
    rank, world, device = start_processes(args)
    out, origin = Path(args.out), provenance()
    checkpoint = open_run(args, FREE)
    torch.manual_seed(args.seed)

    # ---- data ----
    # A run that is resumed no longer needs what --init names.
    config, pretrained = (checkpoint["config"], None) if checkpoint else starting_point(args)
    train, held_out = (
        Mixture(args.data, config["chunk"], args.weights, args.strides, split=split, demos_per_task=demos,
                seed=args.seed)
        for split, demos in (("train", args.demos_per_task), ("val", None)))
    if train.action_dim is None:
        raise InputError(f"{args.data[0]} has video only: finetuning needs actions (python prepare_data.py "
                         "sim makes some)")
    print(f"{train.describe()}\n{'':12s} and {held_out.num_episodes:,} held-out episodes; cameras "
          f"{', '.join(train.cameras)}")
    check_agreed(args, FREE, data=train.fingerprint, step=checkpoint["step"] if checkpoint else 0)

    # ---- policy ----
    policy = make_policy(config if checkpoint else finetuning_config(args, config, train))
    print(f"policy       {policy.config['policy']}, chunk {policy.chunk}, {describe_size(policy)}, from "
          f"{args.init}")
    new = checkpoint["new"] if checkpoint else list(policy.state_dict())
    if pretrained:
        names = init_from_pretrained(policy, pretrained, args.init)
        for kind, keys in names.items():
            print(f"{kind:12s} {len(keys)} tensors" + (f": {', '.join(keys)}" if kind != "loaded" else ""))
        new = names["new"]
    policy.action_norm.fit(train.limits("actions"))
    if policy.config["proprio_dim"]:
        policy.proprio_norm.fit(train.limits("proprio"))
    policy = policy.to(device)
    decay = policy.EMA if args.ema is None else args.ema
    averaged = copy.deepcopy(policy).eval() if decay else policy                      # what is evaluated
    groups = [{"params": [p for name, p in policy.named_parameters() if (name in new) == fresh], "peak": peak}
              for fresh, peak in ((True, args.lr), (False, args.trunk_lr))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    start = 0
    if checkpoint:
        check_same(out / "last.pt", {"data": checkpoint["fingerprint"]}, {"data": train.fingerprint})
        averaged.load_state_dict(checkpoint["policy"])
        policy.load_state_dict(checkpoint["last_weights"] or checkpoint["policy"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        print(f"resuming     at step {start:,} of {args.steps:,}")
    log = Log(out, start) if rank == 0 else lambda *_: None

    # ---- loop ----
    # A step's batch follows from (seed, step), its noise from (seed, step, rank): an exact resume needs
    # nothing else. Each process takes its own rows of the batch.
    batches = (train.draw(np.random.default_rng([args.seed, step]), args.batch_size)[rank::world]
               for step in range(start, args.steps))
    loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    bar = tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True, disable=rank > 0)
    clock, waited = time.time(), 0.0
    policy_loss = for_training(policy.train().loss, args)
    for step, batch in enumerate(loader, start):
        waited += time.time() - clock
        torch.manual_seed(args.seed * 1_000_003 + step + (rank << 24))    # a CPU uses 32 bits of a seed only
        batch = to_device(batch, device)
        for group in optimizer.param_groups:                                          # warm-up, cosine to 1 %
            group["lr"] = (group["peak"] * min(1, (step + 1) / max(1, args.warmup))
                           * (0.505 + 0.495 * math.cos(math.pi * step / args.steps)))
        # DEVIATION: each image is shifted on its own, and proprioception is hidden in a share of the samples
        # (models.py): otherwise a policy from few demonstrations continues its own motion without looking.
        batch["obs"]["images"] = {c: colour_jitter(random_shift(x, args.shift), args.jitter)
                                  for c, x in batch["obs"]["images"].items()}
        valid = (~batch["is_pad"]).sum()
        share = valid / process_mean(valid)             # weight of this process, 1 if there are no others

        loss, logs = policy_loss(batch)                                               # (Eq. 6), (Eq. 7)
        loss = share * loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if decay:                                          # at first the average covers a tenth of the steps
            average(averaged, policy, min(decay, (1 + done) / (10 + done)))
        bar.update()
        save = done % args.every == 0 or done == args.steps
        if save or done % max(1, args.every // 10) == 0:
            numbers = to_numbers(done, {"loss": loss, **{k: share * v for k, v in logs.items()},
                                        "grad_norm/policy": norm})
            log(done, {**numbers, "lr": optimizer.param_groups[0]["lr"],
                       "waiting": waited / max(bar.format_dict["elapsed"], 1e-9)})
        if save and rank == 0:
            policy.eval()
            log(done, {f"val_l1/{i}": e.item() for i, e in enumerate(validate(averaged, held_out, device))})
            policy.train()
            save_checkpoint(out / "last.pt", dict(
                stage="finetune", step=done, config=policy.config, policy=averaged.state_dict(),
                last_weights=policy.state_dict() if decay else None, new=new,
                optimizer=optimizer.state_dict(), args=vars(args), data=train.attrs,
                fingerprint=train.fingerprint, provenance=origin))
        clock = time.time()
    bar.close()
    print(f"wrote        {out}/last.pt (step {args.steps:,}), metrics.jsonl")


if __name__ == "__main__":
    run(main)

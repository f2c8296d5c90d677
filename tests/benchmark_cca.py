"""How long does cca.py take for many latent actions, and how much memory?

    python tests/benchmark_cca.py                # 100,000 chunks of 10 latents and 10 true actions, each of 7

Everything that cca.py does after the policies have been asked (correlations of single steps and chunks with
all baselines, probes, collapse), on made-up numbers of a known answer: no policy, no pictures.
"""
import argparse
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cca  # noqa: E402


def windows(count, first_episode, rng):
    """Latents that hold half of the action's variance in every dimension: correlation 0.71."""
    actions = rng.normal(size=(count, 10, 7)).astype(np.float32)
    latents = {"latents": ((actions + rng.normal(size=actions.shape)) / np.sqrt(2)).astype(np.float32)}
    latents["random 1"] = rng.normal(size=actions.shape).astype(np.float32)
    return {"latents": latents, "actions": actions, "is_pad": np.zeros((count, 10), bool),
            "episode": first_episode + np.arange(count) // 50, "t": np.arange(count) % 50,
            "instruction_id": np.arange(count) // 50 % 4,
            "frame": rng.uniform(size=(count, 768)).astype(np.float32)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=100_000,
                   help="windows, a fifth held out (default %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="torch CPU threads (default %(default)s)")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rng, held = np.random.default_rng(0), args.pairs // 5
    train, held_out = windows(args.pairs - held, 0, rng), windows(held, 10 ** 6, rng)
    options, began = Namespace(seed=0, bootstrap=500, folds=5, draws=5), time.time()
    groups = {"all": [np.ones(len(split["t"]), bool) for split in (train, held_out)]}
    table = cca.correlations(train, held_out, groups, ["latents"], options, print)
    probed = cca.probes(train, held_out, ["latents"], list("abcdefg"), [True] * 7, options)
    cca.collapse(held_out["latents"]["latents"], held_out["instruction_id"])
    seconds = time.time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    first = table["all"]["chunk"]["rows"]["latents"]
    print(f"{args.pairs:,} pairs of 70 + 70 columns: {seconds:.0f} s, peak memory {memory:.2f} GB; mean "
          f"held-out correlation {first['mean']:.3f} (truth {1 / np.sqrt(2):.3f}), probe R2 "
          f"{probed['actions']['rows']['latents, linear']['mean']:.3f} (truth 0.500)")


if __name__ == "__main__":
    main()

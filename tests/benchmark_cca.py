"""Time and memory of cca.py for many latent actions.

    python tests/benchmark_cca.py                # 100,000 chunks of 10 latents and 10 true actions, each of 7

Correlations of single steps and chunks with all baselines, probes and collapse, on random numbers for which
the answer is known.
"""
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cca  # noqa: E402


def windows(count, first_episode, rng):
    """Latents that hold half of the action's variance in every dimension: correlation 0.71."""
    actions, noise, random = rng.normal(size=(3, count, 10, 7))
    return {"latents": {"latents": (actions + noise) / np.sqrt(2), "random 1": random}, "actions": actions,
            "is_pad": np.zeros((count, 10), bool), "episode": first_episode + np.arange(count) // 50,
            "t": np.arange(count) % 50, "instruction_id": np.arange(count) // 50 % 4,
            "frame": rng.uniform(size=(count, 768))}


count, rng, began = int((sys.argv + ["100000"])[1]), np.random.default_rng(0), time.time()
study = SimpleNamespace(args=SimpleNamespace(seed=0, data="made up"), names=["latents"],
                        train=windows(count * 4 // 5, 0, rng), held_out=windows(count // 5, 10 ** 6, rng),
                        moves={name: d for d, name in enumerate("abcdefg")}, instructions=list("abcd"))
(_, rows, _), (_, probed, _), _ = cca.correlations(study), cca.probes(study), cca.collapse(study)
chunk = next(row for row in rows if row["steps"] == "chunk" and row["latents"] == "latents")
print(f"{count:,} pairs of 70 + 70 columns: {time.time() - began:.0f} s, peak memory "
      f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GB; mean held-out correlation "
      f"{chunk['mean'][0]:.3f} (truth 0.707), probe R2 {probed[0]['mean'][0]:.3f} (truth 0.500)")

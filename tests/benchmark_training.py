"""CPU time of a training step, by parts, and peak memory: of this checkout, or of two in one run.

    python tests/benchmark_training.py                              # every row: 10 minutes on one core
    python tests/benchmark_training.py --only "baku tiny" --rounds 1                       # a quick look
    python tests/benchmark_training.py --other ../older_checkout    # measured in turn; twice as long
    python tests/benchmark_training.py --flags="--shift 0" --other . --other-flags="--shift 4"

Each measurement is a process that runs main() of pretrain.py or finetune.py with the default flags and those
of ROWS, on random pictures instead of data, and stops after a few steps. It thus times the loop of the script
with every setting that the script makes. Columns: CPU-seconds (user + system) per step in forward
(augmentation and loss), backward and optimiser (clipping, AdamW, freeing gradients, moving average), and
their sum with its range; wall-clock seconds per step; CPU-seconds of act() for one observation; peak memory;
10^9 floating-point operations of the matrix products and convolutions of a step. All are medians. Loading
data, the first steps, logs and reports, which can need more memory, are left out.
"""
import argparse
import functools
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TINY = "--probe-data none --eval-windows 4"               # the report before the first step is not timed
PAPER = f"{TINY} --policy-size paper --world-model 50m --batch-size 8"
PLAIN = "--predict posterior --motion-weight 0 --latent-norm none --decode-steps 0"
ROWS = {}               # name -> script, pixels, cameras, flags; --flags adds to the flags of every row
for name in ("baku", "diffusion", "act"):
    scratch = f"--init scratch --policy {name}"
    ROWS |= {f"pretrain {name} tiny": ("pretrain", 64, 1, f"--policy {name} {TINY}"),
             f"pretrain {name} paper": ("pretrain", 128, 1, f"--policy {name} {PAPER}"),
             f"pretrain {name} paper plain": ("pretrain", 128, 1, f"--policy {name} {PAPER} {PLAIN}"),
             f"finetune {name} tiny": ("finetune", 64, 2, scratch),
             f"finetune {name} paper": ("finetune", 128, 2, f"{scratch} --policy-size paper")}
COLUMNS = ("forward", "backward", "optimiser", "step", "wall", "act()", "GiB", "GFLOP")


class RandomData:
    """Windows of random pictures, which depend on their index alone, with the interface of Mixture."""
    action_dim, proprio_dim, num_episodes, fingerprint, attrs = 7, 8, 1, "random", {}
    text_dim, text_encoder = 512, "hash"                    # read by f583a87 only

    def __init__(self, chunk, pixels, cameras, instruction):
        self.chunk, self.image_size, self.instruction = chunk, pixels, instruction
        self.cameras = [f"camera_{i}" for i in range(cameras)]

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        rng, n, views = np.random.default_rng(index), self.chunk, len(self.cameras)
        frames = rng.integers(0, 256, (n + 1, 3 * views, self.image_size, self.image_size), np.uint8)
        return {"obs": {"images": dict(zip(self.cameras, np.split(frames[0], views))),
                        "instruction": self.instruction,
                        "proprio": rng.uniform(-1, 1, self.proprio_dim).astype(np.float32)},
                "frames": frames, "actions": rng.uniform(-1, 1, (n, self.action_dim)).astype(np.float32),
                "is_pad": np.zeros(n, bool), "episode": 0, "instruction_id": 0}

    def draw(self, rng, count):
        return range(count)

    def limits(self, key):
        size = self.action_dim if key == "actions" else self.proprio_dim
        one = np.ones(size, np.float32)
        return {"min": -one, "max": one, "std": one}

    def describe(self):
        return ""


def measure(root, script, pixels, cameras, flags, steps):
    """Run main() of a script for 2 + steps steps -> {column: list of numbers}. In a process of its own."""
    sys.path.insert(0, root)
    module = importlib.import_module(script)                # before torch: it may prepare the process
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    # f583a87: data hold the embedding of the instruction, not its words.
    words = "a task" if hasattr(importlib.import_module("models"), "text_encoder") else np.ones(512, "f4")
    clock, gflop, policies, collate = [], [], [], torch.utils.data.default_collate

    def note():
        clock.append((time.process_time(), time.perf_counter()))

    def loader(windows, batch_sampler=None, **_):           # instead of DataLoader: always the same batch
        rows = next(iter(batch_sampler)) if batch_sampler else range(len(windows))
        batch = collate([windows[i] for i in rows])
        if batch_sampler is None:                           # of a report
            return [batch]
        return timed(batch)

    def timed(batch):
        clock.clear()
        for _ in range(1 + steps):
            note()
            yield batch
        note()
        with FlopCounterMode(display=False) as flops:       # last, because it slows the steps after it
            yield batch
        gflop.append(flops.get_total_flops() / 1e9)

    def backward(loss, original=torch.Tensor.backward):
        note()
        original(loss)
        note()

    def make_policy(config, original=module.make_policy):
        policies.append(original(config))
        return policies[-1]

    def data(chunk):
        return RandomData(chunk, pixels, cameras, words)

    module.DataLoader, module.make_policy, torch.Tensor.backward = loader, make_policy, backward
    module.open_data = lambda args, *_: (data(args.chunk), data(args.chunk), None)      # of pretrain.py
    module.Mixture = lambda paths, chunk, *_, **__: data(chunk)                         # of finetune.py
    with tempfile.TemporaryDirectory() as out:
        module.run(functools.partial(module.main, [*flags, "--out", f"{out}/run"]))
    peak, acts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, []
    if script == "finetune":
        obs, policy = collate([data(policies[0].chunk)[0]])["obs"], policies[0].eval()
        for _ in range(11):
            began = time.process_time()
            policy.act(obs)
            acts.append(time.process_time() - began)
    cpu, wall = np.array(clock)[3:4 + 3 * steps].T          # without the first step and the last
    forward, backward, optimiser = np.diff(cpu).reshape(steps, 3).T.tolist()
    return dict(zip(COLUMNS, (forward, backward, optimiser, np.diff(cpu[::3]).tolist(),
                              np.diff(wall[::3]).tolist(), acts[1:], [peak], gflop)))


def line(row, side, cells):
    print(f"{row:30s} {side:5s}", *(f"{cells.get(c, '-'):>{18 if c == 'step' else 9}s}" for c in COLUMNS),
          flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", metavar="REGEX", help=f"rows to measure, of: {', '.join(ROWS)}")
    p.add_argument("--rounds", type=int, default=3, help="processes per row (default %(default)s)")
    p.add_argument("--steps", type=int, choices=range(1, 18), default=4, metavar="N",
                   help="timed steps per process, 1 to 17: the scripts log in step 20 (default %(default)s)")
    p.add_argument("--threads", default="1", help="CPU threads (default %(default)s)")
    p.add_argument("--flags", default="", help="more flags of the scripts")
    p.add_argument("--other", metavar="CHECKOUT", help="a second checkout, measured in turn with this one")
    p.add_argument("--other-flags", default="", help="more flags of the scripts of --other")
    args = p.parse_args()
    sides = {"this": (Path(__file__).parent.parent, args.flags), "other": (args.other, args.other_flags)}
    sides = {side: (str(Path(root).resolve()), flags) for side, (root, flags) in sides.items() if root}
    for side, (root, flags) in sides.items():
        if not Path(root, "pretrain.py").exists():
            p.error(f"--other {args.other} is no checkout of this repository: it has no pretrain.py")
        version = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty=+"], text=True,
                                 capture_output=True).stdout.strip()
        print(f"{side:5s} {version or root} {flags}")
    print()
    line("CPU-seconds per step", "", dict(zip(COLUMNS, COLUMNS)))
    for row, (script, pixels, cameras, flags) in ROWS.items():
        if not re.search(args.only, row):
            continue
        results, medians = {side: {c: [] for c in COLUMNS} for side in sides}, {}
        for side in list(sides) * args.rounds:
            root, more = sides[side]
            more = f"{flags} --threads {args.threads} {more}"
            job = dict(root=root, script=script, pixels=pixels, cameras=cameras, flags=more.split(),
                       steps=args.steps)
            process = subprocess.run([sys.executable, __file__, "measure", json.dumps(job)], text=True,
                                     stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
            if process.returncode:
                sys.exit(f"{row}: {script}.py of {root} failed with the flags {more}")
            for column, numbers in json.loads(process.stdout.splitlines()[-1]).items():
                results[side][column] += numbers
        for side, columns in results.items():
            medians[side] = {c: statistics.median(numbers) for c, numbers in columns.items() if numbers}
            cells = {c: f"{median:.3f}" for c, median in medians[side].items()}
            cells["step"] += f" ({min(columns['step']):.2f}-{max(columns['step']):.2f})"
            line(row, side, cells)
        if args.other:
            line("", "ratio", {c: f"{medians['other'][c] / m:.2f}" for c, m in medians["this"].items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
    else:
        main()

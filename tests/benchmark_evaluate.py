"""How fast evaluate.py plays LIBERO: environment steps per second with 1, 2, ... N workers.

    python tests/benchmark_evaluate.py --checkpoint runs/libero/last.pt --workers 2

Every step renders the policy's cameras and asks the policy, as temporal ensembling does. The rate includes
resets; it leaves out the start of the processes and the episodes in which a worker builds a task's scene.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402
from models import HelpFormatter, run  # noqa: E402


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--env", default="libero_object", choices=evaluate.ENVIRONMENTS)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--episodes", type=int, default=8, help="per task")
    p.add_argument("--steps", type=int, default=100, help="per episode")
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    arm, base = evaluate.Arm(args.checkpoint), None
    for workers in range(1, args.workers + 1):
        settings = evaluate.arguments(["--env", args.env, "--workers", str(workers), "--device", args.device,
                                       "--max-steps", str(args.steps), "--execute", "0"])
        bench = evaluate.ENVIRONMENTS[args.env](settings, arm.data)
        jobs = [evaluate.Job(arm.key, arm.label, task, start) for task in list(bench.tasks)[:2]
                for start in bench.starts[:args.episodes]]
        steps = seconds = 0
        seen = dict.fromkeys(bench.tasks, 0)
        for line in evaluate.play_all(jobs, bench, settings):
            seen[line["task"]] += 1
            if seen[line["task"]] > workers:
                steps, seconds = steps + line["steps"], seconds + line["seconds"]
        rate = workers * steps / seconds            # each worker's own rate, all of them at work
        base = base or rate
        print(f"{workers:2d} workers  {rate:6.1f} steps/s, {rate / base:.2f} times one worker's", flush=True)


if __name__ == "__main__":
    run(main)

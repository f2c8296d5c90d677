"""How fast evaluate.py plays LIBERO: environment steps per second with 1, 2, ... N workers.

    python tests/benchmark_evaluate.py --checkpoint runs/libero/last.pt --workers 2
    python tests/benchmark_evaluate.py --checkpoint noop      # the simulator alone, which renders nothing

A policy renders its cameras and acts at every step, as temporal ensembling does. The rate includes resets. It
leaves out the start of the processes and the episodes in which a worker builds the scene of a task.
"""
import argparse
import functools
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
    args = p.parse_args(argv)
    arm, base = evaluate.Arm(args.checkpoint), None
    for workers in range(1, args.workers + 1):
        settings = evaluate.arguments(f"--max-steps 100 --execute 0 --workers {workers}".split())
        bench = evaluate.ENVIRONMENTS[args.env](settings, arm.data)
        jobs = [(arm.key, task, start) for task in list(bench.tasks)[:2] for start in bench.starts[:8]]
        seen, steps, seconds = [], 0, 0
        play = functools.partial(evaluate.play, bench, settings, {arm.key: arm.label})
        for line in evaluate.run_jobs(jobs, workers, play, in_order=False):
            seen.append(line["task"])
            if seen.count(line["task"]) > workers:
                steps, seconds = steps + line["steps"], seconds + line["seconds"]
        rate = workers * steps / seconds            # each worker's own rate, all of them at work
        base = base or rate
        print(f"{workers:2d} workers  {rate:6.1f} steps/s, {rate / base:.2f} times one worker's", flush=True)


if __name__ == "__main__":
    run(main)

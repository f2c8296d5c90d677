"""How fast evaluate.py simulates, beside the simulator alone: environment steps per second for 1..N workers.

    python tests/benchmark_evaluate.py --checkpoint runs/libero/last.pt --workers 2

Every step draws both cameras at the policy's size, as temporal ensembling asks for. "no policy": chunks of
zeros, so that what is timed is simulation, drawing and the way between processes. "simulator alone": LIBERO's
own environment, stepped in a plain loop without a reset. The other rates hold resets; the first and the last
tenth of the steps, in which processes start and end, are left out.
"""
import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402
from prepare_data import import_libero  # noqa: E402


def simulator_alone(suite, task, size, steps):
    """Steps per second of LIBERO's own environment with both cameras, as its users step it."""
    root = Path(import_libero().__file__).parent
    from libero.libero.envs import OffScreenRenderEnv
    env = OffScreenRenderEnv(bddl_file_name=str(root / "bddl_files" / suite / f"{task}.bddl"),
                             camera_heights=size, camera_widths=size)
    env.env.reset()
    rng, clock = np.random.default_rng(0), time.perf_counter()
    for _ in range(steps):
        env.step(rng.uniform(-1, 1, 7))
    rate = steps / (time.perf_counter() - clock)
    env.close()
    return rate


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--env", default="libero_object", choices=evaluate.LIBERO_STEPS)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--episodes", type=int, default=4, help="per task")
    p.add_argument("--steps", type=int, default=100, help="per episode")
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    settings = evaluate.arguments(["--env", args.env, "--device", args.device])
    evaluate.torch.set_num_threads(1)
    arm = evaluate.make_arm(args.checkpoint, settings.batch, args.device)
    bench = evaluate.ENVIRONMENTS[args.env](settings, arm.data)
    arm.learn(bench)
    idle = evaluate.Arm("idle", "idle", arm.policy)
    idle.chunks = lambda asked: [np.zeros((arm.policy.chunk, 7), np.float32)] * len(asked)
    tasks = list(bench.tasks)[:2]
    size = arm.policy.config["image_size"]
    print(f"simulator alone        {simulator_alone(args.env, tasks[0], size, 100):6.1f} steps/s "
          f"({size} pixels, {', '.join(arm.policy.cameras)})")
    for one in (idle, arm):
        base = None
        for workers in range(1, args.workers + 1):
            jobs = [evaluate.Job(one.key, task, start, 0, arm.policy.chunk, None, 0.01, args.steps,
                                 tuple(arm.policy.cameras), size, None)
                    for task in tasks for start in range(args.episodes)]
            arm.seconds = arm.looks = 0
            times = []                              # of every look: one a step
            asked = SimpleNamespace(chunks=lambda looks: times.extend([time.perf_counter()] * len(looks))
                                    or one.chunks(looks))
            for _ in evaluate.play_all(jobs, {one.key: asked}, bench, workers):
                pass
            first, last = len(times) // 10, len(times) * 9 // 10
            rate = (last - first) / (times[last] - times[first])
            base = base or rate
            policy = (f"; policy {1000 * arm.seconds / arm.looks:.1f} ms per look" if arm.looks else "")
            print(f"{'policy' if one is arm else 'no policy':10s} {workers:2d} workers  {rate:6.1f} steps/s, "
                  f"{rate / base:.2f} times one worker's{policy}", flush=True)


if __name__ == "__main__":
    evaluate.run(main)

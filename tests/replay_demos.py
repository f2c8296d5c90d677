"""Do stored LIBERO demonstrations still succeed when evaluate.py's environment replays their actions? Does it
show what the files show? A change of simulator version becomes visible here first.

    python tests/replay_demos.py --demos FOLDER --suites libero_object libero_spatial libero_goal --per-task 7

FOLDER holds <suite>/<task>_demo.hdf5 with states. Every episode starts from the demonstration's own state and
furniture.
"""
import argparse
import sys
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402
from models import HelpFormatter, InputError, run  # noqa: E402
from prepare_data import natural, place_scene, show_state, stored_observations  # noqa: E402

CAMERAS = ("agentview", "wrist")


def replay(env, task, demo):
    """-> whether the demonstration's actions end in success."""
    env.begin(task, demo["states"][0].astype(np.float64), 0, place=lambda sim: place_scene(sim, demo))
    return any(env.step(action, look=False)[2] for action in demo["actions"][:].astype(np.float64))


def compare_pictures(env, f, demo):
    """-> mean absolute difference between the stored images and renderings of the same states, of 255. In raw
    files, the image of a row was taken after the row's action, that is, before the next one."""
    stored, _, after = stored_observations(f, demo, argparse.Namespace(cameras=CAMERAS))
    place_scene(env.sim, demo)
    apart = []
    for t in range(0, len(demo["states"]) - 1, 10):
        show_state(env.sim, demo["states"][t + after].astype(np.float64))
        apart += [np.abs(stored[c][t] - env.render(c, 128).astype(float)).mean() for c in CAMERAS]
    return np.mean(apart)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--demos", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--suites", nargs="+", default=["libero_object", "libero_spatial", "libero_goal"],
                   choices=evaluate.LIBERO_STEPS)
    p.add_argument("--per-task", type=int, default=7, help="demonstrations, evenly spread over the file")
    args, wins = p.parse_args(argv), []
    for suite in args.suites:
        env = evaluate.LiberoEnv(suite, None, 0, (), 128)
        for path in tqdm(sorted((args.demos / suite).glob("*_demo.hdf5")), suite, unit="task"):
            task = path.name.removesuffix("_demo.hdf5")
            with h5py.File(path, "r") as f:
                keys = sorted(f["data"], key=natural)
                spread = np.linspace(0, len(keys) - 1, min(args.per_task, len(keys))).astype(int)
                outcomes = {keys[i]: replay(env, task, f["data"][keys[i]]) for i in spread}
                lost = [key for key, success in outcomes.items() if not success]
                line = f"{suite} {task}: {sum(outcomes.values())} of {len(outcomes)}, lost: {lost}"
                if "obs/agentview_rgb" in f["data"][keys[0]]:
                    line += f"; pictures differ by {compare_pictures(env, f, f['data'][keys[0]]):.1f} of 255"
            wins += outcomes.values()
            tqdm.write(line)
        env.close()
    if not wins:
        raise InputError(f"there is no <suite>/<task>_demo.hdf5 in {args.demos}: --demos names that folder")
    print("{} succeed: {} % {}".format(*evaluate.percent(evaluate.success_rate(wins), 1)))


if __name__ == "__main__":
    run(main)

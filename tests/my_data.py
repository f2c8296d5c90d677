"""A dataset of one's own: hdf5 files with RGB images and absolute joint targets. Copy it and change it.

    python tests/my_data.py mine --input FOLDER --instruction "stack the cups"      # -> data/mine

Frames are BGR; T images need T-1 actions; `delta` says which numbers are changes per step.
"""
import functools
import glob
import os
import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import run  # noqa: E402
from prepare_data import SOURCES, Source, main, to_jpegs, vector  # noqa: E402

JOINTS = "j1 j2 j3 j4 j5 j6 gripper", "rad rad rad rad rad rad 1", "joints", "1 = open"
ABOUT = {"cameras": ["front", "wrist"], "action": vector(*JOINTS, delta=[False] * 7),
         "proprio": vector(*JOINTS)}


def my_episodes(args):
    """One item per file: its name, and a job that reads it, later and in another process."""
    for path in sorted(glob.glob(os.path.join(args.input, "*.hdf5"))):
        yield os.path.basename(path), functools.partial(my_episode, path, args)


def my_episode(path, args):
    """One file -> one episode: T images per camera, T-1 actions, T joint positions."""
    with h5py.File(path) as f:
        images = {camera: to_jpegs(f[f"observations/images/{camera}"][:][..., ::-1], args)   # RGB -> BGR
                  for camera in ABOUT["cameras"]}
        return {"images": images, "instructions": [args.instruction], "fps": 50,
                "actions": f["action"][:-1],          # action[t] follows image[t]: the last leads nowhere
                "proprio": f["observations/qpos"][:]}


SOURCES["mine"] = Source(my_episodes, ABOUT, "my robot", {"--instruction": dict(required=True)})
if __name__ == "__main__":
    run(main)

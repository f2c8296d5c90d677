"""Shared by all tests: importable scripts, one torch thread, a tiny dataset in the project's own format."""
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)     # so that results do not depend on the number of cores

import prepare_data  # noqa: E402
import robot  # noqa: E402
from models import POLICIES  # noqa: E402

SMALL_SIZES = {"baku": dict(width=32, layers=2, heads=2, channels=8, dropout=0.0),
               "act": dict(width=32, layers=2, decoder_layers=2, heads=2, channels=8, dropout=0.0, style=4),
               "diffusion": dict(width=32, channels=8, down=(32, 64), step_width=16, draws=4)}


def small_size(policy):
    """The size of a policy in unit tests; a new policy is tested in its tiny size."""
    return SMALL_SIZES.get(policy, POLICIES[policy].SIZES["tiny"])


def moving_square(seed, length=24, size=32):
    """A square whose motion is the true action -> frames (T, H, W, 3), actions (T-1, 7) in pixels / 100,
    proprio (T, 7)."""
    rng = np.random.default_rng(seed)
    position, frames, actions, proprio = rng.uniform(6, 26, 2), [], [], []
    velocity = rng.uniform(-2, 2, 2)
    for _ in range(length):
        frame = np.full((size, size, 3), 40, np.uint8)
        x, y = position.round().astype(int)
        frame[max(y - 4, 0):y + 4, max(x - 4, 0):x + 4] = (220, 60, 60)
        frames.append(frame)
        proprio.append([*position / 10, 0, 0, 0, 0, 1])
        velocity = np.clip(0.8 * velocity + rng.normal(0, 0.8, 2) + 0.05 * (16 - position), -3, 3)
        actions.append([*velocity / 100, 0, 0, 0, 0, float(position[0] > 16)])
        position = np.clip(position + velocity, 4, 28)
    return frames, np.array(actions[:-1], np.float32), np.array(proprio, np.float32)


def write_dataset(folder, episodes=20, cameras=("front",), actions=True, length=24):
    """Write a dataset folder with the project's own writer. Instructions alternate between two."""
    def job(i):
        frames, acts, proprio = moving_square(i, length)
        jpeg = [prepare_data.encode_frame(cv2.cvtColor(f, cv2.COLOR_RGB2BGR)) for f in frames]
        episode = {"images": {c: jpeg for c in cameras},
                   "instructions": [("move the square", "push the box")[i % 2]], "fps": 20.0}
        return {**episode, "actions": acts, "proprio": proprio} if actions else episode

    about = dict(source="square", image_size=32, cameras=list(cameras), resize="none", flip="none",
                 format_version=prepare_data.FORMAT_VERSION, alignment="pre", extra={},
                 proprio={"names": list("xy.....")} if actions else None,
                 # The attributes of the twin's actions, so that a policy of the square may act on the twin.
                 action={**robot.ACTION, "names": "x y . . . . side".split()} if actions else None)
    folder.mkdir(parents=True)
    jobs = [{"name": f"{i:03d}", **prepare_data.check_episode(job(i), about)} for i in range(episodes)]
    shard = str(folder / "00000.h5")
    prepare_data.write_shard(shard, about, jobs, [])
    prepare_data.finish(str(folder), about, [shard], episodes)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two datasets of a moving square: `video` (one camera, no actions), `robot` (two cameras, actions)."""
    root = tmp_path_factory.mktemp("data")
    return Namespace(video=str(write_dataset(root / "video", actions=False)),
                     robot=str(write_dataset(root / "robot", cameras=("front", "side"))))


@pytest.fixture(scope="session")
def libero_assets():
    assets = os.environ.get("LIBERO_ASSETS")
    if not assets or not Path(assets, "scenes").is_dir():
        pytest.skip("needs LIBERO's meshes and textures in the folder that LIBERO_ASSETS names")
    return assets


def metrics(run):
    """metrics.jsonl of a run folder -> list of dicts."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]

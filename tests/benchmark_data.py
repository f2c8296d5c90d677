"""How fast prepare_data.py converts and reads, compared with the decoder alone. Not part of the test suite.

    python tests/benchmark_data.py                      # about 5 minutes on two cores
    python tests/benchmark_data.py --clips 200          # a quick look; start-up counts more

Clips resemble Something-Something's: 427 x 240 VP9, 48 frames at 12 fps, 250 kbit/s. Trajectories resemble
BridgeData V2's: 38 JPEGs of 640 x 480. A few different ones are made and linked many times. Rates are per
second of CPU time (user + system) of all processes; peak memory is that of the largest process.
"""
import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402

SIZE = 128


def scenes(seed, count, height, width):
    """Yield `count` (H, W, 3) uint8 BGR frames: a textured scene from a moving camera, with noise."""
    rng = np.random.default_rng(seed)
    scene = cv2.resize(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8), (width + 160, height + 160),
                       interpolation=cv2.INTER_CUBIC) + rng.normal(0, 5, (height + 160, width + 160, 3))
    for t in range(count):
        x, y = 60 + int(40 * np.sin(t / 9)), 60 + int(30 * np.cos(t / 7))
        frame = scene[y:y + height, x:x + width] + rng.normal(0, 1.5, (height, width, 3))
        yield np.clip(frame, 0, 255).astype(np.uint8)


def make_clips(root, count, different=20):
    """Something-Something v2: `count` clips and their labels. -> paths of the different clips"""
    folder = root / prepare_data.SSV2_CLIPS
    folder.mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps(
        [{"id": str(i), "label": f"moving thing {i}"} for i in range(count)]))
    for i in range(different, count):
        os.symlink(f"{i % different}.webm", folder / f"{i}.webm")
    clips = [folder / f"{i}.webm" for i in range(different)]
    for i, clip in enumerate(clips):
        with av.open(str(clip), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=12, width=427, height=240, bit_rate=250_000,
                                          pix_fmt="yuv420p", options={"cpu-used": "4"})
            for frame in scenes(i, 48, 240, 427):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
            container.mux(stream.encode())
    return clips


def make_trajectories(root, count, frames=38):
    """BridgeData V2: `count` trajectories with the images of the first. -> folder of these images"""
    folders = [root / f"raw/bridge_data_v2/kitchen/task/{i:04d}/2023-07-11_14-06-57/raw/traj_group0/traj{i}"
               for i in range(count)]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        if i:
            os.symlink(folders[0] / "images0", folder / "images0")
        (folder / "policy_out.pkl").write_bytes(pickle.dumps([{"actions": np.zeros(7)}] * (frames - 1)))
        (folder / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": np.zeros((frames, 7))}))
        (folder / "lang.txt").write_text(f"do {i}\n")
    (folders[0] / "images0").mkdir()
    for t, frame in enumerate(scenes(0, frames, 480, 640)):
        cv2.imwrite(str(folders[0] / "images0" / f"im_{t}.jpg"), frame)
    return folders[0] / "images0"


def plain_video(path):
    """Decode every frame and resize it: the work that no converter can avoid."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    while (read := capture.read())[0]:
        cv2.resize(read[1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def plain_images(folder, flag):
    """The same for a folder of images."""
    for path in folder.iterdir():
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)
        cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def per_cpu_second(call, repeat):
    call()
    start = time.process_time()
    for _ in range(repeat):
        call()
    return repeat / (time.process_time() - start)


def measure(source, root, workers, plain):
    """Convert a source as typed, and print the rate beside the decoder's. -> the dataset's folder"""
    out = root.parent / f"{source}_data"
    command = [sys.executable, ROOT / "prepare_data.py", source, "--input", root, "--out", out]
    process = subprocess.Popen([*command, "--workers", workers], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    status, usage = os.wait4(process.pid, 0)[1:]
    assert status == 0, f"prepare_data.py {source} ended with {os.waitstatus_to_exitcode(status)}"
    episodes = json.loads((out / "dataset.json").read_text())["counts"]["episodes"]
    rate = episodes / (usage.ru_utime + usage.ru_stime)
    print(f"\n{source}: episodes per CPU-second\n  decoder and resize alone   {plain:6.1f}\n"
          f"  prepare_data.py            {rate:6.1f} = {rate / plain:.0%}, start-up included\n"
          f"  peak memory                {usage.ru_maxrss / 1024:.0f} MB for {episodes} episodes")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=prepare_data.HelpFormatter)
    parser.add_argument("--clips", type=int, default=2000, help="half as many trajectories")
    parser.add_argument("--workers", default="2", help="processes")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = make_clips(folder / "ssv2", args.clips)
        plain = len(clips) * per_cpu_second(lambda: list(map(plain_video, clips)), 4)
        converted = measure("ssv2", folder / "ssv2", args.workers, plain)
        images = make_trajectories(folder / "bridge", args.clips // 2)
        full, half = (per_cpu_second(lambda: plain_images(images, flag), 20)
                      for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_REDUCED_COLOR_2))
        measure("bridge", folder / "bridge", args.workers, full)
        print(f"  decoder at half size, as prepare_data.py uses it, and resize alone: {half:.1f}")
        data = prepare_data.EpisodeDataset(converted, 10, future=1)
        windows = iter(np.random.default_rng(0).integers(len(data), size=20_000).tolist())
        rate = per_cpu_second(lambda: data[next(windows)], 3000)
        print(f"\nreading: {rate:.0f} random windows of 11 frames at {SIZE} pixels per CPU-second")


if __name__ == "__main__":
    main()

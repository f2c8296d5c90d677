"""How fast data are prepared and read, beside the decoder alone in the same run; not part of the test suite.

    python tests/benchmark_data.py                      # some 5 minutes on two cores
    python tests/benchmark_data.py --clips 200 --few 50 # a look

Clips are like Something-Something's: 427 x 240 VP9, 48 frames at 12 fps, 250 kbit/s (with PyAV; OpenCV's
writer takes no rate). Trajectories are like BridgeData V2's: 38 JPEGs of 640 x 480. A few different ones are
made and listed many times over. CPU-seconds are user + system time of the whole process tree.
"""
import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402

cv2.setNumThreads(1)
SIZE, FRAMES = 128, 48


def scenes(seed, count, height, width):
    """A textured scene seen from a moving camera, a disc that crosses it, grain. Yields (H, W, 3) BGR."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)
    scene = cv2.resize(low, (width + 160, height + 160), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    scene += 2 * cv2.GaussianBlur(rng.normal(0, 8, scene.shape).astype(np.float32), (0, 0), 1.2)
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    for t in range(count):
        shift = np.float32([[1, 0, -60 - 40 * np.sin(t / 9)], [0, 1, -60 - 30 * np.cos(t / 7)]])
        frame = cv2.warpAffine(scene, shift, (width, height))
        cv2.circle(frame, (100 + 4 * t, height // 2), 25, (30, 60, 200), -1)
        yield np.clip(frame.astype(np.float32) + rng.normal(0, 1.5, frame.shape), 0, 255).astype(np.uint8)


def write_clip(path, seed):
    frames = list(scenes(seed, FRAMES, 240, 427))
    try:
        import av
    except ImportError:
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP90"), 12, (427, 240))
        for frame in frames:
            writer.write(frame)
        return writer.release()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 427, 240, "yuv420p", 250_000
        stream.options = {"deadline": "good", "cpu-used": "4"}
        for frame in [*frames, None]:
            picture = None if frame is None else av.VideoFrame.from_ndarray(frame, format="bgr24")
            for packet in stream.encode(picture):
                container.mux(packet)


def make_clips(root, count, different=20):
    folder = root / prepare_data.SSV2_CLIPS
    folder.mkdir(parents=True)
    for i in range(1, count + 1):
        if i <= different:
            write_clip(folder / f"{i}.webm", i)
        else:
            os.link(folder / f"{(i - 1) % different + 1}.webm", folder / f"{i}.webm")
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps(
        [{"id": str(i), "label": f"moving thing {i}"} for i in range(1, count + 1)]))


def make_trajectories(root, count, frames=38):
    first = None
    for i in range(count):
        day = root / f"raw/bridge_data_v2/kitchen/task/{i // 100:02d}/2023-07-11_14-06-57"
        folder = day / f"raw/traj_group0/traj{i}"
        (folder / "images0").mkdir(parents=True)
        for t, frame in enumerate(scenes(0, frames, 480, 640)) if first is None else ():
            cv2.imwrite(str(folder / "images0" / f"im_{t}.jpg"), frame)
        for t in range(frames) if first else ():
            os.link(first / "images0" / f"im_{t}.jpg", folder / "images0" / f"im_{t}.jpg")
        (folder / "policy_out.pkl").write_bytes(pickle.dumps([{"actions": np.zeros(7)}] * (frames - 1)))
        (folder / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": np.zeros((frames, 7))}))
        (folder / "lang.txt").write_text(f"do {i}\n")
        first = first or folder
    return first / "images0"


def plain_video(path):
    """What nobody can do without: decode, shrink."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    while (read := capture.read())[0]:
        cv2.resize(read[1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def plain_jpegs(folder, flag):
    for path in sorted(folder.iterdir()):
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)
        cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def per_cpu_second(call, repeat):
    call()
    start = time.process_time()
    for _ in range(repeat):
        call()
    return repeat / (time.process_time() - start)


def tree_memory(pid):
    """MB of a process and all below it: proportional set size, shared pages counted once."""
    total, todo = 0, [pid]
    while todo:
        pid = todo.pop()
        try:
            todo += [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                     for child in (task / "children").read_text().split()]
            total += int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):
            pass                                      # it has just ended
    return total / 1024


def convert(source, root, out, *flags):
    """Run prepare_data.py as typed -> (CPU seconds, seconds, peak MB of the process tree)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = [sys.executable, str(ROOT / "prepare_data.py"), source, "--input", str(root), "--out", str(out)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = [0.0]

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], tree_memory(process.pid))
            time.sleep(0.1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()
    assert process.returncode == 0, f"prepare_data.py {source} ended with {process.returncode}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.time() - start, peak[0]


def measure(source, root, few, count, workers):
    """Convert a share and the whole -> a line: rates with and without the start-up, memory of both runs."""
    share = ["--fraction", str(few / count), "--workers", workers]
    small = convert(source, root, root.parent / f"{source}_few", *share)
    large = convert(source, root, root.parent / f"{source}_all", "--workers", workers)
    done = [json.loads((root.parent / f"{source}_{name}" / "dataset.json").read_text())["counts"]["episodes"]
            for name in ("few", "all")]
    return done[1] / large[0], (done[1] - done[0]) / (large[0] - small[0]), (
        f"{done[1]} episodes, {large[0]:.1f} CPU-seconds, {large[1]:.1f} s; peak {small[2]:.0f} MB at "
        f"{done[0]}, {large[2]:.0f} MB at {done[1]}")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--few", type=int, default=200, help="clips of the short run")
    parser.add_argument("--workers", default="2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_clips(folder / "ssv2", args.clips)
        clips = [folder / "ssv2" / prepare_data.SSV2_CLIPS / f"{i}.webm" for i in range(1, 21)]
        print(f"{args.workers} workers on {os.cpu_count()} cores; rates per CPU-second; 'steady' leaves the "
              f"start-up out\n\nssv2: clips of {clips[0].stat().st_size / 1000:.0f} kB")
        plain = [20 * per_cpu_second(lambda: list(map(plain_video, clips)), 4)]
        whole, steady, about = measure("ssv2", folder / "ssv2", args.few, args.clips, args.workers)
        plain += [20 * per_cpu_second(lambda: list(map(plain_video, clips)), 4)]
        rate = np.mean(plain)
        print(f"  cv2.VideoCapture and resize alone {rate:6.1f} ({plain[0]:.1f} and {plain[1]:.1f})\n"
              f"  prepare_data.py ssv2              {whole:6.1f} = {whole / rate:.0%}; steady {steady:.1f} = "
              f"{steady / rate:.0%}\n  {about}")

        images = make_trajectories(folder / "bridge", args.clips // 2)
        full, half = (per_cpu_second(lambda: plain_jpegs(images, flag), 20)
                      for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_REDUCED_COLOR_2))
        whole, steady, about = measure("bridge", folder / "bridge", args.few, args.clips // 2, args.workers)
        print(f"\nbridge: trajectories of 38 images\n"
              f"  cv2.imdecode and resize alone     {full:6.1f}; decoding at half size {half:.1f}\n"
              f"  prepare_data.py bridge            {whole:6.1f} = {whole / full:.0%}; steady {steady:.1f} = "
              f"{steady / full:.0%}; of half size {whole / half:.0%} and {steady / half:.0%}\n  {about}")

        data = prepare_data.EpisodeDataset(folder / "ssv2_all", 10, future=1)
        windows = iter(np.random.default_rng(0).integers(len(data), size=20_000).tolist())
        rate = per_cpu_second(lambda: data[next(windows)], 3000)
        print(f"\nreading: {rate:.0f} random windows of 11 frames at {SIZE} pixels, of {len(data):,} in "
              f"{len(data._paths)} shards")


if __name__ == "__main__":
    main()

"""Data: every source becomes one HDF5 format, and one Dataset reads it (the data of both stages, Section IV).

    python prepare_data.py sim                                      # the twin: data/robot and data/hand
    python prepare_data.py ssv2 --input /data/ssv2 --fraction 0.1   # Something-Something v2: data/ssv2
    python prepare_data.py videos --input my_clips --captions my_clips.csv
    python prepare_data.py inspect data/robot                       # numbers, and a contact sheet to look at
    python prepare_data.py embed --data data/ssv2 --text-encoder minilm

A run may be killed at any moment: the same command with --resume goes on where it stopped and ends in the
same bytes, whatever --workers is. Measured per second of a busy core: 15 clips of 48 frames at
426x240, or one demonstration of the twin, or reading 1,500 windows of 11 frames at 64 pixels, 500 at 128.

Timeline of a window of n actions that starts at frame t, as EpisodeDataset returns it:

    frame      t      t+1    ...   t+n
    images    o_t    o_t+1         o_t+n      (n+1, 3, H, W) uint8
    actions   a_t    a_t+1 ... a_t+n-1        (n, A)  a_k is what was commanded while looking at o_k
    latent    z_t    z_t+1 ... z_t+n-1        (n, Z)  by the policy from o_t and the instruction alone
    z_k moves o_k to o_k+1. Past the end the last frame and a hold action repeat, and is_pad (n,) is True.

A dataset is a folder of shards 00000.h5, 00001.h5, ... and dataset.json, which is written last: a folder
without it is not a dataset. Shard k covers a fixed run of the source's items. N frames, E episodes:

    images/<camera>/jpg      (bytes,) uint8, contiguous   JPEG q95 4:4:4, one frame after the other
    images/<camera>/offset   (N+1,) int64                 frame i is jpg[offset[i]:offset[i+1]]
    episode_start            (E+1,) int64                 episode e is frames start[e]:start[e+1]
    name, instruction        (E,) str                     instruction: JSON list of annotations, first counts
    instruction_embedding    (E, L) float32               of the first annotation, by attrs' text_encoder
    fps                      (E,) float32                 frames per second
    actions, proprio         (N, A), (N, P) float32       absent for video; the row of an episode's last frame
                                                          is the hold action (zeros, last gripper)
    rejects                  (R,) str                     JSON: unusable items of the run and the reasons

Canonical action: [dx dy dz (m), rotation vector (rad) x3, gripper]; attributes name frame and gripper sign.
Adding a dataset is one generator of (name, job) and one entry in SOURCES.
"""
import argparse
import collections
import contextlib
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")    # damaged clips are counted, not shouted
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

from models import InputError, TextEncoder, file_hash, run, write_atomically

FORMAT_VERSION = 1
MAX_REJECTED = 0.05       # share of rejected items above which the exit status says so
VIDEO_CAMERA = "front"    # the one camera of a video: the robot's first, so that finetuning carries it over
SSV2_CLIPS = "20bn-something-something-v2"
OURS = ("dataset.json", "labels/train.json", "rejects.jsonl", "contact_sheet.png", "[0-9]*.h5", "*.tmp",
        f"{SSV2_CLIPS}/*.webm", "arguments.json")       # what --overwrite removes; marks of completion first


class Reject(Exception):
    """Raised by a job whose item cannot be used: Reject(reason, detail). Counted, never replaced by black."""


# ---- files -------------------------------------------------------------------------------------------------

def write_json(path, value):
    """Plain JSON with sorted keys: the same content is the same bytes."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path):
    """Content of a JSON file; InputError that names the file when it is none."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise InputError(f"{path} is not a JSON file ({error}): fetch or make it again") from None


def check_free(folder, args):
    """InputError when the output folder holds something that neither --resume nor --overwrite may touch."""
    held = os.listdir(folder) if os.path.exists(folder) else []
    held = [name for name in held if not name.endswith(".tmp")]
    if held and "arguments.json" not in held:
        raise InputError(f"{folder} holds files of others ({held[0]}, ...): give another folder with --out")
    if held and not (args.resume or args.overwrite):
        raise InputError(f"{folder} exists: --resume finishes it, --overwrite replaces it (or another --out)")


def claim_output(folder, arguments, done, args):
    """Make the folder ours. -> True when nothing is left to do there: `done`, the file written last, exists.

    arguments.json is written first, so that --resume can tell when it would continue something else.
    """
    check_free(folder, args)
    if args.overwrite:
        for path in [path for mine in OURS for path in glob.glob(os.path.join(glob.escape(folder), mine))]:
            os.unlink(path)
    made_by = os.path.join(folder, "arguments.json")
    before = read_json(made_by) if os.path.exists(made_by) else arguments
    for key in sorted(before.keys() | arguments.keys()):
        if before.get(key) != arguments.get(key):
            raise InputError(f"{folder} was begun with {key} {before.get(key)!r}, now it is "
                             f"{arguments.get(key)!r}: --resume needs the same, --overwrite starts afresh")
    if os.path.exists(os.path.join(folder, done)):
        print(f"{folder}: complete, nothing to do")
        return True
    os.makedirs(folder, exist_ok=True)
    write_json(made_by, arguments)
    return False


# ---- frames ------------------------------------------------------------------------------------------------

def encode_frame(bgr):
    """(H, W, 3) uint8 BGR -> JPEG bytes. 4:4:4: halving the colour planes of a small picture costs 2.6 dB."""
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                                      cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])[1].tobytes()


def shrink(frame, size, rule):
    """(H, W, 3) -> (size, size, 3). squash changes the aspect ratio, crop keeps the centre square.

    UPSTREAM: the release squashes with INTER_LINEAR, which aliases; INTER_AREA averages what it drops.
    """
    if rule == "crop":
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        frame = frame[top:top + side, left:left + side]
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def read_video(path, instructions, args):
    """Job: one video file -> episode. Reject unless 90 % of the announced frames decode.

    OpenCV returns what decodes of a cut file without a word, so the frames are counted against the header.
    """
    if not os.path.exists(path):
        raise Reject("missing file")
    with open(path, "rb") as f:
        head = f.read(8)
    if not head:
        raise Reject("empty file")
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise Reject("not a video", f"begins with {head!r}")
    announced, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    jpegs = []
    while (read := capture.read())[0]:
        jpegs.append(encode_frame(shrink(read[1], args.image_size, args.resize)))
    if announced > 0 and len(jpegs) < 0.9 * announced:
        raise Reject("truncated", f"{len(jpegs)} of {announced:.0f} frames decode")
    if len(jpegs) < args.min_frames:
        raise Reject("too short", f"{len(jpegs)} frames, --min-frames {args.min_frames}")
    if not 0 < fps <= 240:
        raise Reject("no frame rate", f"{fps} frames per second")
    return {"images": {VIDEO_CAMERA: jpegs}, "instructions": instructions, "fps": fps}


# ---- source: Something-Something v2 ------------------------------------------------------------------------

def natural(text):
    """Sort key by which clip 9 comes before clip 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def drawn(name, fraction):
    """Whether an item is in a random share of all: by a hash of its name, whatever the other items are."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) < fraction * 16 ** 12


def ssv2_episodes(args):
    """Clips of Something-Something v2, in the numeric order of their ids.

    Label files and folders go by many names (TwentyBN's, Qualcomm's, what people unpack them into): all are
    searched. `label` is what the annotator wrote; the refilled `template` differs from it in 22 % of clips.
    """
    package, labels = "20bn-something-something-download-package-labels", {}
    for split in args.splits:
        places = [os.path.join(args.input, folder, name)
                  for folder in ("labels", "labels/labels", "annotations", "", package, f"{package}/labels")
                  for name in (f"{split}.json", f"something-something-v2-{split}.json")]
        found = next((place for place in places if os.path.isfile(place)), None)
        print(f"labels of {split}: {found or 'not there'}")
        for entry in read_json(found) if found else []:
            if "id" not in entry or "label" not in entry:
                raise InputError(f"{found}: {entry} has no id or no label; leave the test split out")
            labels[str(entry["id"])] = entry["label"].strip()
    if not labels:
        raise InputError(f"no labels in {args.input}: expected labels/train.json or "
                         f"something-something-v2-train.json, as in {package}.zip")
    folders = [os.path.join(args.input, name) for name in (SSV2_CLIPS, "videos", "")]
    folder = next((f for f in folders if glob.glob(os.path.join(glob.escape(f), "*.webm"))), None)
    if folder is None:
        raise InputError(f"no .webm in {' or '.join(folders)}: unpack there, cat {SSV2_CLIPS}-?? | tar zx")
    if not any(name.removesuffix(".webm") in labels for name in os.listdir(folder)):
        raise InputError(f"{folder} has none of the {len(labels)} labelled clips: do clips and labels match?")
    for clip in sorted(labels, key=natural):
        if drawn(clip, args.fraction):
            path = os.path.join(folder, f"{clip}.webm")
            yield clip, functools.partial(read_video, path, [labels[clip]], args)


# ---- source: a folder of videos ----------------------------------------------------------------------------

def videos_episodes(args):
    """All video files below a folder, one episode each, with one instruction for all or a CSV of captions."""
    endings = (".mp4", ".webm", ".avi", ".mov", ".mkv")
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(args.input) for name in names]
    files = sorted((os.path.relpath(path, args.input).replace(os.sep, "/") for path in paths
                    if path.lower().endswith(endings)), key=natural)
    if not files:
        raise InputError(f"no video in {args.input}: expected files ending in {' '.join(endings)}")
    captions = {name: [args.instruction] for name in files}
    if args.captions:
        captions = read_captions(args.captions, set(files), args.input)
        print(f"captions for {len(captions)} of {len(files)} videos; the others are left out")
    elif not args.instruction:
        print("no --captions and no --instruction: every video gets the empty instruction")
    for name in files:
        if name in captions and drawn(name, args.fraction):
            yield name, functools.partial(read_video, os.path.join(args.input, name), captions[name], args)


def read_captions(path, files, folder):
    """CSV with columns file,instruction -> {file: [instruction, ...]}: several lines, several annotations."""
    captions = {}
    if not os.path.isfile(path):
        raise InputError(f"no captions at {path}: give a CSV with the columns file,instruction")
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        if not {"file", "instruction"} <= set(rows.fieldnames or ()):
            raise InputError(f"{path} has the columns {rows.fieldnames}: expected file,instruction")
        for row in rows:
            if row["file"] not in files:
                raise InputError(f"{path}, line {rows.line_num}: no video {row['file']!r} in {folder}")
            captions.setdefault(row["file"], []).append((row["instruction"] or "").strip())
    return captions


# ---- source: the table-top twin ----------------------------------------------------------------------------

TRIES = 5                 # starts one demonstration may take: the expert fails now and then, as people do
SMOKE = {"tasks": ["stack_cups"], "demos_per_task": 20, "hand_videos_per_task": 12}
HAND_SEED0 = 500_000      # starts of the robot are seeds below it, of the hand from it to robot.EVAL_SEED0
HAND_SIZE = (120, 212)    # (H, W) of the hand videos: Something-Something's shape at half its size
HAND_FPS = 10             # Something-Something has 12; 10 divides the 20 Hz of control: motion stays even


@functools.lru_cache(maxsize=None)
def twin(embodiment, image_size, cameras, spread):
    """One environment per process: building it takes longer than an episode."""
    from robot import TwinEnv
    return TwinEnv(embodiment=embodiment, image_size=image_size, cameras=cameras, spread=spread)


def perform(env, task, seeds):
    """First success of the expert among the starts -> T observations, T-1 actions. Or Reject."""
    from robot import Expert
    for seed in seeds:
        observations, actions, done = [env.reset(task, seed)], [], False
        expert = Expert(env, seed)
        while not done:
            actions.append(np.asarray(expert.act(), np.float32))    # rounded first: what is stored was done
            observation, done, success = env.step(actions[-1])
            observations.append(observation)
        if success:
            return observations, actions
    raise Reject("no success", f"{task}, starts {seeds[0]} to {seeds[-1]}")


def film_robot(task, seeds, args):
    """Job: one demonstration by the robot."""
    from robot import CONTROL_HZ
    env = twin("robot", args.image_size, ("front", "side"), args.spread)
    observations, actions = perform(env, task, seeds)
    images = {camera: [encode_frame(o["images"][camera][..., ::-1]) for o in observations]
              for camera in env.cameras}
    return {"images": images, "instructions": [env.instruction], "fps": CONTROL_HZ, "actions": actions,
            "proprio": [o["proprio"] for o in observations]}


def film_hand(task, seeds, args, path):
    """Job: one performance by the hand, written as VP9 and moved into place once it reads back whole.

    OpenCV reports no full disk, so the frames are counted. The container holds a random number: its bytes
    differ from run to run, its decoded frames do not.
    """
    from robot import CONTROL_HZ
    observations, _ = perform(twin("hand", HAND_SIZE, (VIDEO_CAMERA,), args.spread), task, seeds)
    frames = [o["images"][VIDEO_CAMERA] for o in observations[::CONTROL_HZ // HAND_FPS]]
    unfinished, stderr = path[:-len(".webm")] + ".tmp.webm", os.dup(2)
    with open(os.devnull, "wb") as null:                  # OpenCV prints a needless line for every .webm
        os.dup2(null.fileno(), 2)
    codec = cv2.VideoWriter_fourcc(*"VP90")
    writer = cv2.VideoWriter(unfinished, cv2.CAP_FFMPEG, codec, HAND_FPS, HAND_SIZE[::-1])
    os.dup2(stderr, 2)
    os.close(stderr)
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    capture, written = cv2.VideoCapture(unfinished, cv2.CAP_FFMPEG), 0
    while capture.grab():
        written += 1
    if written != len(frames):
        raise OSError(errno.ENOSPC, f"only {written} of {len(frames)} frames were written", unfinished)
    os.replace(unfinished, path)


def twin_starts(args, count, first, end):
    """`count` episodes per task, tasks taking turns: [(number, task, TRIES seeds)]. InputError."""
    from robot import TASKS
    for task in args.tasks:
        if task not in TASKS:
            raise InputError(f"--tasks: there is no task {task!r}, but {', '.join(TASKS)}")
    top = first + args.seed + TRIES * count
    if args.seed < 0 or top > end:
        raise InputError(f"{count} episodes per task with --seed {args.seed} take the starts "
                         f"{first + args.seed} to {top}, allowed are {first} to {end}: fewer, or --seed 0")
    seeds = [range(seed, seed + TRIES) for seed in range(first + args.seed, top, TRIES)]
    return [(number, task, seeds[number]) for number in range(count) for task in args.tasks]


def sim_episodes(args):
    """Demonstrations by the twin's robot."""
    for number, task, seeds in twin_starts(args, args.demos_per_task, 0, HAND_SEED0):
        yield f"{task}-{number:05d}", functools.partial(film_robot, task, seeds, args)


def film_hand_videos(args, folder):
    """Hand videos laid out as Something-Something v2; finished clips are kept. -> share of rejects."""
    from robot import EVAL_SEED0, TASKS
    starts = twin_starts(args, args.hand_videos_per_task, HAND_SEED0, EVAL_SEED0)
    arguments = {key: vars(args)[key] for key in ("tasks", "spread", "seed", "hand_videos_per_task")}
    if claim_output(folder, {"source": "sim", **arguments}, "labels/train.json", args):
        return 0.0
    for name in (SSV2_CLIPS, "labels"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    clips = {str(i): os.path.join(folder, SSV2_CLIPS, f"{i}.webm") for i in range(1, len(starts) + 1)}
    jobs = [functools.partial(film_hand, task, seeds, args, path)
            for (_, task, seeds), path in zip(starts, clips.values()) if not os.path.exists(path)]
    with contextlib.closing(run_jobs(jobs, args.workers)) as results:
        results = list(tqdm(results, folder, len(starts), initial=len(starts) - len(jobs), unit="video"))
    labels = [(i, TASKS[task].instruction) for i, (_, task, _) in zip(clips, starts)
              if os.path.exists(clips[i])]
    write_json(os.path.join(folder, "labels", "train.json"),
               [{"id": i, "label": label, "template": label, "placeholders": []} for i, label in labels])
    reasons = collections.Counter(result.args[0] for result in results if isinstance(result, Reject))
    return report(folder, f"{len(labels)} videos", len(starts), reasons)


# ---- the sources -------------------------------------------------------------------------------------------

# episodes  generator of (name, job) from the parsed arguments. job() reads ONE episode, in whichever process,
#           and returns {"images": {camera: T JPEGs}, "instructions": [str], "fps": float} and, where there
#           are any, "actions": (T-1, A) and "proprio": (T, P); or it raises Reject
# shard     items per shard up to 128 pixels: some 100 MB of JPEG, and little enough to do again after a kill
# about     attributes that hold for the source as such
Source = collections.namedtuple("Source", "episodes shard about")
VECTOR = {"names": ["x", "y", "z", "rx", "ry", "rz", "gripper"], "units": ["m"] * 3 + ["rad"] * 3 + ["1"]}
VIDEO = {"cameras": [VIDEO_CAMERA], "action": None, "proprio": None}
SOURCES = {
    "sim": Source(sim_episodes, 8, {
        "cameras": ["front", "side"],
        "action": {**VECTOR, "frame": "robot base, change per step", "gripper": "1 = open, 0 = closed"},
        "proprio": {**VECTOR, "frame": "robot base, from tool-down", "gripper": "1 = open .. 0 = closed"}}),
    "ssv2": Source(ssv2_episodes, 256, VIDEO),
    "videos": Source(videos_episodes, 256, VIDEO),
}


# ---- the convert loop, one for all sources -----------------------------------------------------------------

def start_worker():
    """In each worker: Ctrl-C is the parent's business, and a worker whose parent was killed ends as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_job(job):
    """Result of a job, or the Reject it raised."""
    cv2.setNumThreads(1)                      # the processes are the parallelism
    try:
        return job()
    except Reject as reject:
        return reject


def run_jobs(jobs, workers):
    """Yield the results of a list of jobs in order. Few run ahead of it: memory stays constant."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(run_job, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    waiting = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(run_job, job))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed (memory?): --resume with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def convert(args):
    """Write one dataset from one source. -> share of rejected items. InputError, OSError."""
    source, items = SOURCES[args.source], list(SOURCES[args.source].episodes(args))
    if not items:
        raise InputError(f"{args.source}: nothing to convert with these arguments (is --fraction too small?)")
    names = hashlib.sha256("\n".join(name for name, _ in items).encode()).hexdigest()
    arguments = {**vars(args), "format_version": FORMAT_VERSION, "items": names}
    for key in ("out", "workers", "resume", "overwrite"):        # these may differ when a run goes on
        del arguments[key]
    if claim_output(args.out, arguments, "dataset.json", args):
        return 0.0
    encoder = TextEncoder(args.text_encoder)
    stated = {key: arguments.pop(key) for key in ("format_version", "source", "image_size", "resize")}
    extra = {key: value for key, value in arguments.items()
             if key not in ("input", "captions", "text_encoder", "items")}
    about = {**stated, **source.about, "flip": "none", "text_encoder": encoder.name, "text_dim": encoder.dim,
             "alignment": "actions[t] was commanded while looking at images[t] and leads to images[t+1]",
             "extra": extra}
    size = max(1, min(source.shard, source.shard * 128 ** 2 // args.image_size ** 2))
    shards = {os.path.join(args.out, f"{i // size:05d}.h5"): items[i:i + size]
              for i in range(0, len(items), size)}
    todo = {path: part for path, part in shards.items() if not os.path.exists(path)}
    jobs = [job for part in todo.values() for _, job in part]
    with contextlib.closing(run_jobs(jobs, args.workers)) as results, tqdm(
            desc=args.out, total=len(items), initial=len(items) - len(jobs), unit="episode") as bar:
        for path, part in todo.items():
            episodes, rejects = [], []
            for name, _ in part:
                result = check_episode(next(results), about)
                if isinstance(result, Reject):
                    reason, detail = (*result.args, "")[:2]
                    rejects.append({"name": name, "reason": reason, "detail": detail})
                else:
                    episodes.append({"name": name, **result})
                bar.update()
            write_shard(path, about, episodes, rejects, encoder)
    return finish(args.out, about, list(shards), len(items))


def check_episode(episode, about):
    """The contract of a job. -> the episode with float32 arrays, or a Reject."""
    if isinstance(episode, Reject):
        return episode
    lengths = {camera: len(jpegs) for camera, jpegs in episode["images"].items()}
    T = max(lengths.values())
    assert lengths == dict.fromkeys(about["cameras"], T), f"{lengths} frames, but cameras {about['cameras']}"
    if T < 2:
        return Reject("too short", f"{T} frames")
    for key, attribute, rows in (("actions", "action", T - 1), ("proprio", "proprio", T)):
        assert (key in episode) == bool(about[attribute]), f"{key}, but {attribute}: {about[attribute]}"
        if key in episode:
            episode[key] = np.asarray(episode[key], np.float32)
            assert len(episode[key]) == rows, f"{len(episode[key])} {key} for {T} frames, expected {rows}"
            if not np.isfinite(episode[key]).all():
                return Reject(f"{key} not finite")
    return episode


def write_shard(path, about, episodes, rejects, encoder):
    """One shard, put together in memory and written in one go: a full disk is then a plain OSError."""
    buffer = io.BytesIO()
    lengths = [len(episode["images"][about["cameras"][0]]) for episode in episodes]
    with h5py.File(buffer, "w") as f:
        for key, value in about.items():
            f.attrs[key] = value if isinstance(value, (str, int)) else json.dumps(value, sort_keys=True)
        for camera in about["cameras"]:
            jpegs = [jpeg for episode in episodes for jpeg in episode["images"][camera]]
            f[f"images/{camera}/jpg"] = np.frombuffer(b"".join(jpegs), np.uint8)
            f[f"images/{camera}/offset"] = np.cumsum([0] + [len(jpeg) for jpeg in jpegs], dtype=np.int64)
        f["episode_start"] = np.cumsum([0] + lengths, dtype=np.int64)
        f["fps"] = np.array([episode["fps"] for episode in episodes], np.float32)
        f["instruction_embedding"] = embed([episode["instructions"][0] for episode in episodes], encoder)
        for key, values in (("name", [episode["name"] for episode in episodes]),
                            ("instruction", [json.dumps(episode["instructions"]) for episode in episodes]),
                            ("rejects", [json.dumps(reject) for reject in rejects])):
            f.create_dataset(key, (len(values),), h5py.string_dtype(), data=values)
        if about["action"] and episodes:
            rows = [np.vstack([e["actions"], np.zeros_like(e["actions"][:1])]) for e in episodes]
            for actions in rows:
                actions[-1, -1] = actions[-2, -1]                # the hold action keeps the gripper as it is
            f["actions"] = np.concatenate(rows)
        if about["proprio"] and episodes:
            f["proprio"] = np.concatenate([episode["proprio"] for episode in episodes])
    write_atomically(path, buffer.getbuffer())


def embed(texts, encoder):
    """E instructions -> (E, L) float32; each different one is encoded once."""
    unique = sorted(set(texts))
    rows = np.asarray(encoder(unique), np.float32) if unique else np.zeros((0, encoder.dim), np.float32)
    return rows[[unique.index(text) for text in texts]] if unique else rows


def finish(folder, about, paths, num_items):
    """Sum up the shards, write rejects.jsonl and, last, dataset.json. -> share of rejects. InputError."""
    shards, rejects, fps, instructions = [], [], [], set()
    numbers = {"actions": [], "proprio": []}
    for path in paths:
        with h5py.File(path, "r") as f:
            start = f["episode_start"][:]
            rejects += [json.loads(text) for text in f["rejects"].asstr()[:]]
            instructions |= {json.loads(text)[0] for text in f["instruction"].asstr()[:]}
            fps += f["fps"][:].tolist()
            if "actions" in f:                                   # without the hold rows
                numbers["actions"].append(np.delete(f["actions"][:], start[1:] - 1, axis=0))
            if "proprio" in f:
                numbers["proprio"].append(f["proprio"][:])
        shards.append({"file": os.path.basename(path), "episodes": len(start) - 1, "frames": int(start[-1]),
                       "sha256": file_hash(path)})
    write_atomically(os.path.join(folder, "rejects.jsonl"),
                     "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    if not fps:
        raise InputError(f"{folder}: none of the {num_items} items can be used ({rejects[0]['name']}: "
                         f"{rejects[0]['reason']}, ...), see rejects.jsonl there; then --overwrite")
    statistics = {}
    for key in (key for key in numbers if numbers[key]):
        rows = np.concatenate(numbers[key]).astype(np.float64)   # (N, D)
        columns = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0),
                   "q01": np.quantile(rows, 0.01, axis=0), "q99": np.quantile(rows, 0.99, axis=0)}
        statistics[key] = {name: column.tolist() for name, column in columns.items()}
    counts = {"items": num_items, "rejected": len(rejects), "episodes": len(fps),
              "frames": sum(shard["frames"] for shard in shards), "instructions": len(instructions)}
    write_json(os.path.join(folder, "dataset.json"), {**about, "fps": float(np.median(fps)), "counts": counts,
                                                      "statistics": statistics, "shards": shards})
    what = ", ".join(f"{counts[key]} {key}" for key in ("episodes", "frames", "instructions"))
    return report(folder, what, num_items, collections.Counter(reject["reason"] for reject in rejects))


def report(folder, what, num_items, reasons):
    """Print what was written, and the rejects by reason. -> share of rejected items."""
    print(f"{folder}: {what}; {sum(reasons.values())} of {num_items} rejected")
    for reason, count in reasons.most_common():
        print(f"{count:>10}  {reason}")
    return sum(reasons.values()) / num_items


# ---- the dataset -------------------------------------------------------------------------------------------

def read_manifest(path):
    """dataset.json -> attributes, shards, fingerprint (which pins every shard). InputError."""
    manifest = os.path.join(path, "dataset.json")
    if not os.path.exists(manifest):
        if os.path.exists(os.path.join(path, "arguments.json")):
            raise InputError(f"{path} is half made (no dataset.json): finish it with --resume and the "
                             "command that began it, see arguments.json there")
        raise InputError(f"{path} is not a dataset (no dataset.json): python prepare_data.py sim makes "
                         "data/robot and data/hand")
    attrs = read_json(manifest)
    if attrs["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path} has format version {attrs['format_version']}, expected {FORMAT_VERSION}: "
                         "make it again")
    return attrs, attrs.pop("shards"), file_hash(manifest)


class EpisodeDataset(torch.utils.data.Dataset):
    """Windows of a prepared dataset: one for every frame t of an episode but its last.

    path            folder made by prepare_data.py
    chunk           n, actions per window; what reaches past the episode is padded, see the timeline above
    cameras         names, or a number: the first so many; None = all. "frames" are those of the first
    future          also return o_t .. o_t+n, for the world model
    split           "all", "train" or "val", by episode, never by frame: of the episodes ordered by
                    instruction every tenth is val. So every task has its share, and so has data in which no
                    instruction comes twice
    demos_per_task  keep the first N episodes of the split for each instruction
    text_encoder    name that the instructions must have been embedded with, None = any

    Item: {"obs": {"images": {camera: (3, H, W) uint8}, "instruction": (L,) f4, "proprio": (P,) f4 if stored},
           "frames": (n+1, 3, H, W) uint8 if future, "actions": (n, A) f4 if stored, "is_pad": (n,) bool,
           "episode": int, "t": int, "instruction_id": int}. InputError for what the data cannot give.
    """
    MAX_OPEN = 128       # open shards per process: systems allow 1024 files, Something-Something makes 760

    def __init__(self, path, chunk, cameras=None, future=False, split="all", demos_per_task=None,
                 text_encoder=None):
        self.path, self.chunk, self.future = os.fspath(path), chunk, future
        self.attrs, shards, self.fingerprint = read_manifest(self.path)
        self.stats, self.fps, self.image_size, self.text_encoder, self.text_dim = (
            self.attrs[key] for key in ("statistics", "fps", "image_size", "text_encoder", "text_dim"))
        self.action_dim, self.proprio_dim = (
            len(self.stats[key]["min"]) if key in self.stats else None for key in ("actions", "proprio"))
        known = list(self.attrs["cameras"])
        self.cameras = known[:cameras] if cameras is None or isinstance(cameras, int) else list(cameras)
        for camera in self.cameras:
            if camera not in known:
                raise InputError(f"{path} has no camera {camera!r}, but {', '.join(known)}")
        if text_encoder not in (None, self.text_encoder):
            raise InputError(f"{path} was embedded with {self.text_encoder}, expected {text_encoder}: "
                             f"python prepare_data.py embed --data {path} --text-encoder {text_encoder}")
        self._read_index([shard["file"] for shard in shards])
        self.episodes = self._choose(split, demos_per_task)      # indices into all episodes of the folder
        self.num_episodes = len(self.episodes)
        longest = int(self.lengths[self.episodes].max()) - 1
        if not 1 <= chunk <= longest:
            raise InputError(f"a chunk of {chunk} actions does not fit: the longest episode of {path} "
                             f"({split}) has {longest}, take 1 to {longest}")
        self._ends = np.cumsum(self.lengths[self.episodes] - 1)  # windows up to the end of each episode
        self._files, self._pid = collections.OrderedDict(), None

    def _read_index(self, names):
        """Where each episode lies, and its instruction: what is kept in memory, some 30 bytes per episode."""
        self._paths = [os.path.join(self.path, name) for name in names]
        rows, texts = [], []                                     # (shard, number in it, first frame, frames)
        for k, path in enumerate(self._paths):
            if not os.path.exists(path):
                raise InputError(f"{path} is missing: the dataset was copied in part, copy it again")
            with self._open(path) as f:
                if f.attrs["text_encoder"] != self.text_encoder:
                    raise InputError(f"{path} is embedded with {f.attrs['text_encoder']}, dataset.json says "
                                     f"{self.text_encoder}: embed was interrupted, run it again")
                start = f["episode_start"][:].tolist()
                texts += [json.loads(text)[0] for text in f["instruction"].asstr()[:]]
            rows += [(k, e, first, end - first) for e, (first, end) in enumerate(zip(start, start[1:]))]
        self._place, self.lengths = np.array(rows)[:, :3], np.array(rows)[:, 3]
        ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.instructions, self.instruction_ids = list(ids), np.array([ids[text] for text in texts])

    @staticmethod
    def _open(path):
        try:
            return h5py.File(path, "r")
        except OSError as e:
            raise InputError(f"{path} cannot be read ({str(e).splitlines()[0][:80]}): copy or make the "
                             "dataset again") from e

    def _choose(self, split, demos_per_task):
        """Episodes of a split, as sorted indices."""
        total = len(self.lengths)
        if split not in ("all", "train", "val") or (split != "all" and total < 2):
            raise InputError(f"cannot take split {split!r} of {total} episodes of {self.path}: expected all, "
                             "or train or val of two episodes or more")
        by_instruction = np.argsort(self.instruction_ids, kind="stable")
        is_val = np.zeros(total, bool)
        is_val[by_instruction[min(10, total) - 1::10]] = True    # of fewer than ten, the last
        chosen = np.flatnonzero({"all": is_val | True, "train": ~is_val, "val": is_val}[split])
        if demos_per_task is None:
            return chosen
        per_task = [chosen[self.instruction_ids[chosen] == i] for i in range(len(self.instructions))]
        for text, mine in zip(self.instructions, per_task):
            if not 1 <= demos_per_task <= len(mine):
                raise InputError(f"{demos_per_task} demonstrations per task asked for, but {self.path} "
                                 f"({split}) has {len(mine)} of {text!r}: ask for fewer, or prepare more")
        return np.sort(np.concatenate([mine[:demos_per_task] for mine in per_task]))

    def _file(self, shard):
        """Handles of a shard, opened on first use in each process; of MAX_OPEN the longest unused closes."""
        if self._pid != os.getpid():                             # a fork must not read through its parent's
            self._files, self._pid = collections.OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) == self.MAX_OPEN:
                self._files.popitem(last=False)[1]["file"].close()
            f = self._open(self._paths[shard])
            frames = {c: (f[f"images/{c}/jpg"], f[f"images/{c}/offset"][:]) for c in self.cameras}
            arrays = {key: f[key] for key in f if key != "images"}
            self._files[shard] = {"file": f, "frames": frames, **arrays}
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self):
        return {**self.__dict__, "_files": collections.OrderedDict(), "_pid": None}    # handles do not travel

    def limits(self, key):
        """{"min", "max"} of "actions" or "proprio" over the episodes of this split alone: what a policy that
        is trained on them may know. attrs["statistics"] are those of the whole dataset."""
        rows = []
        for episode in self.episodes:
            shard, _, start = self._place[episode]
            last = start + self.lengths[episode] - (key == "actions")    # not the hold action
            rows.append(self._file(shard)[key][start:last])
        rows = np.concatenate(rows)
        return {"min": rows.min(0), "max": rows.max(0)}

    def spaced(self, most):
        """At most `most` windows, evenly spaced over all -> list of their indices."""
        return np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)).tolist()

    def __len__(self):
        return int(self._ends[-1])

    def read_frames(self, episode, camera, first, count):
        """Frames first .. first+count-1, the episode's last repeated past its end. (count, 3, H, W) uint8."""
        shard, _, start = self._place[episode]
        real = min(count, self.lengths[episode] - first)
        jpg, offset = self._file(shard)["frames"][camera]
        bounds = offset[start + first:start + first + real + 1]
        data, bounds = jpg[bounds[0]:bounds[-1]], bounds - bounds[0]               # one contiguous read
        frames = np.empty((count, 3, self.image_size, self.image_size), np.uint8)
        for k in range(real):
            bgr = cv2.imdecode(data[bounds[k]:bounds[k + 1]], cv2.IMREAD_COLOR)    # (H, W, 3)
            frames[k] = bgr.transpose(2, 0, 1)[::-1]
        frames[real:] = frames[real - 1]
        return torch.from_numpy(frames)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        i, n = int(np.searchsorted(self._ends, index, side="right")), self.chunk
        episode, t = int(self.episodes[i]), int(index - (self._ends[i - 1] if i else 0))
        shard, number, start = self._place[episode]
        file, last = self._file(shard), int(self.lengths[episode]) - 1
        count = {self.cameras[0]: n + 1} if self.future else {}
        images = {c: self.read_frames(episode, c, t, count.get(c, 1)) for c in self.cameras}
        item = {"obs": {"images": {c: frames[0] for c, frames in images.items()},
                        "instruction": torch.from_numpy(file["instruction_embedding"][number])},
                "is_pad": t + torch.arange(n) >= last,           # (n,): there is no a_last
                "episode": episode, "t": t, "instruction_id": int(self.instruction_ids[episode])}
        if self.future:
            item["frames"] = images[self.cameras[0]]             # (n+1, 3, H, W)
        if "proprio" in file:
            item["obs"]["proprio"] = torch.from_numpy(file["proprio"][start + t])
        if "actions" in file:                                    # the last frame's row is the hold action
            rows = file["actions"][start + t:start + min(t + n, last + 1)]
            item["actions"] = torch.from_numpy(rows[np.minimum(np.arange(n), len(rows) - 1)])    # (n, A)
        return item


# ---- commands ----------------------------------------------------------------------------------------------

def film_twin(args):
    """sim: demonstrations into OUT/robot, hand videos into OUT/hand_videos and, read back, into OUT/hand."""
    places = {name: os.path.join(args.out, name) for name in ("robot", "hand_videos", "hand")}
    for place in places.values():
        check_free(place, args)               # before the first hour of filming, not after it
    rejected, hand_args = 0.0, argparse.Namespace(**vars(args))
    del args.hand_videos_per_task             # no business of the demonstrations: --resume may change it
    if args.demos_per_task:
        rejected = convert(argparse.Namespace(**{**vars(args), "out": places["robot"]}))
    if hand_args.hand_videos_per_task:
        ssv2 = build_parser().parse_args(["ssv2", "--input", places["hand_videos"], "--out", places["hand"]])
        for key in ("image_size", "text_encoder", "workers", "resume", "overwrite"):
            setattr(ssv2, key, getattr(args, key))
        rejected = max(rejected, film_hand_videos(hand_args, places["hand_videos"]), convert(ssv2))
    return rejected


def embed_again(args):
    """embed: replace the instruction embeddings, shard by shard. The same command finishes it."""
    attrs, shards, _ = read_manifest(args.data)
    encoder = TextEncoder(args.text_encoder)
    for shard in tqdm(shards, args.data, unit="shard"):
        path, buffer = os.path.join(args.data, shard["file"]), io.BytesIO()
        with h5py.File(path, "r") as old, h5py.File(buffer, "w") as new:
            new.attrs.update({**old.attrs, "text_encoder": encoder.name, "text_dim": encoder.dim})
            for key in sorted(set(old) - {"instruction_embedding"}):
                old.copy(key, new)
            texts = [json.loads(text)[0] for text in old["instruction"].asstr()[:]]
            new["instruction_embedding"] = embed(texts, encoder)
        write_atomically(path, buffer.getbuffer())
        shard["sha256"] = file_hash(path)
    write_json(os.path.join(args.data, "dataset.json"),
               {**attrs, "text_encoder": encoder.name, "text_dim": encoder.dim, "shards": shards})
    print(f"{args.data}: {attrs['counts']['episodes']} instructions embedded with {encoder.name}")
    return 0.0


def inspect(args):
    """inspect: print what a dataset holds, and draw a contact sheet."""
    data = EpisodeDataset(args.data, chunk=1)
    for key, value in sorted({**data.attrs, "fingerprint": data.fingerprint}.items()):
        if key != "statistics":
            print(f"{key:>15}  {value if isinstance(value, str) else json.dumps(value)}")
    seconds = np.median(data.lengths) / data.fps
    print(f"{'lengths':>15}  {data.lengths.min()} to {data.lengths.max()} frames, median {seconds:.1f} s")
    times = np.bincount(data.instruction_ids)
    for i in np.argsort(-times, kind="stable")[:10]:
        print(f"{times[i]:>9} times  {data.instructions[i]!r}")
    for key, table in data.stats.items():
        print(f"{key:>15}  " + "".join(f"{column:>10}" for column in table))
        for d, name in enumerate(data.attrs[{"actions": "action"}.get(key, key)]["names"]):
            print(f"{name:>15}  " + "".join(f"{column[d]:>10.4f}" for column in table.values()))
    path = args.contact_sheet or os.path.join(args.data, "contact_sheet.png")
    write_atomically(path, cv2.imencode(".png", contact_sheet(data))[1].tobytes())
    print(f"{'contact sheet':>15}  {path}")
    return 0.0


def contact_sheet(data, rows=10, columns=8, side=112):
    """(H, W, 3) uint8 BGR: episodes spread over the instructions, frames evenly spaced, all cameras."""
    seen, rank = collections.Counter(), []               # how many-th episode of its instruction each one is
    for i in data.instruction_ids:
        rank.append(seen[i])
        seen[i] += 1
    order = np.lexsort((data.instruction_ids, rank))     # one of each instruction, then a second of each, ...
    if len(data.instructions) > rows:
        order = order[np.linspace(0, len(data.instructions) - 1, rows).astype(int)]
    strips = []
    for episode in order[:rows]:
        length, text = int(data.lengths[episode]), data.instructions[data.instruction_ids[episode]]
        text = f"{episode}: {ascii(text)[1:-1]} ({length} frames, {length / data.fps:.1f} s)"
        strips.append(np.full((20, columns * side, 3), 255, np.uint8))
        cv2.putText(strips[-1], text, (3, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        for camera in data.cameras:
            frames = [data.read_frames(episode, camera, int(t), 1)[0].numpy()[::-1].transpose(1, 2, 0)
                      for t in np.linspace(0, length - 1, columns)]
            frames = [cv2.resize(np.ascontiguousarray(frame), (side - 2, side - 2)) for frame in frames]
            border = ((1, 1), (1, 1), (0, 0))
            strips.append(np.hstack([np.pad(frame, border, constant_values=255) for frame in frames]))
            cv2.putText(strips[-1], camera, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 255), 1)
    return np.vstack(strips)


def build_parser(smoke=False):
    """All flags; --help of a command is its table."""
    show, plain = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="source", required=True, metavar="sim|ssv2|videos|inspect|embed")
    about = {"sim": "film the twin", "ssv2": "Something-Something v2", "videos": "a folder of videos",
             "inspect": "numbers and a contact sheet", "embed": "embed the instructions again"}
    sim, ssv2, videos, look, text = (
        commands.add_parser(name, help=what, formatter_class=show) for name, what in about.items())
    words = {"type": lambda value: value.split(",")}
    group = sim.add_argument_group("what is filmed")
    group.add_argument("--demos-per-task", type=int, default=60, help="successful demonstrations; 0 = none")
    group.add_argument("--hand-videos-per-task", type=int, default=80, help="videos of the hand; 0 = none")
    # Two of the paper's five tasks move two things; they work, but want more demonstrations than a first try.
    group.add_argument("--tasks", default="cup_in_bowl,pineapple_between_cups,stack_cups", **words,
                       help="comma-separated; all five: also cups_on_plate,pineapple_and_roll")
    group.add_argument("--spread", type=float, default=0.5, help="start regions: 1 = full size, 0 = points")
    group.add_argument("--seed", type=int, default=0, help="number of the first start")
    group.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    if smoke:
        sim.set_defaults(**SMOKE)
    sim.set_defaults(resize="none: filmed at this size")
    ssv2.add_argument("--splits", default="train,validation", help="comma-separated; not test", **words)
    videos.add_argument("--captions", type=os.path.abspath, help="CSV with the columns file,instruction")
    videos.add_argument("--instruction", default="", help="one for all videos, without --captions")
    for command in (ssv2, videos):
        group = command.add_argument_group("input and frames")
        group.add_argument("--input", type=os.path.abspath, required=True, help="folder")
        group.add_argument("--fraction", type=float, default=1.0, help="random share of clips; paper: 0.1")
        group.add_argument("--min-frames", type=int, default=12, help="shorter clips are rejected (frames)")
        group.add_argument("--resize", choices=("squash", "crop"), default="squash",
                           help="squash changes the aspect ratio (as the release), crop cuts a square")
    for command, out, size in ((sim, "data", 64), (ssv2, "data/ssv2", 128), (videos, "data/videos", 128)):
        group = command.add_argument_group("output")
        group.add_argument("--out", default=out, help="folder; sim makes robot, hand_videos and hand in it")
        group.add_argument("--image-size", type=int, default=size, help="pixels; paper: 128")
        group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 = no others")
        group = group.add_mutually_exclusive_group()
        group.add_argument("--resume", action="store_true", help="finish what was begun")
        group.add_argument("--overwrite", action="store_true", help="replace what is there")
    for command in (sim, ssv2, videos, text):
        command.add_argument("--text-encoder", default="hash", metavar="hash|minilm|clip",
                             help="hash: no download; minilm: BAKU's; clip: the release's")
    text.add_argument("--data", required=True, help="dataset")
    look.add_argument("data", help="dataset")
    look.add_argument("--contact-sheet", metavar="PNG", help="None = contact_sheet.png in the dataset")
    return parser


def main(argv=None):
    """Run one command. InputError when too much was rejected; the dataset is written all the same."""
    args = build_parser("--smoke" in (sys.argv[1:] if argv is None else argv)).parse_args(argv)
    for key, low in (("image_size", 8), ("workers", 1), ("min_frames", 2), ("spread", 0),
                     ("demos_per_task", 0), ("hand_videos_per_task", 0)):
        if getattr(args, key, low) < low:
            raise InputError(f"--{key.replace('_', '-')} {getattr(args, key)}: expected {low} or more")
    rejected = {"sim": film_twin, "inspect": inspect, "embed": embed_again}.get(args.source, convert)(args)
    if rejected > MAX_REJECTED:
        raise InputError(f"{100 * rejected:.0f} % of all items rejected (above {100 * MAX_REJECTED:.0f}):"
                         " the dataset is written, but look at the reasons above before you use it")


if __name__ == "__main__":
    run(main)

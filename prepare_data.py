"""Data: converts every source to one HDF5 format and reads it (the data of both stages, Section IV).

    python prepare_data.py sim                                      # the twin: data/robot and data/hand
    python prepare_data.py ssv2 --input /data/ssv2 --fraction 0.1   # Something-Something v2: data/ssv2
    python prepare_data.py bridge --input /data/demos_8_17.zip      # BridgeData V2, the zip or its folder
    python prepare_data.py libero --input /data/libero_object       # LIBERO's *_demo.hdf5
    python prepare_data.py lerobot --input /data/my_robot           # a LeRobotDataset v3 folder
    python prepare_data.py realman --input data/takes               # recordings of `robot.py record`
    python prepare_data.py videos --input my_clips --captions my_clips.csv
    python prepare_data.py ssv2 --input /data/ssv2 --part 3/16 --resume     # the third of 16 machines' work
    python prepare_data.py ssv2 --input /data/ssv2 --check          # read everything, write nothing
    python prepare_data.py inspect data/robot                       # print numbers, draw a contact sheet

A run may be killed at any time. The same command with --resume continues it and writes the same bytes as an
uninterrupted run, for any number of --workers. An item that cannot be used becomes a line of rejects.jsonl
that gives the reason; above 5 % rejects the exit status is 2. tests/benchmark_data.py measures the speed.

With --part K/N, N machines share a source: each makes every N-th shard. If they share the output folder, the
last one completes the dataset. Otherwise copy their folders into one and run the command there once more,
without --part: it makes what is missing, and the bytes are those that one machine would have made.

Timeline of a window of n actions that starts at frame t, as EpisodeDataset returns it:

    frame      t      t+1    ...   t+n
    images    o_t    o_t+1         o_t+n      (n+1, 3, H, W) uint8
    actions   a_t    a_t+1 ... a_t+n-1        (n, A)  a_k was commanded while looking at o_k
    latent    z_t    z_t+1 ... z_t+n-1        (n, Z)  by the policy from o_t and the instruction alone
    z_k moves o_k to o_k+1. Past the end the last frame and a hold action repeat, and is_pad (n,) is True.

A dataset is a folder of shards 00000.h5, 00001.h5, ... and dataset.json, which is written last: a folder
without it is unfinished. A shard holds a fixed range of the source's items. With N frames and E episodes:

    images/<camera>/jpg      (bytes,) uint8, contiguous   JPEG q95 4:4:4, one frame after the other
    images/<camera>/offset   (N+1,) int64                 frame i is jpg[offset[i]:offset[i+1]]
    episode_start            (E+1,) int64                 episode e is frames start[e]:start[e+1]
    name, instruction        (E,) str                     JSON list of annotations; training uses the first
    fps                      (E,) float32                 frames per second
    actions, proprio         (N, A), (N, P) float32       absent for video; the row of an episode's last frame
                                                          is the hold action (changes zero, targets repeated)
    rejects                  (R,) str                     JSON: rejected items of this range, with reasons

Canonical action: [dx dy dz, rotation x3, gripper] in the source's own numbers. Attributes state units, frame,
which numbers are changes per step, and the sign of the gripper (Bridge 1 = open, LIBERO +1 = close).
To add a dataset, write one generator of (name, job) and one entry in SOURCES; tests/my_data.py is an example.
Each source has its own section: read only the one that you need.
"""
import argparse
import atexit
import bisect
import collections
import contextlib
import csv
import datetime
import errno
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import types
import unicodedata
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from xml.etree import ElementTree

import av
import cv2
import h5py
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from models import (HelpFormatter, InputError, at_least, check_free, check_same, file_hash, read_json, run,
                    shrink, write_atomically, write_json)
from robot import ACTION, CONTROL_HZ, EVAL_SEED0, PROPRIO, TAKE_FORMAT, TASKS, TwinEnv, expert_episode

FORMAT_VERSION = 3        # 3: instructions are stored as text; the policy embeds them
MAX_REJECTED = 0.05       # above this share of rejected items the exit status is 2
VIDEO_CAMERA = "front"    # named as the robot's first camera, so that finetuning inherits its weights
SSV2_CLIPS, SSV2_LABELS = "20bn-something-something-v2", "20bn-something-something-download-package-labels"
OURS = ("dataset.json", "labels/train.json", "rejects.jsonl", "contact_sheet.png", "[0-9]*.h5", "*.tmp",
        f"{SSV2_CLIPS}/*.webm", "arguments.json")       # --overwrite removes these, in this order
av.logging.set_level(av.logging.PANIC)                  # damaged files become rejects: no need to print


class Reject(Exception):
    """A job raises Reject(reason, detail) when its item cannot be used. No other item takes its place."""


# ---- files -------------------------------------------------------------------------------------------------

def walk(root):
    """os.walk that follows links but visits each folder once, and skips datasets that this script made.
    InputError for a folder that cannot be listed."""
    def fail(error):
        raise InputError(f"cannot list {error.filename} ({error.strerror}): give --input a readable folder")
    seen = set()
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen or (folder != root and os.path.exists(os.path.join(place, "arguments.json"))):
            below.clear()
            continue
        seen.add(place)
        below.sort()
        yield folder, below, names


def find_files(root, *endings):
    """-> paths of the files below root with these endings, relative to root, in natural order."""
    return sorted((os.path.relpath(os.path.join(folder, name), root) for folder, _, names in walk(root)
                   for name in names if name.lower().endswith(endings)), key=natural)


def natural(text):
    """Sort key that puts clip 9 before clip 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def drawn(name, args):
    """Whether --fraction includes this item. The choice depends on its name and --seed alone, so a larger
    fraction contains a smaller one, and a missing file does not change the choice of the others.
    UPSTREAM: the release takes the first 10,000 files in lexicographic order."""
    digest = hashlib.sha256(f"{args.seed}/{name}".encode()).hexdigest()
    return int(digest[:12], 16) < args.fraction * 16 ** 12


def check_output(folder, args):
    """InputError when the folder holds files of others, or ours without --resume or --overwrite."""
    held = [name for name in sorted(glob.glob("*", root_dir=folder)) if not name.endswith(".tmp")]
    if held and "arguments.json" not in held:
        raise InputError(f"{folder} holds other files ({held[0]}, ...): give another folder with --out")
    check_free(folder, held, args)


def claim_output(folder, arguments, done, args):
    """Prepare the output folder. -> True when it is complete, that is, when `done`, written last, exists.

    arguments.json is written first. InputError when --resume would continue a run with other arguments.
    """
    check_output(folder, args)
    if args.overwrite:
        for path in [path for ours in OURS for path in glob.glob(ours, root_dir=folder)]:
            os.unlink(os.path.join(folder, path))
    made_by = os.path.join(folder, "arguments.json")
    if os.path.exists(made_by):
        check_same(folder, read_json(made_by), arguments)
    if os.path.exists(os.path.join(folder, done)):
        print(f"{folder}: complete, nothing to do (--overwrite makes it again from changed files)")
        return True
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):     # another machine writes the same file at this moment
        write_json(made_by, arguments)
    return False


# ---- frames ------------------------------------------------------------------------------------------------

def encode_frame(bgr):
    """(H, W, 3) uint8 BGR -> JPEG bytes. 4:4:4, because subsampled chroma costs small images 2.6 dB."""
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                                      cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])[1].tobytes()


def decode_image(data, size):
    """JPEG or PNG bytes -> (H, W, 3) uint8 BGR: in half size if that leaves `size` pixels, else in full size.

    Decoding at half size takes half the time (mean error 0.5 of 255). OpenCV fills missing parts with grey
    without an error, so an image without its end marker or with a run of zero bytes is rejected here.
    """
    jpeg = data[:2] == b"\xff\xd8"
    whole = (b"\xff\xd9" if jpeg else b"IEND") in data[-64:]
    hole = jpeg and bytes(512) in data[data.rfind(b"\xff\xda"):]         # after the start-of-scan marker
    array = np.frombuffer(data, np.uint8)
    image = cv2.imdecode(array, cv2.IMREAD_REDUCED_COLOR_2) if whole and not hole else None
    if image is not None and min(image.shape[:2]) < size:
        image = cv2.imdecode(array, cv2.IMREAD_COLOR)
    if image is None:
        raise Reject("damaged image", f"{len(data)} bytes, begins with {data[:8]!r}")
    return image


def to_jpegs(frames, args):
    """(H, W, 3) uint8 BGR frames -> JPEGs of args.image_size pixels. Reject when the camera shows nothing.

    A single colour means a lens cap, a dead camera, or the placeholder that some releases store for a missing
    camera. Every fourth frame is tested. A tenth may be blank, which allows a fade from black.
    """
    jpegs, blank = [], 0
    for frame in frames:
        small = shrink(frame, args.image_size, args.resize)
        blank += len(jpegs) % 4 == 0 and np.ptp(small) < 8
        jpegs.append(encode_frame(small))
    if blank > 0.1 * len(jpegs[::4]):
        raise Reject("blank frames", f"{blank} of {len(jpegs[::4])} frames tested have a single colour")
    return jpegs


def read_images(files, args, flip=np.s_[:]):
    """Contents of JPEG or PNG files -> JPEGs of args.image_size pixels."""
    return to_jpegs((decode_image(data, args.image_size)[flip] for data in files), args)


# ---- videos ------------------------------------------------------------------------------------------------

def open_video(path):
    """-> PyAV container, closed by `with`. Reject a missing or empty file; av.FFmpegError for no video."""
    if not os.path.exists(path):
        raise Reject("missing file", path)
    if not os.path.getsize(path):
        raise Reject("empty file")
    container = av.open(path)
    if not container.streams.video:
        raise Reject("not a video", "it has no video stream")
    codec = container.streams.video[0].codec_context
    codec.thread_count, codec.options = 1, {"err_detect": "explode"}     # else H.264 conceals damage
    return container


def decode(container, start):
    """Frames of a video (av.VideoFrame) from the key frame before `start` s on; all of them for -inf."""
    stream = container.streams.video[0]
    if start >= 0:
        container.seek(int(start / stream.time_base), stream=stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:                        # the file is cut off inside this packet
            return
        yield from packet.decode()


def even_frames(container, fps, start=-math.inf, end=math.inf, max_gap=0.5):
    """Frames of a video at even times: the first one from `start` s on, then one every 1 / fps s until `end`.

    The frames' time stamps decide, not their number: where the rate varies, the frame nearest to each time is
    taken. Reject a damaged frame, or a gap of more than max_gap s and 1.5 frames: a hole in the file.
    """
    frames = decode(container, start)
    first = next(frames, None)
    if start > 0 and (first is None or first.time > start):      # without an index, a seek may land late
        frames, first = decode(container, 0), None
    shown, before, count, slack = None, -math.inf, 0, 0.1 / fps  # s; containers round times to milliseconds
    for frame in itertools.chain([first], frames, [None]):       # None: the end
        time = frame.time if frame else before + 1 / fps         # the last frame is shown for one step, too
        if time < start - slack:
            continue
        if frame and frame.is_corrupt:
            raise Reject("damaged video", f"the frame at {time:.2f} s does not decode without errors")
        if shown is None:
            origin = time
        elif time <= before:                         # some containers confuse the last time stamps
            time = before + 1 / fps
        elif time - before > max(max_gap, 1.5 / fps):
            raise Reject("missing frames", f"none between {before:.2f} s and {time:.2f} s")
        while shown and origin + count / fps < min(time - 0.5 / fps, end - slack):
            yield shown
            count += 1
        if time >= end - slack:
            return
        shown, before = frame, time


def to_bgr(frames):
    """av.VideoFrames -> (H, W, 3) uint8 BGR, rotated upright as the file says."""
    converter = VideoReformatter()                   # one for all frames, with one thread: a third faster
    for frame in frames:
        bgr = converter.reformat(frame, format="bgr24", threads=1).to_ndarray()
        yield np.rot90(bgr, frame.rotation // 90)


def read_video(path, instructions, args, start=None, end=None):
    """Job: one video file, or its seconds [start, end) -> episode. Reject unless 90 % of the time has frames.

    A truncated file decodes without an error up to its end, so the result is compared with the duration in
    the header. Damage inside a file is found where the codec detects it: in H.264 and AV1, but hardly ever in
    VP8 and VP9.
    """
    try:
        container = open_video(path)
    except av.InvalidDataError as error:
        raise Reject("not a video", one_line(error)) from None
    with container:
        stream = container.streams.video[0]
        nominal, average = float(stream.guessed_rate or 0), float(stream.average_rate or 0)
        fps = average if nominal > 2 * average > 0 else nominal          # some files state the clock's rate
        if not 0 < fps <= 240:
            raise Reject("no frame rate", f"{fps} frames per second")
        zero = float((stream.start_time or 0) * stream.time_base)        # s, where the file's clock begins
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
        span = () if start is None else (zero + start, zero + end)
        jpegs = to_jpegs(to_bgr(even_frames(container, fps, *span)), args)
    expected = float(length if start is None else end - start) * fps
    if len(jpegs) < 0.9 * expected:
        raise Reject("truncated", f"{len(jpegs)} of {expected:.0f} frames decode")
    return {"images": {VIDEO_CAMERA: jpegs}, "instructions": instructions, "fps": fps}


# ---- source: Something-Something v2 ------------------------------------------------------------------------

def ssv2_episodes(args):
    """Clips of Something-Something v2, in the numeric order of their ids.

    Copies differ in the names of files and folders, so labels and clips are searched in the whole tree. An
    entry's `label` is what the annotator wrote; its filled-in `template` differs in 22 % of the clips.
    """
    labels, files = {}, find_files(args.input, ".json", ".webm")
    for split in ("train", "validation"):                        # the test split has no labels
        names = {f"{split}.json", f"something-something-v2-{split}.json"}
        found = [file for file in files if os.path.basename(file) in names]
        print(f"labels of {split}: {', '.join(found) or 'not there'}")
        lists = [read_json(os.path.join(args.input, file)) for file in found]
        for entry in itertools.chain(*(x if isinstance(x, list) else [x] for x in lists)):
            if not (isinstance(entry, dict) and "id" in entry and isinstance(entry.get("label"), str)):
                raise InputError(f"{found}: {str(entry)[:80]} has no id or label")
            labels[str(entry["id"])] = " ".join(entry["label"].split())
    if not labels:
        raise InputError(f"no labels in {args.input}: expected labels/train.json or "
                         f"something-something-v2-train.json, as in {SSV2_LABELS}.zip")
    files.sort(key=lambda file: SSV2_CLIPS in file.split(os.sep))        # of several copies the official one
    clips = {os.path.basename(file)[:-5]: os.path.join(args.input, file) for file in files
             if file.lower().endswith(".webm")}
    if not clips.keys() & labels.keys():
        raise InputError(f"{args.input} has none of the {len(labels)} labelled clips as <id>.webm: unzip the "
                         f"archive's parts if they are zipped, then cat {SSV2_CLIPS}-?? | tar zx")
    print(f"{len(labels)} labelled clips (Something-Something v2: 168,913 train, 24,777 validation)")
    for clip in sorted(labels, key=natural):
        yield clip, functools.partial(read_video, clips.get(clip, f"{clip}.webm"), [labels[clip]], args)


# ---- source: a folder of videos ----------------------------------------------------------------------------

def videos_episodes(args):
    """All video files below a folder, one episode each, or the clips that a CSV cuts out of them."""
    endings, names = (".mp4", ".m4v", ".webm", ".avi", ".mov", ".mkv", ".gif"), find_files(args.input, "")
    files = [name for name in names if name.lower().endswith(endings)]
    others = collections.Counter(os.path.splitext(name)[1] or name for name in set(names) - set(files))
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common(10))
        print(f"not videos, therefore skipped: {counts}")
    if not files:
        raise InputError(f"no video in {args.input}: expected files ending in {' '.join(endings)}")
    clips = {(name, None, None): [args.instruction] for name in files}
    if args.captions:
        clips = read_captions(args.captions, files, args.input)
        print(f"captions for {len({file for file, *_ in clips})} of {len(files)} videos; the others are "
              "left out")
    empty = sum("" in texts for texts in clips.values())
    print(f"{len(clips)} clips, {empty} have no instruction")
    for file, start, end in sorted(clips, key=lambda clip: (natural(clip[0]), clip[1] or 0, clip[2] or 0)):
        name = file if start is None else f"{file}@{start:.12g}-{end:.12g}"
        path = os.path.join(args.input, file)
        yield name, functools.partial(read_video, path, clips[file, start, end], args, start, end)


def read_captions(path, files, folder):
    """CSV -> {(file, start, end): [instruction, ...]}: several rows for one clip are several annotations.
    start and end are seconds, or None for the whole file. InputError that names up to ten wrong rows."""
    def composed(name):                              # macOS writes an umlaut as two characters
        return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/")))
    known, captions, wrong = {composed(file): file for file in files}, {}, []
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f, restval="")
            if not {"file", "instruction"} <= set(rows.fieldnames or ()):
                raise ValueError(f"its first line is {','.join(rows.fieldnames or ())!r}")
            for row in rows:
                file = known.get(composed(row["file"]))
                start, end = row.get("start") or None, row.get("end") or None
                text, line = " ".join(row["instruction"].split()), f"line {rows.line_num}"
                if file is None:
                    wrong.append(f"{line}: no video {row['file']!r} in {folder}")
                try:
                    if start or end:
                        start, end = float(start), float(end)
                        if not 0 <= start < end < math.inf:
                            raise ValueError
                except (TypeError, ValueError):
                    wrong.append(f"{line}: start {row.get('start')!r}, end {row.get('end')!r}: expected 0 <= "
                                 "start < end in seconds, or both empty for the whole file")
                captions.setdefault((file, start, end), []).append(text)
        if not captions:
            raise ValueError("it has no rows")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV file in UTF-8, separated by commas, with the first line "
                         "file,instruction or, to cut clips out of the files, file,instruction,start,end: "
                         f"{error}") from None
    if wrong:
        more = "; ..." if len(wrong) > 10 else ""
        raise InputError(f"{path}: {len(wrong)} errors; a file is named as below --input, with its ending: "
                         f"{'; '.join(wrong[:10])}{more}")
    return captions


# ---- source: BridgeData V2 ---------------------------------------------------------------------------------

BRIDGE_HZ = 5                                        # one action every 0.2 s
BRIDGE_CAMERA_LATE_UNTIL = datetime.date(2021, 7, 23)
BRIDGE_MEMBER = re.compile(r"(.*?traj_group[^/]*/traj[^/]*)/"        # agent_data.pkl pickles ROS classes
                           r"(images\d+/[^/]+|obs_dict\.pkl|policy_out\.pkl|lang\.txt)")


def bridge_episodes(args):
    """Trajectories of the raw release, from its folder or straight from its zip.

    .../<YYYY-MM-DD_HH-MM-SS>/{config.json, raw/traj_group<k>/traj<i>/{obs_dict.pkl, policy_out.pkl, lang.txt,
    images0/im_<t>.jpg, ...}}; the number of folders above the date differs. Trajectories without annotation
    get the empty instruction: the world model learns from their images as well.
    UPSTREAM: the release sorts im_0, im_1, im_10, im_11, ..., drops the last image, writes black videos where
    images are missing, and reads only the subtree bridge_data_v2.
    """
    found = (zip_trajectories if os.path.isfile(args.input) else tree_trajectories)(args.input)
    if not found:
        raise InputError(f"no trajectory in {args.input}: expected folders traj_group*/traj* somewhere in "
                         "it, as in demos_8_17.zip or what it unpacks to")
    print(f"{len(found)} trajectories (all of BridgeData V2: 60,096 = 50,365 demonstrations, 9,731 scripted)")
    for name in sorted(found, key=natural):
        yield name, functools.partial(bridge_episode, name, found[name], args)


def tree_trajectories(root):
    """Folder -> {relative name of a trajectory: None}. Each job lists its own files: there are millions."""
    found = {}
    for folder, below, _ in walk(root):
        below[:] = [name for name in below if "lmdb" not in name]
        if os.path.basename(folder).startswith("traj_group"):
            found |= {os.path.relpath(os.path.join(folder, name), root): None
                      for name in below if name.startswith("traj")}
            below.clear()
    return found


def tree_files(folder):
    """Files of one trajectory -> {relative name: path}."""
    files = {name: os.path.join(folder, name) for pattern in ("*", "images*/*")
             for name in glob.glob(pattern, root_dir=folder)}
    config = os.path.normpath(os.path.join(folder, "../../../config.json"))
    return files | {"config.json": config} if os.path.isfile(config) else files


def zip_trajectories(path):
    """Zip -> {name of a trajectory: {relative name: member}}, with members as read_bytes takes them.

    Memory: 0.8 kB per member while the directory is read, in this process alone; jobs get their own members.
    """
    found, configs = collections.defaultdict(dict), {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is not a whole zip ({error}): was it downloaded to the end? Fetch it "
                         "again, or give the folder it unpacks to") from None
    for info in members:
        member = (path, info.header_offset, info.compress_size, info.compress_type, info.CRC)
        if re.search("lmdb|__MACOSX", info.filename):
            continue
        if match := BRIDGE_MEMBER.fullmatch(info.filename):
            found[match[1]][match[2]] = member
        elif os.path.basename(info.filename) == "config.json":
            configs[info.filename] = member
    for name, files in found.items():
        config = os.path.normpath(f"{name}/../../../config.json")
        if config in configs:
            files["config.json"] = configs[config]
    return dict(found)


def read_bytes(place):
    """Content of a file, or of a zip's member (path, offset, size, method, checksum). Reject a damaged one.
    With zipfile, every process would read the zip's directory, which takes minutes and gigabytes."""
    if isinstance(place, str):
        with open(place, "rb") as f:
            return f.read()
    path, offset, size, method, checksum = place
    with open(path, "rb") as f:
        f.seek(offset + 26)
        f.seek(sum(struct.unpack("<2H", f.read(4))), os.SEEK_CUR)        # lengths of name and extra field
        data = f.read(size)
    try:
        data = data if method == zipfile.ZIP_STORED else zlib.decompress(data, -15)
    except zlib.error:
        data = b""
    if zlib.crc32(data) != checksum:
        raise Reject("damaged in the zip", f"the member at byte {offset}, compression method {method}")
    return data


def bridge_episode(name, files, args):
    """Job: one trajectory -> episode. T images, T-1 actions, T states."""
    files = files or tree_files(os.path.join(args.input, name))
    for file in ("obs_dict.pkl", "policy_out.pkl"):
        if file not in files:
            raise Reject("missing file", file)
    steps = read_pickle(files["policy_out.pkl"], "policy_out.pkl")       # dicts, or the actions themselves
    if isinstance(steps, (list, tuple)):
        steps = [step.get("actions", ()) if isinstance(step, dict) else step for step in steps]
    actions = as_table(steps, "odd policy_out.pkl")                                          # (T-1, 7)
    observed = read_pickle(files["obs_dict.pkl"], "obs_dict.pkl")
    state = as_table(observed.get("full_state", observed.get("state")), "no full_state")     # (T, 7)
    frames = {camera: bridge_frames(camera, files) for camera in args.cameras}    # {camera: T file names}
    counts = {camera: len(names) for camera, names in frames.items()}
    if set(counts.values()) != {len(actions) + 1}:
        raise Reject("frame count", f"{counts} images, {len(actions)} actions: expected one action less")
    dates = re.findall(r"(\d{4}-\d\d-\d\d)_\d\d-\d\d-\d\d", f"{args.input}/{name}")
    try:                                             # without a date: the scripted part, from 2022 and later
        late = bool(dates) and datetime.date.fromisoformat(dates[-1]) < BRIDGE_CAMERA_LATE_UNTIL
    except ValueError:
        raise Reject("bad date", dates[-1]) from None
    if late:
        # Until that day the picture taken at step t+1 shows the world of step t: drop the first picture and
        # the last action. ASSUMPTION: joint states were not late, state[t] goes with picture t+1 (the
        # authors' converter shifts the state, too, and loses files with one state less than images).
        frames = {camera: names[1:] for camera, names in frames.items()}
        actions, state = actions[:-1], state[:len(actions)]
    T = len(actions) + 1
    if len(state) != T:
        raise Reject("state count", f"{len(state)} rows of full_state, {T} images")
    images = {camera: read_images((read_bytes(files[name]) for name in names), args)
              for camera, names in frames.items()}
    return {"images": images, "instructions": bridge_annotations(files), "fps": BRIDGE_HZ, "actions": actions,
            "proprio": state}


def bridge_frames(camera, files):
    """Names of a camera's images im_0.jpg, im_1.jpg, ..., in numeric order. Reject when one is missing.

    "front" is images0, over the shoulder; images2 is a folder; any other word (wrist, D435) is looked up in
    config.json, whose camera_topics are in the order of the folders.
    """
    folder = "images0" if camera == VIDEO_CAMERA else camera
    if not re.fullmatch(r"images\d+", folder):
        topics = []                                  # the list is somewhere in a nested file
        json.loads(read_bytes(files["config.json"]) if "config.json" in files else "{}",
                   object_hook=lambda group: topics.extend(group.get("camera_topics") or ()) or group)
        index = next((i for i, topic in enumerate(topics) if camera.lower() in str(topic).lower()), None)
        if index is None:
            raise Reject("no such camera", f"{camera}: config.json has {topics or 'no camera_topics'}"[:200])
        folder = f"images{index}"
    numbered = {int(match[1]): file for file in files
                if (match := re.fullmatch(rf"{folder}/im_(\d+)\.jpe?g", file))}
    if not numbered:
        raise Reject("no such camera", f"{camera}: no images in {folder}")
    gap = next((t for t in range(len(numbered)) if t not in numbered), None)
    if gap is not None:
        raise Reject("missing frames", f"{folder}/im_{gap}.jpg of {max(numbered) + 1}")
    return [numbered[t] for t in range(len(numbered))]


def bridge_annotations(files):
    """lang.txt -> its different annotations in their order, [""] without any.

    The files come from many annotators: UTF-8 or Mac Roman, blank lines, a line of confidence values, the
    same sentence twice, or nothing at all.
    """
    data = read_bytes(files["lang.txt"]) if "lang.txt" in files else b""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("mac_roman")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and "confidence" not in line.lower())) or [""]


class NumpyUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy's arrays and numbers. A pickle is a program that can call whatever it
    names. numpy's own constructors are replaced, too: ndarray(..., buffer=...) could write anywhere."""

    def find_class(self, module, name):
        admitted = {}
        if re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module):
            admitted = {"ndarray": "numpy.ndarray", "dtype": np.dtype, "_reconstruct": lambda *_: np.empty(0),
                        "scalar": lambda dtype, data: np.frombuffer(data, dtype)[0],
                        "_frombuffer": lambda data, dtype, shape, order:
                            np.frombuffer(data, dtype).reshape(shape, order=order)}
        elif module in ("_codecs", "collections"):                       # bytes of old protocols
            admitted = {"encode": lambda text, _: text.encode("latin1"), "OrderedDict": dict}
        if name not in admitted:
            raise Reject("unsafe pickle", f"it names {module}.{name}; nothing in it was run")
        return admitted[name]


def read_pickle(place, name):
    """Pickle -> its content. Reject when it is damaged or names anything but numpy's arrays."""
    data = read_bytes(place)
    try:
        return NumpyUnpickler(io.BytesIO(data)).load()
    except Reject:
        raise
    except Exception as error:
        raise Reject("damaged pickle", f"{name}: {one_line(error)}") from None


def as_table(value, reason):
    """-> (rows, 7) float64. Reject anything else with this reason."""
    try:
        table = np.array(value, float)
    except (ValueError, TypeError, OverflowError):
        table = np.empty(0)
    if table.ndim != 2 or table.shape[1] != 7:
        raise Reject(reason, "expected a row of 7 numbers for each step")
    return table


# ---- source: LIBERO ----------------------------------------------------------------------------------------

LIBERO_HZ = 20
LIBERO_CAMERAS = {"agentview": ("agentview_rgb", "agentview_image"),
                  "wrist": ("eye_in_hand_rgb", "robot0_eye_in_hand_image")}     # (raw, processed) names


def libero_episodes(args):
    """Demonstrations of LIBERO's <task>_demo.hdf5, of any suite, in the three states in which they circulate:

    raw        obs/*_rgb, upside down, read AFTER the action of the same row (LIBERO's create_dataset.py)
    replayed   the same names, read before it (openvla's "no-noops"); told from raw by comparing
               obs/joint_states with states, never by the file's name
    processed  obs/*_image, upright, read before it (Adapt3R's, and LAWM's, process_libero_data.py)
    With --render the simulator draws the images from the states, and files without images will do.
    """
    if not set(args.cameras) <= LIBERO_CAMERAS.keys():
        raise InputError(f"--cameras {','.join(args.cameras)}: expected some of {', '.join(LIBERO_CAMERAS)}")
    if args.render:
        import_libero(args.libero_assets)            # so that a missing simulator is an error at once
    root, name = os.path.split(args.input) if os.path.isfile(args.input) else (args.input, None)
    names = [name] if name else find_files(root, ".hdf5", ".h5")
    if not names:
        raise InputError(f"no .hdf5 in {args.input}: expected <task>_demo.hdf5, or folders of them")
    for name in names:
        path = os.path.join(root, name)
        try:
            with h5py.File(path, "r") as f:
                keys = sorted((key for key in f.get("data", ()) if key.startswith("demo")), key=natural)
                bare = not any(f"data/{key}/obs/{image}" in f for key in keys
                               for image in LIBERO_CAMERAS["agentview"])
        except Exception as error:
            yield name, functools.partial(Reject, "damaged file", f"{one_line(error)}: fetch it again")
            continue
        if not keys:
            yield name, functools.partial(Reject, "not LIBERO's layout", "no /data/demo_*")
        elif bare and not args.render:
            raise InputError(f"{path} holds states but no images: --render draws them with the simulator, or "
                             "fetch the files with images")
        for key in keys:
            yield f"{name}/{key}", functools.partial(libero_demo, path, key, args)


def libero_instructions(attrs, path):
    """-> [the instruction in the file, that of the BDDL; the one in its name], or one if they agree."""
    info = json.loads(attrs.get("problem_info", "{}"))
    text = info.get("language_instruction") or ""
    text = " ".join(text) if isinstance(text, list) else text
    name = re.sub(r"(_demo)?\.(hdf5|h5)$", "", os.path.basename(path))
    name = re.sub(r"^.*SCENE\d+_", "", name).replace("_", " ")
    return list(dict.fromkeys(t for t in (" ".join(text.strip(' "\n').split()), name) if t))


def libero_demo(path, key, args):
    """Job: one demonstration -> episode. T rows give T images and T-1 actions: one action lacks its image.

    Reject a demonstration that fails, where the file records success or --render measures it.
    """
    with h5py.File(path, "r") as f:
        demo, instructions = f["data"][key], libero_instructions(f["data"].attrs, path)
        actions, success = demo["actions"][:], demo["success"][:] if "success" in demo else True
        if args.render:
            images, proprio, success = draw_states(f, demo, path, args)
            after = False
        else:
            images, proprio, after = stored_observations(f, demo, args)
    if not np.any(success) and not args.keep_failures:
        raise Reject("no success", "the goal is not reached (--keep-failures keeps it)")
    lengths = {len(actions), len(proprio), *map(len, images.values())}
    if len(lengths) > 1 or actions.ndim != 2 or actions.shape[1] != 7:
        raise Reject("odd lengths", f"actions {actions.shape}, {len(proprio)} states, "
                                    f"{[len(frames) for frames in images.values()]} images")
    still = np.linalg.norm(actions[:, :6], axis=1) < 1e-4                # as openvla's filter
    still &= np.append(True, actions[1:, 6] == actions[:-1, 6])
    # If obs[t] was read after actions[t], actions[t+1] was commanded from it, and actions[0] lacks its image.
    # If it was read before, actions[t] was commanded from it, and the last action lacks the image after it.
    actions, still = (actions[1:], still[1:]) if after else (actions[:-1], still[:-1])
    if args.drop_noops:
        if still.all():
            raise Reject("nothing but no-ops", f"{len(still)} of them")
        kept = np.append(~still, True)                                   # the last image stays
        actions, proprio = actions[~still], proprio[kept]
        images = {camera: itertools.compress(frames, kept) for camera, frames in images.items()}
    jpegs = {camera: to_jpegs((frame[..., ::-1] for frame in frames), args)
             for camera, frames in images.items()}
    return {"images": jpegs, "instructions": instructions, "fps": LIBERO_HZ, "actions": actions,
            "proprio": proprio}


def stored_observations(f, demo, args):
    """-> {camera: T upright (H, W, 3) RGB}, proprio (T, 8), whether they were read after the row's action."""
    obs, names = demo.get("obs", {}), {}
    for camera in args.cameras:
        names[camera] = next((name for name in LIBERO_CAMERAS[camera] if name in obs), None)
        if names[camera] is None:
            raise Reject("no such camera", f"{camera} (--render draws it from the states): obs has "
                                           f"{', '.join(obs) or 'nothing'}"[:200])
    raw = all(name.endswith("_rgb") for name in names.values())
    upside_down = raw and f["data"].attrs.get("macros_image_convention", "opengl") != "opencv"
    images = {camera: obs[name][:] for camera, name in names.items()}
    for camera, frames in images.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise Reject("odd images", f"{camera}: {frames.dtype} {frames.shape}, expected uint8 T, H, W, 3")
        images[camera] = frames[:, ::-1 if upside_down else 1]
    if raw:
        proprio = np.hstack([obs["ee_pos"], obs["ee_ori"], obs["gripper_states"]])
    else:
        quaternion = Rotation.from_matrix(obs["hand_mat"][:, :3, :3]).as_quat()          # x y z w
        quaternion *= np.where(quaternion[:, :1] < 0, -1, 1)     # the half in which the hand points down
        proprio = np.hstack([obs["robot0_eef_pos"], axis_angle(quaternion), obs["robot0_gripper_qpos"]])
    return images, proprio, raw and observed_after(demo)


def observed_after(demo):
    """Whether obs[t] was read after actions[t]. states[t] was always read before, and its numbers 1 to 7 are
    the arm's joints: obs/joint_states[t] equals either those of states[t+1] or those of states[t]."""
    if "states" not in demo or demo["states"].ndim != 2 or "joint_states" not in demo["obs"]:
        return True                                  # a raw file without its states
    joints, states = demo["obs/joint_states"][:], demo["states"][:, 1:8]
    after, before = np.abs(joints[:-1] - states[1:]).mean(), np.abs(joints - states).mean()
    if not np.isfinite(after + before):
        raise Reject("states not finite", "whether an image precedes its action cannot be measured")
    return bool(after <= before)


def axis_angle(quaternion):
    """Unit quaternions (T, 4), x y z w -> rotation vectors (T, 3) with angles 0 to 2 pi, as in robosuite:
    continuous at pi, the angle of a hand that points down."""
    w = np.clip(quaternion[:, 3:], -1, 1)
    sine = np.sqrt(1 - w ** 2)
    return quaternion[:, :3] * np.where(sine > 1e-8, 2 * np.arccos(w) / np.maximum(sine, 1e-8), 0)


# ---- LIBERO's simulator, for --render and for evaluate.py --------------------------------------------------

def import_libero(assets=None):
    """-> the module libero.libero, with its assets from --libero-assets, else $LIBERO_ASSETS, else the
    package, else libero's own download. InputError when there are none, or when a version does not fit.

    A plain import asks a question on stdin, writes into the home folder, and opens /tmp/robosuite.log, which
    may belong to another user. Settings in a temporary folder prevent that.
    """
    if os.environ.get("MUJOCO_GL") == "disable":
        raise InputError("no OpenGL to render images with: apt-get install libegl1 libgl1 libosmesa6")
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise InputError("the simulator is not installed: pip install -r requirements.txt")
    mujoco, robosuite = map(metadata.version, ("mujoco", "robosuite"))
    if tuple(map(int, mujoco.split(".")[:3])) >= (3, 3, 3):
        raise InputError(f"mujoco {mujoco} is installed: from 3.3.3 on LIBERO's floors are darker, from "
                         "3.4.0 libero_spatial task 5 falls from 98 % to 12 %, 4.0 does not load the robots: "
                         'pip install "mujoco<3.3.3"')
    if not robosuite.startswith("1.4."):
        raise InputError(f"robosuite {robosuite} is installed, with other robots and controllers than "
                         "LIBERO's: pip install robosuite==1.4.0")
    package, given = spec.submodule_search_locations[0], assets or os.environ.get("LIBERO_ASSETS")
    if not os.path.exists(os.path.join(os.environ.get("LIBERO_CONFIG_PATH", ""), "config.yaml")):
        root, folder = os.path.join(package, "libero"), tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["LIBERO_CONFIG_PATH"] = folder
        if not os.access(package, os.W_OK):          # numba would cache in the home folder, or fail
            os.environ.setdefault("NUMBA_CACHE_DIR", folder)
        with open(os.path.join(folder, "config.yaml"), "w") as f:        # JSON is YAML
            json.dump({"benchmark_root": root, "bddl_files": f"{root}/bddl_files", "datasets": folder,
                       "init_states": f"{root}/init_files", "assets": given or f"{root}/assets"}, f)
    macros = types.ModuleType("robosuite.macros_private")                # robosuite's own place for settings
    macros.CONSOLE_LOGGING_LEVEL, macros.FILE_LOGGING_LEVEL = "ERROR", None
    macros.MUJOCO_GPU_RENDERING = False              # otherwise it overrides MUJOCO_GL
    sys.modules.setdefault(macros.__name__, macros)
    from libero import libero
    if given:
        libero._assets_path_cache = os.path.abspath(given)
    found = given or libero.get_assets_path()
    if not os.path.isdir(os.path.join(found, "scenes")):
        raise InputError(f"LIBERO's assets are not in {found} (no folder scenes): name the folder with "
                         "--libero-assets or LIBERO_ASSETS")
    return libero


_simulator = {}           # {path of a .bddl: its simulator}, one at most: building one takes seconds


def close_simulator():
    """Free the simulator's OpenGL context before Python exits: the garbage collector would do it too late,
    after OpenGL has shut down."""
    while _simulator:
        _simulator.popitem()[1].close()
    gc.collect()


def libero_simulator(bddl, assets, seed=0):
    """The simulator of one task; the last one is kept."""
    if bddl not in _simulator:
        close_simulator()
        import_libero(assets)
        # robosuite would take it for the number of an EGL device, which MUJOCO_EGL_DEVICE_ID gives.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        from libero.libero.envs import OffScreenRenderEnv
        env = OffScreenRenderEnv(bddl_file_name=bddl, use_camera_obs=False)    # libero_observation draws
        reset_simulator(env, seed)
        atexit.unregister(close_simulator)           # by now OpenGL has registered its exit handler; of
        atexit.register(close_simulator)             # several, the one registered last runs first
        _simulator[bddl] = env
    return _simulator[bddl]


def reset_simulator(env, seed):
    """A fresh scene that depends on the seed alone, not on what was simulated before.

    UPSTREAM: the furniture is placed at random and is not part of a stored initial state. Every reset adds
    its samplers once more, so that the scene depends on the number of resets before it.
    """
    np.random.seed(seed)
    env.env.object_property_initializers.clear()
    env.env.visualization_sites_list.clear()
    env.env.reset()                                  # env.reset() swallows every error and retries for ever


def show_state(env, state):
    """Set the simulator to a flattened state and update what depends on it, such as the glow of a stove, as
    LIBERO's regenerate_obs_from_state does."""
    env.set_state(state)
    env.sim.forward()
    env.check_success()
    env._post_process()


def libero_observation(env, cameras, image_size):
    """The present observation -> {camera: (H, W, 3) uint8 RGB, upright}, proprio (8,): hand position (m), its
    rotation vector (rad), both fingers (m)."""
    seen = env.env._get_observations(force_update=True)
    proprio = np.hstack([seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"][None])[0],
                         seen["robot0_gripper_qpos"]])
    return {camera: libero_image(env, camera, image_size) for camera in cameras}, proprio


def libero_image(env, camera, image_size):
    """(H, W, 3) uint8 RGB, upright: OpenGL draws from below. Images smaller than LIBERO's own 128 pixels are
    drawn at that size and shrunk, as those in its files are."""
    name, drawn_size = LIBERO_CAMERAS[camera][1].removesuffix("_image"), max(image_size, 128)
    image = env.sim.render(width=drawn_size, height=drawn_size, camera_name=name)
    return shrink(image[::-1], image_size, "squash")


def place_scene(env, demo):
    """Put the furniture where it stood: a reset places it at random, and the state does not contain it. Raw
    files hold the whole model as XML, others only the poses, {body: [position, quaternion]} as JSON."""
    model, attrs = env.sim.model, demo.attrs
    if "fixture_poses" in attrs:
        poses = json.loads(attrs["fixture_poses"])
    else:
        bodies = ElementTree.fromstring(attrs.get("model_file", "<mujoco/>")).findall("worldbody/body")
        poses = {body.get("name"): [body.get("pos", "0 0 0").split(), body.get("quat", "1 0 0 0").split()]
                 for body in bodies}
    for name, (position, quaternion) in poses.items():
        if name in model.body_names:
            body = model.body_name2id(name)
            model.body_pos[body], model.body_quat[body] = np.float64(position), np.float64(quaternion)
    width = len(env.get_sim_state())
    if demo["states"].ndim != 2 or demo["states"].shape[1] != width:
        raise Reject("states of another scene", f"{demo['states'].shape}, the simulator has {width} numbers")


def draw_states(f, demo, path, args):
    """-> {camera: T upright (H, W, 3) RGB}, proprio (T, 8), both from before the row's action; whether one of
    the last 20 states reaches the goal."""
    name = re.sub(r"(_demo)?\.(hdf5|h5)$", ".bddl", os.path.basename(path))
    name = os.path.basename(f["data"].attrs.get("bddl_file_name", name))
    root = os.path.join(os.path.dirname(import_libero(args.libero_assets).__file__), "bddl_files")
    bddl = next(iter(glob.glob(os.path.join(glob.escape(root), "*", name))), None)     # names are unique
    if bddl is None:
        raise Reject("unknown task", f"libero has no {name}")
    env, rows, reached = libero_simulator(bddl, args.libero_assets), [], []
    place_scene(env, demo)
    for state in demo["states"][:].astype(np.float64):
        show_state(env, state)
        reached.append(bool(env.check_success()))
        rows.append(libero_observation(env, args.cameras, args.image_size))
    images, proprio = zip(*rows)
    return ({camera: [seen[camera] for seen in images] for camera in args.cameras}, np.array(proprio),
            any(reached[-20:]))


# ---- source: a LeRobotDataset v3 ---------------------------------------------------------------------------

FLIPS = {"none": np.s_[:], "vertical": np.s_[::-1], "horizontal": np.s_[:, ::-1], "both": np.s_[::-1, ::-1]}


def lerobot_episodes(args):
    """Episodes of a LeRobotDataset v3 folder: parquet tables, and videos that hold many episodes each.

    Row t holds the observation before action t: T rows give T images and T-1 actions.
    """
    info = lerobot_info(args.input)
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("LeRobot datasets need one more package: pip install pyarrow") from None
    keys = lerobot_cameras(info, args)
    columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"] + [
        f"videos/{key}/{what}" for key in keys.values() if info["features"][key]["dtype"] == "video"
        for what in ("chunk_index", "file_index", "from_timestamp")]
    folder = os.path.join(args.input, "meta", "episodes")
    try:
        table = pyarrow.parquet.read_table(folder, columns=columns).to_pylist()
    except (OSError, ValueError, KeyError) as error:                     # pyarrow's own are among these
        raise InputError(f"{folder} is not as expected ({one_line(error)}): fetch it again") from None
    rows = {row["episode_index"]: row for row in table}                  # a stale table may repeat some
    if len(rows) != info.get("total_episodes", len(rows)):
        print(f"meta/episodes has {len(rows)} episodes, info.json says {info['total_episodes']}")
    for index in sorted(rows):
        yield f"episode-{index:06d}", functools.partial(lerobot_episode, rows[index], keys, info, args)


def lerobot_info(folder):
    """-> meta/info.json. InputError when it is not of a LeRobotDataset v3."""
    path = os.path.join(folder, "meta", "info.json")
    info = read_json(path) if os.path.isfile(path) else {}
    if not (isinstance(info, dict) and str(info.get("codebase_version")).startswith("v3")
            and all(info.get(key) for key in ("fps", "features", "data_path")) and info["fps"] > 0
            and all({"dtype", "shape"} <= feature.keys() for feature in info["features"].values())):
        raise InputError(f"{folder} is not a LeRobotDataset v3: expected meta/info.json with fps, features, "
                         "data_path and codebase_version v3.x; convert an older one with LeRobot's own "
                         "convert_dataset_v21_to_v30.py")
    return info


def lerobot_cameras(info, args):
    """{our name: feature} of the chosen cameras, in order; by default all but depth cameras. InputError."""
    known = {key.removeprefix("observation.images.").removeprefix("observation."): key
             for key, feature in info["features"].items()
             if feature["dtype"] in ("video", "image") and 'is_depth_map": true' not in json.dumps(feature)}
    chosen = args.cameras or list(known)
    if not chosen or not set(chosen) <= set(known):
        raise InputError(f"--cameras {','.join(chosen)}: {args.input} has {', '.join(known) or 'no camera'}")
    return {camera: known[camera] for camera in chosen}


def lerobot_about(args):
    """Attributes of the dataset as a whole, from meta/info.json."""
    info = lerobot_info(args.input)

    def describe(feature):
        if feature is None:
            return None
        width, names = feature["shape"][0], feature.get("names") or []
        while isinstance(names, dict):                                   # {"motors": [...]}
            names = next(iter(names.values()))
        names = [str(name) for name in (names if len(names) == width else range(width))]
        return {"names": names, "units": ["as in the source"] * width, "frame": "as in the source",
                "gripper": "as in the source"}
    action = describe(info["features"].get("action"))
    if action:
        *changes, gripper = [args.action_kind == "delta"] * len(action["names"])
        action["delta"] = [*changes, False]
    return {"cameras": list(lerobot_cameras(info, args)), "flip": args.flip, "action": action,
            "proprio": describe(info["features"].get("observation.state"))}


def lerobot_episode(row, keys, info, args):
    """Job: one episode, from the rows of a table and the frames of one video per camera."""
    import pyarrow.parquet
    features, index, T, fps = info["features"], row["episode_index"], row["length"], info["fps"]
    stored = [key for key in keys.values() if features[key]["dtype"] == "image"]
    wanted = [key for key in ("action", "observation.state", "task_index") if key in features]
    place = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    path = os.path.join(args.input, place)
    if not os.path.exists(path):
        raise Reject("missing file", place)
    try:
        table = pyarrow.parquet.read_table(path, filters=[("episode_index", "=", index)],
                                           columns=["frame_index", *wanted, *stored]).sort_by("frame_index")
    except (OSError, ValueError) as error:
        raise Reject("damaged table", f"{place}: {one_line(error)}") from None
    if table["frame_index"].to_pylist() != list(range(T)):
        raise Reject("missing frames", f"{len(table)} rows in {place}, the episode has {T} frames")
    table = {key: table[key].to_pylist() for key in [*wanted, *stored]}
    changes = np.flatnonzero(np.diff(table.get("task_index", [0])))
    if len(changes):                                 # the format does not say which frames a text is about
        raise Reject("several tasks", f"task_index changes at frame {changes[0] + 1}: split it there")
    vectors = {ours: np.array(table[key], np.float32).reshape(T, -1)
               for ours, key in (("actions", "action"), ("proprio", "observation.state")) if key in table}
    if "actions" in vectors:
        vectors["actions"] = vectors["actions"][:-1]
    images, flip = {}, FLIPS[args.flip]
    tasks = [row["tasks"]] if isinstance(row["tasks"], str) else row["tasks"] or [""]
    for camera, key in keys.items():
        if key in stored:
            images[camera] = read_images((cell["bytes"] or b"" for cell in table[key]), args, flip)
            continue
        place = info["video_path"].format(video_key=key, chunk_index=row[f"videos/{key}/chunk_index"],
                                          file_index=row[f"videos/{key}/file_index"])
        start = row[f"videos/{key}/from_timestamp"]                      # s; frame k is at start + k / fps
        with open_video(os.path.join(args.input, place)) as container:
            frames = even_frames(container, fps, start - 0.4 / fps, start + (T - 0.5) / fps, max_gap=0)
            images[camera] = to_jpegs((frame[flip] for frame in to_bgr(frames)), args)
        if len(images[camera]) != T:
            raise Reject("truncated", f"{place}: {len(images[camera])} of {T} frames from {start:.3f} s on")
    return {"images": images, "instructions": tasks, "fps": fps, **vectors}


# ---- source: the Realman arm, what `robot.py record` wrote -------------------------------------------------

def realman_takes(args):
    """-> takes.json, the settings that all takes share. InputError."""
    path = os.path.join(args.input, "takes.json")
    takes = read_json(path) if os.path.isfile(path) else {}
    if takes.get("format") != TAKE_FORMAT:
        raise InputError(f"{path} has format {takes.get('format')}, expected {TAKE_FORMAT}: give a folder "
                         "that `robot.py record` wrote")
    return takes


def realman_episodes(args):
    """Takes <task>-<start>.h5 of a folder: T full-size JPEGs per camera, T-1 executed actions, T states."""
    cameras = realman_takes(args)["cameras"]
    for name in find_files(args.input, ".h5"):
        path = os.path.join(args.input, name)
        yield name.removesuffix(".h5"), functools.partial(realman_take, path, cameras, args)


def realman_take(path, cameras, args):
    """Job: one take -> episode."""
    with h5py.File(path, "r") as f:
        images = {camera: read_images((jpeg.tobytes() for jpeg in f[f"images/{camera}"]), args)
                  for camera in cameras}
        return {"images": images, "instructions": [f.attrs["instruction"]], "fps": f.attrs["fps"],
                "actions": f["actions"][:], "proprio": f["proprio"][:]}


# ---- source: the table-top twin ----------------------------------------------------------------------------

TRIES = 5                 # starts that one demonstration may take: the expert fails now and then
SMOKE = {"tasks": ["stack_cups"], "demos_per_task": 20, "hand_videos_per_task": 12, "workers": 1}
HAND_SEED0 = 500_000      # the robot's starts are seeds below it, the hand's from it to robot.EVAL_SEED0
HAND_SIZE = (120, 212)    # (H, W) of the hand videos: Something-Something's shape at half its size
HAND_FPS = 10             # Something-Something has 12; 10 divides the 20 Hz of control: motion stays even


@functools.lru_cache(maxsize=None)
def twin(embodiment, image_size, cameras, spread):
    """One environment per process, because building it takes longer than an episode."""
    return TwinEnv(embodiment=embodiment, image_size=image_size, cameras=cameras, spread=spread)


def perform(env, task, seeds):
    """The expert's first success among the starts -> T observations, T-1 actions. Reject without one."""
    for seed in seeds:
        success, observations, actions = expert_episode(env, task, seed)
        if success:
            return observations, actions
    raise Reject("no success", f"{task}, starts {seeds[0]} to {seeds[-1]}")


def film_robot(task, seeds, args):
    """Job: one demonstration by the robot."""
    env = twin("robot", args.image_size, ("front", "side"), args.spread)
    observations, actions = perform(env, task, seeds)
    images = {camera: to_jpegs((o["images"][camera][..., ::-1] for o in observations), args)
              for camera in env.cameras}
    return {"images": images, "instructions": [env.instruction], "fps": CONTROL_HZ, "actions": actions,
            "proprio": [o["proprio"] for o in observations]}


def film_hand(path, task, seeds, args):
    """Job: one performance by the hand, written as a .webm of VP9. Its bytes differ from run to run, because
    the container holds a random number; its decoded frames do not."""
    observations, _ = perform(twin("hand", HAND_SIZE, (VIDEO_CAMERA,), args.spread), task, seeds)
    (height, width), file = HAND_SIZE, io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", HAND_FPS, width=width, height=height, pix_fmt="yuv420p",
                                      bit_rate=15 * width * height, gop_size=12, qmin=3)
        for o in observations[::CONTROL_HZ // HAND_FPS]:
            bgr = np.ascontiguousarray(o["images"][VIDEO_CAMERA][..., ::-1])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bgr, format="bgr24")))
        container.mux(stream.encode())
    write_atomically(path, file.getbuffer())


def twin_starts(args, count, first, end):
    """`count` episodes per task, tasks taking turns: [(number, task, TRIES seeds)]. InputError."""
    for task in args.tasks:
        if task not in TASKS:
            raise InputError(f"--tasks: there is no task {task!r}, but {', '.join(TASKS)}")
    top = first + args.seed + TRIES * count
    if top > end:
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
    starts = twin_starts(args, args.hand_videos_per_task, HAND_SEED0, EVAL_SEED0)
    arguments = {key: vars(args)[key] for key in ("tasks", "spread", "seed", "hand_videos_per_task")}
    if claim_output(folder, {"source": "sim", **arguments}, "labels/train.json", args):
        return 0.0
    for name in (SSV2_CLIPS, "labels"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    films = [(os.path.join(folder, SSV2_CLIPS, f"{i}.webm"), task, seeds)
             for i, (_, task, seeds) in enumerate(starts, 1)]
    jobs = [functools.partial(film_hand, *film, args) for film in films if not os.path.exists(film[0])]
    results = list(tqdm(run_jobs(jobs, args.workers), folder, len(films), initial=len(films) - len(jobs),
                        unit="video"))
    labels = [{"id": str(i), "label": (text := TASKS[task].instruction), "template": text, "placeholders": []}
              for i, (path, task, _) in enumerate(films, 1) if os.path.exists(path)]
    write_json(os.path.join(folder, "labels", "train.json"), labels)
    return report(folder, f"{len(labels)} videos", len(films),
                  [result.args[0] for result in results if isinstance(result, Reject)])


def film_twin(args):
    """sim: demonstrations into OUT/robot, hand videos into OUT/hand_videos and, read back, into OUT/hand."""
    places = {name: os.path.join(args.out, name) for name in ("robot", "hand_videos", "hand")}
    for place in places.values():
        check_output(place, args)             # before an hour of filming
    rejected, robot_args = 0.0, argparse.Namespace(**{**vars(args), "out": places["robot"]})
    del robot_args.hand_videos_per_task       # does not change the demonstrations: --resume may change it
    if args.demos_per_task:
        rejected = convert(robot_args)
    if args.hand_videos_per_task:
        ssv2 = build_parser().parse_args(["ssv2", "--input", places["hand_videos"], "--out", places["hand"]])
        for key in ("image_size", "workers", "resume", "overwrite"):
            setattr(ssv2, key, getattr(args, key))
        rejected = max(rejected, film_hand_videos(args, places["hand_videos"]), convert(ssv2))
    return rejected


# ---- the sources -------------------------------------------------------------------------------------------

# episodes  generator of (name, job) for every item, from the parsed arguments; --fraction then selects some.
#           job() reads one episode, in any process, and returns {"images": {camera: T JPEGs}, "instructions":
#           [str], "fps": float} and, where there are any, "actions": (T-1, A) and "proprio": (T, P), or
#           raises Reject
# about     attributes of the dataset, or a function that makes them from the parsed arguments: "cameras",
#           "action" and "proprio" as vector() makes them, or None
# flags     of this source alone: {"--name": arguments of argparse's add_argument}
# shard     items per shard at 128 pixels: some 60 MB of JPEG, the work that a killed run loses
Source = collections.namedtuple("Source", "episodes about help flags shard", defaults=({}, 32))


def vector(names, units, frame, gripper, delta=None):
    """Attribute "action" or "proprio". delta: which numbers are changes per step (actions only)."""
    about = {"names": names.split(), "units": units.split(), "frame": frame, "gripper": gripper}
    return {**about, "delta": delta} if delta else about


def part(text):
    """"K/N" -> K, N."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, for example 3/16, got {text!r}")
    return int(k), int(n)


def words(text):
    """Comma-separated words -> list, each one once."""
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise argparse.ArgumentTypeError("expected words, separated by commas")
    return found


CHANGES = [True] * 6 + [False]           # the canonical action: six changes per step, the gripper's target
VIDEO = {"cameras": [VIDEO_CAMERA], "action": None, "proprio": None}
TWIN = {"cameras": ["front", "side"], "action": ACTION, "proprio": PROPRIO}
BRIDGE = {"action": vector("x y z roll pitch yaw gripper", "m m m rad rad rad 1",
                           "the tool's, in the base: change per step, not clipped (the robot clipped at "
                           "0.05 m, 0.25 rad); Euler angles, at this size a rotation vector to 1e-3 rad",
                           "1 = open .. 0 = closed", CHANGES),
          "proprio": vector("x y z roll pitch yaw gripper", "m m m rad rad rad 1", "robot base",
                            "1 = open .. 0 = closed")}
LIBERO = {"flip": "upright (the raw files' images are upside down)",
          "action": vector("x y z rx ry rz gripper", "0.05m 0.05m 0.05m 0.5rad 0.5rad 0.5rad 1",
                           "robot base, change per step, -1 to 1 (OSC_POSE controller)",
                           "+1 = close, -1 = open", CHANGES),
          "proprio": vector("x y z rx ry rz finger1 finger2", "m m m rad rad rad m m",
                            "world; rotation vector of the hand, angle 0 to 2 pi",
                            "finger joints: 0.04 and -0.04 = open")}
SOURCES = {
    "sim": Source(sim_episodes, TWIN, "film the twin", {
        "--demos-per-task": dict(type=int, default=60, help="successful demonstrations; 0 = none"),
        "--hand-videos-per-task": dict(type=int, default=80, help="videos of the hand; 0 = none"),
        # Two of the paper's five tasks move two things; they work, but need more demonstrations.
        "--tasks": dict(type=words, default="cup_in_bowl,pineapple_between_cups,stack_cups",
                        help="comma-separated; all five: also cups_on_plate,pineapple_and_roll"),
        "--spread": dict(type=float, default=0.5, help="start regions: 1 = full size, 0 = points"),
        "--seed": dict(type=int, default=0, help="number of the first start"),
        "--smoke": dict(action="store_true", help=f"tiny preset {SMOKE}; other flags still win")}, shard=8),
    "ssv2": Source(ssv2_episodes, VIDEO, "Something-Something v2", shard=128),
    "bridge": Source(bridge_episodes, lambda args: {**BRIDGE, "cameras": args.cameras}, "BridgeData V2", {
        "--cameras": dict(type=words, default="front", help="comma-separated, the main one first: front "
                          "(images0), images1, ..., or names in config.json: wrist, blue, ...")}, shard=128),
    "libero": Source(libero_episodes, lambda args: {**LIBERO, "cameras": args.cameras}, "LIBERO's HDF5", {
        "--cameras": dict(type=words, default="agentview,wrist", help="comma-separated"),
        "--render": dict(action="store_true", help="let the simulator draw the images from the states"),
        "--drop-noops": dict(action="store_true", help="leave out steps without a command, as openvla does; "
                             "the paper and the release keep them"),
        "--keep-failures": dict(action="store_true", help="keep demonstrations known to fail"),
        "--libero-assets": dict(metavar="FOLDER", help="meshes and textures for --render, instead of "
                                "$LIBERO_ASSETS or the package's own")}),
    "lerobot": Source(lerobot_episodes, lerobot_about, "a LeRobotDataset v3", {
        "--cameras": dict(type=words, help="comma-separated, the main one first; all if not given"),
        "--action-kind": dict(choices=("delta", "absolute"), default="delta", help="delta: all but the last "
                              "number are changes per step (LIBERO, Bridge); absolute: targets"),
        "--flip": dict(choices=FLIPS, default="none", help="turn stored images upright; horizontal for "
                       "LIBERO data in openvla's form, which is mirrored")}),
    "realman": Source(realman_episodes, lambda args: {key: realman_takes(args)[key] for key in (
        "cameras", "action", "proprio")}, "takes of robot.py record"),
    "videos": Source(videos_episodes, VIDEO, "a folder of videos", {
        "--captions": dict(type=os.path.abspath, help="CSV with the first line file,instruction or, to cut "
                           "clips out of long files, file,instruction,start,end (seconds); a file is named "
                           "as below --input, with its ending; videos that it does not name are left out"),
        "--instruction": dict(default="", help="one for all videos, without --captions")}, shard=128),
}


# ---- the convert loop, one for all sources -----------------------------------------------------------------

OUT_OF_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
AGAIN = "delete it, then --resume makes it again"
FREE = ("out", "workers", "resume", "overwrite", "check", "part", "libero_assets")     # --resume may change


def one_line(error):
    """-> type and message of an exception, at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def run_job(job):
    """-> the episode that a job returns, or a Reject.

    Any exception of a job becomes a Reject, here and nowhere else: one odd file among 200,000 must not end
    the run. A wrong command (InputError) and a machine without space or memory do end it.
    """
    try:
        return job()
    except Reject as reject:
        return reject
    except Exception as error:
        if isinstance(error, (InputError, MemoryError)) or getattr(error, "errno", None) in OUT_OF_RESOURCES:
            raise
        return Reject("damaged video" if isinstance(error, av.FFmpegError) else "unreadable", one_line(error))


def use_one_thread():
    """OpenCV and torch compute in one thread: parallelism comes from the processes."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def start_worker():
    """Set up a worker process: the parent handles Ctrl-C, and the worker exits when its parent is killed."""
    use_one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_jobs(jobs, workers, run=run_job, in_order=True):
    """Yield run(job) of each job, from `workers` processes; 1: from this process. InputError when a process
    is killed. Only a few jobs run ahead, which bounds the memory."""
    if min(workers, len(jobs)) <= 1:
        use_one_thread()
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")       # a fork would share OpenGL and the threads of torch
    pool, jobs, ahead = ProcessPoolExecutor(workers, context, start_worker), iter(jobs), []
    try:
        while True:
            ahead += [pool.submit(run, job) for job in itertools.islice(jobs, 3 * workers - len(ahead))]
            if not ahead:
                return
            done = ahead[0] if in_order else next(as_completed(ahead))
            ahead.remove(done)
            yield done.result()
    except BrokenProcessPool:
        if not in_order:                                 # hand over what other processes have finished
            yield from (job.result() for job in ahead if job.done() and not job.exception())
        raise InputError("a worker process was killed: if memory ran out, use fewer --workers. Finished "
                         "work is kept; continue with --resume") from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()                          # shutdown alone would wait for the running jobs
        pool.shutdown(cancel_futures=True)


def convert(args):
    """Convert one source to one dataset, or --check it. -> share of rejected items. InputError, OSError."""
    source = SOURCES[args.source]
    items = [(name.encode("utf-8", "backslashreplace").decode(), job) for name, job in source.episodes(args)]
    if "fraction" in args:
        items = [(name, job) for name, job in items if drawn(name, args)]
    if not items:
        raise InputError(f"{args.source}: nothing to convert with these arguments (is --fraction too small?)")
    about = source.about(args) if callable(source.about) else source.about
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    stated = {key: settings[key] for key in ("source", "image_size", "resize")}
    about = {"format_version": FORMAT_VERSION, **stated, "flip": "none", **about,
             "extra": {key: settings[key] for key in settings if key not in {*stated, "input", "captions"}},
             "alignment": "actions[t] was commanded while looking at images[t] and leads to images[t+1]"}
    names = hashlib.sha256("\n".join(name for name, _ in items).encode()).hexdigest()
    if settings.get("captions"):        # an edited CSV makes another dataset
        settings["captions"] += f" ({file_hash(settings['captions'])})"
    arguments = {**settings, "format_version": FORMAT_VERSION, "items": names}
    k, n = getattr(args, "part", (1, 1))
    if n > 1 and args.overwrite:
        raise InputError("--overwrite with --part would delete the shards of the other machines: delete "
                         f"{args.out} once, then use --resume")
    if not args.check and claim_output(args.out, arguments, "dataset.json", args):
        return 0.0

    size = max(1, min(source.shard, source.shard * 128 ** 2 // args.image_size ** 2))    # items per shard
    shards = {os.path.join(args.out, f"{i // size:05d}.h5"): items[i:i + size]
              for i in range(0, len(items), size)}
    mine = dict(list(shards.items())[k - 1::n])
    total = sum(map(len, mine.values()))
    todo = {path: part for path, part in mine.items() if args.check or not os.path.exists(path)}
    outcomes = read_items([item for part in todo.values() for item in part], about, args, total)
    if args.check:
        reasons = []
        for outcome in outcomes:
            if "reason" in outcome:
                tqdm.write("{name}: {reason} ({detail})".format_map(outcome))
                reasons.append(outcome["reason"])
        return report(args.input, f"{total - len(reasons)} good episodes", total, reasons)
    for path, part in todo.items():
        batch = list(itertools.islice(outcomes, len(part)))
        write_shard(path, about, [x for x in batch if "images" in x], [x for x in batch if "reason" in x])
        del batch                             # else memory would hold two shards
    missing = [path for path in shards if not os.path.exists(path)]
    reasons = []
    for path, part in (mine if missing else shards).items():                # they may have been copied here
        with open_shard(path, AGAIN) as f:
            rejects = [json.loads(text) for text in f["rejects"].asstr()[:]]
            names = [*f["name"].asstr()[:], *(reject["name"] for reject in rejects)]
            if sorted(names) != sorted(name for name, _ in part) or dict(f.attrs) != attributes(about):
                raise InputError(f"{path} was made from another source or with other settings: {AGAIN}")
            reasons += [reject["reason"] for reject in rejects]
    if missing:
        return report(args.out, f"part {k}/{n} is done, {len(missing)} of {len(shards)} shards are not here "
                      "yet. When all are here, the same command with --resume and without --part makes the "
                      "dataset", total, reasons)
    return finish(args.out, about, list(shards), len(items))


def read_items(items, about, args, total):
    """Run the jobs of [(name, job)]. Yield {"name", **episode} or {"name", "reason", "detail"}, in order."""
    results = run_jobs([job for _, job in items], args.workers)
    for name, _ in tqdm(items, args.out, total, initial=total - len(items), unit="episode"):
        result = check_episode(next(results), about)
        if isinstance(result, Reject):
            reason, detail = (*result.args, "")[:2]
            result = {"reason": reason, "detail": detail}
        yield {"name": name, **result}


def check_episode(episode, about):
    """-> the episode with float32 arrays, or a Reject. An assertion fails when a job breaks its contract."""
    if isinstance(episode, Reject):
        return episode
    lengths = {camera: len(jpegs) for camera, jpegs in episode["images"].items()}
    T, least = max(lengths.values()), about["extra"].get("min_frames", 2)
    assert lengths == dict.fromkeys(about["cameras"], T), f"{lengths} frames, but cameras {about['cameras']}"
    if T < least:
        return Reject("too short", f"{T} frames, --min-frames {least}")
    for key, attribute, rows in (("actions", "action", T - 1), ("proprio", "proprio", T)):
        assert (key in episode) == bool(about[attribute]), f"{key}, but {attribute}: {about[attribute]}"
        if key in episode:
            episode[key] = np.asarray(episode[key], np.float32)
            assert len(episode[key]) == rows, f"{len(episode[key])} {key} for {T} frames, expected {rows}"
            width = len(about[attribute]["names"])
            if episode[key].shape[1:] != (width,):
                return Reject(f"odd {key}", f"shape {episode[key].shape}, expected {width} numbers per step")
            if not np.isfinite(episode[key]).all():
                return Reject(f"{key} not finite")
    return episode


def attributes(about):
    """-> the attributes of a dataset as those of an HDF5 file: strings and whole numbers."""
    return {key: value if isinstance(value, (str, int)) else json.dumps(value, sort_keys=True)
            for key, value in about.items()}


def write_shard(path, about, episodes, rejects):
    """Write one shard. It is assembled in memory and written at once: a full disk is then a plain OSError."""
    buffer = io.BytesIO()
    lengths = [len(episode["images"][about["cameras"][0]]) for episode in episodes]
    with h5py.File(buffer, "w") as f:
        f.attrs.update(attributes(about))
        for camera in about["cameras"]:
            jpegs = [jpeg for episode in episodes for jpeg in episode["images"][camera]]
            f[f"images/{camera}/jpg"] = np.frombuffer(b"".join(jpegs), np.uint8)
            f[f"images/{camera}/offset"] = np.cumsum([0] + [len(jpeg) for jpeg in jpegs], dtype=np.int64)
        f["episode_start"] = np.cumsum([0] + lengths, dtype=np.int64)
        f["fps"] = np.array([episode["fps"] for episode in episodes], np.float32)
        for key, values in (("name", [episode["name"] for episode in episodes]),
                            ("instruction", [json.dumps(episode["instructions"]) for episode in episodes]),
                            ("rejects", [json.dumps(reject) for reject in rejects])):
            f.create_dataset(key, (len(values),), h5py.string_dtype(), data=values)
        if about["action"] and episodes:
            hold = 1 - np.array(about["action"]["delta"], np.float32)    # zero for changes, repeats targets
            f["actions"] = np.concatenate([np.vstack([e["actions"], hold * e["actions"][-1]])
                                           for e in episodes])
        if about["proprio"] and episodes:
            f["proprio"] = np.concatenate([episode["proprio"] for episode in episodes])
    write_atomically(path, buffer.getbuffer())


def finish(folder, about, paths, num_items):
    """Read the shards again, write rejects.jsonl and then dataset.json. -> share of rejects. InputError."""
    shards, rejects, fps, instructions = [], [], [], set()
    for path in paths:
        with open_shard(path, AGAIN) as f:
            rejects += [json.loads(text) for text in f["rejects"].asstr()[:]]
            instructions |= {json.loads(text)[0] for text in f["instruction"].asstr()[:]}
            fps += f["fps"][:].tolist()
            shards.append({"file": os.path.basename(path), "episodes": len(f["fps"]),
                           "frames": int(f["episode_start"][-1]), "sha256": file_hash(path)})
    write_atomically(os.path.join(folder, "rejects.jsonl"),
                     "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    if not fps:
        raise InputError(f"{folder}: none of the {num_items} items can be used, see rejects.jsonl there: "
                         "{name}: {reason} {detail}, ...".format_map(rejects[0]))
    counts = {"items": num_items, "rejected": len(rejects), "episodes": len(fps),
              "frames": sum(shard["frames"] for shard in shards), "instructions": len(instructions)}
    write_json(os.path.join(folder, "dataset.json"),
               {**about, "fps": float(np.median(fps)), "counts": counts, "shards": shards})
    what = ", ".join(f"{counts[key]} {key}" for key in ("episodes", "frames", "instructions"))
    return report(folder, what, num_items, [reject["reason"] for reject in rejects])


def report(folder, what, num_items, reasons):
    """Print what was written and count the rejects by reason. -> share of rejects."""
    print(f"{folder}: {what}; {len(reasons)} of {num_items} rejected")
    for reason, count in collections.Counter(reasons).most_common():
        print(f"{count:>10}  {reason}")
    return len(reasons) / max(1, num_items)                                 # a part may have no item


# ---- the dataset -------------------------------------------------------------------------------------------

def read_manifest(path):
    """dataset.json -> attributes, shards, fingerprint (a hash that pins every shard). InputError."""
    manifest = os.path.join(path, "dataset.json")
    if not os.path.isdir(path):
        raise InputError(f"{path} does not exist: `python prepare_data.py sim` makes data/robot, data/hand")
    if os.path.exists(os.path.join(path, "arguments.json")) and not os.path.exists(manifest):
        raise InputError(f"{path} is half made: finish it with the command that made it and --resume")
    if not os.path.exists(manifest):
        raise InputError(f"{path} is not a dataset (no dataset.json): convert it with prepare_data.py first")
    attrs = read_json(manifest)
    version = attrs.get("format_version") if isinstance(attrs, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, expected {FORMAT_VERSION}: make it again "
                         "with prepare_data.py")
    return attrs, attrs.pop("shards"), file_hash(manifest)


def open_shard(path, mend="copy or make the dataset again"):
    """-> open h5py.File. InputError when the file is missing or damaged."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): {mend}") from error


class EpisodeDataset(torch.utils.data.Dataset):
    """Windows of a prepared dataset: one for every frame t of an episode that also has a frame t+stride.

    path            folder made by prepare_data.py
    chunk           n, actions per window; steps beyond the end are padded, see the timeline above
    cameras         names, or a number k: the first k; None = all
    future          V: also return o_t .. o_t+n of the first V cameras, for the world model
    split           "all", "train" or "val", by episode, never by frame: of the episodes ordered by
                    instruction every tenth is val, so that each task gets its share
    demos_per_task  keep N episodes of the split for each instruction, chosen by `seed`; 2 are a part of 5
    stride          s, frames per step: o_t, o_t+s, ..., o_t+ns. An action of s steps is the sum of its
                    changes (rotation vectors add up to first order) and the last of the other numbers
    labels          which of "actions" and "proprio" to return, if stored

    Item: {"obs": {"images": {camera: (3, H, W) uint8}, "instruction": str, "proprio": (P,) f4 if stored},
           "frames": (n+1, 3V, H, W) uint8 if future, "actions": (n, A) f4 if stored, "is_pad": (n,) bool,
           "episode": int, "t": int, "instruction_id": int}. InputError for what the data cannot give.

    Memory holds all actions and proprio, and the positions of the frames in the files (8 bytes per frame and
    camera). A window's frames are one plain file read: no open handle, so any process may use the object.
    """

    def __init__(self, path, chunk, cameras=None, future=0, split="all", demos_per_task=None, stride=1,
                 labels=("actions", "proprio"), seed=0):
        self.path, self.chunk, self.future, self.stride = os.fspath(path), chunk, future, stride
        self.attrs, shards, self.fingerprint = read_manifest(self.path)
        self.fps, self.image_size = self.attrs["fps"], self.attrs["image_size"]
        self.about = {key: self.attrs[key.removesuffix("s")] for key in labels}      # of actions and proprio
        self.about = {key: about for key, about in self.about.items() if about}
        self.action_dim, self.proprio_dim = (
            len(self.about[key]["names"]) if key in self.about else None for key in ("actions", "proprio"))
        known = list(self.attrs["cameras"])
        self.cameras = known[:cameras] if cameras is None or isinstance(cameras, int) else list(cameras)
        if not set(self.cameras) <= set(known) or future > len(self.cameras):
            raise InputError(f"{path} has the cameras {', '.join(known)}; asked for: {cameras}")
        if stride < 1:
            raise InputError(f"a stride of {stride} frames: expected 1 or more")
        self._paths = [os.path.join(self.path, shard["file"]) for shard in shards]
        self._read_index()
        self.episodes = self._choose(split, demos_per_task, seed)    # indices into all episodes of the folder
        self.num_episodes = len(self.episodes)
        longest = (int(self.lengths[self.episodes].max()) - 1) // stride
        if not 1 <= chunk <= longest:
            raise InputError(f"a chunk of {chunk} actions does not fit: the longest episode of {path} "
                             f"({split}) has {longest} at stride {stride}; lower --chunk or --strides")
        self._ends = np.cumsum(np.maximum(self.lengths[self.episodes] - stride, 0))    # end of its windows

    def _read_index(self):
        """Note where the frames lie in the files, and the instruction of each episode; read all numbers."""
        rows, texts, self._where, tables = [], [], [], {key: [] for key in self.about}
        for k, path in enumerate(self._paths):
            with open_shard(path) as f:
                start = f["episode_start"][:].tolist()
                texts += [json.loads(text)[0] for text in f["instruction"].asstr()[:]]
                for key in tables.keys() & f.keys():             # absent where every item was rejected
                    tables[key].append(f[key][:])
                self._where.append({camera: f[f"images/{camera}/offset"][:] + (        # (N+1,) bytes
                    f[f"images/{camera}/jpg"].id.get_offset() or 0) for camera in self.cameras})
            rows += [(k, first, end - first) for first, end in zip(start, start[1:])]
        self._place, self.lengths = np.array(rows)[:, :2], np.array(rows)[:, 2]      # shard, first frame
        self._tables = {key: np.concatenate(parts) for key, parts in tables.items()}                 # (N, D)
        self._first_row = np.cumsum(self.lengths) - self.lengths
        ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.instructions, self.instruction_ids = list(ids), np.array([ids[text] for text in texts])

    def _choose(self, split, demos_per_task, seed):
        """-> sorted indices of the episodes of a split."""
        by_instruction = np.argsort(self.instruction_ids, kind="stable")
        is_val = np.zeros(len(self.lengths), bool)
        is_val[by_instruction[min(10, len(is_val)) - 1::10]] = True      # of fewer than ten, the last
        chosen = np.flatnonzero({"all": np.ones_like(is_val), "train": ~is_val, "val": is_val}[split])
        if not len(chosen):
            raise InputError(f"{self.path} has a single episode, which cannot be split into train and val")
        if demos_per_task is None:
            return chosen
        per_task = [chosen[self.instruction_ids[chosen] == i] for i in range(len(self.instructions))]
        for text, mine in zip(self.instructions, per_task):
            if not 1 <= demos_per_task <= len(mine):
                raise InputError(f"{demos_per_task} demonstrations per task asked for, but {self.path} "
                                 f"({split}) has {len(mine)} of {text!r}: ask for fewer, or prepare more")
        return np.sort(np.concatenate([np.random.default_rng(seed).permutation(mine)[:demos_per_task]
                                       for mine in per_task]))

    def _rows(self, episode, key, first, count):
        """Rows first, first+1, ... of an episode's actions or proprio -> (count, D) float32."""
        first += self._first_row[episode]
        return self._tables[key][first:first + count]

    def values(self, key):
        """-> (N, D) all "actions" of the split, merged over the stride and without the hold actions, or all
        "proprio"."""
        rows = []
        for episode in self.episodes[self.lengths[self.episodes] > self.stride]:       # those with a window
            steps = self._rows(episode, key, 0, self.lengths[episode] - (key == "actions"))
            if key == "actions":
                windows = np.lib.stride_tricks.sliding_window_view(steps, self.stride, axis=0)  # (N, A, s)
                steps = self._merge(windows.swapaxes(1, 2))
            rows.append(steps)
        return np.concatenate(rows)

    def limits(self, key):
        """-> {"min", "max", "std"} (D,) of values(key), for a normaliser that must not see other splits."""
        rows = self.values(key)
        return {"min": rows.min(0), "max": rows.max(0), "std": rows.std(0)}

    def traits(self):
        """-> {name: value} of all that datasets must have in common to be mixed."""
        return {"image_size": self.image_size, "number of cameras": len(self.cameras),
                **{f"{what} of {key}": value for key, about in self.about.items()
                   for what, value in about.items()}}

    def _merge(self, actions):
        """(..., s, A) actions of s steps -> (..., A): the sum of changes, the last of the other numbers."""
        return np.where(self.about["actions"]["delta"], actions.sum(-2), actions[..., -1, :])

    def spaced(self, most):
        """-> list of the indices of at most `most` windows, evenly spaced over all."""
        return np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)).tolist()

    def __len__(self):
        return int(self._ends[-1])

    def read_frames(self, episode, camera, first, count, stride=1):
        """-> (count, 3, H, W) uint8: frames first, first+stride, ..., then the last of them repeated."""
        shard, start = self._place[episode]
        real = min(count, (self.lengths[episode] - 1 - first) // stride + 1)
        places = self._where[shard][camera][start + first:start + first + (real - 1) * stride + 2]
        data = np.fromfile(self._paths[shard], np.uint8, places[-1] - places[0], offset=places[0])
        if len(data) < places[-1] - places[0]:
            raise InputError(f"{self._paths[shard]} ends too early: copy or make the dataset again")
        frames = np.empty((count, 3, self.image_size, self.image_size), np.uint8)
        for k in range(real):
            a, b = places[k * stride:k * stride + 2] - places[0]
            bgr = cv2.imdecode(data[a:b], cv2.IMREAD_COLOR)                            # (H, W, 3)
            if bgr is None:
                raise InputError(f"{self._paths[shard]} holds a damaged image (frame {first + k * stride} "
                                 f"of episode {episode}): copy or make the dataset again")
            frames[k, 2], frames[k, 1], frames[k, 0] = cv2.split(bgr)
        frames[real:] = frames[real - 1]
        return torch.from_numpy(frames)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        i, n, s = int(np.searchsorted(self._ends, index, side="right")), self.chunk, self.stride
        episode, t = int(self.episodes[i]), int(index - (self._ends[i - 1] if i else 0))
        last = int(self.lengths[episode]) - 1
        images = {c: self.read_frames(episode, c, t, n + 1 if k < self.future else 1, s)
                  for k, c in enumerate(self.cameras)}
        text = int(self.instruction_ids[episode])
        item = {"obs": {"images": {c: frames[0] for c, frames in images.items()},
                        "instruction": self.instructions[text]},
                "is_pad": t + s * torch.arange(1, n + 1) > last,         # (n,): step k ends at o_t+(k+1)s
                "episode": episode, "t": t, "instruction_id": text}
        if self.future:
            item["frames"] = torch.cat([images[c] for c in self.cameras[:self.future]], 1)   # (n+1, 3V, H, W)
        if "proprio" in self.about:
            item["obs"]["proprio"] = torch.tensor(self._rows(episode, "proprio", t, 1)[0])       # (P,)
        if "actions" in self.about:                                      # the last row is the hold action
            rows = self._rows(episode, "actions", t, min(n * s, last + 1 - t))
            rows = rows[np.minimum(np.arange(n * s), len(rows) - 1)].reshape(n, s, -1)           # (n, s, A)
            item["actions"] = torch.from_numpy(self._merge(rows))                                # (n, A)
        return item


class Mixture(torch.utils.data.ConcatDataset):
    """Windows of one or several datasets; the training scripts draw from it.

    paths    folders made by prepare_data.py, of one image size
    weights  share of the drawn windows that comes from each, to any scale; None: by number of windows
    strides  frames per step of each; None: whole numbers that make a chunk span about as long as in the
             slowest (SSv2 12 fps, LIBERO 20, Bridge 5: strides 2, 4, 1). ASSUMPTION: the paper is silent
    chunk and the rest as in EpisodeDataset. Cameras go by position and are named as in the first dataset.
    Items and attributes are those of EpisodeDataset; episodes and instructions are numbered consecutively.
    """

    def __init__(self, paths, chunk, weights=None, strides=None, **rest):
        if strides is None:
            rates = [read_manifest(path)[0]["fps"] for path in paths]
            strides = [max(1, round(rate / min(rates))) for rate in rates]
        for name, values in (("weights", weights), ("strides", strides)):
            if values is not None and len(values) != len(paths):
                raise InputError(f"--{name} has {len(values)} numbers for {len(paths)} datasets: one each")
        if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise InputError(f"--weights {' '.join(map(str, weights))}: expected 0 or more each, not all 0")
        self.parts = [EpisodeDataset(path, chunk, stride=stride, **rest)
                      for path, stride in zip(paths, strides)]
        super().__init__(self.parts)
        first = self.parts[0]
        mine = first.traits()
        for part in self.parts[1:]:
            its = part.traits()
            for what in sorted(mine.keys() | its.keys()):
                if mine.get(what) != its.get(what):
                    raise InputError(f"{part.path} and {first.path} differ in {what} ({its.get(what)}, "
                                     f"{mine.get(what)}): mix datasets that agree")
        self.weights = None if weights is None else np.array(weights) / sum(weights)
        self._starts = np.array([0, *self.cumulative_sizes])
        self._first_episode = np.cumsum([0] + [len(part.lengths) for part in self.parts])
        self.chunk, self.cameras, self.image_size = chunk, first.cameras, first.image_size
        self.action_dim, self.proprio_dim = first.action_dim, first.proprio_dim
        self.num_episodes = sum(part.num_episodes for part in self.parts)
        self.instructions = list(dict.fromkeys(text for part in self.parts for text in part.instructions))
        self._ids = {text: i for i, text in enumerate(self.instructions)}
        self.fingerprint = "+".join(part.fingerprint for part in self.parts)
        self.attrs = {**first.attrs, "instructions": self.instructions, "mixture": [
            {"path": part.path, "fingerprint": part.fingerprint, "stride": part.stride, "weight": share,
             "fps": part.fps} for part, share in zip(self.parts, self.shares())]}

    def shares(self):
        """-> share of the drawn windows that comes from each dataset."""
        return (np.diff(self._starts) / len(self) if self.weights is None else self.weights).tolist()

    def describe(self):
        """-> one line per dataset: episodes, windows, share, stride, seconds that a chunk spans."""
        return "\n".join(f"{'data' if i == 0 else '':12s} {part.path}: {part.num_episodes:,} episodes, "
                         f"{len(part):,} windows, share {share:.2f}, stride {part.stride}: a chunk spans "
                         f"{part.chunk * part.stride / part.fps:.2f} s at {part.fps:g} fps"
                         for i, (part, share) in enumerate(zip(self.parts, self.shares())))

    def draw(self, rng, count):
        """-> list of the indices of `count` random windows, drawn with replacement."""
        if self.weights is None:
            return rng.integers(len(self), size=count).tolist()
        part = rng.choice(len(self.parts), size=count, p=self.weights)
        return rng.integers(self._starts[part], self._starts[part + 1]).tolist()

    def values(self, key):
        """-> EpisodeDataset.values of all parts."""
        return np.concatenate([part.values(key) for part in self.parts])

    limits, spaced = EpisodeDataset.limits, EpisodeDataset.spaced

    def __getitem__(self, index):
        item, k = super().__getitem__(index), bisect.bisect(self.cumulative_sizes, index)
        item["obs"]["images"] = dict(zip(self.cameras, item["obs"]["images"].values()))
        return {**item, "episode": item["episode"] + int(self._first_episode[k]),
                "instruction_id": self._ids[item["obs"]["instruction"]]}


# ---- commands ----------------------------------------------------------------------------------------------

def inspect(args):
    """Print what a dataset holds and draw a contact sheet. --check compares every shard's hash."""
    data = EpisodeDataset(args.data, chunk=1)
    if args.check:
        for shard in tqdm(read_manifest(args.data)[1], "check", unit="shard"):
            path = os.path.join(args.data, shard["file"])
            if file_hash(path) != shard["sha256"]:
                raise InputError(f"{path} is not the file that was written: copy or make it again")
        print(f"{'check':>15}  all good: every shard is the file that was written")
    for key, value in sorted({**data.attrs, "fingerprint": data.fingerprint}.items()):
        print(f"{key:>15}  {value if isinstance(value, str) else json.dumps(value)}")
    seconds = np.median(data.lengths) / data.fps
    print(f"{'lengths':>15}  {data.lengths.min()} to {data.lengths.max()} frames, median {seconds:.1f} s")
    for i, times in collections.Counter(data.instruction_ids.tolist()).most_common(10):
        print(f"{times:>9} times  {data.instructions[i]!r}")
    for key, about in data.about.items():
        rows = data.values(key).astype(np.float64)
        columns = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0),
                   "q01": np.quantile(rows, 0.01, axis=0), "q99": np.quantile(rows, 0.99, axis=0)}
        print(f"{key:>15}  " + "".join(f"{column:>10}" for column in columns))
        for name, numbers in zip(about["names"], np.transpose([*columns.values()])):
            print(f"{name:>15}  " + "".join(f"{number:>10.4f}" for number in numbers))
    path = os.path.join(args.data, "contact_sheet.png")
    write_atomically(path, cv2.imencode(".png", contact_sheet(data))[1].tobytes())
    print(f"{'contact sheet':>15}  {path}")
    return 0.0


def contact_sheet(data, rows=10, columns=8, side=112):
    """-> (H, W, 3) uint8 BGR: evenly spaced frames of all cameras, for one episode per instruction and, if
    there is room, further episodes."""
    firsts = np.unique(data.instruction_ids, return_index=True)[1]
    others = np.setdiff1d(np.arange(len(data.lengths)), firsts)
    strips = []
    for episode in [*firsts, *others][:rows]:
        length, text = int(data.lengths[episode]), data.instructions[data.instruction_ids[episode]]
        text = f"{episode}: {ascii(text)[1:-1]} ({length} frames, {length / data.fps:.1f} s)"
        strips.append(np.full((20, columns * side, 3), 255, np.uint8))
        cv2.putText(strips[-1], text, (3, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        for camera in data.cameras:
            frames = [data.read_frames(episode, camera, int(t), 1)[0].permute(1, 2, 0).numpy()
                      for t in np.linspace(0, length - 1, columns)]
            strip = np.hstack([cv2.resize(frame, (side, side)) for frame in frames])
            strip[:, ::side] = 255                                       # a line between two frames
            strips.append(cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))
            cv2.putText(strips[-1], camera, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 255), 1)
    return np.vstack(strips)


def build_parser(smoke=False):
    """-> the parser; `--help` of a command lists its flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="source", required=True, metavar="|".join([*SOURCES, "inspect"]))
    for name, source in SOURCES.items():
        command = commands.add_parser(name, help=source.help, formatter_class=HelpFormatter)
        group = command.add_argument_group("this source")
        for flag, settings in source.flags.items():
            group.add_argument(flag, **settings)
        if name == "sim":
            command.set_defaults(resize="none: filmed at this size", check=False, **(SMOKE if smoke else {}))
        else:
            group = command.add_argument_group("input and frames")
            group.add_argument("--input", type=os.path.abspath, required=True, help="folder, or file")
            group.add_argument("--fraction", type=float, default=1.0, help="random share of the episodes; "
                               "paper: 0.1 of Something-Something")
            group.add_argument("--seed", type=int, default=0, help="selects which share --fraction takes")
            group.add_argument("--part", type=part, default="1/1", help="K/N: make only every N-th shard, "
                               "from the K-th on, so that N machines share the work")
            group.add_argument("--min-frames", type=int, default=12, help="reject shorter episodes")
            group.add_argument("--resize", choices=("squash", "crop"), default="squash",
                               help="squash changes the aspect ratio (as the release), crop cuts a square")
            group.add_argument("--check", action="store_true",
                               help="read everything, print what would be rejected and why, write nothing")
        group = command.add_argument_group("output")
        group.add_argument("--out", default="data" if name == "sim" else f"data/{name}",
                           help="folder; sim makes robot, hand_videos and hand in it")
        group.add_argument("--image-size", type=int, default=64 if name == "sim" else 128,
                           help="pixels; paper: 128")
        group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 = no others")
        group = group.add_mutually_exclusive_group()
        group.add_argument("--resume", action="store_true", help="finish an interrupted run")
        group.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    look = commands.add_parser("inspect", help="numbers and a contact sheet", formatter_class=HelpFormatter)
    look.add_argument("data", help="folder of a dataset")
    look.add_argument("--check", action="store_true", help="compare the hash of every shard")
    return parser


def main(argv=None):
    """Run one command. InputError when too many items were rejected; the others are written all the same."""
    args = build_parser("--smoke" in (sys.argv[1:] if argv is None else argv)).parse_args(argv)
    for name, low in (("image_size", 8), ("workers", 1), ("min_frames", 2), ("spread", 0), ("seed", 0),
                      ("demos_per_task", 0), ("hand_videos_per_task", 0)):
        if name in args:
            at_least(args, low, name)
    if not 0 < getattr(args, "fraction", 1) <= 1:
        raise InputError(f"--fraction {args.fraction}: expected a share above 0, 1 for all")
    if getattr(args, "out", ".") == "":
        raise InputError("--out is empty: give a folder")
    rejected = {"sim": film_twin, "inspect": inspect}.get(args.source, convert)(args)
    if rejected > MAX_REJECTED:
        done = ("nothing was written; the reasons are above" if args.check else
                f"the others are written; look at {args.out}/rejects.jsonl before you use them")
        raise InputError(f"{100 * rejected:.0f} % of all items rejected (above {100 * MAX_REJECTED:.0f}): "
                         f"{done}")


if __name__ == "__main__":
    run(main)

"""Data: every source becomes one HDF5 format, and one Dataset reads it (the data of both stages, Section IV).

    python prepare_data.py sim                                      # the twin: data/robot and data/hand
    python prepare_data.py ssv2 --input /data/ssv2 --fraction 0.1   # Something-Something v2: data/ssv2
    python prepare_data.py bridge --input /data/demos_8_17.zip      # BridgeData V2, the zip or its folder
    python prepare_data.py libero --input /data/libero_object       # LIBERO's *_demo.hdf5
    python prepare_data.py lerobot --input /data/my_robot           # a LeRobotDataset v3 folder
    python prepare_data.py videos --input my_clips --captions my_clips.csv
    python prepare_data.py ssv2 --input /data/ssv2 --check          # read everything, write nothing
    python prepare_data.py inspect data/robot                       # numbers, and a contact sheet to look at

A run may be killed at any moment: the same command with --resume goes on where it stopped and ends in the
same bytes, whatever --workers is. What cannot be used is a line of rejects.jsonl, with the reason; more than
5 % of such items end in exit status 2. `python tests/benchmark_data.py` measures the speed (README: figures).

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
    fps                      (E,) float32                 frames per second
    actions, proprio         (N, A), (N, P) float32       absent for video; the row of an episode's last frame
                                                          is the hold action (changes zero, rest repeated)
    extra/<name>             (N, ...)                     what `robot.py record` knows besides; read by nobody
    rejects                  (R,) str                     JSON: unusable items of the run and the reasons

Canonical action: [dx dy dz, rotation x3, gripper], the source's own numbers; attributes name their units, the
frame, which are changes per step, and the gripper's sign (Bridge 1 = open, LIBERO +1 = close).
Adding a dataset is one generator of (name, job) and one entry in SOURCES. Read only the source you need:
each stands under its own banner between "frames" and "the sources".
"""
import argparse
import atexit
import codecs
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
import json
import logging
import math
import mmap
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import threading
import types
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from xml.etree import ElementTree

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")    # damaged clips are counted, not shouted
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

from models import InputError, file_hash, read_json, run, shrink, write_atomically, write_json

FORMAT_VERSION = 3       # 3: instructions are words, which the policy embeds
MAX_REJECTED = 0.05       # share of rejected items above which the exit status says so
VIDEO_CAMERA = "front"    # the one camera of a video: the robot's first, so that finetuning carries it over
SSV2_CLIPS, SSV2_LABELS = "20bn-something-something-v2", "20bn-something-something-download-package-labels"
OURS = ("dataset.json", "labels/train.json", "rejects.jsonl", "contact_sheet.png", "[0-9]*.h5", "*.tmp",
        f"{SSV2_CLIPS}/*.webm", "arguments.json")       # what --overwrite removes; marks of completion first


class Reject(Exception):
    """Raised by a job whose item cannot be used: Reject(reason, detail). Counted, never replaced by black."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)     # the machine's fault
ODD = (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
       AssertionError, ElementTree.ParseError, csv.Error, struct.error, zlib.error, cv2.error)   # odd files'


def reads_foreign_files(job):
    """Decorator of jobs: one odd file among 200,000 is a reject with its error, not the end of the run.

    InputError (the command is wrong) and a full machine still end it.
    """
    @functools.wraps(job)
    def guarded(*args, **more):
        try:
            return job(*args, **more)
        except (InputError, Reject):
            raise
        except ODD as error:
            if getattr(error, "errno", None) in FULL:
                raise
            raise Reject("unreadable", one_line(error)) from error
    return guarded


@contextlib.contextmanager
def described_by(path):
    """What goes wrong while a file that describes a whole source is read is an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except ODD as error:
        raise InputError(f"{path} is not as expected ({one_line(error)}): fetch it again") from error


def one_line(error):
    """An exception in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# ---- files -------------------------------------------------------------------------------------------------

def walk(root):
    """os.walk that follows links, passes over datasets of ours, and hides no folder that it may not list."""
    def refused(error):
        raise InputError(f"cannot list {error.filename} ({error.strerror}): make it readable, or move it out")
    seen = {os.path.realpath(root)}                  # a link back up, or a second one, is not a second copy
    for folder, below, names in os.walk(root, onerror=refused, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(below)}
        below.clear()
        for name, place in places.items():
            if place not in seen and not os.path.exists(os.path.join(place, "arguments.json")):
                below.append(name)
            seen.add(place)
        yield folder, below, names


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
    with described_by(made_by):
        pairs = [(key, before.get(key), arguments.get(key))
                 for key in sorted(before.keys() | arguments.keys())]
    for key, was, now in pairs:
        if was != now:
            was, now = ("others", "these") if key == "items" else (repr(was), repr(now))
            raise InputError(f"{folder} was begun with {key} {was}, now it is {now}: --resume needs the "
                             "same, --overwrite starts afresh")
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


def decode_image(data, size):
    """Bytes of a JPEG or PNG -> (H, W, 3) uint8 BGR, as large as it is or half that and at least `size`.

    A JPEG is drawn at half its size for half the time (a smaller inverse DCT; mean error 0.5 of 255). OpenCV
    fills what is missing with grey and says nothing: Reject a file without its end marker or with a hole.
    """
    jpeg = data[:2] == b"\xff\xd8"
    whole = (b"\xff\xd9" if jpeg else b"IEND") in data[-64:]
    hole = jpeg and bytes(512) in data[data.rfind(b"\xff\xda"):]         # zeros in the compressed part
    array = np.frombuffer(data, np.uint8)
    image = cv2.imdecode(array, cv2.IMREAD_REDUCED_COLOR_2) if whole and not hole else None
    if image is not None and min(image.shape[:2]) < size:
        image = cv2.imdecode(array, cv2.IMREAD_COLOR)
    if image is None:
        raise Reject("damaged image", f"{len(data)} bytes, begins with {data[:8]!r}")
    return image


def to_jpegs(frames, args):
    """(H, W, 3) BGR frames -> JPEGs of args.image_size pixels. Reject a camera that shows nothing.

    Every fourth frame is looked at: one colour all over is a lens cap, a dead camera, or the dummy that some
    releases have in place of a camera; a fade from black is shorter than a tenth.
    """
    jpegs, blank = [], 0
    for frame in frames:
        small = shrink(frame, args.image_size, args.resize)
        blank += len(jpegs) % 4 == 0 and np.ptp(small) < 8
        jpegs.append(encode_frame(small))
    if blank > 0.1 * len(jpegs[::4]):
        raise Reject("blank frames", f"{blank} of {len(jpegs[::4])} frames looked at are of one colour")
    return jpegs


def video_frames(capture, fps, start, end, stride):
    """Frames (H, W, 3) BGR whose time is in [start, end) seconds, every stride-th of them.

    A seek may land anywhere in an odd file: the frames' own times decide, and a seek that lands late is
    replaced by reading from the beginning.
    """
    def now():
        return capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 + 0.1 / fps      # containers round to milliseconds
    if start > 0:
        capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * start)
    there, taken = capture.grab(), 0
    if start > 0 and not (there and now() < start + 1.5 / fps):
        capture.set(cv2.CAP_PROP_POS_MSEC, 0)
        there = capture.grab()
    while there and now() < end:
        if now() >= start:
            if taken % stride == 0:
                yield capture.retrieve()[1]
            taken += 1
        there = capture.grab()


@reads_foreign_files
def read_video(path, instructions, args, start=None, end=None):
    """Job: one video file, or its seconds [start, end) -> episode. Reject unless 90 % of its frames decode.

    OpenCV returns what decodes of a cut file without a word, so the frames are counted against the header.
    A hole inside a file that decodes to garbage, not to fewer frames, cannot be told from the picture.
    """
    if not os.path.exists(path):
        raise Reject("missing file")
    if not path.isprintable() and path.encode("utf-8", "replace").decode() != path:      # OpenCV would crash
        raise Reject("odd file name", "it is not UTF-8: rename the file")
    with open(path, "rb") as f:
        head = f.read(8)
    if not head:
        raise Reject("empty file")
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise Reject("not a video", f"begins with {head!r}")
    announced, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    if not 0 < fps <= 240:
        raise Reject("no frame rate", f"{fps} frames per second")
    whole = start is None
    start, end = (-math.inf, math.inf) if whole else (start, end)
    jpegs = to_jpegs(video_frames(capture, fps, start, end, args.stride), args)
    if not jpegs and int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") == b"av01":
        raise Reject("AV1 video", "OpenCV does not decode it here: ffmpeg -i IN -c:v libx264 OUT.mp4 first")
    expected = (announced if whole else (end - start) * fps) / args.stride
    if len(jpegs) < 0.9 * expected:                          # a header that does not know says -1 or less
        raise Reject("truncated", f"{len(jpegs)} of {expected:.0f} frames decode")
    if len(jpegs) < args.min_frames:
        raise Reject("too short", f"{len(jpegs)} frames, --min-frames {args.min_frames}")
    return {"images": {VIDEO_CAMERA: jpegs}, "instructions": instructions, "fps": fps / args.stride}


def refuse(reason, detail):
    """Job of an item that its generator already knows to be unusable."""
    raise Reject(reason, detail)


# ---- source: Something-Something v2 ------------------------------------------------------------------------

def natural(text):
    """Sort key by which clip 9 comes before clip 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def drawn(name, args):
    """Whether an item is in the random share --fraction: by a hash of its name and --seed alone, whatever the
    other items are, so that a larger share holds the smaller one and a missing file moves no other.
    UPSTREAM: the release takes the first 10,000 files in lexicographic order."""
    digest = hashlib.sha256(f"{args.seed}/{name}".encode("utf-8", "backslashreplace")).hexdigest()
    return int(digest[:12], 16) < args.fraction * 16 ** 12


def ssv2_episodes(args):
    """Clips of Something-Something v2, in the numeric order of their ids.

    Label files and folders go by many names (TwentyBN's, Qualcomm's, what people unpack them into): all are
    searched. `label` is what the annotator wrote; the refilled `template` differs from it in 22 % of clips.
    """
    labels = {}
    for split in args.splits:
        places = [os.path.join(args.input, folder, name)
                  for folder in ("labels", "labels/labels", "annotations", "", SSV2_LABELS,
                                 f"{SSV2_LABELS}/labels", "videos", SSV2_CLIPS)
                  for name in (f"{split}.json", f"something-something-v2-{split}.json")]
        found = next((place for place in places if os.path.isfile(place)), None)
        print(f"labels of {split}: {found or 'not there'}")
        entries = read_json(found) if found else []
        for entry in entries if isinstance(entries, list) else [entries]:
            if not (isinstance(entry, dict) and "id" in entry and isinstance(entry.get("label"), str)):
                raise InputError(f"{found}: {str(entry)[:80]} has no id or no label; leave the test split "
                                 "out")
            labels[str(entry["id"])] = " ".join(entry["label"].split())
    if not labels:
        raise InputError(f"no labels in {args.input}: expected labels/train.json or "
                         f"something-something-v2-train.json, as in {SSV2_LABELS}.zip")
    folders = [os.path.join(args.input, name) for name in (SSV2_CLIPS, "videos", "")]
    folder = next((f for f in folders if glob.glob(os.path.join(glob.escape(f), "*.webm"))), None)
    if folder is None:
        raise InputError(ssv2_unpacking(folders))
    if not any(name.removesuffix(".webm") in labels for name in os.listdir(folder)):
        raise InputError(f"{folder} has none of the {len(labels)} labelled clips: do clips and labels match?")
    print(f"{len(labels)} labelled clips (Something-Something v2: 168,913 train, 24,777 validation)")
    for clip in sorted(labels, key=natural):
        if drawn(clip, args):
            path = os.path.join(folder, f"{clip}.webm")
            yield clip, functools.partial(read_video, path, [labels[clip]], args)


def ssv2_unpacking(folders):
    """What to type when there is no clip: the archive parts, told by their first bytes, whatever their names.

    The clips come as one gzipped tar cut into parts (-00 to -19, or -00 and -01), each perhaps zipped.
    """
    parts = [path for folder in folders for path in glob.glob(os.path.join(glob.escape(folder), "20bn-*"))
             if os.path.isfile(path) and "labels" not in os.path.basename(path)]
    for path in sorted(parts, key=natural):
        with open(path, "rb") as f:
            head = f.read(4)
        where = f"cd {shlex.quote(os.path.dirname(path) or '.')} &&"
        if head[:2] == b"PK":
            return (f"the clips are still zipped ({path}): {where} for z in 20bn-*; do unzip -n $z; done; "
                    f"cat {SSV2_CLIPS}-?? | tar zx")
        if head[:2] == b"\x1f\x8b":
            return (f"the clips are still in {len(parts)} parts of one archive ({path} is the first): "
                    f"{where} cat {SSV2_CLIPS}-?? | tar zx")
        if head == b"\x1a\x45\xdf\xa3":
            return f"{path} is a clip without its ending: name the clips <id>.webm"
        return (f"{path} is neither a zip nor the first part of the archive (it begins with {head!r}): fetch "
                f"part 00 as well, then {where} cat {SSV2_CLIPS}-?? | tar zx")
    return f"no .webm in {' or '.join(folders)}: unpack there, cat {SSV2_CLIPS}-?? | tar zx"


# ---- source: a folder of videos ----------------------------------------------------------------------------

def videos_episodes(args):
    """All video files below a folder, one episode each, or the clips that a CSV cuts out of them.

    One instruction for all, or a CSV with the columns file,instruction and, to cut, start,end in seconds.
    """
    endings = (".mp4", ".webm", ".avi", ".mov", ".mkv")
    paths = [os.path.join(folder, name) for folder, _, names in walk(args.input) for name in names]
    files = sorted((os.path.relpath(path, args.input).replace(os.sep, "/") for path in paths
                    if path.lower().endswith(endings)), key=natural)
    if not files:
        raise InputError(f"no video in {args.input}: expected files ending in {' '.join(endings)}")
    clips = {(name, None, None): [args.instruction] for name in files}
    if args.captions:
        clips = read_captions(args.captions, set(files), args.input)
        print(f"captions for {len({file for file, *_ in clips})} of {len(files)} videos, {len(clips)} clips; "
              "other videos are left out")
    elif not args.instruction:
        print("no --captions and no --instruction: every video gets the empty instruction")
    for file, start, end in sorted(clips, key=lambda clip: (natural(clip[0]), clip[1] or 0, clip[2] or 0)):
        name = file if start is None else f"{file}@{start:.12g}-{end:.12g}"
        if drawn(name, args):
            path = os.path.join(args.input, file)
            yield name, functools.partial(read_video, path, clips[file, start, end], args, start, end)


def read_captions(path, files, folder):
    """CSV -> {(file, start, end): [instruction, ...]}: several lines for one clip are several annotations."""
    captions = {}
    if not os.path.isfile(path):
        raise InputError(f"no captions at {path}: give a CSV with the columns file,instruction")
    with described_by(f"{path} (UTF-8 text)"), open(path, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        columns = set(rows.fieldnames or ())
        if not {"file", "instruction"} <= columns or len(columns & {"start", "end"}) == 1:
            raise InputError(f"{path} has the columns {rows.fieldnames}: expected file,instruction and, to "
                             "cut clips out of the files, start,end")
        for row in rows:
            where, file = f"{path}, line {rows.line_num}", os.path.normpath(row["file"].replace("\\", "/"))
            if file not in files:
                raise InputError(f"{where}: no video {row['file']!r} in {folder}")
            times = [row.get("start"), row.get("end")]
            start, end = None, None
            if any(times):
                try:
                    start, end = map(float, times)
                except (TypeError, ValueError):
                    start, end = 0.0, 0.0
                if not 0 <= start < end < math.inf:
                    raise InputError(f"{where}: start {times[0]!r} and end {times[1]!r} are to be seconds, "
                                     "0 <= start < end, or both empty for the whole file")
            text = " ".join((row["instruction"] or "").split())
            captions.setdefault((file, start, end), []).append(text)
    if not captions:
        raise InputError(f"{path} has no row below its heading: expected one per video or clip")
    return captions


# ---- source: BridgeData V2 ---------------------------------------------------------------------------------

BRIDGE_HZ = 5                                        # one action every 0.2 s
BRIDGE_CAMERA_LATE_UNTIL = datetime.date(2021, 7, 23)
BRIDGE_FILES = ("obs_dict.pkl", "policy_out.pkl", "lang.txt")       # agent_data.pkl pickles ROS classes
BRIDGE_WANTED = re.compile(r"images\d+/[^/]+|" + "|".join(map(re.escape, BRIDGE_FILES)))


def bridge_episodes(args):
    """Trajectories of the raw release, from its folder or straight from its zip.

    .../<YYYY-MM-DD_HH-MM-SS>/{config.json, raw/traj_group<k>/traj<i>/{obs_dict.pkl, policy_out.pkl, lang.txt,
    images0/im_<t>.jpg, ...}}; folders above the date differ in depth. Trajectories without an annotation keep
    the empty instruction: their pictures teach the world model as well.
    UPSTREAM: the release sorts im_0, im_1, im_10, im_11, ..., drops the last image, writes black videos where
    images are missing, and reads the bridge_data_v2 subtree only.
    """
    found = (zip_trajectories if os.path.isfile(args.input) else tree_trajectories)(args.input)
    if not found:
        raise InputError(f"no trajectory in {args.input}: expected folders traj_group*/traj* somewhere in "
                         "it, as in demos_8_17.zip or what it unpacks to")
    print(f"{len(found)} trajectories (all of BridgeData V2: 60,096 = 50,365 demonstrations, 9,731 scripted)")
    for name in sorted(found, key=natural):
        if drawn(name, args):
            yield name, functools.partial(bridge_episode, name, found[name], args)


def tree_trajectories(root):
    """Folder -> {relative name of a trajectory: function that lists its files}."""
    found = {}
    for folder, below, _ in walk(root):
        below[:] = [name for name in below if "lmdb" not in name]
        if os.path.basename(folder).startswith("traj_group"):
            for name in below:
                if name.startswith("traj"):
                    path = os.path.join(folder, name)
                    found[os.path.relpath(path, root).replace(os.sep, "/")] = functools.partial(
                        tree_files, path)
            below.clear()                            # never list the millions of images
    return found


def tree_files(folder):
    """Files of one trajectory -> {relative name: function that reads it}."""
    names = os.listdir(folder)
    for images in [name for name in names if re.fullmatch(r"images\d+", name)]:
        names += [f"{images}/{file}" for file in os.listdir(os.path.join(folder, images))]
    files = {name: os.path.join(folder, name) for name in names if BRIDGE_WANTED.fullmatch(name)}
    config = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(folder))), "config.json")
    if os.path.isfile(config):
        files["config.json"] = config
    return {name: functools.partial(read_bytes, path) for name, path in files.items()}


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


@reads_foreign_files
def bridge_episode(name, list_files, args):
    """Job: one trajectory -> episode. T images, T-1 actions, T states."""
    files = list_files()
    missing = [file for file in BRIDGE_FILES[:2] if file not in files]
    if missing:
        raise Reject("missing file", f"no {' and no '.join(missing)}")
    actions = bridge_actions(read_pickle(files["policy_out.pkl"](), "policy_out.pkl"))           # (T-1, 7)
    observed = read_pickle(files["obs_dict.pkl"](), "obs_dict.pkl")
    try:
        state = as_array(observed["full_state" if "full_state" in observed else "state"])
    except (LookupError, TypeError, ValueError, AttributeError):
        state = np.zeros(0)
    if state.ndim != 2 or state.shape[1] != 7:
        raise Reject("no full_state", f"obs_dict.pkl: full_state of shape {state.shape}, expected (T, 7)")
    frames = {camera: bridge_frames(camera, files) for camera in args.cameras}    # {camera: T file names}
    counts = {len(names) for names in frames.values()}
    if counts != {len(actions) + 1}:
        raise Reject("frame count", f"{' and '.join(map(str, sorted(counts)))} images, {len(actions)} "
                                    "actions: expected one image more than actions")
    dates = re.findall(r"(\d{4})-(\d\d)-(\d\d)_\d\d-\d\d-\d\d", f"{args.input}/{name}")
    try:                                             # without a date: the scripted part, from 2022 and later
        late = bool(dates) and datetime.date(*map(int, dates[-1])) < BRIDGE_CAMERA_LATE_UNTIL
    except ValueError:
        raise Reject("bad date", "-".join(dates[-1])) from None
    if late:
        # Until that day the picture taken at step t+1 shows the world of step t: drop the first picture and
        # the last action. ASSUMPTION: joint states were not late, state[t] goes with picture t+1 (the
        # authors' converter shifts the state, too, and loses files with one state less than images).
        frames = {camera: names[1:] for camera, names in frames.items()}
        actions, state = actions[:-1], state[:len(actions)]
    T = len(actions) + 1
    if len(state) != T:
        raise Reject("state count", f"{len(state)} rows of full_state, {T} images")
    if T < args.min_frames:
        raise Reject("too short", f"{T} frames, --min-frames {args.min_frames}")
    images = {camera: to_jpegs((decode_image(files[file](), args.image_size) for file in names), args)
              for camera, names in frames.items()}
    return {"images": images, "instructions": bridge_annotations(files), "fps": BRIDGE_HZ, "actions": actions,
            "proprio": state}


def bridge_frames(camera, files):
    """Names of a camera's images im_0.jpg, im_1.jpg, ..., in numeric order. Reject when one is missing.

    "front" is images0, over the shoulder; "images2" a folder; any other word (wrist, blue, yellow, D435) is
    looked up in config.json, whose camera_topics stand in the order of the folders.
    """
    folder = "images0" if camera == VIDEO_CAMERA else camera
    if not re.fullmatch(r"images\d+", folder):
        topics = camera_topics(json.loads(files["config.json"]())) if "config.json" in files else []
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


def camera_topics(config):
    """The first list called camera_topics anywhere in config.json, or []."""
    values = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    if isinstance(config, dict) and isinstance(config.get("camera_topics"), list):
        return config["camera_topics"]
    return next((topics for value in values if (topics := camera_topics(value))), [])


def bridge_actions(stored):
    """policy_out.pkl, a list of dicts, a list of arrays or one array -> (T-1, 7) float64. Reject the rest."""
    try:
        steps = stored if isinstance(stored, (list, tuple)) else as_array(stored)
        actions = np.array([as_array(step["actions"] if isinstance(step, dict) else step) for step in steps])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        actions = np.zeros(0)
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise Reject("odd policy_out.pkl", "expected a list of dicts with 7 actions each, or of 7 numbers")
    return actions


def bridge_annotations(files):
    """lang.txt -> its different annotations in their order, [""] without any.

    Written by many hands: UTF-8 or Mac Roman, with or without a last newline, blank lines, a line of
    confidence values, the same sentence twice, or nothing at all.
    """
    data = files["lang.txt"]() if "lang.txt" in files else b""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("mac_roman")
    lines = [" ".join(line.split()) for line in text.replace("\0", "").splitlines()]
    return list(dict.fromkeys(line for line in lines if line and "confidence" not in line.lower())) or [""]


class Pickled:
    """What a pickle says of an array, a dtype or a number of numpy's: kind, the arguments, the state."""
    __slots__ = ("kind", "args", "state")

    def __init__(self, kind, *args):
        self.kind, self.args, self.state = kind, args, None

    def __setstate__(self, state):
        self.state = state


class NumpyUnpickler(pickle.Unpickler):
    """Admits numpy's arrays and plain containers. A pickle is a program: what else it names would run.

    numpy itself is kept out as well (with numbers of its choice a pickle can make it write anywhere in
    memory): its names become notes, Pickled, of which as_array makes an array that is checked.
    """
    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
               "numpy._core.numeric")
    KINDS = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")

    def find_class(self, module, name):
        if module in self.MODULES and name in self.KINDS:
            return lambda *args: Pickled(name, *args)            # a new one each: a pickle may write into it
        if (module, name) == ("_codecs", "encode"):              # how bytes are written by old protocols
            return lambda text, encoding="latin1": text.encode("latin1")
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *items: dict(*items)
        raise Reject("unsafe pickle", f"it names {module}.{name}")


def read_pickle(data, name):
    """Pickle -> what is in it, arrays as Pickled. Reject when it is damaged or names anything but numpy."""
    try:
        return NumpyUnpickler(io.BytesIO(data)).load()
    except Reject as reject:
        raise Reject(reject.args[0], f"{name}: {reject.args[1]}; nothing in it was run") from None
    except (pickle.UnpicklingError, EOFError, MemoryError, *ODD) as error:
        raise Reject("damaged pickle", f"{name}: {one_line(error)}") from None


def as_array(value):
    """Numbers of a pickle (Pickled ones, lists of them) -> float64 array. ValueError, TypeError."""
    if isinstance(value, (list, tuple)):
        return np.array([as_array(item) for item in value], float)
    if not isinstance(value, Pickled):
        return np.array(value, float)
    if value.kind == "_reconstruct":
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    elif value.kind == "_frombuffer":
        data, dtype, shape, order = value.args
    else:                                            # one number, or what is none: too few arguments
        (dtype, data), shape, order = value.args, (), "C"
    code, endian = dtype.args[0], (dtype.state or (3, "<"))[1]
    if not (isinstance(data, (bytes, bytearray)) and re.fullmatch("[biuf][1248]", code) and endian in "<>=|"):
        raise ValueError(f"an array of {code!r}")
    return np.frombuffer(data, np.dtype(endian + code)).reshape(shape, order=order).astype(float)


# The zip has millions of members: zipfile would hold an object for each, gigabytes, in every process. Here
# one pass notes where in the archive's directory each trajectory's entries lie; its job reads those alone.

IN_TRAJECTORY = re.compile(r"(.*?traj_group[^/]*/traj[^/]*)/(.+)")


@contextlib.contextmanager
def mapped(path):
    """Content of a file as bytes that are read where they are looked at."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def zip_trajectories(path):
    """Zip -> {name of a trajectory: function that lists its files}. InputError when it is not a whole zip."""
    found, configs = {}, {}                          # {name: [[start, end], ...]} in the archive's directory
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty: fetch the zip again")
    with mapped(path) as archive:
        for name, place, _ in zip_entries(archive, *zip_directory(archive, path), path):
            match = IN_TRAJECTORY.fullmatch(name)
            if re.search("lmdb|__MACOSX", name):
                continue
            if match and BRIDGE_WANTED.fullmatch(match[2]):
                parts = found.setdefault(match[1], [])
                if parts and parts[-1][1] == place[0]:
                    parts[-1][1] = place[1]
                else:
                    parts.append(list(place))
            elif os.path.basename(name) == "config.json":
                configs[os.path.dirname(name)] = place
    for name, parts in found.items():
        dated = os.path.dirname(os.path.dirname(os.path.dirname(name)))
        found[name] = functools.partial(zip_files, path, parts, configs.get(dated))
    return found


def zip_directory(archive, path):
    """(start, end) of a zip's central directory, from the records at its very end."""
    at = len(archive) - 21                           # the record ends with a comment, and says how long it is
    while at >= 0 and archive[at + 20:at + 22] != struct.pack("<H", (len(archive) - at - 22) % 65536):
        at = archive.rfind(b"PK\5\6", max(0, len(archive) - 65557), at + 3)
    if at < 0:
        raise InputError(f"{path} is not a whole zip ({len(archive):,} bytes, no directory at its end): was "
                         "it downloaded to the end? fetch it again, or give the folder it unpacks to")
    length, start = struct.unpack_from("<2L", archive, at + 12)
    if archive[max(0, at - 20):at][:4] == b"PK\6\7":         # zip64: more than 4 GiB or 65,535 members
        at = struct.unpack_from("<Q", archive, at - 12)[0]
        length, start = struct.unpack_from("<2Q", archive, at + 40)
    return start, start + length


def zip_entries(archive, at, end, path):
    """Entries of a zip's directory from byte `at` to `end` -> (name, (start, end), where) each.

    where: (method, crc, compressed size, offset of the member), what zip_read needs.
    """
    while at < end:
        (mark, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, _,
         offset) = struct.unpack_from("<4s6H3L5H2L", archive, at)
        if mark != b"PK\1\2":
            raise InputError(f"the directory of {path} is damaged at byte {at}: fetch the zip again")
        fields = archive[at + 46 + name:at + 46 + name + extra]
        while len(fields) >= 4:                      # zip64: the sizes that do not fit stand here, in order
            kind, width = struct.unpack_from("<2H", fields)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{width // 8}Q", fields, 4))
                size, packed, offset = (next(wide) if value == 0xffffffff else value
                                        for value in (size, packed, offset))
            fields = fields[4 + width:]
        text = archive[at + 46:at + 46 + name].decode("utf-8" if flags & 0x800 else "cp437", "replace")
        start, at = at, at + 46 + name + extra + comment
        yield text, (start, at), (method, crc, packed, offset)


def zip_files(path, parts, config):
    """Files of one trajectory in a zip -> {relative name: function that reads it}."""
    with mapped(path) as archive:
        files = {IN_TRAJECTORY.fullmatch(name)[2]: functools.partial(zip_read, path, *where)
                 for part in parts for name, _, where in zip_entries(archive, *part, path)}
        for _, _, where in zip_entries(archive, *config, path) if config else ():
            files["config.json"] = functools.partial(zip_read, path, *where)
    return files


def zip_read(path, method, crc, packed, offset):
    """One member's content. Reject when it is damaged."""
    if method not in (0, 8):
        raise Reject("unknown compression", f"method {method} of the zip: unpack it, and give the folder")
    with open(path, "rb") as f:
        f.seek(offset)
        header = f.read(30)
        if header[:4] == b"PK\3\4":
            f.seek(sum(struct.unpack_from("<2H", header, 26)), os.SEEK_CUR)
            data = f.read(packed)
            try:
                data = zlib.decompress(data, -15) if method == 8 else data
            except zlib.error:
                data = b""
            if zlib.crc32(data) == crc:
                return data
    raise Reject("damaged in the zip", f"the member at byte {offset}")


# ---- source: LIBERO ----------------------------------------------------------------------------------------

LIBERO_HZ = 20
LIBERO_CAMERAS = {"agentview": ("agentview_rgb", "agentview_image"),
                  "wrist": ("eye_in_hand_rgb", "robot0_eye_in_hand_image")}     # (raw, processed) names


def libero_episodes(args):
    """Demonstrations of LIBERO's <task>_demo.hdf5, of any suite, in three states that are all around:

    raw        obs/*_rgb, upside down, read AFTER the action of the same row (LIBERO's create_dataset.py)
    replayed   the same names, read before it (openvla's "no-noops"); told from raw by comparing
               obs/joint_states with states, never by the file's name
    processed  obs/*_image, upright, read before it (Adapt3R's, and LAWM's, process_libero_data.py)
    Files with states and actions alone are drawn by the simulator, --render.
    Two annotations: the one in the file (the BDDL's), then the task's name, which differs in some suites.
    """
    paths = [args.input] if os.path.isfile(args.input) else [
        os.path.join(folder, name) for folder, _, names in walk(args.input) for name in names
        if name.endswith((".hdf5", ".h5"))]
    if not paths:
        raise InputError(f"no .hdf5 in {args.input}: expected <task>_demo.hdf5, or folders of them")
    root = args.input if os.path.isdir(args.input) else os.path.dirname(args.input)
    if args.render:
        import_libero(args.libero_assets)            # before the first hour of rendering, not in its course
    tasks = {}                                       # {name: (path, instructions, keys, successes or None)}
    for path in sorted(paths, key=natural):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        try:
            with h5py.File(path, "r") as f:
                keys = sorted((key for key in f["data"] if key.startswith("demo")), key=natural)
                if not keys:
                    raise ValueError("no demonstration in it")
                bare = [key for key in keys if not any(f"obs/{image}" in f["data"][key]
                                                       for image in LIBERO_CAMERAS["agentview"])]
                instructions = libero_instructions(f["data"].attrs, path)
                successes = libero_successes(f, keys)
        except ODD as error:
            print(f"{path} cannot be read: left out, fetch it again")
            yield name, functools.partial(refuse, "damaged file", one_line(error))
            continue
        tasks[name] = (path, instructions, keys, successes)
        if len(bare) == len(keys) and not args.render:
            raise InputError(f"{path} holds states but no images in {bare[0]}: --render draws them with the "
                             "simulator, or fetch the files with images")
    if args.render and not args.keep_failures:
        jobs = [functools.partial(simulated_successes, path, keys, args)
                for path, _, keys, _ in tasks.values()]
        with contextlib.closing(run_jobs(jobs, args.workers)) as results:
            results = list(tqdm(results, "successes", len(jobs), unit="task"))
        tasks = {name: (*task[:3], None if isinstance(known, Reject) else known)
                 for (name, task), known in zip(tasks.items(), results)}
    for name, (path, instructions, keys, successes) in tasks.items():
        for key in choose_successes(name, keys, successes, args):
            if drawn(f"{name}/{key}", args):
                yield f"{name}/{key}", functools.partial(libero_demo, path, key, instructions, args)


def libero_instructions(attrs, path):
    """-> [the file's own instruction, the one in its name], or one where they agree."""
    info = json.loads(attrs.get("problem_info", "{}"))
    text = info.get("language_instruction") or ""
    text = " ".join(text) if isinstance(text, list) else text
    name = re.sub(r"(_demo)?\.(hdf5|h5)$", "", os.path.basename(path))
    name = re.sub(r"^.*SCENE\d+_", "", name).replace("_", " ")
    return list(dict.fromkeys(t for t in (" ".join(text.strip(' "\n').split()), name) if t))


def libero_successes(f, keys):
    """Successes that a file records, [bool], or None: raw files end every demonstration with reward 1."""
    if all("success" in f["data"][key] for key in keys):
        return [bool(np.any(f["data"][key]["success"][:])) for key in keys]
    return None


def choose_successes(name, keys, successes, args):
    """Demonstrations to keep; never none of a task."""
    if successes is None or args.keep_failures or all(successes):
        return keys
    kept = [key for key, success in zip(keys, successes) if success]
    if not kept:
        print(f"{name}: none of the {len(keys)} demonstrations succeeds (wrong initial states?): all are "
              "KEPT, look at them before you train on this task")
        return keys
    print(f"{name}: {len(keys) - len(kept)} of {len(keys)} demonstrations left out, they do not succeed "
          "(--keep-failures keeps them)")
    return kept


@reads_foreign_files
def libero_demo(path, key, instructions, args):
    """Job: one demonstration -> episode. T rows give T images and T-1 actions: one has no image beside it."""
    with h5py.File(path, "r") as f:
        demo = f["data"][key]
        actions = demo["actions"][:]
        if args.render:
            images, proprio, after = *draw_states(f, demo, path, args), False
        else:
            images, proprio, after = stored_observations(f, demo, args)
    lengths = {len(actions), len(proprio), *map(len, images.values())}
    if len(lengths) > 1 or actions.ndim != 2 or actions.shape[1] != 7:
        raise Reject("odd lengths", f"actions {actions.shape}, {len(proprio)} states, "
                                    f"{[len(frames) for frames in images.values()]} images")
    still = np.linalg.norm(actions[:, :6], axis=1) < 1e-4                # as openvla's filter
    still &= np.append(True, actions[1:, 6] == actions[:-1, 6])
    # obs[t] after actions[t] was seen when actions[t+1] was commanded, and actions[0] has no image; obs[t]
    # before it leaves the last action without an image after it.
    actions, still = (actions[1:], still[1:]) if after else (actions[:-1], still[:-1])
    if args.drop_noops:
        if still.all():
            raise Reject("nothing but no-ops", f"{len(still)} of them")
        kept = np.append(~still, True)                                   # the last image stays
        actions, proprio = actions[~still], proprio[kept]
        images = {camera: [frame for frame, keep in zip(frames, kept) if keep]
                  for camera, frames in images.items()}
    if len(proprio) < args.min_frames:
        raise Reject("too short", f"{len(proprio)} frames, --min-frames {args.min_frames}")
    jpegs = {camera: to_jpegs((frame[..., ::-1] for frame in frames), args)
             for camera, frames in images.items()}
    return {"images": jpegs, "instructions": instructions, "fps": LIBERO_HZ, "actions": actions,
            "proprio": proprio}


def stored_observations(f, demo, args):
    """-> {camera: T upright (H, W, 3) RGB}, proprio (T, 8), whether they were read after the row's action."""
    obs, names = demo["obs"], {}
    for camera in args.cameras:
        names[camera] = next((name for name in LIBERO_CAMERAS[camera] if name in obs), None)
        if names[camera] is None:
            raise Reject("no such camera", f"{camera}: obs has {', '.join(obs)}"[:200])
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
        from scipy.spatial.transform import Rotation                     # a third of a second to import
        quaternion = Rotation.from_matrix(obs["hand_mat"][:, :3, :3]).as_quat()          # x y z w
        quaternion *= np.where(quaternion[:, :1] < 0, -1, 1)     # the half in which the hand points down
        proprio = np.hstack([obs["robot0_eef_pos"], axis_angle(quaternion), obs["robot0_gripper_qpos"]])
    return images, proprio, observed_after(demo) if raw else False


def observed_after(demo):
    """Whether obs[t] was read after actions[t]. states[t] never is, and its numbers 1 to 7 are the arm's
    joints: obs/joint_states[t] equals those of states[t+1], or of states[t]."""
    if "states" not in demo or demo["states"].ndim != 2 or "joint_states" not in demo["obs"]:
        return True                                  # a raw file that lost its states
    joints, states = demo["obs/joint_states"][:], demo["states"][:, 1:8]
    after, before = np.abs(joints[:-1] - states[1:]).mean(), np.abs(joints - states).mean()
    if not np.isfinite(after + before):
        raise Reject("states not finite", "so nothing tells whether images are from before their action")
    return bool(after <= before)


def axis_angle(quaternion):
    """Unit quaternions (T, 4), x y z w -> rotation vectors (T, 3) with angles 0 to 2 pi, as in robosuite: no
    jump where the angle passes pi, which a hand that points down does all the time."""
    w = np.clip(quaternion[:, 3:], -1, 1)
    sine = np.sqrt(1 - w ** 2)
    return quaternion[:, :3] * np.where(sine > 1e-8, 2 * np.arccos(w) / np.maximum(sine, 1e-8), 0)


# What the field learnt the hard way: (package, versions that will do, why the others will not).
LIBERO_NEEDS = (
    ("mujoco", lambda v: v < (3, 3, 3), "mujoco<3.3.3", "from 3.3.3 the floors are darker, from 3.4.0 "
     "libero_spatial task 5 falls from 98 % to 12 %, 4.0 does not load the robots"),
    ("robosuite", lambda v: v[:2] == (1, 4), "robosuite==1.4.0", "1.5 has other robots and controllers"))


def import_libero(assets=None):
    """-> the module libero.libero, pointed at its assets: --libero-assets, else $LIBERO_ASSETS, else those in
    the package, else what libero fetches itself. InputError when there are none, or versions do not fit.

    Imported as it comes, it asks a question on stdin, writes into the home folder, and robosuite opens
    /tmp/robosuite.log, which may be another user's: none of it here, its settings go to a temporary folder.
    """
    import robot  # noqa: F401  (chooses EGL or OSMesa before mujoco is imported)
    if os.environ.get("MUJOCO_GL") == "disable":
        raise InputError("no OpenGL to render images with: apt-get install libegl1 libgl1 libosmesa6")
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise InputError("the simulator is not installed: pip install -r requirements.txt")
    for package, fits, wanted, why in LIBERO_NEEDS:
        found = metadata.version(package)
        if not fits(tuple(map(int, re.findall(r"\d+", found)[:3]))):
            raise InputError(f"{package} {found} is installed, LIBERO needs {wanted} ({why}): "
                             f'pip install "{wanted}"')
    package = spec.submodule_search_locations[0]
    if not os.path.exists(os.path.join(os.environ.get("LIBERO_CONFIG_PATH", ""), "config.yaml")):
        root, folder = os.path.join(package, "libero"), tempfile.mkdtemp()
        if not os.access(package, os.W_OK):          # numba would cache in the home folder, or fail
            os.environ.setdefault("NUMBA_CACHE_DIR", folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["LIBERO_CONFIG_PATH"] = folder
        if not os.access(os.path.expanduser("~"), os.W_OK):
            os.environ.setdefault("MPLCONFIGDIR", folder)                # matplotlib would complain
        with open(os.path.join(folder, "config.yaml"), "w") as f:        # JSON is YAML
            json.dump({"benchmark_root": root, "bddl_files": f"{root}/bddl_files", "datasets": folder,
                       "init_states": f"{root}/init_files", "assets": assets or f"{root}/assets"}, f)
    macros = types.ModuleType("robosuite.macros_private")                # robosuite's own place for settings
    macros.CONSOLE_LOGGING_LEVEL, macros.FILE_LOGGING_LEVEL = "ERROR", None
    macros.MUJOCO_GPU_RENDERING = False              # else it overrules MUJOCO_GL
    sys.modules.setdefault(macros.__name__, macros)
    from libero import libero
    given = assets or os.environ.get("LIBERO_ASSETS")
    if given:
        libero._assets_path_cache = os.path.abspath(given)
    found = given or libero.get_assets_path()
    if not os.path.isdir(os.path.join(found, "scenes")):
        raise InputError(f"LIBERO's assets are not in {found} (no folder scenes): give the folder with "
                         "--libero-assets or LIBERO_ASSETS")
    return libero


_simulator = {}


def close_simulator():
    """Give the simulator's OpenGL context back: at exit, OpenGL is gone before the garbage is collected."""
    while _simulator:
        _simulator.popitem()[1].close()
    gc.collect()


def libero_simulator(bddl, assets, seed=0):
    """The simulator of one task, the last one kept: building it takes seconds."""
    if bddl not in _simulator:
        close_simulator()
        import_libero(assets)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)     # robosuite takes it for the number of an EGL device;
        from libero.libero.envs import OffScreenRenderEnv    # MUJOCO_EGL_DEVICE_ID is one
        env = OffScreenRenderEnv(bddl_file_name=bddl, use_camera_obs=False)    # libero_observation draws
        reset_simulator(env, seed)
        atexit.unregister(close_simulator)           # OpenGL has registered its end by now; ours, being
        atexit.register(close_simulator)             # registered later, comes before it
        _simulator[bddl] = env
    return _simulator[bddl]


def reset_simulator(env, seed):
    """A fresh scene, the same for the same seed whatever has been simulated before it.

    UPSTREAM: the furniture is placed at random and is not part of a stored initial state; and every reset
    adds its samplers once more, so that what is drawn depends on the number of resets before.
    """
    np.random.seed(seed)
    env.env.object_property_initializers.clear()
    env.env.visualization_sites_list.clear()
    env.env.reset()                                  # env.reset() would swallow every error and try for ever


def libero_observation(env, cameras, image_size):
    """What is seen now -> {camera: (H, W, 3) uint8 RGB, upright}, proprio (8,): hand's position (m), its
    rotation vector (rad), both fingers (m)."""
    seen = env.env._get_observations(force_update=True)
    proprio = np.hstack([seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"][None])[0],
                         seen["robot0_gripper_qpos"]])
    return {camera: libero_image(env, camera, image_size) for camera in cameras}, proprio


def libero_image(env, camera, image_size):
    """(H, W, 3) uint8 RGB, upright: OpenGL draws from below. Smaller images than LIBERO's own 128 pixels are
    drawn at that and shrunk, as those in its files are."""
    name, drawn = LIBERO_CAMERAS[camera][1].removesuffix("_image"), max(image_size, 128)
    return shrink(env.sim.render(width=drawn, height=drawn, camera_name=name)[::-1], image_size, "squash")


def task_simulator(f, path, args):
    """Simulator of the task of an open demonstration file."""
    root = os.path.join(os.path.dirname(import_libero(args.libero_assets).__file__), "bddl_files")
    named = str(f["data"].attrs.get("bddl_file_name", ""))
    name = re.sub(r"(_demo)?\.(hdf5|h5)$", ".bddl", os.path.basename(path))
    places = [os.path.join(root, *named.split("/")[-2:])] if named else []
    places += glob.glob(os.path.join(root, "*", name))
    bddl = next((place for place in places if os.path.isfile(place)), None)
    if bddl is None:
        raise Reject("unknown task", f"libero has no {named or name}")
    return libero_simulator(bddl, args.libero_assets)


def place_scene(env, demo):
    """Furniture is placed at random by a reset and is not part of the state: take its poses from the file."""
    model, attrs = env.sim.model, demo.attrs
    if "fixture_poses" in attrs:
        poses = json.loads(attrs["fixture_poses"])
    else:                                            # raw files carry the whole model: its outermost bodies
        bodies = ElementTree.fromstring(attrs.get("model_file", "<mujoco/>")).findall("worldbody/body")
        poses = {body.get("name"): [body.get("pos", "0 0 0").split(), body.get("quat", "1 0 0 0").split()]
                 for body in bodies if not set(body.attrib) & {"euler", "axisangle", "xyaxes", "zaxis"}}
    for name, (position, quaternion) in poses.items():
        if name in model.body_names:
            body = model.body_name2id(name)
            model.body_pos[body], model.body_quat[body] = np.float64(position), np.float64(quaternion)
    width = len(env.get_sim_state())
    if demo["states"].ndim != 2 or demo["states"].shape[1] != width:
        raise Reject("states of another scene", f"{demo['states'].shape}, the simulator has {width} numbers")


def draw_states(f, demo, path, args):
    """-> {camera: T upright (H, W, 3) RGB}, proprio (T, 8), both from before the row's action."""
    env, rows = task_simulator(f, path, args), []
    place_scene(env, demo)
    for state in demo["states"][:].astype(np.float64):
        show_state(env, state)
        rows.append(libero_observation(env, args.cameras, args.image_size))
    images, proprio = zip(*rows)
    return {camera: [seen[camera] for seen in images] for camera in args.cameras}, np.array(proprio)


def show_state(env, state):
    """Set the simulator to a flattened state, as its regenerate_obs_from_state does: a stove may glow."""
    env.set_state(state)
    env.sim.forward()
    env.check_success()
    env._post_process()


@reads_foreign_files
def simulated_successes(path, keys, args):
    """Job: whether each demonstration of a file succeeds; an odd one passes, its own job will reject it."""
    with h5py.File(path, "r") as f:
        env, found = task_simulator(f, path, args), []
        for key in keys:
            try:
                found.append(reaches_goal(env, f["data"][key]))
            except Reject:
                found.append(True)
    return found


@reads_foreign_files
def reaches_goal(env, demo):
    """Whether the task is solved in one of a demonstration's last 20 states."""
    place_scene(env, demo)
    for state in demo["states"][-20:].astype(np.float64):
        show_state(env, state)
        if env.check_success():
            return True
    return False


# ---- source: a LeRobotDataset v3 ---------------------------------------------------------------------------

def lerobot_episodes(args):
    """Episodes of a LeRobotDataset v3 folder: parquet tables, and videos that hold many episodes each.

    Its row t is what was seen before action t: T rows give T images and T-1 actions.
    """
    info = lerobot_info(args)
    parquet = import_lerobot_readers()[0]
    tables = glob.glob(os.path.join(glob.escape(args.input), "meta/episodes/*/*.parquet"))
    if not tables:
        raise InputError(f"no meta/episodes/*/*.parquet in {args.input}: copied in part? fetch it again")
    keys = lerobot_cameras(info, args)
    videos = [key for key in keys.values() if info["features"][key]["dtype"] == "video"]
    columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"] + [
        f"videos/{key}/{what}" for key in videos for what in ("chunk_index", "file_index", "from_timestamp")]
    rows = {}
    for path in sorted(tables, key=natural):
        with described_by(path):                                         # a stale table may repeat some
            rows |= {int(row["episode_index"]): row
                     for row in parquet.read_table(path, columns=columns).to_pylist()}
    if len(rows) != info.get("total_episodes", len(rows)):
        print(f"meta/episodes has {len(rows)} episodes, info.json says {info['total_episodes']}")
    for index in sorted(rows):
        if drawn(str(index), args):
            yield f"episode-{index:06d}", functools.partial(lerobot_episode, rows[index], keys, info, args)


def import_lerobot_readers():
    """-> pyarrow.parquet, av: what LeRobot's tables and (AV1) videos need, an optional extra."""
    try:
        import av
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"LeRobot datasets need two packages more ({error.name} is missing): "
                         "pip install pyarrow av") from None
    return pyarrow.parquet, av


def lerobot_info(args):
    """meta/info.json, checked. InputError."""
    path = os.path.join(args.input, "meta", "info.json")
    if not os.path.isfile(path):
        raise InputError(f"no meta/info.json in {args.input}: expected a LeRobotDataset v3 folder")
    info = read_json(path)
    with described_by(path):
        keys = [key for key in ("codebase_version", "features", "data_path", "fps") if not info.get(key)]
        odd = [key for key, feature in info["features"].items()
               if not feature["dtype"] or not feature["shape"]]
        if keys or odd or not 0 < float(info["fps"]) < 1000:
            raise ValueError(f"{' '.join(keys + odd) or 'fps'} {info.get((keys or ['fps'])[0])}")
    if not str(info["codebase_version"]).startswith("v3"):
        raise InputError(f"{args.input} is a LeRobotDataset {info.get('codebase_version')}, expected v3: "
                         "convert it with LeRobot's own convert_dataset_v21_to_v30.py")
    return info


def lerobot_cameras(info, args):
    """{our name: feature} of the chosen cameras, in order; all that are not depth by default. InputError."""
    def is_depth(feature):
        about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        return about.get("is_depth_map") or about.get("video.is_depth_map")
    known = {key.removeprefix("observation.images.").removeprefix("observation."): key
             for key, feature in info["features"].items()
             if feature["dtype"] in ("video", "image") and not is_depth(feature)}
    for camera in args.cameras or []:
        if camera not in known:
            raise InputError(f"{args.input} has no camera {camera!r}, but {', '.join(known)}")
    if not known:
        raise InputError(f"{args.input} has no camera: a policy needs one")
    return {camera: known[camera] for camera in args.cameras or known}


def lerobot_vector(info, key, args):
    """Attribute of "action" or "observation.state" from info.json, or None where it has none."""
    feature = info["features"].get(key)
    if feature is None:
        return None
    names = feature.get("names") or []
    while isinstance(names, dict):                                       # {"motors": [...]}
        names = next(iter(names.values()))
    width = feature["shape"][0]
    names = [str(name) for name in names] if len(names) == width else [str(i) for i in range(width)]
    about = {"names": names, "units": ["as in the source"] * width, "frame": "as in the source",
             "gripper": "as in the source"}
    if key == "action":
        about["delta"] = [args.action_kind == "delta" and i < width - 1 for i in range(width)]
    return about


def lerobot_about(args):
    """What holds for the dataset as a whole."""
    info = lerobot_info(args)
    return {"cameras": list(lerobot_cameras(info, args)), "flip": args.flip,
            "action": lerobot_vector(info, "action", args),
            "proprio": lerobot_vector(info, "observation.state", args)}


@reads_foreign_files
def lerobot_episode(row, keys, info, args):
    """Job: one episode, from the rows of a table and the frames of one video per camera."""
    parquet, av = import_lerobot_readers()
    index, T, fps = row["episode_index"], row["length"], info["fps"]
    chosen = {key for key in keys.values() if info["features"][key]["dtype"] == "image"}
    vectors = {"actions": "action", "proprio": "observation.state"}
    vectors = {ours: key for ours, key in vectors.items() if key in info["features"]}
    place = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    try:
        table = parquet.read_table(os.path.join(args.input, place), filters=[("episode_index", "=", index)],
                                   columns=["frame_index", *vectors.values(), *chosen])
    except (OSError, ValueError) as error:           # pyarrow's own errors are among these
        raise Reject("damaged table", f"{place}: {str(error).splitlines()[0]}"[:200]) from None
    order = np.argsort(table["frame_index"].to_numpy(), kind="stable")
    if not np.array_equal(table["frame_index"].to_numpy()[order], np.arange(T)):
        raise Reject("missing frames", f"{len(order)} rows in {place}, the episode has {T} frames")
    if T < max(2, args.min_frames):
        raise Reject("too short", f"{T} frames, --min-frames {args.min_frames}")
    episode = {ours: np.array(table[key].to_pylist(), np.float32).reshape(T, -1)[order]
               for ours, key in vectors.items()}
    if "actions" in episode:
        episode["actions"] = episode["actions"][:-1]
    images = {}
    for camera, key in keys.items():
        if key in chosen:
            stored = table[key].to_pylist()
            frames = (decode_image(stored[i]["bytes"] or b"", args.image_size) for i in order)
        else:
            place = info["video_path"].format(video_key=key, chunk_index=row[f"videos/{key}/chunk_index"],
                                              file_index=row[f"videos/{key}/file_index"])
            frames = timed_frames(av, os.path.join(args.input, place), row[f"videos/{key}/from_timestamp"], T,
                                  fps)
        images[camera] = to_jpegs((FLIPS[args.flip](frame) for frame in frames), args)
    tasks = [row["tasks"]] if isinstance(row["tasks"], str) else [str(text) for text in row["tasks"] or [""]]
    return {"images": images, "instructions": tasks, "fps": fps, **episode}


FLIPS = {"none": lambda frame: frame, "vertical": lambda frame: frame[::-1],
         "horizontal": lambda frame: frame[:, ::-1], "both": lambda frame: frame[::-1, ::-1]}


def timed_frames(av, path, start, count, fps):
    """`count` frames (H, W, 3) BGR of a video from `start` seconds on. Reject unless each is at its time."""
    if not os.path.isfile(path):
        raise Reject("missing file", path)
    taken = 0
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            container.seek(int(max(0, start - 0.5 / fps) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                late = frame.time - (start + taken / fps)                # s
                if late < -0.5 / fps:
                    continue                                             # from the key frame up to the start
                if late > 0.5 / fps:
                    raise Reject("missing frames", f"{path}: none at {start + taken / fps:.3f} s")
                yield frame.to_ndarray(format="bgr24")
                taken += 1
                if taken == count:
                    return
    except (av.FFmpegError, IndexError) as error:
        raise Reject("damaged video", f"{path}: {error}"[:200]) from None
    raise Reject("truncated", f"{path}: {taken} of {count} frames from {start:.3f} s on")


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
# shard     items per shard up to 128 pixels: some 60 MB of JPEG, and little enough to do again after a kill
# about     function of the arguments -> attributes that hold for the source as such
Source = collections.namedtuple("Source", "episodes shard about")


def vector(names, units, frame, gripper, delta=None):
    """Attribute "action" or "proprio". delta: which numbers are changes per step (actions only)."""
    about = {"names": names.split(), "units": units.split(), "frame": frame, "gripper": gripper}
    return {**about, "delta": delta} if delta else about


CHANGES = [True] * 6 + [False]           # the canonical action: six changes per step, the gripper's target
VIDEO = {"cameras": [VIDEO_CAMERA], "action": None, "proprio": None}
TWIN = {"cameras": ["front", "side"],
        "action": vector("x y z rx ry rz gripper", "m m m rad rad rad 1", "robot base, change per step",
                         "1 = open, 0 = closed", CHANGES),
        "proprio": vector("x y z rx ry rz gripper", "m m m rad rad rad 1", "robot base, from tool-down",
                          "1 = open .. 0 = closed")}
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
    "sim": Source(sim_episodes, 8, lambda args: TWIN),
    "ssv2": Source(ssv2_episodes, 128, lambda args: VIDEO),
    "videos": Source(videos_episodes, 128, lambda args: VIDEO),
    "bridge": Source(bridge_episodes, 128, lambda args: {**BRIDGE, "cameras": args.cameras}),
    "libero": Source(libero_episodes, 32, lambda args: {**LIBERO, "cameras": args.cameras}),
    "lerobot": Source(lerobot_episodes, 32, lerobot_about),
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
    torch.set_num_threads(1)
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
    source = SOURCES[args.source]
    items = [(name.encode("utf-8", "backslashreplace").decode(), job) for name, job in source.episodes(args)]
    if not items:
        raise InputError(f"{args.source}: nothing to convert with these arguments (is --fraction too small?)")
    about = source.about(args)
    if getattr(args, "check", False):
        return check_items(args, items, about)
    names = hashlib.sha256("\n".join(name for name, _ in items).encode()).hexdigest()
    arguments = {**vars(args), "format_version": FORMAT_VERSION, "items": names}
    for key in ("out", "workers", "resume", "overwrite", "check", "libero_assets"):
        arguments.pop(key, None)                                 # these may differ when a run goes on
    if claim_output(args.out, arguments, "dataset.json", args):
        return 0.0
    stated = {key: arguments.pop(key) for key in ("format_version", "source", "image_size", "resize")}
    extra = {key: value for key, value in arguments.items()
             if key not in ("input", "captions", "items")}
    about = {**stated, "flip": "none", **about,
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
            write_shard(path, about, episodes, rejects)
    return finish(args.out, about, list(shards), len(items))


def check_items(args, items, about):
    """--check: read every item as the conversion would and write nothing. -> share of rejected items."""
    reasons, frames = collections.Counter(), 0
    with contextlib.closing(run_jobs([job for _, job in items], args.workers)) as results:
        for (name, _), result in zip(items, tqdm(results, args.input, len(items), unit="episode")):
            result = check_episode(result, about)
            if isinstance(result, Reject):
                reason, detail = (*result.args, "")[:2]
                reasons[reason] += 1
                tqdm.write(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
            else:
                frames += len(result["images"][about["cameras"][0]])
    return report(args.input, f"{len(items) - sum(reasons.values())} good episodes, {frames} frames",
                  len(items), reasons)


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
            width = len(about[attribute]["names"])
            if episode[key].shape[1:] != (width,):
                return Reject(f"odd {key}", f"shape {episode[key].shape}, expected {width} numbers per step")
            if not np.isfinite(episode[key]).all():
                return Reject(f"{key} not finite")
    return episode


def write_shard(path, about, episodes, rejects):
    """One shard, put together in memory and written in one go: a full disk is then a plain OSError. Takes the
    images out of the episodes on the way: there is never a second copy of them."""
    buffer = io.BytesIO()
    lengths = [len(episode["images"][about["cameras"][0]]) for episode in episodes]
    with h5py.File(buffer, "w") as f:
        for key, value in about.items():
            f.attrs[key] = value if isinstance(value, (str, int)) else json.dumps(value, sort_keys=True)
        for camera in about["cameras"]:
            sizes = [len(jpeg) for episode in episodes for jpeg in episode["images"][camera]]
            offset = np.cumsum([0] + sizes, dtype=np.int64)
            jpg = f.create_dataset(f"images/{camera}/jpg", (offset[-1],), np.uint8)
            for episode, first, end in zip(episodes, np.cumsum([0] + lengths), np.cumsum(lengths)):
                data = b"".join(episode["images"].pop(camera))
                jpg[offset[first]:offset[end]] = np.frombuffer(data, np.uint8)
            f[f"images/{camera}/offset"] = offset
        f["episode_start"] = np.cumsum([0] + lengths, dtype=np.int64)
        f["fps"] = np.array([episode["fps"] for episode in episodes], np.float32)
        for key, values in (("name", [episode["name"] for episode in episodes]),
                            ("instruction", [json.dumps(episode["instructions"]) for episode in episodes]),
                            ("rejects", [json.dumps(reject) for reject in rejects])):
            f.create_dataset(key, (len(values),), h5py.string_dtype(), data=values)
        if about["action"] and episodes:
            hold = 1 - np.array(about["action"]["delta"], np.float32)    # changes are 0, targets are repeated
            f["actions"] = np.concatenate([np.vstack([e["actions"], hold * e["actions"][-1]])
                                           for e in episodes])
        if about["proprio"] and episodes:
            f["proprio"] = np.concatenate([episode["proprio"] for episode in episodes])
        for key in episodes[0].get("extra", {}) if episodes else ():
            f[f"extra/{key}"] = np.concatenate([episode["extra"][key] for episode in episodes])
    write_atomically(path, buffer.getbuffer())


def finish(folder, about, paths, num_items):
    """Sum up the shards, write rejects.jsonl and, last, dataset.json. -> share of rejects. InputError."""
    shards, rejects, fps, instructions = [], [], [], set()
    numbers = {"actions": [], "proprio": []}
    for path in paths:
        with open_shard(path, "delete it, then --resume makes it again") as f:
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
    if not isinstance(attrs, dict) or "shards" not in attrs:
        raise InputError(f"{manifest} is not one of ours: copy or make the dataset again")
    if attrs.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} has format version {attrs.get('format_version')}, expected "
                         f"{FORMAT_VERSION}: make it again")
    return attrs, attrs.pop("shards"), file_hash(manifest)


def open_shard(path, mend="copy or make the dataset again"):
    """-> open h5py.File. InputError when it is none."""
    try:
        return h5py.File(path, "r")
    except OSError as e:
        raise InputError(f"{path} cannot be read ({str(e).splitlines()[0][:80]}): {mend}") from e


class EpisodeDataset(torch.utils.data.Dataset):
    """Windows of a prepared dataset: one for every frame t of an episode that has a frame t+stride.

    path            folder made by prepare_data.py
    chunk           n, actions per window; what reaches past the episode is padded, see the timeline above
    cameras         names, or a number: the first so many; None = all
    future          V: also return o_t .. o_t+n of the first V cameras, for the world model
    split           "all", "train" or "val", by episode, never by frame: of the episodes ordered by
                    instruction every tenth is val. So every task has its share, and so has data in which no
                    instruction comes twice
    demos_per_task  keep the first N episodes of the split for each instruction
    stride          s, frames per step: o_t, o_t+s, ..., o_t+ns. An action of s steps is the sum of their
                    changes (rotation vectors add up to first order) and the last of the other numbers
    labels          which of "actions" and "proprio" are returned, if stored

    Item: {"obs": {"images": {camera: (3, H, W) uint8}, "instruction": str, "proprio": (P,) f4 if stored},
           "frames": (n+1, 3V, H, W) uint8 if future, "actions": (n, A) f4 if stored, "is_pad": (n,) bool, "episode": int, "t": int, "instruction_id": int}.
    InputError for what the data cannot give.

    Everything in a shard lies contiguous, so a window is read with plain seeks at places noted once: no HDF5
    call, no open handle per shard. Memory: 16 bytes per frame and camera.
    """
    MAX_OPEN = 128       # open shards per process: systems allow 1024 files, Something-Something makes 1726

    def __init__(self, path, chunk, cameras=None, future=0, split="all", demos_per_task=None,
                 stride=1, labels=("actions", "proprio")):
        self.path, self.chunk, self.future, self.stride = os.fspath(path), chunk, future, stride
        self.attrs, shards, self.fingerprint = read_manifest(self.path)
        self.stats, self.fps, self.image_size = (
            self.attrs[key] for key in ("statistics", "fps", "image_size"))
        self.labels = [key for key in labels if key in self.stats]
        self.action_dim, self.proprio_dim = (
            len(self.stats[key]["min"]) if key in self.labels else None for key in ("actions", "proprio"))
        known = list(self.attrs["cameras"])
        self.cameras = known[:cameras] if cameras is None or isinstance(cameras, int) else list(cameras)
        for camera in self.cameras:
            if camera not in known:
                raise InputError(f"{path} has no camera {camera!r}, but {', '.join(known)}")
        if stride < 1:
            raise InputError(f"a stride of {stride} frames: expected 1 or more")
        self._read_index([shard["file"] for shard in shards])
        if future > len(self.cameras):
            raise InputError(f"{path} has {len(self.cameras)} of the {future} cameras asked for")
        self.episodes = self._choose(split, demos_per_task)      # indices into all episodes of the folder
        self.num_episodes = len(self.episodes)
        longest = (int(self.lengths[self.episodes].max()) - 1) // stride
        if not 1 <= chunk <= longest:
            raise InputError(f"a chunk of {chunk} actions does not fit: the longest episode of {path} "
                             f"({split}) has {longest}"
                             + f" at stride {stride}, lower --strides or" * (stride > 1)
                             + f", take 1 to {max(1, longest)}")
        self._ends = np.cumsum(np.maximum(self.lengths[self.episodes] - stride, 0))    # end of its windows
        self._files, self._pid = collections.OrderedDict(), None

    def _read_index(self, names):
        """Where everything lies, and the instruction of each episode: what is kept in memory."""
        self._paths = [os.path.join(self.path, name) for name in names]
        rows, texts, self._where = [], [], []                    # (shard, first frame, frames)
        for k, path in enumerate(self._paths):
            if not os.path.exists(path):
                raise InputError(f"{path} is missing: the dataset was copied in part, copy it again")
            with open_shard(path) as f:
                start = f["episode_start"][:].tolist()
                texts += [json.loads(text)[0] for text in f["instruction"].asstr()[:]]
                where = {key: (f[key].id.get_offset(), f[key].dtype, f[key].shape[1])
                         for key in self.labels if key in f}
                for camera in self.cameras:                      # places of its frames in the file
                    jpg, offset = f[f"images/{camera}/jpg"].id.get_offset(), f[f"images/{camera}/offset"][:]
                    where[camera] = offset + (jpg or 0)          # None: a shard of nothing but rejects
                self._where.append(where)
            rows += [(k, first, end - first) for first, end in zip(start, start[1:])]
        self._place, self.lengths = np.array(rows)[:, :2], np.array(rows)[:, 2]
        ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.instructions, self.instruction_ids = list(ids), np.array([ids[text] for text in texts])

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

    def _read(self, shard, place, count):
        """`count` bytes of a shard. Files open on first use in each process; of MAX_OPEN the oldest goes."""
        if self._pid != os.getpid():                             # a fork must not seek in its parent's files
            self._files, self._pid = collections.OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) == self.MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self._paths[shard], "rb", buffering=0)
        self._files.move_to_end(shard)
        self._files[shard].seek(place)
        data = self._files[shard].read(count)
        if len(data) < count:
            raise InputError(f"{self._paths[shard]} ends too early: copy or make the dataset again")
        return data

    def _rows(self, shard, key, first, count):
        """Rows of actions or proprio -> (count, D) float32."""
        place, dtype, width = self._where[shard][key]
        data = self._read(shard, place + first * width * dtype.itemsize, count * width * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(count, width).astype(np.float32)

    def __getstate__(self):
        return {**self.__dict__, "_files": collections.OrderedDict(), "_pid": None}    # files do not travel

    def limits(self, key):
        """{"min", "max"} of "actions" or "proprio" over the episodes of this split alone: what a policy that
        is trained on them may know. attrs["statistics"] are those of the whole dataset."""
        rows = []
        for episode in self.episodes:
            shard, start = self._place[episode]
            count = self.lengths[episode] - (key == "actions")           # not the hold action
            table = self._rows(shard, key, start, count)
            if key == "actions" and self.stride > 1:
                if count < self.stride:
                    continue                                             # it has no window
                table = self._merge(np.lib.stride_tricks.sliding_window_view(
                    table, self.stride, axis=0).swapaxes(1, 2))
            rows.append(table)
        rows = np.concatenate(rows)
        return {"min": rows.min(0), "max": rows.max(0)}

    def _merge(self, actions):
        """(..., s, A) actions of s steps -> (..., A): changes add up, of other numbers the last counts."""
        return np.where(self.attrs["action"]["delta"], actions.sum(-2), actions[..., -1, :])

    def spaced(self, most):
        """At most `most` windows, evenly spaced over all -> list of their indices."""
        return np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)).tolist()

    def __len__(self):
        return int(self._ends[-1])

    def read_frames(self, episode, camera, first, count, stride=1):
        """Frames first, first+stride, ..., the last that exists repeated. (count, 3, H, W) uint8."""
        shard, start = self._place[episode]
        real = min(count, (self.lengths[episode] - 1 - first) // stride + 1)
        places = self._where[shard][camera][start + first:start + first + (real - 1) * stride + 2]
        data = np.frombuffer(self._read(shard, places[0], places[-1] - places[0]), np.uint8)
        frames = np.empty((count, 3, self.image_size, self.image_size), np.uint8)
        for k in range(real):
            a, b = places[k * stride:k * stride + 2] - places[0]
            bgr = cv2.imdecode(data[a:b], cv2.IMREAD_COLOR)                            # (H, W, 3)
            if bgr is None:
                raise InputError(f"{self._paths[shard]} holds a damaged picture (frame {first + k * stride} "
                                 f"of episode {episode}): copy or make the dataset again")
            frames[k, 2], frames[k, 1], frames[k, 0] = cv2.split(bgr)
        frames[real:] = frames[real - 1]
        return torch.from_numpy(frames)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        i, n, s = int(np.searchsorted(self._ends, index, side="right")), self.chunk, self.stride
        episode, t = int(self.episodes[i]), int(index - (self._ends[i - 1] if i else 0))
        shard, start = map(int, self._place[episode])
        last = int(self.lengths[episode]) - 1
        count = dict.fromkeys(self.cameras[:self.future], n + 1)
        images = {c: self.read_frames(episode, c, t, count.get(c, 1), s) for c in self.cameras}
        item = {"obs": {"images": {c: frames[0] for c, frames in images.items()},
                        "instruction": self.instructions[self.instruction_ids[episode]]},
                "is_pad": t + s * torch.arange(1, n + 1) > last,         # (n,): step k ends at o_t+(k+1)s
                "episode": episode, "t": t, "instruction_id": int(self.instruction_ids[episode])}
        if self.future:
            item["frames"] = torch.cat([images[c] for c in self.cameras[:self.future]], 1)   # (n+1, 3V, H, W)
        if "proprio" in self.labels:
            item["obs"]["proprio"] = torch.from_numpy(self._rows(shard, "proprio", start + t, 1)[0])   # (P,)
        if "actions" in self.labels:                                     # the last row is the hold action
            rows = self._rows(shard, "actions", start + t, min(t + n * s, last + 1) - t)
            rows = rows[np.minimum(np.arange(n * s), len(rows) - 1)].reshape(n, s, -1)           # (n, s, A)
            item["actions"] = torch.from_numpy(self._merge(rows) if s > 1 else rows[:, 0])       # (n, A)
        return item


def even_strides(paths):
    """Frames per step in each dataset: whole numbers that bring all near the rate of the slowest."""
    rates = [read_manifest(path)[0]["fps"] for path in paths]
    return [max(1, round(rate / min(rates))) for rate in rates]


class Mixture(torch.utils.data.Dataset):
    """Windows of several datasets as one: what the training scripts draw from, also where it is only one.

    paths    folders made by prepare_data.py, of one image size
    weights  share of the drawn windows that comes from each, to any scale; None: every window is as likely
    strides  frames per step of each; None: whole numbers that make a chunk span about as long as in the
             slowest (SSv2 12 fps, LIBERO 20, Bridge 5: strides 2, 4, 1). ASSUMPTION: the paper is silent
    chunk and the rest as in EpisodeDataset. Cameras go by position and are named as in the first dataset.
    Items and attributes are EpisodeDataset's; episodes and instructions are numbered through.
    """

    def __init__(self, paths, chunk, weights=None, strides=None, **rest):
        strides = even_strides(paths) if strides is None else strides
        for name, values in (("weights", weights), ("strides", strides)):
            if values is not None and len(values) != len(paths):
                raise InputError(f"--{name} has {len(values)} numbers for {len(paths)} datasets: one each")
        if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise InputError(f"--weights {' '.join(map(str, weights))}: expected 0 or more each, not all 0")
        self.chunk = chunk
        self.parts = [EpisodeDataset(path, chunk, stride=stride, **rest)
                      for path, stride in zip(paths, strides)]
        first = self.parts[0]
        for part in self.parts[1:]:
            for key in ("image_size", "action_dim", "proprio_dim"):
                if getattr(part, key) != getattr(first, key):
                    raise InputError(f"{part.path} has {key} {getattr(part, key)}, {first.path} has "
                                     f"{getattr(first, key)}: mix what agrees, or prepare one of them again")
            if len(part.cameras) != len(first.cameras):
                raise InputError(f"{part.path} has {len(part.cameras)} cameras, {first.path} has "
                                 f"{len(first.cameras)}: mix what agrees")
            for key in [{"actions": "action"}.get(label, label) for label in first.labels]:
                if part.attrs[key] != first.attrs[key]:
                    raise InputError(f"the {key} of {part.path} is not that of {first.path}: names, units, "
                                     "frames or gripper signs differ, see their dataset.json")
        self.weights = None if weights is None else np.array(weights) / sum(weights)
        self._starts = np.cumsum([0] + [len(part) for part in self.parts])
        self._first_episode = np.cumsum([0] + [len(part.lengths) for part in self.parts])
        self.cameras, self.num_episodes = first.cameras, sum(part.num_episodes for part in self.parts)
        self.image_size, self.action_dim, self.proprio_dim = (
            first.image_size, first.action_dim, first.proprio_dim)
        self.instructions = list(dict.fromkeys(text for part in self.parts for text in part.instructions))
        ids = {text: i for i, text in enumerate(self.instructions)}
        self._instruction_ids = [[ids[text] for text in part.instructions] for part in self.parts]
        self.fingerprint = "+".join(part.fingerprint for part in self.parts)
        self.attrs = {**first.attrs, "instructions": self.instructions, "mixture": [
            {"path": part.path, "fingerprint": part.fingerprint, "stride": part.stride, "weight": share,
             "fps": part.fps} for part, share in zip(self.parts, self.shares())]}

    def shares(self):
        """Share of the drawn windows that comes from each dataset."""
        return (np.diff(self._starts) / len(self) if self.weights is None else self.weights).tolist()

    def describe(self):
        """A line per dataset: windows, share, stride and seconds that a chunk spans."""
        return "\n".join(f"{'data' if i == 0 else '':12s} {part.path}: {part.num_episodes:,} episodes, "
                         f"{len(part):,} windows, share {share:.2f}, stride {part.stride}: a chunk spans "
                         f"{part.chunk * part.stride / part.fps:.2f} s at {part.fps:g} fps"
                         for i, (part, share) in enumerate(zip(self.parts, self.shares())))

    def draw(self, rng, count):
        """Indices of `count` random windows, with replacement -> list."""
        if self.weights is None:
            return rng.integers(len(self), size=count).tolist()
        part = rng.choice(len(self.parts), size=count, p=self.weights)
        low, high = self._starts[part], self._starts[part + 1]
        return rng.integers(low, high).tolist()

    def limits(self, key):
        """As EpisodeDataset.limits, over all datasets."""
        limits = [part.limits(key) for part in self.parts]
        return {"min": np.min([x["min"] for x in limits], 0), "max": np.max([x["max"] for x in limits], 0)}

    spaced = EpisodeDataset.spaced

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        item = self.parts[k][int(index - self._starts[k])]
        item["obs"]["images"] = dict(zip(self.cameras, item["obs"]["images"].values()))
        return {**item, "episode": item["episode"] + int(self._first_episode[k]),
                "instruction_id": self._instruction_ids[k][item["instruction_id"]]}


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
        for key in ("image_size", "workers", "resume", "overwrite"):
            setattr(ssv2, key, getattr(args, key))
        rejected = max(rejected, film_hand_videos(hand_args, places["hand_videos"]), convert(ssv2))
    return rejected


def inspect(args):
    """inspect: print what a dataset holds, and draw a contact sheet; --check: read every byte of it first."""
    if args.check:
        verify(args.data)
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
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InputError(f"no folder for --contact-sheet {path}")
    write_atomically(path, cv2.imencode(".png", contact_sheet(data))[1].tobytes())
    print(f"{'contact sheet':>15}  {path}")
    return 0.0


def verify(folder):
    """InputError unless every shard is the one that dataset.json knows, and every picture in it decodes."""
    attrs, shards, _ = read_manifest(folder)
    for shard in tqdm(shards, f"{folder}, check", unit="shard"):
        path = os.path.join(folder, shard["file"])
        if not os.path.exists(path) or file_hash(path) != shard["sha256"]:
            raise InputError(f"{path} is missing or not the file that was written: copy or make the dataset "
                             "again")
    data = EpisodeDataset(folder, chunk=1)
    for episode in tqdm(data.episodes, f"{folder}, frames", unit="episode"):
        for camera in data.cameras:
            data.read_frames(episode, camera, 0, int(data.lengths[episode]))
    found = {"episodes": len(data.lengths), "frames": int(data.lengths.sum()),
             "instructions": len(data.instructions)}
    if any(found[key] != attrs["counts"][key] for key in found):
        raise InputError(f"{folder} has {found}, dataset.json says {attrs['counts']}: make the dataset again")
    print(f"{folder}: {len(shards)} shards, {found['frames']} frames, {len(data.cameras)} cameras: all good")


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
    about = {"sim": "film the twin", "ssv2": "Something-Something v2", "bridge": "BridgeData V2, raw",
             "libero": "LIBERO's HDF5 files", "lerobot": "a LeRobotDataset v3",
             "videos": "a folder of videos", "inspect": "numbers and a contact sheet"}
    commands = parser.add_subparsers(dest="source", required=True, metavar="|".join(about))
    sim, ssv2, bridge, libero, lerobot, videos, look = (
        commands.add_parser(name, help=what, formatter_class=show) for name, what in about.items())
    words = {"type": lambda value: [word.strip() for word in value.split(",")]}
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
    bridge.add_argument("--cameras", default="front", **words, help="comma-separated, the main one first: "
                        "front (over the shoulder, images0), images1, ..., or by config.json: wrist, blue, "
                        "...; trajectories without one of them are rejected")
    libero.add_argument("--cameras", default="agentview,wrist", help="comma-separated", **words)
    libero.add_argument("--render", action="store_true", help="draw the images from the states, with the "
                        "simulator: for files without images, or another --image-size")
    libero.add_argument("--drop-noops", action="store_true", help="leave out steps in which nothing is "
                        "commanded, as openvla's data; the paper and the release keep them")
    libero.add_argument("--keep-failures", action="store_true", help="keep demonstrations that do not "
                        "succeed (known for processed files and with --render)")
    libero.add_argument("--libero-assets", metavar="FOLDER", help="meshes and textures for --render; None = "
                        "$LIBERO_ASSETS, else the package's own")
    lerobot.add_argument("--cameras", **words, help="comma-separated, the main one first; None = all, in the "
                         "dataset's order")
    lerobot.add_argument("--action-kind", choices=("delta", "absolute"), default="delta", help="delta: all "
                         "but the last number are changes per step (LIBERO, Bridge); absolute: targets")
    lerobot.add_argument("--flip", choices=FLIPS, default="none", help="turn stored images upright; LIBERO "
                         "data turned by 180 degrees (openvla's way) is mirrored: horizontal")
    videos.add_argument("--captions", type=os.path.abspath, help="CSV with the columns file,instruction and, "
                        "to cut clips out of long files, start,end (seconds)")
    videos.add_argument("--instruction", default="", help="one for all videos, without --captions")
    for command in (ssv2, videos):
        command.add_argument("--stride", type=int, default=1, help="keep one frame of so many; better left "
                             "to --strides in training, unless the frames are too many to store")
    sources = {ssv2: "data/ssv2", bridge: "data/bridge", libero: "data/libero", lerobot: "data/lerobot",
               videos: "data/videos"}
    for command in sources:
        group = command.add_argument_group("input and frames")
        group.add_argument("--input", type=os.path.abspath, required=True, help="folder, or file")
        group.add_argument("--fraction", type=float, default=1.0, help="random share of episodes; paper: 0.1 "
                           "of Something-Something")
        group.add_argument("--seed", type=int, default=0, help="which share --fraction is")
        group.add_argument("--min-frames", type=int, default=12, help="shorter ones are rejected (frames)")
        group.add_argument("--resize", choices=("squash", "crop"), default="squash",
                           help="squash changes the aspect ratio (as the release), crop cuts a square")
        group.add_argument("--check", action="store_true", help="read everything as the conversion would, "
                           "print what would be rejected and why, write nothing")
    for command, out in ({sim: "data"} | sources).items():
        group = command.add_argument_group("output")
        group.add_argument("--out", default=out, help="folder; sim makes robot, hand_videos and hand in it")
        group.add_argument("--image-size", type=int, default=64 if command is sim else 128,
                           help="pixels; paper: 128")
        group.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 = no others")
        group = group.add_mutually_exclusive_group()
        group.add_argument("--resume", action="store_true", help="finish what was begun")
        group.add_argument("--overwrite", action="store_true", help="replace what is there")
    look.add_argument("data", help="dataset")
    look.add_argument("--check", action="store_true", help="compare every shard's hash, decode every frame")
    look.add_argument("--contact-sheet", metavar="PNG", help="None = contact_sheet.png in the dataset")
    return parser


def main(argv=None):
    """Run one command. InputError when too much was rejected; the dataset is written all the same."""
    args = build_parser("--smoke" in (sys.argv[1:] if argv is None else argv)).parse_args(argv)
    for key, low in (("image_size", 8), ("workers", 1), ("min_frames", 2), ("spread", 0), ("stride", 1),
                     ("seed", 0), ("demos_per_task", 0), ("hand_videos_per_task", 0)):
        if getattr(args, key, low) < low:
            raise InputError(f"--{key.replace('_', '-')} {getattr(args, key)}: expected {low} or more")
    if not 0 < getattr(args, "fraction", 1) <= 1:
        raise InputError(f"--fraction {args.fraction}: expected a share above 0, 1 for all")
    cameras = getattr(args, "cameras", None) or []
    if len(set(cameras)) < len(cameras) or "" in cameras or (
            args.source == "libero" and not set(cameras) <= set(LIBERO_CAMERAS)):
        raise InputError(f"--cameras {','.join(cameras)}: expected different names"
                         + f" out of {', '.join(LIBERO_CAMERAS)}" * (args.source == "libero"))
    if getattr(args, "out", ".") == "":
        raise InputError("--out is empty: give a folder")
    rejected = {"sim": film_twin, "inspect": inspect}.get(args.source, convert)(args)
    if rejected > MAX_REJECTED:
        done = "nothing was written" if getattr(args, "check", False) else "the dataset is written"
        raise InputError(f"{100 * rejected:.0f} % of all items rejected (above {100 * MAX_REJECTED:.0f}): "
                         f"{done}, but look at the reasons above before you use it")


if __name__ == "__main__":
    run(main)

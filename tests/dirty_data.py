"""A small tree of every source with all the dirt of the real ones, and a table of what becomes of each item.

    python tests/dirty_data.py        # makes them in a temporary folder, converts them, prints the table

Pictures count: 4 x 4 blocks hold 64 * episode + frame in binary, which shows a scrambled, repeated or black
frame. Actions and states hold the step's number. Everything here is synthetic.
"""
import collections
import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import unicodedata
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import h5py
import numpy as np

os.environ["SVT_LOG"] = "1"       # the AV1 encoder prints errors alone
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare_data  # noqa: E402
from models import InputError  # noqa: E402

SIZE = 32
PAGE = b"<!DOCTYPE html><html>404</html>"
Item = collections.namedtuple("Item", "name dirt expected")      # expected: "T frames" or the reject's reason


# ---- pictures, videos, damage ------------------------------------------------------------------------------

def picture(episode, frame, height=64, width=64):
    """(H, W, 3) uint8 that says 64 * episode + frame; one bit is always set, so it is never of one colour."""
    number = 64 * episode + frame + 2 ** 15
    bits = np.array([number >> i & 1 for i in range(16)], np.uint8).reshape(4, 4)
    blocks = cv2.resize(bits * 200 + 20, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.repeat(blocks[..., None], 3, axis=2)


def black(episode, frame, height=64, width=64):
    return np.zeros((height, width, 3), np.uint8)


def grainy(episode, frame):
    """Grain makes a video large, so that its header is a small part of it."""
    grain = np.random.default_rng(episode).integers(-15, 16, (120, 212, 3))
    return (picture(episode, frame, 120, 212) + np.roll(grain, 9 * frame, 1)).astype(np.uint8)


def read_picture(frame):
    """(3, H, W) uint8 -> (episode, frame)."""
    side = frame.shape[-1] // 4
    blocks = np.asarray(frame, float).reshape(3, 4, side, 4, side)[:, :, 2:-2, :, 2:-2].mean((0, 2, 4)) > 120
    number = sum(int(bit) << i for i, bit in enumerate(blocks.flatten())) - 2 ** 15
    return number // 64, number % 64


def write_video(path, pictures, fps=12, codec="libvpx", times=None, skip=0):
    """Pictures (H, W, 3) BGR as a video. times: when each is shown, in frames; skip: so many are cut off the
    start without encoding again (ffmpeg -ss ... -c copy does that), by an edit list of an mp4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures[0].shape[:2]
    options = {"libvpx": {"b": "4M", "deadline": "realtime", "cpu-used": "8"},
               "libx264": {"b": "4M", "g": "12", "bf": "0"}, "libsvtav1": {"crf": "20", "g": "2"}}
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if skip else {}) as container:
        stream = container.add_stream(codec, rate=fps, width=width, height=height, pix_fmt="yuv420p",
                                      options=options.get(codec.removesuffix("-vp9"), {"b": "4M"}))
        for t, picture in enumerate([*pictures, None]):
            frame = picture if picture is None else av.VideoFrame.from_ndarray(picture, format="bgr24")
            if frame:
                frame.time_base, frame.pts = Fraction(1, fps), t if times is None else times[t]
            for packet in stream.encode(frame):
                packet.pts, packet.dts = packet.pts - skip, packet.dts - skip
                container.mux(packet)


def numbers(episode, count):
    """(count, 7): the step's number, the episode's, zeros, a gripper that opens half-way."""
    rows = np.zeros((count, 7))
    rows[:, 0], rows[:, 1], rows[:, 6] = np.arange(count), episode, np.arange(count) >= count // 2
    return rows


def damage(path, change):
    """Replace a file by bytes, or by change(its bytes). None removes it."""
    change = change(path.read_bytes()) if callable(change) else change
    path.unlink(missing_ok=True) if change is None else path.write_bytes(change)


def cut(share):
    return lambda data: data[:int(len(data) * share)]


def hole(data):
    """Zeros in place of 2,000 bytes, 3,000 before the end."""
    return data[:-3000] + bytes(2000) + data[-1000:]


def flip(count, first=400):
    """Invert some bytes."""
    def change(data):
        data = bytearray(data)
        for i in np.random.default_rng(0).integers(first, len(data), count):
            data[i] ^= 255
        return bytes(data)
    return change


class Bomb:
    """What a pickle can do when it is loaded: run a command."""
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


# ---- Something-Something v2 --------------------------------------------------------------------------------

GARBAGE = "24 frames with garbage or truncated"                  # the VP9 decoder conceals it: nothing tells
SSV2 = [
    ("nothing", "24 frames", {}),
    ("id is a number, not a string", "24 frames", {"id": int}),
    ("label differs from its template", "24 frames", {"label": "pushing a stress reliever"}),
    ("label has / and \\", "24 frames", {"label": "pulling a/c remote, a\\c remote"}),
    ("label has a Cyrillic letter", "24 frames", {"label": "holding \u0430 cup"}),
    ("same label as another clip", "24 frames", {}),
    ("spaces and a line break in the label", "24 frames", {"label": "  pushing \n it "}),
    *((f"cut off at {share:.0%}", "truncated", {"data": cut(share)}) for share in (0.02, 0.3, 0.6, 0.85)),
    ("a hole of zeros inside", GARBAGE, {
        "data": lambda data: data[:len(data) // 2] + bytes(3000) + data[len(data) // 2 + 3000:]}),
    ("60 flipped bytes", GARBAGE, {"data": flip(60)}),
    ("0 bytes", "empty file", {"data": b""}),
    ("nothing but zeros", "not a video", {"data": bytes(9000)}),
    ("a login page", "not a video", {"data": PAGE}),
    ("listed, but no file", "missing file", {"data": None}),
    ("11 frames", "too short", {"frames": 11}),
    ("12 frames", "12 frames", {"frames": 12}),
    ("all black", "blank frames", {"shown": black})]


def make_ssv2(root):
    clips, labels = root / "20bn-something-something-v2", []
    for number, (_, _, more) in enumerate(SSV2, 1):
        frames = [more.get("shown", grainy)(number, t) for t in range(more.get("frames", 24))]
        write_video(clips / f"{number}.webm", frames, codec="libvpx-vp9")
        damage(clips / f"{number}.webm", more.get("data", bytes))
        labels.append({"id": more.get("id", str)(number), "label": more.get("label", "pushing it"),
                       "template": "Pushing [something]", "placeholders": ["it"]})
    write_video(clips / "99999.webm", frames)                             # no label: not an item
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps(labels[::2]))
    (root / "labels" / "validation.json").write_text(json.dumps(labels[1::2]))
    return [Item(str(number), dirt, expected) for number, (dirt, expected, _) in enumerate(SSV2, 1)]


# ---- videos ------------------------------------------------------------------------------------------------

UMLAUT = unicodedata.normalize("NFD", "k\u00fcche.m4v")
VARIABLE = [*range(24), 24, 26, 28, 30, *range(32, 40)]          # times of a phone's frames: of 40, four lack
FILMS = [                                                         # file, frames, how it is written, damage
    ("whole.mp4", range(24), {"codec": "mpeg4"}, bytes),
    ("deep/UPPER.MKV", range(24), {}, bytes),
    ("long.mp4", range(60), {"codec": "mpeg4", "fps": 10}, bytes),
    ("long.webm", range(60), {"fps": 10}, bytes),
    ("page.mp4", (), {}, PAGE), ("empty.mov", (), {}, b""),
    ("trim.mp4", range(40), {"codec": "libx264", "skip": 6}, bytes),
    ("av1.mp4", range(24), {"codec": "libsvtav1"}, bytes),
    ("phone.mp4", VARIABLE, {"codec": "libx264", "times": VARIABLE}, bytes),
    ("hole.mp4", range(24), {"codec": "libx264", "times": [t + 12 * (t > 11) for t in range(24)]}, bytes),
    ("flipped.mp4", range(40), {"codec": "libx264"}, flip(10, 20_000)),
    (UMLAUT, range(24), {"codec": "libx264"}, bytes)]
CAPTIONS = [                                                      # dirt, expected, file, start, end
    ("nothing", "24 frames", "whole.mp4"),
    ("ending in capitals, in a folder", "24 frames", "deep/UPPER.MKV"),
    *((dirt, expected, file, start, end) for file in ("long.mp4", "long.webm")
      for dirt, expected, start, end in (
          ("cut at the start", "15 frames", 0, 1.5), ("cut in the middle", "20 frames", 2, 4),
          ("times between two frames", "19 frames", 2.05, 3.95),
          ("end is past the file's end", "truncated", 5, 7),
          ("shorter than --min-frames", "too short", 1, 1.5))),
    ("a web page", "not a video", "page.mp4"),
    ("0 bytes", "empty file", "empty.mov"),
    ("6 of 40 frames cut off by an edit list", "34 frames", "trim.mp4"),
    ("AV1", "24 frames", "av1.mp4"),
    ("variable frame rate", "40 frames with garbage", "phone.mp4"),       # the frames before are repeated
    ("variable frame rate, cut before that", "18 frames", "phone.mp4", 0, 1.5),
    ("no frame for a second", "missing frames", "hole.mp4"),
    ("10 flipped bytes in H.264", "damaged video", "flipped.mp4"),
    ("its umlaut is one character in the CSV", "24 frames", UMLAUT)]


def make_videos(root):
    """Whole files and clips cut out of long ones; the CSV is captions.csv beside the folder."""
    for e, (file, frames, how, change) in enumerate(FILMS):
        if frames:
            write_video(root / file, [grainy(e, t) for t in frames], **how)
        damage(root / file, change)
    (root / "notes.txt").write_text("not a video")
    items, rows = [], ["\ufefffile,instruction,start,end"]
    for dirt, expected, file, *span in CAPTIONS:
        start, end = span or ("", "")
        rows.append(f'{unicodedata.normalize("NFC", file)},"move it",{start},{end}')
        items.append(Item(f"{file}@{start:g}-{end:g}" if span else file, dirt, expected))
    (root.parent / "captions.csv").write_text("\n".join(rows) + "\n")
    return items


# ---- BridgeData V2 -----------------------------------------------------------------------------------------

DAY = "raw/bridge_data_v2/kitchen/task/{e:02d}/2023-07-11_14-06-57"
OLD = "raw/bridge_data_v1/berkeley/sink/task/2021-06-02_10-00-00"
IMAGE, POLICY, WRIST = "images0/im_5.jpg", "policy_out.pkl", [
    {"name": "/D435/color/image_raw"}, {"name": "/wrist/image_raw"}]


def bridge_rows(bomb):
    """(dirt, expected, settings). where: folder; T: images; late: pictures one step late; actions, state:
    what becomes of the (T-1, 7) and (T, 7) numbers; files: {name: damage}."""
    return [
        ("nothing; 14 images, so im_10 sorts before im_2", "14 frames", {}),
        ("a level less above the date (v1)", "14 frames",
         {"where": "raw/bridge_data_v1/berkeley/sink/task{e}/2022-01-02_10-00-00"}),
        ("a level more", "14 frames", {"where": "raw/rss/more/kitchen/task/{e}/2022-01-02_10-00-00"}),
        ("no date above it (scripted)", "14 frames", {"where": "scripted_raw/sweep{e}"}),
        ("640 x 480 pixels", "14 frames", {"size": (480, 640)}),
        ("pictures smaller than asked for", "14 frames", {"size": (24, 24)}),
        ("before 2021-07-23: pictures one step late", "13 frames", {"where": OLD, "late": True}),
        ("the same, one row of state fewer", "13 frames", {
            "where": OLD.replace("task", "task2"), "late": True, "state": lambda rows: rows[:-1]}),
        ("the day before", "13 frames", {"where": OLD.replace("2021-06-02", "2021-07-22"), "late": True}),
        ("the day itself", "14 frames", {"where": OLD.replace("2021-06-02", "2021-07-23")}),
        ("policy_out is a list of arrays", "14 frames", {"actions": list}),
        ("policy_out is one array", "14 frames", {"actions": np.array}),
        ("no lang.txt", "14 frames", {"files": {"lang.txt": None}}),
        ("an empty lang.txt", "14 frames", {"files": {"lang.txt": b""}}),
        ("lang.txt without a last newline", "14 frames", {"files": {"lang.txt": b"take it"}}),
        ("two annotations and a confidence line", "14 frames", {
            "files": {"lang.txt": b"take it\nconfidence: 0.9\ngrab  it \n\ntake it\n"}}),
        ("lang.txt in Mac Roman", "14 frames", {
            "files": {"lang.txt": "put the caf\u00e9 there\n".encode("mac_roman")}}),
        ("lang.txt with Windows line ends", "14 frames", {"files": {"lang.txt": b"take it\r\n"}}),
        ("obs_dict.pkl missing", "missing file", {"files": {"obs_dict.pkl": None}}),
        ("policy_out.pkl missing", "missing file", {"files": {POLICY: None}}),
        ("both missing", "missing file", {"files": {POLICY: None, "obs_dict.pkl": None}}),
        ("im_7.jpg missing", "missing frames", {"files": {"images0/im_7.jpg": None}}),
        ("im_0.jpg missing", "missing frames", {"files": {"images0/im_0.jpg": None}}),
        ("as many images as actions", "frame count", {"files": {"images0/im_13.jpg": None}}),
        ("an action more", "frame count", {"actions": lambda rows: [*rows, rows[-1]]}),
        ("a stray image with a time in its name", "missing frames", {
            "files": {"images0/im_1689083217.jpg": b"x"}}),
        ("a hole of zeros in an image", "damaged image", {"size": (480, 640), "files": {IMAGE: hole}}),
        ("images0 is a link to a folder", "14 frames", {"link": True}),
        ("no images at all", "no such camera", {"cameras": 0}),
        ("a stray file among the images", "14 frames", {"files": {"images0/Thumbs.db": b"x"}}),
        ("an image cut off", "damaged image", {"files": {IMAGE: lambda data: data[:-400]}}),
        ("an image of 0 bytes", "damaged image", {"files": {IMAGE: b""}}),
        ("an image that is a web page", "damaged image", {"files": {IMAGE: PAGE}}),
        ("all images black", "blank frames", {"shown": black}),
        ("policy_out.pkl runs os.system", "unsafe pickle", {"files": {POLICY: pickle.dumps(bomb)}}),
        ("obs_dict.pkl runs os.system", "unsafe pickle", {"state": lambda rows: bomb}),
        ("policy_out.pkl names a class", "unsafe pickle", {
            "actions": lambda rows: [{"actions": np.zeros(7), "policy_type": collections.Counter}]}),
        ("policy_out.pkl cut off", "damaged pickle", {"files": {POLICY: lambda data: data[:200]}}),
        ("policy_out.pkl is a text", "damaged pickle", {"files": {POLICY: b"hello"}}),
        ("policy_out.pkl of 0 bytes", "damaged pickle", {"files": {POLICY: b""}}),
        ("no actions in policy_out", "odd policy_out.pkl", {"actions": lambda rows: [{"policy_type": "VR"}]}),
        ("6 numbers per action", "odd policy_out.pkl", {"actions": lambda rows: list(rows[:, :6])}),
        ("no actions", "odd policy_out.pkl", {"actions": lambda rows: []}),
        ("NaN in an action", "actions not finite", {"actions": lambda rows: list(rows * np.nan)}),
        ("infinity in a state", "proprio not finite", {"state": lambda rows: rows + np.inf}),
        ("rows of state of different length", "no full_state", {"state": lambda rows: [[1.0], *rows]}),
        ("state is a text", "no full_state", {"state": lambda rows: "full"}),
        ("a number that no float holds", "odd policy_out.pkl", {"actions": lambda rows: [[10 ** 400] * 7]}),
        ("state of six numbers", "no full_state", {"state": lambda rows: rows[:, :6]}),
        ("a row of state missing, though recent", "state count", {"state": lambda rows: rows[:-1]}),
        ("5 images", "too short", {"T": 5}),
        ("a date that does not exist", "bad date", {"where": "raw/icra/x/task{e}/2021-13-45_10-00-00"}),
        ("the only trajectory of its directory", "14 frames", {
            "where": "raw/flap/only/one/00/2022-05-05_10-00-00"}),
        ("a wrist camera beside it", "14 frames", {
            "cameras": 2, "config": {"agent": {"env": ["class", {"camera_topics": WRIST}]}}})]


def make_bridge(root):
    """Trajectories at both depths. What a Bomb would do is make the file `executed` beside the tree."""
    bomb, items = Bomb(f"touch {root.parent / 'executed'}"), []

    def write(e, where=DAY, T=14, cameras=1, size=(120, 160), late=False, shown=picture, actions=None,
              state=np.array, files={}, link=False, config={}):
        name = f"{where.format(e=e)}/raw/traj_group0/traj{e}"
        folder = root / name
        (folder / "depth_images0").mkdir(parents=True)
        for k in range(cameras):
            (folder / f"images{k}").mkdir()
            for j in range(T):
                cv2.imwrite(str(folder / f"images{k}" / f"im_{j}.jpg"),
                            shown(e + 100 * k, max(0, j - 1) if late else j, *size))
        rows = numbers(e, T - 1)
        steps = actions(rows) if actions else [
            {"actions": row, "new_robot_transform": np.eye(4), "policy_type": "VR"} for row in rows]
        observed = {"full_state": state(numbers(e, T)), "qpos": np.zeros((T, 6)), "env_done": [False] * T}
        for file, value in (("policy_out.pkl", steps), ("obs_dict.pkl", observed), ("agent_data.pkl", bomb)):
            (folder / file).write_bytes(pickle.dumps(value))              # agent_data.pkl is never opened
        (folder / "depth_images0" / "im_0.png").write_bytes(b"depth")
        (folder / "lang.txt").write_bytes(b"put it there\n")
        (folder.parents[2] / "config.json").write_text(json.dumps(config))
        for file, change in files.items():
            damage(folder / file, change)
        if link:
            (folder / "images0").rename(folder / "other")
            (folder / "images0").symlink_to("other")
        return name

    for e, (dirt, expected, more) in enumerate(bridge_rows(bomb), 1):
        items.append(Item(write(e, **more), dirt, expected))
    lmdb = root / "raw/rss/kitchen/task/00/lmdb/raw/traj_group0/traj0"    # stands beside the dates
    shutil.copytree(root / items[0].name, lmdb)
    return items


def zip_tree(root, path, compression=zipfile.ZIP_DEFLATED):
    """The tree as a zip, members in the order in which `zip -r` walks."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for folder, _, names in os.walk(root, followlinks=True):
            for name in names:
                archive.write(os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), root))


# ---- LIBERO ------------------------------------------------------------------------------------------------

def libero_demo(group, key, episode, T=16, kind="raw", **replace):
    """One demonstration. World time k: states[k], seen as picture k, in which actions[k] is commanded.
    replace: {name: what becomes of that array; None removes it}."""
    demo, seen = group.create_group(key), (np.arange(T) + 1 if kind == "raw" else np.arange(T))
    actions = numbers(episode, T)
    actions[:, 6] = 2 * actions[:, 6] - 1
    joints = np.linspace(0, 1, T + 1)[:, None] * np.ones(7)
    states = np.hstack([np.arange(T)[:, None] / 20, joints[:T], np.zeros((T, 12))])
    front, wrist = (np.stack([picture(episode + shift, k, SIZE, SIZE) for k in seen]) for shift in (0, 100))
    place = numbers(episode, T + 1)[seen]
    if kind == "processed":
        turn = np.tile(np.diag([1.0, -1.0, -1.0, 1.0]), (T, 1, 1))        # the hand points down
        obs = {"agentview_image": front, "robot0_eye_in_hand_image": wrist, "robot0_eef_pos": place[:, :3],
               "hand_mat": turn, "robot0_gripper_qpos": place[:, 5:7]}
        data = {"actions": actions, "success": np.arange(T) == T - 1, "states": np.zeros(0)}
    else:
        obs = {"agentview_rgb": front[:, ::-1], "eye_in_hand_rgb": wrist[:, ::-1], "ee_pos": place[:, :3],
               "ee_ori": np.tile([np.pi, 0, 0], (T, 1)), "gripper_states": place[:, 5:7],
               "joint_states": joints[seen]}
        data = {"actions": actions, "states": states, "rewards": np.arange(T) == T - 1}
    for name, value in (data | {f"obs/{name}": value for name, value in obs.items()}).items():
        change = replace.get(name, np.asarray)
        if change:
            demo[name] = change(value)


OPENGL = {"macros_image_convention": "opengl", "tag": "libero-v1",
          "problem_info": json.dumps({"language_instruction": "put it away"})}
PROCESSED, RGB = {"kind": "processed"}, ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
FAILED = {"kind": "processed", "success": lambda success: success * False}
LIBERO = [                                            # file, attributes, [(key, dirt, expected, change)]
    ("put_it_away", OPENGL, [
        ("demo_10", "sorts before demo_2 as text", "16 frames", {}),
        ("demo_2", "nothing", "16 frames", {}),
        ("demo_3", "a camera missing", "no such camera", {RGB[1]: None}),
        ("demo_4", "an image less than actions", "odd lengths", {RGB[0]: lambda x: x[1:]}),
        ("demo_5", "NaN in the actions", "actions not finite", {"actions": lambda x: x * np.nan}),
        ("demo_6", "5 steps", "too short", {"T": 5}),
        ("demo_7", "black images", "blank frames", {RGB[0]: lambda x: x * 0}),
        ("demo_8", "ee_pos missing", "unreadable", {"obs/ee_pos": None}),
        ("demo_9", "NaN in joint_states", "states not finite", {"obs/joint_states": lambda x: x * np.nan}),
        ("demo_11", "images with four channels", "odd images", {RGB[0]: lambda x: x[..., [0, 1, 2, 0]]}),
        ("demo_12", "images as floats", "odd images", {RGB[0]: lambda x: x / 255}),
        ("demo_13", "one finger", "odd proprio", {"obs/gripper_states": lambda x: x[:, :1]}),
        ("demo_14", "states alone among others with images", "no such camera", dict.fromkeys(RGB)),
        ("demo_15", "actions are texts", "odd lengths", {"actions": lambda x: np.array([b"a"] * 16)})]),
    ("KITCHEN_SCENE1_open_it", {"macros_image_convention": "opengl"}, [
        ("demo_0", "no problem_info: name says it", "16 frames", {})]),
    ("quoted", {"problem_info": json.dumps({"language_instruction": '"turn it on"'})}, [
        ("demo_0", "instruction in quotes", "16 frames", {})]),
    ("listed", {"problem_info": json.dumps({"language_instruction": ["turn", "it", "off"]})}, [
        ("demo_0", "instruction is a list of words", "16 frames", {})]),
    ("replayed", {}, [("demo_1", "observed before the action (openvla)", "16 frames", {"kind": "replayed"})]),
    ("opencv", {"macros_image_convention": "opencv"}, [
        ("demo_0", "images upright in the file", "16 frames", dict.fromkeys(RGB, lambda x: x[:, ::-1]))]),
    ("processed", OPENGL, [("demo_0", "processed: upright, before the action", "16 frames", PROCESSED),
                           ("demo_1", "did not succeed", "no success", FAILED)]),
    ("all_failed", OPENGL, [
        (f"demo_{i}", "no demonstration of its task succeeds", "no success", FAILED) for i in (0, 1)])]
NO_LIBERO = [("cut", "cut off half-way", "damaged file"), ("page", "a web page", "damaged file"),
             ("none", "0 bytes", "damaged file"), ("other", "HDF5 of something else", "not LIBERO's layout"),
             ("bare", "no demonstration in it", "not LIBERO's layout")]


def make_libero(root):
    root.mkdir(parents=True)
    items = [Item(f"{name}_demo.hdf5", dirt, expected) for name, dirt, expected in NO_LIBERO]
    for file, attrs, demos in LIBERO:
        with h5py.File(root / f"{file}_demo.hdf5", "w") as f:
            data = f.create_group("data")
            data.attrs.update(attrs)
            for key, dirt, expected, change in demos:
                items.append(Item(f"{file}_demo.hdf5/{key}", dirt, expected))
                libero_demo(data, key, len(items), **change)
    damage(root / "cut_demo.hdf5", cut(0.5)((root / "put_it_away_demo.hdf5").read_bytes()))
    damage(root / "page_demo.hdf5", PAGE)
    damage(root / "none_demo.hdf5", b"")
    for name, group in (("other", "x"), ("bare", "data")):
        with h5py.File(root / f"{name}_demo.hdf5", "w") as f:
            f.create_group(group)
    return items


# ---- LeRobotDataset v3 -------------------------------------------------------------------------------------

def edit(**columns):
    """Change of a table {column: list of values}: {column: function of its array}."""
    return lambda table: table | {key: f(np.array(table[key])).tolist() for key, f in columns.items()}


LEROBOT = [                                           # file: number of the table and of the videos
    ("nothing", "15 frames", {}),
    ("begins in the middle of a video", "15 frames", {"tasks": ["move it", "shove it"]}),
    ("an odd number of frames before it", "14 frames", {"T": 14}),
    ("rows of the table in disorder", "15 frames", {
        "change": lambda table: {key: values[::-1] for key, values in table.items()}}),
    ("a row missing", "missing frames", {
        "change": lambda table: {key: values[:7] + values[8:] for key, values in table.items()}}),
    ("NaN in the actions", "actions not finite", {"change": edit(action=lambda rows: rows * np.nan)}),
    ("5 frames", "too short", {"T": 5}),
    ("black dummy camera", "blank frames", {"shown": black}),
    ("no task", "15 frames", {"tasks": []}),
    ("last of its file", "15 frames", {}),
    ("another file", "15 frames", {"file": 1}),
    ("actions of different width", "unreadable", {
        "file": 1, "change": lambda table: table | {"action": [[1.0], *table["action"][1:]]}}),
    ("the video ends too early", "truncated", {"file": 1, "frames": 9}),
    ("its video is missing", "missing file", {"file": 2, "video": None}),
    ("its video is cut off", "damaged video", {"file": 3, "video": lambda data: data[:300]}),
    ("its video is a web page", "damaged video", {"file": 4, "video": PAGE}),
    ("its table is cut off", "damaged table", {"file": 5, "table": lambda data: data[:200]}),
    ("its table is missing", "missing file", {"file": 6, "table": None}),
    ("its task changes half-way", "several tasks", {
        "file": 7, "tasks": ["move it", "shove it"],
        "change": edit(task_index=lambda rows: np.arange(len(rows)) // 8)})]
LEROBOT_FPS, LEROBOT_CODECS = 10, {"front": "libsvtav1", "wrist": "libx264"}      # AV1 is LeRobot's default
LEROBOT_INFO = {
    "codebase_version": "v3.0", "fps": LEROBOT_FPS, "total_episodes": len(LEROBOT), "robot_type": "none",
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "features": {"observation.images.front": {"dtype": "video", "shape": [64, 64, 3]},
                 "observation.images.wrist": {"dtype": "video", "shape": [64, 64, 3]},
                 "observation.images.depth": {"dtype": "video", "shape": [64, 64, 1],
                                              "info": {"video.is_depth_map": True}},
                 "task_index": {"dtype": "int64", "shape": [1]},
                 "action": {"dtype": "float32", "shape": [7], "names": {"motors": list("xyzabcg")}},
                 "observation.state": {"dtype": "float32", "shape": [7], "names": list("xyzabcg")}}}


def make_lerobot(root):
    """Tables and, per camera, videos of several episodes. Needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    def write_table(table, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)

    rows, tables, films = [], collections.defaultdict(list), collections.defaultdict(list)
    for e, (_, _, more) in enumerate(LEROBOT):
        T, file, shown = more.get("T", 15), more.get("file", 0), more.get("shown", picture)
        row = {"episode_index": e, "tasks": more.get("tasks", ["move it"]), "length": T,
               "data/chunk_index": 0, "data/file_index": file}
        for k, camera in enumerate(LEROBOT_CODECS):
            key = f"videos/observation.images.{camera}"
            row |= {f"{key}/chunk_index": 0, f"{key}/file_index": file,
                    f"{key}/from_timestamp": len(films[camera, file]) / LEROBOT_FPS}
            films[camera, file] += [shown(e + 100 * k, t) for t in range(more.get("frames", T))]
        rows.append(row)
        steps = numbers(e, T).tolist()
        tables[file].append(more.get("change", dict)(
            {"episode_index": [e] * T, "frame_index": list(range(T)), "action": steps,
             "observation.state": steps, "task_index": [0] * T}))
    for (camera, file), frames in films.items():
        path = root / f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"
        write_video(path, frames, LEROBOT_FPS, LEROBOT_CODECS[camera])
    for file, parts in tables.items():
        whole = {key: sum((part[key] for part in parts), []) for key in parts[0]}
        write_table(pyarrow.table(whole), root / f"data/chunk-000/file-{file:03d}.parquet")
    for name, part in (("file-000", rows), ("file-001", rows[-1:])):      # a stale table repeats an episode
        write_table(pyarrow.Table.from_pylist(part), root / f"meta/episodes/chunk-000/{name}.parquet")
    for _, _, more in LEROBOT:
        video = f"videos/observation.images.front/chunk-000/file-{more.get('file', 0):03d}.mp4"
        damage(root / video, more.get("video", bytes))
        damage(root / f"data/chunk-000/file-{more.get('file', 0):03d}.parquet", more.get("table", bytes))
    (root / "meta/info.json").write_text(json.dumps(LEROBOT_INFO))
    return [Item(f"episode-{e:06d}", dirt, expected) for e, (dirt, expected, _) in enumerate(LEROBOT)]


# ---- takes of robot.py -------------------------------------------------------------------------------------

TAKES = [("nothing", "15 frames", {}), ("5 frames", "too short", {"T": 5}),
         ("a camera missing", "unreadable", {"cameras": ["front"]}),
         ("an image cut off", "damaged image", {"image": cut(0.7)}),
         ("cut off half-way", "unreadable", {"file": cut(0.5)})]


def make_realman(root):
    """As `robot.py record` writes them: full-size JPEGs, T-1 actions."""
    root.mkdir(parents=True)
    about = {"format": prepare_data.TAKE_FORMAT, **prepare_data.TWIN}
    (root / "takes.json").write_text(json.dumps(about))
    items = []
    for e, (dirt, expected, more) in enumerate(TAKES):
        items.append(Item(f"stack_cups-{e:05d}", dirt, expected))
        path, T = root / f"{items[-1].name}.h5", more.get("T", 15)
        with h5py.File(path, "w") as f:
            f.attrs.update(instruction="Stack.", fps=20)
            f["actions"], f["proprio"] = numbers(e, T - 1), numbers(e, T)
            for k, camera in enumerate(more.get("cameras", about["cameras"])):
                jpegs = f.create_dataset(f"images/{camera}", (T,), h5py.vlen_dtype(np.uint8))
                for t in range(T):
                    jpeg = prepare_data.encode_frame(picture(e + 100 * k, t, 96, 128))
                    jpegs[t] = np.frombuffer(more.get("image", bytes)(jpeg), np.uint8)
        damage(path, more.get("file", bytes))
    return items


# ---- what becomes of them ----------------------------------------------------------------------------------

MAKERS = {"ssv2": make_ssv2, "videos": make_videos, "bridge": make_bridge, "libero": make_libero,
          "lerobot": make_lerobot, "realman": make_realman}


def convert(source, root, out, *flags):
    """Run the converter, as typed. -> (what it printed, its error message or None)."""
    captions = Path(root).parent / "captions.csv"
    if source == "videos" and captions.exists():
        flags = ("--captions", str(captions), *flags)
    printed, message = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            prepare_data.main([source, "--input", str(root), "--out", str(out), "--image-size", str(SIZE),
                               "--workers", "1", *flags])
        except InputError as error:
            message = str(error)
    return printed.getvalue(), message


def annotations_of(out):
    """{name of an episode: its annotations}, in the order of the dataset."""
    result = {}
    for path in sorted(Path(out).glob("*.h5")):
        with h5py.File(path) as f:
            result |= dict(zip(f["name"].asstr()[:], map(json.loads, f["instruction"].asstr()[:])))
    return result


def outcomes(out):
    """{name of an item: "T frames" or its reject's reason}; pictures that do not count on are "garbage"."""
    result = {reject["name"]: reject["reason"] for reject in map(
        json.loads, (Path(out) / "rejects.jsonl").read_text().splitlines())}
    data = prepare_data.EpisodeDataset(out, 1)
    for episode, name in enumerate(annotations_of(out)):
        whole = []
        for camera in data.cameras:
            seen = [read_picture(frame) for frame in data.read_frames(
                episode, camera, 0, data.lengths[episode])]
            whole.append([(seen[0][0], seen[0][1] + t) for t in range(len(seen))] == seen)
        result[name] = f"{len(seen)} frames" + ("" if all(whole) else " with garbage")
    return result


def table(source, folder, *flags):
    """Make, convert -> (items, outcomes of the kept and rejected, others, printed, message)."""
    root, out = Path(folder) / source, Path(folder) / f"{source}_data"
    items = MAKERS[source](root)
    printed, message = convert(source, root, out, *flags)
    came = outcomes(out)
    return items, {item.name: came.pop(item.name, "left out") for item in items}, came, printed, message


def main():
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in MAKERS:
            items, came, others, _, message = table(source, folder)
            print(f"\n{source}: {message}\n{'item':>60s}  {'dirt':48s}  {'expected':24s}  came")
            for item in items:
                good = came[item.name] in item.expected.split(" or ")
                wrong += not good
                print(f"{item.name[-60:]:>60s}  {item.dirt:48s}  {item.expected:24s}  {came[item.name]}"
                      + ("" if good else "   <-- NOT AS EXPECTED"))
            wrong += len(others)
            print(f"ALSO WRITTEN: {others}" if others else f"{len(items)} items; nothing else was written")
        executed = (Path(folder) / "executed").exists()
        print(f"\n{wrong} not as expected; the pickles' payload was {'' if executed else 'not '}executed")
    return wrong or executed


if __name__ == "__main__":
    sys.exit(int(main()))

"""Small trees of every source with all the dirt that real ones have, and a table of what became of each item.

    python tests/dirty_data.py        # makes them in a temporary folder, converts them, prints the table

Pictures count: 4 x 4 blocks hold 64 * episode + frame in binary, so that a scrambled, repeated or black frame
is seen. Actions and states hold the step's number. Everything here is synthetic.
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
Item = collections.namedtuple("Item", "name dirt expected")      # expected: "T frames" or the reject's reason


def picture(episode, frame, height=64, width=64):
    """(H, W, 3) uint8 that says 64 * episode + frame; one bit is always set, so it is never of one colour."""
    number = 64 * episode + frame + 2 ** 15
    bits = np.array([number >> i & 1 for i in range(16)], np.uint8).reshape(4, 4)
    blocks = cv2.resize(bits * 200 + 20, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.repeat(blocks[..., None], 3, axis=2)


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
    speed = {"libvpx": {"deadline": "realtime", "cpu-used": "8"}, "libx264": {"g": "12", "bf": "0"},
             "libsvtav1": {"preset": "12", "g": "4"}}
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if skip else {}) as container:
        stream = container.add_stream(codec, rate=fps, width=width, height=height, pix_fmt="yuv420p",
                                      options=speed.get(codec.removesuffix("-vp9"), {}))
        stream.bit_rate = 4_000_000
        for t, picture in enumerate([*pictures, None]):
            frame = picture if picture is None else av.VideoFrame.from_ndarray(picture, format="bgr24")
            if frame:
                frame.time_base, frame.pts = Fraction(1, fps), t if times is None else times[t]
            for packet in stream.encode(frame):
                packet.pts, packet.dts = packet.pts - skip, packet.dts - skip
                container.mux(packet)


def clip(path, episode, frames=24, **more):
    """A counting video; grain makes it large, so that its header is a small part. -> its bytes."""
    grain = np.random.default_rng(episode).integers(-15, 16, (120, 212, 3))
    write_video(path, [(picture(episode, t, 120, 212) + np.roll(grain, 9 * t, 1)).astype(np.uint8)
                       for t in range(frames)], **more)
    return path.read_bytes()


def flipped(data, count=60, first=400):
    """The bytes with some of them inverted."""
    data = bytearray(data)
    for i in np.random.default_rng(0).integers(first, len(data), count):
        data[i] ^= 255
    return bytes(data)


def numbers(episode, count):
    """(count, 7): the step's number, the episode's, zeros, a gripper that opens half-way."""
    rows = np.zeros((count, 7))
    rows[:, 0], rows[:, 1], rows[:, 6] = np.arange(count), episode, np.arange(count) >= count // 2
    return rows


class Bomb:
    """What a pickle can do when it is loaded: run a command."""
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


# ---- Something-Something v2 --------------------------------------------------------------------------------

def make_ssv2(root):
    clips, items, labels = root / "20bn-something-something-v2", [], []

    def item(dirt, expected, data=None, label="pushing it", frames=24, listed=str):
        number = len(items) + 1
        path = clips / f"{number}.webm"
        whole = clip(path, number, frames, codec="libvpx-vp9")
        if data is not None:
            content = data(whole)
            path.unlink() if content is None else path.write_bytes(content)
        labels.append({"id": listed(number), "label": label, "template": "Pushing [something]",
                       "placeholders": ["it"]})
        items.append(Item(str(number), dirt, expected))

    def hole(data):
        return data[:len(data) // 2] + bytes(3000) + data[len(data) // 2 + 3000:]

    item("nothing", "24 frames")
    item("id is a number, not a string", "24 frames", listed=int)
    item("label differs from its template", "24 frames", label="pushing a stress reliever")
    item("label has / and \\", "24 frames", label="pulling a/c remote, a\\c remote")
    item("label has a Cyrillic letter", "24 frames", label="holding \u0430 cup")
    item("same label as another clip", "24 frames")
    item("spaces and a line break in the label", "24 frames", label="  pushing \n it ")
    for share, expected in ((0.02, "truncated"), (0.3, "truncated"), (0.6, "truncated"), (0.85, "truncated")):
        item(f"cut off at {share:.0%}", expected, lambda data, share=share: data[:int(len(data) * share)])
    # the decoder conceals it:
    item("a hole of zeros inside", "24 frames with garbage or truncated", hole)
    item("60 flipped bytes", "24 frames with garbage or truncated", flipped)           # nothing tells us
    item("0 bytes", "empty file", lambda data: b"")
    item("nothing but zeros", "not a video", lambda data: bytes(len(data)))
    item("a login page", "not a video", lambda data: b"<!DOCTYPE html><html>log in first</html>")
    item("listed, but no file", "missing file", lambda data: None)
    item("11 frames", "too short", frames=11)
    item("12 frames", "12 frames", frames=12)
    number = len(items) + 1
    write_video(clips / f"{number}.webm", [np.zeros((64, 64, 3), np.uint8)] * 24)
    labels.append({"id": str(number), "label": "black"})
    items.append(Item(str(number), "all black", "blank frames"))
    clip(clips / "99999.webm", 1)                                         # no label: not an item
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps(labels[::2]))
    (root / "labels" / "validation.json").write_text(json.dumps(labels[1::2]))
    return items


# ---- videos ------------------------------------------------------------------------------------------------

def make_videos(root):
    """Whole files and clips cut out of long ones; the CSV is captions.csv beside the folder."""
    items, rows = [], ["file,instruction,start,end"]

    def item(file, dirt, expected, text="move it", start="", end="", listed=None):
        rows.append(f'{listed or file},"{text}",{start},{end}')
        items.append(Item(file if start == "" else f"{file}@{float(start):g}-{float(end):g}", dirt, expected))

    clip(root / "whole.mp4", 1, codec="mpeg4")
    clip(root / "deep" / "UPPER.MKV", 2)
    clip(root / "long.mp4", 3, 60, fps=10, codec="mpeg4")
    clip(root / "long.webm", 4, 60, fps=10)
    item("whole.mp4", "nothing", "24 frames")
    item("deep/UPPER.MKV", "ending in capitals, in a folder", "24 frames")
    for file in ("long.mp4", "long.webm"):
        item(file, "cut at the start", "15 frames", start=0, end=1.5)
        item(file, "cut in the middle", "20 frames", start=2, end=4)
        item(file, "times between two frames", "19 frames", start=2.05, end=3.95)
        item(file, "end is past the file's end", "truncated", start=5, end=7)
        item(file, "shorter than --min-frames", "too short", start=1, end=1.5)
    (root / "page.mp4").write_text("<html>404</html>")
    item("page.mp4", "a web page", "not a video")
    (root / "empty.mov").touch()
    item("empty.mov", "0 bytes", "empty file")
    clip(root / "trim.mp4", 5, 40, codec="libx264", skip=6)
    item("trim.mp4", "6 of 40 frames cut off by an edit list", "34 frames")
    clip(root / "av1.mp4", 6, codec="libsvtav1")
    item("av1.mp4", "AV1", "24 frames")
    times = [*range(24), 24, 26, 28, 30, *range(32, 40)]                  # of 40, four are not there
    write_video(root / "phone.mp4", [picture(7, t) for t in times], codec="libx264", times=times)
    item("phone.mp4", "variable frame rate", "40 frames with garbage")    # those before are repeated
    item("phone.mp4", "variable frame rate, cut before that", "18 frames", start=0, end=1.5)
    write_video(root / "hole.mp4", [picture(8, t) for t in range(24)], codec="libx264",
                times=[t + 12 * (t > 11) for t in range(24)])
    item("hole.mp4", "no frame for a second", "missing frames")
    path = root / "flipped.mp4"
    path.write_bytes(flipped(clip(path, 9, 40, codec="libx264"), 10, 20_000))
    item("flipped.mp4", "10 flipped bytes in H.264", "damaged video")
    decomposed = unicodedata.normalize("NFD", "k\u00fcche.m4v")
    write_video(root / "k.mp4", [picture(10, t) for t in range(24)], codec="libx264")
    (root / "k.mp4").rename(root / decomposed)
    item(decomposed, "its umlaut is one character in the CSV", "24 frames", listed="k\u00fcche.m4v")
    (root / "notes.txt").write_text("not a video")
    (root.parent / "captions.csv").write_text("\ufeff" + "\n".join(rows) + "\n")
    return items


# ---- BridgeData V2 -----------------------------------------------------------------------------------------

def make_bridge(root):
    """Trajectories at both depths. What a Bomb would do is make the file `executed` beside the tree."""
    items, bomb = [], Bomb(f"touch {root.parent / 'executed'}")

    def item(dirt, expected, where=None, T=14, cameras=1, late=False, lang=b"put it there\n", change=None,
             actions=None, state=None, size=(120, 160), config=None):
        """One trajectory; change(folder) damages it afterwards."""
        e = len(items) + 1
        day = f"raw/bridge_data_v2/kitchen/task/{e:02d}/2023-07-11_14-06-57" if where is None else where
        name = f"{day.format(e=e)}/raw/traj_group0/traj{e}"
        folder = root / name
        for k in range(cameras):
            (folder / f"images{k}").mkdir(parents=True)
            for j in range(T):
                # until 2021-07-23 pictures were late
                world = max(0, j - 1) if late else j
                cv2.imwrite(str(folder / f"images{k}" / f"im_{j}.jpg"), picture(e + 100 * k, world, *size))
        rows = numbers(e, T - 1)
        actions = [{"actions": row, "new_robot_transform": np.eye(4), "policy_type": "VR"}
                   for row in rows] if actions is None else actions(rows)
        state = numbers(e, T) if state is None else state(numbers(e, T))
        observed = {"full_state": state, "qpos": np.zeros((T, 6)), "time_stamp": np.arange(T) * 0.2,
                    "env_done": [False] * T}
        (folder / "policy_out.pkl").write_bytes(pickle.dumps(actions))
        (folder / "obs_dict.pkl").write_bytes(pickle.dumps(observed))
        (folder / "agent_data.pkl").write_bytes(pickle.dumps(bomb))       # never opened
        (folder / "depth_images0").mkdir()
        (folder / "depth_images0" / "im_0.png").write_bytes(b"depth")
        if lang is not None:
            (folder / "lang.txt").write_bytes(lang)
        (folder.parents[2] / "config.json").write_text(json.dumps(config or {}))
        if change:
            change(folder)
        items.append(Item(name, dirt, expected))

    def write(name, data):
        return lambda folder: (folder / name).write_bytes(data)

    def shorten(name, count):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])

    def hole(name):
        def change(folder):
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[:-3000] + bytes(2000) + data[-1000:])
        return change

    def link(name):
        return lambda folder: ((folder / name).rename(folder / "other"), (folder / name).symlink_to("other"))

    def drop(*names):
        return lambda folder: [(folder / name).unlink() for name in names]

    def black(folder):
        for path in (folder / "images0").iterdir():
            cv2.imwrite(str(path), np.zeros((120, 160, 3), np.uint8))

    old = "raw/bridge_data_v1/berkeley/sink/task/2021-06-02_10-00-00"
    item("nothing; 14 images, so im_10 sorts before im_2", "14 frames")
    item("a level less above the date (v1)", "14 frames",
         "raw/bridge_data_v1/berkeley/sink/task{e}/2022-01-02_10-00-00")
    item("a level more", "14 frames", "raw/rss/more/kitchen/task/{e}/2022-01-02_10-00-00")
    item("no date above it (scripted)", "14 frames", "scripted_raw/sweep{e}")
    item("640 x 480 pixels", "14 frames", size=(480, 640))
    item("pictures smaller than asked for", "14 frames", size=(24, 24))
    item("before 2021-07-23: pictures one step late", "13 frames", old, late=True)
    item("the same, one row of state fewer", "13 frames", old.replace("task", "task2"), late=True,
         state=lambda rows: rows[:-1])
    item("the day before", "13 frames", old.replace("2021-06-02", "2021-07-22"), late=True)
    item("the day itself", "14 frames", old.replace("2021-06-02", "2021-07-23"))
    item("policy_out is a list of arrays", "14 frames", actions=list)
    item("policy_out is one array", "14 frames", actions=np.array)
    several = b"take it\nconfidence: 0.9\ngrab  it \n\ntake it\n"
    for what, lang in (("no lang.txt", None), ("an empty lang.txt", b""),
                       ("lang.txt without a last newline", b"take it"),
                       ("two annotations and a confidence line", several),
                       ("lang.txt in Mac Roman", "put the caf\u00e9 there\n".encode("mac_roman")),
                       ("lang.txt with Windows line ends", b"take it\r\n")):
        item(what, "14 frames", lang=lang)
    item("obs_dict.pkl missing", "missing file", change=drop("obs_dict.pkl"))
    item("policy_out.pkl missing", "missing file", change=drop("policy_out.pkl"))
    item("both missing", "missing file", change=drop("policy_out.pkl", "obs_dict.pkl"))
    item("im_7.jpg missing", "missing frames", change=drop("images0/im_7.jpg"))
    item("im_0.jpg missing", "missing frames", change=drop("images0/im_0.jpg"))
    item("as many images as actions", "frame count", change=drop("images0/im_13.jpg"))
    item("an action more", "frame count", actions=lambda rows: [*rows, rows[-1]])
    item("a stray image with a time in its name", "missing frames",
         change=write("images0/im_1689083217.jpg", b"x"))
    item("a hole of zeros in an image", "damaged image", size=(480, 640), change=hole("images0/im_5.jpg"))
    item("images0 is a link to a folder", "14 frames", change=link("images0"))
    item("no images at all", "no such camera", change=lambda folder: shutil.rmtree(folder / "images0"))
    item("a stray file among the images", "14 frames", change=write("images0/Thumbs.db", b"x"))
    item("an image cut off", "damaged image", change=shorten("images0/im_5.jpg", -400))
    item("an image of 0 bytes", "damaged image", change=write("images0/im_5.jpg", b""))
    item("an image that is a web page", "damaged image", change=write("images0/im_5.jpg", b"<html>"))
    item("all images black", "blank frames", change=black)
    item("policy_out.pkl runs os.system", "unsafe pickle", change=write("policy_out.pkl", pickle.dumps(bomb)))
    item("obs_dict.pkl runs os.system", "unsafe pickle", change=write("obs_dict.pkl", pickle.dumps(
        {"full_state": bomb})))
    item("policy_out.pkl names a class", "unsafe pickle", change=write("policy_out.pkl", pickle.dumps(
        [{"actions": np.zeros(7), "policy_type": collections.Counter}])))
    item("policy_out.pkl cut off", "damaged pickle", change=shorten("policy_out.pkl", 200))
    item("policy_out.pkl is a text", "damaged pickle", change=write("policy_out.pkl", b"hello"))
    item("policy_out.pkl of 0 bytes", "damaged pickle", change=write("policy_out.pkl", b""))
    item("no actions in policy_out", "odd policy_out.pkl", actions=lambda rows: [{"policy_type": "VR"}] * 13)
    item("6 numbers per action", "odd policy_out.pkl", actions=lambda rows: list(rows[:, :6]))
    item("no actions", "odd policy_out.pkl", actions=lambda rows: [])
    item("NaN in an action", "actions not finite", actions=lambda rows: list(rows * np.nan))
    item("infinity in a state", "proprio not finite", state=lambda rows: rows + np.inf)
    item("rows of state of different length", "no full_state", state=lambda rows: [[1.0], *rows.tolist()])
    item("state is a text", "no full_state", state=lambda rows: "full")
    item("a number that no float holds", "odd policy_out.pkl", actions=lambda rows: [[10 ** 400] * 7])
    item("state of six numbers", "no full_state", state=lambda rows: rows[:, :6])
    item("a row of state missing, though recent", "state count", state=lambda rows: rows[:-1])
    item("5 images", "too short", T=5)
    item("a date that does not exist", "bad date", "raw/icra/x/task{e}/2021-13-45_10-00-00")
    item("the only trajectory of its directory", "14 frames", "raw/flap/only/one/00/2022-05-05_10-00-00")
    item("a wrist camera beside it", "14 frames", cameras=2,
         config={"agent": {"env": ["class", {"camera_topics": [{"name": "/D435/color/image_raw"},
                                                               {"name": "/wrist/image_raw"}]}]}})
    lmdb = root / "raw/rss/kitchen/task/00/lmdb/raw/traj_group0/traj0"  # stands beside the dates
    shutil.copytree(root / items[0].name, lmdb)
    return items


def zip_tree(root, path, compression=zipfile.ZIP_DEFLATED):
    """The tree as a zip, members in the order in which `zip -r` walks."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for folder, _, names in os.walk(root, followlinks=True):
            for name in names:
                archive.write(os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), root))


# ---- LIBERO ------------------------------------------------------------

def libero_demo(group, key, episode, T=16, kind="raw", **replace):
    """One demonstration. World time k: states[k], seen as picture k, in which actions[k] is commanded."""
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
        data = {"actions": actions, "states": states, "rewards": np.arange(T) == T - 1,
                "dones": np.arange(T) == T - 1}
    data |= {f"obs/{name}": value for name, value in obs.items()}
    for name, value in (data | replace).items():
        if value is not None:
            demo[name] = value(data[name]) if callable(value) else value
    demo.attrs["num_samples"] = T


def make_libero(root):
    root.mkdir(parents=True)
    items = []

    def file(name, demos, attrs=None):
        """demos: list of (key, dirt, expected, arguments)."""
        with h5py.File(root / name, "w") as f:
            data = f.create_group("data")
            whole = {"macros_image_convention": "opengl", "tag": "libero-v1",
                     "problem_info": json.dumps({"language_instruction": "put it away"})}
            data.attrs.update(whole if attrs is None else attrs)
            for key, dirt, expected, arguments in demos:
                items.append(Item(f"{name}/{key}", dirt, expected))
                libero_demo(data, key, len(items), **arguments)

    nan = {"actions": lambda actions: actions * np.nan}

    def four(images):
        return np.concatenate([images, images[..., :1]], -1)

    file("put_it_away_demo.hdf5", [
        ("demo_10", "sorts before demo_2 as text", "16 frames", {}), ("demo_2", "nothing", "16 frames", {}),
        ("demo_3", "a camera missing", "no such camera", {"obs/eye_in_hand_rgb": None}),
        ("demo_4", "an image less than actions", "odd lengths", {"obs/agentview_rgb": lambda x: x[1:]}),
        ("demo_5", "NaN in the actions", "actions not finite", nan),
        ("demo_6", "5 steps", "too short", {"T": 5}),
        ("demo_7", "black images", "blank frames", {"obs/agentview_rgb": lambda x: x * 0}),
        ("demo_8", "ee_pos missing", "unreadable", {"obs/ee_pos": None}),
        ("demo_9", "NaN in joint_states", "states not finite", {"obs/joint_states": lambda x: x * np.nan}),
        ("demo_11", "images with four channels", "odd images", {"obs/agentview_rgb": four}),
        ("demo_12", "images as floats", "odd images", {"obs/agentview_rgb": lambda x: x / 255}),
        ("demo_13", "one finger", "odd proprio", {"obs/gripper_states": lambda x: x[:, :1]}),
        ("demo_14", "states alone among others with images", "no such camera", {
            f"obs/{name}_rgb": None for name in ("agentview", "eye_in_hand")}),
        ("demo_15", "actions are texts", "odd lengths", {"actions": np.array([b"a"] * 16)})])
    file("KITCHEN_SCENE1_open_it_demo.hdf5", [("demo_0", "no problem_info: name says it", "16 frames", {})],
         {"macros_image_convention": "opengl"})
    file("quoted_demo.hdf5", [("demo_0", "instruction in quotes", "16 frames", {})],
         {"problem_info": json.dumps({"language_instruction": '"turn it on"'})})
    file("listed_demo.hdf5", [("demo_0", "instruction is a list of words", "16 frames", {})],
         {"problem_info": json.dumps({"language_instruction": ["turn", "it", "off"]})})
    file("replayed_demo.hdf5", [("demo_1", "observed before the action (openvla)", "16 frames",
                                 {"kind": "replayed"})], {})
    turned = {f"obs/{name}_rgb": lambda x: x[:, ::-1] for name in ("agentview", "eye_in_hand")}
    file("opencv_demo.hdf5", [("demo_0", "images upright in the file", "16 frames", turned)],
         {"macros_image_convention": "opencv"})
    failed = {"kind": "processed", "success": lambda success: success * False}
    file("processed_demo.hdf5", [("demo_0", "processed: upright, before the action", "16 frames",
                                  {"kind": "processed"}), ("demo_1", "did not succeed", "left out", failed)])
    file("all_failed_demo.hdf5", [("demo_0", "no demonstration of its task succeeds", "16 frames", failed),
                                  ("demo_1", "no demonstration of its task succeeds", "16 frames", failed)])
    whole = (root / "put_it_away_demo.hdf5").read_bytes()
    (root / "cut_demo.hdf5").write_bytes(whole[:len(whole) // 2])
    (root / "page_demo.hdf5").write_text("<html>404</html>")
    (root / "none_demo.hdf5").touch()
    for name, group in (("other", "x"), ("bare", "data")):
        with h5py.File(root / f"{name}_demo.hdf5", "w") as f:
            f.create_group(group)
    return items + [Item(f"{name}_demo.hdf5", dirt, expected) for name, dirt, expected in (
        ("cut", "cut off half-way", "damaged file"), ("page", "a web page", "damaged file"),
        ("none", "0 bytes", "damaged file"), ("other", "HDF5 of something else", "not LIBERO's layout"),
        ("bare", "no demonstration in it", "not LIBERO's layout"))]


# ---- LeRobotDataset v3 -------------------------------------------------------------------------------------

LEROBOT_FPS = 10


def make_lerobot(root):
    """Data files and, per camera, videos of several episodes: AV1 (LeRobot's default) and H.264. Needs
    pyarrow."""
    import pyarrow
    import pyarrow.parquet
    items, rows, tables = [], [], collections.defaultdict(list)
    clock, streams = collections.Counter(), {}
    cameras = {"front": "libsvtav1", "wrist": "libx264"}

    def video(camera, number):
        path = root / f"videos/observation.images.{camera}/chunk-000/file-{number:03d}.mp4"
        if path not in streams:
            path.parent.mkdir(parents=True, exist_ok=True)
            container = av.open(str(path), "w")
            stream = container.add_stream(cameras[camera], rate=LEROBOT_FPS)
            stream.width = stream.height = 64
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "20", "g": "2"}
            streams[path] = container, stream
        return path

    def item(dirt, expected, T=15, file=0, frames=None, shown=picture, change=dict, tasks=("move it",)):
        e = len(items)
        row = {"episode_index": e, "tasks": list(tasks), "length": T, "data/chunk_index": 0,
               "data/file_index": file}
        for camera in cameras:
            path, fps = video(camera, file), LEROBOT_FPS
            container, stream = streams[path]
            row |= {f"videos/observation.images.{camera}/{key}": value for key, value in (
                ("chunk_index", 0), ("file_index", file), ("from_timestamp", clock[path] / fps))}
            for t in range(T if frames is None else frames):
                frame = av.VideoFrame.from_ndarray(shown(e + 100 * (camera == "wrist"), t), format="bgr24")
                for packet in stream.encode(frame):
                    container.mux(packet)
            clock[path] += T if frames is None else frames
        table = {"episode_index": [e] * T, "frame_index": list(range(T)),
                 "timestamp": [t / LEROBOT_FPS for t in range(T)], "action": numbers(e, T).tolist(),
                 "observation.state": numbers(e, T).tolist(), "task_index": [0] * T}
        tables[file].append(change(table))
        rows.append(row)
        items.append(Item(f"episode-{e:06d}", dirt, expected))

    def without(t):
        return lambda table: {key: values[:t] + values[t + 1:] for key, values in table.items()}

    def backwards(table):
        return {key: values[::-1] for key, values in table.items()}

    def two(table):
        return {**table, "task_index": [0] * 8 + [1] * (len(table["action"]) - 8)}

    def nan(table):
        return {**table, "action": (np.array(table["action"]) * np.nan).tolist()}

    def ragged(table):
        return {**table, "action": [[1.0], *table["action"][1:]]}

    item("nothing", "15 frames")
    item("begins in the middle of a video", "15 frames", tasks=("move it", "shove it"))
    item("an odd number of frames before it", "14 frames", T=14)
    item("rows of the table in disorder", "15 frames", change=backwards)
    item("a row missing", "missing frames", change=without(7))
    item("NaN in the actions", "actions not finite", change=nan)
    item("5 frames", "too short", T=5)
    item("black dummy camera", "blank frames", shown=lambda e, t: np.zeros((64, 64, 3), np.uint8))
    item("no task", "15 frames", tasks=())
    item("last of its file", "15 frames")
    item("another file", "15 frames", file=1)
    item("actions of different width", "unreadable", file=1, change=ragged)
    item("the video ends too early", "truncated", file=1, frames=9)
    item("its video is missing", "missing file", file=2)
    item("its video is cut off", "damaged video", file=3)
    item("its video is a web page", "damaged video", file=4)
    item("its table is cut off", "damaged table", file=5)
    item("its table is missing", "missing file", file=6)
    item("its task changes half-way", "several tasks", file=7, change=two, tasks=("move it", "shove it"))
    for container, stream in streams.values():
        for packet in stream.encode():
            container.mux(packet)
        container.close()
    for file, parts in tables.items():
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {key: sum((part[key] for part in parts), []) for key in parts[0]}
        pyarrow.parquet.write_table(pyarrow.table(whole), path)
    main = root / "videos/observation.images.front/chunk-000"
    (main / "file-002.mp4").unlink()
    (main / "file-003.mp4").write_bytes((main / "file-003.mp4").read_bytes()[:300])
    (main / "file-004.mp4").write_text("<html>404</html>")
    last = root / "data/chunk-000/file-005.parquet"
    last.write_bytes(last.read_bytes()[:200])
    (root / "data/chunk-000/file-006.parquet").unlink()
    episodes = root / "meta/episodes/chunk-000"
    episodes.mkdir(parents=True)
    for number, part in enumerate((rows, rows[-1:])):                     # a stale table repeats an episode
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), episodes / f"file-{number:03d}.parquet")
    names = ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    features = {f"observation.images.{camera}": {"dtype": "video", "shape": [64, 64, 3]}
                for camera in cameras}
    features["task_index"] = {"dtype": "int64", "shape": [1]}
    features["observation.images.depth"] = {"dtype": "video", "shape": [64, 64, 1],
                                            "info": {"video.is_depth_map": True}}
    meta = {"codebase_version": "v3.0", "fps": LEROBOT_FPS, "total_episodes": len(rows), "robot_type": "none",
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": features | {"action": {"dtype": "float32", "shape": [7], "names": {"motors": names}},
                                    "observation.state": {"dtype": "float32", "shape": [7], "names": names}}}
    (root / "meta/info.json").write_text(json.dumps(meta))
    return items


# ---- what became of them -----------------------------------------------------------------------------------

MAKERS = {"ssv2": make_ssv2, "videos": make_videos, "bridge": make_bridge, "libero": make_libero,
          "lerobot": make_lerobot}
FLAGS = {"videos": ["--captions", "{root}/../captions.csv"]}


def convert(source, root, out, *flags):
    """Run the converter, as typed. -> (what it printed, its error message or None)."""
    flags = [flag.format(root=root) for flag in FLAGS.get(source, [])] + list(flags)
    printed, message = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            prepare_data.main([source, "--input", str(root), "--out", str(out), "--image-size", str(SIZE),
                               "--workers", "1", *flags])
        except InputError as error:
            message = str(error)
    return printed.getvalue(), message


def outcomes(out):
    """{name of an item: "T frames" or its reject's reason}; a picture that does not count on is said."""
    result = {reject["name"]: reject["reason"] for reject in map(
        json.loads, (Path(out) / "rejects.jsonl").read_text().splitlines())}
    data = prepare_data.EpisodeDataset(out, 1)
    names = []
    for path in sorted(Path(out).glob("*.h5")):
        with h5py.File(path) as f:
            names += list(f["name"].asstr()[:])
    for episode, name in enumerate(names):
        for k, camera in enumerate(data.cameras):
            seen = [read_picture(frame) for frame in data.read_frames(
                episode, camera, 0, data.lengths[episode])]
            whole = [(seen[0][0], seen[0][1] + t) for t in range(len(seen))] == seen
            result[name] = f"{len(seen)} frames" + ("" if whole else " with garbage")
            if not whole:
                break
    return result


def table(source, folder, *flags):
    """Make, convert -> (items, outcomes of the kept and rejected, printed, message)."""
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

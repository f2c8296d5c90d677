"""The robot of the paper's real-world experiments (Section 4.3): the Realman arm, and its MuJoCo twin.

    python robot.py check --arm 192.168.1.18 --cameras front=0 side=2   # reads everything, moves nothing
    python robot.py record --arm sim --out data/takes                    # teleoperated takes; sim: a rehearsal
    python robot.py replay --arm sim --take data/takes/stack_cups-00000.h5      # one of them, at a quarter of its speed
    python robot.py rollout --arm sim --checkpoint runs/finetune/last.pt # success per task (Table II)

Two halves. First the twin: world, tasks, environment, scripted expert. Then the arm: kinematics, the safety
gate that every command passes, the driver with its watchdog, cameras, teleoperation, the four commands.
README "On a real arm" has the order in which to do things, and what was never tested on hardware.

The twin is made of primitives only, there is nothing to download: an RM65-like arm built from its DH table, a
parallel gripper, two fixed cameras and the objects of the paper's five tasks. It needs no GPU.

    world         the arm's base frame: x away from the base, y to its left, z up, metres; table top at z = 0
    action  (7,)  [dx dy dz (m), rotation vector (rad) x3, gripper] in the base frame, per step of 1/20 s;
                  gripper is absolute: 1 = open, 0 = closed, switched at 0.5
    proprio (7,)  [x y z (m) of the tool centre, rotation vector (rad) from tool-down x3, opening 0..1]

ASSUMPTION: the paper names the arm and the tasks, not the sizes, places and cameras; those here are chosen so
that a 64-pixel image shows a cup about 10 pixels wide and a grasp survives an error of 1 cm.
"""

import argparse
import atexit
import collections
import contextlib
import ctypes
import functools
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import cv2
import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from models import (ActionChunker, HelpFormatter, InputError, append_line, batch_observations, check_free, check_same,
                    file_hash, load_policy, provenance, read_json, read_lines, run, shrink, write_atomically, write_json)


# ---- headless OpenGL: chosen before mujoco is imported ----

def choose_gl():
    """Sets MUJOCO_GL on Linux unless the user did: egl, else osmesa, else disable (no images)."""
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    try:    # an EGL without a device (no driver, no Mesa) makes `import mujoco` itself fail: ask first
        get_address = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
        get_address.restype, get_address.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        address, count = get_address(b"eglQueryDevicesEXT"), ctypes.c_int(0)
        if address:
            query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            query(address)(0, None, ctypes.addressof(count))
        if count.value > 0:
            os.environ["MUJOCO_GL"] = "egl"
            return
    except OSError:
        pass
    try:
        ctypes.CDLL("libOSMesa.so.8")
        os.environ["MUJOCO_GL"] = "osmesa"
    except OSError:
        os.environ["MUJOCO_GL"] = "disable"


choose_gl()
import mujoco  # noqa: E402

ACTION_DIM, PROPRIO_DIM = 7, 7
CONTROL_HZ = 20
# The action and the proprioception of the twin and of the arm, as a dataset's attributes describe them. `delta`
# says which numbers are changes per step; the gripper's is a target.
ACTION = {"names": ["x", "y", "z", "rx", "ry", "rz", "gripper"], "units": ["m"] * 3 + ["rad"] * 3 + ["1"],
          "frame": "robot base, change per step", "gripper": "1 = open, 0 = closed",
          "delta": [True] * 6 + [False]}
PROPRIO = {"names": ACTION["names"], "units": ACTION["units"], "frame": "robot base, from tool-down",
           "gripper": "1 = open .. 0 = closed"}
EVAL_SEED0 = 1_000_000              # evaluation starts are seeds >= this; training data uses seeds below it
PHYSICS_DT = 0.002                  # s
MAX_STEP, MAX_TURN = 0.02, 0.1      # m and rad per control step; larger actions are clamped
OPENING = 0.055                     # m from the centre to each finger when the gripper is open
SQUEEZE = -0.03                     # m, the close command: well past closed, or a position motor only touches
HOME = np.array([0.27, 0.0, 0.17])  # m, tool centre at the start of an episode, +- 2 cm
WORKSPACE = np.array([[0.15, -0.22, 0.016], [0.45, 0.22, 0.25]])    # m, of the commanded tool centre
TOOL_DOWN = np.diag([-1.0, 1.0, -1.0])   # the tool's frame when it points down, fingers along y


# ---- the arm: RM65-B, modified (Craig) DH ----

# alpha_{i-1} (rad), a_{i-1} (m), d_i (m), offset_i (rad): the vendor's table; d_6 = 0.144 is the RM65-B's
DH = np.array([[0, 0, 0.2405, 0],
               [np.pi / 2, 0, 0, np.pi / 2],
               [0, 0.256, 0, np.pi / 2],
               [np.pi / 2, 0, 0.210, 0],
               [-np.pi / 2, 0, 0, 0],
               [np.pi / 2, 0, 0.144, 0]])
JOINT_LIMIT = np.radians([178, 130, 135, 178, 128, 360])
TOOL = 0.14     # m from the flange to the tool centre, which lies between the finger pads


def joint_frames(q):
    """Frames (6, 4, 4) of the joints in the base frame, for angles q (6,) in rad; joint i turns about the z
    of frame i, the last frame is the flange's."""
    pose, frames = np.eye(4), []
    for (alpha, a, d, offset), angle in zip(DH, q):
        (ca, sa), (ct, st) = ((np.cos(x), np.sin(x)) for x in (alpha, angle + offset))
        pose = pose @ [[ct, -st, 0, a],
                       [st * ca, ct * ca, -sa, -d * sa],
                       [st * sa, ct * sa, ca, d * ca],
                       [0, 0, 0, 1]]
        frames.append(pose)
    return np.array(frames)


def dh_forward(q):
    """Flange pose (4, 4) in the base frame for joint angles q (6,) in rad."""
    return joint_frames(q)[-1]


def reach(z):
    """Largest distance (m) from the base axis of a tool that points down at height z: the wrist stays on a
    sphere around the shoulder, 4 mm short of the stretched arm, which is singular."""
    wrist_above_shoulder = z + TOOL + DH[5, 2] - DH[0, 2]
    return np.sqrt((DH[2, 1] + DH[3, 2] - 0.004) ** 2 - wrist_above_shoulder ** 2)


def rotation_error(target, measured):
    """Rotation vector (3,) in rad, base frame, that turns the matrix `measured` into `target`."""
    return Rotation.from_matrix(np.reshape(target, (3, 3)) @ np.reshape(measured, (3, 3)).T).as_rotvec()


# ---- MJCF, built from primitives ----

STEEL, DARK, GREEN, WALL = ".85 .86 .88 1", ".30 .33 .38 1", ".45 .90 .25 1", ".62 .64 .66 1"
SKIN, SLEEVE, UNSEEN = ".88 .66 .53 1", ".25 .30 .55 1", "0 0 0 0"
BLUE, WHITE, PLATE, BOWL = ".10 .28 .92 1", ".96 .96 .96 1", ".78 .22 .20 1", ".80 .48 .78 1"
POT, GOLD, LEAF, CRUST = ".55 .62 .72 1", ".96 .72 .10 1", ".15 .60 .20 1", ".90 .55 .25 1"


def tag(tag_name, **attributes):
    """<tag_name key="value" .../>; numbers and sequences of numbers are written out."""
    def text(value):
        return value if isinstance(value, str) else " ".join(f"{float(v):.12g}" for v in np.ravel(value))
    return f"<{tag_name} " + " ".join(f'{key}="{text(value)}"' for key, value in attributes.items()) + "/>\n"


def solid(kind, size, rgba, mass, **attributes):
    """A geom that collides."""
    return tag("geom", type=kind, size=size, rgba=rgba, mass=mass, **attributes)


def look(kind, size, rgba, mass=0, **attributes):
    """A geom for the eye only."""
    return tag("geom", type=kind, size=size, rgba=rgba, mass=mass, contype="0", conaffinity="0", **attributes)


def body(**attributes):
    """The opening tag of a body."""
    return tag("body", **attributes).replace("/>", ">")


def disk(radius, height, rgba, mass):
    return solid("cylinder", (radius, height / 2), rgba, mass, pos=(0, 0, height / 2))


def ring(bottom, top, z, height, rgba, n=12):
    """A wall: n boxes, 3 mm thick, from radius `bottom` at height z to radius `top` at z + height (m)."""
    tilt, radius = np.arctan2(top - bottom, height), (bottom + top) / 2
    size = (0.0015, top * np.tan(np.pi / n), height / 2 / np.cos(tilt))
    return "".join(solid("box", size, rgba, 0.004, euler=(angle, tilt, 0),
                         pos=(radius * np.cos(angle), radius * np.sin(angle), z + height / 2))
                   for angle in 2 * np.pi * np.arange(n) / n)


def quaternion(rotation):
    return rotation.as_quat(scalar_first=True)


def arm_xml():
    """Nested bodies: body i stands at (a, -d sin alpha, d cos alpha), turned by Rx(alpha) Rz(offset), and
    turns about its own z. Spheres and capsules are for the eye: the arm does not collide, its fingers do."""
    masses, radii = (2.0, 2.0, 1.5, 0.6, 0.6, 0.3), (0.052, 0.045, 0.042, 0.036, 0.036, 0.032)      # kg, m
    place = [(a, -d * np.sin(alpha), d * np.cos(alpha)) for alpha, a, d, _ in DH]
    xml = look("cylinder", 0.055, STEEL, fromto=(0, 0, 0, 0, 0, 0.20))
    for i, (mass, radius) in enumerate(zip(masses, radii)):
        turn = Rotation.from_rotvec([DH[i, 0], 0, 0]) * Rotation.from_rotvec([0, 0, DH[i, 3]])
        xml += body(name=f"link{i + 1}", pos=place[i], quat=quaternion(turn), gravcomp=1)
        xml += tag("joint", name=f"j{i + 1}", range=(-JOINT_LIMIT[i], JOINT_LIMIT[i]), armature=0.05)
        xml += look("sphere", radius, DARK, mass)
        if i < 5 and np.any(place[i + 1]):
            xml += look("capsule", 0.8 * radius, STEEL, fromto=(0, 0, 0, *place[i + 1]))
    return xml + tool_xml("robot") + "</body>" * 6


def hand_xml():
    """A hand that floats on three slides and three hinges, with the arm's inverse kinematics."""
    xml = body(name="hand", pos=(0, 0, TOOL), gravcomp=1)
    for i, axis in enumerate(["1 0 0", "0 1 0", "0 0 1", "0 0 1", "0 1 0", "1 0 0"]):
        kind = "slide" if i < 3 else "hinge"
        xml += tag("joint", name=f"j{i + 1}", type=kind, axis=axis, range=(-1, 1), armature=0.5)
    xml += body(quat=quaternion(Rotation.from_matrix(TOOL_DOWN)), gravcomp=1)
    return xml + tool_xml("hand") + "</body></body>"


def tool_xml(embodiment):
    """The tool in its flange frame: z out of the flange, two fingers that slide along y. The finger pads are
    the same for both embodiments, so both grasp alike; the hand's are unseen in a thumb and four fingers."""
    if embodiment == "robot":
        xml, pad = look("box", (0.030, 0.070, 0.016), STEEL, 0.3, pos=(0, 0, 0.045)), GREEN
        dress = {side: look("box", (0.011, 0.005, 0.030), GREEN, pos=(0, sign * 0.006, 0.085))
                 for side, sign in (("left", 1), ("right", -1))}
    else:
        def bone(radius, *fromto, rgba=SKIN):
            return look("capsule", radius, rgba, fromto=fromto)
        xml, pad = look("ellipsoid", (0.045, 0.05, 0.022), SKIN, 0.3, pos=(-0.005, 0, 0.035)), UNSEEN
        xml += bone(0.026, 0, 0, 0.03, 0.10, 0, -0.05)                          # forearm
        xml += bone(0.037, 0.10, 0, -0.05, 0.34, 0, -0.26, rgba=SLEEVE)
        dress = {"left": "".join(
            bone(0.0085, x, -0.012, 0.04, x, 0.014, 0.085) + bone(0.008, x, 0.014, 0.085, x, 0.007, tip)
            for x, tip in ((-0.024, 0.135), (-0.008, 0.147), (0.008, 0.145), (0.024, 0.132)))}      # fingers
        dress["right"] = bone(0.011, 0.012, 0.012, 0.045, 0.006, -0.014, 0.09)                      # thumb
        dress["right"] += bone(0.0095, 0.006, -0.014, 0.09, 0, -0.008, 0.143)
    xml += tag("site", name="tool", pos=(0, 0, TOOL), size=0.001, rgba="0 0 0 0")
    for side, sign in (("left", 1), ("right", -1)):
        xml += body(name=side, gravcomp=1)
        xml += tag("joint", name=side, type="slide", axis=(0, sign, 0), range=(0, OPENING), damping=100,
                   armature=0.1)
        xml += solid("box", (0.017, 0.006, 0.020), pad, 0.05, pos=(0, sign * 0.006, TOOL - 0.008),
                     friction="1.5 .03 .001")
        xml += dress[side] + "</body>"
    return xml


# ---- the things on the table; origin at the centre of the base (of the roll: at its centre) ----

@dataclass(frozen=True)
class Thing:
    xml: str
    grasp: float = 0.0      # m, height of the tool centre above the thing's origin when it is grasped
    rest: float = 0.0       # m, height of the origin above the surface on which the thing rests
    floor: float = 0.0      # m, height above its own origin of the surface that carries other things


def cup(rgba):
    # tapered, its floor raised: a cup put on another one sinks in by 3 cm and has a centimetre of play
    return disk(0.020, 0.040, rgba, 0.06) + ring(0.021, 0.037, 0.002, 0.068, rgba)


def handles():
    return "".join(solid("box", (0.016, 0.010, 0.004), DARK, 0.01, pos=(0, y, 0.031))
                   for y in (-0.071, 0.071))


def leaves():
    return "".join(
        look("capsule", 0.0055, LEAF, fromto=(0, 0, 0.072, 0.02 * np.cos(a), 0.02 * np.sin(a), 0.098))
        for a in 2 * np.pi * np.arange(5) / 5)


THINGS = {
    "blue_cup": Thing(cup(BLUE), grasp=0.046, floor=0.040),
    "white_cup": Thing(cup(WHITE), grasp=0.046, floor=0.040),
    "plate": Thing(disk(0.080, 0.006, PLATE, 0.4) + ring(0.078, 0.092, 0.003, 0.009, PLATE, n=16),
                   floor=0.006),
    "bowl": Thing(disk(0.042, 0.005, BOWL, 0.3) + ring(0.041, 0.068, 0.002, 0.034, BOWL), floor=0.005),
    "pot": Thing(disk(0.060, 0.005, POT, 0.5) + ring(0.060, 0.061, 0.002, 0.036, POT) + handles(),
                 floor=0.005),
    "pineapple": Thing(solid("ellipsoid", (0.027, 0.027, 0.036), GOLD, 0.07, pos=(0, 0, 0.042))
                       + disk(0.024, 0.020, GOLD, 0.05) + leaves(), grasp=0.048),
    "roll": Thing(solid("capsule", 0.019, CRUST, 0.06, fromto=(-0.026, 0, 0, 0.026, 0, 0), condim="6",
                        friction=".4 .01 .003"), rest=0.019),
}


# ---- the world ----

# Friction: the pads hold at 1.5, all else slides at 0.4, so that the finger that touches first pushes the
# thing to the middle and does not tip it over. solref .004: with MuJoCo's default the thin walls sink in.
# multiccd: with a single contact point a cylinder on a cylinder (a cup on a plate) never comes to rest.
WORLD = """
<mujoco model="table">
  <compiler angle="radian" eulerseq="zyx"/>
  <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10">
    <flag multiccd="enable"/>
  </option>
  <size memory="32M"/>
  <statistic center=".3 0 .1" extent="1"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <quality shadowsize="1024" offsamples="4" numslices="16" numstacks="10"/>
    <headlight ambient=".35 .35 .35" diffuse=".45 .45 .45" specular="0 0 0"/>
    <map znear=".05" zfar="10"/>
  </visual>
  <default>
    <geom condim="4" friction=".4 .01 .0005" solref=".004 1" solimp=".95 .99 .001"/>
  </default>
  <worldbody>
    <light name="lamp" pos=".6 -.4 1.2" dir="-.35 .4 -1" directional="true" diffuse=".5 .5 .5"
           specular="0 0 0"/>
    <geom name="table" type="box" pos=".25 0 -.03" size=".6 .7 .03" rgba=".30 .33 .36 1"/>
    {walls}
    {cameras}
    {tool}
    {things}
  </worldbody>
  <equality><joint joint1="left" joint2="right" solref=".004 1"/></equality>
  <actuator>
    {motors}
  </actuator>
</mujoco>"""

CAMERAS = {"front": ((0.78, 0.0, 0.46), (0.28, 0.0, 0.075), 39),  # position and point looked at (m), degrees
           "side": ((0.30, -0.54, 0.44), (0.30, 0.0, 0.065), 36)}


def view(eye, target):
    """Rotation of a camera at `eye` that looks at `target`, upright (a MuJoCo camera looks along its -z)."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
    return Rotation.from_matrix(np.stack([right, np.cross(right, forward), -forward], axis=1))


def build_model(embodiment, things):
    """The MuJoCo model with the tool of `embodiment` ("robot" or "hand") and the named things."""
    robot = embodiment == "robot"
    stiffness = (4000, 4000, 3000, 1500, 1500, 800) if robot else (6000, 6000, 6000, 300, 300, 300)
    motors = "".join(tag("position", joint=f"j{i + 1}", kp=kp, dampratio=1) for i, kp in enumerate(stiffness))
    motors += "".join(tag("position", joint=side, kp=1000, ctrlrange=(SQUEEZE, OPENING), forcerange=(-18, 18))
                      for side in ("left", "right"))
    return mujoco.MjModel.from_xml_string(WORLD.format(
        dt=PHYSICS_DT, motors=motors, tool=arm_xml() if robot else hand_xml(),
        walls=look("box", (0.02, 3, 3), WALL, pos=(-0.9, 0, 0.3))
        + look("box", (3, 0.02, 3), WALL, pos=(0.25, 1.2, 0.3)),
        cameras="".join(tag("camera", name=name, pos=eye, quat=quaternion(view(eye, target)), fovy=fovy)
                        for name, (eye, target, fovy) in CAMERAS.items()),
        things="".join(body(name=name) + tag("joint", type="free", name=name, damping=0.0003)
                       + THINGS[name].xml + "</body>" for name in things)))


# ---- the five tasks ----

@dataclass(frozen=True)
class Move:
    """A pick and place: `thing` goes to the mean position of `onto`, shifted by `shift` (x, y in m)."""
    thing: str
    onto: tuple
    shift: tuple = (0.0, 0.0)


@dataclass(frozen=True)
class Task:
    instruction: str        # the paper's words
    objects: dict           # name -> start region (x, y, half x, half y) in m, or name of what it stands in
    waypoints: tuple        # Moves, in order
    success: Callable       # TwinEnv -> bool: every sub-goal of the instruction holds now
    max_steps: int          # two to three times what the expert takes


def between(env, name, one, other):
    """`name` stands in the middle half of the line from `one` to `other`, at most 4 cm beside it."""
    p, a, b = (env.position(n)[:2] for n in (name, one, other))
    along = np.dot(p - a, b - a) / np.dot(b - a, b - a)
    return 0.25 < along < 0.75 and np.linalg.norm(p - a - along * (b - a)) < 0.04


TASKS = {
    "cups_on_plate": Task(
        "put both cups on the plate",
        {"plate": (0.30, 0.095, 0.015, 0.015),
         "blue_cup": (0.24, -0.09, 0.025, 0.045), "white_cup": (0.36, -0.09, 0.025, 0.045)},
        (Move("blue_cup", ("plate",), (-0.045, 0)), Move("white_cup", ("plate",), (0.045, 0))),
        lambda env: env.placed("blue_cup", "plate", 0.07) and env.upright("blue_cup")
        and env.placed("white_cup", "plate", 0.07) and env.upright("white_cup"),
        340),
    "cup_in_bowl": Task(
        "pick the blue cup and place it in the bowl which is on top of the plate",
        {"plate": (0.30, 0.10, 0.03, 0.02), "bowl": "plate", "blue_cup": (0.30, -0.105, 0.05, 0.04)},
        (Move("blue_cup", ("bowl",)),),
        lambda env: env.placed("blue_cup", "bowl", 0.04) and env.upright("blue_cup")
        and env.placed("bowl", "plate", 0.04),
        180),
    "pineapple_between_cups": Task(
        "pick the pineapple out of the pot and place it in between the cups",
        {"pot": (0.30, -0.095, 0.04, 0.03), "pineapple": "pot",
         "blue_cup": (0.22, 0.09, 0.01, 0.025), "white_cup": (0.385, 0.09, 0.01, 0.025)},
        (Move("pineapple", ("blue_cup", "white_cup")),),
        lambda env: env.placed("pineapple", "world") and between(env, "pineapple", "blue_cup", "white_cup")
        and env.upright("blue_cup") and env.upright("white_cup"),
        180),
    "pineapple_and_roll": Task(
        "move the pineapple to the pot and the roll to the plate",
        {"pot": (0.235, 0.12, 0.015, 0.015), "plate": (0.345, -0.105, 0.01, 0.01),
         "pineapple": (0.215, -0.08, 0.015, 0.04), "roll": (0.385, 0.08, 0.012, 0.03)},
        (Move("pineapple", ("pot",)), Move("roll", ("plate",))),
        lambda env: env.placed("pineapple", "pot", 0.05) and env.placed("roll", "plate", 0.075),
        340),
    "stack_cups": Task(
        "stack the blue cup on top of the white one",
        {"white_cup": (0.30, 0.10, 0.045, 0.035), "blue_cup": (0.30, -0.10, 0.05, 0.035)},
        (Move("blue_cup", ("white_cup",)),),
        lambda env: env.placed("blue_cup", "white_cup", 0.025) and env.upright("blue_cup")
        and env.upright("white_cup"),
        180),
}


# ---- the environment ----

class TwinEnv:
    """The table-top twin, or the same table with a hand.

    embodiment  "robot", or "hand": no arm, each episode another light, table and viewpoint, which shakes
    image_size  pixels, one number or (height, width), at most 1024
    cameras     names out of "front", "side"; () renders nothing and needs no OpenGL
    spread      0..1 scales the random start regions around their centres: 1 full, 0 fixed starts
    """

    def __init__(self, embodiment="robot", image_size=64, cameras=("front", "side"), spread=1.0,
                 shadows=False):
        self.embodiment, self.cameras = embodiment, tuple(cameras)
        self.spread, self.shadows = float(spread), shadows
        self.image_size = tuple(int(n) for n in np.broadcast_to(image_size, 2))
        if embodiment not in ("robot", "hand"):
            raise InputError(f"embodiment is robot or hand, got {embodiment!r}")
        if not set(cameras) <= set(CAMERAS):
            raise InputError(f"the twin's cameras are {', '.join(CAMERAS)}, got {', '.join(cameras)}")
        if not 0 <= self.spread <= 1:
            raise InputError(f"spread is between 0 (fixed starts) and 1 (full start regions), got {spread}")
        if not all(1 <= n <= 1024 for n in self.image_size):
            raise InputError(f"image size is 1 to 1024 pixels, got {image_size}")
        if cameras and os.environ.get("MUJOCO_GL") == "disable":
            raise InputError("no OpenGL to render images with: apt-get install libegl1 libgl1 libosmesa6")
        self._models, self._renderers = {}, {}                  # per task, made when first needed

    # -- episodes --

    def reset(self, task, seed):
        """Starts an episode; everything random in it comes from (task, seed, spread).

        -> {"images": {camera: (H, W, 3) uint8 RGB, upright}, "proprio": (7,) float32}
        InputError: an unknown task, a negative seed
        """
        if task not in TASKS:
            raise InputError(f"the twin's tasks are {', '.join(TASKS)}, got {task!r}")
        if seed < 0:
            raise InputError(f"seed is 0 or more, got {seed}")
        self.task_name, self.task = task, TASKS[task]
        self.instruction, self.max_steps = self.task.instruction, self.task.max_steps
        if task not in self._models:
            model = build_model(self.embodiment, self.task.objects)
            self._models[task] = model, mujoco.MjData(model), mujoco.MjData(model)
        self.model, self.data, self._kinematics = self._models[task]
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_resetData(self.model, self._kinematics)
        number = list(TASKS).index(task)
        rng, self._film = (np.random.default_rng([seed, number, stream]) for stream in (0, 1))
        self._steps = self._good = 0
        self._target, self._turn = HOME + self.spread * rng.uniform(-0.02, 0.02, 3), TOOL_DOWN
        self._q = np.radians([0, -20, -70, 0, -90, 0]) if self.embodiment == "robot" else np.zeros(6)
        self._q, residual = self._inverse_kinematics(self._target, self._turn, iterations=200)
        assert residual < 1e-3, f"the tool is {residual} (m, rad) from its home pose"
        self.data.qpos[:8] = self.data.ctrl[:8] = [*self._q, OPENING, OPENING]
        for name in self.task.objects:
            self._place(name, rng)
        mujoco.mj_step(self.model, self.data, nstep=100)        # 0.2 s in which things settle
        if self.embodiment == "hand":
            self._change_scene()
            self._shake()
        return self._observe()

    def _place(self, name, rng):
        where, z = self.task.objects[name], THINGS[name].rest + 0.0005
        angle = self.spread * rng.uniform(-0.3, 0.3)
        if isinstance(where, str):
            x, y, base = self.data.joint(where).qpos[:3]
            z += base + THINGS[where].floor
        else:
            x, y = where[:2] + self.spread * np.array(where[2:]) * rng.uniform(-1, 1, 2)
        half = angle / 2 if name == "roll" else 0.0             # the others look the same all around
        self.data.joint(name).qpos[:] = [x, y, z, np.cos(half), 0, 0, np.sin(half)]

    def step(self, action, look=True):
        """One control step of 1/20 s. action (7,): see the top of the file. -> obs, done, success

        look = False draws nothing, obs is None. done = success or max_steps reached. ValueError: not 7 finite
        numbers
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, got {action}")
        self._command(np.clip(action[:3], -MAX_STEP, MAX_STEP), np.clip(action[3:6], -MAX_TURN, MAX_TURN))
        self.data.ctrl[:6] = self._q
        self.data.ctrl[6:] = OPENING if action[6] > 0.5 else SQUEEZE
        mujoco.mj_step(self.model, self.data, nstep=round(1 / CONTROL_HZ / PHYSICS_DT))
        if self.embodiment == "hand":
            self._shake()
        self._steps += 1
        self._good = self._good + 1 if self.task.success(self) else 0
        success = self._good >= 5                               # it has to hold for a quarter of a second
        return self._observe() if look else None, success or self._steps >= self.max_steps, success

    def _command(self, move, turn):
        """Adds a step to the commanded tool pose and solves for the joints. The command runs at most 3 cm
        ahead of the measured tool, stays within reach, and stays where it was if no joint angles lead to the
        new pose: otherwise it winds up, and later actions seem to do nothing."""
        tool = self.tool_position
        target = np.clip(tool + np.clip(self._target + move - tool, -0.03, 0.03), *WORKSPACE)
        target[:2] *= min(1.0, reach(target[2]) / np.linalg.norm(target[:2]))
        rotation = Rotation.from_rotvec(turn).as_matrix() @ self._turn
        q, residual = self._inverse_kinematics(target, rotation)
        if residual < 2e-3 and np.abs(q - self._q).max() < 0.35:    # 0.35 rad: another branch of the solution
            self._q, self._target, self._turn = q, target, rotation

    def _inverse_kinematics(self, position, rotation, iterations=20):
        """Damped least squares on a kinematic copy, from the last command. -> joints (6,), residual"""
        model, data, q, jacobian = self.model, self._kinematics, self._q.copy(), np.zeros((6, self.model.nv))
        for _ in range(iterations):
            data.qpos[:6] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            tool = data.site("tool")
            error = np.concatenate([position - tool.xpos, rotation_error(rotation, tool.xmat)])
            if np.linalg.norm(error) < 1e-5:
                break
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], tool.id)
            J = jacobian[:, :6]
            # dq = J^T (J J^T + damping I)^-1 error
            dq = J.T @ np.linalg.solve(J @ J.T + 1e-5 * np.eye(6), error)
            q = np.clip(q + dq, *model.jnt_range[:6].T)
        return q, np.linalg.norm(error)

    # -- what is seen --

    @property
    def tool_position(self):
        """(3,) m, base frame, measured."""
        return self.data.site("tool").xpos.copy()

    @property
    def opening(self):
        """Measured gripper opening, 0..1."""
        return float(np.clip(self.data.qpos[6:8].mean() / OPENING, 0, 1))

    def proprio(self):
        turn = rotation_error(self.data.site("tool").xmat, TOOL_DOWN)
        return np.array([*self.tool_position, *turn, self.opening], dtype=np.float32)

    def render(self, camera, image_size=None):
        """(H, W, 3) uint8 RGB, upright; image_size, a number or (H, W), where it is not the observation's."""
        key = self.task_name, tuple(int(n) for n in np.broadcast_to(image_size or self.image_size, 2))
        if key not in self._renderers:
            self._renderers[key] = mujoco.Renderer(self.model, *key[1])
            if len(self._renderers) == 1:   # at exit, but before mujoco ends OpenGL: else tracebacks
                atexit.register(lambda env: env() and env().close(), weakref.ref(self))
        renderer = self._renderers[key]
        renderer.update_scene(self.data, camera)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self.shadows     # shadows triple the time
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return renderer.render()

    def _observe(self):
        return {"images": {camera: self.render(camera) for camera in self.cameras}, "proprio": self.proprio()}

    def _change_scene(self):
        """Another light, table and camera offset (m x3, rad x3) for this film of a hand."""
        rng, model = self._film, self.model
        tables = np.array([[.30, .33, .36], [.45, .36, .28], [.25, .35, .30], [.42, .42, .40]])
        model.geom("table").rgba[:3] = tables[rng.integers(len(tables))] + rng.uniform(-0.05, 0.05, 3)
        model.light("lamp").diffuse[:] = rng.uniform(0.3, 0.7) + rng.uniform(-0.05, 0.05, 3)
        model.light("lamp").dir[:] = [*rng.uniform(-0.7, 0.7, 2), -1]
        self._offset = {camera: rng.uniform(-1, 1, 6) * [.03, .03, .03, .03, .03, .05] for camera in CAMERAS}
        self._wander = {camera: np.zeros(6) for camera in CAMERAS}

    def _shake(self):
        """Moves the cameras by the episode's offset and a slow random walk pulled back (m x3, rad x3)."""
        for camera, (eye, target, _) in CAMERAS.items():
            noise = self._film.normal(size=6) * ([0.0025] * 3 + [0.003] * 3)
            self._wander[camera] = 0.95 * self._wander[camera] + noise
            shift = self._offset[camera] + self._wander[camera]
            self.model.camera(camera).pos[:] = eye + shift[:3]
            turned = Rotation.from_rotvec(shift[3:]) * view(eye, target)
            self.model.camera(camera).quat[:] = quaternion(turned)
        mujoco.mj_camlight(self.model, self.data)

    # -- what the success checks ask --

    def position(self, name):
        """(3,) m: origin of a thing, or of "world" (the table)."""
        return self.data.body(name).xpos.copy()

    def upright(self, name):
        """Tilted by less than 20 degrees."""
        return bool(self.data.body(name).xmat[8] > np.cos(np.radians(20)))

    def touches(self, name):
        """Names of the bodies that touch `name`; the table is "world", the fingers are "left" and "right"."""
        pairs = self.model.geom_bodyid[self.data.contact.geom]      # (contacts, 2)
        me = self.model.body(name).id
        others = set(pairs[(pairs == me).any(axis=1)].ravel().tolist()) - {me}
        return {self.model.body(other).name for other in others}

    def placed(self, name, support, radius=np.inf):
        """`name` rests on `support`, its centre within `radius` (m), and touches neither finger nor table."""
        touched = self.touches(name)
        speed = np.linalg.norm(self.data.joint(name).qvel[:3])
        offset = np.linalg.norm((self.position(name) - self.position(support))[:2])
        return bool(support in touched and not touched & {"left", "right", "world"} - {support}
                    and speed < 0.03 and offset < radius)

    def close(self):
        """Frees the OpenGL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


# ---- the scripted expert ----

class Expert:
    """A scripted demonstrator for the episode that `env` has just started: act() -> action (7,).

    It steers in closed loop by what can be seen (tool, things, opening) and its place in the plan. Speed,
    height, path, grasp point, jitter and short pauses vary with the seed, as a person's do; it is slow where
    it must be exact.
    """

    def __init__(self, env, seed):
        number = list(TASKS).index(env.task_name)
        self.env, self.rng = env, np.random.default_rng([seed, number, 2])     # 0 and 1 are the scene's
        self.fast, self.slow = self.rng.uniform((0.010, 0.0045), (0.014, 0.0065))       # m per step
        self.hover, self.carry = self.rng.uniform((0.065, 0.135), (0.085, 0.155))       # m above thing, table
        self.jitter = np.zeros(6)
        self.plan = self._plan()

    def act(self):
        return next(self.plan)

    def _plan(self):
        """Yields one action per control step: the waypoints, each tried again if its thing was missed."""
        for move in self.env.task.waypoints:
            for _ in range(3):
                yield from self._pick_and_place(move)
                if np.linalg.norm((self._goal(move) - self.env.position(move.thing))[:2]) < 0.035:
                    break
        while True:
            yield self._action(np.zeros(3), 1)

    def _pick_and_place(self, move):
        env, slip = self.env, np.append(self.rng.uniform(-0.003, 0.003, 2), 0)

        def grasp():
            return env.position(move.thing) + [0, 0, THINGS[move.thing].grasp] + slip

        def lost():
            return np.linalg.norm(env.tool_position - grasp()) > 0.03

        def goal():     # where the tool has to go to bring the thing to its goal; if it is lost, nowhere
            return env.tool_position + (0 if lost() else self._goal(move) - env.position(move.thing))

        yield from self._go(lambda: grasp() + [0, 0, self.hover], 1, 0.012, curve=True)
        yield from self._go(grasp, 1, 0.005, brake=True)
        yield from self._grip(0)
        yield from self._go(lambda: np.append(grasp()[:2], self.carry), 0, 0.02)
        if lost():
            return
        yield from self._go(lambda: np.append(goal()[:2], self.carry), 0, 0.008, curve=True)
        yield from self._go(goal, 0, 0.006, brake=True)
        yield from self._grip(1)
        up = np.append(env.tool_position[:2], self.carry)
        yield from self._go(lambda: up, 1, 0.03)

    def _goal(self, move):
        """Where the origin of the thing is to be when it is let go: 3 mm above what carries it."""
        middle = np.mean([self.env.position(name) for name in move.onto], axis=0)
        floor = THINGS[move.onto[0]].floor if len(move.onto) == 1 else 0.0
        return middle + [*move.shift, floor + THINGS[move.thing].rest + 0.003]

    def _go(self, point, grip, tolerance, curve=False, brake=False):
        """Moves the tool to point() within tolerance (m): curved in transit, braking to be exact."""
        side = self.rng.uniform(-0.25, 0.25) if curve else 0.0
        pause = self.rng.integers(2, 5) if curve and self.rng.random() < 0.2 else 0
        still, last = 0, np.inf
        for t in range(60):
            error = point() - self.env.tool_position
            distance = np.linalg.norm(error)
            still = still + 1 if brake and last - 5e-4 < distance < 0.03 else 0
            last = distance
            if distance < tolerance or still >= 4:      # there, or stopped by what stands below
                return
            speed = min(self.fast, self.slow * (0.5 + 40 * distance)) if brake else self.fast
            if brake and np.linalg.norm(error[:2]) > 0.012:
                error[2] = max(error[2], 0)             # first above the thing, then down
            error[:2] += side * np.array([-error[1], error[0]])
            if 5 <= t < 5 + pause:
                error = np.zeros(3)
            yield self._action(error * min(0.7, speed / max(np.linalg.norm(error), 1e-9)), grip)

    def _grip(self, grip):
        """Holds still until the fingers have closed on something (they stop), or have opened."""
        last = np.inf
        for _ in range(12):
            if abs(self.env.opening - last) < 0.01 and (grip == 0 or self.env.opening > 0.9):
                return
            last = self.env.opening
            yield self._action(np.zeros(3), grip)

    def _action(self, move, grip):
        self.jitter = 0.7 * self.jitter + self.rng.normal(size=6) * ([0.0008] * 3 + [0.004] * 3)
        calm = min(1.0, np.linalg.norm(move) / self.fast)       # a hand that moves is a hand that shakes
        turn = -0.3 * self.env.proprio()[3:6]
        return np.array([*move, *turn, grip]) + calm * np.append(self.jitter, 0)


def expert_episode(env, task, seed):
    """One episode of the scripted expert. Its actions are rounded to float32 before they are executed, so that what
    a dataset stores is what was done. -> success, observations (T), actions (T-1, each (7,) float32)"""
    observations, actions, done, success = [env.reset(task, seed)], [], False, False
    expert = Expert(env, seed)
    while not done:
        actions.append(np.asarray(expert.act(), np.float32))
        obs, done, success = env.step(actions[-1])
        observations.append(obs)
    return success, observations, actions


# ---- one episode of a policy, in every environment and on the arm ----------------------------------------

def rollout(env, policy_fn, chunker, task, start, max_steps=None, film=None):
    """One episode: observation -> action chunk -> action -> step. -> success, actions (T, A) as sent to env.step

    policy_fn(obs) -> (n, A) is called only when the chunker needs a new chunk, always with the newest observation.
    """
    chunker.reset()
    obs, actions = env.reset(task, start), []
    if film:
        film.add()
    for _ in range(max_steps or env.max_steps):
        actions.append(chunker.step(lambda: policy_fn(obs)))                          # (A,)
        obs, done, success = env.step(actions[-1], look=chunker.asks)
        if film:
            film.add()
        if done:
            break
    return bool(success), np.array(actions)


def policy_function(policy, instruction, rng):
    """-> policy_fn(obs) -> (n, A), for rollout(). What a policy samples starts from `noise` (n, A), drawn from rng
    at every call: an episode then depends on its own seed alone."""
    def policy_fn(obs):
        noise = rng.standard_normal((policy.chunk, policy.config["action_dim"]), np.float32)
        return policy.act(batch_observations([{**obs, "noise": noise}], [instruction], policy))[0].cpu().numpy()
    return policy_fn


def check_fit(label, checkpoint, name, cameras, proprio_dim, action, hz):
    """InputError if a finetuned checkpoint does not fit an environment.

    label, name             the checkpoint and the environment, for the message
    cameras, proprio_dim    what the environment's observations have
    action                  description of its actions, like ACTION: number, units and `delta` are compared
    hz                      its control rate; every dataset of the checkpoint must have this rate
    """
    config, data = checkpoint["config"], checkpoint["data"]
    trained = data.get("action") or {}
    for what, has, takes in (
            ("numbers per action", config["action_dim"], len(action["names"])),
            ("as the units of its actions", trained.get("units"), action["units"]),
            ("as `delta` (which numbers are changes per step)", trained.get("delta"), action["delta"]),
            ("numbers of proprioception", config["proprio_dim"] or proprio_dim, proprio_dim)):
        if has != takes:
            raise InputError(f"{label} was finetuned with {has} {what}, {name} has {takes}: give a checkpoint that "
                             "was finetuned on this robot's data")
    if not set(config["cameras"]) <= set(cameras):
        raise InputError(f"{label} needs the cameras {', '.join(config['cameras'])}, {name} has "
                         f"{', '.join(cameras)}: finetune on data whose cameras have these names")
    for part in data.get("mixture") or ():          # an action must span one step of the environment
        rate = part["fps"] / part["stride"]
        if not 0.95 < rate / hz < 1.05:
            raise InputError(f"{label} was finetuned on actions at {rate:g} Hz ({part['path']}, stride "
                             f"{part['stride']}), {name} runs at {hz:g} Hz: finetune on data of that rate, or "
                             "choose it with --strides")


class Film:
    """Records the pictures of an episode, larger than the policy sees them, and writes them as an mp4."""

    def __init__(self, env, cameras, hz, size=256):
        self.env, self.cameras, self.hz, self.size, self.frames = env, cameras, hz, size, []

    def add(self):
        """Adds what env.render(camera, size) shows now, the cameras side by side."""
        self.frames.append(np.concatenate([self.env.render(c, self.size) for c in self.cameras], 1))

    def write(self, folder, name, instruction, success):
        """Writes folder/name_success.mp4 or name_failure.mp4, with instruction and outcome on every frame."""
        outcome = "success" if success else "failure"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}_{outcome}.mp4"
        partial = folder / f"partial_{path.name}"
        height, width = self.frames[0].shape[:2]                                      # (H, cameras * W, 3)
        lines = textwrap.wrap(f"{instruction} [{outcome}]", width // 8)
        strip = np.full((16 * len(lines) + 8, width, 3), 255, np.uint8)
        for i, line in enumerate(lines):
            cv2.putText(strip, line, (6, 16 * (i + 1)), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        video = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), self.hz, (width, height + len(strip)))
        if not video.isOpened():
            raise InputError(f"OpenCV cannot write {partial}: leave out --video, or choose another --out")
        for frame in self.frames + self.frames[-1:] * (self.hz // 2):                 # the end stays for 0.5 s
            video.write(np.concatenate([strip, frame[..., ::-1]]))                    # RGB -> BGR
        video.release()
        os.replace(partial, path)


# ---- the real arm: kinematics, in numpy ------------------------------------------------------------------

JOINT_MARGIN = np.radians(3)        # kept away from the joints' limits
MAX_JOINT_STEP = np.radians(4.5)    # per control step: 90 degrees/s, half of what the slowest joint can
BRANCH = np.radians(40)             # a solution that far from the last one is another branch: refused
LEAD = 0.04                         # m that the commanded tool may run ahead of the measured one
MAX_TILT = 0.6                      # rad of the tool from straight down
CLEARANCE = 0.02                    # m between parts of the arm, and of the arm above the table
FRAME = 0.01                        # s between two joint targets on the wire: the controller's `follow`
ABOVE = np.array([[-0.7, -0.7, 0.10], [0.7, 0.7, 1.1]])     # m, of the tool on its way home: above all things
HOME_SPEED = np.radians(20)         # rad/s on the way home
HOME_JOINTS = np.radians([0, -20, -70, 0, -90, 180])    # near HOME, tool down


def tool_pose(q):
    """Joints (6,) rad -> tool centre (3,) m and rotation (3, 3) in the base frame."""
    flange = dh_forward(q)
    return flange[:3, 3] + TOOL * flange[:3, 2], flange[:3, :3]


def inverse_kinematics(position, rotation, q, iterations=40):
    """Joints (6,) rad that bring the tool there, on the branch of q: damped least squares from q.
    -> joints, residual (norm over m and rad); a pose that cannot be reached leaves a large residual."""
    q = np.array(q, dtype=np.float64)
    for _ in range(iterations):
        frames = joint_frames(q)
        tool = frames[-1, :3, 3] + TOOL * frames[-1, :3, 2]
        error = np.concatenate([position - tool, rotation_error(rotation, frames[-1, :3, :3])])
        if np.linalg.norm(error) < 1e-10:
            break
        # J = [z_i x (tool - o_i); z_i], dq = J^T (J J^T + damping I)^-1 error
        axes = frames[:, :3, 2]                                                 # (6, 3)
        J = np.vstack([np.cross(axes, tool - frames[:, :3, 3]).T, axes.T])      # (6, 6)
        q += np.clip(J.T @ np.linalg.solve(J @ J.T + 1e-7 * np.eye(6), error), -0.3, 0.3)
    return q, np.linalg.norm(error)


# Capsules around base column, upper arm, forearm and wrist with tool: radius (m). Neighbours share a joint.
RADII = np.array([0.065, 0.055, 0.050, 0.050])


def clearance(q):
    """Smallest gap (m) between parts of the arm that are no neighbours, or between forearm or wrist and the
    table. Parts are capsules, sampled at nine points each: off by at most 4 mm."""
    frames = joint_frames(q)
    tool = frames[-1, :3, 3] + (TOOL - 0.02) * frames[-1, :3, 2]
    corners = np.array([np.zeros(3), frames[1, :3, 3], frames[2, :3, 3], frames[3, :3, 3], tool])
    share = np.linspace(0, 1, 9)[None, :, None]
    points = corners[:-1, None] * (1 - share) + corners[1:, None] * share       # (4 parts, 9, 3)
    gaps = [np.linalg.norm(points[i][:, None] - points[j][None], axis=-1).min() - RADII[i] - RADII[j]
            for i, j in ((0, 2), (0, 3), (1, 3))]
    # Of the hand, only down to the flange: fingers have to come near the table, WORKSPACE is their limit.
    return min(*gaps, points[2, :, 2].min() - RADII[2], frames[-1, 2, 3] - RADII[3])


# ---- the safety gate -------------------------------------------------------------------------------------

def shorten(vector, length):
    """The vector, or as much of it as is `length` long."""
    return vector * min(1.0, length / max(np.linalg.norm(vector), 1e-12))


class Refused(Exception):
    """The gate let a command not pass; the target stays where it was."""


class Gate:
    """Every command for the arm passes here: an action (7,) becomes the joints' next target, or is Refused.

    In this order: shape and finiteness; absurd size; clamp per step; tool within LEAD of the measured one;
    workspace box; reach; inverse kinematics; tilt; joint limits less a margin; joint step (scaled down; a
    jump to another branch is refused); self-collision and table. What is refused changes nothing, so that a
    target never winds up. There is one way around the first half, for paths that were planned in joints
    (the way home), and none around the second, admit().
    """

    def __init__(self):
        self.refusals, self.clamped = collections.Counter(), 0

    def hold(self, q):
        """The target is where the joints q (6,) are."""
        self.q = np.array(q, dtype=np.float64)
        self.position, self.turn = tool_pose(self.q)

    def __call__(self, action, measured):
        """action (7,), measured joints (6,) rad -> target joints (6,) rad, what is executed of the action."""
        try:
            return self._pass(action, measured)
        except Refused as refused:
            self.refusals[str(refused).split(":")[0]] += 1
            raise

    def _pass(self, action, measured):
        try:
            action = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError):
            raise Refused("not 7 finite numbers") from None
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise Refused("not 7 finite numbers")
        limit = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3)
        if (np.abs(action[:6]) > 10 * limit).any():
            raise Refused(f"absurd: more than ten times the largest step of {MAX_STEP} m, {MAX_TURN} rad")
        tool, _ = tool_pose(measured)
        target = np.clip(self.position + shorten(action[:3], MAX_STEP), tool - LEAD, tool + LEAD)
        target = np.clip(target, *WORKSPACE)
        target[:2] *= min(1.0, reach(target[2]) / np.linalg.norm(target[:2]))
        target = self.position + shorten(target - self.position, MAX_STEP)
        turn = Rotation.from_rotvec(shorten(action[3:6], MAX_TURN)).as_matrix() @ self.turn
        q, residual = inverse_kinematics(target, turn, self.q)
        if residual > 1e-6:
            raise Refused("inverse kinematics: no joint angles lead there")
        if turn[2, 2] > -np.cos(MAX_TILT) and turn[2, 2] > self.turn[2, 2]:
            raise Refused(f"tilt: the tool leans more than {MAX_TILT} rad")
        before = self.position, self.turn
        self.position, self.turn = tool_pose(self.admit(q))
        executed = np.array([*self.position - before[0], *rotation_error(self.turn, before[1]),
                             float(action[6] > 0.5)])
        self.clamped += np.abs(executed[:6] - action[:6]).max() > 1e-4
        return self.q, executed

    def admit(self, q, box=WORKSPACE):
        """The checks in joints; q (6,) rad becomes the target, shortened to the largest step. The tool stays
        in the box; one that is outside may only come nearer."""
        if (np.abs(q) > JOINT_LIMIT - JOINT_MARGIN).any():
            raise Refused(f"joint limit: joint {np.abs(q / JOINT_LIMIT).argmax() + 1}")
        step = q - self.q
        if np.abs(step).max() > BRANCH:
            raise Refused("joint step: a jump to another branch")
        q = self.q + step * min(1.0, MAX_JOINT_STEP / max(np.abs(step).max(), 1e-12))
        if clearance(q) < min(CLEARANCE, clearance(self.q)):        # out of a bad place is allowed
            raise Refused("collision: the arm with itself or the table")
        tool, now = (tool_pose(x)[0] for x in (q, self.q))
        outside, before = (np.maximum(box[0] - x, x - box[1]).max() for x in (tool, now))
        if outside > max(0.001, before):
            raise Refused("outside: the tool would leave the workspace")
        self.q = q
        return q


def path_home(q):
    """Joints from q (6,) rad to HOME at HOME_SPEED, one row per control step: the tool straight up first, as
    it is, then in the joints. InputError if that way is not free: a person has to bring the arm near home."""
    gate, path, largest = Gate(), [], HOME_SPEED / CONTROL_HZ
    gate.hold(q)
    try:
        position, turn = gate.position.copy(), gate.turn
        while position[2] < HOME[2] - 0.002:
            position[2] += 0.002
            up, residual = inverse_kinematics(position, turn, gate.q)
            if residual > 1e-6 or np.abs(up - gate.q).max() > largest:
                raise Refused("from there the tool cannot be lifted straight up")
            path.append(gate.admit(up, ABOVE))
        goal, residual = inverse_kinematics(HOME, TOOL_DOWN, HOME_JOINTS)
        if residual > 1e-6:
            raise Refused(f"HOME, {HOME.tolist()} m, is out of reach")
        while np.abs(goal - gate.q).max() > 1e-9:
            step = goal - gate.q
            path.append(gate.admit(gate.q + step * min(1, largest / np.abs(step).max()), ABOVE))
    except Refused as refused:
        raise InputError(f"the way home is not free ({refused}): bring the tool by hand or with the pendant "
                         f"near x {HOME[0]}, y {HOME[1]}, z {HOME[2]} m, pointing down") from None
    return path


# ---- the driver ------------------------------------------------------------------------------------------

class ArmStopped(Exception):
    """The arm was stopped and stays so: why. Only a new start of the script moves it again."""


def within(seconds, call, *args):
    """call(*args), but never longer: some calls of the vendor's library do not return. ArmStopped."""
    answer = queue.Queue()

    def work():
        try:
            answer.put((call(*args), None))
        except (AttributeError, TypeError, ValueError, LookupError, OSError, ctypes.ArgumentError) as e:
            answer.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise ArmStopped(f"{call.__name__} did not return within {seconds} s") from None
    if error:
        raise ArmStopped(f"{call.__name__}: {type(error).__name__}: {error}") from error
    return result


def import_sdk():
    """The vendor's library, imported only when an arm is used. InputError where there is none."""
    try:
        with contextlib.redirect_stdout(None):
            from Robotic_Arm import rm_robot_interface
            return rm_robot_interface
    except (ImportError, NameError, OSError) as e:      # NameError: on macOS it has no library to name
        raise InputError(f"the vendor's library does not load here ({e}): pip install Robotic_Arm==1.1.6, on "
                         "Linux (x86-64 or aarch64); there is none for macOS") from e


class RealmanArm:
    """A Realman RM65-B with a parallel gripper, through the vendor's library.

    Motion is one kind of message alone: joint targets (movej_canfd), one every 10 ms, from a thread that
    walks from one target of the gate to the next within a control step. When this process dies, no further
    target comes and the arm stands within a step. There is no blocking move, no planned trajectory that goes
    on without us, and every call that waits for an answer waits for a known time.

    The same thread is the watchdog. It latches: `stopped` holds the first reason, a slow stop is sent, no
    target is sent any more, every later command raises ArmStopped.
    """
    STALL = 0.3         # s without a command in an episode
    STATE_AGE = 0.2     # s
    IMAGE_AGE = 0.5     # s
    LAG = np.radians(5)         # of a joint behind its target, for 0.2 s
    OVERRUN = 0.2       # s between two frames; meanwhile the arm stands at the last one

    def __init__(self, address, move):
        """address "IP" or "IP:PORT"; move False: all is read and computed, nothing is sent that moves."""
        host, _, port = address.partition(":")
        if not (port or "8080").isdigit():
            raise InputError(f"--arm takes IP or IP:PORT, got {address!r}")
        try:
            self.host, self.port, self.move = socket.gethostbyname(host), int(port or 8080), move
        except OSError as e:
            raise InputError(f"--arm {host!r} is no address ({e}): the vendor's is 192.168.1.18") from e
        self.gate, self.stopped, self.stop_sent, self.watch = Gate(), None, None, []
        self.state, self.opening, self.grip, self.grip_sent = None, None, None, None
        self.armed = self.closing = False
        self.command_at = self.lag_since = None
        self.aim = self.sent = None                 # joints (6,) rad: where to, and what was sent last
        self.aim_at = 0.0                           # when it is to be there
        self.frames = self.overruns = self.limited = 0
        self.last_frame, self.returned = None, 0
        self.wire, self.threads, self.stopping = threading.Lock(), [], None
        self._lock_arm()
        connected = False
        try:
            self._connect()
            connected = True
        finally:
            if not connected:
                self.close()

    # -- connection --

    def _lock_arm(self):
        """One process per arm on this machine."""
        path = Path("/tmp") / f"realman-{self.host}-{self.port}.lock"
        self.arm, self.lock = None, open(path, "a+")
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            raise InputError("an arm is driven from Linux here (its locks and terminals)") from None
        except OSError:
            self.lock.seek(0)
            raise InputError(f"another process of this machine (number {self.lock.read() or 'unknown'}) "
                             f"drives the arm at {self.host}: end it first") from None
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()

    def _connect(self):
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as s:
                here, self.peer = s.getsockname()[0], s.getpeername()[0]
        except OSError as e:
            raise InputError(f"no controller at {self.host}:{self.port} ({e}): is it on, and this machine in "
                             "its network? The vendor's default address is 192.168.1.18") from e
        sdk = import_sdk()
        with contextlib.redirect_stdout(None):
            self.arm = sdk.RoboticArm(sdk.rm_thread_mode_e.RM_TRIPLE_MODE_E)
        handle = within(8, self.arm.rm_create_robot_arm, self.host, self.port, 3)
        if handle.id == -1:     # it does not raise; any other call but this one may now hang
            raise InputError(f"{self.host}:{self.port} does not answer as a Realman controller")
        self.arm.rm_set_timeout(200)        # ms, for every answer
        self._callback = sdk.rm_realtime_arm_state_callback_ptr(self._receive)      # must outlive the arm
        self.arm.rm_realtime_arm_state_call_back(self._callback)
        if not self._wait_for_state(1.0):
            self._listen(sdk, here)
        for work in (self._grip_loop, self._frame_loop):
            self.threads.append(threading.Thread(target=work, daemon=True))
            self.threads[-1].start()

    def _listen(self, sdk, here):
        """The controller is told to send its state here; it keeps that setting."""
        code, config = within(1, self.arm.rm_get_realtime_push)
        if code or config["port"] < 1 or not self.move:     # after a failure the numbers are all zero
            raise InputError(f"the controller does not send its state to this machine, {here} (its setting: "
                             f"{config if not code else f'no answer, code {code}'}): with --move it is told "
                             "to, or set the UDP push on the vendor's page")
        config = sdk.rm_realtime_push_config_t(1, True, config["port"], 0, here, sdk.rm_udp_custom_config_t(
            joint_speed=1, arm_current_status=1))
        if within(1, self.arm.rm_set_realtime_push, config) or not self._wait_for_state(1.0):
            raise InputError(f"the controller's state does not arrive at UDP {here}:{config.port}: open that "
                             "port in the firewall of this machine")

    def _wait_for_state(self, seconds):
        end = time.monotonic() + seconds
        while self.state is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.state is not None

    def _receive(self, s):
        """Called by the library's own thread for every state that anybody sends to its port."""
        if s.errCode == 0 and s.arm_ip.decode() == self.peer:
            self.state = (time.monotonic(), np.radians(s.joint_status.joint_position[:6]),
                          [int(s.err.err[i]) for i in range(s.err.err_len)])

    def checks(self):
        """[(what, what was found, whether that is right)]; an arm with a wrong one is not moved."""
        arm, rows = self.arm, []

        def ask(what, call, right, found=lambda answer: answer):
            code, answer = within(2, call)
            rows.append((what, found(answer) if code == 0 else f"no answer (code {code})",
                         code == 0 and bool(right(answer))))

        def dictionary(call):           # some calls return a dict with its code in it
            def asked():
                answer = call()
                return answer.pop("return_code"), answer
            asked.__name__ = call.__name__
            return asked

        ask("model", arm.rm_get_robot_info, lambda a: (a["arm_model"], a["arm_dof"]) == ("RM_65", 6))
        ask("firmware", arm.rm_get_arm_software_info, lambda a: True,
            lambda a: f"{a['product_version']}, controller {a['ctrl_info']['version']}")
        ask("tool frame", arm.rm_get_current_tool_frame, lambda a: not np.any(a["pose"]),
            lambda a: f"{a['name']} {a['pose']}")
        ask("work frame", arm.rm_get_current_work_frame, lambda a: not np.any(a["pose"]),
            lambda a: f"{a['name']} {a['pose']}")
        # degrees and metres, as floats; order alpha, a, d, offset as in DH
        ask("DH table", arm.rm_get_DH_data, lambda a: np.allclose(dh_table(a), DH, atol=2e-4),
            lambda a: "as ours" if np.allclose(dh_table(a), DH, atol=2e-4) else dh_table(a).round(4).tolist())
        ask("run mode", arm.rm_get_arm_run_mode, lambda a: a == 1, lambda a: f"{a} (1 = real)")
        ask("power", arm.rm_get_arm_power_state, lambda a: a == 1, lambda a: f"{a} (1 = on)")
        ask("joints", arm.rm_get_arm_all_state,
            lambda a: all(a["joint_en_flag"][:6]) and not any(a["joint_err_code"][:6]),
            lambda a: f"enabled {a['joint_en_flag'][:6]}, errors {a['joint_err_code'][:6]}")
        ask("errors", arm.rm_get_current_arm_state, lambda a: all(int(e) == 0 for e in a["err"]["err"]),
            lambda a: a["err"]["err"])
        ask("joint limits", arm.rm_get_joint_max_pos,
            lambda a: (np.array(a[:6]) >= np.degrees(JOINT_LIMIT - JOINT_MARGIN)).all())
        ask("gripper", arm.rm_get_gripper_state, lambda a: a["status"] == 1 and a["error"] == 0,
            lambda a: f"status {a['status']} (1 = online), error {a['error']}, opening {a['actpos'] / 1000}")
        if self.move:
            within(2, arm.rm_set_collision_state, 5)
        ask("collision stage", arm.rm_get_collision_stage, lambda a: a > 0 or not self.move,
            lambda a: f"{a} (0 = off, 8 = most sensitive)")
        age, q, _ = self.state
        age = time.monotonic() - age
        rows.append(("state", f"{1000 * age:.0f} ms old, joints {np.degrees(q).round(1).tolist()} degrees, "
                     f"tool at {tool_pose(q)[0].round(3).tolist()} m", age < self.STATE_AGE))
        return rows

    # -- what is measured --

    @property
    def joints(self):
        """(6,) rad, measured. ArmStopped if the state is too old to be true."""
        at, q, _ = self.state
        if time.monotonic() - at > self.STATE_AGE:
            self.stop(f"state: the last one is {time.monotonic() - at:.2f} s old")
            self.check()
        return q

    def proprio(self):
        """(7,) float32, see the top of the file."""
        position, turn = tool_pose(self.joints)
        return np.array([*position, *rotation_error(turn, TOOL_DOWN), self.opening or 0.0], np.float32)

    # -- commands --

    def arm_motors(self):
        """From here on frames are sent and the watchdog watches; the target is where the arm stands, or, if
        it is armed already, where it was sent."""
        self.check()
        if not self.armed:
            code, degrees = within(1, self.arm.rm_get_joint_degree)
            if code or np.abs(np.radians(degrees[:6]) - self.joints).max() > np.radians(1):
                self.stop(f"state: asked, the controller says joints {degrees} (code {code}), pushed, it "
                          f"says {np.degrees(self.joints).round(2).tolist()}")
                self.check()
            self.sent = self.joints
        self.gate.hold(self.sent)
        self.aim, self.command_at, self.lag_since = self.gate.q, None, None
        self.last_frame = time.monotonic()
        self.armed = True

    def rest(self):
        """No command is expected until the next one; the arm holds its target."""
        self.command_at = None

    def act(self, action):
        """One action (7,) of a control step. -> what is executed of it (7,). Refused, ArmStopped.

        In a dry run the gate is told that the arm follows; else it would hold the targets near one place.
        """
        self.check()
        joints = self.joints
        q, executed = self.gate(action, joints if self.move else self.gate.q)
        self.grip = executed[6]
        self._aim(q)
        return executed

    def follow(self, q):
        """One row of a planned path in joints. Refused, ArmStopped."""
        self.check()
        self._aim(self.gate.admit(q, ABOVE))
        self.gate.hold(self.gate.q)

    def keep(self):
        """Stay: what follows a refused command."""
        self.check()
        self._aim(self.gate.q)

    def _aim(self, q):
        now = time.monotonic()
        self.aim, self.aim_at, self.command_at = q, now + 1 / CONTROL_HZ, now

    def check(self):
        """ArmStopped if the arm was stopped, or if nobody sends its targets any more."""
        if self.armed and time.monotonic() - self.last_frame > self.OVERRUN:
            self.stop(f"overrun: no frame for {time.monotonic() - self.last_frame:.2f} s")
        if self.stopped:
            raise ArmStopped(self.stopped)

    def stop(self, reason, fast=False):
        """Latch, and send a slow stop (fast: at once, which brakes hard and forgets the trajectory). Returns
        at once whatever the controller does; may be called from any thread and from a signal handler."""
        self.stopped = self.stopped or reason
        if self.arm and self.armed and (fast or not self.stop_sent):
            self.stop_sent = time.monotonic()
            call = self.arm.rm_set_arm_stop if fast else self.arm.rm_set_arm_slow_stop
            self.stopping = threading.Thread(target=self._send_stop, args=(call,), daemon=True)
            self.stopping.start()

    def _send_stop(self, call):
        got = self.wire.acquire(timeout=0.05)       # after the frame that may be on its way, not before it
        self.returned = call() if self.move else 0
        if self.returned:                           # refused or unanswered: once more, hard
            self.arm.rm_set_arm_stop()
        if got:
            self.wire.release()

    # -- threads --

    def _frame_loop(self):
        due = time.monotonic()
        try:
            while not self.closing:
                due = max(due + FRAME, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
                if self.armed and not self.stopped:
                    self.frame(time.monotonic())
        finally:
            if not self.closing:
                self.stop("driver: the thread that sends the targets has died")

    def frame(self, now):
        """One frame: what the watchdog has to say, then the joints' target of this moment."""
        reason = self.watchdog(now)
        if reason:
            return self.stop(reason)
        self.last_frame = now
        self.advance((self.aim_at - now) / FRAME)
        if self.returned:
            self.stop(f"controller: a target was not sent (code {self.returned})")

    def advance(self, frames_left):
        """Sends the next joints on the straight way to the aim, so as to be there in frames_left frames; but
        however late a command or a frame is, no faster than MAX_JOINT_STEP and MAX_STEP per control step."""
        step = (self.aim - self.sent) / max(frames_left, 1)
        share = CONTROL_HZ * FRAME                      # of a control step is one frame
        slower = min(1.0, share * MAX_JOINT_STEP / max(np.abs(step).max(), 1e-12))
        tool = tool_pose(self.sent)[0]
        for _ in range(2):                              # twice: the tool's way is curved
            distance = np.linalg.norm(tool_pose(self.sent + slower * step)[0] - tool)
            slower *= min(1.0, share * MAX_STEP / max(distance, 1e-12))
        self.limited += slower < 0.999
        self.sent = self.sent + slower * step
        self.send(self.sent)

    def send(self, q):
        """Joints (6,) rad to the wire, unless the arm was stopped. The library returns 0 even for what the
        controller refuses: that shows in its state alone."""
        with self.wire:
            if not self.stopped and self.move:
                self.returned = self.arm.rm_movej_canfd(np.degrees(q).tolist(), True)
        self.frames += 1
        if self.returned:
            self.stop(f"controller: a target was not sent (code {self.returned})")

    def watchdog(self, now):
        """-> why the arm has to stop now, or None."""
        at, q, errors = self.state
        if any(errors):
            return f"controller: error {', '.join(f'{e} = 0x{e:04X}' for e in errors if e)}"
        if now - at > self.STATE_AGE:
            return f"state: none for {now - at:.2f} s"
        if self.command_at and now - self.command_at > self.STALL:
            return f"policy: no command for {now - self.command_at:.2f} s"
        if now - self.last_frame > self.OVERRUN:
            return f"overrun: {now - self.last_frame:.2f} s between two frames"
        self.overruns += now - self.last_frame > 2.5 * FRAME
        lag = np.abs(q - self.sent).max()
        if lag <= self.LAG or not self.move:
            self.lag_since = None
        elif self.lag_since is None:
            self.lag_since = now
        elif now - self.lag_since > 0.2:
            return f"lag: a joint is {np.degrees(lag):.1f} degrees behind its target"
        return next(filter(None, (watch() for watch in self.watch)), None)

    def _grip_loop(self):
        """The gripper: its wanted side is sent when it changes, its opening is read 20 times a second. Calls
        that wait are here alone, so a slow answer delays no frame."""
        silent = 0
        try:
            while not self.closing:
                wanted = self.grip
                if self.move and self.armed and not self.stopped and wanted not in (None, self.grip_sent):
                    # speed 500 of 1000; force 200 of 1000, which a paper cup survives; never blocking
                    code = (self.arm.rm_set_gripper_release(500, False, 1) if wanted > 0.5 else
                            self.arm.rm_set_gripper_pick(500, 200, False, 1))
                    if code:
                        self.stop(f"gripper: command refused or unanswered (code {code})")
                    self.grip_sent = wanted
                code, answer = self.arm.rm_get_gripper_state()
                silent = silent + 1 if code else 0
                if not code:
                    self.opening = answer["actpos"] / 1000
                    if answer["error"] and self.armed:
                        self.stop(f"gripper: error {answer['error']}")
                elif silent > 3 and self.armed:
                    self.stop(f"gripper: no state (code {code})")
                time.sleep(0.05)
        finally:
            if not self.closing:
                self.stop("driver: the gripper's thread has died")

    def close(self):
        """Stops what moves, ends the threads, lets the arm go. Cannot hang."""
        self.closing = True
        if self.armed and not self.stopped:
            self.stop("end")
        for thread in [*self.threads, *([self.stopping] if self.stopping else [])]:
            thread.join(1)
        if self.arm:
            with contextlib.suppress(ArmStopped):
                within(2, self.arm.rm_delete_robot_arm)
            self.arm = None
        self.lock.close()


def dh_table(a):
    """rm_get_DH_data's answer -> (6, 4) like DH: alpha (rad), a, d (m), offset (rad)."""
    columns = a if isinstance(a, dict) else a.to_dict(6)
    alpha, length, d, offset = (np.array(columns[key][:6]) for key in ("alpha", "a", "d", "offset"))
    return np.stack([np.radians(alpha), length, d, np.radians(offset)], axis=1)


# ---- cameras ---------------------------------------------------------------------------------------------

class Camera:
    """The newest picture of a source and the time it came, kept by a thread.

    source  a number or /dev/v4l/by-id/... (a USB camera), a video file (played at its own rate, in a loop: to
            rehearse), a URL (an IP camera; the twin), or rs:SERIAL (a RealSense: pip install pyrealsense2)

    A picture that equals the one before, or shows a single colour, is no new picture: a camera that froze or
    went dark is noticed like one that was unplugged, by the age of its last good picture.
    """
    SIZE, FPS = (640, 480), 30

    def __init__(self, name, source):
        self.name, self.source, self.closing, self.settings = name, source, False, ""
        self.picture, self.at, self.why = None, time.monotonic(), "no picture yet"
        self.read, self.release = self._opencv()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()
        end = time.monotonic() + 5
        while self.picture is None and time.monotonic() < end:
            time.sleep(0.01)
        if self.picture is None:
            raise InputError(f"camera {name} ({source}) gives no picture: {self.why}")

    def _opencv(self):
        live = self.source.isdigit() or self.source.startswith("/dev/")
        self.paced = not live and "://" not in self.source
        if "://" in self.source:
            capture = cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 5000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 2000])
        else:
            capture = cv2.VideoCapture(int(self.source) if self.source.isdigit() else self.source)
        if not capture.isOpened():
            raise InputError(f"camera {self.name}: {self.source} does not open; ls /dev/v4l/by-id shows USB "
                             "cameras, whose numbers change with every start")
        if live:
            wanted = {cv2.CAP_PROP_FOURCC: cv2.VideoWriter_fourcc(*"MJPG"), cv2.CAP_PROP_FRAME_WIDTH:
                      self.SIZE[0], cv2.CAP_PROP_FRAME_HEIGHT: self.SIZE[1], cv2.CAP_PROP_FPS: self.FPS,
                      cv2.CAP_PROP_BUFFERSIZE: 1}       # MJPG: two raw streams do not fit one USB hub
            for key, value in wanted.items():
                capture.set(key, value)
            self.settings = ", ".join(f"{capture.get(key):g} (asked for {value:g})" for key, value in
                                      wanted.items() if capture.get(key) != value)
        self.capture, self.fps = capture, capture.get(cv2.CAP_PROP_FPS) or self.FPS

        def read():
            ok, picture = capture.read()
            if not ok and self.paced:
                capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
                ok, picture = capture.read()
            if self.paced:
                time.sleep(1 / self.fps)
            return picture if ok else None
        return read, capture.release

    def _loop(self):
        while not self.closing:
            try:
                picture = self.read()
            except RuntimeError as e:           # RealSense: no frames
                picture, self.why = None, str(e)
            if picture is None:
                self.why = "unplugged or ended"
                time.sleep(0.05)
                continue
            sample = picture[::4, ::4]
            if np.ptp(np.percentile(sample, (1, 99))) < 12:     # a lens cap has noise, and bright pixels
                self.why = "dark: one colour all over"
            elif self.picture is not None and np.array_equal(sample, self.picture[::4, ::4]):
                self.why = "frozen: the same picture again and again"
            else:
                self.picture, self.at, self.why = picture, time.monotonic(), "no new picture"
        self.release()

    def close(self):
        self.closing = True
        self.thread.join(0.5)

    def trouble(self):
        """Why the newest good picture is too old, or None."""
        age = time.monotonic() - self.at
        if age > RealmanArm.IMAGE_AGE:
            return f"camera {self.name}: {self.why}, for {age:.2f} s"


def open_cameras(sources):
    """["front=0", "side=/dev/v4l/by-id/..."] -> {name: Camera}, in that order. InputError."""
    cameras = {}
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals or not name or not source or name in cameras:
            raise InputError(f"--cameras takes different NAME=SOURCE, got {text!r}: --cameras front=0 side=2")
        cameras[name] = Camera(name, source)
    return cameras


# ---- the keyboard, and who stands beside the arm ---------------------------------------------------------

class Keys:
    """Keys as they are pressed, without Enter. The space bar stops the arm at once, whatever else happens."""

    def __init__(self, arm):
        self.pressed, self.arm, self.old = queue.Queue(), arm, None
        if not sys.stdin.isatty():
            return
        import termios
        import tty
        self.old = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        atexit.register(self.close)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while key := os.read(sys.stdin.fileno(), 1):
                if key == b" ":
                    self.arm.stop("stopped by the space bar")
                else:
                    self.pressed.put(key.decode(errors="ignore"))
        except OSError:
            pass
        self.arm.stop("the keyboard is gone, and the space bar with it")

    def get(self):
        """The next key, or None."""
        with contextlib.suppress(queue.Empty):
            return self.pressed.get_nowait()

    def ask(self, question, answers):
        """Wait for one of the keys in `answers`. ArmStopped; InputError without a terminal."""
        if not self.old:
            raise InputError("a person at a terminal has to answer here, stdin is none (--arm sim: nobody)")
        print(question, end=" ", flush=True)
        while self.get():
            pass
        while True:
            self.arm.check()
            key = self.get()
            if key and key.lower() in answers:
                print(key.strip() or "", flush=True)
                return key.lower()
            time.sleep(0.02)

    def close(self):
        if self.old:
            import termios
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.old)
            self.old = None


class Person:
    """Sets the scene and judges, at the keyboard."""

    def __init__(self, keys):
        self.keys = keys

    def ready(self):
        self.keys.ask("\nhold what the gripper holds, then Enter: it opens, and the arm goes home", "\n\r")

    def set_scene(self, task, start):
        self.keys.ask(f"\n{task} #{start}: \"{TASKS[task].instruction}\"\nset the scene, step back, then "
                      "Enter (space bar: stop, at any time)", "\n\r")

    def verdict(self):
        """True (y), False (n), or None: the episode goes on."""
        return {"y": True, "n": False}.get(self.keys.get())

    def judge(self):
        return self.keys.ask("time is up: success? y/n", "yn") == "y"


class World:
    """The fake controller's twin, from outside: what a person beside a real table would see and do. It stands
    where a Person stands, and where the Expert expects its environment."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.lines = self.socket.makefile("rb")
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, command, **more):
        self.socket.sendall(json.dumps({"command": command, **more}).encode() + b"\n")
        line = self.lines.readline()
        if not line:
            raise ArmStopped("the rehearsal's twin is gone")
        return json.loads(line)

    def ready(self):
        pass

    def set_scene(self, task, start):
        self.task_name, self.task = task, TASKS[task]
        self.ask("twin_begin", task=task, seed=start)
        self.look()

    def look(self):
        self.seen = self.ask("twin_state")
        return self.seen

    def verdict(self):
        return self.look()["success"] or None

    def judge(self):
        return self.look()["success"]

    tool_position = property(lambda self: np.array(self.seen["tool"]))
    opening = property(lambda self: self.seen["opening"])

    def position(self, name):
        return np.array(self.seen["things"][name])

    def proprio(self):
        return np.array(self.seen["proprio"], np.float32)


# ---- the environment -------------------------------------------------------------------------------------

class EpisodeAborted(Exception):
    """Several commands in a row were refused: the arm holds, this episode has failed."""


class ArmEnv:
    """The arm behind the contract of every environment: reset, step, render, at CONTROL_HZ of real time.

    who sets the scene and judges: a Person, or the World of the rehearsal. journal: a file; every command is
    a line of it, with what the gate made of it, where the joints were, how late and how old everything was.
    """
    REFUSALS = 3        # in a row end the episode
    judged = True       # False: step() never says done, the operator ends the episode

    def __init__(self, arm, cameras, image_size, who, journal=None, resize="squash"):
        self.arm, self.views, self.who, self.resize = arm, cameras, who, resize
        self.cameras, self.image_size, self.journal = tuple(cameras), image_size, journal
        self.missed = self.ticks = 0
        self.late, self.worst = 0.0, 0.0
        arm.watch = [camera.trouble for camera in cameras.values()]
        self.max_steps = None

    def reset(self, task, start):
        """Gripper open, home, scene set by `who`, asked before the arm moves by itself again. -> obs"""
        arm, self.begun, self.steps = self.arm, None, 0
        arm.rest()
        if arm.armed:
            self.who.ready()
        arm.arm_motors()
        arm.grip = 1.0
        path = path_home(arm.gate.q)
        try:
            for q in path if arm.move else []:
                arm.follow(q)
                time.sleep(1 / CONTROL_HZ)
        except Refused as refused:              # path_home asked the same gate
            arm.stop(f"on the way home: {refused}")
            arm.check()
        if path and not arm.move:
            arm.gate.hold(path[-1])
        arm.rest()
        self.who.set_scene(task, start)
        self.task_name, self.instruction = task, TASKS[task].instruction
        self.max_steps = TASKS[task].max_steps
        self.number, self.refused, self.missed_before = start, 0, self.missed
        ready = time.monotonic() + 0.1          # what is on its way then may still show the old scene
        while any(camera.at < ready for camera in self.views.values()):
            arm.check()                         # a camera that gives nothing new stops the arm
            time.sleep(0.005)
        self.begun = self.due = time.monotonic()
        return self.observe()

    def step(self, action, look=True):
        """Sends an action (7,), waits for the end of the control step. -> obs, done, success

        A refused one holds the arm; the REFUSALS-th in a row is EpisodeAborted. ArmStopped.
        """
        why, at = None, time.monotonic()
        try:
            self.executed = self.arm.act(action)
            self.refused = 0
        except Refused as refused:
            why, self.executed = str(refused), np.array([0, 0, 0, 0, 0, 0, float((self.arm.grip or 0) > 0.5)])
            self.refused += 1
            self.arm.keep()
        now = time.monotonic()
        self.due += 1 / CONTROL_HZ
        self.ticks += 1
        self.late = max(0.0, now - self.due)
        self.worst = max(self.worst, self.late)
        if self.late:                           # the step was over before its command went out: a new one
            self.missed += 1
            self.due = now + 1 / CONTROL_HZ
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.steps += 1
        self.seconds = time.monotonic() - self.begun
        self._write(action, why, at)
        if self.refused >= self.REFUSALS:
            raise EpisodeAborted(f"{self.refused} commands in a row refused, the last one: {why}")
        verdict = self.who.verdict() if self.judged else None
        if self.judged and verdict is None and self.steps >= self.max_steps:
            self.arm.rest()
            verdict = bool(self.who.judge())
        return self.observe() if look and verdict is None else None, verdict is not None, bool(verdict)

    def _write(self, action, why, at):
        if self.journal:
            state_at, q, _ = self.arm.state
            self.journal.write(json.dumps({
                "t": at, "task": self.task_name, "start": self.number, "step": self.steps, "raw":
                np.asarray(action, float).ravel().tolist(), "executed": self.executed.round(6).tolist(),
                "target_deg": np.degrees(self.arm.gate.q).round(3).tolist(), "refused": why,
                "measured_deg": np.degrees(q).round(3).tolist(), "returned": self.arm.returned,
                "late_ms": round(1000 * self.late, 2), "state_ms": round(1000 * (at - state_at), 1),
                "image_ms": [round(1000 * (at - c.at), 1) for c in self.views.values()]}) + "\n")

    def observe(self):
        """What the policy sees: newest pictures, as prepared for training, and proprioception."""
        self.times = {name: camera.at for name, camera in self.views.items()}
        return {"images": {name: self.render(name, self.image_size) for name in self.views},
                "proprio": self.arm.proprio()}

    def render(self, camera, image_size):
        """(H, W, 3) uint8 RGB, the newest picture."""
        return shrink(self.views[camera].picture, image_size, self.resize)[..., ::-1]

    def timing(self):
        return (f"{self.ticks} control steps, {self.missed} missed their deadline (worst by "
                f"{1000 * self.worst:.1f} ms); {self.arm.frames} frames, {self.arm.overruns} late, "
                f"{self.arm.limited} slowed; "
                f"{self.arm.gate.clamped} actions shortened, {sum(self.arm.gate.refusals.values())} refused "
                f"{dict(self.arm.gate.refusals) or ''}")


# ---- teleoperation ---------------------------------------------------------------------------------------

class Reading(NamedTuple):
    """What an operator's device says: pose of the hand (4, 4), whether it holds the arm, gripper 1 = open,
    and "", "save" or "discard"."""
    pose: np.ndarray
    move: bool
    gripper: float
    button: str = ""


class Clutch:
    """Hand to action: while the grip is held the tool moves as the hand does, from where it was when the grip
    was closed; let go, it holds. A hand that jumps was lost by its tracker: it has to let go first."""
    JUMP = 0.08         # m between two readings, 1.6 m/s

    def __init__(self):
        self.hand = self.last = None
        self.lost = False

    def action(self, reading, gate):
        """-> action (7,) for this control step, whether the hand holds the arm."""
        still = np.array([0, 0, 0, 0, 0, 0, reading.gripper])
        if not reading.move:
            self.hand, self.last, self.lost = None, None, False
            return still, False
        if self.last is not None and np.linalg.norm(reading.pose[:3, 3] - self.last) > self.JUMP:
            self.lost = True
        self.last = reading.pose[:3, 3].copy()
        if self.lost:
            self.hand = None
            return still, False
        if self.hand is None:
            self.hand, self.tool = reading.pose.copy(), (gate.position, gate.turn)
        move = self.tool[0] + reading.pose[:3, 3] - self.hand[:3, 3] - gate.position
        turned = reading.pose[:3, :3] @ self.hand[:3, :3].T @ self.tool[1]
        turn = shorten(rotation_error(turned, gate.turn), MAX_TURN)
        return np.array([*shorten(move, MAX_STEP), *turn, reading.gripper]), True


class ScriptedTeleop:
    """The scripted expert at the place of a person, in the rehearsal: its hand is where it wants the tool."""

    def __init__(self, world, gate, seed):
        self.world, self.gate, self.expert, self.holds = world, gate, Expert(world, seed), False
        self.steps = 0

    def read(self):
        self.world.look()
        self.steps += 1
        action = self.expert.act() if self.holds else np.array([0, 0, 0, 0, 0, 0, 1.0])
        self.holds = True       # first it takes hold, where the tool is: from there the clutch measures
        pose = np.eye(4)
        pose[:3, 3] = self.gate.position + action[:3]
        pose[:3, :3] = Rotation.from_rotvec(action[3:6]).as_matrix() @ self.gate.turn
        button = ("save" if self.world.seen["success"] else
                  "discard" if self.steps > self.world.task.max_steps else "")
        return Reading(pose, True, float(action[6] > 0.5), button)


class KeyboardTeleop:
    """w s: away, back; a d: left, right; r f: up, down; q e: turn; g: gripper; Enter: save; Backspace:
    discard. A key moves the hand by 5 mm or 3 degrees, and holds the arm for 0.3 s."""
    MOVES = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)}

    def __init__(self, keys):
        self.keys, self.pose, self.gripper, self.held, self.waiting = keys, np.eye(4), 1.0, -1.0, []

    def read(self):
        button, held = "", time.monotonic() - self.held < 0.3
        while key := self.keys.get():
            self.waiting.append(key)
            self.held = time.monotonic()
        for key in self.waiting if held else ():    # a hand takes hold where it is before it moves
            if key in self.MOVES:
                axis, sign = self.MOVES[key]
                self.pose[axis, 3] += 0.005 * sign
            elif key in "qe":
                turn = Rotation.from_rotvec([0, 0, np.radians(3) * (1 if key == "q" else -1)]).as_matrix()
                self.pose[:3, :3] = turn @ self.pose[:3, :3]
            elif key == "g":
                self.gripper = 1 - self.gripper
            elif key in "\n\r":
                button = "save"
            elif key in "\x7f\b":
                button = "discard"
        self.waiting = [] if held else self.waiting
        return Reading(self.pose, time.monotonic() - self.held < 0.3, self.gripper, button)


class QuestTeleop:
    """A Meta Quest through the `teleop` package: its page in the headset's browser sends the controller's
    pose. Grip: hold the arm; trigger: gripper; A: save; B: discard.

    The page is served on loopback alone, since it asks nobody for a password: `adb reverse tcp:4443 tcp:4443`
    brings it to a headset on a USB cable, at https://localhost:4443. When tracking is lost the page sends the
    *headset's* pose as if nothing had happened, and the package hides the jump: so jumps are looked for here,
    in the raw positions, and silence is a released grip.
    """
    SILENCE = 0.25      # s

    def __init__(self, port=4443):
        try:
            from teleop import Teleop
        except ImportError as e:
            raise InputError("a Quest is read by the teleop package: pip install teleop==0.1.5") from e
        self.latest, self.raw, self.jumped, self.pressed, self.down = None, None, False, "", set()
        self.server = Teleop(host="127.0.0.1", port=port, natural_phone_orientation_euler=[0, 0, 0])
        self.server.subscribe(self._hear)
        threading.Thread(target=self.server.run, daemon=True).start()
        print(f"Quest: adb reverse tcp:{port} tcp:{port}, then https://localhost:{port} in its browser")

    def _hear(self, pose, message):
        """Called by the server for every message of the page."""
        raw = np.array([message["position"][axis] for axis in "xyz"])
        if not message["move"]:
            self.jumped = False
        elif self.raw is not None and np.linalg.norm(raw - self.raw) > 0.05:
            self.jumped = True
        self.raw = raw if message["move"] else None
        for button, meaning in (("reservedButtonA", "save"), ("reservedButtonB", "discard")):
            if message.get(button) and button not in self.down:     # pressed now, not still down
                self.pressed = meaning
            (self.down.add if message.get(button) else self.down.discard)(button)
        self.latest = time.monotonic(), np.array(pose), message["move"], float(message["gripper"] == "open")

    def begin(self, _):
        """For a new episode: what was pressed before is forgotten."""
        self.pressed = ""
        return self

    def read(self):
        if self.latest is None:
            return Reading(np.eye(4), False, 1.0)
        at, pose, move, gripper = self.latest
        button, self.pressed = self.pressed, ""
        silent = time.monotonic() - at > self.SILENCE
        return Reading(pose, bool(move) and not self.jumped and not silent, gripper, button)

# ---- around the arm: the rehearsal, signals, consent -----------------------------------------------------

@contextlib.contextmanager
def station(args, need_cameras=True):
    """The arm, its cameras and the keyboard, checked, for as long as they are used. Whatever ends the block
    stops the arm. -> namespace: arm, checks, cameras, keys, who (Person, or the rehearsal's World), world"""
    fake = world = arm = keys = None
    cameras = {}
    try:
        address = args.arm
        if args.arm == "sim":
            command = [sys.executable, str(Path(__file__).parent / "tests" / "fake_arm.py"),
                       "--spread", str(args.spread)]
            command += ["--log", str(args.wire_log)] if args.wire_log else []
            fake = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    start_new_session=True)         # Ctrl-C is for this process alone
            ports = json.loads(fake.stdout.readline() or "{}")
            if not ports:
                raise InputError("the rehearsal (tests/fake_arm.py) did not start, see above")
            address, world = f"127.0.0.1:{ports['port']}", World(ports["port"])
            args.cameras = args.cameras or [f"{c}=http://127.0.0.1:{ports['cameras']}/{c}" for c in CAMERAS]
        elif need_cameras and not args.cameras:
            raise InputError("--cameras is needed: --cameras front=0 side=2 (ls /dev/v4l/by-id)")
        arm = RealmanArm(address, move=args.arm == "sim" or args.move)
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
            signal.signal(getattr(signal, name), functools.partial(on_signal, arm))
        cameras = open_cameras(args.cameras or [])
        checks = arm.checks()
        for what, found, right in checks:
            print(f"{'ok' if right else 'WRONG':6s} {what:16s} {found}")
        for camera in cameras.values():
            height, width = camera.picture.shape[:2]
            print(f"ok     camera           {camera.name}: {camera.source}, {width} x {height}"
                  + f"; settings not taken: {camera.settings}" * bool(camera.settings))
        if not arm.move:
            print("DRY RUN: all is read and computed, nothing is sent that moves; --move moves the arm")
        keys = Keys(arm)
        yield argparse.Namespace(arm=arm, cameras=cameras, keys=keys, world=world, checks=checks,
                                 who=world or Person(keys))
    except ArmStopped as stopped:
        raise InputError(f"the arm was stopped: {stopped}. Look at it before you start again; finished "
                         "episodes are kept, --resume goes on with the others") from stopped
    finally:
        if arm:
            arm.close()
        for camera in cameras.values():
            camera.close()
        if keys:
            keys.close()
        if fake:
            fake.stdin.close()
            fake.kill()
            fake.wait()


def on_signal(arm, number, _):
    """The first signal stops the arm slowly and lets the script end by itself, a second one stops it hard."""
    again = arm.stopped
    arm.stop(f"signal {signal.Signals(number).name}", fast=bool(again))
    if again or not arm.armed:
        raise KeyboardInterrupt


def consent(args):
    """A person at a terminal types the word before a real arm moves, and before anything is overwritten."""
    if args.arm == "sim" or not args.move:
        return
    if not sys.stdin.isatty():
        raise InputError("--move asks for a word to be typed at a terminal; stdin is none: without --move "
                         "this is a dry run, --arm sim moves the twin")
    box = ", ".join(f"{axis} {low} to {high}" for axis, low, high in zip("xyz", *WORKSPACE))
    print(f"The arm at {args.arm} is going to move: first home, then {args.what}.\n"
          f"  box    {box} m from its base\n"
          f"  speed  tool {MAX_STEP * CONTROL_HZ:.1f} m/s, joints "
          f"{np.degrees(MAX_JOINT_STEP) * CONTROL_HZ:.0f} degrees/s at most; way home "
          f"{np.degrees(HOME_SPEED):.0f} degrees/s\n"
          "Nobody within reach, the emergency stop in your hand: it is the safety device, this is a program.")
    print("type MOVE:", end=" ", flush=True)
    if sys.stdin.readline().strip() != "MOVE":
        raise InputError("not confirmed: nothing was sent")


def choose_tasks(text):
    names = text.split(",") if text else list(TASKS)
    for name in names:
        if name not in TASKS:
            raise InputError(f"there is no task {name!r}, but {', '.join(TASKS)}")
    return names


# ---- check, replay, record, rollout ----------------------------------------------------------------------

def check_arm(args):
    """Reads everything, moves nothing."""
    args.move = False
    with station(args) as s:
        wrong, ages = [what for what, _, right in s.checks if not right], []
        for _ in range(100):
            time.sleep(0.01)
            ages.append(time.monotonic() - s.arm.state[0])
        print(f"state        {1000 * np.median(ages):.1f} ms old at the median, {1000 * max(ages):.1f} at "
              "most")
        wrong += [trouble for trouble in (camera.trouble() for camera in s.cameras.values()) if trouble]
        if s.cameras:
            height = min(c.picture.shape[0] for c in s.cameras.values())
            pictures = [cv2.resize(p, (round(p.shape[1] * height / p.shape[0]), height))
                        for p in (camera.picture for camera in s.cameras.values())]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, cv2.imencode(".png", np.concatenate(pictures, axis=1))[1].tobytes())
            print(f"cameras      {args.out}: look at it")
    if wrong:
        raise InputError(f"not ready: {', '.join(wrong)}, see above")


def must_be_ready(s):
    wrong = [f"{what} is {found}" for what, found, right in s.checks if not right]
    if wrong and s.arm.move:
        raise InputError(f"the arm is not ready: {'; '.join(wrong)}. Mend it with the vendor's page or "
                         "pendant; python robot.py check shows all")


TAKE_FORMAT = 1


def read_take(path):
    """A take of `record` -> task, start, actions (T-1, 7), proprio (T, 7). InputError for another file."""
    try:
        with h5py.File(path) as f:
            return (f.attrs["task"], int(f.attrs["start"]), f["actions"][:].astype(float), f["proprio"][:])
    except (OSError, KeyError) as e:
        raise InputError(f"{path} is not a take of `robot.py record` ({e})") from e


def replay(args):
    """Executes the actions of a recorded take at --speed, each split into 1 / speed equal parts."""
    if not 0 < args.speed <= 1:
        raise InputError(f"--speed takes a share above 0 and up to 1 (as recorded), got {args.speed}")
    task, start, actions, proprio = read_take(args.take)
    choose_tasks(task)
    parts = int(np.ceil(1 / args.speed))
    args.what = f"{args.take} ({TASKS[task].instruction}) at 1/{parts} of its speed"
    consent(args)
    with station(args, need_cameras=False) as s:
        must_be_ready(s)
        env, errors = ArmEnv(s.arm, s.cameras, 64, s.who), []
        env.judged = False
        env.reset(task, start)
        print(f"{args.what}: {len(actions) * parts / CONTROL_HZ:.0f} s")
        begin = proprio[0, :3] - s.arm.gate.position        # the take may have begun a little beside HOME
        slow = max(1, int(np.abs(begin).max() / 0.004))
        moves = [np.array([*begin / slow, 0, 0, 0, 1])] * slow
        moves += [np.append(action[:6] / parts, action[6]) for action in actions for _ in range(parts)]
        aims = [None] * slow + [aim if k == parts - 1 else None for aim in proprio[1:] for k in range(parts)]
        try:
            for move, aim in zip(moves, aims):
                env.step(move, look=False)
                if aim is not None:
                    tool = s.arm.proprio()[:3] if s.arm.move else s.arm.gate.position
                    errors.append(np.linalg.norm(tool - aim[:3]))
        except EpisodeAborted as e:
            raise InputError(f"replay ends at step {env.steps} of {len(moves)}: {e}") from e
        print(f"distance from the recorded tool: median {1000 * np.median(errors):.1f}, at most "
              f"{1000 * max(errors):.1f} mm; success {s.world.judge() if s.world else 'for you to see'}")
        print(f"timing       {env.timing()}")


def record(args):
    """Records teleoperated demonstrations as raw takes; `prepare_data.py realman` makes a dataset of them.

    OUT/takes.json          written first: arm, settings, cameras, control rate, ACTION, PROPRIO, firmware
    OUT/<task>-<start>.h5   one per kept take, T observations and T-1 actions, written atomically:
        images/<camera>     (T,) JPEG files, quality 95, as large as the camera gives them
        image_time/<camera> (T,) s, when the picture came
        time                (T,) s, when the step began; all times are of one monotonic clock
        actions, commanded  (T-1, 7) float32: what the safety gate executed, and what the operator asked for
        joints              (T, 6) rad, measured
        proprio             (T, 7) float32
        attributes          task, instruction, start, fps
    """
    tasks = choose_tasks(args.tasks)
    operator = args.operator or ("expert" if args.arm == "sim" else None)
    if operator is None or operator == "expert" and args.arm != "sim":
        raise InputError("--operator keyboard or quest records on an arm; expert is for --arm sim")
    if operator == "keyboard" and not sys.stdin.isatty():
        raise InputError("--operator keyboard needs a terminal")
    out, moves = Path(args.out), args.move or args.arm == "sim"
    about = {"format": TAKE_FORMAT, "source": "realman", "fps": CONTROL_HZ, "action": ACTION, "proprio": PROPRIO,
             "settings": {"arm": args.arm, "operator": operator, "spread": args.spread, "seed": args.seed,
                          "sources": args.cameras}}
    if moves:
        check_free(out, (out / "takes.json").exists(), args)
        if args.overwrite:
            for path in [*out.glob("*.h5"), out / "takes.json", out / "commands.jsonl"]:
                path.unlink(missing_ok=True)
        elif (out / "takes.json").exists():
            check_same(out / "takes.json", read_json(out / "takes.json")["settings"], about["settings"])
    args.what = f"where the operator ({operator}) leads it"
    consent(args)
    with station(args) as s:
        must_be_ready(s)
        if moves:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "takes.json", {
                **about, "cameras": list(s.cameras), "tool_m": TOOL, "workspace_m": WORKSPACE.tolist(),
                "dh": DH.tolist(), "arm": {what: str(found) for what, found, _ in s.checks}})
        with open(out / "commands.jsonl" if moves else os.devnull, "a", buffering=1) as journal:
            env, discarded = ArmEnv(s.arm, s.cameras, 64, s.who, journal), 0
            env.judged = False
            hand = {"expert": lambda seed: ScriptedTeleop(s.world, s.arm.gate, seed),
                    "keyboard": lambda seed: KeyboardTeleop(s.keys),
                    "quest": operator == "quest" and QuestTeleop().begin}[operator]
            for start in range(args.seed, args.seed + args.episodes):
                for task in tasks:
                    path, tries = out / f"{task}-{start:05d}.h5", 0
                    while not path.exists():
                        take = record_take(env, hand, task, start, start + 1000 * tries)
                        tries += 1
                        if not s.arm.move:
                            return print("dry run: that was one take of an arm that stood still; it is not kept")
                        if take is None:
                            discarded += 1
                            print(f"{path.stem}: discarded, once more", flush=True)
                            continue
                        write_take(path, task, start, take)
                        print(f"{path.stem}: {len(take['actions'])} steps, kept", flush=True)
            print(f"timing       {env.timing()}\ndiscarded    {discarded}\n"
                  f"next         python prepare_data.py realman --input {out}")


def encode(picture):
    """(H, W, 3) uint8 BGR -> the bytes of a JPEG, quality 95, colours at full resolution (4:4:4)."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", picture, flags)[1]


def record_take(env, hand, task, start, seed):
    """One demonstration -> the datasets of a take, or None if it was discarded or aborted.

    Steps in which the hand does not hold the arm and the gripper has been still for half a second are left out; the
    times of the frames show the gap.
    """
    env.reset(task, start)
    hand, clutch, rows, quiet, gripper = hand(seed), Clutch(), [], 0, 1.0
    with ThreadPoolExecutor(1) as pool:         # JPEGs are made beside the control loop, not in it

        def look():
            return {"time": time.monotonic(), "joints": env.arm.joints, "proprio": env.arm.proprio(),
                    "image_time": {c: view.at for c, view in env.views.items()},
                    "images": {c: pool.submit(encode, view.picture) for c, view in env.views.items()}}
        while True:
            reading = hand.read()
            if reading.button == "save" and rows:
                break
            action, holds = clutch.action(reading, env.arm.gate)
            quiet = 0 if holds or reading.gripper != gripper else quiet + 1
            gripper = reading.gripper
            try:
                if reading.button == "discard":
                    raise EpisodeAborted("by the operator")
                keep = quiet < CONTROL_HZ // 2 and (rows or holds)
                row = look() if keep else None
                env.step(action, look=False)
            except EpisodeAborted as e:
                env.arm.rest()
                return print(f"aborted      {e}")
            if keep:
                rows.append({**row, "actions": env.executed, "commanded": action})
        rows.append(look())
        env.arm.rest()          # what is written now takes its time
        take = {key: np.array([row[key] for row in rows]) for key in ("time", "joints", "proprio")}
        take |= {key: np.array([row[key] for row in rows[:-1]], np.float32) for key in ("actions", "commanded")}
        for c in env.views:
            take[f"image_time/{c}"] = np.array([row["image_time"][c] for row in rows])
            take[f"images/{c}"] = [row["images"][c].result() for row in rows]
    return take


def write_take(path, task, start, take):
    """Writes a take in one go: its file is whole or absent."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        f.attrs.update(task=task, instruction=TASKS[task].instruction, start=start, fps=CONTROL_HZ)
        for key, rows in take.items():
            if key.startswith("images/"):
                data = f.create_dataset(key, (len(rows),), h5py.vlen_dtype(np.uint8))
                for i, jpeg in enumerate(rows):
                    data[i] = jpeg.ravel()
            else:
                f[key] = rows
    write_atomically(path, buffer.getbuffer())


def run_rollout(args):
    """Finetuned policies on the arm, in interleaved order: the paper's Table II."""
    import torch
    torch.set_num_threads(1)
    tasks, origin = choose_tasks(args.tasks), provenance()
    names = [args.checkpoint, *[args.compare] * bool(args.compare)]
    policies = {file_hash(name): (name, *load_policy(name, args.device, stage="finetune")) for name in names}
    if len(policies) < len(names):
        raise InputError(f"--compare {args.compare} is the same as {args.checkpoint}")
    cameras = tuple(text.split("=")[0] for text in args.cameras or []) or tuple(CAMERAS)
    for name, policy, checkpoint in policies.values():
        check_fit(name, checkpoint, "the arm", cameras, PROPRIO_DIM, ACTION, CONTROL_HZ)
        ActionChunker(policy.chunk, args.execute, args.decay)
        warm_up(name, policy)
    seen = {(policy.config["image_size"], checkpoint["data"].get("resize", "squash"))
            for _, policy, checkpoint in policies.values()}
    if len(seen) > 1:
        raise InputError(f"the checkpoints see pictures of different size or shape: {sorted(seen)}")
    (image_size, resize), = seen
    settings = {"env": "arm", "arm": args.arm, "execute": args.execute, "decay": args.decay,
                "seed": args.seed, "spread": args.spread if args.arm == "sim" else None}
    out, moves = Path(args.out or Path(args.checkpoint).parent / "rollout_arm"), args.move or args.arm == "sim"
    lines = out / "episodes.jsonl"
    args.what = f"up to {args.episodes} episodes per task under {' and '.join(names)}"
    consent(args)
    done = {}
    if moves:
        check_free(out, lines.exists(), args)
        if args.overwrite:
            for path in [lines, out / "commands.jsonl", *(out / "videos").glob("*.mp4")]:
                path.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for line in read_lines(lines) if lines.exists() else ():
            check_same(lines, line["settings"], settings)
            done[line["arm"], line["task"], line["start"]] = line
    starts = range(EVAL_SEED0 + args.seed, EVAL_SEED0 + args.seed + args.episodes)
    # A B, then B A, and so on: what drifts over an afternoon (light, table, person) affects both alike
    jobs = [(key, task, start) for start in starts for task in tasks
            for key in (list(policies) if start % 2 == 0 else list(policies)[::-1])
            if (key, task, start) not in done]
    with station(args) as s, open(out / "commands.jsonl" if moves else os.devnull, "a", buffering=1) as journal:
        must_be_ready(s)
        env = ArmEnv(s.arm, s.cameras, image_size, s.who, journal, resize if resize == "crop" else "squash")
        for key, task, start in jobs:
            name, policy, _ = policies[key]
            ask = policy_function(policy, TASKS[task].instruction,
                                  np.random.default_rng([args.seed, start, tasks.index(task), 8]))
            film = Film(env, env.cameras, CONTROL_HZ) if start in starts[:args.video] else None
            success, end = False, None
            try:
                success, _ = rollout(env, ask, ActionChunker(policy.chunk, args.execute, args.decay), task, start,
                                     film=film)
            except (EpisodeAborted, ArmStopped, KeyboardInterrupt) as e:    # a failure, if it had begun
                end = e
            if isinstance(end, (ArmStopped, KeyboardInterrupt)) and not env.steps:
                raise end
            s.arm.rest()
            if not s.arm.move:
                return print(f"dry run: {env.steps} steps of {name} with an arm that stood still, "
                             f"nothing kept\ntiming       {env.timing()}")
            line = {"arm": key, "label": name, "task": task, "start": start, "success": success,
                    "aborted": end and (str(end) or "keyboard"), "steps": env.steps, "seconds": round(env.seconds, 3),
                    "actions": "", "missed": env.missed - env.missed_before, "settings": settings,
                    "commit": origin["commit"], "machine": origin["machine"]}
            append_line(lines, line)
            done[key, task, start] = line
            if film:
                film.write(out / "videos", f"{task}_{start}_{key}", TASKS[task].instruction, success)
            print(f"{len(done):4d}/{len(tasks) * len(starts) * len(policies)} {name} {task} #{start}: "
                  f"{'success' if success else 'failure'}, {env.steps} steps in {env.seconds:.2f} s"
                  + f"; aborted: {line['aborted']}" * bool(end), flush=True)
            if isinstance(end, (ArmStopped, KeyboardInterrupt)):
                raise end
        print(f"timing       {env.timing()}")
    for key, (name, *_) in policies.items():
        for task in tasks:
            won = [done[key, task, start]["success"] for start in starts]
            print(f"{name:40s} {task:24s} {sum(won)}/{len(won)}")
    seconds, steps = (sum(line[k] for line in done.values()) for k in ("seconds", "steps"))
    print(f"rate         {steps} steps in {seconds:.1f} s: {steps / seconds:.2f} Hz of {CONTROL_HZ}\n"
          f"next         python evaluate.py --results {out}")


def warm_up(name, policy):
    """The first call of a policy takes far longer than the others: not on the arm's time."""
    size = policy.config["image_size"]
    obs = {"images": {c: np.zeros((size, size, 3), np.uint8) for c in policy.cameras},
           "proprio": np.zeros(PROPRIO_DIM, np.float32)}
    ask = policy_function(policy, "", np.random.default_rng(0))
    for _ in range(3):
        ask(obs)
    begun = time.monotonic()
    ask(obs)
    seconds = time.monotonic() - begun
    print(f"policy       {name}: {1000 * seconds:.1f} ms per call")
    if seconds > 0.8 / CONTROL_HZ:
        print(f"note         that leaves little of the {1000 / CONTROL_HZ:.0f} ms of a control step: "
              "--execute 8 calls it every eighth step, --device cuda is faster")


# ---- command line ----

def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    arm = argparse.ArgumentParser(add_help=False)
    g = arm.add_argument_group("the arm")
    g.add_argument("--arm", default="sim", metavar="IP|sim", help="address of the controller, 192.168.1.18 as "
                   "delivered; sim = a rehearsal: the vendor's library, a fake controller and the twin, in real time")
    g.add_argument("--move", action="store_true", help="move a real arm, after MOVE was typed at the terminal; "
                   "without it this is a dry run: nothing that moves is sent")
    g.add_argument("--cameras", nargs="+", metavar="NAME=SOURCE", help="in the order of training, the main camera "
                   "first; SOURCE: a number, /dev/v4l/by-id/... or a URL; sim has its own")
    g.add_argument("--spread", type=float, default=0.5, metavar="0..1", help="sim: size of the start regions")
    g.add_argument("--wire-log", type=Path, metavar="FILE", help="sim: write every message of the controller there")
    episodes = argparse.ArgumentParser(add_help=False)
    g = episodes.add_argument_group("episodes")
    g.add_argument("--tasks", help="comma-separated; all five if not given")
    g.add_argument("--episodes", type=positive, default=10, metavar="N", help="per task")
    g.add_argument("--seed", type=int, default=0, help="number of the first start")
    g.add_argument("--resume", action="store_true", help="keep the finished episodes in OUT and go on")
    g.add_argument("--overwrite", action="store_true", help="delete the episodes in OUT")

    def command(name, function, parents, text):
        sub = commands.add_parser(name, parents=parents, help=text, description=function.__doc__,
                                  formatter_class=HelpFormatter)
        sub.set_defaults(run=function)
        return sub.add_argument_group(name)

    g = command("check", check_arm, [arm], "read everything, move nothing; one picture of all cameras")
    g.add_argument("--out", type=Path, default=Path("runs/check.png"), metavar="FILE", help="the picture")
    g = command("record", record, [arm, episodes], "teleoperated demonstrations, as raw takes")
    g.add_argument("--operator", choices=("keyboard", "quest", "expert"), help="who leads the arm; expert, which "
                   "is scripted, is for sim and the default there")
    g.add_argument("--out", default="data/takes", metavar="DIR", help="folder of the takes")
    g = command("replay", replay, [arm], "a recorded take, slowly")
    g.add_argument("--take", required=True, metavar="FILE", help="a take of record, data/takes/TASK-00000.h5")
    g.add_argument("--speed", type=float, default=0.25, help="share of the recorded speed, at most 1")
    g = command("rollout", run_rollout, [arm, episodes], "finetuned policies: success per task")
    g.add_argument("--checkpoint", default="runs/finetune/last.pt", metavar="PATH", help="of finetune.py")
    g.add_argument("--compare", metavar="PATH", help="a second checkpoint, in turns with the first")
    g.add_argument("--execute", type=int, metavar="H", help="actions executed per chunk; if not given, the policy is "
                   "called at every step and the chunks are averaged")
    g.add_argument("--decay", type=float, default=0.01, help="of the weights of that average, 0 = plain mean")
    g.add_argument("--device", default="cpu", help="of the policy")
    g.add_argument("--video", type=int, default=0, metavar="N", help="film the first N starts of every task")
    g.add_argument("--out", metavar="DIR", help="folder of the results; rollout_arm beside the checkpoint if not given")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run(main)

"""The robot of the paper's real-world experiments (Section 4.3), as a MuJoCo twin: table, arm, five tasks.

    python robot.py expert                                  # scripted expert, success per task, 2 min
    python robot.py expert --task stack_cups --video videos # ... and an mp4 of every episode
    python robot.py expert --embodiment hand --video videos # the same tasks by a free hand, viewpoint shaken
    python robot.py contact-sheet --out twin.png            # tasks x (start, middle, end) x cameras

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
import ctypes
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from models import InputError, run


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


def dh_forward(q):
    """Flange pose (4, 4) in the base frame for joint angles q (6,) in rad."""
    pose = np.eye(4)
    for (alpha, a, d, offset), angle in zip(DH, q):
        (ca, sa), (ct, st) = ((np.cos(x), np.sin(x)) for x in (alpha, angle + offset))
        pose = pose @ [[ct, -st, 0, a],
                       [st * ca, ct * ca, -sa, -d * sa],
                       [st * sa, ct * sa, ca, d * ca],
                       [0, 0, 0, 1]]
    return pose


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


# ---- command line ----

def expert_episode(env, task, seed):
    """-> success, list of the observations' images ({camera: (H, W, 3)}), one more than there were steps."""
    obs, done, success = env.reset(task, seed), False, False
    expert, frames = Expert(env, seed), [obs["images"]]
    while not done:
        obs, done, success = env.step(expert.act())
        frames.append(obs["images"])
    return success, frames


def run_expert(args):
    env = TwinEnv(args.embodiment, args.size, tuple(CAMERAS) if args.video else (), args.spread)
    for task in [args.task] if args.task else TASKS:
        wins, steps = 0, []
        for seed in range(args.seed, args.seed + args.episodes):
            path = args.video and unused(args.video / f"{args.embodiment}-{task}-{seed}.mp4")
            success, frames = expert_episode(env, task, seed)
            wins, steps = wins + success, steps + [len(frames) - 1]
            if path:
                write_video(path, frames)
        print(f"{task:24s}{wins:4d}/{args.episodes} successes, {np.mean(steps):.0f} steps on average, "
              f"{max(steps)} at most", flush=True)


def write_video(path, frames):
    """An mp4 at CONTROL_HZ, the cameras side by side."""
    import cv2
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.concatenate(list(images.values()), axis=1)[..., ::-1] for images in frames]  # RGB -> BGR
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), CONTROL_HZ, pictures[0].shape[1::-1])
    if not writer.isOpened():
        raise InputError(f"OpenCV cannot write {path}: give --video a folder that can be written")
    for picture in pictures:
        writer.write(picture)
    writer.release()


def contact_sheet(args):
    import cv2
    unused(args.out)
    env, rows = TwinEnv(args.embodiment, args.size, spread=args.spread), []
    for task in TASKS:
        _, frames = expert_episode(env, task, args.seed)
        shown = [frames[i] for i in np.linspace(0, len(frames) - 1, args.moments).astype(int)]
        rows.append(np.concatenate([images[camera] for camera in env.cameras for images in shown], axis=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = np.concatenate(rows)[..., ::-1]                                                   # RGB -> BGR
    if args.out.suffix not in (".png", ".jpg") or not cv2.imwrite(str(args.out), picture):
        raise InputError(f"expected a .png or .jpg that can be written as --out, got {args.out}")
    print(f"{args.out}: {len(rows)} tasks x {args.moments} moments from each of {', '.join(env.cameras)}")


def unused(path):
    if path.exists():
        raise InputError(f"{path} exists and is not overwritten: remove it or name another place")
    return path


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    shared = argparse.ArgumentParser(add_help=False)
    twin = shared.add_argument_group("the twin")
    twin.add_argument("--embodiment", choices=("robot", "hand"), default="robot", help="default: robot")
    twin.add_argument("--spread", type=float, default=1.0, metavar="0..1",
                      help="size of the random start regions: 1 full, 0 fixed starts (default: 1)")
    twin.add_argument("--seed", type=int, default=0, metavar="N",
                      help=f"first start; those from {EVAL_SEED0} on are for evaluation (default: 0)")
    twin.add_argument("--size", type=positive, default=256, metavar="PIXELS",
                      help="height and width of a camera's image (default: 256; policies see 64)")

    expert = commands.add_parser("expert", parents=[shared], help="run the scripted expert, print successes")
    expert.add_argument("--task", choices=TASKS, help="default: all five")
    expert.add_argument("--episodes", type=positive, default=10, metavar="N",
                        help="starts per task (default: 10)")
    expert.add_argument("--video", type=Path, metavar="DIR",
                        help="write an mp4 of every episode there (default: none)")
    expert.set_defaults(run=run_expert)

    sheet = commands.add_parser("contact-sheet", parents=[shared], help="one picture of all tasks")
    sheet.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .png or .jpg to write")
    sheet.add_argument("--moments", type=positive, default=3, metavar="N",
                       help="pictures per episode and camera (default: 3)")
    sheet.set_defaults(run=contact_sheet)

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run(main)

"""The Realman arm of the paper's real-world experiments (Section 4.3), and a MuJoCo twin of it.

    python robot.py check --arm 192.168.1.18 --cameras front=0 side=2       # reads everything, moves nothing
    python robot.py record --arm sim --out data/takes           # teleoperated demonstrations; sim: rehearsal
    python robot.py replay --arm sim --take data/takes/stack_cups-00000.h5  # at a quarter of its speed
    python robot.py rollout --arm sim --checkpoint runs/finetune/last.pt    # success per task (Table II)

A real arm moves only with --move; without it every command is a dry run. `--arm sim` is a rehearsal without
an arm: the vendor's library talks to a fake controller (tests/fake_arm.py), which moves the twin in real
time. README, "On a real arm", gives the order of the first steps.

Wiring: a wired network joins the controller (192.168.1.18 by default) and this computer (192.168.1.10). The
gripper is on the arm's tool connector, powered as its data sheet says: this program never switches the tool
voltage (24 V destroy a 5 V tool). Two USB cameras, on two USB ports of their own, see the whole table; give
their names in /dev/v4l/by-id, because their numbers change. The arm's base stands on the table. The tool
centre is 14 cm from the flange, and the tips of the fingers are 1.2 cm beyond it. Measure all this and adapt
WORKSPACE, HOME, TOOL and FINGER: nothing checks them.

Teleoperation: on the keyboard, w s a d r f move the tool by 5 mm, q e turn it, g toggles the gripper, Enter
keeps the demonstration, Backspace discards it. Quest (pip install teleop==0.1.5): run `adb reverse tcp:4443
tcp:4443` and open https://localhost:4443 in its browser; the grip button moves the arm, the trigger is the
gripper, A keeps, B discards. The page has no password and is served on loopback only.

This program has never moved a real arm. Unknown are: how an RM65-B follows targets at 100 Hz and with what
delay; what it does on a slow stop while following; the real speed and force of the gripper (200 of 1000
here); other firmware than the documented third generation; whether exposure and white balance of your
cameras stay fixed; the Quest's page in a headset (a websocket client stood in for it). While an arm is in
use, the vendor's library listens on UDP port 8089 of every address; everything else listens on loopback only.

The first part of this file is the arm: kinematics, the safety gate, the driver with its watchdog, cameras,
teleoperation, rollouts, commands. The second part is the twin: the table of the paper's five tasks, built
from primitives, and a scripted expert.

    world         the arm's base frame: x away from the base, y to its left, z up, metres; table top at z = 0
    action  (7,)  [dx dy dz (m), rotation vector (rad) x3, gripper] in the base frame, per step of 1/20 s; the
                  gripper is absolute: 1 = open, 0 = closed, switched at 0.5
    proprio (7,)  [x y z (m) of the tool centre, rotation vector (rad) from tool-down x3, opening 0..1]

ASSUMPTION: the paper names the arm and the tasks, but no sizes, positions or cameras. Ours make a cup about
10 pixels wide in a 64-pixel image and let a grasp succeed with an error of 1 cm.
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
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from models import (ActionChunker, HelpFormatter, InputError, append_line, at_least, batch_observations,
                    check_free, check_same, file_hash, load_policy, provenance, read_json, read_lines, run,
                    shrink, write_atomically, write_json)

CONTROL_HZ = 20
ACTION_DIM, PROPRIO_DIM = 7, 7
# How datasets describe actions and proprioception. delta: which numbers are changes per step, not targets.
ACTION = {"names": ["x", "y", "z", "rx", "ry", "rz", "gripper"], "units": ["m"] * 3 + ["rad"] * 3 + ["1"],
          "frame": "robot base, change per step", "gripper": "1 = open, 0 = closed",
          "delta": [True] * 6 + [False]}
PROPRIO = {"names": ACTION["names"], "units": ACTION["units"], "frame": "robot base, from tool-down",
           "gripper": "1 = open .. 0 = closed"}
TAKE_FORMAT = 1                     # format version of the takes that `record` writes
MAX_STEP, MAX_TURN = 0.02, 0.1      # m and rad per control step; larger actions are shortened
# WORKSPACE and HOME assume a table top at the height of the base, z = 0. Adapt them, TOOL and FINGER.
WORKSPACE = np.array([[0.15, -0.22, 0.016], [0.45, 0.22, 0.25]])    # m, box for the commanded tool centre
HOME = np.array([0.27, 0.0, 0.17])  # m, tool centre at the start of an episode (the twin varies it by 2 cm)
TOOL_DOWN = np.diag([-1.0, 1.0, -1.0])   # the tool's frame when it points down, fingers along y


# ---- kinematics of the RM65-B, modified (Craig) DH -------------------------------------------------------

# alpha_{i-1} (rad), a_{i-1} (m), d_i (m), offset_i (rad): the vendor's table; d_6 = 0.144 is the RM65-B's
DH = np.array([[0, 0, 0.2405, 0],
               [np.pi / 2, 0, 0, np.pi / 2],
               [0, 0.256, 0, np.pi / 2],
               [np.pi / 2, 0, 0.210, 0],
               [-np.pi / 2, 0, 0, 0],
               [np.pi / 2, 0, 0.144, 0]])
JOINT_LIMIT = np.radians([178, 130, 135, 178, 128, 360])
TOOL = 0.14     # m from the flange to the tool centre, which lies between the finger pads
HOME_JOINTS = np.radians([0, -20, -70, 0, -90, 180])    # near HOME, tool down


def joint_frames(q):
    """Joint angles q (6,) rad -> frames (6, 4, 4) of the joints in the base frame. Joint i turns about the z
    axis of frame i; the last frame is the flange."""
    pose, frames = np.eye(4), []
    for (alpha, a, d, offset), angle in zip(DH, q):
        (ca, sa), (ct, st) = ((np.cos(x), np.sin(x)) for x in (alpha, angle + offset))
        pose = pose @ [[ct, -st, 0, a],
                       [st * ca, ct * ca, -sa, -d * sa],
                       [st * sa, ct * sa, ca, d * ca],
                       [0, 0, 0, 1]]
        frames.append(pose)
    return np.array(frames)


def tool_pose(q):
    """Joint angles (6,) rad -> tool centre (3,) m and rotation (3, 3) in the base frame."""
    flange = joint_frames(q)[-1]
    return flange[:3, 3] + TOOL * flange[:3, 2], flange[:3, :3]


def rotation_error(target, measured):
    """Rotation vector (3,) in rad, base frame, that turns the matrix `measured` into `target`."""
    return Rotation.from_matrix(np.reshape(target, (3, 3)) @ np.reshape(measured, (3, 3)).T).as_rotvec()


def inverse_kinematics(position, rotation, q, iterations=40):
    """Joint angles (6,) rad that bring the tool to a position (3,) m and rotation (3, 3), by damped least
    squares from q, so that the solution stays on the branch of q. -> joints, residual (norm over m and rad).
    If the pose is out of reach, the residual is large."""
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


def reach(z):
    """Largest distance (m) from the base axis of a tool that points down at height z: the wrist stays on a
    sphere around the shoulder, 4 mm inside the stretched arm, which is singular."""
    wrist_above_shoulder = z + TOOL + DH[5, 2] - DH[0, 2]
    return np.sqrt((DH[2, 1] + DH[3, 2] - 0.004) ** 2 - wrist_above_shoulder ** 2)


CLEARANCE = 0.02        # m between parts of the arm, and between the arm and the table
# Radii (m) of the capsules around base column, upper arm, forearm, and wrist with tool
RADII = np.array([0.065, 0.055, 0.050, 0.050])
FINGER = np.array([0.067, 0.012])       # m from the tool centre to an open finger's outside, and to its tip


def clearance(q):
    """Smallest gap (m) between parts of the arm that share no joint, or between the table and forearm, wrist
    or fingers. Parts are capsules, sampled at nine points each: the error is at most 4 mm. The fingers have
    to come near the table: CLEARANCE is added to their gap, so the gate keeps their tips above the table."""
    frames = joint_frames(q)
    tool = frames[-1, :3, 3] + (TOOL - 0.02) * frames[-1, :3, 2]
    corners = np.array([np.zeros(3), frames[1, :3, 3], frames[2, :3, 3], frames[3, :3, 3], tool])
    share = np.linspace(0, 1, 9)[None, :, None]
    points = corners[:-1, None] * (1 - share) + corners[1:, None] * share       # (4 parts, 9, 3)
    gaps = [np.linalg.norm(points[i][:, None] - points[j][None], axis=-1).min() - RADII[i] - RADII[j]
            for i, j in ((0, 2), (0, 3), (1, 3))]
    tips = frames[-1, 2, 3] + (TOOL + FINGER[1]) * frames[-1, 2, 2] - FINGER[0] * abs(frames[-1, 2, 1])
    # The wrist capsule contains the hand, so only its end at the flange is compared with the table.
    return min(*gaps, points[2, :, 2].min() - RADII[2], frames[-1, 2, 3] - RADII[3], tips + CLEARANCE)


# ---- the safety gate -------------------------------------------------------------------------------------

JOINT_MARGIN = np.radians(3)        # distance kept from the joint limits
MAX_JOINT_STEP = np.radians(4.5)    # per control step: 90 degrees/s, half of what the slowest joint can do
BRANCH = np.radians(40)             # a solution this far from the last one lies on another branch
LEAD = 0.04                         # m that the commanded tool may run ahead of the measured one
MAX_TILT = 0.6                      # rad of the tool from straight down
ABOVE = np.array([[-0.7, -0.7, 0.10], [0.7, 0.7, 1.1]])     # m, box for the tool on its way home
HOME_SPEED = np.radians(20)         # rad/s on the way home


def shorten(vector, length, order=2):
    """The vector, shortened if its norm exceeds `length`. order=np.inf: if its largest number does."""
    return vector * min(1.0, length / max(np.linalg.norm(vector, order), 1e-12))


class Refused(Exception):
    """The gate refused a command; the target stays where it was."""


class Gate:
    """The safety gate. Every command passes it: an action (7,) becomes the next joint target or is Refused.

    It checks the action in this order: seven finite numbers; no number above ten times the largest step; at
    most MAX_STEP and MAX_TURN per step; the tool at most LEAD ahead of the measured one; WORKSPACE; reach; a
    solution of the inverse kinematics; MAX_TILT. Then admit() checks the joints: limits minus JOINT_MARGIN;
    no jump to another branch; at most MAX_JOINT_STEP; CLEARANCE; the tool inside its box.

    Steps that are too large, or that leave LEAD, WORKSPACE or reach, are shortened; everything else is
    refused. A refused command changes nothing, so targets never wind up. The way home is planned in joints;
    it passes admit() alone.
    """

    def hold(self, q):
        """Set the target to the joints q (6,) rad."""
        self.q = np.array(q, dtype=np.float64)
        self.position, self.turn = tool_pose(self.q)

    def __call__(self, action, tool):
        """action (7,), measured tool centre (3,) m -> target joints (6,) rad, and the part of the action that
        is executed (7,). Refused."""
        try:
            action = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError):
            action = np.empty(0)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise Refused("not 7 finite numbers")
        limit = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3)
        if (np.abs(action[:6]) > 10 * limit).any():
            raise Refused(f"absurd: more than ten times the largest step of {MAX_STEP} m, {MAX_TURN} rad")
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
        self.admit(q)
        executed = np.array([*self.position - before[0], *rotation_error(self.turn, before[1]),
                             float(action[6] > 0.5)])
        return self.q, executed

    def admit(self, q, box=WORKSPACE):
        """Check the joints q (6,) rad and make them the target, shortened to the largest step. The tool must
        stay in the box; outside it, it may only come nearer. Refused."""
        if (np.abs(q) > JOINT_LIMIT - JOINT_MARGIN).any():
            raise Refused(f"joint limit: joint {np.abs(q / JOINT_LIMIT).argmax() + 1}")
        step = q - self.q
        if np.abs(step).max() > BRANCH:
            raise Refused("joint step: a jump to another branch")
        q = self.q + shorten(step, MAX_JOINT_STEP, np.inf)
        if clearance(q) < min(CLEARANCE, clearance(self.q)):        # moving apart is always allowed
            raise Refused("collision: the arm with itself or the table")
        tool, now = (tool_pose(x)[0] for x in (q, self.q))
        outside, before = (np.maximum(box[0] - x, x - box[1]).max() for x in (tool, now))
        if outside > max(0.001, before):
            raise Refused("outside: the tool would leave the workspace")
        self.hold(q)
        return self.q


def path_home(q):
    """Joint targets from q (6,) rad to HOME at HOME_SPEED, one per control step: the tool rises straight up,
    then the joints move. InputError if the way is not free: a person has to bring the arm near HOME."""
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
            path.append(gate.admit(gate.q + shorten(goal - gate.q, largest, np.inf), ABOVE))
    except Refused as refused:
        raise InputError(f"the way home is not free ({refused}): bring the tool by hand or with the pendant "
                         f"near x {HOME[0]}, y {HOME[1]}, z {HOME[2]} m, pointing down") from None
    return path


# ---- the driver and its watchdog -------------------------------------------------------------------------

FRAME = 0.01                        # s between two joint targets, as the controller's mode `follow` needs


class ArmStopped(Exception):
    """The arm was stopped, for the reason given, and stays stopped until the script is started again."""


def within(seconds, call, *args):
    """call(*args) with a time limit, because some calls of the vendor's library never return. ArmStopped."""
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


class RealmanArm:
    """Driver and watchdog of a Realman RM65-B with a parallel gripper, through the vendor's library.

    Only one kind of message moves the joints: targets (movej_canfd), sent every 10 ms by a thread that
    interpolates between the gate's targets. No planned motion is ever sent. If this process dies (kill -9, a
    crash, a pulled cable), no further target arrives and the arm stands at the last one.

    The same thread, which never waits for an answer, is the watchdog: see watchdog() for what stops the arm.
    A stop latches: `stopped` keeps the first reason, the controller gets a slow stop, no further target is
    sent, and every later command raises ArmStopped.
    """
    # What stops the arm:
    STALL = 0.3         # s without a command during an episode
    STATE_AGE = 0.2     # s without a state of the arm
    IMAGE_AGE = 0.5     # s without a good picture of a camera
    OVERRUN = 0.2       # s between two targets
    LAG = np.radians(5)         # of a joint behind its target, for 0.2 s
    SILENT = 4          # queries to the gripper, in a row, without an answer

    def __init__(self, address, move):
        """address: "IP" or "IP:PORT". move=False: everything is read and computed, nothing that moves is
        sent. InputError, ArmStopped."""
        host, _, port = address.partition(":")
        try:
            self.host, self.port, self.move = socket.gethostbyname(host), int(port or 8080), move
        except (OSError, ValueError) as e:
            raise InputError(f"--arm takes IP or IP:PORT, got {address!r} ({e}); the vendor's default is "
                             "192.168.1.18") from e
        self.gate, self.stopped, self.watch = Gate(), None, []  # watch: functions -> why to stop, or None
        self.state = self.opening = self.grip = self.grip_sent = None   # state: (time, joints rad, errors)
        self.armed = self.closing = False
        self.command_at = self.lag_since = self.last_frame = None
        self.aim = self.sent = None                 # joints (6,) rad: the next target, and what was sent last
        self.aim_at, self.due, self.silent = 0.0, 0.0, 0        # aim_at: when the aim is to be reached
        self.returned = 0                           # code of the last message: 0 = it was sent
        self.arm, self.wire, self.threads, self.stopping = None, threading.Lock(), [], None
        self.heard = threading.Event()              # the first state has come
        self._lock_arm()
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            self._connect()
            failed.pop_all()                        # connected: the arm stays open

    # -- connection --

    def _lock_arm(self):
        """One process per arm on this machine. InputError."""
        try:
            import fcntl
        except ImportError:     # on Windows, where the twin works
            raise InputError("an arm is driven from Linux: its file locks and terminals are needed") from None
        self.lock = open(Path("/tmp") / f"realman-{self.host}-{self.port}.lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process of this machine drives the arm at {self.host}: end it first"
                             ) from None

    def _connect(self):
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as s:
                here = s.getsockname()[0]
        except OSError as e:
            raise InputError(f"no controller at {self.host}:{self.port} ({e}): is it on, and this machine in "
                             "its network? The vendor's default address is 192.168.1.18") from e
        try:
            with contextlib.redirect_stdout(None):          # it prints its version
                from Robotic_Arm import rm_robot_interface as sdk
                self.arm = sdk.RoboticArm(sdk.rm_thread_mode_e.RM_TRIPLE_MODE_E)
        except (ImportError, NameError, OSError) as e:      # NameError: there is no binary for macOS
            raise InputError(f"the vendor's library does not load here ({e}): pip install Robotic_Arm==1.1.6 "
                             "on Linux (x86-64 or aarch64)") from e
        handle = within(8, self.arm.rm_create_robot_arm, self.host, self.port, 3)
        if handle.id == -1:     # after this, every call but rm_delete_robot_arm may hang
            raise InputError(f"{self.host}:{self.port} does not answer as a Realman controller")
        self.arm.rm_set_timeout(200)        # ms, for every answer
        self._callback = sdk.rm_realtime_arm_state_callback_ptr(self._receive)      # must outlive the arm
        self.arm.rm_realtime_arm_state_call_back(self._callback)
        if not self.heard.wait(1):
            raise InputError("the controller's state does not arrive: on the vendor's page, switch on its "
                             f"UDP push to {here}; open that port in this machine's firewall")
        for step, name in ((self._grip_step, "gripper's"), (self._frame_step, "watchdog's")):
            self.threads.append(threading.Thread(target=self._repeat, args=(step, name), daemon=True))
            self.threads[-1].start()

    def _receive(self, s):
        """Called by the library's own thread for every state that anybody sends to its port."""
        if s.errCode == 0 and s.arm_ip.decode() == self.host:
            self.state = (time.monotonic(), np.radians(s.joint_status.joint_position[:6]),
                          [int(s.err.err[i]) for i in range(s.err.err_len)])
            self.heard.set()

    def checks(self):
        """[(what, what was found, whether that is right)]. An arm with a wrong row is not moved. ArmStopped.
        """
        def ask(query):
            code, answer = within(2, query)
            if code:            # the library then fills in zeros, which would look right
                raise ArmStopped(f"{query.__name__} got no answer (code {code})")
            return answer

        arm = self.arm
        if self.move:
            within(2, arm.rm_set_collision_state, 5)
        info, state, gripper = (ask(arm.rm_get_robot_info), ask(arm.rm_get_arm_all_state),
                                ask(arm.rm_get_gripper_state))
        exact = (               # what, what was found, what it has to be
            ("model", (info["arm_model"], info["arm_dof"]), ("RM_65", 6)),
            ("tool frame", ask(arm.rm_get_current_tool_frame)["pose"], [0] * 6),
            ("work frame", ask(arm.rm_get_current_work_frame)["pose"], [0] * 6),
            ("run mode, 1=real", ask(arm.rm_get_arm_run_mode), 1),
            ("power, 1=on", ask(arm.rm_get_arm_power_state), 1),
            ("joints enabled", state["joint_en_flag"][:6], [1] * 6),
            ("joint errors", state["joint_err_code"][:6], [0] * 6),
            ("gripper, 1=there", gripper["status"], 1),
            ("gripper error", gripper["error"], 0))
        version, table = ask(arm.rm_get_arm_software_info)["ctrl_info"]["version"], ask(arm.rm_get_DH_data)
        dh = np.transpose([table[key][:6] for key in ("alpha", "a", "d", "offset")])    # degrees, m
        errors, limits = ask(arm.rm_get_current_arm_state)["err"]["err"], ask(arm.rm_get_joint_max_pos)[:6]
        stage, (at, q, _) = ask(arm.rm_get_collision_stage), self.state
        age = time.monotonic() - at
        return [(what, found, found == right) for what, found, right in exact] + [
            ("firmware", version, True),
            ("DH in degrees, m", dh.round(4).tolist(),
             np.allclose(dh * [np.pi / 180, 1, 1, np.pi / 180], DH, atol=2e-4)),
            ("errors", errors, not any(map(int, errors))),
            ("joint limits", limits, (np.radians(limits) >= JOINT_LIMIT - JOINT_MARGIN).all()),
            ("collision, 0=off", stage, stage > 0 or not self.move),
            ("state", f"{1000 * age:.0f} ms old, joints {np.degrees(q).round(1).tolist()} degrees, tool at "
             f"{tool_pose(q)[0].round(3).tolist()} m", age < self.STATE_AGE)]

    # -- what is measured --

    @property
    def joints(self):
        """(6,) rad, measured; in a dry run those that would have been sent, as if the arm followed.
        ArmStopped, for example because the watchdog found the state too old."""
        self.check()
        return self.state[1] if self.move or not self.armed else self.sent

    def proprio(self):
        """(7,) float32, see the top of the file."""
        position, turn = tool_pose(self.joints)
        return np.array([*position, *rotation_error(turn, TOOL_DOWN), self.opening or 0.0], np.float32)

    # -- commands --

    def arm_motors(self):
        """Start to send targets and to watch. The first target is where the arm stands, or, if it is armed
        already, what was sent last. ArmStopped."""
        self.check()
        if not self.armed:
            code, degrees = within(1, self.arm.rm_get_joint_degree)
            if code or np.abs(np.radians(degrees[:6]) - self.joints).max() > np.radians(1):
                self.stop(f"state: the controller answers joints {degrees} (code {code}), but pushes "
                          f"{np.degrees(self.joints).round(2).tolist()}")
                self.check()
            self.sent = self.joints
        self.gate.hold(self.sent)
        self.aim, self.command_at, self.lag_since = self.gate.q, None, None
        self.last_frame = time.monotonic()
        self.armed = True

    def rest(self):
        """Hold the target; the watchdog expects no command until the next one."""
        self.command_at = None

    def act(self, action):
        """Aim at the target of an action (7,), one per control step. -> the part that is executed (7,).
        Refused, after which the arm holds its target; ArmStopped."""
        tool, _ = tool_pose(self.joints)
        try:
            _, executed = self.gate(action, tool)
            self.grip = executed[6]
            return executed
        finally:
            self._aim(self.gate.q)

    def follow(self, q):
        """Aim at a target of a path that was planned in joints. Refused, ArmStopped."""
        self.check()
        self._aim(self.gate.admit(q, ABOVE))

    def _aim(self, q):
        now = time.monotonic()
        self.aim, self.aim_at, self.command_at = q, now + 1 / CONTROL_HZ, now

    def check(self):
        """ArmStopped if the arm was stopped, or if the thread that sends the targets no longer does."""
        if self.armed and time.monotonic() - self.last_frame > self.OVERRUN:
            self.stop(f"overrun: no target was sent for {time.monotonic() - self.last_frame:.2f} s")
        if self.stopped:
            raise ArmStopped(self.stopped)

    def stop(self, reason, fast=False):
        """Latch, and send a slow stop (fast: a hard one, which forgets the trajectory). Returns at once
        whatever the controller does; may be called from any thread and from a signal handler."""
        self.stopped = self.stopped or reason
        if self.arm and self.armed and (fast or not self.stopping):
            call = self.arm.rm_set_arm_stop if fast else self.arm.rm_set_arm_slow_stop
            self.stopping = threading.Thread(target=self._send_stop, args=(call,), daemon=True)
            self.stopping.start()

    def _send_stop(self, call):
        got = self.wire.acquire(timeout=0.05)       # after a target that is being sent, not before it
        self.returned = call() if self.move else 0
        if self.returned:                           # refused or unanswered: once more, hard
            self.arm.rm_set_arm_stop()
        if got:
            self.wire.release()

    # -- threads --

    def _repeat(self, step, name):
        try:
            while not self.closing:
                step()
        finally:
            if not self.closing:
                self.stop(f"driver: the {name} thread has died")

    def _frame_step(self):
        """Every 10 ms: the watchdog, then the joint target of this moment."""
        self.due = max(self.due + FRAME, time.monotonic())
        time.sleep(max(0.0, self.due - time.monotonic()))
        if not self.armed or self.stopped:
            return
        now = time.monotonic()
        if reason := self.watchdog(now):
            return self.stop(reason)
        self.last_frame = now
        self.advance((self.aim_at - now) / FRAME)

    def advance(self, frames_left):
        """Send the next joints on the straight line to the aim, to arrive in frames_left frames of 10 ms.
        However late a command or a frame is, the arm moves no faster than MAX_JOINT_STEP and MAX_STEP per
        control step."""
        share = CONTROL_HZ * FRAME                      # one frame is this share of a control step
        step = shorten((self.aim - self.sent) / max(frames_left, 1), share * MAX_JOINT_STEP, np.inf)
        tool = tool_pose(self.sent)[0]
        for _ in range(2):                              # twice, because the tool moves on a curve
            distance = np.linalg.norm(tool_pose(self.sent + step)[0] - tool)
            step = step * min(1.0, share * MAX_STEP / max(distance, 1e-12))
        self.sent = self.sent + step
        with self.wire:
            if not self.stopped and self.move:
                self.returned = self.arm.rm_movej_canfd(np.degrees(self.sent).tolist(), True)
        # The library returns 0 even for a target that the controller refuses: only the state tells.
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
            return f"overrun: {now - self.last_frame:.2f} s between two targets"
        lag = np.abs(q - self.sent).max()
        if lag <= self.LAG or not self.move:
            self.lag_since = None
        elif self.lag_since is None:
            self.lag_since = now
        elif now - self.lag_since > 0.2:
            return f"lag: a joint is {np.degrees(lag):.1f} degrees behind its target"
        return next(filter(None, (watch() for watch in self.watch)), None)

    def _grip_step(self):
        """The gripper, up to 20 times a second: open or close it when wanted, then ask for its opening.

        A refused command, or SILENT unanswered queries in a row (one to two seconds), stop the arm. A single
        time-out (200 ms, the library prints "get_gripper_state revice error") is normal on a busy machine. It
        delays no target, but it may delay a stop: mostly by less than 15 ms, once by 166 ms
        (tests/rehearse_faults.py). `opening` may then be half a second old.
        """
        wanted, code = self.grip, 0
        if self.move and self.armed and not self.stopped and wanted not in (None, self.grip_sent):
            # speed 500 of 1000; force 200 of 1000, which a paper cup survives; never blocking
            code = (self.arm.rm_set_gripper_release(500, False, 1) if wanted > 0.5 else
                    self.arm.rm_set_gripper_pick(500, 200, False, 1))
            if code == 1:
                self.stop("gripper: command refused")
            if not code:
                self.grip_sent, self.silent = wanted, 0
        if not code:
            code, answer = self.arm.rm_get_gripper_state()
        self.silent = self.silent + 1 if code else 0
        if not code:
            self.opening = answer["actpos"] / 1000
            if answer["error"] and self.armed:
                self.stop(f"gripper: error {answer['error']}")
        elif self.silent >= self.SILENT and self.armed:
            self.stop(f"gripper: no answer, {self.silent} times in a row (code {code})")
        time.sleep(0.05)

    def close(self):
        """Stop what moves, end the threads, release the arm. Cannot hang."""
        self.closing = True
        if self.armed and not self.stopped:
            self.stop("end")
        for thread in filter(None, [*self.threads, self.stopping]):
            thread.join(1)
        if self.arm:
            with contextlib.suppress(ArmStopped):
                within(2, self.arm.rm_delete_robot_arm)
            self.arm = None
        self.lock.close()


# ---- cameras ---------------------------------------------------------------------------------------------

class Camera:
    """The newest picture of a camera and the time when it came, kept by a thread.

    source: a number or /dev/v4l/by-id/... for a USB camera, or a URL for an IP camera or the rehearsal's.

    A picture that equals the previous one, or that shows a single colour, does not count as new. So a camera
    that freezes or goes dark is noticed like one that is unplugged: its last good picture gets too old, and
    the watchdog stops the arm with the reason (trouble()).
    """
    FIRST = 5           # s to wait for the first picture

    def __init__(self, name, source):
        self.name, self.closing, self.seen = name, False, threading.Event()     # seen: the first picture came
        self.newest, self.why = (None, time.monotonic()), "no picture yet"
        if "://" in source:
            capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 5000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 2000])
        else:
            capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
            # MJPG: two raw streams do not fit on one USB hub. A buffer of one picture: the newest is read.
            for key, value in ((cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*"MJPG")),
                               (cv2.CAP_PROP_FRAME_WIDTH, 640), (cv2.CAP_PROP_FRAME_HEIGHT, 480),
                               (cv2.CAP_PROP_FPS, 30), (cv2.CAP_PROP_BUFFERSIZE, 1)):
                capture.set(key, value)
        if not capture.isOpened():
            raise InputError(f"camera {name}: {source} does not open; ls /dev/v4l/by-id shows USB cameras "
                             "(their numbers change with every start)")
        self.thread = threading.Thread(target=self._loop, args=(capture,), daemon=True)
        self.thread.start()
        if not self.seen.wait(self.FIRST):
            self.closing = True
            raise InputError(f"camera {name} ({source}) gives no picture: {self.why}")

    picture = property(lambda self: self.newest[0])         # (H, W, 3) uint8 BGR
    at = property(lambda self: self.newest[1])              # s, time.monotonic()

    def _loop(self, capture):
        while not self.closing:
            ok, picture = capture.read()
            if not ok:
                self.why = "unplugged or ended"
                time.sleep(0.05)
                continue
            sample = picture[::4, ::4]
            if np.ptp(np.percentile(sample, (1, 99))) < 12:     # a lens cap has noise, and bright pixels
                self.why = "dark: one colour all over"
            elif self.picture is not None and np.array_equal(sample, self.picture[::4, ::4]):
                self.why = "frozen: the same picture again and again"
            else:
                self.newest, self.why = (picture, time.monotonic()), "no new picture"
                self.seen.set()
        capture.release()

    def close(self):
        self.closing = True
        self.thread.join(0.5)

    def trouble(self):
        """Why the newest good picture is too old, or None."""
        age = time.monotonic() - self.at
        if age > RealmanArm.IMAGE_AGE:
            return f"camera {self.name}: {self.why}, for {age:.2f} s"


# ---- the person at the arm, or the rehearsal in place of one ---------------------------------------------

class Person:
    """The keyboard, read without Enter, and the person at it, who sets the scene, judges the outcome and may
    lead the arm as an operator. The space bar stops the arm at any time.

    w s: away, back; a d: left, right; r f: up, down; q e: turn; g: gripper; Enter: save; Backspace: discard.
    A key moves the tool by 5 mm or 3 degrees.
    """
    MOVES = {"w": (0, 0.005), "s": (0, -0.005), "a": (1, 0.005), "d": (1, -0.005), "r": (2, 0.005),
             "f": (2, -0.005), "q": (5, np.radians(3)), "e": (5, -np.radians(3))}

    def __init__(self, arm):
        self.pressed, self.arm, self.terminal = queue.Queue(), arm, sys.stdin.isatty()
        if self.terminal:
            import termios
            import tty
            atexit.register(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, termios.tcgetattr(sys.stdin))
            tty.setcbreak(sys.stdin)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError):
            while key := os.read(sys.stdin.fileno(), 1):
                if key == b" ":
                    self.arm.stop("stopped by the space bar")
                else:
                    self.pressed.put(key.decode(errors="ignore"))
        self.arm.stop("the keyboard is gone, and the space bar with it")

    def get(self):
        """The next key, or None."""
        return None if self.pressed.empty() else self.pressed.get()

    def ask(self, question, answers):
        """Wait for one of the keys in `answers`. ArmStopped; InputError without a terminal."""
        if not self.terminal:
            raise InputError("a person has to answer here, but stdin is not a terminal (--arm sim asks "
                             "nobody)")
        print(question, end=" ", flush=True)
        while self.get():
            pass
        while (key := (self.get() or " ").lower()) not in answers:
            self.arm.check()
            time.sleep(0.02)
        print(key.strip(), flush=True)
        return key

    def ready(self):
        self.ask("\ntake hold of what is in the gripper, then press Enter: the gripper opens, and the arm "
                 "goes home", "\n\r")

    def set_scene(self, task, start):
        self.ask(f"\n{task} #{start}: \"{TASKS[task].instruction}\"\nset the scene, step back, then press "
                 "Enter (the space bar stops the arm at any time)", "\n\r")

    def verdict(self):
        """True (y), False (n), or None: the episode goes on."""
        return {"y": True, "n": False}.get(self.get())

    def judge(self):
        return self.ask("time is up: success? y/n", "yn") == "y"

    def begin(self, _):
        self.gripper, self.held = 1.0, -1.0

    def read(self, gate):
        """As an operator, see "teleoperation"."""
        action, button = np.zeros(ACTION_DIM), ""
        while key := self.get():
            self.held = time.monotonic()
            if key in self.MOVES:
                number, change = self.MOVES[key]
                action[number] += change
            elif key == "g":
                self.gripper = 1 - self.gripper
            elif key in "\n\r":
                button = "save"
            elif key in "\x7f\b":
                button = "discard"
        action[6] = self.gripper
        return action, time.monotonic() - self.held < 0.3, button


class Rehearsal:
    """Stands in for the Person and for the operator who records. It asks the fake controller, where the twin
    and its scripted Expert run."""

    def __init__(self, port):
        self.wire = socket.create_connection(("127.0.0.1", port), timeout=10).makefile("rw")

    def ask(self, command, **more):
        print(json.dumps({"command": command, **more}), file=self.wire, flush=True)
        line = self.wire.readline()
        if not line:
            raise ArmStopped("the rehearsal's twin is gone")
        return json.loads(line)

    def ready(self):
        pass

    def set_scene(self, task, start):
        self.ask("twin_begin", task=task, seed=start)

    def verdict(self):
        return self.ask("twin_success") or None

    def judge(self):
        return bool(self.verdict())

    def begin(self, seed):
        self.ask("twin_expert", seed=seed)

    def read(self, gate):
        """As an operator, see "teleoperation". A take that lasts too long is discarded."""
        action, late = self.ask("twin_act")
        return np.array(action), True, "save" if self.verdict() else "discard" if late else ""


# ---- the environment -------------------------------------------------------------------------------------

class ArmEnv:
    """The arm as an environment, at CONTROL_HZ in real time.

    who      a Person or the Rehearsal, who sets the scene and judges
    journal  a file that gets one line per command: the requested and the executed action, why it was
             refused, target and measured joints, how late it was, the age of state and pictures
    judged   False: nobody is asked for the outcome, the operator ends the episode

    `aborted` says why an episode was given up, or None. Such an episode has failed; the arm holds its target.
    """
    REFUSALS = 3        # refused commands in a row that end the episode

    def __init__(self, arm, cameras, image_size, who, journal=None, resize="squash", judged=True):
        self.arm, self.views, self.who, self.resize = arm, cameras, who, resize
        self.image_size, self.journal, self.judged = image_size, journal, judged
        self.lateness, self.refusals = [], collections.Counter()    # s, one per step; reason -> count
        arm.watch = [camera.trouble for camera in cameras.values()]

    def reset(self, task, start):
        """Open the gripper, go home, have the scene set. A person is asked before the arm moves by itself a
        second time. -> obs. ArmStopped, InputError"""
        arm, self.steps = self.arm, 0
        arm.rest()
        if arm.armed:
            self.who.ready()
        arm.arm_motors()
        arm.grip = 1.0
        for q in path_home(arm.gate.q):
            arm.follow(q)
            time.sleep(1 / CONTROL_HZ)
        arm.rest()
        self.who.set_scene(task, start)
        self.task_name, self.start, self.refused, self.aborted = task, start, 0, None
        self.max_steps = TASKS[task].max_steps
        ready = time.monotonic() + 0.1          # pictures that are on their way may still show the old scene
        while any(camera.at < ready for camera in self.views.values()):
            arm.check()                         # a camera that gives nothing new stops the arm
            time.sleep(0.005)
        self.begun = self.due = time.monotonic()
        return self.observe()

    def step(self, action, look=True):
        """Send an action (7,) and wait for the end of the control step. -> obs (None unless look), done,
        success. After a refused action the arm holds its target; REFUSALS in a row abort the episode.
        ArmStopped."""
        why, at = None, time.monotonic()
        try:
            self.executed = self.arm.act(action)
            self.refused = 0
        except Refused as refused:
            why, self.executed = str(refused), np.append(np.zeros(6), self.arm.grip)
            self.refused += 1
            self.refusals[why.split(":")[0]] += 1
        now = time.monotonic()
        self.due += 1 / CONTROL_HZ
        self.lateness.append(max(0.0, now - self.due))
        if now > self.due:                      # the command came after the end of its step: begin a new step
            self.due = now + 1 / CONTROL_HZ
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.steps += 1
        self.seconds = time.monotonic() - self.begun
        if self.journal:
            self._write(action, why, at)
        if self.refused >= self.REFUSALS:
            self.aborted = f"{self.refused} commands in a row refused, the last one: {why}"
        verdict = False if self.aborted else self.who.verdict() if self.judged else None
        if self.judged and verdict is None and self.steps >= self.max_steps:
            self.arm.rest()
            verdict = self.who.judge()
        return self.observe() if look and verdict is None else None, verdict is not None, bool(verdict)

    def _write(self, action, why, at):
        state_at, q, _ = self.arm.state
        print(json.dumps({
            "t": at, "task": self.task_name, "start": self.start, "step": self.steps,
            "raw": np.asarray(action, float).tolist(), "refused": why, "executed": self.executed.tolist(),
            "target_deg": np.degrees(self.arm.gate.q).tolist(), "measured_deg": np.degrees(q).tolist(),
            "returned": self.arm.returned, "late_ms": 1000 * self.lateness[-1],
            "state_ms": 1000 * (at - state_at),
            "image_ms": [1000 * (at - c.at) for c in self.views.values()]}), file=self.journal)

    def observe(self):
        """The newest pictures, (image_size, image_size, 3) uint8 RGB, resized as in training, and proprio."""
        return {"images": {name: shrink(camera.picture, self.image_size, self.resize)[..., ::-1]
                           for name, camera in self.views.items()}, "proprio": self.arm.proprio()}

    def timing(self):
        """What was late or refused since the start of the script, as text."""
        return (f"timing       {len(self.lateness)} control steps, {np.count_nonzero(self.lateness)} missed "
                f"their deadline (worst by {1000 * max(self.lateness, default=0):.1f} ms); refused: "
                f"{dict(self.refusals) or 'none'}")


# ---- teleoperation ---------------------------------------------------------------------------------------
# An operator leads the arm while takes are recorded: the Person at the keyboard, the Rehearsal's scripted
# expert, or a Quest. It has begin(seed), called at the start of an episode, and read(gate) -> action (7,) of
# this control step, whether the hand holds the arm, and "", "save" or "discard".

class QuestTeleop:
    """A Meta Quest through the `teleop` package, whose page in the headset's browser sends the controller's
    pose. Grip: hold the arm; trigger: gripper; A: save; B: discard.

    While the grip is held, the tool repeats the motion of the hand. Silence counts as an open grip. When
    tracking is lost, the page sends the headset's pose instead of the hand's. The package hides this jump, so
    we look for it in the raw positions; after a jump the grip must be opened first. The page asks for no
    password and is served on loopback alone; `adb reverse` brings it to a headset on a USB cable.
    """
    BUTTONS = {"reservedButtonA": "save", "reservedButtonB": "discard"}
    SILENCE = 0.25      # s
    JUMP = 0.05         # m between two messages, which come up to 100 times a second

    def __init__(self, port=4443):
        try:
            from teleop import Teleop
        except ImportError as e:
            raise InputError("a Quest is read by the teleop package: pip install teleop==0.1.5") from e
        self.latest = self.raw = self.hand = None
        self.jumped, self.pressed, self.down = False, "", set()
        self.server = Teleop(host="127.0.0.1", port=port, natural_phone_orientation_euler=[0, 0, 0])
        self.server.subscribe(self._hear)
        threading.Thread(target=self.server.run, daemon=True).start()
        print(f"Quest: adb reverse tcp:{port} tcp:{port}, then https://localhost:{port} in its browser")

    def _hear(self, pose, message):
        """Called by the server for every message of the page."""
        raw = np.array([message["position"][axis] for axis in "xyz"])
        if not message["move"]:
            self.jumped = False
        elif self.raw is not None and np.linalg.norm(raw - self.raw) > self.JUMP:
            self.jumped = True
        self.raw = raw if message["move"] else None
        down = {button for button in self.BUTTONS if message.get(button)}
        for button in down - self.down:         # pressed now, not still down
            self.pressed = self.BUTTONS[button]
        self.down = down
        self.latest = time.monotonic(), np.array(pose), message["move"], float(message["gripper"] == "open")

    def begin(self, _):
        self.pressed, self.hand = "", None

    def read(self, gate):
        action, (button, self.pressed) = np.array([0, 0, 0, 0, 0, 0, 1.0]), (self.pressed, "")
        if self.latest is None:
            return action, False, ""
        at, hand, move, action[6] = self.latest
        if not move or self.jumped or time.monotonic() - at > self.SILENCE:
            self.hand = None
            return action, False, button
        if self.hand is None:                   # it takes hold now: where hand and tool are
            self.hand, self.tool = hand.copy(), (gate.position, gate.turn)
        action[:3] = shorten(self.tool[0] + hand[:3, 3] - self.hand[:3, 3] - gate.position, MAX_STEP)
        turned = hand[:3, :3] @ self.hand[:3, :3].T @ self.tool[1]
        action[3:6] = shorten(rotation_error(turned, gate.turn), MAX_TURN)
        return action, True, button


# ---- episodes: of the arm, the twin and LIBERO -----------------------------------------------------------

def rollout(env, policy_fn, chunker, task, start, max_steps=None, watch=lambda: None):
    """One episode: observation -> action chunk -> action -> step. -> success, actions (T, A)

    policy_fn(obs) -> (n, A) is called with the newest observation whenever the chunker needs a new chunk;
    watch() is called after the reset and after every step.
    """
    chunker.reset()
    obs, actions = env.reset(task, start), []
    watch()
    for _ in range(max_steps or env.max_steps):
        actions.append(chunker.step(lambda: policy_fn(obs)))                          # (A,)
        obs, done, success = env.step(actions[-1], look=chunker.asks)
        watch()
        if done:
            break
    return bool(success), np.array(actions)


def policy_function(policy, instruction, rng):
    """-> policy_fn(obs) -> (n, A) for rollout(). The noise (n, A) from which a policy samples is drawn from
    rng at every call, so that an episode depends on its own seed alone."""
    def policy_fn(obs):
        noise = rng.standard_normal((policy.chunk, policy.config["action_dim"]), np.float32)
        batch = batch_observations([{**obs, "noise": noise}], [instruction], policy)
        return policy.act(batch)[0].cpu().numpy()
    return policy_fn


def check_fit(label, checkpoint, name, cameras, proprio_dim, action, hz):
    """InputError if a finetuned checkpoint does not fit an environment.

    Messages call the two `label` and `name`. The other arguments describe the environment: the names of its
    cameras, how many numbers of proprioception it observes, its action (as in ACTION) and its control rate in
    Hz. The action's width, units and `delta` and the rate must be those of the checkpoint's data.
    """
    config, data = checkpoint["config"], checkpoint["data"]
    trained = data.get("action") or {}
    for what, has, takes in (
            ("numbers per action", config["action_dim"], len(action["names"])),
            ("as the units of its actions", trained.get("units"), action["units"]),
            ("as `delta` (which numbers are changes per step)", trained.get("delta"), action["delta"]),
            ("numbers of proprioception", config["proprio_dim"] or proprio_dim, proprio_dim)):
        if has != takes:
            raise InputError(f"{label} was finetuned with {has} {what}, but {name} has {takes}: give a "
                             "checkpoint that was finetuned on this robot's data")
    if not set(config["cameras"]) <= set(cameras):
        raise InputError(f"{label} needs the cameras {', '.join(config['cameras'])}, {name} has "
                         f"{', '.join(cameras)}: finetune on data whose cameras have these names")
    for part in data.get("mixture") or ():          # an action must span one step of the environment
        rate = part["fps"] / part["stride"]
        if not 0.95 < rate / hz < 1.05:
            raise InputError(f"{label} was finetuned on actions at {rate:g} Hz ({part['path']}, stride "
                             f"{part['stride']}), {name} runs at {hz:g} Hz: finetune on data of that rate, "
                             "or choose it with --strides")


def make_chunker(policy, execute=None, decay=0.01):
    """-> ActionChunker with `execute` actions per observation; 0: temporal ensembling; None: the policy's own
    number."""
    execute = min(policy.EXECUTE, policy.chunk) if execute is None else execute
    return ActionChunker(policy.chunk, execute, decay)


def write_film(path, frames, hz):
    """Write pictures (H, W, 3) uint8 RGB as an mp4; the last one stays for half a second. InputError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial_{path.name}")
    video = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), hz, frames[0].shape[1::-1])
    if not video.isOpened():
        raise InputError(f"OpenCV cannot write {partial}: leave out --video, or choose another --out")
    for frame in frames + frames[-1:] * (hz // 2):
        video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    video.release()
    os.replace(partial, path)


# ---- around every command: consent, output folder, station -----------------------------------------------

def consent(args, what):
    """Before a real arm moves, and before its run overwrites files, a person has to type MOVE."""
    if args.arm == "sim" or not args.move:
        return
    if not sys.stdin.isatty():
        raise InputError("--move asks for a word to be typed, but stdin is not a terminal: leave out --move "
                         "for a dry run, or give --arm sim to move the twin")
    box = ", ".join(f"{axis} {low} to {high}" for axis, low, high in zip("xyz", *WORKSPACE))
    joints, home = np.degrees([MAX_JOINT_STEP * CONTROL_HZ, HOME_SPEED])
    print(f"""The arm at {args.arm} is going to move: the gripper opens, the arm goes home, then {what}.
  box    {box} m from its base; way home: above {ABOVE[0, 2]} m
  speed  at most {MAX_STEP * CONTROL_HZ:.1f} m/s, joints {joints:.0f} degrees/s; way home {home:.0f} degrees/s
Keep everybody out of its reach and the emergency stop in your hand: that is the safety device, not this
program. Type MOVE:""", end=" ", flush=True)
    if sys.stdin.readline().strip() != "MOVE":
        raise InputError("not confirmed: nothing was sent")


def open_output(args, about, settings):
    """Prepare the folder of a command's episodes and write the settings to its file `about`. -> the folder's
    journal commands.jsonl, see ArmEnv. InputError if the folder is in use, or if its episodes were made with
    other settings. A rehearsal never overwrites what a real arm recorded."""
    out = about.parent
    episodes = [*out.glob("*.h5"), *out.glob("episodes.jsonl")]
    before = read_json(about) if about.exists() else {}
    check_free(out, episodes, args)
    if episodes and not isinstance(before.get("arm"), str):
        raise InputError(f"{out} was written by an older version of robot.py: name another folder with --out")
    if args.overwrite:
        if episodes and before["arm"] != args.arm == "sim":
            raise InputError(f"{out} holds episodes of the arm at {before['arm']}: name another --out")
        for path in [*episodes, out / "commands.jsonl"]:
            path.unlink(missing_ok=True)
    elif episodes:
        check_same(out, before, settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(about, settings)
    return open(out / "commands.jsonl", "a", buffering=1)


def on_signal(arm, number, _):
    """The first signal stops the arm slowly and lets the script end by itself, a second one stops it hard."""
    again = arm.stopped
    arm.stop(f"signal {signal.Signals(number).name}", fast=bool(again))
    if again or not arm.armed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def fake_controller(*flags):
    """The fake controller, tests/fake_arm.py, for as long as it is used. -> {"port", "cameras" (its port),
    "pid"}. InputError"""
    command = [sys.executable, str(Path(__file__).parent / "tests" / "fake_arm.py"), *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          start_new_session=True) as fake:          # Ctrl-C is for this process alone
        try:
            if not (line := fake.stdout.readline()):
                raise InputError("the rehearsal (tests/fake_arm.py) did not start, see above")
            yield json.loads(line)
        finally:
            fake.kill()


@contextlib.contextmanager
def station(args):
    """The arm, its cameras and the person, checked, for as long as they are used. Whatever ends the block
    stops the arm. -> namespace: arm, cameras, keyboard (a Person), who (that Person, or the Rehearsal).
    InputError"""
    address, sources, cameras, who = args.arm, args.cameras, {}, None
    try:
        with contextlib.ExitStack() as stack:           # closes in reverse order: the arm first
            if args.arm == "sim":
                ports = stack.enter_context(fake_controller())
                address, who = f"127.0.0.1:{ports['port']}", Rehearsal(ports["port"])
                sources = {c: f"http://127.0.0.1:{ports['cameras']}/{c}" for c in CAMERAS}
            elif not sources:
                raise InputError("--cameras is needed: --cameras front=0 side=2 (ls /dev/v4l/by-id)")
            for name, source in sources.items():
                cameras[name] = Camera(name, source)
                stack.callback(cameras[name].close)
            arm = RealmanArm(address, args.move)
            stack.callback(arm.close)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, functools.partial(on_signal, arm))
            checks = arm.checks() + [(f"camera {name}", "{1} x {0}".format(*camera.picture.shape), True)
                                     for name, camera in cameras.items()]
            for what, found, right in checks:
                print(f"{'ok' if right else 'WRONG':6s} {what:16s} {found}")
            if not arm.move:
                print("DRY RUN: everything is computed, but nothing that moves is sent and no episode is "
                      "kept; --move moves the arm")
            if wrong := [f"{what} is {found}" for what, found, right in checks if not right]:
                raise InputError(f"the arm is not ready: {'; '.join(wrong)}. Correct it on the vendor's page "
                                 "or pendant")
            person = Person(arm)
            yield argparse.Namespace(arm=arm, cameras=cameras, keyboard=person, who=who or person)
    except ArmStopped as stopped:
        raise InputError(f"the arm was stopped: {stopped}. Look at it before you start again; finished "
                         "episodes are kept, --resume goes on with the others") from stopped


# ---- the commands ----------------------------------------------------------------------------------------

def check(args):
    """Reads everything and moves nothing; writes one picture of what all cameras see."""
    args.move = False
    with station(args) as s:
        pictures = [cv2.resize(picture, (round(picture.shape[1] * 480 / len(picture)), 480))
                    for picture in (camera.picture for camera in s.cameras.values())]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, cv2.imencode(".png", np.concatenate(pictures, axis=1))[1].tobytes())
        print(f"cameras      {args.out}: look at it")


def record(args):
    """Records teleoperated demonstrations as raw takes; `prepare_data.py realman` makes a dataset of them.

    OUT/takes.json          written first: cameras, control rate, ACTION, PROPRIO, geometry
    OUT/commands.jsonl      every command, see ArmEnv
    OUT/<task>-<start>.h5   one per kept take, T observations and T-1 actions, written atomically:
        images/<camera>     (T,) JPEG files, quality 95, as large as the camera gives them
        image_time/<camera> (T,) s, when the picture came
        time                (T,) s, just before the action was sent; all times are of one monotonic clock
        actions, commanded  (T-1, 7) float32: what the safety gate executed, and what the operator asked for
        joints              (T, 6) rad, measured
        proprio             (T, 7) float32
        attributes          task, instruction, start, fps
    """
    out = Path(args.out)
    if args.operator == "expert" and args.arm != "sim":
        raise InputError("--operator keyboard or quest leads an arm; expert is scripted, for --arm sim")
    consent(args, f"where the operator ({args.operator}) leads it")
    if args.operator == "keyboard" and not sys.stdin.isatty():
        raise InputError("--operator keyboard needs a terminal")
    about = {"format": TAKE_FORMAT, "source": "realman", "fps": CONTROL_HZ, "action": ACTION,
             "proprio": PROPRIO, "cameras": list(args.cameras or CAMERAS), "workspace_m": WORKSPACE.tolist(),
             "tool_m": TOOL, "dh": DH.tolist(), "arm": args.arm, "operator": args.operator}
    journal = open_output(args, out / "takes.json", about)
    takes = [(start, task, out / f"{task}-{start:05d}.h5")
             for start in range(args.episodes) for task in args.tasks]
    if all(path.exists() for *_, path in takes):
        return print(f"all takes are in {out}")
    with journal, station(args) as s:
        env = ArmEnv(s.arm, s.cameras, 64, s.who, journal, judged=False)
        operator = {"keyboard": s.keyboard, "expert": s.who}.get(args.operator) or QuestTeleop()
        for start, task, path in takes:
            tries = 0
            while not path.exists():
                rows = record_take(env, operator, task, start, seed=start + 1000 * tries)
                tries += 1
                if rows:
                    write_take(path, task, start, rows)
                print(f"{path.stem}: " + (f"{len(rows) - 1} steps" if rows else
                                          f"discarded ({env.aborted}), once more"), flush=True)
                if not args.move:
                    break
        print(env.timing())
    if args.move:
        print(f"next         python prepare_data.py realman --input {out}")


def record_take(env, operator, task, start, seed):
    """One demonstration -> its time steps as a list of dicts, or None if it was discarded or aborted.

    Steps in which the hand does not hold the arm and the gripper has been still for half a second are left
    out; the times show the gap.
    """
    env.reset(task, start)
    operator.begin(seed)
    rows, quiet, gripper = [], 0, 1.0
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95,
             cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    with ThreadPoolExecutor(1) as pool:         # pictures are compressed beside the control loop, not in it

        def observe():
            row = {"time": time.monotonic(), "joints": env.arm.joints, "proprio": env.arm.proprio()}
            for name, camera in env.views.items():
                picture, row[f"image_time/{name}"] = camera.newest
                row[f"images/{name}"] = pool.submit(cv2.imencode, ".jpg", picture, flags)
            return row

        while not env.aborted:
            action, holds, button = operator.read(env.arm.gate)
            if button == "save" and rows:
                rows.append(observe())
                break
            if button == "discard":
                env.aborted = "by the operator"
                break
            quiet = 0 if holds or action[6] != gripper else quiet + 1
            gripper = action[6]
            row = observe() if quiet < CONTROL_HZ // 2 and (rows or holds) else None
            env.step(action, look=False)
            if row:
                rows.append({**row, "actions": env.executed, "commanded": action})
        env.arm.rest()          # writing takes its time
    return None if env.aborted else rows


def write_take(path, task, start, rows):
    """Write a take in one go: its file is whole or absent."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        f.attrs.update(task=task, instruction=TASKS[task].instruction, start=start, fps=CONTROL_HZ)
        for key in rows[0]:
            column = [row[key] for row in rows if key in row]       # the last row has no action
            if key.startswith("images/"):
                images = f.create_dataset(key, (len(column),), h5py.vlen_dtype(np.uint8))
                for i, job in enumerate(column):
                    images[i] = job.result()[1].ravel()
            else:
                f[key] = np.array(column, np.float64 if "time" in key or key == "joints" else np.float32)
    write_atomically(path, buffer.getbuffer())


def replay(args):
    """Executes the actions of a recorded take, slower than recorded: each is split into equal parts."""
    if not 0 < args.speed <= 1:
        raise InputError(f"--speed takes a share above 0, 1 = as recorded; got {args.speed}")
    try:
        with h5py.File(args.take) as f:
            task, start, proprio = f.attrs["task"], int(f.attrs["start"]), f["proprio"][:]
            actions, instruction = f["actions"][:].astype(np.float64), TASKS[task].instruction
    except (OSError, KeyError) as e:
        raise InputError(f"{args.take} is not a take of `robot.py record` ({e})") from e
    parts = int(np.ceil(1 / args.speed))
    what = f"{args.take} ({instruction}) at 1/{parts} of its speed"
    consent(args, what)
    with station(args) as s:
        env, apart = ArmEnv(s.arm, s.cameras, 64, s.who, judged=False), []
        env.reset(task, start)
        print(f"{what}: {len(actions) * parts / CONTROL_HZ:.0f} s")
        for action, then in zip(actions, proprio[1:]):
            for _ in range(parts):
                env.step([*action[:6] / parts, action[6]], look=False)
                if env.aborted:
                    raise InputError(f"the replay ends at step {env.steps}: {env.aborted}")
            apart.append(1000 * np.linalg.norm(s.arm.proprio()[:3] - then[:3]))
        print(f"distance from the recorded tool: median {np.median(apart):.1f}, at most {max(apart):.1f} mm"
              + (f"; success {s.who.judge()}" if args.arm == "sim" else ""))
        print(env.timing())


def run_rollout(args):
    """Runs finetuned policies on the arm (the paper's Table II); one line per episode in
    OUT/episodes.jsonl. With --compare, two policies take turns."""
    torch.set_num_threads(1)
    out, origin, policies = Path(args.out or Path(args.checkpoint).parent / "rollout_arm"), provenance(), {}
    for path in filter(None, (args.checkpoint, args.compare)):
        policy, checkpoint = load_policy(path, args.device, stage="finetune")
        check_fit(path, checkpoint, "the arm", args.cameras or CAMERAS, PROPRIO_DIM, ACTION, CONTROL_HZ)
        chunker = make_chunker(policy, args.execute)
        policies[file_hash(path)] = path, policy, chunker, checkpoint["data"].get("resize")
    if args.compare and len(policies) < 2:
        raise InputError(f"--compare {args.compare} is the same as {args.checkpoint}")
    consent(args, f"up to {args.episodes} episodes per task with {args.checkpoint} {args.compare or ''}")
    settings = {"env": "arm", "arm": args.arm, "execute": args.execute}
    starts = range(EVAL_SEED0, EVAL_SEED0 + args.episodes)
    with open_output(args, out / "settings.json", settings) as journal, station(args) as s:
        done = {(line["arm"], line["task"], line["start"]) for line in read_lines(out / "episodes.jsonl")}
        # A B, then B A, and so on: what drifts over an afternoon (light, table, person) affects both alike
        jobs = [(key, task, start) for start in starts for task in args.tasks
                for key in list(policies)[::1 if start % 2 == 0 else -1] if (key, task, start) not in done]
        envs = {}
        for key, (_, policy, _, resize) in policies.items():
            envs[key] = ArmEnv(s.arm, s.cameras, policy.config["image_size"], s.who, journal,
                               "crop" if resize == "crop" else "squash")
            for _ in range(3):          # the first calls are slow: not while an episode runs
                policy_function(policy, "", np.random.default_rng(0))(envs[key].observe())
        for number, (key, task, start) in enumerate(jobs, 1):
            (path, policy, chunker, _), env = policies[key], envs[key]
            policy_fn = policy_function(policy, TASKS[task].instruction,
                                        np.random.default_rng([start, list(TASKS).index(task)]))
            try:
                success, stopped = rollout(env, policy_fn, chunker, task, start)[0], None
            except (ArmStopped, KeyboardInterrupt) as e:    # an episode that had begun counts as a failure
                if not env.steps:
                    raise
                success, stopped, env.aborted = False, e, str(e) or "keyboard"
            s.arm.rest()
            append_line(out / "episodes.jsonl", {
                "arm": key, "label": path, "task": task, "start": start, "success": success,
                "aborted": env.aborted, "steps": env.steps, "seconds": round(env.seconds, 3),
                "settings": settings, "commit": origin["commit"], "machine": origin["machine"]})
            print(f"{number:4d}/{len(jobs)} {path} {task} #{start}: "
                  f"{'success' if success else 'failure'}, {env.steps} steps in {env.seconds:.2f} s"
                  + f"; aborted: {env.aborted}" * bool(env.aborted), flush=True)
            if stopped:
                raise stopped
        for env in envs.values():
            print(env.timing())
    if args.move:
        print(f"next         python evaluate.py --results {out}")


# ==========================================================================================================
# The twin: the table-top world of the paper's five tasks, in MuJoCo
# ==========================================================================================================

def choose_gl():
    """Sets MUJOCO_GL on Linux unless the user did: egl, else osmesa, else disable (no images)."""
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    os.environ["MUJOCO_GL"] = "disable"
    with contextlib.suppress(OSError):      # EGL may be installed but have no device to render on
        address = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
        address.restype = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        query, devices = address(b"eglQueryDevicesEXT"), ctypes.c_int(0)
        if query and query(0, None, ctypes.addressof(devices)) and devices.value > 0:
            os.environ["MUJOCO_GL"] = "egl"
            return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libOSMesa.so.8")
        os.environ["MUJOCO_GL"] = "osmesa"


choose_gl()
import mujoco  # noqa: E402

EVAL_SEED0 = 1_000_000              # evaluation starts are seeds >= this; training data uses seeds below it
PHYSICS_DT = 0.002                  # s
OPENING = 0.055                     # m from the centre to each finger when the gripper is open
SQUEEZE = -0.03                     # m, the close command: beyond closed, so that the position motor squeezes


# ---- robot, hand and tool, as MJCF text ----

STEEL, DARK, GREEN, UNSEEN = ".85 .86 .88 1", ".30 .33 .38 1", ".45 .90 .25 1", "0 0 0 0"
SKIN, SLEEVE = ".88 .66 .53 1", ".25 .30 .55 1"
BLUE, WHITE, PLATE, BOWL = ".10 .28 .92 1", ".96 .96 .96 1", ".78 .22 .20 1", ".80 .48 .78 1"
POT, GOLD, LEAF, CRUST = ".55 .62 .72 1", ".96 .72 .10 1", ".15 .60 .20 1", ".90 .55 .25 1"


def tag(kind, /, *inside, **attributes):
    """<kind key="value" ...>inside</kind>. A value is text, a number or a sequence of numbers."""
    def text(value):
        return value if isinstance(value, str) else " ".join(f"{v:.12g}" for v in np.ravel(value))
    attributes = " ".join(f'{key}="{text(value)}"' for key, value in attributes.items())
    return f"<{kind} {attributes}>{''.join(inside)}</{kind}>\n"


def solid(shape, size, rgba, mass, **attributes):
    """A geom that collides. Sizes in m, mass in kg."""
    return tag("geom", type=shape, size=size, rgba=rgba, mass=mass, **attributes)


def look(shape, size, rgba, mass=0, **attributes):
    """A geom that is seen but does not collide."""
    return solid(shape, size, rgba, mass, contype=0, conaffinity=0, **attributes)


def arm_xml():
    """The arm of the DH table as nested bodies: body i stands at (a, -d sin alpha, d cos alpha) in its
    parent, rotated by Rx(alpha) Rz(offset), and turns about its own z axis. Only its fingers collide."""
    masses, radii = (2.0, 2.0, 1.5, 0.6, 0.6, 0.3), (0.052, 0.045, 0.042, 0.036, 0.036, 0.032)      # kg, m
    places = [(a, -d * np.sin(alpha), d * np.cos(alpha)) for alpha, a, d, _ in DH]
    xml = tool_xml("robot")
    for i in reversed(range(6)):
        if i < 5 and np.any(places[i + 1]):
            xml = look("capsule", 0.8 * radii[i], STEEL, fromto=(0, 0, 0, *places[i + 1])) + xml
        joint = tag("joint", name=f"j{i + 1}", range=(-JOINT_LIMIT[i], JOINT_LIMIT[i]), armature=0.05)
        xml = tag("body", joint, look("sphere", radii[i], DARK, masses[i]), xml,
                  name=f"link{i + 1}", pos=places[i], gravcomp=1,
                  quat=Rotation.from_euler("XZ", DH[i, [0, 3]]).as_quat(scalar_first=True))
    return look("cylinder", 0.055, STEEL, fromto=(0, 0, 0, 0, 0, 0.20)) + xml


def hand_xml():
    """A hand that floats on three slides and three hinges."""
    joints = "".join(tag("joint", name=f"j{i + 1}", type="slide" if i < 3 else "hinge", axis=axis,
                         range=(-1, 1), armature=0.5)
                     for i, axis in enumerate(("1 0 0", "0 1 0", "0 0 1", "0 0 1", "0 1 0", "1 0 0")))
    down = Rotation.from_matrix(TOOL_DOWN).as_quat(scalar_first=True)
    return tag("body", joints, tag("body", tool_xml("hand"), quat=down, gravcomp=1),
               name="hand", pos=(0, 0, TOOL), gravcomp=1)


def tool_xml(embodiment):
    """The tool in its flange frame: z points out of the flange, two fingers slide along y. The finger
    pads are the same for both embodiments, so both grasp alike; the hand's are invisible, in its fingers."""
    def bone(radius, *fromto, rgba=SKIN):
        return look("capsule", radius, rgba, fromto=fromto)

    if embodiment == "robot":
        rgba, palm = GREEN, look("box", (0.030, 0.070, 0.016), STEEL, 0.3, pos=(0, 0, 0.045))
        left, right = (look("box", (0.011, 0.005, 0.03), GREEN, pos=(0, y, 0.085)) for y in (0.006, -0.006))
    else:
        rgba, palm = UNSEEN, look("ellipsoid", (0.045, 0.05, 0.022), SKIN, 0.3, pos=(-0.005, 0, 0.035))
        palm += bone(0.026, 0, 0, 0.03, 0.10, 0, -0.05)                         # forearm
        palm += bone(0.037, 0.10, 0, -0.05, 0.34, 0, -0.26, rgba=SLEEVE)
        left = "".join(                                                         # four fingers
            bone(0.0085, x, -0.012, 0.04, x, 0.014, 0.085) + bone(0.008, x, 0.014, 0.085, x, 0.007, tip)
            for x, tip in ((-0.024, 0.135), (-0.008, 0.147), (0.008, 0.145), (0.024, 0.132)))
        right = bone(0.011, 0.012, 0.012, 0.045, 0.006, -0.014, 0.09)           # thumb
        right += bone(0.0095, 0.006, -0.014, 0.09, 0, -0.008, 0.143)
    xml = palm + tag("site", name="tool", pos=(0, 0, TOOL), size=0.001, rgba=UNSEEN)
    for side, sign, shape in (("left", 1, left), ("right", -1, right)):
        joint = tag("joint", name=side, type="slide", axis=(0, sign, 0), range=(0, OPENING), damping=100,
                    armature=0.1)
        pad = solid("box", (0.017, 0.006, 0.020), rgba, 0.05, pos=(0, sign * 0.006, TOOL - 0.008),
                    friction="1.5 .03 .001")
        xml += tag("body", joint, pad, shape, name=side, gravcomp=1)
    return xml


# ---- the things on the table ----

@dataclass(frozen=True)
class Thing:
    """An object; its origin is the centre of its base (the roll's: its centre)."""
    xml: str
    grasp: float = 0.0      # m, height of the tool centre above the origin when the thing is grasped
    rest: float = 0.0       # m, height of the origin above the surface on which the thing rests
    floor: float = 0.0      # m, height above the origin of the surface that carries other things


def disk(radius, height, rgba, mass):
    return solid("cylinder", (radius, height / 2), rgba, mass, pos=(0, 0, height / 2))


def ring(bottom, top, z, height, rgba, n=12):
    """A wall: n boxes, 3 mm thick, from radius `bottom` at height z to radius `top` at z + height (m)."""
    tilt, radius = np.arctan2(top - bottom, height), (bottom + top) / 2
    size = (0.0015, top * np.tan(np.pi / n), height / 2 / np.cos(tilt))
    return "".join(solid("box", size, rgba, 0.004, euler=(angle, tilt, 0),
                         pos=(radius * np.cos(angle), radius * np.sin(angle), z + height / 2))
                   for angle in 2 * np.pi * np.arange(n) / n)


def cup(rgba):
    """Tapered, with a raised floor: a cup on top of another one sinks in by 3 cm and has 1 cm of play."""
    return disk(0.020, 0.040, rgba, 0.06) + ring(0.021, 0.037, 0.002, 0.068, rgba)


HANDLES = "".join(solid("box", (0.016, 0.010, 0.004), DARK, 0.01, pos=(0, y, 0.031)) for y in (-0.071, 0.071))
LEAVES = "".join(
    look("capsule", 0.0055, LEAF, fromto=(0, 0, 0.072, 0.02 * np.cos(a), 0.02 * np.sin(a), 0.098))
    for a in 2 * np.pi * np.arange(5) / 5)
THINGS = {
    "blue_cup": Thing(cup(BLUE), grasp=0.046, floor=0.040),
    "white_cup": Thing(cup(WHITE), grasp=0.046, floor=0.040),
    "plate": Thing(disk(0.080, 0.006, PLATE, 0.4) + ring(0.078, 0.092, 0.003, 0.009, PLATE, n=16),
                   floor=0.006),
    "bowl": Thing(disk(0.042, 0.005, BOWL, 0.3) + ring(0.041, 0.068, 0.002, 0.034, BOWL), floor=0.005),
    "pot": Thing(disk(0.060, 0.005, POT, 0.5) + ring(0.060, 0.061, 0.002, 0.036, POT) + HANDLES, floor=0.005),
    "pineapple": Thing(solid("ellipsoid", (0.027, 0.027, 0.036), GOLD, 0.07, pos=(0, 0, 0.042))
                       + disk(0.024, 0.020, GOLD, 0.05) + LEAVES, grasp=0.048),
    "roll": Thing(solid("capsule", 0.019, CRUST, 0.06, fromto=(-0.026, 0, 0, 0.026, 0, 0), condim=6,
                        friction=".4 .01 .003"), rest=0.019),
}


# ---- the world ----

# Friction: the pads hold at 1.5, all else slides at 0.4, so that the finger that touches first pushes the
# thing to the middle instead of tipping it over. With MuJoCo's default solref, objects sink into the thin
# walls. Without multiccd, a cup on a plate has a single contact point and never comes to rest.
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
  <geom type="box" pos="-.9 0 .3" size=".02 3 3" rgba=".62 .64 .66 1" contype="0" conaffinity="0" mass="0"/>
  <geom type="box" pos=".25 1.2 .3" size="3 .02 3" rgba=".62 .64 .66 1" contype="0" conaffinity="0" mass="0"/>
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
    """Rotation of an upright camera at `eye` that looks at `target` (a MuJoCo camera looks along its -z)."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
    return Rotation.from_matrix(np.stack([right, np.cross(right, forward), -forward], axis=1))


def build_model(embodiment, things):
    """The MuJoCo model with the tool of `embodiment` ("robot" or "hand") and the named things."""
    robot = embodiment == "robot"
    stiffness = (4000, 4000, 3000, 1500, 1500, 800) if robot else (6000, 6000, 6000, 300, 300, 300)
    motors = [tag("position", joint=f"j{i + 1}", kp=kp, dampratio=1) for i, kp in enumerate(stiffness)]
    motors += [tag("position", joint=side, kp=1000, ctrlrange=(SQUEEZE, OPENING), forcerange=(-18, 18))
               for side in ("left", "right")]
    cameras = [tag("camera", name=name, pos=eye, fovy=fovy,
                   quat=view(eye, target).as_quat(scalar_first=True))
               for name, (eye, target, fovy) in CAMERAS.items()]
    bodies = [tag("body", tag("joint", type="free", name=name, damping=0.0003), THINGS[name].xml, name=name)
              for name in things]
    return mujoco.MjModel.from_xml_string(WORLD.format(
        dt=PHYSICS_DT, cameras="".join(cameras), tool=arm_xml() if robot else hand_xml(),
        things="".join(bodies), motors="".join(motors)))


# ---- the five tasks ----
# To add one, add its new objects to THINGS and one entry to TASKS. Every script that films, records or
# evaluates tasks reads TASKS; the expert follows the waypoints.

@dataclass(frozen=True)
class Move:
    """A pick and place: `thing` goes to the mean position of `onto`, shifted by `shift` (x, y in m).

    It has succeeded when the thing rests within `radius` (m) of that mean: on `onto` if that is one thing, on
    the table between them if there are several.
    """
    thing: str
    onto: tuple
    radius: float
    shift: tuple = (0.0, 0.0)


@dataclass(frozen=True)
class Task:
    instruction: str        # the paper's words
    objects: dict           # name -> start region (x, y, half x, half y) in m, or name of what it stands in
    waypoints: tuple        # Moves, in order: what the expert does, and what TwinEnv.success() requires
    max_steps: int          # two to three times what the expert takes


TASKS = {
    "cups_on_plate": Task(
        "put both cups on the plate",
        {"plate": (0.30, 0.095, 0.015, 0.015),
         "blue_cup": (0.24, -0.09, 0.025, 0.045), "white_cup": (0.36, -0.09, 0.025, 0.045)},
        (Move("blue_cup", ("plate",), 0.07, (-0.045, 0)), Move("white_cup", ("plate",), 0.07, (0.045, 0))),
        340),
    "cup_in_bowl": Task(
        "pick the blue cup and place it in the bowl which is on top of the plate",
        {"plate": (0.30, 0.10, 0.03, 0.02), "bowl": "plate", "blue_cup": (0.30, -0.105, 0.05, 0.04)},
        (Move("blue_cup", ("bowl",), 0.04),),
        180),
    "pineapple_between_cups": Task(
        "pick the pineapple out of the pot and place it in between the cups",
        {"pot": (0.30, -0.095, 0.04, 0.03), "pineapple": "pot",
         "blue_cup": (0.22, 0.09, 0.01, 0.025), "white_cup": (0.385, 0.09, 0.01, 0.025)},
        (Move("pineapple", ("blue_cup", "white_cup"), 0.04),),
        180),
    "pineapple_and_roll": Task(
        "move the pineapple to the pot and the roll to the plate",
        {"pot": (0.235, 0.12, 0.015, 0.015), "plate": (0.345, -0.105, 0.01, 0.01),
         "pineapple": (0.215, -0.08, 0.015, 0.04), "roll": (0.385, 0.08, 0.012, 0.03)},
        (Move("pineapple", ("pot",), 0.05), Move("roll", ("plate",), 0.075)),
        340),
    "stack_cups": Task(
        "stack the blue cup on top of the white one",
        {"white_cup": (0.30, 0.10, 0.045, 0.035), "blue_cup": (0.30, -0.10, 0.05, 0.035)},
        (Move("blue_cup", ("white_cup",), 0.025),),
        180),
}


# ---- the environment ----

class TwinEnv:
    """The table-top twin.

    embodiment  "robot", or "hand": a hand without an arm, as in a human video; light, table colour and
                viewpoint differ between episodes, and the cameras shake
    image_size  pixels, at most 1024: one number, or (height, width)
    cameras     names out of "front", "side"; () renders nothing and needs no OpenGL
    spread      size of the random start regions: 1 is full size, 0 means fixed starts
    """

    def __init__(self, embodiment="robot", image_size=64, cameras=("front", "side"), spread=1.0):
        if not 0 <= spread <= 1:
            raise InputError(f"the twin's --spread is between 0 and 1; got {spread}")
        if cameras and os.environ.get("MUJOCO_GL") == "disable":
            raise InputError("no OpenGL to render images with: apt-get install libegl1 libgl1 libosmesa6")
        self.embodiment, self.image_size = embodiment, image_size
        self.cameras, self.spread = tuple(cameras), float(spread)
        self._models, self._renderers = {}, {}                  # per task, made when first needed
        self.gate = Gate()

    # -- episodes --

    def reset(self, task, seed):
        """Starts an episode; everything random in it follows from (task, seed, spread).

        -> {"images": {camera: (H, W, 3) uint8 RGB, upright}, "proprio": (7,) float32}
        """
        self.task_name, self.task = task, TASKS[task]
        self.instruction, self.max_steps = self.task.instruction, self.task.max_steps
        if task not in self._models:
            model = build_model(self.embodiment, self.task.objects)
            self._models[task] = model, mujoco.MjData(model)
        self.model, self.data = self._models[task]
        mujoco.mj_resetData(self.model, self.data)
        number = list(TASKS).index(task)
        rng, self._film = (np.random.default_rng([seed, number, stream]) for stream in (0, 1))
        self._steps = self._good = 0
        home = HOME + self.spread * rng.uniform(-0.02, 0.02, 3)
        self.gate.hold(inverse_kinematics(home, TOOL_DOWN, HOME_JOINTS)[0])
        self.data.qpos[:8] = self.data.ctrl[:8] = [*self._joints(), OPENING, OPENING]
        for name, place in self.task.objects.items():
            angle, z = self.spread * rng.uniform(-0.3, 0.3), THINGS[name].rest + 0.0005
            if isinstance(place, str):
                x, y, base = self.data.joint(place).qpos[:3]
                z += base + THINGS[place].floor
            else:
                x, y = place[:2] + self.spread * np.array(place[2:]) * rng.uniform(-1, 1, 2)
            half = angle / 2 if name == "roll" else 0.0         # the others look the same from all sides
            self.data.joint(name).qpos[:] = [x, y, z, np.cos(half), 0, 0, np.sin(half)]
        mujoco.mj_step(self.model, self.data, nstep=100)        # 0.2 s in which things settle
        if self.embodiment == "hand":
            self._change_scene()
            self._shake()
        return self._observe()

    def step(self, action, look=True):
        """One control step of 1/20 s. action (7,): see the top of the file. -> obs, done, success

        The action passes the safety gate of the arm; a refused one changes nothing. look = False renders
        nothing, and obs is None. done: success, or max_steps reached. ValueError if the action is not 7
        finite numbers.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, got {action}")
        with contextlib.suppress(Refused):
            self.gate(action, self.tool_position)
            self.data.ctrl[:6] = self._joints()
            self.data.ctrl[6:] = OPENING if action[6] > 0.5 else SQUEEZE
        mujoco.mj_step(self.model, self.data, nstep=round(1 / CONTROL_HZ / PHYSICS_DT))
        if self.embodiment == "hand":
            self._shake()
        self._steps += 1
        self._good = self._good + 1 if self.success() else 0
        success = self._good >= 5                               # it has to hold for a quarter of a second
        return self._observe() if look else None, success or self._steps >= self.max_steps, success

    def _joints(self):
        """Joint values (6,) that bring the tool to the gate's pose."""
        if self.embodiment == "robot":
            return self.gate.q
        # Slides move the hand's flange, hinges turn it: turn = Rz Ry Rx TOOL_DOWN
        position, turn = self.gate.position, self.gate.turn
        angles = Rotation.from_matrix(turn @ TOOL_DOWN.T).as_euler("ZYX")
        return np.append(position - TOOL * (turn[:, 2] + [0, 0, 1]), angles)

    # -- observations --

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

    def render(self, camera, image_size):
        """(H, W, 3) uint8 RGB, upright. image_size: pixels, or (H, W)."""
        height, width = np.broadcast_to(image_size, 2).tolist()
        key = self.task_name, height, width
        if key not in self._renderers:
            self._renderers[key] = mujoco.Renderer(self.model, height, width)
            atexit.register(self._renderers[key].close)     # before mujoco ends OpenGL: else tracebacks
        renderer = self._renderers[key]
        renderer.update_scene(self.data, camera)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False            # shadows triple the time
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return renderer.render()

    def _observe(self):
        return {"images": {camera: self.render(camera, self.image_size) for camera in self.cameras},
                "proprio": self.proprio()}

    def _change_scene(self):
        """Draws light, table colour and camera offsets (m x3, rad x3) of this hand episode."""
        rng, model = self._film, self.model
        tables = np.array([[.30, .33, .36], [.45, .36, .28], [.25, .35, .30], [.42, .42, .40]])
        model.geom("table").rgba[:3] = tables[rng.integers(len(tables))] + rng.uniform(-0.05, 0.05, 3)
        model.light("lamp").diffuse[:] = rng.uniform(0.3, 0.7) + rng.uniform(-0.05, 0.05, 3)
        model.light("lamp").dir[:] = [*rng.uniform(-0.7, 0.7, 2), -1]
        self._offset = {camera: rng.uniform(-1, 1, 6) * [.03, .03, .03, .03, .03, .05] for camera in CAMERAS}
        self._wander = {camera: np.zeros(6) for camera in CAMERAS}

    def _shake(self):
        """Moves the cameras by the episode's offset and a slow, mean-reverting random walk."""
        for camera, (eye, target, _) in CAMERAS.items():
            noise = self._film.normal(size=6) * ([0.0025] * 3 + [0.003] * 3)
            self._wander[camera] = 0.95 * self._wander[camera] + noise
            shift = self._offset[camera] + self._wander[camera]
            rotation = Rotation.from_rotvec(shift[3:]) * view(eye, target)
            self.model.camera(camera).pos[:] = eye + shift[:3]
            self.model.camera(camera).quat[:] = rotation.as_quat(scalar_first=True)
        mujoco.mj_camlight(self.model, self.data)

    # -- success --

    def success(self):
        """Every Move has succeeded, a thing that is to stay in another one is still there, and all cups are
        upright."""
        moves, objects = self.task.waypoints, self.task.objects
        goals = [(move.thing, move.onto, move.radius) for move in moves]
        goals += [(name, (place,), 0.04) for name, place in objects.items()
                  if isinstance(place, str) and name not in [move.thing for move in moves]]
        return (all(self.placed(*goal) for goal in goals)
                and all(self.upright(name) for name in objects if name.endswith("cup")))

    def position(self, name):
        """(3,) m: origin of a thing."""
        return self.data.body(name).xpos.copy()

    def upright(self, name):
        """Tilted by less than 20 degrees."""
        return bool(self.data.body(name).xmat[8] > np.cos(np.radians(20)))

    def placed(self, name, onto, radius):
        """See Move. The thing is at rest and touches no finger; only between several things may it touch the
        table."""
        support = onto[0] if len(onto) == 1 else "world"            # "world" is the table
        pairs = self.model.geom_bodyid[self.data.contact.geom]      # (contacts, 2)
        pairs = pairs[(pairs == self.model.body(name).id).any(axis=1)]
        touched = {self.model.body(body).name for body in pairs.ravel().tolist()}
        speed = np.linalg.norm(self.data.joint(name).qvel[:3])
        middle = np.mean([self.position(other) for other in onto], axis=0)
        offset = np.linalg.norm((self.position(name) - middle)[:2])
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

    It closes the loop over the positions of tool and things and the gripper's opening. Speed, height, path,
    grasp point, jitter and short pauses vary with the seed, as a person's do.
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
        """Yields one action per control step: every waypoint, with up to three tries, then stands still."""
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

        def goal():     # where the tool brings the thing to its goal; if the thing is lost, where the tool is
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
        """Moves the tool to point() within tolerance (m): on a curve in transit, braking for precision."""
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
        shake = min(1.0, np.linalg.norm(move) / self.fast)      # only a moving hand shakes
        turn = -0.3 * self.env.proprio()[3:6]
        return np.array([*move, *turn, grip]) + shake * np.append(self.jitter, 0)


def expert_episode(env, task, seed):
    """One episode of the scripted expert -> success, T observations, T-1 actions (7,) float32. Actions are
    rounded before they are executed, so that a dataset stores exactly what was done."""
    observations, actions, done, success = [env.reset(task, seed)], [], False, False
    expert = Expert(env, seed)
    while not done:
        actions.append(np.asarray(expert.act(), np.float32))
        obs, done, success = env.step(actions[-1])
        observations.append(obs)
    return success, observations, actions


# ---- command line ----------------------------------------------------------------------------------------

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    arm = argparse.ArgumentParser(add_help=False)
    g = arm.add_argument_group("the arm")
    g.add_argument("--arm", default="sim", metavar="IP|sim", help="address of the controller (as delivered "
                   "192.168.1.18); sim: a rehearsal with a fake controller and the twin, in real time")
    g.add_argument("--move", action="store_true", help="move a real arm, after MOVE was typed at the "
                   "terminal; without it nothing that moves is sent (dry run)")
    g.add_argument("--cameras", nargs="+", default=(), metavar="NAME=SOURCE", help="names as in "
                   "training, in that order; SOURCE: a number, /dev/v4l/by-id/... or a URL; sim has its own")
    episodes = argparse.ArgumentParser(add_help=False)
    g = episodes.add_argument_group("episodes")
    g.add_argument("--tasks", default=",".join(TASKS), help="comma-separated names")
    g.add_argument("--episodes", type=int, default=10, metavar="N", help="per task")
    g.add_argument("--resume", action="store_true", help="keep the finished episodes in OUT and go on")
    g.add_argument("--overwrite", action="store_true", help="delete the episodes in OUT")

    def command(name, function, parents, text):
        sub = commands.add_parser(name, parents=parents, help=text, description=function.__doc__,
                                  formatter_class=HelpFormatter)
        sub.set_defaults(run=function)
        return sub.add_argument_group(name)

    g = command("check", check, [arm], "read everything, move nothing; one picture of all cameras")
    g.add_argument("--out", type=Path, default=Path("runs/check.png"), metavar="FILE", help="the picture")
    g = command("record", record, [arm, episodes], "teleoperated demonstrations, as raw takes")
    g.add_argument("--operator", choices=("keyboard", "quest", "expert"), default="expert", help="who leads "
                   "the arm; expert: a script, for sim alone")
    g.add_argument("--out", default="data/takes", metavar="DIR", help="folder of the takes")
    g = command("replay", replay, [arm], "a recorded take, slowly")
    g.add_argument("--take", required=True, metavar="FILE", help="data/takes/TASK-00000.h5, made by record")
    g.add_argument("--speed", type=float, default=0.25, help="share of the recorded speed, at most 1")
    g = command("rollout", run_rollout, [arm, episodes], "finetuned policies: success per task")
    g.add_argument("--checkpoint", default="runs/finetune/last.pt", metavar="PATH", help="of finetune.py")
    g.add_argument("--compare", metavar="PATH", help="a second checkpoint, in turns with the first")
    g.add_argument("--execute", type=int, metavar="H", help="actions of a chunk per observation; 0: "
                   "temporal ensembling (default: the policy's own, diffusion 8, others 0)")
    g.add_argument("--device", default="cpu", help="of the policy")
    g.add_argument("--out", metavar="DIR", help="folder of the results; if not given, rollout_arm beside the "
                   "checkpoint")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.move = args.move or args.arm == "sim"
    cameras = [] if args.arm == "sim" else [text.partition("=")[::2] for text in args.cameras]
    args.cameras = dict(cameras)
    if len(args.cameras) < len(cameras) or not all(map(all, cameras)):
        raise InputError("--cameras takes NAME=SOURCE with different names: --cameras front=0 side=2")
    if "episodes" in args:
        at_least(args, 1, "episodes")
        args.tasks = list(dict.fromkeys(args.tasks.split(",")))
        if unknown := set(args.tasks) - set(TASKS):
            raise InputError(f"no task {', '.join(unknown)}: --tasks takes {', '.join(TASKS)}")
    with tempfile.TemporaryDirectory() as folder:
        if not args.move and "episodes" in args:        # a dry run: one episode, which is not kept
            args.episodes, args.tasks, args.out = 1, args.tasks[:1], folder
        args.run(args)


if __name__ == "__main__":
    run(main)

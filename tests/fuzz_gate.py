"""Random, extreme and adversarial actions through the safety gate and the vendor's library to the wire.

    python tests/fuzz_gate.py 100000        # 9 min

A fake controller logs every message. The log is checked by the forward kinematics alone; nothing that the
gate computes is trusted. Joint targets are sent as fast as they can be; each stands for 10 ms.

At commit 41f40c4 it sent 100,000 actions (49,016 refused, 50,022 shortened) and checked the 500,000 targets
on the wire. All kept 3 degrees from the joint limits. None was more than 0.901 degrees (the wire's unit is
0.001) or 4.01 mm of the tool from the previous one, and none more than 1.3 mm outside the box: a straight
line in joint space between two points of the box is slightly curved in space.
"""
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from robot import RealmanArm, Refused, fake_controller, tool_pose  # noqa: E402

# The promises, written out independently of robot.py: degrees, degrees per target of 10 ms, metres
JOINTS = np.array([175, 127, 132, 175, 125, 357])
STEP = 90 * 0.01
BOX = np.array([[0.15, -0.22, 0.016], [0.45, 0.22, 0.25]])
BOX_TOLERANCE = 0.0015          # m, of a straight line in joints between two points of the box
TOOL_STEP = 0.0041              # m per target: 2 cm in 5 of them; the wire cuts joints to 0.001 degrees
COMMANDS = {"movej_canfd", "set_arm_slow_stop", "set_arm_stop", "set_gripper_pick", "set_gripper_release",
            "set_collision_stage", "set_realtime_push"}
LIMIT = np.array([.02] * 3 + [.1] * 3)
BAD = [None, "left", [], np.zeros(6), np.zeros(8), np.full(7, np.nan), np.full(7, np.inf), {"x": 1},
       np.array([0, 0, -np.inf, 0, 0, 0, 1]), np.full(7, 1e308), np.full((7, 7), 0.01), b"1234567"]


def stories(rng):
    """Yields (action, measured offset in rad): what a broken policy could say, in runs of one kind each."""
    while True:
        kind, length = rng.integers(8), int(rng.integers(1, 60))
        push = rng.choice([-1, 0, 1], 7) * np.append(LIMIT, 1)
        for i in range(length):
            offset = rng.normal(0, 0.02, 6) * (rng.random() < 0.2)
            if kind == 0:
                action = np.append(rng.uniform(-LIMIT, LIMIT), rng.random())
            elif kind == 1:
                action = rng.normal(0, 1, 7) * np.append(3 * LIMIT, 1)
            elif kind == 2:
                action = push                                               # into a corner, with a spin
            elif kind == 3:
                action = BAD[rng.integers(len(BAD))]
            elif kind == 4:
                action = push * (1 if i % 2 else -1) * 9.9                  # to and fro, just not absurd
            elif kind == 5:
                action = np.append(np.zeros(3), rng.choice([-1, 1], 3) * 0.1).tolist() + [1]
            elif kind == 6:
                action = 10.0 ** rng.uniform(-320, 300, 7) * rng.choice([-1, 1], 7)
            else:
                action = push + rng.normal(0, 1e-3, 7)
            yield action, offset


def check(messages):
    """Every message of the log -> a summary. AssertionError for a message that breaks a promise."""
    frames = np.array([m["joint"] for m in messages if m["command"] == "movej_canfd"]) / 1000  # (F, 6) deg
    others = {m["command"] for m in messages} - COMMANDS
    assert all(name.startswith("get_") for name in others), f"other commands on the wire: {others}"
    beyond = (np.abs(frames) > JOINTS + 2e-3).any(1)
    assert not beyond.any(), f"joint limit: {frames[beyond][0]}"
    step = np.abs(np.diff(frames, axis=0)).max()
    assert step <= STEP + 2e-3, f"{step} degrees between two targets"
    tools = np.array([tool_pose(np.radians(q))[0] for q in frames])
    outside = np.maximum(BOX[0] - tools, tools - BOX[1]).max()
    assert outside <= BOX_TOLERANCE, f"{outside} m outside the box"
    tool_step = np.linalg.norm(np.diff(tools, axis=0), axis=1).max()
    assert tool_step <= TOOL_STEP, f"the tool moves {tool_step} m between two targets"
    return {"frames": len(frames), "largest_joint_deg": np.abs(frames).max(0).round(1).tolist(),
            "largest_step_deg": round(step, 4), "outside_mm": round(1000 * outside, 3),
            "largest_tool_step_mm": round(1000 * tool_step, 2),
            "reached_m": [tools.min(0).round(3).tolist(), tools.max(0).round(3).tolist()]}


def main(count=100_000):
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "wire.jsonl")
        with fake_controller("--ideal", "--log", str(log)) as ports:
            arm = RealmanArm(f"127.0.0.1:{ports['port']}", move=True)
            rng, begun, refused, shortened = np.random.default_rng(0), time.monotonic(), Counter(), 0
            arm.sent = arm.joints
            arm.gate.hold(arm.sent)
            for _, (action, offset) in zip(range(count), stories(rng)):
                try:
                    with np.errstate(all="ignore"):
                        _, executed = arm.gate(action, tool_pose(arm.gate.q + offset)[0])
                    shortened += int(np.abs(executed[:6] - action[:6]).max() > 1e-4)
                except Refused as why:
                    refused[str(why).split(":")[0]] += 1
                arm.aim, late = arm.gate.q, rng.random() < 0.3
                for left in rng.uniform(-3, 6, 5) if late else (5, 4, 3, 2, 1):     # ... or a clock astray
                    arm.advance(left)
            seconds = time.monotonic() - begun
            time.sleep(0.5)
            arm.close()
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    result = {"actions": count, "seconds": round(seconds, 1), "refused": dict(refused),
              "shortened": shortened, **check([row["m"] for row in rows if "m" in row])}
    assert result["frames"] == 5 * count, f"{result['frames']} frames on the wire for {count} actions"
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

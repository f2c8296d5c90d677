"""Causes one fault after the other while the arm moves: does it stop, how soon, and with which reason?

    python tests/rehearse_faults.py                 # a table, 2 min; --only 'camera;SIGINT' for some of it

The arm is driven in circles through the vendor's library against the fake controller; then comes the fault.
"ticks" are control steps (50 ms) from the fault to the last motion of the twin's joints (more than 0.5
degrees/s), "stop" the milliseconds until the stop message arrives. Both come from the controller's own log.

Measured while the arm moved at 20 cm/s (two CPU cores of an AMD EPYC server). In all cases the arm stands
still afterwards and the script ends.

    fault                                              ticks       reason
    controller silent; 0.5 s late                      5; 15       no state for 0.2 s (also delayed: the stop)
    controller ignores targets; joints stuck           2; 2        lag of a joint (the arm stands at once)
    connection dropped                                 2           a target was not sent
    error 0x100D (collision), 0x1002 (joint limit)     1; 1        the error
    camera frozen; unplugged; black                    12; 12; 12  no valid image for 0.5 s
    policy returns NaN; 1e6                            2; 2        three commands in a row refused
    policy takes 1 s                                   2           no command for 0.3 s
    space bar; SIGINT; SIGTERM                         2; 2; 2     space bar or signal
    kill -9 of the script                              2           none: the arm holds the last target
    a second driver for the same arm                   2           the second driver is refused
"""
import argparse
import json
import multiprocessing
import os
import pty
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import InputError  # noqa: E402
from robot import (CONTROL_HZ, ArmEnv, ArmStopped, Camera, Person, RealmanArm, Rehearsal,  # noqa: E402
                   fake_controller, on_signal)

# name: (what the controller is told or what is done here, possible beginnings of the reason that is given)
FAULTS = {
    "controller silent": (("silent",), ("state", "gripper")),
    "controller late by 0.5 s": (("late", 0.5), ("state", "gripper")),
    "controller refuses frames": (("refuse",), ("lag", "gripper")),
    "connection dropped": (("drop",), ("controller", "state", "gripper")),
    "error 0x100D, collision": (("error", 0x100D), ("controller: error 4109",)),
    "error 0x1002, joint limit": (("error", 0x1002), ("controller: error 4098",)),
    "joints stuck": (("stuck",), ("lag",)),
    "gripper silent": (("gripper", 60), ("gripper: no answer, 4 times",)),
    "gripper late, space bar": ("late key", ("stopped by the space bar",)),
    "camera frozen": (("frozen", "front"), ("camera front: frozen",)),
    "camera unplugged": (("unplugged", "side"), ("camera side: unplugged",)),
    "camera black": (("black", "front"), ("camera front: dark",)),
    "policy says NaN": (np.nan, ("3 commands in a row refused",)),
    "policy says 1e6": (1e6, ("3 commands in a row refused",)),
    "policy takes 1 s": ("slow", ("policy",)),
    "space bar": ("key", ("stopped by the space bar",)),
    "SIGINT": (signal.SIGINT, ("signal SIGINT",)),
    "SIGTERM": (signal.SIGTERM, ("signal SIGTERM",)),
    "kill -9 of the script": (signal.SIGKILL, ("killed",)),
    "second driver": ("second", ("another process",)),
}

# One fake controller plays all faults and is healed in between. Each fault has a driver of its own, forked
# from this process, which has loaded neither the vendor's library nor OpenGL: a library that hangs can be
# killed then, and no fault inherits what another one left behind.
processes = multiprocessing.get_context("fork")


def measure(log, begun):
    """-> control steps from the last fault (or mark) after `begun` to the last motion, whether all is still
    then, and the milliseconds until a stop message came (None: none came)."""
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    rows = [row for row in rows if row["t"] > begun]
    at = max((row["t"] for row in rows if "fault" in row), default=None)
    if at is None:              # something else ended it before: this machine is too busy
        return None, False, None
    t, q = (np.array(x) for x in zip(*((row["t"], row["q"]) for row in rows
                                       if "q" in row and row["t"] > at - 0.3)))
    stop = next((1000 * (row["t"] - at) for row in rows if row["t"] > at
                 and row.get("m", {}).get("command", "").endswith("stop")), None)
    speed = np.abs(q[5:] - q[:-5]).max(1) / (t[5:] - t[:-5])         # degrees/s, over 50 ms
    if not (speed[t[5:] < at] > 5).any():
        return None, False, stop        # it did not move when the fault came
    last = max(t[5:][(speed > 0.5) & (t[5:] > at)], default=at)
    return float((last - at) * CONTROL_HZ), bool(t[-1] - last > 0.3), stop


def drive(ports, world, act, keyboard):
    """Drive until something ends it. -> why"""
    arm, cameras = RealmanArm(f"127.0.0.1:{ports['port']}", move=True), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, partial(on_signal, arm))
        cameras = {c: Camera(c, f"http://127.0.0.1:{ports['cameras']}/{c}") for c in ("front", "side")}
        if keyboard:
            Person(arm)
        env = ArmEnv(arm, cameras, 64, world, judged=False)
        env.reset("stack_cups", 0)
        for i in range(100):
            if env.step(act(i), look=i % 2 == 0)[1]:
                return env.aborted
        return "nothing stopped it"
    except (ArmStopped, InputError) as e:
        return str(e)
    finally:
        arm.close()
        for camera in cameras.values():
            camera.close()


def attempt(ports, name, answer):
    """Drive in circles of 8 cm at 20 cm/s, cause the fault after a second. Sends the reason of the end."""
    fault, master, world = FAULTS[name][0], None, Rehearsal(ports["port"])
    if fault in ("key", "late key"):
        master, slave = pty.openpty()
        sys.stdin = os.fdopen(slave, "r")

    def act(i):
        if i == 13 and fault == "late key":         # when the key comes, two queries are unanswered
            world.ask("fault", name="gripper", value=0.5)
        if i == 20:
            told, *value = fault if isinstance(fault, tuple) else ("mark",)
            world.ask("fault", name=told, value=value[0] if value else True)
            if isinstance(fault, signal.Signals):
                os.kill(os.getpid(), fault)
            elif master:
                os.write(master, b" ")
            elif fault == "slow":
                time.sleep(1)
            elif fault == "second":
                RealmanArm(f"127.0.0.1:{ports['port']}", move=True)
        if i >= 20 and isinstance(fault, float):
            return np.full(7, fault)
        angle = 2 * np.pi * i / 50
        return np.array([0.010 * np.cos(angle), 0.010 * np.sin(angle), 0, 0, 0, 0, 1.0])

    answer.send(drive(ports, world, act, keyboard=master))


def rehearse(name, ports, log):
    """-> the row of the table. A driver that has not ended after 30 s is killed, and the row says so."""
    begun, (mine, its) = time.monotonic(), processes.Pipe()
    driver = processes.Process(target=attempt, args=(ports, name, its))
    driver.start()
    its.close()
    try:
        why = mine.recv() if mine.poll(30) else "HANGS"
    except EOFError:
        why = "killed"
    driver.join(5)
    exited = not driver.is_alive()
    driver.kill()
    time.sleep(0.8)
    ticks, still, stop = measure(log, begun)
    return {"fault": name, "reason": why, "ticks": ticks and round(ticks, 1), "still": still,
            "stop_ms": "-" if stop is None else round(stop), "exited": exited,
            "expected": why.startswith(FAULTS[name][1])}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="beginnings of the faults' names, with ; between them")
    p.add_argument("--json", type=Path, help="write the rows there")
    args = p.parse_args()
    rows, wanted = [], [name for name in FAULTS if name.startswith(tuple(args.only.split(";")))]
    print(f"{'fault':28s}{'ticks':>6s}  {'still':6s}{'stop':>6s}  reason", flush=True)
    with tempfile.TemporaryDirectory() as folder, fake_controller("--log", f"{folder}/log") as ports:
        healer = Rehearsal(ports["port"])
        for name in wanted:
            for _ in range(3):          # again if not as expected: a busy machine is late for 100 Hz
                row = rehearse(name, ports, Path(folder, "log"))
                healer.ask("fault", name="heal")
                good = row["expected"] and row["still"] and row["exited"]
                print(f"{name:28s}{row['ticks'] or 0:6.1f}  {'yes' if row['still'] else 'NO':6s}"
                      f"{row['stop_ms']:>6}  {row['reason']}" + "  <-- NOT EXPECTED" * (not good),
                      flush=True)
                if good:
                    break
            rows.append({**row, "good": good})
    if args.json:
        args.json.write_text(json.dumps(rows))
    sys.exit(not all(row["good"] for row in rows))


if __name__ == "__main__":
    main()

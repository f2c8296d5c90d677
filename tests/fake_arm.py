"""A fake RM65-B controller: the vendor's JSON protocol on loopback, with the twin as the arm.

    python tests/fake_arm.py            # prints its ports as one line of JSON, serves until stdin closes

`robot.py --arm sim` starts it, so that the vendor's own library, cameras and clocks are rehearsed without an
arm.

    TCP   what the library sends, one JSON object per line, and the replies of a third-generation controller.
          It knows only what robot.py uses; any other command gets no reply and is logged as "unknown"
    UDP   the state, every 5 ms, to the port that the library asks for
    HTTP  the twin's cameras as MJPEG at 25 Hz: http://127.0.0.1:PORT/front, as OpenCV reads any IP camera

The same TCP port takes commands that only a rehearsal has: {"command": "twin_begin", "task", "seed"} sets the
scene (the arm stays where it is), "twin_success" tells whether the task is done, "twin_expert" and "twin_act"
ask the scripted expert for actions, "fault" breaks something (see Controller.fault).

ASSUMPTION: position motors as stiff as the twin's follow a joint target of movej_canfd at once; a target that
jumps by more than 10 degrees or leaves the joint limits is refused, stops the arm and sets the error; a stop
holds the joints where they are; when the client is gone, the arm holds the last target.
"""
import argparse
import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from robot import (CAMERAS, DH, JOINT_LIMIT, OPENING, PHYSICS_DT, SQUEEZE, TASKS, Expert,  # noqa: E402
                   TwinEnv)
import cv2  # noqa: E402
import mujoco  # noqa: E402     after robot, which chooses OpenGL
import numpy as np  # noqa: E402

LOOPBACK, ZERO = "127.0.0.1", [0] * 6
JOINT_SPEED = [30000, 30000, 37500, 37500, 37500, 37500]        # the protocol's unit: 180 and 225 degrees/s
OVERSPEED, OVER_LIMIT = 0x1007, 0x1002


def whole(values, scale=1000):
    """The protocol's integers: joints in 0.001 degrees, lengths in micrometres."""
    return [int(round(v * scale)) for v in values]


def start(work, *args):
    threading.Thread(target=work, args=args, daemon=True).start()


def serve(server, client):
    """Calls client(socket) in a thread of its own for every client, until the server is closed."""
    with contextlib.suppress(OSError):
        while True:
            start(client, server.accept()[0])


class Ideal:
    """An arm without a world: the joints are where they were told to be. For the fuzz test, at any speed."""
    opening = property(lambda self: self.grip)

    def __init__(self):
        self.q, self.grip = np.radians([0, -20, -70, 0, -90, 0]), 1.0

    def command(self, q):
        self.q = np.array(q)

    def advance(self, steps):
        pass


class Twin:
    """The twin's arm, gripper and things, in real time."""
    q = property(lambda self: self.env.data.qpos[:6].copy())
    opening = property(lambda self: self.env.opening)

    def __init__(self):
        self.env, self.lock, self.grip = TwinEnv(cameras=(), spread=0.5), threading.Lock(), 1.0
        self.good, self.begun = 0, False
        for task in TASKS:          # building a scene takes longer than a controller may be silent
            self.env.reset(task, 0)
        self.target = self.q

    def begin(self, task, seed):
        """Set the things of an episode; the arm and its gripper stay where they are."""
        with self.lock:
            arm, grip = self.env.data.qpos[:8].copy(), self.env.data.ctrl[:8].copy()
            self.env.reset(task, seed)
            self.env.data.qpos[:8], self.env.data.ctrl[:8] = arm, grip
            mujoco.mj_forward(self.env.model, self.env.data)
            self.good, self.begun = 0, True

    def command(self, q):
        self.target = np.array(q)

    def advance(self, steps):
        """Physics for steps of 2 ms. Success has to hold for a quarter of a second."""
        with self.lock:
            data = self.env.data
            data.ctrl[:6] = self.target
            data.ctrl[6:8] = SQUEEZE if self.grip < 0.05 else self.grip * OPENING
            mujoco.mj_step(self.env.model, data, nstep=steps)
            self.good = self.good + steps if self.begun and self.env.success() else 0

    def success(self):
        return self.good * PHYSICS_DT >= 0.25

    def expert(self, seed):
        """Let a scripted expert lead the episode; act() -> its next action, and whether it is too late."""
        with self.lock:
            self.leader, self.left = Expert(self.env, seed), self.env.max_steps

    def act(self):
        with self.lock:
            self.left -= 1
            return self.leader.act().tolist(), self.left < 0


class Controller:
    """The controller: clients, state push, arm, faults, and a log of all that came over the wire."""

    def __init__(self, plant, log=None):
        self.plant, self.target, self.clients, self.faults = plant, plant.q, set(), {}
        self.err, self.collision = 0, 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((LOOPBACK, 0))
            self.push_port = free.getsockname()[1]
        self.log, self.log_lock = log and open(log, "w"), threading.Lock()
        self.server = socket.create_server((LOOPBACK, 0))
        self.port = self.server.getsockname()[1]
        start(serve, self.server, self.client)
        start(self.clock)
        start(self.tell)

    def note(self, **line):
        if self.log:
            with self.log_lock:
                self.log.write(json.dumps({"t": time.monotonic(), **line}) + "\n")
                self.log.flush()

    def fault(self, name, value=True):
        """silent: executes, says nothing | late: everything is heard and said `value` s late | refuse:
        ignores targets, answers other commands with false | drop: closes the connection, takes no other |
        error: `value` becomes the error code, the arm stops | stuck: the joints do not follow |
        gripper: answers queries about it `value` s late |
        frozen, unplugged, black: the camera called `value` | mark: no fault, a line in the log |
        heal: ends all faults"""
        if name == "heal":
            self.faults.clear()
            self.err = 0
            return self.stop()
        self.note(fault=name, value=value)
        self.faults[name] = value
        if name == "error":
            self.stop(value)
        elif name == "drop":
            for client in list(self.clients):
                client.shutdown(socket.SHUT_RDWR)

    def stop(self, err=0):
        self.err, self.target = err or self.err, self.plant.q
        self.plant.command(self.target)

    # -- threads --

    def clock(self):
        """Physics in real time, in batches of 10 ms; what a busy machine cannot keep up with is dropped."""
        done = time.monotonic()
        while True:
            time.sleep(0.002)
            steps = int((time.monotonic() - done) / PHYSICS_DT)
            if steps < 5:
                continue
            done += max(0, steps - 50) * PHYSICS_DT
            steps = min(steps, 50)
            self.plant.advance(steps)
            done += steps * PHYSICS_DT
            self.note(q=np.degrees(self.plant.q).round(3).tolist())

    def tell(self):
        """Push the state by UDP."""
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((LOOPBACK, 0))
        while True:
            time.sleep(0.005)
            if self.faults.keys() & {"silent", "drop"}:
                continue
            data = json.dumps({
                "state": "realtime_arm_joint_state", "arm_current_status": "idle", "err": [self.err],
                "joint_status": {"joint_current": ZERO, "joint_en_flag": [1] * 6, "joint_err_code": ZERO,
                                 "joint_position": whole(np.degrees(self.plant.q)), "joint_speed": ZERO,
                                 "joint_temperature": [30000] * 6, "joint_voltage": [24000] * 6},
                "waypoint": {"euler": [0] * 3, "position": [0] * 3, "quat": [1000000, 0, 0, 0]}}).encode()
            self.after(self.faults.get("late"), udp.sendto, data, (LOOPBACK, self.push_port))

    @staticmethod
    def after(seconds, call, *args):
        threading.Timer(seconds, call, args).start() if seconds else call(*args)

    def client(self, client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.clients.add(client)
        if "drop" in self.faults:
            client.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ValueError):
            for line in client.makefile("rb"):
                message = json.loads(line.strip() or "{}")
                if message.get("command", "").startswith(("twin_", "fault")):
                    self.clients.discard(client)        # the rehearsal's own connection: no fault breaks it
                    client.sendall(json.dumps(self.rehearse(**message)).encode() + b"\n")
                elif message:
                    self.note(m=message)
                    late = self.faults.get("late", 0)
                    if message["command"] == "get_gripper_state":
                        late = max(late, self.faults.get("gripper", 0))
                    self.after(late, self.reply, client, message)
        self.clients.discard(client)
        client.close()

    def rehearse(self, command, **more):
        """fault: self.fault(), twin_begin: Twin.begin(), twin_act: Twin.act() and so on"""
        return (self.fault if command == "fault" else getattr(self.plant, command[5:]))(**more)

    def reply(self, client, message):
        answer = self.answer(message)
        if answer and "silent" not in self.faults:
            with contextlib.suppress(OSError):
                client.sendall(json.dumps(answer).encode() + b"\r\n")

    # -- the protocol --

    def frame(self, joints):
        """A joint target of movej_canfd. It gets no reply, whatever becomes of it."""
        q = np.radians(np.array(joints) / 1000)
        if "refuse" in self.faults or self.err:
            return
        if (np.abs(q) > JOINT_LIMIT).any():
            self.stop(OVER_LIMIT)
        elif np.abs(q - self.target).max() > np.radians(10):
            self.stop(OVERSPEED)
        else:
            self.target = q
            if "stuck" not in self.faults:
                self.plant.command(q)

    def answer(self, message):
        """-> the reply, or None."""
        name, takes = message["command"], "refuse" not in self.faults
        if name == "movej_canfd":
            return self.frame(message["joint"])
        if name in ("set_arm_slow_stop", "set_arm_stop"):
            if takes:
                self.stop()
            return {"command": name, name[4:]: takes}
        if name in ("set_gripper_pick", "set_gripper_release"):
            if takes:
                self.plant.grip = float(name.endswith("release"))
            return {"command": "set_gripper", "state": takes}
        if name == "set_collision_stage":
            self.collision = message["collision_stage"]
            return {"command": name, "collision_state": True}
        joints, limit = whole(np.degrees(self.plant.q)), np.degrees(JOINT_LIMIT)
        replies = {
            "get_arm_software_info": {
                "Product_version": "RM65-BI", "algorithm_info": {"version": "1.4.4"},
                "command": "arm_software_info", "ctrl_info": {"build_time": "none", "version": "V1.6.1"},
                "dynamic_info": {"model_version": "2"},
                "plan_info": {"build_time": "none", "version": "V1.6.1"}},
            "get_arm_current_trajectory": {"state": "arm_current_trajectory", "type": "none", "data": joints},
            "get_realtime_push": {
                "command": "get_realtime_push", "cycle": 1, "enable": True, "force_coordinate": 0,
                "ip": LOOPBACK, "port": self.push_port,
                "custom": {"joint_speed": True, "lift_state": False, "expand_state": False,
                           "arm_current_status": True, "aloha_state": False}},
            "get_current_work_frame": {"frame_name": "World", "pose": ZERO, "state": "current_work_frame"},
            "get_current_tool_frame": {"payload": 0, "pose": ZERO, "position": [0] * 3,
                                       "state": "current_tool_frame", "tool_name": "Arm_Tip"},
            "get_install_pose": {"pose": [0, 0, 0], "state": "install_pose"},
            "get_joint_min_pos": {"min_pos": whole(-limit), "state": "joint_min_pos"},
            "get_joint_max_pos": {"max_pos": whole(limit), "state": "joint_max_pos"},
            "get_joint_max_acc": {"joint_acc": [100000] * 6, "state": "joint_max_acc"},
            "get_joint_max_speed": {"joint_speed": JOINT_SPEED, "state": "joint_max_speed"},
            "get_DH_data": {"command": "get_DH_data", **{
                f"joint_{i}": whole([*np.degrees(row[:1]), *1000 * row[1:3], *np.degrees(row[3:])])
                for i, row in enumerate(DH, 1)}},
            "get_joint_degree": {"state": "joint_degree", "joint": joints},
            "get_current_arm_state": {"state": "current_arm_state", "arm_state": {
                "joint": joints, "pose": ZERO, "err": [self.err]}},
            "get_arm_all_state": {"state": "arm_all_state", "all_state": {
                "temperature": [30000] * 6, "current": ZERO, "voltage": [24000] * 6, "err_flag": ZERO,
                "en_flag": [1] * 6, "err": [self.err]}},
            "get_arm_power_state": {"state": "arm_power_state", "power_state": 1},
            "get_arm_run_mode": {"command": "get_arm_run_mode", "mode": 1},
            "get_collision_stage": {"state": "get_collision_stage", "collision_stage": self.collision},
            "get_gripper_state": {"command": "get_gripper_state", "enable": 1, "status": 1, "error": 0,
                                  "mode": 1, "current_force": 0, "temperature": 30,
                                  "actpos": round(1000 * self.plant.opening)}}
        if name not in replies:
            self.note(unknown=name)
        return replies.get(name)


class Cameras:
    """Renders the twin at 25 Hz and serves it as MJPEG. The pictures have noise: without it a still scene
    could not be told from a frozen camera."""

    def __init__(self, twin, faults):
        self.twin, self.faults, self.jpeg, self.fresh = twin, faults, {}, threading.Condition()
        server = socket.create_server((LOOPBACK, 0))
        self.port = server.getsockname()[1]
        start(serve, server, self.client)
        start(self.draw)

    def draw(self):
        with self.twin.lock:
            renderers = {task: mujoco.Renderer(model, 96, 96)
                         for task, (model, *_) in self.twin.env._models.items()}
        rng, due = np.random.default_rng(0), time.monotonic()
        while True:
            due = max(due + 1 / 25, time.monotonic())
            time.sleep(max(0, due - time.monotonic()))
            for camera in CAMERAS:
                with self.twin.lock:
                    renderer = renderers[self.twin.env.task_name]
                    renderer.update_scene(self.twin.env.data, camera)
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
                picture = renderer.render() * (self.faults.get("black") != camera)
                noise = rng.integers(0, 4, picture.shape, np.uint8)         # in the dark, too
                picture = np.clip(picture, 0, 252).astype(np.uint8) + noise
                if self.faults.get("frozen") != camera:
                    self.jpeg[camera] = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]),
                                                     [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            with self.fresh:
                self.fresh.notify_all()

    def client(self, client):
        camera = client.recv(4096).split()[1].decode().strip("/")           # GET /front HTTP/1.1
        with contextlib.suppress(OSError), client:
            client.sendall(b"HTTP/1.0 200 OK\r\n"
                           b"Content-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
            while self.faults.get("unplugged") != camera:
                with self.fresh:
                    self.fresh.wait()
                client.sendall(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n"
                               % (len(self.jpeg[camera]), self.jpeg[camera]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ideal", action="store_true", help="an arm without a world and without cameras")
    p.add_argument("--log", help="JSON lines: what came over the wire, faults, the joints every 10 ms")
    args = p.parse_args()
    plant = Ideal() if args.ideal else Twin()
    controller = Controller(plant, args.log)
    cameras = None if args.ideal else Cameras(plant, controller.faults).port
    print(json.dumps({"port": controller.port, "cameras": cameras, "pid": os.getpid()}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

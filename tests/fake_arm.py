"""A Realman RM65-B controller that is not there: its JSON protocol on loopback, with the twin as the plant.

    python tests/fake_arm.py            # prints its ports as one line of JSON, serves until stdin closes

`robot.py --arm sim` starts it, so that the vendor's own SDK, cameras and clocks are rehearsed without an arm.

    TCP   what the SDK sends, one JSON object per line, and the replies of a third-generation controller. Only
          what robot.py uses is understood; another command gets no reply and stands as "unknown" in the log
    UDP   the state, every 5 ms, to the port that the SDK asks for
    HTTP  the twin's cameras as MJPEG at 25 Hz: http://127.0.0.1:PORT/front, as OpenCV reads any IP camera

and, over the same TCP port, what only a rehearsal has: {"command": "twin_begin", "task", "seed"} sets the
scene (the arm stays where it is), "twin_state" tells where the things are and whether the task is done,
"fault" breaks something (see Controller.fault).

What is assumed, since no arm was at hand: a frame of movej_canfd is followed at once by position motors that
are as stiff as the twin's; one that jumps by more than 10 degrees or leaves the joints' limits is refused,
stops the arm and sets the error; a stop holds the joints where they are; when the client is gone, the last
target is held.
"""
import argparse
import contextlib
import http.server
import json
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from robot import (CAMERAS, DH, JOINT_LIMIT, OPENING, PHYSICS_DT, SQUEEZE, TASKS, TwinEnv,  # noqa: E402
                   joint_frames)
import cv2  # noqa: E402
import mujoco  # noqa: E402     after robot, which chooses OpenGL
import numpy as np  # noqa: E402

LOOPBACK = "127.0.0.1"
JOINT_SPEED = [30000, 30000, 37500, 37500, 37500, 37500]        # the protocol's unit: 180 and 225 degrees/s
OVERSPEED, OVER_LIMIT = 0x1007, 0x1002


def whole(values, scale):
    return [int(round(v * scale)) for v in values]


def euler(rotation):
    """Extrinsic xyz, as the controller says it."""
    return [float(np.arctan2(rotation[2, 1], rotation[2, 2])),
            float(np.arctan2(-rotation[2, 0], np.hypot(rotation[0, 0], rotation[1, 0]))),
            float(np.arctan2(rotation[1, 0], rotation[0, 0]))]


class Ideal:
    """A plant without a world: the joints are where they were told to be. For the fuzz, at any speed."""

    def __init__(self):
        self.q, self.lock, self.grip = np.radians([0, -20, -70, 0, -90, 0]), threading.Lock(), 1.0

    def command(self, q):
        self.q = np.array(q)

    def advance(self, steps):
        pass

    opening = property(lambda self: self.grip)


class Twin:
    """The twin's arm, gripper and things as the plant, in real time."""

    def __init__(self, spread):
        self.env, self.lock, self.grip = TwinEnv(cameras=(), spread=spread), threading.Lock(), 1.0
        self.good, self.start = 0, None
        for task in TASKS:          # building a scene takes longer than a controller may be silent
            self.env.reset(task, 0)
        self.target = self.q.copy()

    def begin(self, task, seed):
        """The things of an episode; the arm stays where it is, its gripper too."""
        with self.lock:
            arm, grip = self.env.data.qpos[:8].copy(), self.env.data.ctrl[:8].copy()
            self.env.reset(task, seed)
            self.env.data.qpos[:8], self.env.data.ctrl[:8] = arm, grip
            mujoco.mj_forward(self.env.model, self.env.data)
            self.good, self.start = 0, (task, seed)

    def command(self, q):
        self.target = np.array(q)

    def advance(self, steps):
        """Physics for steps of 2 ms; success is asked every 10 ms and has to hold for a quarter second."""
        with self.lock:
            data = self.env.data
            data.ctrl[:6] = self.target
            data.ctrl[6:8] = SQUEEZE if self.grip < 0.05 else self.grip * OPENING
            mujoco.mj_step(self.env.model, data, nstep=steps)
            self.good = self.good + steps if self.start and self.env.task.success(self.env) else 0

    q = property(lambda self: self.env.data.qpos[:6].copy())
    opening = property(lambda self: self.env.opening)

    def state(self):
        with self.lock:
            env = self.env
            return {"things": {name: env.position(name).tolist() for name in env.task.objects},
                    "tool": env.tool_position.tolist(), "proprio": env.proprio().tolist(),
                    "opening": env.opening, "success": self.good * PHYSICS_DT >= 0.25}


class Controller:
    """The controller: clients, state push, plant, faults, and a log of all that came over the wire."""

    def __init__(self, plant, log=None):
        self.plant, self.clients, self.faults = plant, [], {}
        self.err, self.status, self.power = 0, "idle", 1
        self.push = {"cycle": 1, "enable": True, "force_coordinate": 0, "ip": LOOPBACK, "port": free_port(),
                     "custom": {"joint_speed": True, "lift_state": False, "expand_state": False,
                                "arm_current_status": True, "aloha_state": False}}
        self.log, self.log_lock = log and open(log, "w"), threading.Lock()
        self.target = plant.q
        self.collision, self.late_ticks = 0, 0
        self.server = socket.create_server((LOOPBACK, 0))
        self.port = self.server.getsockname()[1]
        for work in (self.accept, self.clock, self.tell):
            threading.Thread(target=work, daemon=True).start()

    def note(self, **line):
        if self.log:
            with self.log_lock:
                self.log.write(json.dumps({"t": time.monotonic(), **line}) + "\n")
                self.log.flush()

    # -- faults --

    def fault(self, name, value=None):
        """silent: executes, says nothing | late: all is heard and said `value` s late | refuse: moves and
        stops are answered with false, frames ignored | drop: closes the connection, takes no other |
        error: `value` becomes the error code, the arm stops | stuck: the joints do not follow |
        gripper: questions about its state are answered `value` s late |
        frozen, unplugged, black: the camera called `value` | mark: no fault, a line in the log"""
        self.note(fault=name, value=value)
        if name == "error":
            self.stop(value)
        elif name == "drop":
            self.faults["drop"] = True
            self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
            for client, twin in list(self.clients):
                if not twin:
                    client.shutdown(socket.SHUT_RDWR)
        else:
            self.faults[name] = True if value is None else value
        return {"state": True}

    def stop(self, err=0, status="stop"):
        self.err, self.status, self.target = err or self.err, status, self.plant.q
        self.plant.command(self.target)

    # -- threads --

    def clock(self):
        """Physics in real time, in batches of 10 ms; what a busy machine cannot keep up with is dropped."""
        done, beat = time.monotonic(), 0
        while True:
            time.sleep(0.002)
            steps = int((time.monotonic() - done) / PHYSICS_DT)
            if steps < 5:
                continue
            if steps > 50:
                self.late_ticks += 1
                done, steps = done + (steps - 50) * PHYSICS_DT, 50
            self.plant.advance(steps)
            done, beat = done + steps * PHYSICS_DT, beat + 1
            self.note(q=np.degrees(self.plant.q).round(3).tolist())

    def tell(self):
        """The state, by UDP."""
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((LOOPBACK, 0))
        while True:
            time.sleep(0.005 * self.push["cycle"])
            if not self.push["enable"] or self.faults.keys() & {"silent", "drop"}:
                continue
            data = json.dumps(self.realtime_state()).encode()
            delay = self.faults.get("late", 0)
            threading.Timer(delay, udp.sendto, (data, (LOOPBACK, self.push["port"]))).start() if delay else \
                udp.sendto(data, (LOOPBACK, self.push["port"]))

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:         # the fault "drop" closed it
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        entry = [client, False]
        self.clients.append(entry)
        try:
            for line in client.makefile("rb"):
                if not line.strip():
                    continue
                message = json.loads(line)
                twin = message["command"].startswith("twin") or message["command"] == "fault"
                entry[1] = entry[1] or twin
                if not twin:
                    self.note(m=message)
                late = 0 if twin else self.faults.get("late", 0)
                if message["command"] == "get_gripper_state":
                    late = max(late, self.faults.get("gripper", 0))
                if late:
                    threading.Timer(late, self.handle, (client, message, twin)).start()
                else:
                    self.handle(client, message, twin)
        except (OSError, ValueError):
            pass
        finally:
            self.clients.remove(entry)
            client.close()

    def handle(self, client, message, twin):
        replies = self.answer(message)
        if twin or "silent" not in self.faults:
            with contextlib.suppress(OSError):
                client.sendall(b"".join(json.dumps(reply).encode() + b"\r\n" for reply in replies))

    # -- the protocol; joints in 0.001 degrees, positions in micrometres, angles in milliradians --

    def realtime_state(self):
        flange = joint_frames(self.plant.q)[-1]
        joints, rotation = whole(np.degrees(self.plant.q), 1000), flange[:3, :3]
        zero = [0] * 6
        return {"state": "realtime_arm_joint_state", "arm_current_status": self.status, "err": [self.err],
                "joint_status": {"joint_current": zero, "joint_en_flag": [1] * 6, "joint_err_code": zero,
                                 "joint_position": joints, "joint_temperature": [30000] * 6,
                                 "joint_voltage": [24000] * 6, "joint_speed": zero},
                "waypoint": {"euler": whole(euler(rotation), 1000), "position": whole(flange[:3, 3], 1e6),
                             "quat": [1000000, 0, 0, 0]}}

    def frame(self, joints):
        """One frame of movej_canfd: no reply, whatever becomes of it."""
        q = np.radians(np.array(joints) / 1000)
        if "refuse" in self.faults or self.err:
            return
        if (np.abs(q) > JOINT_LIMIT).any():
            self.stop(OVER_LIMIT)
        elif np.abs(q - self.target).max() > np.radians(10):
            self.stop(OVERSPEED)
        else:
            self.target, self.status = q, "through_joint"
            if "stuck" not in self.faults:
                self.plant.command(q)

    def answer(self, message):
        """-> list of replies."""
        name, refuse = message["command"], "refuse" in self.faults
        joints = whole(np.degrees(self.plant.q), 1000)
        flange = joint_frames(self.plant.q)[-1]
        if name == "movej_canfd":
            self.frame(message["joint"])
            return []
        if name in ("set_arm_slow_stop", "set_arm_stop"):
            if not refuse:
                self.stop(status=name[8:])
            return [{"command": name, name[4:]: not refuse}]
        if name in ("set_gripper_pick", "set_gripper_release"):
            if not refuse:
                self.plant.grip = float(name.endswith("release"))
            return [{"command": "set_gripper", "state": not refuse}]
        if name == "set_collision_stage":
            self.collision = message["collision_stage"]
        replies = {
            "get_arm_software_info": {
                "Product_version": "RM65-BI", "algorithm_info": {"version": "1.4.4"},
                "command": "arm_software_info", "ctrl_info": {"build_time": "none", "version": "V1.6.1"},
                "dynamic_info": {"model_version": "2"},
                "plan_info": {"build_time": "none", "version": "V1.6.1"}},
            "get_arm_current_trajectory": {"state": "arm_current_trajectory", "type": "none", "data": joints},
            "get_realtime_push": {"command": "get_realtime_push", **self.push},
            "get_current_work_frame": {"frame_name": "World", "pose": [0] * 6, "state": "current_work_frame"},
            "get_current_tool_frame": {"payload": 0, "pose": [0] * 6, "position": [0] * 3,
                                       "state": "current_tool_frame", "tool_name": "Arm_Tip"},
            "get_install_pose": {"pose": [0, 0, 0], "state": "install_pose"},
            "get_joint_min_pos": {"min_pos": whole(-np.degrees(JOINT_LIMIT), 1000), "state": "joint_min_pos"},
            "get_joint_max_pos": {"max_pos": whole(np.degrees(JOINT_LIMIT), 1000), "state": "joint_max_pos"},
            "get_joint_max_acc": {"joint_acc": [100000] * 6, "state": "joint_max_acc"},
            "get_joint_max_speed": {"joint_speed": JOINT_SPEED, "state": "joint_max_speed"},
            "get_DH_data": {"command": "get_DH_data", **{
                f"joint_{i + 1}": [*whole(np.degrees(row[:1]), 1000), *whole(row[1:3], 1e6),
                                   *whole(np.degrees(row[3:]), 1000)] for i, row in enumerate(DH)}},
            "get_joint_degree": {"state": "joint_degree", "joint": joints},
            "get_current_arm_state": {"state": "current_arm_state", "arm_state": {
                "joint": joints, "pose": whole(flange[:3, 3], 1e6) + whole(euler(flange[:3, :3]), 1000),
                "err": [self.err]}},
            "get_arm_all_state": {"state": "arm_all_state", "all_state": {
                "temperature": [30000] * 6, "current": [0] * 6, "voltage": [24000] * 6, "err_flag": [0] * 6,
                "en_flag": [1] * 6, "err": [self.err]}},
            "get_arm_power_state": {"state": "arm_power_state", "power_state": self.power},
            "get_arm_run_mode": {"command": "get_arm_run_mode", "mode": 1},
            "set_collision_stage": {"command": "set_collision_stage", "collision_state": True},
            "get_collision_stage": {"state": "get_collision_stage", "collision_stage": self.collision},
            "get_gripper_state": {"command": "get_gripper_state", "enable": 1, "status": 1, "error": 0,
                                  "mode": 1, "current_force": 0, "temperature": 30,
                                  "actpos": round(1000 * self.plant.opening)}}
        if name in replies:
            return [replies[name]]
        if name == "twin_begin":
            return [{"state": self.plant.begin(message["task"], message["seed"]) is None}]
        if name == "twin_state":
            return [self.plant.state() | {"err": self.err, "late_ticks": self.late_ticks}]
        if name == "fault":
            return [self.fault(message["name"], message.get("value"))]
        self.note(unknown=name)
        return []


class Cameras:
    """Draws the twin at 25 Hz and serves it as MJPEG. A camera has noise: without it a still scene could not
    be told from a frozen camera."""

    def __init__(self, plant, faults, size, hz=25):
        self.plant, self.faults, self.size, self.hz = plant, faults, size, hz
        self.jpeg, self.fresh, self.count = {}, threading.Condition(), 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.stream(self)

        self.server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.server.daemon_threads, self.port = True, self.server.server_port
        for work in (self.server.serve_forever, self.draw):
            threading.Thread(target=work, daemon=True).start()

    def draw(self):
        with self.plant.lock:
            renderers = {task: mujoco.Renderer(model, self.size, self.size)
                         for task, (model, *_) in self.plant.env._models.items()}
        rng, due = np.random.default_rng(0), time.monotonic()
        while True:
            due = max(due + 1 / self.hz, time.monotonic())
            time.sleep(max(0, due - time.monotonic()))
            for camera in CAMERAS:
                with self.plant.lock:
                    renderer = renderers[self.plant.env.task_name]
                    renderer.update_scene(self.plant.env.data, camera)
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
                picture = renderer.render() * (self.faults.get("black") != camera)
                noise = rng.integers(0, 4, picture.shape, np.uint8)         # in the dark, too
                picture = np.clip(picture, 0, 252).astype(np.uint8) + noise
                if self.faults.get("frozen") != camera or camera not in self.jpeg:
                    self.jpeg[camera] = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]),
                                                     [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            with self.fresh:
                self.count += 1
                self.fresh.notify_all()

    def stream(self, request):
        camera = request.path.strip("/")
        if camera not in CAMERAS or self.faults.get("unplugged") == camera:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        request.end_headers()
        while self.faults.get("unplugged") != camera:
            with self.fresh:
                self.fresh.wait()
            try:
                request.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n"
                                    % (len(self.jpeg[camera]), self.jpeg[camera]))
            except OSError:
                return


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plant", choices=("twin", "ideal"), default="twin")
    p.add_argument("--spread", type=float, default=1.0, help="of the start regions (default %(default)s)")
    p.add_argument("--size", type=int, default=96, help="of the cameras' pictures, pixels")
    p.add_argument("--log", help="JSON lines: what came over the wire, faults, the joints every 10 ms")
    args = p.parse_args()
    plant = Twin(args.spread) if args.plant == "twin" else Ideal()
    controller = Controller(plant, args.log)
    cameras = Cameras(plant, controller.faults, args.size) if args.plant == "twin" else None
    print(json.dumps({"port": controller.port, "cameras": cameras and cameras.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

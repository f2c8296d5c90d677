"""Success rates (Sec. IV): a finetuned policy on the twin or on LIBERO, beside controls from the same starts.

    python evaluate.py                                         # runs/finetune/last.pt on the twin, 30 starts
    python evaluate.py --env libero_object                     # a LIBERO suite: 50 stored starts of each task
    python evaluate.py --env libero_10 --protocol paper        # 10 trials per task, the paper's number
    python evaluate.py --env libero_goal --tasks 0,3 --episodes 5 --first 10   # starts 10 to 14 of two tasks
    python evaluate.py --compare runs/scratch/last.pt          # from the same starts, McNemar's exact test
    python evaluate.py --checkpoint expert --tasks stack_cups  # the scripted expert: what can be reached
    python evaluate.py --resume                                # go on where a stopped run stood, same result
    python evaluate.py --video 3                               # mp4 of the first 3 episodes of every task
    python evaluate.py --smoke                                 # two short episodes per task
    python evaluate.py --figure runs/*/eval_twin/results.json  # finished runs side by side: table, figure.png

No training episode has any of these starts. Success of the same (policy, task, start) is the same in any
order, in any process and with any number of them, so two policies meet on equal terms. Writes, under --out:

    episodes.jsonl   one line per finished episode, at once: a stopped run loses at most the running episodes
    results.json     successes per task, Wilson and Clopper-Pearson intervals, settings, versions, file hash
    videos/          task_start_success.mp4 or task_start_failure.mp4

Processes: --workers of them simulate and draw, each one episode at a time, and ask this one for actions. It
answers all who wait in forward passes of --batch rows. A worker that resets a scene keeps nobody waiting.

LIBERO's protocol, --protocol full, is the one that most of the field uses: all 50 stored initial states of
each task, 10 steps in which things settle, at most 220 / 280 / 300 / 520 / 400 steps (spatial, object, goal,
10, 90), the last checkpoint. Its meshes: --libero-assets, else $LIBERO_ASSETS, else libero's own download.

What the numbers cannot say: the intervals hold for new starts of *this* checkpoint. Training it again with
another --seed moves its success too; a claim about a method needs several checkpoints. Take the last
checkpoint, not the best of many on these starts.
"""
import argparse
import bisect
import collections
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import textwrap
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Callable, NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binom, binomtest
from tqdm import tqdm

from models import (ActionChunker, InputError, TextEncoder, at_least, file_hash, load_policy, pick_device,
                    provenance, run, write_atomically)
from prepare_data import (LIBERO_CAMERAS, LIBERO_HZ, close_simulator, import_libero, libero_image,
                          libero_instructions, libero_observation, libero_simulator, reset_simulator,
                          show_state)
from robot import CONTROL_HZ, EVAL_SEED0, MAX_STEP, MAX_TURN, PROPRIO_DIM, TASKS, Expert, TwinEnv
from robot import CAMERAS as TWIN_CAMERAS

SMOKE = dict(episodes=2, max_steps=20, video=1)


# ---- environments ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    wordings: tuple         # of its instruction; the first is the usual one
    max_steps: int


@dataclass(frozen=True)
class Benchmark:
    """What is asked of an environment, besides reset(task, start), step(action, look), render(camera, size),
    max_steps and close(). A benchmark goes to every worker, so it can be pickled."""
    make: Callable          # (cameras, image_size) -> environment; cameras = () renders nothing
    tasks: dict             # name -> Task
    cameras: tuple          # all that there are
    proprio_dim: int
    still: np.ndarray       # (7,) the action that does nothing
    low: np.ndarray         # (7,) limits between which the random control draws
    high: np.ndarray
    starts: range           # those there are, for every task; training never uses them
    episodes: dict          # protocol -> episodes per task
    hz: int
    about: dict             # versions and settings, stored with every episode: others are not mixed in
    expert: Callable | None = None      # (environment after reset, start) -> object with .act() -> (7,)


def twin_benchmark(args, trained):
    """The table-top twin of robot.py. trained: the `data` of the checkpoint, {} for a control."""
    spread = (trained.get("extra") or {}).get("spread", 1.0) if args.spread is None else args.spread
    limit = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3)
    return Benchmark(
        make=functools.partial(make_twin, spread), tasks={k: Task((t.instruction,), t.max_steps)
                                                          for k, t in TASKS.items()},
        cameras=tuple(TWIN_CAMERAS), proprio_dim=PROPRIO_DIM, still=np.array([0, 0, 0, 0, 0, 0, 1.0]),
        low=np.append(-limit, 0.0), high=np.append(limit, 1.0), starts=range(EVAL_SEED0, 2 ** 31),
        episodes={"full": 30, "paper": 10}, hz=CONTROL_HZ, expert=Expert,
        about={"spread": spread, "mujoco": version("mujoco")})


def make_twin(spread, cameras, image_size):
    return TwinEnv(image_size=image_size or 64, cameras=cameras, spread=spread)      # 0: a control, blind


# openvla's and openpi's limits. UPSTREAM: 300 for all, which cuts Long short; LIBERO itself: 600.
LIBERO_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
                "libero_90": 400}
LIBERO_SETTLE = 10                                              # steps, openvla's; UPSTREAM: 5
LIBERO_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])               # -1: the gripper stays open


class LiberoEnv:
    """The real LIBERO behind the contract of every environment here: reset, step, render, close.

    Start k is the stored initial state k of a task. images {"agentview", "wrist"}, upright; proprio (8,):
    hand's position (m), rotation vector (rad), fingers (m); action (7,) in [-1, 1], gripper +1 = close.
    """

    def __init__(self, suite, assets, seed, cameras, image_size):
        self.suite, self.assets, self.seed = suite, assets, seed
        self.cameras, self.image_size = tuple(cameras), image_size
        self.root = Path(import_libero(assets).__file__).parent
        self.max_steps = LIBERO_STEPS[suite]

    def reset(self, task, start):
        """Starts an episode from a stored state, after LIBERO_SETTLE steps of doing nothing. -> obs"""
        return self.begin(task, stored_states(self.root, self.suite, task)[start], [self.seed, start],
                          settle=LIBERO_SETTLE)

    def begin(self, task, state, seed, place=None, settle=0):
        """Starts an episode from a flattened state (S,). The furniture, which is no part of it, is placed by
        the seed, or by place(simulator). -> obs"""
        self.sim, self.steps = libero_simulator(str(self.root / "bddl_files" / self.suite / f"{task}.bddl"),
                                                self.assets), 0
        reset_simulator(self.sim, seed)
        if place:
            place(self.sim)
        show_state(self.sim, state)
        for _ in range(settle):
            self.sim.step(LIBERO_STILL)
        return self.observe()

    def step(self, action, look=True):
        """One control step of 1/20 s. -> obs (None unless look: drawing is what costs), done, success

        done = success or max_steps reached. ValueError: not 7 finite numbers
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != LIBERO_STILL.shape or not np.isfinite(action).all():
            raise ValueError(f"an action is {len(LIBERO_STILL)} finite numbers, got {action}")
        _, _, success, _ = self.sim.step(action)
        self.steps += 1
        return self.observe() if look else None, bool(success) or self.steps >= self.max_steps, bool(success)

    def observe(self):
        images, proprio = libero_observation(self.sim, self.cameras, self.image_size)
        return {"images": images, "proprio": proprio.astype(np.float32)}

    def render(self, camera, image_size):
        """(H, W, 3) uint8 RGB, upright."""
        return libero_image(self.sim, camera, image_size)

    def close(self):
        close_simulator()


def stored_states(root, suite, task):
    """LIBERO's own initial states of a task -> (50, S). Unpickled with numpy's arrays admitted, no more."""
    array = np.zeros(1)
    rebuild = array.__reduce__()[0]
    admitted = [(rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, type(array.dtype)]
    with torch.serialization.safe_globals(admitted):
        return np.asarray(torch.load(root / "init_files" / suite / f"{task}.pruned_init", weights_only=True))


def libero_benchmark(suite, args, trained):
    """A suite of LIBERO. trained: unused, a suite has no setting that the data would know."""
    root = Path(import_libero(args.libero_assets).__file__).parent
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    tasks = {}
    for name in libero_task_map[suite]:
        bddl = (root / "bddl_files" / suite / f"{name}.bddl").read_text()
        language = re.search(r"\(:language ([^)]*)\)", bddl)[1].strip().lower()      # as LIBERO's own reader
        info = {"problem_info": json.dumps({"language_instruction": language})}
        tasks[name] = Task(tuple(libero_instructions(info, f"{name}.hdf5")), LIBERO_STEPS[suite])
    return Benchmark(
        make=functools.partial(LiberoEnv, suite, args.libero_assets, args.seed), tasks=tasks,
        cameras=tuple(LIBERO_CAMERAS), proprio_dim=8, still=LIBERO_STILL, low=-np.ones(7), high=np.ones(7),
        starts=range(50), episodes={"full": 50, "paper": 10}, hz=LIBERO_HZ,
        about={"settle": LIBERO_SETTLE, **{p: version(p) for p in ("libero", "robosuite", "mujoco")},
               "assets": folder_hash(import_libero(args.libero_assets).get_assets_path())})


def folder_hash(folder):
    """8 hex digits of names and sizes of all files: tells LIBERO's own meshes from stand-ins."""
    sizes = sorted((str(path.relative_to(folder)), path.stat().st_size)
                   for path in Path(folder).rglob("*") if path.is_file())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]


ENVIRONMENTS = {"twin": twin_benchmark,             # name -> (args, data of the checkpoint) -> Benchmark
                **{suite: functools.partial(libero_benchmark, suite) for suite in LIBERO_STEPS}}


# ---- arms: what is evaluated -----------------------------------------------------------------------------


CONTROLS = ("noop", "random", "expert")


@dataclass
class Arm:
    """A policy or a control. Controls act in the worker; a policy's looks come from there to chunks()."""
    key: str                        # in the files: hash of the checkpoint, or name of the control
    label: str                      # on the screen
    policy: torch.nn.Module | None = None
    checkpoint: dict = field(default_factory=dict)
    rows: int = 1                   # of a forward pass
    device: str = "cpu"
    seconds: float = 0.0            # spent in chunks(), on `looks` observations
    looks: int = 0

    @property
    def data(self):
        return self.checkpoint.get("data", {})

    def learn(self, bench):
        """Embed each task's instruction, in the wording that the policy was trained on."""
        if self.policy:
            embed = TextEncoder(self.checkpoint["text_encoder"])
            self.instructions = {name: embed([wording(task, self.data["instructions"])])[0]          # (L,)
                                 for name, task in bench.tasks.items()}

    def chunks(self, asked):
        """[(task, obs)] of all who wait -> [(n, 7)], in forward passes of exactly `rows` rows, the last one
        repeated: which kernels run, and so the last bits of a row, follow from the shape of a batch, and an
        episode must not depend on how many others ask at the same time (see knows_company)."""
        clock, chunks = time.perf_counter(), []
        for i in range(0, len(asked), self.rows):
            some = asked[i:i + self.rows]
            full = some + some[-1:] * (self.rows - len(some))
            batch = to_batch([obs for _, obs in full], [self.instructions[task] for task, _ in full],
                             self.policy, self.device)
            chunks += list(self.policy.act(batch)[:len(some)].cpu().numpy())                     # (n, 7) each
        self.seconds += time.perf_counter() - clock
        self.looks += len(asked)
        return chunks


    def knows_company(self, bench):
        """Whether the rows of a pass change when their order does. Nothing forbids a kernel that; those of
        the usual sizes do not."""
        rng, size = np.random.default_rng(0), self.policy.config["image_size"]
        asked = [(next(iter(bench.tasks)), {
            "images": {c: rng.integers(0, 256, (size, size, 3), np.uint8) for c in self.policy.cameras},
            "proprio": rng.normal(size=bench.proprio_dim)}) for _ in range(self.rows)]
        one, other = self.chunks(asked), self.chunks(asked[::-1])[::-1]
        self.seconds = self.looks = 0
        return not np.array_equal(one, other)


def wording(task, known):
    """The first of a task's wordings that is known, else its usual one."""
    return next((text for text in task.wordings if text in known), task.wordings[0])


def make_arm(what, rows, device):
    """what: path of a finetuned checkpoint, or noop, random, expert."""
    if what in CONTROLS:
        return Arm(what, what)
    policy, checkpoint = load_policy(what, device)
    if policy.config["head"] == "latent" or checkpoint["stage"] == "pretrain":
        raise InputError(f"{what} is pretrained; finetune it first: "
                         f"python finetune.py --init {what}")
    return Arm(file_hash(what), str(what), policy, checkpoint, rows, device)


def check_arm(arm, bench, name):
    """InputError for a policy that this environment cannot feed, or whose actions it cannot take."""
    if arm.key == "expert" and not bench.expert:
        raise InputError(f"{name} has no scripted expert: it is the twin's (--env twin)")
    if not arm.policy:
        return
    config = arm.policy.config
    for what, has, takes in (("numbers per action", config["action_dim"], len(bench.still)),
                             ("numbers of proprioception", config["proprio_dim"] or bench.proprio_dim,
                              bench.proprio_dim)):
        if has != takes:
            raise InputError(f"{arm.label} was finetuned with {has} {what}, {name} has {takes}: give a "
                             "checkpoint that was finetuned on this robot's data")
    if not set(arm.policy.cameras) <= set(bench.cameras):
        raise InputError(f"{arm.label} looks through {', '.join(arm.policy.cameras)}, {name} has "
                         f"{', '.join(bench.cameras)}: finetune with data whose cameras have these names")
    # An action must span one step of the environment.
    for part in arm.data.get("mixture") or ():
        rate = part["fps"] / part["stride"]
        if not 0.95 < rate / bench.hz < 1.05:
            raise InputError(f"{arm.label} was finetuned on actions of {rate:g} Hz ({part['path']}, stride "
                             f"{part['stride']}), this environment steps at {bench.hz:g} Hz: finetune with "
                             "data or --strides of that rate")


def to_batch(observations, instructions, policy, device):
    """Observations of environments -> a batch, with only what the policy was made for.

    observations [{"images": {camera: (H, W, 3) uint8}, "proprio": (P,)}], instructions [(L,) embedding].
    ASSUMPTION: frames go in as rendered; training frames went through JPEG (quality 95), and those of videos
    that are larger than the policy's images were shrunk from another size than is drawn here.
    """
    def tensor(rows):
        return torch.from_numpy(np.stack(rows)).to(device)

    images = {c: tensor([o["images"][c] for o in observations]).permute(0, 3, 1, 2)   # (B, 3, H, W)
              for c in policy.cameras if all(c in o["images"] for o in observations)}
    batch = {"images": images, "instruction": tensor(instructions)}                   # (B, L)
    if policy.config["proprio_dim"]:
        batch["proprio"] = tensor([np.asarray(o["proprio"], np.float32) for o in observations])      # (B, P)
    if "noise" in observations[0]:
        batch["noise"] = tensor([o["noise"] for o in observations])                   # (B, n, 7)
    return batch


def control(name, bench, env, task, start, seed):
    """policy_fn(obs) -> (1, 7) for an episode: noop does nothing, random draws uniform actions from (seed,
    start, task) alone, expert is the scripted one."""
    rng, script = np.random.default_rng([seed, start, list(bench.tasks).index(task), 7]), None

    def expert(obs):
        nonlocal script
        script = script or bench.expert(env, start)    # at the first look: it plans from the start it finds
        return script.act()[None]

    return {"noop": lambda obs: bench.still[None], "expert": expert,
            "random": lambda obs: rng.uniform(bench.low, bench.high)[None]}[name]


# ---- one episode -----------------------------------------------------------------------------------------


def rollout(env, policy_fn, chunker, task, start, max_steps=None, film=None):
    """One episode: obs -> chunk -> action -> step, in every environment and on the real arm.
    -> success, actions (T, 7) that were executed

    policy_fn(obs) -> (n, 7) is asked only when the chunker needs a new chunk, always with the newest o_t.
    """
    chunker.reset()
    obs, actions = env.reset(task, start), []
    if film:
        film.add()
    for _ in range(max_steps or env.max_steps):
        actions.append(chunker.step(lambda: policy_fn(obs)))                          # (7,)
        obs, done, success = env.step(actions[-1], look=chunker.asks)
        if film:
            film.add()
        if done:
            break
    return bool(success), np.array(actions)


class Film:
    """Films an episode larger than the policy sees it."""

    def __init__(self, env, cameras, hz, size=256):
        self.env, self.cameras, self.hz, self.size, self.frames = env, cameras, hz, size, []

    def add(self):
        self.frames.append(np.concatenate([self.env.render(c, self.size) for c in self.cameras], 1))

    def write(self, folder, name, instruction, success):
        """folder/name_success.mp4, or name_failure.mp4, with instruction and outcome on every frame."""
        outcome = "success" if success else "failure"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}_{outcome}.mp4"
        partial = folder / f"partial_{path.name}"
        height, width = self.frames[0].shape[:2]                                      # (H, cameras * W, 3)
        lines = textwrap.wrap(f"{instruction} [{outcome}]", width // 8)
        strip = np.full((16 * len(lines) + 8, width, 3), 255, np.uint8)
        for i, line in enumerate(lines):
            cv2.putText(strip, line, (6, 16 * (i + 1)), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1,
                        cv2.LINE_AA)
        codec, size = cv2.VideoWriter_fourcc(*"mp4v"), (width, height + len(strip))
        video = cv2.VideoWriter(str(partial), codec, self.hz, size)
        if not video.isOpened():
            raise InputError(f"OpenCV cannot write {partial}: leave out --video, or choose another --out")
        for frame in self.frames + self.frames[-1:] * (self.hz // 2):                 # the end stays 0.5 s
            video.write(np.concatenate([strip, frame[..., ::-1]]))
        video.release()
        os.replace(partial, path)


class Job(NamedTuple):
    """An episode to be played, with all that its outcome depends on, and where to put its film."""
    arm: str
    task: str
    start: int
    seed: int
    chunk: int
    execute: int | None
    decay: float
    max_steps: int | None
    cameras: tuple
    image_size: int
    film: str | None


def play(bench, envs, job, ask):
    """One episode -> its line for episodes.jsonl. ask(obs) -> (n, 7) is the policy, for all but controls.
    envs: {(cameras, image_size): environment} of this process."""
    clock, view = time.perf_counter(), (job.cameras, job.image_size)
    if view not in envs:
        envs[view] = bench.make(*view)
    env = envs[view]
    if job.arm in CONTROLS:
        ask_for = control(job.arm, bench, env, job.task, job.start, job.seed)
    else:       # what a policy draws at random comes from here: it follows from the episode alone
        rng = np.random.default_rng([job.seed, job.start, list(bench.tasks).index(job.task), 8])

        def ask_for(obs):
            return ask({**obs, "noise": rng.standard_normal((job.chunk, len(bench.still)), np.float32)})
    film = Film(env, bench.cameras, bench.hz) if job.film else None
    success, actions = rollout(env, ask_for, ActionChunker(job.chunk, job.execute, job.decay), job.task,
                               job.start, job.max_steps, film)
    if film:
        film.write(Path(job.film), f"{job.task}_{job.start}", bench.tasks[job.task].wordings[0], success)
    return {"arm": job.arm, "task": job.task, "start": job.start, "success": success, "steps": len(actions),
            "actions": hashlib.sha256(actions.tobytes()).hexdigest()[:8],    # equal: the same to the last bit
            "seconds": round(time.perf_counter() - clock, 3)}


# ---- many episodes, in many processes --------------------------------------------------------------------


def work(link, bench):
    """A worker process: plays the jobs that come through `link`, and asks there for chunks of actions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's, which then closes the link
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    envs = {}

    def ask(obs):
        link.send(("look", obs))
        return link.recv()

    try:
        while job := link.recv():
            link.send(("end", play(bench, envs, job, ask)))
    except InputError as e:
        link.send(("error", str(e)))
    except (EOFError, ConnectionError):                 # the parent is gone
        pass
    except OSError as e:                                # a film that cannot be written
        link.send(("error", f"{job.task}, start {job.start}: {e}; finished episodes are kept, --resume"))
    finally:
        for env in envs.values():
            env.close()


def take(jobs, mine, others):
    """The next job for a worker: of the task whose scene it has, else of one that no other worker has."""
    for wanted in (lambda job: job.task == mine, lambda job: job.task not in others, lambda job: True):
        for i, job in enumerate(jobs):
            if wanted(job):
                return jobs.pop(i)


def play_all(jobs, arms, bench, workers):
    """Plays the jobs, in some order; yields the line of each episode when it ends.

    workers = 0: in this process, one after the other. A worker that dies ends the run, with what it played.
    """
    jobs = list(jobs)
    if not workers:
        envs = {}
        for job in jobs:
            yield play(bench, envs, job, lambda obs: arms[job.arm].chunks([(job.task, obs)])[0])
        for env in envs.values():
            env.close()
        return
    context = multiprocessing.get_context("spawn")      # a fork would share OpenGL and torch's threads
    playing, processes = {}, {}                         # link -> job, process

    def died(link):
        processes[link].join(5)
        code, job = processes[link].exitcode, playing[link]
        return InputError(f"a worker died in {job.task}, start {job.start} (exit status {code}"
                          + (", killed, mostly for memory: fewer --workers" if code == -9 else
                             ": the traceback above says why") + "); finished episodes are kept, --resume")

    try:
        for _ in range(min(workers, len(jobs))):
            link, far = context.Pipe()
            processes[link] = context.Process(target=work, args=(far, bench), daemon=True)
            processes[link].start()
            far.close()                                 # the worker has its own: its end is then seen here
            playing[link] = take(jobs, None, {job.task for job in playing.values()})
            link.send(playing[link])
        while playing:
            asked = collections.defaultdict(list)       # arm -> [(link, task, obs)]
            for link in multiprocessing.connection.wait(list(playing)):
                job = playing[link]
                try:
                    kind, what = link.recv()
                except (EOFError, OSError):             # OSError: in the middle of a message
                    raise died(link) from None
                if kind == "error":
                    raise InputError(what)
                if kind == "look":
                    asked[job.arm].append((link, job.task, what))
                    continue
                del playing[link]
                following = take(jobs, job.task, {other.task for other in playing.values()})
                if following:
                    playing[link] = following
                link.send(following)                    # None: no more
                yield what
            for arm, looks in asked.items():
                for (link, *_), chunk in zip(looks, arms[arm].chunks([look[1:] for look in looks])):
                    try:
                        link.send(chunk)
                    except OSError:
                        raise died(link) from None
    finally:
        for link, process in processes.items():
            link.close()
        for process in processes.values():
            process.join(10)                            # they end when their link is closed
            process.terminate()


# ---- finished episodes on disk ---------------------------------------------------------------------------


def open_results(out, args, settings, keys):
    """-> {(arm, task, start): line} of the episodes in out/episodes.jsonl, which need not be run again."""
    path = out / "episodes.jsonl"
    if args.overwrite:
        for old in [path, out / "results.json", *(out / "videos").glob("*.mp4")]:
            old.unlink(missing_ok=True)
    if not args.resume and (path.exists() or (out / "results.json").exists()):
        raise InputError(f"{out} already holds results: --resume goes on with them, --overwrite throws them "
                         "away, --out puts these elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[:raw.rfind(b"\n") + 1]
    if whole != raw:                # the last line was torn by a kill: that episode is run again
        with open(path, "r+b") as f:
            f.truncate(len(whole))
    done = {}
    for number, text in enumerate(whole.decode().splitlines(), 1):
        try:
            line = json.loads(text)
            key, made_with = (line["arm"], line["task"], line["start"]), line["settings"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} line {number} is no episode: --overwrite, or another --out") from e
        for name, value in settings.items():
            if made_with.get(name) != value:
                raise InputError(f"{path} line {number} was made with {name} {made_with.get(name)}, "
                                 f"now it is {value}: give the same flags to --resume, or --overwrite, "
                                 "or another --out")
        if line["arm"] not in (*keys, *CONTROLS):
            raise InputError(f"{path} line {number} is of checkpoint {line['arm']}, now it is "
                             f"{', '.join(keys)}: give the same checkpoints to --resume, or --overwrite, "
                             "or another --out")
        done[key] = line
    return done


def append_line(path, line):
    """One JSON line, on the disk when this returns."""
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


# ---- statistics ------------------------------------------------------------------------------------------


def rate_with_intervals(successes, n):
    """k of n -> {"successes", "n", "rate", "wilson", "clopper_pearson"}, intervals at 95 %."""
    test = binomtest(int(successes), n)
    wilson, exact = (test.proportion_ci(method=m) for m in ("wilson", "exact"))
    return {"successes": int(successes), "n": n, "rate": successes / n,
            "wilson": [float(wilson.low), float(wilson.high)],
            "clopper_pearson": [float(exact.low), float(exact.high)]}


def mcnemar(ours, other):
    """McNemar's exact test of two policies on the same starts: only pairs that end differently say anything.

    ours, other: (n,) bool, same order. -> counts of the four kinds of pairs, two-sided p, difference of the
    rates, and the smallest difference that n pairs find with 80 % power.
    """
    ours, other = np.asarray(ours, bool), np.asarray(other, bool)
    assert ours.shape == other.shape, f"{len(ours)} episodes cannot be paired with {len(other)}"
    n, better, worse = len(ours), int((ours & ~other).sum()), int((other & ~ours).sum())
    p = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {"n": n, "both": int((ours & other).sum()), "neither": int((~ours & ~other).sum()),
            "only_ours": better, "only_other": worse, "p_value": float(p), "difference": (better - worse) / n,
            "detectable_difference": detectable_difference(n, better + worse)}


def detectable_difference(n, discordant):
    """Smallest difference of two rates that the exact test at 5 % finds with 80 % power on n starts, or None.

    The share of starts where the outcomes differ is taken as it was seen (at least the difference itself).
    The other usual figure, six pairs that all go one way (p = 0.03), is a bound that no real comparison
    meets: not shown.
    """
    pairs = np.arange(n + 1)
    # Largest count of the rarer outcome still significant among `pairs` (-1: none is): 2 P(X <= c) < 0.05.
    critical = binom.ppf(0.025, pairs, 0.5)
    critical = np.where(2 * binom.cdf(critical, pairs, 0.5) < 0.05, critical, critical - 1)

    def power(k):                   # for a true difference of k / n
        share = max(discordant, k) / n
        p = 0.5 + k / n / share / 2                                         # of a differing pair to be ours
        found = binom.cdf(critical, pairs, p) + binom.cdf(critical, pairs, 1 - p)
        return float((binom.pmf(pairs, n, share) * np.minimum(found, 1)).sum())

    k = bisect.bisect_left(range(1, n + 1), 0.8, key=power) + 1
    return k / n if k <= n else None


def summarise(arm, tasks, starts, done):
    """Per task and overall: counts, intervals, mean steps of the successes, outcome of every episode."""
    summary = {"label": arm.label, "tasks": {}}
    for task in tasks:
        lines = [done[arm.key, task, start] for start in starts]
        steps = [line["steps"] for line in lines if line["success"]]
        summary["tasks"][task] = rate_with_intervals(len(steps), len(lines)) | {
            "mean_steps_of_successes": float(np.mean(steps)) if steps else None,
            "episodes": [{k: line[k] for k in ("start", "success", "steps", "actions")} for line in lines]}
    successes = sum(t["successes"] for t in summary["tasks"].values())
    summary["overall"] = rate_with_intervals(successes, len(tasks) * len(starts))
    summary["seconds_per_episode"] = float(np.mean([done[arm.key, t, s]["seconds"]
                                                    for t in tasks for s in starts]))
    return summary


def table(arms):
    """Markdown table of all arms; whole per cent where a single episode is worth more than that."""
    rows = [("policy", "task", "success", "rate", "Wilson 95 %", "steps when successful")]
    for arm in arms.values():
        for task, r in [*arm["tasks"].items(), ("all", arm["overall"])]:
            steps, digits = r.get("mean_steps_of_successes"), 0 if r["n"] <= 100 else 1
            rate, low, high = (f"{100 * x:.{digits}f}" for x in (r["rate"], *r["wilson"]))
            rows.append((arm["label"], task, f"{r['successes']}/{r['n']}", f"{rate} %", f"[{low}, {high}]",
                         f"{steps:.0f}" if steps else ""))
    return markdown(rows)


def markdown(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], tuple("-" * w for w in widths), *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


# Success in per cent as published (Tharwat et al. 2025, Table I and Sec. IV): theirs, one training seed, 10
# trials per task, on LIBERO's own demonstrations. None: not at hand when this was written.
PAPER = (("paper: BAKU from scratch", 94, 100, 96, 92, 91.4),
         ("paper: BAKU, supervised pretraining", None, None, None, None, 93.3),
         ("paper: LAWM, BAKU", 99, None, None, 94, 94.2),
         ("paper: Diffusion Policy from scratch", None, None, None, None, 90.5),
         ("paper: LAWM, Diffusion Policy", None, None, None, None, 93.7))


def paper_table(out, arm, settings):
    """The paper's rows, marked as theirs, and ours: the suite that was run and the others of this checkpoint
    whose results, made with the same settings, stand beside `out`. Part of a suite says so."""
    cells, ours = [], {k: v for k, v in settings.items() if k != "env"}
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        cells.append("not run")     # or not as the protocol says: shortened episodes
        path = (out if suite == settings["env"] else out.parent / f"eval_{suite}") / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if (results.get("settings") == {**ours, "env": suite} and arm.key in results["arms"]
                and ours["max_steps"] is None):
            r, (done, there) = results["arms"][arm.key]["overall"], results["tasks"]
            low, high = (100 * x for x in r["wilson"])
            part = "" if done == there else f" ({done} of {there} tasks)"
            cells[-1] = f"{100 * r['rate']:.1f} [{low:.0f}, {high:.0f}], n {r['n']}{part}"
    theirs = [(name, *("–" if x is None else f"{x:g}" for x in rates)) for name, *rates in PAPER]
    return markdown([("", "Spatial", "Object", "Goal", "Long", "90"), *theirs, (arm.label, *cells)])


def draw_figure(paths, path):
    """Bars of success with Wilson intervals, one per results.json, in the order given and coloured by policy;
    the same as a table on the screen. Each is named after its run folder: RUN/eval_twin/results.json."""
    bars, scenes, rows = [], [], [("run", "policy", "success", "rate", "Wilson 95 %", "commit and machine")]
    for file in map(Path, paths):
        try:
            results = json.loads(file.read_text())
            overall, policy = results["arms"][results["hash"]]["overall"], results.get("policy", "?")
            scene = tuple(results["settings"]["env"] if k == "env" else str(results[k])
                          for k in ("env", "tasks", "starts"))
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise InputError(f"{file} is no results.json of this script ({type(e).__name__})") from e
        if bars and scene != scenes[0]:
            print(f"note         {file} is of {scene}, the first of {scenes[0]}: not the same starts")
        scenes.append(scene)
        name, (low, high) = file.absolute().parts[-3], overall["wilson"]
        bars.append((name, policy, overall["rate"], low, high))
        rows.append((name, policy, f"{overall['successes']}/{overall['n']}", f"{100 * overall['rate']:.0f} %",
                     f"[{100 * low:.0f}, {100 * high:.0f}]", "; ".join(results["made_by"])))
    print(markdown(rows))
    figure = Figure(figsize=(6.5, 1 + 0.3 * len(bars)), layout="constrained")
    axes, kinds = figure.subplots(), list(dict.fromkeys(policy for _, policy, *_ in bars))
    for y, (name, policy, rate, low, high) in enumerate(bars):
        axes.barh(y, 100 * rate, color=f"C{kinds.index(policy)}")
        axes.plot([100 * low, 100 * high], [y, y], color="black")
    axes.set(yticks=range(len(bars)), yticklabels=[bar[0] for bar in bars], xlim=(0, 100),
             xlabel="success (%), 95 % intervals over starts, not over training seeds")
    axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"\nwrote        {path}")


def print_comparison(args, c):
    n, least = c["n"], c["detectable_difference"]
    print(f"\n{args.checkpoint} minus {args.compare}: {100 * c['difference']:+.0f} points "
          f"on {n} paired starts\n"
          f"only the first succeeded {c['only_ours']} times, only the second {c['only_other']} times; "
          f"McNemar's exact p = {c['p_value']:.2g}")
    print(f"{n} pairs find a true difference of {100 * least:.0f} points with 80 % power, "
          "smaller ones less often"
          if least else f"{n} pairs are too few to find any difference with 80 % power")


# ---- the run ---------------------------------------------------------------------------------------------


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    g = p.add_argument_group("what")
    g.add_argument("--env", choices=ENVIRONMENTS, default="twin", help="default %(default)s")
    g.add_argument("--checkpoint", default="runs/finetune/last.pt", metavar="PATH|noop|random|expert",
                   help="finetuned policy, or a control (default %(default)s)")
    g.add_argument("--compare", metavar="PATH", help="second checkpoint (or control) on the same starts")
    g.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                   help="also run the do-nothing and the random policy from the same starts (default on)")
    g = p.add_argument_group("starts")
    g.add_argument("--protocol", choices=("full", "paper"), default="full", help="episodes per task: full 50 "
                   "on LIBERO, all its stored states, and 30 on the twin; paper 10, in all else the same "
                   "(default %(default)s)")
    g.add_argument("--tasks", help="comma-separated names or numbers from 0 (default: those whose "
                   "instruction the policy was trained on)")
    g.add_argument("--episodes", type=int, help="per task (default: the protocol's)")
    g.add_argument("--first", type=int, default=0, metavar="K", help="number of the first start (LIBERO: of "
                   "its 50 stored states; default %(default)s)")
    g.add_argument("--seed", type=int, default=0, help="of all else that is random: LIBERO's furniture, the "
                   "random control (default %(default)s)")
    g.add_argument("--max-steps", type=int,
                   help="control steps per episode (default: the task's own, which is also the most)")
    g.add_argument("--spread", type=float, help="twin: width of the start regions, 1 = full, 0 = fixed "
                   "(default: the training data's)")
    g.add_argument("--libero-assets", metavar="FOLDER", help="LIBERO's meshes and textures (default: "
                   "$LIBERO_ASSETS, else the package's own, else its download)")
    g = p.add_argument_group("chunk execution")
    g.add_argument("--execute", type=int, metavar="H", help="execute H actions of a chunk, then look again; "
                   "nothing is drawn in between; 0: look at every step and average the live chunks, temporal "
                   "ensembling, as the paper does (default: the policy's own, diffusion 8, others 0)")
    g.add_argument("--decay", type=float, default=0.01, help="temporal ensembling: weight exp(-decay i), "
                   "i = 0 for the oldest chunk; release 0, a plain mean (default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--figure", nargs="+", metavar="RESULTS", help="run nothing, draw these results.json: "
                   "figure.png in --out, else here")
    g.add_argument("--workers", type=int, default=min(cores, 16), help="processes that simulate and "
                   "draw; 0 = none but this one. No outcome depends on it (default: the cores, %(default)s)")
    g.add_argument("--video", type=int, default=0, metavar="N",
                   help="film the first N episodes of each task (default %(default)s)")
    g.add_argument("--out", help="results folder (default: eval_<env> beside the checkpoint)")
    g.add_argument("--resume", action="store_true",
                   help="keep the episodes that stand in OUT, run the others")
    g.add_argument("--overwrite", action="store_true", help="throw away the results that stand in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="of the policy (default %(default)s)")
    g.add_argument("--batch", type=int, help="rows of every forward pass, filled or not: the last bits of an "
                   "action depend on it (default: 1 on a CPU, where more gain little, else 16)")
    # A batch of one keeps one core busy; two threads on two busy cores took 260 ms a look, not 8.
    g.add_argument("--threads", type=int, default=1, help="torch CPU threads (default %(default)s)")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(p.parse_args([]))), "SMOKE names a flag that does not exist"
    if args.batch is None:
        args.batch = 1 if args.device == "cpu" else 16
    return args


def choose_tasks(args, bench, arm):
    """--tasks, or those tasks that the checkpoint's data have an instruction of, or all of them."""
    if args.tasks is None:
        known = arm.data.get("instructions")
        tasks = [name for name, task in bench.tasks.items()
                 if not arm.policy or set(task.wordings) & set(known)]
        if not tasks:
            raise InputError(f"{arm.label} was trained on none of this environment's instructions (its "
                             f"first: {known[:1]}): name --tasks out of {', '.join(bench.tasks)}")
        return tasks
    names = list(bench.tasks)
    tasks = list(dict.fromkeys(names[int(name)] if name.isdigit() and int(name) < len(names) else name
                               for name in args.tasks.split(",")))
    for name in tasks:
        if name not in bench.tasks:
            raise InputError(f"unknown task {name!r}: --tasks takes {', '.join(names)}, or their numbers, 0 "
                             f"to {len(names) - 1}, comma-separated")
    return tasks


def note_differences(arms, bench, tasks):
    """Say so when a policy is asked for what it was not trained on, or two were trained on other starts."""
    spreads = {}
    for arm in arms:
        if arm.policy:
            spreads[arm.label] = (arm.data.get("extra") or {}).get("spread")
            for name in tasks:
                if not set(bench.tasks[name].wordings) & set(arm.data["instructions"]):
                    print(f"note         {arm.label} was not trained on the instruction of {name}")
    if len(set(spreads.values())) > 1:
        print(f"note         the policies were trained on starts of different spread: {spreads}")


def choose_starts(args, bench, tasks):
    """-> the starts of every task. InputError for starts and lengths that the environment does not have."""
    episodes = args.episodes or min(bench.episodes[args.protocol], len(bench.starts) - args.first)
    starts = bench.starts[args.first:args.first + episodes]
    if len(starts) < max(episodes, 1):
        raise InputError(f"{args.env} has {len(bench.starts)} starts per task, --first {args.first} and "
                         f"--episodes {episodes} ask for more")
    for task in tasks:
        most = bench.tasks[task].max_steps
        if args.max_steps is not None and not 1 <= args.max_steps <= most:
            raise InputError(f"--max-steps takes 1 to {most} for {task}, got {args.max_steps}")
    return starts


def executed(args, policy):
    """Actions per look, None = temporal ensembling: --execute, else the policy's own; a control's: 1."""
    if not policy:
        return 1
    return (min(policy.EXECUTE, policy.chunk) if args.execute is None else args.execute) or None


def main(argv=None):
    args = arguments(argv)
    if args.figure:
        path = Path(args.out or ".") / "figure.png"
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} exists: --overwrite replaces it, --out puts this one elsewhere")
        return draw_figure(args.figure, path)
    at_least(args, 0, "first", "seed", "workers", "video", "decay", "execute")
    at_least(args, 1, "episodes", "batch", "threads")
    pick_device(args.device)
    torch.set_num_threads(args.threads)
    origin = provenance()
    if args.device != "cpu" and not args.workers:
        raise InputError("--workers 0 would draw and infer in one process, which aborts with some GPU "
                         "drivers: --workers 1 or more, or --device cpu")

    # ---- arms, starts, settings ----
    names = dict.fromkeys([args.checkpoint, *[args.compare] * bool(args.compare),
                           *["noop", "random"] * args.controls])
    arms = {arm.key: arm for arm in (make_arm(name, args.batch, args.device) for name in names)}
    if len(arms) < len(names) or args.compare == args.checkpoint:
        raise InputError(f"--compare {args.compare} is the same as {args.checkpoint}: name another "
                         "checkpoint")
    arm = next(iter(arms.values()))
    bench = ENVIRONMENTS[args.env](args, arm.data)
    tasks = choose_tasks(args, bench, arm)
    starts = choose_starts(args, bench, tasks)
    for one in arms.values():
        check_arm(one, bench, args.env)
        one.learn(bench)
        if one.rows > 1 and one.policy and one.knows_company(bench):
            print(f"note         with --batch {args.batch} on {args.device} the last bits of an action "
                  "depend on who else asks: outcomes may not repeat exactly; with --batch 1 they do")
    note_differences(arms.values(), bench, tasks)
    settings = {"env": args.env, **{k: getattr(args, k) for k in (
        "execute", "decay", "max_steps", "seed", "device", "batch", "threads")}, **bench.about,
        "gl": os.environ.get("MUJOCO_GL"), "torch": str(torch.__version__)}
    out = Path(args.out or (Path(args.checkpoint).parent if arm.policy else Path("runs", args.checkpoint))
               / f"eval_{args.env}")
    jobs = [Job(arm=key, task=task, start=start, seed=args.seed, chunk=one.policy.chunk if one.policy else 1,
                execute=executed(args, one.policy), decay=args.decay, max_steps=args.max_steps,
                cameras=tuple(one.policy.cameras) if one.policy else (),
                image_size=one.policy.config["image_size"] if one.policy else 0,
                film=str(out / "videos") if one is arm and start in starts[:args.video] else None)
            for key, one in arms.items() for task in tasks for start in starts]
    for job in jobs:
        ActionChunker(job.chunk, job.execute, job.decay)        # refuses what cannot be, before anything runs
    done = open_results(out, args, settings, list(arms))

    # ---- episodes ----
    if arm.policy:
        print(f"policy       {arm.label} ({arm.key}, step {arm.checkpoint['step']:,}), cameras "
              + ", ".join(arm.policy.cameras))
    limits = sorted({args.max_steps or bench.tasks[task].max_steps for task in tasks})
    print(f"environment  {args.env}: " + ", ".join(f"{k} {v}" for k, v in bench.about.items())
          + f", seed {args.seed}, {settings['gl']}\n"
          f"starts       {len(tasks)} of {len(bench.tasks)} tasks x {len(starts)}, numbers {starts[0]:,} to "
          f"{starts[-1]:,}, at most {' / '.join(map(str, limits))} steps\n"
          f"processes    {args.workers} workers")
    for one in arms.values():
        if one.policy:
            h = executed(args, one.policy)
            print(f"execution    {one.label}: chunks of {one.policy.chunk}, "
                  + (f"{h} per look" if h else f"temporal ensembling, decay {args.decay:g}"))
    left = [job for job in jobs if (job.arm, job.task, job.start) not in done]
    clock, steps = time.perf_counter(), 0
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="episode", dynamic_ncols=True) as bar:
        for line in play_all(left, arms, bench, args.workers):
            line |= {"settings": settings, "commit": origin["commit"], "machine": origin["machine"]}
            append_line(out / "episodes.jsonl", line)
            done[line["arm"], line["task"], line["start"]] = line
            steps += line["steps"]
            bar.set_postfix_str(f"{arms[line['arm']].label[-30:]} {line['task'][:40]} "
                                f"{'success' if line['success'] else 'failure'}")
            bar.update()
    wall = time.perf_counter() - clock

    # ---- results ----
    results = {"checkpoint": args.checkpoint, "hash": arm.key, "step": arm.checkpoint.get("step"),
               "policy": arm.policy.config["policy"] if arm.policy else "control",
               "protocol": args.protocol, "settings": settings, "tasks": [len(tasks), len(bench.tasks)],
               "starts": [starts[0], starts[-1]], "limits": limits,
               "arms": {key: summarise(one, tasks, starts, done) | {"execute": executed(args, one.policy)}
                        for key, one in arms.items()},
               "scope": "95 % intervals over starts of this checkpoint, not over training seeds",
               "speed": {"workers": args.workers, "wall_s": wall, "steps": steps,
                         "looks": sum(a.looks for a in arms.values()),
                         "policy_s": sum(a.seconds for a in arms.values())},
               "made_by": sorted({f"{line['commit']}, {line['machine']}" for line in done.values()}),
               "provenance": origin}
    print("\n" + table(results["arms"]))
    if len(results["made_by"]) > 1:
        print(f"note         episodes of different code or machines: {'; '.join(results['made_by'])}")
    if args.compare:
        ours, other = ([done[key, t, s]["success"] for t in tasks for s in starts] for key in list(arms)[:2])
        results["comparison"] = {"other": args.compare, "other_hash": list(arms)[1]} | mcnemar(ours, other)
        print_comparison(args, results["comparison"])
    write_atomically(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    if args.env in LIBERO_STEPS and arm.policy:
        print("\nbeside the paper's Table I (success in %; theirs: 10 trials per task). To compare,\n"
              f"LIBERO's own demonstrations and meshes are needed (these: {bench.about['assets']}):\n\n"
              + paper_table(out, arm, settings))
    if steps:
        looks, policy = results["speed"]["looks"], results["speed"]["policy_s"]
        print(f"\nspeed        {steps / wall:.0f} steps/s in {args.workers} workers; policy "
              f"{1000 * policy / max(looks, 1):.1f} ms per look, {100 * policy / wall:.0f} % of the time")
    films = len([path for path in (out / "videos").glob("*.mp4") if not path.name.startswith("partial_")])
    if films < sum(bool(job.film) for job in jobs):
        print("note         episodes that stood in OUT were not filmed again: --overwrite plays all anew")
    print(f"\nwrote        {out}/results.json, episodes.jsonl" + (f", videos/ ({films})" if films else ""))


if __name__ == "__main__":
    run(main)

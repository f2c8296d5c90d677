"""Success rates (Sec. IV): a finetuned policy in simulation, and controls that play from the same starts.

    python evaluate.py                                         # runs/finetune/last.pt on the twin, 30 starts
    python evaluate.py --env libero_object                     # a LIBERO suite: 50 stored starts of each task
    python evaluate.py --env libero_10 --protocol paper        # 10 trials per task, as in the paper
    python evaluate.py --env libero_goal --tasks 0,3 --episodes 5 --first 10   # starts 10 to 14 of two tasks
    python evaluate.py --compare runs/scratch/last.pt          # two policies, same starts: McNemar's test
    python evaluate.py --checkpoint expert --tasks stack_cups  # the scripted expert: an upper bound
    python evaluate.py --resume --video 3                      # continue a stopped run, film 3 starts a task
    python evaluate.py --smoke                                 # two short episodes per task
    python evaluate.py --figure runs/*/eval_twin/episodes.jsonl  # many training runs: tables, study.png
    python evaluate.py --results runs/finetune/rollout_arm     # statistics of the real arm's episodes

With given settings, the outcome of an episode depends only on the checkpoint, the task, the start and --seed,
not on other episodes or on --workers: each worker process simulates, renders and runs its own copy of the
policy, one episode at a time. No training episode begins at any of these starts. A run writes to --out:

    episodes.jsonl   one line per finished episode; a stopped run loses only the episodes that were running
    results.json     successes per task, 95 % Wilson intervals, settings, versions, hash of the checkpoint
    videos/          TASK_START_success.mp4 or TASK_START_failure.mp4; .png: six moments of its first camera

The intervals cover new starts of one checkpoint. Training with another seed also changes the success rate,
so a claim about a method needs several training runs. Use the last checkpoint of each: choosing the best one
on these starts is biased.
"""
import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest, permutation_test, sem, t
from tqdm import tqdm

from models import (ActionChunker, HelpFormatter, InputError, append_line, at_least, check_free, check_same,
                    file_hash, load_policy, markdown_table, pick_device, provenance, read_json, read_lines,
                    run, shrink, write_json)
from prepare_data import (LIBERO, LIBERO_CAMERAS, LIBERO_HZ, close_simulator, import_libero, libero_image,
                          libero_instructions, libero_observation, libero_simulator, reset_simulator,
                          run_jobs, show_state)
from robot import ACTION, CAMERAS as TWIN_CAMERAS, CONTROL_HZ, EVAL_SEED0, MAX_STEP, MAX_TURN, PROPRIO_DIM
from robot import TASKS, Expert, TwinEnv, check_fit, make_chunker, policy_function, rollout, write_film

SMOKE = dict(episodes=2, max_steps=20, video=1, workers=1)


# ---- environments ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """An environment, its tasks and their starts. It is pickled for the worker processes.

    An environment has max_steps; reset(task, start) -> obs; step(action, look) -> obs (None unless look),
    done, success; render(camera, size) -> (H, W, 3) uint8 RGB.
    """
    make: Callable          # (cameras=, image_size=) -> environment; with cameras = () it renders nothing
    tasks: dict             # name -> wordings of the instruction, the usual one first
    cameras: tuple          # all cameras of the environment
    proprio_dim: int
    action: dict            # names, units and delta of an action, as datasets store them
    still: np.ndarray       # (7,) the action that does nothing
    low: np.ndarray         # (7,) limits of the random control's uniform actions
    high: np.ndarray
    starts: range           # starts of every task; training never uses them
    episodes: int           # per task, in --protocol full
    hz: int                 # control steps per second
    about: dict             # versions and settings; stored with every episode, compared by --resume


def twin_benchmark(args, trained):
    """The table-top twin of robot.py. trained: checkpoint["data"], {} for a control."""
    spread = (trained.get("extra") or {}).get("spread", 1.0) if args.spread is None else args.spread
    limit = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3)
    return Benchmark(
        make=functools.partial(TwinEnv, spread=spread), cameras=tuple(TWIN_CAMERAS), proprio_dim=PROPRIO_DIM,
        tasks={name: (task.instruction,) for name, task in TASKS.items()}, action=ACTION,
        still=np.array([0, 0, 0, 0, 0, 0, 1.0]), low=np.append(-limit, 0.0), high=np.append(limit, 1.0),
        starts=range(EVAL_SEED0, 2 ** 31), episodes=30, hz=CONTROL_HZ,
        about={"spread": spread, "mujoco": version("mujoco")})


# The protocol of most publications: all 50 stored initial states, these step limits (openvla, openpi).
# UPSTREAM: at most 300 steps in every suite, too few for libero_10; the LIBERO paper allows 600.
LIBERO_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
                "libero_90": 400}
LIBERO_SETTLE = 10                                              # steps, as in openvla; UPSTREAM: 5
LIBERO_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])               # -1: the gripper stays open


class LiberoEnv:
    """The LIBERO simulator. Start k of a task is its stored initial state k.

    obs: images {"agentview", "wrist"}, upright; proprio (8,): hand position (m), rotation vector (rad),
    finger positions (m). action (7,) in [-1, 1]; gripper +1 closes.
    """

    def __init__(self, suite, assets, seed, cameras, image_size):
        self.suite, self.assets, self.seed = suite, assets, seed
        self.cameras, self.image_size = tuple(cameras), image_size
        self.root = Path(import_libero(assets).__file__).parent
        self.max_steps = LIBERO_STEPS[suite]

    def reset(self, task, start):
        """Begins an episode from a stored state and waits until the objects have settled. -> obs"""
        self.begin(task, stored_states(self.root, self.suite, task)[start], [self.seed, start])
        for _ in range(LIBERO_SETTLE):
            self.sim.step(LIBERO_STILL)
        return self.observe()

    def begin(self, task, state, seed, place=None):
        """Begins an episode from a flattened state (S,). The state does not contain the furniture: the seed
        places it, or place(simulator) does."""
        bddl = self.root / "bddl_files" / self.suite / f"{task}.bddl"
        self.sim, self.steps = libero_simulator(str(bddl), self.assets), 0
        reset_simulator(self.sim, seed)
        if place:
            place(self.sim)
        show_state(self.sim, state)

    def step(self, action, look=True):
        """One control step of 1/20 s. -> obs (None unless look: rendering is slow), done, success"""
        _, _, success, _ = self.sim.step(np.asarray(action, np.float64))
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
    """LIBERO's initial states of a task -> (50, S)."""
    # Unpickling can run code. This file comes with a package whose code we run anyway. Load no other file so.
    return np.asarray(torch.load(root / "init_files" / suite / f"{task}.pruned_init", weights_only=False))


def libero_benchmark(suite, args, trained):
    """A suite of LIBERO. trained: not used, because no setting of a suite depends on the training data."""
    libero = import_libero(args.libero_assets)
    root, assets, tasks = Path(libero.__file__).parent, Path(libero.get_assets_path()), {}
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    for name in libero_task_map[suite]:
        bddl = (root / "bddl_files" / suite / f"{name}.bddl").read_text()
        language = re.search(r"\(:language ([^)]*)\)", bddl)[1].strip().lower()  # as LIBERO's own parser does
        info = {"problem_info": json.dumps({"language_instruction": language})}
        tasks[name] = libero_instructions(info, f"{name}.hdf5")
    # The names and sizes of all meshes and textures tell LIBERO's own from replacements.
    sizes = sorted((str(path.relative_to(assets)), path.stat().st_size)
                   for path in assets.rglob("*") if path.is_file())
    return Benchmark(
        make=functools.partial(LiberoEnv, suite, args.libero_assets, args.seed), tasks=tasks,
        cameras=tuple(LIBERO_CAMERAS), proprio_dim=8, action=LIBERO["action"], still=LIBERO_STILL,
        low=-np.ones(7), high=np.ones(7), starts=range(50), episodes=50, hz=LIBERO_HZ,
        about={"settle": LIBERO_SETTLE, **{p: version(p) for p in ("libero", "robosuite", "mujoco")},
               "assets": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]})


ENVIRONMENTS = {"twin": twin_benchmark,             # name -> (args, checkpoint["data"]) -> Benchmark
                **{suite: functools.partial(libero_benchmark, suite) for suite in LIBERO_STEPS}}


# ---- policies and controls -------------------------------------------------------------------------------


CONTROLS = ("noop", "random", "expert")


class Arm:
    """One arm of the comparison: a policy or a control.

    name: path of a finetuned checkpoint, or one of CONTROLS. key: its name in episodes.jsonl; of a checkpoint
    the hash of the file, because a path does not tell two training runs apart. label: its name in tables.
    """

    def __init__(self, name, device="cpu"):
        self.key = self.label = name
        self.policy, self.checkpoint = None, {"data": {}}
        if name not in CONTROLS:
            self.policy, self.checkpoint = load_policy(name, device, stage="finetune")
            self.key = file_hash(name)
        self.data = self.checkpoint["data"]


def control(name, bench, env, start, rng):
    """-> policy_fn(obs) -> (1, 7) of a control."""
    expert = functools.cache(lambda: Expert(env, start))        # created after the reset: it plans from there
    return {"noop": lambda obs: bench.still[None], "expert": lambda obs: expert().act()[None],
            "random": lambda obs: rng.uniform(bench.low, bench.high)[None]}[name]


# ---- playing episodes ------------------------------------------------------------------------------------


opened = {}     # key of an arm -> the Arm and its environment, in this process; main() empties it


def play(bench, args, labels, job):
    """Plays one episode. -> its line for episodes.jsonl

    job: key of an arm, task, start. labels: {key: label} of all arms; only the first arm is filmed.
    """
    began, (key, task, start) = time.perf_counter(), job
    if key not in opened:
        arm = Arm(labels[key], args.device)
        if arm.key != key:
            raise InputError(f"{arm.label} was replaced while it was being evaluated: evaluate a copy of the "
                             "checkpoint, or start again with --overwrite")
        cameras, size = (arm.policy.cameras, arm.policy.config["image_size"]) if arm.policy else ((), 64)
        opened[key] = arm, bench.make(cameras=tuple(cameras), image_size=size)
    (arm, env), wordings = opened[key], bench.tasks[task]
    # All random numbers of an episode follow from these, not from the episodes before it.
    rng = np.random.default_rng([args.seed, start, list(bench.tasks).index(task), 8 if arm.policy else 7])
    if arm.policy:
        known = [text for text in wordings if text in arm.data["instructions"]]
        policy_fn = policy_function(arm.policy, (known or wordings)[0], rng)
    else:
        policy_fn = control(key, bench, env, start, rng)
    filmed = key == next(iter(labels)) and start in bench.starts[args.first:args.first + args.video]
    frames = []                                     # larger than the policy sees them, cameras side by side

    def watch():
        if filmed:
            frames.append(np.concatenate([env.render(camera, 256) for camera in bench.cameras], axis=1))

    chunker = ActionChunker(1, execute=1)                       # a control acts at every step
    if arm.policy:
        chunker = make_chunker(arm.policy, args.execute, args.decay)
    success, actions = rollout(env, policy_fn, chunker, task, start, args.max_steps, watch)
    if filmed:
        film = Path(args.out, "videos", f"{task}_{start}_{'success' if success else 'failure'}.mp4")
        write_film(film, frames, bench.hz)
        six = np.linspace(0, len(frames) - 1, 6).astype(int)
        six = [shrink(frames[i][:, :256], 128, "squash") for i in six]
        cv2.imwrite(str(film.with_suffix(".png")), np.concatenate(six, axis=1)[..., ::-1])
    return {"arm": key, "label": arm.label, "task": task, "start": start, "success": success,
            "steps": len(actions), "seconds": round(time.perf_counter() - began, 3),
            # Two episodes with the same hash had the same actions to the last bit.
            "actions": hashlib.sha256(actions.tobytes()).hexdigest()[:8]}


# ---- results ---------------------------------------------------------------------------------------------


def read_episodes(folder):
    """folder/episodes.jsonl -> {(arm, task, start): line}."""
    return {(x["arm"], x["task"], x["start"]): x for x in read_lines(folder / "episodes.jsonl")}


def open_results(out, args, settings, keys):
    """-> read_episodes(out). InputError if the episodes are of another run."""
    path = out / "episodes.jsonl"
    check_free(out, path.exists() or (out / "results.json").exists(), args)
    if args.overwrite:
        for old in [path, out / "results.json", *(out / "videos").glob("*.mp4"),
                    *(out / "videos").glob("*.png")]:
            old.unlink(missing_ok=True)
    done = read_episodes(out)
    for (key, task, start), line in done.items():
        check_same(f"{path} ({task}, start {start})", line["settings"], settings)
        if key not in (*keys, *CONTROLS):
            raise InputError(f"{path} has episodes of checkpoint {key}, this run is of {', '.join(keys)}: "
                             "--resume needs the same checkpoints, --overwrite starts again")
    out.mkdir(parents=True, exist_ok=True)
    return done


def success_rate(outcomes):
    """[bool] -> {"successes", "n", "rate", "wilson": 95 % interval}."""
    k, n = sum(outcomes), len(outcomes)
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return {"successes": k, "n": n, "rate": k / n, "wilson": [float(interval.low), float(interval.high)]}


def percent(r, digits=0):
    """A success_rate -> ("73/90", "81", "[72, 88]")."""
    rate, low, high = (f"{100 * x:.{digits}f}" for x in (r["rate"], *r["wilson"]))
    return f"{r['successes']}/{r['n']}", rate, f"[{low}, {high}]"


def mcnemar(first, second):
    """McNemar's exact test of two arms on the starts that both played. Only pairs that differ count.

    first, second: {(task, start): success}. -> dict: pairs, unpaired episodes, pairs that only one arm won,
    difference of the success rates, two-sided p
    """
    pairs = [(first[start], second[start]) for start in first if start in second]
    n, better, worse = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    return {"n": n, "unpaired": len(first) + len(second) - 2 * n, "only_first": better, "only_second": worse,
            "difference": (better - worse) / max(n, 1),
            "p_value": float(binomtest(better, better + worse).pvalue) if better + worse else 1.0}


def report(out, lines, pair, about):
    """Prints the success rates and writes them to out/results.json.

    lines: of episodes.jsonl. pair: keys of two arms to compare, or (). about: more entries of results.json.
    """
    rows, arms = [("policy", "task", "success", "rate (%)", "Wilson 95 %")], {}
    for key in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == key]
        rates = {task: success_rate([line["success"] for line in own if line["task"] == task])
                 for task in dict.fromkeys(line["task"] for line in own)}
        overall = success_rate([line["success"] for line in own])
        arms[key] = {"label": own[0]["label"], "tasks": rates, "overall": overall}
        rows += [(own[0]["label"], task, *percent(rate, int(rate["n"] > 100)))
                 for task, rate in (rates | {"all": overall}).items()]
    print("\n" + markdown_table(rows))
    made_by = sorted({f"{line['commit']}, {line['machine']}" for line in lines})
    if len(made_by) > 1:
        print(f"note         the episodes come from different code or machines: {made_by}")
    results = {**about, "arms": arms, "made_by": made_by, "comparison": None}
    if pair:
        first, second = ({(x["task"], x["start"]): x["success"] for x in lines if x["arm"] == key}
                         for key in pair)
        results["comparison"] = c = {"arms": list(pair), **mcnemar(first, second)}
        print("\n{} minus {}: ".format(*(arms[key]["label"] for key in pair))
              + f"{100 * c['difference']:+.0f} points on {c['n']} paired starts "
              f"({c['unpaired']} episodes have no partner)\n"
              f"only the first succeeded {c['only_first']} times, only the second {c['only_second']} times; "
              f"McNemar's exact p = {c['p_value']:.2g}")
    write_json(out / "results.json", results)
    print(f"\nwrote        {out}/results.json")


def report_folder(folder):
    """--results: statistics of the episodes.jsonl that this script or `robot.py rollout` wrote."""
    path = folder / "results.json"      # of a complete run: its settings and its comparison are kept
    about = read_json(path) if path.exists() else {}
    # Workers finish in any order, so another arm's line may come first: begin with the arm of --checkpoint.
    lines = sorted(read_episodes(folder).values(), key=lambda line: line["arm"] != about.get("hash"))
    if not lines:
        raise InputError(f"{folder}/episodes.jsonl has no finished episode: give a folder that evaluate.py "
                         "or `robot.py rollout` wrote")
    policies = list(dict.fromkeys(line["arm"] for line in lines if line["arm"] not in CONTROLS))
    pair = (about.get("comparison") or {"arms": policies})["arms"]
    report(folder, lines, pair if len(pair) == 2 else (), about)
    print(f"aborted      {sum(bool(line.get('aborted')) for line in lines)} episodes; they count as failures")


# Success in per cent as published (Tharwat et al. 2025, Table I and Sec. IV): one training seed, 10 trials
# per task, LIBERO's own demonstrations. None: the number was not available to us.
PAPER = (("paper: BAKU from scratch", 94, 100, 96, 92, 91.4),
         ("paper: BAKU, supervised pretraining", None, None, None, None, 93.3),
         ("paper: LAWM, BAKU", 99, None, None, 94, 94.2),
         ("paper: Diffusion Policy from scratch", None, None, None, None, 90.5),
         ("paper: LAWM, Diffusion Policy", None, None, None, None, 93.7))


def paper_table(out, arm, settings):
    """The paper's Table I with a row for our policy: this suite, and other suites that the same checkpoint
    played with the same settings, from the folders beside `out`. Incomplete suites are marked."""
    ours = [arm.label]
    for suite in LIBERO_STEPS:
        path = (out if suite == settings["env"] else out.parent / f"eval_{suite}") / "results.json"
        results = read_json(path) if path.exists() else {}
        rates = results.get("arms", {}).get(arm.key)
        cell = "not run"            # or with another checkpoint, other settings, or shortened episodes
        if rates and results["settings"] == settings | {"env": suite} and settings["max_steps"] is None:
            done, there = results["tasks"]
            count, rate, interval = percent(rates["overall"], 1)
            cell = f"{rate} {interval}, {count}" + f" ({done} of {there} tasks)" * (done < there)
        ours.append(cell)
    theirs = [(name, *("–" if x is None else f"{x:g}" for x in rates)) for name, *rates in PAPER]
    return markdown_table([("", "Spatial", "Object", "Goal", "Long", "90"), *theirs, ours])


# ---- several training runs -------------------------------------------------------------------------------


def read_runs(files):
    """--figure: -> one dict per training run: policy, arm, demos, block, commit, episodes {task: [[start,
    success, steps], ...]}. A file is a study.jsonl, or the episodes.jsonl of a run whose folder is named
    POLICY_ARM_DEMOS_BLOCK."""
    runs = []
    for file in files:
        lines = [line for line in read_lines(file) if line["arm"] not in CONTROLS]
        if lines and "block" not in lines[0]:
            name = file.absolute().parts[-3]
            if not re.fullmatch("[^_]+_[^_]+_[0-9]+_[0-9]+", name) or len({x["arm"] for x in lines}) > 1:
                raise InputError(f"{file}: expected one policy in a run folder named POLICY_ARM_DEMOS_BLOCK, "
                                 f"for example baku_scratch_3_100; the folder is {name}")
            policy, arm, demos, block = name.split("_")
            episodes, played = {}, {(x["task"], x["start"]): x for x in lines}
            for (task, start), x in sorted(played.items()):
                episodes.setdefault(task, []).append([start, int(x["success"]), x["steps"]])
            lines = [{"policy": policy, "arm": arm, "demos": int(demos), "block": int(block),
                      "commit": lines[0]["commit"], "episodes": episodes}]
        if not lines:
            raise InputError(f"{file} has no finished episode of a policy")
        runs += lines
    return sorted(runs, key=lambda x: (x["policy"], x["demos"], x["arm"] != "scratch", x["arm"], x["block"]))


def block_rates(runs):
    """read_runs -> {(policy, demos): {arm: {block: success in %}}}. InputError if two arms of a block did not
    play the same starts: their difference would not be due to the arms alone."""
    rates, starts = {}, {}
    for run in runs:
        policy, demos, arm, block = (run[k] for k in ("policy", "demos", "arm", "block"))
        played = [(task, start) for task, rows in run["episodes"].items() for start, _, _ in rows]
        if played != starts.setdefault((policy, demos, block), played):
            raise InputError(f"{policy}, {demos} demonstrations, block {block}: the arm {arm} played other "
                             "starts than the arm before it; all arms of a block need the same starts")
        blocks = rates.setdefault((policy, demos), {}).setdefault(arm, {})
        if block in blocks:
            raise InputError(f"{policy}, {demos} demonstrations: the arm {arm} has block {block} twice")
        outcomes = [success for rows in run["episodes"].values() for _, success, _ in rows]
        blocks[block] = 100 * np.mean(outcomes)
    return rates


def over_blocks(values):
    """One value per independent block -> mean, (low, high) of its 95 % t interval, p of mean 0.

    p is two-sided, of the exact sign-flip test: it counts all 2**n signs, so it is at least 2 / 2**n.
    """
    if len(values) < 2:
        return np.mean(values), (np.nan, np.nan), np.nan
    low, high = np.mean(values) + t.ppf([0.025, 0.975], len(values) - 1) * sem(values)
    test = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return np.mean(values), (low, high), test.pvalue


def holm(p_values):
    """p values of one family of tests -> the adjusted ones, in the same order (Holm 1979)."""
    p, order = np.asarray(p_values), np.argsort(p_values)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def contrasts(rates):
    """block_rates -> [(policy, demos, arm, differences from scratch in points, *over_blocks, p after Holm)].

    One difference per block that both have. A family of tests: one arm at one number of demonstrations, all
    policies.
    """
    families = {}
    for (policy, demos), arms in rates.items():
        for arm, blocks in arms.items():
            pairs = [(blocks[b], arms["scratch"][b]) for b in blocks if b in arms.get("scratch", {})]
            if arm != "scratch" and pairs:
                differences = [own - other for own, other in pairs]
                families.setdefault((demos, arm), []).append(
                    (policy, demos, arm, differences, *over_blocks(differences)))
    return [(*row, p) for family in families.values()
            for row, p in zip(family, holm([row[-1] for row in family]))]


COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
           "#000000")                                                           # safe for the colour-blind


def draw_success(rates):
    """block_rates -> Figure. Left: the policies side by side, at the number of demonstrations that most have.
    Then success over the number of demonstrations, for each policy that has several."""
    names = list(dict.fromkeys(arm for arms in rates.values() for arm in arms))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    common = statistics.mode(demos for _, demos in rates)
    policies = [policy for policy, demos in rates if demos == common]
    curves = [policy for policy in policies if sum(policy == other for other, _ in rates) > 1]
    figure = Figure(figsize=(5 + 4 * len(curves), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(curves), sharey=True, squeeze=False)[0]

    def draw(ax, x, arm, blocks):
        mean, (low, high), _ = over_blocks(list(blocks.values()))
        ax.plot([x] * len(blocks), list(blocks.values()), "_", ms=16, color=colours[arm])
        ax.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", color=colours[arm])
        return mean

    def place(arm):                                             # -0.5 to 0.5: the arms stand side by side
        return (names.index(arm) + 0.5) / len(names) - 0.5

    for i, policy in enumerate(policies):
        for arm, blocks in rates[policy, common].items():
            draw(axes[0], i + 0.8 * place(arm), arm, blocks)
    axes[0].set(xticks=range(len(policies)), xticklabels=policies, ylabel="success (%)", ylim=(0, 100),
                xlabel=f"{common} demonstrations per task")
    for ax, policy in zip(axes[1:], curves):
        for arm in names:
            points = {demos * 1.2 ** place(arm): arms[arm] for (other, demos), arms in rates.items()
                      if other == policy and arm in arms}
            shared = set.intersection(*map(set, points.values())) if points else ()      # the same blocks
            means = [draw(ax, x, arm, {b: rate for b, rate in blocks.items() if b in shared or not shared})
                     for x, blocks in points.items()]
            ax.plot(list(points), means, color=colours[arm])
        ax.set(xscale="log", xlabel=f"{policy}: demonstrations per task")
        ax.minorticks_off()
        ticks = [demos for other, demos in rates if other == policy]
        ax.set_xticks(ticks, ticks)
    handles = [axes[0].plot([], [], "o", color=colours[arm], label=arm)[0] for arm in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False,
                  title="dashes: blocks; circles: their mean with its 95 % interval")
    return figure


def compare_runs(args):
    """--figure: success of all arms over blocks: tables on the screen, study.jsonl and study.png.

    A block is one subset of demonstrations, one seed of each stage, and starts of its own.
    """
    out = Path(args.out or ".")
    check_free(out, any((out / name).exists() for name in ("study.jsonl", "study.png")), args)
    runs = read_runs(args.figure)
    rates = block_rates(runs)

    def cells(values, mean, interval, sign):
        return (" ".join(f"{x:{sign}.0f}" for x in values), f"{mean:{sign}.1f}",
                f"[{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]")

    rows = [("policy", "demonstrations", "arm", "success per block (%)", "mean", "95 % interval")]
    for (policy, demos), arms in rates.items():
        for arm, blocks in arms.items():
            values = list(blocks.values())
            rows.append((policy, str(demos), arm, *cells(values, *over_blocks(values)[:2], "")))
    print(markdown_table(rows) + "\n")
    rows = [("policy", "demonstrations", "arm minus scratch", "points per block", "mean", "95 % interval",
             "p", "p (Holm)")]
    for policy, demos, arm, differences, mean, interval, p, adjusted in contrasts(rates):
        rows.append((policy, str(demos), arm, *cells(differences, mean, interval, "+"), f"{p:.3f}",
                     f"{adjusted:.3f}"))
    print(markdown_table(rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    draw_success(rates).savefig(out / "study.png", dpi=130)
    print(f"\nwrote        {out}/study.jsonl, {out}/study.png")


# ---- the run ---------------------------------------------------------------------------------------------


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    g = p.add_argument_group("what")
    g.add_argument("--env", choices=ENVIRONMENTS, default="twin")
    g.add_argument("--checkpoint", default="runs/finetune/last.pt", metavar="PATH|noop|random|expert",
                   help="finetuned policy, or a control")
    g.add_argument("--compare", metavar="PATH", help="second checkpoint or control, on the same starts")
    g.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                   help="also play the do-nothing and the random policy from the same starts")
    g = p.add_argument_group("starts")
    g.add_argument("--protocol", choices=("full", "paper"), default="full",
                   help="episodes per task: full 50 on LIBERO and 30 on the twin, paper 10")
    g.add_argument("--tasks", help="comma-separated names, or numbers from 0 (default: the tasks whose "
                   "instruction the policy was trained on)")
    g.add_argument("--episodes", type=int, help="per task (default: the protocol's number)")
    g.add_argument("--first", type=int, default=0, metavar="K", help="number of the first start")
    g.add_argument("--seed", type=int, default=0, help="of all other random choices: LIBERO's furniture, the "
                   "random control, the noise of Diffusion Policy")
    g.add_argument("--max-steps", type=int, help="per episode (default and upper limit: the task's own)")
    g.add_argument("--spread", type=float, help="twin: width of the start regions, 1 = full, 0 = fixed "
                   "(default: as in the training data)")
    g.add_argument("--libero-assets", metavar="FOLDER", help="LIBERO's meshes and textures (default: "
                   "$LIBERO_ASSETS, then the package's own folder, then libero's download)")
    g = p.add_argument_group("chunk execution")
    g.add_argument("--execute", type=int, metavar="H", help="actions of a chunk per observation; 0: "
                   "temporal ensembling, as in the paper (default: diffusion 8, others 0)")
    g.add_argument("--decay", type=float, default=0.01, help="temporal ensembling: weight exp(-decay i), "
                   "i = 0 for the oldest chunk; release: 0, a plain mean")
    g = p.add_argument_group("run")
    g.add_argument("--workers", type=int, default=min(cores, 16), help="processes with a simulator and a "
                   "policy each; 1: this process alone; results do not depend on it")
    g.add_argument("--device", default="cpu", help="of the policies; where a driver aborts because EGL and "
                   "CUDA share a process, set MUJOCO_GL=osmesa")
    g.add_argument("--video", type=int, default=0, metavar="N", help="film the first N episodes of each task")
    g.add_argument("--out", help="results folder (default: eval_<env> beside the checkpoint)")
    g.add_argument("--resume", action="store_true", help="keep the finished episodes in OUT, play the others")
    g.add_argument("--overwrite", action="store_true", help="delete the results in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; explicit flags still win")
    g = p.add_argument_group("instead of a run")
    g.add_argument("--figure", nargs="+", type=Path, metavar="FILE", help="compare several training runs: "
                   "episodes.jsonl in run folders named POLICY_ARM_DEMOS_BLOCK, or a study.jsonl; writes "
                   "study.jsonl and study.png to --out or here")
    g.add_argument("--results", type=Path, metavar="FOLDER", help="statistics of the episodes.jsonl in this "
                   "folder; two policies are compared")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    return p.parse_args(argv)


def choose_tasks(args, bench, arm):
    """-> names: --tasks, or the tasks whose instruction the policy was trained on (a control: all)."""
    names, known = list(bench.tasks), arm.data.get("instructions", [])
    if args.tasks:
        tasks = [names[int(task)] if task.isdigit() and int(task) < len(names) else task
                 for task in args.tasks.split(",")]
    else:
        tasks = [name for name in names if not arm.policy or set(bench.tasks[name]) & set(known)]
    if not tasks or not set(tasks) <= set(names):
        raise InputError(f"--tasks takes {', '.join(names)}, or their numbers from 0, comma-separated; got "
                         + (args.tasks or f"none, and {arm.label} was trained on other instructions (the "
                            f"first: {known[:1]})"))
    return list(dict.fromkeys(tasks))


def check_policy(arm, args, bench, tasks):
    """Prints which policy acts and how. InputError if it does not fit the environment."""
    action, units = bench.action, arm.data["action"]["units"]
    if set(units) == {"as in the source"}:          # a LeRobotDataset does not record them
        action = action | {"units": units}
        print(f"note         the units of {arm.label}'s actions are unknown; assumed: those of {args.env}")
    check_fit(arm.label, arm.checkpoint, args.env, bench.cameras, bench.proprio_dim, action, bench.hz)
    execute = make_chunker(arm.policy, args.execute).execute
    step, steps = arm.checkpoint["step"], arm.checkpoint["args"]["steps"]
    print(f"policy       {arm.label} ({arm.key}, step {step:,} of {steps:,}), cameras "
          f"{', '.join(arm.policy.cameras)}; chunks of {arm.policy.chunk}, "
          + (f"{execute} per look" if execute else f"temporal ensembling, decay {args.decay:g}"))
    for task in tasks:
        if not set(bench.tasks[task]) & set(arm.data["instructions"]):
            print(f"note         {arm.label} was not trained on the instruction of {task}")


def main(argv=None):
    args = arguments(argv)
    if args.results:
        return report_folder(args.results)
    if args.figure:
        return compare_runs(args)
    at_least(args, 0, "first", "seed", "video", "decay", "execute")
    at_least(args, 1, "episodes", "max_steps", "workers")
    pick_device(args.device)
    torch.set_num_threads(1)
    origin = provenance()

    # ---- arms, starts, settings ----
    names = [name for name in (args.checkpoint, args.compare) if name is not None]
    names += [name for name in ("noop", "random") if args.controls and name not in names]
    arms = {arm.key: arm for arm in map(Arm, names)}
    if len(arms) < len(names):
        raise InputError(f"--compare is the same as --checkpoint {args.checkpoint}: name another checkpoint")
    if "expert" in arms and args.env != "twin":
        raise InputError(f"{args.env} has no scripted expert; only the twin has one (--env twin)")
    arm = next(iter(arms.values()))
    bench = ENVIRONMENTS[args.env](args, arm.data)
    tasks = choose_tasks(args, bench, arm)
    episodes = args.episodes or (bench.episodes if args.protocol == "full" else 10)
    starts = bench.starts[args.first:args.first + episodes]
    if len(starts) < (args.episodes or 1):
        raise InputError(f"{args.env} has {len(bench.starts)} starts per task: --first {args.first} and "
                         f"--episodes {episodes} ask for more")
    for one in arms.values():
        if one.policy:
            check_policy(one, args, bench, tasks)
    settings = {"env": args.env, **{k: getattr(args, k) for k in (
        "execute", "decay", "max_steps", "seed", "device")}, **bench.about,
        "gl": os.environ.get("MUJOCO_GL"), "torch": str(torch.__version__)}
    args.out = args.out or str((Path(args.checkpoint).parent if arm.policy else Path("runs", arm.key))
                               / f"eval_{args.env}")
    out = Path(args.out)
    done = open_results(out, args, settings, list(arms))

    # ---- episodes ----
    print(f"environment  {args.env}: " + ", ".join(f"{k} {v}" for k, v in bench.about.items())
          + f", seed {args.seed}, {settings['gl']}\nstarts       {len(tasks)} of {len(bench.tasks)} tasks x "
          f"{len(starts)}, numbers {starts[0]:,} to {starts[-1]:,}, {args.workers} workers")
    jobs = [(key, task, start) for task in tasks for key in arms for start in starts]   # one scene at a time
    left = [job for job in jobs if job not in done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="episode", dynamic_ncols=True) as bar:
        labels = {key: one.label for key, one in arms.items()}
        opened.clear()
        run_one = functools.partial(play, bench, args, labels)
        for line in run_jobs(left, args.workers, run_one, in_order=False):
            line |= {"settings": settings, "commit": origin["commit"], "machine": origin["machine"]}
            append_line(out / "episodes.jsonl", line)
            done[line["arm"], line["task"], line["start"]] = line
            bar.set_postfix_str(f"{line['task'][:40]} {'success' if line['success'] else 'failure'}")
            bar.update()

    # ---- results ----
    report(out, [done[job] for job in jobs], list(arms)[:2] if args.compare else (), {
        "hash": arm.key, "step": arm.checkpoint.get("step"),
        "policy": arm.policy.config["policy"] if arm.policy else "control",
        "settings": settings, "tasks": [len(tasks), len(bench.tasks)], "starts": [starts[0], starts[-1]],
        "provenance": origin})
    if args.env in LIBERO_STEPS and arm.policy:
        print("\nThe paper's Table I (success in %; theirs: 10 trials per task) and this policy. To compare\n"
              f"them, use LIBERO's own demonstrations and meshes (these: {bench.about['assets']}):\n\n"
              + paper_table(out, arm, settings))


if __name__ == "__main__":
    run(main)

"""Success rates (Sec. IV): a finetuned policy on the table-top twin, beside controls from the same starts.

    python evaluate.py                                         # runs/finetune/last.pt, 30 episodes per task
    python evaluate.py --compare runs/scratch/last.pt          # from the same starts, McNemar's exact test
    python evaluate.py --checkpoint expert --tasks stack_cups  # the scripted expert: what can be reached
    python evaluate.py --resume                                # go on where a stopped run stood, same result
    python evaluate.py --video 3                               # mp4 of the first 3 episodes of every task
    python evaluate.py --smoke                                 # two short episodes per task

Every episode starts from a seed that no training episode has. Success of the same (policy, task, seed) is the
same in any order and in any process, so two policies meet on equal terms. Writes, under --out:

    episodes.jsonl   one line per finished episode, at once: a stopped run loses at most the episode it was in
    results.json     successes per task, Wilson and Clopper-Pearson intervals, settings, versions, file hash
    videos/          task_seed_success.mp4 or task_seed_failure.mp4

What the numbers cannot say: the intervals hold for new starts of *this* checkpoint. Training it again with
another --seed moves its success too; a claim about a method needs several checkpoints. Take the last
checkpoint, not the best of many on these starts.

Measured on one CPU core with the tiny policy (64 pixels, two cameras): 8 ms per look, 10 ms per step of the
twin with both cameras, 2 ms without. The default run, 90 episodes and 180 of the controls: 2.7 min, 1 GB.
"""
import argparse
import bisect
import json
import os
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import cv2
import numpy as np
import torch
from scipy.stats import binom, binomtest
from tqdm import tqdm

from models import (ActionChunker, InputError, TextEncoder, file_hash, load_policy, pick_device, provenance,
                    run, write_atomically)
from robot import CONTROL_HZ, EVAL_SEED0, MAX_STEP, MAX_TURN, TASKS, Expert, TwinEnv

SMOKE = dict(episodes=2, max_steps=20, video=1)


# ---- environments ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """What is asked of an environment, besides reset(task, seed), step(action), max_steps and close()."""
    make: Callable          # (cameras, image_size, spread) -> environment; cameras = () renders nothing
    tasks: dict             # name -> Task with .instruction and .max_steps
    cameras: tuple          # those that a film shows
    expert: Callable        # (environment after reset, seed) -> object with .act() -> (7,)
    still: np.ndarray       # (7,) the action that does nothing
    low: np.ndarray         # (7,) limits between which the random control draws
    high: np.ndarray
    first_seed: int         # evaluation starts are seeds from here on, training never uses them
    hz: int
    version: str


LIMIT = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3)
ENVIRONMENTS = {"twin": Benchmark(
    make=lambda cameras, image_size, spread: TwinEnv(image_size=image_size, cameras=cameras, spread=spread),
    tasks=TASKS, cameras=("front", "side"), expert=Expert, still=np.array([0, 0, 0, 0, 0, 0, 1.0]),
    low=np.append(-LIMIT, 0.0), high=np.append(LIMIT, 1.0), first_seed=EVAL_SEED0, hz=CONTROL_HZ,
    version=f"mujoco {version('mujoco')}")}


# ---- arms: what is evaluated -----------------------------------------------------------------------------


@dataclass
class Arm:
    """A policy or a control. policy_for(env, task, seed) -> policy_fn(obs) -> chunk (n, 7), per episode."""
    key: str                        # in the files: hash of the checkpoint, or name of the control
    label: str                      # on the screen
    policy_for: Callable
    chunk: int = 1
    cameras: tuple = ()
    image_size: int = 64
    checkpoint: dict | None = None


def make_control(name, bench):
    """noop does nothing, random draws uniform actions from (seed, task) alone, expert is the scripted one."""
    def noop(env, task, seed):
        return lambda obs: bench.still[None]

    def uniform(env, task, seed):
        rng = np.random.default_rng([seed, list(bench.tasks).index(task), 7])
        return lambda obs: rng.uniform(bench.low, bench.high)[None]

    def expert(env, task, seed):
        script = None

        def policy_fn(obs):
            nonlocal script
            script = script or bench.expert(env, seed)  # at the first look: it plans from the start it finds
            return script.act()[None]

        return policy_fn

    return Arm(name, name, {"noop": noop, "random": uniform, "expert": expert}[name])


def to_batch(obs, instruction, policy, device):
    """One observation of an environment -> a batch of one, with only what the policy was made for.

    obs {"images": {camera: (H, W, 3) uint8}, "proprio": (P,)}, instruction (L,) embedding.
    ASSUMPTION: frames go in as rendered; training frames went through JPEG (quality 95).
    """
    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x))[None].to(device)

    images = {c: tensor(x).permute(0, 3, 1, 2) for c, x in obs["images"].items() if c in policy.cameras}
    batch = {"images": images, "instruction": tensor(instruction)}                    # (1, 3, H, W), (1, L)
    if policy.config["proprio_dim"]:
        batch["proprio"] = tensor(np.asarray(obs["proprio"], np.float32))             # (1, P)
    return batch


def make_arm(what, bench, device):
    """what: path of a finetuned checkpoint, or noop, random, expert."""
    if what in ("noop", "random", "expert"):
        return make_control(what, bench)
    policy, checkpoint = load_policy(what, device)
    if policy.config["head"] == "latent":
        raise InputError(f"{what} is pretrained: it emits latent actions; finetune it first: "
                         f"python finetune.py --init {what}")
    if policy.config["action_dim"] != len(bench.still):
        raise InputError(f"{what} emits {policy.config['action_dim']} numbers per action, "
                         f"the environment takes {len(bench.still)}: give a checkpoint that was finetuned on "
                         "this robot's data")
    embed = TextEncoder(checkpoint["text_encoder"])

    def policy_for(env, task, seed):
        instruction = embed([bench.tasks[task].instruction])[0]                       # (L,)
        return lambda obs: policy.act(to_batch(obs, instruction, policy, device))[0].cpu().numpy()   # (n, 7)

    return Arm(file_hash(what), str(what), policy_for, policy.chunk, tuple(policy.cameras),
               policy.config["image_size"], checkpoint)


# ---- one episode -----------------------------------------------------------------------------------------


def rollout(env, policy_fn, chunker, task, seed, max_steps=None, on_action=None):
    """One episode: obs -> chunk -> action -> step, in every environment and on the real arm -> success, steps

    policy_fn(obs) -> (n, 7) is asked only when the chunker needs a new chunk, always with the newest o_t.
    """
    chunker.reset()
    obs = env.reset(task, seed)
    for step in range(1, (max_steps or env.max_steps) + 1):
        action = chunker.step(lambda: policy_fn(obs))                                 # (7,)
        obs, done, success = env.step(action)
        if on_action:
            on_action(action)
        if done:
            break
    return bool(success), step


class Film:
    """Films an episode larger than the policy sees it: a second environment, same start, same actions."""

    def __init__(self, bench, spread, seeds, size=256):
        self.bench, self.seeds, self.env = bench, seeds, bench.make(bench.cameras, size, spread)

    def start(self, task, seed):
        self.frames, self.success = [], False
        self.add(self.env.reset(task, seed))

    def add(self, obs):
        self.frames.append(np.concatenate(
            [obs["images"][c] for c in self.bench.cameras], 1))                       # (H, cameras * W, 3)

    def __call__(self, action):
        obs, _, self.success = self.env.step(action)
        self.add(obs)

    def write(self, folder, task, seed, instruction, success):
        """folder/task_seed_success.mp4, or ..._failure.mp4, with instruction and outcome on every frame."""
        assert self.success == success, f"{task} {seed}: the filmed repetition ended differently"
        outcome = "success" if success else "failure"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{task}_{seed}_{outcome}.mp4"
        partial = folder / f"partial_{path.name}"
        height, width = self.frames[0].shape[:2]
        lines = textwrap.wrap(f"{instruction} [{outcome}]", width // 8)
        strip = np.full((16 * len(lines) + 8, width, 3), 255, np.uint8)
        for i, line in enumerate(lines):
            cv2.putText(strip, line, (6, 16 * (i + 1)), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1,
                        cv2.LINE_AA)
        codec, size = cv2.VideoWriter_fourcc(*"mp4v"), (width, height + len(strip))
        video = cv2.VideoWriter(str(partial), codec, self.bench.hz, size)
        if not video.isOpened():
            raise InputError(f"OpenCV cannot write {partial}: leave out --video, or choose another --out")
        for frame in self.frames + self.frames[-1:] * (self.bench.hz // 2):           # the end stays 0.5 s
            video.write(np.concatenate([strip, frame[..., ::-1]]))
        video.release()
        os.replace(partial, path)


# ---- finished episodes on disk ---------------------------------------------------------------------------


def open_results(out, args, settings, keys):
    """-> {(arm, task, seed): line} of the episodes in out/episodes.jsonl, which need not be run again."""
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
            key, made_with = (line["arm"], line["task"], line["seed"]), line["settings"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} line {number} is no episode: --overwrite, or another --out") from e
        for name, value in settings.items():
            if made_with.get(name) != value:
                raise InputError(f"{path} line {number} was made with {name} {made_with.get(name)}, "
                                 f"now it is {value}: give the same flags to --resume, or --overwrite, "
                                 "or another --out")
        if line["arm"] not in (*keys, "noop", "random", "expert"):
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


def summarise(arm, tasks, seeds, done):
    """Per task and overall: counts, intervals, mean steps of the successes, outcome of every episode."""
    summary = {"label": arm.label, "tasks": {}}
    for task in tasks:
        lines = [done[arm.key, task, seed] for seed in seeds]
        steps = [line["steps"] for line in lines if line["success"]]
        summary["tasks"][task] = rate_with_intervals(len(steps), len(lines)) | {
            "mean_steps_of_successes": float(np.mean(steps)) if steps else None,
            "episodes": [{k: line[k] for k in ("seed", "success", "steps")} for line in lines]}
    successes = sum(t["successes"] for t in summary["tasks"].values())
    summary["overall"] = rate_with_intervals(successes, len(tasks) * len(seeds))
    summary["seconds_per_episode"] = float(np.mean([done[arm.key, t, s]["seconds"]
                                                    for t in tasks for s in seeds]))
    return summary


def table(arms):
    """Markdown table of all arms; whole per cent, since a single episode is worth more than that."""
    rows = [("policy", "task", "success", "rate", "Wilson 95 %", "steps when successful")]
    for arm in arms.values():
        for task, r in [*arm["tasks"].items(), ("all", arm["overall"])]:
            low, high = r["wilson"]
            steps = r.get("mean_steps_of_successes")
            rows.append((arm["label"], task, f"{r['successes']}/{r['n']}", f"{100 * r['rate']:.0f} %",
                         f"[{100 * low:.0f}, {100 * high:.0f}]", f"{steps:.0f}" if steps else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * w for w in widths))
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)


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
    g = p.add_argument_group("what")
    g.add_argument("--env", choices=ENVIRONMENTS, default="twin", help="default %(default)s")
    g.add_argument("--checkpoint", default="runs/finetune/last.pt", metavar="PATH|noop|random|expert",
                   help="finetuned policy, or a control (default %(default)s)")
    g.add_argument("--compare", metavar="PATH", help="second checkpoint (or control) on the same starts")
    g.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                   help="also run the do-nothing and the random policy from the same starts (default on)")
    g = p.add_argument_group("starts")
    g.add_argument("--tasks",
                   help="comma-separated (default: those whose instruction the policy was trained on)")
    g.add_argument("--episodes", type=int, default=30,
                   help="per task; paper 10 on each LIBERO task (default %(default)s)")
    g.add_argument("--spread", type=float,
                   help="width of the start regions, 1 = full, 0 = fixed (default: the training data's)")
    g.add_argument("--seed", type=int, default=0,
                   help="offset of the start seeds, 0 or more (default %(default)s)")
    g.add_argument("--max-steps", type=int,
                   help="control steps per episode (default: the task's own, which is also the most)")
    g = p.add_argument_group("chunk execution")
    g.add_argument("--execute", type=int, metavar="H", help="execute H actions of a chunk, then look again "
                   "(default: look at every step and average the live chunks, temporal ensembling)")
    g.add_argument("--decay", type=float, default=0.01, help="temporal ensembling: weight exp(-decay i), "
                   "i = 0 for the oldest chunk; release 0, a plain mean (default %(default)s)")
    g = p.add_argument_group("run")
    g.add_argument("--video", type=int, default=0, metavar="N",
                   help="film the first N episodes of each task (default %(default)s)")
    g.add_argument("--out", help="results folder (default: eval_<env> beside the checkpoint)")
    g.add_argument("--resume", action="store_true",
                   help="keep the episodes that stand in OUT, run the others")
    g.add_argument("--overwrite", action="store_true", help="throw away the results that stand in OUT")
    g.add_argument("--smoke", action="store_true", help=f"tiny preset {SMOKE}; other flags still win")
    # CUDA and EGL in one process abort on some drivers, a batch of one gains little from a GPU: hence CPU.
    g.add_argument("--device", default="cpu", help="of the policy (default %(default)s)")
    # A batch of one keeps one core busy; two threads on two busy cores took 260 ms a look, not 8.
    g.add_argument("--threads", type=int, default=1, help="torch CPU threads (default %(default)s)")
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    assert set(SMOKE) <= set(vars(p.parse_args([]))), "SMOKE names a flag that does not exist"
    return args


def choose_tasks(args, bench, arm):
    """--tasks, or those tasks whose instruction the checkpoint's data has, or all of them for a control."""
    known = (arm.checkpoint["data"]["instructions"] if arm.checkpoint
             else [t.instruction for t in bench.tasks.values()])
    if args.tasks is None:
        tasks = [name for name, task in bench.tasks.items() if task.instruction in known]
        if not tasks:
            raise InputError(f"{arm.label} was trained on none of this environment's instructions (its "
                             f"first: {known[:1]}): name --tasks out of {', '.join(bench.tasks)}")
        return tasks
    tasks = list(dict.fromkeys(args.tasks.split(",")))
    for name in tasks:
        if name not in bench.tasks:
            raise InputError(f"unknown task {name!r}: --tasks takes {', '.join(bench.tasks)}, "
                             "comma-separated")
    return tasks


def check_rates(arms, bench):
    """An action must span one step of the environment: InputError for a policy finetuned at another rate."""
    for arm in arms:
        for part in (arm.checkpoint["data"].get("mixture") or ()) if arm.checkpoint else ():
            rate = part["fps"] / part["stride"]
            if not 0.95 < rate / bench.hz < 1.05:
                raise InputError(f"{arm.label} was finetuned on actions of {rate:g} Hz ({part['path']}, "
                                 f"stride {part['stride']}), this environment steps at {bench.hz:g} Hz: "
                                 "finetune with data or --strides of that rate")


def note_differences(arms, bench, tasks):
    """Say so when a policy is asked for what it was not trained on, or two were trained on other starts."""
    spreads = {}
    for arm in arms:
        if arm.checkpoint:
            spreads[arm.label] = (arm.checkpoint["data"].get("extra") or {}).get("spread")
            for name in tasks:
                if bench.tasks[name].instruction not in arm.checkpoint["data"]["instructions"]:
                    print(f"note         {arm.label} was not trained on the instruction of {name}")
    if len(set(spreads.values())) > 1:
        print(f"note         the policies were trained on starts of different spread: {spreads}")


def check(args, bench, tasks):
    """InputError for starts and lengths that the environment does not have."""
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} reaches below {bench.first_seed}, where training starts are: "
                         "give 0 or more")
    if args.episodes < 1:
        raise InputError(f"--episodes takes 1 or more, got {args.episodes}")
    for task in tasks:
        most = bench.tasks[task].max_steps
        if args.max_steps is not None and not 1 <= args.max_steps <= most:
            raise InputError(f"--max-steps takes 1 to {most} for {task}, got {args.max_steps}")


def run_episodes(arm, env, film, chunker, bench, tasks, seeds, done, settings, out, bar):
    """Run what is not in `done`; every episode is appended to out/episodes.jsonl as soon as it ends."""
    for task, seed in [(t, s) for t in tasks for s in seeds if (arm.key, t, s) not in done]:
        watch = film if film and seed in film.seeds else None
        if watch:
            watch.start(task, seed)
        clock = time.perf_counter()
        policy_fn = arm.policy_for(env, task, seed)
        success, steps = rollout(env, policy_fn, chunker, task, seed, settings["max_steps"], watch)
        if watch:
            watch.write(out / "videos", task, seed, bench.tasks[task].instruction, success)
        done[arm.key, task, seed] = {"arm": arm.key, "task": task, "seed": seed, "success": success,
                                     "steps": steps, "seconds": round(time.perf_counter() - clock, 3),
                                     "settings": settings}
        append_line(out / "episodes.jsonl", done[arm.key, task, seed])
        bar.set_postfix_str(f"{arm.label[-30:]} {task} {'success' if success else 'failure'}")
        bar.update()
    env.close()


def main(argv=None):
    args = arguments(argv)
    pick_device(args.device)
    torch.set_num_threads(args.threads)
    bench = ENVIRONMENTS[args.env]

    # ---- arms, starts, settings ----
    names = dict.fromkeys([args.checkpoint, *[args.compare] * bool(args.compare),
                           *["noop", "random"] * args.controls])
    arms = {arm.key: arm for arm in (make_arm(name, bench, args.device) for name in names)}
    if len(arms) < len(names) or args.compare == args.checkpoint:
        raise InputError(f"--compare {args.compare} is the same as {args.checkpoint}: name another "
                         "checkpoint")
    arm = next(iter(arms.values()))
    tasks = choose_tasks(args, bench, arm)
    check(args, bench, tasks)
    check_rates(arms.values(), bench)
    note_differences(arms.values(), bench, tasks)
    seeds = [bench.first_seed + args.seed + i for i in range(args.episodes)]
    trained_spread = ((arm.checkpoint or {}).get("data", {}).get("extra") or {}).get("spread", 1.0)
    settings = {"env": args.env, "spread": trained_spread if args.spread is None else args.spread,
                "execute": args.execute, "decay": args.decay, "max_steps": args.max_steps,
                "device": args.device, "threads": args.threads, "simulator": bench.version}
    chunkers = {k: ActionChunker(a.chunk, args.execute if a.chunk > 1 else 1, args.decay)
                for k, a in arms.items()}
    envs = {k: bench.make(a.cameras, a.image_size, settings["spread"]) for k, a in arms.items()}
    folder = Path(args.checkpoint).parent if arm.checkpoint else Path("runs", args.checkpoint)
    out = Path(args.out or folder / f"eval_{args.env}")
    done = open_results(out, args, settings, list(arms))

    # ---- episodes ----
    if arm.checkpoint:
        print(f"policy       {arm.label} ({arm.key}, step {arm.checkpoint['step']:,}), cameras "
              + ", ".join(arm.cameras))
    print(f"starts       {len(tasks)} tasks x {len(seeds)}, seeds {seeds[0]:,} to {seeds[-1]:,}, spread "
          f"{settings['spread']:g} (trained with {trained_spread:g})\nexecution    chunks of {arm.chunk}, "
          + (f"{args.execute} actions per look" if args.execute
             else f"temporal ensembling, decay {args.decay:g}"))
    total = [(key, task, seed) for key in arms for task in tasks for seed in seeds]
    with tqdm(total=len(total), initial=sum(k in done for k in total), unit="episode",
              dynamic_ncols=True) as bar:
        for key, one in arms.items():
            film = Film(bench, settings["spread"], seeds[:args.video]) if args.video and one is arm else None
            run_episodes(one, envs[key], film, chunkers[key], bench, tasks, seeds, done, settings, out, bar)

    # ---- results ----
    results = {"checkpoint": args.checkpoint, "hash": arm.key, "step": (arm.checkpoint or {}).get("step"),
               "settings": settings, "seeds": [seeds[0], seeds[-1]],
               "arms": {key: summarise(one, tasks, seeds, done) for key, one in arms.items()},
               "scope": "95 % intervals over starts of this checkpoint, not over training seeds",
               "provenance": provenance()}
    print("\n" + table(results["arms"]))
    if args.compare:
        ours, other = ([done[key, t, s]["success"] for t in tasks for s in seeds] for key in list(arms)[:2])
        results["comparison"] = {"other": args.compare, "other_hash": list(arms)[1]} | mcnemar(ours, other)
        print_comparison(args, results["comparison"])
    write_atomically(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    films = len(list((out / "videos").glob("*.mp4")))
    print(f"\nwrote        {out}/results.json, episodes.jsonl" + (f", videos/ ({films})" if films else ""))


if __name__ == "__main__":
    run(main)

"""Claims of evaluate.py: a stopped evaluation ends in the same numbers, rollouts and statistics are right."""
import collections
import json
import os
import signal

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import evaluate
from models import ActionChunker, InputError, make_policy, save_checkpoint


TASKS = {"push": evaluate.Task(("push the cup", "push it"), 20), "pull": evaluate.Task(("pull the cup",), 20),
         "lift": evaluate.Task(("lift the cup",), 30)}


KILL, REFUSE, KILL_LATER = 1, 2, 3      # starts at which a worker dies, or says why it cannot go on


class FakeEnv:
    """A point on a line has to pass a mark, which follows from (task, seed). The picture shows the point."""
    resets, stop_after = [], None       # of all instances; reset number stop_after is a Ctrl-C

    def __init__(self, cameras, image_size):
        self.cameras, self.size = cameras, image_size

    def reset(self, task, start):
        if start == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        self.start = start
        if start == REFUSE:
            raise InputError("no such start")
        FakeEnv.resets.append((task, start))
        if len(FakeEnv.resets) == FakeEnv.stop_after:
            raise KeyboardInterrupt
        self.max_steps, self.steps, self.x = TASKS[task].max_steps, 0, 0.0
        self.mark = np.random.default_rng([start, list(TASKS).index(task)]).uniform(0, 0.04) + 1e-6
        return self.observe()

    def render(self, camera, image_size):
        return np.full((image_size, image_size, 3), int(np.clip(128 + 2000 * self.x, 0, 255)), np.uint8)

    def observe(self):
        images = {c: self.render(c, self.size) for c in self.cameras}
        return {"images": images, "proprio": np.full(7, self.x, np.float32)}

    def step(self, action, look=True):
        self.x, self.steps = self.x + action[0], self.steps + 1
        if self.start == KILL_LATER and self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        success = self.x > self.mark
        return self.observe() if look else None, success or self.steps >= self.max_steps, success

    def close(self):
        pass


class FakeExpert:
    def __init__(self, env, start):
        self.env = env

    def act(self):
        return np.array([self.env.mark / 10, 0, 0, 0, 0, 0, 1.0])


def fake_benchmark(args, trained):
    limit = np.full(7, 0.02)
    return evaluate.Benchmark(make=FakeEnv, tasks=TASKS, cameras=("front",), proprio_dim=7, still=np.zeros(7),
                              low=-limit, high=limit, starts=range(1_000_000, 1_000_050),
                              episodes={"full": 50, "paper": 10}, hz=20, about={"fake": args.spread or 1},
                              expert=FakeExpert)


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    FakeEnv.resets, FakeEnv.stop_after = [], None
    monkeypatch.setitem(evaluate.ENVIRONMENTS, "fake", fake_benchmark)
    return fake_benchmark(evaluate.arguments([]), {})


SMALL = {"baku": dict(width=16, layers=1, heads=2, channels=8, dropout=0.1),
         "diffusion": dict(width=16, channels=8, down=(16, 32), step_width=8, latent_calls=1)}


def write_checkpoint(path, seed=0, instructions=("push the cup", "lift the cup"), head="action",
                     policy="baku", **data):
    torch.manual_seed(seed)
    config = dict(policy=policy, cameras=["front"], image_size=16, chunk=4, text_dim=512, proprio_dim=7,
                  action_dim=7, latent_dim=7, latent_norm=True, head=head, proprio_dropout=0.0,
                  **SMALL[policy])
    policy = make_policy(config)
    if head == "action":
        policy.action_norm.fit({"min": [-0.02] * 7, "max": [0.02] * 7})
    save_checkpoint(path, dict(stage="finetune", step=5, config=config, policy=policy.state_dict(),
                               text_encoder="hash", data={"instructions": list(instructions), **data}))
    return str(path)


def run(out, *flags):
    evaluate.main(["--env", "fake", "--workers", "0", "--out", str(out), *flags])
    results = json.loads((out / "results.json").read_text())
    results.pop("provenance")
    results.pop("speed")
    for arm in results["arms"].values():
        arm.pop("seconds_per_episode")
    return results


# ---- processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SMALL)
def test_the_number_of_processes_and_a_kill_change_nothing(tmp_path, policy):
    """To the last bit: `actions` is a hash of all actions of an episode. A policy may draw noise, too."""
    flags = ("--checkpoint", write_checkpoint(tmp_path / "last.pt", policy=policy), "--episodes", "4",
             "--batch", "4")
    whole = run(tmp_path / "0", *flags)
    assert len({e["actions"] for arm in whole["arms"].values() for e in arm["tasks"]["push"]["episodes"]}) > 4
    for workers in ("1", "2") if policy == "baku" else ("2",):
        assert run(tmp_path / workers, *flags, "--workers", workers) == whole
    lines = (tmp_path / "2" / "episodes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "2" / "episodes.jsonl").write_text("".join(lines[:9]) + lines[9][:40])
    assert run(tmp_path / "2", *flags, "--workers", "2", "--resume") == whole


def test_a_row_of_a_forward_pass_does_not_know_its_company(tmp_path, bench):
    arm = evaluate.make_arm(write_checkpoint(tmp_path / "last.pt"), 4, "cpu")
    arm.learn(bench)
    env, rng = FakeEnv(("front",), 16), np.random.default_rng(0)
    env.reset("push", 1_000_000)
    looks = []
    for task in ["push", "lift"] * 5:
        looks.append((task, env.observe()))
        env.step(rng.uniform(-0.02, 0.02, 7))
    alone = [arm.chunks([look])[0] for look in looks]
    for together in (arm.chunks(looks), arm.chunks(looks[::-1])[::-1]):
        assert np.array_equal(alone, together)
    assert arm.looks == 30 and not np.array_equal(alone[0], alone[1])
    assert not arm.knows_company(bench) and arm.looks == 0
    arm.policy.act = lambda batch: batch["proprio"][:, None].cumsum(0)      # as a careless kernel would
    assert arm.knows_company(bench)


def test_a_worker_that_dies_or_refuses_is_one_line(bench):
    job = evaluate.Job("noop", "push", 1_000_000, 0, 1, 1, 0.0, None, (), 0, None)
    for start, message in ((KILL, "a worker died in push, start 1 .*status -9.* --workers"),
                           (KILL_LATER, "a worker died in push, start 3 .*status -9.* --workers"),
                           (REFUSE, "^no such start$")):
        with pytest.raises(InputError, match=message):
            list(evaluate.play_all([job._replace(start=start)], {}, bench, 1))


def test_a_worker_goes_on_with_its_own_scene():
    Job = collections.namedtuple("Job", "task start")
    jobs = [Job(task, start) for task in "abc" for start in range(2)]
    taken = [evaluate.take(jobs, mine, others) for mine, others in
             ((None, set()), (None, {"a"}), ("a", {"b"}), ("a", {"b"}), ("b", {"c"}), ("b", {"c"}))]
    assert [tuple(job) for job in taken] == [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("b", 1), ("c", 1)]
    assert evaluate.take(jobs, "a", {"b"}) is None


# ---- resuming --------------------------------------------------------------------------------------------


def test_a_killed_evaluation_ends_in_the_same_numbers_and_repeats_no_finished_episode(tmp_path):
    flags = ("--checkpoint", write_checkpoint(tmp_path / "last.pt"), "--episodes", "5")
    whole = run(tmp_path / "whole", *flags)
    assert len(FakeEnv.resets) == 3 * 2 * 5                # policy, noop, random; two tasks

    FakeEnv.resets, FakeEnv.stop_after = [], 14
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *flags)
    FakeEnv.resets, FakeEnv.stop_after = [], None
    assert run(tmp_path / "killed", *flags, "--resume") == whole
    assert len(FakeEnv.resets) == 3 * 2 * 5 - 13           # 13 had finished


def test_a_line_torn_by_kill_9_is_run_again(tmp_path):
    flags = ("--checkpoint", "expert", "--no-controls", "--episodes", "3")
    whole = run(tmp_path, *flags)
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    FakeEnv.resets = []
    assert run(tmp_path, *flags, "--resume") == whole
    assert FakeEnv.resets == [("lift", 1_000_002)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_an_episode_does_not_depend_on_those_before_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "last.pt")
    for what in (checkpoint, "random"):
        name = what[-4:]
        one = run(tmp_path / f"one{name}", "--checkpoint", what, "--tasks", "push,lift", "--no-controls",
                  "--episodes", "4")
        other = run(tmp_path / f"two{name}", "--checkpoint", what, "--tasks", "lift", "--first", "2",
                    "--no-controls", "--episodes", "2")
        (a,), (b,) = one["arms"].values(), other["arms"].values()
        assert a["tasks"]["lift"]["episodes"][2:] == b["tasks"]["lift"]["episodes"]


def test_results_are_never_mixed_or_overwritten_unasked(tmp_path):
    flags = ("--checkpoint", write_checkpoint(tmp_path / "last.pt"), "--episodes", "2", "--no-controls")
    out = tmp_path / "out"
    run(out, *flags)
    with pytest.raises(InputError, match="--resume.*--overwrite"):
        run(out, *flags)
    with pytest.raises(InputError, match="made with execute None, now it is 2"):
        run(out, *flags, "--resume", "--execute", "2")
    with pytest.raises(InputError, match="made with fake 1, now it is 0.25"):
        run(out, *flags, "--resume", "--spread", "0.25")
    write_checkpoint(tmp_path / "last.pt", seed=1)         # trained again under the same name
    with pytest.raises(InputError, match="is of checkpoint"):
        run(out, *flags, "--resume")
    assert run(out, *flags, "--overwrite")
    (out / "episodes.jsonl").write_text("not an episode\n")
    with pytest.raises(InputError, match="line 1 is no episode"):
        run(out, *flags, "--resume")


# ---- the rollout -----------------------------------------------------------------------------------------


def counting_policy(asked, n=4):
    """Answers with a chunk that says when it was asked: action k of a chunk asked at step t is t + k / 10."""
    def policy_fn(obs):
        asked.append(obs["t"])
        return obs["t"] + np.arange(n)[:, None] / 10 * np.ones(7)
    return policy_fn


class Recorder:
    max_steps = 7

    def reset(self, task, start):
        self.done_actions, self.looks = [], [0]
        return {"t": 0}

    def step(self, action, look=True):
        self.done_actions.append(action[0])
        self.looks += [len(self.done_actions)] * look
        return {"t": len(self.done_actions)} if look else None, False, False


def test_rollout_looks_at_the_newest_frame_and_executes_a_chunk_in_order():
    env, asked = Recorder(), []
    success, actions = evaluate.rollout(env, counting_policy(asked), ActionChunker(4, execute=3), "push", 1)
    assert asked == env.looks == [0, 3, 6] and not success       # drawn only where it is looked at
    assert np.allclose(actions[:, 0], [0, 0.1, 0.2, 3, 3.1, 3.2, 6])
    assert np.array_equal(env.done_actions, actions[:, 0])


def test_temporal_ensembling_online_is_the_average_one_would_compute_offline():
    env, asked = Recorder(), []
    chunker = ActionChunker(4, decay=0.3)
    for _ in range(2):                                     # a second episode starts with no chunk left over
        evaluate.rollout(env, counting_policy(asked), chunker, "push", 1)
    expected = []
    for now in range(7):
        live = [(t + (now - t) / 10) for t in range(now + 1) if now - t < 4]        # each chunk's word on now
        weights = np.exp(-0.3 * np.arange(len(live)))
        expected.append(np.dot(weights, live) / weights.sum())
    assert asked == [*range(7), *range(7)]
    assert np.allclose(env.done_actions, expected)


def test_rollout_stops_at_success_and_at_max_steps(bench):
    env = FakeEnv((), 16)
    for most in (None, 3):
        policy_fn = evaluate.control("expert", bench, env, "push", 5, 0)
        success, actions = evaluate.rollout(env, policy_fn, ActionChunker(1, 1), "push", 5, most)
        assert (success, len(actions)) == ((True, env.steps) if most is None else (False, 3))
        assert env.steps == len(actions)


def test_the_policy_sees_pictures_as_the_dataset_stores_them(tmp_path):
    policy, _ = evaluate.load_policy(write_checkpoint(tmp_path / "last.pt"))
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    obs = {"images": {"front": picture[::-1], "side": picture}, "proprio": np.arange(7.0)}   # negative stride
    batch = evaluate.to_batch([obs], [np.ones(512, np.float32)], policy, "cpu")
    assert list(batch["images"]) == ["front"]
    assert np.array_equal(batch["images"]["front"][0], picture[::-1].transpose(2, 0, 1))
    assert batch["proprio"].shape == (1, 7) and batch["proprio"].dtype == torch.float32
    with pytest.raises(InputError, match="cameras"):
        policy.act(evaluate.to_batch([{**obs, "images": {"side": picture}}], [np.ones(512, np.float32)],
                                     policy, "cpu"))


# ---- what is evaluated, on which starts ------------------------------------------------------------------


def test_tasks_and_spread_come_from_the_checkpoint_unless_flags_say_otherwise(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "last.pt", extra={"spread": 0.5})
    flags = ("--checkpoint", checkpoint, "--episodes", "2")
    results = run(tmp_path / "a", *flags)
    assert all(list(arm["tasks"]) == ["push", "lift"] for arm in results["arms"].values())
    assert len(results["arms"]) == 3 and results["tasks"] == [2, 3]
    results = run(tmp_path / "b", *flags, "--tasks", "1", "--no-controls")
    assert len(results["arms"]) == 1 and list(results["arms"][results["hash"]]["tasks"]) == ["pull"]
    assert "not trained on the instruction of pull" in capsys.readouterr().out
    spread = [evaluate.twin_benchmark(evaluate.arguments(flag), {"extra": {"spread": 0.5}}).about["spread"]
              for flag in ([], ["--spread", "1"])]
    assert spread == [0.5, 1]


def test_what_cannot_be_evaluated_is_refused_with_a_way_out(tmp_path):
    good = write_checkpoint(tmp_path / "good.pt")
    latent = write_checkpoint(tmp_path / "latent.pt", head="latent")
    foreign = write_checkpoint(tmp_path / "foreign.pt", instructions=["open the drawer"])
    slow = write_checkpoint(tmp_path / "slow.pt", mixture=[{"path": "data/robot", "fps": 20, "stride": 2}])
    broken = torch.load(good, weights_only=True)
    broken["policy"]["query"][0] = torch.nan
    save_checkpoint(tmp_path / "broken.pt", broken)
    for flags, message in ((("--checkpoint", latent), "finetune it first"),
                           (("--checkpoint", foreign), "--tasks"),
                           (("--checkpoint", str(tmp_path / "broken.pt")), "NaN"),
                           (("--checkpoint", slow), "actions of 10 Hz .* steps at 20 Hz"),
                           (("--checkpoint", good, "--first", "-1"), "--first takes 0 or more"),
                           (("--checkpoint", good, "--first", "48", "--episodes", "3"), "50 starts per task"),
                           (("--checkpoint", good, "--tasks", "fly"), "push, pull, lift"),
                           (("--checkpoint", good, "--execute", "5"), "1 to 4"),
                           (("--checkpoint", "expert", "--compare", good, "--execute", "5"), "1 to 4"),
                           (("--checkpoint", good, "--threads", "0"), "--threads takes 1 or more"),
                           (("--checkpoint", good, "--batch", "0"), "--batch takes 1 or more"),
                           (("--checkpoint", good, "--decay", "nan"), "--decay"),
                           (("--checkpoint", good, "--max-steps", "21"), "1 to 20"),
                           (("--checkpoint", good, "--compare", good), "another checkpoint"),
                           (("--checkpoint", str(tmp_path / "absent.pt")), "no checkpoint at")):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists() and not FakeEnv.resets


def test_smoke_is_a_preset_and_explicit_flags_win():
    assert evaluate.arguments(["--smoke"]).episodes == evaluate.SMOKE["episodes"]
    assert evaluate.arguments(["--smoke", "--episodes", "7"]).episodes == 7


def test_film_is_named_after_the_outcome_and_shows_every_frame(tmp_path):
    results = run(tmp_path, "--checkpoint", "random", "--tasks", "push", "--episodes", "3", "--video", "2")
    films = sorted(path.name for path in (tmp_path / "videos").iterdir())
    episodes = results["arms"]["random"]["tasks"]["push"]["episodes"][:2]
    assert films == [f"push_{e['start']}_{'success' if e['success'] else 'failure'}.mp4" for e in episodes]
    video = cv2.VideoCapture(str(tmp_path / "videos" / films[0]))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == episodes[0]["steps"] + 1 + 10    # the end stands still
    assert video.get(cv2.CAP_PROP_FRAME_WIDTH) > 100 and video.get(cv2.CAP_PROP_FRAME_HEIGHT) > 256


# ---- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n, low, high", [
    (10, 10, 69.2, 100), (94, 100, 87.4, 97.8), (99, 100, 94.6, 100), (389, 400, 95.1, 98.6),
    (823, 900, 89.4, 93.2), (475, 500, 92.7, 96.7), (1945, 2000, 96.4, 97.9)])
def test_exact_intervals_are_the_published_ones(k, n, low, high):
    interval = evaluate.rate_with_intervals(k, n)["clopper_pearson"]
    assert np.allclose(np.multiply(interval, 100), [low, high], atol=0.06)


def test_wilson_interval_is_the_closed_form():
    k, n, z = 7, 30, 1.959964
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    assert np.allclose(evaluate.rate_with_intervals(k, n)["wilson"], [centre - half, centre + half])


def test_mcnemar_counts_only_pairs_that_differ():
    ours = [True] * 10 + [False] * 2 + [True] * 15 + [False] * 3
    other = [False] * 10 + [True] * 2 + [True] * 15 + [False] * 3
    test = evaluate.mcnemar(ours, other)
    assert (test["only_ours"], test["only_other"], test["both"], test["neither"]) == (10, 2, 15, 3)
    assert test["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)        # two-sided sign test, 2 in 12
    assert test["difference"] == pytest.approx(8 / 30)
    assert evaluate.mcnemar([True] * 5, [True] * 5)["p_value"] == 1


def test_detectable_difference_is_found_four_times_in_five():
    n, discordant = 150, 45
    least = evaluate.detectable_difference(n, discordant)
    rng = np.random.default_rng(0)
    power = []
    for difference in (least, least - 2 / n):
        share = discordant / n
        pairs = rng.multinomial(n, [(share + difference) / 2, (share - difference) / 2, 1 - share], 2000)
        table = {(a, b): binomtest(a, a + b).pvalue < 0.05
                 for a, b in {(int(a), int(b)) for a, b, _ in pairs}}
        power.append(np.mean([table[int(a), int(b)] for a, b, _ in pairs]))
    assert 0.78 < power[0] and power[1] < 0.8
    assert evaluate.detectable_difference(5, 2) is None    # five pairs all going one way still have p = 0.06


def test_two_policies_meet_on_the_same_starts(tmp_path):
    one, two = (write_checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (0, 1))
    results = run(tmp_path / "out", "--checkpoint", one, "--compare", two, "--episodes", "6")
    assert len(results["arms"]) == 4 and results["comparison"]["n"] == 12
    starts = [[e["start"] for e in arm["tasks"]["lift"]["episodes"]] for arm in results["arms"].values()]
    assert all(s == list(range(1_000_000, 1_000_006)) for s in starts)
    ours, other = [[e["success"] for t in arm["tasks"].values() for e in t["episodes"]]
                   for arm in list(results["arms"].values())[:2]]
    assert results["comparison"] | evaluate.mcnemar(ours, other) == results["comparison"]


def test_the_papers_rows_stand_beside_ours_and_only_what_is_alike_is_ours(tmp_path):
    """Other suites count when made with the same settings; a part of a suite says so."""
    arm = evaluate.Arm("abc", "mine")
    settings = {"env": "libero_goal", "max_steps": None, "execute": 5}

    def write(folder, done, tasks, **other):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "results.json").write_text(json.dumps({
            "settings": settings | other, "tasks": tasks,
            "arms": {"abc": {"overall": evaluate.rate_with_intervals(done, 100)}}}))

    write("here", 50, [10, 10])
    write("eval_libero_goal", 99, [10, 10])                                # an older run of the same suite
    write("eval_libero_10", 30, [3, 10], env="libero_10")
    write("eval_libero_object", 70, [10, 10], env="libero_object", execute=1)
    last = evaluate.paper_table(tmp_path / "here", arm, settings).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == [
        "mine", "not run", "not run", "50.0 [40, 60], n 100", "30.0 [22, 40], n 100 (3 of 10 tasks)",
        "not run"]
    short = settings | {"max_steps": 20}
    write("here", 50, [10, 10], max_steps=20)
    assert evaluate.paper_table(tmp_path / "here", arm, short).splitlines()[-1].count("not run") == 5


def test_the_figure_shows_every_run_once_and_refuses_other_files(tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        checkpoint = write_checkpoint(tmp_path / f"{name}.pt", seed)
        run(tmp_path / name / "eval_fake", "--checkpoint", checkpoint, "--episodes", "3", "--no-controls")
    capsys.readouterr()
    files = [str(tmp_path / name / "eval_fake" / "results.json") for name in ("two", "one")]
    evaluate.main(["--figure", *files, "--out", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:4]] == ["two", "one"] and "/6" in rows[2]
    assert cv2.imread(str(tmp_path / "figure.png")).std() > 10
    (tmp_path / "list.json").write_text("[]")
    for flags, words in ((files, "--overwrite replaces it"),
                         ([str(tmp_path / "one.pt")], "no results.json of"),
                         ([str(tmp_path / "list.json")], "no results.json of")):
        with pytest.raises(InputError, match=words):
            evaluate.main(["--figure", *flags, "--out", str(tmp_path / ("" if flags == files else "new"))])


def test_a_policy_executes_as_it_was_made_for_unless_told(tmp_path):
    """BAKU averages live chunks, Diffusion Policy executes 8 of 16: here its whole chunk of 4."""
    files = [write_checkpoint(tmp_path / f"{name}.pt", policy=name) for name in SMALL]
    results = run(tmp_path / "own", "--checkpoint", files[0], "--compare", files[1], "--episodes", "1",
                  "--no-controls")
    assert [arm["execute"] for arm in results["arms"].values()] == [None, 4]
    for flag, wanted in (("2", 2), ("0", None)):
        results = run(tmp_path / flag, "--checkpoint", files[1], "--episodes", "1", "--no-controls",
                      "--execute", flag)
        assert [arm["execute"] for arm in results["arms"].values()] == [wanted]


# ---- the twin itself -------------------------------------------------------------------------------------


def test_controls_and_the_expert_run_on_the_twin_with_worker_processes(tmp_path):
    evaluate.main(["--checkpoint", "expert", "--tasks", "0", "--episodes", "1", "--max-steps", "3",
                   "--workers", "1", "--out", str(tmp_path)])
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == ["expert", "noop", "random"] and all(a["overall"]["n"] == 1 for a in arms.values())


@pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable", reason="no OpenGL for images")
def test_an_episode_on_the_twin_is_the_same_bit_for_bit_after_others_and_while_filmed(tmp_path):
    args = evaluate.arguments(["--spread", "0.5"])
    twin = evaluate.twin_benchmark(args, {})
    arm = evaluate.make_arm(write_checkpoint(tmp_path / "last.pt", instructions=["stack cups"]), 1, "cpu")
    arm.learn(twin)
    job = evaluate.Job(arm.key, "stack_cups", 1_000_000, 0, 4, None, 0.01, 12, ("front",), 16, None)
    others = [job._replace(task="cup_in_bowl", start=7), job._replace(arm="random", chunk=1),
              job._replace(execute=2)]
    jobs = [job, *others, job._replace(film=str(tmp_path))]
    first, *_, filmed = evaluate.play_all(jobs, {arm.key: arm}, twin, 0)
    for line in (first, filmed):
        line.pop("seconds")
    assert first == filmed and first["steps"] == 12
    assert (tmp_path / "stack_cups_1000000_failure.mp4").stat().st_size > 1000

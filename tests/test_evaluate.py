"""Claims of evaluate.py: results do not depend on processes or kills, policies fit, statistics are right."""
import json
import os
import signal

import cv2
import numpy as np
import pytest
import torch

import evaluate
import prepare_data
import robot
from models import ActionChunker, InputError, append_line, make_policy, read_json, read_lines, save_checkpoint

TASKS = {"push": ("push the cup", "push it"), "pull": ("pull the cup",), "lift": ("lift the cup",)}


class FakeEnv:
    """A point on a line has to pass a mark that follows from (task, start). The image shows the point.
    $FAKE = "TASK START" kills the process in that episode."""
    resets = []                         # of all instances
    max_steps = 20

    def __init__(self, cameras, image_size):
        self.cameras, self.size = cameras, image_size

    def reset(self, task, start):
        self.deadly = os.environ.get("FAKE") == f"{task} {start}"
        FakeEnv.resets.append((task, start))
        self.steps, self.x = 0, 0.0
        self.mark = np.random.default_rng([start, list(TASKS).index(task)]).uniform(0, 0.04) + 1e-6
        return self.observe()

    def render(self, camera, image_size):
        return np.full((image_size, image_size, 3), int(np.clip(128 + 2000 * self.x, 0, 255)), np.uint8)

    def observe(self):
        images = {c: self.render(c, self.size) for c in self.cameras}
        return {"images": images, "proprio": np.full(7, self.x, np.float32)}

    def step(self, action, look=True):
        self.x, self.steps = self.x + action[0], self.steps + 1
        if self.deadly and self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        success = self.x > self.mark
        return self.observe() if look else None, success or self.steps >= self.max_steps, success


def fake_benchmark(args, trained):
    limit = np.full(7, 0.02)
    return evaluate.Benchmark(make=FakeEnv, tasks=TASKS, cameras=("front",), proprio_dim=7, still=np.zeros(7),
                              action=robot.ACTION, low=-limit, high=limit, starts=range(1_000_000, 1_000_050),
                              episodes=50, hz=20, about={"fake": args.spread or 1})


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    FakeEnv.resets = []
    evaluate.opened.clear()
    monkeypatch.setitem(evaluate.ENVIRONMENTS, "fake", fake_benchmark)


SMALL = {"baku": dict(width=16, layers=1, heads=2, channels=8, dropout=0.1),
         "diffusion": dict(width=16, channels=8, down=(16, 32), step_width=8)}


def write_checkpoint(path, seed=0, instructions=("push the cup", "lift the cup"), policy="baku",
                     stage="finetune", **data):
    """A checkpoint of an untrained policy whose data have these attributes. -> its path"""
    torch.manual_seed(seed)
    config = dict(policy=policy, cameras=["front"], image_size=16, chunk=4, text_encoder="hash",
                  proprio_dim=7, action_dim=7, latent_dim=7, latent_norm=True, proprio_dropout=0.0,
                  head="action" if stage == "finetune" else "latent", **SMALL[policy])
    policy = make_policy(config)
    if stage == "finetune":
        policy.action_norm.fit({"min": [-0.02] * 7, "max": [0.02] * 7, "std": [0.02] * 7})
    data = {"instructions": list(instructions), "action": robot.ACTION, **data}
    save_checkpoint(path, dict(stage=stage, step=5, config=config, policy=policy.state_dict(), data=data,
                               args={"steps": 5}))
    return str(path)


def run(out, *flags):
    """-> results.json without its provenance, {(arm, task, start): outcome} from episodes.jsonl"""
    evaluate.main(["--env", "fake", "--workers", "1", "--out", str(out), *flags])
    results = read_json(out / "results.json")
    del results["provenance"]
    return results, {(x["arm"], x["task"], x["start"]): (x["success"], x["steps"], x["actions"])
                     for x in read_lines(out / "episodes.jsonl")}


# ---- processes and resuming ------------------------------------------------------------------------------


def test_an_episode_depends_neither_on_the_number_of_processes_nor_on_other_episodes(tmp_path):
    """To the last bit: `actions` is a hash of an episode's actions. Diffusion Policy also draws noise."""
    names = [write_checkpoint(tmp_path / f"{name}.pt", policy=name) for name in SMALL]
    flags = "--checkpoint", names[0], "--compare", names[1], "--episodes", "4"
    whole = run(tmp_path / "0", *flags)
    assert len({actions for _, _, actions in whole[1].values()}) > 20
    assert run(tmp_path / "2", *flags, "--workers", "2") == whole
    _, part = run(tmp_path / "part", *flags[:4], "--tasks", "2", "--first", "2", "--episodes", "2")
    assert len(part) == 8 and part.items() <= whole[1].items()


@pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable", reason="no OpenGL for images")
def test_an_episode_on_the_twin_is_the_same_bit_for_bit_after_others_and_while_filmed(tmp_path):
    name = write_checkpoint(tmp_path / "last.pt", instructions=["stack cups"])
    args = evaluate.arguments(f"--spread 0.5 --max-steps 12 --workers 1 --out {tmp_path}".split())
    key = evaluate.Arm(name).key
    job, labels = (key, "stack_cups", 1_000_000), {key: name, **{c: c for c in evaluate.CONTROLS}}
    others = [(key, "cup_in_bowl", 7), *((control, *job[1:]) for control in evaluate.CONTROLS)]
    bench = evaluate.twin_benchmark(args, {})
    first, *_, second = [evaluate.play(bench, args, labels, each) for each in (job, *others, job)]
    args.video = 1
    filmed = evaluate.play(bench, args, labels, job)
    for line in (first, second, filmed):
        line.pop("seconds")
    assert first == second == filmed and first["steps"] == 12
    assert (tmp_path / "videos" / "stack_cups_1000000_failure.mp4").stat().st_size > 1000


def test_a_killed_worker_is_one_line_and_resuming_gives_the_same_result(tmp_path, monkeypatch):
    """That workers end with a killed parent: see run_jobs in test_prepare_data.py."""
    flags = "--checkpoint", "random", "--no-controls", "--tasks", "push,lift", "--episodes", "3"
    whole = run(tmp_path / "whole", *flags)
    monkeypatch.setenv("FAKE", "lift 1000001")
    with pytest.raises(InputError, match="^a worker process was killed.*--workers.*--resume$"):
        run(tmp_path / "out", *flags, "--workers", "2")
    monkeypatch.delenv("FAKE")
    path, FakeEnv.resets = tmp_path / "out" / "episodes.jsonl", []
    kept = [(line["task"], line["start"]) for line in read_lines(path)]
    assert len(kept) >= 3 and ("lift", 1_000_001) not in kept          # one more may have been running
    path.write_bytes(path.read_bytes()[:-20])              # and the last line is torn
    assert run(tmp_path / "out", *flags, "--resume") == whole
    starts = [(task, 1_000_000 + k) for task in ("push", "lift") for k in range(3)]
    assert FakeEnv.resets == [start for start in starts if start not in kept[:-1]]


def test_results_are_neither_mixed_nor_overwritten_unless_asked(tmp_path):
    flags = "--checkpoint", write_checkpoint(tmp_path / "last.pt"), "--episodes", "2", "--no-controls"
    out, key = tmp_path / "out", evaluate.Arm(flags[1]).key
    run(out, *flags)
    for more, message in (((), "--resume.*--overwrite"),
                          (("--resume", "--execute", "2"), "made with execute None, now it is 2"),
                          (("--resume", "--spread", "0.25"), "made with fake 1, now it is 0.25")):
        with pytest.raises(InputError, match=message):
            run(out, *flags, *more)
    write_checkpoint(tmp_path / "last.pt", seed=1)         # trained again under the same name
    with pytest.raises(InputError, match="has episodes of checkpoint"):
        run(out, *flags, "--resume")
    args = evaluate.arguments(["--workers", "1"])           # and in the middle of a run
    evaluate.opened.clear()
    with pytest.raises(InputError, match="was replaced while"):
        evaluate.play(fake_benchmark(args, {}), args, {key: flags[1]}, (key, "push", 1_000_000))
    assert run(out, *flags, "--overwrite")
    (out / "episodes.jsonl").write_text("no JSON\n")
    with pytest.raises(InputError, match="episodes.jsonl has a line that is not JSON"):
        run(out, *flags, "--resume")


def test_a_rollout_looks_at_the_newest_frame_and_executes_a_chunk_in_order():
    env, looks, asked = FakeEnv((), 16), [], []
    env.observe = lambda: looks.append(env.steps) or env.steps

    def policy_fn(t):                   # action k of the chunk of step t moves by -(t + k / 10)
        asked.append(t)
        return -(t + np.arange(4)[:, None] / 10) * np.ones(7)

    success, actions = evaluate.rollout(env, policy_fn, ActionChunker(4, execute=3), "push", 1, max_steps=7)
    assert asked == looks == [0, 3, 6] and not success           # rendered only where it is looked at
    assert np.allclose(-actions[:, 0], [0, 0.1, 0.2, 3, 3.1, 3.2, 6])


def test_a_film_is_named_after_the_outcome_and_shows_every_frame(tmp_path):
    flags = "--checkpoint", "random", "--tasks", "push", "--episodes", "3", "--video", "2"
    _, episodes = run(tmp_path, *flags)
    filmed = [(start, *episodes["random", "push", start]) for start in (1_000_000, 1_000_001)]
    names = [f"push_{start}_{'success' if success else 'failure'}.mp4" for start, success, *_ in filmed]
    assert sorted(path.name for path in (tmp_path / "videos").glob("*.mp4")) == names
    strip = cv2.imread(str(tmp_path / "videos" / names[0].replace("mp4", "png")))
    assert strip.shape == (128, 6 * 128, 3) and (strip[:, :128] != strip[:, -128:]).any()
    video = cv2.VideoCapture(str(tmp_path / "videos" / names[0]))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == filmed[0][2] + 1 + 10        # the end stays for 0.5 s
    assert video.get(cv2.CAP_PROP_FRAME_WIDTH) > 100 and video.get(cv2.CAP_PROP_FRAME_HEIGHT) == 256


# ---- what is evaluated, on which starts ------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_refused_in_one_line_with_a_way_out(tmp_path):
    data = {"good": {}, "pretrained": {"stage": "pretrain"}, "foreign": {"instructions": ["open the drawer"]},
            "slow": {"mixture": [{"path": "data/robot", "fps": 20, "stride": 2}]},
            # Width, cameras and rate are those of the environment, but the numbers mean something else.
            "units": {"action": prepare_data.LIBERO["action"]},
            "absolute": {"action": {**robot.ACTION, "delta": [False] * 7}}}
    good, pretrained, foreign, slow, units, absolute = (
        write_checkpoint(tmp_path / f"{name}.pt", **more) for name, more in data.items())
    broken = torch.load(good, weights_only=True)
    broken["policy"]["query"][0] = torch.nan
    save_checkpoint(tmp_path / "broken.pt", broken)
    twin = "--env", "twin", "--tasks", "stack_cups"
    for flags, message in (((pretrained,), "pretrain.py: give a checkpoint of finetune.py"),
                           ((foreign,), "--tasks takes push, pull"),
                           ((str(tmp_path / "broken.pt"),), "NaN"), ((slow,), "10 Hz.*20 Hz"),
                           ((units,), f"^{units}.*units.*fake has"),
                           ((absolute, *twin), f"^{absolute}.*delta.*twin has"),
                           ((good, "--first", "-1"), "--first must be 0 or more"),
                           ((good, "--first", "48", "--episodes", "3"), "50 starts per task"),
                           ((good, "--tasks", "fly"), "push, pull, lift.*got fly"),
                           ((good, "--execute", "5"), "0 to 4"),
                           (("noop", "--compare", good, "--execute", "5"), "0 to 4"),
                           (("expert",), "no scripted expert"),
                           ((good, "--decay", "nan"), "--decay"),
                           ((good, "--max-steps", "0"), "--max-steps must be 1 or more"),
                           ((good, "--compare", good), "another checkpoint"),
                           ((str(tmp_path / "absent.pt"),), "no checkpoint at")):
        with pytest.raises(InputError, match=message) as error:
            run(tmp_path / "out", "--checkpoint", *flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not FakeEnv.resets


def test_tasks_words_and_spread_are_those_of_the_checkpoint_unless_flags_say_otherwise(
        tmp_path, capsys, monkeypatch):
    flags = "--checkpoint", write_checkpoint(tmp_path / "last.pt"), "--episodes", "1"
    results, _ = run(tmp_path / "a", *flags)
    assert all(list(arm["tasks"]) == ["lift", "push"] for arm in results["arms"].values())
    assert len(results["arms"]) == 3 and results["tasks"] == [2, 3]
    unknown = ["as in the source"] * 7                     # as `prepare_data.py lerobot` writes them
    write_checkpoint(tmp_path / "last.pt", action={**robot.ACTION, "units": unknown})
    results, _ = run(tmp_path / "b", *flags, "--tasks", "1", "--no-controls")
    assert len(results["arms"]) == 1 and list(results["arms"][results["hash"]]["tasks"]) == ["pull"]
    shown = capsys.readouterr().out
    assert "not trained on the instruction of pull" in shown and "actions are unknown" in shown
    texts = []
    monkeypatch.setattr(evaluate, "policy_function", lambda policy, text, rng: texts.append(text) or (
        lambda obs: np.zeros((4, 7))))
    write_checkpoint(tmp_path / "last.pt", instructions=["push it", "lift"])
    run(tmp_path / "c", *flags, "--tasks", "0,2", "--no-controls")
    assert texts == ["push it", "lift the cup"]            # the wording of the data, otherwise the usual one
    spread = [evaluate.twin_benchmark(evaluate.arguments(flag), {"extra": {"spread": 0.5}}).about["spread"]
              for flag in ([], ["--spread", "1"])]
    assert spread == [0.5, 1]


def test_a_policy_executes_as_it_was_made_for_unless_told(tmp_path, capsys):
    """BAKU averages live chunks; Diffusion Policy executes 8 of 16, here its whole chunk of 4."""
    names = [write_checkpoint(tmp_path / f"{name}.pt", policy=name) for name in SMALL]
    for flags, wanted in ((("--compare", names[0]), ["4 per look", "temporal ensembling"]),
                          (("--execute", "2"), ["2 per look"]), (("--execute", "0"), ["ensembling"])):
        run(tmp_path / flags[-1][-1], "--checkpoint", names[1], "--episodes", "1", "--no-controls", *flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("policy")]
        assert len(lines) == len(wanted) and all(text in line for text, line in zip(wanted, lines))


# ---- results ---------------------------------------------------------------------------------------------


def test_the_wilson_interval_is_the_closed_form_and_mcnemar_counts_only_pairs_that_differ():
    k, n, z = 7, 30, 1.959964
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    rate = evaluate.success_rate([True] * k + [False] * (n - k))
    assert np.allclose(rate["wilson"], [centre - half, centre + half]) and rate["successes"] == k
    first = dict(enumerate([True] * 10 + [False] * 2 + [True] * 15 + [False] * 3 + [True]))
    second = dict(enumerate([False] * 10 + [True] * 2 + [True] * 15 + [False] * 3))
    test = evaluate.mcnemar(first, second)
    assert (test["n"], test["unpaired"], test["only_first"], test["only_second"]) == (30, 1, 10, 2)
    assert test["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)        # two-sided sign test, 2 in 12
    assert test["difference"] == pytest.approx(8 / 30)
    assert evaluate.mcnemar(second, second)["p_value"] == 1


@pytest.mark.parametrize("other", ["policy", "random"])
def test_two_arms_play_the_same_starts_and_results_of_a_folder_are_those_of_the_run(tmp_path, capsys, other):
    names = [write_checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (0, 1)]
    names[1] = names[1] if other == "policy" else other
    results, episodes = run(tmp_path / "out", "--checkpoint", names[0], "--compare", names[1],
                            "--episodes", "6")
    keys = [evaluate.Arm(name).key for name in names]
    outcomes = [{x[1:]: success for x, (success, *_) in episodes.items() if x[0] == key} for key in keys]
    test = {"arms": keys, **evaluate.mcnemar(*outcomes)}
    assert {*keys, "noop", "random"} == set(results["arms"]) and test["n"] == 12
    assert results["comparison"] == test
    path = tmp_path / "out" / "episodes.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))    # as workers may end
    evaluate.main(["--results", str(path.parent)])
    again = read_json(path.parent / "results.json")
    assert again.pop("provenance") and again == results
    assert capsys.readouterr().out.count(f"{names[0]} minus {names[1]}") == 2


def test_results_of_the_arms_episodes_pair_the_starts_that_both_policies_played(tmp_path, capsys):
    """As `robot.py rollout` writes them: no results.json, policies alternate, the last line is torn."""
    path = tmp_path / "episodes.jsonl"
    for start, arm, success in [(0, "a", True), (0, "b", False), (1, "b", True), (1, "a", True),
                                (2, "a", True), (2, "b", False), (3, "b", False)]:
        append_line(path, {"arm": arm, "label": f"{arm}.pt", "task": "stack_cups", "start": start,
                           "success": success, "aborted": None if success else "keyboard", "commit": "f",
                           "machine": "m"})
    path.write_text(path.read_text() + '{"arm": "a", "la')
    evaluate.main(["--results", str(tmp_path)])
    results, shown = read_json(tmp_path / "results.json"), capsys.readouterr().out
    assert [results["arms"][arm]["overall"]["successes"] for arm in "ab"] == [3, 1]
    c = results["comparison"]
    assert (c["n"], c["unpaired"], c["only_first"], c["only_second"], c["p_value"]) == (3, 1, 2, 0, 0.5)
    assert "a.pt minus b.pt: +67 points" in shown and "3/3" in shown and "3 episodes" in shown
    with pytest.raises(InputError, match="no finished episode.*rollout"):
        evaluate.main(["--results", str(tmp_path / "elsewhere")])


def test_the_papers_table_takes_only_comparable_results_as_ours(tmp_path):
    """Other suites count when the same checkpoint played them with the same settings; a part of a suite is
    marked."""
    settings = {"env": "libero_goal", "max_steps": None, "execute": 5}

    def write(folder, done, tasks, key="noop", **other):
        (tmp_path / folder).mkdir(exist_ok=True)
        rate = evaluate.success_rate([True] * done + [False] * (100 - done))
        (tmp_path / folder / "results.json").write_text(json.dumps({
            "settings": settings | other, "tasks": tasks, "arms": {key: {"overall": rate}}}))

    def row(**other):
        table = evaluate.paper_table(tmp_path / "here", evaluate.Arm("noop"), settings | other)
        return [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]

    write("here", 50, [10, 10])
    write("eval_libero_goal", 99, [10, 10])                                # an older run of the same suite
    write("eval_libero_10", 30, [3, 10], env="libero_10")
    write("eval_libero_object", 70, [10, 10], env="libero_object", execute=1)
    write("eval_libero_90", 90, [90, 90], "random", env="libero_90")
    assert row() == ["noop", "not run", "not run", "50.0 [40.4, 59.6], 50/100",
                     "30.0 [21.9, 39.6], 30/100 (3 of 10 tasks)", "not run"]
    write("here", 50, [10, 10], max_steps=20)
    assert row(max_steps=20) == ["noop", *["not run"] * 5]


def test_the_figure_pairs_blocks_and_refuses_arms_that_played_other_starts(tmp_path, capsys):
    """Two arms of two blocks from their folders, then the same tables from study.jsonl."""
    def write(name, outcomes, first=0):
        folder = tmp_path / name / "eval_twin"
        folder.mkdir(parents=True)
        rows = [{"arm": arm, "task": "stack", "start": first + i, "success": x > 0, "steps": 9, "commit": "c"}
                for arm in ("noop", "hash of a checkpoint") for i, x in enumerate(outcomes)]
        rows = [*rows[::-1], rows[-1]]                   # two processes have played the same episode
        (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / "episodes.jsonl")

    files = [write("baku_hand_3_101", [1, 1, 0, 1]), write("baku_scratch_3_100", [1, 0, 0, 0]),
             write("baku_hand_3_100", [1, 1, 0, 0]), write("baku_scratch_3_101", [0, 1, 0, 0])]
    evaluate.main(["--figure", *files, "--out", str(tmp_path)])
    table = capsys.readouterr().out.split("wrote")[0]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if "|" in row]
    assert cells[2][:5] == ["baku", "3", "scratch", "25 25", "25.0"]
    assert cells[3][:5] == ["baku", "3", "hand", "50 75", "62.5"]
    assert cells[6] == ["baku", "3", "hand", "+25 +50", "+37.5", "[-121.3, +196.3]", "0.500", "0.500"]
    assert cv2.imread(str(tmp_path / "study.png")).std() > 10
    evaluate.main(["--figure", str(tmp_path / "study.jsonl"), "--out", str(tmp_path / "again")])
    assert capsys.readouterr().out.split("wrote")[0] == table
    assert (tmp_path / "again" / "study.jsonl").read_text() == (tmp_path / "study.jsonl").read_text()

    curve = evaluate.draw_success({("baku", 3): {"scratch": {100: 20.0, 101: 40.0}},
                                   ("baku", 5): {"scratch": {100: 50.0}}}).axes[1]
    assert curve.lines[-1].get_ydata().tolist() == [20, 50], "the same blocks at every number"

    other, unnamed = write("baku_late_3_100", [1, 1, 1, 1], first=4), write("mine", [1])
    for chosen, words in (([*files, other], "block 100: the arm late played other starts"),
                          ([*files, files[0]], "hand has block 101 twice"),
                          ([unnamed], "POLICY_ARM_DEMOS_BLOCK"),
                          ([str(tmp_path / "none.jsonl")], "no finished episode")):
        with pytest.raises(InputError, match=words):
            evaluate.main(["--figure", *chosen, "--out", str(tmp_path / "new")])
    with pytest.raises(InputError, match="--overwrite"):
        evaluate.main(["--figure", *files, "--out", str(tmp_path)])


def test_the_interval_over_blocks_covers_and_the_test_keeps_its_level():
    """1,000 studies of 8 blocks are drawn. Both arms share the block's difficulty, the effect differs between
    blocks, and each arm plays 120 starts."""
    rng = np.random.default_rng(0)

    def studies(effect):
        scratch = np.clip(rng.normal(0.5, 0.08, (1000, 8)), 0, 1)
        better = np.clip(scratch + rng.normal(effect, 0.05, (1000, 8)), 0, 1)
        return (rng.binomial(120, better) - rng.binomial(120, scratch)) / 120

    intervals = np.array([evaluate.over_blocks(d)[1] for d in studies(0.1)])
    assert 0.93 <= ((intervals[:, 0] <= 0.1) & (0.1 <= intervals[:, 1])).mean() <= 0.97
    assert np.mean([evaluate.over_blocks(d)[2] <= 0.05 for d in studies(0)]) <= 0.055
    assert evaluate.over_blocks([1, 2, 3, 4, 5, 6, 7, 8])[2] == 2 / 256         # one sign for all blocks


def test_holm_multiplies_the_smallest_p_most_and_keeps_their_order():
    np.testing.assert_allclose(evaluate.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(evaluate.holm([0.5, 0.9]), [1, 1])

"""Claims about LIBERO, in the real simulator: repeatable episodes, the same pictures as the converter's."""
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import evaluate
import prepare_data
from models import BAKU, InputError, make_policy, read_json, read_lines, save_checkpoint

DRAWER = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
BOWL = "put_the_bowl_on_the_plate"
REACH = np.array([0.5, 0.3, -0.4, 0, 0, 0.2, -1])


@pytest.fixture
def libero(libero_assets):
    """benchmark(suite), with the simulator closed afterwards."""
    yield lambda suite: evaluate.ENVIRONMENTS[suite](evaluate.arguments(["--env", suite]), {})
    prepare_data.close_simulator()


def test_an_episode_does_not_depend_on_those_before_it(libero):
    """The scene has drawers, whose opening LIBERO draws once more with every reset. Another scene and a film
    come in between."""
    bench = libero("libero_spatial")
    env, other_task = bench.make(("wrist",), 32), list(bench.tasks)[0]

    def play(start, steps, task=DRAWER):
        env.reset(task, start)
        furniture = env.sim.sim.model.body_pos.copy()
        for _ in range(steps):
            env.step(REACH, look=False)
        return furniture, env.sim.get_sim_state(), env.observe()["images"]["wrist"]

    first, elsewhere, again = play(3, 6), play(4, 3), play(3, 6)
    env.render("agentview", 256)
    play(3, 2, other_task)
    for other in (again, play(3, 6)):
        assert all(np.array_equal(a, b) for a, b in zip(first, other))
    assert not np.array_equal(first[0], elsewhere[0])
    assert env.max_steps == 220 and env.steps == 6 and np.ptp(first[2]) > 50


def test_it_is_the_stored_state_that_an_episode_starts_from(libero):
    """After half a second, the objects are closest to their own stored state, not to one of the other 49."""
    env = libero("libero_object").make((), 0)
    states = evaluate.stored_states(env.root, "libero_object", SOUP)
    assert states.shape[0] == 50
    for start in (0, 49):
        env.reset(SOUP, start)
        apart = np.abs(env.sim.get_sim_state() - states)[:, 10:59].reshape(50, 7, 7)      # objects, poses
        apart = apart[..., :2].max((1, 2))                                            # (50,) m, horizontally
        assert apart.argmin() == start and apart[start] < 0.002 < 0.005 < np.median(apart)


def test_the_policy_sees_what_the_converter_writes(libero, tmp_path):
    """Both render the same states: upright, equally large, different by JPEG alone; equal proprioception. The
    poses of the furniture come in both forms that files have. A demonstration that fails is rejected."""
    env = libero("libero_goal").make(("agentview", "wrist"), 64)
    seen, states, joints = [env.reset(BOWL, 0)], [], []
    for _ in range(7):
        states.append(env.sim.get_sim_state())
        joints.append(env.sim.robots[0]._joint_positions)
        seen.append(env.step(REACH)[0])
    model = env.sim.sim.model
    furniture = model.body_pos.copy()
    poses = {n: [model.body_pos[i].tolist(), model.body_quat[i].tolist()] for n in model.body_names
             if "main" in n for i in [model.body_name2id(n)]}
    with h5py.File(tmp_path / f"{BOWL}_demo.hdf5", "w") as f:
        for key, attribute, value in (("demo_0", "fixture_poses", json.dumps(poses)),
                                      ("demo_1", "model_file", model.get_xml())):
            demo = f.create_group(f"data/{key}")
            demo.attrs[attribute] = value
            demo["states"], demo["actions"] = np.array(states), np.tile(REACH, (7, 1))
        demo["obs/joint_states"] = np.array([*joints[1:], joints[-1]])
        assert prepare_data.observed_after(demo)
        demo["obs/joint_states"][:] = joints
        assert not prepare_data.observed_after(demo)
    command = ["libero", "--render", "--input", str(tmp_path), "--out", str(tmp_path / "out"), "--image-size",
               "64", "--workers", "1", "--min-frames", "3"]
    with pytest.raises(InputError, match="none of the 2 items can be used, .*no success"):
        prepare_data.main(command)
    prepare_data.reset_simulator(env.sim, 99)                      # the furniture moves, and has to come back
    assert np.abs(env.sim.sim.model.body_pos - furniture).max() > 0.003
    prepare_data.main([*command, "--keep-failures", "--overwrite"])
    data = prepare_data.EpisodeDataset(tmp_path / "out", 2)
    assert data.lengths.tolist() == [7, 7]
    for item in data:
        now = seen[item["t"]]
        assert torch.allclose(item["obs"]["proprio"], torch.from_numpy(now["proprio"]), atol=5e-3)
        assert torch.equal(item["actions"][0], torch.from_numpy(REACH).float())
        for camera, picture in now["images"].items():
            stored = item["obs"]["images"][camera].permute(1, 2, 0).numpy().astype(float)
            assert stored.shape == picture.shape and np.abs(stored - picture).mean() < 2
            flipped, mirrored = (np.abs(x - picture).mean() for x in (stored[::-1], stored[:, ::-1]))
            assert flipped > 10 and mirrored > 5


def test_a_suite_is_evaluated_without_home_stdin_or_display_and_processes_change_nothing(libero, tmp_path):
    """As in a container: the home folder cannot be written, there is no DISPLAY and nothing on stdin."""
    torch.manual_seed(0)
    config = dict(policy="baku", cameras=["agentview", "wrist"], image_size=32, chunk=4, text_encoder="hash",
                  proprio_dim=8, action_dim=7, latent_dim=7, latent_norm=True, head="action",
                  proprio_dropout=0.0, **(BAKU.SIZES["tiny"] | dict(width=64, layers=1, heads=2, channels=8)))
    policy = make_policy(config)
    policy.action_norm.fit({"min": [-1.0] * 7, "max": [1.0] * 7, "std": [1.0] * 7})
    data = {"instructions": [SOUP.replace("_", " ")], "action": prepare_data.LIBERO["action"]}
    save_checkpoint(tmp_path / "last.pt", dict(stage="finetune", step=5, config=config, args={"steps": 5},
                                               policy=policy.state_dict(), data=data))

    def flags(workers):
        return ["--env", "libero_object", "--checkpoint", str(tmp_path / "last.pt"), "--episodes", "2",
                "--first", "7", "--max-steps", "8", "--execute", "2", "--workers", workers, "--video", "1",
                "--no-controls", "--out", str(tmp_path / workers)]

    def outcomes(workers):
        return {(x["task"], x["start"]): (x["success"], x["actions"])
                for x in read_lines(tmp_path / workers / "episodes.jsonl")}
    environment = {**os.environ, "HOME": "/dev/null/nowhere"}
    environment.pop("DISPLAY", None)
    done = subprocess.run([sys.executable, evaluate.__file__, *flags("2")], stdin=subprocess.DEVNULL,
                          text=True, capture_output=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    evaluate.main(flags("1"))
    assert outcomes("1") == outcomes("2") and sorted(outcomes("1")) == [(SOUP, 7), (SOUP, 8)]
    out = tmp_path / "2"
    assert (out / "videos" / f"{SOUP}_7_failure.mp4").stat().st_size > 1000
    settings = read_json(out / "results.json")["settings"]
    assert {"mujoco", "robosuite", "libero", "assets", "settle", "gl"} <= set(settings)
    assert "paper: LAWM, BAKU" in done.stdout and "1 of 10 tasks x 2" in done.stdout


@pytest.mark.parametrize("package, found, words", [("mujoco", "3.4.0", "3.3.3"), ("mujoco", "4.0.0", "12 %"),
                                                   ("robosuite", "1.5.1", "robosuite==1.4.0")])
def test_a_wrong_version_is_named_with_the_reason(monkeypatch, package, found, words):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: found if name == package else version(name))
    with pytest.raises(InputError, match=f"^{package} {found} is installed[,:] .*pip install") as error:
        prepare_data.import_libero()
    assert words in str(error.value)


def test_every_task_of_every_suite_has_its_states_and_its_wordings(libero):
    for suite in evaluate.LIBERO_STEPS:
        bench = libero(suite)
        assert len(bench.tasks) == (90 if suite == "libero_90" else 10)
        root = Path(prepare_data.import_libero().__file__).parent
        for task in bench.tasks:
            states = evaluate.stored_states(root, suite, task)
            assert len(np.unique(states, axis=0)) == len(bench.starts) and np.isfinite(states).all()
        assert all(text == text.lower() and "_" not in text and len(text) > 10
                   for wordings in bench.tasks.values() for text in wordings)
    assert len(libero("libero_object").tasks[SOUP]) == 2                # the file's own, and its name's

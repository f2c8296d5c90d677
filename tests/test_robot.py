"""What robot.py claims about its twin, one claim per test."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import robot
from models import InputError
from robot import DH, EVAL_SEED0, TASKS, THINGS, Expert, TwinEnv

ROOT = Path(robot.__file__).parent
needs_gl = pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable",
                              reason="no OpenGL: apt-get install libegl1 libgl1 libosmesa6")
HOLD = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="module")
def blind():
    """A twin without images: physics only."""
    return TwinEnv(cameras=())


def play(env, task, seed, change=lambda action: action, steps=1000):
    """The expert's episode, its actions changed on the way, cut after `steps` -> success, steps."""
    env.reset(task, seed)
    expert = Expert(env, seed)
    for step in range(1, steps + 1):
        _, done, success = env.step(change(expert.act()))
        if done:
            break
    return success, step


def put(env, name, x, y, z):
    """Things are put where the story wants them; then the world gets half a second."""
    env.data.joint(name).qpos[:] = [x, y, z, 1, 0, 0, 0]
    env.data.joint(name).qvel[:] = 0
    for _ in range(10):
        _, _, success = env.step(HOLD)
    return success


# ---- the tasks ----

def test_the_instructions_are_the_papers():
    assert [task.instruction for task in TASKS.values()] == [
        "put both cups on the plate",
        "pick the blue cup and place it in the bowl which is on top of the plate",
        "pick the pineapple out of the pot and place it in between the cups",
        "move the pineapple to the pot and the roll to the plate",
        "stack the blue cup on top of the white one"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("embodiment", ["robot", "hand"])
def test_the_expert_succeeds(task, embodiment):
    env = TwinEnv(embodiment, cameras=())
    success, steps = play(env, task, 5)
    assert success and steps <= 170


@pytest.mark.parametrize("task", TASKS)
def test_nothing_comes_of_nothing(task, blind):
    # neither doing nothing, nor all the right motions with a gripper that never closes, nor random motions
    random = np.random.default_rng(0)
    assert not play(blind, task, 1, lambda a: np.append(a[:6], 1))[0]
    for change in (lambda a: HOLD, lambda a: random.uniform(-1, 1, 7) * [.02, .02, .02, .1, .1, .1, 1]):
        assert not play(blind, task, 1, change, steps=80)[0]


def test_an_episode_ends_at_max_steps(blind):
    assert play(blind, "stack_cups", 0, lambda a: HOLD) == (False, blind.max_steps)


def test_every_sub_goal_counts(blind):
    blind.reset("cups_on_plate", 0)
    x, y, _ = blind.position("plate")
    assert not put(blind, "blue_cup", x - 0.045, y, 0.008)      # one cup is not both cups
    assert put(blind, "white_cup", x + 0.045, y, 0.008)
    blind.reset("pineapple_and_roll", 0)
    assert not put(blind, "pineapple", *blind.position("pot")[:2], 0.007)
    assert put(blind, "roll", *blind.position("plate")[:2], 0.027)


def test_a_cup_must_be_let_go_and_stand(blind):
    blind.reset("stack_cups", 0)
    x, y, _ = blind.position("white_cup")
    assert put(blind, "blue_cup", x, y, THINGS["white_cup"].floor + 0.002)
    blind.reset("stack_cups", 0)
    x, y, _ = blind.position("blue_cup")
    assert not put(blind, "white_cup", x, y, THINGS["blue_cup"].floor + 0.002)      # the wrong way round
    blind.reset("cup_in_bowl", 3)
    expert, done, held = Expert(blind, 3), False, 0
    while not done:
        action = expert.act()
        held = held + 1 if blind.position("blue_cup")[2] > 0.05 else held
        if held:
            action[6] = 0                                               # carried there, but never let go
        _, done, success = blind.step(action)
    assert held > 50 and not success


def test_a_cup_on_its_side_is_not_placed_upright(blind):
    blind.reset("cup_in_bowl", 0)
    x, y, z = blind.position("bowl")
    blind.data.joint("blue_cup").qpos[:] = [x, y, z + 0.06, np.sqrt(0.5), np.sqrt(0.5), 0, 0]
    for _ in range(20):
        _, _, success = blind.step(HOLD)
    assert not blind.upright("blue_cup") and not success


# ---- starts and seeds ----

def test_training_and_evaluation_starts_are_disjoint():
    import prepare_data
    assert EVAL_SEED0 == 1_000_000
    assert prepare_data.HAND_SEED0 < EVAL_SEED0


def test_spread_scales_the_start_regions(blind):
    def starts(spread, task="stack_cups"):
        env, found = TwinEnv(cameras=(), spread=spread), []
        for seed in range(8):
            env.reset(task, seed)
            found.append([*env.position("blue_cup")[:2], *env.tool_position])
        return np.array(found)
    assert np.ptp(starts(0), axis=0).max() < 1e-6
    half, full = starts(0.5), starts(1)
    centre = starts(0)[0]
    assert np.allclose((half - centre) * 2, full - centre, atol=2e-3)
    region = np.array(TASKS["stack_cups"].objects["blue_cup"])
    assert (np.abs(full[:, :2] - region[:2]) <= region[2:] + 1e-3).all() and np.ptp(full[:, 1]) > 0.03


@needs_gl
@pytest.mark.parametrize("embodiment", ["robot", "hand"])
def test_same_seed_same_film_bit_for_bit(embodiment):
    def film(env, seed):
        obs, expert = env.reset("stack_cups", seed), Expert(env, seed)
        seen = []
        for _ in range(15):
            obs, _, _ = env.step(expert.act())
            seen += [value.tobytes() for value in (*obs["images"].values(), obs["proprio"])]
        return seen
    env = TwinEnv(embodiment, image_size=32)
    first = film(env, 4)
    assert film(env, 9) != first
    env.reset("cups_on_plate", 1)
    env.step(np.ones(7))
    assert film(env, 4) == first                                        # after other episodes
    assert film(TwinEnv(embodiment, image_size=32), 4) == first         # in another environment


def test_same_seed_same_outcome_after_other_episodes(blind):
    def end():
        outcome = play(blind, "cup_in_bowl", 6)
        return *outcome, blind.data.qpos.tobytes()
    first = end()
    play(blind, "cup_in_bowl", 7)
    assert end() == first


# ---- the arm ----

def test_the_mjcf_arm_is_its_dh_table(blind):
    import mujoco
    blind.reset("stack_cups", 0)
    model, data = blind.model, mujoco.MjData(blind.model)
    for q in np.random.default_rng(0).uniform(-2, 2, (50, 6)):
        data.qpos[:6] = q
        mujoco.mj_kinematics(model, data)
        flange = robot.dh_forward(q)
        assert np.abs(data.body("link6").xpos - flange[:3, 3]).max() < 1e-9
        assert np.abs(data.body("link6").xmat.reshape(3, 3) - flange[:3, :3]).max() < 1e-9
        assert np.abs(data.site("tool").xpos - (flange @ [0, 0, robot.TOOL, 1])[:3]).max() < 1e-9


def test_the_dh_table_gives_the_vendors_poses():
    # forward kinematics of the vendor's library: straight up, and a pose in front of the arm (negative is +x)
    assert np.allclose(robot.dh_forward(np.zeros(6))[:3, 3], [0, 0, DH[0, 2] + 0.256 + 0.210 + 0.144])
    flange = robot.dh_forward(np.radians([0, 20, 70, 0, 90, 0]))[:3, 3]
    assert np.allclose(flange, [-0.29756, 0, 0.33706], atol=1e-5)


@pytest.mark.parametrize("embodiment", ["robot", "hand"])
@pytest.mark.parametrize("axis", range(3))
def test_an_action_is_in_metres_along_the_base_axes(embodiment, axis):
    env = TwinEnv(embodiment, cameras=())
    before = env.reset("stack_cups", 0)["proprio"]
    action = HOLD.copy()
    action[axis] = 0.01
    for _ in range(4):
        env.step(action)
    for _ in range(6):
        obs, _, _ = env.step(HOLD)
    moved = (obs["proprio"] - before)[:6]
    assert abs(moved[axis] - 0.04) < 0.002                              # four times 1 cm
    assert np.abs(np.delete(moved, axis)).max() < 0.004


@pytest.mark.parametrize("embodiment", ["robot", "hand"])
def test_a_turn_is_in_radians_and_the_gripper_is_absolute(embodiment):
    env = TwinEnv(embodiment, cameras=())
    before = env.reset("stack_cups", 0)["proprio"]
    assert before[6] > 0.99 and np.abs(before[3:6]).max() < 1e-3        # open, tool down
    for _ in range(3):
        env.step([0, 0, 0, 0, 0, 0.1, 0])
    for _ in range(12):
        obs, _, _ = env.step([0, 0, 0, 0, 0, 0, 0.4])
    assert np.allclose(obs["proprio"][3:6], [0, 0, 0.3], atol=0.02)
    assert obs["proprio"][6] < 0.05                                     # 0.4 is below the switch: closed
    assert np.abs(obs["proprio"][:3] - before[:3]).max() < 0.004


def test_large_actions_are_clamped_and_nonsense_is_refused(blind):
    before = blind.reset("stack_cups", 0)["proprio"]
    for _ in range(3):
        blind.step([0, 1000, 0, 0, 0, 0, 1])
    for _ in range(6):
        obs, _, _ = blind.step(HOLD)
    assert abs(obs["proprio"][1] - before[1] - 3 * robot.MAX_STEP) < 0.003
    for bad in ([np.nan, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, np.inf, 1], [0, 0, 0]):
        with pytest.raises(ValueError):
            blind.step(bad)


def test_pushing_against_the_limits_does_not_wind_up(blind):
    blind.reset("stack_cups", 0)
    for _ in range(60):
        blind.step([0.02, 0.02, 0.02, 0, 0, 0, 1])                      # far out of reach
    before = blind.tool_position
    for _ in range(5):
        blind.step([-0.02, -0.02, -0.02, 0, 0, 0, 1])
    assert np.linalg.norm(blind.tool_position - before) > 0.08         # it answers at once
    for _ in range(60):
        obs, _, _ = blind.step([0, 0, -0.02, 0, 0, 0, 1])
    assert 0.005 < obs["proprio"][2] < 0.03                             # and stops above the table


# ---- the pictures ----

@needs_gl
def test_pictures_are_upright_rgb_and_show_the_cups_large():
    env = TwinEnv(image_size=64)
    image = env.reset("stack_cups", 0)["images"]["front"].astype(int)
    assert env.render("front").shape == (64, 64, 3) and env.render("front").dtype == np.uint8
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    cup, pads = (blue > red + 60) & (blue > green + 60), (green > red + 40) & (green > blue + 40)
    assert np.nonzero(cup)[0].mean() > np.nonzero(pads)[0].mean() + 10  # the raised gripper is above the cup
    assert np.ptp(np.nonzero(cup)[1]) + 1 >= 8                          # pixels wide
    assert np.nonzero(cup)[1].mean() < 32  # y < 0 is left, seen from the front
    table = image[-3:].reshape(-1, 3)
    assert np.ptp(table.mean(0)) < 40 and table.std(0).max() < 10       # the last rows are bare table


@needs_gl
def test_every_thing_is_seen_by_both_cameras():
    env = TwinEnv(image_size=64)
    for task in TASKS:
        env.reset(task, 2)
        for camera in env.cameras:
            env.render(camera)
            renderer = env._renderers[task, env.image_size]
            renderer.enable_segmentation_rendering()
            renderer.update_scene(env.data, camera)
            geoms = np.unique(renderer.render()[..., 0])
            renderer.disable_segmentation_rendering()
            seen = {env.model.body(env.model.geom_bodyid[g]).name for g in geoms if g >= 0}
            assert set(env.task.objects) | {"left"} <= seen, (task, camera)


@needs_gl
def test_the_robots_cameras_stand_still_and_the_hands_shake():
    for embodiment, moves in (("robot", False), ("hand", True)):
        env = TwinEnv(embodiment, image_size=32, cameras=("front",))
        env.reset("stack_cups", 0)
        views = []
        for _ in range(6):
            env.step(HOLD)
            views.append(env.data.camera("front").xpos.copy())
        env.reset("stack_cups", 1)
        assert (np.ptp(views, axis=0).max() > 1e-4) == moves
        assert (np.abs(env.data.camera("front").xpos - views[-1]).max() > 1e-3) == moves    # another episode
        assert np.abs(views - np.array(robot.CAMERAS["front"][0])).max() < 0.08  # but it stays near


@needs_gl
def test_a_hand_is_no_robot():
    robot_image, hand_image = (TwinEnv(embodiment).reset("stack_cups", 0)["images"]["front"]
                               for embodiment in ("robot", "hand"))
    assert np.abs(robot_image.astype(int) - hand_image).mean() > 5
    model = robot.build_model("hand", ["blue_cup"])
    assert "link1" not in [model.body(i).name for i in range(model.nbody)]


# ---- what the user gives ----

@pytest.mark.parametrize("wrong, named", [(dict(embodiment="foot"), "foot"), (dict(cameras=("top",)), "top"),
                                          (dict(spread=2), "2"), (dict(image_size=5000), "5000")])
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(InputError, match=named):
        TwinEnv(**wrong)


def test_wrong_tasks_and_seeds_are_named(blind):
    with pytest.raises(InputError, match="cup_in_bowl.*'juggle'"):
        blind.reset("juggle", 0)
    with pytest.raises(InputError, match="-1"):
        blind.reset("stack_cups", -1)


def test_images_without_opengl_name_the_packages(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with pytest.raises(InputError, match="libegl1 libgl1 libosmesa6"):
        TwinEnv()
    TwinEnv(cameras=()).reset("stack_cups", 0)


@needs_gl
def test_the_command_line_films_and_overwrites_nothing(tmp_path, capsys):
    film = ["expert", "--task", "stack_cups", "--episodes", "1", "--size", "64",
            "--video", str(tmp_path / "films")]
    robot.main(film)
    assert "1/1 successes" in capsys.readouterr().out
    assert (tmp_path / "films" / "robot-stack_cups-0.mp4").stat().st_size > 1000
    with pytest.raises(InputError, match="exists"):
        robot.main(film)


@needs_gl
def test_a_process_that_rendered_exits_quietly():
    code = "import robot; robot.TwinEnv(image_size=16).reset('stack_cups', 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""

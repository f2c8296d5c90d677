"""Claims of models.py: gradients, masks, categoricals, chunk execution, checkpoints."""
import itertools
import math

import numpy as np
import pytest
import torch

import models as m
import world_model as w

TINY = {"baku": dict(width=32, layers=2, heads=2, channels=8, dropout=0.0),
        "act": dict(width=32, layers=2, decoder_layers=2, heads=2, channels=8, dropout=0.0, style=4),
        "diffusion": dict(width=32, channels=8, down=(32, 64), step_width=16, latent_calls=1)}
B, N, A, Z = 5, 6, 7, 3


def config(head="latent", cameras=("front",), proprio_dim=None, latent_norm=True, policy="baku", **more):
    return {**dict(policy=policy, cameras=list(cameras), image_size=32, chunk=N, text_dim=16,
                   proprio_dim=proprio_dim, action_dim=A, latent_dim=Z, latent_norm=latent_norm, head=head,
                   proprio_dropout=0.0), **TINY[policy], **more}


def world(predict="posterior", **more):
    return w.WorldModel({**dict(size="tiny", image_size=32, action_dim=Z, predict=predict, target="pixels",
                                motion_weight=0.0, free_bits=0.0, decode_steps=0, context_frame=True,
                                mask=0.0, views=1, proprio_dim=None), **more})


def video(views=1):
    return torch.randint(0, 255, (B, N + 1, 3 * views, 32, 32), dtype=torch.uint8)


NO_PAD = torch.zeros(B, N, dtype=torch.bool)


def observation(cameras=("front",), proprio=False):
    obs = {"images": {c: torch.randint(0, 255, (B, 3, 32, 32), dtype=torch.uint8) for c in cameras},
           "instruction": torch.randn(B, 16)}
    return {**obs, "proprio": torch.randn(B, 7)} if proprio else obs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the claim that the method stands on ----

@pytest.mark.parametrize("policy, latent_norm, predict", list(itertools.product(
    m.POLICIES, (True, False), ("posterior", "prior", "both"))))
def test_world_model_loss_reaches_every_policy_parameter(policy, latent_norm, predict):
    policy = m.make_policy(config(latent_norm=latent_norm, policy=policy))
    loss, _ = world(predict).loss(video(), policy.latent_actions(observation()), NO_PAD)
    loss.backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"no gradient reaches {name}"


# ---- policies ----

def demonstrations(count=B, cameras=("front",), proprio=False):
    obs = {"images": {c: torch.randint(0, 255, (count, 3, 32, 32), dtype=torch.uint8) for c in cameras},
           "instruction": torch.randn(count, 16), **({"proprio": torch.randn(count, 7)} if proprio else {})}
    return {"obs": obs, "actions": torch.rand(count, N, A) * 2 - 1,
            "is_pad": torch.zeros(count, N, dtype=torch.bool)}


@pytest.mark.parametrize("policy", m.POLICIES)
def test_policy_loss_ignores_padded_steps(policy):
    policy, batch, losses = m.make_policy(config("action", policy=policy)), demonstrations(), []
    if isinstance(policy, m.DiffusionPolicy):           # its U-Net sees the hold action; no score is there
        policy.velocity = lambda x, tau, condition: torch.zeros_like(x)
    batch["is_pad"][:, 2:] = True
    for garbage in (0.0, 99.0):
        batch["actions"][:, 2:] = garbage
        torch.manual_seed(1)
        losses.append(policy.loss(batch)[0].item())
    assert losses[0] == losses[1]


def test_loss_is_the_negative_log_likelihood_of_eq_6():
    policy, batch = m.make_policy(config("action")).eval(), demonstrations()
    mean = policy.action_norm.normalize(policy.act(batch["obs"]))
    reference = -torch.distributions.Normal(mean, policy.STD).log_prob(batch["actions"]).mean()
    torch.testing.assert_close(policy.loss(batch)[0].detach(), reference)


@pytest.mark.parametrize("policy", m.POLICIES)
def test_forward_does_not_change_the_batch(policy):
    policy = m.make_policy(config("action", ("front", "side"), 7, policy=policy)).eval()
    batch = demonstrations(cameras=("front", "side"), proprio=True)
    before = {"front": batch["obs"]["images"]["front"].clone(), "proprio": batch["obs"]["proprio"].clone(),
              "actions": batch["actions"].clone()}
    policy.loss(batch), policy.act(batch["obs"])
    assert (torch.equal(batch["obs"]["images"]["front"], before["front"])
            and torch.equal(batch["obs"]["proprio"], before["proprio"]))
    assert (torch.equal(batch["actions"], before["actions"])
            and set(batch["obs"]["images"]) == {"front", "side"})


@pytest.mark.parametrize("policy", m.POLICIES)
def test_policy_reads_instruction_every_camera_and_proprio(policy):
    policy = m.make_policy(config("action", ("front", "side"), 7, policy=policy)).eval()
    obs = observation(("front", "side"), True)
    first = policy.act(obs)
    for change in ("front", "side", "instruction", "proprio"):
        other = {**obs, "images": dict(obs["images"])}
        part = other["images"] if change in other["images"] else other
        part[change] = part[change].flip(0)
        assert not torch.allclose(policy.act(other), first), f"{change} is not used"


@pytest.mark.parametrize("policy", m.POLICIES)
def test_policy_overfits_eight_demonstrations(policy):
    policy = m.make_policy(config("action", proprio_dim=7, policy=policy))
    batch = demonstrations(8, proprio=True)
    batch["actions"] = batch["actions"][:, :1] * torch.linspace(1, -1, N)[:, None]      # smooth, as real ones
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    steps = 450 if isinstance(policy, m.DiffusionPolicy) else 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.loss(batch)[0].backward()
        optimizer.step(), schedule.step()
    error = (policy.eval().act(batch["obs"]) - batch["actions"]).abs().mean()
    assert error < 0.1, f"mean error {error:.3f} of actions in [-1, 1]"


@pytest.mark.parametrize("policy, head", list(itertools.product(m.POLICIES, ("action", "add"))))
def test_the_action_loss_reaches_every_policy_parameter(policy, head):
    policy = m.make_policy(config(head, ("front", "side"), 7, policy=policy))
    policy.loss(demonstrations(cameras=("front", "side"), proprio=True))[0].backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"no gradient reaches {name}"


@pytest.mark.parametrize("policy", m.POLICIES)
def test_latent_actions_are_bounded_repeatable_and_differ_between_observations(policy):
    policy = m.make_policy(config(policy=policy))
    for _ in range(5):
        policy.latent_actions(observation())                    # statistics of latent_norm
    obs = observation()
    z, again = policy.eval().latent_actions(obs), policy.latent_actions(obs)
    assert z.shape == (B, N, Z) and z.abs().max() < 1 and torch.equal(z, again)
    assert z.std(0).mean() > 0.05
    with pytest.raises(m.InputError, match="no latent actions"):
        m.make_policy(config("action", policy=policy.config["policy"])).latent_actions(obs)


# ---- Diffusion Policy ----

@pytest.mark.parametrize("calls", (1, 4))
def test_one_call_and_the_unrolled_sampler_both_teach_the_policy(calls):
    policy = m.make_policy(config(policy="diffusion", latent_calls=calls))
    world("both").loss(video(), policy.latent_actions(observation()), NO_PAD)[0].backward()
    dead = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead


def diffusion(**more):
    return m.make_policy(config("action", policy="diffusion", **more)).eval()


def test_noise_schedule_is_the_squared_cosine():
    ab, t = diffusion().alpha_bar, np.arange(1, 100)
    cosine = np.cos((t / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ab[:99], cosine, rtol=1e-4)      # alpha_bar(tau) after step tau + 1
    assert len(ab) == 100 and ab[0] > 0.999 and ab[99] < 1e-6


@pytest.mark.parametrize("steps", (1, 10, 100))
def test_ddim_with_the_true_noise_comes_back_to_the_action(steps):
    policy, a, x = diffusion(), torch.rand(B, N, A) * 2 - 1, torch.randn(B, N, A)

    def true(x, tau):           # v of the noise that is in x, if a is the clean chunk
        ab = policy.alpha_bar[tau][:, None, None]
        noise = (x - ab.sqrt() * a) / (1 - ab).sqrt()
        return ab.sqrt() * noise - (1 - ab).sqrt() * a

    torch.testing.assert_close(policy.sample(x, steps, true), a, rtol=1e-3, atol=1e-3)


def test_velocity_says_both_noise_and_action():
    policy, a, noise = diffusion(), torch.rand(B, N, A), torch.randn(B, N, A)
    tau = torch.tensor([0, 20, 50, 80, 99])
    ab = policy.alpha_bar[tau][:, None, None]
    x, v = ab.sqrt() * a + (1 - ab).sqrt() * noise, ab.sqrt() * noise - (1 - ab).sqrt() * a
    came = policy.split(x, tau, v)
    torch.testing.assert_close(came[0], a)
    torch.testing.assert_close(came[1], noise)


def test_ddim_maps_a_gaussian_to_a_gaussian_as_its_closed_form():
    """For actions ~ N(m, s^2) the best guess is known and every DDIM step is linear: in the limit of many
    steps noise x goes to m + s x."""
    policy, mean, std, x = diffusion(), 0.2, 0.1, torch.randn(B, N, A)
    policy.STEPS = 1000
    policy.alpha_bar = torch.tensor([math.cos(t / 1000 * math.pi / 2) ** 2 for t in range(1, 1000)] + [1e-6])

    def best(x, tau):
        ab = policy.alpha_bar[tau][:, None, None]
        variance = ab * std ** 2 + 1 - ab                                   # of x
        a = mean + ab.sqrt() * std ** 2 / variance * (x - ab.sqrt() * mean)
        noise = (1 - ab).sqrt() / variance * (x - ab.sqrt() * mean)
        return ab.sqrt() * noise - (1 - ab).sqrt() * a

    torch.testing.assert_close(policy.sample(x, 1000, best), mean + std * x, rtol=0.02, atol=0.005)


def test_diffusion_recovers_a_bimodal_distribution():
    """Half of the demonstrations go left, half go right, from the same observation. A regression goes through
    the middle; samples go left or right, about equally often."""
    policy, batch = m.make_policy(config("action", policy="diffusion")), demonstrations(16)
    policy.encode = lambda obs: torch.zeros(len(obs["instruction"]), 64)                # one observation
    side = torch.where(torch.arange(16) % 2 == 0, -0.6, 0.6)
    batch["actions"] = side[:, None, None].expand(16, N, A).clone()
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        policy.loss(batch)[0].backward()
        optimizer.step(), schedule.step()
    obs = {"images": {"front": torch.zeros(64, 3, 32, 32)}, "instruction": torch.zeros(64, 16)}
    came = policy.eval().act({**obs, "noise": torch.randn(64, N, A)}).mean((1, 2))
    assert ((came.abs() - 0.6).abs() < 0.15).float().mean() > 0.85, came
    assert 0.25 < (came > 0).float().mean() < 0.75, came


def test_diffusion_draws_what_it_is_given_and_nothing_else():
    policy, obs = diffusion(), observation()
    noise = torch.randn(B, N, A)
    first = policy.act({**obs, "noise": noise})
    assert torch.equal(policy.act({**obs, "noise": noise}), first)
    assert not torch.allclose(policy.act({**obs, "noise": -noise}), first)
    assert torch.equal(policy.act(obs), policy.act(obs)), "without noise it repeats itself, too"
    row = policy.act({"images": {"front": obs["images"]["front"][2:3]},
                      "instruction": obs["instruction"][2:3], "noise": noise[2:3]})
    torch.testing.assert_close(row, first[2:3], rtol=1e-4, atol=1e-4)


def test_a_chunk_that_the_u_net_cannot_halve_is_refused():
    with pytest.raises(m.InputError, match="multiples of 2, got 5"):
        diffusion(chunk=5)


# ---- ACT ----

def styled():
    """ACT on demonstrations that go left or right from one observation, half of them each."""
    policy = m.make_policy(config("action", policy="act"))
    batch = demonstrations(32)
    batch["obs"] = {"images": {"front": batch["obs"]["images"]["front"][:1].expand(32, -1, -1, -1)},
                    "instruction": batch["obs"]["instruction"][:1].expand(32, -1)}
    side = torch.where(torch.arange(32) % 2 == 0, -0.6, 0.6)
    batch["actions"] = side[:, None, None].expand(32, N, A).clone()
    return policy, batch


@pytest.mark.parametrize("weight, used", ((None, True), (10.0, False)))
def test_the_style_says_what_the_observation_does_not(weight, used):
    """With the weight of the evidence bound the style says left or right; the original's 10 empties it."""
    policy, batch = styled()
    policy.kl_weight = weight or policy.kl_weight
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss, logs = policy.loss(batch)
        loss.backward()
        optimizer.step()
    assert (logs["l1"] < 0.2) == used and (logs["style_kl"] > 0.3) == used, logs


def test_an_act_that_says_shut_too_loudly_is_still_told_to_open():
    """L1 on a gripper that is shut most of the time pushes the output far: no tanh may swallow the way back
    (seen: 0 of 120 rollouts, the gripper never let go)."""
    policy, batch = styled()
    batch["actions"][:] = 1.0

    def push(bias):
        with torch.no_grad():
            policy.action_out.bias.fill_(bias)
        policy.zero_grad()
        policy.train().loss(batch)[0].backward()
        return policy.action_out.bias.grad.clone()

    torch.testing.assert_close(push(-8.0), push(-2.0), rtol=0.05, atol=0)
    policy.action_out.bias.data.fill_(-8.0)
    assert policy.eval().act(batch["obs"]).min() >= -1, "what is executed stays within the limits"


def test_the_style_encoder_does_not_look_at_padding():
    policy, batch = styled()
    batch["is_pad"][:, 2:] = True
    policy.eval()
    first = policy.infer_style(batch["obs"], batch["actions"], batch["is_pad"])[0]
    batch["actions"][:, 2:] = 99.0
    assert torch.equal(policy.infer_style(batch["obs"], batch["actions"], batch["is_pad"])[0], first)


def test_normalizer_comes_back_and_keeps_constant_dimensions():
    norm = m.Normalizer(3)
    norm.fit({"min": [-0.01, 5.0, 2.0], "max": [0.03, 9.0, 2.0]})
    x = torch.tensor([[-0.01, 9.0, 2.0], [0.01, 7.0, 2.0]])
    torch.testing.assert_close(norm.normalize(x), torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x)
    assert norm.unnormalize(torch.full((1, 3), 0.7))[0, 2] == 2.0, (
        "a constant dimension stays constant whatever the policy says")


def test_wrong_observations_are_one_clear_line():
    policy = m.make_policy(config("action", ("front", "side"), 7)).eval()
    for obs, words in ((observation(("front",), True), "cameras"),
                       (observation(("front", "side")), "proprioception"),
                       ({**observation(("front", "side"), True), "instruction": torch.randn(B, 9)},
                        "width 16, got 9")):
        with pytest.raises(m.InputError, match=words):
            policy.act(obs)
    with pytest.raises(m.InputError, match="no latent actions"):
        policy.latent_actions(observation(("front", "side"), True))


def test_random_shift_moves_all_frames_of_a_sample_alike():
    video = torch.arange(32 * 32).view(1, 1, 1, 32, 32).expand(3, 4, 3, -1, -1).contiguous()
    moved = m.random_shift(video, 5)
    assert (moved == moved[:, :1, :1]).all() and not torch.equal(moved, video)
    dy, dx = divmod(int(moved[0, 0, 0, 16, 16]) - int(video[0, 0, 0, 16, 16]) + 16 * 33, 32)
    assert abs(dy - 16) <= 5 and abs(dx - 16) <= 5, "shifted by at most 5 pixels"
    assert m.random_shift(video, 0) is video


def test_colour_jitter_keeps_the_picture_and_changes_its_light():
    torch.manual_seed(0)
    images = torch.randint(60, 196, (64, 3, 8, 8), dtype=torch.uint8)
    changed = m.colour_jitter(images, 0.3)
    assert changed.dtype == torch.uint8 and m.colour_jitter(images, 0) is images
    before, after = (x.float().flatten(1) for x in (images, changed))
    ratio = after.mean(1) / before.mean(1)   # each image its own light
    assert 0.69 < ratio.min() < 0.8 and 1.2 < ratio.max() < 1.31
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(before, after)) > 0.9


# ---- text ----

def test_hash_embedding_is_the_same_everywhere_and_tells_tasks_apart():
    encoder = m.TextEncoder("hash")
    a, b, c = encoder(["Stack the blue cup!", "stack the blue cup", "stack the white cup"])
    assert a.shape == (512,) and a.dtype == np.float32
    assert np.array_equal(a, b) and a @ c < 0.9
    assert np.flatnonzero(encoder(["cup"])[0]).tolist() == [228], (
        "CRC-32 of the word, not Python's salted hash")
    with pytest.raises(m.InputError, match="hash, minilm, clip"):
        m.TextEncoder("bert")


def test_the_empty_instruction_has_an_embedding_too():
    """Videos without captions have the instruction "": zeros would give the instruction layer no gradient."""
    assert np.abs(m.TextEncoder("hash")([""])).sum() == 1


# ---- chunk execution ----

def test_executing_h_of_n_asks_every_h_steps_and_plays_in_order():
    chunks = [np.arange(5.0)[:, None] + 10 * i for i in range(4)]
    asked = []
    chunker = m.ActionChunker(5, execute=3)
    played = [float(chunker.step(lambda: asked.append(t) or chunks[len(asked) - 1])[0]) for t in range(9)]
    assert played == [0, 1, 2, 10, 11, 12, 20, 21, 22] and asked == [0, 3, 6]


@pytest.mark.parametrize("decay", (0.0, 0.3))
def test_temporal_ensembling_online_equals_offline(decay):
    n, steps = 4, 12
    chunks = np.random.default_rng(0).normal(size=(steps, n, 7))       # all-zero actions must count, too
    chunks[3] = 0
    chunker = m.ActionChunker(n, decay=decay)
    online = [chunker.step(lambda: chunks[t]) for t in range(steps)]
    for t in range(steps):
        votes = [chunks[s][t - s] for s in range(max(0, t - n + 1), t + 1)]             # oldest first
        weights = np.exp(-decay * np.arange(len(votes)))
        np.testing.assert_allclose(online[t], np.average(votes, axis=0, weights=weights))
    chunker.reset()
    np.testing.assert_allclose(chunker.step(lambda: chunks[0]), chunks[0][0],
                               err_msg="reset must forget the last episode")


# ---- checkpoints ----

def pretrained(policy="baku"):
    policy = m.make_policy(config("latent", policy=policy))
    torch.nn.init.normal_(policy.latent_out.weight)
    return policy


def test_finetuning_keeps_the_trunk_and_renews_the_last_layer():
    source, target = pretrained(), m.make_policy(config("action", ("front", "side"), 7))
    names = m.init_from_pretrained(target, source.state_dict(), "x.pt")
    assert torch.equal(target.trunk[0].qkv.weight, source.trunk[0].qkv.weight)
    assert new_parts(names) == {"action_out", "action_norm", "proprio_norm", "proprio_encoder",
                                "camera_embedding"}
    assert {k.split(".")[0] for k in names["unused"]} == {"latent_out", "latent_norm"}
    again = m.make_policy(config("action", ("front", "side"), 7))
    names = m.init_from_pretrained(again, target.state_dict(), "y.pt")
    assert "action_out.weight" in names["new"], "same shape or not: the last layer is re-initialised"


def new_parts(names):
    return {k.removeprefix("tokens.").split(".")[0] for k in names["new"]}


@pytest.mark.parametrize("policy, more", (
    ("act", {"style_action_in", "style_token", "style_places", "style_encoder", "style_out", "style_in"}),
    ("diffusion", {"action_in", "camera_mix", "proprio_mix"})))
def test_every_policy_says_what_finetuning_adds(policy, more):
    target = m.make_policy(config("action", ("front", "side"), 7, policy=policy))
    names = m.init_from_pretrained(target, m.make_policy(config(policy=policy)).state_dict(), "x.pt")
    assert new_parts(names) == {"action_out", "action_norm", "proprio_norm", "proprio_encoder",
                                "camera_embedding"} | more
    assert {k.split("_")[0] for k in names["unused"]} == {"latent"}


@pytest.mark.parametrize("policy", m.POLICIES)
def test_head_add_keeps_the_latent_actions(policy):
    source, target = pretrained(policy).eval(), m.make_policy(config("add", policy=policy)).eval()
    m.init_from_pretrained(target, source.state_dict(), "x.pt")
    obs = observation()
    if policy != "act":         # whose encoder gets a token of style
        torch.testing.assert_close(target.latent_actions(obs), source.latent_actions(obs))
    assert target.act(obs).shape == (B, N, 7)


def test_another_architecture_is_an_error_that_names_the_tensors():
    for other in (config("action", width=64), config("action", layers=3), config("action", layers=1)):
        with pytest.raises(m.InputError, match=r"another architecture.*(in the file|here)"):
            m.init_from_pretrained(m.make_policy(other), pretrained().state_dict(), "x.pt")


def test_checkpoint_round_trip_and_interrupted_write(tmp_path, monkeypatch):
    policy = m.make_policy(config("action")).eval()
    checkpoint = dict(stage="finetune", step=3, config=policy.config, policy=policy.state_dict(),
                      args={"lr": 0.1})
    m.save_checkpoint(tmp_path / "last.pt", checkpoint)
    loaded, _ = m.load_policy(tmp_path / "last.pt")
    obs = observation()
    assert torch.equal(loaded.act(obs), policy.act(obs))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(m.os, "fsync",
                        lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        m.save_checkpoint(tmp_path / "last.pt", {**checkpoint, "step": 4})
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_foreign_files_are_refused_and_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    torch.save({"stage": "pretrain", "x": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (("evil.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                        ("absent.pt", "no checkpoint at")):
        with pytest.raises(m.InputError, match=words):
            m.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setattr(m.shutil, "which", lambda name: None)
    assert m.provenance()["commit"] == "unknown"


def test_a_device_that_is_not_there_is_one_clear_line():
    for name in ("cuda:77", "abacus"):
        with pytest.raises(m.InputError, match="no device"):
            m.pick_device(name)


def test_only_models_py_saves_and_loads_checkpoints():
    for script in m.Path(m.__file__).parent.glob("*.py"):
        if script.name != "models.py":
            for call in m.re.findall(r"torch\.(?:save|load)\(.*", script.read_text()):
                assert "pruned_init" in call and "weights_only=True" in call, script   # LIBERO's states


# ---- sizes ----

def test_sizes_are_the_papers():
    """Of the release, counted: 7.71M and 51.14M. Ours differ by normalisation and by its dead layers."""
    for policy, theirs in (("baku", 7.712e6), ("diffusion", 51.139e6)):
        ours = m.count(m.make_policy({
            **config("action", ("front", "side"), 5, policy=policy), "image_size": 128, "text_dim": 512,
            "chunk": m.POLICIES[policy].CHUNK, **m.POLICIES[policy].SIZES["paper"]}))
        assert abs(ours / theirs - 1) < 0.02, f"{policy}: {ours:,}"


def test_python_models_py_prints_every_size(capsys):
    m.main()
    table = capsys.readouterr().out
    for name in [*m.POLICIES, *w.WORLD_MODEL_SIZES]:
        assert name in table
    row = next(line for line in table.splitlines() if line.startswith("baku") and "paper" in line)
    assert "7.71 M" in row and "1.3" in row, "the release's parameters, our GFLOP"


def test_linear_probe_finds_a_linear_map_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4000, 10)), rng.normal(size=(10, 3))
    y = np.column_stack([x @ w[:, :2], np.ones(4000), rng.normal(size=4000)])
    r2 = m.probe_r2(x[:3000], y[:3000], x[3000:], y[3000:], ridge=1e-6)
    assert r2[0] > 0.999 and r2[1] > 0.999 and np.isnan(r2[2]) and abs(r2[3]) < 0.05

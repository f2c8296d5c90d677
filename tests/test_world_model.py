"""Claims of world_model.py: categoricals, states, masks, targets, the options and what they change."""
import pytest
import torch
from torch.distributions import Categorical, Independent, kl_divergence

import models as m
import world_model as w
from test_models import NO_PAD, B, N, Z, video, world


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("predict", ("posterior", "prior", "both"))
def test_every_latent_action_acts_the_first_included(predict):
    images = video()
    actions = torch.randn(B, N, Z, requires_grad=True)
    loss, _ = world(predict).loss(images, actions, NO_PAD.clone())
    loss.backward()
    assert (actions.grad.abs().sum((0, 2)) > 0).all(), actions.grad.abs().sum((0, 2))


def test_kl_and_unimix_agree_with_torch_distributions():
    p, q = w.unimix(torch.randn(4, 3, 8) * 3), w.unimix(torch.randn(4, 3, 8) * 3)
    reference = kl_divergence(Independent(Categorical(logits=p), 1), Independent(Categorical(logits=q), 1))
    torch.testing.assert_close(w.kl_categorical(p, q), reference)
    torch.testing.assert_close(w.kl_categorical(p, p), torch.zeros(4))
    certain = w.unimix(torch.tensor([[[1e4, 0.0]]]))
    assert w.kl_categorical(certain, certain.flip(-1)).isfinite().all(), (
        "a saturated categorical must not give infinite KL")


def test_straight_through_sample_is_one_hot_and_has_the_gradient_of_the_probabilities():
    logits = torch.randn(2000, 1, 4)
    logits[:] = logits[0]
    log_probs = w.unimix(logits).requires_grad_()
    sample, weight = w.sample_straight_through(log_probs), torch.randn(4)
    torch.testing.assert_close(sample.detach().sum(-1), torch.ones(2000, 1))
    assert (sample.detach().mean((0, 1)) - log_probs[0, 0].exp()).abs().max() < 0.04, (
        "frequencies must be the probabilities")
    (sample * weight).sum().backward()
    torch.testing.assert_close(log_probs.grad, weight * log_probs.exp().detach())


def test_block_gru_with_one_block_is_a_plain_gru():
    size = {**w.WORLD_MODEL_SIZES["tiny"], "blocks": 1}
    rssm = w.RSSM(size, 8, Z)
    state, action = {"deter": torch.randn(B, 256).tanh(), "stoch": torch.randn(B, 32, 16)}, torch.rand(B, Z)
    h = state["deter"]
    x = torch.cat([h, rssm.in_deter(h), rssm.in_stoch(state["stoch"].flatten(1)), rssm.in_action(action)], -1)
    x = torch.nn.functional.silu(rssm.hidden_norm(x @ rssm.hidden.weight[0] + rssm.hidden.bias[0]))
    r, c, u = (x @ rssm.gates.weight[0] + rssm.gates.bias[0]).chunk(3, -1)
    u = torch.sigmoid(u - 1)
    torch.testing.assert_close(rssm.sequence(state, action),
                               u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h)


def test_states_do_not_see_the_future():
    model, actions = world(), torch.randn(B, N, Z)
    images = video()
    changed, later = images.clone(), actions.clone()
    changed[:, 4:], later[:, 3:] = 0, 0
    runs = []
    for i, a in ((images, actions), (changed, later)):
        torch.manual_seed(1)
        runs.append(model.observe(i, a)[1]["logits"])
    assert torch.equal(runs[0][:, :3], runs[1][:, :3]), (
        "frames from o_4 and actions from a_3 on must not reach states 1 to 3")
    assert not torch.equal(runs[0][:, 3], runs[1][:, 3])


def test_padded_steps_cost_nothing_and_count_nowhere():
    model, actions = world("both"), torch.randn(B, N, Z)
    images = video()
    is_pad = NO_PAD.clone()
    is_pad[:, 3:] = True
    garbage = images.clone()
    garbage[:, 4:] = 255 - garbage[:, 4:]
    losses = []
    for frames in (images, garbage):
        torch.manual_seed(1)
        losses.append(model.loss(frames, actions, is_pad)[0].item())
    assert losses[0] == losses[1], "o_k+1 of a padded step must not be scored"
    x, pad = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[False, False, True]])
    assert m.masked_mean(x, pad) == 1.5, "the denominator counts valid steps only"


def test_free_bits_stop_the_gradient_below_them():
    images = video()
    model = world(free_bits=1e6)
    model.loss(images, torch.randn(B, N, Z), NO_PAD.clone())[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.rssm.prior_net.parameters())


def test_drawing_few_frames_has_the_expectation_of_drawing_all():
    model, actions = world("prior", image_size=16), torch.randn(B, N, Z)
    images = torch.randint(0, 255, (B, N + 1, 3, 16, 16), dtype=torch.uint8)
    few = torch.stack([model.losses(images, actions, decode_steps=2)["open_loop"].mean() for _ in range(100)])
    all_ = torch.stack([model.losses(images, actions)["open_loop"].mean() for _ in range(20)])
    assert abs(few.mean() - all_.mean()) < 4 * (few.std() / 100 ** 0.5 + all_.std() / 20 ** 0.5)


def test_asking_for_more_frames_than_the_chunk_has_draws_them_all():
    images = torch.randint(0, 255, (B, 3, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    model, actions, losses = world(), torch.randn(B, 2, Z), []
    for steps in (0, 4):
        torch.manual_seed(1)
        losses.append(model.losses(images, actions, decode_steps=steps)["recon"])
    assert torch.equal(*losses)


def test_world_model_takes_only_sizes_it_can_halve():
    with pytest.raises(m.InputError, match="16, 32, 64 or 128"):
        world(image_size=100)


# ---- what is predicted, and the options ----

def moving_texture(pixels):
    """A soft texture that moves by so many pixels to the right per frame: (1, N+1, 3, 64, 64)."""
    big = torch.nn.functional.interpolate(torch.rand(1, 1, 24, 24) * 255, (96, 96), mode="bilinear")
    frames = [big[..., 16:80, 16 - pixels * k + 10:80 - pixels * k + 10] for k in range(N + 1)]
    return torch.stack(frames, 1).to(torch.uint8).expand(-1, -1, 3, -1, -1)


def test_flow_target_is_the_motion_in_pixels_of_the_half_size_picture():
    still, future = w.targets(moving_texture(2), "flow")
    assert future.shape == (1, N, 2, 32, 32) and not still.any()
    inside = future[..., 6:-6, 6:-6].mean((0, 1, 3, 4))
    torch.testing.assert_close(inside, torch.tensor([1.0, 0.0]), rtol=0, atol=0.1)


def test_difference_target_is_zero_where_nothing_moves_and_adds_up_to_the_frame():
    images = video()
    images[:, :, :, :16] = images[:, :1, :, :16]                # the upper half stands still
    still, future = w.targets(images, "difference")
    assert not still.any() and not future[..., :16, :].any()
    torch.testing.assert_close(future + images[:, :1] / 255, images[:, 1:] / 255)


def test_feature_target_sees_edges_and_no_light():
    images = torch.full((1, 2, 3, 16, 16), 100, dtype=torch.uint8)
    images[..., 8:] = 200                                       # an upright edge: its gradient points right
    still, future = w.targets(images, "features")
    assert future.shape == (1, 1, 9, 4, 4) and future[0, 0, :, 0, 2].argmax() == 0
    assert not future[0, 0, :, :, 0].any(), "no edge, no feature"
    brighter = w.targets(images + 50, "features")[1]
    torch.testing.assert_close(brighter, future)
    level = w.targets(images.transpose(-1, -2), "features")[1]  # 90 degrees: the fifth of nine bins
    torch.testing.assert_close(level[0, 0, 4, 2, 0], future[0, 0, 0, 0, 2])


@pytest.mark.parametrize("target", w.TARGETS)
@pytest.mark.parametrize("views", (1, 2))
def test_every_target_gives_every_latent_action_a_gradient(target, views):
    model, actions = world("both", target=target, views=views), torch.randn(B, N, Z, requires_grad=True)
    loss, logs = model.loss(video(views), actions, NO_PAD)
    loss.backward()
    assert (actions.grad.abs().sum((0, 2)) > 0).all() and logs["open_loop"] > 0
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead
    start = model.context(model.embed(video(views))[:, 0])
    imagined = model.decode(model.imagine(start, actions))
    assert imagined.shape == (B, N, *w.targets(video(views), target)[1].shape[2:])
    picture = model.picture(imagined, torch.rand(B, 3, 32, 32))
    assert picture.shape == (B, N, 3, 32, 32) and 0 <= picture.min() and picture.max() <= 1


def test_without_the_context_frame_o_t_does_not_matter():
    images, actions = video(), torch.randn(B, N, Z)
    other = images.clone()
    other[:, 0] = 255 - other[:, 0]
    for seen in (True, False):
        model, losses = world("both", context_frame=seen), []
        for frames in (images, other):
            torch.manual_seed(1)
            losses.append(model.loss(frames, actions, NO_PAD)[0].item())
        assert (losses[0] != losses[1]) == seen


def test_mask_hides_its_share_in_training_alone():
    model, seen = world(mask=0.25), []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.full((64, 2, 3, 32, 32), 255, dtype=torch.uint8)
    model.train().embed(images)
    model.eval().embed(images)
    assert abs((seen[0] == 0).float().mean() - 0.25) < 0.02 and not (seen[1] == 0).any()
    patches = seen[0][:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert (patches.std(-1) == 0).all(), "whole patches, an eighth of the picture wide"


def test_proprioception_is_seen_and_predicted():
    model, images, actions = world("both", proprio_dim=4), video(), torch.randn(B, N, Z)
    proprio = torch.rand(B, N + 1, 4)
    losses = []
    for k in (None, 0, 3):
        changed = proprio.clone()
        if k is not None:
            changed[:, k] += 1
        torch.manual_seed(1)
        losses.append(model.loss(images, actions, NO_PAD, changed))
    assert losses[0][0] != losses[1][0] and losses[0][0] != losses[2][0]
    assert {"recon_proprio", "open_loop_proprio"} <= set(losses[0][1])
    reference = ((proprio[:, 1:] - 0) ** 2).mean() * model.PROPRIO_SCALE
    for part in model.proprio_out[-1].parameters():
        part.data.zero_()
    terms = model.losses(images, actions, proprio)
    torch.testing.assert_close(terms["recon_proprio"].mean().detach(), reference)


def test_inverse_latents_follow_from_the_two_frames_around_them():
    model, images = w.InverseDynamics(world().config).eval(), video()
    z, changed = model(images), images.clone()
    assert z.shape == (B, N, Z) and z.abs().max() < 1
    changed[:, 3] = 0
    moved = (model(changed) != z).any(0).any(-1)
    assert moved.tolist() == [k in (2, 3) for k in range(N)], "z_k lies between o_k and o_k+1"


@pytest.mark.parametrize("size", (16, 64, 128))
def test_targets_are_drawn_at_every_image_size_or_refused(size):
    images = torch.randint(0, 255, (2, 3, 3, size, size), dtype=torch.uint8)
    for target in w.TARGETS:
        if (size, target) == (16, "features"):
            with pytest.raises(m.InputError, match="too small to draw"):
                world(target=target, image_size=size)
        else:
            model = world("both", target=target, image_size=size)
            assert model.losses(images, torch.randn(2, 2, Z))["recon"].isfinite().all()


def test_feature_target_does_not_jump_at_upright_edges():
    """A grey level of noise must not move the votes of an edge to another bin."""
    images = torch.full((1, 2, 3, 32, 32), 100, dtype=torch.uint8)
    images[..., 16:] = 200
    for edges in (images, images.transpose(-1, -2).contiguous()):
        noisy = edges + torch.randint(-1, 2, edges.shape).expand_as(edges)
        was, came = (w.targets(x.to(torch.uint8), "features")[1] for x in (edges, noisy))
        strong = was.norm(dim=2, keepdim=True) > 0.5
        assert ((was - came).abs() * strong).max() < 0.1


def test_world_model_names_what_it_was_not_made_for():
    with pytest.raises(AssertionError, match="7 frames need 6 actions, got 5"):
        world().observe(video(), torch.randn(B, N - 1, Z))

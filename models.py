"""The models of LAWM (arXiv 2509.18428): three policies, the world model, and what all scripts share.

    stage 1, pretrain.py  (video, no actions)             stage 2, finetune.py  (a few demonstrations)

    o_t, instruction --> [ policy ] --> z_t ... z_t+n-1   o_t, instruction, --> [ policy ] --> a_t ... a_t+n-1
                                            |  (B, n, Z)  proprioception        new last layer
    o_t ---------------------------> [ world model ] --> o_t+1 ... o_t+n

One tensor joins the two models: the latent actions z (B, n, Z). The gradient of WorldModel.loss flows
through z into the policy. Apart from z, neither model knows the other.

The paper's symbols and equations (Eq. 8 and 9, the canonical correlations, are cca_fit in cca.py):

    o_t  frame                EpisodeDataset          (Eq. 3) prior              RSSM.prior
    z_t  latent action        Policy.latent_actions   (Eq. 4) decoder            WorldModel.decode
    a_t  action               Policy.act              (Eq. 5) world-model loss   WorldModel.loss
    (Eq. 1) recurrent state   RSSM.sequence           (Eq. 6) BAKU's objective   Policy.loss
    (Eq. 2) posterior         RSSM.posterior          (Eq. 7) diffusion loss     DiffusionPolicy.loss

Letters: B batch, n chunk length, T frames (n+1), C H W image, Z latent-action width, A action width,
P proprioception width, L width of a text embedding, E token width, V camera views, D deterministic state,
S x K stochastic state (S variables of K classes). DreamerV3 calls its stochastic state z_t, LAWM its latent
action. Here the state is `deter` and `stoch`; the latent action is `z`, or `actions` inside the world model.

Tags in comments of all scripts: DEVIATION: where this code differs from the paper on purpose; ASSUMPTION: a
choice where the paper is silent; UPSTREAM: what the authors' published release does.
"""
import argparse
import ctypes
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

# Settings of the process, made before torch starts, so training scripts import models first. A thread that
# waits for another one spins for some microseconds, then sleeps (GNU OpenMP). By default it spins for
# milliseconds: where another program kept one of two cores busy, a step took 5 s instead of 0.2 s, now 0.4 s.
# Freed memory is kept: by default it goes back to the kernel, which costs up to 20 % of the time of a step.
os.environ.setdefault("GOMP_SPINCOUNT", "500")
if sys.platform == "linux":
    for option, value in ((-4, 0), (-1, 2 ** 31 - 1)):                      # M_MMAP_MAX, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ---- text -------------------------------------------------------------------------------------------------


class TextEncoder:
    """Frozen text encoder: list of B str -> (B, L) float32 array. InputError if it cannot be loaded.

    "hash" hashes words and pairs of neighbouring words into 512 signed counts: it has no weights, needs no
    download and knows no synonyms. `transformers` loads the others from a local folder with the name given
    in HUB, from its cache, or from the hub.
    """
    DIM = {"hash": 512, "minilm": 384, "clip": 512}                                   # L
    HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2",      # as in the original BAKU
           "clip": "openai/clip-vit-base-patch32"}      # UPSTREAM: the release uses its text tower

    def __init__(self, name):
        self.name, self.embed = name, functools.cache(self.hashed if name == "hash" else self.embedded)
        if name == "hash":
            return
        try:
            from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection
            model = CLIPTextModelWithProjection if name == "clip" else AutoModel
            self.tokenizer = AutoTokenizer.from_pretrained(self.HUB[name])
            self.model = model.from_pretrained(self.HUB[name]).eval()
        except (ImportError, RuntimeError, OSError, ValueError) as e:
            raise InputError(f"cannot load the text encoder {name}: pip install transformers, and download "
                             f"{self.HUB[name]} ({str(e).splitlines()[0][:80]})") from e

    def __call__(self, texts):
        """list of B str -> (B, L) float32. Each text is embedded on its own, once per process."""
        return np.stack([self.embed(text) for text in texts])

    def hashed(self, text):
        words, vector = re.findall(r"\w+", text.lower()), np.zeros(self.DIM["hash"])
        # The empty instruction counts as one word: a zero vector would leave the next layer untrained.
        for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:])] or [""]:
            code = zlib.crc32(gram.encode())
            vector[code % len(vector)] += 1.0 if code >> 31 else -1.0
        return (vector / max(np.linalg.norm(vector), 1e-6)).astype(np.float32)

    @torch.no_grad()
    def embedded(self, text):
        output = self.model(**self.tokenizer([text], truncation=True, return_tensors="pt"))
        vector = output.text_embeds if self.name == "clip" else F.normalize(output.last_hidden_state.mean(1))
        return vector[0].float().numpy()


text_encoder = functools.cache(TextEncoder)     # shared by all policies of a process; not in their weights


# ---- normaliser -------------------------------------------------------------------------------------------


class Normalizer(nn.Module):
    """Maps each dimension from [low, high] to [-1, 1] and back: (..., dim) -> (..., dim).

    The limits come from the finetuning data and are stored with the weights. A constant dimension maps to 0
    and back to the constant.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("low", -torch.ones(dim))
        self.register_buffer("high", torch.ones(dim))
        self.register_buffer("std", torch.ones(dim))        # of the normalised data

    def fit(self, statistics):
        """statistics {"min", "max", "std"}, (dim,) each."""
        self.low.copy_(torch.as_tensor(statistics["min"]))
        self.high.copy_(torch.as_tensor(statistics["max"]))
        half = (self.high - self.low) / 2
        self.std.copy_(torch.where(half > 1e-6, torch.as_tensor(statistics["std"]) / half, 1))

    def normalize(self, x):
        half = (self.high - self.low) / 2
        return (x - (self.high + self.low) / 2) / torch.where(half > 1e-6, half, 1)

    def unnormalize(self, x):
        return x * ((self.high - self.low) / 2) + (self.high + self.low) / 2


# ---- observations -----------------------------------------------------------------------------------------


def shrink(frame, size, rule):
    """Resize (H, W, 3) uint8 -> (size, size, 3) uint8. The rule crop first cuts out the centre square.

    UPSTREAM: the release squashes with OpenCV's INTER_LINEAR, which skips pixels and therefore aliases. Here
    the filter is antialiased; torch's is four times as fast as OpenCV's INTER_AREA.
    """
    if rule == "crop":
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        frame = frame[top:top + side, left:left + side]
    frame = np.ascontiguousarray(frame)
    if frame.shape[:2] != (size, size):
        image = torch.from_numpy(frame).permute(2, 0, 1)[None]                        # (1, 3, H, W)
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        frame = cv2.merge([plane.numpy() for plane in image[0]])
    return frame


def batch_observations(observations, instructions, policy):
    """Observations of B environments, list of B str -> obs (see Policy) on the policy's device.

    observations: list of B {"images": {camera: (H, W, 3) uint8 RGB}, "proprio": (P,), "noise": (n, A)}; noise
    is optional. Cameras and proprioception that the policy does not use are left out.
    ASSUMPTION: the policy sees frames as rendered. Its training frames went through JPEG (quality 95).
    """
    def tensor(rows):
        return torch.from_numpy(np.stack(rows)).to(next(policy.parameters()).device)

    images = {c: tensor([o["images"][c] for o in observations]).permute(0, 3, 1, 2)   # (B, 3, H, W)
              for c in policy.cameras if c in observations[0]["images"]}
    obs = {"images": images, "instruction": list(instructions)}
    if policy.config["proprio_dim"]:
        obs["proprio"] = tensor([np.asarray(o["proprio"], np.float32) for o in observations])        # (B, P)
    if "noise" in observations[0]:
        obs["noise"] = tensor([o["noise"] for o in observations])                     # (B, n, A)
    return obs


def by_position(obs, cameras):
    """Rename the cameras of obs to `cameras`, by position: the first of every dataset is its main view."""
    return {**obs, "images": dict(zip(cameras, obs["images"].values()))}


def random_shift(images, pixels):
    """Augmentation: shift each sample, all its frames alike, by up to `pixels` in x and y; edges repeat:
    (B, ..., H, W) -> the same shape."""
    if not pixels:
        return images
    h, w = images.shape[-2:]
    # Repeat the edges. F.pad cannot do so with bytes on a GPU.
    x = torch.cat([images[..., :1, :]] * pixels + [images] + [images[..., -1:, :]] * pixels, -2)
    x = torch.cat([x[..., :1]] * pixels + [x] + [x[..., -1:]] * pixels, -1)
    tops, lefts = torch.randint(2 * pixels + 1, (2, len(images))).tolist()
    return torch.stack([image[..., y:y + h, x:x + w] for image, y, x in zip(x, tops, lefts)])


def colour_jitter(images, strength):
    """Augmentation: multiply brightness, contrast and saturation of each image by random factors of
    1 +- strength: (B, 3, H, W) uint8 -> the same. UPSTREAM: also the hue, and one factor for the batch."""
    if not strength:
        return images
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    brightness, contrast, saturation = factors                                        # (B, 1, 1, 1) each
    x = images.float() * brightness
    mean = x.mean((1, 2, 3), keepdim=True)                                            # (B, 1, 1, 1)
    x = mean + contrast * (x - mean)
    grey = x.mean(1, keepdim=True)                                                    # (B, 1, H, W)
    return (grey + saturation * (x - grey)).round().clamp(0, 255).to(torch.uint8)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 8 groups in float32, also where the layers around it compute in bfloat16."""

    def __init__(self, channels):
        super().__init__(8, channels)

    def forward(self, x):
        return super().forward(x.float())


class FiLMBlock(nn.Module):
    """ResNet block whose features are scaled and shifted by the instruction (FiLM, Perez et al. 2018):
    (B, C, H, W), (B, E) -> (B, C', H', W')."""

    def __init__(self, c_in, c_out, stride, cond):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        # DEVIATION: GroupNorm. BatchNorm's statistics of the videos would not hold for the demonstrations.
        self.norm1, self.norm2 = GroupNorm(c_out), GroupNorm(c_out)
        self.skip = nn.Identity() if c_in == c_out and stride == 1 else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), GroupNorm(c_out))
        self.film = nn.Linear(cond, 2 * c_out)
        nn.init.zeros_(self.film.bias)
        nn.init.normal_(self.film.weight, std=0.02)

    def forward(self, x, cond):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        gamma, beta = self.film(cond)[:, :, None, None].chunk(2, 1)                   # (B, C', 1, 1) each
        return F.relu(self.skip(x) + (1 + gamma) * y + beta)


class ResNet18FiLM(nn.Module):
    """One image -> one token: the first half of ResNet-18 (stem, stages 1 and 2; UPSTREAM: the same) with
    FiLM. A linear layer reads every cell of the last map, reduced to 16 channels. UPSTREAM: spatial softmax,
    with which policies did not learn to correct along x (figures/trials.csv).

    DEVIATION: no ImageNet weights, so nothing needs a download. Images below 128 pixels skip the max-pooling
    of the stem, so that the map has at least 16 x 16 cells: grasping depends on localisation.
    """

    def __init__(self, image_size, channels, width):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.stem_norm = GroupNorm(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if image_size >= 128 else nn.Identity()
        self.blocks = nn.ModuleList([
            FiLMBlock(channels, channels, 1, width), FiLMBlock(channels, channels, 1, width),
            FiLMBlock(channels, 2 * channels, 2, width), FiLMBlock(2 * channels, 2 * channels, 1, width)])
        side = -(-image_size // (8 if image_size >= 128 else 4))                      # cells, rounded up
        self.reduce, self.out = nn.Conv2d(2 * channels, 16, 1), nn.Linear(16 * side ** 2, width)
        self.to(memory_format=torch.channels_last)

    def forward(self, images, cond):
        """images (B, 3, H, W) uint8, cond (B, E) -> (B, E)."""
        mean = images.new_tensor([0.485, 0.456, 0.406], dtype=torch.float32)[:, None, None]
        std = images.new_tensor([0.229, 0.224, 0.225], dtype=torch.float32)[:, None, None]
        x = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        x = self.pool(F.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x, cond)                                                        # (B, C, h, w)
        return self.out(self.reduce(x).flatten(1))                                    # (B, 16 h w) -> (B, E)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention to a memory if memory=True, then an MLP.

    Queries and keys have no bias: the bias of a key cancels in the softmax and would never get a gradient.
    """

    def __init__(self, width, heads, dropout, memory=False):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                                 nn.Dropout(dropout))
        if memory:
            self.norm_x, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
            self.cross_out = nn.Linear(width, width)

    def attention(self, q, k, v, seen=None):
        """q (B, T, E), k and v (B, M, E), seen (B, M) bool or None -> (B, T, E)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))   # (B, h, T, E/h)
        mask = None if seen is None else seen[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout.p * self.training)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, seen=None, memory=None):
        """x (B, T, E); seen (B, T) bool: the tokens that are attended to, None = all; memory (B, M, E)."""
        y = self.attention(*self.qkv(self.norm1(x)).chunk(3, -1), seen)
        x = x + self.dropout(self.out(y))
        if memory is not None:
            y = self.attention(self.q(self.norm_x(x)), *self.kv(self.norm_memory(memory)).chunk(2, -1))
            x = x + self.dropout(self.cross_out(y))
        return x + self.mlp(self.norm2(x))


class ObservationTokens(nn.Module):
    """Preprocessed obs (see Policy.preprocess) -> (B, tokens, E): instruction, one token per camera, proprio.

    The cameras share one ResNet, modulated by the instruction; a learned vector per camera tells them apart.
    """

    def __init__(self, config):
        super().__init__()
        width = config["width"]
        self.cameras, self.proprio_dropout = config["cameras"], config["proprio_dropout"]
        # The norm brings the embedding to the scale of the other tokens, so that FiLM acts from the start.
        self.instruction_encoder = nn.Sequential(nn.Linear(TextEncoder.DIM[config["text_encoder"]], width),
                                                 nn.LayerNorm(width))
        self.image_encoder = ResNet18FiLM(config["image_size"], config["channels"], width)
        self.camera_embedding = nn.ParameterList([nn.Parameter(0.5 * torch.randn(width))
                                                  for _ in self.cameras])
        if config["proprio_dim"]:
            self.proprio_encoder = nn.Sequential(nn.Linear(config["proprio_dim"], width), nn.ReLU(),
                                                 nn.Linear(width, width))

    def forward(self, obs):
        instruction = self.instruction_encoder(obs["instruction"])                    # (B, E)
        images = torch.cat([obs["images"][c] for c in self.cameras])                  # (cameras*B, 3, H, W)
        views = self.image_encoder(images, instruction.repeat(len(self.cameras), 1))  # (cameras*B, E)
        views = views.split(len(instruction))                                         # one (B, E) per camera
        tokens = [instruction] + [x + e for x, e in zip(views, self.camera_embedding)]
        if hasattr(self, "proprio_encoder"):
            proprio = self.proprio_encoder(obs["proprio"])                            # (B, E)
            if self.training and self.proprio_dropout:
                # Zero the token of whole samples; otherwise the policy learns to extrapolate from its own
                # pose instead of looking at the images.
                kept = torch.rand(len(proprio), 1, device=proprio.device) >= self.proprio_dropout
                proprio = proprio * kept
            tokens.append(proprio)
        return torch.stack(tokens, 1)


# ---- policies ---------------------------------------------------------------------------------------------


def masked_mean(x, is_pad):
    """Mean of x (B, n) over the steps that are not padding (is_pad (B, n) bool) -> scalar."""
    assert x.shape == is_pad.shape, f"values {tuple(x.shape)}, padding {tuple(is_pad.shape)}"
    valid = (~is_pad).to(x.dtype)
    return (x * valid).sum() / valid.sum().clamp(min=1)


class Policy(nn.Module):
    """Base class of all policies. The scripts call latent_actions(obs), loss(batch) and act(obs).

    obs = {"images": {camera: (B, 3, H, W) uint8}, "instruction": list of B str, "proprio": (B, P) float32}
    A modality that a dataset lacks is absent: never zeros, never a second copy of the same camera. In
    rollouts obs may have "noise" (B, n, A), standard normal, for policies that sample, so that the rollout
    can be repeated.

    config["head"] says what the last layer of the network produces:
        latent  latent actions (B, n, Z) for the world model (stage 1)
        action  actions (B, n, A), by a new last layer (stage 2, the paper's choice)
        add     actions (B, n, A), by a new layer after the latent actions (stage 2, the paper's alternative)
    The other keys are policy (name in POLICIES), cameras, image_size, chunk, text_encoder, proprio_dim (or
    None), action_dim (or None), latent_dim, latent_norm, proprio_dropout, and one entry of the class's SIZES.

    A new policy needs SIZES (with "width", E), features(obs) -> (B, E), and an entry in POLICIES; it inherits
    everything else. features() gets the obs of preprocess(). With PER_STEP = True it returns (B, n, E), one
    row per action. ObservationTokens gives it FiLM, several cameras and --proprio-dropout. The name of a
    layer says what stage 2 does with it (init_from_pretrained): it may add camera_*, proprio_*, noise_* and
    style_*, drops latent_*, and never copies action_*. It copies all others: they must be in both stages.
    """

    SIZES = {}          # name -> the entries of config that this class adds; paper, or tiny for two CPU cores
    CHUNK = 10          # default of n
    EXECUTE = 0         # default of evaluate.py --execute: actions per chunk; 0 = temporal ensembling
    EMA = 0.0           # default of finetune.py --ema: decay of the averaged weights; 0 = no averaging
    PER_STEP = False
    STD = 0.2           # of the likelihood (Eq. 6), in standard deviations of each action dimension

    def __init__(self, config):
        super().__init__()
        self.config = config
        text_encoder(config["text_encoder"])        # load it now, so that an error comes before the training
        self.chunk, self.cameras, self.head = config["chunk"], config["cameras"], config["head"]
        if self.head != "action":
            latents = self.chunk * config["latent_dim"]
            self.latent_norm = (BatchNorm(latents, affine=False) if config["latent_norm"]
                                else nn.Identity())
        if self.head != "latent":
            self.action_norm = Normalizer(config["action_dim"])
        if config["proprio_dim"]:
            self.proprio_norm = Normalizer(config["proprio_dim"])
        self.last_layers(config["latent_dim"], config["action_dim"])

    def last_layers(self, latent, action):
        """Create the layers that stage 2 renews. All others keep their weights from stage to stage."""
        width, rows = self.config["width"], self.chunk if self.PER_STEP else 1        # rows of features
        if self.head != "action":       # a bias would be cancelled by the BatchNorm
            self.latent_out = nn.Linear(rows * width, self.chunk * latent,
                                        bias=not self.config["latent_norm"])
        if self.head != "latent":
            steps = self.chunk // rows                                                # actions per row
            self.action_out = nn.Linear(width if self.head == "action" else steps * latent, steps * action)

    @torch.compiler.disable             # new words would make --compile compile again in every step
    def preprocess(self, obs):
        """Check the raw observation, embed the instructions as (B, L) and normalise the proprioception.
        InputError when obs is not what the policy was made for."""
        size, got = self.config["image_size"], {c: x.shape[-1] for c, x in obs["images"].items()}
        if any(got.get(c) != size for c in self.cameras):
            raise InputError(f"the policy needs the cameras {self.cameras} with images of {size} pixels "
                             f"(prepare_data.py --image-size), got {got}")
        image, words = obs["images"][self.cameras[0]], obs["instruction"]
        if len(words) != len(image):
            raise InputError(f"{len(image)} observations need a list of {len(image)} instructions: {words!r}")
        text = torch.from_numpy(text_encoder(self.config["text_encoder"])(words))
        obs = {**obs, "instruction": text.to(image.device)}
        if self.config["proprio_dim"]:
            if "proprio" not in obs:
                raise InputError("the policy was finetuned with proprioception, the observation has none")
            obs["proprio"] = self.proprio_norm.normalize(obs["proprio"])
        return obs

    def encode(self, obs):
        """Raw obs -> features."""
        return self.features(self.preprocess(obs))

    def latent_actions(self, obs):
        """z_t ... z_t+n-1 from o_t and the instruction alone (Sec. III-A): obs -> (B, n, Z) in (-1, 1),
        differentiable. A finetuned policy has none, except with head "add"."""
        return self.to_latents(self.encode(obs))

    def to_latents(self, features):
        """Features -> latent actions (B, n, Z). With PER_STEP, each depends on the features of all steps."""
        z = self.latent_out(features.flatten(1))                                      # (B, n * Z)
        return self.squash(z.view(-1, self.chunk, self.config["latent_dim"]))

    def squash(self, z):
        """Bound latent actions, as the world model expects: (B, n, Z) -> (B, n, Z) in (-1, 1).

        DEVIATION: latents are standardised over the batch before the tanh (config["latent_norm"]). With the
        tanh alone they collapse to a constant or saturate in models of this size.
        """
        return torch.tanh(self.latent_norm(z.flatten(1)).float()).view_as(z)

    def to_actions(self, features, noise=None):
        """Features, noise (B, n, A) for policies that sample -> normalised actions (B, n, A)."""
        if self.head == "add":
            features = self.to_latents(features).flatten(2 if self.PER_STEP else 1)
        # In float32: in bfloat16 tanh(3.5) is 1, without a gradient.
        actions = self.bound(self.action_out(features).float())
        return actions.view(-1, self.chunk, self.config["action_dim"])

    def bound(self, actions):
        return torch.tanh(actions)

    def loss(self, batch):
        """Negative log-likelihood of the demonstrated actions: batch -> scalar, {name: scalar} for the log.

        batch = {"obs", "actions" (B, n, A) in the data's units, "is_pad" (B, n) bool: steps not to count}.
        """
        target = self.action_norm.normalize(batch["actions"])
        mu = self.to_actions(self.encode(batch["obs"]))
        # (Eq. 6)  L = - E log N(a_t ... a_t+n-1 | mu(o_t, instruction), std^2)
        # DEVIATION: each action dimension has its own std. With one for all (UPSTREAM and BAKU) the gripper,
        # open or closed, has most of the loss, and corrections of a few millimetres are not learnt.
        std = self.STD * self.action_norm.std                                         # (A,)
        nll = 0.5 * ((target - mu) / std) ** 2 + torch.log(std * math.sqrt(2 * math.pi))           # (B, n, A)
        l1 = masked_mean((target - mu).detach().abs().mean(-1), batch["is_pad"])
        return masked_mean(nll.mean(-1), batch["is_pad"]), {"l1": l1}

    @torch.no_grad()
    def act(self, obs):
        """The chunk of actions in the environment's units: obs -> (B, n, A). Only in eval mode."""
        assert not self.training, "act() is for rollouts: call policy.eval() first"
        return self.action_norm.unnormalize(self.to_actions(self.encode(obs), obs.get("noise")))


class BAKU(Policy):
    """BAKU (Haldar et al. 2024) as LAWM uses it: observation tokens and one learned query go through a
    transformer; an MLP turns the query's output into a chunk of n actions.

    DEVIATION: all tokens attend to each other. UPSTREAM: attention is causal, as if there were a history.
    """
    SIZES = {"paper": dict(width=256, layers=8, heads=4, channels=64, dropout=0.1),   # 8.6 million parameters
             "tiny": dict(width=128, layers=3, heads=4, channels=32, dropout=0.1)}    # 1.5

    def __init__(self, config):
        super().__init__(config)
        width = config["width"]
        self.tokens = ObservationTokens(config)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.trunk = nn.Sequential(*[TransformerBlock(width, config["heads"], config["dropout"])
                                     for _ in range(config["layers"])])
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(),
                                 nn.Linear(width, width), nn.ReLU())

    def features(self, obs):
        tokens = self.tokens(obs)                                                     # (B, tokens, E)
        tokens = torch.cat([tokens, self.query.expand(len(tokens), 1, -1)], 1)
        return self.mlp(self.trunk(tokens)[:, -1])                                    # (B, E)


class ACT(Policy):
    """ACT (Zhao et al. 2023): a transformer decoder with n learned queries, one per action.

    In finetuning it is a conditional VAE: an encoder compresses the demonstrated chunk into a style, and the
    decoder reconstructs the chunk from the observation and the style. In rollouts and in pretraining the
    style is 0, the mean of its prior.

    DEVIATION: padded steps are masked, all decoder layers are used (the original builds seven and uses one),
    a camera is one token, not its feature map, and errors are in standard deviations of each dimension.
    """
    SIZES = {"paper": dict(width=512, layers=4, decoder_layers=1, heads=8, channels=64, dropout=0.1,
                           style=32),   # 33 million parameters; LAWM's paper has no ACT
             "tiny": dict(width=128, layers=2, decoder_layers=1, heads=4, channels=32, dropout=0.1, style=16)}
    PER_STEP = True

    def __init__(self, config):
        super().__init__(config)
        width, block = config["width"], (config["width"], config["heads"], config["dropout"])
        self.tokens = ObservationTokens(config)
        self.encoder = nn.Sequential(*[TransformerBlock(*block) for _ in range(config["layers"])])
        self.queries = nn.Parameter(torch.randn(config["chunk"], width))       # as the original
        self.decoder = nn.ModuleList([TransformerBlock(*block, memory=True)
                                      for _ in range(config["decoder_layers"])])
        self.norm = nn.LayerNorm(width)
        if self.head != "latent":                       # pretraining has no actions to encode
            # The negative evidence lower bound with a Laplace likelihood is sum |a - mean| + KL. The loss has
            # the mean error instead of the sum, so the KL is divided by n * A, too.
            # DEVIATION: the original's weight is 10, with which the style collapses (tested).
            self.kl_weight = 1 / (config["chunk"] * config["action_dim"])
            self.style_action_in = nn.Linear(config["action_dim"], width)
            self.style_token = nn.Parameter(0.02 * torch.randn(width))
            self.style_places = nn.Parameter(torch.randn(config["chunk"], width))
            self.style_encoder = nn.ModuleList([TransformerBlock(*block) for _ in range(config["layers"])])
            self.style_out = nn.Linear(width, 2 * config["style"])
            self.style_in = nn.Linear(config["style"], width, bias=False)             # style 0 -> token 0

    def features(self, obs, style=None):
        """Preprocessed obs, style (B, style) or None for 0 -> (B, n, E)."""
        tokens = self.tokens(obs)                                                     # (B, tokens, E)
        token = torch.zeros_like(tokens[:, 0]) if style is None else self.style_in(style)
        tokens = torch.cat([tokens, token[:, None]], 1)                     # in stage 1, too, where it is 0
        tokens, x = self.encoder(tokens), self.queries.expand(len(tokens), -1, -1)    # (B, n, E)
        for block in self.decoder:
            x = block(x, memory=tokens)
        return self.norm(x)

    def infer_style(self, obs, actions, is_pad):
        """q(style | instruction, a_t ... a_t+n-1): preprocessed obs, normalised actions (B, n, A), (B, n) ->
        mean and log variance, (B, style) each. Padded actions are not attended to."""
        instruction = self.tokens.instruction_encoder(obs["instruction"])[:, None]    # (B, 1, E)
        tokens = torch.cat([self.style_token.expand(len(actions), 1, -1), instruction,
                            self.style_action_in(actions) + self.style_places], 1)    # (B, 2 + n, E)
        seen = torch.cat([torch.ones_like(is_pad[:, :2]), ~is_pad], 1)
        for block in self.style_encoder:
            tokens = block(tokens, seen)
        return self.style_out(tokens[:, 0]).float().chunk(2, -1)      # the KL needs float32: exp(x) - 1 - x

    def bound(self, actions):
        """No tanh, as in the original: L1 on a gripper that is mostly closed saturates a tanh, its gradient
        vanishes, and the gripper never learns to open. Actions are clipped in rollouts only."""
        return actions if self.training else actions.clamp(-1, 1)

    def loss(self, batch):
        """Reconstruction and KL: batch as in Policy.loss -> scalar, {name: scalar} for the log."""
        target, obs = self.action_norm.normalize(batch["actions"]), self.preprocess(batch["obs"])
        mean, log_var = self.infer_style(obs, target, batch["is_pad"])
        style = mean + (log_var / 2).exp() * torch.randn_like(mean)
        error = (target - self.to_actions(self.features(obs, style))).abs()           # (B, n, A)
        # L = mean |a - mu(o_t, instruction, style)| / std (valid steps) + weight * KL(q(style) || N(0, I))
        nll = masked_mean((error / self.action_norm.std).mean(-1), batch["is_pad"])
        kl = 0.5 * (mean ** 2 + log_var.exp() - 1 - log_var).sum(-1).mean()
        l1 = masked_mean(error.detach().mean(-1), batch["is_pad"])
        return nll + self.kl_weight * kl, {"l1": l1, "style_kl": kl.detach()}


class DiffusionPolicy(Policy):
    """Diffusion Policy (Chi et al. 2023): a 1-D U-Net, conditioned on the observation, denoises a chunk.

    Forward process at step tau of 100, with ab = alpha_bar(tau) of the squared-cosine schedule:
        x = sqrt(ab) a + sqrt(1 - ab) e                 a: clean chunk, e: standard normal noise
    DEVIATION: the network predicts v = sqrt(ab) e - sqrt(1 - ab) a (Salimans and Ho 2022), which gives both
        ^e = sqrt(1 - ab) x + sqrt(ab) v                the noise of (Eq. 7)
        ^a = sqrt(ab) x - sqrt(1 - ab) v                the clean chunk
    A network that predicts e must first learn to copy x, and its ^a divides by sqrt(ab) = 0.0005 at tau = 99.

    DEVIATION: a is in standard deviations of each dimension. A linear layer makes the latent actions from the
    condition; the U-Net is made in stage 2. UPSTREAM: the latent actions are x - ^e of one call of the U-Net
    on pure noise, so pretraining covers only that noise level.
    """
    SIZES = {"paper": dict(width=256, channels=64, down=(256, 512, 1024), step_width=256,
                           draws=2),                                                        # 52 million
             "tiny": dict(width=128, channels=32, down=(32, 64, 128), step_width=32, draws=8)}       # 2.0
    CHUNK, EXECUTE, EMA = 16, 8, 0.9999       # the original's. UPSTREAM: executes the mean of live chunks
    STEPS, SAMPLER_STEPS = 100, 10

    def __init__(self, config):
        super().__init__(config)
        shortest = 2 ** (len(config["down"]) - 1)       # the U-Net halves the chunk at every level but one
        if self.chunk % shortest:
            raise InputError(f"--chunk of the diffusion policy must be a multiple of {shortest}, "
                             f"got {self.chunk}")
        self.tokens = ObservationTokens(config)
        # A sum of one linear layer per camera, which equals one layer on their concatenation. A camera that
        # stage 2 adds is then a new layer, and the others keep their weights.
        width, step = config["width"], config["step_width"]
        self.camera_mix = nn.ModuleList([nn.Linear(width, width) for _ in self.cameras])
        if config["proprio_dim"]:
            self.proprio_mix = nn.Linear(width, width)
        # What stage 2 adds starts near zero: at first the condition is that of stage 1.
        for layer in [*self.camera_mix[1:], *([self.proprio_mix] if config["proprio_dim"] else [])]:
            nn.init.normal_(layer.weight, std=1e-3), nn.init.zeros_(layer.bias)
        if self.head != "latent":
            self.noise_step = nn.Sequential(nn.Linear(step, 4 * step), nn.Mish(), nn.Linear(4 * step, step))
            self.noise_unet = UNet1D(config["down"], step + 2 * width)
        # alpha_bar(tau) = cos^2((tau / T + 0.008) / 1.008 * pi / 2), with every beta at most 0.999
        ab = [math.cos((t / self.STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(self.STEPS + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in zip(ab, ab[1:])])
        self.register_buffer("alpha_bar", (1 - betas).cumprod(0), persistent=False)   # (STEPS,)

    def last_layers(self, latent, action):
        width, first = self.config["width"], self.config["down"][0]
        if self.head == "latent":
            self.latent_out = nn.Linear(2 * width, self.chunk * latent, bias=not self.config["latent_norm"])
        else:
            self.action_in, self.action_out = nn.Linear(action, first), nn.Linear(first, action)

    def features(self, obs):
        """Preprocessed obs -> condition of the U-Net (B, 2E): cameras and proprioception, instruction."""
        instruction, *rest = self.tokens(obs).unbind(1)
        layers = [*self.camera_mix, *([self.proprio_mix] if self.config["proprio_dim"] else [])]
        return torch.cat([sum(layer(x) for layer, x in zip(layers, rest)), instruction], -1)

    def velocity(self, x, tau, condition):
        """v(x, tau, o): x (B, n, A), tau (B,) int, condition (B, 2E) -> (B, n, A)."""
        half = self.config["step_width"] // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=x.device))
        angles = tau[:, None] * frequencies                                           # (B, step_width / 2)
        step = self.noise_step(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.action_in(x).transpose(1, 2)                                         # (B, down[0], n)
        x = self.noise_unet(x, torch.cat([step, condition], -1))
        return self.action_out(x.transpose(1, 2))

    def split(self, x, tau, velocity):
        """Noisy chunk x, its step tau (B,), v -> clean chunk ^a, noise ^e; all (B, n, width)."""
        ab = self.alpha_bar[tau][:, None, None]
        return ab.sqrt() * x - (1 - ab).sqrt() * velocity, (1 - ab).sqrt() * x + ab.sqrt() * velocity

    def to_actions(self, condition, noise=None):
        """DDIM sampler (Song et al. 2021): condition (B, 2E), noise (B, n, A) -> (B, n, A) in [-1, 1].
        Without noise it takes a fixed one, so that the actions depend on the observation alone."""
        if noise is None:
            size, fixed = (self.chunk, self.config["action_dim"]), torch.Generator().manual_seed(0)
            noise = torch.randn(size, generator=fixed).to(condition.device).expand(len(condition), *size)
        x, limit = noise, 1 / self.action_norm.std
        taus = torch.linspace(self.STEPS - 1, 0, self.SAMPLER_STEPS).round().long().tolist()
        for tau, after in zip(taus, [*taus[1:], 0]):            # the x of the last step is not used
            tau = torch.full((len(x),), tau, device=x.device)
            a, noise = self.split(x, tau, self.velocity(x, tau, condition))
            a, ab = torch.clamp(a, -limit, limit), self.alpha_bar[after]
            # x <- sqrt(ab') ^a + sqrt(1 - ab') ^e, where ab' belongs to the next step
            x = ab.sqrt() * a + (1 - ab).sqrt() * noise
        return a * self.action_norm.std

    def to_latents(self, condition):
        return super().to_latents(F.mish(condition))

    def loss(self, batch):
        """Denoising loss of the valid steps: batch as in Policy.loss -> scalar, {} for the log.

        DEVIATION: `draws` noises per observation, which is encoded once. The tiny U-Net is cheap beside the
        encoder. The paper's is not: on a CPU, a step with 8 draws takes 2.2 times as long as one with 2.
        """
        draws = self.config["draws"]
        a = (self.action_norm.normalize(batch["actions"]) / self.action_norm.std).repeat(draws, 1, 1)
        condition = self.encode(batch["obs"]).repeat(draws, 1)    # (draws * B, 2E), and a (draws * B, n, A)
        tau, noise = torch.randint(self.STEPS, (len(a),), device=a.device), torch.randn_like(a)
        ab = self.alpha_bar[tau][:, None, None]
        x, v = ab.sqrt() * a + (1 - ab).sqrt() * noise, ab.sqrt() * noise - (1 - ab).sqrt() * a
        # (Eq. 7)  L = E |e - ^e(x, tau, o)|^2; in terms of v, |v - ^v|^2 = |e - ^e|^2 / ab
        error = ((v - self.velocity(x, tau, condition)) ** 2).mean(-1)                # (draws * B, n)
        return masked_mean(error, batch["is_pad"].repeat(draws, 1)), {}


class FiLMConv(nn.Module):
    """Residual block of two convolutions along the chunk, modulated by the condition: (B, C, n), (B, cond) ->
    (B, C', n)."""

    def __init__(self, c_in, c_out, cond):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(c_in, c_out, 3, padding=1), nn.Conv1d(c_out, c_out, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        self.film = nn.Linear(cond, 2 * c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv1d(c_in, c_out, 1)

    def forward(self, x, cond):
        scale, shift = self.film(F.mish(cond))[..., None].chunk(2, 1)                 # (B, C', 1) each
        y = F.mish(self.norm1(self.conv1(x))) * (1 + scale) + shift
        return F.mish(self.norm2(self.conv2(y))) + self.skip(x)


class UNet1D(nn.Module):
    """U-Net along the chunk: (B, down[0], n), condition (B, cond) -> (B, down[0], n)."""

    def __init__(self, down, cond):
        super().__init__()
        pairs = list(zip((down[0], *down), down))
        self.down = nn.ModuleList([nn.ModuleList([FiLMConv(a, b, cond), FiLMConv(b, b, cond)])
                                   for a, b in pairs])
        self.halvings = nn.ModuleList([nn.Conv1d(c, c, 3, 2, 1) for c in down[:-1]])
        self.middle = nn.ModuleList([FiLMConv(down[-1], down[-1], cond) for _ in range(2)])
        self.up = nn.ModuleList([nn.ModuleList([FiLMConv(2 * b, a, cond), FiLMConv(a, a, cond)])
                                 for a, b in pairs[:0:-1]])
        self.doublings = nn.ModuleList([nn.ConvTranspose1d(a, a, 4, 2, 1) for a, _ in pairs[:0:-1]])
        self.out = nn.Sequential(nn.Conv1d(down[0], down[0], 3, padding=1), nn.GroupNorm(8, down[0]),
                                 nn.Mish())

    def forward(self, x, cond):
        skips = []
        for blocks, halving in zip(self.down, [*self.halvings, nn.Identity()]):
            for block in blocks:
                x = block(x, cond)
            skips.append(x)                                                           # (B, C_i, n / 2^i)
            x = halving(x)
        for block in self.middle:
            x = block(x, cond)
        for blocks, doubling in zip(self.up, self.doublings):
            x = torch.cat([x, skips.pop()], 1)
            for block in blocks:
                x = block(x, cond)
            x = doubling(x)
        return self.out(x)


POLICIES = {"baku": BAKU, "diffusion": DiffusionPolicy, "act": ACT}


def make_policy(config):
    """Plain-data config (see Policy) -> new policy with random weights. InputError for an unknown policy."""
    if config["policy"] not in POLICIES:
        raise InputError(f"no policy {config['policy']!r} in POLICIES of models.py: {', '.join(POLICIES)}")
    return POLICIES[config["policy"]](config)


# ---- world model ------------------------------------------------------------------------------------------
#
#    o_t --> posterior --> h_t+1 = f(h_t, s_t, z_t) --> h_t+2 ...             z_k moves o_k to o_k+1
#            (Eq. 2)       (Eq. 1)      |
#                                       +--> prior p(s | h) (Eq. 3): predicts s_t+1 without seeing o_t+1
#                                       +--> posterior q(s | h, o_t+1) (Eq. 2): has seen o_t+1
#                                       +--> decoder (Eq. 4): decodes o_t+1 from h and either s

# The sizes of DreamerV3 (Hafner et al. 2023). The names count its whole agent, with networks for reward,
# continuation, policy and value. The comments give the parameters of this world model in millions (images of
# 64 pixels for tiny and 1m, else 128) and those of the release. At 50m:
# encoder 1.6, RSSM 22.8, of which the block-diagonal GRU 12.6, decoder 11.1; the release: encoder 2.8, RSSM
# 66.6, of which its dense GRU 56.6, decoder 46.3 (five layers of up to 16 times `depth` channels, ours 4).
WORLD_MODEL_SIZES = {
    "tiny": dict(deter=256, hidden=128, stoch=32, classes=16, depth=8, blocks=4),     # 1.0; ours, for laptops
    "1m": dict(deter=512, hidden=64, stoch=32, classes=4, depth=4, blocks=8),         # 0.56; release 1.8
    "12m": dict(deter=2048, hidden=256, stoch=32, classes=16, depth=16, blocks=8),    # 8.9; release 29
    "25m": dict(deter=3072, hidden=384, stoch=32, classes=24, depth=24, blocks=8),    # 20; release 65
    "50m": dict(deter=4096, hidden=512, stoch=32, classes=32, depth=32, blocks=8),    # 36; release 116; paper
    "100m": dict(deter=6144, hidden=768, stoch=32, classes=48, depth=48, blocks=8),   # 80; release 260
    "200m": dict(deter=8192, hidden=1024, stoch=32, classes=64, depth=64, blocks=8),  # 142; release 463
}


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: (B, blocks, c_in) -> (B, blocks, c_out)."""

    def __init__(self, blocks, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, c_in, c_out) / math.sqrt(c_in))
        self.bias = nn.Parameter(torch.zeros(blocks, c_out))

    def forward(self, x):
        # Not einsum: autocast would convert its weight anew in every call.
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1) + self.bias


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32, also where the layers around it compute in bfloat16."""

    def __init__(self, width):
        super().__init__(width, eps=1e-4)

    def forward(self, x):
        return super().forward(x.float())


def dense(c_in, c_out):
    """Linear, RMSNorm, SiLU: DreamerV3's layer."""
    return nn.Sequential(nn.Linear(c_in, c_out), RMSNorm(c_out), nn.SiLU())


def unimix(logits):
    """Logits (..., K) -> log-probabilities of 99 % softmax + 1 % uniform, so that every KL is finite."""
    return torch.log(0.99 * logits.float().softmax(-1) + 0.01 / logits.shape[-1])


def kl_categorical(p, q):
    """KL(p || q) in nats, summed over S independent categoricals: log-probabilities (..., S, K) -> (...)."""
    return (p.exp() * (p - q)).sum((-1, -2))


def sample_straight_through(log_probs):
    """One-hot sample, whose gradient is that of the probabilities: (..., S, K) -> (..., S, K)."""
    gumbel = -torch.log(-torch.log(torch.rand_like(log_probs).clamp(1e-9, 1 - 1e-7)))
    one_hot = F.one_hot((log_probs + gumbel).argmax(-1), log_probs.shape[-1]).to(log_probs.dtype)
    probs = log_probs.exp()
    return one_hot + probs - probs.detach()


class RSSM(nn.Module):
    """Recurrent state-space model of DreamerV3. A state is {"deter": (B, D), "stoch": (B, S, K) one-hot,
    "log_probs": (B, S, K)}; h is `deter` and s is `stoch`.

    What depends on no state is computed for all steps at once, outside the loop: a linear layer of several
    inputs is a sum, so in_action(z) (B, D) is the part of z in (Eq. 1), and the embedding (B, hidden) of a
    frame is its part in (Eq. 2).
    """

    def __init__(self, size, action_dim):
        super().__init__()
        deter, hidden, self.blocks = size["deter"], size["hidden"], size["blocks"]
        self.stoch, self.classes = size["stoch"], size["classes"]
        flat = self.stoch * self.classes
        self.in_deter, self.in_stoch = dense(deter, hidden), dense(flat, hidden)
        self.in_action = nn.Sequential(*dense(action_dim, hidden), nn.Linear(hidden, deter, bias=False))
        self.hidden = BlockLinear(self.blocks, deter // self.blocks + 2 * hidden, deter // self.blocks)
        self.hidden_norm = RMSNorm(deter)
        self.gates = BlockLinear(self.blocks, deter // self.blocks, 3 * deter // self.blocks)
        self.posterior_deter = nn.Linear(deter, hidden)
        self.posterior_net = nn.Sequential(RMSNorm(hidden), nn.SiLU(), nn.Linear(hidden, flat))
        self.prior_net = nn.Sequential(dense(deter, hidden), dense(hidden, hidden), nn.Linear(hidden, flat))

    def sequence(self, state, action):
        """(Eq. 1)  h_k+1 = f(h_k, s_k, z_k), a block-diagonal GRU: state, in_action(z_k) (B, D) -> (B, D)."""
        b, deter = len(action), state["deter"]
        x = torch.cat([self.in_deter(deter), self.in_stoch(state["stoch"].flatten(1))], -1)
        x = x[:, None].expand(b, self.blocks, -1)                           # every block sees all the inputs
        x = torch.cat([deter.view(b, self.blocks, -1), x], -1)              # (B, blocks, D/blocks + 2 hidden)
        x = F.silu(self.hidden_norm(self.hidden(x).flatten(1) + action)).view(b, self.blocks, -1)
        reset, candidate, update = [g.flatten(1) for g in self.gates(x).chunk(3, -1)]   # (B, D) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)                                  # at first most of h is kept
        return update * candidate + (1 - update) * deter

    def posterior(self, deter, embed):
        """(Eq. 2)  q(s | h, o): (..., D), (..., hidden) -> log-probabilities (..., S, K)."""
        return self._log_probs(self.posterior_net(self.posterior_deter(deter) + embed))

    def prior(self, deter):
        """(Eq. 3)  p(s | h): (..., D) -> log-probabilities (..., S, K)."""
        return self._log_probs(self.prior_net(deter))

    def _log_probs(self, logits):
        return unimix(logits.unflatten(-1, (self.stoch, self.classes)))

    def unroll(self, state, actions, embed):
        """States of n steps from a first state (R, ...) and actions (R, n, Z) -> (R, n, ...). Rows 0 ... B-1
        are posteriors, which see embed (B, n, hidden); rows B ... R-1 are priors. One loop is faster.
        """
        # As in DreamerV3, numbers beyond [-1, 1] are clipped but keep a gradient. True actions may have some.
        actions = self.in_action(actions / actions.abs().clamp(min=1).detach())       # (R, n, D)
        seeing, states = len(embed), []
        for k in range(actions.shape[1]):                                   # action k moves frame k to k + 1
            deter = self.sequence(state, actions[:, k])
            log_probs = torch.cat([self.posterior(deter[:seeing], embed[:, k]), self.prior(deter[seeing:])])
            state = {"deter": deter, "stoch": sample_straight_through(log_probs), "log_probs": log_probs}
            states.append(state)
        return {k: torch.stack([s[k] for s in states], 1) for k in state}


# What the decoder predicts: (channels per view, how often height and width are halved). The paper predicts
# pixels; features and flow are its future work (Sec. V).
TARGETS = {"pixels": (3, 0), "difference": (3, 0), "features": (9, 2), "flow": (2, 1)}


def targets(images, kind):
    """What the decoder must predict of a clip: images (B, n+1, 3V, H, W) uint8 -> still, future.

    still (B, 1, C, h, w) is the target of o_t, and of all later frames if nothing moves; future (B, n, C, h,
    w) is the target of o_t+1 ... o_t+n.
    pixels      the frames, in [0, 1]
    difference  o_k - o_t, in [-1, 1]
    features    histograms of oriented gradients (MaskFeat, Wei et al. 2022): edges without colour or light
    flow        optical flow from o_k-1 to o_k (Farneback 2003), in pixels of the half-size image
    """
    x = images.float() / 255
    if kind == "difference":
        x = x - x[:, :1]
    elif kind != "pixels":
        grey = x.unflatten(2, (-1, 3)).mean(3)                                        # (B, n+1, V, H, W)
        x = oriented_gradients(grey) if kind == "features" else F.pad(optical_flow(grey), [0] * 6 + [1, 0])
    return x[:, :1], x[:, 1:]


def oriented_gradients(grey):
    """Normalised histograms of the gradient's orientation, 9 bins per cell: (B, T, V, H, W) in [0, 1] ->
    (B, T, 9V, H/4, W/4)."""
    x = F.pad(grey.flatten(0, 2)[:, None], (1, 1, 1, 1), mode="replicate")            # (B*T*V, 1, H+2, W+2)
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    # Shifted by a quarter of a bin: upright edges would lie on the border of the first and the last bin.
    bins = ((torch.atan2(dy, dx) / math.pi * 9 + 0.25) % 9).long().clamp(max=8)       # (B*T*V, 1, H, W)
    votes = (F.one_hot(bins[:, 0], 9).movedim(-1, 1) * torch.hypot(dx, dy)).contiguous()    # (B*T*V, 9, H, W)
    cells = F.avg_pool2d(votes, 4)                                                    # (B*T*V, 9, H/4, W/4)
    cells = cells / (cells.norm(dim=1, keepdim=True) + 0.05)                          # flat cells stay near 0
    return cells.unflatten(0, grey.shape[:3]).flatten(2, 3)


def optical_flow(grey):
    """Flow from each frame to the next: (B, n+1, V, H, W) in [0, 1] -> (B, n, 2V, H/2, W/2), x and y in
    pixels of the half-size image. OpenCV computes it on the CPU."""
    half = F.avg_pool2d(grey.flatten(0, 2)[:, None], 2)[:, 0].unflatten(0, grey.shape[:3])
    half = (255 * half).to("cpu", torch.uint8).numpy()                                # (B, n+1, V, H/2, W/2)
    flow = [[[cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 9, 3, 5, 1.1, 0)
              for before, after in zip(*pair)] for pair in zip(clip, clip[1:])] for clip in half]
    return torch.from_numpy(np.array(flow)).to(grey.device).movedim(-1, 3).flatten(2, 3)


def image_channels(size, image_size):
    """Channels of the convolutions that reduce an image to 4 x 4, one entry per layer."""
    if image_size not in (16, 32, 64, 128):
        raise InputError(f"the world model takes images of 16, 32, 64 or 128 pixels, got {image_size}")
    layers = int(math.log2(image_size)) - 2
    # DreamerV3's multipliers for 64 pixels. ASSUMPTION: one more, thin layer for 128 (the paper is silent).
    return [WORLD_MODEL_SIZES[size]["depth"] * m for m in (1, 2, 3, 4, 4)[-layers:]]


def convolutions(layer, channels):
    """Layers between these numbers of channels, each of which halves (nn.Conv2d) or doubles
    (nn.ConvTranspose2d) height and width -> list of modules."""
    modules = []
    for c_in, c_out in zip(channels, channels[1:]):
        # ASSUMPTION: norm over channels and pixels (DreamerV3: over a pixel's channels), because it is fast.
        modules += [layer(c_in, c_out, 4, 2, 1, bias=False), nn.GroupNorm(1, c_out), nn.SiLU()]
    return modules


class WorldModel(nn.Module):
    """Predicts o_t+1 ... o_t+n from o_t and n actions: an RSSM with a convolutional encoder and decoder.

    It takes any actions (B, n, Z): latent, true, shuffled or zero. The first state is the posterior of o_t,
    or zero without the context frame. Every action has an effect, also the first one.
    UPSTREAM: the release starts at o_t+1 and zeroes the first action, so z_t has no effect. It copies the
    actions with torch.tensor(), which detaches them, so no gradient reaches its policy.

    config, plain data: size, context_frame, gate, target, predict, motion_weight, free_bits and decode_steps
    as in `python pretrain.py --help`; image_size; action_dim Z; views V, which are concatenated as channels;
    dyn_scale and rep_scale, the weights of the KL that trains the prior and of the one that trains the
    posterior (DreamerV3 and the release: 0.5 and 0.1).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = WORLD_MODEL_SIZES[config["size"]]
        channels = image_channels(config["size"], config["image_size"])
        embed, feature = 16 * channels[-1], size["deter"] + size["stoch"] * size["classes"]
        self.encoder = nn.Sequential(*convolutions(nn.Conv2d, [3 * config["views"], *channels]), nn.Flatten(),
                                     nn.Linear(embed, size["hidden"], bias=False))
        self.rssm = RSSM(size, config["action_dim"])
        c_out, halved = TARGETS[config["target"]]
        if halved >= len(channels):
            raise InputError(f"images of {config['image_size']} pixels are too small for --target "
                             f"{config['target']}: use larger images, or --target pixels")
        self.decoder_in, channels = nn.Linear(feature, embed), channels[::-1][:len(channels) - halved]
        self.gate = config["gate"] and config["context_frame"]              # the gate copies from o_t
        self.decoder = nn.Sequential(*convolutions(nn.ConvTranspose2d, channels), nn.ConvTranspose2d(
            channels[-1], (c_out + self.gate) * config["views"], 4, 2, 1))
        self.to(memory_format=torch.channels_last)                          # twice as fast on a CPU

    def embed(self, images):
        """(B, T, 3V, H, W) uint8 -> (B, T, hidden)."""
        x = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).float().div_(255).sub_(0.5)
        return self.encoder(x).unflatten(0, images.shape[:2])

    def decode(self, state, still):
        """(Eq. 4)  state of (B, k, D) and (B, k, S, K), still (B, 1, C, h, w) -> (B, k, C, h, w), both as
        in targets().

        DEVIATION: a gate in [0, 1] per pixel and view chooses between what is drawn and the still video. The
        small state then need not store the background, which would come out blurred.
        """
        features = torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)        # (..., D + S*K)
        x = self.decoder_in(features.flatten(0, -2)).unflatten(-1, (4, 4, -1)).permute(0, 3, 1, 2)
        x = self.decoder(x).to(torch.float32, memory_format=torch.contiguous_format)
        x = x.unflatten(0, features.shape[:2]).unflatten(2, (self.config["views"], -1))
        # x (B, k, V, channels of a view and gate, h, w)
        drawn = x[:, :, :, :TARGETS[self.config["target"]][0]]
        drawn = drawn.sigmoid() if self.config["target"] == "pixels" else drawn
        if self.gate:
            drawn = torch.lerp(still.unflatten(2, drawn.shape[2:4]), drawn, x[:, :, :, -1:].sigmoid())
        return drawn.flatten(2, 3)

    def context(self, embed):
        """The first state: o_t (B, hidden) -> its posterior; without a context frame h = 0, s = 0."""
        size, rssm = WORLD_MODEL_SIZES[self.config["size"]], self.rssm
        deter = torch.zeros(len(embed), size["deter"], device=embed.device)
        log_probs = rssm.posterior(deter, embed)
        seen = self.config["context_frame"]
        stoch = sample_straight_through(log_probs) if seen else torch.zeros_like(log_probs)
        return {"deter": deter, "stoch": stoch, "log_probs": log_probs}

    def observe(self, images, actions, imagine=False):
        """(B, n+1, 3V, H, W) uint8, (B, n, Z) -> the first state (B, ...) and states of o_t+1 ... o_t+n:
        (B, n, ...) posteriors, which see each frame; with imagine=True (2B, n, ...), then priors."""
        frames, n = images.shape[1], actions.shape[1]
        assert frames == n + 1, f"{frames} frames need {frames - 1} actions, got {n}"
        embed = self.embed(images)
        start, kinds = self.context(embed[:, 0]), 2 if imagine else 1
        states = {k: torch.cat([v] * kinds) for k, v in start.items()}
        return start, self.rssm.unroll(states, torch.cat([actions] * kinds), embed[:, 1:])

    def imagine(self, state, actions):
        """Open loop, no frame is seen: first state (B, ...), (B, n, Z) -> priors (B, n, ...)."""
        return self.rssm.unroll(state, actions, embed=actions.new_zeros(0, actions.shape[1], 1))

    def loss(self, images, actions, is_pad):
        """(Eq. 5): total() averaged over the valid steps -> scalar, {name: scalar} for the log.

        images  (B, n+1, 3V, H, W) uint8   o_t ... o_t+n
        actions (B, n, Z)                  with gradient: here the world model teaches the policy
        is_pad  (B, n) bool                steps not to count: o_k+1 repeats the last frame of the episode
        """
        terms = self.losses(images, actions, self.config["predict"], self.config["decode_steps"])
        logs = {name: masked_mean(term, is_pad).detach() for name, term in terms.items() if name != "still"}
        return masked_mean(self.total(terms), is_pad), logs

    def total(self, terms):
        """Weighted sum of the terms, per step: {name: (B, n)} from losses() -> (B, n)."""
        free_bits, dyn, rep = (self.config[name] for name in ("free_bits", "dyn_scale", "rep_scale"))
        left_out = {"posterior": "open_loop", "prior": "recon", "both": None}[self.config["predict"]]
        # (Eq. 5)  L = mean_k [ |o_k - ^o_k|^2
        #              + dyn max(free, KL[sg(q) || p]) + rep max(free, KL[q || sg(p)]) ]
        # sg: stop gradient, free: free bits. losses() explains the terms that are not in the paper.
        kl = dyn * terms["kl_dyn"].clamp(min=free_bits) + rep * terms["kl_rep"].clamp(min=free_bits)
        return kl + sum(terms[name] for name in ("context", "recon", "open_loop")
                        if name in terms and name != left_out)

    def losses(self, images, actions, predict, decode_steps):
        """Every term of the loss, per step: images and actions as in loss() -> {name: (B, n)}.

        predict and decode_steps are those of the config in training; a report may ask for more.
        recon, open_loop   squared error of the frames decoded from posteriors and from priors, weighted
        context            squared error of o_t decoded from its posterior (the same number at every step)
        kl_dyn, kl_rep     KL of posterior and prior, with the gradient of the prior or of the posterior
        open_loop_plain, still   for reports, without weight: open_loop, and the error of a still video
        """
        b, n = actions.shape[:2]
        decode_steps = min(n, decode_steps or n)
        # DEVIATION: by default frames are decoded from priors. A posterior has seen the frame and can be
        # decoded without the action; then only the KL depends on the action, and only above the free bits.
        start, states = self.observe(images, actions, imagine=predict != "posterior")
        chosen = torch.randperm(n, device=images.device)[:decode_steps]               # m frames to decode
        still, future = targets(images, self.config["target"])
        future = future[:, chosen]                                                    # (B, m, C, h, w)
        # DEVIATION: pixels that differ from a still video weigh more, since most pixels are background.
        moved = (future - still).abs().unflatten(2, (self.config["views"], -1))       # (B, m, V, c, h, w)
        weight = 1 + self.config["motion_weight"] * moved.mean(3, keepdim=True).expand_as(moved).flatten(2, 3)

        def per_step(error):            # (..., B, m, C, h, w) -> (..., B, n): 0 for frames not decoded
            error = error.sum((-3, -2, -1)) * (n / decode_steps)            # expectation: all n decoded
            return error.new_zeros(*error.shape[:-1], n).index_copy(-1, chosen, error)

        # One call decodes o_t, the frames of the posteriors and those of the priors.
        kinds = [slice(0, b)] * (predict != "prior") + [slice(-b, None)] * (predict != "posterior")
        rows = {k: torch.cat([start[k][:, None], *(states[k][kind, chosen] for kind in kinds)], 1)
                for k in ("deter", "stoch")}
        decoded = self.decode(rows, still)                                  # (B, 1 + kinds * m, C, h, w)
        errors = (torch.stack(decoded[:, 1:].chunk(len(kinds), 1)) - future) ** 2     # (kinds, B, m, C, h, w)
        weighted = per_step(weight * errors)                                # (kinds, B, n)

        terms = {"still": per_step((still - future) ** 2)}
        if self.config["context_frame"]:
            # ASSUMPTION: o_t is decoded as well, as DreamerV3 decodes every frame. The state then holds the
            # scene, and the latent actions only have to say what changes.
            error = (decoded[:, 0] - still[:, 0]) ** 2                                # (B, C, h, w)
            terms["context"] = error.sum((1, 2, 3))[:, None].expand(-1, n)
        if predict != "prior":
            terms["recon"] = weighted[0]
        if predict != "posterior":
            terms["open_loop"], terms["open_loop_plain"] = weighted[-1], per_step(errors[-1].detach())
        post = states["log_probs"][:b]                                                # (B, n, S, K)
        prior = self.rssm.prior(states["deter"][:b])
        terms["kl_dyn"] = kl_categorical(post.detach(), prior)
        terms["kl_rep"] = kl_categorical(post, prior.detach())
        return terms

    def picture(self, prediction, first):
        """A prediction of the main view as a visible image: (B, ..., C, h, w), o_t (B, 3, H, W) in [0, 1] ->
        (B, ..., 3, H, W) in [0, 1]. Features become edge strength; flow becomes red (x) and green (y)."""
        kind, main = self.config["target"], TARGETS[self.config["target"]][0]
        x = prediction[..., :main, :, :]
        if kind == "difference":
            x = x + first[:, None]
        elif kind == "features":
            x = x.norm(dim=-3, keepdim=True).expand(*x.shape[:-3], 3, -1, -1)
        elif kind == "flow":
            x = F.pad(x, (0, 0, 0, 0, 0, 1)) / 8 + 0.5
        return F.interpolate(x.flatten(0, -4), first.shape[-2:]).unflatten(0, x.shape[:-3]).clamp(0, 1)


class InverseDynamics(nn.Module):
    """Latent action z_k from the frames around it, o_k and o_k+1, as in LAPA (Ye et al. 2024): the paper's
    comparison (Table III). A policy must then learn to predict these latent actions without the future.
    config: the world model's. Each dimension is standardised over batch and steps, padded ones included, and
    bounded by a tanh."""

    def __init__(self, config):
        super().__init__()
        channels = image_channels(config["size"], config["image_size"])
        self.encoder = nn.Sequential(*convolutions(nn.Conv2d, [6 * config["views"], *channels]), nn.Flatten())
        self.out = nn.Linear(16 * channels[-1], config["action_dim"], bias=False)
        self.norm = BatchNorm(config["action_dim"], affine=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """(B, n+1, 3V, H, W) uint8 -> (B, n, Z) in (-1, 1)."""
        x = images.float() / 255 - 0.5
        pairs = torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)                     # (B*n, 6V, H, W)
        z = self.out(self.encoder(pairs.contiguous(memory_format=torch.channels_last)))
        return torch.tanh(self.norm(z)).unflatten(0, (len(images), -1))


def shuffled_within(groups, generator):
    """Random permutation that gives each row another row of its own group: groups (B,) int -> index (B,) int,
    has another row (B,) bool."""
    index, paired = torch.arange(len(groups)), torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        index[rows], paired[rows] = rows.roll(1), len(rows) > 1
    return index, paired


# ---- chunk execution --------------------------------------------------------------------------------------


class ActionChunker:
    """Turns chunks of n actions into one action per control step. Call reset() before every episode.

    execute = h     ask the policy every h steps and execute the first h actions of the chunk, open loop
    execute = 0     ask at every step and average all chunks that cover it (temporal ensembling, as in ACT and
                    BAKU), with weights exp(-decay * i), i = 0 for the oldest. UPSTREAM: decay 0
    """

    def __init__(self, chunk, execute=0, decay=0.01):
        if not 0 <= execute <= chunk:
            raise InputError(f"--execute must be 0 to {chunk}, the policy's chunk length; got {execute}")
        self.execute, self.decay = execute, decay
        self.reset()

    def reset(self):
        self.live = []          # the remaining actions of each active chunk, (<= n, A) each; oldest first

    @property
    def asks(self):
        """Whether the next step() will ask for a chunk, and so needs an observation."""
        return not self.execute or not self.live

    def step(self, ask):
        """-> action (A,). ask() -> (n, A) is called only when a new chunk is needed."""
        if self.asks:
            self.live.append(np.asarray(ask())[:self.execute or None])
        now = np.stack([left[0] for left in self.live])                               # (live chunks, A)
        weights = np.exp(-self.decay * np.arange(len(now)))
        self.live = [left[1:] for left in self.live if len(left) > 1]
        return (weights[:, None] * now).sum(0) / weights.sum()


# ---- linear probe -----------------------------------------------------------------------------------------


def ridge_probe(X, Y, X_test, episode):
    """Linear probe by ridge regression: X (N, dx), Y (N, dy), X_test (M, dx) -> predictions (M, dy).

    Columns are standardised with the training rows, whose episodes are episode (N,). The ridge is chosen by
    5-fold cross-validation over episodes, since the rows of an episode are alike; with one episode it is 1.
    """
    def solve(x, y, ridge):             # w = (x'x + ridge N)^-1 x'y
        return np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)

    std_x, std_y = X.std(0), np.maximum(Y.std(0), 1e-8)
    std_x = np.where(std_x > 1e-8, std_x, np.inf)           # a constant column becomes 0
    x, y = (X - X.mean(0)) / std_x, Y - Y.mean(0)
    episodes, number = np.unique(episode, return_inverse=True)
    folds, ridge, ridges = min(5, len(episodes)), 1.0, (10.0, 1.0, 1e-1, 1e-2, 1e-3)
    if folds > 1:
        fold = np.random.default_rng(0).permutation(len(episodes))[number] % folds    # (N,)
        inside = [fold != k for k in range(folds)]
        errors = [sum((((y[~i] - x[~i] @ solve(x[i], y[i], ridge)) / std_y) ** 2).sum() for i in inside)
                  for ridge in ridges]
        ridge = ridges[int(np.argmin(errors))]
    return (X_test - X.mean(0)) / std_x @ solve(x, y, ridge) + Y.mean(0)


def r_squared(predicted, true):
    """R2 of each column: (N, dy), (N, dy) -> (dy,); nan where `true` is constant."""
    variance = np.where(true.std(0) > 1e-8, true.var(0), np.nan)
    return 1 - ((true - predicted) ** 2).mean(0) / variance


# ---- several processes (torchrun) -------------------------------------------------------------------------


def start_processes(args, rows=1):
    """Join the processes that torchrun started, if it did -> rank, their number, torch.device of this one.

    Each trains on its share of every batch, a multiple of `rows`; rank 0 alone prints, reports and writes.
    Sets the number of threads and the default of args.bf16. InputError when the flags cannot work here.
    """
    launched = dist.is_torchelastic_launched()
    rank, world = (int(os.environ[key]) if launched else 0 for key in ("RANK", "WORLD_SIZE"))
    own_gpu = f":{os.environ['LOCAL_RANK']}" if launched and args.device == "cuda" else ""
    device = pick_device(args.device + own_gpu)
    if args.compile and device.type == "cpu":
        raise InputError("--compile is for GPUs: on a CPU it takes minutes and gains nothing, leave it out")
    if launched and args.batch_size % (rows * world):
        raise InputError(f"--batch-size {args.batch_size} cannot be split over {world} processes: give a "
                         f"multiple of {rows * world}")
    if own_gpu:
        torch.cuda.set_device(device)
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.set_num_threads(args.threads)
    if world > 1:           # an hour, because all others wait while rank 0 writes a report
        dist.init_process_group(timeout=datetime.timedelta(hours=1))
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    return rank, max(1, world), device


def check_agreed(args, free, **more):
    """Wait for all processes. InputError that names the flags, except those in `free`, and further facts in
    which they differ."""
    facts = {**{"--" + k.replace("_", "-"): v for k, v in vars(args).items() if k not in free}, **more}
    everyone = [facts]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, facts)
    names = [name for name in facts if any(other[name] != facts[name] for other in everyone)]
    if names:
        raise InputError(f"the processes differ in {', '.join(names)}: start all with the same flags and "
                         "data and, to resume, with the same last.pt")


def process_mean(x):
    """Mean of a tensor over all processes, without gradient."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def for_training(method, args):
    """A method of a module as training calls it: in bfloat16 and compiled where args ask for that, and
    backward() averages the gradients over all processes. In eval mode it is the method itself."""
    module, call = method.__self__, torch.compile(method) if args.compile else method
    if dist.is_initialized() and any(p.requires_grad for p in module.parameters()):
        holder = nn.Module()            # the engine calls forward()
        holder.module, holder.forward = module, call
        call = DistributedDataParallel(holder, forward_sync_buffers=False)

    def function(*inputs):
        if not module.training:
            return method(*inputs)
        with torch.autocast(next(module.parameters()).device.type, torch.bfloat16, enabled=args.bf16):
            return call(*inputs)
    return function


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows of all processes, in float32: (B, C) -> (B, C). (nn.SyncBatchNorm has no
    form for CPUs.)"""

    @torch.compiler.disable
    def forward(self, x):
        x = x.float()
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = x.new_empty(world, *x.shape)                                           # (processes, B, C)
        dist.all_gather(list(rows), x.detach().contiguous())
        rows[rank] = x
        if rows.requires_grad:          # x is in the statistics of all processes: add their gradients
            rows.register_hook(lambda gradient: world * process_mean(gradient))
        return super().forward(rows.flatten(0, 1)).view_as(rows)[rank]


# ---- run bookkeeping: errors, files, checkpoints, run folders ---------------------------------------------


class InputError(ValueError):
    """The user's input cannot be used. One line: what was expected, what came, what to type."""


def run(main):
    """Call main(). An error that the user can fix becomes one line on stderr and exit status 2 (Ctrl-C: 130).
    Any other exception is a bug and keeps its traceback."""
    try:
        return main()
    except InputError as e:             # of a loader process: its traceback ends with the message
        message, status = str(e).split("InputError: ")[-1], 2
    except KeyboardInterrupt:
        message, status = "interrupted; finished work is kept: continue it with --resume", 130
    except OSError as e:
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message, status = (f"cannot read or write {e.filename or 'a file'}: {e.strerror}; finished work is "
                           "kept: make room or choose another --out, then continue with --resume"), 2
    except RuntimeError as e:
        if "DataLoader worker (pid" in str(e):
            message = "a loader process was killed: if memory or /dev/shm ran out, use fewer --workers"
        elif dist.is_initialized() and re.search("[Cc]onnection|remote|Broken pipe|Timed out", str(e)):
            message = "another process of this run has ended: see its error"
        else:
            raise
        message, status = f"{message}. Finished work is kept: continue with --resume", 2
    if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
        time.sleep(5)       # if rank 0 says the same, torchrun ends this process before it repeats it
        print(file=sys.stderr)                              # rank 0 has left the cursor behind its bar
    for bar in list(getattr(tqdm, "_instances", ())):       # the error is the last line on the screen
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and adds the default to the help text of every option that has
    one, unless the text mentions it itself."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False
        return action.help if none or "default" in action.help else super()._get_help_string(action)


def at_least(args, low, *names):
    """InputError for the first of these flags that is less than `low`; None counts as not given."""
    for name in names:
        if getattr(args, name) is not None and not low <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be {low} or more, got {getattr(args, name)}")


def write_atomically(path, data):
    """Write bytes to path.tmp, then rename it: a reader sees either the old file or the new one. OSError."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    """Write JSON atomically, with sorted keys, so that equal values give equal files."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path):
    """-> the value in a JSON file. InputError when it holds no JSON, OSError when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path} is not a JSON file ({e}): fetch it or make it again") from None


def append_line(path, line):
    """Append a dict to a .jsonl file. The line is on the disk when this returns."""
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_lines(path):
    """-> the lines of a .jsonl file as a list of dicts, empty if there is no file. InputError for a bad line.
    An incomplete last line, which a killed process leaves behind, is removed from the file."""
    raw = Path(path).read_bytes() if Path(path).exists() else b""
    whole = raw[:raw.rfind(b"\n") + 1]
    if whole != raw:
        os.truncate(path, len(whole))
    try:
        return [json.loads(text) for text in whole.splitlines()]
    except ValueError as e:
        raise InputError(f"{path} has a line that is not JSON ({e}): start again with --overwrite") from None


def file_hash(path):
    """-> the first 12 hexadecimal digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def markdown_table(rows):
    """Rows of strings, the first one the heading -> Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain data atomically."""
    buffer = io.BytesIO()                       # torch.save to a file would hide that the disk is full
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """-> dict. InputError when the file is absent or not a checkpoint. Nothing in the file is executed."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}: run the stage before this one, or give its path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["stage"], checkpoint["config"]["text_encoder"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError,
            AttributeError) as e:
        raise InputError(f"{path} is not a checkpoint that this version can read: expected the last.pt of "
                         f"pretrain.py or finetune.py ({type(e).__name__})") from e
    return checkpoint


def load_policy(path, device="cpu", stage=None):
    """-> policy in eval mode, checkpoint. InputError when the weights do not fit or are not finite, or when
    `stage` ("pretrain", "finetune" or None for both) is not the checkpoint's."""
    checkpoint = load_checkpoint(path)
    if stage not in (None, checkpoint["stage"]):
        raise InputError(f"{path} was written by {checkpoint['stage']}.py: give a checkpoint of {stage}.py"
                         + f" (python finetune.py --init {path} makes one)" * (stage == "finetune"))
    broken = [k for k, v in checkpoint["policy"].items() if not v.isfinite().all()]
    if broken:
        raise InputError(f"{path} has NaN or infinity in {len(broken)} tensors (first: {broken[0]}): its "
                         "training diverged, train it again")
    policy = make_policy(checkpoint["config"])
    try:
        policy.load_state_dict(checkpoint["policy"])
    except RuntimeError as e:
        raise InputError(f"{path} does not fit its own config: {' '.join(str(e).split())[:200]}") from e
    return policy.to(device).eval(), checkpoint


def init_from_pretrained(policy, weights, path):
    """Copy pretrained weights into a policy for finetuning -> {"loaded" | "new" | "unused": [names]}.

    Action layers, denoiser, style, cameras and proprioception may be new; action layers, style and latent
    layers may be unused. InputError for anything else, and for tensors of other shapes: another architecture.
    UPSTREAM: the release copies the last layer as well when the widths agree, skips with a warning what does
    not fit, and trains from scratch without a word when the checkpoint cannot be read.
    """
    own = policy.state_dict()
    # What touches actions is never copied: their number and units may differ.
    loaded = [k for k in own if k in weights and not re.search(r"\b(style_)?action_", k)]
    new, unused = [k for k in own if k not in loaded], [k for k in weights if k not in loaded]
    wrong = ([k for k in loaded if own[k].shape != weights[k].shape]
             + [k for k in new if not re.search(r"\b(action|style|noise|camera|proprio)_", k)]
             + [k for k in unused if not re.search(r"\b(action|style|latent)_", k)])
    if wrong:
        theirs, ours = (tuple(w[wrong[0]].shape) if wrong[0] in w else "absent" for w in (weights, own))
        raise InputError(f"{path} has another architecture: {len(wrong)} tensors do not fit; {wrong[0]} is "
                         f"{theirs} in the file, {ours} here (class Policy says how to name layers)")
    policy.load_state_dict({**own, **{k: weights[k] for k in loaded}})
    return {"loaded": loaded, "new": new, "unused": unused}


def check_free(folder, held, args):
    """InputError when the folder is in use (`held`) and args has neither resume nor overwrite."""
    if held and not (args.resume or args.overwrite):
        raise InputError(f"{folder} holds results: --resume continues them, --overwrite replaces them, "
                         "--out names another folder")


def check_same(where, before, now):
    """InputError that names the first setting in which two dicts differ."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_ = (textwrap.shorten(repr(value.get(name)), 60) for value in (before, now))
            raise InputError(f"{where} was made with {name} {was}, now it is {is_}: --resume needs the same "
                             "settings; --overwrite starts again, --out names another folder")


def open_run(args, free):
    """-> the checkpoint in args.out to continue from, or None for a new run. InputError when the folder is in
    use, or when --resume comes with other flags than the run had, except those in `free`. Writes nothing.

    A resumed run equals an uninterrupted one, to the bit on a CPU with the same number of threads. More than
    two processes may add gradients in another order.
    """
    out, last = Path(args.out), Path(args.out) / "last.pt"
    if args.resume and last.exists():
        checkpoint = load_checkpoint(last)
        before, now = ({"--" + k.replace("_", "-"): v for k, v in flags.items() if k not in free}
                       for flags in (checkpoint["args"], vars(args)))
        check_same(last, before, now)
        return checkpoint
    if args.resume and not out.exists():
        raise InputError(f"nothing to resume in {out}: leave --resume out, or name the run with --out")
    check_free(out, last.exists() or (out / "metrics.jsonl").exists(), args)
    return None


def to_numbers(step, metrics):
    """{name: scalar tensor} -> {name: float}, means over all processes. InputError unless they are finite.
    The only place of a step that waits for a GPU."""
    device = metrics["loss"].device         # the norm of no gradient at all is a tensor on the CPU
    values = torch.stack([value.detach().to(device, torch.float32) for value in metrics.values()])
    values = process_mean(values).tolist()
    for name, value in zip(metrics, values):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value} at step {step} or since some steps before: lower --lr or "
                             "--clip. last.pt, if there is one, is from before")
    return dict(zip(metrics, values))


class Log:
    """Metrics of a run: each call prints one line and adds it to metrics.jsonl and to TensorBoard.
    A new run (start = 0) deletes the files of an earlier one, a resumed run the lines after step `start`."""

    def __init__(self, out, start):
        self.path, board = Path(out) / "metrics.jsonl", Path(out) / "tensorboard"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not start:
            (Path(out) / "last.pt").unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            shutil.rmtree(board, ignore_errors=True)
        kept = [json.dumps(line) + "\n" for line in read_lines(self.path) if line["step"] <= start]
        write_atomically(self.path, "".join(kept).encode())
        self.board = SummaryWriter(board, purge_step=start + 1)

    def __call__(self, step, metrics):
        append_line(self.path, {"step": step, **metrics})
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        tqdm.write(f"step {step:6,} | " + " | ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def pick_device(name):
    """Name of a device -> torch.device. InputError when this machine does not have it."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} here ({str(e).splitlines()[0][:80]}): use --device cpu") from e


def to_device(tree, device):
    """Nested dict -> the same with its tensors on the device; instructions, which are words, stay."""
    if isinstance(tree, dict):
        return {k: to_device(v, device) for k, v in tree.items()}
    return tree.to(device, non_blocking=True) if isinstance(tree, torch.Tensor) else tree


def provenance():
    """Where a result comes from: command, commit ("+": with uncommitted changes), versions, machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit or "unknown",
            "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                       f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"}


def policy_numbers(policy, size):
    """The entry of a policy's SIZES. InputError when it has no such size."""
    sizes = POLICIES[policy].SIZES
    if size not in sizes:
        raise InputError(f"--policy-size of {policy} is one of {', '.join(sizes)}, got {size}")
    return sizes[size]


def describe_size(module):
    """-> text: the number of parameters of a module and of each of its parts."""
    total, *parts = [sum(p.numel() for p in m.parameters()) for m in (module, *module.children())]
    named = [f"{name} {number:,}" for (name, _), number in zip(module.named_children(), parts) if number]
    return f"{total:,} parameters ({', '.join(named)})"

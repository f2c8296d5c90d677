"""The models of LAWM (arXiv 2509.18428): policies, and what every stage shares with the others.

    stage 1, pretrain.py  (video, no actions)             stage 2, finetune.py  (few demonstrations)

    o_t, instruction -> [ policy ] -> z_t ... z_t+n-1     o_t, instruction, -> [ policy ] -> a_t ... a_t+n-1
                                       |    (B, n, Z)     proprio            new last layer
    o_t ----------------------> [ world model ] -> o_t+1 ... o_t+n
                                gradients flow back through z into the policy

Policies do not know the world model, which does not know policies. Read in this order:

    1 errors            InputError, run
    2 text              TextEncoder
    3 normalisation     Normalizer
    4 observations      ResNet18FiLM, SpatialSoftmax, TransformerBlock, ObservationTokens
    5 policies          Policy (contract), BAKU, ACT, DiffusionPolicy, POLICIES, make_policy
    6 chunk execution   ActionChunker
    7 checkpoints       save_checkpoint, load_checkpoint, load_policy, init_from_pretrained
    8 runs              open_run, Log, provenance; what both training scripts mean by --resume

Letters: B batch, n chunk length, T frames (= n+1), C H W image, Z latent-action width, A action width, P
proprioception width, L instruction-embedding width, E token width, D deterministic state, S x K stochastic
state (S variables, K classes).

Two things are called z_t in the literature: DreamerV3's stochastic state and LAWM's latent action. Here the
state is `deter` / `stoch`, and the latent action is `latent_actions` (short: z), which inside the world model
is simply `actions`.

`python models.py` prints parameters and FLOPs of every size of every model beside published figures.
"""
import argparse
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
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- 1 errors ---------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave cannot be used; one line: what was expected, what came, what to type."""


def run(main):
    """Call main(); what the user can mend is one line on stderr and exit status 2, all else a traceback."""
    try:
        main()
    except InputError as e:
        sys.exit(_fail(str(e)))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped by the keyboard; finished work is kept, go on with --resume", status=130))
    except OSError as e:
        full = re.search(r"errno = (\d+)", str(e))          # h5py hides the number in its message
        code = e.errno or (int(full.group(1)) if full else None)
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
                        errno.EISDIR, errno.EEXIST, errno.EFBIG):
            raise
        where = f" ({e.filename})" if e.filename else ""
        sys.exit(_fail(f"cannot read or write: {os.strerror(code)}{where}; finished work is kept: "
                       "make room or choose another --out, then go on with --resume"))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, and adds "(default: X)" to every option that has a default, unless
    its help text speaks of the default itself."""

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        if (not action.option_strings or default is None or default is False or default is argparse.SUPPRESS
                or "default" in text):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def _fail(message, status=2):
    for bar in list(getattr(tqdm, "_instances", ())):      # the line stands alone, not behind a progress bar
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# ---- 2 text ----------------------------------------------------------------------------------------------


class TextEncoder:
    """Frozen instruction embedding: list of str -> (len, L) float32 array. Its name travels with the data.

    hash    word uni- and bigrams, hashed with signs into 512 floats: no weights, no download, no synonyms
    minilm  sentence-transformers/all-MiniLM-L6-v2, 384 floats (original BAKU's)
    clip    openai/clip-vit-base-patch32 text tower, 512 floats (UPSTREAM: the release's)
    The last two come through `transformers`, from its cache or the folder that TEXT_ENCODER_FOLDER names.
    """
    HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "clip": "openai/clip-vit-base-patch32"}
    DIM = {"hash": 512, "minilm": 384, "clip": 512}

    def __init__(self, name="hash"):
        if name not in self.DIM:
            raise InputError(f"text encoder is one of {', '.join(self.DIM)}; got {name!r}")
        self.name, self.dim, self.known = name, self.DIM[name], {}
        if self.name == "hash":
            return
        source = os.environ.get("TEXT_ENCODER_FOLDER") or self.HUB[name]
        try:
            from transformers import AutoTokenizer
            if name == "clip":
                from transformers import CLIPTextModelWithProjection as model
            else:
                from transformers import AutoModel as model
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = model.from_pretrained(source).eval()
        except (ImportError, RuntimeError) as e:        # a torchvision that does not fit torch ends here, too
            raise InputError(f"text encoder {name} needs a transformers that loads: pip install transformers "
                             f"({str(e).splitlines()[0][:80]})") from e
        except (OSError, ValueError) as e:
            raise InputError(f"cannot load {source}: download it to a folder and type "
                             f"TEXT_ENCODER_FOLDER=FOLDER before the command "
                             f"({str(e).splitlines()[0]})") from e

    def __call__(self, texts):
        """list of str -> (len, L) float32. Each text is embedded once, by itself, and remembered."""
        for text in texts:
            if text not in self.known:
                self.known[text] = self._embed(text)
        return np.stack([self.known[text] for text in texts])

    def _embed(self, text):
        if self.name == "hash":
            return self._hash(text).astype(np.float32)
        tokens = self.tokenizer([text], truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = self.model(**tokens)
        if self.name == "clip":
            return out.text_embeds[0].float().numpy()
        return F.normalize(out.last_hidden_state.mean(1))[0].numpy()

    def _hash(self, text):
        words = re.findall(r"\w+", text.lower())
        vector = np.zeros(self.dim)
        # No words are a gram of their own: an instruction of zeros would leave the layer behind it untrained.
        for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:])] or [""]:
            code = zlib.crc32(gram.encode())
            vector[code % self.dim] += 1.0 if code >> 31 else -1.0
        return vector / max(np.linalg.norm(vector), 1e-6)


@functools.cache
def text_encoder(name):
    """The one TextEncoder of this name in this process: policies share it, and no checkpoint holds it."""
    return TextEncoder(name)


# ---- 3 normalisation -------------------------------------------------------------------------------------


class Normalizer(nn.Module):
    """Affine map of each dimension's [low, high] to [-1, 1], inside the weights so that it cannot get lost.

    A constant dimension maps to 0 and comes back as its constant. Statistics are the finetuning data's.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("low", -torch.ones(dim))
        self.register_buffer("high", torch.ones(dim))

    def fit(self, statistics):
        """statistics: {"min": (dim,), "max": (dim,)}, as stored in a dataset."""
        self.low.copy_(torch.as_tensor(statistics["min"]))
        self.high.copy_(torch.as_tensor(statistics["max"]))

    def _center_scale(self):
        half = (self.high - self.low) / 2
        return (self.high + self.low) / 2, torch.where(half > 1e-6, half, torch.ones_like(half))

    def normalize(self, x):
        center, scale = self._center_scale()
        return (x - center) / scale

    def unnormalize(self, x):
        center, scale = self._center_scale()
        return torch.where(self.high - self.low > 2e-6, x * scale + center, center.expand_as(x))


# ---- 4 observations --------------------------------------------------------------------------------------


def shrink(frame, size, rule):
    """(H, W, 3) uint8 -> (size, size, 3). squash changes the aspect ratio, crop keeps the centre square.

    UPSTREAM: the release squashes with OpenCV's INTER_LINEAR, which skips pixels and aliases. Here every
    pixel counts (bilinear, antialiased); torch does that four times as fast as OpenCV's INTER_AREA.
    """
    if rule == "crop":
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        frame = frame[top:top + side, left:left + side]
    if frame.shape[:2] != (size, size):
        image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]     # (1, 3, H, W)
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return cv2.merge([plane.numpy() for plane in image[0]])
    return np.ascontiguousarray(frame)


def batch_observations(observations, instructions, policy):
    """Observations of environments -> obs on the policy's device, with only what the policy was made for.

    observations  [{"images": {camera: (H, W, 3) uint8 RGB}, "proprio": (P,), "noise": (n, A), optional}]
    instructions  [str], one per observation
    ASSUMPTION: frames go in as rendered; training frames went through JPEG (quality 95), and those of videos
    that are larger than the policy's images were shrunk from another size than is drawn here.
    """
    device = next(policy.parameters()).device

    def tensor(rows):
        return torch.from_numpy(np.stack(rows)).to(device)

    images = {c: tensor([o["images"][c] for o in observations]).permute(0, 3, 1, 2)   # (B, 3, H, W)
              for c in policy.cameras if all(c in o["images"] for o in observations)}
    obs = {"images": images, "instruction": list(instructions)}
    if policy.config["proprio_dim"]:
        obs["proprio"] = tensor([np.asarray(o["proprio"], np.float32) for o in observations])        # (B, P)
    if "noise" in observations[0]:
        obs["noise"] = tensor([o["noise"] for o in observations])                     # (B, n, A)
    return obs


def random_shift(images, pixels):
    """Augmentation: shift each sample by up to +-pixels, edges repeated. (B, ..., H, W) -> the same; all of a
    sample's frames move together."""
    if not pixels:
        return images
    b, (h, w) = len(images), images.shape[-2:]
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), device=images.device)
    ys = (torch.arange(h, device=images.device) + dy).clamp(0, h - 1)[:, None, :, None]         # (B, 1, H, 1)
    xs = (torch.arange(w, device=images.device) + dx).clamp(0, w - 1)[:, None, None, :]         # (B, 1, 1, W)
    flat = images.reshape(b, -1, h, w)
    rows = torch.arange(b, device=images.device)[:, None, None, None]
    channels = torch.arange(flat.shape[1], device=images.device)[None, :, None, None]
    return flat[rows, channels, ys, xs].view(images.shape)


def colour_jitter(images, strength):
    """Augmentation: brightness, contrast and saturation of each image times 1 +- strength at most, each drawn
    for each image. (B, 3, H, W) uint8 -> the same. UPSTREAM: 0.3 and the hue, too, one draw per batch."""
    if not strength:
        return images
    brightness, contrast, saturation = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1,
                                                                      device=images.device) - 1)
    x = images.float() * brightness
    mean = x.mean((1, 2, 3), keepdim=True)                                            # (B, 1, 1, 1)
    x = mean + contrast * (x - mean)
    grey = x.mean(1, keepdim=True)                                                    # (B, 1, H, W)
    return (grey + saturation * (x - grey)).round().clamp(0, 255).to(torch.uint8)


class FiLMBlock(nn.Module):
    """GroupNorm ResNet block, modulated by the instruction: x <- (1 + gamma) x + beta (Perez et al. 2018)."""

    def __init__(self, c_in, c_out, stride, cond):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        # DEVIATION: GroupNorm, not BatchNorm, whose statistics of video do not hold for demonstrations.
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        self.skip = nn.Identity() if c_in == c_out and stride == 1 else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.GroupNorm(8, c_out))
        self.film = nn.Linear(cond, 2 * c_out)
        nn.init.zeros_(self.film.bias)
        nn.init.normal_(self.film.weight, std=0.02)

    def forward(self, x, cond):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        gamma, beta = self.film(cond)[:, :, None, None].chunk(2, 1)                   # (B', C, 1, 1) each
        return F.relu(self.skip(x) + (1 + gamma) * y + beta)


class SpatialSoftmax(nn.Module):
    """Feature maps -> expected coordinates, one (x, y) in [-1, 1] per channel: (B, C, H, W) -> (B, 2C)."""

    def forward(self, x):
        b, c, h, w = x.shape
        p = x.flatten(2).softmax(-1).view(b, c, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        return torch.cat([(p.sum(2) * xs).sum(-1), (p.sum(3) * ys).sum(-1)], 1)       # (B, 2C)


class ResNet18FiLM(nn.Module):
    """The first half of ResNet-18 (stem, stages 1 and 2) with FiLM, then spatial softmax -> one token.

    UPSTREAM: the release keeps these two stages; the whole network alone has 11M parameters, not BAKU's 7M.
    DEVIATION: no ImageNet weights: nothing here needs a download. Below 128 pixels the stem's max-pooling is
    left out, so that the last feature map has 16 x 16 cells or more: localisation decides grasping.
    """

    def __init__(self, image_size, channels, width):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.stem_norm = nn.GroupNorm(8, channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if image_size >= 128 else nn.Identity()
        self.blocks = nn.ModuleList([
            FiLMBlock(channels, channels, 1, width), FiLMBlock(channels, channels, 1, width),
            FiLMBlock(channels, 2 * channels, 2, width), FiLMBlock(2 * channels, 2 * channels, 1, width)])
        self.keypoints = SpatialSoftmax()
        self.out = nn.Linear(4 * channels, width)
        self.to(memory_format=torch.channels_last)

    def forward(self, images, cond):
        """images (B, 3, H, W) uint8, cond (B, E) -> (B, E)."""
        mean = images.new_tensor([0.485, 0.456, 0.406], dtype=torch.float32)[:, None, None]
        std = images.new_tensor([0.229, 0.224, 0.225], dtype=torch.float32)[:, None, None]
        x = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        x = self.pool(F.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x, cond)
        return self.out(self.keypoints(x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP. No bias on queries and keys: a key's bias has no gradient at all."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = mlp(width, dropout)

    def forward(self, x, seen=None):
        """x (B, T, E); seen (B, T) bool: which tokens are looked at, None = all."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        y = attention(q, k, v, self.heads, self.dropout * self.training, seen)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(TransformerBlock):
    """The same with attention to a memory in between: (B, T, E), (B, M, E) -> (B, T, E)."""

    def __init__(self, width, heads, dropout):
        super().__init__(width, heads, dropout)
        self.norm_x, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.cross_out = nn.Linear(width, width)

    def forward(self, x, memory):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        y = attention(q, k, v, self.heads, self.dropout * self.training)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        q, (k, v) = self.q(self.norm_x(x)), self.kv(self.norm_memory(memory)).chunk(2, -1)
        y = attention(q, k, v, self.heads, self.dropout * self.training)
        x = x + F.dropout(self.cross_out(y), self.dropout, self.training)
        return x + self.mlp(self.norm2(x))


def mlp(width, dropout):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                         nn.Dropout(dropout))


def attention(q, k, v, heads, dropout, seen=None):
    """Attention of several heads: q (B, T, E), k and v (B, M, E), seen (B, M) bool -> (B, T, E)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, heads, T | M, E/h)
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


class ObservationTokens(nn.Module):
    """Preprocessed obs -> tokens (B, tokens, E): [instruction, one per camera, proprio if any].

    One ResNet sees all images, told apart by a camera embedding; the instruction modulates it (FiLM) and is a
    token of its own. By position, not by name: camera 0 is the main view in every dataset.
    """

    def __init__(self, config):
        super().__init__()
        width = config["width"]
        self.cameras, self.dropout = list(config["cameras"]), config["proprio_dropout"]
        self.instruction_encoder = nn.Linear(TextEncoder.DIM[config["text_encoder"]], width)
        self.image_encoder = ResNet18FiLM(config["image_size"], config["channels"], width)
        self.camera_embedding = nn.ParameterList([nn.Parameter(0.02 * torch.randn(width))
                                                  for _ in self.cameras])
        if config["proprio_dim"]:
            self.proprio_encoder = nn.Sequential(nn.Linear(config["proprio_dim"], width), nn.ReLU(),
                                                 nn.Linear(width, width))

    def forward(self, obs):
        instruction = self.instruction_encoder(obs["instruction"])                    # (B, E)
        b = len(instruction)
        images = torch.cat([obs["images"][c] for c in self.cameras])                  # (cameras*B, 3, H, W)
        seen = self.image_encoder(images, instruction.repeat(len(self.cameras), 1))   # (cameras*B, E)
        tokens = [instruction] + [x + e for x, e in zip(seen.split(b), self.camera_embedding)]
        if hasattr(self, "proprio_encoder"):
            proprio = self.proprio_encoder(obs["proprio"])
            if self.training and self.dropout:
                # Whole token, per sample: else the policy dead-reckons from its own pose and stops looking.
                keep = torch.rand(b, 1, device=proprio.device) >= self.dropout
                proprio = proprio * keep
            tokens.append(proprio)
        return torch.stack(tokens, 1)


# ---- 5 policies ------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Contract of every policy: latent_actions(obs), loss(batch), act(obs).

    obs = {"images": {camera: (B, 3, H, W) uint8}, "instruction": [B str], "proprio": (B, P)}
    What a dataset lacks is absent from obs: never zeros, never a second copy of the same camera. "noise" (B,
    n, A) may be there, too: what a policy that draws at random draws, so that a rollout can be repeated.

    A subclass writes __init__(config) and features(obs) -> (B, E); layers up to the latent actions and the
    actions, losses and units are here. One whose features are (B, n, E), a row for each action, says
    PER_STEP = True. Whoever does all this in another way, as Diffusion Policy, overrides the three methods.

    config is plain data and makes the policy again (make_policy): policy, cameras, image_size, chunk,
    text_encoder, proprio_dim (or None), action_dim, latent_dim, latent_norm, proprio_dropout, head, and the
    subclass's own SIZES. Names say what stage 2 may add to a pretrained policy (action_*, proprio_*,
    camera_*, style_*) and what it may drop (latent_*); all else must fit. head says what the last layer is:
        latent  (B, n, Z) latent actions for the world model (stage 1)
        action  (B, n, A) actions (stage 2, the paper's choice "reinit": a new last layer)
        add     a new layer from the latent actions to actions (stage 2, the paper's other strategy)
    """

    SIZES = {}          # name -> what it adds to config; "width" is E
    CHUNK = 10          # n, by default
    EXECUTE = 0         # actions of a chunk that are executed before the next look; 0: temporal ensembling
    EMA = 0.0           # decay of the averaged weights that are evaluated; 0: the last weights
    PER_STEP = False
    STD = 0.1           # of the action likelihood, in normalised units (UPSTREAM and BAKU: fixed, not learnt)

    def __init__(self, config):
        super().__init__()
        self.config = config
        text_encoder(config["text_encoder"])            # a missing download is an error now, not in training
        self.chunk, self.cameras = config["chunk"], list(config["cameras"])
        if config["head"] in ("latent", "add"):
            latents = self.chunk * config["latent_dim"]
            self.latent_norm = (nn.BatchNorm1d(latents, affine=False) if config["latent_norm"]
                                else nn.Identity())
        if config["head"] in ("action", "add"):
            self.action_norm = Normalizer(config["action_dim"])
        if config["proprio_dim"]:
            self.proprio_norm = Normalizer(config["proprio_dim"])
        self.last_layers(config["head"], config["latent_dim"], config["action_dim"])

    def last_layers(self, head, latent, action):
        """The paper's "last layer": latent_out or action_out. All before it is kept from stage to stage."""
        width, rows = self.config["width"], 1 if self.PER_STEP else self.chunk
        if head in ("latent", "add"):           # BatchNorm takes a bias out again: none here
            self.latent_out = nn.Linear(width, rows * latent, bias=not self.config["latent_norm"])
        if head in ("action", "add"):
            self.action_out = nn.Linear(width if head == "action" else rows * latent, rows * action)

    def features(self, obs):
        """obs -> (B, E), or (B, n, E) with PER_STEP."""
        raise NotImplementedError

    def check(self, obs):
        """Compare what came with what the policy was made for. InputError"""
        missing = [c for c in self.cameras if c not in obs["images"]]
        if missing:
            raise InputError(f"policy looks through cameras {self.cameras}, observation has "
                             f"{sorted(obs['images'])}")
        size = obs["images"][self.cameras[0]].shape[-1]
        if size != self.config["image_size"]:
            raise InputError(f"policy was made for {self.config['image_size']}-pixel images, got {size}: "
                             f"prepare the data with --image-size {self.config['image_size']}")
        if self.config["proprio_dim"] and "proprio" not in obs:
            raise InputError("policy was finetuned with proprioception, observation has none")

    def preprocess(self, obs):
        """Raw observation -> what features() takes: words embedded (B, L), proprioception normalised."""
        self.check(obs)
        words = text_encoder(self.config["text_encoder"])(obs["instruction"])         # (B, L)
        obs = {**obs, "instruction": torch.from_numpy(words).to(obs["images"][self.cameras[0]].device)}
        if self.config["proprio_dim"]:
            obs["proprio"] = self.proprio_norm.normalize(obs["proprio"])
        return obs

    def encode(self, obs):
        """The only path from raw observations to the last layer."""
        return self.features(self.preprocess(obs))

    def check_latent(self):
        if self.config["head"] == "action":
            raise InputError("this policy has no latent actions: its last layer is for actions; give a "
                             "checkpoint of pretrain.py")

    def squash(self, z):
        """Into (-1, 1), where the world model takes actions: (B, n, Z) -> (B, n, Z).

        DEVIATION: standardised over the batch before the tanh (latent_norm): latents under a plain tanh
        collapse to a constant or saturate at small scale.
        """
        return torch.tanh(self.latent_norm(z.flatten(1))).view_as(z)

    def latent_actions(self, obs):
        """z_t ... z_t+n-1 from o_t and the instruction alone: obs -> (B, n, Z) in (-1, 1), differentiable
        (Sec. III-A)."""
        self.check_latent()
        return self._latents(self.encode(obs))

    def _latents(self, x):
        return self.squash(self.latent_out(x).view(-1, self.chunk, self.config["latent_dim"]))

    def _mean_action(self, x, bound=torch.tanh):
        """Features -> normalised actions (B, n, A) in (-1, 1)."""
        if self.config["head"] == "add":
            x = self._latents(x) if self.PER_STEP else self._latents(x).flatten(1)
        return bound(self.action_out(x)).view(-1, self.chunk, self.config["action_dim"])

    def loss(self, batch):
        """Negative log-likelihood of the demonstrated actions: batch -> scalar, {name: float} to log besides.

        L = - E log N(a_t:t+n | mu(o_t, instruction), std^2)                                        (Eq. 6)
        batch {"obs", "actions" (B, n, A) in the data's units, "is_pad" (B, n)}; padded steps count nowhere.
        """
        target = self.action_norm.normalize(batch["actions"])
        mu = self._mean_action(self.encode(batch["obs"]))
        nll = 0.5 * ((target - mu) / self.STD) ** 2 + math.log(self.STD * math.sqrt(2 * math.pi))  # (B, n, A)
        loss = masked_mean(nll.mean(-1), batch["is_pad"])
        with torch.no_grad():
            l1 = masked_mean((target - mu).abs().mean(-1), batch["is_pad"])
        return loss, {"l1": l1.item()}

    @torch.no_grad()
    def act(self, obs):
        """Chunk of actions in the environment's units: obs -> (B, n, A). The policy must be in eval mode."""
        assert not self.training, "act() is for rollouts: call policy.eval() first"
        return self.action_norm.unnormalize(self._mean_action(self.encode(obs)))


class BAKU(Policy):
    """BAKU (Haldar et al. 2024) as LAWM uses it: tokens -> transformer -> query token -> chunk of n actions.

    UPSTREAM: causal attention; without history and with the action token last it changes nothing we read.
    """
    SIZES = {"paper": dict(width=256, layers=8, heads=4, channels=64, dropout=0.1),     # about 7M parameters
             "tiny": dict(width=128, layers=3, heads=4, channels=32, dropout=0.1)}      # for two CPU cores

    def __init__(self, config):
        super().__init__(config)
        width = config["width"]
        self.tokens = ObservationTokens(config)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.trunk = nn.Sequential(*[TransformerBlock(width, config["heads"], config["dropout"])
                                     for _ in range(config["layers"])])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(),
                                  nn.Linear(width, width), nn.ReLU())

    def features(self, obs):
        tokens = self.tokens(obs)
        tokens = torch.cat([tokens, self.query.expand(len(tokens), 1, -1)], 1)
        return self.head(self.trunk(tokens)[:, -1])                                   # (B, tokens, E)->(B, E)


class ACT(Policy):
    """ACT (Zhao et al. 2023): n learned queries attend to the observation, each becomes one action.

    Finetuning is a conditional VAE: an encoder sees the demonstrated chunk and says its style (B, style), the
    decoder must rebuild the chunk from observation and style; in rollouts the style is 0, the prior's mean.
    Pretraining has no actions to encode: there the style modules do not exist, and finetuning adds them.
    DEVIATION: the original divides its loss by padded steps, too, and builds seven decoder layers of which
    only the first is ever used; its KL weight of 10 on a mean of n x A errors empties the style (tested).
    One token per camera instead of its whole feature map.
    """
    SIZES = {"paper": dict(width=512, layers=4, decoder_layers=1, heads=8, channels=64, dropout=0.1,
                           style=32),                   # the original's; LAWM's paper has no ACT
             "tiny": dict(width=128, layers=2, decoder_layers=1, heads=4, channels=32, dropout=0.1, style=16)}
    PER_STEP = True

    def __init__(self, config):
        super().__init__(config)
        width, heads, dropout = config["width"], config["heads"], config["dropout"]
        # The evidence bound of a Laplace likelihood of scale 1 is sum |a - ^a| + KL: of the mean, this share.
        self.kl_weight = 1 / (config["chunk"] * (config["action_dim"] or 1))
        self.tokens = ObservationTokens(config)
        self.encoder = nn.ModuleList([TransformerBlock(width, heads, dropout)
                                      for _ in range(config["layers"])])
        self.queries = nn.Parameter(0.02 * torch.randn(config["chunk"], width))
        self.decoder = nn.ModuleList([DecoderBlock(width, heads, dropout)
                                      for _ in range(config["decoder_layers"])])
        self.norm = nn.LayerNorm(width)
        if config["head"] != "latent":
            self.style_action_in = nn.Linear(config["action_dim"], width)
            self.style_token = nn.Parameter(0.02 * torch.randn(width))
            self.style_places = nn.Parameter(0.02 * torch.randn(config["chunk"], width))
            self.style_encoder = nn.ModuleList([TransformerBlock(width, heads, dropout)
                                                for _ in range(config["layers"])])
            self.style_out = nn.Linear(width, 2 * config["style"])
            self.style_in = nn.Linear(config["style"], width, bias=False)             # style 0: no change

    def features(self, obs, style=None):
        tokens = self.tokens(obs)                                                     # (B, tokens, E)
        if style is not None:
            tokens = torch.cat([tokens, self.style_in(style)[:, None]], 1)
        elif hasattr(self, "style_in"):
            tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
        for block in self.encoder:
            tokens = block(tokens)
        x = self.queries.expand(len(tokens), -1, -1)                                  # (B, n, E)
        for block in self.decoder:
            x = block(x, tokens)
        return self.norm(x)

    def infer_style(self, obs, actions, is_pad):
        """q(style | o_t, a_t ... a_t+n-1): normalised (B, n, A), (B, n) -> mean, log variance (B, style)."""
        instruction = self.tokens.instruction_encoder(obs["instruction"])[:, None]    # (B, 1, E)
        tokens = torch.cat([self.style_token.expand(len(actions), 1, -1), instruction,
                            self.style_action_in(actions) + self.style_places], 1)    # (B, 2 + n, E)
        seen = torch.cat([torch.ones_like(is_pad[:, :1])] * 2 + [~is_pad], 1)         # padding is not seen
        for block in self.style_encoder:
            tokens = block(tokens, seen)
        return self.style_out(tokens[:, 0]).chunk(2, -1)

    def _mean_action(self, x):
        """Without a tanh, as the original: L1 of a gripper that is mostly shut drives a tanh so far that it
        passes no gradient any more, and the gripper never learns to open. Bounded only when it acts."""
        mean = super()._mean_action(x, bound=lambda y: y)
        return mean if self.training else mean.clamp(-1, 1)

    def loss(self, batch):
        """L1 of the valid steps + weight * KL(q(style) || N(0, I)): batch -> scalar, {name: float}."""
        target, obs = self.action_norm.normalize(batch["actions"]), self.preprocess(batch["obs"])
        mean, log_var = self.infer_style(obs, target, batch["is_pad"])
        style = mean + (log_var / 2).exp() * torch.randn_like(mean)
        predicted = self._mean_action(self.features(obs, style))
        error = (target - predicted).abs().mean(-1)                                   # (B, n)
        l1 = masked_mean(error, batch["is_pad"])
        kl = 0.5 * (mean ** 2 + log_var.exp() - 1 - log_var).sum(-1).mean()
        return l1 + self.kl_weight * kl, {"l1": l1.item(), "style_kl": kl.item()}


class DiffusionPolicy(Policy):
    """Diffusion Policy (Chi et al. 2023): a conditional 1-D U-Net takes noise out of a chunk of n actions.

    Noised at step tau of 100: x = sqrt(ab) a + sqrt(1 - ab) e, where ab = alpha_bar(tau), squared cosine.
    DEVIATION: the U-Net says v = sqrt(ab) e - sqrt(1 - ab) a (Salimans and Ho 2022), from which follow
        ^e = sqrt(1 - ab) x + sqrt(ab) v     the noise of (Eq. 7)
        ^a = sqrt(ab) x - sqrt(1 - ab) v     the clean chunk
    Saying e itself, it must first learn to copy x, and ^a divides by sqrt(ab) = 0.0005 at the first step.

    The latent action is ^a of one call on pure noise, at tau = 99: what the sampler first thinks. UPSTREAM:
    x - ^e of one call, without a bound. Then, as in every policy, standardised over the batch and tanh. The
    noise is drawn anew at every call in training; in eval mode it is obs["noise"], else always the same, so
    that z_std is that of observations. (Unrolling the whole sampler instead was measured to be worse.)
    """
    SIZES = {"paper": dict(width=256, channels=64, down=(256, 512, 1024), step_width=256),
             "tiny": dict(width=128, channels=32, down=(32, 64, 128), step_width=32)}
    CHUNK, EXECUTE, EMA = 16, 8, 0.9999       # original: executes 8 of 16. UPSTREAM: averages live chunks
    STEPS, SAMPLER_STEPS, DRAWS = 100, 10, 8

    def __init__(self, config):
        super().__init__(config)
        shortest = 2 ** (len(config["down"]) - 1)
        if self.chunk % shortest:
            raise InputError(f"the U-Net halves a chunk {len(config['down']) - 1} times: --chunk takes "
                             f"multiples of {shortest}, got {self.chunk}")
        self.tokens = ObservationTokens(config)
        # A concatenation and a linear layer are a sum of linear layers, one per part: so written, a further
        # camera in stage 2 is a further layer, and those that there are keep their weights.
        width = config["width"]
        self.camera_mix = nn.ModuleList([nn.Linear(width, width) for _ in self.cameras])
        if config["proprio_dim"]:
            self.proprio_mix = nn.Linear(width, width)
        self.step_encoder = nn.Sequential(nn.Linear(config["step_width"], 4 * config["step_width"]),
                                          nn.Mish(),
                                          nn.Linear(4 * config["step_width"], config["step_width"]))
        self.unet = UNet1D(config["down"], config["step_width"] + 2 * width)
        # squared cosine: alpha_bar(tau) = cos^2((tau / T + 0.008) / 1.008 * pi / 2), betas capped at 0.999
        ab = [math.cos((t / self.STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(self.STEPS + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(ab, ab[1:])])
        self.register_buffer("alpha_bar", (1 - betas).cumprod(0), persistent=False)              # (T,)

    def last_layers(self, head, latent, action):
        """ASSUMPTION: "last layer" means both ends of the U-Net, which meet latent actions or actions."""
        first = self.config["down"][0]
        if head in ("latent", "add"):
            self.latent_in, self.latent_out = nn.Linear(latent, first), nn.Linear(first, latent)
        if head in ("action", "add"):
            inner = first if head == "action" else latent
            self.action_in, self.action_out = nn.Linear(action, inner), nn.Linear(inner, action)

    def features(self, obs):
        """obs -> (B, 2E): sum over cameras and proprioception, beside the instruction."""
        instruction, *rest = self.tokens(obs).unbind(1)
        layers = [*self.camera_mix, *([self.proprio_mix] if self.config["proprio_dim"] else [])]
        return torch.cat([sum(layer(x) for layer, x in zip(layers, rest)), instruction], -1)

    def noise(self, obs, width):
        """Standard normal (B, n, width); in eval mode obs["noise"], else the same for every row and call."""
        b, device = len(obs["instruction"]), self.alpha_bar.device
        if self.training:
            return torch.randn(b, self.chunk, width, device=device)
        if "noise" in obs:
            return obs["noise"]
        fixed = torch.randn(self.chunk, width, generator=torch.Generator().manual_seed(0))
        return fixed.to(device).expand(b, -1, -1)

    def velocity(self, x, tau, condition, latent=False):
        """v(x, tau, o): x (B, n, A or Z), tau (B,), condition (B, 2E) -> (B, n, A or Z)."""
        half = self.config["step_width"] // 2
        angles = tau[:, None] * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(
            half, device=x.device))                                                   # (B, step_width / 2)
        step = self.step_encoder(torch.cat([angles.sin(), angles.cos()], -1))
        add = self.config["head"] == "add"
        if not latent:
            x = self.action_in(x)
        if latent or add:
            x = self.latent_in(x)
        x = self.unet(x.transpose(1, 2), torch.cat([step, condition], -1)).transpose(1, 2)  # (B, n, first)
        if latent or add:
            x = self.latent_out(x)
        return x if latent else self.action_out(x)

    def split(self, x, tau, velocity):
        """x, tau (B,), v -> clean chunk ^a, noise ^e, all (B, n, A or Z)."""
        ab = self.alpha_bar[tau][:, None, None]
        return ab.sqrt() * x - (1 - ab).sqrt() * velocity, (1 - ab).sqrt() * x + ab.sqrt() * velocity

    def sample(self, x, steps, velocity):
        """DDIM (Song et al. 2021): noise x (B, n, A) -> chunk in [-1, 1]. velocity(x, tau (B,)) -> v.

        x <- sqrt(ab') ^a + sqrt(1 - ab') ^e, ab' = alpha_bar of the next step; ^a is clipped to [-1, 1]
        """
        taus = torch.linspace(self.STEPS - 1, 0, steps).round().long().tolist()
        for tau, following in zip(taus, [*taus[1:], None]):
            tau = torch.full((len(x),), tau, device=x.device)
            a, noise = self.split(x, tau, velocity(x, tau))
            a = a.clamp(-1, 1)
            if following is None:
                return a
            ab = self.alpha_bar[following]
            x = ab.sqrt() * a + (1 - ab).sqrt() * noise

    def latent_actions(self, obs):
        self.check_latent()
        condition, x = self.encode(obs), self.noise(obs, self.config["latent_dim"])
        tau = torch.full((len(x),), self.STEPS - 1, device=x.device)
        return self.squash(self.split(x, tau, self.velocity(x, tau, condition, latent=True))[0])

    def loss(self, batch):
        """L = E |v - v_theta(sqrt(ab) a + sqrt(1 - ab) e, tau, o)|^2 of the valid steps: batch -> scalar,
        {name: float}. It is E |e - ^e|^2 / ab, so (Eq. 7) with more weight on large noise.

        DEVIATION: DRAWS noises for each observation, which is encoded once: the U-Net costs little beside it.
        """
        a = self.action_norm.normalize(batch["actions"]).repeat(self.DRAWS, 1, 1)     # (DRAWS * B, n, A)
        condition = self.encode(batch["obs"]).repeat(self.DRAWS, 1)                   # (DRAWS * B, 2E)
        tau, noise = torch.randint(self.STEPS, (len(a),), device=a.device), torch.randn_like(a)
        ab = self.alpha_bar[tau][:, None, None]
        x, v = ab.sqrt() * a + (1 - ab).sqrt() * noise, ab.sqrt() * noise - (1 - ab).sqrt() * a
        error = ((v - self.velocity(x, tau, condition)) ** 2).mean(-1)                # (DRAWS * B, n)
        return masked_mean(error, batch["is_pad"].repeat(self.DRAWS, 1)), {}

    @torch.no_grad()
    def act(self, obs):
        assert not self.training, "act() is for rollouts: call policy.eval() first"
        condition = self.encode(obs)
        x = self.sample(self.noise(obs, self.config["action_dim"]), self.SAMPLER_STEPS,
                        lambda x, tau: self.velocity(x, tau, condition))
        return self.action_norm.unnormalize(x)


class FiLMConv(nn.Module):
    """Two convolutions along the chunk with a skip; the condition scales and shifts between them."""

    def __init__(self, c_in, c_out, cond):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(c_in, c_out, 3, padding=1), nn.Conv1d(c_out, c_out, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        self.film = nn.Linear(cond, 2 * c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv1d(c_in, c_out, 1)

    def forward(self, x, cond):
        scale, shift = self.film(F.mish(cond))[..., None].chunk(2, 1)                 # (B, C, 1) each
        y = F.mish(self.norm1(self.conv1(x))) * (1 + scale) + shift
        return F.mish(self.norm2(self.conv2(y))) + self.skip(x)


class UNet1D(nn.Module):
    """(B, down[0], n), (B, cond) -> (B, down[0], n): down by strided convolutions, and up again."""

    def __init__(self, down, cond):
        super().__init__()
        pairs = list(zip((down[0], *down), down))
        self.down = nn.ModuleList([nn.ModuleList([FiLMConv(a, b, cond), FiLMConv(b, b, cond)])
                                   for a, b in pairs])
        self.shrink = nn.ModuleList([nn.Conv1d(c, c, 3, 2, 1) for c in down[:-1]])
        self.middle = nn.ModuleList([FiLMConv(down[-1], down[-1], cond) for _ in range(2)])
        self.up = nn.ModuleList([nn.ModuleList([FiLMConv(2 * b, a, cond), FiLMConv(a, a, cond)])
                                 for a, b in pairs[:0:-1]])
        self.grow = nn.ModuleList([nn.ConvTranspose1d(a, a, 4, 2, 1) for a, _ in pairs[:0:-1]])
        self.out = nn.Sequential(nn.Conv1d(down[0], down[0], 3, padding=1), nn.GroupNorm(8, down[0]),
                                 nn.Mish())

    def forward(self, x, cond):
        kept = []
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, cond)
            kept.append(x)                                                            # (B, C_i, n / 2^i)
            if i < len(self.shrink):
                x = self.shrink[i](x)
        for block in self.middle:
            x = block(x, cond)
        for blocks, grow in zip(self.up, self.grow):
            x = torch.cat([x, kept.pop()], 1)
            for block in blocks:
                x = block(x, cond)
            x = grow(x)
        return self.out(x)


POLICIES = {"baku": BAKU, "diffusion": DiffusionPolicy, "act": ACT}


def make_policy(config):
    """A fresh policy from its plain-data config."""
    return POLICIES[config["policy"]](config)


def masked_mean(x, is_pad):
    """Mean of x (B, n) over the steps that are not padding: the denominator counts valid steps only."""
    assert x.shape == is_pad.shape, (f"values {tuple(x.shape)} and padding {tuple(is_pad.shape)} "
                                     "differ in shape")
    valid = (~is_pad).to(x.dtype)
    return (x * valid).sum() / valid.sum().clamp(min=1)


# ---- world model: sizes and layers --------------------------------------------------------------------------

# DreamerV3's own table (Hafner et al. 2023, App.): 32 categorical variables throughout. Names are those of
# whole agents; what the world model alone has is printed by `python models.py`.
WORLD_MODEL_SIZES = {
    "tiny": dict(deter=256, hidden=128, stoch=32, classes=16, depth=8, blocks=4),     # ours, for laptops
    "1m": dict(deter=512, hidden=64, stoch=32, classes=4, depth=4, blocks=8),
    "12m": dict(deter=2048, hidden=256, stoch=32, classes=16, depth=16, blocks=8),
    "25m": dict(deter=3072, hidden=384, stoch=32, classes=24, depth=24, blocks=8),
    "50m": dict(deter=4096, hidden=512, stoch=32, classes=32, depth=32, blocks=8),    # the paper's
    "100m": dict(deter=6144, hidden=768, stoch=32, classes=48, depth=48, blocks=8),
    "200m": dict(deter=8192, hidden=1024, stoch=32, classes=64, depth=64, blocks=8),
}


class BlockLinear(nn.Module):
    """Block-diagonal linear map: (B, blocks, c_in) -> (B, blocks, c_out). One block: a plain linear layer."""

    def __init__(self, blocks, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, c_in, c_out) / math.sqrt(c_in))
        self.bias = nn.Parameter(torch.zeros(blocks, c_out))

    def forward(self, x):
        return torch.einsum("bgi,gio->bgo", x, self.weight) + self.bias


def dense(c_in, c_out):
    """Linear, RMSNorm, SiLU: the layer of every MLP in DreamerV3."""
    return nn.Sequential(nn.Linear(c_in, c_out), nn.RMSNorm(c_out, eps=1e-4), nn.SiLU())


def unimix(logits, share=0.01):
    """Log-probs with 1 % of the uniform distribution in them: no probability is 0 and KL stays finite."""
    k = logits.shape[-1]
    return torch.log((1 - share) * logits.softmax(-1) + share / k)


def kl_categorical(p, q):
    """KL(p || q) of S independent categoricals given log-probs (..., S, K) -> (...,), in nats."""
    return (p.exp() * (p - q)).sum((-1, -2))


def sample_straight_through(log_probs):
    """One-hot sample forward, gradient of the probabilities backward: (..., S, K) -> (..., S, K)."""
    gumbel = -torch.log(-torch.log(torch.rand_like(log_probs).clamp(1e-9, 1 - 1e-7)))
    one_hot = F.one_hot((log_probs + gumbel).argmax(-1), log_probs.shape[-1]).to(log_probs.dtype)
    probs = log_probs.exp()
    return one_hot + probs - probs.detach()


# ---- world model: the state ---------------------------------------------------------------------------------


class RSSM(nn.Module):
    """Recurrent state-space model of DreamerV3. State {"deter": (B, D), "stoch" and "logits": (B, S, K)}.

    sequence model  h_k+1 = f(h_k, s_k, a_k)         block GRU                 (Eq. 1)
    posterior       s_k ~ q(s_k | h_k, o_k)          sees the frame            (Eq. 2)
    prior           s_k ~ p(s_k | h_k)               must guess it             (Eq. 3)
    """

    def __init__(self, size, embed_dim, action_dim):
        super().__init__()
        deter, hidden, self.blocks = size["deter"], size["hidden"], size["blocks"]
        self.deter, self.stoch, self.classes = deter, size["stoch"], size["classes"]
        flat = self.stoch * self.classes
        self.in_deter, self.in_stoch, self.in_action = (
            dense(deter, hidden), dense(flat, hidden), dense(action_dim, hidden))
        self.hidden = BlockLinear(self.blocks, deter // self.blocks + 3 * hidden, deter // self.blocks)
        self.hidden_norm = nn.RMSNorm(deter, eps=1e-4)
        self.gates = BlockLinear(self.blocks, deter // self.blocks, 3 * deter // self.blocks)
        self.posterior_net = nn.Sequential(dense(deter + embed_dim, hidden), nn.Linear(hidden, flat))
        self.prior_net = nn.Sequential(dense(deter, hidden), dense(hidden, hidden), nn.Linear(hidden, flat))

    def initial(self, batch, device):
        """h = 0, s = 0, before any frame."""
        return {"deter": torch.zeros(batch, self.deter, device=device),
                "stoch": torch.zeros(batch, self.stoch, self.classes, device=device)}

    def sequence(self, state, action):
        """h_k+1 = f(h_k, s_k, a_k) (Eq. 1): state, (B, Z) -> (B, D)."""
        b, deter = len(action), state["deter"]
        # DreamerV3 shrinks actions beyond [-1, 1]; latents are inside by their tanh, raw actions may not be.
        action = action / action.abs().clamp(min=1).detach()
        x = torch.cat([self.in_deter(deter), self.in_stoch(state["stoch"].flatten(1)),
                       self.in_action(action)], -1)
        x = x[:, None].expand(b, self.blocks, -1)                           # every block sees all inputs
        x = torch.cat([deter.view(b, self.blocks, -1), x], -1)              # (B, blocks, D/blocks + 3 hidden)
        x = F.silu(self.hidden_norm(self.hidden(x).flatten(1))).view(b, self.blocks, -1)
        reset, candidate, update = [g.flatten(1) for g in self.gates(x).chunk(3, -1)]  # (B, D) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)                                            # starts by remembering
        return update * candidate + (1 - update) * deter

    def _state(self, deter, logits):
        logits = unimix(logits.view(-1, self.stoch, self.classes))
        return {"deter": deter, "stoch": sample_straight_through(logits), "logits": logits}

    def prior(self, deter):
        """p(s | h) (Eq. 3): (B, D) -> state."""
        return self._state(deter, self.prior_net(deter))

    def posterior(self, deter, embed):
        """q(s | h, o) (Eq. 2): (B, D), (B, embed) -> state."""
        return self._state(deter, self.posterior_net(torch.cat([deter, embed], -1)))


def stack_states(states):
    """List of T states of (B, ...) -> one state of (B, T, ...)."""
    return {k: torch.stack([s[k] for s in states], 1) for k in states[0]}


# ---- world model: what is predicted -------------------------------------------------------------------------

# name: (channels per view, how often height and width are halved). The paper: pixels; features and flow are
# its own future work (Sec. V). None needs a download.
TARGETS = {"pixels": (3, 0), "difference": (3, 0), "features": (9, 2), "flow": (2, 1)}


def targets(images, kind):
    """What o_t+1 ... o_t+n are to be predicted as -> still (B, 1, C, h, w), future (B, n, C, h, w).

    images      (B, n+1, 3V, H, W) uint8, V views; `still` is what a video that stands still would show
    pixels      the frames, in [0, 1]
    difference  o_k - o_t, in [-1, 1]: the scene need not be drawn
    features    histograms of oriented gradients (MaskFeat, Wei et al. 2022): edges, no colours, no light
    flow        optical flow o_k-1 -> o_k (Farneback 2003), in pixels of the half-size picture
    """
    frames = images.float() / 255
    if kind == "pixels":
        return frames[:, :1], frames[:, 1:]
    if kind == "difference":
        return torch.zeros_like(frames[:, :1]), frames[:, 1:] - frames[:, :1]
    grey = frames.unflatten(2, (-1, 3)).mean(3)                                       # (B, n+1, V, H, W)
    if kind == "features":
        cells = oriented_gradients(grey)
        return cells[:, :1], cells[:, 1:]
    flow = optical_flow(grey)
    return torch.zeros_like(flow[:, :1]), flow


def oriented_gradients(grey, cell=4):
    """Histogram over 9 orientations of the gradients in each cell, of length 1 unless the cell is flat:
    (B, T, V, H, W) in [0, 1] -> (B, T, 9V, H/4, W/4)."""
    x = F.pad(grey.flatten(0, 2)[:, None], (1, 1, 1, 1), mode="replicate")            # (B*T*V, 1, H+2, W+2)
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    # A quarter of a bin ahead: upright and level edges, which are many, lie on no border between bins.
    bins = ((torch.atan2(dy, dx) / math.pi * 9 + 0.25) % 9).long().clamp(max=8)       # (B*T*V, 1, H, W)
    strength = torch.hypot(dx, dy)
    votes = torch.zeros_like(strength).expand(-1, 9, -1, -1).clone().scatter_(1, bins, strength)
    cells = F.avg_pool2d(votes, cell)                                                 # (B*T*V, 9, H/4, W/4)
    cells = cells / (cells.norm(dim=1, keepdim=True) + 0.05)
    return cells.unflatten(0, grey.shape[:3]).flatten(2, 3)


def optical_flow(grey):
    """(B, n+1, V, H, W) in [0, 1] -> (B, n, 2V, H/2, W/2): x and y of each point of each view, on the CPU."""
    half = F.avg_pool2d(grey.flatten(0, 2)[:, None], 2)[:, 0].unflatten(0, grey.shape[:3])
    half = (255 * half).to("cpu", torch.uint8).numpy()                                # (B, n+1, V, H/2, W/2)
    flow = [[[cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 9, 3, 5, 1.1, 0)
              for before, after in zip(clip[k], clip[k + 1])] for k in range(len(clip) - 1)] for clip in half]
    return torch.from_numpy(np.array(flow)).to(grey.device).movedim(-1, 3).flatten(2, 3)


# ---- world model: the model ---------------------------------------------------------------------------------


class ToImage(nn.Module):
    """(B, 16 C) -> (B, C, 4, 4), channels last in memory."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.view(-1, 4, 4, self.channels).permute(0, 3, 1, 2)


def convolutions(c_in, channels):
    """Halves height and width at every layer: (B, c_in, H, W) -> (B, channels[-1] * h * w)."""
    layers = []
    for c in channels:
        # ASSUMPTION: normalised over channels and pixels together (DreamerV3: RMS per pixel): a fused kernel.
        layers += [nn.Conv2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
        c_in = c
    return nn.Sequential(*layers, nn.Flatten())


def image_channels(size, image_size):
    """Channels of the layers that bring an image down to 4 x 4."""
    stages = int(math.log2(image_size)) - 2
    if 4 * 2 ** stages != image_size or not 2 <= stages <= 5:
        raise InputError(f"the world model takes images of 16, 32, 64 or 128 pixels, got {image_size}")
    # DreamerV3's multipliers for 64 pixels; ASSUMPTION: a thin stage more for 128 (paper: not said).
    return [WORLD_MODEL_SIZES[size]["depth"] * m for m in (1, 2, 3, 4, 4)[-stages:]]


class WorldModel(nn.Module):
    """RSSM with convolutional encoder and decoder, trained to predict o_t+1 ... o_t+n from o_t and n actions.

    It takes any action tensor (B, n, Z): latent, true, shuffled or zero. o_t is context (its posterior starts
    the roll), then every action acts, the first one included.
    UPSTREAM: the release starts at o_t+1 and zeroes the first action, so z_t is never used; and it copies the
    actions with torch.tensor(), which detaches them: no gradient reaches the policy.

    config, plain data:
        size           name in WORLD_MODEL_SIZES
        image_size     16, 32, 64 or 128
        action_dim     Z
        predict        posterior  reconstruct from states that have seen the frame (the paper, DreamerV3)
                       prior      reconstruct open loop: from o_t and the actions alone
                       both       sum of the two
        target         what is reconstructed, see TARGETS (pixels = the paper)
        motion_weight  extra weight of what differs from standing still (0 = the paper)
        free_bits      nats of KL that cost nothing (1 = DreamerV3)
        decode_steps   frames per window that are decoded in a training step, drawn at random (0 = all n, the
                       paper): same expectation of the loss and its gradient, at less than half the cost
        context_frame  False: o_t is not seen, the roll starts at h = 0, s = 0
        views          V, cameras side by side in the channels (1 = the paper)
        dyn_scale      weight of the KL that trains the prior (0.5; UPSTREAM and DreamerV3: the same)
        rep_scale      weight of the KL that trains the posterior (0.1; UPSTREAM and DreamerV3: the same)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        size, width = WORLD_MODEL_SIZES[config["size"]], 3 * config["views"]
        channels = image_channels(config["size"], config["image_size"])
        embed, feature = 16 * channels[-1], size["deter"] + size["stoch"] * size["classes"]
        self.encoder = convolutions(width, channels)
        self.rssm = RSSM(size, embed, config["action_dim"])
        c_out, halved = TARGETS[config["target"]]
        if halved > len(channels) - 1:
            raise InputError(f"target {config['target']} is too small to draw for images of "
                             f"{config['image_size']} pixels: take larger ones, or --target pixels")
        layers, c_in = [nn.Linear(feature, embed), ToImage(channels[-1])], channels[-1]
        for c in channels[-2::-1][:len(channels) - 1 - halved]:
            layers += [nn.ConvTranspose2d(c_in, c, 4, 2, 1, bias=False), nn.GroupNorm(1, c), nn.SiLU()]
            c_in = c
        layers.append(nn.ConvTranspose2d(c_in, c_out * config["views"], 4, 2, 1))
        self.decoder = nn.Sequential(*layers, nn.Sigmoid() if config["target"] == "pixels" else nn.Identity())
        self.to(memory_format=torch.channels_last)                                    # twice as fast on a CPU

    def embed(self, images):
        """(B, T, 3V, H, W) uint8 -> (B, T, embed)."""
        b, t = images.shape[:2]
        x = images.flatten(0, 1).float() / 255 - 0.5                                  # (B*T, 3V, H, W)
        return self.encoder(x.contiguous(memory_format=torch.channels_last)).view(b, t, -1)

    def decode(self, state):
        """State of (..., D), (..., S, K) -> the target (..., C, h, w), for pixels in [0, 1]."""
        features = self.features(state)
        lead = features.shape[:-1]
        return self.decoder(features.flatten(0, -2)).unflatten(0, lead)

    def features(self, state):
        return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)            # (..., D + S*K)

    def context(self, embed):
        """Posterior of the first frame, (B, embed) -> state: where every roll starts."""
        start = self.rssm.initial(len(embed), embed.device)
        return self.rssm.posterior(start["deter"], embed) if self.config["context_frame"] else start

    def observe(self, images, actions):
        """Filter: (B, n+1, 3V, H, W) uint8, (B, n, Z) -> start state (B, ...), posteriors and priors of
        k = 1 ... n (B, n, ...)."""
        assert images.shape[1] == actions.shape[1] + 1, (
            f"{images.shape[1]} frames need {images.shape[1] - 1} actions, got {actions.shape[1]}")
        embed = self.embed(images)
        start = state = self.context(embed[:, 0])
        posteriors, priors = [], []
        for k in range(actions.shape[1]):
            deter = self.rssm.sequence(state, actions[:, k])                          # a_k takes o_k to o_k+1
            prior, state = self.rssm.prior(deter), self.rssm.posterior(deter, embed[:, k + 1])
            priors.append(prior)
            posteriors.append(state)
        return start, stack_states(posteriors), stack_states(priors)

    def imagine(self, state, actions):
        """Open loop: start state (B, ...), (B, n, Z) -> priors (B, n, ...) of k = 1 ... n, no frame seen
        after the first."""
        states = []
        for k in range(actions.shape[1]):
            state = self.rssm.prior(self.rssm.sequence(state, actions[:, k]))
            states.append(state)
        return stack_states(states)

    def losses(self, images, actions, predict=None, decode_steps=None):
        """Every term before reduction: {name: (B, n)}; total() adds up those that the config asks for.

        predict and decode_steps are the config's, unless given.
        """
        predict = predict or self.config["predict"]
        n = actions.shape[1]
        decode_steps = min(n, (self.config["decode_steps"] if decode_steps is None else decode_steps) or n)
        start, posteriors, priors = self.observe(images, actions)
        drawn = torch.randperm(n, device=images.device)[:decode_steps]                # which frames are drawn
        still, future = targets(images, self.config["target"])                        # (B, 1|n, C, h, w)
        future = future[:, drawn]                                                     # (B, m, C, h, w)
        # DEVIATION: what differs from standing still weighs more: most of a picture is table.
        weight = (1 + self.config["motion_weight"]
                  * (future - still).abs().mean(2, keepdim=True))                     # (B, m, 1, h, w)

        def spread(error):                                     # (B, m, C, h, w) -> (B, n), the rest is 0
            error = error.sum((2, 3, 4)) * (n / decode_steps)
            return error.new_zeros(len(error), n).index_copy(1, drawn, error)

        terms = {"still": spread((still - future) ** 2)}       # of standing still, for report
        if self.config["context_frame"]:
            # ASSUMPTION: o_t itself is drawn as well (DreamerV3 draws every frame): the scene must come from
            # the context, so that the latents are left with what changes in it.
            error = (self.decode(start) - still[:, 0]) ** 2                           # (B, C, h, w)
            terms["context"] = error.sum((1, 2, 3))[:, None].expand(-1, n)            # (B, n), all the same

        def predicted(name, states):
            error = (self.decode({k: v[:, drawn] for k, v in states.items()}) - future) ** 2
            terms[name] = spread(weight * error)
            if name == "open_loop":
                terms["open_loop_plain"] = spread(error.detach())                     # for report

        if predict in ("posterior", "both"):
            predicted("recon", posteriors)                     # (Eq. 4) decoder, (Eq. 5) first term
        if predict in ("prior", "both"):
            # DEVIATION: the open-loop term. From the posterior alone a frame can be drawn without its action:
            # the posterior has seen it; only the KL then asks for actions, below the free bits not even that.
            predicted("open_loop", self.imagine(start, actions))
        post, prior = posteriors["logits"], priors["logits"]                # (B, n, S, K)
        terms["kl_dyn"] = kl_categorical(post.detach(), prior)              # moves the prior to what was seen
        terms["kl_rep"] = kl_categorical(post, prior.detach())              # keeps the posterior predictable
        return terms

    def loss(self, images, actions, is_pad):
        """Negative evidence bound of the video given the actions (Eq. 5) -> scalar, {name: float}.

        images  (B, n+1, 3V, H, W) uint8  o_t ... o_t+n
        actions (B, n, Z)                 gradients flow into them: this is how pretraining teaches the policy
        is_pad  (B, n) bool               True where o_k+1 is a repeated last frame; those steps count nowhere
        L = |o_t - ^o_t|^2 + mean_k |o_k - ^o_k|^2
            + 0.5 max(1, KL[sg q || p]) + 0.1 max(1, KL[q || sg p])                                 (Eq. 5)
        """
        terms = self.losses(images, actions)
        logs = {name: masked_mean(term, is_pad).item() for name, term in terms.items() if name != "still"}
        return masked_mean(self.total(terms), is_pad), logs

    def total(self, terms):
        """The weighted sum of (Eq. 5), step by step: {name: (B, n)} -> (B, n)."""
        free = self.config["free_bits"]
        kl = (self.config["dyn_scale"] * terms["kl_dyn"].clamp(min=free)
              + self.config["rep_scale"] * terms["kl_rep"].clamp(min=free))
        wanted = {"posterior": ["recon"], "prior": ["open_loop"], "both": ["recon", "open_loop"]}
        wanted = wanted[self.config["predict"]]
        return kl + sum(terms[name] for name in ("context", *wanted) if name in terms)

    def picture(self, prediction, first):
        """A prediction as something to look at, main view: (..., C, h, w), o_t (B, 3, H, W) in [0, 1] ->
        (B, ..., 3, H, W) in [0, 1]. Features: strength of all edges; flow: x red, y green, grey stands."""
        kind, main = self.config["target"], TARGETS[self.config["target"]][0]
        x = prediction[..., :main, :, :]
        if kind == "difference":
            x = x + first[:, None]
        elif kind == "features":
            x = x.norm(dim=-3, keepdim=True).expand(*x.shape[:-3], 3, -1, -1)
        elif kind == "flow":
            x = torch.cat([x / 8 + 0.5, torch.full_like(x[..., :1, :, :], 0.5)], -3)
        lead = x.shape[:-3]
        return F.interpolate(x.flatten(0, -4), first.shape[-2:]).unflatten(0, lead).clamp(0, 1)


def shuffled_within(groups, generator):
    """A permutation giving every row another row of its group -> (index (B,), has a partner (B,) bool)."""
    index, paired = torch.arange(len(groups)), torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        index[rows], paired[rows] = rows.roll(1), len(rows) > 1
    return index, paired


# ---- world model: the other source of latent actions --------------------------------------------------------


class InverseDynamics(nn.Module):
    """z_k from the frames that it lies between, o_k and o_k+1, as in LAPA (Ye et al. 2024) or villa-X: the
    paper's comparison (Table III). It sees the future, so a policy must then learn to predict its latents.

    config: the world model's. Bounded as the policies' are: standardised over the batch (padded pairs too, a
    few at the ends of episodes), then tanh.
    """

    def __init__(self, config):
        super().__init__()
        channels = image_channels(config["size"], config["image_size"])
        self.encoder = convolutions(6 * config["views"], channels)
        self.out = nn.Linear(16 * channels[-1], config["action_dim"], bias=False)
        self.norm = nn.BatchNorm1d(config["action_dim"], affine=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """(B, n+1, 3V, H, W) uint8 -> (B, n, Z) in (-1, 1)."""
        b, n = images.shape[0], images.shape[1] - 1
        x = images.float() / 255 - 0.5
        pairs = torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)                     # (B*n, 6V, H, W)
        z = self.out(self.encoder(pairs.contiguous(memory_format=torch.channels_last)))
        return torch.tanh(self.norm(z)).view(b, n, -1)


# ---- 6 chunk execution -----------------------------------------------------------------------------------


class ActionChunker:
    """Chunks of n actions -> one action per step. No state lives in the policy: reset() before every episode.

    execute = h     ask the policy every h steps and execute the first h of n, open loop
    execute = None  ask at every step and average what all live chunks say about now (temporal ensembling, ACT
                    / BAKU): weight exp(-decay * i), i = 0 for the oldest. UPSTREAM: decay 0, a plain mean.
    """

    def __init__(self, chunk, execute=None, decay=0.01):
        if execute is not None and not 1 <= execute <= chunk:
            raise InputError(f"--execute takes 1 to {chunk} (the policy's chunk length), got {execute}")
        self.chunk, self.execute, self.decay = chunk, execute, decay
        self.reset()

    def reset(self):
        self.live = []          # [chunk (n, A), age], oldest first

    def step(self, ask):
        """ask() -> (n, A) is called only when a new chunk is needed. -> action (A,)."""
        if self.asks:
            self.live.append([np.asarray(ask()), 0])
        now = np.stack([c[age] for c, age in self.live])                              # (live chunks, A)
        weights = np.exp(-self.decay * np.arange(len(now)))
        self.live = [[c, age + 1] for c, age in self.live if age + 1 < (self.execute or self.chunk)]
        return (weights[:, None] * now).sum(0) / weights.sum()

    @property
    def asks(self):
        """Whether the next step() will ask for a chunk: an observation is needed for that alone."""
        return self.execute is None or not self.live


# ---- 7 probes ---------------------------------------------------------------------------------------------


def ridge_probe(X, Y, X_test, episode, ridges=(10.0, 1.0, 1e-1, 1e-2, 1e-3)):
    """Linear probe: ridge regression of X (N, dx) to Y (N, dy), both float64 -> predictions (N_test, dy).

    Columns are standardised on the training rows. The ridge is chosen by cross-validation over the episodes
    that the rows belong to, episode (N,): rows of one episode resemble each other and must not be split. All
    ridges share one eigendecomposition X'X = V diag(l) V': w = V (V'X'Y / (l + ridge * N)). With a single
    episode there is nothing to validate on; the ridge is then 1.
    """
    mean_x, mean_y, std_x, std_y = X.mean(0), Y.mean(0), X.std(0), Y.std(0)
    std_x = np.where(std_x > 1e-8, std_x, np.inf)           # a constant column says nothing: it becomes 0
    std_y = np.where(std_y > 1e-8, std_y, 1)
    x, y = (X - mean_x) / std_x, (Y - mean_y) / std_y

    def solve(x, y, ridges):
        l, V = np.linalg.eigh(x.T @ x)
        Vxy = V.T @ (x.T @ y)
        return [V @ (Vxy / (l.clip(min=0) + ridge * len(x))[:, None]) for ridge in ridges]

    episodes, which = np.unique(episode, return_inverse=True)
    ridge = 1.0
    if len(episodes) > 1:
        count = min(5, len(episodes))
        fold = (np.random.default_rng(0).permutation(len(episodes)) % count)[which]                 # (N,)
        errors = np.zeros(len(ridges))
        for k in range(count):
            weights = solve(x[fold != k], y[fold != k], ridges)
            errors += [((y[fold == k] - x[fold == k] @ w) ** 2).sum() for w in weights]
        ridge = ridges[int(errors.argmin())]
    return ((X_test - mean_x) / std_x) @ solve(x, y, [ridge])[0] * std_y + mean_y


def r_squared(predicted, true):
    """Share of the variance that is predicted: (N, dy), (N, dy) -> (dy,); nan where true is constant."""
    varies, total = true.std(0) > 1e-8, ((true - true.mean(0)) ** 2).sum(0)
    return np.where(varies, 1 - ((true - predicted) ** 2).sum(0) / np.where(varies, total, 1), np.nan)


# ---- 7 checkpoints ---------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Bytes to path.tmp, then moved: a reader sees the old file or the new one. OSError (disk full)."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Plain JSON with sorted keys, atomically: the same content is the same bytes."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path):
    """Content of a JSON file. InputError when it is not one; OSError when it cannot be read."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a JSON file ({error}): fetch or make it again") from None


def append_line(path, line):
    """Append a dict to a .jsonl file; it is on the disk when this returns."""
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_lines(path):
    """Lines of a .jsonl file -> [dict]; no file, no lines. InputError for a line that is not JSON.

    A process that was killed may have left half a line at the end: it is cut off the file, too.
    """
    path = Path(path)
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[:raw.rfind(b"\n") + 1]
    if whole != raw:
        with open(path, "r+b") as f:
            f.truncate(len(whole))
    lines = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise InputError(f"{path} line {number} is not JSON: --overwrite, or another --out") from None
    return lines


def check_free(folder, held, args):
    """InputError when `held` says that the output folder is in use, and neither --resume nor --overwrite."""
    if held and not (args.resume or args.overwrite):
        raise InputError(f"{folder} is in use: --resume continues what is there, --overwrite replaces it, "
                         "--out names another folder")


def check_same(where, before, now, free=()):
    """InputError that names the first setting in which two dicts differ, but for the names in `free`."""
    def short(value):
        return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."

    for name in sorted((before.keys() | now.keys()) - set(free)):
        if before.get(name) != now.get(name):
            raise InputError(f"{where} was made with {name} {short(before.get(name))}, now it is "
                             f"{short(now.get(name))}: --resume needs the same settings, --overwrite starts "
                             "afresh, --out names another folder")


def save_checkpoint(path, checkpoint):
    """Write a dict of plain data and tensors, atomically; it loads with weights_only."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)           # to memory: torch's own writer hides that the disk is full
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """-> dict. InputError names the file when it is absent or not one of ours; nothing in it is executed."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}: run the stage before this one, or name it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage, config = checkpoint["stage"], checkpoint["config"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError,
            AttributeError) as e:
        raise InputError(f"{path} is not a checkpoint of this project: expected the last.pt of pretrain.py "
                         f"or finetune.py ({type(e).__name__} while loading)") from e
    assert stage in ("pretrain", "finetune"), stage
    if "text_encoder" not in config:
        raise InputError(f"{path} was written by an older version of this project: train it again")
    return checkpoint


def load_policy(path, device="cpu", stage=None):
    """-> policy in eval mode, checkpoint. The architecture is the file's; weights must fit it. InputError.

    stage  "pretrain" or "finetune": which of the two it must be, None = either
    """
    checkpoint = load_checkpoint(path)
    if stage not in (None, checkpoint["stage"]):
        raise InputError(f"{path} has been finetuned on actions: give a checkpoint of pretrain.py"
                         if stage == "pretrain" else
                         f"{path} has been pretrained on video and has no actions yet: "
                         f"python finetune.py --init {path}")
    broken = [k for k, v in checkpoint["policy"].items() if not v.isfinite().all()]
    if broken:
        raise InputError(f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): "
                         "its training diverged, train again")
    policy = make_policy(checkpoint["config"])
    fit = policy.load_state_dict(checkpoint["policy"], strict=False)
    if fit.missing_keys or fit.unexpected_keys:
        raise InputError(f"{path} does not fit its own config: missing {fit.missing_keys[:3]}, "
                         f"unexpected {fit.unexpected_keys[:3]}")
    return policy.to(device).eval(), checkpoint


def init_from_pretrained(policy, weights, path):
    """Copy pretrained weights into a policy for finetuning -> {"loaded" | "new" | "unused": [names]}.

    Only what finetuning must add may be new (last layer, further cameras, proprioception, normalisation),
    only the latent layer may be left over; all else means another architecture: InputError with the names.
    UPSTREAM: the release copies the last layer, too, when the widths agree; it skips what does not fit with a
    warning, and on errors it silently starts from scratch.
    """
    def named(key, *prefixes):
        return any(part.startswith(prefixes) for part in key.split("."))

    own = policy.state_dict()
    # Never taken over: what touches actions, whose number and units may be others.
    reinit = [k for k in own if named(k, "action_in", "action_out", "action_norm", "style_action_in")]
    loaded = [k for k in own if k in weights and k not in reinit and own[k].shape == weights[k].shape]
    new = [k for k in own if k not in loaded]
    unused = [k for k in weights if k not in loaded]
    wrong = [k for k in new if not named(k, "action_", "proprio_", "camera_", "style_")
             or (k in weights and k not in reinit)]
    wrong += [k for k in unused if not named(k, "latent_", "action_", "style_") and k not in wrong]
    if wrong:
        k = wrong[0]
        shapes = [tuple(w[k].shape) if k in w else "absent" for w in (weights, own)]
        raise InputError(f"{path} is of another architecture: {len(wrong)} tensors do not fit, first {k}: "
                         f"{shapes[0]} in the file, {shapes[1]} here")
    policy.load_state_dict({**own, **{k: weights[k] for k in loaded}})
    return {"loaded": loaded, "new": new, "unused": unused}


# ---- 8 runs ----------------------------------------------------------------------------------------------


def open_run(args, free):
    """May the run folder args.out be used? -> checkpoint to go on from, or None (fresh run). Writes nothing.

    A run that exists is never overwritten unless --overwrite says so. --resume takes the same flags as the
    run it goes on with, but for the names in `free`, which change no result. The device and the number of
    threads do: sums are added up in another order. On a CPU the result is the same to the bit; some CUDA
    kernels are not deterministic.
    """
    out, last = Path(args.out), Path(args.out) / "last.pt"
    if args.resume and last.exists():
        checkpoint = load_checkpoint(last)
        before, now = ({"--" + name.replace("_", "-"): value for name, value in flags.items()
                        if name not in free} for flags in (checkpoint["args"], vars(args)))
        check_same(last, before, now)
        return checkpoint
    if args.resume and not out.exists():
        raise InputError(f"nothing to resume in {out}: leave --resume out, or name the run with --out")
    check_free(out, any((out / name).exists() for name in ("last.pt", "metrics.jsonl")), args)
    return None


class Log:
    """One line per call: on the screen, in metrics.jsonl and to TensorBoard.

    Opening it begins the run: at step 0 the files of an earlier run go, later only the lines after `start`.
    """

    def __init__(self, out, start):
        self.path = Path(out) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not start:
            (Path(out) / "last.pt").unlink(missing_ok=True)
            shutil.rmtree(Path(out) / "tensorboard", ignore_errors=True)
        kept = [line for line in read_lines(self.path) if line["step"] <= start] if start else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.board = SummaryWriter(Path(out) / "tensorboard", purge_step=start + 1 if start else None)

    def __call__(self, step, metrics):
        append_line(self.path, {"step": step, **metrics})
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        tqdm.write(f"step {step:6,} | " + " | ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def to_device(tree, device):
    """Nested dict of tensors -> the same on the device; what is no tensor (words) stays as it is."""
    if isinstance(tree, dict):
        return {k: to_device(v, device) for k, v in tree.items()}
    return tree.to(device, non_blocking=True) if isinstance(tree, torch.Tensor) else tree


def by_position(obs, cameras):
    """The same observation with its cameras under the policy's names. They go by position: camera 0 is the
    main view in every dataset, whatever it is called there."""
    return {**obs, "images": dict(zip(cameras, obs["images"].values()))}


def at_least(args, low, *names):
    """InputError for the first of these flags that is smaller than low."""
    for name in names:
        if getattr(args, name) is not None and not low <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} takes {low} or more, got {getattr(args, name)}")


def pick_device(name):
    """Name of a device -> torch.device. InputError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} here ({str(e).splitlines()[0][:80]}): --device cpu") from e
    return device


def policy_numbers(policy, size):
    """Widths and depths of a named size of a policy, from its SIZES. InputError names those there are."""
    sizes = POLICIES[policy].SIZES
    if size not in sizes:
        raise InputError(f"--policy-size of {policy} is one of {', '.join(sizes)}; got {size}")
    return sizes[size]


def probe_r2(x_train, y_train, x_test, y_test, ridge=1e-2):
    """Linear probe: ridge regression x (N, dx) -> y (N, dy), R2 per column of y on the test rows -> (dy,).

    Columns are standardised on the training rows; columns of y that are constant there come back as nan.
    """
    mx, sx, my, sy = x_train.mean(0), x_train.std(0) + 1e-8, y_train.mean(0), y_train.std(0)
    x, y = (x_train - mx) / sx, (y_train - my) / np.where(sy > 1e-8, sy, 1)
    w = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    residual = (y_test - my) / np.where(sy > 1e-8, sy, 1) - ((x_test - mx) / sx) @ w
    total = ((y_test - y_test.mean(0)) / np.where(sy > 1e-8, sy, 1)) ** 2
    varies = (sy > 1e-8) & (total.sum(0) > 1e-8)
    return np.where(varies, 1 - (residual ** 2).sum(0) / np.where(varies, total.sum(0), 1), np.nan)


def file_hash(path):
    """First 12 hex digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def provenance():
    """Where a number comes from: command, commit (with "+" if the tree has changes), versions, machine."""
    def git(*args):
        if not shutil.which("git"):
            return ""
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args],
                              capture_output=True, text=True).stdout.strip()
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": ((git("rev-parse", "--short", "HEAD") or "unknown")
                       + ("+" if git("status", "--porcelain", "-uno") else "")),
            "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                       f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"}


def markdown_table(rows):
    """Rows of strings, the first one the heading -> a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def count(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters())


# Parameters of what the release builds (baheytharwat/lawm at 18957d0, counted): ResNet with BatchNorm, dense
# GRU, deeper decoder. DreamerV3's names are of whole agents: with actor, critic and reward.
RELEASE = {("baku", "paper"): 7_712_006, ("diffusion", "paper"): 51_138_759,
           ("world model", "1m"): 1_813_823, ("world model", "12m"): 28_942_451,
           ("world model", "25m"): 65_100_843, ("world model", "50m"): 115_717_347,
           ("world model", "100m"): 260_324_691, ("world model", "200m"): 462_764_483}


def main():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(module, call):
        module.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e9

    def line(kind, size, image_size, n, module, cost):
        theirs = f"{RELEASE[kind, size] / 1e6:8.2f} M" if (kind, size) in RELEASE else f"{'-':>10s}"
        parts = ", ".join(f"{name} {count(part) / 1e6:.2f}" for name, part in module.named_children()
                          if count(part) > 0.05 * count(module))
        print(f"{kind:12s} {size:6s} {image_size:4d} px {n:3d} {count(module) / 1e6:9.2f} M {theirs} "
              f"{cost:9.3f}   {parts}")

    print(f"{'model':12s} {'size':6s} {'image':>7s} {'n':>3s} {'parameters':>11s} {'release':>10s} "
          f"{'GFLOP':>9s}   parts with more than 5 %, in millions")
    for name, cls in POLICIES.items():              # one chunk of actions: two cameras and proprioception
        for size, numbers in cls.SIZES.items():
            image_size = 64 if size == "tiny" else 128
            config = dict(policy=name, cameras=["front", "side"], image_size=image_size, chunk=cls.CHUNK,
                          text_encoder="hash", proprio_dim=7, action_dim=7, latent_dim=7, latent_norm=True,
                          head="action", proprio_dropout=0.0, **numbers)
            policy = make_policy(config).eval()
            image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
            obs = {"images": {"front": image, "side": image}, "instruction": ["stack the cups"],
                   "proprio": torch.zeros(1, 7)}
            line(name, size, image_size, cls.CHUNK, policy, flops(policy, lambda: policy.act(obs)))
    for size in WORLD_MODEL_SIZES:                  # the loss of a window of 10 steps, the paper's objective
        image_size = 64 if size in ("tiny", "1m") else 128
        with torch.device("meta"):
            model = WorldModel(dict(size=size, image_size=image_size, action_dim=7, predict="posterior",
                                    target="pixels", motion_weight=0, free_bits=1, decode_steps=0,
                                    context_frame=True, views=1, dyn_scale=0.5, rep_scale=0.1))
            frames = torch.zeros(1, 11, 3, image_size, image_size, dtype=torch.uint8)
            cost = flops(model, lambda: model.losses(frames, torch.zeros(1, 10, 7)))
        line("world model", size, image_size, 10, model, cost)


if __name__ == "__main__":
    run(main)

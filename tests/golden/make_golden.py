"""Golden arrays from diffusers and transformers, for the tests of the MindSpore networks.

    python -m pip install -r tests/golden/requirements.txt
    python tests/golden/make_golden.py            # writes tests/golden/*.npz
    python tests/golden/make_golden.py --check    # recomputes them; exit 1 where one differs

Nothing of the project and no MindSpore is imported here: what is compared later shares with this
script the names of the weights, deterministic.py, and nothing else.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Processors with different vector units round differently (measured: up to 5e-6 in a U-Net's
# output), so the code path that all of them have is chosen, before torch is loaded.
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["MKL_CBWR"] = "COMPATIBLE"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from deterministic import array, weight
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.training_utils import compute_snr
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

Arrays = dict[str, np.ndarray]

HERE = Path(__file__).resolve().parent
TOKENIZER_FOLDER = HERE.parents[1] / "sdxl_host" / "models" / "clip_tokenizer"
BEGIN, END, CONTEXT_LENGTH = 49406, 49407, 77


# Names: a diffusers folder -> the single file -----------------------------------------------------

UNET_STEMS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_STEMS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def match(pattern: str, name: str) -> tuple[str, ...]:
    """Groups of `pattern` in the whole of `name`, empty where a group took no part."""
    found = re.fullmatch(pattern, name)
    if found is None:
        raise ValueError(f"{name!r}: no rule for this name; expected {pattern}")
    return found.groups(default="")


def single_file_name(name: str, resnets: int = 2) -> str:
    """Single-file name of `name`, a tensor of a diffusers folder written as "unet/conv_in.weight".

    `resnets` is the U-Net's layers_per_block; the real model has 2.
    """
    component, _, rest = name.partition("/")
    if component == "unet":
        return "model.diffusion_model." + unet_name(rest, resnets)
    if component == "vae":
        return "first_stage_model." + vae_name(rest)
    if component == "text_encoder":
        return "conditioner.embedders.0.transformer." + rest
    if component == "text_encoder_2":
        return "conditioner.embedders.1.model." + open_clip_name(rest)
    raise ValueError(f"{name!r}: unknown component; expected unet, vae or text_encoder(_2)")


def unet_name(name: str, resnets: int) -> str:
    """Original U-Net name: blocks are numbered through all levels, one per skip connection."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_STEMS:
        return f"{UNET_STEMS[stem]}.{kind}"
    where, level, part, index, rest = match(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name
    )
    number = int(level or 0) * (resnets + 1) + int(index)
    if part == "downsamplers":
        return f"input_blocks.{number + resnets + 1}.0.op.{kind}"
    if part == "upsamplers":
        # Entry 2, behind the attention: in SDXL every level that is upsampled from attends.
        return f"output_blocks.{number + resnets}.2.{rest}"
    if where == "mid":
        # The middle is resnet 0, attention, resnet 1.
        block = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    else:
        block = f"input_blocks.{number + 1}" if where == "down" else f"output_blocks.{number}"
        block += ".1" if part == "attentions" else ".0"
    return f"{block}.{rest if part == 'attentions' else resnet_name(rest)}"


def resnet_name(name: str) -> str:
    """Part of a U-Net residual block, e.g. conv1.weight -> in_layers.2.weight."""
    part, kind = name.split(".")
    return f"{UNET_RESNET[part]}.{kind}"


def vae_name(name: str) -> str:
    """Original VAE name: the decoder's levels are counted from the finest, unlike diffusers'."""
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda level: f"up.{3 - int(level[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda i: f"mid.block_{int(i[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
    for part, original in VAE_PARTS.items():
        name = name.replace(f".{part}.", f".{original}.")
    return name


def open_clip_name(name: str) -> str:
    """Original OpenCLIP name; the three of q, k and v share one, that of their concatenation."""
    if name in OPEN_CLIP_STEMS:
        return OPEN_CLIP_STEMS[name]
    layer, part, kind = match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    block = f"transformer.resblocks.{layer}"
    if re.fullmatch(r"self_attn\.[qkv]_proj", part):
        return f"{block}.attn.in_proj_{kind}"
    return f"{block}.{OPEN_CLIP_PARTS[part]}.{kind}"


# Weights ------------------------------------------------------------------------------------------


def reference_weight(name: str, shape: tuple[int, ...], resnets: int) -> np.ndarray:
    """Weight `name` in the shape that diffusers or transformers gives it, float32."""
    original = single_file_name(name, resnets)
    if ".in_proj_" in original:
        third = "qkv".index(match(r".+\.([qkv])_proj\.(?:weight|bias)", name)[0])
        whole = weight(original, (3 * shape[0], *shape[1:]))
        return whole[third * shape[0] : (third + 1) * shape[0]]
    if original.endswith(".text_projection"):
        return weight(original, shape[::-1]).T
    return weight(original, shape)


def load_weights(model: torch.nn.Module, prefix: str, resnets: int = 2) -> None:
    """Overwrite every parameter of `model`; `prefix` completes its names to a folder's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = reference_weight(prefix + name, tuple(parameter.shape), resnets)
            parameter.copy_(torch.from_numpy(values.copy()))
    model.eval()


# U-Nets -------------------------------------------------------------------------------------------

UNET_A: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2],
    "num_head_channels": 16,
    "transformer_depth": [1, 2, 3],
    "context_dim": 48,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 32 + 6 * 16,
}
UNET_B: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 32,
    "transformer_depth": [0, 2],
    "context_dim": 40,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 24 + 6 * 8,
}


def build_unet(config: dict[str, Any], size_width: int) -> UNet2DConditionModel:
    """U-Net of `config` (the original YAML's keys), `size_width` sinusoids for each size number."""
    channels = tuple(config["model_channels"] * factor for factor in config["channel_mult"])
    attends = [2**level in config["attention_resolutions"] for level in range(len(channels))]
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        layers_per_block=config["num_res_blocks"],
        transformer_layers_per_block=config["transformer_depth"],
        # diffusers calls the number of heads attention_head_dim.
        attention_head_dim=tuple(width // config["num_head_channels"] for width in channels),
        cross_attention_dim=config["context_dim"],
        use_linear_projection=config["use_linear_in_transformer"],
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=config["adm_in_channels"],
    )


def run_unet(
    label: str,
    config: dict[str, Any],
    x: np.ndarray,
    timesteps: np.ndarray,
    context_length: int,
    time_ids: np.ndarray,
    size_width: int,
    mask: np.ndarray | None = None,
) -> tuple[UNet2DConditionModel, Arrays]:
    """Output for x (B, C, H, W) and gradients of mean(out^2); the model keeps its gradients.

    timesteps (B,) float64; time_ids (B, 6) as original, crop and target size, each height first;
    mask (B, L) bool, True where attended.
    """
    batch, pooled_width = len(x), config["adm_in_channels"] - 6 * size_width
    context = array(f"{label}.context", (batch, context_length, config["context_dim"]))
    pooled = array(f"{label}.pooled", (batch, pooled_width))
    model = build_unet(config, size_width)
    load_weights(model, "unet/", config["num_res_blocks"])

    seen: Arrays = {}
    model.add_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.update(vector=inputs[0].detach().numpy())
    )
    inputs = [torch.from_numpy(values).requires_grad_() for values in (x, context)]
    added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
    out = model(
        inputs[0],
        torch.from_numpy(timesteps),
        encoder_hidden_states=inputs[1],
        encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
        added_cond_kwargs=added,
    ).sample
    out.square().mean().backward()

    arrays: Arrays = {
        "config": np.array(json.dumps(config)),
        "x": x,
        "timesteps": timesteps,
        "context": context,
        "pooled": pooled,
        "time_ids": time_ids,
        "vector": seen["vector"],
        "out": out.detach().numpy(),
        "x_grad": gradient(inputs[0]),
        "context_grad": gradient(inputs[1]),
    }
    return model, arrays if mask is None else arrays | {"mask": mask}


def gradient(tensor: torch.Tensor) -> np.ndarray:
    """Gradient that backward() left on `tensor`, float32."""
    if tensor.grad is None:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} got no gradient; is it used?")
    return tensor.grad.numpy()


def summarise_gradients(model: torch.nn.Module, prefix: str, resnets: int) -> Arrays:
    """Sum, L2 norm and dot product with a fixed random probe of every parameter's gradient.

    Names (n,) and values (n, 3) float64, sorted by name. The three together tell a gradient that
    is missing, mis-scaled or transposed, in far less room than the gradient itself.
    """
    rows: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        original = single_file_name(prefix + name, resnets)
        values = gradient(parameter).astype(np.float64)
        probe = array(f"probe:{original}", values.shape)
        dot = (values * probe).sum()
        rows[original] = [float(values.sum()), float(np.linalg.norm(values)), float(dot)]
    names = sorted(rows)
    return {"grad_names": np.array(names), "grad_values": np.array([rows[n] for n in names])}


def golden_unet_a() -> Arrays:
    """Three levels as SDXL has them, with every parameter's gradient."""
    time_ids = np.array([[512, 640, 3, 7, 512, 512], [768, 1024, 0, 64, 1024, 768]], np.float32)
    model, arrays = run_unet(
        "unet_a",
        UNET_A,
        x=array("unet_a.x", (2, 4, 16, 16)),
        timesteps=np.array([3.25, 871.5]),
        context_length=CONTEXT_LENGTH,
        time_ids=time_ids,
        size_width=16,
    )
    return arrays | summarise_gradients(model, "unet/", UNET_A["num_res_blocks"])


def golden_unet_b() -> Arrays:
    """Two levels, latents that are not square, and a mask that differs between the rows."""
    mask = np.ones((3, 9), dtype=bool)
    mask[1, 5:] = False
    mask[2, [0, 3, 8]] = False
    time_ids = np.array(
        [[64, 96, 0, 0, 64, 96], [480, 640, 11, 0, 256, 384], [1024, 1024, 0, 5, 512, 768]],
        dtype=np.float32,
    )
    _, arrays = run_unet(
        "unet_b",
        UNET_B,
        x=array("unet_b.x", (3, 3, 8, 12)),
        timesteps=np.array([0.75, 500.0, 998.625]),
        context_length=9,
        time_ids=time_ids,
        size_width=8,
        mask=mask,
    )
    return arrays


# Text encoders ------------------------------------------------------------------------------------


def prompt_ids(label: str, lengths: list[int], pad: int) -> np.ndarray:
    """Ids (N, 77) int64: begin, `length` words, end, then padding up to the context length."""
    ids = np.full((len(lengths), CONTEXT_LENGTH), pad, dtype=np.int64)
    for row, length in enumerate(lengths):
        # A wide bell folded many times over is flat: any id that stands for a piece of a word.
        words = array(f"{label}.ids.{row}", (length,)) * 1e6 % BEGIN
        ids[row, : length + 2] = [BEGIN, *words.astype(np.int64), END]
    return ids


def clip_config(activation: str) -> CLIPTextConfig:
    """Small text transformer.

    Its end id must be 49407 for it to pool at the first end of text: with 2, the value in the
    published config files, transformers pools at the largest id instead.
    """
    return CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=activation,
        projection_dim=64,
        bos_token_id=BEGIN,
        eos_token_id=END,
        attn_implementation="eager",
    )


def golden_clip_l() -> Arrays:
    """CLIP ViT-L's text half, padded with the end id.

    `hidden` (4, 77, 64) is the output of the last layer but one, without the final norm.
    """
    ids = prompt_ids("clip_l", [5, 0, 40, 75], pad=END)
    model = CLIPTextModel(clip_config("quick_gelu"))
    # transformers 5 dropped this part of the names, in memory as well as in the files it saves.
    load_weights(model, "text_encoder/text_model.")
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    return {"ids": ids, "hidden": states[-2].numpy()}


def golden_open_clip_g() -> Arrays:
    """OpenCLIP bigG's text half, padded with 0.

    `hidden` (4, 77, 64) as for CLIP-L; `pooled` (4, 64) is the final norm of the last layer at the
    first end of text, projected.
    """
    ids = prompt_ids("open_clip_g", [7, 0, 33, 75], pad=0)
    model = CLIPTextModelWithProjection(clip_config("gelu"))
    load_weights(model, "text_encoder_2/")
    with torch.no_grad():
        output = model(torch.from_numpy(ids), output_hidden_states=True)
    return {
        "ids": ids,
        "hidden": output.hidden_states[-2].numpy(),
        "pooled": output.text_embeds.numpy(),
    }


CAPTIONS = [
    "",
    "a photo of a cat",
    "A Photo Of A CAT",
    "  spaces   before, between \t and after  ",
    "two lines\nand a third\r\n\r\nafter an empty one",
    "it's what they're after; we've said I'd, you'll, I'm, don't, IT'S",
    'punctuation!!! (really?) [yes] {no} -- "quoted" ... #1 @home 50% a_b ~`^*+=|<>/',
    "\u201ccurly\u201d quotes, an ellipsis\u2026 and an em\u2014dash",
    "fish &amp; chips &lt;b&gt;",
    "1girl, 35mm f/1.8, 2024, 1,000,000, \u00bd, \u2163, x\u00b2",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u00c5ngstr\u00f6m",
    "cafe\u0301 U\u0308ber, composed or not",
    "\u0432\u0435\u0447\u0435\u0440\u043d\u0438\u0439 \u0433\u043e\u0440\u043e\u0434",
    "\u4e00\u53ea\u732b\u5750\u5728\u6905\u5b50\u4e0a\uff0c\u6c34\u58a8\u753b",
    "\u732b\u306e\u5199\u771f \u30cd\u30b3 \uff21\uff22\uff11",
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0642\u0637\u0629 \u05d7\u05ea\u05d5\u05dc",
    "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f44d\U0001f3fd",
    "no\u00a0break, zero\u200bwidth, ideographic\u3000space",
    "supercalifragilisticexpialidocious antidisestablishmentarianism zzxqvkjw",
    "a very long caption of a lighthouse by the sea at dusk, " * 12,
    ", ".join(["word"] * 38),
    " ".join(["seventy"] * 75),
]


def golden_tokenizer() -> Arrays:
    """Ids (n, 77) int64 of captions, cut to 77 and padded with the end id, as CLIP-L has them."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER)
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH)
    return {"texts": np.array(CAPTIONS), "ids": np.array(encoded.input_ids, dtype=np.int64)}


# Formulas -----------------------------------------------------------------------------------------

SDXL_BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
MIN_SNR_GAMMA = 5.0


def golden_timestep_embedding() -> Arrays:
    """Sinusoids (5, 16) and (5, 320) float32, cosines first, of fractional values."""
    values = np.array([0.0, 0.5, 999.0, 999.3, 4099.0])
    arrays: Arrays = {"values": values}
    for width in (16, 320):
        embedding = get_timestep_embedding(
            torch.from_numpy(values), width, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        arrays[f"embedding_{width}"] = embedding.numpy()
    return arrays


def golden_schedule() -> Arrays:
    """All sigmas (1000,) ascending in t, and those of 10 and 25 sampling steps with the final 0.

    float64 in type; diffusers computes them in float32, and 1 - abar loses 4 digits near t = 0.
    """
    scheduler = EulerDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    # As built, the scheduler holds them descending and followed by the final 0.
    arrays: Arrays = {"sigmas": scheduler.sigmas.numpy()[-2::-1].astype(np.float64)}
    for steps in (10, 25):
        scheduler.set_timesteps(steps)
        arrays[f"trailing_{steps}"] = scheduler.sigmas.numpy().astype(np.float64)
        arrays[f"timesteps_{steps}"] = scheduler.timesteps.numpy().astype(np.float64)
    return arrays


def sample(
    scheduler: EulerDiscreteScheduler | EDMEulerScheduler,
    noise: np.ndarray,
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Arrays:
    """Six Euler steps: sigmas (7,), timesteps (6,) and every x (7, B, C, H, W), the start first.

    The start is noise * sigmas[0]. diffusers' pipelines multiply by init_noise_sigma, which is the
    same for "trailing" spacing but sqrt(sigma^2 + 1) for EDM.
    """
    scheduler.set_timesteps(6)
    x = torch.from_numpy(noise) * scheduler.sigmas[0]
    states = [x.numpy()]
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        states.append(x.numpy())
    return {
        "sigmas": scheduler.sigmas.numpy().astype(np.float64),
        "timesteps": scheduler.timesteps.numpy().astype(np.float64),
        "x": np.stack(states),
    }


def golden_euler() -> Arrays:
    """Euler on a network F that is a formula, with `timesteps` as its second argument.

    epsilon and v_prediction: F = tanh(0.7 * scaled input + 0.001 * t), t a timestep in [0, 999];
    EDM: F = tanh(0.7 * scaled input + c_noise), c_noise = 0.25 ln sigma.
    """
    noise = array("euler.noise", (2, 4, 6, 6))
    arrays: Arrays = {"noise": noise}
    for prediction in ("epsilon", "v_prediction"):
        scheduler = EulerDiscreteScheduler(
            **SDXL_BETAS, timestep_spacing="trailing", prediction_type=prediction
        )
        run = sample(scheduler, noise, lambda x, t: torch.tanh(0.7 * x + 0.001 * t))
        arrays |= {f"{prediction}_{key}": values for key, values in run.items()}
    edm = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", rho=7.0
    )
    run = sample(edm, noise, lambda x, t: torch.tanh(0.7 * x + t))
    return arrays | {f"edm_{key}": values for key, values in run.items()}


def golden_min_snr() -> Arrays:
    """Min-SNR weights (1000,) on the network's own squared error, as in the training scripts.

    min(snr, 5) / snr for epsilon, min(snr, 5) / (snr + 1) for v.
    """
    snr = compute_snr(DDPMScheduler(**SDXL_BETAS), torch.arange(1000))
    clipped = torch.stack([snr, MIN_SNR_GAMMA * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return {
        "gamma": np.array(MIN_SNR_GAMMA),
        "snr": snr.numpy(),
        "epsilon": (clipped / snr).numpy(),
        "v_prediction": (clipped / (snr + 1)).numpy(),
    }


# Writing and checking -----------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[], Arrays]] = {
    "unet_a": golden_unet_a,
    "unet_b": golden_unet_b,
    "clip_l": golden_clip_l,
    "open_clip_g": golden_open_clip_g,
    "timestep_embedding": golden_timestep_embedding,
    "schedule": golden_schedule,
    "euler": golden_euler,
    "min_snr": golden_min_snr,
    "tokenizer": golden_tokenizer,
}


def compare(name: str, stored: np.ndarray, made: np.ndarray) -> Iterator[str]:
    """What differs between two arrays, as sentences that begin with `name`; none where equal."""
    if (stored.shape, stored.dtype) != (made.shape, made.dtype):
        yield f"{name}: stored {stored.dtype}{stored.shape}, made {made.dtype}{made.shape}"
    elif stored.dtype.kind != "f":
        if not np.array_equal(stored, made):
            yield f"{name}: {np.count_nonzero(stored != made)} of {made.size} entries differ"
    else:
        worst = float(np.abs(stored.astype(np.float64) - made).max())
        peak = float(np.abs(made).max())
        # The second bound is for gradients, which are so small that the first would pass a zero.
        allowed = min(1e-5 * max(1.0, peak), 1e-3 * peak)
        if not worst <= allowed:
            yield f"{name}: differs by up to {worst:.3g}; at most {allowed:.3g} is allowed"


def check_file(path: Path, made: Arrays) -> Iterator[str]:
    """What differs between the file at `path` and the arrays just made."""
    if not path.exists():
        yield f"{path.name}: not there; run make_golden.py without --check"
        return
    with np.load(path) as file:
        stored = dict(file)
    for key in sorted(stored.keys() ^ made.keys()):
        yield f"{path.name}/{key}: only in the {'file' if key in stored else 'recomputed set'}"
    for key in sorted(stored.keys() & made.keys()):
        yield from compare(f"{path.name}/{key}", stored[key], made[key])


def check(folder: Path) -> list[str]:
    """Everything that differs between `folder` and what this script makes now."""
    orphans = sorted(path for path in folder.glob("*.npz") if path.stem not in GENERATORS)
    problems = [f"{path.name}: nothing in make_golden.py makes this file" for path in orphans]
    for name, generate in GENERATORS.items():
        problems += check_file(folder / f"{name}.npz", generate())
    return problems


def main() -> int:
    """Write the files, or compare them; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the .npz files")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if options.check:
        problems = check(options.out)
        print("\n".join(problems) or f"{len(GENERATORS)} golden files are as recomputed")
        return 1 if problems else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, generate in GENERATORS.items():
        np.savez_compressed(options.out / f"{name}.npz", **generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())

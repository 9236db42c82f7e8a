"""A small random Stable Diffusion XL pipeline in diffusers' folder form, for the round trip.

    python tests/parity/make_pipeline.py OUT

Needs tests/golden/requirements.txt and no network, and imports nothing of the project. The same
bytes every time. OUT is what `check_export.py` takes as CONFIG_FOLDER; between the two,
`round_trip.py` loads it with our loader, trains a step, exports it and writes EXPECTED.npz, whose
keys are listed in check_export.py.

Structure: U-Net of 3 levels (32, 64, 128 channels; no attention on the first, then 1 and 2
transformer blocks; heads 16 wide), autoencoder of 4 levels (latents an eighth of a side), text
encoders of 3 layers, CLIP-L's 32 wide and bigG's 64. Two things are the loaders' demand:
diffusers tells the two encoders in a single file apart by their width, and takes bigG's
projection to be as wide as its hidden states.
"""

import argparse
import math
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENIZER_FOLDER = Path(__file__).resolve().parents[2] / "sdxl_host" / "models" / "clip_tokenizer"
SEED = 20230726
WIDTH_1, WIDTH_2 = 32, 64  # of the two text encoders
SIZE_WIDTH = 16  # sinusoids for each of the six size numbers; 256 in SDXL


def build_unet() -> UNet2DConditionModel:
    """SDXL's structure, narrow."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 2],
        # diffusers calls the number of heads attention_head_dim.
        attention_head_dim=[2, 4, 8],
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * SIZE_WIDTH,
    )


def build_autoencoder() -> AutoencoderKL:
    """SDXL's structure, narrow."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=128,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def clip_config(width: int, activation: str, pad: int) -> CLIPTextConfig:
    """A text transformer of 3 layers, `width` wide, with CLIP's vocabulary."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        intermediate_size=4 * width,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=pad,
    )


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter a value whose absence would show.

    Matrices and kernels are N(0, 1/fan_in), embeddings N(0, 0.5^2), and what a new norm or bias
    holds, 1 or near 0, is moved by N(0, 0.1^2).
    """
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif "embedding.weight" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    model.eval()


def build_pipeline() -> StableDiffusionXLPipeline:
    """All the parts, with random weights."""
    torch.manual_seed(SEED)  # of the biases, which keep what they are built with
    generator = torch.Generator().manual_seed(SEED)
    networks = {
        "unet": build_unet(),
        "vae": build_autoencoder(),
        "text_encoder": CLIPTextModel(clip_config(WIDTH_1, "quick_gelu", pad=49407)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(WIDTH_2, "gelu", pad=0)),
    }
    for network in networks.values():
        randomise(network, generator)
    return StableDiffusionXLPipeline(
        **networks,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER, pad_token="!"),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="trailing",
            prediction_type="epsilon",
        ),
        force_zeros_for_empty_prompt=True,
    )


def main() -> int:
    """Write the folder; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, made if it is not there")
    options = parser.parse_args()
    build_pipeline().save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

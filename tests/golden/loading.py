"""The golden weights in a diffusers or transformers model, and its gradients as a few numbers."""

import numpy as np
import torch
from deterministic import array, weight
from names import SDXL, Layout, match, single_file_name

Arrays = dict[str, np.ndarray]


def reference_weight(name: str, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """Weight `name` in the shape that diffusers or transformers gives it, float32."""
    original = single_file_name(name, layout)
    if ".in_proj_" in original:
        third = "qkv".index(match(r".+\.([qkv])_proj\.(?:weight|bias)", name)[0])
        whole = weight(original, (3 * shape[0], *shape[1:]))
        return whole[third * shape[0] : (third + 1) * shape[0]]
    if original.endswith(".text_projection"):
        return weight(original, shape[::-1]).T
    return weight(original, shape)


def load_weights(model: torch.nn.Module, prefix: str, layout: Layout = SDXL) -> None:
    """Overwrite every parameter of `model`; `prefix` completes its names to a folder's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = reference_weight(prefix + name, tuple(parameter.shape), layout)
            parameter.copy_(torch.from_numpy(values.copy()))
    model.eval()


def gradient(tensor: torch.Tensor) -> np.ndarray:
    """Gradient that backward() left on `tensor`, float32."""
    if tensor.grad is None:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} got no gradient; is it used?")
    return tensor.grad.numpy()


def summarise_gradients(model: torch.nn.Module, prefix: str, layout: Layout) -> Arrays:
    """Sum, L2 norm and dot product with a fixed random probe of every parameter's gradient.

    Names (n,) and values (n, 3) float64, sorted by name. The three together tell a gradient that
    is missing, mis-scaled or transposed, in far less room than the gradient itself.
    """
    rows: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        original = single_file_name(prefix + name, layout)
        values = gradient(parameter).astype(np.float64)
        probe = array(f"probe:{original}", values.shape)
        dot = (values * probe).sum()
        rows[original] = [float(values.sum()), float(np.linalg.norm(values)), float(dot)]
    names = sorted(rows)
    return {"grad_names": np.array(names), "grad_values": np.array([rows[n] for n in names])}

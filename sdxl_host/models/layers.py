"""The network's products: layers that may answer in another type than they compute in."""

from __future__ import annotations

from mindspore import nn

__all__ = ["Conv2d", "Dense"]


class Dense(nn.Dense):
    """`nn.Dense`; `output_type` is set by `training.precision`, None for the type computed in."""

    def __init__(self, in_channels: int, out_channels: int, has_bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, has_bias=has_bias)
        self.output_type = None

    def construct(self, x):
        """(..., in_channels) -> (..., out_channels)."""
        output = super().construct(x)
        return output if self.output_type is None else output.astype(self.output_type)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a bias; `output_type` as in `Dense`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            pad_mode="pad",
            padding=padding,
            has_bias=True,
        )
        self.output_type = None

    def construct(self, x):
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        output = super().construct(x)
        return output if self.output_type is None else output.astype(self.output_type)

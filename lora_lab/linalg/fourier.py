"""Matrices with few Fourier coefficients, and their products with rows, without forming them. Pure functions.

    ΔW[a, b] = Σ_k c_k cos(2π (a r_k / m + b s_k / n)) / (m n)

is the real part of the inverse transform of an (m, n) matrix with c_k at (r_k, s_k) and zeros elsewhere. Rows
x are transformed, each frequency s_k is added to r_k, and the result is transformed back. As x is real, half
of its spectrum is enough: frequencies f and n − f differ by the sign of the imaginary part.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lab.linalg.autograd import Context, TensorFunction


class Scatter(NamedTuple):
    """A sparse map between half spectra, whose real and imaginary parts are rows in turn; 2 k entries."""

    source: Int[Tensor, " entries"]
    """The row that each entry reads."""
    target: Int[Tensor, " entries"]
    """The row to which it is added; ascending."""
    coefficient: Int[Tensor, " entries"]
    """Which c it is multiplied by."""
    factor: Float[Tensor, " entries"]
    """Its further factor."""
    offsets: Int[Tensor, " rows"]
    """The first entry of each target."""


def first_of_permutation(count: int, total: int, seed: int) -> Int[Tensor, " count"]:
    """Returns the first numbers of `torch.randperm(total)` under a seed, usually without the others.

    Torch shuffles by swapping number i with a random one from i on, so the first numbers are final after as
    many draws. From 2³² / 20 numbers on it shuffles from the other end, and all are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    if total >= (2**32 - 1) // 20:
        return torch.randperm(total, generator=generator)[:count].clone()
    words = torch.empty((count + 1) // 2, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # two of torch's 32-bit draws
    draws = torch.stack((words >> 32 & 0xFFFFFFFF, words & 0xFFFFFFFF), dim=1).flatten()
    moved: dict[int, int] = {}
    found = []
    for i, draw in enumerate(draws[:count].tolist()):
        other = i + draw % (total - i)
        found.append(moved.get(other, other))
        moved[other] = moved.get(i, i)
    return torch.tensor(found)


def fourier_matrix(
    c: Float[Tensor, " k"], indices: Int[Tensor, "2 k"], rows: int, columns: int
) -> Float[Tensor, "rows columns"]:
    """Returns ΔW.

    Args:
        c: the coefficients.
        indices: r and s of each.
        rows: m.
        columns: n.
    """
    spectrum = torch.zeros(rows, columns, dtype=c.dtype, device=c.device)
    spectrum = spectrum.index_put((indices[0], indices[1]), c)
    with torch.autocast(c.device.type, enabled=False):
        return torch.fft.ifft2(spectrum).real


def scatter(indices: Int[Tensor, "2 k"], rows: int, columns: int, dtype: torch.dtype) -> Scatter:
    """Returns what `fourier_product` needs to know of the frequencies.

    Args:
        indices: r and s of each; swapped, and the sizes with them, for ΔWᵀ.
        rows: m.
        columns: n.
        dtype: type of the coefficients.
    """
    r, s = indices
    r_half, s_half = torch.minimum(r, rows - r), torch.minimum(s, columns - s)
    alone = (r_half == 0) | (2 * r_half == rows)  # its own mirror image: real, and counted once
    real = torch.where(alone, 1.0, 0.5).to(dtype) / columns
    imaginary = torch.where((r_half == r) == (s_half == s), -real, real).where(~alone, 0)
    target = torch.cat((2 * r_half, 2 * r_half + 1))
    order = target.argsort(stable=True)
    source = torch.cat((2 * s_half, 2 * s_half + 1))[order]
    coefficient = torch.arange(len(r), device=r.device).repeat(2)[order]
    offsets = torch.searchsorted(target[order], torch.arange(2 * (rows // 2 + 1), device=r.device))
    return Scatter(source, target[order], coefficient, torch.cat((real, imaginary))[order], offsets)


def fourier_product(
    x: Float[Tensor, "*tokens n"], c: Float[Tensor, " k"], forward: Scatter, back: Scatter, rows: int
) -> Float[Tensor, "*tokens rows"]:
    """Returns x ΔWᵀ. The backward pass keeps x and c alone.

    Args:
        x: in c's type.
        c: the coefficients.
        forward: `scatter` of ΔW.
        back: `scatter` of ΔWᵀ.
        rows: m.
    """
    return _Product.apply(x.to(c.dtype), c, rows, *forward, *back)


class _Product(TensorFunction):
    @staticmethod
    def forward(ctx: Context, x: Tensor, c: Tensor, rows: int, *scatters: Tensor) -> Tensor:
        ctx.save_for_backward(x, c, *scatters)
        return _passed_on(_spectrum(x), c, Scatter(*scatters[:5]), rows).reshape(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c, *scatters = ctx.saved_tensors
        forward, back = Scatter(*scatters[:5]), Scatter(*scatters[5:])
        spectrum = _spectrum(grad)
        by_x = _passed_on(spectrum, c, back, x.shape[-1]).reshape(x.shape)
        # An entry adds c times one row to another: up to a factor its derivative is their product.
        reached = spectrum.index_select(0, forward.target)
        joined = reached.mul_(_spectrum(x).index_select(0, forward.source)).sum(1)
        signed = joined * forward.factor.sign() / (x.shape[-1] * grad.shape[-1])
        by_c = torch.zeros_like(c).index_add(0, forward.coefficient, signed)
        return by_x, by_c, *[None] * 11


def _spectrum(x: Tensor) -> Float[Tensor, "rows tokens"]:
    """Returns the half spectra of all rows of x, as columns."""
    with torch.autocast(x.device.type, enabled=False):
        parts = torch.view_as_real(torch.fft.rfft(x.reshape(-1, x.shape[-1])))  # (tokens, n / 2 + 1, 2)
        return parts.flatten(1).T.contiguous()  # sums of whole rows are fast, of columns slow


def _passed_on(spectrum: Tensor, c: Tensor, scatter: Scatter, width: int) -> Float[Tensor, "tokens width"]:
    """Returns rows of this width whose half spectra are sums of those of others, each times its c."""
    weights = c[scatter.coefficient] * scatter.factor
    with torch.autocast(spectrum.device.type, enabled=False):
        # A sum of weighted rows for each target, without a copy of those rows.
        summed = F.embedding_bag(
            scatter.source, spectrum, scatter.offsets, mode="sum", per_sample_weights=weights
        )
        parts = summed.T.contiguous().unflatten(1, (-1, 2))  # (tokens, width / 2 + 1, 2)
        return torch.fft.irfft(torch.view_as_complex(parts), width)

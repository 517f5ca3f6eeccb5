"""Error reduction beyond the paper: closed-form correction of a weight, and rounding that feeds errors back.

A site computes W x + c; quantized it sees x' in place of x and should still return the float target y. In closed
form, over the calibration rows, centred, with H = E[x' x'^T]:

    ridge        W* = W + E[(y - W x') x'^T] (H + lambda I)^-1     lambda by rows held out     (ERQ, arXiv 2407.06794)
    rounding     column by column, each error passed on to the columns left, weighted by H^-1  (GPTQ, 2210.17323)
    descent      each integer in turn to its least of (w - q) H (w - q)^T, until done twice    (QuantEase, 2309.01885)
    bias         c* = E[y] - W_q E[x']
    affine       s* = a s, c* = E[y] - a E[z], a = cov(y, z) / var(z), z = W_q x'   a channel (QwT-v2, arXiv 2505.20932)

The target may hold the error that a residual branch has gathered so far, which the site then takes back.
All functions work on groups (g, ...) at once, so that grouped convolutions need no loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvit.quant.graph import Pair
from leanvit.quant.quantizers import integer_range

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Candidate lambdas, in units of the mean diagonal of H, from hardly any to all; beside them, none at all."""

DAMPING = 0.01
"""Of the mean diagonal of H, added before rounding with feedback inverts it: GPTQ's default."""

SCALE_SHARES = (1.0, 0.93, 0.86, 0.79, 0.72, 0.64, 0.55)
"""Ranges of a channel to try, as shares of its largest weight; each costs a rounding with feedback of its own."""

SMALL_SHARES = (0.47, 0.4, 0.33)
"""More of them at 2 bits, where the lowest of four integers is twice the highest: on 60 random problems of 64 inputs
0.044 of the signal's energy is left as error with them, 0.064 without; at 3 and 4 bits they change nothing."""

SLOPES = (0.5, 2.0)
"""Of a compensation: more than that is no error of quantization, but a channel that is all noise."""

BLOCK = 64
"""Columns between two updates of all columns that are left: it decides time alone."""

MAX_ROWS = 16384
"""Rows that a correction takes: four for each of the most unknowns that it solves for, MAX_INPUTS."""

MAX_INPUTS = 4096
"""Inputs of an output channel up to which H is inverted (64 MB in float32); wider sites keep nearest rounding."""


@dataclass(frozen=True)
class Corrected:
    """integers: (g, out, in) whole numbers. scale: (g, out). bias: (g, out). correction: lambda taken, None: none."""

    integers: Tensor
    scale: Tensor
    bias: Tensor
    correction: float | None


@torch.no_grad()
def correct(
    weight: Tensor,
    x: Tensor,
    target: Tensor,
    bits: int,
    *,
    ridge: bool,
    images: int,
) -> Corrected:
    """Quantize one site's weight so that its output stays near `target` on the rows of calibration.

    weight: (g, out, in) float. x: (g, rows, in), the quantized inputs, rows of one image together.
    target: (g, rows, out), the wanted output with its bias. images: number of images, so that whole ones are held out.
    """
    weight, x, target = weight.float(), x.float(), target.float()
    mean_x, mean_y = x.mean(1, keepdim=True), target.mean(1, keepdim=True)
    centred, chosen = x - mean_x, None
    if ridge:
        sums = regression_sums(centred, target - mean_y - centred @ weight.transpose(1, 2), images)
        hessian, chosen = sums.hessian, choose_ridge(sums)
        if chosen is not None:
            weight = weight + _solve_ridge(sums.moment, hessian, chosen)
    else:
        hessian = centred.transpose(1, 2) @ centred / x.shape[1]
    integers, scale = round_with_feedback(weight, hessian, bits)
    integers, scale = descend(weight, hessian, integers, scale, bits)
    bias = mean_y - mean_x @ (integers * scale[..., None]).transpose(1, 2)
    return Corrected(integers, scale, bias[:, 0], chosen)


@torch.no_grad()
def compensate(weight: Tensor, bias: Tensor, x: Tensor, target: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """What to multiply the scale of every output channel by, and its bias: one line fitted to `target`, a channel.

    weight: (g, out, in), dequantized. bias: (g, out). x: (g, rows, in), the quantized inputs, rows of one image
    together. target: (g, rows, out), the wanted output. images: number of images; the last quarter decides for each
    channel whether it keeps 1 and its bias. Returns (g, out) each.
    """
    output, target = x.float() @ weight.float().transpose(1, 2), target.float()
    kept = _rows_of_most(x.shape[1], images)
    if kept is None:
        return torch.ones_like(bias), bias
    factor = _slope(output[:, :kept], target[:, :kept])
    shift = target[:, :kept].mean(1) - factor * output[:, :kept].mean(1)
    held, wanted = output[:, kept:], target[:, kept:]
    fitted = (wanted - factor[:, None] * held - shift[:, None]).square().sum(1)
    better = fitted < (wanted - held - bias[:, None]).square().sum(1)
    factor = torch.where(better, factor, torch.ones_like(factor))
    return factor, torch.where(better, target.mean(1) - factor * output.mean(1), bias)


def _slope(z: Tensor, y: Tensor) -> Tensor:
    """cov(y, z) / var(z) over the rows, a channel, within SLOPES. z, y: (g, rows, out)."""
    z = z - z.mean(1, keepdim=True)
    variance = z.square().mean(1)
    slope = (z * y).mean(1) / variance.clamp(min=1e-12)
    return torch.where(variance > 0, slope.clamp(*SLOPES), torch.ones_like(slope))


def _rows_of_most(rows: int, images: int) -> int | None:
    """Rows of the first three quarters of the images; None where there are too few to hold any out."""
    per_image = rows // max(1, images)
    kept = max(1, images - max(1, images // 4)) * per_image
    return None if per_image == 0 or kept >= rows else kept


@dataclass(frozen=True)
class Sums:
    """Of a regression of an error e (g, rows, out) on x (g, rows, in), both of mean 0, all that a ridge needs.

    hessian: E[x x^T], (g, in, in). moment: E[x e^T], (g, in, out). train: the same two over the rows of the first three
    quarters of the images, of the mean that they have; held: the same two over those of the last quarter as sums, with
    the former's mean taken off, and the sum of e^2. None where there are too few images to hold any out.
    """

    hessian: Tensor
    moment: Tensor
    train: tuple[Tensor, Tensor] | None = None
    held: tuple[Tensor, Tensor, Tensor] | None = None


def regression_sums(x: Tensor, error: Tensor, images: int) -> Sums:
    """See Sums. x: (g, rows, in), rows of one image together; error: (g, rows, out)."""
    rows = x.shape[1]
    kept = _rows_of_most(rows, images)
    if kept is None:
        hessian, moment = _products(x, error)
        return Sums(hessian / rows, moment / rows)
    mean_x, mean_e = x[:, :kept].mean(1, keepdim=True), error[:, :kept].mean(1, keepdim=True)
    hessian, moment = _products(x[:, :kept], error[:, :kept])
    x_held, e_held = x[:, kept:] - mean_x, error[:, kept:] - mean_e
    held = _products(x_held, e_held)
    # Sums of what is not centred anew are those of what is, and a product of the means.
    square, cross = mean_x.transpose(1, 2) @ mean_x, mean_x.transpose(1, 2) @ mean_e
    shifted, sum_x, sum_e = rows - kept, x_held.sum(1, keepdim=True), e_held.sum(1, keepdim=True)
    beyond_x, beyond_e = mean_x.transpose(1, 2) @ sum_x, mean_x.transpose(1, 2) @ sum_e
    whole_hessian = hessian + held[0] + beyond_x + beyond_x.transpose(1, 2) + shifted * square
    whole_moment = moment + held[1] + beyond_e + sum_x.transpose(1, 2) @ mean_e + shifted * cross
    train = (hessian / kept - square, moment / kept - cross)
    return Sums(whole_hessian / rows, whole_moment / rows, train, (*held, e_held.square().sum()))


def _products(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of x x^T and x e^T."""
    return x.transpose(1, 2) @ x, x.transpose(1, 2) @ error


def choose_ridge(sums: Sums) -> float | None:
    """The lambda with the least error on the rows held out; None where no correction is better, or none are held out.

    With a shift S of the weight that is sum |e - S x|^2 = sum |e|^2 - 2 <S, x e^T> + <S x x^T, S>.
    """
    if sums.train is None or sums.held is None:
        return None
    hessian, moment, squares = sums.held
    least, best = float(squares), None
    for candidate in RIDGES:
        shift = _solve_ridge(sums.train[1], sums.train[0], candidate)
        gained = 2 * moment.transpose(1, 2) - shift @ hessian
        error = float(squares - (shift * gained).sum())
        if error < least:
            least, best = error, candidate
    return best


def _solve_ridge(moment: Tensor, hessian: Tensor, strength: float) -> Tensor:
    return torch.cholesky_solve(moment, _factor(hessian, strength)).transpose(1, 2)


def _factor(hessian: Tensor, share: float) -> Tensor:
    """Cholesky factor of H + share * mean diagonal; a dead group gets the identity."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-10)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    factor, failed = torch.linalg.cholesky_ex(hessian + (share * diagonal)[:, None, None] * eye)
    if failed.any():
        factor = torch.linalg.cholesky(hessian.double() + (10 * share * diagonal)[:, None, None] * eye).to(hessian)
    return factor


def round_with_feedback(weight: Tensor, hessian: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ with several scales for every output channel side by side; the best is kept, channel by channel.

    Nearest integers with the full range take part too: with few inputs feedback may overshoot.
    weight: (g, out, in); hessian: (g, in, in). Returns integers (g, out, in) and scale (g, out).
    """
    low, high = integer_range(bits, symmetric=True)
    groups, outs, ins = weight.shape
    shares = weight.new_tensor(SCALE_SHARES + SMALL_SHARES if bits == 2 else SCALE_SHARES)
    largest = weight.abs().amax(-1).clamp(min=1e-8) / high
    scale = (largest[:, None, :] * shares[None, :, None]).reshape(groups, -1)
    repeated = weight.repeat(1, len(shares), 1)
    integers = _feedback(repeated, hessian, scale, low, high)
    error = repeated - integers * scale[..., None]
    cost = ((error @ hessian) * error).sum(-1).view(groups, len(shares), outs)
    best = cost.argmin(1)
    pick = best[:, None, :, None].expand(-1, 1, -1, ins)
    chosen = integers.view(groups, len(shares), outs, ins).gather(1, pick)[:, 0]
    found = scale.view(groups, len(shares), outs).gather(1, best[:, None])[:, 0]
    nearest = (weight / largest[..., None]).round_().clamp_(low, high)
    error = weight - nearest * largest[..., None]
    better = ((error @ hessian) * error).sum(-1) < cost.amin(1)
    return torch.where(better[..., None], nearest, chosen), torch.where(better, largest, found)


def _feedback(weight: Tensor, hessian: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    back = order.argsort(-1)[:, None, :].expand_as(weight)
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    inverse = torch.cholesky_inverse(_factor(hessian, DAMPING))
    upper = torch.linalg.cholesky_ex(inverse, upper=True)[0]
    # Column by column in memory, which is how they are read.
    left = weight.gather(2, order[:, None, :].expand_as(weight)).transpose(1, 2).contiguous()
    integers = torch.empty_like(left)
    ins = left.shape[1]
    for start in range(0, ins, BLOCK):
        stop = min(start + BLOCK, ins)
        part, triangle = left[:, start:stop].clone(), upper[:, start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            value = part[:, column]
            integer = (value / scale).round_().clamp_(low, high)
            integers[:, start + column] = integer
            error = (value - integer * scale) / triangle[:, column, column, None]
            part[:, column + 1 :].addcmul_(triangle[:, column, column + 1 :, None], error[:, None], value=-1)
            errors[:, column] = error
        left[:, stop:] -= upper[:, start:stop, stop:].transpose(1, 2) @ errors
    return integers.transpose(1, 2).gather(2, back)


def descend(
    weight: Tensor, hessian: Tensor, integers: Tensor, scale: Tensor, bits: int, passes: int = 2
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the integers and least squares on the scales in turn; the error never grows.

    Shapes as in `round_with_feedback`.
    """
    low, high = integer_range(bits, symmetric=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp(min=1e-10)
    integers = integers.clone()
    for _ in range(passes):
        spread = integers @ hessian
        refit = (spread * weight).sum(-1) / (spread * integers).sum(-1).clamp(min=1e-12)
        scale = torch.where((refit > 0.3 * scale) & (refit < 3 * scale), refit, scale)
        gradient = (weight - integers * scale[..., None]) @ hessian
        for start in range(0, weight.shape[-1], BLOCK):
            block = slice(start, start + BLOCK)
            moved = _descend_block(integers[..., block], gradient[..., block], hessian[:, block, block],
                                   diagonal[:, block], scale, low, high)  # fmt: skip
            gradient -= (moved * scale[..., None]) @ hessian[:, block]
    return integers, scale


def _descend_block(
    integers: Tensor, gradient: Tensor, hessian: Tensor, diagonal: Tensor, scale: Tensor, low: int, high: int
) -> Tensor:
    """Improve the integers of one block in place; returns by how many steps each moved."""
    before, local = integers.clone(), gradient.clone()
    for column in range(integers.shape[-1]):
        current = integers[..., column]
        wanted = current + local[..., column] / (diagonal[:, column, None] * scale)
        better = wanted.round_().clamp_(low, high)
        step = (better - current) * scale
        local -= step[..., None] * hessian[:, None, column]
        integers[..., column] = better
    return integers - before


def conv_patches(x: Tensor, weight: Tensor, options: tuple[Pair, Pair, Pair, int]) -> Tensor:
    """The inputs of every place of a convolution: (B, C, H, W) to (groups, B places, C / groups * k * k).

    options: stride, padding, dilation and groups.
    """
    stride, padding, dilation, groups = options
    batch, channels = x.shape[:2]
    patches = F.unfold(x, (weight.shape[2], weight.shape[3]), dilation=dilation, padding=padding, stride=stride)
    patches = patches.view(batch, groups, channels // groups * weight.shape[2] * weight.shape[3], -1)
    return patches.permute(1, 0, 3, 2).flatten(1, 2)

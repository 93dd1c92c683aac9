"""Losses of the mixing problem and of the student that learns from its mixes.

Source: SuperMix (Dabouei et al., CVPR 2021), sections 3.1, 3.2 and 4.4. Everything is computed in
float32 at least, so bf16 and fp16 logits are safe.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cross_entropy",
    "kd_loss",
    "kl_divergence",
    "mixing_objective",
    "roughness",
    "sparsity",
    "supermix_kd_loss",
    "supermix_loss",
    "widen",
]


def widen(values: Tensor) -> Tensor:
    """float32, or float64 where the values are in it already."""
    return values if values.dtype == torch.float64 else values.float()


def sparsity(masks: Tensor) -> Tensor:
    """Eq. 5: how far masks (B, k, H, W) in [0, 1] are from owning each pixel alone, (B,).

    0 where every pixel belongs to one image, ``(k - 1) / k**2`` where all share evenly.
    """
    return (masks * (1 - masks)).mean(dim=(1, 2, 3))


def roughness(masks: Tensor) -> Tensor:
    """Total variation of masks (B, k, H, W), ``1 / kWH * sum_i sum_u ||grad m_i(u)||_3^3``, (B,).

    Section 4.4, as printed (it calls the term L_s, and its weight lambda_s, where Eq. 3 has L_sigma
    and lambda_sigma): the mean over images and *pixels* of the masks that mix, with the exponent 3
    of the work it names (Fong and Vedaldi, ICCV 2017). The gradient is that of forward differences,
    0 beyond the last row and column; the paper does not say.

    A border that is a ramp of n pixels costs ``1 / n**2`` of a sharp one, so masks of few cells
    are smooth already: the weight 250 counts at 32 px, hardly at 224.

    Example:
        >>> half = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 1, 4, 4)  # one step in each row
        >>> roughness(torch.cat([half, 1 - half], dim=1))
        tensor([0.2500])
    """
    steps = (masks.diff(dim=axis).abs().pow(3).sum(dim=(1, 2, 3)) for axis in (2, 3))
    return sum(steps, masks.new_zeros(len(masks))) / masks.shape[1:].numel()


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """``sum_c targets_c * log(targets_c / softmax(logits)_c)`` of each row, (B, N), (B, N) -> (B,).

    The paper writes ``KL(f || y)``, which is infinite wherever the target is 0; the order used here
    is the finite one, and the one of the authors' code.
    """
    log_probs = widen(logits).log_softmax(dim=1)
    return F.kl_div(log_probs, targets.to(log_probs), reduction="none").sum(dim=1)


def mixing_objective(
    logits: Tensor, targets: Tensor, masks: Tensor, *, lambda_s: float, lambda_tv: float = 0.0
) -> Tensor:
    """Eq. 3, ``KL + lambda_tv * L_sigma + lambda_s * L_s`` of each row, (B,).

    The smooth projection (Eq. 7) takes the place of the roughness term L_sigma (section 3.1).

    Args:
        logits: the teacher's for the mixed images, (B, N).
        targets: Eq. 2, probabilities (B, N).
        masks: (B, k, H, W), in [0, 1].
        lambda_s: weight of the sparsity term; the paper uses 25.
        lambda_tv: weight of the roughness term; the paper's baselines use 250 (section 4.4).
    """
    loss = kl_divergence(logits, targets) + lambda_s * sparsity(masks)
    return loss + lambda_tv * roughness(masks) if lambda_tv else loss


def supermix_loss(
    logits: Tensor, labels: Tensor, mixed_logits: Tensor, mixed_targets: Tensor
) -> Tensor:
    """Eq. 9: cross-entropy of the originals plus cross-entropy of the mixes, a scalar.

    Args:
        logits: the student's for the originals, (B, N).
        labels: class indices (B,) int64, or probabilities (B, N).
        mixed_logits: the student's for the mixes, (M, N). With M = 0 their term is 0.
        mixed_targets: the teacher's label of the mixes: indices (M,), or probabilities (M, N).

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> labels = torch.tensor([0, 1])
        >>> supermix_loss(logits, labels, logits, torch.full((2, 4), 0.25))
        tensor(2.7726)
    """
    originals = cross_entropy(logits, labels)
    if len(mixed_logits) == 0:  # unconverged="drop" can leave none; a mean over no rows is NaN
        return originals + widen(mixed_logits).sum()
    return originals + cross_entropy(mixed_logits, mixed_targets)


def kd_loss(
    logits: Tensor,
    teacher_probs: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    weight: float = 0.1,
) -> Tensor:
    """Eq. 8, a scalar: ``(1 - weight) H(student, y) + weight * tau**2 * H(teacher, student)``.

    Args:
        logits: the student's, (B, N).
        teacher_probs: softmax of the teacher's logits *at the same temperature*, (B, N).
        labels: class indices (B,) int64, or probabilities (B, N).
        temperature: tau; the factor ``tau**2`` is applied here, once.
        weight: the paper's lambda_KD.

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> kd_loss(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor(1.7329)
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}.")
    soft = cross_entropy(widen(logits) / temperature, teacher_probs)
    return (1 - weight) * cross_entropy(logits, labels) + weight * temperature**2 * soft


def supermix_kd_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_probs: Tensor,
    mixed_logits: Tensor,
    mixed_targets: Tensor,
    mixed_teacher_probs: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weight: float = 0.1,
) -> Tensor:
    """Eq. 9 with Eq. 8 in the place of the cross-entropy, a scalar (the paper's "SuperMix + KD").

    Two variants: the paper's text has Eq. 8 for originals and mixes; the authors' code has the soft
    term for the originals only, which is what is computed without `mixed_teacher_probs`. Both
    weigh the two cross-entropies by ``1 - weight``.

    Args:
        logits: the student's for the originals, (B, N).
        labels: class indices (B,) int64, or probabilities (B, N).
        teacher_probs: the teacher's for the originals *at the temperature*, (B, N).
        mixed_logits: the student's for the mixes, (M, N). With M = 0 their terms are 0.
        mixed_targets: the teacher's label of the mixes: hard (M,), or soft (M, N).
        mixed_teacher_probs: the teacher's for the mixes at the temperature, (M, N), or None.
        temperature: tau; the factor ``tau**2`` is applied here, once.
        weight: the paper's lambda_KD.

    Raises:
        ValueError: if the temperature is not positive.
    """
    options = {"temperature": temperature, "weight": weight}
    loss = kd_loss(logits, teacher_probs, labels, **options)
    if len(mixed_logits) == 0:
        return loss + widen(mixed_logits).sum()
    if mixed_teacher_probs is None:
        return loss + (1 - weight) * cross_entropy(mixed_logits, mixed_targets)
    return loss + kd_loss(mixed_logits, mixed_teacher_probs, mixed_targets, **options)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows; targets are indices (B,), or probabilities (B, N) of any floating dtype."""
    logits = widen(logits)
    targets = targets.to(logits) if targets.ndim == 2 else targets
    return F.cross_entropy(logits, targets)

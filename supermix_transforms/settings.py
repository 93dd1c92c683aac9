"""Settings of the solver, and what they come to for one k and one picture size.

Source: SuperMix (Dabouei et al., CVPR 2021), sections 3.1, 4.1 and 4.4 for the values of the
paper's methods; docs/solver-log.md for those of the fast one.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar, get_args

__all__ = ["MethodName", "Resolved", "SolverSettings"]

MethodName: TypeAlias = Literal["fast", "paper", "newton-tv", "sgd"]
Number = TypeVar("Number", int, float)

DEFAULT_MEMORY = 4 << 30


class Resolved(NamedTuple):
    """`SolverSettings` for one k and one picture size, nothing left open."""

    mask_size: int
    sigma: float
    sparsity: float
    margin: float
    max_steps: int
    polish: int
    min_share: float
    max_kl: float  # inf where nothing is asked
    lambda_s: float
    lambda_tv: float
    lr: float
    memory: int
    quantised: bool


@dataclass(frozen=True)
class SolverSettings:
    """How masks are searched for. None is the method's own value.

    Raises:
        ValueError: for values out of range.
    """

    method: MethodName = "fast"
    mask_size: int | None = None  # w, cells a side; 16, but the paper's methods 8 up to 64 px
    # of the gradient's blur, in cells; fast 0.5, paper mask_size / 8, newton-tv and sgd none
    sigma: float | None = None
    # L_s projected to (fast), below (k - 1) / k²; 0.074, 0.104, 0.124 for k of 2, 3, 4..6
    sparsity: float | None = None
    # in logits, of the k classes over all others; fast 0.05, 0.25 in half precision, else 0
    margin: float | None = None
    # fast 20, paper and newton-tv 50, sgd 300; reaching it is an outcome, no error
    max_steps: int | None = None
    polish: int = 0  # further steps once converged; the converged iterate of least KL is kept
    min_share: float = 0.0  # of the teacher's probability, that the k classes must have together
    max_kl: float | None = None  # KL(r || f) must not be above it, in nats
    lambda_s: float = 25.0  # weight of L_s (all but fast)
    lambda_tv: float = 250.0  # weight of the roughness (newton-tv, sgd)
    lr: float = 0.1  # length of a step, in gradients (sgd)
    # bytes that a search may allocate; tuples are searched in chunks that stay below it; 4 GiB
    memory: int | None = None
    # masks are rounded as recipes store them, and the teacher judges what these give; `generate`
    # sets it
    quantised: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(MethodName):
            names = list(get_args(MethodName))
            raise ValueError(f"method: expected one of {names}, got {self.method!r}.")
        for name, least in (("mask_size", 1), ("max_steps", 0), ("polish", 0), ("memory", 1)):
            value = getattr(self, name)
            if not self._unset(name) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}.")
        for name in ("sigma", "margin", "max_kl", "lambda_s", "lambda_tv", "lr"):
            value = getattr(self, name)
            if not self._unset(name) and not (_is_number(value) and 0 <= value < float("inf")):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}.")
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise ValueError(f"sparsity: expected a number in (0, 1), got {self.sparsity!r}.")
        if not (_is_number(self.min_share) and 0 <= self.min_share < 1):
            raise ValueError(f"min_share: expected a number in [0, 1), got {self.min_share!r}.")

    def _unset(self, name: str) -> bool:
        """Whether it is None, and None means something."""
        default = type(self).__dataclass_fields__[name].default
        return default is None and getattr(self, name) is None

    def resolve(self, k: int, size: tuple[int, int], *, half: bool = False) -> Resolved:
        """Every None filled in, for k images of (height, width) pixels.

        The margin is what an answer needs to survive another batch size: in `half` precision more.

        Raises:
            ValueError: if the mask has more cells than the picture has pixels, or for a sparsity
                that masks of k images cannot have.
        """
        short = min(size)
        cells = 8 if self.method != "fast" and short <= 64 else 16
        mask_size = self.mask_size or min(cells, short)
        if mask_size > short:
            raise ValueError(
                f"mask_size: expected at most {short} cells for pictures of {size[0]} x {size[1]}, "
                f"got {mask_size}. Pass a smaller mask_size, or None."
            )
        margin = 0.25 if half else 0.05
        most = (k - 1) / k**2  # L_s of masks that are 1 / k everywhere
        if self.sparsity is not None and self.sparsity >= most:
            raise ValueError(
                f"sparsity: expected less than {most:.4f}, the most that masks of k={k} images "
                f"have, got {self.sparsity}. Pass a smaller sparsity, or None."
            )
        return Resolved(
            mask_size=mask_size,
            sigma=_default(self.sigma, {"fast": 0.5, "paper": mask_size / 8}.get(self.method, 0.0)),
            sparsity=_default(self.sparsity, {2: 0.074, 3: 0.104}.get(k, min(0.124, 0.9 * most))),
            margin=_default(self.margin, margin if self.method == "fast" else 0.0),
            max_steps=_default(self.max_steps, {"fast": 20, "sgd": 300}.get(self.method, 50)),
            polish=self.polish,
            min_share=self.min_share,
            max_kl=_default(self.max_kl, float("inf")),
            lambda_s=self.lambda_s,
            lambda_tv=self.lambda_tv,
            lr=self.lr,
            memory=_default(self.memory, DEFAULT_MEMORY),
            quantised=self.quantised,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _default(value: Number | None, default: Number) -> Number:
    return default if value is None else value

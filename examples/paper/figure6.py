"""Figure 6: top-1 of the student against the size of the mixed set, alpha, k and lambda_s.

    python examples/paper/figure6.py --panel k --data ../shared/data --work students/

CIFAR-100, ResNet-56 to ResNet-20. The paper prints curves without numbers: what its text says of
them is in CLAIMS. Panels a and b are `size`, c and d `alpha`, e and f `k`, h `lambda_s` (by the
paper's solver, whose penalty it is; the fast one projects to a sparsity instead). Panel g is k on
ImageNet: the rows supermix and supermix-3 of table4.py.

As long as the paper's: --steps 234000 --seeds 0 1 2 3 --test, 31 hours a run on one core as in
table1.py. A small setting:

    python examples/paper/figure6.py --panel k --data ../shared/data --work students/ \\
        --pictures 2000 --mixes 2000 --steps 32

Panel `size` multiplies the mixes of an epoch, so it wants --steps 160 there, 3520 of all pictures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from students import STUDENTS, Case, cases_of, parser_of, run_all

METHODS = ("mixup-hard", "cutmix-hard", "supermix-hard")  # the paper's labels
SOFT = ("mixup-soft", "cutmix-soft", "supermix-soft")
VALUES: dict[str, tuple[Any, ...]] = {
    "size": (1, 2, 5, 10),  # times the pictures
    "alpha": (0.1, 0.3, 1.0, 3.0, 10.0),
    "k": (2, 3, 4),
    "lambda_s": (1.0, 5.0, 25.0, 100.0),
}
CLAIMS = {
    "size": "better with more mixes, no more beyond 500,000; alpha 1",
    "alpha": "nothing gained for alpha near 0, best at 3, less for very large alpha",
    "k": "at 32 x 32 all methods lose beyond 2, MixUp and CutMix most",
    "lambda_s": "better up to about 25, then worse",
}


def varied(case: Case, panel: str) -> list[Case]:
    """The case at each value of the panel."""
    if panel == "size":
        return [replace(case, mixes=value * case.pictures, alpha=1.0) for value in VALUES[panel]]
    return [replace(case, **{panel: value}) for value in VALUES[panel]]


def main() -> None:
    parser = parser_of(__doc__, "figure6", METHODS + SOFT)
    parser.add_argument("--student", choices=tuple(STUDENTS), default="resnet20")
    parser.add_argument("--panel", choices=tuple(VALUES), required=True)
    parser.set_defaults(out=None, methods=METHODS)  # out: that of the panel
    options = parser.parse_args()
    options.out = options.out or Path(f"docs/results/figure6-{options.panel}.json")
    if options.panel == "lambda_s":
        options.methods = ["paper-hard"]
    cases = [
        new
        for case in cases_of(options, student=options.student)
        for new in varied(case, options.panel)
    ]
    run_all(cases, options, command="python examples/paper/figure6.py", paper=CLAIMS)


if __name__ == "__main__":
    main()

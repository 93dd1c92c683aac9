"""Table 1: a network learns from mixes that it made itself, against policies of augmentation.

    python examples/paper/table1.py --data ../shared/data --work students/

The teacher is trained first, on originals; here it is the ResNet-20 beside the pictures, and the
student is a ResNet-20. The paper has WRN-40-2, WRN-28-10 and Shake-Shake on CIFAR-100, ResNet-50
and ResNet-200 on ImageNet, and takes the rows but those of mixes from other papers, where a cutout
follows each policy.

As long as the paper's: --steps 234000 --seeds 0 1 2 3 --test, 31 hours a run on one core at the
0.48 s a step that were measured here. A small setting, that shows that all rows work:

    python examples/paper/table1.py --data ../shared/data --work students/ \\
        --pictures 2000 --mixes 2000 --steps 32
"""

import sys

from students import cases_of, parser_of, run_all, table

PAPER = {  # top-1 errors, %, WRN-40-2 and WRN-28-10 on CIFAR-100
    "ce": (26.0, 18.8),
    "cutout": (25.2, 18.4),
    "autoaugment-cifar10+cutout": (20.7, 17.1),
    "pba-cifar10+cutout": (None, 16.7),
    "fast-autoaugment-cifar10+cutout": (20.6, 17.3),
    "mixup-hard": (22.8, 17.9),
    "cutmix-hard": (22.1, 17.1),
    "supermix-hard": (20.3, 16.4),
}


def main() -> None:
    parser = parser_of(__doc__, "table1", tuple(PAPER))
    parser.set_defaults(teacher="resnet20")  # of the student's kind
    options = parser.parse_args()
    command = "python examples/paper/table1.py"
    results = run_all(cases_of(options), options, command=command, paper_errors=PAPER)
    errors = {name: f"errors {each}" for name, each in PAPER.items()}
    print("\n".join(table(results, errors)), file=sys.stderr)


if __name__ == "__main__":
    main()

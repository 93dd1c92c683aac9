"""Table 2: a student of the teacher's kind on CIFAR-100, ResNet-56 to ResNet-20.

    python examples/paper/table2.py --data ../shared/data --work students/

As long as the paper's (FULL; the paper has the mean of four runs):

    python examples/paper/table2.py --data ../shared/data --work students/ --steps 234000 \\
        --seeds 0 1 2 3 --test

a run of which is 234,000 steps of 256 pictures: 31 hours on one core at the 0.48 s a step that were
measured here. A small setting, that shows that all rows work:

    python examples/paper/table2.py --data ../shared/data --work students/ \\
        --pictures 2000 --mixes 2000 --steps 32
"""

import sys

from students import cases_of, parser_of, run_all, table

PAPER = {  # top-1, %, on the test set
    "teacher": 72.34,
    "ce": 69.06,
    "kd": 70.66,
    "at": 70.55,
    "vid": 70.38,
    "crd": 71.16,
    "crd-kd": 71.63,
    "unlabelled-hard": 71.38,  # ImgNet32, L_CE
    "mixup-hard": 72.00,
    "cutmix-hard": 72.33,
    "supermix-hard": 72.64,
    "unlabelled-hard-kd": 72.22,  # L_KD
    "mixup-hard-kd": 72.89,
    "cutmix-hard-kd": 72.67,
    "supermix-hard-kd": 73.19,
}


def main() -> None:
    methods = [name for name in PAPER if name != "teacher"]
    options = parser_of(__doc__, "table2", methods).parse_args()
    command = "python examples/paper/table2.py"
    results = run_all(cases_of(options), options, command=command, paper_top1=PAPER)
    print("\n".join(table(results, PAPER)), file=sys.stderr)


if __name__ == "__main__":
    main()

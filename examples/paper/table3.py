"""Table 3: a student of another kind than the teacher's on CIFAR-100.

    python examples/paper/table3.py --data ../shared/data --work students/

Here the ResNet-56 beside the pictures teaches a ShuffleNetV2 (torchvision's x0.5, whose first layer
keeps the size of 32 pixels). The paper's nearest pair is ResNet-32x4 to ShuffleNetV2. AT and VID
compare the three stages of both.

As long as the paper's: --steps 234000 --seeds 0 1 2 3 --test. A small setting:

    python examples/paper/table3.py --data ../shared/data --work students/ \\
        --pictures 2000 --mixes 2000 --steps 32
"""

import sys

from students import cases_of, parser_of, run_all, table

PAPER = {  # top-1, %, ResNet-32x4 to ShuffleNetV2
    "teacher": 79.42,
    "ce": 71.82,
    "kd": 74.45,
    "at": 72.73,
    "vid": 73.40,
    "crd": 75.65,
    "crd-kd": 76.05,
    "unlabelled-hard": 77.56,
    "mixup-hard": 78.84,
    "cutmix-hard": 79.32,
    "supermix-hard": 79.53,
    "unlabelled-hard-kd": 77.90,
    "mixup-hard-kd": 79.14,
    "cutmix-hard-kd": 79.53,
    "supermix-hard-kd": 79.80,
}


def main() -> None:
    methods = [name for name in PAPER if name != "teacher"]
    options = parser_of(__doc__, "table3", methods).parse_args()
    cases = cases_of(options, student="shufflenet_v2_x0_5")
    command = "python examples/paper/table3.py"
    results = run_all(cases, options, command=command, paper_top1=PAPER)
    print("\n".join(table(results, PAPER)), file=sys.stderr)


if __name__ == "__main__":
    main()

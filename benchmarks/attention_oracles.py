"""The table of docs/attention.md: every attention kind, its oracle, and the largest differences in float32.

python -m benchmarks.attention_oracles
"""

from pathlib import Path

from benchmarks.record import write_result
from tests.models.language.attention_oracles import CASES

OUTPUT = Path("benchmarks/results/attention_oracles.json")


def main() -> None:
    rows = []
    print("| kind | oracle | output | gradients |\n|---|---|---|---|")
    for case in CASES:
        try:
            output, gradient = case.differences()
        except ImportError as error:
            print(f"| {case.kind} | {case.oracle} | {error} | |")
            continue
        rows.append({"kind": case.kind, "oracle": case.oracle, "output": output, "gradients": gradient})
        print(f"| {case.kind} | {case.oracle} | {output:.1e} | {gradient:.1e} |")
    write_result(OUTPUT, "attention_oracles", rows)


if __name__ == "__main__":
    main()

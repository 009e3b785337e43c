"""What tools/modular.sh has to show, read from the files that it left: prints a table, exit code 1 where a claim fails.

    python tools/modular_claims.py runs/quickstart runs/modular

Extraction: at most 60 % of the expert parameters, metric at most 0.01 below the whole model's. Growing: old metrics as they
were, to the last digit, and the new task at most 0.02 below fine-tuning everything. Bits of outputs: same_outputs.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from modsquad_ds.errors import UserError
from modsquad_ds.evaluate import Results
from modsquad_ds.model_file import expert_parameters, read_model
from modsquad_ds.tasks import KINDS

KEPT, LOST, BEHIND = 0.6, 0.01, 0.02
ROUNDING = 1e-9
"""0.98 - 0.96 is more than 0.02 in binary numbers."""
NEW_TASK = "faces"


class Claim(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    holds: bool


def evaluation(run: Path) -> Results:
    """The metrics that `evaluate` left beside a model."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `modsquad-ds evaluate {run}` first")
    results: Results = json.loads(path.read_bytes())
    return results


def expert_numbers(run: Path) -> int:
    """How many numbers the experts of a model hold, over all sparse layers."""
    model = read_model(run / "model.safetensors")
    return sum(model.state[name].numel() for name in expert_parameters(model.recipe))


def claims(full: Path, modular: Path) -> Iterator[Claim]:
    """Every claim, with what was found. Raises UserError where a file is missing."""
    tasks = read_model(full / "model.safetensors").recipe.active
    before, all_experts = evaluation(full), expert_numbers(full)
    for task, spec in tasks.items():
        metric = KINDS[spec.kind].metrics[0]
        whole, part = before[task][metric], evaluation(modular / task)[task][metric]
        assert whole is not None and part is not None
        share = expert_numbers(modular / task) / all_experts
        yield Claim(f"{task} alone: expert parameters kept, at most {KEPT:.0%}", f"{share:.1%}", share <= KEPT)
        holds = part >= whole - LOST - ROUNDING
        yield Claim(f"{task} alone: {metric}, at most {LOST} below all experts'", f"{whole:.4f} -> {part:.4f}", holds)
    grown = evaluation(modular / "grown")
    for task in tasks:
        same = grown[task] == before[task]
        yield Claim(f"{task} after growing: metrics as before", "the same" if same else f"{before[task]} -> {grown[task]}", same)
    tuned, added = (results[NEW_TASK]["top1"] for results in (evaluation(modular / "faces_all"), grown))
    assert tuned is not None and added is not None
    near = added >= tuned - BEHIND - ROUNDING
    yield Claim(f"{NEW_TASK} by new experts: top1, at most {BEHIND} below training everything", f"{tuned:.2f}, {added:.2f}", near)


def main() -> int:
    """Print the claims; the exit code says whether all hold."""
    if len(sys.argv) != 3:
        print("usage: python tools/modular_claims.py RUN MODULAR", file=sys.stderr)
        return 2
    try:
        found = list(claims(Path(sys.argv[1]), Path(sys.argv[2])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| claim | found | holds |\n|---|---|---|")
    for claim in found:
        print(f"| {claim.what} | {claim.found} | {'yes' if claim.holds else 'NO'} |")
    return 0 if all(claim.holds for claim in found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A worker that trains a whole row once and ends.

python -m experiments.benchmark.row '{"dataset": "cifar10", "data_dir": "DIR", "seeds": [0], ...}'
"""

from __future__ import annotations

import json
import os
import sys

INSTALL = "python -m pip install -e '.[cuda]' installs distill_jax and all that it needs"


def main(argument: str) -> None:
    """Answers one JSON object: what `trained_row.train` returns, or why there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        # Imported here, so that a package that is not there is an answer too.
        from experiments.benchmark import trained_row

        answer = trained_row.train(json.loads(argument))
    except ModuleNotFoundError as error:
        answer = {"missing": f"{error.name} is not installed; {INSTALL}"}
    except ValueError as error:  # of the data, the config or a flag
        answer = {"missing": str(error)}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

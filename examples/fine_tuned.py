"""Fine-tune the base model on documents and feedback, and register the result: what the DAG `<application>.finetune`
does, in this process. Minutes on a CPU."""

import argparse

from millrace.applications import load_application
from millrace.settings import read_settings
from millrace.training.candidate import release_candidate
from millrace.training.finetune import finetune
from millrace.training.sets import build_training_set

RUN = "examples/fine_tuned.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, help="at most so many; as declared if left out")
    parser.add_argument("--application", default="qa")
    given = parser.parse_args()
    settings = read_settings()
    application = load_application(settings, given.application)
    built = build_training_set(settings, application, run=RUN, max_examples=given.examples)
    trained = finetune(settings, application, training_set=built["training_set"], run=RUN)
    print(release_candidate(settings, application, trained=trained, run=RUN))


if __name__ == "__main__":
    main()

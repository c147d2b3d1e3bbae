"""Ask a release of any kind with plain MLflow; no Millrace server needs to run."""

import argparse

import mlflow.pyfunc
import pandas as pd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="models:/<application>/<version>, or a folder")
    parser.add_argument("index_builds", help="<home>/indexes/<environment>/<application>")
    parser.add_argument("question")
    given = parser.parse_args()
    model = mlflow.pyfunc.load_model(given.model, model_config={"index_builds": given.index_builds})
    answer = model.predict(pd.DataFrame({"question": [given.question]})).iloc[0]
    print(answer["answer"])
    for citation in answer["citations"]:
        print("  from chunk", citation)


if __name__ == "__main__":
    main()

"""Register a release whose model an OpenAI-compatible server has: vLLM, `transformers serve`, a paid API."""

import argparse
import os

from millrace.applications import load_application
from millrace.releases.declare import declare_release
from millrace.settings import read_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, with its /v1; its key is read from MILLRACE_UPSTREAM_API_KEY")
    parser.add_argument("model", help="what the server calls it")
    parser.add_argument("--application", default="qa")
    given = parser.parse_args()
    os.environ |= {"MILLRACE_UPSTREAM_URL": given.url, "MILLRACE_UPSTREAM_MODEL": given.model}
    settings = read_settings()
    application = load_application(settings, given.application)
    print(declare_release(settings, application, variant=None, run="examples/existing_api.py"))


if __name__ == "__main__":
    main()

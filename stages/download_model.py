"""Bring a published model to data/models/<model>: from a hub id or a local folder.

What to fetch stands in params.yaml, download_model.<model>; metrics/download_model/<model>.json
says what came.
"""

from __future__ import annotations

import argparse
import sys

from musicscope.artifacts import write_json
from musicscope.config import load_params
from musicscope.models.download import download


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: download_model")
    name = parser.parse_args().model
    params = load_params()
    if name not in params.download_model:
        sys.exit(f"params.yaml has no download_model.{name}; it has {list(params.download_model)}")
    found = download(params.download_model[name], f"data/models/{name}")
    write_json(f"metrics/download_model/{name}.json", found)
    print(f"data/models/{name}: {found['files']} files, {found['bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

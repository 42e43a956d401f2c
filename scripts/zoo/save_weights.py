"""Saves networks as transformers folders, for exporters that read such folders.

usage: save_weights.py OUT_DIR NAME... [--drop 2,5]
"""
import argparse
from pathlib import Path

import networks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--drop", type=networks.layer_list, default=[], help="layers that the network goes without")
    args = parser.parse_args()
    for name in args.names:
        networks.without_layers(networks.build(name), args.drop).save_pretrained(args.out / name)


if __name__ == "__main__":
    main()

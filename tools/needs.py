"""What an installed package needs, a line each, without some of it: needs.py PACKAGE [LEFT OUT …]"""
import re
import sys
from importlib.metadata import requires


def needs(package, without=()):
    "The requirements of a package that no extra asks for."
    lines = [line for line in requires(package) or () if "extra ==" not in line]
    return [line for line in lines if re.match(r"[\w.-]+", line)[0] not in without]


if __name__ == "__main__": print("\n".join(needs(sys.argv[1], sys.argv[2:])))

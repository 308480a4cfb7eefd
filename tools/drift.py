"""Would nbdev_export or nbdev_clean change anything? python tools/drift.py

Both run on a copy: no file here is touched, and uncommitted work is checked like a clean checkout.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def sources(root):
    "Contents of the notebooks and modules under `root`, by path."
    paths = [*root.glob("nbs/**/*.ipynb"), *root.glob("probunlearn/**/*.py")]
    paths = [p.relative_to(root) for p in paths]
    return {str(p): (root/p).read_bytes() for p in paths if not any(part.startswith(".") for part in p.parts)}


def remake(before, root):
    "The same after export and clean, every module but `__init__` made anew, so that a stale one is missing."
    shutil.copy(ROOT/"settings.ini", root)
    for name, content in before.items():
        if name.endswith(".py") and Path(name).name != "__init__.py": continue
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(content)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}   # under IN_TEST nbdev_export does nothing
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([BIN/command], cwd=root, env=env, check=True)
    return sources(root)


def word(name, before, after):
    "What is wrong with a file."
    if name not in after: return "is exported by no notebook"
    return "is out of date" if name in before else "is missing"


def main():
    before = sources(ROOT)
    with tempfile.TemporaryDirectory() as tmp: after = remake(before, Path(tmp))
    differ = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    for name in differ: print(f"drift: {name} {word(name, before, after)}")
    if differ: print(f"drift check: {len(differ)} files differ; run nbdev_export && nbdev_clean")
    else: print(f"drift check: export and clean change none of {len(before)} files")
    return bool(differ)


if __name__ == "__main__": sys.exit(main())

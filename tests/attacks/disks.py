"""Disks that fail on purpose, in place of the one object through which everything is written."""
import errno
import io
import math
import random
from pathlib import Path

import probunlearn.files
from probunlearn.files import Disk


class Killed(BaseException):
    "The process is gone: nothing that it would do afterwards reaches the disk."


class Handle(io.FileIO):
    "A file that tells its disk about every write."
    def __init__(self, path, disk):
        super().__init__(path, "x")
        self.disk = disk

    def write(self, data):
        data = memoryview(data).cast("B")
        if not len(data): return 0
        left = data[:self.disk.writes(len(data))]
        while left: left = left[super().write(left):]       # the system may take a part, and refuse the next one
        return len(data)


class Faulty(Disk):
    "Dies at a step (half of what is being written gets through), or is full after so many bytes; counts both."
    def __init__(self, die_at=math.inf, room=math.inf):
        self.die_at = die_at
        self.room = room
        self.steps = 0
        self.used = 0
        self.boundaries = []        # bytes written before each write

    def step(self):
        self.steps += 1
        if self.steps >= self.die_at: raise Killed

    def writes(self, count):
        "How many of so many bytes get through."
        try: self.step()
        except Killed:
            if self.steps > self.die_at: raise
            return count // 2
        self.boundaries.append(self.used)
        if self.used + count > self.room: raise OSError(errno.ENOSPC, "No space left on device")
        self.used += count
        return count

    def create(self, path):
        self.step()
        return Handle(path, self)

    def lock(self, path):
        self.step()
        return super().lock(path)

    def rename(self, old, new):
        self.step()
        super().rename(old, new)

    def remove(self, path):
        self.step()
        super().remove(path)

    def clear(self, folder):
        self.step()
        super().clear(folder)

    def sync(self, file): self.step()

    def sync_folder(self, folder): self.step()


class Forgetful(Faulty):
    "After a power cut it has what was synced, and any part of the rest."
    def __init__(self, die_at=math.inf, seed=0):
        super().__init__(die_at)
        self.rng = random.Random(seed)
        self.certain = {}           # file → its synced content
        self.before = {}            # path → content at the last sync of its folder
        self.pending = []           # (folder, path → content) of renames and removals since then, each done or not

    def sync(self, file):
        super().sync(file)
        file.flush()
        self.certain[str(file.name)] = Path(file.name).read_bytes()

    def note(self, folder, change):
        for path in change: self.before.setdefault(path, Path(path).read_bytes() if Path(path).exists() else None)
        self.pending.append((str(folder), change))

    def rename(self, old, new):
        self.step()
        old, new = Path(old), Path(new)
        files = [old] if old.is_file() else [path for path in old.rglob("*") if path.is_file()]
        gone = {str(path): None for path in files}
        there = {str(new/path.relative_to(old)): self.certain.get(str(path), b"") for path in files}   # unsynced: lost
        self.note(new.parent, {path: content for path, content in (gone | there).items() if ".tmp" not in path})
        Disk.rename(self, old, new)
        self.certain |= there

    def remove(self, path):
        self.step()
        if Path(path).exists() and not str(path).endswith(".tmp"): self.note(Path(path).parent, {str(path): None})
        Disk.remove(self, path)

    def sync_folder(self, folder):
        super().sync_folder(folder)
        for change in [change for place, change in self.pending if place == str(folder)]:
            for path, content in change.items():
                self.put(path, content)
                self.before.pop(path, None)
        self.pending = [(place, change) for place, change in self.pending if place != str(folder)]

    def put(self, path, content):
        if content is None: return Path(path).unlink(missing_ok=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    def cut(self):
        "The power goes: of what wasn't synced, each step has reached the disk or not."
        for path, content in self.before.items(): self.put(path, content)
        for _, change in self.pending:
            if self.rng.random() < .5:
                for path, content in change.items(): self.put(path, content)


class with_disk:
    "Within the block everything is written to this disk."
    def __init__(self, disk): self.disk = disk

    def __enter__(self):
        self.usual = probunlearn.files.DISK
        probunlearn.files.DISK = self.disk
        return self.disk

    def __exit__(self, *_): probunlearn.files.DISK = self.usual


def steps_of(work, kind=Faulty, **how):
    "The disk of a run without faults: how many steps it took, where its writes began."
    with with_disk(kind(**how)) as disk: work()
    return disk


def spread(count, points=20):
    "So many different numbers from 1 to `count`, evenly spread."
    return sorted({1 + round(i * (count - 1) / (points - 1)) for i in range(points)})

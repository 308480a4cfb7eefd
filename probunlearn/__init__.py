__version__ = "0.1.0"


def _homes():
    "The module of every public function and class, from nbdev's index: nothing is loaded."
    from ._modidx import d
    return {symbol.rsplit(".", 1)[1]: module for module, symbols in d["syms"].items() for symbol in symbols
            if symbol.count(".") == 2 and "._" not in symbol}


def __getattr__(name):
    "A module or public name, loaded on first use: `probunlearn.evaluate`."
    from importlib import import_module
    homes = _homes()
    if f"{__name__}.{name}" in homes.values(): return import_module(f"{__name__}.{name}")
    if name in homes: return getattr(import_module(homes[name]), name)
    raise AttributeError(f"{__name__} has no public name {name!r}")


def __dir__(): return sorted({*globals(), *_homes(), *(module.rsplit(".", 1)[1] for module in _homes().values())})

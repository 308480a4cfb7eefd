"Packaged data: read it with `importlib.resources.files("probunlearn._data")`."

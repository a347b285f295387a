"""The Python API (docs/python.md): the functions of `crcjax`, and the objects that a notebook displays."""

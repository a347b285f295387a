"""The Python API (docs/python.md): functions and objects of `crcjax` that show themselves in a notebook."""

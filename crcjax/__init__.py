"""crcjax: the molecular subtype of colorectal cancer from whole-slide images, in JAX."""

__version__ = "0.1.0"

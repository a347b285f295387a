"""Opening any whole-slide image file."""

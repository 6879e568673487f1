"""The compiled core by itself: no socket, no file."""

"""What a user's own files may be: one place for each rule, called by training, checkers and inference alike.

Needs NumPy and Pillow only.
"""

from elfatt.data.images import EXTENSIONS, is_image, orientation_of, read_image, standard_image

__all__ = ["EXTENSIONS", "is_image", "orientation_of", "read_image", "standard_image"]

"""Rules for users' own data, shared by training, evaluation, inference and the checkers.

Needs NumPy and Pillow only.
"""

from elfatt.data.errors import UserError
from elfatt.data.images import (
    EXTENSIONS,
    check_shape,
    check_size,
    is_image,
    list_images,
    orientation_of,
    read_image,
    standard_image,
)

__all__ = [
    "EXTENSIONS",
    "UserError",
    "check_shape",
    "check_size",
    "is_image",
    "list_images",
    "orientation_of",
    "read_image",
    "standard_image",
]

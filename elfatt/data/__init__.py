"""Reading and checking of users' data, shared by training, evaluation, inference and the data checker.

Needs only NumPy and Pillow.
"""

from elfatt.data.errors import UserError
from elfatt.data.images import (
    EXTENSIONS,
    check_shape,
    check_size,
    is_hidden,
    is_image,
    list_images,
    opened,
    orientation_of,
    read_image,
    standard_image,
)

__all__ = [
    "EXTENSIONS",
    "UserError",
    "check_shape",
    "check_size",
    "is_hidden",
    "is_image",
    "list_images",
    "opened",
    "orientation_of",
    "read_image",
    "standard_image",
]

"""Start images that clients upload: checked before they are decoded, and written as PNG files."""

import base64
import binascii
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from live.protocol import MAX_IMAGE, MAX_IMAGE_SIDE
from utils.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")


def save_image(content: str, path: Path) -> None:
    """Decode an image file in base64 and write its pixels to a PNG file.

    Raises:
        UserError: if it is no PNG, JPEG or WebP image, or too large.
    """
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("the image is not valid base64") from None
    if len(data) > MAX_IMAGE:
        raise UserError(f"the image has {len(data)} bytes; the limit is {MAX_IMAGE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, before the pixels are decoded
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if max(image.size) > MAX_IMAGE_SIDE:
                    size = f"{image.width}x{image.height}"
                    raise UserError(f"the image has {size} pixels; each side may have {MAX_IMAGE_SIDE}")
                ImageOps.exif_transpose(image).convert("RGB").save(path, "PNG")
    except UserError:
        raise
    except Exception:  # Pillow also raises struct.error or TypeError for broken metadata
        path.unlink(missing_ok=True)
        raise UserError("the image cannot be read: send a PNG, JPEG or WebP file") from None

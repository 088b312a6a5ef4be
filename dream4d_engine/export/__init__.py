"""Images and videos as files."""

from .images import contact_sheet, save_image, to_bytes
from .video import Video, VideoWriter, read_video, write_video

__all__ = ["Video", "VideoWriter", "contact_sheet", "read_video", "save_image", "to_bytes", "write_video"]

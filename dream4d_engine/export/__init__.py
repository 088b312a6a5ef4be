"""Pictures and videos as files."""

from .pictures import contact_sheet, save_picture, to_bytes
from .video import Video, VideoWriter, read_video, write_video

__all__ = ["Video", "VideoWriter", "contact_sheet", "read_video", "save_picture", "to_bytes", "write_video"]

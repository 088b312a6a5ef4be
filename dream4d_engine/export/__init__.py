"""Images, videos and meshes as files."""

from .gltf import GltfOptions, glb_bytes
from .images import contact_sheet, save_image, to_bytes
from .meshes import (
    MESH_FORMATS,
    ExportOptions,
    ExportReport,
    MeshFormat,
    SceneMesh,
    export_scene,
    mesh_format,
    save_mesh,
    scene_mesh,
)
from .video import Video, VideoWriter, read_video, write_video

__all__ = [
    "MESH_FORMATS",
    "ExportOptions",
    "ExportReport",
    "GltfOptions",
    "MeshFormat",
    "SceneMesh",
    "Video",
    "VideoWriter",
    "contact_sheet",
    "export_scene",
    "glb_bytes",
    "mesh_format",
    "read_video",
    "save_image",
    "save_mesh",
    "scene_mesh",
    "to_bytes",
    "write_video",
]

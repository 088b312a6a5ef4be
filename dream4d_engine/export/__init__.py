"""Images, videos and meshes as files."""

from .gltf import GltfOptions, glb_bytes
from .images import contact_sheet, save_image, to_bytes
from .meshes import (
    MESH_FORMATS,
    ROOM,
    ExportOptions,
    ExportReport,
    MeshFormat,
    SceneMesh,
    clip_times,
    export_scene,
    mesh_format,
    save_mesh,
    scene_mesh,
)
from .own import OwnMesh, own_mesh_glb, require_own, require_own_file
from .video import Video, VideoWriter, pick_frames, read_video, write_video

__all__ = [
    "MESH_FORMATS",
    "ExportOptions",
    "ExportReport",
    "GltfOptions",
    "MeshFormat",
    "OwnMesh",
    "ROOM",
    "SceneMesh",
    "Video",
    "VideoWriter",
    "contact_sheet",
    "clip_times",
    "export_scene",
    "glb_bytes",
    "mesh_format",
    "own_mesh_glb",
    "pick_frames",
    "read_video",
    "require_own",
    "require_own_file",
    "save_image",
    "save_mesh",
    "scene_mesh",
    "to_bytes",
    "write_video",
]

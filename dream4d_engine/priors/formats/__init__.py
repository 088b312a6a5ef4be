"""What lies on the disk or on the hub: folders, checkpoints, files of networks, LoRAs; checked before it is built.

A file here reads only files further up in this list:

    pickled, lora_names                 what a pickle says, what names of a LoRA's tensors say
    checkpoints                         files of tensors, of whatever kind
    configurations                      settings of networks and schedules, in bounds
    finite, clip_keys, lora_scale       weights that are no numbers; CLIP's names; peft's factors
    ldm_keys, loaders, lora_files       latent diffusion's names; what every model gives (Loader); LoRA files
    folders, single_file                the models themselves: diffusers' folders, and all that is one file
    pipelines                           today's models in diffusers' folders
    tiny_vae, identify, weights         autoencoders in their place; what a path is; the hub
    convert                             a checkpoint as a folder
"""

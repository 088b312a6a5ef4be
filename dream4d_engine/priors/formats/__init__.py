"""What lies on the disk or on the hub: folders, checkpoints, files of networks, LoRAs; checked before it is built."""
